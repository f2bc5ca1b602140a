"""What a network of scenes knows (`sample.py --list`), and which things of a prompt it never saw.

There is no dictionary here. A word that the captions lack is taken for a thing by its place: the
last one after an article or a number, alone at the beginning, or beside a known thing.
"""
import difflib
import functools
import re
import shutil
import textwrap

from common import UserError
from scenes import COLOURS, NOUNS, NUMBERS, RELATIONS
from wording import (
    COMMON,
    DOWNWARDS,
    ENDINGS,
    FILLERS,
    IN_PLACE,
    INTRODUCTIONS,
    JOINS,
    ON_COLOUR,
    OTHER_NAMES,
    PLACE_WORDS,
    SHADES,
    SIDEWAYS,
    UPWARDS,
    VERBS,
    names,
)

# Kinds of words. A later kind wins; in {} are the tables of scenes.py and wording.py.
GRAMMAR = {
    "participle": "{verbs}",
    # they follow an article, but are no thing to draw; or they have been seen as a place
    "frame": """{places} angle animal animals art artist artwork atmosphere background birthday body
        border bottom center centre character child children color colors colour colours
        composition corner design detail details drawing edge effect evening expression eye eyes
        face favor favorite favour favourite focus food foreground frame friend friends front
        fruit fruits group half head hour icon illustration job joke kids light line lines logo
        lot lots meme middle minute mood morning mouth nature night object objects painting part
        pattern perspective photograph pic piece portrait pose position poster quality render
        rendering request result row scene scenery second shadow shape shot side size sketch sky
        smile son sort space sticker summer texture theme thing things time title tone top
        vegetable vehicle view wall wallpaper watercolor way weather width year years""",
    "adjective": "{colours} {fillers} very really so quite too super extremely more most other",
    "joining": """and plus with beside near next to above over below under beneath underneath behind
        alongside left right in on at by against into inside outside between is are carrying chasing
        drinking driving eating holding hugging kicking reading riding watching wearing""",
    "start": "draw show paint create generate imagine picture photo image of",
    # what follows them is not in the picture
    "aside": "for as like from than about style",
    "article": """a an the {numbers} five six seven eight nine ten dozen couple pair trio some
        another each every several many few""",
}
# common things that are one slip away from a known word, and no typing error
LOOKALIKES = """angel ball baseball bat butter cab carton cattle chicken crow ear flower hole horse
    hose lock moth nail pants planet racket ring rock sail seahorse snake stair tank trailer
    train""".split()

def known_nouns(config: dict) -> list[str]:
    """The things that a checkpoint's training showed; [] where it was shown no scenes of ours."""
    data = config["data"]
    if data.get("folder") or data.get("atlas"):
        return []
    return list(NOUNS)[:data.get("nouns") or None]

def all_known(nouns: list[str]) -> str:
    """All that can be asked for, wrapped to the terminal."""
    if not nouns:
        raise UserError("this network learned from its own pictures: it knows what they show")

    def with_more(words, more):
        return [f"{w} ({', '.join(more[w])})" if more.get(w) else w for w in words]

    width = min(100, shutil.get_terminal_size().columns)
    ways = {relation: said[1:] for relation, said in RELATIONS.items()}
    sections = {
        f"{len(nouns)} things (and other names)": with_more(nouns, OTHER_NAMES),
        f"{len(COLOURS)} colours (and shades)": with_more(COLOURS, SHADES),
        "Numbers": [f"{word} ({n})" for n, word in NUMBERS.items()],
        f"{len(RELATIONS)} relations (and more ways to say them)": with_more(RELATIONS, ways),
        f"Backgrounds: a colour, or {len(PLACE_WORDS)} places": with_more(PLACE_WORDS, PLACE_WORDS),
    }
    blocks = []
    for title, words in sections.items():
        text = textwrap.fill(", ".join(words), width, initial_indent="  ", subsequent_indent="  ")
        blocks.append(f"{title}:\n{text}")
    return "\n".join(blocks)

def about_unknown(prompts: list[str], nouns: list[str]) -> list[str]:
    """A line for each thing in the prompts that is none of the nouns."""
    lines = []
    unknown = [word for p in prompts if nouns for word in unknown_things(p, tuple(nouns))]
    for word in dict.fromkeys(unknown):
        near = ", ".join(nearest(word, nouns))
        end = f"nearest: {near}" if near else "--list shows them"
        lines.append(f"{word}: not among the {len(nouns)} things it knows; {end}")
    return lines

@functools.lru_cache
def known_words(nouns: tuple) -> tuple[re.Pattern, set[str], dict[str, str]]:
    """A pattern of all names of the nouns, the words in them, {other word of captions: kind}."""
    every = {name for noun in nouns for many in (False, True) for name in names(noun, many)}
    longest_first = sorted(every, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(es|s)?(?!\w)")
    turns = [*INTRODUCTIONS, *ENDINGS, *SIDEWAYS, *UPWARDS, *DOWNWARDS, *JOINS, *ON_COLOUR,
             *IN_PLACE, *sum(PLACE_WORDS.values(), []), *sum(RELATIONS.values(), ())]
    kinds = dict.fromkeys([*re.findall(r"[\w'-]+", " ".join(turns).lower()), *COMMON], "other")
    colours = " ".join([*COLOURS, *sum(SHADES.values(), [])])
    tables = {"verbs": " ".join(VERBS), "colours": colours, "fillers": " ".join(FILLERS),
              "numbers": " ".join(NUMBERS.values()),
              "places": " ".join(w.split()[-1] for ways in PLACE_WORDS.values() for w in ways)}
    for kind, words in GRAMMAR.items():
        kinds |= dict.fromkeys(words.format(**tables).split(), kind)
    return pattern, {word for name in every for word in name.split()}, kinds

def unknown_things(caption: str, nouns: tuple) -> list[str]:
    """The words that look like a thing, and are neither known nor a slip of a known word."""
    pattern, inside, kinds = known_words(nouns)
    text = pattern.sub(" THING ", caption.lower())
    words = re.findall(r"[^\W\d_][\w'’-]*|\d\S*|[^\w\s]", text) + [".", "."]
    kind = [kind_of(word, inside, kinds) for word in words]
    found, before = [], "start"             # before: kind of the last word that was no adjective
    for i, own in enumerate(kind[:-2]):
        if own in ("adjective", "participle") or (own == "new" and describes(kind, i)):
            continue
        if before == "aside" and own not in ("mark", "thing"):
            continue                        # until the clause ends
        if own == "new" and is_thing(before, words, kind, i):
            found.append(words[i])
        if words[i] == "of" and before in ("thing", "new"):
            before = "aside"                # "a cup of coffee"
        elif own == "joining" and before not in ("thing", "joining"):
            before = "other"
        else:
            before = own
    return list(dict.fromkeys(found))

def kind_of(word: str, inside: set, kinds: dict) -> str:
    """"thing" for a known one, "new" for a word of no known kind, or a kind of GRAMMAR."""
    if word == "THING":
        return "thing"
    if word in kinds:
        return kinds[word]
    if re.fullmatch(r"\d+x?", word):
        return "article"
    if not word[0].isalnum():
        return "mark"
    if word.endswith(("-coloured", "-colored")):
        return "adjective"
    if len(word) < 3 or word[0].isdigit() or re.search("['’]", word):
        return "other"
    if len(word) > 5 and word.endswith(("ing", "ed", "ly")):
        return "participle"
    right = slip_of(word, inside, kinds)
    if right in inside:
        return "thing"
    return "other" if right else "new"

def describes(kind: list[str], i: int) -> bool:
    """Whether word i belongs to a noun that follows, as in "a rusty old car"."""
    rest = [k for k in kind[i + 1:] if k not in ("adjective", "participle")]
    return rest[0] in ("new", "thing")

def is_thing(before: str, words: list[str], kind: list[str], i: int) -> bool:
    """Whether the new word i, the last of its group, is in a thing's place."""
    word, after = words[i + 1], kind[i + 1]
    if after == "frame" or word == "style" or (after == "start" and word != "of"):
        return False                        # "an oil painting"
    if word == "of" and kind[i + 2] in ("article", "adjective", "thing"):
        return False                        # "a bunch of bananas"
    if before == "start":
        return word in (".", "!", "?", "of") or after in ("joining", "participle")
    return before in ("article", "joining") and after != "article"

def slip_of(word: str, inside: set, kinds: dict) -> str:
    """The known word of which a letter is left out, doubled, or swapped with the next, as
    wording.misspell does it; or a name that is nearly the same; else ""."""
    if {word, word.removesuffix("s")} & set(LOOKALIKES):
        return ""
    for right in difflib.get_close_matches(word, inside | kinds.keys(), 5, 0.7):
        n, is_name = len(right), right in inside
        slips = {right[:i] + right[i] + right[i:] for i in range(n)}
        slips |= {right[:i] + right[i + 1] + right[i] + right[i + 2:] for i in range(n - 1)}
        if n > 4 or (n == 4 and is_name):
            slips |= {right[:i] + right[i + 1:] for i in range(n)}
        alike = difflib.SequenceMatcher(None, word, right).ratio()
        enough = 0.8 if n > 6 else 0.82                 # a horse is no house
        nearly = is_name and n > 4 and word[0] == right[0] and alike >= enough
        if (word in slips or nearly) and right not in (word, word + "s"):
            return right
    return ""

def nearest(word: str, nouns) -> list[str]:
    """Nouns with a name that ends alike ("speedboat": sailboat), or is spelt alike; often none."""
    called = {name: noun for noun in nouns for name in names(noun)}
    word = word.removesuffix("s")
    near = [name for name in called
            if name.split()[-1] == word or len(name) > 3 and word.endswith(name)]
    if not near and len(word) > 6:
        near = difflib.get_close_matches(word, called, 3, 0.77)
    return list(dict.fromkeys(called[name] for name in near))
