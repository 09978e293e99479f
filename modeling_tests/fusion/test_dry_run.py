"""A dry run of parents of which the config alone is there: what it says is what a real fusion then writes, to the
byte.
"""

import shutil

import pytest
from fusion_zoo import IMAGE_KINDS, image_parent, save, text_parent, vq_model
from safetensors import safe_open

import jam_hf_cli as cli
from jam_hf import fuse
from jam_hf.fusion.fuse import plan_fusion, run_fusion
from jam_hf.fusion.plan import parts, weight_bytes


def without_weights(folder, target, *more):
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*", *more))


def written(folder):
    """Parameters and bytes of the safetensors files in a folder, by the safetensors package and the file system."""
    parameters = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                count = 1
                for size in file.get_slice(key).get_shape():
                    count *= size
                parameters += count
    return parameters, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def planned(plan):
    return sum(count for count, _ in parts(plan).values()), weight_bytes(plan)


@pytest.mark.parametrize("text_kind", ["llama", "opt"])
@pytest.mark.parametrize("kind", IMAGE_KINDS)
@pytest.mark.sampled
def test_the_config_says_what_the_fusion_writes(text_kind, kind, tmp_path):
    text, image = save(*text_parent(text_kind), tmp_path / "text"), save(*image_parent(kind), tmp_path / "image")
    vq_model().save_pretrained(tmp_path / "vq")
    settings = {"max_shard_size": "60KB"}
    settings |= {"vq_model": tmp_path / "vq"} if kind == "plain" else {"image_size": 16} if kind == "emu3" else {}
    done = fuse(text, image, "cross", tmp_path / "jam", **settings)
    if kind == "plain":
        settings["vq_model"] = without_weights(tmp_path / "vq", tmp_path / "vq alone")
    plan = plan_fusion(
        without_weights(text, tmp_path / "t"),
        without_weights(image, tmp_path / "i"),
        "cross",
        headers_only=True,
        **settings,
    )
    assert planned(plan) == written(done)
    told = plan.describe()
    assert (
        "from config.json alone" in told and f"{written(done)[1]:,} bytes" in told and f"{written(done)[0]:,}" in told
    )
    assert "cross blocks: " in told and "peak memory: about" in told and "at 200 MB/s; before, about" in told
    assert "by its config.json" in plan.explain("lm_head.weight")
    with pytest.raises(ValueError, match="headers alone cannot be run"):
        run_fusion(plan, tmp_path / "no")


@pytest.mark.parametrize(("mode", "init"), [("uniform", "average"), ("width", "copy"), ("cross", "paper")])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "opt-paper", "opt-projected"])
@pytest.mark.sampled
def test_all_modes(mode, init, family, parents, fused, vq, tmp_path):
    text, image = (without_weights(folder, tmp_path / folder.name) for folder in parents(family))
    try:
        done = fused(family, mode, init)
    except ValueError:
        pytest.skip("this pair cannot be fused so")
    plan = plan_fusion(text, image, mode, init, vq_model=vq, headers_only=True)
    assert planned(plan) == written(done)


@pytest.mark.parametrize("kind", ["plain", "chameleon", "janus"])
def test_a_config_and_nothing_else(kind, parents, fused, vq, tmp_path, capsys):
    """Without tokenizers the vocabulary is an estimate, and the dry run says so; where the parents share one, it is
    exact.
    """
    if kind == "plain":
        folders = parents("llama")
        vq.save_pretrained(tmp_path / "vq")
        (tmp_path / "vq" / "model.safetensors").unlink()
        more = ["--image-token-offset", "284", "--vq", str(tmp_path / "vq")]
    else:
        folders, more = (save(*text_parent("qwen2"), tmp_path / "a"), save(*image_parent(kind), tmp_path / "b")), []
    bare = []
    for name, folder in zip(("text", "image"), folders):
        bare.append(tmp_path / name)
        bare[-1].mkdir()
        shutil.copy(folder / "config.json", bare[-1])
    before = sorted(tmp_path.rglob("*"))
    assert (
        cli.main(["fuse", "--text", str(bare[0]), "--image", str(bare[1]), "--mode", "cross", "--dry-run", *more]) == 0
    )
    told = capsys.readouterr().out
    assert "has no tokenizer files here" in told and "parameters: " in told
    assert sorted(tmp_path.rglob("*")) == before
    if kind == "plain":
        parameters, size = written(fused("llama", "cross", "preserving"))
        assert f"parameters: {parameters:,}" in told and f"{size:,} bytes" in told
