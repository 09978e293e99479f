"""The CM3 objective: exact inverse, a slow oracle, and the statistics the sources state."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jam_hf import JamConfig
from jam_hf.data.cm3 import CM3Settings, apply_spans, cm3, draw_spans, segments, unmask


BREAK, BOS, EOS = 3, 1, 2
SETTINGS = CM3Settings(5, 8, 13, (BREAK, BOS, EOS), image_token_range=(100, 200))


def _document(rng: np.random.Generator, pictures: int) -> np.ndarray:
    parts = [[BOS], rng.integers(20, 90, rng.integers(1, 12))]
    for _ in range(pictures):
        parts += [[BREAK], rng.integers(100, 200, 9), [BREAK], rng.integers(20, 90, rng.integers(0, 6))]
    return np.concatenate([*parts, [EOS]]).astype(np.int64)


def _segments_by_hand(ids) -> list[tuple[int, int]]:
    found, start = [], None
    for position, token in enumerate([*ids, EOS]):
        inside = position > 0 and token not in (BREAK, BOS, EOS)
        if inside and start is None:
            start = position
        if not inside and start is not None:
            found.append((start, position))
            start = None
    return found


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4), st.floats(0, 4), st.floats(0, 1))
def test_masking_is_undone_exactly_and_keeps_to_the_rules(seed, pictures, mean, whole):
    rng = np.random.default_rng(seed)
    ids = _document(rng, pictures)
    chosen = CM3Settings(5, 8, 13, (BREAK, BOS, EOS), mean, whole, image_token_range=(100, 200))
    spans = draw_spans(ids, chosen, rng)
    masked = apply_spans(ids, spans, chosen)
    assert np.array_equal(unmask(masked, chosen), ids)
    found = _segments_by_hand(ids)
    assert found == segments(ids, chosen)
    for (_, end), (start, _) in zip(spans, spans[1:]):
        assert end < start  # disjoint, and not touching
    for start, end in spans:
        assert start >= 1 and any(a <= start < end <= b for a, b in found)
    assert len(masked) == len(ids) + 3 * len(spans)
    assert sorted(masked[(masked < 5) | (masked > 13)]) == sorted(ids)


def _apply_by_hand(ids, spans):
    front, back = [], []
    for position, token in enumerate(ids):
        index = next((i for i, (a, b) in enumerate(spans) if a <= position < b), None)
        if index is None:
            front.append(token)
        else:
            if position == spans[index][0]:
                front.append(5 + index)
                back.append(5 + index)
            back.append(token)
            if position == spans[index][1] - 1:
                back.append(13)
    return front + back


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_against_a_slow_oracle(seed):
    rng = np.random.default_rng(seed)
    ids = _document(rng, 2)
    spans = draw_spans(ids, SETTINGS, rng)
    assert apply_spans(ids, spans, SETTINGS).tolist() == _apply_by_hand(ids.tolist(), spans)


def test_the_share_of_causal_documents_is_e_to_the_minus_one():
    """[M] Poisson(1). Spans that fall on a boundary are not masked, so documents without boundaries are used."""
    settings_ = CM3Settings(5, 512, 600, (BREAK, BOS, EOS), whole_segment_probability=0.0)
    rng = np.random.default_rng(0)
    ids = np.concatenate(([BOS], np.full(4000, 20)))
    counts = [len(draw_spans(ids, settings_, rng)) for _ in range(4000)]
    assert np.mean(np.array(counts) == 0) == pytest.approx(np.exp(-1), abs=0.02)


def test_every_position_may_be_masked_and_the_first_never():
    rng = np.random.default_rng(1)
    ids = np.concatenate(([BOS], np.full(20, 30)))
    hits = np.zeros(21)
    for _ in range(3000):
        for start, end in draw_spans(ids, SETTINGS, rng):
            hits[start:end] += 1
    assert hits[0] == 0 and (hits[1:] > 100).all()
    assert hits[1:].argmax() in range(7, 14)  # a segment between two uniform points covers the middle most


def test_whole_segments():
    rng = np.random.default_rng(2)
    ids = _document(rng, 1)
    whole = CM3Settings(5, 8, 13, (BREAK, BOS, EOS), whole_segment_probability=1.0, image_token_range=(100, 200))
    seen = {tuple(draw_spans(ids, whole, rng)) for _ in range(100)}
    assert seen == {(segment,) for segment in segments(ids, whole)}
    texts = CM3Settings(5, 8, 13, (BREAK, BOS, EOS), 1.0, 1.0, True, (100, 200))
    for _ in range(50):
        ((start, _),) = draw_spans(ids, texts, rng)
        assert ids[start] < 100
    masked = cm3(ids, texts, rng)
    assert masked[:3].tolist()[:2] == [BOS, 5]  # the unconditional context of guidance: <s> <mask> <break> ...


def test_overflow_cuts_the_causal_part_and_not_the_infill():
    ids = np.arange(20, 40)
    masked = apply_spans(ids, [(3, 6)], SETTINGS, max_length=12)
    assert len(masked) == 12
    assert masked[-5:].tolist() == [5, 23, 24, 25, 13]
    assert masked[:7].tolist() == [20, 21, 22, 5, 26, 27, 28]
    with pytest.raises(ValueError, match="need 12 tokens, max_length is 10"):
        apply_spans(ids, [(3, 13)], SETTINGS, max_length=10)


def test_more_spans_than_sentinels_and_broken_documents_are_refused():
    with pytest.raises(ValueError, match="9 spans for 8 sentinels"):
        apply_spans(np.arange(20, 60), [(i, i + 1) for i in range(1, 36, 4)], SETTINGS)
    with pytest.raises(ValueError, match="sentinel"):
        unmask(np.array([1, 20, 5, 21, 2]), SETTINGS)
    with pytest.raises(ValueError, match="end of span"):
        unmask(np.array([1, 5, 2, 5, 20]), SETTINGS)
    with pytest.raises(ValueError, match="whole_segment_probability"):
        CM3Settings(5, 8, 13, (3,), whole_segment_probability=2.0)


def test_ids_come_from_the_config():
    config = JamConfig()
    settings_ = CM3Settings.from_config(config, mean_spans=2.0)
    assert settings_.mask_token_id == config.mask_token_id and settings_.mean_spans == 2.0
    assert settings_.boundary_token_ids == (3, 1, 2)
    assert settings_.image_token_range == (config.image_token_offset, config.vocab_size)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(0, 12), st.floats(0, 1))
def test_infills_that_do_not_fit_are_not_masked_and_those_that_stay_are_whole(seed, pictures, room, whole):
    rng = np.random.default_rng(seed)
    ids = _document(rng, pictures)
    chosen = CM3Settings(5, 8, 13, (BREAK, BOS, EOS), 3.0, whole, image_token_range=(100, 200))
    masked = cm3(ids, chosen, rng, max_length=len(ids) + room)
    assert len(masked) <= len(ids) + room
    back = masked[np.flatnonzero(masked == 13)[0] :] if (masked == 13).any() else masked[:0]
    assert len(back) == 0 or masked[-1] == 13  # nothing is cut from the infills
    assert masked[0] == BOS


def test_a_document_of_full_length_is_left_causal_when_its_only_infill_leaves_no_room():
    ids = np.array([BOS, *[20] * 14, EOS])
    whole = CM3Settings(5, 8, 13, (BREAK, BOS, EOS), 0.0, 1.0)
    assert cm3(ids, whole, np.random.default_rng(0), max_length=16).tolist() == ids.tolist()
    assert len(cm3(ids, whole, np.random.default_rng(0), max_length=17)) == 17


@pytest.mark.parametrize("mark", [5, 12, 13])
def test_a_document_that_is_masked_already_is_refused_unless_nothing_would_be_masked(mark):
    ids = np.array([BOS, 20, mark, 21, 22, EOS])
    with pytest.raises(ValueError, match=f"end of span {mark} at position 2"):
        cm3(ids, SETTINGS, np.random.default_rng(0))
    off = CM3Settings(5, 8, 13, (BREAK, BOS, EOS), 0.0, 0.0)
    assert cm3(ids, off, np.random.default_rng(0)).tolist() == ids.tolist()


def test_masking_only_texts_needs_to_know_the_images():
    with pytest.raises(ValueError, match="text_segments_only needs image_token_range"):
        CM3Settings(5, 8, 13, (BREAK,), text_segments_only=True)


def test_without_a_bos_the_first_token_is_text_and_a_masked_caption_leaves_what_guidance_sees():
    """`<mask> <break> codes ...`: nothing of the caption stays."""
    config = JamConfig(bos_token_id=None, image_end_token_id=14)
    chosen = CM3Settings.from_config(config, mean_spans=0.0, whole_segment_probability=1.0, text_segments_only=True)
    first = config.image_token_offset
    caption, picture = [20, 21, 22], [3, *range(first, first + 5), 14]
    ids = np.array([*caption, *picture, 2])
    assert segments(ids, chosen) == [(0, 3), (4, 9)]
    masked = apply_spans(ids, draw_spans(ids, chosen, np.random.default_rng(0)), chosen)
    assert masked.tolist() == [5, *picture, 2, 5, *caption, config.mask_end_token_id]
    assert np.array_equal(unmask(masked, chosen), ids)
    spans = CM3Settings.from_config(config, mean_spans=3.0, whole_segment_probability=0.0)
    drawn = [draw_spans(ids, spans, np.random.default_rng(seed)) for seed in range(50)]
    assert any(start == 0 for found in drawn for start, _ in found)
    assert all(np.array_equal(unmask(apply_spans(ids, found, spans), spans), ids) for found in drawn)
    assert CM3Settings.from_config(JamConfig()).keep_first_token
