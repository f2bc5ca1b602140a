"""Runs, lints and estimates Core ML packages (.mlpackage, mlprogram) on any machine, without a Mac.

    python -m coreml.check run Unet.mlpackage [--inputs x.npz] [--expect y.npz]
    python -m coreml.check lint Unet.mlpackage [--strict]
    python -m coreml.check estimate Unet.mlpackage

run       executes the saved file in fp32, the graph alone, and as fp16 hardware would, with every
          result rounded to its declared type. The shape of a result must be the declared one.
lint      the Neural Engine's rules, RULES below. They predict; MLComputePlan on a Mac decides.
estimate  a roofline for each op: an estimate, nothing is measured.

Usable without the rest of the repository: copy the folder coreml/ with this file and executor.py.
"""
import argparse
import sys
from collections import Counter
from typing import NamedTuple

import numpy as np

from coreml.executor import (
    BINARY,
    UNARY,
    CheckError,
    Package,
    audit,
    dtype_of,
    is_constant,
    listed,
    shape_of,
    size_of,
    tensor_psnr,
)

LIMIT = 32768    # matmul and convolution saturate there on engines of M1's class [ane-guide]


# ------------------------------------------------------------------------------------------- lint
RULES = {    # E: leaves the engine, fails or is wrong; W: slow or risky; I: worth knowing
    "E0": "flexible shape: only the default one may run on the engine [developer.apple.com]",
    "E1": "no path on the engine [ane-guide]",
    "E2": "the engine computes in fp16 only [coreai-models]",
    "E3": "rank over 5 [coreai-models]",
    "E4": "over 65536 channels, or 16384 rows or columns (65536 since A16) [ane-guide]",
    "E5": "kernel over 29x13, or padding that is not constant: CPU [ane-guide, WhisperKit]",
    "E6": "x / max|x|, nn.RMSNorm as converted: NaN on a row of zeros [measured]",
    "W1": "input or output with a last axis under 32: padded to 64 bytes [ml-ane-transformers]",
    "W2": "input or output is not fp16: cast on the CPU [coremltools]",
    "W3": "runs on the CPU [WhisperKit]",
    "W4": "sin or cos in fp16: errors up to 0.12; keep them in fp32 or outside [ane-guide]",
    "W5": "the last axis is no multiple of 32 [coreai-models]",
    "W6": "rank 5: keep to 4 [coreai-models]",
    "W7": "the last axis is 1, padded to 64 bytes: 32 times the memory [coreai-models]",
    "W8": "identity: coremltools 9 turns x.pow(2).sqrt() into it; use (x*x).sqrt() [measured]",
    "W9": "linear: a 1x1 conv is faster [coreai-models]",
    "W10": "stride over 2 [coreai-models]",
    "W11": "groups: 1, 2, 4 or depthwise are native [ane-guide]",
    "W12": "output channels are no multiple of 16 [ane-guide]",
    "W13": "over 1 GB of weights in one program: chunk or compress it [ml-stable-diffusion]",
    "W14": "transpose of the last axis: a copy [coreai-models]",
    "W15": "reshape of the last axis: a copy [coreai-models]",
    "W16": "tile: a copy; share keys and values without [measured]",
    "W17": "attention scores exceed the working set of 4.7 MB: split heads or queries [ane-guide]",
    "W18": "fused attention: sources disagree whether the engine has it [coreai-models]",
    "I1": "softmax not over axis 1 [coreai-models]",
    "I2": "fp32 or integers before the first fp16 value: CPU [coreai-models]",
    "I3": "heads in one batched matmul: the engine likes them one by one [coreai-models]",
    "I4": "over 4000 ops: compiling on the device may take minutes, once [ml-stable-diffusion]",
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
    found = [*lint_ends(package), *lint_types(package)]
    for op in package.ops:
        shape, x = shape_of(op.outputs[0]), op.inputs.get("x")
        before = f"{shape_of(x)} -> " if op.op_type in ("reshape", "transpose") else ""
        what = f"{op.op_type} {before}{shape}"
        found += [Finding(rule, op.name, what) for rule in (*lint_shapes(op), *lint_op(op))]
    if package.bytes > 1e9:
        found.append(Finding("W13", package.path.name, f"{package.bytes / 1e9:.2f} GB"))
    if len(package.ops) > 4000:
        found.append(Finding("I4", package.path.name, f"{len(package.ops)} ops"))
    return sorted(found, key=lambda f: ("EWI".index(f.rule[0]), int(f.rule[1:]), f.name))


def lint_ends(p):
    """Inputs and outputs."""
    for i in p.spec.description.input:
        if i.type.multiArrayType.WhichOneof("ShapeFlexibility"):
            yield Finding("E0", i.name, "input")
    for name, v in (*p.inputs.items(), *p.outputs.items()):
        if len(shape_of(v)) > 1 and size_of(v) > 1 and (shape_of(v)[-1] or 32) < 32:
            yield Finding("W1", name, f"{shape_of(v)}")
        if dtype_of(v) != "fp16":
            yield Finding("W2", name, dtype_of(v))


def lint_types(p):
    """What is not fp16: harmless before the first fp16 value, if it is small."""
    outputs = {id(v) for v in p.outputs.values()}
    late = set()                                          # values that are fp16 or come from one
    for op in p.ops:
        after = any(id(v) in late for value in op.inputs.values() for v in listed(value))
        for v in op.outputs:
            kind = dtype_of(v)
            if kind == "fp16" or after:
                late.add(id(v))
            if kind not in ("fp32", "int32", "bool") or op.op_type == "cast" and id(v) in outputs:
                continue
            heavy = kind == "fp32" and op.op_type in ("conv", "linear", "matmul", "einsum")
            rule = "E2" if after or size_of(v) > ISLAND or heavy else "I2"
            yield Finding(rule, op.name, f"{op.op_type} in {kind}, {size_of(v)} elements")


def lint_shapes(op):
    for v in op.outputs:
        shape = shape_of(v)
        if None in shape:
            yield "E0"
        if len(shape) >= 5:
            yield "W6" if len(shape) == 5 else "E3"
        channels = (shape[1] or 0) if len(shape) > 1 else 0
        rows = max(n or 0 for n in shape[2:]) if len(shape) == 4 else 0
        if rows > 16384 or channels > 65536:
            yield "E4"
        if dtype_of(v) == "fp16" and size_of(v) >= BIG and (shape[-1] or 32) % 32:
            yield "W7" if shape[-1] == 1 else "W5"


def lint_op(op):
    kind, out, x = op.op_type, op.outputs[0], op.inputs.get("x")
    shape, big = shape_of(out), size_of(out) >= BIG
    if kind in NO_PATH:
        yield "E1"
    if kind in ON_CPU:
        yield "W3"
    if kind in ("sin", "cos") and dtype_of(out) == "fp16":
        yield "W4"
    if kind in ("conv", "conv_transpose"):
        yield from lint_conv(op, big)
    if kind == "pad" and op.mode.val != "constant":
        yield "E5"
    if kind == "real_div" and op.y.op is not None and op.y.op.op_type == "reduce_max":
        inner = op.y.op.x.op
        if inner is not None and inner.op_type == "abs":
            yield "E6"
    if kind == "identity" and out.child_ops:
        yield "W8"
    if big and kind in ("linear", "tile"):
        yield "W9" if kind == "linear" else "W16"
    if big and kind in ("reshape", "transpose") and shape_of(x)[-1:] != shape[-1:]:
        yield "W15" if kind == "reshape" else "W14"
    if kind == "scaled_dot_product_attention":
        yield "W18"
    if kind == "softmax" and 2 * size_of(out) > 4.7e6:
        yield "W17"
    if kind == "softmax" and len(shape) == 4 and op.axis.val % 4 != 1:
        yield "I1"
    if kind == "matmul" and len(shape) == 4 and (shape[1] or 0) > 1:
        yield "I3"


def lint_conv(op, big):
    w = shape_of(op.inputs["weight"])
    if len(w) == 4 and (w[3] > 13 or w[2] > 29):
        yield "E5"
    if op.groups.val not in (1, 2, 4, w[0]):
        yield "W11"
    if max(op.strides.val) > 2:
        yield "W10"
    if w[0] % 16 and big:
        yield "W12"


# --------------------------------------------------------------------------------------- estimate
CHIPS = {"A17 Pro": (17.5e12, 51.2e9), "A18 Pro": (17.5e12, 60e9)}    # fp16 FLOP/s, DRAM bytes/s
EFFICIENCY = 0.3    # of the peak: Apple's own tables of UNets amount to 0.2 to 0.3
ON_CHIP = 4e6       # bytes: smaller tensors stay on the chip
POINTWISE = {*UNARY, *BINARY, "batch_norm", "cast", "clip", "expand_dims", "gelu", "rsqrt", "split",
             "squeeze"}


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
        return sum(stored_bytes(v) for v in var.op.inputs.values() if v is not None)
    width = getattr(var.dtype, "get_bitwidth", None)
    return size_of(var) * width() / 8 if width else 0


def estimate(package, fused: bool = True):
    """({chip: seconds}, [(seconds on an A17 Pro, op, GFLOP, MB)], slowest first).

    The sum over the ops of max(compute, memory). fused: pointwise ops are free, as part of their
    neighbours. The truth is between the two; expect +-40 %.
    """
    totals, rows, streamed = dict.fromkeys(CHIPS, 0.0), [], set()
    for op in package.ops:
        if fused and op.op_type in POINTWISE:
            continue
        moved = list(op.outputs)
        traffic = 0
        for v in (v for value in op.inputs.values() for v in listed(value)):
            if not is_constant(v):
                moved.append(v)
            elif id(v) not in streamed:                   # weights count once
                streamed.add(id(v))
                traffic += stored_bytes(v)
        traffic += sum(2 * size_of(v) for v in moved if 2 * size_of(v) >= ON_CHIP)
        seconds = {c: max(op_flops(op) / (peak * EFFICIENCY), traffic / bandwidth)
                   for c, (peak, bandwidth) in CHIPS.items()}
        totals = {c: totals[c] + seconds[c] for c in CHIPS}
        rows.append((seconds["A17 Pro"], op, op_flops(op) / 1e9, traffic / 1e6))
    return totals, sorted(rows, key=lambda row: -row[0])


# ------------------------------------------------------------------------------- the command line
def read_arrays(path) -> dict:
    """{name: array} of an .npz file."""
    try:
        arrays = np.load(path)
    except (OSError, ValueError) as e:
        raise CheckError(f"{path} cannot be read: {e}") from None
    if not hasattr(arrays, "files"):
        raise CheckError(f"{path} has one array without a name: save it by np.savez(FILE, name=x)")
    return dict(arrays)


def print_run(p, inputs: dict, expect: dict):
    for name, want in expect.items():
        if name not in p.outputs or want.shape != shape_of(p.outputs[name]):
            known = ", ".join(f"{k} {shape_of(v)}" for k, v in p.outputs.items())
            raise CheckError(f"--expect has '{name}' {want.shape}, but the outputs are {known}")
    exact, _, s32 = audit(p, inputs, half=False)
    rounded, largest, s16 = audit(p, inputs)
    for name, y in exact.items():
        print(f"{name} {tuple(y.shape)}: fp16 against fp32 {tensor_psnr(rounded[name], y):.1f} dB")
        if name in expect:
            fp32, fp16 = (tensor_psnr(out[name], expect[name]) for out in (exact, rounded))
            print(f"  against --expect: fp32 {fp32:.1f} dB, fp16 {fp16:.1f} dB")
    print(f"{s32:.2f} s in fp32, {s16:.2f} s in fp16; largest |activation|, limit {LIMIT}:")
    for name, (value, kind) in sorted(largest.items(), key=lambda row: -row[1][0])[:5]:
        print(f"  {value:10.4g}  {kind} {name}")


def print_lint(found):
    for rule, n in Counter(f.rule for f in found).items():
        first = next(f for f in found if f.rule == rule)
        print(f"{rule:4} x{n:<4} {RULES[rule]}\n           first: {first.name}: {first.what}")
    count = Counter(f.rule[0] for f in found)
    print(f"{count['E']} errors, {count['W']} warnings, {count['I']} notes")


def print_estimate(p):
    (fused, rows), (unfused, _) = estimate(p), estimate(p, fused=False)
    print("estimate, not measured (pointwise ops fused into their neighbours, to not fused):")
    print(f"  {sum(map(op_flops, p.ops)) / 1e9:.2f} GFLOP")
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
    parser.add_argument("--inputs", help="run: .npz of inputs by name; default: random, seed 0")
    parser.add_argument("--expect", help="run: .npz of outputs by name, to compare with")
    parser.add_argument("--strict", action="store_true", help="lint: exit status 1 on errors")
    a = parser.parse_args(argv)
    p = Package(a.package)
    ops = Counter(op.op_type for op in p.ops).most_common()
    print(f"{p.path.name}, {p.bytes / 1e6:.1f} MB, {len(p.ops)} ops: "
          + " ".join(f"{kind} {n}" for kind, n in ops))
    if a.command == "run":
        inputs = read_arrays(a.inputs) if a.inputs else p.random_inputs()
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
