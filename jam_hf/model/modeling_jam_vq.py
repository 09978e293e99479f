# Licensed under the Apache License, Version 2.0.
"""The image tokenizer of a JAM: pixels to codes and codes to pixels, by a stock VQ model (modeling_jam_vq_classes.py).

It knows codes (0..K-1) and pixels only: token ids, offsets and `<break>` are the business of modeling_jam.py.
Shape suffixes: B pictures, C channels, H/W pixels, G grid side, N = G*G codes, E codebook vector, K codes of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .configuration_jam_vq import JamVQConfig
from .modeling_jam_vq_classes import VQ_CLASSES, JamVQLinear, init_vq_weights
from .transformers_private_jam import torch_compilable_check


class JamVQModel(PreTrainedModel):
    """VQ-VAE image tokenizer (paper: Gafni et al. 2022) around a stock VQ model, which is `self.vq`.

    That is a `diffusers.VQModel` or, where `config.vqvae_config` says so, transformers' `JanusVQVAE` or `Emu3VQVAE`.
    Codes are read in raster order: top row first, left to right.
    """

    config: JamVQConfig
    config_class = JamVQConfig
    base_model_prefix = "vq_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["JamVQModel"]
    # The stock model chooses how its attention is computed: whatever the decoders are asked to use is fine here.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: JamVQConfig):
        super().__init__(config)
        self.vq = VQ_CLASSES[config.vq_class].build(config)
        for module in list(self.vq.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, JamVQLinear(child))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if not init_vq_weights(module):
            super()._init_weights(module)

    def train(self, mode: bool = True) -> JamVQModel:
        """As in `nn.Module`; transformers' classes stay as for inference: batch norms would change the codes."""
        super().train(mode)
        self.vq.train(mode and self.config.vq_class == "diffusers")
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> JamVQModel:
        """`model.to(torch.bfloat16)`, `.half()` and their like move the tokenizer, but leave its precision.

        In half precision near ties between codes would flip, and the search for the nearest does not run everywhere.
        """

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(keep_dtype, recurse)

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        expected = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            found = pixel_values.dtype if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
            raise ValueError(
                f"pixel_values must be a float tensor in [-1, 1], got {found}. JamImageProcessor makes them."
            )
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected or not len(pixel_values):
            raise ValueError(
                f"pixel_values must have the shape [pictures, {', '.join(map(str, expected))}], got "
                f"{list(pixel_values.shape)}. JamImageProcessor makes pictures of the right size."
            )
        largest, (low, high) = pixel_values.abs().max(), self.config.pixel_range
        torch_compilable_check(
            largest <= 1.01 * max(-low, high),  # not so for NaN either
            lambda: (
                f"pixel_values must be in [{low:g}, {high:g}], got a value of size {largest:g}. JamImageProcessor "
                "scales pictures so."
            ),
        )

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Pixels to codes.

        Args:
            pixel_values: float `[B, C, H, W]` in [-1, 1], H = W = `config.sample_size`.
        Returns:
            int64 `[B, N]`, raw codes 0..K-1.
        Raises:
            ValueError: on another shape or dtype, or values outside [-1, 1].
        """
        self._check_pixels(pixel_values)
        return self(pixel_values, return_codes=True)

    @torch.no_grad()
    def decode(self, codes: torch.LongTensor) -> torch.Tensor:
        """Codes to pixels.

        Args:
            codes: int64 `[B, N]`, raw codes 0..K-1.
        Returns:
            float `[B, C, H, W]`, about [-1, 1] (not clamped).
        Raises:
            ValueError: if a picture has not exactly N codes, a code is outside the codebook, or there is no decoder.
        """
        if codes.dim() != 2 or codes.shape[1] != self.config.image_seq_length:
            raise ValueError(
                f"codes must have the shape [pictures, {self.config.image_seq_length}] (a picture has exactly that "
                f"many codes), got {list(codes.shape)}."
            )
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.config.num_vq_embeddings):
            raise ValueError(
                f"codes must be in 0..{self.config.num_vq_embeddings - 1}, got {int(codes.min())}..{int(codes.max())}. "
                "Token ids must have `image_token_offset` subtracted first."
            )
        return self(codes=codes)

    @torch.no_grad()
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        codes: torch.LongTensor | None = None,
        return_codes: bool = False,
    ) -> torch.Tensor:
        """Reconstruct pixels `[B, C, H, W]` through the codes; for training, use `self.vq` itself.

        `encode` and `decode`, which check their input, are its two halves (`return_codes`, `codes`). They come through
        here because offloading, device maps and FSDP reach weights by hooks around `forward`.
        """
        if not (return_codes or self.config.has_decoder):
            raise ValueError(
                "This image tokenizer can encode pictures but not decode codes: it was made from weights without a "
                "decoder (transformers' Chameleon). Convert the original vqgan.ckpt, which has both: jam-hf convert-vq."
            )
        device = self.device
        with torch.autocast(device.type if device.type != "meta" else "cpu", enabled=False):
            if codes is None:
                self._check_pixels(pixel_values)
                codes = self._nearest_codes(self._moved(pixel_values))
                if return_codes:
                    return codes
            codes_BN, grid = self._moved(codes), self.config.grid_size
            return VQ_CLASSES[self.config.vq_class].pixels(self.vq, codes_BN.reshape(-1, grid, grid))

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the weights' device; where they are offloaded, the hooks of each module move its input."""
        return tensor if self.device.type == "meta" else tensor.to(self.device)

    def _nearest_codes(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """`[B, C, H, W]` -> `[B, N]`: what the stock quantiser finds, with the codebook read through its module."""
        stock = VQ_CLASSES[self.config.vq_class]
        latents_BEGG = stock.latents(self.vq, pixel_values.to(self.dtype))
        latents_XE = latents_BEGG.permute(0, 2, 3, 1).reshape(-1, latents_BEGG.shape[1])
        codebook_KE = self.vq.quantize.embedding(torch.arange(self.config.num_vq_embeddings, device=latents_XE.device))
        # CODEPATH: LlamaGen's tokenizer looks for codes by direction; taming, Janus, Emu3 and Chameleon by distance.
        if self.config.codebook_l2_norm:
            latents_XE, codebook_KE = F.normalize(latents_XE, dim=-1), F.normalize(codebook_KE, dim=-1)
        return stock.nearest(latents_XE, codebook_KE).view(latents_BEGG.shape[0], -1)


__all__ = ["JamVQModel"]
