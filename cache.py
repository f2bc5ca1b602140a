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
import random
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from checkpoint import write_whole
from common import UserError, setup
from data import Batch, autoencoder_fingerprint, seeded, whose_turn
from decoder import encode_pictures, load_autoencoder
from pictures import Prepared, find_pictures, listing_key
from text import (
    Text,
    TextConfig,
    drop_encoders,
    join_texts,
    load_encoders,
    load_vocabulary,
    on_device,
    parts_of,
)

PIXELS = 2**21              # encoded at a time: two pictures of 1024 px, 512 of 64 px
CAPTIONS = 32               # of the text encoders, at a time


# ---------------------------------------------------------------------------- what it was made with
def cache_settings(cfg, ae) -> dict:
    d, text = cfg.data, cfg.text
    made_with = {
        "size": d.size, "bucket_step": d.bucket_step, "max_ratio": d.max_ratio,
        "max_upscale": d.max_upscale, "shard": d.shard, "text": text.kind,
        "autoencoder": autoencoder_fingerprint(ae),
    }
    if text.kind != "own":
        made_with |= {"text.folder": text.folder, "text.width": text.width,
                      "text.tokens": text.tokens, "text.leave_out": sorted(text.leave_out)}
    return made_with


def read_state(root: Path, settings: dict) -> dict | None:
    """cache.json; None where there is none. UserError where it was made with other settings."""
    path = root / "cache.json"
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
        was = {k: state["settings"].get(k) for k in settings}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is damaged ({e}): delete the directory and make the cache "
                        "again") from None
    for k, now in settings.items():
        if was[k] != now:
            raise UserError(f"{root} was made with {k}={was[k]}, the config says {now}: give "
                            "another data.cache, or delete it and make it again")
    return state


# ---------------------------------------------------------------------------- writing
def make_cache(cfg, teacher_text: TextConfig | None = None):
    """Writes what is missing of the cache of cfg.data.folder into cfg.data.cache.

    Shard k is made by rank k % world, and is the same whoever makes it. teacher_text: the text
    encoders of an SD3 teacher, whose states are added."""
    device, rank, world = setup(cfg.device)
    root, start = Path(cfg.data.cache), time.time()
    items, ae, state = begin(cfg, device, rank)
    if world > 1:
        dist.barrier()                          # the directory is there
    shards, empty = state["shards"], root / "empty.safetensors"
    there = sum(shard_path(root, k).exists() for k in range(shards))
    if rank == 0 and 0 < there < shards:
        print(f"{root}: {there} of {shards} shards are there already, going on", flush=True)
    mine = [k for k in range(rank, shards, world) if not is_whole(shard_path(root, k))]
    frozen = cfg.text.kind != "own"
    lacks_empty = frozen and rank == 0 and not is_whole(empty)
    encode = load_encoders(cfg.text, device) if frozen and (mine or lacks_empty) else None
    if lacks_empty:
        tensors = text_tensors(encode, [""])
        write_whole(empty, lambda p: save_file(tensors, p))
    n, size = write_shards(cfg, items, mine, ae, encode, device, rank > 0)
    if encode:
        encode.release()
    seconds = time.time() - start
    if teacher_text:
        add_teacher_states(root, teacher_text, device, rank, world, shards)
    if world > 1:
        dist.barrier()
    mapped.cache_clear()
    if rank > 0:
        return
    finish(cfg, state)
    if n:
        print(f"{n} pictures in {seconds:.1f} s on one process: {n / seconds:.1f} pictures/s, "
              f"{size / seconds / 1e6:.2f} MB/s read", flush=True)


def begin(cfg, device, rank: int):
    """(listing, autoencoder, what cache.json says). Checks all before the work begins."""
    d, root = cfg.data, Path(cfg.data.cache)
    if not d.folder:
        raise UserError("data.folder is not set: set it to your pictures")
    grain = 8 * 2 ** (len(cfg.model.widths) - 1)
    if cfg.arch == "mmdit":
        grain = 8 * cfg.mmdit.patch
    if d.bucket_step % grain:
        raise UserError(f"data.bucket_step={d.bucket_step}: this network wants multiples of "
                        f"{grain} pixels")
    d.check()
    items = find_pictures(d.folder)
    ae = load_autoencoder(cfg.ae, device)
    settings, listing = cache_settings(cfg, ae), listing_key(items)
    old = read_state(root, settings)
    if old and old["listing"] != listing:
        raise UserError(f"{d.cache} was made of other pictures or captions than '{d.folder}' holds "
                        "now: give another data.cache, or delete it and make it again")
    state = {"settings": settings, "listing": listing, "files": len(items),
             "shards": -(-len(items) // d.shard), "done": False}
    if dist.is_initialized():
        dist.barrier()                          # all have looked before one writes
    if rank == 0:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob("*.tmp*"):    # of a process that was killed
            leftover.unlink()
        if not old:
            write_state(root, state)
    return items, ae, state


def write_state(root: Path, state: dict):
    write_whole(root / "cache.json", lambda p: p.write_text(json.dumps(state, indent=1)))


def shard_path(root: Path, k: int, prefix: str = "") -> Path:
    return root / f"{prefix}{k:06d}.safetensors"


def is_whole(path: Path) -> bool:
    """False where a file is missing or damaged; a damaged one is deleted, and that is said."""
    try:
        with safe_open(path, "pt"):
            return True
    except FileNotFoundError:
        return False
    except SafetensorError as e:
        print(f"{path} is damaged ({e}): making it again", flush=True)
        path.unlink()
        return False


def write_shards(cfg, items, mine, ae, encode, device, quiet: bool) -> tuple[int, int]:
    """Writes the shards `mine`; returns how many pictures, and how many bytes, were read."""
    d, root, size, rows, start = cfg.data, Path(cfg.data.cache), 0, [], time.time()
    todo = [i for k in mine for i in range(k * d.shard, min(len(items), (k + 1) * d.shard))]
    loader = torch.utils.data.DataLoader(Prepared([items[i] for i in todo], d), batch_size=None,
                                         num_workers=d.workers if todo else 0)
    with tqdm(total=len(todo), desc=f"read and encode {d.folder}", unit="picture",
              disable=quiet or not todo) as bar:
        for i, (picture, words, n) in zip(todo, loader, strict=True):
            rows.append((items[i].name, picture, words))
            size += n
            bar.update()
            if (i + 1) % d.shard == 0 or i + 1 == len(items):
                write_shard(shard_path(root, i // d.shard), rows, ae, encode, device)
                rows = []
                bar.set_postfix_str(f"{size / (time.time() - start) / 1e6:.1f} MB/s read")
    return len(todo), size


def write_shard(path: Path, rows, ae, encode, device):
    """rows: (name, picture or None, caption or why not)."""
    groups, skipped = defaultdict(list), []
    for name, picture, words in rows:
        if picture is None:
            skipped.append((name, words))
        else:
            groups[tuple(picture.shape[:2])].append((name, words, picture))
    tensors, buckets = {}, {}
    for (H, W), members in sorted(groups.items()):
        key, n = f"{H}x{W}", max(1, PIXELS // (H * W))
        buckets[key] = [(name, caption) for name, caption, _ in members]
        parts = torch.stack([picture for _, _, picture in members]).split(n)    # (n, H, W, 3) each
        tensors[key] = torch.cat([encode_pictures(ae, x, device) for x in parts])   # (B, C, h, w)
        if encode:
            tensors |= text_tensors(encode, [caption for _, caption in buckets[key]], f"{key}.")
    # one key of metadata: safetensors orders several by chance
    about = {"pictures": json.dumps({"buckets": buckets, "skipped": skipped})}
    write_whole(path, lambda p: save_file(tensors, p, about))


@torch.inference_mode()
def text_tensors(encode, captions: list[str], prefix: str = "") -> dict[str, torch.Tensor]:
    """Text states on the CPU in fp16, cut where no caption has a token any more."""
    groups = [captions[i:i + CAPTIONS] for i in range(0, len(captions), CAPTIONS)]
    text = join_texts([on_device(encode(group), "cpu") for group in groups])
    L = int(text.mask.any(0).nonzero().max()) + 1
    out = {"emb": text.emb[:, :L].half(), "mask": text.mask[:, :L].bool()}
    if text.pooled is not None:
        out["pooled"] = text.pooled.half()
    if not all(torch.isfinite(x).all() for x in out.values()):
        raise UserError("a text encoder's states are not finite in fp16: run it in float32 or "
                        "bfloat16, or scale them")
    return {prefix + k: v.contiguous() for k, v in out.items()}


def add_teacher_states(root: Path, cfg: TextConfig, device, rank: int, world: int, shards: int):
    """Adds the states of a teacher's encoders beside each shard that lacks them."""
    files = {shard_path(root, k, "sd3-"): read_shard(root, k)["buckets"]
             for k in range(rank, shards, world)}
    if rank == 0:
        files[root / "sd3-empty.safetensors"] = {}
    todo = {path: members for path, members in files.items()
            if not is_whole(path) or states_of(path) != states_key(cfg, members)}
    if not todo:
        return

    with load_encoders(cfg, device) as encoders:
        def encode(captions):
            text = encoders(captions)
            return text._replace(mask=torch.ones_like(text.mask))   # SD3 reads its padding too

        for path, members in tqdm(todo.items(), "states of the teacher's text encoders",
                                  unit="shard", disable=rank > 0):
            tensors = {} if members else text_tensors(encode, [""])
            for key, rows in members.items():
                tensors |= text_tensors(encode, [caption for _, caption in rows], f"{key}.")
            about = {"states": states_key(cfg, members)}
            write_whole(path, functools.partial(save_file, tensors, metadata=about))


def states_key(cfg: TextConfig, members: dict) -> str:
    """Names the encoders (not the teacher: SD3.5-Large and its Turbo share them) and captions."""
    what = json.dumps([cfg.width, cfg.tokens, sorted(cfg.leave_out), members])
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def states_of(path: Path) -> str | None:
    """The key that a file has; None where it is missing or damaged."""
    with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError):
        return safe_open(path, "pt").metadata()["states"]


def finish(cfg, state: dict):
    """Writes skipped.txt and cache.json's `done`, prints what is in the cache."""
    root, shapes, skipped, long = Path(cfg.data.cache), Counter(), [], 0
    vocabulary = load_vocabulary(pattern=cfg.text.pattern)
    for k in range(state["shards"]):
        about = read_shard(root, k)
        skipped += about["skipped"]
        for key, members in about["buckets"].items():
            shapes[key] += len(members)
            if cfg.text.kind == "own":
                lengths = [len(vocabulary.ids_of(caption)) for _, caption in members]
                long += sum(n > cfg.text.max_tokens for n in lengths)
    path, lines = root / "skipped.txt", "".join(f"{name}\t{why}\n" for name, why in skipped)
    write_whole(path, lambda p: p.write_bytes(lines.encode(errors="surrogateescape")))
    if not shapes:
        raise UserError(f"none of the {len(skipped)} pictures of '{cfg.data.folder}' can be used; "
                        f"{path} says why, the first: {': '.join(skipped[0])}")
    shapes = dict(sorted(shapes.items()))
    n = sum(shapes.values())
    write_state(root, {**state, "done": True, "pictures": n, "skipped": len(skipped),
                       "buckets": shapes})
    reasons = Counter(why.split(":")[0] for _, why in skipped).most_common()
    why = ", ".join(f"{m} {reason}" for reason, m in reasons)
    listed = f"{len(skipped)} skipped ({why}), listed in {path}" if skipped else "none skipped"
    print(f"{root}: {n} pictures, {listed}")
    print("buckets, height x width: " + ", ".join(f"{k} {m}" for k, m in shapes.items()))
    if long:
        print(f"{long} captions have more than text.max_tokens={cfg.text.max_tokens} tokens: "
              "their ends are not read", flush=True)


# ---------------------------------------------------------------------------- reading
@functools.lru_cache(256)
def mapped(path: Path):
    return safe_open(path, "pt")


def read_shard(root: Path, k: int) -> dict:
    """Shard k: {"buckets": {bucket: [(name, caption), ..]}, "skipped": [(name, why), ..]}."""
    try:
        return json.loads(safe_open(shard_path(root, k), "pt").metadata()["pictures"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{shard_path(root, k)} is missing or damaged ({e}): run the same command "
                        "with --cache, which makes it again") from None


def name_hash(name: str) -> int:
    """32 bits."""
    sha = hashlib.sha256(name.encode(errors="surrogateescape"))
    return int(sha.hexdigest()[:8], 16)


def open_cache(cfg, ae=None, teacher_text: TextConfig | None = None, vocabulary=None):
    """(pictures to train on, pictures held out by a hash of their names, at least one).

    Without the autoencoder: whatever the cache was made with. teacher_text: the states of these
    encoders are wanted too. vocabulary: by default that of assets/."""
    root = Path(cfg.data.cache)
    state = read_state(root, cache_settings(cfg, ae) if ae else {})
    if not state or not state["done"]:
        lack = "not whole yet" if state else "not there"
        raise UserError(f"the cache {root} is {lack}: run the same command with --cache first")
    rows, lacking = [], 0
    for k in range(state["shards"]):
        buckets = read_shard(root, k)["buckets"]
        if teacher_text:
            lacking += states_of(shard_path(root, k, "sd3-")) != states_key(teacher_text, buckets)
        rows += [(name, bucket, (k, i, caption)) for bucket, members in buckets.items()
                 for i, (name, caption) in enumerate(members)]
    if lacking:
        raise UserError(f"the cache {root} lacks the teacher's text states of {lacking} of "
                        f"{state['shards']} shards, or has those of other encoders: run the same "
                        "command with --cache, which adds them and encodes no picture again")
    below = cfg.data.held_out * 2**32
    held_out = {name for name, *_ in rows if name_hash(name) < below}
    held_out = held_out or {min((name for name, *_ in rows), key=name_hash)}
    sides = defaultdict(list), defaultdict(list)        # {bucket: [(shard, row, caption), ..]}
    for name, bucket, row in rows:
        sides[name in held_out][bucket].append(row)
    vocabulary = vocabulary or load_vocabulary(pattern=cfg.text.pattern)
    train = CachedPictures(cfg, sides[0], vocabulary, bool(teacher_text))
    return train, CachedPictures(cfg, sides[1], vocabulary)


def empty_caption(cfg, prefix: str = "") -> Text:
    """The cached states of the empty caption; prefix "sd3-": the teacher's."""
    path = Path(cfg.data.cache) / f"{prefix}empty.safetensors"
    try:
        return Text(**load_file(path))
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is missing or damaged ({e}): run the same command with "
                        "--cache") from None


class CachedPictures:
    """One side of the split, mapped from the cache.

    rows: {bucket: [(shard, row, caption), ..]}"""

    def __init__(self, cfg, rows: dict, vocabulary, teacher: bool = False):
        self.cfg, self.root, self.rows = cfg, Path(cfg.data.cache), rows
        self.vocabulary = vocabulary
        self.teachers_empty = empty_caption(cfg, "sd3-") if teacher else None
        self.empty = None if cfg.text.kind == "own" else empty_caption(cfg)
        if self.empty and self.empty.emb.shape[2] != cfg.text.width:
            raise UserError(f"the cache's text states are {self.empty.emb.shape[2]} wide, "
                            f"text.width is {cfg.text.width}: set it and the context_dim to that")

    def __len__(self):
        return sum(map(len, self.rows.values()))

    def __getitem__(self, some: slice) -> torch.Tensor:
        """Latents of the commonest bucket, for adv_distill.py's look at the samples."""
        bucket = max(self.rows, key=lambda b: len(self.rows[b]))
        return self.latents(bucket, self.rows[bucket][some])

    def captions(self) -> list[str]:
        """As the network reads them: for the small encoder cut after max_tokens."""
        captions = [caption for rows in self.rows.values() for _, _, caption in rows]
        if self.empty:
            return captions
        return [self.vocabulary.shorten(c, self.cfg.text.max_tokens) for c in captions]

    def part(self, shard: int, row: int, key: str, prefix: str = "") -> torch.Tensor:
        return mapped(shard_path(self.root, shard, prefix)).get_slice(key)[row:row + 1]

    def latents(self, bucket: str, rows) -> torch.Tensor:
        return torch.cat([self.part(k, i, bucket) for k, i, _ in rows]).float()     # (B, C, h, w)

    def words(self, bucket: str, rows, drop=()):
        """Tokens, or Text of frozen encoders, of these rows' captions; the empty caption's for
        those rows that `drop` has True for."""
        drop = drop or [False] * len(rows)
        if not self.empty:
            captions = ["" if d else c for d, (_, _, c) in zip(drop, rows, strict=True)]
            return self.vocabulary.tokenize(captions, self.cfg.text.max_tokens, cut=True)
        emb, mask, pooled = self.states(self.empty, bucket, rows, drop)
        if self.cfg.arch != "mmdit" or pooled is None:
            return Text(emb.float(), mask)
        return Text(emb.float(), mask, pooled.float())

    def states(self, empty: Text, bucket: str, rows, drop, prefix: str = "") -> Text:
        """Cached states in fp16; prefix "sd3-": the teacher's."""
        keys = [k for k in Text._fields if getattr(empty, k) is not None]
        texts = []
        for d, (shard, i, _) in zip(drop, rows, strict=True):
            own = {} if d else {k: self.part(shard, i, f"{bucket}.{k}", prefix) for k in keys}
            texts.append(empty._replace(**own))
        return join_texts(texts)

    def encode(self, captions: list[str]) -> Text:
        """In place of frozen encoders, for the sample grids: the cached states of captions that
        are in here, or of the empty one."""
        where = {row[2]: (bucket, row) for bucket, rows in self.rows.items() for row in rows}
        any_row = next(iter(where.values()))
        texts = []
        for caption in captions:
            bucket, row = where[caption] if caption else any_row
            texts.append(self.words(bucket, [row], [not caption]))
        return join_texts(texts)

    def groups(self, n: int) -> list[tuple]:
        """n pictures for validation, (latents, words) bucket by bucket; where there are fewer, each
        several times."""
        rows = [(bucket, row) for bucket in sorted(self.rows) for row in self.rows[bucket]]
        by_bucket = defaultdict(list)
        for bucket, row in (rows * -(-n // len(rows)))[:n]:
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
        words, theirs = self.words(bucket, rows, drop), None
        if cfg.text.kind == "snapgen":          # any subset of its encoders will do when sampling
            words = drop_encoders(words, parts_of(cfg.text), seeded(cfg.seed * 1000003 + k))
        if self.teachers_empty:
            theirs = self.states(self.teachers_empty, bucket, rows, drop, "sd3-")
        return Batch(self.latents(bucket, rows), words, theirs)
