"""
The networks of nanoSnapGen: SnapGen's text-to-image UNet (arXiv 2412.09619, section 3.1), in plain PyTorch.

SnapGen starts from SDXL's UNet and walks down a ladder of ablations until 2.6 B parameters have become 0.38 B. Each rung
is one field of UNetConfig; LADDER below spells the rungs out, and `python model.py` prints what each of them costs.

B batch | C channels | H W latent rows, columns | N = H * W image tokens | L text tokens | D width of a head
G key/value heads (1 = multi-query attention) | R query heads that share one of them
"""
import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import attention

# ------------------------------------------------------------------------------------------------------------------
# Config

@dataclass
class UNetConfig:
    """The defaults are the final model. Lists run over the stages, high resolution first, but depth_up in the order of
    execution: lowest resolution first. Two stages or four work as well as the paper's three."""
    in_channels: int = 16           # latent channels (SD3's autoencoder)
    widths: list[int] = field(default_factory=lambda: [256, 512, 896])
    context_dim: int = 2304         # width of a text state: 2304 = CLIP-L + CLIP-G + Gemma-2-2B, 768 = CLIP-L alone
    depth_down: list[int] = field(default_factory=lambda: [2, 2, 4])   # transformer blocks after each residual block; 0 = no conditioning
    depth_mid: int = 4
    depth_up: list[int] = field(default_factory=lambda: [4, 2, 0])
    res_down: int = 2               # residual blocks of a down stage; an up stage has one more, which takes the skip of the stage's input
    self_attn: list[bool] = field(default_factory=lambda: [False, False, True])  # its cost is quadratic in N: only where N is small
    skip_lowest: bool = False       # does the lowest up stage concatenate encoder skips too, as SDXL's does?
    separable: bool = True          # 3x3 conv -> depthwise 3x3, pointwise 1x1
    expansion: int = 2              # hidden width of a residual block, in units of max(C_in, C_out); 0 = just C_out, as in SDXL
    ff_mult: int = 3                # hidden width of the feed-forward, in units of C
    head_dim: int = 64
    kv_heads: int = 1               # 1 = multi-query attention; 0 = as many as query heads
    qk_norm: bool = True            # RMSNorm on q and k
    rope: float = 100.0             # base of the 2D rotary embedding, 0 = none. 100 and not 10000: an axis has 8 to 32 positions, not 4096
    time_freqs: int = 256           # sinusoids of t
    time_dim: int = 1024            # width of the time embedding
    act: str = "silu"               # or "hardswish", which is cheaper on phones; SnapGen's choice is not public
    groups: int = 32                # of GroupNorm
    checkpoint: bool = False        # recompute activations in the backward pass: less memory, about 30 % slower

# The ablation ladder (paper.md, section 1). A row is all the changes down to it, applied to the row above.
LADDER = {
    "a":     dict(context_dim=768, depth_down=[0, 2, 4], self_attn=[False, True, True], skip_lowest=True, separable=False,
                  expansion=0, ff_mult=4, kv_heads=0, qk_norm=False, rope=0.0),      # SDXL's layout, thinner and shorter
    "b":     dict(self_attn=[False, False, True]),     # no self-attention at high resolution: FLOPs -17 %, and a better FID
    "c1":    dict(separable=True),                     # a third of the latency, but worse
    "c2":    dict(expansion=2),                        # the "universal inverted bottleneck" wins the loss back
    "d":     dict(ff_mult=3),
    "e":     dict(kv_heads=1),
    "f":     dict(depth_down=[2, 2, 4]),               # text from the first stage on
    "g":     dict(qk_norm=True, rope=100.0),           # stability
    "final": dict(skip_lowest=False),                  # the layout that has both published sizes
}
PRESETS, row = {}, UNetConfig()
for name, change in LADDER.items():
    PRESETS[name] = row = replace(row, **change)
PRESETS["imagenet"] = PRESETS["final"]                 # 372 M: class names through CLIP-L
PRESETS["t2i"] = replace(row, context_dim=2304)        # 379 M
PRESETS["sdxl"] = replace(PRESETS["a"], in_channels=4, widths=[320, 640, 1280], context_dim=2048, depth_down=[0, 2, 10], depth_mid=10,
                          depth_up=[10, 2, 0], time_freqs=320, time_dim=1280)    # SDXL without its pooled-text branch

# ------------------------------------------------------------------------------------------------------------------
# Residual block

def conv3x3(cfg, C_in, C_out, stride=1):
    """A 3x3 convolution, or its separable form: 9 C_in + C_in C_out weights for 9 C_in C_out."""
    if not cfg.separable:
        return nn.Conv2d(C_in, C_out, 3, stride, padding=1)
    return nn.Sequential(nn.Conv2d(C_in, C_in, 3, stride, padding=1, groups=C_in), nn.Conv2d(C_in, C_out, 1, bias=False))

class ResBlock(nn.Module):
    def __init__(self, cfg, C_in, C_out):
        super().__init__()
        hidden = cfg.expansion * max(C_in, C_out) or C_out
        self.act = getattr(F, cfg.act)
        self.norm1 = nn.GroupNorm(cfg.groups, C_in)
        self.conv1 = conv3x3(cfg, C_in, hidden)
        self.time = nn.Linear(cfg.time_dim, hidden)
        self.norm2 = nn.GroupNorm(cfg.groups, hidden)
        self.conv2 = conv3x3(cfg, hidden, C_out)
        self.shortcut = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()

    def forward(self, x, temb):
        h = self.conv1(self.act(self.norm1(x)))              # (B, hidden, H, W)
        h = h + self.time(self.act(temb))[:, :, None, None]  # a shift only, no scale
        h = self.conv2(self.act(self.norm2(h)))              # (B, C_out, H, W)
        return self.shortcut(x) + h

# ------------------------------------------------------------------------------------------------------------------
# Transformer

class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()  # the mean of squares is where half precision overflows
        return (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6) * self.weight).type_as(x)

def rope_table(H, W, D, base, device):
    """cos and sin of the angles of an HxW grid. A head's D/2 pairs of channels: the first half turn with the row, the others with
    the column. Cheap enough to build in each forward pass, so nothing is cached, and any H and W will do."""
    freqs = base ** -torch.linspace(0, 1, D // 4 + 1, device=device)[:-1]                # (D/4)
    rows = torch.arange(H, device=device)[:, None, None] * freqs                         # (H, 1, D/4)
    cols = torch.arange(W, device=device)[None, :, None] * freqs                         # (1, W, D/4)
    angle = torch.cat([rows.expand(H, W, -1), cols.expand(H, W, -1)], -1).view(H * W, 1, D // 2)  # (N, 1, D/2)
    return angle.cos(), angle.sin()

def rotate(x, rope):
    """Rotate-half form: channel i is paired with i + D/2, which needs a split and a concatenation, both at home on the Neural Engine."""
    cos, sin = rope
    a, b = x.chunk(2, -1)                                                                # (B, N, heads, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).type_as(x)              # (B, N, heads, D)

class Attention(nn.Module):
    """Self- or cross-attention with G key/value heads; G = 1 is multi-query attention."""
    def __init__(self, cfg, C, C_context):
        super().__init__()
        self.D, heads = cfg.head_dim, C // cfg.head_dim
        self.G = cfg.kv_heads or heads
        self.q = nn.Linear(C, C, bias=False)
        self.kv = nn.Linear(C_context, 2 * self.G * self.D, bias=False)
        self.out = nn.Linear(C, C)
        self.q_norm = RMSNorm(self.D) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.D) if cfg.qk_norm else nn.Identity()

    def keys_values(self, context):
        k, v = self.kv(context).unflatten(-1, (2, self.G, self.D)).unbind(2)             # (B, L, G, D) each
        return self.k_norm(k), v

    def forward(self, x, k, v, mask=None, rope=None):
        B, N, C = x.shape
        q = self.q_norm(self.q(x).unflatten(-1, (-1, self.D)))                           # (B, N, G*R, D)
        if rope is not None:  # after the norm, so that the norm's gains act on channels, not on positions
            q, k = rotate(q, rope), rotate(k, rope)
        # The R heads that share keys are folded into the sequence, as N*R queries. That is 1.3x faster than repeating the keys,
        # and with G = 1 or G = heads every line here is a view: nothing is copied.
        q = q.unflatten(2, (self.G, -1)).transpose(1, 2).flatten(2, 3)                   # (B, G, N*R, D)
        o = attention(q, k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.out(o.unflatten(2, (N, -1)).transpose(1, 2).reshape(B, N, C))        # (B, N, C)

class FeedForward(nn.Module):
    def __init__(self, cfg, C):
        super().__init__()
        self.up = nn.Linear(C, 2 * cfg.ff_mult * C)
        self.out = nn.Linear(cfg.ff_mult * C, C)

    def forward(self, x):
        value, gate = self.up(x).chunk(2, -1)                                            # (B, N, ff_mult*C) each
        return self.out(value * F.gelu(gate))                                            # (B, N, C); GEGLU, exact: faster than tanh on CPUs

class TransformerBlock(nn.Module):
    def __init__(self, cfg, C, self_attn):
        super().__init__()
        self.self_attn = Attention(cfg, C, C) if self_attn else None
        self.norm1 = nn.LayerNorm(C) if self_attn else None
        self.cross_attn, self.norm2 = Attention(cfg, C, cfg.context_dim), nn.LayerNorm(C)
        self.ff, self.norm3 = FeedForward(cfg, C), nn.LayerNorm(C)

    def forward(self, x, context, mask, rope):
        if self.self_attn is not None:
            h = self.norm1(x)
            x = x + self.self_attn(h, *self.self_attn.keys_values(h), rope=rope)
        k, v = context[self] if isinstance(context, dict) else self.cross_attn.keys_values(context)
        x = x + self.cross_attn(self.norm2(x), k, v, mask=mask)
        return x + self.ff(self.norm3(x))

class Transformer(nn.Module):
    def __init__(self, cfg, C, depth, self_attn):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.groups, C, eps=1e-6)
        self.proj_in = nn.Linear(C, C)
        self.blocks = nn.ModuleList(TransformerBlock(cfg, C, self_attn) for _ in range(depth))
        self.proj_out = nn.Linear(C, C)

    def forward(self, x, context, mask, rope):
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))                        # (B, N, C)
        for block in self.blocks:
            h = block(h, context, mask, rope)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])            # (B, C, H, W)

# ------------------------------------------------------------------------------------------------------------------
# UNet

class Layer(nn.Module):
    """What stages are made of: [ Res, Transformer ], or [ Res ] where depth is 0. The unit of gradient checkpointing."""
    def __init__(self, cfg, C_in, C_out, depth, self_attn):
        super().__init__()
        self.cfg = cfg
        self.res = ResBlock(cfg, C_in, C_out)
        self.transformer = Transformer(cfg, C_out, depth, self_attn) if depth else None

    def _forward(self, x, temb, context, mask, rope):
        x = self.res(x, temb)                                                            # (B, C_out, H, W)
        return x if self.transformer is None else self.transformer(x, context, mask, rope)

    def forward(self, *args):
        if self.cfg.checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, *args, use_reentrant=False)
        return self._forward(*args)

class UNet(nn.Module):
    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg, C, last = cfg, cfg.widths, len(cfg.widths) - 1
        if not len(C) == len(cfg.depth_down) == len(cfg.depth_up) == len(cfg.self_attn):
            raise ValueError("widths, depth_down, depth_up and self_attn need one entry per stage")
        if bad := [c for c in C if c % cfg.groups or c % cfg.head_dim]:
            raise ValueError(f"widths {bad} are not multiples of groups={cfg.groups} and head_dim={cfg.head_dim}")
        self.time = nn.Sequential(nn.Linear(cfg.time_freqs, cfg.time_dim), nn.SiLU(), nn.Linear(cfg.time_dim, cfg.time_dim))
        self.conv_in = nn.Conv2d(cfg.in_channels, C[0], 3, padding=1)

        self.down, self.downsample, skips = nn.ModuleList(), nn.ModuleList(), []  # skips: the widths that forward() will push
        for i in range(len(C)):
            C_in = C[max(i - 1, 0)]
            if i > 0:
                self.downsample.append(conv3x3(cfg, C_in, C_in, stride=2))
            self.down.append(nn.ModuleList(Layer(cfg, C[i] if j else C_in, C[i], cfg.depth_down[i], cfg.self_attn[i]) for j in range(cfg.res_down)))
            skips += [C_in] + [C[i]] * cfg.res_down if i < last or cfg.skip_lowest else []

        self.mid = nn.ModuleList(Layer(cfg, C[last], C[last], depth, cfg.self_attn[last]) for depth in (cfg.depth_mid, 0))

        self.up, self.upsample, C_in = nn.ModuleList(), nn.ModuleList(), C[last]
        for i, depth in zip(range(last, -1, -1), cfg.depth_up):
            stage = nn.ModuleList()
            for _ in range(cfg.res_down + 1):
                C_skip = skips.pop() if i < last or cfg.skip_lowest else 0
                stage.append(Layer(cfg, C_in + C_skip, C[i], depth, cfg.self_attn[i]))
                C_in = C[i]
            self.up.append(stage)
            if i > 0:
                self.upsample.append(conv3x3(cfg, C[i], C[i]))

        self.norm_out = nn.GroupNorm(cfg.groups, C[0])
        self.conv_out = nn.Conv2d(C[0], cfg.in_channels, 3, padding=1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """All initialisation:
        | weights                                             | start                     | why                                             |
        |-----------------------------------------------------|---------------------------|-------------------------------------------------|
        | every convolution and linear                        | normal, std fan_in**-0.5  | keeps the variance                              |
        | every bias                                          | 0                         |                                                 |
        | residual block's last conv, attention's and         | 0                         | each branch starts as nothing, so depth costs   |
        |   feed-forward's output                             |                           | no stability                                    |
        | a transformer's proj_out                            | normal, *not* zero        | zero as well, neither it nor the blocks' zero   |
        |                                                     |                           | outputs in front of it would ever get a gradient|
        | final conv                                          | 0                         | v = 0, the mean, is the best blind guess        |
        | norms                                               | 1 and 0                   | PyTorch's default                               |
        """
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, ResBlock):
                nn.init.zeros_((m.conv2[-1] if isinstance(m.conv2, nn.Sequential) else m.conv2).weight)
            elif isinstance(m, (Attention, FeedForward)):
                nn.init.zeros_(m.out.weight)
        nn.init.zeros_(self.conv_out.weight)

    def embed_time(self, t):
        """(B,) in [0, 1] -> (B, time_dim). The sinusoids in fp32: in fp16 those of t = 0.999 are off by 0.4."""
        half = self.cfg.time_freqs // 2
        freqs = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
        angle = 1000 * t.float()[:, None] * freqs                                        # (B, time_freqs/2)
        return self.time(torch.cat([angle.cos(), angle.sin()], -1).to(self.conv_in.weight.dtype))

    def keys_values(self, context):
        """Keys and values of the text states for every block, {block: (k, v)}: the same in all sampling steps, and taken by forward() in the states' place."""
        return {m: m.cross_attn.keys_values(context) for m in self.modules() if isinstance(m, TransformerBlock)}

    def forward(self, x, t, context, mask=None, features=()):
        """Latents x (B, C, H, W), time t (B,) in [0, 1] (1 is noise), text states context (B, L, context_dim), or what keys_values() made of them, and
        their mask (B, L), True for a real token (None: all are) -> velocity (B, C, H, W). With features, names out of down0.. mid up0.., the outputs of
        these stages come along as {name: (B, C, H, W)}: (velocity, dict)."""
        cfg, (H, W), last = self.cfg, x.shape[2:], len(self.down) - 1
        if H % 2 ** last or W % 2 ** last:
            raise ValueError(f"latent height and width must be multiples of {2 ** last} ({8 * 2 ** last} pixels), got {H}x{W}")
        temb, taps = self.embed_time(t), {}                                              # (B, time_dim)
        mask = None if mask is None else mask[:, None, None, :]                          # (B, 1, 1, L), for all heads and queries
        ropes = [rope_table(H >> i, W >> i, cfg.head_dim, cfg.rope, x.device) if cfg.rope and sa else None for i, sa in enumerate(cfg.self_attn)]

        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))                # (B, C0, H, W); so that tokens (B, N, C) are views, 2-6 % faster
        skips = []
        for i, stage in enumerate(self.down):
            x = self.downsample[i - 1](x) if i > 0 else x                                # (B, C, H/2, W/2)
            outs = [x]
            for layer in stage:
                outs.append(layer(outs[-1], temb, context, mask, ropes[i]))              # (B, C', H, W)
            skips += outs if i < last or cfg.skip_lowest else []
            x = taps[f"down{i}"] = outs[-1]

        for layer in self.mid:
            x = layer(x, temb, context, mask, ropes[last])
        taps["mid"] = x

        for j, stage in enumerate(self.up):
            for layer in stage:
                if j > 0 or cfg.skip_lowest:
                    x = torch.cat([x, skips.pop()], 1)                                   # (B, C + C_skip, H, W)
                x = layer(x, temb, context, mask, ropes[last - j])                       # (B, C', H, W)
            taps[f"up{j}"] = x
            if j < last:
                x = self.upsample[j](F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)

        v = self.conv_out(getattr(F, cfg.act)(self.norm_out(x)))                         # (B, in_channels, H, W)
        return (v, {name: taps[name] for name in features}) if features else v

    @staticmethod
    def from_pretrained(source):
        """A sibling's published UNet, DreamLite's, from a directory in the hub's layout (convert.py). Our own checkpoints: sample.load_model."""
        from convert import from_pretrained
        return from_pretrained(source)

# ------------------------------------------------------------------------------------------------------------------
# What it costs

def count_params(model):
    return sum(p.numel() for p in model.parameters())

def count_macs(cfg, latent_size, tokens=77):
    """Multiply-adds of one forward pass. On the meta device: it needs no memory, and on CPU tensors PyTorch counts attention as nothing."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        UNet(cfg)(torch.empty(1, cfg.in_channels, latent_size, latent_size), torch.empty(1), torch.empty(1, tokens, cfg.context_dim))
    return counter.get_total_flops() // 2

# Reconstructed from the published differences (paper.md, section 1): M parameters, GMACs at 256 and at 1024 px
SHEET = {"a": (634.1, 69.4, 1266.8), "b": (623.6, None, 1052.1), "c1": (474.9, None, 652.2), "c2": (532.5, None, 760.6), "d": (466.8, None, 669.2),
         "e": (393.4, None, 629.7), "final": (371.64, 39.1, 662.6), "imagenet": (371.64, 39.1, 662.6), "t2i": (379.11, None, None), "sdxl": (2562.22, None, None)}

if __name__ == "__main__":
    def cell(ours, sheet):
        return f"{ours:9.2f}" + (f" ({sheet:7.1f} {100 * (ours / sheet - 1):+6.2f} %)" if sheet else " " * 19)
    print(f"{'row':9}{'M parameters (sheet)':28}  {'GMACs 256 px (sheet)':28}  GMACs 1024 px (sheet)")
    for name, cfg in PRESETS.items():
        with torch.device("meta"):
            ours = count_params(UNet(cfg)) / 1e6, count_macs(cfg, 32) / 1e9, count_macs(cfg, 128) / 1e9
        print(f"{name:9}" + "  ".join(cell(o, s) for o, s in zip(ours, SHEET.get(name, (None,) * 3))))
