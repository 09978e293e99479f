"""Requests of `generate_batch`, good and odd ones, and the padded batches by which a CPU writes them, against each
alone.
"""

import numpy as np
import pytest
import torch
from conftest import random_ids
from decoding_oracles import BREAK
from transformers import ContinuousBatchingConfig, GenerationConfig, set_seed

from jam_hf.integrations.continuous_batching import _complete_config
from jam_hf.integrations.padded_batches import generate_padded, groups


SECTION = "Continuous batching"
PADDED = "on a CPU by generate(), in padded batches, where nothing asks for pages"
REFUSED = "guidance, windows, streams with unlike heads: refused with the reason"
PAGES = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64, page_size=16)


def text(**settings):
    return GenerationConfig(
        **{
            "max_new_tokens": 5,
            "do_sample": False,
            "eos_token_id": 2,
            "generation_mode": "text",
            "pad_token_id": 0,
            **settings,
        }
    )


def written(results):
    return [result.generated_tokens for result in results.values()]


@pytest.mark.sampled
@pytest.mark.feature(SECTION, PADDED)
@pytest.mark.parametrize("memory", [20, 70, 10**6])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_each_request_is_as_alone(family, memory, jam):
    """Of unlike lengths and budgets, in batches of any size; with an end that comes in the midst of them."""
    model = jam(family, "uniform", "average")
    prompts = [
        random_ids(model, 1, length, seed=length)[0].clamp(min=4, max=200).tolist() for length in (1, 9, 4, 4, 17, 2)
    ]
    budgets = [9, 9, 4, 9, 9, 12]
    alone = [
        model.generate(torch.tensor([ids]), generation_config=text(max_new_tokens=budget))[0, len(ids) :].tolist()
        for ids, budget in zip(prompts, budgets)
    ]
    end = alone[1][2]
    ends = [row[: row.index(end) + 1] if end in row else row for row in alone]
    assert len(ends[1]) == 3 and len({*map(len, ends)}) > 2
    config = _complete_config(model, text(eos_token_id=[end, 2], pad_token_id=7))
    found = generate_padded(model, prompts, budgets, config, memory, False)
    assert written(found) == ends
    together = groups([(len(ids), budget) for ids, budget in zip(prompts, budgets)], memory)
    assert len(together) == {20: 6, 70: 4, 10**6: 3}[memory]


@pytest.mark.feature(SECTION, PADDED)
def test_sampling_goes_by_the_seed(jam):
    model = jam("llama", "uniform", "average")
    prompts = [[1], [1, 30, 31, 32], [1, 40]]
    config = text(do_sample=True, top_k=50, num_return_sequences=3, max_new_tokens=6)
    drawn = []
    for seed in (3, 3, 4):
        set_seed(seed)
        drawn.append(model.generate_batch(prompts, config))
    assert written(drawn[0]) == written(drawn[1]) != written(drawn[2])
    assert len({tuple(row) for row in written(drawn[0])}) == 9
    assert [value.prompt_ids for value in drawn[0].values()] == [ids for ids in prompts for _ in range(3)]


@pytest.mark.feature(SECTION, PADDED)
def test_other_dtypes_and_kinds_of_rows(jam):
    model = jam("llama", "uniform", "average")
    expected = model.generate_batch([[1, 30, 31], [1, 40, 41]], text())
    rows = torch.tensor([[1, 30, 31], [1, 40, 41]])
    for given in (rows, rows.int(), [*rows], rows.numpy().astype(np.uint16), ((1, 30, 31), np.array([1, 40, 41]))):
        found = model.generate_batch(given, text())
        assert written(found) == written(expected)
        assert [type(i) for value in found.values() for i in value.prompt_ids] == [int] * 6
        assert written(model.generate_batch(given, text(), PAGES)) == written(expected)
    half = model.bfloat16()
    by_pages = GenerationConfig(do_sample=False, eos_token_id=2, generation_mode="image")
    for row in written(half.generate_batch([[1, 30], [1]], by_pages)):
        assert row[0] == row[17] == BREAK and min(row[1:17]) >= model.config.image_token_offset
    with torch.autocast("cpu", torch.bfloat16):
        assert [len(row) for row in written(half.float().generate_batch([[1, 30], [1]], text(eos_token_id=-1)))] == [
            5,
            5,
        ]


@pytest.mark.feature(SECTION, PADDED)
@pytest.mark.parametrize("pages", [None, PAGES], ids=["padded", "pages"])
def test_a_model_in_training_writes_without_dropout(pages, jam):
    model = jam("opt", "uniform", "average")
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.5
    expected = written(model.generate_batch([[1, 30, 31], [1, 40]], text(max_new_tokens=9), pages))
    model.train()
    model.model.vq_model.eval()
    before = [module.training for module in model.modules()]
    assert written(model.generate_batch([[1, 30, 31], [1, 40]], text(max_new_tokens=9), pages)) == expected
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2


@pytest.mark.feature(SECTION, PADDED)
def test_an_interrupted_call_leaves_the_model_usable(jam, monkeypatch):
    model = jam("llama", "cross", "preserving").train()
    settings, prompts = (
        GenerationConfig(do_sample=False, eos_token_id=2, generation_mode="image"),
        [[1, 30], [1, 31, 32]],
    )
    expected, saved = written(model.generate_batch(prompts, settings)), model.generation_config.to_dict()
    forward, calls = type(model).forward, []

    def interrupted(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.generate_batch(prompts, settings)
    assert model.training and model.generation_config.to_dict() == saved
    assert written(model.generate_batch(prompts, settings)) == expected


@pytest.mark.feature(SECTION, REFUSED)
@pytest.mark.parametrize("pages", [None, PAGES], ids=["padded", "pages"])
@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        ([[1, 5], []], {}, r"Prompt 1 must be a list of token ids, one at least \(bos, id 1\), got shape \(0,\)"),
        ([1, 2, 3], {}, "Prompt 0 must be a list of token ids.*one list a request"),
        (["a red circle"], {}, "Prompt 0 must be a list of token ids, got str"),
        ({"input_ids": [[1, 5]]}, {}, "Prompt 0 must be a list of token ids, got str"),
        ([[1, 5], [1, 2.5]], {}, "Prompt 1 must be integers"),
        (torch.tensor([[True, False]]), {}, "Prompt 0 must be integers"),
        ([[1, 5], [[1, 5]]], {}, r"Prompt 1 must be a list .* got shape \(1, 2\)"),
        ([[1, 5000]], {}, "Prompt 0 has the id 5000; the model has ids 0 to"),
        ([[1, -5]], {}, "Prompt 0 has the id -5"),
        ([[1, 2**70]], {}, "Prompt 0 must be a list of token ids"),
        ([[1, 5], [0, 0, 1]], {}, r"Prompt 1 begins or ends with padding \(id 0\)"),
        ([[1, 5, 0]], {}, r"Prompt 0 begins or ends with padding"),
        ([[1, 5]], {"max_new_tokens": 0}, "must be greater than 0"),
        ([[1, 5]], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ([[1, 5]], {"num_return_sequences": 2}, "Greedy methods .* do not support `num_return_sequences`"),
        ([[1, 5]], {"num_return_sequences": 0}, "num_return_sequences must be at least 1, got 0"),
        ([[1] * 126, [1]], {}, "A prompt of 126 ids leaves no room to write 5: max_new_tokens=5.* has 128 positions"),
        ([[1] * 140], {"max_new_tokens": None, "max_length": None}, "A prompt of 140 ids leaves no room to write"),
    ],
)
def test_odd_requests_are_refused(inputs, settings, message, pages, jam):
    """Before anything is written, and by pages and padded batches alike. OPT has no positions beyond 128."""
    with pytest.raises(ValueError, match=message):
        jam("opt", "uniform", "average").generate_batch(inputs, text(**settings), pages)


@pytest.mark.feature(SECTION, REFUSED)
def test_no_request_and_the_last_position(jam):
    model = jam("opt", "uniform", "average")
    assert model.generate_batch([], text()) == {}
    with pytest.raises(ValueError, match="max_new_tokens=-3"):
        model.generate_batch([[1, 5]], text(), max_new_tokens=-3)
    last = [1, *range(5, 128)]  # 124 ids, and the fifth new one is not read
    assert [len(row) for row in written(model.generate_batch([last, [1]], text(eos_token_id=-1)))] == [5, 5]
    with pytest.raises(ValueError, match="Prompt 0 must be a list"):
        model.generate_batch([torch.ones(())], text())
    beyond = jam("llama", "uniform", "average").generate_batch([[1] * 140], text(eos_token_id=-1))
    assert [len(row) for row in written(beyond)] == [5]  # as generate() does with rotary positions
