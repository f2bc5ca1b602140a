"""A Neural Engine form (coreml/ane.py) -> an .mlpackage: rounding, conversion, compression and
metadata, by coremltools."""
import contextlib
import io
import json
from pathlib import Path

import numpy as np
import torch

from checkpoint import VERSION
from coreml.executor import load_coremltools

DESCRIPTIONS = {    # of inputs and outputs, for Xcode and the app's author
    "input_ids": "Tokens of captions.tiktoken, <end>, then <pad> up to L",
    "last_hidden_state": "(1, L, D+1); transpose to (1, D+1, 1, L) for Unet",
    "sample": "Latents, standard normal at the start",
    "timestep": "1000 t, t in [0, 1], 1 = noise",
    "encoder_hidden_states": "(1, D+1, 1, L): text states, mask in the last channel",
    "noise_pred": "Velocity: x0 = sample - t * noise_pred",
    "z": "Normalised latents; scale and shift are inside",
    "image": "(1, 3, H, W), RGB in [-1, 1]",
}


@torch.no_grad()
def round_to_fp16(form):
    """In place, the training form's parameters too: they are shared. The sinusoids' frequencies
    stay in fp32, in the file too."""
    for name, v in [*form.named_parameters(), *form.named_buffers()]:
        if name != "freqs":
            v.copy_(v.half().float())


def convert_form(form, inputs: dict, output: str, ios: int):
    """A Neural Engine form -> Core ML model in fp16. What has rank 2 or less (the time's sinusoids,
    token ids) stays fp32 and runs before the engine starts."""
    ct = load_coremltools()

    def is_fp16(op):
        return not all(v.shape is not None and len(v.shape) <= 2 for v in op.outputs)

    types = {True: np.float16, False: np.float32}
    typed = [ct.TensorType(k, v.shape, dtype=types[v.ndim > 2]) for k, v in inputs.items()]
    with contextlib.redirect_stderr(io.StringIO()):                             # progress bars
        graph = torch.jit.trace(form, tuple(inputs.values()), check_trace=False)
        return ct.convert(
            graph, inputs=typed, outputs=[ct.TensorType(output, dtype=np.float16)],
            convert_to="mlprogram", minimum_deployment_target=getattr(ct.target, f"iOS{ios}"),
            compute_precision=ct.transform.FP16ComputePrecision(op_selector=is_fp16),
            compute_units=ct.ComputeUnit.CPU_AND_NE, skip_model_load=True)


def palette(weight, bits: int):
    """The best table of 2**bits values for a tensor, and the weights' indices in it.

    One-dimensional k-means (Lloyd) on the histogram: fp16 has at most 65,536 values. coremltools'
    own "kmeans" finds tables as good, but wants scikit-learn and 4 to 19 times as long.
    """
    flat, k = weight.astype(np.float32).ravel(), 2 ** bits
    values, index, count = np.unique(flat, return_inverse=True, return_counts=True)
    if len(values) <= k:
        return np.pad(values, (0, k - len(values)), mode="edge").astype(weight.dtype), index
    # many centres want a density of p ** (1/3) (Panter & Dite 1951): a good start
    share = count ** (1 / 3) * np.gradient(values.astype(np.float64)) ** (2 / 3)
    centres = np.interp((np.arange(k) + 0.5) / k * share.sum(), share.cumsum() - share / 2, values)
    for _ in range(40):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
        n = np.bincount(nearest, count, k)
        total = np.bincount(nearest, count * values.astype(np.float64), k)
        centres = np.where(n > 0, total / np.maximum(n, 1), centres)
    nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
    return centres.astype(weight.dtype), nearest[index].astype(np.uint8)


def compress(model, bits: int):
    """8: int8 per output channel. 6, 4: a table of 2**bits values for each tensor."""
    import coremltools.optimize.coreml as cto
    if bits == 8:
        how = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8",
                                          granularity="per_channel")
        do = cto.linear_quantize_weights
    else:
        how = cto.OpPalettizerConfig(mode="custom", lut_function=lambda w: palette(w, bits))
        do = cto.palettize_weights
    with contextlib.redirect_stderr(io.StringIO()):                             # progress bars
        return do(model, cto.OptimizationConfig(how))


def write_metadata(path: Path, text: str, values: dict):
    """Into the saved protobuf: the graph and the weights that were proved are not written again."""
    spec = load_coremltools().utils.load_spec(str(path))
    m = spec.description.metadata
    m.author, m.license = "nanoSnapGen", "MIT"
    m.versionString, m.shortDescription = VERSION, text
    m.userDefined.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()})
    for feature in (*spec.description.input, *spec.description.output):
        feature.shortDescription = DESCRIPTIONS[feature.name]
    (path / "Data/com.apple.CoreML/model.mlmodel").write_bytes(spec.SerializeToString())
