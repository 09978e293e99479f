"""Caches under `generate()`: static, offloaded, quantised, returned and taken up again, filled in chunks; against
no cache.
"""

import copy

import pytest
import torch
from conftest import random_ids
from decoding_oracles import BREAK, BY_MODE, CASES, SHORT, beam_search, greedy, picture_scores, unequal_streams
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, Fp8QuantizedLayer, StaticLayer


SECTION = "Caches"
GREEDY = {"do_sample": False, "eos_token_id": None, "generation_mode": None}
by_case = pytest.mark.parametrize(("family", "mode", "init"), CASES)
by_some = pytest.mark.parametrize(("family", "mode", "init"), SHORT)
by_mode = pytest.mark.parametrize(("family", "mode", "init"), BY_MODE)


def _padded(model) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    rows = [random_ids(model, 1, length, seed=length)[0].tolist() for length in (3, 6)]
    ids = torch.tensor([[0] * (6 - len(row)) + row for row in rows])
    return rows, ids, torch.tensor([[0] * (6 - len(row)) + [1] * len(row) for row in rows])


@pytest.mark.feature(SECTION, "static cache, left padding")
@by_case
def test_static_cache(family, mode, init, jam):
    model = jam(family, mode, init)
    rows, ids, mask = _padded(model)
    output = model.generate(
        input_ids=ids, attention_mask=mask, cache_implementation="static", max_new_tokens=6, **GREEDY
    )
    assert output[:, 6:].tolist() == [greedy(model, row, 6) for row in rows]


@pytest.mark.feature(SECTION, "static cache, beam search")
@by_mode
def test_static_cache_under_beams(family, mode, init, jam):
    model = jam(family, mode, init)
    ids = random_ids(model, 1, 6)
    output = model.generate(input_ids=ids, cache_implementation="static", num_beams=3, max_new_tokens=5, **GREEDY)
    assert output[0, 6:].tolist() == beam_search(model, ids[0].tolist(), 3, 5)[0][1]


@pytest.mark.feature(SECTION, "a static cache of one's own, reset and used again")
@by_mode
def test_a_static_cache_reset_and_used_again(family, mode, init, jam):
    model = jam(family, mode, init)
    cache = StaticCache(config=model.config, max_cache_len=16)
    for seed in (0, 1):
        ids = random_ids(model, 1, 6, seed)
        output = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=5, **GREEDY)
        assert output[0, 6:].tolist() == greedy(model, ids[0].tolist(), 5)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [10] * len(model.config.per_layer_config)
        cache.reset()


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "continuation from a returned cache")
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@by_some
def test_continuation_from_a_returned_cache(family, mode, init, implementation, jam):
    """Twice: with nothing added, as a document goes on, and with ids added, as a chat does."""
    model = jam(family, mode, init)
    ids = random_ids(model, 1, 6)
    cache = (
        DynamicCache(config=model.config)
        if implementation == "dynamic"
        else StaticCache(model.config, max_cache_len=32)
    )
    settings = {"past_key_values": cache, "max_new_tokens": 4, "return_dict_in_generate": True, **GREEDY}
    first = model.generate(input_ids=ids, **settings)
    second = model.generate(input_ids=first.sequences, **(settings | {"past_key_values": first.past_key_values}))
    assert second.sequences[0, 6:].tolist() == greedy(model, ids[0].tolist(), 8)
    asked = torch.cat((second.sequences, random_ids(model, 1, 3, seed=9)), dim=1)
    third = model.generate(input_ids=asked, **(settings | {"past_key_values": second.past_key_values}))
    assert third.sequences[0, 17:].tolist() == greedy(model, asked[0].tolist(), 4)


@pytest.mark.feature(SECTION, "continuation from a returned cache")
@by_mode
def test_continuation_of_a_padded_batch(family, mode, init, jam):
    model = jam(family, mode, init)
    rows, ids, mask = _padded(model)
    first = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
    mask = torch.cat((mask, torch.ones(2, 3, dtype=mask.dtype)), dim=1)
    second = model.generate(
        input_ids=first.sequences,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=3,
        **GREEDY,
    )
    assert second[:, 6:].tolist() == [greedy(model, row, 6) for row in rows]


@pytest.mark.feature(SECTION, "continuation inside a picture, guidance")
@by_mode
def test_continuation_inside_a_picture(family, mode, init, jam):
    model = jam(family, mode, init)
    row = [1, 30, BREAK]
    settings = {"generation_mode": "interleaved", "guidance_scale": 2.0, "do_sample": False}
    first = model.generate(input_ids=torch.tensor([row]), max_new_tokens=7, return_dict_in_generate=True, **settings)
    second = model.generate(
        input_ids=first.sequences, past_key_values=first.past_key_values, max_new_tokens=10, **settings
    )
    assert second[0, 3:].tolist() == greedy(model, row, 17, process=picture_scores(model, 3, "interleaved", 2.0, 20))


@pytest.mark.feature(SECTION, "one prefilled prompt, several continuations")
@by_mode
def test_one_prompt_filled_once_and_continued_twice(family, mode, init, jam):
    model = jam(family, mode, init)
    prompt = random_ids(model, 1, 6)
    with torch.no_grad():
        filled = model(
            input_ids=prompt, past_key_values=DynamicCache(config=model.config), use_cache=True
        ).past_key_values
    for seed in (3, 4):
        ids = torch.cat((prompt, random_ids(model, 1, 2, seed)), dim=1)
        output = model.generate(input_ids=ids, past_key_values=copy.deepcopy(filled), max_new_tokens=4, **GREEDY)
        assert output[0, 8:].tolist() == greedy(model, ids[0].tolist(), 4)


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "chunked prefill")
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@by_some
def test_chunked_prefill(family, mode, init, implementation, jam):
    model = jam(family, mode, init)
    rows, ids, mask = _padded(model)
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        prefill_chunk_size=4,
        cache_implementation=implementation,
        max_new_tokens=5,
        **GREEDY,
    )
    hook.remove()
    assert lengths[:3] == [4, 2, 1]
    assert output[:, 6:].tolist() == [greedy(model, row, 5) for row in rows]


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "chunked prefill, streams of unequal heads and widths", modes=("cross",))
@pytest.mark.parametrize("text_family", ["llama", "opt"])
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_chunked_prefill_with_unequal_streams(implementation, text_family):
    model = unequal_streams(text_family)
    ids = random_ids(model, 1, 7)
    settings = {"prefill_chunk_size": 3, "cache_implementation": implementation, "max_new_tokens": 5}
    output = model.generate(input_ids=ids, **settings, **GREEDY)
    assert output[0, 7:].tolist() == greedy(model, ids[0].tolist(), 5)


class _NoStream:
    """Stands for a stream of an accelerator: the CPU does one thing after the other anyway."""

    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def pretend_to_offload(monkeypatch):
    """Offloaded layers are marked instead of moved; one that is used before it was fetched raises. Returns the
    fetches.
    """
    fetched = []

    def fetch(layer):
        fetched.append(layer)
        layer.away = False

    monkeypatch.setattr(torch, "Stream", _NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: _NoStream())
    monkeypatch.setattr(CacheLayerMixin, "away", False, raising=False)
    monkeypatch.setattr(CacheLayerMixin, "offload", lambda layer: setattr(layer, "away", True))
    monkeypatch.setattr(CacheLayerMixin, "prefetch", fetch)
    for layer_class in (DynamicLayer, StaticLayer):

        def update(layer, *args, real=layer_class.update, **kwargs):
            assert not layer.away, "this layer of the cache is on the CPU and was not fetched"
            return real(layer, *args, **kwargs)

        monkeypatch.setattr(layer_class, "update", update)
    return fetched


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "offloaded cache, dynamic and static (each layer fetched before its turn)")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@by_some
def test_offloaded_layers_are_fetched_before_their_turn(family, mode, init, implementation, jam, pretend_to_offload):
    model = jam(family, mode, init)
    ids = random_ids(model, 1, 6)
    output = model.generate(input_ids=ids, cache_implementation=implementation, max_new_tokens=4, **GREEDY)
    assert output[0, 6:].tolist() == greedy(model, ids[0].tolist(), 4)
    assert len(pretend_to_offload) == 4 * len(model.config.per_layer_config)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the offloaded caches of transformers need streams of an accelerator"
)
@pytest.mark.feature(SECTION, "offloaded cache, dynamic and static, on an accelerator")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@by_mode
def test_offloaded_on_an_accelerator(family, mode, init, implementation, jam):
    model = jam(family, mode, init)
    ids = random_ids(model, 1, 6)
    expected = greedy(model, ids[0].tolist(), 6)
    settings = {"cache_implementation": implementation, "max_new_tokens": 6, "disable_compile": True}
    output = model.to("cuda").generate(input_ids=ids.to("cuda"), **settings, **GREEDY)
    assert output[0, 6:].tolist() == expected


def _quantised_error(model, cache_config: dict) -> tuple[float, torch.nn.Module]:
    """Root mean square of the error of the logits, relative to the logits', over 6 steps of decoding; and the cache."""
    ids = random_ids(model, 2, 6) % 60 + 20
    output = model.generate(
        input_ids=ids,
        cache_implementation="quantized",
        cache_config=cache_config,
        max_new_tokens=6,
        output_logits=True,
        return_dict_in_generate=True,
        **(
            GREEDY
            if hasattr(model.generation_config, "generation_mode")
            else {"do_sample": False, "eos_token_id": None}
        ),
    )
    with torch.no_grad():
        full = model(input_ids=output.sequences[:, :-1], use_cache=False).logits[:, 5:]
    torch.testing.assert_close(output.logits[0], full[:, 0], rtol=1e-4, atol=1e-4)  # the prompt is read unquantised
    steps = torch.stack(output.logits[1:], dim=1)
    return float((steps - full[:, 1:]).norm() / full[:, 1:].norm()), output.past_key_values


@pytest.mark.feature(SECTION, "quantised cache, fp8")
@by_case
def test_fp8_cache(family, mode, init, jam, parents):
    model = jam(family, mode, init)
    error, cache = _quantised_error(model, {"backend": "fp8"})
    assert len(cache.layers) == len(model.config.per_layer_config)
    for layer in cache.layers:
        assert isinstance(layer, Fp8QuantizedLayer) and layer._quantized_keys[0].dtype == torch.float8_e4m3fn
        assert layer.get_seq_length() == 11
    parent, _ = _quantised_error(AutoModelForCausalLM.from_pretrained(parents(family)[0]).eval(), {"backend": "fp8"})
    assert 0 < error < max(4 * parent, 0.1)


@pytest.mark.feature(SECTION, "quantised cache, quanto and HQQ")
@pytest.mark.parametrize(("package", "backend", "axis"), [("optimum.quanto", "quanto", 0), ("hqq", "hqq", 1)])
@by_mode
def test_caches_quantised_in_groups(family, mode, init, package, backend, axis, jam, parents):
    pytest.importorskip(
        package, reason=f"the {backend} backend of transformers' quantised cache needs the package {package}"
    )
    settings = {
        "backend": backend,
        "nbits": 4,
        "axis_key": axis,
        "axis_value": axis,
        "q_group_size": 8,
        "residual_length": 2,
    }
    error, _ = _quantised_error(jam(family, mode, init), settings)
    parent, _ = _quantised_error(AutoModelForCausalLM.from_pretrained(parents("llama")[0]).eval(), settings)
    assert 0 < error < max(4 * parent, 0.1)
