"""A JAM stops where its text parent stops, and samples text as it does: the oracle is the parent's own `generate`."""

import json

import pytest
import torch
from datasets import Dataset
from fusion_zoo import image_parent, save, text_parent, vq_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from jam_hf import JamForCausalLM, JamProcessor, fuse, stream
from jam_hf.data.collator import JamDataCollator
from jam_hf.data.sequences import encode_documents
from jam_hf.fusion.fuse import plan_fusion
from jam_hf.training.recipes import RecipeSettings, train_causal_lm
from jam_hf.training.saving import check_savable


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Qwen2 parent with `<|endoftext|>` 0 (which pads as well), `<|im_start|>` 300 and `<|im_end|>` 301; an image
    parent.
    """
    root = tmp_path_factory.mktemp("parents")
    save(*text_parent("qwen2"), root / "text")
    save(*image_parent("plain"), root / "image")
    vq_model().save_pretrained(root / "vq")
    return root


def with_generation(folders, tmp_path, said=None, config=None, tokenizer=None):
    """A copy of the text parent with other small files; `said` None: no generation_config.json."""
    folder = tmp_path / "text"
    folder.mkdir()
    for path in (folders / "text").iterdir():
        if path.name != "generation_config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    if said is not None:
        (folder / "generation_config.json").write_text(json.dumps(said))
    for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        values = json.loads((folder / name).read_text()) | (changes or {})
        (folder / name).write_text(
            json.dumps({k: v for k, v in values.items() if v is not None or name == "config.json"})
        )
    return folder


def fused(folders, text, tmp_path):
    out = tmp_path / "jam"
    fuse(text, folders / "image", "cross", out, vq_model=folders / "vq")
    return out


def eos_in(folder):
    return [
        json.loads((folder / name).read_text()).get("eos_token_id")
        for name in ("config.json", "generation_config.json")
    ]


@pytest.mark.parametrize(
    ("said", "config", "tokenizer", "expected"),
    [
        ({"eos_token_id": [301, 0], "pad_token_id": 0}, {}, {}, [301, 0]),
        ({"eos_token_id": [0, 301]}, {"eos_token_id": 7}, {}, [0, 301]),
        ({"eos_token_id": [301]}, {}, {}, 301),
        ({"temperature": 1.0}, {"eos_token_id": [5, 301]}, {}, [5, 301]),  # the file says nothing of ends
        (None, {"eos_token_id": [301, 5]}, {}, [301, 5]),
        (None, {"eos_token_id": 5}, {}, 5),
        (None, {"eos_token_id": None}, {}, 0),  # the tokenizer's
        ({"eos_token_id": [301, 9999, 301, -1]}, {}, {}, 301),  # the parent never writes the others
        ({"eos_token_id": [301, 305]}, {}, {}, [301, 305]),  # a row that the tokenizer has no token for
        (None, {"eos_token_id": 319}, {}, 319),  # the last row of the padding
    ],
    ids=str,
)
def test_ends_are_the_parents(folders, tmp_path, said, config, tokenizer, expected):
    text = with_generation(folders, tmp_path, said, config, tokenizer)
    out = fused(folders, text, tmp_path)
    assert eos_in(out) == [expected, expected]
    model = JamForCausalLM.from_pretrained(out)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == expected


def test_no_new_token_takes_the_row_of_an_end(folders, tmp_path):
    """The parent stops at 305, which its tokenizer does not know: the JAM's `<break>` and the others lie behind it."""
    text = with_generation(folders, tmp_path, {"eos_token_id": [301, 305]})
    plan = plan_fusion(text, folders / "image", "cross", vq_model=folders / "vq")
    tokenizer, ids = plan.vocabulary.tokenizer, plan.vocabulary.ids
    assert tokenizer.convert_ids_to_tokens([302, 305, 306]) == ["<unused:302>", "<unused:305>", "<break>"]
    assert min(ids["break_token_id"], ids["image_token_id"], ids["mask_token_id"], ids["image_token_offset"]) > 305
    assert plan.vocabulary.added[0] == "<break>"
    assert any("[305], for which its tokenizer has no token" in warning for warning in plan.warnings)
    assert not any("generation config" in warning for warning in plan.warnings)


def test_a_parent_without_a_generation_config_is_not_warned_of(folders, tmp_path):
    text = with_generation(folders, tmp_path)
    plan = plan_fusion(text, folders / "image", "cross", vq_model=folders / "vq")
    assert not any("generation config" in warning for warning in plan.warnings)


def test_what_is_no_end_is_said(folders, tmp_path):
    text = with_generation(folders, tmp_path, {"eos_token_id": [301, 9999]})
    plan = plan_fusion(text, folders / "image", "cross", vq_model=folders / "vq")
    assert any("[9999] are no tokens of its vocabulary" in warning for warning in plan.warnings)
    text = with_generation(folders, tmp_path / "text", {"eos_token_id": 301})
    plan = plan_fusion(text, folders / "image", "cross", vq_model=folders / "vq")
    assert any(
        "(id 0) is none of the ids at which the text parent stops, [301]" in warning for warning in plan.warnings
    )


@pytest.mark.parametrize("end", [2, [2, 5], None])
def test_a_tokenizer_without_an_end(folders, end):
    model, tokenizer = text_parent("llama")
    tokenizer.eos_token = None
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    plan = plan_fusion(model, folders / "image", "cross", vq_model=folders / "vq", tokenizer=tokenizer)
    assert plan.config.eos_token_id == end
    assert (end is None) == any("says where a document ends" in warning for warning in plan.warnings)
    if end is None:
        with pytest.raises(ValueError, match="says what ends a document"):
            plan.config.document_end(tokenizer.eos_token_id)
    else:
        assert plan.config.document_end(tokenizer.eos_token_id) == 2
        texts = Dataset.from_dict({"text": ["a ruby"]})
        assert encode_documents(texts, plan.vocabulary.tokenizer, config=plan.config)[0]["input_ids"][-1] == 2


def ending(model, at, value):
    """The model writes `value` as its id `at` steps after the prompt: its text head says so, wherever it is asked."""

    def hook(module, args, kwargs, output):
        ids = kwargs.get("input_ids")
        output.logits[:, -1, :] = output.logits[:, -1, :].clone()
        last = ids[:, -1] if ids is not None else None
        for row in range(len(last)):
            if int(last[row]) == at:
                output.logits[row, -1] = -1.0
                output.logits[row, -1, value] = 30.0
        return output

    return model.register_forward_hook(hook, with_kwargs=True)


CALLS = {
    "plain": {"generation_mode": None},
    "text": {"generation_mode": "text"},
    "interleaved": {"generation_mode": "interleaved", "max_new_images": 0},
    "guided": {"generation_mode": "interleaved", "max_new_images": 0, "guidance_scale": 2.0},
    "beams": {"generation_mode": "text", "num_beams": 2},
}


@pytest.fixture(scope="module")
def pair(folders, tmp_path_factory):
    """Parent and JAM; both ids of `[301, 0]` end a row, and 0 pads."""
    root = tmp_path_factory.mktemp("pair")
    text = with_generation(folders, root, {"eos_token_id": [301, 0], "pad_token_id": 0})
    out = fused(folders, text, root)
    return (
        AutoModelForCausalLM.from_pretrained(text),
        JamForCausalLM.from_pretrained(out),
        JamProcessor.from_pretrained(out),
        AutoTokenizer.from_pretrained(text),
    )


@pytest.mark.parametrize("end", [301, 0])
@pytest.mark.parametrize("call", CALLS)
def test_text_stops_where_the_parent_stops(pair, call, end):
    parent, jam, _, tokenizer = pair
    ids = tokenizer("a ruby is", return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    settings["num_beams"] = CALLS[call].get("num_beams", 1)
    free = parent.generate(ids, **settings, eos_token_id=None)[0, ids.shape[1] :].tolist()
    place = free[2]
    handles = [ending(parent, place, end), ending(jam, place, end)]
    try:
        expected = parent.generate(ids, **settings)[0].tolist()
        found = jam.generate(input_ids=ids, **{**settings, **CALLS[call]})[0].tolist()
    finally:
        for handle in handles:
            handle.remove()
    assert expected[-1] == end and len(expected) < ids.shape[1] + 12
    assert found == expected


@pytest.mark.parametrize("end", [301, 0])
def test_streaming_and_continuous_batching_stop_there_too(pair, end):
    parent, jam, processor, tokenizer = pair
    ids = tokenizer("a ruby is", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    free = parent.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    place = free[0, ids.shape[1] + 2].item()
    handles = [ending(parent, place, end), ending(jam, place, end)]
    try:
        expected = parent.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[0]
        events = list(
            stream(
                jam,
                processor,
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=12,
                do_sample=False,
                generation_mode="text",
            )
        )
        asked = [None, GenerationConfig(max_new_tokens=12, do_sample=False, generation_mode="text")]
        batched = [
            next(iter(jam.generate_batch([ids[0].tolist()], config, max_new_tokens=12, progress_bar=False).values()))
            for config in asked
        ]
    finally:
        for handle in handles:
            handle.remove()
    text = tokenizer.decode(expected[ids.shape[1] :], skip_special_tokens=True)
    assert "".join(event["text"] for event in events) == text
    assert [request.generated_tokens for request in batched] == [expected[ids.shape[1] :].tolist()] * 2


SAMPLED = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "repetition_penalty": 1.1,
    "eos_token_id": 301,
}


def generation_of(folder):
    return json.loads((folder / "generation_config.json").read_text())


def test_sampling_defaults_are_the_parents_for_text_alone(folders, tmp_path):
    text = with_generation(folders, tmp_path, {**SAMPLED, "max_length": 99})
    jam = fused(folders, text, tmp_path)
    found = generation_of(jam)
    assert {name: found[name] for name in SAMPLED} == SAMPLED and "max_length" not in found
    assert (found["image_temperature"], found["image_top_k"], found["image_top_p"]) == (
        1.0,
        50,
        1.0,
    )  # transformers' own
    plan = plan_fusion(text, folders / "image", "cross", vq_model=folders / "vq")
    assert any("not carried over: max_length=99" in warning for warning in plan.warnings)
    model, parent = JamForCausalLM.from_pretrained(jam), AutoModelForCausalLM.from_pretrained(text)
    ids = AutoTokenizer.from_pretrained(text)("a ruby is", return_tensors="pt")["input_ids"]
    # What the parent draws from, after penalty and warpers; codes and the JAM's own tokens have no part in it.
    settings = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    known = len(AutoTokenizer.from_pretrained(text))
    forbidden = [[i] for i in range(known, parent.config.vocab_size)]
    expected = parent.generate(ids, **settings, bad_words_ids=forbidden).scores[0]
    assert torch.isfinite(expected).sum() < 21
    forbidden = [[i] for i in range(known, model.config.image_token_offset)]
    drawn = model.generate(input_ids=ids, **settings, generation_mode="text", bad_words_ids=forbidden).scores[0]
    torch.testing.assert_close(drawn[:, :known], expected[:, :known])
    assert not torch.isfinite(drawn[:, known:]).any()


@pytest.mark.parametrize(
    "said",
    [
        {
            "temperature": 0.6,
            "top_p": 0.9,
        },  # as some parents ship it: transformers loads it, and refuses to save it changed
        {"do_sample": False, "temperature": 0.0, "top_k": 5, "num_return_sequences": 1},
        {"do_sample": True, "temperature": 0.6, "early_stopping": True, "length_penalty": 2.0},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_saved_fuses_and_is_saved(folders, tmp_path, said):
    text = with_generation(folders, tmp_path, {**said, "eos_token_id": [301, 0]})
    jam = fused(folders, text, tmp_path)
    model = JamForCausalLM.from_pretrained(jam)
    model.generation_config.max_new_tokens = 7  # changed: transformers is strict from here on
    check_savable(model, JamProcessor.from_pretrained(jam))
    model.save_pretrained(tmp_path / "again")
    again = GenerationConfig.from_pretrained(tmp_path / "again")
    assert again.eos_token_id == [301, 0] and again.generation_mode == "interleaved"
    assert bool(again.do_sample) == bool(said.get("do_sample"))
    assert again.temperature == (0.6 if said.get("do_sample") else None)


def test_training_asks_first_whether_the_model_can_be_saved(folders, tmp_path):
    model, tokenizer = text_parent("llama")
    model.generation_config.temperature = 0.5
    data = Dataset.from_dict({"input_ids": [[1, 5, 6, 2]] * 4})
    settings = RecipeSettings(max_steps=1, batch_size=2, warmup_steps=0)
    collator = JamDataCollator(pad_token_id=0, vocab_size=320)
    with pytest.raises(
        ValueError, match="(?s)could not be saved: its generation config .* before training.*temperature"
    ):
        train_causal_lm(model, data, tmp_path / "out", settings, collator, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())
    # A parent's folder as it was shipped is no obstacle: what was not changed may be written back.
    shipped = AutoModelForCausalLM.from_pretrained(with_generation(folders, tmp_path, {"temperature": 0.6}))
    train_causal_lm(shipped, data, tmp_path / "out", settings, collator, tokenizer=tokenizer)
    assert generation_of(tmp_path / "out")["temperature"] == 0.6
