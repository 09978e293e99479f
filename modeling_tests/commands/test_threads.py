"""What the command line decides about threads, on made-up machines, and that other libraries do not talk before it."""

import subprocess
import sys
import warnings

import processes
import pytest

import jam_hf_cli
from jam_hf_cli import threads
from jam_hf_cli.threads import SMALL_BYTES, SPINS, USERS, is_small, settle


BOUNDED = {"GOMP_SPINCOUNT": str(SPINS)}


def machine(root, **files):
    """Files by their path; `__` is a slash, and `DOT` a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def settled(root, small=False, **environment):
    settle(small, environment, root)
    return environment


@pytest.fixture(autouse=True)
def four_processors(monkeypatch):
    monkeypatch.setattr(threads, "usable_processors", lambda: 4)


def test_without_quotas_torch_counts_its_threads_itself(tmp_path):
    assert settled(tmp_path) == BOUNDED
    assert settled(tmp_path, small=True) == {**BOUNDED, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("quota", "expected"), [("150000 100000", "1"), ("200000 100000", "2"), ("50000 100000", "1"), ("max 100000", None)]
)
@pytest.mark.parametrize("place", ["/", "/pods/one"])
def test_version_2(quota, expected, place, tmp_path):
    """The quota of a group holds for all inside it."""
    root = machine(tmp_path, proc__self__cgroup=f"0::{place}\n", sys__fs__cgroup__pods__cpuDOTmax=quota)
    (root / "sys/fs/cgroup/pods/one").mkdir()
    (root / "sys/fs/cgroup/pods/one/cpu.max").write_text("max 100000")
    if place == "/":
        expected = None
    assert settled(root).get("OMP_NUM_THREADS") == expected
    (root / "sys/fs/cgroup/cpu.max").write_text(quota)  # as inside a container
    assert settled(root).get("OMP_NUM_THREADS") == (
        None if "max" in quota else str(max(1, int(quota.split()[0]) // 100000))
    )


@pytest.mark.parametrize(("quota", "expected"), [("300000", "3"), ("20000", "1"), ("-1", None), ("800000", None)])
@pytest.mark.parametrize("folder", ["docker/abc", ""])
def test_version_1(quota, expected, folder, tmp_path):
    """In a container the group's path is the host's, and its files lie at the mount."""
    root = machine(tmp_path, proc__self__cgroup="5:cpuset:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n")
    place = root / "sys/fs/cgroup/cpu" / folder
    place.mkdir(parents=True)
    (place / "cpu.cfs_quota_us").write_text(quota)
    (place / "cpu.cfs_period_us").write_text("100000")
    assert settled(root).get("OMP_NUM_THREADS") == expected


def test_a_machine_without_control_groups_has_no_quota(tmp_path):
    assert settled(machine(tmp_path, proc__self__cgroup=""), small=True) == settled(tmp_path / "none", small=True)


@pytest.mark.parametrize("name", USERS)
def test_what_the_user_has_set_stays(name, tmp_path):
    root = machine(tmp_path, proc__self__cgroup="0::/\n", sys__fs__cgroup__cpuDOTmax="100000 100000")
    assert settled(root, small=True, **{name: "7"}) == {name: "7"}


def test_small_models_are_known_by_their_files(tmp_path):
    assert not is_small(str(tmp_path)) and not is_small("someone/on-the-hub")
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    assert is_small(str(tmp_path))
    with (tmp_path / "model-2.safetensors").open("wb") as file:
        file.truncate(SMALL_BYTES)
    assert not is_small(str(tmp_path))


def test_a_process_of_its_own_settles_its_threads_before_torch(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(jam_hf_cli, "settle", lambda small: seen.append(small))
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "error")
    model = ["--model", str(tmp_path)]
    for arguments in (["certify", *model], ["generate", "x", *model, "--output", "x.pdf"]):
        with warnings.catch_warnings():
            assert jam_hf_cli.main(arguments, own_process=True) == 2
    assert seen == [False, True]
    assert jam_hf_cli.main(arguments) == 2 and len(seen) == 2  # inside another process nothing is set


def test_other_libraries_say_nothing_before_the_command(fused, tmp_path):
    """Neither do they when a JAM is loaded, which imports the most."""
    model = str(fused("llama", "cross", "preserving"))
    command = [sys.executable, "-m", "jam_hf_cli", "generate", "a", "--model", model, "--mode", "text"]
    command += ["--max-new-tokens", "1", "--output", str(tmp_path / "a.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=processes.PATIENCE)
    assert done.returncode == 0 and done.stdout.startswith("# a\n"), done.stderr
    assert [line for line in done.stderr.splitlines() if line and "Loading weights" not in line] == []
