"""Infilling: prompts against the training objective, the grammar against a hand-made one, greedy filling against a slow
loop.

The documents come from `test_picture_layout.py`, in all layouts.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import same_picture
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_picture_layout import (  # noqa: F401  (fixtures among them)
    BOS,
    BREAK,
    END,
    EOS,
    FIRST,
    IMAGE,
    LAST,
    LAYOUTS,
    MASK,
    MASK_END,
    VOCABULARY,
    G,
    N,
    layout_config,
    layout_jam,
    layout_processor,
    layout_tokenizer,
    layouts,
    picture,
    template_by_hand,
)
from transformers import GenerationConfig

from jam_hf.data.cm3 import CM3Settings, apply_spans
from jam_hf.data.sequences import encode_documents
from jam_hf.generation.gaps import DocumentMasker, picture_mask
from jam_hf.generation.infilling import InfillLogitsProcessor, JamInfill


# ----- by hand --------------------------------------------------------------------------------------------------------


def codes_under(regions, grid: int) -> set[int]:
    """The codes that spans and rectangles cover, one by one."""
    covered = set()
    for region in regions:
        for code in range(grid * grid):
            row, column = divmod(code, grid)
            if len(region) == 2 and region[0] <= code < region[1]:
                covered.add(code)
            if len(region) == 4 and region[0] <= column < region[2] and region[1] <= row < region[3]:
                covered.add(code)
    return covered


def picture_spans(covered: set[int], layout: dict, grid: int, start: int) -> list[tuple[int, int]]:
    """Spans in the ids of a document whose picture opens at `start`; codes in a row are one span, row ends included."""
    places = [start + 1 + i for i, token in enumerate(template_by_hand(layout, grid)) if token is None]
    spans, code = [], 0
    while code < len(places):
        if code in covered:
            first = code
            while code + 1 in covered:
                code += 1
            spans.append((places[first], places[code] + 1))
        code += 1
    return spans


def may_follow(written: list[int], gaps: list, budget: int, closing: list[int]) -> set[int]:
    """What may follow in a well-formed infill, read from the left; `closing` are ids that no text holds."""
    text = set(range(VOCABULARY)) - set(closing) - set(range(FIRST, LAST))
    index, place, expected = 0, 0, None
    for token in [*written, None]:
        if index == len(gaps):
            expected = {EOS}
        elif place == -1:
            expected = {MASK + index}
        elif gaps[index] is None:
            expected = {MASK_END} if place == budget else text | ({MASK_END} if place else set())
        elif place == len(gaps[index]):
            expected = {MASK_END}
        else:
            token_there = gaps[index][place]
            expected = set(range(FIRST, LAST)) if token_there is None else {token_there}
        if token is None:
            return expected
        if token == MASK_END:
            index, place = index + 1, -1
        else:
            place += 1
    raise AssertionError


def no_text(layout: dict) -> list[int]:
    """Padding, `<s>`, `<eos>`, `<break>`, `<image>`, sentinels and the end of a span, and what a layout has of its
    own.
    """
    template = [token for token in template_by_hand(layout, 1) if token is not None]
    return [0, BOS, EOS, BREAK, IMAGE, *range(MASK, MASK_END + 1), layout.get("image_end_token_id") or BREAK, *template]


@st.composite
def masked_documents(draw):
    """A layout, a document of text and pictures, and disjoint spans of it that do not touch: at least 1, at most 8."""
    layout, grid = draw(layouts())
    config = layout_config(layout, grid)
    masker, ids, spans = DocumentMasker(config), [BOS], []
    masker.text([BOS])
    for _ in range(draw(st.integers(1, 3))):
        text, marked = [], []
        for _ in range(draw(st.integers(0, 2))):
            kept, gone = (draw(st.lists(st.integers(20, 290), min_size=1, max_size=4)) for _ in range(2))
            masked = draw(st.booleans())
            spans += [(len(ids) + len(text) + len(kept), len(ids) + len(text) + len(kept) + len(gone))] * masked
            text += kept + gone
            marked += kept + ([MASK] if masked else gone)
        masker.text(marked)
        ids += text
        codes = draw(st.lists(st.integers(FIRST, LAST - 1), min_size=grid**2, max_size=grid**2))
        kind = draw(st.sampled_from(["whole", "mask", "regions", "none"]))
        if kind == "whole":
            masker.missing_picture()
            spans.append((len(ids) + 1, len(ids) + 1 + len(template_by_hand(layout, grid))))
        elif kind == "none":
            masker.picture(codes, None)
        else:
            numbers = st.integers(0, grid)
            if kind == "mask":
                covered = draw(st.sets(st.integers(0, grid**2 - 1), min_size=1))
                regions = np.array([code in covered for code in range(grid**2)]).reshape(grid, grid)
            else:
                low, high = sorted((draw(numbers), draw(numbers))), sorted((draw(numbers), draw(numbers)))
                regions = [(low[0], high[0], low[1], high[1])] if low[0] < low[1] and high[0] < high[1] else []
                covered = codes_under(regions, grid)
                free = [code for code in range(grid**2) if code not in covered]
                if free and (not regions or draw(st.booleans())):
                    start = draw(st.sampled_from(free))
                    end = next((code for code in range(start, grid**2) if code in covered), grid**2)
                    regions.append((start, draw(st.integers(start + 1, end))))
                    covered = codes_under(regions, grid)
            masker.picture(codes, picture_mask(regions, grid))
            spans += picture_spans(covered, layout, grid, len(ids))
        ids += picture(layout, codes, grid)
    ids.append(EOS)
    return layout, grid, masker, ids, spans


# ----- against the objective ------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_prompts_are_what_training_has_and_original_spans_give_the_document_back(data):
    layout, grid, masker, ids, spans = data.draw(masked_documents())
    config = layout_config(layout, grid)
    if not 1 <= len(spans) <= 8:
        with pytest.raises(ValueError, match="no gap" if not spans else f"{len(spans)} gaps, but the model has 8"):
            masker.finish(EOS)
        return
    document = masker.finish(EOS)
    trained = apply_spans(np.array(ids), spans, CM3Settings.from_config(config)).tolist()
    longest = max(end - start for start, end in spans)
    infill = JamInfill([document], config, longest)
    prompt = infill["input_ids"][0].tolist()
    assert prompt == trained[: len(prompt)] and prompt[-1] == MASK
    written = [*trained[len(prompt) :], EOS]
    assert len(written) <= infill["max_new_tokens"]
    assert infill.restore(torch.tensor([prompt + written])) == [ids]
    template = template_by_hand(layout, grid)
    gaps = [None if gap is None else [None if token < 0 else token for token in gap] for gap in document.gaps]
    for (start, end), gap in zip(spans, gaps):  # the gaps are of the kind of their spans, and as long
        assert (gap is None) == all(20 <= token <= 290 for token in ids[start:end])
        assert gap is None or (len(gap) == end - start and set(gap) <= set(template))
    (processor,) = infill["logits_processor"]
    for end in range(len(written)):
        allowed = processor.allowed(torch.tensor([prompt + written[:end]]), VOCABULARY)[0]
        found = set(allowed.nonzero().flatten().tolist())
        assert found == may_follow(written[:end], gaps, longest, no_text(layout)) and written[end] in found


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 3))
def test_any_random_choice_within_the_grammar_fills_every_document_of_a_batch(data, seed, budget, copies):
    """Rows of one batch fill text and pictures at the same step; each document is in several rows, as beams are."""
    layout, grid = data.draw(layouts())
    config = layout_config(layout, grid, num_mask_tokens=8)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(3):
        masker = DocumentMasker(config)
        masker.text([BOS, *rng.integers(20, 290, rng.integers(0, 4)).tolist(), MASK, 30])
        masker.picture(rng.integers(FIRST, LAST, grid**2).tolist(), rng.random(grid**2) < 0.3)
        if rng.random() < 0.5:
            masker.missing_picture()
        documents.append(masker.finish(EOS))
    infill = JamInfill(documents, config, budget)
    ids = infill["input_ids"].repeat_interleave(copies, 0)
    length = ids.shape[1]
    assert [row[-1] for row in ids.tolist()] == [MASK] * len(ids)
    assert (infill["attention_mask"] == (infill["input_ids"] != 0)).all()
    (processor,) = infill["logits_processor"]
    for _ in range(infill["max_new_tokens"]):
        scores = processor(ids, torch.randn(len(ids), VOCABULARY, generator=generator))
        ids = torch.cat((ids, torch.multinomial(scores.softmax(-1), 1, generator=generator)), dim=1)
    assert (ids[:, -1] == EOS).all()
    for row, restored in enumerate(infill.restore(ids)):
        document = documents[row // copies]
        written, spans = ids[row, length:].tolist(), []
        for index, gap in enumerate(document.gaps):
            end = written.index(MASK_END)
            spans.append(written[:end])
            assert 1 <= end <= budget if gap is None else end == len(gap)
            written = written[end + 1 :]
            assert written[0] == (EOS if index + 1 == len(document.gaps) else MASK + index + 1)
            written = written[1:]
        by_hand = [[spans[t - MASK] if MASK <= t < MASK_END else [t]][0] for t in document.ids]
        assert restored == [token for part in by_hand for token in part]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_processor_makes_the_prompts_of_training(name, layout_jam, layout_tokenizer):  # noqa: F811
    """Documents of training, encoded and masked by training's own code, against `processor.infill`."""
    model, processor, layout = layout_jam(name), layout_processor(layout_tokenizer, name), LAYOUTS[name]
    images = [_noise(0), _noise(1)]

    def encode(pictures):
        pixels = processor.image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return model.get_image_tokens(pixels).numpy() - FIRST

    rows = Dataset.from_list([{"text": "a small red circle<image>a ruby<image>", "images": images}])
    (ids,) = encode_documents(rows, layout_tokenizer, encode, config=model.config)["input_ids"]
    red = layout_tokenizer(" red", add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(ids)) if ids[i : i + len(red)] == red)
    whole, first = len(template_by_hand(layout)), ids.index(BREAK)
    second = ids.index(BREAK, first + whole + 2)
    rectangle = picture_spans(codes_under([(1, 0, 3, 2)], G), layout, G, first)
    spans = [(start, start + len(red)), *rectangle, (second + 1, second + 1 + whole)]
    trained = apply_spans(np.array(ids), spans, CM3Settings.from_config(model.config)).tolist()
    infill = processor.infill(
        "a small<mask> circle<image>a ruby<image>", [images[0], None], [[(1, 0, 3, 2)], None], model=model
    )
    prompt = infill["input_ids"][0].tolist()
    assert prompt == trained[: len(prompt)]
    filled = torch.tensor([[*trained, EOS]])
    assert infill.restore(filled) == [ids]
    segments = processor.post_process_infill(filled, infill, model)
    assert _equal(segments, processor.post_process_interleaved(torch.tensor([ids]), model))


def _equal(left, right) -> bool:
    """Equal segments; pictures by their pixels, which may differ by a level."""
    pairs = [(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)]
    return all(
        a["type"] == b["type"]
        and (a["text"] == b["text"] if a["type"] == "text" else same_picture(a["image"], b["image"]))
        for a, b in pairs
    )


def _noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


# ----- generation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill_slowly(model, prompt: list[int], gaps: list, budget: int, layout: dict) -> list[int]:
    """Greedy, one row, no cache, a full forward for every token, the best of what the hand-made grammar allows."""
    written: list[int] = []
    while not written or written[-1] != EOS:
        scores = model(input_ids=torch.tensor([prompt + written]), use_cache=False).logits[0, -1]
        allowed = may_follow(written, gaps, budget, no_text(layout))
        written.append(max(allowed, key=lambda token: scores[token].item()))
    return written


@pytest.mark.parametrize(
    ("name", "mode"), [("plain", "cross"), ("chameleon", "cross"), ("emu3", "cross"), ("emu3", "uniform")]
)
def test_a_padded_batch_is_filled_as_a_slow_loop_fills_each_document(name, mode, layout_jam, layout_tokenizer):  # noqa: F811
    """One and several gaps in text, beside a picture, a span, a rectangle, a picture to draw from another, all
    missing.
    """
    model, layout, processor = layout_jam(name, mode), LAYOUTS[name], layout_processor(layout_tokenizer, name)
    texts = ["a<mask> circle", "<mask>red<mask>", "a ruby<image>is<mask>", "<image>", "<image>blue<image>"]
    images = [[], None, [_noise(0)], [_noise(1)], [_noise(2), None]]
    masks = [None, None, None, [[(1, 1, 3, 4), (0, 3)]], [None, None]]
    infill = processor.infill(texts, images, masks, model=model, max_text_tokens=5)
    output = model.generate(**infill, do_sample=False)
    length = infill["input_ids"].shape[1]
    for row, document in enumerate(infill.documents):
        gaps = [gap if gap is None else [None if token < 0 else token for token in gap] for gap in document.gaps]
        expected = fill_slowly(model, [*document.ids, MASK], gaps, 5, layout)
        assert output[row, length : length + len(expected)].tolist() == expected
    restored = infill.restore(output)
    first, second = (model.get_image_tokens(_pixels(processor, _noise(seed)))[0].tolist() for seed in (1, 2))
    covered = codes_under([(1, 1, 3, 4), (0, 3)], G)
    codes = [token for token in restored[3] if FIRST <= token < LAST]
    assert len(codes) == N and all(codes[i] == first[i] for i in range(N) if i not in covered)
    assert restored[3] == [BOS, *picture(layout, codes), EOS]
    drawn = [token for token in restored[4] if FIRST <= token < LAST][N:]
    blue = layout_tokenizer("blue", add_special_tokens=False)["input_ids"]
    assert restored[4] == [BOS, *picture(layout, second), *blue, *picture(layout, drawn), EOS]
    kinds = [[s["type"] for s in row] for row in processor.post_process_infill(output, infill, model)]
    assert kinds == [["text"], ["text"], ["text", "image", "text"], ["image"], ["image", "text", "image"]]


def _pixels(processor, image):
    return processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0, "top_k": 3},
        {"do_sample": True, "top_p": 0.5, "min_p": 0.2, "repetition_penalty": 1.3},
        {"cache_implementation": "static"},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 20},
        {"suppress_tokens": [EOS, MASK + 1, MASK_END, *range(FIRST, LAST)]},
        {"return_dict_in_generate": True, "output_scores": True},
        {"generation_config": GenerationConfig(guidance_scale=4.0, do_sample=True)},
    ],
)
def test_every_way_of_decoding_keeps_the_grammar(options, layout_jam, layout_tokenizer):  # noqa: F811
    model, processor = layout_jam("emu3", "cross"), layout_processor(layout_tokenizer, "emu3")
    torch.manual_seed(0)
    infill = processor.infill(
        ["a<mask> circle<image>", "<image>"],
        [[_noise(0)], [None]],
        [[[(0, 0, 2, 2)]], None],
        model=model,
        max_text_tokens=4,
    )
    output = model.generate(
        **infill, **{"do_sample": False, **options} if "generation_config" not in options else options
    )
    copies = options.get("num_return_sequences", 1)
    restored = infill.restore(output)
    assert len(restored) == 2 * copies
    codes = model.get_image_tokens(_pixels(processor, _noise(0)))[0].tolist()
    for row, ids in enumerate(restored):
        written = [token for token in ids if FIRST <= token < LAST]
        assert len(written) == N and not set(ids) & set(range(MASK, MASK_END + 1))
        if row < copies:
            assert [written[i] for i in range(N) if i not in (0, 1, 4, 5)] == [
                codes[i] for i in range(N) if i not in (0, 1, 4, 5)
            ]
    assert len(processor.post_process_infill(output, infill, model)) == 2 * copies


def test_guidance_is_refused_and_never_creeps_in(layout_jam, layout_tokenizer, monkeypatch):  # noqa: F811
    model, processor = layout_jam("plain", "cross"), layout_processor(layout_tokenizer, "plain")
    infill = processor.infill("<image>", [None], model=model)
    expected = model.generate(**infill, do_sample=False)
    for setting in ({"guidance_scale": 3.0}, {"generation_mode": "interleaved"}):
        with pytest.raises(TypeError, match=next(iter(setting))):
            model.generate(**infill, **setting)
    monkeypatch.setattr(model.generation_config, "guidance_scale", 3.0)
    monkeypatch.setattr(model.generation_config, "generation_mode", "interleaved", raising=False)
    assert torch.equal(model.generate(**infill, do_sample=False), expected)


def test_a_picture_from_a_picture_by_prompt(layout_jam, layout_tokenizer):  # noqa: F811
    """Without a gap: the picture and the words stand in the prompt, and the new picture follows."""
    model, layout, processor = layout_jam("emu3", "cross"), LAYOUTS["emu3"], layout_processor(layout_tokenizer, "emu3")
    inputs = processor(text="<image>blue", images=[_noise(0)], return_tensors="pt")
    output = model.generate(**inputs, generation_mode="image", do_sample=False)
    length = inputs["input_ids"].shape[1]
    codes = [token for token in output[0, length:].tolist() if FIRST <= token < LAST]
    assert output[0, length:].tolist()[: len(picture(layout, codes))] == picture(layout, codes) and len(codes) == N
    (segments,) = processor.post_process_interleaved(output, model)
    assert [s["type"] for s in segments] == ["image", "text", "image"]
    (drawn,) = processor.post_process_interleaved(output, model, prompt_length=length)[0]
    assert same_picture(drawn["image"], segments[2]["image"])


def test_codes_may_stand_in_place_of_a_picture(layout_jam, layout_tokenizer):  # noqa: F811
    """What was filled can be filled again without a way through pixels."""
    model, processor = layout_jam("plain"), layout_processor(layout_tokenizer, "plain")
    codes = torch.arange(FIRST, LAST)
    infill = processor.infill("<image><mask><image>", [codes, _noise(3)], model=model)
    noise = model.get_image_tokens(_pixels(processor, _noise(3)))[0].tolist()
    assert infill.documents[0].ids == (BOS, BREAK, *codes.tolist(), BREAK, MASK, BREAK, *noise, BREAK, EOS)
    for wrong in (codes[:-1], codes - 1, codes.float()):
        with pytest.raises(ValueError, match="must be 16 ids in 300..315"):
            processor.infill("<image>", [wrong], [[(0, 1)]], model=model)


def test_texts_of_chats_begin_and_end_once(layout_jam, layout_tokenizer):  # noqa: F811
    model, processor = layout_jam("plain"), layout_processor(layout_tokenizer, "plain")
    bare = processor.infill("a<mask>", model=model).documents[0].ids
    for text in ("<s>a<mask>", "a<mask></s>", "<s>a<mask></s>"):
        assert processor.infill(text, model=model).documents[0].ids == bare
    assert (bare[0], bare[-1], bare.count(BOS), bare.count(EOS)) == (BOS, EOS, 1, 1)


# ----- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"text": "a circle"}, "document 0: there is no gap"),
        ({"text": 5}, "text must be a string"),
        ({"text": []}, "text must be a string"),
        ({"text": ["a<mask>", "b"]}, "document 1: there is no gap"),
        ({"text": "<mask>a" * 9}, "there are 9 gaps, but the model has 8 sentinels"),
        ({"text": "a<mask><mask>b"}, "two gaps stand directly after one another"),
        ({"text": "a<mask:1>"}, "has the token '<mask:1>'.*<mask> for a gap"),
        ({"text": "a<mask></mask>"}, "has the token '</mask>'"),
        ({"text": "a<mask><break>"}, "has the token '<break>'"),
        ({"text": "a<mask><img:3>"}, "has the token '<img:3>'"),
        ({"text": "<image><mask>"}, "1 placeholder.*0 picture"),
        ({"text": "<mask>", "images": [None]}, "0 placeholder.*1 picture"),
        ({"text": "<mask>", "image_masks": [[(0, 1)]]}, "0 picture.*1 entries in image_masks"),
        ({"text": "<image>", "images": Image.new("RGB", (16, 16))}, "images must be a list, one entry"),
        ({"text": ["<image>"], "images": [None, [None]]}, r"1 document\(s\) and 2 list\(s\) of images"),
        ({"text": ["<image>"], "images": [Image.new("RGB", (16, 16))]}, "a list of such lists"),
        (
            {"text": "<image>", "images": [None], "image_masks": [[(0, 1)]]},
            r"missing as a whole.*image_masks\[0\] must be None",
        ),
        ({"text": "<image>", "images": ["absent.png"]}, "Cannot read a picture from 'absent.png'"),
        ({"text": "a<mask>", "max_text_tokens": 0}, "max_text_tokens must be an integer of at least 1, got 0"),
        ({"text": "a<mask>", "max_text_tokens": 1000}, "more than the 256 positions"),
    ],
)
def test_documents_that_do_not_fit_are_refused(arguments, words, layout_jam, layout_tokenizer):  # noqa: F811
    processor = layout_processor(layout_tokenizer, "plain")
    with pytest.raises(ValueError, match=words):
        processor.infill(**arguments, model=layout_jam("plain"))


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        ([], "masks no code; use None"),
        (np.zeros((G, G), bool), "masks no code"),
        (np.zeros((G, G)), "must be bool"),
        (np.ones(G, bool), r"bool \[4, 4\] or \[16\], got bool \[4\]"),
        ((0, 4), "got the entry 0"),
        (7, "must be a list of spans"),
        ([(0, 4, 2)], r"got the entry \(0, 4, 2\)"),
        ([(0.0, 4.0)], "got the entry"),
        ([(False, True)], "got the entry"),
        ([(4, 4)], r"has \(4, 4\), which is empty or not inside the grid of 4x4"),
        ([(5, 3)], "empty or not inside"),
        ([(0, 17)], "0 <= start < end <= 16"),
        ([(-1, 3)], "empty or not inside"),
        ([(0, 0, 5, 1)], "0 <= left < right <= 4"),
        ([(2, 0, 2, 1)], "empty or not inside"),
        ([(0, 3, 1, 1)], "empty or not inside"),
        ([(0, 0, 2, 2), (1, 1, 3, 3)], r"\(1, 1, 3, 3\), which overlaps"),
        ([(0, 6), (1, 1, 2, 2)], "overlaps a region before it"),
    ],
)
def test_regions_that_are_none_are_refused(regions, words, layout_jam, layout_tokenizer):  # noqa: F811
    processor = layout_processor(layout_tokenizer, "emu3")
    with pytest.raises(ValueError, match=rf"(?s)document 0: image_masks\[0\].*{words}"):
        processor.infill("<image>", [_noise(0)], [regions], model=layout_jam("emu3"))


def test_what_is_no_infill_is_not_put_back(layout_jam, layout_tokenizer):  # noqa: F811
    model, processor = layout_jam("plain"), layout_processor(layout_tokenizer, "plain")
    infill = processor.infill("a<mask>b<image>", [_noise(0)], [[(0, 2)]], model=model)
    prompt = infill["input_ids"][0].tolist()
    good = [*prompt, 40, MASK_END, MASK + 1, FIRST, FIRST + 1, MASK_END, EOS]
    assert infill.restore(torch.tensor([good]))[0].count(FIRST) >= 1
    assert (
        infill.restore(SimpleNamespace(sequences=torch.tensor([good] * 3))) == infill.restore(torch.tensor([good])) * 3
    )
    for place, token, words in (
        (0, BREAK, "Expected what generate"),
        (len(prompt), FIRST, "span 1 is not text"),
        (len(prompt), MASK_END, "span 1 is not text"),
        (len(prompt) + 2, MASK, "does not go on with sentinel 1"),
        (len(prompt) + 3, 40, "span 2 is not the 2 ids"),
        (len(prompt) + 5, FIRST, "ends before span 2 of 2 does"),
    ):
        with pytest.raises(ValueError, match=words):
            infill.restore(torch.tensor([[*good[:place], token, *good[place + 1 :]]]))
    with pytest.raises(ValueError, match="Expected what generate"):
        infill.restore(torch.tensor(good))
    other = InfillLogitsProcessor(infill.documents * 2, model.config, len(prompt), 5, EOS)
    with pytest.raises(ValueError, match="do not belong together"):
        model.generate(input_ids=infill["input_ids"], logits_processor=[other], max_new_tokens=3, generation_mode=None)


def test_a_document_must_have_an_end(layout_jam, layout_tokenizer, monkeypatch):  # noqa: F811
    processor = layout_processor(layout_tokenizer, "plain")
    config = layout_jam("plain").config
    monkeypatch.setattr(
        config, "eos_token_id", [END, 90]
    )  # where `generate` stops, whatever the tokenizer calls an end
    assert processor.infill("a<mask>", model=layout_jam("plain")).documents[0].ids[-1] == END
    monkeypatch.setattr(config, "eos_token_id", [90, 2])
    assert processor.infill("a<mask>", model=layout_jam("plain")).documents[0].ids[-1] == 2
    monkeypatch.setattr(config, "eos_token_id", None)
    with pytest.raises(ValueError, match="the config's eos_token_id says none"):
        processor.infill("a<mask>", model=layout_jam("plain"))
