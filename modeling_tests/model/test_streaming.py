"""Streaming: events joined are the segments of the finished document, whatever the layout, the rows and the way of
drawing.
"""

import asyncio
import gc
import queue
import threading

import numpy as np
import pytest
import torch
from conftest import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from model import test_picture_layout
from model.test_picture_layout import (
    BOS,
    BREAK,
    EOS,
    FIRST,
    LAST,
    LAYOUTS,
    picture,
    random_document,
)
from nightly import every_day
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

from jam_hf.generation.streaming import AsyncJamStreamer, JamStreamer, stream, stream_async


layout_tokenizer, laid_out = test_picture_layout.layout_tokenizer, test_picture_layout.laid_out  # fixtures
N, PAD = 16, 0
SAMPLE = {"do_sample": True, "top_k": 0, "temperature": 1.5}


def joined(events, rows: int) -> list[list[dict]]:
    """What a consumer makes of events: pieces of text joined, partial pictures forgotten."""
    documents = [[] for _ in range(rows)]
    for event in events:
        document = documents[event["row"]]
        if event["type"] == "text" and document and document[-1]["type"] == "text":
            document[-1]["text"] += event["text"]
        elif event["type"] != "partial_image":
            document.append({key: value for key, value in event.items() if key != "row"})
    return documents


def assert_same_documents(found, expected) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert [s["type"] for s in ours] == [s["type"] for s in theirs]
        for mine, other in zip(ours, theirs):
            if mine["type"] == "text":
                assert mine["text"] == other["text"]
            elif other["image"] is None:
                assert mine["image"] is None and mine["image_tokens"] == other["image_tokens"]
            else:  # a batch of pictures may round otherwise than one alone
                assert np.abs(np.asarray(mine["image"], int) - np.asarray(other["image"], int)).max() <= 1


def put_all(
    streamer: JamStreamer, prompt: list[list[int]], written: list[list[int]], chunk: int | None = None
) -> list[dict]:
    """As GenerationMixin does it: prompts, then one id for each row, or `chunk` ids at once; all events."""
    streamer.put(torch.tensor(prompt))
    columns = torch.tensor(written)
    for start in range(0, columns.shape[1], chunk or 1):
        streamer.put(columns[:, start : start + chunk] if chunk else columns[:, start])
    streamer.end()
    return list(streamer)


# ----- against post_process_interleaved, without a model that writes --------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_document_cut_anywhere_gives_its_segments(data, laid_out):
    """Random documents, text of random bytes among them, unfinished pictures, rows that ended, any cut into prompt
    and rest.
    """
    name = data.draw(st.sampled_from(list(LAYOUTS)))
    (model, processor), layout = laid_out(name), LAYOUTS[name]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = []
    for _ in range(data.draw(st.integers(1, 3))):
        row = random_document(layout, rng, data.draw(st.integers(0, 2)))
        if data.draw(st.booleans()):  # white space alone between two pictures is no segment
            row += [
                *picture(layout, range(FIRST, LAST)),
                *processor.tokenizer(" \n ", add_special_tokens=False)["input_ids"],
            ]
            row += picture(layout, range(FIRST, LAST))
        row += processor.tokenizer("a ruby\n is — красный 红色 🟥.", add_special_tokens=False)["input_ids"]
        ending = data.draw(st.sampled_from(["end", "open", "half"]))
        row += [EOS] if ending == "end" else picture(layout, range(FIRST, LAST))[: 1 if ending == "open" else 9]
        rows.append(row)
    length = max(map(len, rows))
    cut = data.draw(st.integers(1, min(map(len, rows)) - 1))
    prompt, written = [row[:cut] for row in rows], [row[cut:] + [PAD] * (length - len(row)) for row in rows]
    skip = data.draw(st.booleans())
    streamer = JamStreamer(
        model,
        processor,
        skip_special_tokens=skip,
        partial_every=data.draw(st.sampled_from([None, 1, 5])),
    )
    events = put_all(streamer, prompt, written, data.draw(st.sampled_from([None, 1, 4])))
    expected = [
        processor.post_process_interleaved(torch.tensor([row]), model, skip_special_tokens=skip)[0] for row in rows
    ]
    assert_same_documents(joined(events, len(rows)), expected)
    assert not [e for e in events if e["type"] == "text" and "\ufffd" in e["text"]] or any(
        "\ufffd" in s.get("text", "") for document in expected for s in document
    )


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("known", [0, 1, 7, N - 1, N])
def test_a_picture_begun_in_the_prompt_is_shown_whole_though_the_prompt_is_skipped(name, known, laid_out):
    (model, processor), layout = laid_out(name), LAYOUTS[name]
    first, second = picture(layout, range(FIRST, LAST)), picture(layout, range(LAST - 1, FIRST - 1, -1))
    codes = [place for place, token in enumerate(second) if FIRST <= token < LAST]
    cut = codes[known] if known < N else codes[-1] + 1
    prompt, rest = [BOS, 30, *first, 31, *second[:cut]], [*second[cut:], 40, EOS]
    streamer = JamStreamer(model, processor, skip_prompt=True)
    (document,) = joined(put_all(streamer, [prompt], [rest]), 1)
    shown = [segment["image_tokens"] for segment in document if segment["type"] == "image"]
    assert shown == ([list(range(LAST - 1, FIRST - 1, -1))] if known < N else [])
    assert document[-1]["text"] == processor.tokenizer.decode([40])


# ----- against generate() ---------------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("how", [{"do_sample": False}, SAMPLE, {**SAMPLE, "num_return_sequences": 2}])
@pytest.mark.parametrize("skip_prompt", [True, False])
def test_events_of_generate_are_the_segments_of_its_output(name, how, skip_prompt, laid_out):
    """Three prompts of unlike length: text, behind a whole picture, and with unlike ends."""
    (model, processor), layout = laid_out(name), LAYOUTS[name]
    rows = [[BOS, 60, 61], [BOS, 62, *picture(layout, range(FIRST, LAST)), 63], [BOS, 70]]
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    kwargs = {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "generation_mode": "interleaved",
        "sequence_bias": [[[BREAK], 4.0], [[EOS], 2.0]],
        "max_new_tokens": 70,
        **how,
    }
    torch.manual_seed(3)
    output = model.generate(**kwargs)
    torch.manual_seed(3)
    events = list(stream(model, processor, skip_prompt=skip_prompt, **kwargs))
    expected = processor.post_process_interleaved(output, model, prompt_length=length if skip_prompt else 0)
    assert sum(s["type"] == "image" for document in expected for s in document) > 0
    assert_same_documents(joined(events, len(output)), expected)


def test_guided_pictures_of_a_batch_come_in_image_mode(laid_out):
    model, processor = laid_out("emu3", "cross")
    events = list(
        stream(
            model,
            processor,
            input_ids=torch.tensor([[BOS, 60], [BOS, 61]]),
            generation_mode="image",
            guidance_scale=2.0,
            do_sample=False,
        )
    )
    assert [(event["type"], event["row"]) for event in events] == [("image", 0), ("image", 1)]


def test_a_budget_may_end_a_document_in_a_picture(laid_out):
    model, processor = laid_out("plain")
    ids = torch.tensor([[BOS, 60, BREAK]])
    kwargs = {"input_ids": ids, "generation_mode": "interleaved", "max_new_tokens": 5, "do_sample": False}
    output = model.generate(**kwargs)
    assert list(stream(model, processor, **kwargs)) == [
        {"type": "image", "row": 0, "image": None, "image_tokens": output[0, 3:].tolist()}
    ]


def test_embeddings_as_prompt(laid_out):
    model, processor = laid_out("plain")
    ids = torch.tensor([[BOS, 60, 61]])
    kwargs = {"generation_mode": "image", "do_sample": False}
    events = list(stream(model, processor, inputs_embeds=model.get_input_embeddings()(ids), **kwargs))
    expected = list(stream(model, processor, input_ids=ids, **kwargs))
    assert [e["image_tokens"] for e in events] == [e["image_tokens"] for e in expected] and len(events) == 1


def test_assisted_decoding_hands_over_several_tokens_at_once(jam, processor):
    model = jam("llama", "cross", "preserving")
    prompt = torch.tensor([[BOS, 40, 41, 42, 43]])
    kwargs = {
        "input_ids": prompt,
        "generation_mode": "interleaved",
        "max_new_tokens": 60,
        "do_sample": False,
        "sequence_bias": [[[BREAK], 6.0], [[EOS], -100.0]],
    }
    output = model.generate(**kwargs)
    events = list(stream(model, processor, partial_every=1, prompt_lookup_num_tokens=4, **kwargs))
    assert_same_documents(joined(events, 1), processor.post_process_interleaved(output, model, prompt_length=5))
    partials = [e for e in events if e["type"] == "partial_image"]
    pictures = [e for e in events if e["type"] == "image"]
    assert pictures and len(partials) < (N - 1) * len(pictures)  # the newest of those that came at once


# ----- text: the stock streamer --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed",), every_day([(seed,) for seed in range(6)], (0,), (1,)))
def test_text_comes_in_the_pieces_of_the_stock_streamer(seed, jam, processor):
    model = jam("llama", "uniform", "average")
    prompt = random_ids(model, 1, 5, seed) % 200 + 17
    kwargs = {"input_ids": prompt, "generation_mode": "text", "max_new_tokens": 60, "min_new_tokens": 50, **SAMPLE}
    newline, space = (processor.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in ("\n", " "))
    kwargs["sequence_bias"] = [[[newline], 3.0], [[space], 3.0]]
    pieces = []
    for skip_prompt in (True, False):
        stock = TextIteratorStreamer(processor.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        torch.manual_seed(seed)
        model.generate(**kwargs, streamer=stock)
        torch.manual_seed(seed)
        events = list(stream(model, processor, skip_prompt=skip_prompt, **kwargs))
        expected = [piece for piece in stock if piece]
        assert "".join(e["text"] for e in events) == "".join(expected)
        while len(expected) > 1 and not expected[0].strip():  # white space waits for the first word
            expected[:2] = ["".join(expected[:2])]
        assert [e["text"] for e in events] == expected
        pieces.append(len(expected))
    assert max(pieces) > 3


def test_a_decoder_that_strips_its_first_space_strips_only_that_of_the_run(laid_out, monkeypatch):
    """As SentencePiece's do. The stock streamer, which forgets what stood before a new line, loses the space behind
    it.
    """
    model, processor = laid_out("plain")
    tokenizer = processor.tokenizer
    decode = type(tokenizer).decode
    monkeypatch.setattr(
        type(tokenizer), "decode", lambda self, ids, **kwargs: (t := decode(self, ids, **kwargs))[t.startswith(" ") :]
    )
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in (" a\n", " b", " c")]
    row = [token for piece in ids for token in piece]
    events = put_all(JamStreamer(model, processor), [[BOS]], [row])
    assert (
        "".join(e["text"] for e in events)
        == "a\n b c"
        == processor.post_process_interleaved([row], model)[0][0]["text"]
    )


def test_a_row_that_ended_sends_its_last_word_while_others_write(laid_out):
    model, processor = laid_out("plain")
    word, other = (processor.tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("red", "blue"))
    streamer = JamStreamer(model, processor, skip_prompt=True, timeout=0.01)
    streamer.put(torch.tensor([[BOS], [BOS]]))
    for ids in zip([*word, EOS, *[PAD] * 9], [*other, *other, *other, *other][: len(word) + 10]):
        streamer.put(torch.tensor(ids))
    assert next(streamer) == {"type": "text", "row": 0, "text": "red"}
    with pytest.raises(queue.Empty):
        next(streamer)


@pytest.mark.parametrize("by", ["argument", "config"])
def test_padding_that_generate_is_told_is_not_shown(by, laid_out):
    """Rows of one and of three words; behind the first stands an id that is text elsewhere."""
    model, processor = laid_out("plain")
    pad = processor.tokenizer("red", add_special_tokens=False)["input_ids"][0]

    def ends(ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[0, EOS], forced[1, EOS if ids.shape[1] == 5 else 30] = 0.0, 0.0
        return forced

    settings = {"generation_mode": "text", "max_new_tokens": 4, "do_sample": False, "pad_token_id": pad}
    if by == "config":
        settings = {"generation_config": GenerationConfig(**settings)}
    ids = torch.tensor([[BOS, 40], [BOS, 40]])
    events = list(
        stream(
            model, processor, input_ids=ids, attention_mask=torch.ones_like(ids), logits_processor=[ends], **settings
        )
    )
    assert {event["row"] for event in events} == {1}


# ----- partial pictures ----------------------------------------------------------------------------------------------


def test_partial_pictures_show_what_is_drawn_and_grey(laid_out):
    (model, processor), layout = laid_out("emu3"), LAYOUTS["emu3"]
    tokens = [FIRST + 5 * i % 16 for i in range(N)]
    events = put_all(JamStreamer(model, processor, partial_every=3), [[BOS]], [picture(layout, tokens)])
    assert [(e["type"], len(e["image_tokens"])) for e in events] == [
        *(("partial_image", count) for count in (3, 6, 9, 12, 15)),
        ("image", N),
    ]
    whole = np.asarray(events[-1]["image"], int)
    for event in events[:-1]:
        count = len(event["image_tokens"])
        assert event["image_tokens"] == tokens[:count]
        filled = torch.tensor([tokens[:count] + [tokens[count - 1]] * (N - count)])
        expected = np.asarray(processor.image_processor.postprocess(model.decode_image_tokens(filled))[0], int)
        found = np.asarray(event["image"], int)
        for cell in range(N):
            place = np.s_[cell // 4 * 4 : cell // 4 * 4 + 4, cell % 4 * 4 : cell % 4 * 4 + 4]
            if cell < count:
                assert np.abs(found[place] - expected[place]).max() <= 1
            else:
                assert (found[place] == 128).all() and not (whole[place] == 128).all()


# ----- errors, ends and waiting --------------------------------------------------------------------------------------


class Breaks(LogitsProcessor):
    """Raises at the given length."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            raise ArithmeticError("planted")
        return scores


def endless(**changes) -> dict:
    return {
        "input_ids": torch.tensor([[BOS, 60]]),
        "generation_mode": "text",
        "max_new_tokens": 200,
        "suppress_tokens": [EOS],
        "sequence_bias": [[[220], 3.0]],
        **SAMPLE,
        **changes,
    }


def generating_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "jam-generate"]


class Counts(LogitsProcessor):
    def __init__(self):
        self.steps = 0

    def __call__(self, input_ids, scores):
        self.steps += 1
        return scores


@pytest.mark.parametrize("length", [2, 9])
def test_what_generate_raises_reaches_the_consumer(length, laid_out):
    events = stream(*laid_out("plain"), **endless(logits_processor=LogitsProcessorList([Breaks(length)])))
    with pytest.raises(ArithmeticError, match="planted"):
        list(events)
    with pytest.raises(ValueError, match="generation_mode must be"):
        list(stream(*laid_out("plain"), **endless(generation_mode="video")))
    for sampled in (True, False):  # transformers itself refuses only the latter
        with pytest.raises(ValueError, match="beam"):
            list(stream(*laid_out("plain"), **endless(num_beams=2, do_sample=sampled, max_new_tokens=4)))
    assert not generating_threads()


@pytest.mark.parametrize("how", ["close", "break", "forgotten", "raise"])
def test_leaving_ends_generation(how, laid_out):
    counts = Counts()
    events = stream(*laid_out("plain"), **endless(logits_processor=LogitsProcessorList([counts])))
    next(events)
    assert generating_threads()
    if how == "close":
        events.close()
    elif how == "raise":
        with pytest.raises(KeyError):
            events.throw(KeyError("of the consumer"))
    else:
        if how == "break":
            for _ in events:
                break
        del events
        gc.collect()
    assert not generating_threads() and 0 < counts.steps < 200


def test_a_stream_that_was_never_begun_starts_nothing(laid_out):
    stream(*laid_out("plain"), **endless()).close()
    assert not generating_threads()


def test_the_streams_own_criterion_stands_beside_the_users(laid_out):
    model, processor = laid_out("plain")

    def short(input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 6)

    events = stream(model, processor, **endless(stopping_criteria=[short]))
    while True:
        try:
            next(events)
        except StopIteration as end:
            assert end.value.shape == (1, 6)
            break


def test_waiting_has_an_end_and_a_thread_of_ones_own_can_tell_of_an_error(laid_out):
    streamer = JamStreamer(*laid_out("plain"), timeout=0.01)
    streamer.fail(ArithmeticError("planted"))
    with pytest.raises(ArithmeticError, match="planted"):
        next(streamer)
    with pytest.raises(queue.Empty):
        next(streamer)


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_a_streamer_serves_one_generate_after_another(skip_prompt, laid_out):
    model, processor = laid_out("plain")
    streamer = JamStreamer(model, processor, skip_prompt=skip_prompt)
    both = []
    for _ in range(2):
        model.generate(
            torch.tensor([[BOS, 60], [BOS, 61]]), generation_mode="image", do_sample=False, streamer=streamer
        )
        both.append(joined(streamer, 2))
    assert both[0] == both[1] and len(both[0][1]) == 2 - skip_prompt
    streamer.put(torch.tensor([[BOS], [BOS]]))
    with pytest.raises(ValueError, match=r"2 row\(s\), got the shape \[3, 1\]"):
        streamer.put(torch.tensor([1, 2, 3]))


def test_bad_settings_are_answered(laid_out):
    model, processor = laid_out("plain")
    for wrong in (0, -3, 1.5):
        with pytest.raises(ValueError, match="partial_every must be a number of codes"):
            JamStreamer(model, processor, partial_every=wrong)
        with pytest.raises(ValueError, match="partial_every"):
            stream(model, processor, partial_every=wrong)
    with pytest.raises(ValueError, match="makes its own streamer"):
        stream(model, processor, streamer=JamStreamer(model, processor))


# ----- async ---------------------------------------------------------------------------------------------------------


def test_async_events_are_the_sync_ones_and_the_loop_goes_on(laid_out):
    model, processor = laid_out("emu3")
    kwargs = {"input_ids": torch.tensor([[BOS, 60], [BOS, 61]]), "generation_mode": "image", "do_sample": False}

    async def read():
        ticks, events = 0, []

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        async for event in stream_async(model, processor, partial_every=4, **kwargs):
            events.append(event)
        ticking.cancel()
        return events, ticks

    events, ticks = asyncio.run(read())
    assert events == list(stream(model, processor, partial_every=4, **kwargs)) and len(events) == 8
    assert ticks > 10 and not generating_threads()


def test_async_errors_ends_and_waiting(laid_out):
    model, processor = laid_out("plain")

    async def failing():
        async for _ in stream_async(model, processor, **endless(logits_processor=LogitsProcessorList([Breaks(9)]))):
            pass

    async def left():
        counts = Counts()
        events = stream_async(model, processor, **endless(logits_processor=LogitsProcessorList([counts])))
        async for _ in events:
            break
        await events.aclose()
        assert not generating_threads()
        return counts.steps

    async def cancelled():
        started = asyncio.Event()

        async def consume():
            async for _ in stream_async(model, processor, **endless()):
                started.set()

        task = asyncio.create_task(consume())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not generating_threads()

    async def waiting():
        await anext(AsyncJamStreamer(model, processor, timeout=0.01))

    with pytest.raises(ArithmeticError, match="planted"):
        asyncio.run(failing())
    assert 0 < asyncio.run(left()) < 200
    asyncio.run(cancelled())
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(waiting())
