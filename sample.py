"""Text to picture.

    python sample.py "three red cars left of a tree" -n 4 --seed 1 -o out.png
    python sample.py "a dog" "a blue cat" --ckpt runs/nano --steps 28 --cfg 4 --sampler dpmpp
    python sample.py "a red car" --coreml bundle/              the files of export_coreml.py: by Core ML on a Mac, by coreml_check elsewhere
    python sample.py "a dog" --base                     the model before step distillation, where both are shipped

Rectified flow (paper.md, section 4): x_t = (1 - t) x0 + t eps, the network gives v = eps - x0, so x0 = x_t - t v, and t = 1 is noise.
A sampler is a pure function (velocity, x, times) -> x0, with velocity(x, t) -> v, and times from 1 down to 0.
"""
import argparse, json, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from tqdm import tqdm

from checkpoint import load_checkpoint, load_into
from common import ASSETS, UserError, fill, friendly, setup
from data import grid
from decoder import load_autoencoder
from mmdit import MMDiT, MMDiTConfig
from model import UNet, UNetConfig
from text import Text, TextConfig, TextEncoder, encoding, join, tokenize


# ---------------------------------------------------------------------------- samplers
def shift_time(t, s: float):
    """Esser et al. 2024, eq. 23: more time near the noise, for larger pictures. s = 1 changes nothing; SD3.5 takes 3 at 1024 px."""
    return s * t / (1 + (s - 1) * t)


def times(steps: int, shift: float) -> list[float]:
    """1 -> 1/steps evenly, shifted, then 0. (diffusers shifts its smallest time twice, which nearly wastes the last step.)"""
    return [shift_time(1 - i / steps, shift) for i in range(steps)] + [0.0]


def euler(velocity, x, times):
    """One evaluation a step."""
    for t, s in zip(times, times[1:]):
        x = x + (s - t) * velocity(x, t)
    return x


def heun(velocity, x, times):
    """Karras et al. 2022, algorithm 1 without churn: two evaluations a step, one in the last."""
    for t, s in zip(times, times[1:]):
        v = velocity(x, t)
        y = x + (s - t) * v
        x = x + (s - t) * (v + velocity(y, s)) / 2 if s > 0 else y
    return x


def dpmpp(velocity, x, times):
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2, for alpha = 1 - t, sigma = t. One evaluation a step, second order in the log
    signal-to-noise ratio. The first and the last step are of first order: there the ratio is 0 or infinite."""
    log_snr = lambda t: np.log((1 - t) / t)
    old = old_t = None
    for t, s in zip(times, times[1:]):
        x0 = x - t * velocity(x, t)
        D = x0
        if old is not None and 0 < s and old_t < 1:
            r = (log_snr(t) - log_snr(old_t)) / (log_snr(s) - log_snr(t))
            D = x0 + (x0 - old) / (2 * r)
        x = s / t * x + (1 - s - s / t * (1 - t)) * D       # = sigma_s/sigma_t x - alpha_s (e^-h - 1) D
        old, old_t = x0, t
    return x


def renoise(velocity, x, times, noise):
    """For few-step students (Song et al. 2023, algorithm 1): predict x0, noise it afresh to the next time. One evaluation a step; noise(k) is that of step k."""
    for k, (t, s) in enumerate(zip(times, times[1:])):
        x0 = x - t * velocity(x, t)
        x = (1 - s) * x0 + s * noise(k) if s > 0 else x0
    return x


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp": dpmpp, "renoise": renoise}


def settings(config: dict, steps=None, cfg=None, sampler=None, shift=None) -> dict:
    """How a checkpoint is sampled, as generate() takes it: what is asked for, else what its config.json says under few_steps, else 28 guided steps.
    A student of K steps that is asked for fewer walks over times that it was trained at."""
    few = config.get("few_steps")
    own = {"steps": 28, "sampler": "dpmpp", "cfg": 4.0, "shift": config["flow"]["shift"], **(few or {})}
    n, K, shift = steps or own["steps"], own["steps"], shift or own["shift"]
    walk = [times(K, shift)[i * K // n] for i in range(n)] + [0.0] if few and n <= K else times(n, shift)
    return {"steps": walk, "cfg": own["cfg"] if cfg is None else cfg, "sampler": sampler or own["sampler"]}


def guided(net, text: Text, empty: Text, cfg: float, interval=(0.0, 1.0)):
    """velocity(x, t) with classifier-free guidance, both halves in one batch: v = v_empty + cfg (v_text - v_empty).
    Outside the interval of t, or at cfg = 1, the text alone at half the cost (Kynkäänniemi et al. 2024). Texts are projected to keys and values once."""
    project = lambda text: text._replace(emb=net.keys_values(text.emb)) if hasattr(net, "keys_values") else text
    both = project(join([text, empty])) if cfg != 1 else None
    text = project(text)
    pooled = lambda text: {} if text.pooled is None else {"pooled": text.pooled}

    def velocity(x, t):
        time = lambda n: torch.full((n,), t, device=x.device)
        if cfg == 1 or not interval[0] <= t <= interval[1]:
            return net(x, time(len(x)), text.emb, text.mask, **pooled(text))
        v, v_empty = net(torch.cat([x, x]), time(2 * len(x)), both.emb, both.mask, **pooled(both)).chunk(2)   # (B, C, H, W) each
        return v_empty + cfg * (v - v_empty)
    return velocity


# ---------------------------------------------------------------------------- the model that is trained: UNet or MMDiT, and text encoder
def chosen(arch: str, unet, mmdit):
    if arch not in ("unet", "mmdit"):
        raise UserError(f"arch '{arch}': use unet or mmdit")
    return mmdit if arch == "mmdit" else unet


def network_of(config: dict, where) -> UNetConfig | MMDiTConfig:
    """Of a checkpoint's config.json; before there was an `arch`, all were UNets."""
    empty, table = chosen(config.get("arch", "unet"), (UNetConfig(), "model"), (MMDiTConfig(), "mmdit"))
    return fill(empty, config[table], str(where))


def build(cfg: UNetConfig | MMDiTConfig) -> UNet | MMDiT:
    return MMDiT(cfg) if isinstance(cfg, MMDiTConfig) else UNet(cfg)


class TextToLatents(nn.Module):
    """The denoiser and our text encoder; or, of another text.kind, the denoiser alone, which is given the states of frozen encoders."""

    def __init__(self, cfg: UNetConfig | MMDiTConfig, text: TextConfig):
        super().__init__()
        if bad := [k for k in ("context_dim", "pooled_dim")[:2 if text.kind == "own" else 1] if getattr(cfg, k, text.width) != text.width]:
            raise UserError(f"{bad[0]}={getattr(cfg, bad[0])} of the {'MMDiT' if isinstance(cfg, MMDiTConfig) else 'UNet'} must equal text.width={text.width}")
        self.text = TextEncoder(text) if text.kind == "own" else None
        self.text_cfg, self.frozen = text, []                # what encodes instead, once it is needed; in a list, so that it is no part of the module
        self.add_module("mmdit" if isinstance(cfg, MMDiTConfig) else "unet", build(cfg))

    @property
    def denoiser(self) -> UNet | MMDiT:
        return self.mmdit if hasattr(self, "mmdit") else self.unet

    def forward(self, x, t, ids, mask, pooled=None, features=()):
        """Latents (B, C, H, W), times (B,), tokens (B, L) (of frozen encoders: states (B, L, D), pooled (B, P)) and their mask -> velocity (B, C, H, W), and the
        denoiser's features where some are named."""
        text = self.text(ids, mask) if self.text else Text(ids, mask, pooled)
        return self.denoiser(x, t, text.emb, text.mask, features=features, **({} if text.pooled is None else {"pooled": text.pooled}))

    @property
    def device(self):
        return next(self.parameters()).device

    def encode(self, captions: list[str]) -> Text:
        if self.text is None:
            if not self.frozen:
                from text import load_encoders
                self.frozen.append(load_encoders(self.text_cfg, self.device))
            emb, mask, pooled = self.frozen[0](captions)
            pooled = pooled.to(self.device).float() if pooled is not None and hasattr(self, "mmdit") else None      # a UNet reads none
            return Text(emb.to(self.device).float(), mask.to(self.device), pooled)
        ids, mask = tokenize(captions, self.text.cfg.max_tokens)
        return self.text(ids.to(self.device), mask.to(self.device))


def load_model(path, device="cpu", ema: bool = True) -> tuple[TextToLatents, dict]:
    """The averaged weights (raw ones where there is no average or ema is False) in fp32, frozen; and config.json."""
    config, state = load_checkpoint(path, ("model", "ema"))
    if "model" not in config or "text" not in config:
        raise UserError(f"{path} is no text-to-picture checkpoint: its config.json lacks 'model' or 'text'")
    net = TextToLatents(network_of(config, path), fill(TextConfig(), config["text"], str(path)))
    load_into(net, {**state["model"], **(state.get("ema", {}) if ema else {})}, str(path))      # buffers are not averaged
    return net.float().to(device).eval().requires_grad_(False), config


class Bundle:
    """What export_coreml.py wrote, with the faces of TextToLatents, UNet and Autoencoder, so that generate() draws from the very files that ship.
    Batch 1, tokens padded to a fixed L; the mask travels as the last channel of the text states (ane.py)."""

    def __init__(self, path, size: int = 0):
        try:
            self.manifest = json.loads((Path(path) / "manifest.json").read_text())
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError) as e:
            raise UserError(f"{path} is no bundle ({e}): make one with `python export_coreml.py --out {path}`")
        sizes, self.config = self.manifest["sizes"], self.manifest["config"]
        if "text" not in self.config:
            raise UserError(f"{path} holds random weights and no text encoder: it proves the export, but cannot draw")
        if (size or sizes[0]) not in sizes:
            raise UserError(f"{path} was exported for {', '.join(map(str, sizes))} pixels, not {size}: export it with --size {size}")
        import coreml_check                                 # only here: coremltools takes seconds to import
        self.size, self.device, self.denoiser, self.models = size or sizes[0], torch.device("cpu"), self, {}
        self.cfg, self.L = fill(UNetConfig(), self.config["model"], str(path)), self.config["text"]["max_tokens"]
        for name, part in self.manifest["parts"].items():
            file, function = str(Path(path) / part["file"]), f"size_{self.size}" if len(part["functions"]) > 1 else ""
            if sys.platform == "darwin":
                ct = coreml_check.ct
                mac = ct.models.MLModel(file, compute_units=ct.ComputeUnit.CPU_AND_NE, **({"function_name": function} if function else {}))
                self.models[name] = lambda x, m=mac: {k: torch.from_numpy(np.asarray(v, np.float32)) for k, v in m.predict({k: v.numpy() for k, v in x.items()}).items()}
            else:
                self.models[name] = coreml_check.Package(file, function).run

    def model(self, name, **inputs):
        return self.models[name](inputs)[self.manifest["parts"][name]["output"]]

    def encode(self, captions: list[str]) -> Text:
        ids, mask = tokenize(captions, self.L)
        extra = self.L - ids.shape[1]
        ids, mask = nn.functional.pad(ids, (0, extra), value=encoding().n_vocab - 1), nn.functional.pad(mask, (0, extra))
        return Text(torch.cat([self.model("TextEncoder", input_ids=row[None].float()) for row in ids]), mask)     # (B, L, D+1)

    def __call__(self, x, t, emb, mask):
        """The UNet, picture by picture: with guidance two calls a step."""
        return torch.cat([self.model("Unet", sample=x[i:i + 1], timestep=1000 * t[i:i + 1], encoder_hidden_states=emb[i:i + 1].transpose(1, 2)[:, :, None].contiguous())
                          for i in range(len(x))])

    def decode(self, latents):
        return torch.cat([self.model("VAEDecoder", z=z[None].contiguous()) for z in latents])


def latents_noise(seeds, shape, device):
    """(B, C, H, W), each picture's from its own seed: the same picture in any batch, on any device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)


def to_pictures(images) -> list[np.ndarray]:
    """(B, 3, H, W) in [-1, 1] -> uint8 (H, W, 3) each."""
    return list(((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())


@torch.inference_mode()
def generate(net, ae, captions, seeds, size=64, steps=28, cfg=4.0, sampler="dpmpp", shift=1.0, interval=(0.0, 1.0), batch=16, progress=False, low_memory=False):
    """Captions and seeds, as many of each -> list of uint8 (H, W, 3), or without an autoencoder of latents. `size` in pixels, or (height, width);
    `steps` a number, or the times themselves; low_memory: of the decoding."""
    height, width = (size, size) if isinstance(size, int) else size
    device, pictures, walk = net.device, [], times(steps, shift) if isinstance(steps, int) else steps
    bar = tqdm(total=len(captions), unit="picture", disable=not progress)
    for i in range(0, len(captions), batch):
        text, empty = net.encode(captions[i:i + batch]), net.encode([""]) if cfg != 1 else None
        n = len(text.emb)
        empty = empty and Text(*(x if x is None else x.expand(n, *x.shape[1:]) for x in empty))
        noise = lambda k=-1: latents_noise([s + ((k + 1) << 40) for s in seeds[i:i + batch]], (net.denoiser.cfg.in_channels, height // 8, width // 8), device)
        fresh = {"noise": noise} if sampler == "renoise" else {}                                     # from the picture's own seed, too
        latents = SAMPLERS[sampler](guided(net.denoiser, text, empty, cfg, interval), noise(), walk, **fresh)   # (B, 16, H/8, W/8)
        pictures += list(latents) if ae is None else to_pictures(ae.decode(latents, **({"low_memory": True} if low_memory else {})))
        bar.update(n)
    bar.close()
    return pictures


def main(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("prompts", nargs="+", help="what to draw; several prompts make several pictures")
    p.add_argument("--ckpt", default="", help="checkpoint or run directory; default: assets/fast, or assets/scenes where that is not")
    p.add_argument("--base", action="store_true", help="assets/scenes, the model before step distillation")
    p.add_argument("--ae", default="assets/ae", help="autoencoder's checkpoint")
    p.add_argument("--coreml", default="", metavar="BUNDLE", help="draw with this Core ML bundle instead of --ckpt and --ae")
    p.add_argument("--steps", type=int, help="default: the checkpoint's few_steps, else 28")
    p.add_argument("--cfg", type=float, help="guidance; 1 = none; default: the checkpoint's few_steps, else 4")
    p.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"), help="times t at which guidance acts")
    p.add_argument("--sampler", choices=SAMPLERS, help="default: the checkpoint's few_steps, else dpmpp")
    p.add_argument("--shift", type=float, default=0.0, help="of time; 0 = as in training")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("-n", type=int, default=1, help="pictures a prompt")
    p.add_argument("--size", type=int, nargs="+", default=[0], help="pixels, or height and width; 0 = as in training")
    p.add_argument("--low-memory", action="store_true", help="decode in stripes: a fifth of the memory, twice the time")
    p.add_argument("--device", default="auto")
    p.add_argument("-o", "--out", default="out.png")
    a = p.parse_args(argv)
    if any(not s.strip() for s in a.prompts):
        raise UserError("the prompt is empty: say what to draw, such as \"a red car\"")
    if (a.steps is not None and a.steps < 1) or a.n < 1:
        raise UserError(f"--steps and -n want 1 or more, got {a.steps} and {a.n}")
    if a.base and a.ckpt:
        raise UserError(f"--base is assets/scenes: leave it or --ckpt {a.ckpt} out")
    if not a.ckpt:
        a.ckpt = "assets/fast" if (ASSETS / "fast").is_dir() and not a.base else "assets/scenes"
    device, _, _ = setup(a.device)
    if a.coreml:
        net = Bundle(a.coreml, a.size[0] if len(a.size) == 1 else -1)
        config, a.size = net.config, [net.size]
    else:
        net, config = load_model(a.ckpt, device)
    size = config["data"]["size"] if a.size == [0] else a.size[0] if len(a.size) == 1 else tuple(a.size)
    if [s for s in ([size] if isinstance(size, int) else size) if s % 32 or s < 32] or (not isinstance(size, int) and len(size) != 2):
        raise UserError(f"--size {a.size}: one or two multiples of 32 pixels, such as 64 or 64 96")
    if (largest := 8 * net.denoiser.cfg.patch * net.denoiser.cfg.position_max if config.get("arch") == "mmdit" else 10**9) < (size if isinstance(size, int) else max(size)):
        raise UserError(f"--size {a.size}: this MMDiT's position table ends at {largest} pixels")
    if config["text"].get("kind", "own") == "own":
        tokenize(a.prompts, config["text"]["max_tokens"])   # complain before the work begins
    ae = net if a.coreml else load_autoencoder(a.ae, device)
    captions = [c for c in a.prompts for _ in range(a.n)]
    begin, how = time.time(), settings(config, a.steps, a.cfg, a.sampler, a.shift)
    pictures = generate(net, ae, captions, [a.seed + i for _ in a.prompts for i in range(a.n)], size, **how, interval=tuple(a.interval), progress=True, low_memory=a.low_memory and not a.coreml)
    scale = max(1, 256 // pictures[0].shape[0]) if len(pictures) > 1 else 1
    try:
        sheet = grid(pictures, captions, a.n if len(a.prompts) > 1 else 0, scale) if len(pictures) > 1 else Image.fromarray(pictures[0])
        sheet.save(a.out)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot write {a.out}: {e}")
    print(f"{a.out}: {len(pictures)} pictures of {pictures[0].shape[0]}x{pictures[0].shape[1]}, {(time.time() - begin) / len(pictures):.2f} s each ({len(how['steps']) - 1} steps, {how['sampler']}, cfg {how['cfg']:g})")


if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
