"""The specification of nanoSnapGen, runnable.

    pytest test_all.py                               what is quick
    pytest test_all.py -m "slow or not slow"         all; -m slow: what takes over four seconds
    pytest test_all.py -m gpu                        two steps of each stage on CUDA

Contents
    helpers, fixtures                                tiny networks; a tiny run of each stage
    model.py, mmdit.py, decoder.py, costs.py, compiling.py      sizes, forms, parity with diffusers
    scenes.py, wording.py, data.py, text.py, pictures.py, cache.py      what is drawn, said, kept
    train_decoder.py, checker.py, train_text.py      the autoencoder, the detector, the encoder
    evaluate.py, plots.py                            the score
    common.py, checkpoint.py, optim.py               configs, saving, the optimiser
    train.py, distill.py, adv_distill.py, sample.py  the stages: resuming, losses, samplers
    export_coreml.py, coreml/                        the bundle, its gates, its check
    web/                                             the site: its files, its page in a browser
    lab/                                             benchmarks, grids, plans, tables, the flagship
    commands                                         README's commands; bad input; who imports whom
    every platform                                   macOS, Windows: paths, locales, spawn, MPS
    gpu                                              the stages on CUDA
"""
import ast
import contextlib
import copy
import functools
import http.server
import io
import json
import multiprocessing
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import zlib
from collections import Counter
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch.utils._python_dispatch import TorchDispatchMode

import adv_distill
import adversaries
import cache
import checker
import checkpoint
import common
import compiling
import costs
import data
import decoder
import distill
import evaluate
import mmdit
import model
import optim
import pictures
import processes
import sample
import scenes
import text
import train
import train_decoder
import train_text
import wording
from common import ASSETS, ROOT, UserError

os.environ.setdefault("OMP_NUM_THREADS", "1")           # of processes that tests start
torch.set_num_threads(1)                                # tiny networks: threads would only wait

# ---------------------------------------------------------------------------- helpers
def run(*args):
    """(exit status, what it printed, what it said as errors) of `python ARGS`."""
    words = [sys.executable, *map(str, args)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr

def command(script, *args):
    """(exit status, all that it said) of train.py, lab.bench, .. run in this process."""
    said, status = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, args)])
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                module = script.removesuffix(".py")
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as e:
            status = int(bool(e.code))
            said.write(e.code if isinstance(e.code, str) else "")
    return status, said.getvalue()

def succeeds(script, *args):
    """command() that must end well; returns what it printed."""
    status, said = command(script, *args)
    assert status == 0, said
    return said

def fails_in_one_line(result, *words):
    """command()'s result ends in one line `error: ..` with `words`."""
    status, said = result
    assert status != 0 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(w in last for w in words), last

def same_tensors(a, b):
    """Two {name: tensor} that are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# ---------------------------------------------------------------------------- tiny networks
TINY = {  # a UNet of three stages
    "widths": [32, 64, 96], "context_dim": 48, "depth_down": [1, 1, 1], "depth_mid": 1,
    "depth_up": [1, 1, 0], "head_dim": 32, "time_dim": 64, "time_freqs": 32,
}
TINY_MMDIT = {"layers": 2, "heads": 2, "head_dim": 16, "context_dim": 32, "pooled_dim": 32,
              "base": 8, "position_max": 8}
TINY_AE = {"widths": [16, 16, 32, 32], "layers": 1, "groups": 8, "tiny_widths": [32, 32, 32, 32],
           "tiny_blocks": [1, 1, 1, 1]}

def shaken(net, by=0.05):
    """Off the zeros and ones that a network starts from, so that every path acts."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(by * torch.randn_like(p))
    return net.eval()

def tiny_unet(**changes):
    torch.manual_seed(0)
    return shaken(model.UNet(model.UNetConfig(**{**TINY, **changes})))

def tiny_model():
    """TextToLatents of a UNet and the small text encoder."""
    torch.manual_seed(0)
    unet = model.UNetConfig(**{**TINY, "context_dim": 32})
    return shaken(model.TextToLatents(unet, text.TextConfig(width=32, layers=1, heads=2)))

def tiny_autoencoder(**changes):
    torch.manual_seed(0)
    return decoder.Autoencoder(decoder.AutoencoderConfig(**{**TINY_AE, **changes}))

def save_model(path, net):
    """A checkpoint of a UNet as train.py leaves it, without training."""
    about = {"arch": "unet", "model": asdict(net.denoiser.cfg), "text": asdict(net.text_cfg),
             "flow": asdict(train.FlowConfig()), "data": {"size": 64, "nouns": 12}}
    checkpoint.save_checkpoint(path, {"model": net.state_dict()}, about, latest=False)

def tiny_sd3(folder, shard="10GB", **changes):
    """diffusers' SD3 transformer at random weights; saved in the hub's layout into `folder`."""
    from diffusers import SD3Transformer2DModel
    sizes = {
        "sample_size": 16, "patch_size": 2, "in_channels": 16, "out_channels": 16,
        "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4,
        "joint_attention_dim": 40, "caption_projection_dim": 64, "pooled_projection_dim": 24,
        "pos_embed_max_size": 12, "qk_norm": "rms_norm",
    }
    torch.manual_seed(0)
    net = shaken(SD3Transformer2DModel(**{**sizes, **changes}), 0.1)
    net.save_pretrained(folder / "transformer", max_shard_size=shard)
    return net

WORDS = "a red car three dogs left of the blue panda in snow".split()       # the tiny vocabularies

def tiny_encoders(folder, third="t5"):
    """CLIP-L, CLIP-G and T5 (or Gemma) at random weights in the hub's layout."""
    import tokenizers
    import transformers
    vocab = {w: i for i, w in enumerate(["!", "</s>", "<unk>", "<bos>", *WORDS])}
    size = {"vocab_size": len(vocab), "intermediate_size": 32, "bos_token_id": 3,
            "eos_token_id": 1, "pad_token_id": 0}

    def save(net, name, words, template, pad="!", side="right"):
        shaken(net).save_pretrained(folder / name)
        whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
        whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        whole.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("</s>", 1), ("<bos>", 3)])
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=whole, unk_token="<unk>", eos_token="</s>", pad_token=pad,
            padding_side=side, model_max_length=77).save_pretrained(folder / words)

    torch.manual_seed(3)
    for n, projection, pad in ("", 8, "</s>"), ("_2", 16, "!"):         # SD3's second pads by "!"
        clip = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
            **size, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            projection_dim=projection))
        save(clip, f"text_encoder{n}", f"tokenizer{n}", "<bos> $A </s>", pad)
    if third == "t5":
        t5 = transformers.T5EncoderModel(transformers.T5Config(
            vocab_size=len(vocab), d_model=40, d_ff=32, d_kv=8, num_heads=2, num_layers=2,
            feed_forward_proj="gated-gelu"))
        save(t5, "text_encoder_3", "tokenizer_3", "$A </s>")
    else:                                       # Gemma comes with its tokenizer in one folder
        gemma = transformers.Gemma2Model(transformers.Gemma2Config(
            **size, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=12))
        save(gemma, "text_encoder_3", "text_encoder_3", "<bos> $A", side="left")
    return folder

# ---------------------------------------------------------------------------- fixtures of a session
TINY_RUN = [  # a training of seconds: `python train.py ..` on a CPU
    "model.widths=[16,32]", "model.depth_down=[0,1]", "model.depth_up=[1,0]", "model.res_down=1",
    "model.self_attn=[false,true]", "model.head_dim=16", "model.groups=8", "model.context_dim=32",
    "model.time_dim=32", "model.time_freqs=32", "text.init=", "text.width=32", "text.layers=1",
    "text.heads=2",
    "data.pictures=32", "data.workers=0", "steps=4", "batch=4", "warmup=2", "log_every=1",
    "eval_every=2", "val_pictures=8", "samples=2", "sample_steps=1", "amp=float32", "device=cpu",
]

class Pipeline:
    """A tiny run of each stage: pipeline("distill") is the folder of a finished one.

    A stage is trained when it is first asked for: train, mmdit, distill, gan, dmd."""

    def __init__(self, folder):
        self.folder, self.ae = folder, folder / "ae"
        net = tiny_autoencoder()
        about = {"autoencoder": asdict(net.cfg)}
        checkpoint.save_checkpoint(self.ae, {"model": net.state_dict()}, about, latest=False)
        self.arguments = [*TINY_RUN, f"ae={self.ae}", f"data.cache={folder / 'cache'}"]

    def __call__(self, stage):
        out = self.folder / stage
        if not out.exists():
            succeeds(*self.command(stage), f"out={out}")
        return out

    def command(self, stage):
        """The words of a stage's command, without out=."""
        if stage == "train":
            return ["train.py", *self.arguments]
        if stage == "mmdit":
            sizes = [f"mmdit.{k}={v}" for k, v in TINY_MMDIT.items()]
            return ["train.py", *self.arguments, "arch=mmdit", *sizes]
        if stage == "distill":
            return ["distill.py", *self.arguments, f"teacher={self('mmdit')}", "muon_lr=0.02"]
        more = [f"init={self('distill')}", f"teacher={self('train')}", f"method={stage}"]
        more += ["K=2", "shift=1.0", "generator_every=1", "critic_width=16",
                 "critic_start=3"]
        return ["adv_distill.py", *self.arguments, *more]

@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    return Pipeline(tmp_path_factory.mktemp("pipeline"))

@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    folder = tiny_encoders(tmp_path_factory.mktemp("sd3"))
    tiny_sd3(folder)
    return folder

# ---------------------------------------------------------------------------- model.py
@pytest.mark.parametrize("row", ["t2i", "a", "b", "c1", "c2", "d", "e", "final", "sdxl"])
def test_the_ladder_has_the_published_sizes(row):
    cfg, (params, at_256, at_1024) = model.PRESETS[row], model.SHEET[row]
    with torch.device("meta"):
        counted = model.count_params(model.UNet(cfg)) / 1e6
    assert counted == pytest.approx(params, rel=1e-3)
    if at_1024:
        side, published = (32, at_256) if at_256 else (128, at_1024)
        assert model.count_macs(cfg, side) / 1e9 == pytest.approx(published, rel=0.02)

def test_the_same_flags_reach_sdxl():
    with torch.device("meta"):
        ours = model.count_params(model.UNet(model.PRESETS["sdxl"]))
    pooled_text = (2816 + 1) * 1280 + (1280 + 1) * 1280     # a branch that ours lacks
    assert ours + pooled_text == 2_567_463_684

@pytest.mark.parametrize("kv_heads", [1, 3, 0])
def test_attention_is_the_textbooks(kv_heads):
    torch.manual_seed(0)
    net = model.Attention(model.UNetConfig(head_dim=16, kv_heads=kv_heads), 96, 40)
    nn.init.normal_(net.out.weight)
    x, context = torch.randn(2, 9, 96), torch.randn(2, 5, 40)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    q = net.q_norm(net.q(x).view(2, 9, 6, 16))
    k, v = net.keys_values(context)
    heads = []
    for h in range(6):
        g = h * net.G // 6                              # six query heads share G others in order
        scores = q[:, :, h] @ k[:, :, g].transpose(1, 2) / 4
        heads.append(scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v[:, :, g])
    expected = net.out(torch.cat(heads, -1))
    assert torch.allclose(net(x, k, v, mask[:, None, None]), expected, atol=1e-5)

def tiny_network(arch):
    return tiny_unet() if arch == "unet" else shaken(mmdit.MMDiT(mmdit.MMDiTConfig(**TINY_MMDIT)))

@pytest.mark.parametrize("arch, shape, unit", [
    ("unet", (16, 12, 20), 4), ("mmdit", (16, 12, 14), 2), ("autoencoder", (3, 72, 104), 8)])
def test_only_multiples_are_taken(arch, shape, unit):
    def passed(x):
        if arch == "autoencoder":
            ae = tiny_autoencoder()
            return ae.decode(ae.encode(x))
        net = tiny_network(arch)
        return net(x, torch.rand(1), torch.randn(1, 5, net.cfg.context_dim))

    x = torch.randn(1, *shape)
    assert passed(x).shape == x.shape
    with pytest.raises(UserError, match=f"multiples of {unit}"):
        passed(x[:, :, 1:])

@pytest.mark.parametrize("arch", ["unet", "mmdit"])
def test_masked_tokens_have_no_influence(arch):
    net = tiny_network(arch)
    x, t, states = torch.randn(2, 16, 8, 8), torch.rand(2), torch.randn(2, 7, net.cfg.context_dim)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    changed = states.clone()
    changed[1, 4:] += 100
    assert torch.allclose(net(x, t, states, mask), net(x, t, changed, mask), atol=1e-5)
    assert not torch.allclose(net(x, t, states), net(x, t, changed), atol=1e-3)

def test_rotary_scores_depend_on_relative_places():
    torch.manual_seed(0)
    rope, q, k = model.rope_table(9, 9, 32, 100.0, "cpu"), torch.randn(32), torch.randn(32)

    def score(a, b):
        turned = [model.rotate(v.expand(1, 81, 1, 32), rope)[0, :, 0] for v in (q, k)]
        return float(turned[0][9 * a[0] + a[1]] @ turned[1][9 * b[0] + b[1]])

    assert score((1, 2), (3, 7)) == pytest.approx(score((4, 1), (6, 6)), abs=1e-4)
    for y, x in (3, 2), (1, 7), (7, 3):             # rows count, columns count, each its own way
        assert abs(score((1, 2), (3, 7)) - score((1, 2), (y, x))) > 1e-3

def test_checkpointing_recomputes_and_changes_nothing():
    found, calls = [], []
    for flag in (False, True):
        net = tiny_unet(checkpoint=flag)
        net.mid[0].res.register_forward_hook(lambda *_, flag=flag: calls.append(flag))
        torch.manual_seed(1)
        v = net(torch.randn(1, 16, 8, 8), torch.rand(1), torch.randn(1, 5, 48))
        v.square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.allclose(*found, atol=1e-7) and calls == [False, True, True]

@pytest.mark.parametrize("arch", ["unet", "mmdit"])
def test_a_network_starts_at_zero_and_learns_everywhere(arch):
    torch.manual_seed(0)
    cfg = mmdit.MMDiTConfig(**TINY_MMDIT, dual=[0]) if arch == "mmdit" else model.UNetConfig(**TINY)
    net = model.make_network(cfg)
    x, t, states = torch.randn(2, 16, 8, 8), torch.rand(2), torch.randn(2, 5, cfg.context_dim)
    assert net(x, t, states).abs().max() == 0
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(4):                                  # the zeros open up one after the other
        (net(x, t, states) - torch.randn(2, 16, 8, 8)).square().mean().backward()
        opt.step()
    still = [name for name, p in net.named_parameters() if torch.equal(p, before[name])]
    assert len(still) == (0 if arch == "unet" else 3)   # queries of the text in SD3's last block

@pytest.mark.parametrize("make, change, words", [
    (model.UNetConfig, {"depth_up": [1, 1]}, "one entry per stage"),
    (model.UNetConfig, {"widths": [256, 512, 800]}, "multiples of 64"),
    (model.UNetConfig, {"head_dim": 2}, "multiple of 4"),
    (mmdit.MMDiTConfig, {"dual": [38]}, "layers=38"),
    (decoder.AutoencoderConfig, {"tiny_widths": [32, 32, 32]}, "4 entries"),
    (decoder.AutoencoderConfig, {"groups": 24}, "multiples of 24 groups"),
])
def test_a_config_that_does_not_fit_is_refused(make, change, words):
    make().check()
    with pytest.raises(UserError, match=words):
        make(**change).check()

def test_a_checkpoint_reads_its_own_vocabulary(tmp_path):
    own = text.Vocabulary(text.train_bpe(["a red car"] * 9, 260))
    unet = model.UNetConfig(**{**TINY, "context_dim": 32})
    net = model.TextToLatents(unet, text.TextConfig(width=32, layers=1, heads=2), own)
    config = {"model": asdict(unet), "text": asdict(net.text_cfg)}
    weights = {"model": net.state_dict()}
    checkpoint.save_checkpoint(tmp_path / "a", weights, config, files=net.files())
    loaded, _ = model.load_model(tmp_path / "a")
    assert loaded.vocabulary.data == own.data
    assert same_tensors(loaded.state_dict(), net.state_dict())
    save_model(tmp_path / "b", net)                     # without a vocabulary: read by assets/'s
    with pytest.raises(UserError, match=f"reads {own.size} tokens, .* has 2002: copy the captions"):
        model.load_model(tmp_path / "b")
    (tmp_path / "b/captions.tiktoken").write_bytes(own.data)
    assert model.load_model(tmp_path / "b")[0].vocabulary.data == own.data

@pytest.mark.parametrize("name, total, std", [
    ("fast", 160.7063, 1.29425), ("scenes", -212.7420, 1.40534)])
def test_shipped_weights_draw_the_same_latents_as_ever(name, total, std):
    net, config = model.load_model(ASSETS / name)
    how = sample.sampling(config, 4)
    captions = ["a red car", "three snails left of a tree"]
    z = torch.stack(sample.generate(net, None, captions, [0, 1], 128, **how))
    assert z.sum().item() == pytest.approx(total, abs=0.01)
    assert z.std().item() == pytest.approx(std, abs=1e-4)

def test_loading_weights_draws_no_random_ones():
    before = torch.get_rng_state()
    model.load_model(ASSETS / "fast")
    decoder.load_autoencoder(ASSETS / "ae")
    assert torch.equal(torch.get_rng_state(), before)

def test_bfloat16_draws_the_same_picture():
    net, config = model.load_model(ASSETS / "fast")
    ae = decoder.load_autoencoder(ASSETS / "ae")
    pictures = []
    for on in (False, True):
        with common.autocast(net.device, on):
            pictures += sample.generate(net, ae, ["a red car"], [0], 64, **sample.sampling(config))
    error = np.square(pictures[0].astype(float) - pictures[1]).mean()
    assert 0 < error < 255**2 / 10**3.5                             # 35 dB

# ---------------------------------------------------------------------------- mmdit.py
@pytest.mark.parametrize("changes", [{}, {"dual_attention_layers": (0, 1)}, {"qk_norm": None}])
def test_mmdit_equals_diffusers(tmp_path, changes):
    theirs = tiny_sd3(tmp_path, "200KB", **changes)                 # in several files
    ours = mmdit.MMDiT.from_pretrained(tmp_path, torch.float32)
    x, t = torch.randn(2, 16, 12, 20), torch.tensor([0.1, 0.9])
    states, pooled = torch.randn(2, 7, 40), torch.randn(2, 24)
    expected = theirs(hidden_states=x, timestep=1000 * t, encoder_hidden_states=states,
                      pooled_projections=pooled).sample
    assert torch.allclose(ours(x, t, states, pooled=pooled), expected, atol=1e-5)
    fresh = mmdit.MMDiT(ours.cfg).pos_embed.pos_embed               # made, not loaded
    assert torch.allclose(fresh, theirs.pos_embed.pos_embed, atol=1e-6)
    sorted((tmp_path / "transformer").glob("*.safetensors"))[-1].unlink()
    with pytest.raises(UserError, match="does not fit its config"):
        mmdit.MMDiT.from_pretrained(tmp_path)

@pytest.mark.parametrize("size, params", [({}, 8_056_627_520), (mmdit.MEDIUM, 2_243_171_520)])
def test_mmdit_has_the_real_sizes(size, params):
    with torch.device("meta"):
        assert model.count_params(mmdit.MMDiT(mmdit.MMDiTConfig(**size))) == params

# ---------------------------------------------------------------------------- decoder.py
@pytest.mark.parametrize("attention", [True, False])
def test_sd3s_autoencoder_equals_diffusers(tmp_path, attention):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    theirs = shaken(AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 16, 32, 32], layers_per_block=2, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305,
        shift_factor=0.0609, norm_num_groups=8, mid_block_add_attention=attention), 0.02)
    theirs.save_pretrained(tmp_path / "vae")
    ours = decoder.load_autoencoder(tmp_path)
    x, z = torch.rand(2, 3, 48, 64), torch.randn(2, 16, 6, 8)
    latents = (theirs.encode(x).latent_dist.mode() - 0.0609) * 1.5305
    images = theirs.decode(z / 1.5305 + 0.0609).sample
    assert torch.allclose(ours.encode(x), latents, atol=1e-5) and latents.std() > 0.05
    assert torch.allclose(ours.decode(z), images, atol=1e-5) and images.std() > 0.05

def test_the_autoencoders_have_the_published_sizes():
    cfg = decoder.AutoencoderConfig()
    sizes = [model.count_params(net(cfg)) for net in (decoder.tiny_decoder, decoder.SD3Decoder)]
    assert sizes == [1_378_848, 49_545_475]

def test_shipped_autoencoder_is_safe_in_fp16():
    ae, largest = decoder.load_autoencoder(), []
    for m in ae.decoder.modules():
        m.register_forward_hook(lambda m, x, out: largest.append(out.abs().max().item()))
    drawn = [scenes.Scenes(64, "test")[i][0] for i in range(8)]
    ae.decode(ae.encode(decoder.to_tensor(np.stack(drawn))))
    assert max(largest) < 32768                         # where the Neural Engine's range ends

# ---------------------------------------------------------------------------- costs.py, lab/plan.py
@pytest.mark.parametrize("arch, amp", [("unet", "bfloat16"), ("mmdit", "float32")])
def test_activations_are_what_a_real_pass_keeps(arch, amp):
    from lab import plan
    cfg = mmdit.MMDiTConfig(**TINY_MMDIT) if arch == "mmdit" else model.UNetConfig(**TINY)
    torch.manual_seed(0)
    net, kept = model.make_network(cfg), {}
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x):
        with common.autocast(torch.device("cpu"), amp == "bfloat16"):
            net(**costs.dummy_inputs(cfg, 4, 128, 9))
    for p in net.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    asked = train.TrainConfig(batch=4, amp=amp, data=data.DataConfig(size=128))
    planner = plan.Planner(asked, plan.PlanConfig(tokens=9))
    total, greediest = planner.activations(cfg)
    real = sum(x.untyped_storage().nbytes() for x in kept.values())
    assert total == pytest.approx(real, rel=0.02)
    less, layer = planner.activations(replace(cfg, checkpoint=True))
    assert layer == greediest < less < 0.7 * total
def test_flops_are_those_by_hand():
    cfg = model.UNetConfig(**{**TINY, "kv_heads": 1})
    C, N, L, D = 64, 256, 20, cfg.head_dim

    def transformer():
        rope = model.rope_table(16, 16, D, cfg.rope, "meta")
        block = model.TransformerBlock(cfg, C, True)
        block(torch.empty(1, N, C), torch.empty(1, L, cfg.context_dim), None, rope)

    own = 2 * N * C * (2 * C + 2 * D) + 4 * N * N * C           # q, out; k, v; attention
    cross = 4 * N * C * C + 4 * L * cfg.context_dim * D + 4 * N * L * C
    assert costs.count_flops(transformer) == own + cross + 6 * N * C * cfg.ff_mult * C

    def residual():
        model.ResBlock(cfg, C, 96)(torch.empty(1, C, 16, 16), torch.empty(1, cfg.time_dim))

    maps = 9 * (C + 192) + C * 192 + 192 * 96 + C * 96          # depthwise; pointwise; shortcut
    assert costs.count_flops(residual) == 2 * N * maps + 2 * cfg.time_dim * 192
    training = train.TrainConfig(model=cfg, text=text.TextConfig(width=48))
    square, tall = (3 * costs.forward_flops(cfg, size, 9, training.text)
                    for size in (64, (96, 64)))
    assert costs.training_flops(training, 9) == square < 0.7 * tall
    mean = costs.training_flops(training, 9, {"64x64": 1, "96x64": 3})
    assert mean == pytest.approx((square + 3 * tall) / 4)

@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
    ("NVIDIA GH200 480GB", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4090 Laptop GPU", 0),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 0), ("NVIDIA H800", 0), ("NVIDIA A10G", 0)])
def test_a_cards_peak_is_its_data_sheets(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(costs, "matmul_speed", lambda *_: 5e12)
    peak, source = costs.device_peak(torch.device("cuda"), True)
    assert peak == (tflops * 1e12 or 5e12) and source.startswith(name)
    assert ("data sheet" in source) == (tflops > 0)
    assert not tflops or costs.device_peak(torch.device("cuda"), False)[0] == peak / 2

# ---------------------------------------------------------------------------- compiling.py
def test_a_damaged_or_foreign_compilation_is_told(tmp_path, monkeypatch, capsys):
    path, cpu, taken = tmp_path / "compiled.bin", torch.device("cpu"), []
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"a\nb", None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", taken.append)
    compiling.load_compiled(path, cpu)
    compiling.save_compiled(path, cpu)
    compiling.load_compiled(path, cpu)
    assert taken == [b"a\nb"] and not capsys.readouterr().out
    whole = path.read_bytes()
    for spoilt in (whole[:-1], whole.replace(b"torch", b"x"), b"2.0" + whole[3:], b""):
        path.write_bytes(spoilt)
        if spoilt != whole:
            compiling.load_compiled(path, cpu)
            assert "compiling anew" in capsys.readouterr().out
    assert len(taken) == 1

@pytest.mark.slow
def test_compiled_and_eager_give_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(optim, "muon_precision", lambda device: torch.float32)
    eager = shaken(model.Layer(model.UNetConfig(**TINY), 32, 32, 1, False))
    layers = [eager, copy.deepcopy(eager)]
    compiling.compile_blocks(layers[1], dynamic=False)
    x, temb, words = torch.randn(2, 32, 8, 8), torch.randn(2, 64), torch.randn(2, 5, 48)
    for layer in layers:
        opt = optim.Muon(layer, 1e-3, 0.01, compile=layer is layers[1])
        for _ in range(2):
            layer(x, temb, words, None, None).square().mean().backward()
            opt.step(torch.tensor(True))
            opt.zero_grad()
    for a, b in zip(*(layer.parameters() for layer in layers)):
        assert (a - b).abs().max() < 1e-5
    graphs = copy.deepcopy(torch._dynamo.utils.counters["stats"])
    assert graphs["unique_graphs"] >= 3                 # two blocks, and Muon's shapes
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        layers[1](x[:1], temb[:1], words[:1], None, None)
    assert graphs == torch._dynamo.utils.counters["stats"]

# ---------------------------------------------------------------------------- scenes.py, data.py
def test_scenes_and_captions_stay_what_they_were():
    """All weights are scored on these very scenes."""
    import zlib
    digest = 0
    for layout, category in (("slots", ""), ("free", ""), ("free", "attribution")):
        s = scenes.Scenes(64, "test", layout=layout)
        for i in range(200):
            scene = s.scene(i, category)
            digest = zlib.crc32(f"{scene} {s.caption(scene, random.Random(i))}".encode(), digest)
    assert digest == 3203371240
    picture, _ = scenes.Scenes(64)[0]           # three drums on a blue background
    assert picture.mean((0, 1)) == pytest.approx([97.3, 116.7, 205.2], abs=0.5)

def test_held_out_combinations_are_never_trained_on():
    train_set, test_set = scenes.Scenes(split="train"), scenes.Scenes(split="test")
    shown = 0
    for i in range(400):
        scene = train_set.scene(i)              # its captions say what is in it, and nothing else
        assert not scene.held_out() and not scene.shows_held_out()
        scene = test_set.scene(i)
        shown += scene.shows_held_out()
        assert scene.held_out() or scene.category == "single"
    a, b = scenes.Group("dog"), scenes.Group("car")
    inverse = scenes.Scene("position", [b, a], "right of")
    assert scenes.Scene("position", [a, b], "left of").facets() == inverse.facets()
    assert shown > 40                           # the test can fail

def test_objects_are_where_the_relation_says():
    s = scenes.Scenes(nouns=12)
    signs = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    for i in range(300):
        scene = s.scene(i, scenes.CATEGORIES[i % 6])
        centres = [(x + side / 2, y + side / 2) for _, x, y, side in scene.objects]
        assert len(centres) == sum(g.count for g in scene.groups)
        if scene.relation:
            axis, sign = signs[scene.relation]
            assert sign * (centres[0][axis] - centres[1][axis]) > 0.1

def test_captions_name_what_is_drawn_in_many_ways():
    groups = [scenes.Group("panda", "brown"), scenes.Group("eggplant", "pink", 2)]
    scene, s = scenes.Scene("attribution", groups, "left of"), scenes.Scenes()
    wordings = {s.caption(scene, random.Random(k)) for k in range(200)}
    assert all("brown panda" in w and "pink " in w for w in wordings)
    assert {"a brown panda left of two pink eggplants",
            "2 pink eggplants right of a brown panda"} <= wordings

def test_training_scenes_name_relations_and_have_three_things():
    s = scenes.Scenes(split="train", layout="free")
    found = [s.scene(i) for i in range(600)]
    two = [scene for scene in found if scene.category in ("two", "attribution")]
    assert 0.4 < np.mean([scene.relation != "" for scene in two]) < 0.6
    three = [scene for scene in found if scene.category == "three"]
    assert 60 < len(three) < 150
    for scene in three:
        assert len(scene.objects) == len({g.noun for g in scene.groups}) == 3
        assert all(g.noun in s.caption(scene, random.Random(0)) or g.noun in scenes.SYNONYMS
                   for g in scene.groups)
    held_out = scenes.Scenes(split="test")
    assert not any(held_out.scene(i).category == "three" for i in range(300))

# ---------------------------------------------------------------------------- wording.py
def test_free_english_says_what_is_in_the_scene():
    s = scenes.Scenes(split="train")
    for i in range(400):
        scene = s.scene(i)
        for k in range(3):
            rng = random.Random(f"{i}/{k}")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(wording, "misspell", lambda text, rng: text)
                said = wording.wide(scene, rng)
            for g in scene.groups:
                assert any(n in said for n in wording.names(g.noun, g.count > 1)), said
                shades = [g.colour, *wording.SHADES.get(g.colour, ())]
                assert any(shade in said for shade in shades), said
            if scene.relation in ("left of", "right of"):
                assert re.search("left|right", said), said

def test_the_side_that_free_english_says_is_the_scenes():
    dog, car = scenes.Group("dog"), scenes.Group("tractor")
    scene = scenes.Scene("position", [dog, car], "left of")
    said = {wording.wide(scene, random.Random(i)) for i in range(20000)}
    assert {"a dog left of a tractor", "a tractor to the right of a dog"} <= said
    assert not {"a dog right of a tractor", "a tractor left of a dog"} & said
    assert any(re.fullmatch("on the left a (dog|puppy), on the right a tractor", x) for x in said)

def test_plurals_and_other_names():
    assert wording.plural("school bus") == "school buses"
    assert wording.plural("slice of pizza") == "slices of pizza"
    assert wording.names("cat") == ["cat", "kitten", "kitty"]
    assert "kitties" in wording.names("cat", many=True)
    known = {word for noun in scenes.NOUNS for n in wording.names(noun) for word in n.split()}
    assert not known & set(wording.COMMON) and not set(scenes.COLOURS) & set(wording.COMMON)
    every = [n for noun in scenes.NOUNS for n in wording.names(noun)]
    assert len(every) == len(set(every))                # no name is two things

# ---------------------------------------------------------------------------- scenes.py, data.py
def lay_sprites(folder, *names):
    """Discs on nothing."""
    for k, name in enumerate(names):
        image = Image.new("RGBA", (40, 40))
        ImageDraw.Draw(image).ellipse((4, 4, 36, 36), fill=(200 - 90 * k, 90 * k, 40, 255))
        image.save(folder / f"{name}.png")
    return folder

def test_own_sprites_are_drawn_in_any_process(tmp_path):
    import pickle
    lay_sprites(tmp_path, "blob", "green_box")
    own = scenes.Scenes(atlas=str(tmp_path))
    picture, caption = own[0]
    assert picture.shape == (64, 64, 3) and ("blob" in caption or "green box" in caption)
    there = pickle.loads(pickle.dumps(own))     # in a worker that does not fork
    assert np.array_equal(there[0][0], picture)

def test_your_own_thing_is_added_to_the_shipped_ones(tmp_path):
    sprites = str(lay_sprites(tmp_path, "Blorp"))           # one file is enough
    both, test = (scenes.Scenes(64, split, 9, 0, "free", sprites, 0.5)
                  for split in ("train", "test"))
    assert both.nouns == [*scenes.NOUNS, "blorp"]
    new = [any(g.noun == "blorp" for g in both.scene(i).groups) for i in range(200)]
    assert 0.35 < np.mean(new) < 0.65
    for category in test.categories:                        # held-out scenes all show it
        scene = test.scene(0, category)
        assert scene.groups[0].noun == "blorp" and "blorp" in test.caption(scene, random.Random(0))
    alone = scenes.Scenes(64, "test", 9)                    # the prompts of all scores so far
    assert alone.caption(alone.scene(0), random.Random(0)) == "3 balloons"

@pytest.mark.parametrize("name, image, words", [
    ("dog", None, "'dog' is known already"), ("puppy", None, "'puppy' is known already"),
    ("photo", Image.new("RGB", (9, 9)), "is opaque"),
    ("nothing", Image.new("RGBA", (9, 9)), "is empty"),
])
def test_a_bad_sprite_is_named(tmp_path, name, image, words):
    lay_sprites(tmp_path, name)
    if image:
        image.save(tmp_path / f"{name}.png")
    with pytest.raises(common.UserError, match=words):
        scenes.Scenes(atlas=str(tmp_path), old=0.5)

def scenes_config(pipeline, folder, *changes):
    own = [f"ae={pipeline.ae}", f"data.cache={folder}", "batch=8", "data.pictures=64"]
    return common.read_config(train.TrainConfig(), [*TINY_RUN, *own, *changes])

def spelled(batch):
    return [text.load_vocabulary().spell(row) for row in batch.text.ids]

def test_init_brings_its_network_and_scenes(pipeline, tmp_path):
    first = pipeline("train")
    cfg = train.read_training(train.TrainConfig, [f"init={first}", "lr=0.5"], "configs/nano.toml")
    known = json.loads((checkpoint.resolve(first) / "config.json").read_text())
    assert asdict(cfg.model) == known["model"] and cfg.flow.shift == known["flow"]["shift"]
    assert (cfg.data.size, cfg.lr, cfg.text.init) == (known["data"]["size"], 0.5, "")
    words = ["--config", "configs/folder.toml", f"init={first}"]        # of every stage
    assert common.read_config(adv_distill.AdvConfig(), words).init == str(first)
    words = [f"init={first}", "model.depth_mid=2", "data.size=64"]
    cfg = train.read_training(train.TrainConfig, words, "configs/nano.toml")
    assert cfg.model.depth_mid == 2 and cfg.data.size == 64     # what is said is said
    assert cfg.model.widths == known["model"]["widths"]

def test_batches_word_their_scenes_and_drop_some(pipeline, tmp_path):
    cfg = scenes_config(pipeline, tmp_path, "drop_caption=0.25")
    ae = decoder.load_autoencoder(pipeline.ae)
    s, latents = data.scenes_of(cfg.data), data.latents_of(cfg.data, ae, "key").float()
    z = ae.encode(decoder.to_tensor(s[2][0][None]))[0]
    assert (latents[2] - z).abs().mean() < 0.02 * z.std()
    number = {x.numpy().tobytes(): i for i, x in enumerate(latents)}
    batches = data.Batches(cfg, latents, "cpu", text.load_vocabulary())
    seen = {i: [] for i in range(64)}                       # scene: its captions, one an epoch
    for k in range(64):
        batch = batches(k)
        for x, caption in zip(batch.x0, spelled(batch)):
            seen[number[x.numpy().tobytes()]].append(caption)
    assert 0.15 < sum(words.count("") for words in seen.values()) / 512 < 0.35
    for i, words in seen.items():
        rng, scene = random.Random(f"{cfg.seed}/{i}"), s.scene(i)
        own = {wording.training_caption(scene, rng).lower() for _ in range(data.WORDINGS)}
        assert len(words) == 8 and set(words) - {""} <= own

@pytest.mark.slow
def test_another_process_makes_the_same_scenes_meanwhile(pipeline, tmp_path):
    files = []
    for k in range(2):
        cfg = scenes_config(pipeline, tmp_path / f"{k}", "val_pictures=8", "device=cpu")
        with processes.meanwhile(train.make_scenes, cfg) if k else contextlib.nullcontext():
            pass
        before = len(list((tmp_path / f"{k}").glob("scenes*")))
        train.make_scenes(cfg)
        assert before == 2 * k
        files.append({p.name: p.read_bytes() for p in (tmp_path / f"{k}").iterdir()})
    assert files[0] == files[1] and len(files[0]) == 2

def test_other_scenes_are_kept_under_another_key(tmp_path, monkeypatch):
    cfg = data.DataConfig()
    (tmp_path / "scenes.py").write_text("a file in a folder of sprites")
    changes = ({}, {"nouns": 13}, {"seed": 1}, {"layout": "free"}, {"atlas": str(tmp_path)})
    keys = {data.content_key(replace(cfg, **change)) for change in changes}
    monkeypatch.setattr(data, "ROOT", tmp_path)             # other code
    assert len(keys | {data.content_key(cfg)}) == 6

@pytest.fixture(params=["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def start_method(request):
    was = multiprocessing.get_start_method()
    if request.param not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {request.param} here")
    multiprocessing.set_start_method(request.param, force=True)
    yield
    multiprocessing.set_start_method(was, force=True)

def test_processes_go_on_and_make_the_same_bytes(start_method, pipeline, tmp_path, monkeypatch):
    from unittest import mock
    def slow(*args):                            # the processes are ahead of it
        time.sleep(0.03)
        return decoder.encode_pictures(*args)

    ae, vocabulary, made = decoder.load_autoencoder(pipeline.ae), text.load_vocabulary(), []
    monkeypatch.setattr(data, "PART", 2 * data.BATCH)
    for workers in (0, 2):
        out = tmp_path / f"{workers}"
        sizes = ["data.size=16", "data.nouns=2", "data.pictures=1100"]
        cfg = scenes_config(pipeline, out, *sizes, f"data.workers={workers}")
        if workers:
            dies = mock.Mock(wraps=slow, side_effect=[mock.DEFAULT] * 5 + [KeyboardInterrupt])
            monkeypatch.setattr(data, "encode_pictures", dies)
            with pytest.raises(KeyboardInterrupt):
                data.latents_of(cfg.data, ae, "key")
            assert {p.name for p in out.glob("*/*")} == {"0.safetensors", "128.safetensors"}
        encode = mock.Mock(wraps=slow)
        monkeypatch.setattr(data, "encode_pictures", encode)
        data.latents_of(cfg.data, ae, "key")
        assert encode.call_count == (14 if workers else 18)
        data.wordings(cfg, 1100, vocabulary)
        made.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert made[0] == made[1] and len(made[0]) == 2

# ---------------------------------------------------------------------------- text.py
@pytest.mark.parametrize("caption", ["three red cars", "Ünïcode 🐍 zebras, 42!", ""])
def test_tokens_round_trip_even_for_words_never_seen(caption):
    vocabulary = text.load_vocabulary()
    ids, mask = vocabulary.tokenize([caption])
    assert vocabulary.spell(ids[0]) == caption.lower() and mask.all()
    assert ids[0, -1] == vocabulary.end and ids.max() < vocabulary.pad < vocabulary.size

def test_a_prompt_too_long_is_refused_or_cut():
    vocabulary = text.load_vocabulary()
    with pytest.raises(UserError, match="shorten"):
        vocabulary.tokenize(["dog " * 70])
    ids, mask = vocabulary.tokenize(["dog " * 70, "a cat"], 16, cut=True)
    assert ids.shape == (2, 16) and ids[0, -1] == vocabulary.end and mask[0].all()

def test_padding_does_not_change_a_caption():
    torch.manual_seed(0)
    encoder = text.TextEncoder(text.TextConfig(width=32, layers=2, heads=2))
    tokenize = text.load_vocabulary().tokenize
    alone, both = encoder(tokenize(["a dog"])), encoder(tokenize(["a dog", "three red cars"]))
    assert torch.allclose(alone.emb[0], both.emb[0][both.mask[0]], atol=1e-5)

# the last one is longer than what the CLIPs read
PROMPTS = ["a red car", "", "three dogs left of the blue panda", " ".join(WORDS * 12)]

def published(kind, width, folder, **changes):
    return text.load_encoders(text.TextConfig(kind, width, folder=str(folder), **changes), "cpu")

@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory):
    return tiny_encoders(tmp_path_factory.mktemp("gemma"), "gemma")

def test_sd3_prompts_are_encoded_as_by_diffusers(sd3_folder):
    import diffusers
    import transformers
    clip, t5 = transformers.CLIPTextModelWithProjection, transformers.T5EncoderModel
    parts = dict.fromkeys(("transformer", "scheduler", "vae"))
    for n, network in (("", clip), ("_2", clip), ("_3", t5)):
        for name, kind in (("text_encoder", network), ("tokenizer", transformers.AutoTokenizer)):
            parts[name + n] = kind.from_pretrained(sd3_folder, subfolder=name + n)
    pipe = diffusers.StableDiffusion3Pipeline(**parts)
    with torch.no_grad():
        emb, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, device="cpu",
                                               do_classifier_free_guidance=False)
    ours = published("sd3", 40, sd3_folder).encode(PROMPTS)
    assert torch.allclose(ours.emb, emb, atol=1e-5) and emb.std() > 0.1
    assert torch.allclose(ours.pooled, pooled, atol=1e-5) and pooled.shape == (4, 24)
    ours.emb[:, 77:] = 0
    without = published("sd3", 40, sd3_folder, leave_out=["t5"]).encode(PROMPTS)
    assert torch.equal(without.emb, ours.emb)

def test_snapgen_joins_three_encoders(gemma_folder):
    three = published("snapgen", 48, gemma_folder, tokens=20)
    joined, clip = three(PROMPTS[:3]), published("clip-l", 16, gemma_folder)(PROMPTS[:3])
    assert torch.allclose(joined.emb[:, :77, :16], clip.emb, atol=1e-6)
    assert joined.mask[:, 77:].sum(1).tolist() == [4, 1, 8]         # <bos>, words, from the left
    alone = published("snapgen", 48, gemma_folder, tokens=20, leave_out=["gemma"])(PROMPTS[:3])
    assert torch.equal(alone.emb[:, :77], joined.emb[:, :77])
    assert not alone.emb[:, 77:].any() and not alone.mask[:, 77:].any()

def test_encoders_are_dropped_independently(monkeypatch):
    parts = {"clip_l": (0, 7, 0, 16), "clip_g": (0, 7, 16, 32), "gemma": (7, 12, 0, 48)}
    monkeypatch.setattr(text, "parts_of", lambda cfg: parts)
    states = text.Text(torch.randn(1200, 12, 48), torch.ones(1200, 12, dtype=torch.bool))
    dropped = text.drop_encoders(states, None, torch.Generator().manual_seed(0))
    gone = torch.stack([~dropped.emb[:, a:b, c:d].any((1, 2)) for a, b, c, d in parts.values()])
    shares = [*gone.float().mean(1).tolist(), gone.all(0).float().mean().item()]
    assert shares == pytest.approx([0.464, 0.464, 0.464, 0.1], abs=0.05)
    assert not dropped.mask[gone[2], 7:].any() and dropped.mask.any(1).all()
    assert torch.equal(dropped.emb[~gone.any(0)], states.emb[~gone.any(0)])

def test_a_missing_encoder_says_what_to_download(sd3_folder, tmp_path):
    folder, without = tmp_path / "partly", shutil.ignore_patterns("text_encoder_3")
    shutil.copytree(sd3_folder, folder, ignore=without)
    with pytest.raises(UserError, match=r"t5 is not whole at .*partly/text_encoder_3: `hf download "
                       r"stabilityai/.*--local-dir .*partly` gets 9\.52 GB, licence gated"):
        published("sd3", 40, folder)
    with pytest.raises(UserError, match=r"gemma is not whole .*`hf download google/gemma-2-2b "
                       r"--local-dir .*partly/text_encoder_3` gets 5\.23 GB"):
        published("snapgen", 48, folder)

# ---------------------------------------------------------------------------- pictures.py, cache.py
PICTURES = data.DataConfig(size=64, bucket_step=16)

def encoded(image, kind="PNG", **kw):
    file = io.BytesIO()
    image.save(file, kind, **kw)
    return file.getvalue()

def two_halves():
    image = Image.new("RGB", (160, 96), (200, 30, 30))
    image.paste((30, 30, 200), (0, 0, 80, 96))
    return image

def test_every_odd_kind_of_picture_is_read_as_it_looks():
    image, turned, clear = two_halves(), Image.Exif(), two_halves().convert("RGBA")
    turned[0x0112] = 6
    clear.paste((0, 0, 0, 0), (80, 0, 160, 96))
    grey = Image.fromarray(np.full((96, 160), 257 * 100, np.uint16))
    blue, red, white = (30, 30, 200), (200, 30, 30), (255, 255, 255)
    for file, left, right in (
        (encoded(image.rotate(90, expand=True), "JPEG", exif=turned, quality=95), blue, red),
        (encoded(image.convert("CMYK"), "JPEG", quality=95), blue, red),
        (encoded(image.quantize(4)), blue, red),
        (encoded(image.resize((1600, 960), 0), "JPEG", quality=95), blue, red),
        (encoded(clear), blue, white),
        (encoded(image, transparency=red), blue, white),
        (encoded(grey), (100, 100, 100), (100, 100, 100)),
    ):
        picture = pictures.to_bucket(file, PICTURES).astype(int)
        assert picture.shape == (48, 80, 3)
        assert np.abs(picture[:, :36] - left).mean() < 4
        assert np.abs(picture[:, 44:] - right).mean() < 4

def read_folder(folder):
    """{name: caption, or why it is skipped}."""
    items = pictures.find_pictures(folder)
    prepared = pictures.Prepared(items, PICTURES)
    return {item.name: prepared[i][1].split(":")[0] for i, item in enumerate(items)}

def test_captions_are_found_in_every_layout_and_in_tars(tmp_path):
    folder, tar_path = tmp_path / "folder", tmp_path / "all.tar"
    for name in ("a.png", "b.PNG", "sub/c.png", "d.png", "f.png", "photo.v1.png", "photo.v2.png",
                 "g.tiff", "._a.png", ".git/x.png", "sub/.trash/y.png"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(encoded(two_halves()))
    lines = ['{"file": "b.PNG", "caption": "from captions"}', "",
             '{"file": "gone.png", "caption": "x"}', "not json", '{"file": "d.png"}',
             '{"file": "photo.v1.png", "caption": "from a\u2028line"}']
    for name, words in {
        "a.TXT": "\ufefffrom  a\ntxt\n", "captions.jsonl": "\n".join(lines),
        "sub/metadata.jsonl": '{"file_name": "c.png", "text": "from metadata"}\n',
        "photo.v2.Json": '{"caption": "from json", "url": "y"}',
    }.items():
        (folder / name).write_text(words, encoding="utf-8")
    found = read_folder(folder)
    assert found == {
        "a.png": "from a txt", "b.PNG": "from captions", "sub/c.png": "from metadata",
        "photo.v1.png": "from a line", "photo.v2.png": "from json", "gone.png": "no picture",
        "captions.jsonl:4": "no caption", "captions.jsonl:5": "no caption", "d.png": "no caption",
        "f.png": "no caption", "g.tiff": "another format", "._a.png": "hidden", ".git": "hidden",
        "sub/.trash": "hidden"}
    with tarfile.open(tar_path, "w") as tar:
        tar.add(folder, "./sub")
    assert read_folder(tar_path) == {f"all.tar/sub/{k}": v for k, v in found.items()}
    os.truncate(tar_path, tar_path.stat().st_size // 2)
    assert read_folder(tar_path)["all.tar"] == "broken"

def test_a_picture_goes_to_the_nearest_of_equal_buckets():
    for h, w in pictures.buckets(64, 16, 2.0):
        assert h % 16 == w % 16 == 0 and max(h, w) <= 2 * min(h, w)
        assert abs(h * w / 64**2 - 1) <= 1 / 8
        assert pictures.bucket_of(20 * h, 20 * w + 1, PICTURES) == (h, w)

def own_config(pipeline, folder, out, *changes):
    return scenes_config(pipeline, out, f"data.folder={folder}", "data.bucket_step=16",
                         "data.shard=8", "data.held_out=0.2", "batch=4", *changes)

@pytest.fixture(scope="session")
def own(pipeline, tmp_path_factory):
    """(folder of pictures that --export made, its cache)."""
    folder = tmp_path_factory.mktemp("own")
    data.export_pictures(folder / "pictures", 40)
    cache.make_cache(own_config(pipeline, folder / "pictures", folder / "cache"))
    return folder / "pictures", folder / "cache"

def opened(cfg, teacher_text=None):
    ae = decoder.load_autoencoder(cfg.ae)
    return cache.open_cache(cfg, ae, teacher_text, text.load_vocabulary())

def test_a_png_with_much_metadata_is_read(tmp_path):
    notes = PngInfo()
    notes.add_text("notes", "x" * 2**21, zip=True)              # Pillow stops at 1 MiB by itself
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=notes)
    (tmp_path / "a.txt").write_text("a dog")
    assert read_folder(tmp_path) == {"a.png": "a dog"}

def test_what_cannot_be_used_is_counted_and_named(pipeline, own, capsys):
    cfg = own_config(pipeline, *own)
    cache.make_cache(cfg)                       # again: nothing to do, the same summary
    assert "10 skipped (5 broken, 3 no caption, 2 too small)" in capsys.readouterr().out
    names = [line.split("\t")[0] for line in (own[1] / "skipped.txt").read_text().splitlines()]
    spoilt = random.Random(0).sample(range(40), 10)         # by the export
    assert names == [f"{i:05d}.jpg" for i in sorted(spoilt)]

def test_train_readies_a_folder_and_learns_its_words(pipeline, tmp_path):
    (tmp_path / "p").mkdir()
    for i in range(16):
        Image.new("RGB", (64, 64), (15 * i, 90, 200)).save(tmp_path / f"p/{i}.png")
        (tmp_path / f"p/{i}.txt").write_text(f"Zyzzyva {'on a' if i % 2 else 'under the'} quokka")
    words = [*pipeline.command("train"), f"data.folder={tmp_path / 'p'}", "data.bucket_step=16",
             f"data.cache={tmp_path / 'cache'}", "batch=4", f"out={tmp_path / 'run'}"]
    said = succeeds(*words, "steps=2")
    assert "of these pictures at" in said and "tokens a word" in said and "done:" in said
    net, _ = model.load_model(tmp_path / "run")
    assert len(net.vocabulary.ids_of("zyzzyva on a quokka")) == 5           # words and <end>
    assert len(text.load_vocabulary().ids_of("zyzzyva on a quokka")) > 8
    shutil.rmtree(tmp_path / "cache")                       # other captions, of the same length
    for file in (tmp_path / "p").glob("*.txt"):
        file.write_text(file.read_text().replace("quokka", "axolotl"))
    assert "done:" in succeeds(*words, "steps=4")           # a run keeps its first vocabulary
    assert model.load_model(tmp_path / "run")[0].vocabulary.data == net.vocabulary.data

def test_a_step_has_one_bucket_and_an_epoch_every_picture(pipeline, own):
    cfg = own_config(pipeline, *own, "batch=2", "accumulate=2", "drop_caption=0.3")
    (every, held), ae = opened(cfg), decoder.load_autoencoder(cfg.ae)
    assert len(every) + len(held) == 30 and not set(every.captions()) & set(held.captions())
    files = {p.read_text(errors="replace").strip().lower(): p for p in own[0].glob("*.txt")}
    seen, empty = Counter(), 0
    for k in range(2 * len(every)):             # 4 epochs; two batches are a step
        batch = every.batch(k)
        assert batch.x0.shape == every.batch(k - k % 2).x0.shape
        for x, said in zip(batch.x0, spelled(batch)):
            seen[x.numpy().tobytes()] += 1
            empty += not said
            if said:
                file = files[said].with_suffix(".jpg").read_bytes()
                z = ae.encode(decoder.to_tensor(pictures.to_bucket(file, cfg.data)[None]))[0]
                assert (x - z).abs().mean() < 0.02 * z.std()
    assert list(seen.values()) == [4] * len(every) and 0.2 < empty / seen.total() < 0.4

def test_batches_read_ahead_are_those_asked_for(pipeline, own):
    cfg = own_config(pipeline, *own)
    every = opened(cfg)[0]
    batches = data.Batches(cfg, every, "cpu", every.vocabulary)
    for k in (3, 4, 5, 0, 1, 7):
        a, b = batches(k), every.batch(k)
        assert torch.equal(a.x0, b.x0.float()) and torch.equal(a.text.ids, b.text.ids), k
        assert a.x0.dtype == torch.float32 and list(batches.ahead) == [k + 1]

def test_a_broken_off_cache_goes_on_byte_for_byte(pipeline, own, tmp_path, monkeypatch, capsys):
    from unittest import mock
    cfg = own_config(pipeline, own[0], tmp_path)
    two_shards = [mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt]
    dies = mock.Mock(wraps=cache.write_shard, side_effect=two_shards)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "write_shard", dies)
        cache.make_cache(cfg)
    with pytest.raises(UserError, match="not whole"):
        opened(cfg)
    os.truncate(tmp_path / "000001.safetensors", 300)
    cache.make_cache(cfg)
    assert "1 of 5 shards are there already" in capsys.readouterr().out
    there, whole = ({p.name: p.read_bytes() for p in root.iterdir()} for root in (tmp_path, own[1]))
    assert there == whole

@pytest.mark.parametrize("change, words", [
    ("data.size=128", "was made with size=64, the config says 128"),
    ("text.kind=clip-l", "made with text=own"), ("ae=assets/ae", "made with autoencoder="),
    ("data.folder={own}", "other pictures or captions"), ("data.bucket_step=8", "bucket_step=8"),
])
def test_a_stale_cache_is_refused(pipeline, own, tmp_path, change, words):
    shutil.copytree(own[0], tmp_path / "own")
    caption = tmp_path / "own" / "00000.txt"
    caption.write_text(caption.read_text()[::-1])           # an edit that keeps the size
    with pytest.raises(UserError, match=words):
        cache.make_cache(own_config(pipeline, *own, change.format(own=tmp_path / "own")))

def test_frozen_states_are_read_from_the_cache(pipeline, own, sd3_folder, tmp_path):
    cfg = own_config(pipeline, own[0], tmp_path, "arch=mmdit", "text.kind=sd3", "text.width=40",
                     f"text.folder={sd3_folder}", "mmdit.context_dim=40", "mmdit.pooled_dim=24")
    cache.make_cache(cfg)
    every = opened(cfg)[0]
    bucket, rows = next(iter(every.rows.items()))
    emb, mask, pooled = every.words(bucket, rows[:3], [False, True, False])
    fresh = published("sd3", 40, sd3_folder)([rows[0][2], "", rows[2][2]])
    L = emb.shape[1]
    assert 77 < L < 120 and not fresh.mask[:, L:].any()         # cut where no caption reaches
    assert torch.equal(mask, fresh.mask[:, :L]) and torch.allclose(pooled, fresh.pooled, atol=4e-3)
    assert torch.allclose(emb[mask], fresh.emb[:, :L][mask], atol=4e-3)

def test_a_teachers_states_are_added_to_a_cache(pipeline, own, sd3_folder, tmp_path, monkeypatch):
    shutil.copytree(own[1], tmp_path / "cache")
    cfg = own_config(pipeline, own[0], tmp_path / "cache", "drop_caption=0.5")
    wanted = text.TextConfig("sd3", 40, folder=str(sd3_folder))
    with pytest.raises(UserError, match="lacks the teacher's text states of 5 of 5 shards"):
        opened(cfg, wanted)
    monkeypatch.setattr(cache, "write_shard", lambda *a: pytest.fail("pictures encoded again"))
    cache.make_cache(cfg, wanted)
    with pytest.raises(UserError, match="or has those of other encoders"):
        opened(cfg, replace(wanted, leave_out=["t5"]))
    batch = opened(cfg, wanted)[0].batch(0)
    emb, mask, pooled = batch.teacher_text
    fresh = published("sd3", 40, sd3_folder)(spelled(batch))
    assert mask.all() and "" in spelled(batch)
    assert torch.allclose(emb.float(), fresh.emb, atol=4e-3)
    assert torch.allclose(pooled.float(), fresh.pooled, atol=4e-3)
# ---------------------------------------------------------------------------- train_decoder.py
def noise(i, size):
    return np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8)

@pytest.fixture
def on_noise(monkeypatch):
    """Trainings without scenes to draw and without evaluations: a second each."""
    monkeypatch.setattr(train_decoder, "pictures_of", lambda *a: noise)
    monkeypatch.setattr(train_decoder, "reconstruct", lambda *a: (0.0, [(noise(0, 8),) * 2]))
    monkeypatch.setattr(checker, "ceiling", lambda *a: ({"single": 1.0}, {}))

def train_tiny(module, out, *args):
    """The tensors that four steps leave: of train_decoder, with the GAN from 2 on, or checker."""
    words = [f"out={out}", "steps=4", "eval_every=2", "log_every=1", "warmup=2", "device=cpu",
             "amp=float32", *args]
    if module is train_decoder:
        words += [f"autoencoder.{k}={v}" for k, v in TINY_AE.items()]
        words += ["size=16", "pixels=1024", "gan_start=0.3"]
        train_decoder.train_decoder(common.read_config(train_decoder.DecoderConfig(), words))
    else:
        words += ["batch=2", "workers=0"]
        checker.train_checker(common.read_config(checker.CheckerConfig(), words))
    return checkpoint.load_checkpoint(out, "model ema optimizer disc disc_optimizer".split())[1]

@pytest.mark.parametrize("module", [train_decoder, checker], ids=["decoder", "checker"])
def test_decoder_and_checker_resume_bit_for_bit(module, on_noise, tmp_path, monkeypatch):
    whole = train_tiny(module, tmp_path / "a")
    log, steps = checkpoint.Run.log, []

    def interrupted(run, *args, **values):
        steps.append(run.step)
        if len(steps) == 3:                                     # between two checkpoints
            raise KeyboardInterrupt
        log(run, *args, **values)
    monkeypatch.setattr(checkpoint.Run, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(module, tmp_path / "b")
    resumed = train_tiny(module, tmp_path / "b")
    assert steps == [1, 2, 3, 3, 4] and whole.keys() == resumed.keys()
    assert all(same_tensors(whole[k], resumed[k]) for k in whole)

def test_a_nan_batch_spoils_neither_player(on_noise, tmp_path, monkeypatch, capsys):
    batch_of = train_decoder.batch_of
    monkeypatch.setattr(train_decoder, "batch_of", lambda cfg, step, picture:
                        batch_of(cfg, step, picture) * (float("nan") if step == 2 else 1))
    saved = train_tiny(train_decoder, tmp_path)
    assert all(torch.isfinite(x).all() for part in saved.values() for x in part.values())
    assert saved["disc_optimizer"]["count"] == 1                # of its two steps
    assert capsys.readouterr().out.count("step 3: 1 steps skipped") == 2

def test_a_trained_autoencoders_latents_have_unit_variance(on_noise, tmp_path):
    train_tiny(train_decoder, tmp_path)
    ae = decoder.load_autoencoder(tmp_path / "final")
    z = ae.encode(decoder.to_tensor(np.stack([noise(i, 16) for i in range(64)])))
    assert z.std().item() == pytest.approx(1, abs=0.1) and abs(z.mean().item()) < 0.1

def vgg_file(path):
    """VGG-16 at random weights, under the names of the lpips package."""
    torch.manual_seed(0)
    state, C = {}, 3
    for k, layers in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]):
        width = min(512, 64 * 2**k)
        for layer in layers:
            key = f"net.slice{k + 1}.{layer}."
            state[key + "weight"] = torch.randn(width, C, 3, 3) * (2 / (9 * C)) ** 0.5
            state[key + "bias"] = 0.1 * torch.randn(width)
            C = width
        state[f"lin{k}.model.1.weight"] = torch.rand(1, width, 1, 1)
    safetensors.torch.save_file(state, path)
    return state

def test_lpips_is_the_papers(tmp_path):
    state = vgg_file(tmp_path / "vgg")
    net = train_decoder.load_lpips(str(tmp_path / "vgg"))
    mean, std = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
    images = torch.rand(4, 3, 32, 48) * 2 - 1
    wanted = 0
    for k, end in enumerate((4, 9, 16, 23, 30)):                # relu1_2, 2_2, 3_3, 4_3, 5_3
        x = net.features[:end]((images - mean) / std)
        x = x / (x.norm(dim=1, keepdim=True) + 1e-10)
        wanted += (state[f"lin{k}.model.1.weight"] * (x[:2] - x[2:]) ** 2).sum(1).mean((1, 2))
    assert torch.allclose(net(images[:2], images[2:]), wanted, rtol=1e-4)

def test_our_decoder_learns_against_sd3s_frozen_encoder(on_noise, tmp_path):
    theirs = tiny_autoencoder(decoder="sd3", scale=1.25, shift=0.0625)
    about = {"autoencoder": asdict(theirs.cfg)}
    checkpoint.save_checkpoint(tmp_path / "ae", {"model": theirs.state_dict()}, about, latest=False)
    vgg_file(tmp_path / "vgg")
    args = [f"encoder={tmp_path / 'ae'}", f"lpips={tmp_path / 'vgg'}", "lpips_weight=0.5"]
    saved = train_tiny(train_decoder, tmp_path / "run", *args)
    ours = decoder.load_autoencoder(tmp_path / "run/final")
    assert (ours.cfg.scale, ours.cfg.shift, ours.cfg.decoder) == (1.25, 0.0625, "tiny")
    half = {k: v.half().float() for k, v in theirs.encoder.state_dict().items()}
    assert same_tensors(half, ours.encoder.state_dict())
    assert saved["model"].keys() == ours.decoder.state_dict().keys()        # what is resumed
    assert not any(torch.allclose(v, saved["ema"][k]) for k, v in saved["model"].items())

@pytest.mark.slow
def test_shipped_autoencoder_reaches_its_psnr():
    ae = decoder.load_autoencoder()
    assert train_decoder.reconstruct(ae, 256, 2)[0] >= 34
    assert train_decoder.reconstruct(ae, 64, 12)[0] >= 28.5

@pytest.mark.parametrize("kind", ["emoji", "photos"])
def test_a_set_that_nobody_here_made_becomes_a_folder(kind, tmp_path):
    if kind == "emoji":
        images = tmp_path / "package/img/google/64"
        images.mkdir(parents=True)
        rows = [dict(name=name, short_name="x", subcategory="sky-&-weather", unified=code,
                     image=f"{code.lower()}.png")
                for name, code in (("RINGED PLANET", "1FA90"), ("", "1F44B-1F3FB"))]
        (tmp_path / "package/emoji.json").write_text(json.dumps(rows))
        for row in rows:
            Image.new("RGBA", (64, 64)).save(images / row["image"])
        succeeds("lab.sets", kind, tmp_path / "package", tmp_path / "set")
        assert (tmp_path / "set/1fa90.txt").read_text() == "ringed planet, sky & weather\n"
        fails_in_one_line(command("lab.sets", kind, tmp_path, tmp_path / "set"), "emoji.json")
    else:
        pytest.importorskip("skimage")
        pytest.importorskip("sklearn")
        succeeds("lab.sets", kind, tmp_path / "set")
    found = len(list((tmp_path / "set").glob("*.png")))
    assert found == {"emoji": 1, "photos": 6 * 49}[kind]    # skin tones are left out

# ---------------------------------------------------------------------------- checker.py
def test_your_own_thing_goes_through_all_stages(pipeline, tmp_path):
    atlas, add, eye = lay_sprites(tmp_path, "blorp"), tmp_path / "add", tmp_path / "checker"
    few = ["steps=2", "batch=4", "eval_every=2", "log_every=1", f"ae={pipeline.ae}"]
    few += ["val_pictures=8", "samples=6", "data.pictures=8", f"data.cache={tmp_path / 'cache'}"]
    succeeds("train.py", "--config", "configs/add.toml", f"init={pipeline('train')}", *few,
             f"data.atlas={atlas}", f"out={add}")
    about = json.loads((add / "final/config.json").read_text(encoding="utf-8"))
    assert about["things"][-1] == "blorp" and "dog" in about["things"]
    asked = ["evaluate.py", "--ckpt", add, "--prompts", 1, "--each", 1, "--steps", 1]
    fails_in_one_line(command(*asked), "does not know blorp", "init=assets/checker")
    succeeds("checker.py", "init=assets/checker", f"atlas={atlas}", "steps=2", "eval_every=9",
             f"out={eye}")
    old, new = checker.load_checker(), checker.load_checker(eye)
    assert new.nouns == [*old.nouns, "blorp"]
    moved = new.head.weight[:, :, 0, 0] - torch.cat(
        [old.head.weight[:84], new.head.weight[84:85], old.head.weight[84:]])[:, :, 0, 0]
    assert moved.abs().max() < 0.05                         # each noun's logit is where it was
    said = succeeds(*asked, "--checker", eye, "--out", tmp_path / "new")
    assert "single" in said and "three" in said
    succeeds(*asked, "--old", "--out", tmp_path / "old")
    student = ["adv_distill.py", "--config", "configs/adv_add.toml", f"init={add}", *few]
    student.append(f"faster={pipeline('gan')}")
    succeeds(*student, f"out={tmp_path / 'trained'}")
    succeeds(*student, "steps=0", f"out={tmp_path / 'fast'}")
    fails_in_one_line(command(*student, "faster=assets/fast", f"out={tmp_path / 'none'}"),
                      "student's network", 'faster=""')
    fails_in_one_line(command(*student, "faster=", "steps=0"), "steps=0", "faster=")
    asked = ["sample.py", "a blorp", "a zebra", "--ckpt", tmp_path / "fast", "--out"]
    said = succeeds(*asked, tmp_path / "a.png")
    assert "zebra: not among" in said and "blorp: not" not in said
    succeeds(*asked, tmp_path / "b.png", "--ae", pipeline.ae)       # is its own
    a, b = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert np.array_equal(a, b)

def oracle(asked):
    """A perfect checker of these scenes: it answers any pictures with their targets as logits."""
    net = checker.Checker()
    table, heat = checker.targets(asked, net.nouns)
    b, row, column, noun, colour = table[:, [0, 1, 2, 6, 7]].long().T
    out = torch.zeros(len(asked), net.head.out_channels, 16, 16)
    out[:, 0] = torch.logit(heat.clamp(1e-4, 1 - 1e-4))
    out[b, 1:4, row, column] = table[:, 3:6]
    out[b, checker.NOUN_LOGITS.start + noun, row, column] = 9
    out[b, checker.COLOUR_LOGITS.start + colour.clamp(min=0), row, column] = 9
    net.forward = lambda x: (out, torch.zeros(len(x), 4))
    return net

@pytest.mark.parametrize("nouns, layout", [(12, "slots"), (0, "free")])
def test_a_perfect_checker_knows_right_from_wrong(nouns, layout):
    source = scenes.Scenes(64, "test", nouns=nouns, layout=layout)
    asked = [source.scene(i, category) for category in scenes.CATEGORIES for i in range(20)]
    rows, _, verdicts, confusions = evaluate.score([noise(0, 64)] * 120, asked, oracle(asked), 1)
    assert rows["mean"]["score"] == rows["mean"]["low"] == 1 and not any(verdicts)
    assert rows["mean"]["shuffled"] < 0.15 and not any(confusions.values())

def test_rights_of_prompts_make_up_the_score():
    source = scenes.Scenes(64, "test")
    asked = [source.scene(i, category) for category in source.categories for i in range(4)]
    shown = [scene for scene in asked for _ in range(3)]
    shown[:72:4] = asked[:1] * 18           # right for the first prompt alone; none of "three"
    asked[7], shown[21:24] = replace(asked[-1], category="two"), asked[-1:] * 3
    asked[7].groups = asked[-1].groups[:2]  # a third thing may be there: only `exact` minds
    rows, rights, *_ = evaluate.score([noise(0, 64)] * 84, asked, oracle(shown), 3)
    assert rights["single"] == [1, 0.6667, 0.6667, 1] and rights["three"] == [1] * 4
    assert rights["two"][3] == 1 and rows["two"]["exact"] < rows["two"]["score"]
    for category, row in rows.items():
        parts = scenes.CATEGORIES if category == "mean" else [category]
        assert row["score"] == pytest.approx(np.mean([rights[c] for c in parts]), abs=1e-4)

def test_the_shipped_checker_reads_held_out_renders():
    for top in checker.ceiling(checker.load_checker(), scenes.Scenes(64, "test", seed=5), 20):
        assert min(top.values()) >= 0.93 and np.mean(list(top.values())) >= 0.98, top

@pytest.mark.parametrize("category, wrong, words", [
    ("single", lambda o: o[:0], "no "),
    ("single", lambda o: [replace(x, noun="ghost") for x in o], "became ghost"),
    ("counting", lambda o: o[1:], "became"),
    ("colors", lambda o: [replace(x, colour="no") for x in o], "became no"),
    ("position", lambda o: [replace(x, x=1 - x.x, y=1 - x.y) for x in o], "not "),
    ("attribution", lambda o: [replace(o[0], colour=o[1].colour), o[1]], "became"),
])
def test_each_kind_of_mistake_is_called_one(category, wrong, words):
    source = scenes.Scenes(64, "test")
    asked = [source.scene(i, category) for i in range(20)]
    seen, _ = checker.look(oracle(asked), [noise(0, 64)] * 20)
    for scene, objects in zip(asked, seen):
        assert checker.judge(scene, objects) == "" and words in checker.judge(scene, wrong(objects))

def test_exact_wants_nothing_else():
    dog, cat = (checker.Seen(noun, "red", 0.3, 0.5) for noun in ("dog", "cat"))
    for scene, seen, wrong in (
            (scenes.Scene("single", [scenes.Group("dog")]), [dog, cat], "cat was not asked for"),
            (scenes.Scene("single", [scenes.Group("dog")]), [dog, dog], "1 became 2"),
            (scenes.Scene("counting", [scenes.Group("dog", count=2)]), [dog, dog, cat], "cat was"),
            (scenes.Scene("colors", [scenes.Group("dog", "red")]),
             [dog, replace(dog, colour="blue")], "1 became 2")):
        assert checker.judge(scene, seen) == ""
        assert wrong in checker.judge(scene, seen, exact=True)
        kept = seen[:scene.groups[0].count]
        assert checker.judge(scene, kept, exact=True) == ""

# ---------------------------------------------------------------------------- train_text.py
def test_labels_are_where_each_noun_ends():
    vocabulary, spell = text.load_vocabulary(), text.load_vocabulary().spell
    groups = [scenes.Group("koala"), scenes.Group("bear"), scenes.Group("ice cream", "red", 2)]
    three = scenes.Scene("mixed", groups)
    ids = vocabulary.ids_of("a koala bear, a bear in a bearskin, 2 red Ice Cream cones.")[:-1]
    ends = train_text.noun_ends(three, ids, vocabulary)
    wanted = ["a koala bear", "a koala bear, a bear",
              "a koala bear, a bear in a bearskin, 2 red ice cream cones"]
    assert [spell(ids[:at + 1]) for _, at in ends] == wanted and [k for k, _ in ends] == [0, 1, 2]
    source, found, lost = scenes.Scenes(split="test"), 0, 0
    for i in range(300):
        scene = source.scene(i)
        ids = vocabulary.ids_of(wording.wide(scene, random.Random(i)))[:-1]
        ends = train_text.noun_ends(scene, ids, vocabulary)
        for k, at in ends:
            group = scene.groups[k]
            assert spell(ids[:at + 1]).endswith(tuple(wording.names(group.noun, group.count > 1)))
            assert not re.match(r"\w", vocabulary.encoding.decode(ids[at + 1:]))
        found, lost = found + len(ends), lost + len(scene.groups) - len(ends)
    assert lost / (found + lost) < 0.06

def test_what_is_true_of_a_scene_is_told_from_each_side():
    scene = scenes.Scene("mixed", [scenes.Group("dog", "red"), scenes.Group("cat", "", 3)], "above")
    known = train_text.FACETS
    told = [[known[name][i] for name, i in zip(known, train_text.facts_of(scene, k))]
            for k in (0, 1)]
    assert told == [["above", "red", 1, "dog"], ["below", "", 3, "cat"]]

@pytest.fixture
def plain_words(monkeypatch):
    """Only the plain grammar, which is learned sooner."""
    monkeypatch.setattr(train_text, "training_caption", scenes.Scenes.caption)
    monkeypatch.setattr(train_text, "wide", scenes.Scenes.caption)

def test_a_taught_encoder_binds_words_and_is_probed(plain_words, tmp_path):
    train_text.main([f"out={tmp_path}", "nouns=12", "batch=32", "text.width=64", "text.layers=2",
                     "text.heads=4", "lr=0.02", "muon_lr=0.02", "warmup=10", "steps=80",
                     "eval_every=40", "held_out=192", "device=cpu"])
    known = checkpoint.load_checkpoint(tmp_path / "final")[0]["accuracies"]
    least = {"side": 0.82, "colour": 0.75, "count": 0.88, "noun": 0.97, "background": 0.8}
    assert all(known[k] > least[k] for k in least), known       # blindly .74 .57 .78 .08 .57
    unet = model.UNetConfig(**{**TINY, "context_dim": 64})
    cfg = text.TextConfig(width=64, layers=2, heads=4, init=str(tmp_path / "final"))
    probing = train_text.TeachConfig(steps=25, batch=64, lr=0.05, warmup=5, held_out=192)
    for start, least in (cfg, 0.8), (replace(cfg, init=""), 0):
        net = train.first_network(train.TrainConfig(model=unet, text=start))
        save_model(tmp_path / "net", net)
        found = train_text.probe(tmp_path / "net", replace(probing))
        assert least < found["background"] < least + 0.7, found

@pytest.mark.parametrize("kind", ["own", "snapgen"])
def test_a_matched_encoder_is_read_as_the_old_one(kind, pipeline, gemma_folder, plain_words,
                                                  tmp_path, capsys):
    torch.manual_seed(0)
    old = text.TextConfig(width=32, layers=1, heads=2)
    if kind == "snapgen":
        old = text.TextConfig("snapgen", 48, folder=str(gemma_folder), tokens=12)
    unet = model.UNetConfig(**{**TINY, "context_dim": old.width})
    save_model(tmp_path / "old", shaken(model.TextToLatents(unet, old)))
    train_text.main(["--match", str(tmp_path / "old"), f"out={tmp_path / 'run'}", "batch=16",
                     "bank=4", "held_out=32", "text.width=32", "text.layers=1", "text.heads=2",
                     "lr=0.05", "muon_lr=0.05", "warmup=3", "steps=24", "eval_every=8",
                     f"ae={pipeline.ae}", "device=cpu"])
    shares = re.findall(r"unexplained_wide ([\d.]+)", capsys.readouterr().out)
    first, _, last = map(float, shares)
    assert last < 0.9 * first
    net, config = model.load_model(tmp_path / "run/final")
    assert config["text"]["kind"] == "own" and config["model"]["context_dim"] == 32
    assert config["data"]["nouns"] == 12 and config["unexplained_wide"] == pytest.approx(last, 1e-2)
    assert sample.generate(net, None, ["a red car"], [0], 64, **sample.sampling(config, 2))
    theirs = model.load_model(tmp_path / "old")[0]
    said = ["a car", "a red car", "three blue cars", "a panda", "the panda in snow", "three pandas"]
    x, t = torch.randn(1, 16, 8, 8).expand(6, -1, -1, -1), torch.full((6,), 0.7)
    ours, wanted = (m(x, t, m.encode(said)).flatten(1) for m in (net, theirs))
    ours, wanted = ours - ours.mean(0), wanted - wanted.mean(0)         # what the words change
    assert F.cosine_similarity(ours, wanted).mean() > 0.2
    old_weights = theirs.denoiser.state_dict()
    changed = [k for k, w in net.denoiser.state_dict().items() if w.shape != old_weights[k].shape
               or not torch.allclose(w, old_weights[k], atol=1e-3)]
    assert bool(changed) == (kind == "snapgen")         # by the projection, where widths differ
    assert all("cross_attn.kv" in k for k in changed)

@pytest.mark.parametrize("words, said", [
    ("text.kind=sd3", "pre-trained"), ("text.init=assets/text", "leave it out"),
    ("--probe assets/ae", "no text-to-picture model"),
])
def test_a_bad_request_for_a_text_encoder_is_named(words, said):
    fails_in_one_line(command("train_text.py", *words.split()), said)

# ---------------------------------------------------------------------------- evaluate.py
def test_distances_have_their_closed_forms():
    a, b = torch.randn(2, 4000, 6, generator=torch.Generator().manual_seed(0))
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-6) and evaluate.frechet(a, b) < 0.05
    wanted = float((a.mean(0) + 3).square().sum() + a.T.cov().trace())      # |m - m'|^2 + tr(C)
    assert evaluate.frechet(a, 2 * a + 3) == pytest.approx(wanted, rel=1e-4)
    assert min(evaluate.precision_recall(a[:1000], b[:1000])) > 0.7
    assert evaluate.precision_recall(a[:500], b[:500] + 50) == (0, 0)

def test_the_interval_is_of_prompts():
    row = evaluate.summary([np.repeat([[1.0, 1], [0, 0]], 50, 0)], [0])     # 100 prompts
    assert row["score"] == 0.5 and 0.38 < row["low"] < 0.43 and 0.57 < row["high"] < 0.62

def test_a_checkpoint_is_scored_and_its_json_is_whole(tmp_path, monkeypatch):
    top = dict.fromkeys((*scenes.CATEGORIES, "three"), 1.0)
    monkeypatch.setattr(evaluate, "ceiling", lambda *a: (dict(top), dict(top)))
    words = "--ckpt assets/fast --prompts 1 --each 1 --steps 1 --fd 4 --wording wide --out"
    evaluate.evaluate(evaluate.parse_evaluation([*words.split(), str(tmp_path / "a/b")]))
    result = json.loads((tmp_path / "a/b/score.json").read_text())
    keys = "ckpt step steps cfg sampler wording nouns layout prompts each seconds scores ceiling " \
           "exact_ceiling confusions rights commit machine torch date seed fd fd_floor " \
           "fd_pictures precision recall fid"
    assert list(result) == keys.split()
    assert [result[key] for key in ("ckpt", "nouns", "layout")] == ["assets/fast", 80, "free"]
    rows = [*scenes.CATEGORIES, "three", "mean"]
    assert list(result["scores"]) == list(result["ceiling"]) == rows
    assert set(result["scores"]["mean"]) == {
        "score", "low", "high", "shuffled", "exact", "exact_low", "exact_high"}
    assert all(result["rights"][c] == [result["scores"][c]["score"]] for c in rows[:-1])

@pytest.mark.parametrize("words, said", [
    ("evaluate.py --fd 3", "--fd"), ("evaluate.py --checker assets/ae", "checker"),
    ("train_decoder.py size=20", "multiple of 8"), ("train_decoder.py lpips_weight=1", "no file"),
])
def test_a_bad_score_or_decoder_is_named_in_one_line(words, said):
    fails_in_one_line(command(*words.split()), said)

# ---------------------------------------------------------------------------- plots.py
def test_charts_are_drawn_from_a_log_without_pyplot(tmp_path):
    import plots
    rows = [{"step": s, "loss": 1 / s, "real_std": 2} for s in range(1, 9)]
    rows[3]["loss"] = float("nan")
    sizes = []
    for more in {}, {"d_loss": 1.0, "accuracy_up0": 0.7, "bin_d0": 0.5}:    # 1 chart; 5 in 2 rows
        common.write_log(tmp_path / "log.csv", [row | more for row in rows])
        plots.losses(tmp_path / "log.csv", tmp_path / "loss.png")
        plots.health(tmp_path / "log.csv", tmp_path / "health.png")
        sizes.append(Image.open(tmp_path / "health.png").size)
    assert np.divide(sizes, Image.open(tmp_path / "loss.png").size).tolist() == [[1, 1], [3, 2]]
    assert "matplotlib.pyplot" not in sys.modules

def test_scaling_shows_the_losses_that_a_run_has(tmp_path, capsys):
    import plots
    names = ("task", "feat", "task_scaled", "feat_scaled")
    row = {f"bin_{name}{b}": b / 8 for name in names for b in range(8)}
    common.write_log(tmp_path / "log.csv", [{"step": 1, **row}, {"step": 2}])
    plots.scaling(tmp_path)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert shown == [[name, *(f"{b / 8:.4f}" for b in range(8))] for name in names]

# ---------------------------------------------------------------------------- common.py
def test_overrides_reach_nested_tables(tmp_path):
    (tmp_path / "c.toml").write_text("steps = 7\n[data]\nsize = 128\n")
    args = ["--config", str(tmp_path / "c.toml"), "data.nouns=5", "lr=1"]
    cfg = common.read_config(train.TrainConfig(), args)
    assert (cfg.steps, cfg.data.size, cfg.data.nouns, cfg.lr) == (7, 128, 5, 1.0)

def test_every_config_of_the_repository_is_valid():
    kinds = {"kd": distill.DistillConfig, "adv": adv_distill.AdvConfig}
    kinds |= {"ae": train_decoder.DecoderConfig, "decoder": train_decoder.DecoderConfig}
    for file in ROOT.glob("configs/*.toml"):
        kind = kinds.get(file.stem.split("_")[0], train.TrainConfig)
        common.read_config(kind(), ["--config", str(file)])

# ---------------------------------------------------------------------------- checkpoint.py
def save_number(path, number):
    """A checkpoint of 100,000 equal numbers at step `number`."""
    weights = {"model": {"w": torch.full((100000,), float(number))}}
    checkpoint.save_checkpoint(path, weights, {"step": number})

def saved_number(path):
    config, state = checkpoint.load_checkpoint(path)
    assert (state["model"]["w"] == config["step"]).all()
    return config["step"]

@pytest.mark.parametrize("file, spoil", [
    ("model.safetensors", lambda whole: whole[:500]),
    ("model.safetensors", lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])),
    ("model.safetensors", None),
    ("config.json", lambda whole: whole[:9]),
    ("config.json", None),
], ids=["half", "a bit", "no weights", "half a config", "no config"])
def test_a_damaged_checkpoint_is_named(tmp_path, file, spoil):
    save_number(tmp_path / "c", 1)
    path = tmp_path / "c" / file
    whole = path.read_bytes()
    path.unlink()
    if spoil:
        path.write_bytes(spoil(whole))
    with pytest.raises(UserError, match=f"{file} is .*(missing|damaged)"):
        checkpoint.load_checkpoint(tmp_path)

SAVE_TWICE = """
import os, pathlib, resource, signal
import checkpoint, common, test_all
def kill():
    os.kill(os.getpid(), signal.SIGKILL)

test_all.save_number({path!r}, 1)
{then}
with common.friendly():
    test_all.save_number({path!r}, 2)
"""

@pytest.mark.parametrize("then", [
    "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))        # bytes of a file",
    "checkpoint.sync = lambda path: (os.truncate(path, 99), kill())",
    "pathlib.Path.rename = lambda a, b: (os.rename(a, b), kill())",
], ids=["full disk", "kill while writing", "kill between renames"])
def test_a_save_that_breaks_off_loses_nothing(tmp_path, then):
    status, _, said = run("-c", SAVE_TWICE.format(path=str(tmp_path / "c"), then=then))
    if "kill" in then:
        assert status == -signal.SIGKILL, said
    else:
        fails_in_one_line((status, said), "disk is full", "older checkpoints are whole")
    assert saved_number(tmp_path) == 1
    save_number(tmp_path / "c", 3)
    assert saved_number(tmp_path) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "latest"]

# ---------------------------------------------------------------------------- optim.py
def test_the_rate_warms_up_and_falls_to_a_ten_thousandth():
    cfg = train.TrainConfig(steps=100, warmup=10)
    rates = [optim.rate(cfg, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(0.98, abs=0.01)
    assert rates[50] == pytest.approx(0.5001) and rates[100] == pytest.approx(1e-4)

def test_ema_is_the_average_by_hand():
    """After weights a, b: ((1 - d) d a + (1 - d) b) / (1 - d^2), without a trace of the start."""
    net = nn.Linear(1, 1, bias=False)
    ema = optim.EMA(net, 0.9)
    for value in (5.0, 7.0):
        nn.init.constant_(net.weight, value)
        ema.update()
    with ema.swapped():
        assert net.weight.item() == pytest.approx((0.9 * 5 + 7) / 1.9, rel=1e-5)
    assert net.weight.item() == 7.0

def test_without_muon_a_step_is_torchs_clipped_adamw():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.LayerNorm(20), nn.Linear(20, 20))
    theirs = copy.deepcopy(ours)
    learner = optim.Learner(ours, optim.Muon(ours, 1e-2), 5.0)
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": [theirs[1].weight]}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, 1e-2, betas=(0.9, 0.99), weight_decay=0.01)
    norms = []
    for _ in range(20):
        x = torch.randn(8, 20)
        for net in (ours, theirs):
            net(x).sub(1).square().sum().backward()
        norms.append([learner.step(), nn.utils.clip_grad_norm_(theirs.parameters(), 5.0)])
        adamw.step()
        adamw.zero_grad()
    assert torch.allclose(*torch.tensor(norms).T, rtol=1e-3) and torch.tensor(norms).min() > 5
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)

def test_muon_moves_matrices_alone_and_orthogonally():
    """Singular values near 1, and <M, U> near the sum of those of M, of that very matrix."""
    torch.manual_seed(0)
    matrices = [nn.Linear(48, 20), nn.Linear(20, 48), nn.Linear(20, 48), nn.Conv2d(16, 32, 1)]
    others = [nn.Conv2d(32, 32, 3, groups=32), nn.Embedding(50, 32)]
    net = nn.Sequential(*matrices, *others)
    before = copy.deepcopy(net)
    opt = optim.Muon(net, 0.0, muon_lr=0.02, weight_decay=0.0)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    for i, layer in enumerate(net):
        moved = (before[i].weight - layer.weight).detach().flatten(1)
        if layer in others:
            assert moved.abs().max() == 0
            continue
        U = moved / 0.02 / max(1, len(moved) / moved.shape[1]) ** 0.5   # sqrt(rows / columns)
        M, values = layer.weight.grad.flatten(1), torch.linalg.svdvals(U)
        assert 0.6 < values.min() and values.max() < 1.3
        assert (M * U).sum() > 0.7 * torch.linalg.svdvals(M).sum()

def test_a_nan_step_changes_nothing_is_counted_and_named():
    torch.manual_seed(0)
    net = nn.Linear(16, 16)
    opt, ema = optim.Muon(net, 0.1, muon_lr=0.1), optim.EMA(net, 0.5)
    learner = optim.Learner(net, opt, 1.0, ema)

    def step(factor):
        (factor * net(torch.ones(2, 16)).square().mean()).backward()
        learner.step()
        state = {**net.state_dict(), **opt.tensors()}
        state |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
        return {k: v.clone() for k, v in state.items()}

    first, spoilt = step(1.0), step(torch.nan)
    assert same_tensors(first, spoilt)
    assert learner.trouble().startswith("1 steps skipped") and not learner.trouble()
    assert not torch.equal(first["weight"], step(1.0)["weight"])
    for _ in range(20):
        step(torch.inf)
    with pytest.raises(UserError, match="first in weight.*21 so far, .* 20 in a row: lower lr"):
        learner.trouble()
# ---------------------------------------------------------------------------- sample.py
def gaussian_velocity(mean, deviation):
    """The exact velocity of rectified flow where the data are N(mean, deviation^2)."""
    def velocity(x, t, *_):
        variance = (1 - t) ** 2 * deviation**2 + t**2
        return -mean + (x - (1 - t) * mean) * (t - (1 - t) * deviation**2) / variance
    return velocity

@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("dpmpp", 2)])
def test_samplers_converge_at_their_order(name, order):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = 0.7 + 0.3 * x                                       # the path keeps the deviation
    errors = []
    for steps in (128, 512):
        walk = sample.times(steps, 1.0)
        end = sample.SAMPLERS[name](gaussian_velocity(0.7, 0.3), x, walk)
        errors.append((end - exact).abs().max().item())
    assert errors[1] < 0.003 and np.log2(errors[0] / errors[1]) / 2 > order - 0.35, errors

def test_guidance_goes_past_the_text_inside_its_interval():
    net, x, rows = tiny_model(), torch.randn(1, 16, 8, 8), []
    words, empty = net.encode(["a dog"]), net.encode([""])
    with torch.no_grad():
        v, v_empty = (net.denoiser(x, torch.full((1,), 0.5), y.emb, y.mask) for y in (words, empty))
        net.denoiser.register_forward_hook(lambda m, args, out: rows.append(len(out)))
        for cfg, interval, expected in (
            (1.0, (0, 1), v), (3.0, (0.6, 1), v), (3.0, (0, 1), v_empty + 3 * (v - v_empty)),
        ):
            found = sample.guided(net.denoiser, words, empty, cfg, interval)(x, 0.5)
            assert torch.allclose(found, expected, atol=1e-4)
    assert rows == [1, 1, 2]                                    # without guidance half the cost

@pytest.mark.parametrize("sampler", ["dpmpp", "renoise"])
def test_a_picture_does_not_depend_on_its_batch(sampler):
    net = tiny_model()
    captions = ["a dog", "three red cars left of a tree", "a cat"]
    how = {"size": (32, 64), "steps": 3, "cfg": 3.0, "sampler": sampler}
    together = sample.generate(net, None, captions, [1, 2, 3], **how)
    alone = sample.generate(net, None, captions[1:2], [2], **how)
    assert together[1].shape == (16, 4, 8) and torch.allclose(together[1], alone[0], atol=1e-4)

@pytest.mark.parametrize("prompt, unknown", [
    ("a bicycle", "bicycle"), ("zebra", "zebra"), ("picture of mountains", "mountains"),
    ("two red horses next to a tree", "horses"), ("a dog and a speedboat", "speedboat"),
    ("hey, can you draw an old train? thanks", "train"), ("the mouse on a sofa", "mouse sofa"),
    ("a rusty old car in the desert, cinematic lighting, 4k", ""),
    ("an oil painting of a fox for my grandmother", ""), ("a majestic lion that looks grumpy", ""),
    ("a guitr and two pengiuns in the snow", ""), ("the elefant", ""),
    ("a bunch of bananas on the left, a cup of tea on the right", ""),
    ("a turquoise guitar. make it shiny and elegant", ""),
])
def test_things_that_no_caption_names_are_told(prompt, unknown):
    assert list(wording.unknown_things(prompt, list(scenes.NOUNS))) == unknown.split()

def test_training_captions_name_no_unknown_thing(monkeypatch):
    monkeypatch.setattr(wording, "strange_words", lambda rng, n: wording.COMMON[n])
    monkeypatch.setattr(wording, "misspell", lambda text, rng: text)
    source = scenes.Scenes(64)
    said = [wording.wide(source.scene(i), random.Random(i)) for i in range(500)]
    told = [c for c in said if wording.unknown_things(c, list(scenes.NOUNS))]
    assert len(told) <= 1, told

def test_list_tells_what_a_checkpoint_knows(pipeline, tmp_path):
    said = succeeds("sample.py", "--list")
    for part in ("80 things", "cat (kitten, kitty)", "crimson", "four", "left of", "at night"):
        assert part in said
    assert max(map(len, said.splitlines())) <= 100
    tiny = ["--ckpt", pipeline("train"), "--ae", pipeline.ae, "-o", tmp_path / "x.png"]
    assert "12 things" in succeeds("sample.py", "--list", *tiny)
    assert "fox: not among the 12 things it knows" in succeeds("sample.py", "a fox", *tiny)

def test_a_checkpoint_says_how_it_is_sampled():
    base = {"flow": {"shift": 1.0}}
    few = {**base, "few_steps": {"steps": 4, "sampler": "renoise", "cfg": 1.0, "shift": 3.0}}
    assert sample.times(4, 3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert sample.sampling(base) == {"steps": sample.times(28, 1.0), "cfg": 4.0, "sampler": "dpmpp"}
    assert sample.sampling(few) == {"steps": sample.times(4, 3.0), "cfg": 1.0, "sampler": "renoise"}
    assert sample.sampling(few, 2)["steps"] == pytest.approx([1, 0.75, 0])     # trained times
    assert sample.sampling(few, 8)["steps"] == sample.times(8, 3.0)
    asked = {"steps": sample.times(4, 1.0), "cfg": 2.0, "sampler": "euler"}
    assert sample.sampling(few, 4, 2.0, "euler", 1.0) == asked

def test_a_taught_encoder_trains_at_a_share_of_the_rates():
    steps = {}
    for share in (1.0, 0.1):
        net = tiny_model()
        before = {k: p.detach().clone() for k, p in net.named_parameters()}
        opt = optim.Muon(net, 1e-2, 2e-2, slow=net.text.parameters(), share=share)
        opt.schedule(0.5)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        steps[share] = {k: (p - before[k]).norm().item() for k, p in net.named_parameters()}
    for k, full in steps[1.0].items():
        wanted = 0.1 * full if k.startswith("text.") else full
        assert steps[0.1][k] == pytest.approx(wanted, rel=1e-3), k

# ---------------------------------------------------------------------------- train.py
def test_flow_loss_is_zero_for_the_true_velocity():
    x0, eps, t = torch.randn(64, 4, 2, 2), torch.randn(64, 4, 2, 2), torch.rand(64)
    assert train.flow_loss(lambda x, t: eps - x0, x0, eps, t).max() == 0
    identity = train.flow_loss(lambda x, t: x, x0, eps, torch.ones(64))         # t = 1 is noise
    assert torch.allclose(identity, x0.square().mean((1, 2, 3)), atol=1e-5)

def test_times_are_logit_normal_and_shifted():
    g = torch.Generator().manual_seed(0)
    t = torch.logit(train.draw_times(train.FlowConfig(), 20000, g, "cpu"))
    assert t.mean().abs() < 0.03 and t.std().item() == pytest.approx(1, abs=0.03)
    t = train.draw_times(train.FlowConfig(shift=3.0), 20000, g, "cpu")
    assert t.median().item() == pytest.approx(0.75, abs=0.02)

STAGES = ["train", "mmdit", "distill", "gan", "dmd"]

def parts_of_run(out):
    """All tensors of a run's checkpoint: {"file name": tensor}."""
    files = sorted((out / "checkpoint").glob("*.safetensors"))
    parts = {f.stem: safetensors.torch.load_file(f) for f in files}
    return {f"{name} {k}": x for name, part in parts.items() for k, x in part.items()}

def losses_of_run(out):
    rows = common.read_log(out / "log.csv")
    return [float(row[k]) for row in rows for k in ("loss", "val") if row.get(k)]

@pytest.mark.parametrize("stage, end", [*[(stage, signal.SIGINT) for stage in STAGES],
                                        ("train", signal.SIGTERM)])
def test_resume_is_exact(stage, end, pipeline, tmp_path, monkeypatch):
    words = [*pipeline.command(stage), f"out={tmp_path}"]
    log = checkpoint.Run.log

    def interrupted(self, *args, **values):
        if self.step == 3:
            if end == signal.SIGINT:        # which a job in the background ignores
                signal.signal(end, signal.default_int_handler)
            os.kill(os.getpid(), end)
        log(self, *args, **values)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "log", interrupted)
        said = command(*words)[1]
    assert "stopped by " + ("SIGTERM" if end == signal.SIGTERM else "the keyboard") in said, said
    done = checkpoint.load_checkpoint(tmp_path)[0]["step"]
    assert done == (3 if end == signal.SIGTERM else 2) and not (tmp_path / "final").exists()
    succeeds(*words)
    assert same_tensors(parts_of_run(pipeline(stage)), parts_of_run(tmp_path))
    assert losses_of_run(pipeline(stage)) == losses_of_run(tmp_path) != []
    assert (tmp_path / "samples_0000004.png").is_file()
    net, config = model.load_model(tmp_path / "final")
    assert config.get("few_steps", {}).get("steps", 0) == 2 * (stage in ("gan", "dmd"))
    out = [p for name, p in net.denoiser.named_parameters() if "out" in name][-1]
    assert out.abs().max() > 0                                  # it learned: zero at the start

class NoWaiting(TorchDispatchMode):
    """Fails where the value of a tensor is asked for: a GPU would have to finish all kernels."""
    asked, ops = ("_local_scalar_dense", "nonzero", "masked_select", "equal"), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert name not in self.asked and not any(x is not None and x.dtype == torch.bool
                                                  for x in masks), f"{name} waits"
        self.ops += 1
        return function(*args, **(kwargs or {}))

@pytest.mark.parametrize("stage", STAGES)
def test_a_step_between_log_lines_waits_for_no_device(stage, pipeline, tmp_path, monkeypatch):
    watch, steps, words = NoWaiting(), checkpoint.Run.steps, pipeline.command(stage)

    def watched(run):
        for step in steps(run):
            with watch if step == 1 else contextlib.nullcontext():
                yield step

    monkeypatch.setattr(checkpoint.Run, "steps", watched)
    words += ["steps=3", "log_every=9", "eval_every=9", "muon_lr=0.02", f"out={tmp_path}"]
    assert "done: " in succeeds(*words) and watch.ops > 500
    for ask in (float, lambda x: x[x > 0], lambda x: x.nonzero()):
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            ask(torch.ones(1))

def test_final_is_the_average_in_fp16(pipeline):
    final = checkpoint.load_checkpoint(pipeline("train") / "final")[1]["model"]
    state = checkpoint.load_checkpoint(pipeline("train"), ("model", "ema"))[1]
    average = {**state["model"], **state["ema"]}
    assert final.keys() == average.keys()
    assert all(torch.equal(final[k], average[k].half()) for k in final)

@pytest.mark.parametrize("stage, other, change, words", [
    ("train", "train", "steps=2", "4 steps done, steps=2 asks for fewer"),
    ("train", "distill", "steps=9", "is a run of stage 'train', not of 'distill'"),
    ("train", "train", "model.time_dim=64", "of another shape"),
    ("gan", "gan", "method=both", "without its fake"),
])
def test_a_run_that_cannot_go_on_is_left_alone(pipeline, tmp_path, stage, other, change, words):
    out = shutil.copytree(pipeline(stage), tmp_path / "run")
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    fails_in_one_line(command(*pipeline.command(other), change, f"out={out}"), words)
    assert before == {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}

@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "distill"])
def test_two_processes_train_as_one(stage, pipeline, tmp_path):
    """Twice the micro-batches are the same training, but for the order of sums."""
    words = [*pipeline.command(stage), "clip=0.1", "muon_lr=0.02"]
    succeeds(*words, "accumulate=2", f"out={tmp_path / 'one'}")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    status, _, said = run(*torchrun, *words, f"out={tmp_path / 'two'}")
    assert status == 0, said
    a, b = parts_of_run(tmp_path / "one"), parts_of_run(tmp_path / "two")
    assert a.keys() == b.keys()
    for k, x in a.items():
        assert (x - b[k]).abs().max() <= 1e-5 + 0.01 * x.abs().max(), k
    losses = [losses_of_run(tmp_path / k) for k in ("one", "two")]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-3)

# ---------------------------------------------------------------------------- distill.py
def tiny_batch():
    """(Batch, eps, t) of six captions, the second the empty one."""
    g = torch.Generator().manual_seed(5)
    x0, eps = torch.randn(6, 16, 8, 8, generator=g), torch.randn(6, 16, 8, 8, generator=g)
    captions = ["a red car", "", "three dogs", "a cat", "a blue panda left of a tree", "a key"]
    t = torch.tensor([0.05, 0.1, 0.3, 0.5, 0.7, 0.95])          # two in one bin of t
    return data.Batch(x0, text.load_vocabulary().tokenize(captions)), eps, t

def distill_objective(pipeline, *args):
    words = [*pipeline.command("distill")[1:], *args]
    cfg = common.read_config(distill.DistillConfig(), words)
    torch.manual_seed(1)
    return distill.Distill(cfg, shaken(model.TextToLatents(cfg.network, cfg.text)).train())

def test_task_weight_is_a_density_over_its_maximum():
    flow = train.FlowConfig(mean=0.3, std=0.8, shift=3.0)
    drawn = train.draw_times(flow, 400000, torch.Generator().manual_seed(0), "cpu")
    weight = distill.TaskWeight("shifted", flow)((torch.arange(50) + 0.5) / 50)
    counts = torch.histc(drawn, 50, 0, 1)
    assert torch.allclose(weight, counts / counts.max(), atol=0.04)
    for density, by_hand in (("plain", 0.410), ("shifted", 0.903)):
        cfg = distill.DistillConfig(kd=False, featkd=False, density=density)
        cfg.flow.shift = 2.0
        weight = distill.Distill(cfg, None).weight(torch.tensor([6 / 7]))
        assert weight.item() == pytest.approx(by_hand, abs=1e-3)

@pytest.mark.parametrize("args, a, ratio", [
    ([], [1.0, 0.2485, 0.2485], [4.0, 0.25, 30.0]),             # |L_task| / |L_kd|
    (["ratio=none"], [1.0, 0.2485, 0.2485], [1.0, 1.0, 1.0]),
    (["ratio=none", "scaling=constant", "alpha=0.3"], [0.3, 0.3, 0.3], [1.0, 1.0, 1.0]),
], ids=["timestep", "no ratio", "constant"])
def test_scaled_loss_by_hand(pipeline, args, a, ratio):
    task, kd = torch.tensor([2.0, 1.0, 3.0]), torch.tensor([0.5, 4.0, 0.1], requires_grad=True)
    a, ratio, t = torch.tensor(a), torch.tensor(ratio), torch.tensor([0.5, 0.1, 0.9])
    scaled = distill_objective(pipeline, "featkd=false", *args).scaled
    loss = scaled(task, {"kd": kd}, t)[0]
    assert torch.allclose(loss, a * task + (1 - a) * ratio * kd, atol=1e-3)
    grad = torch.autograd.grad(loss.sum(), kd)[0]               # the ratio is a constant
    assert torch.allclose(grad, (1 - a) * ratio, atol=1e-2)
    both = scaled(task, {"kd": kd, "feat": 2 * kd}, t)[0]
    ratio_of_feat = ratio if "ratio=none" in args else ratio / 2
    assert torch.allclose(both - loss, a * task + (1 - a) * ratio_of_feat * 2 * kd, atol=1e-3)

def test_without_its_parts_distillation_is_the_flow_loss(pipeline):
    none = distill_objective(pipeline, "kd=false", "featkd=false", "teacher=")
    plain = train.FlowObjective(none.net)
    assert torch.equal(plain(*tiny_batch())[0], none(*tiny_batch())[0])

@pytest.mark.parametrize("teacher", ["mmdit", "train"])
def test_features_are_matched_normalised_over_channels(pipeline, teacher):
    objective = distill_objective(pipeline, f"teacher={pipeline(teacher)}")
    (batch, eps, t), teacher, guess = tiny_batch(), objective.teacher, objective.projector
    guess.weight.data *= 0                                      # its bias, in every place
    f = teacher(batch.x0, 0 * t, teacher.read(batch), (teacher.tap,))[1][teacher.tap]
    f = (f - f.mean(1, True)) / f.std(1, correction=0, keepdim=True)        # (B, D, h, w)
    by_hand = (f - guess.bias[:, None, None]).square().mean().item()
    assert objective(batch, eps, 0 * t)[1]["feat"].item() == pytest.approx(by_hand, rel=1e-3)

def test_gradients_never_reach_the_teacher(pipeline):
    objective = distill_objective(pipeline)
    objective(*tiny_batch())[0].mean().backward()
    for name, p in objective.named_parameters():                # rows of tables may be unused
        assert p.grad.abs().sum() > 0 or "token" in name or "position" in name, name
    theirs = [*objective.teacher.denoiser.parameters(), *objective.teacher.text.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in theirs)
    assert not {id(p) for p in theirs} & {id(p) for p in objective.parameters()}

def test_sd3_teaches_by_its_own_encoders_once_a_batch(pipeline, sd3_folder, monkeypatch):
    objective = distill_objective(pipeline, f"teacher={sd3_folder}")
    encoders, asked, batch = objective.teacher.encoders, [], tiny_batch()
    encode = encoders.encode
    monkeypatch.setattr(encoders, "encode", lambda x: asked.extend(x) or encode(x))
    objective(*batch)[0].mean().backward()
    states = objective.teacher.read(batch[0], objective.net.vocabulary)     # step distillation asks
    assert asked[:3] == ["a red car", "", "three dogs"] and len(asked) == 6
    assert states.mask.all() and objective.projector.weight.grad.abs().sum() > 0

# ---------------------------------------------------------------------------- adv_distill.py
def test_gradients_of_d_stop_at_the_frozen_features(pipeline):
    cfg = common.read_config(adv_distill.AdvConfig(), pipeline.command("gan")[1:])
    critic = adversaries.Critic(cfg, distill.Teacher(cfg, torch.device("cpu")))
    net, (batch, eps, t) = shaken(model.load_model(cfg.init)[0]), tiny_batch()
    net.requires_grad_(True).train()
    states = critic.frozen.read(batch)
    made = adv_distill.predict(net, adversaries.noised(batch.x0, t, eps), t, batch.text)
    real, fake = critic(batch.x0, t, states), critic(made.detach(), t, states)
    adversaries.critic_loss("paper", real, fake).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in critic.parameters())
    assert all(p.grad is None for p in net.parameters())
    adversaries.generator_loss("hinge", real, critic(made, t, states)).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.denoiser.parameters())
    assert all(p.grad is None for p in critic.frozen.denoiser.parameters())

def test_d_sees_both_sides_in_the_same_noise(pipeline):
    cfg = common.read_config(adv_distill.AdvConfig(), pipeline.command("gan")[1:])
    game = adv_distill.Game(cfg, model.load_model(cfg.init)[0], torch.device("cpu"), False)
    batch, g = tiny_batch()[0], torch.Generator().manual_seed(0)
    texts = game.teacher.read(batch)
    assert torch.equal(adversaries.rolled(texts).emb, texts.emb[[5, 0, 1, 2, 3, 4]])
    values = game.critic_step(batch, batch.x0, g)       # predictions without a flaw
    assert values["accuracy"] == 0.5 and values["d_real"] == values["d_fake"]
    assert torch.isfinite(values["bin_d"]).any() and values["bin_d"].shape == (8,)
    with pytest.raises(UserError, match="neighbours"):
        replace(cfg, wrong_captions=True, batch=1).check()

def test_g_waits_until_d_is_right_often_enough():
    cfg, turns = adv_distill.AdvConfig(critic_start=50), []

    def play(batch, turn, g):
        turns.append(turn)
        return None, {"accuracy": torch.tensor(0.5 if len(turns) <= 20 else 0.7)}
    game = SimpleNamespace(cfg=cfg, device="cpu", play=play, schedule_others=turns.count)
    adv_distill.Game.prepare_critic(game, lambda k: None, 0, 1)
    assert turns == [False] * 27            # the last ten: 3 x 0.5 and 7 x 0.7 are 0.64

def test_every_remedy_of_the_discriminator_trains(pipeline, tmp_path):
    remedies = ["real=teacher", "loss=relativistic", "r2=0.01", "wrong_captions=true",
                "match_weight=0.1", "critic_depth=1", "log_every=2"]
    succeeds(*pipeline.command("gan"), *remedies, f"out={tmp_path / 'run'}")
    rows = [row for row in common.read_log(tmp_path / "run/log.csv") if row.get("d_loss")]
    for key in "r1", "r2", "d_wrong", "pull_kd", "pull_gan", "pull_match", "pull_ratio":
        assert all(float(row[key]) > 0 for row in rows), key
    drawn = safetensors.torch.load_file(*(pipeline.folder / "cache").glob("teacher-*"))["latents"]
    assert drawn.shape == (32, 16, 8, 8) and drawn.std() > 0.1

def test_a_discriminator_that_pulls_too_little_is_named():
    logs = [[{"step": "1", "pull_ratio": x}, {"step": "2"}] for x in ("0.01", "0.7", "20")]
    none, weak, right, strong = map(adv_distill.pull_warnings, [[], *logs])
    assert "0.01 times" in weak[0] and "20 times" in strong[0] and right == none == []

def test_what_a_student_learned_is_added_to_another_training(pipeline, tmp_path):
    before, after = pipeline("train"), pipeline("gan")
    nets = [model.load_model(path)[0] for path in (before, after, pipeline("distill"))]
    start, end, own = ({k: x.clone() for k, x in net.state_dict().items()} for net in nets)
    adversaries.add_training(nets[2], before, after)
    for key, x in nets[2].state_dict().items():
        assert torch.equal(x, own[key] + (end[key] - start[key]))
    assert any(not torch.equal(start[key], end[key]) for key in start)
    with pytest.raises(common.UserError, match="faster="):
        adversaries.add_training(tiny_model(), before, after)

@pytest.mark.parametrize("kind, at_zero", [
    ("paper", (2 * np.log(2), -np.log(2))),
    ("nonsaturating", (2 * np.log(2), np.log(2))),
    ("hinge", (2, 0)),
    ("relativistic", (np.log(2), np.log(2))),
])
def test_each_loss_teaches_d_and_pulls_g_towards_real(kind, at_zero):
    real, fake, made = (torch.zeros(1, 3, requires_grad=True) for _ in range(3))
    d = adversaries.critic_loss(kind, [real], [fake])
    g = adversaries.generator_loss(kind, [real.detach()], [made])
    assert (d.item(), g.item()) == pytest.approx(at_zero)
    (d + g).backward()                                          # each loss falls along -grad
    assert (real.grad < 0).all() and (fake.grad > 0).all() and (made.grad < 0).all()

def test_r1_is_the_squared_gradient_of_a_logit():
    g, x, t = torch.Generator().manual_seed(0), torch.randn(20000, 3, 1, 1), torch.rand(20000)
    w = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)

    def critic(x, t, states):
        return [(x.flatten(1) @ w)[:, None], 0 * x.flatten(1)]  # the second head is flat
    r1 = adversaries.gradient_penalty(critic, x, t, None, critic(x, t, None), 0.05, g).mean()
    assert r1.item() == pytest.approx(w.square().sum().item() / 2, rel=0.05)
    assert F.cosine_similarity(torch.autograd.grad(r1, w)[0], w, 0) > 0.99      # it shrinks w

def test_dmd_moves_towards_the_real_and_stops_there():
    def network(mean):                                          # of N(mean, 1/4)
        return lambda x, t, *_: gaussian_velocity(mean, 0.5)(x, t[:, None, None, None])
    zero, one, g = network(0.0), network(1.0), torch.Generator().manual_seed(0)
    x, t = torch.randn(512, 1, 2, 2) / 2, torch.full((512,), 0.5)
    pulls = [adversaries.dmd_gradient(lambda *args: (one(*args), {}), fake, x, t, None, None, g)
             for fake in (zero, one)]
    assert (pulls[0] < 0).all() and pulls[0].sum((1, 2, 3)).mean().abs() < 2    # of order one
    assert pulls[1].abs().max() == 0

@pytest.mark.slow
def test_frozen_text_trains_from_one_cache(tmp_path, sd3_folder, gemma_folder, monkeypatch):
    """Student on snapgen's encoders, teacher on SD3's: no encoder is loaded after --cache."""
    folder, cached = tmp_path / "pictures", tmp_path / "cache"
    succeeds("data.py", "--export", folder, "40", "96")
    words = [*TINY_RUN, "batch=2", "text.kind=snapgen", "text.width=48", "model.context_dim=48",
             f"text.folder={gemma_folder}", f"data.folder={folder}", f"data.cache={cached}",
             "data.bucket_step=16", "data.held_out=0.3", f"teacher={sd3_folder}"]
    succeeds("distill.py", "--cache", *words)
    monkeypatch.setattr(text.Encoders, "__call__", lambda *a: pytest.fail("an encoder was asked"))
    succeeds("distill.py", *words, f"out={tmp_path / 'kd'}")
    adv = ["adv_distill.py", *words, f"init={tmp_path / 'kd'}", "K=2", "method=both"]
    succeeds(*adv, "critic_start=2", f"out={tmp_path / 'adv'}")
    net = model.load_model(tmp_path / "adv" / "final")[0]
    assert not any(k.startswith("text.") for k in net.state_dict())
# ---------------------------------------------------------------- export_coreml.py, coreml/
SHALLOW = {
    "widths": [32, 32], "context_dim": 32, "depth_down": [0, 1], "depth_mid": 0, "depth_up": [0, 0],
    "self_attn": [False, True], "res_down": 1, "act": "hardswish",
}
SDXL = {"kv_heads": 0, "qk_norm": False, "rope": 0.0, "skip_lowest": True, "separable": False}

@pytest.mark.parametrize("changes", [{}, {**SHALLOW, "context_dim": 48, "kv_heads": 1}, SDXL])
@torch.no_grad()
def test_unet_form_equals_the_training_form(changes):
    from coreml import ane
    net = tiny_unet(**changes)
    x, t, emb = torch.randn(1, 16, 8, 16), torch.tensor([0.75]), torch.randn(1, 12, 48)
    mask = torch.arange(12)[None] < 7
    states = torch.cat([emb, torch.where(mask, 0.0, ane.MASKED)[..., None]], 2)
    states = states.transpose(1, 2)[:, :, None]                                 # (1, D+1, 1, L)
    want, form = net(x, t, emb, mask), ane.AneUNet(net, 8, 16)
    assert (form(x, 1000 * t, states) - want).abs().max() < 1e-5
    assert (form(x, 1000 * t, states.abs()) - want).abs().max() > 1e-3          # the mask acts

@torch.no_grad()
def test_text_and_decoder_forms_equal_the_training_forms():
    from coreml import ane
    net, ae, z = tiny_model(), tiny_autoencoder(), torch.randn(1, 16, 4, 4)
    tokens = net.vocabulary.tokenize(["three red cars", "a " * 63])     # the first is padded to 64
    real, out = tokens.mask[:1], ane.AneTextEncoder(net.text)(tokens.ids[:1].float())
    assert (out[..., :-1] - net.text(tokens).emb[:1])[real].abs().max() < 1e-5
    assert torch.equal(out[..., -1] == 0, real)
    assert (ane.AneDecoder(ae)(z) - ae.decode(z)).abs().max() < 1e-5    # the border too

@torch.no_grad()
def test_calibrated_norms_survive_fp16():
    from coreml import ane
    norm, x = ane.AneGroupNorm(nn.GroupNorm(2, 4)), 5000 * torch.randn(1, 4, 8, 8)
    assert not torch.isfinite((norm.scaled(x) ** 2).half()).all()
    ane.calibrate(norm, [{"x": x}])
    assert torch.isfinite((norm.scaled(x) ** 2).half()).all()
    assert (norm(x) - norm.norm(x)).abs().max() < 1e-5

# ---------------------------------------------------------------------------- a bundle
def make_bundle(folder):
    """A bundle of tiny networks at FOLDER/bundle, their checkpoints beside it."""
    torch.manual_seed(8)        # the graph of an app's UNet: 98.7 to 100.8 dB over ten seeds
    words, unet = text.TextConfig(width=32, layers=1, heads=2), {**TINY, **SHALLOW}
    save_model(folder / "net", shaken(model.TextToLatents(model.UNetConfig(**unet), words)))
    config = json.loads((folder / "net/config.json").read_text())
    config |= {"data": {"size": 32, "nouns": 12, "layout": "slots"},
               "few_steps": {"steps": 3, "sampler": "euler", "cfg": 1.0}}
    (folder / "net/config.json").write_text(json.dumps(config))
    ae = shaken(tiny_autoencoder())
    about = {"autoencoder": asdict(ae.cfg)}
    checkpoint.save_checkpoint(folder / "ae", {"model": ae.state_dict()}, about, latest=False)
    succeeds("export_coreml.py", *coreml_arguments(folder / "bundle"))
    return folder / "bundle"

@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("coreml"))

def coreml_arguments(out):
    return [f"--ckpt={out.parent / 'net'}", f"--ae={out.parent / 'ae'}", f"--out={out}"]

@pytest.mark.slow
def test_bundle_is_whole_and_passes_its_gates(bundle):
    m = json.loads((bundle / "manifest.json").read_text())
    assert len(list(bundle.iterdir())) == 6 and len(m["parts"]) == 3
    assert all(r["numerics"] >= 50 and r["largest"] <= 32768 for r in m["parts"].values())
    assert m["picture"] >= 35 and m["schedule"]["times"] == sample.times(3, 1.0)

@pytest.mark.slow
def test_bundle_draws_pytorchs_pictures(bundle, tmp_path):
    from coreml.bundle import load_bundle
    from export_coreml import picture_psnr
    net, _ = model.load_model(bundle.parent / "net")
    ae, files = decoder.load_autoencoder(bundle.parent / "ae"), load_bundle(bundle)
    how = {"captions": ["a red car", "dogs"], "seeds": [5, 6], "size": 32, "steps": 4, "cfg": 3.0}
    ours, theirs = sample.generate(files, files, **how), sample.generate(net, ae, **how)
    assert picture_psnr(ours, theirs) >= 35
    assert picture_psnr(ours[:1], theirs[1:]) < 30          # not because all are alike
    succeeds("sample.py", "a dog", "--coreml", bundle, "-o", tmp_path / "dog.png")

@pytest.mark.slow
def test_swapped_weight_is_refused_and_kept_aside(bundle, monkeypatch):
    import export_coreml
    keep, parts = (bundle / "manifest.json").read_text(), export_coreml.make_parts
    convert = export_coreml.ane.convert_form

    def swapped(form, *args):
        form = copy.deepcopy(form)
        w = form.body[0][1].weight
        w[:2] = w[[1, 0]].clone()               # two output channels of one convolution
        return convert(form, *args)
    monkeypatch.setattr(export_coreml.ane, "convert_form", swapped)
    monkeypatch.setattr(export_coreml, "make_parts", lambda source: parts(source)[2:])
    with pytest.raises(UserError, match="refused: VAEDecoder: graph .* kept in"):
        export_coreml.main(coreml_arguments(bundle))
    assert (bundle.with_name("bundle.refused") / "VAEDecoder.mlpackage").is_dir()
    assert (bundle / "manifest.json").read_text() == keep

def test_frozen_text_encoders_stay_outside(tmp_path):
    import export_coreml
    words = text.TextConfig(kind="clip-l", width=48)
    save_model(tmp_path / "net", shaken(model.TextToLatents(model.UNetConfig(**TINY), words)))
    source = export_coreml.load_source(export_coreml.parse([f"--ckpt={tmp_path / 'net'}"]))
    parts = export_coreml.make_parts(source)
    assert [p.name for p in parts] == ["Unet", "VAEDecoder"]
    assert parts[0].cases[0]["encoder_hidden_states"].shape == (1, 49, 1, 77)

def test_export_replaces_nothing_but_a_bundle():
    fails_in_one_line(command("export_coreml.py", "--out", ASSETS), "no bundle of ours")

def test_bundle_of_an_older_version_gets_one_line(tmp_path):
    manifest = '{"size": 64, "config": {}, "parts": {"TextEncoder": {}}}'       # without data
    (tmp_path / "manifest.json").write_text(manifest)
    fails_in_one_line(command("sample.py", "a dog", "--coreml", tmp_path), "of this version")

@pytest.mark.slow
def test_core_ai_files_execute_by_apples_runtime(bundle):
    pytest.importorskip("coreai_torch")         # optional: pip install coreai-torch
    out = bundle.with_name("ai")
    succeeds("export_coreml.py", *coreml_arguments(out), "--target", "coreai")
    assert min(json.loads((out / "metadata.json").read_text())["checks"].values()) >= 50

@pytest.mark.slow
@torch.no_grad()
def test_fewer_bits_are_smaller_and_worse(tmp_path):
    from coreml import ane, check
    ae = shaken(tiny_autoencoder(tiny_widths=[64, 32, 32, 32], tiny_blocks=[1, 0, 0, 0]))
    form, z, rows = ane.AneDecoder(ae), torch.randn(1, 16, 4, 4), []
    ane.round_to_fp16(form)
    whole = ane.convert_form(form, {"z": z}, "image")
    for bits in (16, 8, 6, 4):
        small = whole if bits == 16 else ane.compress(whole, bits)
        small.save(str(tmp_path / f"{bits}.mlpackage"))
        package = check.Package(tmp_path / f"{bits}.mlpackage")
        rows.append((package.bytes, check.tensor_psnr(package.run({"z": z})["image"], form(z))))
    assert rows == sorted(rows, reverse=True) and rows[1][1] > 40 and rows[3][1] > 18, rows

# ---------------------------------------------------------------------------- apps of SD 1.x
def toy_noise(x, k):
    return torch.tanh(x.roll(1, -1) + k / 1000) + 0.3 * x

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

@pytest.mark.parametrize("n", [15, 25])         # under 15 steps Apple's last two are of first order
def test_apples_dpm_solver_equals_that_of_diffusers(n):
    from diffusers import DPMSolverMultistepScheduler

    from coreml.apple import apple_dpmpp
    scheme = DPMSolverMultistepScheduler(
        **SD_BETAS, timestep_spacing="linspace", final_sigmas_type="sigma_min",
        lower_order_final=False)
    scheme.set_timesteps(n)
    x = y = torch.randn(4, 16)
    for k in scheme.timesteps:
        y = scheme.step(toy_noise(y, int(k)), k, y).prev_sample
    assert (scheme.model_outputs[-1] - apple_dpmpp(toy_noise, x, n)).abs().max() < 1e-4

@pytest.mark.parametrize("n", [4, 25])
def test_apples_pndm_equals_that_of_diffusers(n):
    from diffusers import PNDMScheduler

    from coreml.apple import apple_pndm
    scheme = PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1)
    scheme.set_timesteps(n)
    x, asked = torch.randn(4, 16), []

    def seen(x, k):
        asked.append((x, k))
        return toy_noise(x, k)
    apple_pndm(seen, x, n)
    for k, (y, at) in zip(scheme.timesteps, asked, strict=True):
        assert int(k) == at and (x - y).abs().max() < 1e-4
        x = scheme.step(toy_noise(x, at), k, x).prev_sample

def test_a_flow_model_as_sd_reaches_the_same_data():
    """Data of one point: the velocity is known, and so is where every scheduler must end."""
    from coreml.apple import SCHEDULERS, sd_noise
    x0, x = torch.full((1, 3), 0.7), torch.randn(1, 3)
    for draw in SCHEDULERS.values():
        assert (draw(sd_noise(lambda x, t: (x - x0) / t), x, 25) - x0).abs().max() < 1e-4

@pytest.fixture(scope="session")
def sd_tokens(tmp_path_factory):
    """vocab.json and merges.txt of the captions of 300 scenes, and the way back to our ids."""
    from coreml.sd import Entries, SDTextEncoder
    scenes, folder = data.Scenes(64, "test"), tmp_path_factory.mktemp("tokens")
    captions = [word(scenes.scene(i), random.Random(i)).lower()
                for i in range(300) for word in (scenes.caption, wording.wide)]
    vocabulary = text.load_vocabulary()
    entries = Entries(vocabulary, {w for c in captions for w in c.split() if "#" not in w})
    entries.save(folder)
    return folder, captions, vocabulary, SDTextEncoder(None, entries, 24)

def ids_by_an_app(sd_tokens, caption):
    from coreml.apple import AppleTokenizer
    folder, _, _, encoder = sd_tokens
    ids = torch.tensor([AppleTokenizer(folder).ids(caption, encoder.L + 1)]).float()
    return encoder.own_ids(ids)[0].int().tolist()

def own_ids(sd_tokens, caption):
    _, _, vocabulary, encoder = sd_tokens
    ids = vocabulary.tokenize([caption], encoder.L, cut=True).ids[0].tolist()
    return ids + [vocabulary.pad] * (encoder.L - len(ids))

def test_an_apps_tokens_become_ours(sd_tokens):
    for caption in sd_tokens[1][:100]:
        if len(caption.split()) < 12:
            assert ids_by_an_app(sd_tokens, caption) == own_ids(sd_tokens, caption), caption
    for caption in ("", "  A  RED car ", "an unheard-of zyxw"):
        assert ids_by_an_app(sd_tokens, caption) == own_ids(sd_tokens, " ".join(caption.split()))
    long = "a red car and " * 12
    assert ids_by_an_app(sd_tokens, long) == own_ids(sd_tokens, long)       # cut, and ended
    unknown = ids_by_an_app(sd_tokens, "a red \u8eca on snow")              # ends the prompt
    assert unknown == own_ids(sd_tokens, "a red")

def test_a_wrong_merge_shows(sd_tokens, tmp_path):
    folder, _, vocabulary, encoder = sd_tokens
    shutil.copy(folder / "vocab.json", tmp_path)
    merges = (folder / "merges.txt").read_text()
    assert "\nc ar</w>\n" in merges
    (tmp_path / "merges.txt").write_text(merges.replace("\nc ar</w>\n", "\n"))
    broken = tmp_path, [], vocabulary, encoder
    assert ids_by_an_app(broken, "a car") != own_ids(sd_tokens, "a car")
    assert ids_by_an_app(broken, "a dog") == own_ids(sd_tokens, "a dog")

def test_apples_tokenizer_cuts_as_clips_does(sd_tokens):
    from transformers import CLIPTokenizer

    from coreml.apple import AppleTokenizer
    folder = sd_tokens[0]
    clip = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    apples = AppleTokenizer(folder)
    for caption in [*sd_tokens[1][::10], "zebra carrots carport"]:
        caption = " ".join(w for w in caption.split() if w.isalpha())   # CLIP cuts marks off
        ids = clip(caption).input_ids
        assert apples.ids(caption, len(ids)) == ids, caption

@pytest.fixture(scope="session")
def sd_bundle(bundle):
    out = bundle.with_name("sd")
    succeeds("export_coreml.py", *coreml_arguments(out), "--target", "sd")
    return out

@pytest.mark.slow
def test_an_app_draws_pytorchs_pictures(sd_bundle, tmp_path):
    manifest = json.loads((sd_bundle / "manifest.json").read_text())
    assert manifest["picture"] >= 35 and manifest["schedule"]["steps"] == 8
    names = {file.name for file in sd_bundle.iterdir()}
    assert names == {"TextEncoder.mlpackage", "Unet.mlpackage", "VAEDecoder.mlpackage", "README.md",
                     "vocab.json", "merges.txt", "compile.sh", "manifest.json"}
    from coreml.bundle import load_bundle
    from export_coreml import app_pictures, picture_psnr
    net, _ = model.load_model(sd_bundle.parent / "net")
    ae, files = decoder.load_autoencoder(sd_bundle.parent / "ae"), load_bundle(sd_bundle)
    for asked in ((4, 3.0, "pndm"), (5, 1.0, "dpmpp")):
        how = files.sampling(*asked)
        ours = files.draw(["a red car", "dogs"], [5, 6], **how)
        theirs = app_pictures(net, ae, ["a red car", "dogs"], [5, 6], 32, **how)
        assert picture_psnr(ours, theirs) >= 35 and picture_psnr(ours[:1], theirs[1:]) < 30
    draw = ["sample.py", "a dog", "--coreml", sd_bundle, "-o", tmp_path / "dog.png"]
    assert "(pndm, guidance 2, 3 steps" in succeeds(*draw, "--sampler", "pndm", "--cfg", 2,
                                                    "--steps", 3)
    fails_in_one_line(command(*draw, "--sampler", "heun"), "dpmpp or pndm")

@pytest.mark.slow
def test_a_swapped_table_entry_is_refused(sd_bundle, monkeypatch):
    import export_coreml
    parts = export_coreml.sd_parts

    def swapped(*args):
        found = parts(*args)
        table = found[1].form.flow_time
        table[[100, 999]] = table[[999, 100]].clone()
        return found[1:2]
    monkeypatch.setattr(export_coreml, "sd_parts", swapped)
    with pytest.raises(UserError, match="refused: Unet: form .* kept in"):
        export_coreml.main([*coreml_arguments(sd_bundle), "--target", "sd"])

@pytest.mark.slow
@pytest.mark.parametrize("file", ["merges.txt", "vocab.json", "Unet.mlpackage/Manifest.json"])
def test_a_missing_file_of_an_apps_bundle_is_named(sd_bundle, tmp_path, file):
    folder = shutil.copytree(sd_bundle, tmp_path / "sd")
    (folder / file).unlink()
    fails_in_one_line(command("sample.py", "a dog", "--coreml", folder), file.split("/")[0])

# ---------------------------------------------------------------------------- any package
def converted(then, path, precision=None, height=8):
    """A convolution, then what a test is about, as a package opened by our executor."""
    from coreml.check import Package, load_coremltools
    ct, graph, inputs = load_coremltools(), then, None
    if isinstance(then, nn.Module):
        inputs = [ct.TensorType("x", (1, 16, height, 32), np.float16)]
        net = nn.Sequential(nn.Conv2d(16, 16, 1), then).eval()
        graph = torch.jit.trace(net, torch.randn(1, 16, 8, 32), check_trace=False)
    ct.convert(graph, inputs=inputs, outputs=[ct.TensorType("y")], skip_model_load=True,
               convert_to="mlprogram", compute_precision=precision,
               minimum_deployment_target=ct.target.iOS18).save(str(path))
    return Package(path)

def call(function):
    module = nn.Module()
    module.forward = function
    return module

@pytest.fixture(scope="session")
def conv_package(tmp_path_factory):
    return converted(nn.SiLU(), tmp_path_factory.mktemp("conv") / "conv.mlpackage")

LINTED = {
    "E6": nn.RMSNorm(32), "E2": nn.Sequential(nn.SiLU(), nn.Conv2d(16, 16, 1)), "E0": nn.Tanh(),
    "W7": call(lambda x: (x ** 2).sqrt() + 1), "W3": call(lambda x: x.cumsum(3)), "": nn.SiLU(),
}

@pytest.mark.parametrize("rule", LINTED)
def test_lint_finds(rule, tmp_path):
    from coreml.check import lint, load_coremltools
    ct, precision = load_coremltools(), None
    if rule == "E2":                                        # an island of fp32
        precision = ct.transform.FP16ComputePrecision(lambda op: op.op_type != "silu")
    height = ct.RangeDim(4, 64, 8) if rule == "E0" else 8
    found = lint(converted(LINTED[rule], tmp_path / "p.mlpackage", precision, height))
    assert {f.rule[:2] for f in found if f.rule[0] == "E" or f.rule[:2] == rule} == {rule} - {""}

@pytest.mark.slow
@torch.no_grad()
def test_executor_runs_a_block_of_stable_diffusion(tmp_path):
    from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn

    from coreml.check import load_coremltools
    block = UNetMidBlock2DCrossAttn(16, 32, resnet_groups=8, cross_attention_dim=24).eval()
    inputs = torch.randn(1, 16, 8, 8), torch.randn(1, 32), torch.randn(1, 7, 24)
    graph = torch.export.export(block, inputs).run_decompositions({})
    package = converted(graph, tmp_path / "p.mlpackage", load_coremltools().precision.FLOAT32)
    out = package.run(dict(zip(package.inputs, inputs)), half=False)["y"]
    assert (out - block(*inputs)).abs().max() < 1e-4

def test_unknown_op_and_wrong_input_are_named(conv_package, tmp_path):
    from coreml.check import CheckError
    with pytest.raises(CheckError, match="does not know: cumsum"):
        converted(LINTED["W3"], tmp_path / "p.mlpackage").run({"x": torch.zeros(1, 16, 8, 32)})
    with pytest.raises(CheckError, match="wants the input 'x'"):
        conv_package.run({})

@pytest.mark.parametrize("file", ["weights/weight.bin", "model.mlmodel"])
def test_cut_package_is_told_in_one_line(conv_package, tmp_path, file):
    path = shutil.copytree(conv_package.path, tmp_path / "p.mlpackage")
    os.truncate(path / "Data/com.apple.CoreML" / file, 100)
    fails_in_one_line(command("coreml.check", "run", path), "is damaged")

def test_check_compares_with_expected_outputs(conv_package, tmp_path):
    x = np.random.default_rng(0).standard_normal((1, 16, 8, 32), np.float32)
    y = conv_package.run({"x": x})["y"].numpy()
    np.savez(tmp_path / "x.npz", x=x)
    words = ["coreml.check", "run", conv_package.path, "--inputs", tmp_path / "x.npz", "--expect"]
    np.savez(tmp_path / "y.npz", y=y)
    assert "against --expect: fp32" in succeeds(*words, tmp_path / "y.npz")
    np.savez(tmp_path / "y.npz", var_17=y)
    fails_in_one_line(command(*words, tmp_path / "y.npz"), "var_17", "outputs are y")

def test_estimate_counts_flops(conv_package):
    from coreml.check import estimate, op_flops
    assert [op_flops(op) for _, op in estimate(conv_package)] == [2 * 16 * 16 * 8 * 32]

# ---------------------------------------------------------------------------- web/
def by_node(files, expression, given=None):
    """The value of a JavaScript expression of `given`, with web/'s files before it."""
    node = shutil.which("node")
    if not node:
        pytest.skip("there is no node")
    code = [(ROOT / "web" / f).read_text(encoding="utf-8") for f in files]
    code += ["const given = JSON.parse((await import('fs')).readFileSync(0, 'utf8'));",
             f"console.log(JSON.stringify({expression}));"]
    words = [node, "--input-type=module", "--eval", "\n".join(code)]
    done = subprocess.run(words, input=json.dumps(given), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

ODD = ["", "  ", "A Dog.", " two\n\tcats'", "\u00dcn\u00efc\u00f6de \u03a3\u03b1\u03a3 \u0130",
       "\u65e5\u672c \U0001f642\u00a0x\x1c", "a\ufeffb \x85c \u0663 3cats", "x" * 90]

@pytest.mark.parametrize("n", [200, pytest.param(15000, marks=pytest.mark.slow)])
def test_javascript_reads_captions_as_we_do(n):
    from web.export import js_pattern
    vocabulary, source = text.load_vocabulary(), scenes.Scenes(64)
    captions = [*ODD]
    for i in range(n):
        scene, rng = source.scene(i), random.Random(i)
        captions += [scenes.Scenes.caption(scene, rng), wording.wide(scene, rng)]
    given = {"data": vocabulary.data.decode(), "captions": captions}
    for pattern in (text.PATTERN, text.FIRST_PATTERN):
        vocabulary, given["pattern"] = text.load_vocabulary(pattern=pattern), js_pattern(pattern)
        make = "const v = new Vocabulary(given.data, given.pattern);"
        expression = f"(() => {{ {make} return given.captions.map((c) => v.ids(c)); }})()"
        found = by_node(["tokens.js"], expression, given)
        assert found == [vocabulary.ids_of(c) for c in captions]

@pytest.mark.parametrize("n, seed", [(16384, 0), (16384, 2**32 - 1), (16, 2**40 + 3), (27, 5)])
def test_javascript_draws_torchs_noise(n, seed):
    found = by_node(["noise.js"], "Array.from(randn(given.n, given.seed))", {"n": n, "seed": seed})
    ours = sample.latents_noise([seed], (n,), "cpu")[0]
    assert (torch.tensor(found) - ours).abs().max() < 1e-5

def test_javascript_sums_files_as_zlib_does():
    found = by_node(["files.js"], "crc32(new TextEncoder().encode(given))", "a red car")
    assert found == zlib.crc32(b"a red car")

@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory):
    """A tiny few-step network of random weights: (net, autoencoder, folder of its ONNX files)."""
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install onnxscript")
    from web.export import export_parts
    words, unet = text.TextConfig(width=32, layers=1, heads=2), {**TINY, **SHALLOW}
    net, ae = model.TextToLatents(model.UNetConfig(**unet), words), tiny_autoencoder()
    folder = tmp_path_factory.mktemp("onnx")
    rows, failed = export_parts(shaken(net), shaken(ae), folder, 32, {"steps": [1.0, 0.5, 0.0]})
    assert not failed and min(row["parity"] for row in rows.values()) > 60
    return net, ae, folder

@pytest.mark.slow
@torch.no_grad()
def test_onnx_files_draw_pytorchs_pictures(onnx_folder):
    import onnx

    from web.export import OnnxFiles, drawn_alike
    net, ae, folder = onnx_folder
    assert drawn_alike(net, ae, folder, 32, {"steps": 3, "cfg": 1.0, "sampler": "euler"}) > 40
    files, captions = OnnxFiles(net, folder), ["a dog", "three red cars left of a blue house"]
    padded = net.encode(captions)                           # the first has padding, files have none
    x, t = torch.randn(2, 16, 4, 4), torch.full((2,), 0.7)
    wanted = net.denoiser(x, t, padded.emb, padded.mask)
    found = [files(x[i:i + 1], t[:1], *files.encode([c])[:2]) for i, c in enumerate(captions)]
    assert (torch.cat(found) - wanted).abs().max() < 0.01 * wanted.abs().max()
    graph = onnx.load(folder / "unet.onnx").graph
    large = [w for w in graph.initializer if np.prod(w.dims) > 64]
    assert Counter(w.data_type for w in large)[onnx.TensorProto.FLOAT16] > 0.9 * len(large)

@pytest.mark.slow
def test_wrong_onnx_file_is_refused(onnx_folder, tmp_path, monkeypatch):
    import web.export
    net, ae, _ = onnx_folder
    convert = web.export.to_onnx

    def swapped(part, max_tokens):
        part = replace(part, module=copy.deepcopy(part.module))
        w = part.module.decoder[0][1].weight
        w.data[:2] = w.data[[1, 0]]                         # two output channels
        return convert(part, max_tokens)
    parts = web.export.web_parts
    monkeypatch.setattr(web.export, "to_onnx", swapped)
    monkeypatch.setattr(web.export, "web_parts", lambda *args: parts(*args)[2:])
    _, failed = web.export.export_parts(net, ae, tmp_path, 32, {"steps": [1.0, 0.0]})
    assert len(failed) == 1 and "decoder.onnx" in failed[0] and "< 40" in failed[0]

@pytest.mark.parametrize("words, said", [
    ("--ckpt assets/scenes", ["assets/scenes", "few-step"]),
    ("--out assets", ["assets", "no site of ours"]),
    ("--ort LICENSE --out {tmp}/site", ["LICENSE is no archive", "npm pack onnxruntime-web@"]),
])
def test_web_export_refuses_in_one_line(words, said, tmp_path):
    fails_in_one_line(command("web.export", *words.format(tmp=tmp_path).split()), *said)
    assert not (tmp_path / "site").exists()

@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The shipped weights' site, in a folder of a host."""
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install onnxscript")
    from web.export import npm_pack
    folder = tmp_path_factory.mktemp("host")
    try:
        archive = npm_pack(tmp_path_factory.mktemp("npm"))
    except UserError as e:
        pytest.skip(str(e))
    said = succeeds("web.export", "--ort", archive, "--out", folder / "site")
    assert all(float(mb) < 40 for mb in re.findall(r"download by \w+: ([\d.]+) MB", said))
    return folder / "site"

class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

@contextlib.contextmanager
def served(site):
    """The address of a folder's site on a plain static host."""
    handler = functools.partial(QuietHandler, directory=site.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/{site.name}/"
        server.shutdown()

@contextlib.contextmanager
def chromium(**how):
    """A page in headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    names = "chromium", "chromium-browser", "google-chrome"
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_context(**how).new_page()
        page.set_default_timeout(120_000)
        yield page
        browser.close()

def typed(page, prompt, steps=4):
    """Types a prompt into the page as a person would; what then draws is Enter."""
    page.wait_for_selector("#examples button")
    page.locator(f"#steps label:has-text('{steps}')").click()
    page.locator("#prompt").press_sequentially(prompt)

def error_line(page):
    page.wait_for_selector("#error:not([hidden])")
    return page.inner_text("#error")

def canvas_picture(page):
    page.wait_for_selector("canvas[data-done]")
    page.wait_for_function("!document.querySelector('[aria-disabled]')")
    read = "c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
    pixels = page.eval_on_selector("canvas", read)
    side = round(np.sqrt(len(pixels) / 4))
    return torch.tensor(pixels).view(side, side, 4)[:, :, :3]

@pytest.mark.slow
def test_browser_draws_pytorchs_picture_and_keeps_it(site):
    from web.export import decibels
    prompt = "a purple teapot under a yellow robot"
    net, config = model.load_model("assets/fast")
    ae, how = decoder.load_autoencoder(), sample.sampling(config)
    wanted = torch.tensor(sample.generate(net, ae, [prompt], [7], 256, **how)[0])
    with served(site) as address, chromium() as page:
        page.goto(address)
        page.wait_for_selector("#examples button")
        page.fill("#seed", "7")
        typed(page, prompt)
        page.keyboard.press("Enter")
        assert decibels(canvas_picture(page), wanted) > 45
        assert "threads" in page.inner_text("#status") or os.cpu_count() == 1
        page.context.set_offline(True)                      # all is kept, the link says the rest
        page.reload()
        assert decibels(canvas_picture(page), wanted) > 45
        assert page.input_value("#prompt") == prompt and page.input_value("#seed") == "7"

@pytest.mark.slow
def test_two_clicks_draw_once_and_one_thread_will_do(site):
    count = """const post = Worker.prototype.postMessage; self.asked = 0;
        Worker.prototype.postMessage = function (message) {
            self.asked += Boolean(message.seeds); return post.call(this, message); }"""
    with served(site) as address, chromium(service_workers="block") as page:
        page.add_init_script(count)
        page.goto(address)
        typed(page, "a red car", steps=1)
        page.dblclick("#draw")
        page.press("#prompt", "Enter")
        first = canvas_picture(page)
        assert page.evaluate("asked") == 1 and "one thread" in page.inner_text("#status")
        page.click("#dice")                                 # another seed: it draws again
        page.wait_for_function("asked === 2")
        assert not torch.equal(canvas_picture(page), first)

@pytest.mark.slow
@pytest.mark.parametrize("broken, words", [
    ("long", ["tokens", "reads 64", "shorten"]), ("unet.onnx", ["unet.onnx", "damaged"]),
    ("decoder.onnx", ["decoder.onnx", "100 bytes"]),
    ("manifest.json", ["manifest.json", "missing"]), ("text.onnx", ["text.onnx", "missing", "404"]),
    ("file", ["python -m http.server"]),
    ("WebAssembly", ["WebAssembly is switched off"]), ("noise.js", ["scripts did not load"])])
def test_page_says_in_one_line_what_is_wrong(site, tmp_path, broken, words):
    copied = shutil.copytree(site, tmp_path / "site")
    if broken == "unet.onnx":
        data = bytearray((copied / broken).read_bytes())
        data[len(data) // 2] ^= 1
        (copied / broken).write_bytes(data)
    elif broken == "decoder.onnx":
        os.truncate(copied / broken, 100)
    elif (copied / broken).exists():
        (copied / broken).unlink()
    with served(copied) as address, chromium() as page:
        if broken == "WebAssembly":
            page.add_init_script("delete globalThis.WebAssembly")
        page.goto((copied / "index.html").as_uri() if broken == "file" else address)
        if broken.endswith("onnx") or broken == "long":
            typed(page, "dog cat " * 40 if broken == "long" else "a dog")
            page.keyboard.press("Enter")
        said = error_line(page)
    assert all(word in said for word in words) and len(said) < 200, said

# ---------------------------------------------------------------------------- lab/
@pytest.mark.slow
@pytest.mark.parametrize("part, name, millions, teraflops", [
    ("DENOISERS", "sdxl", 2567.46, 6.761), ("DENOISERS", "sana", 591.75, 1.121),
    ("DECODERS", "taesd3", 1.23, 0.566), ("DECODERS", "sd3", 49.55, 10.472)])
def test_peers_cost_what_their_sheets_say(part, name, millions, teraflops):
    from lab import peers
    found = getattr(peers, part)[name].work(1024)
    assert found["params"] / 1e6 == pytest.approx(millions, abs=0.005)
    assert found["flops"] / 1e12 == pytest.approx(teraflops, abs=6e-4)

def test_floor_counts_work_and_memory():
    from lab import bench
    tiny = model.UNetConfig(**TINY)
    work, least = bench.training_floor(tiny, 256, 16, 64)
    assert work == pytest.approx(3 * 64 * costs.forward_flops(tiny, 256, 16) / 989e12)
    assert work / least < 0.3                                       # narrow: memory decides
    slower = bench.training_floor(tiny, 256, 16, 64, costs.card_of("NVIDIA H100 80GB HBM3"))
    assert slower[0] == work and slower[1] > 1.2 * least

@pytest.mark.slow
def test_measurement_writes_its_json_and_page(tmp_path, monkeypatch):
    from lab import peers, tables
    ours = replace(peers.DENOISERS["ours"], make=lambda: tiny_unet(context_dim=2304))
    monkeypatch.setitem(peers.DENOISERS, "ours", ours)
    said = succeeds("lab.bench", "unet", "--nets", "ours", "--size", 64, "--out", tmp_path)
    [row] = json.loads((tmp_path / "bench_unet.json").read_text())["rows"]
    assert row["net"] == "ours" and min(row["s"], row["share"], row["flops"]) > 0
    assert tables.TABLES["bench_unet"](tmp_path) in said

def test_steps_are_timed_beside_their_plan(tmp_path):
    job = "configs/nano.toml batch=2 data.size=32 model.widths=[32,64] text.init= text.layers=1"
    said = succeeds("lab.steps", "step", "--jobs", job, "--forms", "eager", "--rounds", 1,
                    "--device", "cpu", "--out", tmp_path)
    [row] = json.loads((tmp_path / "bench_step.json").read_text())["rows"]
    assert row["s"] > 0 < row["mfu"] < 1 and row["planned"] > 0 and "measured now" in said

@pytest.mark.parametrize("words, said", [
    (["lab.bench", "unet", "--size", "100"], "--size"), (["lab.figures", "step"], "no figure"),
    (["lab.grids", "ablation", "--rows", "z"], "rows of ablation"),
    (["lab.benchmarks", "geneval", "README.md", "--out", "x"], "evaluation_metadata.jsonl"),
    (["lab.benchmarks", "dpg", "docs", "--out", "x"], "no prompts")])
def test_lab_says_what_is_wrong(words, said):
    fails_in_one_line(command(*words), said)

def test_pages_have_the_tables_of_the_results():
    from lab import tables
    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        assert tables.fill_tables(text) == text and "<!-- end -->" in text, page

def test_named_run_is_taken_and_two_claims_fail(tmp_path):
    from lab import tables
    for name, ckpt in (("a", "assets/x"), ("b", "assets/y")):
        (tmp_path / name).mkdir()
        found = {"ckpt": ckpt, "steps": 4, "name": name}
        (tmp_path / name / "score.json").write_text(json.dumps(found))
    assert [run["name"] for run in tables.runs_of(tmp_path, "assets/x").values()] == ["a"]
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    with pytest.raises(UserError, match="a and .*c both score assets/x in 4 steps"):
        tables.runs_of(tmp_path, "assets/x")

def scored_run(*shares):
    """What is compared of a score.json; each category has the same rights."""
    return {"ckpt": "x", "rights": dict.fromkeys(scenes.CATEGORIES, list(shares)), "nouns": 12,
            "prompts": len(shares), "wording": "own", "layout": "slots"}

def test_two_models_are_compared_over_prompts():
    from lab import tables
    paired, seen = tables.paired, [scored_run(1, 0.5, 0, 0.5), scored_run(1, 1, 1, 0.5)]
    found = paired([scored_run(1, 0.5, 1, 0.5)], seen)          # 3/4 beside (1/2 + 7/8) / 2
    assert [found["difference"], found["ratio"]] == pytest.approx([3 / 4 - 11 / 16, 12 / 11])
    assert list(paired(seen[:1], seen[:1]).values()) == [0, 0, 0, 1, 1, 1]
    shares = np.random.default_rng(0).integers(0, 8, 40) / 10
    gain = paired([scored_run(*shares + 0.1)], [scored_run(*shares)])
    assert [gain["low"], gain["high"]] == pytest.approx([0.1, 0.1]) and gain["ratio_low"] > 1.1
    low, high = (scored_run(*[share] * 4) for share in (0.2, 0.8))
    runs = paired([low, high], [high | {"each": 9}])            # no prompt differs, but a run does
    assert [runs["low"], runs["high"]] == pytest.approx([-0.6, 0])
    for change in {"nouns": 80}, {"wording": "wide"}, {"layout": "free"}, {"prompts": 3}:
        with pytest.raises(UserError, match=f"same prompts: {list(change)[0]} is "):
            paired([low], [high | change])

def test_cells_have_paired_intervals_where_there_are_rights(tmp_path):
    from lab import tables
    found = tables.read_result(tables.RESULTS, "ablation")
    found["rows"] = {row: found["rows"][row] | scored_run(1, share)
                     for row, share in (("a", 1), ("c1", 0.5))}
    (tmp_path / "ablation.json").write_text(json.dumps(found))
    assert "high resolution, separable convolutions |" in tables.ablation(tmp_path)     # b and c1
    assert "| -0.250 (" in tables.ablation(tmp_path)
    for name, share in ("base28", 1), ("base4", 0), ("fast4", 0.5):
        run = tables.read_result(tables.RESULTS / name, "score")
        run |= scored_run(1, share) | {"ckpt": run["ckpt"]}
        (tmp_path / name).mkdir()
        (tmp_path / name / "score.json").write_text(json.dumps(run))
    assert "| 0.750 (" in tables.few_steps(tmp_path)
    assert tables.paired_text([{}], [scored_run(1)], tables.RATIO) == ""    # of older files

def test_each_row_of_the_ladder_is_one_change_at_a_small_width():
    from lab import grids, tables
    cfg = common.read_config(train.TrainConfig(), ["--config", "configs/ablation.toml"])
    rows, costs_seen = [grids.at_small_width(row, cfg.model) for row in model.LADDER], set()
    for change, above, small in zip(list(model.LADDER.values())[1:], rows, rows[1:]):
        assert {key for key, v in asdict(small).items() if v != getattr(above, key)} == set(change)
        with torch.device("meta"):
            costs_seen.add(model.count_params(model.UNet(small)))
    assert len(costs_seen) == len(rows) - 1 and list(tables.ABLATION) == list(model.LADDER)

def test_grid_rows_go_on_where_they_stopped(tmp_path):
    from lab import grids
    (tmp_path / "a").mkdir()
    (tmp_path / "a/score.json").write_text("{}")
    never, fails, says = ([sys.executable, "-c", code] for code in (
        "raise SystemExit(9)", "raise SystemExit(3)", "print('first')"))
    with pytest.raises(UserError, match="row b ended with status 3"):
        grids.run_rows({"a": [never], "b": [says, fails]}, tmp_path, 2)
    grids.run_rows({"a": [never], "b": [says]}, tmp_path, 2)
    assert (tmp_path / "b.txt").read_text().split() == ["first", "first"]
    common.write_log(tmp_path / "a/log.csv", [{"step": 7, "val": 1}])       # finished, but of old
    said = command("lab.grids", "ablation", f"out={tmp_path}", "--rows", "a")
    fails_in_one_line(said, "7 steps, not for 1200: delete it")

def test_distillation_grid_compares_at_equal_time(pipeline, tmp_path, monkeypatch, capsys):
    from lab import grids
    ran, seconds = {}, {"both, no data": 2, "the teacher": 3}

    def run_rows(commands, base, jobs):
        ran.update(commands)
        for name in commands:
            mean = 0.5 if name == "alone_0" else 0.75
            score = {"scores": {"mean": {"score": mean}}, "prompts": 1, "wording": 0, "nouns": 0,
                     "layout": 0, "rights": dict.fromkeys(scenes.CATEGORIES, [mean])}
            (base / name).mkdir(parents=True)
            (base / name / "score.json").write_text(json.dumps(score))
            common.write_log(base / name / "log.csv", [{"step": 4, "val": 1}])

    monkeypatch.setattr(grids, "run_rows", run_rows)
    monkeypatch.setattr(grids, "in_turns", lambda steps, *_: {
        row: step() or seconds.get(row, 1) for row, step in steps.items()})
    words = [*pipeline.command("distill")[1:], f"out={tmp_path}/kd", f"--out={tmp_path}"]
    grids.main(["distillation", *words, "batch=2", "--seeds=1"])
    assert "steps=8" in ran["alone_as_long_as_the_slowest_0"][0]
    told = {str([word for word in words if "out" not in word]) for words, *_ in ran.values()}
    assert len(told) == len(ran) == 9
    said = capsys.readouterr().out
    gain = "1.000 | 0.750 | **0.750** | +0.250 (+0.250 to +0.250) | +0.000 (+0.000 to +0.000) |"
    assert f"| both, no data | 4 of 2 | 2.00 (2.00 x) | 0.1 | {gain}" in said
    assert "| the teacher | 4 of 4 | 3.00 (3.00 x) | 0.2 | " in said and said.count(gain) == 6

def test_adversarial_grid_gives_all_rows_equal_steps(pipeline, tmp_path, monkeypatch, capsys):
    from lab import grids
    ran = {}

    def run_rows(commands, base, jobs):
        ran.update(commands)
        for name in commands:
            mean = 0.5 + 0.25 * name.startswith("KD_GAN_0")
            score = scored_run(mean, mean) | {"fd": 2.5, "precision": 0.5, "recall": 0.5}
            score["scores"] = {"mean": {"score": mean, "low": 0, "high": 1}}
            for folder in base / name, base / name / "in_1":
                folder.mkdir(parents=True)
                (folder / "score.json").write_text(json.dumps(score))
            common.write_log(base / name / "log.csv", [{"step": 4, "val": 1, "pull_ratio": 0.7}])

    monkeypatch.setattr(grids, "run_rows", run_rows)
    words = [*pipeline.command("gan")[1:], f"out={tmp_path}/adv", f"--out={tmp_path}"]
    words = [word for word in words if "method=" not in word]
    grids.main(["adversarial", *words, "generator_every=2", "steps=8", "--seeds=1"])
    for row, steps, every in ("KD_alone_0", "4", "1"), ("KD_DMD_0", "8", "2"):
        keys = dict(word.partition("=")[::2] for word in ran[row][0])
        assert (keys["steps"], keys["generator_every"]) == (steps, every)
        assert ran[row][-1][-2:] == ["--fd", "2000"]            # the last: then the row is done
    said = capsys.readouterr().out
    gain = "+0.250 (+0.250 to +0.250) |"
    assert f"| 1 | 0.750 (0.000 - 1.000) | {gain} 2.500 | 0.50 | 0.50 | 0.750 | {gain}" in said
    assert said.count("| 0.70 |") == len(ran) - 1 == len(grids.ADV_ROWS) + 1    # not "before"

@pytest.mark.slow
def test_benchmark_folders_are_as_their_readers_walk_them(tmp_path):
    """By the loops of GenEval's evaluate_images.py and DPG-Bench's compute_dpg_bench.py."""
    (tmp_path / "meta.jsonl").write_text('{"tag": "single", "prompt": "a photo of a bench"}\n')
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/drawtext_7.txt").write_text("a red car\n")
    for name, source in (("geneval", "meta.jsonl"), ("dpg", "prompts")):
        succeeds("lab.benchmarks", name, tmp_path / source, "--out", tmp_path / name)
    place = tmp_path / "geneval/00000"
    assert json.loads((place / "metadata.jsonl").read_text())["tag"] == "single"
    assert sorted(os.listdir(place / "samples")) == [f"{i:05d}.png" for i in range(4)]
    assert Image.open(tmp_path / "dpg/drawtext_7.png").size == (512, 512)

@pytest.mark.slow
def test_browser_counts_the_votes_of_a_blind_page(tmp_path):
    from lab import compare
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here: apt-get install chromium")
    black, white = ([np.full((8, 8, 3), k, np.uint8)] * 6 for k in (0, 255))
    page = tmp_path / "compare.html"
    page.write_text(compare.comparison_page(("A", "B"), list("abcdef"), black, white) + """<script>
        for (const p of DATA.pairs) {       // a visitor who prefers the first one's looks
            const side = p.flip ? "right" : "left";
            document.querySelector(`[data-question=aesthetics][data-side=${side}]`).click();
            byId("next").click();
        }
        byId("end").click();
    </script>""")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
             f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    said = subprocess.run(words, capture_output=True, text=True, timeout=120).stdout
    assert "aesthetics</td><td>6</td><td>0</td><td>0</td><td>61 % - 100 %</td>" in said

# ------------------------------------------------------------- lab/pieces.py, lab/*.sh
def test_pieces_join_to_checkpoints_and_the_best_is_kept(pipeline, tmp_path, monkeypatch):
    from lab import pieces
    runs = [shutil.copytree(pipeline(stage), tmp_path / stage) for stage in ("train", "dmd", "gan")]
    shutil.rmtree(runs[0] / "final")                                # as of a run that was cut
    out, packed = tmp_path / "o u t", {}
    out.mkdir()
    monkeypatch.setattr(pieces, "PIECE", 2**15)
    pieces.pack_news(out, runs, False, packed)
    assert max(file.stat().st_size for file in out.iterdir()) == 2**15
    for run in runs:
        data = b"".join(file.read_bytes() for file in sorted(out.glob(f"{run.name}.tar.*")))
        tarfile.open(fileobj=io.BytesIO(data)).extractall(tmp_path / "joined", filter="data")
        net, config = model.load_model(tmp_path / "joined" / run.name)
        wanted = model.load_model(run)[0].half().float().state_dict()
        assert same_tensors(net.state_dict(), wanted) and config["step"] == 4
    for scores, kept in (((), "dmd"), ((0.25, 0.5), "gan"), ((0.25, 0.25), "dmd")):
        for run, mean in zip(runs[1:], scores):
            (run / "own").mkdir(exist_ok=True)
            about = {"scores": {"mean": {"score": mean}}}
            (run / "own/score.json").write_text(json.dumps(about))
        pieces.pack_news(out, runs, True, packed)
        assert {file.name.split(".")[0] for file in out.iterdir()} == {"logs", "train", kept}

@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the scripts are for Linux")
@pytest.mark.parametrize("name, lines", [
    ("flagship", ["base: step 6 of 6,", "dmd: step 6 of 6", "kd: step 6 of 6",
                  "left out: the score of kd, own words", r"dmd, own words: 0\.\d+ \(0"]),
    ("gpu_check", ["tests: done", "skipped", "step: done", "'batch': 2", "profile: done",
                   "kernels a step", "big_eager: done"])])
def test_scripts_in_their_tiny_form(name, lines, tmp_path):
    env = {"SIZE": "tiny", "WORK": str(tmp_path / "w o r k"), "STUDENTS": "dmd kd", "SCORED": "dmd",
           "WORDINGS": "own", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    words = ["bash", ROOT / f"lab/{name}.sh", tmp_path / "o u t", "1800"]   # ends when it is done
    done = subprocess.run(words, env=os.environ | env, capture_output=True, text=True, timeout=2000)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in lines:
        assert re.search(line, done.stdout), done.stdout
    if name == "flagship":
        subprocess.run("cat 'o u t/dmd.tar.'* | tar x", shell=True, check=True, cwd=tmp_path)
        words = ["--ckpt", tmp_path / "dmd", "--device", "cpu", "-o", tmp_path / "car.png"]
        assert "4 steps at" in succeeds("sample.py", "a red car", *words)

# ------------------------------------------------------------- lab/plan.py, lab/dreamlite.py
@pytest.mark.slow
@pytest.mark.parametrize("name, params, batch, tokens", [
    ("imagenet256", 371.64, 1024, 77), ("t2i_256", 379.11, 8192, 333),
    ("t2i_512", 379.11, 4096, 333), ("t2i_1024", 379.11, 2048, 333)])
def test_the_papers_recipes_are_planned(name, params, batch, tokens, capsys):
    from lab import plan
    gpus, file = 8 if name == "imagenet256" else 64, f"configs/{name}.toml"
    found = plan.make_plan(["--config", file, f"gpus={gpus}", "mfu=0.3"])
    cfg = common.read_config(train.TrainConfig(), ["--config", file])
    assert model.count_params(found["parts"]["network"][0]) / 1e6 == pytest.approx(params, abs=0.01)
    assert f"a step: {batch} pictures of" in capsys.readouterr().out and found["fits"]
    assert found["flops"] == 6 * model.count_macs(cfg.model, cfg.data.size // 8, tokens)
    seconds = cfg.steps * batch * found["flops"] / (gpus * 0.3 * 989e12)
    assert found["days"] == pytest.approx(seconds / 86400)

@pytest.mark.slow
def test_a_distillation_is_planned_with_its_teacher():
    from lab import plan
    found = plan.make_plan(["--config", "configs/kd_sd35.toml", "batch=1", "gpu_gb=20"])
    assert found["parts"]["teacher"][1]["weights"] == 2 * 8_056_627_520 and not found["fits"]

@pytest.mark.slow
def test_a_step_distillation_is_planned_with_all_players(tmp_path):
    from lab import plan
    net = tiny_model()
    save_model(tmp_path / "init", net)
    found = plan.make_plan([f"init={tmp_path / 'init'}", "teacher=", "method=both", "batch=2",
                            "critic_taps=[\"mid\"]"])
    params = {name: model.count_params(part) for name, (part, _) in found["parts"].items()}
    assert list(params) == ["generator", "teacher", "critic", "fake"]
    assert params["generator"] == params["fake"] == model.count_params(net)

def test_dreamlite_equals_diffusers(tmp_path):
    from diffusers import DreamLiteUNetModel

    from lab import dreamlite
    torch.manual_seed(0)
    theirs = shaken(DreamLiteUNetModel(
        block_out_channels=(16, 32, 64), attention_head_dim=(2, 4, 8), cross_attention_dim=24,
        transformer_layers_per_block=(1, 2, 4), norm_num_groups=8, ff_mult=3, num_kv_heads=2,
        use_linear_projection=True, encoder_hid_dim=20, encoder_hid_dim_type="text_proj_rms",
        addition_embed_type="time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16))
    theirs.save_pretrained(tmp_path / "unet")
    ours = dreamlite.load_dreamlite(tmp_path)
    x, t, states = torch.randn(2, 4, 8, 16), torch.tensor([0.1, 0.9]), torch.randn(2, 7, 20)
    mask, size = torch.arange(7) < torch.tensor([[7], [4]]), torch.tensor([[64, 64], [96, 40]])
    expected = theirs(x, 1000 * t, states, encoder_attention_mask=mask.float(),
                      added_cond_kwargs={"time_ids": size}).sample
    assert torch.allclose(ours(x, t, states, mask, size=size), expected, atol=1e-5)
# ---------------------------------------------------------------------------- commands
@pytest.mark.parametrize("words, said", [
    ("train.py model.widhts=[32]", ["'model.widhts'", "did you mean model.widths"]),
    ("train.py lr=fast", ["'lr'", "float", "fast"]),
    ("train.py --config configs/no.toml", ["no config file", "configs/nano.toml"]),
    ("train.py steps=0", ["'steps'", "1 or more"]),
    ("train.py lr=nan", ["'lr'", "finite"]),
    ("train.py drop_caption=1.5", ["'drop_caption'", "1 or less"]),
    ("train.py amp=bf16", ["'amp'", "bfloat16, float32"]),
    ("train.py model.head_dim=48", ["widths", "multiples of 96"]),
    ("train.py batch=9 data.pictures=8 val_pictures=1 device=cpu data.cache={tmp} out={tmp}",
     ["8 pictures", "add batch=2"]),
    ("train.py --cache data.folder={tmp}/none", ["no folder"]),
    ("distill.py teacher=runs/nowhere device=cpu out={tmp}", ["no teacher at 'runs/nowhere'"]),
    ("distill.py teacher=assets/scenes device=cpu out={tmp}", ["draws 256 px", "data.size=64"]),
    ("adv_distill.py init=assets/scenes device=cpu out={tmp}", ["draws 256 px", "data.size=64"]),
    ("sample.py dog --size 50", ["multiples of 32"]),
    ("sample.py dog --device gpu", ["unknown device 'gpu'"]),
    ("sample.py dog -o no/dir/x.png", ["no/dir", "does not exist"]),
    ("sample.py dog --coreml assets/scenes", ["assets/scenes"]),
], ids=lambda x: x[:40].split(" {")[0] if isinstance(x, str) else "")
def test_bad_input_gets_one_clear_line(words, said, tmp_path):
    fails_in_one_line(command(*words.format(tmp=tmp_path).split()), *said)

def test_files_say_how_they_were_drawn(tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa red car\n\n  two \"dogs\"\n", "utf-8")
    tiny = ["--steps", 1, "--size", 64, "--device", "cpu"]
    said = succeeds("sample.py", "--prompts", tmp_path / "prompts.txt", "-n", 2, *tiny,
                    "--seed", 7, "--out-dir", tmp_path / "new/dir", "-o", "car.png")
    assert "car_0.png .. car_3.png: 4 pictures" in said
    file = tmp_path / "new/dir/car_3.png"
    line = succeeds("sample.py", "--info", file).splitlines()[0]
    assert line.startswith("python sample.py 'two \"dogs\"' ") and "--seed 8 -n 1" in line
    succeeds(*shlex.split(line)[1:], "--device", "cpu", "-o", tmp_path / "again.png")
    again = np.asarray(Image.open(tmp_path / "again.png"))
    assert np.array_equal(again, np.asarray(Image.open(file)))
    draw = sample.load(device="cpu")            # and in Python
    assert np.array_equal(again, draw('two "dogs"', seed=8, steps=1, size=64))
    fails_in_one_line(command("sample.py", "--info", ROOT / "docs/nano.png"), "does not say how")
    fails_in_one_line(command("sample.py", "--prompts", tmp_path), "a prompt a line")

def test_the_first_commands_of_the_readme_draw(tmp_path):
    words = ["--device", "cpu", "-o", tmp_path / "out.png"]
    said = succeeds("sample.py", "a red car", *words)
    assert "1 pictures of 256x256" in said and "(euler, guidance 1, 4 steps at" in said
    assert "not among" not in said
    assert np.asarray(Image.open(tmp_path / "out.png")).std() > 10
    said = succeeds("sample.py", "a dog", "a cat", "-n", 2, "--base", "--steps", 2, *words)
    assert "4 pictures of 256x256" in said and "(dpmpp, guidance 4, 2 steps at" in said

# ---------------------------------------------------------------------------- faults
# Each kind of lab.fuzz (lab/faults.py) has a quick test here or above, and two drawn inputs below.
@pytest.fixture(scope="session")
def fuzz_home(pipeline, tmp_path_factory):
    from lab import fuzz
    with fuzz.quicker():
        yield fuzz.Home(tmp_path_factory.mktemp("fuzz"), pipeline)

@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 19))
def test_drawn_input_of_each_kind_is_answered_well(number, fuzz_home, tmp_path):
    from lab import fuzz
    for seed in ("a", "b"):
        case, verdict, last = fuzz.ask(number, seed, fuzz_home, tmp_path / seed)
        assert verdict == "well", (case.words, last)

@pytest.mark.parametrize("words, said", [
    ("model.widths=[33,65]", "multiples of"), ("model.depth_down=[1]", "one entry per stage"),
    ("model.act=softmax", "one of silu"), ("text.heads=5", "no multiple of"),
    ("text.vocabulary=9", "another model's"), ("text.max_tokens=0", "2 or more"),
    ("data.size=0", "8 or more"), ("data.pictures=0", "1 or more"), ("flow.shift=0", "more than 0"),
    ("arch=mmdit mmdit.patch=3", "multiples of 24"), ("data.size=72", "multiples of 16"),
    ("arch=mmdit mmdit.position_max=2", "up to 32"),
    ("seed=99999999999999999999", "or less"), ("steps=1000000000000", "1000000000 or less"),
    ("val_pictures=100000000000", "100000 or less"), ("model.depth_mid=1000000", "100 or less"),
    ("text.kind=clip-l text.width=768 model.context_dim=768", "cache of your own pictures"),
    ("out=", "'out' must not be empty"), ("data.cache=", "'data.cache' must not be empty"),
    ("ae=my/ae", "no checkpoint at my/ae"), ("init=my/run", "no checkpoint at my/run"),
    ("data.folder=a\u0000b", "cannot be printed"),
])
def test_a_config_is_checked_where_it_is_read(words, said, tmp_path):
    where = [f"out={tmp_path}/run", f"data.cache={tmp_path}/cache"]
    fails_in_one_line(command("train.py", *TINY_RUN, *where, *words.split()), said)
    assert not list(tmp_path.iterdir())

def test_a_mistyped_path_asks_no_hub(tmp_path, monkeypatch):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name))
    with pytest.raises(UserError, match="hf:OWNER/NAME"):
        decoder.load_autoencoder("my/ae")
    with pytest.raises(UserError, match="no teacher at 'my/teacher'.*hf:OWNER/NAME"):
        distill.find_teacher("my/teacher")
    with pytest.raises(UserError, match="not whole at my/encoders/text_encoder"):
        text.load_encoders(text.TextConfig("clip-l", folder="my/encoders"), "cpu")
    assert not asked
    with pytest.raises(UserError, match="the hub does not give my/ae"):
        decoder.load_autoencoder("hf:my/ae")
    assert asked == ["my/ae"] and distill.find_teacher("hf:a/b") == ("hub", "hf:a/b")

@pytest.mark.parametrize("spoil", [
    "optimizer keys", "optimizer shape", "optimizer kind", "ema nan", "model kind"])
def test_a_state_of_another_form_is_refused(spoil, pipeline, tmp_path):
    out = shutil.copytree(pipeline("train"), tmp_path / "run")
    part, way = spoil.split()
    file = out / f"checkpoint/{part}.safetensors"
    state = safetensors.torch.load_file(file)
    key = next(k for k, x in state.items() if x.ndim == 2)
    x = state.pop(key)
    changed = {"keys": {key + "x": x}, "shape": {key: x[:-1].clone()}, "nan": {key: x * np.nan},
               "kind": {key: x.int()}}[way]
    safetensors.torch.save_file(state | changed, file)
    config = json.loads((out / "checkpoint/config.json").read_text())
    config["crc32"][file.name] = checkpoint.crc32(file)         # the file is whole
    (out / "checkpoint/config.json").write_text(json.dumps(config))
    fails_in_one_line(command(*pipeline.command("train"), "steps=5", f"out={out}"), str(out))

@pytest.mark.parametrize("path, value", [
    (("data", "size"), "x"), (("flow",), []), (("flow", "shift"), 0), (("few_steps",), 5),
    (("few_steps", "steps"), -1), (("step",), "x"), (("model", "widths"), None), (("text",), None),
    (("crc32",), 5), (("model", "act"), "softmax"),
])
def test_a_description_of_another_form_is_one_line(path, value, pipeline, tmp_path):
    out = shutil.copytree(pipeline("gan") / "final", tmp_path / "final")
    config = inner = json.loads((out / "config.json").read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="final"):
        model.load_model(out)

def test_what_is_not_finite_is_neither_drawn_nor_finished(pipeline, tmp_path):
    words = [*pipeline.command("train"), "steps=1", "warmup=1", f"out={tmp_path / 'run'}"]
    fails_in_one_line(command(*words, "lr=1e8", "samples=1"), "not finite")
    assert not (tmp_path / "run/final").exists()
    net = tiny_model()
    with torch.no_grad():
        net.unet.conv_out.weight.fill_(3e38)                    # finite, but what it gives is not
    with pytest.raises(UserError, match="draws is not finite"):
        sample.generate(net, None, ["a dog"], [0], 32, 1)

@pytest.mark.parametrize("how", ["cut", "other tensors", "no file of tensors"])
def test_a_damaged_cache_of_scenes_is_made_again(how, pipeline, tmp_path):
    cfg = scenes_config(pipeline, tmp_path)
    words = copy.deepcopy(data.wordings(cfg, 32, text.load_vocabulary()))
    file = next(tmp_path.glob("words-*.safetensors"))
    whole = file.read_bytes()
    file.unlink()                                               # it is mapped
    if how == "other tensors":
        safetensors.torch.save_file({"ids": torch.zeros(5)}, file)
    else:
        file.write_bytes(whole[:99] if how == "cut" else b"[]")
    assert same_tensors(data.wordings(cfg, 32, text.load_vocabulary()), words)
    assert file.read_bytes() == whole and list(tmp_path.iterdir()) == [file]

def test_what_the_web_and_other_systems_make_is_found(tmp_path):
    """Names of a Mac (NFD), of Windows (backslashes), absolute ones; links; joined tars."""
    folder, there = tmp_path / "pictures", tmp_path / "elsewhere"
    for name in (there / "l.png", folder / "a\u0308.png", folder / "sub/w.png", folder / "a.png"):
        name.parent.mkdir(exist_ok=True, parents=True)
        name.write_bytes(encoded(two_halves()))
    (folder / "linked").symlink_to(there)
    (folder / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(folder / "nowhere")
    (folder / "notes.md").write_text("x")
    rows = [("\u00e4.png", "mac"), ("sub\\w.png", "windows"),
            (str(folder / "a.png"), "absolute"), ("linked/l.png", "linked")]
    lines = [json.dumps({"file": name, "caption": words}) for name, words in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    joined = b""
    for k in range(2):
        (there / "t.txt").write_text(f"tar {k}")
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            tar.add(there / "l.png", f"{k}.png")
            tar.add(there / "t.txt", f"{k}.txt")
        joined += (tmp_path / "t.tar").read_bytes()
    (folder / "joined.tar").write_bytes(joined)
    found = read_folder(folder)
    assert found == {
        "\u00e4.png": "mac", "sub/w.png": "windows", "a.png": "absolute", "linked/l.png": "linked",
        "linked/t.txt": "no picture", "joined.tar/0.png": "tar 0", "joined.tar/1.png": "tar 1",
        "gone.png": "no file", "notes.md": "another format"}

def test_one_bad_file_stops_no_cache(tmp_path):
    """Members that claim too much, deep JSON, half a character, a sparse file, nonsense as EXIF."""
    sparse, header = tmp_path / "sparse.png", tarfile.TarInfo("x.png")
    sparse.touch()
    os.truncate(sparse, 2**40)
    header.size = 2**62
    (tmp_path / "huge.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    (tmp_path / "cut.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT)[:100])
    nonsense = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x09" + bytes(range(40))
    for name, kind, words in (("deep", "json", "[" * 100000), ("number", "json", '{"caption": 5}'),
                              ("half", "json", '{"caption": "\\ud800"}'), ("good", "txt", "a dog")):
        (tmp_path / f"{name}.png").write_bytes(encoded(two_halves(), exif=nonsense))
        (tmp_path / f"{name}.{kind}").write_text(words)
    found = read_folder(tmp_path)
    no = dict.fromkeys(("deep.png", "number.png", "half.png"), "no caption")
    assert found == {**no, "good.png": "a dog", "sparse.png": "no caption", "cut.tar": "broken",
                     "huge.tar": "broken", "huge.tar/x.png": "no caption"}
    assert len(pictures.listing_key(pictures.find_pictures(tmp_path))) == 16

def test_a_scan_of_182_megapixels_is_read(tmp_path):
    Image.new("L", (14000, 13000), 90).save(tmp_path / "a.jpg", quality=30)
    picture = pictures.to_bucket((tmp_path / "a.jpg").read_bytes(), PICTURES)
    assert picture.shape == (64, 64, 3) and np.abs(picture.astype(int) - 90).max() < 3

def test_an_edit_of_any_byte_makes_another_cache(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(encoded(two_halves()) + bytes(9000))
    keys = [pictures.listing_key(pictures.find_pictures(tmp_path))]
    whole = image.read_bytes()
    image.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])     # far from the end
    keys.append(pictures.listing_key(pictures.find_pictures(tmp_path)))
    assert keys[0] != keys[1]

def test_a_cache_knows_its_encoders_by_their_weights(pipeline, own, sd3_folder, tmp_path):
    folder = shutil.copytree(sd3_folder, tmp_path / "encoders")
    words = ["text.kind=clip-l", "text.width=16", "model.context_dim=16"]
    cfg = own_config(pipeline, own[0], tmp_path / "cache", *words, f"text.folder={folder}")
    cache.make_cache(cfg)
    cfg.text.folder = str(folder.rename(tmp_path / "moved"))
    cache.make_cache(cfg)                                       # the same weights elsewhere
    file = tmp_path / "moved/text_encoder/model.safetensors"
    state = safetensors.torch.load_file(file)
    name = next(k for k, x in state.items() if x.ndim == 2)
    state[name] += 0.1
    safetensors.torch.save_file(state, file, {"format": "pt"})  # under the old name, as large
    with pytest.raises(UserError, match="text.folder's weights"):
        opened(cfg)
    shutil.rmtree(tmp_path / "moved")                           # training needs no encoder
    assert len(opened(cfg)[0]) > 0

@pytest.mark.parametrize("words", [
    "train.py data.workers=1000 data.pictures=100000", "checker.py workers=1000"])
def test_no_more_processes_than_cores(words, pipeline, tmp_path, monkeypatch):
    def loader(*_, num_workers, **__):
        raise UserError(f"{num_workers} of {os.cpu_count()}")
    monkeypatch.setattr(torch.utils.data, "DataLoader", loader)
    script, *more = words.split()
    tiny = pipeline.command("train")[1:] if script == "train.py" else ["device=cpu"]
    said = f"{os.cpu_count()} of {os.cpu_count()}"
    where = [f"out={tmp_path}"] + [f"data.cache={tmp_path}"] * (script == "train.py")
    fails_in_one_line(command(script, *tiny, *where, *more), said)

def test_a_row_lost_to_a_kill_is_made_up_for(pipeline, tmp_path, monkeypatch):
    """Killed after its save, before its evaluation."""
    from unittest import mock
    words = [*pipeline.command("train"), f"out={tmp_path}"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "report_progress", mock.Mock(side_effect=KeyboardInterrupt))
        train.main(words[1:])
    assert checkpoint.load_checkpoint(tmp_path)[0]["step"] == 2
    succeeds(*words)
    assert losses_of_run(tmp_path) == losses_of_run(pipeline("train")) != []

def test_a_ragged_log_loses_its_bad_rows_alone(pipeline, tmp_path):
    out = shutil.copytree(pipeline("train"), tmp_path / "run")
    log = (out / "log.csv").read_bytes().splitlines()
    log[2:2] = [b"x,1", b"1" + b",9" * 99, b"\xff\x00", b"3"]
    (out / "log.csv").write_bytes(b"\n".join(log) + b"\n-4,,\n4,0.5")
    said = succeeds(*pipeline.command("train"), "steps=5", f"out={out}")
    assert said.count("log.csv: 6 damaged lines are left out") == 1
    wanted = common.read_log(pipeline("train") / "log.csv")
    assert common.read_log(out / "log.csv")[:len(wanted)] == wanted

@pytest.mark.parametrize("words, said", [
    ("evaluate.py --batch 0", "wants 1 to"), ("evaluate.py --fd -1", "--fd"),
    ("evaluate.py --prompts 1 --out README.md", "README.md"), ("lab.plan gpus=0", "1 or more"),
    ("lab.plan mfu=-1", "more than 0"), ("data.py --show no/such/x.png", "no/such"),
    ("data.py --show x", ".png"), ("data.py --export x 5", "20 to a million"),
    ("export_coreml.py --size 4611686018427387904", "up to 4096"), ("data.py --exprt x", "--exprt"),
    ("sample.py dog -n 1000000000000", "-n"), ("evaluate.py --steps 1000000000000", "1 to 1000"),
    ("sample.py dog --out-dir README.md", "README.md"), ("train.py out=README.md", "README.md"),
    ("lab.benchmarks dpg {tmp} --out {tmp}/o", "a.txt"),
    ("lab.benchmarks geneval {tmp}/a.txt --out {tmp}/o", "a.txt"),
])
def test_bad_words_on_the_command_line_are_one_line(words, said, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    fails_in_one_line(command(*words.format(tmp=tmp_path).split()), said)

@pytest.mark.parametrize("seed", [2**64 - 1, -1])
def test_large_seeds_draw(seed):
    net = tiny_model()
    for sampler in ("euler", "renoise"):
        some = sample.generate(net, None, ["a dog"] * 2, [seed, seed + 1], 32, 2, 1.0, sampler)
        assert not torch.equal(*some)

def test_a_long_prompt_of_a_benchmark_is_drawn_cut(tmp_path, capsys):
    from lab import benchmarks
    (tmp_path / "p").mkdir()
    (tmp_path / "p/1.txt").write_text("A grey cat with white paws sleeps on the sill. " * 9)
    save_model(tmp_path / "net", tiny_model())
    ae = tiny_autoencoder()
    about = {"autoencoder": asdict(ae.cfg)}
    checkpoint.save_checkpoint(tmp_path / "ae", {"model": ae.state_dict()}, about, latest=False)
    benchmarks.main(["dpg", f"{tmp_path}/p", "--ckpt", f"{tmp_path}/net", "--ae", f"{tmp_path}/ae",
                     "--out", f"{tmp_path}/o"])
    (tmp_path / "g.jsonl").write_text('{"prompt": "a photo of a\u2028bench"}\n', encoding="utf-8")
    assert len(benchmarks.read_geneval(tmp_path / "g.jsonl")) == 1      # U+2028 ends no line
    assert "drawn as 'A grey cat" in "".join(capsys.readouterr())
    assert (tmp_path / "o/1.png").is_file()

def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []

def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False

def waited_for(condition, seconds=60):
    begin = time.time()
    while not condition() and time.time() - begin < seconds:
        time.sleep(0.02)
    return condition()

@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
@pytest.mark.parametrize("victim", ["one of two", "torchrun", "parent of workers"])
def test_no_process_outlives_a_kill(victim, pipeline, tmp_path):
    """The two are killed before they meet."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += [*pipeline.command("train"), f"out={tmp_path / 'run'}"]
    if victim == "parent of workers":
        words = [*pipeline.command("train"), "data.workers=2", "data.pictures=9000",
                 f"data.cache={tmp_path}", f"out={tmp_path / 'run'}"]
    parent = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert waited_for(lambda: len(children(parent.pid)) == 2)
    theirs = children(parent.pid)
    if victim == "torchrun":        # where both have told Linux: they wait for each other, or train
        assert waited_for(lambda: (tmp_path / "run").exists())
    os.kill(theirs[1] if victim == "one of two" else parent.pid, signal.SIGKILL)
    assert parent.wait(60) != 0
    assert waited_for(lambda: not any(map(is_running, theirs)))

@pytest.mark.slow
def test_three_kills_at_random_moments_change_nothing():
    """The other seventy-seven: python -m lab.kills"""
    status, said, _ = run("-m", "lab.kills", "--train", 3, "--cache", 0, "--adv", 0)
    assert status == 0 and "train: 3 kills" in said, said

# ---------------------------------------------------------------------------- properties
# 60 s in all, the same examples each time; FUZZ=5000 draws so many others: pytest -m slow -k any_
def drawn_anew(**strategies):
    """A slow test on what hypothesis draws."""
    n = os.environ.get("FUZZ")
    how = settings(max_examples=int(n or 150), derandomize=not n, deadline=None, database=None,
                   suppress_health_check=list(HealthCheck))
    return lambda test: pytest.mark.slow(how(given(**strategies)(test)))

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4)
                      | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)
TINY_PNG = encoded(Image.new("RGB", (64, 64)))
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)

def nested(keys: dict) -> dict:
    """{"a.b": 1} -> {"a": {"b": 1}}"""
    table = {}
    for key, value in keys.items():
        *outer, last = key.split(".")
        inner = table
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return table

def keys_of(cfg, prefix=""):
    for key, value in vars(cfg).items():
        yield from keys_of(value, f"{prefix}{key}.") if is_dataclass(value) else [prefix + key]

@drawn_anew(keys=st.dictionaries(st.sampled_from(sorted(keys_of(adv_distill.AdvConfig()))),
                                 VALUES, max_size=3), words=st.lists(st.text(max_size=20)))
def test_any_config_is_refused_or_reads_back(keys, words):
    with contextlib.suppress(UserError):
        cfg = common.check_config(common.fill(adv_distill.AdvConfig(), nested(keys)))
        again = common.fill(adv_distill.AdvConfig(), json.loads(json.dumps(asdict(cfg))))
        assert again == cfg                                     # nan would differ
    with contextlib.suppress(UserError), contextlib.redirect_stdout(io.StringIO()):
        if not {"-h", "--help"} & set(words):
            common.read_config(adv_distill.AdvConfig(), words)

@drawn_anew(caption=st.text(), most=st.integers(2, 70), raw=st.binary(max_size=40),
            suffix=st.sampled_from((".txt", ".json")))
def test_any_caption_is_read_whole_or_to_a_word(caption, most, raw, suffix):
    words = text.load_vocabulary()
    ids, mask = words.tokenize([caption, ""], most, cut=True)
    assert mask.sum(1).max() <= most and int(ids[1, 0]) == words.end
    short = words.shorten(caption, most)
    assert len(words.ids_of(short)) <= most and " ".join(caption.split()).startswith(short)
    whole = words.ids_of(caption)
    assert words.spell(whole[:-1]) == words.encoding.decode(whole[:-1]).strip()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(pictures.Unusable):
        file = f"{folder}/x{suffix}"
        Path(file).write_bytes(raw)
        place = pictures.Place(file, 0, len(raw), suffix)
        read = pictures.caption_of(pictures.Item("x", None, place))
        assert read.encode() and read == " ".join(read.split())

SUFFIXES = st.sampled_from(("", ".png", ".jpg", ".txt", ".json", ".tar", ".TXT", ".md"))
CONTENTS = st.binary(max_size=60) | st.sampled_from((b"a dog", b'{"caption": "a"}', TINY_PNG))

@drawn_anew(files=st.dictionaries(st.tuples(NAMES, SUFFIXES), CONTENTS, max_size=6),
            lines=st.lists(VALUES, max_size=3))
def test_any_file_of_a_folder_is_accounted_for(files, lines):
    with tempfile.TemporaryDirectory() as folder:
        for (stem, suffix), raw in [(("good", ".png"), TINY_PNG), *files.items()]:
            with contextlib.suppress(OSError):                  # "." and the like
                Path(folder, stem + suffix).write_bytes(raw)
        rows = [json.dumps(line) for line in lines]
        Path(folder, "captions.jsonl").write_text("\n".join(rows))
        there = {unicodedata.normalize("NFC", name) for name in os.listdir(folder)}
        items = pictures.find_pictures(folder)
        prepared = pictures.Prepared(items, PICTURES)
        for picture, words in prepared:
            assert words and (picture is None or picture.shape[2] == 3)
        listed = {item.name.split("/")[0] for item in items}
        stems = {pictures.split_name(i.name)[0] for i in items if i.picture}
        beside = {n for n in there if pictures.split_name(n)[0] in stems}       # captions
        empty = {n for n in there if n.lower().endswith(".tar")}                # no members
        assert there - {"captions.jsonl"} <= listed | beside | empty
        assert pictures.listing_key(items) == pictures.listing_key(pictures.find_pictures(folder))

READ = """arch model text data flow few_steps step crc32 data.size flow.shift model.widths model.act
    model.head_dim text.width text.heads text.pattern text.max_tokens few_steps.steps
    few_steps.sampler""".split()

@drawn_anew(changes=st.dictionaries(st.sampled_from(READ), VALUES, min_size=1, max_size=2),
            raw=st.none() | st.binary(max_size=99))
def test_any_checkpoint_is_loaded_or_named(changes, raw):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net"
        save_model(path, tiny_model())
        config = json.loads((path / "config.json").read_text())
        for key, value in changes.items():
            outer, _, inner = key.partition(".")
            if inner and isinstance(config.get(outer, {}), dict):
                config.setdefault(outer, {})[inner] = value
            else:
                config[outer] = value
        if raw is not None:
            (path / "model.safetensors").write_bytes(raw)
            config["crc32"] = {}
        (path / "config.json").write_text(json.dumps(config))
        with contextlib.suppress(UserError):
            net, config = model.load_model(path)
            assert sample.sampling(config)["steps"][0] == 1
            assert not net.encode(["a dog"], cut=True).emb.isnan().any()

# ---------------------------------------------------------------------------- the house
SOURCES = {str(p.relative_to(ROOT)): p.read_text() for folder in ("", "coreml/", "web/", "lab/")
           for p in sorted(ROOT.glob(folder + "*.py"))}

def test_the_commands_of_the_readme_exist():
    found = re.findall(r"python (-m )?([\w./]+)([^\n`#]*)", (ROOT / "README.md").read_text())
    assert len(found) > 20
    for module, name, words in found:
        if name == "http.server":
            continue                                        # Python's own
        source = SOURCES[name.replace(".", "/") + ".py" if module else name] + SOURCES["common.py"]
        for word in words.split():
            assert not word.startswith("-") or f'"{word}"' in source, (name, word)
            assert not word.endswith(".toml") or (ROOT / word).is_file(), word

def imports_of(nodes):
    """Our and other modules that the import statements among `nodes` name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found

def test_imports_point_one_way():
    heavy = {"coremltools", "transformers", "matplotlib", "diffusers", "huggingface_hub"}
    may_use_coreml = {"export_coreml.py", "sample.py", "evaluate.py"}
    left = {}
    for path, source in SOURCES.items():
        tree = ast.parse(source)
        assert not imports_of(tree.body) & heavy, path              # only where they are needed
        if "/" not in path and path != "test_all.py":
            left[path[:-3]] = found = imports_of(ast.walk(tree))
            assert not found & {"lab", "web"}, path
            assert "coreml" not in found or path in may_use_coreml, path
    while left:                                     # those that import nothing that is left go
        free = {name for name, found in left.items() if not found & left.keys() - {name}}
        assert free, f"a cycle among {sorted(left)}"
        left = {name: found for name, found in left.items() if name not in free}

def test_files_and_functions_are_short_and_names_unique():
    seen = Counter()
    for path, source in SOURCES.items():
        tree, tests = ast.parse(source), path == "test_all.py"
        assert len(source.splitlines()) <= (3680 if tests else 450), path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, (path, node.name)
        kinds = (ast.FunctionDef, ast.ClassDef)
        seen.update(node.name for node in tree.body if isinstance(node, kinds) and not tests)
    assert {name for name, n in seen.items() if n > 1} <= {"main", "parse"}, seen.most_common(9)
# ---------------------------------------------------------------------------- every platform
def text_calls_without_encoding(tree):
    """Lines that read or write text, or a command's words, in whatever encoding the locale has."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        keys = {key.arg for key in node.keywords}
        plain_open = isinstance(node.func, ast.Name) and name == "open"
        plain_open &= "b" not in "".join(map(ast.unparse, node.args[1:2]))
        if name in ("read_text", "write_text") or plain_open or keys >= {"text", "capture_output"}:
            said = {ast.unparse(x) for x in node.args} | keys
            if not said & {"encoding", "'utf-8'", "'utf-8-sig'"}:
                yield node.lineno

def test_every_file_of_text_is_utf8():
    bad = ast.parse("p.read_text()\np.write_text(x)\nopen(p)\nopen(p, 'a')\nopen(p, 'rb')")
    assert list(text_calls_without_encoding(bad)) == [1, 2, 3, 4]
    found = {path: list(text_calls_without_encoding(ast.parse(source)))
             for path, source in SOURCES.items() if path != "test_all.py"}
    assert not any(found.values()), found

def test_git_keeps_bytes_and_names_fit_windows():
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, encoding="utf-8")

    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    said = git("check-attr", "text", "assets/fast/captions.tiktoken").stdout
    assert said.endswith("text: unset\n")
    names = git("ls-files").stdout.splitlines()
    forbidden = re.compile(r'[<>:"\\|?*]|[ .](/|$)|(^|/)(con|aux|nul|prn)\b', re.I)
    odd = list(filter(forbidden.search, names))
    assert len(names) > 100 and not odd and len({n.lower() for n in names}) == len(names)

def test_paths_with_backslashes_and_blanks_are_read(tmp_path):
    def folder(*words):
        return common.read_config(train.TrainConfig(), words).data.folder

    for path in (r"C:\dir\new", r"\\host\my pictures", r"D:\Käfer"):
        assert folder(f"data.folder={path}") == folder(f"data.folder='{path}'") == path
        (tmp_path / "ü.toml").write_text(f"[data]\nfolder = '{path}'\n", "utf-8-sig")
        assert folder("--config", str(tmp_path / "ü.toml")) == path
    for path in (r"C:\Users", r"C:\new", r"C:\dir"):        # \U, \n and \d of TOML
        (tmp_path / "a.toml").write_text(f'[data]\nfolder = "{path}"\n', "utf-8")
        with pytest.raises(UserError, match="a path with backslashes wants '...'"):
            folder("--config", str(tmp_path / "a.toml"))

def test_windows_waits_for_files_and_quotes_as_its_shell_does(tmp_path, monkeypatch, capsys):
    from unittest import mock
    words = ["python", "sample.py", "a \"red\" car", "--ckpt", r"runs\my cat"]
    assert shlex.split(common.command_line(words)) == words
    refused = mock.Mock(side_effect=[PermissionError, PermissionError, "moved"])
    monkeypatch.setattr(common.time, "sleep", lambda seconds: None)
    with pytest.raises(PermissionError):                    # elsewhere that is final
        common.patiently(refused)
    refused.side_effect = [PermissionError, PermissionError, "moved"]
    monkeypatch.setattr(common, "os", SimpleNamespace(name="nt", replace=refused))
    assert common.patiently(refused, 1, 2) == "moved" and refused.call_args.args == (1, 2)
    assert common.command_line(words).endswith(r'"a \"red\" car" --ckpt "runs\my cat"')
    refused.side_effect = PermissionError                   # a table program holds the log
    common.write_log(tmp_path / "log.csv", [{"step": 1}])
    assert "open in another program" in capsys.readouterr().out and not any(tmp_path.iterdir())

@pytest.mark.parametrize("where", ["Ctrl+Break of Windows", "a thread"])
def test_a_run_stops_by_signals_and_runs_in_threads(where, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    cfg = SimpleNamespace(out=tmp_path, steps=3, log_every=1, eval_every=9)
    monkeypatch.setattr(checkpoint, "asdict", vars)
    run, seen = checkpoint.Run(cfg, torch.device("cpu")), []

    def train_it():
        for step in run.steps():
            seen.append(step)
            if where != "a thread":
                signal.raise_signal(signal.SIGUSR1)

    worker = threading.Thread(target=train_it)
    if where == "a thread":
        worker.start()
        worker.join()
        assert seen == [0, 1, 2]
    else:
        train_it()
        assert seen == [0] and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL

@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_what_a_checkpoint_is_read_from_is_closed(pipeline, tmp_path):
    """Windows replaces no file that is mapped."""
    words = [*pipeline.command("train"), f"out={tmp_path}"]
    succeeds(*words, "steps=2")
    keep = model.load_model(tmp_path), decoder.load_autoencoder(pipeline.ae)
    cfg = common.read_config(train.TrainConfig(), words[1:])
    net = keep[0][0]
    run = checkpoint.Run(cfg, net.device, model=net)
    maps = Path("/proc/self/maps").read_text("utf-8")
    assert run.step == 2 and str(tmp_path) not in maps and str(pipeline.ae) not in maps

@pytest.mark.slow
def test_spawned_workers_make_the_same_cache(pipeline, own, tmp_path):
    was, numbers = multiprocessing.get_start_method(), torch.get_rng_state()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        cache.make_cache(own_config(pipeline, own[0], tmp_path, "data.workers=2"))
    finally:
        multiprocessing.set_start_method(was, force=True)
    there, whole = ({p.name: p.read_bytes() for p in root.iterdir()} for root in (tmp_path, own[1]))
    assert there == whole and torch.equal(torch.get_rng_state(), numbers)

@pytest.mark.slow
def test_umlauts_and_spawn_where_the_locale_knows_neither(pipeline, own, tmp_path):
    """Windows reads files in the encoding of its country by default, and has no fork."""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env["PYTHONPATH"] = str(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing\nmultiprocessing.set_start_method('spawn', force=True)\n", "utf-8")
    shutil.copytree(own[0], tmp_path / "my pictures")
    for file in (tmp_path / "my pictures").glob("*.txt"):
        file.write_bytes(file.read_bytes() + " für den Käfer".encode())
    lines = ["data.workers = 2  # schön", "data.folder = 'my pictures'", "data.bucket_step = 16"]
    (tmp_path / "k.toml").write_text("\n".join(lines), "utf-8")
    words = [*pipeline.command("train")[1:], "data.cache=my cache", "out=my run", "steps=2"]
    words.remove("data.workers=0")

    def python(*words):
        done = subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, env=env,
                              capture_output=True, encoding="utf-8", timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = python(ROOT / "train.py", "--config", "k.toml", *words)
    assert "32 pictures" in said and r"f\xfcr den K\xe4fer' --ckpt 'my run'" in said
    python(ROOT / "sample.py", "für den Käfer", "--ckpt", "my run", "--ae", pipeline.ae,
           "--steps", 1)
    with Image.open(tmp_path / "out.png") as image:
        assert json.loads(image.info[sample.RECORD])["prompts"] == ["für den Käfer"]

def test_mps_is_chosen_for_one_process_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    mps = common.pick_device()
    assert mps.type == "mps" and common.layout(mps) == torch.contiguous_format
    assert not common.use_bfloat16("auto", mps) and optim.muon_precision(mps) == torch.float32
    for macos, enough in ("13.6.1", False), ("14.0", True), ("", True):
        monkeypatch.setattr(common.platform, "mac_ver", lambda macos=macos: (macos, "", ""))
        with contextlib.nullcontext() if enough else pytest.raises(UserError, match="macOS 14"):
            assert common.use_bfloat16("bfloat16", mps)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert common.pick_device().type == "cpu"
    with pytest.raises(UserError, match="set device=cpu"):
        common.pick_device("mps")

class AsOnMPS(TorchDispatchMode):
    """Notes which operations run, and which functions of ours make float64, which MPS lacks."""
    def __init__(self):
        super().__init__()
        self.operations, self.makes_float64 = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "aten":
            self.operations.add(str(function).removeprefix("aten.").removesuffix(".default"))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                frame = sys._getframe()
                while (code := frame.f_code) and (Path(code.co_filename).parent != ROOT
                                                  or "__torch" in code.co_name):
                    frame = frame.f_back
                self.makes_float64.add(code.co_qualname.split(".<")[0])
        return out

def kernels_for_mps():
    """{operation: whether it runs on MPS}, from the table that PyTorch is made from."""
    torchgen = pytest.importorskip("torchgen")
    folder = Path(torchgen.__file__).parent / "packaged/ATen/native"
    found, delegates = {}, {}
    for entry in (folder / "native_functions.yaml").read_text("utf-8").split("\n- func: ")[1:]:
        name, own = entry.split("(")[0], re.sub("#.*", "", entry)
        found[name] = "dispatch:" not in own or bool(re.search(r"\bMPS\b|\bComposite", own))
        if delegate := re.search(r"structured_delegate: (\S+)", own):
            delegates[name] = delegate[1]
    return found | {name: found[other] for name, other in delegates.items()}

@pytest.mark.slow
def test_mps_has_what_training_and_drawing_run(pipeline, tmp_path):
    has = kernels_for_mps()
    on_cpu = {"position_table", "TaskWeight.__init__", "TaskWeight.log_density", "frechet"}
    pipeline("gan")                                         # and what it is made from
    with AsOnMPS() as seen:
        for stage in ("distill", "gan", "dmd"):
            words = [*pipeline.command(stage), "steps=1", "eval_every=1", "muon_lr=0.02"]
            succeeds(*words, f"out={tmp_path / stage}")
        succeeds("sample.py", "a red car", "--ckpt", tmp_path / "gan", "--ae", pipeline.ae,
                 "--steps", 4, "-o", tmp_path / "a.png")
        evaluate.frechet(torch.randn(9, 3), torch.randn(9, 3))
    lacking = {name for name in seen.operations if not has.get(name)}
    assert lacking == {"_linalg_eigh", "_scaled_dot_product_flash_attention_for_cpu",
                       "_scaled_dot_product_flash_attention_for_cpu_backward"}
    assert seen.makes_float64 <= on_cpu and len(seen.makes_float64) > 2

# ---------------------------------------------------------------------------- gpu
def on_gpu(function):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    return pytest.mark.gpu(skip(function))

@on_gpu
@pytest.mark.parametrize("how", ["compile=false", "compile=true"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_steps_on_cuda(stage, how, pipeline, tmp_path):
    words = pipeline.command(stage)
    said = succeeds(*words, "device=cuda", "amp=bfloat16", how, "steps=2", f"out={tmp_path}")
    assert "done:" in said and "cuda" in said
    rows = [r for r in common.read_log(tmp_path / "log.csv") if r.get("val")]
    assert rows and np.isfinite(float(rows[-1]["val"]))

@on_gpu
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_waits_for_no_gpu(stage, pipeline, tmp_path, monkeypatch):
    steps, words = checkpoint.Run.steps, pipeline.command(stage)

    def watched(run):
        for step in steps(run):
            torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
            yield step
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(checkpoint.Run, "steps", watched)
    words += ["steps=4", "log_every=9", "eval_every=9", "device=cuda", f"out={tmp_path}"]
    assert "done: " in succeeds(*words)

@on_gpu
def test_cuda_trains_as_the_cpu_does(pipeline, tmp_path):
    words = [*pipeline.command("train"), "muon_lr=0.02"]
    for device in ("cpu", "cuda"):
        succeeds(*words, f"device={device}", f"out={tmp_path / device}")
    logs = [common.read_log(tmp_path / device / "log.csv") for device in ("cpu", "cuda")]
    losses = [[float(r["val"]) for r in log if r.get("val")] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)       # other noise

@on_gpu
def test_cuda_draws_the_cpus_picture(tmp_path):
    pictures = []
    for device in ("cpu", "cuda"):
        file = tmp_path / f"{device}.png"
        succeeds("sample.py", "a red car", "--base", "--steps", 4, "--device", device, "-o", file)
        pictures.append(np.asarray(Image.open(file)).astype(float))
    assert np.abs(pictures[0] - pictures[1]).mean() < 2 and pictures[0].std() > 10
