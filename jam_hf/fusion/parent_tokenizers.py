"""A parent's tokenizer, read so that the JAM's saved folder encodes and decodes as the parent does, and what its files
ask for.

The rule: a JAM's tokenizer does what transformers makes of the parent's files, to the last id. It is saved as the one
class that reads tokenizer.json as it stands, since others make themselves anew from the vocabulary and settings that
are not saved. Where the files ask for something else than transformers makes of them, a warning says so, and
`tokenizer_reading="files"` takes the files at their word. What cannot be saved and read back equal is refused. It knows
tokenizers; it reads no tensor.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from ..contents import may_be_hub_id
from ..integrations.private import get_tokenizer_config
from ..reading import read_tokenizer


READINGS = ("transformers", "files")
_NO_ERRORS = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")

# Where tokenizers of one vocabulary differ: blanks, line feeds, numbers, apostrophes, unknown letters, forms of one
# letter.
_LINES = (
    "",
    " ",
    "\n",
    "\t",
    "a",
    " a",
    "   a  b ",
    "\n a\n\n  b\r\n\tc\n",
    "In 2024, isn't Step 12 done?\n\n  Yes: one  two\tthree.",
    "    def f(x):\n\treturn x + 1.50 # 1234567890",
    "WE'RE they'll I'd don’t 3.14 1,000,000 50%",
    "naïve café Ångström e\u0301 ﬁ ½ Ⅷ",
    "你好，世界。 こんにちは 안녕 שלום مرحبا हिन्दी ไทย",
    "😀👩‍👩‍👧 🇫🇷 \u2603 ▁ Ġ Ċ ##ing <0x41> \u00a0x\u200by\ufeff",
    "\x00\x07\x1b\x7f \ue000 𐍈 \U0010fffd",
    "http://a.b/c?d=e&f <tag> {json: [1, 2]} $x_1^2$ @user #tag ... -- ---",
)
_TOKENS_A_LINE = 64


def read_parent_tokenizer(source: Any, argument: str, reading: str = "transformers") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, or a copy of one in memory, of a class that is read back as it was.

    Args:
        argument: how messages call what to pass instead. reading: one of READINGS; one in memory is taken as it is.
    Raises:
        ValueError: if there is none, its class is unknown, or it cannot be saved and read back equal.
    """
    if reading not in READINGS:
        raise ValueError(f"tokenizer_reading must be one of {', '.join(map(repr, READINGS))}, got {reading!r}.")
    if isinstance(source, PreTrainedTokenizerBase):
        return portable(copy.deepcopy(source))
    try:
        return portable(_by_files(source) if reading == "files" else read_tokenizer(source))
    except Exception as error:  # of the file system, the Hub, tokenizers or json
        raise ValueError(
            f"No tokenizer can be read from '{source}' ({error}). Pass {argument}=..., or, where its tokenizer.json "
            "says all, tokenizer_reading='files' (--tokenizer-reading files)."
        ) from error


def portable(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same as a `PreTrainedTokenizerFast`, which is read as its tokenizer.json stands; itself where that would
    differ.

    `LlamaTokenizer` and others build themselves anew when they are read, by settings (`legacy`) that they do not save.
    Code of its own that it names (`auto_map`) is not carried on.
    """
    tokenizer.init_kwargs.pop("auto_map", None)
    tokenizer._auto_map = None
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if not (Path(folder) / "tokenizer.json").is_file():
            return tokenizer
        path = Path(folder) / "tokenizer_config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        for name in ("add_prefix_space", "use_default_system_prompt", "auto_map"):
            written.pop(name, None)  # arguments of other classes
        path.write_text(json.dumps({**written, "tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
        plain = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    plain.name_or_path = plain.init_kwargs["name_or_path"] = tokenizer.name_or_path
    chosen = tokenizer if difference(tokenizer, plain) else plain
    for name in ("is_local", "local_files_only"):  # how it was read here, which transformers would write down
        chosen.init_kwargs.pop(name, None)
    return chosen


def check_saved(tokenizer: PreTrainedTokenizerBase, parents: PreTrainedTokenizerBase, added: Iterable[str]) -> None:
    """Refuse a JAM's tokenizer that is not read back as it is, or that reads text otherwise than the parent's does.

    added: tokens that the JAM's has and the parent's has not.
    Raises:
        ValueError: with a text, and what becomes of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        back = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for one, name, but in ((tokenizer, "before it is saved", ()), (parents, "by the parent's tokenizer", tuple(added))):
        found = difference(one, back, but)
        if found:
            raise ValueError(
                f"The JAM's tokenizer (a {type(tokenizer).__name__}) does not come back from its folder as it was: "
                f"{found} ({name}; read back). Pass tokenizer=PreTrainedTokenizerFast.from_pretrained(...)."
            )
    if back.model_max_length != tokenizer.model_max_length:
        raise ValueError(
            f"The JAM's tokenizer reads back model_max_length {back.model_max_length}, it was "
            f"{tokenizer.model_max_length}."
        )


def check_added_ids(tokenizer: PreTrainedTokenizerBase, role: str) -> None:
    """Raise `ValueError` if an added token was read at another id than the one that its file puts it at.

    tokenizers counts: a token that a file puts behind a hole is read in the hole.
    """
    written: dict[str, int] = {}
    for name in ("tokenizer_config.json", "tokenizer.json"):
        path = _file_read(tokenizer, name)
        if path is None:
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        for index, token in (content.get("added_tokens_decoder") or {}).items():
            written[token["content"]] = int(index)
        written |= {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    read = tokenizer.get_vocab()
    moved = [token for token in written if read.get(token) != written[token]]
    if moved:
        raise ValueError(
            f"The tokenizer of the {role}, '{tokenizer.name_or_path}', puts its token {moved[0]!r} at the id "
            f"{written[moved[0]]}; it is read as {read.get(moved[0])} ({len(moved)} such tokens), so that its rows "
            "would be another token's. A vocabulary with unused ids before an added token cannot be read: give each "
            "of them a token that no text has."
        )


def limit_length(tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
    """`model_max_length` is the parent's, or the JAM's positions where those are fewer; one that says no limit
    stays so.
    """
    if positions < tokenizer.model_max_length < 10**20:
        tokenizer.model_max_length = tokenizer.init_kwargs["model_max_length"] = positions


def asks_otherwise(tokenizer: PreTrainedTokenizerBase | None, role: str, argument: str) -> list[str]:
    """Warnings where the files of a parent ask for something else than transformers makes of them.

    For some families it makes the tokenizer anew, by the model's type, and takes only the vocabulary from
    tokenizer.json; and it passes `add_bos_token` and `add_eos_token` of tokenizer_config.json over wherever there is a
    tokenizer.json.
    """
    path = None if tokenizer is None else _file_read(tokenizer, "tokenizer.json")
    if tokenizer is None or path is None:
        return []
    folder = path.parent
    files = _by_files(folder)
    cure = (
        "If the parent was trained by its files, give tokenizer_reading='files' (--tokenizer-reading files), or pass "
        f"{argument}=... of your own."
    )
    found = []
    for name, word, place in (("bos", "begin", 0), ("eos", "end", -1)):
        token = getattr(files, f"{name}_token_id")
        asked, made = (token is not None and t("a").input_ids[place] == token for t in (files, tokenizer))
        if asked != made:
            wanted, there = ("a", "none") if asked else ("no", "one")
            token = getattr(files, f"{name}_token")
            found.append(
                f"The files of the {role}'s tokenizer ask for {wanted} {token!r} at the {word} of every "
                f"document (add_{name}_token: {str(asked).lower()}); as transformers reads them, and in the JAM, there "
                f"is {there}. {cure}"
            )
    split = difference(files, tokenizer, special=False)
    if split:
        found.append(
            f"transformers reads the tokenizer of the {role} as a {_class_named(folder, tokenizer)}, which splits text "
            f"otherwise than its tokenizer.json says: {split} (by the file; by transformers). {cure}"
        )
    return found


def _file_read(tokenizer: PreTrainedTokenizerBase, name: str) -> Path | None:
    """A file that the tokenizer was read from, of a Hub id what was fetched then; None of one made in memory, and where
    its folder is gone.
    """
    source = tokenizer.name_or_path
    if not source or not (Path(source).is_dir() or may_be_hub_id(source)):
        return None
    path = cached_file(source, name, local_files_only=True, **dict.fromkeys(_NO_ERRORS, False))
    return None if path is None else Path(path)


def _class_named(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return type(read_tokenizer(folder)).__name__
    except (OSError, ValueError):
        return type(tokenizer).__name__


def _by_files(source: str | os.PathLike) -> PreTrainedTokenizerBase:
    """As tokenizer.json says, with `add_bos_token` and `add_eos_token` of tokenizer_config.json where they stand
    there.
    """
    tokenizer = read_tokenizer(source, from_file=True)
    asked = get_tokenizer_config(source)
    ids = tokenizer("a").input_ids
    does = {
        "add_bos_token": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "add_eos_token": tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    }
    wanted = {name: does[name] if asked.get(name) is None else bool(asked[name]) for name in does}
    if wanted != does:
        tokenizer._add_bos_token, tokenizer._add_eos_token = wanted["add_bos_token"], wanted["add_eos_token"]
        tokenizer.update_post_processor()
    return tokenizer


# ----- the probe ------------------------------------------------------------------------------------------------------


def difference(
    one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, but: tuple[str, ...] = (), special: bool = True
) -> str | None:
    """A text that two tokenizers do not treat alike, with what each makes of it; None where all of the probe is equal.

    The probe is _LINES, then every special and every added token that both have: alone, at the begin and the end of
    words and of lines, and inside a word. Encoded with and without special tokens, and decoded with and without them.

    Args:
        but: tokens whose text is left out. special: compare what is put before and behind a text too.
    """
    lines = [line for line in _LINES if not any(token in line for token in but)]
    found = _first_difference(one, other, lines, special)
    tokens = sorted(_own_tokens(one) & _own_tokens(other))
    tokens = [token for token in tokens if not any(name in token for name in but)]
    for first in range(0, len(tokens), _TOKENS_A_LINE):
        some = tokens[first : first + _TOKENS_A_LINE]
        if found is None and _first_difference(
            one, other, _around(some), special
        ):  # then of one token, where it is one's
            singly = (_first_difference(one, other, [token, *_around([token])], special) for token in some)
            found = next(filter(None, singly), None) or _first_difference(one, other, _around(some), special)
    return found


def _own_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)


def _around(tokens: list[str]) -> list[str]:
    """Lines in which each token stands alone, in a word, before and behind blanks, at the begin and end of a line."""
    return [
        "".join(tokens),
        "a".join(("", *tokens, "")),
        " \n ".join(("", *tokens, "")),
        "  b ".join(("", *tokens, "")),
    ]


def _first_difference(
    one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, texts: list[str], special: bool
) -> str | None:
    for adds in (False, True) if special else (False,):
        encoded = [tokenizer(texts, add_special_tokens=adds)["input_ids"] for tokenizer in (one, other)]
        for text, ours, theirs in zip(texts, *encoded):
            if ours != theirs:
                return f"{text!r} becomes {_short(ours)} and {_short(theirs)}"
        for skips in (False, True):
            decoded = [tokenizer.batch_decode(encoded[0], skip_special_tokens=skips) for tokenizer in (one, other)]
            for ids, ours, theirs in zip(encoded[0], *decoded):
                if ours != theirs:
                    return f"the ids {_short(ids)} become {ours!r:.80} and {theirs!r:.80}"
    return None


def _short(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 12 else f"[{', '.join(map(str, ids[:12]))}, ...]"
