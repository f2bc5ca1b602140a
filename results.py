"""Writes docs/RESULTS.md: the article's tables and figures beside what scenes can answer, from the JSON files in docs/results. Nothing is typed in
but what the paper reports.

    python evaluate.py --ckpt DIR --out docs/results/NAME [--steps N] [--cfg G] [--fd 5000]     one measurement: docs/results/NAME/score.json
    python bench.py --ablation                                                                 docs/results/ablation.json
    python bench.py --distillation                                                             docs/results/distillation.json
    python decoder.py --test assets/ae docs/ae.png docs/results/ae.json
    python results.py                                                                          docs/RESULTS.md
"""
import json, statistics, sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import plots
from common import ROOT, UserError, friendly
from data import CATEGORIES
from decoder import AutoencoderConfig, tiny_decoder
from model import SHEET, count_params
from plan import GiB

# The paper's own numbers and its rivals' (paper.md, section 7): GenEval in the order of CATEGORIES, the mean, DPG-Bench
GENEVAL = {"SnapGen (paper), 0.38 B": (1.00, .84, .60, .88, .18, .45, .66, 81.1), "SDXL, 2.6 B": (.98, .74, .39, .85, .15, .23, .55, 74.7),
           "Playground v2.5, 2.6 B": (.98, .77, .52, .84, .11, .17, .56, 75.5), "SD3-Medium, 2.0 B": (.98, .74, .63, .67, .34, .36, .62, 84.1),
           "SD3.5-Large, 8.1 B (SnapGen's teacher)": (.98, .89, .73, .83, .34, .47, .71, 85.6), "SANA, 1.6 B": (.99, .77, .62, .88, .21, .47, .66, 84.8)}
FEW_STEPS = {28: .66, 8: .63, 4: .61}
ABLATION = {"a": "FID 3.76", "b": "FLOPs -17 %, latency -24 %, FID 3.12", "c1": "parameters -24 %, latency -62 %, FID 3.38", "c2": "against b: parameters -15 %, FLOPs -27 %, 2.4 x faster, FID as b",
            "d": "parameters and FLOPs about -12 %", "e": "parameters -16 %, FLOPs -6 %, latency -9 %", "final": "FID 2.06"}
CHANGE = {"a": "SDXL's layout, thin and short", "b": "no self-attention at high resolution", "c1": "separable convolutions", "c2": "their expansion 2", "d": "feed-forward x3, not x4",
          "e": "multi-query attention", "final": "text from the first stage, QK-RMSNorm, RoPE, no skips at the lowest stage"}


def table(header, rows) -> str:
    """Markdown."""
    line = lambda cells: "| " + " | ".join(str(c) for c in cells) + " |"
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def made(r) -> str:
    return f"commit {r['commit']}, {r['machine']}, torch {r['torch']}, {r['date']}, seed {r['seed']}"


def percent(s) -> str:
    return f"{s['score']:.3f} ({s['low']:.3f} - {s['high']:.3f})"


def decoder_cost() -> tuple[float, float]:
    """M parameters and GFLOPs (2 a multiply-add) of our decoder at 1024 px, counted on the meta device."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = tiny_decoder(AutoencoderConfig())
        net(torch.empty(1, 16, 128, 128))
    return count_params(net) / 1e6, counter.get_total_flops() / 1e9


def write(folder: Path) -> str:
    runs = {p.parent.name: json.loads(p.read_text()) for p in sorted(folder.glob("*/score.json"))}
    if not runs:
        raise UserError(f"no score.json below {folder}: make one with `python evaluate.py --ckpt assets/scenes --out {folder}/base28`")
    full = max(runs.values(), key=lambda r: (r["steps"], r["scores"]["mean"]["score"]))
    out = ["# Results", "Made by `python results.py` from the JSON files in `docs/results`; the commands that made those stand there and below. "
           "**Ours** is a small model of 64 px scenes, scored by a detector on scenes; **the paper's** are 1024 px photographs and paintings, scored by GenEval's detector. "
           "So the columns show whether each part of the recipe works, not whether one model beats the other."]

    ablation = json.loads((folder / "ablation.json").read_text()) if (folder / "ablation.json").exists() else {"rows": {}}
    ours = {f"ours: {name}, {r['steps']} steps, guidance {r['cfg']:g}": r["scores"] for name, r in runs.items()} | {f"ours: ablation {row} (below)": r["scores"] for row, r in ablation["rows"].items()}
    out += ["## GenEval's six categories", table(["model", *CATEGORIES, "mean", "DPG"],
            [[name, *[f"{s[c]['score']:.2f}" for c in CATEGORIES], "**" + percent(s["mean"]) + "**", ""] for name, s in ours.items()]
            + [["ceiling: the same check on held-out renders", *[f"{full['ceiling'][c]:.2f}" for c in CATEGORIES], f"{full['ceiling']['mean']:.3f}", ""],
               ["floor: pictures against the next prompt", *[f"{full['scores'][c]['shuffled']:.2f}" for c in CATEGORIES], f"{full['scores']['mean']['shuffled']:.3f}", ""]]
            + [[name, *[f"{v:.2f}" for v in row[:7]], row[7]] for name, row in GENEVAL.items()]),
            f"Ours: {full['prompts']} held-out prompts a category, {full['each']} pictures each; brackets: 95 % by bootstrap over prompts. Every prompt but the single objects holds a combination that was never trained on. "
            f"{made(full)}. `python evaluate.py --ckpt DIR --steps N --cfg G --out docs/results/NAME` makes a row.",
            "Mistaken most: " + "; ".join(f"{c}: " + ", ".join(f"{w} ({n})" for w, n in full["confusions"][c][:4]) for c in CATEGORIES if full["confusions"][c]) + "."]

    out += ["## Few steps", table(["steps", "ours", "paper"], [[f"{name}: {r['steps']} steps, guidance {r['cfg']:g}", percent(r["scores"]["mean"]), FEW_STEPS.get(r["steps"], "")]
            for name, r in sorted(runs.items(), key=lambda x: -x[1]["steps"])]),
            "The paper's few-step rows come after adversarial distillation, `fast` (assets/fast) after distribution matching; `base` is the model before it, sampled by DPM-Solver++ 2M with guidance."]

    if (folder / "distillation.json").exists():
        d = json.loads((folder / "distillation.json").read_text())
        mean = lambda seeds, pick: sum(map(pick, seeds)) / len(seeds)
        score = lambda s: s["scores"]["mean"]["score"]
        spread = lambda seeds, pick: f" ({min(map(pick, seeds)):.3f} - {max(map(pick, seeds)):.3f})" if len(seeds) > 1 else ""
        out += ["## Distillation, part by part", table(["student", "seeds", "steps", "s a step", "held-out loss", "score (lowest and highest seed)", *CATEGORIES],
                [[row, len(r["seeds"]), r["steps"], f"{r['step_s']:.2f} ({r['step_s'] / d['rows']['alone']['step_s']:.2f} x)", f"{mean(r['seeds'], lambda s: s['val']):.4f}" + spread(r["seeds"], lambda s: s["val"]),
                  f"**{mean(r['seeds'], score):.3f}**" + spread(r["seeds"], score), *[f"{mean(r['seeds'], lambda s: s['scores'][c]['score']):.2f}" for c in CATEGORIES]] for row, r in d["rows"].items()]
                + [["the teacher", 1, "", "", f"{d['teacher_val']:.4f}", percent(d["teacher"]["mean"]), *[f"{d['teacher'][c]['score']:.2f}" for c in CATEGORIES]]]),
                f"`python train.py --config configs/teacher_nano.toml`, then `python bench.py --distillation`: {d['config']}, {d['nouns']} nouns at {d['size']} px, steps of {d['batch']} pictures; student {d['params'] / 1e6:.2f} M with its text encoder, "
                f"teacher {d['teacher_params'] / 1e6:.2f} M; {d['prompts']} prompts a category, {d['each']} pictures each, 28 steps, guidance 4. s a step: forward and backward pass, timed in turns. The last student learned alone for as long as the slowest ({d['slowest']}) took. {made(d)}."]

    distances = {name: r for name, r in runs.items() if "fd" in r}
    if distances:
        out += ["## Frechet distance", table(["model", "pictures", "distance", "floor (renders against renders)", "precision", "recall", "FID (InceptionV3)"],
                [[name, r["fd_pictures"], f"{r['fd']:.2f}", f"{r['fd_floor']:.2f}", f"{r['precision']:.3f}", f"{r['recall']:.3f}", f"{r['fid']:.2f}" if r.get("fid") is not None else "not measured"] for name, r in distances.items()]),
                "On the features of our own detector (224 numbers a picture), so the distance compares our models with each other only. The paper's FID of 2.06 is ImageNet at 256 px on InceptionV3's features: `configs/imagenet256.toml` is the run that would answer it."]

    if ablation["rows"]:
        a = ablation
        first = next(iter(a["rows"].values()))
        out += ["## Design choices", table(["row", "change", "M params", "M MACs", "ms a step, 64 px", "512 px", "held-out loss", "score (95 %)", "paper: M params, GMACs at 1024 px", "paper reports"],
                [[row, CHANGE.get(row, ""), f"{r['params'] / 1e6:.2f}", f"{r['macs'] / 1e6:.1f}", f"{1e3 * r['step_s']:.1f}", f"{1e3 * r['step_512_s']:.0f} ({first['step_512_s'] / r['step_512_s']:.2f} x)",
                  f"{r['val']:.4f}", percent(r["scores"]["mean"]), f"{SHEET[row][0]:.1f}, {SHEET[row][2]:.1f}" if row in SHEET else "", ABLATION.get(row, "")] for row, r in a["rows"].items()]),
                f"`python bench.py --ablation`: a small grid on a CPU, {a['nouns']} nouns at {a['size']} px, {a['steps']} steps of {a['batch']} pictures, one seed: costs are solid, differences of score within the intervals are not. "
                + ("After so few pictures all rows draw blobs and their scores lie near the floor: read the loss. " if max(r["scores"]["mean"]["score"] for r in a["rows"].values()) < 0.2 else "") +
                "At 64 px a step is mostly overhead. "
                f"The 512 px column is the same networks, untrained for it, timed on 64x64 latents at batch 1 (x: against row a). {made(a)}."]

    path = folder / "ae.json"
    if path.exists():
        ae, (params, flops) = json.loads(path.read_text()), decoder_cost()
        quality = ", ".join(f"{v:.1f} dB at {size} px" for size, v in ae["psnr"].items())
        out += ["## Decoder", table(["decoder", "M params", "GFLOPs at 1024 px", "quality", "iPhone, 1024 px"],
                [["ours", f"{params:.2f}", f"{flops:.0f}", f"PSNR on held-out scenes {quality}", "not measured"], ["SnapGen (paper)", "1.38", "", "", "174 ms (article), about 120 ms (project page)"],
                 ["SDXL, SD3 (paper)", "49.5", "10472 (SD3)", "", "out of memory on the Neural Engine"], ["TAESD3", "1.23", "566", "", ""]]),
                f"`python decoder.py --test assets/ae docs/ae.png docs/results/ae.json`, {made(ae)}. The PSNR is that of the whole autoencoder on pictures of emoji: not comparable with photographs."]

    out += ["## What scenes do not answer", "- **Human preference** (SnapGen against SDXL, SD3-Medium, SD3.5-Large): `python evaluate.py --versus A B --out compare.html` makes the page on which people vote; no votes were collected.",
            "- **GenEval and DPG-Bench themselves**: `--geneval` and `--dpg` write the folders that the official evaluators read; a model of scenes does not know their prompts.",
            "- **The phone**: see `docs/COREML.md`."]
    return "\n\n".join(out) + "\n"


# ---------------------------------------------------------------------------- docs/BENCH.md, for bench.py
def beside_machine(rows: list[dict]) -> list[dict]:
    """Rows with their FLOP/s, the share of the matrix product's, and both floors in seconds. What the machine can do is the median over the whole run: it varies by 20 % within minutes."""
    peak, band = (statistics.median(r[k] for r in rows) for k in ("peak_flops", "bandwidth"))
    return [r | {"rate": r["flops"] / r["s"], "share": r["flops"] / r["s"] / peak, "floor": r["flops"] / peak, "floor_bytes": r["bytes"] / band} for r in rows]


def goals(found: dict) -> list[tuple]:
    """What was aimed at (on a CPU), what was measured, and, where it was missed, the floor."""
    rows, out = {s: {r["net"]: r for r in d["rows"]} for s, d in found.items() if s in ("unet", "decoder")}, []
    goal = lambda what, value, least, why, show=lambda v: f"{v:.2f} x": out.append((what, f"at least {show(least)}", show(value), "reached" if value >= least else f"missed: {why}"))
    u, d = rows.get("unet", {}), rows.get("decoder", {})
    if "sdxl" in u:
        goal("UNet: faster than SDXL's", u["sdxl"]["ratio"], 5.0, f"its work is {u['sdxl']['flops'] / u['ours']['flops']:.2f} x ours (77 tokens to read for our 333), so that is the most where both run at one share of the machine's own matrix product: SDXL's runs at {u['sdxl']['share']:.0%}, ours at {u['ours']['share']:.0%}")
    if "dreamlite" in u:
        o, p = u["ours"], u["dreamlite"]
        goal("UNet: GFLOP/s over DreamLite's", p["ratio"] * o["flops"] / p["flops"], 1.15,
             f"both are matrix products by the same library: DreamLite's runs at {p['share']:.0%} of the machine's own, so {1 / p['share']:.2f} x would be all of it; ours is at {o['share']:.0%}")
    if "sd3" in d:
        goal("decoder: faster than SD3's", d["sd3"]["ratio"], 25.0, f"its work is {d['sd3']['flops'] / d['ours']['flops']:.1f} x ours, all of it dense 3x3 convolutions at {d['sd3']['share']:.0%} of the peak; ours is at {d['ours']['share']:.0%}, since depthwise convolutions, norms and activations are half of its time (LOG.md)")
        for key, name, share in (("ours", "decoder: memory under SD3's", 4.0), *([("ours_small", "decoder with --low-memory: memory under SD3's", 10.0)] if "ours_small" in d else [])):
            goal(name, d["sd3"]["peak"] / d[key]["peak"], share, "a block's hidden map, 128 channels at full resolution, is 0.5 GiB, a layer reads one and writes one, and the heap keeps what was freed, which is what makes it fast (LOG.md); --low-memory takes less")
    if "taesd3" in d:
        o, p = d["ours"], d["taesd3"]
        goal("decoder: faster than TAESD3", p["ratio"], 1.3, f"TAESD3 has {p['flops'] / o['flops']:.2f} x the work, all of it dense 3x3 convolutions at {p['share']:.0%} of the peak; ours are 1x1 over 64 to 512 channels, "
             f"and each byte of a map that is moved counts: {o['floor']:.1f} s of products at the peak, {o['floor_bytes']:.1f} s of memory at the copy's speed, {o['s']:.1f} s measured")
    if "sample" in found:
        worst = max(r["outside"] for r in found["sample"]["rows"])
        out.append(("sampling: time outside the networks", "under 5 %", f"{worst:.1%}", "reached" if worst < 0.05 else "missed"))
        out.append(("cached text projections: the same latents", "to 1e-5", f"{found['sample']['cache']['difference']:.0e}", "reached" if found["sample"]["cache"]["difference"] < 1e-5 else "missed"))
    if "data" in found:
        goal("loader: words of a batch, times what a GPU eats", found["data"]["words"] / found["data"]["eats"], 3.0, "one process of one thread; each GPU has its own")
    train = found.get("train", {})
    most = {f["config"]: f["work_s"] / f["least_s"] for f in train.get("floors", []) if f["net"] == "UNet"}
    if "cuda" in train.get("device", ""):
        for r in (r for r in train["rows"] if r["net"] == "UNet"):
            goal(f"training `{r['config']}`: MFU with torch.compile and bfloat16", r["mfu"], 0.35, f"its memory allows at most {most[r['config']]:.0%} of an H200 (computed, below)", lambda v: f"{100 * v:.0f} %")
    else:
        allowed = ", ".join(f"{x:.0%} for `{config}`" for config, x in most.items())
        out.append(("training on an H200: MFU with torch.compile and bfloat16", "at least 35 %", "not measured", "no GPU was at hand: `python bench.py train --device cuda`" + (f". Its memory allows at most {allowed} (computed, below)" if most else "")))
    return out


def bench_page(folder: Path) -> str:
    found = {s: json.loads(f.read_text()) for s in ("unet", "decoder", "sample", "train", "data", "scaling") if (f := folder / f"bench_{s}.json").exists()}
    for s in ("unet", "decoder"):
        if s in found:
            found[s]["rows"] = beside_machine(found[s]["rows"])
    out = ["# What it costs", "Made by `python bench.py all` and `python bench.py --scaling`, from `docs/results/bench_*.json`. Random weights, one picture at a time if nothing else is said. "
           "**x**: how many times the time of ours, both timed in turns. Share: of what the machine's matrix product reached in the same run, the median between all turns (over 100 %: oneDNN's convolutions against MKL's product, and noise). GiB: what the process grew by, weights included. "
           "Floor: the work at that peak | all modules' inputs, outputs and weights once at the speed of a copy."]
    if g := goals(found):
        out += ["## Aims", table(["what", "aim", "measured", ""], g)]
    for s, title in (("unet", "Denoisers: one evaluation"), ("decoder", "Decoders")):
        if s in found:
            f, span = found[s], lambda key, rows=found[s]["rows"]: " to ".join(dict.fromkeys(f"{end(r[key] for r in rows) / 1e9:.0f}" for end in (min, max)))
            out += [f"## {title} at {f['size']} px", f"`python bench.py {s}`, {f['threads']} threads, {made(f)}. Matrix product {span('peak_flops')} GFLOP/s, copy {span('bandwidth')} GB/s.",
                    table(["network", "M parameters", "GFLOP", "s", "x", "GFLOP/s", "share", "GiB", "layout", "floor s"], [
                        (r["name"], f"{r['params'] / 1e6:.2f}", f"{r['flops'] / 1e9:.0f}", f"{r['s']:.2f}", f"{r['ratio']:.2f}", f"{r['rate'] / 1e9:.0f}", f"{r['share']:.0%}", f"{r['peak'] / GiB:.2f}", r["layout"],
                         f"{r['floor']:.2f}, {r['floor_bytes']:.2f}") for r in f["rows"]])]
    if "sample" in found:
        f, c = found["sample"], found["sample"]["cache"]
        out += ["## Sampling: where a picture's time goes", f"`python bench.py sample`, {f['threads']} threads, {made(f)}",
                table(["what", "ms", "text", "UNet", "decoder", "outside"], [(r["what"], *(f"{1e3 * r[k]:.1f}" for k in ("s", "text", "unet", "decoder")), f"{r['outside']:.1%}") for r in f["rows"]]),
                f"The text's keys and values do not change between steps. Projected once instead of in each step, the 379 M UNet at {c['size']} px with 333 tokens and guidance takes {c['once']:.2f} s for 4 steps, not {c['anew']:.2f} "
                f"({c['anew'] / c['once']:.3f} x); the latents differ by {c['difference']:.0e} of their deviation."]
    if "train" in found:
        f = found["train"]
        out += ["## Training: one step", f"`python bench.py train`, {f['threads']} threads, {made(f)}. An MMDiT of nearly equal FLOPs beside it, in turns.",
                table(["config", "network", "M parameters", "batch", "arithmetic", "GFLOP a picture", "pictures/s", "share of the peak (MFU)", "GiB"], [
                    (r["config"], r["net"], f"{r['params'] / 1e6:.2f}", r["batch"], r["amp"], f"{r['flops'] / 1e9:.2f}", f"{r['img_s']:.1f}", f"{r['mfu']:.0%}", f"{r['peak'] / GiB:.2f}") for r in f["rows"]])]
        if "floors" in f:
            out += [f"What an H200 could reach at most, computed from its data sheet ({f['gpu_flops'] / 1e12:.0f} TFLOP/s in bfloat16, {f['gpu_bytes'] / 1e12:.1f} TB/s), not measured: each linear and convolution a kernel of its own, whose three passes move "
                    "two maps and the weights once each (no map stays in its cache) or take their work's time, whichever is longer; all else is free. Narrow layers wait for memory: a 1x1 convolution over C channels does C / 2 operations a byte, and the GPU "
                    f"has time for {f['gpu_flops'] / f['gpu_bytes']:.0f}.",
                    table(["config", "network", "batch", "ms a step at the peak", "ms at least", "MFU at most"], [
                        (x["config"], x["net"], x["batch"], f"{1e3 * x['work_s']:.1f}", f"{1e3 * x['least_s']:.1f}", f"{x['work_s'] / x['least_s']:.0%}") for x in f["floors"]])]
    if "data" in found:
        f = found["data"]
        out += ["## Data", f"`python bench.py data`, {made(f)}. Scenes of `{f['config']}` are drawn at {f['drawn']:.0f} pictures/s on one core, worded and encoded: once. From then on latents and words lie in the device's memory. "
                f"A batch's order, words and dropped captions are found at {f['words']:.0f} pictures/s; with the latents gathered by this machine, as on a CPU, {f['whole']:.0f}. One GPU of {f['gpu_flops'] / 1e12:.0f} TFLOP/s "
                f"would eat {f['eats']:.0f} at an MFU of {f['mfu']:.0%} (computed, not measured), and gather latents at the speed of its memory."]
    if "scaling" in found:
        f, of = found["scaling"], lambda *k: [r for r in found["scaling"]["rows"] if r["net"] in k]
        out += ["## How cost grows", f"`python bench.py --scaling`, {f['threads']} threads, {made(f)}", "![time and memory against resolution, batch and steps](scaling_cost.png)",
                table(["network", "px", "batch", "s", "GFLOP/s", "GiB"], [(r["net"], r["size"], r["batch"], f"{r['s']:.2f}", f"{r['flops'] / r['s'] / 1e9:.0f}", f"{r['peak'] / GiB:.2f}") for r in of("UNet", "decoder", "decoder, small")]),
                "The shipped model, 64 px, guided, without decoding: " + ", ".join(f"{r['steps']} steps {1e3 * r['s']:.0f} ms" for r in of("shipped")) + "."]
    return "\n\n".join(out) + "\n"


def cost_plot(found: dict, out):
    """Seconds and GiB against the picture's side, both against the batch, seconds against the steps."""
    colours, rows = {"UNet": (40, 90, 220), "decoder": (220, 110, 30), "decoder, small": (60, 150, 70)}, found["rows"]
    sides = lambda value: [([(r["size"], value(r)) for r in rows if r["net"] == net and r["batch"] == 1], c) for net, c in colours.items()]
    batches = lambda value: [(r["batch"], value(r)) for r in rows if r["net"] == "UNet" and r["size"] == 256]
    note = "blue: 379 M UNet, orange: decoder, green: --low-memory"
    plots.side_by_side([plots.chart(lines, text, 480, 320) for lines, text in (
        (sides(lambda r: r["s"]), f"seconds to 1024 px; {note}"),
        (sides(lambda r: r["peak"] / GiB), "GiB to 1024 px"),
        ([(batches(lambda r: r["s"] / r["batch"]), (40, 90, 220)), (batches(lambda r: r["peak"] / GiB), (150, 150, 150))], "UNet, 256 px, batch to 8: blue seconds a picture, grey GiB"),
        ([([(r["steps"], r["s"]) for r in rows if r["net"] == "shipped"], (40, 90, 220))], "shipped model, 64 px, guided, to 28 steps: seconds"))], out)


# ---------------------------------------------------------------------------- docs/COREML.md, for export_coreml.py
WHY = {
    "W1": "latents and pictures arrive as they are; one tensor a step, the waste is microseconds (and gone at 32 latent columns and more)",
    "W2": "`timestep` and `input_ids` stay fp32: fp16 holds neither t = 0.999 nor 1000 token ids well; a few values",
    "W3": "the embedding's look-up, on the CPU, once a picture",
    "W5": "the text has 77 tokens (--tokens 96 pads), or a latent row has fewer than 32 columns at this size",
    "W7": "a column of per-channel values",
    "W12": "the picture's three channels: the last convolution",
    "W13": "compress it (--bits 8 or 6), or keep it for Macs",
    "W14": "self-attention's keys, turned once a layer for all heads (128 kB)",
    "W15": "into a transformer and out of it, the image becomes a row of tokens: two copies a transformer",
    "W17": "scores of one head at this size; --attention split512 cuts queries",
    "I2": "the island of sinusoids and token ids: CPU, tiny, exact",
    "I4": "compiled once on the device; --attention matmul has fewer ops",
}


def coreml_page(m: dict, scores: dict, where) -> str:
    """From the bundles' manifests and scores, {name: ..}."""
    from coreml_check import EFFICIENCY                     # imports coremltools: seconds
    rows = [(n, p, r) for n in ("scenes", "t2i") for p, r in m[n]["parts"].items()]
    cells = lambda head, lines: table(head, lines) + "\n"     # a blank line behind it
    spread = lambda v: f"{v[0]:.1f} to {v[1]:.1f}"
    size = lambda b: sum(r["bytes"] for r in m[b]["parts"].values()) / 1e6
    u, d = m["t2i"]["parts"]["Unet"]["estimate_ms"], m["t2i"]["parts"]["VAEDecoder"]["estimate_ms"]
    first = m["scenes"]["sizes"][0]
    return f"""**Nothing here was measured on a phone or a Mac: files were made and executed op by op on a Linux CPU, and latencies are estimates.**

# The Core ML bundle, as exported

Made by `python export_coreml.py --report {where}` (commits {", ".join(sorted({x["git"] for x in m.values()}))}; torch {m["t2i"]["tools"]["torch"]}, coremltools {m["t2i"]["tools"]["coremltools"]}, one CPU
thread on a shared machine: seconds are upper bounds). `scenes` is what ships, {first} px; `t2i` the paper's UNet and decoder at {m["t2i"]["sizes"][0]} px with random weights. There the layers that
start at zero were perturbed (std 0.3 / sqrt(fan-in)), and all gains and biases too (0.1): else the output would be zero and prove nothing.

## Beside the article's numbers

{cells(["1024 px", "estimate, not measured: A17 Pro", "A18 Pro", "measured by Snap"], [
    ["UNet, a step (ms)", spread(u["A17 Pro"]), spread(u["A18 Pro"]), "274 (iPhone 16 Pro Max)"], ["decoder (ms)", spread(d["A17 Pro"]), spread(d["A18 Pro"]), "174 (iPhone 15 Pro), about 120 (16 Pro Max)"],
    ["4 steps and decoder (s)", *[f"{(4 * u[c][0] + d[c][0]) / 1000:.2f} to {(4 * u[c][1] + d[c][1]) / 1000:.2f}" for c in u], "about 1.4, text encoders included (16 Pro Max)"]])}
From: pointwise ops fused into their neighbours; to: none fused. A roofline of {EFFICIENCY:.0%} of 17.5 TFLOPS and of the memory's bandwidth, +-40 %; it ranks variants, it promises nothing.

## Gates

{cells(["bundle", "package", "M parameters", "MB", "ops", "GFLOP", "form dB", "graph dB", "numerics dB", "largest activation", "lint errors", "convert s", "execute s, fp32 / fp16", "peak GiB"], [
    [n, p, f"{r['params'] / 1e6:.2f}", f"{r['bytes'] / 1e6:.1f}", r["ops"], f"{r['gflop']:.2f}", *(f"{r[k]:.1f}" for k in ("form", "graph", "numerics")), f"{r['largest']:.0f}", r["lint"]["errors"], f"{r['convert_s']:.0f}",
     f"{r['fp32_s']:.1f} / {r['fp16_s']:.1f}", f"{r['peak_gib']:.1f}"] for n, p, r in rows])}
form: the Neural Engine's form against the training form, fp32. graph: the saved file executed in fp32 against PyTorch with fp16-rounded weights. numerics: every result rounded to fp16, against
the training form. (200 dB: identical; 10000 is the mask.) Pictures of {first} px from the files against PyTorch's: {m["scenes"][f"picture_db_{first}"]:.1f} dB (4 prompts, 28 steps, guidance 4).
All of `scenes` took {m["scenes"]["seconds"]:.0f} s, all of `t2i` {m["t2i"]["seconds"]:.0f} s.

## Compression

{cells(["bits", "MB", "text encoder dB", "UNet dB", f"picture dB", "score on scenes (95 %)"], [[b, f"{size(n):.1f}", *(f"{m[n]['parts'][p].get('numerics_compressed', m[n]['parts'][p]['numerics']):.1f}" for p in ("TextEncoder", "Unet")),
    f"{m[n][f'picture_db_{first}']:.1f}", "{score:.3f} ({low:.3f} to {high:.3f})".format(**scores[n]["scores"]["mean"])] for b, n in ((16, "scenes"), (8, "scenes-8"), (6, "scenes-6"), (4, "scenes-4"))])}
16: fp16. 8: int8 per output channel. 6, 4: palettes of one tensor each (k-means). The decoder stays fp16. A picture's decibels fall fast, since sampling amplifies: a low number can be another good picture.
The score is `python evaluate.py --coreml BUNDLE --prompts 20 --each 1`: 120 pictures from the files, executed op by op; the whole test of the PyTorch model is in `docs/RESULTS.md`.

## Lint: what is left

{cells(["rule", "where", "times", "first", "why it stays"], [[r, f"{n} {p}", c, row["lint"]["first"][r].replace("|", "/"), WHY.get(r, "")] for n, p, row in rows for r, c in row["lint"]["rules"].items()])}
Errors: none. Sources by name in `coreml_check.py`.

## Ops

{cells(["bundle", "package", "ops"], [[n, p, " ".join(f"{k} {c}" for k, c in r["histogram"].items())] for n, p, r in rows])}
The ten slowest by the estimate (A17 Pro):

{cells(["package", "ms", "op", "output", "GFLOP", "MB from memory", "name"], [[p, f"{1000 * s:.2f}", kind, "x".join(map(str, shape)), f"{gf:.2f}", f"{mb:.1f}", name]
    for p in ("Unet", "VAEDecoder") for s, kind, name, shape, gf, mb in m["t2i"]["parts"][p]["top"]])}"""


if __name__ == "__main__":
    with friendly():
        if len(sys.argv) > 1:
            sys.exit(__doc__)
        (ROOT / "docs" / "RESULTS.md").write_text(write(ROOT / "docs" / "results"))
        print("docs/RESULTS.md")
