"""The forms of our networks that Apple's Neural Engine likes: the same weights, the same numbers,
other shapes. And their conversion to Core ML.

The engine wants (Apple, "Deploying Transformers on the Apple Neural Engine", 2022, and the
authoring rules of apple/coreai-models, 2026):
    channels on axis 1, tokens on the last:  (1, C, 1, N), never (B, N, C); rank 4 at most
    1x1 convolutions:                        not nn.Linear
    attention head by head:                  small einsums, softmax over axis 1 (the keys)
    norms over the channel axis:             scaled, since fp16 squares overflow;
                                             no reshaping of large tensors
    constants for all that is fixed:         rotary tables, group averages

C channels | H W latent rows, columns | N = H * W image tokens | L text tokens | D width of a head
h query heads | G key/value heads | the batch is always 1
"""
import contextlib
import copy
import io
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from coreml.check import load_coremltools
from model import Attention, FeedForward, ResBlock, RMSNorm, Transformer, rope_table

MASKED = -1e4    # added to a padding token's score: exp() of it is 0 in fp16 too, where -inf is NaN

def ane_form(module):
    """A twin of a module, on the same parameters, in which the layers of FORMS are replaced. What
    does not care for the layout (convolutions, blocks of layers) keeps its forward()."""
    form = FORMS.get(type(module), type(module))
    if not issubclass(form, type(module)):
        return form(module)
    twin = copy.copy(module)
    twin.__class__ = form
    twin._modules = {name: ane_form(m) for name, m in module.named_children()}
    return twin

def column(v):
    """(C,) -> (1, C, 1, 1)"""
    return v[None, :, None, None]

def pointwise(x, linear):
    """nn.Linear as a 1x1 convolution: (1, C, ...) -> (1, C', ...)."""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)

# ------------------------------------------------------------------------------------------ norms
class ScaledNorm(nn.Module):
    """A norm that squares S * x instead of x, with S a power of two, which changes no digit: fp16
    ends at 65504, the Neural Engine's convolutions at 32768. calibrate() sets S so that the largest
    S * x that it sees is between 16 and 32: squares to 1024, room for 5 times as much."""
    S = 0.25
    largest = None    # a number while calibrate() looks

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def scaled(self, x):
        if self.largest is not None:
            self.largest = max(self.largest, x.abs().max().item())
        return x * self.S

    def rms(self, x, axis, eps):
        """x over the root of its mean square."""
        y = self.scaled(x)
        return y * torch.rsqrt((y * y).mean(axis, keepdim=True) + eps * self.S ** 2)

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
    def forward(self, x):                                           # (1, heads, D, N), over D
        return self.rms(x, 2, 1e-6) * self.norm.weight[None, None, :, None]

class AneLayerNorm(ScaledNorm):
    def forward(self, x):                                           # (1, C, 1, N), over C
        y = self.rms(x - x.mean(1, keepdim=True), 1, self.norm.eps)
        return y * column(self.norm.weight) + column(self.norm.bias)

class AneGroupNorm(ScaledNorm):
    """nn.GroupNorm, which reshapes to rank 5, without reshaping a large tensor: statistics of each
    channel, then a tiny constant convolution from channels to groups, and another back."""
    def __init__(self, norm):
        super().__init__(norm)
        g, C = norm.num_groups, norm.num_channels
        spread = torch.eye(g).repeat_interleave(C // g, 0)[:, :, None, None]    # (C, g, 1, 1)
        gather = spread.transpose(0, 1).contiguous() * (g / C)                  # (g, C, 1, 1)
        self.register_buffer("spread", spread, persistent=False)
        self.register_buffer("gather", gather, persistent=False)

    def group_means(self, x):
        """(1, C, H, W) -> (1, g, 1, 1)"""
        return F.conv2d(x.mean((2, 3), keepdim=True), self.gather)

    def forward(self, x):
        y = self.scaled(x - F.conv2d(self.group_means(x), self.spread))         # (1, C, H, W)
        r = torch.rsqrt(self.group_means(y * y) + self.norm.eps * self.S ** 2)  # (1, g, 1, 1)
        gain = F.conv2d(r, self.spread) * column(self.norm.weight)              # (1, C, 1, 1)
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
        self.register_buffer("scale", scale, persistent=False)      # so that rounding reaches it

    def forward(self, q, k, v, bias=None):
        keys = (k * self.scale).split(self.D, 1)                    # G of (1, D, 1, L)
        keys = [key.transpose(1, 3) for key in keys]                # G of (1, L, 1, D)
        values = v.split(self.D, 1)                                 # G of (1, D, 1, L)
        out = []
        for i, head in enumerate(q.split(self.D, 1)):               # (1, D, 1, N)
            shared = i // self.repeat
            w = torch.einsum("bchq,bkhc->bkhq", head, keys[shared])             # (1, L, 1, N)
            if bias is not None:
                w = w + bias
            out.append(torch.einsum("bkhq,bchk->bchq", w.softmax(1), values[shared]))
        return torch.cat(out, 1)

class AneAttention(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.q, self.kv, self.out = attention.q, attention.kv, attention.out
        self.q_norm, self.k_norm = ane_form(attention.q_norm), ane_form(attention.k_norm)
        self.h = attention.q.out_features // attention.D
        self.G, self.D = attention.G, attention.D
        self.attend = SplitAttention(self.h, self.G, self.D)

    def keys_values(self, context):                                 # (1, C', 1, L)
        k, v = pointwise(context, self.kv).chunk(2, 1)              # (1, G*D, 1, L) each
        return self.k_norm(k.reshape(1, self.G, self.D, -1)), v

    def forward(self, x, k, v, mask=None, rope=None):               # (1, C, 1, N)
        q = self.q_norm(pointwise(x, self.q).reshape(1, self.h, self.D, -1))
        if rope is not None:
            q, k = rotate_heads(q, rope), rotate_heads(k, rope)             # (1, heads, D, N)
        q = q.reshape(1, self.h * self.D, 1, -1)
        k = k.reshape(1, self.G * self.D, 1, -1)
        return pointwise(self.attend(q, k, v, mask), self.out)

def rotate_heads(x, rope):
    """model.rotate with the channels of a head on axis 2: x (1, heads, D, N)."""
    cos, sin = rope.split(1)                                        # (1, 1, D/2, N) each
    a, b = x.chunk(2, 2)                                            # (1, heads, D/2, N) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], 2)

# ------------------------------------------------------------------------------------------- UNet
class AneResBlock(ResBlock):
    def forward(self, x, temb):                                     # temb is activated already
        h = self.conv1(self.act(self.norm1(x)))                     # (1, hidden, H, W)
        h = self.act(self.norm2(h + pointwise(temb, self.time)))
        return self.shortcut(x) + self.conv2(h)                     # (1, C_out, H, W)

class AneFeedForward(FeedForward):
    def forward(self, x):                                           # (1, C, 1, N)
        value, gate = pointwise(x, self.up).chunk(2, 1)
        return pointwise(value * F.gelu(gate), self.out)

class AneTransformer(Transformer):
    def forward(self, x, context, mask, rope):                      # (1, C, H, W)
        h = pointwise(self.norm(x), self.proj_in)
        h = h.reshape(1, self.proj_in.out_features, 1, -1)          # (1, C, 1, N)
        for block in self.blocks:
            h = block(h, context, mask, rope)
        return x + pointwise(h, self.proj_out).reshape_as(x)

FORMS = {
    nn.GroupNorm: AneGroupNorm, nn.LayerNorm: AneLayerNorm, RMSNorm: AneRMSNorm,
    Attention: AneAttention, FeedForward: AneFeedForward, ResBlock: AneResBlock,
    Transformer: AneTransformer,
}

class AneUNet(nn.Module):
    """sample (1, C, H, W), timestep (1,) = 1000 t, encoder_hidden_states (1, D+1, 1, L) -> velocity
    (1, C, H, W): names and units of Apple's Swift package. The last channel of the states is the
    mask, 0 for a token and MASKED for padding, so that no fourth input is needed."""
    exact = ("freqs",)

    def __init__(self, unet, H, W):
        super().__init__()
        self.unet = ane_form(unet)
        self.act = unet.down[0][0].res.act
        cfg, half = unet.cfg, unet.cfg.time_freqs // 2
        freqs = torch.exp(-math.log(10000) / half * torch.arange(half))
        self.register_buffer("freqs", freqs, persistent=False)      # stays fp32
        for i, attends in enumerate(cfg.self_attn):
            rope = None
            if cfg.rope and attends:
                rope = torch.stack(rope_table(H >> i, W >> i, cfg.head_dim, cfg.rope, "cpu"))
                rope = rope.permute(0, 2, 3, 1)                     # (2, 1, D/2, N)
            self.register_buffer(f"rope{i}", rope, persistent=False)

    def embed_time(self, timestep, dtype):
        """(1,) -> (1, time_dim, 1, 1), activated: once for all blocks. Rank 2 marks what stays in
        fp32 in the file: in fp16 the angle at t = 999 is off by 0.4."""
        angle = timestep[:, None] * self.freqs                      # (1, F/2)
        temb = torch.cat([angle.cos(), angle.sin()], -1)[:, :, None, None].to(dtype)
        first, _, second = self.unet.time
        return self.act(pointwise(F.silu(pointwise(temb, first)), second))

    def forward(self, sample, timestep, encoder_hidden_states):
        u, cfg, last = self.unet, self.unet.cfg, len(self.unet.down) - 1
        context, bias = encoder_hidden_states.split([cfg.context_dim, 1], 1)
        text = context, bias.transpose(1, 3)                        # (1, D, 1, L), (1, L, 1, 1)
        ropes = [getattr(self, f"rope{i}") for i in range(last + 1)]
        temb = self.embed_time(timestep, sample.dtype)

        x = u.conv_in(sample)
        skips = []
        for i, stage in enumerate(u.down):
            if i > 0:
                x = u.downsample[i - 1](x)                          # (1, C, H/2, W/2)
            outs = [x]
            for layer in stage:
                outs.append(layer(outs[-1], temb, *text, ropes[i]))
            if i < last or cfg.skip_lowest:
                skips += outs
            x = outs[-1]
        for layer in u.mid:
            x = layer(x, temb, *text, ropes[last])
        for j, stage in enumerate(u.up):
            for layer in stage:
                if j > 0 or cfg.skip_lowest:
                    x = torch.cat([x, skips.pop()], 1)
                x = layer(x, temb, *text, ropes[last - j])
            if j < last:                                            # (1, C, 2H, 2W)
                x = u.upsample[j](F.interpolate(x, scale_factor=2.0))
        return u.conv_out(self.act(u.norm_out(x)))

# --------------------------------------------------------------------------------- the other parts
class AneDecoder(nn.Module):
    """z, normalised latents (1, C, h, w) -> image (1, 3, 8h, 8w), about [-1, 1]. Scale and shift
    are not folded into the first convolution: its zero padding would be wrong at the border."""
    def __init__(self, ae):
        super().__init__()
        self.body = ane_form(ae.decoder)
        self.register_buffer("unscale", torch.tensor(1 / ae.cfg.scale), persistent=False)
        self.register_buffer("shift", torch.tensor(ae.cfg.shift), persistent=False)

    def forward(self, z):
        return self.body(z * self.unscale + self.shift)

class AneTextEncoder(nn.Module):
    """input_ids (1, L) in fp32, padded with <pad> -> last_hidden_state (1, L, D+1): the states, and
    as last channel the mask as AneUNet reads it."""
    def __init__(self, text):
        super().__init__()
        self.text = ane_form(text)
        self.pad = text.cfg.vocabulary - 1
        heads = text.cfg.heads
        self.attend = SplitAttention(heads, heads, text.cfg.width // heads)

    def forward(self, input_ids):
        t = self.text
        padding = (input_ids == self.pad).to(t.token.weight.dtype)
        bias = (padding * MASKED).reshape(1, -1, 1, 1)                          # (1, L, 1, 1)
        x = F.embedding(input_ids.int(), t.token.weight) + t.position.weight    # (1, L, D)
        x = x.transpose(1, 2)[:, :, None]                                       # (1, D, 1, L)
        for block in t.blocks:
            q, k, v = pointwise(block.norm1(x), block.qkv).chunk(3, 1)          # (1, D, 1, L)
            x = x + pointwise(self.attend(q, k, v, bias), block.out)
            x = x + pointwise(F.gelu(pointwise(block.norm2(x), block.up)), block.down)
        x = torch.cat([t.norm(x), bias.reshape(1, 1, 1, -1)], 1)                # (1, D+1, 1, L)
        return x.squeeze(2).transpose(1, 2)

# ------------------------------------------------------------------------------------- conversion
@torch.no_grad()
def round_to_fp16(form):
    """In place, the training form's too: they are shared. What runs before the engine starts stays
    fp32 in the file: sinusoids, and the tables of coreml/sd.py."""
    for module in form.modules():
        exact = getattr(module, "exact", ())
        for name, v in [*module.named_parameters(recurse=False),
                        *module.named_buffers(recurse=False)]:
            if name not in exact:
                v.copy_(v.half().float())

def convert_form(form, inputs: dict, output: str, oldest: str = "iOS18"):
    """A Neural Engine form -> Core ML model in fp16. What has rank 2 or less (the time's sinusoids,
    token ids) stays fp32 and runs before the engine starts. oldest: system that loads it."""
    ct = load_coremltools()

    def is_fp16(op):
        return not all(v.shape is not None and len(v.shape) <= 2 for v in op.outputs)
    types = {True: np.float16, False: np.float32}
    typed = [ct.TensorType(k, v.shape, dtype=types[v.ndim > 2]) for k, v in inputs.items()]
    with contextlib.redirect_stderr(io.StringIO()):                             # progress bars
        graph = torch.jit.trace(form, tuple(inputs.values()), check_trace=False)
        return ct.convert(
            graph, inputs=typed, outputs=[ct.TensorType(output, dtype=np.float16)],
            convert_to="mlprogram", minimum_deployment_target=ct.target[oldest],
            compute_precision=ct.transform.FP16ComputePrecision(op_selector=is_fp16),
            compute_units=ct.ComputeUnit.CPU_AND_NE, skip_model_load=True)

def palette(weight, bits: int):
    """The best table of 2**bits values for a tensor, and the weights' indices in it.

    One-dimensional k-means on the histogram, for fp16 has at most 65,536 values. coremltools' own
    finds tables as good, but wants scikit-learn and 4 to 19 times as long."""
    k = 2 ** bits
    values, index, count = np.unique(weight.ravel(), return_inverse=True, return_counts=True)
    values = values.astype(np.float64)
    if len(values) <= k:
        return np.pad(values, (0, k - len(values)), mode="edge").astype(weight.dtype), index
    # many centres want a density of p ** (1/3) (Panter & Dite 1951): a good start
    share = count ** (1 / 3) * np.gradient(values) ** (2 / 3)
    centres = np.interp((np.arange(k) + 0.5) / k * share.sum(), share.cumsum() - share / 2, values)
    for _ in range(40):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
        n = np.bincount(nearest, count, k)
        total = np.bincount(nearest, count * values, k)
        centres = np.where(n > 0, total / np.maximum(n, 1), centres)
    nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
    return centres.astype(weight.dtype), nearest[index].astype(np.uint8)

def compress(model, bits: int):
    """8: int8 per output channel. 6, 4: a table of 2**bits values for each tensor."""
    import coremltools.optimize.coreml as cto
    with contextlib.redirect_stderr(io.StringIO()):                             # progress bars
        if bits == 8:
            how = cto.OpLinearQuantizerConfig(mode="linear_symmetric", granularity="per_channel")
            return cto.linear_quantize_weights(model, cto.OptimizationConfig(how))
        how = cto.OpPalettizerConfig(mode="custom", lut_function=lambda w: palette(w, bits))
        return cto.palettize_weights(model, cto.OptimizationConfig(how))
