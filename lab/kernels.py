"""The kernels that a training step spends its time in, by torch.profiler.

    python -m lab.kernels [--config configs/base.toml] [key=value ...]      compile=false: eager
"""
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from common import friendly, read_config, setup
from compiling import compile_blocks
from lab.bench import training_step, wait_for
from model import TextToLatents
from optim import EMA, Learner, Muon
from train import FlowObjective, TrainConfig

STEPS = 3           # of the profile

def profiled(cfg: TrainConfig, device):
    """(the profile of STEPS steps, their kernels: of a CPU its operations)."""
    objective = FlowObjective(TextToLatents(cfg.network, cfg.text)).to(device)
    opt = Muon(objective, cfg.lr, cfg.muon_lr, cfg.weight_decay, compile=cfg.compile)
    if cfg.compile:
        compile_blocks(objective.net, dynamic=False)
    learner = Learner(objective, opt, cfg.clip, EMA(objective.net, cfg.ema))
    tokens = cfg.text.max_tokens if cfg.text.kind == "own" else 0
    step = training_step(cfg, objective, cfg.batch, device, learner.step, tokens)
    for _ in range(3):                              # compiles, warms up
        step()
    wait_for(device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        wait_for(device)
    kind = getattr(torch.autograd.DeviceType, device.type.upper())
    return found, [event for event in found.events() if event.device_type == kind]

def main(argv):
    cfg = read_config(TrainConfig(), argv, "configs/base.toml")
    device = setup(cfg.device)[0]
    found, kernels = profiled(cfg, device)
    kind = "cuda" if device.type == "cuda" else "cpu"
    print(found.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=20,
                                     max_name_column_width=60))
    busy = sum(event.self_device_time_total if kind == "cuda" else event.self_cpu_time_total
               for event in kernels) / 1e3 / STEPS
    print(f"{len(kernels) / STEPS:.0f} kernels a step, {busy:.1f} ms busy", flush=True)

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
