"""Checkpoints read row by row, and written shard by shard. It knows nothing of the maths and of key names.

Only safetensors are read. Nothing here holds more than a few blocks of rows, unless a source asks for a whole tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..contents import beside
from ..files import write_whole
from ..reading import read_config
from .licences import licence_of
from .tensor_files import DTYPES, TensorFile, TensorFileWriter, TensorSpec, no_duplicates


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK_BYTES = 1 << 20  # of output made at a time by each thread: small enough that sources and result stay in a core's cache
_FLUSH_BYTES = 256 << 20  # sent to the disk at a time, while the next ones are made
_THREADS = min(4, os.cpu_count() or 1)


class Parent:
    """A parent's config and tensors, read lazily from a checkpoint folder, a Hub repository or a model in memory.

    Args:
        source: folder, Hub id (`revision` as in `from_pretrained`) or `PreTrainedModel`.
        role: "text parent", "image parent", ...: how messages call it.
        headers_only: of a Hub repository, fetch no weights but the headers of their files; of a folder that has no weights,
            believe its config. `read` gives tensors on the meta device.
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
            from .from_config import specs_from_config

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


def specs_of(model: PreTrainedModel) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor that a checkpoint of the model holds: of tied ones, the first alone."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    state = model.state_dict()
    return {key: TensorSpec(tuple(value.shape), value.dtype) for key, value in state.items() if key not in tied}


def row_blocks(spec: TensorSpec, rows: int) -> Iterator[tuple[int, int]]:
    """`[first, last)` of blocks of about `BLOCK_BYTES`, for so many rows of a tensor."""
    size = max(1, BLOCK_BYTES // max(1, spec.row_numel * spec.dtype.itemsize))
    return ((first, min(first + size, rows)) for first in range(0, rows, size))


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; for half precision by the bits of the exponent, at memory speed."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    exponents = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
    if tensor.dtype in exponents:
        if tensor.numel() > BLOCK_BYTES:  # no second copy of a large tensor
            return all(all_finite(part) for part in tensor.reshape(-1).split(BLOCK_BYTES))
        return int((tensor.contiguous().view(torch.int16) & 0x7FFF).amax()) < exponents[tensor.dtype]
    return bool(torch.isfinite(tensor.sum(dtype=torch.float64))) or bool(torch.isfinite(tensor).all())


def _resolve_folder(source: str | os.PathLike, role: str, revision: str | None, headers_only: bool = False) -> Path:
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise ValueError(
                    f"The {role} '{path}' is an adapter (LoRA), not a model. Merge it into its base model and save that: "
                    "peft's merge_and_unload(), then save_pretrained()."
                )
            raise ValueError(
                f"The {role} '{path}' is a folder but no checkpoint: it has no config.json. Expected what "
                "`save_pretrained` writes (config.json and safetensors)."
            )
        return path
    if path.exists() or str(source).count("/") > 1 or str(source).startswith((".", "/", "~")):
        there = "" if path.exists() else ", and there is nothing of that name"
        raise ValueError(
            f"The {role} '{source}' is not a folder{there}. Expected a checkpoint folder or a Hub id such as 'a/b'."
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "README.md", *([] if headers_only else ["model*.safetensors"])]
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub's, the network's and the cache's errors have no common base class
        raise ValueError(f"The {role} '{source}' is neither a folder nor a Hub repository that can be read: {error}") from error


def _hub_headers(hub_id: str, role: str, revision: str | None) -> dict[str, TensorSpec]:
    """Shapes and dtypes of a repository's tensors, by a few range requests."""
    from huggingface_hub import get_safetensors_metadata

    try:
        files = get_safetensors_metadata(hub_id, revision=revision).files_metadata
    except Exception as error:  # as above
        raise ValueError(f"The {role} '{hub_id}' has no safetensors on the Hub whose headers can be read: {error}") from error
    tensors = {key: tensor for file in files.values() for key, tensor in file.tensors.items()}
    unknown = sorted(key for key, tensor in tensors.items() if tensor.dtype not in DTYPES)
    if unknown:
        raise ValueError(
            f"Tensor '{unknown[0]}' of the {role} '{hub_id}' has the dtype {tensors[unknown[0]].dtype}; expected one of "
            f"{', '.join(DTYPES)}."
        )
    return {key: TensorSpec(tuple(tensor.shape), DTYPES[tensor.dtype]) for key, tensor in tensors.items()}


# What a config says of the file, the code or the training rather than of the model.
_INCIDENTAL = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache")


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
            f"The {role} {name} is quantised ({get('quant_method', None)}). Fusion makes new weights out of the parents'; take "
            "the unquantised model, or save what `model.dequantize()` gives."
        )


def _tensor_files(folder: Path, role: str) -> dict[str, TensorFile]:
    """The open file of each tensor; where there are a single file and an index, the single one, as transformers has it."""
    if (folder / SINGLE).is_file():
        file = TensorFile(folder / SINGLE)
        return dict.fromkeys(file.specs, file)
    if not (folder / INDEX).is_file():
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.safetensors") for path in folder.glob(pattern))
        raise ValueError(
            f"The {role} '{folder}' has no {SINGLE} and no {INDEX}"
            f"{' (it has ' + ', '.join(others[:3]) + ')' if others else ''}. Only safetensors are read; convert other files "
            "first: load the model with transformers, and save_pretrained."
        )
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map must map tensors to file names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX} of the {role} is damaged: {error!r}. Fetch or save it again.") from error
    for name in sorted(set(weight_map.values())):
        beside(folder, name, f"{folder / INDEX} of the {role}")
    missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
    if missing:
        raise ValueError(f"The {role} '{folder}' is incomplete: its index names {', '.join(missing)}, which is missing.")
    files = {name: TensorFile(folder / name) for name in sorted(set(weight_map.values()))}
    absent = sorted(key for key, name in weight_map.items() if key not in files[name].specs)
    if absent:
        raise ValueError(
            f"The {role} '{folder}' is incomplete: by its index '{absent[0]}' lies in {weight_map[absent[0]]}, which has "
            f"no such tensor ({len(absent)} of {len(weight_map)} are missing)."
        )
    found: dict[str, TensorFile] = {}  # also what the index does not list: transformers reads whole files
    for file in files.values():
        for key in file.specs:
            if key in found:
                raise ValueError(
                    f"The {role} '{folder}' has the tensor '{key}' twice, in {found[key].path.name} and {file.path.name}. "
                    "Save it again."
                )
            found[key] = file
    return found


class Source(Protocol):
    """Something that yields rows of one tensor: a parent's, noise, a constant, or several of them combined."""

    def read(self, first: int, last: int) -> torch.Tensor:
        """Rows `[first, last)`."""

    def release(self) -> None:
        """Forget what was kept to answer `read`."""


@dataclass(frozen=True)
class Band:
    """Consecutive rows of an output tensor: `make` of the same rows of all sources, block by block."""

    rows: int
    sources: tuple[Source, ...]
    make: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class TensorPlan:
    """How one output tensor is made. what: in words, for people. inputs: the parents' tensors that it comes from."""

    spec: TensorSpec
    bands: tuple[Band, ...]
    what: str = ""
    inputs: tuple[tuple[Parent, str], ...] = ()
    loads: int = 0  # bytes that its sources keep in memory while it is made

    def blocks(self) -> Iterator[tuple[int, int, Callable[[], torch.Tensor]]]:
        """(first row, number of rows, function that makes them) for blocks of about `BLOCK_BYTES`."""
        start = 0
        for band in self.bands:
            for first, last in row_blocks(self.spec, band.rows):
                yield start + first, last - first, lambda band=band, first=first, last=last: _make(band, first, last)
            start += band.rows

    def tensor(self) -> torch.Tensor:
        """The whole tensor: what the blocks are, put together."""
        made = [make().reshape(rows, *self.spec.shape[1:]) for _, rows, make in self.blocks()]
        return torch.cat(made).reshape(self.spec.shape)


def _make(band: Band, first: int, last: int) -> torch.Tensor:
    return band.make(*(source.read(first, last) for source in band.sources))


def plan_shards(specs: dict[str, TensorSpec], max_shard_size: str) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """Keys by file name, and the index (None where one file holds all)."""
    plan = split_state_dict_into_shards_factory(
        specs,
        get_storage_size=lambda spec: spec.nbytes,
        get_storage_id=lambda spec: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename} if plan.is_sharded else None
    return plan.filename_to_tensors, index


def write_plans(folder: Path, plans: dict[str, TensorPlan], max_shard_size: str = "2GB") -> None:
    """Write planned tensors shard by shard, a few blocks of rows in memory at a time.

    A shard gets its name when it is whole and on the disk; shards that are there already, from a run that was stopped, stay.

    Raises:
        ValueError: if a tensor made has another shape than planned, or does not fit its dtype. OSError: if the disk is full or
            cannot be written; the message names file and tensor.
    """
    shards, index = plan_shards({key: plan.spec for key, plan in plans.items()}, max_shard_size)
    total = sum(plan.spec.nbytes for plan in plans.values())
    whole = [name for name in shards if (folder / name).is_file()]
    there = sum(plans[key].spec.nbytes for name in whole for key in shards[name])
    if whole:
        tqdm.write(f"going on: {len(whole)} of {len(shards)} files are there already", file=sys.stderr)
    with (
        tqdm(total=total, initial=there, desc="tensors", unit="B", unit_scale=True, unit_divisor=1024) as progress,
        _one_torch_thread(),
        ThreadPoolExecutor(1, "sync") as syncing,
    ):
        pending: list[Future] = []
        for name, keys in shards.items():
            _raise_of_done(pending)
            path = folder / name
            if path.is_file():
                continue
            partial = path.with_name(f"{name}.partial")
            try:
                writer = TensorFileWriter(partial, {key: plans[key].spec for key in keys})
            except OSError as error:
                raise OSError(error.errno, f"cannot write {path.name} in {folder}: {error.strerror}") from error
            try:
                _write_shard(writer, {key: plans[key] for key in keys}, progress, syncing)
            except BaseException:
                syncing.submit(writer.close, sync=False).result()  # behind its flushes
                raise
            pending.append(syncing.submit(_finish, writer, path))
        for future in pending:
            future.result()
    if index is not None:
        write_whole(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _finish(writer: TensorFileWriter, path: Path) -> None:
    try:
        writer.close(sync=True)
        writer.path.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot finish {path}: {error.strerror}") from error


def _write_shard(writer: TensorFileWriter, plans: dict[str, TensorPlan], progress: tqdm, syncing: ThreadPoolExecutor) -> None:
    room = threading.Semaphore(2 * _THREADS)
    failed, counting = threading.Event(), threading.Lock()

    def work(key: str, first: int, rows: int, make: Callable[[], torch.Tensor]) -> None:
        try:
            if failed.is_set():
                return
            spec = plans[key].spec
            made = make()
            if tuple(made.shape) != ((rows, *spec.shape[1:]) if spec.shape else ()):
                raise ValueError(
                    f"Tensor '{key}': expected rows of {list(spec.shape)}, made {list(made.shape)} at row {first}."
                )
            cast = made.to(spec.dtype)
            if not all_finite(cast):
                for parent, name in plans[key].inputs:
                    parent.check_finite(name)
                if made.dtype == spec.dtype:
                    raise ValueError(f"Tensor '{key}' holds NaN or infinity; look at the tensors that it is made of.")
                origin = ", ".join(f"{parent.role}: {name}" for parent, name in plans[key].inputs) or plans[key].what
                raise ValueError(
                    f"Tensor '{key}' (from {origin}) holds {made.abs().max().item():.4g}, which overflows {spec.dtype} "
                    f"(largest: {torch.finfo(spec.dtype).max:.4g}). Choose another dtype, e.g. dtype='bfloat16'."
                )
            try:
                writer.write(key, first, cast)
            except OSError as error:
                raise OSError(error.errno, f"cannot write tensor '{key}' to {writer.path}: {error.strerror}") from error
            with counting:
                progress.update(cast.numel() * cast.element_size())
        except BaseException:
            failed.set()
            raise
        finally:
            room.release()

    with ThreadPoolExecutor(_THREADS, "fuse") as pool:
        futures: list[Future] = []
        flushes: list[Future] = []
        unflushed = 0
        try:
            for key, plan in plans.items():
                unflushed += plan.spec.nbytes
                if unflushed > _FLUSH_BYTES:
                    flushes.append(syncing.submit(_flush, writer))
                    unflushed = 0
                for first, rows, make in plan.blocks():
                    room.acquire()
                    if failed.is_set():
                        room.release()
                        break
                    futures.append(pool.submit(work, key, first, rows, make))
                _raise_of_done(flushes)
                if plan.loads:  # what its sources keep is the largest thing in memory: let go before the next tensor
                    _wait(futures)
                    _release(plan)
                if failed.is_set():
                    break
            _wait(futures)
            _wait(flushes)  # the system tells of a lost page once: what a flush has told, the last one does not tell again
        except BaseException:
            failed.set()
            raise


def _flush(writer: TensorFileWriter) -> None:
    try:
        writer.flush()
    except OSError as error:
        raise OSError(error.errno, f"cannot write {writer.path} to the disk: {error.strerror}") from error


def _wait(futures: list[Future]) -> None:
    for future in futures:
        future.result()
    futures.clear()


def _raise_of_done(futures: list[Future]) -> None:
    for future in futures:
        if future.done():
            future.result()


def _release(plan: TensorPlan) -> None:
    for band in plan.bands:
        for source in band.sources:
            source.release()


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Blocks are shared out among threads of our own; torch's would only get in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
