"""Files and folders that appear whole or not at all. It knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def whole_folder(output_dir: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `output_dir` that becomes `output_dir` when the block ends well, and vanishes otherwise.

    Raises:
        FileExistsError: if `output_dir` holds anything and `overwrite` is False.
    """
    target = _checked_target(output_dir, overwrite)
    _remove_abandoned(target)
    prefix = f"{_partial_prefix(target)}{os.getpid()}-"
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        partial.chmod(0o755)
        yield partial
        _put_in_place(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def resumable_folder(output_dir: str | os.PathLike, recipe: str, overwrite: bool = False) -> Iterator[Path | None]:
    """As `whole_folder`, but what was written so far outlives a run that is killed, and is there again for the next one.

    Args:
        recipe: what is being made, in one line without spaces; what an unfinished run with another recipe left is removed.
    Yields:
        the temporary folder, `.<name>.unfinished` beside `output_dir`, or None where the last run was killed after its last
        step: `output_dir` is complete then.
    Raises:
        FileExistsError: if `output_dir` holds anything and `overwrite` is False, or another run writes it now.
    """
    target = Path(output_dir).absolute()
    partial = target.with_name(f".{target.name}.unfinished")
    note = target.with_name(f".{target.name}.unfinished.recipe")
    if note.exists() and note.read_text() == f"{recipe} complete" and target.is_dir() and not partial.exists():
        note.unlink()
        yield None
        return
    _checked_target(output_dir, overwrite)
    with note.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileExistsError(f"Another run is writing '{output_dir}' (it holds {note}). Wait for it to end.") from error
        lock.seek(0)
        if lock.read().removesuffix(" complete") != recipe or not partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _rewrite(lock, recipe)
        try:
            yield partial
            _rewrite(lock, f"{recipe} complete")
            _put_in_place(partial, target)
        except (OSError, KeyboardInterrupt, SystemExit):
            raise  # the next run goes on
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            note.unlink(missing_ok=True)
            raise
        note.unlink(missing_ok=True)


def _rewrite(file: TextIO, text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _checked_target(output_dir: str | os.PathLike, overwrite: bool) -> Path:
    target = Path(output_dir).absolute()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"'{output_dir}' is a file. Choose another output folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"'{output_dir}' is not empty. Choose another output folder, or pass overwrite=True.")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _put_in_place(partial: Path, target: Path) -> None:
    """Two renames, so that at any moment either the old folder or the new one is whole under some name."""
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.is_dir():
        target.replace(replaced)
    partial.replace(target)
    shutil.rmtree(replaced, ignore_errors=True)


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-{socket.gethostname()}-"


def _remove_abandoned(target: Path) -> None:
    """Remove what processes of this machine that were killed left of `target`."""
    prefix = _partial_prefix(target)
    for path in target.parent.glob(f"{glob.escape(prefix)}*"):
        pid = path.name.removeprefix(prefix).split("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (ValueError, OSError):
            continue  # not ours to judge


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a text file (UTF-8) aside, then rename it."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
