"""Charts of log.csv, drawn with Pillow: loss.png of train.py, scaling.png of distill.py, health.png of adv_distill.py."""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common import UserError, read_log


def chart(lines, note: str, W=640, H=360, M=46):
    """Lines, [(points (x, y), colour)], on a log scale, and a note below; None where there are fewer than two points."""
    points = [p for line, _ in lines for p in line]
    if len(points) < 2:
        return None
    low, high, end = np.log(min(p[1] for p in points)), np.log(max(p[1] for p in points)) + 1e-6, max(p[0] for p in points)
    at = lambda p: (M + (W - 2 * M) * p[0] / end, H - M - (H - 2 * M) * (np.log(p[1]) - low) / (high - low))
    image = Image.new("RGB", (W, H), (255, 255, 255))
    d = ImageDraw.Draw(image)
    for k in range(5):
        value = float(np.exp(low + (high - low) * k / 4))
        y = at((0, value))[1]
        d.line((M, y, W - M, y), (230, 230, 230))
        d.text((6, y - 6), f"{value:.3f}", (90, 90, 90))
    for line, colour in lines:
        d.line([at(p) for p in line], colour, 2)
    d.text((M, H - M + 12), note, (90, 90, 90))
    return image


def losses(csv_path, out):
    """loss.png: training loss (grey), validation of the average (blue)."""
    rows = read_log(csv_path)
    lines = [([(int(r["step"]), float(r[k])) for r in rows if r.get(k) and np.isfinite(float(r[k]))], c) for k, c in (("loss", (170, 170, 170)), ("val", (40, 90, 220)))]
    if image := chart(lines, f"step 0 .. {rows[-1]['step'] if rows else 0}   grey: training loss   blue: held-out loss of the averaged weights"):
        image.save(out)


def side_by_side(charts, out):
    """Two of 480 x 320 in each row; None stays white."""
    image = Image.new("RGB", (960, 320 * -(-len(charts) // 2)), (255, 255, 255))
    for k, c in enumerate(charts):
        if c:
            image.paste(c, (480 * (k % 2), 320 * (k // 2)))
    image.save(out)


def scaling(run):
    """RUN/scaling.png: mean losses in 8 bins of t over the last half of the run, left as they are, right as they enter L."""
    rows = [r for r in read_log(Path(run) / "log.csv") if r.get("bin_task_scaled0")]
    rows, charts = rows[len(rows) // 2:], []
    if not rows:
        raise UserError(f"{run}/log.csv holds no distillation: give a run of distill.py with kd or featkd, after its first log line")
    print(f"{run}/scaling.png, over {len(rows)} log lines; means per bin of t:")
    for suffix, title in (("", "as they are"), ("_scaled", "as they enter L")):
        lines = []
        for name, colour, word in (("task", (40, 90, 220), "blue"), ("kd", (220, 110, 30), "orange"), ("feat", (60, 150, 70), "green")):
            table = np.array([[float(r[f"bin_{name}{suffix}{b}"]) for b in range(8)] for r in rows if r.get(f"bin_{name}{suffix}0")])       # (lines, 8); nan: no picture fell there
            if len(table):
                means = [np.mean(column[np.isfinite(column)]) if np.isfinite(column).any() else np.nan for column in table.T]
                print(f"{name + suffix:12} " + " ".join(f"{v:.4f}" for v in means))
                lines.append(([((b + 0.5) / 8, v) for b, v in enumerate(means) if v > 0], colour))
                title += f"   {word}: L_{name}"
        charts.append(chart(lines, f"t = 0 (picture) .. 1 (noise); {title}", 480, 320))
    side_by_side([c for c in charts if c], Path(run) / "scaling.png")


def health(csv_path, out):
    """health.png: left the discriminator, right the predictions against real pictures."""
    rows = read_log(csv_path)
    line = lambda value, *need: [(int(r["step"]), max(1e-3, value(r))) for r in rows if all(r.get(k) for k in need) and np.isfinite(value(r))]
    number = lambda k: line(lambda r: float(r[k]), k)
    charts = [chart([(number("d_real"), (40, 90, 220)), (number("d_fake"), (220, 110, 30)), (number("accuracy"), (150, 150, 150))], "blue: D(real)  orange: D(fake)  grey: accuracy", 480, 320),
              chart([(number("spread"), (40, 90, 220)), (line(lambda r: float(r["pixel_std"]) / float(r["real_std"]), "pixel_std", "real_std"), (220, 110, 30))],
                    "over real ones: blue spread, orange pixels' deviation", 480, 320)]
    if any(charts):
        side_by_side(charts, out)
