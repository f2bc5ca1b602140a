"""Malformed inputs for all commands: each must end in one line, or be right after all.

    python -m lab.fuzz [--cases 1000] [--seed 0] [--kind 7] [--verbose]

Eighteen kinds of faults that were found once. Each command runs in this process, on networks of
seconds. Prints how many inputs of each kind were answered well, ended in a traceback, were accepted
in silence, or hung; exit status 1 unless all were answered well. Linux and macOS.
"""
import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

from data import export_pictures
from lab.faults import KINDS, Case
from scenes import CATEGORIES
from test_all import Pipeline, command, make_bundle, succeeds

HANG = 60           # seconds

class Hang(BaseException):
    """The command took longer than HANG."""

class Home:
    """What is malformed: a tiny run of some stages, caches, own pictures, a bundle."""
    def __init__(self, folder: Path, pipeline: Pipeline | None = None):
        self.folder, self.pipeline = folder, pipeline or Pipeline(folder / "pipeline")
        for stage in ("train", "mmdit", "gan"):
            self.pipeline(stage)
        self.pictures, self.cache = folder / "pictures", folder / "cache"
        export_pictures(self.pictures, 20)
        self.own = [f"data.folder={self.pictures}", "data.bucket_step=16", "data.shard=8"]
        succeeds("train.py", "--cache", *self.words("train", self.cache)[1:], *self.own)
        self.bundle = make_bundle(folder / "coreml")

    def words(self, stage: str, cache=None, out=None) -> list:
        """One step of a stage."""
        words = [*self.pipeline.command(stage), "steps=1"]
        words += [f"data.cache={cache}"] * bool(cache) + [f"out={out}"] * bool(out)
        return words

    def copy(self, source: Path, folder: Path) -> Path:
        return shutil.copytree(source, folder / source.name)

# ---------------------------------------------------------------------------- the judge
def hang(*_):
    raise Hang

def answer(case: Case) -> tuple[str, str]:
    """(well, traceback, silent or hang; what the command said last)."""
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANG)
    try:
        with case.around:
            status, said = command(case.words[0], *case.words[1:])
    except Hang:
        return "hang", ""
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)
    last = (said.strip().splitlines() or [""])[-1]
    one_line = status and "Traceback" not in said and "error: " in last
    if case.want == "work" or (case.want == "any" and not status):
        return ("well" if not status else "silent"), last
    return ("well" if one_line else "traceback" if status else "silent"), last

def litter(folder: Path) -> str:
    """The first left-over of a save that broke off."""
    return next((str(p) for p in folder.rglob("*") if ".tmp" in p.name), "")

def ask(number: int, seed: str, home: Home, folder: Path) -> tuple[Case, str, str]:
    """Draws a case of a kind, runs it in a folder of its own -> (case, verdict, last line)."""
    (folder / "here").mkdir(parents=True)
    before = os.getcwd()
    os.chdir(folder / "here")                       # where nothing may be written unasked
    try:
        case = KINDS[number](random.Random(f"{number}/{seed}"), home, folder)
        verdict, last = answer(case)
        left = litter(folder) or next(map(str, (folder / "here").iterdir()), "")
        if verdict == "well" and left:
            verdict, last = "silent", f"left {left} behind"
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)
    return case, verdict, last

@contextlib.contextmanager
def quicker():
    """Without what takes long and is no input's matter: measuring the machine, the detector's own
    ceiling, charts."""
    top = dict.fromkeys((*CATEGORIES, "three"), 1.0)
    with mock.patch("costs.matmul_speed", lambda *_: 1e12), \
            mock.patch("checker.ceiling", lambda *_: (dict(top), dict(top))), \
            mock.patch("plots.chart", lambda *_: None):
        yield

def main(argv):
    p = argparse.ArgumentParser(prog="python -m lab.fuzz", description=__doc__.split("\n")[0])
    p.add_argument("--cases", type=int, default=1000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--kind", type=int, nargs="*", help="only these, of 1 to 18")
    p.add_argument("--verbose", action="store_true", help="print every answer")
    a = p.parse_args(argv)
    chosen = a.kind or list(KINDS)
    found, seconds = defaultdict(Counter), Counter()
    with tempfile.TemporaryDirectory() as top, quicker():
        home = Home(Path(top) / "home")
        for number in chosen:
            for i in range(number % len(chosen), a.cases, len(chosen)):
                begin = time.time()
                folder = Path(top) / f"{number}-{i}"
                case, verdict, last = ask(number, f"{a.seed}/{i}", home, folder)
                found[number][verdict] += 1
                seconds[number] += time.time() - begin
                if verdict != "well" or a.verbose:
                    words = " ".join(map(str, case.words)).replace(top, "")[-300:]
                    print(f"{number}: {verdict} (wanted {case.want}): {words!r}\n    {last}",
                          flush=True)
    print(f"{'kind':64}{'well':>6}{'traceback':>11}{'silent':>8}{'hang':>6}{'s':>6}")
    for number, counts in found.items():
        row = [counts[v] for v in ("well", "traceback", "silent", "hang")]
        title = f"{number:2} {KINDS[number].__doc__}"
        print(f"{title:64}{row[0]:6}{row[1]:11}{row[2]:8}{row[3]:6}{seconds[number]:6.0f}")
    total = sum(found.values(), Counter())
    print(f"{total.total()} inputs, {total['well']} answered well")
    sys.exit(int(total["well"] != total.total()))

if __name__ == "__main__":
    main(sys.argv[1:])
