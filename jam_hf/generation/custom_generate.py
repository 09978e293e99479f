"""What `generate(num_candidates=..., reranker=..., retriever=...)` is short for: callables for
`generate(custom_generate=...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .best_of_n import BestOfN
from .rerankers import Reranker
from .retrieval_prompts import Retriever, WithRetrieval


def custom_generate(
    num_candidates: int | None = None,
    reranker: Reranker | str | None = None,
    retriever: Retriever | None = None,
    memory: Retriever | None = None,
    then: Callable[..., Any] | None = None,
) -> Callable[..., Any] | None:
    """`memory`: `retriever`, by its older name. `then`: the `custom_generate` that the call has itself.

    Raises:
        ValueError: where two of them would write the same document or find its documents, and as `BestOfN` does.
    """
    if memory is not None and retriever is not None:
        raise ValueError("memory=... is the older name of retriever=...; pass one of the two.")
    retriever = memory if retriever is None else retriever
    if num_candidates is not None or reranker is not None:
        if then is not None:
            raise ValueError(
                f"num_candidates={num_candidates} cannot be combined with custom_generate=... Leave it out."
            )
        then = BestOfN(num_candidates, reranker)
    return then if retriever is None else WithRetrieval(retriever, then)


__all__ = ["custom_generate"]
