"""Your own pictures: found in a folder or in tar files, read, and scaled into buckets.

cache.py encodes them once, for training. Read are x.jpg, .jpeg, .png and .webp with the caption in
x.txt, or in captions.jsonl ({"file": .., "caption": ..}) or metadata.jsonl ({"file_name": ..,
"text": ..}), or in x.json ({"caption": ..}); and tar files of such pairs, as webdataset has them.
What cannot be used is skipped, and listed in the cache's skipped.txt with the reason.
"""
import contextlib
import functools
import hashlib
import io
import json
import posixpath
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from common import UserError
from data import DataConfig

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
OTHERS = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jxl")


class Place(NamedTuple):
    """Bytes of a file, or of a part of it."""
    file: str
    offset: int
    size: int
    suffix: str

    def read(self) -> bytes:
        with open(self.file, "rb") as f:
            f.seek(self.offset)
            return f.read(self.size)

    def tail(self, n: int = 4096) -> bytes:
        n = min(n, self.size)
        return self._replace(offset=self.offset + self.size - n, size=n).read()


class Item(NamedTuple):
    name: str
    picture: Place | None = None
    caption: str | Place = ""   # itself, or where it is
    reason: str = ""            # why it cannot be used, where the listing knows


class Unusable(Exception):
    """A picture that is skipped; the message says why."""


# ---------------------------------------------------------------------------- listing
def find_pictures(folder: str) -> list[Item]:
    """Everything in a folder and the folders in it, or in one tar, in order of the names."""
    root = Path(folder).expanduser()
    if not root.exists():
        raise UserError(f"no folder of pictures at '{folder}': set data.folder to a directory of "
                        "x.jpg + x.txt, or to a tar")
    items = list_tar(root, root.name) if root.is_file() else list_folder(root)
    if not items:
        raise UserError(f"no pictures in '{folder}': it wants x.jpg, .jpeg, .png or .webp with "
                        "captions in x.txt, captions.jsonl or metadata.jsonl, or tars of them")
    return items


def list_folder(root: Path) -> list[Item]:
    files = visible_files(root)
    captions, items = read_jsonl(files)
    items += [Item(name, reason="no picture: a jsonl names it, but there is no such file")
              for name in captions if name not in files]
    by_suffix = {split_name(name): name for name in files}      # x.TXT is found as x.txt

    for name in sorted(files):
        stem, suffix = split_name(name)
        if suffix in SUFFIXES:
            text, js = by_suffix.get((stem, ".txt")), by_suffix.get((stem, ".json"))
            caption = captions.get(name) or (place_of(files[js]) if js else "")
            if text:
                caption = place_of(files[text])
            items.append(Item(name, place_of(files[name]), caption))
        elif suffix == ".tar":
            items += list_tar(files[name], name)
        elif name.endswith((".tar.gz", ".tgz")):
            items.append(Item(name, reason="another format: a compressed tar; unpack it"))
        elif suffix in OTHERS:
            items.append(other_format(name, suffix))
    return items


def visible_files(root: Path) -> dict[str, Path]:
    """{name relative to root: path}, without .git, .ipynb_checkpoints, a Mac's ._x.jpg."""
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
    return {name: path for name, path in files.items() if not hidden(name)}


def hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def split_name(name: str) -> tuple[str, str]:
    stem, suffix = posixpath.splitext(name)
    return stem, suffix.lower()


def place_of(path: Path) -> Place:
    return Place(str(path), 0, path.stat().st_size, path.suffix.lower())


def other_format(name: str, suffix: str) -> Item:
    return Item(name, reason=f"another format: save {suffix} as jpg, png or webp")


def read_jsonl(files: dict[str, Path]) -> tuple[dict[str, str], list[Item]]:
    """{picture: caption} of all captions.jsonl and metadata.jsonl, and the lines of no use."""
    captions, items = {}, []
    for name in sorted(files):
        folder, file = posixpath.split(name)
        if file not in ("captions.jsonl", "metadata.jsonl"):
            continue
        text = files[name].read_text(encoding="utf-8-sig", errors="replace")
        for k, line in enumerate(text.split("\n"), 1):      # splitlines() cuts at U+2028 too
            try:
                row = json.loads(line) if line.strip() else None
                if row:
                    picture = row.get("file_name", row.get("file"))
                    caption = row.get("text", row.get("caption"))
                    # a TypeError unless both are strings
                    captions[posixpath.normpath(posixpath.join(folder, picture))] = caption + ""
            except (ValueError, TypeError, AttributeError):
                items.append(Item(f"{name}:{k}", reason="no caption: the line is no "
                                  '{"file": "x.jpg", "caption": "..."}'))
    return captions, items


def list_tar(path: Path, name: str) -> list[Item]:
    """Pairs of one stem in a tar. It notes where their bytes are; nothing is unpacked."""
    members, broken = {}, []
    try:
        with tarfile.open(path, "r:") as tar:
            for m in tar:
                stem, suffix = split_name(m.name)
                if m.isfile() and not hidden(posixpath.normpath(m.name)):
                    members[stem, suffix, m.name] = Place(str(path), m.offset_data, m.size, suffix)
    except (tarfile.TarError, OSError) as e:
        broken = [Item(name, reason=f"broken: the tar ends or breaks off here ({e})")]
    by_suffix = {(stem, suffix): place for (stem, suffix, _), place in members.items()}
    items = []
    for (stem, suffix, member), place in members.items():
        if suffix in SUFFIXES:
            caption = by_suffix.get((stem, ".txt")) or by_suffix.get((stem, ".json")) or ""
            items.append(Item(f"{name}/{member}", place, caption))
        elif suffix in OTHERS:
            items.append(other_format(f"{name}/{member}", suffix))
    return items + broken


def listing_key(items: list[Item]) -> str:
    """A hash of what is in a folder: names, sizes and ends of pictures, captions as they are."""
    sha = hashlib.sha256()
    for item in items:
        picture, caption, end = item.picture, item.caption, b""
        with contextlib.suppress(OSError):      # a file that cannot be read is skipped later
            if isinstance(caption, Place):
                caption = caption.read()
            end = picture.tail() if picture else b""
        sha.update(repr((item.name, picture and picture.size, end, caption)).encode())
    return sha.hexdigest()[:16]


def caption_of(item: Item) -> str:
    """The caption on one line. Unusable where there is none."""
    caption = item.caption
    if isinstance(caption, Place):
        try:
            text = caption.read().decode("utf-8-sig")
            if caption.suffix == ".json":
                row = json.loads(text)
                text = row.get("caption", row.get("text")) or ""
            caption = text + ""
        except (ValueError, TypeError, AttributeError):     # of UTF-8, of JSON, of what it holds
            raise Unusable('no caption: its file is not UTF-8, or no {"caption": "..."}') from None
    caption = " ".join(caption.split())
    if not caption:
        raise Unusable("no caption")
    return caption


# ---------------------------------------------------------------------------- buckets
@functools.lru_cache
def buckets(size: int, step: int, ratio: float) -> list[tuple[int, int]]:
    """(height, width) in pixels: multiples of `step` whose area is nearest to size^2, with sides
    up to `ratio` long to short; each with its transpose."""
    found = set()
    for short in range(step, size + 1, step):
        long = max(1, round(size * size / short / step)) * step
        if long <= ratio * short:
            found |= {(short, long), (long, short)}
    return sorted(found)


def bucket_of(height: int, width: int, cfg: DataConfig) -> tuple[int, int]:
    """The bucket nearest in aspect ratio: a function of the picture's size and the config alone."""
    def distance(b):
        return abs(np.log(b[0] * width / (b[1] * height)))
    return min(buckets(cfg.size, cfg.bucket_step, cfg.max_ratio), key=distance)


def to_bucket(data: bytes, cfg: DataConfig) -> np.ndarray:
    """An encoded picture -> uint8 (H, W, 3), H and W those of its bucket: upright, on white, RGB,
    scaled until it covers the bucket, its middle cut out. Unusable says why it cannot be."""
    if not data:
        raise Unusable("broken: an empty file")
    try:
        image, H, W = open_picture(data, cfg)
        image = to_rgb(image)
        scale = min(image.width / W, image.height / H)
        w, h = min(image.width, W * scale), min(image.height, H * scale)
        x, y = (image.width - w) / 2, (image.height - h) / 2
        box = (x, y, min(image.width, x + w), min(image.height, y + h))
        image = image.resize((W, H), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    except Unusable:
        raise
    except UnidentifiedImageError:
        raise Unusable("broken: not a picture, whatever its name says") from None
    except Exception as e:                      # Pillow raises almost anything at a damaged file
        # without addresses of objects, so that the cache is the same each time
        why = re.sub(r"<.*?>", "", str(e)) or type(e).__name__
        raise Unusable(f"broken: {why}") from None
    return np.array(image)


def open_picture(data: bytes, cfg: DataConfig):
    """(image, upright; height and width of its bucket). Unusable where it is too small."""
    with Image.open(io.BytesIO(data)) as image:
        w, h = image.size
        if image.getexif().get(0x0112, 1) >= 5:     # EXIF orientations 5 to 8 are on their side
            w, h = h, w
        H, W = bucket_of(h, w, cfg)
        if max(H / h, W / w) > cfg.max_upscale:
            raise Unusable(f"too small: {w}x{h} for {W}x{H}")
        # a JPEG that is much too large is decoded at a half, a quarter or an eighth: faster
        image.draft(None, (2 * max(H, W),) * 2)
        image.load()
    return ImageOps.exif_transpose(image), H, W


def to_rgb(image: Image.Image) -> Image.Image:
    """8 bits, RGB, transparent parts on white."""
    if image.mode.startswith("I"):              # 16 bits of grey; Pillow reads colours as 8
        grey = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    clear = image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    if clear:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


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
            caption, data = caption_of(item), item.picture.read()
            size = len(data)
            return to_bucket(data, self.cfg), caption, size
        except Unusable as e:
            return None, str(e), size
        except OSError as e:
            return None, f"broken: {e.strerror or e}", size
