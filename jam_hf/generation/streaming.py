"""Streaming: what a document gains while `generate()` writes it, for iteration and for `async for`, and in a thread of
its own.

What the events are is decided in events.py; this file hands them from one thread to another, and exceptions too.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Generator
from queue import Queue
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..model.modeling_jam import JamForCausalLM
from ..model.processing_jam import JamProcessor
from .events import DocumentStreamer, Event, padding_id


class JamStreamer(DocumentStreamer):
    """An iterator over what `generate(..., streamer=this)` writes in another thread, in the manner of
    `TextIteratorStreamer`.

    Args:
        model ([`JamForCausalLM`]), processor ([`JamProcessor`]): of the document; they turn codes into pictures, ids
        into text.
        skip_prompt (`bool`, defaults to `False`): no events for the prompt. A picture that the prompt has begun is
            still shown whole when it is complete.
        timeout (`float`, *optional*): seconds to wait for the next event; `queue.Empty` where none comes.
        partial_every (`int`, *optional*): also show a picture after every so many codes. Each costs as much as decoding
            the whole picture, in the thread that generates, and generation waits for it.
        skip_special_tokens (`bool`, defaults to `True`): leave markup such as `<s>` out of the text.
        pad_token_id (`int`, *optional*): what stands behind the end of a row, where `generate()` is told another than
            the model's own.

    Events are dicts, in order for each row, each with `"row"`:
        `{"type": "text", "text": str}`: whole words, as soon as they are; the pieces of a run of text joined are the
        segment. `{"type": "image", "image": PIL.Image, "image_tokens": [...]}`: a complete picture and its N ids. One
        that stays
            unfinished (a budget may end a document in a picture) has `"image": None` and the ids that there are.
        `{"type": "partial_image", ...}`: likewise, of a picture under way; what is not drawn yet is grey. (The decoder
            gets the last code for all that are missing, so pixels at the edge may still change.)
    Joined, they are the segments of `post_process_interleaved`, for any number of rows. Padding of rows that have ended
    is not shown.

    ```python
    streamer = JamStreamer(model, processor, skip_prompt=True)
    Thread(target=model.generate, kwargs={**inputs, "streamer": streamer}).start()
    for event in streamer:
        ...
    ```
    [`stream`] does that, hands over exceptions and can be stopped.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.queue: Queue = Queue()

    def _send(self, item: Event | BaseException | None) -> None:
        self.queue.put(item)

    def __iter__(self) -> JamStreamer:
        return self

    def __next__(self) -> Event:
        item = self.queue.get(timeout=self.timeout)
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item


class AsyncJamStreamer(DocumentStreamer):
    """As [`JamStreamer`], for `async for`; to be made inside a coroutine, as `AsyncTextIteratorStreamer`.

    `asyncio.TimeoutError` where no event comes within `timeout` seconds.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.queue: asyncio.Queue = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def _send(self, item: Event | BaseException | None) -> None:
        self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

    def __aiter__(self) -> AsyncJamStreamer:
        return self

    async def __anext__(self) -> Event:
        item = await asyncio.wait_for(self.queue.get(), self.timeout)
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item


class _Stopped(StoppingCriteria):
    """Every row has ended once the event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class _Generation(threading.Thread):
    """`generate()` in a thread of its own; what it raises goes to the streamer."""

    def __init__(self, streamer: DocumentStreamer, generate_kwargs: dict[str, Any]):
        super().__init__(name="jam-generate", daemon=True)
        self.streamer, self.stopped = streamer, threading.Event()
        criteria = StoppingCriteriaList([*(generate_kwargs.get("stopping_criteria") or []), _Stopped(self.stopped)])
        self.generate_kwargs = {**generate_kwargs, "streamer": streamer, "stopping_criteria": criteria}
        self.output: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.output = self.streamer.model.generate(**self.generate_kwargs)
            if self.streamer.rows is not None:
                raise ValueError("generate() told the streamer no end: beams are not streamed. Set num_beams=1.")
        except BaseException as error:
            self.error = error
            with contextlib.suppress(RuntimeError):  # the consumer's event loop is closed: there is nobody to tell
                self.streamer.fail(error)


def _pad_token_id(model: JamForCausalLM, generate_kwargs: dict[str, Any]) -> int | None:
    """What the call puts behind rows that have ended, where it says so.

    Raises:
        ValueError: if the call brings a streamer of its own.
    """
    if "streamer" in generate_kwargs:
        raise ValueError(
            "stream() makes its own streamer. Leave `streamer` out, or call generate(streamer=...) in a thread."
        )
    return padding_id(generate_kwargs, generate_kwargs.get("generation_config"), model.generation_config)


def stream(
    model: JamForCausalLM,
    processor: JamProcessor,
    *,
    skip_prompt: bool = True,
    timeout: float | None = None,
    partial_every: int | None = None,
    skip_special_tokens: bool = True,
    **generate_kwargs: Any,
) -> Generator[Event, None, Any]:
    """The events of `model.generate(**generate_kwargs)`, as it writes.

    `generate()` starts in a thread of its own with the first `next()`. What it raises is raised here. Closing the
    iterator (leaving a `for` over it, when it is let go) ends generation after the step that is under way.

    Args: see [`JamStreamer`]; the prompt is skipped by default.
    Returns:
        a generator of events; its return value is what `generate()` returned.
    Raises:
        ValueError: on settings that are out of range; everything that `generate()` raises, while iterating.
        queue.Empty: if no event comes within `timeout` seconds.
    """
    pad = _pad_token_id(model, generate_kwargs)
    streamer = JamStreamer(model, processor, skip_prompt, timeout, partial_every, skip_special_tokens, pad)

    def events() -> Generator[Event, None, Any]:
        generation = _Generation(streamer, generate_kwargs)
        generation.start()
        try:
            yield from streamer
        finally:
            generation.stopped.set()
            generation.join(timeout)
        if generation.error is not None:  # raised behind the end of the document
            raise generation.error
        return generation.output

    return events()


async def stream_async(
    model: JamForCausalLM,
    processor: JamProcessor,
    *,
    skip_prompt: bool = True,
    timeout: float | None = None,
    partial_every: int | None = None,
    skip_special_tokens: bool = True,
    **generate_kwargs: Any,
) -> AsyncIterator[Event]:
    """As [`stream`], for `async for`; the event loop goes on while the model computes.

    `aclose()` ends generation, and so does cancelling the task that iterates. `asyncio.TimeoutError` in place of
    `queue.Empty`.
    """
    pad = _pad_token_id(model, generate_kwargs)
    streamer = AsyncJamStreamer(model, processor, skip_prompt, timeout, partial_every, skip_special_tokens, pad)
    generation = _Generation(streamer, generate_kwargs)
    generation.start()
    try:
        async for event in streamer:
            yield event
    finally:
        generation.stopped.set()
        await asyncio.to_thread(generation.join, timeout)
    if generation.error is not None:
        raise generation.error


__all__ = ["AsyncJamStreamer", "JamStreamer", "stream", "stream_async"]
