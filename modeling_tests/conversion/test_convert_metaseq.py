"""metaseq to OPT: an OPT written in metaseq's layout and converted gives the same logits, bit for bit; nothing else
passes.
"""

import argparse
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomise
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from jam_hf.conversion import metaseq as module
from jam_hf.conversion.metaseq import convert_metaseq
from jam_hf_cli import main


KINDS = {
    "opt": {},
    "cm3leon": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "opt-350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "untied": {"tie_word_embeddings": False},
}


def opt(kind="opt", **changes):
    settings = {
        "vocab_size": 48,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "max_position_embeddings": 20,
        "dropout": 0.0,
    }
    model = OPTForCausalLM(OPTConfig(**{**settings, **KINDS[kind], **changes})).eval()
    randomise(model, seed=1)
    return model


def metaseq_parts(model, count, separate=False):
    """metaseq's layout, defined here once more: cut each matrix over the parts, then stack k, v and q of each part."""
    state, parts = model.state_dict(), []
    for part in range(count):
        found = {"decoder.version": torch.tensor([3.0])}
        for key, tensor in state.items():
            name = key.removeprefix("model.").replace("decoder.final_layer_norm", "decoder.layer_norm")
            name = name.replace("lm_head", "decoder.output_projection")
            name = name.replace("project_in", "project_in_dim").replace("project_out", "project_out_dim")
            by_rows = any(
                word in name for word in ("k_proj", "v_proj", "q_proj", "fc1", "embed_tokens", "output_projection")
            )
            by_columns = any(word in name for word in ("out_proj.weight", "fc2.weight"))
            cut = tensor.chunk(count, 0 if by_rows else 1)[part] if by_rows or by_columns else tensor
            found[name] = cut.clone()
        if not separate:
            for name in [n for n in found if "k_proj" in n]:
                k, v, q = (found.pop(name.replace("k_proj", f"{x}_proj")) for x in "kvq")
                found[name.replace("k_proj", "qkv_proj")] = torch.cat((k, v, q))
        parts.append(found)
    return parts


def write(folder, parts, extra=None, prefix="reshard"):
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(parts):
        name = f"{prefix}-model_part-{number}.pt" if len(parts) > 1 else f"{prefix}.pt"
        torch.save({"model": part, **(extra or {})}, folder / name)
    return folder


def logits(model):
    ids = torch.arange(3, 43).view(2, 20) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


OPTIONS = {"num_attention_heads": 8, "activation_function": "relu"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_logits_are_equal_bit_for_bit(kind, count, tmp_path):
    model = opt(kind)
    options = {**OPTIONS, "activation_function": model.config.activation_function, "post_norm": kind == "opt-350m"}
    source = write(tmp_path / "metaseq", metaseq_parts(model, count))
    path = convert_metaseq(source, tmp_path / "opt", max_shard_size="20KB", **options)
    converted, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(converted.eval()), logits(model))
    for name in (
        "enable_bias",
        "layer_norm_elementwise_affine",
        "tie_word_embeddings",
        "word_embed_proj_dim",
        "ffn_dim",
    ):
        assert getattr(converted.config, name) == getattr(model.config, name)
    assert len(list(path.glob("*.safetensors"))) > 1 and (path / "generation_config.json").is_file()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_blocks_of_rows_that_do_not_end_where_parts_end(count, tmp_path, monkeypatch):
    model = opt("untied", vocab_size=44)
    source = write(tmp_path / "metaseq", metaseq_parts(model, count))
    monkeypatch.setattr(
        "jam_hf.checkpoints.tensor_files.BLOCK_BYTES", 5 * 32 * 4
    )  # five rows of the embedding, 2 of fc2
    path = convert_metaseq(source, tmp_path / "opt", vocab_size=42, **OPTIONS)
    converted, expected = AutoModelForCausalLM.from_pretrained(path).state_dict(), model.state_dict()
    for name in ("model.decoder.embed_tokens.weight", "lm_head.weight"):
        expected[name] = expected[name][:42]
    assert converted.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.items())


@pytest.mark.parametrize("count", [1, 2])
def test_separate_projections_and_files_by_name(count, tmp_path):
    model = opt()
    source = write(tmp_path / "metaseq", metaseq_parts(model, count, separate=True))
    files = sorted(source.iterdir(), reverse=True)  # their order is that of their numbers, not of the arguments
    converted = AutoModelForCausalLM.from_pretrained(convert_metaseq(files, tmp_path / "opt", **OPTIONS))
    assert torch.equal(logits(converted.eval()), logits(model))


def test_queries_and_keys_must_not_change_places(tmp_path, monkeypatch):
    """The test of equality is worth something: with q, k, v for the order, it fails."""
    model = opt()
    source = write(tmp_path / "metaseq", metaseq_parts(model, 2))
    monkeypatch.setattr(module, "_THIRDS", {"q_proj": 0, "k_proj": 1, "v_proj": 2})
    converted = AutoModelForCausalLM.from_pretrained(convert_metaseq(source, tmp_path / "opt", **OPTIONS))
    assert not torch.allclose(logits(converted.eval()), logits(model), atol=1e-2)


@pytest.mark.parametrize("as_namespace", [False, True])
def test_settings_in_the_file_are_used(as_namespace, tmp_path):
    settings = {"decoder_attention_heads": 8, "activation_fn": "gelu", "dropout": 0.3, "no_scale_embedding": True}
    settings = argparse.Namespace(**settings) if as_namespace else settings
    model = opt(activation_function="gelu")
    source = write(tmp_path / "metaseq", metaseq_parts(model, 2), {"cfg": {"model": settings}, "extra_state": None})
    converted = AutoModelForCausalLM.from_pretrained(convert_metaseq(source, tmp_path / "opt")).eval()
    assert torch.equal(logits(converted), logits(model)) and converted.config.dropout == 0.3
    with pytest.raises(ValueError, match="given as 4, but the checkpoint says 8"):
        convert_metaseq(source, tmp_path / "other", num_attention_heads=4)
    with pytest.raises(ValueError, match="given as relu, but the checkpoint says gelu"):
        convert_metaseq(source, tmp_path / "other", activation_function="relu")


def test_a_padded_vocabulary_may_be_cut(tmp_path):
    for kind in ("opt", "untied"):
        model = opt(kind)
        source = write(tmp_path / kind, metaseq_parts(model, 2))
        path = convert_metaseq(source, tmp_path / f"{kind}-cut", vocab_size=45, **OPTIONS)
        converted = AutoModelForCausalLM.from_pretrained(path).eval()
        ids = torch.arange(45)[None, :20]
        with torch.no_grad():
            assert torch.equal(converted(input_ids=ids).logits, model(input_ids=ids).logits[..., :45])
    with pytest.raises(ValueError, match="embedding has 48 rows"):
        convert_metaseq(source, tmp_path / "more", vocab_size=49, **OPTIONS)


def test_an_output_projection_that_each_part_has_whole(tmp_path):
    model = opt("untied")
    parts = metaseq_parts(model, 2)
    for part in parts:
        part["decoder.output_projection.weight"] = model.lm_head.weight.detach()
    path = convert_metaseq(write(tmp_path / "metaseq", parts), tmp_path / "opt", **OPTIONS)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path).eval()), logits(model))


def test_types(tmp_path):
    model = opt().half()
    parts = metaseq_parts(model, 2)
    source = write(tmp_path / "metaseq", parts)
    half = AutoModelForCausalLM.from_pretrained(convert_metaseq(source, tmp_path / "half", **OPTIONS))
    assert half.dtype == torch.float16
    assert all(torch.equal(tensor, half.state_dict()[key]) for key, tensor in model.state_dict().items())
    single = AutoModelForCausalLM.from_pretrained(
        convert_metaseq(source, tmp_path / "single", dtype="float32", **OPTIONS)
    )
    assert torch.equal(logits(single.eval()), logits(model.float()))
    parts[1]["decoder.layers.0.fc1.bias"] = parts[1]["decoder.layers.0.fc1.bias"].float()
    mixed = write(tmp_path / "mixed", parts)
    with pytest.raises(ValueError, match="part-1.pt mixes types: .* 'decoder.layers.0.fc1.bias' is torch.float32"):
        convert_metaseq(mixed, tmp_path / "no", **OPTIONS)
    parts[1]["decoder.layers.0.fc1.bias"][0] = 1e6
    with pytest.raises(ValueError, match="fc1.bias'.* holds 1e\\+06, which overflows"):
        convert_metaseq(write(tmp_path / "overflow", parts), tmp_path / "no", dtype="float16", **OPTIONS)
    with pytest.raises(ValueError, match="dtype must be a float type"):
        convert_metaseq(source, tmp_path / "no", dtype="int8", **OPTIONS)
    assert not (tmp_path / "no").exists()


def test_every_key_is_accounted_for(tmp_path):
    def error(match, change, count=2, kind="opt", **options):
        parts = metaseq_parts(opt(kind), count)
        change(parts)
        source = write(tmp_path / "metaseq", parts)
        with pytest.raises(ValueError, match=match):
            convert_metaseq(source, tmp_path / "opt", **{**OPTIONS, **options})
        assert not (tmp_path / "opt").exists()
        for file in source.iterdir():
            file.unlink()

    def drop(name):
        return lambda parts: [part.pop(name) for part in parts]

    def add(name):
        return lambda parts: [part.update({name: torch.ones(2)}) for part in parts]

    error("lacks decoder.layers.1.fc2.bias", drop("decoder.layers.1.fc2.bias"))
    error("no place for: decoder.layers.0.ffn_layernorm.weight", add("decoder.layers.0.ffn_layernorm.weight"))
    error("lacks decoder.layer_norm.bias.* say post_norm", lambda parts: None, count=1, kind="opt-350m")
    error("no place for: decoder.layer_norm.bias", lambda parts: None, post_norm=True)
    error("no OPT-like decoder: it has no decoder.embed_positions.weight", drop("decoder.embed_positions.weight"))
    error("is of FSDP.*--input 'reshard-model_part-0.pt'", add("flat_param_0"))
    error("only one of them has 'decoder.x'", lambda parts: parts[1].update({"decoder.x": torch.ones(2)}))

    def disagree(name):
        return lambda parts: parts[1][name].add_(0.25)

    for name in ("decoder.layers.1.fc2.bias", "decoder.layer_norm.weight", "decoder.embed_positions.weight"):
        error(f"'{name}' should be the same in all parts, but differs by up to 0.25", disagree(name))

    def reshape(name, shape, which=slice(None)):
        return lambda parts: [part.update({name: torch.ones(shape)}) for part in parts[which]]

    fc2, qkv = "decoder.layers.0.fc2.weight", "decoder.layers.0.self_attn.qkv_proj.weight"
    error(f"'{fc2}' of .* make \\[32, 62\\], expected \\[32, 64\\]", reshape(fc2, (32, 31)))
    error(f"parts of '{fc2}' cannot be joined", reshape(fc2, (32, 31), slice(1)))
    error("should have keys, values and queries, but is \\[47, 32\\]", reshape(qkv, (47, 32)))
    error("Are all model parts there", lambda parts: parts.pop())
    error("8 attention heads do not go into a hidden size of 32 in 3 part", lambda parts: parts.append(parts[0]))
    error("do not go into a hidden size", lambda parts: None, num_attention_heads=5)
    error("do not say num_attention_heads", lambda parts: None, num_attention_heads=None)
    error("do not say activation_function", lambda parts: None, activation_function=None)


def test_scaled_embeddings_are_refused(tmp_path):
    source = write(tmp_path / "metaseq", metaseq_parts(opt(), 1), {"cfg": {"model": {"no_scale_embedding": False}}})
    with pytest.raises(ValueError, match="scales its embeddings"):
        convert_metaseq(source, tmp_path / "opt", **OPTIONS)


class Harmful:
    """What an old file may hold; loading it would run code."""

    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = metaseq_parts(opt(), 2)

    def error(match, source, **options):
        with pytest.raises(ValueError, match=match):
            convert_metaseq(source, options.pop("output", tmp_path / "opt"), **{**OPTIONS, **options})

    error("There is no '.*none'", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    error("has no .pt files", tmp_path / "empty")
    error("No source", [])
    source = write(tmp_path / "metaseq", parts)
    error("holds the input", source, output=source, overwrite=True)
    error("holds the input", source, output=tmp_path, overwrite=True)
    torch.save({"model": parts[0]}, source / "restored.pt")
    error("several checkpoints: reshard-model_part-0.pt, reshard-model_part-1.pt, restored.pt", source)
    (source / "restored.pt").unlink()
    torch.save({"model": parts[0]}, source / "reshard-model_part-3.pt")
    error(r"found \[0, 1, 3\], expected 0 to 3", source)
    (source / "reshard-model_part-3.pt").unlink()
    torch.save({"model": parts[0]}, source / "checkpoint_last-model_part-0-shard1.pt")
    error("is of FSDP.*--input 'checkpoint_last-model_part-0-shard\\*.pt'", source)
    (source / "checkpoint_last-model_part-0-shard1.pt").unlink()
    harmful = write(tmp_path / "harmful", parts[:1], {"cfg": Harmful()})
    error("reshard.pt holds Python objects.*save its weights alone", harmful)
    assert not Path("touched").exists()
    file = source / "reshard-model_part-1.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    error("Cannot read .*reshard-model_part-1.pt", source)
    file.write_bytes(b"")
    error("Cannot read .*reshard-model_part-1.pt", source)
    torch.save({"model": parts[1]}, file, _use_new_zipfile_serialization=False)
    error("Cannot read .*torch before 1.6", source)
    torch.save(parts[1], file)
    error("reshard-model_part-1.pt is no metaseq checkpoint", source)
    assert not (tmp_path / "opt").exists()


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    source = write(tmp_path / "metaseq", metaseq_parts(opt(), 2))
    calls = []

    def interrupt(self, source, first, last):
        calls.append(source)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, source, first, last)

    original = module.MetaseqCheckpoint.read
    monkeypatch.setattr(module.MetaseqCheckpoint, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_metaseq(source, tmp_path / "opt", max_shard_size="1KB", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["metaseq"]


def test_the_command_and_the_script(tmp_path, capsys, monkeypatch):
    model = opt()
    source = write(tmp_path / "metaseq", metaseq_parts(model, 2))
    arguments = ["--source", str(source), "--output", str(tmp_path / "opt"), "--num-attention-heads", "8"]
    assert main(["convert-metaseq", *arguments]) == 2
    assert "do not say activation_function" in capsys.readouterr().err
    arguments += ["--activation-function", "relu"]
    assert main(["convert-metaseq", *arguments]) == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "opt").eval()), logits(model))
    script = Path(__file__).parents[2] / "conversion" / "convert_metaseq_to_hf.py"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, "--overwrite"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0
