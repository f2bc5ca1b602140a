"""A bundle that draws: what export_coreml.py wrote. On a Mac Core ML runs the files, anywhere else
coreml/check.py does: one picture at a time, of one size, from L tokens, whose mask is the last
channel of the text states. Bundle has the faces of TextToLatents, UNet and Autoencoder; SDBundle
draws as an app does that loads Stable Diffusion.
"""
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import UserError, fill
from coreml.apple import SCHEDULERS, SD_SCALE, AppleTokenizer, flow_times
from coreml.check import CheckError, Package, load_coremltools
from data import check_tables
from decoder import to_pictures
from model import UNetConfig
from text import Text, TextConfig, load_vocabulary

COMPILE = """#!/bin/sh
# On a Mac with Xcode: compiles the packages, for an app, into compiled/.
cd "$(dirname "$0")" && mkdir -p compiled
for p in *.mlpackage; do xcrun coremlcompiler compile "$p" compiled/ || exit 1; done
for p in vocab.json merges.txt; do if [ -f $p ]; then cp $p compiled/; fi; done
"""

class Bundle:
    def __init__(self, folder: Path, manifest: dict):
        config, self.parts, self.size = (manifest[k] for k in ("config", "parts", "size"))
        if "TextEncoder" not in self.parts:
            raise UserError(f"{folder} has no text encoder, it cannot draw")
        self.config = {**config, "data": {**config["data"], "size": self.size}}
        check_tables(self.config, folder)
        self.cfg = fill(UNetConfig(), config["model"], str(folder))
        words = {"max_tokens": config["text"]["max_tokens"]}
        self.L = fill(TextConfig(), words, str(folder)).max_tokens
        self.read_tokens(folder, manifest)
        self.models = {k: load_package(folder / v["file"]) for k, v in self.parts.items()}
        self.device = torch.device("cpu")
        self.denoiser = self

    def read_tokens(self, folder: Path, manifest: dict):
        tokens = manifest["tokens"]
        self.vocabulary = load_vocabulary(folder / tokens["file"], tokens["pattern"])

    def run(self, name, **inputs):
        try:
            return self.models[name](inputs)[self.parts[name]["output"]]
        except (CheckError, LookupError) as e:
            raise UserError(f"{name} of the bundle: {e}") from None

    def encode(self, captions: list[str], cut: bool = False) -> Text:
        ids, mask = self.vocabulary.tokenize(captions, self.L, cut)
        padding = (0, self.L - ids.shape[1])
        ids = F.pad(ids, padding, value=self.vocabulary.pad).float()                # (B, L)
        states = [self.run("TextEncoder", input_ids=row[None]) for row in ids]
        return Text(torch.cat(states), F.pad(mask, padding))                        # (B, L, D+1)

    def __call__(self, x, t, emb, mask, pooled=None):
        """The UNet, picture by picture: with guidance two calls a step. The mask is in emb."""
        states = for_unet(emb)                                                      # (B, D+1, 1, L)
        out = []
        for a, b, c in zip(x.split(1), t.split(1), states.split(1)):
            out.append(self.run("Unet", sample=a, timestep=1000 * b, encoder_hidden_states=c))
        return torch.cat(out)                                                       # (B, C, H, W)

    def decode(self, latents):
        return torch.cat([self.run("VAEDecoder", z=z[None].contiguous()) for z in latents])

def for_unet(states):
    """(B, L, D+1) -> (B, D+1, 1, L)."""
    return states.transpose(1, 2)[:, :, None].contiguous()

class SDBundle(Bundle):
    """Of `--target sd`. The noise is that of the app's rng `torch`."""
    def __init__(self, folder: Path, manifest: dict):
        super().__init__(folder, manifest)
        self.schedule = manifest["schedule"]

    def read_tokens(self, folder: Path, manifest: dict):
        self.tokenizer = AppleTokenizer(folder)

    def sampling(self, steps=None, cfg=None, sampler=None, shift=None) -> dict:
        """As sample.sampling: what is asked for, else what is best for the checkpoint."""
        sampler = sampler or self.schedule["sampler"]
        if sampler not in SCHEDULERS or shift:
            raise UserError(f"an app draws this bundle with {' or '.join(SCHEDULERS)}, at times "
                            "of its own: give such a --sampler, and no --shift")
        return {
            "steps": flow_times(sampler, steps or self.schedule["steps"]),
            "cfg": self.schedule["cfg"] if cfg is None else cfg, "sampler": sampler}

    def states(self, caption: str):
        ids = torch.tensor([self.tokenizer.ids(caption, self.L + 1)]).float()       # (1, M)
        return for_unet(self.run("TextEncoder", input_ids=ids))

    def draw(self, captions, seeds, steps, cfg, sampler, progress=False):
        """Captions and seeds, one of each a picture -> list of uint8 (H, W, 3). At cfg = 1 the
        Unet is asked once a step, as an app does where its guidance is below 1."""
        pictures, n = [], self.size // 8
        empty = None if cfg == 1 else self.states("")
        for caption, seed in zip(tqdm(captions, unit="picture", disable=not progress), seeds):
            text = self.states(caption)

            def noise_of(x, k, text=text):
                def ask(states):
                    return self.run("Unet", sample=x, timestep=torch.tensor([float(k)]),
                                    encoder_hidden_states=states)
                if cfg == 1:
                    return ask(text)
                noise = ask(empty)
                return noise + cfg * (ask(text) - noise)
            generator = torch.Generator().manual_seed(seed % 2**63)
            x = torch.randn(1, self.cfg.in_channels, n, n, generator=generator)
            x0 = SCHEDULERS[sampler](noise_of, x, len(steps) - 1)
            pictures += to_pictures(self.run("VAEDecoder", z=(x0 / SD_SCALE).float()))
        return pictures

def load_bundle(path) -> Bundle:
    folder = Path(path).expanduser()
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        kind = SDBundle if manifest.get("target") == "sd" else Bundle
        return kind(folder, manifest)
    except (CheckError, OSError, LookupError, TypeError, ValueError, AttributeError,
            RecursionError) as e:
        what = e if isinstance(e, OSError | CheckError) else repr(e)        # they name a file
        raise UserError(f"{path} is no bundle of this version ({what}): make one with `python "
                        f"export_coreml.py --out {path}`") from None

def load_package(file: Path):
    """A function {input: tensor} -> {output: fp32 tensor}."""
    if sys.platform != "darwin":
        return Package(file).run
    ct = load_coremltools()
    model = ct.models.MLModel(str(file), compute_units=ct.ComputeUnit.CPU_AND_NE)

    def predict(inputs):
        out = model.predict({k: v.numpy() for k, v in inputs.items()})
        return {k: torch.from_numpy(v).float() for k, v in out.items()}
    return predict
