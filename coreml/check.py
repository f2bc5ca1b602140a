"""Runs, lints and estimates Core ML packages (.mlpackage, mlprogram) on any machine, without a Mac.
Usable alone: it imports nothing of ours.

    python -m coreml.check run Unet.mlpackage [--inputs x.npz] [--expect y.npz]
    python -m coreml.check lint Unet.mlpackage [--strict]
    python -m coreml.check estimate Unet.mlpackage

run       reads what ships (protobuf and weight.bin, compressed or not) and executes it op by op
          with torch: in fp32, the graph alone; and as fp16 hardware would, every result rounded to
          its declared type. The shape of every result must be the declared one.
lint      the Neural Engine's rules, RULES below. They predict; MLComputePlan on a Mac decides.
estimate  a roofline for each op: an estimate, nothing is measured.

The executor knows the ops of our networks and of Stable Diffusion's; it names any other.
"""
import argparse
import logging
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

LIMIT = 32768    # results of matmul and convolution saturate there on engines of M1's class [ANEG]


class CheckError(Exception):
    """One line that says what is wrong with a package, or what this executor lacks."""


def load_coremltools():
    """coremltools, told not to complain that Core ML is not here: that is the point."""
    warnings.filterwarnings("ignore", message=".*has not been tested with coremltools.*")
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        import coremltools
    except ImportError as e:
        raise CheckError(f"{e}: pip install coremltools") from None
    return coremltools


# -------------------------------------------------------------------------------------------- ops
# An op is a function of a namespace that holds MIL's arguments by name: tensors are torch's, all
# else is Python's. Optional arguments are there, with their defaults.
def spatial_pads(pad):
    """MIL's padding (before, after of the first axis, ...) as F.pad wants it: last axis first."""
    return [v for i in reversed(range(0, len(pad), 2)) for v in pad[i:i + 2]]


def op_conv(a):
    if a.pad_type not in ("custom", "valid"):
        raise CheckError(f"conv with pad_type '{a.pad_type}' is not known to this executor")
    x = F.pad(a.x, spatial_pads(a.pad)) if a.pad_type == "custom" else a.x
    convolve = F.conv1d if x.ndim == 3 else F.conv2d
    return convolve(x, a.weight, a.bias, a.strides, 0, a.dilations, a.groups)


def op_pad(a):
    if a.mode != "constant":
        raise CheckError(f"pad with mode '{a.mode}' is not known to this executor")
    return F.pad(a.x, spatial_pads(a.pad), value=float(a.constant_val))


def op_layer_norm(a):
    y = a.x - a.x.mean(a.axes, keepdim=True)
    y = y * torch.rsqrt((y * y).mean(a.axes, keepdim=True) + a.epsilon)
    axes = [i % y.ndim for i in a.axes]
    shape = [n if i in axes else 1 for i, n in enumerate(y.shape)]
    y = y if a.gamma is None else y * a.gamma.reshape(shape)
    return y if a.beta is None else y + a.beta.reshape(shape)


def op_batch_norm(a):
    shape = [1, -1] + [1] * (a.x.ndim - 2)
    gain = torch.rsqrt(a.variance + a.epsilon).reshape(shape)
    y = (a.x - a.mean.reshape(shape)) * gain
    return y if a.gamma is None else y * a.gamma.reshape(shape) + a.beta.reshape(shape)


def op_slice_by_index(a):
    x, none = a.x, [False] * a.x.ndim
    squeeze, free_begin, free_end = (m or none for m in (a.squeeze_mask, a.begin_mask, a.end_mask))
    for i, step in enumerate(a.stride or [1] * x.ndim):
        first = None if free_begin[i] else a.begin[i]
        last = None if free_end[i] else a.end[i]
        kept = range(x.shape[i])[slice(first, last, step)]
        if squeeze[i]:
            kept = [a.begin[i] % x.shape[i]]
        if list(kept) != list(range(x.shape[i])):
            x = x.index_select(i, torch.tensor(kept))
    return x.squeeze([i for i, gone in enumerate(squeeze) if gone]) if any(squeeze) else x


def op_expand_dims(a):
    shape = list(a.x.shape)
    for i in sorted(axis % (a.x.ndim + len(a.axes)) for axis in a.axes):
        shape.insert(i, 1)
    return a.x.reshape(shape)


def op_gather(a):
    axis = a.axis % a.x.ndim
    rows, ids = a.x.shape[axis], torch.as_tensor(a.indices).long()
    ids = torch.where(ids < 0, ids + rows, ids)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise CheckError(f"gather: index {int(ids.max())} into {rows} rows")
    shape = a.x.shape[:axis] + ids.shape + a.x.shape[axis + 1:]
    return a.x.index_select(axis, ids.reshape(-1)).reshape(shape)


def op_gelu(a):
    if a.mode == "SIGMOID_APPROXIMATION":
        return a.x * torch.sigmoid(1.702 * a.x)
    return F.gelu(a.x, approximate="none" if a.mode == "EXACT" else "tanh")


def op_upsample(a):
    scale = [float(a.scale_factor_height), float(a.scale_factor_width)]
    return F.interpolate(a.x, scale_factor=scale, mode="nearest")


def op_cast(a):
    floats = {"fp16": torch.float32, "fp32": torch.float32, "bool": torch.bool}
    return a.x.to(floats.get(a.dtype, torch.int32))


UNARY = {name: getattr(torch, name) for name in
         "abs cos erf exp relu sigmoid sin sqrt square tanh".split()}
UNARY |= {"identity": torch.clone, "silu": F.silu}
BINARY = {name: getattr(torch, name) for name in
          "add greater greater_equal less less_equal maximum minimum mul not_equal pow sub".split()}
BINARY |= {"equal": torch.eq, "real_div": torch.div}
REDUCE = {"reduce_max": torch.amax, "reduce_mean": torch.mean, "reduce_sum": torch.sum}
OTHERS = {
    "batch_norm": op_batch_norm, "cast": op_cast, "conv": op_conv, "expand_dims": op_expand_dims,
    "gather": op_gather, "gelu": op_gelu, "layer_norm": op_layer_norm, "pad": op_pad,
    "slice_by_index": op_slice_by_index, "upsample_nearest_neighbor": op_upsample,
    "clip": lambda a: a.x.clamp(a.alpha, a.beta),
    "concat": lambda a: torch.cat(a.values, a.axis),
    "einsum": lambda a: torch.einsum(a.equation, *a.values),
    "gather_nd": lambda a: a.x[tuple(torch.as_tensor(a.indices).long().unbind(-1))],
    "linear": lambda a: F.linear(a.x, a.weight, a.bias),
    "matmul": lambda a: (a.x.mT if a.transpose_x else a.x) @ (a.y.mT if a.transpose_y else a.y),
    "reduce_argmax": lambda a: a.x.argmax(a.axis, a.keep_dims).int(),
    "reshape": lambda a: a.x.reshape([n or a.x.shape[i] for i, n in enumerate(a.shape)]),
    "rsqrt": lambda a: torch.rsqrt(a.x + a.epsilon),
    "scaled_dot_product_attention":
        lambda a: F.scaled_dot_product_attention(a.query, a.key, a.value, a.attn_mask),
    "select": lambda a: torch.where(*map(torch.as_tensor, (a.cond, a.a, a.b))),
    "softmax": lambda a: a.x.softmax(a.axis),
    "split": lambda a: a.x.split(a.split_sizes or a.x.shape[a.axis] // a.num_splits, a.axis),
    "squeeze": lambda a: a.x.squeeze(a.axes or [i for i, n in enumerate(a.x.shape) if n == 1]),
    "stack": lambda a: torch.stack(list(map(torch.as_tensor, a.values)), a.axis),
    "tile": lambda a: a.x.repeat(a.reps),
    "transpose": lambda a: a.x.permute(a.perm),
}


class Arguments(SimpleNamespace):
    def __getattr__(self, name):    # an optional argument that is not given
        return None


def execute_op(kind, a):
    """The result of one op, or the tuple of its results."""
    if kind in UNARY:
        return UNARY[kind](a.x)
    if kind in BINARY:
        return BINARY[kind](torch.as_tensor(a.x), torch.as_tensor(a.y))
    if kind in REDUCE:
        return REDUCE[kind](a.x, a.axes or list(range(a.x.ndim)), a.keep_dims)
    return OTHERS[kind](a)


# --------------------------------------------------------------------------------------- packages
def is_constant(var):
    return var.op is not None and (var.op.op_type == "const" or "constexpr" in var.op.op_type)


def dtype_of(var):
    """"fp16", "int32", "uint4" ..."""
    return var.dtype.__type_info__().name if hasattr(var.dtype, "__type_info__") else "list"


def shape_of(var):
    """Ints, or None where a dimension is flexible."""
    return tuple(int(n) if isinstance(n, (int, np.integer)) else None for n in var.shape or ())


def size_of(var):
    return int(np.prod([n or 1 for n in shape_of(var)]))


def listed(value):
    """The Vars of an op's argument: one, several, or none."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def constant(name, var):
    """A constant of the package as its op wants it: floats in fp32, compressed weights unpacked."""
    value = var.val if var.op.op_type == "const" else var.op.materialized_val_inference()
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        return value
    if np.issubdtype(value.dtype, np.floating):
        return torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
    if name in ("x", "y", "a", "b", "cond", "indices", "values"):
        return torch.from_numpy(value.copy())
    return value.tolist()                                 # axes, shapes and the like


class Package:
    """A saved mlprogram: the ops of its (default) function, and the means to run them."""

    def __init__(self, path):
        self.path = Path(path)
        if not (self.path / "Manifest.json").is_file():
            raise CheckError(f"{path} is no .mlpackage: it has no Manifest.json")
        ct = load_coremltools()
        from coremltools.converters.mil.frontend.milproto.load import load
        weights = self.path / "Data/com.apple.CoreML/weights"
        try:
            self.spec = ct.utils.load_spec(str(path))
            kind = self.spec.WhichOneof("Type")
            program = None
            if kind == "mlProgram":
                program = load(self.spec, self.spec.specificationVersion, str(weights))
        except Exception as e:                            # each layer of the loader has its own
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise CheckError(f"{path} is damaged, export or copy it again: {reason}") from e
        if program is None:
            raise CheckError(f"{path} is a {kind}: convert it with convert_to='mlprogram'")
        default = self.spec.description.defaultFunctionName or "main"
        self.function = program.functions.get(default) or next(iter(program.functions.values()))
        self.ops = [op for op in self.function.operations if not is_constant(op.outputs[0])]
        self.inputs = dict(self.function.inputs)          # {name: Var}
        self.outputs = {v.name: v for v in self.function.outputs}
        self.constants = None
        self.bytes = sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())

    def prepare(self):
        """Once: constants become tensors, and each op learns which values are dead after it."""
        known = {*UNARY, *BINARY, *REDUCE, *OTHERS}
        if unknown := sorted({op.op_type for op in self.ops} - known):
            raise CheckError(f"{self.path.name}: this package has ops that the executor does not "
                             f"know: {', '.join(unknown)}")
        constants, last = {}, {}
        for i, op in enumerate(self.ops):
            for name, value in op.inputs.items():
                for var in listed(value):
                    last[id(var)] = i
                    if is_constant(var) and id(var) not in constants:
                        constants[id(var)] = constant(name, var)
        self.constants = constants
        self.dead = [[] for _ in self.ops]
        for key in set(last) - set(constants) - {id(v) for v in self.outputs.values()}:
            self.dead[last[key]].append(key)

    @torch.inference_mode()
    def run(self, inputs: dict, half: bool = True, watch=None) -> dict:
        """{name: array or tensor} -> {name: fp32 tensor}. half: rounds every result to its declared
        type. watch(op, tensor) sees each result."""
        if self.constants is None:
            self.prepare()
        if missing := set(self.inputs) - set(inputs):
            raise CheckError(f"{self.path.name} wants the input '{sorted(missing)[0]}'; its inputs "
                             f"are {', '.join(self.inputs)}")
        values = dict(self.constants)
        for name, var in self.inputs.items():
            x = torch.as_tensor(inputs[name])
            x = x.float() if dtype_of(var).startswith("fp") else x.int()
            values[id(var)] = self.stored(name, x, var, half)
        for op, dead in zip(self.ops, self.dead, strict=True):
            named = {}
            for name, value in op.inputs.items():
                got = [values[id(v)] for v in listed(value)]
                named[name] = got if isinstance(value, (list, tuple)) else (got or [None])[0]
            try:
                results = execute_op(op.op_type, Arguments(**named))
            except (RuntimeError, AttributeError, IndexError, KeyError, TypeError) as e:
                raise CheckError(f"{self.path.name}: {op.op_type} '{op.name}' does not execute: "
                                 f"{str(e).splitlines()[0]}") from e
            results = results if isinstance(results, tuple) else [results]
            for var, x in zip(op.outputs, results, strict=True):
                values[id(var)] = self.stored(op.name, x, var, half)
                if watch:
                    watch(op, values[id(var)])
            for key in dead:
                del values[key]
        return {k: torch.as_tensor(values[id(v)]).float() for k, v in self.outputs.items()}

    def stored(self, name, x, var, half):
        """x as hardware stores it; CheckError where it is not what the package declares."""
        declared, kind = shape_of(var), dtype_of(var)
        shape = tuple(n if m is None else m for m, n in zip(declared, x.shape, strict=False))
        if shape != tuple(x.shape) or len(declared) != x.ndim:
            raise CheckError(f"{self.path.name}: '{name}' has shape {tuple(x.shape)}, the package "
                             f"declares {declared}")
        if kind.startswith("fp") != torch.is_floating_point(x):
            raise CheckError(f"{self.path.name}: '{name}' is {x.dtype}, it is declared {kind}")
        return x.half().float() if half and kind == "fp16" else x

    def random_inputs(self, seed=0):
        g, inputs = torch.Generator().manual_seed(seed), {}
        for name, var in self.inputs.items():
            size = [n or 1 for n in shape_of(var)]
            floats = dtype_of(var).startswith("fp")
            inputs[name] = torch.randn(size, generator=g) if floats else torch.zeros(size)
        return inputs


def tensor_psnr(a, b) -> float:
    """PSNR in dB of a against the reference b, whose range is the peak; 200 if identical."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    error = (a - b).square().mean().item()
    peak = max((b.max() - b.min()).item(), 1e-30)
    if not np.isfinite(error):
        return -float("inf")
    return 200.0 if error == 0 else min(200.0, float(10 * np.log10(peak ** 2 / error)))


def audit(package, inputs, half=True):
    """Runs it -> (outputs, {op name: (largest |activation|, op type)}, seconds)."""
    largest, begin = {}, time.time()

    def watch(op, x):
        if torch.is_floating_point(x) and x.numel():
            most = x.abs().max().item()
            most = most if most == most else float("inf")             # NaN counts as infinite
            largest[op.name] = max(largest.get(op.name, (0, "")), (most, op.op_type))
    return package.run(inputs, half, watch), largest, time.time() - begin


# ------------------------------------------------------------------------------------------- lint
SOURCES = {
    "APPLE-NE": "apple/coreai-models, neural_engine_rules.md (2026)",
    "APPLE-22": "machinelearning.apple.com/research/neural-engine-transformers",
    "MLSD": "apple/ml-stable-diffusion", "CT": "apple.github.io/coremltools",
    "ANEG": "ane-guide.readthedocs.io (reverse engineered)",
    "ANEB": "alvaro-videla.com/ane-book", "FORUM": "developer.apple.com/forums/thread/724930",
    "WHISPERKIT": "compute plans of argmaxinc/WhisperKit",
    "MEASURED": "measured with this executor on coremltools 9.0",
}
RULES = {    # E: leaves the engine, fails or is wrong; W: slow or risky; I: worth knowing
    "E0": ("FORUM", "flexible shape: only the default one may run on the engine"),
    "E1": ("ANEG", "no path on the engine"),
    "E2": ("APPLE-NE", "the engine computes in fp16 only"),
    "E3": ("APPLE-NE", "rank over 5"),
    "E4": ("ANEG", "over 65536 channels, or 16384 rows or columns (65536 since A16)"),
    "E5": ("WHISPERKIT", "kernel over 29x13, or padding that is not constant: CPU"),
    "E6": ("MEASURED", "x / max|x|, nn.RMSNorm as converted: NaN on a row of zeros"),
    "W1": ("APPLE-22", "input or output with a last axis under 32: padded to 64 bytes"),
    "W2": ("CT", "input or output is not fp16: cast on the CPU"),
    "W3": ("WHISPERKIT", "runs on the CPU"),
    "W4": ("ANEG", "sin or cos in fp16: errors up to 0.12; keep them in fp32 or outside"),
    "W5": ("APPLE-NE", "the last axis is no multiple of 32"),
    "W6": ("APPLE-NE", "rank 5: keep to 4"),
    "W7": ("APPLE-NE", "the last axis is 1, padded to 64 bytes: 32 times the memory"),
    "W8": ("MEASURED", "identity: coremltools 9.0 turns x.pow(2).sqrt() into it; use (x*x).sqrt()"),
    "W9": ("APPLE-NE", "linear: a 1x1 conv is faster"),
    "W10": ("APPLE-NE", "stride over 2"),
    "W11": ("ANEG", "groups: 1, 2, 4 or depthwise are native"),
    "W12": ("ANEG", "output channels are no multiple of 16"),
    "W13": ("MLSD", "over 1 GB of weights in one program: chunk or compress it"),
    "W14": ("APPLE-NE", "transpose of the last axis: a copy"),
    "W15": ("APPLE-NE", "reshape of the last axis: a copy"),
    "W16": ("MEASURED", "tile: a copy; share keys and values without"),
    "W17": ("ANEG", "attention scores exceed the working set of 4.7 MB: split heads or queries"),
    "W18": ("APPLE-NE", "fused attention: sources disagree whether the engine has it"),
    "I1": ("APPLE-NE", "softmax not over axis 1"),
    "I2": ("APPLE-NE", "fp32 or integers before the first fp16 value: CPU"),
    "I3": ("APPLE-NE", "heads in one batched matmul: the engine likes them one by one"),
    "I4": ("MLSD", "over 4000 ops: compiling on the device may take minutes (once)"),
    "I5": ("ANEB", "weights quantised in blocks: such convolutions fell to the CPU"),
    "I6": ("CT", "enumerated shapes: LayerNorm left the engine with them (coremltools #1909)"),
}
NO_PATH = set("""
    acos asin atan atanh band_part cond gru logical_and logical_or logical_xor lstm mod non_zero
    non_maximum_suppression one_hot random_normal random_uniform reduce_prod rnn scatter
    scatter_along_axis scatter_nd shape sinh sliding_windows tan while_loop""".split())
ON_CPU = set("""
    cumsum gather gather_along_axis gather_nd range_1d reduce_argmax reduce_argmin topk""".split())
BIG = 65536      # elements: a copy of fewer costs nothing worth a warning
ISLAND = 4096    # elements: what the CPU does at the edge of a model, before the first fp16 value


class Finding(NamedTuple):
    rule: str
    name: str      # of the op, input or output
    what: str


def lint(package) -> list[Finding]:
    """All findings, errors first."""
    found = [*lint_ends(package), *lint_types(package), *lint_whole(package)]
    for op in package.ops:
        found += [*lint_shapes(op), *lint_op(op)]
    return sorted(found, key=lambda f: ("EWI".index(f.rule[0]), int(f.rule[1:]), f.name))


def lint_ends(p):
    for i in p.spec.description.input:
        flexible = i.type.multiArrayType.WhichOneof("ShapeFlexibility")
        if flexible:
            yield Finding("E0" if flexible == "shapeRange" else "I6", i.name, "input")
    for name, v in (*p.inputs.items(), *p.outputs.items()):
        shape = shape_of(v)
        if len(shape) > 1 and size_of(v) > 1 and (shape[-1] or 32) < 32:
            yield Finding("W1", name, f"{shape}")
        if dtype_of(v) != "fp16":
            yield Finding("W2", name, dtype_of(v))


def lint_types(p):
    """What is not fp16: harmless before the first fp16 value, if it is small."""
    outputs = {id(v) for v in p.outputs.values()}
    after = set()                                         # values that are fp16 or come from one
    for op in p.ops:
        sources = [v for value in op.inputs.values() for v in listed(value)]
        late = any(id(v) in after for v in sources)
        for v in op.outputs:
            T, n = dtype_of(v), size_of(v)
            if T == "fp16" or late:
                after.add(id(v))
            if T not in ("fp32", "int32", "bool") or op.op_type == "cast" and id(v) in outputs:
                continue
            heavy = T == "fp32" and op.op_type in ("conv", "linear", "matmul", "einsum")
            rule = "E2" if late or n > ISLAND or heavy else "I2"
            yield Finding(rule, op.name, f"{op.op_type} in {T}, {n} elements")


def lint_whole(p):
    if p.bytes > 1e9:
        yield Finding("W13", p.path.name, f"{p.bytes / 1e9:.2f} GB")
    if len(p.ops) > 4000:
        yield Finding("I4", p.path.name, f"{len(p.ops)} ops")
    for op in p.function.operations:
        if op.op_type == "constexpr_blockwise_shift_scale":
            if sum((n or 1) > 1 for n in shape_of(op.inputs["scale"])) > 1:
                yield Finding("I5", op.name, f"scales {shape_of(op.inputs['scale'])}")
                return


def lint_shapes(op):
    for v in op.outputs:
        shape, what = shape_of(v), f"{op.op_type} {shape_of(v)}"
        if None in shape:
            yield Finding("E0", op.name, what)
        if len(shape) >= 5:
            yield Finding("W6" if len(shape) == 5 else "E3", op.name, what)
        rows = max([n or 0 for n in shape[2:]], default=0) if len(shape) == 4 else 0
        if rows > 16384 or len(shape) >= 2 and (shape[1] or 0) > 65536:
            yield Finding("E4", op.name, what)
        if dtype_of(v) == "fp16" and size_of(v) >= BIG and (shape[-1] or 32) % 32:
            yield Finding("W7" if shape[-1] == 1 else "W5", op.name, what)


def lint_op(op):
    kind, out, x = op.op_type, op.outputs[0], op.inputs.get("x")
    shape, n = shape_of(out), size_of(out)
    hits = []
    if kind in NO_PATH:
        hits.append("E1")
    if kind in ON_CPU:
        hits.append("W3")
    if kind in ("sin", "cos") and dtype_of(out) == "fp16":
        hits.append("W4")
    if kind in ("conv", "conv_transpose"):
        hits += lint_conv(op, n)
    if kind == "pad" and op.mode.val != "constant":
        hits.append("E5")
    if kind == "real_div" and op.y.op is not None and op.y.op.op_type == "reduce_max":
        inner = op.y.op.x.op
        if inner is not None and inner.op_type == "abs":
            hits.append("E6")
    if kind == "identity" and out.child_ops:
        hits.append("W8")
    if n >= BIG and kind in ("linear", "tile"):
        hits.append("W9" if kind == "linear" else "W16")
    if n >= BIG and kind in ("reshape", "transpose") and shape_of(x)[-1:] != shape[-1:]:
        hits.append("W15" if kind == "reshape" else "W14")
    if kind == "scaled_dot_product_attention":
        hits.append("W18")
    if kind == "softmax" and 2 * n > 4.7e6:
        hits.append("W17")
    if kind == "softmax" and len(shape) == 4 and op.axis.val % 4 != 1:
        hits.append("I1")
    if kind == "matmul" and len(shape) == 4 and (shape[1] or 0) > 1:
        hits.append("I3")
    before = f"{shape_of(x)} -> " if kind in ("reshape", "transpose") else ""
    for rule in hits:
        yield Finding(rule, op.name, f"{kind} {before}{shape}")


def lint_conv(op, n):
    w, groups = shape_of(op.inputs["weight"]), op.groups.val
    if len(w) == 4 and (w[3] > 13 or w[2] > 29):
        yield "E5"
    if groups not in (1, 2, 4, w[0]):
        yield "W11"
    if max(op.strides.val) > 2:
        yield "W10"
    if w[0] % 16 and n >= BIG:
        yield "W12"


# --------------------------------------------------------------------------------------- estimate
CHIPS = {"A17 Pro": (17.5e12, 51.2e9), "A18 Pro": (17.5e12, 60e9)}    # fp16 FLOP/s, DRAM bytes/s
EFFICIENCY = 0.3    # of the peak: Apple's own tables of UNets amount to 0.2 to 0.3 [MLSD]
ON_CHIP = 4e6       # bytes: smaller tensors stay on the chip
POINTWISE = {
    *UNARY, *BINARY, "batch_norm", "cast", "clip", "expand_dims", "gelu", "rsqrt", "split", "squeeze",
}


def op_flops(op) -> int:
    """Two for each multiply-add."""
    n, kind = size_of(op.outputs[0]), op.op_type
    if kind in ("conv", "linear"):
        w = op.inputs["weight"]
        return 2 * n * size_of(w) // shape_of(w)[0]
    if kind == "matmul":
        return 2 * n * shape_of(op.inputs["x"])[-2 if op.transpose_x.val else -1]
    if kind == "einsum":
        terms = op.equation.val.replace(" ", "").split("->")[0].split(",")
        sizes = {}
        for letters, v in zip(terms, op.inputs["values"], strict=True):
            sizes |= dict(zip(letters, shape_of(v), strict=True))
        return 2 * int(np.prod(list(sizes.values())))
    if kind == "scaled_dot_product_attention":
        return 4 * size_of(op.inputs["query"]) * shape_of(op.inputs["key"])[-2]
    return n if kind != "reshape" else 0


def stored_bytes(var) -> float:
    """Bytes of a constant in the file: compressed weights stream compressed."""
    if var.op.op_type != "const":
        return sum(map(stored_bytes, (v for v in var.op.inputs.values() if v is not None)))
    width = getattr(var.dtype, "get_bitwidth", None)
    return size_of(var) * width() / 8 if width else 0


def op_traffic(op, streamed: set) -> float:
    """Bytes from and to DRAM; weights count once, `streamed` remembers which did."""
    total = sum(2 * size_of(v) for v in op.outputs if 2 * size_of(v) >= ON_CHIP)
    for v in (v for value in op.inputs.values() for v in listed(value)):
        if is_constant(v) and id(v) not in streamed:
            streamed.add(id(v))
            total += stored_bytes(v)
        elif not is_constant(v) and 2 * size_of(v) >= ON_CHIP:
            total += 2 * size_of(v)
    return total


def estimate(package, fused: bool = True):
    """({chip: seconds}, [(seconds on an A17 Pro, op, GFLOP, MB)], slowest first).

    The sum over the ops of max(compute, memory). fused: pointwise ops are free, as part of their
    neighbours. The truth is between the two; expect +-40 %.
    """
    totals, rows, streamed = dict.fromkeys(CHIPS, 0.0), [], set()
    for op in package.ops:
        if fused and op.op_type in POINTWISE:
            continue
        flop, traffic = op_flops(op), op_traffic(op, streamed)
        seconds = {c: max(flop / (peak * EFFICIENCY), traffic / bandwidth)
                   for c, (peak, bandwidth) in CHIPS.items()}
        for chip in CHIPS:
            totals[chip] += seconds[chip]
        rows.append((seconds["A17 Pro"], op, flop / 1e9, traffic / 1e6))
    return totals, sorted(rows, key=lambda r: -r[0])


# ------------------------------------------------------------------------------- the command line
def read_arrays(path):
    """{name: array} of an .npz file."""
    try:
        arrays = np.load(path)
    except (OSError, ValueError) as e:
        raise CheckError(f"{path} cannot be read: {e}") from e
    if not hasattr(arrays, "files"):
        raise CheckError(f"{path} holds one array without a name: save it by np.savez(FILE, name=x)")
    return dict(arrays)


def print_run(p, inputs_file, expect_file):
    inputs = read_arrays(inputs_file) if inputs_file else p.random_inputs()
    expect = read_arrays(expect_file) if expect_file else {}
    for name, want in expect.items():
        if name not in p.outputs:
            raise CheckError(f"{expect_file}: '{name}' is no output of {p.path.name}; its outputs "
                             f"are {', '.join(p.outputs)}")
        if want.shape != shape_of(p.outputs[name]):
            raise CheckError(f"{expect_file}: '{name}' has shape {want.shape}, the package declares "
                             f"{shape_of(p.outputs[name])}")
    exact, _, s32 = audit(p, inputs, half=False)
    rounded, largest, s16 = audit(p, inputs)
    for name, y in exact.items():
        line = f"{name} {tuple(y.shape)}: fp16 against fp32 {tensor_psnr(rounded[name], y):.1f} dB"
        if name in expect:
            a, b = (tensor_psnr(v[name], expect[name]) for v in (exact, rounded))
            line += f"; against --expect: fp32 {a:.1f} dB, fp16 {b:.1f} dB"
        print(line)
    print(f"{s32:.2f} s in fp32, {s16:.2f} s in fp16; largest |activation|, limit {LIMIT}:")
    for name, (value, kind) in sorted(largest.items(), key=lambda row: -row[1][0])[:5]:
        print(f"  {value:10.4g}  {kind} {name}")


def print_lint(p, strict):
    found = lint(p)
    for rule, n in Counter(f.rule for f in found).items():
        first = next(f for f in found if f.rule == rule)
        source, text = RULES[rule]
        print(f"{rule:4} x{n:<4} {text}\n           first: {first.name}: {first.what} [{source}]")
    sources = sorted({RULES[f.rule][0] for f in found})
    print("".join(f"[{s}] {SOURCES[s]}\n" for s in sources), end="")
    count = Counter(f.rule[0] for f in found)
    print(f"{count['E']} errors, {count['W']} warnings, {count['I']} notes. Rules predict; "
          "MLComputePlan on a Mac decides.")
    sys.exit(1 if strict and count["E"] else 0)


def print_estimate(p):
    (fused, rows), (unfused, _) = estimate(p), estimate(p, fused=False)
    print("estimate, not measured (pointwise ops fused into their neighbours, to not fused):")
    for c in CHIPS:
        print(f"  {c}: {1000 * fused[c]:.1f} to {1000 * unfused[c]:.1f} ms")
    for seconds, op, gflop, mb in rows[:10]:
        shape = "x".join(map(str, shape_of(op.outputs[0])))
        print(f"{1000 * seconds:9.3f} ms  {op.op_type:12} {shape:20} {gflop:8.2f} GFLOP "
              f"{mb:8.2f} MB  {op.name}")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("run", "lint", "estimate"))
    parser.add_argument("package")
    parser.add_argument("--inputs", help="run: .npz of inputs by name")
    parser.add_argument("--expect", help="run: .npz of outputs by name, to compare with")
    parser.add_argument("--strict", action="store_true", help="lint: exit status 1 on errors")
    a = parser.parse_args(argv)
    p = Package(a.package)
    print(f"{p.path.name}, {p.bytes / 1e6:.1f} MB, {len(p.ops)} ops: "
          + " ".join(f"{k} {n}" for k, n in Counter(o.op_type for o in p.ops).most_common()))
    if a.command == "run":
        print_run(p, a.inputs, a.expect)
    elif a.command == "lint":
        print_lint(p, a.strict)
    else:
        print_estimate(p)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CheckError as e:
        sys.exit(f"error: {e}")
