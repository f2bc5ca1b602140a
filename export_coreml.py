"""To the iPhone: a checkpoint as a Core ML bundle for the Neural Engine, proved op by op on any machine.

    python export_coreml.py --out bundle                                     the shipped weights: TextEncoder, Unet, VAEDecoder as .mlpackage
    python export_coreml.py --ckpt runs/base --out bundle --size 256 --bits 8 --attention split512
    python export_coreml.py --size 64 96 --out bundle                        several sizes as functions of one package, weights stored once
    python export_coreml.py --random t2i --size 1024 --out bundle            the paper's 379 M UNet and 1.38 M decoder, random weights
    python export_coreml.py --target coreai --out bundle-ai                  for iOS 27: .aimodel files (pip install coreai-torch)
    python export_coreml.py --report docs/COREML.md                          all that was measured, in one file; reuses bundles in --work

Each package is saved, loaded again and executed by coreml_check.py. A bundle is refused (exit status 1, kept aside as OUT.refused) unless
    form      the Neural Engine's form (ane.py) against the training form in PyTorch, fp32                            >= 100 dB
    graph     the file, executed in fp32, against that form with fp16-rounded weights                                 >= 100 dB
    numerics  the file, executed as fp16 hardware would, against the training form in fp32                            >= 50 dB
    range     the largest |activation| in fp16                                                                        <= 32768
    lint      errors of the Neural Engine's rules                                                                     0
    picture   pictures from the files against PyTorch's, same seeds                                                   >= 35 dB
With compressed weights (--bits 8, 6, 4) `form`, `graph` and `numerics` hold for the fp16 file that is compressed; the compressed one is linted and watched for
its range, its outputs and its pictures are compared and printed, and at 8 bits the pictures must reach 20 dB.
"""
import argparse, contextlib, io, json, shutil, subprocess, sys, time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import ane
import coreml_check as check
from checkpoint import VERSION, crc32
from common import ROOT, UserError, friendly, keep_memory_mapped, peak_memory
from coreml_check import ct
from decoder import Autoencoder, AutoencoderConfig, load_autoencoder
from model import PRESETS, UNet, count_params
from results import coreml_page
from sample import Bundle, euler, generate, load_model, settings, times
from text import VOCABULARY, encoding, tokenize

GATES = {"form": 100, "graph": 100, "numerics": 50}                 # dB, at least
PICTURE, COMPRESSED_PICTURE = 35, {8: 20, 6: 0, 4: 0}               # dB, at least; below 8 bits the picture may become another one, and the table says so
PROMPTS = ["a red car", "three dogs", "a tulip left of two rockets", "a koala and a donut"]


# ---------------------------------------------------------------------------- what is exported
class Part:
    """One package: its name, inputs and outputs, and for each size the Neural Engine's form, the training form, and inputs to compare them on."""

    def __init__(self, name, output, text, functions, params, trim=lambda y: y):
        self.name, self.output, self.text, self.functions, self.params, self.trim = name, output, text, functions, params, trim

    def psnr(self, a, b):
        return check.psnr(self.trim(a), self.trim(b))               # the text's mask channel of -10000 would flatter


def parts_of(net, ae, sizes, tokens, attention):
    """[Part]. `functions` holds {size: (form, train(**inputs), [inputs, ...])}."""
    g = torch.Generator().manual_seed(0)
    noise = lambda C, n: torch.randn(1, C, n, n, generator=g)
    trained = not isinstance(net, UNet)
    parts, unet = [], net.unet if trained else net
    if trained:                                                     # the text states that the UNet is compared on are real ones
        cfg = net.text.cfg
        form, rows = ane.TextEncoder(net.text, attention).eval(), []
        for caption in (PROMPTS[2], ""):
            ids, _ = tokenize([caption], cfg.max_tokens)
            rows.append({"input_ids": torch.nn.functional.pad(ids, (0, cfg.max_tokens - ids.shape[1]), value=cfg.vocabulary - 1).float()})

        def train_text(input_ids):
            mask = input_ids != cfg.vocabulary - 1
            return torch.cat([net.text(input_ids.long(), mask).emb, torch.where(mask, 0.0, ane.MASKED)[:, :, None]], 2)     # (1, L, D+1)
        states = [train_text(**r).transpose(1, 2)[:, :, None].contiguous() for r in rows]
        parts.append(Part("TextEncoder", "last_hidden_state", "Token ids, padded -> text states (L, D), and as last channel the mask", {sizes[0]: (form, train_text, rows)},
                          count_params(net.text), lambda y: y[..., :-1]))
    else:
        mask = torch.where(torch.arange(tokens) < tokens - 20, 0.0, ane.MASKED)[None, None, None]               # random states, and padding
        states = [torch.cat([torch.randn(1, unet.cfg.context_dim, 1, tokens, generator=g), mask], 1)]

    def train_unet(sample, timestep, encoder_hidden_states):
        emb, mask = encoder_hidden_states[:, :-1, 0].transpose(1, 2), encoder_hidden_states[:, -1, 0] > -1
        return unet(sample, timestep / 1000, emb, mask)
    functions, latents = {}, {}
    for size in sizes:                                              # noise at t = 1; with trained weights a half-drawn picture at t = 0.25, too, and its latents for the decoder
        n, x = size // 8, noise(unet.cfg.in_channels, size // 8)
        rows, latents[size] = [{"sample": x, "timestep": torch.tensor([1000.0]), "encoder_hidden_states": states[0]}], [x]
        if trained:
            v = lambda x, t: train_unet(x, torch.tensor([1000 * t]), states[0])
            x0 = euler(v, x, times(8, 1.0))
            rows.append({"sample": 0.75 * x0 + 0.25 * x, "timestep": torch.tensor([250.0]), "encoder_hidden_states": states[1]})
            latents[size] = [x0, x]
        functions[size] = (ane.UNet(unet, n, n, states[0].shape[-1], attention).eval(), train_unet, rows)
    parts.append(Part("Unet", "noise_pred", "Latents, 1000 t, text states -> velocity v = eps - x0", functions, count_params(unet)))
    functions = {size: (ane.Decoder(ae).eval(), lambda z: ae.decode(z), [{"z": z} for z in latents[size]]) for size in sizes}
    parts.append(Part("VAEDecoder", "image", "Normalised latents -> picture in [-1, 1]", functions, count_params(ae.decoder)))
    return parts


@torch.no_grad()
def perturb(module, seed=0):
    """Random weights in which nothing is zero or one: a zero output proves nothing, and coremltools folds away a gain of 1."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.ndim == 1:
            p += 0.1 * torch.randn(p.shape, generator=g)
        elif not p.any():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 * p[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def round_to_fp16(form):
    """In place: parameters (those of the training form, too) and constants, but for the sinusoids' frequencies, which stay fp32 in the file."""
    for name, v in [*form.named_parameters(), *form.named_buffers()]:
        if name != "freqs":
            v.copy_(v.half().float())


# ---------------------------------------------------------------------------- conversion
def convert(form, inputs: dict, output: str, ios: int):
    """A PyTorch module -> Core ML model in fp16. What has rank 2 or less (the time's sinusoids, token ids) stays fp32 and runs before the engine starts."""
    fp16 = lambda op: not all(v.shape is not None and len(v.shape) <= 2 for v in op.outputs)
    typed = [ct.TensorType(k, v.shape, dtype=np.float16 if v.ndim > 2 else np.float32) for k, v in inputs.items()]
    with contextlib.redirect_stderr(io.StringIO()):                 # progress bars
        graph = torch.jit.trace(form, tuple(inputs.values()), check_trace=False)
        return ct.convert(graph, inputs=typed, outputs=[ct.TensorType(output, dtype=np.float16)], convert_to="mlprogram",
                          minimum_deployment_target=getattr(ct.target, f"iOS{ios}"), compute_units=ct.ComputeUnit.CPU_AND_NE,
                          compute_precision=ct.transform.FP16ComputePrecision(op_selector=fp16), skip_model_load=True)


def kmeans(values, k, rounds=40):
    """Centres (k) of a one-dimensional k-means. fp16 weights have at most 65,536 different values, so it runs on their histogram: seconds for a large UNet."""
    v, n = np.unique(values.astype(np.float32), return_counts=True)
    count, total = np.concatenate([[0], np.cumsum(n)]), np.concatenate([[0], np.cumsum(n * v.astype(np.float64))])
    if len(v) <= k:
        return np.pad(v, (0, k - len(v)), mode="edge")
    share = n ** (1 / 3) * np.gradient(v.astype(np.float64)) ** (2 / 3)     # many centres want a density of p ** (1/3) (Panter & Dite 1951): a good start
    centres = np.interp((np.arange(k) + 0.5) / k * share.sum(), np.cumsum(share) - share / 2, v)
    for _ in range(rounds):                                         # Lloyd: cut halfway between centres, then each centre to the mean of its part
        cuts = np.concatenate([[0], np.searchsorted(v, (centres[1:] + centres[:-1]) / 2), [len(v)]])
        size = count[cuts[1:]] - count[cuts[:-1]]
        centres = np.where(size > 0, (total[cuts[1:]] - total[cuts[:-1]]) / np.maximum(size, 1), centres)
    return centres.astype(np.float32)


def compress(model, bits: int):
    """8: int8 per output channel. 6, 4: a table of 2**bits values for each tensor."""
    import coremltools.optimize.coreml as cto

    def table(weight):
        centres = kmeans(weight.ravel(), 2 ** bits)
        index = np.searchsorted((centres[1:] + centres[:-1]) / 2, weight.ravel().astype(np.float32))
        return centres.astype(weight.dtype), index.astype(np.uint8)
    with contextlib.redirect_stderr(io.StringIO()):
        if bits == 8:
            return cto.linear_quantize_weights(model, cto.OptimizationConfig(cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity="per_channel")))
        return cto.palettize_weights(model, cto.OptimizationConfig(cto.OpPalettizerConfig(mode="custom", lut_function=table)))


def save(models: dict, path: Path):
    """{size: model}: one as it is, several as functions `size_N` of one package that share their weights."""
    if len(models) == 1:
        return next(iter(models.values())).save(str(path))
    d = ct.utils.MultiFunctionDescriptor()
    for size, model in models.items():
        file = path.with_name(f"{path.stem}_{size}.mlpackage")
        model.save(str(file))
        d.add_function(str(file), "main", f"size_{size}")
    d.default_function_name = f"size_{next(iter(models))}"
    with contextlib.redirect_stderr(io.StringIO()):                 # progress bars
        ct.utils.save_multifunction(d, str(path))
    for size in models:
        shutil.rmtree(path.with_name(f"{path.stem}_{size}.mlpackage"))


def write_metadata(path: Path, values: dict, describe: dict):
    """Into the saved protobuf, so that the graph and the weights that were proved are not written again."""
    spec, m = ct.utils.load_spec(str(path)), None
    m = spec.description.metadata
    m.author, m.license, m.versionString, m.shortDescription = "nanoSnapGen", "MIT", VERSION, describe["short"]
    m.userDefined.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()})
    for f in (spec.description, *spec.description.functions):
        for feature in (*f.input, *f.output):
            feature.shortDescription = describe.get(feature.name, "")
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(spec.SerializeToString())


DESCRIBE = {"input_ids": "Tokens of captions.tiktoken, <end>, then <pad> up to L", "last_hidden_state": "(1, L, D+1); transpose to (1, D+1, 1, L) for Unet",
            "sample": "Latents, standard normal at the start", "timestep": "1000 t, t in [0, 1], 1 = noise", "encoder_hidden_states": "(1, D+1, 1, L): text states, mask in the last channel",
            "noise_pred": "Velocity: x0 = sample - t * noise_pred", "z": "Normalised latents; scale and shift are inside", "image": "(1, 3, H, W), RGB in [-1, 1]"}


# ---------------------------------------------------------------------------- gates
@torch.inference_mode()
def export_part(part: Part, out: Path, bits: int, ios: int) -> dict:
    """Converts, saves, executes, compares. Returns the manifest's entry; entry["failed"] lists the gates that did not hold."""
    row, models, begin = {k: float("inf") for k in GATES} | {"largest": 0.0}, {}, time.time()
    path, wanted = out / f"{part.name}.mlpackage", {}
    for size, (form, train, cases) in part.functions.items():
        wanted[size] = [train(**case) for case in cases]
        ane.calibrate(form, cases)
        row["form"] = min([row["form"]] + [part.psnr(form(**c), w) for c, w in zip(cases, wanted[size])])
    for size, (form, _, cases) in part.functions.items():           # rounding reaches the shared weights, so after all that wants them in fp32
        round_to_fp16(form)
        models[size] = convert(form, cases[0], part.output, ios)
    save(models, path)
    row["convert_s"] = time.time() - begin
    uncompressed = check.Package(path).bytes
    if bits < 16 and part.name != "VAEDecoder":                     # the decoder is the smallest part, and the picture's last word
        evaluated = run_gates(path, part, wanted, row, compare=True)
        models = {size: compress(model, bits) for size, model in models.items()}
        save_over(models, path)
        row["numerics_compressed"] = float("inf")
    del models
    evaluated = run_gates(path, part, wanted, row, compare=not (bits < 16 and part.name != "VAEDecoder"))
    package, found = evaluated
    rules = Counter(f[0] for f in found)
    fused, unfused = check.estimate(package)[0], check.estimate(package, False)[0]
    row |= {"file": path.name, "output": part.output, "functions": package.functions, "params": part.params, "bits": bits if "numerics_compressed" in row else 16, "bytes": package.bytes,
            "bytes_fp16": uncompressed, "inputs": {k: [check.dtype_of(v), check.shape_of(v)] for k, v in package.inputs.items()},
            "outputs": {k: [check.dtype_of(v), check.shape_of(v)] for k, v in package.outputs.items()}, "ops": len(package.ops),
            "histogram": dict(Counter(o.op_type for o in package.ops).most_common()), "lint": {"errors": sum(n for r, n in rules.items() if r[0] == "E"), "rules": dict(rules),
            "first": {r: f"{f[1]}: {f[2]} [{f[3]}]" for f in reversed(found) for r in [f[0]]}},
            "gflop": sum(map(check.flops, package.ops)) / 1e9, "estimate_ms": {c: [1000 * fused[c], 1000 * unfused[c]] for c in fused}, "top": check.estimate(package)[1][:10],
            "peak_gib": peak_memory(torch.device("cpu"))}
    row["failed"] = [f"{k} {row[k]:.1f} dB < {v}" for k, v in GATES.items() if not row[k] >= v]
    row["failed"] += [f"|activation| {row['largest']:.0f} > {check.LIMIT}"] * (not row["largest"] <= check.LIMIT) + [f"lint: {f[0]} {f[1]}: {f[2]}" for f in found if f[0][0] == "E"][:3]
    print(f"{part.name:12} {row['params'] / 1e6:8.2f} M {row['bytes'] / 1e6:8.2f} MB {row['ops']:5} ops | form {row['form']:.1f} graph {row['graph']:.1f} numerics {row['numerics']:.1f} dB"
          + (f", at {bits} bits {row['numerics_compressed']:.1f} dB" if "numerics_compressed" in row else "")
          + f" | largest {row['largest']:.0f} | lint {row['lint']['errors']} errors, {sum(n for r, n in rules.items() if r[0] == 'W')} warnings"
          + f" | convert {row['convert_s']:.0f} s, execute {row['fp32_s']:.1f} s fp32 {row['fp16_s']:.1f} s fp16 | {row['peak_gib']:.1f} GiB" + "".join(f"\n    FAILED {f}" for f in row["failed"]), flush=True)
    return row


def save_over(models, path):
    shutil.rmtree(path)
    save(models, path)


def run_gates(path, part, wanted, row, compare):
    """Executes the saved file for each size; fills row. Returns the last size's package and all lint findings."""
    found = []
    for size, (form, _, cases) in part.functions.items():
        package = check.Package(path, f"size_{size}" if len(part.functions) > 1 else "")
        for case, want in zip(cases, wanted[size]):
            if compare:
                exact, _, row["fp32_s"] = check.audit(package, case, half=False)
                row["graph"] = min(row["graph"], part.psnr(exact[part.output], form(**case)))
            rounded, largest, row["fp16_s"] = check.audit(package, case)
            row["largest"] = max([row["largest"]] + [v for v, _ in largest.values()])
            key = "numerics" if compare else "numerics_compressed"
            row[key] = min(row[key], part.psnr(rounded[part.output], want))
        found += check.lint(package)
    return package, found


# ---------------------------------------------------------------------------- the bundle
COMPILE = """#!/bin/sh
# On a Mac with Xcode: compiles each package for the device and copies what an app needs into compiled/.
set -e
cd "$(dirname "$0")"
mkdir -p compiled
for p in *.mlpackage; do xcrun coremlcompiler compile "$p" compiled/; done
cp manifest.json *.tiktoken compiled/ 2>/dev/null || true
"""


def export(a) -> dict:
    keep_memory_mapped()
    out = Path(a.out)
    if out.is_file() or out.exists() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise UserError(f"{out} is not empty and no bundle of ours: give another --out")
    begin, config = time.time(), {}
    if a.random:
        net, ae = perturb(UNet(PRESETS[a.random])), perturb(Autoencoder(AutoencoderConfig()))
        config |= {"model": asdict(net.cfg), "flow": {"shift": 3.0}}
        sizes = a.size or [1024]
    else:
        net, config = load_model(a.ckpt)
        if not hasattr(net, "unet"):
            raise UserError(f"{a.ckpt} is an MMDiT: only UNets are exported")
        ae, sizes = load_autoencoder(a.ae), a.size or [config["data"]["size"]]
    unet = net if a.random else net.unet
    step = 8 * 2 ** (len(unet.cfg.widths) - 1)
    if bad := [s for s in sizes if s % step or s < step]:
        raise UserError(f"--size {bad[0]}: this UNet draws multiples of {step} pixels")
    if len(set(sizes)) < len(sizes):
        raise UserError(f"--size {' '.join(map(str, sizes))}: each size once")
    if len(sizes) > 1 and a.ios < 18:
        raise UserError("several sizes in one package need iOS 18: leave --ios at 18, or export one size")
    tmp, refused = out.with_name(out.name + ".tmp"), out.with_name(out.name + ".refused")
    for p in (tmp, refused):
        shutil.rmtree(p, ignore_errors=True)
    tmp.mkdir(parents=True)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    how = settings(config)
    manifest = {"version": VERSION, "git": git, "source": f"random weights, {a.random}" if a.random else str(a.ckpt), "sizes": sizes, "latent": {"channels": ae.cfg.latent, "factor": 8, "scale": ae.cfg.scale, "shift": ae.cfg.shift},
                "schedule": {"kind": "rectified flow", "prediction": "velocity", "timestep": "1000 t", "sampler": how["sampler"], "steps": len(how["steps"]) - 1, "times": how["steps"], "cfg": how["cfg"],
                             "shift": config.get("few_steps", config["flow"])["shift"], "swift": "discreteFlowScheduler, schedulerTimestepShift 1, decoderScaleFactor 1, disableSafety true"},
                "attention": a.attention, "bits": a.bits, "ios": a.ios, "tools": {"torch": torch.__version__, "coremltools": ct.__version__},
                "config": {k: config[k] for k in ("model", "text", "data", "flow", "few_steps") if k in config}, "parts": {}}
    if not a.random:
        shutil.copy(VOCABULARY, tmp / VOCABULARY.name)
        n = encoding().n_vocab
        manifest["tokens"] = {"file": VOCABULARY.name, "crc32": crc32(VOCABULARY), "format": "tiktoken: base64 of the bytes, rank", "end": n - 2, "pad": n - 1, "max": config["text"]["max_tokens"],
                              "rule": "lower case, strip, one blank in front (nothing for the empty prompt); BPE; <end>; <pad> up to max"}
    failed = []
    with torch.no_grad():
        for part in parts_of(net, ae, sizes, a.tokens, a.attention):
            row = manifest["parts"][part.name] = export_part(part, tmp, a.bits, a.ios)
            failed += [f"{part.name}: {f}" for f in row.pop("failed")]
            write_metadata(tmp / row["file"], {"config": manifest["config"], "schedule": manifest["schedule"], "latent": manifest["latent"], "git": git,
                                               "checks": {k: row[k] for k in (*GATES, "largest")}}, DESCRIBE | {"short": part.text})
    manifest["seconds"], manifest["peak_gib"] = time.time() - begin, peak_memory(torch.device("cpu"))
    write = lambda: (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1))
    write()
    (tmp / "compile.sh").write_text(COMPILE)
    (tmp / "compile.sh").chmod(0o755)
    if not a.random and not failed:
        failed += picture_gate(a, tmp, manifest)
        write()
    for p, to in ((out, refused) if failed else (None, None), (tmp, refused if failed else out)):
        if failed and p is out:
            continue                                                # an earlier bundle of this name stays
        if p is not None:
            shutil.rmtree(to, ignore_errors=True)
            p.rename(to)
    if failed:
        raise UserError(f"refused: {'; '.join(failed)}. The bundle was kept aside in {refused}")
    print(f"{out}: {sum(r['bytes'] for r in manifest['parts'].values()) / 1e6:.1f} MB, {manifest['seconds']:.0f} s, {manifest['peak_gib']:.1f} GiB at most")
    return manifest


def pixels_psnr(a, b):
    return float(10 * np.log10(255 ** 2 / max(1e-9, np.mean((np.stack(a).astype(float) - np.stack(b)) ** 2))))


def picture_gate(a, bundle: Path, manifest) -> list[str]:
    """Pictures from the files against PyTorch's from the unrounded weights; fp16 against PyTorch is a gate, compressed is printed."""
    (net, config), ae, failed = load_model(a.ckpt), load_autoencoder(a.ae), []
    how = settings(config)                                  # a few-step student draws in its own steps, without guidance
    for size in manifest["sizes"]:
        draw = lambda net, ae: generate(net, ae, PROMPTS, range(len(PROMPTS)), size, **how)
        begin, b = time.time(), Bundle(bundle, size)
        ours, seconds = draw(b, b), time.time() - begin
        value = manifest[f"picture_db_{size}"] = pixels_psnr(ours, draw(net, ae))
        least = PICTURE if a.bits == 16 else COMPRESSED_PICTURE[a.bits]
        print(f"pictures of {size} px: {value:.1f} dB against PyTorch ({len(PROMPTS)} prompts, {len(how['steps']) - 1} steps, guidance {how['cfg']:g}; {seconds / len(PROMPTS):.1f} s each here)")
        failed += [f"picture {value:.1f} dB < {least}"] * (not value >= least)
    return failed


# ---------------------------------------------------------------------------- docs/COREML.md, which results.py words
BUNDLES = {"scenes": [], "scenes-8": ["--bits", "8"], "scenes-6": ["--bits", "6"], "scenes-4": ["--bits", "4"], "t2i": ["--random", "t2i", "--size", "1024"]}


def report(a):
    """Each bundle in a process of its own, so that its peak memory is its own; then one page from their manifests."""
    work, m = Path(a.work), {}
    for name, flags in BUNDLES.items():
        if not (work / name / "manifest.json").is_file():
            print(f"--- {name}", flush=True)
            if subprocess.run([sys.executable, __file__, "--ckpt", a.ckpt, "--ae", a.ae, "--out", str(work / name), *flags]).returncode:
                raise UserError(f"the export of {name} failed: its message is above")
        m[name] = json.loads((work / name / "manifest.json").read_text())
        if name != "t2i" and not (work / name / "score.json").is_file():
            if subprocess.run([sys.executable, str(ROOT / "evaluate.py"), "--coreml", str(work / name), "--prompts", "20", "--each", "1"]).returncode:
                raise UserError(f"{name} could not be scored: the message is above")
    scores = {n: json.loads((work / n / "score.json").read_text()) for n in m if n != "t2i"}
    Path(a.report).write_text(coreml_page(m, scores, a.report))
    print(f"{a.report}: written")


def main(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", default="assets/scenes", help="checkpoint or run directory")
    p.add_argument("--ae", default="assets/ae", help="autoencoder's checkpoint")
    p.add_argument("--random", default="", choices=["", *PRESETS], help="random weights of this rung of model.py and the paper's decoder, instead")
    p.add_argument("--out", default="bundle")
    p.add_argument("--size", type=int, nargs="+", default=[], help="pixels; several make a multifunction package; default: as in training")
    p.add_argument("--tokens", type=int, default=77, help="with --random: length of the text")
    p.add_argument("--attention", choices=ane.ATTENTION, default="split")
    p.add_argument("--bits", type=int, choices=(16, 8, 6, 4), default=16, help="of weights: 8 = int8 per channel, 6 and 4 = palettes")
    p.add_argument("--target", choices=("coreml", "coreai"), default="coreml", help="coreai: for iOS 27 by Apple's coreai-torch (export_coreai.py); fp16, one size")
    p.add_argument("--ios", type=int, choices=(17, 18), default=18)
    p.add_argument("--report", default="", metavar="FILE.md", help="exports everything that the report tells of, and writes it")
    p.add_argument("--work", default="runs/coreml", help="of --report: where its bundles are made, or found")
    a = p.parse_args(argv)
    if a.target == "coreai":
        from export_coreai import export as export_to_coreai       # only here: an optional package
        return export_to_coreai(a)
    (report if a.report else export)(a)


if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
