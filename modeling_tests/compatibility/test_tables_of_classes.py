"""Static tables of class names and model types, in transformers and in what builds on it: a JAM is found in those that
matter.

Each test asks the library's own code that reads the table, not the table.
"""

import json
import logging
import os
import subprocess
import sys

import processes
import pytest
import transformers
from transformers import AutoConfig, pipeline
from transformers.modelcard import TrainingSummary
from transformers.models.auto import modeling_auto
from transformers.trainer import Trainer, TrainingArguments

from jam_hf import JamForCausalLM, JamProcessor
from jam_hf.model.class_names_jam import CAUSAL_LM, MODEL_TYPE, TABLES


model_manager = pytest.importorskip("transformers.cli.serving.model_manager")


@pytest.mark.feature("transformers serve", "the model is loaded, and takes text and pictures")
@pytest.mark.parametrize(("mode", "init"), [("uniform", "average"), ("width", "copy"), ("cross", "preserving")])
def test_serve_finds_the_class_and_the_modality(mode, init, fused):
    folder = str(fused("llama", mode, init))
    manager = model_manager.ModelManager(device="cpu")
    assert not hasattr(transformers, CAUSAL_LM)  # where it looks for what its table lacks
    model, processor = manager.load_model_and_processor(f"{folder}@main")
    try:
        assert isinstance(model, JamForCausalLM) and isinstance(processor, JamProcessor)
        assert manager.get_model_modality(model, processor) == model_manager.Modality.MULTIMODAL
        assert manager.get_model_modality(model, processor.tokenizer) == model_manager.Modality.LLM
    finally:
        manager.shutdown()


SERVED_ALONE = """
import json, sys
from transformers.cli.serving.model_manager import ModelManager
manager = ModelManager(device="cpu", trust_remote_code=True)
model, processor = manager.load_model_and_processor(sys.argv[1] + "@main")
print(json.dumps([type(model).__module__.split(".")[0], manager.get_model_modality(model, processor).value]))
manager.shutdown()
"""


@pytest.mark.feature("transformers serve", "remote code, without jam_hf")
def test_serve_with_remote_code_knows_the_modality(fused, tmp_path):
    """The table must be filled by what the config's file brings along: serve reads it before it loads the model."""
    folder = str(fused("llama", "uniform", "average"))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SERVED_ALONE, folder]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=processes.PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["transformers_modules", model_manager.Modality.MULTIMODAL.value]


def test_serve_lists_a_downloaded_jam(fused, tmp_path):
    repository = tmp_path / "models--someone--jam"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    config = fused("llama", "uniform", "average") / "config.json"
    (repository / "blobs" / "config").write_bytes(config.read_bytes())
    (repository / "snapshots" / commit / "config.json").symlink_to(repository / "blobs" / "config")
    found = model_manager.ModelManager.get_gen_models(str(tmp_path))
    assert [entry["id"] for entry in found] == ["someone/jam"]


def test_pipelines_do_not_call_it_unsupported(fused, caplog):
    folder = str(fused("llama", "uniform", "average"))
    logger = logging.getLogger("transformers")
    propagate, logger.propagate = logger.propagate, True
    try:
        for task in ("text-generation", "image-text-to-text"):
            pipeline(task, model=folder)
    finally:
        logger.propagate = propagate
    assert not [record for record in caplog.records if "is not supported for" in record.getMessage()]


def test_a_model_card_of_the_trainer_names_the_task(fused, tmp_path):
    model = JamForCausalLM.from_pretrained(fused("llama", "uniform", "average"))
    run = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    summary = TrainingSummary.from_trainer(run, dataset_args="none", dataset="none", dataset_metadata=[{}])
    assert summary.tasks == "image-text-to-text"


def test_lm_eval_takes_it_for_a_causal_model(fused, caplog):
    from lm_eval.models.huggingface import HFLM

    backend = HFLM.__new__(HFLM)
    config = AutoConfig.from_pretrained(fused("llama", "uniform", "average"))
    with caplog.at_level(logging.WARNING):
        backend._get_backend(config)
    assert backend.backend == "causal" and not caplog.records


def test_the_tables_hold_the_class_and_break_no_lookup():
    for table in TABLES:
        assert getattr(modeling_auto, table)[MODEL_TYPE] == CAUSAL_LM
        mapping = getattr(modeling_auto, table.removesuffix("_NAMES"))
        assert (
            JamForCausalLM in mapping.values()
        )  # registered, once, and nothing of transformers.models.jam is looked for
        assert len(mapping) == len(list(mapping.keys()))
