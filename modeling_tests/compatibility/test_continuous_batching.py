"""Continuous batching (`generate_batch`) against ordinary `generate()`, request by request: text, pictures, what is
refused.
"""

import copy
import logging

import pytest
import torch
from conftest import VQ_SETTINGS, random_ids
from decoding_oracles import BREAK, CASES, SHORT, unequal_streams
from transformers import ContinuousBatchingConfig, GenerationConfig, WatermarkingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import RequestState

from jam_hf import JamConfig, JamForCausalLM
from jam_hf.integrations.continuous_settings import OBEYED, REFUSED, WITHOUT_EFFECT, sized
from jam_hf.integrations.padded_batches import groups
from jam_hf.model.call_settings_jam import CALL_SETTINGS


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
    outputs = [
        model.generate(torch.tensor([ids]), generation_config=config, **settings)[0, len(ids) :] for ids in prompts
    ]
    return [output.tolist() for output in outputs]


def batched(model, prompts, config, **settings):
    settings = {"continuous_batching_config": ContinuousBatchingConfig(**SMALL), **settings}
    results = model.generate_batch(prompts, generation_config=config, **settings).values()
    assert not any(result.error for result in results)
    return [result.generated_tokens for result in results]


@pytest.mark.feature(SECTION, "text and codes without a grammar")
@pytest.mark.sampled
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


@pytest.mark.sampled
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
    """By the model's positions where nothing is said, and by `max_length`, which counts from each prompt's
    beginning.
    """
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
        ({"guidance_scale": 3.0, "generation_mode": "image"}, r"guidance_scale=3.0 \(it runs each request by itself"),
        ({"contrastive_alpha": 0.1, "contrastive_k": 3}, r"contrastive_alpha=0.1 .*contrastive_k=3"),
        ({"generation_mode": "image", "image_top_k": 5}, r"image_top_k=5 \(it has no settings by modality"),
        (
            {"generation_mode": "image", "max_new_tokens": 10},
            r"needs room for 1 picture\(s\) of 16 codes.*got room for 10",
        ),
        (
            {"generation_mode": "interleaved", "min_new_images": 3},
            r"min_new_images=3 needs room for 3 .*max_new_tokens=54.* for 40",
        ),
        ({"num_beams": 2}, "does not obey num_beams=2"),
        ({"no_repeat_ngram_size": 2}, "does not obey no_repeat_ngram_size=2"),
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


# A value for each setting that would change what is written, or what comes back.
TELLING = {
    **{"min_length": 5, "min_new_tokens": 5, "max_time": 1e-9, "stop_strings": ["a"], "num_beams": 2, "use_mtp": True},
    **{"use_cache": False, "cache_implementation": "static", "min_p": 0.5, "top_h": 0.4, "typical_p": 0.5},
    **{"epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "repetition_penalty": 1.3, "encoder_repetition_penalty": 1.3},
    **{
        "no_repeat_ngram_size": 2,
        "encoder_no_repeat_ngram_size": 2,
        "bad_words_ids": [[30]],
        "renormalize_logits": True,
    },
    **{"forced_bos_token_id": 1, "forced_eos_token_id": 2, "remove_invalid_values": True, "suppress_tokens": [30]},
    **{"exponential_decay_length_penalty": (1, 1.1), "begin_suppress_tokens": [30], "sequence_bias": [[[30], 1.0]]},
    **{"token_healing": True, "guidance_scale": 2.0, "watermarking_config": {"bias": 2.0}, "output_attentions": True},
    **{"output_hidden_states": True, "output_scores": True, "output_logits": True, "return_dict_in_generate": True},
    **{"prompt_lookup_num_tokens": 2, "assistant_early_exit": 1, "penalty_alpha": 0.5, "dola_layers": "low"},
    **{"diversity_penalty": 0.5, "num_beam_groups": 2, "constraints": [1], "force_words_ids": [[30]]},
    **{"image_guidance_scale": 2.0, "contrastive_alpha": 0.1, "contrastive_k": 3, "image_temperature": 0.5},
    **{"image_top_k": 5, "image_top_p": 0.5, "image_min_p": 0.1, "image_repetition_penalty": 1.3},
    **{"image_no_repeat_ngram_size": 2},
}


@pytest.mark.feature(SECTION, "every setting: obeyed, or refused with the reason")
def test_every_setting_is_in_one_table():
    """A field that transformers or the JAM adds fails here until somebody says what becomes of it."""
    fields = {*vars(GenerationConfig()), *CALL_SETTINGS}
    tables = [*OBEYED, *WITHOUT_EFFECT, *REFUSED]
    assert sorted(tables) == sorted(fields)
    assert set(TELLING) == set(REFUSED)


@pytest.mark.feature(SECTION, "every setting: obeyed, or refused with the reason")
@pytest.mark.parametrize("name", ["call", "model"])
def test_what_is_not_obeyed_is_refused(name, jam):
    model = jam("llama", "uniform", "average")
    saved = model.generation_config
    for setting, value in TELLING.items():
        config = GenerationConfig(max_new_tokens=40, eos_token_id=2)
        model.generation_config = copy.deepcopy(saved)
        if setting == "watermarking_config":
            value = WatermarkingConfig(**value)
        setattr(config if name == "call" else model.generation_config, setting, value)
        with pytest.raises(ValueError, match=f"does not obey .*{setting}="):
            model.generate_batch([[1, 30]], config)


@pytest.mark.feature(SECTION, "every setting: obeyed, or refused with the reason")
def test_what_a_call_leaves_out_is_the_models_own(jam, monkeypatch):
    """As in generate(): also the end of a document, and how many ids are written where nobody says it."""
    model = jam("llama", "uniform", "average")
    prompts = [[1, 30, 31], [1, 40]]
    monkeypatch.setattr(model.generation_config, "generation_mode", None, raising=False)
    assert batched(model, prompts, GenerationConfig()) == one_by_one(model, prompts, GenerationConfig())
    end = one_by_one(model, prompts, GenerationConfig())[0][5]
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    found = batched(model, prompts, GenerationConfig(do_sample=False))
    assert found == one_by_one(model, prompts, GenerationConfig(do_sample=False)) and len(found[0]) <= 6
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 3)
    assert [len(row) for row in batched(model, prompts, None)] == [3, 3]
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "top_k", 1)
    assert batched(model, prompts, GenerationConfig(temperature=9.0)) == batched(
        model, prompts, GenerationConfig(do_sample=False)
    )


@pytest.mark.feature(SECTION, "every setting: obeyed, or refused with the reason")
def test_a_kept_manager_is_for_its_own_settings(jam):
    model = jam("llama", "uniform", "average")
    config = GenerationConfig(max_new_tokens=4, do_sample=False, generation_mode="text")
    first = batched(model, [[1, 30]], config, persistent_manager=True)
    assert batched(model, [[1, 30]], config, persistent_manager=True) == first
    with pytest.raises(ValueError, match="other settings: generation_mode"):
        batched(model, [[1, 30]], GenerationConfig(max_new_tokens=4, do_sample=False, generation_mode="interleaved"))
    model.destroy_cached_continuous_batching_manager()


@pytest.mark.feature(SECTION, "pools as large as the requests need, within the free memory")
@pytest.mark.parametrize("mode_and_init", [("uniform", "average"), ("cross", "preserving")])
def test_pools_are_as_large_as_the_requests_need(mode_and_init, jam, monkeypatch):
    model = jam("llama", *mode_and_init)
    made = []
    original = PagedAttentionCache.__init__
    monkeypatch.setattr(
        PagedAttentionCache, "__init__", lambda self, *a, **k: original(self, *a, **k) or made.append(self)
    )
    prompts = [[1, 30], [1, *range(30, 60)]]
    config = GenerationConfig(max_new_tokens=40, do_sample=False, generation_mode="text")
    model.generate_batch(prompts, config, ContinuousBatchingConfig(page_size=32))
    tokens = made[0].max_tokens_read
    assert sum(map(len, prompts)) + 80 <= tokens <= sum(map(len, prompts)) + 80 + 6 * 32
    mebibytes = made[0].cache_tensor.numel() / 2**20
    assert mebibytes < 2  # a share of all memory otherwise


@pytest.mark.feature(SECTION, "on a CPU by generate(), in padded batches, where nothing asks for pages")
@pytest.mark.parametrize(
    "settings",
    [
        {"generation_mode": "interleaved", "image_positions": [1, 3], "max_new_tokens": 45},
        {"generation_mode": "image"},
        {"generation_mode": "text", "max_length": 20},
        {"generation_mode": "text", "max_new_tokens": 9, "eos_token_id": -1},
        {"generation_mode": "text", "max_new_tokens": 6, "num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
    ids=["at places", "image", "max_length", "no end", "two sequences"],
)
def test_padded_batches_are_what_pages_give(settings, jam, monkeypatch):
    model = jam("llama", "cross", "preserving")
    config = GenerationConfig(**{"do_sample": False, "eos_token_id": 2, "pad_token_id": 0, **settings})
    prompts = prompts_of(model)
    prompts = prompts[:3] if settings["generation_mode"] == "text" else prompts
    plenty = ContinuousBatchingConfig(max_batch_tokens=64, page_size=16)
    paged = model.generate_batch(prompts, config, plenty)
    monkeypatch.setattr(type(model), "init_continuous_batching", None)  # the padded way has no manager
    padded = model.generate_batch(prompts, config)
    assert {key: value.generated_tokens for key, value in padded.items()} == {
        key: value.generated_tokens for key, value in paged.items()
    }
    assert [list(padded), [value.prompt_ids for value in padded.values()]] == [
        list(paged),
        [value.prompt_ids for value in paged.values()],
    ]
    assert all(value.is_finished() and value.error is None for value in padded.values())


@pytest.mark.feature(SECTION, "on a CPU by generate(), in padded batches, where nothing asks for pages")
def test_padded_batches_fit_the_memory():
    requests = [(5, 10), (40, 10), (6, 10), (7, 4), (5, 10), (90, 10)]
    assert groups(requests, 60) == [[3], [0, 4, 2], [1], [5]]
    assert groups(requests, 10**6) == [[3], [0, 4, 2, 1, 5]]


@pytest.mark.feature(SECTION, "pools as large as the requests need, within the free memory")
def test_pools_stay_within_the_free_memory(jam, monkeypatch):
    from jam_hf.integrations import continuous_settings

    model = jam("llama", "uniform", "average")
    sizes = (None, model.config, model.dtype, model.device)
    plenty = sized(*sizes, [100] * 1000).num_blocks
    assert plenty >= 4000
    monkeypatch.setattr(continuous_settings, "_free_memory", lambda device: 2**26)
    narrow = sized(*sizes, [100] * 1000)
    assert 5 <= narrow.num_blocks < plenty / 4
    with pytest.raises(ValueError, match="longest request has 90000 ids"):
        sized(*sizes, [90000])
    asked = ContinuousBatchingConfig(num_blocks=7, max_batch_tokens=9, page_size=16)
    assert vars(sized(asked, *sizes[1:], [100])) == vars(asked)


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
    text = {
        "model_type": "mistral",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
    }
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 4}
    for mode in ("uniform", "cross"):
        windowed = JamForCausalLM(JamConfig(fusion_mode=mode, text_config=text, vq_config=VQ_SETTINGS)).eval()
        with pytest.raises(ValueError, match="sliding window"):
            batched(windowed, [[1, 30]], config)
