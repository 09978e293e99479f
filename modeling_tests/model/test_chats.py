"""Chats with pictures: whatever way a picture comes, it stands in its place; tokens that a user typed are text."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from jam_hf.data.sequences import encode_documents


N = 16
RED, BLUE, GREEN = (Image.new("RGB", (16, 16), colour) for colour in ((200, 30, 30), (30, 30, 200), (30, 200, 30)))
OPTIONS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


def _text(text):
    return {"type": "text", "text": text}


def _image(**named):
    return {"type": "image", **named}


def _user(*parts, role="user"):
    return {"role": role, "content": list(parts) if not isinstance(parts[0], str) else parts[0]}


def _pixels(processor, *pictures):
    return processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]


def test_pictures_beside_a_chat_fill_the_places_that_name_none(processor):
    chat = [
        _user("see <image>", role="system"),
        _user(_image(), _text("or"), _image(image=GREEN, url=None, text=None), _text("or <image>")),
    ]
    expected = processor(
        text="<s><|system|>see <image><|user|><image>or<image>or <image>",
        images=[RED, BLUE, GREEN, RED],
        return_tensors="pt",
    )
    for given in ({"images": [RED, BLUE, RED]}, {"processor_kwargs": {"images": [RED, BLUE, RED]}}):
        inputs = processor.apply_chat_template(chat, **OPTIONS, **given)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        assert torch.equal(inputs["pixel_values"], _pixels(processor, RED, BLUE, GREEN, RED))
    batch = [[_user(_image(), _text("a"))], [_user("hi")], [_user(_image(image=GREEN), _image())]]
    for images in ([RED, BLUE], [[RED], [], [BLUE]], [[RED], None, BLUE]):
        inputs = processor.apply_chat_template(batch, **OPTIONS, images=images, processor_kwargs={"padding": True})
        assert torch.equal(inputs["pixel_values"], _pixels(processor, RED, GREEN, BLUE))
    single = processor.apply_chat_template([_user(_image())], **OPTIONS, images=RED)
    assert torch.equal(single["pixel_values"], _pixels(processor, RED))


@pytest.mark.parametrize(
    ("parts", "images", "words"),
    [
        (
            [_image(), _text("a")],
            None,
            "Message 0 has the place of a picture, but no picture: expected one under image, url",
        ),
        ([_image(image=None)], None, "Message 0 has the place of a picture"),
        ([{"type": "image_url", "image_url": None}], None, "Message 0 has the place of a picture"),
        ([_image(image=RED), _image()], None, "Message 0 has the place of a picture"),
        ([_image(), _image()], [RED], "Message 0 has the place of a picture"),
        ([_image()], [RED, BLUE], "images has 1 picture.* more"),
        ([_image(image=RED)], [BLUE], "images has 1 picture.* more"),
        ([_image(image=RED, url="a.png")], None, "Message 0 .* under 'image' and 'url'; expected one"),
        ([_image()], [[RED], [BLUE]], r"images has 2 list\(s\) of pictures for 1 chat"),
    ],
)
def test_parts_without_a_picture_and_pictures_without_a_part_are_refused(processor, parts, images, words):
    with pytest.raises(ValueError, match=words):
        processor.apply_chat_template([_user(*parts)], **OPTIONS, **({} if images is None else {"images": images}))


def test_a_chat_may_be_rendered_before_its_pictures_come(processor):
    text = processor.apply_chat_template([_user(_image(), _text("a"))], tokenize=False)
    assert text == "<s><|user|><image>a"
    assert processor(text=text, images=[RED], return_tensors="pt")["pixel_values"].shape[0] == 1


def test_the_messages_of_the_caller_stay_as_they_are(processor):
    chat = [_user(_image(image=RED), {"type": "image_url", "image_url": {"url": "absent.png"}})]
    before = [{**message, "content": list(message["content"])} for message in chat]
    with pytest.raises(ValueError, match="absent.png"):
        processor.apply_chat_template(chat, **OPTIONS)
    assert chat == before


def test_training_reads_pictures_that_messages_name(processor, tmp_path):
    path = tmp_path / "red.png"
    RED.save(path)
    seen = []

    def encode(images):
        seen.extend(images)
        return np.zeros((len(images), N), dtype=np.int64)

    rows = [
        {"messages": [_user(_image(path=str(path)), _image(), _text("a"))], "images": [BLUE]},
        {"messages": [_user(_image(image=GREEN), _text("a"))], "images": None},
    ]
    ids = encode_documents(rows, processor.tokenizer, encode)["input_ids"]
    assert all(torch.equal(_pixels(processor, a), _pixels(processor, b)) for a, b in zip(seen, (RED, BLUE, GREEN)))
    assert [row.count(processor.break_token_id) for row in ids] == [4, 2]
    for images, words in (
        ([BLUE, RED], "Document 0 has 2 placeholder.* 3 picture"),
        (None, "Document 0: Message 0 has the place"),
    ):
        with pytest.raises(ValueError, match=words):
            encode_documents([{**rows[0], "images": images}], processor.tokenizer, encode)
    # datasets gives every part all keys, None where there is nothing
    stored = Dataset.from_list([{"messages": [_user(_image(path=str(path)), _text("a"))]}])
    assert encode_documents(stored, processor.tokenizer, encode)["input_ids"][0].count(processor.break_token_id) == 2


def _plain(processor, text):
    return processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("role", ["user", "system"])
def test_a_typed_placeholder_is_text_and_the_picture_stands_in_its_place(processor, role):
    """Piece by piece: the template's own tokens as tokens, the user's as the tokenizer splits plain text."""
    chats = [
        [_user("be <image> kind <break>", role=role), _user(_image(image=RED), _text("what is <image>?"))],
        [_user("<image><s>", role=role)],
        [_user(_image(image=BLUE), _image(image=GREEN), role=role)],
    ]
    picture = [3, *[4] * N, 3]
    marks = {name: processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("user", "system")}
    begin = [1, marks[role]]
    expected = [
        [*begin, *_pieces(processor, "be ", "<image>", " kind ", "<break>"), marks["user"], *picture,
         *_pieces(processor, "what is ", "<image>", "?")],
        [*begin, *_pieces(processor, "<image>", "<s>")],
        [*begin, *picture, *picture],
    ]  # fmt: skip
    options = {**OPTIONS, "sanitize_control_tokens": True}
    for chat, ids in zip(chats, expected):
        assert processor.apply_chat_template(chat, **options)["input_ids"].tolist() == [ids]
    batch = processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True})
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
    assert rows == expected and batch["attention_mask"][1, 0] == 0
    assert torch.equal(batch["pixel_values"], _pixels(processor, RED, BLUE, GREEN))
    beside = processor.apply_chat_template(
        [[_user("be <image> kind <break>", role=role), _user(_image(), _text("what is <image>?"))], *chats[1:]],
        **options,
        images=[[RED], [], []],
        processor_kwargs={"padding": True},
    )
    assert torch.equal(beside["input_ids"], batch["input_ids"])


def _pieces(processor, *pieces):
    return [token for piece in pieces for token in _plain(processor, piece)]


def test_a_template_without_a_beginning_gets_the_tokenizers_own(processor):
    processor.chat_template = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    chat = [_user(_text("a <image>"))]
    inputs = processor.apply_chat_template(chat, **OPTIONS, sanitize_control_tokens=True)
    assert inputs["input_ids"].tolist() == [[1, *_pieces(processor, "a ", "<image>")]]
