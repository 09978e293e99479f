"""Documents in and out, and bad input: every message says what was expected and what came."""

import numpy as np
import pytest
import torch
from conftest import NUM_CODES, same_picture
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from jam_hf import JamForCausalLM, JamImageProcessor, JamProcessor


N = 16


def _picture(mode="RGB", size=(16, 16), colour=None):
    return Image.new(mode, size, colour if colour is not None else {"RGB": (200, 30, 30), "L": 90}.get(mode, 0))


@pytest.fixture
def model(jam):
    return jam("llama", "cross", "preserving")


def test_a_placeholder_becomes_break_codes_break(processor, model):
    inputs = processor(text="red<image>blue", images=[_picture()], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    place = ids.index(processor.break_token_id)
    assert ids[0] == 1
    assert ids[place + 1 : place + 1 + N] == [processor.image_token_id] * N
    assert ids[place + 1 + N] == processor.break_token_id
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    filled = model.model.insert_image_tokens(inputs["input_ids"], inputs["pixel_values"])
    assert torch.equal(filled[0, place + 1 : place + 1 + N], model.get_image_tokens(inputs["pixel_values"])[0])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16", "1", "CMYK"])
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (33, 7)])
def test_any_mode_and_size(processor, mode, size):
    pixels = processor(text="<image>", images=[_picture(mode, size, 0)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    assert torch.isfinite(pixels).all() and pixels.min() >= -1.001 and pixels.max() <= 1.001


def test_a_very_large_picture(processor):
    image = _picture("RGB", (8000, 2000))
    pixels = processor(text="<image>", images=[image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    expected = torch.tensor([200, 30, 30]).view(3, 1, 1) / 127.5 - 1
    torch.testing.assert_close(pixels[0], expected.expand(3, 16, 16), atol=1e-2, rtol=0)


def test_a_file_gives_what_the_opened_picture_gives(processor, tmp_path):
    """Transparency and 16 bits of grey too; a photograph lies as its EXIF tag says."""
    rng, images = np.random.default_rng(0), processor.image_processor
    for channels, mode in ((4, "RGBA"), (2, "LA"), (1, "I;16")):
        pixels = rng.integers(0, 256, (20, 30, channels), dtype=np.uint8)
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257 if channels == 1 else pixels)
        assert picture.mode == mode
        picture.save(tmp_path / "picture.png")
        read = images(images=images.fetch_images(tmp_path / "picture.png"), return_tensors="pt")["pixel_values"]
        assert torch.equal(read, images(images=picture, return_tensors="pt")["pixel_values"])
    upright = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    lying, tag = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    tag[0x0112] = 6  # to be turned clockwise before it is shown
    lying.save(tmp_path / "photograph.png", exif=tag)
    assert np.array_equal(np.asarray(images.fetch_images(str(tmp_path / "photograph.png"))), np.asarray(upright))


def test_transparent_is_laid_on_white_and_grey_is_repeated(processor):
    clear = processor.image_processor(_picture("RGBA", colour=(0, 0, 0, 0)), return_tensors="pt")["pixel_values"]
    assert clear.min() > 0.99
    grey = processor.image_processor(_picture("L", colour=90), return_tensors="pt")["pixel_values"]
    assert torch.equal(grey[0, 0], grey[0, 1]) and torch.equal(grey[0, 1], grey[0, 2])
    array = processor.image_processor(np.zeros((16, 16, 4), np.uint8), return_tensors="pt")["pixel_values"]
    assert array.shape == (1, 3, 16, 16) and array.min() > 0.99


@pytest.mark.parametrize(
    ("text", "images", "words"),
    [
        ("a <image>", None, ["1 <image>", "no images"]),
        ("a <image>", [], ["1 <image>", "0 images"]),
        ("a", "one", ["0 <image>", "1 images"]),
        ("<image><image><image>", "one", ["3 <image>", "1 images"]),
        (None, "one", ["prompt", "<image>"]),
    ],
)
def test_placeholders_and_pictures_must_match(processor, text, images, words):
    images = [_picture()] if images == "one" else images
    with pytest.raises(ValueError) as error:
        processor(text=text, images=images, return_tensors="pt")
    for word in words:
        assert word in str(error.value)


def test_nested_pictures_are_checked_prompt_by_prompt(processor):
    texts, picture = ["<image>", "none", "<image><image>"], _picture()
    inputs = processor(text=texts, images=[[picture], [], [picture, picture]], padding=True, return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 3
    assert inputs["attention_mask"][1, 0] == 0  # padded on the left
    with pytest.raises(ValueError, match="prompt 0 has 1 placeholder.*2"):
        processor(text=texts, images=[[picture, picture], [], [picture]], padding=True)
    with pytest.raises(ValueError, match="3 prompt.*2 list"):
        processor(text=texts, images=[[picture], [picture]], padding=True)


def test_a_corrupt_file_is_named(processor, tmp_path):
    broken, cut = tmp_path / "broken.png", tmp_path / "cut.png"
    broken.write_bytes(b"not a picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:3000])
    for path in (broken, cut, tmp_path / "absent.png"):
        with pytest.raises(ValueError) as error:
            processor(text="<image>", images=[str(path)], return_tensors="pt")
        assert path.name in str(error.value)
    with pytest.raises(ValueError, match=r"cut\.png"):
        processor(text="<image>", images=[Image.open(cut)], return_tensors="pt")
    with pytest.raises(ValueError, match="empty|channel"):
        processor(text="<image>", images=[np.zeros((0, 5, 3), np.uint8)], return_tensors="pt")


def test_chat_template_with_pictures(processor, model):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": _picture()}, {"type": "text", "text": "what?"}]},
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    text = processor.decode(inputs["input_ids"][0])
    assert text.startswith("<s><|user|><break><image>") and text.endswith("what?<|assistant|>")
    output = model.generate(**inputs, generation_mode="interleaved", max_new_tokens=3)
    assert output.shape[1] <= inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("content", ["hi", [{"type": "image", "image": _picture()}, {"type": "text", "text": "hi"}]])
def test_a_rendered_chat_has_one_beginning_however_it_is_tokenized(content, processor):
    messages = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True}
    expected = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)
    rendered = processor.apply_chat_template(messages, tokenize=False, **options)
    images = None if content == "hi" else [_picture()]
    for text in (rendered, rendered.removeprefix("<s>"), [rendered]):
        ids = processor(text=text, images=images, return_tensors="pt")["input_ids"]
        assert torch.equal(ids, expected["input_ids"]) and (ids == processor.tokenizer.bos_token_id).sum() == 1
    ids = processor(text=rendered, images=images, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, expected["input_ids"])


def test_post_process_gives_ordered_segments_row_by_row(processor, model):
    first = model.config.image_token_offset
    codes = [first + i % NUM_CODES for i in range(N)]
    red, blue = (processor.tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("red", " blue"))
    rows = [
        [1, *red, 3, *codes, 3, *blue, 2],
        [1, 3, *codes, 3, 3, *codes[::-1], 3, *blue],
        [1, *red, 3, *codes[:5]],
        [1, *red, 2],
    ]
    length = max(map(len, rows))
    rows = [[0] * (length - len(r)) + r for r in rows]
    segments = processor.post_process_interleaved(torch.tensor(rows), model)
    kinds = [[s["type"] for s in row] for row in segments]
    assert kinds == [["text", "image", "text"], ["image", "image", "text"], ["text", "image"], ["text"]]
    assert segments[0][0]["text"] == "red" and segments[0][2]["text"] == " blue"
    expected = processor.image_processor.postprocess(model.decode_image_tokens(torch.tensor([codes])))[0]
    assert same_picture(segments[0][1]["image"], expected)
    assert not same_picture(segments[1][1]["image"], expected)
    assert segments[2][1]["image"] is None and segments[2][1]["image_tokens"] == codes[:5]
    tail = processor.post_process_interleaved(torch.tensor(rows), model, prompt_length=length - 1)
    assert [len(row) for row in tail] == [0, 1, 1, 0]


def test_pictures_survive_the_way_in_and_out(processor, model):
    """A picture of the prompt comes back decoded, in its place."""
    inputs = processor(text="red<image>", images=[_picture()], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=2, generation_mode="text")
    segments = processor.post_process_interleaved(output, model)[0]
    expected = model.decode_image_tokens(model.get_image_tokens(inputs["pixel_values"]))
    image = next(s["image"] for s in segments if s["type"] == "image")
    assert same_picture(image, processor.image_processor.postprocess(expected)[0])


def test_auto_classes_resolve(fused, monkeypatch):
    folder = fused("llama", "cross", "preserving")
    monkeypatch.chdir(folder.parent)
    assert type(AutoProcessor.from_pretrained(folder.name)) is JamProcessor
    assert type(AutoImageProcessor.from_pretrained(folder.name)) is JamImageProcessor
    tokenizer = AutoTokenizer.from_pretrained(folder.name)
    assert tokenizer.convert_tokens_to_ids("<img:0>") == len(tokenizer) - NUM_CODES
    from transformers import AutoModel, AutoModelForCausalLM

    assert type(AutoModel.from_pretrained(folder.name)).__name__ == "JamModel"
    assert type(AutoModelForCausalLM.from_pretrained(folder.name)) is JamForCausalLM


def test_labels_of_placeholders_become_the_codes(processor, model):
    """Image tokens are trained on: the loss with pixels equals the loss with the codes written out."""
    inputs = processor(text="red<image>", images=[_picture()], return_tensors="pt")
    with torch.no_grad():
        ids = model.model.insert_image_tokens(inputs["input_ids"], inputs["pixel_values"])
        expected = model(input_ids=ids, labels=ids).loss
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert loss.item() == pytest.approx(expected.item())


def test_pixels_and_placeholders_must_match_in_the_model(processor, model):
    inputs = processor(text="red<image>", images=[_picture()], return_tensors="pt")
    with pytest.raises(ValueError, match="16 placeholders <image> for 2 picture"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))


@pytest.mark.parametrize("kind", ["path", "url", "image", "pathlib"])
def test_chat_messages_may_name_files(kind, processor, tmp_path):
    path = tmp_path / "red.png"
    _picture().save(path)
    part = {"image": path} if kind == "pathlib" else {kind: str(path)}
    messages = [{"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "hi"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, **options)
    messages[0]["content"][0] = {"type": "image", "image": _picture()}
    assert torch.equal(inputs["pixel_values"], processor.apply_chat_template(messages, **options)["pixel_values"])
    path.write_bytes(path.read_bytes()[:20])
    messages[0]["content"][0] = {"type": "image", **part}
    with pytest.raises(ValueError, match="Cannot read a picture from .*red.png"):
        processor.apply_chat_template(messages, **options)


def test_prompts_without_pictures_in_a_batch(processor):
    one = processor(text=["a", "<image>"], images=[None, [_picture()]], padding=True, return_tensors="pt")
    assert one["pixel_values"].shape[0] == 1
    for images in (None, [], [[], []], [None, None], ((), ())):
        assert "pixel_values" not in processor(text=["a", "b"], images=images, padding=True)


def test_messages_without_content_are_refused(processor):
    for message in ({"role": "user"}, {"role": "user", "content": None}):
        with pytest.raises(Exception, match="no content"):
            processor.apply_chat_template([message], tokenize=False)


@pytest.mark.parametrize("text", [[], 5, ["a", 5], [["a"]]])
def test_text_must_be_text(processor, text):
    with pytest.raises(ValueError, match="string or a non-empty list of strings"):
        processor(text=text)


def test_grey_arrays_and_sixteen_bits(processor):
    def pixels(image):
        return processor.image_processor(image, return_tensors="pt")["pixel_values"]

    expected = pixels(_picture("L", colour=128))
    grey = np.full((16, 16), 128, np.uint8)
    for image in (grey, torch.from_numpy(grey), Image.fromarray(grey.astype(np.uint16) * 257)):
        assert torch.equal(pixels(image), expected)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("F", (9, 9), 0.5), "mode 'F'"),
        (np.full((9, 9, 3), 0.5, np.float32), "do_rescale=False"),
        (b"bytes", "picture from bytes: it is no picture"),
        (5, "got int"),
        ("absent.png", "there is no such file"),
    ],
)
def test_pictures_that_do_not_say_what_white_is_and_what_is_no_picture(processor, image, words):
    with pytest.raises(ValueError, match=words):
        processor.image_processor(image, return_tensors="pt")


def test_ids_of_one_row_are_refused(processor, model):
    with pytest.raises(ValueError, match=r"\[B, T\], got the shape \[5\]"):
        processor.post_process_interleaved(torch.ones(5, dtype=torch.int64), model)


def test_training_on_placeholders_is_refused(processor, model):
    ids = processor(text="red<image>", images=[_picture()], return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match="no pixel_values came with them"):
        model(input_ids=ids, labels=ids)


def test_tokens_of_pictures_are_checked(model):
    with pytest.raises(ValueError, match=r"ids of image codes, 300..315, got 5..5"):
        model.decode_image_tokens(torch.full((1, N), 5))
    with pytest.raises(ValueError, match="got torch.float32"):
        model.decode_image_tokens(torch.zeros(1, N))
    assert model.decode_image_tokens([[300] * N]).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_casting_leaves_the_image_tokenizer_as_it_is(cast, jam):
    model = jam("llama", "cross", "preserving")
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = model.get_image_tokens(pixels)
    cast(model)
    assert model.lm_head.weight.dtype in (torch.bfloat16, torch.float16)
    assert {p.dtype for p in model.model.vq_model.parameters()} == {torch.float32}
    assert torch.equal(model.get_image_tokens(pixels), expected)
