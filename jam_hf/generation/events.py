"""From ids, as `generate()` writes them, to events: text as it comes, each picture when it is complete.

`PictureLayout.runs` tells text from pictures, as for `JamProcessor.post_process_interleaved`. When text is readable is
decided by transformers' `TextStreamer`. It does not know how ids are chosen, nor how events reach their consumer
(streaming.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from ..model.call_settings_jam import end_ids, setting
from ..model.modeling_jam import JamForCausalLM
from ..model.processing_jam import JamProcessor


Event = dict[str, Any]


def padding_id(arguments: Mapping[str, Any], passed: Any, own: Any) -> int | None:
    """What a call puts behind rows that have ended, as GenerationMixin has it: its padding, or the first of its ends.

    arguments, passed, own: as in `call_settings_jam.setting`; an argument that is `None` says nothing.
    """
    said = {name: value for name, value in arguments.items() if value is not None}
    pad, ends = (setting(name, said, passed, own) for name in ("pad_token_id", "eos_token_id"))
    return pad if pad is not None else next(iter(end_ids(ends)), None)


class _DecodedAfter:
    """A tokenizer that decodes ids as they read behind `before`: some decoders strip the first space of all that
    they get.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.before: list[int] = []

    def decode(self, ids: list[int], **decode_kwargs: Any) -> str:
        known = len(self.tokenizer.decode(self.before, **decode_kwargs)) if self.before else 0
        return self.tokenizer.decode([*self.before, *ids], **decode_kwargs)[known:]


class _TextRun(TextStreamer):
    """One run of text, up to a picture or the end: the stock rule for readable pieces, and what of them was not
    sent yet.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool):
        super().__init__(_DecodedAfter(tokenizer), skip_special_tokens=skip_special_tokens)
        self.waiting, self.begun = "", False

    def put(self, value: torch.Tensor) -> None:
        ids = [*self.token_cache, *value.tolist()]
        super().put(value)
        self._flushed(ids)

    def end(self) -> None:
        ids = list(self.token_cache)
        super().end()
        self._flushed(ids)

    def _flushed(self, ids: list[int]) -> None:
        if not self.token_cache:
            self.tokenizer.before = [*self.tokenizer.before, *ids][-8:]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.waiting += text

    def take(self) -> str:
        """The text that may be sent. White space alone waits: a run of nothing else is no segment of a document."""
        if not self.begun and not self.waiting.strip():
            return ""
        text, self.waiting, self.begun = self.waiting, "", True
        return text


class _Row:
    """What is under way in one row: a run of text, or the codes of a picture."""

    def __init__(self, text: _TextRun):
        self.text = text
        self.codes: list[int] = []


class DocumentStreamer(BaseStreamer):
    """Ids to events, row by row; how events reach the consumer is the business of streaming.py."""

    def __init__(
        self,
        model: JamForCausalLM,
        processor: JamProcessor,
        skip_prompt: bool = False,
        timeout: float | None = None,
        partial_every: int | None = None,
        skip_special_tokens: bool = True,
        pad_token_id: int | None = None,
    ):
        if partial_every is not None and (not isinstance(partial_every, int) or partial_every < 1):
            raise ValueError(
                "partial_every must be a number of codes, at least 1, or None for no partial pictures; got "
                f"{partial_every!r}."
            )
        self.model, self.processor = model, processor
        self.skip_prompt, self.timeout = skip_prompt, timeout
        self.partial_every, self.skip_special_tokens = partial_every, skip_special_tokens
        config = model.config
        self.layout = config.picture_layout
        self.pad = padding_id({"pad_token_id": pad_token_id}, None, model.generation_config)
        self.rows: Any = None  # a list of _Row from the first ids on
        self.events: list[Event] = []

    # ----- what GenerationMixin calls ---------------------------------------------------------------------------------

    def put(self, value: torch.Tensor) -> None:
        """Take ids: the prompt int64 `[B, T]` first, then int64 `[B]` for each step, or `[B, k]` where k are known at
        once.

        Raises:
            ValueError: if the number of rows changes on the way.
        """
        prompt = self.rows is None
        if value.ndim == 1:
            value = value[None] if prompt else value[:, None]
        if prompt:
            self.rows = [self._new_row() for _ in range(value.shape[0])]
        elif value.shape[0] != len(self.rows):
            raise ValueError(
                f"{type(self).__name__}: expected ids of {len(self.rows)} row(s), got the shape {list(value.shape)}. A "
                "streamer serves one generate() at a time."
            )
        for index, ids in enumerate(value.tolist()):
            if not prompt:
                written = [token for token in ids if token != self.pad]
                self._read(index, written)
                if len(written) < len(ids):  # the row has ended, others go on: its last word need not wait for them
                    self.rows[index].text.end()
                    self._text_event(index)
            elif self.skip_prompt:
                self.rows[index].codes = self._half_drawn(ids)
            else:
                padding = next((place for place, token in enumerate(ids) if token != self.pad), len(ids))
                self._read(index, ids[padding:])
        self._deliver()

    def end(self) -> None:
        """The document is written: what is held back is sent, an unfinished picture as its codes."""
        for index in range(len(self.rows or [])):
            self._read(index, [self.layout.end])
            self._end_text(index)
        self._deliver()
        self.rows = None
        self._send(None)

    def fail(self, error: BaseException) -> None:
        """To be called where `generate()` raised: the consumer gets the exception in place of the next event."""
        self.rows = None
        self._send(error)

    def _send(self, item: Event | BaseException | None) -> None:
        """Hand on an event; None is the end."""
        raise NotImplementedError

    # ----- ids to events ----------------------------------------------------------------------------------------------

    def _new_row(self) -> _Row:
        return _Row(_TextRun(self.processor.tokenizer, self.skip_special_tokens))

    def _half_drawn(self, ids: list[int]) -> list[int]:
        """The codes of a picture that a prompt ends in; none where it ends in text or behind a whole picture."""
        count = 0
        for token in reversed([token for token in ids if token not in self.layout.structure]):
            if token not in self.layout.codes:
                break
            count += 1
        count %= self.processor.image_seq_length
        return [token for token in ids if token in self.layout.codes][-count:] if count else []

    def _read(self, index: int, ids: list[int]) -> None:
        for kind, run in self.layout.runs(ids, self.rows[index].codes):
            if kind == "text":
                self.rows[index].text.put(torch.tensor(run))
                self._text_event(index)
            elif kind == "image":
                self._picture_event(index, kind, run)
            else:
                self._picture_grew(index, run)

    def _end_text(self, index: int) -> None:
        row = self.rows[index]
        row.text.end()
        self._text_event(index)
        row.text = self._new_row().text

    def _text_event(self, index: int) -> None:
        if text := self.rows[index].text.take():
            self.events.append({"type": "text", "row": index, "text": text})

    def _picture_grew(self, index: int, codes: list[int]) -> None:
        if len(codes) == 1:
            self._end_text(index)
        if self.events and self.events[-1]["type"] == "partial_image" and self.events[-1]["row"] == index:
            self.events.pop()  # several codes came at once: the newest state is enough
        if self.partial_every and len(codes) % self.partial_every == 0 and len(codes) < len(self.layout.positions):
            self._picture_event(index, "partial_image", codes)

    def _picture_event(self, index: int, kind: str, codes: list[int]) -> None:
        self.events.append({"type": kind, "row": index, "image": None, "image_tokens": list(codes)})

    def _deliver(self) -> None:
        """Draw the pictures of this step in one batch, and send all events."""
        size = self.processor.image_seq_length
        drawn = [(event, event.get("image_tokens", [])) for event in self.events]
        drawn = [(event, codes) for event, codes in drawn if event["type"] == "partial_image" or len(codes) == size]
        if drawn:
            counts = torch.tensor([len(codes) for _, codes in drawn])
            tokens = [codes + codes[-1:] * (size - len(codes)) for _, codes in drawn]
            pixels = self.model.decode_image_tokens(torch.tensor(tokens)).cpu()
            vq = self.model.config.vq_config
            missing = (torch.arange(size) >= counts[:, None]).view(-1, 1, vq.grid_size, vq.grid_size)
            missing = missing.repeat_interleave(vq.downsampling_factor, -1).repeat_interleave(
                vq.downsampling_factor, -2
            )
            pixels = pixels.masked_fill(missing, 0.0)  # the middle of [-1, 1] is grey
            for (event, _), image in zip(drawn, self.processor.image_processor.postprocess(pixels)):
                event["image"] = image
        events, self.events = self.events, []
        for event in events:
            self._send(event)


__all__ = ["DocumentStreamer", "Event", "padding_id"]
