"""Continuous batching (`generate_batch`) against ordinary `generate()`, request by request: text, pictures, what is refused."""

import logging

import pytest
import torch
from conftest import VQ_SETTINGS, random_ids
from decoding_oracles import BREAK, CASES, SHORT, unequal_streams
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestState

from jam_hf import JamConfig, JamForCausalLM


SECTION = "Continuous batching"
SMALL = {"num_blocks": 96, "max_batch_tokens": 64, "page_size": 16}
ONE_PICTURE = {"generation_mode": "interleaved", "min_new_images": 1, "max_new_images": 1}
by_case = pytest.mark.parametrize(("family", "mode", "init"), CASES)


@pytest.fixture(autouse=True)
def loud_errors(caplog):
    """An error in the loop is logged, not raised."""
    logging.getLogger("ContinuousBatchingLogger").propagate = True
    with caplog.at_level(logging.ERROR):
        yield
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def prompts_of(model):
    """Of unlike lengths: text, a picture half-drawn, a picture that is done, one just opened."""
    first = model.config.image_token_offset
    codes = [first + i % model.config.num_image_tokens for i in range(model.config.image_seq_length)]
    text = [random_ids(model, 1, length, seed=length)[0].clamp(max=200).tolist() for length in (3, 9, 5)]
    return [*text, [1, 40, BREAK, *codes[:5]], [1, 41, BREAK, *codes, BREAK, 42], [1, 43, 44, BREAK]]


def one_by_one(model, prompts, config, **settings):
    outputs = [model.generate(torch.tensor([ids]), generation_config=config, **settings)[0, len(ids) :] for ids in prompts]
    return [output.tolist() for output in outputs]


def batched(model, prompts, config, **settings):
    settings = {"continuous_batching_config": ContinuousBatchingConfig(**SMALL), **settings}
    results = model.generate_batch(prompts, generation_config=config, **settings).values()
    assert not any(result.error for result in results)
    return [result.generated_tokens for result in results]


@pytest.mark.feature(SECTION, "text and codes without a grammar")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@by_case
def test_plain_decoding(family, mode, init, attention, jam):
    model = jam(family, mode, init)
    model.set_attn_implementation(attention)
    model.generation_config.generation_mode = None
    prompts = prompts_of(model)
    config = GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=2, pad_token_id=0)
    assert batched(model, prompts, config) == one_by_one(model, prompts, config)
    assert model.config._attn_implementation == attention


@pytest.mark.feature(SECTION, "interleaved documents")
@pytest.mark.parametrize(
    "settings",
    [
        {"generation_mode": "interleaved"},
        ONE_PICTURE,
        {"generation_mode": "interleaved", "image_positions": [1, 3]},
        {"generation_mode": "text"},
        {"generation_mode": "image"},
    ],
    ids=["interleaved", "one picture", "at places", "text", "image"],
)
@pytest.mark.parametrize(("family", "mode", "init"), SHORT)
def test_documents_with_pictures(family, mode, init, settings, jam):
    model = jam(family, mode, init)
    prompts = prompts_of(model)
    config = GenerationConfig(max_new_tokens=45, do_sample=False, eos_token_id=2, pad_token_id=0, **settings)
    found, expected = batched(model, prompts, config), one_by_one(model, prompts, config)
    assert found == expected
    if "min_new_images" in settings or "image_positions" in settings or settings["generation_mode"] == "image":
        assert all(BREAK in row for row in found)


@pytest.mark.feature(SECTION, "interleaved documents")
def test_a_full_batch_takes_turns(jam, monkeypatch):
    """More requests than fit at once: prompts are read in parts, and requests are set back when the pages run out."""
    model = jam("llama", "uniform", "average")
    set_back, original = [], RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState,
        "create_equivalent_initial_request",
        lambda self: set_back.append(len(self.generated_tokens)) or original(self),
    )
    prompts = prompts_of(model)
    layout = {"generation_mode": "interleaved", "image_positions": [2, 10]}  # told by what was written before, too
    config = GenerationConfig(max_new_tokens=60, do_sample=False, eos_token_id=2, pad_token_id=0, **layout)
    narrow = ContinuousBatchingConfig(max_batch_tokens=8, num_blocks=7, page_size=16)
    assert batched(model, prompts, config, continuous_batching_config=narrow) == one_by_one(model, prompts, config)
    assert any(set_back)


@pytest.mark.feature(SECTION, "interleaved documents, sampled")
def test_sampled_documents_obey_the_grammar(jam):
    model = jam("llama", "uniform", "average")
    codes, first = model.config.image_seq_length, model.config.image_token_offset
    config = GenerationConfig(
        max_new_tokens=60,
        do_sample=True,
        top_k=20,
        temperature=1.5,
        eos_token_id=2,
        generation_mode="interleaved",
        min_new_images=2,
    )
    torch.manual_seed(0)
    for row in batched(model, [[1, 30 + i] for i in range(8)], config):
        pictures = 0
        while BREAK in row:
            start = row.index(BREAK)
            assert all(token < first for token in row[:start])
            picture, end = row[start + 1 : start + 1 + codes], row[start + 1 + codes]
            assert min(picture) >= first and end == BREAK
            row, pictures = row[start + 2 + codes :], pictures + 1
        assert pictures >= 2 and all(token < first for token in row)


@pytest.mark.feature(SECTION, "interleaved documents")
def test_a_saved_layout_is_for_interleaved_requests(jam, monkeypatch):
    model = jam("llama", "uniform", "average")
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=2, generation_mode="text")
    expected = batched(model, [[1, 30]], config)
    monkeypatch.setattr(model.generation_config, "image_positions", [1], raising=False)
    assert batched(model, [[1, 30]], config) == expected


@pytest.mark.feature(SECTION, "interleaved documents")
@pytest.mark.parametrize("bound", [{}, {"max_length": 40}, {"max_length": 40, "max_new_tokens": 25}])
def test_documents_end_where_those_of_generate_do(bound, jam):
    """By the model's positions where nothing is said, and by `max_length`, which counts from each prompt's beginning."""
    model = jam("llama", "uniform", "average")
    settings = {"generation_mode": "interleaved", "do_sample": False, "pad_token_id": 0, **bound}
    prompts = [[1, 30], [1, 31, 32, 33, 34, 35, 36], [1, 37, BREAK, model.config.image_token_offset]]
    plenty = ContinuousBatchingConfig(max_batch_tokens=64, num_blocks=64, page_size=16)
    config = GenerationConfig(**settings, eos_token_id=-1)
    found = batched(model, prompts, config, continuous_batching_config=plenty)
    assert found == one_by_one(model, prompts, GenerationConfig(**settings, eos_token_id=None), eos_token_id=None)
    limit = bound.get("max_length", model.config.max_position_embeddings)
    assert [len(row) for row in found] == [bound.get("max_new_tokens", limit - len(ids)) for ids in prompts]


@pytest.mark.feature(SECTION, "guidance, windows, streams with unlike heads: refused with the reason")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 3.0, "generation_mode": "image"}, r"does not guide pictures \(guidance_scale\)"),
        ({"contrastive_alpha": 0.1, "contrastive_k": 3}, r"does not guide pictures \(contrastive_alpha\)"),
        ({"generation_mode": "image", "image_top_k": 5}, r"no settings by modality \(image_top_k\)"),
        ({"generation_mode": "image", "max_new_tokens": 10}, r"needs room for 1 picture\(s\) of 16 codes.*got room for 10"),
        (
            {"generation_mode": "interleaved", "min_new_images": 3},
            r"min_new_images=3 needs room for 3 .*max_new_tokens=54.* for 40",
        ),
        ({"num_beams": 2}, r"no beams \(num_beams\)"),
        ({"no_repeat_ngram_size": 2}, "no no_repeat_ngram_size"),
        ({"max_new_tokens": None, "max_length": 2}, "A prompt of 2 ids leaves no room to write"),
        ({"max_new_tokens": None, "max_length": 10, "generation_mode": "image"}, "needs room for 1 .* got room for 8"),
        ({"generation_mode": "interleaved", "image_after_token_ids": [BREAK]}, "expected ids of text"),
        ({"generation_mode": "pictures"}, "generation_mode must be one of"),
        ({"generation_mode": "text", "min_new_images": 1}, "min_new_images.* go with 'interleaved'"),
    ],
)
def test_settings_that_are_refused(settings, message, jam):
    model = jam("llama", "uniform", "average")
    with pytest.raises(ValueError, match=message):
        batched(model, [[1, 30]], GenerationConfig(**{"max_new_tokens": 40, "eos_token_id": 2, **settings}))


@pytest.mark.feature(SECTION, "guidance, windows, streams with unlike heads: refused with the reason")
def test_what_else_is_refused(jam):
    model = jam("llama", "uniform", "average")
    config = GenerationConfig(max_new_tokens=40, eos_token_id=2, generation_mode="image")
    with pytest.raises(ValueError, match="does not take generation_mode, guidance_scale"):
        model.generate_batch([[1, 30]], generation_mode="image", guidance_scale=2.0)
    half_drawn = [1, 30, BREAK, *[model.config.image_token_offset] * 10]  # six codes and a break are enough
    assert len(batched(model, [half_drawn], config, max_new_tokens=7)[0]) == 7
    with pytest.raises(ValueError, match="max_new_tokens=7; got room for 6"):
        batched(model, [half_drawn], config, max_new_tokens=6)
    with pytest.raises(ValueError, match="placeholders <image>"):
        batched(model, [[1, model.config.image_token_id]], config)
    with pytest.raises(ValueError, match="use_async_batching=False"):
        asynchronous = ContinuousBatchingConfig(**SMALL, use_async_batching=True)
        batched(model, [[1, 30]], config, continuous_batching_config=asynchronous)
    with pytest.raises(ValueError, match=r"different key/value heads \(number, size\): \[\(2, 8\), \(8, 8\)\]"):
        batched(unequal_streams(), [[1, 30]], config)
    text = {"model_type": "mistral", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 4}
    for mode in ("uniform", "cross"):
        windowed = JamForCausalLM(JamConfig(fusion_mode=mode, text_config=text, vq_config=VQ_SETTINGS)).eval()
        with pytest.raises(ValueError, match="sliding window"):
            batched(windowed, [[1, 30]], config)
