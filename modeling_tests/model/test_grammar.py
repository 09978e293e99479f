"""The state machine alone, without a model: random documents under random rules, whole batches at a time.

The oracle reads a document as a person would, token by token, with lists and loops.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jam_hf import JamConfig
from jam_hf.model.grammar_jam import DocumentRules, PictureGrammar, PictureReader


BOS, EOS, BREAK, IMAGE, VOCABULARY = 1, 2, 3, 4, 100
ROWS, EXAMPLES = 32, 400  # 12,800 documents
LAYOUTS = {
    "codes": {},
    "own end": {"image_end_token_id": 60},
    "rows": {
        "image_prefix_token_ids": [61, 62],
        "image_row_end_token_id": 63,
        "image_suffix_token_ids": [64],
        "image_end_token_id": 65,
    },
}


def _config(layout: str, grid: int, eos=EOS) -> JamConfig:
    codes = 8
    vq = {"block_out_channels": (8, 8), "sample_size": 2 * grid, "num_vq_embeddings": codes, "norm_num_groups": 4}
    text = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    return JamConfig(text_config=text, vq_config=vq, **LAYOUTS[layout], eos_token_id=eos)


CONFIGS = {(layout, grid): _config(layout, grid) for layout in LAYOUTS for grid in (1, 2, 3)}


def _parse(row: list[int], config: JamConfig) -> tuple[list[tuple[str, int]], bool]:
    """Segments `("text", ids)` and `("picture", tokens between the marks)` of one row up to its end, and whether it
    ended.

    Raises AssertionError where the row is no document.
    """
    template, end = list(config.picture_template), config.picture_end_token_id
    first = config.image_token_offset
    special = {IMAGE, 0, *config.picture_structure_token_ids, config.image_end_token_id, config.mask_end_token_id}
    special |= set(range(config.mask_token_id, config.mask_token_id + config.num_mask_tokens))
    segments, place = [], 0
    while place < len(row):
        token = row[place]
        if token == EOS:
            assert all(t in (0, EOS) for t in row[place + 1 :]), "written on after the end"
            return segments, True
        if token == BREAK:
            inside = row[place + 1 : place + 1 + len(template)]
            for got, wanted in zip(inside, template):
                assert got >= first if wanted < 0 else got == wanted
            after = row[place + 1 + len(template) : place + 2 + len(template)]
            assert after in ([end], []), after
            segments.append(("picture", len(inside) + len(after)))
            place += 2 + len(template)
        else:
            assert token < first and token not in special, token
            segments.append(("text", token))
            place += 1
    return segments, False


@st.composite
def _rules(draw, cost: int, room: int) -> DocumentRules:
    mode = draw(st.sampled_from(["interleaved"] * 6 + ["text", "image"]))
    if mode != "interleaved" or draw(st.booleans()):
        return DocumentRules(mode)
    least = draw(st.integers(0, min(2, room // cost)))
    most = draw(st.none() | st.integers(least, 4))
    if draw(st.booleans()):
        return DocumentRules(mode, least, most)
    after = tuple(draw(st.sets(st.integers(20, 40), min_size=1, max_size=9))) if draw(st.booleans()) else ()
    if after and draw(st.booleans()):
        return DocumentRules(mode, least, most, image_after_token_ids=after)
    places = tuple(
        sorted(draw(st.lists(st.integers(0, 12), min_size=1, max_size=most if most is not None else 3)))
        if most != 0
        else ()
    )
    return DocumentRules(mode, least, most, after, places)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_random_documents(data):
    """Whatever is drawn among the ids that are allowed is a document, keeps the budget and the rules, and both ways to
    read it agree at every step.
    """
    config = CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))]
    grammar, length = PictureGrammar(config), config.picture_length
    cost, first = length + 2, config.image_token_offset
    room = data.draw(st.integers(0, 4 * cost + 8))
    rules = data.draw(_rules(cost, room))
    if rules.mode == "image":
        room = max(room, cost)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    eager = data.draw(st.sampled_from([1.0, 20.0, 100.0]))

    # Prompts: text, a picture, or a picture begun, right up to its last token.
    started = [int(torch.randint(0, length + 1, (1,), generator=generator)) for _ in range(ROWS)]
    whole = [first if t < 0 else t for t in config.picture_template]
    prompts, halves = [], []
    for row in range(ROWS):
        kind = int(torch.randint(0, 3, (1,), generator=generator))
        prompt = [BOS, 30] if kind else [BOS, BREAK, *whole, config.picture_end_token_id]
        halves.append(kind == 2 and room >= cost * (1 + rules.min_images))
        if halves[-1]:
            prompt = [BOS, 30, BREAK, *whole[: started[row]]]
        prompts.append(prompt)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])

    # Some rows have less room than the batch: their context is shorter.
    rooms = torch.full((ROWS,), room)
    reader = PictureReader(grammar, longest, rooms, follows=True)
    weights = torch.ones(VOCABULARY)
    weights[BREAK] = eager
    done = torch.zeros(ROWS, dtype=torch.bool)
    for step in range(room):
        state = reader(ids)
        again = grammar.state(ids, longest, rooms - step)
        for name, told, read in zip(state._fields, state, again):
            assert torch.equal(told, read), name
        allowed = grammar.sets(VOCABULARY, ids.device)[grammar.kinds(state, rules)]
        assert allowed.any(1).all()
        tokens = torch.multinomial(weights * allowed, 1, generator=generator)[:, 0].masked_fill(done, 0)
        done = done | (tokens == EOS)
        ids = torch.cat((ids, tokens[:, None]), 1)

    for prompt, half, row in zip(prompts, halves, ids.tolist()):
        document = row[longest - len(prompt) :]
        segments, ended = _parse(document, config)
        begun = 0
        position = 0
        for kind, size in segments:  # count what the prompt did not hold whole
            position += size + 1 if kind == "picture" else 1
            begun += kind == "picture" and position > len(prompt)
        assert all(size == length + 1 for kind, size in segments if kind == "picture"), "unfinished within its budget"
        if rules.mode == "text":
            assert begun == int(half)
        elif rules.mode == "image":
            assert begun == 1
            assert ended or document[-1] == config.picture_end_token_id
        else:
            assert begun >= rules.min_images or room < rules.min_images * cost
            if rules.max_images is not None:
                assert begun <= max(rules.max_images, int(half))
            _check_layout(segments, len(prompt), rules, cost, room, half, ended)


def _check_layout(
    segments, prompt_length: int, rules: DocumentRules, cost: int, room: int, half: bool, ended: bool
) -> None:
    """Where a layout is forced, pictures stand where it says and, beyond `min_images`, nowhere else."""
    if not rules.forced or rules.min_images:
        return
    position, words, drawn, previous = 0, 0, int(half), None
    places = list(rules.image_positions)  # of which none is for the picture that the prompt has begun
    for kind, value in segments:
        new = position >= prompt_length
        position += value + 1 if kind == "picture" else 1
        if not new:
            continue
        left = room - (position - prompt_length) + (value + 1 if kind == "picture" else 1)
        fits = left >= cost and (rules.max_images is None or drawn < rules.max_images)
        placed = bool(places) and words >= places[0]
        due = fits and (placed or previous in rules.image_after_token_ids)
        assert (kind == "picture") == due, (segments, rules)
        if due and placed:  # one picture serves both
            places.pop(0)
        previous = value if kind == "text" else None
        words += kind == "text"
        drawn += kind == "picture"
    left = room - max(0, position - prompt_length)
    if ended and places:  # only where what is left out would not have fitted
        assert left < cost or (rules.max_images is not None and drawn >= rules.max_images)


def _any_token(config: JamConfig) -> st.SearchStrategy[int]:
    marks = [BREAK, config.picture_end_token_id, *config.picture_structure_token_ids, IMAGE]
    return st.sampled_from([30, 31, EOS, 96, 97, *marks])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_that_move_are_read_anew(data):
    """Beams reorder and repeat rows between two calls; drafts are read at several lengths, shorter ones too."""
    config = CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))]
    grammar = PictureGrammar(config)
    tokens = _any_token(config)
    rows = data.draw(st.lists(st.lists(tokens, min_size=9, max_size=9), min_size=3, max_size=3))
    ids, reader = torch.tensor(rows), PictureReader(grammar, 2, torch.tensor([50, 60, 70]), follows=False)
    for _ in range(5):
        order = data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3))
        seen = ids[order][:, : data.draw(st.integers(2, 9))]
        expected = grammar.state(seen, 2, torch.tensor([50, 60, 70]) - seen.shape[1] + 2)
        assert all(torch.equal(a, b) for a, b in zip(reader(seen), expected))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_reading_on_equals_reading_whole_whatever_the_ids(data):
    """`advance` against `state` on ids that no grammar made."""
    config = CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))]
    grammar = PictureGrammar(config)
    tokens = _any_token(config)
    row = data.draw(st.lists(tokens, min_size=1, max_size=60))
    start = data.draw(st.integers(0, len(row)))
    state = grammar.state(torch.tensor([row[:start]], dtype=torch.int64), start, 100)
    for place in range(start, len(row)):
        state = grammar.advance(state, torch.tensor([row[place]]))
        whole = grammar.state(torch.tensor([row[: place + 1]]), start, 100 - place - 1 + start)
        clamp = config.picture_length + 2  # a longer run of codes, which no picture is, is not counted on by `state`
        for name, on, read in zip(state._fields, state, whole):
            assert torch.equal(on.clamp(max=clamp) if name == "position" else on, read), name


def test_the_host_is_asked_only_where_rows_are_in_text():
    """Inside pictures the next positions are known beforehand."""
    config = CONFIGS["rows", 3]
    grammar = PictureGrammar(config)
    ids = torch.tensor([[BOS, BREAK], [BOS, BREAK]])
    reader = PictureReader(grammar, 2, 100, follows=True)
    asked, seen = [], []
    whole = [96 if t < 0 else t for t in config.picture_template]
    for token in [*whole, config.picture_end_token_id, 30]:
        before = reader._ids
        seen.append(reader.host_positions(ids))
        asked.append(reader._ids is not before)
        ids = torch.cat((ids, torch.tensor([[token]] * 2)), 1)
    length = config.picture_length
    assert seen == [[p, p] for p in range(length + 1)] + [[-1, -1]]
    assert asked == [True] + [False] * length + [True]


def test_a_step_compiles_whole():
    """`advance`, `kinds` and the sets in one graph, without a break, for every set of rules; and with the same
    result.
    """
    config = CONFIGS["rows", 2]
    grammar = PictureGrammar(config)
    device = torch.device("cpu")
    for rules in (
        DocumentRules(),
        DocumentRules("image"),
        DocumentRules(min_images=1, max_images=2, image_positions=(1, 2)),
        DocumentRules(image_after_token_ids=(30,)),
    ):
        state = grammar.state(torch.tensor([[BOS, 30], [BOS, BREAK]]), 2, 40)
        grammar.sets(VOCABULARY, device)[grammar.kinds(state, rules)]  # constants are made outside the graph

        def step(state, tokens, rules=rules):
            state = grammar.advance(state, tokens)
            return state, grammar.sets(VOCABULARY, device)[grammar.kinds(state, rules)]

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for tokens in ([30, 61], [BREAK, 62], [61, 97], [62, 98]):
            wanted, mask = step(state, torch.tensor(tokens))
            state, compiled_mask = compiled(state, torch.tensor(tokens))
            assert all(torch.equal(a, b) for a, b in zip(state, wanted)) and torch.equal(mask, compiled_mask)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "video"}, "must be one of"),
        ({"min_images": -1}, "min_new_images must be a number of pictures"),
        ({"max_images": 1.5}, "max_new_images must be a number of pictures"),
        ({"min_images": 3, "max_images": 2}, "allows fewer pictures than are asked for"),
        ({"image_positions": (1, 2, 3), "max_images": 2}, "allows fewer pictures than are asked for"),
        ({"image_positions": (5, 2)}, "in ascending order"),
        ({"mode": "text", "max_images": 2}, "go with 'interleaved'"),
    ],
)
def test_rules_that_contradict_each_other(wrong, message):
    with pytest.raises(ValueError, match=message):
        DocumentRules(**wrong)
