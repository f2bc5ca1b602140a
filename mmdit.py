"""The teacher: SD3.5's MMDiT (Esser et al. 2024) in plain PyTorch. Text and image are two streams with weights of their own that attend jointly.

Modules bear diffusers' names, so that `stabilityai/stable-diffusion-3.5-large` (and -medium, and -large-turbo) load as they are; small configs train
from scratch on scenes (train.py, arch = "mmdit").

B batch | C latent channels | H W latent rows, columns | N = (H/2)(W/2) image tokens | L text tokens | D width | M = N + L
"""
import json, math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint

from checkpoint import hub_folder
from common import UserError, attention


@dataclass
class MMDiTConfig:
    """The defaults are SD3.5-Large: 8.06 B parameters."""
    in_channels: int = 16
    patch: int = 2
    layers: int = 38
    heads: int = 38
    head_dim: int = 64
    context_dim: int = 4096         # of a text state: CLIP-L and CLIP-G padded, T5-XXL
    pooled_dim: int = 2048          # of a text's one vector
    base: int = 64                  # patches a side at which the position table has its unit step
    position_max: int = 192         # its side; smaller grids are cut from the middle
    qk_norm: bool = True
    dual: list[int] = field(default_factory=list)   # blocks with a second attention, over the image alone (SD3.5-Medium: 0 .. 12)
    checkpoint: bool = False        # recompute activations in the backward pass


MEDIUM = dict(layers=24, heads=24, position_max=384, dual=list(range(13)))   # SD3.5-Medium; SD3-Medium: no dual, no qk_norm, 192


class RMSNorm(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class Modulation(nn.Module):
    """n shifts, scales or gates of a block from the condition: (B, D) -> n of (B, 1, D)."""

    def __init__(self, D, n):
        super().__init__()
        self.n, self.linear = n, nn.Linear(D, n * D)

    def forward(self, condition):
        return self.linear(F.silu(condition))[:, None].chunk(self.n, -1)


class Attention(nn.Module):
    """Over image tokens, and over text tokens jointly where the text's projections are there. The last block answers to the image alone."""

    def __init__(self, cfg, text=True, text_out=True):
        super().__init__()
        D, d, self.heads = cfg.heads * cfg.head_dim, cfg.head_dim, cfg.heads
        norm = lambda: RMSNorm(d) if cfg.qk_norm else nn.Identity()
        self.to_q, self.to_k, self.to_v, self.to_out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), nn.ModuleList([nn.Linear(D, D)])
        self.norm_q, self.norm_k = norm(), norm()
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
            self.norm_added_q, self.norm_added_k = norm(), norm()
            self.to_add_out = nn.Linear(D, D) if text_out else None

    def forward(self, x, context=None, mask=None):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)              # (B, heads, tokens, d)
        q, k, v = self.norm_q(split(self.to_q(x))), self.norm_k(split(self.to_k(x))), split(self.to_v(x))
        if context is not None:
            q = torch.cat([q, self.norm_added_q(split(self.add_q_proj(context)))], 2)    # (B, heads, M, d)
            k = torch.cat([k, self.norm_added_k(split(self.add_k_proj(context)))], 2)
            v = torch.cat([v, split(self.add_v_proj(context))], 2)
        o = attention(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, M, D)
        N = x.shape[1]
        if context is None:
            return self.to_out[0](o)
        return self.to_out[0](o[:, :N]), (self.to_add_out(o[:, N:]) if self.to_add_out is not None else None)


class FeedForward(nn.Module):
    def __init__(self, D):
        super().__init__()
        first, last = nn.Module(), nn.Linear(4 * D, D)
        first.proj = nn.Linear(D, 4 * D)
        self.net = nn.ModuleList([first, nn.Identity(), last])                           # diffusers' names: net.0.proj, net.2

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg, dual: bool, last: bool):
        super().__init__()
        D = self.D = cfg.heads * cfg.head_dim
        self.dual, self.last = dual, last
        self.norm1, self.norm1_context = Modulation(D, 9 if dual else 6), Modulation(D, 2 if last else 6)
        self.attn = Attention(cfg, text_out=not last)
        if dual:
            self.attn2 = Attention(cfg, text=False)
        self.ff = FeedForward(D)
        if not last:
            self.ff_context = FeedForward(D)

    def forward(self, x, context, condition, mask):
        norm = lambda y: F.layer_norm(y, (self.D,), eps=1e-6)
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = self.norm1(condition)  # (B, 1, D) each
        if self.last:
            c_scale, c_shift = self.norm1_context(condition)                             # in this order here
        else:
            c_shift, c_scale, c_gate, c_shift_ff, c_scale_ff, c_gate_ff = self.norm1_context(condition)
        h = norm(x)
        a, c = self.attn(h * (1 + scale) + shift, norm(context) * (1 + c_scale) + c_shift, mask)
        x = x + gate * a
        if self.dual:
            shift2, scale2, gate2 = second
            x = x + gate2 * self.attn2(h * (1 + scale2) + shift2)
        x = x + gate_ff * self.ff(norm(x) * (1 + scale_ff) + shift_ff)                   # (B, N, D)
        if self.last:
            return x, None
        context = context + c_gate * c
        return x, context + c_gate_ff * self.ff_context(norm(context) * (1 + c_scale_ff) + c_shift_ff)   # (B, L, D)


def position_table(D, side, base):
    """(1, side^2, D): half of the channels for the column, half for the row; sines, then cosines (Vaswani et al. 2017). float64, then float32."""
    omega = 10000.0 ** (-torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    at = torch.arange(side, dtype=torch.float64) / (side / base)
    angle = at[:, None] * omega                                                          # (side, D/4)
    one = torch.cat([angle.sin(), angle.cos()], -1)                                      # (side, D/2)
    return torch.cat([one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)], -1).reshape(1, side * side, D).float()


def mlp(d_in, d_out):
    m = nn.Module()
    m.linear_1, m.linear_2 = nn.Linear(d_in, d_out), nn.Linear(d_out, d_out)
    return m


def sd3_config(folder: Path) -> MMDiTConfig:
    """From diffusers' config.json, in the folder or in its `transformer`."""
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    try:
        raw = json.loads((folder / "config.json").read_text())
        return MMDiTConfig(in_channels=raw["in_channels"], patch=raw["patch_size"], layers=raw["num_layers"], heads=raw["num_attention_heads"], head_dim=raw["attention_head_dim"],
                           context_dim=raw["joint_attention_dim"], pooled_dim=raw["pooled_projection_dim"], base=raw["sample_size"] // raw["patch_size"],
                           position_max=raw["pos_embed_max_size"], qk_norm=raw.get("qk_norm") == "rms_norm", dual=list(raw.get("dual_attention_layers") or []))
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{folder} has no config.json of an SD3 transformer ({e!r})")


class MMDiT(nn.Module):
    def __init__(self, cfg: MMDiTConfig):
        super().__init__()
        self.cfg, D, p = cfg, cfg.heads * cfg.head_dim, cfg.patch
        self.pos_embed = nn.Module()
        self.pos_embed.proj = nn.Conv2d(cfg.in_channels, D, p, p)
        self.pos_embed.register_buffer("pos_embed", position_table(D, cfg.position_max, cfg.base))
        self.time_text_embed = nn.Module()
        self.time_text_embed.timestep_embedder, self.time_text_embed.text_embedder = mlp(256, D), mlp(cfg.pooled_dim, D)
        self.context_embedder = nn.Linear(cfg.context_dim, D)
        self.transformer_blocks = nn.ModuleList(Block(cfg, i in cfg.dual, i == cfg.layers - 1) for i in range(cfg.layers))
        self.norm_out, self.proj_out = Modulation(D, 2), nn.Linear(D, p * p * cfg.in_channels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Linears and the patch projection normal with std fan_in**-0.5, biases 0; zero: all modulations (adaLN-Zero: each block starts as
        nothing) and proj_out."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
                nn.init.zeros_(m.bias)
        for m in (*[m.linear for m in self.modules() if isinstance(m, Modulation)], self.proj_out):
            nn.init.zeros_(m.weight)

    def condition(self, t, pooled):
        freqs = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device, dtype=torch.float32))
        angle = 1000 * t.float()[:, None] * freqs                                        # (B, 128)
        out = 0
        for m, x in ((self.time_text_embed.timestep_embedder, torch.cat([angle.cos(), angle.sin()], -1).to(pooled.dtype)), (self.time_text_embed.text_embedder, pooled)):
            out = out + m.linear_2(F.silu(m.linear_1(x)))
        return out                                                                       # (B, D)

    def forward(self, x, t, context, mask=None, features=(), pooled=None):
        """Latents x (B, C, H, W), time t (B,) in [0, 1] (1 is noise), text states (B, L, context_dim), mask (B, L) True for a real token (SD3 uses
        none), pooled (B, pooled_dim; None: the mean of the real tokens' states) -> velocity eps - x0 (B, C, H, W). With features, names out of
        block0 .., also {name: (B, D, H/2, W/2)}. ValueError for a grid that the position table does not hold."""
        cfg, p, (B, _, H, W) = self.cfg, self.cfg.patch, x.shape
        h, w, side = H // p, W // p, cfg.position_max
        if H % p or W % p or max(h, w) > side:
            raise ValueError(f"latent height and width must be multiples of {p}, {p * side} at most, got {H}x{W}")
        if pooled is None:
            weight = torch.ones_like(context[..., :1]) if mask is None else mask[..., None].to(context.dtype)
            pooled = (context * weight).sum(1) / weight.sum(1).clamp(min=1)
        if mask is not None:                                                             # image tokens are always seen
            mask = torch.cat([mask.new_ones(B, h * w), mask], 1)[:, None, None]          # (B, 1, 1, M)
        condition, context = self.condition(t, pooled), self.context_embedder(context)
        top, left = (side - h) // 2, (side - w) // 2
        table = self.pos_embed.pos_embed.view(side, side, -1)[top:top + h, left:left + w].flatten(0, 1)
        x, taps = self.pos_embed.proj(x).flatten(2).transpose(1, 2) + table.to(x.dtype), {}   # (B, N, D)
        for i, block in enumerate(self.transformer_blocks):
            if cfg.checkpoint and torch.is_grad_enabled():
                x, context = checkpoint(block, x, context, condition, mask, use_reentrant=False)
            else:
                x, context = block(x, context, condition, mask)
            if f"block{i}" in features:
                taps[f"block{i}"] = x.transpose(1, 2).unflatten(2, (h, w))               # (B, D, h, w)
        scale, shift = self.norm_out(condition)
        x = self.proj_out(F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift)   # (B, N, p*p*C)
        v = x.view(B, h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W)
        return (v, {name: taps[name] for name in features}) if features else v

    @classmethod
    def from_pretrained(cls, source, dtype=torch.bfloat16, device="cpu") -> "MMDiT":
        """From a directory in the hub's layout, or a hub id such as stabilityai/stable-diffusion-3.5-large (gated: log in first). Built on the meta
        device; the files are mapped, so memory holds the weights once. UserError names what is missing."""
        folder = hub_folder(source, "transformer")
        cfg = sd3_config(folder)
        with torch.device("meta"):
            net = cls(cfg)
        wanted = set(net.state_dict())
        try:
            for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
                with safe_open(file, framework="pt", device=str(device)) as f:
                    state = {k: f.get_tensor(k).to(dtype) for k in f.keys() if k in wanted}
                net.load_state_dict(state, strict=False, assign=True)
                wanted -= state.keys()
        except (SafetensorError, RuntimeError) as e:
            raise UserError(f"{file} is damaged or does not fit its config ({str(e).splitlines()[-1].strip()}): download it again")
        if wanted:
            raise UserError(f"{folder} lacks {len(wanted)} tensors, '{sorted(wanted)[0]}' first: the download is incomplete")
        return net.eval().requires_grad_(False)
