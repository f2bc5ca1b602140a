"""What it costs: time, memory and work of every part beside its peers, measured on one machine in one run.

    python bench.py unet|decoder|sample|train|data|all [--size 1024] [--rounds 2] [--nets ours sdxl ..] [--device cuda]    tables; docs/results/bench_*.json, docs/BENCH.md
    python bench.py --scaling                                   time and memory against resolution, batch and steps: docs/scaling_cost.png
    python bench.py --profile unet|decoder                      our operations, by their time
    python bench.py --few assets/scenes assets/fast             UNet time a picture, each sampled as its checkpoint says, in turns
    python bench.py --ablation, --distillation                  grids of small trainings: grids.py

Machines are noisy, so a peer is timed in turns with ours (A B A B ..) and the ratio is of these medians; what the machine can do at all, its matrix product and
its copy, is measured between them. Work is counted on the meta device (on CPU tensors PyTorch counts attention as nothing). Nothing here is a promise about a phone.
"""
import argparse, contextlib, ctypes, gc, json, math, statistics, sys, time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import grids
from common import ROOT, UserError, friendly, provenance, read_config, setup, use_bfloat16
from data import scenes_of
from decoder import load_autoencoder
from mmdit import MMDiTConfig
from optim import Muon
from peers import Net, decoders, denoisers
from plan import GiB, forward_flops, inputs, training_flops
from results import bench_page, cost_plot
from sample import TextToLatents, build, chosen, euler, generate, guided, load_model, settings, times
from text import Text, tokenize
from train import Batches, Config, FlowObjective

H200, H200_BYTES = 989e12, 4.8e12     # FLOP/s in bfloat16, bytes/s of its memory: its data sheet


# ---------------------------------------------------------------------------- the instruments
def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def seconds(f, device) -> float:
    wait(device)
    begin = time.perf_counter()
    f()
    wait(device)
    return time.perf_counter() - begin


def machine(device, dtype=torch.float32) -> tuple[float, float]:
    """What it reaches at its best of four: FLOP/s of a matrix product, bytes/s of a copy (read and written)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.empty(2**26, device=device)
    c = torch.ones_like(b)
    peak, band = 2 * n**3 / min(seconds(lambda: a @ a, device) for _ in range(4)), 2 * 2**28 / min(seconds(lambda: b.copy_(c), device) for _ in range(4))
    return peak, band


def memory(device) -> tuple[int, int]:
    """Bytes in use now and at most since reset_memory(): of CUDA's allocator, or of the whole process (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(lines[k].split()[0]) for k in ("VmRSS", "VmHWM"))


def reset_memory(device):
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):      # what common.keep_memory_mapped() kept
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")           # sets VmHWM back (man 5 proc)


class Work:
    """Of one call of a Net, counted on the meta device: parameters, FLOPs (2 a multiply-add), and the bytes that its modules read and write if each is read and written once."""

    def __init__(self, spec: Net, size: int, batch: int = 1):
        self.bytes = 0

        def count(m, inputs, out):
            self.bytes += sum(4 * x.numel() for x in (*inputs, out, *m.parameters()) if torch.is_tensor(x))
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            net = spec.make()
            for m in net.modules():
                if not list(m.children()):
                    m.register_forward_hook(count)
            spec.call(net, *spec.inputs(size, batch))
        self.params, self.flops = sum(p.numel() for p in net.parameters()), counter.get_total_flops()


class Runner:
    """A Net on the device, in the faster of two memory layouts, with its peak memory. Weights are one block of noise over and over, at the usual scale."""

    def __init__(self, spec: Net, size: int, device, batch: int = 1, dtype=torch.float32):
        reset_memory(device)
        base = memory(device)[0]
        with torch.device("meta"):
            net = spec.make()
        net = net.to_empty(device=device).to(dtype).eval().requires_grad_(False)
        noise = torch.randn(2**20, device=device, dtype=dtype)
        for p in [*net.parameters(), *net.buffers()]:
            if p.is_floating_point():
                flat, scale = p.data.view(-1), p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
                for i in range(0, len(flat), len(noise)):
                    torch.mul(noise[:len(flat[i:i + len(noise)])], scale, out=flat[i:i + len(noise)])
        in_layout = lambda xs, layout: [x.to(dtype).contiguous(memory_format=layout) if x.ndim == 4 else x.to(dtype) for x in xs]
        with torch.device(device):
            inputs, small = spec.inputs(size, batch), spec.inputs(min(size, 256), 1)
        self.net, self.layout, best = net, "", math.inf
        for layout, name in ((torch.contiguous_format, "NCHW"), (torch.channels_last, "NHWC"))[:2 if spec.conv else 1]:     # chosen on a small picture, after a call to warm up
            net.to(memory_format=layout)
            taken = [seconds(lambda x=in_layout(small, layout): spec.call(net, *x), device) for _ in range(3 if spec.conv else 1)][-1]
            if taken < best:
                best, self.layout, chosen_layout = taken, name, layout
        net.to(memory_format=chosen_layout)
        inputs = in_layout(inputs, chosen_layout)
        self.run = lambda: spec.call(net, *inputs)
        reset_memory(device)
        seconds(self.run, device)                               # warms up at full size
        self.peak = memory(device)[1] - base


def race(specs: dict[str, Net], size: int, device, rounds: int, dtype) -> list[dict]:
    """A row for each: ours by itself, each peer in turns with ours."""
    first, *others = specs
    ours, rows = Runner(specs[first], size, device, dtype=dtype), []
    for name in tqdm([first, *others], unit="network"):
        peer, own, theirs, limits = ours if name == first else Runner(specs[name], size, device, dtype=dtype), [], [], []
        for _ in range(rounds):
            own.append(seconds(ours.run, device))
            theirs.append(seconds(peer.run, device) if name != first else own[-1])
            limits.append(machine(device, dtype))
        work, s, (peak, band) = Work(specs[name], size), statistics.median(theirs), map(statistics.median, zip(*limits))
        rows.append({"net": name, "name": specs[name].name, "params": work.params, "flops": work.flops, "bytes": work.bytes, "s": s, "ratio": s / statistics.median(own), "peak": peer.peak, "layout": peer.layout,
                     "peak_flops": peak, "bandwidth": band})
        peer = None
        gc.collect()
    return rows


# ---------------------------------------------------------------------------- subjects: each returns what its JSON file holds
def networks(make):
    """denoisers or decoders, raced."""
    return lambda a, device: {"size": a.size, "rows": race({k: v for k, v in make(a.nets).items() if not a.nets or k in a.nets or k == "ours"}, a.size, device, a.rounds, a.dtype)}


class Stopwatch:
    """Counts the seconds inside a function of an object while the block lasts."""

    def __init__(self, obj, name, device):
        self.obj, self.name, self.device, self.spent = obj, name, device, 0.0

    def __enter__(self):
        inner = getattr(self.obj, self.name)

        def timed(*args, **kw):
            wait(self.device)
            begin = time.perf_counter()
            out = inner(*args, **kw)
            wait(self.device)
            self.spent += time.perf_counter() - begin
            return out
        setattr(self.obj, self.name, timed)
        return self

    def __exit__(self, *_):
        delattr(self.obj, self.name)


def sample(a, device):
    """Where a picture's time goes: the shipped model, and the paper's UNet with the tiny decoder at random weights (its text states are given). And what projecting the text once saves there."""
    rows, prompts = [], ["a red car to the left of a blue dog"]
    (net, config), ae = load_model("assets/fast", device), load_autoencoder("assets/ae", device)
    for batch in (1, 16):
        taken = []
        for k in range(a.rounds + 6):
            with Stopwatch(net, "encode", device) as text, Stopwatch(net.denoiser, "keys_values", device) as keys, Stopwatch(net.denoiser, "forward", device) as unet, Stopwatch(ae, "decode", device) as dec:
                total = seconds(lambda: generate(net, ae, prompts * batch, range(batch), config["data"]["size"], **settings(config), batch=batch), device)
            taken.append((total, text.spent + keys.spent, unet.spent, dec.spent))
        total, *parts = (statistics.median(x) / batch for x in zip(*taken[3:]))
        rows.append({"what": f"assets/fast, {config['data']['size']} px, {batch} at once, {len(settings(config)['steps']) - 1} steps", "s": total, "text": parts[0], "unet": parts[1], "decoder": parts[2],
                     "outside": statistics.median(1 - sum(inside) / t for t, *inside in taken[3:])})
    big, size, emb = Runner(denoisers(["ours"])["ours"], 256, device, dtype=a.dtype).net, 256, torch.randn(1, 333, 2304, device=device, dtype=a.dtype)
    x, states = torch.randn(1, 16, size // 8, size // 8, device=device, dtype=a.dtype), Text(emb, torch.ones(1, 333, dtype=torch.bool, device=device))
    class Anew:                                             # the same network without its keys_values()
        __call__ = lambda self, *args: big(*args)
    ways = {name: lambda net=net: euler(guided(net, states, states, 4.0), x, times(4, 3.0)) for name, net in (("once", big), ("anew", Anew()))}
    taken = {name: [] for name in ways}
    for _ in range(a.rounds + 2):
        for name, f in ways.items():
            taken[name].append(seconds(f, device))
    with torch.inference_mode():
        once, anew = (f() for f in ways.values())
    return {"rows": rows, "cache": {name: statistics.median(v) for name, v in taken.items()} | {"size": size, "difference": float((once - anew).abs().max() / anew.std())}}


def of_equal_flops(network, size: int, tokens: int, head_dim: int = 32) -> MMDiTConfig:
    """The MMDiT, three blocks per two heads, whose forward pass comes nearest to the network's."""
    goal, found = forward_flops(network, size, tokens), []
    for heads in range(2, 64):
        m = MMDiTConfig(layers=max(2, 3 * heads // 2), heads=heads, head_dim=head_dim, context_dim=network.context_dim, pooled_dim=network.context_dim, base=size // 16, position_max=size // 16)
        found.append((abs(math.log((flops := forward_flops(m, size, tokens)) / goal)), heads, m))
        if flops > goal:
            break
    return min(found)[2]


def training_floor(network, size: int, tokens: int, batch: int) -> tuple[float, float]:
    """Seconds of one training step on an H200 in bfloat16, computed: all its work at the peak; and the least that separate kernels take, where each of the three passes of a linear or
    convolution (forward, gradient of the input, of the weights) moves two maps and the weights once, if that is longer. Norms, activations, attention's bytes, the optimiser and waiting cost nothing here."""
    seen = []

    def count(m, xs, out):
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)):
            seen.append((2 * out.numel() * m.weight[0].numel(), 2 * (xs[0].numel() + out.numel() + m.weight.numel())))      # FLOPs, bytes of one pass
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = build(network)
        for m in net.modules():
            m.register_forward_hook(count)
        args, pooled = inputs(network, batch, size, tokens)
        net(*args, **pooled)
    work, theirs = counter.get_total_flops(), sum(flops for flops, _ in seen)
    return 3 * work / H200, 3 * (work - theirs) / H200 + 3 * sum(max(flops / H200, moved / H200_BYTES) for flops, moved in seen)


ON_GPU = (("configs/base.toml", 256), ("configs/t2i_256.toml", 64))     # and pictures a step


def train(a, device):
    """One optimiser step of flow training, UNet and MMDiT in turns: forward and backward pass, and Muon or AdamW as the config says. Text states of frozen encoders are given."""
    rows, floors = [], []
    for path, batch in ON_GPU:
        cfg = read_config(Config(), ["--config", path])
        unet = chosen(cfg.arch, cfg.model, cfg.mmdit)
        for name, network in (("UNet", unet), ("MMDiT", of_equal_flops(unet, cfg.data.size, cfg.tokens))):
            work, least = training_floor(network, cfg.data.size, cfg.tokens, batch)
            floors.append({"config": path, "net": name, "batch": batch, "work_s": work, "least_s": least})
    for path, batch in ON_GPU if device.type == "cuda" else (("configs/nano.toml", 0), ("configs/base.toml", 4)):
        cfg = read_config(Config(), ["--config", path])
        n, amp = batch or cfg.batch, use_bfloat16(cfg.amp, device)
        nets = {"UNet": chosen(cfg.arch, cfg.model, cfg.mmdit)}
        nets["MMDiT"] = of_equal_flops(nets["UNet"], cfg.data.size, cfg.tokens)
        steps, taken, peaks, memories = {}, {k: [] for k in nets}, [], {}
        for name, network in nets.items():
            reset_memory(device)
            base = memory(device)[0]
            own = cfg.text.kind == "own"
            objective = FlowObjective(TextToLatents(network, cfg.text)).to(device)
            opt, run = Muon(objective, cfg.lr, cfg.muon_lr, cfg.weight_decay), torch.compile(objective) if cfg.compile and device.type == "cuda" else objective
            x0, eps = torch.randn(2, n, 16, cfg.data.size // 8, cfg.data.size // 8, device=device)
            words = [x.to(device) for x in tokenize(["a red car to the left of a blue dog"] * n)] if own else [torch.randn(n, cfg.tokens, cfg.text.width, device=device), torch.ones(n, cfg.tokens, dtype=torch.bool, device=device)]
            words += [words[0].mean(1)] if not own and name == "MMDiT" else []

            def step(run=run, opt=opt, x0=x0, eps=eps, words=words, t=torch.rand(n, device=device)):
                with torch.inference_mode(False), torch.enable_grad():
                    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                        loss = run(x0, eps, t, *words)[0].mean()
                    loss.backward()
                    opt.step()
                    opt.zero_grad(set_to_none=True)
            steps[name] = step
            for _ in range(2):
                seconds(step, device)
            memories[name] = memory(device)[1] - base
        for _ in range(a.rounds + 2):
            for name, step in steps.items():
                taken[name].append(seconds(step, device))
            peaks.append(machine(device, torch.bfloat16 if amp else torch.float32)[0])
        for name, network in nets.items():
            s, flops, peak = statistics.median(taken[name]), training_flops(cfg, network), statistics.median(peaks)
            rows.append({"config": path, "net": name, "params": sum(p.numel() for p in steps[name].__defaults__[0].parameters()), "batch": n, "amp": "bfloat16" if amp else "float32", "flops": flops, "s": s, "img_s": n / s, "mfu": n * flops / s / peak, "peak_flops": peak, "peak": memories[name]})
    return {"rows": rows, "floors": floors, "gpu_flops": H200, "gpu_bytes": H200_BYTES}


def data(a, device):
    """Pictures/s that a training process is given. They are drawn and encoded once, and lie on the device from then on: what is left for each batch is measured with latents of
    one place (`words`) and, where this machine is the device, with whole ones. Beside it what a GPU would eat at most."""
    cfg, out = read_config(Config(), ["--config", "configs/base.toml", "data.pictures=4096"]), {}
    scenes, place = scenes_of(cfg.data), cfg.data.size // 8
    begin = time.perf_counter()
    for i in range(200):
        scenes.render(scenes.scene(i))
    out["drawn"] = 200 / (time.perf_counter() - begin)
    for name, side in (("words", 1), ("whole", place)):
        batches, k = Batches(cfg, torch.randn(4096, 16, side, side).half(), device, 0, 1), 0
        wait(device)
        begin = time.perf_counter()
        while k < 8 or time.perf_counter() - begin < 3:
            batches(k)
            k += 1
        wait(device)
        out[name] = k * cfg.batch / (time.perf_counter() - begin)
    return {"config": "configs/base.toml", **out, "eats": 0.35 * H200 / training_flops(cfg, cfg.model), "mfu": 0.35, "gpu_flops": H200}


def scaling(a, device):
    """Time and memory against resolution and batch; steps add up, and are measured all the same."""
    specs, out = {"UNet": denoisers(["ours"])["ours"], "decoder": decoders(["ours"])["ours"], "decoder, small": decoders(["ours"])["ours_small"]}, {"rows": []}
    for name, spec in specs.items():
        for size, batch in [(s, 1) for s in (256, 384, 512, 768, 1024)] + [(256, b) for b in (2, 4, 8)] * (name == "UNet"):
            runner = Runner(spec, size, device, batch, a.dtype)
            out["rows"].append({"net": name, "size": size, "batch": batch, "s": statistics.median(seconds(runner.run, device) for _ in range(a.rounds)), "peak": runner.peak, "flops": Work(spec, size, batch).flops})
            print(f"{name} {size} px x {batch}: {out['rows'][-1]['s']:.2f} s, {out['rows'][-1]['peak'] / GiB:.2f} GiB", flush=True)
            runner = None
    (net, config) = load_model("assets/scenes", device)
    for steps in (1, 2, 4, 8, 16, 28):
        how = settings(config, steps=steps)
        out["rows"].append({"net": "shipped", "steps": steps, "size": 64, "batch": 1, "s": statistics.median(seconds(lambda: generate(net, None, ["a red car"], [k], 64, **how), device) for k in range(7))})
    return out


# ---------------------------------------------------------------------------- others
def profile(a, device):
    from torch.profiler import profile as watch
    spec = (denoisers if a.profile == "unet" else decoders)(["ours"])["ours"]
    runner = Runner(spec, a.size, device, dtype=a.dtype)
    with torch.inference_mode(), watch() as p:
        runner.run()
        wait(device)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(p.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=48))


# ---------------------------------------------------------------------------- few steps
def unet_seconds(a, rounds: int = 8):
    """Prints the median seconds that two checkpoints spend in their UNets for a picture, alone and 16 at a time, and their ratio."""
    device, models = setup("auto")[0], [load_model(path, "cpu") for path in a.few]
    for batch in (1, 16):
        taken = [[] for _ in models]
        for k in range(rounds):
            for (net, config), spent in zip(models, taken):
                with Stopwatch(net.to(device).denoiser, "forward", device) as unet:
                    generate(net, None, ["a red car"] * batch, range(k * batch, (k + 1) * batch), config["data"]["size"], **settings(config), batch=batch)
                spent += [unet.spent] if k else []
        medians = [statistics.median(x) / batch for x in taken]
        print(f"{batch:2} at a time: " + ", ".join(f"{path} {1e3 * m:.1f} ms a picture" for path, m in zip(a.few, medians)) + f", {medians[0] / medians[1]:.1f} x")


SUBJECTS = {"unet": networks(denoisers), "decoder": networks(decoders), "sample": sample, "train": train, "data": data, "scaling": scaling}


def main(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("what", nargs="*", metavar="unet|decoder|sample|train|data|all|key=value", help="subjects; of the grids, overrides of the config")
    p.add_argument("--scaling", action="store_true", help="time and memory against resolution, batch, steps")
    p.add_argument("--profile", choices=("unet", "decoder"), help="our operations, by their time")
    p.add_argument("--few", nargs=2, default=(), metavar=("BASE", "FAST"), help="two checkpoints")
    p.add_argument("--device", default="auto")
    p.add_argument("--size", type=int, default=1024, help="pixels")
    p.add_argument("--rounds", type=int, default=2, help="turns")
    p.add_argument("--threads", type=int, default=0, help="0: PyTorch's choice")
    p.add_argument("--nets", nargs="+", default=[], choices=("ours", "dreamlite", "sd15", "sdxl", "sana", "pixart", "sd3", "ours_small", "taesd3", "dcae"), help="ours and these alone")
    p.add_argument("--bf16", action="store_true", help="all in bfloat16, not fp32")
    p.add_argument("--ablation", action="store_true", help="the paper's ladder at a small width")
    p.add_argument("--distillation", action="store_true", help="students with and without each part of distill.py")
    p.add_argument("--config", default="", help="of the grids; default: configs/ablation.toml, or configs/kd_nano.toml")
    p.add_argument("--rows", nargs="+", default=grids.ROWS, choices=list(grids.LADDER))
    p.add_argument("--kd-rows", nargs="+", default=list(grids.KD_ROWS), choices=list(grids.KD_ROWS), help="of --distillation; alone must be among them")
    p.add_argument("--seeds", type=int, default=3, help="of --distillation")
    p.add_argument("--jobs", type=int, default=1, help="rows that train side by side, each a process")
    p.add_argument("--prompts", type=int, default=60, help="a category")
    p.add_argument("--each", type=int, default=2, help="pictures a prompt")
    p.add_argument("--out", default="", help="default: docs/results/ablation.json, or distillation.json; of the subjects the folder docs/results")
    a = p.parse_intermixed_args(argv)
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.ablation or a.distillation:
        a.overrides = a.what
        return (grids.ablation if a.ablation else grids.distillation)(a)
    if bad := [w for w in a.what if w not in (*SUBJECTS, "all")]:
        raise UserError(f"no subject '{bad[0]}': " + ", ".join(SUBJECTS) + ", all")
    device, a.dtype = setup(a.device)[0], torch.bfloat16 if a.bf16 else torch.float32
    if a.few:
        return unet_seconds(a)
    if a.profile:
        return profile(a, device)
    wanted = [s for s in SUBJECTS if s in a.what or ("all" in a.what and s != "scaling") or (a.scaling and s == "scaling")]
    if not wanted:
        return p.print_help()
    folder = Path(a.out or ROOT / "docs/results")
    folder.mkdir(parents=True, exist_ok=True)
    for s in wanted:
        about = {"device": str(device), "threads": torch.get_num_threads(), **provenance()}
        found = SUBJECTS[s](a, device) | about
        (folder / f"bench_{s}.json").write_text(json.dumps(found, indent=1))
        (folder.parent / "BENCH.md").write_text(bench_page(folder))
        if s == "scaling":
            cost_plot(found, folder.parent / "scaling_cost.png")
    print((folder.parent / "BENCH.md").read_text())


if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
