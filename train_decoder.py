"""Trains the autoencoder: L1 over a pyramid, squared error, LPIPS, and a patch GAN.

    python train_decoder.py --config configs/ae.toml [key=value]    encoder and decoder, on scenes
    python train_decoder.py --config configs/decoder_sd3.toml       for SD3's frozen encoder
    python train_decoder.py --test DIR [out.png [out.json]]         PSNR on held-out scenes

A run resumes by itself and ends in out/final.
B batch | C channels | H W of the picture in pixels | h w = H/8, W/8
"""
import json
import re
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from checkpoint import Run, load_into, read_tensors
from common import (
    UserError,
    autocast,
    friendly,
    layout,
    option,
    read_config,
    setup,
    use_bfloat16,
)
from data import DataConfig, seeded
from decoder import Autoencoder, AutoencoderConfig, load_autoencoder, to_pictures, to_tensor
from optim import EMA, Learner, Muon, rate
from pictures import Unusable, find_pictures, to_bucket
from plots import grid
from scenes import Scenes

# Grey, blue-yellow, green-magenta. In RGB, L1 is content with the right grey and learns hue last.
OPPONENT = [[1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, -1.0], [-1.0, 2.0, -1.0]]
IMAGENET = [[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]    # mean, deviation, in [-1, 1]

def pyramid_l1(a, b):
    """L1 over a Laplacian pyramid of opponent colours. Unlike plain L1 it minds a blurred edge."""
    d = torch.einsum("bchw,oc->bohw", a - b, a.new_tensor(OPPONENT))        # (B, 3, H, W)
    loss = 0.0
    for _ in range(3):
        low = F.avg_pool2d(d, 2)
        loss = loss + (d - F.interpolate(low, scale_factor=2.0, mode="bilinear")).abs().mean()
        d = low
    return loss + d.abs().mean()

def patch_discriminator() -> nn.Sequential:
    """Real or drawn, for each patch of about 22 px: (B, 3, H, W) -> logits (B, 1, h, w)."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1), nn.GroupNorm(8, 64), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 4, 2, 1), nn.GroupNorm(8, 128), nn.LeakyReLU(0.2),
        nn.Conv2d(128, 1, 3, padding=1),
    )

class LPIPS(nn.Module):
    """Two pictures (B, 3, H, W) in [-1, 1] -> (B,): weighted squared distance of VGG's features."""
    STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))      # width, convolutions

    def __init__(self):
        super().__init__()
        layers, C = [], 3
        for width, n in self.STAGES:
            for _ in range(n):
                layers += [nn.Conv2d(C, width, 3, padding=1), nn.ReLU()]
                C = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)                      # numbered as VGG's own
        self.lin = nn.ParameterList(torch.ones(1, C, 1, 1) for C, _ in self.STAGES)

    def normalised_features(self, x):
        """What goes into each pooling, of unit length at each place: (B, C, H/2^k, W/2^k)."""
        mean, std = x.new_tensor(IMAGENET).view(2, 3, 1, 1)
        x = (x - mean) / std
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            x = layer(x)

    def forward(self, a, b):
        both = zip(self.lin, self.normalised_features(a), self.normalised_features(b))
        return sum((w * (x - y).square()).sum(1).mean((1, 2)) for w, x, y in both)      # (B,)

def load_lpips(path: str, device="cpu") -> LPIPS:
    """Frozen, from the weights of the package `lpips`."""
    if not Path(path).is_file():
        raise UserError(f"lpips={path} is no file: configs/decoder_sd3.toml says how to make it")
    state = {}
    for key, value in read_tensors(Path(path)).items():
        key = re.sub(r"^net\.slice\d\.", "features.", key)
        state[re.sub(r"^lin(\d)\.model\.1\.weight$", r"lin.\1", key)] = value
    return load_into(LPIPS(), state, path).to(device).eval().requires_grad_(False)

@dataclass
class DecoderConfig:
    out: str = "runs/ae"
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    encoder: str = ""           # SD3's, a directory or hf:..: frozen, the decoder alone learns
    init: str = ""              # an autoencoder of ours, whose weights a new run starts from
    folder: str = ""            # of pictures; empty: scenes
    size: int = option(64, low=16, high=4096)  # of most pictures; some are larger (batch_of)
    steps: int = option(6000, low=1)
    pixels: int = option(65536, low=64, high=2**28)  # of a batch: 16 pictures of 64 px, 4 of 128 px
    lr: float = option(1.5e-3, above=0)
    muon_lr: float = option(0.02, low=0)        # of matrices; 0: AdamW for all
    warmup: int = option(100, low=1)
    clip: float = option(1.0, above=0)
    ema: float = option(0.998, low=0, high=0.999999)
    l1: float = option(0.5, low=0)              # weight of the pyramid: sharp edges, right hues
    mse: float = option(8.0, low=0)             # of the squared error: PSNR, and a smooth start
    lpips: str = ""                             # file of weights: configs/decoder_sd3.toml
    lpips_weight: float = option(0.0, low=0)
    kl: float = option(1e-6, low=0)             # nats for each element of the latents
    latent_noise: float = option(0.1, low=0)    # of their deviation: none of it in the last digits
    gan_start: float = option(2.0, low=0)       # share of the steps; over 1: no patch GAN
    gan_weight: float = option(0.02, low=0)
    amp: str = option("auto", choices=("auto", "bfloat16", "float32"))
    log_every: int = option(50, low=1)
    eval_every: int = option(500, low=1)
    seed: int = option(0, low=0, high=2**64 - 1)
    device: str = "auto"

    def check(self):
        if self.size % 8:
            raise UserError(f"size={self.size} must be a multiple of 8 pixels")
        if self.init and self.encoder:
            raise UserError("init= starts from our own autoencoder, encoder= from SD3's: give one")

def pictures_of(folder="", split="train"):
    """picture(i, size) -> uint8 (size, size, 3), of scenes, or of a folder (1 in 20 held out)."""
    if not folder:
        scenes = Scenes(256, split, seed=0 if split == "train" else 1)
        return lambda i, size: scenes.render(scenes.scene(i), size)
    items = [item for item in find_pictures(folder) if item.picture]
    items = [x for i, x in enumerate(items) if (i % 20 == 0) == (split == "test")] or items

    def picture(i, size):
        square = DataConfig(size=size, bucket_step=size, max_ratio=1.0, max_upscale=1e9)
        while items:
            k = i if split == "test" else np.random.default_rng(i).integers(len(items))
            item = items[k % len(items)]
            try:
                return to_bucket(item.picture.read(), square)
            except (Unusable, OSError) as e:
                print(f"left out {item.name}: {e}", flush=True)
                items.remove(item)
        raise UserError(f"not one picture of {folder} can be read")
    return picture

def batch_of(cfg, step, picture):
    """(B, 3, S, S) in [-1, 1], S = cfg.size. Of eight steps, one is on pictures of twice that,
    and one on parts of pictures of four times that."""
    rng, s = np.random.default_rng((cfg.seed, step)), cfg.size
    size, crop = ([(s, s)] * 6 + [(2 * s, 2 * s), (4 * s, 2 * s)])[rng.integers(8)]
    parts = []
    for k in range(max(1, cfg.pixels // crop**2)):
        y, x = rng.integers(0, size - crop + 1, 2)
        parts.append(picture(step * 64 + k, size)[y:y + crop, x:x + crop])
    return to_tensor(np.stack(parts))

@torch.no_grad()
def reconstruct(ae, size, n, picture=None):
    """Mean PSNR in dB of n held-out pictures (scenes by default), and the first eight (in, out)."""
    picture = picture or pictures_of(split="test")
    device = next(ae.parameters()).device
    values, pairs = [], []
    for i in range(n):
        x = picture(i, size)
        y = to_pictures(ae.decode(ae.encode(to_tensor(x[None]).to(device))))[0]
        error = np.mean((y.astype(float) - x) ** 2)
        values.append(10 * np.log10(255**2 / max(1e-9, error)))
        pairs.append((x, y))
    return float(np.mean(values)), pairs[:8]

def recon_picture(pairs):
    """Three rows: inputs, outputs, and four times their difference on grey."""
    difference = [np.clip(128 + 4 * (b.astype(int) - a), 0, 255).astype(np.uint8) for a, b in pairs]
    return grid([a for a, _ in pairs] + [b for _, b in pairs] + difference, columns=len(pairs))

def make_autoencoder(cfg: DecoderConfig, device) -> Autoencoder:
    """With cfg.encoder: that frozen encoder, its latents' scale, and a tiny decoder of our own."""
    frozen = load_autoencoder(cfg.encoder, device) if cfg.encoder else None
    if frozen:
        tiny = {k: v for k, v in asdict(cfg.autoencoder).items() if k.startswith("tiny_")}
        cfg.autoencoder = replace(frozen.cfg, decoder="tiny", **tiny)
    if cfg.init:
        start = load_autoencoder(cfg.init)
        cfg.autoencoder = start.cfg
        return start.requires_grad_(True).train().to(device, memory_format=layout(device))
    torch.manual_seed(cfg.seed)
    ae = Autoencoder(cfg.autoencoder)
    ae.encoder = frozen.encoder if frozen else ae.encoder
    return ae.to(device, memory_format=layout(device))

def autoencoder_loss(cfg, ae, x, step, amp, lpips=None):
    """Outputs (B, 3, H, W) for pictures x, their loss without the GAN, and parts for the log."""
    with autocast(x.device, amp), torch.set_grad_enabled(not cfg.encoder):
        mean, logvar = ae.moments(x)                                # (B, C, h, w) each
    mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()         # constant if it is frozen
    # noise depends on the step alone, so that a resumed run draws the same
    g = seeded(cfg.seed * 1000003 + step, x.device)
    noise = torch.randn(mean.shape, generator=g, device=x.device)
    deviation = (0.5 * logvar).exp() + cfg.latent_noise * mean.detach().std()
    with autocast(x.device, amp):
        y = ae.decoder(mean + deviation * noise).float()            # (B, 3, H, W)
        perceptual = lpips(y, x).mean() if lpips else 0.0
    rec = cfg.l1 * pyramid_l1(y, x) + cfg.mse * F.mse_loss(y, x)
    loss = rec + cfg.lpips_weight * perceptual + cfg.kl * kl
    return y, loss, {"rec_loss": rec, "kl": kl}

def train_decoder(cfg: DecoderConfig):
    device, _, world = setup(cfg.device)
    if world > 1:
        raise UserError("the autoencoder is trained by one process: start it without torchrun")
    lpips = load_lpips(cfg.lpips, device) if cfg.lpips_weight else None
    picture, held_out = pictures_of(cfg.folder), pictures_of(cfg.folder, "test")
    ae = make_autoencoder(cfg, device)
    learned = ae.decoder if cfg.encoder else ae
    disc = patch_discriminator().to(device)
    opt, ema = Muon(learned, cfg.lr, cfg.muon_lr), EMA(learned, cfg.ema)
    learner = Learner(learned, opt, cfg.clip, ema)
    disc_learner = Learner(disc, Muon(disc, 2e-4, betas=(0.5, 0.9)), clip=float("inf"))
    # not yet an "autoencoder" that others may load: scale and shift are measured at the end
    about = {"autoencoder": None, "network": asdict(cfg.autoencoder)}
    run = Run(cfg, device, describe=about, model=learned, ema=ema, optimizer=opt, disc=disc,
              disc_optimizer=disc_learner.opt)
    amp = use_bfloat16(cfg.amp, device)
    report = partial(report_decoder, cfg, run, ae, ema, held_out)
    if run.lacks("psnr"):
        report()

    for step in run.steps():
        opt.schedule(rate(cfg, step))
        x = batch_of(cfg, step, picture).to(device, memory_format=layout(device))
        y, loss, values = autoencoder_loss(cfg, ae, x, step, amp, lpips)
        adversarial = step >= cfg.gan_start * cfg.steps
        if adversarial:
            loss = loss - cfg.gan_weight * disc(y).mean()
        loss.backward()
        norm = learner.step()
        if adversarial:
            disc.zero_grad()                    # of what the autoencoder's loss left there
            hinge = F.relu(1 - disc(x)).mean() + F.relu(1 + disc(y.detach())).mean()
            hinge.backward()
            disc_learner.step()                 # but not where a picture is NaN
            values["disc_loss"] = hinge
        run.log(len(x), [learner, disc_learner], loss=loss, **values, grad=norm,
                lr=cfg.lr * rate(cfg, step))
        if run.due():
            run.save()
            report()
            run.restart_clock()
    with ema.swapped(), torch.no_grad():
        if run.step == cfg.steps and not cfg.encoder:
            pictures = np.stack([picture(i, cfg.size) for i in range(256)])
            z = torch.cat([ae.moments(x)[0] for x in to_tensor(pictures).to(device).split(1)])
            ae.cfg.shift = round(z.mean().item(), 4)
            ae.cfg.scale = round(1 / z.std().item(), 4)     # latents of zero mean, unit variance
        final = {k: v.clone() for k, v in ae.state_dict().items()}
    if run.finish(final, {"autoencoder": asdict(ae.cfg)}):
        print(f"{run.out}/final: shift {ae.cfg.shift}, scale {ae.cfg.scale}")

def report_decoder(cfg: DecoderConfig, run: Run, ae, ema: EMA, held_out):
    """PSNR of the averaged weights on held-out pictures, and a sheet of them."""
    with ema.swapped():
        small, _ = reconstruct(ae, cfg.size, 16, held_out)
        large, pairs = reconstruct(ae, 4 * cfg.size, 8, held_out)
    recon_picture(pairs).save(run.out / "recon.png")
    run.row(psnr=small, psnr_large=large)
    print(f"step {run.step}: held-out PSNR {small:.2f}, large {large:.2f} dB", flush=True)

def measure_decoder(path, out="recon.png", table=None):
    for file in (out, table or out):        # folders are made now, not after the work
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    ae = load_autoencoder(path)
    result = {"ckpt": path, **common.provenance(1), "psnr": {}}
    for size, n in ((64, 128), (128, 64), (256, 32)):
        result["psnr"][size], pairs = reconstruct(ae, size, n)
        print(f"held-out scenes, {size} px: {result['psnr'][size]:.2f} dB PSNR ({n} pictures)")
    recon_picture(pairs).save(out)
    if table:
        Path(table).write_text(json.dumps(result, indent=1), "utf-8")

if __name__ == "__main__":
    with friendly():
        if sys.argv[1:2] == ["--test"] and len(sys.argv) > 2:
            measure_decoder(*sys.argv[2:5])
        else:
            train_decoder(read_config(DecoderConfig(), sys.argv[1:], "configs/ae.toml"))
