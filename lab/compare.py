"""A blind comparison of two checkpoints by people, in one static page.

    python -m lab.compare assets/scenes assets/fast --out compare.html

The page shows pairs of pictures of held-out prompts, unlabelled and in random order, and counts
what a person prefers (lab/compare.html has the buttons and the tally).
"""
import argparse
import base64
import io
import json
import random
import sys
import zlib
from pathlib import Path

from PIL import Image

from common import ROOT, UserError, friendly, setup
from decoder import load_autoencoder
from model import load_model
from sample import generate, sampling
from scenes import CATEGORIES, Scenes

def held_out_captions(data: dict, prompts: int) -> list[str]:
    """So many captions of each category, of combinations that were never trained on."""
    scenes = Scenes(data["size"], "test", seed=13, nouns=data["nouns"], layout=data["layout"],
                    atlas=data["atlas"])
    return [scenes.caption(scenes.scene(i, category), random.Random(i))
            for i in range(prompts) for category in CATEGORIES]

def data_url(picture) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

def comparison_page(names, captions, first, second) -> str:
    """`flip`: the second checkpoint's picture is on the left."""
    rng, pairs = random.Random(0), []
    for caption, *pictures in zip(captions, first, second):
        flip = rng.random() < 0.5
        left, right = reversed(pictures) if flip else pictures
        pairs.append({"prompt": caption, "left": data_url(left), "right": data_url(right),
                      "flip": flip})
    rng.shuffle(pairs)
    key = f"{zlib.crc32(json.dumps(pairs).encode()):08x}"
    data = json.dumps({"id": key, "a": names[0], "b": names[1], "pairs": pairs})
    page = (ROOT / "lab/compare.html").read_text()
    return page.replace("/*DATA*/null", data.replace("</", "<\\/"))

def main(argv):
    p = argparse.ArgumentParser(prog="python -m lab.compare",
                                description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("checkpoints", nargs=2, metavar="DIR", help="each is sampled as it says")
    p.add_argument("--ae", default="assets/ae")
    p.add_argument("--steps", type=int, help="instead of what each checkpoint says")
    p.add_argument("--prompts", type=int, default=10, help="a category")
    p.add_argument("--out", default="compare.html")
    p.add_argument("--device", default="auto")
    args = p.parse_args(argv)
    if args.prompts < 1:
        raise UserError("--prompts is 1 or more")
    device = setup(args.device)[0]
    models = [load_model(path, device) for path in args.checkpoints]
    ae = load_autoencoder(args.ae, device)
    captions = held_out_captions(models[0][1]["data"], args.prompts)
    drawn = []
    for net, config in models:
        how = sampling(config, args.steps)
        drawn.append(generate(net, ae, captions, range(len(captions)), config["data"]["size"],
                              **how, progress=True))
    page = comparison_page(args.checkpoints, captions, *drawn)
    try:
        Path(args.out).write_text(page)
    except OSError as e:
        raise UserError(f"cannot write {args.out}: {e}") from None
    print(f"{args.out}: {len(captions)} pairs; open it in a browser")

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
