"""Scenes, our "Shakespeare": pictures drawn from an atlas of 80 emoji sprites, and their captions.

A scene is drawn from its index alone: an epoch is endless, any worker can draw any picture, and
every machine draws the same. Six categories as in GenEval: single, two, counting, colors,
position, attribution; "mixed" combines them all. One in ten (noun, colour), (noun, count),
{noun, noun} and (noun, relation, noun) is held out by a hash: it is never drawn for training and
always for evaluation.
"""
import functools
import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common import ASSETS, UserError

# ---------------------------------------------------------------------------- words
# noun: code point of its sprite. The first twelve are those of the `nano` config.
NOUNS = dict(pair.rsplit(" ", 1) for pair in """
dog 1f436;cat 1f431;panda 1f43c;fish 1f420;apple 1f34e;mushroom 1f344;tree 1f333;car 1f697
rocket 1f680;house 1f3e0;guitar 1f3b8;balloon 1f388;rabbit 1f430;bear 1f43b;koala 1f428
lion 1f981;cow 1f42e;pig 1f437;frog 1f438;fox 1f98a;unicorn 1f984;chick 1f424;penguin 1f427
owl 1f989;duck 1f986;turtle 1f422;snail 1f40c;whale 1f433;octopus 1f419;crab 1f980
butterfly 1f98b;bee 1f41d;ladybug 1f41e;elephant 1f418;dinosaur 1f996;banana 1f34c;lemon 1f34b
strawberry 1f353;watermelon 1f349;pineapple 1f34d;carrot 1f955;eggplant 1f346;donut 1f369
cupcake 1f9c1;hamburger 1f354;pizza 1f355;ice cream 1f366;cake 1f382;cactus 1f335;tulip 1f337
sunflower 1f33b;bus 1f68c;airplane 2708-fe0f;sailboat 26f5;helicopter 1f681;tractor 1f69c
drum 1f941;umbrella 2602-fe0f;gift 1f381;book 1f4d5;key 1f511;bell 1f514;crown 1f451;hat 1f3a9
shoe 1f45f;chair 1fa91;clock 23f0;camera 1f4f7;light bulb 1f4a1;teapot 1fad6;robot 1f916
ghost 1f47b;snowman 2603-fe0f;star 2b50;moon 1f319;soccer ball 26bd;basketball 1f3c0;cup 2615
backpack 1f392;castle 1f3f0""".strip().replace("\n", ";").split(";"))

# "brown bear" for a bear is not among them: "a blue brown bear" would contradict itself
SYNONYMS = {
    "dog": "puppy", "cat": "kitten", "rabbit": "bunny", "car": "automobile", "airplane": "plane",
    "donut": "doughnut", "gift": "present", "hamburger": "burger", "dinosaur": "t-rex",
    "ladybug": "ladybird", "sailboat": "boat", "clock": "alarm clock", "hat": "top hat",
    "shoe": "sneaker", "eggplant": "aubergine", "soccer ball": "football", "cup": "mug",
    "rocket": "spaceship", "house": "home", "chick": "baby chicken",
}
PLURALS = {                                     # where it is not the noun and an "s"
    "fish": "fish", "butterfly": "butterflies", "strawberry": "strawberries", "bus": "buses",
    "cactus": "cacti", "octopus": "octopuses", "snowman": "snowmen", "fox": "foxes",
    "puppy": "puppies", "bunny": "bunnies",
}
COLOURS = {
    "red": (225, 40, 45), "orange": (250, 135, 25), "yellow": (250, 215, 40),
    "green": (50, 165, 65), "blue": (45, 100, 230), "purple": (135, 65, 190),
    "pink": (250, 125, 180), "brown": (125, 75, 45), "black": (45, 45, 50),
    "white": (235, 235, 238),
}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# place: its bands from top to bottom, each (where it ends, colour at its top, colour at its
# bottom), and the wordings of captions
PLACES = {
    "desert": ([(.55, (120, 190, 240), (250, 225, 180)), (1, (240, 200, 130), (215, 160, 90))],
               ("in the desert", "in a desert", "on desert sand")),
    "beach": ([(.4, (110, 190, 250), (200, 235, 255)), (.6, (30, 130, 200), (80, 190, 215)),
               (1, (250, 230, 180), (235, 205, 145))],
              ("at the beach", "on the beach", "by the sea")),
    "night": ([(1, (12, 15, 50), (60, 50, 110))],
              ("at night", "under the stars", "in the night")),
    "water": ([(1, (70, 190, 220), (10, 65, 130))],
              ("under water", "in the ocean", "underwater")),
    "meadow": ([(.55, (130, 200, 250), (220, 240, 255)), (1, (140, 205, 90), (75, 150, 55))],
               ("in a meadow", "on the grass", "in a green field")),
    "snow": ([(.5, (165, 195, 225), (225, 235, 245)), (1, (250, 252, 255), (215, 228, 242))],
             ("in the snow", "on snow", "in winter")),
}
CATEGORIES = ("single", "two", "counting", "colors", "position", "attribution")
SHARE = {"single": 1.0, "two": 1.0, "counting": 1.5, "colors": 1.0, "position": 1.5,
         "attribution": 1.5, "mixed": 1.0}      # counting is the hardest


@dataclass
class Group:
    """Objects of one kind."""
    noun: str
    colour: str = ""        # "" = the sprite's own colours
    count: int = 1


@dataclass
class Scene:
    category: str
    groups: list[Group]
    relation: str = ""      # of groups[0] to groups[1]
    background: str = ""    # "" = a plain pale one, or a name out of COLOURS or PLACES
    # (index of group, x, y, size): left, top and side of its square, as shares of the picture
    objects: list = field(default_factory=list)
    seed: int = 0           # of the decoration

    def facets(self) -> list[str]:
        """The combinations that can be held out: a model knows them only by composing."""
        g = self.groups
        out = [f"{x.noun}|{x.colour}" for x in g if x.colour]
        out += [f"{x.noun}|{x.count}" for x in g if x.count > 1]
        if len(g) == 2:
            a, b = g[0].noun, g[1].noun
            out.append("&".join(sorted((a, b))))
            if self.relation in ("left of", "above"):
                out.append(f"{a}|{self.relation}|{b}")
            elif self.relation:
                out.append(f"{b}|{INVERSE[self.relation]}|{a}")
        return out

    def held_out(self) -> bool:
        return any(is_held_out(f) for f in self.facets())


@functools.lru_cache(None)
def is_held_out(facet: str) -> bool:
    return hashlib.sha256(facet.encode()).digest()[0] < 26      # 26 / 256 = 10 %


# ---------------------------------------------------------------------------- sprites
ATLAS = ASSETS / "atlas.webp"
ATLAS_COLUMNS, ATLAS_CELL = 10, 256


class Sprites:
    """Sprites by noun, recoloured and resized on demand.

    folder: one of transparent PNG / WebP files named by noun, instead of the atlas."""

    def __init__(self, folder=None):
        self.folder = folder
        self.images = read_sprites(folder) if folder else read_atlas()
        self.get = functools.lru_cache(8192)(self.draw)

    def __reduce__(self):
        return Sprites, (self.folder,)      # a worker process opens its own

    def draw(self, noun: str, colour: str, px: int):
        """(sprite, shadow): a premultiplied RGBA image of px by px, and a soft L image that is a
        little larger on all sides."""
        big = next((s for s in (32, 64, 128) if s >= px), px)
        if px != big:
            # from the next larger power of two: fast, and smooth enough
            image = self.get(noun, colour, big)[0]
            image = image.resize((px, px), Image.Resampling.BICUBIC)
        else:
            image = self.images[noun]
            if colour:
                image = recolour(image, COLOURS[colour])
            image = image.convert("RGBa")   # premultiplied, so that resizing draws no dark fringes
            method = Image.Resampling.LANCZOS if px in (32, 64, 128) else Image.Resampling.BICUBIC
            image = image.resize((px, px), method)
        pad = max(2, px // 8)               # room for the blur to fade out
        shadow = Image.new("L", (px + 2 * pad, px + 2 * pad))
        shadow.paste(image.getchannel("a").point(lambda a: a * 0.35), (pad, pad))
        return image, shadow.filter(ImageFilter.GaussianBlur(max(0.6, px / 24)))


def read_sprites(folder) -> dict[str, Image.Image]:
    files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in (".png", ".webp"))
    if not files:
        raise UserError(f"no .png or .webp sprites in {folder}: name them by noun, such as "
                        f"'{folder}/dog.png'")
    return {p.stem.replace("_", " "): square(Image.open(p)) for p in files}


def read_atlas() -> dict[str, Image.Image]:
    try:
        atlas = Image.open(ATLAS).convert("RGBA")
    except FileNotFoundError:
        raise UserError(f"{ATLAS} is missing: restore it with git, or build it with "
                        "`python data.py --build-atlas DIR`") from None
    except OSError as e:
        raise UserError(f"{ATLAS} is damaged ({e}): restore it with git") from None
    return {noun: atlas.crop(atlas_cell(k)) for k, noun in enumerate(NOUNS)}


def atlas_cell(k: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of noun number k in the atlas."""
    x, y = k % ATLAS_COLUMNS * ATLAS_CELL, k // ATLAS_COLUMNS * ATLAS_CELL
    return x, y, x + ATLAS_CELL, y + ATLAS_CELL


def square(image: Image.Image) -> Image.Image:
    """Crops to what is opaque and pads to a square cell."""
    image = image.convert("RGBA")
    opaque = image.getchannel("A").point(lambda a: 255 * (a > 8))
    image = image.crop(opaque.getbbox())
    scale = (ATLAS_CELL - 4) / max(image.size)
    size = [max(1, round(s * scale)) for s in image.size]
    image = image.resize(size, Image.Resampling.LANCZOS)
    out = Image.new("RGBA", (ATLAS_CELL, ATLAS_CELL))
    out.paste(image, ((ATLAS_CELL - image.width) // 2, (ATLAS_CELL - image.height) // 2))
    return out


def recolour(image: Image.Image, rgb) -> Image.Image:
    """A tone map: luminance goes from a dark shade over the colour (at the sprite's own median) to
    nearly white, which keeps the shading."""
    a = np.asarray(image).astype(np.float32)
    luminance = a[..., :3] @ np.float32([.299, .587, .114])
    opaque = luminance[a[..., 3] > 128]
    low, middle, high = np.percentile(opaque, (2, 50, 98))
    low, high = min(low, middle - 25), max(high, middle + 25)   # flat sprites keep their flatness
    colour = np.float32(rgb)
    share = 0.35 if sum(rgb) > 200 else 0.6                     # black must not turn grey
    light = colour * share + 255 * (1 - share)
    tones = np.stack([colour * 0.3, colour * 0.62, colour, colour * 0.7 + light * 0.3, light])
    at = np.float32([low, (low + middle) / 2, middle, (middle + high) / 2, high])
    a[..., :3] = np.stack([np.interp(luminance, at, tones[:, c]) for c in range(3)], -1)
    return Image.fromarray(a.round().clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------- scenes
class Scenes:
    """scenes[i] -> (picture uint8 (size, size, 3), caption), for any i >= 0.

    split: train (nothing held out), test (something held out; other seeds for `single`, which has
        no combination), all
    nouns: the first so many, 0 = all
    layout: slots (objects in the middle of their cells) or free (anywhere within them)"""

    def __init__(self, size: int = 64, split: str = "train", seed: int = 0, nouns: int = 0,
                 layout: str = "slots", categories=(), atlas: str = ""):
        if split not in ("train", "test", "all"):
            raise UserError(f"split '{split}': use train, test or all")
        if layout not in ("slots", "free"):
            raise UserError(f"layout '{layout}': use slots or free")
        self.size, self.split, self.seed, self.layout = size, split, seed, layout
        self.categories = tuple(categories) or tuple(SHARE)
        if unknown := set(self.categories) - set(SHARE):
            raise UserError(f"no category {sorted(unknown)}: there are {', '.join(SHARE)}")
        self.sprites = Sprites(atlas or None)
        self.nouns = list(self.sprites.images)[:nouns or None]
        if len(self.nouns) < 2:
            raise UserError(f"scenes want at least two nouns, got {self.nouns}")

    def __getitem__(self, i: int):
        s = self.scene(i)
        return self.render(s), self.caption(s, random.Random(f"caption/{self.seed}/{i}"))

    def scene(self, i: int, category: str = "") -> Scene:
        rng = random.Random(f"{self.seed}/{self.split}/{i}")
        shares = [SHARE[c] for c in self.categories]
        category = category or rng.choices(self.categories, shares)[0]
        for _ in range(1000):
            s = self.compose(rng, category)
            anything = self.split == "all" or category == "single"
            if anything or s.held_out() == (self.split == "test"):
                break
        place_objects(s, rng, 0.35 if self.layout == "slots" else 1.0)
        s.seed = rng.getrandbits(31)
        return s

    def compose(self, rng, category) -> Scene:
        """What is in a scene; where it is comes later."""
        a, b = rng.sample(self.nouns, 2)
        c, d = rng.sample(list(COLOURS), 2)
        relation = rng.choice(list(RELATIONS))
        s = Scene(category, [Group(a)])
        match category:
            case "two":
                s.groups = [Group(a), Group(b)]
            case "counting":
                s.groups = [Group(a, "", rng.choice((2, 3, 4)))]
            case "colors":
                s.groups = [Group(a, c)]
            case "position":
                s.groups, s.relation = [Group(a), Group(b)], relation
            case "attribution":
                s.groups = [Group(a, c), Group(b, d)]
            case "mixed":
                n = rng.choice((1, 2, 2))
                s.groups = [Group(noun, rng.choice(("", colour)), rng.choice((1, 1, 2, 3, 4)))
                            for noun, colour in ((a, c), (b, d))[:n]]
                if n == 2:
                    s.relation = rng.choice(("", relation))
        if rng.random() < 0.4:
            # never an object's own colour: white on white cannot be seen
            own = {g.colour for g in s.groups}
            colours = [k for k in COLOURS if k not in own]
            s.background = rng.choice(colours if rng.random() < 0.6 else list(PLACES))
        return s

    def caption(self, s: Scene, rng: random.Random) -> str:
        """One of many wordings of the scene: synonyms, order, articles, digits, background first
        or last."""
        g, relation = list(s.groups), s.relation
        if len(g) == 2 and rng.random() < 0.5:      # "a dog left of a car": "a car right of a dog"
            g, relation = g[::-1], INVERSE.get(relation, "")
        text = word_group(g[0], rng)
        if len(g) == 2:
            if relation:
                between = f" {rng.choice(RELATIONS[relation])} "
            else:
                between = rng.choices((" and ", " with ", " next to "), (6, 1, 1))[0]
            text += between + word_group(g[1], rng)
        text = rng.choices(("", "a picture of ", "an image of "), (10, 1, 1))[0] + text
        if s.background:
            where = rng.choice(background_wordings(s.background))
            text = f"{where}, {text}" if rng.random() < 0.2 else f"{text} {where}"
        return text.replace("a orange", "an orange")

    def render(self, s: Scene, size: int = 0) -> np.ndarray:
        """uint8 (size, size, 3). The same scene at another size is the same picture."""
        size = size or self.size
        rng = random.Random(s.seed)
        picture = Image.fromarray(background(s.background, size, rng))
        for group, x, y, side in s.objects:
            g, px = s.groups[group], max(4, round(side * size))
            sprite, shadow = self.sprites.get(g.noun, g.colour, px)
            left, top = round(x * size), round(y * size)
            pad = (shadow.width - px) // 2
            picture.paste((0, 0, 0), (left - pad, top - pad + max(1, px // 16)), shadow)
            # the sprite is premultiplied: out = sprite + (1 - alpha) picture
            under = Image.new("RGB", (px, px))
            under.paste(picture.crop((left, top, left + px, top + px)),
                        mask=sprite.getchannel("a").point(lambda a: 255 - a))
            under = np.asarray(under)
            rgb = np.asarray(Image.merge("RGB", sprite.split()[:3]))
            picture.paste(Image.fromarray(under + np.minimum(rgb, 255 - under)), (left, top))
        return np.asarray(picture)


# ---------------------------------------------------------------------------- caption parts
def word_group(g: Group, rng: random.Random) -> str:
    """"a red car", "one red car", "3 puppies"."""
    noun = g.noun
    if noun in SYNONYMS and rng.random() < 0.15:
        noun = SYNONYMS[noun]
    if g.count > 1:
        noun = PLURALS.get(noun, noun + "s")
    text = f"{g.colour} {noun}" if g.colour else noun
    if g.count > 1:
        return f"{NUMBERS[g.count] if rng.random() < 0.75 else g.count} {text}"
    article = "an" if text[0] in "aeiou" and not text.startswith("uni") else "a"
    return f"{rng.choices((article, 'one', 'the'), (12, 1, 1))[0]} {text}"


def background_wordings(name: str) -> tuple[str, ...]:
    if name in PLACES:
        return PLACES[name][1]
    return f"on a {name} background", f"against a {name} wall", f"on {name}"


# ---------------------------------------------------------------------------- picture parts
def place_objects(s: Scene, rng, freedom: float):
    """Puts objects into a scene. Each group gets a part of the picture, cut where the relation
    says, and in it each object gets a cell of the grid that leaves the objects largest."""
    n = [g.count for g in s.groups]
    regions = [(0, 0, 1, 1)] if len(n) == 1 else cut_in_two(s, n, rng)
    for k, (x0, y0, w, h) in enumerate(regions):
        # ties are drawn, once for each number of columns
        best = [(min(w / c, h / -(-n[k] // c)), rng.random(), -c) for c in range(1, n[k] + 1)]
        cols = -max(best)[2]
        rows = -(-n[k] // cols)
        cells = [(r, c) for r in range(rows) for c in range(cols)]
        cw, ch = w / cols, h / rows
        for r, c in sorted(rng.sample(cells, n[k])):
            side = min(cw, ch, 0.8) * rng.uniform(0.92 - 0.3 * freedom, 0.92)
            x = x0 + c * cw + (cw - side) * (0.5 + freedom * rng.uniform(-0.5, 0.5))
            y = y0 + r * ch + (ch - side) * (0.5 + freedom * rng.uniform(-0.5, 0.5))
            s.objects.append((k, x, y, side))


def cut_in_two(s: Scene, n: list[int], rng) -> list[tuple]:
    """(left, top, width, height) of both groups' parts of the picture."""
    axis = {"left of": 0, "right of": 0, "above": 1, "below": 1}.get(s.relation, rng.randrange(2))
    # an uneven cut where the counts differ, so that three cars need not be tiny beside one tree
    share = 0.5 + 0.12 * ((n[0] > n[1]) - (n[0] < n[1]))
    flip = s.relation in ("right of", "below") or (not s.relation and rng.random() < 0.5)
    if flip:
        share = 1 - share
    if axis == 0:
        first, second = (0, 0, share, 1), (share, 0, 1 - share, 1)
    else:
        first, second = (0, 0, 1, share), (0, share, 1, 1 - share)
    return [second, first] if flip else [first, second]


def background(name: str, size: int, rng) -> np.ndarray:
    """uint8 (size, size, 3): bands of gradients; stars at night, bubbles under water."""
    y, begin, column = (np.arange(size) + 0.5) / size, 0.0, np.zeros((size, 3))
    for end, top, bottom in background_bands(name, rng):
        mix = np.clip((y - begin) / (end - begin), 0, 1)[:, None]       # (size, 1)
        band = np.array(top) * (1 - mix) + np.array(bottom) * mix       # (size, 3)
        column = np.where((y >= begin)[:, None], band, column)
        begin = end
    out = np.repeat(column[:, None].clip(0, 255).astype(np.uint8), size, 1)
    if name not in ("night", "water"):
        return out
    picture = Image.fromarray(out)
    draw = ImageDraw.Draw(picture)
    for _ in range(14):
        x, y = rng.random() * size, rng.random() * size
        r = size * rng.uniform(0.006, 0.014) * (1 if name == "night" else 2)
        box = (x - r, y - r, x + r, y + r)
        if name == "night":
            draw.ellipse(box, fill=(250, 245, 210))
        else:
            draw.ellipse(box, outline=(190, 235, 245))
    return np.asarray(picture)


def background_bands(name: str, rng) -> list[tuple]:
    """(where it ends, colour at its top, colour at its bottom) of each band."""
    if name in PLACES:
        shift = rng.uniform(-0.08, 0.08)
        return [(end if end == 1 else end + shift, top, bottom) for end, top, bottom in
                PLACES[name][0]]
    if name:
        colour = np.array(COLOURS[name], float)
        top = np.minimum(255, colour * rng.uniform(1.0, 1.08))
        return [(1, top, colour * rng.uniform(0.88, 0.98))]
    pale = [rng.uniform(205, 245) for _ in range(3)]
    top = [min(255, v + rng.uniform(0, 10)) for v in pale]
    return [(1, top, [v - rng.uniform(0, 12) for v in pale])]
