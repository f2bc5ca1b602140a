"""To the iPhone: a checkpoint as a Core ML bundle for the Neural Engine, proved op by op anywhere.

    python export_coreml.py --out bundle                   TextEncoder, Unet, VAEDecoder .mlpackage
    python export_coreml.py --ckpt runs/base --size 256 --bits 8 --out bundle
    python export_coreml.py --preset t2i --size 1024 --out bundle
                                      the paper's 379 M UNet and 1.38 M decoder, random weights
    python export_coreml.py --target coreai --out bundle-ai
                                      for iOS 27: .aimodel files (pip install coreai-torch)

Each package is saved, loaded again and executed by coreml/check.py. A bundle is refused (exit
status 1, kept aside as OUT.refused) unless
    form      the Neural Engine's form (coreml/ane.py) against the training form, fp32    >= 100 dB
    graph     the file in fp32 against that form with weights rounded to fp16             >= 100 dB
    numerics  the file, executed as fp16 hardware would, against the training form         >= 50 dB
    range     the largest |activation| in fp16                                             <= 32768
    lint      errors of the Neural Engine's rules                                                 0
    picture   pictures from the files against PyTorch's, same seeds                        >= 35 dB
With --bits 8, 6 or 4 the first three hold for the fp16 file that is then compressed; the compressed
file is linted and watched for its range, and at 8 bits its pictures must reach 20 dB.

D width of a text state | L text tokens
"""
import argparse
import contextlib
import io
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import VERSION, crc32, replacing
from common import UserError, friendly, keep_memory_mapped, peak_memory, provenance
from coreml import ane, check
from coreml.bundle import COMPILE, DESCRIPTIONS, Bundle
from coreml.coreai import check_coreai, export_coreai
from decoder import Autoencoder, AutoencoderConfig, load_autoencoder
from model import PRESETS, UNet, count_params, load_model
from sample import euler, generate, sampling, times
from text import Tokens, parts_of

GATES = {"form": 100, "graph": 100, "numerics": 50}      # dB, at least
PICTURE = {16: 35, 8: 20, 6: 0, 4: 0}    # dB by bits: under 8 it may become another good picture
PROMPTS = ["a red car", "three dogs", "a tulip left of two rockets", "a koala and a donut"]


# ------------------------------------------------------------------------------ what is exported
@dataclass
class Part:
    """One package: the Neural Engine's form, and the training form to compare it with."""
    name: str
    output: str
    text: str                # what it does, for the package's metadata
    form: torch.nn.Module
    train: Callable          # takes the form's inputs by name, gives its output
    cases: list[dict]        # inputs to compare them on
    params: int
    masked: bool = False     # the output's last channel is the mask

    def psnr(self, a, b) -> float:
        if self.masked:      # its values of -10000 would flatter
            a, b = a[..., :-1], b[..., :-1]
        return check.tensor_psnr(a, b)


def text_part(net) -> Part:
    cfg, pad = net.text.cfg, net.vocabulary.pad
    cases = []
    for caption in (PROMPTS[2], ""):
        ids = net.vocabulary.tokenize([caption], cfg.max_tokens, cut=True).ids
        ids = F.pad(ids, (0, cfg.max_tokens - ids.shape[1]), value=pad)         # (1, L)
        cases.append({"input_ids": ids.float()})

    def train(input_ids):
        tokens = Tokens(input_ids.long(), input_ids != pad)
        bias = torch.where(tokens.mask, 0.0, ane.MASKED)[:, :, None]
        return torch.cat([net.text(tokens).emb, bias], 2)                       # (1, L, D+1)
    return Part("TextEncoder", "last_hidden_state",
                "Token ids, padded -> text states (L, D), and as last channel the mask",
                ane.AneTextEncoder(net.text).eval(), train, cases, count_params(net.text), True)


def unet_part(unet, states, size, generator, trained) -> Part:
    """Compared on noise at t = 1; with trained weights on a half-drawn picture at t = 0.25 too."""
    def train(sample, timestep, encoder_hidden_states):
        emb = encoder_hidden_states[:, :-1, 0].transpose(1, 2)                  # (1, L, D)
        mask = encoder_hidden_states[:, -1, 0] > -1                             # (1, L)
        return unet(sample, timestep / 1000, emb, mask)

    def case(x, t, states):
        return {"sample": x, "timestep": torch.tensor([1000 * t]), "encoder_hidden_states": states}

    n = size // 8
    x = torch.randn(1, unet.cfg.in_channels, n, n, generator=generator)
    cases = [case(x, 1.0, states[0])]
    if trained:
        x0 = euler(lambda x, t: train(**case(x, t, states[0])), x, times(8, 1.0))
        cases.append(case(0.75 * x0 + 0.25 * x, 0.25, states[1]))
    form = ane.AneUNet(unet, n, n, states[0].shape[-1]).eval()
    return Part("Unet", "noise_pred", "Latents, 1000 t, text states -> velocity v = eps - x0",
                form, train, cases, count_params(unet))


def decoder_part(ae, latents) -> Part:
    return Part("VAEDecoder", "image", "Normalised latents -> picture in [-1, 1]",
                ane.AneDecoder(ae).eval(), lambda z: ae.decode(z), [{"z": z} for z in latents],
                count_params(ae.decoder))


@torch.no_grad()
def make_parts(source) -> list[Part]:
    """The text states that the UNet is compared on are real ones, where we have their encoder."""
    g = torch.Generator().manual_seed(0)
    unet, parts = source.unet, []
    if source.net is not None and source.net.text is not None:
        parts = [text_part(source.net)]
        states = [parts[0].train(**case) for case in parts[0].cases]            # (1, L, D+1)
        states = [s.transpose(1, 2)[:, :, None].contiguous() for s in states]   # (1, D+1, 1, L)
    else:
        L = source.tokens
        mask = torch.where(torch.arange(L) < L - 20, 0.0, ane.MASKED)[None, None, None]
        emb = torch.randn(1, unet.cfg.context_dim, 1, L, generator=g)
        states = [torch.cat([emb, mask], 1)] * 2
    trained = source.net is not None
    parts.append(unet_part(unet, states, source.size, g, trained))
    x = parts[-1].cases[0]["sample"]
    latents = [x]
    if trained:
        drawn = parts[-1].cases[1]["sample"]
        latents = [(drawn - 0.25 * x) / 0.75, x]
    return [*parts, decoder_part(source.ae, latents)]


@torch.no_grad()
def perturb(module, seed=0):
    """Random weights in which nothing is zero or one: a zero output proves nothing, and coremltools
    folds a gain of 1 away."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.ndim == 1:
            p += 0.1 * torch.randn(p.shape, generator=g)
        elif not p.any():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 * p[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def round_to_fp16(form):
    """In place, the training form's parameters too: they are shared. The sinusoids' frequencies
    stay in fp32, in the file too."""
    for name, v in [*form.named_parameters(), *form.named_buffers()]:
        if name != "freqs":
            v.copy_(v.half().float())


# ------------------------------------------------------------------------------------ conversion
def convert_form(form, inputs: dict, output: str, ios: int):
    """A Neural Engine form -> Core ML model in fp16. What has rank 2 or less (the time's sinusoids,
    token ids) stays fp32 and runs before the engine starts."""
    ct = check.load_coremltools()

    def is_fp16(op):
        return not all(v.shape is not None and len(v.shape) <= 2 for v in op.outputs)

    types = {True: np.float16, False: np.float32}
    typed = [ct.TensorType(k, v.shape, dtype=types[v.ndim > 2]) for k, v in inputs.items()]
    with contextlib.redirect_stderr(io.StringIO()):                             # progress bars
        graph = torch.jit.trace(form, tuple(inputs.values()), check_trace=False)
        return ct.convert(
            graph, inputs=typed, outputs=[ct.TensorType(output, dtype=np.float16)],
            convert_to="mlprogram", minimum_deployment_target=getattr(ct.target, f"iOS{ios}"),
            compute_precision=ct.transform.FP16ComputePrecision(op_selector=is_fp16),
            compute_units=ct.ComputeUnit.CPU_AND_NE, skip_model_load=True)


def palette(weight, bits: int):
    """The best table of 2**bits values for a tensor, and the weights' indices in it.

    One-dimensional k-means (Lloyd) on the histogram: fp16 has at most 65,536 values. coremltools'
    own "kmeans" finds tables as good, but wants scikit-learn and takes five times as long here.
    """
    flat = weight.astype(np.float32).ravel()
    values, index, count = np.unique(flat, return_inverse=True, return_counts=True)
    k = min(2 ** bits, len(values))
    # many centres want a density of p ** (1/3) (Panter & Dite 1951): a good start
    gaps = np.gradient(values.astype(np.float64)) if k > 1 else np.ones(1)
    share = count ** (1 / 3) * gaps ** (2 / 3)
    centres = np.interp((np.arange(k) + 0.5) / k * share.sum(), share.cumsum() - share / 2, values)
    for _ in range(40):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
        n = np.bincount(nearest, count, k)
        total = np.bincount(nearest, count * values.astype(np.float64), k)
        centres = np.where(n > 0, total / np.maximum(n, 1), centres)
    nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
    table = np.pad(centres, (0, 2 ** bits - k), mode="edge").astype(weight.dtype)
    return table, nearest[index].astype(np.uint8)


def compress(model, bits: int):
    """8: int8 per output channel. 6, 4: a table of 2**bits values for each tensor."""
    import coremltools.optimize.coreml as cto
    if bits == 8:
        how = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8",
                                          granularity="per_channel")
        do = cto.linear_quantize_weights
    else:
        how = cto.OpPalettizerConfig(mode="custom", lut_function=lambda w: palette(w, bits))
        do = cto.palettize_weights
    with contextlib.redirect_stderr(io.StringIO()):                             # progress bars
        return do(model, cto.OptimizationConfig(how))


def write_metadata(path: Path, text: str, values: dict):
    """Into the saved protobuf: the graph and the weights that were proved are not written again."""
    spec = check.load_coremltools().utils.load_spec(str(path))
    m = spec.description.metadata
    m.author, m.license = "nanoSnapGen", "MIT"
    m.versionString, m.shortDescription = VERSION, text
    m.userDefined.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()})
    for feature in (*spec.description.input, *spec.description.output):
        feature.shortDescription = DESCRIPTIONS[feature.name]
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(spec.SerializeToString())


# ----------------------------------------------------------------------------------------- gates
def measure(path, part: Part, wanted, compressed=False) -> dict:
    """Executes a saved package on the part's cases -> PSNRs, the largest |activation|, seconds."""
    package, graph, numerics, seen = check.Package(path), [], [], []
    begin = time.time()
    for case, want in zip(part.cases, wanted, strict=True):
        if not compressed:
            exact, _, _ = check.audit(package, case, half=False)
            graph.append(part.psnr(exact[part.output], part.form(**case)))
        rounded, largest, _ = check.audit(package, case)
        numerics.append(part.psnr(rounded[part.output], want))
        seen += [value for value, _ in largest.values()]
    row = {"largest": max(seen), "execute_s": time.time() - begin}
    if compressed:
        return row | {"compressed": min(numerics)}
    return row | {"graph": min(graph), "numerics": min(numerics)}


@torch.inference_mode()
def export_part(part: Part, folder: Path, bits: int, ios: int) -> tuple[dict, list[str]]:
    """Converts, saves, executes, compares -> (the manifest's entry, the gates that failed)."""
    path, begin = folder / f"{part.name}.mlpackage", time.time()
    wanted = [part.train(**case) for case in part.cases]     # in fp32: rounding is yet to come
    ane.calibrate(part.form, part.cases)
    form = min(part.psnr(part.form(**c), w) for c, w in zip(part.cases, wanted, strict=True))
    round_to_fp16(part.form)
    model = convert_form(part.form, part.cases[0], part.output, ios)
    model.save(str(path))
    row = {"file": path.name, "output": part.output, "params": part.params, "bits": 16,
           "form": form, "convert_s": time.time() - begin} | measure(path, part, wanted)
    if bits < 16 and part.name != "VAEDecoder":    # the smallest part, and the picture's last word
        shutil.rmtree(path)
        compress(model, bits).save(str(path))
        compressed = measure(path, part, wanted, compressed=True)
        compressed["largest"] = max(compressed["largest"], row["largest"])
        row |= compressed | {"bits": bits}
    package = check.Package(path)
    found = check.lint(package)
    fused, unfused = check.estimate(package)[0], check.estimate(package, fused=False)[0]
    row |= {
        "bytes": package.bytes, "ops": len(package.ops),
        "inputs": {k: [check.dtype_of(v), check.shape_of(v)] for k, v in package.inputs.items()},
        "outputs": {k: [check.dtype_of(v), check.shape_of(v)] for k, v in package.outputs.items()},
        "lint": dict(Counter(f.rule for f in found)),
        "gflop": sum(map(check.op_flops, package.ops)) / 1e9,
        "estimate_ms": {c: [1000 * fused[c], 1000 * unfused[c]] for c in fused},
    }
    failed = [f"{k} {row[k]:.1f} dB < {v}" for k, v in GATES.items() if not row[k] >= v]
    if not row["largest"] <= check.LIMIT:
        failed.append(f"|activation| {row['largest']:.0f} > {check.LIMIT}")
    errors = [f for f in found if f.rule[0] == "E"]
    failed += [f"lint {f.rule} {f.name}: {f.what}" for f in errors[:3]]
    print_part(part.name, row, failed)
    return row, failed


def print_part(name, row, failed):
    warnings = sum(n for rule, n in row["lint"].items() if rule[0] == "W")
    print(f"{name:12} {row['params'] / 1e6:7.2f} M {row['bytes'] / 1e6:7.2f} MB {row['ops']:5} ops"
          f" {row['gflop']:8.2f} GFLOP | form {row['form']:.1f} graph {row['graph']:.1f} numerics "
          f"{row['numerics']:.1f} dB | largest {row['largest']:.0f} | lint {warnings} warnings | "
          f"convert {row['convert_s']:.0f} s, execute {row['execute_s']:.1f} s", flush=True)
    if "compressed" in row:
        print(f"{'':12} at {row['bits']} bits {row['compressed']:.1f} dB")
    for f in failed:
        print(f"{'':12} FAILED {f}")


def picture_psnr(a, b) -> float:
    """PSNR in dB between two lists of uint8 pictures."""
    error = np.mean((np.stack(a).astype(float) - np.stack(b)) ** 2)
    return float(10 * np.log10(255 ** 2 / max(1e-9, error)))


def picture_gate(a, folder: Path, size: int) -> float:
    """Pictures from the files against PyTorch's from the weights before rounding -> PSNR."""
    net, config = load_model(a.ckpt)
    how = sampling(config)               # a few-step student draws in its own steps, unguided
    bundle, seeds = Bundle(folder), range(len(PROMPTS))
    begin = time.time()
    ours = generate(bundle, bundle, PROMPTS, seeds, size, **how)
    seconds = (time.time() - begin) / len(PROMPTS)
    value = picture_psnr(ours, generate(net, load_autoencoder(a.ae), PROMPTS, seeds, size, **how))
    print(f"pictures of {size} px: {value:.1f} dB against PyTorch ({len(PROMPTS)} prompts, "
          f"{len(how['steps']) - 1} steps, guidance {how['cfg']:g}; {seconds:.1f} s each here)")
    return value


# ------------------------------------------------------------------------------------ the bundle
@dataclass
class Source:
    """What is exported. net: TextToLatents, or None where the weights are random."""
    net: torch.nn.Module | None
    unet: torch.nn.Module
    ae: torch.nn.Module
    config: dict
    size: int
    tokens: int


def load_source(a) -> Source:
    """Reads the checkpoints. UserError, before any work, where they cannot be exported so."""
    if a.preset:
        config = {"model": asdict(PRESETS[a.preset]), "flow": {"shift": 3.0}}
        net, unet = None, perturb(UNet(PRESETS[a.preset]))
        ae, size, tokens = perturb(Autoencoder(AutoencoderConfig())), a.size or 1024, a.tokens
    else:
        net, config = load_model(a.ckpt)
        if not hasattr(net, "unet"):
            raise UserError(f"{a.ckpt} is an MMDiT: only UNets are exported")
        unet, ae, size = net.unet, load_autoencoder(a.ae), a.size or config["data"]["size"]
        tokens = net.text_cfg.max_tokens
        if net.text is None:
            tokens = max(last for _, last, _, _ in parts_of(net.text_cfg).values())
            print(f"text.kind={net.text_cfg.kind}: the frozen text encoders are not in the bundle, "
                  "an app brings them; no pictures are compared")
    grain = 8 * unet.grain
    if size % grain or size < grain:
        raise UserError(f"--size {size}: this UNet draws multiples of {grain} pixels")
    return Source(net, unet, ae, config, size, tokens)


def check_out(out: Path, marker: str):
    """UserError where `out` is something else than an earlier bundle."""
    if out.is_file() or out.exists() and any(out.iterdir()) and not (out / marker).is_file():
        raise UserError(f"{out} is not empty and no bundle of ours: give another --out")


def describe(source: Source, a) -> dict:
    """The manifest, but for its parts."""
    config, ae = source.config, source.ae.cfg
    how = sampling(config)
    return {
        "version": VERSION, "git": provenance()["commit"], "size": source.size, "bits": a.bits,
        "source": f"random weights, {a.preset}" if a.preset else str(a.ckpt), "ios": a.ios,
        "tools": {"torch": torch.__version__,
                  "coremltools": check.load_coremltools().__version__},
        "latent": {"channels": ae.latent, "factor": 8, "scale": ae.scale, "shift": ae.shift},
        "schedule": {
            "kind": "rectified flow", "prediction": "velocity", "timestep": "1000 t",
            "sampler": how["sampler"], "steps": len(how["steps"]) - 1, "times": how["steps"],
            "cfg": how["cfg"], "shift": config.get("few_steps", config["flow"])["shift"],
            "swift": "discreteFlowScheduler, schedulerTimestepShift 1, decoderScaleFactor 1, "
                     "disableSafety true"},
        "config": {k: config[k] for k in ("model", "text", "flow", "few_steps") if k in config},
    }


def write_vocabulary(net, folder: Path) -> dict:
    """The vocabulary of the checkpoint, as a file and as the manifest's entry."""
    v, file = net.vocabulary, folder / "captions.tiktoken"
    file.write_bytes(v.data)
    return {"file": file.name, "crc32": crc32(file), "pattern": v.pattern, "end": v.end,
            "pad": v.pad, "max": net.text_cfg.max_tokens,
            "format": "tiktoken: base64 of the bytes, rank",
            "rule": "lower case, strip, one blank in front (nothing for the empty prompt); BPE; "
                    "<end>; <pad> up to max"}


def export_bundle(a, source: Source, folder: Path) -> list[str]:
    """Fills the folder -> the gates that failed."""
    begin, failed = time.time(), []
    manifest = describe(source, a) | {"parts": {}}
    own_text = source.net is not None and source.net.text is not None
    if own_text:
        manifest["tokens"] = write_vocabulary(source.net, folder)
    for part in make_parts(source):
        row, missed = export_part(part, folder, a.bits, a.ios)
        manifest["parts"][part.name] = row
        failed += [f"{part.name}: {m}" for m in missed]
        checks = {k: row[k] for k in (*GATES, "largest")}
        kept = {k: manifest[k] for k in ("config", "schedule", "latent", "git")}
        write_metadata(folder / row["file"], part.text, kept | {"checks": checks})
    (folder / "compile.sh").write_text(COMPILE)
    (folder / "compile.sh").chmod(0o755)
    file = folder / "manifest.json"
    file.write_text(json.dumps(manifest, indent=1))
    if own_text and not failed:
        manifest["picture"] = picture_gate(a, folder, source.size)
        if not manifest["picture"] >= PICTURE[a.bits]:
            failed.append(f"picture {manifest['picture']:.1f} dB < {PICTURE[a.bits]}")
    manifest["seconds"], manifest["peak_gib"] = time.time() - begin, peak_memory(torch.device("cpu"))
    file.write_text(json.dumps(manifest, indent=1))
    size = sum(row["bytes"] for row in manifest["parts"].values()) / 1e6
    print(f"{size:.1f} MB, {manifest['seconds']:.0f} s, {manifest['peak_gib']:.1f} GiB at most")
    return failed


def export(a):
    out = Path(a.out).expanduser()
    refused = out.with_name(out.name + ".refused")
    coreai = a.target == "coreai"
    check_out(out, "metadata.json" if coreai else "manifest.json")
    if coreai:
        check_coreai()
    keep_memory_mapped()
    source = load_source(a)
    with replacing(out, latest=False) as folder:
        if coreai:
            export_coreai(make_parts(source), folder, source.size, source.config["flow"]["shift"])
        elif failed := export_bundle(a, source, folder):
            shutil.rmtree(refused, ignore_errors=True)
            folder.rename(refused)           # an earlier bundle of this name stays
            raise UserError(f"refused: {'; '.join(failed)}. The bundle was kept in {refused}")
    print(f"{out} is ready")


def main(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", default="assets/scenes", help="checkpoint or run")
    p.add_argument("--ae", default="assets/ae", help="the autoencoder's checkpoint")
    p.add_argument("--preset", default="", choices=["", *PRESETS],
                   help="random weights of this rung of model.py and the paper's decoder, instead")
    p.add_argument("--out", default="bundle")
    p.add_argument("--size", type=int, default=0, help="pixels; default: as in training")
    p.add_argument("--tokens", type=int, default=77, help="with --preset: length of the text")
    p.add_argument("--bits", type=int, choices=(16, 8, 6, 4), default=16,
                   help="of a weight: 8 = int8 per channel, 6 and 4 = palettes")
    p.add_argument("--target", choices=("coreml", "coreai"), default="coreml",
                   help="coreai: for iOS 27 by Apple's coreai-torch (coreml/coreai.py)")
    p.add_argument("--ios", type=int, choices=(17, 18), default=18)
    try:
        export(p.parse_args(argv))
    except check.CheckError as e:
        raise UserError(str(e)) from None


if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
