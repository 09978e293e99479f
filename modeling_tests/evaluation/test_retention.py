"""The retention certificate: zero where a fusion preserves, a slow oracle elsewhere, each class of parents, a whole
card.
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import NUM_CODES, parent_model, randomise
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from fusion_zoo import image_parent, save, text_parent, vq_model
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import jam_hf
from jam_hf import JamForCausalLM, JamProcessor
from jam_hf.evaluation import retention
from jam_hf.evaluation.perplexity import compare_logits
from jam_hf.evaluation.retention import SECTION_END, SECTION_START, certify
from jam_hf.training.tokenizer import train_tokenizer
from jam_hf_cli import main


CAPTIONS = ["a small red circle", "a ruby is red and small", "top", "a circle in the top left", "left"]
TEXT = "a ruby is red\nin the top left\n\n\na small red circle\n\na\n \nthe top left is red, a ruby is small\n"


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "some texts.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "some pairs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for index, caption in enumerate(CAPTIONS):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return folder


@pytest.fixture
def folder(fused, tmp_path):
    """`folder(mode, init, noise)` -> a copy of a JAM, with noise on its weights."""

    def make(mode="cross", init="preserving", noise=0.0, family="llama"):
        target = tmp_path / f"{family}-{mode}-{init}-{noise}"
        shutil.copytree(fused(family, mode, init), target)
        if noise:
            model = JamForCausalLM.from_pretrained(target)
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "vq_model" not in name:
                        parameter += noise * torch.randn(parameter.shape, generator=generator)
            model.save_pretrained(target)
        return target

    return make


def _encode(jam_folder, pairs):
    """Captions with their codes, one picture at a time."""
    model, processor = JamForCausalLM.from_pretrained(jam_folder).eval(), JamProcessor.from_pretrained(jam_folder)
    rows = [json.loads(line) for line in (pairs / "metadata.jsonl").read_text().splitlines() if line]
    for row in rows:
        pixels = processor.image_processor(images=[Image.open(pairs / row["file_name"])], return_tensors="pt")[
            "pixel_values"
        ]
        yield row["text"], (model.get_image_tokens(pixels)[0] - model.config.image_token_offset).tolist()


def _kl(parent, fusion):
    """In float64, for `[P, V]` logits."""
    p, q = parent.double().log_softmax(-1), fusion.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@torch.no_grad()
def _code_logits(model, config, tokenizer, caption, codes):
    """Of the JAM, or of a parent over its vocabulary."""
    first = config.image_token_offset
    ids = [*tokenizer(caption)["input_ids"], config.break_token_id]
    logits = model(input_ids=torch.tensor([ids + [first + code for code in codes]])).logits[0]
    return logits[len(ids) - 1 : -1, first : first + NUM_CODES]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_preserving_fusion_keeps_both_parents(family, fused, parents, texts, pairs):
    text, image = parents(family)
    found = certify(fused(family, "cross", "preserving"), text, image, texts, pairs, batch_size=2, write=False)
    for part in (found.text, found.image):
        assert 0 <= part.kl <= 1e-6
        assert part.parent_nll == part.fusion_nll and part.parent_perplexity > 1
    assert (found.text.documents, found.image.documents) == (4, 5)
    assert found.image.tokens == 5 * 16 and found.image.choices == NUM_CODES


@pytest.mark.parametrize("batch_size", [1, 3])
@torch.no_grad()
def test_a_uniform_fusion_against_a_slow_oracle(batch_size, fused, parents, tokenizer, texts, pairs):
    (text_folder, image_folder), jam_folder = parents("llama"), fused("llama", "uniform", "average")
    found = certify(
        jam_folder, text_folder, image_folder, texts, pairs, batch_size=batch_size, max_tokens=9, write=False
    )
    jam = JamForCausalLM.from_pretrained(jam_folder).eval()
    text, image = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (text_folder, image_folder))
    first = jam.config.image_token_offset
    divergences, losses = [], []
    for document in (
        "a ruby is red\nin the top left",
        "a small red circle",
        "a",
        "the top left is red, a ruby is small",
    ):
        ids = torch.tensor([tokenizer(document)["input_ids"][:9]])
        logits = [model(input_ids=ids).logits[0, :-1, :first] for model in (text, jam)]
        divergences += _kl(*logits).tolist()
        losses.append([-x.double().log_softmax(-1).gather(1, ids[0, 1:, None]).flatten() for x in logits])
    assert found.text.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-5) and found.text.kl > 0.01
    assert found.text.tokens == len(divergences) and found.text.choices == first
    parent_nll, fusion_nll = (torch.cat([pair[i] for pair in losses]).mean().item() for i in (0, 1))
    assert found.text.parent_perplexity == pytest.approx(math.exp(parent_nll), rel=1e-5)
    assert found.text.fusion_perplexity == pytest.approx(math.exp(fusion_nll), rel=1e-5)
    divergences, losses = [], []
    for caption, codes in _encode(jam_folder, pairs):
        logits = [_code_logits(model, jam.config, tokenizer, caption, codes) for model in (image, jam)]
        divergences += _kl(*logits).tolist()
        losses += (-logits[0].double().log_softmax(-1)[range(16), codes]).tolist()
    assert found.image.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-5) and found.image.kl > 0.01
    assert found.image.kl_bits == pytest.approx(found.image.kl / math.log(2))
    assert found.image.parent_nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("softmax", ["text", "all"])
@torch.no_grad()
def test_codes_in_or_out_of_the_softmax(softmax, fused, parents, tokenizer, texts, capsys):
    """Against a slow oracle; both are divergences of whole distributions, so neither is negative."""
    (text_folder, _), jam_folder = parents("llama"), fused("llama", "uniform", "average")
    found = certify(jam_folder, text_folder, texts=texts, write=False, softmax=softmax).text
    jam, text = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (jam_folder, text_folder))
    first, divergences, losses = jam.config.image_token_offset, [], []
    for document in (
        "a ruby is red\nin the top left",
        "a small red circle",
        "a",
        "the top left is red, a ruby is small",
    ):
        ids = torch.tensor([tokenizer(document)["input_ids"]])
        logits = [model(input_ids=ids).logits[0, :-1, : first if softmax == "text" else None] for model in (text, jam)]
        divergences += _kl(*logits).tolist()
        losses += (-logits[1].double().log_softmax(-1).gather(1, ids[0, 1:, None])).flatten().tolist()
    assert min(divergences) > 0 and found.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-5)
    assert found.fusion_nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert (found.softmax, found.choices) == (softmax, first if softmax == "text" else jam.config.vocab_size)
    asked = ["--softmax", "all"] if softmax == "all" else []
    paths = ["--model", str(jam_folder), "--text-parent", str(text_folder), "--texts", str(texts)]
    main(["certify", *paths, "--no-write", *asked])
    printed = capsys.readouterr().out
    assert f"| {found.kl:.4g} |" in printed and ("| all ids |" in printed) == (softmax == "all")
    with pytest.raises(ValueError, match="softmax must be 'text'"):
        certify(jam_folder, text_folder, texts=texts, write=False, softmax="codes")


@torch.no_grad()
def test_ids_that_the_parent_does_not_have(tmp_path):
    """All ids of each model: what a preserving JAM gives to codes, its text parent gives to text."""
    text, tokenizer = text_parent("llama")
    folders = save(text, tokenizer, tmp_path / "text"), save(*image_parent("plain"), tmp_path / "image")
    jam_folder = jam_hf.fuse(*folders, "cross", tmp_path / "jam", vq_model=vq_model())
    (tmp_path / "one.txt").write_text("the small circle is", encoding="utf-8")
    arguments = {"text_parent": folders[0], "texts": tmp_path / "one.txt", "write": False}
    kept, shared = (certify(jam_folder, **arguments, softmax=softmax).text for softmax in ("text", "all"))
    jam = JamForCausalLM.from_pretrained(jam_folder).eval()
    logits = jam(input_ids=tokenizer("the small circle is", return_tensors="pt")["input_ids"]).logits[0, :-1].double()
    of_codes = (logits.logsumexp(-1) - logits[:, : text.config.vocab_size].logsumexp(-1)).mean().item()
    assert kept.kl == pytest.approx(0, abs=1e-6) and of_codes > 1e-3
    assert shared.kl == pytest.approx(of_codes, rel=1e-3, abs=1e-6)
    assert shared.fusion_nll - shared.parent_nll == pytest.approx(of_codes, rel=1e-3, abs=1e-6)


def test_chunks_do_not_change_the_sums():
    generator = torch.Generator().manual_seed(0)
    parent, fusion = (torch.randn(2, 6, 11, generator=generator) for _ in range(2))
    rows, columns = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1, 4, 0, 2, 5])
    chosen, targets = torch.tensor([0, 3, 4, 9]), torch.tensor([3, 0, 1, 2, 2])
    whole, chunked = (
        compare_logits(parent, fusion, (rows, columns), (rows, columns), targets, chosen, chunk=chunk)
        for chunk in (2**22, 12)
    )
    torch.testing.assert_close(whole, chunked)
    expected = _kl(parent[rows, columns][:, chosen], fusion[rows, columns][:, chosen]).sum()
    assert whole[0].item() == pytest.approx(expected.item(), rel=1e-5)
    half = compare_logits(parent.bfloat16(), parent.bfloat16(), (rows, columns), (rows, columns), targets, chosen)
    assert half[0] == 0


def test_the_figures_rise_with_the_damage(folder, parents, texts, pairs):
    text, image = parents("llama")
    found = [certify(folder(noise=noise), text, image, texts, pairs, write=False) for noise in (0.0, 0.01, 0.05)]
    for part in ("text", "image"):
        kls = [getattr(one, part).kl for one in found]
        assert kls[0] <= 1e-6 < kls[1] < kls[2]


def test_a_smaller_text_parent_and_codes_inside_its_vocabulary(fused, parents, texts, tmp_path):
    """A text parent without image codes: what it has are the first ids of the JAM's."""
    config = JamForCausalLM.from_pretrained(fused("llama", "uniform", "average")).config
    small = parent_model("llama", config.image_token_offset, seed=1)
    small.save_pretrained(tmp_path / "small")
    found = certify(fused("llama", "uniform", "average"), tmp_path / "small", texts=texts, write=False)
    assert found.text.choices == config.image_token_offset and found.image is None
    assert found.text.kl > 0
    ids = retention.shared_ids(config, config.vocab_size, "it")
    assert len(ids) == config.vocab_size - NUM_CODES and config.image_token_offset not in ids


# ----- image parents of other classes ---------------------------------------------------------------------------------

# Marks of each class, and codes scattered over the vocabulary.
_LETTERS = dict(zip("0123456789", "ABCDEFGHIJ"))
_CODES = {
    "chameleon": [f"IMGIMG{''.join(_LETTERS[d] for d in str(k))}Z" for k in range(NUM_CODES)],
    "emu3": [f"<|visual token {k:06d}|>" for k in range(NUM_CODES)],
    "janus": [],
}
_MARKS = {
    "chameleon": ["<image>", "<racm3:break>", "<eoss>"],
    "emu3": ["<image>", "<|extra_200|>", "<|image start|>", "<|image token|>", "<|image end|>", "<|extra_201|>"],
    "janus": ["<image_placeholder>", "<begin_of_image>", "<end_of_image>"],
}
_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _other_tokenizer(kind):
    """Bytes, in another order than the JAM's; codes in reverse. Emu3's puts no <s> first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    tokens = ["<pad>", "<s>", "</s>", *_MARKS[kind], *alphabet, *reversed(_CODES[kind])]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", *_MARKS[kind], *_CODES[kind]])
    if kind != "emu3":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _other_parent(kind, tokenizer):
    vocabulary = tokenizer.get_vocab()
    vq = {"base_channels": 32, "embed_dim": 4, "latent_channels": 4, "num_res_blocks": 1}
    if kind == "chameleon":
        vq |= {"num_embeddings": NUM_CODES, "resolution": 16, "channel_multiplier": [1, 1]}
        config = ChameleonConfig(vocab_size=len(vocabulary), vq_config=vq, vocabulary_map=vocabulary, **_DECODER)
        return ChameleonForConditionalGeneration(config)
    if kind == "emu3":
        vq |= {"codebook_size": NUM_CODES, "channel_multiplier": [1, 1], "hidden_size": 16, "attn_resolutions": []}
        config = Emu3Config(
            text_config={"vocab_size": len(vocabulary), **_DECODER}, vq_config=vq, vocabulary_map=vocabulary
        )
        return Emu3ForConditionalGeneration(config)
    vq |= {"num_embeddings": NUM_CODES, "channel_multiplier": [1, 1], "projection_dim": 32, "image_token_embed_dim": 32}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = {"model_type": "llama", "vocab_size": len(vocabulary), **_DECODER}
    vision |= {"projection_dim": 32, "num_image_tokens": 16}
    return JanusForConditionalGeneration(JanusConfig(text_config=text, vision_config=vision, vq_config=vq))


@pytest.fixture(scope="session")
def other_parents(tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / kind
            tokenizer = _other_tokenizer(kind)
            model = _other_parent(kind, tokenizer)
            randomise(model, seed=7)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[kind] = folder, model.eval(), tokenizer
        return made[kind]

    return make


@torch.no_grad()
def _other_code_logits(kind, model, tokenizer, caption, codes):
    """One document at a time, written out as each class has it."""
    ids = tokenizer.convert_tokens_to_ids
    names = _CODES[kind]
    prompt = tokenizer(caption)["input_ids"]
    if kind == "chameleon":
        prompt += [ids("<racm3:break>")]
        states = model.model(input_ids=torch.tensor([prompt + ids([names[c] for c in codes])])).last_hidden_state
        return model.lm_head(states)[0, len(prompt) - 1 : -1, ids(names)]
    if kind == "emu3":
        prompt = [1, *prompt, ids("<|image start|>"), *ids(list("4*4")), ids("<|image token|>")]
        rows = [codes[i : i + 4] for i in range(0, 16, 4)]
        picture = [[*ids([names[c] for c in row]), ids("<|extra_200|>")] for row in rows]
        logits = model(input_ids=torch.tensor([prompt + sum(picture, [])])).logits[0]
        start = len(prompt) - 1
        return torch.cat([logits[start + 5 * row : start + 5 * row + 4] for row in range(4)])[:, ids(names)]
    prompt += [ids("<begin_of_image>")]
    text = model.get_input_embeddings()(torch.tensor([prompt]))
    picture = model.prepare_embeddings_for_image_generation(torch.tensor([codes]))
    states = model.model.language_model(inputs_embeds=torch.cat((text, picture), 1)).last_hidden_state
    return model.model.generation_head(states)[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("kind", ["chameleon", "emu3", "janus"])
@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.sampled
def test_image_parents_of_other_classes(kind, batch_size, fused, other_parents, tokenizer, pairs):
    parent_folder, parent, parent_tokenizer = other_parents(kind)
    jam_folder = fused("llama", "cross", "preserving")
    found = certify(jam_folder, image_parent=parent_folder, pairs=pairs, batch_size=batch_size, write=False).image
    jam = JamForCausalLM.from_pretrained(jam_folder).eval()
    divergences, losses = [], []
    for caption, codes in _encode(jam_folder, pairs):
        theirs = _other_code_logits(kind, parent, parent_tokenizer, caption, codes)
        assert theirs.shape == (16, NUM_CODES) and theirs.std() > 0
        divergences += _kl(theirs, _code_logits(jam, jam.config, tokenizer, caption, codes)).tolist()
        losses += (-theirs.double().log_softmax(-1)[range(16), codes]).tolist()
    assert found.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert found.parent_nll == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found.kl > 0.01 and found.parent == kind


@pytest.mark.parametrize("row_end", [None, "<|user|>"])
def test_a_causal_lm_of_another_vocabulary_names_its_codes(row_end, folder, tokenizer, pairs, tmp_path):
    """Its own tokenizer, its own ids for codes and marks: the same logits by code number as those of an oracle."""
    theirs = train_tokenizer(["something else entirely"], 280, NUM_CODES, num_mask_tokens=2)
    model = parent_model("llama", len(theirs) + 8, seed=4)  # a padded vocabulary
    model.save_pretrained(tmp_path / "other")
    theirs.save_pretrained(tmp_path / "other")
    jam_folder, ids_of = folder("uniform", "average"), theirs.convert_tokens_to_ids
    if row_end is not None:
        assert ids_of(row_end) != tokenizer.convert_tokens_to_ids(row_end)
        config = json.loads((jam_folder / "config.json").read_text())
        config["image_row_end_token_id"] = tokenizer.convert_tokens_to_ids(row_end)
        (jam_folder / "config.json").write_text(json.dumps(config))
    found = certify(jam_folder, image_parent=tmp_path / "other", pairs=pairs, write=False).image
    losses, first = [], ids_of("<img:0>")
    for caption, codes in _encode(jam_folder, pairs):
        prompt = [*theirs(caption)["input_ids"], ids_of("<break>")]
        ends = [] if row_end is None else [ids_of(row_end)]
        picture = sum(([first + code for code in codes[row : row + 4]] + ends for row in range(0, 16, 4)), [])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + picture])).logits[0, len(prompt) - 1 : -1]
        logs = logits[[i for i, token in enumerate(picture) if token >= first], first : first + NUM_CODES].log_softmax(
            -1
        )
        losses += (-logs[range(16), codes]).tolist()
    assert found.parent_nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_jam_and_its_parent_with_a_layout_of_pictures(folder, parents, tokenizer, pairs):
    """A prefix and row ends: both read them, and they are no codes."""
    jam_folder, image_folder = folder(), parents("llama")[1]
    config = json.loads((jam_folder / "config.json").read_text())
    layout = {"image_prefix_token_ids": [15], "image_row_end_token_id": 14}
    (jam_folder / "config.json").write_text(json.dumps(config | layout))
    found = certify(jam_folder, image_parent=image_folder, pairs=pairs, batch_size=2, write=False).image
    assert found.kl <= 1e-6 and found.tokens == 5 * 16
    model, losses = AutoModelForCausalLM.from_pretrained(image_folder).eval(), []
    first = len(tokenizer) - NUM_CODES
    for caption, codes in _encode(jam_folder, pairs):
        prompt = [*tokenizer(caption)["input_ids"], 3, 15]
        picture = sum(([*(first + code for code in codes[row : row + 4]), 14] for row in range(0, 16, 4)), [])
        with torch.no_grad():
            logs = (
                model(input_ids=torch.tensor([prompt + picture]))
                .logits[0, len(prompt) - 1 : -1, first:]
                .log_softmax(-1)
            )
        losses += (-logs[[i for i in range(20) if i % 5 != 4], codes]).tolist()
    assert found.parent_nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    silent_folder = (
        jam_folder.parent / "silent"
    )  # without a tokenizer: taken at its word, as its vocabulary has the JAM's size
    shutil.copytree(image_folder, silent_folder, ignore=shutil.ignore_patterns("tokenizer*"))
    silent = certify(jam_folder, image_parent=silent_folder, pairs=pairs, batch_size=2, write=False).image
    assert (silent.kl, silent.parent_nll) == (found.kl, found.parent_nll)


def test_a_saved_dataset_gives_what_a_folder_of_pictures_gives(fused, parents, pairs, tmp_path):
    features = Features({"image": ImageFeature(), "text": Value("string")})
    rows = {"image": [str(pairs / f"{i}.png") for i in range(len(CAPTIONS))], "text": CAPTIONS}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "dataset")
    image = parents("llama")[1]
    jam_folder = fused("llama", "uniform", "average")
    first, second = (
        certify(jam_folder, image_parent=image, pairs=source, max_documents=3, write=False).image
        for source in (pairs, tmp_path / "dataset")
    )
    assert (first.kl, first.documents) == (second.kl, 3) and second.measured_on == "dataset"


# ----- what people have on their disks --------------------------------------------------------------------------------


def test_texts_of_other_systems_are_the_same_texts(fused, parents, tmp_path):
    """Ends of lines, a byte order mark, blank lines with blanks or form feeds in them."""
    found = []
    for content in (
        "a ruby\nis é red\n\nthe top\n".encode(),
        "\ufeffa ruby\r\nis é red\r\n\r\nthe top".encode(),
        "\r\ra ruby\ris é red\r \t\r\x0c\rthe top\r\r".encode(),
    ):
        path = tmp_path / "texts.txt"
        path.write_bytes(content)
        found.append(certify(fused("llama", "uniform", "average"), parents("llama")[0], texts=path, write=False).text)
    assert found[0] == found[1] == found[2] and found[0].documents == 2


def test_short_and_endless_documents(fused, parents, tokenizer, tmp_path):
    jam_folder, text = fused("llama", "uniform", "average"), parents("llama")[0]
    path = tmp_path / "texts.txt"
    path.write_text("a\n\n" * 3 + "a ruby is red " * 200_000, encoding="utf-8")
    found = certify(jam_folder, text, texts=path, write=False).text
    length = len(tokenizer("a")["input_ids"])
    assert found.documents == 4 and found.tokens == 3 * (length - 1) + 127 and found.max_tokens == 128
    path.write_text("a ruby is red " * 100, encoding="utf-8")
    assert certify(jam_folder, text, texts=path, write=False).text.tokens == 127
    for folder_name, source in (("jam", jam_folder), ("text", text)):
        shutil.copytree(source, tmp_path / folder_name)
    for folder_name in ("jam", "text"):  # no <s>: a letter is one token, and nothing is predicted
        content = json.loads((tmp_path / folder_name / "tokenizer.json").read_text())
        content["post_processor"] = None
        (tmp_path / folder_name / "tokenizer.json").write_text(json.dumps(content))
    path.write_text("a\n\nb\n\na ruby", encoding="utf-8")
    found = certify(tmp_path / "jam", tmp_path / "text", texts=path, write=False).text
    assert found.documents == 1
    path.write_text("a\n\nb", encoding="utf-8")
    with pytest.raises(ValueError, match="No document of texts.txt has more than one token"):
        certify(tmp_path / "jam", tmp_path / "text", texts=path, write=False)


def test_pictures_of_all_kinds(fused, parents, tmp_path):
    """Any side lengths and modes, one batch: as if each had been saved as an opaque RGB picture before."""
    rng, originals, plain = np.random.default_rng(1), tmp_path / "originals", tmp_path / "plain"
    originals.mkdir(), plain.mkdir()

    def noise(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)

    pictures = {
        "wide.png": Image.fromarray(noise(24, 90, 3)),
        "tall.jpg": Image.fromarray(noise(70, 20, 3)),
        "grey.png": Image.fromarray(noise(30, 30)),
        "grey.jpg": Image.fromarray(noise(30, 30)),
        "alpha.png": Image.fromarray(noise(30, 30, 4)),
        "grey and alpha.png": Image.fromarray(noise(30, 30, 2)),
        "grey of 16 bits.png": Image.fromarray(noise(30, 30).astype(np.uint16) * 257),
        "cmyk.jpg": Image.fromarray(noise(30, 30, 4), "CMYK"),
        "black and white.png": Image.fromarray(noise(30, 30)).convert("1"),
        "palette.gif": Image.fromarray(noise(30, 30, 3)).convert("P"),
        "é.webp": Image.fromarray(noise(30, 30, 3)),
        "one pixel.png": Image.fromarray(noise(1, 1, 3)),
        "strip.png": Image.fromarray(noise(2, 500, 3)),
    }
    lines = {originals: ["\ufeff"], plain: []}
    for index, (name, picture) in enumerate(pictures.items()):
        picture.save(originals / name)
        opened = Image.open(originals / name)
        if opened.mode.startswith("I"):
            opened = Image.fromarray((np.asarray(opened) / 257).round().astype(np.uint8))
        opened = opened.convert("RGBA")
        Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened).convert("RGB").save(
            plain / f"{index}.png"
        )
        caption = ("a ruby", "", "a\u2028b\x85 c\nd", "<break> <image>")[index % 4]
        for folder_name, file in ((originals, name), (plain, f"{index}.png")):
            lines[folder_name].append(
                json.dumps({"file_name": file, "text": caption}, ensure_ascii=folder_name == plain)
            )
    lines[originals][:2] = ["".join(lines[originals][:2])]
    (originals / "metadata.jsonl").write_bytes("\r\n".join(lines[originals]).encode())
    (plain / "metadata.jsonl").write_text("\n".join(lines[plain]))
    found = [
        certify(fused("llama", "uniform", "average"), image_parent=parents("llama")[1], pairs=source, write=False).image
        for source in (originals, plain)
    ]
    assert (found[0].kl, found[0].parent_nll) == (found[1].kl, found[1].parent_nll)
    assert found[0].documents == len(pictures)


# ----- the card -------------------------------------------------------------------------------------------------------


def test_the_card_gets_one_section_and_keeps_the_rest(folder, parents, texts, pairs):
    jam_folder, (text, image) = folder(), parents("llama")
    card = jam_folder / "README.md"
    before = card.read_bytes() + "\r\nA line from Windows, é.\r\n\n## After\n".encode()
    card.write_bytes(before)
    files = sorted(p.name for p in jam_folder.iterdir())
    found = certify(jam_folder, text, image, texts, pairs)
    written = card.read_bytes()
    assert written.startswith(before) and written.decode().count("## Retention") == 1
    section = written.decode()[len(before.decode()) :]
    for words in (
        "some texts.txt",
        "some pairs",
        "| text | image |",
        "jam_hf 0.",
        found.table(),
        SECTION_START,
        SECTION_END,
    ):
        assert words in section
    assert str(texts.parent) not in section and str(text.parent) not in section
    card.write_bytes(written + b"more\r\n")  # the second section takes the first one's place
    certify(jam_folder, text_parent=text, texts=texts)
    again = card.read_bytes()
    assert again.startswith(before + b"\n" + SECTION_START.encode()) and again.endswith(
        SECTION_END.encode() + b"\nmore\r\n"
    )
    assert again.count(b"## Retention") == 1 and b"image codes |" not in again
    assert sorted(p.name for p in jam_folder.iterdir()) == files


def test_a_folder_without_a_card_gets_one(folder, parents, texts):
    jam_folder = folder()
    (jam_folder / "README.md").unlink()
    certify(jam_folder, text_parent=parents("llama")[0], texts=texts)
    card = (jam_folder / "README.md").read_text()
    assert (
        card.startswith("---\n") and "| text parent |" in card and card.count(SECTION_START) == 1
    )  # that of its fusion


@pytest.mark.parametrize("where", ["measuring", "writing"])
def test_an_interruption_leaves_the_card_as_it_was(where, folder, parents, texts, monkeypatch):
    jam_folder = folder()
    before = {path.name: path.read_bytes() for path in jam_folder.iterdir()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    if where == "measuring":
        monkeypatch.setattr(retention, "compare_logits", interrupt)
    else:
        monkeypatch.setattr("pathlib.Path.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        certify(jam_folder, text_parent=parents("llama")[0], texts=texts)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in jam_folder.iterdir()} == before


@pytest.mark.parametrize(
    "text", [SECTION_START, SECTION_END, f"{SECTION_END}{SECTION_START}", SECTION_START * 2 + SECTION_END]
)
def test_broken_marks_are_not_guessed_at(text, folder, parents, texts):
    jam_folder = folder()
    (jam_folder / "README.md").write_text(text)
    with pytest.raises(ValueError, match="do not pair up"):
        certify(jam_folder, text_parent=parents("llama")[0], texts=texts)
    assert (jam_folder / "README.md").read_text() == text


def test_the_command(folder, parents, texts, pairs, capsys):
    jam_folder, (text, image) = folder(), parents("llama")
    before = (jam_folder / "README.md").read_bytes()
    arguments = ["certify", "--model", str(jam_folder), "--text-parent", str(text), "--texts", str(texts)]
    assert main([*arguments, "--no-write", "--max-documents", "2"]) == 0
    assert "| documents | 2 |" in capsys.readouterr().out and (jam_folder / "README.md").read_bytes() == before
    assert main([*arguments, "--image-parent", str(image), "--pairs", str(pairs), "--device", "cpu"]) == 0
    assert "perplexity of the fusion" in capsys.readouterr().out
    assert main([*arguments[:5]]) == 2
    assert "texts is not" in capsys.readouterr().err


# ----- what does not fit ----------------------------------------------------------------------------------------------


def test_files_that_are_not_what_they_should_be(fused, parents, texts, pairs, tmp_path):
    jam_folder, (text, image) = fused("llama", "cross", "preserving"), parents("llama")

    def texts_error(match, content=b"", **kwargs):
        path = tmp_path / "file.txt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            certify(jam_folder, text_parent=text, texts=path, write=False, **kwargs)

    texts_error("is empty")
    texts_error("is empty", b"\n \n\n")
    texts_error("not UTF-8: line 1 holds the byte 0xFF at character 5", b"abc \xff\xfe")
    texts_error("not UTF-8: line 3001 holds the byte 0xE9 at character 2", b"a ruby\r\n" * 3000 + b"a\xe9")
    texts_error("not UTF-8: line 1 ", "a ruby".encode("utf-16"))
    for device, reason in (("gpu", "'gpu' cannot be used"), ("meta", "'meta' cannot be used")):
        texts_error(reason, b"fine", device=device)
    texts_error("Document 1 of file.txt holds '<img:3>'", b"fine\n\na <img:3>")
    texts_error("only 128 positions", b"fine", max_tokens=129)
    with pytest.raises(ValueError, match="There is no text file"):
        certify(jam_folder, text_parent=text, texts=tmp_path / "none.txt", write=False)

    def pairs_error(match, source):
        with pytest.raises(ValueError, match=match):
            certify(jam_folder, image_parent=image, pairs=source, write=False)

    pairs_error("holds no pairs", tmp_path)
    pairs_error("There is no folder", tmp_path / "none")
    pairs_error("There is no folder", tmp_path / "file.txt")
    broken = tmp_path / "broken"
    shutil.copytree(pairs, broken)
    (broken / "3.png").unlink()
    pairs_error("names files that are not there: 1 of 5, e.g. .*3.png", broken)
    (broken / "3.png").write_bytes(b"no picture")
    pairs_error("Pair 3 of broken: Cannot read a picture from .*3.png", broken)
    whole = (broken / "2.png").read_bytes()
    (broken / "2.png").write_bytes(whole[: len(whole) // 2])
    pairs_error("Pair 2 of broken: Cannot read a picture from .*2.png", broken)
    (broken / "metadata.jsonl").write_text('{"file_name": "0.png"}\n')
    pairs_error("line 1: expected the strings", broken)
    (broken / "metadata.jsonl").write_text("{")
    pairs_error("line 1 is no JSON", broken)
    for line, match in (
        ('{"file_name": "0.png", "text": "a"},', "line 2 is no JSON"),
        ("[" * 100_000, "line 2 is no JSON"),
        ("[1]", "line 2: expected the strings"),
        ('{"file_name": "0.png", "text": 3}', "line 2: expected the strings"),
        ('{"file_name": "0.png", "text": "a \\ud83d"}', "line 2: the caption has half of a UTF-16 pair"),
        ('{"file_name": "", "text": "a"}', "line 2 names '', which is not the name of a file in the folder"),
    ):
        (broken / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "text": "a"}}\n{line}')
        pairs_error(match, broken)
    (broken / "metadata.jsonl").write_bytes('{"file_name": "0.png", "text": "é"}'.encode("latin-1"))
    pairs_error("not UTF-8: line 1 holds the byte 0xE9", broken)
    (broken / "metadata.jsonl").write_text("\n \n")
    pairs_error("is empty", broken)
    rows = [
        {"file_name": "2.png", "text": "a"},
        {"file_name": "0.png", "text": "red " * 200},
    ]  # before a picture is opened
    (broken / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs_error("Pair 1 of broken has .* more than the 128 positions of LlamaForCausalLM", broken)
    Dataset.from_dict({"image": [], "text": []}).save_to_disk(tmp_path / "no rows")
    pairs_error("'.*no rows' is empty or damaged", tmp_path / "no rows")
    Dataset.from_dict({"image": [str(pairs / "0.png"), None], "text": ["a", "b"]}).save_to_disk(tmp_path / "no picture")
    pairs_error("holds no pictures but .* Cast it to", tmp_path / "no picture")
    Dataset.from_dict({"image": ["a"], "caption": ["b"]}).save_to_disk(tmp_path / "columns")
    pairs_error("no column text; it has image, caption", tmp_path / "columns")


def test_models_that_do_not_fit(fused, parents, tokenizer, texts, pairs, tmp_path):
    jam_folder, (text, image) = fused("llama", "cross", "preserving"), parents("llama")
    with pytest.raises(ValueError, match="is a 'llama', not a JAM"):
        certify(text, text_parent=text, texts=texts, write=False)
    with pytest.raises(ValueError, match="is not a folder"):
        certify(jam_folder, text_parent=tmp_path / "none", texts=texts, write=False)
    with pytest.raises(ValueError, match="no checkpoint that transformers can read"):
        certify(jam_folder, text_parent=tmp_path, texts=texts, write=False)
    parent_model("llama", len(tokenizer) + 1, seed=1).save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match=f"{len(tokenizer) + 1} ids, the JAM one of {len(tokenizer)}"):
        certify(jam_folder, text_parent=tmp_path / "larger", texts=texts, write=False)
    with pytest.raises(ValueError, match="larger has a vocabulary of .* brings no tokenizer"):
        certify(jam_folder, image_parent=tmp_path / "larger", pairs=pairs, write=False)
    shutil.copytree(text, tmp_path / "reordered")
    content = json.loads((text / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "reordered" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="gives 2 tokens of the text parent reordered other ids"):
        certify(jam_folder, text_parent=tmp_path / "reordered", texts=texts, write=False)
    shutil.copytree(image, tmp_path / "more layers")
    config = json.loads((image / "config.json").read_text())
    (tmp_path / "more layers" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="lacks 9 weights of a LlamaForCausalLM"):
        certify(jam_folder, image_parent=tmp_path / "more layers", pairs=pairs, write=False)
    infinite = AutoModelForCausalLM.from_pretrained(text)
    with torch.no_grad():
        infinite.model.norm.weight[0] = float("nan")
    infinite.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match="likelihoods of nan on some texts.txt are nan"):
        certify(jam_folder, text_parent=tmp_path / "nan", texts=texts, write=False)


def test_another_number_of_codes_is_refused(fused, other_parents, pairs, tmp_path):
    for kind in ("chameleon", "emu3"):
        source = tmp_path / kind
        shutil.copytree(other_parents(kind)[0], source)
        config = json.loads((source / "config.json").read_text())
        config["vocabulary_map"].pop(_CODES[kind][-1])
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"{kind} has {NUM_CODES - 1} image codes, the VQ model {NUM_CODES}"):
            certify(fused("llama", "cross", "preserving"), image_parent=source, pairs=pairs, write=False)


def test_arguments(fused, parents, texts, pairs):
    jam_folder, text = fused("llama", "cross", "preserving"), parents("llama")[0]
    for match, arguments in (
        ("nothing to measure", {}),
        ("text_parent is given, texts is not", {"text_parent": text}),
        ("pairs is given, image_parent is not", {"pairs": pairs}),
        ("batch_size must be at least 1", {"text_parent": text, "texts": texts, "batch_size": 0}),
        ("max_documents must be at least 1", {"text_parent": text, "texts": texts, "max_documents": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            certify(jam_folder, write=False, **arguments)
    with pytest.raises(ValueError, match="no model card to write to"):
        certify("someone/a-jam", text_parent=text, texts=texts)
