"""Processors that look back: text over the history of text, codes only where an `image_` setting asks, in every
loop.
"""

import pytest
import torch
from conftest import random_ids
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

import jam_hf
from jam_hf.model.grammar_jam import PictureGrammar


N = 16
BREAK, EOS = 3, 2
WATERMARK = WatermarkingConfig(bias=30.0)
TEXT = [30, 41, 30, 42, 41, 30]
# Each is strong enough to change what is written: setting -> stock(processor of a row's text in the prompt).
SETTINGS = {
    "no_repeat_ngram_size=1": ({"no_repeat_ngram_size": 1}, lambda prompt: NoRepeatNGramLogitsProcessor(1)),
    "no_repeat_ngram_size=2": ({"no_repeat_ngram_size": 2}, lambda prompt: NoRepeatNGramLogitsProcessor(2)),
    "no_repeat_ngram_size=3": ({"no_repeat_ngram_size": 3}, lambda prompt: NoRepeatNGramLogitsProcessor(3)),
    "repetition_penalty": ({"repetition_penalty": 3.0}, lambda prompt: RepetitionPenaltyLogitsProcessor(3.0)),
    "encoder_repetition_penalty": (
        {"encoder_repetition_penalty": 3.0},
        lambda prompt: EncoderRepetitionPenaltyLogitsProcessor(3.0, prompt),
    ),
    "encoder_no_repeat_ngram_size": (
        {"encoder_no_repeat_ngram_size": 1},
        lambda prompt: EncoderNoRepeatNGramLogitsProcessor(1, prompt),
    ),
    "bad_words_ids": (
        {"bad_words_ids": [[a, b] for a in range(20, 60) for b in range(20, 90, 2)]},
        lambda prompt: NoBadWordsLogitsProcessor([[a, b] for a in range(20, 60) for b in range(20, 90, 2)]),
    ),
    "sequence_bias": (
        {"sequence_bias": [[[a, b], 9.0] for a in range(20, 90) for b in (21, 23)]},
        lambda prompt: SequenceBiasLogitsProcessor([[[a, b], 9.0] for a in range(20, 90) for b in (21, 23)]),
    ),
    "watermarking_config": (
        {"watermarking_config": WATERMARK},
        lambda prompt: WATERMARK.construct_processor(WATERMARK.vocab_size, "cpu"),
    ),
}


@pytest.fixture
def model(jam):
    model = jam("llama", "cross", "preserving")
    WATERMARK.vocab_size = model.config.vocab_size
    return model


def _picture(model, seed):
    codes = torch.randint(0, N, (N,), generator=torch.Generator().manual_seed(seed)) + model.config.image_token_offset
    return [BREAK, *codes.tolist(), BREAK]


def _prompts(model):
    """A row with a picture among its text beside one of text alone, padded on the left."""
    rows = [[1, *TEXT[:3], *_picture(model, 0), *TEXT[3:]], [1, *TEXT]]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return rows, {"input_ids": ids, "attention_mask": mask}


def _text_of(model, ids):
    first = model.config.image_token_offset
    return [i for i in ids if not first <= i < first + model.config.num_image_tokens and i != BREAK]


LOOPS = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "guided": {"guidance_scale": 3.0},
    "candidates": {"do_sample": True, "num_candidates": 2, "reranker": lambda candidates: torch.tensor([0.0, 1.0])},
    "drafts": {"prompt_lookup_num_tokens": 3},
}


HARD = ("no_repeat_ngram_size=2", "repetition_penalty", "watermarking_config")


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "loop"),
    [*((name, "greedy") for name in SETTINGS), *((name, loop) for name in HARD for loop in LOOPS if loop != "greedy")],
)
def test_pictures_are_those_without_the_setting(name, loop, model):
    _, prompts = _prompts(model)
    if loop == "drafts":
        prompts = {key: value[:1] for key, value in prompts.items()}
    settings = {"do_sample": False, "generation_mode": "image", **LOOPS[loop]}
    written = []
    for with_setting in ({}, SETTINGS[name][0]):
        torch.manual_seed(0)
        written.append(model.generate(**prompts, **settings, **with_setting))
    assert torch.equal(*written)


@pytest.mark.parametrize("name", SETTINGS)
def test_text_obeys_over_the_history_of_text(name, model):
    rows, prompts = _prompts(model)
    setting, stock = SETTINGS[name]
    length, new = prompts["input_ids"].shape[1], 30
    settings = {"generation_mode": "interleaved", "image_positions": [3], "do_sample": False, "max_new_tokens": new}
    output = model.generate(**prompts, **settings, **setting, output_scores=True, return_dict_in_generate=True)
    grammar, changed = PictureGrammar(model.config), 0
    for row, prompt in enumerate(rows):
        processor = stock(torch.tensor([_text_of(model, prompt)]))
        ids = list(prompt)
        for step, token in enumerate(output.sequences[row, length:].tolist()):
            scores = output.scores[step][row : row + 1]
            if not bool(grammar.state(torch.tensor([ids])).in_picture):
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
                expected = processor(torch.tensor([_text_of(model, ids)]), logits)
                open_places = scores[0] > torch.finfo(scores.dtype).min
                open_places[[BREAK]] = False
                torch.testing.assert_close(scores[0, open_places], expected[0, open_places], atol=1e-4, rtol=1e-4)
                changed += bool((expected != logits).any())
            ids.append(token)
            if token == EOS:
                break
    assert changed


def test_a_users_stock_processor_is_the_setting(model):
    _, prompts = _prompts(model)
    settings = {"generation_mode": "interleaved", "image_positions": [2], "do_sample": False, "max_new_tokens": 28}
    given = model.generate(
        **prompts, **settings, logits_processor=LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])
    )
    assert torch.equal(given, model.generate(**prompts, **settings, no_repeat_ngram_size=2))


def test_a_users_own_processor_sees_the_document(model):
    seen = []

    def look(input_ids, scores):
        seen.append(input_ids.shape[1])
        return scores

    _, prompts = _prompts(model)
    model.generate(**prompts, generation_mode="image", do_sample=False, logits_processor=LogitsProcessorList([look]))
    assert seen == list(range(prompts["input_ids"].shape[1], prompts["input_ids"].shape[1] + N + 2))


@pytest.mark.parametrize("guided", [{}, {"guidance_scale": 2.0}], ids=["plain", "guided"])
@pytest.mark.parametrize(
    ("setting", "stock"),
    [
        ({"image_no_repeat_ngram_size": 2}, NoRepeatNGramLogitsProcessor(2)),
        ({"image_repetition_penalty": 3.0}, RepetitionPenaltyLogitsProcessor(3.0)),
    ],
    ids=["image_no_repeat_ngram_size", "image_repetition_penalty"],
)
def test_image_settings_go_by_the_codes_of_the_document(setting, stock, guided, model):
    rows, prompts = _prompts(model)
    first, length = model.config.image_token_offset, prompts["input_ids"].shape[1]
    settings = {"generation_mode": "image", "do_sample": False, **guided}
    output = model.generate(**prompts, **settings, **setting, output_scores=True, return_dict_in_generate=True)
    plain = model.generate(**prompts, **settings)
    assert not torch.equal(plain, output.sequences)
    for row, prompt in enumerate(rows):
        ids = list(prompt)
        for step, token in enumerate(output.sequences[row, length:].tolist()):
            if 1 <= step <= N:
                branch = [1, model.config.mask_token_id, *ids[len(prompt) :]]
                seen = (ids,) if not guided else (ids, branch)
                logits = [
                    model(input_ids=torch.tensor([i]), use_cache=False).logits[0, -1, first : first + N] for i in seen
                ]
                scores = (logits[0],) if not guided else ((logits[1] + 2.0 * (logits[0] - logits[1])).log_softmax(-1),)
                codes = torch.tensor([[i - first for i in ids if first <= i < first + N]])
                expected = stock(codes, scores[0][None])[0]
                torch.testing.assert_close(output.scores[step][row, first : first + N], expected, atol=1e-4, rtol=1e-4)
            ids.append(token)


def test_infills_of_pictures_may_repeat(model, processor):
    codes = torch.tensor(_picture(model, 1)[1:-1])
    infill = processor.infill("a small<image>", images=[codes], image_masks=[[(0, 12)]], model=model)
    expected = model.generate(**infill, do_sample=False)
    for setting in ({"no_repeat_ngram_size": 1}, {"repetition_penalty": 9.0}):
        assert torch.equal(model.generate(**infill, do_sample=False, **setting), expected)


def test_streamed_pictures_are_those_without_the_setting(model, processor):
    inputs = processor(text="a small red circle", return_tensors="pt")
    settings = {"generation_mode": "image", "do_sample": False}
    plain, obeyed = (
        [
            event["image_tokens"]
            for event in jam_hf.stream(model, processor, **inputs, **settings, **more, skip_prompt=True)
        ]
        for more in ({}, {"no_repeat_ngram_size": 2, "repetition_penalty": 3.0})
    )
    assert plain == obeyed and len(plain) == 1


@pytest.mark.parametrize("mode", [None, "interleaved"])
def test_a_length_penalty_ends_no_guided_picture(mode, model):
    """It adds to the score of the end, which inside a picture is minus infinity: infinity minus that is no number."""
    ids = torch.tensor([[1, *TEXT, BREAK]])
    settings = {"generation_mode": mode, "guidance_scale": 2.0, "do_sample": False, "max_new_tokens": N + 1}
    output = model.generate(input_ids=ids, **settings, exponential_decay_length_penalty=(0, 2.0))
    assert torch.equal(
        output[0, : len(TEXT) + 2 + N], model.generate(input_ids=ids, **settings)[0, : len(TEXT) + 2 + N]
    )


def test_a_watermark_that_counts_steps_is_refused_beside_pictures(model):
    watermark = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3])
    ids = torch.tensor([[1, *TEXT]])
    with pytest.raises(ValueError, match="generation_mode='text'"):
        model.generate(ids, watermarking_config=watermark, do_sample=True, generation_mode="interleaved")
    model.generate(ids, watermarking_config=watermark, do_sample=True, generation_mode="text", max_new_tokens=3)


@pytest.mark.parametrize("name", ["image_repetition_penalty", "image_no_repeat_ngram_size"])
def test_values_out_of_range_are_named(name, model):
    with pytest.raises(ValueError, match=name):
        model.generate(random_ids(model, 1, 4), generation_mode="image", **{name: -2})


@pytest.mark.parametrize(("stop", "ends"), [(">", False), ("a b", False), ("b", True)])
def test_stop_strings_stand_in_one_run_of_text(stop, ends, model, tokenizer):
    from transformers import StopStringCriteria

    from jam_hf.model.logits_process_jam import TextStopStringCriteria

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = torch.tensor([[*ids_of("a"), *_picture(model, 0), *ids_of(" b")]])
    stock = StopStringCriteria(tokenizer=tokenizer, stop_strings=[stop])
    criteria = TextStopStringCriteria(stock, PictureGrammar(model.config))
    assert criteria(ids, None).tolist() == [ends]
    assert criteria(ids[:, : 2 + N + 1], None).tolist() == [False]
