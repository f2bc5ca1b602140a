"""Files as they come from broken disks, other programs and hostile hands, for lab.fuzz.

Each function spoils something in place, in a way that rng draws.
"""
import io
import json
import os
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

def spoil_file(rng, file: Path):
    """Cut, emptied, altered, replaced by a directory, or gone."""
    whole = file.read_bytes()
    way = rng.choice(("cut", "empty", "bytes", "noise", "folder", "gone", "longer"))
    if way in ("folder", "gone"):
        file.unlink()
        if way == "folder":
            file.mkdir()
        return
    if way == "bytes":
        changed = bytearray(whole)
        for _ in range(rng.randrange(1, 9)):
            if changed:
                changed[rng.randrange(min(len(changed), 4000))] = rng.randrange(256)
        whole = bytes(changed)
    new = {"cut": whole[:rng.randrange(len(whole) + 1)], "empty": b"", "bytes": whole,
           "noise": rng.randbytes(rng.randrange(5000)), "longer": whole + rng.randbytes(99)}
    file.write_bytes(new[way])

VALUES = (None, [], {}, 0, -1, 5, 1e30, float("nan"), "", "x", True, [1], [[]], "../../x", 2**70,
          {"a": {}}, "\u0000", "\ud800", -0.5)

def places_of(value, path=()):
    """Paths of all that a JSON document holds."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else \
        enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places_of(inner, (*path, key))

def spoil_json(rng, file: Path):
    """One value of another kind or gone, another document, or no JSON."""
    if rng.random() < 0.3:
        file.write_bytes(rng.choice((
            b"[]", b"null", b"5", b"", b'"x"', b"[" * 100000, b"\xff\xfe\x00", b"{}",
            b'{"crc32":5}',
            b'{"a":' * 50000, rng.randbytes(99), b"NaN", b"9" * 5000)))
        return
    try:
        whole = json.loads(file.read_text("utf-8"))
        *way, last = rng.choice(list(places_of(whole)))
    except (ValueError, IndexError):
        return file.write_bytes(rng.randbytes(99))          # `latest`
    inner = whole
    for key in way:
        inner = inner[key]
    if rng.random() < 0.3:
        del inner[last]
    else:
        inner[last] = rng.choice(VALUES)
    file.write_text(json.dumps(whole), "utf-8")

def spoil_text(rng, file: Path):
    """A log's lines: ragged, doubled, cut, with bytes that are no text."""
    lines = file.read_bytes().split(b"\n")
    for _ in range(rng.randrange(1, 5)):
        k = rng.randrange(1, len(lines))
        lines[k] = rng.choice((
            lines[k][:rng.randrange(len(lines[k]) + 1)], lines[k] + b",1,2,3", b"", b"\x00\xff\xfe",
            b'"' + lines[k], lines[rng.randrange(len(lines))], b"x,y", b"-5," * 9, b",,,"))
    if rng.random() < 0.2:
        lines = rng.choice(([], [b""], [lines[0]], lines[1:], [rng.randbytes(300)]))
    file.write_bytes(b"\n".join(lines))

def spoil_cache(rng, file: Path):
    """A file of tensors: cut, empty, noise, or of other tensors."""
    way = rng.choice(("cut", "file", "keys", "shape", "kind"))
    if way == "cut":
        os.truncate(file, rng.randrange(file.stat().st_size))
    elif way == "file":
        file.write_bytes(rng.choice((b"", b"{}", rng.randbytes(500))))
    else:
        x = {"keys": torch.zeros(3), "shape": torch.zeros(2, 1), "kind": torch.zeros(32, 16, 8, 8)}
        key = "other" if way == "keys" else "ids" if "words" in file.name else "latents"
        save_file({key: x[way].int()}, file)

# ---------------------------------------------------------------------------- pictures
def png(size=(40, 40), colour=(200, 30, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()

def chunk(name: bytes, body: bytes, crc=None) -> bytes:
    crc = zlib.crc32(name + body) if crc is None else crc
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)

def bad_picture(rng) -> bytes:
    whole = png((90, 90))
    head = struct.pack(">IIBBBBB", *rng.choice(((2**31 - 1, 2**31 - 1), (0, 5), (9 * 10**4,) * 2)),
                       8, 2, 0, 0, 0)
    return rng.choice((
        whole[:rng.randrange(len(whole))], rng.randbytes(200), b"", b"<html>404</html>",
        whole[:8] + chunk(b"IHDR", head) + whole[33:],
        whole[:33] + chunk(b"IDAT", b"x") + whole[33:],
        whole[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 2**27)) + whole[33:],
        whole[:33] + chunk(b"eXIf", rng.randbytes(40)) + whole[33:],
        whole[:33] + chunk(b"iCCP", b"x\0\0" + rng.randbytes(40)) + whole[33:],
        b"GIF89a" + rng.randbytes(30), b"\xff\xd8\xff\xe1" + rng.randbytes(60),
        b"RIFF\xff\xff\xff\x7fWEBPVP8 "))

def header(name: str, size: int, **more) -> bytes:
    """The header of a tar's member that claims so many bytes."""
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in more.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.PAX_FORMAT if more else tarfile.GNU_FORMAT)

def bad_tar(rng) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for k in range(3):
            for name, data in ((f"a.{k}.png", png((90, 90))), (f"a.{k}.txt", b"a dog")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    whole = bytearray(file.getvalue())
    way = rng.randrange(7)
    if way == 0:
        return bytes(whole[:rng.randrange(len(whole))])
    if way == 1:
        for _ in range(20):
            whole[rng.randrange(len(whole))] = rng.randrange(256)
        return bytes(whole)
    more = (header("b.png", 2**63 - 1), header("b.png", 5, pax_headers={"size": "9" * 20}),
            header("b.png", 5, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                                            "GNU.sparse.realsize": str(2**62)}),
            header("../" * 9 + "b.png", 3), rng.randbytes(512))[way - 2]
    return bytes(whole[:-10240 % 512 or None]).rstrip(b"\0") + b"\0" * 512 + more + bytes(1024)

def spoil_pictures(rng, folder: Path):
    """Adds something bad to a folder of pictures."""
    way, good = rng.randrange(12), png((90, 90))
    new = folder / f"bad{rng.randrange(99)}.{rng.choice(('png', 'jpg', 'webp', 'jpeg', 'PNG'))}"
    if way < 3:
        new.write_bytes(bad_picture(rng))
        new.with_suffix(".txt").write_text("a dog", "utf-8")
    elif way < 6:
        (folder / "bad.tar").write_bytes(bad_tar(rng))
    elif way == 6:
        new.write_bytes(good)
        new.with_suffix(rng.choice((".txt", ".json"))).write_bytes(rng.choice((
            b"[" * 100000, b'{"caption": 5}', b"[]", b"null", b"\xff\xfe", b"", rng.randbytes(50),
            b'{"caption": "\\ud800"}', b"9" * 5000, b"a " * 10**6, "na\u0308chste".encode())))
    elif way == 7:
        (folder / rng.choice(("captions.jsonl", "metadata.jsonl"))).write_bytes(rng.choice((
            b"[" * 100000, b'{"file": 5, "caption": "x"}\n', b'{"file": "00000.jpg"}\n5\n[]\n',
            b'{"file": "..\\\\00000.jpg", "caption": "a\\ud800b"}', b'{"file": "/etc/passwd", '
            b'"caption": "x"}', rng.randbytes(200), b'{"file": "\\u0000", "caption": "x"}')))
    elif way == 8:
        name = rng.choice((b"a\xe4\xff", b"new\nline", b"tab\t", b"\x1b[31m"))
        odd = os.fsencode(folder) + b"/" + name
        for suffix, data in ((b".png", good), (b".txt", b"a dog")):
            Path(os.fsdecode(odd + suffix)).write_bytes(data)
    elif way == 9:
        os.mkfifo(new)
        new.with_suffix(".txt").write_text("a dog", "utf-8")
    elif way == 10:
        new.symlink_to(rng.choice((folder / "gone", new, folder, "/dev/zero", "/proc/self/mem")))
        (folder / "loop").symlink_to(folder)
    else:
        new.mkdir()
        huge = folder / "huge.png"
        huge.touch()
        os.truncate(huge, 2**rng.randrange(31, 41))         # sparse: no such disk is needed
        shutil.copy(folder / "00001.txt", folder / "huge.txt")
