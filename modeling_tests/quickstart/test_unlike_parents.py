"""The quickstart of a Qwen2 and a Chameleon with different tokenizers, on its small settings: every stage, offline."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    ChameleonForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)

import jam_hf.quickstart.unlike_parents as parents
from jam_hf import JamForCausalLM, JamProcessor
from jam_hf.fusion.fuse import plan_fusion
from jam_hf.fusion.parents import code_ids
from jam_hf.quickstart.measurements import draw_with_chameleon
from jam_hf.quickstart.page import verdicts
from jam_hf.quickstart.pairs import parents_of
from jam_hf.quickstart.stages import STAGES, QuickstartSettings, Run, results, run_all, run_stage
from jam_hf.quickstart.unlike_parents import with_image_logits
from jam_hf.training.tokenizer import byte_level_bpe
from jam_hf.training.vq import encode_images
from jam_hf_cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("runs") / "unlike", QuickstartSettings.of_family("unlike", small=True))
    run_all(run)
    return run


@pytest.fixture(scope="module")
def llm(run):
    return Qwen2ForCausalLM.from_pretrained(run.path("llm")).eval()


@pytest.fixture(scope="module")
def chameleon(run):
    return ChameleonForConditionalGeneration.from_pretrained(run.path("image-model")).eval()


@pytest.fixture(scope="module")
def fused(run):
    return JamForCausalLM.from_pretrained(run.path("fused") / "jam-cross").eval()


@pytest.fixture(scope="module")
def tokenizers(run):
    """Of the JAM, the LLM parent, the image parent."""
    return [AutoTokenizer.from_pretrained(run.path(name)) for name in ("fused/jam-cross", "llm", "image-model")]


def rows_of_codes(chameleon, tokenizers, run):
    config = chameleon.config
    return code_ids(config, config.vocab_size, run.settings.num_codes, tokenizers[2], None, "image parent")


def test_every_stage_leaves_its_result_and_is_not_run_again(run):
    assert all(path.exists() for name in STAGES for path in results(run, name))
    assert [name for name in STAGES if run_stage(run, name)] == ["page"]
    assert set(json.loads((run.folder / "times.json").read_text())) == set(STAGES)


def test_the_parents_have_nothing_in_common(run, llm, chameleon, tokenizers):
    architectures = [AutoConfig.from_pretrained(run.path(name)).architectures for name in ("llm", "image-model")]
    assert architectures == [["Qwen2ForCausalLM"], ["ChameleonForConditionalGeneration"]]
    names = set(chameleon.state_dict())
    assert "model.layers.0.self_attn.q_norm.weight" in names and "model.layers.0.self_attn.q_proj.bias" not in names
    assert "model.layers.0.self_attn.q_proj.bias" in llm.state_dict()
    ours, theirs = llm.config, chameleon.config
    assert ours.num_key_value_heads < ours.num_attention_heads and ours.tie_word_embeddings
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        assert getattr(ours, field) != getattr(theirs, field), field
    _, text, image = tokenizers
    assert ours.vocab_size > len(text) and text.bos_token is None and text.pad_token_id == text.eos_token_id
    assert not {"<break>", "<image>", "<mask>", "<s>"} & set(text.get_vocab())
    assert {"<racm3:break>", "<eoss>", "<s>"} <= set(image.get_vocab())
    assert not any(text.get_vocab().get(token) == index for token, index in image.get_vocab().items())
    codes = rows_of_codes(chameleon, tokenizers, run)
    assert not torch.equal(codes, codes.sort().values) and image.convert_ids_to_tokens(int(codes[17])) == "IMGIMGBHZ"


def test_a_fusion_gives_both_parents_logits_bit_for_bit(run, llm, chameleon, fused, tokenizers):
    jam, text, image = tokenizers
    sentence = run.data("texts")["validation"]["text"][0]
    ids = torch.tensor([text(sentence)["input_ids"]])
    assert jam(sentence)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        expected, found = llm(input_ids=ids).logits, fused(input_ids=ids).logits
    assert torch.equal(found[..., : expected.shape[-1]], expected)

    both = sorted(t for t in set(jam.get_vocab()) & set(image.get_vocab()) if re.fullmatch("\u0120?[a-z]{2,}", t))[:8]
    assert len(both) == 8
    config, rows = fused.config, rows_of_codes(chameleon, tokenizers, run)
    codes = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:9]
    mine = [*jam.convert_tokens_to_ids(both), config.break_token_id, *(codes + config.image_token_offset).tolist()]
    theirs = [*image.convert_tokens_to_ids([*both, "<racm3:break>"]), *rows[codes].tolist()]
    with torch.no_grad():
        states = chameleon.model(input_ids=torch.tensor([theirs])).last_hidden_state
        expected = chameleon.lm_head(states)[..., rows]
        found = fused(input_ids=torch.tensor([mine])).logits[..., config.image_token_offset :][..., : len(rows)]
    assert torch.equal(found, expected)


def test_the_report_says_what_the_vocabularies_share(run, tokenizers):
    report = (run.path("fused") / "report.txt").read_text()
    total = int(re.search(r"rows of the image parent for (\d+) text tokens", report)[1])
    ways = ("same text", "mean of pieces", "same role or declared", "none")
    counts = dict(re.findall(rf"^    ({'|'.join(ways)})[^\n]*?: (\d+) \(", report, re.MULTILINE))
    assert set(counts) == set(ways)
    assert sum(map(int, counts.values())) == total and int(counts["none"]) == 3  # the roles of the chat template
    assert "1:0x 2:1" in report  # three text layers, two image layers


def test_the_jams_documents_hold_the_same_captions_and_codes(run, fused, chameleon, tokenizers):
    config, jam, rows = fused.config, tokenizers[0], rows_of_codes(chameleon, tokenizers, run)
    pairs = run.data("pairs")["validation"]
    ours, theirs = parents_of(run).documents("pairs"), parents_of(run).parents_documents("image-model", "pairs")
    codes = encode_images(run.vq(), pairs["image"])
    for index, caption in enumerate(pairs["caption"]):
        picture = [config.break_token_id, *(codes[index] + config.image_token_offset), config.image_end_token_id]
        assert ours["validation"][index]["input_ids"] == [*jam(caption)["input_ids"], *picture, jam.eos_token_id]
        image = tokenizers[2]
        picture = [
            *image.convert_tokens_to_ids(["<racm3:break>"]),
            *rows[codes[index]],
            image.convert_tokens_to_ids("<eoss>"),
        ]
        expected = [
            image.bos_token_id,
            *image(caption, add_special_tokens=False)["input_ids"],
            *picture,
            image.eos_token_id,
        ]
        assert theirs["validation"][index]["input_ids"] == expected
    assert config.image_end_token_id != config.break_token_id and config.bos_token_id is None
    texts, own = parents_of(run).documents("texts"), parents_of(run).parents_documents("llm", "texts")
    assert any("1" in text for text in run.data("texts")["train"]["text"])
    assert all(texts[split]["input_ids"] == own[split]["input_ids"] for split in own)  # numbers are split alike, too
    howto = parents_of(run).documents("howtos")["train"][0]["input_ids"]
    assert howto.count(config.break_token_id) == howto.count(config.image_end_token_id) > 1
    assert jam.convert_ids_to_tokens(howto[0]) == "<|user|>" and "<|assistant|>" in jam.convert_ids_to_tokens(howto)


def test_the_image_parent_learns_its_codes(run, chameleon, tokenizers):
    """The class's own loss puts minus infinity on them; ours is that of the plain head, and the codes' rows have
    moved.
    """
    lesson = parents_of(run).image_model()
    batch = replace(lesson.collator, cm3=None)([lesson.documents[0], lesson.documents[1]])
    model = lesson.model.eval()
    with torch.no_grad():
        loss = model(**batch).loss
        states = model.model(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
        logits = model.lm_head(states)[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
        masked = chameleon(**batch).loss
    torch.testing.assert_close(loss, expected)
    assert loss < 10 < masked
    rows = rows_of_codes(chameleon, tokenizers, run)
    used = sorted({code for row in lesson.documents["input_ids"] for code in row} & set(rows.tolist()))
    assert bool((model.lm_head.weight[used] != chameleon.lm_head.weight[used]).any(1).all())
    vq = [(name, tensor) for name, tensor in chameleon.state_dict().items() if "vqmodel" in name]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in vq)


def test_the_image_parents_own_drawing_against_a_slow_loop(run, tokenizers):
    model = ChameleonForConditionalGeneration.from_pretrained(run.path("image-model")).eval()
    image, vq, rows = tokenizers[2], run.vq(), rows_of_codes(model, tokenizers, run)
    captions = ["a small red circle", "a large blue square in the bottom right on a white background"]
    drawn = draw_with_chameleon(model, image, vq, captions)
    for caption, picture in zip(captions, drawn):
        ids, codes = [*image(caption)["input_ids"], image.convert_tokens_to_ids("<racm3:break>")], []
        for _ in range(36):
            with torch.no_grad():
                logits = model.lm_head(model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])[rows]
            codes.append(int(logits.argmax()))
            ids.append(int(rows[codes[-1]]))
        expected = vq.decode(torch.tensor([codes])).clamp(-1, 1)
        pixels = ((expected[0].permute(1, 2, 0).detach().numpy() + 1) * 127.5).round()
        assert np.abs(np.asarray(picture, dtype=np.float32) - pixels).max() <= 1


def test_figures_and_page(run):
    results = json.loads((run.folder / "results.json").read_text())
    models = results["models"]
    expected = ["LLM parent", "image parent", "jam-cross preserving, fused", "jam-cross, stage 1", "jam-cross, stage 2"]
    assert list(models) == expected
    assert models["jam-cross preserving, fused"]["kl_to_llm"] == pytest.approx(0, abs=1e-9)
    assert models["jam-cross preserving, fused"]["kl_to_image_parent"] > 0  # it reads captions in other tokens
    assert len(verdicts(results)) == 7
    page = (run.folder / "index.html").read_text()
    assert "Image perplexity of jam-cross" in page and "Qwen2" in page and "mean of pieces" in page
    assert page.count("<svg") == 5 and "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_guidance_without_a_bos(run):
    model, processor = (c.from_pretrained(run.path("jam-cross")) for c in (JamForCausalLM, JamProcessor))
    inputs = processor(text=["a red circle", "a small blue square"], padding=True, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, generation_mode="image", guidance_scale=2.0, do_sample=False)
    segments = processor.post_process_interleaved(output, model, prompt_length=length)
    assert [[s["type"] for s in row] for row in segments] == [["image"], ["image"]]
    assert all(row[0]["image"] is not None for row in segments)


def test_an_interrupted_fusion_leaves_nothing_and_goes_on(run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("fused"))
    other = Run(folder, run.settings)

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parents, "encode_documents", stopped)
        run_stage(other, "fuse")
    assert not other.path("fused").exists()
    assert run_stage(other, "fuse")
    for name in ("texts", "pairs", "howtos"):
        for split, documents in parents_of(run).documents(name).items():
            assert parents_of(other).documents(name)[split]["input_ids"] == documents["input_ids"]
    weights = "jam-cross/model.safetensors"
    assert (folder / "fused" / weights).read_bytes() == (run.folder / "fused" / weights).read_bytes()


def test_command_line_and_settings(run, tmp_path, capsys):
    arguments = ["--run", str(run.folder), "--small"]
    assert main(["pretrain", *arguments, "--family", "unlike"]) == 0
    assert "already" in capsys.readouterr().out
    assert main(["pretrain", *arguments]) == 2
    assert re.search(r"other settings \(.*family.*image_parent", capsys.readouterr().err)
    assert main(["quickstart", "--run", str(tmp_path / "run"), "--small", "--family", "unlike", "--train-all"]) == 2
    assert "jam-cross only" in capsys.readouterr().err and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="family must be one of llama, opt, unlike, got 'gemma'"):
        QuickstartSettings(family="gemma")
    with pytest.raises(ValueError, match="need each other"):
        QuickstartSettings(family="unlike")


def test_with_image_logits_saves_nothing_of_its_own(run, tmp_path):
    model = with_image_logits(ChameleonForConditionalGeneration.from_pretrained(run.path("image-model")))
    model.save_pretrained(tmp_path)
    again = ChameleonForConditionalGeneration.from_pretrained(tmp_path)
    assert len(again.model.vocabulary_mapping.image_tokens) == run.settings.num_codes


def test_a_tokenizer_that_transformers_reads_otherwise_is_warned_of(run, tmp_path):
    """Beside the config of a Qwen2, numbers are split as Qwen2 splits them, whatever tokenizer.json says."""
    folder = tmp_path / "llm"
    shutil.copytree(run.path("llm"), folder, ignore=shutil.ignore_patterns("tokenizer*"))
    texts = run.data("texts")["train"]["text"]
    own = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, 400, ["<|endoftext|>"]),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    own.save_pretrained(folder)
    settings = {"mode": "cross", "vq_model": run.path("vq")}

    def warnings(text, **more):
        plan = plan_fusion(text, run.path("image-model"), **settings, **more)
        return [warning for warning in plan.warnings if "splits text otherwise" in warning]

    assert not warnings(run.path("llm"))
    (found,) = warnings(folder)
    assert "tokenizer of the text parent as a Qwen2Tokenizer" in found and "pass tokenizer=" in found
    again = PreTrainedTokenizerFast.from_pretrained(folder)
    assert again("Step 12")["input_ids"] == own("Step 12")["input_ids"] and not warnings(folder, tokenizer=again)
