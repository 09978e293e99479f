"""Where a fusion's VQ model comes from: a JamVQModel, its folder, or the image parent's own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..model.configuration_jam import JamVQConfig
from ..model.modeling_jam_vq import JamVQModel
from .parents import Decoder


def vq_model_of(source: Any, image: Decoder, image_size: int | None) -> tuple[JamVQModel, list[str]]:
    """The VQ model, and what a user should know about it.

    Raises:
        ValueError: if it is no VQ model, or neither given nor part of the image parent.
    """
    if source is None:
        raise ValueError("vq_model is missing: a JAM carries the image tokenizer that made its image parent's codes.")
    if isinstance(source, JamVQModel):
        return source, []
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"vq_model must be a JamVQModel or its folder, got {type(source).__name__}. A diffusers VQModel goes into "
            "the `.vq` of a JamVQModel made with its arguments."
        )
    folder = Path(source)
    if folder.exists() or str(source).count("/") > 1:
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"The VQ model '{source}' is no checkpoint: expected a folder with config.json and safetensors.")
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = found.get("model_type", found.get("_class_name"))
        if kind != JamVQConfig.model_type:
            raise ValueError(
                f"The VQ model '{source}' is a '{kind}'; expected the folder of a JamVQModel ('{JamVQConfig.model_type}'). "
                "Convert others with `jam-hf convert-vq`; a diffusers VQModel goes into the `.vq` of a JamVQModel made with "
                "its arguments."
            )
    return JamVQModel.from_pretrained(source), []
