"""The parts of a bundle in the guise of Stable Diffusion 1.x, for apps that load that and no other.

    python -m coreml.sd --captions 30000        do apps cut captions into the tokens that we do?

Such an app speaks in three conventions that are not ours. Each is translated inside the packages:
    time        integer timesteps of SD's schedule, and a network that predicts the noise
    tokens      CLIP's way of cutting a prompt, with ids of vocab.json
    latents     divided by 0.18215 before the decoder

An x_k = a x0 + s eps of SD's schedule, a^2 + s^2 = 1, is our x_t at t = s / (a + s), times a + s.
So x_t = x_k / (a + s), and eps = x_t + (1 - t) v. Guidance is linear: it stays what it is.

L tokens of ours | M entries that the app sends | E entries of vocab.json | K tokens of an entry
"""
import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn

from common import friendly
from coreml.apple import END, LAST, SD_SCALE, START, AppleTokenizer, sd_schedule
from model import load_model
from scenes import Scenes
from text import Vocabulary
from wording import training_caption, wide

MARKS = (",", ".", "!", "?", ";", ":", ")", "...", "),", ").")
# lower-case ASCII and Latin-1, and the marks that phones type
LETTERS = [chr(c) for c in (*range(33, 65), *range(91, 127), *range(161, 192), *range(223, 256))]
LETTERS += "‘’“”–—…"

class SDUNet(nn.Module):
    """sample (1, C, H, W), timestep (1,) 0 to 999, encoder_hidden_states -> noise (1, C, H, W)."""
    exact = ("flow_time", "shrink", "signal")

    def __init__(self, form):
        super().__init__()
        self.body = form                                            # ane.AneUNet
        a, s = sd_schedule()
        tables = {"flow_time": s / (a + s), "shrink": 1 / (a + s), "signal": a / (a + s)}
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def forward(self, sample, timestep, encoder_hidden_states):
        k = timestep.int()
        shrink, signal = (table[k][:, None, None, None].to(sample.dtype)
                          for table in (self.shrink, self.signal))
        x = sample * shrink
        v = self.body(x, 1000 * self.flow_time[k], encoder_hidden_states)
        return x + signal * v

class SDDecoder(nn.Module):
    """Latents over 0.18215, as such an app sends them -> picture."""
    def __init__(self, form):
        super().__init__()
        self.body = form                                            # ane.AneDecoder
        self.register_buffer("scale", torch.tensor(SD_SCALE), persistent=False)     # is rounded

    def forward(self, z):
        return self.body(z * self.scale)

# ------------------------------------------------------------------------------------------ tokens
def readable(piece: bytes) -> str:
    """A token's text; "" where its bytes are not whole letters."""
    return piece.decode("utf-8", "ignore") if piece.decode("utf-8", "replace").isprintable() else ""

def caption_words(vocabulary: Vocabulary, config: dict, n: int = 60_000) -> set[str]:
    """Words that are entries of their own: those that are one token, with each mark that may follow
    them; and what is between blanks in two or more of n captions of training scenes."""
    pieces = map(readable, vocabulary.encoding.token_byte_values())
    words = {piece[1:] for piece in pieces if piece[:1] == " " and piece[1:].strip()}
    words |= {word + mark for word in words for mark in MARKS}
    data, seen = config["data"], Counter()
    if not (data.get("folder") or data.get("atlas")):
        scenes = Scenes(data["size"], "train", nouns=data["nouns"], layout=data["layout"])
        for i in range(n):
            seen.update(training_caption(scenes.scene(i), random.Random(i)).lower().split())
        words |= {word for word, times in seen.items() if times > 1}
    return {word for word in words if "#" not in word}          # begins a comment in merges.txt

class Entries:
    """vocab.json and merges.txt, so that CLIP's tokenizer cuts a prompt into entries of which each
    is one or more of our tokens.

    CLIP marks the end of a word, our vocabulary its beginning. So an entry has two spellings, as a
    word's first piece and as a later one: the text encoder knows which it is, since the entry
    before a first piece ends a word. Listed words are one entry each: their letters are joined from
    the end, one by one, which no other pair can disturb (end pieces are always joined first). What
    is left of a word that is not listed is joined as our vocabulary would."""
    def __init__(self, vocabulary: Vocabulary, words):
        self.vocabulary, self.words = vocabulary, sorted(words)
        pieces = vocabulary.encoding.token_byte_values()
        inner = [text.strip() for text in map(readable, pieces)]
        inner = list(dict.fromkeys(text for text in inner if len(text) > 1 and " " not in text))
        letters = sorted({c for text in [*self.words, *inner] for c in text} | set(LETTERS))
        tails = list(dict.fromkeys(word[k:] for word in self.words for k in range(len(word))))
        self.merges = [(tail[0], tail[1:] + LAST) for tail in tails if len(tail) > 1]
        known = {*letters, *inner}
        for text in inner:                  # in the order in which our vocabulary joins
            cuts = ((text[:k], text[k:]) for k in range(1, len(text)))
            self.merges += [pair for pair in cuts if known.issuperset(pair)]
        ends = [text + LAST for text in dict.fromkeys([*letters, *tails])]
        self.names = [START, END, *letters, *inner, *ends]

    def spelled(self, name: str) -> tuple[list[int], list[int]]:
        """Our tokens of an entry as a word's first piece, and as a later one."""
        text = name.removesuffix(LAST)
        encode = self.vocabulary.encoding.encode_ordinary
        return encode(" " + text), encode(text)

    def tables(self) -> dict[str, torch.Tensor]:
        """first, later (E, K) token ids, 0 where an entry has fewer; their numbers (E,); and
        whether an entry ends a word (E,)."""
        spelled = [([], []) if name in (START, END) else self.spelled(name) for name in self.names]
        K = max(len(ids) for both in spelled for ids in both)
        found = {"last": torch.tensor([float(name.endswith(LAST)) for name in self.names])}
        for key, rows in zip(("first", "later"), zip(*spelled)):
            found[key] = torch.tensor([ids + [0] * (K - len(ids)) for ids in rows]).float()
            found[f"{key}_n"] = torch.tensor([float(len(ids)) for ids in rows])
        return found

    def save(self, folder: Path):
        names = {name: i for i, name in enumerate(self.names)}
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / "vocab.json").write_text(json.dumps(names, ensure_ascii=False), "utf-8")
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8", newline="\n")

class SDTextEncoder(nn.Module):
    """input_ids (1, M) in fp32, the ids of vocab.json as CLIP's tokenizer sends them: a start, the
    entries of the prompt, an end, and ends up to M; none where the prompt was cut
    -> last_hidden_state (1, L, D+1).

    Only sums, products and comparisons of numbers that fp32 holds exactly, none larger than the
    squares of M and L: they run before the engine starts."""
    exact = ("first", "first_n", "later", "later_n", "last", "earlier", "slots")

    def __init__(self, form, entries: Entries, L: int):
        super().__init__()
        self.body, self.L = form, L                                 # ane.AneTextEncoder
        self.end, self.pad = entries.vocabulary.end, entries.vocabulary.pad
        for name, table in entries.tables().items():
            self.register_buffer(name, table, persistent=False)
        N = self.L                                              # M without the start
        self.register_buffer("earlier", torch.ones(N, N).tril(-1), persistent=False)
        self.register_buffer("slots", torch.arange(self.L).float(), persistent=False)

    def own_ids(self, input_ids):
        """(1, M) -> the ids of our vocabulary, <end>, then <pad>: (1, L)."""
        entry = input_ids[0, 1:].int()                                          # (N,)
        ends = (input_ids[0, 1:] == 1).float()
        inside = 1 - ((self.earlier * ends).sum(1) + ends >= 1).float()         # before the end
        last = self.last[entry]
        opens = torch.cat([torch.ones(1), last[:-1]])                           # begins a word
        n = (opens * self.first_n[entry] + (1 - opens) * self.later_n[entry]) * inside
        begin = (self.earlier * n).sum(1)                                       # its first slot
        opens = opens[:, None]
        tokens = opens * self.first[entry] + (1 - opens) * self.later[entry]    # (N, K)
        ids = torch.zeros(self.L)
        for k in range(tokens.shape[1]):
            here = (begin[:, None] + k == self.slots).float()                   # (N, L)
            here = here * (n[:, None] >= k + 1).float()
            ids = ids + (here * tokens[:, k:k + 1]).sum(0)
        length = n.sum().clamp(max=self.L - 1)
        after = (self.slots >= length).float()                  # 1 at the end and at the padding
        padding = (self.slots >= length + 1).float()
        return (ids * (1 - after) + self.end * (after - padding) + self.pad * padding)[None]

    def forward(self, input_ids):
        return self.body(self.own_ids(input_ids))

# ------------------------------------------------------------------------------------------- parts
def sd_text_part(part, source, folder: Path):
    """Its reference reads the captions themselves: our tokenizer, the training form."""
    vocabulary, L = source.net.vocabulary, source.tokens
    entries = Entries(vocabulary, caption_words(vocabulary, source.config))
    entries.save(folder)
    tokenizer, cases, known = AppleTokenizer(folder), [], {}
    for case in part.cases:
        ids = tokenizer.ids(vocabulary.spell(case["input_ids"][0].tolist()), L + 1)
        cases.append({"input_ids": torch.tensor([ids]).float()})
        known[tuple(ids)] = case

    def train(input_ids):
        return part.train(**known[tuple(input_ids[0].int().tolist())])
    return replace(part, form=SDTextEncoder(part.form, entries, L), train=train, cases=cases)

def sd_unet_part(part):
    a, s = sd_schedule()

    def train(sample, timestep, encoder_hidden_states):
        k = int(timestep)
        t, size = s[k] / (a[k] + s[k]), a[k] + s[k]
        x = sample / size
        v = part.train(sample=x.float(), timestep=1000 * t[None].float(),
                       encoder_hidden_states=encoder_hidden_states)
        return (x + (1 - t) * v).float()
    # near k = 999 the answer is almost the input: a lone case is asked where v counts
    steps = (999, 100) if len(part.cases) > 1 else (300,)
    cases = [{**case, "timestep": torch.tensor([float(k)])} for case, k in zip(part.cases, steps)]
    return replace(part, form=SDUNet(part.form), train=train, cases=cases,
                   text="Latents, SD's timestep 0 to 999, text states -> noise")

def sd_decoder_part(part):
    def train(z):
        return part.train(z=z * SD_SCALE)
    cases = [{"z": case["z"] / SD_SCALE} for case in part.cases]
    return replace(part, form=SDDecoder(part.form), train=train, cases=cases)

def sd_parts(parts: list, source, folder: Path) -> list:
    """The parts (export_coreml.Part) in the guise of SD 1.x; vocab.json and merges.txt."""
    *texts, unet, decoder = parts
    found = [sd_text_part(part, source, folder) for part in texts]
    found += [sd_unet_part(unet), sd_decoder_part(decoder)]
    # the oldest that Apple's package runs on; and by `Ios16.einsum` in a Unet's metadata Mochi
    # Diffusion knows that it is for the Neural Engine
    return [replace(part, oldest="iOS16") for part in found]

def app_settings(config: dict) -> dict:
    """The manifest's schedule: what to set in an app. By score (docs/COREML.md)."""
    few = bool(config.get("few_steps"))
    return {"kind": "Stable Diffusion 1.x", "prediction": "noise", "timestep": "0 to 999",
            "sampler": "dpmpp", "steps": 8 if few else 25, "cfg": 1.0 if few else 4.0}

README = """# A bundle that apps load as Stable Diffusion 1.x

{source}, {size} px, {bits} bits. `sh compile.sh`, on a Mac with Xcode, makes `compiled`, the folder
that an app loads.

| set | to | because |
|---|---|---|
| scheduler | DPM-Solver++ | PNDM, many apps' default, does as well |
| steps | {steps} | |
| guidance | {guidance} | {why} |
| random numbers | torch | then a seed is that of `python sample.py --coreml` |
| safety checker | off | the bundle has none |
| starting picture | none | apps encode one into 4 channels, these latents have {channels} |

A prompt ends at a letter that `vocab.json` does not have, and after {tokens} tokens. An empty one
draws anything. What an app draws, any machine does: `python sample.py "a red car" --coreml FOLDER`.
"""

def readme(manifest: dict) -> str:
    schedule, alone = manifest["schedule"], manifest["schedule"]["cfg"] == 1
    return README.format(
        **manifest, steps=schedule["steps"], channels=manifest["latent"]["channels"],
        guidance="0, or the lowest" if alone else f"{schedule['cfg']:g}",
        why="the student needs none; below 1 a step takes half the time" if alone else "",
        tokens=manifest["config"].get("text", {}).get("max_tokens", 77))

# ------------------------------------------------------------------------------------------- check
def own_and_theirs(net, config: dict, n: int):
    """For n captions of each wording: (wording, caption, our tokenizer's ids, what a bundle's text
    encoder makes of an app's ids)."""
    vocabulary, L = net.vocabulary, net.text_cfg.max_tokens
    entries = Entries(vocabulary, caption_words(vocabulary, config))
    encoder = SDTextEncoder(None, entries, L)
    data = config["data"]
    scenes = Scenes(data["size"], "test", nouns=data["nouns"], layout=data["layout"], seed=3)
    with tempfile.TemporaryDirectory() as folder:
        entries.save(Path(folder))
        tokenizer = AppleTokenizer(folder)
    for i in range(n):
        for word in (scenes.caption, wide):
            caption = word(scenes.scene(i), random.Random(i))
            ids = vocabulary.tokenize([caption], L, cut=True).ids[0].tolist()
            theirs = torch.tensor([tokenizer.ids(caption, L + 1)]).float()
            theirs = encoder.own_ids(theirs)[0].int().tolist()
            yield word.__name__, caption, ids, theirs[:len(ids)]

def main(argv):
    p = argparse.ArgumentParser(prog="python -m coreml.sd", description=__doc__.split("\n")[0])
    p.add_argument("--ckpt", default="assets/scenes", help="checkpoint or run")
    p.add_argument("--captions", type=int, default=30_000, help="of each wording")
    a = p.parse_args(argv)
    net, config = load_model(a.ckpt)
    same, others = Counter(), []
    for wording, caption, ids, theirs in own_and_theirs(net, config, a.captions):
        same[wording] += ids == theirs
        if ids != theirs:
            others.append(caption)
    for wording, n in same.items():
        print(f"{wording}: {n} of {a.captions} captions give our ids ({n / a.captions:.2%})")
    print("some that do not:", *others[:10], sep="\n  ")

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
