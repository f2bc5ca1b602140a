"""Siblings' weights: DreamLite's published UNet (ByteDance, arXiv 2603.28713; diffusers' DreamLiteUNetModel) in our UNet.

    UNet.from_pretrained(DIR)          DIR holds `unet/config.json` and its safetensors, or is that folder; or a hub id
    python convert.py DIR              its config in our words, its parameters

DreamLite is of SnapGen's family: the same widths, heads, separable convolutions, one key/value head, q and k normed. What differs from the final SnapGen:
- depths 1, 2, 4 down and 4, 2, 0 up (SnapGen 2, 2, 4 and 4, 2, 0), encoder skips at the lowest stage too, no rotary embedding;
- a residual block's hidden width is 2 C_out, not 2 max(C_in, C_out); its depthwise convolutions have no bias; the stages change size by plain 3x3 convolutions;
- where there is no self-attention, its norm stays and *replaces* the residual: x = norm(x). A slip, kept because the weights were trained with it;
- the text states (Qwen3-VL's last, 2048 wide) pass a Linear and an RMSNorm first; the picture's size is embedded and added to the time;
- latents of 4 channels (TAESDXL's); the right half of a picture twice as wide holds the picture to be edited (zeros for text to image); times in [0, 1] as here.
The code of diffusers is Apache-2.0, the published weights are CC BY-NC 4.0.

B batch | C channels | L text tokens | D width
"""
import json, re, sys

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
        return super().forward(x if self.self_attn is not None else self.norm1(x), context, mask, rope)     # (B, N, C)


class DreamLite(UNet):
    def __init__(self, cfg: UNetConfig, text_dim: int, size_freqs: int):
        super().__init__(cfg)
        separable = lambda C_in, C_out: nn.Sequential(nn.Conv2d(C_in, C_in, 3, padding=1, groups=C_in, bias=False), nn.Conv2d(C_in, C_out, 1, bias=False))
        for m in list(self.modules()):
            if isinstance(m, ResBlock):
                C_in, C_out = m.norm1.num_channels, m.conv2[1].out_channels
                m.conv1, m.conv2 = separable(C_in, 2 * C_out), separable(2 * C_out, C_out)
                m.time, m.norm2 = nn.Linear(cfg.time_dim, 2 * C_out), nn.GroupNorm(cfg.groups, 2 * C_out)
            elif isinstance(m, Transformer):
                m.blocks = nn.ModuleList(DreamLiteBlock(cfg, m.proj_in.in_features, b.self_attn is not None) for b in m.blocks)
        for m in self.modules():
            if isinstance(m, Attention) and cfg.qk_norm:        # theirs adds 1e-5, ours 1e-6
                m.q_norm, m.k_norm = nn.RMSNorm(m.D, eps=1e-5), nn.RMSNorm(m.D, eps=1e-5)
        for resize, stride, widths in ((self.downsample, 2, cfg.widths[:-1]), (self.upsample, 1, cfg.widths[:0:-1])):
            for i, C in enumerate(widths):
                resize[i] = nn.Conv2d(C, C, 3, stride, padding=1)
        self.project = nn.Sequential(nn.Linear(text_dim, cfg.context_dim), nn.RMSNorm(cfg.context_dim, eps=1e-5))
        self.size_freqs, self.pixels = size_freqs, None
        self.size = nn.Sequential(nn.Linear(2 * size_freqs, cfg.time_dim), nn.SiLU(), nn.Linear(cfg.time_dim, cfg.time_dim))

    def embed_time(self, t):
        half = self.size_freqs // 2
        freqs = 10000.0 ** (-torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angle = self.pixels.to(t.device).float().view(-1, 2, 1) * freqs                  # (B or 1, 2, freqs/2): of both sides
        return super().embed_time(t) + self.size(torch.cat([angle.cos(), angle.sin()], -1).flatten(1).to(self.conv_in.weight.dtype))   # (B, time_dim)

    def keys_values(self, context):
        return super().keys_values(self.project(context))

    def forward(self, x, t, context, mask=None, features=(), size=None):
        """As UNet's, with context (B, L, text_dim); size (B, 2): width and height in pixels (None: those of x, whose right half is the picture to edit)."""
        self.pixels = torch.tensor([[4 * x.shape[3], 8 * x.shape[2]]]) if size is None else size      # for embed_time
        return super().forward(x, t, context if isinstance(context, dict) else self.project(context), mask, features)


# ---------------------------------------------------------------------------- from diffusers' config and names
def config_of(raw: dict) -> tuple[UNetConfig, int, int]:
    """Their config.json -> (UNetConfig, width of a text state, sinusoids of a size). UserError names what our layout cannot hold."""
    default = dict(use_sep_conv=True, qk_norm="rms_norm", ff_mult=6, num_kv_heads=1, num_mid_layers=1, norm_num_groups=32, norm_eps=1e-5, act_fn="silu", layers_per_block=2,
                   transformer_layers_per_block=1, attention_head_dim=64, use_linear_projection=False, only_cross_attention=False, flip_sin_to_cos=True, freq_shift=0, downsample_padding=1)
    r = {**default, **raw}
    wanted = dict(use_sep_conv=True, num_mid_layers=1, norm_eps=1e-5, use_linear_projection=True, only_cross_attention=False, encoder_hid_dim_type="text_proj_rms", addition_embed_type="time",
                  flip_sin_to_cos=True, freq_shift=0, downsample_padding=1)
    each = lambda v: [v] * len(r["block_out_channels"]) if isinstance(v, int) else list(v)
    try:
        widths, depth, heads, down, up = r["block_out_channels"], each(r["transformer_layers_per_block"]), each(r["attention_head_dim"]), r["down_block_types"], r["up_block_types"]
        plain = lambda kind: "NoSelfAttn" in kind or "RemoveSelfAttn" in kind
        alike = all("CrossAttn" not in k or plain(k) == plain(down[-1 - i]) for i, k in enumerate(up))
        odd = [f"{k}={r.get(k)}" for k, v in wanted.items() if r.get(k) != v] + ["head widths"] * (len({C // n for C, n in zip(widths, heads)}) > 1) + ["block types"] * (not alike)
        if odd:
            raise UserError(f"this DreamLite differs from the published one in {', '.join(odd)}: convert.py does not hold that")
        return UNetConfig(r["in_channels"], list(widths), r["cross_attention_dim"], [d if "CrossAttn" in k else 0 for d, k in zip(depth, down)], depth[-1],
                          [d if "CrossAttn" in k else 0 for d, k in zip(depth[::-1], up)], r["layers_per_block"], [not plain(k) for k in down], skip_lowest=True, expansion=2, ff_mult=r["ff_mult"],
                          head_dim=widths[0] // heads[0], kv_heads=r["num_kv_heads"] or 0, qk_norm=r["qk_norm"] == "rms_norm", rope=0.0, time_freqs=widths[0], time_dim=4 * widths[0],
                          act=r["act_fn"], groups=r["norm_num_groups"]), r["encoder_hid_dim"], r["addition_time_embed_dim"]
    except KeyError as e:
        raise UserError(f"the config.json of a DreamLiteUNetModel has {e}; this one has not: download it again")


NAMES = [(r"^time_embedding\.linear_1", "time.0"), (r"^time_embedding\.linear_2", "time.2"), (r"^add_embedding\.linear_1", "size.0"), (r"^add_embedding\.linear_2", "size.2"),
         (r"^encoder_hid_proj", "project"), (r"^conv_norm_out", "norm_out"), (r"^(down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.conv", r"\1sample.\2"),
         (r"^(down|up)_blocks\.(\d)\.resnets\.(\d)", r"\1.\2.\3.res"), (r"^(down|up)_blocks\.(\d)\.attentions\.(\d)", r"\1.\2.\3.transformer"),
         (r"^mid_block\.resnets\.(\d)", r"mid.\1.res"), (r"^mid_block\.attentions\.(\d)", r"mid.\1.transformer"), (r"\.time_emb_proj", ".time"), (r"\.conv_shortcut", ".shortcut"),
         (r"\.depthwise", ".0"), (r"\.pointwise", ".1"), (r"\.transformer_blocks", ".blocks"), (r"\.attn1", ".self_attn"), (r"\.attn2", ".cross_attn"), (r"\.to_q", ".q"),
         (r"\.to_out\.0", ".out"), (r"\.norm_([qk])\.", r".\1_norm."), (r"\.ff\.net\.0\.proj", ".ff.up"), (r"\.ff\.net\.2", ".ff.out")]


def renamed(state: dict) -> dict:
    out = {}
    for key, value in state.items():
        for pattern, new in NAMES:
            key = re.sub(pattern, new, key)
        out[key] = value
    for key in [k for k in out if k.endswith(".to_k.weight")]:  # ours is one matrix
        out[key.replace(".to_k.", ".kv.")] = torch.cat([out.pop(key), out.pop(key.replace(".to_k.", ".to_v."))])
    return out


def from_pretrained(source, device="cpu") -> DreamLite:
    folder = hub_folder(source, "unet", f"`hf download carlofkl/DreamLite-base --revision diffusers --include 'unet/*' --local-dir {source}` downloads DreamLite's, 0.78 GB at 2 bytes a weight")
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{folder} has no whole config.json ({type(e).__name__}): it is no diffusers model, or its download is incomplete")
    if raw.get("_class_name") != "DreamLiteUNetModel":
        raise UserError(f"{folder} holds a {raw.get('_class_name', 'checkpoint of ours')}: UNet.from_pretrained knows DreamLiteUNetModel alone; our own checkpoints are read by sample.load_model")
    with torch.device("meta"):
        net = DreamLite(*config_of(raw))
    return load_into(net.to_empty(device=device), renamed(hub_tensors(folder)), str(folder)).eval()


if __name__ == "__main__":
    with friendly():
        if len(sys.argv) != 2:
            raise UserError("usage: python convert.py DIR, a directory with DreamLite's unet")
        net = from_pretrained(sys.argv[1])
        print(f"{count_params(net) / 1e6:.2f} M parameters; {net.cfg}")
