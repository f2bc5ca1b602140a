"""The small text encoder: taught on captions alone, probed, or matched to a trained network.

    python train_text.py [key=value ...]                    teaches it; writes runs/text/final
    python train_text.py --probe CKPT [key=value ...]       what a trained network's encoder knows
    python train_text.py --match CKPT [key=value ...]       a new encoder for a trained network

A denoiser's gradient hardly tells which word belongs to which: the side of a dog depends on the
order of words and on the relation at once. SnapGen's encoders are pre-trained; teaching stands in
for that. At the last token of each noun linear heads tell its side, colour, count and the noun, at
<end> the background. `text.init` starts a training from it. The same command again resumes.

B captions | L tokens | D width | N nouns in them | G key/value heads | Q queries | d their width
"""
import bisect
import contextlib
import functools
import itertools
import random
import re
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import Run, load_into, read_description, resolve
from common import UserError, attention, friendly, option, read_config, setup
from data import DataConfig, FlowConfig, scenes_of, seeded
from decoder import load_autoencoder, to_tensor
from model import TextToLatents, TransformerBlock, UNet, load_model
from optim import Learner, Muon, rate
from pictures import Prepared, Unusable, caption_of, find_pictures
from scenes import COLOURS, INVERSE, NOUNS, NUMBERS, PLACES, RELATIONS, Scene, Scenes
from text import Text, TextConfig, TextEncoder, Tokens, Vocabulary, join_texts, load_vocabulary
from train import TrainConfig, draw_times, first_network
from wording import names, training_caption, wide

@dataclass
class TeachConfig:
    out: str = "runs/text"
    text: TextConfig = field(default_factory=TextConfig)
    nouns: int = option(0, low=0)           # the first so many, 0 = all
    steps: int = option(800, low=1)
    batch: int = option(96, low=1, high=65536)          # captions
    lr: float = option(6e-3, above=0)
    muon_lr: float = option(0.01, low=0)    # at 0.03 colours and sides are not learned (LOG.md)
    warmup: int = option(50, low=1)
    held_out: int = option(2000, low=1, high=10**6)     # captions
    log_every: int = option(50, low=1)
    eval_every: int = option(100, low=1)
    seed: int = option(0, low=0, high=2**64 - 1)
    device: str = "auto"

    def check(self):
        if self.text.kind != "own":
            raise UserError(f"text.kind={self.text.kind} is pre-trained: leave it at own")

def one_process(cfg: TeachConfig) -> torch.device:
    device, _, world = setup(cfg.device)
    if world > 1:
        raise UserError("a text encoder is trained by one process: start it without torchrun")
    torch.manual_seed(cfg.seed)
    return device

def learn(cfg: TeachConfig, vocabulary: Vocabulary, parts: dict[str, nn.Module], loss_of,
          measure) -> tuple[Run, dict[str, float]]:
    """The loop of teaching and of matching. parts: what is trained, as a checkpoint calls it;
    loss_of(step) -> (); measure() -> {name: value} on held-out captions."""
    module = nn.ModuleDict(parts)
    opt = Muon(module, cfg.lr, cfg.muon_lr)
    learner = Learner(module, opt, clip=10.0)
    files = {"captions.tiktoken": vocabulary.data}
    run = Run(cfg, opt.count.device, files=files, **parts, optimizer=opt)
    values = {}

    def report():
        values.update(measure())
        run.row(**values)
        print(f"step {run.step}, held-out captions: {listed(values)}", flush=True)
    if run.lacks("side", "unexplained_wide", "unexplained_captions"):
        report()
    for step in run.steps():
        opt.schedule(rate(cfg, step))
        loss = loss_of(step)
        loss.backward()
        norm = learner.step()
        run.log(learners=[learner], loss=loss, lr=cfg.lr * rate(cfg, step), grad=norm)
        if run.due():
            run.save()
            report()
    if run.step == cfg.steps and not values:        # it was finished before
        values = measure()
    return run, values

def listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())

# ---------------------------------------------------------------------------- what is true
FACETS = {      # what each head tells apart
    "side": ["", *RELATIONS], "colour": ["", *COLOURS], "count": list(NUMBERS),
    "noun": list(NOUNS), "background": ["", *COLOURS, *PLACES],
}

def facts_of(scene: Scene, k: int) -> list[int]:
    """Side, colour, count and noun of group k, as numbers of FACETS."""
    group, side = scene.groups[k], ""
    if len(scene.groups) == 2:
        side = (scene.relation, INVERSE.get(scene.relation, ""))[k]
    values = side, group.colour, group.count, group.noun
    return [known.index(value) for known, value in zip(FACETS.values(), values)]

@functools.lru_cache
def noun_pattern() -> re.Pattern:
    """Finds every spelling of every noun, the longest first: an ice cream cone is no ice cream."""
    spellings = {word for noun in NOUNS for many in (False, True) for word in names(noun, many)}
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b")

def noun_ends(scene: Scene, ids: list[int], vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """(group, token that its noun ends with), of a caption's tokens without <end>.
    A noun that a typing error hides, or that seems to be there twice, is left out."""
    caption, starts = vocabulary.encoding.decode_with_offsets(ids)
    ends = []
    for k, group in enumerate(scene.groups):
        spellings = names(group.noun, group.count > 1)
        at = [m.end() for m in noun_pattern().finditer(caption) if m[0] in spellings]
        if len(at) == 1:
            ends.append((k, bisect.bisect_left(starts, at[0]) - 1))
    return ends

class Lesson(NamedTuple):
    tokens: Tokens                  # shorter captions first
    nouns: torch.Tensor             # (N, 2): the caption, the token that the noun ends with
    facts: torch.Tensor             # (N, 4): facts_of() each
    background: torch.Tensor        # (B,)
    lost: int                       # nouns that were not found

    def to(self, device) -> "Lesson":
        moved = [x.to(device) for x in (*self.tokens, *self[1:4])]
        return Lesson(Tokens(*moved[:2]), *moved[2:], self.lost)

class Lessons:
    """lessons[k]: captions of `batch` scenes; held-out ones (split test) in wide wordings."""
    def __init__(self, cfg: TeachConfig, split: str, vocabulary: Vocabulary):
        self.cfg, self.split, self.vocabulary = cfg, split, vocabulary
        self.scenes = Scenes(split=split, seed=cfg.seed, nouns=cfg.nouns)

    def __getitem__(self, number: int) -> Lesson:
        cfg, rng = self.cfg, random.Random(f"{self.cfg.seed}/{self.split}/{number}")
        wording = training_caption if self.split == "train" else wide
        numbers = range(number * cfg.batch, (number + 1) * cfg.batch)
        pairs = [(wording(scene, rng), scene) for scene in map(self.scenes.scene, numbers)]
        captions, scenes = zip(*sorted(pairs, key=lambda pair: len(pair[0])))
        tokens = self.vocabulary.tokenize(captions, cfg.text.max_tokens, cut=True)
        nouns, facts = [], []
        for b, scene in enumerate(scenes):
            ids = tokens.ids[b, :tokens.mask[b].sum() - 1].tolist()
            for k, at in noun_ends(scene, ids, self.vocabulary):
                nouns.append([b, at])
                facts.append(facts_of(scene, k))
        behind = [FACETS["background"].index(scene.background) for scene in scenes]
        lost = sum(len(scene.groups) for scene in scenes) - len(nouns)
        return Lesson(tokens, torch.tensor(nouns), torch.tensor(facts), torch.tensor(behind), lost)

def held_out_lessons(cfg: TeachConfig, vocabulary: Vocabulary, device) -> list[Lesson]:
    """At least cfg.held_out captions; says how many of their nouns cannot be asked for."""
    source = Lessons(cfg, "test", vocabulary)
    lessons = [source[k].to(device) for k in range(-(-cfg.held_out // cfg.batch))]
    lost = sum(lesson.lost for lesson in lessons)
    nouns = lost + sum(len(lesson.nouns) for lesson in lessons)
    print(f"{nouns} held-out nouns, {100 * lost / nouns:.1f} % misspelled and left out", flush=True)
    return lessons

# ---------------------------------------------------------------------------- teaching, probing
class FacetHeads(nn.ModuleDict):
    """A linear head for each facet, on the states that an encoder gives."""
    def __init__(self, D: int):
        super().__init__({name: nn.Linear(D, len(known)) for name, known in FACETS.items()})

    def forward(self, text: TextEncoder, lesson: Lesson):
        """(loss (), {facet: which answers are right})."""
        parts = []
        for ids, mask in zip(*(x.chunk(3) for x in lesson.tokens)):         # saves padding
            L = int(mask.sum(1).max())
            parts.append(text(Tokens(ids[:, :L], mask[:, :L])))
        emb, mask, _ = join_texts(parts)                                    # (B, L, D)
        b, at = lesson.nouns.T
        ends = emb[torch.arange(len(emb)), mask.sum(1) - 1]                 # (B, D)
        loss, right = 0.0, {}
        for name, wanted in zip(FACETS, [*lesson.facts.T, lesson.background]):
            logits = self[name](ends if name == "background" else emb[b, at])       # (N or B, ..)
            loss = loss + F.cross_entropy(logits, wanted)
            right[name] = logits.argmax(1) == wanted
        return loss, right

@torch.no_grad()
def accuracies(text: TextEncoder, heads: FacetHeads, lessons: list[Lesson]) -> dict[str, float]:
    right = [heads(text, lesson)[1] for lesson in lessons]
    return {name: torch.cat([r[name] for r in right]).float().mean().item() for name in FACETS}

def teach(cfg: TeachConfig):
    """Captions alone -> the small text encoder."""
    device = one_process(cfg)
    if cfg.text.init:
        raise UserError("text.init is for what starts from a taught encoder: leave it out here")
    vocabulary = load_vocabulary(pattern=cfg.text.pattern)
    text, heads = TextEncoder(cfg.text), FacetHeads(cfg.text.width)
    # words bind by their order: with positions as large as tokens it is learned sooner
    nn.init.normal_(text.position.weight, std=0.5)
    parts = {"model": text.to(device), "heads": heads.to(device)}
    lessons, held_out = Lessons(cfg, "train", vocabulary), held_out_lessons(cfg, vocabulary, device)

    def loss_of(step):
        return heads(text, lessons[step].to(device))[0]

    measure = functools.partial(accuracies, text, heads, held_out)
    run, known = learn(cfg, vocabulary, parts, loss_of, measure)
    if run.finish(text.state_dict(), {"accuracies": known}):
        print(f"done: {run.out}/final; a training starts from it with text.init={run.out}/final")

def probe(ckpt: str, cfg: TeachConfig) -> dict[str, float]:
    """What the text encoder of a trained network knows: only the heads are fitted to its states."""
    device = one_process(cfg)
    net, config = load_model(ckpt, device)
    if net.text is None:
        raise UserError(f"{ckpt} reads published text encoders: --probe is for the small one")
    cfg.text, cfg.nouns = net.text_cfg, config["data"]["nouns"]
    heads = FacetHeads(cfg.text.width).to(device)
    learner = Learner(heads, Muon(heads, cfg.lr), clip=10.0)
    held_out = held_out_lessons(cfg, net.vocabulary, device)
    lessons = Lessons(cfg, "train", net.vocabulary)
    for step in range(cfg.steps):
        learner.opt.schedule(rate(cfg, step))
        heads(net.text, lessons[step].to(device))[0].backward()
        learner.step()
    known = accuracies(net.text, heads, held_out)
    print(f"{ckpt} knows of held-out captions: {listed(known)}")
    return known

# ---------------------------------------------------------------------------- matching
@dataclass
class MatchConfig(TeachConfig):
    """A new text encoder (`text`) for the UNet of a checkpoint, which may have read any: the small
    one with any vocabulary, or published ones. Where text.width is not the UNet's context_dim, a
    projection is learned too, and in the end multiplied into the UNet's keys and values."""
    out: str = "runs/match"
    ckpt: str = ""                          # what --match names
    data: DataConfig = field(default_factory=DataConfig)    # the checkpoint's; folder: yours
    ae: str = "assets/ae"
    steps: int = option(5500, low=1)
    eval_every: int = option(500, low=1)
    lr: float = option(4e-3, above=0)
    muon_lr: float = option(0.03, low=0)
    bank: int = option(256, low=1, high=10**6)          # pictures on which queries are asked

class Pairs:
    """pairs[k]: captions for the old encoder, captions for the new one; some are empty."""
    def __getitem__(self, k: int):
        rng = random.Random(f"{self.cfg.seed}/{k}")
        drop = [rng.random() < 0.05 for _ in range(self.cfg.batch)]     # guidance reads it
        return tuple(zip(*(("", "") if d else self.draw(rng) for d in drop)))

def plain(scene: Scene) -> str:
    """A fixed wording in the grammar that all networks of scenes were trained with."""
    return Scenes.caption(scene, random.Random(220))        # a seed of plain words

class ScenePairs(Pairs):
    """Scenes: plain for the old encoder, in any wording for the new one."""
    def __init__(self, cfg: MatchConfig):
        self.cfg, self.train, self.test = cfg, scenes_of(cfg.data), scenes_of(cfg.data, "test")

    def draw(self, rng: random.Random) -> tuple[str, str]:
        scene = self.train.scene(rng.randrange(2**31))
        return plain(scene), training_caption(scene, rng)

    def held_out(self) -> dict[str, list]:
        scenes = list(map(self.test.scene, range(self.cfg.held_out)))
        return {kind: [(plain(s), wording(s, random.Random(i))) for i, s in enumerate(scenes)]
                for kind, wording in (("wide", wide), ("grammar", Scenes.caption))}

    def pictures(self):
        for scene in map(self.train.scene, range(self.cfg.bank)):
            yield self.train.render(scene), plain(scene)

class OwnPairs(Pairs):
    """Your own pictures: both encoders read the same caption."""
    def __init__(self, cfg: MatchConfig):
        self.cfg, self.prepared = cfg, Prepared(find_pictures(cfg.data.folder), cfg.data)
        captions = []
        for item in self.prepared.items:
            with contextlib.suppress(Unusable, OSError):
                captions.append(caption_of(item))
        random.Random(0).shuffle(captions)
        kept = max(1, int(len(captions) * cfg.data.held_out))
        self.kept, self.captions = captions[:kept], captions[kept:]
        if not self.captions:
            raise UserError(f"{cfg.data.folder} has {len(captions)} captions: too few to match")

    def draw(self, rng: random.Random) -> tuple[str, str]:
        return (rng.choice(self.captions),) * 2

    def held_out(self) -> dict[str, list]:
        return {"captions": [(c, c) for c in self.kept[:self.cfg.held_out]]}

    def pictures(self):
        usable = (pair for pair in self.prepared if pair[0] is not None)
        return itertools.islice(usable, self.cfg.bank)

class Reader:
    """What the cross-attentions of a trained UNet read of text: softmax(q k) v, for a bank of the
    queries that they ask at some cells of noisy pictures, at random times."""
    @torch.no_grad()
    def __init__(self, cfg: MatchConfig, net: TextToLatents, flow: FlowConfig, source: Pairs):
        device, g, ae = net.device, seeded(cfg.seed), load_autoencoder(cfg.ae, net.device)
        found = [m.cross_attn for m in net.denoiser.modules() if isinstance(m, TransformerBlock)]
        bank = {block: [] for block in found}                   # (G, Q, d) of each picture

        def keep(block, given):
            q = block.q_norm(block.q(given[0][0]).unflatten(-1, (-1, block.D)))     # (HW, heads, d)
            cells = torch.randint(len(q), (32,), generator=g).to(device)
            bank[block].append(q[cells].unflatten(1, (block.G, -1)).transpose(0, 1).flatten(1, 2))

        hooks = [block.register_forward_pre_hook(keep) for block in found]
        for picture, caption in source.pictures():
            x0 = ae.encode(to_tensor(picture[None]).to(device))                     # (1, C, h, w)
            t, eps = draw_times(flow, 1, g, "cpu").to(device), torch.randn(x0.shape, generator=g)
            net((1 - t) * x0 + t * eps.to(device), t, net.encode([caption], cut=True))
        for hook in hooks:
            hook.remove()
        self.bank = {block: torch.stack(queries) for block, queries in bank.items()}
        # the variance over captions, at the queries of one picture
        text = net.encode([source.draw(random.Random(i))[0] for i in range(128)], cut=True)
        spread = [[x.var(0).mean() for x in self.read(text, [i] * 128)] for i in range(8)]
        self.variance = torch.tensor(spread).mean(0).to(device)                     # (blocks,)

    def read(self, text: Text, pick) -> list[torch.Tensor]:
        """(B, G, Q, d) of each block, asked by pictures: numbers `pick` (B,), modulo the bank."""
        out, pick = [], torch.as_tensor(pick)
        for block, queries in self.bank.items():
            k, v = (x.transpose(1, 2) for x in block.keys_values(text.emb))         # (B, G, L, d)
            q = queries[pick % len(queries)]                                        # (B, G, Q, d)
            out.append(attention(q, k, v, text.mask[:, None, None]))
        return out

def match_encoder(cfg: MatchConfig):
    """A new text encoder for the network cfg.ckpt, by what its cross-attentions read."""
    device = one_process(cfg)
    old, config = load_model(cfg.ckpt, device)
    if not isinstance(old.denoiser, UNet):
        raise UserError(f"{cfg.ckpt} is an MMDiT, without cross-attentions: --match wants a UNet")
    unet, width = old.denoiser.cfg, cfg.text.width
    net = first_network(TrainConfig(model=replace(unet, context_dim=width), text=cfg.text))
    same = width == unet.context_dim
    project = nn.Identity() if same else nn.Linear(width, unet.context_dim, bias=False)
    parts = {"model": net.text.to(device), "project": project.to(device)}
    source = OwnPairs(cfg) if cfg.data.folder else ScenePairs(cfg)
    reader = Reader(cfg, old, FlowConfig(**config["flow"]), source)

    def unexplained(before, after, pick):
        """The share () of the variance of what is read that the new encoder does not explain."""
        with torch.no_grad():
            wanted = reader.read(old.encode(before, cut=True), pick)
        text = net.encode(after, cut=True)
        got = reader.read(text._replace(emb=project(text.emb)), pick)
        errors = torch.stack([F.mse_loss(a, b) for a, b in zip(got, wanted)])       # (blocks,)
        return (errors / reader.variance).mean()

    def loss_of(step):
        g = seeded(cfg.seed * 1000003 + step)
        return unexplained(*source[step], torch.randint(2**31, (cfg.batch,), generator=g))

    @torch.no_grad()
    def measure():
        shares = {}
        for kind, pairs in source.held_out().items():
            parts = [pairs[i:i + cfg.batch] for i in range(0, len(pairs), cfg.batch)]
            losses = [len(p) * unexplained(*zip(*p), range(len(p))).item() for p in parts]
            shares[f"unexplained_{kind}"] = sum(losses) / len(pairs)
        return shares

    run, shares = learn(cfg, net.vocabulary, parts, loss_of, measure)
    state = old.denoiser.state_dict()
    for name in [] if same else [k for k in state if k.endswith("cross_attn.kv.weight")]:
        state[name] = state[name] @ project.weight
    load_into(net.denoiser, state, cfg.ckpt)
    about = {"model": asdict(net.denoiser.cfg), "text": asdict(net.text_cfg), **shares}
    if run.finish(net.state_dict(), {**config, **about}):
        print(f"done: {run.out}/final, which `python sample.py --ckpt {run.out}/final` draws with")

def main(argv):
    match argv:
        case ["--probe", ckpt, *rest]:
            probe(ckpt, read_config(TeachConfig(steps=600, lr=0.01), rest))
        case ["--match", ckpt, *rest]:
            theirs, known = read_description(resolve(ckpt)).get("data", {}), vars(DataConfig())
            data = DataConfig(**{k: v for k, v in theirs.items() if k in known})
            match_encoder(read_config(MatchConfig(ckpt=ckpt, data=data), rest))
        case _:
            teach(read_config(TeachConfig(), argv))

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
