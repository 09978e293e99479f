"""Names of image codes in a tokenizer: `<img:17>`, so that decoding can show a code and no new token gets a code's id.

They are special tokens behind all others; how a prompt that spells one is read, says model/code_tokens_jam.py. It knows
tokenizers; which ids are codes it is told.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from transformers import AddedToken
from transformers.utils import logging

from ..model.code_tokens_jam import CODE_NAME, UNUSED_NAME
from ..model.configuration_jam import JamConfig


logger = logging.get_logger(__name__)

# Where the tokenizer has these names already, from another model's codes.
OTHER_CODE_NAMES = ("<jam:img:{}>", "<jam:img:{}/2>")
# What says which files a processor is loaded from.
_FROM_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def name_codes(tokenizer: Any, first: int, count: int) -> str | None:
    """Give the ids `[first, first + count)` names in the tokenizer, and those before them that have none.

    Args:
        tokenizer: changed in place. first: id of code 0. count: K.
    Returns:
        the form of the names, "<img:{}>"; None where the codes had names.
    Raises:
        ValueError: if other tokens have ids of codes, or the tokenizer, whose vocabulary has holes, gives other ids.
    """
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    taken = [index for index in range(first, first + count) if index in by_id]
    if len(taken) == count:
        return None
    if taken:
        raise ValueError(
            f"The ids {first}..{first + count - 1} are image codes, but the tokenizer has the token "
            f"{by_id[taken[0]]!r} with the id {taken[0]} ({len(taken)} such tokens): it was added before the codes had "
            "names. Take the tokenizer as it was fused, load it with JamProcessor.from_pretrained, which names the "
            "codes, and add the token then."
        )
    known = set(by_id.values())
    for form in (CODE_NAME, *OTHER_CODE_NAMES):
        names = [form.format(code) for code in range(count)]
        if known.isdisjoint(names):
            break
    else:
        raise ValueError(
            f"The tokenizer has other tokens of all the names that codes could have: {CODE_NAME.format(0)}, ..."
        )
    end = max(by_id, default=-1) + 1
    names = [*(UNUSED_NAME.format(index) for index in range(end, first)), *names]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    if tokenizer.convert_tokens_to_ids(names) != list(range(end, first + count)):
        raise ValueError(
            f"The tokenizer has {len(by_id)} tokens and ids up to {end - 1}; new ones do not get the ids from {end} "
            "on. Give each id below a token that no text has, in the vocabulary of its tokenizer.json."
        )
    return form


def num_named_codes(tokenizer: Any, form: str = CODE_NAME) -> int:
    """How many codes have names, with one id behind the other."""
    return num_in_a_row(tokenizer, form.format)


def num_in_a_row(tokenizer: Any, name: Callable[[int], str]) -> int:
    """How many of the tokens `name(0)`, `name(1)`, ... there are, with one id behind the other."""
    vocabulary = tokenizer.get_vocab()
    first, count = vocabulary.get(name(0)), 0
    while first is not None and vocabulary.get(name(count)) == first + count:
        count += 1
    return count


def name_codes_of(loaded: Any, folder: str | os.PathLike, arguments: dict[str, Any]) -> None:
    """Name the codes for a processor that was loaded from a folder which was fused before codes had names.

    Args:
        loaded: what `ProcessorMixin.from_pretrained` returned for `folder` and these `arguments`; changed in place.
    Raises:
        ValueError: see `name_codes`.
    """
    processor = loaded[0] if isinstance(loaded, tuple) else loaded
    try:
        values, _ = JamConfig.get_config_dict(
            folder, **{name: arguments[name] for name in _FROM_WHERE if name in arguments}
        )
    except OSError:  # a processor by itself
        return
    if values.get("model_type") != JamConfig.model_type or values.get("image_token_offset") is None:
        return
    config = JamConfig.from_dict(values)
    form = name_codes(processor.tokenizer, config.image_token_offset, config.num_image_tokens)
    if form is not None:
        processor.image_code_token = form
        logger.warning_once(
            f"{folder} was fused before image codes had names in the tokenizer: they got the names {form.format(0)}, "
            "... now. Save the processor to keep them."
        )


__all__ = ["name_codes", "name_codes_of", "num_in_a_row", "num_named_codes"]
