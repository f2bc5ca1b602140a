"""The teacher: SD3.5's MMDiT (Esser et al. 2024), in plain PyTorch.

Text and image are two streams with weights of their own that attend jointly. Modules bear the names
of diffusers, so that `stabilityai/stable-diffusion-3.5-large` (-medium, -large-turbo) loads as it
is; small configs train from scratch on scenes (train.py, arch = "mmdit").

B batch | C latent channels | H W latent rows, columns | p patch | h w = H/p, W/p | N = h * w
L text tokens | M = N + L | D width | d width of a head
"""
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from checkpoint import check_fit, hub_folder, hub_tensors, read_description
from common import UserError, attention, option

@dataclass
class MMDiTConfig:
    """The defaults are SD3.5-Large: 8.06 B parameters."""
    in_channels: int = option(16, low=1, high=1024)
    patch: int = option(2, low=1, high=64)
    layers: int = option(38, low=1, high=200)
    heads: int = option(38, low=1, high=256)
    head_dim: int = option(64, low=1, high=256)
    context_dim: int = option(4096, low=1, high=65536)  # of a text state: both CLIPs padded, T5-XXL
    pooled_dim: int = option(2048, low=1, high=65536)       # of a text's one vector
    base: int = option(64, low=1, high=4096)  # patches a side where a position's step is 1
    position_max: int = option(192, low=1, high=1024)      # side of the position table
    qk_norm: bool = True
    dual: list[int] = option([], low=0)         # blocks with a second attention, to the image alone
    checkpoint: bool = False                    # recompute activations in the backward pass

    def check(self):
        if self.heads * self.head_dim % 4:
            raise UserError("heads times head_dim must be a multiple of 4, for the position table")
        if any(block >= self.layers for block in self.dual):
            raise UserError(f"dual={self.dual} names blocks, but layers={self.layers}")

# SD3.5-Medium; SD3-Medium has no dual, no qk_norm, and a position_max of 192
MEDIUM = dict(layers=24, heads=24, position_max=384, dual=list(range(13)))

class HeadNorm(nn.Module):
    """RMSNorm of queries and keys, rounded as diffusers rounds it: before the gain."""
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight

class Modulation(nn.Module):
    """Shifts, scales and gates of a block from the condition: (B, D) -> n of (B, 1, D)."""
    def __init__(self, D, n):
        super().__init__()
        self.n, self.linear = n, nn.Linear(D, n * D)

    def forward(self, condition):
        return self.linear(F.silu(condition))[:, None].chunk(self.n, -1)

class JointAttention(nn.Module):
    """Attention of image tokens, jointly with text tokens where `text`. Without `text_out` (in the
    last block) only the image gets an answer."""
    def __init__(self, cfg: MMDiTConfig, text=True, text_out=True):
        super().__init__()
        D = cfg.heads * cfg.head_dim
        norm = HeadNorm if cfg.qk_norm else nn.Identity
        self.heads = cfg.heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(D, D)])
        self.norm_q, self.norm_k = (norm(cfg.head_dim) for _ in range(2))
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(D, D) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (norm(cfg.head_dim) for _ in range(2))
            self.to_add_out = nn.Linear(D, D) if text_out else None

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)            # (B, heads, tokens, d)

    def forward(self, x, context=None, mask=None):
        """Image tokens (B, N, D), text tokens (B, L, D) -> the same, or the image's alone."""
        N = x.shape[1]
        q = self.norm_q(self.split(self.to_q(x)))                           # (B, heads, N, d)
        k = self.norm_k(self.split(self.to_k(x)))
        v = self.split(self.to_v(x))
        if context is not None:                                             # (B, heads, M, d) each
            q = torch.cat([q, self.norm_added_q(self.split(self.add_q_proj(context)))], 2)
            k = torch.cat([k, self.norm_added_k(self.split(self.add_k_proj(context)))], 2)
            v = torch.cat([v, self.split(self.add_v_proj(context))], 2)
        o = attention(q, k, v, mask).transpose(1, 2).flatten(2)             # (B, M, D)
        if context is None:
            return self.to_out[0](o)
        text = None if self.to_add_out is None else self.to_add_out(o[:, N:])
        return self.to_out[0](o[:, :N]), text

def feed_forward(D):
    """A Linear, GELU, a Linear; as in diffusers these are net.0.proj and net.2."""
    first = nn.Sequential(OrderedDict(proj=nn.Linear(D, 4 * D), act=nn.GELU("tanh")))
    net = nn.Sequential(first, nn.Identity(), nn.Linear(4 * D, D))
    return nn.Sequential(OrderedDict(net=net))

class JointBlock(nn.Module):
    def __init__(self, cfg: MMDiTConfig, dual: bool, last: bool):
        super().__init__()
        D = cfg.heads * cfg.head_dim
        self.dual, self.last = dual, last
        self.norm1 = Modulation(D, 9 if dual else 6)
        self.norm1_context = Modulation(D, 2 if last else 6)
        self.attn = JointAttention(cfg, text_out=not last)
        if dual:
            self.attn2 = JointAttention(cfg, text=False)
        self.ff = feed_forward(D)
        if not last:
            self.ff_context = feed_forward(D)

    def forward(self, x, context, condition, mask):
        """Image and text tokens (B, N, D), (B, L, D) -> the same; the last block gives no text."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(condition)
        c_shift, c_scale, *c_rest = self.norm1_context(condition)           # (B, 1, D) each
        if self.last:
            c_shift, c_scale = c_scale, c_shift                             # SD3 swaps them here
        h = layer_norm(x)
        h_text = layer_norm(context) * (1 + c_scale) + c_shift
        a, c = self.attn(h * (1 + scale) + shift, h_text, mask)
        x = x + gate * a
        if self.dual:
            shift2, scale2, gate2 = second
            x = x + gate2 * self.attn2(h * (1 + scale2) + shift2)
        x = x + gate_ff * self.ff(layer_norm(x) * (1 + scale_ff) + shift_ff)    # (B, N, D)
        if self.last:
            return x, None
        c_gate, c_shift_ff, c_scale_ff, c_gate_ff = c_rest
        context = context + c_gate * c
        h_text = layer_norm(context) * (1 + c_scale_ff) + c_shift_ff
        return x, context + c_gate_ff * self.ff_context(h_text)             # (B, L, D)

def layer_norm(x):
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6)

def position_table(D, side, base):
    """(1, side^2, D): sines, then cosines (Vaswani et al. 2017), of the column, then of the row."""
    omega = 10000.0 ** (-torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    at = torch.arange(side, dtype=torch.float64) / (side / base)
    angle = at[:, None] * omega                                             # (side, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], -1)                        # (side, D/2)
    columns, rows = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], -1).reshape(1, side * side, D).float()

def embedder(D_in, D_out):
    first, second = nn.Linear(D_in, D_out), nn.Linear(D_out, D_out)
    return nn.Sequential(OrderedDict(linear_1=first, act=nn.SiLU(), linear_2=second))

class MMDiT(nn.Module):
    def __init__(self, cfg: MMDiTConfig):
        super().__init__()
        cfg.check()
        self.cfg = cfg
        D, p = cfg.heads * cfg.head_dim, cfg.patch
        self.pos_embed = nn.Module()
        self.pos_embed.proj = nn.Conv2d(cfg.in_channels, D, p, p)
        self.pos_embed.register_buffer("pos_embed", position_table(D, cfg.position_max, cfg.base))
        self.time_text_embed = nn.Module()
        self.time_text_embed.timestep_embedder = embedder(256, D)
        self.time_text_embed.text_embedder = embedder(cfg.pooled_dim, D)
        self.context_embedder = nn.Linear(cfg.context_dim, D)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(cfg, i in cfg.dual, i == cfg.layers - 1) for i in range(cfg.layers))
        self.norm_out = Modulation(D, 2)
        self.proj_out = nn.Linear(D, p * p * cfg.in_channels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """All weights normal, std fan_in**-0.5; all biases 0. But proj_out and the modulations
        start at 0 (adaLN-Zero: each block starts as nothing)."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
                nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, Modulation):
                nn.init.zeros_(m.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    def condition(self, t, pooled):
        """Times (B,) and pooled text states (B, pooled_dim) -> (B, D)."""
        steps = torch.arange(128, device=t.device, dtype=torch.float32)
        angle = 1000 * t.float()[:, None] * torch.exp(-math.log(10000) / 128 * steps)
        sinusoids = torch.cat([angle.cos(), angle.sin()], -1).to(pooled.dtype)  # (B, 256)
        embed = self.time_text_embed
        return embed.timestep_embedder(sinusoids) + embed.text_embedder(pooled)

    def forward(self, x, t, context, mask=None, features=(), pooled=None):
        """Latents x (B, C, H, W), time t (B,) in [0, 1] (1 is noise), text states
        (B, L, context_dim), their mask (B, L), True for a real token (None: all are, as in SD3),
        pooled (B, pooled_dim; None: the mean of the real tokens' states) -> velocity (B, C, H, W).
        With features, names out of block0 .., also {name: (B, D, h, w)}."""
        B, _, H, W = x.shape
        p, side = self.cfg.patch, self.cfg.position_max
        h, w = H // p, W // p
        if H % p or W % p or max(h, w) > side:
            raise UserError(f"latent sides must be multiples of {p} up to {p * side}, not {H}x{W}")
        if pooled is None:
            real = torch.ones_like(context[..., 0]) if mask is None else mask.to(context.dtype)
            pooled = (context * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        if mask is not None:                                                # image is always seen
            mask = torch.cat([mask.new_ones(B, h * w), mask], 1)[:, None, None]     # (B, 1, 1, M)
        condition = self.condition(t, pooled)                               # (B, D)
        context = self.context_embedder(context)                            # (B, L, D)
        top, left = (side - h) // 2, (side - w) // 2    # a small grid takes the table's middle
        table = self.pos_embed.pos_embed.unflatten(1, (side, side))
        positions = table[:, top:top + h, left:left + w].flatten(1, 2).to(x.dtype)  # (1, N, D)
        x = self.pos_embed.proj(x).flatten(2).transpose(1, 2) + positions   # fp32 under autocast
        taps = {}
        for i, block in enumerate(self.transformer_blocks):
            if self.cfg.checkpoint and torch.is_grad_enabled():
                x, context = checkpoint(block, x, context, condition, mask, use_reentrant=False)
            else:
                x, context = block(x, context, condition, mask)
            if f"block{i}" in features:
                taps[f"block{i}"] = x.transpose(1, 2).unflatten(2, (h, w))  # (B, D, h, w)
        scale, shift = self.norm_out(condition)
        x = self.proj_out(layer_norm(x) * (1 + scale) + shift)              # (B, N, p*p*C)
        x = x.view(B, h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4)             # (B, C, h, p, w, p)
        v = x.reshape(B, -1, H, W)
        return (v, {name: taps[name] for name in features}) if features else v

    @classmethod
    def from_pretrained(cls, source, dtype=torch.bfloat16, device="cpu") -> "MMDiT":
        """A frozen one from a directory in the hub's layout, or hf:OWNER/NAME (gated: log in).
        Built on the meta device from mapped files, so that memory holds the weights once."""
        folder = hub_folder(source, "transformer")
        with torch.device("meta"):
            net = cls(sd3_config(folder))
        state = {k: v.to(device, dtype) for k, v in hub_tensors(folder).items()}
        shapes = [{k: v.shape for k, v in tensors.items()} for tensors in (net.state_dict(), state)]
        check_fit(*shapes, str(folder))
        net.load_state_dict(state, assign=True)
        return net.eval().requires_grad_(False)

def sd3_config(folder: Path) -> MMDiTConfig:
    """From diffusers' config.json, in the folder or in its `transformer`."""
    folder = hub_folder(folder, "transformer")
    raw = read_description(folder)
    kind = raw.get("_class_name")
    if kind != "SD3Transformer2DModel":
        raise UserError(f"{folder} holds a {kind}, not an SD3Transformer2DModel")
    return MMDiTConfig(
        in_channels=raw["in_channels"], patch=raw["patch_size"], layers=raw["num_layers"],
        heads=raw["num_attention_heads"], head_dim=raw["attention_head_dim"],
        context_dim=raw["joint_attention_dim"], pooled_dim=raw["pooled_projection_dim"],
        base=raw["sample_size"] // raw["patch_size"], qk_norm=raw.get("qk_norm") == "rms_norm",
        position_max=raw["pos_embed_max_size"], dual=list(raw.get("dual_attention_layers") or []))
