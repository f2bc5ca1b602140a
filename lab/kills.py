"""Kills (-9) at random moments: every run that is resumed must equal an uninterrupted one.

    python -m lab.kills [--train 50] [--cache 20] [--adv 10] [--seed 0]

Tiny runs of train.py, of the cache of own pictures, and of adv_distill.py. Each is killed up to
five times, at moments drawn evenly from its whole length, and then finished. Compared bit for bit:
all tensors of the checkpoint and of final/, every file of the cache, the rows of log.csv but for
their times. Nothing temporary may be left. By fork, so Linux and macOS only.
"""
import argparse
import contextlib
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

from common import friendly, read_log
from data import export_pictures
from lab.fuzz import quicker
from test_all import Pipeline

TIMES = ("img/s", "mem", "mfu")         # columns of log.csv that differ each time
IN_A_ROW = 5                            # kills of one run, at most

def start(words: list) -> int:
    """Runs `python WORDS` in a child process -> its id. The child shares what is imported."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing), \
            contextlib.redirect_stderr(nothing):
        sys.argv = list(map(str, words))
        try:
            runpy.run_module(sys.argv[0].removesuffix(".py"), run_name="__main__", alter_sys=True)
            os._exit(0)
        finally:
            os._exit(1)

def run_to_end(words: list) -> float:
    """Runs it to its end -> seconds."""
    begin = time.time()
    status = os.waitpid(start(words), 0)[1]
    if status:
        raise SystemExit(f"error: exit status {status}: {' '.join(map(str, words))}")
    return time.time() - begin

def state(folder: Path, files: str) -> dict:
    """What must be equal: {name: bytes} of files, and the log's rows but for their times."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob(files))}
    log = [{k: v for k, v in row.items() if k not in TIMES} for row in read_log(folder / "log.csv")]
    return {**found, "log": log}

def killed(words_of, folder: Path, files: str, kills: int, rng: random.Random) -> int:
    """Kills runs of words_of(out) so many times -> how many of those that were then finished
    differ from one that was not killed."""
    seconds = run_to_end(words_of(folder / "whole"))        # what all share is cached now
    seconds = run_to_end(words_of(folder / "again"))
    wanted = state(folder / "whole", files)
    wrong = int(state(folder / "again", files) != wanted)
    done = runs = 0
    while done < kills:
        out, runs, before = folder / f"run{runs}", runs + 1, done
        for _ in range(rng.randint(1, IN_A_ROW)):
            if done == kills:
                break
            pid = start(words_of(out))
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            done += os.WIFSIGNALED(os.waitpid(pid, 0)[1])       # it may have ended by itself
        run_to_end(words_of(out))
        found = state(out, files)
        names = [name for name in wanted | found if wanted.get(name) != found.get(name)]
        left = [str(p) for p in out.rglob("*") if ".tmp" in p.name]
        if names or left:
            wrong += 1
            print(f"{out.name}, killed {done - before} times: differs in {names}, left {left}",
                  flush=True)
    print(f"{folder.name}: {done} kills of {runs} runs of {seconds:.1f} s, {wrong} differ from the "
          "uninterrupted one", flush=True)
    return wrong

def main(argv):
    p = argparse.ArgumentParser(prog="python -m lab.kills", description=__doc__.split("\n")[0])
    p.add_argument("--train", type=int, default=50)
    p.add_argument("--cache", type=int, default=20)
    p.add_argument("--adv", type=int, default=10)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args(argv)
    rng, wrong = random.Random(a.seed), 0
    with tempfile.TemporaryDirectory() as top, quicker():
        top = Path(top)
        pipeline, pictures = Pipeline(top / "pipeline"), top / "pictures"
        export_pictures(pictures, 60)
        more = ["steps=16", "eval_every=2"]

        def train(out):
            # a cache of its own: the drawing of scenes is killed too
            return [*pipeline.command("train"), *more, f"out={out}", f"data.cache={out}/cache",
                    "data.pictures=1100"]

        def cache(out):
            return ["train.py", "--cache", *pipeline.command("train")[1:], "data.workers=2",
                    f"data.cache={out}", f"data.folder={pictures}", "data.bucket_step=16",
                    "data.shard=4"]

        def adv(out):
            return [*pipeline.command("gan"), *more, f"out={out}"]

        if a.train:
            wrong += killed(train, top / "train", "[cf]*/*.safetensors", a.train, rng)
        if a.cache:
            wrong += killed(cache, top / "cache", "*.*", a.cache, rng)
        if a.adv:
            wrong += killed(adv, top / "adv", "[cf]*/*.safetensors", a.adv, rng)
    sys.exit(int(wrong > 0))

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
