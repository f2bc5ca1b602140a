"""SnapGen's text-to-image UNet (arXiv 2412.09619, section 3.1), in plain PyTorch. And what is
trained, TextToLatents: a UNet or an MMDiT, with its text encoder.
From SDXL's UNet of 2.6 B parameters LADDER leads down to 0.38 B; `python model.py` prints how.

B batch | C channels | H W latent rows, columns | N = H * W image tokens | L text tokens
D width of a head | G key/value heads (1 = multi-query attention) | R query heads that share one
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from checkpoint import WithoutInit, check_file, load_checkpoint, load_into, resolve
from common import UserError, attention, fill, layout, option
from data import check_tables
from mmdit import MMDiT, MMDiTConfig
from text import (
    FIRST_PATTERN,
    Text,
    TextConfig,
    TextEncoder,
    Tokens,
    load_encoders,
    load_vocabulary,
    on_device,
)

@dataclass
class UNetConfig:
    """The final model. Lists run over the stages, high resolution first, but depth_up upwards."""
    in_channels: int = option(16, low=1, high=1024)        # latent channels (SD3's autoencoder)
    widths: list[int] = option([256, 512, 896], low=1, high=16384)
    context_dim: int = option(2304, low=1, high=65536)  # of a text state: both CLIPs, Gemma
    depth_down: list[int] = option([2, 2, 4], low=0, high=100)  # transformer blocks after each
    depth_mid: int = option(4, low=0, high=100)   # residual block; 0 = no text here
    depth_up: list[int] = option([4, 2, 0], low=0, high=100)
    res_down: int = option(2, low=1, high=100)  # residual blocks of a down stage; up: one more
    self_attn: list[bool] = option([False, False, True])    # costs N^2: only where N is small
    skip_lowest: bool = False                   # the lowest up stage gets skips too, as in SDXL
    separable: bool = True                      # 3x3 conv -> depthwise 3x3, pointwise 1x1
    expansion: int = option(2, low=0, high=64)  # hidden width / max(C_in, C_out); 0: C_out (SDXL)
    ff_mult: int = option(3, low=1, high=64)  # hidden width of the feed-forward, in units of C
    head_dim: int = option(64, low=2)
    kv_heads: int = option(1, low=0)            # 1 = multi-query attention; 0 = one a query head
    qk_norm: bool = True                        # RMSNorm on q and k
    rope: float = option(100.0, low=0)          # rotary base for axes of 8 to 32 cells; 0 = none
    time_freqs: int = option(256, low=2, high=65536)        # sinusoids of t
    time_dim: int = option(1024, low=1, high=65536)         # width of the time embedding
    act: str = option("silu", choices=("silu", "hardswish"))    # the latter is cheaper on phones
    groups: int = option(32, low=1)             # of GroupNorm
    checkpoint: bool = False                    # recompute activations: 30 % slower, less memory

    def check(self):
        stages = len(self.widths)
        if not stages == len(self.depth_down) == len(self.depth_up) == len(self.self_attn) > 0:
            raise UserError("widths, depth_down, depth_up and self_attn need one entry per stage")
        unit = math.lcm(self.groups, self.head_dim * (self.kv_heads or 1))
        if any(C % unit for C in self.widths):
            raise UserError(f"widths {self.widths} must be multiples of {unit} (groups, heads)")
        if self.time_freqs % 2 or (self.rope and self.head_dim % 4):
            raise UserError("time_freqs must be even, and with rope head_dim a multiple of 4")

# The ablation ladder (docs/PAPER.md, section 1). A row holds the changes to the row above it.
LADDER = {
    "a": dict(context_dim=768, depth_down=[0, 2, 4], self_attn=[False, True, True],
              skip_lowest=True, separable=False, expansion=0, ff_mult=4, kv_heads=0,
              qk_norm=False, rope=0.0),         # SDXL's layout, thinner and shorter
    "b": dict(self_attn=[False, False, True]),  # not at high resolution: FLOPs -17 %, better FID
    "c1": dict(separable=True),                 # a third of the latency, but worse
    "c2": dict(expansion=2),                    # the "universal inverted bottleneck" wins it back
    "d": dict(ff_mult=3),
    "e": dict(kv_heads=1),
    "f": dict(depth_down=[2, 2, 4]),            # text from the first stage on
    "g": dict(qk_norm=True, rope=100.0),        # stability
    "final": dict(skip_lowest=False),           # the layout that has both published sizes
}

PRESETS = {}
row = UNetConfig()
for name, change in LADDER.items():
    row = PRESETS[name] = replace(row, **change)
PRESETS["imagenet"] = row                           # 372 M: class names through CLIP-L
PRESETS["t2i"] = replace(row, context_dim=2304)     # 379 M
PRESETS["sdxl"] = replace(                          # SDXL without its pooled-text branch
    PRESETS["a"], in_channels=4, widths=[320, 640, 1280], context_dim=2048, depth_mid=10,
    depth_down=[0, 2, 10], depth_up=[10, 2, 0], time_freqs=320, time_dim=1280)

# ---------------------------------------------------------------------------- blocks
def conv3x3(cfg, C_in, C_out, stride=1):
    """A 3x3 convolution, or its separable form: 9 C_in + C_in C_out weights, not 9 C_in C_out."""
    if not cfg.separable:
        return nn.Conv2d(C_in, C_out, 3, stride, padding=1)
    depthwise = nn.Conv2d(C_in, C_in, 3, stride, padding=1, groups=C_in)
    return nn.Sequential(depthwise, nn.Conv2d(C_in, C_out, 1, bias=False))

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
        h = self.conv1(self.act(self.norm1(x)))                 # (B, hidden, H, W)
        h = h + self.time(self.act(temb))[:, :, None, None]     # a shift only, no scale
        h = self.conv2(self.act(self.norm2(h)))                 # (B, C_out, H, W)
        return self.shortcut(x) + h

class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()  # the mean of squares is where half precision overflows
        return (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6) * self.weight).type_as(x)

def rope_table(H, W, D, base, device):
    """cos and sin, (N, 1, D/2) each: half of a head's pairs turn by the row, half by the column."""
    freqs = base ** -torch.linspace(0, 1, D // 4 + 1, device=device)[:-1]       # (D/4)
    rows = torch.arange(H, device=device)[:, None, None] * freqs                # (H, 1, D/4)
    cols = torch.arange(W, device=device)[None, :, None] * freqs                # (1, W, D/4)
    angle = torch.cat([rows.expand(H, W, -1), cols.expand(H, W, -1)], -1)       # (H, W, D/2)
    return angle.cos().view(H * W, 1, -1), angle.sin().view(H * W, 1, -1)

def rotate(x, rope):
    """Pairs channel i with i + D/2: a split and a concatenation, which suit the Neural Engine."""
    cos, sin = rope
    a, b = x.chunk(2, -1)                                               # (B, N, heads, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).type_as(x)     # (B, N, heads, D)

class Attention(nn.Module):
    def __init__(self, cfg, C, C_context):
        super().__init__()
        self.D = cfg.head_dim
        self.G = cfg.kv_heads or C // cfg.head_dim
        self.q = nn.Linear(C, C, bias=False)
        self.kv = nn.Linear(C_context, 2 * self.G * self.D, bias=False)
        self.out = nn.Linear(C, C)
        self.q_norm = RMSNorm(self.D) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.D) if cfg.qk_norm else nn.Identity()

    def keys_values(self, context):
        k, v = self.kv(context).unflatten(-1, (2, self.G, self.D)).unbind(2)    # (B, L, G, D) each
        return self.k_norm(k), v

    def forward(self, x, k, v, mask=None, rope=None):
        B, N, C = x.shape
        q = self.q_norm(self.q(x).unflatten(-1, (-1, self.D)))                  # (B, N, G*R, D)
        if rope is not None:    # after the norm, whose gains act on channels, not on positions
            q, k = rotate(q, rope), rotate(k, rope)
        # The R heads that share keys are folded into the sequence, as N*R queries. That is 1.3x
        # faster than repeating the keys, and with G = 1 or G = heads every line here is a view.
        q = q.unflatten(2, (self.G, -1)).transpose(1, 2).flatten(2, 3)          # (B, G, N*R, D)
        o = attention(q, k.transpose(1, 2), v.transpose(1, 2), mask)            # (B, G, N*R, D)
        return self.out(o.unflatten(2, (N, -1)).transpose(1, 2).reshape(B, N, C))

class FeedForward(nn.Module):
    def __init__(self, cfg, C):
        super().__init__()
        self.up = nn.Linear(C, 2 * cfg.ff_mult * C)
        self.out = nn.Linear(cfg.ff_mult * C, C)

    def forward(self, x):
        value, gate = self.up(x).chunk(2, -1)           # (B, N, ff_mult*C) each
        return self.out(value * F.gelu(gate))           # GEGLU, exact: faster than tanh on CPUs

class TransformerBlock(nn.Module):
    def __init__(self, cfg, C, self_attn):
        super().__init__()
        self.self_attn = Attention(cfg, C, C) if self_attn else None
        self.norm1 = nn.LayerNorm(C) if self_attn else None
        self.cross_attn = Attention(cfg, C, cfg.context_dim)
        self.norm2 = nn.LayerNorm(C)
        self.ff = FeedForward(cfg, C)
        self.norm3 = nn.LayerNorm(C)

    def forward(self, x, context, mask, rope):
        if self.self_attn is not None:
            h = self.norm1(x)                                                   # (B, N, C)
            x = x + self.self_attn(h, *self.self_attn.keys_values(h), rope=rope)
        given = isinstance(context, dict)                                       # UNet.keys_values
        k, v = context[self] if given else self.cross_attn.keys_values(context)
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
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))               # (B, N, C)
        for block in self.blocks:
            h = block(h, context, mask, rope)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])   # (B, C, H, W)

# ---------------------------------------------------------------------------- the UNet
class Layer(nn.Module):
    """[ Res, Transformer ], or [ Res ] where depth is 0. The unit of gradient checkpointing."""
    def __init__(self, cfg, C_in, C_out, depth, self_attn):
        super().__init__()
        self.cfg = cfg
        self.res = ResBlock(cfg, C_in, C_out)
        self.transformer = Transformer(cfg, C_out, depth, self_attn) if depth else None

    def _forward(self, x, temb, context, mask, rope):
        x = self.res(x, temb)                                                   # (B, C_out, H, W)
        return x if self.transformer is None else self.transformer(x, context, mask, rope)

    def forward(self, *args):
        if self.cfg.checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, *args, use_reentrant=False)
        return self._forward(*args)

class UNet(nn.Module):
    def __init__(self, cfg: UNetConfig):
        super().__init__()
        cfg.check()
        self.cfg, C, T, last = cfg, cfg.widths, cfg.time_dim, len(cfg.widths) - 1
        self.time = nn.Sequential(nn.Linear(cfg.time_freqs, T), nn.SiLU(), nn.Linear(T, T))
        self.conv_in = nn.Conv2d(cfg.in_channels, C[0], 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        C_in, skips = C[0], []          # skips: the widths that forward() will push
        for i, depth in enumerate(cfg.depth_down):
            if i > 0:
                self.downsample.append(conv3x3(cfg, C_in, C_in, stride=2))
            if i < last or cfg.skip_lowest:
                skips += [C_in] + [C[i]] * cfg.res_down
            self.down.append(nn.ModuleList())
            for _ in range(cfg.res_down):
                self.down[i].append(Layer(cfg, C_in, C[i], depth, cfg.self_attn[i]))
                C_in = C[i]
        self.mid = nn.ModuleList(
            Layer(cfg, C_in, C_in, depth, cfg.self_attn[last]) for depth in (cfg.depth_mid, 0))
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for i, depth in zip(range(last, -1, -1), cfg.depth_up, strict=True):
            stage = nn.ModuleList()
            for _ in range(cfg.res_down + 1):
                C_skip = skips.pop() if i < last or cfg.skip_lowest else 0
                stage.append(Layer(cfg, C_in + C_skip, C[i], depth, cfg.self_attn[i]))
                C_in = C[i]
            self.up.append(stage)
            if i > 0:
                self.upsample.append(conv3x3(cfg, C_in, C_in))
        self.norm_out = nn.GroupNorm(cfg.groups, C[0])
        self.conv_out = nn.Conv2d(C[0], cfg.in_channels, 3, padding=1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """All initialisation; norms keep PyTorch's.
        | convolutions, linears | normal, std fan_in**-0.5: the variance stays; biases 0           |
        | last of each branch   | 0: a branch starts as nothing, so that depth costs no stability  |
        | but a proj_out        | normal: if 0 too, no gradient would reach the zeros before it    |
        | final convolution     | 0: v = 0, the mean, is the best blind guess                      |
        """
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, ResBlock):
                last = m.conv2[-1] if isinstance(m.conv2, nn.Sequential) else m.conv2
                nn.init.zeros_(last.weight)
            elif isinstance(m, (Attention, FeedForward)):
                nn.init.zeros_(m.out.weight)
        nn.init.zeros_(self.conv_out.weight)

    def embed_time(self, t):
        """(B,) -> (B, time_dim). Sinusoids in fp32: in fp16 those of t = 0.999 are off by 0.4."""
        half = self.cfg.time_freqs // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float32)
        angle = 1000 * t.float()[:, None] * torch.exp(-math.log(10000) / half * steps)
        sinusoids = torch.cat([angle.cos(), angle.sin()], -1)                   # (B, time_freqs)
        return self.time(sinusoids.to(self.conv_in.weight.dtype))

    def keys_values(self, context):
        """{block: (k, v)} of text states, once for all sampling steps: forward() takes them too."""
        blocks = [m for m in self.modules() if isinstance(m, TransformerBlock)]
        return {block: block.cross_attn.keys_values(context) for block in blocks}

    def forward(self, x, t, context, mask=None, features=(), pooled=None):
        """Latents x (B, C, H, W), time t (B,) in [0, 1] (1: noise), text states (B, L, context_dim)
        or their keys_values(), mask (B, L), True for a real token (None: all) -> velocity
        (B, C, H, W). With features, names out of down0 .. mid up0 .., also {name: (B, C, H, W)}."""
        cfg, last, (H, W) = self.cfg, len(self.down) - 1, x.shape[2:]
        if H % 2**last or W % 2**last:
            raise UserError(f"latent sides must be multiples of {2**last}, got {H}x{W}")
        temb = self.embed_time(t)                                               # (B, time_dim)
        mask = None if mask is None else mask[:, None, None, :]                 # (B, 1, 1, L)
        ropes = [rope_table(H >> i, W >> i, cfg.head_dim, cfg.rope, x.device)
                 if cfg.rope and attends else None for i, attends in enumerate(cfg.self_attn)]

        # mostly channels_last, so that tokens (B, N, C) are views: 2 to 6 % faster
        x = self.conv_in(x.contiguous(memory_format=layout(x.device)))          # (B, C0, H, W)
        skips, taps = [], {}
        for i, stage in enumerate(self.down):
            if i > 0:
                x = self.downsample[i - 1](x)                                   # (B, C, H/2, W/2)
            outs = [x]
            for layer in stage:
                outs.append(layer(outs[-1], temb, context, mask, ropes[i]))     # (B, C', H, W)
            if i < last or cfg.skip_lowest:
                skips += outs
            x = taps[f"down{i}"] = outs[-1]

        for layer in self.mid:
            x = taps["mid"] = layer(x, temb, context, mask, ropes[last])

        for j, stage in enumerate(self.up):
            for layer in stage:
                if j > 0 or cfg.skip_lowest:
                    x = torch.cat([x, skips.pop()], 1)                          # (B, C+skip, H, W)
                x = layer(x, temb, context, mask, ropes[last - j])              # (B, C', H, W)
            taps[f"up{j}"] = x
            if j < last:
                x = self.upsample[j](F.interpolate(x, scale_factor=2.0))        # (B, C, 2H, 2W)
        v = self.conv_out(getattr(F, cfg.act)(self.norm_out(x)))                # (B, C, H, W)
        return (v, {name: taps[name] for name in features}) if features else v

# ---------------------------------------------------------------------------- what is trained
def make_network(cfg: UNetConfig | MMDiTConfig) -> UNet | MMDiT:
    return MMDiT(cfg) if isinstance(cfg, MMDiTConfig) else UNet(cfg)

def network_of(config: dict, where) -> UNetConfig | MMDiTConfig:
    """The network's config in a checkpoint's config.json; one without `arch` is a UNet's."""
    table = "mmdit" if config.get("arch") == "mmdit" else "model"
    if table not in config or "text" not in config:
        raise UserError(f"{where} is no text-to-picture model: config.json lacks {table} or text")
    own = MMDiTConfig() if table == "mmdit" else UNetConfig()
    return fill(own, config[table], str(where))

class TextToLatents(nn.Module):
    """The denoiser and our text encoder, or where text.kind is not "own" frozen encoders, loaded
    when needed. A text.vocabulary of 0 becomes the vocabulary's size, in `text_cfg` itself."""
    def __init__(self, cfg: UNetConfig | MMDiTConfig, text_cfg: TextConfig, vocabulary=None):
        super().__init__()
        own, width = text_cfg.kind == "own", text_cfg.width
        for key in ("context_dim", "pooled_dim") if own else ("context_dim",):
            if getattr(cfg, key, width) != width:
                raise UserError(f"{key}={getattr(cfg, key)} must equal text.width={width}")
        self.vocabulary = vocabulary or load_vocabulary(pattern=text_cfg.pattern)
        text_cfg.vocabulary = text_cfg.vocabulary or self.vocabulary.size
        if own and text_cfg.vocabulary != self.vocabulary.size:
            raise UserError(f"the vocabulary has {self.vocabulary.size} tokens, but "
                            f"text.vocabulary={text_cfg.vocabulary}: it is another model's")
        self.text_cfg = text_cfg
        self.text = TextEncoder(text_cfg) if own else None
        self.frozen = []                    # in a list, so that they are no part of the module
        self.add_module("mmdit" if isinstance(cfg, MMDiTConfig) else "unet", make_network(cfg))

    @property
    def denoiser(self) -> UNet | MMDiT:
        return self.mmdit if hasattr(self, "mmdit") else self.unet

    @property
    def device(self):
        return next(self.parameters()).device

    def files(self) -> dict[str, bytes]:
        """What a checkpoint holds beside the weights."""
        return {"captions.tiktoken": self.vocabulary.data} if self.text else {}

    def forward(self, x, t, text: Tokens | Text, features=()):
        if isinstance(text, Tokens):
            text = self.text(text)
        return self.denoiser(x, t, text.emb, text.mask, features=features, pooled=text.pooled)

    def encode(self, captions: list[str], cut=False) -> Text:
        """Text states of captions. UserError where one is too long; with `cut` it is shortened."""
        if self.text is not None:
            tokens = self.vocabulary.tokenize(captions, self.text_cfg.max_tokens, cut)
            return self.text(on_device(tokens, self.device))
        if not self.frozen:
            self.frozen.append(load_encoders(self.text_cfg, self.device))
        emb, mask, pooled = on_device(self.frozen[0].encode(captions), self.device)
        return Text(emb.float(), mask, None if pooled is None else pooled.float())

def load_model(path, device="cpu", ema=True) -> tuple[TextToLatents, dict]:
    """The averaged weights (raw where there are none, or without `ema`), in fp32, frozen; and
    config.json. UserError names what is missing, damaged, or of another vocabulary."""
    folder = resolve(path)
    config, state = load_checkpoint(folder, ("model", "ema"))
    check_tables(config, path)
    network = network_of(config, path)
    text_cfg = fill(TextConfig(pattern=FIRST_PATTERN), config["text"], str(path))
    file = folder / "captions.tiktoken"
    if file.exists() or file.name in config.get("crc32", {}):
        vocabulary = load_vocabulary(check_file(folder, config, file.name), text_cfg.pattern)
    else:
        vocabulary = load_vocabulary(pattern=text_cfg.pattern)
    tokens = state["model"].get("text.token.weight", range(vocabulary.size))
    if len(tokens) != vocabulary.size:
        raise UserError(f"{path} reads {len(tokens)} tokens, {vocabulary.source} has "
                        f"{vocabulary.size}: copy the captions.tiktoken that it was trained with "
                        f"into {folder}")
    with WithoutInit():
        net = TextToLatents(network, text_cfg, vocabulary)
    average = state.get("ema", {}) if ema else {}       # without buffers: they are not averaged
    load_into(net, {**state["model"], **average}, str(path))
    return net.float().to(device).eval().requires_grad_(False), config

# ---------------------------------------------------------------------------- what it costs
def count_params(model):
    return sum(p.numel() for p in model.parameters())

def count_macs(cfg, latent_size, tokens=77):
    """Multiply-adds of a UNet's forward pass. On CPU tensors PyTorch would not count attention."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        x = torch.empty(1, cfg.in_channels, latent_size, latent_size)
        UNet(cfg)(x, torch.empty(1), torch.empty(1, tokens, cfg.context_dim))
    return counter.get_total_flops() // 2

# docs/PAPER.md, section 1: M parameters, GMACs at 256 px and at 1024 px
SHEET = {
    "a": (634.1, 69.4, 1266.8), "b": (623.6, None, 1052.1), "c1": (474.9, None, 652.2),
    "c2": (532.5, None, 760.6), "d": (466.8, None, 669.2), "e": (393.4, None, 629.7),
    "final": (371.64, 39.1, 662.6), "imagenet": (371.64, 39.1, 662.6),
    "t2i": (379.11, None, None), "sdxl": (2562.22, None, None),
}

if __name__ == "__main__":
    print(f"{'row':9}{'M parameters (sheet)':30}{'GMACs 256 px (sheet)':30}GMACs 1024 px (sheet)")
    for name, cfg in PRESETS.items():
        with torch.device("meta"):
            params = count_params(UNet(cfg)) / 1e6
        counted = params, count_macs(cfg, 32) / 1e9, count_macs(cfg, 128) / 1e9
        line = f"{name:9}"
        for ours, sheet in zip(counted, SHEET.get(name, (None, None, None)), strict=True):
            beside = f" ({sheet:7.1f} {100 * (ours / sheet - 1):+6.2f} %)" if sheet else " " * 19
            line += f"{ours:9.2f}{beside}  "
        print(line[:-2])
