"""What a folder may make us read, and what we write into one: no names that lead elsewhere, no pickles, no
paths from here.
"""

import ast
import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from safetensors.torch import load_file

import jam_hf
import jam_hf_cli as cli
from jam_hf import JamForCausalLM, JamProcessor
from jam_hf.checkpoints.parent import Parent
from jam_hf.contents import beside, check_shards, load_saved_dataset
from jam_hf.data.readers import read_pairs


PACKAGE = Path(jam_hf.__file__).parent
OUTSIDE = ("../x.safetensors", "a/../../x", "/etc/hostname", "..", "", ".", "a\0b", None, 3, ["a"])
# Classes whose from_pretrained reads no weights.
WITHOUT_WEIGHTS = ("Config", "Tokenizer", "TokenizerFast", "Processor", "config_class", "super()")


def calls(name):
    """(place, call) of every call of a function or method of this name in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and name == getattr(node.func, "attr", getattr(node.func, "id", None)):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}", node


def says(node, name, value):
    """Whether a call has this keyword, itself or in a constant dictionary of its module."""
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is value for k in node.keywords)


def test_weights_are_read_from_safetensors_alone():
    found = 0
    for place, node in calls("from_pretrained"):
        if ast.unparse(node.func.value).endswith(WITHOUT_WEIGHTS):
            continue
        found += 1
        assert says(node, "use_safetensors", True), place
    found += sum(1 for _ in calls("read_whole"))  # which is one of these calls
    assert found >= 15
    for place, node in calls("load"):
        if ast.unparse(node.func) == "torch.load":
            assert says(node, "weights_only", True) and place.startswith("conversion/"), place


def test_names_that_leave_their_folder_are_refused(tmp_path):
    for name in OUTSIDE:
        with pytest.raises(ValueError, match="note names .* not the name of a file in the folder"):
            beside(tmp_path, name, "note")
    assert beside(tmp_path, "a/b..c/d", "note") == tmp_path / "a" / "b..c" / "d"


@pytest.mark.parametrize("name", ["../x.safetensors", "{root}/x.safetensors"])
def test_shards_lie_beside_their_index(name, parents, vq, tmp_path):
    """Parents, VQ models and JAMs; what is named is there and whole."""
    name = name.format(root=tmp_path)
    text = shutil.copytree(parents("llama")[0], tmp_path / "text")
    vq.save_pretrained(tmp_path / "vq")
    for folder in (text, tmp_path / "vq"):
        (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(tmp_path / "x.safetensors"), name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(
            ValueError, match=r"model\.safetensors\.index\.json .*names .*not the name of a file in the folder"
        ):
            if folder == text:
                Parent(text, "text parent")
            else:
                jam_hf.fuse(*parents("llama"), "cross", tmp_path / "jam", vq_model=folder)
        with pytest.raises(ValueError, match="not the name of a file in the folder"):
            check_shards(folder, "model")
        link = folder / "link.safetensors"  # as the Hub's cache has it: a name in the folder, a link out of it
        link.symlink_to(tmp_path / "x.safetensors")
        index["weight_map"] = dict.fromkeys(index["weight_map"], link.name)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        check_shards(folder, "model")
        if folder == text:
            assert Parent(text, "text parent").keys() == set(index["weight_map"])
    jam_hf.fuse(parents("llama")[0], parents("llama")[1], "cross", tmp_path / "jam", vq_model=tmp_path / "vq")


def test_a_vq_model_in_a_pickle_is_refused(parents, vq, tmp_path):
    import torch

    vq.save_pretrained(tmp_path / "vq")
    state = load_file(tmp_path / "vq" / "model.safetensors")
    (tmp_path / "vq" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "vq" / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError), match=r"model\.safetensors"):
        jam_hf.fuse(*parents("llama"), "cross", tmp_path / "jam", vq_model=tmp_path / "vq")


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", (4, 4), colour).save(path)


@pytest.mark.parametrize("name", ["../secret.png", "{root}/secret.png"])
def test_pictures_lie_beside_their_metadata(name, tmp_path):
    picture(tmp_path / "secret.png")
    picture(tmp_path / "pairs" / "deep" / "a.png")
    metadata = tmp_path / "pairs" / "metadata.jsonl"
    rows = [{"file_name": "deep/a.png", "text": "a"}, {"file_name": name.format(root=tmp_path), "text": "b"}]
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2 names .*secret\.png"):
        read_pairs(metadata.parent)
    metadata.write_text(json.dumps(rows[0]))
    assert read_pairs(metadata.parent) == [{"image": str(tmp_path / "pairs" / "deep" / "a.png"), "text": "a"}]


def test_a_saved_dataset_lies_in_its_folder(tmp_path):
    data = Dataset.from_dict({"text": ["a"]})
    data.save_to_disk(tmp_path / "outside")
    DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    part = tmp_path / "saved" / "train"
    assert load_saved_dataset(tmp_path / "saved")["train"]["text"][:] == ["a"] == load_saved_dataset(part)["text"][:]
    state = json.loads((part / "state.json").read_text())
    name = state["_data_files"][0]["filename"]
    for outside in (f"../../outside/{name}", str(tmp_path / "outside" / name)):
        state["_data_files"][0]["filename"] = outside
        (part / "state.json").write_text(json.dumps(state))
        for folder in (part, tmp_path / "saved"):
            with pytest.raises(ValueError, match=r"state\.json names"):
                load_saved_dataset(folder)
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["../outside"]}))
    with pytest.raises(ValueError, match=r"dataset_dict\.json names"):
        load_saved_dataset(tmp_path / "saved")


def test_a_saved_dataset_brings_its_pictures(tmp_path):
    picture(tmp_path / "a.png")
    rows = {"image": [str(tmp_path / "a.png")], "text": ["a"]}
    Dataset.from_dict(rows).cast_column("image", Image()).save_to_disk(tmp_path / "good")
    assert read_pairs(tmp_path / "good")[0]["image"].size == (4, 4)
    Dataset.from_dict(rows).save_to_disk(tmp_path / "names")
    with pytest.raises(ValueError, match="holds no pictures but .* Cast it to"):
        read_pairs(tmp_path / "names")
    (tmp_path / "a.png").unlink()
    features = Features(image={"bytes": Value("binary"), "path": Value("string")}, text=Value("string"))
    lost = Dataset.from_dict({"image": [{"bytes": None, "path": str(tmp_path / "b.png")}], "text": ["a"]}, features)
    lost.save_to_disk(tmp_path / "lost")
    picture(tmp_path / "b.png")
    info = tmp_path / "lost" / "dataset_info.json"
    described = json.loads(info.read_text())
    described["features"]["image"] = {"_type": "Image"}
    info.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="1 pictures of the dataset .* names of files elsewhere"):
        read_pairs(tmp_path / "lost")


def paths_in(folder, root):
    """Names of files in which the path of this machine stands."""
    found = []
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        if str(root).encode() in path.read_bytes():
            found.append(path.name)
    return found


def test_no_path_of_this_machine_is_written(parents, vq, tmp_path):
    """A JAM, one that was loaded and saved, a trained one and its adapter, and a converted VQ model."""
    from datasets import Dataset

    from jam_hf.data.collator import JamDataCollator
    from jam_hf.training.recipes import RecipeSettings, train_causal_lm

    root = tmp_path / "somewhere"
    root.mkdir()
    text, image = (shutil.copytree(folder, root / folder.name) for folder in parents("llama"))
    vq.save_pretrained(root / "vq")
    jam = jam_hf.fuse(text, image, "cross", root / "jam", vq_model=root / "vq", tokenizer=text)
    assert paths_in(jam, tmp_path) == []
    model, processor = JamForCausalLM.from_pretrained(jam, use_safetensors=True), JamProcessor.from_pretrained(jam)
    model.save_pretrained(root / "again")
    processor.save_pretrained(root / "again")
    processor.tokenizer.save_pretrained(root / "again" / "tokenizer")
    assert paths_in(root / "again", tmp_path) == []
    data = Dataset.from_dict({"input_ids": [[1, 5, 6, 7]] * 8})
    settings = RecipeSettings(max_steps=1, batch_size=2, warmup_steps=0)
    collator = JamDataCollator(0, model.config.vocab_size)
    train_causal_lm(model, data, root / "trained", settings, collator, tokenizer=processor)
    assert paths_in(root / "trained", tmp_path) == []


def test_no_path_of_this_machine_is_in_an_adapter(parents, vq, tmp_path):
    peft = pytest.importorskip("peft")
    from datasets import Dataset

    from jam_hf.data.collator import JamDataCollator
    from jam_hf.training.adapters import lora_config
    from jam_hf.training.recipes import RecipeSettings, train_causal_lm

    jam = jam_hf.fuse(*parents("llama"), "cross", tmp_path / "jam", vq_model=vq)
    model = peft.get_peft_model(
        JamForCausalLM.from_pretrained(jam, use_safetensors=True), lora_config_of(lora_config, jam)
    )
    data = Dataset.from_dict({"input_ids": [[1, 5, 6, 7]] * 8})
    settings = RecipeSettings(max_steps=1, batch_size=2, warmup_steps=0)
    train_causal_lm(model, data, tmp_path / "adapter", settings, JamDataCollator(0, model.config.vocab_size))
    assert paths_in(tmp_path / "adapter", tmp_path) == []
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "jam"
    base = JamForCausalLM.from_pretrained(jam, use_safetensors=True)
    peft.PeftModel.from_pretrained(base, tmp_path / "adapter", use_safetensors=True)


def lora_config_of(lora_config, jam):
    return lora_config(JamForCausalLM.config_class.from_pretrained(jam), "all", r=2)


def test_a_trained_model_does_not_replace_what_is_there(parents, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from jam_hf.data.collator import JamDataCollator
    from jam_hf.files import folder_lock
    from jam_hf.training.recipes import RecipeSettings, train_causal_lm

    def train(**more):
        model = AutoModelForCausalLM.from_pretrained(parents("llama")[0], use_safetensors=True)
        data = Dataset.from_dict({"input_ids": [[1, 5, 6, 7]] * 8})
        settings = RecipeSettings(max_steps=1, batch_size=2, warmup_steps=0)
        train_causal_lm(model, data, tmp_path / "out", settings, JamDataCollator(0, model.config.vocab_size), **more)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        train()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with folder_lock(tmp_path / "out"), pytest.raises(FileExistsError, match="Another run"):
        train(overwrite=True)
    train(overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out" / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_file_is_said_to_be_missing(tmp_path, capsys):
    for name in ("vqgan.ckpt", "vq.safetensors"):
        assert cli.main(["convert-vq", "--source", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
        assert f"There is no file '{tmp_path / name}'" in capsys.readouterr().err
    assert cli.main(["convert-vq", "--source", str(tmp_path / "folder"), "--output", str(tmp_path / "out")]) == 2
    assert "there is nothing of that name" in capsys.readouterr().err


def test_generate_does_not_overwrite_in_silence(fused, tmp_path, capsys):
    page = tmp_path / "x.html"
    page.write_text("mine")
    arguments = ["generate", "a sea", "--model", str(fused("llama", "cross", "preserving")), "--max-new-tokens", "2"]
    assert cli.main([*arguments, "--output", str(page)]) == 2
    assert "this file exists" in capsys.readouterr().err and page.read_text() == "mine"
    assert cli.main([*arguments, "--output", str(page), "--overwrite"]) == 0
    assert page.read_text().startswith("<!doctype html>")
