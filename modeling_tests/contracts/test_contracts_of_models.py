"""What JAM relies on inside transformers' models, configs and processors: a failure here says what moved."""

# No `from __future__ import annotations` here: `strict` checks the types of the fields only where they are no strings.
import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    ChameleonConfig,
    DynamicCache,
    Emu3TextConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    OPTConfig,
    PilBackend,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from jam_hf.integrations import private
from jam_hf.model import transformers_private_jam as carried
from jam_hf.model.families_jam import FAMILIES, stock_class


SIZES = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "chameleon": ChameleonConfig(**SIZES, num_key_value_heads=2),
    "emu3_text_model": Emu3TextConfig(**SIZES, num_key_value_heads=2),
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=4),
}


class Part(nn.Module):
    def __init__(self, add: int):
        super().__init__()
        self.add = add

    def forward(self, states):
        return states + self.add, states * 0 + self.add


class Recorded(PreTrainedModel):
    config_class = LlamaConfig
    _can_record_outputs = {
        "hidden_states": carried.OutputRecorder(Part, index=0),
        "image_hidden_states": carried.OutputRecorder(Part, index=1),
        "cross_attentions": carried.OutputRecorder(None, index=1, class_name="parts.1"),
    }

    def __init__(self, config):
        super().__init__(config)
        self.parts = nn.ModuleList([Part(1), Part(2)])
        self.post_init()

    @carried.merge_with_config_defaults
    @carried.capture_outputs
    def forward(self, states, use_cache=None, **kwargs):
        self.asked = use_cache
        for part in self.parts:
            states, _ = part(states)
        return BaseModelOutputWithPast(last_hidden_state=states * 10)


@pytest.mark.contract("OutputRecorder", "capture_outputs", "merge_with_config_defaults")
def test_outputs_are_recorded_by_class_by_the_end_of_a_modules_name_and_by_index():
    model = Recorded(LlamaConfig(**SIZES, use_cache=False))
    out = model(torch.zeros(1), output_hidden_states=True, output_image_hidden_states=True, output_attentions=True)
    assert [x.item() for x in out.hidden_states] == [
        0,
        1,
        30,
    ]  # what went in, each depth, and at last the last state itself
    assert [x.item() for x in out.image_hidden_states] == [1, 2]  # only "hidden_states" begins with what went in
    assert [x.item() for x in out.cross_attentions] == [2]  # asked for by output_attentions
    assert model.asked is False  # from the config
    model(torch.zeros(1), use_cache=True)
    assert model.asked is True


@pytest.mark.contract("selected_hidden_states", "resolve_hidden_states_indices")
def test_hidden_states_may_be_chosen_by_number():
    assert carried.selected_hidden_states(True) is None and carried.selected_hidden_states(None) is None
    assert carried.selected_hidden_states(-1) == [-1] and carried.selected_hidden_states([0, 2]) == [0, 2]
    model = Recorded(LlamaConfig(**SIZES))
    assert carried.resolve_hidden_states_indices(model, [-1, 0, 7]) == {0, 2}
    assert [x is None for x in model(torch.zeros(1), output_hidden_states=[-1]).hidden_states] == [True, True, False]


@pytest.mark.contract("torch_compilable_check")
def test_a_check_raises_what_a_function_says():
    carried.torch_compilable_check(torch.tensor(True), lambda: "no")
    with pytest.raises(ValueError, match="so it is"):
        carried.torch_compilable_check(torch.tensor(False), lambda: "so it is")


@pytest.mark.contract("slice_logits_to_keep")
def test_logits_to_keep_are_the_last_or_those_at_places():
    states = torch.arange(6.0).view(1, 3, 2)
    assert torch.equal(carried.slice_logits_to_keep(states, 0), states)
    assert torch.equal(carried.slice_logits_to_keep(states, 1), states[:, 2:])
    assert torch.equal(carried.slice_logits_to_keep(states, torch.tensor([0])), states[:, :1])


@pytest.mark.contract("create_masks_for_generate", "sdpa_attention_forward")
def test_masks_and_attention():
    config = LlamaConfig(**SIZES, attn_implementation="eager")
    kwargs = {
        "inputs_embeds": torch.zeros(1, 2, 8),
        "attention_mask": torch.ones(1, 2),
        "past_key_values": DynamicCache(),
    }
    assert carried.create_masks_for_generate(config=config, position_ids=None, **kwargs).shape == (1, 1, 2, 2)
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool).tril()
    query = torch.randn(1, 2, 2, 4)
    module = LlamaModel(LlamaConfig(**SIZES)).layers[0].self_attn
    out, weights = carried.sdpa_attention_forward(module, query, query, query, mask, dropout=0.0, scaling=0.5)
    assert out.shape == (1, 2, 2, 4) and weights is None
    expected = ((query @ query.mT) * 0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ query
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.contract("apply_rotary_pos_emb", "eager_attention_forward")
def test_llamas_functions():
    cos, sin = torch.zeros(1, 3, 4), torch.ones(1, 3, 4)
    query = torch.randn(1, 2, 3, 4)
    turned, same = carried.apply_rotary_pos_emb(query, query, cos, sin)
    torch.testing.assert_close(turned, torch.cat((-query[..., 2:], query[..., :2]), -1))
    assert torch.equal(turned, same)
    module = LlamaModel(LlamaConfig(**SIZES)).layers[0].self_attn.eval()
    out, weights = carried.eager_attention_forward(module, query, query, query, None, dropout=0.0, scaling=0.5)
    assert out.shape == (1, 3, 2, 4) and weights.shape == (1, 2, 3, 3)


@pytest.mark.parametrize("model_type", CONFIGS)
@torch.no_grad()
def test_layers_of_the_families_with_rotary_positions(model_type):
    config, family = CONFIGS[model_type], FAMILIES[model_type]
    config._attn_implementation = "eager"
    part = {role: family.class_of(role) for role in (family.layer, family.feed_forward, family.norm, family.rotary)}
    layer = part["DecoderLayer"](config, layer_idx=1).eval()
    assert layer.self_attn.layer_idx == 1
    layer.self_attn.layer_idx = 0  # the place in the cache, whatever the depth
    cache, states = DynamicCache(), torch.randn(1, 3, 8)
    positions = part["RotaryEmbedding"](config=config)(states, position_ids=torch.arange(3)[None])
    out = layer(states, attention_mask=None, position_embeddings=positions, past_key_values=cache, use_cache=True)
    assert (out[0] if isinstance(out, tuple) else out).shape == (1, 3, 8)
    assert cache.get_seq_length(0) == 3 and len(cache.layers) == 1
    assert {"self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"} <= set(layer.state_dict())
    mlp = part["MLP"](config)
    assert all(isinstance(getattr(mlp, name), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj"))
    mlp.gate_proj.bias = mlp.up_proj.bias = mlp.down_proj.bias = None
    assert mlp(states).shape == (1, 3, 8)
    assert set(part["RMSNorm"](8, eps=1e-5).state_dict()) == {"weight"}


def test_chameleons_other_layer_has_the_same_parts():
    family = FAMILIES["chameleon"]
    one, other = (
        family.class_of(role)(CONFIGS["chameleon"], layer_idx=0) for role in (family.layer, family.swin_layer)
    )
    assert set(one.state_dict()) == set(other.state_dict()) and other.self_attn.layer_idx == 0


@pytest.mark.contract("_remove_final_layer_norm")
@torch.no_grad()
def test_opt():
    config = OPTConfig(
        vocab_size=12, hidden_size=8, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=8
    )
    config._attn_implementation = "eager"
    assert config._remove_final_layer_norm is False
    family, states = FAMILIES["opt"], torch.randn(1, 3, 8)
    layer = family.class_of(family.layer)(config, layer_idx=1).eval()
    assert layer.self_attn.layer_idx == 1
    out = layer(states, attention_mask=None)
    assert (out[0] if isinstance(out, tuple) else out).shape == (1, 3, 8)
    table = family.class_of("LearnedPositionalEmbedding")(5, 8)
    assert table.weight.shape == (7, 8)  # two rows before position 0
    assert torch.equal(table(None, 0, position_ids=torch.tensor([[0]]))[0, 0], table.weight[2])
    decoder = family.class_of(family.decoder)(config)
    assert {"embed_tokens.weight", "embed_positions.weight", "final_layer_norm.weight"} <= set(decoder.state_dict())


@pytest.mark.contract("JanusVQVAEHead", "JanusVQVAEAlignerMLP")
@torch.no_grad()
def test_what_janus_has_around_its_codes():
    config = JanusVQVAEConfig(
        image_token_embed_dim=8, projection_dim=16, num_embeddings=5, hidden_act="gelu", embed_dim=4
    )
    head = carried.JanusVQVAEHead(config)
    assert {n: tuple(w.shape) for n, w in head.named_parameters()} == {
        "proj_out.weight": (16, 8),
        "proj_out.bias": (16,),
        "vision_head.weight": (5, 16),
        "vision_head.bias": (5,),
    }
    states = torch.randn(2, 8)
    torch.testing.assert_close(head(states), head.vision_head(nn.functional.gelu(head.proj_out(states))))
    assert private.JanusVQVAEAlignerMLP(config)(torch.randn(5, 4)).shape[0] == 5


@pytest.mark.contract("replace_layer_number_by_wildcard")
def test_names_of_layers():
    assert carried.replace_layer_number_by_wildcard("model.layers.12.mlp.up_proj") == "model.layers.*.mlp.up_proj"


@pytest.mark.contract(
    "_tp_plan", "_fsdp_plan", "_pp_plan", "_resolve_parallel_plans", "init_parallel_plans", "maybe_distribute_model"
)
def test_parallel_plans_are_made_by_post_init_and_resolved_into_three():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert model._tp_plan["model.layers.*.mlp.up_proj"] == "colwise" and model._tp_plan is not type(model)._tp_plan
    assert isinstance(model._fsdp_plan, dict) and isinstance(model._pp_plan, dict)
    assert "self.init_parallel_plans()" in inspect.getsource(PreTrainedModel.post_init)
    assert list(inspect.signature(PreTrainedModel._resolve_parallel_plans).parameters) == ["self", "distributed_config"]
    source = inspect.getsource(PreTrainedModel.maybe_distribute_model)
    assert "tp_plan, ep_plan, fsdp_plan = model._resolve_parallel_plans(distributed_config)" in source
    assert list(inspect.signature(PreTrainedModel.maybe_distribute_model).parameters)[:2] == [
        "model",
        "distributed_config",
    ]


@pytest.mark.contract("SubConfigSpec", "strict")
def test_configs_with_parts_are_made_from_dicts_and_checked():
    @carried.strict
    class Whole(PreTrainedConfig):
        model_type = "whole"
        sub_configs = {"one": AutoConfig, "other": AutoConfig}
        sub_configs_defaults = {
            "one": carried.SubConfigSpec(config_class=AutoConfig, model_type="llama"),
            "other": carried.SubConfigSpec(config_class=AutoConfig, model_type="llama", optional=True),
        }
        one: dict | PreTrainedConfig | None = None
        other: dict | PreTrainedConfig | None = None
        count: int = 1

    config = Whole(one={"model_type": "opt", "hidden_size": 16})
    assert isinstance(config.one, OPTConfig) and config.one.hidden_size == 16 and config.other is None
    assert isinstance(Whole().one, LlamaConfig)
    with pytest.raises(StrictDataclassError, match="count"):
        Whole(count="many")


@pytest.mark.contract("_attn_implementation", "_attn_implementation_internal")
def test_an_attention_implementation_is_set_by_either_name():
    config = LlamaConfig(**SIZES)
    config._attn_implementation = "eager"
    assert config._attn_implementation_internal == "eager"
    config._attn_implementation_internal = "sdpa"
    assert config._attn_implementation == "sdpa"


@pytest.mark.contract("_upload_modified_files")
def test_uploads_name_their_folder_first():
    for owner in (PreTrainedConfig, PreTrainedModel):
        assert list(inspect.signature(owner._upload_modified_files).parameters)[1] == "working_dir"


@pytest.mark.contract("modeling_auto")
def test_tables_of_classes_are_by_model_type():
    for table in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        names = getattr(carried.modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")
        assert all(isinstance(key, str) for key in names) and hasattr(names, "__setitem__")
    assert carried.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["llama"] == "LlamaForCausalLM"


@pytest.mark.contract("SizeDict", "_preprocess")
def test_image_processors_hand_sizes_and_pictures_to_their_own_steps():
    assert dict(carried.SizeDict(height=2, width=3)) == {"height": 2, "width": 3}
    parameters = list(inspect.signature(PilBackend._preprocess).parameters)
    assert parameters[:2] == ["self", "images"]
    assert {"do_resize", "size", "crop_size", "do_rescale", "rescale_factor", "do_normalize"} <= set(parameters)
    seen = []

    class Watch(PilBackend):
        def _preprocess(self, images, *args, **kwargs):
            seen.append((args, kwargs, images[0]))
            return super()._preprocess(images, *args, **kwargs)

    Watch(do_resize=False, do_rescale=False, do_normalize=False)(np.zeros((4, 4, 3), dtype=np.uint8))
    args, kwargs, image = seen[0]
    assert not args and isinstance(image, np.ndarray) and isinstance(kwargs["do_rescale"], bool)


@pytest.mark.contract("MultiModalData", "_MARKED_RE")
def test_processors_count_placeholders_and_mark_what_a_user_typed():
    assert {"num_image_tokens", "num_image_patches"} <= {f.name for f in fields(carried.MultiModalData)}
    from transformers.utils import chat_template_utils

    marked = f"a {chat_template_utils._CONTROL_TOKEN_START}<image>{chat_template_utils._CONTROL_TOKEN_END} b"
    assert carried._MARKED_RE.sub("", marked) == "a  b" and carried._MARKED_RE.search("a <image> b") is None


def test_vocabulary_maps_name_codes():
    for model_type, names in {
        "chameleon": ("IMGIMGAZ", "IMGIMGBZ", "<image>"),
        "emu3": ("<|visual token 000000|>", "<|visual token 000001|>", "<image>", "<|extra_200|>"),
    }.items():
        mapping = stock_class(model_type, f"{model_type.capitalize()}ImageVocabularyMapping")
        assert mapping({name: 7 - index for index, name in enumerate(names)}).img2bpe == {0: 7, 1: 6}
