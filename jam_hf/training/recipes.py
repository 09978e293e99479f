"""Training recipes over plain `transformers.Trainer`: settings, freezing presets, and a run that can be interrupted.

It knows causal LMs by their interface: stock parents and JamForCausalLM alike. Documents are the business of data/.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import EvalPrediction

from ..contents import name_the_base
from ..data.collator import JamDataCollator, supports_packing
from ..data.seeds import check_seed
from ..files import check_free, folder_lock, read_json, whole_folder, write_whole
from ..provenance import record
from ..version import __version__
from . import fingerprints
from .muon import MuonAdamW, muon_parameter_groups
from .saving import check_savable


@dataclass(frozen=True)
class RecipeSettings:
    """Hyper-parameters of one training run.

    Args:
        batch_size: documents per device and batch. gradient_accumulation_steps: batches per optimizer step.
        learning_rate: the highest, of AdamW. muon_learning_rate: the highest of Muon, for the matrices of the layers;
            0: AdamW for all.
        warmup_steps: of linear warm-up. schedule: of the learning rate, as in `TrainingArguments`. decay_steps: last
            steps of the schedule "warmup_stable_decay".
        bf16: bfloat16 autocast, for accelerators.
        seed: of initialisation, order and masking.
        eval_steps: steps between evaluations; 0: none. save_steps: between checkpoints that a killed run continues
            from. logging_steps: between points of the loss curve.
        freeze: what stays as it is, one of FREEZE_PRESETS.
        group_by_length: batches of documents of like length, for less padding. packing: short documents share rows, for
            less padding in batches that stay mixed.
        gradient_checkpointing: trade compute for memory.
        attn_implementation: while training; "eager" is the fastest for short documents on a CPU.
        float32_matmul_precision: "highest", "high" or "medium", as in `torch.set_float32_matmul_precision`.
    """

    max_steps: int = 1000
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.0
    warmup_steps: int = 50
    schedule: str = "cosine"
    decay_steps: int = 0
    weight_decay: float = 0.01
    beta2: float = 0.98
    max_grad_norm: float = 1.0
    bf16: bool = False
    seed: int = 0
    eval_steps: int = 0
    save_steps: int = 200
    logging_steps: int = 10
    freeze: str = "vq"
    group_by_length: bool = False
    packing: bool = False
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    float32_matmul_precision: str | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed, "RecipeSettings")
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "save_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"RecipeSettings: {name} must be at least 1, got {getattr(self, name)}.")
        if (self.schedule == "warmup_stable_decay") != (self.decay_steps > 0):
            raise ValueError(
                "RecipeSettings: the schedule warmup_stable_decay and decay_steps need each other, got schedule "
                f"{self.schedule!r} and decay_steps {self.decay_steps}."
            )
        if self.float32_matmul_precision not in (None, "highest", "high", "medium"):
            raise ValueError(
                "RecipeSettings: float32_matmul_precision must be 'highest', 'high', 'medium' or None, got "
                f"{self.float32_matmul_precision!r}."
            )
        if self.freeze not in FREEZE_PRESETS:
            raise ValueError(f"RecipeSettings: freeze must be one of {', '.join(FREEZE_PRESETS)}, got {self.freeze!r}.")


# Trainable parameters of each preset, by name; a VQ model (a JAM's, a Chameleon's) is frozen in all, so "none" is "vq".
FREEZE_PRESETS = {
    "none": r".*",
    "vq": r".*",
    "cross_only": r".*(text_cross|image_cross|output_projection|lm_head|image_head)\b.*",
    "text_stream": r".*(text_layer|text_stem|text_cross|lm_head)\b.*",
    "image_stream": r".*(image_layer|image_stem|image_cross|image_head)\b.*",
}

# CM3leon's 7B runs [C], for who has the machines: batches of 8M and 2M tokens.
PAPER_PRETRAINING = RecipeSettings(learning_rate=1.2e-4, warmup_steps=1500, max_steps=300_000, bf16=True)
PAPER_INSTRUCT = RecipeSettings(learning_rate=5e-5, warmup_steps=150, max_steps=15_000, bf16=True)


def freeze(model: PreTrainedModel, preset: str) -> list[str]:
    """Make trainable what `preset` (see FREEZE_PRESETS) says, and nothing of the VQ model.

    In a model with an adapter (peft's `get_peft_model`, or `add_adapter`), what is frozen already stays so.

    Returns:
        the names of the trainable parameters.
    Raises:
        ValueError: for an unknown preset, or one that leaves nothing to train in this model.
    """
    if preset not in FREEZE_PRESETS:
        raise ValueError(f"freeze: preset must be one of {', '.join(FREEZE_PRESETS)}, got {preset!r}.")
    pattern = re.compile(FREEZE_PRESETS[preset])
    # Every preset but these two names parts that only a cross JAM has; in another model its lm_head would match alone.
    if preset not in ("none", "vq") and not any("_cross." in name for name, _ in model.named_parameters()):
        raise ValueError(
            f"freeze: preset {preset!r} leaves nothing to train in a {type(model).__name__} without cross blocks; "
            "use 'none' or 'vq'."
        )
    trainable, adapted = [], has_adapter(model)
    for name, parameter in model.named_parameters():
        keep = pattern.fullmatch(name) is not None and not {"vq_model", "vqmodel"} & set(name.split("."))
        keep = keep and (parameter.requires_grad or not adapted)
        parameter.requires_grad_(keep)
        if keep:
            trainable.append(name)
    if not trainable:
        raise ValueError(f"freeze: preset {preset!r} leaves nothing to train in a {type(model).__name__}.")
    return trainable


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether peft's adapters are in `model`, around it (`get_peft_model`) or inside (`add_adapter`)."""
    return hasattr(model, "peft_config") and bool(model.peft_config)


def _check_that_all_is_saved(model: PreTrainedModel) -> None:
    """An adapter is saved without its base: what else was made trainable by hand would be lost."""
    from peft import get_peft_model_state_dict

    saved = {
        tensor.data_ptr()
        for adapter in model.peft_config
        for tensor in get_peft_model_state_dict(model, adapter_name=adapter).values()
    }
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in saved
    ]
    if lost:
        raise ValueError(
            f"{len(lost)} parameter(s) would be trained that the adapter does not save, e.g. {lost[0]}. Name their "
            "modules in modules_to_save of the peft config, or freeze them."
        )


@contextlib.contextmanager
def fast_arithmetic(model: PreTrainedModel, settings: RecipeSettings) -> Iterator[None]:
    """The attention and the precision of matrix products that `settings` ask for, until the block ends."""
    attention, precision = model.config._attn_implementation, torch.get_float32_matmul_precision()
    try:
        if settings.attn_implementation is not None:
            model.set_attn_implementation(settings.attn_implementation)
        if settings.float32_matmul_precision is not None:
            torch.set_float32_matmul_precision(settings.float32_matmul_precision)
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


class _AlreadyTrained(Exception):
    """The checkpoint that a run continues from is that of its last step."""


class _Continue(TrainerCallback):
    """When a run continues, the Trainer skips the batches seen without collating them; the masking must skip them too.

    Where no step is left, the Trainer would take one all the same, so it is stopped here: its model and its state are
    those of the checkpoint by now.
    """

    def __init__(self, collator: JamDataCollator):
        self.collator = collator

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise _AlreadyTrained
        # The last step of an epoch may have fewer batches than gradient_accumulation_steps.
        batches = len(kwargs["train_dataloader"])
        epochs, steps = divmod(state.global_step, -(-batches // args.gradient_accumulation_steps))
        self.collator.skip_batches(epochs * batches + steps * args.gradient_accumulation_steps)


class _Progress(ProgressCallback):
    """One bar, with the loss in it, instead of a line for each point of the curve; evaluations are still written
    out.
    """

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")
        elif logs and any(key.startswith("eval_") for key in logs):
            super().on_log(args, state, control, logs=logs, **kwargs)


def _last_whole_checkpoint(run_dir: Path) -> str | None:
    """The newest checkpoint that was written to its end: `trainer_state.json` is what the Trainer writes last."""
    folders = [path for path in run_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            read_json(folder / "trainer_state.json")
        except (OSError, ValueError):
            continue  # the run was killed while it wrote this one
        return str(folder)
    return None


# What may change between the parts of an interrupted run: it decides what is reported, not what is learned.
_REPORTING = ("save_steps", "logging_steps", "eval_steps")


def _check_continues(run_dir: Path, settings: RecipeSettings, beginning: dict[str, Any]) -> None:
    """Refuse to continue a run that began with something else (see fingerprints.py); leave this behind for the next
    time.
    """
    described = {k: v for k, v in asdict(settings).items() if k not in _REPORTING} | beginning
    path = run_dir / "settings.json"
    if path.is_file():
        before = read_json(path)
        changed = sorted(k for k in described if before.get(k) != described[k])
        if changed:
            raise ValueError(
                f"'{run_dir}' holds an interrupted run that began with other settings, data or weights "
                f"({', '.join(changed)}). Delete it to begin again, or go on with what it began with."
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(described, indent=1) + "\n")


def _in_main_process(trainer: Trainer, check: Any) -> None:
    """Run `check()` in the main process; what it raises is raised in all, so that none waits for the others for
    ever.
    """
    error: list[Exception | None] = [None]
    if trainer.is_world_process_zero():
        try:
            check()
        except Exception as raised:
            error[0] = raised
    broadcast_object_list(error)
    if error[0] is not None:
        raise error[0]


class _LengthGroupedSampler(torch.utils.data.Sampler):
    """Batches of documents of like length, in random order; all of it follows from seed and epoch.

    The stock sampler goes from long to short, over and over: where long means dialogues and short means texts, training
    would end on the one kind. It also draws on torch's generator, so a continued run would have another order.
    """

    def __init__(self, batch_size: int, dataset: Dataset, seed: int, batches_together: int = 50):
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.together = batches_together * batch_size
        self.lengths = np.array([len(ids) for ids in dataset["input_ids"]])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        parts = [order[i : i + self.together] for i in range(0, len(order), self.together)]
        order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts])
        whole = len(order) // self.batch_size  # a smaller batch, if there is one, stays the last
        batches = order[: whole * self.batch_size].reshape(whole, self.batch_size)
        yield from rng.permutation(batches).reshape(-1).tolist()
        yield from order[whole * self.batch_size :].tolist()


def _loss_of_rows(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Of each row, the sum of -log p of its labels and their number: `[B, T, V]`, `[B, T]` -> float32 `[B, 2]`."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:].to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    return torch.stack((losses.sum(1), (targets != -100).sum(1)), dim=1)


def _loss_by_tokens(prediction: EvalPrediction) -> dict[str, float]:
    """In place of the Trainer's mean of the means of batches, in which a token of a short batch counts for more."""
    total, count = np.asarray(prediction.predictions, dtype=np.float64).sum(0)
    return {"loss": float(total / count)}


class _JamTrainer(Trainer):
    """Evaluates by tokens, on documents as they are, without CM3; groups by length in an order that can be
    continued.
    """

    def __init__(self, *args: Any, muon_learning_rate: float = 0.0, **kwargs: Any):
        super().__init__(*args, compute_metrics=_loss_by_tokens, preprocess_logits_for_metrics=_loss_of_rows, **kwargs)
        self.muon_learning_rate = muon_learning_rate

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.muon_learning_rate:
            args = self.args
            groups = muon_parameter_groups(
                self.model if model is None else model, self.muon_learning_rate, args.learning_rate, args.weight_decay
            )
            self.optimizer = MuonAdamW(
                groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
            )
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _LengthGroupedSampler(size, dataset, self.args.seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        training_collator = self.data_collator
        self.data_collator = replace(training_collator, cm3=None, packing=False)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator


def train_causal_lm(
    model: PreTrainedModel,
    train_dataset: Dataset,
    output_dir: str | os.PathLike,
    settings: RecipeSettings,
    collator: JamDataCollator,
    eval_datasets: dict[str, Dataset] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> list[dict[str, float]]:
    """Train a causal LM and save it, whole or not at all, in `output_dir`.

    A killed run continues from its last checkpoint (in `<output_dir>.run`) when it is started again.

    Args:
        train_dataset, eval_datasets: column `input_ids`; evaluation losses carry the datasets' names.
        tokenizer: anything with `save_pretrained`, saved beside the model.
        overwrite: replace a non-empty `output_dir`, once the model is trained.
    Under peft the adapter is trained and saved, and what peft froze stays as it is; under FSDP2 (`accelerate launch`)
    the whole model is saved. Evaluation losses are means over tokens.

    Returns:
        the loss curve, `{"step", "loss", ...}` as the Trainer logs it; also in `history.json`.
    Raises:
        ValueError: if `<output_dir>.run` holds a run that began with other settings, documents, masking or weights, if
            the model cannot keep packed documents apart, if something is trainable that its adapter does not save, or
            if the model could not be saved afterwards (asked before the first step).
        FileExistsError: if `output_dir` holds anything and `overwrite` is False, or another run writes it; before the
            first step. If it was filled while the model was trained, the error says where the model lies.
    """
    if settings.packing or collator.packing:
        if not supports_packing(model.config):
            raise ValueError(
                f"packing: in a {type(model).__name__} ({model.config.model_type}) packed documents would see each "
                "other. Use RecipeSettings(packing=False); group_by_length=True saves padding as well."
            )
        collator = replace(collator, packing=True)
    check_savable(model, tokenizer)
    set_seed(settings.seed)
    freeze(model, settings.freeze)
    if has_adapter(model):
        _check_that_all_is_saved(model)
    run_dir = Path(f"{output_dir}.run")
    arguments = TrainingArguments(
        output_dir=str(run_dir),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=settings.schedule,
        lr_scheduler_kwargs=(
            {"num_decay_steps": settings.decay_steps, "decay_type": "linear"} if settings.decay_steps else None
        ),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        seed=settings.seed,
        data_seed=settings.seed,
        eval_strategy="steps" if settings.eval_steps and eval_datasets else "no",
        eval_steps=settings.eval_steps or None,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=1,
        logging_steps=settings.logging_steps,
        activation_checkpointing=settings.gradient_checkpointing,
        report_to="none",
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if settings.group_by_length else "random",
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    processes, main = arguments.world_size, arguments.process_index == 0
    if main:
        check_free(output_dir, overwrite)  # before the Trainer makes its folder
    beginning = fingerprints.of_run(model, train_dataset, collator, processes) if main else {}
    trainer = _JamTrainer(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_datasets,
        data_collator=collator,
        callbacks=[_Continue(collator), *(callbacks or [])],
        muon_learning_rate=settings.muon_learning_rate,
    )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Progress)
    locks: list[Any] = []

    def begin() -> None:
        check_free(output_dir, overwrite)
        locks.append(held.enter_context(folder_lock(output_dir)))
        _check_continues(run_dir, settings, beginning)

    with contextlib.ExitStack() as held:
        _in_main_process(trainer, begin)
        with fast_arithmetic(model, settings), contextlib.suppress(_AlreadyTrained):
            trainer.train(resume_from_checkpoint=_last_whole_checkpoint(run_dir))
        history = [row for row in trainer.state.log_history if "loss" in row or any(k.startswith("eval_") for k in row)]
        # Weights in shards come together in all processes at once; the main process writes them.
        state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
        place: Any = whole_folder(output_dir, overwrite, locks[0]) if main else tempfile.TemporaryDirectory()
        facts = {
            "steps": settings.max_steps,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
        }
        record(model, "trained", **facts, freeze=settings.freeze, documents=len(train_dataset), jam_hf=__version__)
        with place as folder:
            model.save_pretrained(folder, is_main_process=main, state_dict=state)
            if main:
                name_the_base(folder)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
                described = {"settings": asdict(settings), "history": history}
                write_whole(folder / "history.json", json.dumps(described, indent=1) + "\n")
        if main:
            shutil.rmtree(run_dir, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return history
