"""Pictures through transformers' ways to decode and to cache, with and without guidance, against the slow oracle."""

import pytest
import torch
from conftest import NUM_CODES
from decoding_oracles import BREAK, BY_MODE, SHORT, beam_search, greedy, picture_scores, unequal_streams
from fusion_zoo import image_parent, save, text_parent, vq_model
from transformers import AutoModelForCausalLM

import jam_hf
from jam_hf import JamForCausalLM, JamProcessor


SECTION = "Pictures"
CODES = 16  # of one picture: a grid of 4 x 4
by_case = pytest.mark.parametrize(("family", "mode", "init"), SHORT)
by_mode = pytest.mark.parametrize(("family", "mode", "init"), BY_MODE)


def _rows(model) -> list[list[int]]:
    """In text, before a picture, and half-way through one."""
    first = model.config.image_token_offset
    return [[1, 30, 31, 32], [1, 40, BREAK], [1, 50, BREAK, first + 1, first + 2, first + 3]]


def _batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def _expected(model, row: list[int], mode: str, scale: float, steps: int) -> list[int]:
    process = picture_scores(model, len(row), mode, scale, len(row) + steps)
    return greedy(model, row, steps, end=model.config.eos_token_id, process=process)


@pytest.fixture(scope="module")
def oracle():
    """`oracle(model, key, ...)` -> what the rows become; computed once for each model, which `key` names."""
    known = {}

    def write(model, key, generation_mode, scale, steps):
        asked = (*key, generation_mode, scale, steps)
        if asked not in known:
            known[asked] = [_expected(model, row, generation_mode, scale, steps) for row in _rows(model)]
        return known[asked]

    return write


def _check(model, oracle, key, generation_mode: str, scale: float, **settings) -> None:
    rows, steps = _rows(model), CODES + 3
    output = model.generate(
        **_batch(rows),
        generation_mode=generation_mode,
        guidance_scale=scale,
        max_new_tokens=steps,
        do_sample=False,
        **settings,
    )
    wanted = oracle(model, key, generation_mode, scale, steps)
    for written, expected in zip(output[:, max(map(len, rows)) :].tolist(), wanted):
        assert written[: len(expected)] == expected


@pytest.mark.feature(SECTION, "static cache, guidance, a batch in different modalities")
@by_case
def test_static_cache_with_guidance(family, mode, init, jam, oracle):
    _check(jam(family, mode, init), oracle, (family, mode, init), "interleaved", 2.0, cache_implementation="static")


@pytest.mark.feature(SECTION, "static cache, streams of unequal heads and widths", modes=("cross",))
@pytest.mark.parametrize("text_family", ["llama", "opt"])
def test_static_cache_with_unequal_streams(text_family, oracle):
    _check(unequal_streams(text_family), oracle, (text_family,), "image", 2.0, cache_implementation="static")


@pytest.mark.feature(SECTION, "chunked prefill, guidance")
@by_mode
def test_chunked_prefill(family, mode, init, jam, oracle):
    settings = {"prefill_chunk_size": 2, "cache_implementation": "static"}
    _check(jam(family, mode, init), oracle, (family, mode, init), "interleaved", 2.0, **settings)


@pytest.mark.feature(SECTION, "without a cache")
@by_mode
def test_without_a_cache(family, mode, init, jam, oracle):
    _check(jam(family, mode, init), oracle, (family, mode, init), "interleaved", 2.0, use_cache=False)


@pytest.mark.feature(SECTION, "beam search, guidance")
@by_mode
def test_beams(family, mode, init, jam):
    model, scale = jam(family, mode, init), 2.5
    row = [1, 30, 31, 32]
    output = model.generate(
        input_ids=torch.tensor([row]),
        generation_mode="image",
        guidance_scale=scale,
        num_beams=2,
        num_return_sequences=2,
        do_sample=False,
        cache_implementation="static",
    )
    steps = CODES + 2
    process = picture_scores(model, len(row), "image", scale, len(row) + steps)
    expected = [ids for _, ids in beam_search(model, row, 2, steps, process=process)]
    assert output[:, len(row) :].tolist() == expected
    assert expected[0] != expected[1]


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "assisted decoding (a draft model)")
@pytest.mark.parametrize(
    ("generation_mode", "scale", "draft"), [("interleaved", 1.0, "stock Llama"), ("image", 2.0, "small JAM")]
)
@by_mode
def test_assisted(family, mode, init, generation_mode, scale, draft, jam, parents):
    model = jam(family, mode, init)
    if draft == "stock Llama":
        assistant = AutoModelForCausalLM.from_pretrained(parents("llama")[0]).eval()
    else:
        assistant = jam("llama", "uniform", "average")
    assistant.generation_config.update(assistant_confidence_threshold=0.0, num_assistant_tokens=5)
    row = [1, 30, BREAK] if generation_mode == "interleaved" else [1, 30, 31]
    output = model.generate(
        input_ids=torch.tensor([row]),
        generation_mode=generation_mode,
        guidance_scale=scale,
        assistant_model=assistant,
        max_new_tokens=CODES + 3,
        do_sample=False,
    )
    assert output[0, 3:].tolist() == _expected(model, row, generation_mode, scale, CODES + 3)


@pytest.mark.feature(SECTION, "assisted decoding (a draft model)")
@pytest.mark.parametrize("written", ["interleaved", "image"])
def test_the_text_parent_drafts(written, tmp_path):
    """Its ids are other ids: both tokenizers are asked for by name, and with them the documents are the same."""
    text, text_tokenizer = text_parent("llama")
    jam_hf.fuse(
        save(text, text_tokenizer, tmp_path / "text"),
        save(*image_parent("plain"), tmp_path / "image"),
        "cross",
        tmp_path / "jam",
        vq_model=vq_model(),
    )
    model = JamForCausalLM.from_pretrained(tmp_path / "jam").eval()
    processor = JamProcessor.from_pretrained(tmp_path / "jam")
    inputs = processor(text="the small circle is", return_tensors="pt")
    settings = {"generation_mode": written, "do_sample": False, "max_new_tokens": 40}
    settings |= {"image_positions": [4]} if written == "interleaved" else {}
    text.generation_config.update(assistant_confidence_threshold=0.0, num_assistant_tokens=5)
    with pytest.raises(ValueError, match="tokenizer=processor.tokenizer, assistant_tokenizer="):
        model.generate(**inputs, **settings, assistant_model=text, tokenizer=processor.tokenizer)
    both = {"tokenizer": processor.tokenizer, "assistant_tokenizer": text_tokenizer}
    found = model.generate(**inputs, **settings, assistant_model=text, **both)
    assert torch.equal(found, model.generate(**inputs, **settings))
    assert (found >= model.config.image_token_offset).sum() >= 16


@pytest.mark.feature(SECTION, "prompt-lookup decoding")
@by_mode
def test_prompt_lookup(family, mode, init, jam):
    model = jam(family, mode, init)
    row = [1, *[BREAK, *[model.config.image_token_offset + place % 3 for place in range(CODES)], BREAK] * 2]
    output = model.generate(
        input_ids=torch.tensor([row]),
        generation_mode="image",
        prompt_lookup_num_tokens=4,
        max_new_tokens=CODES + 2,
        do_sample=False,
    )
    assert output[0, len(row) :].tolist() == _expected(model, row, "image", 1.0, CODES + 2)


@pytest.mark.sampled
@pytest.mark.feature(SECTION, "pictures in the prompt, pixel_values or inputs_embeds")
@pytest.mark.parametrize("use_cache", [True, False])
@by_case
def test_a_picture_in_the_prompt(family, mode, init, use_cache, jam):
    """As pixels, as its codes, and as embeddings mixed with those of text: three ways to say the same."""
    model = jam(family, mode, init)
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    codes = model.get_image_tokens(pixels)[0].tolist()
    assert len(set(codes)) > 1 and len(codes) == CODES <= NUM_CODES
    placeholders = torch.tensor([[1, 30, BREAK, *[model.config.image_token_id] * CODES, BREAK, 31]])
    row = [1, 30, BREAK, *codes, BREAK, 31]
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "use_cache": use_cache,
        "generation_mode": None,
        "eos_token_id": None,
    }
    expected = greedy(model, row, 8)
    by_pixels = model.generate(input_ids=placeholders, pixel_values=pixels, **settings)
    assert by_pixels[0].tolist() == row + expected
    assert model.generate(input_ids=torch.tensor([row]), **settings)[0].tolist() == row + expected
    embeds = model.get_input_embeddings()(model.model.insert_image_tokens(placeholders, pixels))
    assert model.generate(inputs_embeds=embeds, **settings)[0].tolist() == expected


@pytest.mark.feature(SECTION, "pictures in the prompt, pixel_values or inputs_embeds")
@by_mode
def test_a_picture_drawn_after_inputs_embeds(family, mode, init, jam):
    model = jam(family, mode, init)
    row = [1, 30, 31, 32]
    embeds = model.get_input_embeddings()(torch.tensor([row]))
    output = model.generate(inputs_embeds=embeds, generation_mode="image", guidance_scale=2.0, do_sample=False)
    assert output[0].tolist() == _expected(model, row, "image", 2.0, CODES + 2)
