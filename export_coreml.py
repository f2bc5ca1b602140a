"""To the iPhone: a checkpoint as a Core ML bundle for the Neural Engine, proved op by op anywhere.

    python export_coreml.py --out bundle                   TextEncoder, Unet, VAEDecoder .mlpackage
    python export_coreml.py --ckpt runs/base --size 256 --bits 8 --out bundle
    python export_coreml.py --preset t2i --out bundle      the paper's sizes, random weights
    python export_coreml.py --target sd --out bundle       for apps that load Stable Diffusion 1.x
    python export_coreml.py --target coreai --out ai       .aimodel files for iOS 27

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
from coreml import ane
from coreml.apple import SCHEDULERS, sd_noise
from coreml.bundle import COMPILE, load_bundle
from coreml.check import LIMIT, CheckError, Package, lint, load_coremltools, shape_of, tensor_psnr
from coreml.coreai import export_coreai
from coreml.sd import app_settings, readme, sd_parts
from decoder import Autoencoder, AutoencoderConfig, autoencoder_of, to_pictures
from model import PRESETS, UNet, count_params, load_model
from sample import euler, generate, guided, latents_noise, repeated, sampling, times
from text import Tokens, parts_of

GATES = {"form": 100, "graph": 100, "numerics": 50}      # dB, at least
PICTURE = {16: 35, 8: 20, 6: 0, 4: 0}    # dB by bits: under 8 it may become another good picture
KEPT = ("model", "text", "data", "flow", "few_steps")    # of the checkpoint's config
PROMPTS = ["a red car", "three dogs", "a tulip left of two rockets", "a koala and a donut"]

@dataclass
class Part:
    """One package: the Neural Engine's form, and the training form to compare it with."""
    name: str
    output: str
    text: str                # what it does, for the package's metadata
    form: torch.nn.Module
    train: Callable          # takes the form's inputs by name, gives its output
    cases: list[dict]        # inputs to compare them on
    oldest: str = "iOS18"    # system that loads it

    def psnr(self, a, b) -> float:
        if self.name == "TextEncoder":      # its last channel, the mask of -10000, would flatter
            a, b = a[..., :-1], b[..., :-1]
        return tensor_psnr(a, b)

def text_part(net) -> Part:
    L, pad = net.text_cfg.max_tokens, net.vocabulary.pad
    ids = net.vocabulary.tokenize([PROMPTS[2], ""], L, cut=True).ids
    ids = F.pad(ids, (0, L - ids.shape[1]), value=pad).float()                  # (2, L)

    def train(input_ids):
        tokens = Tokens(input_ids.long(), input_ids != pad)
        bias = torch.where(tokens.mask, 0.0, ane.MASKED)[:, :, None]
        return torch.cat([net.text(tokens).emb, bias], 2)                       # (1, L, D+1)
    return Part("TextEncoder", "last_hidden_state",
                "Token ids, padded -> text states (L, D), and as last channel the mask",
                ane.AneTextEncoder(net.text).eval(), train, [{"input_ids": i[None]} for i in ids])

def unet_case(x, t: float, states) -> dict:
    return {"sample": x, "timestep": torch.tensor([1000 * t]), "encoder_hidden_states": states}

def unet_part(unet, x, states) -> Part:
    def train(sample, timestep, encoder_hidden_states):
        emb = encoder_hidden_states[:, :-1, 0].transpose(1, 2)                  # (1, L, D)
        mask = encoder_hidden_states[:, -1, 0] > -1                             # (1, L)
        return unet(sample, timestep / 1000, emb, mask)
    return Part("Unet", "noise_pred", "Latents, 1000 t, text states -> velocity v = eps - x0",
                ane.AneUNet(unet, *x.shape[2:]).eval(), train, [unet_case(x, 1.0, states)])

def decoder_part(ae, latents) -> Part:
    def train(z):       # not ae.decode: channels_last GroupNorm is 95 dB from float64 at 1024 px
        return ae.decoder(z / ae.cfg.scale + ae.cfg.shift)
    return Part("VAEDecoder", "image", "Normalised latents -> picture in [-1, 1]",
                ane.AneDecoder(ae).eval(), train, [{"z": z} for z in latents])

@torch.no_grad()
def make_parts(source) -> list[Part]:
    """Random weights are compared on noise at t = 1. Trained ones on a half-drawn picture at
    t = 0.25 too, with real text states where we have their encoder."""
    net, unet, g = source.net, source.unet, torch.Generator().manual_seed(0)
    parts, L = [], source.tokens
    if source.own_text:
        parts = [text_part(net)]
        states = [parts[0].train(**case) for case in parts[0].cases]            # (1, L, D+1)
        states = [s.transpose(1, 2)[:, :, None].contiguous() for s in states]   # (1, D+1, 1, L)
    else:
        bias = torch.where(torch.arange(L) < L - 20, 0.0, ane.MASKED)[None, None, None]
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

def measure(path, part: Part, wanted) -> tuple[float, float, float]:
    """Executes a saved package on the part's cases -> dB of graph, dB of numerics, range."""
    package, graph, numerics, seen = Package(path), [], [], []
    for case, want in zip(part.cases, wanted, strict=True):
        largest = {}
        exact = package.run(case, half=False)[part.output]
        rounded = package.run(case, largest=largest)[part.output]
        graph.append(part.psnr(exact, part.form(**case)))
        numerics.append(part.psnr(rounded, want))
        seen += largest.values()
    return min(graph), min(numerics), max(seen)

@torch.inference_mode()
def export_part(part: Part, folder: Path, bits: int) -> tuple[dict, list[str]]:
    """Converts, saves, executes, compares -> (the manifest's entry, the gates that failed)."""
    path, begin = folder / f"{part.name}.mlpackage", time.time()
    wanted = [part.train(**case) for case in part.cases]     # in fp32: rounding is yet to come
    ane.calibrate(part.form, part.cases)
    form = min(part.psnr(part.form(**c), w) for c, w in zip(part.cases, wanted, strict=True))
    ane.round_to_fp16(part.form)
    model = ane.convert_form(part.form, part.cases[0], part.output, part.oldest)
    model.short_description = part.text
    model.save(str(path))
    graph, numerics, largest = measure(path, part, wanted)
    row = {"file": path.name, "output": part.output, "params": count_params(part.form), "bits": 16,
           "form": form, "graph": graph, "numerics": numerics, "largest": largest}
    if bits < 16 and part.name != "VAEDecoder":    # the smallest part, and the picture's last word
        shutil.rmtree(path)
        ane.compress(model, bits).save(str(path))
        _, compressed, largest = measure(path, part, wanted)
        row |= {"bits": bits, "compressed": compressed, "largest": max(row["largest"], largest)}
    package = Package(path)
    found = lint(package)
    row |= {"bytes": package.bytes, "ops": len(package.ops), "seconds": time.time() - begin,
            "inputs": {k: shape_of(v) for k, v in package.inputs.items()},
            "lint": Counter(f.rule.split()[0] for f in found)}
    failed = [f"{k} {row[k]:.1f} dB < {v}" for k, v in GATES.items() if not row[k] >= v]
    if not row["largest"] <= LIMIT:
        failed.append(f"|activation| {row['largest']:.0f} > {LIMIT}")
    errors = [f for f in found if f.rule[0] == "E"]
    failed += [f"lint {f.rule}: {f.name}: {f.what}" for f in errors[:3]]
    print(f"{part.name:12} {row['params'] / 1e6:7.2f} M {package.bytes / 1e6:7.2f} MB "
          f"{row['ops']:5} ops | form {form:.1f} graph {graph:.1f} numerics {numerics:.1f} dB"
          + (f" | {bits} bits {row['compressed']:.1f} dB" if "compressed" in row else "")
          + f" | largest {row['largest']:.0f} | lint {len(errors)} errors | {row['seconds']:.0f} s",
          flush=True)
    return row, [f"{part.name}: {f}" for f in failed]

def picture_psnr(a, b) -> float:
    """PSNR in dB between two lists of uint8 pictures."""
    error = np.mean((np.stack(a).astype(float) - np.stack(b)) ** 2)
    return float(10 * np.log10(255 ** 2 / max(1e-9, error)))

@torch.inference_mode()
def app_pictures(net, ae, prompts, seeds, size: int, steps, cfg, sampler) -> list:
    """PyTorch's pictures, drawn with an app's scheduler at the times of SD's schedule."""
    text, empty = net.encode(prompts), repeated(net.encode([""]), len(prompts))
    noise_of = sd_noise(guided(net.denoiser, text, empty, cfg))
    x = latents_noise(seeds, (net.denoiser.cfg.in_channels, size // 8, size // 8), net.device)
    x0 = SCHEDULERS[sampler](noise_of, x, len(steps) - 1)
    return to_pictures(ae.decode(x0.float()))

def picture_gate(a, folder: Path, size: int) -> float:
    """Pictures from the files against PyTorch's from the weights before rounding -> PSNR."""
    net, config = load_model(a.ckpt)
    ae, bundle, seeds = autoencoder_of(config, a.ae), load_bundle(folder), range(len(PROMPTS))
    if a.target == "sd":
        how = bundle.sampling()
        ours = bundle.draw(PROMPTS, seeds, **how)
        theirs = app_pictures(net, ae, PROMPTS, seeds, size, **how)
    else:
        how = sampling(config)           # a few-step student draws in its own steps, unguided
        ours = generate(bundle, bundle, PROMPTS, seeds, size, **how)
        theirs = generate(net, ae, PROMPTS, seeds, size, **how)
    value = picture_psnr(ours, theirs)
    print(f"pictures of {size} px: {value:.1f} dB against PyTorch ({len(PROMPTS)} prompts, "
          f"{len(how['steps']) - 1} steps, guidance {how['cfg']:g})")
    return value

@dataclass
class Source:
    """What is exported. net: TextToLatents, or None where the weights are random."""
    net: torch.nn.Module | None
    unet: torch.nn.Module
    ae: torch.nn.Module
    config: dict
    size: int
    tokens: int = 77

    @property
    def own_text(self) -> bool:
        return self.net is not None and self.net.text is not None

def load_source(a) -> Source:
    """Reads the checkpoints. UserError, before any work, where they cannot be exported so."""
    if a.preset:
        config = {"model": asdict(PRESETS[a.preset]), "flow": {"shift": 3.0}}
        unet, ae = perturb(UNet(PRESETS[a.preset])), perturb(Autoencoder(AutoencoderConfig()))
        source = Source(None, unet, ae, config, a.size or 1024)
    else:
        net, config = load_model(a.ckpt)
        if not hasattr(net, "unet"):
            raise UserError(f"{a.ckpt} is an MMDiT: only UNets are exported")
        ae, size = autoencoder_of(config, a.ae), a.size or config["data"]["size"]
        source = Source(net, net.unet, ae, config, size, net.text_cfg.max_tokens)
        if net.text is None:
            source.tokens = max(last for _, last, _, _ in parts_of(net.text_cfg).values())
            print(f"text.kind={net.text_cfg.kind}: an app brings its encoders; no picture is drawn")
        if ae.cfg.decoder != "tiny":
            raise UserError(f"{a.ckpt}: its autoencoder has SD3's decoder, only the tiny one is "
                            "exported; --ae gives another")
    grain = 8 * 2 ** (len(source.unet.cfg.widths) - 1)
    if source.size % grain or not grain <= source.size <= 4096:
        raise UserError(f"--size {source.size}: this UNet draws multiples of {grain} up to 4096")
    return source

def describe(source: Source, a) -> dict:
    """The manifest, but for its parts."""
    config, ae = source.config, source.ae.cfg
    how = sampling(config)
    schedule = {
        "kind": "rectified flow", "prediction": "velocity", "timestep": "1000 t",
        "sampler": how["sampler"], "steps": len(how["steps"]) - 1, "times": how["steps"],
        "cfg": how["cfg"],
        "shift": (config.get("few_steps") or {}).get("shift") or config["flow"]["shift"]}
    return {
        "version": VERSION, "git": provenance()["commit"],
        "target": a.target, "size": source.size, "bits": a.bits,
        "source": f"random weights, {a.preset}" if a.preset else str(a.ckpt),
        "tools": {"torch": torch.__version__, "coremltools": load_coremltools().__version__},
        "latent": {"channels": ae.latent, "factor": 8, "scale": ae.scale, "shift": ae.shift},
        "schedule": app_settings(config) if a.target == "sd" else schedule,
        "config": {k: config[k] for k in KEPT if k in config},
    }

def write_vocabulary(net, folder: Path) -> dict:
    """The vocabulary of the checkpoint, as a file and as the manifest's entry."""
    v, file = net.vocabulary, folder / "captions.tiktoken"
    file.write_bytes(v.data)
    return {
        "file": file.name, "crc32": crc32(file), "pattern": v.pattern, "end": v.end, "pad": v.pad,
        "max": net.text_cfg.max_tokens, "format": "tiktoken: base64 of the bytes, rank",
        "rule": "lower case, strip, one blank in front unless empty; BPE; <end>; <pad> up to max",
    }

def export_bundle(a, source: Source, folder: Path) -> list[str]:
    """Fills the folder -> the gates that failed."""
    begin, failed = time.time(), []
    manifest, parts = describe(source, a) | {"parts": {}}, make_parts(source)
    if a.target == "sd":
        parts = sd_parts(parts, source, folder)
        (folder / "README.md").write_text(readme(manifest), "utf-8")
    elif source.own_text:
        manifest["tokens"] = write_vocabulary(source.net, folder)
    for part in parts:
        row, missed = export_part(part, folder, a.bits)
        manifest["parts"][part.name] = row
        failed += missed
    (folder / "compile.sh").write_text(COMPILE, "utf-8", newline="\n")
    file = folder / "manifest.json"
    file.write_text(json.dumps(manifest, indent=1), "utf-8")
    if source.own_text and not failed:
        manifest["picture"] = picture_gate(a, folder, source.size)
        if not manifest["picture"] >= PICTURE[a.bits]:
            failed.append(f"picture {manifest['picture']:.1f} dB < {PICTURE[a.bits]}")
    seconds, peak = time.time() - begin, peak_memory(torch.device("cpu"))
    manifest |= {"seconds": seconds, "peak_gib": peak}
    file.write_text(json.dumps(manifest, indent=1), "utf-8")
    print(f"{seconds:.0f} s, {peak:.1f} GiB at most")
    return failed

def export(a):
    if not a.out.strip():
        raise UserError("--out wants the name of a folder")
    out = Path(a.out).expanduser()
    refused = out.with_name(out.name + ".refused")
    coreai = a.target == "coreai"
    marker = out / ("metadata.json" if coreai else "manifest.json")
    if out.is_file() or out.exists() and any(out.iterdir()) and not marker.is_file():
        raise UserError(f"{out} is not empty and no bundle of ours: give another --out")
    keep_memory_mapped()
    source = load_source(a)
    with replacing(out, latest=False) as folder:
        if coreai:
            export_coreai(make_parts(source), folder, describe(source, a))
        elif failed := export_bundle(a, source, folder):
            shutil.rmtree(refused, ignore_errors=True)
            folder.rename(refused)           # an earlier bundle of this name stays
            raise UserError(f"refused: {'; '.join(failed)}. The bundle was kept in {refused}")
    print(f"{out} is ready")

def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", default="assets/scenes", help="checkpoint or run")
    p.add_argument("--ae", default="", help="autoencoder; default: the checkpoint's own")
    p.add_argument("--preset", default="", choices=["", *PRESETS], help="random weights instead")
    p.add_argument("--out", default="bundle")
    p.add_argument("--size", type=int, default=0, help="pixels; default: as in training")
    p.add_argument("--bits", type=int, choices=PICTURE, default=16,
                   help="of a weight: 8 = int8 per channel, 6 and 4 = palettes")
    p.add_argument("--target", choices=("coreml", "sd", "coreai"), default="coreml")
    return p.parse_args(argv)

def main(argv):
    try:
        export(parse(argv))
    except CheckError as e:
        raise UserError(str(e)) from None

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
