"""What training reads: latents of scenes and their captions on disk, and batches of them.

    python data.py --show out.png           a sheet of scenes with their captions
    python data.py --export DIR 200 [192]   scenes as a folder of your own pictures, ten spoilt
    python data.py --speed                  scenes/s, drawn and worded, on one core and on all
    python data.py --build-atlas DIR        packs the sprites of an unpacked
                                            `npm pack @lobehub/fluent-emoji-3d@1.1.0` (MIT)

Scenes are drawn by scenes.py; your own pictures are read by pictures.py and cache.py.
B batch | C latent channels | L tokens | H W pixels.
"""
import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from checkpoint import write_whole
from common import ROOT, UserError, fill, friendly, option, patiently
from decoder import encode_pictures
from plots import grid
from processes import BATCH, in_processes
from scenes import ATLAS, ATLAS_CELL, ATLAS_COLUMNS, NOUNS, Scenes, atlas_cell, square
from text import Text, Tokens, Vocabulary, load_vocabulary
from wording import training_caption

@dataclass
class DataConfig:
    size: int = option(64, low=8, high=8192)           # pixels
    nouns: int = option(12, low=0)          # the first so many, 0 = all
    layout: str = option("slots", choices=("slots", "free"))
    pictures: int = option(20000, low=1, high=10**8)    # scenes, drawn once and kept as latents
    seed: int = option(0, low=0, high=2**64 - 1)
    atlas: str = ""             # a folder of your own sprites, named by noun
    old: float = option(0.0, low=0, high=1)     # share of scenes of shipped nouns alone, beside
                                # which the atlas's are learned; 0: the atlas's are the only ones
    workers: int = option(2, low=0)         # processes that draw and word scenes, or read pictures
    cache: str = "runs/cache"   # directory
    # your own pictures (pictures.py): their area is about size x size
    folder: str = ""            # of pictures with captions, or of tars; empty: scenes
    bucket_step: int = option(64, low=8, high=8192)    # heights and widths are multiples of it
    max_ratio: float = option(2.0, low=1)   # of a bucket's sides; longer pictures are cropped
    max_upscale: float = option(1.0, above=0)   # pictures that must grow more are skipped
    held_out: float = option(0.02, low=0, high=1)   # share for validation, by a hash of the name
    shard: int = option(256, low=1, high=10**6)         # pictures in a file of the cache

    def check(self):
        step = self.bucket_step if self.folder else 8
        if self.size % step or step % 8:
            raise UserError(f"data.size={self.size} must be a multiple of {step} pixels, and "
                            "data.bucket_step one of 8")

@dataclass
class FlowConfig:
    mean: float = option(0.0, low=-20, high=20)     # t = sigmoid(mean + std n), n normal:
    std: float = option(1.0, above=0, high=20)      # logit-normal
    shift: float = option(1.0, above=0, high=1000)  # t' = s t / (1 + (s - 1) t); 3 at 1024 px

@dataclass
class FewSteps:
    """How a checkpoint of a few steps wants to be sampled."""
    steps: int = option(4, low=1, high=1000)
    sampler: str = option("euler", choices=("euler", "heun", "dpmpp", "renoise"))
    cfg: float = option(1.0, low=0)
    shift: float = option(1.0, above=0, high=1000)

def check_tables(config: dict, where):
    """UserError where what config.json says of pictures and sampling is not allowed. What it does
    not say becomes the default; keys of other versions stay."""
    for key, schema in (("data", DataConfig()), ("flow", FlowConfig()), ("few_steps", FewSteps())):
        table = known = config.get(key) or {}
        if isinstance(table, dict):
            known = {k: v for k, v in table.items() if hasattr(schema, k)}
        fill(schema, known, str(where), f"{key}.")
        if key != "few_steps":
            config[key] = {**vars(schema), **table}

class Batch(NamedTuple):
    x0: torch.Tensor                    # (B, C, H/8, W/8) latents
    text: Tokens | Text                 # what the network reads; pooled only for an MMDiT
    teacher_text: Text | None = None    # states of an SD3 teacher's encoders, where it has its own

    def to(self, device) -> "Batch":
        """On the device; latents and our network's text states in fp32, made of fp16 there."""
        text, theirs = (some and type(some)(*(None if x is None else sent(x, device) for x in some))
                        for some in (self.text, self.teacher_text))
        if isinstance(text, Text):
            pooled = None if text.pooled is None else text.pooled.float()
            text = Text(text.emb.float(), text.mask, pooled)
        return Batch(sent(self.x0, device).float(), text, theirs)

def sent(x: torch.Tensor, device) -> torch.Tensor:
    """A tensor on its way to the device: to a GPU from pinned memory, so that nothing waits."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)

class Batches:
    """Batch number k of the whole run, a function of the seed and k.
    Rank r of w takes k = (step * accumulate + micro) * w + r. Scenes come in a new order each
    epoch, each in one of its wordings, the share drop_caption with the empty caption.
    cfg: a TrainConfig; latents: those of scenes, or a cache.CachedPictures, which makes batches.
    Nothing here waits for a GPU."""
    def __init__(self, cfg, latents, device, vocabulary: Vocabulary):
        if len(latents) < cfg.batch:
            raise UserError(f"{len(latents)} pictures to train on (some are held out), less than "
                            f"batch={cfg.batch}: add batch={max(1, len(latents) // 4)}")
        self.cfg, self.latents, self.device = cfg, latents, torch.device(device)
        self.vocabulary = vocabulary
        if cfg.data.folder:
            self.ahead, self.reader = {}, ThreadPoolExecutor(1)
            self.world = dist.get_world_size() if dist.is_initialized() else 1
            self.stream = torch.cuda.Stream(device) if self.device.type == "cuda" else None
            return
        # 2 kB each at 64 px: latents and words fit on the device
        words = wordings(cfg, len(latents), vocabulary)
        self.ids, self.lengths = words["ids"].to(device), words["lengths"].to(device)
        self.latents = latents.to(device)
        empty = [vocabulary.end] + [vocabulary.pad] * (self.ids.shape[2] - 1)
        self.empty = torch.tensor(empty, device=device)                     # the empty caption

    def __call__(self, k: int) -> Batch:
        if self.cfg.data.folder:
            return self.read_ahead(k)
        cfg, device = self.cfg, self.device
        epoch, turn = divmod(k, len(self.latents) // cfg.batch)
        order = epoch_order(len(self.latents), cfg.seed, epoch)
        index = order[turn * cfg.batch:(turn + 1) * cfg.batch]              # (B,)
        g = seeded(2**40 + cfg.seed * 1000003 + k)                          # not the noise's
        which = torch.randint(WORDINGS, (cfg.batch,), generator=g)
        drop = torch.rand(cfg.batch, generator=g) < cfg.drop_caption
        index, which, drop = sent(torch.stack([index, which, drop]), device)
        drop = drop.bool()
        ids = torch.where(drop[:, None], self.empty, self.ids[index, which].long())     # (B, L)
        lengths = self.lengths[index, which].long().masked_fill(drop, 1)    # (B,)
        if device.type == "cpu" and not cfg.compile:    # else always the same shape
            ids = ids[:, :lengths.numpy().max()]
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        return Batch(self.latents[index].float(), Tokens(ids, mask))

    def read_ahead(self, k: int) -> Batch:
        """Batch k of a cache; a thread reads and sends the one that this process needs next."""
        batch = self.ahead.pop(k, None) or self.reader.submit(self.read, k)
        self.ahead = {k + self.world: self.reader.submit(self.read, k + self.world)}
        batch, arrived = batch.result()
        if arrived:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(arrived)
            for x in (batch.x0, *batch.text, *(batch.teacher_text or ())):
                if x is not None:
                    x.record_stream(now)        # its memory is not used again before this step ends
        return batch

    def read(self, k: int):
        """(batch k on the device, the event of its arrival there)."""
        batch = self.latents.batch(k)
        if not self.stream:
            return batch.to(self.device), None
        with torch.cuda.stream(self.stream):
            return batch.to(self.device), self.stream.record_event()

def seeded(seed: int, device="cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed % 2**63)      # PyTorch takes no larger ones

@functools.lru_cache(2)
def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=seeded(seed * 100003 + epoch))

@functools.lru_cache(256)
def shuffled(n: int, *seed) -> np.ndarray:
    digest = hashlib.sha256(repr(seed).encode()).hexdigest()
    return torch.randperm(n, generator=seeded(int(digest[:15], 16))).numpy()

def whose_turn(sizes: tuple, k: int, batch: int, seed: int) -> tuple[str, list[int]]:
    """Global batch k -> its bucket, and places in that bucket. sizes: ((bucket, pictures), ..).
    Each bucket is an endless row of epochs, each in its own order, cut into whole batches: nothing
    is dropped or repeated. Before epoch e bucket b had floor(e n_b / batch) turns; those of an
    epoch come in an order drawn from (seed, epoch)."""
    def before(epoch):
        return [epoch * n // batch for _, n in sizes]
    epoch = k * batch // sum(n for _, n in sizes)       # or later: the floors delay
    while sum(before(epoch + 1)) <= k:
        epoch += 1
    had = np.array(before(epoch))
    turns = np.repeat(np.arange(len(sizes)), before(epoch + 1) - had)
    turns = turns[shuffled(len(turns), seed, epoch)]
    turn = k - had.sum()
    b = turns[turn]
    bucket, n = sizes[b]
    first = int(had[b] + (turns[:turn] == b).sum()) * batch
    places = range(first, first + batch)
    return bucket, [int(shuffled(n, seed, bucket, p // n)[p % n]) for p in places]

WORDINGS = 8                    # of each scene's caption
PART = 16 * BATCH               # scenes in a file of those that are done

def scenes_of(cfg: DataConfig, split: str = "train") -> Scenes:
    return Scenes(cfg.size, split, cfg.seed, cfg.nouns, cfg.layout, cfg.atlas, cfg.old)

def known_things(config: dict) -> list[str]:
    """The nouns that a checkpoint's description names; none where it learned from pictures."""
    data = config["data"]
    if data.get("folder"):
        return []
    shipped = [] if data.get("atlas") else list(NOUNS)[:data.get("nouns") or None]
    return list(map(str, config.get("things") or shipped))

def draw_scenes(scenes: Scenes, some: range, rows: np.ndarray):
    for i, row in zip(some, rows):
        row[:] = scenes.render(scenes.scene(i))                         # (H, W, 3)

def word_scenes(scenes: Scenes, vocabulary: Vocabulary, seed: int, some: range, rows: np.ndarray):
    """Tokens of WORDINGS captions a scene, and in the last column their number:
    rows (B, WORDINGS, L + 1)."""
    captions = []
    for i in some:
        rng, scene = random.Random(f"{seed}/{i}"), scenes.scene(i)
        captions += [training_caption(scene, rng) for _ in range(WORDINGS)]
    ids, mask = vocabulary.tokenize(captions, rows.shape[-1] - 1, cut=True)
    rows[:] = vocabulary.pad
    rows[..., :ids.shape[1]] = ids.unflatten(0, (-1, WORDINGS))
    rows[..., -1] = mask.sum(1).unflatten(0, (-1, WORDINGS))

def drawn(cfg: DataConfig, split: str, todo: range, folder="", title: str = ""):
    """Yields pictures of scenes, uint8 (B, size, size, 3); folder: for what is under way."""
    draw = partial(draw_scenes, scenes_of(cfg, split))
    shape = cfg.size, cfg.size, 3
    return in_processes(draw, shape, "uint8", todo, cfg.workers, folder or cfg.cache, title)

def worded(cfg: DataConfig, vocabulary: Vocabulary, L: int, seed: int, todo: range, folder="",
           title: str = ""):
    """Yields rows of word_scenes for training scenes, int16 (B, WORDINGS, L + 1)."""
    word = partial(word_scenes, scenes_of(cfg), vocabulary, seed)
    shape = WORDINGS, L + 1
    return in_processes(word, shape, "int16", todo, cfg.workers, folder or cfg.cache, title)

def latents_of(cfg: DataConfig, ae, ae_key: str, split: str = "train", n: int = 0) -> torch.Tensor:
    """Latents of the first n scenes, fp16 (n, C, size/8, size/8): read, or made and kept.
    ae_key: autoencoder_fingerprint(ae), so that another autoencoder makes another file."""
    n = n or cfg.pictures
    key = content_key(cfg, cfg.size, ae_key, split, n)
    path = Path(cfg.cache) / f"scenes-{cfg.size}px-{split}-{n}-{key}.safetensors"
    device = next(ae.parameters()).device
    def encoded(todo):
        title = f"render and encode {n} {split} scenes"
        for x in drawn(cfg, split, todo, path.with_suffix(".parts"), title):
            # a core would take 0.1 s to make floats of a batch of 256 px: the device does
            yield encode_pictures(ae, x.to(device), device)

    def make():
        return {"latents": rows_in_parts(path, n, encoded)}
    return kept_tensors(path, make, latents=n)["latents"]

def wordings(cfg, n: int, vocabulary: Vocabulary) -> dict[str, torch.Tensor]:
    """Tokens of WORDINGS captions of each of n training scenes, since wording each batch anew would
    hold up a GPU: ids (n, WORDINGS, L), lengths (n, WORDINGS), int16. cfg: a TrainConfig."""
    words = hashlib.sha256(vocabulary.data).hexdigest(), vocabulary.pattern
    words += ((ROOT / "wording.py").read_text("utf-8"),)
    key = content_key(cfg.data, *words, cfg.text.max_tokens, cfg.seed, n)
    path = Path(cfg.data.cache) / f"words-{n}-{key}.safetensors"
    def make():
        some = partial(worded, cfg.data, vocabulary, cfg.text.max_tokens, cfg.seed,
                       folder=path.with_suffix(".parts"), title=f"word {n} train scenes")
        rows = rows_in_parts(path, n, some)                 # (n, WORDINGS, L + 1)
        lengths = rows[..., -1].contiguous()
        return {"ids": rows[..., :lengths.max()].contiguous(), "lengths": lengths}
    return kept_tensors(path, make, ids=n, lengths=n)

def kept_tensors(path: Path, make, **rows: int) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; what make() gives where it is missing or damaged.
    rows: {name: length} of all that it holds."""
    if path.exists():
        try:
            tensors = load_file(path)
            if {k: len(x) for k, x in tensors.items()} != rows:
                raise SafetensorError("it holds other tensors")
            shutil.rmtree(path.with_suffix(".parts"), ignore_errors=True)
            return tensors
        except SafetensorError as e:
            print(f"{path} is damaged ({e}): making it again", flush=True)
            tensors = None                              # Windows deletes no file that is mapped
            path.unlink()
    tensors, parts = make(), path.with_suffix(".parts")
    with contextlib.suppress(FileNotFoundError):        # a run beside this one is done, removed it
        parts.mkdir(parents=True, exist_ok=True)
        write_whole(parts / path.name, partial(save_file, tensors))
        patiently(os.replace, parts / path.name, path)
    return kept_tensors(path, make, **rows)

def rows_in_parts(path: Path, n: int, make) -> torch.Tensor:
    """Rows of n scenes for the file `path`: what make(todo) yields, BATCH scenes at a time.
    Each PART of them is kept in a folder beside it, in a file named by its first scene, until
    `path` is whole: a run that was killed goes on there."""
    folder, parts, done = path.with_suffix(".parts"), [], 0
    # up to what is not whole
    with contextlib.suppress(FileNotFoundError, SafetensorError, KeyError):
        while True:
            parts.append(load_file(folder / f"{done}.safetensors")["rows"])
            done += len(parts[-1])
    with contextlib.closing(make(range(done, n))) as batches:
        while done < n:
            parts.append(torch.cat([x.clone() for x in islice(batches, PART // BATCH)]))
            with contextlib.suppress(FileNotFoundError):    # a run beside this one removed it
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / f"{done}.safetensors", partial(save_file, {"rows": parts[-1]}))
            done += len(parts[-1])
    return torch.cat(parts)

def content_key(cfg: DataConfig, *more) -> str:
    """A name for all that scenes depend on: their code, the sprites, the settings, and `more`."""
    code = (ROOT / "scenes.py").read_text("utf-8")
    sprites = sorted(Path(cfg.atlas).glob("*")) if cfg.atlas else [ATLAS]
    files = [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in sprites if p.is_file()]
    what = [code, files, cfg.nouns, cfg.layout, cfg.seed, *more] + [cfg.old] * (cfg.old > 0)
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]

def autoencoder_fingerprint(ae) -> str:
    """A name for an autoencoder's latents: a hash of its encoder's weights, its scale and shift."""
    sha = hashlib.sha256(json.dumps([ae.cfg.scale, ae.cfg.shift]).encode())
    for name, x in ae.encoder.state_dict().items():
        sha.update(name.encode())
        sha.update(x.float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]

def show_speed():
    """Prints scenes/s of one core and of all: drawn, and worded with WORDINGS captions each."""
    cores, vocabulary = os.cpu_count(), load_vocabulary()
    for what, n in (64, 1000), (128, 1000), (256, 1000), ("words", 5000):
        rates = []
        for workers in (0, cores):
            todo = range(n * max(1, workers))
            begin = time.time()
            if what == "words":
                rows = worded(DataConfig(nouns=0, workers=workers), vocabulary, 64, 0, todo)
            else:
                rows = drawn(DataConfig(what, nouns=0, workers=workers), "train", todo)
            for _ in rows:
                pass
            rates.append(len(todo) / (time.time() - begin))
        name = what if what == "words" else f"{what} px"
        print(f"{name}: {rates[0]:.0f} scenes/s on one core, {rates[1]:.0f} on {cores}: "
              f"{rates[1] / rates[0]:.1f} times that", flush=True)

def build_atlas(folder):
    sheet = Image.new("RGBA", (ATLAS_COLUMNS * ATLAS_CELL, atlas_cell(len(NOUNS) - 1)[3]))
    for k, code in enumerate(NOUNS.values()):
        sprite = Image.open(Path(folder) / "assets" / f"{code}.webp")
        sheet.paste(square(sprite), atlas_cell(k)[:2])
    sheet.save(ATLAS, quality=80, method=6)
    print(f"{ATLAS}: {len(NOUNS)} sprites, {ATLAS.stat().st_size / 1e3:.0f} kB")

def export_pictures(folder, n: int, size: int = 192):
    """n scenes as JPEG + txt of ragged sizes, the longest side `size`, ten of them spoilt."""
    folder, scenes = Path(folder), Scenes(size, "train", layout="free")
    if not 20 <= n <= 10**6 or not 64 <= size <= 4096:
        raise UserError(f"--export wants 20 to a million pictures of 64 to 4096 px: {n}, {size}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"--export wants an empty folder: {folder}")
    for i in range(n):
        picture, caption = scenes[i]
        rng = random.Random(i)
        if rng.random() < 0.7:
            w, h = rng.choice(((192, 192), (192, 128), (128, 192)))
        else:
            w, h = rng.randint(100, 192), rng.randint(100, 192)
        image = Image.fromarray(picture).resize((w * size // 192, h * size // 192))
        image.save(folder / f"{i:05d}.jpg", quality=92)
        (folder / f"{i:05d}.txt").write_text(caption + "\n", "utf-8")
    spoilt = random.Random(0).sample(range(n), 10)
    for way, i in enumerate(spoilt):
        spoil(folder / f"{i:05d}.jpg", way)
    print(f"{folder}: {n} pictures, {len(spoilt)} of them spoilt: {sorted(spoilt)}")

def spoil(picture: Path, way: int):
    """Damages a picture or its caption in one of ten ways, as happens in real folders."""
    whole = picture.read_bytes()
    pictures = [whole[:len(whole) // n] for n in (2, 3, 4)] + [b"", b"<html>404</html>"]
    captions = [b"", b"\n", "ein Käfer".encode("latin-1")]
    if way < 5:
        picture.write_bytes(pictures[way])
    elif way < 8:
        picture.with_suffix(".txt").write_bytes(captions[way - 5])
    else:
        Image.open(picture).resize((40, 30)).save(picture)

def main(argv):
    match argv:
        case ["--build-atlas", folder]:
            build_atlas(folder)
        case ["--show", path]:
            if Path(path).suffix.lower() not in (".png", ".jpg", ".webp"):
                raise UserError(f"--show '{path}': name a .png, .jpg or .webp file")
            scenes = Scenes(128, "train"), Scenes(128, "test")
            pictures, captions = zip(*(scenes[k % 2][k] for k in range(48)))
            grid(pictures, captions, 8).save(path)
        case ["--speed"]:
            show_speed()
        case ["--export", folder, n, *size] if len(size) < 2 and folder.strip():
            if not all(map(str.isdecimal, (n, *size))):
                raise UserError(f"--export wants whole numbers, got {' '.join((n, *size))}")
            export_pictures(folder, int(n), *map(int, size))
        case [] | ["-h"] | ["--help"]:
            print(__doc__)
        case _:
            raise UserError(f"what is '{' '.join(argv)}'? `python data.py` tells what it takes")

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
