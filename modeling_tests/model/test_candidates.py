"""N best: the best candidate is kept, text is what the row would write alone, budgets hold; rerankers against slow
oracles.
"""

import copy

import pytest
import torch
from compatibility.decoding_oracles import next_logits
from conftest import randomise
from model import test_picture_layout
from model.test_picture_layout import (
    BOS,
    BREAK,
    EOS,
    FIRST,
    LAST,
    LAYOUTS,
    MASK,
    allowed_by_hand,
    assert_well_formed,
    picture,
    place_by_hand,
)
from nightly import every_day
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, LogitsProcessor, LogitsProcessorList
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from jam_hf.generation.best_of_n import JamRerankedOutput
from jam_hf.generation.rerankers import CLIPReranker, LikelihoodReranker, PictureCandidates
from jam_hf.generation.streaming import JamStreamer


layout_tokenizer, laid_out = test_picture_layout.layout_tokenizer, test_picture_layout.laid_out  # fixtures
N, PAD = 16, 0
SAMPLED = {"do_sample": True, "top_k": 0, "temperature": 1.5, "generation_mode": "interleaved"}
OFTEN = {"sequence_bias": [[[BREAK], 4.0], [[EOS], 2.0]]}


def lowest_sum(candidates: PictureCandidates) -> torch.Tensor:
    return -candidates.codes.sum(1).float()


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def unlike_prompts(layout: dict) -> list[list[int]]:
    """In text, in text behind a picture, half-way through a picture, at an opening token."""
    whole = picture(layout, range(FIRST, LAST))
    return [[BOS, 60, 61], [BOS, 62, *whole, 63], [BOS, 64, *whole[:9]], [BOS, 65, 66, BREAK]]


def written(row: list[int]) -> list[int]:
    """A row without its padding."""
    start = next(place for place, token in enumerate(row) if token != PAD)
    end = len(row) - next(place for place, token in enumerate(reversed(row)) if token != PAD)
    return row[start:end]


class GreedyText(LogitsProcessor):
    """Text is the likeliest, pictures are drawn at random."""

    def __init__(self, layout: dict):
        self.layout = layout

    def __call__(self, input_ids, scores):
        best = torch.full_like(scores, float("-inf")).scatter(1, scores.argmax(-1, keepdim=True), 0.0)
        in_text = [place_by_hand([t for t in row if t != PAD], self.layout) is None for row in input_ids.tolist()]
        return torch.where(torch.tensor(in_text)[:, None], best, scores)


# ----- documents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    every_day(
        [("plain", "cross"), ("chameleon", "uniform"), ("emu3", "cross"), ("one mark", "uniform")],
        ("emu3", "cross"),
        ("one mark", "uniform"),
    ),
)
def test_the_best_candidate_is_kept_and_text_is_what_the_row_would_write_alone(name, mode, laid_out):
    """Oracles: the lowest sum of codes among the candidates; for text a full forward over the row alone, for each
    token.
    """
    (model, _), layout = laid_out(name, mode), LAYOUTS[name]
    rows, steps = unlike_prompts(layout), 90
    inputs = padded(rows)
    length = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    output = model.generate(
        **inputs,
        **{**SAMPLED, **OFTEN},
        logits_processor=LogitsProcessorList([GreedyText(layout)]),
        num_candidates=3,
        reranker=lowest_sum,
        max_new_tokens=steps,
        return_dict_in_generate=True,
    )
    assert isinstance(output, JamRerankedOutput)
    sequences, budget = output.sequences.tolist(), length + steps
    assert len(sequences[0]) <= budget and {slot.row for slot in output.picture_slots} == {0, 1, 2, 3}
    bias = torch.zeros(model.config.vocab_size)
    bias[BREAK], bias[EOS] = 4.0, 2.0
    for slot in output.picture_slots:
        assert slot.codes.shape == (3, N) and len({tuple(codes) for codes in slot.codes.tolist()}) == 3
        assert slot.chosen == int(slot.codes.sum(1).argmin()) and torch.equal(slot.scores, -slot.codes.sum(1).float())
        whole = picture(layout, slot.codes[slot.chosen].tolist())
        assert sequences[slot.row][slot.start : slot.start + len(whole)] == whole
    for index, (row, prompt) in enumerate(zip(sequences, rows)):
        shift = length - len(prompt)
        ids = written(row)
        assert ids[: len(prompt)] == prompt
        assert_well_formed(ids, layout)
        starts = {slot.start for slot in output.picture_slots if slot.row == index}
        assert starts == {
            place + shift
            for place in range(len(ids))
            if ids[place] == BREAK and place_by_hand(ids[:place], layout) is None
        } - ({1 + 1 + shift} if index == 1 else set())
        for end in range(len(prompt), len(ids)):
            if place_by_hand(ids[:end], layout) is not None:
                continue
            allowed = allowed_by_hand(ids[:end], layout)
            if shift + end + 2 + model.config.picture_length > budget:
                allowed -= {BREAK}
            scores = next_logits(model, torch.tensor([ids[:end]]))[0] + bias
            assert scores[ids[end]] >= max(scores[token] for token in allowed) - 1e-4 and ids[end] in allowed
        assert ids[-1] == EOS or shift + len(ids) == budget
        assert set(row[shift + len(ids) :]) <= {PAD}


@pytest.mark.sampled
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 75},
        {"max_length": 90},
        {"max_new_tokens": 75, "guidance_scale": 3.0},
        {"max_new_tokens": 75, "min_new_tokens": 60, "sequence_bias": [[[BREAK], 3.0], [[EOS], 6.0]]},
        {"max_new_tokens": 75, "begin_suppress_tokens": [BREAK, 31]},
        {"max_new_tokens": 75, "exponential_decay_length_penalty": (20, 1.3)},
        {"max_new_tokens": 75, "repetition_penalty": 1.3},
        {"max_new_tokens": 40, "generation_mode": "image"},
        {"generation_mode": "image", "guidance_scale": 2.0},
        {"max_new_tokens": 75, "image_positions": [2, 5]},
        {"max_new_tokens": 75, "min_new_images": 1, "max_new_images": 2},
        {"max_new_tokens": 75, "image_after_token_ids": list(range(20, 90, 3))},
        {"max_new_tokens": 75, "guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[BOS, 44, 45]])},
        {"max_new_tokens": 75, "guidance_scale": 2.0, "image_guidance_scale": 1.5, "image_temperature": 0.7},
        {"max_new_tokens": 4},
        {},
    ],
)
def test_with_one_choice_at_each_step_the_document_is_that_of_plain_generate(name, settings, laid_out):
    """With top_k=1 all candidates are equal, and what is counted from the prompt is counted over the whole document."""
    (model, _), layout = laid_out(name), LAYOUTS[name]
    prompts = unlike_prompts(layout)
    if settings.get("generation_mode") == "image":
        prompts = [prompts[0], prompts[1], prompts[2]]
        if "max_new_tokens" not in settings:
            prompts = prompts[:2]
    kwargs = {**padded(prompts), **SAMPLED, **OFTEN, "top_k": 1, **settings}
    if not settings:
        kwargs |= {"generation_config": copy.deepcopy(model.generation_config)}
        kwargs["generation_config"].max_new_tokens = 60
    expected = model.generate(**kwargs)
    found = model.generate(**kwargs, num_candidates=2, reranker=lowest_sum)
    assert torch.equal(found, expected)


def test_rows_do_not_depend_on_one_another(laid_out):
    """A reranker sees one row at a time, without the padding that the batch has."""
    model, _ = laid_out()
    calls = []

    def record(candidates):
        calls.append(candidates.context.tolist())
        return torch.arange(len(candidates.codes)).float()

    torch.manual_seed(1)
    output = model.generate(
        **padded([[BOS, 60], [BOS, 70, 71, 72]]),
        **{**SAMPLED, "generation_mode": "image"},
        num_candidates=2,
        reranker=record,
        return_dict_in_generate=True,
    )
    assert calls == [[BOS, 60, BREAK], [BOS, 70, 71, 72, BREAK]]
    assert [(slot.row, slot.start, slot.chosen) for slot in output.picture_slots] == [(0, 4, 1), (1, 4, 1)]
    assert output.sequences.shape == (2, 4 + N + 2) and output.sequences[:, -1].tolist() == [BREAK, BREAK]


def test_one_candidate_is_plain_generate_and_seeds_repeat(laid_out):
    model, _ = laid_out("emu3", "cross")
    kwargs = {**padded(unlike_prompts(LAYOUTS["emu3"])), **SAMPLED, **OFTEN, "max_new_tokens": 80}
    outputs = []
    for count in (None, 1, 3, 3):
        torch.manual_seed(5)
        outputs.append(model.generate(**kwargs, num_candidates=count).tolist())
    assert outputs[0] == outputs[1] and outputs[2] == outputs[3] and outputs[0] != outputs[2]


def test_none_takes_a_setting_of_the_model_away_in_every_segment(laid_out, monkeypatch):
    """As in plain `generate()`, where `None` is not filled from the model's own generation config."""
    model, _ = laid_out("plain")
    of_model = {"guidance_scale": 3.0, "image_top_k": 1, "repetition_penalty": 9.0}
    asked = {**SAMPLED, "max_new_tokens": 60, "num_candidates": 2, "reranker": lowest_sum, "image_positions": [1]}
    without, guided, apart = (
        torch.manual_seed(0) and model.generate(torch.tensor([[BOS, 30, 31]]), **asked, **more)
        for more in ({}, {"guidance_scale": 3.0}, {"image_top_k": 1})
    )
    assert not torch.equal(without, guided) and not torch.equal(without, apart)
    config = copy.deepcopy(model.generation_config)
    monkeypatch.setattr(model, "generation_config", config)
    for name, value in of_model.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    assert torch.equal(model.generate(torch.tensor([[BOS, 30, 31]]), **asked, **dict.fromkeys(of_model)), without)


def test_more_candidates_win_by_more(laid_out):
    model, _ = laid_out()
    means = []
    for count in (1, 8):
        torch.manual_seed(2)
        ids = model.generate(
            torch.tensor([[BOS, 60]] * 6),
            **{**SAMPLED, "generation_mode": "image"},
            num_candidates=count,
            reranker=lowest_sum,
        )
        means.append(ids[:, 3 : 3 + N].float().mean())
    assert means[1] < means[0] - 0.5


def test_several_sequences_for_each_prompt(laid_out):
    model, _ = laid_out()
    torch.manual_seed(0)
    output = model.generate(
        **padded([[BOS, 60], [BOS, 61, 62]]),
        **{**SAMPLED, "generation_mode": "image"},
        num_return_sequences=2,
        num_candidates=2,
        return_dict_in_generate=True,
    )
    assert [row[:3] for row in output.sequences.tolist()] == [[PAD, BOS, 60]] * 2 + [[BOS, 61, 62]] * 2
    assert [slot.row for slot in output.picture_slots] == [0, 1, 2, 3]


def test_what_belongs_to_a_row_goes_with_it(laid_out):
    """Rows leave, come back and stand in other places; a function of the row's number still hears its number."""
    model, _ = laid_out()
    prompts = [*unlike_prompts(LAYOUTS["plain"])[:2], [BOS, 64, BREAK]]
    bias = [[[BREAK], 2.0], [[EOS], -50.0], *([[30 + row], 3.0] for row in range(3))]
    torch.manual_seed(0)
    output = model.generate(
        **padded(prompts),
        **{**SAMPLED, "sequence_bias": bias},
        prefix_allowed_tokens_fn=lambda row, ids: [BREAK, EOS, 30 + row, *range(FIRST, LAST)],
        num_candidates=2,
        max_new_tokens=60,
    )
    for index, row in enumerate(output[:, len(prompts[1]) :].tolist()):
        assert {token for token in row if token not in (BREAK, PAD) and token < FIRST} == {30 + index}


@pytest.mark.parametrize("ends_at", [3, 12, 30])
def test_the_users_criteria_end_a_document_where_they_say(ends_at, laid_out):
    """In text, and inside a picture, where there is nothing to choose yet."""
    model, _ = laid_out()

    def stops(input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= ends_at)

    torch.manual_seed(0)
    prompt = [[BOS, BREAK]] if ends_at == 12 else [[BOS, 60]]
    for count in (1, 2):
        ids = model.generate(
            torch.tensor(prompt),
            **{**SAMPLED, "sequence_bias": [[[BREAK], 5.0], [[EOS], -50.0]]},
            stopping_criteria=[stops],
            max_new_tokens=60,
            num_candidates=count,
        )
        assert ids.shape == (1, ends_at)


def test_a_stop_string_ends_its_row_alone(laid_out):
    model, processor = laid_out()
    torch.manual_seed(0)
    (a,) = processor.tokenizer("a", add_special_tokens=False)["input_ids"]
    output = model.generate(
        **padded([[BOS, 60], [BOS, 61]]),
        **{**SAMPLED, "sequence_bias": [[[BREAK], 5.0], [[EOS], -50.0], [[a], 5.0]]},
        num_candidates=2,
        max_new_tokens=60,
        stop_strings=["a"],
        tokenizer=processor.tokenizer,
    )
    for row in output.tolist():
        ids = written(row)
        assert "a" not in processor.tokenizer.decode(ids[2:-1], skip_special_tokens=True)
        assert "a" in processor.tokenizer.decode(ids[-1:]) or len(row) == 62 == len(ids)
    assert (output == a).any() and (output[:, -1] != PAD).any()


def test_streaming_gives_what_is_decided(laid_out):
    model, processor = laid_out("emu3")
    kwargs = {**padded(unlike_prompts(LAYOUTS["emu3"])), **SAMPLED, **OFTEN, "max_new_tokens": 110}
    streamer = JamStreamer(model, processor)
    torch.manual_seed(0)
    output = model.generate(**kwargs, num_candidates=2, streamer=streamer)
    pictures = [[] for _ in output]
    for event in streamer:
        if event["type"] == "image":
            pictures[event["row"]].append(event["image_tokens"])
    for row, found in zip(output.tolist(), pictures):
        assert [token for tokens in found for token in tokens] == [token for token in row if FIRST <= token < LAST]
    assert sum(map(len, pictures)) > 4


# ----- rerankers ------------------------------------------------------------------------------------------------------


def mean_by_hand(model, layout: dict, context: list[int], codes: list[int]) -> float:
    """A full forward without a cache for each code; probabilities among image codes."""
    ids, total = list(context), 0.0
    for token in picture(layout, codes)[1:-1]:
        if FIRST <= token < LAST:
            total += float(next_logits(model, torch.tensor([ids]))[0, FIRST:LAST].log_softmax(-1)[token - FIRST])
        ids.append(token)
    return total / N


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "mode"), [("plain", "cross"), ("emu3", "uniform"), ("emu3", "cross")])
@pytest.mark.parametrize("minus", [False, True])
def test_likelihood_is_that_of_full_forwards(name, mode, minus, laid_out):
    (model, _), layout = laid_out(name, mode), LAYOUTS[name]
    prompts = unlike_prompts(layout)
    torch.manual_seed(3)
    output = model.generate(
        **padded(prompts),
        **{**SAMPLED, **OFTEN},
        max_new_tokens=60,
        num_candidates=3,
        reranker=LikelihoodReranker(minus_unconditional=True) if minus else "likelihood",
        return_dict_in_generate=True,
    )
    assert len(output.picture_slots) >= 3
    for slot in output.picture_slots:
        context = [token for token in output.sequences[slot.row, : slot.start + 1].tolist() if token != PAD]
        expected = []
        for codes in slot.codes.tolist():
            score = mean_by_hand(model, layout, context, codes)
            expected.append(score - minus * mean_by_hand(model, layout, [BOS, MASK, BREAK], codes))
        torch.testing.assert_close(slot.scores, torch.tensor(expected), atol=1e-4, rtol=1e-4)
        assert slot.chosen == max(range(3), key=expected.__getitem__)


@pytest.fixture(scope="module")
def clip():
    """A tiny random CLIP with a tokenizer of single letters, and its PIL image processor."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={name: index for index, name in enumerate(names)}, merges=[])
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    ids = {"bos_token_id": len(names) - 2, "eos_token_id": len(names) - 1, "pad_token_id": len(names) - 1}
    model = CLIPModel(
        CLIPConfig(
            text_config={**sizes, **ids, "vocab_size": len(names), "max_position_embeddings": 12},
            vision_config={**sizes, "image_size": 16, "patch_size": 4},
            projection_dim=8,
        )
    ).eval()
    randomise(model, seed=6)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return model, tokenizer, image_processor


def clip_by_hand(clip, ids: list[int], pictures) -> list[float]:
    model, _, image_processor = clip
    with torch.no_grad():
        text = model.get_text_features(input_ids=torch.tensor([ids])).pooler_output[0]
        scores = []
        for image in pictures:
            pixels = image_processor([image], return_tensors="pt")["pixel_values"]
            seen = model.get_image_features(pixel_values=pixels).pooler_output[0]
            scores.append(float(model.logit_scale.exp() * torch.cosine_similarity(text, seen, dim=0)))
    return scores


def test_clip_reads_the_end_of_the_text_and_each_picture(clip, laid_out):
    (jam, processor), (model, tokenizer, image_processor) = laid_out("emu3"), clip
    reranker = CLIPReranker(model, tokenizer, image_processor)
    codes = torch.randint(FIRST, LAST, (3, N), generator=torch.Generator().manual_seed(0))
    layout = LAYOUTS["emu3"]
    for words in ("red", "a small red circle in the top left", ""):
        ids = processor.tokenizer(words, add_special_tokens=False)["input_ids"]
        half = len(ids) // 2
        context = [BOS, *ids[:half], *picture(layout, range(FIRST, LAST)), *ids[half:], BREAK]
        candidates = PictureCandidates(jam, torch.tensor(context), codes, processor.tokenizer)
        assert candidates.text == words
        vocabulary = tokenizer.get_vocab()
        letters = [
            vocabulary[letter + ("</w>" if place == len(word) - 1 else "")]
            for word in words.split()
            for place, letter in enumerate(word)
        ]
        read = [vocabulary["<|startoftext|>"], *letters[-10:], vocabulary["<|endoftext|>"]]
        pictures = processor.image_processor.postprocess(jam.decode_image_tokens(codes))
        expected = clip_by_hand(clip, read, pictures)
        torch.testing.assert_close(reranker(candidates), torch.tensor(expected), atol=1e-4, rtol=1e-4)
        assert max(expected) - min(expected) > 1e-3
    assert tokenizer.truncation_side == "right"  # the caller's own stays as it is


def test_text_has_no_ids_of_pictures_though_a_tokenizer_may_know_them_as_words(laid_out):
    class Ids:
        def decode(self, ids, skip_special_tokens):
            return ids.tolist()

    model, _ = laid_out("emu3")
    row = [
        BOS,
        30,
        *picture(LAYOUTS["emu3"], range(FIRST, LAST)),
        31,
        *picture(LAYOUTS["emu3"], range(FIRST, LAST)),
        32,
        BREAK,
    ]
    assert PictureCandidates(model, torch.tensor(row), torch.zeros(1, N), Ids()).text == [BOS, 30, 31, 32]


def test_a_clip_checkpoint_by_name(clip, laid_out, tmp_path):
    for part in clip:
        part.save_pretrained(tmp_path)
    jam, processor = laid_out()
    kwargs = {**padded([[BOS, *processor.tokenizer("a ruby")["input_ids"][1:]]]), **SAMPLED, "generation_mode": "image"}
    kwargs |= {"num_candidates": 3, "return_dict_in_generate": True, "tokenizer": processor.tokenizer}
    outputs = []
    for reranker in (str(tmp_path), CLIPReranker(*clip)):
        torch.manual_seed(0)
        outputs.append(jam.generate(**kwargs, reranker=reranker))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].picture_slots[0].scores, outputs[1].picture_slots[0].scores)
    del kwargs["tokenizer"]
    with pytest.raises(ValueError, match=r"pass tokenizer=processor\.tokenizer"):
        jam.generate(**kwargs, reranker=CLIPReranker(*clip))
    with pytest.raises(ValueError, match="expected the name of a CLIP checkpoint, or a CLIPModel with tokenizer"):
        CLIPReranker(clip[0])
    with pytest.raises(OSError):
        jam.generate(**kwargs, reranker=str(tmp_path / "missing"))


# ----- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_candidates": 0}, "num_candidates must be a whole number of at least 1; got 0"),
        ({"num_candidates": 2.0}, "whole number of at least 1; got 2.0"),
        ({"num_candidates": True}, "whole number of at least 1; got True"),
        ({"num_candidates": None}, r"reranker=\.\.\. needs num_candidates"),
        ({"do_sample": False}, "needs do_sample=True: without it all candidates are equal"),
        ({"num_beams": 3}, "cannot be combined with beam sample"),
        ({"do_sample": False, "num_beams": 3}, "cannot be combined with beam search"),
        ({"prompt_lookup_num_tokens": 3}, "cannot be combined with assisted generation"),
        ({"generation_mode": "text"}, "needs generation_mode='interleaved' or 'image'.*got 'text'"),
        ({"generation_mode": None}, "got None"),
        ({"output_scores": True, "return_dict_in_generate": True}, "cannot be combined with output_scores=True"),
        ({"max_time": 1.0}, "cannot be combined with max_time"),
        ({"encoder_repetition_penalty": 1.2}, "cannot be combined with encoder_repetition_penalty"),
        ({"past_key_values": object()}, "cannot be combined with past_key_values"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 32)}, "cannot be combined with inputs_embeds"),
        ({"reranker": 3}, "reranker must be 'likelihood', the name of a CLIP checkpoint, or a callable"),
        ({"reranker": lambda c: [0.0]}, r"must return 3 scores, one for each candidate, got the shape \[1\]"),
        ({"reranker": lambda c: torch.zeros(3, 1)}, r"got the shape \[3, 1\]"),
        ({"reranker": lambda c: None}, "must return 3 scores.*NoneType"),
        ({"reranker": lambda c: ["a", "b", "c"]}, "must return 3 scores"),
        ({"reranker": lambda c: [0.0, float("nan"), 1.0]}, "scores that are no numbers"),
    ],
)
def test_bad_input_is_answered(changes, words, laid_out):
    model, _ = laid_out()
    kwargs = {"input_ids": torch.tensor([[BOS, 60]]), **SAMPLED, "generation_mode": "image", "num_candidates": 3}
    with pytest.raises(ValueError, match=words):
        model.generate(**{**kwargs, "reranker": lowest_sum, **changes})


def test_scores_may_refuse_a_candidate_and_come_in_any_dress(laid_out):
    model, _ = laid_out()
    for scores in ([float("-inf"), 1.0, float("-inf")], (0, 1, 0), torch.tensor([0, 1, 0], dtype=torch.bfloat16)):
        output = model.generate(
            torch.tensor([[BOS, 60]]),
            **{**SAMPLED, "generation_mode": "image"},
            num_candidates=3,
            reranker=lambda candidates, scores=scores: scores,
            return_dict_in_generate=True,
        )
        assert output.picture_slots[0].chosen == 1
