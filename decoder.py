"""The autoencoder's networks: 16 channels at 1/8 of the resolution, as in SD3.

The encoder has SD3's layout and names, so that SD3's own weights fit. The decoder is SnapGen's tiny
one: 1.38 M parameters, where SD3's has 49.5 M (docs/PAPER.md, section 2). train_decoder.py trains
both; `python decoder.py` prints their sizes.

B batch | C channels | H W of the picture in pixels | h w = H/8, W/8
"""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import hub_folder, hub_tensors, load_checkpoint, load_into, resolve
from common import UserError, attention, autocast, fill, friendly, option, use_bfloat16

@dataclass
class AutoencoderConfig:
    latent: int = option(16, low=1)
    widths: list[int] = option([128, 256, 512, 512], low=1)     # SD3's; scenes need far less
    layers: int = option(2, low=1)              # residual blocks of a stage of the encoder
    attention: bool = True                      # in the encoder's middle
    # GroupNorms of narrow widths want few groups: a norm of one channel forgets the colour
    groups: int = option(32, low=1)             # of the encoder
    tiny_widths: list[int] = option([256, 256, 128, 64], low=1)
    tiny_blocks: list[int] = option([2, 2, 2, 2], low=0)
    tiny_groups: int = option(8, low=1)         # of the tiny decoder
    scale: float = option(1.5305, above=0)      # z = (mean - shift) * scale has about unit
    shift: float = 0.0609                       # variance; the numbers are SD3's
    decoder: str = option("tiny", choices=("tiny", "sd3"))

    def check(self):
        if not len(self.widths) == len(self.tiny_widths) == len(self.tiny_blocks) == 4:
            raise UserError("widths, tiny_widths and tiny_blocks need 4 entries: 1/8 resolution")
        for key, groups in (("widths", self.groups), ("tiny_widths", self.tiny_groups)):
            if any(C % groups for C in getattr(self, key)):
                raise UserError(f"{key} {getattr(self, key)} are not multiples of {groups} groups")

# ---------------------------------------------------------------------------- SD3's networks
class ResnetBlock(nn.Module):
    def __init__(self, C_in, C_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, C_in, eps=1e-6)
        self.conv1 = nn.Conv2d(C_in, C_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, C_out, eps=1e-6)
        self.conv2 = nn.Conv2d(C_out, C_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)               # it starts as its shortcut

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                       # (B, C_out, H, W)
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))

class AttentionBlock(nn.Module):
    """One head over all positions."""
    def __init__(self, C, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, C, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(C, C) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(C, C)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, h*w, C)
        h = attention(self.to_q(h), self.to_k(h), self.to_v(h))
        h = self.to_out[0](h)[:, 0].transpose(1, 2)                 # (B, C, h*w)
        return x + h.unflatten(2, x.shape[2:])

class Downsample(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))        # SD3 pads right and below: (B, C, H/2, W/2)

class Upsample(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0))        # (B, C, 2H, 2W)

class Middle(nn.Module):
    """Residual block, attention, residual block: the same in encoder and decoder."""
    def __init__(self, C, cfg):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(C, C, cfg.groups) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(C, cfg.groups)] if cfg.attention else [])

    def forward(self, x):
        x = self.resnets[0](x)
        for block in self.attentions:
            x = block(x)
        return self.resnets[1](x)

def resnets(C_in, C_out, n, groups):
    return nn.ModuleList(ResnetBlock(C_out if j else C_in, C_out, groups) for j in range(n))

class Encoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> mean and log variance (B, 2*latent, h, w)."""
    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        W, last = cfg.widths, len(cfg.widths) - 1
        self.conv_in = nn.Conv2d(3, W[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, C in enumerate(W):
            stage = nn.Module()
            stage.resnets = resnets(W[max(i - 1, 0)], C, cfg.layers, cfg.groups)
            stage.downsamplers = nn.ModuleList([Downsample(C)] if i < last else [])
            self.down_blocks.append(stage)
        self.mid_block = Middle(W[-1], cfg)
        self.conv_norm_out = nn.GroupNorm(cfg.groups, W[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(W[-1], 2 * cfg.latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)                                         # (B, C0, H, W)
        for stage in self.down_blocks:
            for layer in (*stage.resnets, *stage.downsamplers):
                x = layer(x)                        # (B, C, H/2, W/2) after a downsampler
        x = self.conv_norm_out(self.mid_block(x))                   # (B, C, h, w)
        return self.conv_out(F.silu(x))                             # (B, 2*latent, h, w)

class SD3Decoder(nn.Module):
    """The reference: latents (B, latent, h, w) -> (B, 3, 8h, 8w). The encoder backwards, with one
    residual block more in a stage."""
    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        W, last = cfg.widths[::-1], len(cfg.widths) - 1
        self.conv_in = nn.Conv2d(cfg.latent, W[0], 3, padding=1)
        self.mid_block = Middle(W[0], cfg)
        self.up_blocks = nn.ModuleList()
        for i, C in enumerate(W):
            stage = nn.Module()
            stage.resnets = resnets(W[max(i - 1, 0)], C, cfg.layers + 1, cfg.groups)
            stage.upsamplers = nn.ModuleList([Upsample(C)] if i < last else [])
            self.up_blocks.append(stage)
        self.conv_norm_out = nn.GroupNorm(cfg.groups, W[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(W[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))                         # (B, C, h, w)
        for stage in self.up_blocks:
            for layer in (*stage.resnets, *stage.upsamplers):
                x = layer(x)                        # (B, C, 2h, 2w) after an upsampler
        return self.conv_out(F.silu(self.conv_norm_out(x)))         # (B, 3, H, W)

# ---------------------------------------------------------------------------- the tiny decoder
def separable(C_in, C_out, bias):
    depthwise = nn.Conv2d(C_in, C_in, 3, padding=1, groups=C_in)
    return nn.Sequential(depthwise, nn.Conv2d(C_in, C_out, 1, bias=bias))

class TinyBlock(nn.Module):
    """x + [ DW3x3 -> PW(C -> 2C) -> DW3x3 -> GN -> act -> PW(2C -> C) ]: one norm, which keeps the
    colours right, and no attention."""
    def __init__(self, C, groups):
        super().__init__()
        self.body = nn.Sequential(
            separable(C, 2 * C, bias=False),
            nn.Conv2d(2 * C, 2 * C, 3, padding=1, groups=2 * C),
            nn.GroupNorm(groups, 2 * C), nn.SiLU(),
            nn.Conv2d(2 * C, C, 1, bias=False),
        )
        nn.init.zeros_(self.body[-1].weight)

    def forward(self, x):
        return x + self.body(x)

def tiny_decoder(cfg: AutoencoderConfig) -> nn.Sequential:
    """Latents (B, 16, h, w) -> (B, 3, 8h, 8w). 1,378,848 parameters: biases on every depthwise
    convolution, on the pointwise ones of the three upsamplers, and nowhere else (1,378,400 without
    the upsamplers'). No published fact decides between the two."""
    W, layers = cfg.tiny_widths, []
    layers.append(separable(cfg.latent, W[0], bias=False))          # (B, C0, h, w)
    for i, (C, n) in enumerate(zip(W, cfg.tiny_blocks)):
        layers += [TinyBlock(C, cfg.tiny_groups) for _ in range(n)]
        if i < len(W) - 1:                                          # (B, C', 2h, 2w)
            layers += [nn.Upsample(scale_factor=2), separable(C, W[i + 1], bias=True)]
    layers += [nn.GroupNorm(cfg.tiny_groups, W[-1]), nn.SiLU()]
    layers.append(separable(W[-1], 3, bias=False))                  # (B, 3, H, W)
    return nn.Sequential(*layers)

# ---------------------------------------------------------------------------- the autoencoder
class Autoencoder(nn.Module):
    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        cfg.check()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = SD3Decoder(cfg) if cfg.decoder == "sd3" else tiny_decoder(cfg)
        for m in self.modules():
            if isinstance(m, nn.Conv2d) and m.weight.any():         # but not a block's zeros
                # Unit gain. PyTorch's default shrinks the signal by 3 at each convolution: colour
                # was then learned minutes after brightness
                nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def moments(self, images):
        return self.encoder(images).chunk(2, 1)         # mean, log variance: (B, latent, h, w) each

    def encode(self, images):
        """Pictures (B, 3, H, W) in [-1, 1] -> normalised latents (B, latent, h, w). ValueError
        unless H and W are multiples of 8."""
        H, W = images.shape[2:]
        if H % 8 or W % 8:
            raise ValueError(f"picture height and width must be multiples of 8, got {H}x{W}")
        return (self.moments(images)[0] - self.cfg.shift) * self.cfg.scale

    def decode(self, latents):
        """Normalised latents (B, latent, h, w) -> pictures (B, 3, 8h, 8w), about [-1, 1]."""
        z = latents / self.cfg.scale + self.cfg.shift
        if not torch.is_grad_enabled():                             # a fourth faster on a CPU
            z = z.contiguous(memory_format=torch.channels_last)
        return self.decoder(z)

# ---------------------------------------------------------------------------- pictures and latents
def to_tensor(pictures):
    """uint8 (B, H, W, 3), of numpy or torch -> float (B, 3, H, W) in [-1, 1]."""
    if isinstance(pictures, np.ndarray):
        pictures = torch.tensor(pictures)
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1

def to_pictures(images) -> list[np.ndarray]:
    """(B, 3, H, W) in [-1, 1] -> uint8 (H, W, 3) each."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    return list(levels.permute(0, 2, 3, 1).cpu().numpy())

@torch.inference_mode()
def encode_pictures(ae: Autoencoder, pictures, device):
    """uint8 (B, H, W, 3) -> normalised latents (B, latent, h, w) in fp16 on the CPU."""
    ae = ae.to(memory_format=torch.channels_last)       # with bfloat16, 3.5 times faster on a CPU
    with autocast(device, use_bfloat16("auto", device)):
        return ae.encode(to_tensor(pictures).to(device)).half().contiguous().cpu()

# ---------------------------------------------------------------------------- loading
def load_autoencoder(path="assets/ae", device="cpu") -> Autoencoder:
    """From a checkpoint of ours, a directory with SD3's `vae` (or that itself), or a hub id; in
    fp32, frozen. UserError names what is missing or damaged."""
    try:
        folder = resolve(path)
    except UserError:
        if not re.fullmatch(r"(?!runs/|assets/)[\w-]+/[\w.-]+", str(path)):
            raise
        folder = path                                               # a hub id
    get = ("`hf download stabilityai/stable-diffusion-3.5-large --include 'vae/*' --local-dir "
           f"{path}` (gated) downloads SD3's, 0.17 GB")
    folder = hub_folder(folder, "vae", get)
    file = folder / "config.json"
    if file.is_file() and '"AutoencoderKL"' in file.read_text(errors="replace"):
        cfg, state = sd3_autoencoder_config(file), hub_tensors(folder)
    else:
        config, weights = load_checkpoint(folder)
        if not config.get("autoencoder"):
            raise UserError(f"{path} is no finished autoencoder (its config.json has no "
                            "'autoencoder' table): one that is trained is in its run's final/")
        cfg = fill(AutoencoderConfig(), config["autoencoder"], str(path))
        state = weights["model"]
    ae = load_into(Autoencoder(cfg), state, str(path))
    return ae.float().to(device).eval().requires_grad_(False)

def sd3_autoencoder_config(file: Path) -> AutoencoderConfig:
    """From diffusers' config.json."""
    try:
        raw = json.loads(file.read_text())
        return AutoencoderConfig(
            latent=raw["latent_channels"], widths=raw["block_out_channels"],
            layers=raw["layers_per_block"], attention=raw.get("mid_block_add_attention", True),
            groups=raw["norm_num_groups"], scale=raw["scaling_factor"],
            shift=raw.get("shift_factor") or 0.0, decoder="sd3")
    except (KeyError, ValueError) as e:
        raise UserError(f"{file} is no whole config of an AutoencoderKL ({e!r}): download it "
                        "again") from None

if __name__ == "__main__":
    with friendly():
        if len(sys.argv) > 1:
            raise UserError("this prints sizes; `python train_decoder.py` trains the autoencoder")
        for net in tiny_decoder, SD3Decoder, Encoder:
            size = sum(p.numel() for p in net(AutoencoderConfig()).parameters())
            print(f"{net.__name__:14}{size:12,} parameters")
