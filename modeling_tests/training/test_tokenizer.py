"""The tokenizer: ids in their order, exact round trips, chat template, saving."""

import pytest
from conftest import NUM_CODES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jam_hf.training.tokenizer import special_tokens, train_tokenizer


def test_ids(tokenizer):
    names = ["<pad>", "<s>", "</s>", "<break>", "<image>", "<mask>", "<mask:1>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4, 5, 6]
    assert tokenizer.convert_tokens_to_ids("</mask>") == 13
    codes = tokenizer.convert_tokens_to_ids([f"<img:{i}>" for i in range(NUM_CODES)])
    assert codes == list(range(len(tokenizer) - NUM_CODES, len(tokenizer)))
    assert len(special_tokens(512)) == 5 + 512 + 1 + 3


_TOKENIZER = train_tokenizer(["a small red circle"], 300, 4)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40).filter(lambda t: "<" not in t))
def test_any_text_survives(text):
    ids = _TOKENIZER(text)["input_ids"]
    assert ids[0] == 1
    assert _TOKENIZER.decode(ids[1:]) == text


def test_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "red<image> \U0001f600"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template and again.padding_side == "left"


def test_chat_template(tokenizer):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "see"}, {"type": "image"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|>hi<|assistant|>see<image></s><|assistant|>"
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == tokenizer("<|user|>hi<|assistant|>see<image></s>")["input_ids"] and ids.count(1) == 1


def test_bad_sizes():
    with pytest.raises(ValueError, match="at least 273"):
        train_tokenizer(["a"], 100, 4)
    with pytest.raises(ValueError, match="num_image_tokens"):
        train_tokenizer(["a"], 300, 0)


def test_what_a_chat_cannot_hold_is_refused(tokenizer):
    with pytest.raises(Exception, match="must be text or image, got video"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)
    with pytest.raises(Exception, match="role must be system, user or assistant, got robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "hi"}], tokenize=False)
