"""JamConfig: one home for ids and shapes, checked when it is built; the paper's sizes."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, LlamaConfig

from jam_hf import JamConfig, JamForCausalLM, JamVQConfig


def test_defaults_are_consistent():
    config = JamConfig()
    assert config.fusion_mode == "cross"
    assert config.image_seq_length == config.grid_size**2 == config.vq_config.image_seq_length
    assert config.image_token_offset + config.num_image_tokens == config.vocab_size
    assert config.mask_end_token_id == config.mask_token_id + config.num_mask_tokens


@pytest.mark.parametrize("mode", ["uniform", "width", "cross"])
def test_round_trip_through_files(tmp_path, mode):
    config = JamConfig.paper(mode)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is JamConfig
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "jam"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fusion_mode": "sum"}, ["fusion_mode", "uniform", "sum"]),
        ({"cross_form": "gated"}, ["cross_form", "gated"]),
        ({"text_config": {"model_type": "gemma2"}}, ["gemma2", "llama", "opt"]),
        ({"image_seq_length": 5}, ["image_seq_length", "1024"]),
        ({"image_token_id": 3}, ["same id 3"]),
        ({"eos_token_id": 3}, ["eos_token_id", "break_token_id"]),
        ({"break_token_id": 31999}, ["break_token_id", "image codes"]),
        ({"break_token_id": 32000}, ["32000", "vocabulary"]),
        ({"image_token_offset": 30000}, ["outside the vocabulary"]),
        ({"fusion_mode": "width", "image_config": {"model_type": "llama"}}, ["image_config", "width"]),
        ({"tie_word_embeddings": True}, ["tied", "tie_word_embeddings=False"]),
        ({"cross_attention_interval": 0}, ["cross_attention_interval"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "text_config"]),
        (
            {
                "text_config": {"model_type": "llama", "vocab_size": 9000},
                "image_config": {"model_type": "llama", "vocab_size": 9001},
            },
            ["vocab_size", "9000", "9001"],
        ),
        (
            {
                "cross_form": "paper",
                "text_config": {"model_type": "llama", "hidden_size": 64},
                "image_config": {"model_type": "llama", "hidden_size": 32},
            },
            ["64", "32", "preserving"],
        ),
        (
            {
                "text_config": {"model_type": "opt", "layerdrop": 0.1},
                "vq_config": {"num_vq_embeddings": 16},
            },
            ["layerdrop", "0.1"],
        ),
    ],
)
def test_contradictions_are_refused(settings, words):
    with pytest.raises(ValueError) as error:
        JamConfig(**settings)
    for word in words:
        assert word in str(error.value)


def test_vq_config_checks():
    with pytest.raises(ValueError, match="multiple of the downsampling factor 8"):
        JamVQConfig(sample_size=50)
    with pytest.raises(ValueError, match="one entry per level"):
        JamVQConfig(down_block_types=["DownEncoderBlock2D"])


def test_delegated_values_reach_every_decoder():
    config = JamConfig()
    config.vocab_size = 50_000
    assert config.text_config.vocab_size == config.image_config.vocab_size == 50_000


def test_one_cache_entry_per_attention():
    config = JamConfig.paper("cross")
    assert len(config.per_layer_config) == 32 + 32 + 2 * 16
    assert config.cross_attention_layers == tuple(range(0, 32, 2))
    assert JamConfig.paper("width").cross_attention_layers == ()


@pytest.mark.parametrize(("mode", "low", "high"), [("uniform", 6.5, 7.2), ("width", 25.8, 26.9), ("cross", 18.8, 19.9)])
def test_paper_parameter_counts(mode, low, high):
    """[P] 7B, 26B, 19B; the VQ model apart."""
    with torch.device("meta"):
        model = JamForCausalLM(JamConfig.paper(mode))
    count = sum(p.numel() for name, p in model.named_parameters() if "vq_model" not in name) / 1e9
    assert low < count < high, count
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize(
    "settings",
    [{"break_token_id": None}, {"break_token_id": 3.5}, {"cross_attention_interval": 2.5}, {"cross_form": 1}],
)
def test_types_are_checked(settings):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(settings))):
        JamConfig(**settings)


def test_the_config_of_another_model_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config of a 'llama' model, not of a JAM"):
        JamConfig.from_pretrained(tmp_path)


def test_positions_are_those_that_both_streams_have():
    llama = {"model_type": "llama", "vocab_size": 9000}
    config = JamConfig(
        text_config={**llama, "max_position_embeddings": 64}, image_config={**llama, "max_position_embeddings": 32}
    )
    assert config.max_position_embeddings == 32
    config.initializer_range = 0.5
    assert config.text_config.initializer_range == config.image_config.initializer_range == 0.5
