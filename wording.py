"""Free English: captions as people type them, four in five of those that training reads.

    python wording.py [n]               prints n wordings of training scenes

Other names, shades, a colour behind the noun or in a second sentence, digits, no article, every way
to say a relation, places in front or behind, adjectives, verbs and words that mean nothing here,
politeness, typing errors. scenes.py has the plain grammar in which held-out prompts are worded.
"""
import difflib
import functools
import random
import re
import sys
import textwrap

from common import friendly
from scenes import COLOURS, INVERSE, NUMBERS, PLURALS, RELATIONS, SYNONYMS, Group, Scene, Scenes

def entries(text: str) -> list[str]:
    return [" ".join(entry.split()) for entry in text.split(",") if entry.strip()]

def word_table(text: str) -> dict[str, list[str]]:
    """{key: entries} of lines `key: entry, entry`; a line without a key goes on with the last."""
    found = {}
    for line in text.strip().splitlines():
        key, colon, values = line.rpartition(": ")
        if colon:
            latest = found.setdefault(key.strip(), [])
        latest += entries(values)
    return found

# ---------------------------------------------------------------------------- words
OTHER_NAMES = word_table("""
    dog: puppy, pup, doggy
    cat: kitten, kitty
    panda: panda bear
    mushroom: toadstool
    car: automobile, auto
    rocket: spaceship, rocket ship, space rocket
    house: home, cottage
    rabbit: bunny, hare
    bear: teddy bear, teddy
    koala: koala bear
    pig: piglet
    frog: toad
    chick: baby chicken, baby chick
    duck: duckling
    turtle: tortoise
    bee: bumblebee, honey bee
    ladybug: ladybird
    dinosaur: dino, t-rex
    watermelon: melon
    eggplant: aubergine
    donut: doughnut
    hamburger: burger, cheeseburger
    pizza: slice of pizza, pizza slice
    ice cream: ice-cream, icecream, ice cream cone
    cake: birthday cake
    cactus: cactus plant
    tulip: tulip flower
    bus: school bus, coach
    airplane: plane, aeroplane, jet
    sailboat: boat, sailing boat, sailing ship
    helicopter: chopper
    drum: snare drum
    gift: present, gift box, wrapped present
    book: closed book
    bell: hand bell
    crown: royal crown
    hat: top hat
    shoe: sneaker, trainer, running shoe
    clock: alarm clock
    camera: photo camera
    light bulb: lightbulb, bulb
    teapot: tea pot
    robot: droid
    snowman: snow man
    moon: crescent moon
    soccer ball: football, soccerball
    basketball: basket ball
    cup: mug, coffee cup, coffee mug
    backpack: rucksack, school bag
    castle: fortress
""")
MORE_PLURALS = {                # of words that the plain grammar does not use
    "kitty": "kitties", "doggy": "doggies", "teddy": "teddies", "coach": "coaches",
    "t-rex": "t-rexes", "man": "men", "box": "boxes", "fortress": "fortresses",
}
SHADES = word_table("""
    red: crimson, scarlet, ruby, cherry red, bright red, dark red
    orange: tangerine, bright orange, amber
    yellow: golden, gold, mustard, bright yellow
    green: emerald, lime green, olive, dark green, light green
    blue: navy, azure, sky blue, dark blue, light blue, royal blue
    purple: violet, lavender, deep purple, lilac
    pink: rosy, hot pink, magenta, rose, light pink
    brown: chocolate, tan, dark brown, chestnut
    black: jet black, jet-black, ebony, pitch black
    white: snowy, ivory, snow-white, pure white
""")
PLACE_WORDS = word_table("""
    desert: in the desert, in a desert, on desert sand, in the sahara, on a sand dune
        in the sandy desert, out in the desert
    beach: at the beach, on the beach, by the sea, at the seaside, on the shore, on a sandy beach
        on a beach, at the seashore
    night: at night, under the stars, in the night, at midnight, in the dark, under a starry sky
        in the night sky, at nighttime, on a starry night, late at night
    water: under water, in the ocean, underwater, under the sea, beneath the waves, in the sea
        in the water, deep in the ocean, at the bottom of the sea
    meadow: in a meadow, on the grass, in a green field, on a lawn, in the grass, on green grass
        in a grassy field, in the meadow, on a green meadow, in a field
    snow: in the snow, on snow, in winter, on a snowy field, on a snowy day, on the snow
        in deep snow, in a snowy landscape
""")
FILLERS = """cute little big huge tiny shiny fluffy happy old small large round lovely soft nice
    funny giant beautiful adorable smiling sleepy simple cartoon realistic glossy plain pretty
    single fat thin sad angry new fancy cool friendly enormous massive baby fresh tasty wooden toy
    3d bright""".split()
VERBS = """standing sitting lying floating flying placed located resting hanging positioned hovering
    jumping sleeping waiting parked walking playing swimming""".split()
INTRODUCTIONS = ("a photo of |photo of |picture: |draw |draw me |please draw |can you draw |"
    "could you make |i want |i'd like |i would like |i would like a picture of |show me |generate |"
    "create an image of |an illustration of |a 3d render of |an emoji of |emoji of |"
    "a photograph of |imagine |give me |make |make me |here is |look, |this is |a picture of |"
    "an image of |a drawing of |a painting of |a picture with |picture of |image of |can i have |"
    "can i see |let me see |a cartoon of |a close-up of |we see |i need |paint |please show |"
    "a sketch of |an icon of |hi, |hello! |ok, |now |hey, could you draw ").split("|")
ENDINGS = (" please| please|, please|, thanks|, thank you|, photo|, 3d render|, high quality|"
    ", cartoon style|!|?|.|...|, 4k|, hd|, emoji style|, digital art|, studio light|, cute|"
    ", no text|, centered| pls| for my daughter").split("|")
# words of no meaning here; none is a thing, a colour, a number or a place
COMMON = """about actually after again ago all almost already also always am another any anyway are
    as ask away be because been before being best better bit both bring but buy call came could day
    did different do does done each easy else end enough even ever every exactly fast feel few find
    fine for found from fun get go going good got great guess had half happen hard has have he help
    her here him his hold hope how however i idea if important in into is job just keep kind know
    last later least let life like live long lot love made many maybe me mean might mind mine moment
    more most much must my name need never often only or other our out own part people perfect
    perhaps play please point possible probably problem project put quick quite rather read ready
    real really reason right said same saw say see seem send set several shall she should show side
    since so some someone something soon sort special start still stop story such sure take talk
    tell than thank that then there these thing think this those though thought through time today
    together told tomorrow too took true try turn type until us use usual version very wait want was
    way we week well went were what when where which while who whole why will wish without wonder
    word work world would write yes yesterday yet you your""".split()
SYLLABLES = """ba be bo da di do fa fi ga go ha hi jo ka ke ki la le lo ma mi mo na ne no pa pe po
    ra re ri ro sa se si ta te ti to va ve vi wa we za zo al an ar el en er in is on or un us
    """.split()

# ---------------------------------------------------------------------------- turns of phrase
# a, b: the two things; x: left or right; y: the other one; v: a verb, or nothing
SIDEWAYS = entries("""{a} {v}{x} of {b}, {a} {v}to the {x} of {b}, {a} {v}on the {x} of {b},
    {a} {v}{x} of {b}, {a} {v}to the {x} of {b}, {a} {v}on the {x} side of {b},
    {a} ({x}) and {b} ({y}), {a} on the {x} and {b} on the {y}, {b} with {a} to its {x},
    {b} with {a} on its {x}, to the {x} of {b} is {a}, {a} with {b} on its {y}, {b} has {a} on its
    {x}, {a} at the {x} of {b}, {a} {v}on the {x}-hand side of {b}, {a} at {x} and {b} at {y}""")
SIDEWAYS += ["on the {x} {a}, on the {y} {b}", "{x}: {a}, {y}: {b}", "{x} of {b}, {a}",
             "{a} on the {x}, {b} on the {y}", "{b}, and to its {x} {a}"]
# t: the thing at the top; l: the lower one
UPWARDS = entries("""{t} {v}above {l}, {t} {v}over {l}, {t} {v}on top of {l}, {t} up above {l},
    {t} higher than {l}, {t} {v}on {l}, {l} with {t} above it, {l} with {t} over it,
    {l} with {t} on top, above {l} is {t}, {t} flying over {l}, {t} floating above {l},
    {t} sitting on {l}, {t} at the top and {l} at the bottom, {t} hovering above {l}""")
UPWARDS += ["{l}, and above it {t}", "above {l}, {t}", "at the top {t}, at the bottom {l}",
            "top: {t}, bottom: {l}"]
DOWNWARDS = entries("""{l} {v}below {t}, {l} {v}under {t}, {l} {v}beneath {t},
    {l} {v}underneath {t}, {t} with {l} below it, {t} with {l} underneath, {t} and below it {l},
    under {t} is {l}, beneath {t} there is {l}, {l} at the bottom and {t} at the top,
    {l} hiding under {t}, {t} with {l} beneath it, {l} down below {t}""")
DOWNWARDS += ["{t}, and under it {l}", "below {t}, {l}"]
JOINS = (" and | and | and | with | next to | beside | near | together with | alongside | plus |"
    " & | by | along with |, | holding | and also | and then | accompanied by | close to |, and |"
    " watching | looking at | carrying | playing with ").split("|")
TRIPLES = ("{}, {} and {}|{}, {} and {}|{}, {}, {}|{} and {} and {}|{} with {} and {}|"
    "{}, {}, and {}|{}, {} plus {}|{} next to {} and {}|{} & {} & {}").split("|")
# c: a colour, a: with its article
ON_COLOUR = ("on {a} background|on {a} background|against {a} wall|on {c}|in front of {a} wall|"
    "with {a} background|{c} background|{c} backdrop|the background is {c}|on {a} backdrop|"
    "background: {c}|with {c} behind|against {c}|over {a} background|background in {c}|"
    "all on {c}").split("|")
IN_PLACE = ("{c} background|background: {c}|with {a} background|{c} scene|{c} scenery").split("|")

# ---------------------------------------------------------------------------- captions
def training_caption(scene: Scene, rng: random.Random) -> str:
    """Free English in four of five, else the plain grammar that held-out prompts are worded in."""
    return wide(scene, rng) if rng.random() < 0.8 else Scenes.caption(scene, rng)

def wide(scene: Scene, rng: random.Random) -> str:
    """One of many wordings of a scene, as people type."""
    groups, relation = list(scene.groups), scene.relation
    if len(groups) == 2 and rng.random() < 0.5:
        groups, relation = groups[::-1], INVERSE.get(relation, "")
    elif len(groups) == 3:
        rng.shuffle(groups)
    text, later = said_of(groups[0], rng)
    if len(groups) == 1 and rng.random() < 0.12:
        text += f" {rng.choice(VERBS)}"
    elif len(groups) > 1:
        texts = [one_of_several(g, rng) for g in groups]
        text, later = join_things(texts, relation, rng), ""
    text = introduce(text, groups[0].count > 1, rng)
    if scene.background:
        text = add_place(text, scene.background, rng)
    if later:
        text += rng.choice((".", ",", ".", ";", "!", "?")) + f" {later}"
    r = rng.random()
    if r < 0.15:
        text += rng.choice(ENDINGS)
    elif r < 0.19:
        text += rng.choice((" ", ", ")) + strange_words(rng, rng.randint(1, 3))
    return misspell(text, rng) if rng.random() < 0.06 else text

def said_of(g: Group, rng) -> tuple[str, str]:
    """("two dogs", "they are blue"): a group, and the sentence about its colour or "" ."""
    if not g.colour or rng.random() > 0.08:
        return with_number(described(g, rng), g.count, rng), ""
    colour = shade(g.colour, rng)
    if g.count > 1:
        later = ("they are {c}", "all {c}", "they're {c}", "make them {c}", "and they are {c}",
                 "all of them {c}")
    else:
        later = ("it is {c}", "it's {c}", "make it {c}", "its colour is {c}", "and it is {c}")
    plain = with_number(filler(rng) + name(g, rng), g.count, rng)
    return plain, rng.choice(later).format(c=colour)

def one_of_several(g: Group, rng) -> str:
    """A group beside others: a later sentence would not say which one it is about."""
    strange = strange_words(rng, 1) + " " if rng.random() < 0.05 else ""
    return strange + with_number(described(g, rng), g.count, rng, bare=0.45)

def described(g: Group, rng) -> str:
    """"red car", "car that is red", "small red cars": a group without article or number."""
    noun, adjective = name(g, rng), filler(rng)
    if not g.colour:
        return adjective + noun
    colour = shade(g.colour, rng)
    if rng.random() < 0.65:
        if rng.random() < 0.7:
            return f"{adjective}{colour} {noun}"
        return f"{colour} {adjective}{noun}"
    be = "are" if g.count > 1 else "is"
    after = (f" that {be} {colour}", f" which {be} {colour}", f" in {colour}", f" painted {colour}",
             f" coloured {colour}", f" colored {colour}", f" {colour} in colour", f", {colour}",
             f" ({colour})", f" of {colour} colour", f" {be} {colour}")
    return adjective + noun + rng.choice(after)

def name(g: Group, rng) -> str:
    noun = g.noun
    if noun in OTHER_NAMES and rng.random() < 0.3:
        noun = rng.choice(OTHER_NAMES[noun])
    return plural(noun) if g.count > 1 else noun

def names(noun: str, many: bool = False) -> list[str]:
    """All that a noun is called in captions, in the plural where there are many."""
    singular = [noun, *OTHER_NAMES.get(noun, ())]
    if not many:
        return singular
    plain = [PLURALS.get(n, n + "s") for n in (noun, SYNONYMS.get(noun, noun))]
    return list(dict.fromkeys([*map(plural, singular), *plain]))

def plural(noun: str) -> str:
    """By the last word, or the first of "slice of pizza"."""
    first, of, rest = noun.partition(" of ")
    *before, last = first.split(" ")
    known = PLURALS | MORE_PLURALS
    return " ".join([*before, known.get(last, last + "s")]) + of + rest

def shade(colour: str, rng) -> str:
    word = rng.choice(SHADES[colour]) if rng.random() < 0.25 else colour
    if rng.random() < 0.04:
        word += rng.choice(("-coloured", "-colored"))
    return word

def filler(rng) -> str:
    return rng.choice(FILLERS) + " " if rng.random() < 0.2 else ""

def with_article(text: str) -> str:
    vowel = text[0] in "aeiou" and not text.startswith("uni")
    return ("an " if vowel else "a ") + text

def with_number(text: str, count: int, rng, bare: float = 0.25) -> str:
    """"a dog", "dog" (with chance bare), "2 dogs", "dogs, two of them"."""
    if count == 1:
        if rng.random() < bare:
            return text
        ways = (with_article(text), f"one {text}", f"the {text}", f"just {with_article(text)}")
        return rng.choices(ways, (12, 2, 2, 1))[0]
    number = NUMBERS[count]
    if rng.random() < 0.1:
        return rng.choice((f"{text}, {number} of them", f"{text} ({number})", f"{text} ({count})"))
    group = {2: ("a pair of", "a couple of"), 3: ("a trio of",), 4: ("a group of four",)}[count]
    ways = (number, str(count), rng.choice(group), f"{count}x")
    return f"{rng.choices(ways, (10, 8, 2, 1))[0]} {text}"

def join_things(texts: list[str], relation: str, rng) -> str:
    """Two or three things, and how the first is placed to the second."""
    if len(texts) == 3:
        return rng.choice(TRIPLES).format(*texts)
    if not relation:
        return texts[0] + rng.choice(JOINS) + texts[1]
    verb = rng.choices(("", "is ", rng.choice(VERBS) + " "), (13, 3, 4))[0]
    a, b = texts
    if relation in ("left of", "right of"):
        x, y = ("left", "right") if relation == "left of" else ("right", "left")
        return rng.choice(SIDEWAYS).format(a=a, b=b, x=x, y=y, v=verb)
    top, low = (a, b) if relation == "above" else (b, a)
    ways = UPWARDS if rng.random() < 0.5 else DOWNWARDS
    return rng.choice(ways).format(t=top, l=low, v=verb)

def introduce(text: str, many: bool, rng) -> str:
    r = rng.random()
    if r < 0.1:
        return f"there {'are' if many else 'is'} {text}"
    if r < 0.42:
        return rng.choice(INTRODUCTIONS) + text
    if r < 0.48:
        return f"{strange_words(rng, rng.randint(1, 4))} {text}"
    return text

def add_place(text: str, background: str, rng) -> str:
    """Behind the text or in front of it."""
    colour = shade(background, rng) if background in SHADES and rng.random() < 0.5 else background
    ways = ON_COLOUR if background in COLOURS else IN_PLACE
    if background in PLACE_WORDS and rng.random() < 0.85:
        ways = PLACE_WORDS[background]
    where = rng.choice(ways).format(c=colour, a=with_article(colour))
    if rng.random() < 0.1:
        where = f"{rng.choice(VERBS)} {where}"
    r = rng.random()
    if r < 0.14:
        return f"{where}{',' if r < 0.1 else ''} {text}"
    return text + rng.choice((" ", " ", " ", ", ", ". ", " - ")) + where

def strange_words(rng, n: int) -> str:
    """Words that mean nothing here: common ones, and invented ones."""
    words = []
    for _ in range(n):
        if rng.random() < 0.6:
            words.append(rng.choice(COMMON))
        else:
            words.append("".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))))
    return " ".join(words)

def misspell(text: str, rng) -> str:
    """A letter of one longer word is left out, doubled, or swapped with the next."""
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if long:
        i = rng.choice(long)
        word = words[i]
        k = rng.randrange(1, len(word) - 1)
        middle = rng.choice(("", word[k] * 2 + word[k + 1], word[k + 1] + word[k]))
        end = k + 2 if middle else k + 1
        words[i] = word[:k] + middle + word[end:]
    return " ".join(words)

# ---------------------------------------------------------------------------- what is known
# words that follow an article, but are no thing to draw
FRAMES = """angle animal art artist artwork atmosphere background birthday body border bottom center
    centre character child children color colors colour colours corner design drawing edge effect
    day evening eye eyes face favorite favourite focus food friend friends front fruit group half
    head hour icon illustration image kids light lights line middle minute mood morning mouth nature
    object objects oil painting pair part pattern photo photograph pic picture piece portrait pose
    poster quality render request row scene scenery shadow shape shot side size sketch sky smile son
    space sticker style summer texture theme tone top view wall wallpaper watercolor weather width
    winter year""".split()
LEADS = set("a an the some another draw show paint make generate create imagine me".split())
LEADS |= {*NUMBERS.values(), "five", "six", "seven", "eight", "nine", "ten", "couple", "trio"}
JOINING = set("and plus with beside near to above over below under of beneath behind on in".split())

@functools.lru_cache
def said_words() -> set[str]:
    """All words of captions but nouns' names."""
    turns = [*INTRODUCTIONS, *ENDINGS, *SIDEWAYS, *UPWARDS, *DOWNWARDS, *JOINS, *ON_COLOUR,
             *IN_PLACE, *sum(PLACE_WORDS.values(), []), *sum(SHADES.values(), []), *COLOURS,
             *FILLERS, *VERBS, *COMMON, *FRAMES, *LEADS, *JOINING,
             "left right back they them their"]
    return set(re.findall(r"[a-z'-]+", " ".join(turns)))

def is_no_thing(word: str) -> bool:
    ending = "(ing|ed|ly|coloured|colored)$"
    return len(word) < 3 or word in said_words() or bool(re.search(f"[^a-z]|{ending}", word))

def unknown_things(prompt: str, nouns: list[str]) -> dict[str, list[str]]:
    """{word: names that are spelt alike} of words that no caption has, in the place of a thing: the
    last one behind an article or a number, or joined to a thing. Typing errors pass."""
    singular = [name for noun in nouns for name in names(noun)]
    called = singular + [name for noun in nouns for name in names(noun, many=True)]
    inside = {word for name in called for word in name.split()}
    words = re.findall(r"[a-z][a-z'-]*|\d+|[^\w\s]", prompt.lower())
    goes_on = {"of", "me", "hand", *FILLERS, *FRAMES, *COLOURS, *VERBS}
    found, leads, last = {}, True, ""           # last: the word before
    for word, after in zip(words, [*words[1:], "."]):
        new = not (word in inside or is_no_thing(word))
        if new and leads and is_no_thing(after) and after not in goes_on:
            slip, alike = (0.8, 0.77) if len(word) > 6 else (0.85, 0.85)    # a horse is no house
            if not difflib.get_close_matches(word, called, 1, slip):
                found[word] = difflib.get_close_matches(word, singular, 2, alike)
        if word in LEADS or word.isdigit():
            leads = True
        elif word in JOINING:
            leads = last in inside or last in found or (word == "of" and last in FRAMES)
        elif not (word in FILLERS or word in COLOURS or (new and word not in found)):
            leads = False
        last = word
    return found

def all_known(nouns: list[str]) -> str:
    """What can be asked for, a kind a paragraph."""
    def listed(words, more=None):
        more = more or {}
        full = [f"{w} ({', '.join(more[w])})" if w in more else w for w in words]
        return textwrap.fill(", ".join(full), 96, initial_indent="  ", subsequent_indent="  ")

    places = {place: ways[:3] for place, ways in PLACE_WORDS.items()}
    return "\n".join([
        f"{len(nouns)} things, and other names of them:", listed(nouns, OTHER_NAMES),
        "colours, and shades of them:", listed(COLOURS, SHADES),
        "numbers:", listed(NUMBERS.values()), "relations:", listed(RELATIONS, RELATIONS),
        "backgrounds, beside the colours:", listed(places, places)])

def main(argv):
    scenes = Scenes(64, "train")
    for i in range(int(argv[0]) if argv else 20):
        print(training_caption(scenes.scene(i), random.Random(i)))

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
