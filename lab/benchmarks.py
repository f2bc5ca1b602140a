"""Pictures in the folders that GenEval's and DPG-Bench's own evaluators read.

    python -m lab.benchmarks geneval evaluation_metadata.jsonl --ckpt DIR --out DIR
    python -m lab.benchmarks dpg prompts/ --ckpt DIR --out DIR

GenEval: OUT/00000/metadata.jsonl (the prompt's own line), OUT/00000/samples/00000.png, ...
DPG-Bench: OUT/ID.png, two rows of two; give its script --resolution (the size) and --pic-num 4.
What is there is kept, so that a run that was stopped goes on.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import UserError, friendly, setup
from decoder import autoencoder_of
from model import load_model
from sample import generate, sampling

EACH = 4    # pictures a prompt

def read_geneval(path: Path) -> dict[str, tuple]:
    """{name of the folder: (prompt, its line of the file)}"""
    found = {}
    try:
        lines = path.read_text(encoding="utf-8").strip().split("\n")    # not splitlines(): U+2028
        for i, line in enumerate(lines):
            found[f"{i:05d}"] = json.loads(line)["prompt"] + "", line   # TypeError: no string
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is not GenEval's evaluation_metadata.jsonl: {e!r}") from None
    return found

def write_geneval(folder: Path, pictures, line: str):
    """metadata.jsonl comes last: with it the folder is complete."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"samples/{i:05d}.png")
    (folder / "metadata.jsonl").write_text(line, encoding="utf-8")

def read_dpg(folder: Path) -> dict[str, tuple]:
    """{ID.png: (prompt, "")} of DPG-Bench's folder of ID.txt."""
    found = {}
    for p in sorted(folder.glob("*.txt")):
        try:
            found[f"{p.stem}.png"] = p.read_text(encoding="utf-8-sig").strip(), ""
        except ValueError as e:
            raise UserError(f"{p} is no text: {e}") from None
    return found

def write_dpg(path: Path, pictures, _):
    rows = [np.concatenate(pictures[:2], axis=1), np.concatenate(pictures[2:], axis=1)]
    unfinished = path.with_suffix(".tmp")
    Image.fromarray(np.concatenate(rows)).save(unfinished, "png")
    unfinished.rename(path)

BENCHMARKS = {"geneval": (read_geneval, write_geneval), "dpg": (read_dpg, write_dpg)}

def main(argv):
    p = argparse.ArgumentParser(prog="python -m lab.benchmarks", description=__doc__.split("\n")[0])
    p.add_argument("benchmark", choices=BENCHMARKS)
    p.add_argument("prompts", type=Path, help="evaluation_metadata.jsonl, or a folder of ID.txt")
    p.add_argument("--ckpt", default="assets/fast", help="sampled as it says")
    p.add_argument("--ae", default="", help="autoencoder; default: the checkpoint's own")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    read, write = BENCHMARKS[args.benchmark]
    prompts = read(args.prompts)
    if not prompts:
        raise UserError(f"no prompts in {args.prompts}")
    args.out.mkdir(parents=True, exist_ok=True)
    device = setup("auto")[0]
    net, config = load_model(args.ckpt, device)
    ae, size = autoencoder_of(config, args.ae, device), config["data"]["size"]
    most = net.text_cfg.max_tokens
    for k, (name, (prompt, line)) in enumerate(tqdm(prompts.items(), unit="prompt")):
        place = args.out / name
        if net.text is not None and len(net.vocabulary.ids_of(prompt)) > most:
            prompt = net.vocabulary.shorten(prompt, most)       # as in training; others do it
            tqdm.write(f"{name}: more than {most} tokens, drawn as '{prompt}'")
        if not place.is_file() and not (place / "metadata.jsonl").is_file():
            seeds = range(k * EACH, (k + 1) * EACH)
            pictures = generate(net, ae, [prompt] * EACH, seeds, size, **sampling(config))
            write(place, pictures, line)

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
