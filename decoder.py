"""The autoencoder: 16 channels at 1/8 of the resolution, as in SD3. The encoder has SD3's layout and names (so that SD3's own weights
fit), the decoder is SnapGen's tiny one: 1.38 M parameters against SD3's 49.5 M (paper.md, section 2).

    python decoder.py --config configs/ae.toml [key=value]    trains on scenes, resumes by itself, ends in out/final
    python decoder.py --config configs/decoder_sd3.toml        the tiny decoder alone, against SD3's frozen encoder; folder=DIR: on your pictures
    python decoder.py --test DIR [out.png [out.json]]          PSNR on held-out scenes, and a picture: input, output, difference

B batch | C channels | H W of the picture in pixels | h w = H/8, W/8
"""
import json, re, signal, sys, time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import stripes
from checkpoint import hub_folder, hub_tensors, load_checkpoint, load_into, resolve, save_checkpoint
from common import Log, UserError, attention, friendly, provenance, read_config, setup, use_bfloat16
from data import DataConfig, Scenes, grid, to_tensor
from losses import PatchDiscriminator, load_lpips, pyramid_l1
from optim import EMA, Muon
from pictures import Unusable, find_pictures, read, to_bucket


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
    decoder: str = "tiny"           # or sd3: SD3's own, the reference


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


class Middle(nn.Module):
    """Residual block, attention, residual block: the same in encoder and decoder."""

    def __init__(self, C, cfg):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(C, C, cfg.groups) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(C, cfg.groups)] if cfg.attention else [])

    def forward(self, x):
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


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
        self.mid_block = Middle(W[-1], cfg)
        self.conv_norm_out = nn.GroupNorm(g, W[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(W[-1], 2 * cfg.latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)                                          # (B, C0, H, W)
        for stage in self.down_blocks:
            for layer in (*stage.resnets, *stage.downsamplers):
                x = layer(x)                                         # (B, C, H/2, W/2) after a downsampler
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))  # (B, 2*latent, H/8, W/8)


class Upsample(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))     # (B, C, 2H, 2W)


class SD3Decoder(nn.Module):
    """What the tiny decoder replaces, 49.5 M parameters: latents (B, latent, h, w) -> (B, 3, 8h, 8w). The encoder backwards, with one residual block more a stage."""

    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        W, g = cfg.widths[::-1], cfg.groups
        self.conv_in, self.mid_block = nn.Conv2d(cfg.latent, W[0], 3, padding=1), Middle(W[0], cfg)
        self.up_blocks = nn.ModuleList()
        for i, C in enumerate(W):
            stage = nn.Module()
            stage.resnets = nn.ModuleList(ResnetBlock(C if j else W[max(i - 1, 0)], C, g) for j in range(cfg.layers + 1))
            stage.upsamplers = nn.ModuleList([Upsample(C)] if i < len(W) - 1 else [])
            self.up_blocks.append(stage)
        self.conv_norm_out, self.conv_out = nn.GroupNorm(g, W[-1], eps=1e-6), nn.Conv2d(W[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))                          # (B, C, h, w)
        for stage in self.up_blocks:
            for layer in (*stage.resnets, *stage.upsamplers):
                x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))          # (B, 3, H, W)


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
        self.cfg, self.encoder, self.decoder = cfg, Encoder(cfg), SD3Decoder(cfg) if cfg.decoder == "sd3" else tiny_decoder(cfg)
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

    def decode(self, latents, low_memory: bool = False):
        """Normalised latents (B, latent, h, w) -> pictures (B, 3, 8h, 8w), about [-1, 1]. low_memory, without gradients: one by one in stripes, in a fifth of the memory and twice the time."""
        z = latents / self.cfg.scale + self.cfg.shift
        if low_memory and self.cfg.decoder == "tiny":
            return torch.cat([stripes.decode(self.decoder, one[None]) for one in z])
        return self.decoder(z if torch.is_grad_enabled() else z.contiguous(memory_format=torch.channels_last))      # a fourth faster on a CPU


def load_autoencoder(path="assets/ae", device="cpu") -> Autoencoder:
    """From a checkpoint directory of ours, a directory with SD3's `vae` (or that itself), or a hub id; in fp32, frozen. UserError names what is missing or damaged."""
    try:
        folder = resolve(path)
    except UserError:
        if not re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) or str(path).startswith(("runs/", "assets/")):
            raise
        folder = path
    folder = hub_folder(folder, "vae", f"`hf download stabilityai/stable-diffusion-3.5-large --include 'vae/*' --local-dir {path}` (gated) downloads SD3's, 0.17 GB")
    file = folder / "config.json"
    if file.is_file() and '"AutoencoderKL"' in file.read_text(errors="replace"):
        try:
            raw = json.loads(file.read_text())
            cfg = AutoencoderConfig(raw["latent_channels"], raw["block_out_channels"], raw["layers_per_block"], raw.get("mid_block_add_attention", True), raw["norm_num_groups"],
                                    scale=raw["scaling_factor"], shift=raw.get("shift_factor") or 0.0, decoder="sd3")
        except (KeyError, ValueError) as e:
            raise UserError(f"{file} is no whole config of an AutoencoderKL ({e!r}): download it again")
        state = hub_tensors(folder)
    else:
        config, state = load_checkpoint(folder)
        if "autoencoder" not in config:
            raise UserError(f"{path} is no autoencoder's checkpoint: its config.json has no 'autoencoder' table")
        cfg, state = AutoencoderConfig(**config["autoencoder"]), state["model"]
    return load_into(Autoencoder(cfg), state, str(path)).float().to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------- training
@dataclass
class Config:
    out: str = "runs/ae"
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    encoder: str = ""               # a directory with SD3's vae, or a hub id: its encoder, frozen, and only the decoder learns; empty: both learn
    folder: str = ""                # of pictures; empty: scenes
    size: int = 64                  # of most pictures; some are twice as large, some parts of four times as large ones
    steps: int = 6000
    pixels: int = 65536             # of a batch: 16 pictures of 64 px, 4 of 128 px
    lr: float = 1.5e-3
    muon_lr: float = 0.02           # of the matrices, by Muon; 0: AdamW for all
    warmup: int = 100
    clip: float = 1.0
    ema: float = 0.998
    l1: float = 0.5                 # weight of the pyramid's L1: sharp edges and right hues
    mse: float = 8.0                # of the squared error: the decibels, and a smooth start
    lpips: str = ""                 # its weights as a safetensors file (losses.py); without: no LPIPS
    lpips_weight: float = 0.0
    kl: float = 1e-6                # weight of the KL term, in nats a latent element
    latent_noise: float = 0.1      # of the latents' own deviation: the decoder must not live on their last digits
    gan_start: float = 2.0          # share of the steps after which the patch GAN joins (over 1: never)
    gan_weight: float = 0.02
    amp: str = "auto"               # auto, bfloat16 or float32: common.use_bfloat16
    eval_every: int = 500
    seed: int = 0
    device: str = "auto"


class Folder:
    """Square pictures from what pictures.py reads, captions or none; one in twenty is held out. What cannot be used is named and left out."""

    def __init__(self, path, split="train"):
        items = [i for i in find_pictures(path) if i.picture]
        self.split, self.files = split, [item for i, item in enumerate(items) if (i % 20 == 0) == (split == "test")] or items

    def picture(self, i, size) -> np.ndarray:
        while self.files:
            item = self.files[np.random.default_rng(i).integers(len(self.files)) if self.split == "train" else i % len(self.files)]
            try:
                return to_bucket(read(item.picture), DataConfig(size=size, bucket_step=size, max_ratio=1.0, max_upscale=float("inf")))    # (size, size, 3)
            except (Unusable, OSError) as e:
                print(f"left out {item.name}: {e}", flush=True)
                self.files.remove(item)
        raise UserError("not one picture of the folder can be read: it wants .jpg, .jpeg, .png or .webp, or tars of them")


def pictures_of(cfg, split="train"):
    """index, size -> (size, size, 3) uint8."""
    if cfg.folder:
        return Folder(cfg.folder, split).picture
    scenes = Scenes(256, split, seed=0 if split == "train" else 1)
    return lambda i, size: scenes.render(scenes.scene(i), size)


def batch_of(cfg, step, draw):
    """(B, 3, S, S) in [-1, 1]. Of eight steps, six on whole pictures of `size` px, one on twice that, one on parts of four times that."""
    rng, s = np.random.default_rng((cfg.seed, step)), cfg.size
    size, crop = (*[(s, s)] * 6, (2 * s, 2 * s), (4 * s, 2 * s))[rng.integers(8)]
    n, pictures = max(1, cfg.pixels // crop**2), []
    for k in range(n):
        y, x = rng.integers(0, size - crop + 1, 2)
        pictures.append(draw(step * 64 + k, size)[y:y + crop, x:x + crop])
    return to_tensor(np.stack(pictures))


@torch.no_grad()
def psnr(ae, size, n, device="cpu", draw=None):
    """Mean PSNR in dB over n held-out pictures (None: scenes); (inputs, outputs) of the first eight as uint8 beside it."""
    draw, values, pairs = draw or pictures_of(Config(), "test"), [], []
    for i in range(n):
        picture = draw(i, size)
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
    out, draw, held_out = Path(cfg.out), pictures_of(cfg), pictures_of(cfg, "test")
    if cfg.encoder:                                                  # the latents are SD3's: its encoder, its scale
        sd3, own = load_autoencoder(cfg.encoder, device), cfg.autoencoder
        cfg.autoencoder = replace(sd3.cfg, decoder="tiny", tiny_widths=own.tiny_widths, tiny_blocks=own.tiny_blocks, tiny_groups=own.tiny_groups)
    torch.manual_seed(cfg.seed)
    ae, disc = Autoencoder(cfg.autoencoder), PatchDiscriminator().to(device)
    ae.encoder = sd3.encoder if cfg.encoder else ae.encoder
    ae = ae.to(device, memory_format=torch.channels_last)
    learned, lpips = ae.decoder if cfg.encoder else ae, load_lpips(cfg.lpips, device) if cfg.lpips_weight else None
    opt = Muon(learned, cfg.lr, cfg.muon_lr)
    opt_d = Muon(disc, 2e-4, betas=(0.5, 0.9))
    ema, start, skipped = EMA(learned, cfg.ema), 0, 0
    if (out / "latest").exists():
        saved, state = load_checkpoint(out, ("model", "ema", "disc", "optimizer", "optimizer_d"))
        start = saved["step"]
        load_into(learned, state["model"], cfg.out)
        load_into(disc, state["disc"], cfg.out)
        ema.load_state_dict(state["ema"], saved["ema_steps"])
        opt.load_tensors(state["optimizer"])
        opt_d.load_tensors(state["optimizer_d"])
        print(f"resumed {resolve(out)} at step {start}")

    def save(step):
        save_checkpoint(out / "checkpoint", {"model": learned.state_dict(), "ema": ema.state_dict(), "disc": disc.state_dict(),
                                             "optimizer": opt.tensors(), "optimizer_d": opt_d.tensors()},
                        {"config": asdict(cfg), "step": step, "ema_steps": ema.steps})

    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    amp = use_bfloat16(cfg.amp, device)
    log, clock = Log(out / "log.csv", cfg.steps, start), time.time()
    for step in range(start, cfg.steps):
        opt.schedule(rate(cfg, step))
        x = batch_of(cfg, step, draw).to(device, memory_format=torch.channels_last)
        g = torch.Generator(device).manual_seed(cfg.seed * 1000003 + step)   # a function of the step alone, so that resuming is exact
        with torch.autocast(device.type, torch.bfloat16, enabled=amp), torch.set_grad_enabled(not cfg.encoder):
            mean, logvar = ae.moments(x)
        mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        noise = (0.5 * logvar).exp() + cfg.latent_noise * mean.detach().std()
        z = mean + noise * torch.randn(mean.shape, generator=g, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            y = ae.decoder(z)
        y = y.float()
        loss = rec = cfg.l1 * pyramid_l1(y, x) + cfg.mse * F.mse_loss(y, x)
        if lpips:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = loss + cfg.lpips_weight * lpips(y, x).mean()
        loss = loss + cfg.kl * kl                                    # of a frozen encoder a constant
        adversarial = step >= cfg.gan_start * cfg.steps
        if adversarial:
            disc.requires_grad_(False)
            loss = loss - cfg.gan_weight * disc(y).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learned.parameters(), cfg.clip)
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
                (small, _), (large, pairs) = psnr(ae, cfg.size, 16, device, held_out), psnr(ae, 4 * cfg.size, 8, device, held_out)
                ae.train()
            print(f"step {done}: held-out PSNR {small:.2f} dB at {cfg.size} px, {large:.2f} dB at {4 * cfg.size} px")
            recon_picture(pairs).save(out / "recon.png")
            save(done)
            if stop:
                print(f"stopped by SIGTERM, saved at step {done}: run the same command to go on")
                return
    with ema.swapped():
        export(ae, out / "final", device, cfg)


@torch.no_grad()
def export(ae, path, device, cfg, n=256):
    """Measures the latents' shift and scale over n pictures (a frozen encoder has its own), and writes fp16 weights."""
    if not cfg.encoder:
        draw = pictures_of(cfg)
        z = torch.cat([ae.moments(to_tensor(draw(i, cfg.size)[None]).to(device))[0] for i in range(n)])
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
