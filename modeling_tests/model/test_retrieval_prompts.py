"""Documents of a retriever before the prompts of `generate()`: layout, padding, room, and what comes back. Retrievers
here are made by hand; the index is tested in modeling_tests/retrieval.
"""

import pytest
import torch
from model.test_picture_layout import BOS, BREAK, EOS, FIRST, IMAGE, LAYOUTS, N, picture
from retrieval.tiny_index import document, layout_jam

from jam_hf.generation import retrieval_prompts
from jam_hf.generation.retrieval_prompts import (
    AugmentedPrompts,
    PromptDocument,
    RetrievalQuery,
    Retriever,
    augment_prompts,
    document_ids,
    how_many_fit,
)


RED, BLUE, GREEN = (document(*args) for args in (("red", [60, 61], 0), ("blue", [70], 5), ("green", [80, 81, 82], 9)))


class ByHand:
    """Gives the documents it was made with, row by row, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.queries = answers, []

    def documents_for(self, model, queries):
        self.queries += queries
        return [list(answer) for answer in self.answers]


@pytest.fixture(scope="module")
def jams():
    made = {}

    def make(name="plain", **settings):
        key = (name, *sorted(settings.items()))
        if key not in made:
            made[key] = layout_jam(name, **settings)
        return made[key]

    return make


def laid_out(document, layout):
    return [*document.text_ids, *picture(layout, [FIRST + code for code in document.codes])]


def padded(rows, side="left"):
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    return torch.tensor([p + r if side == "left" else r + p for p, r in zip(pads, rows)])


def real(ids):
    return (ids != 0).long()


# ----- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_documents_stand_behind_bos_in_the_layout_of_pictures(name, jams):
    model, layout = jams(name), LAYOUTS[name]
    rows = [[BOS, 30, 31], [BOS, 40], [50, 51]]
    prompts = augment_prompts(model, ByHand([RED, BLUE], [], [GREEN]), padded(rows), real(padded(rows)))
    expected = [
        [BOS, *laid_out(RED, layout), *laid_out(BLUE, layout), 30, 31],
        [BOS, 40],
        [*laid_out(GREEN, layout), 50, 51],  # no bos: nothing stands before the documents
    ]
    assert prompts.input_ids.tolist() == padded(expected).tolist()
    assert torch.equal(prompts.attention_mask, real(padded(expected)))
    assert torch.equal(prompts.prompt_ids, padded(rows))
    assert prompts.retrieved_ids == [["red", "blue"], [], ["green"]]
    assert prompts.retrieved_scores == [[0.5, 0.5], [], [0.5]]
    assert document_ids(model.config, BLUE) == laid_out(BLUE, layout)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_with_and_without_a_mask(side, mask, jams):
    rows = [[BOS, 30, 31, 32, 33], [BOS, 40]]
    ids = padded(rows, side)
    retriever = ByHand([BLUE], [RED, BLUE])
    prompts = augment_prompts(jams(), retriever, ids, real(ids) if mask else None)
    assert [query.input_ids.tolist() for query in retriever.queries] == rows
    kept = [row[keep.bool()].tolist() for row, keep in zip(prompts.input_ids, prompts.attention_mask)]
    expected = [[BOS, *laid_out(BLUE, {}), 30, 31, 32, 33], [BOS, *laid_out(RED, {}), *laid_out(BLUE, {}), 40]]
    assert kept == expected
    if side == "left":
        assert prompts.input_ids.tolist() == padded(expected).tolist()  # the shorter prompt's padding made room


def test_a_token_that_is_padding_elsewhere_counts_where_the_mask_says_so(jams):
    ids = torch.tensor([[BOS, 0, 30]])
    prompts = augment_prompts(jams(), ByHand([BLUE]), ids, torch.ones_like(ids))
    assert prompts.input_ids.tolist() == [[BOS, *laid_out(BLUE, {}), 0, 30]]


def test_pictures_of_the_prompt_go_with_their_rows(jams):
    model = jams()
    torch.manual_seed(0)
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    hole = picture({}, [IMAGE] * N)
    own = picture({}, [FIRST + 1] * N)
    rows = [[BOS, *hole, 30], [BOS, 40, *own], [BOS, *hole, *own, *hole]]
    retriever = ByHand([RED], [], [BLUE])
    prompts = augment_prompts(model, retriever, padded(rows), real(padded(rows)), pixels)
    assert [query.input_ids.tolist() for query in retriever.queries] == rows
    expected = [pixels[:1], pixels[:0], pixels[1:]]
    assert all(torch.equal(query.pixel_values, wanted) for query, wanted in zip(retriever.queries, expected))
    codes = [[int(i) for i in row] for row in model.get_image_tokens(pixels)]
    filled = [
        [BOS, *laid_out(RED, {}), *picture({}, codes[0]), 30],
        [BOS, 40, *own],
        [BOS, *laid_out(BLUE, {}), *picture({}, codes[1]), *own, *picture({}, codes[2])],
    ]
    assert prompts.input_ids.tolist() == padded(filled).tolist()


@pytest.mark.parametrize(("room", "count"), [(60, 3), (59, 2), (39, 2), (38, 1), (20, 1), (19, 0)])
def test_documents_without_room_are_left_out_the_least_similar_first(room, count, jams, monkeypatch):
    """Their 20, 19 and 21 tokens are counted beside the prompt's 3 and those to be written; it is said what is left
    out.
    """
    told: list[str] = []
    monkeypatch.setattr(retrieval_prompts.logger, "warning_once", told.append)
    documents, ids = [RED, BLUE, GREEN], torch.tensor([[BOS, 30, 31]])
    assert [len(laid_out(d, {})) for d in documents] == [20, 19, 21]
    new = 128 - 3 - room
    prompts = augment_prompts(jams(max_position_embeddings=128), ByHand(documents), ids, max_new_tokens=new)
    assert prompts.retrieved_ids == [[d.id for d in documents[:count]]]
    assert prompts.input_ids.tolist() == [
        [BOS, *(token for d in documents[:count] for token in laid_out(d, {})), 30, 31]
    ]
    assert len(told) == (count < 3) and all(f"{3 - count} of 3 retrieved documents" in words for words in told)


def test_how_many_fit():
    assert [how_many_fit([5, 1, 1], room) for room in (-1, 0, 4, 5, 6, 7, 99)] == [0, 0, 0, 1, 2, 3, 3]
    assert how_many_fit([], 3) == how_many_fit([], -3) == 0


def test_room_is_counted_row_by_row(jams):
    """The longer prompt has no room for a second document, the shorter one has."""
    model = jams(max_position_embeddings=128)
    rows = [[BOS, *[30] * 40], [BOS, 40]]
    prompts = augment_prompts(
        model, ByHand([BLUE] * 2, [BLUE] * 2), padded(rows), real(padded(rows)), max_new_tokens=60
    )
    assert [len(ids) for ids in prompts.retrieved_ids] == [1, 2]
    assert prompts.input_ids.shape[1] == 41 + 19


def test_without_a_number_of_new_tokens_a_picture_has_room(jams):
    model = jams(max_position_embeddings=64)
    for text, expected in ((26, 1), (27, 0)):  # 1 + 26 + 19 of the document + 18 of a picture are 64 tokens
        prompts = augment_prompts(model, ByHand([BLUE]), torch.tensor([[BOS, *[30] * text]]))
        assert len(prompts.retrieved_ids[0]) == expected


# ----- generate -------------------------------------------------------------------------------------------------------


SETTINGS = [
    {"generation_mode": "interleaved", "max_new_tokens": N + 9},
    {"generation_mode": "image", "guidance_scale": 3.0, "max_new_tokens": N + 4},
    {"generation_mode": "image"},
    {
        "generation_mode": "image",
        "guidance_scale": 2.0,
        "image_guidance_scale": 1.5,
    },  # the documents' pictures are context
    {"generation_mode": "interleaved", "image_positions": [2], "max_new_tokens": N + 9},
    {"generation_mode": "text", "max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2},
    {"generation_mode": "image", "num_return_sequences": 3, "do_sample": True, "top_k": 8, "max_new_tokens": N + 3},
    {"max_new_tokens": 4},
]


@pytest.mark.sampled
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["plain", "emu3"])
def test_generate_equals_generate_on_the_hand_made_prompt(name, settings, jams):
    model, layout = jams(name, mode="cross"), LAYOUTS[name]
    settings = {"do_sample": False, **settings}
    if "max_new_tokens" in settings and settings["max_new_tokens"] > N:
        settings["max_new_tokens"] += model.config.picture_length - N
    rows = [[BOS, 30, 31, 32], [BOS, 40], [BOS, 50, 51]]
    made = [
        [BOS, *laid_out(RED, layout), *laid_out(GREEN, layout), 30, 31, 32],
        rows[1],
        [BOS, *laid_out(BLUE, layout), 50, 51],
    ]
    by_hand, ids = padded(made), padded(rows)
    torch.manual_seed(0)
    expected = model.generate(input_ids=by_hand, attention_mask=real(by_hand), **settings)
    torch.manual_seed(0)
    retriever = ByHand([RED, GREEN], [], [BLUE])
    output = model.generate(input_ids=ids, attention_mask=real(ids), retriever=retriever, **settings)
    copies = settings.get("num_return_sequences", 1)
    assert torch.equal(output[:, : ids.shape[1]], ids.repeat_interleave(copies, dim=0))
    assert torch.equal(output[:, ids.shape[1] :], expected[:, by_hand.shape[1] :])
    torch.manual_seed(0)
    full = model.generate(ids, attention_mask=real(ids), retriever=retriever, return_dict_in_generate=True, **settings)
    assert torch.equal(full.sequences, output)
    assert full.retrieved_ids == [ids for ids in (["red", "green"], [], ["blue"]) for _ in range(copies)]
    assert [len(scores) for scores in full.retrieved_scores] == [len(ids) for ids in full.retrieved_ids]
    assert full["retrieved_ids"] is full.retrieved_ids


def test_the_memory_is_not_idle(jams):
    model = jams(mode="cross")
    ids = torch.tensor([[BOS, 30, 31]])
    outputs = [
        model.generate(ids, generation_mode="image", do_sample=False, retriever=retriever).tolist()
        for retriever in (None, ByHand([]), ByHand([RED]), ByHand([BLUE]))
    ]
    assert outputs[0] == outputs[1] and outputs[1] != outputs[2] != outputs[3]


def test_lengths_are_the_users(jams):
    """A row that never ends: with the retriever it has as many tokens as without."""
    model = jams(mode="cross")
    ids = torch.tensor([[BOS, 30, 31]])
    settings = {"generation_mode": "text", "do_sample": False, "eos_token_id": None}
    for length in ({"max_length": 9}, {"max_new_tokens": 6}, {"max_length": 9, "min_length": 5}):
        output = model.generate(ids, retriever=ByHand([RED, BLUE]), **settings, **length)
        assert output.shape == (1, 9)
    config = model.generation_config.from_dict(
        {**model.generation_config.to_dict(), "max_length": 8, "do_sample": False, "suppress_tokens": [EOS]}
    )
    output = model.generate(ids, retriever=ByHand([RED]), generation_mode="text", generation_config=config)
    assert output.shape == (1, 8) and config.max_length == 8
    model = jams(max_position_embeddings=64)
    assert model.generate(ids, retriever=ByHand([BLUE]), **settings).shape == (1, 64 - 19)


def test_min_length_counts_the_prompt_without_documents(jams):
    model = jams(mode="cross")
    ids, bias = torch.tensor([[BOS, 30, 31]]), [[[EOS], 100.0]]
    settings = {"generation_mode": "text", "do_sample": False, "sequence_bias": bias, "max_new_tokens": 12}
    for retriever in (None, ByHand([RED])):
        output = model.generate(ids, retriever=retriever, min_length=7, **settings)
        assert output.shape[1] == 8 and int(output[0, -1]) == EOS
        assert model.generate(ids, retriever=retriever, min_new_tokens=2, **settings).shape[1] == 6


def test_a_half_drawn_picture_goes_on(jams):
    model = jams(mode="cross")
    row = [BOS, 30, BREAK, FIRST + 3, FIRST + 9]
    expected = model.generate(
        torch.tensor([[BOS, *laid_out(RED, {}), *row[1:]]]),
        generation_mode="interleaved",
        do_sample=False,
        max_new_tokens=N,
    )
    output = model.generate(
        torch.tensor([row]), retriever=ByHand([RED]), generation_mode="interleaved", do_sample=False, max_new_tokens=N
    )
    assert output[0].tolist() == [*row, *expected[0, 1 + 20 + 4 :].tolist()]
    assert all(FIRST <= token < FIRST + N for token in output[0, 3 : 3 + N].tolist()) and int(output[0, 3 + N]) == BREAK


def test_pictures_of_the_prompt_come_back_as_codes(jams):
    model = jams(mode="cross")
    torch.manual_seed(0)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    ids = torch.tensor([[BOS, *picture({}, [IMAGE] * N), 30]])
    inputs = {"input_ids": ids, "pixel_values": pixels}
    output = model.generate(**inputs, retriever=ByHand([RED]), max_new_tokens=3, do_sample=False)
    assert output[0, : ids.shape[1]].tolist() == [BOS, *picture({}, model.get_image_tokens(pixels)[0].tolist()), 30]


def test_a_streamer_sees_the_users_prompt(jams):
    class Keeps:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen.append(value)

        def end(self):
            self.ended = True

    streamer, ids = Keeps(), torch.tensor([[BOS, 30, 31]])
    output = jams(mode="cross").generate(
        ids, retriever=ByHand([RED]), streamer=streamer, generation_mode="text", max_new_tokens=4, do_sample=False
    )
    assert torch.equal(streamer.seen[0], ids) and streamer.ended
    assert [int(value) for value in streamer.seen[1:]] == output[0, 3:].tolist()


def test_cut_takes_out_documents_and_nothing_else():
    prompts = AugmentedPrompts(torch.zeros(2, 7), torch.ones(2, 7), torch.tensor([[0, 1], [1, 2]]), [[], []], [[], []])
    sequences = torch.arange(4 * 9).view(4, 9)
    assert prompts.cut(sequences).tolist() == [[0, 1, 7, 8], [0, 1, 16, 17], [1, 2, 25, 26], [1, 2, 34, 35]]


def test_bad_input_is_answered(jams):
    model = jams()
    ids = torch.tensor([[BOS, 30]])
    cases = [
        ({"input_ids": ids, "retriever": "folder"}, "must have the method documents_for.*got str"),
        ({"retriever": ByHand([RED])}, r"input_ids \[B, T\], got NoneType"),
        ({"input_ids": ids[0], "retriever": ByHand([RED])}, r"input_ids \[B, T\], got \[2\]"),
        ({"input_ids": ids[:, :0], "retriever": ByHand([RED])}, r"got \[1, 0\]"),
        (
            {"input_ids": torch.zeros(1, 3, dtype=torch.long), "retriever": ByHand([RED])},
            "Prompt 0 is nothing but padding",
        ),
        (
            {"input_ids": ids, "attention_mask": ids[:, :1], "retriever": ByHand([RED])},
            r"shape of input_ids \[1, 2\], got \[1, 1\]",
        ),
        ({"input_ids": ids, "retriever": ByHand([RED], [])}, "each of 1 prompts.*got 2 lists"),
        ({"input_ids": torch.tensor([[BOS, IMAGE]]), "retriever": ByHand([RED])}, "no pixel_values came with it"),
        ({"inputs_embeds": torch.zeros(1, 2, 32), "retriever": ByHand([RED])}, "inputs_embeds knows nothing of"),
        ({"input_ids": ids, "position_ids": ids, "retriever": ByHand([RED])}, "position_ids knows nothing of"),
        ({"input_ids": ids, "max_length": 2, "retriever": ByHand([RED])}, "2 tokens and max_length is 2"),
        (
            {"input_ids": ids, "retriever": ByHand([PromptDocument("x", 0.1, [60], [1] * 15)])},
            "Document 'x'.*15 codes, 1..1",
        ),
        ({"input_ids": ids, "retriever": ByHand([PromptDocument("x", 0.1, [60], [16] * 16)])}, "16 codes, 16..16"),
        ({"input_ids": ids, "retriever": ByHand([RED]), "generation_mode": "video"}, "generation_mode must be one of"),
    ]
    for arguments, words in cases:
        with pytest.raises(ValueError, match=words):
            model.generate(**arguments)
    halves = torch.tensor([[BOS, *[IMAGE] * 8], [BOS, *[IMAGE] * 8]])
    with pytest.raises(ValueError, match="Prompt 0 has 8 placeholders <image>; a picture has 16"):
        model.generate(input_ids=halves, pixel_values=torch.zeros(1, 3, 16, 16), retriever=ByHand([], []))


def test_older_names_mean_the_same(jams):
    model, ids = jams(mode="cross"), torch.tensor([[BOS, 30, 31]])
    settings = {"generation_mode": "text", "do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True}
    new = model.generate(ids, retriever=ByHand([RED]), **settings)
    old = model.generate(ids, memory=ByHand([RED]), **settings)
    assert torch.equal(new.sequences, old.sequences)
    assert old.memory_ids == new.retrieved_ids and old.memory_scores == new.retrieved_scores
    with pytest.raises(ValueError, match="older name of retriever"):
        model.generate(ids, memory=ByHand([RED]), retriever=ByHand([RED]), **settings)
    from jam_hf.generation.retrieval_prompts import Memory, MemoryDocument, MemoryQuery
    from jam_hf.retrieval import MemoryIndex, RetrievalIndex

    assert (Memory, MemoryDocument, MemoryQuery) == (Retriever, PromptDocument, RetrievalQuery)
    assert MemoryIndex is RetrievalIndex
