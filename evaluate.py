"""Scores a text-to-picture checkpoint on held-out scenes, and measures its Frechet distance.

    python evaluate.py --ckpt DIR [--steps 28] [--cfg 4]     DIR/score.json and DIR/score.png
    python evaluate.py --ckpt DIR --wording wide             prompts in free English
    python evaluate.py --ckpt DIR --fd 5000                  Frechet distance, precision and recall
    python evaluate.py --coreml BUNDLE --prompts 20 --each 1                 the files that ship

As in GenEval, a detector (checker.py) looks for what each prompt asks for. Beside the score: the
stricter `exact` (nothing else may be in the picture), the ceilings of both (the same check on real
renders), and the floor (against another prompt's scene). "three" things are a seventh category,
which the mean leaves out, so that scores compare with older ones. `rights` in score.json are the
shares of right pictures of each prompt: lab.tables compares two runs by them, prompt by prompt.

N M pictures | F features of each
"""
import argparse
import importlib.util
import math
import random
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from checker import ceiling, judge, load_checker, look
from checkpoint import resolve
from common import UserError, autocast, friendly, json_text, provenance, setup, use_bfloat16
from decoder import autoencoder_of
from model import load_model
from plots import grid
from sample import SAMPLERS, generate, sampling
from scenes import CATEGORIES, Scene, Scenes
from wording import wide

def frechet(a, b) -> float:
    """Distance of Gaussians fitted to features (N, F) and (M, F) (Heusel et al. 2017, eq. 6)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()                             # (F, F)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T         # of cov_a
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * cross)

def precision_recall(real, fake, k=3) -> tuple[float, float]:
    """Shares of fakes within a real one's k-th neighbour's radius, and the reverse. Features
    (N, F) and (M, F), N and M above k (Kynkäänniemi et al. 2019, section 3)."""
    def covered(points, by):
        # k + 1, because each picture is its own nearest
        radii = torch.cat([torch.cdist(x, by).kthvalue(k + 1).values for x in by.split(500)])
        near = [(torch.cdist(x, by) <= radii).any(1) for x in points.split(500)]
        return float(torch.cat(near).double().mean())
    return covered(fake, real), covered(real, fake)

def inception_fid(real, fake, device) -> float | None:
    """The usual FID, on InceptionV3; None where torch-fidelity or its weights are not here."""
    weights = Path(torch.hub.get_dir()) / "checkpoints/weights-inception-2015-12-05-6726825d.pth"
    if not weights.exists() or importlib.util.find_spec("torch_fidelity") is None:
        return None
    from torch_fidelity import calculate_metrics
    sets = []
    for pictures in (fake, real):
        tensors = [torch.tensor(p).permute(2, 0, 1) for p in pictures]      # (3, H, W), uint8
        sets.append(torch.utils.data.Subset(tensors, range(len(tensors))))
    measured = calculate_metrics(input1=sets[0], input2=sets[1], fid=True, save_cpu_ram=True,
                                 cuda=device.type == "cuda", verbose=False)
    return measured["frechet_inception_distance"]

@torch.no_grad()
def latents_health(x0, real, ae, batch: int = 64) -> dict:
    """Numbers of predicted latents (B, C, H, W) beside real ones, decoded `batch` at a time."""
    pixels = torch.cat([ae.decode(z) for z in x0.float().split(batch)])             # (B, 3, 8H, 8W)
    theirs = torch.cat([ae.decode(z) for z in real.float().split(batch)])
    values = {
        "latent_mean": x0.mean(), "latent_std": x0.std(),
        "spread": x0.std(0).mean() / real.std(0).mean(),    # how far apart pictures are
        "pixel_mean": pixels.mean(), "pixel_std": pixels.std(),
        "real_mean": theirs.mean(), "real_std": theirs.std(),
    }
    return {k: float(v) for k, v in values.items()}

def health_warnings(h: dict) -> list[str]:
    """What latents_health() says is wrong with a student's pictures, a line each."""
    lines = []
    if h["spread"] < 0.5:
        lines.append(f"collapse: captions' pictures are alike, with {h['spread']:.2f} of real "
                     "ones' spread; lower gan_weight or lr, or raise r1 or kd_weight")
    if h["pixel_std"] > 1.3 * h["real_std"]:
        lines.append(f"oversaturation: the pixels' deviation is {h['pixel_std']:.2f}, real ones "
                     f"have {h['real_std']:.2f}; lower teacher_cfg or gan_weight")
    if abs(h["pixel_mean"] - h["real_mean"]) > 0.3 * h["real_std"]:
        lines.append(f"drift: the pixels' mean is {h['pixel_mean']:.2f}, real ones have "
                     f"{h['real_mean']:.2f}; lower lr or gan_weight, or raise kd_weight")
    return lines

def summary(rights: list, shuffled) -> dict:
    """Mean over `rights`, (prompts, pictures) each, and its 95 % interval by resampling prompts.
    shuffled: shares that are right against another prompt's scene."""
    rng = np.random.default_rng(0)
    means = [r.mean(1)[rng.integers(0, len(r), (2000, len(r)))].mean(1) for r in rights]
    low, high = map(float, np.percentile(np.mean(means, 0), (2.5, 97.5)))
    mean = float(np.mean([r.mean() for r in rights]))
    return {"score": mean, "low": low, "high": high, "shuffled": float(np.mean(shuffled))}

def score(pictures, scenes: list[Scene], checker, each: int):
    """`each` pictures a scene, in order -> ({category or "mean": row}, {category: share of right
    pictures of each scene}, verdicts, confusions)."""
    seen, _ = look(checker, pictures)
    asked = [scene for scene in scenes for _ in range(each)]
    verdicts = list(map(judge, asked, seen))
    exact = [judge(scene, objects, exact=True) for scene, objects in zip(asked, seen)]
    scores, confusions, rights, exacts = {}, {}, {}, {}
    for category in dict.fromkeys(scene.category for scene in scenes):
        index = [i for i, scene in enumerate(asked) if scene.category == category]
        rights[category] = right_of(verdicts, index, each)
        exacts[category] = right_of(exact, index, each)
        # each picture against the next prompt: a check that cannot fail is worth nothing
        moved = [asked[i] for i in index[each:] + index[:each]]
        shuffled = [judge(scene, seen[i]) == "" for i, scene in zip(index, moved, strict=True)]
        scores[category] = both_scores([rights[category]], [exacts[category]], shuffled)
        confusions[category] = Counter(filter(None, (verdicts[i] for i in index))).most_common(8)
    six = [category for category in scores if category != "three"]
    scores["mean"] = both_scores([rights[c] for c in six], [exacts[c] for c in six],
                                 [scores[c]["shuffled"] for c in six])
    confusions["mean"] = []
    shares = {category: r.mean(1).round(4).tolist() for category, r in rights.items()}
    return scores, shares, verdicts, confusions

def right_of(verdicts, index, each: int):
    return np.array([verdicts[i] == "" for i in index], float).reshape(-1, each)

def both_scores(rights, exacts, shuffled) -> dict:
    strict = summary(exacts, shuffled)
    strict = {"exact": strict["score"], "exact_low": strict["low"], "exact_high": strict["high"]}
    return summary(rights, shuffled) | strict

def contact_sheet(pictures, captions, verdicts, prompts, each):
    """The first prompts' first pictures, a row a category, framed green (right) or red (wrong)."""
    columns = min(12, prompts)
    framed, words = [], []
    for first in range(0, len(pictures), prompts * each):
        for i in range(first, first + columns * each, each):
            picture = Image.fromarray(pictures[i]).resize((128, 128), Image.Resampling.NEAREST)
            colour = (210, 40, 40) if verdicts[i] else (40, 170, 60)
            ImageDraw.Draw(picture).rectangle((0, 0, 127, 127), outline=colour, width=4)
            framed.append(np.asarray(picture))
            words.append(captions[i] + (f" [{verdicts[i]}]" if verdicts[i] else ""))
    return grid(framed, words, columns)

def evaluate(a):
    device, _, _ = setup(a.device)
    folder = Path(a.out or a.coreml or resolve(a.ckpt))
    folder.mkdir(parents=True, exist_ok=True)       # now, not after all pictures are drawn
    checker = load_checker(a.checker, device)
    if a.coreml:
        from coreml.bundle import load_bundle
        net = ae = load_bundle(a.coreml)
        config = net.config
    else:
        net, config = load_model(a.ckpt, device)
        ae = autoencoder_of(config, a.ae, device)
    data = config["data"]
    source = partial(Scenes, data["size"], "test", nouns=data["nouns"], layout=data["layout"])
    if not (a.old and data["old"]):
        source = partial(source, atlas=data["atlas"], old=data["old"])
    test = source(seed=9)
    if unknown := set(test.nouns) - set(checker.nouns):
        raise UserError(f"{a.checker} does not know {', '.join(sorted(unknown))}: python checker.py"
                        f" init={a.checker} atlas={data['atlas']} steps=600 teaches it; then add "
                        "--checker runs/checker, or --old to score the shipped things alone")
    scenes = [test.scene(i, category) for category in test.categories for i in range(a.prompts)]
    word = wide if a.wording == "wide" else test.caption
    captions = [word(scene, random.Random(i))
                for i, scene in enumerate(scenes) for _ in range(a.each)]
    if hasattr(net, "draw"):                        # a bundle for apps, as they draw it
        how = net.sampling(a.steps, a.cfg, a.sampler)
        draw = partial(net.draw, progress=True, **how)
    else:
        how = sampling(config, a.steps, a.cfg, a.sampler)
        draw = partial(generate, net, ae, size=data["size"], batch=a.batch, progress=True, **how)
    begin = time.time()
    quick = not a.coreml and use_bfloat16("auto", device)   # 48 dB from fp32, twice as fast
    with autocast(device, quick):
        pictures = draw(captions, range(len(captions)))
    seconds = (time.time() - begin) / len(pictures)
    scores, rights, verdicts, confusions = score(pictures, scenes, checker, a.each)
    top, exact_top = ceiling(checker, source(seed=5))
    for shares in top, exact_top:
        shares["mean"] = float(np.mean([shares[category] for category in CATEGORIES]))
    result = {
        "ckpt": a.coreml or a.ckpt, "step": config.get("step"), "steps": len(how["steps"]) - 1,
        "cfg": how["cfg"], "sampler": how["sampler"], "wording": a.wording,
        "nouns": len(test.nouns), "layout": test.layout, "prompts": a.prompts, "each": a.each,
        "seconds": seconds, "scores": scores, "ceiling": top, "exact_ceiling": exact_top,
        "confusions": confusions, "rights": rights,
    } | provenance()
    print_table(result)
    if a.fd:
        result |= distances(draw, checker, source(seed=11), a.fd)
    (folder / "score.json").write_text(json_text(result), "utf-8")
    contact_sheet(pictures, captions, verdicts, a.prompts, a.each).save(folder / "score.png")
    print(f"\n{folder}/score.json, {folder}/score.png")

def print_table(result: dict):
    print("{ckpt}, {steps} steps, {sampler}, cfg {cfg:g}: {prompts} {wording} prompts a category, "
          "{each} pictures each, {seconds:.3f} s a picture\n".format(**result))
    print(f"{'category':12} {'score':>6}  {'95 %':13} {'ceiling':>7} {'exact':>6}  {'95 %':13} "
          f"{'ceiling':>7} {'shuffled':>8}  mistakes")
    for category, row in result["scores"].items():
        wrong = "; ".join(f"{what} ({n})" for what, n in result["confusions"][category][:3])
        print(f"{category:12} {row['score']:6.3f}  {row['low']:.3f} - {row['high']:.3f} "
              f"{result['ceiling'][category]:7.3f} {row['exact']:6.3f}  {row['exact_low']:.3f} - "
              f"{row['exact_high']:.3f} {result['exact_ceiling'][category]:7.3f} "
              f"{row['shuffled']:8.3f}  {wrong}")

def distances(draw, checker, plain: Scenes, n: int) -> dict:
    """n pictures against n renders of the same scenes, and, as the floor, n other renders."""
    renders = [plain[i][0] for i in tqdm(range(2 * n), "renders")]
    drawn = draw([plain[i][1] for i in range(n)], range(10**6, 10**6 + n))
    real = look(checker, renders)[1]                                # (2n, F)
    fake = look(checker, drawn)[1]                                  # (n, F)
    precision, recall = precision_recall(real[:n], fake)
    found = {
        "fd": frechet(fake, real[:n]), "fd_floor": frechet(real[n:], real[:n]), "fd_pictures": n,
        "precision": precision, "recall": recall,
        "fid": inception_fid(renders[:n], drawn, checker.head.weight.device),
    }
    print("\nFrechet distance of {fd_pictures} pictures, checker features: {fd:.3f} (renders "
          "against renders {fd_floor:.3f}); precision {precision:.3f}, recall {recall:.3f}\n"
          "FID, where torch-fidelity and its weights are here: {fid}".format(**found))
    return found

def parse_evaluation(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", default="assets/scenes", help="checkpoint or run")
    p.add_argument("--ae", default="", help="autoencoder; default: the checkpoint's own")
    p.add_argument("--coreml", default="", metavar="BUNDLE", help="score it instead of --ckpt")
    p.add_argument("--checker", default="assets/checker")
    p.add_argument("--steps", type=int, help="default: the checkpoint's few_steps, else 28")
    p.add_argument("--cfg", type=float, help="guidance; default: few_steps', else 4")
    p.add_argument("--sampler", choices=[*SAMPLERS, "pndm"],
                   help="default: few_steps', else dpmpp; pndm: of bundles for apps")
    p.add_argument("--prompts", type=int, default=60, help="a category")
    p.add_argument("--each", type=int, default=4, help="pictures a prompt")
    p.add_argument("--wording", choices=("own", "wide"), default="own",
                   help="the grammar's own words, or free English (wording.py)")
    p.add_argument("--old", action="store_true",
                   help="prompts without the things that data.atlas added, as ever")
    p.add_argument("--fd", type=int, default=0, help="pictures for the Frechet distance")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--out", default="", help="folder of score.json and score.png; default: --ckpt")
    p.add_argument("--device", default="auto")
    a = p.parse_args(argv)
    for name in ("steps", "prompts", "each", "batch"):
        value, most = getattr(a, name), 1000 if name == "steps" else 100000
        if value is not None and not 1 <= value <= most:
            raise UserError(f"--{name} wants 1 to {most}, got {value}")
    if a.fd != 0 and not 4 <= a.fd <= 10**6:
        raise UserError(f"--fd wants 0 (none) or 4 to a million pictures, got {a.fd}")
    if a.cfg is not None and not math.isfinite(a.cfg):
        raise UserError(f"--cfg must be a finite number, got {a.cfg}")
    return a

if __name__ == "__main__":
    with friendly():
        evaluate(parse_evaluation(sys.argv[1:]))
