"""The certificate of fusions over joined vocabularies: another tokenizer for each parent, and a JAM that reads captions
in the text parent's.

The text parent is kept exactly. Image codes are kept exactly behind captions whose tokens both tokenizers have; behind
others the JAM reads transplanted rows, and a slow oracle says by how much that changes the codes.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from fusion_zoo import (
    GRID,
    NUM_CODES,
    SENTENCES,
    Sizes,
    byte_level_tokenizer,
    code_names,
    image_parent,
    randomise,
    save,
    text_parent,
    vq_model,
)
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import jam_hf
from jam_hf import JamForCausalLM, JamProcessor
from jam_hf.evaluation.retention import certify
from jam_hf_cli import main


IMAGE_SIZES = Sizes(hidden=48, layers=5, heads=6, kv_heads=3, ffn=40)
PAIRS = [("qwen2", "chameleon"), ("llama", "emu3"), ("opt", "janus"), ("mistral", "plain"), ("opt", "emu3")]
CAPTIONS = ["the large blue square", "a ruby, deep and red!", "x", "the sky\nand the sea é"]
PARAGRAPHS = "a small red circle in the top left\n\nthe sea is deep,\nthe sky is blue\n\na ruby is é red\n"


def begins_with(tokenizer, token):
    """The tokenizer puts `token` first, as Llama's and OPT's own do."""
    index = tokenizer.convert_tokens_to_ids(token)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, index)]
    )
    return tokenizer


def write_pairs(folder, captions):
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [json.dumps({"file_name": f"{index}.png", "text": caption}) for index, caption in enumerate(captions)]
    for index in range(len(captions)):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def fusions(tmp_path_factory):
    """`fusions(text_kind, image_kind)` -> folders of both parents and the JAM; the image model and its tokenizer."""
    made = {}

    def make(text_kind, image_kind):
        key = text_kind, image_kind
        if key not in made:
            root = tmp_path_factory.mktemp("-".join(key))
            text, text_tokenizer = text_parent(text_kind)
            if text_kind in ("llama", "opt"):
                begins_with(text_tokenizer, text_tokenizer.bos_token)
            image, image_tokenizer = image_parent(image_kind, IMAGE_SIZES)
            if text_kind == "opt" and image_kind == "janus":  # as DeepSeek's; Emu3's is left to its processor
                begins_with(image_tokenizer, "<s>")
            folders = save(text, text_tokenizer, root / "text"), save(image, image_tokenizer, root / "image")
            jam = jam_hf.fuse(*folders, "cross", root / "jam", vq_model=vq_model())
            made[key] = *folders, jam, image, image_tokenizer
        return made[key]

    return make


def kl(parent, fusion):
    p, q = parent.double().log_softmax(-1), fusion.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def parents_logits(kind, model, tokenizer, caption, codes):
    """What the parent says of each code, `[16, K]`: one document, written out as its class has it."""
    ids, names = tokenizer.convert_tokens_to_ids, code_names(kind)
    rows = None if names is None else torch.tensor(ids(names))
    prompt = tokenizer(caption)["input_ids"]
    if kind == "janus":
        prompt = [*prompt, ids("<begin_of_image>")]
        text = model.get_input_embeddings()(torch.tensor([prompt]))
        pictures = model.prepare_embeddings_for_image_generation(codes[None])
        states = model.model.language_model(inputs_embeds=torch.cat((text, pictures), 1)).last_hidden_state
        return model.model.generation_head(states)[0, len(prompt) - 1 : -1]
    if kind == "emu3":
        size = tokenizer(f"{GRID}*{GRID}", add_special_tokens=False)["input_ids"]
        prompt = [ids("<s>"), *prompt, ids("<|image start|>"), *size, ids("<|image token|>")]
        picture = torch.cat((rows[codes].view(GRID, GRID), torch.full((GRID, 1), ids("<|extra_200|>"))), 1).flatten()
        places = [i for i in range(GRID * (GRID + 1)) if i % (GRID + 1) != GRID]
    else:
        prompt = [*prompt, ids({"plain": "<break>", "chameleon": "<racm3:break>"}[kind])]
        picture, places = rows[codes], list(range(GRID * GRID))
    document = torch.cat((torch.tensor(prompt), picture))[None]
    if kind == "chameleon":  # its own forward masks the codes
        logits = model.lm_head(model.model(input_ids=document).last_hidden_state)
    else:
        logits = model(input_ids=document).logits
    return logits[0, [len(prompt) - 1 + place for place in places]][:, rows]


@torch.no_grad()
def jams_logits(model, processor, caption, codes):
    """The JAM's, `[16, K]`; the document is what its processor writes for a caption and a picture."""
    config = model.config
    ids = processor(text=f"{caption}<image>", images=Image.new("RGB", (16, 16)), return_tensors="pt")["input_ids"][0]
    places = (ids == config.image_token_id).nonzero()[:, 0]
    ids[places] = codes + config.image_token_offset
    logits = model(input_ids=ids[None]).logits[0, places - 1]
    return logits[:, config.image_token_offset : config.image_token_offset + NUM_CODES]


def oracle(kind, parent, tokenizer, jam_folder, pairs):
    """Mean KL, and means of both negative log-likelihoods."""
    model, processor = JamForCausalLM.from_pretrained(jam_folder).eval(), JamProcessor.from_pretrained(jam_folder)
    sums, count = np.zeros(3), 0
    for line in (pairs / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pixels = processor.image_processor(images=[Image.open(pairs / row["file_name"])], return_tensors="pt")[
            "pixel_values"
        ]
        codes = model.get_image_tokens(pixels)[0] - model.config.image_token_offset
        theirs = parents_logits(kind, parent, tokenizer, row["text"], codes)
        ours = jams_logits(model, processor, row["text"], codes)
        assert theirs.shape == ours.shape == (GRID * GRID, NUM_CODES) and theirs.std() > 0.1
        nll = [-logits.double().log_softmax(-1)[range(len(codes)), codes].sum() for logits in (theirs, ours)]
        sums += [kl(theirs, ours).sum().item(), *map(float, nll)]
        count += len(codes)
    return sums / count


@pytest.mark.parametrize("text_kind, image_kind", PAIRS)
def test_unlike_parents(text_kind, image_kind, fusions, tmp_path):
    text, image, jam, parent, tokenizer = fusions(text_kind, image_kind)
    texts, pairs = tmp_path / "texts.txt", write_pairs(tmp_path / "pairs", CAPTIONS)
    texts.write_text(PARAGRAPHS, encoding="utf-8")
    found = certify(jam, text, image, texts, pairs, batch_size=3, write=False)
    rows = text_parent(text_kind)[0].config.vocab_size
    assert found.text.documents == 3 and found.text.choices == rows and found.text.kl <= 1e-6
    assert found.text.parent_nll == pytest.approx(found.text.fusion_nll, abs=1e-7)
    expected = oracle(image_kind, parent, tokenizer, jam, pairs)
    assert (found.image.kl, found.image.parent_nll, found.image.fusion_nll) == pytest.approx(tuple(expected), rel=1e-4)
    assert found.image.kl > 1e-3 and found.image.documents == len(CAPTIONS)  # captions here are not tokenised alike


def common_captions(jam_tokenizer, tokenizer):
    """Texts that both tokenizers cut into the same pieces, several of them."""
    words = [word for sentence in SENTENCES["text"] + SENTENCES["image"] for word in sentence.split()]
    texts = sorted({f"{a} {b}{c}" for a in words for b in words for c in ("", ", !", "\n")})
    found = [
        text
        for text in texts
        if 2 < len(jam_tokenizer.tokenize(text)) and jam_tokenizer.tokenize(text) == tokenizer.tokenize(text)
    ]
    assert len(found) > 5
    return found[:: max(1, len(found) // 5)]


@pytest.mark.parametrize("text_kind, image_kind", [("qwen2", "chameleon"), ("opt", "janus"), ("opt", "emu3")])
def test_captions_that_both_tokenizers_cut_alike_keep_the_codes(text_kind, image_kind, fusions, tmp_path):
    _, image, jam, _, tokenizer = fusions(text_kind, image_kind)
    pairs = write_pairs(tmp_path / "pairs", common_captions(AutoTokenizer.from_pretrained(jam), tokenizer))
    found = certify(jam, image_parent=image, pairs=pairs, batch_size=2, write=False).image
    assert 0 <= found.kl <= 1e-6 and found.parent_nll == pytest.approx(found.fusion_nll, abs=1e-5)


# ----- codes without names --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nameless(tmp_path_factory):
    """A causal LM whose codes have no names and lie inside its vocabulary: folders of parents, JAMs and pairs, id
    of code 0.
    """
    root = tmp_path_factory.mktemp("nameless")
    text, text_tokenizer = text_parent("qwen2")
    tokenizer = byte_level_tokenizer(
        SENTENCES["image"],
        320,
        ["<s>", "<pad>", "</s>", "<boi>", "<break>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    offset = len(tokenizer) + 2
    config = LlamaConfig(
        vocab_size=offset + NUM_CODES + 3,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=128,
    )
    image = LlamaForCausalLM(config).eval()
    randomise(image, seed=6, std=0.2)
    folders = save(text, text_tokenizer, root / "text"), save(image, tokenizer, root / "image")
    jams = {
        name: jam_hf.fuse(*folders, "cross", root / name, vq_model=vq_model(), image_token_offset=offset, **settings)
        for name, settings in {
            "jam": {},
            "declared": {"special_tokens": {"<break>": "<boi>"}},
            "renamed": {"break_token": "<sep>"},
        }.items()
    }
    pairs = write_pairs(root / "pairs", common_captions(AutoTokenizer.from_pretrained(jams["jam"]), tokenizer))
    return *folders, jams, pairs, offset


@pytest.mark.parametrize("name", ["jam", "declared", "renamed"])
def test_the_jams_recipe_says_where_codes_and_marks_are(name, nameless):
    _, image, jams, pairs, _ = nameless
    found = certify(jams[name], image_parent=image, pairs=pairs, write=False).image
    assert 0 <= found.kl <= 1e-6 and found.parent_nll > 1


def test_codes_may_be_declared(nameless, tmp_path, capsys):
    _, image, jams, pairs, offset = nameless
    jam = shutil.copytree(jams["jam"], tmp_path / "jam")
    (jam / "fusion.yaml").unlink()
    with pytest.raises(ValueError, match="names no <img:0>, .* no recipe .*image_token_offset="):
        certify(jam, image_parent=image, pairs=pairs, write=False)
    assert certify(jam, image_parent=image, pairs=pairs, image_token_offset=offset, write=False).image.kl <= 1e-6
    assert (
        certify(jams["jam"], image_parent=image, pairs=pairs, image_token_offset=offset + 1, write=False).image.kl
        > 0.01
    )
    arguments = ["certify", "--model", str(jam), "--image-parent", str(image), "--pairs", str(pairs), "--no-write"]
    assert main([*arguments, "--image-token-offset", str(offset)]) == 0
    assert "KL(parent, fusion)" in capsys.readouterr().out
    assert main([*arguments, "--image-token-offset", "1000"]) == 2
    assert f"would be the rows 1000..{1000 + NUM_CODES - 1} of its vocabulary" in capsys.readouterr().err


def test_a_tokenizer_may_be_given(nameless, fusions, tmp_path):
    _, image, jams, pairs, _ = nameless
    silent = shutil.copytree(image, tmp_path / "silent", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match="no tokenizer to say what they mean. Pass image_tokenizer="):
        certify(jams["jam"], image_parent=silent, pairs=pairs, write=False)
    found = certify(jams["jam"], image_parent=silent, image_tokenizer=image, pairs=pairs, write=False).image
    assert found.kl <= 1e-6
    _, chameleon, jam, _, _ = fusions("qwen2", "chameleon")
    with pytest.raises(ValueError, match="a 'chameleon', which says itself where its codes are"):
        certify(jam, image_parent=chameleon, pairs=pairs, image_token_offset=4, write=False)
