"""Trains a UNet (or, arch = "mmdit", a teacher) and its text encoder by rectified flow.

    python train.py [--config configs/nano.toml] [key=value ...]       `nano`: a laptop, minutes
    torchrun --nproc_per_node 8 train.py --config configs/base.toml
    python train.py --config configs/folder.toml data.folder=DIR    your own pictures
    python train.py --cache --config configs/folder.toml data.folder=DIR    ready them, no more

Run it again to resume. In the run's directory: log.csv, loss.png, samples_*.png, samples.gif,
checkpoint/, and at the end final/, the averaged weights in fp16, to ship.

Every random draw is a function of the seed and of the micro-batch's number in the whole run. So no
generator's state is saved, a resumed run equals an uninterrupted one bit for bit on a CPU, and so
many processes or so many accumulated micro-batches are the same training but for rounding.

B batch | C H W latents | L text tokens | D width of a text state
"""
import contextlib
import random
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

import plots
from cache import (
    autoencoder_fingerprint,
    ensure_cache,
    folder_vocabulary,
    make_cache,
    open_cache,
)
from checkpoint import Run, load_into, read_description, resolve
from common import (
    UserError,
    autocast,
    by_turns,
    command_line,
    fill,
    friendly,
    option,
    read_config,
    read_toml,
    setup,
    use_bfloat16,
)
from compiling import compile_blocks, load_compiled, save_compiled
from costs import device_peak, training_flops
from data import (
    Batch,
    Batches,
    DataConfig,
    FlowConfig,
    check_tables,
    latents_of,
    scenes_of,
    seeded,
    wordings,
)
from decoder import load_autoencoder
from mmdit import MMDiTConfig
from model import TextToLatents, UNetConfig, count_params, load_model
from optim import EMA, Learner, Muon, rate
from processes import meanwhile
from sample import generate, shift_time
from scenes import CATEGORIES
from text import TextConfig, Tokens, load_taught

@dataclass
class TrainConfig:
    out: str = "runs/nano"
    arch: str = option("unet", choices=("unet", "mmdit"))   # which of the next two tables
    model: UNetConfig = field(default_factory=UNetConfig)
    mmdit: MMDiTConfig = field(default_factory=MMDiTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    ae: str = "assets/ae"
    init: str = ""                  # checkpoint whose weights a new run starts from, and whose
                                    # network, text encoder, flow and scenes are its defaults
    steps: int = option(4000, low=1)
    batch: int = option(64, low=1, high=65536)          # of a process and micro-batch
    accumulate: int = option(1, low=1, high=65536)
    lr: float = option(1e-3, above=0)
    muon_lr: float = option(0.0, low=0)     # the matrices' rate, by Muon; 0: AdamW for all
    text_rate: float = option(1.0, low=0)   # the text encoder's share of both rates
    warmup: int = option(100, low=1)
    weight_decay: float = option(0.01, low=0)
    clip: float = option(1.0, above=0)      # of the gradient's norm
    ema: float = option(0.999, low=0, high=0.999999)    # averages over the last 1 / (1 - ema) steps
    drop_caption: float = option(0.1, low=0, high=1)    # empty caption, which guidance needs
    log_every: int = option(50, low=1)
    eval_every: int = option(500, low=1)    # validation, sample grid, checkpoint
    val_pictures: int = option(256, low=1, high=100000)
    samples: int = option(24, low=1, high=1000)        # pictures of a sample grid
    sample_steps: int = option(20, low=1, high=1000)
    guidance: float = option(4.0, low=0)    # of the sample grids
    compile: bool = False
    amp: str = option("auto", choices=("auto", "bfloat16", "float32"))
    seed: int = option(0, low=0, high=2**64 - 1)
    device: str = "auto"

    def check(self):
        grain, most, limit = 8 * 2 ** (len(self.model.widths) - 1), float("inf"), ""
        if self.arch == "mmdit":
            grain = 8 * self.mmdit.patch
            most = grain * self.mmdit.position_max      # where its position table ends
            limit = f", up to {most}"
        key, longest = "size", self.data.size
        if self.data.folder:
            key, longest = "bucket_step", longest * self.data.max_ratio**0.5
        if getattr(self.data, key) % grain or longest > most:
            raise UserError(f"data.{key}={getattr(self.data, key)}: the network draws multiples of "
                            f"{grain} pixels{limit}")
        if self.text.kind != "own" and not self.data.folder:
            raise UserError(f"text.kind={self.text.kind} is read from a cache of your own pictures:"
                            " set data.folder, and run the same command with --cache first")

    @property
    def network(self) -> UNetConfig | MMDiTConfig:
        return self.mmdit if self.arch == "mmdit" else self.model

def flow_loss(velocity, x0, eps, t):
    """Rectified flow: velocity(x_t, t) should be eps - x0 (docs/PAPER.md, section 4).
    Latents x0 and eps (B, C, H, W), t (B,) -> loss per picture (B,)."""
    a = t[:, None, None, None]
    v = velocity((1 - a) * x0 + a * eps, t)                 # (B, C, H, W)
    return (v.float() - (eps - x0)).square().mean((1, 2, 3))

class FlowObjective(nn.Module):
    """What the loop minimises. Distillers write their own.
    An objective holds the network as `net`, and beside it whatever else is trained. forward gives
    the loss per picture (B,) and values for the log: numbers for its line, vectors for log.csv
    alone (nan: none in this batch)."""
    states = None                   # text encoders whose cached states a teacher reads

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch: Batch, eps, t):
        return flow_loss(lambda x, t: self.net(x, t, batch.text), batch.x0, eps, t), {}

def draw_times(cfg: FlowConfig, n: int, generator, device):
    """n times (n,), logit-normal (Esser et al. 2024), shifted."""
    normal = torch.randn(n, generator=generator, device=device)
    return shift_time(torch.sigmoid(cfg.mean + cfg.std * normal), cfg.shift)

def load_data(cfg: TrainConfig, device, rank: int, world: int, vocabulary, states=None):
    """(autoencoder, training data, held-out data), for Batches and Validation.
    Data are latents of scenes, or both sides of the cache of your own pictures. states: a teacher's
    text encoders (a TextConfig), whose states that cache must hold too."""
    ae = load_autoencoder(cfg.ae, device)
    if cfg.data.folder:
        return ae, *open_cache(cfg, ae, states, vocabulary)
    def scenes_data():
        latents, held_out = latents_of_scenes(cfg, ae)
        wordings(cfg, len(latents), vocabulary)         # which Batches reads
        return latents, held_out
    return ae, *by_turns(scenes_data, rank, world)

def latents_of_scenes(cfg: TrainConfig, ae):
    """(latents to train on, held-out ones) in fp16."""
    key = autoencoder_fingerprint(ae)
    return latents_of(cfg.data, ae, key), latents_of(cfg.data, ae, key, "test", cfg.val_pictures)

COMPILED = "compiled.bin"       # in the run's directory

def make_scenes(cfg: TrainConfig):
    """latents_of_scenes() from the config alone, in a process of its own."""
    latents_of_scenes(cfg, load_autoencoder(cfg.ae, setup(cfg.device)[0]))

def compile_first(cfg: TrainConfig, model, opt: Muon, vocabulary, device, bfloat16: bool):
    """Compiles all that a step on scenes runs, before they are made: a step on zeros, which changes
    no weight and no later draw."""
    side = cfg.data.size // 8
    L = wordings(cfg, cfg.data.pictures, vocabulary)["ids"].shape[2]
    ids = torch.zeros(cfg.batch, L, dtype=torch.long, device=device)
    x0 = torch.zeros(cfg.batch, cfg.network.in_channels, side, side, device=device)
    batch = Batch(x0, Tokens(ids, torch.ones_like(ids, dtype=torch.bool)))
    accumulate(cfg, model, lambda k: batch, 0, device, 0, 1, bfloat16)
    opt.step(torch.zeros((), dtype=torch.bool, device=device))
    opt.zero_grad(set_to_none=True)

def shown_prompts(cfg: TrainConfig, held_out) -> list[str]:
    """Held-out prompts for the sample grid; of scenes, cycling through the six categories."""
    if cfg.data.folder:
        return held_out.captions()[:cfg.samples]
    test = scenes_of(cfg.data, "test")
    scenes = [test.scene(i, CATEGORIES[i % len(CATEGORIES)]) for i in range(cfg.samples)]
    return [test.caption(scene, random.Random(0)) for scene in scenes]

def learned_things(cfg: TrainConfig) -> list[str]:
    """The nouns of its scenes: what sample.py says that the network knows."""
    return [] if cfg.data.folder else scenes_of(cfg.data).nouns

class Validation:
    """Held-out loss on fixed pictures, noise and times, in 8 bins of t.
    Equal for all runs on the same data. The network is asked in parts of a training batch."""
    def __init__(self, cfg: TrainConfig, held_out, device, vocabulary):
        if cfg.data.folder:
            groups = held_out.groups(cfg.val_pictures)      # [(x0, text)], one for each bucket
        else:
            test = scenes_of(cfg.data, "test")
            captions = [test.caption(test.scene(i), random.Random(i)) for i in range(len(held_out))]
            groups = [(held_out.float(), vocabulary.tokenize(captions, cfg.text.max_tokens))]
        g = torch.Generator().manual_seed(1234)
        noises = [torch.randn(x0.shape, generator=g) for x0, _ in groups]
        n = sum(len(x0) for x0, _ in groups)
        self.t = (torch.arange(n) % 8 + torch.rand(n, generator=g)) / 8     # (n,)
        self.device = device
        self.parts = []                                     # (x0, eps, t, text) each
        first = 0
        for (x0, text), eps in zip(groups, noises):
            for i in range(0, len(x0), cfg.batch):
                part = slice(i, i + cfg.batch)
                t = self.t[first:first + len(x0)][part]
                some = type(text)(*(None if x is None else x[part] for x in text))
                self.parts.append((x0[part], eps[part], t, some))
            first += len(x0)

    @torch.no_grad()
    def __call__(self, net, bfloat16: bool) -> np.ndarray:
        """Mean loss per bin of t (8,); nan where a bin is empty."""
        losses = []
        for x0, eps, t, text in self.parts:
            x0, text, _ = Batch(x0, text).to(self.device)
            eps, t = eps.to(self.device), t.to(self.device)
            with autocast(self.device, bfloat16):
                losses.append(flow_loss(lambda x, t, text=text: net(x, t, text), x0, eps, t).cpu())
        losses = torch.cat(losses)                          # (n,)
        bins = (self.t * 8).long().clamp(max=7)
        means = [losses[bins == b].mean().item() for b in range(8)]
        return np.array(means)

def train(cfg: TrainConfig, make_objective=FlowObjective):
    """The whole training: builds or resumes, loops, evaluates, writes final/."""
    begin = time.time()
    device, rank, world = setup(cfg.device)
    bfloat16 = use_bfloat16(cfg.amp, device)
    torch.manual_seed(cfg.seed)
    if cfg.data.folder:
        ensure_cache(cfg)
    net = first_network(cfg).to(device)
    objective = make_objective(net).to(device)
    text = net.text.parameters() if net.text else ()
    opt = Muon(objective, cfg.lr, cfg.muon_lr, cfg.weight_decay, slow=text, share=cfg.text_rate,
               compile=cfg.compile)
    ema = EMA(net, cfg.ema)
    learner = Learner(objective, opt, cfg.clip, ema)
    parts = {"model": net, "ema": ema, "optimizer": opt}
    beside = nn.ModuleDict({k: m for k, m in objective.named_children() if k != "net"})
    if beside:                              # trained and checkpointed, not averaged, not exported
        parts["beside"] = beside
    things = {"things": learned_things(cfg)}
    run = Run(cfg, device, rank, world, things, net.files(), **parts)
    model = wrapped(cfg, objective, net, device, world)
    if cfg.compile:
        load_compiled(run.out / COMPILED, device)
    if cfg.compile and not cfg.data.folder and world == 1:
        with meanwhile(make_scenes, cfg):
            compile_first(cfg, model, opt, net.vocabulary, device, bfloat16)

    ae, latents, held_out = load_data(cfg, device, rank, world, net.vocabulary,
                                      objective.states)
    batches = Batches(cfg, latents, device, net.vocabulary)
    validation = Validation(cfg, held_out, device, net.vocabulary)
    prompts = shown_prompts(cfg, held_out)
    if net.text is None:                    # the grids' text states come from the cache
        net.frozen.append(held_out)
    peak, source = device_peak(device, bfloat16)
    run.least = flops_of_batches(cfg, batches) / (peak * world)
    if rank == 0:
        own = count_params(net.denoiser) / 1e6
        print(f"{cfg.out}: {own:.2f} M {type(net.denoiser).__name__} + "
              f"{count_params(net) / 1e6 - own:.2f} M text encoder, {len(latents)} pictures of "
              f"{cfg.data.size} px, {device}, step {run.step} of {cfg.steps}, "
              f"MFU of {peak / 1e12:.3g} TFLOP/s ({source})", flush=True)
    report = partial(report_progress, cfg, run, net, ema, ae, validation, prompts, bfloat16)
    if run.lacks("val"):
        report()

    for step in run.steps():
        opt.schedule(rate(cfg, step))
        loss, values = accumulate(cfg, model, batches, step, device, rank, world, bfloat16)
        norm = learner.step()
        run.log(pictures=cfg.batch * cfg.accumulate, learners=[learner], loss=loss, **values,
                lr=cfg.lr * rate(cfg, step), grad=norm)
        if cfg.compile and step == run.start and rank == 0:
            print(f"step {run.step}: loss {loss:.4f}, {time.time() - begin:.0f} s after the start",
                  flush=True)
            save_compiled(run.out / COMPILED, device)
            run.restart_clock()
        if run.due():
            run.save()
            if rank == 0 and not run.stop:
                report()
            run.restart_clock()

    final = {**net.state_dict(), **ema.state_dict()}
    if run.finish(final) and rank == 0:
        save_gif(run.out)
        print(f"done: {run.out}/final, samples_{run.step:07d}.png, loss.png; try "
              f"`{command_line(['python', 'sample.py', prompts[0], '--ckpt', run.out])}`")

def first_network(cfg: TrainConfig) -> TextToLatents:
    """The network that a new run starts from: cfg.init, or new with the text encoder text.init."""
    if cfg.init:
        start, _ = load_model(cfg.init)
        net = TextToLatents(cfg.network, cfg.text, start.vocabulary)
        return load_into(net, start.state_dict(), cfg.init)
    if not cfg.text.init:
        own = cfg.data.folder and cfg.text.kind == "own"
        return TextToLatents(cfg.network, cfg.text, folder_vocabulary(cfg) if own else None)
    vocabulary, state = load_taught(cfg.text.init)
    net = TextToLatents(cfg.network, cfg.text, vocabulary)
    load_into(net.text, {k: v.float() for k, v in state.items()}, f"text.init={cfg.text.init}")
    return net

def wrapped(cfg: TrainConfig, objective, net, device, world: int):
    """The objective as the loop calls it: compiled, and averaging gradients over processes."""
    if cfg.compile:
        compile_blocks(net, dynamic=bool(cfg.data.folder))
    if world == 1:
        return objective
    # a few of a channels_last convolution's gradients have other strides: DDP copies them
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(objective, ids, gradient_as_bucket_view=True)

def flops_of_batches(cfg: TrainConfig, batches: Batches) -> float:
    """training_flops() for the captions' length and the buckets that the batches have."""
    tokens, buckets = batches(0).text.mask.shape[1], None
    if cfg.data.folder:
        buckets = {bucket: len(rows) for bucket, rows in batches.latents.rows.items()}
    return training_flops(cfg, tokens, buckets)

def accumulate(cfg: TrainConfig, model, batches, step, device, rank, world, bfloat16):
    """Gradients of one step, over cfg.accumulate micro-batches -> (mean loss, values to log)."""
    total, noted = 0.0, []
    for micro in range(cfg.accumulate):
        k = (step * cfg.accumulate + micro) * world + rank  # the micro-batch's number in the run
        batch = batches(k)
        x0 = batch.x0                                       # (B, C, H, W)
        g = seeded(cfg.seed * 1000003 + k, device)
        eps = torch.randn(x0.shape, generator=g, device=device)
        t = draw_times(cfg.flow, len(x0), g, device)        # (B,)
        last = micro == cfg.accumulate - 1
        with contextlib.nullcontext() if last or world == 1 else model.no_sync():
            with autocast(device, bfloat16):
                losses, values = model(batch, eps, t)
                loss = losses.mean() / cfg.accumulate
            loss.backward()
        total = total + loss.detach()
        noted.append(values)
    return total, {k: torch.stack([v[k] for v in noted]).nanmean(0) for k in noted[0]}

def report_progress(cfg: TrainConfig, run: Run, net, ema: EMA, ae, validation, prompts, bfloat16):
    """Held-out loss of raw and averaged weights, and the averaged ones' sample grid."""
    net.eval()
    # an evaluation has other shapes than training: run eagerly, or each would be compiled anew
    with torch.compiler.set_stance("force_eager" if cfg.compile else "default"):
        raw = np.nanmean(validation(net, bfloat16))         # few pictures leave some bins empty
        with ema.swapped():
            bins = validation(net, bfloat16)
            pictures = generate(net, ae, prompts, range(len(prompts)), cfg.data.size,
                                cfg.sample_steps, cfg.guidance, shift=cfg.flow.shift,
                                batch=max(1, cfg.batch // 2))       # guidance doubles the batch
    net.train()
    sheet = plots.grid(pictures, prompts, 6, max(1, 192 // cfg.data.size))
    sheet.save(run.out / f"samples_{run.step:07d}.png")
    val = float(np.nanmean(bins))
    run.row(val=val, val_raw=float(raw), **{f"bin{b}": float(v) for b, v in enumerate(bins)})
    print(f"step {run.step}: held-out loss {val:.4f} (raw weights {raw:.4f}); per bin of t "
          + " ".join(f"{v:.3f}" for v in bins), flush=True)
    plots.losses(run.out / "log.csv", run.out / "loss.png")

def save_gif(out):
    """samples.gif from all sample grids; the last one is shown longer."""
    frames = [Image.open(path).convert("RGB") for path in sorted(out.glob("samples_*.png"))]
    if frames:
        frames[0].save(out / "samples.gif", save_all=True, duration=500, loop=0,
                       append_images=frames[1:] + frames[-1:] * 4)

def read_training(cls, argv: list[str], default: str):
    """read_config() of a TrainConfig or a kind of it. What it does not say of the network, its text
    encoder, the flow and the scenes is inherited from the checkpoint `init`, where there is one."""
    cfg = read_config(cls(), argv, default)
    if not cfg.init:
        return cfg
    if "--config" not in argv and "init" not in read_toml(default):
        default = None                              # it describes another network
    theirs, inherited = read_description(resolve(cfg.init)), cls()
    check_tables(theirs, cfg.init)
    own = {k: theirs[k] for k in ("arch", "model", "mmdit", "text", "flow", "ae") if k in theirs}
    own["data"] = {k: theirs["data"][k] for k in ("size", "nouns", "layout", "atlas", "old")}
    fill(inherited, own, cfg.init)
    inherited.text.init = ""                        # its states are in the checkpoint, taught on
    return read_config(inherited, argv, default)

def main(argv):
    make = "--cache" in argv
    argv = [a for a in argv if a != "--cache"]
    default = "configs/folder.toml" if make else "configs/nano.toml"
    cfg = read_training(TrainConfig, argv, default)
    make_cache(cfg) if make else train(cfg)

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
