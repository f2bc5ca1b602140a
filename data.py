"""What training reads: latents of scenes and their captions on disk, and batches of them.

    python data.py --show out.png           a sheet of scenes with their captions
    python data.py --export DIR 200 [192]   scenes as a folder of your own pictures, ten spoilt
    python data.py --speed                  scenes/s on one core
    python data.py --build-atlas DIR        packs the sprites of an unpacked
                                            `npm pack @lobehub/fluent-emoji-3d@1.1.0` (MIT)

Scenes are drawn by scenes.py; your own pictures are read by pictures.py and cache.py.
B batch | C latent channels | L tokens | H W pixels.
"""
import functools
import hashlib
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from checkpoint import write_whole
from common import ROOT, UserError, friendly, option
from decoder import encode_pictures
from plots import grid
from scenes import ATLAS, ATLAS_CELL, ATLAS_COLUMNS, NOUNS, Scenes, atlas_cell, square
from text import Text, Tokens, Vocabulary, on_device
from wording import training_caption

@dataclass
class DataConfig:
    size: int = option(64, low=8)           # pixels
    nouns: int = option(12, low=0)          # the first so many, 0 = all
    layout: str = option("slots", choices=("slots", "free"))
    pictures: int = option(20000, low=1)    # scenes, drawn once and kept as latents
    seed: int = 0
    atlas: str = ""             # a folder of your own sprites, named by noun
    workers: int = option(2, low=0)         # processes that render, or read pictures
    cache: str = "runs/cache"   # directory
    # your own pictures (pictures.py): their area is about size x size
    folder: str = ""            # of pictures with captions, or of tars; empty: scenes
    bucket_step: int = option(64, low=8)    # heights and widths are multiples of it
    max_ratio: float = option(2.0, low=1)   # of a bucket's sides; longer pictures are cropped
    max_upscale: float = option(1.0, above=0)   # pictures that must grow more are skipped
    held_out: float = option(0.02, low=0, high=1)   # share for validation, by a hash of the name
    shard: int = option(256, low=1)         # pictures in a file of the cache

    def check(self):
        step = self.bucket_step if self.folder else 8
        if self.size % step or step % 8:
            raise UserError(f"data.size={self.size} must be a multiple of {step} pixels, and "
                            "data.bucket_step one of 8")

class Batch(NamedTuple):
    x0: torch.Tensor                    # (B, C, H/8, W/8) latents
    text: Tokens | Text                 # what the network reads; pooled only for an MMDiT
    teacher_text: Text | None = None    # states of an SD3 teacher's encoders, where it has its own

    def to(self, device) -> "Batch":
        theirs = self.teacher_text and on_device(self.teacher_text, device)
        return Batch(self.x0.to(device), on_device(self.text, device), theirs)

class Batches:
    """Batch number k of the whole run, a function of the seed and k.
    Rank r of w takes k = (step * accumulate + micro) * w + r. Scenes come in a new order each
    epoch, each in one of its wordings, the share drop_caption with the empty caption.
    cfg: a TrainConfig; latents: those of scenes, or a cache.CachedPictures, which makes batches."""
    def __init__(self, cfg, latents, device, vocabulary: Vocabulary):
        if len(latents) < cfg.batch:
            raise UserError(f"{len(latents)} pictures to train on (some are held out), less than "
                            f"batch={cfg.batch}: add batch={max(1, len(latents) // 4)}")
        self.cfg, self.latents, self.device = cfg, latents, device
        self.vocabulary = vocabulary
        if not cfg.data.folder:
            # 2 kB each at 64 px: latents and words fit on the device
            words = wordings(cfg, len(latents), vocabulary)
            self.ids, self.lengths = words["ids"].to(device), words["lengths"].to(device)
            self.latents = latents.to(device)

    def __call__(self, k: int) -> Batch:
        if self.cfg.data.folder:
            return self.latents.batch(k).to(self.device)
        cfg, device = self.cfg, self.device
        epoch, turn = divmod(k, len(self.latents) // cfg.batch)
        order = epoch_order(len(self.latents), cfg.seed, epoch)
        index = order[turn * cfg.batch:(turn + 1) * cfg.batch].to(device)   # (B,)
        g = seeded(2**40 + cfg.seed * 1000003 + k)                          # not the noise's
        which = torch.randint(WORDINGS, (cfg.batch,), generator=g).to(device)
        drop = (torch.rand(cfg.batch, generator=g) < cfg.drop_caption).to(device)
        ids = self.ids[index, which].long()                                 # (B, L)
        lengths = self.lengths[index, which].long()                         # (B,)
        ids[drop], lengths[drop] = self.vocabulary.pad, 1
        ids[drop, 0] = self.vocabulary.end                                  # the empty caption
        if ids.device.type == "cpu":                # on a GPU always the same shape
            ids = ids[:, :lengths.max()]
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        return Batch(self.latents[index].float(), Tokens(ids, mask))

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

def scenes_of(cfg: DataConfig, split: str = "train") -> Scenes:
    return Scenes(cfg.size, split, cfg.seed, cfg.nouns, cfg.layout, atlas=cfg.atlas)

def latents_of(cfg: DataConfig, ae, ae_key: str, split: str = "train", n: int = 0) -> torch.Tensor:
    """Latents of the first n scenes, fp16 (n, C, size/8, size/8): read, or made and kept.
    ae_key: autoencoder_fingerprint(ae), so that another autoencoder makes another file."""
    n = n or cfg.pictures
    def make():
        device = next(ae.parameters()).device
        scenes = torch.utils.data.Subset(scenes_of(cfg, split), range(n))
        loader = torch.utils.data.DataLoader(scenes, 64, num_workers=cfg.workers)
        bar = tqdm(loader, f"render and encode {n} {split} scenes", unit="batch")
        return {"latents": torch.cat([encode_pictures(ae, x, device) for x, _ in bar])}

    key = content_key(cfg, cfg.size, ae_key, split, n)
    path = Path(cfg.cache) / f"scenes-{cfg.size}px-{split}-{n}-{key}.safetensors"
    return kept_tensors(path, make)["latents"]

def wordings(cfg, n: int, vocabulary: Vocabulary) -> dict[str, torch.Tensor]:
    """Tokens of WORDINGS captions of each of n training scenes, since wording each batch anew would
    hold up a GPU: ids (n, WORDINGS, L), lengths (n, WORDINGS), int16. cfg: a TrainConfig."""
    def make():
        scenes, captions = scenes_of(cfg.data), []
        for i in tqdm(range(n), f"word {n} train scenes", unit="scene", disable=n < 5000):
            rng, scene = random.Random(f"{cfg.seed}/{i}"), scenes.scene(i)
            captions += [training_caption(scene, rng) for _ in range(WORDINGS)]
        ids, mask = vocabulary.tokenize(captions, cfg.text.max_tokens, cut=True)
        return {"ids": ids.short().unflatten(0, (n, WORDINGS)),
                "lengths": mask.sum(1).short().unflatten(0, (n, WORDINGS))}

    words = hashlib.sha256(vocabulary.data).hexdigest(), vocabulary.pattern
    words += ((ROOT / "wording.py").read_text(encoding="utf-8"),)
    key = content_key(cfg.data, *words, cfg.text.max_tokens, cfg.seed, n)
    return kept_tensors(Path(cfg.data.cache) / f"words-{n}-{key}.safetensors", make)

def kept_tensors(path: Path, make) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; what make() gives where it is missing or damaged."""
    if path.exists():
        try:
            return load_file(path)
        except SafetensorError as e:
            print(f"{path} is damaged ({e}): making it again", flush=True)
            path.unlink()
    tensors = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda p: save_file(tensors, p))
    return load_file(path)

def content_key(cfg: DataConfig, *more) -> str:
    """A name for all that scenes depend on: their code, the sprites, the settings, and `more`."""
    code = (ROOT / "scenes.py").read_text(encoding="utf-8")
    sprites = sorted(Path(cfg.atlas).glob("*")) if cfg.atlas else [ATLAS]
    files = [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in sprites if p.is_file()]
    what = [code, files, cfg.nouns, cfg.layout, cfg.seed, *more]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]

def autoencoder_fingerprint(ae) -> str:
    """A name for an autoencoder's latents: a hash of its encoder's weights, its scale and shift."""
    sha = hashlib.sha256(json.dumps([ae.cfg.scale, ae.cfg.shift]).encode())
    for name, x in ae.encoder.state_dict().items():
        sha.update(name.encode())
        sha.update(x.float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]

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
    if n < 20 or (folder.exists() and any(folder.iterdir())):
        raise UserError(f"--export wants an empty folder and 20 pictures or more: {folder}, {n}")
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        picture, caption = scenes[i]
        rng = random.Random(i)
        if rng.random() < 0.7:
            w, h = rng.choice(((192, 192), (192, 128), (128, 192)))
        else:
            w, h = rng.randint(100, 192), rng.randint(100, 192)
        image = Image.fromarray(picture).resize((w * size // 192, h * size // 192))
        image.save(folder / f"{i:05d}.jpg", quality=92)
        (folder / f"{i:05d}.txt").write_text(caption + "\n")
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
            scenes = Scenes(128, "train"), Scenes(128, "test")
            pictures, captions = zip(*(scenes[k % 2][k] for k in range(48)))
            grid(pictures, captions, 8).save(path)
        case ["--speed"]:
            for size in (64, 128, 256):
                scenes = Scenes(size, "train")
                begin = time.time()
                for i in range(1000):
                    scenes[i]
                print(f"{size} px: {1000 / (time.time() - begin):.0f} scenes/s on one core")
        case ["--export", folder, n, *size] if n.isdigit() and len(size) < 2:
            export_pictures(folder, int(n), *map(int, size))
        case _:
            print(__doc__)

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
