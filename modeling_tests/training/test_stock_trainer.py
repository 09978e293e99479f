"""transformers' Trainer, as it is, on a JAM: label smoothing, and labels that are used outside of `forward`.

The oracles are plain arithmetic on the model's own logits with the codes of the pictures as targets, and a stock class
with the same weights in the same Trainer.
"""

import sys

import pytest
import torch
from conftest import random_ids
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BatchFeature, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from jam_hf import JamForCausalLM
from jam_hf.training.adapters import lora_config


MODES = [("uniform", "average"), ("width", "copy"), ("cross", "preserving"), ("cross", "paper")]
every_mode = pytest.mark.parametrize(("mode", "init"), MODES)
SMOOTHING = 0.1


class Mine(JamForCausalLM):
    """A class of a user, whose name says nothing of what it is."""


def rows_with_pictures(model, count=4):
    """Rows of one length, a picture in each, as a processor makes them; text before it is not trained on."""
    length = model.config.image_seq_length
    ids = random_ids(model, count, length + 6)
    ids[ids == model.config.image_token_id] = 20
    ids[:, 4 : 4 + length] = model.config.image_token_id
    pixels = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 2, -100)
    return [{"input_ids": ids[i], "labels": labels[i], "pixel_values": pixels[i]} for i in range(count)]


def rows_of_text(model, count=8):
    """Rows in which every position is a label, the first too: a Trainer that does not shift counts one too many."""
    return [{"input_ids": ids, "labels": ids.clone()} for ids in random_ids(model, count, 9)]


def as_processors_return(rows):
    """A batch that is no dict."""
    return BatchFeature({name: torch.stack([row[name] for row in rows]) for name in rows[0]})


def trainer(model, tmp_path, rows, loss=None, metrics=None, collator=None, **settings):
    settings = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 4, **settings}
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        **settings,
    )
    return Trainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=rows,
        compute_loss_func=loss,
        compute_metrics=metrics,
    )


def first_loss(run) -> float:
    run.train()
    return next(row["loss"] for row in run.state.log_history if "loss" in row)


@torch.no_grad()
def smoothed(model, rows) -> float:
    """(1 - e) * -log p(label) + e * mean over the vocabulary of -log p, a loop over tokens."""
    losses = []
    for row in rows:
        ids, labels = row["input_ids"].clone(), row["labels"].clone()
        if "pixel_values" in row:
            codes = model.get_image_tokens(row["pixel_values"][None])[0]
            labels[labels == model.config.image_token_id] = codes
            ids[ids == model.config.image_token_id] = codes
        log_p = JamForCausalLM.forward(model, ids[None]).logits[0].log_softmax(-1)
        for position in range(len(ids) - 1):
            label = labels[position + 1]
            if label != -100:
                here = log_p[position]
                losses.append(-(1 - SMOOTHING) * here[label] - SMOOTHING * here.mean())
    return torch.stack(losses).mean().item()


def remote(folder) -> JamForCausalLM:
    """The class that a folder brings along, which is none of jam_hf's."""
    found = get_class_from_dynamic_module("modeling_jam.JamForCausalLM", str(folder))
    config = get_class_from_dynamic_module("configuration_jam.JamConfig", str(folder))
    assert not issubclass(found, JamForCausalLM)
    return found.from_pretrained(folder, config=config.from_pretrained(folder))


@pytest.mark.feature("Trainer", "label smoothing")
@pytest.mark.sampled
@every_mode
@pytest.mark.parametrize("pictures", [False, True], ids=["text", "pictures"])
def test_smoothing_is_that_of_shifted_labels_and_codes(pictures, mode, init, jam, tmp_path):
    model = jam("llama", mode, init)
    rows = (rows_with_pictures if pictures else rows_of_text)(model)
    run = trainer(model, tmp_path, rows[:4], label_smoothing_factor=SMOOTHING)
    assert first_loss(run) == pytest.approx(smoothed(model, rows[:4]), rel=1e-4)
    assert run.evaluate()["eval_loss"] == pytest.approx(smoothed(model, rows[:4]), rel=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["subclass", "adapter", "compiled", "compiled before", "remote code", "accumulated"])
@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING], ids=["plain", "smoothed"])
def test_the_loss_is_the_same_however_the_model_comes(smoothing, kind, fused, tmp_path, monkeypatch):
    folder = fused("llama", "uniform", "average")
    plain = JamForCausalLM.from_pretrained(folder).eval()
    rows = rows_of_text(plain)
    settings, used = {"label_smoothing_factor": smoothing}, rows[:4]
    model = JamForCausalLM.from_pretrained(folder)
    if kind == "subclass":
        model = Mine.from_pretrained(folder)
    elif kind == "adapter":
        model = get_peft_model(model, lora_config(model, r=2))
    elif kind == "compiled":
        settings |= {"torch_compile": True, "torch_compile_backend": "eager"}
    elif kind == "compiled before":
        model = torch.compile(model, backend="eager")
    elif kind == "remote code":
        model = remote(folder)
    else:
        settings |= {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
        used = rows
    monkeypatch.setattr(sys.modules[__name__], "SMOOTHING", smoothing)
    expected = smoothed(plain, used)
    assert first_loss(trainer(model, tmp_path, rows, **settings)) == pytest.approx(expected, rel=1e-4)


def test_smoothing_is_that_of_a_stock_class_with_the_same_weights(fused, parents, tmp_path):
    """Trained, not only measured: after some steps all weights agree, and the model has not learned to echo."""
    model = JamForCausalLM.from_pretrained(fused("llama", "uniform", "average"))
    stock = AutoModelForCausalLM.from_pretrained(parents("llama")[0])
    stock.model.load_state_dict(model.model.language_model.state_dict())
    stock.lm_head.load_state_dict(model.lm_head.state_dict())
    rows = rows_of_text(model)
    for candidate in (stock, model):
        run = trainer(candidate, tmp_path, rows, label_smoothing_factor=SMOOTHING, learning_rate=1e-2, max_steps=20)
        run.train()
    for name, weight in stock.model.state_dict().items():
        torch.testing.assert_close(model.model.language_model.state_dict()[name], weight, rtol=1e-3, atol=1e-4)
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        written = model.eval()(ids).logits.argmax(-1)
    assert (written[:, :-1] == ids[:, 1:]).float().mean() > 0.5 > (written == ids).float().mean()


@pytest.mark.feature("Trainer", "labels outside of `forward`: `compute_loss_func`, `compute_metrics`")
@pytest.mark.sampled
@every_mode
@pytest.mark.parametrize("collator", [None, as_processors_return], ids=["dict", "BatchFeature"])
def test_labels_outside_of_forward_are_codes(collator, mode, init, jam, tmp_path):
    model = jam("llama", mode, init)
    rows = rows_with_pictures(model)
    codes = model.get_image_tokens(torch.stack([row["pixel_values"] for row in rows]))
    expected = torch.stack([row["labels"] for row in rows])
    expected[:, 4 : 4 + codes.shape[1]] = codes
    read = torch.stack([row["input_ids"] for row in rows])
    read[:, 4 : 4 + codes.shape[1]] = codes
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(labels)
        flat = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch

    def metrics(prediction):
        seen.append(torch.from_numpy(prediction.label_ids))
        assert torch.equal(torch.from_numpy(prediction.inputs), read)
        return {}

    run = trainer(model, tmp_path, rows, loss=loss, metrics=metrics, collator=collator, include_for_metrics=["inputs"])
    with torch.no_grad():
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        inside = model.eval()(**batch).loss.item()
    assert first_loss(run) == pytest.approx(inside, rel=1e-4)
    assert run.evaluate()["eval_loss"] == pytest.approx(inside, rel=1e-4)
    assert len(seen) == 3 and all(torch.equal(labels, expected) for labels in seen)


def test_pictures_that_were_lost_are_not_learned_as_placeholders(jam, tmp_path):
    model = jam("llama", "cross", "preserving")
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows_with_pictures(model)]
    for settings in (
        {"label_smoothing_factor": SMOOTHING},
        {"loss": lambda outputs, labels, **_: outputs.logits.sum()},
    ):
        with pytest.raises(ValueError, match="no pixel_values came with them"):
            trainer(model, tmp_path, rows, **settings).train()


def test_other_models_are_trained_as_ever(parents, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(parents("llama")[0])
    run = trainer(model, tmp_path, rows_of_text(model)[:4], label_smoothing_factor=SMOOTHING)
    smoother = run.label_smoother
    first_loss(run)
    assert run.label_smoother is smoother
