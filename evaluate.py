"""Scores a text-to-picture checkpoint on scenes: GenEval's six categories by a small detector, and the Frechet distance on its features.

    python evaluate.py --train-checker [key=value]            the detector, on renders alone (never on generated pictures)
    python evaluate.py --ckpt DIR [--steps 28] [--cfg 4]      score, intervals, confusions: DIR/score.json and DIR/score.png
    python evaluate.py --ckpt DIR --fd 5000                   Frechet distance, precision and recall as well
    python evaluate.py --ckpt DIR --prompts 8 --each 1 --sheet out.png              only the pictures, to judge by eye
    python evaluate.py --ckpt DIR --geneval evaluation_metadata.jsonl --out DIR     pictures as GenEval's own evaluator reads them
    python evaluate.py --ckpt DIR --dpg prompts/ --out DIR                          and as DPG-Bench's (a folder of ID.txt)
    python evaluate.py --versus DIR_A DIR_B --out compare.html                      a blind comparison by people, one static page
    python evaluate.py --figure BASE FAST --out steps.png                           two checkpoints at 1, 2, 4, 8 and 28 steps, and their scores against steps

Beside every score stand its ceiling (the same check on real held-out renders) and its floor (pictures against another prompt's scene).
N pictures | F features
"""
import argparse, base64, importlib.util, io, json, random, sys, time, zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from checker import CheckerConfig, ceiling, judge, load_checker, look, train_checker
from checkpoint import resolve
from common import ASSETS, ROOT, UserError, fill, friendly, provenance, read_config, setup
from data import CATEGORIES, DataConfig, Scene, Scenes, grid
from decoder import load_autoencoder
from plots import chart
from sample import SAMPLERS, Bundle, generate, load_model, settings
from train import Config, shown_prompts

# ---------------------------------------------------------------------------- distances between sets of pictures
def frechet(a, b) -> float:
    """Frechet distance between Gaussians fitted to features (N, F) and (M, F) (Heusel et al. 2017), in float64."""
    a, b = a.double(), b.double()
    ca, cb = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                 # (F, F)
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()   # the trace of (ca cb)^1/2
    return float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross)


def precision_recall(real, fake, k=3) -> tuple[float, float]:
    """Share of fakes within a real picture's k-th neighbour's radius, and the reverse (Kynkäänniemi et al. 2019)."""
    def covered(points, by):
        radius = torch.cat([torch.cdist(x, by).kthvalue(k + 1).values for x in by.split(500)])  # itself is the first
        return float(torch.cat([(torch.cdist(x, by) <= radius).any(1) for x in points.split(500)]).double().mean())
    return covered(fake, real), covered(real, fake)


def inception_fid(real, fake, device):
    """The usual FID on InceptionV3's features, where torch-fidelity and its weights lie on this disk; else None. uint8 pictures (H, W, 3)."""
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    if not weights.exists() or importlib.util.find_spec("torch_fidelity") is None:
        return None
    from torch_fidelity import calculate_metrics
    class Pictures(torch.utils.data.Dataset):
        def __init__(self, pictures): self.pictures = pictures
        def __len__(self): return len(self.pictures)
        def __getitem__(self, i): return torch.from_numpy(np.array(self.pictures[i])).permute(2, 0, 1)     # (3, H, W)
    return float(calculate_metrics(input1=Pictures(fake), input2=Pictures(real), fid=True, cuda=device.type == "cuda", save_cpu_ram=True, verbose=False)["frechet_inception_distance"])


# ---------------------------------------------------------------------------- the score
def interval(*rights, seed=0, n=2000):
    """95 % of the mean of right (prompts, pictures) under resampling of prompts; of several categories' mean where several are given."""
    rng = np.random.default_rng(seed)
    means = [right.mean(1)[rng.integers(0, len(right), (n, len(right)))].mean(1) for right in rights]
    return [float(v) for v in np.percentile(np.mean(means, 0), (2.5, 97.5))]


def score(pictures, scenes: list[Scene], checker, each: int):
    """`each` pictures a scene, in order. Returns ({category or "mean": {score, low, high, shuffled}}, verdicts, confusions)."""
    seen, _ = look(checker, pictures)
    asked = [s for s in scenes for _ in range(each)]
    verdicts, out, confusions, rights = [judge(s, o) for s, o in zip(asked, seen)], {}, {}, []
    for category in dict.fromkeys(s.category for s in scenes):
        index = [i for i, s in enumerate(asked) if s.category == category]
        right = np.array([verdicts[i] == "" for i in index], float).reshape(-1, each)
        moved = index[each:] + index[:each]                 # each picture against the next prompt: a check that cannot fail is none
        low, high = interval(right)
        rights.append(right)
        out[category] = {"score": float(right.mean()), "low": low, "high": high, "shuffled": float(np.mean([judge(asked[j], seen[i]) == "" for i, j in zip(index, moved)]))}
        confusions[category] = Counter(verdicts[i] for i in index if verdicts[i]).most_common(8)
    low, high = interval(*rights)
    out["mean"] = {"score": float(np.mean([r["score"] for r in out.values()])), "low": low, "high": high, "shuffled": float(np.mean([r["shuffled"] for r in out.values()]))}
    return out, verdicts, confusions


def benchmark_folder(a):
    """The folders that the official evaluators read. GenEval: OUT/00000/metadata.jsonl (the prompt's own line) and OUT/00000/samples/00000.png ...
    DPG-Bench: OUT/ID.png, four pictures as two rows of two; give its script --resolution (the size) and --pic-num 4. What is there is kept."""
    out = Path(a.out or f"runs/{'geneval' if a.geneval else 'dpg'}")
    source, jobs = Path(a.geneval or a.dpg), []             # (prompt, where its pictures go, metadata)
    if a.geneval:
        try:
            lines = [json.loads(line) for line in source.read_text().splitlines() if line.strip()]
            jobs = [(line["prompt"], out / f"{i:05d}", line) for i, line in enumerate(lines)]
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as e:
            raise UserError(f"{source} is not GenEval's prompts/evaluation_metadata.jsonl ({e!r}): one JSON object with a 'prompt' in each line")
    else:
        jobs = [(p.read_text().strip(), out / f"{p.stem}.png", None) for p in sorted(source.glob("*.txt"))]
    if not jobs:
        raise UserError(f"no prompts in {source}: DPG-Bench's are a folder of ID.txt")
    device, _, _ = setup(a.device)
    (net, config), ae, each = load_model(a.ckpt, device), load_autoencoder(a.ae, device), 4
    how = settings(config, a.steps, a.cfg, a.sampler)
    for k, (prompt, place, line) in enumerate(tqdm(jobs, unit="prompt")):
        if (place / f"samples/{each - 1:05d}.png").exists() or place.is_file():
            continue
        pictures = generate(net, ae, [prompt] * each, range(k * each, (k + 1) * each), config["data"]["size"], **how)
        if line is not None:
            (place / "samples").mkdir(parents=True, exist_ok=True)
            (place / "metadata.jsonl").write_text(json.dumps(line))
            for i, picture in enumerate(pictures):
                Image.fromarray(picture).save(place / f"samples/{i:05d}.png")
        else:
            out.mkdir(parents=True, exist_ok=True)
            tmp = place.with_suffix(".tmp")                 # a half-written picture must not be kept
            Image.fromarray(np.concatenate([np.concatenate(pictures[:2], 1), np.concatenate(pictures[2:], 1)])).save(tmp, "png")
            tmp.rename(place)
    print(f"{out}: {len(jobs)} prompts, {each} pictures each, of {config['data']['size']} px")


def versus(a):
    """One page that shows pairs of pictures of held-out prompts, unlabelled and shuffled; it counts what a person prefers."""
    device, _, _ = setup(a.device)
    ae, drawn = load_autoencoder(a.ae, device), []
    first = load_model(a.versus[0], device)[1]["data"]
    test = Scenes(first["size"], "test", seed=13, nouns=first["nouns"], layout=first["layout"], atlas=first["atlas"])
    captions = [test.caption(test.scene(i, c), random.Random(i)) for i in range(a.prompts) for c in CATEGORIES]
    for path in a.versus:
        net, config = load_model(path, device)
        drawn.append(generate(net, ae, captions, range(len(captions)), config["data"]["size"], **settings(config, a.steps, a.cfg, a.sampler), batch=a.batch, progress=True))

    def url(picture):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "png")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    rng, pairs = random.Random(0), []
    for caption, one, other in zip(captions, *drawn):
        flip = rng.random() < 0.5
        pairs.append({"prompt": caption, "left": url(other if flip else one), "right": url(one if flip else other), "flip": flip})
    rng.shuffle(pairs)
    data = json.dumps({"id": f"{zlib.crc32(json.dumps(pairs).encode()):08x}", "a": str(a.versus[0]), "b": str(a.versus[1]), "pairs": pairs}).replace("</", "<\\/")
    out = Path(a.out or "compare.html")
    try:
        out.write_text((ASSETS / "compare.html").read_text().replace("/*DATA*/null", data))
    except OSError as e:
        raise UserError(f"cannot write {out}: {e}")
    print(f"{out}: {len(pairs)} pairs; open it in a browser")


def scores_of(path: str) -> dict:
    """{steps: mean score} of the score.json files below a checkpoint and of those in docs/results that name it; the best, where there are several."""
    scores, folder = {}, Path(path) if Path(path).is_dir() else ROOT / path
    theirs = [r for r in (json.loads(p.read_text()) for p in (ROOT / "docs/results").glob("*/score.json")) if r["ckpt"] == path]
    for r in theirs + [json.loads(p.read_text()) for p in folder.rglob("score.json")]:
        scores[r["steps"]] = max(scores.get(r["steps"], 0.01), r["scores"]["mean"]["score"])
    return scores


def figure(a):
    """Rows of prompts, columns of steps: the base student with its guidance above, the distilled one below; and the curve of their scores, such as
    `python evaluate.py --ckpt DIR --steps 4 --out DIR/steps4` leaves."""
    columns, cells, words, lines, prompts = (1, 2, 4, 8, 28), [], [], [], []
    device, _, _ = setup(a.device)
    ae = load_autoencoder(a.ae, device)
    for path, colour in zip(a.figure, ((220, 110, 30), (40, 90, 220))):
        net, config = load_model(path, device)
        prompts = prompts or shown_prompts(Config(data=fill(DataConfig(), config["data"], path)))[:6]      # one a category
        drawn = [generate(net, ae, prompts, range(6), config["data"]["size"], **settings(config, n)) for n in columns]
        cells += [pictures[i] for i in range(6) for pictures in drawn]
        words += [f"{n} steps, {'base' if not lines else 'distilled'}: {p}" for p in prompts for n in columns]
        scores = scores_of(path)
        lines.append(([(i, scores[n]) for i, n in enumerate(columns) if n in scores], colour))
        print(f"{path}: " + (", ".join(f"{n} steps {s:.3f}" for n, s in sorted(scores.items())) or f"no scores there: python evaluate.py --ckpt {path} --steps 4 --out {path}/steps4, and so on"))
    sheet, curve = grid(cells, words, len(columns), max(1, 128 // cells[0].shape[0])), chart(lines, f"score at {', '.join(map(str, columns))} steps; orange: base, blue: distilled")
    whole = Image.new("RGB", (max(sheet.width, curve.width if curve else 0), sheet.height + (curve.height if curve else 0)), (255, 255, 255))
    for picture, y in ((sheet, 0), (curve, sheet.height)):
        if picture:
            whole.paste(picture, (0, y))
    try:
        whole.save(out := a.out or "steps.png")
    except (OSError, ValueError) as e:
        raise UserError(f"cannot write {out}: {e}")
    print(f"{out}: {a.figure[0]} above, {a.figure[1]} below")


def evaluate(a):
    device, _, _ = setup(a.device)
    checker = None if a.sheet else load_checker(a.checker, device)
    if a.coreml:
        net = ae = Bundle(a.coreml)
        config, a.ckpt = net.config, a.coreml
    else:
        (net, config), ae = load_model(a.ckpt, device), load_autoencoder(a.ae, device)
    how, d = settings(config, a.steps, a.cfg, a.sampler), config["data"]
    steps, cfg, sampler = len(how["steps"]) - 1, how["cfg"], how["sampler"]
    test = Scenes(d["size"], "test", seed=9, nouns=d["nouns"], layout=d["layout"], atlas=d["atlas"])
    scenes = [test.scene(i, c) for c in CATEGORIES for i in range(a.prompts)]
    captions = [test.caption(s, random.Random(i)) for i, s in enumerate(scenes) for _ in range(a.each)]
    draw = lambda captions, first: generate(net, ae, captions, range(first, first + len(captions)), d["size"], **how, batch=a.batch, progress=True)
    begin = time.time()
    pictures = draw(captions, 0)
    if a.sheet:
        grid(pictures, captions, a.prompts * a.each, max(1, 128 // d["size"])).save(a.sheet)
        return print(f"{a.sheet}: held-out prompts, a row for each of {', '.join(CATEGORIES)}")
    seconds = (time.time() - begin) / len(pictures)
    result, verdicts, confusions = score(pictures, scenes, checker, a.each)
    top = ceiling(checker, 200, d["size"], d["nouns"], d["layout"])
    top["mean"], confusions["mean"] = float(np.mean(list(top.values()))), []
    print(f"{a.ckpt}, {steps} steps, {sampler}, cfg {cfg:g}: {a.prompts} prompts a category, {a.each} pictures each, {seconds:.3f} s a picture\n")
    print(f"{'category':12} {'score':>6}  {'95 %':13} {'ceiling':>7} {'shuffled':>8}  mistaken most")
    for c, r in result.items():
        print(f"{c:12} {r['score']:6.3f}  {r['low']:.3f} - {r['high']:.3f} {top[c]:7.3f} {r['shuffled']:8.3f}  " + "; ".join(f"{w} ({n})" for w, n in confusions[c][:3]))
    out = {"ckpt": str(a.ckpt), "step": config.get("step"), "steps": steps, "cfg": cfg, "sampler": sampler, "prompts": a.prompts, "each": a.each,
           "seconds": seconds, "scores": result, "ceiling": top, "confusions": confusions, **provenance()}
    if a.fd:
        plain = Scenes(d["size"], "test", seed=11, nouns=d["nouns"], layout=d["layout"], atlas=d["atlas"])
        renders, drawn = [plain[i][0] for i in tqdm(range(2 * a.fd), "renders")], draw([plain[i][1] for i in range(a.fd)], 10**6)
        real, fake = look(checker, renders)[1], look(checker, drawn)[1]
        precision, recall = precision_recall(real[:a.fd], fake)
        out |= {"fd": frechet(fake, real[:a.fd]), "fd_floor": frechet(real[a.fd:], real[:a.fd]), "fd_pictures": a.fd, "precision": precision, "recall": recall,
                "fid": inception_fid(renders[:a.fd], drawn, device)}
        print(f"\nFrechet distance on the checker's features, {a.fd} pictures: {out['fd']:.3f} (renders against renders {out['fd_floor']:.3f}); precision {precision:.3f}, recall {recall:.3f}")
        print("FID on InceptionV3's features: " + (f"{out['fid']:.2f}" if out["fid"] is not None else "not measured (pip install torch-fidelity, and put its weights into torch's hub folder)"))
    folder = Path(a.out or (a.coreml or resolve(a.ckpt)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "score.json").write_text(json.dumps(out, indent=1))
    contact_sheet(pictures, captions, verdicts, a.prompts * a.each, a.each).save(folder / "score.png")
    print(f"\n{folder}/score.json, {folder}/score.png")


def contact_sheet(pictures, captions, verdicts, per_category, each, shown=12):
    """The first picture of the first prompts of each category, framed green where right and red where wrong, with what is wrong."""
    index = [c * per_category + i * each for c in range(len(pictures) // per_category) for i in range(min(shown, per_category // each))]
    framed = []
    for i in index:
        image = Image.fromarray(pictures[i]).resize((128, 128), Image.Resampling.NEAREST)
        ImageDraw.Draw(image).rectangle((0, 0, 127, 127), outline=(210, 40, 40) if verdicts[i] else (40, 170, 60), width=4)
        framed.append(np.asarray(image))
    return grid(framed, [captions[i] + (f" [{verdicts[i]}]" if verdicts[i] else "") for i in index], min(shown, per_category // each))


def main(argv):
    if argv[:1] == ["--train-checker"]:
        return train_checker(read_config(CheckerConfig(), argv[1:]))
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", default="assets/scenes")
    p.add_argument("--ae", default="assets/ae")
    p.add_argument("--coreml", default="", metavar="BUNDLE", help="score this Core ML bundle instead of --ckpt and --ae, picture by picture")
    p.add_argument("--checker", default="assets/checker")
    p.add_argument("--steps", type=int, help="this, --cfg and --sampler: by default what the checkpoint's few_steps say, else 28, 4 and dpmpp")
    p.add_argument("--cfg", type=float)
    p.add_argument("--sampler", choices=SAMPLERS)
    p.add_argument("--prompts", type=int, default=60, help="a category")
    p.add_argument("--each", type=int, default=4, help="pictures a prompt")
    p.add_argument("--fd", type=int, default=0, help="pictures for the Frechet distance; 0 = none")
    p.add_argument("--geneval", default="", help="GenEval's evaluation_metadata.jsonl")
    p.add_argument("--dpg", default="", help="DPG-Bench's folder of prompts")
    p.add_argument("--sheet", default="", help="only draw the pictures into this file, to judge by eye")
    p.add_argument("--versus", nargs=2, default=(), metavar=("A", "B"), help="two checkpoints")
    p.add_argument("--figure", nargs=2, default=(), metavar=("BASE", "FAST"), help="two checkpoints")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--out", default="", help="folder of score.json and score.png; default: the checkpoint's")
    p.add_argument("--device", default="auto")
    a = p.parse_args(argv)
    if min(1 if a.steps is None else a.steps, a.prompts, a.each) < 1:
        raise UserError("--steps, --prompts and --each want 1 or more")
    (figure if a.figure else versus if a.versus else benchmark_folder if a.geneval or a.dpg else evaluate)(a)


if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
