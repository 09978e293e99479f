"""What has to work on other systems: no call of one system alone outside `portable`, and folders under Windows' rules.

Windows itself is not at hand here. Its rules for files are put in place of ours (`windows`): what is open is neither
removed nor renamed, a folder takes no name that is taken, and there is no reading or writing at a place.
"""

import ast
import errno
import os
from pathlib import Path

import pytest
import torch
from test_files import (  # noqa: F401  (run again, under other rules)
    test_a_folder_filled_meanwhile_stays_and_what_was_made_is_kept,
    test_a_lock_that_is_held_can_be_handed_on,
    test_a_second_run_of_any_kind_is_refused_at_its_start,
    test_many_writers_of_one_file_leave_a_whole_one,
    test_of_many_runs_at_once_one_wins_and_nothing_is_lost,
    test_overwrite_holds_for_what_came_meanwhile,
    test_what_a_killed_run_left_of_a_file_is_gone_with_the_next,
)

import jam_hf
from jam_hf import portable
from jam_hf.checkpoints.tensor_files import TensorFile, TensorFileWriter, TensorSpec
from jam_hf.files import whole_folder


PACKAGE = Path(jam_hf.__file__).parent
SOME_SYSTEMS = {"fcntl", "resource", "termios", "pwd", "grp", "posix", "pty", "syslog", "msvcrt", "winreg", "_winapi"}
SOME_CALLS = {
    "os": "fork forkpty fdatasync pread pwrite preadv pwritev sysconf sched_getaffinity sched_setaffinity getuid "
    "geteuid getgid getpgid killpg kill mkfifo mknod nice setsid uname wait3 wait4 getloadavg posix_fadvise "
    "sendfile openpty".split(),
    "signal": "SIGKILL SIGALRM SIGHUP SIGUSR1 SIGUSR2 SIGCHLD SIGPIPE SIGSTOP SIGCONT alarm setitimer pause".split(),
    "time": ["tzset"],
}


def of_one_system(tree):
    """What a file imports, calls or opens that not every system has."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in SOME_SYSTEMS)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if (node.module or "").split(".")[0] in SOME_SYSTEMS:
                yield node.module
            yield from (alias.name for alias in node.names if alias.name in SOME_CALLS.get(node.module, ()))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in SOME_CALLS.get(node.value.id, ()):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith(("/proc/", "/sys/", "/dev/")):
                yield node.value


def test_what_one_system_has_alone_is_asked_for_in_one_place():
    found = {
        path.relative_to(PACKAGE).as_posix(): sorted(set(of_one_system(ast.parse(path.read_text(encoding="utf-8")))))
        for path in PACKAGE.rglob("*.py")
    }
    assert found.pop("portable.py") == ["os.preadv", "os.pwrite"]
    assert not {name: what for name, what in found.items() if what}


@pytest.mark.parametrize(
    "line",
    [
        "import fcntl",
        "from resource import getrlimit",
        "os.fdatasync(1)",
        "from os import fork",
        "open('/proc/meminfo')",
    ],
)
def test_the_search_finds_what_it_is_for(line):
    assert len(list(of_one_system(ast.parse(line)))) == 1


# ----- Windows' rules -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def windows(monkeypatch):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("which files are open is asked of /proc")
    monkeypatch.setattr(portable, "WINDOWS", True)
    for name in ("pread", "preadv", "pwrite", "pwritev", "fdatasync"):
        monkeypatch.delattr(os, name, raising=False)

    def free(path):
        path = os.path.realpath(path)
        for number in os.listdir("/proc/self/fd"):
            try:
                opened = os.readlink(f"/proc/self/fd/{number}")
            except FileNotFoundError:
                continue
            if opened == path or opened.startswith(f"{path}{os.sep}"):
                raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))

    def untaken(path):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", str(path))

    def over_files_only(path):
        free(path)
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Access is denied", str(path))

    def ruled(name, *rules):
        original = getattr(os, name)

        def call(*arguments, **settings):
            for rule, argument in zip(rules, arguments, strict=False):
                if isinstance(argument, (str, os.PathLike)) and not settings.get("dir_fd"):
                    rule(argument)
            return original(*arguments, **settings)

        monkeypatch.setattr(os, name, call)

    for name, *rules in (
        ("rename", free, untaken),
        ("replace", free, over_files_only),
        ("unlink", free),
        ("rmdir", free),
    ):
        ruled(name, *rules)


def test_the_rules_hold_here(tmp_path):
    """Or the tests of this file prove nothing."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (tmp_path / "a" / "x").open("wb"):
        for forbidden in ((tmp_path / "a" / "x").unlink, lambda: (tmp_path / "a").rename(tmp_path / "c")):
            with pytest.raises(PermissionError):
                forbidden()
    with pytest.raises(FileExistsError):
        (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(PermissionError):
        (tmp_path / "a").replace(tmp_path / "b")


def test_what_a_run_that_is_gone_left_is_removed(tmp_path, monkeypatch):
    from jam_hf.files import _partial_prefix

    monkeypatch.setattr(portable, "process_runs", lambda number: number == 7)
    for owner in ("7-a", "8-b", "x-c"):
        Path(f"{tmp_path}/{_partial_prefix(tmp_path / 'jam').removesuffix('-')}-{owner}").mkdir()
    with whole_folder(tmp_path / "jam") as folder:
        (folder / "x").touch()
    assert sorted(path.name[-3:] for path in tmp_path.iterdir()) == ["7-a", "jam", "x-c"]


def test_processes_and_memory_are_told():
    assert portable.process_runs(os.getpid()) and not portable.process_runs(2**22 + 1)
    assert 2**20 < portable.free_memory() < 2**50


def test_tensors_at_their_places(tmp_path):
    tensors = {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(5, dtype=torch.int64)}
    writer = TensorFileWriter(tmp_path / "x", {key: TensorSpec(tuple(t.shape), t.dtype) for key, t in tensors.items()})
    for key, tensor in tensors.items():
        for row in reversed(range(len(tensor))):
            writer.write(key, row, tensor[row : row + 1])
    writer.flush()
    writer.close()
    file = TensorFile(tmp_path / "x")
    assert all(torch.equal(file.read(key, 1, 3), tensor[1:3]) for key, tensor in tensors.items())
    file.close()
