"""The networks that lab.bench measures: ours at the paper's size, and its peers.

`diffusers` builds the peers at their published sizes (only benchmarks and tests need it).
Weights are random: time does not depend on them. Work is counted on the meta device: on CPU tensors
PyTorch counts attention as nothing.

B batch | C channels | L text tokens | D text width | size: pixels of the picture's side
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from common import UserError
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
PIXART = {
    "sample_size": 128, "cross_attention_dim": 1152, "caption_channels": 4096,
    "use_additional_conditions": False, "norm_elementwise_affine": False, "norm_eps": 1e-6,
}
SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}
DC_AE = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in {
    "block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "qkv_multiscales": ((), (), (), (5,), (5,), (5,))}.items()}
DC_AE |= {"encoder_layers_per_block": (2, 2, 2, 3, 3, 3), "downsample_block_type": "Conv",
          "upsample_block_type": "interpolate"}
SD3_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
}

# ------------------------------------------------------------------------- how each is called
def call_plain(net, *inputs):
    return net(*inputs)

def call_diffusers(net, x, t, text):
    return net(x, 1000 * t, text).sample

def call_sdxl(net, x, t, text):
    extra = {"text_embeds": x.new_zeros(len(x), 1280), "time_ids": x.new_zeros(len(x), 6)}
    return net(x, 1000 * t, text, added_cond_kwargs=extra).sample

def call_sana(net, x, t, text):
    return net(x, text, 1000 * t).sample

def call_pixart(net, x, t, text):
    extra = {"resolution": None, "aspect_ratio": None}
    return net(x, text, 1000 * t, added_cond_kwargs=extra).sample

def call_sd3(net, x, t, text):
    return net(x, text, x.new_zeros(len(x), 2048), 1000 * t).sample

@dataclass
class Peer:
    """A network to measure: how it is made, what it reads, how it is called."""

    name: str
    make: Callable                  # () -> module
    channels: int                   # of the latents
    factor: int = 8                 # pixels of a latent's side
    text: tuple[int, int] | None = None     # (L, D); None: a decoder, which reads latents alone
    call: Callable = call_plain     # (module, *inputs) -> output
    conv: bool = True               # made of convolutions: the faster memory layout is taken

    def inputs(self, size: int, B: int) -> tuple:
        """Random inputs for B pictures, on the device of the context."""
        x = torch.randn(B, self.channels, size // self.factor, size // self.factor)
        if self.text is None:
            return (x,)
        return x, torch.full((B,), 0.5), torch.randn(B, *self.text)

    def work(self, size: int, batch: int = 1) -> dict:
        """Parameters, FLOPs (2 a multiply-add) and bytes of one call, counted on the meta device.

        Bytes: inputs, outputs and weights of every module, in fp32, each moved once.
        """
        moved = []

        def count(module, inputs, out):
            tensors = (*inputs, out, *module.parameters())
            moved.extend(4 * x.numel() for x in tensors if torch.is_tensor(x))

        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            net = self.make()
            for module in net.modules():
                if not list(module.children()):
                    module.register_forward_hook(count)
            self.call(net, *self.inputs(size, batch))
        params = sum(p.numel() for p in net.parameters())
        return {"params": params, "flops": counter.get_total_flops(), "bytes": sum(moved)}

def make_published(kind: str, part: str = "", **config):
    """A model of diffusers, or a part of it, at random weights."""
    try:
        import diffusers
    except ImportError:
        raise UserError("the peers come from diffusers: `pip install diffusers`, or ask for "
                        "--nets ours") from None
    net = getattr(diffusers, kind)(**config)
    return getattr(net, part) if part else net

def make_ours():
    return UNet(PRESETS["t2i"])

def make_our_decoder():
    return tiny_decoder(AutoencoderConfig())

DENOISERS = {
    "ours": Peer("SnapGen, 379 M (ours)", make_ours, 16, 8, (333, 2304)),   # CLIP's 77, Gemma's 256
    "dreamlite": Peer("DreamLite's layout, our widths",
                      partial(make_published, "DreamLiteUNetModel", **DREAMLITE),
                      16, 8, (333, 2304), call_diffusers),
    "sd15": Peer("SD 1.5", partial(make_published, "UNet2DConditionModel", cross_attention_dim=768),
                 4, 8, (77, 768), call_diffusers),
    "sdxl": Peer("SDXL", partial(make_published, "UNet2DConditionModel", **SDXL),
                 4, 8, (77, 2048), call_sdxl),
    "sana": Peer("SANA 0.6 B", partial(make_published, "SanaTransformer2DModel", **SANA),
                 32, 32, (300, 2304), call_sana),
    "pixart": Peer("PixArt-Sigma", partial(make_published, "PixArtTransformer2DModel", **PIXART),
                   4, 8, (300, 4096), call_pixart, conv=False),
    "sd3": Peer("SD3-Medium", partial(make_published, "SD3Transformer2DModel", **SD3),
                16, 8, (333, 4096), call_sd3, conv=False),
}
DECODERS = {
    "ours": Peer("tiny decoder (ours)", make_our_decoder, 16),
    "taesd3": Peer("TAESD3", partial(make_published, "AutoencoderTiny", "decoder",
                                     latent_channels=16), 16),
    "dcae": Peer("DC-AE f32 (SANA)", partial(make_published, "AutoencoderDC", "decoder", **DC_AE),
                 32, 32),
    "sd3": Peer("SD3's decoder", partial(make_published, "AutoencoderKL", "decoder", **SD3_VAE),
                16),
}
