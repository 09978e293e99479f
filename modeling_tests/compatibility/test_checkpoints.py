"""Checkpoints: shards and their index, base and causal-LM weights out of each other's folders, round trips without
loss.
"""

import json

import pytest
import torch
from conftest import random_ids
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

from jam_hf import JamForCausalLM, JamModel


SECTION = "Loading and saving"
CASES = [
    ("uniform", "average", "llama-tied"),
    ("width", "copy", "opt"),
    ("cross", "preserving", "llama"),
    ("cross", "paper", "opt"),
]
EVERY = pytest.mark.parametrize(("mode", "init", "family"), CASES)


def assert_equal_states(left: torch.nn.Module, right: torch.nn.Module, prefix: str = "") -> None:
    """Every tensor of `left` is the one of `right` under the same name (behind the prefix), bit for bit and in
    dtype.
    """
    expected = right.state_dict()
    assert len(left.state_dict()) > 20
    for name, tensor in left.state_dict().items():
        assert tensor.dtype == expected[prefix + name].dtype, name
        assert torch.equal(tensor, expected[prefix + name]), name


@pytest.mark.feature(SECTION, "small shards with an index, tied weights once")
@EVERY
def test_small_shards(mode, init, family, jam, tmp_path):
    model = jam(family, mode, init)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(files) > 3
    assert set(index["weight_map"].values()) == files
    stored: dict[str, str] = {}
    for file in files:
        with safe_open(tmp_path / file, framework="pt") as tensors:
            for name in tensors.keys():
                assert name not in stored  # no tensor twice
                stored[name] = file
    assert stored == index["weight_map"]
    tied = set(model.all_tied_weights_keys)
    assert tied == ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    assert set(stored) == set(model.state_dict()) - tied
    parameters = sum(p.numel() for p in model.parameters())
    assert index["metadata"]["total_parameters"] == parameters
    loaded = JamForCausalLM.from_pretrained(tmp_path)
    assert_equal_states(loaded, model)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == bool(tied)


@pytest.mark.feature(SECTION, "`AutoModel` loads a causal-LM checkpoint, and the other way round")
@EVERY
@torch.no_grad()
def test_base_weights_and_heads_part_and_meet(mode, init, family, jam, tmp_path):
    model = jam(family, mode, init)
    heads = {name for name in model.state_dict() if name in ("lm_head.weight", "image_head.weight")}
    model.save_pretrained(tmp_path / "causal")
    base, report = AutoModel.from_pretrained(tmp_path / "causal", output_loading_info=True)
    assert type(base) is JamModel
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert_equal_states(base, model, prefix="model.")
    assert not any(parameter.requires_grad for parameter in base.vq_model.parameters())
    ids = random_ids(model, 2, 9)
    assert torch.equal(base(input_ids=ids).last_hidden_state, model.model(input_ids=ids).last_hidden_state)

    base.save_pretrained(tmp_path / "base")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert type(again) is JamForCausalLM
    assert_equal_states(again.model, base)
    if model.config.tie_word_embeddings:  # nothing is missing: the head is the embedding
        assert not report["missing_keys"]
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    else:
        assert set(report["missing_keys"]) == heads
        for name in heads:  # newly drawn, on the scale of the config
            head = again.get_parameter(name)
            assert 0.5 < head.std() / model.config.initializer_range < 1.5, name
    assert not report["unexpected_keys"] and not report["mismatched_keys"]


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "round trips without loss, float32, bfloat16 and float16")
@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trips_keep_every_tensor(mode, init, family, dtype, jam, tmp_path):
    model = jam(family, mode, init)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(dtype)
    assert model.lm_head.weight.dtype == dtype
    model.save_pretrained(tmp_path)
    for loaded in (
        JamForCausalLM.from_pretrained(tmp_path),
        JamForCausalLM.from_pretrained(tmp_path, dtype="auto", low_cpu_mem_usage=True),
    ):
        assert_equal_states(loaded, model)
        assert {p.dtype for p in loaded.model.vq_model.parameters()} == {torch.float32}
        assert {p.device.type for p in loaded.parameters()} | {b.device.type for b in loaded.buffers()} == {"cpu"}
        for (
            name,
            buffer,
        ) in buffers.items():  # those that no checkpoint holds: rotary frequencies, float32 in a stock Llama too
            assert torch.equal(loaded.get_buffer(name), buffer), name


@pytest.mark.feature(SECTION, "`ignore_mismatched_sizes`")
@EVERY
def test_another_vocabulary_is_refused_unless_asked_for(mode, init, family, jam, tmp_path):
    model = jam(family, mode, init)
    model.save_pretrained(tmp_path)
    config = type(model.config).from_pretrained(tmp_path)
    config.vocab_size += 7
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        JamForCausalLM.from_pretrained(tmp_path, config=config)
    loaded, report = JamForCausalLM.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    mismatched = {entry[0] for entry in report["mismatched_keys"]}
    expected = {"model.language_model.embed_tokens.weight"} | ({"lm_head.weight"} - set(model.all_tied_weights_keys))
    assert mismatched == expected
    resized = ("embed_tokens.weight", "lm_head.weight")
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(resized)}
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert loaded(input_ids=random_ids(model, 1, 6)).logits.shape[-1] == model.config.vocab_size + 7


@pytest.mark.feature(SECTION, "a model without memory (meta device) from a config")
@EVERY
def test_meta_initialisation(mode, init, family, jam):
    model = jam(family, mode, init)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    with torch.device("meta"):
        outputs = empty(input_ids=torch.zeros(2, 6, dtype=torch.int64))
    assert outputs.logits.shape == (2, 6, model.config.vocab_size)
