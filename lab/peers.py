"""The networks that lab.bench measures: ours at the paper's size, and its peers.

`diffusers` builds the peers at their published sizes (only benchmarks and tests need it). Weights
are random: time does not depend on them."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from decoder import AutoencoderConfig, tiny_decoder
from model import PRESETS, UNet

SDXL = {
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DREAMLITE = {   # its layout, with our channels, text width and feed-forward width
    "in_channels": 16, "out_channels": 16, "block_out_channels": (256, 512, 896),
    "attention_head_dim": (4, 8, 14), "transformer_layers_per_block": (1, 2, 4),
    "cross_attention_dim": 2304, "use_linear_projection": True, "ff_mult": 3, "num_kv_heads": 1,
}
SANA = {
    "in_channels": 32, "num_layers": 28, "num_attention_heads": 36, "attention_head_dim": 32,
    "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152, "caption_channels": 2304, "mlp_ratio": 2.5,
}
SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}
DC_AE = {
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "upsample_block_type": "interpolate",
}
SD3_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
}

def call_diffusers(net, x, t, text, **more):
    return net(x, timestep=1000 * t, encoder_hidden_states=text, **more).sample

def call_sdxl(net, x, t, text):
    more = {"text_embeds": x.new_zeros(len(x), 1280), "time_ids": x.new_zeros(len(x), 6)}
    return call_diffusers(net, x, t, text, added_cond_kwargs=more)

def call_sd3(net, x, t, text):
    return call_diffusers(net, x, t, text, pooled_projections=x.new_zeros(len(x), 2048))

@dataclass
class Peer:
    """A network to measure: how it is made, what it reads, how it is called."""
    name: str
    make: Callable                  # () -> module
    channels: int                   # of the latents
    factor: int = 8                 # pixels of a latent's side
    text: tuple[int, int] | None = None     # (tokens, width); None: a decoder
    call: Callable = nn.Module.__call__     # (module, *inputs) -> output
    nhwc: bool = False              # the memory layout that was faster on a CPU

    def inputs(self, size: int) -> tuple:
        """Random inputs for one picture of `size` pixels, on the device of the context."""
        x = torch.randn(1, self.channels, size // self.factor, size // self.factor)
        if self.text is None:
            return (x,)
        return x, torch.full((1,), 0.5), torch.randn(1, *self.text)

    def work(self, size: int) -> dict:
        """Parameters, and FLOPs (2 a multiply-add) of one call.

        On the meta device, because the counter takes attention on CPU tensors for nothing."""
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            net = self.make()
            self.call(net, *self.inputs(size))
        params = sum(p.numel() for p in net.parameters())
        return {"params": params, "flops": counter.get_total_flops()}

def published(kind: str, part: str = "", **config) -> Callable:
    """() -> a model of diffusers, or a part of it, at random weights."""
    def make():
        import diffusers
        net = getattr(diffusers, kind)(**config)
        return getattr(net, part) if part else net
    return make

DENOISERS = {    # 333 tokens: CLIP's 77, and 256 of Gemma or T5
    "ours": Peer("SnapGen, 379 M (ours)", partial(UNet, PRESETS["t2i"]), 16, 8, (333, 2304)),
    "dreamlite": Peer("DreamLite's layout, our widths",
                      published("DreamLiteUNetModel", **DREAMLITE),
                      16, 8, (333, 2304), call_diffusers),
    "sd15": Peer("SD 1.5", published("UNet2DConditionModel", cross_attention_dim=768),
                 4, 8, (77, 768), call_diffusers, nhwc=True),
    "sdxl": Peer("SDXL", published("UNet2DConditionModel", **SDXL),
                 4, 8, (77, 2048), call_sdxl, nhwc=True),
    "sana": Peer("SANA 0.6 B", published("SanaTransformer2DModel", **SANA),
                 32, 32, (300, 2304), call_diffusers),
    "sd3": Peer("SD3-Medium", published("SD3Transformer2DModel", **SD3),
                16, 8, (333, 4096), call_sd3),
}
DECODERS = {
    "ours": Peer("tiny decoder (ours)", partial(tiny_decoder, AutoencoderConfig()), 16, nhwc=True),
    "taesd3": Peer("TAESD3", published("AutoencoderTiny", "decoder", latent_channels=16), 16,
                   nhwc=True),
    "dcae": Peer("DC-AE f32 (SANA)", published("AutoencoderDC", "decoder", **DC_AE), 32, 32),
    "sd3": Peer("SD3's decoder", published("AutoencoderKL", "decoder", **SD3_VAE), 16),
}
