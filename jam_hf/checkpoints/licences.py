"""What a parent's own model card says of its licence. A card is free text by others: what is read here is data, one
short line.

It knows cards; what follows from a licence is the reader's to judge.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


_LONGEST = 200


def licence_of(folder: Path) -> str | None:
    """The licence that README.md of a folder states, in words; None where it states none, or cannot be read.

    A `license_name` wins over `license`; the entries of a list or mapping are joined.
    """
    path = folder / "README.md"
    if not path.is_file():
        return None
    from huggingface_hub import metadata_load

    try:
        data = metadata_load(path) or {}  # not ModelCard, which refuses a head whose other fields it does not like
    except Exception:  # whatever is wrong with a card is no reason not to read the weights
        return None
    return _words(data.get("license_name")) or _words(data.get("license"))


def _words(value: Any) -> str | None:
    return " and ".join(dict.fromkeys(_parts(value)))[:_LONGEST] or None


def _parts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        named = value.get("name") or value.get("id")
        yield from _parts(named if named else list(value.values()))
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _parts(entry)
    elif value is not None and (line := " ".join(str(value).split())):
        yield line


def as_text(line: str) -> str:
    """Words of others inside Markdown: no letter of them is markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#!$~" else letter for letter in line)
