"""The checker: a centre-point detector (Zhou et al. 2019) of 1.95 M parameters that reads objects, colours and places off a picture of a scene. It is
trained on renders alone, never on generated pictures.

    python evaluate.py --train-checker [key=value]      trains it; writes runs/checker/final

B batch | H W = 16 cells of 4 px, at 64 px | N pictures | F features
"""
import signal, time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from checkpoint import load_checkpoint, load_into, save_checkpoint
from common import Log, UserError, setup, use_bfloat16
from data import CATEGORIES, COLOURS, NOUNS, Scene, Scenes, to_tensor
from optim import EMA, Muon

SIZE, CELL = 64, 4                      # its own resolution; larger pictures are reduced to it
NOUN_LIST, COLOUR_LIST = list(NOUNS), list(COLOURS)


# ---------------------------------------------------------------------------- the network
def block(C_in, C_out, stride=1):
    return nn.Sequential(nn.Conv2d(C_in, C_out, 3, stride, 1, bias=False), nn.BatchNorm2d(C_out), nn.SiLU())


class Residual(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.body = nn.Sequential(block(C, C), nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        nn.init.zeros_(self.body[-1].weight)

    def forward(self, x):
        return F.silu(x + self.body(x))


class Checker(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> (B, 94, 16, 16): for each cell the logit of "an object's centre is here", offsets within the cell, log
    size, 80 noun and 10 colour logits; and features (B, 224) for the Frechet distance. 1.8 M parameters."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(block(3, 32), block(32, 48, 2))                      # (B, 48, 32, 32)
        self.high = nn.Sequential(block(48, 96, 2), Residual(96), Residual(96))        # (B, 96, 16, 16)
        self.low = nn.Sequential(block(96, 128, 2), *[Residual(128) for _ in range(3)])  # (B, 128, 8, 8)
        self.join = nn.Sequential(block(96 + 128, 128), Residual(128))                 # (B, 128, 16, 16)
        self.head = nn.Conv2d(128, 4 + len(NOUNS) + len(COLOURS), 1)
        nn.init.constant_(self.head.bias[:1], -4.0)                                    # centres are rare

    def forward(self, x):
        high = self.high(self.stem(x))
        low = self.low(high)
        joined = self.join(torch.cat([high, F.interpolate(low, scale_factor=2.0)], 1))
        return self.head(joined), torch.cat([low.mean((2, 3)), high.mean((2, 3))], 1)


def targets(scenes: list[Scene]):
    """Rows of all objects, each [picture, row, column, dy, dx, log size, noun, colour (-1: its own)], and the centre map (B, 16, 16)."""
    rows, n = [], SIZE // CELL
    heat = torch.zeros(len(scenes), n, n)
    grid_y, grid_x = torch.meshgrid(torch.arange(n) + 0.5, torch.arange(n) + 0.5, indexing="ij")
    for b, s in enumerate(scenes):
        for k, x, y, side in s.objects:
            cy, cx = (y + side / 2) * n, (x + side / 2) * n
            r, c = min(n - 1, int(cy)), min(n - 1, int(cx))
            g = s.groups[k]
            rows.append([b, r, c, cy - r, cx - c, np.log(side), NOUN_LIST.index(g.noun), COLOUR_LIST.index(g.colour) if g.colour else -1])
            heat[b] = torch.maximum(heat[b], torch.exp(-((grid_y - cy) ** 2 + (grid_x - cx) ** 2) / (2 * (side * n / 6) ** 2)))
            heat[b, r, c] = 1.0
    return torch.tensor(rows, dtype=torch.float32), heat


def checker_loss(out, rows, heat):
    logit = out[:, 0].float()
    p, log_p, log_not = logit.sigmoid(), F.logsigmoid(logit), F.logsigmoid(-logit)
    centre = heat == 1                                      # focal, less where a centre is near
    loss = -torch.where(centre, (1 - p) ** 2 * log_p, (1 - heat) ** 4 * p**2 * log_not).sum() / max(1, len(rows))
    b, r, c = rows[:, :3].long().T
    at = out[b, :, r, c].float()                            # (objects, 94)
    colour = rows[:, 7].long()
    return (loss + F.l1_loss(at[:, 1:4], rows[:, 3:6]) + F.cross_entropy(at[:, 4:4 + len(NOUNS)], rows[:, 6].long())
            + (F.cross_entropy(at[:, 4 + len(NOUNS):], colour, ignore_index=-1) if (colour >= 0).any() else 0.0))


@dataclass
class CheckerConfig:
    out: str = "runs/checker"
    steps: int = 5000
    batch: int = 32
    lr: float = 1e-3
    muon_lr: float = 0.02
    ema: float = 0.998
    eval_every: int = 1000
    amp: str = "auto"       # auto, bfloat16 or float32: common.use_bfloat16
    workers: int = 1        # processes that render
    seed: int = 0
    device: str = "auto"


class Renders:
    """Endless batches for the checker as a torch dataset: item k is a batch. Half of the pictures are softened or made noisy, as a decoder's are."""

    def __init__(self, cfg):
        self.cfg, self.scenes = cfg, [Scenes(SIZE, "train", seed=77, layout=layout) for layout in ("slots", "free")]

    def __len__(self):
        return self.cfg.steps

    def __getitem__(self, k):
        rng, scenes, pictures = np.random.default_rng((self.cfg.seed, k)), [], []
        for j in range(self.cfg.batch):
            source = self.scenes[rng.integers(2)]
            s = source.scene(k * self.cfg.batch + j)
            picture = source.render(s).astype(np.float32)
            if rng.random() < 0.5:                          # a little blur by mixing with a reduced copy, then noise
                half = np.asarray(Image.fromarray(picture.astype(np.uint8)).resize((SIZE // 2,) * 2, Image.Resampling.BOX).resize((SIZE,) * 2, Image.Resampling.BILINEAR), np.float32)
                mix = rng.uniform(0, 0.9)
                picture = picture * (1 - mix) + half * mix + rng.normal(0, rng.uniform(0, 6), picture.shape)
            scenes.append(s)
            pictures.append(picture.clip(0, 255).astype(np.uint8))
        return torch.from_numpy(np.stack(pictures)), *targets(scenes)


def train_checker(cfg: CheckerConfig):
    device, _, _ = setup(cfg.device)
    torch.manual_seed(cfg.seed)
    net, out, start = Checker().to(device, memory_format=torch.channels_last), Path(cfg.out), 0
    amp = use_bfloat16(cfg.amp, device)
    opt, ema = Muon(net, cfg.lr, cfg.muon_lr), EMA(net, cfg.ema)
    if (out / "latest").exists():
        saved, state = load_checkpoint(out, ("model", "ema", "optimizer"))
        start = saved["step"]
        load_into(net, state["model"], cfg.out)
        ema.load_state_dict(state["ema"], start)
        opt.load_tensors(state["optimizer"])
    data = Renders(cfg)
    loader = torch.utils.data.DataLoader(data, None, sampler=range(start, cfg.steps), num_workers=cfg.workers, prefetch_factor=8)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    log, step, clock = Log(out / "log.csv", cfg.steps, start), start, time.time()

    def save(path, state, **config):
        save_checkpoint(path, state, {"checker": asdict(cfg), "step": step, **config}, latest="ema" in state)

    for pictures, rows, heat in loader:
        opt.schedule(min((step + 1) / 100, 0.5 * (1 + np.cos(np.pi * step / cfg.steps)) + 1e-3))
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            out_map = net(to_tensor(pictures).to(device, memory_format=torch.channels_last))[0]
        loss = checker_loss(out_map, rows.to(device), heat.to(device))
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
        ema.update()
        step += 1
        if step % 50 == 0:
            log(step, loss=loss.item(), **{"img/s": 50 * cfg.batch / (time.time() - clock)})
            clock = time.time()
        if step % cfg.eval_every == 0 or step == cfg.steps or stop:
            save(out / "checkpoint", {"model": net.state_dict(), "ema": ema.state_dict(), "optimizer": opt.tensors()})
            if stop:
                print(f"stopped by SIGTERM, saved at step {step}: run the same command to go on")
                return
            with ema.swapped():
                print(f"step {step}: ceiling " + " ".join(f"{c} {v:.3f}" for c, v in ceiling(net.eval(), 100).items()), flush=True)
                net.train()
    with ema.swapped():
        net.eval()
        save(out / "final", {"model": {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}})
    print(f"{out}/final: copy it to assets/checker to ship it")


def load_checker(path="assets/checker", device="cpu") -> Checker:
    config, state = load_checkpoint(path)
    if "checker" not in config:
        raise UserError(f"{path} is no checker: make one with `python evaluate.py --train-checker`")
    return load_into(Checker(), state["model"], str(path)).float().to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------- what it sees
@dataclass
class Seen:
    noun: str
    colour: str
    x: float                # centre, as shares of the picture
    y: float
    score: float


@torch.inference_mode()
def look(net: Checker, pictures, threshold: float = 0.4, batch: int = 128):
    """uint8 pictures (H, W, 3) of any size -> (a list of Seen for each, features (N, F))."""
    device, seen, features = next(net.parameters()).device, [], []
    for i in range(0, len(pictures), batch):
        small = [p if p.shape[0] == p.shape[1] == SIZE else np.asarray(Image.fromarray(p).resize((SIZE, SIZE), Image.Resampling.BOX)) for p in pictures[i:i + batch]]
        out, feature = net(to_tensor(np.stack(small)).to(device))
        heat = out[:, :1].sigmoid()
        peaks = ((heat == F.max_pool2d(heat, 3, 1, 1)) & (heat > threshold))[:, 0].cpu()    # (B, 16, 16)
        out, heat, n = out.cpu(), heat[:, 0].cpu(), SIZE // CELL
        for b in range(len(small)):
            seen.append([Seen(NOUN_LIST[int(out[b, 4:4 + len(NOUNS), r, c].argmax())], COLOUR_LIST[int(out[b, 4 + len(NOUNS):, r, c].argmax())],
                              float(c + out[b, 2, r, c]) / n, float(r + out[b, 1, r, c]) / n, float(heat[b, r, c])) for r, c in peaks[b].nonzero().tolist()])
        features.append(feature.float().cpu())
    return seen, torch.cat(features)


def judge(s: Scene, seen: list[Seen]) -> str:
    """"" where the picture shows what was asked for, else what is wrong. GenEval's rules: at least one of each object; exactly the number where
    one was asked for; the colour where one was named; centres on the right sides."""
    found = []
    for g in s.groups:
        mine = [o for o in seen if o.noun == g.noun]
        if not mine:
            others = [o.noun for o in seen if o.noun not in [h.noun for h in s.groups]]
            return f"{g.noun} became {others[0]}" if others else f"{g.noun} is missing"
        if s.category in ("counting", "mixed") and len(mine) != g.count:
            return f"{g.count} became {len(mine)}"
        if g.colour:
            right = [o for o in mine if o.colour == g.colour]
            if not right:
                return f"{g.colour} became {mine[0].colour}"
            mine = right
        found.append(mine)
    if s.relation:
        axis, sign = {"left of": ("x", -1), "right of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[s.relation]
        a, b = (np.mean([getattr(o, axis) for o in mine]) for mine in found)
        if sign * (a - b) < 0.05:
            return f"not {s.relation}"
    return ""


def ceiling(net, n=200, size=SIZE, nouns=0, layout="slots") -> dict:
    """Share of right verdicts on real held-out renders, by category."""
    scenes, out = Scenes(size, "test", seed=5, nouns=nouns, layout=layout), {}
    for category in CATEGORIES:
        asked = [scenes.scene(i, category) for i in range(n)]
        out[category] = float(np.mean([judge(s, o) == "" for s, o in zip(asked, look(net, [scenes.render(s) for s in asked])[0])]))
    return out
