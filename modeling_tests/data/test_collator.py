"""Batches: padding, labels, refusals, and masking that is new each time and the same for the same seed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import parent_model
from transformers import AutoConfig

from jam_hf.data.cm3 import CM3Settings
from jam_hf.data.collator import JamDataCollator, supports_packing


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


def _documents(vocab_size, lengths=(9, 4, 4, 3, 6, 2, 9, 5)):
    rng = np.random.default_rng(0)
    return [{"input_ids": [1, *rng.integers(20, vocab_size, n).tolist(), 2]} for n in lengths]


def test_packing_keeps_every_document_whole_and_once():
    documents = _documents(200)
    batch = JamDataCollator(0, 200, packing=True)(documents)
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert batch["input_ids"].shape == (6, 11) and batch["input_ids"].shape[0] < len(documents)
    found = []
    for ids, positions, labels in zip(*(batch[k].tolist() for k in ("input_ids", "position_ids", "labels"))):
        starts = [i for i, p in enumerate(positions) if p == 0] + [len(ids)]
        for start, end in zip(starts, starts[1:]):
            assert positions[start:end] == list(range(end - start)) and labels[start] == -100
            if ids[start] == 0:  # padding, at the end of the row
                assert end == len(ids) and set(ids[start:]) == {0} and set(labels[start:]) == {-100}
            else:
                found.append(ids[start:end])
                assert labels[start + 1 : end] == ids[start + 1 : end]
    assert sorted(found) == sorted(d["input_ids"] for d in documents)
    same_length = JamDataCollator(0, 200, packing=True)(_documents(200, (5, 5, 5)))
    assert torch.equal(same_length["input_ids"], JamDataCollator(0, 200)(_documents(200, (5, 5, 5)))["input_ids"])


def _loss_sum(model, batch):
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum").item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama parent", "llama uniform", "llama cross", "opt cross"])
def test_packed_documents_do_not_see_each_other(kind, attention, jam):
    family, mode = kind.split()
    if mode == "parent":
        model = parent_model(family, 60, 1)
    else:
        model = jam(family, mode, "preserving" if mode == "cross" else "average")
    model.set_attn_implementation(attention)
    model.eval()
    documents = _documents(model.config.vocab_size)
    collator = JamDataCollator(0, model.config.vocab_size)
    packed = replace(collator, packing=True)(documents)
    expected = _loss_sum(model, collator(documents))
    assert _loss_sum(model, packed) == pytest.approx(expected, rel=1e-5)
    assert supports_packing(model.config)
    leaking = {k: v for k, v in packed.items() if k != "position_ids"}  # the planted error
    assert _loss_sum(model, leaking) != pytest.approx(expected, rel=1e-4)


def test_what_lets_packed_documents_see_each_other_is_not_supported(jam):
    assert not supports_packing(AutoConfig.for_model("opt"))
    assert not supports_packing(jam("opt", "uniform", "average").config)
