"""Captions to text states: a byte-level BPE in tiktoken's format and a small transformer encoder.

    python text.py "a red car"          shows the tokens of a caption
    python text.py --sizes              what the published encoders weigh
    python text.py --train-bpe FILE     learns a vocabulary from training captions, for new weights:
                                        the shipped ones read assets/captions.tiktoken

B batch | L tokens | D width | P pooled width. A denoiser reads the `Text` of any encoder.
`load_encoders` gives published ones, frozen: CLIP-L + CLIP-bigG + Gemma-2-2B as in SnapGen
(docs/PAPER.md, section 3), CLIP-L + CLIP-bigG + T5-XXL as in SD3, CLIP-L alone for class names.
"""
import base64
import functools
import gc
import hashlib
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import HUB, check_file, load_checkpoint, resolve
from common import ASSETS, UserError, attention, friendly, option

VOCABULARY = ASSETS / "captions.tiktoken"
# a word or a digit, with the blank before it; a punctuation mark; blanks
PATTERN = r" ?[^\s\d.,;:!?()\"&/]+| ?\d|[.,;:!?()\"&/]|\s+"

FIRST_PATTERN = r" ?[^\s\d]+| ?\d|\s+"      # of checkpoints that name none

class Tokens(NamedTuple):
    """Captions as the small encoder reads them."""
    ids: torch.Tensor                       # (B, L)
    mask: torch.Tensor                      # (B, L) bool, True for a real token

class Text(NamedTuple):
    """Captions as a denoiser reads them."""
    emb: torch.Tensor                       # (B, L, D)
    mask: torch.Tensor                      # (B, L) bool, True for a real token
    pooled: torch.Tensor | None = None      # (B, P), for an MMDiT

def on_device(text: Tokens | Text, device) -> Tokens | Text:
    return type(text)(*(None if x is None else x.to(device) for x in text))

def join_texts(texts: list[Text]) -> Text:
    """Concatenates along the batch, padded to the longest."""
    L = max(t.mask.shape[1] for t in texts)
    emb = torch.cat([F.pad(t.emb, (0, 0, 0, L - t.emb.shape[1])) for t in texts])   # (B, L, D)
    mask = torch.cat([F.pad(t.mask, (0, L - t.mask.shape[1])) for t in texts])      # (B, L)
    pooled = None if texts[0].pooled is None else torch.cat([t.pooled for t in texts])
    return Text(emb, mask, pooled)

class Vocabulary:
    """A byte-pair encoding with <end> and <pad>. Bytes are tokens too, so any word can be written.
    data: the file `source`, in tiktoken's text format; pattern: cuts a caption into words."""
    def __init__(self, data: bytes, pattern: str = PATTERN, source="the vocabulary"):
        try:
            lines = [line.split() for line in data.decode().splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
            if set(ranks.values()) != set(range(max(256, len(lines)))):
                raise ValueError("it lacks tokens")
        except ValueError as e:
            raise UserError(f"{source} is damaged ({e}): restore it with git") from None
        self.data, self.pattern, self.source = data, pattern, source
        self.end, self.pad, self.size = len(ranks), len(ranks) + 1, len(ranks) + 2
        self.encoding = tiktoken.Encoding(
            "captions", pat_str=pattern, mergeable_ranks=ranks,
            special_tokens={"<end>": self.end, "<pad>": self.pad})

    def ids_of(self, caption: str) -> list[int]:
        """The tokens of one caption, in lower case, with a blank before each word; <end> last."""
        words = " " + caption.lower().strip() if caption.strip() else ""
        return [*self.encoding.encode_ordinary(words), self.end]

    def tokenize(self, captions: list[str], max_tokens: int = 64, cut: bool = False) -> Tokens:
        """Padded to the longest. Each ends in <end>: the empty, unconditional one is not nothing.
        UserError where a caption is longer than max_tokens; `cut` reads only its beginning."""
        rows = [self.ids_of(c) for c in captions]
        if cut:
            rows = [r if len(r) <= max_tokens else [*r[:max_tokens - 1], self.end] for r in rows]
        L = max(map(len, rows))
        if L > max_tokens:
            raise UserError(f"a prompt of {L} tokens: the encoder reads {max_tokens}; shorten it")
        ids = torch.tensor([r + [self.pad] * (L - len(r)) for r in rows])       # (B, L)
        lengths = torch.tensor([len(r) for r in rows])                          # (B,)
        return Tokens(ids, torch.arange(L) < lengths[:, None])

    def shorten(self, caption: str, max_tokens: int) -> str:
        """The longest beginning of the caption, in whole words, that fits in max_tokens."""
        words = caption.split()[:max_tokens]
        while len(self.ids_of(" ".join(words))) > max_tokens:
            words.pop()
        return " ".join(words)

    def spell(self, ids) -> str:
        """The caption that these ids spell, without <end> and <pad>."""
        return self.encoding.decode([i for i in map(int, ids) if i < self.end]).strip()

@functools.lru_cache
def load_vocabulary(path: Path = VOCABULARY, pattern: str = PATTERN) -> Vocabulary:
    """From a local file, never from the network."""
    try:
        return Vocabulary(Path(path).read_bytes(), pattern, path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: restore it with git") from None

def load_taught(path) -> tuple[Vocabulary, dict]:
    """The vocabulary and the weights of the encoder that train_text.py left at path."""
    folder = resolve(path)
    config, state = load_checkpoint(folder)
    file = check_file(folder, config, "captions.tiktoken")
    return load_vocabulary(file, config["text"]["pattern"]), state["model"]

def train_bpe(captions: list[str], size: int) -> bytes:
    """Byte-pair encoding (Sennrich et al. 2016) of at most `size` tokens, by the library
    `tokenizers`, 140 times as fast as plain Python. Returns them in tiktoken's text format."""
    from tokenizers import Tokenizer, models, trainers
    words = (word for c in captions for word in re.findall(PATTERN, " " + c.lower()))
    letters = [chr(b) for b in range(256)]          # one for each byte, as Latin-1 has it
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=letters,
                                  show_progress=False)
    learned = Tokenizer(models.BPE())
    learned.train_from_iterator((word.encode().decode("latin-1") for word in words), trainer)
    merges = json.loads(learned.to_str())["model"]["merges"]
    tokens = dict.fromkeys([*letters, *("".join(pair) for pair in merges)])
    encoded = (base64.b64encode(token.encode("latin-1")).decode() for token in tokens)
    return "".join(f"{token} {i}\n" for i, token in enumerate(encoded)).encode()

# ---------------------------------------------------------------------------- the small encoder
@dataclass
class TextConfig:
    """kind: `own` is the small encoder below, the others are frozen sets of published ones."""
    kind: str = option("own", choices=("own", "clip-l", "snapgen", "sd3"))
    width: int = option(192, low=1, high=65536)  # of clip-l 768, of snapgen 2304, of sd3 4096
    layers: int = option(3, low=1, high=200)
    heads: int = option(6, low=1, high=1024)
    max_tokens: int = option(64, low=2, high=8192)
    init: str = ""              # a taught encoder (train_text.py), from which a new run starts
    vocabulary: int = option(0, low=0, high=2**20)  # tokens; 0: those of assets/captions.tiktoken
    pattern: str = PATTERN
    # For published ones: a directory or hf:OWNER/NAME in SD3's layout (text_encoder, tokenizer,
    # text_encoder_2, ..; Gemma or T5 is number 3); empty: each from its own place on the hub.
    folder: str = ""
    leave_out: list[str] = option([], choices=("clip_l", "clip_g", "gemma", "t5"))  # states of 0
    tokens: int = option(256, low=1, high=8192)            # of Gemma or T5; the CLIPs have 77
    dtype: str = option("auto", choices=("auto", "bfloat16", "float32"))    # auto: by the device

    def check(self):
        if self.kind == "own" and self.width % self.heads:
            raise UserError(f"text.width={self.width} is no multiple of text.heads={self.heads}")
        if set(self.leave_out) - set(SETS.get(self.kind, ())):
            raise UserError(f"text.leave_out={self.leave_out}: {self.kind} has not all of them")

class TextBlock(nn.Module):
    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x, mask):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                # (B, heads, L, D/heads) each
        heads = attention(q, k, v, mask)                    # (B, heads, L, D/heads)
        x = x + self.out(heads.transpose(1, 2).flatten(2))  # (B, L, D)
        return x + self.down(F.gelu(self.up(self.norm2(x))))

class TextEncoder(nn.Module):
    """Tokens -> Text with emb (B, L, width). Bidirectional, pre-norm, learned positions."""
    def __init__(self, cfg: TextConfig):
        super().__init__()
        cfg.vocabulary = cfg.vocabulary or load_vocabulary(pattern=cfg.pattern).size
        self.cfg = cfg
        self.token = nn.Embedding(cfg.vocabulary, cfg.width)
        self.position = nn.Embedding(cfg.max_tokens, cfg.width)
        self.blocks = nn.ModuleList(TextBlock(cfg.width, cfg.heads) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width)
        nn.init.normal_(self.token.weight, std=0.5)
        nn.init.normal_(self.position.weight, std=0.2)
        for block in self.blocks:
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.down.weight)

    def forward(self, tokens: Tokens) -> Text:
        x = self.token(tokens.ids) + self.position.weight[:tokens.ids.shape[1]]     # (B, L, D)
        for block in self.blocks:
            x = block(x, tokens.mask[:, None, None, :])
        return Text(self.norm(x), tokens.mask)

# ---------------------------------------------------------------------------- published encoders
class HubSource(NamedTuple):
    """Where an encoder is published, and how large it is."""
    hub: str
    inside: str             # its subfolder there, "" for the top
    number: str             # in SD3's layout: text_encoder + this, tokenizer + this
    license: str
    network: str            # class of transformers
    parameters: int
    width: int
    projection: int = 0     # width of the pooled state

CLIP, SDXL = "CLIPTextModelWithProjection", "stabilityai/stable-diffusion-xl-base-1.0"
SD35 = "stabilityai/stable-diffusion-3.5-large"
GATED = "gated: accept it there, then `hf auth login`"
SOURCES = {
    "clip_l": HubSource(SDXL, "text_encoder", "", "open", CLIP, 123_650_304, 768, 768),
    "clip_g": HubSource(SDXL, "text_encoder_2", "_2", "open", CLIP, 694_659_840, 1280, 1280),
    "gemma": HubSource("google/gemma-2-2b", "", "_3", GATED, "Gemma2Model", 2_614_341_888, 2304),
    "t5": HubSource(SD35, "text_encoder_3", "_3", GATED, "T5EncoderModel", 4_762_310_656, 4096),
}
SETS = {"clip-l": ("clip_l",), "snapgen": ("clip_l", "clip_g", "gemma"),
        "sd3": ("clip_l", "clip_g", "t5")}

def parts_of(cfg: TextConfig, clips=(768, 1280)) -> dict:
    """{encoder: (first row, last row, first column, last column)} of its states in the joined ones.
    The CLIPs, of these widths, share 77 rows; Gemma or T5 has rows of its own."""
    parts, column = {}, 0
    for name, D in zip(SETS[cfg.kind], clips):
        parts[name] = (0, 77, column, column + D)
        column += D
    for name in SETS[cfg.kind][2:]:
        parts[name] = (77, 77 + cfg.tokens, 0, cfg.width)
    return parts

class Encoders:
    """Frozen encoders. `release()` frees their memory."""
    def __init__(self, cfg: TextConfig, device):
        self.cfg, self.device = cfg, torch.device(device)
        exact = cfg.dtype == "float32" or (cfg.dtype == "auto" and self.device.type == "cpu")
        self.dtype = torch.float32 if exact else torch.bfloat16
        names = SETS[cfg.kind]
        self.loaded = {n: self.load(n) for n in names if n not in cfg.leave_out}
        configs = {n: model.config for n, (_, model) in self.loaded.items()}
        sizes = {n: (SOURCES[n].width, SOURCES[n].projection) for n in names[:2]}
        for n in sizes.keys() & configs.keys():
            sizes[n] = configs[n].hidden_size, configs[n].projection_dim
        self.pooled_dims = {n: P for n, (_, P) in sizes.items()}
        self.parts = parts_of(cfg, [D for D, _ in sizes.values()])
        last = configs.get(names[-1])
        if last and last.hidden_size != cfg.width:
            raise UserError(f"text.width={cfg.width}: encoders {cfg.kind} give {last.hidden_size}")

    def load(self, name: str):
        """(tokenizer, model) of one encoder. UserError says in one line what to download."""
        import transformers
        transformers.utils.logging.set_verbosity_error()    # what is missing is said here
        source, folder = source_of(self.cfg, name), self.cfg.folder
        inside = f"{folder}/text_encoder{source.number}"
        at = inside if folder else f"{source.hub}/{source.inside}"
        try:
            place, inside, words = find_encoder(self.cfg, name)
            network = getattr(transformers, source.network)
            how = {"subfolder": inside, "dtype": self.dtype, "use_safetensors": True,
                   "output_loading_info": True, "trust_remote_code": False}
            try:
                model, info = network.from_pretrained(place, variant="fp16", **how)
            except OSError:             # there are no fp16 files
                model, info = network.from_pretrained(place, **how)
            missing = set(info["missing_keys"])
            if self.cfg.kind != "sd3":
                missing -= {"text_projection.weight"}       # which nobody reads
            if missing:                 # transformers would go on with random ones
                raise ValueError(f"it lacks {len(missing)} tensors, '{min(missing)}' first")
            # padding to the right: Gemma, which is causal, never sees it
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                place, subfolder=words, padding_side="right", trust_remote_code=False)
        except Exception as e:          # of the network, the hub, the files: many types
            raise UserError(how_to_get(name, source, folder, at, e)) from None
        return tokenizer, model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Text:
        """emb (B, 77 or 77 + tokens, D); mask; pooled (B, P) of sd3. Longer captions are cut."""
        shape = len(captions), max(bottom for _, bottom, _, _ in self.parts.values())
        like = {"dtype": self.dtype, "device": self.device}
        emb = torch.zeros(*shape, self.cfg.width, **like)
        mask = torch.zeros(shape, dtype=torch.bool, device=self.device)
        pooled = {n: torch.zeros(shape[0], P, **like) for n, P in self.pooled_dims.items()}
        for name, (tokenizer, model) in self.loaded.items():
            top, bottom, left, right = self.parts[name]
            t = tokenizer(captions, padding="max_length", max_length=bottom - top,
                          truncation=True, return_tensors="pt").to(self.device)
            if name == "gemma":
                states = model(t.input_ids, attention_mask=t.attention_mask).last_hidden_state
            elif name == "t5":          # SD3 gives T5 no mask: its padding is read too
                states = model(t.input_ids)[0]
            else:
                out = model(t.input_ids, output_hidden_states=True)
                states, pooled[name] = out.hidden_states[-2], out.text_embeds
            emb[:, top:bottom, left:right] = states             # (B, L', D')
            mask[:, top:bottom] |= t.attention_mask.bool()      # both CLIPs have the same tokens
        mask[:, 0] = True               # an attention without any real token would be NaN
        states = torch.cat(list(pooled.values()), -1) if self.cfg.kind == "sd3" else None
        return Text(emb, mask, states)

    __call__ = encode

    def release(self):
        self.loaded.clear()
        gc.collect()
        torch.cuda.empty_cache()        # nothing, without CUDA

def source_of(cfg: TextConfig, name: str) -> HubSource:
    if cfg.kind == "sd3":               # SDXL's CLIP-L has no projection, and so no pooled state
        return SOURCES[name]._replace(hub=SD35, license=GATED)
    return SOURCES[name]

def find_encoder(cfg: TextConfig, name: str, download: bool = True) -> tuple[str, str, str]:
    """(directory, the weights' folder in it, the tokenizer's) of an encoder; one of the hub's is
    downloaded. Raises whatever the hub does where it is not there."""
    source = source_of(cfg, name)
    inside = f"text_encoder{source.number}" if cfg.folder else source.inside
    words = inside.replace("text_encoder", "tokenizer")
    place = cfg.folder or HUB + source.hub
    if place.startswith(HUB):
        place = download_encoder(place.removeprefix(HUB), inside, words, not download)
    if not Path(place, inside).is_dir():        # transformers would take it for a hub id
        raise FileNotFoundError(f"no directory {Path(place, inside)}")
    if not Path(place, words).is_dir():
        words = inside                          # one directory for both, as Gemma comes
    return place, inside, words

def encoders_fingerprint(cfg: TextConfig, download: bool = False) -> str | None:
    """A name for the states that frozen encoders give: a hash of their tokenizers and configs, and
    of parts of their weights. None where they are not here."""
    sha = hashlib.sha256()
    for name in [n for n in SETS[cfg.kind] if n not in cfg.leave_out]:
        try:
            place, inside, words = find_encoder(cfg, name, download)
        except Exception:                       # of the network, the hub: many types
            return None
        files = {f for part in (inside, words) for f in Path(place, part).iterdir() if f.is_file()}
        for file in sorted(files):
            size = file.stat().st_size
            sha.update(f"{file.name} {size}".encode())
            with open(file, "rb") as f:
                for k in range(64):
                    f.seek(k * size // 64)
                    sha.update(f.read(2**14))
    return sha.hexdigest()[:16]

def download_encoder(hub: str, inside: str, words: str, local: bool = False) -> str:
    """Fetches weights (fp16 where there are, half the size) and tokenizer; -> their directory.
    local: only looks for them on this machine."""
    from huggingface_hub import snapshot_download  # a dependency of transformers
    snapshot_download = functools.partial(snapshot_download, local_files_only=local)
    top = f"{inside}/" if inside else ""
    small = [f"{words}/*" if words else "tokenizer*", f"{top}*.json"]
    place = snapshot_download(hub, allow_patterns=[*small, f"{top}model.fp16*.safetensors"])
    if any(Path(place, inside).glob("model.fp16*.safetensors")):
        return place
    return snapshot_download(hub, allow_patterns=[*small, f"{top}model*.safetensors"])

def how_to_get(name: str, source: HubSource, folder: str, at: str, e: Exception) -> str:
    """What to download, how large it is, where to put it."""
    command = f"hf download {source.hub}"
    if source.inside:
        words = source.inside.replace("text_encoder", "tokenizer")
        command += f" --include '{source.inside}/*' '{words}/*'"
    if folder and not folder.startswith(HUB):
        inside = "" if source.inside else f"/text_encoder{source.number}"
        command += f" --local-dir {folder}{inside}"
    reason = f"{type(e).__name__}: {e}".split("\n")[0][:100]
    return (f"text encoder {name} is not whole at {at.rstrip('/')}: `{command}` gets "
            f"{2 * source.parameters / 1e9:.2f} GB, licence {source.license} ({reason})")

def load_encoders(cfg: TextConfig, device) -> Encoders:
    return Encoders(cfg, device)

def drop_encoders(text: Text, cfg: TextConfig, generator, p: float = 0.464) -> Text:
    """Blanks each encoder's states with chance p in each caption, so that any subset will do when
    sampling (SD3: 46.4 %, so that one in ten has none). Tokens without any state are masked."""
    emb, covered = text.emb.clone(), torch.zeros_like(text.mask)
    for top, bottom, left, right in parts_of(cfg).values():
        keep = torch.rand(len(emb), generator=generator).to(emb.device) >= p
        emb[:, top:bottom, left:right] *= keep[:, None, None].to(emb.dtype)
        covered[:, top:bottom] |= keep[:, None]
    mask = text.mask & covered          # (B, L)
    mask[:, 0] = True                   # all dropped: one state of zeros is left
    return Text(emb, mask, text.pooled)

# ---------------------------------------------------------------------------- command line
def main(argv):
    if argv[:1] == ["--train-bpe"] and len(argv) == 2:
        from scenes import Scenes
        from wording import training_caption
        scenes = Scenes()
        captions = [training_caption(scenes.scene(i), random.Random(i)) for i in range(20000)]
        Path(argv[1]).write_bytes(train_bpe(captions, 2000))
    elif argv == ["--sizes"]:
        for name, s in SOURCES.items():
            print(f"{name:7}{s.parameters:14,} parameters, {2 * s.parameters / 1e9:5.2f} GB at "
                  f"2 bytes each: {s.hub} {s.inside} ({s.license})")
    else:
        vocabulary = load_vocabulary()
        for caption in argv or [""]:
            print(" | ".join(vocabulary.encoding.decode([i]) for i in vocabulary.ids_of(caption)))

if __name__ == "__main__":
    with friendly():
        main(sys.argv[1:])
