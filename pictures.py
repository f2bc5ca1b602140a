"""Your own pictures: what lies in a folder or in tar shards, read and put into buckets. cache.py encodes it once, for train.py.

    python data.py --export DIR 200 [1536]                                  a folder to try it with: scenes of ragged sizes up to 192 (1536) px, ten broken files among them
    python data.py --cache --config configs/folder.toml [key=value ...]     writes the cache; killed, it goes on where it was; torchrun shares the work

Read are x.jpg, .jpeg, .png and .webp with the caption in x.txt, or in captions.jsonl ({"file": .., "caption": ..}) or metadata.jsonl ({"file_name": .., "text": ..}), or in x.json
({"caption": ..}); and tar files of such pairs (webdataset's). What cannot be used is skipped, and listed in the cache's skipped.txt.
"""
import functools, io, json, posixpath, random, re, tarfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from common import UserError
from data import DataConfig, Scenes

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
OTHERS = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jxl")


# ---------------------------------------------------------------------------- listing
class Item(NamedTuple):
    name: str
    picture: tuple = ()         # where its bytes lie: (file, offset, size, suffix)
    caption: str | tuple = ""   # itself, or where it lies
    reason: str = ""            # why it cannot be used, where the listing knows


class Unusable(Exception):
    """A picture that is skipped; says why."""


def find_pictures(folder: str) -> list[Item]:
    """Everything in a folder (and the folders in it), or in one tar, in order of the names; the same on every machine."""
    root = Path(folder).expanduser()
    if not root.exists():
        raise UserError(f"no folder of pictures at '{folder}': set data.folder to a directory of x.jpg + x.txt, or to a tar")
    if root.is_file():
        return list_tar(root, root.name)
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if not p.name.startswith(".") and p.is_file()}     # hidden: "._x.jpg" of a Mac is no picture
    items, captions = [], {}
    place = lambda name: (str(files[name]), 0, files[name].stat().st_size, files[name].suffix.lower())
    for name in sorted(n for n in files if posixpath.basename(n) in ("captions.jsonl", "metadata.jsonl")):
        for k, line in enumerate(files[name].read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else {}
                file, caption = row.get("file_name", row.get("file")), row.get("text", row.get("caption"))
                if row:
                    captions[posixpath.normpath(posixpath.join(posixpath.dirname(name), file))] = caption + ""      # a TypeError unless both are strings
            except (ValueError, TypeError, AttributeError):
                items.append(Item(f"{name}:{k}", reason='no caption: the line is no {"file": "x.jpg", "caption": "..."}'))
    items += [Item(name, reason="no picture: a jsonl names it, but there is no such file") for name in captions if name not in files]
    for name in sorted(files):
        stem, suffix = posixpath.splitext(name)
        suffix = suffix.lower()
        if suffix in SUFFIXES:
            text, js = stem + ".txt", stem + ".json"
            items.append(Item(name, place(name), place(text) if text in files else captions.get(name) or (place(js) if js in files else "")))
        elif suffix == ".tar":
            items += list_tar(files[name], name)
        elif name.endswith((".tar.gz", ".tgz")):
            items.append(Item(name, reason="another format: a compressed tar; unpack it to a .tar"))
        elif suffix in OTHERS:
            items.append(Item(name, reason=f"another format: save {suffix} as jpg, png or webp"))
    return items


def list_tar(path: Path, name: str) -> list[Item]:
    """Webdataset's convention: members that are equal up to the first dot of their file name belong together. Where their bytes lie is noted, nothing is unpacked."""
    groups, cut = defaultdict(dict), []
    try:
        with tarfile.open(path, "r:") as tar:
            for m in tar:
                folder, file = posixpath.split(m.name)
                key, dot, suffix = file.partition(".")
                if m.isfile() and key:
                    groups[posixpath.join(folder, key)]["." + suffix.lower()] = m.name, (str(path), m.offset_data, m.size, "." + suffix.lower())
    except (tarfile.TarError, OSError) as e:
        cut = [Item(name, reason=f"broken: the tar ends or breaks off here ({e})")]
    items = []
    for parts in groups.values():
        caption = parts.get(".txt") or parts.get(".json") or ("", "")
        items += [Item(f"{name}/{member}", place, caption[1]) for suffix, (member, place) in parts.items() if suffix in SUFFIXES]
        items += [Item(f"{name}/{member}", reason=f"another format: save {suffix} as jpg, png or webp") for suffix, (member, _) in parts.items() if suffix in OTHERS]
    return items + cut


def read(place: tuple) -> bytes:
    with open(place[0], "rb") as f:
        f.seek(place[1])
        return f.read(place[2])


def caption_of(item: Item) -> str:
    caption = item.caption
    if isinstance(caption, tuple):
        try:
            text = read(caption).decode("utf-8-sig")
            if caption[3] == ".json":
                row = json.loads(text)
                text = row.get("caption", row.get("text")) or ""
            caption = text + ""
        except (ValueError, TypeError, AttributeError):         # of UTF-8, of JSON, of what it holds
            raise Unusable('no caption: its file is not UTF-8, or no {"caption": "..."}')
    caption = " ".join(caption.split())
    if not caption:
        raise Unusable("no caption")
    return caption


# ---------------------------------------------------------------------------- pictures into buckets
@functools.lru_cache
def buckets(size: int, step: int, ratio: float) -> list[tuple[int, int]]:
    """(height, width) in pixels: multiples of `step` whose area is nearest to size^2, up to so long ones; each with its transpose."""
    if size % step or step % 8 or ratio < 1:
        raise UserError(f"data.size={size} must be a multiple of data.bucket_step={step}, that one of 8, and data.max_ratio={ratio:g} at least 1")
    sides = [(short, max(1, round(size * size / short / step)) * step) for short in range(step, size + 1, step)]
    return sorted({b for short, long in sides if long <= ratio * short for b in ((short, long), (long, short))})


def bucket_of(height: int, width: int, cfg: DataConfig) -> tuple[int, int]:
    """The bucket nearest in aspect ratio: a function of the picture's size and the config alone."""
    return min(buckets(cfg.size, cfg.bucket_step, cfg.max_ratio), key=lambda b: abs(np.log(b[0] * width / (b[1] * height))))


def to_bucket(data: bytes, cfg: DataConfig) -> np.ndarray:
    """An encoded picture -> uint8 (H, W, 3), H and W those of its bucket: upright, on white, 8 bits, RGB; scaled until it covers the bucket, and its middle cut out."""
    if not data:
        raise Unusable("broken: an empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            w, h = image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size         # EXIF orientations 5 to 8 lie on their side
            H, W = bucket_of(h, w, cfg)
            if max(H / h, W / w) > cfg.max_upscale:
                raise Unusable(f"too small: {w}x{h} for {W}x{H}")
            image.draft(None, (2 * max(H, W),) * 2)             # a JPEG much too large is decoded at a half, a quarter or an eighth: several times faster
            image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                          # 16 bits of grey (Pillow itself reads those of colour as 8)
            image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        image = image.convert("RGB")
        scale = min(image.width / W, image.height / H)
        w, h = min(image.width, W * scale), min(image.height, H * scale)
        x, y = (image.width - w) / 2, (image.height - h) / 2
        image = image.resize((W, H), Image.Resampling.LANCZOS, box=(x, y, min(image.width, x + w), min(image.height, y + h)), reducing_gap=3.0)
    except Unusable:
        raise
    except UnidentifiedImageError:
        raise Unusable("broken: not a picture, whatever its name says")
    except Exception as e:                                      # Pillow raises almost anything at a damaged file
        raise Unusable(f"broken: {re.sub(r'<.*?>', '', str(e)) or type(e).__name__}")      # without addresses of objects: the cache is the same each time
    return np.array(image)


class Prepared(torch.utils.data.Dataset):
    """Item -> (picture uint8 (H, W, 3), caption, bytes read), or (None, why not, bytes read)."""

    def __init__(self, items: list[Item], cfg: DataConfig):
        self.items, self.cfg = items, cfg

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item, size = self.items[i], 0
        try:
            if item.reason:
                raise Unusable(item.reason)
            caption, data = caption_of(item), read(item.picture)
            size = len(data)
            return to_bucket(data, self.cfg), caption, size
        except (Unusable, OSError) as e:
            return None, str(e) if isinstance(e, Unusable) else f"broken: {e.strerror or e}", size


# ---------------------------------------------------------------------------- a folder to try it with
def export(folder, n: int, size: int = 192):
    """n scenes as JPEG + txt in ragged sizes, the longest side `size`, ten of them spoilt."""
    folder, scenes = Path(folder), Scenes(size, "train", layout="free")
    if n < 20 or (folder.exists() and any(folder.iterdir())):
        raise UserError(f"--export wants an empty or new folder and 20 pictures or more, got {folder} and {n}")
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        picture, caption = scenes[i]
        rng = random.Random(i)
        w, h = rng.choice(((192, 192), (192, 128), (128, 192))) if rng.random() < 0.7 else (rng.randint(100, 192), rng.randint(100, 192))
        w, h = w * size // 192, h * size // 192
        Image.fromarray(picture).resize((w, h), Image.Resampling.LANCZOS).save(folder / f"{i:05d}.jpg", quality=92)
        (folder / f"{i:05d}.txt").write_text(caption + "\n")
    files = [folder / f"{i:05d}.jpg" for i in random.Random(0).sample(range(n), 10)]
    for k, file in enumerate(files):
        data, text = file.read_bytes(), file.with_suffix(".txt")
        if k < 3:
            file.write_bytes(data[: len(data) // (k + 2)])      # a download that broke off
        elif k < 5:
            file.write_bytes(b"" if k == 3 else b"<html>404 Not Found</html>\n")
        elif k < 7:
            text.unlink() if k == 5 else text.write_text("\n")
        elif k == 7:
            text.write_bytes("ein Käfer".encode("latin-1"))
        else:
            Image.open(file).resize((40, 30)).save(file)
    print(f"{folder}: {n} pictures, {len(files)} of them spoilt: " + ", ".join(sorted(f.name for f in files)))
