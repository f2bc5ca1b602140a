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
import os
import posixpath
import re
import tarfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor
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

HIDDEN = "hidden: its name begins with a dot"
TOO_LARGE = 2**30       # bytes of one file

class Place(NamedTuple):
    """Bytes of a file, or of a part of it."""
    file: str
    offset: int
    size: int
    suffix: str

    def read(self) -> bytes:
        """Unusable where it is too large, OSError where it cannot be read."""
        if self.size > TOO_LARGE:
            raise Unusable(f"too large: a file of {self.size / 2**30:.1f} GiB")
        with open(self.file, "rb") as f:
            f.seek(self.offset)
            return f.read(self.size)

class Item(NamedTuple):
    name: str
    picture: Place | None = None
    caption: str | Place = ""   # itself, or where it is
    reason: str = ""            # why it cannot be used, where the listing knows

class Unusable(Exception):
    """A picture that is skipped; the message says why."""

def find_pictures(folder: str) -> list[Item]:
    """Everything in a folder and the folders in it, or in one tar, in order of the names.
    What is no picture, caption or tar is an item with a reason."""
    root = Path(folder).expanduser()
    if not root.exists():
        raise UserError(f"no folder '{folder}': set data.folder to one of x.jpg + x.txt, or a tar")
    places, items = list_files(root)
    captions, used = read_jsonl(root, places, items)
    for name in captions.keys() - places.keys():
        items.append(Item(name, reason="no picture: a jsonl names it, but there is no such file"))

    by_suffix = {split_name(name): place for name, place in places.items()}
    stems = {stem for stem, suffix in by_suffix if suffix in SUFFIXES}
    found = []
    for name, place in places.items():
        stem, suffix = split_name(name)
        if suffix in SUFFIXES:
            text, row = by_suffix.get((stem, ".txt")), by_suffix.get((stem, ".json"))
            found.append(Item(name, place, text or captions.get(name) or row or ""))
        elif name not in used and not (suffix in (".txt", ".json") and stem in stems):
            reason = f"another format: {suffix or 'no suffix'}, not jpg, png, webp or tar"
            if suffix in (".txt", ".json"):
                reason = "no picture: a caption alone"
            items.append(Item(name, reason=reason))
    if not found and not items:
        raise UserError(f"no pictures in '{folder}': it wants x.jpg + x.txt, or tars of them")
    return sorted(set(items)) + found

def list_files(root: Path) -> tuple[dict[str, Place], list[Item]]:
    """({name: where it is}, what is left out: hidden files as .git and a Mac's ._x.jpg, links to
    nothing, tars that break off). Names are NFC, with slashes, so that those of a Mac or of Windows
    are found. Tars are not unpacked: their members are places in them."""
    places, left = {}, []
    for path in files_in(root, left):
        name = root.name if path == root else path.relative_to(root).as_posix()
        name = unicodedata.normalize("NFC", name)
        suffix = path.suffix.lower()
        if not path.is_file():
            left.append(Item(name, reason="no file: a link to nothing, a pipe or a device"))
        elif suffix == ".tar" or path == root:
            for member, place in list_tar(path, name, left):
                places[member] = place
        else:
            places[name] = Place(str(path), 0, path.stat().st_size, suffix)
    return dict(sorted(places.items())), left

def files_in(root: Path, left: list[Item]):
    """Yields all files in a folder and the folders in it, linked ones too, each folder once."""
    if not root.is_dir():
        yield root
        return
    seen = set()
    def refused(e):
        left.append(Item(str(e.filename), reason=f"no folder that can be read: {e.strerror}"))
    for folder, subfolders, files in os.walk(root, onerror=refused, followlinks=True):
        subfolders.sort()
        real = os.path.realpath(folder)
        hidden = [name for name in (*subfolders, *files) if name.startswith(".")]
        subfolders[:] = [] if real in seen else [n for n in subfolders if n not in hidden]
        for name in () if real in seen else files + hidden:
            path = Path(folder, name)
            if name in hidden:
                where = path.relative_to(root).as_posix()
                left.append(Item(where, reason=HIDDEN))
            else:
                yield path
        seen.add(real)

def list_tar(path: Path, name: str, left: list[Item]):
    """Yields (name, place) of the members of a tar, or of several that were joined. What is no
    file, and a tar that breaks off, goes to left."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            while f.tell() < size:
                tar = tarfile.TarFile(fileobj=f)
                for m in tar:
                    member = unicodedata.normalize("NFC", posixpath.normpath(m.name))
                    place = Place(str(path), m.offset_data, m.size, split_name(m.name)[1])
                    at = f"{name}/{member}"
                    if hidden := re.match(r".*?/\.[^/]*", at):
                        left.append(Item(hidden[0], reason=HIDDEN))
                    elif m.isfile() and not m.issparse():
                        yield at, place
                    elif not m.isdir():
                        left.append(Item(at, reason="no file: a link or a sparse member of a tar"))
                f.seek(tar.offset)
                if f.read(512).strip(b"\0"):            # tarfile goes no further, and says nothing
                    raise tarfile.ReadError(f"byte {tar.offset} is no header")
                while (block := f.read(512)) and not block.strip(b"\0"):
                    pass                                # behind the end mark: zeros, or another tar
                if block:
                    f.seek(-len(block), 1)
    except Exception as e:                              # tarfile raises many kinds at damaged ones
        why = str(e) or type(e).__name__
        left.append(Item(name, reason=f"broken: the tar ends or breaks off here ({why})"))

def split_name(name: str) -> tuple[str, str]:
    """Without and with the suffix in lower case: x.TXT is found as x.txt."""
    stem, suffix = posixpath.splitext(name)
    return stem, suffix.lower()

def read_jsonl(root: Path, places: dict[str, Place], items: list[Item]):
    """({picture: caption}, names of the files) of all captions.jsonl and metadata.jsonl; lines of
    no use go to items."""
    captions, used = {}, []
    top = root.resolve().as_posix() + "/"
    for name, place in places.items():
        folder, file = posixpath.split(name)
        if file not in ("captions.jsonl", "metadata.jsonl"):
            continue
        used.append(name)
        try:
            lines = place.read().decode("utf-8-sig", "replace").split("\n")  # no splitlines: U+2028
        except (OSError, Unusable) as e:
            items.append(Item(name, reason=f"no caption: {e}"))
            continue
        for k, line in enumerate(lines, 1):
            try:
                row = json.loads(line.strip() or "{}")
                if row:
                    picture = row.get("file_name", row.get("file")).replace("\\", "/")
                    picture = unicodedata.normalize("NFC", picture.removeprefix(top))
                    caption = row.get("text", row.get("caption"))
                    caption.encode()                    # UnicodeError: half a character
                    captions[posixpath.normpath(posixpath.join(folder, picture))] = caption
            except (ValueError, TypeError, AttributeError, RecursionError):
                reason = 'no caption: the line is no {"file": "x.jpg", "caption": "..."}'
                items.append(Item(f"{name}:{k}", reason=reason))
    return captions, used

def listing_key(items: list[Item]) -> str:
    """A hash of all that is in a folder: names, and every byte of pictures and captions."""
    def content(item):
        found = []
        for place in (item.picture, item.caption):
            try:
                whole = place.read() if isinstance(place, Place) else repr(place).encode()
            except (OSError, Unusable) as e:            # it is skipped later
                whole = str(e).encode()
            found.append(hashlib.sha256(whole).hexdigest())
        return repr((item.name, *found)).encode()

    sha = hashlib.sha256()
    with ThreadPoolExecutor() as threads:               # they wait for the disk
        for part in threads.map(content, items):
            sha.update(part)
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
            text.encode()               # UnicodeError: half a character
            caption = text
        except (ValueError, TypeError, AttributeError, RecursionError):     # UTF-8, JSON, its form
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
            (w, h), turn = image.size, upright_by(image)
            if turn in SIDEWAYS:
                w, h = h, w
            H, W = bucket_of(h, w, cfg)
            if max(H / h, W / w) > cfg.max_upscale:
                raise Unusable(f"too small: {w}x{h} for {W}x{H}")
            # a JPEG that is much too large is decoded at a half, a quarter or an eighth: faster
            image.draft(None, (2 * max(H, W), 2 * max(H, W)))
            upright = to_rgb(image if turn is None else image.transpose(turn))
        return np.array(ImageOps.fit(upright, (W, H), Image.Resampling.LANCZOS))
    except Unusable:
        raise
    except UnidentifiedImageError:
        raise Unusable("broken: not a picture, whatever its name says") from None
    except Exception as e:                      # Pillow raises almost anything at a damaged file
        # without addresses of objects, so that the cache is the same each time
        why = re.sub(r"<.*?>", "", str(e)) or type(e).__name__
        raise Unusable(f"broken: {why}") from None

TURNS = dict(zip(range(2, 9), (
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90)))        # by EXIF's orientation
SIDEWAYS = [TURNS[k] for k in (5, 6, 7, 8)]

def upright_by(image: Image.Image):
    """How to turn a picture as its EXIF data say; None where they say nothing, or nonsense."""
    with contextlib.suppress(Exception):                # Pillow raises almost anything
        return TURNS.get(image.getexif().get(0x0112))

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
