"""Files and folders that appear whole or not at all. It knows nothing of what is in them.

Beside a folder `jam` that is being made lie `.jam.unfinished.recipe` (the lock of whoever makes it; for a run that can
be taken up again, also what it makes) and `.jam.unfinished` or `.jam.partial-...` (what there is of it); and, between
the two renames that put it in place of an older one, that one as `.jam.replaced`. What was made while somebody else
filled `jam` stays beside it, as `jam.new` or `.jam.unfinished`; the error says which.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from . import portable


_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # what a rename of a folder says where something lies


@contextlib.contextmanager
def whole_folder(
    output_dir: str | os.PathLike, overwrite: bool = False, lock: BinaryIO | None = None
) -> Iterator[Path]:
    """A temporary sibling of `output_dir` that becomes `output_dir` when the block ends well, and vanishes otherwise.

    Args:
        overwrite: whether it may replace what lies there, now and when the block ends.
        lock: of `folder_lock`, where the caller holds it already.
    Raises:
        FileExistsError: if `output_dir` holds anything and `overwrite` is False, or another run writes it. If it was
            filled while the block ran, it stays as it is, and the error says where the new folder lies. OSError: if it
            cannot be written.
    """
    target = _target(output_dir)
    _check_target(target, output_dir)
    with contextlib.ExitStack() as stack:
        if lock is None:
            lock = stack.enter_context(folder_lock(output_dir))
        if not _remove_abandoned(target):
            _recover(target)
        _refuse_full(target, overwrite)
        with _explained(output_dir):
            prefix = f"{_partial_prefix(target)}{os.getpid()}-"
            partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            partial.chmod(0o755)
            with naming(partial):
                yield partial
            _sync(partial)
            _put_in_place(partial, target, overwrite)
        except BaseException as error:
            if not isinstance(error, _NotPlacedError):
                shutil.rmtree(partial, ignore_errors=True)
                raise
            kept = _free_name(target)
            portable.rename_folder(partial, kept)
            raise _not_placed(error.reason, target, kept) from error.reason


@contextlib.contextmanager
def resumable_folder(output_dir: str | os.PathLike, recipe: str, overwrite: bool = False) -> Iterator[Path | None]:
    """As `whole_folder`, but what was written so far outlives a run that is killed, and is there again for the next
    one.

    A `ValueError` in the block says that the input is wrong: what was written is removed then. After any other error it
    stays.

    Args:
        recipe: what is being made, in one line; what an unfinished run with another recipe left is removed.
    Yields:
        the temporary folder, `.<name>.unfinished` beside `output_dir`, or None where the last run was killed after its
        last
        step: `output_dir` is complete then.
    Raises:
        FileExistsError, OSError: as `whole_folder`; after them the temporary folder stays, and the next run goes on
            with it.
        ValueError: if the note beside the temporary folder is damaged.
    """
    target = _target(output_dir)
    partial, note = _unfinished(target)
    _check_target(target, output_dir)
    with folder_lock(output_dir) as file:
        noted, _, listing = _read_note(file, note, partial).partition("\n")
        if listing and not partial.exists() and target.is_dir() and _listing(target) == listing:
            shutil.rmtree(_replaced(target), ignore_errors=True)  # killed behind its last rename
            if noted == recipe:
                yield None
                return
        _recover(target)
        _refuse_full(target, overwrite)
        if noted == recipe and partial.is_dir():
            file.truncate(len(f"{recipe}\n".encode()))  # what stood behind says that it is complete
        else:
            with _explained(output_dir):
                if partial.exists():
                    shutil.rmtree(partial)
                partial.mkdir()
            file.truncate(0)
            _append(file, f"{recipe}\n", note)
        try:
            with naming(partial):
                yield partial
            _sync(partial)
            _append(file, _listing(partial), note)
            _put_in_place(partial, target, overwrite)
        except ValueError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except _NotPlacedError as error:
            raise _not_placed(error.reason, target, partial) from error.reason
        finally:
            with contextlib.suppress(OSError):
                partial.rmdir()  # where nothing was written, nothing stays


def check_free(output_dir: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise a `FileExistsError` if no folder can be made at `output_dir`, or another run makes it now; nothing is
    written.

    It says no more than how things are now: whoever makes the folder looks again. What a killed run left there is
    looked at by the run that goes on with it.
    """
    target = _target(output_dir)
    note = _unfinished(target)[1]
    _check_target(target, output_dir)
    free, noted = True, False
    with _explained(output_dir), contextlib.suppress(FileNotFoundError), note.open("r+b") as file:
        free, noted = portable.try_lock(file), note.stat().st_size > 0
    if not free:
        raise _busy(output_dir, note)
    if not noted:
        _refuse_full(target, overwrite)


def _check_target(target: Path, output_dir: str | os.PathLike) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"'{output_dir}' is a file. Choose another output folder.")
    if os.path.ismount(target):
        raise FileExistsError(f"'{output_dir}' is a mount point, which cannot be replaced. Choose a folder inside it.")


def check_apart(output_dir: str | os.PathLike, *sources: Any, called: str = "an input") -> None:
    """Raise a `ValueError` if the output folder is, or holds, a source; what is no path, or does not exist, is
    passed over.
    """
    target = Path(output_dir).resolve()
    for source in sources:
        if isinstance(source, (str, os.PathLike)) and Path(source).exists():
            source = Path(source).resolve()
            if source == target or target in source.parents:
                what = f"is also {called}" if source == target else f"holds the input '{source}'"
                raise ValueError(f"output_dir '{output_dir}' {what}; choose another folder.")


def _refuse_full(target: Path, overwrite: bool) -> None:
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(
            f"'{target}' is not empty. Choose another output folder, or pass overwrite=True (--overwrite)."
        )


def _target(output_dir: str | os.PathLike) -> Path:
    """The folder itself, not a link to it: what is renamed lies in one file system with it."""
    return Path(os.path.realpath(output_dir))


def _unfinished(target: Path) -> tuple[Path, Path]:
    folder = target.parent / f".{target.name}.unfinished"
    return folder, folder.with_name(f"{folder.name}.recipe")


def _replaced(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


@contextlib.contextmanager
def _explained(output_dir: str | os.PathLike) -> Iterator[None]:
    """Errors of the file system say which folder was asked for and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write '{output_dir}' or beside it: {error.strerror} ('{error.filename}'). Choose another output "
            "folder",
        ) from error


@contextlib.contextmanager
def folder_lock(output_dir: str | os.PathLike) -> Iterator[BinaryIO]:
    """The right to write `output_dir`, for one run at a time, until the block ends; yields the open file that is the
    lock.

    The lock is the system's: when a run is killed, it is free. Only who holds it removes the file; who then gets a lock
    on the removed file opens the new one.

    Raises:
        FileExistsError: if another run holds it. OSError: if nothing can be written beside `output_dir`.
    """
    target = _target(output_dir)
    partial, note = _unfinished(target)
    with _explained(output_dir):
        target.parent.mkdir(parents=True, exist_ok=True)
        file = _try_locked(note)
    if file is None:
        raise _busy(output_dir, note)
    with file:
        try:
            yield file
        finally:
            if not partial.exists():
                portable.remove_locked(note, file)


def _try_locked(path: Path) -> BinaryIO | None:
    """The file at `path`, open and locked; None where it is another run's."""
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("a+b"))
            if not portable.try_lock(file):
                return None
            if portable.is_still(path, file):
                stack.pop_all()
                return file


def _locked(path: Path) -> BinaryIO:
    """As `_try_locked`, once the other run has done with it."""
    while (file := _try_locked(path)) is None:
        pass
    return file


def _busy(output_dir: str | os.PathLike, note: Path) -> FileExistsError:
    return FileExistsError(
        f"Another run is writing '{output_dir}' (it holds {note}). Wait for it to end, or choose another folder."
    )


def _read_note(file: BinaryIO, note: Path, partial: Path) -> str:
    file.seek(0)
    try:
        return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The note '{note}', which says what an unfinished run makes, is damaged ({error}). Delete it and "
            f"'{partial}' to begin again."
        ) from error


def _append(file: BinaryIO, text: str, note: Path) -> None:
    with naming(note):
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _listing(folder: Path) -> str:
    """Digest of the names, sizes and times of all files: a rename leaves it as it is, any change of the content
    does not.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = path.stat()
        digest.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Only once its files lie on the disk may a folder get its final name."""
    for path in (*(path for path in folder.rglob("*") if path.is_file()), folder):
        with naming(path):
            portable.flush_path(path)


class _NotPlacedError(Exception):
    """A whole folder that could not get its name. reason: what the system said."""

    def __init__(self, reason: OSError):
        self.reason = reason


def _put_in_place(partial: Path, target: Path, overwrite: bool) -> None:
    """Two renames, so that at any moment either the old folder or the new one is whole under some name.

    Without `overwrite` it is one, and the system refuses it if anything lies in `target` at that moment.
    """
    replaced = _replaced(target)
    try:
        if overwrite and target.is_dir():
            shutil.rmtree(replaced, ignore_errors=True)
            portable.rename_folder(target, replaced)
        portable.rename_folder(partial, target)
    except BaseException as error:
        _recover(target)
        if isinstance(error, OSError):
            raise _NotPlacedError(error) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _not_placed(reason: OSError, target: Path, kept: Path) -> OSError:
    rest = f"What this run made is whole, and lies in '{kept}': rename it, or run again with another output folder"
    old = f" (what lay there before is in '{_replaced(target)}')" if _replaced(target).is_dir() else ""
    if reason.errno in _TAKEN:
        return FileExistsError(f"'{target}' was filled while this run worked, and stays as it is{old}. {rest}.")
    return OSError(reason.errno, f"cannot give '{target}' its name: {reason.strerror}{old}. {rest}")


def _free_name(target: Path) -> Path:
    names = (f"{target.name}.new{f'-{number}' * (number > 1)}" for number in range(1, 10**6))
    return next(path for path in map(target.with_name, names) if not path.exists())


def _recover(target: Path) -> None:
    """Give the old folder its name back, if a run was killed between the two renames."""
    if _replaced(target).is_dir() and not target.exists():
        portable.rename_folder(_replaced(target), target)


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-{socket.gethostname()}-"


def _remove_abandoned(target: Path) -> bool:
    """Remove what processes of this machine that were killed left of `target`; returns whether others write it."""
    prefix, others = _partial_prefix(target), False
    for path in target.parent.glob(f"{glob.escape(prefix)}*"):
        pid = path.name.removeprefix(prefix).split("-")[0]
        if not pid.isdecimal() or portable.process_runs(int(pid)):
            others = True  # at work, or not ours to judge
        else:
            shutil.rmtree(path, ignore_errors=True)
    return others


def write_whole(path: str | os.PathLike, content: str | bytes, overwrite: bool = True) -> None:
    """Write a file (text in UTF-8) aside, then rename it, once it lies on the disk; of two runs at once, one after the
    other.

    Raises:
        FileExistsError: if something has the name by then and `overwrite` is False. OSError: if it cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")  # one name, so that what a killed run left is gone with the next
    note = path.with_name(f".{path.name}.lock")
    with naming(path), _locked(note) as lock:
        try:
            with aside.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                aside.replace(path)
            else:
                portable.rename_to_free(aside, path)
        except FileExistsError as error:
            raise FileExistsError(f"'{path}' exists. Choose another name, or pass overwrite=True.") from error
        finally:
            aside.unlink(missing_ok=True)
            portable.remove_locked(note, lock)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the file system that do not say which file they are about say `path`; those of a full disk do not.

    What Rust's libraries (safetensors, tokenizers) raise, with the system's number at its end, becomes an `OSError` as
    well.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None or f"{Path(path).name}" in str(error):
            raise
        raise OSError(error.errno, f"cannot write '{path}': {error.strerror}") from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, f"cannot write in '{path}': {os.strerror(code)} ({type(error).__name__})") from error


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: if it is no JSON (damaged, cut short, nested too deep), or no `kind`; the message names the file.
            OSError: if it cannot be read.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"'{path}' cannot be read: its JSON is nested too deep.") from error
    except ValueError as error:  # of json or of UTF-8
        raise ValueError(f"'{path}' is damaged or no JSON file: {error}.") from error
    if not isinstance(content, kind):
        raise ValueError(f"'{path}' is damaged: expected a JSON {kind.__name__}, got {content!r:.80}.")
    return content
