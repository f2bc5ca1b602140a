"""Fills the tables of README.md, docs/RESULTS.md and docs/BENCH.md from docs/results/*.json.

    python -m lab.tables                 all of them, in place
    python -m lab.tables few_steps       prints one

The text of the pages is written by hand. Only what is between the lines `<!-- table NAME -->` and
`<!-- end -->` is replaced. What the paper reports is in here (docs/PAPER.md, sections 1 and 7).
"""
import json
import re
import statistics
import sys
from functools import partial
from pathlib import Path

from common import ROOT, UserError, friendly
from scenes import CATEGORIES

RESULTS = ROOT / "docs/results"
PAGES = ("README.md", "docs/RESULTS.md", "docs/BENCH.md")
BASE, FAST = "assets/scenes", "assets/fast"      # before and after step distillation

GENEVAL = {     # the paper's table: GenEval in the order of CATEGORIES, the mean, DPG-Bench
    "SnapGen (paper), 0.38 B": (1.00, .84, .60, .88, .18, .45, .66, 81.1),
    "SDXL, 2.6 B": (.98, .74, .39, .85, .15, .23, .55, 74.7),
    "Playground v2.5, 2.6 B": (.98, .77, .52, .84, .11, .17, .56, 75.5),
    "SD3-Medium, 2.0 B": (.98, .74, .63, .67, .34, .36, .62, 84.1),
    "SD3.5-Large, 8.1 B (SnapGen's teacher)": (.98, .89, .73, .83, .34, .47, .71, 85.6),
    "SANA, 1.6 B": (.99, .77, .62, .88, .21, .47, .66, 84.8),
}
PAPER_DISTILLED = {8: 0.63, 4: 0.61}     # GenEval after step distillation; 0.66 before, 28 steps
ABLATION = {    # row: (change, M parameters, GMACs at 1024 px, what the paper reports)
    "a": ("SDXL's layout, thin and short", 634.1, 1266.8, "FID 3.76"),
    "b": ("no self-attention at high resolution", 623.6, 1052.1,
          "FLOPs -17 %, latency -24 %, FID 3.12"),
    "c1": ("separable convolutions", 474.9, 652.2, "parameters -24 %, latency -62 %, FID 3.38"),
    "c2": ("their expansion 2", 532.5, 760.6,
           "against b: parameters -15 %, FLOPs -27 %, 2.4 x faster, FID as b"),
    "d": ("feed-forward x3 instead of x4", 466.8, 669.2, "parameters and FLOPs about -12 %"),
    "e": ("multi-query attention", 393.4, 629.7, "parameters -16 %, FLOPs -6 %, latency -9 %"),
    "final": ("text from the first stage, QK-RMSNorm, RoPE, no skips at the lowest stage",
              371.6, 662.6, "FID 2.06"),
}

# ------------------------------------------------------------------------- reading and writing
def read_result(folder, name: str) -> dict:
    """folder/NAME.json. UserError where it is missing or no JSON."""
    path = Path(folder) / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"cannot read {path} ({e}): the line below its table in docs/ has the "
                        "command that makes it") from None

def runs_of(folder, ckpt: str) -> dict[int, dict]:
    """{steps: score.json} of the runs folder/NAME that scored this checkpoint, most steps first.

    UserError where two runs claim the same number of steps."""
    runs, places = {}, {}
    for path in sorted(Path(folder).glob("*/score.json")):
        run = read_result(path.parent, "score")
        if run["ckpt"] != ckpt:
            continue
        steps = run["steps"]
        if steps in runs:
            raise UserError(f"{places[steps]} and {path.parent} both score {ckpt} in {steps} "
                            "steps: keep one of them")
        runs[steps], places[steps] = run, path.parent
    if not runs:
        raise UserError(f"no run in {folder} scores {ckpt}: python evaluate.py --ckpt {ckpt} "
                        f"--out {folder}/NAME")
    return dict(sorted(runs.items(), reverse=True))

def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Markdown: columns are {title: format of a row}, such as {"GiB": "{gib:.2f}"}."""
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

def by_category(values) -> dict:
    """{category: text} of six numbers."""
    return {category: f"{value:.2f}" for category, value in zip(CATEGORIES, values)}

def score_row(scores: dict, **more) -> dict:
    return {"mean": interval_text(scores["mean"]), **more,
            **by_category(scores[category]["score"] for category in CATEGORIES)}

def in_units(row: dict) -> dict:
    """With its numbers as they are shown: millions, GFLOP, GiB, milliseconds, GFLOP/s."""
    units = {"M": ("params", 1e-6), "gflop": ("flops", 1e-9), "gib": ("peak", 2**-30)}
    for key in ("s", "text", "unet", "decoder", "work_s", "least_s", "step_s", "step_512_s"):
        units[f"{key}_ms"] = (key, 1e3)
    row = row | {name: row[key] * by for name, (key, by) in units.items() if key in row}
    if "gflop" in row and "s" in row:
        row["rate"] = row["gflop"] / row["s"]
    return row

COLUMNS = {category: "{" + category + "}" for category in CATEGORIES}

# ------------------------------------------------------------------------- docs/RESULTS.md
def geneval(folder) -> str:
    rows = []
    for name, ckpt in (("base", BASE), ("fast", FAST)):
        for steps, run in runs_of(folder, ckpt).items():
            label = f"ours: {name}, {steps} steps, guidance {run['cfg']:g}"
            rows.append(score_row(run["scores"], name=label, dpg=""))
    full = next(iter(runs_of(folder, BASE).values()))
    rows.append({"name": "ceiling: the same check on held-out renders", "dpg": "",
                 "mean": f"{full['ceiling']['mean']:.3f}",
                 **by_category(full["ceiling"][c] for c in CATEGORIES)})
    rows.append({"name": "floor: pictures against the next prompt", "dpg": "",
                 "mean": f"{full['scores']['mean']['shuffled']:.3f}",
                 **by_category(full["scores"][c]["shuffled"] for c in CATEGORIES)})
    for name, (*six, mean, dpg) in GENEVAL.items():
        rows.append({"name": name, "mean": f"{mean:.2f}", "dpg": dpg, **by_category(six)})
    columns = {"model": "{name}", **COLUMNS, "mean (95 %)": "**{mean}**", "DPG": "{dpg}"}
    return table(rows, columns) + source(
        "python evaluate.py --ckpt assets/scenes --steps 28 --out docs/results/base28", full)

def mistakes(folder) -> str:
    """What goes wrong most in each category, in 28 steps."""
    full, rows = next(iter(runs_of(folder, BASE).values())), []
    for category in CATEGORIES:
        worst = ", ".join(f"{what} ({n})" for what, n in full["confusions"][category][:4])
        score = full["scores"][category]
        rows.append({"category": category, "score": interval_text(score), "worst": worst,
                     "ceiling": full["ceiling"][category], "shuffled": score["shuffled"]})
    return table(rows, {
        "category": "{category}", "score (95 %)": "{score}", "ceiling": "{ceiling:.3f}",
        "against another prompt": "{shuffled:.3f}", "mistaken most (pictures)": "{worst}"})

def few_steps(folder) -> str:
    base, fast, rows = runs_of(folder, BASE), runs_of(folder, FAST), []
    for steps in sorted({*base, *fast}, reverse=True):
        row = {"steps": steps, "before": "", "after": "", "paper_before": "",
               "paper_after": PAPER_DISTILLED.get(steps, "")}
        if steps in base:
            row["before"] = interval_text(base[steps]["scores"]["mean"])
        if steps in fast:
            row["after"] = interval_text(fast[steps]["scores"]["mean"])
        if steps == 28:
            row["paper_before"] = "0.66"
        rows.append(row)
    columns = {"steps": "{steps}", "ours before, guidance 4": "{before}",
               "ours distilled, no guidance": "{after}",
               "paper before (GenEval)": "{paper_before}",
               "paper distilled (GenEval)": "{paper_after}"}
    return table(rows, columns) + source(
        "python evaluate.py --ckpt assets/fast --steps 4 --out docs/results/fast4", fast[4])

def distillation(folder) -> str:
    found = read_result(folder, "distillation")
    alone, rows = found["rows"]["alone"]["step_s"], []
    for name, row in found["rows"].items():
        scores = [seed["scores"] for seed in row["seeds"]]
        means = [statistics.mean(s[c]["score"] for s in scores) for c in (*CATEGORIES, "mean")]
        rows.append({
            "name": name, "steps": row["steps"], **by_category(means), "mean": means[-1],
            "time": f"{row['step_s']:.2f} ({row['step_s'] / alone:.2f} x)",
            "val": ", ".join(f"{seed['val']:.4f}" for seed in row["seeds"]),
            "seeds": ", ".join(interval_text(s["mean"]) for s in scores)})
    teacher = found["teacher"]
    rows.append(score_row(teacher, name="the teacher", steps="", time="",
                          val=f"{found['teacher_val']:.4f}", seeds=interval_text(teacher["mean"])))
    rows[-1]["mean"] = teacher["mean"]["score"]
    columns = {"student": "{name}", "steps": "{steps}", "s a step": "{time}",
               "held-out loss, each seed": "{val}", "mean score": "**{mean:.3f}**",
               "score of each seed (95 %)": "{seeds}", **COLUMNS}
    return table(rows, columns) + source(
        "python -m lab.grids distillation --seeds 2 --prompts 30 --each 4", found)

def ablation(folder) -> str:
    found = read_result(folder, "ablation")
    first, rows = next(iter(found["rows"].values()))["step_512_s"], []
    for name, row in found["rows"].items():
        change, params, macs, paper = ABLATION[name]
        rows.append(in_units(row) | {
            "name": name, "change": change, "paper_cost": f"{params:.1f}, {macs:.1f}",
            "paper": paper, "mmacs": row["macs"] / 1e6, "x": first / row["step_512_s"],
            "score": interval_text(row["scores"]["mean"])})
    columns = {"row": "{name}", "change": "{change}", "M params": "{M:.2f}",
               "M MACs": "{mmacs:.1f}", "ms a step, 64 px": "{step_s_ms:.1f}",
               "512 px": "{step_512_s_ms:.0f} ({x:.2f} x)", "held-out loss": "{val:.4f}",
               "score (95 %)": "{score}", "paper: M params, GMACs at 1024 px": "{paper_cost}",
               "paper reports": "{paper}"}
    return table(rows, columns) + source("python -m lab.grids ablation", found)

def decoder_quality(folder) -> str:
    ae, bench = read_result(folder, "ae"), read_result(folder, "bench_decoder")
    known = {"ours": "not measured", "taesd3": "", "sd3": "out of memory (paper)"}
    rows = [in_units(row) | {"phone": known[row["net"]], "psnr": ""}
            for row in bench["rows"] if row["net"] in known]
    rows[0]["psnr"] = ", ".join(f"{v:.1f} dB at {size} px" for size, v in ae["psnr"].items())
    rows.append({"name": "SnapGen (paper)", "M": 1.38, "gflop": float("nan"), "psnr": "",
                 "phone": "174 ms (article), about 120 ms (project page)"})
    columns = {"decoder": "{name}", "M params": "{M:.2f}", "GFLOPs at 1024 px": "{gflop:.0f}",
               "PSNR on held-out scenes": "{psnr}", "iPhone, 1024 px": "{phone}"}
    return table(rows, columns).replace("nan", "") + source(
        "python train_decoder.py --test assets/ae docs/ae.png docs/results/ae.json", ae)

# ------------------------------------------------------------------------- docs/BENCH.md
NETWORK = {"network": "{name}", "M parameters": "{M:.2f}", "GFLOP": "{gflop:.0f}", "s": "{s:.2f}",
           "x": "{ratio:.2f}", "GFLOP/s": "{rate:.0f}", "share": "{share:.0%}",
           "GiB": "{gib:.2f}", "layout": "{layout}", "floor s": "{floor:.2f}, {floor_bytes:.2f}"}
SAMPLE = {"what": "{what}", "ms a picture": "{s_ms:.1f}", "text": "{text_ms:.1f}",
          "UNet": "{unet_ms:.1f}", "decoder": "{decoder_ms:.1f}", "outside": "{outside:.1%}"}
TRAIN = {"config": "{config}", "network": "{net}", "M parameters": "{M:.2f}", "batch": "{batch}",
         "arithmetic": "{amp}", "GFLOP a picture": "{gflop:.2f}", "pictures/s": "{img_s:.1f}",
         "share of the peak (MFU)": "{mfu:.0%}", "GiB": "{gib:.2f}"}
FLOOR = {"config": "{config}", "network": "{net}", "batch": "{batch}",
         "ms a step at the peak": "{work_s_ms:.1f}", "ms at least": "{least_s_ms:.1f}",
         "MFU at most": "{mfu:.0%}"}
SCALING = {"network": "{net}", "px": "{size}", "batch": "{batch}", "s": "{s:.2f}",
           "GFLOP/s": "{rate:.0f}", "GiB": "{gib:.2f}"}

def beside_machine(found: dict) -> list[dict]:
    """Rows with their share of the matrix product's FLOP/s, and both floors in seconds.

    The machine's limit is the median over the whole run: it varies by a fifth within minutes."""
    peak, band = (statistics.median(found[key]) for key in ("peak_flops", "bandwidth"))
    return [in_units(row) | {"share": row["flops"] / row["s"] / peak,
                             "floor": row["flops"] / peak, "floor_bytes": row["bytes"] / band}
            for row in found["rows"]]

def bench_networks(folder, subject: str) -> str:
    found = read_result(folder, f"bench_{subject}")
    product, copy = ([value / 1e9 for value in found[key]] for key in ("peak_flops", "bandwidth"))
    limits = (f" {found['size']} px. Matrix product {min(product):.0f} to {max(product):.0f} "
              f"GFLOP/s, copy {min(copy):.0f} to {max(copy):.0f} GB/s.")
    about = source(f"python -m lab.bench {subject} --out docs/results", found)
    return table(beside_machine(found), NETWORK) + about + limits

def bench_sample(folder) -> str:
    found = read_result(folder, "bench_sample")
    return table(map(in_units, found["rows"]), SAMPLE) + source("python -m lab.bench sample", found)

def bench_train(folder) -> str:
    found = read_result(folder, "bench_train")
    return table(map(in_units, found["rows"]), TRAIN) + source("python -m lab.bench train", found)

def bench_floor(folder) -> str:
    rows = read_result(folder, "bench_train")["floors"]
    return table([in_units(r) | {"mfu": r["work_s"] / r["least_s"]} for r in rows], FLOOR)

def bench_scaling(folder) -> str:
    found, rows, steps = read_result(folder, "bench_scaling"), [], []
    for row in map(in_units, found["rows"]):
        if row["net"] == "shipped":
            steps.append(f"{row['steps']} steps {row['s_ms']:.0f} ms")
        else:
            rows.append(row)
    note = f" The shipped model, 64 px, guided, without decoding: {', '.join(steps)}."
    return table(rows, SCALING) + source("python -m lab.bench --scaling", found) + note

def bench_data(folder) -> str:
    found = read_result(folder, "bench_data")
    names = {"drawn": "scenes drawn, one core (once)",
             "words": "order, words and dropped captions of the batches",
             "whole": "the same with the latents gathered by the CPU",
             "eats": f"what one H200 would take at an MFU of {found['mfu']:.0%} (computed)"}
    rows = [{"what": what, "speed": found[key]} for key, what in names.items()]
    columns = {"what": "{what}", "pictures/s": "{speed:.0f}"}
    return table(rows, columns) + source("python -m lab.bench data", found)

def bench_aims(folder) -> str:
    """What was aimed at, on a CPU, and what was measured; BENCH.md says why where it was missed."""
    unet, dec = ({row["net"]: row for row in read_result(folder, f"bench_{subject}")["rows"]}
                 for subject in ("unet", "decoder"))
    loader = read_result(folder, "bench_data")
    outside = max(row["outside"] for row in read_result(folder, "bench_sample")["rows"])
    rate = unet["dreamlite"]["ratio"] * unet["ours"]["flops"] / unet["dreamlite"]["flops"]
    aims = [
        ("UNet: faster than SDXL's", 5.0, unet["sdxl"]["ratio"]),
        ("UNet: GFLOP/s over DreamLite's", 1.15, rate),
        ("decoder: faster than SD3's", 25.0, dec["sd3"]["ratio"]),
        ("decoder: memory under SD3's", 4.0, dec["sd3"]["peak"] / dec["ours"]["peak"]),
        ("decoder: faster than TAESD3", 1.3, dec["taesd3"]["ratio"]),
        ("loader: words of a batch, times what a GPU takes", 3.0, loader["words"] / loader["eats"]),
    ]
    rows = [{"what": what, "aim": f"at least {least:.2f} x", "value": f"{value:.2f} x",
             "verdict": "reached" if value >= least else "missed"} for what, least, value in aims]
    rows.append({"what": "sampling: time outside the networks", "aim": "under 5 %",
                 "value": f"{outside:.1%}", "verdict": "reached" if outside < 0.05 else "missed"})
    return table(rows, {"what": "{what}", "aim": "{aim}", "measured": "{value}", "": "{verdict}"})

TABLES = {function.__name__: function for function in (
    geneval, mistakes, few_steps, distillation, ablation, decoder_quality, bench_aims,
    bench_sample, bench_train, bench_floor, bench_data, bench_scaling)}
for subject in ("unet", "decoder"):
    TABLES[f"bench_{subject}"] = partial(bench_networks, subject=subject)
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

def fill_tables(text: str, folder=RESULTS) -> str:
    """The page with the tables between its markers made anew. UserError for unknown names."""
    def made_anew(match):
        begin, name, end = match.groups()
        if name not in TABLES:
            raise UserError(f"no table '{name}': there are {', '.join(TABLES)}")
        return f"{begin}{TABLES[name](folder)}\n{end}"
    return MARKED.sub(made_anew, text)

def main(argv):
    for name in argv:
        if name not in TABLES:
            raise UserError(f"no table '{name}': there are {', '.join(TABLES)}")
        print(TABLES[name](RESULTS))
    for page in () if argv else PAGES:
        path = ROOT / page
        text = path.read_text()
        path.write_text(fill_tables(text))
        print(f"{page}: {len(MARKED.findall(text))} tables")

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
