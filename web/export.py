"""A picture in the browser: a few-step checkpoint as a static site, which draws without a server.

    python -m web.export --out site                 the shipped weights, the page, the runtime
    python -m http.server --directory site          then open http://localhost:8000

Text encoder, UNet (one step a call) and decoder become ONNX files. Their weights are stored in fp16
and computed in fp32, because few browsers compute in fp16. onnxruntime executes each file; the site
is refused (exit status 1, kept aside as OUT.refused) unless
    parts       each file's outputs against PyTorch's, fp32                  >= 40 dB
    pictures    drawn by the files against PyTorch's, same seeds             >= 40 dB
The page's runtime, onnxruntime-web, comes from npm and is copied beside it.

C channels | D width of a text state | L text tokens | h w latent rows, columns
"""
import argparse
import copy
import gzip
import logging
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import VERSION, crc32, replacing
from common import UserError, friendly, json_text, provenance
from data import known_things
from decoder import autoencoder_of, to_tensor
from model import count_params, load_model
from sample import euler, generate, sampling
from text import Text, Tokens
from wording import unknown_things

GATE = 40                       # dB, at least
ORT_WEB = "1.30.0"              # of onnxruntime-web
# The smallest builds of each kind, module and machine code. Chrome alone could do with less for
# WebGPU (jspi, 4 MB instead of 7); jsep, the build of `import "onnxruntime-web"`, is 7 MB too.
RUNTIMES = {
    "wasm": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
STEPS = (1, 2, 4, 8)
PAGE = ("index.html", "style.css", "app.js", "worker.js", "files.js", "tokens.js", "noise.js",
        "pixels.js", "service.js")
EXAMPLES = [
    "a purple teapot under a yellow robot", "three red cars", "a fox in the snow",
    "an octopus under water", "a cake at night", "two penguins left of a house",
    "hey, could you draw a frog? make it blue",
]

# ---------------------------------------------------------------------------- what is exported
class TextStates(nn.Module):
    """Token ids (1, L), none of them padding -> text states (1, L, D)."""
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids):
        return self.encoder(Tokens(ids, torch.ones_like(ids, dtype=torch.bool))).emb

class Decoding(nn.Module):
    """Normalised latents (1, C, h, w) -> picture (1, 3, 8h, 8w), about [-1, 1]."""
    def __init__(self, ae):
        super().__init__()
        self.decoder, self.scale, self.shift = ae.decoder, ae.cfg.scale, ae.cfg.shift

    def forward(self, z):
        return self.decoder(z / self.scale + self.shift)

@dataclass
class WebPart:
    """One ONNX file. cases: inputs to compare it on; tokens: of each input, the axis of length L,
    which is free in the file, or None."""
    name: str
    module: nn.Module
    cases: list[dict]
    tokens: tuple

@torch.no_grad()
def web_parts(net, ae, size: int, schedule: list[float]) -> list[WebPart]:
    """The UNet is compared on noise, and on a picture half drawn."""
    text, decoding = TextStates(net.text), Decoding(ae)
    most = net.text_cfg.max_tokens
    tokens = [net.vocabulary.tokenize([p], most, cut=True) for p in EXAMPLES[:2]]
    ids = [t.ids.int() for t in tokens]                                         # (1, L) each
    states = [text(i) for i in ids]                                             # (1, L, D) each
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1, net.unet.cfg.in_channels, size // 8, size // 8, generator=g)

    def velocity(x, t):
        return net.unet(x, torch.tensor([t]), states[0])
    x0 = euler(velocity, noise, schedule)                                       # (1, C, h, w)
    cases = []
    for t, x, s in (1.0, noise, states[0]), (0.5, (x0 + noise) / 2, states[1]):
        cases.append({"x": x, "t": torch.tensor([t]), "context": s})
    return [WebPart("text", text, [{"ids": i} for i in ids], (1,)),
            WebPart("unet", net.unet, cases, (None, None, 1)),
            WebPart("decoder", decoding, [{"z": x0}, {"z": noise}], (None,))]

def to_onnx(part: WebPart, max_tokens: int):
    """The part as an ONNX model, its weights rounded to fp16 and stored so."""
    rounded = copy.deepcopy(part.module).eval()
    with torch.no_grad():
        for p in rounded.parameters():
            p.copy_(p.half().float())
    case = part.cases[0]
    L = torch.export.Dim("L", min=2, max=max_tokens)
    shapes = tuple({} if axis is None else {axis: L} for axis in part.tokens)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)     # it misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            rounded, tuple(case.values()), dynamo=True, opset_version=20, verbose=False,
            input_names=list(case), output_names=["y"], dynamic_shapes=shapes)
    return with_half_weights(program.model_proto)

def with_half_weights(onnx_model):
    """Stores in fp16 what fp16 holds without loss, and casts it back to fp32: once, when a runtime
    loads the file and folds constants. What documents the export goes."""
    from onnx import TensorProto, helper, numpy_helper
    graph, casts = onnx_model.graph, []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < 16 or np.abs(values).max() > 65504:
            continue
        half, name = values.astype(np.float16), tensor.name
        if np.array_equal(half.astype(np.float32), values):
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    for entry in [*nodes, *graph.initializer, *graph.input, *graph.output, graph, onnx_model]:
        del entry.metadata_props[:]
    del graph.value_info[:], graph.node[:]
    graph.node.extend(nodes)
    return onnx_model

# ---------------------------------------------------------------------------- the gates
def open_onnx(path):
    """A function {input: tensor} -> tensor: the file, executed by onnxruntime."""
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def execute(inputs):
        return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])
    return execute

def decibels(a, b) -> float:
    """PSNR of tensor a against b, whose range is the peak; at most 200, -inf where not finite."""
    error = ((a - b).double().square().mean() / (b.max() - b.min()).double() ** 2).item()
    return -10 * math.log10(max(error, 1e-20)) if math.isfinite(error) else -math.inf

class OnnxFiles:
    """A site's files with the faces of TextToLatents, UNet and Autoencoder: one picture a call."""
    def __init__(self, net, folder: Path):
        self.net, self.denoiser, self.device = net, self, net.device
        self.cfg = net.unet.cfg
        self.text, self.unet, self.decoder = (
            open_onnx(folder / f"{name}.onnx") for name in ("text", "unet", "decoder"))

    def encode(self, captions: list[str]) -> Text:
        tokens = self.net.vocabulary.tokenize(captions, self.net.text_cfg.max_tokens)
        return Text(self.text({"ids": tokens.ids.int()}), tokens.mask)

    def __call__(self, x, t, emb, mask, pooled=None):
        return self.unet({"x": x, "t": t, "context": emb})

    def decode(self, latents):
        return self.decoder({"z": latents})

def drawn_alike(net, ae, folder: Path, size: int, how: dict) -> float:
    """Pictures by the files against PyTorch's, dB."""
    files = OnnxFiles(net, folder)
    args = (EXAMPLES[:2], [0, 1], size)
    ours = generate(files, files, *args, **how, batch=1)
    theirs = generate(net, ae, *args, **how, batch=1)
    return decibels(*(to_tensor(np.stack(pictures)) for pictures in (ours, theirs)))

@torch.inference_mode()
def preview_of(net, ae, size: int, how: dict) -> list[list[float]]:
    """The colour of a latent pixel, (C + 1, 3), bias last: what the page shows between two steps.
    Least squares from latents to the decoder's pictures at 1/8 of their size."""
    latents = torch.stack(generate(net, None, EXAMPLES, range(len(EXAMPLES)), size, **how))
    small = F.avg_pool2d(ae.decode(latents), 8)                                 # (B, 3, h, w)
    rows = latents.movedim(1, -1).flatten(0, 2)                                 # (B*h*w, C)
    rows = F.pad(rows, (0, 1), value=1.0)
    found = torch.linalg.lstsq(rows, small.movedim(1, -1).flatten(0, 2)).solution
    return [[round(v, 4) for v in row] for row in found.tolist()]

# ---------------------------------------------------------------------------- the site
def web_file(folder: Path, name: str) -> dict:
    """A file's entry in the manifest: the page checks what it downloads."""
    path = folder / name
    return {"file": name, "bytes": path.stat().st_size, "crc32": crc32(path)}

def npm_pack(folder: Path) -> Path:
    """onnxruntime-web as npm's archive."""
    npm = shutil.which("npm")
    if not npm:
        raise UserError(f"npm is missing: install Node.js, or give --ort the archive that `npm "
                        f"pack onnxruntime-web@{ORT_WEB}` leaves on another machine")
    words = [npm, "pack", f"onnxruntime-web@{ORT_WEB}", "--silent"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    archives = list(folder.glob("*.tgz"))
    if done.returncode or not archives:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"npm did not get onnxruntime-web {ORT_WEB} ({reason}): check the "
                        "connection to the npm registry, or give --ort its archive")
    return archives[0]

def copy_runtime(archive: Path, folder: Path) -> dict:
    """Takes our builds out of npm's archive -> {kind: the manifest's entries of its two files}.
    Machine code is packed by gzip, to a quarter, since not every static host does that; a name in
    .gz would make some of them send it as an encoding, unpacked."""
    rows = {}
    (folder / "ort").mkdir()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for kind, (module, binary) in RUNTIMES.items():
                code = tar.extractfile(f"package/dist/{module}").read()
                (folder / "ort" / module).write_bytes(code)
                packed = gzip.compress(tar.extractfile(f"package/dist/{binary}").read(), mtime=0)
                packed_name = f"ort/{Path(binary).stem}.bin"
                (folder / packed_name).write_bytes(packed)
                rows[kind] = {"module": web_file(folder, f"ort/{module}"),
                              "binary": web_file(folder, packed_name)}
    except (tarfile.TarError, KeyError, OSError, EOFError) as e:
        raise UserError(f"{archive} is no archive of onnxruntime-web {ORT_WEB} ({e}): `npm pack "
                        f"onnxruntime-web@{ORT_WEB}` makes one") from None
    return rows

def js_pattern(pattern: str) -> str:
    """A pattern of text.py for JavaScript with the flag u. There, \\d is ASCII alone, \\s another
    set, and a quotation mark must not be escaped."""
    for python, js in (r"\s", r"\p{White_Space}"), (r"\d", r"\p{Nd}"), (r"\"", '"'):
        pattern = pattern.replace(python, js)
    return pattern

def load_few_steps(a):
    """(net, autoencoder, config). UserError, before any work, where they cannot be exported."""
    net, config = load_model(a.ckpt)
    few = config.get("few_steps") or {}
    if not hasattr(net, "unet") or net.text is None:
        raise UserError(f"{a.ckpt}: only a UNet with its own text encoder goes to the browser")
    if few.get("sampler") != "euler" or few.get("cfg") != 1:
        raise UserError(f"{a.ckpt} draws in many steps or with guidance: the browser wants a "
                        "few-step student, such as adv_distill.py makes")
    ae = autoencoder_of(config, a.ae)
    if ae.cfg.decoder != "tiny":
        raise UserError(f"{a.ckpt}: its autoencoder has SD3's decoder, only the tiny one goes to "
                        "the browser; --ae gives another")
    if ae.cfg.latent != net.unet.cfg.in_channels:
        raise UserError(f"{a.ckpt} draws latents of {net.unet.cfg.in_channels} channels, its "
                        f"autoencoder reads {ae.cfg.latent}: give the --ae of its training")
    return net, ae, config

def export_parts(net, ae, folder: Path, size: int, how: dict) -> tuple[dict, list[str]]:
    """Writes and compares the ONNX files -> (the manifest's entries, the gates that failed)."""
    rows, failed = {}, []
    for part in web_parts(net, ae, size, how["steps"]):
        name = f"{part.name}.onnx"
        data = to_onnx(part, net.text_cfg.max_tokens).SerializeToString()
        (folder / name).write_bytes(data)
        execute = open_onnx(folder / name)
        with torch.inference_mode():
            dB = min(decibels(execute(case), part.module(**case)) for case in part.cases)
        rows[part.name] = web_file(folder, name) | {"parity": dB}
        print(f"{name:14}{len(data) / 1e6:6.2f} MB, {dB:.0f} dB from PyTorch", flush=True)
        if not dB >= GATE:
            failed.append(f"{name} {dB:.1f} dB < {GATE}")
    return rows, failed

def fill_site(a, folder: Path) -> list[str]:
    """Writes the whole site -> the gates that failed."""
    net, ae, config = load_few_steps(a)
    size, how = config["data"]["size"], sampling(config)
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(a.ort).expanduser() if a.ort else npm_pack(Path(temporary))
        runtimes = copy_runtime(archive, folder)
    parts, failed = export_parts(net, ae, folder, size, how)
    if not failed:
        dB = drawn_alike(net, ae, folder, size, how)
        print(f"pictures of {size} px, {len(how['steps']) - 1} steps: {dB:.0f} dB from PyTorch's")
        failed += [] if dB >= GATE else [f"pictures {dB:.1f} dB < {GATE}"]
    (folder / "captions.tiktoken").write_bytes(net.vocabulary.data)
    for name in PAGE:
        shutil.copy(Path(__file__).parent / name, folder / name)
    few, known = config["few_steps"]["steps"], known_things(config)
    manifest = {
        "version": VERSION, "git": provenance()["commit"], "source": str(a.ckpt), "size": size,
        "parameters": count_params(net) + count_params(ae.decoder),
        "channels": ae.cfg.latent, "parts": parts, "runtimes": runtimes,
        "tokens": web_file(folder, "captions.tiktoken") | {
            "pattern": js_pattern(net.vocabulary.pattern), "max": net.text_cfg.max_tokens},
        "steps": few,
        "times": {n: sampling(config, n)["steps"] for n in sorted({*STEPS, few})},
        "preview": preview_of(net, ae, size, how), "known": known,
        "examples": [e for e in EXAMPLES if known and not unknown_things(e, known)],
    }
    (folder / "manifest.json").write_text(json_text(manifest), "utf-8")
    tell_download(folder, manifest)
    return failed

def tell_download(folder: Path, manifest: dict):
    """What a browser fetches once: page, models, and one runtime."""
    total = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    sizes = {kind: sum(f["bytes"] for f in row.values())
             for kind, row in manifest["runtimes"].items()}
    for kind, other in ("wasm", "webgpu"), ("webgpu", "wasm"):
        print(f"download by {kind}: {(total - sizes[other]) / 1e6:.1f} MB, "
              f"{sizes[kind] / 1e6:.1f} of them the runtime")

def export_site(a):
    out = Path(a.out).expanduser()
    refused = out.with_name(out.name + ".refused")
    ours = (out / "manifest.json").is_file() and (out / PAGE[0]).is_file()
    if out.is_file() or out.exists() and any(out.iterdir()) and not ours:
        raise UserError(f"{out} is not empty and no site of ours: give another --out")
    with replacing(out, latest=False) as folder:
        if failed := fill_site(a, folder):
            shutil.rmtree(refused, ignore_errors=True)
            folder.rename(refused)           # an earlier site of this name stays
            raise UserError(f"refused: {'; '.join(failed)}. The site was kept in {refused}")
    print(f"{out} is ready: python -m http.server --directory {out}")

def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", default="assets/fast", help="a few-step checkpoint or run")
    p.add_argument("--ae", default="", help="autoencoder; default: the checkpoint's own")
    p.add_argument("--ort", default="", help="npm's archive of onnxruntime-web; default: fetched")
    p.add_argument("--out", default="site")
    return p.parse_args(argv)

def main(argv):
    try:
        export_site(parse(argv))
    except ImportError as e:
        raise UserError(f"{e.name or e} is missing: pip install -r requirements.txt") from None

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
