"""What a network costs, and the features that it can give: by passes on meta and fake tensors."""
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from common import UserError
from mmdit import JointBlock, MMDiTConfig
from model import Layer, UNetConfig, make_network
from text import TextConfig, TextEncoder, Tokens

GiB = 2**30

def dummy_inputs(network, batch: int, size: int, tokens: int) -> dict:
    """Arguments of a network's forward pass at `size` pixels, on the context's device."""
    return {
        "x": torch.empty(batch, network.in_channels, size // 8, size // 8),
        "t": torch.empty(batch),
        "context": torch.empty(batch, tokens, network.context_dim),
        "mask": torch.empty(batch, tokens, dtype=torch.bool),
        "pooled": torch.empty(batch, getattr(network, "pooled_dim", 0)),
    }

def caption_tokens(text: TextConfig) -> int:
    """Tokens of a caption: a scene's typical ones, or all places of the frozen encoders."""
    return {"own": 16, "clip-l": 77}.get(text.kind, 77 + text.tokens)

def forward_flops(network, size: int, tokens: int, text: TextConfig | None = None) -> int:
    """FLOPs of a forward pass on one picture; with `text` also those of our own text encoder."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        inputs = dummy_inputs(network, 1, size, tokens)
        make_network(network)(**inputs)
        if text is not None and text.kind == "own":
            TextEncoder(text)(Tokens(torch.empty(1, tokens, dtype=torch.long), inputs["mask"]))
    return counter.get_total_flops()

def training_flops(cfg) -> int:
    """FLOPs of a TrainConfig's flow training on one picture: backward costs twice forward."""
    return 3 * forward_flops(cfg.network, cfg.data.size, caption_tokens(cfg.text), cfg.text)

def matmul_speed(device, bfloat16: bool) -> float:
    """FLOP/s of the device's own matrix products, measured. train.py's MFU is relative to it."""
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
