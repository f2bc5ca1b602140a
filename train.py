"""Trains a UNet (or, arch = "mmdit", a teacher) and its text encoder by rectified flow. With no arguments: `nano`, on a laptop, in minutes.

    python train.py [--config configs/nano.toml] [key=value ...]
    torchrun --nproc_per_node 8 train.py --config configs/base.toml                         (shard=true: cut over the GPUs, shard.py)
    python train.py --config configs/t2i_1024.toml --dry-run [gpus=64] [mfu=0.3]            memory, FLOPs, days: plan.py; trains nothing

Run it again to resume. In the run's directory: log.csv, loss.png, samples_*.png, samples.gif, checkpoint/,
and at the end final/: the averaged weights in fp16, to ship.
Every random draw is a function of the seed and the micro-batch's number in the whole run: no generator's state needs saving, a resumed run equals an
uninterrupted one bit for bit on a CPU, and so many processes or so many accumulated micro-batches are the same training but for rounding.
"""
import contextlib, hashlib, json, os, random, signal, sys, time, warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import plots
from checkpoint import load_checkpoint, load_into, save_checkpoint
from common import Log, UserError, anywhere, friendly, mean_over, peak_memory, pick_device, read_config, setup, start_others, use_bfloat16
from data import CATEGORIES, NOUNS, DataConfig, grid, latents_of, scenes_of
from decoder import load_autoencoder
from mmdit import MMDiTConfig
from model import UNetConfig, count_params
from optim import EMA, Muon, rows
from cache import fingerprint, open_cache
from plan import MEASURED_MFU, costs, dry_run
from sample import TextToLatents, chosen, generate, load_model, shift_time
from shard import gathered, load_shards, save_shards, shard, whole
from text import TextConfig, encoding, tokenize


@dataclass
class FlowConfig:
    mean: float = 0.0               # t = sigmoid(mean + std n), n normal: logit-normal (Esser et al. 2024)
    std: float = 1.0
    shift: float = 1.0              # t' = s t / (1 + (s - 1) t); 3 at 1024 px


@dataclass
class Config:
    out: str = "runs/nano"
    arch: str = "unet"              # unet: the table `model`; mmdit: the table `mmdit`
    model: UNetConfig = field(default_factory=UNetConfig)
    mmdit: MMDiTConfig = field(default_factory=MMDiTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    ae: str = "assets/ae"
    init: str = ""                  # checkpoint whose weights a new run starts from
    steps: int = 4000
    batch: int = 64                 # a process and micro-batch
    accumulate: int = 1
    processes: int = 1              # on a CPU without torchrun: so many are started, and share the cores
    shard: bool = False             # weights, gradients, average and moments are cut over the processes (FSDP2), not held by each (DDP)
    lr: float = 1e-3
    muon_lr: float = 0.0            # of the matrices, by Muon; 0: AdamW for all
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    drop_caption: float = 0.1       # becomes the empty caption, which guidance needs
    log_every: int = 50
    eval_every: int = 500           # validation, sample grid, checkpoint
    val_pictures: int = 256
    samples: int = 24               # pictures of a sample grid
    sample_steps: int = 20
    cfg: float = 4.0                # guidance of the sample grids
    compile: bool = False
    amp: str = "auto"               # auto, bfloat16 or float32: common.use_bfloat16
    seed: int = 0
    device: str = "auto"
    # what --dry-run is asked about
    gpus: int = 1
    gpu_gb: float = 80.0            # GiB of one
    gpu_tflops: float = 989.0       # its peak in bfloat16: an H100 SXM's, by its data sheet
    mfu: float = MEASURED_MFU       # share of that peak
    tokens: int = 16                # of a caption, also for the log line's mfu


# ---------------------------------------------------------------------------- the flow, which the distillers import
def flow_loss(velocity, x0, eps, t):
    """Rectified flow (paper.md, section 4): velocity(x_t, t) should be eps - x0. Latents (B, C, H, W), t (B,) -> loss per picture (B,)."""
    a = t[:, None, None, None]
    v = velocity((1 - a) * x0 + a * eps, t)                     # (B, C, H, W)
    return (v.float() - (eps - x0)).square().mean((1, 2, 3))


class FlowObjective(nn.Module):
    """What the loop minimises. Distillers write their own: it holds the network as `net` beside whatever else is trained, and its forward gives the
    loss per picture (B,) and values for the log: numbers for its line, vectors for columns k0, k1, .. of log.csv alone (nan: none in this batch)."""
    states = None                                               # text encoders whose cached states it wants beside the network's

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x0, eps, t, *words):
        """words: ids and mask; of frozen encoders states and mask, and for an MMDiT pooled ones."""
        return flow_loss(lambda x, t: self.net(x, t, *words), x0, eps, t), {}


def draw_times(cfg: FlowConfig, n, generator, device):
    return shift_time(torch.sigmoid(cfg.mean + cfg.std * torch.randn(n, generator=generator, device=device)), cfg.shift)   # (n,)


def rate(cfg, step: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to nothing."""
    return min((step + 1) / cfg.warmup, 0.5 * (1 + np.cos(np.pi * step / cfg.steps)) + 1e-4)


# ---------------------------------------------------------------------------- data
def load_data(cfg: Config, device, rank, world, states: TextConfig | None = None):
    """The autoencoder, and the latents of the training scenes and of the held-out ones; or both sides of the cache of your own pictures, with the states of a teacher's encoders."""
    ae = load_autoencoder(cfg.ae, device)
    if cfg.data.folder:
        return ae, *open_cache(cfg, ae, states)
    ae_key = fingerprint(ae)
    for turn in range(world):                                   # one process fills the cache, the others find it there
        if turn == rank:
            latents = latents_of(cfg.data, ae, ae_key)
            held_out = latents_of(cfg.data, ae, ae_key, "test", cfg.val_pictures)
        if world > 1:
            torch.distributed.barrier()
    return ae, latents, held_out


def shown_prompts(cfg: Config) -> list[str]:
    """Of the sample grids: 24 held-out ones, of scenes the six categories in turn."""
    if cfg.data.folder:
        return open_cache(cfg)[1].captions()[:24]
    test = scenes_of(cfg.data, "test")
    return [test.caption(test.scene(i, CATEGORIES[i % 6]), random.Random(0)) for i in range(24)]


WORDINGS = 8                    # of each scene's caption


def wordings(cfg: Config, n: int):
    """Tokens of WORDINGS captions of each of n training scenes, int16 ids (n, WORDINGS, L) and their lengths (n, WORDINGS); made once and kept beside the latents: worded
    and tokenised for each batch anew they would hold up a GPU (bench.py data)."""
    scenes, vocabulary = scenes_of(cfg.data), encoding().n_vocab
    key = hashlib.sha256(json.dumps([cfg.data.nouns, cfg.data.layout, cfg.data.seed, cfg.data.atlas, list(NOUNS), vocabulary, cfg.text.max_tokens, cfg.seed, n]).encode()).hexdigest()[:12]
    path = Path(cfg.data.cache) / f"words-{n}-{key}.safetensors"
    if not path.exists():
        captions = []
        for i in tqdm(range(n), f"word {n} train scenes", unit="scene", disable=n < 5000):
            rng, scene = random.Random(f"{cfg.seed}/{i}"), scenes.scene(i)
            captions += [scenes.caption(scene, rng) for _ in range(WORDINGS)]
        ids, mask = tokenize(captions, cfg.text.max_tokens)
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_suffix(f".tmp{os.getpid()}")
        save_file({"ids": ids.short().unflatten(0, (n, WORDINGS)), "lengths": mask.sum(1).short().unflatten(0, (n, WORDINGS))}, tmp)
        tmp.rename(path)                                    # whole or not at all, whoever else makes it
    return load_file(path)


class Batches:
    """Batch number k of a process: latents in a new order each epoch, each scene in one of its wordings, some captions dropped. Of a cache of your own pictures, see cache.py."""

    def __init__(self, cfg: Config, latents, device, rank, world):
        if len(latents) < cfg.batch * world:
            more = "add pictures" if cfg.data.folder else "raise data.pictures"
            raise UserError(f"{len(latents)} pictures are less than one batch ({cfg.batch} x {world} processes): lower batch, or {more}")
        self.cfg, self.latents, self.device, self.rank, self.world = cfg, latents, device, rank, world
        if not cfg.data.folder:
            self.latents, self.epoch = latents.to(device), -1       # 2 kB each at 64 px: they fit, and so do the words
            words = wordings(cfg, len(latents))
            self.ids, self.lengths = (words[k].to(device) for k in ("ids", "lengths"))
            self.empty = tokenize([""])[0][0].to(device)            # (1,)

    def __call__(self, k: int):
        if self.cfg.data.folder:
            return [x.to(self.device) for x in self.latents.batch(k, self.rank, self.world)]
        cfg, per_epoch = self.cfg, len(self.latents) // (self.cfg.batch * self.world)
        if k // per_epoch != self.epoch:
            self.epoch = k // per_epoch
            self.order = torch.randperm(len(self.latents), generator=torch.Generator().manual_seed(cfg.seed * 100003 + self.epoch)).to(self.device)
        first = (k % per_epoch * self.world + self.rank) * cfg.batch
        index = self.order[first:first + cfg.batch]
        g = torch.Generator().manual_seed(2**40 + cfg.seed * 1000003 + k * self.world + self.rank)     # other numbers than the noise's
        which, drop = (x.to(self.device) for x in (torch.randint(WORDINGS, (cfg.batch,), generator=g), torch.rand(cfg.batch, generator=g) < cfg.drop_caption))
        ids, lengths = self.ids[index, which].long(), self.lengths[index, which].long()             # (B, L), (B,)
        ids[drop], lengths[drop] = encoding().n_vocab - 1, 1
        ids[drop, 0] = self.empty
        ids = ids[:, :lengths.max()] if ids.device.type == "cpu" else ids                           # on a GPU always the same shape
        return self.latents[index].float(), ids, torch.arange(ids.shape[1], device=self.device) < lengths[:, None]


class Validation:
    """Held-out pictures with fixed noise and times: 8 bins of t, so that the loss can be read against t. Equal for all runs on the same data; asked in parts of a training batch."""

    def __init__(self, cfg: Config, latents, device):
        if cfg.data.folder:
            groups = latents.groups(cfg.val_pictures)           # one a bucket
        else:
            scenes = scenes_of(cfg.data, "test")
            groups = [(latents.float(), *tokenize([scenes.caption(scenes.scene(i), random.Random(i)) for i in range(len(latents))], cfg.text.max_tokens))]
        sizes, g = [len(x0) for x0, *_ in groups], torch.Generator().manual_seed(1234)
        eps = [torch.randn(x0.shape, generator=g) for x0, *_ in groups]
        self.t = (torch.arange(sum(sizes)) % 8 + torch.rand(sum(sizes), generator=g)) / 8
        self.device = device
        self.batches = [part for (x0, *words), e, t in zip(groups, eps, self.t.split(sizes)) for part in zip(*(x.split(cfg.batch) for x in (x0, e, t, *words)))]

    @torch.no_grad()
    def __call__(self, net, amp) -> np.ndarray:
        """Mean loss per bin of t, (8,)."""
        losses = []
        for part in self.batches:
            x0, eps, t, *words = (x.to(self.device) for x in part)
            with amp():
                losses.append(flow_loss(lambda x, t: net(x, t, *words), x0, eps, t))
        losses, bins = torch.cat(losses).cpu(), (self.t * 8).long().clamp(max=7)
        return np.array([losses[bins == b].mean().item() for b in range(8)])


# ---------------------------------------------------------------------------- the loop
def train(cfg: Config, make_objective=FlowObjective):
    if bad := [k for k in ("steps", "batch", "accumulate", "processes", "warmup", "log_every", "eval_every", "val_pictures", "samples") if getattr(cfg, k) < 1]:
        raise UserError(f"{bad[0]} wants 1 or more, got {getattr(cfg, bad[0])}")
    device, rank, world = setup(cfg.device)
    out, main = Path(cfg.out), rank == 0
    amp_on = use_bfloat16(cfg.amp, device)
    amp = lambda: torch.autocast(device.type, torch.bfloat16, enabled=amp_on)

    torch.manual_seed(cfg.seed)
    make = lambda: TextToLatents(chosen(cfg.arch, cfg.model, cfg.mmdit), cfg.text)
    net, sharded = make().to(device), cfg.shard and world > 1
    if cfg.init:
        load_into(net, load_model(cfg.init, device)[0].state_dict(), cfg.init)
    objective = make_objective(net).to(device)                  # what is in it beside `net` is trained and kept, not averaged nor shipped
    beside = lambda: {k: v for k, v in objective.state_dict().items() if not k.startswith("net.")}
    if sharded:
        shard(objective, device, amp_on, cfg.compile)
    opt = Muon(objective, cfg.lr, cfg.muon_lr, cfg.weight_decay)

    ae, latents, held_out = load_data(cfg, device, rank, world, objective.states)
    batches, validation = Batches(cfg, latents, device, 0, 1), Validation(cfg, held_out, device)     # of the whole run: a process takes every world-th batch
    prompts = shown_prompts(cfg)[:cfg.samples]
    if net.text is None:
        net.frozen.append(held_out.encode)                      # of the sample grids: from the cache, so that no encoder is loaded

    ema, start = EMA(net, cfg.ema), 0
    if (out / "latest").exists() and sharded:
        saved = load_shards(out, {"model": net.state_dict(), "ema": ema.state_dict(), "beside": beside(), "optimizer": opt.allocate()})     # the moments last: they have no names to complain with
        start, ema.steps = saved["step"], saved["ema_steps"]
    elif (out / "latest").exists():
        saved, state = load_checkpoint(out, ("model", "ema", "optimizer", "beside"))
        start = saved["step"]
        load_into(objective, {**{f"net.{k}": v for k, v in state["model"].items()}, **state.get("beside", {})}, cfg.out)
        ema.load_state_dict(state["ema"], saved["ema_steps"])
        opt.load_tensors(state["optimizer"])
    if main:
        print(f"{cfg.out}: {count_params(net.denoiser) / 1e6:.2f} M {type(net.denoiser).__name__} + {(count_params(net) - count_params(net.denoiser)) / 1e6:.2f} M text encoder, "
              f"{len(latents)} pictures of {cfg.data.size} px, {device}" + (f", resumed at step {start}" if start else ""), flush=True)

    flops, peak = costs(cfg, device, amp_on)
    run = objective
    if cfg.compile and not sharded:
        net.compile()                                           # in place: the names of its weights stay
    if world > 1 and not sharded:
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")      # a convolution's few, in channels_last: DDP copies them
        run = nn.parallel.DistributedDataParallel(objective, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    log, clock, skipped, in_a_row, step, seen = Log(out / "log.csv", cfg.steps, start, quiet=not main), time.time(), 0, 0, start, []

    def save():
        tensors = {"model": net.state_dict(), "ema": ema.state_dict(), "optimizer": opt.tensors(), "beside": beside()}
        tensors, config = {k: v for k, v in tensors.items() if v}, {**asdict(cfg), "step": step, "ema_steps": ema.steps}
        if sharded:
            save_shards(out / "checkpoint", tensors, config)
        elif main:
            save_checkpoint(out / "checkpoint", tensors, config)

    def evaluate():
        """On the first process: held-out loss of the raw and of the averaged weights, and the sample grid of the averaged ones. A sharded network comes as whole copies."""
        raw_net, net_ = (whole(make, net.state_dict(), device), whole(make, {**net.state_dict(), **ema.state_dict()}, device)) if sharded else (net, net)
        if not main:
            return
        net_.frozen = net.frozen
        net.eval()
        raw = np.nanmean(validation(raw_net, amp))             # of few pictures some bins are empty
        with contextlib.nullcontext() if sharded else ema.swapped():
            bins = validation(net_, amp)
            pictures = generate(net_, ae, prompts, range(len(prompts)), cfg.data.size, cfg.sample_steps, cfg.cfg, shift=cfg.flow.shift, batch=max(1, cfg.batch // 2))     # guidance doubles it
        net.train()
        grid(pictures, prompts, 6, max(1, 192 // cfg.data.size)).save(out / f"samples_{step:07d}.png")
        log(step, show=False, val=float(np.nanmean(bins)), val_raw=float(raw), **{f"bin{b}": float(v) for b, v in enumerate(bins)})
        print(f"step {step}: held-out loss {np.nanmean(bins):.4f} (raw weights {raw:.4f}); per bin of t " + " ".join(f"{v:.3f}" for v in bins), flush=True)
        plots.losses(out / "log.csv", out / "loss.png")

    while step < cfg.steps and not (step % 5 == 0 and anywhere(bool(stop), world)):
        opt.schedule(rate(cfg, step))
        total = 0.0
        for micro in range(cfg.accumulate):
            k = (step * cfg.accumulate + micro) * world + rank  # of the whole run
            x0, *words = batches(k)                             # (B, C, H, W), (B, L) or (B, L, D), (B, L)
            g = torch.Generator(device).manual_seed(cfg.seed * 1000003 + k)
            eps, t = torch.randn(x0.shape, generator=g, device=device), draw_times(cfg.flow, len(x0), g, device)
            last = micro == cfg.accumulate - 1
            with contextlib.nullcontext() if last or world == 1 or sharded else run.no_sync():     # sharded: averaged each time, so that no whole gradient is kept
                with amp():
                    losses, values = run(x0, eps, t, *words)
                    loss = losses.mean() / cfg.accumulate
                loss.backward()
            total += loss.detach()
            seen += [values] if main else []
        norm = nn.utils.clip_grad_norm_(objective.parameters(), cfg.clip)
        norm = norm.full_tensor() if sharded else norm          # over all processes' rows
        if torch.isfinite(norm):
            opt.step()
            ema.update()
            in_a_row = 0
        else:                                                   # the same on all ranks: gradients are averaged already
            skipped, in_a_row = skipped + 1, in_a_row + 1
            culprit = next((n for n, p in objective.named_parameters() if p.grad is not None and not torch.isfinite(rows(p.grad)).all()), "the norm alone")
            print(f"step {step}: loss {float(total):.4g}, gradient not finite (first in {culprit}): step skipped, {skipped} so far", flush=True)
            if in_a_row == 20:
                raise UserError(f"20 steps in a row without a finite gradient: lower lr (now {cfg.lr:g}) or set amp=float32; the last good checkpoint is in {out}")
        opt.zero_grad(set_to_none=True)
        step += 1
        if step % cfg.log_every == 0:
            total = mean_over(total, world)
        if step % cfg.log_every == 0 and main:
            seconds, clock = time.time() - clock, time.time()
            speed = cfg.log_every * cfg.batch * cfg.accumulate * world / seconds
            means, seen = {k: torch.stack([v[k] for v in seen]).nanmean(0).tolist() for k in values}, []
            log(step, loss=float(total), **{k: v for k, v in means.items() if isinstance(v, float)}, lr=cfg.lr * rate(cfg, step - 1), grad=float(norm),
                **{"img/s": speed, "mfu": f"{100 * speed * flops / (peak * world):.0f}%", "mem": f"{peak_memory(device):.1f}G"})
            if bins := {f"{k}{i}": x for k, v in means.items() if isinstance(v, list) for i, x in enumerate(v)}:
                log(step, show=False, **bins)
        if step % cfg.eval_every == 0 or step == cfg.steps:
            save()
            if not anywhere(bool(stop), world):
                evaluate()
            clock = time.time()
    final = gathered({**net.state_dict(), **ema.state_dict()}) if step == cfg.steps else {}
    if step < cfg.steps:
        save()
        if main:
            print(f"stopped by SIGTERM, saved at step {step}: run the same command to go on", flush=True)
    elif main:
        frames = [Image.open(p).convert("RGB") for p in sorted(out.glob("samples_*.png"))]
        if frames:
            frames[0].save(out / "samples.gif", save_all=True, append_images=frames[1:] + frames[-1:] * 4, duration=500, loop=0)
        small = {k: v.half() for k, v in final.items()}         # fp16, to ship
        save_checkpoint(out / "final", {"model": small}, {**asdict(cfg), "step": step}, latest=False)
        print(f"done: {out}/final" + ("" if stop else f", samples_{step:07d}.png, loss.png") + f"; try `python sample.py \"a red car\" --ckpt {out}`")


if __name__ == "__main__":
    with friendly():
        config = read_config(Config(), [a for a in sys.argv[1:] if a != "--dry-run"], "configs/nano.toml")
        if "--dry-run" in sys.argv:
            sys.exit(dry_run(config) and 0)
        if config.processes > 1 and "WORLD_SIZE" not in os.environ and pick_device(config.device).type == "cpu":
            start_others(config.processes)
        train(config)
