"""Executes Core ML packages (.mlpackage, mlprogram) on any machine, without a Mac: reads what ships
(the protobuf and weight.bin, compressed or not) and runs it op by op with torch.

It knows the ops of our networks and of Stable Diffusion's, and names any other. It imports nothing
of ours; coreml/check.py is its command.
"""
import logging
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

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
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                    ValueError) as e:
                raise CheckError(f"{self.path.name}: {op.op_type} '{op.name}' does not execute: "
                                 f"{str(e).splitlines()[0]}") from e
            results = results if isinstance(results, tuple) else [results]
            for var, x in zip(op.outputs, results, strict=True):
                values[id(var)] = self.stored(op.name, x, var, half)
                if watch:
                    watch(op, values[id(var)])
            for key in dead:
                del values[key]
        return {k: torch.as_tensor(values.get(id(v), v.val)).float()
                for k, v in self.outputs.items()}

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
