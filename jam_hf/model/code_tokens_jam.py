"""Names of image codes in a tokenizer: `<img:17>`, so that decoding can show a code and no new token gets a code's id.

They are special tokens behind all others. A prompt that spells such a name is text all the same: it is read by a tokenizer to
which the names mean nothing (`reading_names_as_text`). It knows tokenizers; which ids are codes it is told.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any
from weakref import WeakKeyDictionary

from transformers import AddedToken


CODE_NAME = "<img:{}>"
# Where the tokenizer has these names already, from another model's codes.
OTHER_CODE_NAMES = ("<jam:img:{}>", "<jam:img:{}/2>")
# For ids between the tokenizer's last and code 0: rows of padding in the text parent.
UNUSED_NAME = "<unused:{}>"

_readers: WeakKeyDictionary[Any, tuple[int, str, Any]] = WeakKeyDictionary()


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
            f"The ids {first}..{first + count - 1} are image codes, but the tokenizer has the token {by_id[taken[0]]!r} with "
            f"the id {taken[0]} ({len(taken)} such tokens): it was added before the codes had names. Take the tokenizer as it "
            "was fused, load it with JamProcessor.from_pretrained, which names the codes, and add the token then."
        )
    known = set(by_id.values())
    for form in (CODE_NAME, *OTHER_CODE_NAMES):
        names = [form.format(code) for code in range(count)]
        if known.isdisjoint(names):
            break
    else:
        raise ValueError(f"The tokenizer has other tokens of all the names that codes could have: {CODE_NAME.format(0)}, ...")
    end = max(by_id, default=-1) + 1
    names = [*(UNUSED_NAME.format(index) for index in range(end, first)), *names]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    if tokenizer.convert_tokens_to_ids(names) != list(range(end, first + count)):
        raise ValueError(
            f"The tokenizer has {len(by_id)} tokens and ids up to {end - 1}; new ones do not get the ids from {end} on. Give "
            "each id below a token that no text has, in the vocabulary of its tokenizer.json."
        )
    return form


def num_named_codes(tokenizer: Any, form: str = CODE_NAME) -> int:
    """How many codes have names, with one id behind the other."""
    vocabulary = tokenizer.get_vocab()
    first, count = vocabulary.get(form.format(0)), 0
    while first is not None and vocabulary.get(form.format(count)) == first + count:
        count += 1
    return count


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
            f"JamProcessor: a prompt has the name of an image code ({form.format(0)}, ...), and a {type(tokenizer).__name__} "
            "cannot read it as text. Leave it out, or use a tokenizer of the tokenizers library."
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


__all__ = ["CODE_NAME", "name_codes", "num_named_codes", "reading_names_as_text"]
