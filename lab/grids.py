"""Grids of small trainings: the paper's ablation ladder, and the parts of distillation one by one.

    python -m lab.grids ablation [--rows a b final] [--jobs 2] [key=value ...]
    python -m lab.grids distillation [--seeds 3] [--jobs 2] [key=value ...]

ablation trains configs/ablation.toml once for each row of model.LADDER on the same data, steps and
seed, scores it, and times one denoising step of all rows in turns (A B C A B C ...: machines are
noisy). distillation trains configs/kd_nano.toml in each of KD_ROWS with each seed, all from one
teacher that was trained before (configs/teacher_nano.toml); then the student alone again, for as
many more steps as fit into the time that the slowest row took.

Each training is a `python train.py` of its own. Run the same command again to go on.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import resolve
from common import (
    ROOT,
    UserError,
    autocast,
    friendly,
    provenance,
    read_config,
    read_log,
    setup,
    use_bfloat16,
)
from data import Batch
from distill import Distill, DistillConfig
from lab import tables
from model import (
    LADDER,
    PRESETS,
    TextToLatents,
    UNet,
    UNetConfig,
    count_macs,
    count_params,
    load_model,
)
from text import load_vocabulary
from train import TrainConfig

ROWS = ("a", "b", "c1", "c2", "d", "e", "final")
KD_ROWS = {     # of DistillConfig
    "alone": ["kd=false", "featkd=false"],
    "+ output, constant": ["featkd=false", "scaling=constant"],
    "+ output, timestep-aware": ["featkd=false"],
    "+ features, timestep-aware": ["kd=false"],
    "+ both, timestep-aware": [],
    "+ both, no data": ["scaling=constant", "alpha=0.0"],
    "+ output, no data, no ratio": ["featkd=false", "scaling=constant", "alpha=0.0", "ratio=none"],
}
LONGER = "alone, as long as the slowest"

# ------------------------------------------------------------------------- trainings in a row
def score_command(args, ckpt, out: Path) -> list[str]:
    return [sys.executable, "evaluate.py", "--ckpt", str(ckpt), "--out", str(out),
            "--prompts", str(args.prompts), "--each", str(args.each)]

def row_commands(args, script: str, out: Path, keys) -> list[list[str]]:
    """Training and scoring of one row."""
    train = [sys.executable, script, "--config", args.config, *args.overrides, f"out={out}", *keys]
    return [train, score_command(args, out / "final", out)]

def run_row(row: str, commands: list[list[str]], base: Path):
    """Its commands one after the other, what they print in base/ROW.txt."""
    screen = base / f"{row}.txt"
    with open(screen, "a") as out:
        for command in commands:
            status = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out).returncode
            if status:
                raise UserError(f"row {row} ended with status {status}: see {screen}; run the "
                                "same command to go on")

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
            for row in tqdm(as_completed(rows), total=len(rows), unit="row"):
                row.result()
        finally:
            pool.shutdown(cancel_futures=True)

def last_value(log: list[dict], key: str) -> float:
    return float(next(row[key] for row in reversed(log) if row.get(key)))

def outcome(run: Path) -> dict:
    """Last step, median pictures/s, held-out loss of the averaged weights, and the score."""
    log = read_log(run / "log.csv")
    speeds = [float(row["img/s"]) for row in log if row.get("img/s")]
    scores = json.loads((run / "score.json").read_text())["scores"]
    return {"steps": int(log[-1]["step"]), "img_s": statistics.median(speeds),
            "val": last_value(log, "val"), "scores": scores}

def in_turns(functions: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each function; each must wait for its device. The first turn warms up."""
    taken = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}

def about_grid(args, cfg) -> dict:
    return {"config": args.config, "steps": cfg.steps, "batch": cfg.batch, "size": cfg.data.size,
            "nouns": cfg.data.nouns, **provenance(cfg.seed), "rows": {}}

def write_result(args, found: dict):
    """The JSON file; and its table on the screen."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{args.grid}.json").write_text(json.dumps(found, indent=1))
    print(tables.TABLES[args.grid](folder))

# ------------------------------------------------------------------------- distillation
def objective_step(cfg: DistillConfig, device):
    """() -> one forward and backward pass of the objective that the config describes."""
    objective = Distill(cfg, TextToLatents(cfg.network, cfg.text).to(device)).to(device)
    side, channels = cfg.data.size // 8, cfg.network.in_channels
    x0, eps = torch.randn(2, cfg.batch, channels, side, side, device=device)
    captions = ["a red car to the left of a blue dog"] * cfg.batch
    batch = Batch(x0, load_vocabulary().tokenize(captions)).to(device)
    t = torch.rand(cfg.batch, device=device)

    def step():
        with autocast(device, use_bfloat16(cfg.amp, device)):
            loss = objective(batch, eps, t)[0].mean()
        loss.backward()
        objective.zero_grad()
        loss.item()                                         # waits for the device
    return step

def row_folder(row: str, seed) -> str:
    return re.sub(r"\W+", "_", row).strip("_") + f"_{seed}"

def run_seeds(args, rows: dict[str, list[str]], base: Path, seeds, others=()):
    """Trains and scores each row with each seed; `others`: more rows, with their commands."""
    commands = {}
    for seed in seeds:
        for row, keys in rows.items():
            out = base / row_folder(row, seed)
            commands[out.name] = row_commands(args, "distill.py", out, [*keys, f"seed={seed}"])
    run_rows(commands | dict(others), base, args.jobs)

def outcomes_of(row: str, base: Path) -> list[dict]:
    """One for each seed, of this call and of earlier ones."""
    scores = sorted(base.glob(row_folder(row, "[0-9]*") + "/score.json"))
    return [outcome(path.parent) for path in scores]

def distillation_grid(args):
    cfg = read_config(DistillConfig(), ["--config", args.config, *args.overrides])
    base, seeds = Path(cfg.out), range(cfg.seed, cfg.seed + args.seeds)
    teacher, device = resolve(cfg.teacher), setup(cfg.device)[0]
    score_teacher = [score_command(args, teacher, base / "teacher")]
    wanted = {row: KD_ROWS[row] for row in args.kd_rows}
    run_seeds(args, wanted, base, seeds, {"teacher": score_teacher}.items())

    steps = {}
    for row in KD_ROWS:
        if outcomes_of(row, base):
            keys = [*args.overrides, *KD_ROWS[row]]
            row_cfg = read_config(DistillConfig(), ["--config", args.config, *keys])
            steps[row] = objective_step(row_cfg, device)
    seconds = in_turns(steps, rounds=7)
    slowest = max(seconds, key=seconds.get)
    if slowest != "alone":
        more = round(cfg.steps * seconds[slowest] / seconds["alone"])
        run_seeds(args, {LONGER: [*KD_ROWS["alone"], f"steps={more}"]}, base, seeds)
        seconds[LONGER] = seconds["alone"]

    student = load_model(base / row_folder("alone", cfg.seed) / "final")[0]
    found = {
        **about_grid(args, cfg), "prompts": args.prompts, "each": args.each, "slowest": slowest,
        "params": count_params(student), "teacher_params": count_params(load_model(teacher)[0]),
        "teacher": json.loads((base / "teacher/score.json").read_text())["scores"],
        "teacher_val": last_value(read_log(teacher.parent / "log.csv"), "val"),
    }
    for row, step_s in seconds.items():
        outcomes = outcomes_of(row, base)
        found["rows"][row] = {"steps": outcomes[-1]["steps"], "step_s": step_s, "seeds": outcomes}
    write_result(args, found)

# ------------------------------------------------------------------------- ablation
def half_depths(depths: list[int]) -> list[int]:
    return [-(-depth // 2) for depth in depths]

def at_small_width(row: str, cfg: UNetConfig) -> UNetConfig:
    """The row's flags of the paper's ladder, with half its depths, on the widths of `cfg`."""
    preset = PRESETS[row]
    changed = {key for change in LADDER.values() for key in change}
    flags = {key: getattr(preset, key) for key in changed - {"context_dim", "depth_down"}}
    return replace(cfg, **flags, depth_down=half_depths(preset.depth_down),
                   depth_mid=half_depths([preset.depth_mid])[0],
                   depth_up=half_depths(preset.depth_up))

def denoising_seconds(nets: dict, latent: int, context: int, device) -> dict[str, float]:
    """Median seconds of one denoising step of each network, at batch 1, in turns."""
    x = torch.randn(1, 16, latent, latent, device=device)
    t, text = torch.rand(1, device=device), torch.randn(1, 16, context, device=device)
    steps = {name: lambda net=net: net(x, t, text).sum().item() for name, net in nets.items()}
    with torch.inference_mode():
        return in_turns(steps, rounds=15)

def ablation_grid(args):
    cfg = read_config(TrainConfig(), ["--config", args.config, *args.overrides])
    models, base = {row: at_small_width(row, cfg.model) for row in args.rows}, Path(cfg.out)
    default, commands = UNetConfig(), {}
    for row, model in models.items():
        keys = [f"model.{key}={json.dumps(value)}" for key, value in asdict(model).items()
                if value != getattr(default, key)]
        commands[row] = row_commands(args, "train.py", base / row, keys)
    run_rows(commands, base, args.jobs)

    device = setup(cfg.device)[0]
    nets = {row: UNet(model).to(device).eval() for row, model in models.items()}
    side, context = cfg.data.size // 8, cfg.model.context_dim
    fast = denoising_seconds(nets, side, context, device)
    large = denoising_seconds(nets, 64, context, device)
    found = about_grid(args, cfg)
    for row, model in models.items():
        found["rows"][row] = {
            "params": count_params(nets[row]), "macs": count_macs(model, side, 16),
            "macs_512": count_macs(model, 64, 16), "step_s": fast[row], "step_512_s": large[row],
            **outcome(base / row)}
    write_result(args, found)

def main(argv):
    p = argparse.ArgumentParser(prog="python -m lab.grids", description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("grid", choices=("ablation", "distillation"))
    p.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    p.add_argument("--config", help="instead of configs/ablation.toml or configs/kd_nano.toml")
    p.add_argument("--rows", nargs="+", default=ROWS, choices=LADDER, help="of ablation")
    p.add_argument("--kd-rows", nargs="+", default=list(KD_ROWS), choices=KD_ROWS,
                   help="of distillation; alone must be among them")
    p.add_argument("--seeds", type=int, default=3, help="of distillation")
    p.add_argument("--jobs", type=int, default=1, help="rows that train side by side")
    p.add_argument("--prompts", type=int, default=60, help="a category")
    p.add_argument("--each", type=int, default=2, help="pictures a prompt")
    p.add_argument("--out", default="runs", help="folder of the JSON file; docs/results has ours")
    args = p.parse_intermixed_args(argv)
    if args.grid == "ablation":
        args.config = args.config or "configs/ablation.toml"
        ablation_grid(args)
        return
    args.config = args.config or "configs/kd_nano.toml"
    if "alone" not in args.kd_rows:
        raise UserError("--kd-rows needs 'alone', with which the others are compared")
    distillation_grid(args)

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
