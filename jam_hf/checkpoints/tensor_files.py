"""safetensors files read and written in blocks of rows, so that memory never holds a whole tensor, let alone a shard.

The safetensors package reads through memory maps, which count as resident memory for as long as they are open, and
writes only
what is in memory as a whole. The format is small: 8 bytes of length, a JSON header, the bytes. This file knows nothing
of what the tensors are for.

"Rows" are slices along the first dimension; a scalar has one row.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import portable


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK_BYTES = (
    1 << 20
)  # read or made at a time by each thread: small enough that sources and result stay in a core's cache
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # as the safetensors package has it
_LARGEST_TENSOR = 2**63 - 1  # bytes, as torch counts them


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor. rows: size of the first dimension (1 for a scalar); row_numel: elements in one
    row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_numel(self) -> int:
        return math.prod(self.shape[1:])  # torch's own product wraps around

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_numel * self.dtype.itemsize


class TensorFile:
    """A safetensors file, open for reading.

    Raises:
        ValueError: if the safetensors package would refuse it as well (no such file, damaged, cut short), or a dtype is
            not in `DTYPES`; the message names the file and the first tensor concerned.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.specs: dict[str, TensorSpec] = {}
        self._starts: dict[str, int] = {}
        self._descriptor = os.open(self.path, os.O_RDONLY | portable.BINARY)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        size = os.fstat(self._descriptor).st_size
        start = self._bytes_at(0, 8)
        length = int.from_bytes(start, "little")
        try:
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                if start == b"version ":
                    raise ValueError("it looks like a Git LFS pointer, which stands for a file that was not fetched")
                raise ValueError(f"its header should take {length} bytes, the file has {size}")
            header = json.loads(self._bytes_at(8, length), object_pairs_hook=no_duplicates)
            self._read_entries({key: entry for key, entry in header.items() if key != "__metadata__"}, 8 + length)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: {error}.") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{self.path} is no safetensors file, or is damaged: {what}. Fetch or save it again."
            ) from error
        needed = max((self._end(key) for key in self.specs), default=8 + length)
        beyond = sorted((key for key in self.specs if self._end(key) > size), key=self._end)
        if beyond:
            raise ValueError(
                f"{self.path} is cut short: it has {size} bytes, and needs {needed}. The first tensor that is not "
                f"whole is '{beyond[0]}' ({len(beyond)} of {len(self.specs)}). Fetch or save it again."
            )
        if size > needed:
            raise ValueError(f"{self.path} is damaged: behind its {needed} bytes come others. Fetch or save it again.")

    def _bytes_at(self, start: int, length: int) -> bytearray:
        data = bytearray(length)
        with memoryview(data) as view:
            count = self._fill(view, start)
        del data[count:]  # the file ends there
        return data

    def _fill(self, view: memoryview, start: int) -> int:
        """Bytes from `start` on, and how many there were: less than asked for only where the file ends."""
        done = 0
        while done < len(view) and (count := portable.read_at(self._descriptor, view[done:], start + done)):
            done += count
        return done

    def _read_entries(self, entries: dict[str, dict], start: int) -> None:
        """Shapes, dtypes and places, which lie in the file one behind the other, without gaps."""
        for key, entry in entries.items():
            if entry["dtype"] not in DTYPES:
                raise NotImplementedError(
                    f"tensor '{key}' has the dtype {entry['dtype']}; read are {', '.join(DTYPES)}. If it is a "
                    "quantised model, take the unquantised one"
                )
            shape, offsets = entry["shape"], entry["data_offsets"]
            if len(offsets) != 2 or not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
                raise ValueError(f"tensor '{key}' has the shape {shape} and the place {offsets}")
            if math.prod(max(size, 1) for size in shape) * DTYPES[entry["dtype"]].itemsize > _LARGEST_TENSOR:
                raise ValueError(f"tensor '{key}' has the shape {shape}, of more elements than can be counted")
            self.specs[key] = TensorSpec(tuple(shape), DTYPES[entry["dtype"]])
            self._starts[key] = start + offsets[0]
            if offsets[1] - offsets[0] != self.specs[key].nbytes:
                raise ValueError(
                    f"tensor '{key}' of shape {shape} and dtype {entry['dtype']} takes {offsets[1] - offsets[0]} "
                    f"bytes, not {self.specs[key].nbytes}"
                )
        end = start
        for key in sorted(self.specs, key=lambda key: (self._starts[key], self._end(key))):
            if self._starts[key] != end:
                relation = "overlaps the tensor before it" if self._starts[key] < end else "lies behind a gap"
                raise ValueError(f"tensor '{key}' {relation}")
            end = self._end(key)

    def _end(self, key: str) -> int:
        return self._starts[key] + self.specs[key].nbytes

    def read(self, key: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows `[first, last)` of a tensor; all to its end where `last` is None."""
        spec = self.specs[key]
        last = spec.rows if last is None else last
        if not 0 <= first <= last <= spec.rows:  # what lies there is another tensor's
            raise IndexError(f"rows {first}..{last} of tensor '{key}' in {self.path}, which has {spec.rows}")
        shape = (last - first, *spec.shape[1:]) if spec.shape else ()
        tensor = torch.empty(shape, dtype=spec.dtype)
        width = spec.row_numel * spec.dtype.itemsize
        view, start = _bytes(tensor), self._starts[key] + first * width
        if self._fill(view, start) < len(view):
            raise ValueError(f"{self.path} ends inside tensor '{key}': it was cut short while it was read.")
        return tensor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


class TensorFileWriter:
    """A safetensors file whose tensors are known beforehand and whose rows come in any order, from several threads."""

    def __init__(self, path: str | os.PathLike, specs: dict[str, TensorSpec]):
        self.path, self.specs = Path(path), specs
        text, self._starts, self.size = _layout(specs)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | portable.BINARY, 0o644)
        try:
            self._write(len(text).to_bytes(8, "little") + text, 0)
            os.ftruncate(self._descriptor, self.size)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, key: str, first: int, rows: torch.Tensor) -> None:
        """Put rows `[first, first + len(rows))` of a tensor in their place."""
        width = self.specs[key].row_numel * self.specs[key].dtype.itemsize
        self._write(_bytes(rows.contiguous()), self._starts[key] + first * width)

    def _write(self, data: bytes | memoryview, start: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            count = portable.write_at(self._descriptor, view[done:], start + done)
            if not count:
                raise OSError(errno.EIO, "nothing more is taken", str(self.path))
            done += count

    def flush(self) -> None:
        """What was written so far goes to the disk."""
        portable.flush_data(self._descriptor)

    def close(self, sync: bool = True) -> None:
        """`sync`: only once the bytes lie on the disk may the file be given its final name."""
        try:
            if sync:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def file_size(specs: dict[str, TensorSpec]) -> int:
    """Bytes of the file that [`TensorFileWriter`] makes of these tensors."""
    return _layout(specs)[2]


def _layout(specs: dict[str, TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """The header, where each tensor begins in the file, and the size of it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    starts = {}
    # Widest dtypes first, as the safetensors package orders them: every tensor is aligned for its dtype.
    for key in sorted(specs, key=lambda key: (-specs[key].dtype.itemsize, key)):
        spec, starts[key] = specs[key], end
        end += spec.nbytes
        header[key] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [starts[key], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return text, {key: 8 + len(text) + start for key, start in starts.items()}, 8 + len(text) + end


def named_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A float type by itself or by its name, `None` as it is. Raises `ValueError` for anything else."""
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a float type such as 'bfloat16' or torch.bfloat16, got {dtype!r}.")
    return found


def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For `json.loads`: a key that stands twice is a `ValueError`, not the later of the two."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"'{twice}' stands there twice")
    return found


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


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
