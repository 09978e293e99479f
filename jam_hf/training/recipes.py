"""Training recipes over plain `transformers.Trainer`: settings, freezing presets, and a run that can be interrupted.

It knows causal LMs by their interface: stock parents and JamForCausalLM alike. What a document is, is documents.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..fusion.checkpoint import whole_folder
from .collator import JamDataCollator


@dataclass(frozen=True)
class RecipeSettings:
    """Hyper-parameters of one training run; the fields drive Python and the command line alike."""

    max_steps: int = field(default=1000, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=32, metadata={"help": "documents per device and step"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches per optimizer step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate (AdamW)"})
    warmup_steps: int = field(default=50, metadata={"help": "steps of linear warm-up"})
    schedule: str = field(default="cosine", metadata={"help": "learning rate schedule, as in TrainingArguments"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay"})
    beta2: float = field(default=0.98, metadata={"help": "second AdamW beta"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping"})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast (accelerators)"})
    seed: int = field(default=0, metadata={"help": "seed of initialisation, order and masking"})
    eval_steps: int = field(default=0, metadata={"help": "steps between evaluations; 0: none"})
    save_steps: int = field(default=200, metadata={"help": "steps between checkpoints that a killed run continues from"})
    logging_steps: int = field(default=10, metadata={"help": "steps between points of the loss curve"})
    freeze: str = field(default="vq", metadata={"help": "what stays as it is: see FREEZE_PRESETS"})
    group_by_length: bool = field(default=False, metadata={"help": "batches of documents of like length: less padding"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "trade compute for memory"})

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "save_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"RecipeSettings: {name} must be at least 1, got {getattr(self, name)}.")
        if self.freeze not in FREEZE_PRESETS:
            raise ValueError(f"RecipeSettings: freeze must be one of {', '.join(FREEZE_PRESETS)}, got {self.freeze!r}.")


# Trainable parameters of each preset, by name; the VQ model is frozen in all of them, so "none" and "vq" are the same.
FREEZE_PRESETS = {
    "none": r".*",
    "vq": r".*",
    "cross_only": r".*(text_cross|image_cross|output_projection|lm_head|image_head)\b.*",
    "text_stream": r".*(text_layer|text_stem|text_cross|lm_head)\b.*",
    "image_stream": r".*(image_layer|image_stem|image_cross|image_head)\b.*",
}

# The paper's 7B runs, for who has the machines [C]: batches of 8M and 2M tokens.
PAPER_PRETRAINING = RecipeSettings(learning_rate=1.2e-4, warmup_steps=1500, max_steps=300_000, bf16=True)
PAPER_INSTRUCT = RecipeSettings(learning_rate=5e-5, warmup_steps=150, max_steps=15_000, bf16=True)


def freeze(model: PreTrainedModel, preset: str) -> list[str]:
    """Make trainable what `preset` (see FREEZE_PRESETS) says, and nothing of the VQ model.

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
    trainable = []
    for name, parameter in model.named_parameters():
        keep = pattern.fullmatch(name) is not None and "vq_model." not in name
        parameter.requires_grad_(keep)
        if keep:
            trainable.append(name)
    if not trainable:
        raise ValueError(f"freeze: preset {preset!r} leaves nothing to train in a {type(model).__name__}.")
    return trainable


class _Continue(TrainerCallback):
    """When a run continues, the Trainer skips the batches seen without collating them; the masking must skip them too."""

    def __init__(self, collator: JamDataCollator):
        self.collator = collator

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # The last step of an epoch may have fewer batches than gradient_accumulation_steps.
        batches = len(kwargs["train_dataloader"])
        epochs, steps = divmod(state.global_step, -(-batches // args.gradient_accumulation_steps))
        self.collator.skip_batches(epochs * batches + steps * args.gradient_accumulation_steps)


def _last_whole_checkpoint(run_dir: Path) -> str | None:
    """The newest checkpoint that was written to its end: `trainer_state.json` is what the Trainer writes last."""
    folders = [path for path in run_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # the run was killed while it wrote this one
        return str(folder)
    return None


class _SeededLengthGroupedSampler(LengthGroupedSampler):
    """Its order follows from seed and epoch; the stock one draws on torch's generator, so a continued run has another order."""

    def __init__(self, batch_size: int, dataset: Dataset, seed: int):
        super().__init__(batch_size, dataset, generator=torch.Generator().manual_seed(seed))
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


class _JamTrainer(Trainer):
    """Evaluates on documents as they are, without CM3 masking, and groups by length in an order that can be continued."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _SeededLengthGroupedSampler(size, dataset, self.args.seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        training_collator = self.data_collator
        self.data_collator = replace(training_collator, cm3=None)
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
) -> list[dict[str, float]]:
    """Train a causal LM and save it, whole or not at all, in `output_dir`.

    A killed run continues from its last checkpoint (in `<output_dir>.run`) when it is started again.

    Args:
        train_dataset, eval_datasets: column `input_ids`; evaluation losses carry the datasets' names.
        tokenizer: anything with `save_pretrained`, saved beside the model.
    Returns:
        the loss curve, `{"step", "loss", ...}` as the Trainer logs it; also in `history.json`.
    """
    set_seed(settings.seed)
    freeze(model, settings.freeze)
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
        gradient_checkpointing=settings.gradient_checkpointing,
        report_to="none",
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if settings.group_by_length else "random",
        dataloader_num_workers=0,
    )
    trainer = _JamTrainer(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_datasets,
        data_collator=collator,
        callbacks=[_Continue(collator), *(callbacks or [])],
    )
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(run_dir))
    history = [row for row in trainer.state.log_history if "loss" in row or any(k.startswith("eval_") for k in row)]
    with whole_folder(output_dir, overwrite=True) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "history.json").write_text(
            json.dumps({"settings": asdict(settings), "history": history}, indent=1) + "\n", encoding="utf-8"
        )
    shutil.rmtree(run_dir, ignore_errors=True)
    return history
