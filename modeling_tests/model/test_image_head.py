"""An image head that is an MLP (Janus'): in every mode the logits of image codes are those of the stock module.

The stock module here is made and filled by hand, and reads the state that the stock decoder gives.
"""

import copy
import json

import pytest
import torch
from conftest import NUM_CODES, VQ_SETTINGS, parent_model, random_ids, randomise
from torch import nn
from transformers import AutoModelForCausalLM, JanusConfig, JanusForConditionalGeneration
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEHead

from jam_hf import JamConfig, JamForCausalLM
from jam_hf.training.muon import muon_parameter_groups
from jam_hf.training.recipes import freeze


VOCABULARY = 301
FIRST = VOCABULARY - NUM_CODES
WIDTH = 40  # of the MLP's hidden layer
FORMS = [("uniform", "preserving"), ("width", "preserving"), ("cross", "preserving"), ("cross", "paper")]
every_form = pytest.mark.parametrize(("mode", "form"), FORMS)


def stock_head(width: int, act: str = "gelu") -> JanusVQVAEHead:
    config = JanusVQVAEConfig(
        image_token_embed_dim=width, projection_dim=WIDTH, num_embeddings=NUM_CODES, hidden_act=act, embed_dim=4
    )
    head = JanusVQVAEHead(config).eval()
    randomise(head, seed=8)
    return head


@torch.no_grad()
def build(mode: str, form: str, family: str = "llama", act: str = "gelu", **changes) -> tuple:
    """The JAM, its parents (or decoder) and the stock head whose weights it has."""
    text = parent_model(family, VOCABULARY, 1, **changes)
    image = parent_model(family, VOCABULARY, 2, **({"hidden_size": 48} if form == "preserving" else {}))
    config = JamConfig(
        fusion_mode=mode,
        cross_form=form,
        text_config=copy.deepcopy(text.config),
        image_config=copy.deepcopy(image.config) if mode == "cross" else None,
        vq_config=copy.deepcopy(VQ_SETTINGS),
        image_head_hidden_size=WIDTH,
        image_head_act=act,
    )
    torch.manual_seed(0)
    model = JamForCausalLM(config).eval()
    head = stock_head(config.embedding_sizes[-1], act)
    model.image_head.load_state_dict(head.state_dict())
    ours = model.model.language_model
    if mode != "cross":
        ours.load_state_dict(getattr(text.model, "decoder", text.model).state_dict())
        model.lm_head.weight.copy_(text.get_output_embeddings().weight)
    elif form == "preserving":
        for name, parent in (("text", text), ("image", image)):
            decoder = getattr(parent.model, "decoder", parent.model)
            for depth, layer in zip(ours.layers, decoder.layers):
                getattr(depth, f"{name}_layer").load_state_dict(layer.state_dict())
            outside = {k: v for k, v in decoder.state_dict().items() if not k.startswith(("layers.", "embed_tokens."))}
            getattr(ours, f"{name}_stem").load_state_dict(outside)
        tables = [parent.get_input_embeddings().weight for parent in (text, image)]
        model.get_input_embeddings().weight.copy_(torch.cat(tables, dim=1))
        model.lm_head.weight.copy_(text.get_output_embeddings().weight)
    return model, text, image, head


def inputs_of(model: JamForCausalLM) -> dict[str, torch.Tensor]:
    ids = random_ids(model, 2, 10)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "opt-projected"])
@pytest.mark.parametrize("act", ["gelu", "relu"])
@pytest.mark.parametrize("mode", ["uniform", "cross"])
@torch.no_grad()
def test_image_logits_are_those_of_the_stock_head_on_the_stock_state(mode, act, family):
    model, text, image, head = build(mode, "preserving", family, act)
    inputs = inputs_of(model)
    seen = inputs["attention_mask"].bool()
    state = (text if mode == "uniform" else image).model(**inputs).last_hidden_state
    ours, expected = model(**inputs).logits[seen], head(state)[seen]
    assert torch.equal(ours[:, FIRST:], expected)
    assert torch.equal(ours[:, :FIRST], text(**inputs).logits[seen][:, :FIRST])
    with torch.no_grad():
        model.image_head.proj_out.bias[3] += 0.5
    assert not torch.equal(model(**inputs).logits[seen][:, FIRST:], expected)


@torch.no_grad()
def test_the_papers_form_reads_the_one_last_state():
    model, _, _, head = build("cross", "paper")
    inputs = inputs_of(model)
    state = model.model(**inputs).last_hidden_state
    logits = model(**inputs).logits
    assert torch.equal(logits[..., FIRST:], head(state))
    assert torch.equal(logits[..., :FIRST], model.lm_head(state)[..., :FIRST])
    kept = model(**inputs, logits_to_keep=2).logits
    torch.testing.assert_close(kept, logits[:, -2:])


@torch.no_grad()
def test_the_head_of_a_janus_becomes_the_image_head():
    """Against the whole stock model: its decoder and its generation head, as its own generation uses them."""
    text = parent_model("llama", VOCABULARY, 1)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    vq = {"num_embeddings": NUM_CODES, "embed_dim": 4, "image_token_embed_dim": 32, "projection_dim": WIDTH}
    vq |= {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "latent_channels": 32,
        "num_patches": 4,
    }
    config = JanusConfig(text_config=text.config, vision_config=vision | {"projection_dim": 32}, vq_config=vq)
    janus = JanusForConditionalGeneration(config).eval()
    randomise(janus, seed=3)
    model, *_ = build("uniform", "preserving", act=janus.model.vqmodel.config.hidden_act)
    model.model.language_model.load_state_dict(janus.model.language_model.state_dict())
    model.image_head.load_state_dict(janus.model.generation_head.state_dict())
    embeds = model.get_input_embeddings()(random_ids(model, 2, 9))
    expected = janus.model.generation_head(janus.model.language_model(inputs_embeds=embeds).last_hidden_state)
    assert torch.equal(model(inputs_embeds=embeds).logits[..., FIRST:], expected)


@every_form
@torch.no_grad()
def test_saved_and_loaded(mode, form, tmp_path):
    model, *_ = build(mode, form, "llama-tied" if form == "paper" else "llama")
    inputs = inputs_of(model)
    before = model(**inputs).logits
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["image_head_hidden_size"], saved["image_head_act"]) == (WIDTH, "gelu")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert isinstance(again.image_head, JanusVQVAEHead)
    assert torch.equal(again.eval()(**inputs).logits, before)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 3)
    torch.testing.assert_close(model(**inputs).logits[..., :size], before)


def test_a_jam_without_it_says_nothing_of_it(tmp_path):
    config = JamConfig(text_config=parent_model("llama", VOCABULARY, 1).config, vq_config=copy.deepcopy(VQ_SETTINGS))
    config.save_pretrained(tmp_path)
    assert not [name for name in json.loads((tmp_path / "config.json").read_text()) if name.startswith("image_head")]
    assert type(JamForCausalLM(config).image_head) is nn.Linear


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_head_hidden_size": 0}, ["image_head_hidden_size", "at least 1"]),
        ({"image_head_act": "relu"}, ["image_head_act", "image_head_hidden_size"]),
    ],
)
def test_contradictions_are_refused(settings, words):
    with pytest.raises(ValueError) as error:
        JamConfig(**settings)
    for word in words:
        assert word in str(error.value)


@every_form
def test_it_starts_as_linear_layers_do(mode, form):
    model, *_ = build(mode, form)
    torch.manual_seed(1)
    fresh = JamForCausalLM(model.config).image_head
    for layer in (fresh.proj_out, fresh.vision_head):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert not layer.bias.any()


@every_form
def test_a_training_step_moves_it(mode, form):
    model, *_ = build(mode, form)
    model.train()
    ids = random_ids(model, 2, 12)
    before = copy.deepcopy(model.image_head.state_dict())
    model(input_ids=ids, labels=ids).loss.backward()
    assert not model.lm_head.weight.grad[FIRST:].any() and model.lm_head.weight.grad[:FIRST].any()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert not any(torch.equal(value, before[name]) for name, value in model.image_head.state_dict().items())


def test_freezing_and_muon_know_it():
    model, *_ = build("cross", "preserving")
    head = {f"image_head.{layer}.{kind}" for layer in ("proj_out", "vision_head") for kind in ("weight", "bias")}
    for preset, expected in (("cross_only", head), ("image_stream", head), ("text_stream", set()), ("none", head)):
        assert {name for name in freeze(model, preset) if name.startswith("image_head")} == expected
    (muon,) = [group["params"] for group in muon_parameter_groups(model, 0.1, 0.1, 0.1) if group["muon"]]
    assert any(p is model.image_head.proj_out.weight for p in muon)
    assert not any(p is model.image_head.vision_head.weight for p in muon)  # its rows are tokens


@every_form
@torch.no_grad()
def test_a_picture_is_drawn_from_it(mode, form):
    model, *_ = build(mode, form)
    ids = random_ids(model, 1, 4)
    written = model.generate(input_ids=ids, generation_mode="image", do_sample=False)
    codes = written[0, 5 : 5 + model.config.image_seq_length]
    assert written[0, 4] == written[0, 5 + len(codes)] == model.config.break_token_id
    for position in range(5, 5 + len(codes)):  # the slow way: whole forwards, the head apart
        output = model.model(input_ids=written[:, :position])
        state = output.last_hidden_state if form == "paper" or mode != "cross" else output.image_last_hidden_state
        assert int(written[0, position]) == FIRST + int(model.image_head(state[0, -1]).argmax())
    assert len(codes.unique()) > 1
    assert model.decode_image_tokens(codes[None]).shape == (1, 3, 16, 16)


@every_form
def test_parallel_plans_name_its_layers(mode, form):
    model, *_ = build(mode, form)
    heads = {name: style for name, style in model.tp_plan.items() if "head" in name}
    assert heads == {"lm_head": "colwise_gather_output", "image_head.vision_head": "colwise_gather_output"}
    assert model.fsdp_plan["image_head"] == model.fsdp_plan["lm_head"]
