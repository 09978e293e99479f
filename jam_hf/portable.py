"""What Linux, macOS and Windows do each in its own way: locks, flushes, reading and writing at a place, renaming
folders.

It knows nothing of what the files are for. Only the standard library, filelock and psutil are used; what a system lacks
is looked for when it is called, so that everything can be imported everywhere.

Windows, other than the others, removes and renames no file that is open, and no folder onto another, be it empty.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import BinaryIO

from filelock import lock_descriptor


WINDOWS = os.name == "nt"
BINARY = getattr(os, "O_BINARY", 0)  # else Windows turns line ends into its own
_PLACES = threading.Lock()


def try_lock(file: BinaryIO) -> bool:
    """Whether the system's lock on an open file is ours now. It is free when the file is closed, or who holds it is
    killed.

    Who only looks whether it is free holds it for a moment, so that it is tried for some hundredths of a second.
    """
    for _ in range(5):
        if lock_descriptor(file.fileno(), blocking=False):
            return True
        time.sleep(0.01)
    return False


def is_still(path: Path, file: BinaryIO) -> bool:
    """Whether an open file is what lies at `path` now."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def remove_locked(path: Path, file: BinaryIO) -> None:
    """Remove a file whose lock we hold, and give the lock back; on Windows it stays if another run has opened it by
    then.
    """
    if not WINDOWS:
        path.unlink(missing_ok=True)  # before the lock is free: whoever gets it then sees that the file is gone
        return
    file.close()
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        pass  # theirs now


def rename_folder(source: Path, target: Path) -> None:
    """Give a folder another name. Where a file or a full folder lies there, nothing is changed: an `OSError` of the
    system.
    """
    if WINDOWS:
        if target.is_dir():
            target.rmdir()
        source.rename(target)
    else:
        source.replace(target)


def rename_to_free(source: Path, target: Path) -> None:
    """Give a file a name that nothing has.

    Raises:
        FileExistsError: if something has it. Other than a rename, a link is refused then by the system.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        source.replace(target)
    else:
        source.unlink()


def flush_data(descriptor: int) -> None:
    """What was written goes to the disk; its times may follow later, where the system can tell them apart."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def flush_path(path: Path) -> None:
    """A file, or the names in a folder, go to the disk. Windows writes names itself, and flushes what may be
    written only.
    """
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, (os.O_RDWR if WINDOWS else os.O_RDONLY) | BINARY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_at(descriptor: int, view: memoryview, start: int) -> int:
    """Fill `view` (bytes) from a place of the file; returns how many came, 0 at its end. Threads may share the file."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], start)
    with _PLACES:
        os.lseek(descriptor, start, os.SEEK_SET)
        data = os.read(descriptor, min(len(view), 2**30))
    view[: len(data)] = data
    return len(data)


def write_at(descriptor: int, view: memoryview, start: int) -> int:
    """Write `view` (bytes) at a place of the file; returns how many were taken. Threads may share the file."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, view, start)
    with _PLACES:
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.write(descriptor, view[: 2**30])


def bytes_on_disk(path: Path) -> int:
    """What a file takes of the disk: of a sparse one what was written. Windows does not say it: the length, there."""
    found = path.stat()
    return found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size


def process_runs(pid: int) -> bool:
    """Whether a process of this machine has this number. (Windows ends the process that `os.kill(pid, 0)` asks
    about.)
    """
    import psutil

    return psutil.pid_exists(pid)


def free_memory() -> int:
    """Bytes of RAM that can be had without swapping."""
    import psutil

    return psutil.virtual_memory().available
