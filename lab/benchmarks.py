"""Pictures in the folders that GenEval's and DPG-Bench's own evaluators read.

    python -m lab.benchmarks geneval evaluation_metadata.jsonl --ckpt DIR --out DIR
    python -m lab.benchmarks dpg prompts/ --ckpt DIR --out DIR

GenEval: OUT/00000/metadata.jsonl (the prompt's own line), OUT/00000/samples/00000.png, ...
DPG-Bench: OUT/ID.png, four pictures as two rows of two; give its script --resolution (the size)
and --pic-num 4. What is there is kept, so that a run that was stopped goes on.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import UserError, friendly, setup
from decoder import load_autoencoder
from model import load_model
from sample import SAMPLERS, generate, sampling

EACH = 4    # pictures a prompt

def read_geneval(path) -> list[dict]:
    """A line each of GenEval's prompts: {"prompt": ..., ...}."""
    try:
        lines = Path(path).read_text().splitlines()
        found = [json.loads(line) for line in lines if line.strip()]
        prompts = [line["prompt"] for line in found]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is not GenEval's evaluation_metadata.jsonl ({e!r}): it has one "
                        "JSON object with a 'prompt' in each line") from None
    if not prompts:
        raise UserError(f"no prompts in {path}")
    return found

def read_dpg(folder) -> dict[str, str]:
    """{ID: prompt} of DPG-Bench's folder of ID.txt."""
    try:
        prompts = {p.stem: p.read_text().strip() for p in sorted(Path(folder).glob("*.txt"))}
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read the prompts in {folder}: {e}") from None
    if not prompts:
        raise UserError(f"no prompts in {folder}: DPG-Bench's are a folder of ID.txt")
    return prompts

def write_geneval(folder: Path, line: dict, pictures):
    """metadata.jsonl comes last: with it the folder is complete."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"samples/{i:05d}.png")
    (folder / "metadata.jsonl").write_text(json.dumps(line))

def write_dpg(path: Path, pictures):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [np.concatenate(pictures[:2], axis=1), np.concatenate(pictures[2:], axis=1)]
    unfinished = path.with_suffix(".tmp")
    Image.fromarray(np.concatenate(rows)).save(unfinished, "png")
    unfinished.rename(path)

def main(argv):
    p = argparse.ArgumentParser(prog="python -m lab.benchmarks",
                                description=__doc__.split("\n")[0])
    p.add_argument("benchmark", choices=("geneval", "dpg"))
    p.add_argument("prompts", help="GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder")
    p.add_argument("--ckpt", default="assets/fast")
    p.add_argument("--ae", default="assets/ae")
    p.add_argument("--steps", type=int, help="this, --cfg, --sampler: default as the checkpoint's")
    p.add_argument("--cfg", type=float)
    p.add_argument("--sampler", choices=SAMPLERS)
    p.add_argument("--out", help="default: runs/geneval or runs/dpg")
    p.add_argument("--device", default="auto")
    args = p.parse_args(argv)
    out = Path(args.out or f"runs/{args.benchmark}")
    if args.benchmark == "geneval":
        lines = read_geneval(args.prompts)
        prompts = {out / f"{i:05d}": line["prompt"] for i, line in enumerate(lines)}
    else:
        prompts = {out / f"{name}.png": text for name, text in read_dpg(args.prompts).items()}
    device = setup(args.device)[0]
    net, config = load_model(args.ckpt, device)
    ae, size = load_autoencoder(args.ae, device), config["data"]["size"]
    how = sampling(config, args.steps, args.cfg, args.sampler)
    for k, (place, prompt) in enumerate(tqdm(prompts.items(), unit="prompt")):
        if place.is_file() or (place / "metadata.jsonl").is_file():
            continue
        seeds = range(k * EACH, (k + 1) * EACH)
        pictures = generate(net, ae, [prompt] * EACH, seeds, size, **how)
        if args.benchmark == "geneval":
            write_geneval(place, lines[k], pictures)
        else:
            write_dpg(place, pictures)
    print(f"{out}: {len(prompts)} prompts, {EACH} pictures each, of {size} px")

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
