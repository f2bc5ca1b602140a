"""Packs what trainings leave into pieces small enough to carry, while they still run.

    python -m lab.pieces OUT RUN ... [--best]       until SIGTERM; lab/flagship.sh starts it
    cat OUT/base.tar.* | tar x                      joins a run's pieces again

OUT/base.tar.00, .01, ..: the folder base, a checkpoint of the averaged weights of the run RUN =
../base in fp16, the newest that there are; with its charts, its last sheet of samples, its scores.
OUT/logs.tar.00: the logs and scores of all runs, and every *.txt beside them. --best: of the
students of few steps only the one that scores best (before that: the first one), where little may
be carried.
"""
import io
import json
import signal
import sys
import tarfile
import time
from functools import partial
from itertools import count
from pathlib import Path

from checkpoint import read_description, resolve, save_checkpoint, write_whole
from common import UserError, die_with_parent, friendly, is_disk_full, provenance
from model import load_model

PIECE = 2**24               # bytes
LOOK = 5                    # seconds between two looks at the runs

def pack(name: str, files: dict[str, Path], out: Path):
    """Writes files {path in the folder `name`: file} as a tar in pieces; stale pieces go."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for inside, file in sorted(files.items()):
            tar.add(file, f"{name}/{inside}")
    data = whole.getvalue()
    pieces = [data[i:i + PIECE] for i in range(0, len(data), PIECE)]
    names = [f"{name}.tar.{i:02}" for i in range(len(pieces))]
    for piece, file in zip(pieces, names):
        write_whole(out / file, partial(Path.write_bytes, data=piece))
    unpack(name, out, names)

def unpack(name: str, out: Path, but=()):
    """Removes the pieces of `name` from OUT, but these."""
    for file in out.glob(f"{name}.tar.*"):
        if file.name not in but:
            file.unlink()

def weights_of(run: Path) -> Path:
    """A checkpoint of a run's averaged weights in fp16: its final/, or what it saved last."""
    if (run / "final").is_dir():
        return run / "final"
    half, step = run / "half", read_description(resolve(run)).get("step")
    if not half.is_dir() or read_description(half).get("step") != step:
        net, config = load_model(run)
        state = {key: x.half() for key, x in net.state_dict().items()}
        save_checkpoint(half, {"model": state}, config, latest=False, files=net.files())
    return half

def contents(run: Path) -> dict[str, Path]:
    """What is packed of a run: {path in its folder: file}."""
    files = {file.name: file for file in weights_of(run).iterdir()}
    files |= {f"{name}.png": run / f"{name}.png" for name in ("loss", "health")}
    for sheet in sorted(run.glob("samples_*.png")):
        files["samples.png"] = sheet                # the last one
    files |= {f"{file.parent.name}/{file.name}": file for file in run.glob("*/score.*")}
    return {inside: file for inside, file in files.items() if file.exists()}

def logs_of(runs: list[Path]) -> dict[str, Path]:
    files = {f"{run.name}.csv": run / "log.csv" for run in runs}
    for run in runs:
        files |= {file.name: file for file in run.parent.glob("*.txt")}
        files |= {f"{run.name}_{f.parent.name}.json": f for f in run.glob("*/score.json")}
    return {inside: file for inside, file in files.items() if file.exists()}

def own_score(run: Path) -> float:
    """The mean score in the grammar's own words; -1 where there is none yet."""
    file = run / "own/score.json"
    return json.loads(file.read_text("utf-8"))["scores"]["mean"]["score"] if file.exists() else -1.0

def what_to_pack(runs: list[Path], best: bool) -> dict[str, dict[str, Path]]:
    """{name: what to pack}; nothing to pack of students that are not the best."""
    found, students = {"logs": logs_of(runs)}, []
    for run in runs:
        try:
            found[run.name] = contents(run)
            if "few_steps" in read_description(weights_of(run)):
                students.append(run)
        except UserError:                           # nothing saved yet
            continue
    if best and students:
        kept = max(students, key=own_score)         # the first of equals
        found |= {run.name: {} for run in students if run != kept}
    return found

def pack_news(out: Path, runs: list[Path], best: bool, packed: dict):
    """Packs what is new. packed: {name: its files and their times}, brought up to date."""
    for name, files in what_to_pack(runs, best).items():
        state = [(file, file.stat().st_mtime_ns) for file in files.values()]
        if state == packed.get(name):
            continue
        if files:
            pack(name, files, out)
        else:
            unpack(name, out)
        packed[name] = state

def watch(out: Path, runs: list[Path], best: bool):
    """Looks every few seconds, and once more at SIGTERM."""
    stop, packed = [], {}
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    die_with_parent()
    out.mkdir(parents=True, exist_ok=True)
    for tick in count():
        last = bool(stop)                           # asked before the look: it misses nothing
        if last or tick % (2 * LOOK) == 0:
            try:
                pack_news(out, runs, best, packed)
            except (OSError, ValueError) as e:      # a file that is being written: next time
                if last or is_disk_full(e):
                    raise
        if last:
            return
        time.sleep(0.5)

def main(argv):
    out, *runs = [Path(word) for word in argv if word != "--best"] or [Path()]
    names = {run.name for run in runs} - {"logs"}
    if not runs or len(names) < len(runs):
        raise UserError("python -m lab.pieces OUT RUN ... [--best]; each RUN has a name of its "
                        "own, other than logs")
    print("{machine}, torch {torch}, commit {commit}, {date}".format(**provenance()), flush=True)
    watch(out, runs, "--best" in argv)

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
