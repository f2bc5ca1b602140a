"""Scenes, our "Shakespeare": pictures drawn from an atlas of 80 emoji sprites, and their captions.

A scene is drawn from its index alone: an epoch is endless, any worker can draw any picture, and
every machine draws the same. Six categories as in GenEval: single, two, counting, colors,
position, attribution; "mixed" combines them all, "three" has three things. One in ten
(noun, colour), (noun, count), {noun, noun} and (noun, relation, noun) is held out by a hash: drawn
for evaluation alone. Training scenes neither name a held-out combination nor show one by chance.
"""
import functools
import hashlib
import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

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
    "pink": (250, 125, 180), "brown": (125, 75, 45),
    "black": (45, 45, 50), "white": (235, 235, 238),
}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# place: ([(where a band ends, colour at its top, at its bottom), ..], wordings)
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
# place: (radius, how they are drawn) of its stars or bubbles
DECORATION = {"night": (1, {"fill": (250, 245, 210)}), "water": (2, {"outline": (190, 235, 245)})}
PLAIN = ("on a {} background", "against a {} wall", "on {}")       # a colour for a background
CATEGORIES = ("single", "two", "counting", "colors", "position", "attribution")
SHARE = {"single": 1.0, "two": 1.0, "counting": 1.5, "colors": 1.0, "position": 1.5,
         "attribution": 1.5, "mixed": 1.0}      # counting is the hardest
THREE_SHARE = 1.5       # of three things, in training scenes alone
SEEN_GAP = 0.05         # centres this far apart, in pictures, show a relation

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
    objects: list = field(default_factory=list)     # (group, left, top, side), of a picture of 1
    seed: int = 0           # of the decoration

    def facets(self) -> list[str]:
        """The combinations that can be held out: a model knows them only by composing."""
        nouns = [g.noun for g in self.groups]
        out = ["&".join(sorted(pair)) for pair in itertools.combinations(nouns, 2)]
        for g in self.groups:
            if g.colour:
                out.append(f"{g.noun}|{g.colour}")
            if g.count > 1:
                out.append(f"{g.noun}|{g.count}")
        if self.relation:
            out.append(relation_facet(*nouns, self.relation))
        return out

    def held_out(self) -> bool:
        return any(map(is_held_out, self.facets()))

    def centre(self, k: int) -> np.ndarray:
        """Mean place (x, y) of the objects of group k."""
        places = [(x + side / 2, y + side / 2) for g, x, y, side in self.objects if g == k]
        return np.mean(places, 0)

    def shows_held_out(self) -> bool:
        """Whether two groups show a held-out relation, as the checker would read it."""
        for a, b in itertools.permutations(range(len(self.groups)), 2):
            right, down = self.centre(b) - self.centre(a)
            for gap, relation in (right, "left of"), (down, "above"):
                facet = relation_facet(self.groups[a].noun, self.groups[b].noun, relation)
                if gap >= SEEN_GAP and is_held_out(facet):
                    return True
        return False

def relation_facet(a: str, b: str, relation: str) -> str:
    """One name for "a right of b" and "b left of a"."""
    if relation in ("right of", "below"):
        return relation_facet(b, a, INVERSE[relation])
    return f"{a}|{relation}|{b}"

@functools.lru_cache(None)
def is_held_out(facet: str) -> bool:
    """By a hash, so that it is the same everywhere; 26 / 256 = 10 % of all facets are."""
    return hashlib.sha256(facet.encode()).digest()[0] < 26

# ---------------------------------------------------------------------------- sprites
ATLAS = ASSETS / "atlas.webp"
ATLAS_COLUMNS, ATLAS_CELL = 10, 256

class Sprites:
    """Sprites by noun, recoloured and resized on demand.
    folder: transparent PNG or WebP files named by noun, instead of the atlas or, with add, beside
    it. new: the nouns that are added."""
    def __init__(self, folder: str = "", add: bool = False):
        self.folder, self.add = folder, add
        self.images = read_sprites(folder) if folder else read_atlas()
        self.new = list(self.images) if add else []
        for noun in self.new:
            if noun in NOUNS or noun in SYNONYMS.values():
                raise UserError(f"{folder}: '{noun}' is known already: give its file another name")
        if add:
            self.images = read_atlas() | self.images
        self.get = functools.lru_cache(8192)(self.draw)

    def __reduce__(self):
        return Sprites, (self.folder, self.add)     # a worker process opens its own

    def draw(self, noun: str, colour: str, px: int):
        """(sprite, shadow): premultiplied RGBA of px by px; soft, in grey, larger on all sides."""
        powers = (32, 64, 128)
        big = next((size for size in powers if size >= px), px)
        if px < big:
            image = self.get(noun, colour, big)[0]      # resized twice: fast, and smooth enough
        else:
            image = self.images[noun]
            if colour:
                image = recolour(image, COLOURS[colour])
            image = image.convert("RGBa")   # premultiplied, so that resizing draws no dark fringes
        method = Image.Resampling.LANCZOS if px in powers else Image.Resampling.BICUBIC
        image = image.resize((px, px), method)
        pad = max(2, px // 8)               # room for the blur to fade out
        shadow = Image.new("L", (px + 2 * pad, px + 2 * pad))
        shadow.paste(image.getchannel("a").point(lambda a: a * 0.35), (pad, pad))
        return image, shadow.filter(ImageFilter.GaussianBlur(max(0.6, px / 24)))

def read_sprites(folder: str) -> dict[str, Image.Image]:
    files = [p for p in sorted(Path(folder).glob("*")) if p.suffix.lower() in (".png", ".webp")]
    if not files:
        raise UserError(f"no .png or .webp sprites in {folder}: name them by noun, as dog.png")
    return {" ".join(p.stem.replace("_", " ").lower().split()): read_sprite(p) for p in files}

def read_sprite(path: Path) -> Image.Image:
    try:
        image = Image.open(path).convert("RGBA")
    except OSError as e:
        raise UserError(f"{path} is not a picture, or damaged: {e}") from None
    least, most = image.getchannel("A").getextrema()
    if most <= 8:
        raise UserError(f"{path} is empty: all of it is transparent")
    if least > 8:
        raise UserError(f"{path} is opaque: make what is around the thing transparent")
    return square(image)

def read_atlas() -> dict[str, Image.Image]:
    try:
        atlas = Image.open(ATLAS).convert("RGBA")
    except OSError as e:
        raise UserError(f"{ATLAS} is missing or damaged ({e}): restore it with git") from None
    return {noun: atlas.crop(atlas_cell(k)) for k, noun in enumerate(NOUNS)}

def atlas_cell(k: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of noun number k in the atlas."""
    x, y = k % ATLAS_COLUMNS * ATLAS_CELL, k // ATLAS_COLUMNS * ATLAS_CELL
    return x, y, x + ATLAS_CELL, y + ATLAS_CELL

def square(image: Image.Image) -> Image.Image:
    """Crops to what is opaque and pads to a square cell."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    image = ImageOps.contain(image, (ATLAS_CELL - 4, ATLAS_CELL - 4), Image.Resampling.LANCZOS)
    out = Image.new("RGBA", (ATLAS_CELL, ATLAS_CELL))
    out.paste(image, ((ATLAS_CELL - image.width) // 2, (ATLAS_CELL - image.height) // 2))
    return out

def recolour(image: Image.Image, rgb) -> Image.Image:
    """Maps luminance from a dark shade over the colour, at the sprite's median, to nearly white."""
    a = np.asarray(image).astype(np.float32)
    luminance = a[..., :3] @ np.float32([.299, .587, .114])
    low, middle, high = np.percentile(luminance[a[..., 3] > 128], (2, 50, 98))     # where opaque
    low, high = min(low, middle - 25), max(high, middle + 25)   # flat sprites keep their flatness
    colour = np.float32(rgb)
    share = 0.35 if sum(rgb) > 200 else 0.6                     # black must not turn grey
    light = colour * share + 255 * (1 - share)
    tones = np.stack([colour * 0.3, colour * 0.62, colour, colour * 0.7 + light * 0.3, light])
    at = np.float32([low, (low + middle) / 2, middle, (middle + high) / 2, high])
    for c in range(3):
        a[..., c] = np.interp(luminance, at, tones[:, c])
    return Image.fromarray(a.round().clip(0, 255).astype(np.uint8))

# ---------------------------------------------------------------------------- scenes
class Scenes:
    """scenes[i] -> (picture uint8 (size, size, 3), caption), for any i >= 0.
    split: train or test (see above); nouns: the first so many, 0 = all; layout: slots (objects in
    the middle of their cells) or free (anywhere within them).
    atlas: a folder of sprites. Where old is more than 0 their nouns are added to the shipped ones:
    that share of training scenes shows shipped ones alone, each other scene a new one."""
    def __init__(self, size: int = 64, split: str = "train", seed: int = 0, nouns: int = 0,
                 layout: str = "slots", atlas: str = "", old: float = 0.0):
        self.size, self.split, self.seed, self.layout = size, split, seed, layout
        self.sprites = Sprites(atlas, add=bool(atlas) and old > 0)
        self.new, self.old = self.sprites.new, old
        shipped = [noun for noun in self.sprites.images if noun not in self.new]
        self.nouns = shipped[:nouns or None] + self.new
        if len(self.nouns) < 2:
            raise UserError(f"scenes want at least two nouns, got {self.nouns}")
        self.categories = (*CATEGORIES, "three") if len(self.nouns) > 2 else CATEGORIES

    def __getitem__(self, i: int):
        s = self.scene(i)
        return self.render(s), self.caption(s, random.Random(f"caption/{self.seed}/{i}"))

    def scene(self, i: int, category: str = "") -> Scene:
        """Scene number i, of this category or of a random one.
        Held-out scenes without a category have no three things, so that held-out loss and Frechet
        distance are measured on the same scenes as ever."""
        rng = random.Random(f"{self.seed}/{self.split}/{i}")
        training = self.split == "train"
        share = dict(SHARE)
        if training and "three" in self.categories:
            share["three"] = THREE_SHARE
        category = category or rng.choices(list(share), list(share.values()))[0]
        fresh = bool(self.new) and not (training and rng.random() < self.old)
        for _ in range(1000):
            s = self.compose(rng, category, fresh)
            if training and len(s.groups) == 2 and not s.relation and rng.random() < 0.5:
                s.relation = rng.choice(list(RELATIONS))    # captions that say more teach more
            # one noun alone is no combination: only the seeds differ
            if category != "single" and s.held_out() == training:
                continue
            place_objects(s, rng, 0.35 if self.layout == "slots" else 1.0)
            if not (training and s.shows_held_out()):
                break
        if not s.objects:           # so few nouns that every pair is held out
            place_objects(s, rng, 0)
        s.seed = rng.getrandbits(31)
        return s

    def some_nouns(self, rng, n: int, fresh: bool) -> list[str]:
        """n of them; fresh: the first is new. Else none is, where there are new ones."""
        if not fresh:
            return rng.sample(self.nouns[:len(self.nouns) - len(self.new)], n)
        first = rng.choice(self.new)
        return [first, *rng.sample([noun for noun in self.nouns if noun != first], n - 1)]

    def compose(self, rng, category, fresh: bool = False) -> Scene:
        """What is in a scene; where it is comes later. fresh: a new noun is."""
        a, b = self.some_nouns(rng, 2, fresh)
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
            case "three":
                s.groups = [Group(noun) for noun in self.some_nouns(rng, 3, fresh)]
            case "mixed":
                s.groups = []
                for noun, colour in ((a, c), (b, d))[:rng.choice((1, 2, 2))]:
                    colour = rng.choice(("", colour))
                    s.groups.append(Group(noun, colour, rng.choice((1, 1, 2, 3, 4))))
                if len(s.groups) == 2:
                    s.relation = rng.choice(("", relation))
        if rng.random() < 0.4:
            # never an object's own colour: white on white cannot be seen
            colours = [k for k in COLOURS if all(k != g.colour for g in s.groups)]
            s.background = rng.choice(colours if rng.random() < 0.6 else list(PLACES))
        return s

    @staticmethod
    def caption(s: Scene, rng: random.Random) -> str:
        """One of many wordings: synonyms, order, articles, digits, background first or last."""
        g, relation = s.groups, s.relation
        if len(g) == 2 and rng.random() < 0.5:      # "a dog left of a car": "a car right of a dog"
            g, relation = g[::-1], INVERSE.get(relation, "")
        text = word_group(g[0], rng)
        if len(g) == 3:
            text += f", {word_group(g[1], rng)} and {word_group(g[2], rng)}"
        elif len(g) == 2:
            if relation:
                between = f" {rng.choice(RELATIONS[relation])} "
            else:
                between = rng.choices((" and ", " with ", " next to "), (6, 1, 1))[0]
            text += between + word_group(g[1], rng)
        text = rng.choices(("", "a picture of ", "an image of "), (10, 1, 1))[0] + text
        if s.background:
            wordings = PLACES[s.background][1] if s.background in PLACES else PLAIN
            where = rng.choice(wordings).format(s.background)
            text = f"{where}, {text}" if rng.random() < 0.2 else f"{text} {where}"
        return text.replace("a orange", "an orange")

    def render(self, s: Scene, size: int = 0) -> np.ndarray:
        """uint8 (size, size, 3). The same scene at another size is the same picture."""
        size = size or self.size
        picture = Image.fromarray(background(s.background, size, random.Random(s.seed)))
        for group, x, y, side in s.objects:
            g, px = s.groups[group], max(4, round(side * size))
            sprite, shadow = self.sprites.get(g.noun, g.colour, px)
            left, top = round(x * size), round(y * size)
            pad = (shadow.width - px) // 2
            picture.paste((0, 0, 0), (left - pad, top - pad + max(1, px // 16)), shadow)
            # the sprite is premultiplied: out = sprite + (1 - alpha) picture
            *rgb, alpha = sprite.split()
            under = Image.new("RGB", (px, px))
            crop = picture.crop((left, top, left + px, top + px))
            under.paste(crop, mask=ImageChops.invert(alpha))
            picture.paste(ImageChops.add(Image.merge("RGB", rgb), under), (left, top))
        return np.array(picture)

def word_group(g: Group, rng: random.Random) -> str:
    """"a red car", "one red car", "3 puppies"."""
    noun = g.noun
    if noun in SYNONYMS and rng.random() < 0.15:
        noun = SYNONYMS[noun]
    if g.count > 1:
        number = NUMBERS[g.count] if rng.random() < 0.75 else g.count
        return " ".join(f"{number} {g.colour} {PLURALS.get(noun, noun + 's')}".split())
    text = f"{g.colour} {noun}".strip()
    article = "an" if text[0] in "aeiou" and not text.startswith("uni") else "a"
    return rng.choices((article, "one", "the"), (12, 1, 1))[0] + " " + text

def place_objects(s: Scene, rng, freedom: float):
    """Puts objects into a scene. Each group gets a part of the picture, cut where the relation
    says, and in it each object gets a cell of the grid that leaves the objects largest."""
    regions = [(0, 0, 1, 1)]
    if len(s.groups) > 1:
        regions = cut_in_two(s, rng) if len(s.groups) == 2 else cut_in_three(rng)
    for k, (x0, y0, w, h) in enumerate(regions):
        n = s.groups[k].count
        grids = [(min(w / c, h / -(-n // c)), rng.random(), -c) for c in range(1, n + 1)]
        cols = -max(grids)[2]           # ties are drawn
        rows = -(-n // cols)
        cw, ch = w / cols, h / rows
        for cell in sorted(rng.sample(range(rows * cols), n)):
            r, c = divmod(cell, cols)
            side = min(cw, ch, 0.8) * rng.uniform(0.92 - 0.3 * freedom, 0.92)
            x = x0 + c * cw + (cw - side) * (0.5 + freedom * rng.uniform(-0.5, 0.5))
            y = y0 + r * ch + (ch - side) * (0.5 + freedom * rng.uniform(-0.5, 0.5))
            s.objects.append((k, x, y, side))

def cut_in_two(s: Scene, rng) -> list[tuple]:
    """(left, top, width, height) of both groups' parts of the picture."""
    axis = {"left of": 0, "right of": 0, "above": 1, "below": 1}.get(s.relation, rng.randrange(2))
    # an uneven cut where the counts differ, so that three cars need not be tiny beside one tree
    a, b = (g.count for g in s.groups)
    share = 0.5 + 0.12 * ((a > b) - (a < b))
    flip = s.relation in ("right of", "below") or (not s.relation and rng.random() < 0.5)
    share = 1 - share if flip else share
    first, second = (0, 0, share, 1), (share, 0, 1 - share, 1)
    if axis == 1:
        first, second = (0, 0, 1, share), (0, share, 1, 1 - share)
    return [second, first] if flip else [first, second]

def cut_in_three(rng) -> list[tuple]:
    """One half of the picture and two quarters, the half on any side."""
    half = rng.choice((0, 0.5))
    other = 0.5 - half
    regions = [(half, 0, 0.5, 1), (other, 0, 0.5, 0.5), (other, 0.5, 0.5, 0.5)]
    if rng.random() < 0.5:
        regions = [(y, x, h, w) for x, y, w, h in regions]
    rng.shuffle(regions)
    return regions

def background(name: str, size: int, rng) -> np.ndarray:
    """uint8 (size, size, 3): bands of gradients; stars at night, bubbles under water."""
    if name in PLACES:
        bands, shift = PLACES[name][0], rng.uniform(-0.08, 0.08)
        bands = [(end + shift * (end < 1), top, bottom) for end, top, bottom in bands]
    elif name:
        colour = np.array(COLOURS[name], float)
        top = np.minimum(255, colour * rng.uniform(1.0, 1.08))
        bands = [(1, top, colour * rng.uniform(0.88, 0.98))]
    else:
        pale = [rng.uniform(205, 245) for _ in range(3)]
        top = [min(255, v + rng.uniform(0, 10)) for v in pale]
        bands = [(1, top, [v - rng.uniform(0, 12) for v in pale])]

    y = (np.arange(size) + 0.5) / size
    begin, column = 0.0, np.zeros((size, 3))
    for end, top, bottom in bands:
        mix = np.clip((y - begin) / (end - begin), 0, 1)[:, None]       # (size, 1)
        band = np.array(top) * (1 - mix) + np.array(bottom) * mix       # (size, 3)
        column = np.where((y >= begin)[:, None], band, column)
        begin = end
    picture = Image.fromarray(np.repeat(column[:, None].clip(0, 255).astype(np.uint8), size, 1))
    if name in DECORATION:
        radius, how = DECORATION[name]
        draw = ImageDraw.Draw(picture)
        for _ in range(14):
            x, y = rng.random() * size, rng.random() * size
            r = radius * size * rng.uniform(0.006, 0.014)
            draw.ellipse((x - r, y - r, x + r, y + r), **how)
    return np.asarray(picture)
