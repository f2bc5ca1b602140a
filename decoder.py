"""The autoencoder's networks: 16 channels at 1/8 of the resolution, as in SD3.

The encoder has SD3's layout and names, so that SD3's own weights fit. The decoder is SnapGen's tiny
one: 1.38 M parameters, where SD3's has 49.5 M (docs/PAPER.md, section 2). `python decoder.py`
prints their sizes; train_decoder.py trains them.

B batch | C channels | H W of the picture in pixels | h w = H/8, W/8
"""
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
from common import UserError, attention, autocast, fill, layout, option, use_bfloat16

@dataclass
class AutoencoderConfig:
    latent: int = option(16, low=1, high=1024)
    widths: list[int] = option([128, 256, 512, 512], low=1, high=8192)  # SD3's; scenes need less
    layers: int = option(2, low=1, high=100)  # residual blocks of a stage of the encoder
    attention: bool = True                      # in the encoder's middle
    # GroupNorms of narrow widths want few groups: a norm of one channel forgets the colour
    groups: int = option(32, low=1)             # of the encoder
    tiny_widths: list[int] = option([256, 256, 128, 64], low=1, high=8192)
    tiny_blocks: list[int] = option([2, 2, 2, 2], low=0, high=100)
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

def named(**layers):
    """One after the other, under diffusers' names."""
    return nn.Sequential(OrderedDict(layers))

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

def downsample(C):      # (B, C, H/2, W/2); SD3 pads right and below
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(C, C, 3, stride=2))

def upsample(C):        # (B, C, 2H, 2W)
    return named(resize=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(C, C, 3, padding=1))

class Middle(nn.Module):
    """Residual block, attention, residual block: the same in encoder and decoder."""
    def __init__(self, C, cfg):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(C, C, cfg.groups) for _ in range(2))
        self.attentions = nn.Sequential()
        if cfg.attention:
            self.attentions.append(AttentionBlock(C, cfg.groups))

    def forward(self, x):
        return self.resnets[1](self.attentions(self.resnets[0](x)))

def stages(widths, n, groups, name, resize):
    """`n` residual blocks of each width; `resize`, called `name`, between two widths."""
    out = nn.Sequential()
    for i, C in enumerate(widths):
        C_in = widths[max(i - 1, 0)]
        blocks = [ResnetBlock(C if j else C_in, C, groups) for j in range(n)]
        out.append(named(resnets=nn.Sequential(*blocks)))
        if i < len(widths) - 1:
            out[i].add_module(name, nn.Sequential(resize(C)))
    return out

class Encoder(nn.Sequential):
    """(B, 3, H, W) in [-1, 1] -> mean and log variance (B, 2*latent, h, w)."""
    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        W = cfg.widths
        self.conv_in = nn.Conv2d(3, W[0], 3, padding=1)             # (B, C0, H, W)
        self.down_blocks = stages(W, cfg.layers, cfg.groups, "downsamplers", downsample)
        self.mid_block = Middle(W[-1], cfg)                         # (B, C, h, w)
        self.conv_norm_out = nn.GroupNorm(cfg.groups, W[-1], eps=1e-6)
        self.act = nn.SiLU()
        self.conv_out = nn.Conv2d(W[-1], 2 * cfg.latent, 3, padding=1)

class SD3Decoder(nn.Sequential):
    """The reference: latents (B, latent, h, w) -> (B, 3, 8h, 8w)."""
    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        W = cfg.widths[::-1]
        self.conv_in = nn.Conv2d(cfg.latent, W[0], 3, padding=1)    # (B, C, h, w)
        self.mid_block = Middle(W[0], cfg)
        self.up_blocks = stages(W, cfg.layers + 1, cfg.groups, "upsamplers", upsample)
        self.conv_norm_out = nn.GroupNorm(cfg.groups, W[-1], eps=1e-6)  # (B, C0, H, W)
        self.act = nn.SiLU()
        self.conv_out = nn.Conv2d(W[-1], 3, 3, padding=1)

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
    """Latents (B, 16, h, w) -> (B, 3, 8h, 8w). 1,378,848 parameters; 1,378,400 without biases on
    the upsamplers' pointwise convolutions. No published fact decides between the two."""
    W = cfg.tiny_widths
    layers = [separable(cfg.latent, W[0], bias=False)]              # (B, C0, h, w)
    for i, (C, n) in enumerate(zip(W, cfg.tiny_blocks)):
        layers += [TinyBlock(C, cfg.tiny_groups) for _ in range(n)]
        if i < len(W) - 1:                                          # (B, C', 2h, 2w)
            layers += [nn.Upsample(scale_factor=2), separable(C, W[i + 1], bias=True)]
    layers += [nn.GroupNorm(cfg.tiny_groups, W[-1]), nn.SiLU()]
    return nn.Sequential(*layers, separable(W[-1], 3, bias=False))  # (B, 3, H, W)

class Autoencoder(nn.Module):
    def __init__(self, cfg: AutoencoderConfig):
        super().__init__()
        cfg.check()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = SD3Decoder(cfg) if cfg.decoder == "sd3" else tiny_decoder(cfg)
        for m in self.modules():
            if isinstance(m, nn.Conv2d) and m.weight.any():         # but not a block's zeros
                # unit gain: by PyTorch's default, a third, colour comes long after brightness
                nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def moments(self, images):
        return self.encoder(images).chunk(2, 1)         # mean, log variance: (B, latent, h, w) each

    def encode(self, images):
        """Pictures (B, 3, H, W) in [-1, 1] -> normalised latents (B, latent, h, w)."""
        H, W = images.shape[2:]
        if H % 8 or W % 8:
            raise UserError(f"picture height and width must be multiples of 8, got {H}x{W}")
        return (self.moments(images)[0] - self.cfg.shift) * self.cfg.scale

    def decode(self, latents):
        """Normalised latents (B, latent, h, w) -> pictures (B, 3, 8h, 8w), about [-1, 1]."""
        z = latents / self.cfg.scale + self.cfg.shift
        if not torch.is_grad_enabled():                             # a fourth faster on a CPU
            z = z.contiguous(memory_format=layout(z.device))
        return self.decoder(z)

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
    ae = ae.to(memory_format=layout(device))            # with bfloat16, 3.5 times faster on a CPU
    with autocast(device, use_bfloat16("auto", device)):
        return ae.encode(to_tensor(pictures).to(device)).half().contiguous().cpu()

def load_autoencoder(path="assets/ae", device="cpu") -> Autoencoder:
    """From our checkpoint, a directory with SD3's `vae` (or that), or `hf:` and a hub id; fp32,
    frozen."""
    if not str(path).startswith(checkpoint.HUB):
        path = checkpoint.resolve(path)
    folder = checkpoint.hub_folder(path, "vae")
    raw = checkpoint.read_description(folder)
    if raw.get("_class_name") == "AutoencoderKL":
        state = checkpoint.hub_tensors(folder)
        cfg = AutoencoderConfig(
            latent=raw["latent_channels"], widths=raw["block_out_channels"],
            layers=raw["layers_per_block"], attention=raw.get("mid_block_add_attention", True),
            groups=raw["norm_num_groups"], scale=raw["scaling_factor"],
            shift=raw.get("shift_factor") or 0.0, decoder="sd3")
    elif raw.get("autoencoder"):
        cfg = fill(AutoencoderConfig(), raw["autoencoder"], str(path))
        state = checkpoint.load_checkpoint(folder)[1]["model"]
    else:
        raise UserError(f"{path} is no finished autoencoder: that is in its run's final/")
    with checkpoint.WithoutInit():
        ae = Autoencoder(cfg)
    checkpoint.load_into(ae, state, str(path))
    return ae.float().to(device).eval().requires_grad_(False)

def autoencoder_of(config: dict, asked: str = "", device="cpu") -> Autoencoder:
    """The one that a checkpoint of this description learned with, if no other is asked for."""
    return load_autoencoder(asked or config.get("ae") or "assets/ae", device)

if __name__ == "__main__":
    for net in tiny_decoder, SD3Decoder, Encoder:
        size = sum(p.numel() for p in net(AutoencoderConfig()).parameters())
        print(f"{net.__name__:14}{size:12,} parameters")
