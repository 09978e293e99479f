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


def test_works_with_dataloader_workers():
    loader = torch.utils.data.DataLoader(_features(8), batch_size=4, collate_fn=JamDataCollator(0, 200, CM3), num_workers=2)
    assert sum(len(b["input_ids"]) for b in loader) == 8
