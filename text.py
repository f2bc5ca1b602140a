"""Captions to text states: a byte-level BPE in tiktoken's format and a small transformer that is trained with the UNet.

    python text.py --train-bpe          learns assets/captions.tiktoken from the captions of scenes (once)
    python text.py "a red car"          shows the tokens

B batch | L tokens | D width. The interface is `Text`: any encoder that returns one will do (CLIP and Gemma come later).
"""
import base64, functools, random, re, sys
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import ASSETS, UserError, attention, friendly

VOCABULARY = ASSETS / "captions.tiktoken"
PATTERN = r" ?[^\s\d]+| ?\d|\s+"            # a word or a digit, with the blank before it


class Text(NamedTuple):
    emb: torch.Tensor                       # (B, L, D)
    mask: torch.Tensor                      # (B, L) bool, True for a real token
    pooled: torch.Tensor | None = None      # (B, P), for the teacher


def join(texts: list[Text]) -> Text:
    """Several along the batch, padded to the longest."""
    L = max(t.emb.shape[1] for t in texts)
    pad = lambda x: F.pad(x, (0, 0) * (x.ndim - 2) + (0, L - x.shape[1]))
    return Text(torch.cat([pad(t.emb) for t in texts]), torch.cat([pad(t.mask) for t in texts]), None if texts[0].pooled is None else torch.cat([t.pooled for t in texts]))


# ---------------------------------------------------------------------------- tokens
@functools.lru_cache
def encoding() -> tiktoken.Encoding:
    """From the local file, never from the network. Bytes are tokens too, so any word can be written."""
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in VOCABULARY.read_text().splitlines())}
    except FileNotFoundError:
        raise UserError(f"{VOCABULARY} is missing: restore it with git, or make it with `python text.py --train-bpe`")
    except ValueError as e:
        raise UserError(f"{VOCABULARY} is damaged ({e}): restore it with git")
    return tiktoken.Encoding("captions", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<end>": len(ranks), "<pad>": len(ranks) + 1})


def tokenize(captions: list[str], max_tokens: int = 64, cut: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, L) and mask (B, L), L that of the longest. Each caption ends in <end>, so the empty one, the unconditional, is not nothing.
    UserError where a caption is longer than max_tokens, or with `cut` only its beginning."""
    enc = encoding()
    rows = [ids + [enc.n_vocab - 2] for ids in
            enc.encode_ordinary_batch([" " + c.lower().strip() if c.strip() else "" for c in captions], num_threads=1)]
    rows = [r[:max_tokens - 1] + r[-1:] if cut and len(r) > max_tokens else r for r in rows]
    longest = max(map(len, rows))
    if longest > max_tokens:
        raise UserError(f"a prompt of {longest} tokens: the text encoder reads {max_tokens}; shorten it")
    ids = torch.tensor([r + [enc.n_vocab - 1] * (longest - len(r)) for r in rows])
    return ids, torch.arange(longest)[None] < torch.tensor([len(r) for r in rows])[:, None]


def train_bpe(captions, size: int):
    """Byte-pair encoding (Sennrich et al. 2016): merge the most frequent pair, `size - 256` times. Writes tiktoken's text format."""
    words = Counter(w for c in captions for w in re.findall(PATTERN, " " + c.lower()))
    split = {w: [bytes([b]) for b in w.encode()] for w in words}
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        pairs = Counter()
        for w, n in words.items():
            for pair in zip(split[w], split[w][1:]):
                pairs[pair] += n
        if not pairs:
            break                           # every word is one token
        (a, b), _ = max(pairs.items(), key=lambda kv: (kv[1], kv[0]))   # ties by name, so that the file is the same everywhere
        tokens.append(a + b)
        for w, parts in split.items():
            out = []
            for p in parts:
                if out and out[-1] == a and p == b:
                    out[-1] = a + b
                else:
                    out.append(p)
            split[w] = out
    VOCABULARY.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    return len(tokens)


# ---------------------------------------------------------------------------- encoder
@dataclass
class TextConfig:
    kind: str = "own"           # the small encoder below; else frozen ones, by load_encoders
    width: int = 192
    layers: int = 3
    heads: int = 6
    max_tokens: int = 64
    vocabulary: int = 0         # 0 = that of assets/captions.tiktoken


class Block(nn.Module):
    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D)
        self.norm2, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)    # (B, heads, L, D/heads) each
        x = x + self.out(attention(q, k, v, mask).transpose(1, 2).flatten(2))  # (B, L, D)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TextEncoder(nn.Module):
    """ids and mask (B, L) -> Text with emb (B, L, width). Bidirectional, pre-norm, learned positions."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        cfg.vocabulary = cfg.vocabulary or encoding().n_vocab
        self.cfg = cfg
        self.token, self.position = nn.Embedding(cfg.vocabulary, cfg.width), nn.Embedding(cfg.max_tokens, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width)
        nn.init.normal_(self.token.weight, std=0.5)
        nn.init.normal_(self.position.weight, std=0.2)
        for b in self.blocks:
            nn.init.zeros_(b.out.weight), nn.init.zeros_(b.down.weight)

    def forward(self, ids, mask) -> Text:
        x = self.token(ids) + self.position.weight[: ids.shape[1]]      # (B, L, D)
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return Text(self.norm(x), mask)


if __name__ == "__main__":
    with friendly():
        if sys.argv[1:] == ["--train-bpe"]:
            from data import Scenes
            scenes = Scenes(split="train")
            n = train_bpe([scenes.caption(scenes.scene(i), random.Random(i)) for i in range(20000)], 1024)
            print(f"{VOCABULARY}: {n} tokens")
        else:
            ids, _ = tokenize(sys.argv[1:] or [""])
            print("\n".join(" | ".join(encoding().decode([i]) for i in row) for row in ids.tolist()))
