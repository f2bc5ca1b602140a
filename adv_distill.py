"""Adversarial step distillation (SnapGen, section 3.4): a student of 28 guided steps becomes one of K steps without guidance.

    python adv_distill.py [--config configs/adv_nano.toml] [key=value ...]      trains; run it again to resume
    python adv_distill.py --config configs/adv_sd35.toml --dry-run              parameters, memory, FLOPs, days (plan.py); trains nothing
    python evaluate.py --figure runs/kd_nano runs/adv_nano --out steps.png      before and after at 1, 2, 4, 8 and 28 steps, and the scores against steps

    min_G max_D  E[ log D(x_t', t') + log(1 - D(x~_t', t')) ] + S(L_task, L_kd)

G sees x_t at one of K fixed times and predicts x0 in one evaluation. D sees that prediction, noised again to a random t', through the features of a frozen denoiser
and small trainable heads (LADD, Sauer et al. 2024). L_kd asks G for the guided teacher's velocity, which is how guidance gets in. method = "dmd": instead of D, or
beside it ("both"), a second score network learns what G makes, and G moves along the difference of the two scores (DMD2, Yin et al. 2024).
In the run's directory: log.csv, health.png, samples_*.png, checkpoint/, and at the end final/, whose config.json tells sample.py how to draw (few_steps).
B batch | C H W latents | h w a tap's grid | N logits of a head
"""
import copy, os, signal, sys, time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import distill, plots
from checkpoint import load_checkpoint, load_into, read_description, resolve, save_checkpoint
from common import Log, UserError, anywhere, fill, friendly, pick_device, read_config, setup, start_others, use_bfloat16
from data import grid
from distill import Distill, Teacher, find_teacher, teacher_network
from model import count_params
from optim import EMA, Muon
from plan import forward_flops, frozen, report, tap_names, tap_shape, trained
from sample import chosen, euler, generate, load_model, network_of, settings, times, to_pictures
from train import Batches, FlowConfig, Validation, draw_times, flow_loss, load_data, rate, shown_prompts


@dataclass
class Config(distill.Config):
    out: str = "runs/adv_nano"
    init: str = "runs/kd_nano"      # the student: its networks, text and flow are taken over
    teacher: str = ""               # empty: the student itself, frozen
    teacher_cfg: float = 4.0        # guidance that is distilled in
    kd_steps: int = 1               # evaluations of the teacher from x_t down to its x0; 1: its velocity there
    featkd: bool = False            # not in this stage
    drop_caption: float = 0.0       # no guidance later, so no empty caption
    method: str = "gan"             # gan, dmd or both
    K: int = 4                      # steps of the student, at sample.times(K, shift)
    shift: float = 0.0              # of those times; 0: the student's flow.shift
    sampler: str = "euler"          # of the student: euler, or renoise (predict x0, noise it afresh)
    backward_simulation: bool = False   # x_t: where G itself gets by that sampler, instead of noised data
    generator_every: int = 2        # steps of D and of the fake score for one of G
    kd_weight: float = 1.0          # of S(L_task, L_kd)
    # gan
    loss: str = "hinge"             # paper (log form), nonsaturating or hinge
    gan_weight: float = 0.1
    critic: str = "teacher"         # whose frozen features: teacher or init
    critic_taps: list[str] = field(default_factory=list)    # empty: all stages or blocks
    critic_width: int = 64
    critic_lr: float = 5e-4
    critic_times: FlowConfig = field(default_factory=lambda: FlowConfig(mean=1.0))     # of t': logit-normal(1, 1)
    r1: float = 0.01                # times the squared gradient of a logit; 0: none
    r1_sigma: float = 0.1           # the small noise that it is estimated with
    # dmd
    dmd_weight: float = 1.0
    fake_lr: float = 5e-4
    steps: int = 2000
    lr: float = 2e-4


# ---------------------------------------------------------------------------- the generator
def noised(x0, t, g):
    """x_t with fresh noise: (B, C, H, W), t (B,)."""
    a = t[:, None, None, None]
    return (1 - a) * x0 + a * torch.randn(x0.shape, generator=g, device=x0.device)


def predict(net, x, t, *words):
    """x0 in one evaluation."""
    return x - t[:, None, None, None] * net(x, t, *words).float()


@torch.no_grad()
def simulated(net, walk, k, shape, words, g, sampler="renoise"):
    """x at walk[k], k (B,), on the path that the sampler takes from noise."""
    x = torch.randn(shape, generator=g, device=walk.device)
    for i in range(int(k.max())):
        on, t, s = (k > i).nonzero()[:, 0], walk[i], walk[i + 1]     # pictures that go on
        x0 = predict(net, x[on], t.expand(len(on)), *(w[on] for w in words))
        x = x.index_copy(0, on, noised(x0, s.expand(len(on)), g) if sampler == "renoise" else x0 + s / t * (x[on] - x0))
    return x


def teacher_velocity(teacher, x, t, words, steps: int):
    """From x_t straight to the x0 that the guided teacher reaches in so many Euler steps: (B, C, H, W)."""
    a = t[:, None, None, None]
    x0 = euler(lambda y, s: teacher(y, s.flatten(), *words)[0].float(), x, [a * (1 - i / steps) for i in range(steps + 1)])
    return (x - x0) / a


# ---------------------------------------------------------------------------- the discriminator
class Head(nn.Module):
    """Features (B, D, h, w), condition (B, W) -> a logit for each place (B, h w); the condition enters as a projection (Miyato and Koyama 2018)."""

    def __init__(self, D, W):
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(1, D), nn.Conv2d(D, W, 1), nn.SiLU(), nn.Conv2d(W, W, 3, padding=1), nn.SiLU())
        self.out = nn.Conv2d(W, 1, 1)

    def forward(self, f, c):
        y = self.body(f)                                        # (B, W, h, w)
        return (self.out(y)[:, 0] + (y * c[:, :, None, None]).mean(1)).flatten(1).float()


class Critic(nn.Module):
    """The heads are trained and kept; the frozen denoiser is a distill.Teacher, which is no module, so that it is neither. Gradients pass through it to the latents."""

    def __init__(self, cfg: Config, frozen: Teacher):
        super().__init__()
        network = frozen.denoiser.cfg
        self.frozen, self.taps = frozen, tuple(cfg.critic_taps or tap_names(network))
        W = cfg.critic_width
        self.heads = nn.ModuleList(Head(tap_shape(network, tap, cfg.data.size)[0], W) for tap in self.taps)
        self.embed = nn.Sequential(nn.Linear(32 + network.context_dim, W), nn.SiLU(), nn.Linear(W, W))      # t' and the text's mean state

    def forward(self, x, t, text):
        """Noised latents -> [logits (B, N) of each head]."""
        denoiser, weight = self.frozen.denoiser, text.mask[..., None].float()
        pooled = {} if text.pooled is None else {"pooled": text.pooled}
        _, taps = denoiser(x.to(next(denoiser.parameters()).dtype), t, text.emb, text.mask, features=self.taps, **pooled)
        angle = t[:, None] * torch.pi * 2.0 ** torch.arange(16, device=t.device).div(2)     # (B, 16)
        c = self.embed(torch.cat([angle.cos(), angle.sin(), (text.emb.float() * weight).sum(1) / weight.sum(1)], -1))    # (B, W)
        return [head(taps[name].float().contiguous(), c) for name, head in zip(self.taps, self.heads)]      # not channels_last: on a CPU GroupNorm's backward pass, where its input
                                                                                                            # wants no gradient, dies of that (torch 2.13)


FORMS = {  # what D minimises on real and on fake logits, what G minimises
    "paper": (lambda r: F.softplus(-r), lambda f: F.softplus(f), lambda f: -F.softplus(f)),             # log D(x) + log(1 - D(x~)), the minimax game itself
    "nonsaturating": (lambda r: F.softplus(-r), lambda f: F.softplus(f), lambda f: F.softplus(-f)),     # the same D; G maximises log D(x~)
    "hinge": (lambda r: F.relu(1 - r), lambda f: F.relu(1 + f), lambda f: -f),
}


def over_heads(form, logits):
    """Mean over places, then over heads: (B,)."""
    return torch.stack([form(x).mean(1) for x in logits]).mean(0)


def critic_loss(kind, real, fake):
    return over_heads(FORMS[kind][0], real) + over_heads(FORMS[kind][1], fake)

def generator_loss(kind, fake):
    return over_heads(FORMS[kind][2], fake)


def r1_penalty(critic, x, t, text, real, sigma: float, g):
    """E |D(x + sigma n) - D(x)|^2 / sigma^2, about the squared gradient of a logit (approximate R1, Lin et al. 2025: no second derivative through the features)."""
    near = critic(x + sigma * torch.randn(x.shape, generator=g, device=x.device), t, text)
    return torch.stack([(a - b).square().mean(1) for a, b in zip(near, real)]).mean(0) / sigma**2       # (B,)


# ---------------------------------------------------------------------------- distribution matching
@torch.no_grad()
def dmd_gradient(teacher, fake, x0, t, words, own, g):
    """The gradient on G's prediction x0 (DMD2, eq. 3): what the fake score's x0 is more than the guided real one's, over the latter's mean distance from x0.
    words: the teacher's, own: the student's. Over C H W, as the gradient of a mean over places has it: (B, C, H, W)."""
    x, a = noised(x0, t, g), t[:, None, None, None]
    real, false = x - a * teacher(x, t, *words)[0].float(), x - a * fake(x, t, *own).float()
    return (false - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6) / x0[0].numel()


# ---------------------------------------------------------------------------- health
@torch.no_grad()
def health(x0, real, ae, batch: int = 64) -> dict:
    """Of predicted latents and of real ones (B, C, H, W), decoded so many at a time. spread: how far pictures are from each other, over the same of real ones."""
    pixels, theirs = (torch.cat([ae.decode(part) for part in z.float().split(batch)]) for z in (x0, real))      # not clamped: (B, 3, 8H, 8W)
    out = {"latent_mean": x0.mean(), "latent_std": x0.std(), "spread": x0.std(0).mean() / real.std(0).mean(),
           "pixel_mean": pixels.mean(), "pixel_std": pixels.std(), "real_mean": theirs.mean(), "real_std": theirs.std()}
    return {k: float(v) for k, v in out.items()}


def verdict(h: dict) -> list[str]:
    """What is wrong with the samples, a line each."""
    lines = []
    if h["spread"] < 0.5:
        lines.append(f"collapse: different captions give like pictures, their spread is {h['spread']:.2f} of the real ones'; lower gan_weight or lr, or raise r1 or kd_weight")
    if h["pixel_std"] > 1.3 * h["real_std"]:
        lines.append(f"oversaturation: the pixels' deviation is {h['pixel_std']:.2f}, of real ones {h['real_std']:.2f}; lower teacher_cfg, or gan_weight")
    if abs(h["pixel_mean"] - h["real_mean"]) > 0.3 * h["real_std"]:
        lines.append(f"drift: the pixels' mean is {h['pixel_mean']:.2f}, of real ones {h['real_mean']:.2f}; lower lr or gan_weight, or raise kd_weight")
    return lines


# ---------------------------------------------------------------------------- the loop
def exchange(module):
    """Gradients become their mean over processes."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    if dist.is_initialized() and grads:
        flat = torch.cat([x.flatten() for x in grads])
        dist.all_reduce(flat)
        for x, part in zip(grads, flat.split([x.numel() for x in grads])):
            x.copy_(part.view_as(x) / dist.get_world_size())


def distil(cfg: Config):
    if bad := [k for k in ("steps", "batch", "warmup", "log_every", "eval_every", "val_pictures", "samples", "K", "kd_steps", "generator_every") if getattr(cfg, k) < 1]:
        raise UserError(f"{bad[0]} wants 1 or more, got {getattr(cfg, bad[0])}")
    for key, allowed in (("method", ("gan", "dmd", "both")), ("loss", tuple(FORMS)), ("critic", ("teacher", "init")), ("sampler", ("euler", "renoise"))):
        if getattr(cfg, key) not in allowed:
            raise UserError(f"{key} '{getattr(cfg, key)}': use {', '.join(allowed)}")
    if cfg.featkd or cfg.accumulate != 1 or cfg.shard:
        raise UserError("featkd, accumulate and shard are distill.py's: leave them out here (a larger batch serves for accumulate)")
    device, rank, world = setup(cfg.device)
    out, main, amp_on = Path(cfg.out), rank == 0, use_bfloat16(cfg.amp, device)
    amp = lambda: torch.autocast(device.type, torch.bfloat16, enabled=amp_on)

    # who plays: G, the frozen teacher, D's heads, the fake score
    net, student = load_model(cfg.init, device)
    fill(cfg, {k: student[k] for k in ("arch", "model", "mmdit", "text", "flow") if k in student}, str(cfg.init))
    cfg.teacher, cfg.shift = cfg.teacher or cfg.init, cfg.shift or cfg.flow.shift
    net.requires_grad_(True).train()
    torch.manual_seed(cfg.seed)
    teacher = Teacher(cfg, device)
    mixed = Distill(cfg, net, teacher)                          # for S(L_task, L_kd)
    parts = {"generator": (net, Muon(net, cfg.lr, cfg.muon_lr, cfg.weight_decay, (0.0, 0.99)))}
    if cfg.method != "dmd":
        frozen = teacher if cfg.critic == "teacher" else Teacher(replace(cfg, teacher=cfg.init), device)
        critic = Critic(cfg, frozen).to(device)
        parts["critic"] = critic, Muon(critic, cfg.critic_lr, 0.0, 0.0, (0.0, 0.99))
    if cfg.method != "gan":
        fake = copy.deepcopy(net)
        if find_teacher(cfg.teacher)[0] == "ours":              # where it fits, from the real score's weights (DMD2)
            theirs, about = load_model(cfg.teacher, device)
            if theirs.denoiser.cfg == net.denoiser.cfg and theirs.text_cfg == net.text_cfg:
                fake = theirs.requires_grad_(True).train()
        parts["fake"] = fake, Muon(fake, cfg.fake_lr, 0.0, cfg.weight_decay)

    ae, latents, held_out = load_data(cfg, device, rank, world, teacher.states)
    if net.text is None:
        net.frozen.append(held_out.encode)                      # of the sample grids, as in train.py
    batches, validation, prompts = Batches(cfg, latents, device, rank, world), Validation(cfg, held_out, device), shown_prompts(cfg)[:cfg.samples]
    few = {"steps": cfg.K, "sampler": cfg.sampler, "cfg": 1.0, "shift": cfg.shift}
    walk = torch.tensor(times(cfg.K, cfg.shift)[:-1], device=device)    # (K,), from 1 down
    ema, step, skipped = EMA(net, cfg.ema), 0, {name: 0 for name in parts}
    if (out / "latest").exists():
        names = ["model", "ema", "beside"] + [f"{n}{s}" for n in parts for s in ("", "_optimizer") if n + s != "generator"]
        saved, state = load_checkpoint(out, names)
        step, skipped = saved["step"], saved["skipped"]
        load_into(mixed, {**{f"net.{k}": v for k, v in state["model"].items()}, **state.get("beside", {})}, cfg.out)
        ema.load_state_dict(state["ema"], saved["ema_steps"])
        for name, (module, opt) in parts.items():
            if name != "generator":
                if name not in state:
                    raise UserError(f"{cfg.out} was trained without a {name}: go on with its own method, or give another out=")
                load_into(module, state[name], cfg.out)
            opt.load_tensors(state.get(f"{name}_optimizer", {}))
    if main:
        print(f"{cfg.out}: {cfg.init} in {cfg.K} steps at t = {' '.join(f'{t:.2f}' for t in walk.tolist())}, method {cfg.method}; " + ", ".join(
            f"{name} {count_params(module) / 1e6:.2f} M" for name, (module, _) in parts.items()) + f"; {device}" + (f", resumed at step {step}" if step else ""), flush=True)

    def save():
        tensors = {"model": net.state_dict(), "ema": ema.state_dict(), "beside": {k: v for k, v in mixed.state_dict().items() if not k.startswith("net.")}}
        for name, (module, opt) in parts.items():
            tensors |= {f"{name}_optimizer": opt.tensors()} | ({} if name == "generator" else {name: module.state_dict()})
        save_checkpoint(out / "checkpoint", {k: v for k, v in tensors.items() if v}, {**asdict(cfg), "step": step, "ema_steps": ema.steps, "skipped": skipped, "few_steps": few})

    def evaluate():
        """The averaged student in K steps: its grid, its health, its flow loss (how far it has left the flow)."""
        net.eval()
        with ema.swapped():
            x0 = torch.stack(generate(net, None, prompts, range(len(prompts)), cfg.data.size, **settings({**asdict(cfg), "few_steps": few}), batch=cfg.batch))
            val = float(np.nanmean(validation(net, amp)))
        net.train()
        with torch.inference_mode():
            pictures = [p for part in x0.split(cfg.batch) for p in to_pictures(ae.decode(part))]
        grid(pictures, prompts, 6, max(1, 192 // cfg.data.size)).save(out / f"samples_{step:07d}.png")
        h = health(x0, held_out[:len(x0)].to(device), ae, cfg.batch)
        log(step, show=False, val=val, **{f"sample_{k}": v for k, v in h.items()})
        print(f"step {step}: in {cfg.K} steps: " + ", ".join(f"{k} {v:.3f}" for k, v in h.items()) + f"; skipped {skipped}", flush=True)
        for line in verdict(h):
            print(f"step {step}: {line}", flush=True)
        plots.health(out / "log.csv", out / "health.png")

    def update(name: str):
        """One step of one player. A gradient that is not finite is counted and dropped: weights, average and moments stay as they were."""
        module, opt = parts[name]
        exchange(module)
        norm = nn.utils.clip_grad_norm_(module.parameters(), cfg.clip)
        if torch.isfinite(norm):
            opt.step()
            if name == "generator":
                ema.update()
        else:
            skipped[name] += 1
            if main:
                print(f"step {step}: the {name}'s gradient is not finite: its step skipped, {skipped[name]} so far", flush=True)
        opt.zero_grad(set_to_none=True)
        note(**{f"grad_{name}": norm})

    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    log, seen, begin, drawn = Log(out / "log.csv", cfg.steps, step, quiet=not main), defaultdict(list), time.time(), 0
    note = lambda **values: [seen[k].append(v.detach().float()) for k, v in values.items()]
    while step < cfg.steps and not (step % 5 == 0 and anywhere(bool(stop), world)):
        for _, opt in parts.values():
            opt.schedule(rate(cfg, step))
        x0, *words = batches(step)                              # (B, C, H, W), (B, L) or (B, L, D), (B, L)
        own = teacher.own(words)
        g = torch.Generator(device).manual_seed((cfg.seed * 1000003 + step) * world + rank)
        k = torch.randint(cfg.K, (len(x0),), generator=g, device=device)
        t, turn = walk[k], (step + 1) % cfg.generator_every == 0
        draw = lambda flow: draw_times(flow, len(x0), g, device)
        with amp():                                             # closed before the next: autocast keeps weights that it has cast without gradients
            x_t = simulated(net, walk, k, x0.shape, own, g, cfg.sampler) if cfg.backward_simulation else noised(x0, t, g)
        with amp(), torch.set_grad_enabled(turn):
            guess = predict(net, x_t, t, *own)                  # (B, C, H, W)
        made = guess.detach()

        # D: real pictures up, predictions down, both noised to t'
        if "critic" in parts:
            with torch.no_grad():
                text = critic.frozen.encode(*(words if critic.frozen is teacher else own))
            with amp():
                t2 = draw(cfg.critic_times)
                x2 = noised(x0, t2, g)
                real, false = critic(x2, t2, text), critic(noised(made, t2, g), t2, text)
                loss = critic_loss(cfg.loss, real, false)
                if cfg.r1:
                    r1 = r1_penalty(critic, x2, t2, text, real, cfg.r1_sigma, g)
                    loss = loss + cfg.r1 * r1
                    note(r1=r1.mean())
            loss.mean().backward()
            right = [((r > 0).float().mean() + (f < 0).float().mean()) / 2 for r, f in zip(real, false)]
            note(d_loss=loss.mean(), d_real=torch.cat(real, 1).sigmoid().mean(), d_fake=torch.cat(false, 1).sigmoid().mean(), accuracy=sum(right) / len(right),
                 **{f"accuracy_{tap}": share for tap, share in zip(critic.taps, right)})
            update("critic")

        # the fake score: rectified flow on what G makes
        if "fake" in parts:
            with amp():
                loss = flow_loss(lambda x, t: fake(x, t, *own), made, torch.randn(x0.shape, generator=g, device=device), draw(cfg.flow)).mean()
            loss.backward()
            note(fake_loss=loss)
            update("fake")

        # G: the gradient of each loss on the prediction, for the log; their sum goes back through G once
        if turn:
            leaf, grads, a = made.clone().requires_grad_(), {}, t[:, None, None, None]
            with amp():
                if cfg.kd_weight:
                    v, losses = (x_t - leaf) / a, {}            # G's velocity; the data's, eps - x0, is (x_t - x0) / a
                    task = (v - (x_t - x0) / a).square().mean((1, 2, 3))
                    if cfg.kd or cfg.backward_simulation:
                        losses["kd"] = (v - teacher_velocity(teacher, x_t, t, words, cfg.kd_steps)).square().mean((1, 2, 3))
                        note(kd=losses["kd"].mean())
                    loss = losses["kd"] if cfg.backward_simulation else mixed.scaled(task, losses, t)[0]    # a simulated x_t belongs to no picture: L_kd alone
                    grads["kd"] = cfg.kd_weight * torch.autograd.grad(loss.mean(), leaf)[0]
                    note(task=task.mean())
                if "critic" in parts:
                    t2 = draw(cfg.critic_times)
                    loss = generator_loss(cfg.loss, critic(noised(leaf, t2, g), t2, text)).mean()
                    grads["gan"] = cfg.gan_weight * torch.autograd.grad(loss, leaf)[0]
                    note(g_loss=loss)
                if "fake" in parts:
                    grads["dmd"] = cfg.dmd_weight * dmd_gradient(teacher, fake, made, draw(cfg.flow), words, own, g) / len(x0)
            note(**{f"pull_{name}": x.norm() for name, x in grads.items()})
            guess.backward(sum(grads.values()))
            update("generator")
        step += 1
        drawn += cfg.batch * world
        if step % cfg.log_every == 0:
            if main:
                means, line = {k: torch.stack(v).nanmean().item() for k, v in seen.items()}, ("d_real", "d_fake", "accuracy", "r1", "fake_loss", "kd", "grad_generator")
                log(step, **{k: means[k] for k in line if k in means}, lr=cfg.lr * rate(cfg, step - 1), **{"img/s": drawn / (time.time() - begin)})
                log(step, show=False, **{k: v for k, v in means.items() if k not in line}, **health(made[:16], x0[:16], ae, cfg.batch))
            seen.clear()
            begin, drawn = time.time(), 0
        if (step % cfg.eval_every == 0 or step == cfg.steps) and main:
            save()
            if not stop:
                evaluate()
            begin, drawn = time.time(), 0
    if step < cfg.steps:
        if main:
            save()
            print(f"stopped by SIGTERM, saved at step {step}: run the same command to go on", flush=True)
    elif main:
        small = {k: v.half() for k, v in {**net.state_dict(), **ema.state_dict()}.items()}      # fp16, to ship
        save_checkpoint(out / "final", {"model": small}, {**asdict(cfg), "step": step, "few_steps": few}, latest=False)
        print(f"done: {out}/final" + ("" if stop else f", samples_{step:07d}.png, health.png") + f"; try `python sample.py \"a red car\" --ckpt {out}`")


def dry_run(cfg: Config) -> dict:
    """All players. The student is the config's own where `init` is not there yet."""
    try:
        student = network_of(read_description(resolve(cfg.init)), cfg.init)
    except UserError:
        student = chosen(cfg.arch, cfg.model, cfg.mmdit)
    teacher = teacher_network(cfg.teacher) if cfg.teacher else student
    seen, turns, guided = replace(teacher if cfg.critic == "teacher" else student, checkpoint=student.checkpoint), 1 / cfg.generator_every, 1 + (cfg.teacher_cfg != 1)
    S, T, D = (forward_flops(n, cfg.data.size, cfg.tokens) for n in (student, teacher, seen))
    gan, dmd = cfg.method != "dmd", cfg.method != "gan"
    parts, flops = [trained(cfg, "generator", student, muon_lr=cfg.muon_lr)], S + turns * (2 * S + bool(cfg.kd_weight) * cfg.kd_steps * guided * T)
    parts.append(frozen(cfg, "teacher", teacher if cfg.critic != "teacher" else seen, gan and cfg.critic == "teacher"))
    if gan:
        with torch.device("meta"):
            heads = Critic(cfg, SimpleNamespace(denoiser=SimpleNamespace(cfg=seen)))
        parts.append(trained(cfg, "critic", beside=heads, average=False))
        flops += (2 + bool(cfg.r1)) * D + turns * 2 * D         # real, fake, near; for G forward, and back to its input
        if cfg.critic != "teacher":
            parts.append(frozen(cfg, "features", seen, True))
    if dmd:
        parts.append(trained(cfg, "fake", student, average=False))
        flops += 3 * S + turns * (guided * T + S)
    return report(cfg, parts, flops)


if __name__ == "__main__":
    with friendly():
        config = read_config(Config(), [a for a in sys.argv[1:] if a != "--dry-run"], "configs/adv_nano.toml")
        if "--dry-run" in sys.argv:
            sys.exit(dry_run(config) and 0)
        if config.processes > 1 and "WORLD_SIZE" not in os.environ and pick_device(config.device).type == "cpu":
            start_others(config.processes)
        distil(config)
