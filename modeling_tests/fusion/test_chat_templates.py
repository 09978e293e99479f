"""Chat templates for text alone, fused: what they write of parts and pictures is what they write of texts with
`<image>`.
"""

import pytest
from fusion_zoo import byte_level_tokenizer
from PIL import Image

import jam_hf
from jam_hf import JamProcessor
from jam_hf.data.sequences import encode_documents
from jam_hf.fusion.chat_templates import fitted, with_pictures
from jam_hf.fusion.fuse import plan_fusion
from jam_hf.training.tokenizer import CHAT_TEMPLATE


# Of the kinds of public templates, in our own words: what each does with a content that is a list.
TEMPLATES = {
    "qwen": (  # text + list: TypeError
        "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '\\n' }}{% endfor %}"
        "{%- if tools %}{{ tools | tojson }}{% endif %}{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "llama-3": (  # `| trim` makes Python's repr of it
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|' + message['role'] + '|>' + message['content'] | trim + '|' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    ),
    "llama-3.1": (  # `| tojson` for some roles
        "{{ bos_token }}{% for m in messages %}{{ m.content | tojson if m.content is not string else m.content }}{% "
        "endfor %}"
    ),
    "gemma-3": (  # parts are read, and a picture is another token
        "{{ bos_token }}{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.content is string %}{{ m.content }}{% "
        "else %}{% for part in m.content %}{% if part.type == 'image' %}{{ '<start_of_image>' }}{% else %}{{ part.text "
        "}}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    ),
    "mistral": (  # roles must alternate, no system; a list is refused
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ ' [INST] ' + m.content + ' [/INST]' }}{% endfor %}"
    ),
    "first part": "\n{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}",
    "masks": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
}
PICTURE = Image.new("RGB", (16, 16), (200, 30, 30))
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a hat, "}, {"type": "image"}]},
]
TEXTS = [{"role": "user", "content": "<image>what is it?"}, {"role": "assistant", "content": "a hat, <image>"}]


def _with(processor, template):
    processor.chat_template = processor.tokenizer.chat_template = template
    return processor


def _named(chat, picture=PICTURE):
    fill = {"image": picture}
    return [
        {**m, "content": [{**p, **fill} if p["type"] == "image" else p for p in m["content"]]} if m["content"] else m
        for m in chat
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_fitted_template_writes_parts_as_it_writes_texts(name, processor):
    tokenizer = processor.tokenizer
    tokenizer.chat_template = TEMPLATES[name]
    expected = tokenizer.apply_chat_template(TEXTS, tokenize=False)  # the parent's own template, on texts
    template, warnings = fitted(tokenizer, "<image>")
    assert not warnings and template == with_pictures(TEMPLATES[name]) != TEMPLATES[name]
    _with(processor, template)
    for written in (tokenizer, processor):
        assert written.apply_chat_template(PARTS, tokenize=False) == expected
        assert written.apply_chat_template(TEXTS, tokenize=False) == expected
    assert fitted(tokenizer, "<image>") == (template, [])  # once is enough
    inputs = processor.apply_chat_template(_named(PARTS), tokenize=True, return_dict=True, return_tensors="pt")
    wanted = processor(text=expected, images=[PICTURE] * 2, return_tensors="pt")
    assert inputs["input_ids"].tolist() == wanted["input_ids"].tolist() and len(inputs["pixel_values"]) == 2


def test_a_template_that_takes_pictures_stays_as_it_is(processor):
    assert fitted(processor.tokenizer, "<image>") == (CHAT_TEMPLATE, [])


def test_tools_and_what_they_return_reach_the_template(processor):
    template = with_pictures("{{ tools | tojson }}{% for m in messages %}{{ m.content | tojson }}{% endfor %}")
    chat = [
        {"role": "tool", "content": [1, {"type": "dog"}]},
        {"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "image"}]},
        {"role": "user", "content": []},
        {"role": "user"},
    ]
    text = processor.tokenizer.apply_chat_template(chat[:3], chat_template=template, tools=[{"a": 1}], tokenize=False)
    assert text == '[{"a": 1}][1, {"type": "dog"}]"a<image>"""'
    with pytest.raises(Exception, match="must be text or image, got .*video"):
        processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "video"}]}], chat_template=template, tokenize=False
        )


def test_what_the_assistant_writes_is_still_marked(processor):
    _with(processor, with_pictures(TEMPLATES["masks"]))
    output = processor.apply_chat_template(
        _named(PARTS), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    kept = output["input_ids"][0][output["assistant_masks"][0].bool()]
    codes = "<break>" + "<image>" * 16 + "<break>"
    assert processor.decode(kept) == f"a hat, {codes}</s>"


@pytest.mark.parametrize("named", [False, True])
def test_fusion_fits_the_template_and_names_it_in_no_warning(named, parents, vq, tokenizer, tmp_path):
    text, image = parents("llama")
    own = {"default": TEMPLATES["qwen"], "other": TEMPLATES["llama-3"]} if named else TEMPLATES["qwen"]
    before, tokenizer.chat_template = tokenizer.chat_template, own
    try:
        plan = plan_fusion(text, image, "cross", vq_model=vq, tokenizer=tokenizer)
        assert not any("chat template" in warning for warning in plan.warnings)
        folder = jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq, tokenizer=tokenizer)
        expected = {
            name: tokenizer.apply_chat_template(TEXTS, chat_template=t, tokenize=False) for name, t in TEMPLATES.items()
        }
        assert tokenizer.chat_template == own  # the user's own object stays as it is
    finally:
        tokenizer.chat_template = before
    processor = JamProcessor.from_pretrained(folder)
    for written in (processor, processor.tokenizer):
        assert written.apply_chat_template(PARTS, tokenize=False) == expected["qwen"]
        if named:
            assert written.apply_chat_template(PARTS, chat_template="other", tokenize=False) == expected["llama-3"]


def test_a_template_that_cannot_be_fitted_is_warned_of(processor):
    tokenizer = processor.tokenizer
    tokenizer.chat_template = {
        "default": TEMPLATES["qwen"],
        "deaf": "{{ messages[0].content | replace('<image>', '') }}",
    }
    template, warnings = fitted(tokenizer, "<image>")
    assert template["default"] == with_pictures(TEMPLATES["qwen"])
    assert len(warnings) == 1 and "'deaf' of the tokenizer takes no pictures" in warnings[0]
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert "could not be tried" in fitted(tokenizer, "<image>")[1][0]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tokenize", [False, True])
def test_templates_of_older_folders_are_refused_not_written_as_python(name, tokenize, processor):
    """No `[{'type': ...` and no lost picture: an error that says what to do."""
    _with(processor, TEMPLATES[name])
    with pytest.raises(ValueError, match="chat template cannot write messages that are lists of parts.*with_pictures"):
        processor.apply_chat_template(_named(PARTS), tokenize=tokenize, return_dict=tokenize)
    only_text = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    if name in ("gemma-3", "first part"):  # it can write these
        assert "hello" in processor.apply_chat_template(only_text, tokenize=False)
    else:
        with pytest.raises(ValueError, match="lists of parts"):
            processor.apply_chat_template(only_text, tokenize=False)
    rows = [{"messages": _named(PARTS, None), "images": [PICTURE] * 2}]
    with pytest.raises(ValueError, match="Document 0: The chat template cannot write"):
        encode_documents(rows, processor.tokenizer, lambda images: [[0] * 16] * len(images))
    assert processor.apply_chat_template(TEXTS, tokenize=False).count("<image>") == 2  # texts go on as they did


def test_what_a_template_says_of_a_chat_itself_comes_through(processor):
    _with(processor, TEMPLATES["mistral"])
    with pytest.raises(Exception, match="^roles must alternate"):
        processor.apply_chat_template([PARTS[1]], tokenize=False)


def test_a_placeholder_of_another_name():
    tokenizer = byte_level_tokenizer(["a"], 300, ["<pic>"], eos_token="<pic>")
    tokenizer.chat_template = TEMPLATES["qwen"]
    tokenizer.chat_template, warnings = fitted(tokenizer, "<pic>")
    assert not warnings and tokenizer.apply_chat_template(PARTS, tokenize=False).count("<pic>") == 2
