"""Files and folders that appear whole or not at all. It knows nothing of what is in them.

Beside a folder `jam` that is being made lie `.jam.unfinished` (what there is of it), `.jam.unfinished.recipe` (whose it is, and
a lock on it) or `.jam.partial-...`; and, between the two renames that put it in place of an older one, that one as
`.jam.replaced`.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


@contextlib.contextmanager
def whole_folder(output_dir: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `output_dir` that becomes `output_dir` when the block ends well, and vanishes otherwise.

    Raises:
        FileExistsError: if `output_dir` holds anything and `overwrite` is False. OSError: if its parent cannot be written.
    """
    target = _target(output_dir)
    check_free(output_dir, overwrite)
    with _explained(output_dir):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not _remove_abandoned(target):
            _recover(target)
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

    A `ValueError` in the block says that the input is wrong: what was written is removed then. After any other error it stays.

    Args:
        recipe: what is being made, in one line; what an unfinished run with another recipe left is removed.
    Yields:
        the temporary folder, `.<name>.unfinished` beside `output_dir`, or None where the last run was killed after its last
        step: `output_dir` is complete then.
    Raises:
        FileExistsError: if `output_dir` holds anything and `overwrite` is False, or another run writes it now. OSError: if its
            parent cannot be written.
    """
    target = _target(output_dir)
    partial, note = _unfinished(target)
    check_free(output_dir, overwrite)
    with _explained(output_dir):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(note, output_dir) as file:
        try:
            noted, _, listing = file.read().partition("\n")
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
                if partial.exists():
                    shutil.rmtree(partial)
                partial.mkdir()
                file.truncate(0)
                _append(file, f"{recipe}\n")
            yield partial
            _sync(partial)
            _append(file, _listing(partial))
            _put_in_place(partial, target)
        except ValueError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            with contextlib.suppress(OSError):
                partial.rmdir()  # where nothing was written, nothing stays
            if not partial.exists():
                note.unlink(missing_ok=True)


def check_free(output_dir: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise a `FileExistsError` if no folder can be made at `output_dir`; nothing is written.

    What a killed run left there is looked at by the run that goes on with it.
    """
    target = _target(output_dir)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"'{output_dir}' is a file. Choose another output folder.")
    if os.path.ismount(target):
        raise FileExistsError(f"'{output_dir}' is a mount point, which cannot be replaced. Choose a folder inside it.")
    if not _unfinished(target)[1].exists():
        _refuse_full(target, overwrite)


def check_apart(output_dir: str | os.PathLike, *sources: Any, called: str = "an input") -> None:
    """Raise a `ValueError` if the output folder is, or holds, a source; what is no path, or does not exist, is passed over."""
    target = Path(output_dir).resolve()
    for source in sources:
        if isinstance(source, (str, os.PathLike)) and Path(source).exists():
            source = Path(source).resolve()
            if source == target or target in source.parents:
                what = f"is also {called}" if source == target else f"holds the input '{source}'"
                raise ValueError(f"output_dir '{output_dir}' {what}; choose another folder.")


def _refuse_full(target: Path, overwrite: bool) -> None:
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"'{target}' is not empty. Choose another output folder, or pass overwrite=True (--overwrite).")


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
            f"cannot write '{output_dir}' or beside it: {error.strerror} ('{error.filename}'). Choose another output folder",
        ) from error


@contextlib.contextmanager
def _locked(note: Path, output_dir: str | os.PathLike) -> Iterator[TextIO]:
    """The note, open and locked. Only who holds the lock removes it; who then gets a lock on the removed file opens the new."""
    while True:
        with contextlib.ExitStack() as stack:
            with _explained(output_dir):
                file = stack.enter_context(note.open("a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FileExistsError(
                    f"Another run is writing '{output_dir}' (it holds {note}). Wait for it to end, or choose another folder."
                ) from error
            if not _is_still(note, file):
                continue
            file.seek(0)
            yield file
            return


def _is_still(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _append(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _listing(folder: Path) -> str:
    """Digest of the names, sizes and times of all files: a rename leaves it as it is, any change of the content does not."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = path.stat()
        digest.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Only once its files lie on the disk may a folder get its final name."""
    for path in (*(path for path in folder.rglob("*") if path.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(partial: Path, target: Path) -> None:
    """Two renames, so that at any moment either the old folder or the new one is whole under some name."""
    replaced = _replaced(target)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.is_dir():
        target.replace(replaced)
    try:
        partial.replace(target)
    except OSError:
        _recover(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _recover(target: Path) -> None:
    """Give the old folder its name back, if a run was killed between the two renames."""
    if _replaced(target).is_dir() and not target.exists():
        _replaced(target).replace(target)


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-{socket.gethostname()}-"


def _remove_abandoned(target: Path) -> bool:
    """Remove what processes of this machine that were killed left of `target`; returns whether others write it."""
    prefix, others = _partial_prefix(target), False
    for path in target.parent.glob(f"{glob.escape(prefix)}*"):
        pid = path.name.removeprefix(prefix).split("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (ValueError, OSError):
            others = True  # not ours to judge
        else:
            others = True
    return others


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
