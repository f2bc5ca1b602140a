"""Pictures about a run: sheets of pictures with captions, and charts of its log.csv."""
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from common import UserError, read_log

BLUE, ORANGE, GREEN, GREY = "#2a6fdb", "#e07b22", "#3d9a4a", "#a8a8a8"
COLOURS = (BLUE, ORANGE, GREEN, "#8a4fbf", "#c2384e", "#1b9aaa", "#7a5c3e", GREY)
BINS = 8        # of t, in the log of distill.py

def grid(pictures, captions=(), columns: int = 0, scale: int = 1) -> Image.Image:
    """A sheet of uint8 pictures (H, W, 3), each with at most three lines of caption below it."""
    columns = columns or min(len(pictures), max(1, round(len(pictures) ** 0.5)))
    rows = -(-len(pictures) // columns)
    h, w = pictures[0].shape[0] * scale, pictures[0].shape[1] * scale
    wrapped = [wrap(caption, max(8, w // 6))[:3] for caption in captions]     # 6 pixels a letter
    line, border = 13, 4
    cell_w, cell_h = w + border, h + line * max(map(len, wrapped), default=0) + border
    sheet = Image.new("RGB", (columns * cell_w + border, rows * cell_h + border), "white")
    draw = ImageDraw.Draw(sheet)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    for k, picture in enumerate(pictures):
        x, y = border + k % columns * cell_w, border + k // columns * cell_h
        sheet.paste(Image.fromarray(picture).resize((w, h), resample), (x, y))
        for n, text in enumerate(wrapped[k] if wrapped else ()):
            draw.text((x, y + h + line * n), text, fill=(40, 40, 40))
    return sheet

class Line(NamedTuple):
    label: str
    colour: str
    points: list[tuple]         # (x, y); those that are not finite are left out

class Panel(NamedTuple):
    title: str
    x_label: str
    lines: list[Line]
    log: bool = True            # a logarithmic vertical axis, on which 0 and less have no place

def chart(panels: list[Panel], out):
    """Saves the panels, at most three side by side."""
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure in a global list
    from matplotlib.ticker import LogLocator
    rows = -(-len(panels) // 3)
    columns = -(-len(panels) // rows)
    figure = Figure(figsize=(6.4 * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes[len(panels):]:
        ax.set_visible(False)
    for ax, panel in zip(axes, panels):
        for line in panel.lines:
            points = [p for p in line.points if np.isfinite(p[1]) and (p[1] > 0 or not panel.log)]
            if points:
                x, y = zip(*points, strict=True)
                ax.plot(x, y, ".-", markersize=3, color=line.colour, label=line.label)
        if panel.log:
            ax.set_yscale("log", subs=[])
            ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        ax.legend(handles=ax.lines, frameon=False)
        ax.set(title=panel.title, xlabel=panel.x_label)
        ax.grid(alpha=0.25)
    figure.savefig(out, dpi=110)

def series(rows: list[dict], key: str) -> list[tuple]:
    """(step, value) for each row of a log that has a value under that key."""
    return [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]

def losses(csv, out):
    """loss.png: the training loss and the averaged weights' loss on held-out pictures."""
    rows = read_log(csv)
    lines = [Line("training", GREY, series(rows, "loss")),
             Line("held out, averaged weights", BLUE, series(rows, "val"))]
    chart([Panel("loss", "step", lines)], out)

def bin_means(rows: list[dict], name: str) -> list[tuple]:
    """(middle of the bin, mean over the rows); nan for a bin into which no picture fell."""
    means = []
    for b in range(BINS):
        values = [v for _, v in series(rows, f"{name}{b}") if np.isfinite(v)]
        means.append(((b + 0.5) / BINS, np.mean(values) if values else np.nan))
    return means

def scaling(run):
    """RUN/scaling.png: losses in bins of t over the last half of the run, before and after scaling.
    Prints the same numbers. UserError where the log is not that of a distillation."""
    rows = [row for row in read_log(Path(run) / "log.csv") if row.get("bin_task_scaled0")]
    if not rows:
        raise UserError(f"{run}/log.csv has no distillation losses: give a run with kd or featkd")
    rows = rows[len(rows) // 2:]
    print(f"{run}/scaling.png, the last {len(rows)} log lines; means per bin of t:")
    panels = []
    for suffix, title in (("", "losses as they are"), ("_scaled", "losses as they enter S")):
        lines = []
        for name, colour in (("task", BLUE), ("kd", ORANGE), ("feat", GREEN)):
            means = bin_means(rows, f"bin_{name}{suffix}")
            if np.isfinite([mean for _, mean in means]).any():
                print(f"{name + suffix:12} " + " ".join(f"{mean:.4f}" for _, mean in means))
                lines.append(Line(f"L_{name}", colour, means))
        panels.append(Panel(title, "t: 0 is the picture, 1 is noise", lines))
    chart(panels, Path(run) / "scaling.png")

def health(csv, out):
    """health.png: the predictions beside real pictures; where there is a discriminator, its
    answers, its share of right ones at each tap, its loss by t', and how much it pulls."""
    rows = read_log(csv)
    real = dict(series(rows, "real_std"))
    deviation = [(step, v / real[step]) for step, v in series(rows, "pixel_std") if real.get(step)]
    spreads = [Line("spread between captions", BLUE, series(rows, "spread")),
               Line("deviation of the pixels", ORANGE, deviation)]
    panels = [Panel("predictions, relative to real pictures", "step", spreads, log=False)]
    if series(rows, "d_loss"):
        answers = [Line("D(real)", BLUE, series(rows, "d_real")),
                   Line("D(fake)", ORANGE, series(rows, "d_fake")),
                   Line("accuracy", GREY, series(rows, "accuracy"))]
        taps = [key for key in rows[0] if key.startswith("accuracy_")]
        right = [Line(key.removeprefix("accuracy_"), COLOURS[i % len(COLOURS)], series(rows, key))
                 for i, key in enumerate(taps)]
        by_time = [Line("last half of the run", BLUE, bin_means(rows[len(rows) // 2:], "bin_d"))]
        pulls = [Line("of L_kd's", BLUE, series(rows, "pull_ratio"))]
        panels += [Panel("discriminator's answers", "step", answers, log=False),
                   Panel("its share of right answers, by tap", "step", right, log=False),
                   Panel("its loss", "t': 0 is the picture, 1 is noise", by_time, log=False),
                   Panel("its pull on the prediction", "step", pulls, log=False)]
    chart(panels, out)
