"""Parents that become one decoder must compute alike: every config field is compared, decided, or idle."""

import dataclasses
import inspect
import re
from importlib import import_module

import pytest
import torch
from fusion_zoo import EQUAL, image_parent, save, text_parent, vq_model
from transformers import CONFIG_MAPPING, PreTrainedConfig

from jam_hf import JamForCausalLM, fuse
from jam_hf.fusion.fuse import plan_fusion
from jam_hf.fusion.shapes import DECIDED, IDLE, shape_fields
from jam_hf.model.families_jam import FAMILIES


# What is compared, and another value that the field may have.
COMPARED = {
    "_remove_final_layer_norm": True,
    "activation_function": "tanh",
    "attention_bias": True,
    "do_layer_norm_before": False,
    "enable_bias": False,
    "ffn_dim": 8,
    "head_dim": 2,
    "hidden_act": "relu",
    "hidden_size": 8,
    "intermediate_size": 8,
    "layer_norm_elementwise_affine": False,
    "layer_types": None,  # with its window, below
    "mlp_bias": True,
    "model_parallel_size": 2,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "rms_norm_eps": 0.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3.0},
    "sliding_window": 5,
    "swin_norm": True,
    "word_embed_proj_dim": 8,
}
# What a modelling file reads of its config that is no field of it.
_NO_FIELDS = {"_attn_implementation", "rope_theta", "vq_config", "layer_types", "to_dict", "name_or_path"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_compared_decided_or_idle(family):
    """Where this fails for a field, transformers has got a new one: say in shapes.py, or in `COMPARED`, which it is."""
    config_class = CONFIG_MAPPING[family]
    fields = {field.name for field in dataclasses.fields(config_class)}
    assert not DECIDED & IDLE and not (DECIDED | IDLE) & set(COMPARED)
    assert fields <= DECIDED | IDLE | set(COMPARED)
    module = family.removesuffix("_text_model")
    source = inspect.getsource(import_module(f"transformers.models.{module}.modeling_{module}"))
    if module == "emu3":  # its VQ model and the model around both have configs of their own
        source = "".join(
            re.findall(
                r"class Emu3(?:Attention|MLP|DecoderLayer|RotaryEmbedding|TextModel|ForCausalLM)\b.*?(?=\nclass )",
                source,
                re.S,
            )
        )
    if module == "chameleon":
        source = "".join(
            re.findall(
                r"class Chameleon(?:Attention|MLP|\w*DecoderLayer|RotaryEmbedding)\b.*?(?=\nclass )", source, re.S
            )
        )
    read = set(re.findall(r"\bconfig\.(\w+)", source)) | set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', source))
    assert read <= fields | _NO_FIELDS | set(COMPARED) | set(dir(PreTrainedConfig)), read - fields


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "chameleon"])
def test_each_compared_field_makes_a_difference(family):
    settings = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2}
    config_class = CONFIG_MAPPING[family]
    names = {field.name for field in dataclasses.fields(config_class)} & set(COMPARED) - {"layer_types"}
    for name in sorted(names):
        one, other = config_class(**settings), config_class(**settings)
        setattr(other, name, COMPARED[name])
        assert shape_fields(one) == shape_fields(config_class(**settings))
        assert shape_fields(one) != shape_fields(other), name
    if family == "emu3_text_model":  # no fields of its config, and read by its layers
        assert shape_fields(config_class(**settings)) != shape_fields(config_class(**settings, attention_bias=True))
    if "layer_types" in {field.name for field in dataclasses.fields(config_class)}:
        kinds = ["full_attention", "sliding_attention"]
        windows = [
            config_class(**settings, use_sliding_window=True, sliding_window=5, layer_types=k)
            for k in (kinds, kinds[::-1])
        ]
        assert shape_fields(windows[0]) != shape_fields(windows[1])


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 32}
LONG = {**YARN, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
EQUALLY = {**EQUAL, "hidden_act": "silu"}


def parents_with(rope, positions, **text):
    pair = [
        text_parent(
            "llama", **{**EQUALLY, "rope_parameters": dict(rope), "max_position_embeddings": positions[0]}, **text
        ),
        image_parent("plain", **{**EQUALLY, "rope_parameters": dict(rope), "max_position_embeddings": positions[1]}),
    ]
    return pair


@pytest.mark.parametrize("mode", ["uniform", "width"])
@pytest.mark.parametrize(
    ("rope", "positions", "fits"),
    [
        (DYNAMIC, (64, 128), False),
        (DYNAMIC, (128, 128), True),
        (LONG, (64, 128), False),  # no factor: it is reckoned from the positions
        ({**YARN, "factor": 2.0}, (64, 128), True),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, (64, 128), True),
        ({"rope_type": "default", "rope_theta": 1e4}, (128, 64), True),
    ],
    ids=str,
)
def test_rotations_that_hang_on_the_positions(mode, rope, positions, fits):
    (text, tokenizer), (image, image_tokenizer) = parents_with(rope, positions)
    arguments = {"vq_model": vq_model(), "tokenizer": tokenizer, "image_tokenizer": image_tokenizer}
    if not fits:
        with pytest.raises(ValueError, match=rf"max_position_embeddings: {positions[0]} and {positions[1]}"):
            plan_fusion(text, image, mode, **arguments)
        return
    config = plan_fusion(text, image, mode, **arguments).config
    assert config.max_position_embeddings == min(positions)
    assert config.text_config.rope_parameters == text.config.rope_parameters


@torch.no_grad()
def test_cross_keeps_each_streams_own_rotation(tmp_path):
    """Beyond the shorter parent's positions too: the text parent's logits, whatever the image parent's length is."""
    (text, tokenizer), (image, image_tokenizer) = parents_with(DYNAMIC, (64, 128))
    save(text, tokenizer, tmp_path / "text")
    save(image, image_tokenizer, tmp_path / "image")
    jam = JamForCausalLM.from_pretrained(
        fuse(tmp_path / "text", tmp_path / "image", "cross", tmp_path / "jam", vq_model=vq_model())
    )
    ids = torch.randint(10, 80, (1, 200), generator=torch.Generator().manual_seed(0))
    own = text(ids).logits
    assert torch.equal(jam(input_ids=ids).logits[..., : own.shape[-1]][..., :80], own[..., :80])
