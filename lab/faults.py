"""The eighteen kinds of malformed input of lab.fuzz: each is a function that draws a Case."""
import contextlib
import dataclasses
import json
import os
import resource
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from adv_distill import AdvConfig
from checker import CheckerConfig
from checkpoint import crc32
from common import ROOT, UserError
from lab import badfiles
from train_decoder import DecoderConfig
from train_text import MatchConfig

class Case(NamedTuple):
    """words: a command; want: refuse, work, or any: refused or right, but no traceback;
    around: a context in which it runs."""
    words: list
    want: str = "refuse"
    around: contextlib.AbstractContextManager = contextlib.nullcontext()

KINDS = {}

def kind(function):
    """Registers a function (rng, home, folder) -> Case. home: a fuzz.Home; folder: of the case."""
    KINDS[len(KINDS) + 1] = function
    return function

# ---------------------------------------------------------------------------- configs
CONFIGS = {"train.py": AdvConfig, "train_decoder.py": DecoderConfig, "checker.py": CheckerConfig,
           "train_text.py": MatchConfig}
INTS = (-1, 0, 1, 2, 3, 5, 7, 16, 31, 33, 64, 100, 10**6, 2**31, 2**63, 10**30)
ODD = ("x", "true", "[]", "{a=1}", "[[1]]", "2024-05-01", "1e400", "''", "1.5", "[1, 'a']", "-7")
SHAPES = """model.widths model.depth_down model.depth_up model.self_attn model.head_dim model.groups
    model.kv_heads model.time_freqs model.time_dim model.context_dim model.act model.in_channels
    model.res_down model.expansion model.ff_mult model.rope text.heads text.width text.layers
    text.vocabulary text.max_tokens text.leave_out text.kind text.pattern data.size data.pictures
    data.nouns data.layout data.bucket_step data.shard flow.shift flow.std seed data.seed arch batch
    warmup accumulate val_pictures samples sample_steps log_every eval_every ema clip""".split()
MMDIT = "layers heads head_dim patch context_dim pooled_dim base position_max dual".split()

def fields_of(cfg, prefix=""):
    """(key, value, bounds) of all fields of a config and of the configs in it."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, field.metadata

def script_with(rng, home, folder, keys):
    """(a command, a key that it has) for keys of CONFIGS: {script: [key]}."""
    script = rng.choice([s for s in keys if keys[s]])
    key = rng.choice(keys[script])
    if script != "train.py":
        return [script, "steps=1", "device=cpu", f"out={folder / 'run'}"], key
    own = {f.name for f in dataclasses.fields(AdvConfig)}
    adv = key.split(".")[0] in own - {"model", "data", "text", "flow"}
    return home.words("gan" if adv else "train", out=folder / "run"), key

def numeric(allowed) -> dict:
    return {script: [key for key, value, bounds in fields_of(cfg()) if allowed(value, bounds)]
            for script, cfg in CONFIGS.items()}

@kind
def shapes(rng, home, folder):
    """config: shapes that do not fit"""
    stage = rng.choice(("train", "mmdit", "distill", "gan"))
    key = f"mmdit.{rng.choice(MMDIT)}" if stage == "mmdit" else rng.choice(SHAPES)
    value = rng.choice((*INTS, *ODD, [rng.choice(INTS) for _ in range(rng.randrange(5))]))
    return Case([*home.words(stage, out=folder / "run"), f"{key}={value}"], "any")

@kind
def not_finite(rng, home, folder):
    """config: nan, infinite, out of range"""
    def is_number(value, _):
        return type(value) in (int, float)
    words, key = script_with(rng, home, folder, numeric(is_number))
    if rng.random() < 0.3:
        flag = rng.choice(("--cfg", "--shift", "--interval"))
        value = rng.choice(("nan", "inf", "-inf", "1e999", "x"))
        words = ["sample.py", "dog", "-o", folder / "x.png", flag, value, *["1"] * (flag[2] == "i")]
        return Case(words)
    if rng.random() < 0.3:
        run = home.copy(home.pipeline("train"), folder)
        spoil_tensors(rng, run / "final", "model", ("nan", "inf", "huge"))
        return Case(rng.choice((
            ["sample.py", "dog", "--ckpt", run / "final", f"--ae={home.pipeline.ae}", "-o",
             folder / "x.png", "--steps", 1],
            ["evaluate.py", "--ckpt", run / "final", f"--ae={home.pipeline.ae}", "--prompts", 1,
             "--each", 1, "--steps", 1, "--out", folder / "o"],
            [*home.words("train", out=folder / "new"), f"init={run / 'final'}"],
            [*home.words("distill", out=folder / "new"), f"teacher={run / 'final'}"])))
    return Case([*words, f"{key}={rng.choice(('nan', 'inf', '-inf', '1e999', '-1e300', 10**400))}"])

@kind
def system_errors(rng, home, folder):
    """a path that cannot be read or written"""
    file = folder / "file"
    file.write_bytes(rng.randbytes(100))
    (folder / "dir.png").mkdir()
    bad = rng.choice((file, file / "inside", "/dev/null/x", folder / ("x" * 300), "/proc/nothing/x",
                      folder / "dir.png", f"{folder}/a\udce4b/c"))
    train, out = home.words("train", out=folder / "run"), folder / "run"
    return Case(rng.choice((
        [*home.words("train"), f"out={file}"], [*train, f"data.cache={file}"],
        *([*train, f"{key}={bad}"] for key in ("ae", "init", "text.init", "data.atlas")),
        *([*home.words(stage, out=out), f"{key}={bad}"]
          for stage, key in (("distill", "teacher"), ("gan", "init"), ("gan", "teacher"))),
        ["train.py", "--config", bad], ["lab.plan", "--config", bad],
        ["train.py", "--cache", *train[1:], f"data.folder={bad}"],
        ["sample.py", "dog", "-o", f"{file}/x.png"], ["sample.py", "dog", "-o", folder / "dir.png"],
        *(["sample.py", "dog", "-o", folder / "x.png", flag, bad]
          for flag in ("--ckpt", "--ae", "--coreml", "--prompts")),
        ["sample.py", "dog", "-o", folder / "x.png", "--out-dir", file],
        *(["evaluate.py", "--prompts", 1, "--each", 1, flag, bad]
          for flag in ("--ckpt", "--checker", "--ae", "--coreml")),
        ["evaluate.py", "--prompts", 1, "--out", file], ["data.py", "--export", file, 20],
        ["data.py", "--show", folder / "dir.png"], ["data.py", "--build-atlas", bad],
        ["text.py", "--train-bpe", folder / "dir.png"], ["train_text.py", f"out={file}"],
        ["train_text.py", "--probe", bad], ["train_text.py", "--match", bad],
        ["train_decoder.py", f"out={file}"], ["train_decoder.py", "device=cpu", f"encoder={bad}"],
        ["train_decoder.py", "lpips_weight=1", f"lpips={bad}"], ["train_decoder.py", "--test", bad],
        ["checker.py", f"out={file}"], ["export_coreml.py", "--out", file],
        *(["export_coreml.py", "--out", folder / "b", flag, bad] for flag in ("--ckpt", "--ae")),
        ["coreml.check", rng.choice(("run", "lint", "estimate")), bad],
        ["coreml.check", "run", home.bundle / "VAEDecoder.mlpackage", "--inputs", bad],
        ["lab.benchmarks", "geneval", bad, "--out", out], ["lab.benchmarks", "dpg", bad, "--out",
                                                           out],
        ["distill.py", "--plot", bad], ["lab.dreamlite", bad])))

@kind
def descriptions(rng, home, folder):
    """a config.json, `latest` or cache.json of other forms"""
    which = rng.choice(("train", "gan", "ae", "cache", "checker"))
    sources = {"ae": home.pipeline.ae, "cache": home.cache, "checker": ROOT / "assets/checker"}
    copy = home.copy(sources[which] if which in sources else home.pipeline(which), folder)
    inner = copy / "final" if which in ("train", "gan") and rng.random() < 0.5 else copy
    file = inner / {"cache": "cache.json"}.get(which, "config.json")
    if not file.exists():
        file = copy / "latest" if rng.random() < 0.3 else copy / "checkpoint/config.json"
    badfiles.spoil_json(rng, file)
    new, ae = f"out={folder / 'new'}", f"--ae={home.pipeline.ae}"
    draw = ["sample.py", "dog", "--ckpt", inner, ae, "--steps", 1, "-o", folder / "x.png"]
    uses = {
        "train": (draw, [*home.words("train"), new, f"init={inner}"],
                  [*home.words("train"), f"out={copy}", "steps=5"],
                  [*home.words("distill"), new, f"teacher={inner}"],
                  [*home.words("gan"), new, f"init={inner}"],
                  ["train_text.py", "--probe", inner, "steps=1", "held_out=9", "batch=9"],
                  ["lab.plan", "--config", "configs/adv_nano.toml", f"init={inner}"]),
        "gan": (draw, [*home.words("gan"), f"out={copy}", "steps=5"]),
        "ae": ([*home.words("train"), new, f"ae={copy}"],
               ["train_decoder.py", "device=cpu", "steps=1", new, f"encoder={copy}",
                "autoencoder.tiny_widths=[16,16,16,16]", "eval_every=1", "size=16", "pixels=256"]),
        "cache": ([*home.words("train", copy), new, *home.own],
                  ["train.py", "--cache", *home.words("train", copy)[1:], *home.own]),
        "checker": (["evaluate.py", "--checker", copy, "--prompts", 1, "--each", 1, "--steps", 1,
                     "--out", folder / "o"],),
    }
    return Case(rng.choice(uses[which]), "any")

def spoil_tensors(rng, folder: Path, name: str, ways):
    """Alters one tensor of NAME.safetensors, with a checksum that is right."""
    file = folder / f"{name}.safetensors"
    state = load_file(file)
    floating = [k for k, x in state.items() if x.is_floating_point() and x.numel() > 1]
    key, way = rng.choice(floating), rng.choice(ways)
    x = state.pop(key)
    if way == "renamed":
        state[key + "x"] = x
    elif way == "shape":
        state[key] = x.flatten()[:-1].clone()
    elif way == "integers":
        state[key] = x.int()
    elif way == "more":
        state |= {key: x, "new": x.clone()}
    elif way != "gone":
        state[key] = x.clone()
        largest = torch.finfo(x.dtype).max
        state[key].view(-1)[rng.randrange(x.numel())] = largest if way == "huge" else float(way)
        for k in floating if way == "huge" else ():         # finite, but what is drawn is not
            state[k] = torch.full_like(state[k], largest)
    save_file(state, file)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["crc32"][file.name] = crc32(file)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")

@kind
def states(rng, home, folder):
    """resume: optimizer, average or weights of another form"""
    stage = rng.choice(("train", "mmdit", "gan"))
    run = home.copy(home.pipeline(stage), folder)
    parts = [f.stem for f in (run / "checkpoint").glob("*.safetensors")]
    ways = ("renamed", "gone", "more", "shape", "integers", "nan", "inf")
    spoil_tensors(rng, run / "checkpoint", rng.choice(parts), ways)
    return Case([*home.words(stage), f"out={run}", "steps=5"])

@kind
def caches(rng, home, folder):
    """a cache of scenes that is cut or altered: made again"""
    copy = home.copy(home.pipeline.folder / "cache", folder)
    file = rng.choice(sorted(copy.glob("*.safetensors")))
    badfiles.spoil_cache(rng, file)
    return Case(home.words("train", copy, folder / "run"), "work")

@kind
def pictures(rng, home, folder):
    """own pictures among which something is bad: skipped and listed"""
    copy = home.copy(home.pictures, folder)
    badfiles.spoil_pictures(rng, copy)
    words = home.words("train", folder / "cache", folder / "run")
    return Case(["train.py", "--cache", *words[1:], *home.own, f"data.folder={copy}"], "work")

# ---------------------------------------------------------------------------- Core ML
@kind
def packages(rng, home, folder):
    """run, lint, estimate of a package with a file cut, changed or missing"""
    name = rng.choice(("VAEDecoder", "TextEncoder", "Unet")) + ".mlpackage"
    copy = home.copy(home.bundle / name, folder)
    file = rng.choice(sorted(f for f in copy.rglob("*") if f.is_file()))
    badfiles.spoil_file(rng, file)
    words = ["coreml.check", rng.choice(("run", "lint", "estimate")), copy]
    if rng.random() < 0.2:
        (folder / "x.npz").write_bytes(rng.randbytes(rng.randrange(99)))
        words = ["coreml.check", "run", home.bundle / name, "--inputs", folder / "x.npz"]
    return Case(words, "any")

@kind
def expectations(rng, home, folder):
    """--expect of other names, shapes, kinds"""
    x, y = np.zeros((1, 16, 4, 4), np.float32), np.zeros((1, 3, 32, 32), np.float32)
    wrong = rng.choice((
        {"image": y[:, :, :rng.randrange(32)]}, {f"var_{rng.randrange(99)}": y}, {"Image": y}, {},
        {"image": y, "more": y}, {"image": y[0]}, {"image": np.full_like(y, np.nan)},
        {"image": np.array("text")}, {"image": np.array([None])}, {"image": y.astype(complex)}))
    file = folder / rng.choice(("y.npz", "y.npy", "y.txt"))
    with open(file, "wb") as f:
        if file.suffix == ".npz":
            np.savez(f, **wrong)
        else:
            np.save(f, x)
    package = home.bundle / "VAEDecoder.mlpackage"
    return Case(["coreml.check", "run", package, "--expect", file])

@kind
def bundles(rng, home, folder):
    """a bundle with a part missing, or a manifest of another form"""
    copy = home.copy(home.bundle, folder)
    if rng.random() < 0.6:
        badfiles.spoil_json(rng, copy / "manifest.json")
    else:
        file = rng.choice(sorted(f for f in copy.rglob("*") if f.is_file()))
        badfiles.spoil_file(rng, file)
    return Case(rng.choice((
        ["sample.py", "dog", "--coreml", copy, "--steps", 1, "-o", folder / "x.png"],
        ["sample.py", "dog", "--coreml", copy, "--list"],
        ["evaluate.py", "--coreml", copy, "--prompts", 1, "--each", 1, "--steps", 1])), "any")

# ---------------------------------------------------------------------------- amounts
@contextlib.contextmanager
def few_processes():
    """UserError at the first loader with more processes than cores, else at the first one."""
    def loader(*_, num_workers=0, **__):
        if num_workers > (os.cpu_count() or 1):
            raise AssertionError(f"{num_workers} processes")
        raise UserError(f"{num_workers} processes, as many as there are cores or fewer")
    with mock.patch("torch.utils.data.DataLoader", loader):
        yield

@kind
def floods(rng, home, folder):
    """more processes than cores"""
    n = rng.choice((3, 17, 100, 1000, 10**6, 10**9, -1, 2**40, rng.randrange(10**5)))
    train = home.words("train", folder / "cache", folder / "run")
    return Case(rng.choice((
        [*train, f"data.workers={n}", "data.pictures=100000"],
        ["train.py", "--cache", *train[1:], *home.own, f"data.workers={n}"],
        ["checker.py", "device=cpu", "steps=1", f"out={folder / 'run'}", f"workers={n}"])),
        "refuse", few_processes())

@kind
def amounts(rng, home, folder):
    """an amount that never ends"""
    def is_int(value, bounds):
        return type(value) is int and bounds.get("high") is not None
    words, key = script_with(rng, home, folder, numeric(is_int))
    n = rng.choice((10**12, 10**15, 2**62, 2**200, 10**11))
    if key.endswith("seed"):
        n = 2**64
    if rng.random() < 0.4:
        draw = ["sample.py", "dog", "-o", folder / "x.png"]
        score = ["evaluate.py", "--out", folder / "o"]
        words = rng.choice((
            *([*draw, flag, n] for flag in ("--steps", "-n", "--size")),
            *([*score, flag, n] for flag in ("--steps", "--prompts", "--each", "--fd", "--batch")),
            ["export_coreml.py", "--out", folder / "b", "--size", n],
            ["data.py", "--export", folder / "e", n], ["lab.plan", f"gpus={n}"]))
        return Case(words)
    return Case([*words, f"{key}={n}"])

@kind
def plans(rng, home, folder):
    """lab.plan of impossible machines"""
    key = rng.choice(("gpus", "gpu_gb", "gpu_tflops", "mfu", "tokens", "batch", "data.size"))
    value = rng.choice((-1, "-0.5", "nan", "inf", "x", "''", "[1]", 10**20, "true", "1e999"))
    config = rng.choice(sorted((ROOT / "configs").glob("*nano.toml")))
    return Case(["lab.plan", "--config", config, f"{key}={value}"])

@contextlib.contextmanager
def small_disk(n: int):
    """Files of at most n bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

@kind
def full_disks(rng, home, folder):
    """a full disk"""
    train, n = home.words("train", folder / "cache", folder / "run"), rng.randrange(2, 4000)
    uses = [train, ["train.py", "--cache", *train[1:], *home.own],
            home.words("gan", out=folder / "run"),
            [*home.words("train"), f"out={home.copy(home.pipeline('train'), folder)}", "steps=5"],
            ["data.py", "--export", folder / "e", 20], ["data.py", "--show", folder / "x.png"],
            ["sample.py", "dog", "--steps", 1, "-o", folder / "x.png"],
            ["sample.py", "dog", "--coreml", home.bundle, "--steps", 1, "-o", folder / "x.webp"]]
    if rng.random() < 0.1:
        folder = home.bundle.parent
        uses = [["export_coreml.py", f"--ckpt={folder / 'net'}", f"--ae={folder / 'ae'}",
                 f"--out={home.bundle}"]]
    words = rng.choice(uses)
    if words[0] in ("data.py", "sample.py"):
        n = rng.randrange(2, 500)
    return Case(words, "refuse", small_disk(n))

@kind
def requirements(rng, home, folder):
    """frozen text encoders without what they need"""
    text = rng.choice(("clip-l", "snapgen", "sd3"))
    stage = rng.choice(("train", "mmdit", "distill"))
    more = rng.choice(([], [f"text.folder={folder}"], [*home.own, f"data.cache={home.cache}"],
                       [f"text.folder={home.pictures}", *home.own], ["text.leave_out=['clip_l']"]))
    words = home.words(stage, out=folder / "run")
    if rng.random() < 0.5 and "data.shard=8" in more:
        words.insert(1, "--cache")
        more = [*more, f"data.cache={folder / 'cache'}", f"text.folder={folder}"]
    return Case([*words, f"text.kind={text}", *more])

@kind
def empties(rng, home, folder):
    """an empty name"""
    value = rng.choice(("", "  ", "\t"))
    keys = ("out", "data.cache", "ae", "arch", "device", "amp", "text.pattern", "data.layout")
    train, png = home.words("train", out=folder / "run"), folder / "x.png"
    return Case(rng.choice((
        *([*train, f"{key}={value}"] for key in keys),
        *([*home.words("gan", out=folder / "run"), f"{key}={value}"]
          for key in ("init", "out", "method", "sampler", "loss", "student_tap")),
        *([script, f"out={value}"] for script in ("checker.py", "train_text.py",
                                                  "train_decoder.py")),
        ["sample.py", value, "-o", png], ["sample.py", "dog", "-o", value],
        ["sample.py", "dog", "-o", png, "--ae", value], ["evaluate.py", "--ckpt", value],
        ["evaluate.py", "--ae", value, "--out", folder / "o"], ["export_coreml.py", "--out", value],
        ["evaluate.py", "--checker", value, "--out", folder / "o"],
        ["export_coreml.py", "--ckpt", value, "--out", folder / "b"],
        ["data.py", "--export", value, 20], ["data.py", "--show", value],
        ["train_text.py", "--probe", value], ["train_text.py", "--match", value],
        ["train_decoder.py", "--test", value], ["distill.py", "--plot", value],
        ["coreml.check", "run", value])))

@kind
def logs(rng, home, folder):
    """a ragged log.csv: rows are dropped; a run of another script: named"""
    stage = rng.choice(("train", "gan"))
    run = home.copy(home.pipeline(stage), folder)
    if rng.random() < 0.3:
        other = rng.choice([s for s in ("train", "distill", "gan") if s != stage])
        return Case([*home.words(other), f"out={run}", "steps=5"])
    file = run / "log.csv"
    badfiles.spoil_text(rng, file)
    return Case([*home.words(stage), f"out={run}", "steps=5"], "work")

@kind
def flags(rng, home, folder):
    """numbers and prompts on the command line"""
    n = rng.choice((0, -1, -5, "nan", "x", "", "1.5", "0x10", "1e9"))
    (folder / "p").mkdir()
    (folder / "p/a.txt").write_bytes(b"\xff\xfe" + rng.randbytes(30))
    (folder / "p/e.jsonl").write_bytes(rng.randbytes(60))
    return Case(rng.choice((
        *(["sample.py", "dog", "-o", folder / "x.png", flag, n] for flag in ("--steps", "-n")),
        *(["evaluate.py", "--out", folder / "o", flag, n]
          for flag in ("--steps", "--prompts", "--each", "--batch")),
        ["evaluate.py", "--out", folder / "o", "--fd", rng.choice((-1, 1, 3, "x"))],
        ["export_coreml.py", "--out", folder / "b", "--size", rng.choice((-32, 7, "x"))],
        ["export_coreml.py", "--out", folder / "b", "--bits", n],
        ["data.py", "--export", folder / "e", n], ["sample.py", "dog", "--seed", "x"],
        ["sample.py", "dog", "-o", folder / "x.txt"],
        ["sample.py", "--prompts", folder / "p/a.txt"],
        ["lab.benchmarks", "dpg", folder / "p", "--out", folder / "o"],
        ["lab.benchmarks", "geneval", folder / "p/e.jsonl", "--out", folder / "o"],
        ["sample.py", "\x00 \x1b" + "x" * 4000, "-o", folder / "x.png"],
        ["sample.py", "dog", "--info", folder / "p/a.txt"])))
