"""Runs, lints and estimates Core ML packages (.mlpackage, mlprogram) on any machine, without a Mac.

    python -m coreml.check run Unet.mlpackage [--inputs x.npz] [--expect y.npz]
    python -m coreml.check lint Unet.mlpackage [--strict]
    python -m coreml.check estimate Unet.mlpackage

run       executes the saved file op by op with torch: in fp32, which shows the graph alone, and as
          fp16 hardware would, with every result rounded to its declared type. It knows the ops of
          our networks and of Stable Diffusion's UNet, and names any other.
lint      the Neural Engine's rules. They predict; MLComputePlan on a Mac decides.
estimate  a roofline for each op: nothing is measured.
"""
import argparse
import functools
import logging
import math
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

LIMIT = 32768    # matmul and convolution saturate there on engines of M1's class [ane-guide]

class CheckError(Exception):
    """One line that says what is wrong with a package, or what this executor lacks."""

def failed(what: str, e: Exception) -> CheckError:
    return CheckError(f"{what}: {(str(e) or type(e).__name__).splitlines()[0]}")

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
class Arguments(SimpleNamespace):
    """An op's arguments by name: tensors are torch's, all else Python's; None where absent."""
    def __getattr__(self, name):
        return None

def op_batch_norm(a):
    shape = (-1, 1, 1)
    y = (a.x - a.mean.reshape(shape)) * torch.rsqrt(a.variance + a.epsilon).reshape(shape)
    return y if a.gamma is None else y * a.gamma.reshape(shape) + a.beta.reshape(shape)

def op_conv(a):
    x = a.x
    if a.pad_type == "custom":      # with any other the shape of the result is proof enough
        top, bottom, left, right = a.pad
        x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, a.weight, a.bias, a.strides, 0, a.dilations, a.groups)

def op_expand_dims(a):
    shape = list(a.x.shape)
    for i in sorted(axis % (a.x.ndim + len(a.axes)) for axis in a.axes):
        shape.insert(i, 1)
    return a.x.reshape(shape)

def op_layer_norm(a):
    y = a.x - a.x.mean(a.axes, keepdim=True)
    y = y * torch.rsqrt((y * y).mean(a.axes, keepdim=True) + a.epsilon)
    axes = [i % y.ndim for i in a.axes]
    shape = [n if i in axes else 1 for i, n in enumerate(y.shape)]
    y = y if a.gamma is None else y * a.gamma.reshape(shape)
    return y if a.beta is None else y + a.beta.reshape(shape)

def op_slice_by_index(a):
    index = []
    for i in range(a.x.ndim):
        if a.squeeze_mask and a.squeeze_mask[i]:
            index.append(a.begin[i])
            continue
        first = None if a.begin_mask and a.begin_mask[i] else a.begin[i]
        last = None if a.end_mask and a.end_mask[i] else a.end[i]
        index.append(slice(first, last, a.stride[i] if a.stride else 1))
    return a.x[tuple(index)]

UNARY = {"cos": torch.cos, "identity": torch.clone, "sigmoid": torch.sigmoid, "silu": F.silu,
         "sin": torch.sin, "sqrt": torch.sqrt, "square": torch.square, "tanh": torch.tanh}
BINARY = {"add": torch.add, "equal": torch.eq, "greater_equal": torch.ge, "mul": torch.mul,
          "pow": torch.pow, "real_div": torch.div, "sub": torch.sub}
GELU = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}
CASTS = {"fp16": torch.float32, "fp32": torch.float32, "bool": torch.bool}
OPS = {
    "batch_norm": op_batch_norm, "conv": op_conv, "expand_dims": op_expand_dims,
    "layer_norm": op_layer_norm, "slice_by_index": op_slice_by_index,
    "cast": lambda a: a.x.to(CASTS.get(a.dtype, torch.int32)),
    "clip": lambda a: a.x.clamp(a.alpha, a.beta),
    "concat": lambda a: torch.cat(a.values, a.axis),
    "einsum": lambda a: torch.einsum(a.equation, *a.values),
    "gather": lambda a: a.x[(slice(None),) * (a.axis % a.x.ndim) + (a.indices.long(),)],
    "gelu": lambda a: F.gelu(a.x, approximate=GELU[a.mode]),
    "linear": lambda a: F.linear(a.x, a.weight, a.bias),
    "matmul": lambda a: (a.x.mT if a.transpose_x else a.x) @ (a.y.mT if a.transpose_y else a.y),
    "reduce_mean": lambda a: a.x.mean(a.axes, a.keep_dims),
    "reduce_sum": lambda a: a.x.sum(a.axes, a.keep_dims),
    "reshape": lambda a: a.x.reshape([n or a.x.shape[i] for i, n in enumerate(a.shape)]),
    "rsqrt": lambda a: torch.rsqrt(a.x + a.epsilon),
    "scaled_dot_product_attention":
        lambda a: F.scaled_dot_product_attention(a.query, a.key, a.value, a.attn_mask),
    "select": lambda a: torch.where(*map(torch.as_tensor, (a.cond, a.a, a.b))),
    "sigmoid_hard": lambda a: (a.x * a.alpha + a.beta).clamp(0, 1),
    "softmax": lambda a: a.x.softmax(a.axis),
    "split": lambda a: a.x.split(a.split_sizes or a.x.shape[a.axis] // a.num_splits, a.axis),
    "squeeze": lambda a: a.x.squeeze(a.axes),
    "thresholded_relu": lambda a: a.x * (a.x >= a.alpha),
    "transpose": lambda a: a.x.permute(a.perm),
    "upsample_nearest_neighbor": lambda a: F.interpolate(
        a.x, scale_factor=[float(a.scale_factor_height), float(a.scale_factor_width)]),
}
OPS |= {name: lambda a, f=f: f(a.x) for name, f in UNARY.items()}
OPS |= {name: lambda a, f=f: f(torch.as_tensor(a.x), torch.as_tensor(a.y))
        for name, f in BINARY.items()}

# --------------------------------------------------------------------------------------- packages
def is_constant(var):
    return var.op is not None and (var.op.op_type == "const" or "constexpr" in var.op.op_type)

def dtype_of(var):
    """"fp16", "int32", "uint4" ..."""
    return var.dtype.__type_info__().name if hasattr(var.dtype, "__type_info__") else "list"

def shape_of(var):
    """Ints; 0 where a dimension is flexible."""
    return tuple(int(n) if isinstance(n, (int, np.integer)) else 0 for n in var.shape or ())

def size_of(var):
    return int(np.prod([n or 1 for n in shape_of(var)]))

def operands(op):
    """(argument's name, Var) of all that an op reads."""
    for name, value in op.inputs.items():
        for var in value if isinstance(value, (list, tuple)) else [value]:
            if var is not None:
                yield name, var

def constant(name, var):
    """A constant of the package as its op wants it: floats in fp32, compressed weights unpacked."""
    value = var.val if var.op.op_type == "const" else var.op.materialized_val_inference()
    if not isinstance(value, np.ndarray):
        return value.item() if isinstance(value, np.generic) else value
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
        try:
            self.spec = ct.utils.load_spec(str(path))
            weights = self.path / "Data/com.apple.CoreML/weights"
            program = load(self.spec, self.spec.specificationVersion, str(weights))
            function = program.functions[self.spec.description.defaultFunctionName or "main"]
        except Exception as e:                            # each layer of the loader has its own
            raise failed(f"{path} is damaged or no mlprogram, export or copy it again", e) from e
        self.ops = [op for op in function.operations if not is_constant(op.outputs[0])]
        self.inputs = dict(function.inputs)               # {name: Var}
        self.outputs = {v.name: v for v in function.outputs}
        self.bytes = sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())
        reads = [(id(v), i) for i, op in enumerate(self.ops) for _, v in operands(op)]
        kept = [(id(v), None) for v in self.outputs.values()]
        self.last_use = dict(reads + kept)                # {id of a Var: number of an op}

    @functools.cached_property
    def constants(self) -> dict:
        """{id of a Var: value}, unpacked when the package first runs."""
        given = [pair for op in self.ops for pair in operands(op)]
        return {id(v): constant(name, v) for name, v in given if is_constant(v)}

    @torch.inference_mode()
    def run(self, inputs: dict, half: bool = True, largest: dict | None = None) -> dict:
        """{name: array or tensor} -> {name: fp32 tensor}. half: rounds every result to its declared
        type. largest: a dict to fill with {op and result in fp16: largest |value|}, inf for NaN."""
        if unknown := sorted({op.op_type for op in self.ops} - set(OPS)):
            raise CheckError(f"{self.path.name}: this package has ops that the executor does not "
                             f"know: {', '.join(unknown)}")
        if missing := set(self.inputs) - set(inputs):
            raise CheckError(f"{self.path.name} wants the input '{sorted(missing)[0]}'; its inputs "
                             f"are {', '.join(self.inputs)}")
        values = dict(self.constants)
        for name, var in self.inputs.items():
            x = torch.as_tensor(inputs[name])
            x = x.float() if dtype_of(var).startswith("fp") else x.int()
            values[id(var)] = self.stored(x, var, half)
        for i, op in enumerate(self.ops):
            a = Arguments()
            for name, value in op.inputs.items():
                several = isinstance(value, (list, tuple))
                got = [values[id(v)] for v in value] if several else values.get(id(value))
                setattr(a, name, got)
            try:
                results = OPS[op.op_type](a)
            except Exception as e:                        # torch raises many kinds
                raise failed(f"{self.path.name}: {op.op_type} '{op.name}' does not run", e) from e
            results = results if isinstance(results, tuple) else [results]
            for var, result in zip(op.outputs, results, strict=True):
                x = values[id(var)] = self.stored(result, var, half)
                if largest is not None and dtype_of(var) == "fp16":
                    most = x.abs().nan_to_num(math.inf, math.inf).max()
                    largest[f"{op.op_type} {var.name}"] = most.item()
            for _, var in operands(op):
                if self.last_use[id(var)] == i:
                    values.pop(id(var), None)             # an op may read a value twice
        return {name: values[id(v)].float() for name, v in self.outputs.items()}

    def stored(self, x, var, half):
        """x as hardware stores it; CheckError where it is not what the package declares."""
        declared, dtype = shape_of(var), dtype_of(var)
        fits = len(declared) == x.ndim and all(m in (0, n) for m, n in zip(declared, x.shape))
        if not fits or dtype.startswith("fp") != torch.is_floating_point(x):
            raise CheckError(f"{self.path.name}: '{var.name}' is {x.dtype} {tuple(x.shape)}, the "
                             f"package declares {dtype} {declared}")
        return x.half().float() if half and dtype == "fp16" else x

def tensor_psnr(a, b) -> float:
    """PSNR in dB of a against the reference b, whose range is the peak; at most 200."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    peak = max((b.max() - b.min()).item(), 1e-30)
    error = (a - b).square().mean().item() / peak ** 2
    return -10 * math.log10(max(error, 1e-20)) if math.isfinite(error) else -math.inf

# ------------------------------------------------------------------------------------------- lint
NO_PATH = set("""
    acos asin atan atanh band_part cond gru logical_and logical_or logical_xor lstm mod non_zero
    non_maximum_suppression one_hot random_normal random_uniform reduce_prod rnn scatter
    scatter_along_axis scatter_nd shape sinh sliding_windows tan while_loop""".split())
ON_CPU = set("""
    cumsum gather gather_along_axis gather_nd range_1d reduce_argmax reduce_argmin topk""".split())
BIG = 65536      # elements: a copy of fewer costs nothing worth a warning
ISLAND = 4096    # elements: what the CPU does at the edge of a model, before the first fp16 value

class Finding(NamedTuple):
    rule: str      # E: leaves the engine, fails or is wrong; W: slow or risky; I: worth knowing
    name: str      # of the op, input or output
    what: str

def lint(package) -> list[Finding]:
    """All findings, errors first."""
    found = []
    flexible = {i.name for i in package.spec.description.input
                if i.type.multiArrayType.WhichOneof("ShapeFlexibility")}
    for name, v in (*package.inputs.items(), *package.outputs.items()):
        shape, dtype = shape_of(v), dtype_of(v)
        rules = {
            "E0 flexible shape: it may leave the engine [developer.apple.com]": name in flexible,
            "W1 last axis of an input or output under 32: padded to 64 bytes [ml-ane-transformers]":
                len(shape) > 1 and 0 < shape[-1] < 32,
            "W2 input or output is not fp16: cast on the CPU [coremltools]": dtype != "fp16",
        }
        found += [Finding(k, name, f"{dtype} {shape}") for k, broken in rules.items() if broken]
    outputs = {id(v) for v in package.outputs.values()}
    late = set()                                          # values that are fp16 or come from one
    for op in package.ops:
        after = any(id(v) in late for _, v in operands(op))
        for v in op.outputs:
            if after or dtype_of(v) == "fp16":
                late.add(id(v))
            what = f"{op.op_type} in {dtype_of(v)} {shape_of(v)}"
            rules = broken_rules(op, v, after, id(v) in outputs)
            found += [Finding(rule, op.name, what) for rule in rules]
    return sorted(found, key=lambda f: ("EWI".index(f.rule[0]), int(f.rule.split()[0][1:])))

def broken_rules(op, result, after, is_output) -> list[str]:
    """The rules that an op breaks at one of its results. after: it reads what was fp16 before."""
    kind, dtype, shape, size = op.op_type, dtype_of(result), shape_of(result), size_of(result)
    half, big = dtype == "fp16", size >= BIG
    channels = shape[1] if len(shape) > 1 else 0
    rows = max(shape[2:]) if len(shape) == 4 else 0
    kernel = shape_of(op.inputs["weight"])[2:] if kind in ("conv", "conv_transpose") else ()
    still = kind in ("reshape", "transpose") and shape_of(op.inputs["x"])[-1:] == shape[-1:]
    wide = dtype in ("fp32", "int32", "bool") and not (kind == "cast" and is_output)
    heavy = dtype == "fp32" and kind in ("conv", "linear", "matmul", "einsum")
    late = after or heavy or size > ISLAND
    rules = {
        "E1 no path on the engine [ane-guide]": kind in NO_PATH,
        "E2 the engine computes in fp16 only [coreai-models]": wide and late,
        "E3 rank over 5 [coreai-models]": len(shape) > 5,
        "E4 over 65536 channels or 16384 rows [ane-guide]": channels > 65536 or rows > 16384,
        "E5 kernel over 29x13, or padding that is not constant: CPU [ane-guide, WhisperKit]":
            len(kernel) == 2 and (kernel[0] > 29 or kernel[1] > 13)
            or kind == "pad" and op.mode.val != "constant",
        "E6 x / max|x|, nn.RMSNorm as converted: NaN on a row of zeros [measured]":
            kind == "real_div" and made_by(op.y, "reduce_max") and made_by(op.y.op.x, "abs"),
        "W3 runs on the CPU [WhisperKit]": kind in ON_CPU,
        "W4 sin or cos in fp16: errors up to 0.12 [ane-guide]": half and kind in ("sin", "cos"),
        "W5 last axis is no multiple of 32 [coreai-models]": half and big and shape[-1] % 32 > 0,
        "W6 rank 5: keep to 4 [coreai-models]": len(shape) == 5,
        "W7 identity: coremltools 9 makes it of x.pow(2).sqrt(); use (x*x).sqrt() [measured]":
            kind == "identity" and result.child_ops,
        "W8 linear: a 1x1 conv is faster [coreai-models]": kind == "linear" and big,
        "W9 a copy: tile, or reshape or transpose of the last axis [coreai-models]":
            kind in ("reshape", "tile", "transpose") and big and not still,
        "W10 attention scores over 4.7 MB leave the chip: split heads or queries [ane-guide]":
            kind == "softmax" and 2 * size > 4.7e6,
        "I1 fp32 or integers before the first fp16 value: CPU [coreai-models]": wide and not late,
    }
    return [rule for rule, broken in rules.items() if broken]

def made_by(var, kind: str) -> bool:
    return var.op is not None and var.op.op_type == kind

# --------------------------------------------------------------------------------------- estimate
COMPUTE = 0.3 * 17.5e12    # FLOP/s of an A17 Pro; Apple's own tables of UNets amount to 0.2 to 0.3
BANDWIDTH = 51.2e9         # bytes/s
ON_CHIP = 4e6              # bytes: smaller tensors stay on the chip
POINTWISE = {*UNARY, *BINARY, "batch_norm", "cast", "expand_dims", "gelu", "rsqrt", "sigmoid_hard",
             "split", "squeeze", "thresholded_relu"}

def op_flops(op) -> int:
    """Two for each multiply-add."""
    n, kind = size_of(op.outputs[0]), op.op_type
    if kind in ("conv", "linear"):
        w = op.inputs["weight"]
        return 2 * n * size_of(w) // shape_of(w)[0]
    if kind == "matmul":
        return 2 * n * shape_of(op.inputs["x"])[-2 if op.transpose_x.val else -1]
    if kind == "einsum":
        terms, sizes = op.equation.val.replace(" ", "").split("->")[0].split(","), {}
        for letters, v in zip(terms, op.inputs["values"], strict=True):
            sizes |= dict(zip(letters, shape_of(v), strict=True))
        return 2 * int(np.prod(list(sizes.values())))
    if kind == "scaled_dot_product_attention":
        return 4 * size_of(op.inputs["query"]) * shape_of(op.inputs["key"])[-2]
    return n if kind != "reshape" else 0

def stored_bytes(var) -> float:
    """Bytes of a constant in the file: compressed weights stream compressed."""
    if var.op.op_type != "const":
        return sum(stored_bytes(v) for _, v in operands(var.op))
    width = getattr(var.dtype, "get_bitwidth", None)
    return size_of(var) * width() / 8 if width else 0

def estimate(package, fused: bool = True) -> list:
    """[(seconds, op)], slowest first: the larger of compute and memory of each op. fused: pointwise
    ops are free, as part of their neighbours. The truth is between, give or take 40 %."""
    rows = []
    for op in package.ops:
        if fused and op.op_type in POINTWISE:
            continue
        read = [v for _, v in operands(op)]
        traffic = sum(stored_bytes(v) for v in read if is_constant(v))
        for v in (*op.outputs, *read):
            if not is_constant(v) and 2 * size_of(v) >= ON_CHIP:
                traffic += 2 * size_of(v)
        rows.append((max(op_flops(op) / COMPUTE, traffic / BANDWIDTH), op))
    return sorted(rows, key=lambda row: -row[0])

def peak_bytes(package) -> int:
    """Most bytes of activations that are alive at once, in the order of the file. An engine that
    fuses ops needs less, one that keeps copies in other layouts more."""
    alive, most = {id(v): 2 * size_of(v) for v in package.inputs.values()}, 0
    for i, op in enumerate(package.ops):
        alive |= {id(v): 2 * size_of(v) for v in op.outputs}
        most = max(most, sum(alive.values()))
        for _, var in operands(op):
            if package.last_use[id(var)] == i:
                alive.pop(id(var), None)
    return most

# ------------------------------------------------------------------------------- the command line
def read_arrays(path) -> dict:
    """{name: array} of an .npz file."""
    try:
        arrays = dict(np.load(path))
        return arrays or arrays["any array"]              # KeyError
    except Exception as e:                                # numpy and zipfile have many
        raise failed(f"{path} is no file of np.savez(FILE, name=array)", e) from e

def print_run(p, inputs: dict, expect: dict):
    for name, want in expect.items():
        fits = name in p.outputs and want.shape == shape_of(p.outputs[name])
        if not fits or want.dtype.kind not in "iuf" or not np.isfinite(want).all():
            known = ", ".join(f"{k} {shape_of(v)}" for k, v in p.outputs.items())
            raise CheckError(f"--expect has '{name}' {want.shape}; finite outputs are {known}")
    largest = {}
    exact, rounded = p.run(inputs, half=False), p.run(inputs, largest=largest)
    for name, y in exact.items():
        print(f"{name} {tuple(y.shape)}: fp16 against fp32 {tensor_psnr(rounded[name], y):.1f} dB")
        if name in expect:
            print(f"  against --expect: fp32 {tensor_psnr(y, expect[name]):.1f} dB, "
                  f"fp16 {tensor_psnr(rounded[name], expect[name]):.1f} dB")
    print(f"largest |activation| in fp16, limit {LIMIT}:")
    for name in sorted(largest, key=largest.get, reverse=True)[:5]:
        print(f"  {largest[name]:10.4g}  {name}")

def print_lint(found):
    for rule, n in Counter(f.rule for f in found).items():
        first = next(f for f in found if f.rule == rule)
        print(f"x{n:<4} {rule}\n      first: {first.name}: {first.what}")
    count = Counter(f.rule[0] for f in found)
    print(f"{count['E']} errors, {count['W']} warnings, {count['I']} notes")

def print_estimate(p):
    fused, unfused = (1000 * sum(s for s, _ in estimate(p, how)) for how in (True, False))
    print(f"{sum(map(op_flops, p.ops)) / 1e9:.2f} GFLOP; an A17 Pro, estimated, not measured: "
          f"{fused:.1f} ms, {unfused:.1f} if no pointwise op is fused into its neighbours")
    print(f"{p.bytes / 1e6:.0f} MB of weights, {peak_bytes(p) / 1e6:.0f} MB of activations at most")
    for seconds, op in estimate(p)[:10]:
        print(f"{1000 * seconds:9.3f} ms  {op_flops(op) / 1e9:8.2f} GFLOP  {op.op_type} {op.name} "
              f"{shape_of(op.outputs[0])}")

def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("run", "lint", "estimate"))
    parser.add_argument("package")
    parser.add_argument("--inputs", help="run: .npz of inputs by name; default: random, seed 0")
    parser.add_argument("--expect", help="run: .npz of outputs by name, to compare with")
    parser.add_argument("--strict", action="store_true", help="lint: exit status 1 on errors")
    a = parser.parse_args(argv)
    p = Package(a.package)
    ops = Counter(op.op_type for op in p.ops).most_common()
    print(f"{p.path.name}, {p.bytes / 1e6:.1f} MB, {len(p.ops)} ops: "
          + " ".join(f"{kind} {n}" for kind, n in ops))
    if a.command == "run":
        torch.manual_seed(0)
        inputs = {k: torch.randn([n or 1 for n in shape_of(v)]) for k, v in p.inputs.items()}
        if a.inputs:
            inputs = read_arrays(a.inputs)
        print_run(p, inputs, read_arrays(a.expect) if a.expect else {})
    elif a.command == "estimate":
        print_estimate(p)
    else:
        found = lint(p)
        print_lint(found)
        sys.exit(1 if a.strict and any(f.rule[0] == "E" for f in found) else 0)

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CheckError as e:
        sys.exit(f"error: {e}")
