"""Configs and tokenizers as transformers' own classes read them. Code that a checkpoint brings along is never run.

Left out, `trust_remote_code` makes transformers ask on the terminal whether to run such code; every call of this
package says False. What needs code of its own is refused here, in words that say so. It knows nothing of what is read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .contents import check_shards
from .integrations.private import get_tokenizer_config, tokenizer_class_from_name


NEVER_RUN = "jam_hf never runs code that a checkpoint brings along"


def read_config(source: str | os.PathLike, **hub: Any) -> PreTrainedConfig:
    """`AutoConfig` of a folder or Hub id; `hub`: `revision` and the like.

    Raises:
        ValueError: if transformers has no class for it, or it cannot be read. OSError: if there is none.
    """
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **hub)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"the config of '{source}' is of a class of its own, which transformers does not have; {NEVER_RUN}"
        ) from error


def read_tokenizer(source: str | os.PathLike, from_file: bool = False, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, by `AutoTokenizer`, or (`from_file`) by tokenizer.json, whatever class is
    named.

    Raises:
        ValueError: if the class that it names is none of transformers', or it cannot be read. OSError: if there is
            none.
    """
    if from_file:
        return PreTrainedTokenizerFast.from_pretrained(source, trust_remote_code=False, **hub)
    unknown = [name for name in named_classes(get_tokenizer_config(source, **hub)) if not _is_stock(name)]
    if unknown:
        raise ValueError(
            f"the tokenizer of '{source}' is of the unknown class {unknown[0]}, which transformers does not have; "
            f"{NEVER_RUN}"
        )
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a file that is not as it should be surfaces as whatever it broke
        raise ValueError(f"the tokenizer of '{source}' cannot be read: {error!r}") from error


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether a checkpoint's folder brings a tokenizer, in any of the forms that transformers reads."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return any((Path(folder) / name).is_file() for name in names)


def read_whole(model_class: Any, source: str | os.PathLike, role: str = "model", **arguments: Any) -> PreTrainedModel:
    """A model of a folder or Hub id, in evaluation mode, by `from_pretrained` of its class or of an Auto class.

    Raises:
        ValueError: if it is of another model type than the class, if weights are missing, which transformers would draw
            at random, or if its index names files outside of the folder. OSError: if there is none.
    """
    check_shards(source, role)
    wanted = getattr(getattr(model_class, "config_class", None), "model_type", None)  # None of an Auto class
    if wanted is not None and "config" not in arguments:
        found = read_config(source, revision=arguments.get("revision")).model_type
        if found != wanted:
            raise ValueError(f"The {role} '{source}' is a '{found}'; expected a '{wanted}'.")
    model, info = model_class.from_pretrained(
        source, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **arguments
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"The {role} '{source}' lacks {len(missing)} weights of a {type(model).__name__}, e.g. '{missing[0]}'. "
            "Give the whole checkpoint, of the class that it was trained as."
        )
    return model.eval()


def read_clip(
    source: str | os.PathLike, tokenizer: Any = None, image_processor: Any = None, **hub: Any
) -> tuple[PreTrainedModel, Any, Any]:
    """A CLIP model of a folder or Hub id, its tokenizer and its image processor; what is given of these two is not
    read.

    Raises:
        ValueError: if it is another model, lacks weights, or cannot be read. OSError: if there is none.
    """
    from transformers import AutoImageProcessor, CLIPModel

    model = read_whole(CLIPModel, source, "CLIP model", **hub)
    if tokenizer is None:
        tokenizer = read_tokenizer(source, **hub)
    if image_processor is None:
        image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False, **hub)
    return model, tokenizer, image_processor


def named_classes(tokenizer_config: dict[str, Any]) -> list[str]:
    """The names of tokenizer classes in a tokenizer_config.json, those of its `auto_map` without their modules."""
    found = [tokenizer_config.get("tokenizer_class")]
    auto_map = tokenizer_config.get("auto_map")
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    found += [named] if isinstance(named, str) else list(named or [])
    return [name.split(".")[-1] for name in found if isinstance(name, str)]


def _is_stock(name: str) -> bool:
    stem = name.removesuffix("Fast")
    return any(tokenizer_class_from_name(one) is not None for one in (name, stem, f"{stem}Fast"))
