"""Multi-level knowledge distillation with timestep-aware scaling (SnapGen, section 3.3; the notes on what is doubtful stand at `scaled`).

    python distill.py [--config configs/kd_nano.toml] [key=value ...]       trains as train.py does, and resumes as it does
    python distill.py --plot runs/kd_nano                                   mean |L_task| and |L_kd| against t, before and after scaling
    python distill.py --config configs/kd_sd35.toml --dry-run               parameters and memory of teacher and student; trains nothing

    L = S(L_task, L_kd) + S(L_task, L_featkd),   S(L_task, L_x) = E_t[ a_t L_task + (1 - a_t) |L_task| / |L_x| L_x ]

L_task is train.py's flow loss; L_kd = ||v_T - v||^2; L_featkd = ||f_T - phi(f)||^2 with f_T the teacher's last block, f a stage of the student and phi a trainable
projector; a_t the density of the times that are drawn, over its maximum: the data teach in the middle, the teacher at the ends. Every part has a switch;
kd=false featkd=false is train.py.
B batch | C channels of the student's tap | D of the teacher's | h w its grid
"""
import os, re, sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import train
from checkpoint import load_checkpoint, resolve
from common import UserError, friendly, pick_device, read_config, read_log, start_others
from mmdit import MEDIUM, Block, MMDiT, MMDiTConfig, sd3_config
from model import Layer, count_params
from optim import Muon
from sample import TextToLatents, build, chosen, load_model, network_of
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
    tokens: int = 16                # of a caption, for --dry-run
    gpu_gb: float = 80.0            # GiB of the GPU that --dry-run asks about


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


class Teacher:
    """Frozen, in eval, in bf16 on CUDA. No nn.Module: the objective that holds it neither trains it, nor saves it, nor exchanges its gradients."""

    def __init__(self, cfg: Config, device):
        kind, where = find_teacher(cfg.teacher)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.guidance, self.text, self.last = cfg.teacher_cfg, None, None
        if kind == "ours":
            net, config = load_model(where, device)
            net = net.to(dtype)
            self.text, self.denoiser = net.text, net.denoiser
            if self.text.cfg.vocabulary != encoding().n_vocab or self.text.cfg.max_tokens < cfg.text.max_tokens:
                raise UserError(f"teacher {cfg.teacher} reads another vocabulary or shorter captions ({self.text.cfg.vocabulary} tokens, {self.text.cfg.max_tokens} a caption): train it anew")
        else:
            self.denoiser = MMDiT.from_pretrained(where, dtype, device)
            folder = where.parent if kind == "sd3" and where.name == "transformer" else where       # the encoders lie beside it
            self.encoders = load_encoders(TextConfig("sd3", self.denoiser.cfg.context_dim, folder=str(folder), leave_out=[] if cfg.teacher_t5 else ["t5"], dtype=str(dtype).split(".")[1]), device)
        with torch.no_grad():
            self.empty = self.encode(*(x.to(device) for x in tokenize([""])))   # (1, L, W): for guidance, the same in every batch
        self.tap = teacher_tap(cfg, self.denoiser.cfg)
        if cfg.compile and device.type == "cuda":
            self.denoiser.compile()

    def encode(self, ids, mask):
        """Our tokens -> Text. SD3's encoders get the captions that the tokens spell (in lower case, as we cut them), once a batch however often it is asked for."""
        if self.text is not None:
            return self.text(ids, mask)
        rows = [row[:n - 1] for row, n in zip(ids.tolist(), mask.sum(1).tolist())]                  # without <end>
        if self.last is None or self.last[0] != rows:
            self.last = rows, self.encoders.encode([encoding().decode(row).strip() for row in rows])
            self.last[1].mask.fill_(True)                       # SD3 reads its padding too
        return self.last[1]

    @torch.no_grad()
    def __call__(self, x, t, ids, mask, features=()):
        """Noisy latents (B, C, H, W) and what the student reads -> velocity (B, C, H, W), {tap: (B, D, h, w)}."""
        dtype, text = next(self.denoiser.parameters()).dtype, self.encode(ids, mask)
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


def tap_names(network) -> list[str]:
    if isinstance(network, MMDiTConfig):
        return [f"block{i}" for i in range(network.layers)]
    stages = range(len(network.widths))
    return [f"down{i}" for i in stages] + ["mid"] + [f"up{i}" for i in stages]


def tap_shape(network, tap: str, size: int) -> tuple[int, int, int]:
    """(C, h, w) of a network's feature, from a pass on the meta device."""
    with torch.device("meta"), torch.no_grad():
        net = build(network)
        names = tap_names(network)
        if tap not in names:
            raise UserError(f"no tap '{tap}' in the {type(net).__name__}: it has " + ", ".join(names))
        return tuple(net(torch.empty(1, network.in_channels, size // 8, size // 8), torch.empty(1), torch.empty(1, 1, network.context_dim), features=(tap,),
                         **({"pooled": torch.empty(1, network.pooled_dim)} if isinstance(network, MMDiTConfig) else {}))[1][tap].shape[1:])


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

    def forward(self, x0, eps, t, ids, mask):
        cfg, seen = self.cfg, {}
        taps = (cfg.student_tap,) if cfg.featkd else ()

        def student(x, t):
            v = self.net(x, t, ids, mask, features=taps)
            v, features = v if taps else (v, {})
            seen.update(x=x, v=v, **features)
            return v
        task = train.flow_loss(student, x0, eps, t)             # (B,)
        losses = {}
        if cfg.kd or cfg.featkd:
            v_T, theirs = self.teacher(seen["x"], t, ids, mask, (self.teacher.tap,) if cfg.featkd else ())
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


# ---------------------------------------------------------------------------- --plot
def plot(run):
    """RUN/scaling.png: mean losses in 8 bins of t over the last half of the run, left as they are, right as they enter L."""
    rows = [r for r in read_log(Path(run) / "log.csv") if r.get("bin_task_scaled0")]
    rows, charts = rows[len(rows) // 2:], []
    if not rows:
        raise UserError(f"{run}/log.csv holds no distillation: give a run of distill.py with kd or featkd, after its first log line")
    print(f"{run}/scaling.png, over {len(rows)} log lines; means per bin of t:")
    for suffix, title in (("", "as they are"), ("_scaled", "as they enter L")):
        lines = []
        for name, colour, word in (("task", (40, 90, 220), "blue"), ("kd", (220, 110, 30), "orange"), ("feat", (60, 150, 70), "green")):
            table = np.array([[float(r[f"bin_{name}{suffix}{b}"]) for b in range(8)] for r in rows if r.get(f"bin_{name}{suffix}0")])       # (lines, 8); nan: no picture fell there
            if len(table):
                means = [np.mean(column[np.isfinite(column)]) if np.isfinite(column).any() else np.nan for column in table.T]
                print(f"{name + suffix:12} " + " ".join(f"{v:.4f}" for v in means))
                lines.append(([((b + 0.5) / 8, v) for b, v in enumerate(means) if v > 0], colour))
                title += f"   {word}: L_{name}"
        charts.append(train.chart(lines, f"t = 0 (picture) .. 1 (noise); {title}", 480, 320))
    image = Image.new("RGB", (960, 320), (255, 255, 255))
    for k, c in enumerate(c for c in charts if c):
        image.paste(c, (480 * k, 0))
    image.save(Path(run) / "scaling.png")


# ---------------------------------------------------------------------------- --dry-run
def activations(network, batch: int, size: int, tokens: int, amp: bool) -> tuple[int, int]:
    """Bytes that a training pass of a UNet or MMDiT keeps for its backward pass, and those of its greediest layer alone, which is also about what a pass
    without gradients holds at a time. Counted, not modelled: a forward pass on fake tensors (meta tensors that know autocast) under autograd's saved-tensor
    hooks, each storage once, parameters left out. With checkpoint: the layers' inputs, what lies between them, and the greediest layer.
    Not in it: the temporaries of a kernel, the allocator's fragments (10 % is a fair allowance)."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    kept, inputs, unit = {}, {}, [None]

    def enter(module, args):
        unit[0] = module
        inputs.update({x.untyped_storage()._cdata: x for x in args if torch.is_tensor(x)})

    def pack(x):                                                # keeps x, lest a later tensor gets its address
        kept.setdefault(x.untyped_storage()._cdata, (x, unit[0]))
        return x
    with FakeTensorMode():
        net = build(replace(network, checkpoint=False))
        for m in net.modules():
            if isinstance(m, (Layer, Block)):
                m.register_forward_pre_hook(enter)
                m.register_forward_hook(lambda *_: unit.__setitem__(0, None))
        args = [torch.empty(batch, network.in_channels, size // 8, size // 8), torch.empty(batch), torch.empty(batch, tokens, network.context_dim), torch.empty(batch, tokens, dtype=torch.bool)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            net(*args, **({"pooled": torch.empty(batch, network.pooled_dim)} if isinstance(network, MMDiTConfig) else {}))
    for p in net.parameters():
        kept.pop(p.untyped_storage()._cdata, None)
    of = defaultdict(int)
    for x, where in kept.values():
        of[where] += x.untyped_storage().nbytes()
    greediest, total = max(v for k, v in of.items() if k is not None), sum(of.values())
    if network.checkpoint:
        total = of[None] + greediest + sum(x.untyped_storage().nbytes() for k, x in inputs.items() if k not in kept or kept[k][1] is not None)
    return total, greediest


def teacher_network(name: str):
    """The config of the teacher's network, from files alone (a hub id: from its name)."""
    kind, where = find_teacher(name)
    if kind == "hub":
        return MMDiTConfig(**(MEDIUM if "medium" in where else {}))
    if kind == "sd3":
        return sd3_config(where)
    return network_of(load_checkpoint(where)[0], where)


def dry_run(cfg: Config) -> dict:
    """Prints, and returns in numbers, what the two networks need. The text encoders are not counted."""
    student, teacher, amp, GiB = chosen(cfg.arch, cfg.model, cfg.mmdit), teacher_network(cfg.teacher), cfg.amp != "float32", 2**30
    with torch.device("meta"):
        nets = nn.ModuleDict({"net": build(student)})
        theirs = build(teacher)
        if cfg.featkd:
            C, D = tap_shape(student, cfg.student_tap, cfg.data.size)[0], tap_shape(teacher, teacher_tap(cfg, teacher), cfg.data.size)[0]
            nets["projector"] = make_projector(cfg.projector, C, D)
        optimiser = sum(p.numel() * (4 if g["muon"] else 8) for g in Muon(nets, cfg.lr, cfg.muon_lr).param_groups for p in g["params"])
    n, n_T, n_own = count_params(nets["net"]), count_params(theirs), count_params(nets)
    out = {"teacher": n_T, "student": n, "teacher_weights": 2 * n_T, "teacher_activations": activations(teacher, cfg.batch, cfg.data.size, cfg.tokens, amp)[1],
           "weights": 4 * n_own, "gradients": 4 * n_own, "average": 4 * n, "optimiser": optimiser, "activations": activations(student, cfg.batch, cfg.data.size, cfg.tokens, amp)[0]}
    parts = lambda *keys: ", ".join(f"{k.split('_')[-1]} {out[k] / GiB:.2f}" for k in keys)
    total = sum(out[k] for k in out if k not in ("teacher", "student")) / GiB
    print(f"batch {cfg.batch} of {cfg.data.size} px, captions of {cfg.tokens} tokens, {'bfloat16' if amp else 'float32'}; GiB, text encoders not counted")
    print(f"teacher {n_T / 1e6:9.2f} M {type(theirs).__name__:5}  {parts('teacher_weights', 'teacher_activations')}")
    print(f"student {n / 1e6:9.2f} M {type(nets['net']).__name__:5}  {parts('weights', 'gradients', 'average', 'optimiser', 'activations')}" + (f" (projector of {(n_own - n) / 1e6:.2f} M included)" if n_own > n else ""))
    fits = 1.1 * total < cfg.gpu_gb
    print(f"in all {total:.1f}, with a tenth for fragments {1.1 * total:.1f}: " + (f"fits a GPU of {cfg.gpu_gb:g}" if fits else f"does NOT fit a GPU of {cfg.gpu_gb:g}: lower batch (and raise accumulate), or set model.checkpoint=true"))
    return {**out, "total": total, "fits": fits}


def main(argv):
    if argv[:1] == ["--plot"]:
        if len(argv) != 2:
            raise UserError("--plot wants a run's directory, such as runs/kd_nano")
        return plot(argv[1])
    dry = "--dry-run" in argv
    cfg = read_config(Config(), [a for a in argv if a != "--dry-run"], "configs/kd_nano.toml")
    if dry:
        return dry_run(cfg)
    if cfg.processes > 1 and "WORLD_SIZE" not in os.environ and pick_device(cfg.device).type == "cpu":
        start_others(cfg.processes)
    train.train(cfg, lambda net: Distill(cfg, net))


if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
