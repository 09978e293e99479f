"""Not in the source distribution: starts the processes of a distributed test, on the CPU, over gloo.

They are forked from a server that has imported what they need, so that a test pays for its processes but not for their
imports.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from processes import PRELOADED


multiprocessing.set_forkserver_preload(["tests.test_fsdp_mixin", "tests.test_tensor_parallel_mixin", *PRELOADED])


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function: Callable, args: tuple = (), nprocs: int = 2) -> None:
    """Run `function(rank, *args)` in `nprocs` new processes; the first error of any is raised here."""
    torch.multiprocessing.start_processes(function, args=args, nprocs=nprocs, join=True, start_method="forkserver")


def _run_rank(rank: int, world_size: int, host: str, port: int, function: Callable, args: tuple, kwargs: dict) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR=host, MASTER_PORT=str(port)
    )
    store = dist.TCPStore(host, port, world_size=None, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=1800)
    )
    try:
        function(rank, *args, **kwargs)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable[[Callable], Callable]:
    """`run_distributed(world_size=2)(function)(*args)` runs `function(rank, *args)` in that many processes of one
    group.
    """

    def launcher(function: Callable) -> Callable:
        def launch(*args: Any, **kwargs: Any) -> None:
            server = dist.TCPStore("localhost", 0, world_size=None, is_master=True, wait_for_workers=False)
            arguments = (world_size, server.host, server.port, function, args, kwargs)
            _start_rank_processes(_run_rank, args=arguments, nprocs=world_size)

        return launch

    return launcher
