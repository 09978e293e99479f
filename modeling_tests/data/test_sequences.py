"""Documents to ids: pairs, chats, texts; mismatches are named and nothing is cut in silence."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from jam_hf.data.sequences import NO_PICTURES, encode_documents, mix_datasets
from jam_hf.model.picture_layout_jam import PictureLayout


def _encode(images):
    return np.stack([np.arange(4) + image.getpixel((0, 0))[0] % 8 for image in images])


def _image(value):
    return Image.new("RGB", (2, 2), (value, 0, 0))


def test_pairs_chats_and_texts(tokenizer):
    offset = tokenizer.convert_tokens_to_ids("<img:0>")
    rows = Dataset.from_list([{"caption": "red", "image": _image(1)}, {"caption": "a", "image": _image(2)}])
    ids = encode_documents(rows, tokenizer, _encode)["input_ids"]
    red = tokenizer("red", add_special_tokens=False)["input_ids"]
    assert ids[0] == [1, *red, 3, *(offset + 1 + i for i in range(4)), 3, 2]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "red"}]},
        {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "red"}, {"type": "image"}]},
    ]
    chats = Dataset.from_list([{"messages": json.dumps(messages), "images": [_image(1), _image(3)]}])
    (ids,) = encode_documents(chats, tokenizer, _encode)["input_ids"]
    roles = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    pictures = [[3, *(offset + start + i for i in range(4)), 3] for start in (1, 3)]
    assert ids == [1, roles[0], *red, roles[1], *pictures[0], *red, *pictures[1], 2]
    (ids,) = encode_documents(Dataset.from_list([{"text": "red"}]), tokenizer)["input_ids"]
    assert ids == [1, *red, 2]


def test_marks_of_another_model(tokenizer):
    """Codes in no order, an opening and a closing token; a text that holds one of them, or a code, is refused."""
    codes = tokenizer.convert_tokens_to_ids("<img:0>") + np.random.default_rng(0).permutation(16)
    begin, end, image = tokenizer.convert_tokens_to_ids(["<|user|>", "<|system|>", "<break>"])
    layout = PictureLayout(begin, end, codes.tolist(), placeholder=image)
    rows = Dataset.from_list([{"caption": "red", "image": _image(1)}])
    red = tokenizer("red", add_special_tokens=False)["input_ids"]
    (ids,) = encode_documents(rows, tokenizer, _encode, layout=layout)["input_ids"]
    assert ids == [1, *red, begin, *codes[1:5], end, 2]
    for text in ("<|user|>", "<img:3>"):
        with pytest.raises(ValueError, match="Take them out"):
            encode_documents(Dataset.from_list([{"text": text}]), tokenizer, layout=layout)
    with pytest.raises(ValueError, match=r"raw codes, 0\.\.3, got"):
        encode_documents(rows, tokenizer, _encode, layout=replace(layout, codes=codes[:4].tolist()))
    with pytest.raises(ValueError, match="pass one of the three"):
        encode_documents(rows, tokenizer, _encode, image_token_offset=300, layout=layout)
    (ids,) = encode_documents(Dataset.from_list([{"text": "red<break>"}]), tokenizer, layout=NO_PICTURES)["input_ids"]
    assert ids == [1, *red, image, 2]


def test_mismatches_are_named(tokenizer):
    rows = Dataset.from_list(
        [{"text": "<image>", "images": [_image(1)]}, {"text": "<image><image>", "images": [_image(1)]}]
    )
    with pytest.raises(ValueError, match=r"Document 1 has 2 placeholder\(s\) <image> and 1 picture"):
        encode_documents(rows, tokenizer, _encode)
    with pytest.raises(ValueError, match="pass encode_images"):
        encode_documents(rows, tokenizer)
    with pytest.raises(ValueError, match="column text, caption or messages; got other"):
        encode_documents(Dataset.from_list([{"other": "x"}]), tokenizer)


def test_long_documents_are_refused_or_dropped_aloud(tokenizer, caplog):
    rows = Dataset.from_list([{"text": "red"}, {"text": "a small red circle " * 9}])
    with pytest.raises(ValueError, match="Document 1 has .* max_length is 20"):
        encode_documents(rows, tokenizer, max_length=20)
    with caplog.at_level(logging.WARNING):
        assert len(encode_documents(rows, tokenizer, max_length=20, too_long="drop")) == 1
    assert "1 of 2 documents" in caplog.text


def test_mixing():
    a, b = (Dataset.from_dict({"input_ids": [[i, j] for j in range(10)]}) for i in (1, 2))
    mixed = mix_datasets({"a": a, "b": b}, {"a": 1, "b": 3}, 40, seed=1)
    firsts = [row[0] for row in mixed["input_ids"]]
    assert firsts.count(1) == 10 and firsts.count(2) == 30
    assert {tuple(r) for r in mixed["input_ids"] if r[0] == 2} == {(2, j) for j in range(10)}
    assert mixed["input_ids"][:] == mix_datasets({"a": a, "b": b}, {"a": 1, "b": 3}, 40, seed=1)["input_ids"][:]
    with pytest.raises(ValueError, match="same names"):
        mix_datasets({"a": a}, {"b": 1}, 4)
    with pytest.raises(ValueError, match="negative"):
        mix_datasets({"a": a}, {"a": -1}, 4)
    with pytest.raises(ValueError, match="mix_datasets: seed must be a whole number"):
        mix_datasets({"a": a}, {"a": 1}, 4, seed=-1)


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        (lambda x: np.full((len(x), 4), -1), "raw codes, 0..15, got -1..-1"),
        (lambda x: np.full((len(x), 4), 16), "raw codes, 0..15, got 16..16"),
        (lambda x: np.zeros((len(x) + 1, 4), dtype=int), r"integers \[2, N\] for 2 picture\(s\), got int64 \[3, 4\]"),
        (lambda x: np.zeros((len(x) - 1, 4), dtype=int), r"got int64 \[1, 4\]"),
        (lambda x: np.zeros((len(x), 4)), "got float64"),
        (lambda x: np.zeros(len(x), dtype=int), r"got int64 \[2\]"),
    ],
)
def test_codes_that_are_no_codes_are_refused(tokenizer, codes, words):
    rows = Dataset.from_list([{"caption": "red", "image": _image(1)}, {"caption": "a", "image": _image(2)}])
    with pytest.raises(ValueError, match=words):
        encode_documents(rows, tokenizer, codes)


@pytest.mark.parametrize("text", ["a<break>b", "a<img:3>"])
def test_markup_in_a_text_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="text of document 1 has <break> or image codes itself"):
        encode_documents(Dataset.from_list([{"text": "red"}, {"text": text}]), tokenizer)


def test_a_foreign_tokenizer_is_refused(tokenizer):
    class Foreign:
        def get_vocab(self):
            return {"<break>": 3, "<image>": 4}

    with pytest.raises(ValueError, match="no token <img:0>"):
        encode_documents(Dataset.from_list([{"text": "red"}]), Foreign())


def test_a_mixture_has_as_many_documents_as_asked_for():
    sets = {name: Dataset.from_dict({"input_ids": [[1]] * 9}) for name in "abc"}
    for count in (10, 11, 12):
        assert len(mix_datasets(sets, dict.fromkeys("abc", 1), count)) == count
