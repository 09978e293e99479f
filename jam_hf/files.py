"""Files and folders that appear whole or not at all. It knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(output_dir: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `output_dir` that becomes `output_dir` when the block ends well, and vanishes otherwise.

    Raises:
        FileExistsError: if `output_dir` holds anything and `overwrite` is False.
    """
    target = Path(output_dir).absolute()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"'{output_dir}' is a file. Choose another output folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"'{output_dir}' is not empty. Choose another output folder, or pass overwrite=True.")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    prefix = f"{_partial_prefix(target)}{os.getpid()}-"
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if target.is_dir():
            shutil.rmtree(target)
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
