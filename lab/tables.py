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
from pathlib import Path

from common import ROOT, UserError, friendly
from scenes import CATEGORIES

RESULTS = ROOT / "docs/results"
PAGES = ("README.md", "docs/RESULTS.md", "docs/BENCH.md")
GiB = 2**30

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
        raise UserError(f"cannot read {path} ({e}): docs/RESULTS.md and docs/BENCH.md name the "
                        "command that makes it") from None


def runs_of(folder, ckpt: str) -> dict[int, dict]:
    """{steps: score.json} of the runs folder/NAME that scored this checkpoint, most steps first.

    UserError where two runs claim the same number of steps.
    """
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


def table(header, rows) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def source(command: str, run: dict) -> str:
    """The line below a table: how it was made."""
    threads = f", {run['threads']} threads" if "threads" in run else ""
    return (f"\n\n`{command}`, commit {run['commit']}, {run['machine']}{threads}, "
            f"torch {run['torch']}, {run['date']}, seed {run['seed']}.")


def interval_text(score: dict) -> str:
    return f"{score['score']:.3f} ({score['low']:.3f} - {score['high']:.3f})"


def by_category(scores: dict, key: str = "score") -> list[str]:
    return [f"{scores[category][key]:.2f}" for category in CATEGORIES]


# ------------------------------------------------------------------------- docs/RESULTS.md
def geneval(folder) -> str:
    base, fast = runs_of(folder, "assets/scenes"), runs_of(folder, "assets/fast")
    rows = []
    for name, runs in (("base", base), ("fast", fast)):
        for steps, run in runs.items():
            scores = run["scores"]
            label = f"ours: {name}, {steps} steps, guidance {run['cfg']:g}"
            rows.append([label, *by_category(scores), f"**{interval_text(scores['mean'])}**", ""])
    full = next(iter(base.values()))
    ceiling, floor = full["ceiling"], full["scores"]
    rows.append(["ceiling: the same check on held-out renders",
                 *[f"{ceiling[c]:.2f}" for c in CATEGORIES], f"{ceiling['mean']:.3f}", ""])
    rows.append(["floor: pictures against the next prompt", *by_category(floor, "shuffled"),
                 f"{floor['mean']['shuffled']:.3f}", ""])
    for name, values in GENEVAL.items():
        rows.append([name, *[f"{v:.2f}" for v in values[:7]], values[7]])
    return table(["model", *CATEGORIES, "mean (95 %)", "DPG"], rows) + source(
        "python evaluate.py --ckpt assets/scenes --steps 28 --out docs/results/base28", full)


def mistakes(folder) -> str:
    full = next(iter(runs_of(folder, "assets/scenes").values()))
    rows = []
    for category in CATEGORIES:
        worst = ", ".join(f"{what} ({n})" for what, n in full["confusions"][category][:4])
        score = full["scores"][category]
        rows.append([category, interval_text(score), f"{full['ceiling'][category]:.3f}",
                     f"{score['shuffled']:.3f}", worst])
    header = ["category", "score (95 %)", "ceiling", "wrong prompt", "mistaken most (pictures)"]
    return table(header, rows)


def few_steps(folder) -> str:
    base, fast = runs_of(folder, "assets/scenes"), runs_of(folder, "assets/fast")
    rows = []
    for steps in sorted({*base, *fast}, reverse=True):
        ours = [interval_text(runs[steps]["scores"]["mean"]) if steps in runs else ""
                for runs in (base, fast)]
        rows.append([steps, *ours, "0.66" if steps == 28 else "", PAPER_DISTILLED.get(steps, "")])
    header = ["steps", "ours before, guidance 4", "ours distilled, no guidance",
              "paper before (GenEval)", "paper distilled (GenEval)"]
    return table(header, rows) + source(
        "python evaluate.py --ckpt assets/fast --steps 4 --out docs/results/fast4", fast[4])


def few_steps_wide(folder) -> str:
    """The same on twice as many prompts."""
    folder, rows = Path(folder) / "wide", []
    for ckpt in ("assets/scenes", "assets/fast"):
        for steps, run in runs_of(folder, ckpt).items():
            rows.append([ckpt, steps, f"{run['cfg']:g}", run["prompts"],
                         interval_text(run["scores"]["mean"]), *by_category(run["scores"])])
    header = ["model", "steps", "guidance", "prompts a category", "mean (95 %)", *CATEGORIES]
    return table(header, rows) + source("python evaluate.py --ckpt assets/fast --prompts 120", run)


def distillation(folder) -> str:
    found = read_result(folder, "distillation")
    alone, rows = found["rows"]["alone"]["step_s"], []
    for name, row in found["rows"].items():
        seeds = row["seeds"]
        scores = ", ".join(interval_text(seed["scores"]["mean"]) for seed in seeds)
        categories = [f"{statistics.mean(seed['scores'][c]['score'] for seed in seeds):.2f}"
                      for c in CATEGORIES]
        mean = statistics.mean(seed["scores"]["mean"]["score"] for seed in seeds)
        rows.append([name, row["steps"], f"{row['step_s']:.2f} ({row['step_s'] / alone:.2f} x)",
                     ", ".join(f"{seed['val']:.4f}" for seed in seeds), f"**{mean:.3f}**",
                     scores, *categories])
    teacher = found["teacher"]
    rows.append(["the teacher", "", "", f"{found['teacher_val']:.4f}",
                 f"**{teacher['mean']['score']:.3f}**", interval_text(teacher["mean"]),
                 *by_category(teacher)])
    header = ["student", "steps", "s a step", "held-out loss, each seed", "mean score",
              "score of each seed (95 %)", *CATEGORIES]
    return table(header, rows) + source(
        "python -m lab.grids distillation --seeds 2 --prompts 30 --each 4", found)


def distance(folder) -> str:
    full = next(iter(runs_of(folder, "assets/scenes").values()))
    header = ["model", "pictures", "distance", "floor (renders against renders)", "precision",
              "recall"]
    row = ["base, 28 steps", full["fd_pictures"], f"{full['fd']:.2f}", f"{full['fd_floor']:.2f}",
           f"{full['precision']:.3f}", f"{full['recall']:.3f}"]
    return table(header, [row]) + source("python evaluate.py --steps 28 --fd 5000", full)


def ablation(folder) -> str:
    found = read_result(folder, "ablation")
    first, rows = next(iter(found["rows"].values())), []
    for name, row in found["rows"].items():
        change, params, macs, paper = ABLATION[name]
        faster = first["step_512_s"] / row["step_512_s"]
        rows.append([name, change, f"{row['params'] / 1e6:.2f}", f"{row['macs'] / 1e6:.1f}",
                     f"{1e3 * row['step_s']:.1f}",
                     f"{1e3 * row['step_512_s']:.0f} ({faster:.2f} x)", f"{row['val']:.4f}",
                     interval_text(row["scores"]["mean"]), f"{params:.1f}, {macs:.1f}", paper])
    header = ["row", "change", "M params", "M MACs", "ms a step, 64 px", "512 px",
              "held-out loss", "score (95 %)", "paper: M params, GMACs at 1024 px",
              "paper reports"]
    return table(header, rows) + source("python -m lab.grids ablation", found)


def decoder(folder) -> str:
    ae, bench = read_result(folder, "ae"), read_result(folder, "bench_decoder")
    rows = {row["net"]: row for row in bench["rows"]}
    cost = {name: [f"{rows[name]['params'] / 1e6:.2f}", f"{rows[name]['flops'] / 1e9:.0f}"]
            for name in ("ours", "sd3", "taesd3")}
    psnr = ", ".join(f"{value:.1f} dB at {size} px" for size, value in ae["psnr"].items())
    return table(["decoder", "M params", "GFLOPs at 1024 px", "PSNR on held-out scenes",
                  "iPhone, 1024 px"], [
        ["ours", *cost["ours"], psnr, "not measured"],
        ["SnapGen (paper)", "1.38", "", "", "174 ms (article), about 120 ms (project page)"],
        ["SD3", *cost["sd3"], "", "out of memory on the Neural Engine (paper)"],
        ["TAESD3", *cost["taesd3"], "", ""],
    ]) + source("python train_decoder.py --test assets/ae docs/ae.png docs/results/ae.json", ae)


# ------------------------------------------------------------------------- docs/BENCH.md
def beside_machine(found: dict) -> list[dict]:
    """Rows with FLOP/s, their share of the matrix product's, and both floors in seconds.

    The machine's limit is the median over the whole run: it varies by a fifth within minutes.
    """
    peak, band = (statistics.median(found[key]) for key in ("peak_flops", "bandwidth"))
    return [row | {"rate": row["flops"] / row["s"], "share": row["flops"] / row["s"] / peak,
                   "floor": row["flops"] / peak, "floor_bytes": row["bytes"] / band}
            for row in found["rows"]]


def bench_networks(folder, subject: str) -> str:
    found, rows = read_result(folder, f"bench_{subject}"), []
    for r in beside_machine(found):
        rows.append([r["name"], f"{r['params'] / 1e6:.2f}", f"{r['flops'] / 1e9:.0f}",
                     f"{r['s']:.2f}", f"{r['ratio']:.2f}", f"{r['rate'] / 1e9:.0f}",
                     f"{r['share']:.0%}", f"{r['peak'] / GiB:.2f}", r["layout"],
                     f"{r['floor']:.2f}, {r['floor_bytes']:.2f}"])
    header = ["network", "M parameters", "GFLOP", "s", "x", "GFLOP/s", "share", "GiB", "layout",
              "floor s"]
    product, copy = found["peak_flops"], found["bandwidth"]
    limits = (f" {found['size']} px. Matrix product {min(product) / 1e9:.0f} to "
              f"{max(product) / 1e9:.0f} GFLOP/s, copy {min(copy) / 1e9:.0f} to "
              f"{max(copy) / 1e9:.0f} GB/s.")
    return table(header, rows) + source(f"python -m lab.bench {subject}", found) + limits


def bench_unet(folder) -> str:
    return bench_networks(folder, "unet")


def bench_decoder(folder) -> str:
    return bench_networks(folder, "decoder")


def bench_sample(folder) -> str:
    found = read_result(folder, "bench_sample")
    rows = [[row["what"], *[f"{1e3 * row[k]:.1f}" for k in ("s", "text", "unet", "decoder")],
             f"{row['outside']:.1%}"] for row in found["rows"]]
    header = ["what", "ms a picture", "text", "UNet", "decoder", "outside"]
    return table(header, rows) + source("python -m lab.bench sample", found)


def bench_train(folder) -> str:
    found = read_result(folder, "bench_train")
    rows = [[r["config"], r["net"], f"{r['params'] / 1e6:.2f}", r["batch"], r["amp"],
             f"{r['flops'] / 1e9:.2f}", f"{r['img_s']:.1f}", f"{r['mfu']:.0%}",
             f"{r['peak'] / GiB:.2f}"] for r in found["rows"]]
    header = ["config", "network", "M parameters", "batch", "arithmetic", "GFLOP a picture",
              "pictures/s", "share of the peak (MFU)", "GiB"]
    return table(header, rows) + source("python -m lab.bench train", found)


def bench_floor(folder) -> str:
    rows = [[r["config"], r["net"], r["batch"], f"{1e3 * r['work_s']:.1f}",
             f"{1e3 * r['least_s']:.1f}", f"{r['work_s'] / r['least_s']:.0%}"]
            for r in read_result(folder, "bench_train")["floors"]]
    header = ["config", "network", "batch", "ms a step at the peak", "ms at least",
              "MFU at most"]
    return table(header, rows)


def bench_data(folder) -> str:
    found = read_result(folder, "bench_data")
    rows = [["scenes drawn, one core (once)", found["drawn"]],
            ["order, words and dropped captions of the batches", found["words"]],
            ["the same with the latents gathered by the CPU", found["whole"]],
            [f"what one H200 would take at an MFU of {found['mfu']:.0%} (computed)",
             found["eats"]]]
    rows = [[what, f"{speed:.0f}"] for what, speed in rows]
    return table(["what", "pictures/s"], rows) + source("python -m lab.bench data", found)


def bench_scaling(folder) -> str:
    found = read_result(folder, "bench_scaling")
    rows = [[r["net"], r["size"], r["batch"], f"{r['s']:.2f}",
             f"{r['flops'] / r['s'] / 1e9:.0f}", f"{r['peak'] / GiB:.2f}"]
            for r in found["rows"] if r["net"] != "shipped"]
    steps = ", ".join(f"{r['steps']} steps {1e3 * r['s']:.0f} ms"
                      for r in found["rows"] if r["net"] == "shipped")
    note = f" The shipped model, 64 px, guided, without decoding: {steps}."
    return table(["network", "px", "batch", "s", "GFLOP/s", "GiB"], rows) + source(
        "python -m lab.bench --scaling", found) + note


def bench_aims(folder) -> str:
    """What was aimed at, on a CPU, and what was measured; BENCH.md says why, where it was missed."""
    unet, dec = ({row["net"]: row for row in beside_machine(read_result(folder, f"bench_{s}"))}
                 for s in ("unet", "decoder"))
    loader = read_result(folder, "bench_data")
    outside = max(r["outside"] for r in read_result(folder, "bench_sample")["rows"])
    rate = unet["dreamlite"]["ratio"] * unet["ours"]["flops"] / unet["dreamlite"]["flops"]
    aims = [
        ("UNet: faster than SDXL's", 5.0, unet["sdxl"]["ratio"]),
        ("UNet: GFLOP/s over DreamLite's", 1.15, rate),
        ("decoder: faster than SD3's", 25.0, dec["sd3"]["ratio"]),
        ("decoder: memory under SD3's", 4.0, dec["sd3"]["peak"] / dec["ours"]["peak"]),
        ("decoder: faster than TAESD3", 1.3, dec["taesd3"]["ratio"]),
        ("loader: words of a batch, times what a GPU takes", 3.0, loader["words"] / loader["eats"]),
    ]
    rows = [[what, f"at least {least:.2f} x", f"{value:.2f} x",
             "reached" if value >= least else "missed"] for what, least, value in aims]
    rows.append(["sampling: time outside the networks", "under 5 %", f"{outside:.1%}",
                 "reached" if outside < 0.05 else "missed"])
    return table(["what", "aim", "measured", ""], rows)


TABLES = {f.__name__: f for f in (
    geneval, mistakes, few_steps, few_steps_wide, distillation, distance, ablation, decoder,
    bench_aims, bench_unet, bench_decoder, bench_sample, bench_train, bench_floor, bench_data,
    bench_scaling)}
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
