"""The tiny decoder on large pictures, a few rows at a time: the same pixels, in a fraction of the memory.

A GroupNorm's mean and deviation are of the whole picture, so a block takes two passes over it: one up to the norm, for these two numbers, and one to the end. What lies before
the norm is computed twice, so that a stage's own map is all that is held. Slower than layer by layer (docs/BENCH.md).

C channels | H W rows, columns of a map | r rows of a stripe
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


def empty(x, C, H, W):
    return torch.empty((1, C, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def rows(x, a, b):
    """Rows a .. b-1 of x (1, C, H, W); those outside of the picture are zero, as a convolution pads them."""
    H = x.shape[2]
    inside = x[:, :, max(a, 0):min(b, H)]
    return inside if a >= 0 and b <= H else F.pad(inside, (0, 0, max(-a, 0), max(b - H, 0)))


def depthwise(conv, x):
    """(1, C, r + 2, W) -> (1, C, r, W): padded by columns only."""
    return F.conv2d(x, conv.weight, conv.bias, padding=(0, 1), groups=conv.groups)


def pointwise(conv, x):
    """A 1x1 convolution as the one matrix product that it is; nothing is copied where x is channels_last."""
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


class Moments:
    """Mean and variance of each group of channels, over stripes that come one after the other (Chan et al. 1979), in double precision."""

    def __init__(self, norm):
        self.norm, self.n, self.mean, self.square = norm, 0, 0.0, 0.0      # square: the sum of squared deviations

    def add(self, x):
        G = self.norm.num_groups
        n = x.numel() // G
        _, mean, rstd = torch.native_group_norm(x, None, None, 1, x.shape[1], x.shape[2] * x.shape[3], G, 1e-12)    # PyTorch's fastest way to these two, in any layout
        mean, var, d = mean[0].double(), rstd[0].double() ** -2, mean[0].double() - self.mean
        self.mean, self.square, self.n = self.mean + d * n / (self.n + n), self.square + n * var + d * d * self.n * n / (self.n + n), self.n + n

    def normalise(self, x):
        """Rows of what was added, normed; BatchNorm with given moments is the kernel that does it."""
        each = lambda v: v.to(x.dtype).repeat_interleave(x.shape[1] // self.norm.num_groups)
        return F.batch_norm(x, each(self.mean), each(self.square / self.n), self.norm.weight, self.norm.bias, training=False, eps=self.norm.eps)


def hidden(body, x, r):
    """A decoder.TinyBlock's body up to its norm: yields a, b and its rows a .. b-1 (1, 2C, b-a, W). It never looks at rows of x above a again, so that these may be written."""
    (first, up), middle, H, before = body[0], body[1], x.shape[2], None
    for a in range(0, H, r):
        b = min(a + r, H)
        h = pointwise(up, depthwise(first, rows(x, a if a else -1, b + 2)))     # rows a+1 .. b; of the first stripe a .. b
        if b == H:
            h[:, :, -1] = 0                                                 # outside of the picture, where the next convolution pads
        h = torch.cat([before[:, :, -2:] if a else torch.zeros_like(h[:, :, :1]), h], 2)       # rows a-1 .. b
        before = h
        yield a, b, depthwise(middle, h)


def block(layer, x, r: int):
    """decoder.TinyBlock on x (1, C, H, W), in place."""
    _, _, norm, act, down = layer.body
    moments = Moments(norm)
    for _, _, h in hidden(layer.body, x, r):
        moments.add(h)
    for a, b, h in hidden(layer.body, x, r):
        x[:, :, a:b].add_(pointwise(down, act(moments.normalise(h))))


def decode(layers: nn.Sequential, z, r: int = 0):
    """What layers(z) is to rounding, without gradients: the tiny decoder's latents (1, C, h, w) -> (1, 3, 8h, 8w).
    r: rows of a stripe; 0: such that a stripe fits into a CPU's cache."""
    x, layers = z.contiguous(memory_format=torch.channels_last), list(layers)
    height = lambda C, W: r or max(4, 2**20 // (C * W))

    def mapped(make, C, H, W, r):
        """(1, C, H, W), of which make(a, b) are rows a .. b-1."""
        out = empty(x, C, H, W)
        for a in range(0, H, r):
            out[:, :, a:a + r] = make(a, min(a + r, H))
        return out

    while layers:
        layer, (H, W) = layers.pop(0), x.shape[2:]
        if isinstance(layer, nn.Upsample):                              # with the convolutions behind it
            first, second = layers.pop(0)

            def make(a, b):
                twice = F.interpolate(rows(x, (a - 1) // 2, (b + 2) // 2), scale_factor=2.0, mode="nearest")        # its first row is a-1 or, for odd a, a-1 as well as a-2
                return pointwise(second, depthwise(first, twice[:, :, (a - 1) % 2:][:, :, :b - a + 2]))
            x = mapped(make, second.out_channels, 2 * H, 2 * W, height(first.out_channels, 2 * W))
        elif isinstance(layer, nn.GroupNorm):                           # the last norm, its activation and the convolutions to RGB
            act, (first, second), moments, n = layers.pop(0), layers.pop(0), Moments(layer), height(x.shape[1], W)
            for a in range(0, H, n):
                moments.add(x[:, :, a:a + n])

            def make(a, b):
                h = act(moments.normalise(rows(x, a - 1, b + 1)))
                if a == 0:
                    h[:, :, 0] = 0
                if b == H:
                    h[:, :, -1] = 0
                return pointwise(second, depthwise(first, h))
            x = mapped(make, second.out_channels, H, W, n)
        elif isinstance(layer, nn.Sequential):                          # the first convolutions
            make = lambda a, b: pointwise(layer[1], depthwise(layer[0], rows(x, a - 1, b + 1)))
            x = mapped(make, layer[1].out_channels, H, W, height(x.shape[1], W))
        else:
            block(layer, x, height(2 * x.shape[1], W))
    return x
