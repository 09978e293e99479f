"""Settings by modality, pictures in number and place, and the rest of what `generate()` takes, through the whole of
it.
"""

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jam_hf.model.call_settings_jam import JamCallSettings
from jam_hf.model.logits_process_jam import PictureWarperLogitsProcessor, warp_by_modality


N, BOS, EOS, BREAK = 16, 1, 2, 3


def batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def rows_in_both(model) -> dict[str, torch.Tensor]:
    first = model.config.image_token_offset
    return batch([[BOS, 30, 31], [BOS, 40, BREAK, first + 3], [BOS, 50, BREAK, first, first + 5], [BOS, 60, 61, 62]])


def scores_of(model, **settings) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    output = model.generate(
        **rows_in_both(model),
        generation_mode="interleaved",
        do_sample=True,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **settings,
    )
    return output.scores, output.sequences, output.logits


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ({"temperature": 0.7, "top_k": 0}, {"image_temperature": 1.4}),
        ({"temperature": 1.0, "top_k": 5}, {"image_top_k": 3}),
        ({"temperature": 1.0, "top_k": 0, "top_p": 0.8}, {"image_top_p": 0.4}),
        ({"temperature": 1.0, "top_k": 0, "min_p": 0.2}, {"image_min_p": 0.05}),
        (
            {"temperature": 1.0, "top_k": 0},
            {"image_temperature": 0.5, "image_top_k": 4, "image_top_p": 0.9, "image_min_p": 0.1},
        ),
        (
            {"temperature": 2.0, "top_k": 4, "top_p": 0.9},
            {"image_temperature": 1.0, "image_top_k": 0, "image_top_p": 1.0},
        ),
        ({"temperature": 0.6, "top_k": 7, "min_p": 0.1}, {}),
    ],
)
def test_each_modality_has_its_own_settings(text, image, jam):
    """Row by row against transformers' warpers, applied to the raw logits of that row's ids alone."""
    model = jam("llama", "cross", "preserving")
    all_scores, sequences, all_logits = scores_of(model, **text, **image)
    first, last = model.config.image_token_offset, model.config.image_token_offset + model.config.num_image_tokens
    start = sequences.shape[1] - len(all_scores)
    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    seen = {True: 0, False: 0}
    for step, (scores, logits) in enumerate(zip(all_scores, all_logits)):
        for row in range(len(scores)):
            ids = sequences[row : row + 1, : start + step]
            if EOS in ids[0].tolist():
                continue
            finite = torch.isfinite(scores[row]).nonzero().flatten().tolist()
            of_codes = all(first <= i < last for i in finite)
            if of_codes and len(finite) and ids[0, -1] != BREAK and not first <= ids[0, -1] < last:
                of_codes = False
            expected = logits[row : row + 1].clone()
            if of_codes:
                expected = expected[:, first:last]
            else:
                expected[:, first:last] = -torch.inf
                forbidden = [0, 4, model.config.mask_end_token_id]
                forbidden += [model.config.mask_token_id + i for i in range(model.config.num_mask_tokens)] + [BREAK]
                expected[:, forbidden] = -torch.inf
            for name, warper in warpers.items():
                value = text.get(name)
                if of_codes and image.get(f"image_{name}") is not None:
                    value = image[f"image_{name}"]
                if value is not None and value != (0 if name in ("top_k", "min_p") else 1.0):
                    expected = warper(value)(ids, expected)
            got = scores[row : row + 1, first:last] if of_codes else scores[row : row + 1]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
            seen[of_codes] += 1
    assert min(seen.values()) > 4


def test_a_warper_that_is_not_there_finds_its_place(jam):
    """Where only pictures have a top-p, it comes after the top-k of both and before their min-p."""
    settings = JamCallSettings(image_top_p=0.5, image_temperature=0.9)
    processors = LogitsProcessorList([TopKLogitsWarper(5), MinPLogitsWarper(0.1)])
    warp_by_modality(processors, settings, num_beams=1, reader=None)
    kinds = [p.image if isinstance(p, PictureWarperLogitsProcessor) else p for p in processors]
    expected = [TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper]
    assert [type(kind) for kind in kinds] == expected and processors[0].text is None


def pictures_of(row: list[int], start: int) -> list[int]:
    """How many ids of text stand before each picture that was begun after `start`."""
    places, words, position = [], 0, start
    while position < len(row) and row[position] != EOS:
        if row[position] == BREAK:
            assert row[position + N + 1] == BREAK
            places.append(words)
            position += N + 2
        else:
            words, position = words + 1, position + 1
    return places


@pytest.mark.sampled
@pytest.mark.parametrize(
    "sampling", [{"do_sample": False}, {"do_sample": True, "top_k": 0}, {"num_beams": 2, "do_sample": False}]
)
@pytest.mark.parametrize("guided", [{}, {"guidance_scale": 2.0}])
def test_pictures_in_number_and_place(guided, sampling, jam):
    model = jam("llama", "cross", "preserving")
    ids = batch([[BOS, 30, 31], [BOS, 40, 41, 42]])
    asked = {"generation_mode": "interleaved", "max_new_tokens": 60, **guided, **sampling}

    def places(**settings):
        torch.manual_seed(1)
        output = model.generate(**ids, **asked, **settings)
        return [pictures_of(row, 4) for row in output.tolist()]

    assert places(image_positions=[0, 2, 2]) == [[0, 2, 2]] * 2
    assert places(image_positions=[1], max_new_images=1) == [[1]] * 2
    assert places(max_new_images=0) == [[], []]
    assert all(len(found) >= 2 for found in places(min_new_images=2))
    assert all(len(found) == 1 for found in places(min_new_images=1, max_new_images=1))
    every = list(range(20, model.config.image_token_offset))
    assert places(image_after_token_ids=every, max_new_images=2, eos_token_id=None)[0] == [1, 2]


def test_one_picture_after_each_sentence(jam, processor):
    """`sentence_end_token_ids` are the ids whose text ends a sentence, and nothing else."""
    ends = processor.sentence_end_token_ids()
    tokenizer = processor.tokenizer
    assert ends and all(
        tokenizer.decode([i]).rstrip("\"')]»”’").endswith((".", "!", "?", "…", "。", "！", "？")) for i in ends
    )
    others = set(range(len(tokenizer))) - set(ends)
    assert not any(tokenizer.decode([i]).endswith((".", "!", "?")) for i in others - set(tokenizer.all_special_ids))
    model = jam("llama", "uniform", "average")
    with torch.no_grad():
        model.lm_head.weight[ends[0]] = model.lm_head.weight[20:60].mean(0)
    torch.manual_seed(0)
    output = model.generate(
        torch.tensor([[BOS, 30]] * 8),
        generation_mode="interleaved",
        image_after_token_ids=ends,
        max_new_tokens=100,
        do_sample=True,
        top_k=0,
        eos_token_id=None,
    )
    drawn = 0
    for row in output[:, 2:].tolist():
        for place, token in enumerate(row[: -N - 2]):
            if token in ends:
                assert row[place + 1] == BREAK
                drawn += 1
            elif token < model.config.image_token_offset and token != BREAK:
                assert row[place + 1] != BREAK
    assert drawn > 3


def test_settings_in_the_generation_config_are_saved_and_read(jam, tmp_path):
    model = jam("llama", "cross", "preserving")
    ids = torch.tensor([[BOS, 30, 31]])
    asked = {
        "generation_mode": "image",
        "guidance_scale": 3.0,
        "image_top_k": 2,
        "image_temperature": 0.8,
        "do_sample": True,
    }
    torch.manual_seed(0)
    expected = model.generate(ids, **asked)
    model.generation_config.update(**{"guidance_scale": 3.0, "do_sample": True})
    for name in ("generation_mode", "image_top_k", "image_temperature"):
        setattr(model.generation_config, name, asked[name])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.manual_seed(0)
    assert torch.equal(again.generate(ids), expected)
    config = GenerationConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, generation_config=config), expected)
    assert config.image_top_k == 2
    # An argument outranks the config, None too.
    assert again.generate(ids, generation_mode="text", max_new_tokens=3).shape[1] <= 6
    torch.manual_seed(0)
    assert not torch.equal(again.generate(ids, guidance_scale=None), expected)


def test_stopping_criteria_and_processors_see_the_true_ids(jam):
    model = jam("llama", "cross", "preserving")
    seen = []

    class AfterCodes(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(input_ids.clone())
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 9)

    output = model.generate(
        torch.tensor([[BOS, 30]]),
        generation_mode="image",
        guidance_scale=3.0,
        do_sample=False,
        stopping_criteria=[AfterCodes()],
    )
    assert output.shape == (1, 9) and all(torch.equal(ids, output[:, : ids.shape[1]]) for ids in seen)


@pytest.mark.parametrize("guided", [{}, {"guidance_scale": 2.0}])
def test_a_row_that_a_criterion_ends_inside_a_picture_harms_no_other(guided, jam):
    model = jam("llama", "cross", "preserving")

    class SecondRowEarly(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([False, input_ids.shape[1] >= 8])

    ids = torch.tensor([[BOS, 30], [BOS, 40]])
    settings = {"generation_mode": "image", "do_sample": True, "image_top_p": 0.9, **guided}
    torch.manual_seed(5)
    output = model.generate(ids, stopping_criteria=[SecondRowEarly()], **settings)
    torch.manual_seed(5)
    whole = model.generate(ids, **settings)
    assert torch.equal(output[0], whole[0]) and torch.equal(output[1, :8], whole[1, :8])
    assert (output[1, 8:] == 0).all() and output.shape == whole.shape


def test_context_and_budget_bound_the_pictures(jam):
    """Of 128 positions, a prompt of 120 leaves no room for a picture, whatever the budget."""
    model = jam("llama", "cross", "preserving")
    long, short = [BOS, *[30] * 119], [BOS, 30]
    with pytest.raises(ValueError, match="got room for 8"):
        model.generate(**batch([long, short]), generation_mode="image")
    output = model.generate(
        **batch([long, short]),
        generation_mode="interleaved",
        image_positions=[0],
        max_new_tokens=N + 3,
        do_sample=False,
        eos_token_id=None,
    )
    assert output[1, 120] == BREAK and output[1, 120 + N + 1] == BREAK
    assert BREAK not in output[0].tolist()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_temperature": -1.0}, "image_temperature=-1.0"),
        ({"image_top_p": 3.0}, "image_top_p=3.0"),
        ({"min_new_images": 9}, "needs room for 9 picture"),
        ({"min_new_images": 2, "max_new_images": 1}, "allows fewer pictures"),
        ({"image_positions": [2, 1]}, "ascending order"),
        ({"image_positions": 2}, "a list of whole numbers"),
        ({"image_after_token_ids": ["."]}, "a list of whole numbers"),
        ({"generation_mode": None, "max_new_images": 1}, "need generation_mode='interleaved'"),
        ({"generation_mode": "image", "min_new_images": 1}, "go with 'interleaved'"),
    ],
)
def test_bad_settings(wrong, message, jam):
    settings = {"generation_mode": "interleaved", "do_sample": True, "max_new_tokens": 40, **wrong}
    with pytest.raises(ValueError, match=message):
        jam("llama", "uniform", "average").generate(torch.tensor([[BOS, 30]]), **settings)
