"""Parents, folders and disks that are not as they should be: errors that name file and tensor, and nothing is left
behind.
"""

import contextlib
import errno
import json
import os
import resource
import shutil

import pytest
import torch
from conftest import parent_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import jam_hf
import jam_hf.fusion.fuse as engine
from jam_hf import JamForCausalLM
from jam_hf.checkpoints.parent import Parent
from jam_hf.checkpoints.tensor_files import BLOCK_BYTES, TensorFileWriter, all_finite


WEIGHT = "model.layers.1.mlp.up_proj.weight"
FORMAT = {"format": "pt"}


@pytest.fixture
def text(parents, tmp_path):
    """A text parent that may be damaged."""
    return shutil.copytree(parents("llama")[0], tmp_path / "text")


@pytest.fixture
def sharded(parents, tmp_path):
    AutoModelForCausalLM.from_pretrained(parents("llama")[0]).save_pretrained(tmp_path / "text", max_shard_size="30KB")
    for path in parents("llama")[0].glob("*token*"):
        shutil.copy(path, tmp_path / "text")
    assert len(list((tmp_path / "text").glob("*.safetensors"))) > 3
    return tmp_path / "text"


@pytest.fixture
def refused(parents, vq, tmp_path):
    """`refused(text, *words, mode="cross", **settings)`: a ValueError with these words, and nothing is left."""

    def check(text, *words, mode="cross", **settings):
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(ValueError) as error:
            jam_hf.fuse(
                text, settings.pop("image", parents("llama")[1]), mode, tmp_path / "jam", vq_model=vq, **settings
            )
        for word in words:
            assert str(word) in str(error.value), str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    return check


def change(folder, edit):
    state = load_file(folder / "model.safetensors")
    state = edit(state) or state
    save_file(state, folder / "model.safetensors", metadata=FORMAT)


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reindex(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


# ----- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 7, 100, 5000, -1])
def test_truncated_files(size, text, refused):
    path = text / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    words = ["cut short", "first tensor that is not whole"] if size in (5000, -1) else ["damaged"]
    refused(text, path, "Fetch or save it again", *words)


def test_a_truncated_shard_names_its_tensor(sharded, refused):
    path = sorted(sharded.glob("*.safetensors"))[2]
    key = max(load_file(path))
    os.truncate(path, path.stat().st_size - 1)
    refused(sharded, path, "cut short", f"'{key}'" if len(load_file_keys(path)) == 1 else "'")


def load_file_keys(path):
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little"))).keys() - {"__metadata__"}


def test_a_shard_that_shrinks_while_it_is_read(text, refused, monkeypatch):
    plan = engine.plan_fusion

    def then_cut(*arguments, **settings):
        planned = plan(*arguments, **settings)
        os.truncate(text / "model.safetensors", 5000)
        return planned

    monkeypatch.setattr(engine, "plan_fusion", then_cut)
    refused(text, text / "model.safetensors", "cut short while it was read")


def test_indices_that_do_not_fit_their_shards(sharded, refused):
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    index = sharded / "model.safetensors.index.json"
    good = index.read_text()
    for edit, words in (
        (
            lambda m: m.update({WEIGHT: "model-9.safetensors"}),
            ["its index names model-9.safetensors, which is missing"],
        ),
        (
            lambda m: m.update({"model.more": shards[0]}),
            [f"'model.more' lies in {shards[0]}, which has no such tensor"],
        ),
        (lambda m: m.update({WEIGHT: 3}), [index, "damaged"]),
    ):
        reindex(sharded, edit)
        refused(sharded, *words)
        index.write_text(good)
    for content in ("{", "[]", "{}", '{"weight_map": {"a": "x", "a": "y"}}', '{"weight_map": []}', "\udcff"):
        index.write_text(content, errors="surrogateescape")
        refused(sharded, index, "damaged", "Fetch or save it again")
    index.write_text(good)
    (sharded / shards[1]).rename(sharded / "away")
    refused(sharded, f"its index names {shards[1]}, which is missing")


def test_a_tensor_in_two_shards(sharded, refused):
    shards = sorted(sharded.glob("*.safetensors"))
    key = next(iter(load_file(shards[1])))
    save_file({**load_file(shards[0]), key: load_file(shards[1])[key]}, shards[0], metadata=FORMAT)
    refused(sharded, f"'{key}' twice, in {shards[0].name} and {shards[1].name}")


def test_tensors_that_the_index_does_not_list_are_seen(sharded, refused):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    save_file({**load_file(shard), "model.extra.weight": torch.ones(2)}, shard, metadata=FORMAT)
    refused(sharded, "no place for: model.extra.weight")


def test_sharded_parents_and_stale_indices(sharded, parents, vq, tmp_path):
    """With a single file and an index in one folder, transformers reads the file; so does a fusion."""
    expected = jam_hf.fuse(*parents("llama"), "uniform", tmp_path / "a", vq_model=vq) / "model.safetensors"
    out = jam_hf.fuse(sharded, parents("llama")[1], "uniform", tmp_path / "b", vq_model=vq)
    assert (out / "model.safetensors").read_bytes() == expected.read_bytes()
    other = parent_model("llama", 316, 9)
    save_file(other.state_dict(), sharded / "model.safetensors", metadata=FORMAT)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(sharded).lm_head.weight, other.lm_head.weight)
    out = jam_hf.fuse(sharded, parents("llama")[1], "cross", tmp_path / "c", vq_model=vq)
    assert torch.equal(load_file(out / "model.safetensors")["lm_head.weight"], other.lm_head.weight)


def test_folders_that_hold_no_model(parents, vq, fused, refused, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    refused(folder, folder, "no config.json", "save_pretrained")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "is an adapter (LoRA)", "merge_and_unload")
    shutil.copy(parents("llama")[0] / "config.json", folder)
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "has no model.safetensors", "pytorch_model.bin", "Only safetensors are read", "save_pretrained")
    refused(
        fused("llama", "cross", "preserving"),
        "is of the family 'jam', which is not supported",
        "Supported: llama, mistral",
    )
    refused(tmp_path / "text" / "config.json", "is not a folder", "Hub id such as 'a/b'")
    refused(tmp_path / "nowhere", "is not a folder")
    refused("~/nowhere", "is not a folder")


def test_a_hub_id_without_the_hub(parents, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/nothing-at-all", "The text parent 'nobody/nothing-at-all' is neither a folder nor a Hub repository")
    refused(parents("llama")[0], "The image parent 'nobody/nothing-at-all'", image="nobody/nothing-at-all")


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gpt2", "mixtral", "phi3"])
def test_families_that_are_not_supported_are_named(kind, text, refused):
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(text)
    refused(text, f"is of the family '{kind}', which is not supported", "Supported: llama, mistral, qwen2, qwen3, opt")


def test_multimodal_text_parents_and_foreign_code(text, refused):
    from fusion_zoo import image_parent

    image_parent("chameleon")[0].save_pretrained(text)
    refused(text, "text parent", "is of the family 'chameleon', which is not supported")
    configure(text, model_type="mine", auto_map={"AutoConfig": "code.Mine"})
    (text / "code.py").write_text("raise SystemExit('this code was run')")
    refused(text, "The config of the text parent", text / "config.json", "cannot be read")
    (text / "config.json").write_text("{")
    refused(text, "The config of the text parent", text / "config.json")


# ----- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cross", "uniform", "width"])
def test_a_missing_layer_tensor_is_named(mode, text, refused):
    change(text, lambda state: {key: value for key, value in state.items() if key != WEIGHT})
    refused(text, f"The text parent {text} has no tensor '{WEIGHT}'", mode=mode)
    change(text, lambda state: {key: value for key, value in state.items() if "embed_tokens" not in key})
    refused(text, "has 0 tensors '...embed_tokens.weight'", mode=mode)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", [WEIGHT, "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_nan_and_infinity_are_found_wherever_they_are(dtype, key, text, parents, vq, tmp_path):
    path = text / "model.safetensors"
    good = {name: value.to(dtype) for name, value in load_file(path).items()}
    for place, value in ((0, float("nan")), (-1, float("inf")), (-1, -float("inf"))):
        state = {name: tensor.clone() for name, tensor in good.items()}
        state[key].view(-1)[place] = value
        save_file(state, path, metadata=FORMAT)
        with pytest.raises(ValueError) as error:
            Parent(text, "text parent").check_finite(key)
        assert str(error.value) == f"Tensor '{key}' of the text parent, in {path}, holds NaN or infinity."
    if dtype == torch.float32:
        with pytest.raises(ValueError, match=f"Tensor '{key}' of the text parent, in {path}, holds NaN or infinity"):
            jam_hf.fuse(text, parents("llama")[1], "width", tmp_path / "jam", vq_model=vq)
        assert [entry.name for entry in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_numbers_of_every_size_are_finite(dtype):
    info = torch.finfo(dtype)
    extremes = torch.tensor([info.max, info.min, info.tiny, info.smallest_normal, -0.0, info.tiny / 4], dtype=dtype)
    assert all_finite(extremes.repeat(3)) and all_finite(extremes[:0])
    large = torch.ones(BLOCK_BYTES + 5, dtype=dtype)
    assert all_finite(large)
    for place in (0, BLOCK_BYTES - 1, BLOCK_BYTES, -1):
        for value in (float("inf"), -float("inf"), float("nan")):
            bad = large.clone()
            bad[place] = value
            assert not all_finite(bad)
    assert not all_finite(torch.tensor([float("inf"), -float("inf")], dtype=dtype))


def test_overflowing_dtypes(text, refused, parents, vq, tmp_path):
    def enlarge(state):
        state = {key: value.bfloat16() for key, value in state.items()}
        state[WEIGHT][3, 5] = 1e6
        return state

    change(text, enlarge)
    image = shutil.copytree(parents("llama")[1], tmp_path / "image")
    change(image, lambda state: {key: value.half() for key, value in state.items()})
    refused(text, "torch.bfloat16", "torch.float16", "dtype=...", image=image)
    for mode in ("cross", "width", "uniform"):
        refused(
            text,
            "layers.1",
            "mlp.up_proj.weight'",
            "overflows torch.float16",
            f"text parent: {WEIGHT}",
            image=image,
            dtype="float16",
            mode=mode,
        )
    jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq, dtype="bfloat16")
    state = load_file(tmp_path / "jam" / "model.safetensors")
    layer = "model.language_model.layers.1"
    assert state[f"{layer}.text_layer.mlp.up_proj.weight"][3, 5] == torch.tensor(1e6).bfloat16()
    expected = load_file(image / "model.safetensors")[WEIGHT].bfloat16()
    assert torch.equal(state[f"{layer}.image_layer.mlp.up_proj.weight"], expected)


@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        ((48, 1), "uniform"),
        ((1, 32), "uniform"),
        ((47, 32), "uniform"),
        ((49, 32), "width"),
        ((48, 31), "cross"),
        ((48,), "width"),
    ],
)
@pytest.mark.parametrize("role", ["text", "image"])
@pytest.mark.sampled
def test_tensors_of_other_shapes_than_the_config_says(shape, mode, role, parents, refused, tmp_path):
    """No broadcast, and no row of a neighbour, makes up for what is missing."""
    folders = dict(zip(("text", "image"), parents("llama")))
    folders[role] = shutil.copytree(folders[role], tmp_path / role)
    change(folders[role], lambda state: {**state, WEIGHT: torch.ones(shape)})
    refused(
        folders["text"],
        "mlp.up_proj.weight' should be",
        list(shape),
        f"of the {role} parent",
        mode=mode,
        image=folders["image"],
    )


def test_rows_that_add_up_by_chance(parents, refused, tmp_path):
    """In width the parents stand one behind the other: one too many here and one too few there are still wrong."""
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in parents("llama")]
    for folder, rows in zip(folders, (49, 47)):
        change(folder, lambda state, rows=rows: {**state, WEIGHT: torch.ones(rows, 32)})
    refused(
        folders[0],
        "mlp.up_proj.weight' should be",
        "[49, 32]",
        "[47, 32]",
        mode="width",
        init="average",
        image=folders[1],
    )


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({"hidden_size": 64, "head_dim": 8}, "cross"),
        ({"num_hidden_layers": 4}, "cross"),
        ({"num_hidden_layers": 2}, "cross"),
        ({"intermediate_size": 40}, "cross"),
        ({"num_key_value_heads": 4}, "cross"),
    ],
)
def test_configs_that_lie(changes, mode, text, refused):
    configure(text, **changes)
    refused(text, "text parent", "layers." if "hidden_size" not in changes else "embed_tokens", mode=mode)


def test_vocabularies_of_unequal_length(text, refused):
    change(text, lambda state: {**state, "lm_head.weight": state["lm_head.weight"][:300].contiguous()})
    refused(text, "'lm_head.weight' of the text parent", "[300, 32]", "316 rows")


def test_tied_parents_that_store_both_tensors(parents, vq, tokenizer, tmp_path):
    """As transformers has it: equal tensors are one, unequal ones are two, whatever the config says."""
    text, image = (shutil.copytree(folder, tmp_path / folder.name) for folder in parents("llama-tied"))
    jams = {}
    for name in ("tied", "equal", "unequal"):
        for folder in (text, image):
            state = load_file(folder / "model.safetensors")
            if name != "tied":
                state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
            if name == "unequal":
                state["lm_head.weight"][-1, -1] += 1
            save_file(state, folder / "model.safetensors", metadata=FORMAT)
        jams[name] = jam_hf.fuse(text, image, "uniform", tmp_path / name, vq_model=vq)
    assert (jams["tied"] / "model.safetensors").read_bytes() == (jams["equal"] / "model.safetensors").read_bytes()
    model = JamForCausalLM.from_pretrained(jams["unequal"])
    parent = AutoModelForCausalLM.from_pretrained(text)
    assert not torch.equal(parent.lm_head.weight, parent.model.embed_tokens.weight)
    heads = [AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in (text, image)]
    assert torch.equal(model.lm_head.weight, (heads[0] + heads[1]) / 2)


def test_quantised_parents(text, refused):
    configure(text, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(text, "is quantised (gptq)", "unquantised")
    config = json.loads((text / "config.json").read_text())
    config.pop("quantization_config")
    (text / "config.json").write_text(json.dumps(config))
    change(text, lambda state: {**state, WEIGHT: state[WEIGHT].to(torch.float8_e4m3fn)})
    refused(text, text / "model.safetensors", f"'{WEIGHT}' has the dtype F8_E4M3", "unquantised")
    change(text, lambda state: {**state, WEIGHT: torch.ones(48, 32, dtype=torch.int8)})
    refused(text, WEIGHT, "torch.int8")


def test_models_in_memory_are_checked_too(parents, vq, tokenizer, refused):
    model = parent_model("llama", len(tokenizer), 1)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] = float("nan")
    refused(model, WEIGHT, "in the model in memory", "holds NaN or infinity", tokenizer=tokenizer)


def test_empty_tokenizer_folders(parents, refused, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    text = parents("llama")[0]
    refused(
        text, "No tokenizer can be read from", tmp_path / "tokenizer", "tokenizer=...", tokenizer=tmp_path / "tokenizer"
    )
    refused(
        text,
        "No tokenizer can be read from",
        tmp_path / "tokenizer",
        "image_tokenizer=...",
        image_tokenizer=tmp_path / "tokenizer",
    )


# ----- folders and disks ----------------------------------------------------------------------------------------------


def test_outputs_that_touch_an_input(text, parents, vq, refused, tmp_path):
    content = (text / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(text)
    (tmp_path / "linked").mkdir()
    for path in text.iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    for output, source, words in (
        (text, text, "is also an input"),
        (tmp_path / "link", text, "is also an input"),
        (text, tmp_path / "link", "is also an input"),
        (text / ".." / "text", text, "is also an input"),
        (tmp_path, text, "holds the input"),
        (text, tmp_path / "linked", "holds the input"),
    ):
        with pytest.raises(ValueError, match=words):
            jam_hf.fuse(source, parents("llama")[1], "cross", output, vq_model=vq, overwrite=True)
    assert (text / "model.safetensors").read_bytes() == content
    jam_hf.fuse(text, parents("llama")[1], "cross", text / "jam", vq_model=vq)  # inside an input: it stays as it was
    assert (text / "model.safetensors").read_bytes() == content and (text / "jam" / "config.json").is_file()


def test_a_disk_without_room_is_seen_beforehand(parents, vq, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(OSError, match="needs .* KiB more in .* and 97.7 KiB are free") as error:
        jam_hf.fuse(*parents("llama"), "cross", tmp_path / "jam", vq_model=vq)
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync"])
def test_a_disk_that_fills_up_names_the_file_and_a_rerun_goes_on(call, parents, vq, tmp_path, monkeypatch):
    original, calls = getattr(os, call), []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 20 if call == "pwrite" else len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    settings = {"vq_model": vq, "max_shard_size": "60KB"}
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError) as error:
            jam_hf.fuse(*parents("llama"), "cross", tmp_path / "jam", **settings)
    assert error.value.errno == errno.ENOSPC
    assert "model-000" in str(error.value) and "No space left on device" in str(error.value), str(error.value)
    assert ("tensor '" in str(error.value)) == (call == "pwrite")
    assert not (tmp_path / "jam").exists() and not (tmp_path / ".jam.unfinished" / "config.json").exists()
    there = set((tmp_path / ".jam.unfinished").glob("*.safetensors"))
    out = jam_hf.fuse(*parents("llama"), "cross", tmp_path / "jam", **settings)
    assert there and [path.name for path in tmp_path.iterdir()] == ["jam"]
    expected = jam_hf.fuse(*parents("llama"), "cross", tmp_path / "b", **settings)
    assert all((expected / path.name).read_bytes() == path.read_bytes() for path in out.glob("*.safetensors*"))


def test_a_limit_on_the_size_of_files(parents, vq, tmp_path):
    """The real thing: the system refuses to let a file grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write model\.safetensors in .*File too large"):
            jam_hf.fuse(*parents("llama"), "cross", tmp_path / "jam", vq_model=vq)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    jam_hf.fuse(*parents("llama"), "cross", tmp_path / "jam", vq_model=vq)
    assert [path.name for path in tmp_path.iterdir()] == ["jam"]


def test_short_writes_are_gone_on_with(parents, vq, tmp_path, monkeypatch):
    expected = jam_hf.fuse(*parents("llama"), "cross", tmp_path / "a", vq_model=vq)
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, start: pwrite(fd, data[:1000], start))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, start: preadv(fd, [buffers[0][:777]], start))
    out = jam_hf.fuse(*parents("llama"), "cross", tmp_path / "b", vq_model=vq)
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_folders_that_cannot_be_written(parents, vq):
    for output in ("/proc/jam", "/proc/nothing/jam"):
        with pytest.raises(OSError, match=f"cannot write '{output}' or beside it: .*Choose another output folder"):
            jam_hf.fuse(*parents("llama"), "cross", output, vq_model=vq)


def test_no_file_stays_open(parents, vq, text, tmp_path):
    """Neither after a fusion nor after an error."""
    import gc

    jam_hf.fuse(*parents("llama"), "cross", tmp_path / "warm", vq_model=vq)
    change(text, lambda state: {**state, WEIGHT: state[WEIGHT] * float("nan")})
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        jam_hf.fuse(*parents("llama"), "cross", tmp_path / f"{number}", vq_model=vq)
        with contextlib.suppress(ValueError):
            jam_hf.fuse(text, parents("llama")[1], "cross", tmp_path / "no", vq_model=vq)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_writer_that_cannot_begin_closes_its_file(tmp_path, monkeypatch):
    from jam_hf.checkpoints.tensor_files import TensorSpec

    monkeypatch.setattr(os, "ftruncate", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="full"):
        TensorFileWriter(tmp_path / "x", {"a": TensorSpec((2,), torch.float32)})
    assert len(os.listdir("/proc/self/fd")) == before
