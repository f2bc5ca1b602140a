"""The networks that bench.py measures: ours at the paper's size, and its peers, which `diffusers` builds at their published sizes (tests and benchmarks alone need it).

Each is a Net: a name, what makes it, what it takes for a picture of `size` pixels with batch B, and how it is called. Weights are random: time does not depend on them.
"""
from dataclasses import dataclass, replace
from typing import Callable

import torch

import stripes
from common import UserError
from decoder import AutoencoderConfig, tiny_decoder
from model import PRESETS, UNet

SDXL = dict(block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816, use_linear_projection=True)
DREAMLITE = dict(in_channels=16, out_channels=16, block_out_channels=(256, 512, 896), attention_head_dim=(4, 8, 14), transformer_layers_per_block=(1, 2, 4), cross_attention_dim=2304,
                 use_linear_projection=True, ff_mult=3, num_kv_heads=1)      # its layout at our channels, text and feed-forward width
SD3 = dict(sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
           pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=192)
SANA = dict(in_channels=32, num_layers=28, num_attention_heads=36, attention_head_dim=32, num_cross_attention_heads=16, cross_attention_head_dim=72, cross_attention_dim=1152,
            caption_channels=2304, mlp_ratio=2.5)
DC_AE = dict(encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
             encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
             downsample_block_type="Conv", upsample_block_type="interpolate")
SD3_VAE = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16)


@dataclass
class Net:
    name: str
    make: Callable          # () -> module
    inputs: Callable        # (size, B) -> tensors, on the device of the context
    call: Callable = lambda net, *x: net(*x)
    conv: bool = True       # of convolutions: the faster of both memory layouts is taken


def text(B, L, D):
    return torch.randn(B, L, D)


def denoisers(wanted=()) -> dict[str, Net]:
    """All, or the wanted ones. UserError where diffusers is not installed."""
    x = lambda size, B, C=16, f=8: torch.randn(B, C, size // f, size // f)
    half = lambda B: torch.full((B,), 0.5)
    ours = {"ours": Net("SnapGen, 379 M (ours)", lambda: UNet(PRESETS["t2i"]), lambda s, B: (x(s, B), half(B), text(B, 333, 2304)))}
    if set(wanted) == {"ours"}:
        return ours
    try:
        import diffusers as d
    except ImportError:
        raise UserError("the peers come from diffusers: `pip install diffusers`, or ask for --nets ours")
    theirs = lambda net, x, t, c: net(x, 500 * t, c).sample
    sizes = lambda net, x, t, c: net(x, 500 * t, c, added_cond_kwargs={"text_embeds": x.new_zeros(len(x), 1280), "time_ids": x.new_zeros(len(x), 6)}).sample
    return ours | {
        "dreamlite": Net("DreamLite's layout, our widths", lambda: d.DreamLiteUNetModel(**DREAMLITE), ours["ours"].inputs, theirs),
        "sd15": Net("SD 1.5", lambda: d.UNet2DConditionModel(cross_attention_dim=768), lambda s, B: (x(s, B, 4), half(B), text(B, 77, 768)), theirs),
        "sdxl": Net("SDXL", lambda: d.UNet2DConditionModel(**SDXL), lambda s, B: (x(s, B, 4), half(B), text(B, 77, 2048)), sizes),
        "sana": Net("SANA 0.6 B", lambda: d.SanaTransformer2DModel(**SANA), lambda s, B: (x(s, B, 32, 32), half(B), text(B, 300, 2304)), lambda net, x, t, c: net(x, c, 500 * t).sample),
        "pixart": Net("PixArt-Sigma", lambda: d.PixArtTransformer2DModel(sample_size=128, cross_attention_dim=1152, caption_channels=4096, use_additional_conditions=False, norm_elementwise_affine=False, norm_eps=1e-6),
                      lambda s, B: (x(s, B, 4), half(B), text(B, 300, 4096)),
                      lambda net, x, t, c: net(x, c, 500 * t, added_cond_kwargs={"resolution": None, "aspect_ratio": None}).sample, conv=False),
        "sd3": Net("SD3-Medium", lambda: d.SD3Transformer2DModel(**SD3), lambda s, B: (x(s, B), half(B), text(B, 333, 4096)),
                   lambda net, x, t, c: net(x, c, x.new_zeros(len(x), 2048), 500 * t).sample, conv=False)}


def decoders(wanted=()) -> dict[str, Net]:
    z = lambda C, f: lambda size, B: (torch.randn(B, C, size // f, size // f),)
    ours = Net("tiny decoder (ours)", lambda: tiny_decoder(AutoencoderConfig()), z(16, 8))
    nets = {"ours": ours, "ours_small": replace(ours, name="the same in stripes (--low-memory)", call=stripes.decode)}
    if wanted and all(w.startswith("ours") for w in wanted):
        return nets
    try:
        import diffusers as d
    except ImportError:
        raise UserError("the peers come from diffusers: `pip install diffusers`, or ask for --nets ours")
    return nets | {"taesd3": Net("TAESD3", lambda: d.AutoencoderTiny(latent_channels=16).decoder, z(16, 8)), "dcae": Net("DC-AE f32 (SANA)", lambda: d.AutoencoderDC(**DC_AE).decoder, z(32, 32)),
                   "sd3": Net("SD3's decoder", lambda: d.AutoencoderKL(**SD3_VAE).decoder, z(16, 8))}
