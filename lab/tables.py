"""Fills the tables of README.md, docs/RESULTS.md and docs/BENCH.md from docs/results/*.json.

    python -m lab.tables

The text of the pages is written by hand. Only what is between the lines `<!-- table NAME -->` and
`<!-- end -->` is replaced. What the paper reports is in here (docs/PAPER.md, sections 1 and 7).
"""
import json
import re
import statistics
from functools import partial
from pathlib import Path

import numpy as np

from common import ROOT, UserError, friendly
from scenes import CATEGORIES

RESULTS = ROOT / "docs/results"
PAGES = ("README.md", "docs/RESULTS.md", "docs/DISTILLATION.md", "docs/BENCH.md")
BASE, FAST = "assets/scenes", "assets/fast"      # before and after step distillation
SCORED = {      # folder of docs/results: what its score.json is of; FOLDER_wide has free English
    "before": "until 2026-11-25: `small` of 64 px, 28 steps, guidance 4",
    "base28": "`assets/scenes`, 256 px, 28 steps, guidance 4",
    "fast4": "`assets/fast`, 256 px, 4 steps, no guidance",
    "small": "`small`, 64 px, 28 steps, guidance 4",
    "nano": "`nano`, 64 px, 12 nouns, 28 steps, guidance 4",
}

GENEVAL = {     # the paper's table: GenEval in the order of CATEGORIES, the mean, DPG-Bench
    "SnapGen (paper), 0.38 B": (1.00, .84, .60, .88, .18, .45, .66, 81.1),
    "SDXL, 2.6 B": (.98, .74, .39, .85, .15, .23, .55, 74.7),
    "Playground v2.5, 2.6 B": (.98, .77, .52, .84, .11, .17, .56, 75.5),
    "SD3-Medium, 2.0 B": (.98, .74, .63, .67, .34, .36, .62, 84.1),
    "SD3.5-Large, 8.1 B (SnapGen's teacher)": (.98, .89, .73, .83, .34, .47, .71, 85.6),
    "SANA, 1.6 B": (.99, .77, .62, .88, .21, .47, .66, 84.8),
}
PAPER_STEPS = {28: 0.66, 8: 0.63, 4: 0.61}      # GenEval; 28 steps are before step distillation
ABLATION = {    # row: (change, what the paper says: M parameters, GMACs at 1024 px, and its effect)
    "a": ("SDXL's layout, thin and short", "634.1, 1266.8; FID 3.76"),
    "b": ("no self-attention at high resolution",
          "623.6, 1052.1; FLOPs -17 %, latency -24 %, FID 3.12"),
    "c1": ("separable convolutions",
           "474.9, 652.2; parameters -24 %, latency -62 %, FID 3.38"),
    "c2": ("their expansion 2",
           "532.5, 760.6; parameters -15 %, FLOPs -27 %, 2.4 x faster than b, FID as b"),
    "d": ("feed-forward x3 instead of x4",
          "466.8, 669.2; parameters and FLOPs about -12 %"),
    "e": ("multi-query attention",
          "393.4, 629.7; parameters -16 %, FLOPs -6 %, latency -9 %"),
    "f": ("text from the first stage on", "effect not public"),
    "g": ("QK-RMSNorm and RoPE", "effect not public"),
    "final": ("no skips at the lowest stage", "371.6, 662.6; FID 2.06"),
}

# ------------------------------------------------------------------------- reading and writing
def read_result(folder, name: str) -> dict:
    """folder/NAME.json. UserError where it is missing or no JSON."""
    path = Path(folder) / f"{name}.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"cannot read {path} ({e}): the line below its table in docs/ has the "
                        "command that makes it") from None

def runs_of(folder, ckpt: str) -> dict[int, dict]:
    """{steps: score.json} of the runs folder/NAME that scored this checkpoint on the grammar's own
    words, most steps first.

    UserError where two runs claim the same number of steps."""
    runs = {}
    for path in sorted(Path(folder).glob("*/score.json")):
        run = read_result(path.parent, "score") | {"folder": path.parent}
        if run["ckpt"] != ckpt or run.get("wording") == "wide":
            continue
        other = runs.setdefault(run["steps"], run)
        if other is not run:
            raise UserError(f"{other['folder']} and {path.parent} both score {ckpt} in "
                            f"{run['steps']} steps: keep one of them")
    if not runs:
        raise UserError(f"no run in {folder} scores {ckpt}: python evaluate.py --ckpt {ckpt} "
                        f"--out {folder}/NAME")
    return dict(sorted(runs.items(), reverse=True))

def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Markdown: columns are {title: format of a row}, such as {"GiB": "{peak:.2f}"}."""
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        lines.append([form.format(**row) for form in columns.values()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

def source(command: str, run: dict) -> str:
    """The line below a table: how it was made."""
    threads = f", {run['threads']} threads" if "threads" in run else ""
    return (f"\n\n`{command}`, commit {run['commit']}, {run['machine']}{threads}, "
            f"torch {run['torch']}, {run['date']}, seed {run['seed']}.")

def interval_text(score: dict) -> str:
    return f"{score['score']:.3f} ({score['low']:.3f} - {score['high']:.3f})"

def exact_text(score: dict) -> str:
    return f"{score['exact']:.3f} ({score['exact_low']:.3f} - {score['exact_high']:.3f})"

# ------------------------------------------------------------------------- ours beside theirs
PROMPTS = ("prompts", "wording", "nouns", "layout")     # of score.json: they decide what is asked

def check_same_prompts(runs: list[dict]):
    """UserError where the runs' prompts differ, or where one has no rights."""
    first = runs[0]
    for run in runs:
        if "rights" not in run:
            raise UserError(f"the score of {run['ckpt']} has no rights, it is of an older "
                            "evaluate.py: score it anew")
        for key in PROMPTS:
            if run[key] != first[key]:
                raise UserError(f"{first['ckpt']} and {run['ckpt']} were not scored on the same "
                                f"prompts: {key} is {first[key]} and {run[key]}")

def paired(ours: list[dict], theirs: list[dict]) -> dict:
    """Compares the scores of two models, prompt by prompt: {difference, low, high} of ours - theirs
    and {ratio, ratio_low, ratio_high} of ours / theirs, with 95 % intervals.

    ours, theirs: what score.json holds, one for each seed. What is compared is the mean of the six
    categories. The bootstrap has two layers: prompts within each category, the same ones on both
    sides; and seeds, on each side on its own. Few seeds make the interval too narrow: R of them
    show (R - 1) / R of their variance, and one shows none.
    UserError where the runs' prompts differ, or where one has no rights."""
    check_same_prompts(ours + theirs)
    rng, n = np.random.default_rng(0), ours[0]["prompts"]
    picks = [rng.integers(0, n, (10_000, n)) for _ in CATEGORIES]
    means, resampled = [], []
    for runs in ours, theirs:
        shares = np.array([[run["rights"][c] for c in CATEGORIES] for run in runs])
        scores = np.mean([shares[:, c, pick].mean(-1) for c, pick in enumerate(picks)], 0)
        chosen = rng.integers(0, len(runs), scores.shape)               # (runs, resamples)
        resampled.append(np.take_along_axis(scores, chosen, 0).mean(0))
        means.append(shares.mean())                                     # (runs, six, prompts)
    with np.errstate(divide="ignore", invalid="ignore"):                # theirs may be all wrong
        low, high = np.percentile(np.subtract(*resampled), (2.5, 97.5))
        ratio_low, ratio_high = np.percentile(np.divide(*resampled), (2.5, 97.5))
        found = {"difference": means[0] - means[1], "low": low, "high": high,
                 "ratio": means[0] / means[1], "ratio_low": ratio_low, "ratio_high": ratio_high}
    return {key: float(value) for key, value in found.items()}

DIFFERENCE = "{difference:+.3f} ({low:+.3f} to {high:+.3f})"
RATIO = "{ratio:.3f} ({ratio_low:.3f} - {ratio_high:.3f})"

def paired_text(ours: list[dict], theirs: list[dict], form: str) -> str:
    """paired() as a cell of a table; empty where a run was scored before there were rights."""
    measured = all("rights" in run for run in ours + theirs)
    return form.format(**paired(ours, theirs)) if measured else ""

UNITS = {       # factors from the JSON files to what is shown: millions, GFLOP, GiB, milliseconds
    "params": 1e-6, "macs": 1e-6, "flops": 1e-9, "peak": 2**-30, "s": 1e3, "text": 1e3,
    "unet": 1e3, "decoder": 1e3, "work_s": 1e3, "least_s": 1e3, "step_s": 1e3, "step_512_s": 1e3,
}

def in_units(row: dict) -> dict:
    return row | {key: row[key] * UNITS[key] for key in UNITS if key in row}

# ------------------------------------------------------------------------- docs/RESULTS.md
def scores(folder) -> str:
    """Our models on held-out scenes, in both wordings, by both rules."""
    shown, rows = (*CATEGORIES, "three"), []
    for name, what in SCORED.items():
        for wording, path in ("own", name), ("wide", f"{name}_wide"):
            run = read_result(Path(folder) / path, "score")
            found = run["scores"]
            rows.append({"name": what, "wording": wording, "mean": interval_text(found["mean"]),
                         "exact": exact_text(found["mean"]),
                         **{key: found[key]["score"] for key in shown}})
    full = read_result(Path(folder) / "base28", "score")
    floor = {key: found["shuffled"] for key, found in full["scores"].items()}
    for name, found, exact in (
            ("ceiling: the same check on held-out renders", full["ceiling"],
             f"{full['exact_ceiling']['mean']:.3f}"),
            ("floor: pictures against the next prompt", floor, "")):
        rows.append({"name": name, "wording": "", "exact": exact, **found,
                     "mean": f"{found['mean']:.3f}"})
    columns = {"model": "{name}", "words": "{wording}",
               **{key: "{" + key + ":.2f}" for key in CATEGORIES},
               "mean of six (95 %)": "{mean}", "exact, mean of six (95 %)": "{exact}",
               "three things": "{three:.2f}"}
    return table(rows, columns) + source(
        "python evaluate.py --ckpt assets/scenes --each 1 --out docs/results/base28", full)

def geneval(folder) -> str:
    shown, rows = (*CATEGORIES, "mean"), []
    for name in ("base28", "fast4"):
        found = read_result(Path(folder) / name, "score")["scores"]
        rows.append({"name": f"ours, not comparable (scenes, our detector): {SCORED[name]}",
                     "dpg": "", **{key: found[key]["score"] for key in shown}})
    for name, (*published, dpg) in GENEVAL.items():
        rows.append({"name": name, "dpg": dpg, **dict(zip(shown, published))})
    columns = {"model": "{name}", **{key: "{" + key + ":.2f}" for key in shown}, "DPG": "{dpg}"}
    return table(rows, columns)

def few_steps(folder) -> str:
    rows, base, fast = [], runs_of(folder, BASE), runs_of(folder, FAST)
    for steps, run in base.items():
        row = {"steps": steps, "fast": "", "ratio": "", "paper": PAPER_STEPS.get(steps, "")}
        row["base"] = interval_text(run["scores"]["mean"])
        if steps in fast:
            row["fast"] = interval_text(fast[steps]["scores"]["mean"])
            row["ratio"] = paired_text([fast[steps]], [base[28]], RATIO)
        rows.append(row)
    columns = {"steps": "{steps}", "ours before, guidance 4": "{base}",
               "ours distilled, no guidance": "{fast}",
               "distilled / before in 28 (95 %)": "{ratio}",
               "paper's GenEval (28: before)": "{paper}"}
    return table(rows, columns) + source(
        "python evaluate.py --ckpt assets/fast --each 2 --out docs/results/fast4", fast[4])

def distillation(folder) -> str:
    """Students, those that learned alone for longer, and the teacher as the last row."""
    found, rows = read_result(folder, "distillation"), []
    every = found["rows"]
    alone, longer = every["alone"], every["alone, as long as the slowest"]
    for name, row in every.items():
        scores = [seed["scores"]["mean"]["score"] for seed in row["seeds"]]
        cells = {"name": name, "steps": f"{row['steps']} of {row['batch']}",
                 "time": f"{row['step_s']:.2f} ({row['step_s'] / alone['step_s']:.2f} x)",
                 "minutes": row["seconds"] / 60, "mean": statistics.mean(scores),
                 "val": ", ".join(f"{seed['val']:.3f}" for seed in row["seeds"]),
                 "each": ", ".join(f"{score:.3f}" for score in scores)}
        for key, other in (("alone", alone), ("longer", longer)):
            cells[key] = ""
            if row is not other:
                cells[key] = paired_text(row["seeds"], other["seeds"], DIFFERENCE)
        rows.append(cells)
    columns = {"student": "{name}", "steps": "{steps}", "s a step": "{time}",
               "minutes": "{minutes:.1f}", "held-out loss, each seed": "{val}",
               "score, each seed": "{each}", "mean": "**{mean:.3f}**",
               "minus alone (95 %)": "{alone}", "minus alone at equal time (95 %)": "{longer}"}
    return table(rows, columns) + source(found["command"], found)

def adversarial(folder) -> str:
    """Students of K steps: scores, and what is paired with L_kd alone."""
    found, rows = read_result(folder, "adversarial"), []
    K = str(found["K"])
    alone = found["rows"]["KD alone"]
    counts = list(alone[0]["scores"])
    every = {"before, 28 steps, guidance 4": [{"scores": {K: found["before"]}}]} | found["rows"]
    for name, runs in every.items():
        rows.append(few_step_cells(name, runs, K, counts, alone))
    columns = {"student": "{name}", "seeds": "{seeds}", f"score in {K} steps (95 %)": "{score}",
               "minus KD alone (paired, 95 %)": "{gain}", "Frechet distance": "{fd}",
               "precision": "{precision:.2f}", "recall": "{recall:.2f}",
               **{f"in {n}": "{in_" + n + "}" for n in counts[1:]},
               f"in {counts[-1]}, minus KD alone": "{last_gain}",
               "D right": "{accuracy}", "GAN's pull / KD's, median": "{pull_ratio}"}
    return table(rows, columns) + source(found["command"], found)

def mean_of_runs(values: list[float], digits: int) -> str:
    """0.73 (0.71 - 0.74): mean, least and most over the seeds."""
    text = f"{statistics.mean(values):.{digits}f}" if values else ""
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} - {max(values):.{digits}f})"
    return text

def few_step_cells(name: str, runs: list[dict], K: str, counts, alone: list[dict]) -> dict:
    """Means over the seeds; the interval of one seed's score is that of its prompts."""
    cells = {"name": name, "seeds": len(runs)}
    at = {n: [run["scores"][n] for run in runs if n in run["scores"]] for n in counts}
    for n in counts:
        cells[f"in_{n}"] = mean_of_runs([one["scores"]["mean"]["score"] for one in at[n]], 3)
    cells["score"] = cells[f"in_{K}"]
    if len(runs) == 1:
        cells["score"] = interval_text(at[K][0]["scores"]["mean"])
    for cell, n in (("gain", K), ("last_gain", counts[-1])):
        theirs = [run["scores"][n] for run in alone]
        known = runs is not alone and at[n]
        cells[cell] = paired_text(at[n], theirs, DIFFERENCE) if known else ""
    cells["fd"] = mean_of_runs([one["fd"] for one in at[K]], 3)
    for key in "precision", "recall":
        cells[key] = statistics.mean(one[key] for one in at[K])
    for key in "accuracy", "pull_ratio":
        cells[key] = mean_of_runs([run[key] for run in runs if run.get(key) is not None], 2)
    return cells

def ablation(folder) -> str:
    """Rows of the ladder that were trained. A row has the changes of those left out above it."""
    found, rows = read_result(folder, "ablation"), []
    first = next(iter(found["rows"].values()))["step_512_s"]
    changes, above = [], None
    for name, (change, paper) in ABLATION.items():
        changes.append(change)
        if name not in found["rows"]:
            continue
        run = found["rows"][name]
        rows.append(in_units(run) | {
            "name": name, "change": ", ".join(changes), "paper": paper,
            "x": first / run["step_512_s"], "score": interval_text(run["scores"]["mean"]),
            "gain": paired_text([run], [above], DIFFERENCE) if above else ""})
        changes, above = [], run
    columns = {"row": "{name}", "change": "{change}", "M params": "{params:.2f}",
               "M MACs": "{macs:.1f}", "ms a step, 64 px": "{step_s:.1f}",
               "512 px": "{step_512_s:.0f} ({x:.2f} x)", "held-out loss": "{val:.4f}",
               "score (95 %)": "{score}", "minus the row above (95 %)": "{gain}",
               "paper: M params, GMACs at 1024 px; effect": "{paper}"}
    return table(rows, columns) + source(
        found.get("command", "python -m lab.grids ablation"), found)

def decoder_quality(folder) -> str:
    found = read_result(folder, "ae")
    rows = [{"size": size, "psnr": psnr} for size, psnr in found["psnr"].items()]
    return table(rows, {"px": "{size}", "PSNR (dB)": "{psnr:.1f}"}) + source(
        "python train_decoder.py --test assets/ae docs/ae.png docs/results/ae.json", found)

# ------------------------------------------------------------------------- docs/BENCH.md
NETWORK = {"network": "{name}", "M parameters": "{params:.2f}", "GFLOP": "{flops:.0f}",
           "ms": "{s:.0f}", "x": "{ratio:.2f}", "share": "{share:.0%}", "GiB": "{peak:.2f}"}
SAMPLE = {"what": "{what}", "ms a picture": "{s:.1f}", "text": "{text:.1f}",
          "UNet": "{unet:.1f}", "decoder": "{decoder:.1f}", "outside": "{outside:.1%}"}
TRAIN = {"config": "{config}", "network": "{net}", "M parameters": "{params:.2f}",
         "batch": "{batch}", "arithmetic": "{amp}", "GFLOP a picture": "{flops:.2f}",
         "pictures/s": "{img_s:.1f}", "share of the peak (MFU)": "{mfu:.0%}",
         "GiB": "{peak:.2f}"}
FLOOR = {"config": "{config}", "network": "{net}", "batch": "{batch}",
         "ms a step at the peak": "{work_s:.1f}", "ms at least": "{least_s:.1f}",
         "MFU at most": "{mfu:.0%}"}
STEP = {"job": "{job}", "form": "{form}", "batch": "{batch}", "ms a step": "{s:.1f}",
        "pictures/s": "{img_s:.0f}", "optimizer": "{optimizer:.0%}", "MFU": "{mfu:.1%}",
        "of the floor": "{floor:.0%}", "GiB": "{gib:.2f}", "lab.plan": "{planned:.2f}",
        "first step, s": "{cold:.0f}", "from the file": "{warm:.0f}", "MFU of": "{of}"}
DEPTHWISE = {"job": "{job}", "map": "{shape}", "times": "{times}", "native, ms": "{native:.3f}",
             "channels_last": "{nhwc:.3f}", "nine products, compiled": "{shifted:.3f}"}
DATA = {"what": "{what}", "pictures/s": "{img_s:.0f}"}

def bench_table(folder, subject: str, columns: dict, rows="rows", script="lab.bench") -> str:
    """rows: the key of bench_SUBJECT.json that has them."""
    found = read_result(folder, f"bench_{subject}")
    return table(map(in_units, found[rows]), columns) + source(
        f"python -m {script} {subject} --out docs/results", found)

TABLES = {
    "scores": scores, "geneval": geneval, "few_steps": few_steps, "distillation": distillation,
    "adversarial": adversarial,
    "ablation": ablation, "decoder_quality": decoder_quality,
    "bench_unet": partial(bench_table, subject="unet", columns=NETWORK),
    "bench_decoder": partial(bench_table, subject="decoder", columns=NETWORK),
    "bench_sample": partial(bench_table, subject="sample", columns=SAMPLE),
    "bench_train": partial(bench_table, subject="train", columns=TRAIN),
    "bench_floor": partial(bench_table, subject="train", columns=FLOOR, rows="floors"),
    "bench_step": partial(bench_table, subject="step", columns=STEP, script="lab.steps"),
    "bench_depthwise": partial(bench_table, subject="depthwise", columns=DEPTHWISE,
                               script="lab.steps"),
    "bench_data": partial(bench_table, subject="data", columns=DATA),
}
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

def fill_tables(text: str, folder=RESULTS) -> str:
    """The page with the tables between its markers made anew. UserError for unknown names."""
    def made_anew(match):
        begin, name, end = match.groups()
        if name not in TABLES:
            raise UserError(f"no table '{name}': there are {', '.join(TABLES)}")
        return f"{begin}{TABLES[name](folder)}\n{end}"
    return MARKED.sub(made_anew, text)

def main():
    for page in PAGES:
        path = ROOT / page
        text = path.read_text("utf-8")
        path.write_text(fill_tables(text), "utf-8", newline="\n")
        print(f"{page}: {len(MARKED.findall(text))} tables")

if __name__ == "__main__":
    with friendly():
        main()
