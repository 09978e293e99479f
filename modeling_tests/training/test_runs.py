"""Runs of `train_causal_lm` as users have them: with adapters, killed at the last moment, continued with other
things.
"""

import json
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import random_ids
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from jam_hf import JamForCausalLM
from jam_hf.data.cm3 import CM3Settings
from jam_hf.data.collator import JamDataCollator
from jam_hf.training import fingerprints, recipes
from jam_hf.training.adapters import lora_config
from jam_hf.training.recipes import RecipeSettings, train_causal_lm


SETTINGS = RecipeSettings(max_steps=3, batch_size=4, learning_rate=1e-2, warmup_steps=1, save_steps=2, logging_steps=1)


def data(model, rows=24, seed=0):
    return Dataset.from_dict({"input_ids": [[1, *r, 2] for r in random_ids(model, rows, 10, seed).tolist()]})


def plain(model):
    return JamDataCollator(0, model.config.vocab_size)


def masking(model):
    return replace(plain(model), cm3=CM3Settings(5, 8, 13, (3, 1, 2)))


def stock(parents):
    return AutoModelForCausalLM.from_pretrained(parents("llama")[0])


# ----- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.feature("peft", "`train_causal_lm` of an adapter: what peft froze stays, reloaded equals memory")
@pytest.mark.parametrize(("mode", "init"), [("uniform", "average"), ("width", "copy"), ("cross", "preserving")])
@pytest.mark.parametrize("heads", [False, True], ids=["lora", "lora and heads"])
def test_what_peft_froze_stays_and_reloaded_equals_memory(heads, mode, init, jam, fused, tmp_path):
    base = jam("llama", mode, init, alive=False)
    kept = {"modules_to_save": ["lm_head"]} if heads else {}
    model = get_peft_model(base, lora_config(base, r=4, **kept))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_causal_lm(model, data(base), tmp_path / "out", replace(SETTINGS, max_steps=4), plain(base))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained and any("lm_head" in name for name in trained) == heads
    again = PeftModel.from_pretrained(JamForCausalLM.from_pretrained(fused("llama", mode, init)), tmp_path / "out")
    ids = random_ids(base, 2, 12)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_an_adapter_inside_the_model_is_trained_alone_too(parents, tmp_path):
    model = stock(parents)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_causal_lm(model, data(model), tmp_path / "out", SETTINGS, plain(model))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and moved == {name for name in before if "lora_" in name}
    again = stock(parents)
    again.load_adapter(str(tmp_path / "out"))
    ids = random_ids(model, 2, 12)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_a_preset_narrows_what_an_adapter_trains(jam, tmp_path):
    base = jam("llama", "cross", "preserving")
    model = get_peft_model(base, lora_config(base, r=2))
    trained = recipes.freeze(model, "image_stream")
    assert trained and all("lora_" in name and "image_" in name for name in trained)


def test_what_an_adapter_would_not_save_is_refused(parents, tmp_path):
    model = get_peft_model(stock(parents), LoraConfig(r=4, target_modules=["q_proj"]))
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"1 parameter\(s\) would be trained that the adapter does not save, e.g. .*lm_head"
    ):
        train_causal_lm(model, data(model), tmp_path / "out", SETTINGS, plain(model))
    assert not list(tmp_path.iterdir())


def test_a_killed_run_of_an_adapter_goes_on_to_the_same_weights(parents, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    def run(folder, **kwargs):
        torch.manual_seed(0)
        model = get_peft_model(stock(parents), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        train_causal_lm(model, data(model), tmp_path / folder, replace(SETTINGS, max_steps=5), masking(model), **kwargs)
        return model.state_dict()

    straight = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("killed", callbacks=[Stop()])
    for name, value in run("killed").items():
        torch.testing.assert_close(value, straight[name], rtol=1e-5, atol=1e-6)


# ----- killed and continued -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_steps", [3, 6, 8], ids=["in an epoch", "at its end", "in the next"])
def test_killed_before_the_folder_is_in_place_no_step_is_taken_twice(max_steps, parents, tmp_path):
    def run(folder):
        model = stock(parents)
        settings = replace(SETTINGS, max_steps=max_steps)
        history = train_causal_lm(model, data(model), tmp_path / folder, settings, masking(model))
        return model.state_dict(), history

    straight, history = run("straight")
    with mock.patch.object(recipes, "whole_folder", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run("killed")
    assert not (tmp_path / "killed").exists()
    continued, again = run("killed")
    assert all(torch.equal(continued[name], value) for name, value in straight.items())
    assert again == history
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "killed").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in straight.items())
    assert not (tmp_path / "killed.run").exists()


def test_a_run_goes_on_only_with_what_it_began_with(parents, tmp_path):
    def run(documents=0, model=None, callbacks=(), settings=SETTINGS, **changes):
        model = stock(parents) if model is None else model
        collator = masking(model)
        cm3 = {name: changes.pop(name) for name in list(changes) if hasattr(collator.cm3, name)}
        collator = replace(collator, **changes, cm3=replace(collator.cm3, **cm3))
        rows = documents if isinstance(documents, Dataset) else data(model, seed=documents)
        train_causal_lm(model, rows, tmp_path / "out", settings, collator, callbacks=list(callbacks))

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[Stop()])
    other = stock(parents)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    frozen = get_peft_model(stock(parents), LoraConfig(r=2, target_modules=["q_proj"]))
    for named, changes in {
        "documents": {"documents": 1},
        "collator.cm3.mean_spans": {"mean_spans": 2.0},
        "collator.cm3_probability": {"cm3_probability": 0.5},
        "collator.seed": {"seed": 7},
        "starting model": {"model": other},
        "starting model, trained parameters": {"model": frozen},
        "learning_rate": {"settings": replace(SETTINGS, learning_rate=1e-3)},
    }.items():
        with pytest.raises(ValueError, match=rf"other settings, data or weights \({named}\)\. Delete it"):
            run(**changes)
    run(settings=replace(SETTINGS, logging_steps=2))  # the same again goes on
    assert json.loads((tmp_path / "out" / "history.json").read_text())["history"]


def test_documents_are_known_however_they_are_stored(tmp_path):
    rows = [[1, 2, 3], [4], [5, 6]] * 700
    dataset = Dataset.from_dict({"input_ids": rows})
    digest = fingerprints.of_documents(dataset)
    dataset.save_to_disk(tmp_path / "saved")
    halves = [Dataset.from_dict({"input_ids": part, "more": part}) for part in (rows[:1001], rows[1001:])]
    for same in (Dataset.load_from_disk(tmp_path / "saved"), concatenate_datasets(halves), dataset.select(range(2100))):
        assert fingerprints.of_documents(same) == digest
    others = ([*rows[:-1], [5, 7]], rows[1:], [rows[1], rows[0], *rows[2:]], [[1, 2], [3, 4], *rows[2:]])
    assert len({fingerprints.of_documents(Dataset.from_dict({"input_ids": other})) for other in others} | {digest}) == 5


# ----- evaluation and masking -----------------------------------------------------------------------------------------


def test_the_evaluation_loss_is_by_tokens(jam, tmp_path):
    """Short documents that the model knows nothing of, and long ones of one token: batches of very unlike means."""
    model = jam("llama", "cross", "preserving")
    rows = [[1, *random_ids(model, 1, 2, seed=i)[0].tolist()] for i in range(6)] + [[1] + [20] * 30] * 5
    settings = replace(SETTINGS, max_steps=1, learning_rate=0.0, eval_steps=1, batch_size=2)
    texts = {"texts": Dataset.from_dict({"input_ids": rows}), "others": data(model, 5)}
    history = train_causal_lm(model, data(model), tmp_path / "out", settings, masking(model), texts)
    total, count, means = 0.0, 0, []
    with torch.no_grad():
        for ids in rows:
            log_p = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
            losses = [-log_p[i, token].item() for i, token in enumerate(ids[1:])]
            total, count, means = total + sum(losses), count + len(losses), [*means, np.mean(losses)]
    found = next(row["eval_texts_loss"] for row in history if "eval_texts_loss" in row)
    assert found == pytest.approx(total / count, rel=1e-4) != pytest.approx(np.mean(means), rel=1e-2)
    assert any("eval_others_loss" in row for row in history)


def test_each_process_masks_in_its_own_way_and_again_the_same(monkeypatch):
    rows = [{"input_ids": [1, *range(30, 60), 2]}] * 8

    def batches(rank):
        monkeypatch.setenv("RANK", str(rank))
        collator = JamDataCollator(0, 300, CM3Settings(5, 8, 13, (3, 1, 2), mean_spans=3.0))
        return [collator(rows)["input_ids"].tolist() for _ in range(3)]

    found = [batches(rank) for rank in range(3)]
    assert all(found[a][call] != found[b][call] for a in range(3) for b in range(a) for call in range(3))
    assert found == [batches(rank) for rank in range(3)]
    monkeypatch.delenv("RANK")
    collator = JamDataCollator(0, 300, CM3Settings(5, 8, 13, (3, 1, 2), mean_spans=3.0))
    collator.skip_batches(2)
    assert collator(rows)["input_ids"].tolist() == found[0][2]  # one process masks as it ever did, also when it goes on
