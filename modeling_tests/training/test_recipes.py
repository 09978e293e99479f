"""Training runs: what moves and what stays, interruption and resumption, accumulation."""

import json

import pytest
import torch
from conftest import random_ids
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from jam_hf import JamForCausalLM
from jam_hf.training.cm3 import CM3Settings
from jam_hf.training.collator import JamDataCollator
from jam_hf.training.recipes import FREEZE_PRESETS, RecipeSettings, freeze, train_causal_lm


def _data(model, rows=24):
    return Dataset.from_dict({"input_ids": [[1, *r, 2] for r in random_ids(model, rows, 10).tolist()]})


def _ragged_data(model, rows=24):
    """Documents of 3 to 20 tokens: only with these do a mean over documents and one over tokens differ."""
    return Dataset.from_dict(
        {"input_ids": [[1, *random_ids(model, 1, 1 + 5 * i % 18, seed=i)[0].tolist(), 2] for i in range(rows)]}
    )


def _collator(model):
    cm3 = CM3Settings.from_config(model.config)
    return JamDataCollator(0, model.config.vocab_size, cm3)


SETTINGS = {
    "max_steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "save_steps": 2,
    "logging_steps": 1,
}


@pytest.mark.parametrize("preset", [name for name in FREEZE_PRESETS if name != "none"])
def test_every_trainable_parameter_moves_and_every_frozen_one_stays(preset, jam, tmp_path):
    model = jam("llama", "cross", "preserving")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = train_causal_lm(
        model, _data(model), tmp_path / "out", RecipeSettings(**SETTINGS, freeze=preset), _collator(model)
    )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and not any("vq_model" in name for name in trainable)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trainable), name
    assert len(history) == 6 and all("loss" in row for row in history)
    saved = JamForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items())
    assert len(json.loads((tmp_path / "out" / "history.json").read_text())["history"]) == 6


class _Stop(TrainerCallback):
    def __init__(self, step=3):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_to_the_same_weights(jam, tmp_path):
    def run(folder, **kwargs):
        model = jam("llama", "cross", "preserving")
        train_causal_lm(model, _data(model), tmp_path / folder, RecipeSettings(**SETTINGS), _collator(model), **kwargs)
        return model.state_dict()

    straight = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("killed", callbacks=[_Stop()])
    assert not (tmp_path / "killed").exists()
    assert (tmp_path / "killed.run" / "checkpoint-2").is_dir()
    continued = run("killed")
    for key, value in straight.items():
        torch.testing.assert_close(continued[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        ({"max_steps": 6, "gradient_accumulation_steps": 4}, 5),  # epochs of 6 batches: steps of 4 and of 2
        ({"max_steps": 10, "group_by_length": True}, 9),  # in the second epoch
    ],
)
def test_a_killed_run_goes_on_beyond_an_epoch(changes, stop, parents, tmp_path):
    def run(folder, **kwargs):
        model = AutoModelForCausalLM.from_pretrained(parents("llama")[0])
        settings = RecipeSettings(**{**SETTINGS, **changes})
        collator = JamDataCollator(0, model.config.vocab_size, CM3Settings(5, 8, 13, (3, 1, 2)))
        train_causal_lm(model, _ragged_data(model), tmp_path / folder, settings, collator, **kwargs)
        return model.state_dict()

    straight = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("killed", callbacks=[_Stop(stop)])
    continued = run("killed")
    for key, value in straight.items():
        torch.testing.assert_close(continued[key], value, rtol=1e-5, atol=1e-6)


def test_a_run_killed_while_it_wrote_a_checkpoint_goes_on_from_the_one_before(parents, tmp_path):
    def run(folder, **kwargs):
        model = AutoModelForCausalLM.from_pretrained(parents("llama")[0])
        collator = JamDataCollator(0, model.config.vocab_size)
        train_causal_lm(model, _data(model), tmp_path / folder, RecipeSettings(**SETTINGS), collator, **kwargs)
        return model.state_dict()

    straight = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("killed", callbacks=[_Stop()])
    for step, state in ((4, None), (10, '{"global_st')):
        partial = tmp_path / "killed.run" / f"checkpoint-{step}"
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"half")
        if state:
            (partial / "trainer_state.json").write_text(state)
    continued = run("killed")
    for key, value in straight.items():
        torch.testing.assert_close(continued[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_jam", [False, True])
def test_accumulation_equals_a_larger_batch(is_jam, jam, parents, tmp_path):
    results = []
    for batch, accumulation in ((8, 1), (1, 8)):
        model = jam("llama", "cross", "preserving") if is_jam else AutoModelForCausalLM.from_pretrained(parents("llama")[0])
        settings = RecipeSettings(**{**SETTINGS, "max_steps": 3, "batch_size": batch}, gradient_accumulation_steps=accumulation)
        collator = JamDataCollator(0, model.config.vocab_size)
        train_causal_lm(model, _ragged_data(model), tmp_path / f"{batch}", settings, collator)
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-3, atol=1e-4)


def test_evaluation_is_without_masking(parents, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(parents("llama")[0])
    data = _data(model, 8)
    cm3 = CM3Settings(5, 8, 13, (3, 1, 2), mean_spans=4.0)
    settings = RecipeSettings(**{**SETTINGS, "max_steps": 1, "learning_rate": 0.0, "eval_steps": 1})
    history = train_causal_lm(
        model, data, tmp_path / "out", settings, JamDataCollator(0, model.config.vocab_size, cm3), {"texts": data}
    )
    plain = JamDataCollator(0, model.config.vocab_size)([data[i] for i in range(8)])
    with torch.no_grad():
        expected = model.eval()(**plain).loss.item()
    assert next(r["eval_texts_loss"] for r in history if "eval_texts_loss" in r) == pytest.approx(expected, rel=1e-4)


def test_freezing_none_trains_all_but_the_vq_model(jam):
    model = jam("llama", "cross", "preserving")
    assert freeze(model, "none") == freeze(model, "vq") == [n for n, _ in model.named_parameters() if "vq_model" not in n]


def test_bad_settings(jam):
    with pytest.raises(ValueError, match="freeze must be one of"):
        RecipeSettings(freeze="everything")
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        RecipeSettings(max_steps=0)
    for preset in ("cross_only", "text_stream", "image_stream"):
        with pytest.raises(ValueError, match=f"'{preset}' leaves nothing to train in a JamForCausalLM"):
            freeze(jam("llama", "uniform", "average"), preset)
