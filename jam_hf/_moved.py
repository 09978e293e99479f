"""Where modules went: imports of their old names go on working, and yield the very same module as the new name."""

import importlib
import os
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


# Old name to new. A folder's line holds for what lies in it as well.
OLD_MODULES = {
    "jam_hf.cli": "jam_hf_cli",
    "jam_hf.commands": "jam_hf_cli.commands",
    "jam_hf.evaluation.measured_documents": "jam_hf.data.readers",
    "jam_hf.fusion.checkpoint": "jam_hf.checkpoints",
    "jam_hf.fusion.convert_metaseq": "jam_hf.conversion.metaseq",
    "jam_hf.fusion.convert_vq": "jam_hf.conversion.vq",
    "jam_hf.fusion.from_config": "jam_hf.checkpoints.from_config",
    "jam_hf.fusion.licences": "jam_hf.checkpoints.licences",
    "jam_hf.fusion.preprocessing": "jam_hf.conversion.image_processing",
    "jam_hf.fusion.report": "jam_hf.fusion.plan",
    "jam_hf.fusion.tensor_files": "jam_hf.checkpoints.tensor_files",
    "jam_hf.fusion.vq_tables": "jam_hf.conversion.vq_tables",
    "jam_hf.model.caching_jam": "jam_hf.generation.block_cache",
    "jam_hf.model.candidates_jam": "jam_hf.generation.best_of_n",
    "jam_hf.model.chats_jam": "jam_hf.data.chats",
    "jam_hf.model.continuous_batching_jam": "jam_hf.integrations.continuous_batching",
    "jam_hf.model.continuous_settings_jam": "jam_hf.integrations.continuous_settings",
    "jam_hf.model.document_events_jam": "jam_hf.generation.events",
    "jam_hf.model.documents_jam": "jam_hf.generation.export",
    "jam_hf.model.infilling_jam": "jam_hf.generation.infilling",
    "jam_hf.model.masking_jam": "jam_hf.generation.gaps",
    "jam_hf.model.memory_jam": "jam_hf.generation.retrieval_prompts",
    "jam_hf.model.packed_columns_jam": "jam_hf.generation.packed_columns",
    "jam_hf.model.packed_guidance_jam": "jam_hf.generation.packed_guidance",
    "jam_hf.model.provenance_jam": "jam_hf.provenance",
    "jam_hf.model.padded_batches_jam": "jam_hf.integrations.padded_batches",
    "jam_hf.model.reranking_jam": "jam_hf.generation.rerankers",
    "jam_hf.model.sharding_jam": "jam_hf.integrations.sharding",
    "jam_hf.model.streaming_jam": "jam_hf.generation.streaming",
    "jam_hf.model.trl_jam": "jam_hf.integrations.trl",
    "jam_hf.quickstart.evaluation": "jam_hf.quickstart.measurements",
    "jam_hf.quickstart.parents": "jam_hf.quickstart.pairs",
    "jam_hf.retrieval.documents": "jam_hf.retrieval.corpus",
    "jam_hf.retrieval.training_documents": "jam_hf.retrieval.augmentation",
    "jam_hf.training.cm3": "jam_hf.data.cm3",
    "jam_hf.training.collator": "jam_hf.data.collator",
    "jam_hf.training.documents": "jam_hf.data.sequences",
}


def new_name(old: str) -> str | None:
    """The module that has this old name today; None where it is no old name."""
    if old in OLD_MODULES:
        return OLD_MODULES[old]
    folder, _, name = old.rpartition(".")
    return f"{OLD_MODULES[folder]}.{name}" if folder in OLD_MODULES else None


class _OldModules(Loader):
    """An importer of old names alone. Nothing is imported before somebody asks for one."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if new_name(name) is not None else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(str(new_name(module.__name__)))


def serve_old_names() -> None:
    """Before the importers of files: an old folder's name has the new folder's path, and would be read a second
    time there.
    """
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldModules())


def drop_moved_files(folder: str | os.PathLike) -> None:
    """Of a checkpoint that is saved anew: take out code that checkpoints carried once and carry no more.

    Nothing reads it there, but it would be taken for the model's. Other files stay.
    """
    for name in OLD_MODULES:
        file = Path(folder) / f"{name.rpartition('.')[2]}.py"
        if name.startswith("jam_hf.model.") and file.is_file():
            file.unlink()


__all__ = ["OLD_MODULES", "drop_moved_files", "new_name", "serve_old_names"]
