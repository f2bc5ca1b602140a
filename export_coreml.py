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

C channels | D width of a text state | L text tokens | h w latent rows, columns
"""
import argparse
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
from coreml.ane import MASKED, AneDecoder, AneTextEncoder, AneUNet, calibrate
from coreml.bundle import COMPILE, Bundle
from coreml.check import LIMIT, lint
from coreml.convert import compress, convert_form, round_to_fp16, write_metadata
from coreml.coreai import check_coreai, export_coreai
from coreml.executor import CheckError, Package, audit, load_coremltools, shape_of, tensor_psnr
from decoder import Autoencoder, AutoencoderConfig, load_autoencoder
from model import PRESETS, UNet, count_params, load_model
from sample import euler, generate, sampling, times
from text import Tokens, parts_of

GATES = {"form": 100, "graph": 100, "numerics": 50}      # dB, at least
PICTURE = {16: 35, 8: 20, 6: 0, 4: 0}    # dB by bits: under 8 it may become another good picture
KEPT = ("model", "text", "data", "flow", "few_steps")    # of the checkpoint's config
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
        return tensor_psnr(a, b)


def text_part(net) -> Part:
    cfg, pad = net.text_cfg, net.vocabulary.pad
    cases = []
    for caption in (PROMPTS[2], ""):
        ids = net.vocabulary.tokenize([caption], cfg.max_tokens, cut=True).ids
        ids = F.pad(ids, (0, cfg.max_tokens - ids.shape[1]), value=pad)         # (1, L)
        cases.append({"input_ids": ids.float()})

    def train(input_ids):
        tokens = Tokens(input_ids.long(), input_ids != pad)
        bias = torch.where(tokens.mask, 0.0, MASKED)[:, :, None]
        return torch.cat([net.text(tokens).emb, bias], 2)                       # (1, L, D+1)
    return Part("TextEncoder", "last_hidden_state",
                "Token ids, padded -> text states (L, D), and as last channel the mask",
                AneTextEncoder(net.text).eval(), train, cases, count_params(net.text), True)


def unet_case(x, t: float, states) -> dict:
    return {"sample": x, "timestep": torch.tensor([1000 * t]), "encoder_hidden_states": states}


def unet_part(unet, x, states) -> Part:
    def train(sample, timestep, encoder_hidden_states):
        emb = encoder_hidden_states[:, :-1, 0].transpose(1, 2)                  # (1, L, D)
        mask = encoder_hidden_states[:, -1, 0] > -1                             # (1, L)
        return unet(sample, timestep / 1000, emb, mask)
    return Part("Unet", "noise_pred", "Latents, 1000 t, text states -> velocity v = eps - x0",
                AneUNet(unet, *x.shape[2:], states.shape[-1]).eval(), train,
                [unet_case(x, 1.0, states)], count_params(unet))


def decoder_part(ae, latents) -> Part:
    return Part("VAEDecoder", "image", "Normalised latents -> picture in [-1, 1]",
                AneDecoder(ae).eval(), lambda z: ae.decode(z), [{"z": z} for z in latents],
                count_params(ae.decoder))


@torch.no_grad()
def make_parts(source) -> list[Part]:
    """Random weights are compared on noise at t = 1. Trained ones on a half-drawn picture at
    t = 0.25 too, with real text states where we have their encoder."""
    net, unet, g = source.net, source.unet, torch.Generator().manual_seed(0)
    parts = []
    if net is not None and net.text is not None:
        parts = [text_part(net)]
        states = [parts[0].train(**case) for case in parts[0].cases]            # (1, L, D+1)
        states = [s.transpose(1, 2)[:, :, None].contiguous() for s in states]   # (1, D+1, 1, L)
    else:
        L = source.tokens
        bias = torch.where(torch.arange(L) < L - 20, 0.0, MASKED)[None, None, None]
        emb = torch.randn(1, unet.cfg.context_dim, 1, L, generator=g)
        states = [torch.cat([emb, bias], 1)] * 2
    n = source.size // 8
    x = torch.randn(1, unet.cfg.in_channels, n, n, generator=g)                 # (1, C, h, w)
    part = unet_part(unet, x, states[0])
    latents = [x]
    if net is not None:
        def velocity(x, t):
            return part.train(**unet_case(x, t, states[0]))
        x0 = euler(velocity, x, times(8, 1.0))
        part.cases.append(unet_case(0.75 * x0 + 0.25 * x, 0.25, states[1]))
        latents = [x0, x]
    return [*parts, part, decoder_part(source.ae, latents)]


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


# ----------------------------------------------------------------------------------------- gates
def measure(path, part: Part, wanted, compressed=False) -> dict:
    """Executes a saved package on the part's cases -> PSNRs in dB, the largest |activation|."""
    package, graph, numerics, seen = Package(path), [], [], []
    for case, want in zip(part.cases, wanted, strict=True):
        if not compressed:
            exact = package.run(case, half=False)[part.output]
            graph.append(part.psnr(exact, part.form(**case)))
        rounded, largest, _ = audit(package, case)
        numerics.append(part.psnr(rounded[part.output], want))
        seen += [value for value, _ in largest.values()]
    if compressed:
        return {"largest": max(seen), "compressed": min(numerics)}
    return {"largest": max(seen), "graph": min(graph), "numerics": min(numerics)}


@torch.inference_mode()
def export_part(part: Part, folder: Path, bits: int, ios: int) -> tuple[dict, list[str]]:
    """Converts, saves, executes, compares -> (the manifest's entry, the gates that failed)."""
    path, begin = folder / f"{part.name}.mlpackage", time.time()
    wanted = [part.train(**case) for case in part.cases]     # in fp32: rounding is yet to come
    calibrate(part.form, part.cases)
    form = min(part.psnr(part.form(**c), w) for c, w in zip(part.cases, wanted, strict=True))
    round_to_fp16(part.form)
    model = convert_form(part.form, part.cases[0], part.output, ios)
    model.save(str(path))
    row = {"file": path.name, "output": part.output, "params": part.params, "bits": 16}
    row |= {"form": form} | measure(path, part, wanted)
    if bits < 16 and part.name != "VAEDecoder":    # the smallest part, and the picture's last word
        largest = row["largest"]
        shutil.rmtree(path)
        compress(model, bits).save(str(path))
        row |= {"bits": bits} | measure(path, part, wanted, compressed=True)
        row["largest"] = max(row["largest"], largest)
    package = Package(path)
    found = lint(package)
    row |= {"bytes": package.bytes, "ops": len(package.ops), "seconds": time.time() - begin,
            "inputs": {k: shape_of(v) for k, v in package.inputs.items()},
            "outputs": {k: shape_of(v) for k, v in package.outputs.items()},
            "lint": dict(Counter(f.rule for f in found))}
    failed = [f"{k} {row[k]:.1f} dB < {v}" for k, v in GATES.items() if not row[k] >= v]
    if not row["largest"] <= LIMIT:
        failed.append(f"|activation| {row['largest']:.0f} > {LIMIT}")
    errors = [f for f in found if f.rule[0] == "E"]
    failed += [f"lint {f.rule} {f.name}: {f.what}" for f in errors[:3]]
    print_part(part.name, row, failed)
    return row, failed


def print_part(name, row, failed):
    errors, warnings = (sum(n for rule, n in row["lint"].items() if rule[0] == x) for x in "EW")
    print(f"{name:12} {row['params'] / 1e6:7.2f} M {row['bytes'] / 1e6:7.2f} MB {row['ops']:5} ops"
          f" | form {row['form']:.1f} graph {row['graph']:.1f} numerics {row['numerics']:.1f} dB"
          f" | largest {row['largest']:.0f} | lint {errors} errors {warnings} warnings"
          f" | {row['seconds']:.0f} s", flush=True)
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
        if ae.cfg.decoder != "tiny":
            raise UserError(f"{a.ae} has SD3's decoder: only the tiny one is exported")
    grain = 8 * 2 ** (len(unet.cfg.widths) - 1)
    if size % grain or size < grain or tokens < 21:
        raise UserError(f"--size {size} --tokens {tokens}: this UNet draws multiples of {grain} "
                        "pixels, and is compared on 21 tokens or more")
    return Source(net, unet, ae, config, size, tokens)


def check_out(out: Path, marker: str):
    """UserError where `out` is something else than an earlier bundle."""
    if out.is_file() or out.exists() and any(out.iterdir()) and not (out / marker).is_file():
        raise UserError(f"{out} is not empty and no bundle of ours: give another --out")


def shift_of(config: dict) -> float:
    """The shift of time that a checkpoint is sampled with."""
    return (config.get("few_steps") or {}).get("shift") or config["flow"]["shift"]


def describe(source: Source, a) -> dict:
    """The manifest, but for its parts."""
    config, ae = source.config, source.ae.cfg
    how = sampling(config)
    return {
        "version": VERSION, "git": provenance()["commit"], "size": source.size, "bits": a.bits,
        "source": f"random weights, {a.preset}" if a.preset else str(a.ckpt), "ios": a.ios,
        "tools": {"torch": torch.__version__,
                  "coremltools": load_coremltools().__version__},
        "latent": {"channels": ae.latent, "factor": 8, "scale": ae.scale, "shift": ae.shift},
        "schedule": {
            "kind": "rectified flow", "prediction": "velocity", "timestep": "1000 t",
            "sampler": how["sampler"], "steps": len(how["steps"]) - 1, "times": how["steps"],
            "cfg": how["cfg"], "shift": shift_of(config),
            "swift": "discreteFlowScheduler, schedulerTimestepShift 1, decoderScaleFactor 1, "
                     "disableSafety true"},
        "config": {k: config[k] for k in KEPT if k in config},
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
    manifest["seconds"] = time.time() - begin
    manifest["peak_gib"] = peak_memory(torch.device("cpu"))
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
            export_coreai(make_parts(source), folder, source.size, shift_of(source.config))
        elif failed := export_bundle(a, source, folder):
            shutil.rmtree(refused, ignore_errors=True)
            folder.rename(refused)           # an earlier bundle of this name stays
            raise UserError(f"refused: {'; '.join(failed)}. The bundle was kept in {refused}")
    print(f"{out} is ready")


def parse(argv):
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
    return p.parse_args(argv)


def main(argv):
    try:
        export(parse(argv))
    except CheckError as e:
        raise UserError(str(e)) from None


if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
