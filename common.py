"""The one shared drawer: errors, config, devices and processes, the log line."""
import contextlib, csv, ctypes, dataclasses, difflib, errno, json, os, platform, socket, subprocess, sys, time, tomllib
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parent
ASSETS = ROOT / "assets"


# ---------------------------------------------------------------------------- errors that a user can mend
class UserError(Exception):
    """Bad input: the message says in one line what is wrong and how to mend it."""


@contextlib.contextmanager
def friendly():
    """Around every main(): a UserError (or a full disk) ends in one line on stderr and exit status 1, not in a traceback."""
    try:
        yield
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped by the keyboard")
    except (OSError, SafetensorError) as e:
        if not is_disk_full(e):
            raise
        sys.exit(f"error: the disk is full ({e}): free some space and run the same command again")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def is_disk_full(e: Exception) -> bool:
    return getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        s in str(e) for s in ("No space left", "File too large", "quota exceeded"))


# ---------------------------------------------------------------------------- config: TOML, then key=value
def fill(obj, values: dict, where: str = "config", prefix: str = ""):
    """Sets the fields of a (nested) dataclass from a dict. UserError names an unknown key's nearest neighbour, or a wrong type."""
    for key, value in values.items():
        name = prefix + key
        if not hasattr(obj, key) or key.startswith("_"):
            known = [f.name for f in dataclasses.fields(obj)]
            near = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else "known keys: " + ", ".join(known)
            raise UserError(f"{where}: unknown key '{name}'; {hint}")
        old = getattr(obj, key)
        if dataclasses.is_dataclass(old):
            if not isinstance(value, dict):
                raise UserError(f"{where}: '{name}' is a table; set its keys, such as {name}.{dataclasses.fields(old)[0].name}=...")
            fill(old, value, where, name + ".")
            continue
        if isinstance(old, float) and type(value) is int:
            value = float(value)
        if isinstance(old, (list, tuple)) and isinstance(value, (list, tuple)):
            value = type(old)(value)
            bad = [v for v in value if old and type(v) is not type(old[0])]
            if bad:
                raise UserError(f"{where}: '{name}' wants a list of {type(old[0]).__name__}, got {bad[0]!r} in it")
        elif type(value) is not type(old):
            raise UserError(f"{where}: '{name}' wants {type(old).__name__} (like {old!r}), got {value!r}")
        setattr(obj, key, value)
    return obj


def read_config(cfg, argv: list[str], default: str | None = None):
    """`--config FILE key=value table.key=value ...` over the dataclass instance `cfg`. Returns cfg."""
    argv, path = list(argv), default
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: python {Path(sys.argv[0]).name} [--config FILE.toml] [key=value ...]\n\nkeys and their defaults:")
        print(json.dumps(dataclasses.asdict(cfg), indent=1))
        sys.exit(0)
    if argv and argv[0].startswith("--config"):
        first = argv.pop(0)
        path = first.split("=", 1)[1] if "=" in first else argv.pop(0) if argv else None
        if not path:
            raise UserError("--config wants a file, such as --config configs/nano.toml")
    if path:
        try:
            fill(cfg, tomllib.loads(Path(path).read_text()), str(path))
        except FileNotFoundError:
            raise UserError(f"no config file {path}; there are: " + ", ".join(sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("configs/*.toml"))))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as e:
            raise UserError(f"{path} is not valid TOML: {e}")
    for arg in argv:
        key, eq, text = arg.removeprefix("--").partition("=")
        if not eq:
            raise UserError(f"what is '{arg}'? Overrides are written key=value, such as lr=1e-3 or model.depth_mid=2")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text                                    # an unquoted string, such as out=runs/a
        for part in reversed(key.split(".")):
            value = {part: value}
        fill(cfg, value, "command line")
    return cfg


# ---------------------------------------------------------------------------- devices and processes
def pick_device(name: str = "auto") -> torch.device:
    """auto: CUDA, else Apple's MPS, else CPU. UserError where the one asked for is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if (name.startswith("cuda") and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"device '{name}' is not available here; use device=cpu, or leave it at auto")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device '{name}': use auto, cpu, cuda, cuda:1 or mps")


def setup(device: str = "auto") -> tuple[torch.device, int, int]:
    """Device, rank, world size. Joins the process group when torchrun started us; else (device, 0, 1)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    dev = pick_device(device)
    if world > 1:
        if dev.type == "cuda":
            dev = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(dev)
        dist.init_process_group("nccl" if dev.type == "cuda" else "gloo")
    if dev.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        keep_memory_mapped()
    return dev, (dist.get_rank() if world > 1 else 0), world


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_others(processes: int):
    """On a CPU: starts this very command as ranks 1 .. processes-1 and makes us rank 0, with an equal share of the cores each. Small networks gain
    more from processes than from threads, which wait for each other after every operation (LOG.md)."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": str(threads)}
    for rank in range(1, processes):                        # they say nothing: an error of theirs breaks the group, and so shows in ours
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "RANK": str(rank)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ["RANK"] = "0"
    torch.set_num_threads(threads)


def anywhere(flag: bool, world: int) -> bool:
    """True on all ranks where it is on one: they leave a loop together, or the others would wait for ever."""
    if world == 1:
        return flag
    flags = [None] * world
    dist.all_gather_object(flags, flag)
    return any(flags)


def mean_over(x: torch.Tensor, world: int) -> torch.Tensor:
    """The mean of the processes' values."""
    if world > 1:
        dist.all_reduce(x)
    return x / world


def use_bfloat16(amp: str, device: torch.device) -> bool:
    """amp: bfloat16, float32, or auto: bfloat16 on CUDA and on CPUs with instructions for it (twice as fast in training; elsewhere many times slower)."""
    if amp not in ("auto", "bfloat16", "float32"):
        raise UserError(f"amp '{amp}': use auto, bfloat16 or float32")
    if amp == "auto" and device.type == "cpu":
        with contextlib.suppress(OSError):                  # /proc is Linux's
            return any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16"))
    return amp == "bfloat16" or (amp == "auto" and device.type == "cuda")


def attention(q, k, v, mask=None):
    """scaled_dot_product_attention, but in fp32 on a CPU even under autocast: its backward pass in bfloat16 is nine times slower there."""
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).type_as(v)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def keep_memory_mapped():
    """glibc hands big buffers back to the system after every op, and page faults then dominate CPU runs: tell it to keep them, and PyTorch to ask for pages of 2 MiB."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, -1)                                # M_TRIM_THRESHOLD: never
        libc.mallopt(-4, 0)                                 # M_MMAP_MAX: no buffer of its own mapping, which free() would unmap


def peak_memory(device: torch.device) -> float:
    """GiB: of CUDA's allocator, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource                                     # not on Windows
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def provenance(seed: int = 0) -> dict:
    """What stands beside every measured figure: commit ("+" where files differ from it, docs/ aside), machine, versions, date, seed."""
    git = lambda *a: subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    if not torch.cuda.is_available() and Path("/proc/cpuinfo").exists():
        name = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), name)
    return {"commit": git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno", "--", ":!docs")), "machine": f"{name}, {os.cpu_count()} CPU cores",
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "seed": seed}


# ---------------------------------------------------------------------------- log
class Log:
    """Prints the log line and appends it to a CSV: `step 1200/20000 (6%) | loss 0.5123 | lr 2.0e-04 | 412 img/s | eta 41m`.
    Rows after `start` (written before an interruption, then repeated) are cut."""

    def __init__(self, path, total: int, start: int = 0, quiet: bool = False):
        self.path, self.total, self.quiet, self.begin, self.first = Path(path), total, quiet, time.time(), start
        if quiet:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [r for r in read_log(self.path) if int(r["step"]) <= start] if start else []
        self.write()

    def write(self):
        fields = list(dict.fromkeys(k for r in self.rows for k in r))
        tmp = self.path.with_suffix(".tmp")
        with open(tmp, "w", newline="") as f:
            writer = csv.DictWriter(f, fields)
            writer.writeheader()
            writer.writerows(self.rows)
        tmp.rename(self.path)

    def __call__(self, step: int, show: bool = True, **values):
        if self.quiet:
            return
        self.rows.append({"step": step, **values})
        self.write()
        if show:
            left = (time.time() - self.begin) / max(1, step - self.first) * (self.total - step)
            parts = [f"step {step}/{self.total} ({100 * step // self.total}%)"] + [f"{k} {short(k, v)}" for k, v in values.items()]
            print(" | ".join(parts + [f"eta {clock(left)}"]), flush=True)


def read_log(path) -> list[dict]:
    path = Path(path)
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def short(key: str, v) -> str:
    if not isinstance(v, float):
        return str(v)
    return f"{v:.1e}" if key == "lr" else f"{v:.0f}" if v >= 100 else f"{v:.4f}" if "loss" in key or key == "val" else f"{v:.2f}"


def clock(seconds: float) -> str:
    s = int(seconds)
    return f"{s}s" if s < 90 else f"{s // 60}m" if s < 5400 else f"{s // 3600}h{s % 3600 // 60:02d}m"
