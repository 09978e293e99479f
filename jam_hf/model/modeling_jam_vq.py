"""The image tokenizer of a JAM: pixels to codes and codes to pixels, by `diffusers.VQModel`.

It knows codes (0..K-1) and pixels only: token ids, offsets and `<break>` are the business of modeling_jam.py.
Shape suffixes: B pictures, C channels, H/W pixels, G grid side, N = G*G codes, E codebook vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import torch_compilable_check

from .configuration_jam import JamVQConfig


try:
    from diffusers import VQModel
except ImportError as error:  # possible where jam_hf, which would have brought it, is not installed
    raise ImportError(
        f"A JAM needs the package diffusers for its image tokenizer, and it cannot be imported ({error}). Install it: "
        "pip install 'diffusers>=0.35'"
    ) from error


class JamVQLinear(nn.Module):
    """A linear layer of the tokenizer's attention: `nn.Linear`'s parameters and arithmetic, but no `nn.Linear`.

    Whatever adapts or quantises "all linear layers" (peft, torchao, bitsandbytes) finds them by that class. The tokenizer is
    frozen and must keep its codes, so it is not found, however the user words the call.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        return F.linear(hidden_states, self.weight, self.bias)


class JamVQModel(PreTrainedModel):
    """VQ-VAE image tokenizer (paper: Gafni et al. 2022) around a stock `diffusers.VQModel`, which is `self.vq`.

    Codes are read in raster order: top row first, left to right.
    """

    config: JamVQConfig
    config_class = JamVQConfig
    base_model_prefix = "vq_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["JamVQModel"]
    # diffusers chooses how its one attention layer is computed: whatever the decoders are asked to use is fine here.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: JamVQConfig):
        super().__init__(config)
        self.vq = VQModel(**config.diffusers_kwargs())
        for module in list(self.vq.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, JamVQLinear(child))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own defaults, which diffusers trains its autoencoders from (a plain std of 0.02 starves them)."""
        if isinstance(module, (JamVQLinear, nn.Conv2d)):
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
        return self(pixel_values, return_codes=True)

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
        return self(codes=codes)

    @torch.no_grad()
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        codes: torch.LongTensor | None = None,
        return_codes: bool = False,
    ) -> torch.Tensor:
        """Reconstruct pixels `[B, C, H, W]` through the codes; for training, use `self.vq` itself.

        `encode` and `decode`, which check their input, are its two halves (`return_codes`, `codes`). They come through here
        because offloading, device maps and FSDP reach weights by hooks around `forward`.
        """
        device = self.device
        with torch.autocast(device.type if device.type != "meta" else "cpu", enabled=False):
            if codes is None:
                self._check_pixels(pixel_values)
                codes = self._nearest_codes(self._moved(pixel_values))
                if return_codes:
                    return codes
            codes, grid = self._moved(codes), self.config.grid_size
            size = self.vq.quantize.vq_embed_dim
            quantised_BEGG = self.vq.quantize.get_codebook_entry(codes.reshape(-1), (codes.shape[0], grid, grid, size))
            return self.vq.decode(quantised_BEGG, force_not_quantize=True).sample

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the weights' device; where they are offloaded, the hooks of each module move its input."""
        return tensor if self.device.type == "meta" else tensor.to(self.device)

    def _nearest_codes(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """`[B, C, H, W]` -> `[B, N]`: what `diffusers.VectorQuantizer` finds, with the codebook read through its module.

        diffusers reads `embedding.weight` itself, which is empty where the weights are offloaded.
        """
        latents_BEGG = self.vq.encode(pixel_values.to(self.dtype)).latents
        latents_XE = latents_BEGG.permute(0, 2, 3, 1).reshape(-1, latents_BEGG.shape[1])
        codebook_KE = self.vq.quantize.embedding(torch.arange(self.config.num_vq_embeddings, device=latents_XE.device))
        return torch.cdist(latents_XE, codebook_KE).argmin(dim=1).view(latents_BEGG.shape[0], -1)


__all__ = ["JamVQModel"]
