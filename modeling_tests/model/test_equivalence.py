"""Function preservation: against the parents' own logits, bit for bit in float32."""

import pytest
import torch
from conftest import FAMILIES, random_ids
from transformers import AutoModelForCausalLM


def _logits(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def _inputs(model):
    ids = random_ids(model, 3, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0  # left padding
    mask[1, 15:] = 0  # right padding
    return ids, mask


def _parents_and_jam(family, parents, jam):
    text, image = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in parents(family))
    return text, image, jam(family, "cross", "preserving", alive=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_preserving_reproduces_both_parents_bit_for_bit(family, parents, jam):
    text, image, model = _parents_and_jam(family, parents, jam)
    ids, mask = _inputs(model)
    ours, first = _logits(model, ids, mask), model.config.image_token_offset
    seen = mask.bool()
    assert torch.equal(ours[..., :first][seen], _logits(text, ids, mask)[..., :first][seen])
    assert torch.equal(ours[..., first:][seen], _logits(image, ids, mask)[..., first:][seen])
    assert not torch.equal(_logits(text, ids, mask), _logits(image, ids, mask))


@pytest.mark.parametrize("family", ["llama", "opt-paper"])
@pytest.mark.parametrize(
    "planted",
    ["layers.1.text_layer", "layers.2.image_layer", "text_cross.mlp.down_proj", "image_cross.cross_attn.o_proj"],
)
def test_a_planted_error_is_seen(family, planted, parents, jam):
    text, image, model = _parents_and_jam(family, parents, jam)
    ids, mask = _inputs(model)
    parameter = next(p for name, p in model.named_parameters() if planted in name and p.dim() > 1)
    with torch.no_grad():
        parameter.view(-1)[5] += 0.1
    ours, first = _logits(model, ids, mask), model.config.image_token_offset
    same_text = torch.equal(ours[..., :first], _logits(text, ids, mask)[..., :first])
    same_image = torch.equal(ours[..., first:], _logits(image, ids, mask)[..., first:])
    assert not (same_text and same_image)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_uniform_of_a_model_and_itself_is_that_model(family, parents, vq, tmp_path):
    import jam_hf

    folder, _ = parents(family)
    jam_hf.fuse(folder, folder, "uniform", tmp_path / "jam", vq_model=vq)
    model, parent = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (tmp_path / "jam", folder))
    ids, mask = _inputs(model)
    assert torch.equal(_logits(model, ids, mask), _logits(parent, ids, mask))


@pytest.mark.parametrize("family", ["llama", "opt-paper"])
def test_streams_hear_each_other_once_the_cross_blocks_are_alive(family, jam):
    model = jam(family, "cross", "preserving")
    ids, mask = _inputs(model)
    before = _logits(model, ids, mask)
    with torch.no_grad():
        model.model.language_model.layers[0].image_layer.self_attn.v_proj.weight.add_(0.5)
    after, first = _logits(model, ids, mask), model.config.image_token_offset
    assert not torch.equal(before[..., :first], after[..., :first])


@pytest.mark.parametrize("family", ["llama", "opt-paper"])
def test_cross_attention_is_causal(family, jam):
    model = jam(family, "cross", "preserving")
    ids = random_ids(model, 1, 12)
    changed = ids.clone()
    changed[0, 8:] = random_ids(model, 1, 4, seed=9)
    mask = torch.ones_like(ids)
    torch.testing.assert_close(_logits(model, ids, mask)[:, :8], _logits(model, changed, mask)[:, :8])
