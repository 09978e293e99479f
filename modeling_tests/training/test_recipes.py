"""Training runs: what moves and what stays, interruption and resumption, accumulation."""

import json

import numpy as np
import pytest
import torch
from conftest import random_ids
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from jam_hf import JamForCausalLM
from jam_hf.data.cm3 import CM3Settings
from jam_hf.data.collator import JamDataCollator
from jam_hf.training.recipes import FREEZE_PRESETS, RecipeSettings, _LengthGroupedSampler, freeze, train_causal_lm


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


MUON = {"muon_learning_rate": 0.01, "schedule": "warmup_stable_decay", "decay_steps": 3}


@pytest.mark.parametrize("changes", [{}, MUON], ids=["adamw", "muon"])
def test_a_killed_run_goes_on_to_the_same_weights(changes, jam, tmp_path):
    def run(folder, **kwargs):
        model = jam("llama", "cross", "preserving")
        settings = RecipeSettings(**{**SETTINGS, **changes})
        train_causal_lm(model, _data(model), tmp_path / folder, settings, _collator(model), **kwargs)
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
        model = (
            jam("llama", "cross", "preserving") if is_jam else AutoModelForCausalLM.from_pretrained(parents("llama")[0])
        )
        settings = RecipeSettings(
            **{**SETTINGS, "max_steps": 3, "batch_size": batch}, gradient_accumulation_steps=accumulation
        )
        collator = JamDataCollator(0, model.config.vocab_size)
        train_causal_lm(model, _ragged_data(model), tmp_path / f"{batch}", settings, collator)
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-3, atol=1e-4)


def test_both_rates_of_muon_follow_the_schedule(parents, tmp_path):
    class Rates(TrainerCallback):
        seen = []

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.seen.append([group["lr"] for group in kwargs["optimizer"].param_groups])

    model = AutoModelForCausalLM.from_pretrained(parents("llama")[0])
    settings = RecipeSettings(**{**SETTINGS, **MUON, "warmup_steps": 2})
    collator = JamDataCollator(0, model.config.vocab_size)
    train_causal_lm(model, _data(model), tmp_path / "out", settings, collator, callbacks=[Rates()])
    expected = [0, 0.5, 1, 1, 2 / 3, 1 / 3]  # two steps of warm-up, one at the peak, three of decay
    for rates, share in zip(Rates.seen, expected, strict=True):
        assert rates == pytest.approx([0.01 * share, 0.01 * share, 0.01 * share])


def test_grouping_by_length_takes_each_document_once_and_wastes_little():
    lengths = np.random.default_rng(0).integers(1, 200, size=407)
    data = Dataset.from_dict({"input_ids": [[1] * n for n in lengths]})
    sampler = _LengthGroupedSampler(8, data, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(407)) and len(sampler) == 407 and order == list(sampler)
    batches = [lengths[order[i : i + 8]] for i in range(0, 400, 8)]
    assert sum(8 * batch.max() for batch in batches) < 1.1 * sum(batch.sum() for batch in batches)
    longest = [batch.max() for batch in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    assert np.mean(longest[:10]) == pytest.approx(np.mean(longest), rel=0.35)  # no drift from long to short
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_a_run_with_other_settings_is_not_continued(parents, tmp_path):
    def run(**changes):
        model = AutoModelForCausalLM.from_pretrained(parents("llama")[0])
        collator = JamDataCollator(0, model.config.vocab_size)
        callbacks = [_Stop()] if not changes else []
        settings = RecipeSettings(**{**SETTINGS, **changes})
        train_causal_lm(model, _data(model), tmp_path / "out", settings, collator, callbacks=callbacks)

    with pytest.raises(KeyboardInterrupt):
        run()
    with pytest.raises(ValueError, match=r"began with other settings, data or weights \(learning_rate\)"):
        run(learning_rate=2e-2)
    run(logging_steps=2)  # decides what is reported, not what is learned
    assert (tmp_path / "out" / "history.json").is_file() and not (tmp_path / "out.run").exists()


def test_packed_training_is_that_of_separate_rows(jam, tmp_path):
    """The Trainer counts a document's first token among its items, where nothing is predicted; packing cannot. So the
    rates of both runs' losses differ by a factor, which Adam's steps do not feel.
    """
    states = []
    for packing in (False, True):
        model = jam("llama", "cross", "preserving")
        collator = JamDataCollator(0, model.config.vocab_size)
        settings = RecipeSettings(**{**SETTINGS, "max_steps": 3, "batch_size": 8}, packing=packing)
        train_causal_lm(model, _ragged_data(model), tmp_path / str(packing), settings, collator)
        states.append(model.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-4)


class _Watch(TrainerCallback):
    def __init__(self):
        self.seen = set()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        config = model.config
        streams = {config.text_config._attn_implementation, config.image_config._attn_implementation}
        self.seen.add((config._attn_implementation, *streams, torch.get_float32_matmul_precision()))


def test_attention_and_precision_last_as_long_as_the_training(jam, tmp_path, caplog):
    model, watch, before = jam("llama", "cross", "preserving"), _Watch(), torch.get_float32_matmul_precision()
    settings = RecipeSettings(**SETTINGS, attn_implementation="eager", float32_matmul_precision="high")
    history = train_causal_lm(model, _data(model), tmp_path / "out", settings, _collator(model), callbacks=[watch])
    assert watch.seen == {("eager", "eager", "high")}
    assert (model.config._attn_implementation, torch.get_float32_matmul_precision()) == ("sdpa", before)
    assert model.config.text_config._attn_implementation == model.config.image_config._attn_implementation == "sdpa"
    assert not [record for record in caplog.records if "attention implementation" in record.message]
    other = jam("llama", "cross", "preserving")
    expected = train_causal_lm(other, _data(other), tmp_path / "sdpa", RecipeSettings(**SETTINGS), _collator(other))
    for ours, theirs in zip(history, expected):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_packing_is_refused_where_documents_would_mix(parents, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(parents("opt")[0])
    collator = JamDataCollator(0, model.config.vocab_size)
    with pytest.raises(ValueError, match=r"in a OPTForCausalLM \(opt\) packed documents would see each other"):
        train_causal_lm(model, _data(model), tmp_path / "out", RecipeSettings(**SETTINGS, packing=True), collator)
    collator = JamDataCollator(0, model.config.vocab_size, packing=True)  # asked for there alone
    with pytest.raises(ValueError, match="packed documents would see each other"):
        train_causal_lm(model, _data(model), tmp_path / "out", RecipeSettings(**SETTINGS), collator)
    assert not list(tmp_path.iterdir())


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
    assert (
        freeze(model, "none") == freeze(model, "vq") == [n for n, _ in model.named_parameters() if "vq_model" not in n]
    )


def test_bad_settings(jam):
    with pytest.raises(ValueError, match="'highest', 'high', 'medium' or None, got 'low'"):
        RecipeSettings(float32_matmul_precision="low")
    with pytest.raises(ValueError, match="freeze must be one of"):
        RecipeSettings(freeze="everything")
    with pytest.raises(ValueError, match="warmup_stable_decay and decay_steps need each other"):
        RecipeSettings(schedule="warmup_stable_decay")
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        RecipeSettings(max_steps=0)
    for preset in ("cross_only", "text_stream", "image_stream"):
        with pytest.raises(ValueError, match=f"'{preset}' leaves nothing to train in a JamForCausalLM"):
            freeze(jam("llama", "uniform", "average"), preset)
