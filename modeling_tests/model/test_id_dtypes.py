"""Ids come as int32 from `datasets` and numpy; whatever they meet, they give what int64 ids give."""

import numpy as np
import pytest
import torch
from conftest import random_ids
from PIL import Image

from jam_hf.data.collator import JamDataCollator


PICTURE = Image.new("RGB", (16, 16), (200, 30, 30))
MODES = (("uniform", "average"), ("width", "copy"), ("cross", "preserving"))
SETTINGS = [
    {"generation_mode": "text"},
    {"generation_mode": "image"},
    {"generation_mode": "interleaved", "min_new_images": 1, "max_length": 80},
    {"generation_mode": "image", "guidance_scale": 2.0},
    {"generation_mode": "interleaved", "image_positions": [0], "num_beams": 2},
    {"generation_mode": "image", "num_candidates": 2, "do_sample": True},
    {"max_new_tokens": 4},
]


@pytest.fixture(params=MODES, ids=lambda mode: mode[0])
def model(request, jam):
    return jam("llama", *request.param)


@pytest.fixture
def inputs(processor):
    return processor(text=["red<image> a", "a<image>"], images=[PICTURE] * 2, padding=True, return_tensors="pt")


def _as(dtype, inputs):
    return {k: v if v.is_floating_point() else v.to(dtype) for k, v in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_forward_and_its_loss(dtype, model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = model(**inputs, labels=labels)
        found = model(**_as(dtype, inputs), labels=labels.to(dtype))
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


@pytest.mark.sampled
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_generation(settings, model, inputs):
    settings = {"max_new_tokens": 20, **settings} if "max_length" not in settings else settings
    outputs = []
    for dtype in (torch.int64, torch.int32):
        torch.manual_seed(0)
        outputs.append(model.generate(**_as(dtype, inputs), **settings))
    assert outputs[1].dtype == torch.int64 and torch.equal(*outputs)


def test_continuous_batching_collators_and_tables(processor, model, inputs):
    ids = model.model.insert_image_tokens(inputs["input_ids"], inputs["pixel_values"])
    assert torch.equal(model.model.insert_image_tokens(inputs["input_ids"].int(), inputs["pixel_values"]), ids)
    segments = [
        processor.post_process_interleaved(row, model) for row in (ids, ids.int(), ids.numpy().astype(np.int32))
    ]
    assert [[s["type"] for s in row] for row in segments[0]] == [[s["type"] for s in row] for row in segments[1]]
    assert [[s["type"] for s in row] for row in segments[0]] == [[s["type"] for s in row] for row in segments[2]]
    collate = JamDataCollator(pad_token_id=0, vocab_size=model.config.vocab_size)
    batches = [
        collate([{"input_ids": kind(row)} for row in ids])
        for kind in (lambda r: r.int(), lambda r: r.numpy().astype(np.int32))
    ]
    assert all(batch["input_ids"].dtype == torch.int64 and torch.equal(batch["input_ids"], ids) for batch in batches)
    codes = model.get_image_tokens(inputs["pixel_values"])
    assert torch.equal(model.decode_image_tokens(codes.int()), model.decode_image_tokens(codes))


@pytest.mark.sampled
@pytest.mark.parametrize(
    "settings",
    [
        {"generation_mode": "image"},
        {"generation_mode": "interleaved", "min_new_images": 1, "max_new_tokens": 30},
        {"generation_mode": "interleaved", "min_new_images": 1},
        {"generation_mode": "image", "num_beams": 2},
        {"generation_mode": "text", "max_new_tokens": 5, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("beside", [True, False])
def test_embeddings_with_and_without_their_ids(settings, beside, model):
    """What is written is what the ids alone write; beside their ids, embeddings give the prompt back, too."""
    ids = random_ids(model, 2, 6)
    expected = model.generate(ids, **settings)
    if "no_repeat_ngram_size" in settings and not beside:
        pytest.skip("embeddings have no n-grams")
    embeds = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embeds, **({"input_ids": ids.int()} if beside else {}), **settings)
    written = expected if beside else expected[:, 6:]
    assert torch.equal(found[:, : written.shape[1]], written)


def test_room_for_pictures_is_counted_behind_the_ids(model):
    ids = random_ids(model, 2, 6)
    with pytest.raises(ValueError, match="picture"):
        embeds = model.get_input_embeddings()(ids)
        model.generate(ids, inputs_embeds=embeds, generation_mode="image", max_new_tokens=5)
    with pytest.raises(ValueError, match="input_ids must be integers, token ids, got torch.float32"):
        model(input_ids=ids.float())
