"""Licence, parents, recipe and what was done since go with a JAM wherever it is saved, by whomever."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from transformers import Trainer, TrainingArguments

from jam_hf import JamConfig, JamForCausalLM
from jam_hf.checkpoints.licences import licence_of
from jam_hf.data.collator import JamDataCollator
from jam_hf.evaluation.retention import certify
from jam_hf.fusion.fuse import plan_fusion, run_fusion
from jam_hf.training.recipes import RecipeSettings, train_causal_lm


@pytest.fixture
def folder(parents, vq, tmp_path):
    """A JAM of two parents on the Hub, both of one licence."""
    plan = plan_fusion(*parents("llama"), "cross", vq_model=vq)
    for parent, name in ((plan.text.parent, "a/text"), (plan.image.parent, "b/image")):
        parent.hub_id, parent.license = name, "mit"
    return run_fusion(plan, tmp_path / "jam")


def carries(folder, *done, fused_from=None):
    """The card of a folder names licence and parents and what was done; the recipe is the fusion's, byte for byte."""
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.base_model == ["a/text", "b/image"]
    assert card.data.base_model_relation == "merge" and {"jam", "jam-cross"} <= set(card.data.tags)
    assert "[a/text](https://huggingface.co/a/text)" in card.text and "| text parent |" in card.text
    assert ("not been trained jointly" in card.text) == (not done)
    for words in done:
        assert card.text.count(words) == 1, card.text
    if fused_from is not None:
        assert (folder / "fusion.yaml").read_bytes() == (fused_from / "fusion.yaml").read_bytes()
    return card


def dataset():
    return Dataset.from_list([{"input_ids": [1, 20 + i, 40 + i, 2]} for i in range(8)])


def settings(**changes):
    return RecipeSettings(max_steps=2, batch_size=2, warmup_steps=0, save_steps=1, **changes)


def trainer_of(model, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True
    )
    rows = [
        {"input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["input_ids"])} for row in dataset()
    ]
    return Trainer(model=model, args=arguments, train_dataset=rows)


def test_what_is_saved_again_carries_both(folder, tmp_path):
    carries(folder)
    JamForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    carries(tmp_path / "again", fused_from=folder)
    assert (tmp_path / "again" / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    JamConfig.from_pretrained(folder).save_pretrained(tmp_path / "config")
    carries(tmp_path / "config", fused_from=folder)
    JamForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")  # no other weights
    carries(tmp_path / "half", fused_from=folder)


def test_recipes_tell_what_they_did(folder, tmp_path):
    collator = JamDataCollator(0, JamConfig.from_pretrained(folder).vocab_size)
    first, second = tmp_path / "first", tmp_path / "second"
    train_causal_lm(JamForCausalLM.from_pretrained(folder), dataset(), first, settings(), collator)
    carries(first, "- trained: steps 2, batch_size 2, learning_rate 0.001, freeze vq", fused_from=folder)
    train_causal_lm(JamForCausalLM.from_pretrained(first), dataset(), second, settings(freeze="cross_only"), collator)
    card = carries(second, "freeze vq", "freeze cross_only", fused_from=folder)
    assert "weights were changed" not in card.text  # the recipes' own checkpoints are no other's doing
    model = JamForCausalLM.from_pretrained(second)
    model.lm_head.weight.data += 1
    for _ in range(2):
        model.save_pretrained(tmp_path / "edited")
    carries(
        tmp_path / "edited",
        "freeze vq",
        "freeze cross_only",
        "the weights were changed (by training",
        fused_from=folder,
    )


def test_a_stock_trainer_carries_both(folder, tmp_path):
    trainer = trainer_of(JamForCausalLM.from_pretrained(folder), tmp_path)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    for place in (tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-2", tmp_path / "saved"):
        carries(place, "the weights were changed", fused_from=folder)
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    card = carries(tmp_path / "run", "the weights were changed", fused_from=folder)
    assert "generated_from_trainer" in card.data.tags and "Training hyperparameters" in card.text


def test_adapters_and_what_is_merged_carry_both(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(JamForCausalLM.from_pretrained(folder), LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    card = carries(tmp_path / "adapter", fused_from=folder)
    assert card.data.library_name == "peft" and str(tmp_path) not in card.content
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    carries(tmp_path / "merged", "the weights were changed", fused_from=folder)
    native = JamForCausalLM.from_pretrained(folder)
    native.add_adapter(LoraConfig(r=2))
    native.save_pretrained(tmp_path / "native")
    carries(tmp_path / "native", fused_from=folder)


@pytest.mark.parametrize("what", ["model", "save_pretrained", "config"])
def test_what_is_pushed_carries_both(what, folder, tmp_path, monkeypatch):
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                (uploaded / operation.path_in_repo).write_bytes(file.read())

    other = SimpleNamespace(
        save=lambda path: open(path, "w").write("---\nlicense: mit\ntags: [x]\n---\n# Words of another\n")
    )
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *args, **kwargs: other)
    if what == "config":
        JamConfig.from_pretrained(folder).save_pretrained(str(tmp_path / "c"), push_to_hub=True, repo_id="a/b")
    elif what == "model":
        JamForCausalLM.from_pretrained(folder).push_to_hub("a/b")
    else:
        JamForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "s", push_to_hub=True, repo_id="a/b")
    card = carries(uploaded, fused_from=folder)
    assert what == "config" or ("Words of another" in card.text and "x" in card.data.tags)


def test_certify_writes_into_the_card_that_belongs_there(folder, parents, tmp_path):
    (tmp_path / "texts.txt").write_text("a small red circle\n\na ruby is red\n")
    (folder / "README.md").unlink()
    certify(folder, parents("llama")[0], texts=tmp_path / "texts.txt")
    assert carries(folder).text.count("## Retention") == 1


def test_folders_fused_before_carry_theirs_on(folder, tmp_path):
    config = JamConfig.from_pretrained(folder)
    config.provenance = None
    shutil.copytree(folder, tmp_path / "old")
    config.save_pretrained(tmp_path / "old")
    assert "provenance" not in (tmp_path / "old" / "config.json").read_text()
    JamForCausalLM.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "again")
    carries(tmp_path / "again", fused_from=folder)


CARDS = [
    ("license: mit", "mit"),
    ("license: [mit, apache-2.0]", "mit and apache-2.0"),
    ("license: {name: llama3, link: LICENSE}", "llama3"),
    ("license: other\nlicense_name: my-own", "my-own"),
    ('license: "mit\\n---\\nbase_model: c/d\\n"', "mit --- base_model: c/d"),
    ("license: 3", "3"),
    ("license: '| a | b <b>x</b> [y](z)'", "| a | b <b>x</b> [y](z)"),
    ("license: []", None),
    ("license: {", None),
    ("license: mit\neval_results: q\n1: 2", "mit"),  # other fields are not asked to be right
]


@pytest.mark.parametrize(("head", "expected"), CARDS)
def test_cards_of_others_are_data(head, expected, parents, vq, tmp_path):
    text = shutil.copytree(parents("llama")[0], tmp_path / "text")
    (text / "README.md").write_text(f"---\n{head}\n---\nwords\n")
    assert licence_of(text) == expected
    image = shutil.copytree(parents("llama")[1], tmp_path / "image")
    (image / "README.md").write_text("---\nlicense: bsd\n---\n")  # so that a warning quotes both
    plan = plan_fusion(text, image, "cross", vq_model=vq)
    card = ModelCard.load(run_fusion(plan, tmp_path / "jam") / "README.md")
    assert card.data.base_model is None and card.data.license == "other"
    row = next(line for line in card.text.splitlines() if line.startswith("| text parent |"))
    assert len(row.replace("\\|", "").split("|")) == 4 and "<b>" not in card.text.replace("\\<", "")
