"""What a network costs: FLOPs, memory; and the features that it can give.

Nothing is computed: passes run on meta and fake tensors. model.count_params counts parameters, and
lab/plan.py tells what a whole training takes.
"""
import time
from collections import defaultdict
from dataclasses import replace

import torch

from common import UserError
from mmdit import JointBlock, MMDiTConfig
from model import Layer, UNetConfig, make_network
from text import TextConfig, TextEncoder, Tokens

GiB = 2**30

def dummy_inputs(network: UNetConfig | MMDiTConfig, batch: int, size: int, tokens: int) -> dict:
    """Keyword arguments of a network's forward pass at `size` pixels, on the context's device."""
    side = size // 8
    inputs = {
        "x": torch.empty(batch, network.in_channels, side, side),
        "t": torch.empty(batch),
        "context": torch.empty(batch, tokens, network.context_dim),
        "mask": torch.empty(batch, tokens, dtype=torch.bool),
    }
    if isinstance(network, MMDiTConfig):
        inputs["pooled"] = torch.empty(batch, network.pooled_dim)
    return inputs

# ---------------------------------------------------------------------------- FLOPs
def caption_tokens(text: TextConfig) -> int:
    """Tokens of a caption: a scene's typical ones, or all places of the frozen encoders."""
    return {"own": 16, "clip-l": 77}.get(text.kind, 77 + text.tokens)

def forward_flops(network, size: int, tokens: int, text: TextConfig | None = None) -> int:
    """FLOPs of a forward pass on one picture; with `text` also those of our own text encoder.

    On the meta device, because the counter takes attention on CPU tensors for nothing."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        inputs = dummy_inputs(network, 1, size, tokens)
        make_network(network)(**inputs)
        if text is not None and text.kind == "own":
            ids = torch.empty(1, tokens, dtype=torch.long)
            TextEncoder(text)(Tokens(ids, inputs["mask"]))
    return counter.get_total_flops()

def training_flops(cfg, tokens: int = 0) -> int:
    """FLOPs of flow training on one picture, for a TrainConfig: the backward pass costs twice the
    forward one. tokens: of a caption; 0 = caption_tokens."""
    tokens = tokens or caption_tokens(cfg.text)
    return 3 * forward_flops(cfg.network, cfg.data.size, tokens, cfg.text)

def matmul_speed(device, bfloat16: bool) -> float:
    """FLOP/s of the device's own matrix products, measured. train.py's MFU is relative to it."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    best = 0.0
    for _ in range(6):
        begin = time.time()
        (a @ a)[0, 0].item()                    # .item() waits for the device
        best = max(best, 2 * n**3 / (time.time() - begin))
    return best

# ---------------------------------------------------------------------------- taps
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
        net = make_network(network)
        _, features = net(**dummy_inputs(network, 1, size, 1), features=(tap,))
    return tuple(features[tap].shape[1:])

# ---------------------------------------------------------------------------- memory
def activations(network, batch: int, size: int, tokens: int, bfloat16: bool) -> tuple[int, int]:
    """(bytes that a training pass keeps for its backward pass, those of its greediest layer).

    The greediest layer is also about what a pass without gradients holds at a time. Counted by
    autograd's saved-tensor hooks in a pass on fake tensors, which know autocast: each storage once,
    without parameters. With checkpoint: what enters the layers, what is kept between them, and the
    greediest layer. Without a kernel's temporaries and the allocator's fragments, about 10 %."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    kept = {}           # storage -> (tensor, the layer that kept it); tensors, lest addresses recur
    entered = {}        # storage -> tensor that enters a layer
    current = None      # the layer that runs

    def enter(module, args):
        nonlocal current
        current = module
        entered.update({storage(x): x for x in args if torch.is_tensor(x)})

    def leave(*_):
        nonlocal current
        current = None

    def pack(x):
        kept.setdefault(storage(x), (x, current))
        return x

    with FakeTensorMode():
        net = make_network(replace(network, checkpoint=False))
        for m in net.modules():
            if isinstance(m, (Layer, JointBlock)):
                m.register_forward_pre_hook(enter)
                m.register_forward_hook(leave)
        inputs = dummy_inputs(network, batch, size, tokens)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                net(**inputs)
    for p in net.parameters():
        kept.pop(storage(p), None)
    of_layer = defaultdict(int)
    for x, layer in kept.values():
        of_layer[layer] += x.untyped_storage().nbytes()
    greediest = max(n for layer, n in of_layer.items() if layer is not None)
    if not network.checkpoint:
        return sum(of_layer.values()), greediest
    total = of_layer[None] + greediest
    for key, x in entered.items():
        if key not in kept or kept[key][1] is not None:     # the others are in of_layer[None]
            total += x.untyped_storage().nbytes()
    return total, greediest

def storage(x) -> int:
    return x.untyped_storage()._cdata
