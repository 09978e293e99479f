"""One call of `generate()`: what was asked, and what its steps change.

transformers' loops hand a call's own things to some of their hooks, not to all (`_reorder_cache` gets a cache alone),
and copy what they hand on to draft models. So a call is kept beside them, in a context variable: threads that generate
at once have each their own, and behind a call within a call (a draft, a segment of best of n) the outer one is current
again. Nothing is left on configs, caches or masks, and a call that breaks off leaves nothing either.

Shape suffixes: B rows, T positions, K codes of the codebook.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .call_settings_jam import JamCallSettings, setting


@dataclass
class JamCall:
    """What `generate()` was asked, as far as its hooks and what stands around them must know.

    Args:
        settings: a JAM's own.
        generation_config: the one that was passed, or `None`.
        arguments: all others of `GenerationMixin.generate`, and `pixel_values` of the prompt.
        prompt_length: of the document, where the call writes a segment of it (jam_hf/generation/best_of_n.py); then
            `generation_config` is complete: `None` in it is a setting, no gap.
        in_parts: the loop (`custom_generate`) writes by calls of its own, so that this one needs no cache, no
            processors and no criteria.
    """

    settings: JamCallSettings
    generation_config: Any
    arguments: dict[str, Any]
    prompt_length: int | None = None
    in_parts: bool = False
    # While it runs:
    prompt_ids: torch.LongTensor | None = field(default=None, init=False)  # with codes in place of pictures
    loop: str | None = field(default=None, init=False)  # transformers' name of it; None for one that a user brings
    steps: Any = field(default=None, init=False)  # what changes single steps: jam_hf/generation/picture_steps.py

    def setting(self, name: str, own: Any) -> Any:
        """A setting of transformers', where `own` is the model's generation config."""
        return setting(name, self.arguments, self.generation_config, own)

    def with_settings(self, **values: Any) -> JamCall:
        """The call with other settings: in its config, if it has one (transformers deprecates arguments beside it)."""
        arguments, config = dict(self.arguments), copy.deepcopy(self.generation_config)
        for name, value in values.items():
            if config is None or name in arguments:
                arguments[name] = value
            else:
                setattr(config, name, value)
        return replace(self, arguments=arguments, generation_config=config)

    def steps_of(self, cache: Any) -> Any:
        """What changes steps over this cache."""
        return self.steps if self.steps is not None and self.steps.cache is cache else None


_CALL: ContextVar[JamCall | None] = ContextVar("jam_call", default=None)


def current_call() -> JamCall | None:
    """The call of `generate()` that this thread is in."""
    return _CALL.get()


@contextmanager
def running(call: JamCall) -> Iterator[None]:
    """The call is the current one inside."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)
        if call.steps is not None:
            call.steps.close()
            call.steps = None


__all__ = ["JamCall", "current_call", "running"]
