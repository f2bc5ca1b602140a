"""What a training takes, before anything is trained: parameters, memory by part, FLOPs, days.

    python -m lab.plan --config configs/t2i_1024.toml [gpus=64] [mfu=0.3] [tokens=333] [key=value]

For configs of train.py, distill.py (with the teacher) and adv_distill.py (with all players). It
runs on meta and fake tensors: in seconds, and without weights. Not counted: text encoders and
autoencoder (train from a cache), the text encoder's activations, a kernel's temporaries, what a
checkpointed pass computes again, communication.
"""
import sys
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import torch
import torch.nn as nn

from adv_distill import AdvConfig, Critic
from checkpoint import read_description, resolve
from common import UserError, fill, friendly, option, read_config, read_toml, use_bfloat16
from costs import GiB, activations, caption_tokens, forward_flops, tap_shape
from distill import DistillConfig, teacher_network, teacher_tap
from model import TextToLatents, count_params, make_network, network_of
from optim import Muon
from text import TextConfig
from train import TrainConfig

@dataclass
class PlanConfig:
    """What is asked beside the training's own config."""
    gpus: int = option(1, low=1)
    gpu_gb: float = option(80.0, above=0)           # GiB of one
    gpu_tflops: float = option(989.0, above=0)      # its peak: an H100 SXM's in bfloat16
    mfu: float = option(0.31, above=0, high=1)      # share of that peak; measured on a CPU alone
    tokens: int = option(0, low=0)                  # of a caption; 0: what text.kind gives

@dataclass
class NetPlan:
    """A network of the training, and the bytes that it takes on each GPU, by purpose."""
    name: str
    kind: str
    params: int
    memory: dict

class Planner:
    """Makes the NetPlans of one training and counts its FLOPs."""
    def __init__(self, cfg: TrainConfig, plan: PlanConfig):
        self.cfg = cfg
        self.size = cfg.data.size
        self.tokens = plan.tokens or caption_tokens(cfg.text)
        self.device = torch.device("cpu" if cfg.device == "cpu" else "cuda")    # the planned one
        self.bfloat16 = use_bfloat16(cfg.amp, self.device)

    def flops(self, network, text=None) -> int:
        return forward_flops(network, self.size, self.tokens, text)

    def kept(self, network) -> tuple[int, int]:
        return activations(network, self.cfg.batch, self.size, self.tokens, self.bfloat16)

    def trained(self, name: str, module: nn.Module, muon_lr=0.0, average=False, network=None):
        """A module that is trained, in fp32; network: the denoiser in it, which has activations."""
        params = count_params(module)
        groups = Muon(module, self.cfg.lr, muon_lr).param_groups
        memory = {"weights": 4 * params, "gradients": 4 * params}
        if average:
            memory["average"] = 4 * params
        memory["optimizer"] = 0
        for group in groups:                        # one moment with Muon, two with AdamW
            bytes_each = 4 if group["muon"] else 8
            memory["optimizer"] += bytes_each * sum(p.numel() for p in group["params"])
        if network:
            memory["activations"] = self.kept(network)[0]
        kind = type(module.denoiser if network else module).__name__
        return NetPlan(name, kind, params, memory)

    def student(self, name: str, network, text: TextConfig, muon_lr=0.0, average=True) -> NetPlan:
        """A denoiser that is trained with its text encoder."""
        with torch.device("meta"):
            net = TextToLatents(network, replace(text))
        return self.trained(name, net, muon_lr, average, network)

    def frozen(self, name: str, network, gradients=False) -> NetPlan:
        """A network that is asked; gradients: they pass through it to its input."""
        with torch.device("meta"):
            net = make_network(network)
        params = count_params(net)
        memory = {"weights": (4 if self.device.type == "cpu" else 2) * params,
                  "activations": self.kept(network)[0 if gradients else 1]}
        return NetPlan(name, type(net).__name__, params, memory)

# ---------------------------------------------------------------------------- the stages
def plan_train(p: Planner, cfg: TrainConfig) -> tuple[list[NetPlan], float]:
    """(parts, FLOPs a picture). A backward pass costs twice its forward pass."""
    parts = [p.student("network", cfg.network, cfg.text, cfg.muon_lr)]
    return parts, 3 * p.flops(cfg.network, cfg.text)

def plan_distill(p: Planner, cfg: DistillConfig) -> tuple[list[NetPlan], float]:
    parts, flops = plan_train(p, cfg)
    parts[0].name = "student"
    if cfg.kd or cfg.featkd:
        teacher = teacher_network(cfg.teacher)
        parts.append(p.frozen("teacher", teacher))
        flops += (1 + (cfg.teacher_cfg != 1)) * p.flops(teacher)
    if cfg.featkd:
        C = tap_shape(cfg.network, cfg.student_tap, p.size)[0]
        D = tap_shape(teacher, teacher_tap(cfg, teacher), p.size)[0]
        with torch.device("meta"):
            parts.append(p.trained("projector", nn.Conv2d(C, D, 1), cfg.muon_lr))
    return parts, flops

def plan_adversarial(p: Planner, cfg: AdvConfig) -> tuple[list[NetPlan], float]:
    """The student is that of `init`, or the config's own where that is not trained yet."""
    student, text = cfg.network, cfg.text
    try:
        saved = read_description(resolve(cfg.init))
        student = network_of(saved, cfg.init)
        text = fill(TextConfig(), saved["text"], cfg.init)
    except UserError:
        print(f"init={cfg.init} is not there: planned with the config's own network")
    teacher = teacher_network(cfg.teacher) if cfg.teacher else student
    seen = teacher if cfg.critic == "teacher" else student      # by the critic
    seen = replace(seen, checkpoint=student.checkpoint)
    S, T, D = p.flops(student), p.flops(teacher), p.flops(seen)
    T *= 1 + (cfg.teacher_cfg != 1)
    turns = 1 / cfg.generator_every             # the generator's steps, of all
    parts = [p.student("generator", student, text, cfg.muon_lr)]
    flops = S + turns * 2 * S                   # forward always, backward in its turn
    if cfg.backward_simulation:
        flops += (cfg.K - 1) / 2 * S            # on the way to x_t, on average
    if cfg.kd_weight:
        flops += turns * cfg.kd_steps * T
    gradients = cfg.method != "dmd" and cfg.critic == "teacher"
    parts.append(p.frozen("teacher", seen if gradients else teacher, gradients))
    if cfg.method != "dmd":
        if cfg.critic == "init":
            parts.append(p.frozen("features", seen, gradients=True))
        with torch.device("meta"):
            heads = Critic(cfg, SimpleNamespace(denoiser=SimpleNamespace(cfg=seen)))
        parts.append(p.trained("critic", heads))
        flops += (2 + bool(cfg.r1)) * D         # real, fake, and for R1 near the real
        flops += turns * 2 * D                  # for G: forward, and back to the input
    if cfg.method != "gan":
        parts.append(p.student("fake", student, text, average=False))
        flops += 3 * S + turns * (T + S)        # its own step; for G both scores
    return parts, flops

STAGES = {TrainConfig: plan_train, DistillConfig: plan_distill, AdvConfig: plan_adversarial}

# ---------------------------------------------------------------------------- the report
def report(cfg, p: Planner, plan: PlanConfig, parts: list[NetPlan], flops: float) -> dict:
    """Prints what each GPU holds and how long cfg.steps take, and returns the numbers."""
    pictures = cfg.batch * cfg.accumulate * plan.gpus
    total = sum(sum(part.memory.values()) for part in parts) / GiB
    speed = plan.mfu * plan.gpus * plan.gpu_tflops * 1e12 / flops       # pictures/s
    days = cfg.steps * pictures / speed / 86400
    print(f"a step: {pictures} pictures of {p.size} px = {plan.gpus} GPUs x batch {cfg.batch} x "
          f"{cfg.accumulate} accumulated; captions of {p.tokens} tokens; "
          f"{'bfloat16' if p.bfloat16 else 'float32'}")
    print("GiB on each GPU, without text encoders and autoencoder:")
    for part in parts:
        memory = ", ".join(f"{purpose} {n / GiB:.2f}" for purpose, n in part.memory.items())
        print(f"  {part.name:9} {part.params / 1e6:8.2f} M {part.kind:7}{memory}")
    fits = 1.1 * total <= plan.gpu_gb
    verdict = "fits" if fits else "does NOT fit: lower batch, or set model.checkpoint=true;"
    print(f"  in all {total:.1f}, with a tenth for fragments {1.1 * total:.1f}: {verdict} "
          f"{plan.gpu_gb:g}")
    print(f"work: {flops / 1e12:.3g} TFLOPs a picture, {flops * pictures / 1e15:.3g} PFLOPs a step")
    if p.device.type == "cuda":
        print(f"speed: {speed:.0f} pictures/s at an MFU of {plan.mfu:g} (assumed, not measured) of "
              f"{plan.gpu_tflops:g} TFLOP/s a GPU\nin all: {cfg.steps} steps, "
              f"{cfg.steps * pictures / 1e6:.1f} M pictures, {days:.2f} days on {plan.gpus} GPUs "
              f"({days * plan.gpus:.0f} GPU-days)")
    return {"parts": {part.name: part for part in parts}, "total": total, "fits": fits,
            "flops": flops, "speed": speed, "days": days}

def stage_of(argv: list[str]):
    """The config class of the first stage that knows all keys of a TOML and of the command line."""
    keys = {a.removeprefix("--").partition("=")[0].partition(".")[0] for a in argv if "=" in a}
    if argv[:1] == ["--config"] and len(argv) > 1:
        keys |= read_toml(argv[1]).keys()
    for stage in STAGES:
        if keys <= {field.name for field in fields(stage)}:
            return stage
    return AdvConfig                            # it knows the most: its error names the wrong key

def make_plan(argv: list[str]) -> dict:
    own = {field.name for field in fields(PlanConfig)}
    plan = read_config(PlanConfig(), [a for a in argv if a.partition("=")[0] in own])
    rest = [a for a in argv if a.partition("=")[0] not in own]
    stage = stage_of(rest)
    cfg = read_config(stage(), rest, "configs/nano.toml")
    planner = Planner(cfg, plan)
    return report(cfg, planner, plan, *STAGES[stage](planner, cfg))

if __name__ == "__main__":
    with friendly():
        make_plan(sys.argv[1:])
