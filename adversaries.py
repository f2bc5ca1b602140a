"""What the student of adv_distill.py plays against: the discriminator, the fake score, and the
teacher's own pictures, where they are what is real. And what it begins with.

The discriminator is small trained heads on a frozen denoiser's features. Real pictures and the
student's predictions are noised to the same time t' with the same noise, and each head says for
every place whether they are real (LADD, Sauer et al. 2024). At high t' it sees layout, at low t'
detail. The fake score is a denoiser that learns what the student makes (DMD2, Yin et al. 2024).

B batch | C H W latents | D channels of a tap | h w its grid | N places | W width of a head
"""
import copy
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import UserError
from costs import tap_names, tap_shape
from data import BATCH, Batch, content_key, kept_tensors, rows_in_parts, wordings
from distill import Teacher, find_teacher
from model import load_model
from sample import dpmpp, latents_noise, times
from text import Text, Tokens

def noise_like(x, g):
    return torch.randn(x.shape, generator=g, device=x.device)

def noised(x0, t, eps):
    """x_t: latents and noise (B, C, H, W), t (B,)."""
    a = t[:, None, None, None]
    return (1 - a) * x0 + a * eps

class Head(nn.Module):
    """Features (B, D, h, w) and a condition (B, W), which enters as a projection (Miyato and Koyama
    2018) -> a logit for each place (B, h w), and what it is read from (B, W, h, w)."""
    def __init__(self, D, W, depth: int):
        super().__init__()
        layers = [nn.GroupNorm(1, D), nn.Conv2d(D, W, 1), nn.SiLU()]
        for _ in range(depth - 1):
            layers += [nn.Conv2d(W, W, 3, padding=1), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.out = nn.Conv2d(W, 1, 1)

    def forward(self, f, c):
        y = self.body(f)                                        # (B, W, h, w)
        agreement = (y * c[:, :, None, None]).mean(1)           # (B, h, w)
        return (self.out(y)[:, 0] + agreement).flatten(1).float(), y

class Critic(nn.Module):
    """Heads on the features of a frozen denoiser, a distill.Teacher, through which gradients pass.
    The heads are trained and kept; a Teacher is no module, so that it is neither."""
    def __init__(self, cfg, frozen: Teacher):
        super().__init__()
        network = frozen.denoiser.cfg
        W = cfg.critic_width
        self.frozen = frozen
        self.taps = tuple(cfg.critic_taps or tap_names(network))
        widths = [tap_shape(network, tap, cfg.data.size)[0] for tap in self.taps]
        self.heads = nn.ModuleList(Head(D, W, cfg.critic_depth) for D in widths)
        first = nn.Linear(32 + network.context_dim, W)      # of t' and the text's mean state
        self.embed = nn.Sequential(first, nn.SiLU(), nn.Linear(W, W))

    def forward(self, x, t, text: Text, hidden=False):
        """Noised latents (B, C, H, W) -> a list of each head's logits (B, N).
        hidden: also a list of what they are read from (B, W, h, w)."""
        _, taps = self.frozen.denoiser(x.to(self.frozen.dtype), t, text.emb, text.mask,
                                       features=self.taps, pooled=text.pooled)
        c = self.condition(t, text)
        # contiguous: on a CPU, GroupNorm's backward pass crashes for a channels_last input that
        # wants no gradient (torch 2.13)
        features = [taps[name].float().contiguous() for name in self.taps]
        answers = [head(f, c) for head, f in zip(self.heads, features)]
        logits, inner = map(list, zip(*answers))
        return (logits, inner) if hidden else logits

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
    """D's loss (B,) from lists of logits. "relativistic": each place of a real picture against the
    same place of the prediction made from it (Jolicoeur-Martineau 2018)."""
    if kind == "relativistic":
        return over_heads(F.softplus, [f - r for r, f in zip(real, fake)])
    return over_heads(FORMS[kind][0], real) + over_heads(FORMS[kind][1], fake)

def generator_loss(kind, real, fake):
    """G's loss (B,); only "relativistic" looks at the real logits."""
    if kind == "relativistic":
        return over_heads(F.softplus, [r - f for r, f in zip(real, fake)])
    return over_heads(FORMS[kind][2], fake)

def matching_loss(real, fake):
    """Mean distance of what the heads' logits are read from, lists of (B, W, h, w): (B,)."""
    gaps = [(f - r).abs().mean((1, 2, 3)) for r, f in zip(real, fake)]
    return torch.stack(gaps).mean(0)

def gradient_penalty(critic, x, t, text, logits, sigma: float, g):
    """E |D(x + sigma n) - D(x)|^2 / sigma^2, about the squared gradient of a logit: (B,).
    R1 on real pictures, R2 on fakes, approximated (Lin et al. 2025): no second derivative through
    the features. logits: D(x)."""
    near = critic(x + sigma * torch.randn(x.shape, generator=g, device=x.device), t, text)
    squares = [(a - b).square().mean(1) for a, b in zip(near, logits)]
    return torch.stack(squares).mean(0) / sigma**2

def right_shares(kind, real, fake) -> list:
    """Each head's share of right answers, half of them on real pictures; "relativistic": of pairs
    whose real side has the higher logit. () each."""
    if kind == "relativistic":
        return [(r > f).float().mean() for r, f in zip(real, fake)]
    return [((r > 0).float().mean() + (f < 0).float().mean()) / 2 for r, f in zip(real, fake)]

def rolled(text: Text) -> Text:
    """Each picture with its neighbour's caption."""
    return Text(*(None if x is None else x.roll(1, 0) for x in text))

@torch.no_grad()
def dmd_gradient(teacher, fake, x0, t, teacher_states: Text, text, g):
    """The gradient on G's prediction x0 (DMD2, eq. 3): (B, C, H, W).
    It is what the fake score's x0 is more than the guided real one's, over the latter's mean
    distance from x0; divided by C H W, as the gradient of a mean over places is."""
    x = noised(x0, t, noise_like(x0, g))
    a = t[:, None, None, None]
    real = x - a * teacher(x, t, teacher_states)[0].float()
    false = x - a * fake(x, t, text).float()
    distance = (x0 - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return (false - real) / distance / x0[0].numel()

def fake_score(cfg, net, device):
    """The network that learns what G makes: begins as the real score where that fits (DMD2)."""
    fake = copy.deepcopy(net)
    if find_teacher(cfg.teacher)[0] == "ours":
        real, _ = load_model(cfg.teacher, device)
        if real.denoiser.cfg == net.denoiser.cfg and real.text_cfg == net.text_cfg:
            fake = real
    return fake.requires_grad_(True).train()

def add_training(net, before: str, after: str):
    """Adds to the student's weights what a training changed between two other checkpoints of its
    network. What learns to draw in few steps moves weights little, and it fits any fine-tuning of
    the same network (Luo et al. 2023, LCM-LoRA). UserError where it is another one."""
    start, end = (load_model(path)[0] for path in (before, after))
    own, old, new = (x.state_dict() for x in (net, start, end))
    forms = [{key: x.shape for key, x in state.items()} for state in (own, old, new)]
    if forms[1:] != forms[:-1] or not net.files() == start.files() == end.files():
        raise UserError(f"{after} and {before} are not both of the student's network and "
                        "vocabulary: set faster=\"\", and the student learns few steps anew")
    with torch.no_grad():
        for key, x in own.items():
            x += (new[key] - old[key]).to(x.device)

def teachers_latents(cfg, teacher: Teacher, latents, vocabulary) -> torch.Tensor:
    """What the guided teacher draws for the scenes of `latents`, in 14 steps of dpmpp, each with
    one of the scene's wordings: fp16 of the same shape, made once and kept.
    LADD trains on such pictures alone: G can reach them, and they agree with their captions."""
    words = wordings(cfg, len(latents), vocabulary)
    shape, device = tuple(latents.shape[1:]), teacher.empty.emb.device
    schedule = times(14, cfg.flow.shift)

    def drawn_batches(todo):
        with tqdm(total=todo.stop, initial=todo.start, desc="the teacher draws") as bar:
            for first in range(todo.start, todo.stop, BATCH):
                some = range(first, min(first + BATCH, todo.stop))
                L = words["lengths"][some, 0]
                ids = words["ids"][some, 0, :L.max()].long()
                tokens = Tokens(ids, torch.arange(L.max()) < L[:, None])
                noise = latents_noise(some, shape, device)              # (B, C, H, W)
                text = teacher.read(Batch(noise, tokens).to(device), vocabulary)

                def velocity(x, t, text=text):
                    return teacher(x, torch.full((len(x),), t, device=device), text)[0].float()
                with torch.no_grad():
                    yield dpmpp(velocity, noise, schedule).half().cpu()
                bar.update(len(some))

    key = content_key(cfg.data, vars(cfg.flow), teacher.digest(), cfg.teacher_cfg, cfg.seed, shape)
    path = Path(cfg.data.cache) / f"teacher-{len(latents)}-{key}.safetensors"
    def make():
        return {"latents": rows_in_parts(path, len(latents), drawn_batches)}
    return kept_tensors(path, make, latents=len(latents))["latents"]
