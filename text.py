"""Captions to text states: a byte-level BPE in tiktoken's format and a small transformer that is trained with the UNet.

    python text.py --train-bpe          learns assets/captions.tiktoken from the captions of scenes (once)
    python text.py "a red car"          shows the tokens
    python text.py --sizes              what the published encoders weigh

B batch | L tokens | D width. The interface is `Text`: any encoder that returns one will do. `load_encoders` gives the published ones, frozen:
CLIP-L + CLIP-bigG + Gemma-2-2B as in SnapGen (paper.md, section 3), CLIP-L + CLIP-bigG + T5-XXL as in SD3, CLIP-L alone for class names.
"""
import base64, functools, gc, random, re, sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import ASSETS, UserError, attention, friendly, pick_device

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
    # of the frozen ones, kind = snapgen (width 2304), clip-l (768) or sd3 (4096):
    folder: str = ""            # a directory in SD3's layout (text_encoder, tokenizer, text_encoder_2, ..; Gemma or T5 is number 3) or a hub id; empty: each from its own place on the hub
    leave_out: list[str] = field(default_factory=list)     # encoders that are not loaded, such as ["t5"]; their states are zeros, as SD3 does without T5
    tokens: int = 256           # of Gemma or T5; the CLIPs have 77
    dtype: str = "auto"         # bfloat16, float32, or auto: bfloat16, but float32 on a CPU


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


# ---------------------------------------------------------------------------- the published encoders, through transformers
class Source(NamedTuple):
    hub: str                    # where it is published
    inside: str                 # its subfolder there, "" for the top
    license: str
    model: str                  # class and config of transformers, for its size; the files bring their own
    config: str
    values: dict


CLIP, SDXL = ("CLIPTextModelWithProjection", "CLIPTextConfig"), "stabilityai/stable-diffusion-xl-base-1.0"
SOURCES = {
    "clip_l": Source(SDXL, "text_encoder", "open", *CLIP, dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)),
    "clip_g": Source(SDXL, "text_encoder_2", "open", *CLIP, dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)),
    "gemma": Source("google/gemma-2-2b", "", "gated", "Gemma2Model", "Gemma2Config", dict(vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
                    num_attention_heads=8, num_key_value_heads=4, head_dim=256)),
    "t5": Source("stabilityai/stable-diffusion-3.5-large", "text_encoder_3", "gated", "T5EncoderModel", "T5Config", dict(vocab_size=32128, d_model=4096, d_ff=10240, d_kv=64, num_heads=64,
                 num_layers=24, feed_forward_proj="gated-gelu")),
}
SETS = {"clip-l": ("clip_l",), "snapgen": ("clip_l", "clip_g", "gemma"), "sd3": ("clip_l", "clip_g", "t5")}
FOLDERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "gemma": "text_encoder_3", "t5": "text_encoder_3"}    # tokenizers: tokenizer, tokenizer_2, tokenizer_3


@functools.lru_cache
def parameters_of(name: str) -> int:
    """Counted on the meta device from the real config: nothing is downloaded."""
    import transformers
    s = SOURCES[name]
    with torch.device("meta"):
        return sum(p.numel() for p in getattr(transformers, s.model)(getattr(transformers, s.config)(**s.values)).parameters())


def parts_of(cfg: TextConfig, widths: dict | None = None) -> dict:
    """{encoder: (first row, last row, first column, last column)}: where in the joined states its own lie. The CLIPs share the rows, each with columns of its own. So a cache
    of joined states holds the parts too, and drop_encoders() can blank them in training without the encoders. Widths: the published ones', or those given."""
    parts, at = {}, 0
    for name in SETS[cfg.kind]:
        D = (widths or {}).get(name) or SOURCES[name].values.get("hidden_size") or SOURCES[name].values["d_model"]
        parts[name] = (0, 77, at, at + D) if name.startswith("clip") else (77, 77 + cfg.tokens, 0, D)
        at += D
    return parts


class Encoders:
    """Frozen encoders. Called, or by `encode`: captions -> Text. `release()` frees their memory, and so does leaving a `with`."""

    def __init__(self, cfg: TextConfig, device):
        names = SETS.get(cfg.kind, ())
        if not names or set(cfg.leave_out) - set(names) or cfg.dtype not in ("auto", "bfloat16", "float32"):
            raise UserError(f"text encoders: kind '{cfg.kind}' (one of {', '.join(SETS)}), leave_out {cfg.leave_out} (some of {', '.join(names)}), dtype '{cfg.dtype}' (auto, bfloat16, float32)")
        self.cfg, self.device, third = cfg, pick_device(device) if isinstance(device, str) else device, names[2:3]
        self.dtype = torch.float32 if cfg.dtype == "float32" or (cfg.dtype == "auto" and self.device.type == "cpu") else torch.bfloat16
        self.loaded = {n: self.load(n) for n in names if n not in cfg.leave_out}     # {name: (tokenizer, model)}
        widths = {n: self.loaded[n][1].config.hidden_size if n in self.loaded else cfg.width if n in third else None for n in names}
        self.parts = parts_of(cfg, widths)
        self.pooled_dims = {n: self.loaded[n][1].config.projection_dim if n in self.loaded else SOURCES[n].values["projection_dim"] for n in names[:2]}
        self.length, self.width = (self.parts[(third or names)[0]][k] for k in (1, 3))
        if cfg.width != self.width:
            raise UserError(f"text encoders '{cfg.kind}' give states of width {self.width}: set text.width={self.width} (and the network's context_dim), it is {cfg.width}")

    def load(self, name):
        import transformers
        from transformers.utils import logging
        s, folder, quiet = SOURCES[name], self.cfg.folder, logging.get_verbosity()
        if self.cfg.kind == "sd3":                              # SDXL's CLIP-L has no projection, and so no pooled state
            s = s._replace(hub=SOURCES["t5"].hub, license="gated")
        where, inside = source = (folder, FOLDERS[name]) if folder else (s.hub, s.inside)
        words = inside.replace("text_encoder", "tokenizer")
        if Path(where, inside).is_dir() and not Path(where, words).is_dir():
            words = inside                                      # one directory for both, as Gemma comes
        logging.set_verbosity_error()                           # what is missing is said here, in one line
        try:
            if not Path(where).is_dir():                        # a hub id. All files at once, so that a missing network is said at once
                from huggingface_hub import snapshot_download   # a dependency of transformers
                get = lambda weights: Path(snapshot_download(where, allow_patterns=[f"{words}/*" if words else "tokenizer*", *(f"{inside}/{x}".lstrip("/") for x in ("*.json", weights))]))
                place = get("model.fp16*.safetensors")          # half the download, where it is offered
                where = place if any(place.glob(f"{inside or '.'}/model.fp16*.safetensors")) else get("model*.safetensors")
            for variant in ("fp16", None):
                try:
                    model, info = getattr(transformers, s.model).from_pretrained(where, subfolder=inside, dtype=self.dtype, variant=variant, use_safetensors=True, output_loading_info=True)
                    break
                except OSError:
                    if variant is None:
                        raise
            missing = [k for k in info["missing_keys"] if self.cfg.kind == "sd3" or k != "text_projection.weight"]
            if missing:                                         # transformers would go on with random ones
                raise ValueError(f"it lacks {len(missing)} tensors, '{sorted(missing)[0]}' first")
            # padding to the right: the real tokens come first, and Gemma, which is causal, never sees it
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, subfolder=words, padding_side="right")
        except Exception as e:                                  # of the network, the hub, the files: many types
            get = f"hf download {s.hub}" + (f" --include '{s.inside}/*' '{s.inside.replace('text_encoder', 'tokenizer')}/*'" if s.inside else "")
            get += f" --local-dir {folder if s.inside else f'{folder}/{inside}'}" if folder else ""
            raise UserError(f"text encoder {name} is not whole at {'/'.join(source).rstrip('/')}: `{get}` downloads and places it, {2 * parameters_of(name) / 1e9:.2f} GB at 2 bytes a weight"
                            f"{', after you accept its licence there and `hf auth login`' if s.license == 'gated' else ''} ({type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:100]})") from None
        finally:
            logging.set_verbosity(quiet)
        return tokenizer, model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Text:
        """emb (B, 77, D) for clip-l, else (B, 77 + tokens, D); mask, True for a real token; pooled (B, P) for sd3. Longer captions are cut."""
        B, L = len(captions), self.length
        emb, mask = torch.zeros(B, L, self.width, dtype=self.dtype, device=self.device), torch.zeros(B, L, dtype=torch.bool, device=self.device)
        pooled = {n: torch.zeros(B, d, dtype=self.dtype, device=self.device) for n, d in self.pooled_dims.items()}
        for name, (tokenizer, model) in self.loaded.items():
            top, bottom, left, right = self.parts[name]
            t = tokenizer(captions, padding="max_length", max_length=bottom - top, truncation=True, return_tensors="pt").to(self.device)
            if name == "gemma":
                states = model(input_ids=t.input_ids, attention_mask=t.attention_mask).last_hidden_state
            elif name == "t5":                                  # SD3 gives T5 no mask: its padding is read too
                states = model(input_ids=t.input_ids)[0]
            else:
                out = model(input_ids=t.input_ids, output_hidden_states=True)
                states, pooled[name] = out.hidden_states[-2], out.text_embeds
            emb[:, top:bottom, left:right] = states             # (B, L', D')
            mask[:, top:bottom] |= t.attention_mask.bool()      # both CLIPs have the same tokens
        mask[:, 0] = True                                       # or an attention without any real token would be NaN
        return Text(emb, mask, torch.cat(list(pooled.values()), -1) if self.cfg.kind == "sd3" else None)

    __call__ = encode

    def release(self):
        self.loaded.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


def load_encoders(cfg: TextConfig, device="auto") -> Encoders:
    """UserError in one line where weights are missing: what to download, how large it is, where to put it."""
    return Encoders(cfg, device)


def drop_encoders(text: Text, parts: dict, generator: torch.Generator, p: float = 0.464) -> Text:
    """Blanks each encoder's states with chance p, independently in each caption (SD3: 46.4 %, so that one in ten has none), so that any subset will do when
    sampling. Tokens that are left without states are masked. Works on cached states too, with parts_of(cfg)."""
    B, emb, covered = len(text.emb), text.emb.clone(), torch.zeros_like(text.mask)
    for top, bottom, left, right in parts.values():
        keep = torch.rand(B, generator=generator, device=generator.device).to(emb.device) >= p     # (B,)
        emb[:, top:bottom, left:right] *= keep[:, None, None].to(emb.dtype)
        covered[:, top:bottom] |= keep[:, None]
    mask = text.mask & covered
    mask[:, 0] = True                                           # all dropped: one state of zeros is left
    return Text(emb, mask, text.pooled)


if __name__ == "__main__":
    with friendly():
        if sys.argv[1:] == ["--train-bpe"]:
            from data import Scenes
            scenes = Scenes(split="train")
            n = train_bpe([scenes.caption(scenes.scene(i), random.Random(i)) for i in range(20000)], 1024)
            print(f"{VOCABULARY}: {n} tokens")
        elif sys.argv[1:] == ["--sizes"]:
            for name, s in SOURCES.items():
                print(f"{name:7}{parameters_of(name):14,} parameters, {2 * parameters_of(name) / 1e9:5.2f} GB at 2 bytes each: {s.hub}{'/' * bool(s.inside)}{s.inside} ({s.license})")
            for name, members in SETS.items():
                print(f"{name:8} in all {2 * sum(map(parameters_of, members)) / 1e9:.2f} GB")
        else:
            ids, _ = tokenize(sys.argv[1:] or [""])
            print("\n".join(" | ".join(encoding().decode([i]) for i in row) for row in ids.tolist()))
