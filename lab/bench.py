"""What each part costs: time, memory and work, beside its peers, measured on one machine.

    python -m lab.bench unet decoder              one evaluation, ours and its peers
    python -m lab.bench sample train data         where a picture's time goes, a step, the loader
    python -m lab.bench all --out docs/results    the numbers of docs/BENCH.md (then: lab.tables)

Machines are noisy, so a peer is timed in turns with ours (A B A B ...), and the ratio is of the
medians. What the machine's own matrix product reaches is measured in between.
"""
import argparse
import contextlib
import ctypes
import gc
import json
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import (
    UserError,
    autocast,
    friendly,
    peak_memory,
    provenance,
    read_config,
    setup,
    use_bfloat16,
)
from costs import (
    GiB,
    caption_tokens,
    card_of,
    dummy_inputs,
    forward_flops,
    matmul_speed,
    training_flops,
)
from data import Batch, Batches
from decoder import load_autoencoder
from lab import tables
from lab.peers import DECODERS, DENOISERS, Peer
from mmdit import MMDiTConfig
from model import TextToLatents, count_params, load_model, make_network
from optim import Learner, Muon
from sample import generate, sampling
from text import Text, Tokens, load_vocabulary
from train import FlowObjective, TrainConfig

H200 = card_of("H200")              # FLOP/s in bfloat16, bytes/s of its memory
TRAININGS = {   # pictures a step on a CPU and on a GPU; heads of an MMDiT of about as many FLOPs
    "configs/nano.toml": (48, 0, 5),
    "configs/base.toml": (4, 256, 6),
    "configs/t2i_256.toml": (0, 64, 15),
}
CAPTION = "a red car to the left of a blue dog"

# ------------------------------------------------------------------------- instruments
def wait_for(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()           # torch.cuda, torch.mps

def seconds_of(function, device) -> float:
    wait_for(device)
    begin = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - begin

def in_turns(functions: dict, rounds: int, device) -> dict[str, float]:
    """Median seconds of each function, called A B C A B C ..."""
    taken = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            taken[name].append(seconds_of(function, device))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}

def forget_peak(device) -> float:
    """Sets common.peak_memory back to what is in use now, and returns that (GiB)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError, AttributeError):  # not on Linux
            ctypes.CDLL("libc.so.6").malloc_trim(0)         # what keep_memory_mapped() kept
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")   # see man 5 proc
    return peak_memory(device)

# ------------------------------------------------------------------------- networks
def prepare(peer: Peer, size: int, device) -> tuple:
    """(one evaluation as a function, bytes that it takes, weights included)"""
    before = forget_peak(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    net = peer.make().to(device, dtype).eval().requires_grad_(False)
    if peer.nhwc:
        net.to(memory_format=torch.channels_last)
    inputs = [x.to(device, dtype) for x in peer.inputs(size)]
    run = partial(peer.call, net, *inputs)
    seconds_of(run, device)                                 # warms up
    return run, round((peak_memory(device) - before) * GiB)

def race(peers: dict[str, Peer], args, device) -> dict:
    """Ours, then each peer in turns with ours; `share`: of the matrix product's median speed."""
    rows, speeds = [], []
    ours, peak = prepare(peers["ours"], args.size, device)
    for name, peer in tqdm(peers.items(), unit="network"):
        if name != "ours" and args.nets and name not in args.nets:
            continue
        runs = {"ours": ours}                               # frees the last peer
        if name != "ours":
            runs[name], peak = prepare(peer, args.size, device)
        seconds = in_turns(runs, args.rounds, device)
        speeds.append(matmul_speed(device, device.type == "cuda"))
        rows.append({
            "net": name, "name": peer.name, **peer.work(args.size), "s": seconds[name],
            "ratio": seconds[name] / seconds["ours"], "peak": peak,
        })
    for row in rows:
        row["share"] = row["flops"] / row["s"] / statistics.median(speeds)
    return {"size": args.size, "rows": rows, "peak_flops": speeds}

# ------------------------------------------------------------------------- sampling
def time_calls(owner, method: str, spent: Counter, part: str, device):
    """From now on each call of owner.method adds its seconds to spent[part]."""
    inner = getattr(owner, method)

    def timed(*args, **kwargs):
        out = []
        spent[part] += seconds_of(lambda: out.append(inner(*args, **kwargs)), device)
        return out[0]
    setattr(owner, method, timed)

def measure_sampling(args, device) -> dict:
    """Median seconds a picture, in all and inside each network; and the share outside them."""
    net, config = load_model("assets/fast", device)
    ae = load_autoencoder("assets/ae", device)
    size, how = config["data"]["size"], sampling(config)
    spent = Counter()
    time_calls(net, "encode", spent, "text", device)
    time_calls(net.denoiser, "keys_values", spent, "text", device)
    time_calls(net.denoiser, "forward", spent, "unet", device)
    time_calls(ae, "decode", spent, "decoder", device)
    rows = []
    for n in (1, 16):
        draw = partial(generate, net, ae, [CAPTION] * n, range(n), size, **how)
        turns = []
        for _ in range(args.rounds + 6):
            spent.clear()
            total = seconds_of(draw, device)
            parts = {part: seconds / n for part, seconds in spent.items()}
            turns.append({"s": total / n, **parts, "outside": 1 - spent.total() / total})
        row = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        what = f"assets/fast, {size} px, {n} at once, {len(how['steps']) - 1} steps"
        rows.append({"what": what, **row})
    return {"rows": rows}

# ------------------------------------------------------------------------- training
def training_floor(network, size: int, tokens: int, batch: int, card=H200) -> tuple[float, float]:
    """Seconds of one training step on a card of costs.card_of in bfloat16, computed, not measured.

    First: all its work at the peak. Second: the least that separate kernels take, where each pass
    of a linear or convolution moves two maps and its weights once (docs/BENCH.md)."""
    kernels, seconds = [], []
    peak, memory = card

    def count(module, inputs, out):
        kernels.append(2 * out.numel() * module.weight[0].numel() / peak)
        moved = 2 * (inputs[0].numel() + out.numel() + module.weight.numel()) / memory
        seconds.append(max(kernels[-1], moved))

    with torch.device("meta"), torch.no_grad():
        net = make_network(network)
        for module in net.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(count)
        net(**dummy_inputs(network, batch, size, tokens))
    work = batch * forward_flops(network, size, tokens) / peak
    return 3 * work, 3 * (work - sum(kernels) + sum(seconds))

def training_step(cfg: TrainConfig, objective, batch: int, device, update, tokens: int = 0):
    """() -> a forward and a backward pass on noise, then update(). tokens: of our own captions."""
    side = cfg.data.size // 8
    text = load_vocabulary().tokenize([CAPTION] * batch)
    if tokens:
        more = 0, tokens - text.ids.shape[1]
        text = Tokens(F.pad(text.ids, more), F.pad(text.mask, more))
    if cfg.text.kind != "own":                              # states of frozen encoders
        emb = torch.randn(batch, caption_tokens(cfg.text), cfg.text.width)
        text = Text(emb, torch.ones(emb.shape[:2], dtype=torch.bool), emb.mean(1))
    x0, eps = torch.randn(2, batch, cfg.network.in_channels, side, side, device=device)
    given, t = Batch(x0, text).to(device), torch.rand(batch, device=device)

    def step():
        with autocast(device, use_bfloat16(cfg.amp, device)):
            loss = objective(given, eps, t)[0].mean()
        loss.backward()
        update()
    return step

def training_rows(path: str, cfgs: dict, batch: int, args, device) -> list[dict]:
    """The networks of the configs in turns."""
    steps, rows = {}, []
    for name, cfg in cfgs.items():
        before = forget_peak(device)
        objective = FlowObjective(TextToLatents(cfg.network, cfg.text)).to(device)
        opt = Muon(objective, cfg.lr, cfg.muon_lr, cfg.weight_decay)
        if cfg.compile and device.type == "cuda":
            objective.compile()
        update = Learner(objective, opt, cfg.clip).step
        steps[name] = training_step(cfg, objective, batch, device, update)
        in_turns({name: steps[name]}, 2, device)            # warms up
        rows.append({
            "config": path, "net": name, "batch": batch, "params": count_params(objective),
            "flops": training_flops(cfg), "peak": round((peak_memory(device) - before) * GiB),
        })
    seconds, amp = in_turns(steps, args.rounds, device), use_bfloat16(cfg.amp, device)
    limit = matmul_speed(device, amp)
    for row in rows:
        row["amp"] = "bfloat16" if amp else "float32"
        row["img_s"] = batch / seconds[row["net"]]
        row["mfu"] = row["img_s"] * row["flops"] / limit
    return rows

def measure_training(args, device) -> dict:
    """Each config's UNet beside an MMDiT, three blocks for each two heads."""
    found = {"rows": [], "floors": []}
    for path, (on_cpu, on_gpu, heads) in TRAININGS.items():
        cfg = read_config(TrainConfig(), ["--config", path])
        size, tokens, width = cfg.data.size, caption_tokens(cfg.text), cfg.text.width
        mmdit = MMDiTConfig(layers=3 * heads // 2, heads=heads, head_dim=32, context_dim=width,
                            pooled_dim=width, base=size // 16, position_max=size // 16)
        cfgs = {"UNet": cfg, "MMDiT": replace(cfg, arch="mmdit", mmdit=mmdit)}
        batch = on_gpu if device.type == "cuda" else on_cpu
        if batch:
            found["rows"] += training_rows(path, cfgs, batch, args, device)
        for name in cfgs if on_gpu else ():
            work, least = training_floor(cfgs[name].network, size, tokens, on_gpu)
            found["floors"].append({"config": path, "net": name, "batch": on_gpu,
                                    "work_s": work, "least_s": least, "mfu": work / least})
    return found

# ------------------------------------------------------------------------- data
def loading_speed(cfg: TrainConfig, side: int, device) -> float:
    """Pictures/s of the batches, with latents of side x side places on the device."""
    batches = Batches(cfg, torch.randn(4096, 16, side, side).half(), device, load_vocabulary())

    def load():
        for k in range(32):
            batches(k)
    return 32 * cfg.batch / min(seconds_of(load, device) for _ in range(5))

def measure_loading(args, device) -> dict:
    """Pictures/s that a training process is given, and what a GPU would take at most."""
    cfg = read_config(TrainConfig(), ["--config", "configs/base.toml"])
    found = {
        "order, words and dropped captions of the batches": loading_speed(cfg, 1, device),
        "the same with the latents": loading_speed(cfg, cfg.data.size // 8, device),
        "what one H200 would take at an MFU of 35 % (computed)":
            0.35 * H200[0] / training_flops(cfg),
    }
    return {"rows": [{"what": what, "img_s": speed} for what, speed in found.items()]}

SUBJECTS = {
    "unet": partial(race, DENOISERS), "decoder": partial(race, DECODERS),
    "sample": measure_sampling, "train": measure_training, "data": measure_loading,
}

def main(argv):
    p = argparse.ArgumentParser(prog="python -m lab.bench", description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("subjects", nargs="+", choices=[*SUBJECTS, "all"])
    p.add_argument("--device", default="auto")
    p.add_argument("--size", type=int, default=1024, help="pixels, of unet and decoder")
    p.add_argument("--rounds", type=int, default=2, help="turns")
    p.add_argument("--nets", nargs="+", default=[], choices=[*DENOISERS, *DECODERS],
                   help="ours and these alone")
    p.add_argument("--out", default="runs/bench", help="folder; docs/results has BENCH.md's")
    args = p.parse_args(argv)
    if args.rounds < 1 or args.size < 32 or args.size % 32:
        raise UserError("--rounds is 1 or more, --size a multiple of 32")
    device = setup(args.device)[0]
    for subject in SUBJECTS if "all" in args.subjects else args.subjects:
        write_found(subject, SUBJECTS[subject](args, device), args.out, device)

def write_found(subject: str, found: dict, folder, device):
    """bench_SUBJECT.json, with where it is from, and its table."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"device": str(device), "threads": torch.get_num_threads(), **provenance()}
    (folder / f"bench_{subject}.json").write_text(json.dumps(found | about, indent=1), "utf-8")
    print(tables.TABLES[f"bench_{subject}"](folder), f"\n{folder}/bench_{subject}.json\n")

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
