"""The cache that grows in blocks against DynamicCache: random operations, forwards, every kind of decoding."""

import copy
import random

import pytest
import torch
from conftest import FUSIONS, random_ids
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from jam_hf import JamConfig, JamForCausalLM
from jam_hf.generation.block_cache import JamBlockCache, JamBlockLayer


GREEDY = {"do_sample": False, "eos_token_id": None, "generation_mode": None}


def states(generator, rows, length):
    """Keys with head size 5 and values with 3: two heads."""
    return tuple(torch.randn(rows, 2, length, size, generator=generator) for size in (5, 3))


def operate(rng, generator, layer, peer):
    """One random operation on both."""
    rows, length = (peer.keys.shape[0], peer.get_seq_length()) if peer.is_initialized else (rng.randint(1, 3), 0)
    kind = rng.choice(("update", "update", "update", "crop", "reorder", "repeat", "select", "reset", "copy"))
    if kind == "update" or not length:
        new = states(generator, rows, rng.choice((1, 1, 1, 2, 7)))
        found, expected = layer.update(*new), peer.update(*new)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    elif kind == "crop":
        removed = rng.randint(0, length - 1)
        layer.crop(-removed), peer.crop(-removed)
    elif kind == "reorder":
        order = torch.tensor([rng.randrange(rows) for _ in range(rows)])
        layer.reorder_cache(order), peer.reorder_cache(order)
    elif kind == "repeat" and rows < 4:
        layer.batch_repeat_interleave(2), peer.batch_repeat_interleave(2)
    elif kind == "select":
        chosen = torch.tensor([rng.randrange(rows) for _ in range(rng.randint(1, rows))])
        layer.batch_select_indices(chosen), peer.batch_select_indices(chosen)
    elif kind == "reset":
        layer.reset(), peer.reset()
    return layer, peer


@pytest.mark.parametrize("block_size", [1, 4, 256])
def test_random_operations_equal_a_dynamic_layer(block_size):
    for seed in range(60):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        layer, peer, others = JamBlockLayer(block_size), DynamicLayer(), []
        for _ in range(30):
            operate(rng, generator, layer, peer)
            assert layer.get_seq_length() == peer.get_seq_length()
            assert layer.get_mask_sizes(2) == peer.get_mask_sizes(2)
            if peer.get_seq_length():
                assert torch.equal(layer.keys, peer.keys) and torch.equal(layer.values, peer.values)
            if rng.random() < 0.1:  # copies go their own way
                others.append((copy.deepcopy(layer), copy.deepcopy(peer)))
                (layer, peer), others[-1] = others[-1], (layer, peer)
        for one, two in others:
            if two.get_seq_length():
                assert torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values)


def test_a_block_is_filled_without_a_copy():
    generator = torch.Generator().manual_seed(0)
    layer, places = JamBlockLayer(block_size=8), []
    layer.update(*states(generator, 2, 3))
    for _ in range(14):
        layer.update(*states(generator, 2, 1))
        places.append((layer.key_buffer.data_ptr(), layer.value_buffer.data_ptr(), layer.key_buffer.shape[2]))
    assert [place[2] for place in places] == [8] * 5 + [16] * 8 + [24]
    assert len(set(places)) == 3
    layer.crop(-2)
    layer.update(*states(generator, 2, 1))
    assert (layer.key_buffer.data_ptr(), layer.value_buffer.data_ptr(), 24) == places[-1]


def test_tensors_of_others_are_not_written_to():
    generator = torch.Generator().manual_seed(0)
    first, second = JamBlockLayer(8), JamBlockLayer(8)
    first.update(*states(generator, 1, 4))
    second.update(*states(generator, 1, 4))
    second.keys, second.values = first.keys[:, :, :2], first.values[:, :, :2]
    kept = first.keys.clone()
    second.crop(-1)
    second.update(*states(generator, 1, 2))
    assert torch.equal(first.keys, kept)


@pytest.mark.parametrize(("mode", "init"), FUSIONS)
@torch.no_grad()
def test_forwards_equal_those_with_a_dynamic_cache(mode, init, jam):
    model = jam("llama", mode, init)
    ids = random_ids(model, 2, 14)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    logits = []
    for cache in (DynamicCache(config=model.config), JamBlockCache(config=model.config, block_size=4)):
        logits.append([])
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 14)):
            output = model(
                input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
            )
            logits[-1].append(output.logits)
        assert len(cache.layers) == len(model.config.per_layer_config)
    torch.testing.assert_close(torch.cat(logits[1], dim=1), torch.cat(logits[0], dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mode", "init"), [("uniform", "average"), ("cross", "preserving")])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 4},
        {"generation_mode": "interleaved", "guidance_scale": 2.0, "max_new_tokens": 30},
    ],
    ids=["beams", "samples", "assisted", "chunks", "guided"],
)
@pytest.mark.sampled
def test_generate_equals_that_with_a_dynamic_cache(mode, init, settings, jam):
    model = jam("llama", mode, init)
    ids = random_ids(model, 1, 9).clamp(max=200)
    outputs = []
    for cache in (DynamicCache(config=model.config), JamBlockCache(config=model.config, block_size=4)):
        torch.manual_seed(0)
        outputs.append(model.generate(ids, past_key_values=cache, **{**GREEDY, "max_new_tokens": 12, **settings}))
    assert torch.equal(*outputs)


@torch.no_grad()
def test_a_cache_goes_on_after_inference_mode(jam):
    model = jam("llama", "uniform", "average")
    ids, cache = random_ids(model, 1, 9), JamBlockCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
    found = model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, model(input_ids=ids).logits[:, 5:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sliding_windows_stay_short():
    text = {
        "model_type": "mistral",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
    }
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 4}
    vq = {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "latent_channels": 4, "sample_size": 16}
    vq |= {"num_vq_embeddings": 16, "norm_num_groups": 4, "mid_block_add_attention": False}
    torch.manual_seed(0)
    model = JamForCausalLM(JamConfig(fusion_mode="cross", text_config=text, vq_config=vq)).eval()
    cache = JamBlockCache(config=model.config, block_size=4)
    kinds = [type(layer) for layer in cache.layers]
    assert set(kinds) == {DynamicSlidingWindowLayer, JamBlockLayer}
    assert kinds == [
        JamBlockLayer if type(layer) is DynamicLayer else type(layer)
        for layer in DynamicCache(config=model.config).layers
    ]
    ids = torch.randint(17, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused(jam):
    model = jam("llama", "uniform", "average")
    cache = JamBlockCache(config=model.config)
    with torch.no_grad():
        model(input_ids=random_ids(model, 2, 5), past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match=r"holds torch.float32 \(2, 2, 5, 8\); torch.float32 \(1, 2, 1, 8\)"):
            model(input_ids=random_ids(model, 1, 1), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="no_grad"):
        model(input_ids=random_ids(model, 2, 5), past_key_values=JamBlockCache(config=model.config), use_cache=True)
    with pytest.raises(ValueError, match="at least 1 position, got 0"):
        JamBlockCache(config=model.config, block_size=0)
