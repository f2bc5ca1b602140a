"""Every picture of README.md and docs/ that needs no training, from assets/ and docs/results.

    python -m lab.figures                all of them, and the tables (lab.tables)
    python -m lab.figures steps ae       only these

samples: what the shipped weights draw.  steps: before and after step distillation.
score: a judged contact sheet.  failures: what is still wrong.  ae: the autoencoder.
losses: nano's training.
"""
import random
import shutil
import sys
import tempfile
from pathlib import Path
from textwrap import fill

import numpy as np
from PIL import Image

from checker import judge, load_checker, look
from common import ROOT, UserError, friendly
from decoder import load_autoencoder
from evaluate import evaluate, parse_evaluation
from lab import tables
from lab.compare import draw_prompts
from lab.tables import BASE, FAST, RESULTS, runs_of
from plots import BLUE, ORANGE, grid, losses
from scenes import CATEGORIES, Scenes
from train_decoder import recon_picture, reconstruct
from wording import wide

DOCS = ROOT / "docs"
STEPS = {BASE: (1, 2, 4, 28), FAST: (1, 2, 4)}
PROMPTS = (     # of the six categories; all but the plain noun were never trained on
    "a shoe against a red wall", "a penguin and a clock on the beach", "2 cats", "a white rocket",
    "a carrot to the right of the mug", "a green tractor and a red elephant")

TYPED = (
    "a red car", "two kittens beside a house", "three blue foxes left of a crown on the beach",
    "a guitar that is purple", "hey, could you draw a frog? make it blue",
    "a car, a tree and a cat", "on the left a dog, on the right a panda",
    "crimson automobile in the snow", "4 snails at night", "a teapot on top of a book",
    "an orange tractor and a pink cupcake",
    "penguin under an umbrella")

def show(ax, picture, title="", label=""):
    ax.imshow(picture, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)
    ax.set_ylabel(fill(label, 20), fontsize=9, rotation=0, ha="right", va="center")
    for side in ax.spines.values():
        side.set_visible(False)

def draw_samples(folder: Path):
    """What `python sample.py PROMPT` draws, each with seed 0."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots(2, 6).flat
    pictures = draw_prompts(FAST, TYPED, seeds=[0] * len(TYPED))
    for ax, picture, prompt in zip(axes, pictures, TYPED):
        show(ax, picture, fill(prompt, 22))
    figure.savefig(folder / "samples.png", dpi=100)

def draw_steps(folder: Path):
    """Rows: prompts. Columns: both models, and their steps. Below: their scores."""
    from matplotlib.figure import Figure
    columns = [(ckpt, steps) for ckpt in (BASE, FAST) for steps in STEPS[ckpt]]
    figure = Figure(figsize=(10, 9.2), layout="constrained")
    top, below = figure.subfigures(2, 1, height_ratios=(3, 1))
    axes = top.subplots(len(PROMPTS), len(columns))
    for column, (ckpt, steps) in enumerate(columns):
        name = "base" if ckpt == BASE else "distilled"
        for row, picture in enumerate(draw_prompts(ckpt, PROMPTS, steps)):
            title = f"{name}\n{steps} step{'s' * (steps > 1)}" if row == 0 else ""
            show(axes[row, column], picture, title, "" if column else PROMPTS[row])
    ax = below.subplots()
    for ckpt, label, colour in ((BASE, "base, guidance 4", ORANGE),
                                (FAST, "distilled, no guidance", BLUE)):
        runs = sorted(runs_of(RESULTS, ckpt).items())
        scores = [run["scores"]["mean"] for _, run in runs]
        means = [score["score"] for score in scores]
        errors = [[mean - score["low"] for mean, score in zip(means, scores)],
                  [score["high"] - mean for mean, score in zip(means, scores)]]
        ax.errorbar([steps for steps, _ in runs], means, errors, fmt=".-", color=colour,
                    label=label, capsize=3)
    ax.set_xscale("log", base=2)
    ax.set_xticks(STEPS[BASE], STEPS[BASE])
    ax.set(xlabel="steps", ylabel="score (95 %)", ylim=(0, 1))
    ax.legend(frameon=False, loc="lower right")
    ax.grid(alpha=0.25)
    figure.savefig(folder / "steps.png", dpi=80)

def draw_score(folder: Path):
    """evaluate.py's contact sheet: green frames are right, red ones wrong, and what was seen."""
    with tempfile.TemporaryDirectory() as out:
        words = ["--ckpt", FAST, "--prompts", "10", "--each", "1", "--out", out]
        evaluate(parse_evaluation(words))
        shutil.copy(Path(out) / "score.png", folder / "score.png")

def draw_failures(folder: Path):
    """The first pictures that `fast` gets wrong in free English, and what the detector says."""
    source = Scenes(256, "test", seed=9, layout="free")
    scenes = [source.scene(i, kind) for i in range(24) for kind in (*CATEGORIES, "three")]
    prompts = [wide(scene, random.Random(i)) for i, scene in enumerate(scenes)]
    pictures = draw_prompts(FAST, prompts)
    seen, _ = look(load_checker(), pictures)
    judged = zip(pictures, prompts, map(judge, scenes, seen))
    wrong = [(picture, f"{said} [{trouble}]") for picture, said, trouble in judged if trouble]
    pictures, captions = zip(*wrong[:18])
    small = [np.asarray(Image.fromarray(picture).resize((160, 160))) for picture in pictures]
    grid(small, captions, 6).save(folder / "failures.png")
    print(f"{len(wrong)} of {len(scenes)} wrong")

def draw_autoencoder(folder: Path):
    """Input, output and their difference x 4, of held-out scenes."""
    pairs = reconstruct(load_autoencoder("assets/ae"), 256, 6)[1]
    recon_picture(pairs).save(folder / "ae.png")

def draw_losses(folder: Path):
    losses(DOCS / "nano_log.csv", folder / "nano_loss.png")

FIGURES = {"samples": draw_samples, "steps": draw_steps, "score": draw_score,
           "failures": draw_failures, "ae": draw_autoencoder, "losses": draw_losses}

def main(argv):
    for name in argv:
        if name not in FIGURES:
            raise UserError(f"no figure '{name}': there are {', '.join(FIGURES)}")
    for name in argv or FIGURES:
        FIGURES[name](DOCS)
        print(f"docs: {name}", flush=True)
    if not argv:
        tables.main()

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
