"""The same parts for Core AI, Apple's successor of Core ML (iOS and macOS 27). Needs `pip install
coreai-torch`, in beta: on Linux too it has Apple's own runtime for CPUs, which runs each file here.
"""
import asyncio
import json
from pathlib import Path

import torch

from common import UserError
from coreml.ane import calibrate

def save_asset(part, inputs: dict, path: Path):
    """A part in fp16 as an .aimodel. The sinusoids stay fp32, as in Core ML."""
    try:
        from coreai_torch import TorchConverter, get_decomp_table
    except ImportError as e:
        raise UserError(f"--target coreai: {e}: pip install coreai-torch") from None
    freqs = getattr(part.form, "freqs", None)
    form = part.form.half()
    if freqs is not None:
        form.freqs = freqs.float()
    program = torch.export.export(form, tuple(inputs.values()))
    converter = TorchConverter().add_exported_program(
        program.run_decompositions(get_decomp_table()), input_names=list(inputs),
        output_names=[part.output])
    return converter.to_coreai().save_asset(path.absolute())

async def execute_asset(asset, inputs: dict, output: str):
    from coreai.runtime import NDArray
    arrays = {name: NDArray(v.numpy()) for name, v in inputs.items()}
    async with asset.executable() as model:
        out = await model.load_function("main")(inputs=arrays)
        return torch.from_numpy(out[output].numpy().copy()).float()

@torch.no_grad()
def export_coreai(parts, folder: Path, about: dict):
    """Writes the parts (export_coreml.Part) and metadata.json into the folder. UserError where one
    is under 50 dB against the training form."""
    checks = {}
    for part in parts:
        wanted = [part.train(**case) for case in part.cases]        # before rounding
        calibrate(part.form, part.cases)
        cases = [{k: v.half() if v.ndim > 2 else v for k, v in c.items()} for c in part.cases]
        asset = save_asset(part, cases[0], folder / f"{part.name}.aimodel")
        outs = [asyncio.run(execute_asset(asset, case, part.output)) for case in cases]
        checks[part.name] = min(map(part.psnr, outs, wanted))
        print(f"{part.name:12} {checks[part.name]:.1f} dB by Apple's runtime", flush=True)
        if not checks[part.name] >= 50:
            raise UserError(f"refused: {part.name} reaches {checks[part.name]:.1f} dB of 50")
    (folder / "metadata.json").write_text(json.dumps(about | {"checks": checks}, indent=1), "utf-8")
