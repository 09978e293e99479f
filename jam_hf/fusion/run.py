"""A planned fusion done: the tensors written in blocks, then the small files, in a folder that appears whole or not
at all.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from transformers import GenerationConfig

from ..checkpoints.writer import write_plans
from ..files import check_apart, resumable_folder, whole_folder
from ..model.image_processing_jam import JamImageProcessor
from ..model.processing_jam import JamProcessor
from ..portable import bytes_on_disk
from ..provenance import carry_on
from .model_card import model_card
from .plan import FusionPlan, size


def run_fusion(plan: FusionPlan, output_dir: str | os.PathLike, overwrite: bool = False) -> Path:
    """Do what was planned; see [`fuse`]."""
    if plan.digest is None:
        raise ValueError("A plan of headers alone cannot be run; plan with headers_only=False.")
    for decoder in (plan.text, plan.image):  # a parent's files may be links into the output folder
        check_apart(output_dir, *decoder.parent.files())
    folder_context: AbstractContextManager[Path | None]
    if plan.fingerprint is None:
        folder_context = whole_folder(output_dir, overwrite)
    else:
        folder_context = resumable_folder(output_dir, plan.fingerprint, overwrite)
    with folder_context as folder:
        if folder is None:
            return Path(output_dir)
        there = sum(map(bytes_on_disk, folder.glob("*.safetensors*")))
        free = shutil.disk_usage(folder).free
        if free + there < plan.num_bytes:
            raise OSError(
                errno.ENOSPC,
                f"the fusion needs {size(plan.num_bytes - there)} more in '{folder.parent}', and {size(free)} "
                "are free. Make room, or choose another output folder",
            )
        write_plans(folder, plan.tensors, plan.recipe.max_shard_size)
        _write_small_files(plan, folder)
    return Path(output_dir)


def _write_small_files(plan: FusionPlan, folder: Path) -> None:
    """All but the tensors; config.json last: a folder without it is no checkpoint."""
    config, vocabulary, recipe = plan.config, plan.vocabulary, plan.recipe
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        generation_mode="interleaved",
        **plan.sampling,
    ).save_pretrained(folder)
    tokenizer = vocabulary.tokenizer
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # what is saved is what it was made with
    processor = JamProcessor(
        JamImageProcessor.from_vq_config(config.vq_config),
        tokenizer,
        image_seq_length=config.image_seq_length,
        image_token=recipe.image_token,
        break_token=recipe.break_token,
        **vocabulary.layout,
        **({} if vocabulary.code_name is None else {"image_code_token": vocabulary.code_name}),
    )
    processor.save_pretrained(folder)
    config.provenance = {"card": model_card(plan), "recipe": recipe.to_yaml(), "history": []}
    for name in ("README.md", "fusion.yaml"):  # of an earlier run that was stopped
        (folder / name).unlink(missing_ok=True)
    carry_on(config, folder)  # the two, as every later save writes them
    config.save_pretrained(folder)
