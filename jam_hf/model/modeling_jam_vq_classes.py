# Licensed under the Apache License, Version 2.0.
"""The stock VQ models that a JamVQModel runs: diffusers' VQModel, and transformers' Janus and Emu3 classes.

It knows how each is built, and how pixels become latents and codes become pixels in it; it does not know token ids,
checks no input and decides no precision (modeling_jam_vq.py).
Shape suffixes: B pictures, C channels, H/W pixels, G grid side, E codebook vector, K codes in the codebook, X = B*G*G.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Emu3VQVAE, JanusVQVAE, PreTrainedModel
from transformers import initialization as init

from .configuration_jam_vq import JamVQConfig


class JamVQLinear(nn.Module):
    """A linear layer of the tokenizer's attention: `nn.Linear`'s parameters and arithmetic, but no `nn.Linear`.

    Whatever adapts or quantises "all linear layers" (peft, torchao, bitsandbytes) finds them by that class. The
    tokenizer is frozen and must keep its codes, so it is not found, however the user words the call.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        return F.linear(hidden_states, self.weight, self.bias)


@torch.no_grad()
def init_vq_weights(module: nn.Module) -> bool:
    """PyTorch's own defaults, which diffusers trains its autoencoders from (a plain std of 0.02 starves them).

    Returns:
        whether the module is of a kind that this concerns.
    """
    if isinstance(module, (JamVQLinear, nn.Linear, nn.Conv2d, nn.Conv3d)):
        init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        if module.bias is not None:
            fan_in = module.weight[0].numel()
            init.uniform_(module.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
    elif isinstance(module, nn.Embedding):
        init.uniform_(module.weight, -1 / module.num_embeddings, 1 / module.num_embeddings)
    else:
        return False
    return True


class _InsideJam(PreTrainedModel):
    """What a `PreTrainedModel` inside a JamVQModel must not take from the JAM around it, or impose on it."""

    _no_split_modules: list[str] = []

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The stock default, whatever the decoders are asked to use: theirs may need half precision."""
        return "sdpa"

    def _init_weights(self, module: nn.Module) -> None:
        if not init_vq_weights(module):
            super()._init_weights(module)


class JamJanusVQVAE(_InsideJam, JanusVQVAE):
    """transformers' `JanusVQVAE` inside a JamVQModel."""


class JamEmu3VQVAE(_InsideJam, Emu3VQVAE):
    """transformers' `Emu3VQVAE` inside a JamVQModel."""


@dataclass(frozen=True)
class VQClass:
    """build: the model of a config. latents: `[B, C, H, W]` -> `[B, E, G, G]`, before quantisation. nearest: `[X, E]`,
    `[K, E]` -> `[X]`, each latent's code. pixels: codes `[B, G, G]` -> `[B, C, H, W]`.

    `latents` and `nearest` are the halves of the class' own `encode`. They are apart because the stock quantisers read
    `embedding.weight` themselves, which is empty where the weights are offloaded.
    """

    build: Callable[[JamVQConfig], nn.Module]
    latents: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    nearest: Callable[[torch.Tensor, torch.Tensor], torch.LongTensor]
    pixels: Callable[[nn.Module, torch.LongTensor], torch.Tensor]


def _contiguous(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A hook behind diffusers' attention: its result is laid out in memory as its input was.

    diffusers leaves it channels last, and so are all convolutions that follow. On a CPU that costs accuracy: with
    Chameleon's architecture, pixels were 2.7e-5 off those of a decoder in float64, and are 5e-6 off so (taming's own:
    4e-6).
    """
    return output.contiguous()


def _diffusers_model(config: JamVQConfig) -> nn.Module:
    """A `diffusers.VQModel`. Imported here: it brings half a dozen packages along, which take longer than all else.

    In a `try`, which transformers passes over when it looks for what remote code needs: once a need was missing there,
    the copied code stays half-copied, and does not load after the package is installed either.
    """
    try:
        from diffusers import VQModel

        from .transformers_private_jam import Attention
    except ImportError as error:  # possible where jam_hf, which would have brought it, is not installed
        raise ImportError(
            f"A JAM needs the package diffusers for its image tokenizer, and it cannot be imported ({error}). Install "
            "it: pip install 'diffusers>=0.35'"
        ) from error
    model = VQModel(**config.diffusers_kwargs())
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(_contiguous)
    # CODEPATH: Chameleon's tokenizer in transformers has no decoder.
    if not config.has_decoder:
        del model.decoder, model.post_quant_conv
    return model


def _diffusers_pixels(vq: nn.Module, codes_BGG: torch.LongTensor) -> torch.Tensor:
    quantised_BEGG = vq.quantize.get_codebook_entry(codes_BGG.reshape(-1), (*codes_BGG.shape, vq.quantize.vq_embed_dim))
    return vq.decode(quantised_BEGG, force_not_quantize=True).sample


def _emu3_latents(vq: Emu3VQVAE, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Emu3's is a video model: a picture is as many equal frames as become one."""
    frames_BTCHW = pixels_BCHW.unsqueeze(1).repeat(1, vq.config.temporal_downsample_factor, 1, 1, 1)
    hidden_BEtGG = vq.quant_conv(vq.encoder(frames_BTCHW).permute(0, 2, 1, 3, 4))
    return hidden_BEtGG.squeeze(2)


def _least_distance(latents_XE: torch.Tensor, codebook_KE: torch.Tensor) -> torch.LongTensor:
    """The arithmetic of transformers' quantisers, in their order: ties and near ties fall as in theirs."""
    squares = latents_XE.square().sum(dim=1, keepdim=True) + codebook_KE.square().sum(dim=1)
    return (squares - 2 * latents_XE @ codebook_KE.t()).argmin(dim=1)


VQ_CLASSES: dict[str, VQClass] = {
    "diffusers": VQClass(
        build=_diffusers_model,
        latents=lambda vq, pixels_BCHW: vq.encode(pixels_BCHW).latents,
        nearest=lambda latents_XE, codebook_KE: torch.cdist(latents_XE, codebook_KE).argmin(dim=1),
        pixels=_diffusers_pixels,
    ),
    "janus": VQClass(
        build=lambda config: JamJanusVQVAE(config.vqvae_config),
        latents=lambda vq, pixels_BCHW: vq.quant_conv(vq.encoder(pixels_BCHW)),
        nearest=_least_distance,
        pixels=lambda vq, codes_BGG: vq.decode(codes_BGG.flatten(1)),
    ),
    "emu3": VQClass(
        build=lambda config: JamEmu3VQVAE(config.vqvae_config),
        latents=_emu3_latents,
        nearest=_least_distance,
        pixels=lambda vq, codes_BGG: vq.decode(codes_BGG),
    ),
}


__all__ = ["VQ_CLASSES", "JamVQLinear", "VQClass", "init_vq_weights"]
