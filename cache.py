"""The cache of your own pictures: latents and text states, written once, read by every training.

    python train.py --cache --config configs/folder.toml [key=value ...]

(distill.py and adv_distill.py too.) Killed, it goes on where it was; torchrun shares the work.
NNNNNN.safetensors have `data.shard` pictures of the listing each: fp16 latents of every bucket
`HxW`, names and captions in the metadata. Frozen text encoders add `HxW.emb`, `HxW.mask` and
`HxW.pooled`, an SD3 teacher's sd3-NNNNNN.safetensors; both have theirs of the empty caption.
cache.json says what the cache was made with: other encoders or pictures want another directory.

B batch | C h w latents | L tokens | D width | P pooled width | H W pixels
"""
import contextlib
import functools
import hashlib
import json
import math
import random
import shutil
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from checkpoint import resolve, write_whole
from common import UserError, at_most_cores, autocast, command_line, setup, use_bfloat16
from data import Batch, autoencoder_fingerprint, seeded, whose_turn
from decoder import encode_pictures, load_autoencoder, to_tensor
from pictures import Prepared, find_pictures, listing_key
from text import (
    VOCABULARY,
    Text,
    Vocabulary,
    drop_encoders,
    encoders_fingerprint,
    join_texts,
    load_encoders,
    on_device,
    train_bpe,
)

WORDS = 4096                # tokens of a folder's own vocabulary, at most
PIXELS = 2**21              # encoded at a time: two pictures of 1024 px, 512 of 64 px
CAPTIONS = 32               # of the text encoders, at a time

def cache_settings(cfg, ae, download: bool = False) -> dict:
    """What the content of a cache depends on; download: encoders that are not here yet."""
    settings = {"text": cfg.text.kind, "autoencoder": autoencoder_fingerprint(ae)}
    for key in ("size", "bucket_step", "max_ratio", "max_upscale", "shard"):
        settings[key] = getattr(cfg.data, key)
    if cfg.text.kind != "own":
        for key in ("width", "tokens", "leave_out"):
            settings[f"text.{key}"] = getattr(cfg.text, key)
        settings["text.folder's weights"] = encoders_fingerprint(cfg.text, download)
    return settings

def read_state(root: Path, settings: dict) -> dict | None:
    """cache.json; None where there is none. UserError where it was made with other settings."""
    try:
        state = json.loads((root / "cache.json").read_text("utf-8"))
        was = state["settings"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{root}/cache.json is damaged: delete {root}, make it again") from None
    for key, now in settings.items():
        if was.get(key) != now and now is not None:     # None: not here, so not to be compared
            raise UserError(f"{root} was made with {key}={was.get(key)}, the config says {now}: "
                            "give another data.cache, or delete it and make it again")
    return state

# ---------------------------------------------------------------------------- writing
def ensure_cache(cfg):
    """Makes the cache where it is not whole. One that is is not compared with the folder again."""
    root = Path(cfg.data.cache)
    state, words = read_state(root, {}), root / VOCABULARY.name
    lacks = [not state or not state["done"] or cfg.text.kind == "own" and not words.is_file()]
    if dist.is_initialized():
        dist.broadcast_object_list(lacks, 0)    # all make it together, or none
    if lacks[0]:
        make_cache(cfg)

def make_cache(cfg, teacher_text=None):
    """Writes what is missing of cfg.data.cache. Rank k % world makes shard k, as any other would.
    teacher_text: the TextConfig of an SD3 teacher, whose states are added."""
    device, rank, world = setup(cfg.device)
    d, root = cfg.data, Path(cfg.data.cache)
    if not d.folder:
        raise UserError("data.folder is not set: set it to your pictures")
    items = find_pictures(d.folder)
    ae = load_autoencoder(cfg.ae, device)
    settings, listing = cache_settings(cfg, ae, download=True), listing_key(items)
    old = read_state(root, settings)
    if old and old["listing"] != listing:
        raise UserError(f"{d.cache} was made of other pictures or captions than '{d.folder}' holds "
                        "now: give another data.cache, or delete it and make it again")
    shards = -(-len(items) // d.shard)
    state = {"settings": settings, "listing": listing, "shards": shards, "done": False}
    if rank == 0:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob("*.tmp*"):    # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        if not old:
            write_state(root, state)
    if world > 1:
        dist.barrier()                          # the directory is there

    lacking = [k for k in range(shards) if note_of(shard_path(root, k), "pictures") is None]
    if rank == 0 and 0 < len(lacking) < shards:
        print(f"{root}: {shards - len(lacking)} of {shards} shards are there already, going on")
    mine = [k for k in lacking if k % world == rank]
    empty = root / "empty.safetensors"
    frozen = cfg.text.kind != "own"
    lacks_empty = frozen and rank == 0 and note_of(empty, "states") is None
    encode = load_encoders(cfg.text, device) if lacks_empty or (frozen and mine) else None
    if lacks_empty:
        write_tensors(empty, text_tensors(encode, [""]), {"states": "of the empty caption"})
    if rank == 0 and len(lacking) == shards:
        judge_autoencoder(cfg, ae, items, device)
    if mine:
        write_shards(cfg, items, mine, ae, encode, device, rank > 0)
    if encode:
        encode.release()
    if teacher_text:
        add_teacher_states(root, teacher_text, device, rank, world, shards)
    if world > 1:
        dist.barrier()
    mapped.cache_clear()
    if rank == 0:
        finish(cfg, state)

FINE = 27       # dB; under it faces and letters are lost, whatever the network learns
TAUGHT = 1000   # steps that are advised, of STEP pixels each
STEP = 2**16

@torch.inference_mode()
def judge_autoencoder(cfg, ae, items, device, n: int = 64):
    """Prints how well the autoencoder keeps n pictures of the folder, and what to do about it."""
    groups, values, seconds = defaultdict(list), [], []
    prepared = Prepared(items[::max(1, len(items) // n)][:n], cfg.data)
    for i in range(len(prepared)):
        picture, _ = prepared[i]
        if picture is not None:
            groups[tuple(picture.shape)].append(picture)
    for (H, W, _), pictures in groups.items():
        for some in torch.as_tensor(np.stack(pictures)).split(max(1, STEP // (H * W))):
            begin = time.perf_counter()
            latents = encode_pictures(ae, some, device).float().to(device)  # (B, C, h, w)
            with autocast(device, use_bfloat16("auto", device)):
                y = ae.decode(latents).float().cpu().clamp(-1, 1)           # (B, 3, H, W)
            error = (y - to_tensor(some)).square().mean((1, 2, 3)) / 4      # (B,)
            values += (-10 * error.clamp(min=1e-9).log10()).tolist()
            seconds.append((time.perf_counter() - begin) * STEP / (len(some) * H * W))
    if not values:
        return
    psnr, verdict = sum(values) / len(values), "fine"
    if psnr < FINE:
        minutes = 3 * TAUGHT * statistics.median(seconds) / 60      # forwards and backwards
        teach = command_line(["python", "train_decoder.py", f"folder={cfg.data.folder}",
                              f"init={cfg.ae}", f"steps={TAUGHT}", "out=runs/my_ae"])
        verdict = (f"poor, and what it loses no network brings back. First run `{teach}`, about "
                   f"{math.ceil(minutes)} minutes, then add ae=runs/my_ae/final")
    print(f"{cfg.ae} keeps {len(values)} of these pictures at {psnr:.1f} dB: {verdict}", flush=True)

def write_state(root: Path, state: dict):
    text = json.dumps(state, indent=1)
    write_whole(root / "cache.json", lambda p: p.write_text(text, "utf-8"))

def shard_path(root: Path, k: int, prefix: str = "") -> Path:
    return root / f"{prefix}{k:06d}.safetensors"

def write_tensors(path: Path, tensors: dict, note: dict):
    """note: one key of metadata; safetensors orders several by chance."""
    write_whole(path, lambda p: save_file(tensors, p, note))

def note_of(path: Path, key: str) -> str | None:
    """What write_tensors noted; None where the file is missing or damaged."""
    with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError):
        return safe_open(path, "pt").metadata()[key]

def write_shards(cfg, items, mine: list[int], ae, encode, device, quiet: bool):
    """Reads the pictures of the shards `mine` in other processes, encodes them in this one."""
    d = cfg.data
    todo = [i for k in mine for i in range(k * d.shard, min(len(items), (k + 1) * d.shard))]
    workers = at_most_cores(d.workers)
    prepared = Prepared([items[i] for i in todo], d)
    loader = torch.utils.data.DataLoader(
        prepared, batch_size=None, num_workers=workers,
        generator=torch.Generator())        # or the network's first weights would be others
    bar = tqdm(loader, f"read and encode {d.folder}", unit="picture", disable=quiet)
    rows = []
    for (picture, words), i in zip(bar, todo):
        rows.append((items[i].name, picture, words))
        if (i + 1) % d.shard == 0 or i + 1 == len(items):
            write_shard(shard_path(Path(d.cache), i // d.shard), rows, ae, encode, device)
            rows = []

def write_shard(path: Path, rows, ae, encode, device):
    """rows: (name, picture or None, caption or why not)."""
    groups, skipped = defaultdict(list), []
    for name, picture, words in rows:
        if picture is None:
            skipped.append((name, words))
        else:
            groups[tuple(picture.shape[:2])].append((name, words, picture))
    tensors, buckets = {}, {}
    for H, W in sorted(groups):
        names, captions, pictures = zip(*groups[H, W])
        key = f"{H}x{W}"
        buckets[key] = list(zip(names, captions))
        parts = torch.stack(pictures).split(max(1, PIXELS // (H * W)))      # (n, H, W, 3) each
        tensors[key] = torch.cat([encode_pictures(ae, x, device) for x in parts])   # (B, C, h, w)
        if encode:
            tensors |= text_tensors(encode, captions, f"{key}.")
    write_tensors(path, tensors, {"pictures": json.dumps({"buckets": buckets, "skipped": skipped})})

@torch.inference_mode()
def text_tensors(encode, captions, prefix: str = "") -> dict[str, torch.Tensor]:
    """Text states on the CPU in fp16, cut where no caption has a token any more."""
    parts = [list(captions[i:i + CAPTIONS]) for i in range(0, len(captions), CAPTIONS)]
    emb, mask, pooled = join_texts([on_device(encode(part), "cpu") for part in parts])
    L = int(mask.any(0).nonzero().max()) + 1
    out = {f"{prefix}emb": emb[:, :L].half().contiguous(),
           f"{prefix}mask": mask[:, :L].contiguous()}
    if pooled is not None:
        out[f"{prefix}pooled"] = pooled.half()
    if not all(torch.isfinite(x).all() for x in out.values()):
        raise UserError("a text encoder's states are not finite in fp16: try text.dtype=float32")
    return out

def add_teacher_states(root: Path, cfg, device, rank: int, world: int, shards: int):
    """Adds a teacher's text states beside each shard that lacks them. cfg: a TextConfig."""
    files = {root / "sd3-empty.safetensors": {}} if rank == 0 else {}
    for k in range(rank, shards, world):
        files[shard_path(root, k, "sd3-")] = read_shard(root, k)["buckets"]
    weights = encoders_fingerprint(cfg, download=True)
    todo = [path for path, members in files.items() if not has_states(path, cfg, members, weights)]
    if not todo:
        return
    encoders = load_encoders(cfg, device)

    def encode(captions):
        text = encoders(captions)
        return text._replace(mask=torch.ones_like(text.mask))       # SD3 reads its padding too

    for path in tqdm(todo, "states of the teacher's text encoders", disable=rank > 0):
        tensors = {} if files[path] else text_tensors(encode, [""])
        for key, rows in files[path].items():
            tensors |= text_tensors(encode, [caption for _, caption in rows], f"{key}.")
        write_tensors(path, tensors, {"states": f"{states_key(cfg, files[path])} {weights}"})
    encoders.release()

def states_key(cfg, members: dict) -> str:
    """Names the encoders (not the teacher: SD3.5-Large and its Turbo share them) and captions."""
    what = json.dumps([cfg.width, cfg.tokens, sorted(cfg.leave_out), members])
    return hashlib.sha256(what.encode()).hexdigest()[:16]

def has_states(path: Path, cfg, members: dict, weights: str | None) -> bool:
    """Whether a file holds the states that these encoders give; weights: their fingerprint."""
    key, _, theirs = (note_of(path, "states") or "").partition(" ")
    return key == states_key(cfg, members) and weights in (None, theirs)

def printable(text: str) -> str:
    """On one line, and UTF-8: a name may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

def finish(cfg, state: dict):
    """Writes skipped.txt and cache.json's `done`, prints what is in the cache."""
    root = Path(cfg.data.cache)
    sizes, skipped, captions = Counter(), [], []
    for k in range(state["shards"]):
        about = read_shard(root, k)
        skipped += about["skipped"]
        for key, members in about["buckets"].items():
            sizes[key] += len(members)
            captions += [caption for _, caption in members]
    path = root / "skipped.txt"
    lines = "".join(f"{printable(name)}\t{printable(why)}\n" for name, why in skipped)
    write_whole(path, lambda p: p.write_text(lines, encoding="utf-8"))
    if not captions:
        raise UserError(f"none of the {len(skipped)} pictures of '{cfg.data.folder}' can be used; "
                        f"{path} says why, the first: {': '.join(skipped[0])}")
    write_state(root, {**state, "done": True})
    reasons = Counter(why.split(":")[0] for _, why in skipped).most_common()
    why = ", ".join(f"{n} {reason}" for reason, n in reasons)
    listed = f"{len(skipped)} skipped ({why}), listed in {path}" if skipped else "none skipped"
    print(f"{root}: {len(captions)} pictures, {listed}")
    print("buckets, height x width: " + ", ".join(f"{key} {n}" for key, n in sorted(sizes.items())))
    if cfg.text.kind == "own":
        learned = train_bpe(captions, WORDS)
        write_whole(root / VOCABULARY.name, lambda p: p.write_bytes(learned))
        ids_of, most = folder_vocabulary(cfg).ids_of, cfg.text.max_tokens
        lengths = [len(ids_of(caption)) for caption in captions]
        words = sum(len(caption.split()) for caption in captions)
        long = sum(n > most for n in lengths)
        print(f"its own vocabulary: {sum(lengths) / words:.2f} tokens a word" + (
            f"; {long} captions are over text.max_tokens={most}: their ends are not read"
            if long else ""))

def folder_vocabulary(cfg) -> Vocabulary:
    """That of the run, where it has begun; else the one that was learned from the captions."""
    file = Path(cfg.data.cache) / VOCABULARY.name
    with contextlib.suppress(UserError):
        begun = resolve(cfg.out) / VOCABULARY.name
        file = begun if begun.is_file() else file
    return Vocabulary(file.read_bytes(), cfg.text.pattern, file)

# ---------------------------------------------------------------------------- reading
@functools.lru_cache(256)
def mapped(path: Path):
    return safe_open(path, "pt")

def read_shard(root: Path, k: int) -> dict:
    """Shard k: {"buckets": {bucket: [(name, caption), ..]}, "skipped": [(name, why), ..]}."""
    note = note_of(shard_path(root, k), "pictures")
    if note is None:
        raise UserError(f"{shard_path(root, k)} is missing or damaged: make it again with --cache")
    return json.loads(note)

def open_cache(cfg, ae, teacher_text, vocabulary):
    """(pictures to train on, pictures held out by a hash of their names, at least one).
    teacher_text: the states of these encoders (a TextConfig) are wanted too, or None."""
    root = Path(cfg.data.cache)
    state = read_state(root, cache_settings(cfg, ae))
    if not state or not state["done"]:
        raise UserError(f"the cache {root} is not whole: run the same command with --cache first")
    rows, lacking = [], 0
    weights = encoders_fingerprint(teacher_text) if teacher_text else None
    for k in range(state["shards"]):
        buckets = read_shard(root, k)["buckets"]
        if teacher_text:
            path = shard_path(root, k, "sd3-")
            lacking += not has_states(path, teacher_text, buckets, weights)
        for bucket, members in buckets.items():
            for i, (name, caption) in enumerate(members):
                digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
                rows.append((int(digest[:8], 16), bucket, (k, i, caption)))
    if lacking:
        raise UserError(f"{root} lacks the teacher's text states of {lacking} of {state['shards']} "
                        "shards, or has those of other encoders: run it again with --cache")
    limit = max(cfg.data.held_out * 2**32, min(rows)[0] + 1)
    train, held_out = defaultdict(list), defaultdict(list)
    for number, bucket, row in rows:
        side = held_out if number < limit else train
        side[bucket].append(row)
    return (CachedPictures(cfg, train, vocabulary, bool(teacher_text)),
            CachedPictures(cfg, held_out, vocabulary))

def empty_caption(cfg, prefix: str = "") -> Text:
    """The cached states of the empty caption; prefix "sd3-": the teacher's."""
    path = Path(cfg.data.cache) / f"{prefix}empty.safetensors"
    try:
        return Text(**load_file(path))
    except (OSError, SafetensorError):
        raise UserError(f"{path} is missing or damaged: run it again with --cache") from None

class CachedPictures:
    """One side of the split, mapped from the cache. rows: {bucket: [(shard, row, caption), ..]}"""
    def __init__(self, cfg, rows: dict, vocabulary, teacher: bool = False):
        self.cfg, self.root, self.rows = cfg, Path(cfg.data.cache), rows
        self.vocabulary = vocabulary
        self.flat = [(bucket, row) for bucket in rows for row in rows[bucket]]
        self.teachers_empty = empty_caption(cfg, "sd3-") if teacher else None
        self.empty = None if cfg.text.kind == "own" else empty_caption(cfg)

    def __len__(self):
        return len(self.flat)

    def __getitem__(self, some: slice) -> torch.Tensor:
        """Latents of the commonest bucket, for adv_distill.py's look at the samples."""
        bucket = max(self.rows, key=lambda b: len(self.rows[b]))
        return self.latents(bucket, self.rows[bucket][some]).float()

    def captions(self) -> list[str]:
        """As the network reads them: for the small encoder cut after max_tokens."""
        captions = [caption for _, (_, _, caption) in self.flat]
        if self.empty:
            return captions
        return [self.vocabulary.shorten(c, self.cfg.text.max_tokens) for c in captions]

    def part(self, shard: int, row: int, key: str, prefix: str = "") -> torch.Tensor:
        return mapped(shard_path(self.root, shard, prefix)).get_slice(key)[row:row + 1]

    def latents(self, bucket: str, rows) -> torch.Tensor:
        """In fp16, as they are kept."""
        return torch.cat([self.part(k, i, bucket) for k, i, _ in rows])     # (B, C, h, w)

    def words(self, bucket: str, rows, drop=()):
        """Tokens, or frozen encoders' Text, of rows; the empty caption's where `drop` is True."""
        drop = drop or [False] * len(rows)
        if not self.empty:
            captions = ["" if d else c for d, (_, _, c) in zip(drop, rows, strict=True)]
            return self.vocabulary.tokenize(captions, self.cfg.text.max_tokens, cut=True)
        emb, mask, pooled = self.states(self.empty, bucket, rows, drop)
        return Text(emb.float(), mask, None if pooled is None else pooled.float())

    def states(self, empty: Text, bucket: str, rows, drop, prefix: str = "") -> Text:
        """Cached states in fp16; prefix "sd3-": the teacher's."""
        keys = [k for k in Text._fields if getattr(empty, k) is not None]
        texts = []
        for d, (shard, i, _) in zip(drop, rows, strict=True):
            own = {} if d else {k: self.part(shard, i, f"{bucket}.{k}", prefix) for k in keys}
            texts.append(empty._replace(**own))
        return join_texts(texts)

    def encode(self, captions: list[str]) -> Text:
        """In place of frozen encoders, for sample grids: states of the captions that are here."""
        where = {row[2]: (bucket, row) for bucket, row in self.flat}
        texts = []
        for caption in captions:
            bucket, row = where.get(caption, self.flat[0])
            texts.append(self.words(bucket, [row], [not caption]))
        return join_texts(texts)

    def groups(self, n: int) -> list[tuple]:
        """n pictures for validation, (latents, words) of each bucket; too few come repeatedly."""
        rows = sorted(self.flat, key=lambda r: r[0])
        by_bucket = defaultdict(list)
        for k in range(n):
            bucket, row = rows[k % len(rows)]
            by_bucket[bucket].append(row)
        return [(self.latents(b, some), self.words(b, some)) for b, some in by_bucket.items()]

    def batch(self, k: int) -> Batch:
        """Micro-batch number k of the whole run, a function of the seed and k. All micro-batches of
        an optimiser step, accumulated and of all processes, have one bucket."""
        cfg = self.cfg
        each = cfg.accumulate * (dist.get_world_size() if dist.is_initialized() else 1)
        sizes = tuple(sorted((b, len(rows)) for b, rows in self.rows.items()))
        bucket, places = whose_turn(sizes, k // each, cfg.batch * each, cfg.seed)
        first = k % each * cfg.batch
        rows = [self.rows[bucket][i] for i in places[first:first + cfg.batch]]
        rng = random.Random(f"{cfg.seed}/{k}")
        drop = [rng.random() < cfg.drop_caption for _ in rows]
        read = functools.partial(self.states, self.empty) if self.empty else self.words
        words, theirs = read(bucket, rows, drop), None      # states in fp16: half as much to send
        if cfg.text.kind == "snapgen":          # any subset of its encoders will do when sampling
            words = drop_encoders(words, cfg.text, seeded(cfg.seed * 1000003 + k))
        if self.teachers_empty:
            theirs = self.states(self.teachers_empty, bucket, rows, drop, "sd3-")
        return Batch(self.latents(bucket, rows), words, theirs)
