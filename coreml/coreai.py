"""The same parts for Core AI, Apple's successor of Core ML (iOS and macOS 27): `python export_coreml.py --target coreai --out bundle-ai`.

Needs `pip install coreai-torch`, in beta. Its wheel for Linux holds Apple's own runtime for CPUs, slow but independent of coreml_check.py: each file is
executed by it here and compared with the training form. Refused under 50 dB.
"""
import asyncio, json
from pathlib import Path

import torch

import ane
from checkpoint import VERSION
from common import UserError
from decoder import load_autoencoder
from sample import load_model


def to_aimodel(form, inputs: dict, output: str, path: Path):
    """A Neural Engine form -> fp16 .aimodel. The sinusoids stay fp32, as in Core ML."""
    from coreai_torch import TorchConverter, get_decomp_table
    freqs = getattr(form, "freqs", None)
    form = form.half()
    if freqs is not None:
        form.freqs = freqs.float()
    program = torch.export.export(form, tuple(inputs.values())).run_decompositions(get_decomp_table())
    return TorchConverter().add_exported_program(program, input_names=list(inputs), output_names=[output]).to_coreai().save_asset(path.absolute())


def execute(asset, inputs: dict, output: str):
    """By Apple's runtime."""
    from coreai.runtime import NDArray

    async def run():
        async with asset.executable() as model:
            out = await model.load_function("main")(inputs={k: NDArray(v.numpy()) for k, v in inputs.items()})
            return torch.from_numpy(out[output].numpy().copy()).float()
    return asyncio.run(run())


def typed(case: dict) -> dict:
    return {k: v.half() if v.ndim > 2 else v for k, v in case.items()}           # ids and timestep stay fp32


@torch.no_grad()
def export(a):
    try:
        import coreai_torch
    except ImportError as e:
        raise UserError(f"--target coreai needs Apple's converter ({e}): pip install coreai-torch")
    from export_coreml import parts_of
    out, checks = Path(a.out), {}
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give another --out")
    net, config = load_model(a.ckpt)
    sizes = a.size[:1] or [config["data"]["size"]]
    out.mkdir(parents=True, exist_ok=True)
    parts = parts_of(net, load_autoencoder(a.ae), sizes, a.tokens, a.attention)
    wanted = [[train(**case) for case in cases] for part in parts for _, train, cases in part.functions.values()]   # before rounding reaches the weights
    for part, want in zip(parts, wanted):
        form, _, cases = part.functions[sizes[0]]
        ane.calibrate(form, cases)
        asset = to_aimodel(form, typed(cases[0]), part.output, out / f"{part.name}.aimodel")
        checks[part.name] = min(part.psnr(execute(asset, typed(case), part.output), w) for case, w in zip(cases, want))
        print(f"{part.name:12} {checks[part.name]:.1f} dB by Apple's runtime against the training form in fp32", flush=True)
        if not checks[part.name] >= 50:
            raise UserError(f"refused: {part.name} reaches {checks[part.name]:.1f} dB, 50 are wanted; {out} holds what was made")
    (out / "metadata.json").write_text(json.dumps({"kind": "diffusion", "version": VERSION, "size": sizes[0], "coreai_torch": coreai_torch.__version__, "checks": checks, "assets": {
        "text_encoder": "TextEncoder.aimodel", "unet": "Unet.aimodel", "vae_decoder": "VAEDecoder.aimodel"}, "schedule": {"timestep": "1000 t", "shift": config["flow"]["shift"]}}, indent=1))
