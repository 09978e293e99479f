"""Documents as files: segments of text and pictures to HTML, to Markdown and to JSON, and from JSON back.

It knows strings and PIL pictures only. A document is a list of segments, as `post_process_interleaved` makes them; a
batch is a list of documents, and so is what is written into one file.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from ..files import read_json, write_whole


Document = list[dict[str, Any]]

PICTURE, UNFINISHED = "Picture {number}", "Picture {number} was not finished"
LOSSLESS_MODES = ("1", "L", "LA", "RGB", "RGBA")
DATA_URI = "data:image/png;base64,"
STYLE = """
body{font:1.05rem/1.6 system-ui,sans-serif;max-width:42rem;margin:2rem auto;padding:0 1rem}
body{color:#1d2330;background:#fff}
article+article{margin-top:3rem;padding-top:2rem;border-top:1px solid #c8cfdb}
p{white-space:pre-wrap;overflow-wrap:anywhere}
img{display:block;max-width:100%;height:auto;margin:1rem 0}
.unfinished{color:#8c1d18;font-style:italic}
"""


def html_page(
    documents: Sequence[Document],
    title: str = "Documents",
    language: str = "en",
    picture: str = PICTURE,
    unfinished: str = UNFINISHED,
) -> str:
    """Documents as one page of HTML that needs no other file.

    Args:
        documents: lists of segments, see `post_process_interleaved`. A segment may have a text of its own for its
            picture, for those who do not see it, under "alt".
        language: of the texts, as HTML's `lang` has it ("en", "pt-BR").
        picture, unfinished: what stands for a picture without "alt", and in place of one that was not finished;
            `{number}` counts the pictures of a document.
    Raises:
        ValueError: for what is no list of documents, and pictures of a mode that PNG would change.
    """
    parts = [
        f"<article>\n{segments_html(document, picture, unfinished)}\n</article>" for document in _checked(documents)
    ]
    return page_html(title, "<main>\n{}\n</main>".format("\n".join(parts)), STYLE, language)


def segments_html(document: Document, picture: str = PICTURE, unfinished: str = UNFINISHED) -> str:
    """The segments of a document, for a page's body; arguments as in `html_page`."""
    parts = []
    for segment, number in _numbered(document):
        if segment["type"] == "text":
            parts.append(f'<p dir="auto">{html.escape(_shown(segment["text"]))}</p>')
        elif segment["image"] is None:
            parts.append(f'<p class="unfinished">{html.escape(_alt(segment, unfinished, number))}</p>')
        else:
            parts.append(picture_html(segment["image"], _alt(segment, picture, number)))
    return "\n".join(parts)


def picture_html(image: Image.Image, alt: str) -> str:
    """A picture that stands in the page itself."""
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img alt="{html.escape(alt)}" {size} src="{_data_uri(_png(image))}">'


def page_html(title: str, body: str, style: str, language: str = "en") -> str:
    """A page around a body of HTML. style: of CSS."""
    return (
        f'<!doctype html>\n<html lang="{html.escape(language)}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{html.escape(_shown(title))}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def save_html(documents: Sequence[Document], path: str | os.PathLike, overwrite: bool = False, **settings: str) -> Path:
    """Write `html_page(documents, **settings)`; returns the path.

    Raises:
        FileExistsError: if the file is there and `overwrite` is False. ValueError: as `html_page`.
    """
    return _save(path, overwrite, lambda add: html_page(documents, **settings))


def save_markdown(
    documents: Sequence[Document],
    path: str | os.PathLike,
    overwrite: bool = False,
    picture: str = PICTURE,
    unfinished: str = UNFINISHED,
) -> Path:
    """Write documents as Markdown (CommonMark), with their pictures as PNG files beside it; returns the path.

    Text stays text, whatever Markdown would make of it; its lines and paragraphs are kept. The pictures of `story.md`
    are `story-<document>-<segment>-<digest>.png`, so that many documents may lie in one folder. Arguments as in
    `html_page`.

    Raises:
        FileExistsError: if the file is there and `overwrite` is False. ValueError: as `html_page`.
    """

    def render(add: Callable[[int, int, Image.Image], str]) -> str:
        rendered = []
        for row, document in enumerate(_checked(documents)):
            blocks = []
            for place, (segment, number) in enumerate(_numbered(document)):
                if segment["type"] == "text":
                    blocks.append(_markdown(_shown(segment["text"])))
                elif segment["image"] is None:
                    blocks.append(f"*{_markdown_line(_alt(segment, unfinished, number))}*")
                else:
                    alt = _markdown_line(_alt(segment, picture, number))
                    blocks.append(f"![{alt}]({quote(add(row, place, segment['image']))})")
            rendered.append("\n\n".join(block for block in blocks if block))
        return "\n\n***\n\n".join(rendered) + "\n"

    return _save(path, overwrite, render)


def save_json(
    documents: Sequence[Document], path: str | os.PathLike, overwrite: bool = False, embed_pictures: bool = False
) -> Path:
    """Write documents as JSON that `load_json` reads back to equal segments; returns the path.

    `{"jam_documents": 1, "documents": [[segment, ...], ...]}`; the segments are as they came, with the name of a PNG
    file beside it in place of a picture, or, with `embed_pictures`, its data URI. An unfinished picture stays `null`
    and keeps its codes. Further entries of a segment stay as well.

    Raises:
        FileExistsError: if the file is there and `overwrite` is False. ValueError: as `html_page`, and for entries that
            JSON does not have.
    """

    def render(add: Callable[[int, int, Image.Image], str]) -> str:
        rows: list[list[dict[str, Any]]] = []
        for row, document in enumerate(_checked(documents)):
            rows.append([])
            for place, segment in enumerate(document):
                if segment.get("image") is not None:
                    image = segment["image"]
                    segment = {**segment, "image": _data_uri(_png(image)) if embed_pictures else add(row, place, image)}
                rows[-1].append(segment)
                problem = _lost_in_json(segment)
                if problem:
                    raise ValueError(f"Document {row}, segment {place} cannot be written as JSON: {problem}.")
        return json.dumps({"jam_documents": 1, "documents": rows}, ensure_ascii=False, indent=1) + "\n"

    return _save(path, overwrite, render)


def load_json(path: str | os.PathLike) -> list[Document]:
    """The documents that `save_json` wrote, their pictures as PIL pictures.

    Raises:
        ValueError: if the file holds no such documents, or a picture is missing, damaged, too large for Pillow or not
            beside it (a message says which). OSError: if the file cannot be read.
    """
    path = Path(path)
    content = read_json(path, kind=object)
    if not isinstance(content, dict) or content.get("jam_documents") != 1:
        raise ValueError(
            f"'{path}' holds no documents. Expected a file that save_json wrote, with \"jam_documents\": 1."
        )
    documents = content.get("documents")
    for row, document in enumerate(documents if isinstance(documents, list) else []):
        for place, segment in enumerate(document if isinstance(document, list) else []):
            if isinstance(segment, dict) and isinstance(segment.get("image"), str):
                segment["image"] = _read(path, segment["image"], f"'{path}', document {row}, segment {place}")
    try:
        return _checked(documents)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error


def _read(path: Path, source: str, where: str) -> Image.Image:
    if source.startswith(DATA_URI):
        name = "the picture in the file"
    elif not source or re.search(r"[/\\:\0]", source) or source in (".", ".."):
        raise ValueError(f"{where}: {source!r:.80} is not the name of a file beside it.")
    else:
        name = f"'{path.with_name(source)}'"
    try:
        data = base64.b64decode(source.removeprefix(DATA_URI), validate=True) if name[0] != "'" else None
        with Image.open(path.with_name(source) if data is None else io.BytesIO(data), formats=["PNG"]) as image:
            return image.copy()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where}: {name} is too large: {error} (PIL.Image.MAX_IMAGE_PIXELS is the limit).") from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:  # what PIL says of damaged files
        raise ValueError(f"{where}: cannot read {name}: {error}. Expected an undamaged PNG.") from error


def _lost_in_json(segment: dict[str, Any]) -> str | None:
    """What is wrong with a segment that would not come back from JSON as it is; tuples and keys that are no text do
    not.
    """
    try:
        text = json.dumps(segment, allow_nan=False)
        text.encode()
        return _differing(segment, json.loads(text), "it")
    except RecursionError:
        return "it is nested too deep"
    except (TypeError, ValueError) as error:
        return str(error)


def _differing(ours: Any, read: Any, where: str) -> str | None:
    if isinstance(ours, dict):
        odd = [key for key in ours if type(key) is not str]
        if odd:
            return f"{where} has the key {odd[0]!r:.40}, and JSON's keys are text"
        return next(filter(None, (_differing(ours[key], read[key], f"{where}[{key!r:.40}]") for key in ours)), None)
    if isinstance(ours, list):
        return next(filter(None, (_differing(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(ours, read)))), None)
    if isinstance(ours, str) and re.search("[\ud800-\udfff]", ours):
        return f"{where} has half a character (a lone surrogate), which no file can hold"
    if type(ours) is not type(read) or ours != read:
        return f"{where} is a {type(ours).__name__}, which JSON does not have; it would come back as {read!r:.40}"
    return None


# ----- segments -------------------------------------------------------------------------------------------------------


def _checked(documents: Any) -> list[Document]:
    if not isinstance(documents, (list, tuple)) or not all(
        isinstance(document, (list, tuple)) for document in documents
    ):
        raise ValueError(
            "Expected a list of documents, each a list of segments, as post_process_interleaved returns it; for one "
            f"document pass [document]. Got {documents!r:.80}."
        )
    for row, document in enumerate(documents):
        for place, segment in enumerate(document):
            problem = _problem(segment)
            if problem:
                raise ValueError(f"Document {row}, segment {place} {problem}.")
    return [list(document) for document in documents]


def _problem(segment: Any) -> str | None:
    kind = segment.get("type") if isinstance(segment, dict) else None
    if kind not in ("text", "image") or (kind == "text") == ("image" in segment):
        return f'must be {{"type": "text", "text": ...}} or {{"type": "image", "image": ...}}, got {segment!r:.80}'
    for name in ("text", "alt"):
        value = segment.get(name, "" if (name, kind) != ("text", "text") else None)
        if not isinstance(value, str):
            return f'has under "{name}" {value!r:.80}, which is no text'
        if re.search("[\ud800-\udfff]", value):
            return f'has half a character (a lone surrogate) under "{name}", which no file can hold'
    image = segment.get("image")
    if image is not None and not isinstance(image, Image.Image):
        return f"must have a PIL picture or None as its image, got {type(image).__name__}"
    if image is not None and (image.mode not in LOSSLESS_MODES or 0 in image.size):
        return (
            f"has a picture of the mode '{image.mode}' and size {image.size}; expected at least one pixel in one of "
            f"{', '.join(LOSSLESS_MODES)}. Convert it, e.g. image.convert('RGB')"
        )
    return None


def _numbered(document: Document) -> list[tuple[dict[str, Any], int]]:
    """Segments, and how many pictures there are up to each."""
    numbered, number = [], 0
    for segment in document:
        number += segment["type"] == "image"
        numbered.append((segment, number))
    return numbered


def _alt(segment: dict[str, Any], pattern: str, number: int) -> str:
    """In one line. What was not finished says so, beside what it has under "alt"."""
    own, words = (
        " ".join(_shown(text).split()) for text in (segment.get("alt", ""), pattern.replace("{number}", str(number)))
    )
    if own:
        return own if segment["image"] is not None else f"{words}: {own}"
    return words


def _shown(text: str) -> str:
    """One kind of line end; a replacement character for control characters, which neither HTML nor Markdown can
    hold.
    """
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", re.sub("\r\n?", "\n", text))


# ----- Markdown -------------------------------------------------------------------------------------------------------


def _markdown(text: str) -> str:
    """Text as paragraphs; blank lines part them, and each other line end is a line break."""
    paragraphs = [part for part in re.split(r"\n(?:[ \t]*\n)+", f"\n\n{text}\n\n") if part.strip(" \t\n")]
    return "\n\n".join("\\\n".join(map(_markdown_line, part.strip("\n").split("\n"))) for part in paragraphs)


def _markdown_line(line: str) -> str:
    """One line in which nothing is markup: not what stands in it, nor what begins it, nor the space around it."""
    line = re.sub(r"([\\`*_\[\]<>&~|$])", r"\\\1", line)
    line = re.sub(r"^([ \t]*)([#+=:%-]|\d{1,9}(?=[.)]))", _not_a_block, line)
    around = re.compile(r"^\s+|\s+$")
    return around.sub(lambda space: "".join(f"&#{ord(character)};" for character in space.group()), line)


def _not_a_block(start: re.Match[str]) -> str:
    space, mark = start.groups()
    return f"{space}{mark}\\" if mark.isdigit() else f"{space}\\{mark}"


# ----- files ----------------------------------------------------------------------------------------------------------


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _data_uri(data: bytes) -> str:
    return DATA_URI + base64.b64encode(data).decode()


def _save(path: str | os.PathLike, overwrite: bool, render: Callable[[Callable[..., str]], str]) -> Path:
    """Write what `render(add)` returns, the pictures that it adds before it; all of it, or nothing.

    The name of a picture has a digest of what is in it: no file that another document shows is ever changed.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder. Name a file in it.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"'{path}' exists. Choose another name, or pass overwrite=True.")
    files: dict[str, bytes] = {}

    def add(row: int, place: int, image: Image.Image) -> str:
        data = _png(image)
        name = f"{path.stem}-{row}-{place}-{hashlib.sha256(data).hexdigest()[:12]}.png"
        files[name] = data
        return name

    text = render(add)
    path.parent.mkdir(parents=True, exist_ok=True)
    new: list[Path] = []
    try:
        for name, data in files.items():
            target = path.with_name(name)
            if not target.exists():
                new.append(target)
            write_whole(target, data)
        write_whole(path, text, overwrite)
    except BaseException:
        for target in new:
            target.unlink(missing_ok=True)
        raise
    return path


__all__ = ["html_page", "load_json", "save_html", "save_json", "save_markdown"]
