"""What a network costs, and the features that it can give: by passes on meta and fake tensors."""
import re
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from common import UserError
from mmdit import JointBlock, MMDiTConfig
from model import Layer, UNetConfig, make_network
from text import TextConfig, TextEncoder, Tokens

GiB = 2**30

# Data sheets: TFLOP/s of dense products in bfloat16 with sums in fp32 (half of what they say of
# sparse ones), and the memory's TB/s. Keys are patterns of CUDA's names; the first one counts.
CARDS = {
    "H100 PCIe": (756, 2.0), "H100 NVL": (835, 3.9), "H100": (989, 3.35), "H200 NVL": (835, 4.8),
    "H200": (989, 4.8), "GH200": (989, 4.0), "B200": (2250, 8.0),
    "A100.*40GB": (312, 1.555), "A100.*PCIe": (312, 1.935), "A100": (312, 2.039),
    "A10": (125, 0.6), "L40S": (362, 0.864), "L4": (121, 0.3),
    "RTX 3090": (71, 0.936), "RTX 4090": (165, 1.008), "RTX 5090": (209, 1.792),
}

def dummy_inputs(network, batch: int, size: int | tuple, tokens: int) -> dict:
    """Arguments of a network's forward pass, on the context's device. size: pixels of a side, or
    (height, width)."""
    H, W = size if isinstance(size, tuple) else (size, size)
    return {
        "x": torch.empty(batch, network.in_channels, H // 8, W // 8),
        "t": torch.empty(batch),
        "context": torch.empty(batch, tokens, network.context_dim),
        "mask": torch.empty(batch, tokens, dtype=torch.bool),
        "pooled": torch.empty(batch, getattr(network, "pooled_dim", 0)),
    }

def caption_tokens(text: TextConfig) -> int:
    """Tokens of a caption: a scene's typical ones, or all places of the frozen encoders."""
    return {"own": 16, "clip-l": 77}.get(text.kind, 77 + text.tokens)

def count_flops(function) -> int:
    """FLOPs of function(), which makes its tensors itself: on the meta device, where nothing is
    computed, and where PyTorch counts attention (on CPU tensors it would not)."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()

def forward_flops(network, size: int | tuple, tokens: int, text: TextConfig | None = None) -> int:
    """FLOPs of a forward pass on one picture; with `text` also those of our own text encoder."""
    def forward():
        inputs = dummy_inputs(network, 1, size, tokens)
        make_network(network)(**inputs)
        if text is not None and text.kind == "own":
            TextEncoder(text)(Tokens(torch.empty(1, tokens, dtype=torch.long), inputs["mask"]))
    return count_flops(forward)

def training_flops(cfg, tokens: int = 0, buckets: dict | None = None) -> float:
    """FLOPs of a TrainConfig's flow training on one picture: backward costs twice forward. What a
    checkpointed pass computes again and the optimizer's work are not counted.
    tokens: of a caption as the network is given it; buckets: {"HxW": pictures}, for their mean."""
    tokens = tokens or caption_tokens(cfg.text)
    total, pictures = 0, 0
    for bucket, n in (buckets or {f"{cfg.data.size}x{cfg.data.size}": 1}).items():
        H, W = map(int, bucket.split("x"))
        total += n * forward_flops(cfg.network, (H, W), tokens, cfg.text)
        pictures += n
    return 3 * total / pictures

def card_of(name: str) -> tuple[float, float] | None:
    """(FLOP/s in bfloat16, bytes/s) of a CUDA device by its name; None: CARDS lacks it, or it is
    a part of a card, or its sister for laptops."""
    for pattern, (tflops, terabytes) in CARDS.items():
        if re.search(rf"\b{pattern}\b", name) and not re.search(r"MIG|Laptop| D$", name):
            return tflops * 1e12, terabytes * 1e12
    return None

def device_peak(device, bfloat16: bool) -> tuple[float, str]:
    """(FLOP/s that the device reaches at most, in words where that is from): the data sheet's,
    in fp32 half of it (TF32), or where CARDS lacks the device what its product reaches now."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    card = card_of(name)
    if card is None:
        return matmul_speed(device, bfloat16), f"{name}, its own matrix product measured now"
    return card[0] * (1 if bfloat16 else 0.5), f"{name}, data sheet"

def matmul_speed(device, bfloat16: bool) -> float:
    """FLOP/s of the device's own matrix products, measured. It is low beside another job."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    best = 0.0
    for _ in range(6):
        begin = time.perf_counter()             # Windows' time.time() moves every 16 ms
        (a @ a)[0, 0].item()                    # .item() waits for the device
        best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best

def tap_names(network: UNetConfig | MMDiTConfig) -> list[str]:
    """The features that a network can give."""
    if isinstance(network, MMDiTConfig):
        return [f"block{i}" for i in range(network.layers)]
    stages = range(len(network.widths))
    return [f"down{i}" for i in stages] + ["mid"] + [f"up{i}" for i in stages]

def tap_shape(network, tap: str, size: int) -> tuple[int, int, int]:
    """(C, h, w) of one of them at `size` pixels."""
    names = tap_names(network)
    if tap not in names:
        raise UserError(f"the network has no tap '{tap}': it has " + ", ".join(names))
    with torch.device("meta"), torch.no_grad():
        _, taps = make_network(network)(**dummy_inputs(network, 1, size, 1), features=(tap,))
    return tuple(taps[tap].shape[1:])

def kept_storages(network, batch: int, size: int, tokens: int, bfloat16: bool):
    """What a training pass without checkpoints keeps for its backward pass, parameters aside:
    {storage: the layer that keeps it, None between layers}, and {storages that enter layers}."""
    kept, entered, running = {}, set(), [None]

    def enter(layer, args):
        running.append(layer)
        entered.update(x.untyped_storage() for x in args if torch.is_tensor(x))

    def leave(*_):
        running.pop()

    def pack(x):
        kept.setdefault(x.untyped_storage(), running[-1])
        return x

    with FakeTensorMode(), torch.device("cpu"), torch.autocast("cpu", enabled=bfloat16):
        net = make_network(network)
        for m in net.modules():
            if isinstance(m, (Layer, JointBlock)):
                m.register_forward_pre_hook(enter)
                m.register_forward_hook(leave)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            net(**dummy_inputs(network, batch, size, tokens))
    for p in net.parameters():
        kept.pop(p.untyped_storage(), None)
    return kept, entered
