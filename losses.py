"""What an autoencoder is trained on: L1 over a pyramid, LPIPS where its weights are on disk, a patch GAN's discriminator.

LPIPS (Zhang et al. 2018) needs VGG-16 and its own five sets of weights, 59 MB, as safetensors under the names of the `lpips` package. Convert them once, where that is installed:
    python -c "import lpips; from safetensors.torch import save_file; save_file({k: v.contiguous() for k, v in lpips.LPIPS(net='vgg').state_dict().items() if k.startswith(('net.', 'lin')) and 'lins' not in k}, 'lpips_vgg.safetensors')"

B batch | C channels | H W of the picture in pixels
"""
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoint import load_into
from common import UserError

# grey, blue-yellow, green-magenta: in RGB, L1 is content with the right grey, and hue is learned last
OPPONENT = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, -1.0], [-1.0, 2.0, -1.0]])


def pyramid_l1(a, b, levels=4):
    """L1 over a Laplacian pyramid of opponent colours: a blurred edge costs as much as a wrong colour, which plain L1 hardly minds.
    Needs no download."""
    d = torch.einsum("bchw,oc->bohw", a - b, OPPONENT.to(a.device))  # all is linear: the difference's pyramid is enough
    loss = 0.0
    for _ in range(levels - 1):
        low = F.avg_pool2d(d, 2)
        loss = loss + (d - F.interpolate(low, scale_factor=2.0, mode="bilinear")).abs().mean()
        d = low
    return loss + d.abs().mean()


class PatchDiscriminator(nn.Sequential):
    """Three strided convolutions: real or drawn, for each patch of about 22 pixels. (B, 3, H, W) -> (B, 1, H/8, W/8)"""

    def __init__(self, C=32):
        act = lambda: nn.LeakyReLU(0.2)
        super().__init__(nn.Conv2d(3, C, 4, 2, 1), act(), nn.Conv2d(C, 2 * C, 4, 2, 1), nn.GroupNorm(8, 2 * C), act(),
                         nn.Conv2d(2 * C, 4 * C, 4, 2, 1), nn.GroupNorm(8, 4 * C), act(), nn.Conv2d(4 * C, 1, 3, padding=1))


class LPIPS(nn.Module):
    """Two pictures (B, 3, H, W) in [-1, 1] -> (B,): squared distances of VGG-16's features, each place of unit length, weighted by channel."""
    WIDTHS = (64, 128, 256, 512, 512)

    def __init__(self):
        super().__init__()
        layers, C = [], 3
        for width, n in zip(self.WIDTHS, (2, 2, 3, 3, 3)):
            for _ in range(n):
                layers += [nn.Conv2d(C, width, 3, padding=1), nn.ReLU()]
                C = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])             # VGG's own numbers: 0, 2, 5, 7, 10, ..
        self.lin = nn.ParameterList(torch.ones(1, C, 1, 1) for C in self.WIDTHS)
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)    # ImageNet's, for pictures in [-1, 1]
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def taps(self, x):
        """The outputs in front of each pooling and the last one, normalised over channels: (B, C, H/2^k, W/2^k) for k = 0 .. 4."""
        out, x = [], (x - self.mean) / self.std
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                out.append(x)
            x = layer(x)
        return [y / (y.square().sum(1, keepdim=True).sqrt() + 1e-10) for y in (*out, x)]

    def forward(self, a, b):
        return sum((w * (x - y).square()).sum(1).mean((1, 2)) for w, x, y in zip(self.lin, self.taps(a), self.taps(b)))


def load_lpips(path: str, device="cpu") -> LPIPS | None:
    """Frozen; None, with a line, where there is no file: the training then goes on without it."""
    if not Path(path).is_file():
        print(f"no LPIPS: {path or 'lpips='} is no file (how to make it stands at the top of losses.py); going on without it", flush=True)
        return None
    try:
        raw = load_file(path)
    except SafetensorError as e:
        raise UserError(f"{path} is no safetensors file ({e}): the top of losses.py tells how to make it")
    state = {}
    for k, v in raw.items():
        k = re.sub(r"^net\.slice\d\.", "features.", k)
        state[re.sub(r"^lin(\d)\.model\.1\.weight$", r"lin.\1", k)] = v
    return load_into(LPIPS(), state, path).to(device).eval().requires_grad_(False)
