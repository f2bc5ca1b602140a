"""A bundle that draws: what export_coreml.py wrote, with the faces of TextToLatents, UNet and
Autoencoder, so that sample.generate draws from the very files that ship.

On a Mac Core ML runs them, anywhere else coreml/check.py does. A bundle draws one picture at a
time, of one size; its text is padded to L tokens, and the mask travels as the last channel of the
text states (coreml/ane.py).
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError, fill
from coreml.executor import CheckError, Package, load_coremltools
from model import UNetConfig
from text import Text, load_vocabulary

COMPILE = """#!/bin/sh
# On a Mac with Xcode: compiles the packages, copies what an app needs into compiled/.
set -e
cd "$(dirname "$0")"
mkdir -p compiled
for p in *.mlpackage; do xcrun coremlcompiler compile "$p" compiled/; done
cp manifest.json *.tiktoken compiled/ 2>/dev/null || true
"""


class Bundle:
    def __init__(self, path):
        folder = Path(path).expanduser()
        old = folder.with_name(folder.name + ".old")
        if not folder.exists() and old.exists():
            folder = old                        # an export was killed between its two renames
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text())
            config, parts = self.manifest["config"], self.manifest["parts"]
            self.size = self.manifest["size"]
        except (OSError, ValueError, KeyError) as e:
            raise UserError(f"{path} is no bundle of this version ({e!r}): make one with `python "
                            f"export_coreml.py --out {path}`") from None
        if "TextEncoder" not in parts:
            raise UserError(f"{path} has no text encoder: it proves the export, but cannot draw")
        self.config = {**config, "data": {**config["data"], "size": self.size}}
        self.cfg = fill(UNetConfig(), config["model"], str(path))
        self.L = config["text"]["max_tokens"]
        tokens = self.manifest["tokens"]
        self.vocabulary = load_vocabulary(folder / tokens["file"], tokens["pattern"])
        self.device = torch.device("cpu")
        self.denoiser = self
        self.outputs = {name: row["output"] for name, row in parts.items()}
        self.models = {name: load_package(folder / row["file"]) for name, row in parts.items()}

    def run(self, name, **inputs):
        try:
            return self.models[name](inputs)[self.outputs[name]]
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
        velocities = [
            self.run("Unet", sample=x[i:i + 1], timestep=1000 * t[i:i + 1],
                     encoder_hidden_states=states[i:i + 1])
            for i in range(len(x))
        ]
        return torch.cat(velocities)                                                # (B, C, H, W)

    def decode(self, latents):
        return torch.cat([self.run("VAEDecoder", z=z[None].contiguous()) for z in latents])


def load_package(file: Path):
    """A function {input: tensor} -> {output: fp32 tensor}."""
    try:
        if sys.platform != "darwin":
            return Package(file).run
        ct = load_coremltools()
    except CheckError as e:
        raise UserError(str(e)) from None
    model = ct.models.MLModel(str(file), compute_units=ct.ComputeUnit.CPU_AND_NE)

    def predict(inputs):
        out = model.predict({k: v.numpy() for k, v in inputs.items()})
        return {k: torch.from_numpy(np.asarray(v, np.float32)) for k, v in out.items()}
    return predict
