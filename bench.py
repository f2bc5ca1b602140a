"""What things cost, measured.

    python bench.py --ablation [--rows a b final] [--jobs 2] [key=value]    the paper's ladder at a small width: cost, loss and score of each row

The ablation trains configs/ablation.toml once for each row of model.LADDER on the same data, steps and seed, each a `python train.py` of its own (run
again, it goes on where it stopped), scores it by evaluate.py, and times one denoising step of all rows in turns (A B C A B C ...: machines are noisy).
"""
import argparse, json, subprocess, sys, time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from common import ROOT, UserError, fill, friendly, provenance, read_config, read_log, setup
from model import LADDER, PRESETS, UNet, UNetConfig, count_macs, count_params
from train import Config

ROWS = ("a", "b", "c1", "c2", "d", "e", "final")


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
        commands[row] = [[sys.executable, "train.py", "--config", a.config, *a.overrides, f"out={base / row}", *keys],
                         [sys.executable, "evaluate.py", "--ckpt", str(base / row / "final"), "--out", str(base / row), "--prompts", str(a.prompts), "--each", str(a.each)]]
    done = lambda row: (base / row / "score.json").exists()
    waiting, running, bar = [r for r in a.rows if not done(r)], {}, tqdm(total=len(a.rows), initial=sum(map(done, a.rows)), unit="row")
    base.mkdir(parents=True, exist_ok=True)
    while waiting or running:                               # the first row alone, until the cache of latents stands
        while waiting and len(running) < a.jobs and (not running or (base / a.rows[0] / "log.csv").exists()):
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

    device, _, _ = setup("auto")
    nets = {row: UNet(m).to(device).eval() for row, m in models.items()}
    fast, large = (seconds_a_step(nets, size // 8, cfg.model.context_dim, 1, device) for size in (cfg.data.size, 512))
    out = {"config": a.config, "steps": cfg.steps, "batch": cfg.batch, "nouns": cfg.data.nouns, "size": cfg.data.size, **provenance(cfg.seed), "rows": {}}
    print(f"\n{'row':6} {'M params':>8} {'GMACs':>7} {'ms a step':>9} {'512 px':>8} {'img/s':>6} {'loss':>7} {'score':>6}  95 %")
    for row, m in models.items():
        log, score = read_log(base / row / "log.csv"), json.loads((base / row / "score.json").read_text())["scores"]
        speeds = sorted(float(r["img/s"]) for r in log if r.get("img/s"))
        r = out["rows"][row] = {"params": count_params(nets[row]), "macs": count_macs(m, cfg.data.size // 8, 16), "macs_512": count_macs(m, 64, 16), "step_s": fast[row], "step_512_s": large[row],
                                "img_s": speeds[len(speeds) // 2], "val": float(next(r["val"] for r in reversed(log) if r.get("val"))), "scores": score}
        print(f"{row:6} {r['params'] / 1e6:8.2f} {r['macs'] / 1e9:7.3f} {1e3 * fast[row]:9.2f} {1e3 * large[row]:8.1f} {r['img_s']:6.0f} {r['val']:7.4f} {score['mean']['score']:6.3f}  "
              f"{score['mean']['low']:.3f} - {score['mean']['high']:.3f}")
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    Path(a.out).write_text(json.dumps(out, indent=1))
    print(f"\n{a.out}")


def main(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ablation", action="store_true", help="the paper's ladder at a small width")
    p.add_argument("--config", default="configs/ablation.toml")
    p.add_argument("--rows", nargs="+", default=ROWS, choices=[r for r in LADDER])
    p.add_argument("--jobs", type=int, default=1, help="rows that train side by side, each a process")
    p.add_argument("--prompts", type=int, default=60, help="a category")
    p.add_argument("--each", type=int, default=2, help="pictures a prompt")
    p.add_argument("--out", default="docs/results/ablation.json")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    a = p.parse_intermixed_args(argv)
    if not a.ablation:
        return p.print_help()
    ablation(a)


if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
