"""Several gloo processes on this machine, for the tests of what runs in more than one. It knows no model.

`run(worker, processes, *arguments)` starts them; the worker is a top-level function of an importable module, because a
new process imports it by name. Each process has one thread, and what it returns comes back. They are forked from a
server that has imported what they need, so that a test pays for its processes but not for their imports.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any


# What the server has imported; the model itself imports the most of it when a call first needs it.
PRELOADED = [
    *("torch", "torch.distributed.checkpoint.state_dict", "transformers", "transformers.trainer", "accelerate"),
    *("diffusers.models.autoencoders.vq_model", "jam_hf", "jam_hf.provenance", "jam_hf.training.recipes"),
    *("jam_hf.model.modeling_jam_vq_classes", "jam_hf.integrations.peft", "jam_hf.integrations.sharding"),
]
PATIENCE = 1800.0  # seconds after which a process is taken for dead; a busy machine may be slow


def server() -> multiprocessing.context.ForkServerContext:
    """What starts processes, forked from one that has imported all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _child(
    channel: Connection, worker: Callable, rank: int, processes: int, port: int, limit: float, arguments: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    try:
        import torch
        from transformers.utils import logging

        torch.set_num_threads(1)
        logging.set_verbosity_error()
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=limit))
        channel.send(("returned", worker(*arguments)))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:  # the test shows it in full
        channel.send(("raised", traceback.format_exc()))
        os._exit(1)  # do not wait for the others, who wait for this one


def run(worker: Callable, processes: int, *arguments: Any, limit: float = PATIENCE) -> list[Any]:
    """What `worker(*arguments)` returned in each of so many processes, in the order of their ranks.

    Args:
        worker: top-level function of an importable module; it finds the process group initialised.
        arguments: picklable.
        limit: seconds for all of it.
    Raises:
        AssertionError: if a process raised, died or did not come back in time; with the tracebacks of all that raised.
    """
    context = server()
    port = _free_port()
    children, channels = [], []
    for rank in range(processes):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(
            target=_child, args=(sender, worker, rank, processes, port, limit, arguments), daemon=True
        )
        child.start()
        sender.close()
        children.append(child)
        channels.append(receiver)
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    end = time.monotonic() + limit
    try:
        waiting = dict(zip(channels, range(processes)))
        while waiting and not failures:
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                failures |= dict.fromkeys(waiting.values(), f"no answer within {limit:.0f} seconds")
            for channel in ready:
                rank = waiting.pop(channel)
                try:
                    kind, value = channel.recv()
                except EOFError:
                    children[rank].join(5)
                    kind, value = "raised", f"died without a word, exit code {children[rank].exitcode}"
                (results if kind == "returned" else failures)[rank] = value
        for channel in wait(list(waiting), timeout=1.0) if failures else []:  # the others' tracebacks, if they have any
            try:
                kind, value = channel.recv()
            except EOFError:
                continue
            if kind == "raised":
                failures[waiting[channel]] = value
    finally:
        for child in children:
            child.join(0 if failures else 30)
            if child.is_alive():
                child.kill()
                child.join()
    if failures:
        texts = [f"--- process {rank} of {processes} ---\n{text}" for rank, text in sorted(failures.items())]
        raise AssertionError(f"{worker.__name__} failed:\n" + "\n".join(texts))
    return [results[rank] for rank in range(processes)]
