"""Threads of a process: how many, and how long they spin when they wait. It is said before torch is imported.

torch computes with OpenMP threads (its own libgomp) that spin where they wait for the last of them. Where another
process takes a core, they spin for whole time slices. It knows environment variables, and what Linux says of itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath


# Who sets one of these has decided.
USERS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Rounds of the loop in which a thread waits before it sleeps (libgomp's own: 300,000). Measured, docs/machines.md.
SPINS = 10_000
# Below so many bytes of weights a step is too short to be shared: one thread writes documents faster than two.
SMALL_BYTES = 48 << 20


def settle(small: bool = False, environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Put the settings of threads into the environment, unless the user has put one there.

    Args:
        small: one thread is the fastest for this work, see `is_small`.
        root: where `proc` and `sys` are.
    """
    if any(name in environment for name in USERS):
        return
    environment["GOMP_SPINCOUNT"] = str(SPINS)
    quota = min(_quotas(root), default=None)
    if small:
        environment["OMP_NUM_THREADS"] = "1"
    elif quota is not None and quota < usable_processors():
        environment["OMP_NUM_THREADS"] = str(max(1, int(quota)))  # else as many as torch finds cores


def is_small(folder: str) -> bool:
    """Whether the checkpoint in this folder is a model for which one thread is enough; of a Hub id nothing is known."""
    sizes = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
    return 0 < sum(sizes) < SMALL_BYTES


def usable_processors() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """What the control groups of this process (version 1 or 2) and those around them allow, in processors."""
    for line in _words(root / "proc/self/cgroup", "\n"):
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        inside = PurePosixPath(place.lstrip("/"))
        for folder in (
            mount,
            *(mount / part for part in (inside, *inside.parents)),
        ):  # inside a container: the mount alone
            words = _words(folder / "cpu.max")
            if controllers:
                words = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
            if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):  # else "max", or -1
                yield int(words[0]) / int(words[1])


def _words(path: Path, separator: str | None = None) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return []
    return text.split(separator) if text else []


__all__ = ["SMALL_BYTES", "SPINS", "USERS", "is_small", "settle", "usable_processors"]
