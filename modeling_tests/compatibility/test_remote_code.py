"""Checkpoint folders carry their code: they load where jam_hf is not installed, and need no remote code where it is."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from compatibility.remote_child import load
from conftest import parent_model
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from transformers.dynamic_module_utils import get_imports

import jam_hf
from jam_hf import JamConfig, JamForCausalLM, JamImageProcessor, JamModel, JamProcessor, JamVQModel
from jam_hf.model.remote_code_jam import AUTO_MAP


MODEL_FOLDER = Path(jam_hf.__file__).parent / "model"
CODE_FILES = {path.name for path in MODEL_FOLDER.glob("*.py")} - {"__init__.py"}
MODES = ("uniform", "width", "cross")
HUB_ID = "someone/jam"
# A checkpoint carries what loads, generates and decodes. What it is asked for beyond that, it refuses with what to
# install.
MOST_LINES = 5_000


def code_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


def run_child(folder: Path, folders: dict[str, str], save_to: dict[str, str]) -> dict:
    """remote_child.py in an environment of its own: no site, no jam_hf, nobody to answer a prompt, empty caches."""
    folder.mkdir(exist_ok=True)
    paths = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    arguments = {
        "site_packages": sorted(paths),
        "folders": folders,
        "save_to": save_to,
        "results": str(folder / "results.pt"),
    }
    (folder / "arguments.json").write_text(json.dumps(arguments))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TRANSFORMERS_"))
    }
    environment |= {
        "HF_HOME": str(folder / "home"),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    child = Path(__file__).with_name("remote_child.py")
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(child), str(folder / "arguments.json")],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=processes.PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def remote(tmp_path_factory, fused):
    """One folder of each kind, what the first child made of it, and what a second made of what the first had saved."""
    root = tmp_path_factory.mktemp("remote")
    saved = {"uniform": fused("llama", "uniform", "average")}  # by `fuse` itself
    for name, family, mode, init in (
        ("width", "opt", "width", "copy"),
        ("cross", "llama", "cross", "preserving"),
        ("trainer", "opt", "cross", "paper"),
    ):
        model = JamForCausalLM.from_pretrained(fused(family, mode, init)).eval()
        processor = JamProcessor.from_pretrained(fused(family, mode, init))
        with torch.no_grad():  # blocks that start at zero would hide a wrong stream
            for key, parameter in model.named_parameters():
                if "_cross." in key and parameter.dim() > 1:
                    parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(3))
        saved[name] = root / name
        if name == "trainer":
            arguments = TrainingArguments(output_dir=str(root / "out"), report_to=[], use_cpu=True)
            Trainer(model, arguments, processing_class=processor).save_model(str(saved[name]))
        else:
            model.save_pretrained(saved[name])
            processor.save_pretrained(saved[name])

    again = {mode: root / "again" / mode for mode in MODES}
    first = run_child(root / "first", {k: str(v) for k, v in saved.items()}, {k: str(v) for k, v in again.items()})

    # The second loads the saved cross JAM as a Hub repository, out of a cache as a download leaves it.
    repository = root / "second" / "home" / "hub" / ("models--" + HUB_ID.replace("/", "--"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(again["cross"] / "whole", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    folders = {"cross": HUB_ID, "uniform": str(again["uniform"] / "whole"), "width": str(again["width"] / "whole")}
    second = run_child(root / "second", folders, {})
    ours = {name: load(str(folder), None) for name, folder in saved.items()}
    return SimpleNamespace(saved=saved, ours=ours, first=first, again=again, second=second)


def assert_same(ours: dict, theirs: dict) -> None:
    for name in (
        "prompt",
        "pixel_values",
        "image_processor_pixels",
        "tokenizer_ids",
        "written",
        "guided",
        "logits",
        "base",
    ):
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    assert theirs["text"] == ours["text"] and theirs["same"]
    assert len(theirs["pictures"]) == 1 and torch.equal(theirs["pictures"][0], ours["pictures"][0])


@pytest.mark.feature("Hub", "remote code, without jam_hf")
@pytest.mark.parametrize("mode", MODES)
def test_without_jam_hf_every_auto_class_loads_and_a_document_is_written(remote, mode):
    theirs = remote.first[mode]
    assert all(name.startswith("transformers_modules.") for name in theirs["classes"].values()), theirs["classes"]
    found = {name: ".".join(value.split(".")[-2:]) for name, value in theirs["classes"].items()}
    assert found == AUTO_MAP
    assert_same(remote.ours[mode], theirs)


@pytest.mark.feature("Hub", "remote code in the Trainer's checkpoints", modes=("cross",))
def test_without_jam_hf_what_the_trainer_saved_loads(remote):
    assert code_files(remote.saved["trainer"]) == CODE_FILES
    assert_same(remote.ours["trainer"], remote.first["trainer"])


@pytest.mark.feature("Hub", "remote code saved again, without jam_hf")
@pytest.mark.parametrize("mode", MODES)
def test_what_remote_code_saves_is_whole(remote, mode):
    for name in ("whole", "base", "processor", "image_processor", "config"):
        assert code_files(remote.again[mode] / name) == CODE_FILES, name
    for name in CODE_FILES:
        assert (remote.again[mode] / "whole" / name).read_text() == (MODEL_FOLDER / name).read_text()
    assert_same(remote.ours[mode], remote.second[mode])
    model = AutoModel.from_pretrained(remote.again[mode] / "base")
    assert type(model) is JamModel
    ids = torch.arange(17, model.config.vocab_size).view(1, -1)[:, -48:]
    assert torch.equal(model.eval()(ids).last_hidden_state, remote.first[mode]["base"])


@pytest.mark.feature("Hub", "remote code, what it does not carry")
def test_without_jam_hf_what_is_not_carried_says_what_to_install(remote):
    refused = remote.first["cross"]["refused"]
    assert len(refused) > 10
    for asked, message in refused.items():
        assert message.startswith("ImportError: ") and "pip install jam_hf" in message and "import jam_hf" in message, (
            asked
        )
        assert asked in message, message
    assert all(message == "nothing was refused" for message in remote.ours["cross"]["refused"].values())


def test_the_files_that_travel_are_the_model_alone():
    lines = {name: len((MODEL_FOLDER / name).read_text().splitlines()) for name in CODE_FILES}
    assert sum(lines.values()) <= MOST_LINES, lines


def test_a_save_over_an_older_folder_takes_the_code_of_then_out(fused, tmp_path):
    folder = shutil.copytree(fused("llama", "uniform", "average"), tmp_path / "jam")
    (folder / "candidates_jam.py").write_text("# of an older save")
    (folder / "mine_jam.py").write_text("# the user's own")
    JamForCausalLM.from_pretrained(folder).save_pretrained(folder)
    assert code_files(folder) == CODE_FILES | {"mine_jam.py"}


def test_errors_without_trust_or_diffusers_say_what_to_do(remote):
    for errors in (remote.first["errors"], remote.second["errors"]):
        for name in ("not trusted", "refused"):
            assert errors[name].startswith("ValueError") and "trust_remote_code=True" in errors[name]
        assert errors["without diffusers"].startswith("ImportError")
        assert "diffusers" in errors["without diffusers"] and "pip install" in errors["without diffusers"]


@pytest.mark.feature("Hub", "Auto classes with jam_hf, no remote code")
@pytest.mark.parametrize("trust", (None, False, True))
def test_with_jam_hf_no_remote_code_is_loaded(fused, monkeypatch, trust):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a prompt, though jam_hf is imported"))
    before = {name for name in sys.modules if name.startswith("transformers_modules")}
    for mode, init in (("uniform", "average"), ("width", "copy"), ("cross", "preserving")):
        folder = fused("llama", mode, init)
        expected = {
            AutoConfig: JamConfig,
            AutoModel: JamModel,
            AutoModelForCausalLM: JamForCausalLM,
            AutoModelForImageTextToText: JamForCausalLM,
            AutoModelForMultimodalLM: JamForCausalLM,
            AutoProcessor: JamProcessor,
            AutoImageProcessor: JamImageProcessor,
        }
        for auto_class, ours in expected.items():
            assert type(auto_class.from_pretrained(folder, trust_remote_code=trust)) is ours
        assert AutoTokenizer.from_pretrained(folder, trust_remote_code=trust).bos_token == "<s>"
        config = AutoConfig.from_pretrained(folder)
        assert type(AutoModelForMultimodalLM.from_config(config, trust_remote_code=trust)) is JamForCausalLM
    assert {name for name in sys.modules if name.startswith("transformers_modules")} == before


@pytest.mark.parametrize("what", ("fuse", "model", "base", "processor", "image_processor", "config", "vq"))
def test_whatever_is_saved_carries_all_the_code(fused, tmp_path, what):
    folder = fused("llama", "cross", "preserving")
    if what == "fuse":
        tmp_path = folder
    else:
        cls = {
            "model": JamForCausalLM,
            "base": JamModel,
            "processor": JamProcessor,
            "image_processor": JamImageProcessor,
            "config": JamConfig,
        }
        thing = (
            JamForCausalLM.from_pretrained(folder).model.vq_model if what == "vq" else cls[what].from_pretrained(folder)
        )
        thing.save_pretrained(tmp_path)
    assert code_files(tmp_path) == CODE_FILES
    if what in ("fuse", "model", "base", "config"):
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["auto_map"] == AUTO_MAP and "auto_map" not in written["vq_config"]
    for reference in AUTO_MAP.values():
        assert f"{reference.split('.')[0]}.py" in CODE_FILES


def test_a_vq_model_alone_is_found_by_its_auto_map(fused, tmp_path, tokenizer):
    JamForCausalLM.from_pretrained(fused("llama", "cross", "preserving")).model.vq_model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "configuration_jam_vq.JamVQConfig", "AutoModel": "modeling_jam_vq.JamVQModel"}
    vq = JamVQModel.from_pretrained(tmp_path)
    text, image = (parent_model("llama", len(tokenizer), seed) for seed in (1, 2))
    folder = jam_hf.fuse(text, image, "uniform", tmp_path / "jam", vq_model=vq, tokenizer=tokenizer)
    assert "auto_map" not in json.loads((folder / "config.json").read_text())["vq_config"]


def test_the_files_that_travel_import_nothing_but_what_everyone_has():
    allowed = {"torch", "numpy", "PIL", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for name in CODE_FILES:
        assert set(get_imports(MODEL_FOLDER / name)) <= allowed, name


def test_a_folder_of_an_older_save_loads_and_gets_its_code(fused, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(fused("llama", "cross", "preserving"), old)
    for path in old.glob("*.py"):
        path.unlink()
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        content = json.loads((old / name).read_text())
        for part in (content, content.get("image_processor", {})):
            part.pop("auto_map", None)
        (old / name).write_text(json.dumps(content))
    model, processor = AutoModelForCausalLM.from_pretrained(old), AutoProcessor.from_pretrained(old)
    assert type(model) is JamForCausalLM and type(processor) is JamProcessor
    model.save_pretrained(tmp_path / "new")
    processor.save_pretrained(tmp_path / "new")
    assert code_files(tmp_path / "new") == CODE_FILES
    assert json.loads((tmp_path / "new" / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_users_own_class_keeps_its_entry_in_the_auto_map(fused, tmp_path):
    config = JamConfig.from_pretrained(fused("llama", "cross", "preserving"))
    config.auto_map = {"AutoModelForCausalLM": "modeling_mine.MyJam"}
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert written == {**AUTO_MAP, "AutoModelForCausalLM": "modeling_mine.MyJam"}


def test_a_processor_that_was_saved_equals_the_one_that_is_loaded(fused, tmp_path):
    processor = JamProcessor.from_pretrained(fused("llama", "cross", "preserving"))
    processor.save_pretrained(tmp_path)
    assert JamProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    assert json.loads((tmp_path / "processor_config.json").read_text())["auto_map"] == {
        "AutoProcessor": AUTO_MAP["AutoProcessor"]
    }


@pytest.mark.feature("Hub", "push_to_hub")
@pytest.mark.parametrize("what", ("model", "processor", "save_pretrained", "config"))
def test_push_to_hub_uploads_the_code(fused, tmp_path, monkeypatch, what):
    from huggingface_hub import HfApi

    uploaded: set[str] = set()

    def create_commit(self, repo_id, operations, **kwargs):
        assert repo_id == HUB_ID
        uploaded.update(operation.path_in_repo for operation in operations)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    for module in ("transformers.utils.hub", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", lambda *args, **kwargs: _Card())
    folder = fused("llama", "cross", "preserving")
    if what == "processor":
        JamProcessor.from_pretrained(folder).push_to_hub(HUB_ID)
    elif what == "config":
        JamConfig.from_pretrained(folder).save_pretrained(str(tmp_path), push_to_hub=True, repo_id=HUB_ID)
    else:
        model = JamForCausalLM.from_pretrained(folder)
        if what == "model":
            model.push_to_hub(HUB_ID)
        else:
            model.save_pretrained(tmp_path, push_to_hub=True, repo_id=HUB_ID)
    assert uploaded >= CODE_FILES
    assert ("processor_config.json" if what == "processor" else "config.json") in uploaded


class _Card:
    def save(self, path: str) -> None:
        Path(path).write_text("---\nlibrary_name: transformers\n---\n")
