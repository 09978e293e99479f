"""Reading parents tensor by tensor, and writing tensors shard by shard. It knows nothing of the maths.

Only safetensors are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel


_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Parent:
    """A parent's config and tensors, read lazily from a checkpoint folder, a Hub repository or a model in memory.

    Args:
        source: folder, Hub id (`revision` as in `from_pretrained`) or `PreTrainedModel`.
        role: "text parent", "image parent", ...: how messages call it.
    Raises:
        ValueError: if it is no checkpoint with safetensors.
    """

    def __init__(self, source: str | os.PathLike | PreTrainedModel, role: str, revision: str | None = None):
        self.role = role
        self._state: dict[str, torch.Tensor] | None = None
        self._files: dict[str, Path] = {}
        self.hub_id: str | None = None  # where the parent can be found by others
        if isinstance(source, PreTrainedModel):
            self.name, self.folder = source.name_or_path or type(source).__name__, None
            self.config: PreTrainedConfig = source.config
            self._state = source.state_dict()
            return
        self.name = str(source)
        self.folder = _resolve_folder(source, role, revision)
        self.hub_id = None if Path(source).is_dir() else str(source)
        self.config = AutoConfig.from_pretrained(self.folder)
        self._files = _tensor_files(self.folder, role)

    def keys(self) -> set[str]:
        return set(self._state if self._state is not None else self._files)

    def get(self, key: str) -> torch.Tensor:
        """The tensor, on the CPU. Raises `ValueError` (naming file and tensor) if it is missing or unreadable."""
        if self._state is not None:
            if key not in self._state:
                raise ValueError(f"The {self.role} {self.name} has no tensor '{key}'.")
            return self._state[key].detach().cpu()
        if key not in self._files:
            raise ValueError(f"The {self.role} {self.name} has no tensor '{key}'.")
        path = self._files[key]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"Cannot read tensor '{key}' of the {self.role} from {path}: {error}.") from error


def _resolve_folder(source: str | os.PathLike, role: str, revision: str | None) -> Path:
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"The {role} '{path}' is a folder but no checkpoint: it has no config.json. Expected what "
                "`save_pretrained` writes (config.json and safetensors)."
            )
        return path
    if path.exists() or str(source).count("/") > 1 or str(source).startswith((".", "/", "~")):
        raise ValueError(f"The {role} '{source}' is not a folder. Expected a checkpoint folder or a Hub id such as 'a/b'.")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub's, the network's and the cache's errors have no common base class
        raise ValueError(f"The {role} '{source}' is neither a folder nor a Hub repository that can be read: {error}") from error


def _tensor_files(folder: Path, role: str) -> dict[str, Path]:
    if (folder / _INDEX).is_file():
        weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
        if missing:
            raise ValueError(f"The {role} '{folder}' is incomplete: its index names {', '.join(missing)}, which is missing.")
        return {key: folder / name for key, name in weight_map.items()}
    path = folder / _SINGLE
    if not path.is_file():
        raise ValueError(
            f"The {role} '{folder}' has no safetensors ({_SINGLE} or {_INDEX}). Only safetensors are read; convert other "
            "files first, e.g. load and save_pretrained with transformers."
        )
    try:
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"Cannot read {path} of the {role}: {error}. The file is damaged or cut short.") from error


def write_tensors(
    folder: Path,
    shapes: dict[str, torch.Tensor],
    make: Callable[[str], torch.Tensor],
    max_shard_size: str = "2GB",
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write tensors shard by shard; only one shard is in memory.

    Args:
        shapes: a tensor on the meta device for every key, for shape and dtype.
        make: returns the tensor of a key.
    Raises:
        ValueError: if a tensor made has another shape or dtype than planned, or holds NaN or infinity.
    """
    plan = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        get_storage_id=lambda tensor: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    with tqdm(total=len(shapes), desc="tensors", unit="tensor") as progress:
        for name, keys in plan.filename_to_tensors.items():
            shard = {}
            for key in keys:
                tensor = make(key)
                if tensor.shape != shapes[key].shape or tensor.dtype != shapes[key].dtype:
                    raise ValueError(
                        f"Tensor '{key}': expected {list(shapes[key].shape)} of {shapes[key].dtype}, made "
                        f"{list(tensor.shape)} of {tensor.dtype}."
                    )
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"Tensor '{key}' holds NaN or infinity; look at that tensor of the parents.")
                shard[key] = tensor.contiguous()
                progress.update()
            save_file(shard, folder / name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": {**plan.metadata, **(metadata or {})}, "weight_map": plan.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
