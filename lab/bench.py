"""What each part costs: time, memory and work, beside its peers, measured on one machine.

    python -m lab.bench unet | decoder            one evaluation, ours and its peers
    python -m lab.bench sample | train | data     where a picture's time goes, a step, the loader
    python -m lab.bench --scaling                 against resolution, batch and steps
    python -m lab.bench --profile unet            our operations, by their time
    python -m lab.bench all --out docs/results    the numbers of docs/BENCH.md (then: lab.tables)

Machines are noisy, so a peer is timed in turns with ours (A B A B ...), and the ratio is of the
medians. What the machine can do at all, its matrix product and its copy, is measured in between.
Nothing here is a promise about a phone.
"""
import argparse
import contextlib
import ctypes
import gc
import json
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

from common import UserError, autocast, friendly, provenance, read_config, setup, use_bfloat16
from costs import caption_tokens, dummy_inputs, forward_flops, matmul_speed, training_flops
from data import Batch, Batches, scenes_of
from decoder import load_autoencoder
from lab import tables
from lab.peers import DECODERS, DENOISERS, Peer
from mmdit import MMDiTConfig
from model import TextToLatents, load_model, make_network
from optim import Learner, Muon
from sample import generate, sampling
from text import Text, load_vocabulary
from train import FlowObjective, TrainConfig

H200, H200_BYTES = 989e12, 4.8e12   # FLOP/s in bfloat16, bytes/s of its memory: its data sheet
ON_GPU = (("configs/base.toml", 256), ("configs/t2i_256.toml", 64))     # and pictures a step
ON_CPU = (("configs/nano.toml", 48), ("configs/base.toml", 4))
PROCESS = Path("/proc/self")
CAPTION = "a red car to the left of a blue dog"

# ------------------------------------------------------------------------- instruments
def wait_for(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()           # torch.cuda, torch.mps

@torch.inference_mode()
def seconds_of(function, device) -> float:
    wait_for(device)
    begin = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - begin

def copy_speed(device) -> float:
    """Bytes/s of a copy of 256 MiB, read and written, best of four."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * 2**28 / min(seconds_of(partial(target.copy_, source), device) for _ in range(4))

def memory_in_use(device) -> tuple[int, int]:
    """Bytes now, and the most since reset_memory().

    Of CUDA's allocator, else of the process (Linux), else 0."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if not PROCESS.exists():
        return 0, 0
    status = dict(line.split(":", 1) for line in (PROCESS / "status").read_text().splitlines())
    return tuple(1024 * int(status[key].split()[0]) for key in ("VmRSS", "VmHWM"))

def reset_memory(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):      # not on Linux
        ctypes.CDLL("libc.so.6").malloc_trim(0)             # what keep_memory_mapped() kept
        (PROCESS / "clear_refs").write_text("5")            # sets VmHWM back (man 5 proc)

@contextlib.contextmanager
def stopwatch(owner, method: str, device):
    """Gives a list that collects the seconds of each call of owner.method in the block."""
    inner, spent = getattr(owner, method), []

    def timed(*args, **kwargs):
        wait_for(device)
        begin = time.perf_counter()
        out = inner(*args, **kwargs)
        wait_for(device)
        spent.append(time.perf_counter() - begin)
        return out

    setattr(owner, method, timed)
    try:
        yield spent
    finally:
        delattr(owner, method)

class Runner:
    """A Peer on the device, called by run(). `peak`: bytes that it takes, weights included.

    Of the two memory layouts the one that is faster on a small picture is taken."""

    def __init__(self, peer: Peer, size: int, device, batch: int = 1, dtype=torch.float32):
        reset_memory(device)
        before = memory_in_use(device)[0]
        with torch.device("meta"):
            net = peer.make()
        self.peer, self.dtype = peer, dtype
        self.net = net.to_empty(device=device).to(dtype).eval().requires_grad_(False)
        self.fill(torch.randn(2**20, device=device, dtype=dtype))
        with torch.device(device):
            inputs, small = peer.inputs(size, batch), peer.inputs(min(size, 256), 1)
        layouts, taken = {"NCHW": torch.contiguous_format}, {}
        if peer.conv:
            layouts["NHWC"] = torch.channels_last
        for name, layout in layouts.items():
            call = self.prepare(small, layout)
            taken[name] = min(seconds_of(call, device) for _ in range(3))
        self.layout = min(taken, key=taken.get)
        self.run = self.prepare(inputs, layouts[self.layout])
        reset_memory(device)
        seconds_of(self.run, device)                        # warms up at full size
        self.peak = memory_in_use(device)[1] - before

    def fill(self, noise):
        """Weights of the usual scale: one block of noise over and over, which is quick."""
        for p in [*self.net.parameters(), *self.net.buffers()]:
            if p.is_floating_point():
                scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
                for part in p.data.view(-1).split(len(noise)):
                    torch.mul(noise[:len(part)], scale, out=part)

    def prepare(self, inputs, layout):
        self.net.to(memory_format=layout)
        inputs = [x.to(self.dtype) for x in inputs]
        inputs = [x.contiguous(memory_format=layout) if x.ndim == 4 else x for x in inputs]
        return partial(self.peer.call, self.net, *inputs)

# ------------------------------------------------------------------------- networks
def race(peers: dict[str, Peer], args, device) -> dict:
    """Ours by itself, then each peer in turns with ours."""
    peers = {k: peer for k, peer in peers.items() if k == "ours" or k in (args.nets or peers)}
    found = {"size": args.size, "rows": [], "peak_flops": [], "bandwidth": []}
    ours = Runner(peers["ours"], args.size, device, dtype=args.dtype)
    for name, peer in tqdm(peers.items(), unit="network"):
        runner = ours
        if name != "ours":
            runner = Runner(peer, args.size, device, dtype=args.dtype)
        own, theirs, peaks = [], [], []
        for _ in range(args.rounds):
            own.append(seconds_of(ours.run, device))
            theirs.append(own[-1] if name == "ours" else seconds_of(runner.run, device))
            peaks.append(matmul_speed(device, args.bf16))
        found["peak_flops"].append(statistics.median(peaks))
        found["bandwidth"].append(copy_speed(device))
        seconds = statistics.median(theirs)
        found["rows"].append({
            "net": name, "name": peer.name, **peer.work(args.size), "s": seconds,
            "ratio": seconds / statistics.median(own), "peak": runner.peak,
            "layout": runner.layout,
        })
        del runner
        gc.collect()
    return found

# ------------------------------------------------------------------------- sampling
def sampling_row(path: str, batch: int, rounds: int, device) -> dict:
    """Median seconds a picture: in all, and inside each network; and the share outside them."""
    net, config = load_model(path, device)
    ae, how = load_autoencoder("assets/ae", device), sampling(config)
    size = config["data"]["size"]
    draw = partial(generate, net, ae, [CAPTION] * batch, range(batch), size, **how, batch=batch)
    turns = []
    for _ in range(rounds + 6):
        with (
            stopwatch(net, "encode", device) as encode,
            stopwatch(net.denoiser, "keys_values", device) as keys,
            stopwatch(net.denoiser, "forward", device) as unet,
            stopwatch(ae, "decode", device) as decode,
        ):
            total = seconds_of(draw, device)
        turns.append((total, sum(encode) + sum(keys), sum(unet), sum(decode)))
    turns = turns[3:]                                       # the first ones warm up
    medians = [statistics.median(column) / batch for column in zip(*turns)]
    outside = statistics.median(1 - sum(parts) / total for total, *parts in turns)
    what = f"{path}, {size} px, {batch} at once, {len(how['steps']) - 1} steps"
    return {"what": what, **dict(zip(("s", "text", "unet", "decoder"), medians)),
            "outside": outside}

def measure_sampling(args, device) -> dict:
    return {"rows": [sampling_row(path, batch, args.rounds, device)
                     for path in ("assets/fast", "assets/scenes") for batch in (1, 16)]}

# ------------------------------------------------------------------------- training
def mmdit_of_equal_flops(network, size: int, tokens: int) -> MMDiTConfig:
    """The MMDiT, three blocks for each two heads, whose forward pass is nearest in FLOPs."""
    goal, found = forward_flops(network, size, tokens), []
    for heads in range(2, 64):
        cfg = MMDiTConfig(layers=3 * heads // 2, heads=heads, head_dim=32, base=size // 16,
                          position_max=size // 16, context_dim=network.context_dim,
                          pooled_dim=network.context_dim)
        flops = forward_flops(cfg, size, tokens)
        found.append((abs(math.log(flops / goal)), heads, cfg))
        if flops > goal:
            break
    return min(found)[2]

def unet_and_mmdit(path: str) -> tuple[TrainConfig, dict]:
    """The config, its UNet, and an MMDiT of as many FLOPs."""
    cfg = read_config(TrainConfig(), ["--config", path])
    mmdit = mmdit_of_equal_flops(cfg.network, cfg.data.size, caption_tokens(cfg.text))
    return cfg, {"UNet": cfg.network, "MMDiT": mmdit}

def training_floor(network, size: int, tokens: int, batch: int) -> tuple[float, float]:
    """Seconds of one training step on an H200 in bfloat16, computed, not measured.

    First: all its work at the peak. Second: the least that separate kernels take, if each of the
    three passes of a linear or convolution (forward, gradients of the input and of the weights)
    moves two maps and the weights once, where that takes longer than its work. Norms,
    activations, attention's bytes, the optimiser and waiting cost nothing here."""
    kernels, seconds = [], []

    def count(module, inputs, out):
        kernels.append(2 * out.numel() * module.weight[0].numel() / H200)
        moved = 2 * (inputs[0].numel() + out.numel() + module.weight.numel()) / H200_BYTES
        seconds.append(max(kernels[-1], moved))

    with torch.device("meta"), torch.no_grad():
        net = make_network(network)
        for module in net.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(count)
        net(**dummy_inputs(network, batch, size, tokens))
    work = batch * forward_flops(network, size, tokens) / H200
    return 3 * work, 3 * (work - sum(kernels) + sum(seconds))

class TrainingStep:
    """Calling it makes one step of flow training: forward, backward, Muon or AdamW.

    Latents are noise; states of frozen text encoders are given. `peak`: bytes that it takes."""

    def __init__(self, cfg: TrainConfig, network, batch: int, device):
        reset_memory(device)
        before = memory_in_use(device)[0]
        self.device, self.amp = device, use_bfloat16(cfg.amp, device)
        self.net = TextToLatents(network, cfg.text)
        objective = FlowObjective(self.net).to(device)
        self.params = sum(p.numel() for p in objective.parameters())
        opt = Muon(objective, cfg.lr, cfg.muon_lr, cfg.weight_decay)
        self.learner = Learner(objective, opt, cfg.clip)
        compiled = cfg.compile and device.type == "cuda"
        self.run = torch.compile(objective) if compiled else objective
        side = cfg.data.size // 8
        x0, self.eps = torch.randn(2, batch, network.in_channels, side, side, device=device)
        self.batch = Batch(x0, self.text_of(cfg, network, batch)).to(device)
        self.t = torch.rand(batch, device=device)
        for _ in range(2):
            seconds_of(self, device)
        self.peak = memory_in_use(device)[1] - before

    def text_of(self, cfg, network, batch: int):
        if cfg.text.kind == "own":
            return self.net.vocabulary.tokenize([CAPTION] * batch)
        emb = torch.randn(batch, caption_tokens(cfg.text), cfg.text.width)
        mask = torch.ones(emb.shape[:2], dtype=torch.bool)
        return Text(emb, mask, emb.mean(1) if isinstance(network, MMDiTConfig) else None)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __call__(self):
        with autocast(self.device, self.amp):
            loss = self.run(self.batch, self.eps, self.t)[0].mean()
        loss.backward()
        self.learner.step()

def training_rows(path: str, batch: int, rounds: int, device) -> list[dict]:
    """The UNet and the MMDiT in turns."""
    cfg, nets = unet_and_mmdit(path)
    steps = {k: TrainingStep(cfg, net, batch, device) for k, net in nets.items()}
    amp, taken, peaks = steps["UNet"].amp, {name: [] for name in steps}, []
    for _ in range(rounds + 2):
        for name, step in steps.items():
            taken[name].append(seconds_of(step, device))
        peaks.append(matmul_speed(device, amp))
    rows, peak = [], statistics.median(peaks)
    for name, step in steps.items():
        speed = batch / statistics.median(taken[name])
        flops = 3 * forward_flops(nets[name], cfg.data.size, caption_tokens(cfg.text), cfg.text)
        rows.append({"config": path, "net": name, "params": step.params, "batch": batch,
                     "amp": "bfloat16" if amp else "float32", "flops": flops,
                     "img_s": speed, "mfu": speed * flops / peak, "peak": step.peak})
    return rows

def floor_rows(path: str, batch: int) -> list[dict]:
    cfg, nets = unet_and_mmdit(path)
    rows = []
    for name, network in nets.items():
        work, least = training_floor(network, cfg.data.size, caption_tokens(cfg.text), batch)
        rows.append({"config": path, "net": name, "batch": batch, "work_s": work,
                     "least_s": least})
    return rows

def measure_training(args, device) -> dict:
    cases = ON_GPU if device.type == "cuda" else ON_CPU
    return {
        "rows": [row for case in cases for row in training_rows(*case, args.rounds, device)],
        "floors": [row for case in ON_GPU for row in floor_rows(*case)],
    }

# ------------------------------------------------------------------------- data
def measure_loading(args, device) -> dict:
    """Pictures/s that a training process is given, and what a GPU would take at most.

    Scenes are drawn and encoded once (`drawn`); then latents are on the device. What is left for
    each batch is measured with latents of one place (`words`) and with whole ones (`whole`)."""
    cfg, pictures = read_config(TrainConfig(), ["--config", "configs/base.toml"]), 4096
    scenes, side = scenes_of(cfg.data), cfg.data.size // 8
    begin = time.perf_counter()
    for i in range(200):
        scenes.render(scenes.scene(i))
    found = {"drawn": 200 / (time.perf_counter() - begin)}
    for name, places in (("words", 1), ("whole", side)):
        latents = torch.randn(pictures, 16, places, places).half()
        batches, k = Batches(cfg, latents, device, load_vocabulary()), 0
        wait_for(device)
        begin = time.perf_counter()
        while k < 8 or time.perf_counter() - begin < 3:
            batches(k)
            k += 1
        wait_for(device)
        found[name] = k * cfg.batch / (time.perf_counter() - begin)
    return {"config": "configs/base.toml", **found, "eats": 0.35 * H200 / training_flops(cfg),
            "mfu": 0.35}

# ------------------------------------------------------------------------- scaling
def measure_scaling(args, device) -> dict:
    """Time and memory against resolution and batch; time against steps."""
    rows = []
    for name, peer in (("UNet", DENOISERS["ours"]), ("decoder", DECODERS["ours"])):
        cases = [(size, 1) for size in (256, 384, 512, 768, 1024)]
        if name == "UNet":
            cases += [(256, batch) for batch in (2, 4, 8)]
        for size, batch in cases:
            runner = Runner(peer, size, device, batch, args.dtype)
            seconds = statistics.median(seconds_of(runner.run, device) for _ in range(args.rounds))
            rows.append({"net": name, "size": size, "batch": batch, "s": seconds,
                         "peak": runner.peak, "flops": peer.work(size, batch)["flops"]})
            print(f"{name} {size} px x {batch}: {seconds:.2f} s", flush=True)
            del runner
    net, config = load_model("assets/scenes", device)
    for steps in (1, 2, 4, 8, 16, 28):
        how = sampling(config, steps=steps)
        draw = partial(generate, net, None, ["a red car"], [0], 64, **how)
        seconds = statistics.median(seconds_of(draw, device) for _ in range(7))
        rows.append({"net": "shipped", "steps": steps, "size": 64, "batch": 1, "s": seconds})
    return {"rows": rows}

def print_profile(args, device):
    peers = DENOISERS if args.profile == "unet" else DECODERS
    runner = Runner(peers["ours"], args.size, device, dtype=args.dtype)
    with torch.inference_mode(), torch.profiler.profile() as profiler:
        runner.run()
        wait_for(device)
    key = f"self_{device.type}_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=48))

SUBJECTS = {
    "unet": partial(race, DENOISERS), "decoder": partial(race, DECODERS),
    "sample": measure_sampling, "train": measure_training, "data": measure_loading,
    "scaling": measure_scaling,
}

def main(argv):
    p = argparse.ArgumentParser(
        prog="python -m lab.bench", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("subjects", nargs="*", metavar="unet|decoder|sample|train|data|all")
    p.add_argument("--scaling", action="store_true", help="against resolution, batch, steps")
    p.add_argument("--profile", choices=("unet", "decoder"), help="our operations, by their time")
    p.add_argument("--device", default="auto")
    p.add_argument("--size", type=int, default=1024, help="pixels, of unet, decoder, --profile")
    p.add_argument("--rounds", type=int, default=2, help="turns")
    p.add_argument("--nets", nargs="+", default=[], metavar="NET",
                   choices=[*DENOISERS, *DECODERS], help="ours and these alone")
    p.add_argument("--bf16", action="store_true", help="networks in bfloat16 instead of fp32")
    p.add_argument("--out", default="runs/bench", help="folder; docs/results has BENCH.md's")
    args = p.parse_intermixed_args(argv)
    if args.rounds < 1 or args.size < 32 or args.size % 32:
        raise UserError("--rounds is 1 or more, --size a multiple of 32")
    known = [name for name in SUBJECTS if name != "scaling"]
    for subject in args.subjects:
        if subject not in (*known, "all"):
            raise UserError(f"no subject '{subject}': use {', '.join(known)}, all or --scaling")
    args.dtype = torch.bfloat16 if args.bf16 else torch.float32
    device = setup(args.device)[0]
    if args.profile:
        print_profile(args, device)
        return
    wanted = known if "all" in args.subjects else args.subjects
    if args.scaling:
        wanted = [*wanted, "scaling"]
    if not wanted:
        p.print_help()
        return
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for subject in wanted:
        about = {"device": str(device), "threads": torch.get_num_threads(), **provenance()}
        found = SUBJECTS[subject](args, device) | about
        (folder / f"bench_{subject}.json").write_text(json.dumps(found, indent=1))
        print(tables.TABLES[f"bench_{subject}"](folder), f"\n{folder}/bench_{subject}.json\n")

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
