"""Image codes as tokens: found by their names in a parent, named in the JAM's tokenizer, never what a user types."""

import copy
import json
import shutil

import pytest
import torch
from fusion_zoo import (
    NUM_CODES,
    SENTENCES,
    byte_level_tokenizer,
    image_parent,
    save,
    sentencepiece_like_tokenizer,
    text_parent,
    vq_model,
)
from tokenizers import AddedToken
from transformers import AutoTokenizer

import jam_hf
from jam_hf import JamForCausalLM, JamProcessor
from jam_hf.data.code_names import name_codes, num_named_codes
from jam_hf.fusion.fuse import plan_fusion
from jam_hf.fusion.parents import plain_codes


K = NUM_CODES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(text, image)` -> a JAM of unlike parents; qwen2: no spare rows, and llama: some."""
    made = {}

    def make(text="qwen2", image="chameleon", mode="cross"):
        if (text, image, mode) not in made:
            root = tmp_path_factory.mktemp("codes")
            model, tokenizer = text_parent(text)
            settings = {"kind": "plain"} if image == "plain" else {"kind": image}
            other = image_parent(**settings)
            made[text, image, mode] = jam_hf.fuse(
                save(model, tokenizer, root / "text"),
                save(*other, root / "image"),
                mode,
                root / "jam",
                vq_model=vq_model(),
            )
        return made[text, image, mode]

    return make


def unnamed(source, target):
    """The folder as it was fused before codes had names."""
    shutil.copytree(source, target)
    path = target / "tokenizer.json"
    state = json.loads(path.read_text())
    named = [t for t in state["added_tokens"] if t["content"].startswith(("<img:", "<unused:"))]
    state["added_tokens"] = [t for t in state["added_tokens"] if t not in named]
    path.write_text(json.dumps(state))
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text())
    gone = {t["content"] for t in named}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            i: t for i, t in config["added_tokens_decoder"].items() if t["content"] not in gone
        }
    path.write_text(json.dumps(config))
    path = target / "processor_config.json"
    config = json.loads(path.read_text())
    config.pop("image_code_token", None)
    path.write_text(json.dumps(config))
    assert (
        len(AutoTokenizer.from_pretrained(target))
        < json.loads((target / "config.json").read_text())["image_token_offset"] + K
    )
    return target


def draw(model, processor, text="the small circle", **settings):
    inputs = processor(text=text, return_tensors="pt")
    return model.generate(**inputs, generation_mode="image", do_sample=False, **settings)[0].tolist()


@pytest.mark.parametrize(
    ("text", "image"), [("qwen2", "chameleon"), ("llama", "plain"), ("opt", "janus"), ("mistral", "emu3")]
)
def test_codes_have_names_and_a_new_token_lies_outside(folder, text, image):
    jam = folder(text, image)
    model, processor = JamForCausalLM.from_pretrained(jam), JamProcessor.from_pretrained(jam)
    tokenizer, first = processor.tokenizer, model.config.image_token_offset
    codes = list(range(first, first + K))
    assert (
        tokenizer.convert_ids_to_tokens(codes) == [f"<img:{k}>" for k in range(K)] and num_named_codes(tokenizer) == K
    )
    assert len(tokenizer) == len(tokenizer.get_vocab()) == model.config.vocab_size == first + K
    assert tokenizer.decode(codes[3:5]) == "<img:3><img:4>" and tokenizer.decode(codes, skip_special_tokens=True) == ""
    assert (
        AutoTokenizer.from_pretrained(jam).get_vocab() == tokenizer.get_vocab()
    )  # in the files, not in the processor alone
    # The tokens of the text parent are what they were.
    parent = AutoTokenizer.from_pretrained(jam.parent / "text")
    assert all(tokenizer.get_vocab()[token] == index for token, index in parent.get_vocab().items())
    assert tokenizer.add_tokens(["<tool>"]) == 1 and tokenizer.convert_tokens_to_ids("<tool>") == first + K
    assert tokenizer("<tool>", add_special_tokens=False)["input_ids"][-1] == first + K


@pytest.mark.parametrize(
    ("text", "image", "mode"),
    [("qwen2", "chameleon", "cross"), ("llama", "plain", "cross"), ("llama", "plain", "uniform")],
)
def test_resizing_for_a_new_token_changes_nothing_that_was_there(folder, tmp_path, text, image, mode):
    jam = folder(text, image, mode)
    model, processor = JamForCausalLM.from_pretrained(jam).eval(), JamProcessor.from_pretrained(jam)
    size, before = model.config.vocab_size, draw(model, processor)
    ids = torch.tensor([before])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    processor.tokenizer.add_tokens(["<tool>", AddedToken("<call>", special=True)])
    model.resize_token_embeddings(len(processor.tokenizer))
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == size + 2
    for _ in range(2):  # and saved and read again
        with torch.no_grad():
            after = model(input_ids=ids).logits
        assert torch.equal(after[..., :size], logits) and after.shape[-1] == size + 2
        assert draw(model, processor) == before
        called = processor(text="a <tool> b", return_tensors="pt")["input_ids"]
        assert size in called[0].tolist() and model(input_ids=called, labels=called).loss.isfinite()
        model.save_pretrained(tmp_path / "jam")
        processor.save_pretrained(tmp_path / "jam")
        model, processor = (
            JamForCausalLM.from_pretrained(tmp_path / "jam").eval(),
            JamProcessor.from_pretrained(tmp_path / "jam"),
        )


def test_trl_clones_a_chat_template(folder, tmp_path):
    trl = pytest.importorskip("trl")
    model, processor = JamForCausalLM.from_pretrained(folder()).eval(), JamProcessor.from_pretrained(folder())
    before, size = draw(model, processor), model.config.vocab_size
    source = copy.deepcopy(AutoTokenizer.from_pretrained(folder().parent / "text"))
    source.add_tokens([AddedToken("<|call|>", special=True)])
    source.chat_template = "{% for m in messages %}<|call|>{{ m['content'] }}{% endfor %}"
    source.save_pretrained(tmp_path / "source")
    model, tokenizer, added = trl.clone_chat_template(model, processor.tokenizer, str(tmp_path / "source"))
    assert tokenizer.convert_tokens_to_ids("<|call|>") == size == added[0]
    assert len(tokenizer.get_vocab()) == model.vocab_size == model.config.vocab_size and model.vocab_size % 64 == 0
    model.generation_config.eos_token_id = None
    assert draw(model, processor)[: len(before) - 1] == before[:-1]


# ----- what a user types ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["qwen2", "llama"])
def test_a_typed_name_of_a_code_is_text(folder, text):
    jam = folder(text)
    processor, config = JamProcessor.from_pretrained(jam), JamForCausalLM.from_pretrained(jam).config
    parent = AutoTokenizer.from_pretrained(jam.parent / "text")
    typed = ["what is <img:17>?", "<img:3>", f"a<img:{K + 5}><unused:400>b", "one <img:1><img:2> two"]
    for prompt in [*typed, "plain words"]:
        assert processor(text=prompt)["input_ids"][0] == parent(prompt)["input_ids"], prompt
    batch = processor(text=typed, padding=True, return_tensors="pt")["input_ids"]
    assert not ((batch >= config.image_token_offset) & (batch < config.image_token_offset + K)).any()
    assert (
        processor.tokenizer.convert_tokens_to_ids("<img:3>") == config.image_token_offset + 3
    )  # the processor is what it was
    # A token that was added behind the codes keeps its id; markup stays markup.
    processor.tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    ids = processor(text="<img:3><tool><break>")["input_ids"][0]
    assert ids[-2:] == [config.image_token_offset + K, config.break_token_id]
    assert processor.tokenizer.decode(ids).replace(" ", "").endswith("<img:3><tool><break>")
    processor.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    ids = processor.apply_chat_template([{"role": "user", "content": "a<img:3>"}], tokenize=True, return_dict=True)[
        "input_ids"
    ]
    assert config.image_token_offset + 3 not in torch.as_tensor(ids).flatten().tolist()


def test_a_typed_name_is_text_where_the_parents_named_the_codes(processor):
    """Of a shared vocabulary too: what `train_tokenizer` made."""
    first = processor.tokenizer.convert_tokens_to_ids("<img:0>")
    ids = processor(text="see <img:3> here")["input_ids"][0]
    assert max(ids) < first and processor.tokenizer.decode(ids, skip_special_tokens=True) == "see <img:3> here"


def test_names_that_another_model_has_given_are_left_alone():
    tokenizer = byte_level_tokenizer(SENTENCES["text"], 300, ["<s>"])
    tokenizer.add_tokens([AddedToken(f"<img:{i}>", special=True) for i in range(4)])
    size = len(tokenizer)
    assert name_codes(tokenizer, size + 3, 5) == "<jam:img:{}>"
    assert tokenizer.convert_tokens_to_ids("<jam:img:4>") == size + 7 == len(tokenizer) - 1
    assert tokenizer.convert_ids_to_tokens(size) == f"<unused:{size}>"
    assert name_codes(tokenizer, size + 3, 5) is None  # once is enough


# ----- folders that were fused before ---------------------------------------------------------------------------------


def test_folders_fused_before_load_and_get_the_names(folder, tmp_path):
    old = unnamed(folder("llama"), tmp_path / "old")
    model, processor = JamForCausalLM.from_pretrained(old).eval(), JamProcessor.from_pretrained(old)
    now = JamProcessor.from_pretrained(folder("llama"))
    assert processor.tokenizer.get_vocab() == now.tokenizer.get_vocab()
    assert draw(model, processor) == draw(JamForCausalLM.from_pretrained(folder("llama")).eval(), now)
    processor.tokenizer.add_tokens(["<tool>"])
    assert processor.tokenizer.convert_tokens_to_ids("<tool>") == model.config.vocab_size
    processor.save_pretrained(old)
    assert JamProcessor.from_pretrained(old).tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_a_token_that_was_added_as_a_code_is_refused(folder, tmp_path):
    old = unnamed(folder("qwen2"), tmp_path / "old")
    tokenizer, config = AutoTokenizer.from_pretrained(old), JamForCausalLM.from_pretrained(old).config
    while len(tokenizer) <= config.image_token_offset:
        tokenizer.add_tokens([f"<tool:{len(tokenizer)}>"])
    tokenizer.save_pretrained(old)
    with pytest.raises(
        ValueError, match=f"'<tool:{config.image_token_offset}>' with the id {config.image_token_offset}"
    ):
        JamProcessor.from_pretrained(old)


# ----- where a plain image parent has its codes -----------------------------------------------------------------------


def parent_tokenizer(form=None, behind=0, before=0, order=None, kind=byte_level_tokenizer):
    if kind is byte_level_tokenizer:
        tokenizer = byte_level_tokenizer(
            SENTENCES["image"], 300, ["<s>", "</s>", "<break>"], bos_token="<s>", eos_token="</s>"
        )
    else:
        tokenizer = sentencepiece_like_tokenizer(
            SENTENCES["image"], 60, ["<s>", "</s>", "<break>"], bos_token="<s>", eos_token="</s>"
        )
    names = [f"<before:{'x' * i}>" for i in range(before)]
    names += [] if form is None else [form.format(i) for i in order or range(K)]
    names += [f"<behind:{'x' * i}>" for i in range(behind)]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer


FORMS = [
    "<img:{}>",
    "<img_{:05d}>",
    "<|image_{}|>",
    "<|visual token {:06d}|>",
    "[IMG{}]",
    "<image-{:02d}>",
    "<vq{{{}}}>",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [byte_level_tokenizer, sentencepiece_like_tokenizer])
def test_codes_are_found_by_their_names(form, kind):
    """With tokens before and behind them, and rows of padding behind those."""
    for before, behind, padding in [(0, 0, 0), (2, 2, 0), (0, 0, 7), (3, 1, 5)]:
        tokenizer = parent_tokenizer(form, behind, before, kind=kind)
        ids, said, found = plain_codes(len(tokenizer) + padding, K, tokenizer, None, "parent")
        assert tokenizer.convert_ids_to_tokens(ids.tolist()) == [form.format(i) for i in range(K)]
        assert [found.format(i) for i in range(K)] == [form.format(i) for i in range(K)]
        assert form.format(0) in said and form.format(K - 1) in said
        assert torch.equal(plain_codes(len(tokenizer) + padding, K, tokenizer, int(ids[0]), "parent")[0], ids)
        with pytest.raises(ValueError, match="do not fit"):
            plain_codes(len(tokenizer) + padding + K, K, tokenizer, int(ids[0]) + 1, "parent")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: parent_tokenizer(), "it has none"),  # rows without names at the end may be codes, or padding
        (lambda: None, "it has none"),
        (lambda: parent_tokenizer("<img:{}>", order=range(K - 1)), f"exactly {K} .*<img:0>..<img:{K - 2}>"),
        (lambda: parent_tokenizer("<img:{}>", order=range(K + 1)), f"exactly {K} .*<img:0>..<img:{K}>"),
        (lambda: parent_tokenizer("<img:{}>", order=[1, 0, *range(2, K)]), "not in order"),
        (lambda: parent_tokenizer("<img:{}>", order=range(1, K + 1)), "it has none"),
        (lambda: parent_tokenizer("<extra_id_{}>"), "it has none"),
    ],
)
def test_codes_that_are_not_known_are_asked_for(make, match):
    tokenizer = make()
    size = (300 if tokenizer is None else len(tokenizer)) + K
    with pytest.raises(ValueError, match=f"{match}.*image_token_offset="):
        plain_codes(size, K, tokenizer, None, "parent")


def test_two_families_are_asked_about():
    tokenizer = parent_tokenizer("<img:{}>")
    tokenizer.add_tokens([AddedToken(f"<vis_{i}>", special=True) for i in range(K)])
    with pytest.raises(ValueError, match="<img:0>.*<vis_0>.*image_token_offset="):
        plain_codes(len(tokenizer), K, tokenizer, None, "parent")
    first = tokenizer.convert_tokens_to_ids("<vis_0>")
    assert plain_codes(len(tokenizer), K, tokenizer, first, "parent")[0][0] == first


def test_an_offset_that_covers_other_tokens_is_refused():
    tokenizer = parent_tokenizer()
    size = len(tokenizer) + K
    assert plain_codes(size, K, tokenizer, len(tokenizer), "parent")[0].tolist() == list(range(len(tokenizer), size))
    for offset in (len(tokenizer) - 1, 0):
        with pytest.raises(ValueError, match="is the token .*no code"):
            plain_codes(size, K, tokenizer, offset, "parent")
    with pytest.raises(ValueError, match="which has"):
        plain_codes(size, K, tokenizer, len(tokenizer) + 1, "parent")


def test_a_fusion_takes_the_codes_by_their_names_and_says_so(tmp_path):
    """Codes in the middle, tokens and padding behind: their logits are the parent's; last K rows would be off."""
    image_tokenizer = parent_tokenizer("<img_{:05d}>", behind=2)
    text, image = text_parent("qwen2"), text_parent("llama", seed=2, tokenizer=image_tokenizer)
    plan = plan_fusion(
        *(m for m, _ in (text, image)), "cross", vq_model=vq_model(), tokenizer=text[1], image_tokenizer=image_tokenizer
    )
    first = image_tokenizer.convert_tokens_to_ids("<img_00000>")
    assert f"<img_00000>..<img_{K - 1:05d}>, rows {first}..{first + K - 1}" in plan.describe()
    jam = jam_hf.fuse(
        *(m for m, _ in (text, image)),
        "cross",
        tmp_path / "jam",
        vq_model=vq_model(),
        tokenizer=text[1],
        image_tokenizer=image_tokenizer,
    )
    model = JamForCausalLM.from_pretrained(jam).eval()
    codes = torch.arange(K)[None]
    mark = image_tokenizer.convert_tokens_to_ids("<break>")
    with torch.no_grad():
        theirs = image[0](input_ids=torch.cat((torch.tensor([[mark]]), codes + first), 1)).logits[
            ..., first : first + K
        ]
        offset = model.config.image_token_offset
        mine = model(input_ids=torch.cat((torch.tensor([[model.config.break_token_id]]), codes + offset), 1)).logits
    assert torch.equal(mine[..., offset : offset + K], theirs)
