# Licensed under the Apache License, Version 2.0.
"""Pictures in and out: any PIL picture or array to the square RGB tensor the VQ model reads, and back.

It knows pixels only. PIL and numpy do the work: torchvision, which has no CPU build everywhere, is not needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.processing_utils import ImagesKwargs, Unpack

from .picture_input_jam import open_picture, picture_of_array
from .remote_code_jam import AUTO_MAP  # noqa: F401  (its file brings all the others along)
from .transformers_private_jam import SizeDict


if TYPE_CHECKING:
    from .configuration_jam_vq import JamVQConfig


class JamImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """letterbox (`bool`), min_size (`int`): see [`JamImageProcessor`]."""

    letterbox: bool
    min_size: int


class JamImageProcessor(PilBackend):
    """Resize the shorter side to `size`, cut the centre square, scale to [-1, 1]; or as the image parent's processor.

    Grey pictures become RGB, transparent ones are laid on white (not with `do_convert_rgb=False`, which leaves the
    channels as they are); the sides may have any length. Whatever way a picture comes, path, URL, base64, PIL, array,
    it is decoded by one decoder (picture_input_jam.py), turned upright by its EXIF tag. Arrays are in 0..255, or with
    `do_rescale=False` floats in 0..1: transformers' own rule, which is never guessed from the values.

    Args:
        size (`dict`, defaults to `{"shortest_edge": 256}`), crop_size (`dict`, defaults to 256x256): in pixels; both
            the side that `JamVQConfig.sample_size` says.
        letterbox (`bool`, defaults to `False`): as Janus does, resize the longer side instead, and pad the shorter one
            on both sides with `image_mean` to a square. Nothing is cut then.
        min_size (`int`, defaults to 14): with `letterbox`, the least that the shorter side becomes, in pixels.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"shortest_edge": 256}
    default_to_square = False
    crop_size = {"height": 256, "width": 256}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_convert_rgb = True
    letterbox = False
    min_size = 14
    model_input_names = ["pixel_values"]
    valid_kwargs = JamImageProcessorKwargs

    def __init__(self, **kwargs: Unpack[JamImageProcessorKwargs]):
        super().__init__(**kwargs)

    @classmethod
    def from_size(cls, image_size: int, **kwargs: Any) -> JamImageProcessor:
        """The image processor for square pictures of `image_size` pixels."""
        sizes = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
        return cls(**{**sizes, **kwargs})

    @classmethod
    def from_vq_config(cls, config: JamVQConfig) -> JamImageProcessor:
        """The image processor for what a VQ model learned from (`JamVQConfig.image_processing`)."""
        return cls.from_size(config.sample_size, **(config.image_processing or {}))

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open pictures, one or (nested) lists of them, by the one decoder of `open_picture`; arrays pass.

        Arrays are `numpy` ones or tensors, `[H, W]`, `[H, W, C]`, `[C, H, W]` or a batch of the last two; what their
        values mean says `picture_of_array`.

        Raises:
            ValueError: for a file that is no picture or a damaged one (the message names it), and for anything else.
        """
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(image) for image in source]
        if isinstance(source, torch.Tensor):
            source = source.detach().cpu()
            source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
        if isinstance(source, np.ndarray):
            return source[None] if source.ndim == 2 else source
        return open_picture(source)

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        do_rescale: bool | None = None,
        input_data_format: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        in_unit_range = isinstance(image, np.ndarray) and image.dtype.kind == "f" and not do_rescale
        if isinstance(image, np.ndarray):
            image = picture_of_array(image, bool(do_rescale), input_data_format)
        if do_convert_rgb and image.mode not in ("RGB", "L"):
            image = image.convert("RGBA")  # palettes and grey with alpha included
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        pixels = super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)
        return pixels.astype(np.float32) / 255 if in_unit_range else pixels

    def _preprocess(
        self, images: list, *args: Any, do_rescale: bool, do_normalize: bool, rescale_factor: float, **kwargs: Any
    ) -> Any:
        in_unit_range = [image.dtype.kind == "f" for image in images]  # as process_image leaves them
        if not do_rescale and not all(in_unit_range) and (do_normalize or any(in_unit_range)):
            raise ValueError(
                f"Picture {in_unit_range.index(False)} has values in 0..255, and do_rescale=False says that values are "
                "in 0..1, as floats. Leave do_rescale out for pictures and arrays in 0..255; a call takes one of both."
            )
        if any(in_unit_range):  # in 8 bits again: where transformers resizes floats, it cuts off fractions
            images = [(image * 255).round().astype(np.uint8) for image in images]
            do_rescale, rescale_factor = True, self.rescale_factor
        scales = {"do_rescale": do_rescale, "do_normalize": do_normalize, "rescale_factor": rescale_factor}
        if kwargs.pop("letterbox", False):
            side = kwargs["crop_size"].height
            resize = {"size": SizeDict(height=side, width=side), **{k: kwargs[k] for k in ("resample", "min_size")}}
            colour = tuple(int(mean * 255) for mean in kwargs["image_mean"])
            images = [JanusImageProcessorPil.resize(self, image, **resize) for image in images]
            images = [JanusImageProcessorPil.pad_to_square(self, image, colour) for image in images]
            kwargs |= {"do_resize": False, "do_center_crop": False}
        return super()._preprocess(images, *args, **scales, **kwargs)

    def postprocess(self, pixel_values: torch.Tensor) -> list[Image.Image]:
        """Float `[P, 3, H, W]`, as `decode_image_tokens` returns it, to P RGB pictures: scaling, normalising undone."""
        pixels = pixel_values.detach().float().cpu()
        if self.do_normalize:
            mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (self.image_mean, self.image_std))
            pixels = pixels * std + mean
        if self.do_rescale:
            pixels = pixels * (1 / self.rescale_factor)
        pixels = pixels.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(picture) for picture in pixels]


JamImageProcessor.register_for_auto_class()

__all__ = ["JamImageProcessor"]
