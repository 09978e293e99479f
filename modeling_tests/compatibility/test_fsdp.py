"""Fully sharded and data-parallel training in two processes: the losses of one process, checkpoints that one process loads.

The vocabulary is even: torch's FSDP2 lets a tied table of an odd length come apart, in a stock Llama as well. accelerate
takes FSDP for a matter of accelerators and falls back to plain data parallelism on CPUs without a word; `fsdp_on_cpu` takes
that decision back. All that follows it is accelerate's own code.
"""

import copy
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
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from jam_hf import JamConfig, JamForCausalLM


SECTION = "Sharding"
STEPS = 3
CASES = {
    "uniform": ("uniform", "preserving", "llama"),
    "width": ("width", "preserving", "opt"),
    "cross-preserving": ("cross", "preserving", "llama"),
    "cross-paper": ("cross", "paper", "llama-tied"),
}
ALL = [(case.partition("-")[0], case) for case in CASES]


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
        f"{folder}/{kind}", is_main_process=accelerator.is_main_process, state_dict=state, save_function=accelerator.save
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


WORKERS = {
    "accelerate": (accelerate_worker, ()),
    "native": (native_worker, ()),
    "trainer-fsdp": (
        trainer_worker,
        ({"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}},),
    ),
    "trainer-ddp": (trainer_worker, ({},)),
}


def all_cases_worker(root: str, kind: str) -> dict[str, Any]:
    worker, arguments = WORKERS[kind]
    results = {}
    for case in CASES:
        AcceleratorState._reset_state()
        with fsdp_on_cpu():
            results[case] = worker(f"{root}/{case}", kind, *arguments)
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(kind, case)` -> folder, what the workers of that kind return; and what one process finds for the case."""
    root = tmp_path_factory.mktemp("fsdp")
    for case in CASES:
        build(case).save_pretrained(root / case / "start")
    parallel: dict[str, Any] = {}
    alone: dict[str, Any] = {}

    def get(kind: str, case: str) -> tuple[Path, dict[str, Any], tuple[list[float], JamForCausalLM]]:
        if kind not in parallel:
            parallel[kind] = {}  # if it fails once, it is not tried for every case
            parallel[kind] = processes.run(all_cases_worker, 2, str(root), kind, limit=200)[0]
        if case not in alone:
            model = JamForCausalLM.from_pretrained(root / case / "start").train()
            alone[case] = train(model, documents(model), torch.Tensor.backward, optimizer_of(model)), model.eval()
        if case not in parallel[kind]:
            pytest.fail(f"the processes of {kind} failed, see the first test that needed them")
        return root / case / kind, parallel[kind][case], alone[case]

    return get


@torch.no_grad()
def check_checkpoint(folder: Path, model: JamForCausalLM) -> None:
    """The folder loads in one process, and is the model that one process trained; the VQ model is untouched, bit for bit."""
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


@pytest.mark.feature(SECTION, "FSDP2 by accelerate: same losses, full and sharded checkpoints")
@pytest.mark.parametrize(("mode", "case"), ALL)
def test_fsdp_by_accelerate(mode, case, trained):
    parallel = check("accelerate", case, trained)
    check_units(parallel["units"])
    assert "model.vq_model" in parallel["units"]
    assert parallel["resumed"]


@pytest.mark.feature(SECTION, "FSDP2 by `DistributedConfig(fsdp_size=...)`")
@pytest.mark.parametrize(("mode", "case"), ALL)
def test_fsdp_by_transformers(mode, case, trained):
    check_units(check("native", case, trained)["units"])


@pytest.mark.feature(SECTION, "`Trainer` with FSDP2")
@pytest.mark.parametrize(("mode", "case"), ALL)
def test_trainer_with_fsdp(mode, case, trained):
    check_units(check("trainer-fsdp", case, trained)["units"])


@pytest.mark.feature(SECTION, "`Trainer` with data parallelism (DDP)")
@pytest.mark.parametrize(("mode", "case"), ALL)
def test_trainer_with_data_parallelism(mode, case, trained):
    assert not check("trainer-ddp", case, trained)["units"]
