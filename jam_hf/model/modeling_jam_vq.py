"""The image tokenizer of a JAM: pixels to codes and codes to pixels, by `diffusers.VQModel`.

It knows codes (0..K-1) and pixels only: token ids, offsets and `<break>` are the business of modeling_jam.py.
Shape suffixes: B pictures, C channels, H/W pixels, G grid side, N = G*G codes, E codebook vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import VQModel
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import torch_compilable_check

from .configuration_jam import JamVQConfig


class JamVQModel(PreTrainedModel):
    """VQ-VAE image tokenizer (paper: Gafni et al. 2022) around a stock `diffusers.VQModel`, which is `self.vq`.

    Codes are read in raster order: top row first, left to right.
    """

    config: JamVQConfig
    config_class = JamVQConfig
    base_model_prefix = "vq_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["VQModel"]
    # diffusers chooses how its one attention layer is computed: whatever the decoders are asked to use is fine here.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: JamVQConfig):
        super().__init__(config)
        self.vq = VQModel(**config.diffusers_kwargs())
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own defaults, which diffusers trains its autoencoders from (a plain std of 0.02 starves them)."""
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                fan_in = module.weight[0].numel()
                init.uniform_(module.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1 / module.num_embeddings, 1 / module.num_embeddings)
        else:
            super()._init_weights(module)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> JamVQModel:
        """`model.to(torch.bfloat16)`, `.half()` and their like move the tokenizer, but leave it in the precision it has.

        In half precision near ties between codes would flip, and the search for the nearest code does not run everywhere.
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
                f"pixel_values must be a float tensor with values in [-1, 1], got {found}. JamImageProcessor makes them."
            )
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected or not len(pixel_values):
            raise ValueError(
                f"pixel_values must have the shape [pictures, {', '.join(map(str, expected))}], got "
                f"{list(pixel_values.shape)}. JamImageProcessor makes pictures of the right size."
            )
        largest = pixel_values.abs().max()
        torch_compilable_check(
            largest <= 1.01,  # not so for NaN either
            lambda: f"pixel_values must be in [-1, 1], got a value of size {largest:g}. JamImageProcessor scales pictures so.",
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
        latents_BEGG = self.vq.encode(pixel_values.to(self.dtype)).latents
        _, _, (_, _, codes) = self.vq.quantize(latents_BEGG)
        return codes.view(pixel_values.shape[0], -1)

    @torch.no_grad()
    def decode(self, codes: torch.LongTensor) -> torch.Tensor:
        """Codes to pixels.

        Args:
            codes: int64 `[B, N]`, raw codes 0..K-1.
        Returns:
            float `[B, C, H, W]`, about [-1, 1] (not clamped).
        Raises:
            ValueError: if a picture does not have exactly N codes, or a code is outside the codebook.
        """
        if codes.dim() != 2 or codes.shape[1] != self.config.image_seq_length:
            raise ValueError(
                f"codes must have the shape [pictures, {self.config.image_seq_length}] (a picture has exactly that many "
                f"codes), got {list(codes.shape)}."
            )
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.config.num_vq_embeddings):
            raise ValueError(
                f"codes must be in 0..{self.config.num_vq_embeddings - 1}, got {int(codes.min())}..{int(codes.max())}. "
                "Token ids must have `image_token_offset` subtracted first."
            )
        grid, size = self.config.grid_size, self.vq.quantize.embedding.weight.shape[1]
        quantised_BEGG = self.vq.quantize.get_codebook_entry(codes.reshape(-1), (codes.shape[0], grid, grid, size))
        return self.vq.decode(quantised_BEGG, force_not_quantize=True).sample

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Reconstruct pixels `[B, C, H, W]` through the codes; for training, use `self.vq` itself."""
        return self.decode(self.encode(pixel_values))


__all__ = ["JamVQModel"]
