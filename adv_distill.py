"""Adversarial step distillation (docs/PAPER.md, section 6): 28 guided steps become K unguided ones.

    python adv_distill.py [--config configs/adv_nano.toml] [key=value ...]     run again to resume
    python adv_distill.py --cache --config C        the cache of your own pictures

    min_G max_D  E[ log D(x_t', t') + log(1 - D(x~_t', t')) ] + S(L_task, L_kd)

G sees x_t at one of K fixed times and predicts x0 in one evaluation. D sees that prediction, noised
again to a random t', through the features of a frozen denoiser and small trainable heads (LADD,
Sauer et al. 2024). L_kd asks G for the guided teacher's velocity, which is how guidance gets in.
method = "dmd": instead of D, or beside it ("both"), a second score network learns what G makes, and
G moves along the difference of the two scores (DMD2, Yin et al. 2024).
The run's health.png and log.csv show how it goes; final/ tells sample.py how to draw (few_steps).

B batch | C H W latents | D channels of a tap | h w its grid | N places | W width of a head
"""
import copy
import sys
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import plots
from cache import make_cache
from checkpoint import Run
from common import UserError, autocast, fill, friendly, option, read_config, setup, use_bfloat16
from costs import tap_names, tap_shape
from data import Batch, Batches, seeded
from decoder import to_pictures
from distill import Distill, DistillConfig, Teacher, check_size, find_teacher, teacher_text
from evaluate import health_warnings, latents_health
from model import count_params, load_model
from optim import EMA, Learner, Muon, average_gradients, rate
from sample import euler, generate, sampling, times
from text import Text, Tokens
from train import FlowConfig, Validation, draw_times, flow_loss, load_data, shown_prompts

@dataclass
class AdvConfig(DistillConfig):
    out: str = "runs/adv_nano"
    init: str = "runs/kd_nano"      # the student: its networks, text and flow are taken over
    teacher: str = ""               # empty: the student itself, frozen
    teacher_cfg: float = option(4.0, low=0)     # guidance that is distilled in
    kd_steps: int = option(1, low=1)            # Euler steps of the teacher from x_t to its x0
    featkd: bool = False            # not in this stage
    drop_caption: float = option(0.0, low=0, high=1)    # no guidance later, so no empty caption
    method: str = option("gan", choices=("gan", "dmd", "both"))
    K: int = option(4, low=1, high=1000)        # steps of the student, at sample.times(K, shift)
    shift: float = option(0.0, low=0)           # shift of those times; 0: the student's flow.shift
    sampler: str = option("euler", choices=("euler", "renoise"))        # the student's
    backward_simulation: bool = False           # x_t: where G itself gets, not noised data
    generator_every: int = option(2, low=1)     # steps of D and the fake score for one of G
    kd_weight: float = option(1.0, low=0)       # of S(L_task, L_kd)
    # gan
    loss: str = option("hinge", choices=("paper", "nonsaturating", "hinge"))
    gan_weight: float = option(0.1, low=0)
    critic: str = option("teacher", choices=("teacher", "init"))        # whose frozen features
    critic_taps: list[str] = option([])         # empty: all stages or blocks
    critic_width: int = option(64, low=1)
    critic_lr: float = option(5e-4, above=0)
    critic_times: FlowConfig = field(default_factory=lambda: FlowConfig(mean=1.0))      # of t'
    r1: float = option(0.01, low=0)             # times a logit's squared gradient; 0: none
    r1_sigma: float = option(0.1, above=0)      # the small noise that it is estimated with
    # dmd
    dmd_weight: float = option(1.0, low=0)
    fake_lr: float = option(5e-4, above=0)
    steps: int = option(2000, low=1)
    lr: float = option(2e-4, above=0)

    def check(self):
        if self.featkd or self.accumulate != 1:
            raise UserError("featkd and accumulate are distill.py's: take a larger batch here")

def noised(x0, t, g):
    """x_t with fresh noise: (B, C, H, W), t (B,)."""
    a = t[:, None, None, None]
    return (1 - a) * x0 + a * torch.randn(x0.shape, generator=g, device=x0.device)

def predict(net, x, t, text: Tokens | Text):
    """x0 in one evaluation."""
    return x - t[:, None, None, None] * net(x, t, text).float()

@torch.no_grad()
def simulated(net, walk, k, shape, text, g, sampler="renoise"):
    """x at the time walk[k], k (B,), on the path that the sampler takes from noise."""
    x = torch.randn(shape, generator=g, device=walk.device)
    for i in range(int(k.max())):
        on = (k > i).nonzero()[:, 0]                            # pictures that go on
        t, s = walk[i], walk[i + 1]
        some = type(text)(*(None if y is None else y[on] for y in text))
        x0 = predict(net, x[on], t.expand(len(on)), some)
        after = x0 + s / t * (x[on] - x0)
        if sampler == "renoise":
            after = noised(x0, s.expand(len(on)), g)
        x = x.index_copy(0, on, after)
    return x

def teacher_velocity(teacher, x, t, text: Text, steps: int):
    """The velocity from x_t straight to the x0 of so many Euler steps of the teacher."""
    a = t[:, None, None, None]
    walk = [a * (1 - i / steps) for i in range(steps + 1)]      # each picture from its own t to 0
    x0 = euler(lambda y, s: teacher(y, s.flatten(), text)[0].float(), x, walk)
    return (x - x0) / a                                         # (B, C, H, W)

# ---------------------------------------------------------------------------- the discriminator
class Head(nn.Module):
    """Features (B, D, h, w) and a condition (B, W), which enters as a projection (Miyato and Koyama
    2018) -> a logit for each place (B, h w)."""
    def __init__(self, D, W):
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(1, D), nn.Conv2d(D, W, 1), nn.SiLU(),
                                  nn.Conv2d(W, W, 3, padding=1), nn.SiLU())
        self.out = nn.Conv2d(W, 1, 1)

    def forward(self, f, c):
        y = self.body(f)                                        # (B, W, h, w)
        agreement = (y * c[:, :, None, None]).mean(1)           # (B, h, w)
        return (self.out(y)[:, 0] + agreement).flatten(1).float()

class Critic(nn.Module):
    """Heads on the features of a frozen denoiser, a distill.Teacher, through which gradients pass.
    The heads are trained and kept; a Teacher is no module, so that it is neither."""
    def __init__(self, cfg: AdvConfig, frozen: Teacher):
        super().__init__()
        network = frozen.denoiser.cfg
        W = cfg.critic_width
        self.frozen = frozen
        self.taps = tuple(cfg.critic_taps or tap_names(network))
        widths = [tap_shape(network, tap, cfg.data.size)[0] for tap in self.taps]
        self.heads = nn.ModuleList(Head(D, W) for D in widths)
        first = nn.Linear(32 + network.context_dim, W)      # of t' and the text's mean state
        self.embed = nn.Sequential(first, nn.SiLU(), nn.Linear(W, W))

    def forward(self, x, t, text: Text):
        """Noised latents (B, C, H, W) -> a list of each head's logits (B, N)."""
        _, taps = self.frozen.denoiser(x.to(self.frozen.dtype), t, text.emb, text.mask,
                                       features=self.taps, pooled=text.pooled)
        c = self.condition(t, text)
        # contiguous: on a CPU, GroupNorm's backward pass crashes for a channels_last input that
        # wants no gradient (torch 2.13)
        features = [taps[name].float().contiguous() for name in self.taps]
        return [head(f, c) for head, f in zip(self.heads, features)]

    def condition(self, t, text: Text):
        angle = t[:, None] * torch.pi * 2.0 ** torch.arange(16, device=t.device).div(2)    # (B, 16)
        weight = text.mask[..., None].float()
        mean = (text.emb.float() * weight).sum(1) / weight.sum(1)
        return self.embed(torch.cat([angle.cos(), angle.sin(), mean], -1))      # (B, W)

# what D minimises on real and on fake logits, and what G minimises
FORMS = {
    # the minimax game itself: log D(x) + log(1 - D(x~)); then G maximises log D(x~) instead
    "paper": (lambda r: F.softplus(-r), F.softplus, lambda f: -F.softplus(f)),
    "nonsaturating": (lambda r: F.softplus(-r), F.softplus, lambda f: F.softplus(-f)),
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
    """E |D(x + sigma n) - D(x)|^2 / sigma^2, about the squared gradient of a logit: (B,).
    Approximate R1 (Lin et al. 2025): no second derivative through the features."""
    near = critic(x + sigma * torch.randn(x.shape, generator=g, device=x.device), t, text)
    squares = [(a - b).square().mean(1) for a, b in zip(near, real)]
    return torch.stack(squares).mean(0) / sigma**2

@torch.no_grad()
def dmd_gradient(teacher, fake, x0, t, teacher_states: Text, text, g):
    """The gradient on G's prediction x0 (DMD2, eq. 3): (B, C, H, W).
    It is what the fake score's x0 is more than the guided real one's, over the latter's mean
    distance from x0; divided by C H W, as the gradient of a mean over places is."""
    x = noised(x0, t, g)
    a = t[:, None, None, None]
    real = x - a * teacher(x, t, teacher_states)[0].float()
    false = x - a * fake(x, t, text).float()
    distance = (x0 - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return (false - real) / distance / x0[0].numel()

class Game:
    """The generator, the frozen teacher, the critic's heads, the fake score; one step of each."""
    def __init__(self, cfg: AdvConfig, net, device, bfloat16: bool):
        self.cfg, self.net = cfg, net
        self.device, self.bfloat16 = device, bfloat16
        self.teacher = Teacher(cfg, device)
        self.mixed = Distill(cfg, net, self.teacher)            # for S(L_task, L_kd)
        self.walk = torch.tensor(times(cfg.K, cfg.shift)[:-1], device=device)   # (K,), from 1 down
        opt = Muon(net, cfg.lr, cfg.muon_lr, cfg.weight_decay, (0.0, 0.99))
        self.ema = EMA(net, cfg.ema)
        self.players = {"generator": Learner(net, opt, cfg.clip, self.ema)}
        if cfg.method != "dmd":
            frozen = self.teacher
            if cfg.critic == "init":
                frozen = Teacher(replace(cfg, teacher=cfg.init), device)
            self.critic = Critic(cfg, frozen).to(device)
            opt = Muon(self.critic, cfg.critic_lr, 0.0, 0.0, (0.0, 0.99))
            self.players["critic"] = Learner(self.critic, opt, cfg.clip)
        if cfg.method != "gan":
            self.fake = fake_score(cfg, net, device)
            opt = Muon(self.fake, cfg.fake_lr, 0.0, cfg.weight_decay)
            self.players["fake"] = Learner(self.fake, opt, cfg.clip)

    def parts(self) -> dict:
        """What a checkpoint holds."""
        parts = {"model": self.net, "ema": self.ema}
        for name, player in self.players.items():
            if name != "generator":
                parts[name] = player.module
            parts[f"{name}_optimizer"] = player.opt
        return parts

    def play(self, batch: Batch, step: int, g):
        """One step of every player whose turn it is -> (predictions (B, C, H, W), log values)."""
        cfg, n = self.cfg, len(batch.x0)
        k = torch.randint(cfg.K, (n,), generator=g, device=self.device)
        t = self.walk[k]                                        # (B,)
        turn = (step + 1) % cfg.generator_every == 0
        if cfg.backward_simulation:
            with autocast(self.device, self.bfloat16):
                x_t = simulated(self.net, self.walk, k, batch.x0.shape, batch.text, g, cfg.sampler)
        else:
            x_t = noised(batch.x0, t, g)
        # a block of its own: autocast keeps weights that it has cast without gradients
        with autocast(self.device, self.bfloat16), torch.set_grad_enabled(turn):
            guess = predict(self.net, x_t, t, batch.text)       # (B, C, H, W)
        made = guess.detach()
        values = {}
        if "critic" in self.players:
            values |= self.critic_step(batch, made, g)
        if "fake" in self.players:
            values |= self.fake_step(batch, made, g)
        if turn:
            values |= self.generator_step(batch, x_t, t, guess, g)
        return made, values

    def update(self, name: str) -> dict:
        average_gradients(self.players[name].module)
        return {f"grad_{name}": self.players[name].step()}

    def critic_step(self, batch: Batch, made, g) -> dict:
        """D: real pictures up, predictions down, both noised to t'."""
        cfg, critic = self.cfg, self.critic
        values = {}
        with torch.no_grad():
            text = critic.frozen.read(batch, self.net.vocabulary)
        with autocast(self.device, self.bfloat16):
            t = draw_times(cfg.critic_times, len(batch.x0), g, self.device)
            x = noised(batch.x0, t, g)
            real = critic(x, t, text)
            false = critic(noised(made, t, g), t, text)
            loss = critic_loss(cfg.loss, real, false)
            if cfg.r1:
                r1 = r1_penalty(critic, x, t, text, real, cfg.r1_sigma, g)
                loss = loss + cfg.r1 * r1
                values["r1"] = r1.mean()
        loss.mean().backward()
        right = [((r > 0).float().mean() + (f < 0).float().mean()) / 2 for r, f in zip(real, false)]
        values |= {f"accuracy_{tap}": share for tap, share in zip(critic.taps, right)}
        values |= {"d_loss": loss.mean(), "d_real": torch.cat(real, 1).sigmoid().mean(),
                   "d_fake": torch.cat(false, 1).sigmoid().mean(),
                   "accuracy": sum(right) / len(right)}
        return values | self.update("critic")

    def fake_step(self, batch: Batch, made, g) -> dict:
        """The fake score: rectified flow on what G makes."""
        eps = torch.randn(made.shape, generator=g, device=self.device)
        t = draw_times(self.cfg.flow, len(batch.x0), g, self.device)
        with autocast(self.device, self.bfloat16):
            loss = flow_loss(lambda x, t: self.fake(x, t, batch.text), made, eps, t).mean()
        loss.backward()
        return {"fake_loss": loss} | self.update("fake")

    def generator_step(self, batch: Batch, x_t, t, guess, g) -> dict:
        """G: each loss's gradient on the prediction, for the log; their sum goes back once."""
        cfg = self.cfg
        leaf = guess.detach().clone().requires_grad_()
        text = self.teacher.read(batch, self.net.vocabulary)
        grads, values = {}, {}
        with autocast(self.device, self.bfloat16):
            if cfg.kd_weight:
                loss, values = self.kd_loss(batch, x_t, t, leaf, text)
                grads["kd"] = cfg.kd_weight * torch.autograd.grad(loss, leaf)[0]
            if "critic" in self.players:
                t2 = draw_times(cfg.critic_times, len(batch.x0), g, self.device)
                read = self.critic.frozen.read(batch, self.net.vocabulary)
                logits = self.critic(noised(leaf, t2, g), t2, read)
                loss = generator_loss(cfg.loss, logits).mean()
                grads["gan"] = cfg.gan_weight * torch.autograd.grad(loss, leaf)[0]
                values["g_loss"] = loss
            if "fake" in self.players:
                t2 = draw_times(cfg.flow, len(batch.x0), g, self.device)
                move = dmd_gradient(self.teacher, self.fake, leaf.detach(), t2, text, batch.text, g)
                grads["dmd"] = cfg.dmd_weight * move / len(leaf)
        values |= {f"pull_{name}": x.norm() for name, x in grads.items()}
        guess.backward(sum(grads.values()))
        return values | self.update("generator")

    def kd_loss(self, batch: Batch, x_t, t, x0, text: Text):
        """S(L_task, L_kd) of a prediction x0 -> (mean loss, values to log)."""
        cfg = self.cfg
        a = t[:, None, None, None]
        v = (x_t - x0) / a                                      # G's velocity
        data = (x_t - batch.x0) / a                             # the data's, eps - x0
        task = (v - data).square().mean((1, 2, 3))              # (B,)
        losses, values = {}, {"task": task.mean()}
        if cfg.kd or cfg.backward_simulation:
            theirs = teacher_velocity(self.teacher, x_t, t, text, cfg.kd_steps)
            losses["kd"] = (v - theirs).square().mean((1, 2, 3))
            values["kd"] = losses["kd"].mean()
        if cfg.backward_simulation:                             # x_t belongs to no picture
            return losses["kd"].mean(), values
        return self.mixed.scaled(task, losses, t)[0].mean(), values

def fake_score(cfg: AdvConfig, net, device):
    """The network that learns what G makes: begins as the real score where that fits (DMD2)."""
    fake = copy.deepcopy(net)
    if find_teacher(cfg.teacher)[0] == "ours":
        real, _ = load_model(cfg.teacher, device)
        if real.denoiser.cfg == net.denoiser.cfg and real.text_cfg == net.text_cfg:
            fake = real
    return fake.requires_grad_(True).train()

SHOWN = ("d_real", "d_fake", "accuracy", "r1", "fake_loss", "kd", "grad_generator", "lr")

def distil(cfg: AdvConfig):
    device, rank, world = setup(cfg.device)
    net, student = load_model(cfg.init, device)
    check_size(cfg, student, cfg.init)
    own = {k: student[k] for k in ("arch", "model", "mmdit", "text", "flow") if k in student}
    fill(cfg, own, cfg.init)
    cfg.teacher = cfg.teacher or cfg.init
    cfg.shift = cfg.shift or cfg.flow.shift
    net.requires_grad_(True).train()
    torch.manual_seed(cfg.seed)
    game = Game(cfg, net, device, use_bfloat16(cfg.amp, device))
    ae, latents, held_out = load_data(cfg, device, rank, world, net.vocabulary, game.teacher.states)
    batches = Batches(cfg, latents, device, net.vocabulary)
    validation = Validation(cfg, held_out, device, net.vocabulary)
    prompts = shown_prompts(cfg, held_out)
    if net.text is None:                    # the grids' text states come from the cache
        net.frozen.append(held_out)
    few = {"steps": cfg.K, "sampler": cfg.sampler, "cfg": 1.0, "shift": cfg.shift}
    run = Run(cfg, device, rank, world, {"few_steps": few}, net.files(), SHOWN, **game.parts())
    if rank == 0:
        sizes = [f"{name} {count_params(p.module) / 1e6:.2f} M" for name, p in game.players.items()]
        walk = " ".join(f"{t:.2f}" for t in game.walk.tolist())
        print(f"{cfg.out}: {cfg.init} in {cfg.K} steps at t = {walk}, method {cfg.method}; "
              f"{', '.join(sizes)}; {device}, step {run.step} of {cfg.steps}", flush=True)

    for step in run.steps():
        for player in game.players.values():
            player.opt.schedule(rate(cfg, step))
        g = seeded((cfg.seed * 1000003 + step) * world + rank, device)
        batch = batches(step * world + rank)
        made, values = game.play(batch, step, g)
        run.log(pictures=cfg.batch, learners=game.players.values(), **values,
                lr=cfg.lr * rate(cfg, step))
        if rank == 0 and run.step % cfg.log_every == 0:
            run.row(**latents_health(made[:16], batch.x0[:16], ae, cfg.batch))
        if run.due():
            run.save()
            if rank == 0 and not run.stop:
                report_health(cfg, run, game, ae, held_out, validation, prompts, few)
            run.restart_clock()

    final = {**net.state_dict(), **game.ema.state_dict()}
    if run.finish(final) and rank == 0:
        print(f"done: {run.out}/final; try `python sample.py \"{prompts[0]}\" --ckpt "
              f"{run.out}`")

def report_health(cfg: AdvConfig, run: Run, game: Game, ae, held_out, validation, prompts, few):
    """The averaged student in K steps: its grid, its health, its flow loss."""
    net = game.net
    how = sampling({**asdict(cfg), "few_steps": few})
    net.eval()
    with game.ema.swapped():
        x0 = torch.stack(generate(net, None, prompts, range(len(prompts)), cfg.data.size, **how,
                                  batch=cfg.batch))
        val = float(np.nanmean(validation(net, game.bfloat16)))     # how far it has left the flow
    net.train()
    with torch.inference_mode():
        images = torch.cat([ae.decode(part) for part in x0.split(cfg.batch)])
    sheet = plots.grid(to_pictures(images), prompts, 6, max(1, 192 // cfg.data.size))
    sheet.save(run.out / f"samples_{run.step:07d}.png")
    h = latents_health(x0, held_out[:len(x0)].to(run.device), ae, cfg.batch)
    run.row(val=val, **{f"sample_{k}": v for k, v in h.items()})
    print(f"step {run.step}: in {cfg.K} steps: " + ", ".join(f"{k} {v:.3f}" for k, v in h.items()),
          flush=True)
    for line in health_warnings(h):
        print(f"step {run.step}: {line}", flush=True)
    plots.health(run.out / "log.csv", run.out / "health.png")

def main(argv):
    make = "--cache" in argv
    argv = [a for a in argv if a != "--cache"]
    cfg = read_config(AdvConfig(), argv, "configs/adv_nano.toml")
    make_cache(cfg, teacher_text(cfg)) if make else distil(cfg)

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
