"""What a training needs, before anything is trained: parameters, memory by part, FLOPs, pictures/s, days. It runs on meta and fake tensors, in seconds.

    python train.py --config configs/t2i_1024.toml --dry-run [gpus=64] [mfu=0.3] [gpu_gb=80] [gpu_tflops=989] [key=value ...]
    python distill.py --config configs/kd_sd35.toml --dry-run           with the teacher; and adv_distill.py, with all its players

Not counted: encoders and decoder (train from a cache), the text encoder's activations, heads of a discriminator, a kernel's temporaries, the network's own communication.
"""
import time
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from common import UserError, use_bfloat16
from mmdit import Block, MMDiT, MMDiTConfig
from model import Layer, UNet, UNetConfig, count_params
from optim import Muon
from sample import TextToLatents, build, chosen

GiB = 2**30
MEASURED_MFU = 0.31             # median of docs/small2_log.csv: `small` on a CPU in bfloat16. None was measured on a GPU yet


# ---------------------------------------------------------------------------- passes that compute nothing
def inputs(network: UNetConfig | MMDiTConfig, batch: int, size: int, tokens: int) -> tuple[list, dict]:
    """Of a network's forward pass, on the device of the context."""
    args = [torch.empty(batch, network.in_channels, size // 8, size // 8), torch.empty(batch), torch.empty(batch, tokens, network.context_dim), torch.empty(batch, tokens, dtype=torch.bool)]
    return args, {"pooled": torch.empty(batch, network.pooled_dim)} if isinstance(network, MMDiTConfig) else {}


def with_text(cfg, network) -> nn.Module:
    """The network with our own text encoder, where it reads that one's states; states of another width come from a cache."""
    with torch.device("meta"):
        return TextToLatents(network, replace(cfg.text)) if network.context_dim == cfg.text.width else build(network)


def forward_flops(network, size: int, tokens: int, text: nn.Module | None = None) -> int:
    """Of one picture's forward pass, and of its text encoder's. On the meta device: on CPU tensors the counter takes attention for nothing."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        args, pooled = inputs(network, 1, size, tokens)
        build(network)(*args, **pooled)
        if text is not None:
            text(torch.empty(1, tokens, dtype=torch.long), args[3])
    return counter.get_total_flops()


def training_flops(cfg, network) -> int:
    """Of flow training on one picture: the backward pass costs twice the forward one."""
    return 3 * forward_flops(network, cfg.data.size, cfg.tokens, getattr(with_text(cfg, network), "text", None))


def costs(cfg, device, amp_on: bool) -> tuple[float, float]:
    """(FLOPs of training on one picture, the device's own matmul FLOP/s, measured). Their ratio with the speed is the model FLOPs utilisation of the log line."""
    n, dtype = (8192 if device.type == "cuda" else 1024), torch.bfloat16 if amp_on else torch.float32
    a, best = torch.randn(n, n, device=device, dtype=dtype), 0.0
    for _ in range(6):
        begin = time.time()
        (a @ a)[0, 0].item()                                    # .item() waits for the device
        best = max(best, 2 * n**3 / (time.time() - begin))
    return training_flops(cfg, chosen(cfg.arch, cfg.model, cfg.mmdit)), best


def tap_names(network) -> list[str]:
    """The features that a network can give."""
    if isinstance(network, MMDiTConfig):
        return [f"block{i}" for i in range(network.layers)]
    stages = range(len(network.widths))
    return [f"down{i}" for i in stages] + ["mid"] + [f"up{i}" for i in stages]


def tap_shape(network, tap: str, size: int) -> tuple[int, int, int]:
    """(C, h, w) of one of them."""
    with torch.device("meta"), torch.no_grad():
        net, (args, pooled), names = build(network), inputs(network, 1, size, 1), tap_names(network)
        if tap not in names:
            raise UserError(f"no tap '{tap}' in the {type(net).__name__}: it has " + ", ".join(names))
        return tuple(net(*args, features=(tap,), **pooled)[1][tap].shape[1:])


def activations(network, batch: int, size: int, tokens: int, amp: bool) -> tuple[int, int]:
    """Bytes that a training pass of a UNet or MMDiT keeps for its backward pass, and those of its greediest layer alone, which is also about what a pass
    without gradients holds at a time. Counted, not modelled: a forward pass on fake tensors (meta tensors that know autocast) under autograd's saved-tensor
    hooks, each storage once, parameters left out. With checkpoint: the layers' inputs, what lies between them, and the greediest layer.
    Not in it: the temporaries of a kernel, the allocator's fragments (10 % is a fair allowance)."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    kept, into, unit = {}, {}, [None]

    def enter(module, args):
        unit[0] = module
        into.update({x.untyped_storage()._cdata: x for x in args if torch.is_tensor(x)})

    def pack(x):                                                # keeps x, lest a later tensor gets its address
        kept.setdefault(x.untyped_storage()._cdata, (x, unit[0]))
        return x
    with FakeTensorMode():
        net = build(replace(network, checkpoint=False))
        for m in net.modules():
            if isinstance(m, (Layer, Block)):
                m.register_forward_pre_hook(enter)
                m.register_forward_hook(lambda *_: unit.__setitem__(0, None))
        args, pooled = inputs(network, batch, size, tokens)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            net(*args, **pooled)
    for p in net.parameters():
        kept.pop(p.untyped_storage()._cdata, None)
    of = defaultdict(int)
    for x, where in kept.values():
        of[where] += x.untyped_storage().nbytes()
    greediest, total = max(v for k, v in of.items() if k is not None), sum(of.values())
    if network.checkpoint:
        total = of[None] + greediest + sum(x.untyped_storage().nbytes() for k, x in into.items() if k not in kept or kept[k][1] is not None)
    return total, greediest


# ---------------------------------------------------------------------------- players
@dataclass
class Part:
    name: str
    kind: str
    params: int
    bytes: dict                 # what lies on one GPU, by part


def in_bfloat16(cfg) -> bool:
    """Whether the planned device, not this one, computes in bfloat16: a GPU does."""
    return use_bfloat16(cfg.amp, torch.device("cpu")) if cfg.device == "cpu" else cfg.amp != "float32"


def kind_of(network) -> str:
    return (MMDiT if isinstance(network, MMDiTConfig) else UNet).__name__


def trained(cfg, name: str, network=None, beside: nn.Module | None = None, average: bool = True, muon_lr: float = 0.0) -> Part:
    """A network that is trained, in fp32, and what is trained beside it (a projector; or, without a network, the heads of a discriminator)."""
    net, beside = nn.Identity() if network is None else with_text(cfg, network), beside or nn.Identity()
    both, cut = nn.ModuleList([net, beside]), cfg.gpus if cfg.shard else 1
    moments = sum(p.numel() * (4 if g["muon"] else 8) for g in Muon(both, cfg.lr, muon_lr).param_groups for p in g["params"])
    n, n_beside = count_params(net), count_params(beside)
    out = {"weights": 4 * (n + n_beside), "gradients": 4 * (n + n_beside), "average": average * 4 * n, "optimiser": moments}
    out = {k: v // cut for k, v in out.items() if v}
    if network is None:
        return Part(name, "heads", n_beside, out)
    out["activations"] = activations(network, cfg.batch, cfg.data.size, cfg.tokens, in_bfloat16(cfg))[0]
    return Part(name, kind_of(network) + (f" + projector {n_beside / 1e6:.2f} M" if n_beside else ""), n, out)


def frozen(cfg, name: str, network, gradients: bool = False) -> Part:
    """A network that is asked, in bfloat16 on a GPU; gradients: they pass through it to its input."""
    with torch.device("meta"):
        n = count_params(build(network))
    return Part(name, kind_of(network), n, {"weights": (4 if cfg.device == "cpu" else 2) * n, "activations": activations(network, cfg.batch, cfg.data.size, cfg.tokens, in_bfloat16(cfg))[0 if gradients else 1]})


# ---------------------------------------------------------------------------- the report
def report(cfg, parts: list[Part], flops: float) -> dict:
    """Prints, and returns in numbers, what the players need on each GPU, and how long cfg.steps take; flops: of all that is computed for a picture."""
    pictures = cfg.batch * cfg.accumulate * cfg.gpus
    total = sum(b for p in parts for b in p.bytes.values()) / GiB
    fits, speed = 1.1 * total < cfg.gpu_gb, cfg.mfu * cfg.gpus * cfg.gpu_tflops * 1e12 / flops
    days = cfg.steps * pictures / speed / 86400
    out = {"total": total, "fits": fits, "flops": flops, "speed": speed, "days": days, **{p.name: p.params for p in parts}, **{f"{p.name} {k}": v for p in parts for k, v in p.bytes.items()}}
    print(f"a step: {pictures} pictures of {cfg.data.size} px = {cfg.gpus} GPUs x batch {cfg.batch} x {cfg.accumulate} accumulated; captions of {cfg.tokens} tokens; "
          f"{'bfloat16' if in_bfloat16(cfg) else 'float32'}; {'cut over the GPUs (shard)' if cfg.shard else 'all weights on every GPU'}")
    print("GiB on each GPU, without text encoders and autoencoder:")
    for p in parts:
        print(f"  {p.name:9} {p.params / 1e6:8.2f} M {p.kind:5}  " + ", ".join(f"{k} {v / GiB:.2f}" for k, v in p.bytes.items()))
    print(f"  in all {total:.1f}, with a tenth for fragments {1.1 * total:.1f}: " + (f"fits {cfg.gpu_gb:g}" if fits else
          f"does NOT fit {cfg.gpu_gb:g}: lower batch (and raise accumulate), or set model.checkpoint=true or shard=true"))
    print(f"work: {flops / 1e12:.2f} TFLOPs a picture, {flops * pictures / 1e15:.2f} PFLOPs a step (what checkpointing repeats is not counted)")
    if cfg.device == "cpu":
        print("speed: train.py's log line measures a CPU's")
        return out
    whose = "measured by this repository on a CPU in bfloat16, docs/small2_log.csv; none on a GPU yet" if cfg.mfu == MEASURED_MFU else "as given, not measured"
    print(f"speed: {speed:.0f} pictures/s at an MFU of {cfg.mfu:g} ({whose}) of {cfg.gpu_tflops:g} TFLOP/s a GPU")
    print(f"in all: {cfg.steps} steps, {cfg.steps * pictures / 1e6:.1f} M pictures, {days:.2f} days on {cfg.gpus} GPUs ({days * cfg.gpus:.0f} GPU-days)")
    return out


def dry_run(cfg) -> dict:
    """Of train.py."""
    network = chosen(cfg.arch, cfg.model, cfg.mmdit)
    return report(cfg, [trained(cfg, "network", network, muon_lr=cfg.muon_lr)], training_flops(cfg, network))
