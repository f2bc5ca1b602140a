"""The same parts for Core AI, Apple's successor of Core ML (iOS and macOS 27):

    python export_coreml.py --target coreai --out bundle-ai

Needs `pip install coreai-torch`, in beta. Its wheel for Linux holds Apple's own runtime for CPUs,
slow but independent of coreml/check.py: here it executes each file, which is refused under 50 dB
against the training form.
"""
import asyncio
import json
from pathlib import Path

import torch

from checkpoint import VERSION
from common import UserError
from coreml.ane import calibrate

def check_coreai():
    try:
        import coreai_torch
    except ImportError as e:
        raise UserError(f"--target coreai needs Apple's converter ({e}): pip install "
                        "coreai-torch") from None
    return coreai_torch.__version__


def to_aimodel(form, inputs: dict, output: str, path: Path):
    """A Neural Engine form -> fp16 .aimodel. The sinusoids stay fp32, as in Core ML."""
    from coreai_torch import TorchConverter, get_decomp_table
    freqs = getattr(form, "freqs", None)
    form = form.half()
    if freqs is not None:
        form.freqs = freqs.float()
    program = torch.export.export(form, tuple(inputs.values()))
    program = program.run_decompositions(get_decomp_table())
    converter = TorchConverter().add_exported_program(
        program, input_names=list(inputs), output_names=[output])
    return converter.to_coreai().save_asset(path.absolute())


def execute_asset(asset, inputs: dict, output: str):
    """By Apple's runtime."""
    from coreai.runtime import NDArray
    arrays = {name: NDArray(v.numpy()) for name, v in inputs.items()}

    async def result():
        async with asset.executable() as model:
            out = await model.load_function("main")(inputs=arrays)
            return torch.from_numpy(out[output].numpy().copy()).float()
    return asyncio.run(result())


@torch.no_grad()
def export_coreai(parts, folder: Path, size: int, shift: float):
    """Writes the parts (export_coreml.Part) and metadata.json into the folder."""
    wanted = [[part.train(**case) for case in part.cases] for part in parts]   # before rounding
    checks, files = {}, {}
    for part, want in zip(parts, wanted, strict=True):
        calibrate(part.form, part.cases)
        cases = [{k: v.half() if v.ndim > 2 else v for k, v in c.items()} for c in part.cases]
        files[part.name] = f"{part.name}.aimodel"
        asset = to_aimodel(part.form, cases[0], part.output, folder / files[part.name])
        outs = [execute_asset(asset, case, part.output) for case in cases]
        checks[part.name] = min(map(part.psnr, outs, want))
        print(f"{part.name:12} {checks[part.name]:.1f} dB by Apple's runtime against the training "
              "form in fp32", flush=True)
        if not checks[part.name] >= 50:
            raise UserError(f"refused: {part.name} reaches {checks[part.name]:.1f} dB of 50")
    names = {"TextEncoder": "text_encoder", "Unet": "unet", "VAEDecoder": "vae_decoder"}
    (folder / "metadata.json").write_text(json.dumps({
        "kind": "diffusion", "version": VERSION, "size": size, "coreai_torch": check_coreai(),
        "checks": checks, "assets": {names[k]: file for k, file in files.items()},
        "schedule": {"timestep": "1000 t", "shift": shift}}, indent=1))
