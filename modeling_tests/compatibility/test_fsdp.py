"""Fully sharded and data-parallel training in two processes: the losses of one process, checkpoints that one process
loads.

The vocabulary is even: torch's FSDP2 lets a tied table of an odd length come apart, in a stock Llama as well.
accelerate takes FSDP for a matter of accelerators and falls back to plain data parallelism on CPUs without a word;
`fsdp_on_cpu` takes that decision back. All that follows it is accelerate's own code.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import processes
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import VQ_SETTINGS, parent_model, random_ids, randomise
from datasets import Dataset
from nightly import every_day
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from jam_hf import JamConfig, JamForCausalLM
from jam_hf.data.cm3 import CM3Settings
from jam_hf.data.collator import JamDataCollator
from jam_hf.training.recipes import RecipeSettings, train_causal_lm


SECTION = "Sharding"
STEPS = 3
CASES = {
    "uniform": ("uniform", "preserving", "llama"),
    "width": ("width", "preserving", "opt"),
    "cross-preserving": ("cross", "preserving", "llama"),
    "cross-paper": ("cross", "paper", "llama-tied"),
}
ALL = [(case.partition("-")[0], case) for case in CASES]
DAILY = {
    "accelerate": ALL[2],
    "native": ALL[0],
    "trainer-fsdp": ALL[1],
    "trainer-ddp": ALL[3],
}  # the others are nightly


def build(case: str) -> JamForCausalLM:
    mode, form, family = CASES[case]
    parent = parent_model(family, 300, 1, num_hidden_layers=2).config
    torch.manual_seed(0)
    model = JamForCausalLM(
        JamConfig(fusion_mode=mode, cross_form=form, text_config=parent, vq_config=copy.deepcopy(VQ_SETTINGS))
    )
    randomise(model, seed=5, std=0.1)
    model.tie_weights()
    return model


def documents(model: JamForCausalLM) -> list[dict[str, torch.Tensor]]:
    """For each step one batch of four rows, each with a picture; two processes take two rows each."""
    batches = []
    for step in range(STEPS):
        length = model.config.image_seq_length
        ids = random_ids(model, 4, length + 6, seed=step)
        ids[ids == model.config.image_token_id] = 20
        ids[:, 4 : 4 + length] = model.config.image_token_id
        pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1
        batches.append({"input_ids": ids, "labels": ids, "pixel_values": pixels})
    return batches


def train(model: Any, batches: list[dict[str, torch.Tensor]], backward: Any, optimizer: Any) -> list[float]:
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def share(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """This process's half of the rows of every batch."""
    rank = torch.distributed.get_rank()
    return [{name: tensor[2 * rank : 2 * rank + 2] for name, tensor in batch.items()} for batch in batches]


def mean(losses: list[float]) -> list[float]:
    """Over the processes; every row counts the same number of positions."""
    total = torch.tensor(losses)
    torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size()).tolist()


def fsdp_on_cpu() -> Any:
    begin = AcceleratorState.__init__

    def begin_with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    return mock.patch.object(AcceleratorState, "__init__", begin_with_fsdp)


def units_of(model: torch.nn.Module) -> list[str]:
    return sorted(name for name, module in model.named_modules() if isinstance(module, FSDPModule))


def accelerate_worker(folder: str, kind: str) -> dict[str, Any]:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = JamForCausalLM.from_pretrained(f"{folder}/start")
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    units = units_of(model)
    losses = mean(train(model, share(documents(model)), accelerator.backward, optimizer))
    unwrapped = accelerator.unwrap_model(model)
    state = accelerator.get_state_dict(model)
    unwrapped.save_pretrained(
        f"{folder}/{kind}",
        is_main_process=accelerator.is_main_process,
        state_dict=state,
        save_function=accelerator.save,
    )
    accelerator.save_state(f"{folder}/state")
    before = state
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    accelerator.load_state(f"{folder}/state")
    after = accelerator.get_state_dict(model)
    return {"units": units, "losses": losses, "resumed": all(torch.equal(after[n], t) for n, t in before.items())}


def native_worker(folder: str, kind: str) -> dict[str, Any]:
    model = JamForCausalLM.from_pretrained(f"{folder}/start", distributed_config=DistributedConfig(fsdp_size=2)).train()
    units = units_of(model)
    losses = mean(train(model, share(documents(model)), torch.Tensor.backward, optimizer_of(model)))
    model.save_pretrained(f"{folder}/{kind}")
    return {"units": units, "losses": losses}


def trainer_worker(folder: str, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    model = JamForCausalLM.from_pretrained(f"{folder}/start")
    rows = [{name: t[i] for name, t in batch.items()} for batch in documents(model) for i in range(4)]
    arguments = TrainingArguments(
        output_dir=f"{folder}/{kind}",
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(f"{folder}/{kind}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"units": units_of(trainer.model_wrapped), "losses": losses}


FSDP_OF_ACCELERATE_LAUNCH = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def recipe(folder: Path, name: str, batch_size: int, masked: bool = False) -> dict[str, Any]:
    """A run of `train_causal_lm` on documents of unlike lengths, evaluated on an odd number of them."""
    model = JamForCausalLM.from_pretrained(folder / "start")
    rows = [[1, *random_ids(model, 1, 3 + 2 * i % 7, seed=i)[0].tolist(), 2] for i in range(12)]
    documents = Dataset.from_dict({"input_ids": rows})
    cm3 = CM3Settings.from_config(model.config, mean_spans=3.0) if masked else None
    collator, seen = JamDataCollator(0, model.config.vocab_size, cm3), []
    with mock.patch.object(JamDataCollator, "_mask", autospec=True, side_effect=JamDataCollator._mask) as masks:
        history = train_causal_lm(
            model,
            documents,
            folder / name,
            RecipeSettings(max_steps=STEPS, batch_size=batch_size, warmup_steps=0, logging_steps=1, eval_steps=STEPS),
            collator,
            {"rest": documents.select(range(5))},
        )
        seen = [call.args[3].bit_generator.state["state"]["state"] for call in masks.call_args_list]
    return {"history": history, "generators": seen, "units": units_of(model)}


def recipe_worker(root: str, case: str) -> dict[str, Any]:
    folder = Path(root) / case
    found = {"ddp": recipe(folder, "ddp", 2, masked=True)}
    AcceleratorState._reset_state()
    with fsdp_on_cpu(), mock.patch.dict(os.environ, FSDP_OF_ACCELERATE_LAUNCH):
        found["fsdp"] = recipe(folder, "recipe", 2)
        AcceleratorState._reset_state()
        settings = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
        found["smoothed"] = trainer_worker(str(folder), "smoothed", settings | {"label_smoothing_factor": 0.1})
    return found


WORKERS = {
    "accelerate": (accelerate_worker, ()),
    "native": (native_worker, ()),
    "trainer-fsdp": (
        trainer_worker,
        ({"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}},),
    ),
    "trainer-ddp": (trainer_worker, ({},)),
}


def cases_worker(root: str, kind: str, cases: list[str]) -> dict[str, Any]:
    worker, arguments = WORKERS[kind]
    results = {}
    for case in cases:
        AcceleratorState._reset_state()
        with fsdp_on_cpu():
            results[case] = worker(f"{root}/{case}", kind, *arguments)
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pytestconfig):
    """`trained(kind, case)` -> folder, what the workers of that kind return; and what one process finds for the
    case.
    """
    root = tmp_path_factory.mktemp("fsdp")
    for case in CASES:
        build(case).save_pretrained(root / case / "start")
    parallel: dict[str, Any] = {}
    alone: dict[str, Any] = {}

    def get(kind: str, case: str) -> tuple[Path, dict[str, Any], tuple[list[float], JamForCausalLM]]:
        if kind not in parallel:
            parallel[kind] = {}  # if it fails once, it is not tried for every case
            cases = list(CASES) if pytestconfig.getoption("--nightly") else [DAILY[kind][1]]
            parallel[kind] = processes.run(cases_worker, 2, str(root), kind, cases)[0]
        if case not in alone:
            model = JamForCausalLM.from_pretrained(root / case / "start").train()
            alone[case] = train(model, documents(model), torch.Tensor.backward, optimizer_of(model)), model.eval()
        if case not in parallel[kind]:
            pytest.fail(f"the processes of {kind} failed, see the first test that needed them")
        return root / case / kind, parallel[kind][case], alone[case]

    return get


@torch.no_grad()
def check_checkpoint(folder: Path, model: JamForCausalLM) -> None:
    """The folder loads in one process, and is the model that one process trained; the VQ model is untouched, bit
    for bit.
    """
    loaded = JamForCausalLM.from_pretrained(folder).eval()
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        if "vq_model" in name:
            assert torch.equal(tensor, expected[name]), name
        else:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    batch = documents(model)[0]
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-3, atol=1e-3)


def check(kind: str, case: str, trained: Any) -> dict[str, Any]:
    folder, parallel, (losses, model) = trained(kind, case)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3)  # it learns
    assert parallel["losses"] == pytest.approx(losses, rel=1e-4)
    check_checkpoint(folder, model)
    return parallel


def check_units(units: list[str]) -> None:
    """One depth, one unit."""
    depths = [unit for unit in units if ".layers." in unit]
    assert depths == [f"model.language_model.layers.{depth}" for depth in range(2)]


@pytest.fixture(scope="module")
def recipes_in_two_processes(tmp_path_factory):
    """Folder, what two processes found, what one process finds."""
    root, case = tmp_path_factory.mktemp("recipes"), "cross-preserving"
    build(case).save_pretrained(root / case / "start")
    parallel = processes.run(recipe_worker, 2, str(root), case)
    alone = recipe(root / case, "alone", 4)
    model = JamForCausalLM.from_pretrained(root / case / "start").train()
    rows = documents(model)
    rows = [{name: tensor[i] for name, tensor in batch.items()} for batch in rows for i in range(4)]
    return root / case, parallel, alone, smoothed_losses(model, rows)


def smoothed_losses(model: JamForCausalLM, rows: list[dict[str, torch.Tensor]]) -> list[float]:
    """Plain arithmetic, and plain gradient descent: four rows a step, the codes of the pictures as targets."""
    optimizer, losses = optimizer_of(model), []
    for start in range(0, len(rows), 4):
        batch = {name: torch.stack([row[name] for row in rows[start : start + 4]]) for name in rows[0]}
        ids = model.model.insert_image_tokens(batch["input_ids"], batch["pixel_values"])
        log_p = model(ids).logits[:, :-1].log_softmax(-1)
        loss = (-0.9 * log_p.gather(-1, ids[:, 1:, None])[..., 0] - 0.1 * log_p.mean(-1)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.feature(
    SECTION, "`train_causal_lm` with FSDP2: trained, evaluated by tokens, saved whole", modes=("cross",)
)
def test_a_recipe_under_fsdp_is_that_of_one_process(recipes_in_two_processes):
    folder, parallel, alone, _ = recipes_in_two_processes
    check_units(parallel[0]["fsdp"]["units"])
    for name in ("loss", "eval_rest_loss"):
        found, expected = (
            [row[name] for row in h if name in row] for h in (parallel[0]["fsdp"]["history"], alone["history"])
        )
        assert found and found == pytest.approx(expected, rel=1e-3), name
    assert not (folder / "recipe.run").exists()
    saved, expected = (JamForCausalLM.from_pretrained(folder / name).state_dict() for name in ("recipe", "alone"))
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-4, msg=name)
    assert json.loads((folder / "recipe" / "config.json").read_text())["architectures"] == ["JamForCausalLM"]


def test_data_parallel_processes_mask_in_their_own_ways(recipes_in_two_processes):
    _, parallel, _, _ = recipes_in_two_processes
    first, second = (set(found["ddp"]["generators"]) for found in parallel)
    assert first and second and not first & second


@pytest.mark.feature("Trainer", "label smoothing under FSDP2", modes=("cross",))
def test_smoothing_under_fsdp_is_that_of_shifted_labels_and_codes(recipes_in_two_processes):
    _, parallel, _, expected = recipes_in_two_processes
    assert parallel[0]["smoothed"]["losses"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.feature(SECTION, "FSDP2 by accelerate: same losses, full and sharded checkpoints")
@pytest.mark.parametrize(("mode", "case"), every_day(ALL, DAILY["accelerate"]))
def test_fsdp_by_accelerate(mode, case, trained):
    parallel = check("accelerate", case, trained)
    check_units(parallel["units"])
    assert "model.vq_model" in parallel["units"]
    assert parallel["resumed"]


@pytest.mark.feature(SECTION, "FSDP2 by `DistributedConfig(fsdp_size=...)`")
@pytest.mark.parametrize(("mode", "case"), every_day(ALL, DAILY["native"]))
def test_fsdp_by_transformers(mode, case, trained):
    check_units(check("native", case, trained)["units"])


@pytest.mark.feature(SECTION, "`Trainer` with FSDP2")
@pytest.mark.parametrize(("mode", "case"), every_day(ALL, DAILY["trainer-fsdp"]))
def test_trainer_with_fsdp(mode, case, trained):
    check_units(check("trainer-fsdp", case, trained)["units"])


@pytest.mark.feature(SECTION, "`Trainer` with data parallelism (DDP)")
@pytest.mark.parametrize(("mode", "case"), every_day(ALL, DAILY["trainer-ddp"]))
def test_trainer_with_data_parallelism(mode, case, trained):
    assert not check("trainer-ddp", case, trained)["units"]
