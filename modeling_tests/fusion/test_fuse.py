"""Fusion: each tensor against a definition of a line or two, whole folders or none, and parents that do not fit."""

import json

import pytest
import torch
from conftest import FAMILIES, FUSIONS, NUM_CODES, parent_model, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

import jam_hf
from jam_hf import JamForCausalLM


def _states(family, parents):
    return [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in parents(family)]


def _key(family, rest):
    return ("model.decoder." if family.startswith("opt") else "model.") + rest


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mode", "init"), FUSIONS)
@pytest.mark.sampled
def test_a_fusion_loads_without_missing_or_unexpected_weights(family, mode, init, fused):
    model, info = JamForCausalLM.from_pretrained(fused(family, mode, init), output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.fusion_mode == mode


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_uniform_is_the_mean(family, parents, fused):
    text, image = _states(family, parents)
    state = JamForCausalLM.from_pretrained(fused(family, "uniform", "average")).state_dict()
    for key, tensor in text.items():
        ours = state[key.replace("model.decoder.", "model.").replace("model.", "model.language_model.", 1)]
        torch.testing.assert_close(ours, (tensor + image[key]) / 2)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("init", ["copy", "average", "block_diagonal"])
def test_width_follows_its_block_rule(family, init, parents, fused):
    text, image = _states(family, parents)
    state = JamForCausalLM.from_pretrained(fused(family, "width", init)).state_dict()
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj" if family == "llama" else "fc2"):
        rest = f"layers.1.{name}.weight"
        a, b = text[_key(family, rest)], image[_key(family, rest)]
        right = {"copy": (a, b), "average": ((a + b) / 2,) * 2, "block_diagonal": (torch.zeros_like(a), b)}[init]
        left = (a, torch.zeros_like(b)) if init == "block_diagonal" else (a, b)
        expected = torch.cat((torch.cat((left[0], right[0]), 1), torch.cat((left[1], right[1]), 1)), 0)
        torch.testing.assert_close(state[f"model.language_model.{rest}"], expected)
    rest = "embed_tokens.weight"
    expected = torch.cat((text[_key(family, rest)], image[_key(family, rest)]), dim=1)
    assert torch.equal(state[f"model.language_model.{rest}"], expected)


def test_width_block_diagonal_keeps_heads_with_their_keys(parents, fused):
    """Grouped-query attention: in a block-diagonal layer, each half attends as its parent does (before the norms)."""
    text, image = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in parents("llama"))
    model = JamForCausalLM.from_pretrained(fused("llama", "width", "block_diagonal")).eval()
    hidden = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6)[None]
    with torch.no_grad():
        halves = []
        for parent, part in ((text, hidden[..., :32]), (image, hidden[..., 32:])):
            rotary = parent.model.rotary_emb(part, positions)
            halves.append(parent.model.layers[0].self_attn(part, position_embeddings=rotary)[0])
        decoder = model.model.language_model
        ours = decoder.layers[0].self_attn(hidden, position_embeddings=decoder.rotary_emb(hidden, positions))[0]
    torch.testing.assert_close(ours, torch.cat(halves, dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt-paper"])
def test_cross_paper_shares_rows_and_draws_its_projection(family, parents, fused):
    text, image = _states(family, parents)
    model = JamForCausalLM.from_pretrained(fused(family, "cross", "paper"))
    first = model.config.image_token_offset
    embed = model.model.language_model.embed_tokens.weight
    key = _key(family, "embed_tokens.weight")
    assert torch.equal(embed[:first], text[key][:first]) and torch.equal(embed[first:], image[key][first:])
    projection = model.model.language_model.output_projection.weight
    assert projection.shape == (32, 64)
    assert projection.std().item() == pytest.approx(32**-0.5, rel=0.1)
    block = model.model.language_model.layers[0].text_cross
    assert block.mlp.down_proj.weight.std() > 0 and model.model.language_model.layers[1].text_cross is None
    assert not any(p.dim() == 1 and "bias" in n for n, p in block.named_parameters())


def test_cross_preserving_starts_its_blocks_at_zero(fused):
    model = JamForCausalLM.from_pretrained(fused("llama", "cross", "preserving"))
    for layer in model.model.language_model.layers:
        for block in (layer.text_cross, layer.image_cross):
            if block is not None:
                assert not block.cross_attn.o_proj.weight.any() and not block.mlp.down_proj.weight.any()
                assert block.cross_attn.q_proj.weight.any()


def test_models_in_memory_and_shards(parents, vq, tokenizer, tmp_path):
    text, image = (AutoModelForCausalLM.from_pretrained(folder) for folder in parents("llama"))
    whole = jam_hf.fuse(text, image, "cross", tmp_path / "whole", vq_model=vq, tokenizer=tokenizer)
    folders = parents("llama")
    sharded = jam_hf.fuse(*folders, "cross", tmp_path / "sharded", vq_model=vq, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2 and (sharded / "model.safetensors.index.json").is_file()
    a, b = (JamForCausalLM.from_pretrained(f).state_dict() for f in (whole, sharded))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_same_seed_gives_the_same_bytes(parents, vq, tmp_path):
    for name in ("one", "two"):
        jam_hf.fuse(*parents("llama"), "cross", tmp_path / name, init="paper", vq_model=vq, seed=5)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_different_widths_and_heads_cross(tokenizer, parents, vq, tmp_path):
    image = parent_model("llama", len(tokenizer), 5, hidden_size=24, num_attention_heads=6, num_key_value_heads=3)
    text = AutoModelForCausalLM.from_pretrained(parents("llama")[0]).eval()
    jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq, tokenizer=tokenizer)
    model = JamForCausalLM.from_pretrained(tmp_path / "jam").eval()
    ids, first = torch.arange(20, 34)[None], model.config.image_token_offset
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        assert torch.equal(ours[..., :first], text(input_ids=ids).logits[..., :first])
        assert torch.equal(ours[..., first:], image(input_ids=ids).logits[..., first:])


@pytest.mark.parametrize("depths", [(2, 5), (5, 2), (3, 5)])
def test_streams_of_unequal_depth_keep_their_windows(depths, tokenizer, vq, tmp_path):
    """Windows of another size in each stream, layer by layer in one of them; caches hold no more and no less than
    they need.
    """
    common = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    common |= {
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    text = Qwen2ForCausalLM(Qwen2Config(**common, **windows, num_hidden_layers=depths[0]))
    image = MistralForCausalLM(MistralConfig(**common, sliding_window=6, num_hidden_layers=depths[1]))
    for seed, parent in enumerate((text, image)):
        randomise(parent.eval(), seed)
    jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq, tokenizer=tokenizer)
    model = JamForCausalLM.from_pretrained(tmp_path / "jam").eval()
    ids, first = torch.arange(20, 44)[None], model.config.image_token_offset
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        assert torch.equal(ours[..., :first], text(input_ids=ids).logits[..., :first])
        assert torch.equal(ours[..., first:], image(input_ids=ids).logits[..., first:])
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=24)):
            steps = [
                model(input_ids=ids[:, at : at + 1], past_key_values=cache, position_ids=torch.tensor([[at]])).logits
                for at in range(ids.shape[1])
            ]
            torch.testing.assert_close(torch.cat(steps, dim=1), ours, rtol=1e-4, atol=1e-4)


# ----- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "changes", "words"),
    [
        ("uniform", {"hidden_size": 64}, ["hidden_size: 32 and 64", "text parent", "image parent"]),
        ("width", {"num_hidden_layers": 2}, ["num_hidden_layers: 3 and 2"]),
        ("cross", {"vocab_size": 400}, ["vocab_size", "400", "image_tokenizer=..."]),
        ("uniform", {"intermediate_size": 64, "num_key_value_heads": 4}, ["intermediate_size", "num_key_value_heads"]),
    ],
)
def test_parents_that_differ_are_named(mode, changes, words, parents, vq, tokenizer, tmp_path):
    text, _ = parents("llama")
    image = parent_model(
        "llama",
        changes.get("vocab_size", len(tokenizer)),
        3,
        **{k: v for k, v in changes.items() if k != "vocab_size"},
    )
    image.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError) as error:
        jam_hf.fuse(text, tmp_path / "other", mode, tmp_path / "jam", vq_model=vq)
    for word in [*words, str(text), "other"]:
        assert word in str(error.value)
    assert not (tmp_path / "jam").exists()


def test_bad_arguments(parents, vq, tmp_path):
    text, image = parents("llama")
    out = tmp_path / "jam"
    with pytest.raises(ValueError, match="mode must be one of 'uniform', 'width', 'cross', got 'sum'"):
        jam_hf.fuse(text, image, "sum", out, vq_model=vq)
    with pytest.raises(ValueError, match="'copy', 'average', 'block_diagonal', got 'paper'"):
        jam_hf.fuse(text, image, "width", out, init="paper", vq_model=vq)
    with pytest.raises(ValueError, match="vq_model is missing"):
        jam_hf.fuse(text, image, "cross", out)
    with pytest.raises(ValueError, match="family 'gpt2', which is not supported here. Supported: llama, mistral"):
        from transformers import GPT2Config, GPT2LMHeadModel

        gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20))
        jam_hf.fuse(text, gpt2, "cross", out, vq_model=vq)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no checkpoint: it has no config.json"):
        jam_hf.fuse(tmp_path / "empty", image, "cross", out, vq_model=vq)
    with pytest.raises(ValueError, match="not a folder"):
        jam_hf.fuse(tmp_path / "absent", image, "cross", out, vq_model=vq)
    with pytest.raises(ValueError, match="also an input"):
        jam_hf.fuse(text, image, "cross", image, vq_model=vq)
    half = {key: value for key, value in vq.state_dict().items() if ".decoder." not in key}
    vq.save_pretrained(tmp_path / "half", state_dict=half)
    with pytest.raises(ValueError, match="VQ model '.*half' lacks [0-9]+ weights of a JamVQModel"):
        jam_hf.fuse(text, image, "cross", out, vq_model=tmp_path / "half")
    assert not out.exists()


def test_an_output_folder_in_use_is_kept(parents, vq, tmp_path):
    out = tmp_path / "jam"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        jam_hf.fuse(*parents("llama"), "uniform", out, vq_model=vq)
    assert (out / "mine.txt").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["jam"]
    jam_hf.fuse(*parents("llama"), "uniform", out, vq_model=vq, overwrite=True)
    assert (out / "config.json").is_file() and not (out / "mine.txt").exists()


def _damaged(parents, tmp_path, change):
    """A copy of the text parent whose tensors went through `change`."""
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(parents("llama")[0], folder)
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: {k: v for k, v in s.items() if "layers.1.mlp.up_proj" not in k},
            "no tensor 'model.layers.1.mlp.up_proj.weight'",
        ),
        (lambda s: {**s, "model.extra.weight": torch.ones(2)}, "no place for: model.extra.weight"),
        (lambda s: {**s, "model.norm.weight": s["model.norm.weight"] * float("nan")}, "norm.weight"),
    ],
)
def test_damaged_parents_leave_nothing_behind(change, words, parents, vq, tmp_path):
    folder = _damaged(parents, tmp_path, change)
    with pytest.raises(ValueError) as error:
        jam_hf.fuse(folder, parents("llama")[1], "cross", tmp_path / "jam", vq_model=vq)
    assert words in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


def test_a_truncated_file_is_named(parents, vq, tmp_path):
    folder = _damaged(parents, tmp_path, dict)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        jam_hf.fuse(folder, parents("llama")[1], "cross", tmp_path / "jam", vq_model=vq)


def test_the_checkpoint_is_complete(fused):
    folder = fused("llama", "cross", "preserving")
    names = {p.name for p in folder.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "processor_config.json",
    } <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["JamForCausalLM"] and config["vq_config"]["num_vq_embeddings"] == NUM_CODES
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert any(k.startswith("model.vq_model.") for k in file.keys())


def test_inputs_inside_the_output_folder_are_not_overwritten(parents, vq, tokenizer, tmp_path):
    import shutil

    shutil.copytree(parents("llama")[0], tmp_path / "out" / "text")
    for settings in ({}, {"tokenizer": tmp_path / "out"}):
        with pytest.raises(ValueError, match="input"):
            jam_hf.fuse(
                tmp_path / "out" / "text" if not settings else parents("llama")[0],
                parents("llama")[1],
                "cross",
                tmp_path / "out",
                vq_model=vq,
                overwrite=True,
                **settings,
            )
    assert (tmp_path / "out" / "text" / "model.safetensors").is_file()


def test_dtypes_by_name_and_models_that_are_no_vq(parents, vq, tmp_path):
    text, image = parents("llama")
    jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq, dtype="bfloat16")
    model = JamForCausalLM.from_pretrained(tmp_path / "jam")
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.model.vq_model.dtype == torch.float32
    assert "_name_or_path" not in (tmp_path / "jam" / "config.json").read_text()
    with pytest.raises(ValueError, match="dtype must be a float type"):
        jam_hf.fuse(text, image, "cross", tmp_path / "other", vq_model=vq, dtype="int7")
    with pytest.raises(ValueError, match="got VQModel. A diffusers VQModel goes into"):
        jam_hf.fuse(text, image, "cross", tmp_path / "other", vq_model=vq.vq)
    vq.vq.save_pretrained(tmp_path / "diffusers")
    for folder, kind in ((tmp_path / "diffusers", "VQModel"), (text, "llama")):
        with pytest.raises(ValueError, match=f"is a '{kind}'; expected the folder of a JamVQModel"):
            jam_hf.fuse(text, image, "cross", tmp_path / "other", vq_model=folder)
    (text.parent / "bare").mkdir(exist_ok=True)
    parent_model("llama", 316, 1).save_pretrained(text.parent / "bare")
    with pytest.raises(ValueError, match="No tokenizer can be read from .*bare"):
        jam_hf.fuse(text.parent / "bare", image, "cross", tmp_path / "other", vq_model=vq)


def test_a_vocabulary_without_the_image_codes_is_refused(jam):
    model = jam("llama", "cross", "preserving")
    with pytest.raises(ValueError, match="needs at least 316 ids, got 310"):
        model.resize_token_embeddings(310)
    assert model.resize_token_embeddings(320).num_embeddings == 320


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_makes_is_not(tmp_path):
    import os
    import subprocess
    import sys

    from jam_hf.files import _partial_prefix, whole_folder

    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    for pid in (dead.pid, os.getpid(), "elsewhere"):
        (tmp_path / f"{_partial_prefix(tmp_path / 'jam')}{pid}-abc").mkdir()
    with whole_folder(tmp_path / "jam") as folder:
        (folder / "x").write_text("x")
    assert len(list(tmp_path.glob(".jam.partial-*"))) == 2 and not list(tmp_path.glob(f"*-{dead.pid}-*"))
    assert (tmp_path / "jam" / "x").is_file()
