"""Folders of pictures with captions that nobody here made, to try `data.folder` on.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python -m lab.sets emoji package runs/emoji        1,906 emoji of 64 px, named
    pip install scikit-image scikit-learn
    python -m lab.sets photos runs/photos              crops of the photographs that these bring

The emoji are Google's Noto (Apache-2.0), packed by emoji-data (MIT). The photographs' licences are
in the READMEs of the two packages; most are public domain or Creative Commons.
"""
import argparse
import json
import random
import sys
from pathlib import Path

from PIL import Image

from common import UserError, friendly

SKIN_TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
PHOTOS = {      # of skimage.data and sklearn.datasets, in colour
    "astronaut": "an astronaut in an orange suit, a woman smiling in front of a flag",
    "cat": "a tabby cat, its face from near",
    "coffee": "a cup of coffee on a saucer, with a spoon",
    "rocket": "a rocket on its launch pad at dusk",
    "china.jpg": "a Chinese palace with red and gold roofs behind a square",
    "flower.jpg": "an orange dahlia in front of leaves",
}

def keep(image: Image.Image, folder: Path, name: str, caption: str):
    image.save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")

def lay_emoji(package: Path, folder: Path) -> int:
    """A caption is the name and the group: "ringed planet, sky & weather"."""
    rows = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    n = 0
    for row in rows:
        picture = package / "img/google/64" / row["image"]
        if not picture.is_file() or any(tone in row["unified"] for tone in SKIN_TONES):
            continue
        name = (row["name"] or row["short_name"].replace("_", " ")).lower()
        caption = f"{name}, {row['subcategory'].replace('-', ' ')}"
        keep(Image.open(picture), folder, picture.stem, caption)
        n += 1
    return n

def photograph(name: str) -> Image.Image:
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image
        return Image.fromarray(load_sample_image(name))
    import skimage.data
    return Image.fromarray(getattr(skimage.data, name)())

def lay_photos(folder: Path, each: int = 48) -> int:
    """Each photograph whole, and crops of it, whose captions say which part they show."""
    rng = random.Random(0)
    for name, caption in PHOTOS.items():
        image = photograph(name).convert("RGB")
        stem, (width, height) = name.split(".")[0], image.size
        keep(image, folder, stem, caption)
        for k in range(each):
            side = rng.randint(min(width, height) // 3, min(width, height))
            left, top = rng.randint(0, width - side), rng.randint(0, height - side)
            across = ("left", "middle", "right")[min(2, 3 * (left + side // 2) // width)]
            down = ("top", "middle", "bottom")[min(2, 3 * (top + side // 2) // height)]
            crop = image.crop((left, top, left + side, top + side))
            keep(crop, folder, f"{stem}_{k:02}", f"{caption}, cut from the {down} {across}")
    return len(PHOTOS) * (each + 1)

def main(argv):
    p = argparse.ArgumentParser(prog="python -m lab.sets", description=__doc__.split("\n")[0])
    p.add_argument("kind", choices=("emoji", "photos"))
    p.add_argument("folders", nargs="+", type=Path, help="[the unpacked package] and the new one")
    a = p.parse_args(argv)
    *package, folder = a.folders
    if len(package) != (a.kind == "emoji"):
        raise UserError(f"python -m lab.sets {a.kind} wants {'PACKAGE ' * (a.kind == 'emoji')}DIR")
    if package and not (package[0] / "emoji.json").is_file():
        raise UserError(f"{package[0]} has no emoji.json: give the folder that the tar unpacks to")
    folder.mkdir(parents=True, exist_ok=True)
    n = lay_emoji(*package, folder) if package else lay_photos(folder)
    print(f"{folder}: {n} pictures; next: python train.py --config configs/folder.toml "
          f"data.folder={folder}")

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
