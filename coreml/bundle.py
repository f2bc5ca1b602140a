"""A bundle that draws: what export_coreml.py wrote, with the faces of TextToLatents, UNet and
Autoencoder. On a Mac Core ML runs the files, anywhere else coreml/check.py does: one picture at a
time, of one size, from L tokens, whose mask is the last channel of the text states.
"""
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from common import UserError, fill
from coreml.check import CheckError, Package, load_coremltools
from model import UNetConfig
from text import Text, load_vocabulary

COMPILE = """#!/bin/sh
# On a Mac with Xcode: compiles the packages, for an app, into compiled/.
cd "$(dirname "$0")" && mkdir -p compiled
for p in *.mlpackage; do xcrun coremlcompiler compile "$p" compiled/ || exit 1; done
"""

class Bundle:
    def __init__(self, path):
        folder = Path(path).expanduser()
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            config, self.parts, self.size = (manifest[k] for k in ("config", "parts", "size"))
            if "TextEncoder" not in self.parts:
                raise UserError(f"{path} has no text encoder, it cannot draw")
            self.config = {**config, "data": {**config["data"], "size": self.size}}
            self.cfg = fill(UNetConfig(), config["model"], str(path))
            self.L = config["text"]["max_tokens"]
            tokens = manifest["tokens"]
            self.vocabulary = load_vocabulary(folder / tokens["file"], tokens["pattern"])
            self.models = {k: load_package(folder / v["file"]) for k, v in self.parts.items()}
        except (CheckError, OSError, LookupError, TypeError, ValueError) as e:
            raise UserError(f"{path} is no bundle of this version ({e!r}): make one with `python "
                            f"export_coreml.py --out {path}`") from None
        self.device = torch.device("cpu")
        self.denoiser = self

    def run(self, name, **inputs):
        try:
            return self.models[name](inputs)[self.parts[name]["output"]]
        except CheckError as e:
            raise UserError(str(e)) from None

    def encode(self, captions: list[str], cut: bool = False) -> Text:
        ids, mask = self.vocabulary.tokenize(captions, self.L, cut)
        padding = (0, self.L - ids.shape[1])
        ids = F.pad(ids, padding, value=self.vocabulary.pad).float()                # (B, L)
        states = [self.run("TextEncoder", input_ids=row[None]) for row in ids]
        return Text(torch.cat(states), F.pad(mask, padding))                        # (B, L, D+1)

    def __call__(self, x, t, emb, mask, pooled=None):
        """The UNet, picture by picture: with guidance two calls a step. The mask is in emb."""
        states = emb.transpose(1, 2)[:, :, None].contiguous()                       # (B, D+1, 1, L)
        out = []
        for a, b, c in zip(x.split(1), t.split(1), states.split(1)):
            out.append(self.run("Unet", sample=a, timestep=1000 * b, encoder_hidden_states=c))
        return torch.cat(out)                                                       # (B, C, H, W)

    def decode(self, latents):
        return torch.cat([self.run("VAEDecoder", z=z[None].contiguous()) for z in latents])

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
