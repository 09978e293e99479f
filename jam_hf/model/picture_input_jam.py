"""One decoder for all ways in: a path, URL, `data:` URI, base64, bytes, a row of `datasets`, a PIL picture or an array.

What it returns is a PIL picture of 8 bits a channel that stands upright and keeps its transparency as an alpha channel.
It knows no size, no colours and no model: the image processor lays alpha on white, resizes and scales.
"""

from __future__ import annotations

import base64
import io
import os
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .transformers_private_jam import httpx


_ORIENTATION = 0x0112
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# Pillow spreads 2 and 4 bits of grey to 8 as it reads them, and leaves the clear shade beside (PNG's tRNS) as it is.
_SPREAD = {"L;2": 85, "L;4": 17}


def open_picture(source: Any) -> Image.Image:
    """A picture from wherever it is, decoded.

    Args:
        source: a path, an http(s) URL, a `data:` URI or base64 (`str`; `os.PathLike` for paths), the bytes of a file,
            what `datasets.Image(decode=False)` has in a row (a `dict` with `bytes` and `path`), or a PIL picture.
    Returns:
        the first frame, upright by its EXIF tag (as `datasets` and transformers' `load_image` turn it), 16 bits of grey
        brought to 8, transparency as an alpha channel.
    Raises:
        ValueError: for a file that is no picture or a damaged one (the message names it), a picture that does not say
            what white is, and for anything else.
    """
    if isinstance(source, Image.Image):
        try:
            _load(source)
        except OSError as error:
            name = getattr(source, "filename", "") or "a picture"
            raise ValueError(f"Cannot read {name}: {error}. The file is damaged or cut short.") from error
        return _upright(source)
    if isinstance(source, dict) and {"bytes", "path"} & source.keys():
        data = source.get("bytes")
        source = data if data is not None else source.get("path")
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, (str, bytes, bytearray)):
        raise ValueError(f"Expected a PIL picture, an array, a path or a URL, got {type(source).__name__}.")
    shown = repr(source if len(source) < 200 else source[:200] + "...") if isinstance(source, str) else "bytes"
    try:
        file = source if isinstance(source, str) and os.path.isfile(source) else io.BytesIO(_read(source))
        with Image.open(file) as image:
            _load(image)
    except Exception as error:  # PIL, the file system and the web have no common base class
        reason = "it is no picture that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        if isinstance(source, str) and len(source) < 200 and not source.startswith(("http://", "https://", "data:")):
            reason = reason if os.path.exists(source) else "there is no such file"
        raise ValueError(
            f"Cannot read a picture from {shown}: {reason}. Expected the path or URL of an undamaged picture file, a "
            "data: URI, base64 or the file's bytes."
        ) from error
    return _upright(image)


def _read(source: str | bytes | bytearray) -> bytes:
    """The bytes of a picture file that is no local one."""
    if not isinstance(source, str):
        return bytes(source)
    if source.startswith(("http://", "https://")):
        return httpx.get(source, follow_redirects=True).raise_for_status().content
    if source.startswith("data:"):
        head, _, source = source.partition(",")
        if not head.endswith(";base64"):
            return unquote_to_bytes(source)
    return base64.decodebytes(source.encode())


def _load(image: Image.Image) -> None:
    """Decode, once; a picture that somebody else has loaded keeps no trace of how many bits its grey had."""
    spread = [_SPREAD.get(str(tile[3]), 1) for tile in getattr(image, "tile", ())]
    image.load()
    clear = image.info.get("transparency")
    if spread and isinstance(clear, int):
        image.info["transparency"] = clear * spread[0]


def _upright(image: Image.Image) -> Image.Image:
    if image.getexif().get(_ORIENTATION) is not None:
        image = ImageOps.exif_transpose(image)
    clear = image.info.get("transparency")
    if image.mode.startswith("I;16"):  # 16 bits of grey; PIL itself would clip them at 255
        grey = np.asarray(image)
        eight = _of_sixteen_bits(grey)
        if isinstance(clear, int):
            return Image.fromarray(np.stack((eight, np.where(grey == clear, 0, 255).astype(np.uint8)), axis=-1))
        return Image.fromarray(eight)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"A picture has the mode '{image.mode}', which does not say what white is. Expected 8 or 16 bits a "
            "channel; scale it to 0..255 and convert it to 'L' or 'RGB'."
        )
    return image if clear is None or "A" in image.getbands() else image.convert("RGBA")


def _of_sixteen_bits(array: np.ndarray) -> np.ndarray:
    return (array / 257).round().astype(np.uint8)


def picture_of_array(array: np.ndarray, do_rescale: bool, channels: str | None = None) -> Image.Image:
    """An array as the picture that it shows; all of one rule, which transformers' `do_rescale` tells apart.

    Args:
        array: `[H, W]`, `[H, W, C]` or `[C, H, W]`, C from 1 (grey) to 4 (RGB and alpha; 2: grey and alpha). bool:
            black and white; uint16: 0..65535; any other dtype, floats included: 0..255, or with `do_rescale=False`
            floats in 0..1. Fractions are rounded to 8 bits.
        channels: "channels_first" or "channels_last" (`input_data_format`), where the shape leaves it open.
    Raises:
        ValueError: if values are out of this range, or in 0..1 where 0..255 is expected, or the shape is no picture's.
    """
    pixels = _eight_bits(array, do_rescale)
    if pixels.ndim == 3:
        first, last = (pixels.shape[axis] in _MODES for axis in (0, -1))
        if channels is None and first and last and pixels.shape[0] * pixels.shape[-1] > 1:
            raise ValueError(
                f"An array has the shape {list(array.shape)}, in which the channels may be the first or the last. Say "
                "it: input_data_format='channels_first' or 'channels_last'."
            )
        channels = channels or ("channels_last" if last else "channels_first")
        if getattr(channels, "value", channels) == "channels_first":
            pixels = np.moveaxis(pixels, 0, -1)
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    if 0 in pixels.shape:
        raise ValueError(f"A picture is empty: its shape is {list(array.shape)}; expected at least 1x1 pixels.")
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in _MODES):
        raise ValueError(
            f"An array of the shape {list(array.shape)} is no picture; expected [H, W], [H, W, C] or [C, H, W] with 1 "
            "to 4 channels."
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def _eight_bits(array: np.ndarray, do_rescale: bool) -> np.ndarray:
    if array.dtype == np.uint8 or not array.size:
        return array.astype(np.uint8)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "uif":
        raise ValueError(f"An array of {array.dtype} is no picture; expected integers, floats or bool.")
    least, most = float(array.min()), float(array.max())
    sixteen = array.dtype.kind == "u" and array.dtype.itemsize == 2  # in either order of bytes
    top = 65535 if sixteen else 255 if do_rescale or array.dtype.kind != "f" else 1
    found = f"A picture is an array of {array.dtype} in {least:g}..{most:g}"
    if not (least >= 0 and most <= top):  # NaN too
        raise ValueError(
            f"{found}; expected 0..{top}. Arrays are in 0..255, uint16 in 0..65535, and floats in 0..1 where "
            "do_rescale=False says so."
        )
    if top == 255 and 0 < most <= 1:
        raise ValueError(f"{found}; expected 0..255. For floats in 0..1, pass do_rescale=False.")
    if top == 65535:
        if 0 < most <= 255:
            raise ValueError(f"{found}; expected 0..65535. For values in 0..255, pass them as uint8.")
        return _of_sixteen_bits(array)
    return np.round(array.astype(np.float64) * (255 / top)).astype(np.uint8)


__all__ = ["open_picture", "picture_of_array"]
