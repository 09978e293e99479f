"""A prompt that spells the name of an image code, `<img:17>`, is text: read by a tokenizer that knows no such names.

The names are special tokens behind all others, so that decoding can show a code and no new token gets a code's id
(jam_hf/data/code_names.py gives them).
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any
from weakref import WeakKeyDictionary


CODE_NAME = "<img:{}>"
# For ids between the tokenizer's last and code 0: rows of padding in the text parent.
UNUSED_NAME = "<unused:{}>"

_readers: WeakKeyDictionary[Any, tuple[int, str, Any]] = WeakKeyDictionary()


def reading_names_as_text(processor: Any, texts: list[str]) -> Any:
    """The processor, or where a text spells the name of a code, a copy to whose tokenizer these names are no tokens."""
    names = _names_pattern(processor.image_code_token)
    if not any(names.search(text) for text in texts):
        return processor
    reader = copy.copy(processor)
    reader.tokenizer = _without_names(processor.tokenizer, processor.image_code_token)
    return reader


def _names_pattern(form: str) -> re.Pattern[str]:
    """What spells a code, or an unused id; a form may say a width, as in "<img_{:05d}>"."""
    stems = [re.split(r"\{[^}]*\}", name) for name in (form, UNUSED_NAME)]
    return re.compile("|".join(re.escape(before) + r"[0-9]+" + re.escape(after) for before, after in stems))


def _without_names(tokenizer: Any, form: str) -> Any:
    """A copy with the same ids, in which codes have names that nobody types."""
    kept = _readers.get(tokenizer)
    if kept is not None and kept[:2] == (len(tokenizer), form):
        return kept[2]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"JamProcessor: a prompt has the name of an image code ({form.format(0)}, ...), and a "
            f"{type(tokenizer).__name__} cannot read it as text. Leave it out, or use one of the tokenizers library."
        )
    names, state = _names_pattern(form), json.loads(backend.to_str())
    hidden = {}
    for token in state["added_tokens"]:
        if names.fullmatch(token["content"]):
            hidden[token["content"]] = token["content"] = f"\U000f0000{token['id']}\U000f0001"
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, dict):
        state["model"]["vocab"] = {hidden.get(token, token): index for token, index in vocabulary.items()}
    else:  # Unigram: pieces and their scores
        state["model"]["vocab"] = [[hidden.get(token, token), score] for token, score in vocabulary]
    reader = copy.deepcopy(tokenizer)
    reader._tokenizer = type(backend).from_str(json.dumps(state))
    _readers[tokenizer] = (len(tokenizer), form, reader)
    return reader


__all__ = ["CODE_NAME", "UNUSED_NAME", "reading_names_as_text"]
