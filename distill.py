"""Multi-level knowledge distillation with timestep-aware scaling (SnapGen, section 3.3; the notes on what is doubtful stand at `scaled`).

    python distill.py [--config configs/kd_nano.toml] [key=value ...]       trains as train.py does, and resumes as it does
    python distill.py --plot runs/kd_nano                                   mean |L_task| and |L_kd| against t, before and after scaling
    python distill.py --config configs/kd_sd35.toml --dry-run               parameters, memory, FLOPs, days (plan.py); trains nothing

    L = S(L_task, L_kd) + S(L_task, L_featkd),   S(L_task, L_x) = E_t[ a_t L_task + (1 - a_t) |L_task| / |L_x| L_x ]

L_task is train.py's flow loss; L_kd = ||v_T - v||^2; L_featkd = ||f_T - phi(f)||^2 with f_T the teacher's last block, f a stage of the student and phi a trainable
projector; a_t the density of the times that are drawn, over its maximum: the data teach in the middle, the teacher at the ends. Every part has a switch;
kd=false featkd=false is train.py.
B batch | C channels of the student's tap | D of the teacher's | h w its grid
"""
import os, re, sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import plots, train
from checkpoint import read_description, resolve
from common import UserError, friendly, pick_device, read_config, start_others
from mmdit import MEDIUM, MMDiT, MMDiTConfig, sd3_config
from model import count_params
from cache import empty_caption
from plan import forward_flops, frozen, report, tap_shape, trained, training_flops
from sample import TextToLatents, chosen, load_model, network_of
from text import Text, TextConfig, encoding, load_encoders, tokenize


@dataclass
class Config(train.Config):
    out: str = "runs/kd_nano"
    teacher: str = ""               # a checkpoint or run of ours, a directory in SD3's layout, or a hub id
    teacher_cfg: float = 1.0        # guidance of the teacher's velocity; 1 = none (else it runs twice)
    teacher_t5: bool = True         # false: SD3's teacher without T5-XXL, 9.5 GB less; its states are zeros
    kd: bool = True                 # L_kd on velocities
    featkd: bool = True             # L_featkd
    student_tap: str = "up0"        # down0 .. mid up0 .. of a UNet, block0 .. of an MMDiT
    teacher_tap: str = ""           # empty: an MMDiT's last block, a UNet's stage of the student's name
    projector: str = "linear"       # or mlp: two layers
    scaling: str = "timestep"       # a_t; or constant: `alpha` at every t
    alpha: float = 0.5
    ratio: str = "sample"           # |L_task| / |L_x| of each picture; bin: of running means in 8 bins of t; none: 1


# ---------------------------------------------------------------------------- the teacher
def find_teacher(name: str) -> tuple[str, Path | str]:
    """("ours", folder), ("sd3", folder) or ("hub", id)."""
    try:
        if not name:
            raise UserError("empty")
        folder = resolve(name)
    except UserError:
        if re.fullmatch(r"[\w-]+/[\w.-]+", name) and not name.startswith("runs/"):
            return "hub", name
        raise UserError(f"no teacher at '{name}': train one (python train.py --config configs/teacher_nano.toml) and set teacher=, or turn both kd and featkd off")
    file = folder / "config.json"
    sd3 = (folder / "transformer").is_dir() or (file.is_file() and '"num_attention_heads"' in file.read_text(errors="replace"))
    return ("sd3" if sd3 else "ours"), folder


def teacher_tap(cfg: Config, network) -> str:
    return cfg.teacher_tap or (f"block{network.layers - 1}" if isinstance(network, MMDiTConfig) else cfg.student_tap)


def teacher_text(cfg: Config) -> TextConfig | None:
    """The encoders that an SD3 teacher reads by; None: the teacher is ours, or there is none."""
    kind, where = find_teacher(cfg.teacher) if cfg.teacher else ("ours", "")
    if kind == "ours":
        return None
    folder = where.parent if kind == "sd3" and where.name == "transformer" else where       # the encoders lie beside it
    return TextConfig("sd3", teacher_network(cfg.teacher).context_dim, folder=str(folder), leave_out=[] if cfg.teacher_t5 else ["t5"])


class Teacher:
    """Frozen, in eval, in bf16 on CUDA. No nn.Module: the objective that holds it neither trains it, nor saves it, nor exchanges its gradients.
    It reads by its own text encoder, or on a cache of your own pictures the states that lie there; `words` are all that a batch holds behind the latents."""

    def __init__(self, cfg: Config, device):
        kind, where = find_teacher(cfg.teacher)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.guidance, self.text, self.encoders, self.last = cfg.teacher_cfg, None, None, None
        self.states = teacher_text(cfg) if cfg.data.folder else None                                # encoders whose cached states it reads
        if kind == "ours":
            net, config = load_model(where, device)
            net = net.to(dtype)
            self.text, self.denoiser = net.text, net.denoiser
            if net.text_cfg.kind != cfg.text.kind or (cfg.text.kind == "sd3" and config.get("arch") != cfg.arch):
                raise UserError(f"teacher {cfg.teacher} reads text.kind {net.text_cfg.kind}, the student {cfg.text.kind}: a teacher of ours reads what its student does (an MMDiT pooled states too)")
            if self.text and (self.text.cfg.vocabulary != encoding().n_vocab or self.text.cfg.max_tokens < cfg.text.max_tokens):
                raise UserError(f"teacher {cfg.teacher} reads another vocabulary or shorter captions ({self.text.cfg.vocabulary} tokens, {self.text.cfg.max_tokens} a caption): train it anew")
        else:
            self.denoiser = MMDiT.from_pretrained(where, dtype, device)
            if not self.states:
                self.encoders = load_encoders(replace(teacher_text(cfg), dtype=str(dtype).split(".")[1]), device)
        with torch.no_grad():                                   # (1, L, W): for guidance, the same in every batch
            words = empty_caption(cfg, "sd3-" if self.states else "") if self.states or cfg.text.kind != "own" else tokenize([""])
            self.empty = self.encode(*(x.to(device) for x in words if x is not None))
        self.tap = teacher_tap(cfg, self.denoiser.cfg)
        self.denoiser.cfg.checkpoint = chosen(cfg.arch, cfg.model, cfg.mmdit).checkpoint    # as the student: where gradients pass through it to its input (adv_distill.py)
        if cfg.compile and device.type == "cuda":
            self.denoiser.compile()

    def own(self, words):
        """What the student reads of them."""
        return words[:-3] if self.states else words

    def encode(self, *words) -> Text:
        """Of our tokens SD3's encoders get the captions that they spell (in lower case, as we cut them), once a batch however often it is asked for."""
        if not self.text and not self.encoders:                 # from the cache: in this network's own numbers
            emb, mask, *pooled = words[-3:] if self.states else words
            return Text(*(x.to(next(self.denoiser.parameters()).dtype) if x.is_floating_point() else x for x in (emb, mask, *pooled)))
        ids, mask = words
        if self.text is not None:
            return self.text(ids, mask)
        rows = [row[:n - 1] for row, n in zip(ids.tolist(), mask.sum(1).tolist())]                  # without <end>
        if self.last is None or self.last[0] != rows:
            self.last = rows, self.encoders.encode([encoding().decode(row).strip() for row in rows])
            self.last[1].mask.fill_(True)                       # SD3 reads its padding too
        return self.last[1]

    @torch.no_grad()
    def __call__(self, x, t, *words, features=()):
        """Noisy latents (B, C, H, W) and a batch's words -> velocity (B, C, H, W), {tap: (B, D, h, w)}."""
        dtype, text = next(self.denoiser.parameters()).dtype, self.encode(*words)
        x = x.to(dtype)
        def ask(text, features=()):
            pooled = {} if text.pooled is None else {"pooled": text.pooled}
            return self.denoiser(x, t, text.emb, text.mask, features=features, **pooled)
        v, taps = ask(text, features) if features else (ask(text), {})
        if self.guidance != 1:
            n = len(x)
            v_empty = ask(Text(*(None if y is None else y.expand(n, *y.shape[1:]) for y in self.empty)))
            v = v_empty + self.guidance * (v - v_empty)
        return v, taps


# ---------------------------------------------------------------------------- the objective
def by_bin(x, t):
    """Means of x (B,) over 8 bins of t: (8,), nan where a bin is empty."""
    member = F.one_hot((t * 8).long().clamp(0, 7), 8).float()  # (B, 8)
    return (x.float()[:, None] * member).sum(0) / member.sum(0)   # no matrix product: autocast would make it bfloat16


class TaskWeight:
    """a_t: the density of the times that are drawn over its maximum. They are logit-normal(mean, std), then shifted, which adds log(shift) to their logit."""

    def __init__(self, flow: train.FlowConfig):
        self.mean, self.std = flow.mean + np.log(flow.shift), flow.std
        logits = torch.linspace(self.mean - self.std**2, self.mean + self.std**2, 200001, dtype=torch.float64)    # its modes solve logit = mean + std^2 (2 t - 1)
        self.peak = self.log_density(logits).max().item()

    def log_density(self, logit):
        """log of exp(-(logit - mean)^2 / (2 std^2)) / (t (1 - t)), up to a constant."""
        return -((logit - self.mean) / self.std) ** 2 / 2 - F.logsigmoid(logit) - F.logsigmoid(-logit)

    def __call__(self, t):
        return torch.exp(self.log_density(torch.logit(t.float(), 1e-6)) - self.peak).clamp(max=1)   # (B,)


def make_projector(kind: str, C: int, D: int) -> nn.Module:
    if kind not in ("linear", "mlp"):
        raise UserError(f"projector '{kind}': use linear or mlp")
    return nn.Conv2d(C, D, 1) if kind == "linear" else nn.Sequential(nn.Conv2d(C, D, 1), nn.SiLU(), nn.Conv2d(D, D, 1))


class Distill(nn.Module):
    """An objective of train.py: the student as `net`, the projector, running means. The teacher is not registered."""

    def __init__(self, cfg: Config, net: TextToLatents, teacher: Teacher | None = None):
        super().__init__()
        for key, allowed in (("scaling", ("timestep", "constant")), ("ratio", ("sample", "bin", "none"))):
            if getattr(cfg, key) not in allowed:
                raise UserError(f"{key} '{getattr(cfg, key)}': use {', '.join(allowed)}")
        self.net, self.cfg, self.weight = net, cfg, TaskWeight(cfg.flow)
        self.teacher = teacher
        if cfg.kd or cfg.featkd:
            self.teacher = teacher or Teacher(cfg, next(net.parameters()).device)
            if self.teacher.denoiser.cfg.in_channels != net.denoiser.cfg.in_channels:
                raise UserError(f"the teacher's latents have {self.teacher.denoiser.cfg.in_channels} channels, the student's {net.denoiser.cfg.in_channels}: they must share an autoencoder")
        note = ""
        if cfg.featkd:
            (C, *own), (D, *theirs) = (tap_shape(n.cfg, tap, cfg.data.size) for n, tap in ((net.denoiser, cfg.student_tap), (self.teacher.denoiser, self.teacher.tap)))
            self.projector = make_projector(cfg.projector, C, D)
            note = f"; features {cfg.student_tap} ({C}, {own[0]}x{own[1]}) -> {cfg.projector} -> {self.teacher.tap} ({D}, {theirs[0]}x{theirs[1]})" + (", resized" if own != theirs else "")
        if cfg.ratio == "bin":
            self.register_buffer("means", torch.zeros(2, 2, 8))    # for L_kd, L_featkd: of L_task, of itself
        self.states = self.teacher.states if self.teacher else None
        if self.teacher and not (dist.is_initialized() and dist.get_rank()):
            print(f"teacher {cfg.teacher}: {count_params(self.teacher.denoiser) / 1e6:.2f} M {type(self.teacher.denoiser).__name__}, guidance {cfg.teacher_cfg:g}{note}", flush=True)

    @torch.no_grad()
    def ratio(self, row: int, task, other, t):
        """|L_task| / |L_x| of each picture, a constant for the gradient: (B,)."""
        if self.cfg.ratio == "none":
            return torch.ones_like(task)
        if self.cfg.ratio == "sample":
            return task / other.clamp(min=1e-12)
        for k, x in ((0, task), (1, other)):
            new, old = by_bin(x, t), self.means[row, k].clone()
            self.means[row, k] = torch.where(torch.isfinite(new), torch.where(old > 0, old.lerp(new, 0.02), new), old)
        return (self.means[row, 0] / self.means[row, 1].clamp(min=1e-12))[(t * 8).long().clamp(0, 7)]

    def forward(self, x0, eps, t, *words):
        cfg, seen = self.cfg, {}
        taps = (cfg.student_tap,) if cfg.featkd else ()

        def student(x, t):
            v = self.net(x, t, *(self.teacher.own(words) if self.teacher else words), features=taps)
            v, features = v if taps else (v, {})
            seen.update(x=x, v=v, **features)
            return v
        task = train.flow_loss(student, x0, eps, t)             # (B,)
        losses = {}
        if cfg.kd or cfg.featkd:
            v_T, theirs = self.teacher(seen["x"], t, *words, features=(self.teacher.tap,) if cfg.featkd else ())
        if cfg.kd:
            losses["kd"] = (v_T.float() - seen["v"].float()).square().mean((1, 2, 3))
        if cfg.featkd:
            f, f_T = self.projector(seen[cfg.student_tap]).float(), theirs[self.teacher.tap].float()      # (B, D, h, w) each
            if f.shape != f_T.shape:
                f_T = F.interpolate(f_T, f.shape[2:], mode="area") if f.shape[2] < f_T.shape[2] else F.interpolate(f_T, f.shape[2:], mode="bilinear")
            losses["feat"] = (f_T - f).square().mean((1, 2, 3))
        return self.scaled(task, losses, t)

    def scaled(self, task, losses, t):
        """L per picture and what the log tells of it. Not public, and chosen here: a_t's normalisation is "density over its maximum", the ratio is taken per picture,
        the squares are means over channels and places, and with both teachers' losses L_task counts twice, as the paper's sum has it."""
        a = self.weight(t) if self.cfg.scaling == "timestep" else torch.full_like(task, self.cfg.alpha)
        values, total = {"bin_task": by_bin(task.detach(), t)}, task if not losses else 0
        for row, (name, loss) in enumerate((n, losses.get(n)) for n in ("kd", "feat")):
            if loss is None:
                continue
            ratio = self.ratio(row, task.detach(), loss.detach(), t)
            total = total + a * task + (1 - a) * ratio * loss
            values |= {name: loss.detach().mean(), f"bin_{name}": by_bin(loss.detach(), t), f"bin_{name}_scaled": by_bin(((1 - a) * ratio * loss).detach(), t)}
        if losses:
            values |= {"task": task.detach().mean(), "bin_task_scaled": by_bin((a * task).detach(), t)}
        return total, values


# ---------------------------------------------------------------------------- --dry-run
def teacher_network(name: str):
    """The config of the teacher's network, from files alone (a hub id: from its name)."""
    kind, where = find_teacher(name)
    if kind == "hub":
        return MMDiTConfig(**(MEDIUM if "medium" in where else {}))
    return sd3_config(where) if kind == "sd3" else network_of(read_description(where), where)


def dry_run(cfg: Config) -> dict:
    student, teacher = chosen(cfg.arch, cfg.model, cfg.mmdit), teacher_network(cfg.teacher)
    with torch.device("meta"):
        beside = make_projector(cfg.projector, *(tap_shape(n, tap, cfg.data.size)[0] for n, tap in ((student, cfg.student_tap), (teacher, teacher_tap(cfg, teacher))))) if cfg.featkd else None
    flops = training_flops(cfg, student) + (1 + (cfg.teacher_cfg != 1)) * forward_flops(teacher, cfg.data.size, cfg.tokens)
    return report(cfg, [frozen(cfg, "teacher", teacher), trained(cfg, "student", student, beside, muon_lr=cfg.muon_lr)], flops)


def main(argv):
    if argv[:1] == ["--plot"]:
        if len(argv) != 2:
            raise UserError("--plot wants a run's directory, such as runs/kd_nano")
        return plots.scaling(argv[1])
    cfg = read_config(Config(), [a for a in argv if a != "--dry-run"], "configs/kd_nano.toml")
    if "--dry-run" in argv:
        return dry_run(cfg)
    if cfg.processes > 1 and "WORLD_SIZE" not in os.environ and pick_device(cfg.device).type == "cpu":
        start_others(cfg.processes)
    train.train(cfg, lambda net: Distill(cfg, net))


if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
