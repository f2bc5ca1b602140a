"""Grids of small trainings: the paper's ablation ladder, and the parts of distillation one by one. bench.py calls them.

    python bench.py --ablation [--rows a b final] [--jobs 2] [key=value]    the paper's ladder at a small width: cost, loss and score of each row
    python bench.py --distillation [--seeds 3] [--jobs 2] [key=value]       the parts of distillation one by one: loss, score and speed of a student with each

The ablation trains configs/ablation.toml once for each row of model.LADDER on the same data, steps and seed, each a `python train.py` of its own (run
again, it goes on where it stopped), scores it by evaluate.py, and times one denoising step of all rows in turns (A B C A B C ...: machines are noisy).
The distillation grid trains configs/kd_nano.toml in each of KD_ROWS and with each seed, all from the same teacher, which must be trained before; then the
student alone again, for as many more steps as fit into the time that the slowest row took.
"""
import json, re, statistics, subprocess, sys, time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import distill
from common import ROOT, UserError, provenance, read_config, read_log, setup, use_bfloat16
from model import LADDER, PRESETS, UNet, UNetConfig, count_macs, count_params
from sample import TextToLatents, chosen, load_model
from text import tokenize
from train import Config

ROWS = ("a", "b", "c1", "c2", "d", "e", "final")
KD_ROWS = {  # of distill.Config
    "alone": ["kd=false", "featkd=false"],
    "+ output, constant": ["featkd=false", "scaling=constant"],
    "+ output, timestep-aware": ["featkd=false"],
    "+ features, timestep-aware": ["kd=false"],
    "+ both, timestep-aware": [],
    "+ both, no data": ["scaling=constant", "alpha=0.0"],
    "+ output, no data, no ratio": ["featkd=false", "scaling=constant", "alpha=0.0", "ratio=none"],
}


# ---------------------------------------------------------------------------- trainings in a row
def train_and_score(a, script: str, out: Path, keys) -> list[list[str]]:
    return [[sys.executable, script, "--config", a.config, *a.overrides, f"out={out}", *keys], score_only(a, out / "final", out)]


def score_only(a, ckpt, out: Path) -> list[str]:
    return [sys.executable, "evaluate.py", "--ckpt", str(ckpt), "--out", str(out), "--prompts", str(a.prompts), "--each", str(a.each)]


def run_all(commands: dict[str, list[list[str]]], base: Path, jobs: int):
    """Each row's commands one after the other, `jobs` rows side by side, the screen of each in base/row.txt. Rows with a score.json are done.
    The first row goes alone until the cache of latents stands."""
    done = lambda row: (base / row / "score.json").exists()
    waiting, running, bar, first = [r for r in commands if not done(r)], {}, tqdm(total=len(commands), initial=sum(map(done, commands)), unit="row"), next(iter(commands))
    base.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        while waiting and len(running) < jobs and (not running or (base / first / "log.csv").exists() or done(first)):
            row = waiting.pop(0)
            out = open(base / f"{row}.txt", "a")
            running[row] = [subprocess.Popen(commands[row].pop(0), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT), out]
        for row, (process, out) in list(running.items()):
            if process.poll() is None:
                continue
            if process.returncode or not commands[row]:
                del running[row]
                out.close()
                if process.returncode:
                    raise UserError(f"row {row} ended with status {process.returncode}: see {base / row}.txt; run the same command to go on")
                bar.update()
            else:
                running[row][0] = subprocess.Popen(commands[row].pop(0), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        time.sleep(1)
    bar.close()


def outcome(run: Path) -> dict:
    """Of a finished row: its last step, median pictures/s, the last held-out loss of the averaged weights, the score."""
    log = read_log(run / "log.csv")
    speeds = sorted(float(r["img/s"]) for r in log if r.get("img/s"))
    return {"steps": int(log[-1]["step"]), "img_s": speeds[len(speeds) // 2], "val": float(next(r["val"] for r in reversed(log) if r.get("val"))), "scores": json.loads((run / "score.json").read_text())["scores"]}


# ---------------------------------------------------------------------------- the parts of distillation
def training_seconds(a, rows: dict, rounds: int = 7) -> dict:
    """Median seconds of a forward and backward pass of each row's objective, in turns (speeds of runs that others ran beside do not compare). The optimiser's share, the
    same for all, is not in it."""
    device, objectives, taken = setup("auto")[0], {}, {row: [] for row in rows}
    for row, keys in rows.items():
        cfg = read_config(distill.Config(), ["--config", a.config, *a.overrides, *keys])
        objectives[row] = distill.Distill(cfg, TextToLatents(chosen(cfg.arch, cfg.model, cfg.mmdit), cfg.text).to(device)).to(device)
    size, amp = cfg.data.size // 8, use_bfloat16(cfg.amp, device)
    x0, eps = torch.randn(2, cfg.batch, objectives["alone"].net.denoiser.cfg.in_channels, size, size, device=device)
    t, (ids, mask) = torch.rand(cfg.batch, device=device), (x.to(device) for x in tokenize(["a red car to the left of a blue dog"] * cfg.batch))
    for k in range(rounds + 1):
        for row, objective in objectives.items():
            begin = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = objective(x0, eps, t, ids, mask)[0].mean()
            loss.backward()
            objective.zero_grad()
            float(loss.detach())                                # waits for the device
            if k:
                taken[row].append(time.perf_counter() - begin)
    return {row: statistics.median(v) for row, v in taken.items()}


def distillation(a):
    cfg = read_config(distill.Config(), ["--config", a.config, *a.overrides])
    base, seeds = Path(cfg.out), range(cfg.seed, cfg.seed + a.seeds)
    teacher = distill.find_teacher(cfg.teacher)[1]
    place = lambda row, seed: re.sub(r"\W+", "_", row).strip("_") + f"_{seed}"
    jobs = lambda row, keys: {place(row, seed): train_and_score(a, "distill.py", base / place(row, seed), [*keys, f"seed={seed}"]) for seed in seeds}
    rows = {row: KD_ROWS[row] for row in KD_ROWS if row in a.kd_rows}
    per_seed = [jobs(row, keys) for row, keys in rows.items()]
    run_all({name: job[name] for k in range(len(seeds)) for job in per_seed for name in [list(job)[k]]} | {"teacher": [score_only(a, teacher, base / "teacher")]}, base, a.jobs)
    found = lambda row: [outcome(p.parent) for p in sorted(base.glob(place(row, "[0-9]*") + "/score.json"))]      # seeds of this call and of earlier ones
    longer, steps = "alone, as long as the slowest", {row: cfg.steps for row in KD_ROWS if found(row)}
    taken = training_seconds(a, {row: KD_ROWS[row] for row in steps})
    slowest = max(steps, key=taken.get)
    if slowest != "alone":
        steps[longer], taken[longer] = round(cfg.steps * taken[slowest] / taken["alone"]), taken["alone"]
        run_all(jobs(longer, [*KD_ROWS["alone"], f"steps={steps[longer]}"]), base, a.jobs)

    out = {"config": a.config, "batch": cfg.batch, "nouns": cfg.data.nouns, "size": cfg.data.size, "prompts": a.prompts, "each": a.each, "slowest": slowest, **provenance(cfg.seed),
           "params": count_params(load_model(base / place("alone", cfg.seed) / "final")[0]), "teacher_params": count_params(load_model(teacher)[0]),
           "teacher": json.loads((base / "teacher" / "score.json").read_text())["scores"], "teacher_val": float(next(r["val"] for r in reversed(read_log(teacher.parent / "log.csv")) if r.get("val"))),
           "rows": {row: {"steps": found(row)[-1]["steps"], "step_s": taken[row], "seeds": found(row)} for row in steps}}
    print(f"\n{'row':30} {'steps':>5} {'s/step':>6} {'loss':>7} {'score':>6}  of each seed;  teacher: {out['teacher_val']:.4f} {out['teacher']['mean']['score']:.3f}")
    for row, r in out["rows"].items():
        mean = lambda pick: statistics.mean(map(pick, r["seeds"]))
        print(f"{row:30} {r['steps']:5} {r['step_s']:6.3f} {mean(lambda s: s['val']):7.4f} {mean(lambda s: s['scores']['mean']['score']):6.3f}  " + " ".join(f"{s['scores']['mean']['score']:.3f}" for s in r["seeds"]))
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    Path(a.out).write_text(json.dumps(out, indent=1))
    print(f"\n{a.out}")


# ---------------------------------------------------------------------------- the ablation
def at_small_width(row: str, cfg: UNetConfig) -> UNetConfig:
    """The row's flags of the paper's ladder, with half its depths, on the widths of `cfg`."""
    half, preset = lambda depths: [-(-d // 2) for d in depths], PRESETS[row]
    flags = {k: v for change in LADDER.values() for k in change for v in [getattr(preset, k)] if k not in ("context_dim", "depth_down")}
    return replace(cfg, **flags, depth_down=half(preset.depth_down), depth_mid=half([preset.depth_mid])[0], depth_up=half(preset.depth_up))


def seconds_a_step(nets: dict, latent: int, context: int, batch: int, device, rounds: int = 15) -> dict:
    """Median seconds of one denoising step of each network, in turns."""
    x, t, text = torch.randn(batch, 16, latent, latent, device=device), torch.rand(batch, device=device), torch.randn(batch, 16, context, device=device)
    taken = {name: [] for name in nets}
    with torch.inference_mode():
        for k in range(rounds + 2):
            for name, net in nets.items():
                begin = time.perf_counter()
                net(x, t, text).sum().item()                # .item() waits for the device
                if k > 1:
                    taken[name].append(time.perf_counter() - begin)
    return {name: sorted(v)[len(v) // 2] for name, v in taken.items()}


def ablation(a):
    cfg = read_config(Config(), ["--config", a.config, *a.overrides])
    models, base = {row: at_small_width(row, cfg.model) for row in a.rows}, Path(cfg.out)
    commands = {}
    for row, m in models.items():
        keys = [f"model.{k}={json.dumps(v)}" for k, v in asdict(m).items() if v != getattr(UNetConfig(), k)]
        commands[row] = train_and_score(a, "train.py", base / row, keys)
    run_all(commands, base, a.jobs)

    device, _, _ = setup("auto")
    nets = {row: UNet(m).to(device).eval() for row, m in models.items()}
    fast, large = (seconds_a_step(nets, size // 8, cfg.model.context_dim, 1, device) for size in (cfg.data.size, 512))
    out = {"config": a.config, "steps": cfg.steps, "batch": cfg.batch, "nouns": cfg.data.nouns, "size": cfg.data.size, **provenance(cfg.seed), "rows": {}}
    print(f"\n{'row':6} {'M params':>8} {'GMACs':>7} {'ms a step':>9} {'512 px':>8} {'img/s':>6} {'loss':>7} {'score':>6}  95 %")
    for row, m in models.items():
        r = out["rows"][row] = {"params": count_params(nets[row]), "macs": count_macs(m, cfg.data.size // 8, 16), "macs_512": count_macs(m, 64, 16), "step_s": fast[row], "step_512_s": large[row],
                                **outcome(base / row)}
        score = r["scores"]
        print(f"{row:6} {r['params'] / 1e6:8.2f} {r['macs'] / 1e9:7.3f} {1e3 * fast[row]:9.2f} {1e3 * large[row]:8.1f} {r['img_s']:6.0f} {r['val']:7.4f} {score['mean']['score']:6.3f}  "
              f"{score['mean']['low']:.3f} - {score['mean']['high']:.3f}")
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    Path(a.out).write_text(json.dumps(out, indent=1))
    print(f"\n{a.out}")
