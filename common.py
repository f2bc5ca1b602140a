"""Shared helpers: errors, config, devices, processes, logging."""
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parent
ASSETS = ROOT / "assets"

class UserError(Exception):
    """Bad input. The message says in one line what is wrong and how to mend it."""
@contextlib.contextmanager
def friendly():
    """Wraps every main(): an error that a user can mend ends in one line and exit status 1."""
    for stream in (sys.stdout, sys.stderr):             # a caption that the terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as e:
        sys.exit(f"error: {one_line(e)}")
    except KeyboardInterrupt:
        sys.exit("stopped by the keyboard")
    except (OSError, SafetensorError, MemoryError, RuntimeError, ModuleNotFoundError) as e:
        how = how_to_mend(e)
        if not how:
            raise
        sys.exit(f"error: {one_line(e)}: {how}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

def one_line(e: BaseException) -> str:
    """What an error says, or its name, with the characters of strange paths escaped."""
    text = " ".join(str(e).split()) or type(e).__name__
    return text.encode(errors="backslashreplace").decode()[:1000]

def how_to_mend(e: BaseException) -> str:
    """What a user can do about an error of the system or of PyTorch; "": a fault of ours."""
    said = str(e)
    if is_disk_full(e):
        return "the disk is full: free some space and run the same command again"
    if isinstance(e, MemoryError) or "out of memory" in said or "can't allocate" in said:
        return "out of memory: lower batch, the picture's size or the network's (docs/FAQ.md)"
    if isinstance(e, dist.DistError) or "gloo" in said or "ncclSystem" in said:
        return "another process of this training ended first; what it said tells why"
    if isinstance(e, ModuleNotFoundError):
        return "install it by `pip install -r requirements.txt` (coremltools: not on Windows)"
    if isinstance(e, (OSError, SafetensorError)):
        return "check that the path exists and may be read and written"
    return ""

def is_disk_full(e: BaseException) -> bool:
    return any(s in str(e) for s in ("No space left", "File too large", "quota exceeded"))

# ---------------------------------------------------------------------------- config
MOST = 10**9        # of a number without bounds of its own: what ends in this life

def option(default, low=None, high=None, above=None, choices=None):
    """A dataclass field and its bounds: low and high inclusive, above exclusive; or its choices.
    In a list each entry is checked. Every number must be finite, and without
    bounds of its own between -MOST and MOST."""
    allowed = {"low": low, "high": high, "above": above, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=allowed)
    return dataclasses.field(default=default, metadata=allowed)

def fill(obj, values: dict, where: str = "config", prefix: str = ""):
    """Sets the fields of a nested dataclass from a dict, and returns it. UserError names an unknown
    key and its nearest neighbour, a wrong type, or a value out of range."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: '{prefix.rstrip('.')}' is a table of keys, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(obj)}
    for key, value in values.items():
        name = prefix + key
        if key not in fields:
            tables = [k for k in fields if dataclasses.is_dataclass(getattr(obj, k))]
            inside = [f"{k}.{key}" for k in tables if hasattr(getattr(obj, k), key)]
            near = inside or difflib.get_close_matches(key, fields, 1, 0.5) or fields
            hint = " or ".join(prefix + k for k in near)
            raise UserError(f"{where}: unknown key '{name}'; did you mean {hint}?")
        old = getattr(obj, key)
        if dataclasses.is_dataclass(old):
            fill(old, value, where, name + ".")
        else:
            value = typed(value, old, name, where)
            check_range(value, fields[key].metadata, name, where)
            if isinstance(value, str):
                check_text(value, fields[key].default, name, where)
                value = os.path.expanduser(value)       # ~/pictures
            setattr(obj, key, value)
    return obj

BACKSLASHES = "; a path with backslashes wants '...' instead of \"...\", or slashes"

def check_text(value: str, default, name: str, where: str):
    """UserError where a text cannot be a name or a path, or is empty where it must not be."""
    if not value.isprintable():
        hint = BACKSLASHES if re.search("[\b\t\n\f\r]", value) else ""
        raise UserError(f"{where}: '{name}' has characters that cannot be printed: {value!r}{hint}")
    if default and not value.strip():
        raise UserError(f"{where}: '{name}' must not be empty; by default it is {default!r}")

def typed(value, old, name: str, where: str):
    """`value` in the type of the field's present value `old`, or a UserError."""
    if isinstance(old, float) and type(value) is int and abs(value) < 1e300:
        return float(value)
    entries = value if isinstance(value, list) and isinstance(old, list) and old else []
    if type(value) is not type(old) or any(type(v) is not type(old[0]) for v in entries):
        kind = type(old).__name__
        raise UserError(f"{where}: '{name}' wants {kind} (like {old!r}), got {value!r}")
    return value

def check_range(value, allowed, name: str, where: str):
    """UserError where a value, or an entry of a list, is outside of what option() allows."""
    low, high, above = (allowed.get(k) for k in ("low", "high", "above"))
    low, high = -MOST if low is None else low, MOST if high is None else high
    choices = allowed.get("choices")
    for v in value if isinstance(value, list) else [value]:
        wanted = ""
        if choices and v not in choices:
            wanted = "one of " + ", ".join(choices)
        elif isinstance(v, str):
            continue
        elif not -1e300 < v < 1e300:                    # nan too
            wanted = "a finite number"
        elif above is not None and v <= above:
            wanted = f"more than {above}"
        elif v < low:
            wanted = f"{low} or more"
        elif v > high:
            wanted = f"{high} or less"
        if wanted:
            raise UserError(f"{where}: '{name}' wants {wanted}, got {v!r}")

def check_config(cfg, where: str = "config"):
    """Calls check() of a config and of the configs in it: do the fields fit together?"""
    for value in vars(cfg).values():
        if dataclasses.is_dataclass(value):
            check_config(value, where)
    if hasattr(cfg, "check"):
        try:
            cfg.check()
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
    return cfg

def read_config(cfg, argv: list[str], default: str | None = None):
    """`--config FILE key=value table.key=value ...` over the dataclass instance `cfg`."""
    argv, path = list(argv), default
    if "--config" in argv:
        i = argv.index("--config")
        path = (argv + [""])[i + 1]
        del argv[i:i + 2]
        if not path:
            raise UserError("--config wants a file, such as --config configs/nano.toml")
    if path:
        fill(cfg, read_toml(path), str(path))
    if {"-h", "--help"} & set(argv):
        print(f"usage: [--config FILE.toml] [key=value ...]\n\nkeys, with the values of {path}; "
              "comments are at the dataclasses:")
        sys.exit(print(json.dumps(dataclasses.asdict(cfg), indent=1)))
    for argument in argv:
        fill(cfg, parse_override(cfg, argument), "command line")
    for folder in (getattr(cfg, "out", ""), getattr(getattr(cfg, "data", None), "cache", "")):
        check_folder(folder)
    return check_config(cfg, str(path or "command line"))

def check_folder(path: str):
    """UserError, before any work, where a folder is to be written and cannot be."""
    above = Path(path)
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"'{path}' cannot be written: {above} is no folder that may be written")

def read_toml(path) -> dict:
    """A TOML file; a relative path is looked up here, then in the repository."""
    path, text = Path(path).expanduser(), ""
    if not path.exists() and (ROOT / path).is_file():
        path = ROOT / path
    try:
        text = path.read_text("utf-8-sig")      # Windows' editor may begin with a mark
        return tomllib.loads(text)
    except FileNotFoundError:
        known = ", ".join(sorted(f"configs/{p.name}" for p in ROOT.glob("configs/*.toml")))
        raise UserError(f"no config file {path}; there are: {known}") from None
    except (ValueError, RecursionError, IsADirectoryError) as e:
        hint = BACKSLASHES if re.search(r'= *"[^"\n]*\\', text) else ""
        raise UserError(f"{path} is not valid TOML: {e}{hint}") from None

def parse_override(cfg, argument: str) -> dict:
    """"model.depth_mid=2" -> {"model": {"depth_mid": 2}}"""
    key, equals, text = argument.removeprefix("--").partition("=")
    if not equals:
        raise UserError(f"what is '{argument}'? Write --config FILE and key=value, such as "
                        "steps=60 (without dashes) or \"data.folder=my pictures\"")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        value = text                                    # an unquoted string, such as out=runs/a
    old = cfg
    for part in key.split("."):
        old = getattr(old, part, None)
    if isinstance(old, str) and not isinstance(value, str):
        value = text                                    # a folder named 2024-05-01 is no date
    for part in reversed(key.split(".")):
        value = {part: value}
    return value

# ---------------------------------------------------------------------------- devices and processes
class Abilities(NamedTuple):
    """What kinds of devices differ in. float64: no device is asked for it, since MPS has none."""
    backend: str                    # by which processes exchange tensors; "": they cannot
    layout: torch.memory_format     # of pictures (B, C, H, W) in memory
    bfloat16_since: int             # this version of macOS

DEVICES = {
    "cpu": Abilities("gloo", torch.channels_last, 0),
    # what is in the CPU's memory goes by gloo, which waits for no GPU
    "cuda": Abilities("cpu:gloo,cuda:nccl", torch.channels_last, 0),
    # from PyTorch's documentation and issues (139386; 174345 and 180984 on channels_last, which is
    # silently wrong for some views): nothing of this was run on MPS here
    "mps": Abilities("", torch.contiguous_format, 14),
}

def layout(device: torch.device) -> torch.memory_format:
    """Where it is channels_last, convolutions are faster, and tokens (B, H W, C) are views."""
    return DEVICES.get(device.type, DEVICES["cpu"]).layout      # meta: as the CPU

def pick_device(name: str = "auto") -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU; for torchrun's processes no MPS, which they
    cannot share. UserError where the device is not there."""
    has_cuda = torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if name == "auto":
        name = "cuda" if has_cuda else "mps" if has_mps and not together else "cpu"
    if (name.startswith("cuda") and not has_cuda) or (name == "mps" and not has_mps):
        raise UserError(f"device '{name}' is not available here; use cpu, or leave it at auto")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if not device or device.type not in DEVICES:
        raise UserError(f"unknown device '{name}': use auto, cpu, cuda, cuda:1 or mps")
    if together and not DEVICES[device.type].backend:
        raise UserError(f"{device} cannot be shared by several processes: set device=cpu")
    return device

def setup(device: str = "auto") -> tuple[torch.device, int, int]:
    """(device, rank, world size). Joins the process group where torchrun started us."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    dev = pick_device(device)
    if dev.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    else:
        keep_memory_mapped()
    if world == 1:
        return dev, 0, 1
    die_with_parent()
    if dev.type == "cuda":
        dev = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(dev)
    dist.init_process_group(DEVICES[dev.type].backend)
    return dev, dist.get_rank(), world

def die_with_parent():
    """Tells Linux to stop this process when torchrun is killed, or it would train on unseen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)       # 1: PR_SET_PDEATHSIG

def anywhere(flag: bool, world: int) -> bool:
    """True on all ranks where it is True on one. Ranks must leave a loop together, or one waits."""
    if world == 1:
        return flag
    flags = [None] * world
    dist.all_gather_object(flags, flag)
    return any(flags)

def at_most_cores(workers: int) -> int:
    """As many processes as are asked for, but no more than there are cores."""
    return min(workers, os.cpu_count() or 1)

def by_turns(make, rank: int, world: int):
    """make() of one process after the other: the first fills a cache, the others find it there."""
    for turn in range(world):
        if turn == rank:
            made = make()
        if world > 1:
            dist.barrier()
    return made

def mean_over(x: torch.Tensor, world: int) -> torch.Tensor:
    """The mean of a tensor over the processes; x itself is overwritten."""
    if world > 1:
        dist.all_reduce(x)
    return x / world

def use_bfloat16(amp: str, device: torch.device) -> bool:
    """Whether a run computes in bfloat16. auto: on CUDA, and on CPUs that have the instructions: it
    doubles the speed of training there; on a CPU that imitates it, it is many times slower."""
    macos, since = platform.mac_ver()[0].split(".")[0], DEVICES[device.type].bfloat16_since
    if amp == "bfloat16" and int(macos or 99) < since:      # "": another system
        raise UserError(f"{device} has no bfloat16 before macOS {since}: set amp=float32")
    if amp != "auto":
        return amp == "bfloat16"
    if device.type == "cpu":
        with contextlib.suppress(OSError):              # /proc is Linux's
            flags = Path("/proc/cpuinfo").read_text("utf-8")
            return "avx512_bf16" in flags or "amx_bf16" in flags
    return device.type == "cuda"

def autocast(device: torch.device, on: bool):
    """Context manager: bfloat16 autocast where `on`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=on)

def attention(q, k, v, mask=None):
    """scaled_dot_product_attention, in fp32 on a CPU even under autocast.
    Its backward pass in bfloat16 is nine times slower there."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return sdpa(q.float(), k.float(), v.float(), attn_mask=mask).type_as(v)
    return sdpa(q, k, v, attn_mask=mask)

def keep_memory_mapped():
    """Tells glibc to keep freed memory, and PyTorch to ask for pages of 2 MiB.
    Otherwise big buffers go back to the system after every operation, and page faults dominate."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, -1)                            # M_TRIM_THRESHOLD: never
        libc.mallopt(-4, 0)                             # M_MMAP_MAX: no buffer is mapped by itself

def peak_memory(device: torch.device) -> float:
    """GiB: CUDA's allocator, or the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return float("nan")
    import resource  # not on Windows
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

def json_text(found) -> str:
    """Indented JSON, with a list of numbers on one line."""
    text = json.dumps(found, indent=1)
    return re.sub(r"\[[\s\d.,eE+-]+\]", lambda numbers: " ".join(numbers[0].split()), text)

def provenance(seed: int = 0) -> dict:
    """Where a number comes from: commit ("+": files outside of docs/ differ), machine, date."""
    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True).stdout.decode("utf-8").strip()

    commit = ""
    with contextlib.suppress(OSError):                  # git may not be installed
        commit = git("rev-parse", "--short", "HEAD")
        commit += "+" * bool(git("status", "--porcelain", "-uno", "--", ":!docs"))
    machine = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):       # /proc is Linux's
        machine = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))[1]
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    return {"commit": commit, "machine": f"{machine}, {os.cpu_count()} CPU cores",
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "seed": seed}

def read_log(path) -> list[dict]:
    """Rows of a log.csv; [] where there is none. A line that is no row of numbers, such as one that
    was cut short, is left out, and that is said."""
    path = Path(path)
    if not path.exists():
        return []
    keys, *lines = csv.reader(path.read_text(encoding="utf-8", errors="replace").split("\n"),
                              quoting=csv.QUOTE_NONE)
    whole = [dict(zip(keys, line)) for line in lines if len(line) == len(keys)]
    rows = [row for row in whole if is_row(row)]
    damaged = sum(map(bool, lines)) - len(rows)         # an empty line is no loss
    if damaged:
        print(f"{path}: {damaged} damaged lines are left out", flush=True)
    return rows

def is_row(row: dict) -> bool:
    """Whether a row of a log has a step, and numbers, with a unit or without, or nothing else."""
    try:
        numbers = [float(value.rstrip("%G") or 0) for value in row.values()]
    except ValueError:
        return False
    return bool(numbers) and row.get("step", "").isdecimal()

def patiently(rename, *where):
    """rename(*where); on Windows again for some seconds, while a scanner has the file open."""
    for seconds in (0.1, 0.5, 2.0) if os.name == "nt" else ():
        with contextlib.suppress(PermissionError):
            return rename(*where)
        time.sleep(seconds)
    return rename(*where)

def command_line(words) -> str:
    """A command as this system's shell wants it, with quotes where they are needed."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join(list(map(str, words)))

def write_log(path: Path, rows: list[dict]):
    """All rows of a log.csv, whose columns are all keys in order of appearance."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, list(dict.fromkeys(k for row in rows for k in row)))
            writer.writeheader()
            writer.writerows(rows)
        patiently(os.replace, temporary, path)
    except PermissionError:
        if os.name != "nt":
            raise
        print(f"{path} is open in another program: its new rows come when it is closed", flush=True)
    finally:
        temporary.unlink(missing_ok=True)               # of a full disk

def short(key: str, value) -> str:
    """A value as the log line shows it."""
    if not isinstance(value, float):
        return str(value)
    digits = {"lr": ".1e", "loss": ".4f"}.get(key, ".0f" if value >= 100 else ".3f")
    return f"{value:{digits}}"

def duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 90 else f"{minutes}m{s:02d}s"
