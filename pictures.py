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
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from common import UserError
from data import DataConfig

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY     # saved workflows are large
Image.MAX_IMAGE_PIXELS = 2**28      # Pillow refuses twice as many: scans have 200 M
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
OTHERS = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jxl", ".gz", ".tgz")

class Place(NamedTuple):
    """Bytes of a file, or of a part of it."""
    file: str
    offset: int
    size: int
    suffix: str

    def read(self, most: int = 2**62) -> bytes:
        """All bytes, or the last so many."""
        n = min(self.size, most)
        with open(self.file, "rb") as f:
            f.seek(self.offset + self.size - n)
            return f.read(n)

class Item(NamedTuple):
    name: str
    picture: Place | None = None
    caption: str | Place = ""   # itself, or where it is
    reason: str = ""            # why it cannot be used, where the listing knows

class Unusable(Exception):
    """A picture that is skipped; the message says why."""

def find_pictures(folder: str) -> list[Item]:
    """Everything in a folder and the folders in it, or in one tar, in order of the names."""
    root = Path(folder).expanduser()
    if not root.exists():
        raise UserError(f"no folder '{folder}': set data.folder to one of x.jpg + x.txt, or a tar")
    places, items = list_files(root)
    captions = read_jsonl(places, items)
    for name in captions.keys() - places.keys():
        items.append(Item(name, reason="no picture: a jsonl names it, but there is no such file"))
    items.sort()

    by_suffix = {split_name(name): place for name, place in places.items()}
    for name, place in places.items():
        stem, suffix = split_name(name)
        if suffix in SUFFIXES:
            text, row = by_suffix.get((stem, ".txt")), by_suffix.get((stem, ".json"))
            items.append(Item(name, place, text or captions.get(name) or row or ""))
        elif suffix in OTHERS:
            items.append(Item(name, reason=f"another format: {suffix}, not jpg, png, webp or tar"))
    if not items:
        raise UserError(f"no pictures in '{folder}': it wants x.jpg + x.txt, or tars of them")
    return items

def list_files(root: Path) -> tuple[dict[str, Place], list[Item]]:
    """({name: where it is}, tars that break off), without .git, a Mac's ._x.jpg and the like.
    Tars are not unpacked: their members are places in them."""
    files = {root.name: root}
    if root.is_dir():
        files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
    places, broken = {}, []
    for name, path in sorted(files.items()):
        suffix = path.suffix.lower()
        if suffix != ".tar" and path != root:
            places[name] = Place(str(path), 0, path.stat().st_size, suffix)
            continue
        try:
            with tarfile.open(path, "r:") as tar:
                for m in filter(tarfile.TarInfo.isfile, tar):
                    member, suffix = posixpath.normpath(m.name), split_name(m.name)[1]
                    places[f"{name}/{member}"] = Place(str(path), m.offset_data, m.size, suffix)
        except (tarfile.TarError, OSError) as e:
            broken.append(Item(name, reason=f"broken: the tar ends or breaks off here ({e})"))
    return {name: p for name, p in places.items() if "/." not in f"/{name}"}, broken

def split_name(name: str) -> tuple[str, str]:
    """Without and with the suffix in lower case: x.TXT is found as x.txt."""
    stem, suffix = posixpath.splitext(name)
    return stem, suffix.lower()

def read_jsonl(places: dict[str, Place], items: list[Item]) -> dict[str, str]:
    """{picture: caption} of all captions.jsonl and metadata.jsonl; lines of no use go to items."""
    captions = {}
    for name, place in places.items():
        folder, file = posixpath.split(name)
        if file not in ("captions.jsonl", "metadata.jsonl"):
            continue
        lines = place.read().decode("utf-8-sig", "replace").split("\n")  # not splitlines(): U+2028
        for k, line in enumerate(lines, 1):
            try:
                row = json.loads(line.strip() or "{}")
                if row:
                    picture = row.get("file_name", row.get("file"))
                    caption = row.get("text", row.get("caption")) + ""      # TypeError: no string
                    captions[posixpath.normpath(posixpath.join(folder, picture))] = caption
            except (ValueError, TypeError, AttributeError):
                reason = 'no caption: the line is no {"file": "x.jpg", "caption": "..."}'
                items.append(Item(f"{name}:{k}", reason=reason))
    return captions

def listing_key(items: list[Item]) -> str:
    """A hash of what is in a folder: names, sizes and ends of pictures, captions as they are."""
    sha = hashlib.sha256()
    for item in items:
        picture, caption, end = item.picture, item.caption, b""
        with contextlib.suppress(OSError):      # a file that cannot be read is skipped later
            if isinstance(caption, Place):
                caption = caption.read()
            end = picture.read(4096) if picture else b""
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

@functools.lru_cache
def buckets(size: int, step: int, ratio: float) -> list[tuple[int, int]]:
    """(height, width): multiples of `step`, area nearest to size^2, up to `ratio` long to short."""
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
        with Image.open(io.BytesIO(data)) as image:
            w, h = image.size
            if image.getexif().get(0x0112, 1) >= 5:     # EXIF orientations 5 to 8 are on their side
                w, h = h, w
            H, W = bucket_of(h, w, cfg)
            if max(H / h, W / w) > cfg.max_upscale:
                raise Unusable(f"too small: {w}x{h} for {W}x{H}")
            # a JPEG that is much too large is decoded at a half, a quarter or an eighth: faster
            image.draft(None, (2 * max(H, W), 2 * max(H, W)))
            upright = to_rgb(ImageOps.exif_transpose(image))
        return np.array(ImageOps.fit(upright, (W, H), Image.Resampling.LANCZOS))
    except Unusable:
        raise
    except UnidentifiedImageError:
        raise Unusable("broken: not a picture, whatever its name says") from None
    except Exception as e:                      # Pillow raises almost anything at a damaged file
        # without addresses of objects, so that the cache is the same each time
        why = re.sub(r"<.*?>", "", str(e)) or type(e).__name__
        raise Unusable(f"broken: {why}") from None

def to_rgb(image: Image.Image) -> Image.Image:
    """8 bits, RGB, transparent parts on white."""
    if image.mode.startswith("I"):              # 16 bits of grey; Pillow reads colours as 8
        grey = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")

class Prepared(torch.utils.data.Dataset):
    """Item -> (picture uint8 (H, W, 3), caption), or (None, why it cannot be used)."""
    def __init__(self, items: list[Item], cfg: DataConfig):
        self.items, self.cfg = items, cfg

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        try:
            if item.reason:
                raise Unusable(item.reason)
            caption = caption_of(item)
            return to_bucket(item.picture.read(), self.cfg), caption
        except Unusable as e:
            return None, str(e)
        except OSError as e:
            return None, f"broken: {e.strerror or e}"
