"""Checkpoints and resumable runs.

A checkpoint is a directory, never a pickle:
    config.json             the resolved config, our version, the step, a CRC-32 of every other file
    model.safetensors       weights as trained, under the name that the hub expects
    ema.safetensors         their moving average, which sampling uses where it is present
    optimizer.safetensors   optimizer moments, only in runs that can be resumed
    captions.tiktoken       the vocabulary that the text encoder was trained with
`latest` beside the checkpoints of a run is a text file that names the newest one.
"""
import contextlib
import json
import os
import shutil
import signal
import threading
import time
import zlib
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from common import (
    ROOT,
    UserError,
    anywhere,
    duration,
    is_disk_full,
    mean_over,
    patiently,
    peak_memory,
    read_log,
    short,
    write_log,
)
from optim import EMA, Muon

VERSION = "0.2.0"

def crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value

def sync(path: Path):
    """Flushes a file, or a directory's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return                                              # Windows opens no directories
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    os.fsync(fd)
    os.close(fd)

def write_whole(path: Path, save):
    """Calls save(temporary path), then puts the file in place: all of it or nothing.
    The temporary file has a folder of its own, since safetensors makes others beside it."""
    folder = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary = folder / path.name
    try:
        folder.mkdir(exist_ok=True)
        temporary.touch()                                   # with the mode that the umask gives
        mode = temporary.stat().st_mode
        save(temporary)
        temporary.chmod(mode)                               # safetensors writes 0600
        sync(temporary)
        patiently(os.replace, temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

@contextlib.contextmanager
def replacing(path, latest: bool = True):
    """Yields a temporary directory, which takes the place of `path` when the block ends.
    All or nothing: what was saved before stays until then. latest: the run's pointer then names it.
    UserError where the disk is full."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    old = path.with_name(path.name + ".old")
    try:
        if old.exists() and not path.exists():
            old.rename(path)                                # killed between its two renames
        for p in (temporary, old, *path.parent.glob("latest.tmp*")):    # of killed processes
            shutil.rmtree(p, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        sync(temporary)
        if path.exists():
            patiently(path.rename, old)
        patiently(temporary.rename, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
        if latest:
            newest = path.name.encode()
            write_whole(path.with_name("latest"), lambda file: file.write_bytes(newest))
    except BaseException as e:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        if is_disk_full(e):
            raise UserError(f"the disk is full: {path} was not written, older checkpoints are "
                            "whole; free some space and resume") from e
        raise

def save_checkpoint(path, tensors: dict, config: dict, latest: bool = True, files=None):
    """Writes {name}.safetensors for each entry of `tensors`, and config.json, all or nothing.
    tensors: {name: {key: tensor}}; files: {file name: bytes}, further files of the checkpoint."""
    with replacing(path, latest) as folder:
        sums = {}
        for name, state in tensors.items():
            state = {k: v.detach().contiguous().cpu() for k, v in state.items()}
            write_whole(folder / f"{name}.safetensors", lambda file, s=state: save_file(s, file))
            sums[f"{name}.safetensors"] = crc32(folder / f"{name}.safetensors")
        for name, data in (files or {}).items():
            write_whole(folder / name, lambda file, d=data: file.write_bytes(d))
            sums[name] = crc32(folder / name)
        text = json.dumps({**config, "version": VERSION, "crc32": sums}, indent=1)
        write_whole(folder / "config.json", lambda file: file.write_text(text, "utf-8"))

def resolve(path) -> Path:
    """A checkpoint's directory, or a run's (then the one that `latest` names).
    Relative to the working directory, else to the repository."""
    path = Path(path).expanduser()
    if not path.exists() and (ROOT / path).exists():
        path = ROOT / path                                  # "assets/ae" from any directory
    pointer = path / "latest"
    if pointer.is_file():
        path = path / Path(pointer.read_text("utf-8", "replace").strip()[:99]).name
        if not path.exists():
            path = path.with_name(path.name + ".old")       # killed between two renames of a save
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: give a directory that holds config.json and "
                        f"model.safetensors; one of the hub's is written {HUB}OWNER/NAME")
    return path

KINDS = {           # of the entries of config.json that are read
    "things": list, **dict.fromkeys(("step", "ema_steps"), int),
    **dict.fromkeys(("stage", "arch", "ae"), str),
    **dict.fromkeys(("crc32", "model", "mmdit", "text", "data", "flow", "few_steps", "autoencoder"),
                    dict)}

def read_description(path: Path) -> dict:
    """A checkpoint's config.json."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no table of settings")
        for key, kind in KINDS.items():
            value = config.get(key)
            if value is not None and (type(value) is not kind or kind is int and value < 0):
                raise ValueError(f"'{key}' is {value!r:.60}, no {kind.__name__}")
    except (ValueError, RecursionError, OSError) as e:
        raise UserError(f"{file} is missing or damaged ({e}): this is no checkpoint of ours, or a "
                        "half-written one; use another") from None
    return config

def check_file(path: Path, config: dict, name: str) -> Path:
    """The file `name` of a checkpoint. UserError where it is missing or its checksum differs."""
    file = path / name
    trouble = ""
    if not file.is_file():
        trouble = "missing"
    elif name in config.get("crc32", {}) and crc32(file) != config["crc32"][name]:
        trouble = "damaged (its checksum differs)"
    if trouble:
        raise UserError(f"{file} is {trouble}: copy it again, or use an older checkpoint")
    return file

def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} is damaged or half-written ({e}): copy it again, or use an older "
                        "checkpoint") from None

def load_checkpoint(path, names=("model",)) -> tuple[dict, dict[str, dict]]:
    """(config, {name: {key: tensor}}) for those `names` that are there; the first one must be.
    UserError where a file is missing, cut short or altered."""
    path = resolve(path)
    config = read_description(path)
    state = {}
    for name in names:
        file = f"{name}.safetensors"
        if name == names[0] or file in config.get("crc32", {}):
            state[name] = read_tensors(check_file(path, config, file))
    return config, state

HUB = "hf:"     # before a hub id; anything else is a path, so that a mistyped one asks nobody

def hub_folder(source, inside: str) -> Path:
    """The directory of a network in the hub's layout: SOURCE/inside, or SOURCE itself. SOURCE is a
    directory, or HUB and a hub id, which is downloaded."""
    hub_id = str(source).removeprefix(HUB)
    folder = Path(source).expanduser()
    if hub_id != str(source):
        try:
            from huggingface_hub import snapshot_download  # a dependency of transformers
            patterns = [f"{inside}/*.json", f"{inside}/*.safetensors"]
            folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
        except Exception as e:                              # many types: network, hub, files
            raise UserError(f"the hub does not give {hub_id} ({type(e).__name__}): check the name, "
                            "the network, and for gated models `hf auth login`") from None
    elif not folder.is_dir():
        raise UserError(f"no directory {source}: give another, or {HUB}OWNER/NAME for the hub's")
    return folder / inside if (folder / inside).is_dir() else folder

def hub_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of diffusion_pytorch_model*.safetensors; fp16 files only where no others are."""
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    files = [f for f in files if ".fp16" not in f.name] or files
    if not files:
        raise UserError(f"{folder} has no diffusion_pytorch_model.safetensors: the download is "
                        "incomplete (a .bin file is a pickle, which is not read here)")
    state = {}
    for file in files:
        state |= read_tensors(file)
    check_finite(state, str(folder))
    return state

def check_fit(own: dict, state: dict, what: str):
    """UserError names the first key in which two {key: form} differ."""
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    wrong = [k for k in own if k in state and own[k] != state[k]]
    if missing or extra or wrong:
        first = [*missing, *extra, *wrong][0]
        raise UserError(f"{what} does not fit its config, first in '{first}' ({len(missing)} "
                        f"missing, {len(extra)} unknown, {len(wrong)} of another shape or kind)")

def check_finite(state: dict, what: str):
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise UserError(f"{what} holds values that are not finite (first in '{bad[0]}'): use an "
                        "older checkpoint")

class WithoutInit(TorchFunctionMode):
    """Inside, torch.nn.init draws nothing: for networks whose weights a file replaces."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))

def load_into(module, state: dict, what: str):
    """A module's or EMA's load_state_dict that names the first difference, or the first NaN."""
    forms = [{k: (v.shape, v.is_floating_point()) for k, v in tensors.items()}
             for tensors in (module.state_dict(), state)]
    check_fit(*forms, what)
    check_finite(state, what)
    module.load_state_dict(state)
    return module

class Run:
    """A training run that logs, saves, stops on SIGTERM and resumes where it was.
    cfg: has out, steps, log_every, eval_every. parts: modules, EMA and optimizers; each name is a
    file of the checkpoint. describe: further entries of config.json; files: {name: bytes}, further
    files of the checkpoint; shown: keys of the printed line, all scalars by default.
    UserError where cfg.out holds a run of another stage, or one with more steps than cfg.steps:
    nothing that is finished is replaced by less."""
    def __init__(self, cfg, device, rank=0, world=1, describe=None, files=None, shown=(), **parts):
        self.cfg, self.device, self.world = cfg, device, world
        self.main = rank == 0
        stage = type(cfg).__name__.removesuffix("Config").lower()
        self.describe = {**asdict(cfg), "stage": stage, **(describe or {})}
        self.files = files or {}
        self.shown = shown
        self.parts = parts
        self.out = Path(cfg.out)
        self.stop = False
        self.start = self.step = self.resume() if (self.out / "latest").exists() else 0
        # rows after the checkpoint's step are about to be repeated
        old = read_log(self.out / "log.csv") if self.start else []
        self.rows = [row for row in old if int(row["step"]) <= self.start]
        self.seen = defaultdict(list)
        self.pictures = 0
        self.least = 0.0            # seconds a picture would take at the device's peak, for the MFU

    def resume(self) -> int:
        """Loads all parts; returns the steps that are done."""
        config, state = load_checkpoint(self.out, list(self.parts))
        where = f"{self.out}, made with other settings (give another out=),"
        if config.get("stage") != self.describe["stage"]:
            raise UserError(f"{self.out} is a run of stage '{config.get('stage')}', not of "
                            f"'{self.describe['stage']}': give another out=")
        if config["step"] > self.cfg.steps:
            raise UserError(f"{self.out} has {config['step']} steps done, steps={self.cfg.steps} "
                            "asks for fewer: it is left as it is; ask for more, or give another "
                            "out=")
        for name, part in self.parts.items():
            if name not in state:
                raise UserError(f"{self.out} was trained without its {name}: resume with the "
                                "settings that it began with, or give another out=")
            if isinstance(part, Muon):
                check_finite(state[name], where)
                part.load_tensors(state[name], where)
            else:
                load_into(part, state[name], where)
            if isinstance(part, EMA):
                part.count.fill_(config["ema_steps"])
        return config["step"]

    def steps(self):
        """Yields the number of each step, from 0, until cfg.steps or SIGTERM (on Windows, which
        lacks it, Ctrl+Break). A thread, such as an app's, gets no signals."""
        def on_signal(*_):
            self.stop = True

        previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in {getattr(signal, "SIGBREAK", signal.SIGTERM), signal.SIGTERM}:
                previous[number] = signal.signal(number, on_signal)
        self.begin = self.clock = time.time()
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
        try:
            for step in range(self.start, self.cfg.steps):
                if step % 5 == 0:                           # together: a rank alone would wait
                    self.stop = anywhere(self.stop, self.world)
                if self.stop and (step % 5 == 0 or self.world == 1):
                    return
                self.step = step + 1
                yield step
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def due(self) -> bool:
        """Whether this step ends with a save and an evaluation."""
        return self.step % self.cfg.eval_every == 0 or self.step == self.cfg.steps

    def log(self, pictures: int = 0, learners=(), **values):
        """Notes a step's values; every cfg.log_every steps their means become a row and a line:

        `step 1200/20000 (6%) | loss 0.5123 | lr 2.0e-04 | 412 img/s | eta 41m`
        Tensors stay on the device until then. Vectors are columns k0, k1, .. of log.csv alone
        (nan: no value in this step). Numbers are taken as they are."""
        self.pictures += pictures * self.world
        for key, value in values.items():
            is_tensor = isinstance(value, torch.Tensor)
            self.seen[key].append(value.detach().float() if is_tensor else value)
        if self.step % self.cfg.log_every:
            return
        row, scalars = self.means()
        if self.pictures:
            row["img/s"] = self.pictures / max(1e-9, time.time() - self.clock)
        if self.pictures and self.least:
            row["mfu"] = f"{100 * row['img/s'] * self.least:.0f}%"
        row["mem"] = f"{peak_memory(self.device):.1f}G"
        self.row(**row)
        if self.main:
            self.print_line(row, [*(self.shown or scalars), "img/s", "mfu", "mem"])
        for trouble in [learner.trouble() for learner in learners]:
            if trouble and self.main:
                print(f"step {self.step}: {trouble}", flush=True)
        self.seen.clear()
        self.restart_clock()

    def means(self) -> tuple[dict, list[str]]:
        """(a row of what was noted since the last line, its keys that are scalars)."""
        row, scalars = {}, []
        for key, noted in self.seen.items():
            value = noted[-1]
            if isinstance(value, torch.Tensor):
                value = torch.stack(noted).nanmean(0)
                if key == "loss":
                    value = mean_over(value, self.world)
                value = value.tolist()
            if isinstance(value, list):
                row |= {f"{key}{i}": x for i, x in enumerate(value)}
            else:
                row[key] = value
                scalars.append(key)
        return row, scalars

    def print_line(self, row: dict, keys):
        total = self.cfg.steps
        left = (time.time() - self.begin) / max(1, self.step - self.start) * (total - self.step)
        parts = [f"step {self.step}/{total} ({100 * self.step // total}%)"]
        parts += [f"{k} {short(k, row[k])}" for k in keys if k in row]
        print(" | ".join([*parts, f"eta {duration(left)}"]), flush=True)

    def row(self, **values):
        """A row of log.csv that is not printed, such as a validation's."""
        if self.main:
            self.rows.append({"step": self.step, **values})
            write_log(self.out / "log.csv", self.rows)

    def lacks(self, *keys: str) -> bool:
        """Before the loop: whether the run was killed between a save and its evaluation, whose row
        has one of these keys."""
        rows = [row for row in self.rows if int(row["step"]) == self.start]
        there = any(row.get(key) for row in rows for key in keys)
        return self.main and self.start > 0 and self.due() and not there

    def restart_clock(self):
        """Call it after an evaluation, whose time is not training's."""
        self.pictures = 0
        self.clock = time.time()

    def save(self):
        """checkpoint/ with all parts, from the first process."""
        config = {**self.describe, "step": self.step}
        tensors = {}
        for name, part in self.parts.items():
            tensors[name] = part.tensors() if isinstance(part, Muon) else part.state_dict()
            if isinstance(part, EMA):
                config["ema_steps"] = int(part.count)
        if self.main:
            save_checkpoint(self.out / "checkpoint", tensors, config, files=self.files)

    def finish(self, final: dict, describe=None) -> bool:
        """Writes final/, weights in fp16, where all steps are done. False after SIGTERM."""
        if self.step < self.cfg.steps:
            self.save()
            if self.main:
                print(f"stopped by SIGTERM at step {self.step}: run the same command to go on")
            return False
        half = {k: v.half() if v.is_floating_point() else v for k, v in final.items()}
        check_finite(half, f"the network of {self.out} in fp16")
        config = {**self.describe, "step": self.step, **(describe or {})}
        if self.main:
            save_checkpoint(self.out / "final", {"model": half}, config, False, self.files)
        return True
