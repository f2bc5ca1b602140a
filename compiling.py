"""torch.compile for training: block by block, and kept on the disk for the next start."""
import platform
import zlib
from pathlib import Path

import torch
import torch.nn as nn

from checkpoint import write_whole
from mmdit import JointBlock
from model import ResBlock, Transformer
from optim import compile_many
from text import TextBlock

def compile_blocks(module: nn.Module, dynamic: bool):
    """Compiles the blocks of which a network consists, each kind once for each width and size. That
    takes a part of the time that the whole network would (docs/BENCH.md), for the same numbers.
    dynamic: of your own pictures, which differ in shape."""
    compile_many()
    for m in module.modules():
        if isinstance(m, (ResBlock, Transformer, JointBlock, TextBlock)):
            m.compile(dynamic=dynamic)

def compiler_key(device) -> bytes:
    """What compiled code depends on: the first line of its file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{torch.__version__}, Python {platform.python_version()}, {name}\n".encode()

def load_compiled(path: Path, device):
    """Takes what save_compiled() kept: code, so use no runs of strangers. A damaged file, or one of
    another machine, is told and left."""
    if not path.exists():
        return
    key, crc, code = (path.read_bytes().split(b"\n", 2) + [b"", b""])[:3]
    if key + b"\n" != compiler_key(device) or crc != b"%d" % zlib.crc32(code):
        print(f"{path} is damaged, or of another machine or PyTorch: compiling anew", flush=True)
        return
    torch.compiler.load_cache_artifacts(code)

def save_compiled(path: Path, device):
    """Keeps what was compiled, for the next start of this run, here or on such a machine."""
    found = torch.compiler.save_cache_artifacts()
    if found:
        code = found[0]
        head = compiler_key(device) + b"%d\n" % zlib.crc32(code)
        write_whole(path, lambda file: file.write_bytes(head + code))
