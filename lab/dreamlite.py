"""DreamLite's published UNet (ByteDance, arXiv 2603.28713; diffusers' DreamLiteUNetModel) in ours.

`python -m lab.dreamlite DIR` prints its size; DIR holds `unet/`, or is it. What differs from the
final SnapGen: depths 1, 2, 4 down and 4, 2, 0 up; encoder skips at the lowest stage too; no rotary
embedding. A residual block's hidden width is 2 C_out, not 2 max(C_in, C_out), and its depthwise
convolutions have no bias; plain 3x3 convolutions change the size. Where there is no self-attention
its norm *replaces* the residual: a slip, kept because the weights were trained with it. Text states
(Qwen3-VL's last) pass a Linear and an RMSNorm; the picture's size is added to the time. Latents
have 4 channels (TAESDXL's); of a picture twice as wide, the right half is edited.
The code of diffusers is Apache-2.0, the published weights are CC BY-NC 4.0.

B batch | C channels | L text tokens"""
import re
import sys

import torch
import torch.nn as nn

import model
from checkpoint import hub_folder, hub_tensors, load_into, read_description
from common import UserError, friendly

class DreamLiteBlock(model.TransformerBlock):
    def __init__(self, cfg, C, self_attn):
        super().__init__(cfg, C, self_attn)
        self.norm1 = nn.LayerNorm(C)

    def forward(self, x, context, mask, rope):
        if self.self_attn is None:
            x = self.norm1(x)                                   # (B, N, C), without a residual
        return super().forward(x, context, mask, rope)

class DreamLite(model.UNet):
    """text_dim: width of a text state; size_freqs: sinusoids of a side."""
    def __init__(self, cfg: model.UNetConfig, text_dim: int, size_freqs: int):
        super().__init__(cfg)
        for m in list(self.modules()):
            if isinstance(m, model.ResBlock):
                C_in, C_out = m.norm1.num_channels, m.conv2[1].out_channels
                m.conv1 = model.conv3x3(cfg, C_in, 2 * C_out)
                m.time = nn.Linear(cfg.time_dim, 2 * C_out)
                m.norm2 = nn.GroupNorm(cfg.groups, 2 * C_out)
                m.conv2 = model.conv3x3(cfg, 2 * C_out, C_out)
                m.conv1[0].bias = m.conv2[0].bias = None
            elif isinstance(m, model.Transformer):
                for i, old in enumerate(m.blocks):
                    attends = old.self_attn is not None
                    m.blocks[i] = DreamLiteBlock(cfg, m.proj_in.in_features, attends)
        for m in self.modules():
            if isinstance(m, model.Attention):                  # theirs adds 1e-5, ours 1e-6
                m.q_norm = nn.RMSNorm(m.D, eps=1e-5)
                m.k_norm = nn.RMSNorm(m.D, eps=1e-5)
        for resize, stride in (self.downsample, 2), (self.upsample, 1):
            for i, (depthwise, _) in enumerate(resize):
                C = depthwise.in_channels
                resize[i] = nn.Conv2d(C, C, 3, stride, padding=1)
        D, T = cfg.context_dim, cfg.time_dim
        self.project = nn.Sequential(nn.Linear(text_dim, D), nn.RMSNorm(D, eps=1e-5))
        self.size = nn.Sequential(nn.Linear(2 * size_freqs, T), nn.SiLU(), nn.Linear(T, T))

    def embed_time(self, t):
        half = self.size[0].in_features // 4
        steps = torch.arange(half, device=t.device, dtype=torch.float32)
        sides = self.pixels.to(t.device).float()[..., None]             # (B or 1, 2, 1)
        angle = sides * 10000.0 ** (-steps / half)                      # (B or 1, 2, size_freqs/2)
        sinusoids = torch.cat([angle.cos(), angle.sin()], -1).flatten(1)
        return super().embed_time(t) + self.size(sinusoids.to(self.conv_in.weight.dtype))

    def keys_values(self, context):
        return super().keys_values(self.project(context))

    def forward(self, x, t, context, mask=None, features=(), pooled=None, size=None):
        """As UNet's; size (B, 2): width and height in pixels (None: of the left half of x)."""
        self.pixels = torch.tensor([[4 * x.shape[3], 8 * x.shape[2]]]) if size is None else size
        if not isinstance(context, dict):
            context = self.project(context)
        return super().forward(x, t, context, mask, features)

def dreamlite_config(raw: dict) -> tuple[model.UNetConfig, int, int]:
    """Their config.json -> (model.UNetConfig, text_dim, size_freqs)."""
    if raw.get("_class_name", "") != "DreamLiteUNetModel":
        raise UserError("config.json describes no DreamLiteUNetModel")
    widths, depth = raw["block_out_channels"], raw["transformer_layers_per_block"]
    cfg = model.UNetConfig(
        in_channels=raw["in_channels"], widths=list(widths), context_dim=raw["cross_attention_dim"],
        depth_down=list(depth), depth_mid=depth[-1], depth_up=[*depth[:0:-1], 0],
        skip_lowest=True, ff_mult=raw["ff_mult"], kv_heads=raw["num_kv_heads"], rope=0.0,
        head_dim=widths[0] // raw["attention_head_dim"][0], groups=raw["norm_num_groups"],
        time_freqs=widths[0], time_dim=4 * widths[0])
    return cfg, raw["encoder_hid_dim"], raw["addition_time_embed_dim"]

NAMES = [       # (pattern of diffusers, ours)
    (r"^time_embedding", "time"), (r"^add_embedding", "size"), (r"^encoder_hid_proj", "project"),
    (r"\.linear_1", ".0"), (r"\.linear_2", ".2"), (r"^conv_norm_out", "norm_out"),
    (r"^(down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.conv", r"\1sample.\2"),
    (r"^(down|mid|up)_blocks?", r"\1"), (r"transformer_blocks", "blocks"),
    (r"\.resnets\.(\d)", r".\1.res"), (r"\.attentions\.(\d)", r".\1.transformer"),
    (r"\.time_emb_proj", ".time"), (r"\.conv_shortcut", ".shortcut"), (r"\.depthwise", ".0"),
    (r"\.pointwise", ".1"), (r"\.attn1", ".self_attn"), (r"\.attn2", ".cross_attn"),
    (r"\.to_q", ".q"), (r"\.to_out\.0", ".out"), (r"\.norm_([qk])\.", r".\1_norm."),
    (r"\.ff\.net\.0\.proj", ".ff.up"), (r"\.ff\.net\.2", ".ff.out"),
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

def load_dreamlite(source) -> DreamLite:
    """From a directory, or hf:OWNER/NAME. UserError names what is missing or damaged."""
    folder = hub_folder(source, "unet")
    net = DreamLite(*dreamlite_config(read_description(folder)))
    return load_into(net, dreamlite_tensors(hub_tensors(folder)), str(folder)).eval()

if __name__ == "__main__":
    with friendly():
        dreamlite = load_dreamlite(sys.argv[1] if sys.argv[1:] else "models/dreamlite")
        print(f"{model.count_params(dreamlite) / 1e6:.2f} M parameters; {dreamlite.cfg}")
