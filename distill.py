"""Multi-level knowledge distillation with timestep-aware scaling (docs/PAPER.md, section 5).

    python distill.py [--config configs/kd_nano.toml] [key=value ...]   as train.py, and resumes so
    python distill.py --plot runs/kd_nano       mean |L_task| and |L_kd| against t, before and after
    python distill.py --cache --config C        the cache of your own pictures, teacher's states too

    L = S(L_task, L_kd) + S(L_task, L_featkd)
    S(L_task, L_x) = E_t[ a_t L_task + (1 - a_t) |L_task| / |L_x| L_x ]

L_task is train.py's flow loss; L_kd = ||v_T - v||^2; L_featkd = ||LN(f_T) - phi(f)||^2 with f_T the
teacher's last block, LN a LayerNorm over channels without gains, f a stage of the student and phi a
trainable projector; a_t is a density of t over its maximum: the data teach in the middle, the
teacher at the ends. Every part has a switch; kd=false featkd=false is train.py.

B batch | C channels of the student's tap | D of the teacher's | h w its grid | P pooled width
"""
import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import plots
from cache import empty_caption, make_cache
from checkpoint import HUB, read_description, resolve
from common import UserError, friendly, option
from compiling import compile_blocks
from costs import tap_shape
from data import Batch, FlowConfig
from mmdit import MEDIUM, MMDiT, MMDiTConfig, layer_norm, sd3_config
from model import TextToLatents, count_params, load_model, network_of
from sample import repeated
from text import Text, TextConfig, load_encoders, on_device
from train import TrainConfig, flow_loss, read_training, train

@dataclass
class DistillConfig(TrainConfig):
    out: str = "runs/kd_nano"
    teacher: str = ""               # a checkpoint or run of ours, SD3's directory, or hf:OWNER/NAME
    teacher_cfg: float = option(1.0, low=0)     # guidance of its velocity; not 1: it runs twice
    teacher_t5: bool = True         # false: SD3's teacher without T5-XXL, whose states are zeros
    kd: bool = True                 # L_kd on velocities
    featkd: bool = True             # L_featkd
    student_tap: str = "up0"        # down0 .. mid up0 .. in a UNet, block0 .. in an MMDiT
    teacher_tap: str = ""           # empty: an MMDiT's last block, a UNet's stage of the same name
    scaling: str = option("timestep", choices=("timestep", "constant"))     # constant: `alpha`
    alpha: float = option(0.5, low=0, high=1)
    density: str = option("plain", choices=("plain", "shifted"))    # of a_t: see TaskWeight
    ratio: str = option("sample", choices=("sample", "none"))   # |L_task| / |L_x| of a picture; 1
    # adv_distill.py inherits these keys, but calls `scaled` alone: AdvConfig.check refuses the rest

    @property
    def needs_teacher(self) -> bool:
        return self.kd or self.featkd

def find_teacher(name: str) -> tuple[str, Path | str]:
    """("ours", folder), ("sd3", folder) or ("hub", hf:OWNER/NAME)."""
    if name.startswith(HUB):
        return "hub", name
    try:
        folder = resolve(name or "teacher=")
    except UserError:
        raise UserError(f"no teacher at '{name}': train one (python train.py --config configs/"
                        "teacher_nano.toml) and set teacher=, or turn kd and featkd off; one of "
                        f"the hub's is {HUB}OWNER/NAME") from None
    if (folder / "transformer").is_dir() or "num_attention_heads" in read_description(folder):
        return "sd3", folder
    return "ours", folder

def teacher_network(name: str):
    """The config of a teacher's network, from its files alone; a hub id's from its name."""
    kind, where = find_teacher(name)
    if kind == "hub":
        return MMDiTConfig(**(MEDIUM if "medium" in where else {}))
    if kind == "sd3":
        return sd3_config(where)
    return network_of(read_description(where), where)

def teacher_tap(cfg: DistillConfig, network) -> str:
    if cfg.teacher_tap:
        return cfg.teacher_tap
    return f"block{network.layers - 1}" if isinstance(network, MMDiTConfig) else cfg.student_tap

def teacher_text(cfg: DistillConfig) -> TextConfig | None:
    """The encoders that an SD3 teacher reads; None: the teacher is ours, or there is none."""
    kind, where = find_teacher(cfg.teacher) if cfg.teacher else ("ours", "")
    if kind == "ours":
        return None
    if kind == "sd3" and where.name == "transformer":
        where = where.parent                    # the encoders are beside it
    return TextConfig(kind="sd3", width=teacher_network(cfg.teacher).context_dim,
                      folder=str(where), leave_out=[] if cfg.teacher_t5 else ["t5"])

def check_size(cfg: DistillConfig, config: dict, where):
    """UserError where a checkpoint draws pictures of another size than cfg trains on."""
    size = config.get("data", {}).get("size", cfg.data.size)
    if size != cfg.data.size:
        raise UserError(f"{where} draws {size} px pictures, data.size={cfg.data.size}: set "
                        f"data.size={size}, or take a checkpoint of {cfg.data.size} px")

class Teacher:
    """A frozen denoiser in bfloat16 on CUDA, with its own text encoder or a cache's text states.
    It is no nn.Module, so that the objective that holds it neither trains it, nor saves it, nor
    exchanges its gradients."""
    def __init__(self, cfg: DistillConfig, device):
        kind, where = find_teacher(cfg.teacher)
        self.guidance = cfg.teacher_cfg
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.text = None                        # our own text encoder
        self.encoders = None                    # SD3's, live
        self.states = None                      # SD3's, whose states are in the cache
        self.last = None                        # captions and states of SD3's last batch
        if kind == "ours":
            self.load_ours(cfg, where, device)
        else:
            self.denoiser = MMDiT.from_pretrained(where, self.dtype, device)
            if cfg.data.folder:
                self.states = teacher_text(cfg)
            else:
                text = replace(teacher_text(cfg), dtype=str(self.dtype).split(".")[1])
                self.encoders = load_encoders(text, device)
        self.empty = self.empty_text(cfg, device)       # for guidance
        self.tap = teacher_tap(cfg, self.denoiser.cfg)
        # adv_distill.py sends gradients through it to its input: it checkpoints as the student does
        self.denoiser.cfg.checkpoint = cfg.network.checkpoint
        if cfg.compile and device.type == "cuda":
            compile_blocks(self.denoiser, dynamic=bool(cfg.data.folder))

    def load_ours(self, cfg: DistillConfig, where, device):
        net, config = load_model(where, device)
        check_size(cfg, config, cfg.teacher)
        net = net.to(self.dtype)
        self.text = net.text
        self.vocabulary = net.vocabulary
        self.denoiser = net.denoiser
        own_states = cfg.text.kind == "sd3" and config.get("arch", "unet") != cfg.arch
        if net.text_cfg.kind != cfg.text.kind or own_states:
            raise UserError(f"teacher {cfg.teacher} reads text.kind {net.text_cfg.kind}, the "
                            f"student {cfg.text.kind}: a teacher of ours reads what its student "
                            "does (an MMDiT pooled states too)")

    def check_words(self, student: TextToLatents):
        """UserError where a teacher of ours cannot read the student's tokens."""
        if self.text is None:
            return
        longest, wanted = self.text.cfg.max_tokens, student.text_cfg.max_tokens
        if self.vocabulary.data != student.vocabulary.data or longest < wanted:
            raise UserError(f"the teacher has another vocabulary than the student, or reads only "
                            f"{longest} of its {wanted} tokens: train it anew")

    @torch.no_grad()
    def empty_text(self, cfg: DistillConfig, device) -> Text:
        """The empty caption's states (1, L, D)."""
        if self.states or cfg.text.kind != "own":
            text = empty_caption(cfg, "sd3-" if self.states else "")
            return self.own_dtype(on_device(text, device))
        if self.encoders:
            return self.by_sd3([""])
        return self.text(on_device(self.vocabulary.tokenize([""]), device))

    def digest(self) -> str:
        """A name for its weights and its text encoder's."""
        sha = hashlib.sha256()
        for net in (self.denoiser, self.text):
            for x in net.state_dict().values() if net else ():
                sha.update(x.float().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]

    def own_dtype(self, text: Text) -> Text:
        pooled = None if text.pooled is None else text.pooled.to(self.dtype)
        return Text(text.emb.to(self.dtype), text.mask, pooled)

    def by_sd3(self, captions: list[str]) -> Text:
        """States of SD3's live encoders, once a batch however often they are asked for."""
        if self.last is None or self.last[0] != captions:
            text = self.encoders.encode(captions)
            text.mask.fill_(True)               # SD3 reads its padding too
            self.last = captions, text
        return self.last[1]

    def read(self, batch: Batch, vocabulary=None) -> Text:
        """The batch's captions in this network's text states.
        SD3's live encoders get the captions that our tokens spell (in lower case, as we cut them).
        """
        if batch.teacher_text is not None and self.states:
            return self.own_dtype(batch.teacher_text)
        if isinstance(batch.text, Text):
            return self.own_dtype(batch.text)
        if self.text is not None:
            return self.text(batch.text)
        rows = zip(batch.text.ids.tolist(), batch.text.mask.sum(1).tolist())
        return self.by_sd3([vocabulary.spell(ids[:n - 1]).strip() for ids, n in rows])  # no <end>

    @torch.no_grad()
    def __call__(self, x, t, text: Text, features=()):
        """Latents (B, C, H, W), t (B,), states of read() -> velocity, {tap: (B, D, h, w)}."""
        def ask(text, features=()):
            return self.denoiser(x.to(self.dtype), t, text.emb, text.mask, features=features,
                                 pooled=text.pooled)

        v, taps = ask(text, features) if features else (ask(text), {})
        if self.guidance != 1:
            v_empty = ask(repeated(self.empty, len(x)))
            v = v_empty + self.guidance * (v - v_empty)
        return v, taps

def by_bin(x, t):
    """Means of x (B,) over 8 bins of t: (8,), nan where a bin is empty."""
    bins = torch.arange(8, device=t.device)
    member = ((t * 8).long().clamp(0, 7)[:, None] == bins).float()  # (B, 8)
    # no matrix product: autocast would make it bfloat16
    return (x.float()[:, None] * member).sum(0) / member.sum(0)

class TaskWeight:
    """a_t: a density over its maximum. plain: logit-normal(0, 1), as in the paper; shifted: that of
    the times that are drawn, flow's mean and std, where a shift adds log(shift) to the logit."""
    def __init__(self, density: str, flow: FlowConfig):
        self.mean, self.std = 0.0, 1.0
        if density == "shifted":
            self.mean = flow.mean + np.log(flow.shift)
            self.std = flow.std
        # its modes solve logit = mean + std^2 (2 t - 1)
        low, high = self.mean - self.std**2, self.mean + self.std**2
        logits = torch.linspace(low, high, 200001, dtype=torch.float64)
        self.peak = self.log_density(logits).max().item()

    def log_density(self, logit):
        """log of exp(-(logit - mean)^2 / (2 std^2)) / (t (1 - t)), up to a constant."""
        normal = -((logit - self.mean) / self.std) ** 2 / 2
        return normal - F.logsigmoid(logit) - F.logsigmoid(-logit)

    def __call__(self, t):
        logit = torch.logit(t.float(), 1e-6)
        return torch.exp(self.log_density(logit) - self.peak).clamp(max=1)      # (B,)

class Distill(nn.Module):
    """An objective of train.py: the student as `net`, and the projector."""
    def __init__(self, cfg: DistillConfig, net: TextToLatents, teacher: Teacher | None = None):
        super().__init__()
        self.net = net
        self.cfg = cfg
        self.weight = TaskWeight(cfg.density, cfg.flow)
        self.teacher = teacher
        note = ""
        if cfg.needs_teacher:
            self.teacher = teacher or Teacher(cfg, net.device)
            self.teacher.check_words(net)
            theirs = self.teacher.denoiser.cfg.in_channels
            if theirs != net.denoiser.cfg.in_channels:
                raise UserError(f"the teacher's latents have {theirs} channels, the student's "
                                f"{net.denoiser.cfg.in_channels}: they must share an autoencoder")
        if cfg.featkd:
            C, *own = tap_shape(net.denoiser.cfg, cfg.student_tap, cfg.data.size)
            D, *grid = tap_shape(self.teacher.denoiser.cfg, self.teacher.tap, cfg.data.size)
            self.projector = nn.Conv2d(C, D, 1)
            note = f"; features {cfg.student_tap} {C, *own} -> {self.teacher.tap} {D, *grid}"
        self.states = self.teacher.states if self.teacher else None
        first = not dist.is_initialized() or dist.get_rank() == 0
        if self.teacher and first:
            size = count_params(self.teacher.denoiser) / 1e6
            print(f"teacher {cfg.teacher}: {size:.2f} M {type(self.teacher.denoiser).__name__}, "
                  f"guidance {cfg.teacher_cfg:g}{note}", flush=True)

    def forward(self, batch: Batch, eps, t):
        cfg = self.cfg
        taps = (cfg.student_tap,) if cfg.featkd else ()
        seen = {}       # flow_loss makes x_t and asks the student: kept here for the teacher

        def student(x, t):
            out = self.net(x, t, batch.text, features=taps)
            v, features = out if taps else (out, {})
            seen.update(x=x, v=v, **features)
            return v

        task = flow_loss(student, batch.x0, eps, t)             # (B,)
        losses = {}
        if cfg.needs_teacher:
            text = self.teacher.read(batch, self.net.vocabulary)
            wanted = (self.teacher.tap,) if cfg.featkd else ()
            v_T, taps_T = self.teacher(seen["x"], t, text, features=wanted)
        if cfg.kd:
            losses["kd"] = (v_T.float() - seen["v"].float()).square().mean((1, 2, 3))
        if cfg.featkd:
            f = self.projector(seen[cfg.student_tap]).float()   # (B, D, h, w)
            f_T = layer_norm(taps_T[self.teacher.tap].float().movedim(1, -1)).movedim(-1, 1)
            losses["feat"] = (resized(f_T, f.shape[2:]) - f).square().mean((1, 2, 3))
        return self.scaled(task, losses, t)

    def scaled(self, task, losses, t):
        """(L per picture (B,), values for the log) from L_task and {name: L_x}, (B,) each.
        Not public, and chosen here: a_t is normalised by its maximum, the ratio is taken per
        picture, the squares are means over channels and places, and L_task counts once for each of
        the teacher's losses, as the paper's sum has it. So with ratio = "sample" L is that many
        times L_task in value, whatever the teacher says: watch `kd` and `feat`."""
        constant = torch.full_like(task, self.cfg.alpha)
        a = self.weight(t) if self.cfg.scaling == "timestep" else constant
        values = {"bin_task": by_bin(task.detach(), t)}
        if not losses:
            return task, values
        total = 0
        for name, loss in losses.items():
            ratio = torch.ones_like(task)
            if self.cfg.ratio == "sample":                      # a constant for the gradient
                ratio = task.detach() / loss.detach().clamp(min=1e-12)
            theirs = (1 - a) * ratio * loss
            total = total + a * task + theirs
            values |= {name: loss.detach().mean(), f"bin_{name}": by_bin(loss.detach(), t),
                       f"bin_{name}_scaled": by_bin(theirs.detach(), t)}
        values["task"] = task.detach().mean()
        values["bin_task_scaled"] = by_bin((a * task).detach(), t)
        return total, values

def resized(f, size):
    """Features (B, D, h, w) on a grid of another size: means where it shrinks."""
    return F.interpolate(f, size, mode="area" if size[0] < f.shape[2] else "bilinear")

def main(argv):
    if argv[:1] == ["--plot"]:
        if len(argv) != 2:
            raise UserError("--plot wants a run's directory, such as runs/kd_nano")
        return plots.scaling(argv[1])
    make = "--cache" in argv
    argv = [a for a in argv if a != "--cache"]
    cfg = read_training(DistillConfig, argv, "configs/kd_nano.toml")
    if make:
        return make_cache(cfg, teacher_text(cfg))
    return train(cfg, lambda net: Distill(cfg, net))

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
