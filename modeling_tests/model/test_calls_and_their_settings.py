"""Which settings hold in a call of `generate()`: those that are saved, those that are passed, those that make no
sense.
"""

import contextlib
import copy
import threading

import processes
import pytest
import torch
from model.test_picture_layout import LAYOUTS, layout_jam, layout_processor, layout_tokenizer  # noqa: F401
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StopStringCriteria
from transformers.utils import logging as transformers_logging

from jam_hf.generation.block_cache import JamBlockCache
from jam_hf.model.call_settings_jam import (
    CALL_SETTINGS,
    GUIDANCE_SETTINGS,
    LAYOUT_SETTINGS,
    MODALITY_SETTINGS,
    JamCallSettings,
)
from jam_hf.model.grammar_jam import PictureGrammar
from jam_hf.model.logits_process_jam import TextStopStringCriteria


N, BOS, EOS, BREAK = 16, 1, 2, 3
PROMPT = {"input_ids": torch.tensor([[BOS, 30]]), "attention_mask": torch.ones(1, 2, dtype=torch.int64)}


@pytest.fixture
def model(jam):
    model = jam("llama", "cross", "preserving")
    before = copy.deepcopy(model.generation_config)
    yield model
    model.generation_config = before


def codes(model, count: int) -> list[int]:
    return [model.config.image_token_offset + i % model.config.num_image_tokens for i in range(count)]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])}


# ----- saved and passed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{"image_positions": [1]}, {"min_new_images": 1}, {"image_after_token_ids": [40]}])
def test_a_saved_layout_is_for_interleaved_calls(layout, model):
    expected = {}
    for mode in ("text", "image", None):
        expected[mode] = model.generate(**PROMPT, generation_mode=mode, do_sample=False, max_new_tokens=N + 2)
    for name, value in layout.items():
        setattr(model.generation_config, name, value)
    for mode, output in expected.items():
        assert torch.equal(
            model.generate(**PROMPT, generation_mode=mode, do_sample=False, max_new_tokens=N + 2), output
        )
    config = GenerationConfig(generation_mode="image", do_sample=False, max_new_tokens=N + 2)
    assert torch.equal(model.generate(**PROMPT, generation_config=config), expected["image"])
    merged = copy.deepcopy(model.generation_config)  # as pipelines pass it
    assert torch.equal(
        model.generate(**PROMPT, generation_config=merged, generation_mode="image", do_sample=False), expected["image"]
    )
    with pytest.raises(ValueError, match="go with 'interleaved'"):
        model.generate(**PROMPT, generation_mode="text", max_new_tokens=60, **layout)
    with pytest.raises(ValueError, match="go with 'interleaved'"):
        model.generate(**PROMPT, generation_config=GenerationConfig(generation_mode="text", image_positions=[2]))


def test_a_guidance_that_is_passed_takes_the_place_of_a_saved_one(model):
    picture = {**PROMPT, "generation_mode": "image", "do_sample": False}
    scaled = model.generate(**picture, guidance_scale=3.0)
    contrasted = model.generate(**picture, contrastive_alpha=0.3, contrastive_k=2)
    model.generation_config.guidance_scale = 3.0
    assert torch.equal(model.generate(**picture), scaled)
    assert torch.equal(model.generate(**picture, contrastive_alpha=0.3, contrastive_k=2), contrasted)
    model.generation_config.guidance_scale = None
    model.generation_config.contrastive_alpha, model.generation_config.contrastive_k = 0.3, 2
    assert torch.equal(model.generate(**picture), contrasted)
    assert torch.equal(model.generate(**picture, guidance_scale=3.0), scaled)
    assert not torch.equal(scaled, contrasted)
    with pytest.raises(ValueError, match="set one or the other"):
        model.generate(**picture, guidance_scale=3.0, contrastive_alpha=0.3, contrastive_k=2)


@pytest.mark.parametrize(
    "saved",
    [
        {"image_positions": [1]},
        {"guidance_scale": 2.0, "image_guidance_scale": 2.0},
        {"contrastive_alpha": 0.5, "contrastive_k": 2},
    ],
)
def test_what_is_saved_for_whole_documents_does_not_reach_infills(saved, layout_jam, layout_tokenizer, monkeypatch):  # noqa: F811
    model, processor = layout_jam("plain", "cross"), layout_processor(layout_tokenizer, "plain")
    infill = processor.infill("a small<mask> circle<image>", [None], model=model)
    expected = model.generate(**infill, do_sample=False)
    for name, value in saved.items():
        monkeypatch.setattr(model.generation_config, name, value, raising=False)
    assert torch.equal(model.generate(**infill, do_sample=False), expected)
    with pytest.raises(ValueError, match="Infills are not guided"):
        model.generate(**infill, image_guidance_scale=3.0)


# ----- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["interleaved", "text", "image", None])
@pytest.mark.parametrize("budget", [{"max_new_tokens": 0}, {"max_length": 0}])
def test_no_room_at_all_is_told(budget, mode, model):
    with pytest.raises(ValueError, match="max_new_tokens|max_length"):
        model.generate(**PROMPT, generation_mode=mode, **budget)


@pytest.mark.parametrize(
    "settings", [{"generation_mode": "image"}, {"generation_mode": "interleaved", "min_new_images": 1}]
)
@pytest.mark.parametrize("beams", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_each_row_has_room_or_not_by_itself(settings, beams, model):
    """A long row with most of its picture drawn, and a short one: each fits alone, so they fit together."""
    positions = model.config.max_position_embeddings
    long = [BOS, *[40] * (positions - 13 - 12), BREAK, *codes(model, 10)]  # 13 positions left, 7 needed
    rows = [long, [BOS, 30, 31]]
    output = model.generate(**padded(rows), **settings, **{"do_sample": False, **beams}, max_new_tokens=N + 2)
    first = model.config.image_token_offset
    for row in output[:, len(long) :].tolist():
        assert sum(token >= first for token in row) >= 6 and BREAK in row
    with pytest.raises(ValueError, match=r"max_new_tokens=7; got room for 6"):
        model.generate(**padded([long]), **settings, max_new_tokens=6)
    with pytest.raises(ValueError, match=r"max_new_tokens=18; got room for 17"):
        model.generate(**padded([long, [BOS, 30]]), **settings, max_new_tokens=17)


def test_candidates_have_room_row_by_row(model):
    positions = model.config.max_position_embeddings
    long = [BOS, *[40] * (positions - 13 - 12), BREAK, *codes(model, 10)]
    output = model.generate(
        **padded([long, [BOS, 30, 31]]), generation_mode="image", max_new_tokens=N + 2, do_sample=True, num_candidates=2
    )
    assert (output[1] >= model.config.image_token_offset).sum() == N


# ----- where pictures stand -------------------------------------------------------------------------------------------


def test_a_picture_that_the_prompt_has_begun_uses_up_no_place(model):
    rows = [[BOS, 30, 31, 32, 33], [BOS, 30, BREAK, *codes(model, 2)]]
    settings = {"generation_mode": "interleaved", "image_positions": [0, 2], "do_sample": False, "eos_token_id": None}
    written = model.generate(**padded(rows), **settings, max_new_tokens=3 * (N + 2) + 4)[:, 5:].tolist()
    picture = N + 2
    first, second = ([place for place, token in enumerate(row) if token == BREAK] for row in written)
    assert first == [0, picture - 1, picture + 2, 2 * picture + 1]
    closes = N - 2  # of 16 codes two are drawn
    assert second == [closes, closes + 1, closes + picture, closes + picture + 3, closes + 2 * picture + 2]


def test_a_picture_after_an_id_and_one_at_a_place_are_two(model):
    class Words(LogitsProcessor):
        """Writes 60, 61, 62, ... in turn, where words are allowed."""

        def __call__(self, input_ids, scores):
            words = int((input_ids[0] >= 30).logical_and(input_ids[0] < 100).sum())
            scores[:, 59 + words] += 1e4
            return scores

    settings = {"image_after_token_ids": [61], "image_positions": [4], "eos_token_id": None, "do_sample": False}
    output = model.generate(
        **PROMPT, generation_mode="interleaved", **settings, max_new_tokens=2 * N + 10, logits_processor=[Words()]
    )[0, 2:]
    assert [place for place, token in enumerate(output.tolist()) if token == BREAK] == [2, N + 3, N + 6, 2 * N + 7]


@pytest.mark.parametrize("ids", [[100000], [-1], [BREAK], [EOS], "code"])
def test_pictures_follow_words(ids, model):
    ids = codes(model, 1) if ids == "code" else ids
    with pytest.raises(ValueError, match="image_after_token_ids hold .* expected ids of text"):
        model.generate(**PROMPT, generation_mode="interleaved", image_after_token_ids=ids, max_new_tokens=40)


# ----- negative prompts -----------------------------------------------------------------------------------------------


def test_a_negative_prompt_may_end_in_a_picture(model):
    """Its closing `<break>` is not the opening one; an opening one may follow or not."""
    negative = [BOS, 44, BREAK, *codes(model, N), BREAK]
    settings = {**PROMPT, "generation_mode": "image", "guidance_scale": 3.0, "do_sample": False}
    written = model.generate(**settings, negative_prompt_ids=torch.tensor([negative]))
    assert torch.equal(model.generate(**settings, negative_prompt_ids=[[*negative, BREAK]]), written)
    grammar, ids = PictureGrammar(model.config), PROMPT["input_ids"][0].tolist()
    for _ in range(N + 2):
        scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].detach()
        if 3 <= len(ids) < 3 + N:
            branch = torch.tensor([[*negative, *ids[2:]]])
            other = model(input_ids=branch, use_cache=False).logits[0, -1].detach()
            scores = other + 3.0 * (scores - other)
        allowed = grammar.allowed(torch.tensor([ids]), len(scores), "image", 2, 2 + N + 2)[0]
        ids.append(int(scores.masked_fill(~allowed, -torch.inf).argmax()))
    assert written[0].tolist() == ids


@pytest.mark.parametrize(
    ("negative", "words"),
    [
        ([[BOS, 44, BREAK, "code"]], "a picture that has 1 tokens and is not closed"),
        ([[BOS, 100000]], "hold 1..100000; expected ids in 0.."),
        ([[BOS, -1]], "hold -1..1; expected ids in 0.."),
        ([[44] * 120], "have 120 ids; with a picture of 16 tokens they are 137, more than the 128 positions"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_negative_prompts_that_are_none(family, negative, words, jam):
    model = jam(family, "cross", "preserving")
    ids = [[codes(model, 1)[0] if token == "code" else token for token in row] for row in negative]
    with pytest.raises(ValueError, match=words):
        model.generate(**PROMPT, generation_mode="image", guidance_scale=2.0, negative_prompt_ids=ids)


def test_a_mask_without_a_negative_prompt_is_told(model):
    with pytest.raises(ValueError, match="came without negative_prompt_ids"):
        model.generate(
            **PROMPT, generation_mode="image", guidance_scale=2.0, negative_prompt_attention_mask=torch.ones(1, 2)
        )


def test_lists_of_negative_prompts_go_with_their_rows_to_candidates(model):
    rows = padded([[BOS, 30], [BOS, 31]])
    settings = {"generation_mode": "image", "guidance_scale": 3.0, "do_sample": True, "num_candidates": 2}
    outputs = []
    for negative in ([[BOS, 44], [BOS, 45]], torch.tensor([[BOS, 44], [BOS, 45]])):
        torch.manual_seed(0)
        outputs.append(model.generate(**rows, **settings, negative_prompt_ids=negative))
    assert torch.equal(*outputs)


# ----- without a grammar ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_without_a_grammar_a_picture_may_be_left_anywhere(name, layout_jam):  # noqa: F811
    """Guided scores of every code against two full forwards, though words stand in the midst of pictures."""
    model = layout_jam(name)
    grammar, config = PictureGrammar(model.config), model.config
    template = grammar.layout.template

    class Astray(LogitsProcessor):
        """Opens pictures and leaves them."""

        def __call__(self, input_ids, scores):
            length = input_ids.shape[1]
            forced = {0: BREAK, 7: 30, 8: BREAK, 12: 31, 13: 32}.get((length - 2) % 14)
            if length - 2 in range(1, 4) and len(template) > 3 and template[length - 3] >= 0:
                forced = template[length - 3]
            if forced is not None:
                scores = torch.full_like(scores, -torch.inf)
                scores[:, forced] = 0.0
            return scores

    settings = {"generation_mode": None, "guidance_scale": 3.0, "max_new_tokens": 40, "eos_token_id": None}
    settings |= {
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "logits_processor": [Astray()],
    }
    output = model.generate(**PROMPT, **settings)
    ids, compared = output.sequences[0].tolist(), 0
    for step, scores in enumerate(output.scores):
        seen = ids[: 2 + step]
        state = grammar.state(torch.tensor([seen]))
        if not bool(grammar.awaits_code(state)) or scores.isfinite().sum() == 1:  # forced
            continue
        opening = len(seen) - 1 - int(state.position)
        branch = [config.bos_token_id, config.mask_token_id, *seen[opening:]]
        cond, uncond = (
            model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1, grammar.codes] for row in (seen, branch)
        )
        expected = (uncond + 3.0 * (cond - uncond)).log_softmax(-1)
        torch.testing.assert_close(scores[0, grammar.codes].log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
        compared += 1
    assert compared >= 3


# ----- stop strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [":", "1", "img"])
def test_stop_strings_end_no_document_inside_a_picture(stop, model, tokenizer):
    settings = {"generation_mode": "interleaved", "image_positions": [0], "do_sample": False, "max_new_tokens": N + 2}
    output = model.generate(**PROMPT, **settings, stop_strings=[stop], tokenizer=tokenizer)
    codes_written = output[0] >= model.config.image_token_offset
    assert codes_written.sum() == N


def test_stop_strings_end_text(model, tokenizer):
    grammar, stock = PictureGrammar(model.config), StopStringCriteria(tokenizer=tokenizer, stop_strings=["red"])
    ids = torch.tensor([tokenizer(" a red", add_special_tokens=False)["input_ids"]])
    assert stock(ids, None).tolist() == TextStopStringCriteria(stock, grammar)(ids, None).tolist() == [True]


# ----- one call beside another ----------------------------------------------------------------------------------------


def test_each_setting_is_one_field_and_is_known_to_generate(model):
    """A field that is dropped, or added to no group, fails here."""
    groups = [*LAYOUT_SETTINGS, *GUIDANCE_SETTINGS, *MODALITY_SETTINGS, "generation_mode"]
    assert sorted(groups) == sorted(CALL_SETTINGS) and len(CALL_SETTINGS) == 15
    documented = JamCallSettings.__doc__.split("Args:")[1]
    for name in CALL_SETTINGS:
        assert name in documented and name in type(model).generate.__doc__, name
    model.generate(**PROMPT, **dict.fromkeys(CALL_SETTINGS), max_new_tokens=1)
    with pytest.raises(ValueError, match="image_temperatur"):
        model.generate(**PROMPT, image_temperatur=0.5, max_new_tokens=1)


def test_settings_in_the_models_own_config_are_saved_and_loaded(model, tmp_path):
    own = model.generation_config
    own.generation_mode, own.guidance_scale, own.image_top_k = "image", 3.0, 5
    own.save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert (loaded.generation_mode, loaded.guidance_scale, loaded.image_top_k) == ("image", 3.0, 5)
    asked = {**PROMPT, "do_sample": False}
    expected = model.generate(**asked, generation_config=loaded)
    assert torch.equal(model.generate(**asked), expected)
    assert vars(own) == vars(model.generation_config) and vars(loaded) == vars(
        GenerationConfig.from_pretrained(tmp_path)
    )


CALLS = [
    {"generation_mode": "image", "guidance_scale": 3.0},
    {"generation_mode": "image", "contrastive_alpha": 0.3, "contrastive_k": 2, "max_new_tokens": N + 2},
    {"generation_mode": "interleaved", "image_positions": [1], "guidance_scale": 2.0, "max_new_tokens": 2 * N},
    {"generation_mode": "text", "max_new_tokens": 2 * N, "min_new_tokens": 2 * N},
    {"generation_mode": "image", "guidance_scale": 3.0, "negative_prompt_ids": torch.tensor([[BOS, 44]])},
    {"generation_mode": "image", "guidance_scale": 2.0, "num_beams": 2},
]


@pytest.mark.parametrize("mode, length", [("image", 2 + N + 2), ("interleaved", 24), ("text", 24)])
def test_a_config_alone_stays_alone(mode, length, model, monkeypatch):
    """A budget that the call does not have goes into a copy of the config: transformers deprecates a config together
    with arguments, which no user of a config alone has written.
    """
    said = []
    monkeypatch.setattr(transformers_logging.logging.Logger, "warning_once", lambda _, text, *__: said.append(text))
    monkeypatch.setattr(model.config, "max_position_embeddings", 24)
    config = GenerationConfig(do_sample=False, suppress_tokens=[EOS], generation_mode=mode)
    before = config.to_dict()
    assert model.generate(**PROMPT, generation_config=config).shape == (1, length)
    assert not said and config.to_dict() == before
    model.generate(**PROMPT, generation_config=config, max_new_tokens=2 * N)
    assert any("generation_config" in text for text in said)  # this one has said both


def test_calls_in_threads_do_not_meet(model):
    """Each call's step waits for a step of every other, so that all are inside their pictures at once."""
    expected = [model.generate(**PROMPT, do_sample=False, **settings) for settings in CALLS]
    attention = [config._attn_implementation for config in model.config.decoder_configs]
    together, found, during = threading.Barrier(len(CALLS)), [None] * len(CALLS), []

    class Turn(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            with contextlib.suppress(threading.BrokenBarrierError):  # those that write more go on alone
                together.wait(timeout=processes.PATIENCE)
            during.append([config._attn_implementation for config in model.config.decoder_configs])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def write(place):
        try:
            found[place] = model.generate(**PROMPT, do_sample=False, stopping_criteria=[Turn()], **CALLS[place])
        finally:
            together.abort()

    threads = [threading.Thread(target=write, args=(place,)) for place in range(len(CALLS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for settings, output, alone in zip(CALLS, found, expected):
        assert output is not None and torch.equal(output, alone), settings
    assert len(during) >= len(CALLS) * (N - 1) and all(names == attention for names in during)


def test_a_call_leaves_nothing_behind(model):
    """Neither on its cache nor on the config that came with it; what goes on from that cache is what a whole call
    writes.
    """
    config = GenerationConfig(generation_mode="interleaved", image_positions=[1], guidance_scale=3.0, do_sample=False)
    config.max_new_tokens = N + 6
    before, cache = copy.deepcopy(vars(config)), JamBlockCache(config=model.config)
    fields = set(vars(cache))
    first = model.generate(**PROMPT, generation_config=config, past_key_values=cache, return_dict_in_generate=True)
    assert vars(config) == before and model.current_call is None
    assert set(vars(cache)) - fields <= {"_is_user_defined"}  # transformers' own
    ids = first.sequences[:, : cache.get_seq_length() + 1]
    plain = {"generation_mode": None, "guidance_scale": None, "do_sample": False, "max_new_tokens": 4}
    mask = torch.ones_like(ids)
    on = model.generate(ids, attention_mask=mask, past_key_values=cache, **plain)
    assert torch.equal(on, model.generate(ids, attention_mask=mask, **plain))


def test_a_call_inside_a_call_is_one_of_its_own(model):
    """A criterion that generates, in the midst of a guided picture."""
    asked = {**PROMPT, "generation_mode": "image", "guidance_scale": 3.0, "do_sample": False}
    inner = {**PROMPT, "generation_mode": "image", "guidance_scale": 5.0, "do_sample": False}
    expected, expected_inside, inside = model.generate(**asked), model.generate(**inner), []

    class Writes(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] in (4, 9):
                inside.append(model.generate(**inner))
                with pytest.raises(ValueError, match="contrastive_k"):
                    model.generate(**inner, contrastive_k=1.5)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    assert torch.equal(model.generate(**asked, stopping_criteria=[Writes()]), expected)
    assert len(inside) == 2 and all(torch.equal(output, expected_inside) for output in inside)
