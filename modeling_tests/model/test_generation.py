"""Decoding: the grammar without a model, guidance against a slow oracle, modes, budgets, bad input."""

import pytest
import torch
from conftest import NUM_CODES, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from jam_hf import JamConfig
from jam_hf.model.grammar_jam import PictureGrammar


N = 16
BREAK, EOS, IMAGE = 3, 2, 4


@pytest.fixture(scope="module")
def grammar():
    return PictureGrammar(_config())


def _config():
    vq = {"block_out_channels": (8, 8, 8), "sample_size": 16, "num_vq_embeddings": NUM_CODES, "norm_num_groups": 4}
    text = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    return JamConfig(text_config=text, vq_config=vq)


def _state_by_hand(row: list[int], first: int) -> tuple[bool, int, bool]:
    """The obvious oracle: read the row from the left, one token at a time."""
    inside, codes, closed = False, 0, False
    for token in row:
        closed = False
        if token == BREAK:
            closed = inside and codes > 0
            inside, codes = not closed, 0
        elif token >= first or token == IMAGE:
            inside, codes = True, codes + 1
        else:
            inside, codes = False, 0
    return inside, codes, closed


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_state_against_the_oracle(data):
    grammar = PictureGrammar(_config())
    row: list[int] = [1]
    for _ in range(data.draw(st.integers(0, 4))):
        row += data.draw(st.lists(st.integers(20, 60), max_size=3))
        row += [BREAK, *data.draw(st.lists(st.integers(84, 99), min_size=N, max_size=N)), BREAK]
    row += data.draw(st.lists(st.integers(20, 60), max_size=3))
    if data.draw(st.booleans()):
        row += [BREAK, *data.draw(st.lists(st.integers(84, 99), max_size=N))]
    state = grammar.state(torch.tensor([row]))
    assert (bool(state.in_picture), int(state.position), bool(state.closed)) == _state_by_hand(row, 84)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(20, 90))
def test_any_random_choice_within_the_grammar_is_a_document(seed, budget):
    """Interleaved documents drawn at random from what is allowed parse, and no picture is left unfinished."""
    grammar, generator = PictureGrammar(_config()), torch.Generator().manual_seed(seed)
    ids = torch.tensor([[1, 30], [1, 31], [1, 32]])
    weights = torch.ones(100)
    weights[BREAK] = 30.0
    while ids.shape[1] < budget:
        allowed = grammar.allowed(ids, 100, "interleaved", 2, budget)
        assert allowed.any(1).all()
        ids = torch.cat((ids, torch.multinomial(weights * allowed, 1, generator=generator)), dim=1)
    for row in ids.tolist():
        if EOS in row:
            row = row[: row.index(EOS)]
        position = 0
        while position < len(row):
            if row[position] == BREAK:
                picture = row[position + 1 : position + 1 + N]
                assert len(picture) == N and min(picture) >= 84
                assert row[position + 1 + N] == BREAK
                position += N + 2
            else:
                assert row[position] < 84 and row[position] not in (IMAGE, 5, 12, 13)
                position += 1


def test_allowed_ids_mode_by_mode(grammar):
    text, opened = torch.tensor([[1, 30]]), torch.tensor([[1, BREAK]])
    full = torch.tensor([[BREAK] + [90] * N])
    closed = torch.cat((full, torch.tensor([[BREAK]])), dim=1)

    def allowed(ids, mode, prompt_length=0, max_length=100):
        return set(grammar.allowed(ids, 100, mode, prompt_length, max_length)[0].nonzero().flatten().tolist())

    codes = set(range(84, 100))
    assert BREAK in allowed(text, "interleaved") and not allowed(text, "interleaved") & codes
    assert BREAK not in allowed(text, "text") and EOS in allowed(text, "text")
    assert allowed(text, "image", prompt_length=2) == {BREAK}
    for mode in ("interleaved", "image"):
        assert allowed(opened, mode) == codes
        assert allowed(full, mode) == {BREAK}
    assert allowed(closed, "image") == {EOS}
    assert BREAK in allowed(closed, "interleaved")
    assert BREAK not in allowed(text, "interleaved", max_length=2 + N + 1)
    assert BREAK in allowed(text, "interleaved", max_length=2 + N + 2)


def _oracle(model, row, mode, scale, steps, budget):
    """Greedy, one row, no cache, two full forwards for each token inside a picture."""
    grammar, config = PictureGrammar(model.config), model.config
    prompt, ids = len(row), list(row)
    for _ in range(steps):
        tensor = torch.tensor([ids])
        scores = model(input_ids=tensor, use_cache=False).logits[:, -1]
        state = grammar.state(tensor)
        count = int(state.position)
        if scale != 1 and bool(state.in_picture) and count < config.image_seq_length:
            context = [config.bos_token_id, config.mask_token_id, config.break_token_id, *ids[len(ids) - count :]]
            uncond = model(input_ids=torch.tensor([context]), use_cache=False).logits[:, -1]
            scores = uncond + scale * (scores - uncond)
        allowed = grammar.allowed(tensor, scores.shape[-1], mode, prompt, budget)
        ids.append(int(scores.masked_fill(~allowed, float("-inf")).argmax()))
        if ids[-1] == config.eos_token_id:
            break
    return ids[prompt:]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("mode", ["interleaved", "image"])
@pytest.mark.parametrize(
    ("family", "fusion", "init"), [("llama", "cross", "preserving"), ("opt-paper", "width", "copy")]
)
@torch.no_grad()
@pytest.mark.sampled(pairs=True)
def test_generate_equals_the_slow_oracle_row_by_row(family, fusion, init, mode, scale, jam):
    """Rows of one batch in different modalities: one in text, one that opens a picture, one half-way through one."""
    model = jam(family, fusion, init)
    first = model.config.image_token_offset
    rows = [
        [1, 30, 31, 32],
        [1, 40, BREAK],
        [1, 50, BREAK, first + 1, first + 2, first + 3],
    ]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    steps = N + 4
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_mode=mode,
        guidance_scale=scale,
        max_new_tokens=steps,
        do_sample=False,
    )
    for row, prompt in zip(output.tolist(), rows):
        expected = _oracle(model, prompt, mode, scale, steps, len(prompt) + steps)
        assert row[length : length + len(expected)] == expected


def test_guidance_is_not_idle(jam):
    model = jam("llama", "cross", "preserving")
    prompt = random_ids(model, 1, 5) % 60 + 20
    plain, guided = (
        model.generate(input_ids=prompt, generation_mode="image", guidance_scale=s, do_sample=False) for s in (1.0, 6.0)
    )
    assert plain.tolist() != guided.tolist()


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_grammar_holds_under_beams_and_sampling(settings, jam):
    model = jam("llama", "cross", "preserving")
    torch.manual_seed(0)
    output = model.generate(
        input_ids=torch.tensor([[1, 30, 31]]), generation_mode="image", guidance_scale=2.0, **settings
    )
    first = model.config.image_token_offset
    for row in output.tolist():
        assert row[3] == BREAK and row[4 + N] == BREAK
        assert all(token >= first for token in row[4 : 4 + N])


def test_text_mode_writes_no_pictures(jam):
    model = jam("llama", "uniform", "average")
    torch.manual_seed(1)
    output = model.generate(
        input_ids=torch.tensor([[1, 30]] * 4), generation_mode="text", do_sample=True, top_k=0, max_new_tokens=40
    )
    assert (output < model.config.image_token_offset).all() and not (output == BREAK).any()


def test_seeds_repeat(jam):
    model = jam("llama", "cross", "paper")
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(model.generate(input_ids=torch.tensor([[1, 30]]), generation_mode="image", do_sample=True).tolist())
    assert runs[0] == runs[1]


def test_bad_input_is_answered(jam, processor):
    model = jam("llama", "cross", "preserving")
    ids = torch.tensor([[1, 30]])
    with pytest.raises(ValueError, match="generation_mode must be one of 'interleaved', 'text', 'image', got 'video'"):
        model.generate(input_ids=ids, generation_mode="video")
    with pytest.raises(ValueError, match="max_new_tokens=18"):
        model.generate(input_ids=ids, generation_mode="image", max_new_tokens=5)
    with pytest.raises(ValueError, match="no pixel_values"):
        model.generate(input_ids=torch.tensor([[1, IMAGE]]), max_new_tokens=2)
    with pytest.raises(ValueError, match="negative_prompt_ids"):
        model.generate(input_ids=ids, negative_prompt_ids=ids, max_new_tokens=2)


def test_the_saved_generation_config_writes_interleaved(jam):
    model = jam("llama", "cross", "preserving")
    assert model.generation_config.generation_mode == "interleaved"
    output = model.generate(input_ids=torch.tensor([[1, 30]]), max_new_tokens=5)
    assert output.shape[1] <= 7


def _is_document(ids, first):
    """Pictures of exactly N codes between breaks, and no padding before the end."""
    position = 0
    while position < len(ids) and ids[position] != EOS:
        if ids[position] == BREAK:
            assert all(token >= first for token in ids[position + 1 : position + 1 + N])
            assert ids[position + 1 + N] == BREAK
            position += N + 2
        else:
            assert ids[position] != 0 and ids[position] < first
            position += 1


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [BREAK]},
        {"begin_suppress_tokens": [BREAK]},
        {"min_new_tokens": N + 8},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [40, 41]},
        {"top_k": 1, "do_sample": True},
    ],
)
def test_the_grammar_has_the_last_word(settings, jam):
    """What transformers' own processors forbid may be the only id that can follow."""
    model = jam("llama", "cross", "preserving")
    torch.manual_seed(0)
    output = model.generate(
        input_ids=torch.tensor([[1, 30, 31]]),
        generation_mode="image",
        max_new_tokens=N + 10,
        **{"do_sample": False, **settings},
    )
    ids = output[0, 3:].tolist()
    assert ids[0] == BREAK and EOS in ids[N + 2 :]
    _is_document(ids, model.config.image_token_offset)


@pytest.mark.parametrize("mode", ["interleaved", "text", "image", None])
def test_embeddings_as_prompt_write_what_ids_write(mode, jam):
    model = jam("llama", "cross", "preserving")
    ids = torch.tensor([[1, 30, 31, 32]])
    settings = {"generation_mode": mode, "do_sample": False, "max_new_tokens": N + 6}
    expected = model.generate(input_ids=ids, **settings)[:, 4:]
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(ids), **settings), expected)


def test_the_end_is_what_generate_is_told(jam):
    model = jam("llama", "cross", "preserving")
    ids = torch.tensor([[1, 30]])
    output = model.generate(input_ids=ids, generation_mode="image", eos_token_id=90, max_new_tokens=N + 9)
    assert output[0, 2 + N + 2 :].tolist() == [90]


def test_a_guidance_scale_that_is_no_number_is_refused(jam):
    model = jam("llama", "cross", "preserving")
    for scale in (float("nan"), float("inf"), "3"):
        with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
            model.generate(input_ids=torch.tensor([[1, 30]]), generation_mode="image", guidance_scale=scale)


def test_without_a_budget_a_document_may_fill_the_positions(jam, caplog):
    model = jam("llama", "cross", "preserving")
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0.0
    ids = torch.tensor([[1, 30]])
    output = model.generate(input_ids=ids, generation_mode="text", do_sample=False, eos_token_id=None)
    assert output.shape[1] == model.config.max_position_embeddings
    model.generate(input_ids=ids, max_new_tokens=3)
    assert not [record for record in caplog.records if "max_length" in record.message]
