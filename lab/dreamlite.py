"""DreamLite's published UNet (ByteDance, arXiv 2603.28713; diffusers' DreamLiteUNetModel) in ours.

    python -m lab.dreamlite DIR     its config in our words, its parameters
    load_dreamlite(DIR)             DIR holds `unet/config.json` and its safetensors, or is that
                                    folder; or a hub id

It is of SnapGen's family. What differs from the final SnapGen:
- depths 1, 2, 4 down and 4, 2, 0 up; encoder skips at the lowest stage too; no rotary embedding;
- a residual block's hidden width is 2 C_out, not 2 max(C_in, C_out); its depthwise convolutions
  have no bias; the stages change size by plain 3x3 convolutions;
- where there is no self-attention, its norm is still there and *replaces* the residual:
  x = norm(x). A slip, kept because the weights were trained with it;
- text states (Qwen3-VL's last, 2048 wide) pass a Linear and an RMSNorm first; the picture's size is
  embedded and added to the time;
- latents of 4 channels (TAESDXL's); of a picture twice as wide, the right half is edited.
The code of diffusers is Apache-2.0, the published weights are CC BY-NC 4.0.

B batch | C channels | L text tokens
"""
import json
import re
import sys

import torch
import torch.nn as nn

from checkpoint import hub_folder, hub_tensors, load_into
from common import UserError, friendly
from model import Attention, ResBlock, Transformer, TransformerBlock, UNet, UNetConfig, count_params

class DreamLiteBlock(TransformerBlock):
    def __init__(self, cfg, C, self_attn):
        super().__init__(cfg, C, self_attn)
        self.norm1 = nn.LayerNorm(C)

    def forward(self, x, context, mask, rope):
        if self.self_attn is None:
            x = self.norm1(x)                                   # (B, N, C), without a residual
        return super().forward(x, context, mask, rope)

def biasless_separable(C_in, C_out):
    depthwise = nn.Conv2d(C_in, C_in, 3, padding=1, groups=C_in, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(C_in, C_out, 1, bias=False))

class DreamLite(UNet):
    """Our UNet with the parts replaced that differ; text_dim: width of a text state; size_freqs:
    sinusoids of a side."""
    def __init__(self, cfg: UNetConfig, text_dim: int, size_freqs: int):
        super().__init__(cfg)
        for m in list(self.modules()):
            if isinstance(m, ResBlock):
                C_in, C_out = m.norm1.num_channels, m.conv2[1].out_channels
                m.conv1 = biasless_separable(C_in, 2 * C_out)
                m.conv2 = biasless_separable(2 * C_out, C_out)
                m.time = nn.Linear(cfg.time_dim, 2 * C_out)
                m.norm2 = nn.GroupNorm(cfg.groups, 2 * C_out)
            elif isinstance(m, Transformer):
                C, attends = m.proj_in.in_features, [b.self_attn is not None for b in m.blocks]
                m.blocks = nn.ModuleList(DreamLiteBlock(cfg, C, on) for on in attends)
        for m in self.modules():
            if isinstance(m, Attention) and cfg.qk_norm:        # theirs adds 1e-5, ours 1e-6
                m.q_norm = nn.RMSNorm(m.D, eps=1e-5)
                m.k_norm = nn.RMSNorm(m.D, eps=1e-5)
        for i, C in enumerate(cfg.widths[:-1]):
            self.downsample[i] = nn.Conv2d(C, C, 3, 2, padding=1)
        for i, C in enumerate(cfg.widths[:0:-1]):
            self.upsample[i] = nn.Conv2d(C, C, 3, padding=1)
        width, T = cfg.context_dim, cfg.time_dim
        self.project = nn.Sequential(nn.Linear(text_dim, width), nn.RMSNorm(width, eps=1e-5))
        self.size = nn.Sequential(nn.Linear(2 * size_freqs, T), nn.SiLU(), nn.Linear(T, T))
        self.size_freqs = size_freqs
        self.pixels = None                                      # (B or 1, 2), set by forward()

    def embed_time(self, t):
        half = self.size_freqs // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float32)
        sides = self.pixels.to(t.device).float()[..., None]             # (B or 1, 2, 1)
        angle = sides * 10000.0 ** (-steps / half)                      # (B or 1, 2, size_freqs/2)
        sinusoids = torch.cat([angle.cos(), angle.sin()], -1).flatten(1)
        return super().embed_time(t) + self.size(sinusoids.to(self.conv_in.weight.dtype))

    def keys_values(self, context):
        return super().keys_values(self.project(context))

    def forward(self, x, t, context, mask=None, features=(), pooled=None, size=None):
        """As UNet's, with context (B, L, text_dim); size (B, 2): width and height in pixels (None:
        those of x, whose right half is the picture to edit)."""
        H, W = x.shape[2:]
        self.pixels = torch.tensor([[4 * W, 8 * H]]) if size is None else size
        if not isinstance(context, dict):
            context = self.project(context)
        return super().forward(x, t, context, mask, features)

# ---------------------------------------------------------------------------- config and names
DEFAULTS = dict(
    use_sep_conv=True, qk_norm="rms_norm", ff_mult=6, num_kv_heads=1, num_mid_layers=1,
    norm_num_groups=32, norm_eps=1e-5, act_fn="silu", layers_per_block=2,
    transformer_layers_per_block=1, attention_head_dim=64, use_linear_projection=False,
    only_cross_attention=False, flip_sin_to_cos=True, freq_shift=0, downsample_padding=1)
WANTED = dict(
    use_sep_conv=True, num_mid_layers=1, norm_eps=1e-5, use_linear_projection=True,
    only_cross_attention=False, encoder_hid_dim_type="text_proj_rms", addition_embed_type="time",
    flip_sin_to_cos=True, freq_shift=0, downsample_padding=1)

def dreamlite_config(raw: dict) -> tuple[UNetConfig, int, int]:
    """Their config.json -> (UNetConfig, text_dim, size_freqs). UserError names what differs from
    the published one where our layout cannot hold it."""
    r = {**DEFAULTS, **raw}
    odd = [f"{key}={r.get(key)}" for key, value in WANTED.items() if r.get(key) != value]
    try:
        widths, down, up = r["block_out_channels"], r["down_block_types"], r["up_block_types"]
        heads, depth = r["attention_head_dim"], r["transformer_layers_per_block"]
        text_dim, size_freqs = r["encoder_hid_dim"], r["addition_time_embed_dim"]
        context_dim, channels = r["cross_attention_dim"], r["in_channels"]
    except KeyError as e:
        raise UserError(f"config.json lacks {e}, which a DreamLiteUNetModel has: download it "
                        "again") from None
    heads = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    depth = [depth] * len(widths) if isinstance(depth, int) else list(depth)
    if len({C // n for C, n in zip(widths, heads)}) > 1:
        odd.append("head widths")
    attends = ["NoSelfAttn" not in kind and "RemoveSelfAttn" not in kind for kind in down]
    for kind, on in zip(up, reversed(attends)):
        if "CrossAttn" in kind and on == ("NoSelfAttn" in kind or "RemoveSelfAttn" in kind):
            odd.append("block types")
    if odd:
        raise UserError(f"this DreamLite differs from the published one in {', '.join(odd)}: "
                        "lab/dreamlite.py does not hold that")
    cfg = UNetConfig(
        in_channels=channels, widths=list(widths), context_dim=context_dim,
        depth_down=[d if "CrossAttn" in kind else 0 for d, kind in zip(depth, down)],
        depth_mid=depth[-1],
        depth_up=[d if "CrossAttn" in kind else 0 for d, kind in zip(reversed(depth), up)],
        res_down=r["layers_per_block"], self_attn=attends, skip_lowest=True, ff_mult=r["ff_mult"],
        head_dim=widths[0] // heads[0], kv_heads=r["num_kv_heads"] or 0,
        qk_norm=r["qk_norm"] == "rms_norm", rope=0.0, time_freqs=widths[0],
        time_dim=4 * widths[0], act=r["act_fn"], groups=r["norm_num_groups"])
    return cfg, text_dim, size_freqs

NAMES = [       # (pattern of diffusers, ours)
    (r"^time_embedding\.linear_1", "time.0"), (r"^time_embedding\.linear_2", "time.2"),
    (r"^add_embedding\.linear_1", "size.0"), (r"^add_embedding\.linear_2", "size.2"),
    (r"^encoder_hid_proj", "project"), (r"^conv_norm_out", "norm_out"),
    (r"^(down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.conv", r"\1sample.\2"),
    (r"^(down|up)_blocks\.(\d)\.resnets\.(\d)", r"\1.\2.\3.res"),
    (r"^(down|up)_blocks\.(\d)\.attentions\.(\d)", r"\1.\2.\3.transformer"),
    (r"^mid_block\.resnets\.(\d)", r"mid.\1.res"),
    (r"^mid_block\.attentions\.(\d)", r"mid.\1.transformer"),
    (r"\.time_emb_proj", ".time"), (r"\.conv_shortcut", ".shortcut"), (r"\.depthwise", ".0"),
    (r"\.pointwise", ".1"), (r"\.transformer_blocks", ".blocks"), (r"\.attn1", ".self_attn"),
    (r"\.attn2", ".cross_attn"), (r"\.to_q", ".q"), (r"\.to_out\.0", ".out"),
    (r"\.norm_([qk])\.", r".\1_norm."), (r"\.ff\.net\.0\.proj", ".ff.up"),
    (r"\.ff\.net\.2", ".ff.out"),
]

def dreamlite_tensors(state: dict) -> dict:
    """Under our names; keys and values are one matrix here."""
    out = {}
    for key, value in state.items():
        for pattern, new in NAMES:
            key = re.sub(pattern, new, key)
        out[key] = value
    for key in [k for k in out if k.endswith(".to_k.weight")]:
        pair = out.pop(key), out.pop(key.replace(".to_k.", ".to_v."))
        out[key.replace(".to_k.", ".kv.")] = torch.cat(pair)
    return out

def load_dreamlite(source, device="cpu") -> DreamLite:
    """UserError names what is missing, damaged, or not DreamLite's."""
    get = ("`hf download carlofkl/DreamLite-base --revision diffusers --include 'unet/*' "
           f"--local-dir {source}` downloads DreamLite's, 0.78 GB")
    folder = hub_folder(source, "unet", get)
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{folder} has no whole config.json ({type(e).__name__}): it is no "
                        "diffusers model, or its download is incomplete") from None
    kind = raw.get("_class_name", "checkpoint of ours")
    if kind != "DreamLiteUNetModel":
        raise UserError(f"{folder} holds a {kind}, not a DreamLiteUNetModel; checkpoints of ours "
                        "are read by model.load_model")
    with torch.device("meta"):
        net = DreamLite(*dreamlite_config(raw))
    state = dreamlite_tensors(hub_tensors(folder))
    return load_into(net.to_empty(device=device), state, str(folder)).eval()

if __name__ == "__main__":
    with friendly():
        if len(sys.argv) != 2:
            raise UserError("usage: python -m lab.dreamlite DIR, a directory with DreamLite's unet")
        dreamlite = load_dreamlite(sys.argv[1])
        print(f"{count_params(dreamlite) / 1e6:.2f} M parameters; {dreamlite.cfg}")
