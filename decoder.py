"""The autoencoder: 16 channels at 1/8 of the resolution, as in SD3. The encoder has SD3's layout and names (so that SD3's own weights
fit), the decoder is SnapGen's tiny one: 1.38 M parameters against SD3's 49.5 M (paper.md, section 2).

    python decoder.py --config configs/ae.toml [key=value]    trains on scenes, resumes by itself, ends in out/final
    python decoder.py --test DIR [out.png [out.json]]          PSNR on held-out scenes, and a picture: input, output, difference

B batch | C channels | H W of the picture in pixels | h w = H/8, W/8
"""
import json, signal, sys, time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import load_checkpoint, load_into, resolve, save_checkpoint
from common import Log, UserError, attention, friendly, provenance, read_config, setup, use_bfloat16
from data import Scenes, grid, to_tensor
from optim import EMA, Muon


@dataclass
class AutoencoderConfig:
    latent: int = 16
    widths: list[int] = field(default_factory=lambda: [128, 256, 512, 512])   # of the encoder, SD3's; scenes need far less
    layers: int = 2                 # residual blocks a stage of the encoder
    attention: bool = True          # in the encoder's middle
    groups: int = 32                # of the encoder's GroupNorms; narrow widths want fewer: a norm over one channel forgets the colour
    tiny_widths: list[int] = field(default_factory=lambda: [256, 256, 128, 64])
    tiny_blocks: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    tiny_groups: int = 8            # of the decoder's GroupNorms, for the same reason
    scale: float = 1.5305           # z = (mean - shift) * scale has about unit variance; SD3's numbers
    shift: float = 0.0609


# ---------------------------------------------------------------------------- encoder: SD3's layout, diffusers' names
class ResnetBlock(nn.Module):
    def __init__(self, C_in, C_out, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, C_in, eps=1e-6), nn.Conv2d(C_in, C_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, C_out, eps=1e-6), nn.Conv2d(C_out, C_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                        # (B, C_out, H, W)
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """One head over all positions."""

    def __init__(self, C, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, C, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.to_out = nn.ModuleList([nn.Linear(C, C)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]   # (B, 1, h*w, C)
        h = attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, h, w)


class Downsample(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))                     # (B, C, H/2, W/2); SD3 pads right and below only


class Encoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> moments (B, 2*latent, H/8, W/8): mean and log variance."""

    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        W, g = cfg.widths, cfg.groups
        self.conv_in = nn.Conv2d(3, W[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, C in enumerate(W):
            stage = nn.Module()
            stage.resnets = nn.ModuleList(ResnetBlock(C if j else W[max(i - 1, 0)], C, g) for j in range(cfg.layers))
            stage.downsamplers = nn.ModuleList([Downsample(C)] if i < len(W) - 1 else [])
            self.down_blocks.append(stage)
        self.mid_block = nn.Module()
        self.mid_block.resnets = nn.ModuleList(ResnetBlock(W[-1], W[-1], g) for _ in range(2))
        self.mid_block.attentions = nn.ModuleList([AttentionBlock(W[-1], g)] if cfg.attention else [])
        self.conv_norm_out = nn.GroupNorm(g, W[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(W[-1], 2 * cfg.latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)                                          # (B, C0, H, W)
        for stage in self.down_blocks:
            for layer in (*stage.resnets, *stage.downsamplers):
                x = layer(x)                                         # (B, C, H/2, W/2) after a downsampler
        first, second = self.mid_block.resnets
        x = first(x)
        for attention in self.mid_block.attentions:
            x = attention(x)
        return self.conv_out(F.silu(self.conv_norm_out(second(x))))  # (B, 2*latent, H/8, W/8)


# ---------------------------------------------------------------------------- the tiny decoder
def separable(C_in, C_out, bias):
    return nn.Sequential(nn.Conv2d(C_in, C_in, 3, padding=1, groups=C_in), nn.Conv2d(C_in, C_out, 1, bias=bias))


class TinyBlock(nn.Module):
    """x + [ DW3x3 -> PW(C -> 2C) -> DW3x3 -> GN -> act -> PW(2C -> C) ]: one norm, which keeps the colours right, and no attention."""

    def __init__(self, C, groups):
        super().__init__()
        self.body = nn.Sequential(separable(C, 2 * C, bias=False), nn.Conv2d(2 * C, 2 * C, 3, padding=1, groups=2 * C),
                                  nn.GroupNorm(groups, 2 * C), nn.SiLU(), nn.Conv2d(2 * C, C, 1, bias=False))
        nn.init.zeros_(self.body[-1].weight)

    def forward(self, x):
        return x + self.body(x)


def tiny_decoder(cfg: AutoencoderConfig) -> nn.Sequential:
    """latents (B, 16, h, w) -> (B, 3, 8h, 8w). 1,378,848 parameters: biases on every depthwise convolution, on the pointwise ones of
    the three upsamplers, and nowhere else (1,378,400 without the upsamplers'). No published fact decides between the two."""
    W, layers = cfg.tiny_widths, []
    layers.append(separable(cfg.latent, W[0], bias=False))           # (B, C0, h, w)
    for i, (C, n) in enumerate(zip(W, cfg.tiny_blocks)):
        layers += [TinyBlock(C, cfg.tiny_groups) for _ in range(n)]
        if i < len(W) - 1:                                           # (B, C', 2h, 2w)
            layers += [nn.Upsample(scale_factor=2, mode="nearest"), separable(C, W[i + 1], bias=True)]
    layers += [nn.GroupNorm(cfg.tiny_groups, W[-1]), nn.SiLU(), separable(W[-1], 3, bias=False)]  # (B, 3, H, W)
    return nn.Sequential(*layers)


class Autoencoder(nn.Module):
    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        self.cfg, self.encoder, self.decoder = cfg, Encoder(cfg), tiny_decoder(cfg)
        for m in self.modules():
            if isinstance(m, ResnetBlock):                      # starts as its shortcut
                nn.init.zeros_(m.conv2.weight)
        for m in self.modules():
            if isinstance(m, nn.Conv2d) and m.weight.any():     # but not the blocks' last ones, which are zero
                # Unit gain. PyTorch's default shrinks the signal by 3 at each convolution, and the separable ones are twice as many:
                # brightness was then learned in seconds and colour, axis by axis, in many minutes.
                nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def moments(self, images):
        return self.encoder(images).chunk(2, 1)                      # mean, log variance: (B, latent, h, w) each

    def encode(self, images):
        """Pictures (B, 3, H, W) in [-1, 1] -> normalised latents (B, latent, H/8, W/8). ValueError unless H and W are multiples of 8."""
        if images.shape[-2] % 8 or images.shape[-1] % 8:
            raise ValueError(f"picture height and width must be multiples of 8, got {images.shape[-2]}x{images.shape[-1]}")
        return (self.moments(images)[0] - self.cfg.shift) * self.cfg.scale

    def decode(self, latents):
        """Normalised latents (B, latent, h, w) -> pictures (B, 3, 8h, 8w), about [-1, 1]."""
        return self.decoder(latents / self.cfg.scale + self.cfg.shift)


def load_autoencoder(path="assets/ae", device="cpu") -> Autoencoder:
    """From a checkpoint directory, in fp32, frozen. UserError names what is missing or damaged."""
    config, state = load_checkpoint(path)
    if "autoencoder" not in config:
        raise UserError(f"{path} is no autoencoder's checkpoint: its config.json has no 'autoencoder' table")
    ae = load_into(Autoencoder(AutoencoderConfig(**config["autoencoder"])), state["model"], str(path))
    return ae.float().to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------- losses
# grey, blue-yellow, green-magenta: in RGB, L1 is content with the right grey, and hue is learned last
OPPONENT = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, -1.0], [-1.0, 2.0, -1.0]])


def pyramid_l1(a, b, levels=4):
    """L1 over a Laplacian pyramid of opponent colours: a blurred edge costs as much as a wrong colour, which plain L1 hardly minds.
    Needs no download."""
    d = torch.einsum("bchw,oc->bohw", a - b, OPPONENT.to(a.device))  # all is linear: the difference's pyramid is enough
    loss = 0.0
    for _ in range(levels - 1):
        low = F.avg_pool2d(d, 2)
        loss = loss + (d - F.interpolate(low, scale_factor=2.0, mode="bilinear")).abs().mean()
        d = low
    return loss + d.abs().mean()


class PatchDiscriminator(nn.Sequential):
    """Three strided convolutions: real or drawn, for each patch of about 22 pixels. (B, 3, H, W) -> (B, 1, H/8, W/8)"""

    def __init__(self, C=32):
        act = lambda: nn.LeakyReLU(0.2)
        super().__init__(nn.Conv2d(3, C, 4, 2, 1), act(), nn.Conv2d(C, 2 * C, 4, 2, 1), nn.GroupNorm(8, 2 * C), act(),
                         nn.Conv2d(2 * C, 4 * C, 4, 2, 1), nn.GroupNorm(8, 4 * C), act(), nn.Conv2d(4 * C, 1, 3, padding=1))


# ---------------------------------------------------------------------------- training
@dataclass
class Config:
    out: str = "runs/ae"
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    steps: int = 6000
    pixels: int = 65536             # of a batch: 16 pictures of 64 px, 4 of 128 px, 1 of 256 px
    lr: float = 1.5e-3
    muon_lr: float = 0.02           # of the matrices, by Muon; 0: AdamW for all
    warmup: int = 100
    clip: float = 1.0
    ema: float = 0.998
    l1: float = 0.5                 # weight of the pyramid's L1: sharp edges and right hues
    mse: float = 8.0                # of the squared error: the decibels, and a smooth start
    kl: float = 1e-6                # weight of the KL term, in nats a latent element
    latent_noise: float = 0.1      # of the latents' own deviation: the decoder must not live on their last digits
    gan_start: float = 2.0          # share of the steps after which the patch GAN joins (over 1: never)
    gan_weight: float = 0.02
    amp: str = "auto"               # auto, bfloat16 or float32: common.use_bfloat16
    eval_every: int = 500
    seed: int = 0
    device: str = "auto"


def batch_of(cfg, step, scenes):
    """(B, 3, S, S) in [-1, 1]. Of eight steps, six on whole pictures of 64 px, one on 128 px, one on parts of 256 px."""
    rng = np.random.default_rng((cfg.seed, step))
    size, crop = (*[(64, 64)] * 6, (128, 128), (256, 128))[rng.integers(8)]
    n, pictures = max(1, cfg.pixels // crop**2), []
    for k in range(n):
        y, x = rng.integers(0, size - crop + 1, 2)
        s = scenes.scene(step * 64 + k)
        pictures.append(scenes.render(s, size)[y:y + crop, x:x + crop])
    return to_tensor(np.stack(pictures))


@torch.no_grad()
def psnr(ae, size, n, device="cpu"):
    """Mean PSNR in dB over n held-out scenes; (inputs, outputs) of the first eight as uint8 beside it."""
    scenes, values, pairs = Scenes(size, "test", seed=1), [], []
    for i in range(n):
        picture = scenes[i][0]
        out = ae.decode(ae.encode(to_tensor(picture[None]).to(device))).clamp(-1, 1)
        out = ((out[0].permute(1, 2, 0).float().cpu().numpy() + 1) * 127.5).round().astype(np.uint8)
        values.append(10 * np.log10(255**2 / max(1e-9, np.mean((out.astype(float) - picture) ** 2))))
        pairs.append((picture, out))
    return float(np.mean(values)), pairs[:8]


def recon_picture(pairs):
    difference = [np.clip(128 + 4 * (b.astype(int) - a), 0, 255).astype(np.uint8) for a, b in pairs]
    return grid([a for a, _ in pairs] + [b for _, b in pairs] + difference, columns=len(pairs))


def rate(cfg, step):
    return min((step + 1) / max(1, cfg.warmup), 0.5 * (1 + np.cos(np.pi * step / cfg.steps)) + 1e-3)


def train(cfg: Config):
    if cfg.steps < 1 or cfg.eval_every < 1:
        raise UserError(f"steps and eval_every want 1 or more, got {cfg.steps} and {cfg.eval_every}")
    device, _, _ = setup(cfg.device)
    torch.manual_seed(cfg.seed)
    out, scenes = Path(cfg.out), Scenes(256)
    ae, disc = Autoencoder(cfg.autoencoder).to(device, memory_format=torch.channels_last), PatchDiscriminator().to(device)
    opt = Muon(ae, cfg.lr, cfg.muon_lr)
    opt_d = Muon(disc, 2e-4, betas=(0.5, 0.9))
    ema, start, skipped = EMA(ae, cfg.ema), 0, 0
    if (out / "latest").exists():
        saved, state = load_checkpoint(out, ("model", "ema", "disc", "optimizer", "optimizer_d"))
        start = saved["step"]
        load_into(ae, state["model"], cfg.out)
        load_into(disc, state["disc"], cfg.out)
        ema.load_state_dict(state["ema"], saved["ema_steps"])
        opt.load_tensors(state["optimizer"])
        opt_d.load_tensors(state["optimizer_d"])
        print(f"resumed {resolve(out)} at step {start}")

    def save(step):
        save_checkpoint(out / "checkpoint", {"model": ae.state_dict(), "ema": ema.state_dict(), "disc": disc.state_dict(),
                                             "optimizer": opt.tensors(), "optimizer_d": opt_d.tensors()},
                        {"config": asdict(cfg), "step": step, "ema_steps": ema.steps})

    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    amp = use_bfloat16(cfg.amp, device)
    log, clock = Log(out / "log.csv", cfg.steps, start), time.time()
    for step in range(start, cfg.steps):
        opt.schedule(rate(cfg, step))
        x = batch_of(cfg, step, scenes).to(device, memory_format=torch.channels_last)
        g = torch.Generator(device).manual_seed(cfg.seed * 1000003 + step)   # a function of the step alone, so that resuming is exact
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            mean, logvar = ae.moments(x)
        mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        noise = (0.5 * logvar).exp() + cfg.latent_noise * mean.detach().std()
        z = mean + noise * torch.randn(mean.shape, generator=g, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            y = ae.decoder(z)
        y = y.float()
        loss = rec = cfg.l1 * pyramid_l1(y, x) + cfg.mse * F.mse_loss(y, x)
        loss = loss + cfg.kl * kl
        adversarial = step >= cfg.gan_start * cfg.steps
        if adversarial:
            disc.requires_grad_(False)
            loss = loss - cfg.gan_weight * disc(y).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(ae.parameters(), cfg.clip)
        if torch.isfinite(norm):
            opt.step()
            ema.update()
        else:
            skipped += 1
            print(f"step {step}: gradient is {norm.item()}, skipped ({skipped} so far)")
            if skipped > 100:
                raise UserError("over 100 steps with a gradient that is not finite: lower lr, or set amp=float32")
        opt.zero_grad(set_to_none=True)
        if adversarial and torch.isfinite(norm):                     # hinge; one step on a NaN picture would poison it for good
            disc.requires_grad_(True)
            loss_d = F.relu(1 - disc(x)).mean() + F.relu(1 + disc(y.detach())).mean()
            loss_d.backward()
            opt_d.step()
            opt_d.zero_grad(set_to_none=True)
        done = step + 1
        if done % 50 == 0:
            values = dict(loss=loss.item(), rec_loss=rec.item(), kl=kl.item(), lr=cfg.lr * rate(cfg, step), grad=norm.item(), s_step=(time.time() - clock) / 50)
            clock = time.time()
            log(done, **values)
        if done % cfg.eval_every == 0 or done == cfg.steps or stop:
            with ema.swapped():
                ae.eval()
                (small, _), (large, pairs) = psnr(ae, 64, 16, device), psnr(ae, 256, 8, device)
                ae.train()
            print(f"step {done}: held-out PSNR {small:.2f} dB at 64 px, {large:.2f} dB at 256 px")
            recon_picture(pairs).save(out / "recon.png")
            save(done)
            if stop:
                print(f"stopped by SIGTERM, saved at step {done}: run the same command to go on")
                return
    with ema.swapped():
        export(ae, out / "final", device, cfg)


@torch.no_grad()
def export(ae, path, device, cfg, n=256):
    """Measures the latents' shift and scale over n scenes of 64 px, and writes fp16 weights."""
    scenes = Scenes(64)
    z = torch.cat([ae.moments(to_tensor(scenes[i][0][None]).to(device))[0] for i in range(n)])
    ae.cfg.shift, ae.cfg.scale = round(z.mean().item(), 4), round(1 / z.std().item(), 4)
    save_checkpoint(path, {"model": {k: v.half() for k, v in ae.state_dict().items()}}, {"autoencoder": asdict(ae.cfg), "trained": asdict(cfg)}, latest=False)
    print(f"{path}: shift {ae.cfg.shift}, scale {ae.cfg.scale}, {sum(p.numel() for p in ae.parameters()) / 1e6:.2f} M parameters")


def main(argv):
    if argv[:1] == ["--test"] and len(argv) in (2, 3, 4):
        ae, out = load_autoencoder(argv[1]), {"ckpt": argv[1], **provenance(1), "psnr": {}}
        for size, n in ((64, 128), (128, 64), (256, 32)):
            out["psnr"][size], pairs = psnr(ae, size, n)
            print(f"held-out scenes, {size} px: {out['psnr'][size]:.2f} dB PSNR ({n} pictures)")
        recon_picture(pairs).save(argv[2] if len(argv) > 2 else "recon.png")
        if len(argv) > 3:
            Path(argv[3]).write_text(json.dumps(out, indent=1))
    else:
        train(read_config(Config(), argv, "configs/ae.toml"))


if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
