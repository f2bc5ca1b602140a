"""Checkpoints.

A checkpoint is a directory, never a pickle:
    config.json             resolved config, our version, step, a CRC-32 of every other file
    model.safetensors       weights as trained          (what the hub's from_pretrained expects)
    ema.safetensors         their moving average        (what sampling uses when it is there)
    optimizer.safetensors   optimiser moments, only in runs that can be resumed
A run that is sharded (shard.py) writes model/, ema/, .. instead, each with one safetensors file a process; they load alike.
`latest` beside the checkpoints of a run is a text file that names the newest one.
"""
import contextlib, json, os, shutil, warnings, zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import ROOT, UserError, is_disk_full

VERSION = "0.1.0"


def crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


@contextlib.contextmanager
def replacing(path, latest: bool = True):
    """A temporary directory to write into; when the block ends it is synced and takes the place of `path`, all or nothing. UserError when the disk is full;
    what was saved before stays. latest: the run's pointer names it then."""
    path = Path(path)
    tmp, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    try:
        if old.exists() and not path.exists():
            old.rename(path)                                # the last save was killed between its two renames
        for p in (tmp, old):
            shutil.rmtree(p, ignore_errors=True)
        tmp.mkdir(parents=True)
        yield tmp
        sync(tmp)
        if path.exists():
            path.rename(old)
        tmp.rename(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
        if latest:
            pointer = path.with_name("latest.tmp")
            pointer.write_text(path.name)
            sync(pointer)
            pointer.rename(path.with_name("latest"))
    except (OSError, SafetensorError) as e:
        shutil.rmtree(tmp, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        if is_disk_full(e):
            raise UserError(f"the disk is full: {path} was not written, older checkpoints are whole; free some space and resume") from e
        raise


def save_checkpoint(path, tensors: dict[str, dict], config: dict, latest: bool = True):
    """Writes {name}.safetensors for each entry of `tensors` and config.json into the directory `path`, all or nothing."""
    with replacing(path, latest) as tmp:
        sums = {}
        for name, state in tensors.items():
            file = tmp / f"{name}.safetensors"
            save_file({k: v.detach().contiguous().cpu() for k, v in state.items()}, file)  # safetensors refuses channels_last
            sync(file)
            sums[file.name] = crc32(file)
        write_config(tmp, config, sums)


def write_config(folder: Path, config: dict, sums: dict):
    (folder / "config.json").write_text(json.dumps({**config, "version": VERSION, "crc32": sums}, indent=1))
    sync(folder / "config.json")


def sync(path: Path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def resolve(path) -> Path:
    """A checkpoint directory, or a run's directory (then the one that `latest` names); relative to here or to the repository."""
    path = Path(path)
    if not path.exists() and (ROOT / path).exists():
        path = ROOT / path                                  # "assets/ae" from any folder
    pointer = path / "latest"
    if pointer.is_file():
        path = path / pointer.read_text().strip()
        if not path.exists() and (old := path.with_name(path.name + ".old")).exists():
            path = old                                      # killed between the two renames of a save
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: give a directory that holds config.json and model.safetensors")
    return path


def read_description(path: Path) -> dict:
    """Its config.json."""
    try:
        return json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{path} has no config.json: it is not a checkpoint of ours, or a half-written one; use another directory")
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}/config.json is damaged ({e}): use an older checkpoint of the run")


def files_of(path: Path, config: dict, name: str) -> list[Path]:
    """Of an entry of a checkpoint: its file, or those of its folder; none if it has no such entry."""
    known = [path / f for f in config.get("crc32", {}) if f == f"{name}.safetensors" or f.startswith(f"{name}/")]
    return known or [f for f in [path / f"{name}.safetensors"] if f.is_file()]


def check_file(path: Path, config: dict, file: Path):
    if not file.is_file():
        raise UserError(f"{file} is missing: the checkpoint is incomplete; copy it again or use an older one")
    expected = config.get("crc32", {}).get(file.relative_to(path).as_posix())
    if expected is not None and crc32(file) != expected:
        raise UserError(f"{file} is damaged (its checksum differs): copy it again, or use an older checkpoint of the run")


def load_checkpoint(path, names=("model",)) -> tuple[dict, dict[str, dict]]:
    """Returns (config, {name: {key: tensor}}) for those `names` that are there; the first one must be.
    UserError when a file is missing, cut short or altered."""
    path = resolve(path)
    config, out = read_description(path), {}
    for name in names:
        files = files_of(path, config, name)
        if not files and name != names[0]:
            continue
        for file in files or [path / f"{name}.safetensors"]:
            check_file(path, config, file)
        try:
            if files[0].parent == path:
                with safe_open(files[0], framework="pt") as f:
                    out[name] = {k: f.get_tensor(k) for k in f.keys()}
            else:
                out[name] = join(files[0].parent)
        except SafetensorError as e:
            raise UserError(f"{files[0]} is damaged or half-written ({e}): use an older checkpoint of the run")
    return config, out


def hub_folder(source, inside: str, get: str = "") -> Path:
    """The directory of a network in the hub's layout: SOURCE/inside, or SOURCE itself where that has no such folder. What is no directory is a hub id, and downloaded.
    UserError in one line; `get` says in it what to download, how large it is, and where to put it."""
    folder = Path(source)
    if not folder.exists():
        try:
            from huggingface_hub import snapshot_download                                # a dependency of transformers
            folder = Path(snapshot_download(str(source), allow_patterns=[f"{inside}/*.json", f"{inside}/*.safetensors"]))
        except Exception as e:
            raise UserError(f"no directory {source}, and the hub does not give it ({type(e).__name__}): check the name, the network, and for gated models `hf auth login`{'; ' * bool(get)}{get}")
    return folder / inside if (folder / inside).is_dir() else folder


def hub_tensors(folder: Path) -> dict:
    """All of diffusion_pytorch_model*.safetensors in `folder`, shards together; the fp16 variant only where there is no other."""
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    files = [f for f in files if ".fp16" not in f.name] or files
    if not files:
        raise UserError(f"{folder} has no diffusion_pytorch_model.safetensors: the download is incomplete (a .bin file is a pickle, which is not read here)")
    state = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                state |= {k: f.get_tensor(k) for k in f.keys()}
        except SafetensorError as e:
            raise UserError(f"{file} is damaged or half-written ({e}): download it again")
    return state


def join(folder: Path) -> dict:
    """Whole tensors from the files of several processes."""
    import torch.distributed.checkpoint as dcp
    reader = dcp.HuggingFaceStorageReader(folder)
    state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in reader.read_metadata().state_dict_metadata.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)        # "assuming the intent is to load in a single process": it is
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def check_fit(own: dict, state: dict, what: str):
    """UserError names the first key in which two {key: shape} differ."""
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [k for k in own.keys() & state.keys() if own[k] != state[k]]
    if missing or extra or wrong:
        first = (f"lacks '{missing[0]}'" if missing else f"has an unknown '{extra[0]}'" if extra else
                 f"'{wrong[0]}' has shape {tuple(state[wrong[0]])}, the config wants {tuple(own[wrong[0]])}")
        raise UserError(f"{what} does not fit its config: {first} ({len(missing)} missing, {len(extra)} unknown, {len(wrong)} of another shape)")


def load_into(module: torch.nn.Module, state: dict, what: str):
    """load_state_dict, with the first difference named in one line."""
    check_fit({k: v.shape for k, v in module.state_dict().items()}, {k: v.shape for k, v in state.items()}, what)
    module.load_state_dict(state)
    return module
