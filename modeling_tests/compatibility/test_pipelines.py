"""transformers' pipelines on a JAM: text, text about pictures, and pictures. The oracle is `generate()` and its
decoding.
"""

import numpy as np
import pytest
import torch
from conftest import same_picture
from PIL import Image
from transformers import pipeline
from transformers.pipelines import any_to_any

from jam_hf import JamForCausalLM, JamProcessor


MODES = pytest.mark.parametrize(
    ("mode", "init"), [("uniform", "average"), ("width", "copy"), ("cross", "preserving"), ("cross", "paper")]
)
PROMPTS = ["a ruby is", "a small red circle in the"]


def torchvision_works() -> bool:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: a build that does not fit this torch
        return False
    return True


@pytest.fixture
def saved(jam, fused, tmp_path):
    """`saved(mode, init)` -> folder of a JAM whose cross blocks are alive, its model and its processor."""

    def make(mode: str, init: str) -> tuple[str, JamForCausalLM, JamProcessor]:
        folder = fused("llama", mode, init)
        processor = JamProcessor.from_pretrained(folder)
        jam("llama", mode, init).save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        return str(tmp_path), JamForCausalLM.from_pretrained(tmp_path).eval(), processor

    return make


@pytest.fixture
def pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


@pytest.fixture
def without_torchvision_check(monkeypatch):
    """Lifts the one check of AnyToAnyPipeline that asks for torchvision; all else of the pipeline is as it is."""
    monkeypatch.setattr(any_to_any, "requires_backends", lambda *args: None)


def chat(picture: Image.Image | None = None) -> list[dict]:
    parts = [{"type": "text", "text": "what is red?"}]
    return [
        {"role": "user", "content": [{"type": "image", "image": picture}, *parts] if picture is not None else parts}
    ]


def continuation(model: JamForCausalLM, processor: JamProcessor, inputs: dict, **kwargs) -> list[str]:
    """The text that `generate()` adds, greedily, decoded."""
    written = model.generate(**inputs, do_sample=False, **{"max_new_tokens": 12, **kwargs})
    new = written[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(new, skip_special_tokens=True)


@pytest.mark.feature("Pipelines", "text-generation")
@MODES
def test_text_generation(saved, mode, init):
    folder, model, processor = saved(mode, init)
    pipe = pipeline("text-generation", model=folder, device="cpu", generation_mode="text")
    assert type(pipe.model) is JamForCausalLM
    settings = {"max_new_tokens": 12, "do_sample": False}
    for prompt in PROMPTS:
        inputs = processor(text=prompt, return_tensors="pt")
        (expected,) = continuation(model, processor, inputs, generation_mode="text")
        assert pipe(prompt, **settings)[0]["generated_text"] == prompt + expected
        assert pipe(prompt, return_full_text=False, **settings)[0]["generated_text"] == expected

    inputs = processor(text=PROMPTS, padding=True, return_tensors="pt")
    expected = continuation(model, processor, inputs, generation_mode="text")
    batched = pipe(PROMPTS, batch_size=2, return_full_text=False, **settings)
    assert [row[0]["generated_text"] for row in batched] == expected

    message = [{"role": "user", "content": "what is red?"}]
    template = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    (expected,) = continuation(model, processor, processor(text=template, return_tensors="pt"), generation_mode="text")
    reply = pipe(message, **settings)[0]["generated_text"]
    assert reply == [*message, {"role": "assistant", "content": expected}] and expected


@pytest.mark.feature("Pipelines", "image-text-to-text")
@MODES
def test_image_text_to_text(saved, pictures, mode, init):
    folder, model, processor = saved(mode, init)
    pipe = pipeline("image-text-to-text", model=folder, device="cpu")
    assert type(pipe.model) is JamForCausalLM and type(pipe.processor) is JamProcessor
    pipe.model.generation_config.generation_mode = "text"
    prompt = "in <image> there is"
    found = []
    for picture in pictures:
        inputs = processor(text=prompt, images=[picture], return_tensors="pt")
        (expected,) = continuation(model, processor, inputs, generation_mode="text")
        found.append(
            pipe(text=prompt, images=[picture], max_new_tokens=12, return_full_text=False)[0]["generated_text"]
        )
        assert found[-1] == expected and expected
    assert found[0] != found[1]  # the picture is read


def check_any_to_any_text(
    folder: str, model: JamForCausalLM, processor: JamProcessor, pictures: list[Image.Image]
) -> None:
    pipe = pipeline("any-to-any", model=folder, device="cpu")
    assert type(pipe.model) is JamForCausalLM and type(pipe.processor) is JamProcessor
    pipe.model.generation_config.generation_mode = "text"
    settings = {"max_new_tokens": 12, "return_full_text": False}
    prompt = "in <image> there is"
    inputs = processor(text=prompt, images=pictures[:1], return_tensors="pt")
    (expected,) = continuation(model, processor, inputs, generation_mode="text")
    for asked in ({}, {"generation_mode": "text"}):
        out = pipe(text=prompt, images=pictures[:1], **settings, **asked)
        assert out == [{"input_text": prompt, "generated_text": expected}]

    for asked, shown in ((chat(pictures[1]), pictures[1:]), (chat(), None)):
        template = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=template, images=shown, return_tensors="pt")
        (expected,) = continuation(model, processor, inputs, generation_mode="text")
        assert pipe(text=asked, **settings)[0]["generated_text"] == expected

    inputs = processor(text=PROMPTS, padding=True, return_tensors="pt")
    expected = continuation(model, processor, inputs, generation_mode="text")
    assert [row["generated_text"] for row in pipe(text=PROMPTS, **settings)] == expected


def check_any_to_any_pictures(
    folder: str, model: JamForCausalLM, processor: JamProcessor, pictures: list[Image.Image]
) -> None:
    pipe = pipeline("any-to-any", model=folder, device="cpu")
    for prompt, images in (("a ruby", None), ("<image>", pictures[:1])):  # the prompt's picture is not the drawn one
        inputs = processor(text=prompt, images=images, return_tensors="pt")
        written = model.generate(**inputs, do_sample=False, generation_mode="image")
        (segments,) = processor.post_process_interleaved(
            written, model=model, prompt_length=inputs["input_ids"].shape[1]
        )
        (record,) = pipe(text=prompt, images=images, generation_mode="image")
        assert record["input_text"] == prompt and isinstance(record["generated_image"], Image.Image)
        assert same_picture(record["generated_image"], segments[0]["image"])

    inputs = processor(text=PROMPTS, padding=True, return_tensors="pt")
    written = model.generate(**inputs, do_sample=False, generation_mode="image")
    rows = processor.post_process_interleaved(written, model=model, prompt_length=inputs["input_ids"].shape[1])
    for record, (segment, *_) in zip(pipe(text=PROMPTS, generation_mode="image"), rows, strict=True):
        assert same_picture(record["generated_image"], segment["image"])


@pytest.mark.feature("Pipelines", "any-to-any, text (its check for torchvision lifted)")
@MODES
def test_any_to_any_writes_text(saved, pictures, without_torchvision_check, mode, init):
    check_any_to_any_text(*saved(mode, init), pictures)


@pytest.mark.feature("Pipelines", "any-to-any, pictures (its check for torchvision lifted)")
@MODES
def test_any_to_any_draws(saved, pictures, without_torchvision_check, mode, init):
    check_any_to_any_pictures(*saved(mode, init), pictures)


@pytest.mark.feature("Pipelines", "any-to-any, with torchvision")
@pytest.mark.skipif(not torchvision_works(), reason="torchvision is not there, or not built for this torch")
@MODES
def test_any_to_any_with_torchvision(saved, pictures, mode, init):
    made = saved(mode, init)
    check_any_to_any_text(*made, pictures)
    check_any_to_any_pictures(*made, pictures)


@pytest.mark.skipif(torchvision_works(), reason="torchvision is there")
def test_any_to_any_without_torchvision_says_what_is_missing(fused):
    with pytest.raises(ImportError, match="(?s)AnyToAnyPipeline.*[Tt]orchvision"):
        pipeline("any-to-any", model=str(fused("llama", "cross", "preserving")), device="cpu")


def test_any_to_any_without_room_for_a_picture_says_how_much_it_needs(fused, without_torchvision_check):
    pipe = pipeline("any-to-any", model=str(fused("llama", "cross", "preserving")), device="cpu")
    with pytest.raises(ValueError, match="max_new_tokens=18; got room for 3"):
        pipe(text="a ruby", generation_mode="image", max_new_tokens=3)


def test_a_pipeline_can_write_a_document(saved):
    folder, model, processor = saved("cross", "preserving")
    pipe = pipeline("text-generation", model=folder, device="cpu")
    prompt = "a ruby<break>"
    inputs = processor(text=prompt, return_tensors="pt")
    settings = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(**inputs, **settings, generation_mode="interleaved")
    (record,) = pipe(prompt, return_tensors=True, **settings)  # the mode that `fuse` writes into the generation config
    assert record["generated_token_ids"] == expected[0].tolist()
    (segments,) = processor.post_process_interleaved(torch.tensor([record["generated_token_ids"]]), model=pipe.model)
    assert any(segment["type"] == "image" and segment["image"] is not None for segment in segments)


def test_decoding_whole_sequences_asks_for_a_whole_picture(saved):
    _, model, processor = saved("uniform", "average")
    config = model.config
    first, size = config.image_token_offset, config.image_seq_length
    code = torch.arange(first, first + size)
    mark, text = torch.tensor([config.break_token_id]), torch.tensor([20, 21])
    older, newer = torch.cat((mark, code, mark)), torch.cat((mark, code.flip(0), mark))
    row = torch.cat((text, older, text, newer, text))[None]
    assert torch.equal(model.decode_image_tokens(row), model.decode_image_tokens(code.flip(0)[None]))
    unfinished = torch.cat((text, older, text, mark, code[:-1]))[None]
    assert torch.equal(model.decode_image_tokens(unfinished), model.decode_image_tokens(code[None]))
    with pytest.raises(ValueError, match="Row 1 .* no complete picture"):
        model.decode_image_tokens(torch.cat((row, torch.full_like(row, 20))))
    with pytest.raises(ValueError, match="image_tokens must be the ids of image codes"):
        model.decode_image_tokens(text[None])
    with pytest.raises(ValueError, match="needs pixels"):
        processor.post_process_multimodal_output(row, generation_mode="image")
    with pytest.raises(ValueError, match="post_process_interleaved"):
        processor.post_process_multimodal_output(row, generation_mode="interleaved")
