"""Adversarial step distillation (docs/PAPER.md, section 6): 28 guided steps become K unguided ones.

    python adv_distill.py [--config configs/adv_nano.toml] [key=value ...]     run again to resume
    python adv_distill.py --cache --config C        the cache of your own pictures

    min_G max_D  E[ log D(x_t', t') + log(1 - D(x~_t', t')) ] + S(L_task, L_kd)

G sees x_t at one of K fixed times and predicts x0 in one evaluation. D (adversaries.py) sees that
prediction, noised again to a random t'. L_kd asks G for the guided teacher's velocity, which is how
guidance gets in. method = "kd": that alone. method = "dmd": instead of D, or beside it ("both"), a
second score network learns what G makes, and G moves along the difference of the two scores (DMD2,
Yin et al. 2024).
The run's health.png and log.csv show how it goes; final/ tells sample.py how to draw (few_steps).

B batch | C H W latents | K steps of the student
"""
import sys
from collections import deque
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import plots
from adversaries import (
    Critic,
    add_training,
    critic_loss,
    dmd_gradient,
    fake_score,
    generator_loss,
    gradient_penalty,
    matching_loss,
    noise_like,
    noised,
    right_shares,
    rolled,
    teachers_latents,
)
from cache import ensure_cache, make_cache
from checkpoint import Run
from common import (
    UserError,
    autocast,
    by_turns,
    check_config,
    command_line,
    fill,
    friendly,
    mean_over,
    option,
    setup,
    use_bfloat16,
)
from data import Batch, Batches, FlowConfig, seeded
from decoder import to_pictures
from distill import Distill, DistillConfig, Teacher, by_bin, check_size, teacher_text
from evaluate import health_warnings, latents_health
from model import count_params, load_model
from optim import EMA, Learner, Muon, average_gradients, rate
from sample import euler, generate, sampling, times
from text import Text, Tokens
from train import (
    Validation,
    draw_times,
    flow_loss,
    learned_things,
    load_data,
    read_training,
    shown_prompts,
)

READY = 0.62        # of the discriminator's answers are right: the generator begins

@dataclass
class AdvConfig(DistillConfig):
    out: str = "runs/adv_nano"
    init: str = "runs/nano"         # the student: its networks, text and flow are taken over
    faster: str = ""                # a few-step student of init's own init: the student begins with
                                    # its steps, or learns them from nothing
    teacher: str = ""               # empty: the student itself, frozen
    teacher_cfg: float = option(3.0, low=0)     # guidance that is distilled in, at all K times
    kd_steps: int = option(2, low=1, high=1000)  # Euler steps of the teacher from x_t to its x0
    scaling: str = option("constant", choices=("timestep", "constant"))
    alpha: float = option(0.0, low=0, high=1)   # with ratio "none": L_kd alone, a plain mean square
    ratio: str = option("none", choices=("sample", "none"))
    featkd: bool = False            # not in this stage
    drop_caption: float = option(0.0, low=0, high=1)    # no guidance later, so no empty caption
    method: str = option("gan", choices=("kd", "gan", "dmd", "both"))
    K: int = option(4, low=1, high=1000)        # steps of the student, at sample.times(K, shift)
    shift: float = option(0.0, low=0)           # shift of those times; 0: the student's flow.shift
    sampler: str = option("euler", choices=("euler", "renoise"))        # the student's
    real: str = option("data", choices=("data", "teacher"))     # x0: or what the teacher draws
    generator_every: int = option(2, low=1)     # steps of D and the fake score for one of G
    kd_weight: float = option(1.0, low=0)       # of S(L_task, L_kd)
    # gan
    loss: str = option("nonsaturating",
                       choices=("paper", "nonsaturating", "hinge", "relativistic"))
    gan_weight: float = option(1.0, low=0)      # so that its pull is 0.5 to 1 times L_kd's
    critic_start: int = option(200, low=0)      # steps at most that G waits for D
    critic_taps: list[str] = option([])         # empty: all stages or blocks of the teacher
    critic_width: int = option(64, low=1, high=8192)
    critic_depth: int = option(2, low=1, high=100)        # convolutions of a head
    critic_lr: float = option(3e-3, above=0)    # constant after the warm-up, as is fake_lr
    critic_warmup: int = option(10, low=1)
    critic_times: FlowConfig = field(default_factory=lambda: FlowConfig(mean=1.0))      # of t'
    r1: float = option(0.01, low=0)             # times a real logit's squared gradient; 0: none
    r2: float = option(0.0, low=0)              # times a fake one's
    r1_sigma: float = option(0.1, above=0)      # the small noise that both are estimated with
    wrong_captions: bool = False                # real pictures with others' captions are fakes too
    match_weight: float = option(0.0, low=0)    # of the distance of the heads' features
    # dmd
    dmd_weight: float = option(1.0, low=0)
    fake_lr: float = option(5e-4, above=0)
    steps: int = option(2000, low=0)            # 0: what `faster` gives, and no training
    lr: float = option(2e-4, above=0)

    def check(self):
        super().check()
        if self.featkd or self.accumulate != 1:
            raise UserError("featkd and accumulate are distill.py's: take a larger batch here")
        if not self.steps and not self.faster:
            raise UserError("steps=0 trains nothing: it wants faster=, a few-step student")
        if self.wrong_captions and self.batch < 2:
            raise UserError("wrong_captions gives a picture its neighbour's caption: batch=2 or "
                            "more has neighbours")
        if self.real == "teacher" and self.data.folder:
            raise UserError("real=teacher draws anew what scenes show: your own pictures want "
                            "real=data")

    @property
    def has_critic(self) -> bool:
        return self.method in ("gan", "both")

    @property
    def has_fake(self) -> bool:
        return self.method in ("dmd", "both")

def predict(net, x, t, text: Tokens | Text):
    """x0 in one evaluation."""
    return x - t[:, None, None, None] * net(x, t, text).float()

def teacher_velocity(teacher, x, t, text: Text, steps: int):
    """The velocity from x_t straight to the x0 of so many Euler steps of the teacher."""
    a = t[:, None, None, None]
    walk = [a * (1 - i / steps) for i in range(steps + 1)]      # each picture from its own t to 0
    x0 = euler(lambda y, s: teacher(y, s.flatten(), text)[0].float(), x, walk)
    return (x - x0) / a                                         # (B, C, H, W)

class Game:
    """The generator, the frozen teacher, the critic's heads, the fake score; one step of each."""
    def __init__(self, cfg: AdvConfig, net, device, bfloat16: bool):
        self.cfg, self.net = cfg, net
        self.device, self.bfloat16 = device, bfloat16
        self.teacher = Teacher(cfg, device)
        self.mixed = Distill(cfg, net, self.teacher)            # for S(L_task, L_kd)
        self.walk = torch.tensor(times(cfg.K, cfg.shift)[:-1], device=device)   # (K,), from 1 down
        words = net.text.parameters() if net.text else ()
        opt = Muon(net, cfg.lr, cfg.muon_lr, cfg.weight_decay, (0.0, 0.99), words, cfg.text_rate)
        self.ema = EMA(net, cfg.ema)
        self.players = {"generator": Learner(net, opt, cfg.clip, self.ema)}
        if cfg.has_critic:
            self.critic = Critic(cfg, self.teacher).to(device)
            opt = Muon(self.critic, cfg.critic_lr, 0.0, 0.0, (0.0, 0.99))
            self.players["critic"] = Learner(self.critic, opt, cfg.clip)
        if cfg.has_fake:
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

    def prepare_critic(self, batches: Batches, rank: int, world: int):
        """D alone until it is right in READY of cases, at most cfg.critic_start steps: from a D
        that knows nothing G would learn noise."""
        cfg, right = self.cfg, deque(maxlen=10)
        for n in tqdm(range(cfg.critic_start), "discriminator alone", delay=10, disable=rank > 0):
            self.schedule_others(n)
            k = (cfg.steps + n) * world + rank              # not the first batches of the training
            _, values = self.play(batches(k), False, seeded(cfg.seed * 1000003 - k, self.device))
            right.append(mean_over(values["accuracy"], world))
            share = float(sum(right) / len(right))
            if len(right) == right.maxlen and share >= READY:
                break
        if rank == 0 and right:
            verdict = "" if share >= READY else f"; G begins all the same, {READY:.0%} was wanted"
            print(f"discriminator alone: right in {share:.0%} of cases after {n + 1} steps"
                  f"{verdict}", flush=True)

    def schedule_others(self, n: int):
        """The rates of D and the fake score at their step n: a warm-up, then constant."""
        for name, player in self.players.items():
            if name != "generator":
                player.opt.schedule(min(1.0, (n + 1) / self.cfg.critic_warmup))

    def play(self, batch: Batch, turn: bool, g):
        """One step of every player, of G only where it is its turn
        -> (predictions (B, C, H, W), log values)."""
        cfg, n = self.cfg, len(batch.x0)
        k = torch.randint(cfg.K, (n,), generator=g, device=self.device)
        t = self.walk[k]                                        # (B,)
        x_t = noised(batch.x0, t, noise_like(batch.x0, g))
        # a block of its own: autocast keeps weights that it has cast without gradients
        with autocast(self.device, self.bfloat16), torch.set_grad_enabled(turn):
            guess = predict(self.net, x_t, t, batch.text)       # (B, C, H, W)
        made = guess.detach()
        values = {}
        if cfg.has_critic:
            values |= self.critic_step(batch, made, g)
        if cfg.has_fake:
            values |= self.fake_step(batch, made, g)
        if turn:
            values |= self.generator_step(batch, x_t, t, guess, g)
        return made, values

    def update(self, name: str) -> dict:
        average_gradients(self.players[name].module)
        return {f"grad_{name}": self.players[name].step()}

    def critic_step(self, batch: Batch, made, g) -> dict:
        """D: real pictures up, predictions down, both noised to t' with the same noise."""
        cfg, critic = self.cfg, self.critic
        values = {}
        with torch.no_grad():
            text = critic.frozen.read(batch, self.net.vocabulary)
        with autocast(self.device, self.bfloat16):
            t = draw_times(cfg.critic_times, len(batch.x0), g, self.device)
            eps = noise_like(batch.x0, g)
            x, x_made = noised(batch.x0, t, eps), noised(made, t, eps)
            real, false = critic(x, t, text), critic(x_made, t, text)
            loss = critic_loss(cfg.loss, real, false)           # (B,)
            if cfg.wrong_captions:
                wrong = critic(x, t, rolled(text))
                loss = (loss + critic_loss(cfg.loss, real, wrong)) / 2
                values["d_wrong"] = torch.cat(wrong, 1).sigmoid().mean()
            values["bin_d"] = by_bin(loss.detach(), t)
            for name, weight, at, logits in ("r1", cfg.r1, x, real), ("r2", cfg.r2, x_made, false):
                if weight:
                    squares = gradient_penalty(critic, at, t, text, logits, cfg.r1_sigma, g)
                    loss = loss + weight * squares
                    values[name] = squares.mean()
        loss.mean().backward()
        right = right_shares(cfg.loss, real, false)
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
            if cfg.has_critic:
                grads |= self.critics_gradients(batch, leaf, g)
            if cfg.has_fake:
                t2 = draw_times(cfg.flow, len(batch.x0), g, self.device)
                move = dmd_gradient(self.teacher, self.fake, leaf.detach(), t2, text, batch.text, g)
                grads["dmd"] = cfg.dmd_weight * move / len(leaf)
        values |= {f"pull_{name}": x.norm() for name, x in grads.items()}
        if "gan" in grads and "kd" in grads:
            values["pull_ratio"] = values["pull_gan"] / values["pull_kd"]
        guess.backward(sum(grads.values()))
        return values | self.update("generator")

    def critics_gradients(self, batch: Batch, leaf, g) -> dict:
        """What D's answers, and the features that they are read from, pull the prediction to."""
        cfg, critic, grads = self.cfg, self.critic, {}
        t = draw_times(cfg.critic_times, len(batch.x0), g, self.device)
        eps = noise_like(leaf, g)
        text = critic.frozen.read(batch, self.net.vocabulary)
        real = theirs = None
        if cfg.loss == "relativistic" or cfg.match_weight:
            with torch.no_grad():
                real, theirs = critic(noised(batch.x0, t, eps), t, text, hidden=True)
        logits, ours = critic(noised(leaf, t, eps), t, text, hidden=True)
        losses = {"gan": cfg.gan_weight * generator_loss(cfg.loss, real, logits)}
        if cfg.match_weight:
            losses["match"] = cfg.match_weight * matching_loss(theirs, ours)
        for name, loss in losses.items():
            grads[name] = torch.autograd.grad(loss.mean(), leaf, retain_graph=True)[0]
        return grads

    def kd_loss(self, batch: Batch, x_t, t, x0, text: Text):
        """S(L_task, L_kd) of a prediction x0 -> (mean loss, values to log)."""
        cfg = self.cfg
        a = t[:, None, None, None]
        v = (x_t - x0) / a                                      # G's velocity
        data = (x_t - batch.x0) / a                             # the data's, eps - x0
        task = (v - data).square().mean((1, 2, 3))              # (B,)
        losses, values = {}, {"task": task.mean()}
        if cfg.kd:
            theirs = teacher_velocity(self.teacher, x_t, t, text, cfg.kd_steps)
            losses["kd"] = (v - theirs).square().mean((1, 2, 3))
            values["kd"] = losses["kd"].mean()
        return self.mixed.scaled(task, losses, t)[0].mean(), values

SHOWN = ("d_real", "d_fake", "accuracy", "pull_ratio", "fake_loss", "kd", "grad_generator", "lr")

def distil(cfg: AdvConfig):
    device, rank, world = setup(cfg.device)
    net, student = load_model(cfg.init, device)
    check_size(cfg, student, cfg.init)
    own = {k: student[k] for k in ("arch", "model", "mmdit", "text", "flow") if k in student}
    check_config(fill(cfg, own, cfg.init), cfg.init)
    if cfg.faster and not student["init"]:
        raise UserError(f"{cfg.init} was trained from no other checkpoint: faster wants one that "
                        "was, and a few-step student of that other one")
    if cfg.faster:
        add_training(net, student["init"], cfg.faster)
    cfg.teacher = cfg.teacher or cfg.init
    cfg.shift = cfg.shift or cfg.flow.shift
    net.requires_grad_(True).train()
    torch.manual_seed(cfg.seed)
    if cfg.data.folder:
        ensure_cache(cfg)
    game = Game(cfg, net, device, use_bfloat16(cfg.amp, device))
    ae, latents, held_out = load_data(cfg, device, rank, world, net.vocabulary, game.teacher.states)
    if cfg.real == "teacher":
        draw = partial(teachers_latents, cfg, game.teacher, latents, net.vocabulary)
        latents = by_turns(draw, rank, world)
    batches = Batches(cfg, latents, device, net.vocabulary)
    validation = Validation(cfg, held_out, device, net.vocabulary)
    prompts = shown_prompts(cfg, held_out)
    if net.text is None:                    # the grids' text states come from the cache
        net.frozen.append(held_out)
    few = {"steps": cfg.K, "sampler": cfg.sampler, "cfg": 1.0, "shift": cfg.shift}
    about = {"few_steps": few, "things": learned_things(cfg)}
    run = Run(cfg, device, rank, world, about, net.files(), SHOWN, **game.parts())
    if rank == 0:
        sizes = [f"{name} {count_params(p.module) / 1e6:.2f} M" for name, p in game.players.items()]
        walk = " ".join(f"{t:.2f}" for t in game.walk.tolist())
        print(f"{cfg.out}: {cfg.init} in {cfg.K} steps at t = {walk}, method {cfg.method}; "
              f"{', '.join(sizes)}; {device}, step {run.step} of {cfg.steps}", flush=True)
    if cfg.has_critic and not run.start:
        game.prepare_critic(batches, rank, world)
        run.restart_clock()
    report = partial(report_health, cfg, run, game, ae, held_out, validation, prompts, few)
    if not cfg.steps:
        run.save()
    if run.lacks("val") or (run.main and not cfg.steps):
        report()

    for step in run.steps():
        game.players["generator"].opt.schedule(rate(cfg, step))
        waited = cfg.critic_warmup if cfg.has_critic and cfg.critic_start else 0
        game.schedule_others(waited + step)
        g = seeded((cfg.seed * 1000003 + step) * world + rank, device)
        batch = batches(step * world + rank)
        made, values = game.play(batch, (step + 1) % cfg.generator_every == 0, g)
        run.log(pictures=cfg.batch, learners=game.players.values(), **values,
                lr=cfg.lr * rate(cfg, step))
        if rank == 0 and run.step % cfg.log_every == 0:
            run.row(**latents_health(made[:16], batch.x0[:16], ae, cfg.batch))
        if run.due():
            run.save()
            if rank == 0 and not run.stop:
                report()
            run.restart_clock()

    final = {**net.state_dict(), **game.ema.state_dict()}
    if run.finish(final) and rank == 0:
        again = command_line(["python", "sample.py", prompts[0], "--ckpt", run.out])
        print(f"done: {run.out}/final; try `{again}`")

def pull_warnings(rows: list[dict]) -> list[str]:
    """A line where the discriminator pulls far less or far more than L_kd does, in rows of a log.
    It does its work at 0.5 to 1 times L_kd's pull."""
    ratios = [ratio for _, ratio in plots.series(rows, "pull_ratio")]
    if not ratios or 0.1 <= np.median(ratios) <= 10:
        return []
    return [f"the discriminator pulls the prediction {np.median(ratios):.2g} times as much as "
            "L_kd: change gan_weight until it is 0.5 to 1 times"]

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
    recent = [row for row in run.rows if int(row["step"]) > run.step - cfg.eval_every]
    for line in health_warnings(h) + pull_warnings(recent):
        print(f"step {run.step}: {line}", flush=True)
    plots.health(run.out / "log.csv", run.out / "health.png")

def main(argv):
    make = "--cache" in argv
    argv = [a for a in argv if a != "--cache"]
    cfg = read_training(AdvConfig, argv, "configs/adv_nano.toml")
    make_cache(cfg, teacher_text(cfg)) if make else distil(cfg)

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
