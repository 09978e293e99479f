"""What the parents' generation configs say, as a JAM has it: where documents end, and how text is sampled.

It knows configs and ids only. Ids of the text parent are the JAM's own: the text parent's vocabulary comes first in
both forms.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..checkpoints.parent import Parent
from ..model.code_tokens_jam import UNUSED_NAME


FILE = "generation_config.json"
# What sampling reads, and a JAM has for codes by a name of its own (`image_temperature`, ...).
BY_MODALITY = ("temperature", "top_k", "top_p", "min_p")
# What a JAM carries of the text parent's. Codes are exempt from a penalty on what was written before.
CARRIED = ("do_sample", *BY_MODALITY, "repetition_penalty")
# Said by the JAM's own config, or of no effect on what is written.
_OF_THE_JAM = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
)


def generation_config_of(parent: Parent) -> GenerationConfig:
    """The generation config that transformers gives the parent's model: of its file, or else made of its config.

    Raises:
        ValueError: if the file cannot be read.
    """
    if parent.generation_config is not None:
        return parent.generation_config
    if parent.folder is None or not (parent.folder / FILE).is_file():
        return GenerationConfig.from_model_config(parent.config)
    try:
        return GenerationConfig.from_pretrained(parent.folder)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{Path(parent.folder) / FILE} of the {parent.role} cannot be read: {error}.") from error


def listed(value: int | Collection[int] | None) -> list[int]:
    """`eos_token_id`, which may be one, several or None, as a list without repetitions."""
    ids: list[Any] = list(value) if isinstance(value, (list, tuple, set)) else [value]
    return list(dict.fromkeys(i for i in ids if i is not None))


def said_stop_ids(parent: Parent) -> list[int]:
    """Where the parent's generation_config.json, or else its config.json, says that documents end; may be no tokens
    of its.
    """
    said = listed(generation_config_of(parent).eos_token_id)
    return said or listed(getattr(parent.config, "eos_token_id", None))


def stop_ids(
    parent: Parent, vocab_size: int, tokenizer: PreTrainedTokenizerBase, added: Collection[str]
) -> tuple[list[int], list[str]]:
    """Where a document of the JAM ends, and what a user should know of it.

    The ids of the text parent's generation_config.json, in its order; where that says none, those of its config.json;
    where that says none, the tokenizer's eos token.

    Args:
        vocab_size: rows of the parent's embedding. tokenizer: the JAM's. added: tokens that it got, by their text.
    """
    found = said_stop_ids(parent) or listed(tokenizer.eos_token_id)
    new = {tokenizer.convert_tokens_to_ids(token) for token in added}
    ids = [i for i in found if 0 <= i < vocab_size and i not in new]
    warnings = []
    if never := [i for i in found if i not in ids]:
        warnings.append(
            f"The {parent.role} ends documents at {found}; {never} are no tokens of its vocabulary of {vocab_size}, so "
            "it never wrote them. They are left out."
        )
        ids = ids or listed(tokenizer.eos_token_id)
    if unnamed := [i for i in ids if tokenizer.convert_ids_to_tokens(i) == UNUSED_NAME.format(i)]:
        warnings.append(
            f"The {parent.role} ends documents at {unnamed}, for which its tokenizer has no token. The JAM ends there "
            f"too and calls it {UNUSED_NAME.format(unnamed[0])!r}."
        )
    if not ids:
        warnings.append(
            f"Neither the {parent.role} nor its tokenizer says where a document ends: the JAM writes until its budget "
            "is used up. Set eos_token_id in both config.json and generation_config.json before training."
        )
    elif tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        warnings.append(
            f"The tokenizer's eos token {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}) is none of the ids at "
            f"which the {parent.role} stops, {ids}; the JAM stops where the parent does, and documents for training "
            f"end in id {ids[0]}."
        )
    return ids, warnings


def one_or_list(ids: list[int]) -> int | list[int] | None:
    """As configs write `eos_token_id`."""
    return ids if len(ids) > 1 else ids[0] if ids else None


def text_sampling(text: Parent, image: Parent) -> tuple[dict[str, Any], list[str]]:
    """The text parent's sampling defaults as settings of a JAM, and what a user should know of them.

    Codes keep the image parent's where it samples, else transformers' defaults. What cannot be saved (a temperature of
    a parent that does not sample, which has no effect there) is left out, and so is all that is no sampling; both are
    said.
    """
    defaults = GenerationConfig._get_default_generation_params()

    def said(config: GenerationConfig) -> dict[str, Any]:
        values = {
            name: value
            for name, value in config.to_diff_dict().items()
            if name not in _OF_THE_JAM and value is not None
        }
        return {
            name: value for name, value in values.items() if not name.startswith("_") and value != defaults.get(name)
        }

    own, pictures = said(generation_config_of(text)), said(generation_config_of(image))
    if not pictures.get("do_sample"):
        pictures = {}
    names = CARRIED if own.get("do_sample") else ("repetition_penalty",)
    settings = {name: own.pop(name) for name in names if name in own}
    if settings.get("do_sample"):
        for name in BY_MODALITY:
            if name in settings or name in pictures:
                settings[f"image_{name}"] = pictures.get(name, defaults.get(name))
    settings = {name: value for name, value in settings.items() if value is not None}
    if not own:
        return settings, []
    listing = ", ".join(f"{name}={value!r:.60}" for name, value in sorted(own.items()))
    why = (
        "" if settings.get("do_sample") else " (without do_sample=True a parent passes over what sampling alone reads)"
    )
    return settings, [f"Of the text parent's generation config these are not carried over{why}: {listing}."]
