"""How an image parent makes pixels of pictures, as settings of [`JamImageProcessor`].

It knows image processors of transformers, by what they do: resize a side, cut the centre (Chameleon), pad to a square
(Janus), resize to an area (Emu3). What others do is not guessed at.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import AutoImageProcessor
from transformers.image_processing_backends import PilBackend
from transformers.models.emu3.image_processing_emu3 import Emu3ImageProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from ..checkpoints.multimodal import MULTIMODAL
from ..checkpoints.parent import Parent
from ..model.configuration_jam_vq import JamVQConfig
from ..model.families_jam import stock_class
from ..model.image_processing_jam import JamImageProcessor


_VALUES = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def image_processing_of(
    parent: Parent, given: JamVQConfig | None, sample_size: int
) -> tuple[dict[str, Any] | None, list[str]]:
    """`JamVQConfig.image_processing` for a JAM of this image parent, and what a user should know of it.

    What the parent's own preprocessor_config.json (or processor_config.json) says. Without one, what the config of the
    VQ model that was given says (`convert_vq` leaves it there). Without that, the class that all published checkpoints
    of its kind have (Chameleon).

    Args:
        given: of a VQ model that is not the parent's own. sample_size: side of the JAM's pictures in pixels.
    Raises:
        ValueError: if the parent's file cannot be read, or its class does what `JamImageProcessor` cannot.
    """
    sheet = MULTIMODAL.get(parent.config.model_type)  # of a plain LM, a file may say how something else is read
    own = _processor(parent)
    if own is None and given is not None and given.image_processing is not None:
        return given.image_processing, []
    if own is None and sheet is not None and sheet.image_processor is not None:
        file, name = sheet.image_processor
        own = stock_class(sheet.model_type, name, file)()
    elif own is None:
        warning = (
            f"The {parent.role} brings no preprocessor_config.json: the JAM resizes the shorter side (BICUBIC), cuts a "
            "square from the centre and scales to [-1, 1]. If the parent saw pictures otherwise, put that file into "
            "its folder, and fuse again."
        )
        return None, [] if sheet is None else [warning]
    try:
        settings, warnings = _settings(own, sample_size, parent.role)
    except ValueError as error:
        if sheet is not None:
            raise
        return (None if given is None else given.image_processing), [f"{error} It is passed over."]
    return settings, warnings


def _processor(parent: Parent) -> Any:
    """The image processor of the parent's folder; None where it has none."""
    folder, draws = parent.folder, parent.config.model_type in MULTIMODAL
    if folder is None:
        return None
    paths = [folder / name for name in ("preprocessor_config.json", "processor_config.json")]
    found = [path for path in paths if path.is_file()]
    try:
        named = any(
            "image_processor_type" in json.dumps(json.loads(path.read_text(encoding="utf-8"))) for path in found
        )
        if not named and not (draws and paths[0] in found):  # without a name, transformers goes by the model
            return None
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except Exception as error:  # damaged JSON, unknown classes and code from outside have no common base class
        if not draws:
            return None
        raise ValueError(
            f"How the {parent.role} reads pictures, {found[0]}, cannot be read: {error}. Expected the image processor "
            "of a class of transformers."
        ) from error


def _settings(own: Any, size: int, role: str) -> tuple[dict[str, Any] | None, list[str]]:
    """What differs from `JamImageProcessor`'s own, and what a user should know."""
    found: dict[str, Any] = {name: getattr(own, name) for name in _VALUES if getattr(own, name, None) is not None}
    for name in ("image_mean", "image_std"):
        if name in found:
            value = found[name]
            found[name] = [float(v) for v in (value if isinstance(value, (list, tuple)) else [value] * 3)]
    if not found.pop("do_rescale", True):
        found["rescale_factor"] = 1.0  # the same, in words that mean nothing else to a JAM's processor
    resample = own.resample
    found["resample"] = int(resample if resample is not None else 2)  # transformers' own default is BILINEAR
    warnings, sides = [], set()
    square = (
        f"The {role} takes pictures of any shape, a JAM's are squares of {size} pixels: it cuts the centre of others."
    )
    if isinstance(own, (JanusImageProcessorPil, JamImageProcessor)) and getattr(own, "letterbox", True):
        found |= {"letterbox": True, "min_size": own.min_size}
        side = _plain(own.size or {}).get("height") or _plain(own.crop_size or {}).get("height")
        sides = {side} if side else set()
        if not own.do_resize or (isinstance(own, JanusImageProcessorPil) and not own.do_pad):
            warnings.append(square)
    elif isinstance(own, Emu3ImageProcessor):
        warnings.append(square)
    elif isinstance(own, PilBackend) and type(own)._preprocess in (
        PilBackend._preprocess,
        JamImageProcessor._preprocess,
    ):
        resized = _plain(own.size or {}) if own.do_resize else {}
        crop = {own.crop_size["height"], own.crop_size["width"]} if own.do_center_crop else set()
        if crop == {size}:  # the JAM's processor does the same before the cut
            found |= {"size": resized} if own.do_resize else {"do_resize": False}
        elif not crop and set(resized) == {"height", "width"}:
            sides = set(resized.values())
            found["size"] = {"height": size, "width": size}
        else:
            sides = crop or set(resized.values())
        if not crop and "size" not in found:
            warnings.append(square)
        if not own.do_resize and not crop:
            warnings.append(f"The {role} takes pictures in the size that they have; the JAM resizes those of others.")
    else:
        raise ValueError(
            f"The {role} reads pictures by a {type(own).__name__}, and a JAM cannot do what that does. Supported: what "
            "resizes, cuts the centre, scales and normalises, and the classes of Chameleon, Emu3 and Janus."
        )
    if sides and sides != {size}:
        warnings.append(
            f"The {role}'s image processor makes pictures of {' x '.join(map(str, sorted(sides)))} pixels; the JAM's "
            f"have {size}, the VQ model's size."
        )
    plain = JamImageProcessor.from_size(size)
    kept = {name: value for name, value in found.items() if _plain(getattr(plain, name)) != value}
    return kept or None, warnings


def _plain(value: Any) -> Any:
    """As JSON reads it, without what is not set."""
    if hasattr(value, "items") or hasattr(value, "height"):
        return {name: side for name, side in dict(value).items() if side is not None}
    return list(value) if isinstance(value, tuple) else value
