"""Grids of small trainings: the paper's ablation ladder, and the parts of distillation one by one.

    python -m lab.grids ablation [--jobs 2] [key=value ...] [--rows a b final]
    python -m lab.grids distillation [--seeds 3] [--jobs 2] [key=value ...]
    python -m lab.grids adversarial [--seeds 3] [--jobs 2] [--fd 2000] [key=value ...]

ablation trains configs/ablation.toml once for each row of model.LADDER, scores it, and times one
denoising step of all rows in turns. distillation trains configs/kd_nano.toml in each of KD_ROWS
with each seed, all from one teacher (train configs/teacher_nano.toml before); then the student
alone again, for as long as the slowest row took. adversarial trains configs/adv_nano.toml in each
of ADV_ROWS, all from one student, with equal steps of the generator. Run the same command again to
go on.
"""
import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch

from adv_distill import AdvConfig
from checkpoint import read_description, resolve
from common import (
    ROOT,
    UserError,
    fill,
    friendly,
    json_text,
    provenance,
    read_config,
    read_log,
    setup,
)
from distill import Distill, DistillConfig
from lab import tables
from lab.bench import in_turns, training_step
from model import LADDER, PRESETS, TextToLatents, UNet, UNetConfig, count_macs, count_params
from plots import series
from train import TrainConfig

KD_ROWS = {     # of DistillConfig
    "alone": ["kd=false", "featkd=false"],
    "output, constant": ["featkd=false", "scaling=constant"],
    "output, timestep-aware": ["featkd=false"],
    "output, timestep-aware, shifted": ["featkd=false", "density=shifted"],
    "features, timestep-aware": ["kd=false"],
    "both, timestep-aware": [],
    "both, no data": ["scaling=constant", "alpha=0.0"],
}
LONGER = "alone, as long as the slowest"
TEACHER = "the teacher"
ADV_ROWS = {    # of AdvConfig
    "KD alone": ["method=kd"],
    "KD + GAN": [],
    "KD + DMD": ["method=dmd"],
    "KD + GAN + DMD": ["method=both"],
    # each alone, on top of KD + GAN
    "real: the teacher's pictures": ["real=teacher"],
    "wrong captions are fakes": ["wrong_captions=true"],
    "relativistic, R1 and R2": ["loss=relativistic", "r2=0.01"],
    "feature matching": ["match_weight=1.0"],
    "heads of depth 1": ["critic_depth=1"],
    "heads of depth 4": ["critic_depth=4"],
    "GAN alone": ["kd_weight=0.0"],
}
UNTRAINED = "nothing: the student as it was, guided"

# ------------------------------------------------------------------------- trainings in a row
def score_command(args, ckpt, out: Path, *words) -> list[str]:
    """words: further ones for evaluate.py, such as "--steps", 4."""
    return [sys.executable, "evaluate.py", "--ckpt", str(ckpt), "--out", str(out),
            "--prompts", str(args.prompts), "--each", str(args.each), *map(str, words)]

def row_commands(args, script: str, out: Path, keys) -> list[list[str]]:
    """Training and scoring of one row."""
    train = [sys.executable, script, "--config", args.config, *args.overrides, f"out={out}", *keys]
    return [train, score_command(args, out / "final", out)]

def run_row(row: str, commands: list[list[str]], base: Path):
    """Its commands one after the other, what they print in base/ROW.txt."""
    with open(base / f"{row}.txt", "a", encoding="utf-8") as out:
        for command in commands:
            status = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out).returncode
            if status:
                raise UserError(f"row {row} ended with status {status}: see {out.name}")

def run_rows(commands: dict[str, list[list[str]]], base: Path, jobs: int):
    """Runs the rows that have no score.json yet, `jobs` of them side by side.

    The first one runs alone until its log begins, so that it makes the cache for all."""
    base.mkdir(parents=True, exist_ok=True)
    waiting = [row for row in commands if not (base / row / "score.json").exists()]
    with ThreadPoolExecutor(jobs) as pool:
        rows = []
        for row in waiting:
            rows.append(pool.submit(run_row, row, commands[row], base))
            while not rows[0].done() and not (base / waiting[0] / "log.csv").exists():
                time.sleep(0.2)
        try:
            for row in as_completed(rows):
                row.result()
        finally:
            pool.shutdown(cancel_futures=True)

def scored(folder: Path) -> dict:
    """What a table shows of folder/score.json, and what tables.paired compares."""
    found = json.loads((folder / "score.json").read_text("utf-8"))
    kept = ("ckpt", "scores", "rights", "fd", "precision", "recall", *tables.PROMPTS)
    return {key: found[key] for key in kept if key in found}

def outcome(run: Path) -> dict:
    """Last step, held-out loss of the averaged weights, and the score."""
    steps, val = series(read_log(run / "log.csv"), "val")[-1]
    return {"steps": steps, "val": val, **scored(run)}

def write_result(args, cfg, found: dict):
    """The JSON file; and its table on the screen."""
    command = shlex.join(["python", "-m", "lab.grids", *sys.argv[1:]])
    about = {"command": command, "config": args.config, **provenance(cfg.seed)}
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{args.grid}.json").write_text(json_text(about | found), "utf-8")
    print(tables.TABLES[args.grid](folder))

# ------------------------------------------------------------------------- distillation
def row_folder(row: str, seed) -> str:
    return re.sub(r"\W+", "_", row).strip("_") + f"_{seed}"

def seed_commands(args, rows: dict[str, list[str]], base: Path, seeds) -> dict:
    """{folder's name: training and scoring} of each row with each seed."""
    commands = {}
    for seed in seeds:
        for row, keys in rows.items():
            out = base / row_folder(row, seed)
            commands[out.name] = row_commands(args, "distill.py", out, [*keys, f"seed={seed}"])
    return commands

def scored_runs(row: str, base: Path) -> list[Path]:
    """One for each seed, of this call and of earlier ones."""
    return [path.parent for path in sorted(base.glob(row_folder(row, "[0-9]*") + "/score.json"))]

def config_of(checkpoint: Path) -> DistillConfig:
    """What train.py or distill.py trained a checkpoint with."""
    known = {field.name for field in fields(DistillConfig)}
    saved = {k: v for k, v in read_description(checkpoint).items() if k in known}
    return fill(DistillConfig(kd=False, featkd=False), saved, checkpoint)

def step_seconds(cfgs: dict[str, DistillConfig], device) -> dict[str, float]:
    """Seconds of each row's training step, in turns."""
    steps = {}
    for row, cfg in cfgs.items():
        loss = Distill(cfg, TextToLatents(cfg.network, cfg.text).to(device)).to(device)
        batch = cfg.batch * cfg.accumulate
        steps[row] = training_step(cfg, loss, batch, device, loss.zero_grad)
    return in_turns(steps, 8, device)

def distillation_grid(args):
    words = ["--config", args.config, *args.overrides]
    cfg = read_config(DistillConfig(), words)
    base, seeds = Path(cfg.out), range(cfg.seed, cfg.seed + args.seeds)
    teacher, device = resolve(cfg.teacher), setup(cfg.device)[0]
    rows = {row: KD_ROWS[row] for row in ("alone", *(args.rows or KD_ROWS))}
    commands = seed_commands(args, rows, base, seeds)
    taught = base / row_folder(TEACHER, 0)
    commands[taught.name] = [score_command(args, teacher, taught)]
    run_rows(commands, base, args.jobs)
    shutil.copy(teacher.parent / "log.csv", taught)

    cfgs = {TEACHER: config_of(teacher)}
    for row, keys in KD_ROWS.items():
        if scored_runs(row, base):
            cfgs[row] = read_config(DistillConfig(), [*words, *keys])
    seconds = step_seconds(cfgs, device)
    slowest = cfg.steps * max(seconds[row] for row in cfgs if row != TEACHER)
    cfgs[LONGER], seconds[LONGER] = cfgs["alone"], seconds["alone"]
    keys = [*KD_ROWS["alone"], f"steps={round(slowest / seconds[LONGER])}"]
    run_rows(seed_commands(args, {LONGER: keys}, base, seeds), base, args.jobs)

    found = {"rows": {}}
    for row in [*KD_ROWS, LONGER, TEACHER]:
        if row in cfgs:
            outcomes = [outcome(run) for run in scored_runs(row, base)]
            steps, batch = outcomes[-1]["steps"], cfgs[row].batch * cfgs[row].accumulate
            found["rows"][row] = {
                "steps": steps, "batch": batch, "step_s": seconds[row],
                "seconds": steps * seconds[row], "seeds": outcomes}
    write_result(args, cfg, found)

# ------------------------------------------------------------------------- few steps
def scored_in_steps(args, ckpt, out: Path, counts) -> list[list[str]]:
    """Scores in so many steps each; the first count's also has the Frechet distance, and is the
    last to be there, in `out` itself."""
    commands = []
    for n in counts[:0:-1]:
        commands.append(score_command(args, ckpt, out / f"in_{n}", "--steps", str(n)))
    words = "--steps", str(counts[0]), "--fd", str(args.fd)
    return [*commands, score_command(args, ckpt, out, *words)]

def few_step_row(args, cfg: AdvConfig, out: Path, keys, counts) -> list[list[str]]:
    """Training and scoring, with as many steps of the generator as in every other row."""
    if "method=kd" in keys:                 # nobody for whom the generator could wait
        keys = [*keys, "generator_every=1", f"steps={cfg.steps // cfg.generator_every}",
                f"warmup={max(1, cfg.warmup // cfg.generator_every)}"]
    train = row_commands(args, "adv_distill.py", out, keys)[0]
    return [train, *scored_in_steps(args, out / "final", out, counts)]

def few_step_outcome(run: Path, counts) -> dict:
    """Its score in each number of steps; the discriminator's share of right answers and the loss in
    the last third; the median of the pull ratio, as adv_distill.py warns by it."""
    found = {"scores": {}}
    for n in counts:
        found["scores"][n] = scored(run if n == counts[0] else run / f"in_{n}")
    if (run / "log.csv").exists():
        rows = read_log(run / "log.csv")
        last = rows[len(rows) * 2 // 3:]
        for key, some, summary in (("accuracy", last, mean), ("val", last, mean),
                                   ("pull_ratio", rows, median)):
            values = [value for _, value in series(some, key)]
            found[key] = summary(values) if values else None
    return found

def adversarial_grid(args):
    cfg = read_config(AdvConfig(), ["--config", args.config, *args.overrides])
    base, seeds = Path(cfg.out), range(cfg.seed, cfg.seed + args.seeds)
    init = resolve(cfg.init)
    counts = [cfg.K, *(n for n in (2, 1) if n < cfg.K)]
    commands = {}
    for seed in seeds:
        for row in args.rows or ADV_ROWS:
            out = base / row_folder(row, seed)
            keys = [*ADV_ROWS[row], f"seed={seed}"]
            commands[out.name] = few_step_row(args, cfg, out, keys, counts)
    # last: they write no log, for which the other jobs would wait
    commands["before"] = [score_command(args, init, base / "before", "--fd", str(args.fd))]
    commands["untrained"] = scored_in_steps(args, init, base / "untrained", counts)
    run_rows(commands, base, args.jobs)

    found = {"K": cfg.K, "before": scored(base / "before"),
             "rows": {UNTRAINED: [few_step_outcome(base / "untrained", counts)]}}
    for row in ADV_ROWS:
        runs = scored_runs(row, base)
        if runs:
            found["rows"][row] = [few_step_outcome(run, counts) for run in runs]
    write_result(args, cfg, found)

# ------------------------------------------------------------------------- ablation
def at_small_width(row: str, cfg: UNetConfig) -> UNetConfig:
    """The row's flags of the paper's ladder, with half its depths, on the widths of `cfg`."""
    preset = PRESETS[row]
    changed = {key for change in LADDER.values() for key in change}
    flags = {key: getattr(preset, key) for key in changed - {"context_dim", "depth_down"}}
    return replace(cfg, **flags, depth_mid=(preset.depth_mid + 1) // 2,
                   depth_down=[(n + 1) // 2 for n in preset.depth_down],
                   depth_up=[(n + 1) // 2 for n in preset.depth_up])

def denoising_seconds(nets: dict, latent: int, context: int, device) -> dict[str, float]:
    """Median seconds of one denoising step of each network, at batch 1, in turns."""
    x = torch.randn(1, 16, latent, latent, device=device)
    t, text = torch.rand(1, device=device), torch.randn(1, 16, context, device=device)
    with torch.inference_mode():
        return in_turns({row: partial(net, x, t, text) for row, net in nets.items()}, 16, device)

def ablation_grid(args):
    cfg = read_config(TrainConfig(), ["--config", args.config, *args.overrides])
    base, device = Path(cfg.out), setup(cfg.device)[0]
    models = {row: at_small_width(row, cfg.model) for row in args.rows or LADDER}
    commands = {}
    for row, model in models.items():
        keys = [f"model.{key}={json.dumps(value)}" for key, value in asdict(model).items()]
        commands[row] = row_commands(args, "train.py", base / row, keys)
    run_rows(commands, base, args.jobs)
    runs = {row: outcome(base / row) for row in models}
    for row, run in runs.items():
        if run["steps"] != cfg.steps:
            raise UserError(f"{base / row} was trained for {run['steps']} steps, not for "
                            f"{cfg.steps}: delete it, and run the same command again")

    nets = {row: UNet(model).to(device).eval() for row, model in models.items()}
    side, context = cfg.data.size // 8, cfg.model.context_dim
    fast = denoising_seconds(nets, side, context, device)
    large = denoising_seconds(nets, 64, context, device)
    found = {"rows": {}}
    for row, model in models.items():
        found["rows"][row] = {
            "params": count_params(nets[row]), "macs": count_macs(model, side, 16),
            "step_s": fast[row], "step_512_s": large[row], **runs[row]}
    write_result(args, cfg, found)

GRIDS = {
    "ablation": (ablation_grid, "configs/ablation.toml", LADDER),
    "distillation": (distillation_grid, "configs/kd_nano.toml", KD_ROWS),
    "adversarial": (adversarial_grid, "configs/adv_nano.toml", ADV_ROWS),
}

def main(argv):
    p = argparse.ArgumentParser(prog="python -m lab.grids", description=__doc__.split("\n")[0])
    p.add_argument("grid", choices=GRIDS)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    p.add_argument("--rows", nargs="+", default=[], help="these alone, and 'alone'")
    p.add_argument("--seeds", type=int, default=3, help="of each row (3)")
    p.add_argument("--jobs", type=int, default=1, help="rows that train side by side (1)")
    p.add_argument("--prompts", type=int, default=60, help="a category (60)")
    p.add_argument("--each", type=int, default=2, help="pictures a prompt (2)")
    p.add_argument("--fd", type=int, default=2000, help="pictures for the Frechet distance (2000)")
    p.add_argument("--out", default="runs", help="folder of the JSON file; docs/results has ours")
    args = p.parse_intermixed_args(argv)
    run_grid, args.config, known = GRIDS[args.grid]
    if set(args.rows) - set(known):
        raise UserError(f"the rows of {args.grid} are {', '.join(known)}")
    run_grid(args)

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
