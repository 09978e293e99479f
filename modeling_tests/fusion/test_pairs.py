"""Every pair of parents, with different tokenizers, in each mode that it allows: against the parents' own logits."""

import pytest
import torch
from fusion_zoo import (
    GRID,
    IMAGE_KINDS,
    NUM_CODES,
    SMALL,
    TEXT_KINDS,
    Sizes,
    image_parent,
    image_parent_logits,
    save,
    text_parent,
    vq_model,
)
from transformers import AutoTokenizer

import jam_hf
from jam_hf import JamForCausalLM


IMAGE_SIZES = Sizes(hidden=48, layers=5, heads=6, kv_heads=3, ffn=40)  # unlike the text parents in every number


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """`zoo(role, kind, sizes, **settings)` -> (folder, model, tokenizer)"""
    made = {}

    def make(role, kind, sizes=SMALL, **settings):
        key = (role, kind, sizes, *settings.items())
        if key not in made:
            model, tokenizer = (text_parent if role == "text" else image_parent)(kind, sizes, **settings)
            made[key] = save(model, tokenizer, tmp_path_factory.mktemp(f"{role}-{kind}") / kind), model, tokenizer
        return made[key]

    return make


@pytest.fixture(scope="module")
def codes():
    return torch.randint(0, NUM_CODES, (7,), generator=torch.Generator().manual_seed(4))


def caption_tokens(jam_tokenizer, image_tokenizer):
    """Tokens of several letters that both tokenizers have: (the JAM's ids, the image parent's tokens)."""

    def letters(token):
        return token.replace("\u2581", " ").replace("\u0120", " ")

    ours = {letters(token): index for token, index in jam_tokenizer.get_vocab().items()}
    theirs = [token for token in sorted(image_tokenizer.get_vocab()) if len(token) > 1 and letters(token).strip().isalpha()]
    both = [token for token in theirs if letters(token) in ours][:6]
    assert len(both) == 6
    return [ours[letters(token)] for token in both], both


def opening(kind):
    """The parent's tokens from the opening mark to the first code."""
    return {
        "plain": ["<break>"],
        "chameleon": ["<racm3:break>"],
        "janus": ["<begin_of_image>"],
        "emu3": ["<|image start|>", str(GRID), "*", str(GRID), "<|image token|>"],
    }[kind]


@pytest.mark.parametrize("image_kind", IMAGE_KINDS)
@pytest.mark.parametrize("text_kind", TEXT_KINDS)
def test_cross_preserving_gives_both_parents_logits(text_kind, image_kind, zoo, codes, tmp_path):
    text_folder, text, text_tokenizer = zoo("text", text_kind)
    image_folder, image, image_tokenizer = zoo("image", image_kind, IMAGE_SIZES)
    vq = vq_model()
    jam_hf.fuse(text_folder, image_folder, "cross", tmp_path / "jam", vq_model=vq)
    model, info = JamForCausalLM.from_pretrained(tmp_path / "jam", output_loading_info=True)
    assert not any(info.values()), info
    model.eval()
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(tmp_path / "jam")
    assert tokenizer.padding_side == "left"

    ids = torch.tensor([text_tokenizer("the small circle is red, ruby")["input_ids"]])
    assert tokenizer("the small circle is red, ruby")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        expected, ours = text(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.equal(ours[..., : expected.shape[-1]], expected)

    mine, theirs = caption_tokens(tokenizer, image_tokenizer)
    marks = [config.break_token_id, *config.image_prefix_token_ids]
    document = torch.tensor([[*mine, *marks, *(codes[:GRID] + config.image_token_offset).tolist()]])
    expected = image_parent_logits(image_kind, image, image_tokenizer, [*theirs, *opening(image_kind)], codes[:GRID])
    with torch.no_grad():
        ours = model(input_ids=document).logits[0, :, config.image_token_offset :][:, :NUM_CODES]
    assert ours.shape == expected.shape
    if image_kind == "janus":  # the codes' rows are made in one product of other shape: float32 rounding
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(ours, expected)
