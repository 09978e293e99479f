"""Batches: padding, labels, refusals, and masking that is new each time and the same for the same seed."""

import pytest
import torch

from jam_hf.training.cm3 import CM3Settings
from jam_hf.training.collator import JamDataCollator


CM3 = CM3Settings(5, 8, 13, (3, 1, 2), image_token_range=(100, 200))


def _features(rows=6):
    return [{"input_ids": [1, *range(20, 26 + i), 3, *range(100, 109), 3, 2]} for i in range(rows)]


def test_padding_and_labels():
    batch = JamDataCollator(0, 200, pad_to_multiple_of=8)([{"input_ids": [1, 150, 2]}, {"input_ids": [1, 2]}])
    assert batch["input_ids"].tolist()[0] == [1, 150, 2, 0, 0, 0, 0, 0]
    assert batch["labels"].tolist() == [[1, 150, 2] + [-100] * 5, [1, 2] + [-100] * 6]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1, -100], "Row 1.*-100"),
        ([1, 200], "Row 1.*0..199"),
        ([], "non-empty"),
        ([1] * 9, "9 tokens, max_length is 8"),
    ],
)
def test_bad_rows_are_named(row, words):
    with pytest.raises(ValueError, match=words):
        JamDataCollator(0, 200, max_length=8)([{"input_ids": [1]}, {"input_ids": row}])


def test_masking_depends_on_seed_and_call_and_can_be_continued():
    first, second = JamDataCollator(0, 200, CM3, seed=3), JamDataCollator(0, 200, CM3, seed=3)
    batches = [first(_features()) for _ in range(4)]
    assert (
        not all(
            torch.equal(batches[0]["input_ids"], b["input_ids"])
            for b in batches[1:]
            if b["input_ids"].shape == batches[0]["input_ids"].shape
        )
        or len({b["input_ids"].shape for b in batches}) > 1
    )
    second.skip_batches(3)
    assert torch.equal(second(_features())["input_ids"], batches[3]["input_ids"])


def _epochs(workers, torch_seed):
    torch.manual_seed(torch_seed)
    collator = JamDataCollator(0, 200, CM3)
    loader = torch.utils.data.DataLoader(_features(16), batch_size=4, collate_fn=collator, num_workers=workers)
    return [[batch["input_ids"].tolist() for batch in loader] for _ in range(3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_is_masked_anew_and_the_seeds_repeat_it_with_and_without_workers(workers):
    first, second, third = _epochs(workers, 1)
    assert sum(len(batch) for batch in first) == 16
    assert first != second and second != third and first != third
    assert _epochs(workers, 1) == [first, second, third]


def test_some_documents_may_stay_plain():
    whole = CM3Settings(5, 8, 13, (3, 1, 2), 0.0, 1.0, image_token_range=(100, 200))

    def share(probability):
        ids = JamDataCollator(0, 200, whole, cm3_probability=probability)(_features(1) * 2000)["input_ids"]
        return (ids == 13).any(1).double().mean().item()

    assert share(0.0) == 0 and share(1.0) == 1
    assert share(0.3) == pytest.approx(0.3, abs=0.04)
    with pytest.raises(ValueError, match="cm3_probability"):
        JamDataCollator(0, 200, cm3_probability=1.5)


def test_documents_of_full_length_never_stop_a_run_and_a_masked_one_is_named():
    collator = JamDataCollator(0, 200, CM3, max_length=16)
    for _ in range(200):
        assert collator([{"input_ids": [1, *[20] * 14, 2]}] * 4)["input_ids"].shape[1] <= 16
    with pytest.raises(ValueError, match="Row 1 of the batch.*sentinel"):
        collator([{"input_ids": [1, 20, 2]}, {"input_ids": [1, 5, 2]}])
