# Licensed under the Apache License, Version 2.0.
"""Configuration of the VQ image tokenizer of a JAM: which class runs it, the size of its pictures, its pixels.

It knows numbers only: nothing here builds a module. What can contradict is checked here, when the config is built.
"""

# No `from __future__ import annotations` here: `strict` checks the types of the fields only where they are no strings.
import os
from typing import TYPE_CHECKING, Any, TypeAlias

from transformers import AutoConfig, PreTrainedConfig

from .remote_code_jam import VQ_AUTO_MAP, add_auto_map
from .transformers_private_jam import SubConfigSpec, strict


# Fields that may be None, or a dict, until the config is built, and are there from then on.
if TYPE_CHECKING:
    Part: TypeAlias = Any
    Derived: TypeAlias = Any
else:
    Part = dict | PreTrainedConfig | None
    Derived = int | None


# transformers' VQ classes, which JamVQModel runs where diffusers has none for the weights, by `model_type`.
VQVAE_CLASSES = {"janus_vqgan": "janus", "emu3_vqgan": "emu3"}


@strict
class JamVQConfig(PreTrainedConfig):
    r"""Arguments of [`diffusers.VQModel`], the image tokenizer inside a JAM, or the config of a class in its place.

    Args:
        sample_size (`int`, *optional*): side of a picture in pixels; pictures are square. Where `None`: 256; with a
            Janus `vqvae_config`, what its `num_patches` says; with an Emu3 one it must be given.
        num_vq_embeddings (`int`, defaults to 8192): number of codes in the codebook (paper: 8192).
        block_out_channels (`list[int]`): channels per level; each level but the last halves the resolution.
        vq_embed_dim (`int`, *optional*): size of a codebook vector, `latent_channels` where `None`.
        has_decoder (`bool`, defaults to `True`): `False` for one that can only encode (transformers' Chameleon).
        vqvae_config (`JanusVQVAEConfig`, `Emu3VQVAEConfig` or `dict`, *optional*): the transformers class to run
            instead of `diffusers.VQModel`. Channels, depth and codebook are then read from it.
        codebook_l2_norm (`bool`, defaults to `False`): with a Janus `vqvae_config`, normalise latents and codebook
            before the nearest code is searched, as LlamaGen does (transformers' class does not).
        image_processing (`dict`, *optional*): how pictures become `pixel_values`, as arguments of [`JamImageProcessor`]
            that differ from its own: `resample`, `image_mean`, `image_std`, `rescale_factor`, `size`, `letterbox`, ...
            What the codes were learned from; `fuse` and `convert_vq` read it off the image parent.

        The remaining arguments have the meaning that diffusers gives them. The defaults are our reconstruction of the
        paper's tokenizer (Gafni et al. 2022: 256x256 pixels to 32x32 codes out of 8192); its weights are not public.
    """

    model_type = "jam_vq"
    base_config_key = "vq_config"
    sub_configs_defaults = {
        "vqvae_config": SubConfigSpec(config_class=AutoConfig, model_type="janus_vqgan", optional=True)
    }

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: list[str] | tuple[str, ...] | None = None
    up_block_types: list[str] | tuple[str, ...] | None = None
    block_out_channels: list[int] | tuple[int, ...] = (128, 128, 256, 512)
    layers_per_block: int = 2
    act_fn: str = "silu"
    latent_channels: int = 256
    sample_size: Derived = None
    num_vq_embeddings: int = 8192
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None
    norm_type: str = "group"
    mid_block_add_attention: bool = True
    has_decoder: bool = True
    vqvae_config: Part = None
    codebook_l2_norm: bool = False
    image_processing: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vqvae_config, dict) and "model_type" not in self.vqvae_config:
            known = ", ".join(VQVAE_CLASSES)
            raise ValueError(f"JamVQConfig: `vqvae_config` must say its `model_type`, one of {known}.")
        super().__post_init__(**kwargs)
        if self.vqvae_config is not None:
            self._follow_vqvae_config()
        if self.codebook_l2_norm and self.vq_class != "janus":
            raise ValueError(
                "JamVQConfig: `codebook_l2_norm` is for a Janus `vqvae_config`: no other's decoder normalises."
            )
        if self.sample_size is None:
            self.sample_size = 256
        levels = len(self.block_out_channels)
        for name, stock in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if getattr(self, name) is None:
                setattr(self, name, [stock] * levels)
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"JamVQConfig: `{name}` must have one entry per level of `block_out_channels` ({levels}), "
                    f"got {len(getattr(self, name))}."
                )
        if self.num_vq_embeddings < 2:
            raise ValueError(f"JamVQConfig: `num_vq_embeddings` must be at least 2, got {self.num_vq_embeddings}.")
        if self.sample_size < self.downsampling_factor or self.sample_size % self.downsampling_factor:
            raise ValueError(
                f"JamVQConfig: `sample_size` ({self.sample_size}) must be a multiple of the downsampling factor "
                f"{self.downsampling_factor} (= 2 ** (levels - 1), {levels} levels in `block_out_channels`)."
            )

    def _follow_vqvae_config(self) -> None:
        """Read from `vqvae_config` what the two have in common, and check what they could contradict each other in."""
        inner = self.vqvae_config
        if inner.model_type not in VQVAE_CLASSES:
            raise ValueError(
                f"JamVQConfig: `vqvae_config` is a '{inner.model_type}'; supported: {str(tuple(VQVAE_CLASSES))[1:-1]}."
            )
        if inner.double_latent or not self.has_decoder:
            raise ValueError(
                "JamVQConfig: with a `vqvae_config`, `double_latent` must be False and `has_decoder` True."
            )
        common = {
            "in_channels": inner.in_channels,
            "out_channels": inner.out_channels,
            "block_out_channels": [inner.base_channels * multiplier for multiplier in inner.channel_multiplier],
            "layers_per_block": inner.num_res_blocks,
            "latent_channels": inner.latent_channels,
            "vq_embed_dim": inner.embed_dim,
            "num_vq_embeddings": inner.num_embeddings if self.vq_class == "janus" else inner.codebook_size,
        }
        for name, value in common.items():
            given, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            given = list(given) if isinstance(given, tuple) and given != default else given
            if given not in (default, value):
                raise ValueError(f"JamVQConfig: `{name}` is {given}, but `vqvae_config` says {value}. Leave it out.")
            setattr(self, name, value)
        if self.vq_class == "emu3":
            frames = inner.temporal_downsample_factor
            if frames < 1 or frames & (frames - 1):
                raise ValueError(f"JamVQConfig: `temporal_downsample_factor` must be a power of two, got {frames}.")
            if self.sample_size is None:
                raise ValueError("JamVQConfig: Emu3's VQ model takes pictures of any size; say which: sample_size=...")
            return
        expected = inner.num_patches * self.downsampling_factor
        if self.sample_size is not None and self.sample_size != expected:
            raise ValueError(
                f"JamVQConfig: `sample_size` is {self.sample_size}, but `vqvae_config.num_patches` {inner.num_patches} "
                f"means {expected} pixels. Change one of them."
            )
        self.sample_size = expected

    @property
    def vq_class(self) -> str:
        """Whose class runs the weights: "diffusers", "janus" or "emu3"."""
        return "diffusers" if self.vqvae_config is None else VQVAE_CLASSES[self.vqvae_config.model_type]

    @property
    def pixel_range(self) -> tuple[float, float]:
        """The least and the largest of `pixel_values`: [-1, 1], or more where `image_processing` says so."""
        said = self.image_processing or {}
        white = 255 * said.get("rescale_factor", 1 / 255)
        means, stds = said.get("image_mean", [0.5] * 3), said.get("image_std", [0.5] * 3)
        if not said.get("do_normalize", True):
            means, stds = [0.0], [1.0]
        ends = [(value - mean) / std for value in (0, white) for mean, std in zip(means, stds)]
        return min(-1.0, *ends), max(1.0, *ends)

    @property
    def downsampling_factor(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def grid_size(self) -> int:
        """Codes per side of a picture."""
        return self.sample_size // self.downsampling_factor

    @property
    def image_seq_length(self) -> int:
        """Codes in one picture (N = grid_size ** 2)."""
        return self.grid_size**2

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in `PreTrainedConfig`; the folder carries the code that it needs (remote_code_jam.py)."""
        add_auto_map(self, VQ_AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def diffusers_kwargs(self) -> dict[str, Any]:
        """The keyword arguments for `diffusers.VQModel(...)`."""
        names = (
            "in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block act_fn "
            "latent_channels sample_size num_vq_embeddings norm_num_groups vq_embed_dim norm_type "
            "mid_block_add_attention"
        ).split()
        values = {name: getattr(self, name) for name in names}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


# transformers copies the code files beside what it saves of classes that say so.
JamVQConfig.register_for_auto_class()


__all__ = ["VQVAE_CLASSES", "JamVQConfig"]
