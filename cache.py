"""The cache of your own pictures: latents and text states, written once -> batches for train.py, which then loads no encoder.

    python data.py --cache --config configs/folder.toml [key=value ...]     writes it; killed, it goes on where it was; torchrun shares the work

The cache: NNNNNN.safetensors, each `data.shard` pictures of the listing; in it, for every bucket, `HxW` with the latents (n, C, H/8, W/8) in fp16, and in the metadata the names and
captions. With frozen text encoders also `HxW.emb` (n, L, D) and `HxW.pooled` (n, P) in fp16 and `HxW.mask` (n, L), and empty.safetensors with those of the empty caption; with a teacher
of SD3's its states, in files of their own beside these, sd3-NNNNNN.safetensors and sd3-empty.safetensors. Files are mapped, not loaded. cache.json says what the cache was made with: another autoencoder or other pictures want another directory.
"""
import contextlib, functools, hashlib, json, random, time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from checkpoint import sync
from common import UserError, setup
from data import encode_pictures
from pictures import Prepared, buckets, find_pictures
from text import Text, TextConfig, drop_encoders, encoding, join, parts_of, tokenize

PIXELS = 2**21              # encoded at a time: two pictures of 1024 px, 512 of 64 px
CAPTIONS = 32               # of the text encoders, at a time


# ---------------------------------------------------------------------------- the cache, written
def settings(cfg, ae) -> dict:
    """What makes a cache another cache."""
    d = cfg.data
    return {"size": d.size, "bucket_step": d.bucket_step, "max_ratio": d.max_ratio, "max_upscale": d.max_upscale, "shard": d.shard, "text": cfg.text.kind, "autoencoder": fingerprint(ae)}


def fingerprint(ae) -> str:
    return f"{sum(p.double().sum().item() for p in ae.encoder.parameters()):.9f}"


def write(path: Path, save):
    """All or nothing: a temporary file, synced, renamed."""
    tmp = path.with_name(path.name + ".tmp")
    save(tmp)
    sync(tmp)
    tmp.rename(path)
    sync(path.parent)


def read_state(cfg, ae=None) -> dict | None:
    """cache.json; None where there is none. UserError where it was made with other settings (without the autoencoder, nothing is compared)."""
    path = Path(cfg.data.cache) / "cache.json"
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
        wrong = [(k, state["settings"].get(k), v) for k, v in settings(cfg, ae).items() if state["settings"].get(k) != v] if ae else []
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is damaged ({e}): delete the directory and make the cache again")
    if wrong:
        raise UserError(f"{cfg.data.cache} was made with {wrong[0][0]}={wrong[0][1]}, the config says {wrong[0][2]}: give another data.cache, or delete it and make it again")
    return state


def make_cache(cfg, teacher: TextConfig | None = None):
    """Writes what is missing of the cache of cfg.data.folder into cfg.data.cache; `teacher`: and of its states. Shard k is made by rank k % world, and is the same whoever makes it."""
    from decoder import load_autoencoder
    device, rank, world = setup(cfg.device)
    d, root, start = cfg.data, Path(cfg.data.cache), time.time()
    if not d.folder:
        raise UserError("data.folder is not set: give your pictures, such as data.folder=mypictures")
    grain = 8 * cfg.mmdit.patch if cfg.arch == "mmdit" else 8 * 2 ** (len(cfg.model.widths) - 1)
    if d.bucket_step % grain or d.shard < 1:
        raise UserError(f"data.bucket_step={d.bucket_step}: this network wants multiples of {grain} pixels; and data.shard 1 or more")
    buckets(d.size, d.bucket_step, d.max_ratio)                 # complains before the work begins
    items = find_pictures(d.folder)
    if not items:
        raise UserError(f"no pictures in '{d.folder}': it wants x.jpg, .jpeg, .png or .webp with captions in x.txt, captions.jsonl or metadata.jsonl, or tars of them")
    ae = load_autoencoder(cfg.ae, device)
    listing = hashlib.sha256(json.dumps([(i.name, i.picture[2:3], i.caption[2:3] if isinstance(i.caption, tuple) else i.caption) for i in items]).encode()).hexdigest()[:16]
    old = read_state(cfg, ae)
    if old and old["listing"] != listing:
        raise UserError(f"{d.cache} was made of other pictures than '{d.folder}' holds now (files were added, changed or removed): give another data.cache, or delete it and make it again")
    if world > 1:
        dist.barrier()                                          # all have looked before one writes
    state = {"settings": settings(cfg, ae), "listing": listing, "files": len(items), "shards": -(-len(items) // d.shard), "done": False}
    shard = lambda k: root / f"{k:06d}.safetensors"
    if rank == 0 and not old:
        root.mkdir(parents=True, exist_ok=True)
        write(root / "cache.json", lambda p: p.write_text(json.dumps(state, indent=1)))
    if world > 1:
        dist.barrier()
    missing = [k for k in range(state["shards"]) if not shard(k).exists()]
    mine = [k for k in missing if k % world == rank]
    encode = None
    if cfg.text.kind != "own" and (mine or (rank == 0 and not (root / "empty.safetensors").exists())):
        import text
        encode = text.load_encoders(cfg.text, device)
        if rank == 0:
            write(root / "empty.safetensors", lambda p: save_file(text_tensors(encode, [""]), p))
    todo = [i for k in mine for i in range(k * d.shard, min(len(items), (k + 1) * d.shard))]
    if rank == 0 and 0 < len(missing) < state["shards"]:
        print(f"{d.cache}: {state['shards'] - len(missing)} of {state['shards']} shards are there already, going on", flush=True)
    loader = torch.utils.data.DataLoader(Prepared([items[i] for i in todo], d), batch_size=None, num_workers=d.workers if todo else 0)
    rows, size = [], 0
    with tqdm(total=len(todo), desc=f"read and encode {d.folder}", unit="picture", disable=rank > 0) as bar:
        for i, (picture, words, n) in zip(todo, loader):
            rows.append((items[i].name, picture, words))
            size += n
            bar.update()
            if (i + 1) % d.shard == 0 or i + 1 == len(items):
                tensors, about = shard_of(rows, ae, encode, device)
                write(shard(i // d.shard), lambda p: save_file(tensors, p, {"pictures": json.dumps(about)}))    # one key of metadata: safetensors orders several by chance
                rows = []
                bar.set_postfix_str(f"{size / (time.time() - start) / 1e6:.1f} MB/s read")
    if encode:
        encode.release()
    seconds = time.time() - start
    if teacher:
        add_states(root, teacher, device, rank, world, state["shards"])
    if world > 1:
        dist.barrier()
    if rank > 0:
        return
    if gone := [k for k in range(state["shards"]) if not shard(k).exists()]:
        raise UserError(f"{shard(gone[0])} is missing: another process broke off; run the same command again")
    finish(cfg, state)
    if todo:
        own = f" (this process of {world})" * (world > 1)
        print(f"{len(todo)} pictures in {seconds:.1f} s: {len(todo) / seconds:.1f} pictures/s, {size / seconds / 1e6:.2f} MB/s read{own}", flush=True)


def shard_of(rows, ae, encode, device) -> tuple[dict, dict]:
    """Rows of (name, picture or None, caption or why not) -> the tensors of a shard, and what its metadata says: names and captions by bucket, what was skipped."""
    tensors, about, groups = {}, {"buckets": {}, "skipped": [[name, words] for name, picture, words in rows if picture is None]}, defaultdict(list)
    for name, picture, words in rows:
        if picture is not None:
            groups[tuple(picture.shape[:2])].append((name, words, picture))
    for (H, W), members in sorted(groups.items()):
        key, n = f"{H}x{W}", max(1, PIXELS // (H * W))
        about["buckets"][key] = [[name, caption] for name, caption, _ in members]
        tensors[key] = torch.cat([encode_pictures(ae, torch.stack([p for _, _, p in members[i:i + n]]), device) for i in range(0, len(members), n)])    # (n, C, H/8, W/8)
        if encode:
            tensors |= text_tensors(encode, [caption for _, caption, _ in members], key + ".")
    return tensors, about


@torch.inference_mode()
def text_tensors(encode, captions: list[str], prefix: str = "") -> dict:
    """States of frozen encoders, on the CPU in fp16, cut where no caption has a token any more."""
    text = join([Text(*(x if x is None else x.cpu() for x in encode(captions[i:i + CAPTIONS]))) for i in range(0, len(captions), CAPTIONS)])
    L = int(text.mask.any(0).nonzero().max()) + 1
    out = {"emb": text.emb[:, :L].half(), "mask": text.mask[:, :L].bool(), **({} if text.pooled is None else {"pooled": text.pooled.half()})}
    if not all(torch.isfinite(x).all() for x in out.values()):
        raise UserError("a text encoder's states are not finite in fp16: run it in float32 or bfloat16, or scale them")
    return {prefix + k: v.contiguous() for k, v in out.items()}


def add_states(root: Path, cfg: TextConfig, device, rank: int, world: int, shards: int):
    """The states of a teacher's encoders beside each shard that lacks them: pictures are neither read nor encoded again."""
    import text
    todo = [(root / f"sd3-{k:06d}.safetensors", about["buckets"]) for k, about in enumerate(read_shards(root, shards, rank, world))] + [(root / "sd3-empty.safetensors", {})] * (rank == 0)
    todo = [(path, members) for path, members in todo if states_of(path) != states_key(cfg, members)]
    with text.load_encoders(cfg, device) if todo else contextlib.nullcontext() as encoders:
        encode = lambda captions: (lambda x: x._replace(mask=torch.ones_like(x.mask)))(encoders(captions))      # SD3 reads its padding too
        for path, members in tqdm(todo, "states of the teacher's text encoders", unit="shard", disable=rank > 0):
            tensors = {k: v for key, rows in members.items() for k, v in text_tensors(encode, [caption for _, caption in rows], key + ".").items()} or text_tensors(encode, [""])
            write(path, lambda p: save_file(tensors, p, {"states": states_key(cfg, members)}))


def states_key(cfg: TextConfig, members: dict) -> str:
    """What a file of a teacher's states holds: by which encoders (not by which teacher: SD3.5-Large and its Turbo share them), of which captions."""
    return hashlib.sha256(json.dumps([cfg.width, cfg.tokens, sorted(cfg.leave_out), members]).encode(errors="surrogateescape")).hexdigest()[:16]


def states_of(path: Path) -> str | None:
    """The key that a file has; None where it is missing or damaged."""
    with contextlib.suppress(Exception), safe_open(path, "pt") as f:
        return f.metadata()["states"]


def finish(cfg, state):
    """skipped.txt, the counts on the screen, and cache.json's `done`."""
    root, shapes, skipped, long = Path(cfg.data.cache), Counter(), [], 0
    for about in read_shards(root, state["shards"]):
        skipped += about["skipped"]
        for key, members in about["buckets"].items():
            shapes[key] += len(members)
            if cfg.text.kind == "own":
                long += sum(len(ids) >= cfg.text.max_tokens for ids in encoding().encode_ordinary_batch([" " + c.lower() for _, c in members]))
    write(root / "skipped.txt", lambda p: p.write_text("".join(f"{name}\t{why}\n" for name, why in skipped), encoding="utf-8", errors="surrogateescape"))
    if not shapes:
        raise UserError(f"none of the {len(skipped)} pictures of '{cfg.data.folder}' can be used; {root / 'skipped.txt'} says why, the first: {': '.join(skipped[0])}")
    write(root / "cache.json", lambda p: p.write_text(json.dumps({**state, "done": True, "pictures": shapes.total(), "skipped": len(skipped), "buckets": dict(sorted(shapes.items()))}, indent=1)))
    why = Counter(why.split(":")[0] for _, why in skipped)
    print(f"{cfg.data.cache}: {shapes.total()} pictures" + (f", {len(skipped)} skipped (" + ", ".join(f"{n} {w}" for w, n in why.most_common()) + f"), listed in {root / 'skipped.txt'}" if skipped else ", none skipped"))
    print("buckets, height x width: " + ", ".join(f"{k} {n}" for k, n in sorted(shapes.items())), flush=True)
    if long:
        print(f"{long} captions have more than text.max_tokens={cfg.text.max_tokens} tokens: their ends are not read", flush=True)


# ---------------------------------------------------------------------------- the cache, read
@functools.lru_cache(256)
def mapped(path: Path):
    return safe_open(path, "pt")


def read_shards(root: Path, n: int, first: int = 0, step: int = 1):
    for k in range(first, n, step):
        try:
            with safe_open(root / f"{k:06d}.safetensors", "pt") as f:
                yield json.loads(f.metadata()["pictures"])
        except Exception as e:                                  # missing, cut short, another file
            raise UserError(f"{root / f'{k:06d}.safetensors'} is missing or damaged ({e}): delete it and run `python data.py --cache` again")


def name_hash(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()


def is_held_out(name: str, share: float) -> bool:
    return int(name_hash(name)[:8], 16) < share * 2**32


def open_cache(cfg, ae=None, teacher: TextConfig | None = None) -> tuple["Pictures", "Pictures"]:
    """The pictures to train on, and those held out by a hash of their names (one at least). Without the autoencoder: whatever it was made with. teacher: its states are wanted too."""
    root, state = Path(cfg.data.cache), read_state(cfg, ae)
    if not state or not state["done"]:
        raise UserError(f"the cache {root} is {'not whole yet' if state else 'not there'}: run `python data.py --cache` with this config")
    shards = list(read_shards(root, state["shards"]))
    if bad := [k for k, about in enumerate(shards) if teacher and states_of(root / f"sd3-{k:06d}.safetensors") != states_key(teacher, about["buckets"])]:
        raise UserError(f"the cache {root} lacks the teacher's text states of {len(bad)} of {len(shards)} shards, or has those of other encoders: run `python data.py --cache` with this config, "
                        "which adds them and encodes no picture again")
    rows = [(name, caption, bucket, shard, row) for shard, about in enumerate(shards) for bucket, members in about["buckets"].items() for row, (name, caption) in enumerate(members)]
    held_out = {r for r in rows if is_held_out(r[0], cfg.data.held_out)} or {min(rows, key=lambda r: name_hash(r[0]))}
    return Pictures(cfg, [r for r in rows if r not in held_out], teacher), Pictures(cfg, [r for r in rows if r in held_out])


def empty_caption(cfg, prefix: str = "") -> Text:
    """Its cached states; prefix "sd3-": the teacher's."""
    path = Path(cfg.data.cache) / f"{prefix}empty.safetensors"
    try:
        return Text(**load_file(path))
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is missing or damaged ({e}): run `python data.py --cache` with this config")


class Pictures:
    """One side of the split, mapped from the cache."""

    def __init__(self, cfg, rows, teacher=None):
        self.cfg, self.root, self.rows = cfg, Path(cfg.data.cache), defaultdict(list)       # bucket -> [(shard, row, caption)]
        for _, caption, bucket, shard, row in rows:
            self.rows[bucket].append((shard, row, caption))
        self.empty, self.teachers_empty = None, empty_caption(cfg, "sd3-") if teacher else None
        if cfg.text.kind != "own":
            self.empty = empty_caption(cfg)
            if self.empty.emb.shape[2] != cfg.text.width:
                raise UserError(f"the cache's text states are {self.empty.emb.shape[2]} wide: set text.width and the network's context_dim to that (now {cfg.text.width})")

    def __len__(self):
        return sum(map(len, self.rows.values()))

    def __getitem__(self, some: slice) -> torch.Tensor:
        """Latents of the commonest bucket, for adv_distill.py's look at the samples."""
        bucket = max(self.rows, key=lambda b: len(self.rows[b]))
        return self.take(bucket, self.rows[bucket][some])[0]

    def captions(self) -> list[str]:
        return [caption for rows in self.rows.values() for _, _, caption in rows]

    def take(self, bucket: str, rows, drop=()) -> tuple[torch.Tensor, ...]:
        """Latents (B, C, H, W) of these rows, and what the network reads of their captions: ids and mask (B, L), or emb (B, L, D), mask and an MMDiT's pooled (B, P).
        Those rows that `drop` has True for read the empty caption."""
        x0, drop = torch.cat([self.part(shard, row, bucket) for shard, row, _ in rows]).float(), drop or [False] * len(rows)
        if self.empty is None:
            return x0, *tokenize(["" if d else caption for d, (_, _, caption) in zip(drop, rows)], self.cfg.text.max_tokens, cut=True)
        text = self.states(self.empty, bucket, rows, drop)
        return x0, text.emb.float(), text.mask, *([text.pooled.float()] if self.cfg.arch == "mmdit" and text.pooled is not None else [])

    def part(self, shard: int, row: int, key: str, prefix: str = "") -> torch.Tensor:
        return mapped(self.root / f"{prefix}{shard:06d}.safetensors").get_slice(key)[row:row + 1]

    def states(self, empty: Text, bucket: str, rows, drop, prefix: str = "") -> Text:
        """Of these rows' captions, where `drop` says so of the empty one; prefix "sd3-": the teacher's."""
        keys = [k for k in Text._fields if getattr(empty, k) is not None]
        return join([empty if d else Text(**{k: self.part(shard, row, f"{bucket}.{k}", prefix) for k in keys}) for d, (shard, row, _) in zip(drop, rows)])

    def encode(self, captions: list[str]) -> Text:
        """The cached states of captions that are in here, or of the empty one: in place of the encoders, for the sample grids."""
        where = {caption: (bucket, (shard, row, caption)) for bucket, rows in self.rows.items() for shard, row, caption in rows}
        some = next(iter(where.values()))
        return join([Text(*self.take(*(where[c][0], [where[c][1]]) if c else (some[0], [some[1]], [True]))[1:]) for c in captions])

    def groups(self, n: int) -> list[tuple[torch.Tensor, ...]]:
        """n of them for validation, bucket by bucket; where there are fewer, each several times, for other noises and times."""
        every = [(bucket, row) for bucket, rows in sorted(self.rows.items()) for row in rows]
        chosen = sorted((every * -(-n // len(every)))[:n], key=lambda p: p[0])
        return [self.take(b, [row for bucket, row in chosen if bucket == b]) for b in dict.fromkeys(b for b, _ in chosen)]

    def batch(self, k: int, rank: int, world: int) -> tuple[torch.Tensor, ...]:
        """Micro-batch number k of a process: a function of the seed and of its number in the whole run. An optimiser step, of all processes and accumulated, has one bucket.
        What take() gives, and behind it a teacher's emb, mask and pooled where it has states here (Teacher.own in distill.py parts them)."""
        cfg, k = self.cfg, k * world + rank
        group = self.cfg.accumulate * max(world, dist.get_world_size() if dist.is_initialized() else 1)    # micro-batches a step
        bucket, places = whose_turn(tuple(sorted((b, len(r)) for b, r in self.rows.items())), k // group, cfg.batch * group, cfg.seed)
        rng, first = random.Random(f"{cfg.seed}/{k}"), k % group * cfg.batch
        rows = [self.rows[bucket][i] for i in places[first:first + cfg.batch]]
        drop = [rng.random() < cfg.drop_caption for _ in rows]
        x0, states, mask, *pooled = self.take(bucket, rows, drop)
        if cfg.text.kind == "snapgen":                          # any subset of its encoders will do when sampling
            states, mask, _ = drop_encoders(Text(states, mask), parts_of(cfg.text), torch.Generator().manual_seed(cfg.seed * 1000003 + k))
        theirs = self.states(self.teachers_empty, bucket, rows, drop, "sd3-") if self.teachers_empty else ()
        return x0, states, mask, *pooled, *theirs


@functools.lru_cache(256)
def shuffled(n: int, *seed) -> np.ndarray:
    g = torch.Generator().manual_seed(int(hashlib.sha256(repr(seed).encode()).hexdigest()[:15], 16))
    return torch.randperm(n, generator=g).numpy()


def whose_turn(sizes: tuple[tuple[str, int], ...], k: int, batch: int, seed: int) -> tuple[str, list[int]]:
    """Global batch k -> its bucket and the places in it. Each bucket is an endless row of epochs, each in an order of its own, cut into whole batches: nothing is dropped or
    repeated at an epoch's end, even in a bucket smaller than a batch, whose turn then comes every few epochs. Until epoch e bucket b had floor(e n_b / batch) turns; those of an
    epoch come in an order drawn from (seed, epoch)."""
    until = lambda e: sum(e * n // batch for _, n in sizes)
    epoch = k * batch // sum(n for _, n in sizes)               # or later: the floors delay
    while until(epoch + 1) <= k:
        epoch += 1
    turns = np.repeat(np.arange(len(sizes)), [(epoch + 1) * n // batch - epoch * n // batch for _, n in sizes])
    turns, turn = turns[shuffled(len(turns), seed, epoch)], k - until(epoch)
    bucket, n = sizes[turns[turn]]
    j = epoch * n // batch + int((turns[:turn] == turns[turn]).sum())
    return bucket, [int(shuffled(n, seed, bucket, p // n)[p % n]) for p in range(j * batch, (j + 1) * batch)]
