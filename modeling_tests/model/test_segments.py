"""`post_process_interleaved` on batches with padding: random documents, made from parts, against what they were
made of.
"""

import numpy as np
import pytest
import torch
from conftest import same_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_picture_layout import (  # noqa: F401  (fixtures among them)
    BOS,
    EOS,
    FIRST,
    LAST,
    LAYOUTS,
    N,
    layout_jam,
    layout_processor,
    layout_tokenizer,
    picture,
)


PAD = 0
TEXTS = ("red", " a ruby is", " ", "\n\n", "\u00e9\u00df", "a<b>&*_", "  x  ")


@st.composite
def parts(draw):
    """Texts and pictures in any order and number, the last one perhaps cut or ended by `<eos>`."""
    code = st.integers(FIRST, LAST - 1)
    kinds = draw(st.lists(st.sampled_from(["text", "picture", "picture"]), max_size=5))
    found = [
        (kind, draw(st.sampled_from(TEXTS) if kind == "text" else st.lists(code, min_size=N, max_size=N)))
        for kind in kinds
    ]
    return found, draw(st.sampled_from(["eos", "cut", "unfinished"])), draw(st.lists(code, min_size=1, max_size=N - 1))


def assemble(found, end, rest, layout, tokenizer, has_bos, with_markup) -> tuple[list[int], list]:
    """Ids, and the segments to expect: text as a string, the codes of a picture as a list; texts in a row are one."""
    ids, expected = [], []

    def write(text: str, tokens: list[int]) -> None:
        ids.extend(tokens)
        expected.append((expected.pop() if expected and isinstance(expected[-1], str) else "") + text)

    if has_bos:
        write("<s>" * with_markup, [BOS])
    for kind, content in [*found, *([("unfinished", rest)] if end == "unfinished" else [])]:
        if kind == "text":
            write(content, tokenizer(content, add_special_tokens=False)["input_ids"])
            continue
        whole = picture(layout, [*content, *[FIRST] * (N - len(content))])
        if kind == "unfinished":
            whole = whole[: [i for i, token in enumerate(whole) if FIRST <= token < LAST][len(content) - 1] + 1]
        ids.extend(whole)
        expected.append(content)
    if end == "eos":
        write("</s>" * with_markup, [EOS])
    return ids, [part for part in expected if not isinstance(part, str) or part.strip()]


def matches(segments, expected, model, processor) -> bool:
    if len(segments) != len(expected):
        return False
    for segment, part in zip(segments, expected):
        if isinstance(part, str):
            same = segment == {"type": "text", "text": part}
        elif len(part) < N:
            same = segment == {"type": "image", "image": None, "image_tokens": part}
        else:
            pixels = model.decode_image_tokens(torch.tensor([part]))
            image = processor.image_processor.postprocess(pixels)[0]
            same = (
                set(segment) == {"type", "image"}
                and np.abs(np.asarray(segment["image"], int) - np.asarray(image)).max() <= 1
            )
        if not same:
            return False
    return True


@pytest.mark.parametrize("name", LAYOUTS)
def test_segments_of_padded_batches_are_the_parts_they_were_made_of(name, layout_jam, layout_tokenizer):  # noqa: F811
    model, layout, processor = layout_jam(name), LAYOUTS[name], layout_processor(layout_tokenizer, name)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(parts(), min_size=1, max_size=3), st.booleans(), st.integers(0, 4), st.booleans(), st.booleans())
    def check(documents, left, more, has_bos, skip):
        rows, expected = zip(
            *(assemble(*document, layout, layout_tokenizer, has_bos, not skip) for document in documents)
        )
        length = max(map(len, rows)) + more
        padded = [[PAD] * (length - len(r)) + r if left else r + [PAD] * (length - len(r)) for r in rows]
        found = processor.post_process_interleaved(
            torch.tensor(padded).view(len(rows), length), model, skip_special_tokens=skip
        )
        assert all(
            matches(segments, parts_, model, processor) for segments, parts_ in zip(found, expected, strict=True)
        )

    check()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_prompt_may_end_anywhere(name, layout_jam, layout_tokenizer):  # noqa: F811
    """What comes behind is what was written; a picture that the prompt had begun comes whole."""
    model, layout, processor = layout_jam(name), LAYOUTS[name], layout_processor(layout_tokenizer, name)
    codes = [[*range(FIRST, LAST)], [*range(LAST - 1, FIRST - 1, -1)]]
    red = layout_tokenizer("red", add_special_tokens=False)["input_ids"]
    pieces = [
        ([BOS, *red], "red"),
        (picture(layout, codes[0]), codes[0]),
        (picture(layout, codes[1]), codes[1]),
        (red, "red"),
    ]
    ids = [PAD, PAD, *(token for piece, _ in pieces for token in piece), EOS]
    for cut in range(len(ids) + 1):
        start, expected = 2, []
        for piece, part in pieces:
            if isinstance(part, str):
                text = layout_tokenizer.decode([t for t in piece[max(cut - start, 0) :] if t != BOS])
                expected += [text] if text.strip() else []
            elif cut < start + len(piece):
                expected.append(part)
            start += len(piece)
        (segments,) = processor.post_process_interleaved(torch.tensor([ids]), model, prompt_length=cut)
        assert matches(segments, expected, model, processor), cut


def test_a_half_drawn_picture_of_a_prompt_is_finished_and_shown(layout_jam, layout_tokenizer):  # noqa: F811
    model, processor = layout_jam("emu3", "cross"), layout_processor(layout_tokenizer, "emu3")
    half = [BOS, 30, *picture(LAYOUTS["emu3"], range(FIRST, LAST))[:14]]
    output = model.generate(input_ids=torch.tensor([half]), generation_mode="image", do_sample=False, max_new_tokens=40)
    (segments,) = processor.post_process_interleaved(output, model, prompt_length=len(half))
    assert segments[0]["image"] is not None
    (whole,) = processor.post_process_interleaved(output, model)
    assert same_picture([s for s in whole if s["type"] == "image"][0]["image"], segments[0]["image"])


def test_codes_that_no_grammar_parted_are_cut_into_pictures(layout_jam, layout_tokenizer):  # noqa: F811
    model, processor = layout_jam("plain"), layout_processor(layout_tokenizer, "plain")
    codes = [*range(FIRST, LAST)]
    (segments,) = processor.post_process_interleaved(torch.tensor([[BOS, *codes, *codes, *codes[:3], EOS]]), model)
    assert matches(segments, [codes, codes, codes[:3]], model, processor)


def test_bad_input_is_answered(layout_jam, layout_tokenizer):  # noqa: F811
    model, processor = layout_jam("plain"), layout_processor(layout_tokenizer, "plain")
    ids = torch.ones(1, 5, dtype=torch.int64)
    for length in (-1, 6):
        with pytest.raises(ValueError, match=f"prompt_length is {length}, but the rows have 5 ids"):
            processor.post_process_interleaved(ids, model, prompt_length=length)
    processor.image_seq_length = 9
    with pytest.raises(ValueError, match="its pictures have 9 codes, the model's 16"):
        processor.post_process_interleaved(ids, model)
    assert layout_processor(layout_tokenizer, "plain").post_process_interleaved(ids[:0], model) == []
    assert layout_processor(layout_tokenizer, "plain").post_process_interleaved(ids[:, :0], model) == [[]]
