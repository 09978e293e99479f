"""`generate_batch` on a CPU: the same requests by `generate()`, in padded batches.

transformers' pages save the memory of a GPU. On a CPU each step of theirs gathers all pages and attends with one mask
over the keys of all requests, which takes about twice the time of `generate()`
(modeling_tests/benchmarks/continuous_batching.py).

It knows requests and budgets; what is obeyed and refused is decided before (continuous_settings.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from ..model.call_settings_jam import end_ids
from ..model.grammar_jam import left_padded
from .private import GenerationOutput, RequestStatus


def groups(requests: Sequence[tuple[int, int]], tokens: int) -> list[list[int]]:
    """Which of `requests` (prompt length and budget, in ids) go together: those of one budget, by length, and no more
    than `tokens` ids with padding; one that is larger goes alone.
    """
    found: list[list[int]] = []
    for index in sorted(range(len(requests)), key=lambda i: (requests[i][1], requests[i][0], i)):
        length, budget = requests[index]
        last = found[-1] if found else []
        fits = last and requests[last[0]][1] == budget and (len(last) + 1) * (length + budget) <= tokens
        if fits:
            last.append(index)
        else:
            found.append([index])
    return found


def generate_padded(
    model: Any, inputs: Sequence[list[int]], budgets: Sequence[int], settings: Any, tokens: int, progress_bar: bool
) -> dict[str, GenerationOutput]:
    """What `generate_batch` returns, in its order; several sequences of a request stand before it as its children.

    Args:
        settings: complete, and checked. tokens: of a batch, see `groups`.
    """
    copies = settings.num_return_sequences or 1
    config = copy.deepcopy(settings)
    config.num_return_sequences, config.max_length = 1, None
    ends = config.eos_token_id = end_ids(config.eos_token_id)  # where it is empty, None would be the model's own
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), 0)
    rows = [index for index in range(len(inputs)) for _ in range(copies)]
    written: dict[int, tuple[list[int], tuple[float, float]]] = {}
    batches = groups([(len(inputs[index]), budgets[index]) for index in rows], tokens)
    for group in logging.tqdm(batches, disable=not progress_bar, desc=f"Solving {len(rows)} requests", unit="batch"):
        prompts = [inputs[rows[place]] for place in group]
        config.max_new_tokens, longest = budgets[rows[group[0]]], max(map(len, prompts))
        ids, mask = left_padded(prompts, pad, model.device)
        start = time.perf_counter()
        output = model.generate(ids, attention_mask=mask, generation_config=config)
        for place, new in zip(group, output[:, longest:].tolist()):
            end = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
            written[place] = (new[:end], (start, time.perf_counter()))
    results = {}
    for index, ids in enumerate(inputs):
        names = [*(f"req_{index}__child#{i}" for i in range(copies - 1)), f"req_{index}"]
        for number, name in enumerate(names):
            new, lifespan = written[index * copies + number]
            results[name] = GenerationOutput(
                request_id=name,
                prompt_ids=list(ids),
                generated_tokens=new,
                status=RequestStatus.FINISHED,
                lifespan=lifespan,
            )
    return results


__all__ = ["generate_padded", "groups"]
