"""Runs, lints and estimates Core ML packages (.mlpackage, mlprogram) on any machine, without a Mac. Usable alone: it imports nothing of ours.

    python coreml_check.py run Unet.mlpackage [--inputs x.npz] [--expect y.npz]     executes the saved file, in fp32 and as fp16 hardware would
    python coreml_check.py lint Unet.mlpackage [--strict]                           Neural Engine rules; --strict: exit status 1 on errors
    python coreml_check.py estimate Unet.mlpackage                                  roofline per op: an estimate, nothing is measured
    ... --function NAME                                                             of a multifunction package

`run` reads what ships (the protobuf and weight.bin, compressed weights included), executes it op by op with torch and asserts the declared shape of
every result. fp32: the graph alone, no rounding between ops. fp16: every result is rounded to its declared type, as hardware with fp16 storage
and wide accumulators does. Largest |activation| per op shows what would overflow. Random inputs (seed 0) unless --inputs gives them by name.

The lint's rules predict; the truth is MLComputePlan on a Mac. Each finding names its source, see SOURCES.
"""
import argparse, logging, sys, time, warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", message=".*has not been tested with coremltools.*")
logging.getLogger("coremltools").setLevel(logging.ERROR)            # "Failed to load _MLModelProxy": there is no Core ML here, that is the point
import coremltools as ct
from coremltools.converters.mil.frontend.milproto.load import load
from coremltools.converters.mil.mil import types

LIMIT = 32768           # matmul and convolution results saturate there on M1-class engines, not at 65504 [ANEG 3]


class CheckError(Exception):
    """One line that says what is wrong with a package, or what this executor lacks."""


# ---------------------------------------------------------------------------- ops
# An op is a function of a namespace with MIL's own argument names: tensors are torch, everything else is Python.
def pads(a, n, size, kernel, stride, dilation):
    """(before, after) of each of the n spatial axes."""
    if a.pad_type == "custom":
        return [(a.pad[2 * i], a.pad[2 * i + 1]) for i in range(n)]
    if a.pad_type == "valid":
        return [(0, 0)] * n
    total = [max(0, (-(-size[i] // stride[i]) - 1) * stride[i] + (kernel[i] - 1) * dilation[i] + 1 - size[i]) for i in range(n)]
    first = [t - t // 2 if a.pad_type == "same_lower" else t // 2 for t in total]
    return [(f, t - f) for f, t in zip(first, total)]


def conv(a):
    n, kernel = a.x.ndim - 2, a.weight.shape[2:]
    stride, dilation = getattr(a, "strides", [1] * n), getattr(a, "dilations", [1] * n)
    a.pad_type = getattr(a, "pad_type", "valid")
    p = pads(a, n, a.x.shape[2:], kernel, stride, dilation)
    f = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    if all(x == y for x, y in p):
        return f(a.x, a.weight, getattr(a, "bias", None), stride, [x for x, _ in p], dilation, getattr(a, "groups", 1))
    return f(F.pad(a.x, [v for pair in reversed(p) for v in pair]), a.weight, getattr(a, "bias", None), stride, 0, dilation, getattr(a, "groups", 1))


def conv_transpose(a):
    n = a.x.ndim - 2
    stride, dilation, pad = getattr(a, "strides", [1] * n), getattr(a, "dilations", [1] * n), getattr(a, "pad", [0] * 2 * n)
    y = (F.conv_transpose1d, F.conv_transpose2d)[n - 1](a.x, a.weight, getattr(a, "bias", None), stride, 0, 0, getattr(a, "groups", 1), dilation)
    for i in range(n):                                              # MIL's padding crops
        size = a.output_shape[2 + i] if getattr(a, "output_shape", None) else y.shape[2 + i] - pad[2 * i] - pad[2 * i + 1]
        y = y.narrow(2 + i, pad[2 * i], size)
    return y


def pool(a, kind):
    n, k = a.x.ndim - 2, a.kernel_sizes
    stride = getattr(a, "strides", k)
    p = pads(a, n, a.x.shape[2:], k, stride, [1] * n)
    flat = [v for pair in reversed(p) for v in pair]
    f = {"max": (F.max_pool1d, F.max_pool2d, F.max_pool3d), "avg": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)}[kind][n - 1]
    y = f(F.pad(a.x, flat, value=-float("inf") if kind == "max" else 0), k, stride)
    return y / f(F.pad(torch.ones_like(a.x), flat), k, stride) if kind == "avg" and getattr(a, "exclude_padding_from_average", False) else y


def norm(a):
    """layer_norm over axes, instance_norm over the spatial ones."""
    y = a.x - a.x.mean(a.axes, keepdim=True)
    y = y * torch.rsqrt((y * y).mean(a.axes, keepdim=True) + a.epsilon)
    shape = [a.x.shape[i] if i in [x % a.x.ndim for x in a.axes] else 1 for i in range(a.x.ndim)]
    for name, f in (("gamma", torch.mul), ("beta", torch.add)):
        y = f(y, getattr(a, name).reshape(shape)) if getattr(a, name, None) is not None else y
    return y


def instance_norm(a):
    gamma, beta, channel = getattr(a, "gamma", None), getattr(a, "beta", None), [1, -1] + [1] * (a.x.ndim - 2)
    y = norm(SimpleNamespace(x=a.x, axes=list(range(2, a.x.ndim)), epsilon=a.epsilon))
    y = y if gamma is None else y * gamma.reshape(channel)
    return y if beta is None else y + beta.reshape(channel)


def batch_norm(a):
    v = lambda x: x.reshape([1, -1] + [1] * (a.x.ndim - 2))
    y = (a.x - v(a.mean)) * torch.rsqrt(v(a.variance) + a.epsilon)
    return y * v(a.gamma) + v(a.beta) if hasattr(a, "gamma") else y


def slice_by_index(a):
    index, squeeze, n = [], getattr(a, "squeeze_mask", None) or [False] * a.x.ndim, a.x.ndim
    flag = lambda name: getattr(a, name, None) or [False] * n
    for i, stride in enumerate(getattr(a, "stride", None) or [1] * n):
        size, b, e = a.x.shape[i], a.begin[i], a.end[i]
        if squeeze[i]:
            index.append(torch.tensor([b % size]))
            continue
        b = None if flag("begin_mask")[i] else b
        e = None if flag("end_mask")[i] else e
        index.append(torch.tensor(range(size)[slice(b, e, stride)], dtype=torch.long))
    y = a.x
    for i, ids in enumerate(index):
        whole = len(ids) == y.shape[i] and bool((ids == torch.arange(len(ids))).all())
        y = y if whole else y.narrow(i, int(ids[0]), len(ids)) if len(ids) and int(ids[-1]) - int(ids[0]) == len(ids) - 1 else y.index_select(i, ids)
    return y.squeeze([i for i in range(n) if squeeze[i]]) if any(squeeze) else y


def reshape(a):
    return a.x.reshape([a.x.shape[i] if s == 0 else s for i, s in enumerate(a.shape)])


def split(a):
    sizes = getattr(a, "split_sizes", None) or [a.x.shape[a.axis] // a.num_splits] * a.num_splits
    return list(a.x.split(sizes, a.axis))


def pad(a):
    n, p = len(a.pad) // 2, a.pad
    flat = [v for i in reversed(range(n)) for v in (p[2 * i], p[2 * i + 1])]
    if getattr(a, "mode", "constant") == "constant":
        return F.pad(a.x, flat, value=float(getattr(a, "constant_val", 0)))
    while flat[-2:] == [0, 0]:
        flat = flat[:-2]                                            # torch reflects the last axes only, and wants to hear of no other
    return F.pad(a.x, flat, mode=a.mode)


def matmul(a):
    return (a.x.mT if getattr(a, "transpose_x", False) else a.x) @ (a.y.mT if getattr(a, "transpose_y", False) else a.y)


def gather(a):
    axis, x, ids = getattr(a, "axis", 0), a.x, torch.as_tensor(a.indices).long()
    axis, batch = axis % x.ndim, getattr(a, "batch_dims", 0)
    ids = torch.where(ids < 0, ids + x.shape[axis], ids)
    if ids.numel() and (int(ids.max()) >= x.shape[axis] or int(ids.min()) < 0):
        raise CheckError(f"gather: index {int(ids.max())} into {x.shape[axis]} rows")
    if batch:
        raise CheckError("gather with batch_dims is not known to this executor")
    return x.index_select(axis, ids.reshape(-1)).reshape(x.shape[:axis] + ids.shape + x.shape[axis + 1:])


def gather_nd(a):
    ids = torch.as_tensor(a.indices).long()
    return a.x[tuple(ids[..., i] for i in range(ids.shape[-1]))]


def interpolate(a, mode):
    scale = [float(getattr(a, f"scale_factor_{s}", 1)) for s in ("height", "width")]
    return F.interpolate(a.x, scale_factor=scale, mode=mode, **({"align_corners": a.align_corners} if mode == "bilinear" else {}))


def sdpa(a):
    mask = getattr(a, "attn_mask", None)
    return F.scaled_dot_product_attention(a.query, a.key, a.value, mask if mask is None or mask.dtype == torch.bool else mask.to(a.query.dtype))


def reduce(f):
    return lambda a: f(a.x, getattr(a, "axes", None) or list(range(a.x.ndim)), getattr(a, "keep_dims", False))


def arg(f):
    return lambda a: f(a.x, a.axis, getattr(a, "keep_dims", False)).int()


def topk(a):
    values, ids = torch.topk(a.x, a.k, getattr(a, "axis", -1), not getattr(a, "ascending", False))
    return [values, ids.int()]


def whole(x, y):
    """Integers divide to integers."""
    return torch.floor_divide(x, y) if not torch.is_floating_point(torch.as_tensor(x)) and not torch.is_floating_point(torch.as_tensor(y)) else torch.true_divide(x, y)


t = torch.as_tensor
UNARY = dict(abs=torch.abs, acos=torch.acos, asin=torch.asin, atan=torch.atan, atanh=torch.atanh, ceil=torch.ceil, cos=torch.cos, cosh=torch.cosh, erf=torch.erf,
             exp=torch.exp, exp2=torch.exp2, floor=torch.floor, identity=lambda x: x, logical_not=torch.logical_not, relu=F.relu, relu6=F.relu6, round=torch.round,
             sigmoid=torch.sigmoid, sign=torch.sign, silu=F.silu, sin=torch.sin, sinh=torch.sinh, softplus=F.softplus, softsign=F.softsign, sqrt=torch.sqrt,
             square=torch.square, tan=torch.tan, tanh=torch.tanh, shape=lambda x: torch.tensor(x.shape, dtype=torch.int32))
BINARY = dict(add=torch.add, sub=torch.sub, mul=torch.mul, real_div=whole, floor_div=torch.floor_divide, mod=torch.remainder, maximum=torch.maximum, minimum=torch.minimum,
              pow=torch.pow, equal=torch.eq, not_equal=torch.ne, less=torch.lt, less_equal=torch.le, greater=torch.gt, greater_equal=torch.ge,
              logical_and=torch.logical_and, logical_or=torch.logical_or, logical_xor=torch.logical_xor)
OPS = {name: (lambda a, f=f: f(t(a.x))) for name, f in UNARY.items()} | {name: (lambda a, f=f: f(t(a.x), t(a.y))) for name, f in BINARY.items()} | {
    "cast": lambda a: t(a.x).to({"fp16": torch.float32, "fp32": torch.float32, "bool": torch.bool}.get(a.dtype, torch.int32)),
    "rsqrt": lambda a: torch.rsqrt(a.x + a.epsilon), "inverse": lambda a: 1 / (a.x + a.epsilon), "log": lambda a: torch.log(a.x + a.epsilon),
    "clip": lambda a: a.x.clamp(a.alpha, a.beta), "threshold": lambda a: a.x.clamp(min=a.alpha), "elu": lambda a: F.elu(a.x, a.alpha),
    "leaky_relu": lambda a: F.leaky_relu(a.x, a.alpha), "sigmoid_hard": lambda a: (a.alpha * a.x + a.beta).clamp(0, 1), "linear_activation": lambda a: a.alpha * a.x + a.beta,
    "gelu": lambda a: F.gelu(a.x) if a.mode == "EXACT" else F.gelu(a.x, approximate="tanh") if a.mode == "TANH_APPROXIMATION" else a.x * torch.sigmoid(1.702 * a.x),
    "prelu": lambda a: F.prelu(a.x, a.alpha), "softmax": lambda a: a.x.softmax(a.axis),
    "reduce_sum": reduce(torch.sum), "reduce_mean": reduce(torch.mean), "reduce_max": reduce(torch.amax), "reduce_min": reduce(torch.amin),
    "reduce_l2_norm": reduce(lambda x, d, k: (x * x).sum(d, k).sqrt()), "reduce_l1_norm": reduce(lambda x, d, k: x.abs().sum(d, k)),
    "reduce_sum_square": reduce(lambda x, d, k: (x * x).sum(d, k)), "reduce_log_sum_exp": reduce(torch.logsumexp),
    "reduce_argmax": arg(torch.argmax), "reduce_argmin": arg(torch.argmin), "topk": topk, "cumsum": lambda a: a.x.cumsum(a.axis),
    "conv": conv, "conv_transpose": conv_transpose, "linear": lambda a: F.linear(a.x, a.weight, getattr(a, "bias", None)), "matmul": matmul,
    "einsum": lambda a: torch.einsum(a.equation, *a.values), "scaled_dot_product_attention": sdpa,
    "layer_norm": norm, "instance_norm": instance_norm, "batch_norm": batch_norm, "l2_norm": lambda a: a.x / ((a.x * a.x).sum([-3, -2, -1], True) + a.epsilon).sqrt(),
    "max_pool": lambda a: pool(a, "max"), "avg_pool": lambda a: pool(a, "avg"),
    "reshape": reshape, "transpose": lambda a: a.x.permute(a.perm), "concat": lambda a: torch.cat(list(map(t, a.values)), a.axis), "stack": lambda a: torch.stack(list(map(t, a.values)), a.axis),
    "expand_dims": lambda a: t(a.x).reshape(expanded(t(a.x).shape, a.axes)), "squeeze": lambda a: a.x.squeeze(a.axes or [i for i, s in enumerate(a.x.shape) if s == 1]),
    "split": split, "slice_by_index": slice_by_index, "slice_by_size": lambda a: a.x[tuple(slice(b, None if s == -1 else b + s) for b, s in zip(a.begin, a.size))],
    "tile": lambda a: a.x.repeat(a.reps), "pad": pad, "reverse": lambda a: a.x.flip(a.axes), "fill": lambda a: torch.full(a.shape, a.value),
    "upsample_nearest_neighbor": lambda a: interpolate(a, "nearest"), "upsample_bilinear": lambda a: interpolate(a, "bilinear"),
    "pixel_shuffle": lambda a: F.pixel_shuffle(a.x, a.upscale_factor), "pixel_unshuffle": lambda a: F.pixel_unshuffle(a.x, a.downscale_factor),
    "gather": gather, "gather_nd": gather_nd, "gather_along_axis": lambda a: a.x.gather(a.axis, t(a.indices).long()), "select": lambda a: torch.where(t(a.cond), t(a.a), t(a.b)),
    "crop": lambda a: a.x[..., a.crop_height[0]:a.x.shape[-2] - a.crop_height[1], a.crop_width[0]:a.x.shape[-1] - a.crop_width[1]],
    "scaled_tanh": lambda a: a.alpha * torch.tanh(a.x * a.beta), "clamped_relu": lambda a: torch.where(a.x < 0, a.x * a.alpha, a.x).clamp(max=a.beta),
    "range_1d": lambda a: torch.arange(a.start, a.end, a.step), "one_hot": lambda a: F.one_hot(t(a.indices).long(), a.one_hot_vector_size),
}


def expanded(shape, axes):
    shape, n = list(shape), len(shape) + len(axes)
    for i in sorted(x % n for x in axes):
        shape.insert(i, 1)
    return shape


# ---------------------------------------------------------------------------- packages
STORED = {types.fp16: "fp16", types.fp32: "fp32", types.int32: "int32", types.bool: "bool", types.str: "str"}
CONSTANT = lambda op: op.op_type == "const" or op.op_type.startswith("constexpr_")


def dtype_of(var):
    return STORED.get(getattr(var, "dtype", None), str(getattr(var, "dtype", "list")))


def shape_of(var):
    """Ints, or None where a dimension is flexible."""
    return tuple(int(s) if isinstance(s, (int, np.integer)) else None for s in var.shape or ())


def size_of(var):
    return int(np.prod([s or 1 for s in shape_of(var)]))


def flat(value):
    return list(value) if isinstance(value, (list, tuple)) else [value]


class Package:
    """A saved mlprogram: its ops, and the means to run them."""

    def __init__(self, path, function: str = ""):
        self.path = Path(path)
        if not (self.path / "Manifest.json").is_file():
            raise CheckError(f"{path} is no .mlpackage: it has no Manifest.json")
        self.spec = ct.utils.load_spec(str(path))
        if self.spec.WhichOneof("Type") != "mlProgram":
            raise CheckError(f"{path} is a {self.spec.WhichOneof('Type')}, not an mlprogram: convert it with convert_to='mlprogram'")
        program = load(self.spec, self.spec.specificationVersion, str(self.path / "Data/com.apple.CoreML/weights"))
        self.functions = sorted(program.functions)                  # a protobuf map: in no order
        default = self.spec.description.defaultFunctionName or self.functions[0]
        if function and function not in self.functions:
            raise CheckError(f"{path} has no function '{function}': it has {', '.join(self.functions)}")
        self.name = function or (default if default in self.functions else self.functions[0])
        self.function = program.functions[self.name]
        self.ops = [op for op in self.function.operations if not CONSTANT(op)]
        self.inputs, self.outputs = dict(self.function.inputs), {v.name: v for v in self.function.outputs}
        self.plan = None
        self.bytes = sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())

    def prepare(self):
        """Once: constants to torch, and the op after which a tensor is dead."""
        constants, last, self.plan = {}, {}, []

        def constant(name, var):
            if id(var) not in constants:
                value = var.val if var.op.op_type == "const" else var.op.materialized_val_inference()
                if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating) and value.ndim:
                    value = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
                elif isinstance(value, np.ndarray):
                    value = torch.from_numpy(value.copy()) if name in ("x", "y", "a", "b", "cond", "indices", "values") else value.tolist()
                elif isinstance(value, np.generic):
                    value = value.item()
                constants[id(var)] = value
            return constants[id(var)]

        for i, op in enumerate(self.ops):
            if op.op_type not in OPS:
                raise CheckError(f"{self.path.name}: op '{op.op_type}' ({op.name}) is not known to this executor: add it to OPS")
            static, dynamic = {}, {}
            for name, value in op.inputs.items():
                if value is None:
                    continue
                if all(v.op is not None and CONSTANT(v.op) for v in flat(value)):
                    vals = [constant(name, v) for v in flat(value)]
                    static[name] = vals if isinstance(value, (list, tuple)) else vals[0]
                elif isinstance(value, (list, tuple)):
                    dynamic[name] = [(constant(name, v), None) if v.op is not None and CONSTANT(v.op) else (None, v) for v in value]
                else:
                    dynamic[name] = value
                for v in flat(value):
                    last[id(v)] = i
            self.plan.append((op, static, dynamic, [(v, shape_of(v), dtype_of(v)) for v in op.outputs]))
        keep = {id(v) for v in self.outputs.values()}
        self.dead = [[] for _ in self.plan]
        for key, i in last.items():
            if key not in keep and key not in constants:
                self.dead[i].append(key)

    @torch.inference_mode()
    def run(self, inputs: dict, half: bool = True, watch=None) -> dict:
        """{name: array or tensor} -> {name: fp32 tensor}. half: round every result to its declared type. watch(op, i, tensor) sees each result."""
        if self.plan is None:
            self.prepare()
        if missing := set(self.inputs) - set(inputs):
            raise CheckError(f"{self.path.name} wants the input '{sorted(missing)[0]}'; its inputs are {', '.join(self.inputs)}")
        values = {}
        for name, var in self.inputs.items():
            x = torch.as_tensor(np.asarray(inputs[name]) if not torch.is_tensor(inputs[name]) else inputs[name])
            x = x.float() if dtype_of(var) in ("fp16", "fp32") else x.int()
            values[id(var)] = self.checked(name, x, shape_of(var), dtype_of(var), half)
        for (op, static, dynamic, declared), dead in zip(self.plan, self.dead):
            args = SimpleNamespace(**static)
            for name, v in dynamic.items():
                setattr(args, name, [c if var is None else values[id(var)] for c, var in v] if isinstance(v, list) else values[id(v)])
            try:
                results = OPS[op.op_type](args)
            except (RuntimeError, AttributeError, IndexError, KeyError) as e:
                raise CheckError(f"{self.path.name}: {op.op_type} '{op.name}' does not execute: {str(e).splitlines()[0]}")
            results = results if isinstance(results, list) else [results]
            for i, ((var, shape, kind), x) in enumerate(zip(declared, results)):
                x = values[id(var)] = self.checked(op.name, x, shape, kind, half)
                if watch:
                    watch(op, i, x)
            for key in dead:
                values.pop(key, None)
        return {name: values[id(v)].float() if id(v) in values else torch.as_tensor(v.val).float() for name, v in self.outputs.items()}

    def checked(self, name, x, shape, kind, half):
        """x as hardware would store it; CheckError where it is not what the package declares."""
        if len(shape) != x.ndim or any(d is not None and d != s for d, s in zip(shape, x.shape)):
            raise CheckError(f"{self.path.name}: '{name}' has shape {tuple(x.shape)}, the package declares {shape}")
        if (kind in ("fp16", "fp32")) != torch.is_floating_point(x):
            raise CheckError(f"{self.path.name}: '{name}' is {x.dtype}, the package declares {kind}")
        return x.half().float() if half and kind == "fp16" else x

    def random_inputs(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        return {name: torch.randn([s or 1 for s in shape_of(v)], generator=g) if dtype_of(v) in ("fp16", "fp32")
                else torch.zeros([s or 1 for s in shape_of(v)], dtype=torch.int32) for name, v in self.inputs.items()}


def psnr(a, b) -> float:
    """Decibels of a against the reference b; the peak is b's range. 200 stands for identical."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    error, peak = (a - b).square().mean().item(), (b.max() - b.min()).item()
    if not np.isfinite(error):
        return -float("inf")
    return 200.0 if error == 0 else min(200.0, float(10 * np.log10(max(peak, 1e-30) ** 2 / error)))


def audit(package, inputs, half=True):
    """(outputs, {op name: (largest |activation|, op type)}, seconds); NaN counts as infinite."""
    largest, begin = {}, time.time()

    def watch(op, i, x):
        if torch.is_floating_point(x) and x.numel():
            m = max(x.max().item(), -x.min().item())
            largest[op.name] = (max(largest.get(op.name, (0, ""))[0], m if m == m else float("inf")), op.op_type)
    return package.run(inputs, half, watch), largest, time.time() - begin


# ---------------------------------------------------------------------------- lint
SOURCES = {
    "APPLE-NE": "apple/coreai-models, neural_engine_rules.md (2026)", "APPLE-22": "machinelearning.apple.com/research/neural-engine-transformers",
    "MLSD": "apple/ml-stable-diffusion", "ANEG": "ane-guide.readthedocs.io (reverse engineered)", "ANEB": "alvaro-videla.com/ane-book",
    "WHISPERKIT": "compute plans of argmaxinc/WhisperKit", "CT": "apple.github.io/coremltools", "FORUM": "developer.apple.com/forums/thread/724930",
    "MEASURED": "measured with this executor on coremltools 9.0",
}
NO_PATH = {"reduce_prod", "mod", "one_hot", "non_zero", "band_part", "shape", "sliding_windows", "logical_and", "logical_or", "logical_xor", "lstm", "gru", "rnn", "tan", "asin", "acos",
           "atan", "atanh", "sinh", "cosh", "cond", "while_loop", "non_maximum_suppression", "scatter", "scatter_nd", "scatter_along_axis", "random_normal", "random_uniform",
           "random_bernoulli", "random_categorical"}
ON_CPU = {"gather", "gather_nd", "gather_along_axis", "topk", "cumsum", "range_1d", "reduce_argmax", "reduce_argmin"}
BIG = 65536             # elements: below it a copy costs nothing worth a warning
ISLAND = 4096           # elements: what the CPU does at the edge of a model, before the first fp16 value exists


def lint(p: Package) -> list[tuple[str, str, str, str]]:
    """[(severity rule, op name, what, source)], errors first. E: leaves the engine, fails or is wrong; W: slow or risky; I: worth knowing."""
    found, say = [], lambda rule, name, what, source: found.append((rule, name, what, source))
    description = next((f for f in p.spec.description.functions if f.name == p.name), p.spec.description)
    for i in description.input or p.spec.description.input:
        kind = i.type.multiArrayType.WhichOneof("ShapeFlexibility")
        if kind == "shapeRange":
            say("E0", i.name, "flexible shape: only the default one may run on the engine; use fixed shapes, several as functions", "FORUM")
        elif kind == "enumeratedShapes":
            say("I6", i.name, "enumerated shapes: LayerNorm left the engine with them (coremltools #1909); use a multifunction package", "CT")
    for kind, variables in (("input", p.inputs), ("output", p.outputs)):
        for name, v in variables.items():
            if len(shape_of(v)) > 1 and size_of(v) > 1 and (shape_of(v)[-1] or 32) < 32:
                say("W1", name, f"{kind} {shape_of(v)}: the last axis is padded to 64 bytes, under 32 elements that is waste", "APPLE-22")
            if dtype_of(v) != "fp16":
                say("W2", name, f"{kind} is {dtype_of(v)}: cast on the CPU", "CT")
    outputs = {id(v) for v in p.outputs.values()}
    half = set()                                                    # tensors that are fp16 or come from one
    for op in p.ops:
        kind, name = op.op_type, op.name
        sources = [v for value in op.inputs.values() if value is not None for v in flat(value) if not (v.op is not None and CONSTANT(v.op))]
        after = any(id(v) in half for v in sources)
        for v in op.outputs:
            shape, n, T = shape_of(v), size_of(v), dtype_of(v)
            if T == "fp16" or after:
                half.add(id(v))
            if T in ("fp32", "int32", "bool") and not (kind == "cast" and id(v) in outputs):
                if after:
                    say("E2", name, f"{kind} in {T} after the first fp16 value: the engine computes in fp16", "APPLE-NE")
                elif n > ISLAND:
                    say("E2", name, f"{kind} in {T} with {n} elements: the engine computes in fp16", "APPLE-NE")
                elif T == "fp32" and kind in ("conv", "linear", "matmul", "einsum"):
                    say("E2", name, f"{kind} in fp32: the engine computes in fp16", "APPLE-NE")
                else:
                    say("I2", name, f"{kind} in {T} on {n} elements: CPU, before the engine starts", "APPLE-NE")
            if None in shape:
                say("E0", name, f"flexible shape {shape}", "FORUM")
            if len(shape) > 5:
                say("E3", name, f"rank {len(shape)}: 5 is the most", "APPLE-NE")
            elif len(shape) == 5:
                say("W6", name, "rank 5: keep to 4", "APPLE-NE")
            if len(shape) == 4 and max(shape[2] or 0, shape[3] or 0) > 16384:
                say("E4", name, f"shape {shape}: over 16384 rows or columns (A15 and older; 65536 since)", "ANEG")
            if len(shape) >= 2 and (shape[1] or 0) > 65536:
                say("E4", name, f"shape {shape}: over 65536 channels", "ANEG")
            if T == "fp16" and n >= BIG and shape and shape[-1] == 1:
                say("W7", name, f"shape {shape}: the last axis is 1 and padded to 64 bytes: 32 times the memory", "APPLE-NE")
            elif T == "fp16" and n >= BIG and shape and (shape[-1] or 32) % 32:
                say("W5", name, f"shape {shape}: the last axis is no multiple of 32", "APPLE-NE")
        out = op.outputs[0]
        n, shape, x = size_of(out), shape_of(out), op.inputs.get("x")
        if kind in NO_PATH:
            say("E1", name, f"{kind} has no path on the engine", "ANEG")
        if kind in ON_CPU:
            say("W3", name, f"{kind} runs on the CPU", "WHISPERKIT")
        if kind in ("sin", "cos") and dtype_of(out) == "fp16":
            say("W4", name, f"{kind} in fp16: since A15 only, errors up to 0.12; keep it in fp32 or outside", "ANEG")
        if kind in ("conv", "conv_transpose"):
            w, groups = shape_of(op.inputs["weight"]), op.groups.val if getattr(op, "groups", None) is not None else 1
            if len(w) == 4 and (w[3] > 13 or w[2] > 29):
                say("E5", name, f"kernel {w[2]}x{w[3]}: 29x13 is the largest", "ANEG")
            if 1 < groups not in (2, 4) and groups != w[0]:
                say("W11", name, f"{groups} groups of {w[0]} channels: 1, 2, 4 or depthwise are native", "ANEG")
            if getattr(op, "strides", None) is not None and max(op.strides.val) > 2:
                say("W10", name, f"stride {max(op.strides.val)}", "APPLE-NE")
            if w[0] % 16 and n >= BIG:
                say("W12", name, f"{w[0]} output channels, no multiple of 16", "ANEG")
        if kind == "pad" and getattr(op, "mode", None) is not None and op.mode.val != "constant":
            say("E5", name, f"{op.mode.val} padding: CPU in WhisperKit's compute plan", "WHISPERKIT")
        if kind == "linear" and n >= BIG:
            say("W9", name, "linear: a 1x1 conv is faster", "APPLE-NE")
        if kind == "real_div" and op.y.op is not None and op.y.op.op_type == "reduce_max" and op.y.op.x.op is not None and op.y.op.x.op.op_type == "abs":
            say("E6", name, "x / max|x|: nn.RMSNorm as converted, NaN on a row of zeros; write x * rsqrt(mean(x * x) + eps)", "MEASURED")
        if kind == "identity" and id(out) not in outputs:
            say("W8", name, "identity inside the graph: coremltools 9.0 turns x.pow(2).sqrt() into it, where |x| was meant; write (x * x).sqrt()", "MEASURED")
        if kind in ("reshape", "transpose") and n >= BIG and x is not None and shape_of(x)[-1:] != shape[-1:]:
            say("W15" if kind == "reshape" else "W14", name, f"{kind} {shape_of(x)} -> {shape} changes the last axis: a copy", "APPLE-NE")
        if kind == "tile" and n >= BIG:
            say("W16", name, f"tile to {shape}: a copy; share keys and values without", "MEASURED")
        if kind == "scaled_dot_product_attention":
            say("W18", name, "fused attention: sources disagree whether the engine has it; 'split' is safe", "APPLE-NE")
        if kind == "softmax":
            if 2 * n > 4.7e6:
                say("W17", name, f"scores of {2 * n / 1e6:.1f} MB exceed the working set: split heads or queries", "ANEG")
            if len(shape) == 4 and op.axis.val % 4 != 1:
                say("I1", name, f"softmax over axis {op.axis.val % 4}: the engine likes axis 1", "APPLE-NE")
        if kind == "matmul" and len(shape) == 4 and shape[1] and shape[1] > 1:
            say("I3", name, "attention heads in one batched matmul: the engine likes them one by one", "APPLE-NE")
    if p.bytes > 1e9:
        say("W13", p.path.name, f"{p.bytes / 1e9:.2f} GB of weights in one program: chunk it, or compress", "MLSD")
    if len(p.ops) > 4000:
        say("I4", p.path.name, f"{len(p.ops)} ops: compiling on the device may take minutes (once)", "MLSD")
    for op in {id(o): o for o in p.function.operations if o.op_type == "constexpr_blockwise_shift_scale"}.values():
        scale = op.inputs["scale"]
        if len([s for s in shape_of(scale) if (s or 1) > 1]) > 1:
            say("I5", op.name, "weights quantised in blocks: convolutions with them fell to the CPU; per channel, or a look-up table", "ANEB")
            break
    return sorted(found, key=lambda f: ("EWI".index(f[0][0]), int(f[0][1:]), f[1]))


# ---------------------------------------------------------------------------- estimate
CHIPS = {"A17 Pro": (17.5e12, 51.2e9), "A18 Pro": (17.5e12, 60e9)}   # fp16 FLOP/s = half of Apple's 35 TOPS, DRAM bytes/s
EFFICIENCY, ON_CHIP = 0.3, 4e6      # 0.2 to 0.3 of the peak is what Apple's own UNet tables amount to [MLSD]; smaller tensors stay on the chip
POINTWISE = {*UNARY, *BINARY, "cast", "rsqrt", "clip", "gelu", "leaky_relu", "sigmoid_hard", "batch_norm", "expand_dims", "squeeze", "split", "identity"}


def flops(op) -> int:
    """Two for each multiply-add."""
    n, kind = size_of(op.outputs[0]), op.op_type
    if kind in ("conv", "linear"):
        return 2 * n * size_of(op.inputs["weight"]) // shape_of(op.inputs["weight"])[0]
    if kind == "matmul":
        tx = getattr(op, "transpose_x", None)
        return 2 * n * shape_of(op.inputs["x"])[-2 if tx is not None and tx.val else -1]
    if kind == "einsum":
        sizes = {}
        for letters, v in zip(op.equation.val.replace(" ", "").split("->")[0].split(","), op.inputs["values"]):
            sizes |= dict(zip(letters, shape_of(v)))
        return 2 * int(np.prod(list(sizes.values())))
    if kind == "scaled_dot_product_attention":
        return 4 * size_of(op.inputs["query"]) * shape_of(op.inputs["key"])[-2]
    return n if kind != "reshape" else 0


def estimate(p: Package, fused: bool = True) -> tuple[dict[str, float], list]:
    """({chip: seconds}, [(seconds on A17 Pro, op type, name, shape, GFLOP, MB)], slowest first): the sum over ops of max(compute, memory).
    fused: pointwise ops are free, as part of their neighbours. The truth is between; expect +-40 %."""
    totals, rows, seen = dict.fromkeys(CHIPS, 0.0), [], set()
    for op in p.ops:
        if fused and op.op_type in POINTWISE:
            continue
        traffic = sum(2 * size_of(v) for v in op.outputs if 2 * size_of(v) >= ON_CHIP)
        for value in op.inputs.values():
            for v in flat(value) if value is not None else []:
                if v.op is not None and CONSTANT(v.op):
                    if id(v) not in seen:
                        traffic += stored_bytes(v)
                    seen.add(id(v))
                elif 2 * size_of(v) >= ON_CHIP:
                    traffic += 2 * size_of(v)
        for chip, (peak, bandwidth) in CHIPS.items():
            seconds = max(flops(op) / (peak * EFFICIENCY), traffic / bandwidth)
            totals[chip] += seconds
            if chip == "A17 Pro":
                rows.append((seconds, op.op_type, op.name, shape_of(op.outputs[0]), flops(op) / 1e9, traffic / 1e6))
    return totals, sorted(rows, reverse=True)


def stored_bytes(v) -> int:
    """Of a weight in the file: compressed ones stream compressed."""
    if v.op.op_type == "const":
        return getattr(v.val, "nbytes", 0)
    bits = {"constexpr_lut_to_dense": lambda: np.log2(max(2, shape_of(v.op.inputs["lut"])[-2])) if "indices" in v.op.inputs and len(shape_of(v.op.inputs["lut"])) > 1 else 8}
    return int(size_of(v) * bits.get(v.op.op_type, lambda: 8)() / 8)


# ---------------------------------------------------------------------------- the command line
def main(argv):
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("command", choices=("run", "lint", "estimate"))
    a.add_argument("package")
    a.add_argument("--function", default="", help="of a multifunction package")
    a.add_argument("--inputs", help="run: .npz of inputs by name")
    a.add_argument("--expect", help="run: .npz of outputs by name, to compare with")
    a.add_argument("--strict", action="store_true", help="lint: exit status 1 on errors")
    a = a.parse_args(argv)
    p = Package(a.package, a.function)
    print(f"{p.path.name}, {p.bytes / 1e6:.1f} MB, function {p.name} of {', '.join(p.functions)}: {len(p.ops)} ops: "
          + " ".join(f"{k} {n}" for k, n in Counter(op.op_type for op in p.ops).most_common()))
    if a.command == "lint":
        found = lint(p)
        for rule in dict.fromkeys(f[0] for f in found):
            rows = [f for f in found if f[0] == rule]
            print(f"{rule:4} x{len(rows):<4} {rows[0][2]}\n           first: {rows[0][1]} [{rows[0][3]}: {SOURCES[rows[0][3]]}]")
        count = Counter(f[0][0] for f in found)
        print(f"{count['E']} errors, {count['W']} warnings, {count['I']} notes. Rules predict; MLComputePlan on a Mac decides.")
        sys.exit(1 if a.strict and count["E"] else 0)
    if a.command == "estimate":
        (fused, rows), (unfused, _) = estimate(p), estimate(p, False)
        print("estimate, not measured: " + "; ".join(f"{c} {1000 * fused[c]:.1f} ms (pointwise ops fused) to {1000 * unfused[c]:.1f} ms (not fused)" for c in CHIPS))
        print("".join(f"{1000 * s:9.3f} ms  {kind:12} {str(shape):24} {gf:8.2f} GFLOP {mb:8.2f} MB  {name}\n" for s, kind, name, shape, gf, mb in rows[:10]), end="")
        return
    inputs = dict(np.load(a.inputs)) if a.inputs else p.random_inputs()
    (exact, _, s32), (rounded, largest, s16) = audit(p, inputs, half=False), audit(p, inputs)
    expect = dict(np.load(a.expect)) if a.expect else {}
    for name in exact:
        print(f"{name} {tuple(exact[name].shape)}: fp16 against fp32 execution {psnr(rounded[name], exact[name]):.1f} dB"
              + (f"; against --expect: fp32 {psnr(exact[name], expect[name]):.1f} dB, fp16 {psnr(rounded[name], expect[name]):.1f} dB" if name in expect else ""))
    worst = sorted(largest.items(), key=lambda kv: -kv[1][0])[:5]
    print(f"{s32:.2f} s in fp32, {s16:.2f} s in fp16. Largest |activation| (limit {LIMIT}): " + ", ".join(f"{v:.4g} {kind} {name}" for name, (v, kind) in worst))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (CheckError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")
