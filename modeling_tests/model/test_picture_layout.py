"""Layouts of pictures beyond `<break>` codes `<break>`: in the config, the grammar, generation, the processor and
training.

Two layouts stand for the public parents: Chameleon's has a closing token of its own; Emu3's also a prefix that tells
the size, a token after each row, and a suffix. The oracles here read a row from the left, one id at a time.
"""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import VQ_SETTINGS, randomise, same_picture
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jam_hf import JamConfig, JamForCausalLM, JamImageProcessor, JamProcessor
from jam_hf.data.cm3 import CM3Settings, apply_spans, draw_spans, segments, unmask
from jam_hf.data.collator import JamDataCollator
from jam_hf.data.sequences import encode_documents
from jam_hf.evaluation.perplexity import perplexity
from jam_hf.generation.packed_guidance import PackedGuidance
from jam_hf.model.grammar_jam import PictureGrammar, PictureReader
from jam_hf.model.guidance_jam import (
    BranchContexts,
    GuidanceSettings,
    PictureGuidanceLogitsProcessor,
    SeparateGuidance,
)


# Ids as the session's tokenizer has them: specials, text, the codes 300..315, and what the layouts add behind them.
BOS, EOS, BREAK, IMAGE, MASK, MASK_END = 1, 2, 3, 4, 5, 13
FIRST, LAST = 300, 316
END, PREFIX, ROW_END, SUFFIX, VOCABULARY = 316, [317, 318, 319], 320, [321], 322
NAMES = {END: "<end>", 317: "<size:4>", 318: "<size:x>", 319: "<codes>", ROW_END: "<row>", 321: "<frame>"}
LAYOUTS = {
    "plain": {},
    "chameleon": {"image_end_token_id": END},
    "emu3": {
        "image_end_token_id": END,
        "image_prefix_token_ids": PREFIX,
        "image_row_end_token_id": ROW_END,
        "image_suffix_token_ids": SUFFIX,
    },
    "one mark": {"image_prefix_token_ids": PREFIX, "image_row_end_token_id": ROW_END},
}
G, N = 4, 16


def layout_config(layout: dict, grid: int = G, mode: str = "uniform", **settings) -> JamConfig:
    decoder = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
    }
    return JamConfig(
        fusion_mode=mode,
        text_config=decoder,
        image_config=dict(decoder) if mode == "cross" else None,
        vq_config={**VQ_SETTINGS, "sample_size": 4 * grid},
        image_token_offset=FIRST,
        **{**layout, **settings},
    )


@pytest.fixture(scope="module")
def layout_jam():
    """`layout_jam(name, mode)` -> a small random JAM whose pictures are laid out so."""
    made = {}

    def make(name: str, mode: str = "uniform") -> JamForCausalLM:
        if (name, mode) not in made:
            model = JamForCausalLM(layout_config(LAYOUTS[name], mode=mode))
            randomise(model, seed=4)
            with torch.no_grad():  # codes far apart, so that no near tie decides
                model.model.vq_model.vq.quantize.embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
            made[name, mode] = model.eval()
        return made[name, mode]

    return make


@pytest.fixture(scope="module")
def layout_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(list(NAMES.values()), special_tokens=True)
    assert {token: tokenizer.convert_tokens_to_ids(name) for token, name in NAMES.items()} == {i: i for i in NAMES}
    return tokenizer


def layout_processor(tokenizer, name: str) -> JamProcessor:
    layout = LAYOUTS[name]
    return JamProcessor(
        JamImageProcessor.from_size(4 * G),
        tokenizer,
        image_seq_length=N,
        image_end_token=NAMES.get(layout.get("image_end_token_id")),
        image_prefix_tokens=[NAMES[i] for i in layout.get("image_prefix_token_ids", [])],
        image_row_end_token=NAMES.get(layout.get("image_row_end_token_id")),
        image_suffix_tokens=[NAMES[i] for i in layout.get("image_suffix_token_ids", [])],
    )


@pytest.fixture(scope="module")
def laid_out(layout_tokenizer):
    """`laid_out(name, mode)` -> a small random JAM with pictures of that layout, and its processor."""
    made = {}

    def make(name: str = "plain", mode: str = "uniform") -> tuple[JamForCausalLM, JamProcessor]:
        if (name, mode) not in made:
            model = JamForCausalLM(layout_config(LAYOUTS[name], mode=mode)).eval()
            randomise(model, seed=4)
            made[name, mode] = model, layout_processor(layout_tokenizer, name)
        return made[name, mode]

    return make


def template_by_hand(layout: dict, grid: int = G) -> list[int | None]:
    template: list[int | None] = list(layout.get("image_prefix_token_ids", []))
    for _ in range(grid):
        template += [None] * grid
        if layout.get("image_row_end_token_id") is not None:
            template.append(layout["image_row_end_token_id"])
    return template + list(layout.get("image_suffix_token_ids", []))


def picture(layout: dict, codes, grid: int = G) -> list[int]:
    """A whole picture, from the opening to the closing token."""
    codes = iter(codes)
    inside = [next(codes) if token is None else token for token in template_by_hand(layout, grid)]
    return [BREAK, *inside, layout.get("image_end_token_id") or BREAK]


def place_by_hand(row: list[int], layout: dict, grid: int = G) -> int | None:
    """How far the picture is in which a well-formed `row` ends; `None` in text."""
    length, position = len(template_by_hand(layout, grid)), None
    for token in row:
        if position is None:
            position = 0 if token == BREAK else None
        elif position < length:
            position += 1
        else:
            position = None
    return position


def allowed_by_hand(row: list[int], layout: dict, grid: int = G) -> set[int]:
    """What may follow a well-formed `row` in an interleaved document with room for more."""
    template, position = template_by_hand(layout, grid), place_by_hand(row, layout, grid)
    if position is None:
        marks = {0, IMAGE, *range(MASK, MASK_END + 1), layout.get("image_end_token_id")}
        return set(range(VOCABULARY)) - marks - set(range(FIRST, LAST)) - {i for i in template if i is not None}
    if position == len(template):
        return {layout.get("image_end_token_id") or BREAK}
    return set(range(FIRST, LAST)) if template[position] is None else {template[position]}


def random_document(layout: dict, rng: np.random.Generator, pictures: int, grid: int = G) -> list[int]:
    row = [BOS, *rng.integers(20, 290, rng.integers(0, 5)).tolist()]
    for _ in range(pictures):
        row += picture(layout, rng.integers(FIRST, LAST, grid * grid).tolist(), grid)
        row += rng.integers(20, 290, rng.integers(0, 3)).tolist()
    return row


def assert_well_formed(row: list[int], layout: dict, grid: int = G) -> None:
    for end in range(1, len(row)):
        if row[end] == EOS:
            return
        assert row[end] in allowed_by_hand(row[:end], layout, grid), (end, row)


@st.composite
def layouts(draw):
    ids = iter(draw(st.permutations(range(LAST, VOCABULARY))))
    layout: dict = {
        "image_prefix_token_ids": [next(ids) for _ in range(draw(st.integers(0, 2)))],
        "image_suffix_token_ids": [next(ids) for _ in range(draw(st.integers(0, 2)))],
    }
    for name in ("image_row_end_token_id", "image_end_token_id"):
        if draw(st.booleans()):
            layout[name] = next(ids)
    return layout, draw(st.sampled_from([1, 2, 3]))


# ----- config ---------------------------------------------------------------------------------------------------------


def test_the_default_is_codes_between_two_breaks_and_files_say_nothing_of_it(tmp_path):
    config = layout_config({})
    assert config.picture_template == (-1,) * N and config.picture_length == config.image_seq_length == N
    assert config.picture_structure_token_ids == () and config.picture_end_token_id == BREAK
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not [key for key in written if key.startswith(("image_prefix", "image_suffix", "image_row", "image_end"))]


def test_a_layout_goes_into_files_and_comes_back(tmp_path):
    config = layout_config(LAYOUTS["emu3"])
    row = (-1, -1, -1, -1, ROW_END)
    assert config.picture_template == (*PREFIX, *row, *row, *row, *row, *SUFFIX)
    assert config.picture_length == 24 and config.image_seq_length == N
    assert config.picture_structure_token_ids == (*PREFIX, ROW_END, *SUFFIX) and config.picture_end_token_id == END
    config.save_pretrained(tmp_path)
    again = JamConfig.from_pretrained(tmp_path)
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert again.picture_template == config.picture_template


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_end_token_id": VOCABULARY}, ["image_end_token_id is 322", "vocabulary of 322"]),
        ({"image_prefix_token_ids": [317, -1]}, ["image_prefix_token_ids[1] is -1", "vocabulary"]),
        ({"image_row_end_token_id": FIRST}, ["image_row_end_token_id is 300", "image codes"]),
        ({"image_suffix_token_ids": [315]}, ["image_suffix_token_ids[0] is 315", "image codes"]),
        (
            {"image_prefix_token_ids": [317, 317]},
            ["image_prefix_token_ids[1]", "image_prefix_token_ids[0]", "same id 317"],
        ),
        ({"image_suffix_token_ids": [318]}, ["image_suffix_token_ids[0]", "image_prefix_token_ids[1]", "same id 318"]),
        ({"image_end_token_id": ROW_END}, ["image_end_token_id", "image_row_end_token_id", "same id 320"]),
        ({"image_end_token_id": BREAK}, ["image_end_token_id", "break_token_id", "same id 3"]),
        ({"image_row_end_token_id": IMAGE}, ["image_row_end_token_id", "image_token_id", "same id 4"]),
        ({"image_prefix_token_ids": [7]}, ["image_prefix_token_ids[0]", "mask_token_id + 2", "same id 7"]),
        ({"image_suffix_token_ids": [MASK_END]}, ["image_suffix_token_ids[0]", "mask_end_token_id"]),
        ({"image_end_token_id": 0}, ["pad_token_id", "image_end_token_id", "same id 0"]),
        ({"image_prefix_token_ids": [BOS]}, ["bos_token_id", "image_prefix_token_ids[0]"]),
        ({"image_row_end_token_id": EOS}, ["eos_token_id", "image_row_end_token_id"]),
        ({"image_prefix_token_ids": ["<size>"]}, ["image_prefix_token_ids"]),
    ],
)
def test_tokens_of_the_layout_stand_for_nothing_else(changes, words):
    with pytest.raises(Exception) as error:
        layout_config({**LAYOUTS["emu3"], **changes})
    for word in words:
        assert word in str(error.value)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(0, 2**32 - 1))
def test_a_layout_wraps_codes_and_reads_them_again_and_nothing_else(layout_and_grid, seed):
    layout, grid = layout_and_grid
    rng, config = np.random.default_rng(seed), layout_config(layout, grid)
    pictures = config.picture_layout
    by_hand = template_by_hand(layout, grid)
    codes = rng.integers(0, len(config.image_token_range), (2, grid * grid))
    ids = pictures.ids_of(codes)
    assert (
        pictures.are_codes(ids).all()
        and not pictures.are_codes(np.array([BREAK, *pictures.structure, pictures.end])).any()
    )
    for row, inside in zip(ids.tolist(), pictures.inside(ids).tolist()):
        left = iter(row)
        assert inside == [next(left) if token is None else token for token in by_hand]
        assert pictures.wrap(row) == [BREAK, *inside, pictures.end] and pictures.read(inside) == row
        place = rng.integers(len(inside))
        for wrong in (inside[:-1], [*inside, row[0]], [*inside[:place], BOS, *inside[place + 1 :]]):
            assert pictures.read(wrong) is None
    with pytest.raises(ValueError, match=f"has {grid * grid} codes, got {grid * grid + 1}"):
        pictures.inside([*ids[0], FIRST])


# ----- grammar --------------------------------------------------------------------------------------------------------


def allowed_sets(grammar: PictureGrammar, ids: torch.Tensor, mode="interleaved", prompt_length=0, max_length=10_000):
    allowed = grammar.allowed(ids, VOCABULARY, mode, prompt_length, max_length)
    return [set(row.nonzero().flatten().tolist()) for row in allowed]


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_after_every_beginning_of_a_document_exactly_what_may_follow_is_allowed(layout_and_grid, seed, pictures):
    """So documents are accepted, every wrong id is refused, and a half-drawn picture goes on from wherever it stands.

    Rows of one batch stand in different states: all beginnings of the document, padded on the left.
    """
    layout, grid = layout_and_grid
    config = layout_config(layout, grid)
    assert list(config.picture_template) == [-1 if i is None else i for i in template_by_hand(layout, grid)]
    row = random_document(layout, np.random.default_rng(seed), pictures, grid)
    beginnings = [row[:end] for end in range(1, len(row) + 1)]
    ids = torch.tensor([[0] * (len(row) - len(b)) + b for b in beginnings])
    grammar = PictureGrammar(config)
    state = grammar.state(ids)
    for index, (beginning, allowed) in enumerate(zip(beginnings, allowed_sets(grammar, ids))):
        assert allowed == allowed_by_hand(beginning, layout, grid)
        place = place_by_hand(beginning, layout, grid)
        assert bool(state.in_picture[index]) == (place is not None)
        assert int(state.position[index]) == (place or 0)
        assert bool(state.closed[index]) == (
            place is None and beginning[-1] == (layout.get("image_end_token_id") or BREAK)
        )


@settings(max_examples=40, deadline=None)
@given(layouts(), st.integers(0, 2**31), st.integers(5, 70))
def test_any_random_choice_within_the_grammar_is_a_document_and_no_picture_is_left_unfinished(
    layout_and_grid, seed, budget
):
    layout, grid = layout_and_grid
    grammar, generator = PictureGrammar(layout_config(layout, grid)), torch.Generator().manual_seed(seed)
    ids, weights = torch.tensor([[BOS, 30], [BOS, 31], [BOS, 32]]), torch.ones(VOCABULARY)
    weights[BREAK] = 100.0
    while ids.shape[1] < budget:
        allowed = grammar.allowed(ids, VOCABULARY, "interleaved", 2, budget)
        ids = torch.cat((ids, torch.multinomial(weights * allowed, 1, generator=generator)), dim=1)
    for row in ids.tolist():
        assert_well_formed(row, layout, grid)
        if EOS not in row:
            assert place_by_hand(row, layout, grid) is None


@pytest.mark.parametrize("name", LAYOUTS)
def test_modes_and_room(name):
    layout, grammar = LAYOUTS[name], PictureGrammar(layout_config(LAYOUTS[name]))
    whole = picture(layout, range(FIRST, LAST))
    text, closed = torch.tensor([[BOS, 30]]), torch.tensor([[BOS, 30, *whole]])
    size = len(whole)
    assert BREAK in allowed_sets(grammar, text, max_length=2 + size)[0]
    assert BREAK not in allowed_sets(grammar, text, max_length=2 + size - 1)[0]
    assert allowed_sets(grammar, text, "text")[0] == allowed_by_hand([BOS, 30], layout) - {BREAK}
    assert allowed_sets(grammar, text, "image", prompt_length=2) == [{BREAK}]
    assert allowed_sets(grammar, closed, "image", prompt_length=2) == [{EOS}]
    assert allowed_sets(grammar, closed, "image", prompt_length=closed.shape[1]) == [{BREAK}]
    for end in range(3, closed.shape[1]):
        beginning = closed[:, :end]
        assert allowed_sets(grammar, beginning, "image", prompt_length=2) == [
            allowed_by_hand(beginning[0].tolist(), layout)
        ]


@pytest.mark.parametrize(
    ("name", "opened"), [("plain", False), ("one mark", False), ("chameleon", True), ("emu3", True)]
)
def test_where_the_closing_token_is_another_a_break_always_opens(name, opened):
    layout, grammar = LAYOUTS[name], PictureGrammar(layout_config(LAYOUTS[name]))
    ids = torch.tensor([[BOS, *picture(layout, range(FIRST, LAST))[:-5], BREAK]])
    state = grammar.state(ids)
    assert bool(state.in_picture) == opened and bool(state.closed) != opened and int(state.position) == 0
    assert allowed_sets(grammar, ids) == [allowed_by_hand([BOS, BREAK] if opened else [BOS], layout)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_placeholders_count_as_codes(name):
    layout, grammar = LAYOUTS[name], PictureGrammar(layout_config(LAYOUTS[name]))
    row = [BOS, *picture(layout, [IMAGE] * N)]
    for end in range(2, len(row) + 1):
        assert allowed_sets(grammar, torch.tensor([row[:end]])) == [allowed_by_hand(row[:end], layout)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_last_whole_picture_of_each_row(name):
    layout, grammar = LAYOUTS[name], PictureGrammar(layout_config(LAYOUTS[name]))
    codes = [list(range(FIRST, LAST)), list(range(LAST - 1, FIRST - 1, -1))]
    whole = [picture(layout, c) for c in codes]
    rows = [[BOS, 30, *whole[0], 40, *whole[1], EOS], [BOS, *whole[1], *whole[0], 40, *whole[0][:9]]]
    length = max(map(len, rows))
    found = grammar.last_pictures(torch.tensor([[0] * (length - len(r)) + r for r in rows]))
    assert found.tolist() == [codes[1], codes[0]]
    for place in range(2, 2 + len(whole[0])):  # whatever stands in its place, a picture with a text token is none
        broken = [*rows[0][:place], 50, *rows[0][place + 1 : 2 + len(whole[0])]]
        with pytest.raises(ValueError, match="no complete picture"):
            grammar.last_pictures(torch.tensor([broken]))


# ----- generation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow(model, layout: dict, row: list[int], scale: float, steps: int) -> list[int]:
    """Greedy, one row, no cache; two full forwards where a code comes next."""
    template, ids = template_by_hand(layout), list(row)
    for _ in range(steps):
        scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        place = place_by_hand(ids, layout)
        if scale != 1 and place is not None and place < len(template) and template[place] is None:
            alone = [BOS, MASK, BREAK, *ids[len(ids) - place :]]
            uncond = model(input_ids=torch.tensor([alone]), use_cache=False).logits[0, -1]
            scores = uncond + scale * (scores - uncond)
        allowed = allowed_by_hand(ids, layout)
        if place is None and len(ids) + len(template) + 2 > len(row) + steps:
            allowed -= {BREAK}
        ids.append(max(allowed, key=lambda token: scores[token].item()))
        if ids[-1] == EOS:
            break
    return ids[len(row) :]


@pytest.mark.sampled
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "mode"), [("chameleon", "cross"), ("emu3", "cross"), ("emu3", "uniform"), ("one mark", "uniform")]
)
def test_generate_equals_the_slow_oracle_in_rows_of_different_states(name, mode, scale, layout_jam):
    """In text, at an opening token, in the prefix, before and after a row's end, in the suffix."""
    model, layout = layout_jam(name, mode), LAYOUTS[name]
    whole = picture(layout, [FIRST + 5 * i % 16 for i in range(N)])
    rows = [[BOS, 30, 31], *([BOS, 40, *whole[:end]] for end in (1, 3, 8, 9, 13, len(whole) - 1))]
    length, steps = max(map(len, rows)), 30
    ids = torch.tensor([[0] * (length - len(r)) + r for r in rows])
    output = model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        generation_mode="interleaved",
        guidance_scale=scale,
        max_new_tokens=steps,
        do_sample=False,
    )
    for written, row in zip(output[:, length:].tolist(), rows):
        expected = slow(model, layout, row, scale, steps)
        assert written[: len(expected)] == expected
        assert_well_formed(row + expected, layout)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
@pytest.mark.parametrize("name", ["chameleon", "emu3", "one mark"])
def test_one_picture_under_beams_and_sampling(name, settings, layout_jam):
    model, layout = layout_jam(name, "cross"), LAYOUTS[name]
    torch.manual_seed(0)
    output = model.generate(
        input_ids=torch.tensor([[BOS, 30]]), generation_mode="image", guidance_scale=2.0, **settings
    )
    for row in output.tolist():
        assert (
            row[2] == BREAK
            and len(row) == 2 + model.config.picture_length + 2
            and row[-1] == model.config.picture_end_token_id
        )
        assert_well_formed(row, layout)
    assert model.decode_image_tokens(output).shape == (len(output), 3, 4 * G, 4 * G)


def test_sampled_documents_are_well_formed(layout_jam):
    model, layout = layout_jam("emu3"), LAYOUTS["emu3"]
    torch.manual_seed(0)
    bias = [[[BREAK], 4.0]]  # pictures are begun often
    output = model.generate(
        input_ids=torch.tensor([[BOS, 30]] * 4),
        generation_mode="interleaved",
        do_sample=True,
        top_k=0,
        temperature=2.0,
        sequence_bias=bias,
        max_new_tokens=120,
    )
    assert (output == END).sum() > 3
    for row in output.tolist():
        assert_well_formed(row, layout)
        assert EOS in row or place_by_hand(row, layout) is None


@torch.no_grad()
def test_only_codes_are_guided(layout_jam):
    """Without a grammar too: scores of what the layout has beside the codes stay as they are."""
    model, layout = layout_jam("emu3", "cross"), LAYOUTS["emu3"]
    row = [BOS, 30, *picture(layout, range(FIRST, LAST))]
    beginnings = [row[:end] for end in range(2, len(row) + 1)]
    ids = torch.tensor([[0] * (len(row) - len(b)) + b for b in beginnings])
    scores = torch.randn(len(ids), VOCABULARY, generator=torch.Generator().manual_seed(0))
    grammar = PictureGrammar(model.config)
    reader = PictureReader(grammar, ids.shape[1], 0, follows=False)
    guidance = SeparateGuidance(model, GuidanceSettings(3.0), reader, BranchContexts(model.config, grammar), ids != 0)
    guided = PictureGuidanceLogitsProcessor(guidance)(ids, scores)
    for beginning, before, after in zip(beginnings, scores, guided):
        place = place_by_hand(beginning, layout)
        if place is None or place == len(row) - 4 or template_by_hand(layout)[place] is not None:
            assert torch.equal(before, after)
        else:
            alone = torch.tensor([[BOS, MASK, BREAK, *beginning[len(beginning) - place :]]])
            uncond = model(input_ids=alone, use_cache=False).logits[0, -1]
            expected = (uncond + 3.0 * (before - uncond))[FIRST:LAST].log_softmax(-1)
            torch.testing.assert_close(after[FIRST:LAST], expected, atol=1e-4, rtol=1e-4)
            assert (after[:FIRST] == -torch.inf).all() and (after[LAST:] == -torch.inf).all()


def test_the_branches_are_told_once_for_a_whole_picture(layout_jam, monkeypatch):
    """They are not begun anew at each end of a row."""
    model, told = layout_jam("emu3", "cross"), []
    forward = PackedGuidance._forward

    def counting(self, ids, *args, **kwargs):
        told.append(ids.tolist())
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(PackedGuidance, "_forward", counting)
    model.generate(input_ids=torch.tensor([[BOS, 30]] * 2), generation_mode="image", guidance_scale=2.0, do_sample=True)
    assert told == [[[BOS, MASK]] * 2]


def test_no_room_for_a_picture_is_told(layout_jam):
    model = layout_jam("emu3")
    ids = torch.tensor([[BOS, 30]])
    with pytest.raises(ValueError, match="picture.s. of 16 codes.*max_new_tokens=26; got room for 24"):
        model.generate(input_ids=ids, generation_mode="image", max_new_tokens=24)
    assert model.generate(input_ids=ids, generation_mode="image", max_new_tokens=26, do_sample=False).shape[1] == 28


# ----- processor ------------------------------------------------------------------------------------------------------


def _image(colour=(200, 30, 30)):
    return Image.new("RGB", (16, 16), colour)


@pytest.mark.parametrize("name", LAYOUTS)
def test_pixels_to_ids_to_segments(name, layout_jam, layout_tokenizer):
    model, layout, processor = layout_jam(name), LAYOUTS[name], layout_processor(layout_tokenizer, name)
    images = [_image(), _image((10, 200, 90))]
    inputs = processor(text="red<image><image>blue", images=images, return_tensors="pt")
    red, blue = (layout_tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("red", "blue"))
    hole = picture(layout, [IMAGE] * N)
    assert inputs["input_ids"][0].tolist() == [BOS, *red, *hole, *hole, *blue]
    filled = model.model.insert_image_tokens(inputs["input_ids"], inputs["pixel_values"])
    codes = model.get_image_tokens(inputs["pixel_values"])
    expected = [BOS, *red, *(i for c in codes.tolist() for i in picture(layout, c)), *blue]
    assert filled[0].tolist() == expected
    pixels = processor.image_processor.postprocess(model.decode_image_tokens(codes))
    for skip in (True, False):
        (segments_,) = processor.post_process_interleaved(filled, model, skip_special_tokens=skip)
        assert [s["type"] for s in segments_] == ["text", "image", "image", "text"]
        assert [s["text"] for s in segments_ if s["type"] == "text"] == ["red" if skip else "<s>red", "blue"]
        for segment, image in zip(segments_[1:3], pixels):
            assert same_picture(segment["image"], image)
    assert processor.post_process_multimodal_output(filled) == ["redblue"]
    assert torch.equal(model.decode_image_tokens(filled), model.decode_image_tokens(codes[1:]))
    assert processor._get_num_multimodal_tokens([(16, 16)])["num_image_tokens"] == [N]
    output = model.generate(**inputs, generation_mode="interleaved", do_sample=False, max_new_tokens=2)
    assert output[0, : len(expected)].tolist() == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_picture_cut_anywhere_is_unfinished_and_has_no_text(name, layout_jam, layout_tokenizer):
    model, layout, processor = layout_jam(name), LAYOUTS[name], layout_processor(layout_tokenizer, name)
    codes = list(range(FIRST, LAST))
    whole = picture(layout, codes)
    for end in range(1, len(whole) + 1):
        (segments_,) = processor.post_process_interleaved(torch.tensor([whole[:end]]), model, skip_special_tokens=False)
        written = [i for i in whole[:end] if FIRST <= i < LAST]
        if len(written) == N:
            assert [s["image"] is not None for s in segments_] == [True]
        else:
            assert segments_ == ([{"type": "image", "image": None, "image_tokens": written}] if written else [])


def test_a_saved_processor_has_its_layout(layout_tokenizer, tmp_path):
    processor = layout_processor(layout_tokenizer, "emu3")
    processor.save_pretrained(tmp_path / "emu3")
    again = JamProcessor.from_pretrained(tmp_path / "emu3")
    assert again.to_dict() == processor.to_dict()
    assert again.replace_image_token({}, 0) == processor.replace_image_token({}, 0)
    assert again.replace_image_token({}, 0).count("<row>") == G
    plain = layout_processor(layout_tokenizer, "plain")
    assert plain.replace_image_token({}, 0) == "<break>" + "<image>" * N + "<break>"


def test_tokens_that_the_tokenizer_does_not_have_as_special_ones_are_refused(layout_tokenizer):
    images = JamImageProcessor.from_size(16)
    shows, knows_unknown = copy.deepcopy(layout_tokenizer), copy.deepcopy(layout_tokenizer)
    shows.add_tokens(["<shown>"])
    knows_unknown.unk_token = "<pad>"
    for tokenizer, token in ((shows, "<shown>"), (shows, "red"), (shows, "<unknown>"), (knows_unknown, "<unknown>")):
        with pytest.raises(ValueError, match=f"'{token}' is a token of the layout.*special"):
            JamProcessor(images, tokenizer, image_seq_length=N, image_prefix_tokens=[token])
    with pytest.raises(ValueError, match="15, which is no square"):
        JamProcessor(images, layout_tokenizer, image_seq_length=15, image_row_end_token="<row>")


@pytest.mark.parametrize("grid", [1, 2])
def test_a_lost_picture_is_noticed_though_row_ends_part_its_placeholders(grid):
    layout = LAYOUTS["emu3"]
    model = JamForCausalLM(layout_config(layout, grid))
    ids = torch.tensor([[BOS, 30, *picture(layout, [IMAGE] * grid**2, grid), EOS]])
    with pytest.raises(ValueError, match="no pixel_values came with them"):
        model(input_ids=ids, labels=ids)


# ----- training -------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(layouts(), st.integers(0, 2**32 - 1), st.integers(0, 3), st.floats(0, 3), st.floats(0, 1))
def test_masking_is_undone_and_no_span_holds_a_border(layout_and_grid, seed, pictures, mean, whole):
    layout, grid = layout_and_grid
    rng = np.random.default_rng(seed)
    chosen = CM3Settings.from_config(layout_config(layout, grid), mean_spans=mean, whole_segment_probability=whole)
    ids = np.array([*random_document(layout, rng, pictures, grid), EOS])
    spans = draw_spans(ids, chosen, rng)
    assert np.array_equal(unmask(apply_spans(ids, spans, chosen), chosen), ids)
    borders = {BREAK, layout.get("image_end_token_id"), BOS, EOS}
    assert not [i for start, end in spans for i in ids[start:end].tolist() if i in borders]


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_segments_are_pictures_with_all_that_stands_in_them_or_texts(name):
    layout, rng = LAYOUTS[name], np.random.default_rng(0)
    whole = picture(layout, range(FIRST, LAST))
    ids = np.array([BOS, 30, 31, *whole, 40, *whole, EOS])
    chosen = CM3Settings.from_config(layout_config(layout), mean_spans=0.0, whole_segment_probability=1.0)
    found = {tuple(ids[a:b].tolist()) for _ in range(60) for a, b in draw_spans(ids, chosen, rng)}
    assert found == {(30, 31), tuple(whole[1:-1]), (40,)}
    assert len(segments(ids, chosen)) == 4
    texts = replace(chosen, text_segments_only=True)
    found = {tuple(ids[a:b].tolist()) for _ in range(60) for a, b in draw_spans(ids, texts, rng)}
    assert found == {(30, 31), (40,)}
    masked = apply_spans(ids, [(1, 3)], chosen)
    assert masked[: 2 + len(whole)].tolist() == [BOS, MASK, *whole]  # what guidance compares with


def _encode(images):
    return np.stack([(np.arange(N) + image.getpixel((0, 0))[0]) % 16 for image in images])


@pytest.mark.parametrize("name", LAYOUTS)
def test_documents_have_the_layout(name, layout_tokenizer):
    layout, config = LAYOUTS[name], layout_config(LAYOUTS[name])
    rows = Dataset.from_list([{"text": "red<image><image>a", "images": [_image((1, 0, 0)), _image((2, 0, 0))]}])
    (ids,) = encode_documents(rows, layout_tokenizer, _encode, config=config)["input_ids"]
    red, a = (layout_tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("red", "a"))
    pictures = [picture(layout, [FIRST + (i + shift) % 16 for i in range(N)]) for shift in (1, 2)]
    assert ids == [BOS, *red, *pictures[0], *pictures[1], *a, EOS]
    pairs = Dataset.from_list([{"caption": "red", "image": _image((1, 0, 0))}])
    assert encode_documents(pairs, layout_tokenizer, _encode, config=config)["input_ids"][0] == [
        BOS,
        *red,
        *pictures[0],
        EOS,
    ]


def test_documents_that_do_not_fit_the_layout_are_refused(layout_tokenizer):
    config = layout_config(LAYOUTS["emu3"])
    pairs = Dataset.from_list([{"caption": "red", "image": _image()}])
    with pytest.raises(ValueError, match="must return the 16 codes.*got 9"):
        encode_documents(pairs, layout_tokenizer, lambda images: np.zeros((len(images), 9), int), config=config)
    with pytest.raises(ValueError, match="raw codes, 0..15, got 16"):
        encode_documents(pairs, layout_tokenizer, lambda images: np.full((len(images), N), 16), config=config)
    with pytest.raises(ValueError, match="image_token_offset is 5, but 300 in the config"):
        encode_documents(pairs, layout_tokenizer, _encode, image_token_offset=5, config=config)
    for text in ("a<row>", "<end>", "<size:x>b", "<img:3>", "<break>"):
        with pytest.raises(ValueError, match="text of document 0 has"):
            encode_documents(Dataset.from_list([{"text": text}]), layout_tokenizer, config=config)


@pytest.mark.parametrize("packing", [False, True])
def test_a_training_step_through_the_collator(packing, layout_jam, layout_tokenizer):
    model = copy.deepcopy(layout_jam("emu3", "cross")).train()
    rows = Dataset.from_list([{"caption": "a small red circle", "image": _image((i, 0, 0))} for i in range(4)])
    documents = encode_documents(rows, layout_tokenizer, _encode, config=model.config)
    cm3 = CM3Settings.from_config(model.config, whole_segment_probability=0.5)
    batch = JamDataCollator(0, VOCABULARY, cm3, packing=packing)(list(documents))
    assert (batch["labels"] == ROW_END).sum() == 4 * G and (batch["input_ids"] == MASK_END).any()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@torch.no_grad()
def test_perplexity_counts_structure_neither_as_text_nor_as_image(layout_jam):
    model, layout = layout_jam("emu3"), LAYOUTS["emu3"]
    rng = np.random.default_rng(0)
    rows = [[*random_document(layout, rng, count), EOS] for count in (1, 0, 2)]
    sums, counts = [0.0, 0.0], [0, 0]
    for row in rows:
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
        losses = F.cross_entropy(logits, torch.tensor(row[1:]), reduction="none")
        for loss, token in zip(losses.tolist(), row[1:]):
            if token not in (*PREFIX, ROW_END, *SUFFIX):
                sums[FIRST <= token < LAST] += loss
                counts[FIRST <= token < LAST] += 1
    dataset = Dataset.from_dict({"input_ids": rows})
    result = perplexity(model, dataset, (FIRST, LAST))
    assert (result.text_tokens, result.image_tokens) == tuple(counts)
    assert result.text_nll == pytest.approx(sums[0] / counts[0], abs=1e-5)
    assert result.image_nll == pytest.approx(sums[1] / counts[1], abs=1e-5)
    everything = perplexity(model, dataset, (FIRST, LAST), picture_structure_token_ids=())
    assert everything.text_tokens == counts[0] + 3 * (len(PREFIX) + G + len(SUFFIX))
