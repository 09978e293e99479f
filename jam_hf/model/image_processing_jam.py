"""Pictures in and out: any PIL picture or array to the square RGB tensor the VQ model reads, and back.

It knows pixels only. PIL and numpy do the work: torchvision, which has no CPU build everywhere, is not needed.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack

from .remote_code_jam import AUTO_MAP  # noqa: F401  (its file brings all the others along)


class JamImageProcessor(PilBackend):
    """Resize the shorter side to `size`, cut the centre square, scale to [-1, 1].

    Grey pictures become RGB, transparent ones are laid on white (not with `do_convert_rgb=False`, which leaves the channels as
    they are); the sides may have any length.

    Args:
        size (`dict`, defaults to `{"shortest_edge": 256}`), crop_size (`dict`, defaults to 256x256): in pixels; both the
            side that `JamVQConfig.sample_size` says.
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
    model_input_names = ["pixel_values"]

    def __init__(self, **kwargs: Unpack[ImagesKwargs]):
        super().__init__(**kwargs)

    @classmethod
    def from_size(cls, image_size: int, **kwargs: Any) -> JamImageProcessor:
        """The image processor for square pictures of `image_size` pixels."""
        return cls(size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}, **kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open paths and URLs, one or (nested) lists of them; pictures and arrays pass, 2D arrays as grey pictures.

        Raises:
            ValueError: for a file that is no picture or a damaged one (the message names it), and for anything else.
        """
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(image) for image in source]
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if not isinstance(source, str):
            if isinstance(source, (np.ndarray, torch.Tensor)):
                return source[None] if source.ndim == 2 else source
            if not isinstance(source, Image.Image):
                raise ValueError(f"Expected a PIL picture, an array, a path or a URL, got {type(source).__name__}.")
            return source
        name = source if len(source) < 200 else source[:200] + "..."
        try:
            if os.path.isfile(source):  # transformers' own way drops transparency, and clips 16 bits of grey
                with Image.open(source) as image:
                    image.load()
                    return ImageOps.exif_transpose(image)
            return super().fetch_images(source)
        except Exception as error:  # PIL, the file system and the web have no common base class
            reason = str(error)
            if len(source) < 200 and not source.startswith(("http://", "https://", "data:")) and not os.path.exists(source):
                reason = "there is no such file"
            raise ValueError(
                f"Cannot read a picture from {name!r}: {reason}. Expected the path or URL of an undamaged picture file."
            ) from error

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> np.ndarray:
        if isinstance(image, Image.Image):
            try:
                image.load()
            except OSError as error:
                name = getattr(image, "filename", "") or "a picture"
                raise ValueError(f"Cannot read {name}: {error}. The file is damaged or cut short.") from error
            if image.mode.startswith("I;16"):  # 16 bits of grey; PIL itself would clip them at 255
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(
                    f"A picture has the mode '{image.mode}', which does not say what white is. Expected 8 or 16 bits a "
                    "channel; scale it to 0..255 and convert it to 'L' or 'RGB'."
                )
            if do_convert_rgb and image.mode not in ("RGB", "L"):
                image = image.convert("RGBA")  # palettes and grey with alpha included
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        image = super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)
        return _three_channels(image) if do_convert_rgb else image

    def _preprocess(self, images: list[np.ndarray], *args: Any, do_rescale: bool = True, **kwargs: Any) -> Any:
        for index, image in enumerate(images):
            if 0 in image.shape:
                raise ValueError(f"Picture {index} is empty: its shape is {image.shape}; expected at least 1x1 pixels.")
            if do_rescale and image.dtype != np.uint8 and 0 < image.max() <= 1:
                raise ValueError(
                    f"Picture {index} is an array of {image.dtype} in {image.min():g}..{image.max():g}; expected 0..255. For "
                    "values in 0..1, pass do_rescale=False."
                )
        kwargs["do_rescale"] = do_rescale
        return super()._preprocess(images, *args, **kwargs)

    def postprocess(self, pixel_values: torch.Tensor) -> list[Image.Image]:
        """Float `[P, 3, H, W]` in [-1, 1] (as `decode_image_tokens` returns it) to P RGB pictures."""
        mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (self.image_mean, self.image_std))
        pixels = pixel_values.detach().float().cpu() * std + mean
        pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(picture) for picture in pixels]


def _three_channels(image: np.ndarray) -> np.ndarray:
    """Arrays `[C, H, W]` that came without a mode: grey is repeated, alpha is laid on white."""
    if image.shape[0] == 1:
        return np.repeat(image, 3, axis=0)
    if image.shape[0] == 4:
        top = 255.0 if image.dtype == np.uint8 else 1.0
        alpha = image[3:].astype(np.float32) / top
        blended = image[:3].astype(np.float32) * alpha + top * (1.0 - alpha)
        return blended.astype(image.dtype)
    return image


JamImageProcessor.register_for_auto_class()

__all__ = ["JamImageProcessor"]
