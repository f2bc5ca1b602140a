"""The forms of our networks that Apple's Neural Engine likes: the same weights, the same numbers,
other shapes. For export alone.

The training forms (model.py, decoder.py, text.py) are written for reading and for GPUs. The Neural
Engine wants (Apple, "Deploying Transformers on the Apple Neural Engine", 2022, and the authoring
rules of apple/coreai-models, 2026):
    channels on axis 1, tokens on the last:  (1, C, 1, N), never (B, N, C); rank 4 at most
    1x1 convolutions:                        not nn.Linear
    attention head by head:                  small einsums, softmax over axis 1 (the keys)
    norms over the channel axis:             scaled, since fp16 squares overflow;
                                             no reshaping of large tensors
    constants for all that is fixed:         rotary tables, group averages
Each class takes its sibling and shares its parameters; tests hold the two equal to 1e-5. Sizes come
from the config as Python ints, never from x.shape, so that the traced graph is static.

C channels | H W latent rows, columns | N = H * W image tokens | L text tokens | D width of a head
h query heads | G key/value heads | the batch is always 1
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from decoder import TinyBlock
from model import rope_table

MASKED = -1e4    # added to a padding token's score: exp() of it is 0 in fp16 too, where -inf is NaN


def column(v):
    """(C,) -> (1, C, 1, 1)"""
    return v[None, :, None, None]


def pointwise(x, linear):
    """nn.Linear as a 1x1 convolution: (1, C, ...) -> (1, C', ...)."""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


# ------------------------------------------------------------------------------------------ norms
class ScaledNorm(nn.Module):
    """A norm that squares S * x instead of x, with S a power of two, which changes no digit.

    fp16 ends at 65504 and the Neural Engine's convolutions at 32768. calibrate() sets S so that the
    largest S * x that it sees is between 16 and 32: squares up to 1024, room for 5 times as much.
    """
    S = 0.25
    largest = None    # a number while calibrate() looks

    def scaled(self, x):
        if self.largest is not None:
            self.largest = max(self.largest, x.abs().max().item())
        return x * self.S


@torch.no_grad()
def calibrate(form, cases):
    """Runs the form on each case, {input name: tensor}, and sets S of each of its norms."""
    norms = [m for m in form.modules() if isinstance(m, ScaledNorm)]
    for norm in norms:
        norm.largest = 1e-3
    for case in cases:
        form(**case)
    for norm in norms:
        norm.S = 2.0 ** math.floor(math.log2(32 / norm.largest))
        norm.largest = None


class AneRMSNorm(ScaledNorm):
    """Divides by the root of the mean square over one axis."""

    def __init__(self, dim, eps):
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x):
        y = self.scaled(x)
        return y * torch.rsqrt((y * y).mean(self.dim, keepdim=True) + self.eps * self.S ** 2)


class AneLayerNorm(nn.Module):
    """nn.LayerNorm for (1, C, 1, N), over C: the RMSNorm of x minus its mean."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.rms = AneRMSNorm(1, norm.eps)

    def forward(self, x):
        y = self.rms(x - x.mean(1, keepdim=True))
        return y * column(self.norm.weight) + column(self.norm.bias)


class AneGroupNorm(ScaledNorm):
    """nn.GroupNorm, which reshapes to rank 5, without reshaping a large tensor: statistics of each
    channel, then a tiny constant convolution from channels to groups, and another back."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        g, C = norm.num_groups, norm.num_channels
        spread = torch.eye(g).repeat_interleave(C // g, 0)[:, :, None, None]      # (C, g, 1, 1)
        gather = spread.transpose(0, 1).contiguous() * (g / C)                    # (g, C, 1, 1)
        self.register_buffer("spread", spread, persistent=False)
        self.register_buffer("gather", gather, persistent=False)

    def group_means(self, x):
        """(1, C, H, W) -> (1, g, 1, 1)"""
        return F.conv2d(x.mean((2, 3), keepdim=True), self.gather)

    def forward(self, x):
        y = self.scaled(x - F.conv2d(self.group_means(x), self.spread))           # (1, C, H, W)
        r = torch.rsqrt(self.group_means(y * y) + self.norm.eps * self.S ** 2)    # (1, g, 1, 1)
        gain = F.conv2d(r, self.spread) * column(self.norm.weight)                # (1, C, 1, 1)
        return y * gain + column(self.norm.bias)


# -------------------------------------------------------------------------------------- attention
class SplitAttention(nn.Module):
    """softmax(k q) v, head by head: q (1, h*D, 1, N), k and v (1, G*D, 1, L), bias (1, L, 1, 1) or
    None -> (1, h*D, 1, N). The scores of a head are (1, L, 1, N), small enough to stay on the chip
    ("split einsum" in apple/ml-stable-diffusion)."""

    def __init__(self, h, G, D):
        super().__init__()
        self.D = D
        self.repeat = h // G            # query heads that share keys and values
        scale = torch.tensor(D ** -0.5)
        self.register_buffer("scale", scale, persistent=False)    # so that rounding reaches it

    def forward(self, q, k, v, bias=None):
        keys = [x.transpose(1, 3) for x in (k * self.scale).split(self.D, 1)]    # G of (1, L, 1, D)
        values = v.split(self.D, 1)                                              # G of (1, D, 1, L)
        out = []
        for i, head in enumerate(q.split(self.D, 1)):                             # (1, D, 1, N)
            shared = i // self.repeat
            w = torch.einsum("bchq,bkhc->bkhq", head, keys[shared])               # (1, L, 1, N)
            if bias is not None:
                w = w + bias
            w = w.softmax(1)
            out.append(torch.einsum("bkhq,bchk->bchq", w, values[shared]))        # (1, D, 1, N)
        return torch.cat(out, 1)


# ------------------------------------------------------------------------------------------- UNet
class AneResBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block
        self.norm1 = AneGroupNorm(block.norm1)
        self.norm2 = AneGroupNorm(block.norm2)

    def forward(self, x, temb):                                     # temb is activated already
        b = self.block
        h = b.conv1(b.act(self.norm1(x))) + pointwise(temb, b.time)              # (1, hidden, H, W)
        return b.shortcut(x) + b.conv2(b.act(self.norm2(h)))                     # (1, C_out, H, W)


class AneAttention(nn.Module):
    """Self- or cross-attention between N queries and L keys."""

    def __init__(self, attention, N, L):
        super().__init__()
        self.attention = attention
        self.h, self.G = attention.q.out_features // attention.D, attention.G
        self.N, self.L = N, L
        self.attend = SplitAttention(self.h, self.G, attention.D)
        self.q_norm = AneRMSNorm(2, 1e-6)
        self.k_norm = AneRMSNorm(2, 1e-6)

    def heads(self, x, heads, N, norm, rms, rope):
        """RMSNorm and rotary positions of each head, on a view that leaves the last axis alone."""
        D = self.attention.D
        normed = not isinstance(norm, nn.Identity)
        if not normed and rope is None:
            return x
        x = x.reshape(1, heads, D, N)
        if normed:
            x = rms(x) * norm.weight[None, None, :, None]
        if rope is not None:
            cos, sin = rope                                         # (1, 1, D/2, N) each
            a, b = x.chunk(2, 2)
            x = torch.cat([a * cos - b * sin, b * cos + a * sin], 2)
        return x.reshape(1, heads * D, 1, N)

    def forward(self, x, context, bias=None, rope=None):            # (1, C, 1, N), (1, C', 1, L)
        a = self.attention
        k, v = pointwise(context, a.kv).split(self.G * a.D, 1)      # (1, G*D, 1, L) each
        q = self.heads(pointwise(x, a.q), self.h, self.N, a.q_norm, self.q_norm, rope)
        k = self.heads(k, self.G, self.L, a.k_norm, self.k_norm, rope)
        return pointwise(self.attend(q, k, v, bias), a.out)         # (1, C, 1, N)


class AneTransformerBlock(nn.Module):
    def __init__(self, block, N, L):
        super().__init__()
        self.block = block
        self.self_attn = None
        if block.self_attn is not None:
            self.self_attn = AneAttention(block.self_attn, N, N)
            self.norm1 = AneLayerNorm(block.norm1)
        self.cross_attn = AneAttention(block.cross_attn, N, L)
        self.norm2 = AneLayerNorm(block.norm2)
        self.norm3 = AneLayerNorm(block.norm3)

    def forward(self, x, context, bias, rope):                      # (1, C, 1, N)
        if self.self_attn is not None:
            y = self.norm1(x)
            x = x + self.self_attn(y, y, rope=rope)
        x = x + self.cross_attn(self.norm2(x), context, bias)
        ff = self.block.ff
        value, gate = pointwise(self.norm3(x), ff.up).chunk(2, 1)
        return x + pointwise(value * F.gelu(gate), ff.out)


class AneTransformer(nn.Module):
    def __init__(self, transformer, H, W, L):
        super().__init__()
        self.transformer = transformer
        self.norm = AneGroupNorm(transformer.norm)
        self.shape = (1, transformer.norm.num_channels, H, W)
        self.blocks = nn.ModuleList(AneTransformerBlock(b, H * W, L) for b in transformer.blocks)

    def forward(self, x, context, bias, rope):                      # (1, C, H, W)
        _, C, H, W = self.shape
        h = pointwise(self.norm(x), self.transformer.proj_in).reshape(1, C, 1, H * W)
        for block in self.blocks:
            h = block(h, context, bias, rope)
        return x + pointwise(h, self.transformer.proj_out).reshape(self.shape)


class AneLayer(nn.Module):
    def __init__(self, layer, H, W, L):
        super().__init__()
        self.res = AneResBlock(layer.res)
        self.transformer = None
        if layer.transformer is not None:
            self.transformer = AneTransformer(layer.transformer, H, W, L)

    def forward(self, x, temb, context, bias, rope):
        x = self.res(x, temb)
        if self.transformer is None:
            return x
        return self.transformer(x, context, bias, rope)


class AneUNet(nn.Module):
    """sample (1, C, H, W), timestep (1,) = 1000 t, encoder_hidden_states (1, D+1, 1, L) -> velocity
    (1, C, H, W): names and units of Apple's Swift package. The last channel of the states is the
    mask, 0 for a token and MASKED for padding, so that no fourth input is needed."""

    def __init__(self, unet, H, W, L):
        super().__init__()
        self.unet = unet
        self.act = unet.down[0][0].res.act
        cfg = unet.cfg
        last = len(unet.down) - 1
        half = cfg.time_freqs // 2
        freqs = torch.exp(-math.log(10000) / half * torch.arange(half))
        self.register_buffer("freqs", freqs, persistent=False)      # stays fp32
        for i, attends in enumerate(cfg.self_attn):
            if cfg.rope and attends:
                tables = rope_table(H >> i, W >> i, cfg.head_dim, cfg.rope, "cpu")
                for name, table in zip(("cos", "sin"), tables):     # (1, 1, D/2, N) each
                    table = table.permute(1, 2, 0)[None].contiguous()
                    self.register_buffer(f"{name}{i}", table, persistent=False)

        def stage(layers, i):
            return nn.ModuleList(AneLayer(layer, H >> i, W >> i, L) for layer in layers)
        self.down = nn.ModuleList(stage(layers, i) for i, layers in enumerate(unet.down))
        self.mid = stage(unet.mid, last)
        self.up = nn.ModuleList(stage(layers, last - j) for j, layers in enumerate(unet.up))
        self.norm_out = AneGroupNorm(unet.norm_out)

    def rope(self, i):
        """cos and sin of stage i, or None."""
        if not hasattr(self, f"cos{i}"):
            return None
        return self.get_buffer(f"cos{i}"), self.get_buffer(f"sin{i}")

    def embed_time(self, timestep, dtype):
        """(1,) -> (1, time_dim, 1, 1), activated: once for all blocks."""
        # Rank 2 marks the part that stays in fp32: in fp16 the angle at t = 999 is off by 0.4.
        angle = timestep[:, None] * self.freqs                      # (1, F/2)
        temb = torch.cat([angle.cos(), angle.sin()], -1)[:, :, None, None]
        if temb.dtype != dtype:
            temb = temb.to(dtype)
        time = self.unet.time
        return self.act(pointwise(F.silu(pointwise(temb, time[0])), time[2]))

    def forward(self, sample, timestep, encoder_hidden_states):
        u, cfg, last = self.unet, self.unet.cfg, len(self.unet.down) - 1
        context, bias = encoder_hidden_states.split([cfg.context_dim, 1], 1)
        bias = bias.transpose(1, 3)                                 # (1, L, 1, 1)
        temb = self.embed_time(timestep, sample.dtype)

        x = u.conv_in(sample)
        skips = []
        for i, layers in enumerate(self.down):
            if i > 0:
                x = u.downsample[i - 1](x)                          # (1, C, H/2, W/2)
            outs = [x]
            for layer in layers:
                outs.append(layer(outs[-1], temb, context, bias, self.rope(i)))
            if i < last or cfg.skip_lowest:
                skips += outs
            x = outs[-1]
        for layer in self.mid:
            x = layer(x, temb, context, bias, self.rope(last))
        for j, layers in enumerate(self.up):
            for layer in layers:
                if j > 0 or cfg.skip_lowest:
                    x = torch.cat([x, skips.pop()], 1)
                x = layer(x, temb, context, bias, self.rope(last - j))
            if j < last:                                            # (1, C, 2H, 2W)
                x = u.upsample[j](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return u.conv_out(self.act(self.norm_out(x)))


# ----------------------------------------------------------------------------------- tiny decoder
class AneTinyBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.body = ane_form(block.body)

    def forward(self, x):
        return x + self.body(x)


def ane_form(module):
    """The decoder is a Sequential of convolutions: only its norms change."""
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*map(ane_form, module))
    if isinstance(module, nn.GroupNorm):
        return AneGroupNorm(module)
    if isinstance(module, TinyBlock):
        return AneTinyBlock(module)
    return module


class AneDecoder(nn.Module):
    """z, normalised latents (1, C, h, w) -> image (1, 3, 8h, 8w), about [-1, 1].

    Scale and shift are inside. They are not folded into the first convolution, whose zero padding
    would be wrong at the border; on the smallest tensor they cost nothing.
    """

    def __init__(self, ae):
        super().__init__()
        self.body = ane_form(ae.decoder)
        self.register_buffer("unscale", torch.tensor(1 / ae.cfg.scale), persistent=False)
        self.register_buffer("shift", torch.tensor(ae.cfg.shift), persistent=False)

    def forward(self, z):
        return self.body(z * self.unscale + self.shift)


# ----------------------------------------------------------------------------------- text encoder
class AneTextEncoder(nn.Module):
    """input_ids (1, L) in fp32, padded with <pad> -> last_hidden_state (1, L, D+1): the states, and
    as last channel the mask as AneUNet reads it."""

    def __init__(self, text):
        super().__init__()
        self.text = text
        cfg = text.cfg
        self.L = cfg.max_tokens
        self.pad = cfg.vocabulary - 1
        self.attend = SplitAttention(cfg.heads, cfg.heads, cfg.width // cfg.heads)
        self.norm1 = nn.ModuleList(AneLayerNorm(b.norm1) for b in text.blocks)
        self.norm2 = nn.ModuleList(AneLayerNorm(b.norm2) for b in text.blocks)
        self.norm = AneLayerNorm(text.norm)

    def forward(self, input_ids):
        t = self.text
        padding = (input_ids == self.pad).to(t.norm.weight.dtype)
        bias = (padding * MASKED).reshape(1, self.L, 1, 1)
        x = F.embedding(input_ids.int(), t.token.weight) + t.position.weight      # (1, L, D)
        x = x.transpose(1, 2)[:, :, None]                                         # (1, D, 1, L)
        for block, norm1, norm2 in zip(t.blocks, self.norm1, self.norm2):
            q, k, v = pointwise(norm1(x), block.qkv).chunk(3, 1)                  # (1, D, 1, L)
            x = x + pointwise(self.attend(q, k, v, bias), block.out)
            x = x + pointwise(F.gelu(pointwise(norm2(x), block.up)), block.down)
        x = torch.cat([self.norm(x), bias.reshape(1, 1, 1, self.L)], 1)           # (1, D+1, 1, L)
        return x.squeeze(2).transpose(1, 2)
