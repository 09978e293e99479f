"""The texts and captioned pictures of a user: files in, documents out. It knows no model."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..contents import beside, load_saved_dataset


def read_texts(path: str | os.PathLike, max_documents: int | None = None) -> list[str]:
    """Documents of a UTF-8 text file: its paragraphs, which blank lines divide.

    Raises:
        ValueError: if there is no such file, it is not UTF-8, or it holds nothing but blanks.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no text file '{path}'.")
    documents = list(itertools.islice(_paragraphs(_lines(path)), max_documents))
    if not documents:
        raise ValueError(f"'{path}' is empty. Expected documents, with blank lines between them.")
    return documents


def _lines(path: str | os.PathLike) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends, whichever those are; without a byte order mark."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # by which the line can be named
        for number, line in enumerate(file, start=1):
            try:
                line.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"'{path}' is not UTF-8: line {number} holds the byte 0x{ord(line[error.start]) & 0xFF:02X} at "
                    f"character {error.start + 1}. Save it as UTF-8."
                ) from error
            yield line.rstrip("\n")


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


def read_pairs(folder: str | os.PathLike, max_documents: int | None = None) -> Sequence[dict[str, Any]]:
    """Pictures and captions, `{"image": path or PIL picture, "text": caption}` each; pictures are opened when they are
    needed.

    Raises:
        ValueError: if the folder is neither of the two kinds that `certify` names, is empty, or lacks pictures or
            captions.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder '{folder}' with pictures and captions.")
    metadata = folder / "metadata.jsonl"
    if (folder / "dataset_dict.json").is_file():
        raise ValueError(f"'{folder}' holds several splits. Give the folder of one of them.")
    if metadata.is_file():
        pairs: Sequence[dict[str, Any]] = _metadata_pairs(folder, metadata, max_documents)
    elif (folder / "dataset_info.json").is_file():
        try:
            dataset = load_saved_dataset(folder)
        except Exception as error:  # a damaged one; one without rows is an IndexError
            raise ValueError(
                f"The dataset '{folder}' is empty or damaged ({type(error).__name__}: {error})."
            ) from error
        lacking = {"image", "text"} - set(dataset.column_names)
        if lacking:
            raise ValueError(
                f"The dataset '{folder}' has no column {' and '.join(sorted(lacking))}; it has "
                f"{', '.join(dataset.column_names)}. Expected the columns image and text."
            )
        _check_pictures(dataset, folder)
        number = min(len(dataset), max_documents or len(dataset))
        pairs = dataset.select_columns(["image", "text"]).select(range(number))
        bad = next((i for i, text in enumerate(captions_of(pairs)) if not isinstance(text, str)), None)
        if bad is not None:
            raise ValueError(f"Row {bad} of the dataset '{folder}' has no text. Expected a caption for each picture.")
    else:
        raise ValueError(
            f"'{folder}' holds no pairs: expected a folder with pictures and a metadata.jsonl ('file_name' and 'text' "
            "in each line), or one that datasets' save_to_disk wrote, with the columns image and text."
        )
    if not len(pairs):
        raise ValueError(f"'{folder}' is empty. Expected pictures and captions.")
    return pairs


def _check_pictures(dataset: Any, folder: Path) -> None:
    """A saved dataset brings its pictures: names of files in it are those of somebody's machine."""
    import pyarrow
    from datasets import Image

    if not isinstance(dataset.features["image"], Image):
        raise ValueError(
            f"The column image of the dataset '{folder}' holds no pictures but {dataset.features['image']}. Cast it to "
            "datasets.Image() and save it again."
        )
    column = dataset.data.column("image")
    named = [chunk.field("bytes").null_count for chunk in column.chunks if pyarrow.types.is_struct(chunk.type)]
    if sum(named):
        raise ValueError(
            f"{sum(named)} pictures of the dataset '{folder}' are names of files elsewhere, or are missing. Save it "
            "again where these files are."
        )


def captions_of(pairs: Any) -> list[str]:
    """All captions; no picture is opened for it."""
    return [row["text"] for row in pairs] if isinstance(pairs, list) else list(pairs["text"])


def _metadata_pairs(folder: Path, metadata: Path, max_documents: int | None) -> list[dict[str, Any]]:
    pairs: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(metadata), start=1):
        if not line.strip():
            continue
        if len(pairs) == max_documents:
            break
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{metadata}, line {number} is no JSON: {error}.") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file_name", "text")):
            raise ValueError(f"{metadata}, line {number}: expected the strings 'file_name' and 'text', got {line:.80}")
        if any("\ud800" <= letter <= "\udfff" for letter in row["text"]):
            raise ValueError(
                f"{metadata}, line {number}: the caption has half of a UTF-16 pair (\\uD800 to \\uDFFF) alone."
            )
        picture = beside(folder, row["file_name"], f"{metadata}, line {number}")
        pairs.append({"image": str(picture), "text": row["text"]})
    missing = [pair["image"] for pair in pairs if not Path(pair["image"]).is_file()]
    if missing:
        raise ValueError(
            f"{metadata} names files that are not there: {len(missing)} of {len(pairs)}, e.g. {missing[0]}."
        )
    return pairs
