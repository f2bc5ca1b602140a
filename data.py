"""Pictures with captions: scenes, our "Shakespeare", drawn on the fly from an atlas of 80 emoji sprites. Your own pictures are read by pictures.py.

    python data.py --build-atlas DIR    packs the sprites (once; DIR is an unpacked `npm pack @lobehub/fluent-emoji-3d@1.1.0`, MIT)
    python data.py --show out.png       a grid of scenes with their captions
    python data.py --speed              renders/s on one core
    python data.py --cache --config C   your own pictures into a cache for train.py
    python data.py --export DIR 200     a folder of pictures and captions to try that with

A scene is drawn from the index alone, so an epoch is endless, any worker can draw any picture, and every machine draws the same.
Six categories as in GenEval: single, two, counting, colors, position, attribution; "mixed" combines them all.
One in ten (noun, colour), (noun, count), {noun, noun} and (noun, relation, noun) is held out by a hash: never drawn for training,
always for evaluation.
"""
import functools, hashlib, json, os, random, sys, time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common import ASSETS, UserError, friendly, use_bfloat16

# ---------------------------------------------------------------------------- the vocabulary of scenes
# noun: code point of the sprite. The first twelve are those of the `nano` config.
NOUNS = {n: c for n, c in (x.rsplit(" ", 1) for x in """dog 1f436;cat 1f431;panda 1f43c;fish 1f420;apple 1f34e;mushroom 1f344;tree 1f333;car 1f697;
rocket 1f680;house 1f3e0;guitar 1f3b8;balloon 1f388;rabbit 1f430;bear 1f43b;koala 1f428;lion 1f981;cow 1f42e;pig 1f437;frog 1f438;fox 1f98a;
unicorn 1f984;chick 1f424;penguin 1f427;owl 1f989;duck 1f986;turtle 1f422;snail 1f40c;whale 1f433;octopus 1f419;crab 1f980;butterfly 1f98b;
bee 1f41d;ladybug 1f41e;elephant 1f418;dinosaur 1f996;banana 1f34c;lemon 1f34b;strawberry 1f353;watermelon 1f349;pineapple 1f34d;carrot 1f955;
eggplant 1f346;donut 1f369;cupcake 1f9c1;hamburger 1f354;pizza 1f355;ice cream 1f366;cake 1f382;cactus 1f335;tulip 1f337;sunflower 1f33b;
bus 1f68c;airplane 2708-fe0f;sailboat 26f5;helicopter 1f681;tractor 1f69c;drum 1f941;umbrella 2602-fe0f;gift 1f381;book 1f4d5;key 1f511;
bell 1f514;crown 1f451;hat 1f3a9;shoe 1f45f;chair 1fa91;clock 23f0;camera 1f4f7;light bulb 1f4a1;teapot 1fad6;robot 1f916;ghost 1f47b;
snowman 2603-fe0f;star 2b50;moon 1f319;soccer ball 26bd;basketball 1f3c0;cup 2615;backpack 1f392;castle 1f3f0""".replace("\n", "").split(";"))}
SYNONYMS = {"dog": "puppy", "cat": "kitten", "rabbit": "bunny", "bear": "brown bear's head", "car": "automobile", "airplane": "plane", "donut": "doughnut",
            "gift": "present", "hamburger": "burger", "dinosaur": "t-rex", "ladybug": "ladybird", "sailboat": "boat", "clock": "alarm clock", "hat": "top hat",
            "shoe": "sneaker", "eggplant": "aubergine", "soccer ball": "football", "cup": "mug", "rocket": "spaceship", "house": "home", "chick": "baby chicken"}
SYNONYMS.pop("bear")  # a colour word in a noun's name would contradict "a blue bear"
PLURALS = {"fish": "fish", "mushroom": "mushrooms", "butterfly": "butterflies", "strawberry": "strawberries", "bus": "buses", "cactus": "cacti", "octopus": "octopuses",
           "snowman": "snowmen", "fox": "foxes", "puppy": "puppies", "bunny": "bunnies", "ladybug": "ladybugs", "ice cream": "ice creams"}
COLOURS = {"red": (225, 40, 45), "orange": (250, 135, 25), "yellow": (250, 215, 40), "green": (50, 165, 65), "blue": (45, 100, 230), "purple": (135, 65, 190),
           "pink": (250, 125, 180), "brown": (125, 75, 45), "black": (45, 45, 50), "white": (235, 235, 238)}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": ("left of", "to the left of", "on the left of"), "right of": ("right of", "to the right of", "on the right of"),
             "above": ("above", "over", "on top of"), "below": ("below", "under", "beneath")}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# place: its bands from top to bottom, each (where it ends, colour at its top, colour at its bottom), and how captions name it
PLACES = {
    "desert": ([(.55, (120, 190, 240), (250, 225, 180)), (1, (240, 200, 130), (215, 160, 90))], ("in the desert", "in a desert", "on desert sand")),
    "beach": ([(.4, (110, 190, 250), (200, 235, 255)), (.6, (30, 130, 200), (80, 190, 215)), (1, (250, 230, 180), (235, 205, 145))], ("at the beach", "on the beach", "by the sea")),
    "night": ([(1, (12, 15, 50), (60, 50, 110))], ("at night", "under the stars", "in the night")),
    "water": ([(1, (70, 190, 220), (10, 65, 130))], ("under water", "in the ocean", "underwater")),
    "meadow": ([(.55, (130, 200, 250), (220, 240, 255)), (1, (140, 205, 90), (75, 150, 55))], ("in a meadow", "on the grass", "in a green field")),
    "snow": ([(.5, (165, 195, 225), (225, 235, 245)), (1, (250, 252, 255), (215, 228, 242))], ("in the snow", "on snow", "in winter")),
}
CATEGORIES = ("single", "two", "counting", "colors", "position", "attribution")
SHARE = {"single": 1.0, "two": 1.0, "counting": 1.5, "colors": 1.0, "position": 1.5, "attribution": 1.5, "mixed": 1.0}  # counting is the hardest


@dataclass
class Group:
    noun: str
    colour: str = ""        # "" = the sprite's own colours
    count: int = 1


@dataclass
class Scene:
    category: str
    groups: list[Group]
    relation: str = ""      # of groups[0] to groups[1]
    background: str = ""    # "" = a plain pale one, or a name out of COLOURS or PLACES
    objects: list = field(default_factory=list)  # (index of group, x, y, size): left, top and side of its square, as shares of the picture
    seed: int = 0           # of the decoration

    def facets(self) -> list[str]:
        """What is held out by hash: each is a combination that a model could only know by composing."""
        g = self.groups
        out = [f"{x.noun}|{x.colour}" for x in g if x.colour] + [f"{x.noun}|{x.count}" for x in g if x.count > 1]
        if len(g) == 2:
            out.append("&".join(sorted((g[0].noun, g[1].noun))))
            if self.relation in ("left of", "above"):
                out.append(f"{g[0].noun}|{self.relation}|{g[1].noun}")
            elif self.relation:
                out.append(f"{g[1].noun}|{INVERSE[self.relation]}|{g[0].noun}")
        return out

    def held_out(self) -> bool:
        return any(is_held_out(f) for f in self.facets())


@functools.lru_cache(None)
def is_held_out(facet: str) -> bool:
    return hashlib.sha256(facet.encode()).digest()[0] < 26      # 26 / 256 = 10 %


# ---------------------------------------------------------------------------- sprites
ATLAS_COLUMNS, ATLAS_CELL = 10, 256


class Sprites:
    """The atlas, recoloured and resized on demand. `folder`: transparent PNG / WebP files named by noun instead."""

    def __init__(self, folder=None):
        self.folder = folder
        if folder:
            files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in (".png", ".webp"))
            if not files:
                raise UserError(f"no .png or .webp sprites in {folder}: name them by noun, such as '{folder}/dog.png'")
            self.images = {p.stem.replace("_", " "): square(Image.open(p)) for p in files}
        else:
            try:
                atlas = Image.open(ASSETS / "atlas.webp").convert("RGBA")
            except FileNotFoundError:
                raise UserError(f"{ASSETS / 'atlas.webp'} is missing: restore it with git, or build it with `python data.py --build-atlas DIR`")
            except OSError as e:
                raise UserError(f"{ASSETS / 'atlas.webp'} is damaged ({e}): restore it with git")
            cells = [(k % ATLAS_COLUMNS * ATLAS_CELL, k // ATLAS_COLUMNS * ATLAS_CELL) for k in range(len(NOUNS))]
            self.images = {n: atlas.crop((x, y, x + ATLAS_CELL, y + ATLAS_CELL)) for n, (x, y) in zip(NOUNS, cells)}
        self.get = functools.lru_cache(8192)(self._get)

    def __reduce__(self):
        return Sprites, (self.folder,)      # a worker process opens its own

    def _get(self, noun: str, colour: str, px: int):
        """(sprite, shadow): premultiplied RGBA of px by px, and a soft L image that is a little larger on all sides."""
        big = next((s for s in (32, 64, 128) if s >= px), None)
        if big and px != big:
            image = self.get(noun, colour, big)[0]          # from the next larger power of two: fast, and smooth enough
        else:
            image = recolour(self.images[noun], COLOURS[colour]) if colour else self.images[noun]
            image = image.convert("RGBa")                   # premultiplied, so that resizing draws no dark fringes
        image = image.resize((px, px), Image.Resampling.LANCZOS if px == big else Image.Resampling.BICUBIC)
        pad = max(2, px // 8)                               # room for the blur to fade out
        shadow = Image.new("L", (px + 2 * pad, px + 2 * pad))
        shadow.paste(image.getchannel("a").point(lambda a: a * 0.35), (pad, pad))
        return image, shadow.filter(ImageFilter.GaussianBlur(max(0.6, px / 24)))


def square(image: Image.Image) -> Image.Image:
    """Crops to what is opaque and pads to a square cell."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    scale = (ATLAS_CELL - 4) / max(image.size)
    image = image.resize([max(1, round(s * scale)) for s in image.size], Image.Resampling.LANCZOS)
    out = Image.new("RGBA", (ATLAS_CELL, ATLAS_CELL))
    out.paste(image, ((ATLAS_CELL - image.width) // 2, (ATLAS_CELL - image.height) // 2))
    return out


def recolour(image: Image.Image, rgb) -> Image.Image:
    """A tone map: luminance goes dark shade -> colour (at the sprite's own median) -> nearly white, which keeps the shading."""
    a = np.asarray(image).astype(np.float32)
    luminance = a[..., :3] @ np.float32([.299, .587, .114])
    opaque = luminance[a[..., 3] > 128]
    low, middle, high = np.percentile(opaque, (2, 50, 98))
    low, high = min(low, middle - 25), max(high, middle + 25)   # flat sprites keep their flatness
    colour = np.float32(rgb)
    light = colour * 0.35 + 255 * 0.65 if sum(rgb) > 200 else colour * 0.6 + 255 * 0.4     # black must not turn grey
    tones = np.stack([colour * 0.3, colour * 0.62, colour, colour * 0.7 + light * 0.3, light])
    at = np.float32([low, (low + middle) / 2, middle, (middle + high) / 2, high])
    a[..., :3] = np.stack([np.interp(luminance, at, tones[:, c]) for c in range(3)], -1)
    return Image.fromarray(a.round().clip(0, 255).astype(np.uint8), "RGBA")


# ---------------------------------------------------------------------------- scenes
class Scenes:
    """scenes[i] -> (picture uint8 (size, size, 3), caption), for any i >= 0.

    split: train (nothing held out), test (something held out; of `single`, which has no combination, other seeds), all
    nouns: the first so many, 0 = all. layout: slots (objects sit in the middle of their cells) or free (anywhere within)."""

    def __init__(self, size: int = 64, split: str = "train", seed: int = 0, nouns: int = 0, layout: str = "slots", categories=(), atlas: str = ""):
        if split not in ("train", "test", "all"):
            raise UserError(f"split '{split}': use train, test or all")
        if layout not in ("slots", "free"):
            raise UserError(f"layout '{layout}': use slots or free")
        self.size, self.split, self.seed, self.layout = size, split, seed, layout
        self.categories = tuple(categories) or tuple(SHARE)
        if unknown := set(self.categories) - set(SHARE):
            raise UserError(f"no category {sorted(unknown)}: there are {', '.join(SHARE)}")
        self.sprites = Sprites(atlas or None)
        self.nouns = list(self.sprites.images)[: nouns or None]
        if len(self.nouns) < 2:
            raise UserError(f"scenes want at least two nouns, got {self.nouns}")

    def scene(self, i: int, category: str = "") -> Scene:
        rng = random.Random(f"{self.seed}/{self.split}/{i}")
        category = category or rng.choices(self.categories, [SHARE[c] for c in self.categories])[0]
        for _ in range(1000):
            s = self._draw(rng, category)
            if self.split == "all" or category == "single" or s.held_out() == (self.split == "test"):
                break
        place_objects(s, rng, 0.35 if self.layout == "slots" else 1.0)
        s.seed = rng.getrandbits(31)
        return s

    def _draw(self, rng, category) -> Scene:
        a, b = rng.sample(self.nouns, 2)
        c, d = rng.sample(list(COLOURS), 2)
        relation = rng.choice(list(RELATIONS))
        s = Scene(category, [Group(a)])
        match category:
            case "two": s.groups = [Group(a), Group(b)]
            case "counting": s.groups = [Group(a, "", rng.choice((2, 3, 4)))]
            case "colors": s.groups = [Group(a, c)]
            case "position": s.groups, s.relation = [Group(a), Group(b)], relation
            case "attribution": s.groups = [Group(a, c), Group(b, d)]
            case "mixed":
                s.groups = [Group(n, rng.choice(("", k)), rng.choice((1, 1, 2, 3, 4))) for n, k in ((a, c), (b, d))[: rng.choice((1, 2, 2))]]
                s.relation = rng.choice(("", relation)) if len(s.groups) == 2 else ""
        if rng.random() < 0.4:      # never an object's own colour: white on white cannot be seen
            own = {g.colour for g in s.groups}
            s.background = rng.choice([k for k in COLOURS if k not in own] if rng.random() < 0.6 else list(PLACES))
        return s

    def caption(self, s: Scene, rng: random.Random) -> str:
        """One of many wordings of the scene: synonyms, order, articles, digits, where the background stands."""
        def words(g: Group) -> str:
            noun = SYNONYMS[g.noun] if g.noun in SYNONYMS and rng.random() < 0.15 else g.noun
            text = f"{g.colour} " * bool(g.colour) + (noun if g.count == 1 else PLURALS.get(noun, noun + "s"))
            if g.count > 1:
                return f"{NUMBERS[g.count] if rng.random() < 0.75 else g.count} {text}"
            article = "an" if text[0] in "aeiou" and not text.startswith("uni") else "a"
            return f"{rng.choices((article, 'one', 'the'), (12, 1, 1))[0]} {text}"
        g, relation = list(s.groups), s.relation
        if len(g) == 2 and rng.random() < 0.5:      # "a dog left of a car" is "a car right of a dog"
            g, relation = g[::-1], INVERSE.get(relation, "")
        text = words(g[0])
        if len(g) == 2:
            text += f" {rng.choice(RELATIONS[relation])} " if relation else rng.choices((" and ", " with ", " next to "), (6, 1, 1))[0]
            text += words(g[1])
        text = rng.choices(("", "a picture of ", "an image of "), (10, 1, 1))[0] + text
        if s.background:
            where = (rng.choice(PLACES[s.background][1]) if s.background in PLACES else
                     rng.choice((f"on a {s.background} background", f"against a {s.background} wall", f"on {s.background}")))
            text = f"{where}, {text}" if rng.random() < 0.2 else f"{text} {where}"
        return text.replace("a orange", "an orange")

    def render(self, s: Scene, size: int = 0) -> np.ndarray:
        """The picture, uint8 (size, size, 3). Pure: the same scene at another size is the same picture."""
        size = size or self.size
        rng = random.Random(s.seed)
        picture = Image.fromarray(background(s.background, size, rng))
        for group, x, y, side in s.objects:
            g, px = s.groups[group], max(4, round(side * size))
            sprite, shadow = self.sprites.get(g.noun, g.colour, px)
            at = (round(x * size), round(y * size))
            pad = (shadow.width - px) // 2
            picture.paste((0, 0, 0), (at[0] - pad, at[1] - pad + max(1, px // 16)), shadow)
            # over a premultiplied sprite: out = sprite + (1 - alpha) picture
            box = (*at, at[0] + px, at[1] + px)
            under = Image.new("RGB", (px, px))
            under.paste(picture.crop(box), mask=sprite.getchannel("a").point(lambda a: 255 - a))
            rgb = Image.merge("RGB", sprite.split()[:3])
            picture.paste(Image.fromarray(np.asarray(under) + np.minimum(np.asarray(rgb), 255 - np.asarray(under))), at)
        return np.asarray(picture)

    def __getitem__(self, i: int):
        s = self.scene(i)
        return self.render(s), self.caption(s, random.Random(f"caption/{self.seed}/{i}"))


def place_objects(s: Scene, rng, freedom: float):
    """Each group gets a part of the picture, cut where the relation says, and there each object a cell of the grid that leaves them largest."""
    n = [g.count for g in s.groups]
    if len(n) == 1:
        regions = [(0, 0, 1, 1)]
    else:
        cut = {"left of": 0, "right of": 0, "above": 1, "below": 1}.get(s.relation, rng.randrange(2))
        # an uneven cut where the counts differ, so that three cars need not be tiny beside one tree
        share = 0.5 + 0.12 * ((n[0] > n[1]) - (n[0] < n[1]))
        flip = s.relation in ("right of", "below") or (not s.relation and rng.random() < 0.5)
        share = 1 - share if flip else share
        first, second = ((0, 0, share, 1), (share, 0, 1 - share, 1)) if cut == 0 else ((0, 0, 1, share), (0, share, 1, 1 - share))
        regions = [second, first] if flip else [first, second]
    for k, (x0, y0, w, h) in enumerate(regions):
        cols = max(range(1, n[k] + 1), key=lambda c: (min(w / c, h / -(-n[k] // c)), rng.random()))
        rows = -(-n[k] // cols)
        cells = [(r, c) for r in range(rows) for c in range(cols)]
        for r, c in sorted(rng.sample(cells, n[k])):
            cw, ch = w / cols, h / rows
            side = min(cw, ch, 0.8) * rng.uniform(0.92 - 0.3 * freedom, 0.92)
            x, y = (x0 + c * cw + (cw - side) * (0.5 + freedom * rng.uniform(-0.5, 0.5)), y0 + r * ch + (ch - side) * (0.5 + freedom * rng.uniform(-0.5, 0.5)))
            s.objects.append((k, x, y, side))


def background(name: str, size: int, rng) -> np.ndarray:
    """uint8 (size, size, 3): bands of vertical gradients, and stars at night, bubbles under water."""
    if name in PLACES:
        shift = rng.uniform(-0.08, 0.08)
        bands = [(end if end == 1 else end + shift, top, bottom) for end, top, bottom in PLACES[name][0]]
    elif name:
        colour = np.array(COLOURS[name], float)
        bands = [(1, np.minimum(255, colour * rng.uniform(1.0, 1.08)), colour * rng.uniform(0.88, 0.98))]
    else:
        pale = [rng.uniform(205, 245) for _ in range(3)]
        bands = [(1, [min(255, v + rng.uniform(0, 10)) for v in pale], [v - rng.uniform(0, 12) for v in pale])]
    y, begin, column = (np.arange(size) + 0.5) / size, 0.0, np.zeros((size, 3))
    for end, top, bottom in bands:
        mix = np.clip((y - begin) / (end - begin), 0, 1)[:, None]
        column = np.where((y >= begin)[:, None], np.array(top) * (1 - mix) + np.array(bottom) * mix, column)
        begin = end
    out = np.repeat(column[:, None].clip(0, 255).astype(np.uint8), size, 1)
    if name in ("night", "water"):
        picture = Image.fromarray(out)
        draw = ImageDraw.Draw(picture)
        for _ in range(14):
            x, v, r = rng.random() * size, rng.random() * size, size * rng.uniform(0.006, 0.014) * (1 if name == "night" else 2)
            draw.ellipse((x - r, v - r, x + r, v + r), fill=(250, 245, 210) if name == "night" else None, outline=None if name == "night" else (190, 235, 245))
        out = np.asarray(picture)
    return out


# ---------------------------------------------------------------------------- latents, made once
@dataclass
class DataConfig:
    size: int = 64              # pixels
    nouns: int = 12             # the first so many, 0 = all
    layout: str = "slots"       # or free
    pictures: int = 20000       # drawn once and kept as latents; their captions are worded anew each time
    seed: int = 0
    atlas: str = ""             # folder of your own sprites, transparent PNG / WebP named by noun
    workers: int = 2            # processes that render, or read pictures
    cache: str = "runs/cache"   # directory
    # your own pictures (pictures.py): size is then the side of the square whose area all have
    folder: str = ""            # of pictures with captions, or of tars; empty: scenes
    bucket_step: int = 64       # heights and widths are multiples of it
    max_ratio: float = 2.0      # of the longest bucket's sides; longer pictures are cropped to it
    max_upscale: float = 1.0    # pictures that would have to be enlarged more are skipped
    held_out: float = 0.02      # share of the pictures, by a hash of their names, for validation and sample grids
    shard: int = 256            # pictures a file of the cache


def scenes_of(cfg: DataConfig, split: str = "train") -> Scenes:
    return Scenes(cfg.size, split, cfg.seed, cfg.nouns, cfg.layout, atlas=cfg.atlas)


def latents_of(cfg: DataConfig, ae, ae_key: str, split: str = "train", n: int = 0):
    """Latents of the first n scenes, float16 (n, 16, size/8, size/8), mapped from the cache or rendered, encoded and put there.
    `ae_key` names the autoencoder's weights, so that a new one makes a new cache."""
    import torch
    from safetensors.torch import load_file, save_file
    from tqdm import tqdm
    n = n or cfg.pictures
    key = hashlib.sha256(json.dumps([cfg.size, cfg.nouns, cfg.layout, cfg.seed, cfg.atlas, list(NOUNS), ae_key, split, n]).encode()).hexdigest()[:12]
    path = Path(cfg.cache) / f"scenes-{cfg.size}px-{split}-{n}-{key}.safetensors"
    if not path.exists():
        scenes, device = scenes_of(cfg, split), next(ae.parameters()).device
        loader = torch.utils.data.DataLoader(Pictures(scenes, n), 64, num_workers=cfg.workers)
        parts = []
        for pictures in tqdm(loader, f"render and encode {n} {split} scenes", unit="batch"):
            parts.append(encode_pictures(ae, pictures, device))
        latents = torch.cat(parts)                          # (n, 16, size/8, size/8)
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_suffix(f".tmp{os.getpid()}")
        save_file({"latents": latents}, tmp)
        tmp.rename(path)
    return load_file(path)["latents"]


def encode_pictures(ae, pictures, device):
    """uint8 (B, H, W, 3) -> latents (B, C, H/8, W/8) in fp16 on the CPU."""
    import torch
    ae = ae.to(memory_format=torch.channels_last)           # with bfloat16, where the machine has it, 3.5 times faster than without both
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16("auto", device)):
        return ae.encode(to_tensor(pictures).to(device)).half().contiguous().cpu()


class Pictures:
    """The first n scenes as a torch dataset of uint8 arrays."""

    def __init__(self, scenes, n):
        self.scenes, self.n = scenes, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.scenes.render(self.scenes.scene(i)).copy()


def to_tensor(pictures):
    """uint8 (B, H, W, 3), numpy or torch -> float (B, 3, H, W) in [-1, 1]."""
    import torch
    pictures = torch.tensor(pictures) if isinstance(pictures, np.ndarray) else pictures
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def grid(pictures, captions=(), columns: int = 0, scale: int = 1) -> Image.Image:
    """A sheet of uint8 pictures with their captions below."""
    columns = columns or min(len(pictures), max(1, round(len(pictures) ** 0.5)))
    h, w = pictures[0].shape[0] * scale, pictures[0].shape[1] * scale
    line, per_line = 13, max(8, w // 6)
    wrapped = [[c[k:k + per_line] for k in range(0, len(c), per_line)][:3] for c in captions]
    cell_h = h + line * max(map(len, wrapped), default=0) + 4
    sheet = Image.new("RGB", (columns * (w + 4) + 4, -(-len(pictures) // columns) * cell_h + 4), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for k, p in enumerate(pictures):
        x, y = 4 + k % columns * (w + 4), 4 + k // columns * cell_h
        sheet.paste(Image.fromarray(p).resize((w, h), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR), (x, y))
        for n, text in enumerate(wrapped[k] if captions else ()):
            draw.text((x, y + h + line * n), text, fill=(40, 40, 40))
    return sheet


# ---------------------------------------------------------------------------- command line
def build_atlas(folder):
    sheet = Image.new("RGBA", (ATLAS_COLUMNS * ATLAS_CELL, -(-len(NOUNS) // ATLAS_COLUMNS) * ATLAS_CELL))
    for k, (noun, code) in enumerate(NOUNS.items()):
        path = Path(folder) / "assets" / f"{code}.webp"
        if not path.exists():
            raise UserError(f"{path} is missing: unpack the tarball of `npm pack @lobehub/fluent-emoji-3d@1.1.0` and give its folder `package`")
        sheet.paste(square(Image.open(path)), (k % ATLAS_COLUMNS * ATLAS_CELL, k // ATLAS_COLUMNS * ATLAS_CELL))
    sheet.save(ASSETS / "atlas.webp", quality=80, method=6)
    print(f"{ASSETS / 'atlas.webp'}: {len(NOUNS)} sprites, {(ASSETS / 'atlas.webp').stat().st_size / 1e3:.0f} kB")


def main(argv):
    match argv:
        case ["--build-atlas", folder]:
            build_atlas(folder)
        case ["--show", path]:
            scenes = [Scenes(128, split) for split in ("train", "test")]
            pairs = [scenes[k % 2][k] for k in range(48)]
            grid([p for p, _ in pairs], [c for _, c in pairs], 8).save(path)
        case ["--speed"]:
            for size in (64, 128, 256):
                scenes, begin = Scenes(size), time.time()
                for i in range(2000):
                    scenes[i]
                print(f"{size} px: {2000 / (time.time() - begin):.0f} scenes/s on one core")
        case ["--export", folder, *numbers] if 0 < len(numbers) < 3 and all(n.isdigit() for n in numbers):
            from pictures import export
            export(folder, *map(int, numbers))
        case ["--cache", *args]:
            from common import pick_device, read_config, start_others
            from cache import make_cache
            from adv_distill import Config                      # knows the keys of all three trainings
            from distill import teacher_text
            cfg = read_config(Config(), args, "configs/folder.toml")
            if cfg.processes > 1 and "WORLD_SIZE" not in os.environ and pick_device(cfg.device).type == "cpu":
                start_others(cfg.processes)
            make_cache(cfg, teacher_text(cfg))
        case _:
            print(__doc__)


if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
