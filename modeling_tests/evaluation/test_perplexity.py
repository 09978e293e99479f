"""Perplexity and divergence against a loop over single documents, and against torch's own KL."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids
from datasets import Dataset
from transformers import AutoModelForCausalLM

from jam_hf.evaluation.perplexity import divergence, perplexity


@pytest.fixture
def setting(jam):
    model = jam("llama", "cross", "preserving", alive=False)
    rows = [[1, *random_ids(model, 1, n, seed=n)[0].tolist(), 2] for n in (3, 9, 5, 14, 7)]
    first = model.config.image_token_offset
    return model, rows, Dataset.from_dict({"input_ids": rows}), (first, model.config.vocab_size)


@torch.no_grad()
def test_against_a_slow_loop_whatever_the_batch_size(setting):
    model, rows, dataset, (first, last) = setting
    sums, counts = [0.0, 0.0], [0, 0]
    for row in rows:
        logs = model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
        for position, token in enumerate(row[1:]):
            index = int(first <= token < last)
            sums[index] -= logs[position, token].item()
            counts[index] += 1
    for batch_size in (1, 2, 5):
        result = perplexity(model, dataset, (first, last), batch_size=batch_size)
        assert (result.text_tokens, result.image_tokens) == tuple(counts)
        assert result.text_nll == pytest.approx(sums[0] / counts[0], abs=1e-5)
        assert result.image_nll == pytest.approx(sums[1] / counts[1], abs=1e-5)
        assert result.perplexity == pytest.approx(math.exp(sum(sums) / sum(counts)), rel=1e-4)
    assert counts[0] and counts[1]
    one, eight = (perplexity(model, dataset, (first, last), batch_size=n) for n in (1, 8))
    assert (one.text_nll, one.image_nll) == pytest.approx((eight.text_nll, eight.image_nll), abs=1e-6)


def test_an_empty_dataset_is_refused(setting):
    with pytest.raises(ValueError, match="empty"):
        perplexity(setting[0], setting[2].select([]), setting[3])
    with pytest.raises(ValueError, match="no document has more than one token"):
        perplexity(setting[0], Dataset.from_dict({"input_ids": [[1], [1]]}), setting[3])


@pytest.mark.parametrize("training", [False, True])
def test_the_model_stays_in_its_mode(setting, training):
    setting[0].train(training)
    perplexity(setting[0], setting[2], setting[3])
    assert setting[0].training is training


@torch.no_grad()
def test_divergence(setting, parents):
    model, rows, dataset, (first, last) = setting
    text, image = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in parents("llama"))
    assert divergence(text, model, dataset, (0, first)) == pytest.approx(0, abs=1e-9)  # preserving
    assert divergence(image, model, dataset, (first, last)) == pytest.approx(0, abs=1e-9)
    total, count = 0.0, 0
    for row in rows:
        a, b = (m(input_ids=torch.tensor([row])).logits[0, :, :first].double().log_softmax(-1) for m in (text, image))
        for position, token in enumerate(row[1:]):
            if token < first:
                total += F.kl_div(b[position], a[position], reduction="sum", log_target=True).item()
                count += 1
    assert divergence(text, image, dataset, (0, first)) == pytest.approx(total / count, rel=1e-4)
    assert total / count > 0.1
