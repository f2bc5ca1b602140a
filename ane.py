"""The forms of our networks that Apple's Neural Engine likes: the same weights, the same numbers, other shapes. For export alone.

The training forms (model.py, decoder.py, text.py) are written for reading and for GPUs. The Neural Engine wants (Apple, "Deploying Transformers
on the Apple Neural Engine", 2022, and the authoring rules of apple/coreai-models, 2026):
    channels on axis 1 and tokens on the last:  (1, C, 1, N), never (B, N, C), and rank 4 at most
    1x1 convolutions:                           not nn.Linear
    attention head by head:                     small einsums, softmax over axis 1 (the keys), optionally 512 queries at a time
    norms over the channel axis:                scaled, since fp16 squares overflow; no reshaping of large tensors
    constants for whatever a fixed size allows: rotary tables, group averages
Each class takes its sibling and shares its parameters; tests hold the two equal to 1e-5. Sizes come from the config as Python ints,
never from x.shape, so that the traced graph is static.

1 batch | C channels | H W latent rows, columns | N = H * W image tokens | L text tokens | D width of a head | h query heads | G key/value heads
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from decoder import TinyBlock
from model import rope_table

MASKED = -1e4           # added to the score of a padding token: exp() of it is 0 even in fp16, where -inf would make NaNs
ATTENTION = ("split", "split512", "matmul", "sdpa")


def column(v):
    return v[None, :, None, None]                                            # (C) -> (1, C, 1, 1)


def pointwise(x, linear):
    """nn.Linear as a 1x1 convolution: (1, C, ...) -> (1, C', ...)."""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


# ---------------------------------------------------------------------------- norms
class Norm(nn.Module):
    """Norms square their input, and fp16 ends at 65504 (the Neural Engine's convolutions at 32768): so they square S * x, S a power of two, which
    changes no digit. calibrate() sets S so that the largest S * x that it saw is between 16 and 32: squares up to 1024, room for 5 times as much."""
    S, largest = 0.25, None

    def scaled(self, x):
        if self.largest is not None:
            self.largest = max(self.largest, x.abs().max().item())
        return x * self.S


@torch.no_grad()
def calibrate(form, cases):
    """Runs the form on its inputs, once to look and once to set each norm's S."""
    norms = [m for m in form.modules() if isinstance(m, Norm)]
    for m in norms:
        m.largest = 1e-3
    for case in cases:
        form(**case)
    for m in norms:
        m.S, m.largest = 2.0 ** math.floor(math.log2(32 / m.largest)), None


class RMSNorm(Norm):
    """Over one axis. LayerNorm is this of x minus its mean."""

    def __init__(self, dim, eps):
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x):
        y = self.scaled(x)
        return y * torch.rsqrt((y * y).mean(self.dim, keepdim=True) + self.eps * self.S ** 2)


class LayerNorm(Norm):
    """Of (1, C, 1, N), over C."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.rms = norm, RMSNorm(1, norm.eps)

    def forward(self, x):
        return self.rms(x - x.mean(1, keepdim=True)) * column(self.norm.weight) + column(self.norm.bias)


class GroupNorm(Norm):
    """nn.GroupNorm reshapes to rank 5. Here big tensors keep their shape: statistics of each channel, then a tiny constant convolution
    from channels to groups, and another back."""

    def __init__(self, norm):
        super().__init__()
        self.norm, C, g = norm, norm.num_channels, norm.num_groups
        spread = torch.eye(g).repeat_interleave(C // g, 0)[:, :, None, None]                                   # (C, g, 1, 1)
        self.register_buffer("spread", spread, persistent=False)
        self.register_buffer("gather", spread.transpose(0, 1).contiguous() * (g / C), persistent=False)         # (g, C, 1, 1)

    def forward(self, x):
        y = self.scaled(x - F.conv2d(F.conv2d(x.mean((2, 3), keepdim=True), self.gather), self.spread))         # (1, C, H, W)
        r = torch.rsqrt(F.conv2d((y * y).mean((2, 3), keepdim=True), self.gather) + self.norm.eps * self.S ** 2)  # (1, g, 1, 1)
        return y * (F.conv2d(r, self.spread) * column(self.norm.weight)) + column(self.norm.bias)


# ---------------------------------------------------------------------------- attention
class Attend(nn.Module):
    """softmax(k q) v: q (1, h*D, 1, N), k and v (1, G*D, 1, L), bias (1, L, 1, 1) or None -> (1, h*D, 1, N). The four forms differ in speed alone."""

    def __init__(self, h, G, D, N, L, form):
        super().__init__()
        self.sizes, self.form = (h, G, D, N, L), form
        self.register_buffer("scale", torch.tensor(D ** -0.5), persistent=False)   # a buffer, so that rounding to fp16 reaches it

    def forward(self, q, k, v, bias=None):
        h, G, D, N, L = self.sizes
        R = h // G                                                           # query heads that share one of keys and values
        if self.form == "sdpa":                                              # its scale is D ** -0.5 by default
            tokens = lambda x, n: x.reshape(G, -1, D, n).transpose(2, 3).reshape(G, 1, -1, D)                   # (G, 1, R*N, D): no copies of k
            o = F.scaled_dot_product_attention(tokens(q, N), tokens(k, L), tokens(v, L), None if bias is None else bias.reshape(1, 1, 1, L))
            return o.reshape(G, R, N, D).transpose(2, 3).reshape(1, h * D, 1, N)
        k = k * self.scale
        if self.form == "matmul":
            w = k.reshape(G, 1, D, L).transpose(2, 3) @ q.reshape(G, R, D, N)                                   # (G, R, L, N)
            w = (w if bias is None else w + bias.reshape(1, 1, L, 1)).softmax(2)
            return (v.reshape(G, 1, D, L) @ w).reshape(1, h * D, 1, N)
        chunk = 512 if self.form == "split512" and L > 512 else N            # the text's few keys make small scores: no need to chunk there
        keys, values = [x.transpose(1, 3) for x in k.split(D, 1)], v.split(D, 1)                                # G of (1, L, 1, D), of (1, D, 1, L)
        out = []
        for i, head in enumerate(q.split(D, 1)):                                                                # (1, D, 1, N)
            parts = []
            for part in head.split(chunk, 3):
                w = torch.einsum("bchq,bkhc->bkhq", part, keys[i // R])                                         # (1, L, 1, chunk)
                w = (w if bias is None else w + bias).softmax(1)
                parts.append(torch.einsum("bkhq,bchk->bchq", w, values[i // R]))                                # (1, D, 1, chunk)
            out.append(torch.cat(parts, 3) if len(parts) > 1 else parts[0])
        return torch.cat(out, 1)


# ---------------------------------------------------------------------------- UNet
class ResBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block, self.norm1, self.norm2 = block, GroupNorm(block.norm1), GroupNorm(block.norm2)

    def forward(self, x, temb):                                              # temb is activated already: once for all blocks
        b = self.block
        h = b.conv1(b.act(self.norm1(x))) + pointwise(temb, b.time)          # (1, hidden, H, W)
        return b.shortcut(x) + b.conv2(b.act(self.norm2(h)))                 # (1, C_out, H, W)


class Attention(nn.Module):
    def __init__(self, attention, N, L, form):
        super().__init__()
        a, self.attention = attention, attention
        self.h, self.G, self.D, self.N, self.L = a.q.out_features // a.D, a.G, a.D, N, L
        self.attend = Attend(self.h, a.G, a.D, N, L, form)
        self.q_norm, self.k_norm = RMSNorm(2, 1e-6), RMSNorm(2, 1e-6)

    def heads(self, x, norm, rms, n, N, rope):
        """RMSNorm of each head and rotary positions, on a view of rank 4 that leaves the last axis alone."""
        if isinstance(norm, nn.Identity) and rope is None:
            return x
        x = x.reshape(1, n, self.D, N)
        if not isinstance(norm, nn.Identity):
            x = rms(x) * norm.weight[None, None, :, None]
        if rope is not None:
            cos, sin = rope                                                  # (1, 1, D/2, N) each
            a, b = x.chunk(2, 2)
            x = torch.cat([a * cos - b * sin, b * cos + a * sin], 2)
        return x.reshape(1, n * self.D, 1, N)

    def forward(self, x, context, bias=None, rope=None):                     # (1, C, 1, N), (1, C_context, 1, L)
        a = self.attention
        k, v = pointwise(context, a.kv).split(self.G * self.D, 1)            # (1, G*D, 1, L) each
        q = self.heads(pointwise(x, a.q), a.q_norm, self.q_norm, self.h, self.N, rope)
        k = self.heads(k, a.k_norm, self.k_norm, self.G, self.L, rope)
        return pointwise(self.attend(q, k, v, bias), a.out)


class Transformer(nn.Module):
    def __init__(self, transformer, H, W, tokens, form):
        super().__init__()
        self.t, self.norm, self.shape = transformer, GroupNorm(transformer.norm), (transformer.norm.num_channels, H, W)
        self.self_attn = nn.ModuleList(Attention(b.self_attn, H * W, H * W, form) for b in transformer.blocks if b.self_attn is not None)
        self.cross_attn = nn.ModuleList(Attention(b.cross_attn, H * W, tokens, form) for b in transformer.blocks)
        self.norms = nn.ModuleList(nn.ModuleList(LayerNorm(n) if n is not None else None for n in (b.norm1, b.norm2, b.norm3)) for b in transformer.blocks)

    def forward(self, x, context, bias, rope):
        C, H, W = self.shape
        h = pointwise(self.norm(x), self.t.proj_in).reshape(1, C, 1, H * W)
        for i, (b, (norm1, norm2, norm3)) in enumerate(zip(self.t.blocks, self.norms)):
            if b.self_attn is not None:
                n = norm1(h)
                h = h + self.self_attn[i](n, n, rope=rope)
            h = h + self.cross_attn[i](norm2(h), context, bias)
            value, gate = pointwise(norm3(h), b.ff.up).chunk(2, 1)
            h = h + pointwise(value * F.gelu(gate), b.ff.out)                # (1, C, 1, N)
        return x + pointwise(h, self.t.proj_out).reshape(1, C, H, W)


class Layer(nn.Module):
    def __init__(self, layer, H, W, tokens, form):
        super().__init__()
        self.res = ResBlock(layer.res)
        self.transformer = None if layer.transformer is None else Transformer(layer.transformer, H, W, tokens, form)

    def forward(self, x, temb, context, bias, rope):
        x = self.res(x, temb)
        return x if self.transformer is None else self.transformer(x, context, bias, rope)


class UNet(nn.Module):
    """sample (1, C, H, W), timestep (1,) = 1000 t, encoder_hidden_states (1, D+1, 1, L) -> velocity (1, C, H, W). These are the names and units of
    Apple's Swift package. The last channel of encoder_hidden_states is the mask: 0 for a token, MASKED for padding; so no fourth input is needed."""

    def __init__(self, unet, H, W, tokens, form="split"):
        super().__init__()
        self.unet, cfg, last = unet, unet.cfg, len(unet.down) - 1
        half = cfg.time_freqs // 2
        self.register_buffer("freqs", torch.exp(-math.log(10000) / half * torch.arange(half)), persistent=False)   # stays fp32
        for i, attends in enumerate(cfg.self_attn):                          # (1, 1, D/2, N) each
            tables = rope_table(H >> i, W >> i, cfg.head_dim, cfg.rope, "cpu") if cfg.rope and attends else (None, None)
            for name, table in zip(("cos", "sin"), tables):
                self.register_buffer(f"{name}{i}", None if table is None else table.permute(1, 2, 0)[None].contiguous(), persistent=False)
        stage = lambda layers, i: nn.ModuleList(Layer(m, H >> i, W >> i, tokens, form) for m in layers)
        self.down = nn.ModuleList(stage(s, i) for i, s in enumerate(unet.down))
        self.mid = stage(unet.mid, last)
        self.up = nn.ModuleList(stage(s, last - j) for j, s in enumerate(unet.up))
        self.norm_out = GroupNorm(unet.norm_out)

    def forward(self, sample, timestep, encoder_hidden_states):
        u, cfg, last, act = self.unet, self.unet.cfg, len(self.unet.down) - 1, getattr(F, self.unet.cfg.act)
        context, bias = encoder_hidden_states.split([cfg.context_dim, 1], 1)
        bias = bias.transpose(1, 3)                                          # (1, L, 1, 1)
        angle = timestep[:, None] * self.freqs                               # (1, F/2); rank 2 marks the fp32 island: in fp16 t = 999 is off by 0.4
        temb = torch.cat([angle.cos(), angle.sin()], -1)[:, :, None, None]   # (1, F, 1, 1)
        temb = temb if temb.dtype == sample.dtype else temb.to(sample.dtype)
        temb = act(pointwise(F.silu(pointwise(temb, u.time[0])), u.time[2]))
        rope = lambda i: None if self.get_buffer(f"cos{i}") is None else (self.get_buffer(f"cos{i}"), self.get_buffer(f"sin{i}"))

        x, skips = u.conv_in(sample), []
        for i, layers in enumerate(self.down):
            x = u.downsample[i - 1](x) if i > 0 else x
            outs = [x]
            for layer in layers:
                outs.append(layer(outs[-1], temb, context, bias, rope(i)))
            skips += outs if i < last or cfg.skip_lowest else []
            x = outs[-1]
        for layer in self.mid:
            x = layer(x, temb, context, bias, rope(last))
        for j, layers in enumerate(self.up):
            for layer in layers:
                x = torch.cat([x, skips.pop()], 1) if j > 0 or cfg.skip_lowest else x
                x = layer(x, temb, context, bias, rope(last - j))
            x = u.upsample[j](F.interpolate(x, scale_factor=2.0, mode="nearest")) if j < last else x
        return u.conv_out(act(self.norm_out(x)))


# ---------------------------------------------------------------------------- tiny decoder
class Residual(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


def ane_form(m):
    """The decoder is a Sequential of convolutions: only its norms change."""
    if isinstance(m, nn.Sequential):
        return nn.Sequential(*map(ane_form, m))
    return GroupNorm(m) if isinstance(m, nn.GroupNorm) else Residual(ane_form(m.body)) if isinstance(m, TinyBlock) else m


class Decoder(nn.Module):
    """z, normalised latents (1, C, h, w) -> image (1, 3, 8h, 8w), about [-1, 1]. Scale and shift are inside; not folded into the first convolution,
    whose zero padding would then be wrong at the border, but on the smallest tensor they cost nothing."""

    def __init__(self, ae):
        super().__init__()
        self.body = ane_form(ae.decoder)
        self.register_buffer("spread", torch.tensor(1 / ae.cfg.scale), persistent=False)
        self.register_buffer("shift", torch.tensor(ae.cfg.shift), persistent=False)

    def forward(self, z):
        return self.body(z * self.spread + self.shift)


# ---------------------------------------------------------------------------- text encoder
class TextEncoder(nn.Module):
    """input_ids (1, L) float32, padded with the <pad> token -> last_hidden_state (1, L, D+1): the states, and the mask as UNet reads it."""

    def __init__(self, text, form="split"):
        super().__init__()
        self.text, L, D = text, text.cfg.max_tokens, text.cfg.width
        self.pad = text.cfg.vocabulary - 1
        self.attend = Attend(text.cfg.heads, text.cfg.heads, D // text.cfg.heads, L, L, form)
        self.norms, self.norm = nn.ModuleList(nn.ModuleList([LayerNorm(b.norm1), LayerNorm(b.norm2)]) for b in text.blocks), LayerNorm(text.norm)

    def forward(self, input_ids):
        L, t = self.text.cfg.max_tokens, self.text
        bias = ((input_ids == self.pad).to(t.norm.weight.dtype) * MASKED).reshape(1, L, 1, 1)
        x = F.embedding(input_ids.int(), t.token.weight) + t.position.weight                                    # (1, L, D)
        x = x.transpose(1, 2)[:, :, None]                                                                       # (1, D, 1, L)
        for b, (norm1, norm2) in zip(t.blocks, self.norms):
            q, k, v = pointwise(norm1(x), b.qkv).chunk(3, 1)                                      # (1, D, 1, L) each
            x = x + pointwise(self.attend(q, k, v, bias), b.out)
            x = x + pointwise(F.gelu(pointwise(norm2(x), b.up)), b.down)
        x = torch.cat([self.norm(x), bias.reshape(1, 1, 1, L)], 1)                                     # (1, D+1, 1, L)
        return x.squeeze(2).transpose(1, 2)
