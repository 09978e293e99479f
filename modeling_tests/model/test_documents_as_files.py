"""Documents as HTML, Markdown and JSON: read back by an HTML parser, a CommonMark renderer and `load_json`."""

import io
import json
import os
import string
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from jam_hf import JamProcessor
from jam_hf.generation import export
from jam_hf.generation.export import html_page, load_json, save_html, save_json, save_markdown


def noise(seed: int, mode: str = "RGB", size=(5, 3)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


NASTY = st.lists(
    st.sampled_from(
        [
            *string.punctuation,
            *" \t\n\n\r\x00\x1b\u00a0\u2028\u00e9\u6f22",
            "1",
            "23",
            "a",
            "b",
            "http://x.y",
            "&amp;",
            "---",
        ]
    ),
    max_size=25,
).map("".join)
PICTURES = st.builds(noise, st.integers(0, 9), st.sampled_from(export.LOSSLESS_MODES))
SEGMENTS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, st.one_of(NASTY, st.text(max_size=20))),
    st.builds(lambda image: {"type": "image", "image": image}, PICTURES),
    st.builds(lambda image, alt: {"type": "image", "image": image, "alt": alt}, PICTURES, NASTY),
    st.builds(
        lambda codes: {"type": "image", "image": None, "image_tokens": codes},
        st.lists(st.integers(300, 315), max_size=5),
    ),
)
DOCUMENTS = st.lists(st.lists(SEGMENTS, max_size=5), max_size=3)
TEXT = {"type": "text", "text": "a sea"}
STORY = [
    [{"type": "text", "text": "A <b>ruby</b> & *more*"}, {"type": "image", "image": noise(1)}],
    [
        {"type": "image", "image": None, "image_tokens": [300, 301]},
        {"type": "image", "image": noise(2), "alt": 'a "red" one'},
    ],
]


class Reader(HTMLParser):
    """Documents of a page: texts of `<p>` as strings, `(alt, source)` of pictures, what was not finished as a list."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.documents: list[list] = []
        self.tags: list[str] = []
        self.language = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "html":
            self.language = attributes["lang"]
        elif tag == "article":
            self.documents.append([])
        elif tag == "img":
            self.documents[-1].append((attributes["alt"], attributes["src"]))
        elif tag == "p":
            self.documents[-1].append([""] if attributes.get("class") == "unfinished" else "")
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag in ("p", "article", "title", "style"):
            assert self.tags.pop() == tag or tag == "article"

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "p":
            last = self.documents[-1]
            last[-1] = [last[-1][0] + data] if isinstance(last[-1], list) else last[-1] + data


def shown(text: str) -> str:
    """Every line end as one line feed, every other control character replaced: one by one, by hand."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join("\ufffd" if (ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 else c for c in text)


def one_line(text: str) -> str:
    return " ".join(shown(text).split())


def expected_alts(document) -> list[tuple[bool, str]]:
    """Of each picture, whether it was finished, and its words."""
    pictures = [segment for segment in document if segment["type"] == "image"]
    return [
        (True, one_line(s.get("alt", "")) or f"Picture {i}") if s["image"] else (False, f"Picture {i} was not finished")
        for i, s in enumerate(pictures, 1)
    ]


# ----- HTML -----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS)
def test_a_page_says_what_the_segments_say_and_needs_no_other_file(documents):
    page = html_page(documents, title="<&>", language="pt-BR")
    read = Reader(page)
    assert read.language == "pt-BR" and "<title>&lt;&amp;&gt;</title>" in page
    assert len(read.documents) == len(documents)
    for found, document in zip(read.documents, documents):
        alts = iter(expected_alts(document))
        for part, segment in zip(found, document, strict=True):
            if segment["type"] == "text":
                assert part == shown(segment["text"])
                continue
            finished, words = next(alts)
            if not finished:
                assert part == [words]
                continue
            alt, source = part
            assert alt == words and source.startswith("data:image/png;base64,")
            again = Image.open(io.BytesIO(b64decode(source.split(",")[1])))
            assert again.mode == segment["image"].mode and again.tobytes() == segment["image"].tobytes()


def test_words_for_pictures_in_another_language(tmp_path):
    path = save_html(
        STORY, tmp_path / "a.html", language="de", picture="Bild {number}", unfinished="Bild {number} fehlt"
    )
    first, second = Reader(path.read_text(encoding="utf-8")).documents
    assert (first[1][0], second[0], second[1][0]) == ("Bild 1", ["Bild 1 fehlt"], 'a "red" one')
    path = save_markdown(STORY, tmp_path / "a.md", picture="Bild {number}", unfinished="Bild {number} fehlt")
    assert "![Bild 1]" in path.read_text() and "*Bild 1 fehlt*" in path.read_text()


# ----- Markdown -------------------------------------------------------------------------------------------------------


def rendered(markdown: str) -> list[list]:
    """Documents of a Markdown file as CommonMark (with tables and strike-through) has them: as in `Reader`."""
    documents: list[list] = [[]]
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown):
        if token.type == "hr":
            documents.append([])
        elif token.type == "inline":
            kinds = [child.type for child in token.children]
            assert set(kinds) <= {"text", "text_special", "hardbreak", "image", "em_open", "em_close"}, token.children
            text = "".join("\n" if c.type == "hardbreak" else c.content for c in token.children if c.type != "image")
            if "image" in kinds:
                (image,) = (child for child in token.children if child.content or child.type == "image")
                documents[-1].append(("".join(c.content for c in image.children), unquote(image.attrs["src"])))
            else:
                documents[-1].append([text] if "em_open" in kinds else text)
        else:
            assert token.type in ("paragraph_open", "paragraph_close"), token
    return documents


def expected_markdown(document) -> list:
    """Paragraphs as blank lines part the texts, without the blank lines."""
    expected, alts = [], iter(expected_alts(document))
    for segment in document:
        if segment["type"] == "text":
            paragraphs: list[list[str]] = [[]]
            for line in shown(segment["text"]).split("\n"):
                if line.strip(" \t"):
                    paragraphs[-1].append(line)
                else:
                    paragraphs.append([])
            expected += ["\n".join(lines) for lines in paragraphs if lines]
        else:
            finished, words = next(alts)
            expected.append((words, segment["image"]) if finished else [words])
    return expected


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS)
def test_text_stays_text_in_markdown_and_links_find_their_pictures(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("md")
    path = save_markdown(documents, folder / "a story (1) #2%20.md")
    found = rendered(path.read_text(encoding="utf-8"))
    assert len(found) == max(len(documents), 1)
    for blocks, document in zip(found, documents):
        for part, wanted in zip(blocks, expected_markdown(document), strict=True):
            if isinstance(wanted, tuple):
                alt, name = part
                assert alt == wanted[0] and Path(name).name == name
                again = Image.open(folder / name)
                assert again.tobytes() == wanted[1].tobytes() and again.mode == wanted[1].mode
            else:
                assert part == wanted


@pytest.mark.parametrize(
    "text",
    [
        *(
            "~~gone~~",
            "~~~\ncode\n~~~",
            "```\ncode\n```",
            "- item",
            "+ item",
            "* item",
            "1. item",
            "12) item",
            "# head",
            "> quote",
        ),
        *(
            "head\n---",
            "head\n===",
            "---",
            "***",
            "___",
            "    code",
            "\tcode",
            "a  \nb",
            "a\\\nb",
            "<b>bold</b>",
            "<!-- gone -->",
        ),
        *(
            "a | b\n--|--\n1 | 2",
            "| a |\n|:-:|\n| 1 |",
            "a\n|-|\n1",
            "[a](b)",
            "![a](b)",
            "[a]: b",
            "[a][b]",
            "<http://a.b>",
            "&amp; &#42;",
        ),
        *("**a** _b_ `c`", "\\*", "a\n# b\n- c\n1. d\n> e", "\n\n  a \n\n\n b\t\n \nc\n", "\u00a0a\u2003"),
    ],
)
def test_markup_in_a_text_is_shown_and_not_obeyed(text, tmp_path):
    document = [{"type": "text", "text": text}]
    assert rendered(save_markdown([document], tmp_path / "a.md").read_text(encoding="utf-8")) == [
        expected_markdown(document)
    ]


# ----- JSON -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.booleans())
def test_json_comes_back_as_it_was(tmp_path_factory, documents, embed):
    folder = tmp_path_factory.mktemp("json")
    path = save_json(documents, folder / "story.json", embed_pictures=embed)
    assert load_json(path) == documents
    pictures = sum(segment.get("image") is not None for document in documents for segment in document)
    assert len(os.listdir(folder)) == 1 + (0 if embed else pictures)
    assert load_json(save_json(load_json(path), folder / "again.json")) == documents


def test_further_entries_stay_and_a_moved_folder_reads(tmp_path):
    documents = [[{"type": "text", "text": "a", "score": 0.5}, {"type": "image", "image": noise(3), "ids": [1, [2]]}]]
    save_json(documents, tmp_path / "old" / "story.json")
    (tmp_path / "old").rename(tmp_path / "new")
    assert load_json(tmp_path / "new" / "story.json") == documents
    documents[0][0]["score"] = float("nan")
    with pytest.raises(ValueError, match="Document 0, segment 0 cannot be written as JSON"):
        save_json(documents, tmp_path / "nan.json")
    documents[0][0]["score"] = {1}
    with pytest.raises(ValueError, match="Document 0, segment 0 cannot be written as JSON"):
        save_json(documents, tmp_path / "set.json")
    assert sorted(os.listdir(tmp_path)) == ["new"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no JSON file"),
        ("[]", "holds no documents"),
        ('{"jam_documents": 2, "documents": []}', "holds no documents"),
        ('{"jam_documents": 1}', "Expected a list of documents"),
        ('{"jam_documents": 1, "documents": [7]}', "Expected a list of documents"),
        ('{"jam_documents": 1, "documents": [[{"type": "video"}]]}', "Document 0, segment 0 must be"),
        ('{"jam_documents": 1, "documents": [[{"type": "image", "image": 5}]]}', "must have a PIL picture or None"),
        ('{"jam_documents": 1, "documents": [[{"type": "image", "image": "absent.png"}]]}', "cannot read .*absent.png"),
        (
            '{"jam_documents": 1, "documents": [[{"type": "image", "image": "../x.png"}]]}',
            "not the name of a file beside it",
        ),
        ('{"jam_documents": 1, "documents": [[{"type": "image", "image": "/etc/passwd"}]]}', "not the name of a file"),
        ('{"jam_documents": 1, "documents": [[{"type": "image", "image": ""}]]}', "not the name of a file"),
        (
            '{"jam_documents": 1, "documents": [[{"type": "image", "image": "data:image/png;base64,AAA"}]]}',
            "cannot read the pic",
        ),
        (
            '{"jam_documents": 1, "documents": [[{"type": "image", "image": "data:image/png;base64,AAAA"}]]}',
            "cannot read the",
        ),
        (
            '{"jam_documents": 1, "documents": [[{"type": "image", "image": "story.json"}]]}',
            "cannot read .*Expected an undam",
        ),
    ],
)
def test_files_that_hold_no_documents_are_refused(content, words, tmp_path):
    (tmp_path / "story.json").write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        load_json(tmp_path / "story.json")
    assert "story.json" in str(error.value)


def test_a_picture_cut_short_is_refused(tmp_path):
    path = save_json(STORY, tmp_path / "story.json")
    name = json.loads(path.read_text())["documents"][0][1]["image"]
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30])
    with pytest.raises(ValueError, match=f"document 0, segment 1: cannot read .*{name}"):
        load_json(path)


# ----- files ----------------------------------------------------------------------------------------------------------

SAVERS = [(save_html, "html"), (save_markdown, "md"), (save_json, "json")]


@pytest.mark.parametrize(("save", "suffix"), SAVERS)
def test_many_documents_lie_in_one_folder(save, suffix, tmp_path):
    """Of the same stem too; what is there is not written over, and what another shows never changes."""
    first = save_json(STORY, tmp_path / "story.json")
    other = [[{"type": "text", "text": "b"}, {"type": "image", "image": noise(9)}], STORY[1]]
    if suffix != "json":
        save(other, tmp_path / f"story.{suffix}")
    before = (tmp_path / "story.json").read_bytes()
    with pytest.raises(FileExistsError, match=f"story.{suffix}' exists.*overwrite=True"):
        save(other, tmp_path / f"story.{suffix}")
    assert (tmp_path / "story.json").read_bytes() == before and load_json(first) == STORY
    save(STORY, tmp_path / f"story.{suffix}", overwrite=True)
    save(other, tmp_path / f"story-0.{suffix}")
    assert load_json(first) == STORY
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save(STORY, tmp_path)


@pytest.mark.parametrize(("save", "suffix"), SAVERS)
def test_files_are_there_whole_or_not_at_all(save, suffix, tmp_path, monkeypatch):
    save(STORY[:1], tmp_path / f"old.{suffix}")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    rename, calls = os.replace, []
    for fails_at in range(1, 4):
        calls.clear()

        def failing(source, target, fails_at=fails_at):
            calls.append(target)
            if len(calls) == fails_at or Path(target).suffix != ".png":
                raise OSError(28, "No space left on device")
            rename(source, target)

        monkeypatch.setattr(os, "replace", failing)
        for name in ("new", "old"):
            with pytest.raises(OSError, match="No space left"):
                save(STORY, tmp_path / f"{name}.{suffix}", overwrite=True)
        assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_files_may_be_read_by_others_as_any_file(tmp_path):
    (tmp_path / "any").write_text("")
    save_markdown(STORY, tmp_path / "deep" / "er" / "story.md")
    modes = {path.stat().st_mode for path in (tmp_path / "deep" / "er").iterdir()}
    assert modes == {(tmp_path / "any").stat().st_mode}


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        (STORY[0], r"pass \[document\]"),
        ("text", "Expected a list of documents"),
        ([[{"type": "text"}]], 'Document 0, segment 0 has under "text" None'),
        ([[{"type": "text", "text": b"a"}]], "which is no text"),
        ([[{"type": "text", "text": "\ud800"}]], "half a character"),
        ([[], [{"type": "image", "image": noise(1), "alt": 5}]], 'Document 1, segment 0 has under "alt" 5'),
        ([[{"type": "image"}]], "must be"),
        ([[{"type": "text", "text": "a", "image": None}]], "must be"),
        ([["text"]], "must be"),
        ([[{"type": "image", "image": noise(1, "CMYK")}]], "mode 'CMYK'.*convert"),
        ([[{"type": "image", "image": Image.new("RGB", (0, 3))}]], "at least one pixel"),
        ([[{"type": "image", "image": "a.png"}]], "PIL picture or None as its image, got str"),
    ],
)
@pytest.mark.parametrize(("save", "suffix"), SAVERS)
def test_what_is_no_document_is_refused(save, suffix, documents, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        save(documents, tmp_path / f"a.{suffix}")
    assert os.listdir(tmp_path) == []


def test_the_processor_has_them_for_those_without_jam_hf(tmp_path):
    JamProcessor.save_json(STORY, tmp_path / "story.json")
    assert JamProcessor.load_json(tmp_path / "story.json") == STORY
    assert JamProcessor.save_html is save_html and JamProcessor.save_markdown is save_markdown


@pytest.mark.parametrize(
    "extra", [{1: "a"}, {None: 1}, {True: 1}, (1, 2), [{"x": ({},)}], {"x": {"y": {2.5: 0}}}, "\ud800"]
)
def test_what_would_come_back_otherwise_is_refused(extra, tmp_path):
    with pytest.raises(ValueError, match="Document 0, segment 1 cannot be written as JSON: it\\['extra'\\]"):
        save_json([[TEXT, {**TEXT, "extra": extra}]], tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_what_is_written_comes_back_equal(tmp_path):
    extra = {"a": [1, 1.0, -0.0, 10**40, True, None, "\u2028", {"": []}], "text": "1"}
    document = [{**TEXT, "extra": extra}]
    assert repr(load_json(save_json([document], tmp_path / "x.json"))) == repr([document])


def test_deep_and_huge_files_are_errors_that_say_so(tmp_path, monkeypatch):
    (tmp_path / "deep.json").write_text('{"jam_documents": 1, "documents": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json' cannot be read: its JSON is nested too deep"):
        load_json(tmp_path / "deep.json")
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deep"):
        save_json([[{**TEXT, "extra": deep}]], tmp_path / "x.json")
    picture = {"type": "image", "image": Image.new("RGB", (20, 20))}
    for embedded in (False, True):
        save_json([[picture]], tmp_path / "x.json", overwrite=True, embed_pictures=embedded)
        with monkeypatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
            with pytest.raises(ValueError, match=r"x\.json', document 0, segment 0: .* is too large: .*exceeds limit"):
                load_json(tmp_path / "x.json")


def test_a_file_that_came_meanwhile_stays(tmp_path, monkeypatch):
    """Written between our look and our last step."""
    import jam_hf.generation.export as module

    render = module.html_page

    def late(documents):
        (tmp_path / "x.html").write_text("theirs")
        return render(documents)

    monkeypatch.setattr(module, "html_page", late)
    with pytest.raises(FileExistsError, match=r"x\.html' exists"):
        save_html([[TEXT]], tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"cannot write '.*x\.html': No space left"):
        save_html([[TEXT]], tmp_path / "x.html")
    assert not list(tmp_path.iterdir())
