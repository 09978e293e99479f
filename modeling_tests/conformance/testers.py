"""The models that transformers' tests are run on: tiny JAMs of each fusion mode and family, and a stock Llama beside
them.

It knows configs and inputs only; what is tested is transformers' business.
"""

from __future__ import annotations

from typing import Any
from unittest import TestCase

import torch
from transformers import (
    ChameleonConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    OPTConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from jam_hf import JamConfig, JamForCausalLM, JamModel, JamVQConfig


VOCAB_SIZE = 99  # divisible by nothing that divides heads or processes
NUM_CODES = 16
# In the middle of the vocabulary, as the tests cut off its end. The distributed tests train on ids drawn from all of
# it, always the same ones, where 78 never stands twice in a row: a JAM refuses to learn the placeholders of a picture
# that is missing.
MARKUP = {
    "image_token_offset": 40,
    "break_token_id": 56,
    "image_token_id": 78,
    "mask_token_id": 57,
    "num_mask_tokens": 2,
}


def rotary_settings(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**rotary_settings(**changes))


def opt_config(**changes: Any) -> OPTConfig:
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "dropout": 0.0,
        "word_embed_proj_dim": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return OPTConfig(**{**settings, **changes})


def vq_config() -> JamVQConfig:
    return JamVQConfig(
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        sample_size=8,
        num_vq_embeddings=NUM_CODES,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


class ModelTester:
    """What `ModelTesterMixin` asks of a model tester, for a decoder that reads `input_ids`."""

    base_model_class: type = LlamaModel
    causal_lm_class: type = LlamaForCausalLM
    batch_size = 3
    seq_length = 7
    is_training = True
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32

    def __init__(self, parent: TestCase):
        self.parent = parent

    def get_config(self) -> PreTrainedConfig:
        return llama_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(20, 56, (self.batch_size, self.seq_length))  # text and codes of pictures
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, :2] = 0  # one row with padding on the left
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class JamTester(ModelTester):
    base_model_class = JamModel
    causal_lm_class = JamForCausalLM
    fusion: dict[str, Any] = {}

    def text_stream(self) -> PreTrainedConfig:
        return llama_config()

    def image_stream(self) -> PreTrainedConfig | None:
        return None

    def get_config(self) -> JamConfig:
        streams = {"text_config": self.text_stream(), "image_config": self.image_stream()}
        return JamConfig(**streams, vq_config=vq_config(), **MARKUP, **self.fusion)


class UniformLlamaTester(JamTester):
    fusion = {"fusion_mode": "uniform"}


class WidthLlamaTester(JamTester):
    fusion = {"fusion_mode": "width"}
    hidden_size, num_attention_heads = 64, 8

    def text_stream(self) -> PreTrainedConfig:
        return llama_config(hidden_size=64, intermediate_size=64, num_attention_heads=8, num_key_value_heads=4)


class CrossLlamaTester(JamTester):
    fusion = {"fusion_mode": "cross", "cross_attention_interval": 1}
    num_hidden_states_types = 2  # the suite's knob: asked for hidden states, a cross JAM returns those of both streams

    def image_stream(self) -> PreTrainedConfig:
        return llama_config()


class CrossUnequalTester(CrossLlamaTester):
    """Streams of unequal width, heads and key/value heads."""

    def image_stream(self) -> PreTrainedConfig:
        return llama_config(hidden_size=48, intermediate_size=40, num_attention_heads=6, num_key_value_heads=6)


class CrossDepthsTester(CrossLlamaTester):
    """Streams of unequal depth, and an MLP as image head."""

    fusion = {"fusion_mode": "cross", "cross_attention_interval": 1, "image_head_hidden_size": 24}
    expected_num_hidden_layers = 4  # the suite's knob: a state after each of three depths, but two text layers

    def image_stream(self) -> PreTrainedConfig:
        return llama_config(num_hidden_layers=3)


class CrossFamiliesTester(CrossLlamaTester):
    """Streams of two families, both with norms on queries and keys: Qwen3 reads text, Chameleon pictures."""

    def text_stream(self) -> PreTrainedConfig:
        return Qwen3Config(**rotary_settings(head_dim=8))

    def image_stream(self) -> PreTrainedConfig:
        return ChameleonConfig(**rotary_settings())


class CrossPaperLlamaTester(CrossLlamaTester):
    fusion = {"fusion_mode": "cross", "cross_attention_interval": 2, "cross_form": "paper"}


class UniformOPTTester(JamTester):
    fusion = {"fusion_mode": "uniform"}

    def text_stream(self) -> PreTrainedConfig:
        return opt_config()


class WidthOPTTester(JamTester):
    fusion = {"fusion_mode": "width"}
    hidden_size, num_attention_heads = 64, 8

    def text_stream(self) -> PreTrainedConfig:
        return opt_config(hidden_size=64, ffn_dim=64, num_attention_heads=8, word_embed_proj_dim=64)


class CrossOPTTester(CrossLlamaTester):
    def text_stream(self) -> PreTrainedConfig:
        return opt_config()

    def image_stream(self) -> PreTrainedConfig:
        return opt_config()


class CrossPaperOPTTester(CrossOPTTester):
    """The paper's architecture: no biases, no LayerNorm parameters, one embedding for both streams."""

    fusion = {"fusion_mode": "cross", "cross_attention_interval": 2, "cross_form": "paper"}

    def text_stream(self) -> PreTrainedConfig:
        return opt_config(enable_bias=False, layer_norm_elementwise_affine=False)

    image_stream = text_stream
