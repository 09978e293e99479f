"""Where a fusion's VQ model comes from: a JamVQModel, its folder, or the image parent's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..contents import check_shards, may_be_hub_id
from ..conversion.vq import vq_model_from
from ..files import read_json
from ..model.configuration_jam_vq import JamVQConfig
from ..model.modeling_jam_vq import JamVQModel
from ..reading import read_whole
from .parents import Decoder


def vq_model_of(
    source: Any, image: Decoder, image_size: int | None, config_only: bool = False
) -> tuple[JamVQModel, list[str]]:
    """The VQ model, and what a user should know about it.

    Raises:
        ValueError: if it is no VQ model, or neither given nor part of the image parent.
    """
    if source is None:
        return _parents_own(image, image_size)
    if image_size is not None:
        raise ValueError(
            "image_size is for the image parent's own VQ model; one that is given says its size. Leave it out."
        )
    if isinstance(source, JamVQModel):
        return source, _halves(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"vq_model must be a JamVQModel or its folder, got {type(source).__name__}. A diffusers VQModel goes into "
            "the `.vq` of a JamVQModel made with its arguments."
        )
    folder = Path(source)
    if not may_be_hub_id(source):
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(
                f"The VQ model '{source}' is no checkpoint: expected a folder with config.json and safetensors."
            )
        found = read_json(path)
        check_shards(folder, "VQ model")
        kind = found.get("model_type", found.get("_class_name"))
        if kind != JamVQConfig.model_type:
            raise ValueError(
                f"The VQ model '{source}' is a '{kind}'; expected the folder of a JamVQModel "
                f"('{JamVQConfig.model_type}'). Convert others with `jam-hf convert-vq`; a diffusers VQModel goes into "
                "the `.vq` of a JamVQModel made with its arguments."
            )
    if config_only and not any(folder.glob("*.safetensors*")):
        from ..checkpoints.from_config import vq_model_from_config

        model = vq_model_from_config(str(source))
        return model, _halves(model)
    model = read_whole(JamVQModel, source, "VQ model")
    return model, _halves(model)


def _parents_own(image: Decoder, image_size: int | None) -> tuple[JamVQModel, list[str]]:
    if image.multimodal is None:
        raise ValueError(
            "vq_model is missing: a JAM carries the image tokenizer that made its image parent's codes, and this "
            "parent brings none. Pass the folder of a JamVQModel (vq_model=..., --vq); `jam-hf convert-vq` makes one "
            "of others."
        )
    if image.multimodal.size_form is not None and image_size is None:
        raise ValueError(
            f"The VQ model of the image parent {image.parent.name} takes pictures of any size, and a JAM's have one: "
            "image_size=512, say (--image-size 512)."
        )
    remarks: list[str] = []
    model = vq_model_from(image.parent, image_size, remarks.append)
    return model, [*remarks, *_halves(model)]


def _halves(model: JamVQModel) -> list[str]:
    if model.config.has_decoder:
        return []
    return [
        "The VQ model has no decoder (transformers' Chameleon brings none): the JAM will read pictures and write their "
        "codes, but cannot turn codes into pixels. Convert the original vqgan.ckpt with `jam-hf convert-vq`, and pass "
        "it: vq_model=..."
    ]
