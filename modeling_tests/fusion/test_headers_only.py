"""A dry run of parents on the Hub fetches no weights: what the plan says is what it says of the same parents on
disk.
"""

import re
import shutil

import huggingface_hub
import pytest
from fusion_zoo import IMAGE_KINDS, image_parent, save, text_parent, vq_model
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

import jam_hf_cli as cli
from jam_hf.checkpoints.tensor_files import DTYPES, TensorFile
from jam_hf.fusion.fuse import plan_fusion, run_fusion


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(folder, name)`: the repository "someone/<name>", as the Hub's library gives it."""
    folders = {}

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        target = tmp_path / "cache" / repo_id.replace("/", "--") / "snapshots" / "0123abc"
        shutil.copytree(folders[repo_id], target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        assert not any(pattern.endswith(".safetensors") for pattern in allow_patterns)
        return str(target)

    def get_safetensors_metadata(repo_id, revision=None):
        names = {dtype: name for name, dtype in DTYPES.items()}
        specs = TensorFile(folders[repo_id] / "model.safetensors").specs
        tensors = {key: TensorInfo(names[spec.dtype], list(spec.shape), (0, 0)) for key, spec in specs.items()}
        file = SafetensorsFileMetadata({}, tensors)
        return SafetensorsRepoMetadata(
            None, False, dict.fromkeys(tensors, "model.safetensors"), {"model.safetensors": file}
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)

    def publish(folder, name):
        folders[f"someone/{name}"] = folder
        return f"someone/{name}"

    return publish


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_headers_say_what_the_weights_say(kind, hub, tmp_path):
    text, image = save(*text_parent("llama"), tmp_path / "text"), save(*image_parent(kind), tmp_path / "image")
    settings = {"vq_model": vq_model()} if kind == "plain" else {"image_size": 16} if kind == "emu3" else {}
    whole = plan_fusion(text, image, "cross", **settings)
    headers = plan_fusion(hub(text, "text"), hub(image, "image"), "cross", headers_only=True, **settings)
    assert {key: plan.spec for key, plan in headers.tensors.items()} == {
        key: plan.spec for key, plan in whole.tensors.items()
    }

    def told(plan, names):
        lines = re.sub(r"(, recipe \w+| \(from the headers .*\)|; before, about .* to fetch .*)", "", plan.describe())
        lines = re.sub(r".*The vectors of the codebook .*\n", "", lines)  # that much only the weights say
        for name in names:
            lines = lines.replace(str(name), "NAME")
        return lines

    assert told(headers, ["someone/text", "someone/image"]) == told(whole, [text, image])
    assert "someone/text" in headers.explain("lm_head.weight")
    with pytest.raises(ValueError, match="headers alone cannot be run"):
        run_fusion(headers, tmp_path / "jam")


def test_the_dry_run_of_the_command_line_fetches_headers_only(hub, tmp_path, capsys):
    text, image = save(*text_parent("qwen2"), tmp_path / "text"), save(*image_parent("janus"), tmp_path / "image")
    arguments = ["fuse", "--text", hub(text, "text"), "--image", hub(image, "image"), "--mode", "cross", "--dry-run"]
    assert cli.main(arguments) == 0
    assert "from the headers of the weights alone" in capsys.readouterr().out
    assert not list(tmp_path.rglob("cache/**/*.safetensors"))


def test_a_repository_without_safetensors_is_refused(hub, tmp_path, monkeypatch):
    text, image = save(*text_parent("qwen2"), tmp_path / "text"), save(*image_parent("janus"), tmp_path / "image")

    def none(repo_id, revision=None):
        raise huggingface_hub.errors.NotASafetensorsRepoError("it has pytorch_model.bin")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", none)
    with pytest.raises(
        ValueError, match="has no safetensors on the Hub whose headers can be read: it has pytorch_model.bin"
    ):
        plan_fusion(hub(text, "text"), image, "cross", headers_only=True)
