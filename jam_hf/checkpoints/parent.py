"""`Parent`: a checkpoint, read row by row. It knows nothing of the maths and of key names. Only safetensors are
read.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..contents import beside, may_be_hub_id
from ..reading import read_config
from .from_config import specs_from_config
from .licences import licence_of
from .tensor_files import DTYPES, INDEX, SINGLE, TensorFile, TensorSpec, all_finite, no_duplicates, row_blocks


class Parent:
    """A parent's config and tensors, read lazily from a checkpoint folder, a Hub repository or a model in memory.

    Args:
        source: folder, Hub id (`revision` as in `from_pretrained`) or `PreTrainedModel`.
        role: "text parent", "image parent", ...: how messages call it.
        headers_only: of a Hub repository, fetch no weights but the headers of their files; of a folder that has no
            weights, believe its config. `read` gives tensors on the meta device.
    Raises:
        ValueError: if it is no checkpoint with safetensors, or one of its files is damaged.
    """

    def __init__(
        self,
        source: str | os.PathLike | PreTrainedModel,
        role: str,
        revision: str | None = None,
        headers_only: bool = False,
    ):
        self.role = role
        self.headers_only = headers_only and not isinstance(source, PreTrainedModel)
        self.from_config = False  # whether the config alone says what the tensors are
        if self.headers_only and Path(source).is_dir():
            self.headers_only = self.from_config = not any(Path(source).glob("*.safetensors*"))
        self.hub_id: str | None = None  # where the parent can be found by others
        self.revision: str | None = None
        self.license: str | None = None
        self.generation_config: GenerationConfig | None = None  # of a model in memory
        self._state: dict[str, torch.Tensor] = {}
        self._files: dict[str, TensorFile] = {}
        if isinstance(source, PreTrainedModel):
            self.name, self.folder = source.name_or_path or type(source).__name__, None
            self.config: PreTrainedConfig = source.config
            self.generation_config = getattr(source, "generation_config", None)
            _refuse_quantised(self.config, self.name, role)
            self._state = {key: tensor.detach().cpu() for key, tensor in source.state_dict().items()}
            self.specs = {key: TensorSpec(tuple(tensor.shape), tensor.dtype) for key, tensor in self._state.items()}
            return
        self.name = str(source)
        self.folder = _resolve_folder(source, role, revision, self.headers_only)
        if not Path(source).is_dir():
            self.hub_id = str(source)
            self.revision = self.folder.name if self.folder.parent.name == "snapshots" else revision
        self.license = licence_of(self.folder)
        self.config = _config(self.folder, role)
        if self.from_config:
            self.specs = specs_from_config(self.config, role)
            return
        if self.headers_only:
            self.specs = _hub_headers(str(source), role, revision)
            return
        self._files = _tensor_files(self.folder, role)
        self.specs = {key: file.specs[key] for key, file in self._files.items()}

    def keys(self) -> set[str]:
        return set(self.specs)

    def require(self, key: str) -> TensorSpec:
        """Shape and dtype of a tensor. Raises `ValueError` if the parent has none of that name."""
        if key not in self.specs:
            raise ValueError(f"The {self.role} {self.name} has no tensor '{key}'.")
        return self.specs[key]

    def read(self, key: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows `[first, last)` of a tensor, on the CPU.

        Raises:
            ValueError: if it is missing or cannot be read; the message names file and tensor.
        """
        spec = self.require(key)
        if self.headers_only:
            last = spec.rows if last is None else last
            return torch.empty((last - first, *spec.shape[1:]) if spec.shape else (), dtype=spec.dtype, device="meta")
        if self._state:
            rows = self._state[key][first:last] if self._state[key].dim() else self._state[key]
        else:
            try:
                rows = self._files[key].read(key, first, last)
            except OSError as error:
                raise ValueError(
                    f"Cannot read tensor '{key}' of the {self.role} from {self._files[key].path}: {error}."
                ) from error
        return rows

    def check_finite(self, key: str) -> None:
        """Raise a `ValueError` that names file and tensor if it holds NaN or infinity."""
        spec = self.require(key)
        for block in row_blocks(spec, spec.rows):
            if not all_finite(self.read(key, *block)):
                raise ValueError(f"Tensor '{key}' of the {self.role}, in {self.where(key)}, holds NaN or infinity.")

    def get(self, key: str) -> torch.Tensor:
        """The whole tensor; see `read`."""
        return self.read(key)

    def where(self, key: str) -> str:
        """The file that a tensor lies in, in words."""
        if self.from_config:
            return f"{self.name}, by its config.json"
        if self.headers_only:
            return f"the Hub repository {self.name}"
        return str(self._files[key].path) if key in self._files else f"the model in memory '{self.name}'"

    def files(self) -> list[Path]:
        """The files of its tensors; none for a model in memory."""
        return sorted({file.path for file in self._files.values()})

    def identity(self) -> str | None:
        """Digest of the config and of names, sizes, headers and times of the files; None for a model in memory."""
        if self.folder is None:
            return None
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in self.files():
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def content_id(self) -> str:
        """Digest of what the parent is, wherever it lies: its config and its tensors' names, shapes and first rows."""
        config = self.config.to_dict()
        for name in _INCIDENTAL:
            config.pop(name, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for key in sorted(self.specs):
            spec = self.specs[key]
            digest.update(f"{key} {list(spec.shape)} {spec.dtype}".encode())
            if spec.rows:
                digest.update(self.read(key, 0, 1).reshape(-1)[:64].view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _resolve_folder(source: str | os.PathLike, role: str, revision: str | None, headers_only: bool = False) -> Path:
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise ValueError(
                    f"The {role} '{path}' is an adapter (LoRA), not a model. Merge it into its base model and save "
                    "that: peft's merge_and_unload(), then save_pretrained()."
                )
            raise ValueError(
                f"The {role} '{path}' is a folder but no checkpoint: it has no config.json. Expected what "
                "`save_pretrained` writes (config.json and safetensors)."
            )
        return path
    if not may_be_hub_id(source):
        there = "" if path.exists() else ", and there is nothing of that name"
        raise ValueError(
            f"The {role} '{source}' is not a folder{there}. Expected a checkpoint folder or a Hub id such as 'a/b'."
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "README.md", *([] if headers_only else ["model*.safetensors"])]
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub's, the network's and the cache's errors have no common base class
        raise ValueError(
            f"The {role} '{source}' is neither a folder nor a Hub repository that can be read: {error}"
        ) from error


def _hub_headers(hub_id: str, role: str, revision: str | None) -> dict[str, TensorSpec]:
    """Shapes and dtypes of a repository's tensors, by a few range requests."""
    from huggingface_hub import get_safetensors_metadata

    try:
        files = get_safetensors_metadata(hub_id, revision=revision).files_metadata
    except Exception as error:  # as above
        raise ValueError(
            f"The {role} '{hub_id}' has no safetensors on the Hub whose headers can be read: {error}"
        ) from error
    tensors = {key: tensor for file in files.values() for key, tensor in file.tensors.items()}
    unknown = sorted(key for key, tensor in tensors.items() if tensor.dtype not in DTYPES)
    if unknown:
        raise ValueError(
            f"Tensor '{unknown[0]}' of the {role} '{hub_id}' has the dtype {tensors[unknown[0]].dtype}; expected one "
            f"of {', '.join(DTYPES)}."
        )
    return {key: TensorSpec(tuple(tensor.shape), DTYPES[tensor.dtype]) for key, tensor in tensors.items()}


# What a config says of the file, the code or the training rather than of the model.
_INCIDENTAL = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def _config(folder: Path, role: str) -> PreTrainedConfig:
    try:
        config = read_config(folder)
    except Exception as error:  # validators of configs raise classes of their own
        raise ValueError(f"The config of the {role}, {folder / 'config.json'}, cannot be read: {error}") from error
    _refuse_quantised(config, str(folder), role)
    return config


def _refuse_quantised(config: PreTrainedConfig, name: str, role: str) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        get = quantised.get if isinstance(quantised, dict) else partial(getattr, quantised)
        raise ValueError(
            f"The {role} {name} is quantised ({get('quant_method', None)}). Fusion makes new weights out of the "
            "parents'; take the unquantised model, or save what `model.dequantize()` gives."
        )


def _tensor_files(folder: Path, role: str) -> dict[str, TensorFile]:
    """The open file of each tensor; where there are a single file and an index, the single one, as transformers has
    it.
    """
    if (folder / SINGLE).is_file():
        file = TensorFile(folder / SINGLE)
        return dict.fromkeys(file.specs, file)
    if not (folder / INDEX).is_file():
        others = sorted(
            path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.safetensors") for path in folder.glob(pattern)
        )
        raise ValueError(
            f"The {role} '{folder}' has no {SINGLE} and no {INDEX}"
            f"{' (it has ' + ', '.join(others[:3]) + ')' if others else ''}. Only safetensors are read; convert other "
            "files first: load the model with transformers, and save_pretrained."
        )
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)[
            "weight_map"
        ]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map must map tensors to file names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX} of the {role} is damaged: {error!r}. Fetch or save it again.") from error
    for name in sorted(set(weight_map.values())):
        beside(folder, name, f"{folder / INDEX} of the {role}")
    missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
    if missing:
        raise ValueError(
            f"The {role} '{folder}' is incomplete: its index names {', '.join(missing)}, which is missing."
        )
    files = {name: TensorFile(folder / name) for name in sorted(set(weight_map.values()))}
    absent = sorted(key for key, name in weight_map.items() if key not in files[name].specs)
    if absent:
        raise ValueError(
            f"The {role} '{folder}' is incomplete: by its index '{absent[0]}' lies in {weight_map[absent[0]]}, which "
            f"has no such tensor ({len(absent)} of {len(weight_map)} are missing)."
        )
    found: dict[str, TensorFile] = {}  # also what the index does not list: transformers reads whole files
    for file in files.values():
        for key in file.specs:
            if key in found:
                raise ValueError(
                    f"The {role} '{folder}' has the tensor '{key}' twice, in {found[key].path.name} and "
                    f"{file.path.name}. Save it again."
                )
            found[key] = file
    return found
