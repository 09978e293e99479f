"""One cache for everything: cached, uncached, left-padded and batched agree; attention back ends agree."""

import pytest
import torch
from conftest import FAMILIES, FUSIONS, random_ids
from transformers import DynamicCache, StaticCache

from jam_hf import JamForCausalLM


CASES = [(family, mode, init) for family in ("llama", "opt-paper") for mode, init in FUSIONS]
CASES += [(family, "cross", "preserving") for family in FAMILIES if family not in ("llama", "opt-paper")]


@pytest.mark.parametrize(("family", "mode", "init"), CASES)
@torch.no_grad()
@pytest.mark.sampled
def test_cached_steps_equal_the_full_forward(family, mode, init, jam):
    model = jam(family, mode, init)
    ids = random_ids(model, 2, 14)
    full = model(input_ids=ids).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
        steps = []
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 14)):
            positions = torch.arange(start, end)[None].expand(2, -1)
            output = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, position_ids=positions)
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-4)
        assert len(cache.layers) == len(model.config.per_layer_config)


@pytest.mark.parametrize(("family", "mode", "init"), CASES)
@torch.no_grad()
def test_left_padding_changes_nothing(family, mode, init, jam):
    model = jam(family, mode, init)
    ids = random_ids(model, 1, 9)
    alone = model(input_ids=ids).logits
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.int64), ids), dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(output[:, 4:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "mode", "init"), CASES)
@pytest.mark.sampled
def test_generation_agrees_batched_padded_cached_and_not(family, mode, init, jam):
    model = jam(family, mode, init)
    rows = [random_ids(model, 1, length, seed=length)[0] for length in (4, 7, 9)]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    alone = [model.generate(input_ids=row[None], use_cache=False, **settings)[0, len(row) :] for row in rows]
    length = max(map(len, rows))
    ids = torch.stack([torch.cat((torch.zeros(length - len(r), dtype=torch.int64), r)) for r in rows])
    mask = torch.stack([torch.tensor([0] * (length - len(r)) + [1] * len(r)) for r in rows])
    for cache in (None, "static"):
        output = model.generate(input_ids=ids, attention_mask=mask, cache_implementation=cache, **settings)
        for row, expected in zip(output, alone):
            assert row[length:].tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_attention_back_ends_agree(family, fused):
    ids, results = None, []
    for implementation in ("eager", "sdpa", {"text_config": "eager", "image_config": "sdpa"}):
        model = JamForCausalLM.from_pretrained(
            fused(family, "cross", "paper"), attn_implementation=implementation
        ).eval()
        ids = random_ids(model, 2, 10)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        results.append(model(input_ids=ids, attention_mask=mask).logits[1])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(jam):
    model = jam("llama", "cross", "preserving")
    first, second = random_ids(model, 1, 6), random_ids(model, 1, 5, seed=4)
    positions = torch.cat((torch.arange(6), torch.arange(5)))[None]
    packed = model(input_ids=torch.cat((first, second), dim=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, 6:], model(input_ids=second).logits, rtol=1e-4, atol=1e-4)


def test_outputs_of_both_streams(fused):
    model = JamForCausalLM.from_pretrained(fused("llama", "cross", "preserving"), attn_implementation="eager").eval()
    ids = random_ids(model, 2, 8)
    output = model.model(input_ids=ids, output_hidden_states=True, output_attentions=True)
    layers, crosses = model.config.num_hidden_layers, len(model.config.cross_attention_layers)
    assert len(output.hidden_states) == layers + 1
    assert len(output.image_hidden_states) == layers
    assert [len(output[k]) for k in ("attentions", "image_attentions")] == [layers, layers]
    assert [len(output[k]) for k in ("cross_attentions", "image_cross_attentions")] == [crosses, crosses]
    for weights in output.cross_attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize(("mode", "init"), [("uniform", "average"), ("cross", "preserving"), ("cross", "paper")])
def test_inputs_embeds_and_resizing(mode, init, jam):
    model = jam("llama", mode, init)
    ids = random_ids(model, 2, 8)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)
        before = model(input_ids=ids).logits
        size = model.config.vocab_size
        model.resize_token_embeddings(size + 3)
        assert model.config.vocab_size == size + 3
        torch.testing.assert_close(model(input_ids=ids).logits[..., :size], before)


@pytest.mark.parametrize(("mode", "init"), [("width", "copy"), ("cross", "preserving"), ("cross", "paper")])
def test_gradients_reach_everything_but_the_vq_model_with_and_without_checkpointing(mode, init, jam):
    model = jam("llama", mode, init).train()
    ids = random_ids(model, 2, 10)
    losses, gradients = [], []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    wanted = {n for n, _ in model.named_parameters() if "vq_model" not in n}
    assert set(gradients[0]) == set(gradients[1]) == wanted
    for name in wanted:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-5)


def test_the_vq_model_stays_frozen_after_loading(jam):
    model = jam("llama", "cross", "preserving")
    assert not any(p.requires_grad for p in model.model.vq_model.parameters())
    assert all(p.requires_grad for n, p in model.named_parameters() if "vq_model" not in n)
