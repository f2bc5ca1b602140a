"""A blind comparison of two checkpoints by people, in one static page.

    python -m lab.compare assets/scenes assets/fast --out compare.html

lab/compare.html shows pairs of pictures, unlabelled and in random order, and counts votes.
"""
import argparse
import base64
import io
import json
import random
import sys
import time
from itertools import product
from pathlib import Path

from PIL import Image

from common import ROOT, friendly, setup
from decoder import autoencoder_of
from model import load_model
from sample import generate, sampling
from scenes import CATEGORIES, Scenes

def held_out_captions(data: dict, prompts: int) -> list[str]:
    """So many captions of each category, of combinations that were never trained on."""
    scenes = Scenes(data["size"], "test", seed=13, nouns=data["nouns"], layout=data["layout"],
                    atlas=data["atlas"], old=data["old"])
    places = product(range(prompts), CATEGORIES)
    return [scenes.caption(scenes.scene(i, kind), random.Random(i)) for i, kind in places]

def draw_prompts(ckpt: str, prompts, steps=None, ae="", seeds=None) -> list:
    """Pictures of the prompts by a checkpoint, as it says or in so many steps; seeds from 0."""
    device = setup("auto")[0]
    net, config = load_model(ckpt, device)
    return generate(net, autoencoder_of(config, ae, device), prompts, seeds or range(len(prompts)),
                    config["data"]["size"], **sampling(config, steps), progress=True)

def data_url(picture) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

def comparison_page(names, captions, first, second) -> str:
    """`flip`: the second checkpoint's picture is on the left."""
    rng, pairs = random.Random(0), []
    for caption, *sides in zip(captions, first, second):
        flip = rng.random() < 0.5
        left, right = sides[flip], sides[not flip]
        pairs.append({"prompt": caption, "left": data_url(left), "right": data_url(right),
                      "flip": flip})
    rng.shuffle(pairs)
    data = json.dumps({"id": time.time(), "a": names[0], "b": names[1], "pairs": pairs})
    page = (ROOT / "lab/compare.html").read_text("utf-8")
    return page.replace("/*DATA*/null", data.replace("</", "<\\/"))

def main(argv):
    p = argparse.ArgumentParser(prog="python -m lab.compare", description=__doc__.split("\n")[0])
    p.add_argument("checkpoints", nargs=2, metavar="DIR", help="each is sampled as it says")
    p.add_argument("--ae", default="", help="autoencoder; default: the checkpoint's own")
    p.add_argument("--out", type=Path, default="compare.html")
    args = p.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)      # now, not after all is drawn
    captions = held_out_captions(load_model(args.checkpoints[0])[1]["data"], 10)
    drawn = [draw_prompts(ckpt, captions, ae=args.ae) for ckpt in args.checkpoints]
    args.out.write_text(comparison_page(args.checkpoints, captions, *drawn), "utf-8")
    print(f"{args.out}: {len(captions)} pairs; open it in a browser")

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
