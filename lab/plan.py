"""What a training takes, before anything is trained: parameters, memory by part, FLOPs, days.

    python -m lab.plan --config configs/t2i_1024.toml [gpus=64] [mfu=0.3] [tokens=333] [key=value]

For configs of train.py, distill.py (with the teacher) and adv_distill.py (with all players). It
runs on meta and fake tensors: in seconds, and without weights. Not counted: text encoders and
autoencoder (train from a cache), the text encoder's activations, a kernel's temporaries, what a
checkpointed pass computes again, communication.
"""
import sys
from collections import Counter
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import torch
import torch.nn as nn

from adv_distill import AdvConfig
from adversaries import Critic
from checkpoint import read_description, resolve
from common import UserError, fill, friendly, option, read_config, read_toml, use_bfloat16
from costs import GiB, caption_tokens, forward_flops, kept_storages, tap_shape
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

class Planner:
    """Collects the networks of a training, {name: (module, bytes on each GPU by purpose)}, and its
    FLOPs a picture. Modules are made on the meta device."""
    def __init__(self, cfg: TrainConfig, plan: PlanConfig):
        self.cfg = cfg
        self.parts = {}
        self.flops = 0.0
        self.tokens = plan.tokens or caption_tokens(cfg.text)
        self.device = torch.device("cpu" if cfg.device == "cpu" else "cuda")    # the planned one
        self.bfloat16 = use_bfloat16(cfg.amp, self.device)

    def work(self, network, text=None) -> int:
        return forward_flops(network, self.cfg.data.size, self.tokens, text)

    def activations(self, network) -> tuple[int, int]:
        """(bytes that a training pass keeps for its backward pass, those of its greediest layer).

        The latter is about what a pass without gradients holds. With checkpoint: what enters the
        layers, what is kept between them, and the greediest layer."""
        cfg, plain = self.cfg, replace(network, checkpoint=False)
        kept, entered = kept_storages(plain, cfg.batch, cfg.data.size, self.tokens, self.bfloat16)
        of_layer = Counter()
        for storage, layer in kept.items():
            of_layer[layer] += storage.nbytes()
        between = of_layer.pop(None)
        greediest = max(of_layer.values())
        if not network.checkpoint:
            return between + of_layer.total(), greediest
        between += sum(x.nbytes() for x in entered if kept.get(x, "none") is not None)
        return between + greediest, greediest

    def trained(self, name: str, net: nn.Module, muon_lr=0.0, average=False):
        """A module that is trained, in fp32; where it is a TextToLatents, with activations."""
        each = 4 * count_params(net)
        memory = {"weights": each, "gradients": each, "optimizer": 2 * each}
        for group in Muon(net, self.cfg.lr, muon_lr).param_groups:
            if group["muon"]:                       # one moment, where AdamW has two
                memory["optimizer"] -= 4 * sum(p.numel() for p in group["params"])
        if average:
            memory["average"] = each
        if isinstance(net, TextToLatents):
            memory["activations"] = self.activations(net.denoiser.cfg)[0]
        self.parts[name] = net, memory

    def frozen(self, name: str, network, gradients=False):
        """A network that is asked; gradients: they pass through it to its input."""
        net = make_network(network)
        weights = (4 if self.device.type == "cpu" else 2) * count_params(net)
        kept = self.activations(network)[0 if gradients else 1]
        self.parts[name] = net, {"weights": weights, "activations": kept}

# ---------------------------------------------------------------------------- the stages
def plan_train(p: Planner, cfg: TrainConfig):
    """A backward pass costs twice its forward pass."""
    net = TextToLatents(cfg.network, replace(cfg.text))
    p.trained("network", net, cfg.muon_lr, average=True)
    p.flops += 3 * p.work(cfg.network, cfg.text)

def plan_distill(p: Planner, cfg: DistillConfig):
    plan_train(p, cfg)
    if cfg.needs_teacher:
        teacher = teacher_network(cfg.teacher)
        p.frozen("teacher", teacher)
        p.flops += (1 + (cfg.teacher_cfg != 1)) * p.work(teacher)
    if cfg.featkd:
        C = tap_shape(cfg.network, cfg.student_tap, cfg.data.size)[0]
        D = tap_shape(teacher, teacher_tap(cfg, teacher), cfg.data.size)[0]
        p.trained("projector", nn.Conv2d(C, D, 1), cfg.muon_lr)

def plan_adversarial(p: Planner, cfg: AdvConfig):
    """The student is that of `init`, or the config's own where that is not trained yet."""
    student, text = cfg.network, cfg.text
    try:
        saved = read_description(resolve(cfg.init))
        student = network_of(saved, cfg.init)
        text = fill(TextConfig(), saved["text"], cfg.init)
    except UserError:
        print(f"init={cfg.init} is not there: planned with the config's own network")
    teacher = teacher_network(cfg.teacher) if cfg.teacher else student
    seen = replace(teacher, checkpoint=student.checkpoint)      # by the critic
    S, D = p.work(student), p.work(seen)
    T = (1 + (cfg.teacher_cfg != 1)) * p.work(teacher)
    turns = 1 / cfg.generator_every             # the generator's steps, of all
    p.trained("generator", TextToLatents(student, replace(text)), cfg.muon_lr, average=True)
    p.flops = S + turns * 2 * S                 # forward always, backward in its turn
    if cfg.kd_weight:
        p.flops += turns * cfg.kd_steps * T
    p.frozen("teacher", seen if cfg.has_critic else teacher, cfg.has_critic)
    if cfg.has_critic:
        p.trained("critic", Critic(cfg, SimpleNamespace(denoiser=SimpleNamespace(cfg=seen))))
        near = bool(cfg.r1) + bool(cfg.r2) + cfg.wrong_captions
        p.flops += (2 + near) * D               # real, fake; near them for R1, R2; wrong captions
        p.flops += turns * 2 * D                # for G: forward, and back to the input
        if cfg.loss == "relativistic" or cfg.match_weight:
            p.flops += turns * D                # for G: the real side
    if cfg.has_fake:
        p.trained("fake", TextToLatents(student, replace(text)))
        p.flops += 3 * S + turns * (T + S)      # its own step; for G both scores

STAGES = {TrainConfig: plan_train, DistillConfig: plan_distill, AdvConfig: plan_adversarial}

def make_plan(argv: list[str]) -> dict:
    """Prints what each GPU holds and how long cfg.steps take, and returns the numbers. The stage is
    the first that knows all keys."""
    own = {field.name for field in fields(PlanConfig)}
    plan = read_config(PlanConfig(), [a for a in argv if a.partition("=")[0] in own])
    argv = [a for a in argv if a.partition("=")[0] not in own]
    keys = {a.partition("=")[0].partition(".")[0] for a in argv if "=" in a}
    if argv[:1] == ["--config"] and argv[1:]:
        keys |= read_toml(argv[1]).keys()
    known = [stage for stage in STAGES if keys <= {field.name for field in fields(stage)}]
    stage = known[0] if known else AdvConfig    # it knows the most: its error names the wrong key
    cfg = read_config(stage(), argv, "configs/nano.toml")
    p = Planner(cfg, plan)
    with torch.device("meta"):
        STAGES[stage](p, cfg)

    pictures = cfg.batch * cfg.accumulate * plan.gpus
    speed = plan.mfu * plan.gpus * plan.gpu_tflops * 1e12 / p.flops     # pictures/s
    days = cfg.steps * pictures / speed / 86400
    total = 0
    print(f"a step: {pictures} pictures of {cfg.data.size} px = {plan.gpus} GPUs x batch "
          f"{cfg.batch} x {cfg.accumulate}; captions of {p.tokens} tokens")
    print("GiB on each GPU, without text encoders and autoencoder:")
    for name, (net, memory) in p.parts.items():
        total += 1.1 * sum(memory.values()) / GiB
        sizes = ", ".join(f"{purpose} {n / GiB:.2f}" for purpose, n in memory.items())
        print(f"  {name:9} {count_params(net) / 1e6:8.2f} M  {sizes}")
    fits = total <= plan.gpu_gb
    verdict = "fits" if fits else "does NOT fit: lower batch, or set model.checkpoint=true;"
    print(f"  in all, with a tenth for fragments, {total:.1f}: {verdict} {plan.gpu_gb:g}")
    print(f"work: {p.flops / 1e12:.3g} TFLOPs a picture, {speed:.0f} pictures/s at an MFU of "
          f"{plan.mfu:g} (assumed, not measured) of {plan.gpu_tflops:g} TFLOP/s a GPU")
    print(f"in all: {cfg.steps} steps, {days:.2f} days, {days * plan.gpus:.0f} GPU-days")
    return {"parts": p.parts, "total": total, "fits": fits, "flops": p.flops, "days": days}

if __name__ == "__main__":
    with friendly():
        make_plan(sys.argv[1:])
