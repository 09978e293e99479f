"""Guidance against a slow oracle: one row, no cache, a full forward for the document and for each branch at every
token.
"""

import functools
import math

import pytest
import torch
from conftest import VQ_SETTINGS, parent_model, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig

from jam_hf import JamConfig, JamForCausalLM
from jam_hf.generation.packed_columns import LaneColumns
from jam_hf.generation.packed_guidance import PackedGuidance
from jam_hf.model.grammar_jam import DocumentRules, PictureGrammar
from jam_hf.model.guidance_jam import GuidanceSettings, SeparateGuidance


N, BOS, EOS, BREAK = 16, 1, 2, 3
PLACES = (2, 3)  # where "interleaved" documents have their pictures here: rows enter and leave them at different steps
FUSIONS = [("llama", "uniform", "average"), ("llama", "cross", "preserving"), ("opt", "cross", "paper")]
SOME = ("classifier-free", "two scales", "CD-K", "negatives, a break at the end")
KINDS = {
    "classifier-free": {"guidance_scale": 3.0},
    "less than none": {"guidance_scale": 0.5},
    "two scales": {"guidance_scale": 2.5, "image_guidance_scale": 1.5},
    "pictures alone": {"image_guidance_scale": 2.0},
    "CD-K": {"contrastive_alpha": 0.4, "contrastive_k": 3},
    "CD-K of all codes": {"contrastive_alpha": 0, "contrastive_k": 99},
    "negative": {"guidance_scale": 3.0, "negative": [[1, 44, 45, 46]]},
    "negatives, a break at the end": {
        "guidance_scale": 3.0,
        "negative": [[1, 44, BREAK], [1, 45, 46, 47, BREAK], [9], [50]],
    },
}


def _context_by_hand(model, branch: str, before: list[int], negative: list[int] | None) -> list[int]:
    config = model.config
    if branch == "unconditional":
        if negative is not None:
            return negative[:-1] if negative[-1] == BREAK else negative
        return [BOS, config.mask_token_id]
    context, sentinel, previous_was_text = [BOS], 0, False
    for token in before[before[0] == BOS :]:
        text = token < config.image_token_offset and token != BREAK
        if not text:
            context.append(token)
        elif not previous_was_text:
            context.append(config.mask_token_id + min(sentinel, config.num_mask_tokens - 1))
            sentinel += 1
        previous_was_text = text
    return context


def _combine_by_hand(kind: dict, cond: list[float], branches: list[list[float]]) -> list[float]:
    """Code by code, from the formulas alone."""

    def probabilities(values):
        total = sum(math.exp(v - max(values)) for v in values)
        return [math.exp(v - max(values)) / total for v in values]

    if "contrastive_k" in kind:
        p, q = probabilities(cond), probabilities(branches[0])
        kth = sorted(p, reverse=True)[: kind["contrastive_k"]][-1]
        return [math.log(a) - math.log(b) if a >= kind["contrastive_alpha"] * kth else -math.inf for a, b in zip(p, q)]
    scale = kind.get("guidance_scale", 1.0)
    if "image_guidance_scale" in kind:
        other = kind["image_guidance_scale"]
        return [u + other * (i - u) + scale * (c - i) for c, u, i in zip(cond, *branches)]
    return [u + scale * (c - u) for c, u in zip(cond, branches[0])]


@torch.no_grad()
def oracle(model, row: list[int], kind: dict, mode: str, steps: int, negative: list[int] | None = None) -> list[int]:
    config, grammar, ids = model.config, PictureGrammar(model.config), list(row)
    first, last = config.image_token_offset, config.image_token_offset + config.num_image_tokens
    names = ["unconditional", "pictures"] if "image_guidance_scale" in kind else ["unconditional"]
    for _ in range(steps):
        scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        state = grammar.state(torch.tensor([ids]))
        count = int(state.position)
        if bool(state.in_picture) and count < N:
            opening = len(ids) - count - 1
            told = [[*_context_by_hand(model, n, ids[:opening], negative), *ids[opening:]] for n in names]
            branches = [
                model(input_ids=torch.tensor([t]), use_cache=False).logits[0, -1, first:last].tolist() for t in told
            ]
            scores[first:last] = torch.tensor(_combine_by_hand(kind, scores[first:last].tolist(), branches))
        rules = DocumentRules(mode, image_positions=PLACES if mode == "interleaved" else ())
        state = grammar.state(torch.tensor([ids]), len(row), steps - len(ids) + len(row))
        allowed = grammar.sets(len(scores), scores.device)[grammar.kinds(state, rules)[0]]
        ids.append(int(scores.masked_fill(~allowed, -math.inf).argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(row) :]


def picture(model, seed: int = 0) -> list[int]:
    codes = torch.randint(0, model.config.num_image_tokens, (N,), generator=torch.Generator().manual_seed(seed))
    return [BREAK, *(codes + model.config.image_token_offset).tolist(), BREAK]


def mixed_rows(model) -> list[list[int]]:
    """In text, before a picture, half-way through one, and after one and in text again."""
    first = model.config.image_token_offset
    return [
        [BOS, 30, 31, 32],
        [BOS, 40, *picture(model), 41, BREAK],
        [BOS, 50, BREAK, first + 1, first + 2, first + 3],
        [BOS, *picture(model, 1), 60, *picture(model, 2), 61, 62],
    ]


def batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def check(model, kind: dict, mode: str, steps: int, rows: list[list[int]] | None = None, **more) -> torch.Tensor:
    kind = dict(kind)
    negative = kind.pop("negative", None)
    rows = rows or mixed_rows(model)
    if negative is not None:
        padded = batch(negative)
        more |= {"negative_prompt_ids": padded["input_ids"], "negative_prompt_attention_mask": padded["attention_mask"]}
    if mode == "interleaved":
        more["image_positions"] = list(PLACES)
    output = model.generate(**batch(rows), generation_mode=mode, max_new_tokens=steps, do_sample=False, **kind, **more)
    start = max(map(len, rows))
    for number, (written, row) in enumerate(zip(output[:, start:].tolist(), rows)):
        own = None if negative is None else negative[number if len(negative) > 1 else 0]
        expected = oracle(model, row, kind, mode, steps, own)
        assert written[: len(expected)] == expected, number
    return output


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("fusion", "kind"),
    [(FUSIONS[0], kind) for kind in KINDS] + [(fusion, kind) for fusion in FUSIONS[1:] for kind in SOME],
)
def test_each_kind_equals_the_oracle_in_a_mixed_batch(kind, fusion, jam):
    model = jam(*fusion)
    output = check(model, KINDS[kind], "interleaved", 2 * N + 8)
    assert (output[:, -2 * N - 8 :] == BREAK).sum() > 6


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["classifier-free", "two scales", "negative"])
@pytest.mark.parametrize("settings", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_each_cache(kind, settings, jam):
    check(jam("llama", "cross", "preserving"), KINDS[kind], "interleaved", N + 8, **settings)


@pytest.mark.sampled
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["classifier-free", "two scales"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_packed_is_what_runs_and_the_document_alone_stays(family, attention, kind, jam, monkeypatch):
    """One forward a token, two or three columns each inside pictures and one in text; then the cache is as without
    guidance.
    """
    model = jam(family, "width", "copy")
    model.set_attn_implementation(attention)
    monkeypatch.setattr(SeparateGuidance, "logits", None)
    fed, forward = [], type(model).forward

    @functools.wraps(forward)
    def recording(self, input_ids=None, **kwargs):
        fed.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", recording)
    settings = {"generation_mode": "interleaved", "max_new_tokens": 2 * N + 9, "do_sample": False, "eos_token_id": None}
    settings["image_positions"] = list(PLACES)
    prompt = torch.tensor([[BOS, 30, 31]])
    output = model.generate(prompt, return_dict_in_generate=True, **settings, **KINDS[kind])
    columns = 1 + len(
        GuidanceSettings(KINDS[kind].get("guidance_scale"), KINDS[kind].get("image_guidance_scale")).branches
    )
    assert fed.count((1, columns)) >= N and fed.count((1, 1)) > 0
    assert all(width <= 2 or width == columns or width in (3, 21) for _, width in fed)
    # The cache that comes back holds the document alone, as a forward of it makes.
    length = output.sequences.shape[1] - 1
    assert output.past_key_values.get_seq_length() == length
    again = forward(model, input_ids=output.sequences[:, :-1], use_cache=True).past_key_values
    for layer, expected in zip(output.past_key_values.layers, again.layers):
        torch.testing.assert_close(layer.keys, expected.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values, expected.values, atol=1e-4, rtol=1e-4)
    monkeypatch.undo()
    on = model.generate(output.sequences, past_key_values=output.past_key_values, **settings)
    assert torch.equal(on, model.generate(output.sequences, **settings))


def test_columns_of_pictures_that_are_done_are_taken_out(jam, monkeypatch):
    """Rows that take turns in pictures never leave the batch without one; the cache stays within its bound."""
    model, seen = jam("llama", "cross", "preserving"), []
    append = LaneColumns.append

    def recording(self, *args, **kwargs):
        laid = append(self, *args, **kwargs)
        seen.append((self.beside, laid["attention_mask"].shape[-1]))
        return laid

    monkeypatch.setattr(LaneColumns, "append", recording)
    rows = [[BOS, 30 + i] for i in range(3)]
    rules = {
        "generation_mode": "interleaved",
        "image_positions": [1, 2, 3, 4],
        "do_sample": False,
        "eos_token_id": None,
    }
    ids = batch([[BOS, 31, 32, 33, 34, 35, 36, 37, 38, BREAK], rows[1], rows[2]])
    monkeypatch.setattr(PackedGuidance, "columns_beside", staticmethod(lambda *args: 2 * (2 + N + 2)))
    output = model.generate(**ids, **rules, guidance_scale=3.0, max_new_tokens=100)
    assert max(beside for beside, _ in seen) <= 2 * (N + 4)
    assert len({columns for _, columns in seen}) > 3
    monkeypatch.undo()
    unpacked = model.generate(**ids, **rules, guidance_scale=3.0, max_new_tokens=100, use_cache=False)
    assert torch.equal(output, unpacked)


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_beams_move_the_branches_with_them(mode, jam, monkeypatch):
    """Beams of one document, some in text and some in pictures, against branches in forwards of their own."""
    model = jam("llama", "cross", "preserving")
    settings = {"generation_mode": mode, "guidance_scale": 2.0, "num_beams": 4, "num_return_sequences": 4}
    settings |= {"do_sample": False, "max_new_tokens": N + 12}
    if mode == "interleaved":  # a picture follows about every second word
        settings |= {"image_after_token_ids": list(range(20, 284, 2)), "eos_token_id": None}
        settings |= {"logits_processor": [lambda ids, scores: scores + 4.0 * (torch.arange(scores.shape[1]) == BREAK)]}
    ids = batch([[BOS, 30, 31], [BOS, 40, 41, 42, 43]])
    apart = model.generate(**ids, **settings, use_cache=False)
    moved, out_of_step, reorder = [], [], PackedGuidance.reorder

    def recording(self, rows):
        moved.append(rows.tolist())
        out_of_step.append(self.columns is not None and len(set(self.live[:4])) > 1)
        reorder(self, rows)

    monkeypatch.setattr(SeparateGuidance, "logits", None)
    monkeypatch.setattr(PackedGuidance, "reorder", recording)
    assert torch.equal(model.generate(**ids, **settings), apart)
    assert any(rows != list(range(8)) for rows in moved)
    assert any(out_of_step) == (mode == "interleaved")


def test_sampling_follows_the_oracle_of_its_own_draws(jam):
    """The same generator, guided by two forwards a token: the same codes, for several return sequences."""
    model = jam("llama", "cross", "preserving")
    prompt = torch.tensor([[BOS, 30, 31]])
    torch.manual_seed(3)
    output = model.generate(
        prompt,
        generation_mode="image",
        guidance_scale=2.0,
        do_sample=True,
        top_k=0,
        num_return_sequences=3,
        max_new_tokens=N + 2,
    )
    first, last = model.config.image_token_offset, model.config.image_token_offset + model.config.num_image_tokens
    torch.manual_seed(3)
    ids = prompt.repeat(3, 1)
    grammar = PictureGrammar(model.config)
    for step in range(N + 2):
        scores = model(input_ids=ids, use_cache=False).logits[:, -1]
        if 0 < step <= N:
            context = torch.tensor([[BOS, model.config.mask_token_id]] * 3)
            uncond = model(input_ids=torch.cat((context, ids[:, 3:]), 1), use_cache=False).logits[:, -1, first:last]
            scores[:, first:last] = uncond + 2.0 * (scores[:, first:last] - uncond)
        allowed = grammar.allowed(ids, scores.shape[-1], "image", 3, 3 + N + 2)
        chances = scores.masked_fill(~allowed, -math.inf).softmax(-1)
        ids = torch.cat((ids, torch.multinomial(chances, 1)), 1)
    assert torch.equal(output, ids)


def test_scores_and_logits_are_right_at_every_step(jam):
    model = jam("llama", "cross", "preserving")
    settings = {"generation_mode": "interleaved", "guidance_scale": 3.0, "max_new_tokens": N + 6, "do_sample": False}
    settings["image_positions"] = list(PLACES)
    rows = batch(mixed_rows(model))
    seen = []

    def own(input_ids, scores):
        seen.append(input_ids.clone())
        return scores

    output = model.generate(
        **rows,
        **settings,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        logits_processor=[own],
    )
    length = rows["input_ids"].shape[1]
    grammar = PictureGrammar(model.config)
    for step, (scores, logits) in enumerate(zip(output.scores, output.logits)):
        ids = output.sequences[:, : length + step]
        assert torch.equal(seen[step], ids)
        mask = torch.nn.functional.pad(rows["attention_mask"], (0, step), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        plain = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        torch.testing.assert_close(logits, plain.logits[:, -1], atol=2e-3, rtol=1e-3)
        assert [s.shape[1] for s in output.hidden_states[step]] == [length if step == 0 else 1] * len(
            output.hidden_states[step]
        )
        torch.testing.assert_close(
            output.hidden_states[step][-1][:, -1],
            model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True).hidden_states[
                -1
            ][:, -1],
            atol=2e-3,
            rtol=1e-3,
        )
        awaits = grammar.awaits_code(grammar.state(ids))
        assert torch.equal(torch.isfinite(scores).sum(1) == N, awaits | (torch.isfinite(scores).sum(1) == N))
        torch.testing.assert_close(scores[awaits].exp().sum(1), torch.ones(int(awaits.sum())), atol=1e-4, rtol=0)
    assert len(seen) == len(output.scores)


@pytest.mark.sampled
@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("fusion", [("llama", "cross", "preserving"), ("opt", "uniform", "average")])
def test_the_head_computes_codes_alone_where_only_codes_come(fusion, settings, jam, monkeypatch):
    """The same picture, and text rows of the head are not computed for it."""
    model = jam(*fusion)
    ids = batch([[BOS, 30, 31], [BOS, 40, 41, 42, 43]])
    asked = {"generation_mode": "image", "do_sample": False, "guidance_scale": 2.0, **settings}
    whole = model.generate(**ids, **asked, return_dict_in_generate=True, output_logits=True)
    alone, head = [], type(model).head_logits

    def recording(self, states, image_states, codes_alone):
        alone.append(codes_alone)
        return head(self, states, image_states, codes_alone)

    monkeypatch.setattr(type(model), "head_logits", recording)
    output = model.generate(**ids, **asked, return_dict_in_generate=True, output_scores=True)
    assert alone.count(True) == N and torch.equal(output.sequences, whole.sequences)
    assert all(scores.shape[1] == model.config.vocab_size for scores in output.scores)


@pytest.fixture(scope="module")
def small():
    """One layer, so that many documents are written in little time."""
    text = parent_model("llama", 120, 1, num_hidden_layers=1).config
    model = JamForCausalLM(JamConfig(text_config=text, vq_config=VQ_SETTINGS)).eval()
    randomise(model, 7)
    return model


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_batches_equal_the_oracle(data, small):
    """Any prompts side by side, any kind of guidance, any budget."""
    first = small.config.image_token_offset
    kind = dict(data.draw(st.sampled_from([kind for name, kind in KINDS.items() if not name.startswith("negatives")])))
    steps = data.draw(st.integers(1, 2 * N))
    rows = []
    for _ in range(data.draw(st.integers(1, 4))):
        row = [BOS]
        for part in data.draw(st.lists(st.sampled_from(["text", "picture"]), max_size=2)):
            row += (
                picture(small, len(row)) if part == "picture" else data.draw(st.lists(st.integers(20, 60), max_size=3))
            )
        half = data.draw(st.none() | st.integers(0, N))
        rows.append(row if half is None else [*row, BREAK, *[first + place % 16 for place in range(half)]])
    mode = data.draw(st.sampled_from(["interleaved", "image"] if steps >= N + 2 else ["interleaved"]))
    check(small, kind, mode, steps, rows=rows)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(KINDS)))
def test_the_formulas_code_by_code(seed, name):
    kind = {key: value for key, value in KINDS[name].items() if key != "negative"}
    guidance = GuidanceSettings(
        kind.get("guidance_scale"),
        kind.get("image_guidance_scale"),
        kind.get("contrastive_alpha"),
        kind.get("contrastive_k"),
    )
    generator = torch.Generator().manual_seed(seed)
    cond, *branches = (
        3 * torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(1 + len(guidance.branches))
    )
    expected = torch.tensor(_combine_by_hand(kind, cond.tolist(), [b.tolist() for b in branches]), dtype=torch.float64)
    torch.testing.assert_close(guidance.combine(cond, *branches), expected.log_softmax(-1), atol=1e-9, rtol=1e-9)


def test_no_scale_is_no_guidance(jam):
    assert GuidanceSettings().branches == GuidanceSettings(1.0).branches == GuidanceSettings(1).branches == ()
    model = jam("llama", "cross", "preserving")
    ids = torch.tensor([[BOS, 30]])
    plain, one = (model.generate(ids, generation_mode="image", do_sample=False, guidance_scale=s) for s in (None, 1.0))
    assert torch.equal(plain, one)


def test_sliding_windows_are_guided_apart(jam):
    """Their caches drop the oldest columns, whoever's they are."""
    text = parent_model("llama", 120, 1).config.to_dict() | {
        "model_type": "mistral",
        "sliding_window": 8,
        "head_dim": 8,
    }
    text = {key: value for key, value in text.items() if key in MistralConfig().to_dict()} | {"model_type": "mistral"}
    model = JamForCausalLM(JamConfig(text_config=text, vq_config=VQ_SETTINGS)).eval()
    randomise(model, 3)
    check(model, KINDS["classifier-free"], "image", N + 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_guidance_scale": "2"}, "image_guidance_scale must be a finite number"),
        ({"contrastive_alpha": 0.5}, "needs both contrastive_alpha and contrastive_k"),
        ({"contrastive_alpha": 2.0, "contrastive_k": 3}, "a number from 0 to 1, got 2.0"),
        ({"contrastive_alpha": 0.5, "contrastive_k": 0}, "1 or more, got 0"),
        ({"contrastive_alpha": 0.5, "contrastive_k": 3, "guidance_scale": 3.0}, "set one or the other"),
        ({"negative_prompt_ids": [[5]]}, "have nothing to act on"),
        ({"negative_prompt_ids": [[4]], "guidance_scale": 2.0}, "put the codes of the pictures in their place"),
        ({"negative_prompt_ids": [5], "guidance_scale": 2.0}, r"must be ids \[B or 1, T\]"),
        ({"negative_prompt_ids": [[5], [6], [7]], "guidance_scale": 2.0}, "3 row.s., the prompt 2"),
    ],
)
def test_bad_settings_are_answered(wrong, message, jam):
    with pytest.raises(ValueError, match=message):
        jam("llama", "uniform", "average").generate(torch.tensor([[BOS, 30]] * 2), generation_mode="image", **wrong)
