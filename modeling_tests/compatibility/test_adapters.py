"""Adapters: peft's LoRA and DoRA on a JAM by peft's own calls and by the presets of jam_hf, trained, saved, merged,
switched.

The oracle is peft on a stock parent where one can be had, else the JAM without its adapter and plain arithmetic on its
weights.
"""

import copy
import sys

import pytest
import torch
from conftest import NUM_CODES, VQ_SETTINGS, random_ids
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from jam_hf import JamConfig, JamForCausalLM, JamModel
from jam_hf.model.modeling_jam_vq import JamVQLinear
from jam_hf.training.adapters import ADAPTER_TARGETS, lora_config
from jam_hf.training.recipes import FREEZE_PRESETS, freeze


MODES = [("uniform", "average"), ("width", "copy"), ("cross", "preserving"), ("cross", "paper")]
every_mode = pytest.mark.parametrize(("mode", "init"), MODES)
one_of_each_mode = pytest.mark.parametrize(("mode", "init"), MODES[:3])


def adapted(model: nn.Module) -> set[str]:
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def linear_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def wake(model: nn.Module, seed: int = 0, adapter: str = "default") -> nn.Module:
    """A fresh adapter adds nothing (B is zero): give each of its weights a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name and f".{adapter}." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: nn.Module, seed: int = 0) -> torch.Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return model(input_ids=random_ids(base, 2, 10, seed)).logits


def step(model: nn.Module, **batch) -> None:
    """One step of plain gradient descent."""
    model.train()
    model(**batch).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


# ----- what is adapted ------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.feature("peft", "LoRA, default targets")
@every_mode
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_default_targets_are_those_of_the_parents(family, mode, init, jam, parents):
    model = jam(family, mode, init)
    stock = get_peft_model(AutoModelForCausalLM.from_pretrained(parents(family)[0]), LoraConfig())
    ends = {name.rpartition(".")[2] for name in adapted(stock)}
    expected = {name for name in linear_layers(model) if name.rpartition(".")[2] in ends}
    assert ends and adapted(get_peft_model(model, LoraConfig())) == expected
    if mode == "cross":
        assert any("text_cross" in n for n in expected) and any("image_layer" in n for n in expected)


@pytest.mark.sampled
@pytest.mark.feature("peft", "LoRA, all-linear targets")
@every_mode
@pytest.mark.parametrize("family", ["llama", "opt-projected"])
def test_all_linear_is_all_but_the_output_embedding_and_the_vq_model(family, mode, init, jam):
    model = jam(family, mode, init)
    expected = linear_layers(model) - {"lm_head"}
    found = adapted(get_peft_model(model, LoraConfig(target_modules="all-linear")))
    assert found == expected and not any("vq_model" in name for name in found)


@pytest.mark.feature("peft", "the frozen VQ model is never adapted")
def test_the_attention_of_the_vq_model_is_not_found_by_all_linear():
    vq_config = {**VQ_SETTINGS, "mid_block_add_attention": True}
    text = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    model = JamForCausalLM(JamConfig(text_config={**text, "num_attention_heads": 2}, vq_config=vq_config))
    assert sum(isinstance(module, JamVQLinear) for module in model.modules()) == 8
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert adapted(peft_model) and not any("vq_model" in name for name in adapted(peft_model))
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(model, LoraConfig(target_modules=["to_q"]))


@pytest.mark.sampled
@pytest.mark.feature("peft", "LoRA, presets of jam_hf for one stream, cross blocks, attention")
@every_mode
@pytest.mark.parametrize("target", ADAPTER_TARGETS)
@pytest.mark.parametrize("family", ["llama", "opt-projected"])
def test_presets_adapt_what_the_freezing_presets_of_the_same_names_train(family, target, mode, init, jam):
    model = jam(family, mode, init)
    if target not in ("all", "attention") and mode != "cross":
        with pytest.raises(ValueError, match=f"fusion_mode='{mode}' is one decoder and has no '{target}'"):
            lora_config(model, target)
        return
    decoders = {name for name in linear_layers(model) if "language_model" in name}
    if target == "all":
        expected = decoders
    elif target == "attention":
        expected = {name for name in decoders if "_attn." in name}
    else:
        assert target in FREEZE_PRESETS
        trained = freeze(model, target)
        expected = {name for name in decoders if f"{name}.weight" in trained}
    assert expected and adapted(get_peft_model(model, lora_config(model.config, target))) == expected


@pytest.mark.feature("peft", "LoRA on one stream only", modes=("cross",))
@torch.no_grad()
def test_an_adapter_on_one_stream_leaves_the_other_as_it_is_until_they_meet(jam):
    """Depth 0: the image layer reads its own embedding only, whatever the text layer's adapter says."""
    model = jam("llama", "cross", "preserving")
    ids = random_ids(model, 2, 8)
    states: dict[str, list[torch.Tensor]] = {"text": [], "image": []}
    depth = model.model.language_model.layers[0]
    for name, layer in (("text", depth.text_layer), ("image", depth.image_layer)):
        layer.register_forward_hook(lambda module, inputs, output, name=name: states[name].append(output))
    model(input_ids=ids)
    wake(get_peft_model(model, lora_config(model, "text_stream")))(input_ids=ids)
    assert torch.equal(*states["image"]) and not torch.allclose(*states["text"])


# ----- training -------------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.feature("peft", "only the adapter is trained")
@one_of_each_mode
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_every_adapter_parameter_moves_and_nothing_else(dora, mode, init, jam):
    peft_model = wake(get_peft_model(jam("llama", mode, init), lora_config(JamConfig(fusion_mode=mode), use_dora=dora)))
    before = {name: parameter.detach().clone() for name, parameter in peft_model.named_parameters()}
    trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in before if "lora_" in name}
    ids = random_ids(peft_model.get_base_model(), 2, 10)
    step(peft_model, input_ids=ids, labels=ids)
    for name, parameter in peft_model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trainable), name


@pytest.mark.sampled
@pytest.mark.feature("peft", "gradient checkpointing with adapters")
@one_of_each_mode
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_are_those_without(reentrant, mode, init, jam):
    peft_model = wake(get_peft_model(jam("llama", mode, init), lora_config(JamConfig(fusion_mode=mode)))).train()
    ids = random_ids(peft_model.get_base_model(), 2, 10)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            peft_model.activation_checkpointing_enable({"use_reentrant": reentrant})
            peft_model.enable_input_require_grads()
        peft_model.zero_grad()
        peft_model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in peft_model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1]) and len(gradients[0]) == 2 * len(adapted(peft_model))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.feature("peft", "transformers.Trainer with pictures")
@one_of_each_mode
def test_trainer_learns_a_picture_through_an_adapter(mode, init, jam, processor, tmp_path):
    model = jam("llama", mode, init)
    peft_model = get_peft_model(model, lora_config(model, r=4))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inputs = processor.tokenizer("red" + "<break>" + "<image>" * 16 + "<break></s>", return_tensors="pt")["input_ids"][
        0
    ]
    rows = [{"input_ids": inputs, "labels": inputs.clone(), "pixel_values": pixels[i]} for i in range(2)]
    base = copy.deepcopy({n: p for n, p in model.named_parameters() if "lora_" not in n})
    arguments = TrainingArguments(
        tmp_path, max_steps=4, learning_rate=0.02, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True
    )
    trainer = Trainer(peft_model, arguments, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


@pytest.mark.sampled("mode")
@pytest.mark.feature("peft", "embeddings and heads trained beside an adapter (modules_to_save)")
@every_mode
def test_whole_embeddings_and_heads_beside_an_adapter(mode, init, jam, fused, tmp_path):
    model = jam("llama", mode, init)
    whole = ["embed_tokens", "lm_head", *(["image_head"] if model.image_head is not None else [])]
    peft_model = wake(get_peft_model(model, lora_config(model, modules_to_save=whole)))
    before = {name: parameter.detach().clone() for name, parameter in peft_model.named_parameters()}
    ids = random_ids(model, 2, 12)
    step(peft_model, input_ids=ids, labels=ids)
    moved = {name for name, parameter in peft_model.named_parameters() if not torch.equal(parameter, before[name])}
    saved = {name for name in before if "modules_to_save" in name}
    assert len(saved) == len(whole) and saved <= moved and moved == saved | {name for name in before if "lora_" in name}
    peft_model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(jam("llama", mode, init), tmp_path).eval()
    assert torch.equal(logits(again), logits(peft_model))


@pytest.mark.feature("peft", "embeddings of new tokens only (trainable_token_indices)")
@one_of_each_mode
def test_only_the_rows_of_new_image_codes_are_trained(mode, init, jam):
    model = jam("llama", mode, init)
    codes = list(range(model.config.image_token_offset, model.config.image_token_offset + NUM_CODES))
    before = model.get_input_embeddings().weight.detach().clone()
    config = lora_config(model, trainable_token_indices={"embed_tokens": codes[:4]})
    peft_model = wake(get_peft_model(model, config))
    ids = torch.tensor([[1, *codes, 2]])
    step(peft_model, input_ids=ids, labels=ids)
    merged = peft_model.eval().merge_and_unload().get_input_embeddings().weight
    changed = (merged != before).any(-1).nonzero().flatten().tolist()
    assert changed == codes[:4]


# ----- saving, merging, switching -------------------------------------------------------------------------------------


@pytest.mark.sampled("mode")
@pytest.mark.feature("peft", "adapters saved and loaded")
@every_mode
def test_saved_adapters_come_back_by_every_road(mode, init, jam, fused, tmp_path):
    model = JamForCausalLM.from_pretrained(fused("llama", mode, init)).eval()
    peft_model = wake(get_peft_model(model, lora_config(model))).eval()
    expected = logits(peft_model)
    peft_model.save_pretrained(tmp_path)
    base = fused("llama", mode, init)
    assert not torch.equal(expected, logits(JamForCausalLM.from_pretrained(base).eval()))
    assert torch.equal(
        logits(PeftModel.from_pretrained(JamForCausalLM.from_pretrained(base), tmp_path).eval()), expected
    )
    automatic = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(automatic.get_base_model(), JamForCausalLM) and torch.equal(logits(automatic), expected)
    by_transformers = JamForCausalLM.from_pretrained(base).eval()
    by_transformers.load_adapter(tmp_path)
    assert torch.equal(logits(by_transformers), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), expected)


@pytest.mark.feature("peft", "add_adapter of transformers")
@one_of_each_mode
def test_an_adapter_added_by_transformers_survives_save_pretrained(mode, init, fused, tmp_path):
    model = JamForCausalLM.from_pretrained(fused("llama", mode, init)).eval()
    model.add_adapter(lora_config(model))
    expected = logits(wake(model))
    model.save_pretrained(tmp_path)
    again = JamForCausalLM.from_pretrained(fused("llama", mode, init)).eval()
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), expected)
    model.disable_adapters()
    assert not torch.equal(logits(model), expected)


@pytest.mark.sampled
@pytest.mark.feature("peft", "merge_and_unload")
@every_mode
@pytest.mark.parametrize("target", ["all-linear", "attention"])
def test_merged_weights_give_the_adapters_logits(target, mode, init, jam, tmp_path):
    model = jam("llama", mode, init)
    config = LoraConfig(target_modules=target) if target == "all-linear" else lora_config(model, target)
    peft_model = wake(get_peft_model(model, config)).eval()
    expected = logits(peft_model)
    merged = peft_model.merge_and_unload()
    assert type(merged) is JamForCausalLM and not adapted(merged)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(JamForCausalLM.from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.sampled("mode")
@pytest.mark.feature("peft", "DoRA")
@every_mode
def test_dora_is_the_base_at_first_and_merges(mode, init, jam):
    model = jam("llama", mode, init)
    before = logits(model)
    peft_model = get_peft_model(model, lora_config(model, use_dora=True)).eval()
    torch.testing.assert_close(logits(peft_model), before, rtol=1e-4, atol=1e-4)
    expected = logits(wake(peft_model))
    assert not torch.allclose(expected, before, atol=1e-2)
    torch.testing.assert_close(logits(peft_model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.feature("peft", "several adapters, switched and disabled")
@one_of_each_mode
def test_several_adapters_are_switched_and_disabled(mode, init, jam):
    model = jam("llama", mode, init)
    base = logits(model)
    alone = []
    for seed, target in ((1, "all"), (2, "attention")):
        alone.append(logits(wake(get_peft_model(jam("llama", mode, init), lora_config(model, target)).eval(), seed)))
    peft_model = get_peft_model(model, lora_config(model, "all"), adapter_name="first")
    peft_model.add_adapter("second", lora_config(model, "attention"))
    wake(wake(peft_model, 1, "first"), 2, "second").eval()
    for name, expected in (("first", alone[0]), ("second", alone[1]), ("first", alone[0])):
        peft_model.set_adapter(name)
        assert torch.equal(logits(peft_model), expected)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), base)
    assert not torch.allclose(alone[0], alone[1]) and not torch.allclose(alone[0], base)


@pytest.mark.feature("peft", "pictures generated through an adapter")
@one_of_each_mode
def test_pictures_are_generated_through_an_adapter(mode, init, jam, processor):
    model = jam("llama", mode, init)
    peft_model = wake(get_peft_model(model, lora_config(model))).eval()
    prompt = processor(text=["a red circle", "a"], padding=True, return_tensors="pt")
    settings = {"generation_mode": "image", "guidance_scale": 2.0, "do_sample": False}
    output = peft_model.generate(**prompt, **settings)
    for segments in processor.post_process_interleaved(output, model, prompt["input_ids"].shape[1]):
        assert [s["image"].size for s in segments if s["type"] == "image"] == [(16, 16)]
    merged = peft_model.merge_and_unload()
    assert torch.equal(merged.generate(**prompt, **settings), output)


# ----- beyond LoRA, and errors ----------------------------------------------------------------------------------------


@pytest.mark.feature("peft", "the base model without a head")
def test_a_model_without_a_head_is_adapted_too(fused):
    model = JamModel.from_pretrained(fused("llama", "cross", "preserving"))
    config = lora_config(model, "text_stream")
    assert config.task_type == TaskType.FEATURE_EXTRACTION
    assert all(name.startswith("language_model.layers") for name in adapted(get_peft_model(model, config)))


@pytest.mark.feature("peft", "IA3")
@one_of_each_mode
def test_ia3_with_named_targets(mode, init, jam):
    model = jam("llama", mode, init)
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    before = logits(model)
    peft_model = get_peft_model(model, config).eval()
    torch.testing.assert_close(logits(peft_model), before)


def test_bad_presets_and_a_missing_peft_are_named(jam, parents, monkeypatch):
    model = jam("llama", "cross", "preserving")
    with pytest.raises(
        ValueError, match="must be one of all, attention, text_stream, image_stream, cross_only, got 'text'"
    ):
        lora_config(model, "text")
    with pytest.raises(ValueError, match="leave target_modules out"):
        lora_config(model, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="expected a JAM or a JamConfig, got a LlamaForCausalLM"):
        lora_config(AutoModelForCausalLM.from_pretrained(parents("llama")[0]))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'jam_hf\[peft\]'"):
        lora_config(model)
