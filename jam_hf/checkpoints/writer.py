"""Planned tensors made and written, shard by shard, in blocks of rows. It knows nothing of the maths and of key names.

It holds no more than a few blocks of rows, unless a source keeps a whole tensor.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from ..files import write_whole
from .plan import TensorPlan, plan_shards
from .tensor_files import INDEX, TensorFileWriter, all_finite


_FLUSH_BYTES = 256 << 20  # sent to the disk at a time, while the next ones are made
_THREADS = min(4, os.cpu_count() or 1)


def write_plans(folder: Path, plans: dict[str, TensorPlan], max_shard_size: str = "2GB") -> None:
    """Write planned tensors shard by shard, a few blocks of rows in memory at a time.

    A shard gets its name when it is whole and on the disk; shards that are there already, from a run that was stopped,
    stay.

    Raises:
        ValueError: if a tensor made has another shape than planned, or does not fit its dtype. OSError: if the disk is
            full or cannot be written; the message names file and tensor.
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


def _write_shard(
    writer: TensorFileWriter, plans: dict[str, TensorPlan], progress: tqdm, syncing: ThreadPoolExecutor
) -> None:
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
            _wait(
                flushes
            )  # the system tells of a lost page once: what a flush has told, the last one does not tell again
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
