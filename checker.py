"""The checker: a small detector that reads objects, colours and places off a picture of a scene.
It finds centre points (Zhou et al. 2019, "Objects as Points") and has 1.95 M parameters.

    python checker.py [key=value]       trains it, on renders alone; writes runs/checker/final
    python checker.py init=assets/checker atlas=DIR steps=600       teaches it your sprites too

B batch | n = 16 rows and columns of cells, each 4 px of a picture of 64 px | N pictures
"""
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from checkpoint import Run, load_checkpoint, load_into
from common import (
    UserError,
    at_most_cores,
    autocast,
    friendly,
    layout,
    option,
    read_config,
    setup,
    use_bfloat16,
)
from decoder import to_tensor
from optim import EMA, Learner, Muon, rate
from scenes import COLOURS, NOUNS, SEEN_GAP, Scene, Scenes

SIZE, CELLS = 64, 16            # its own resolution: larger pictures are reduced to it
COLOUR_LIST = list(COLOURS)
NOUN_LOGITS, COLOUR_LOGITS = slice(4, -len(COLOURS)), slice(-len(COLOURS), None)    # of the head

def conv_norm_silu(C_in, C_out, stride=1):
    conv = nn.Conv2d(C_in, C_out, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(C_out), nn.SiLU())

class CheckerBlock(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.body = nn.Sequential(
            conv_norm_silu(C, C), nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        nn.init.zeros_(self.body[-1].weight)

    def forward(self, x):
        return F.silu(x + self.body(x))

class Checker(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] -> a map (B, 94, n, n) and features (B, 224).
    Channels of the map: the logit of "a centre is here"; its offset down and right within the
    cell; log size; 80 noun and 10 colour logits. The features are for the Frechet distance."""
    def __init__(self, nouns=tuple(NOUNS)):
        super().__init__()
        self.nouns = list(nouns)
        self.stem = nn.Sequential(conv_norm_silu(3, 32), conv_norm_silu(32, 48, 2))
        self.high = nn.Sequential(conv_norm_silu(48, 96, 2), CheckerBlock(96), CheckerBlock(96))
        self.low = nn.Sequential(
            conv_norm_silu(96, 128, 2), CheckerBlock(128), CheckerBlock(128), CheckerBlock(128))
        self.join = nn.Sequential(conv_norm_silu(96 + 128, 128), CheckerBlock(128))
        self.head = nn.Conv2d(128, 4 + len(nouns) + len(COLOURS), 1)
        nn.init.constant_(self.head.bias[:1], -4.0)             # centres are rare

    def forward(self, x):
        high = self.high(self.stem(x))                          # (B, 96, n, n)
        low = self.low(high)                                    # (B, 128, n/2, n/2)
        features = torch.cat([low.mean((2, 3)), high.mean((2, 3))], 1)              # (B, 224)
        joined = torch.cat([high, F.interpolate(low, scale_factor=2.0)], 1)         # (B, 224, n, n)
        return self.head(self.join(joined)), features

def load_checker(path="assets/checker", device="cpu") -> Checker:
    """In fp32, frozen."""
    config, state = load_checkpoint(path)
    net = Checker(config.get("things") or NOUNS)
    net = load_into(net, state["model"], f"{path} as a checker (`python checker.py`)")
    return net.float().to(device).eval().requires_grad_(False)

def first_checker(init: str, nouns: list[str]) -> Checker:
    """With the weights of `init`, where there is one; its nouns must be the first of `nouns`."""
    net = Checker(nouns)
    if not init:
        return net
    theirs = load_checker(init)
    known = theirs.nouns
    if known != nouns[:len(known)]:
        raise UserError(f"init={init} knows other things than the {len(nouns)} scenes have")
    state = theirs.state_dict()
    for key in "head.weight", "head.bias":
        own = net.state_dict()[key]
        own[:4 + len(known)] = state[key][:4 + len(known)]
        own[COLOUR_LOGITS] = state[key][COLOUR_LOGITS]
        state[key] = own
    net.load_state_dict(state)
    return net

@dataclass
class CheckerConfig:
    out: str = "runs/checker"
    init: str = ""                              # a checker to start from
    atlas: str = ""                             # a folder of sprites that are added
    steps: int = option(5000, low=1)
    batch: int = option(32, low=1, high=65536)
    lr: float = option(1e-3, above=0)
    muon_lr: float = option(0.02, low=0)
    warmup: int = option(100, low=1)
    clip: float = option(1000.0, above=0)       # 100 is usual at the start
    ema: float = option(0.998, low=0, high=0.999999)
    log_every: int = option(50, low=1)
    eval_every: int = option(1000, low=1)
    amp: str = option("auto", choices=("auto", "bfloat16", "float32"))
    workers: int = option(1, low=0)             # processes that render
    seed: int = option(0, low=0, high=2**64 - 1)
    device: str = "auto"

def render_batch(cfg: CheckerConfig, sources: list[Scenes], k: int):
    """Batch k of the run: pictures (B, 64, 64, 3), and what targets() gives for them."""
    rng = np.random.default_rng((cfg.seed, k))
    scenes, pictures = [], []
    for j in range(cfg.batch):
        source = sources[rng.integers(2)]
        scenes.append(source.scene(k * cfg.batch + j))
        picture = source.render(scenes[-1])
        pictures.append(soften(picture, rng) if rng.random() < 0.5 else picture)
    return torch.from_numpy(np.stack(pictures)), *targets(scenes, source.nouns)

def soften(picture, rng):
    """Blur and noise as a decoder leaves them: a mix with a reduced copy, then noise."""
    small = Image.fromarray(picture).resize((SIZE // 2,) * 2, Image.Resampling.BOX)
    blurred = np.asarray(small.resize((SIZE,) * 2, Image.Resampling.BILINEAR), np.float32)
    mix = rng.uniform(0, 0.9)
    mixed = picture.astype(np.float32) * (1 - mix) + blurred * mix
    noise = rng.normal(0, rng.uniform(0, 6), picture.shape)
    return (mixed + noise).clip(0, 255).astype(np.uint8)

def targets(scenes: list[Scene], nouns: list[str]):
    """The objects of scenes as a table, and the map of their centres (B, n, n).
    A row is [picture, row, column, dy, dx, log size, noun, colour (-1: the sprite's own)]."""
    table = []
    heat = torch.zeros(len(scenes), CELLS, CELLS)
    middle = torch.arange(CELLS) + 0.5
    for b, scene in enumerate(scenes):
        for index, x, y, side in scene.objects:
            cy, cx = (y + side / 2) * CELLS, (x + side / 2) * CELLS
            row, column = min(CELLS - 1, int(cy)), min(CELLS - 1, int(cx))
            group = scene.groups[index]
            colour = COLOUR_LIST.index(group.colour) if group.colour else -1
            noun = nouns.index(group.noun)
            table.append([b, row, column, cy - row, cx - column, np.log(side), noun, colour])
            distance = (middle[:, None] - cy) ** 2 + (middle[None] - cx) ** 2       # (n, n)
            bump = torch.exp(-distance / (2 * (side * CELLS / 6) ** 2))
            heat[b] = torch.maximum(heat[b], bump)
            heat[b, row, column] = 1.0
    return torch.tensor(table, dtype=torch.float32), heat

def checker_loss(out, table, heat):
    """Focal loss of the centres, L1 of offsets and sizes, cross entropy of nouns and colours."""
    logit = out[:, 0].float()
    p = logit.sigmoid()
    at_centre = (1 - p) ** 2 * F.logsigmoid(logit)
    elsewhere = (1 - heat) ** 4 * p**2 * F.logsigmoid(-logit)       # less where a centre is near
    focal = -torch.where(heat == 1, at_centre, elsewhere).sum() / len(table)
    b, row, column, noun, colour = table[:, [0, 1, 2, 6, 7]].long().T
    found = out[b, :, row, column].float()                          # (objects, 94)
    loss = focal + F.l1_loss(found[:, 1:4], table[:, 3:6])
    loss = loss + F.cross_entropy(found[:, NOUN_LOGITS], noun)
    if (colour >= 0).any():
        loss = loss + F.cross_entropy(found[:, COLOUR_LOGITS], colour, ignore_index=-1)
    return loss

def train_checker(cfg: CheckerConfig):
    device, _, world = setup(cfg.device)
    if world > 1:
        raise UserError("the checker is trained by one process: start it without torchrun")
    torch.manual_seed(cfg.seed)
    sources = [Scenes(SIZE, "train", 77, layout=name, atlas=cfg.atlas, old=0.5)
               for name in ("slots", "free")]
    net = first_checker(cfg.init, sources[0].nouns)
    net = net.to(device, memory_format=layout(device))
    opt, ema = Muon(net, cfg.lr, cfg.muon_lr), EMA(net, cfg.ema)
    learner = Learner(net, opt, cfg.clip, ema)
    run = Run(cfg, device, describe={"things": net.nouns}, model=net, ema=ema, optimizer=opt)
    amp = use_bfloat16(cfg.amp, device)
    test = Scenes(SIZE, "test", 5, atlas=cfg.atlas, old=0.5)
    batches = torch.utils.data.DataLoader(
        range(run.step, cfg.steps), None, collate_fn=partial(render_batch, cfg, sources),
        num_workers=at_most_cores(cfg.workers))

    for step, (pictures, table, heat) in zip(run.steps(), batches):
        opt.schedule(rate(cfg, step))
        x = to_tensor(pictures).to(device, memory_format=layout(device))
        with autocast(device, amp):
            out, _ = net(x)
        loss = checker_loss(out, table.to(device), heat.to(device))
        loss.backward()
        norm = learner.step()
        run.log(pictures=len(x), learners=[learner], loss=loss, grad=norm)
        if run.due():
            run.save()
            with ema.swapped():
                shares, _ = ceiling(net.eval(), test, 100)
            net.train()
            print(f"step {run.step}: right verdicts on held-out renders: {shares}", flush=True)
            run.restart_clock()
    run.finish({**net.state_dict(), **ema.state_dict()})            # buffers are not averaged

@dataclass
class Seen:
    noun: str
    colour: str
    x: float                # the centre, as shares of the picture
    y: float

@torch.inference_mode()
def look(net: Checker, pictures, batch: int = 128):
    """uint8 pictures (H, W, 3) of any size -> (a list of Seen for each, features (N, 224))."""
    device = next(net.parameters()).device
    seen, features = [], []
    for i in range(0, len(pictures), batch):
        images = [Image.fromarray(p) for p in pictures[i:i + batch]]
        small = [np.asarray(im.resize((SIZE, SIZE), Image.Resampling.BOX)) for im in images]
        out, feature = net(to_tensor(np.stack(small)).to(device))
        features.append(feature.float().cpu())
        out = out.cpu()                                                     # (B, 94, n, n)
        heat = out[:, 0].sigmoid()
        peaks = (heat == F.max_pool2d(heat, 3, 1, 1)) & (heat > 0.4)        # (B, n, n)
        seen += [[] for _ in images]
        for b, row, column in peaks.nonzero().tolist():
            values = out[b, :, row, column]                                 # (94,)
            noun = net.nouns[int(values[NOUN_LOGITS].argmax())]
            colour = COLOUR_LIST[int(values[COLOUR_LOGITS].argmax())]
            y, x = float(row + values[1]) / CELLS, float(column + values[2]) / CELLS
            seen[i + b].append(Seen(noun, colour, x, y))
    return seen, torch.cat(features)

def judge(scene: Scene, seen: list[Seen], exact: bool = False) -> str:
    """What is wrong with a picture of this scene, "" where nothing is, by GenEval's rules.
    Those let further objects pass, and further ones of the asked kind where no number is named.
    exact: the picture has what is asked for and nothing else."""
    asked = [group.noun for group in scene.groups]
    found = []
    strangers = [o.noun for o in seen if o.noun not in asked]
    if exact and strangers:
        return f"{strangers[0]} was not asked for"
    for group in scene.groups:
        mine = [o for o in seen if o.noun == group.noun]
        if not mine:                    # at least one of each object
            return f"{group.noun} became {strangers[0]}" if strangers else f"no {group.noun}"
        counted = exact or scene.category in ("counting", "mixed")
        if counted and len(mine) != group.count:
            return f"{group.count} became {len(mine)}"
        right = [o for o in mine if o.colour == group.colour or not group.colour]
        if not right or (exact and len(right) < len(mine)):
            wrong = next(o for o in mine if o not in right)
            return f"{group.colour} became {wrong.colour}"
        found.append(right)
    if scene.relation:
        horizontal = scene.relation in ("left of", "right of")
        a, b = [np.mean([o.x if horizontal else o.y for o in mine]) for mine in found]
        gap = b - a if scene.relation in ("left of", "above") else a - b
        if gap < SEEN_GAP:              # centres on the right sides of each other
            return f"not {scene.relation}"
    return ""

def ceiling(net, source: Scenes, n: int = 200) -> tuple[dict, dict]:
    """Shares of right and of exact verdicts on n real renders of each category."""
    right, exact = {}, {}
    for category in source.categories:
        scenes = [source.scene(i, category) for i in range(n)]
        seen, _ = look(net, [source.render(scene) for scene in scenes])
        right[category] = sum(judge(*pair) == "" for pair in zip(scenes, seen)) / n
        exact[category] = sum(judge(*pair, exact=True) == "" for pair in zip(scenes, seen)) / n
    return right, exact

if __name__ == "__main__":
    with friendly():
        train_checker(read_config(CheckerConfig(), sys.argv[1:]))
