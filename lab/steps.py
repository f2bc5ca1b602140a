"""The training step by form: time, MFU, memory, compilation. For a GPU; tiny jobs run on a CPU.

    python -m lab.steps step [--jobs "configs/base.toml batch=512" ...] [--forms eager blocks whole]
    python -m lab.steps step --fill --jobs "configs/t2i_1024.toml"    at the largest batch that fits
    python -m lab.steps depthwise           a network's depthwise 3x3 convolutions in three forms

A job is a config of train.py and what is changed in it. Beside what is measured: what the card
allows (bench.training_floor) and what lab.plan predicts of the memory.
"""
import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import friendly, peak_memory, read_config, setup, use_bfloat16
from compiling import compile_blocks, load_compiled, save_compiled
from costs import GiB, caption_tokens, card_of, device_peak, dummy_inputs, training_flops
from lab import plan
from lab.bench import (
    forget_peak,
    in_turns,
    seconds_of,
    training_floor,
    training_step,
    write_found,
)
from model import TextToLatents, make_network
from optim import EMA, Learner, Muon, compile_many
from processes import meanwhile
from train import FlowObjective, TrainConfig

JOBS = {        # of a GPU, of a CPU
    "cuda": ("configs/base.toml", "configs/t2i_256.toml batch=64",
             "configs/t2i_256.toml batch=128 model.checkpoint=true",
             "configs/t2i_1024.toml batch=8 model.checkpoint=false", "configs/t2i_1024.toml"),
    "cpu": ("configs/nano.toml batch=4", "configs/nano.toml batch=4 model.checkpoint=true"),
}

# ------------------------------------------------------------------------- a step, by form
def compile_whole(net):
    compile_many()
    net.compile(dynamic=False)

FORMS = {"eager": None, "blocks": partial(compile_blocks, dynamic=False), "whole": compile_whole}

def planned_gib(words: str, batch: int) -> float:
    """What lab.plan says of a training's memory."""
    with contextlib.redirect_stdout(io.StringIO()):
        return plan.make_plan(["--config", *words.split(), f"batch={batch}"])["total"]

def largest_batch(words: str, gib: float) -> int:
    """By lab.plan; memory is nearly linear in the batch."""
    less, more = (planned_gib(words, batch) for batch in (16, 32))
    return max(1, int(16 + (gib - less) * 16 / (more - less)))

def made(words: str, form: str, batch: int, device):
    """(config, tokens of a caption, optimizer, {"step": .., "passes": ..}) as train.py makes them;
    passes: without the optimizer."""
    cfg = read_config(TrainConfig(), ["--config", *words.split()])
    tokens = cfg.text.max_tokens if cfg.text.kind == "own" else caption_tokens(cfg.text)
    objective = FlowObjective(TextToLatents(cfg.network, cfg.text)).to(device)
    opt = Muon(objective, cfg.lr, cfg.muon_lr, cfg.weight_decay, compile=form != "eager")
    learner = Learner(objective, opt, cfg.clip, EMA(objective.net, cfg.ema))
    if FORMS[form]:
        FORMS[form](objective.net)
    make = partial(training_step, cfg, objective, batch, device, tokens=tokens)
    clear = partial(opt.zero_grad, set_to_none=True)
    return cfg, tokens, {"step": make(learner.step), "passes": make(clear)}

def cold_start(words: str, form: str, batch: int, device: str, folder: str):
    """In a process of its own: leaves the seconds of the first step, and what it compiled."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cold"
    device = setup(device)[0]
    step = made(words, form, batch, device)[2]["step"]
    seconds = seconds_of(step, device)
    save_compiled(Path(folder) / "compiled.bin", device)
    (Path(folder) / "seconds").write_text(str(seconds), "utf-8")

def first_steps(words: str, form: str, batch: int, step, args, device) -> tuple[float, float]:
    """Seconds of the first step with what it compiles: without any cache, and with our file."""
    if not FORMS[form]:
        return seconds_of(step, device), float("nan")
    kept, cold = os.environ.get("TORCHINDUCTOR_CACHE_DIR"), float("nan")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with meanwhile(cold_start, words, form, batch, args.device, folder):
            pass
        with contextlib.suppress(OSError):
            cold = float((Path(folder) / "seconds").read_text("utf-8"))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/warm"
        torch.compiler.reset()
        load_compiled(Path(folder) / "compiled.bin", device)
        warm = seconds_of(step, device)
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
    os.environ.update({"TORCHINDUCTOR_CACHE_DIR": kept} if kept else {})
    return cold, warm

def step_row(words: str, form: str, batch: int, args, device) -> dict:
    """One config's training step in one form; its memory at the peak."""
    before = forget_peak(device)
    cfg, tokens, runs = made(words, form, batch, device)
    cold, warm = first_steps(words, form, batch, runs["step"], args, device)
    in_turns(runs, 2, device)                               # warms up
    seconds = in_turns(runs, args.rounds, device)
    peak, source = device_peak(device, use_bfloat16(cfg.amp, device))
    img_s, card = batch / seconds["step"], card_of(source)
    floor = training_floor(cfg.network, cfg.data.size, tokens, batch, card)[1] if card else 0.0
    return {"job": words, "form": form, "batch": batch, "s": seconds["step"], "img_s": img_s,
            "optimizer": 1 - seconds["passes"] / seconds["step"],
            "mfu": img_s * training_flops(cfg, tokens) / peak, "floor": floor / seconds["step"],
            "gib": peak_memory(device) - before, "planned": planned_gib(words, batch),
            "cold": cold, "warm": warm, "of": f"{peak / 1e12:.3g} TFLOP/s ({source})"}

def measure_steps(args, device) -> dict:
    """Each job in each form; with --fill at the largest batch. What --limit leaves out is named."""
    rows, begin = [], time.time()
    total = args.memory
    if device.type == "cuda" and not total:
        total = torch.cuda.get_device_properties(device).total_memory / GiB
    for words in args.jobs or JOBS["cuda" if device.type == "cuda" else "cpu"]:
        batch = read_config(TrainConfig(), ["--config", *words.split()]).batch
        if args.fill:
            batch = largest_batch(words, total)
        for form in args.forms:
            if rows and time.time() - begin > args.limit:
                print(f"left out after {args.limit} s: {words}, {form}", flush=True)
                continue
            while True:
                try:
                    rows.append(step_row(words, form, batch, args, device))
                    break
                except torch.OutOfMemoryError:
                    print(f"{words}, {form}: {batch} pictures do not fit", flush=True)
                if not args.fill or batch == 1:
                    break
                batch = int(0.9 * batch)
            print(rows[-1:], flush=True)                    # a cut run leaves what it has measured
    return {"rows": rows}

# ------------------------------------------------------------------------- depthwise 3x3
def native(x, weight, bias, stride: int):
    return F.conv2d(x, weight, bias, stride, 1, groups=len(weight))

def shifted(x, weight, bias, stride: int):
    """The same by nine shifted products, which torch.compile makes one kernel of."""
    H, W = x.shape[2:]
    x, y = F.pad(x, (1, 1, 1, 1)), bias[:, None, None]
    for i in range(3):
        for j in range(3):
            y = y + x[:, :, i:i + H:stride, j:j + W:stride] * weight[:, :, i, j, None]
    return y                                                # (B, C, H / stride, W / stride)

def depthwise_shapes(network, size: int) -> Counter:
    """{(C, H, W, stride): how often} of a network's depthwise convolutions."""
    found = Counter()

    def note(module, inputs, out):
        if module.groups > 1:
            found[(*inputs[0].shape[1:], module.stride[0])] += 1

    with torch.device("meta"), torch.no_grad():
        net = make_network(network)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        net(**dummy_inputs(network, 1, size, 1))
    return found

def measure_depthwise(args, device) -> dict:
    """Forward and backward of each job's depthwise convolutions, in three forms."""
    compile_many()
    forms = {"native": (native, torch.contiguous_format), "nhwc": (native, torch.channels_last),
             "shifted": (torch.compile(shifted, dynamic=False), torch.channels_last)}
    dtype, rows = torch.bfloat16 if device.type == "cuda" else torch.float32, []
    for words in args.jobs or JOBS["cuda" if device.type == "cuda" else "cpu"][:1]:
        cfg = read_config(TrainConfig(), ["--config", *words.split()])
        for (C, H, W, stride), n in depthwise_shapes(cfg.network, cfg.data.size).items():
            def make(*shape, like=torch.contiguous_format):
                x = torch.randn(*shape, device=device, dtype=dtype)
                return x.to(memory_format=like).requires_grad_()

            runs = {}
            for name, (form, like) in forms.items():
                x, weight = make(cfg.batch, C, H, W, like=like), make(C, 1, 3, 3)
                bias, given = make(C), (x, weight)
                out = make(cfg.batch, C, H // stride, W // stride, like=like).detach()

                def both(form=form, given=given, bias=bias, out=out, stride=stride):
                    torch.autograd.grad(form(*given, bias, stride), (*given, bias), out)
                runs[name] = both
            in_turns(runs, 2, device)                       # warms up
            seconds = in_turns(runs, args.rounds, device)
            rows.append({"job": words, "shape": f"{C} x {H} x {W}, stride {stride}", "times": n,
                         **{name: 1e3 * s for name, s in seconds.items()}})
        every = {name: sum(row["times"] * row[name] for row in rows if row["job"] == words)
                 for name in forms}
        rows.append({"job": words, "shape": "all", "times": "", **every})
    return {"rows": rows}

SUBJECTS = {"step": measure_steps, "depthwise": measure_depthwise}

def main(argv):
    p = argparse.ArgumentParser(prog="python -m lab.steps", description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("subjects", nargs="+", choices=[*SUBJECTS])
    p.add_argument("--device", default="auto")
    p.add_argument("--rounds", type=int, default=5, help="turns; the median counts")
    p.add_argument("--jobs", nargs="+", default=[], metavar="'CONFIG key=value ..'",
                   help="of step and depthwise; by default those of this device")
    p.add_argument("--forms", nargs="+", default=["eager", "blocks"], choices=[*FORMS])
    p.add_argument("--fill", action="store_true", help="step: the largest batch that fits")
    p.add_argument("--memory", type=float, default=0.0, help="GiB to fill; 0: the GPU's")
    p.add_argument("--limit", type=float, default=3600.0, help="seconds: step begins no more rows")
    p.add_argument("--out", default="runs/steps", help="folder")
    args = p.parse_args(argv)
    device = setup(args.device)[0]
    for subject in args.subjects:
        write_found(subject, SUBJECTS[subject](args, device), args.out, device)

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
