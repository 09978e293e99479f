"""`jam-hf fuse` with two parents: flags and recipes, the dry run against what is then written, provenance, errors
and exits.
"""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields

import processes
import pytest
import yaml
from fusion_zoo import image_parent, save, text_parent
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jam_hf.checkpoints.tensor_files import TensorFileWriter
from jam_hf.fusion.fuse import plan_fusion
from jam_hf.fusion.plan import size
from jam_hf.fusion.recipe import FusionRecipe
from jam_hf_cli import main
from jam_hf_cli.commands.fuse import SETTINGS


@pytest.fixture
def inputs(parents, vq, tmp_path):
    """Flags that name the parents and the VQ model."""
    vq.save_pretrained(tmp_path / "in" / "vq")
    text, image = parents("llama")
    return ["--text", str(text), "--image", str(image), "--vq", str(tmp_path / "in" / "vq")]


def fuse(*arguments):
    return main(["fuse", *map(str, arguments)])


def outputs(capsys):
    """What was printed, without transformers' own progress bar."""
    printed = capsys.readouterr()
    return printed._replace(
        err="".join(line for line in printed.err.splitlines(True) if "Loading weights" not in line).lstrip("\r")
    )


def tree(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def read(folder):
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def same_tensors(one, other):
    one, other = read(one), read(other)
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def recipe_file(path, inputs, **settings):
    named = dict(zip((flag.removeprefix("--") for flag in inputs[::2]), inputs[1::2]))
    path.write_text(yaml.safe_dump({**named, **settings}))
    return path


# ----- settings -------------------------------------------------------------------------------------------------------


def test_flags_reach_the_fusion(inputs, tmp_path, capsys):
    arguments = [
        *inputs,
        "--mode",
        "cross",
        "--init",
        "paper",
        "--dtype",
        "bfloat16",
        "--seed",
        3,
        "--max-shard-size",
        "90KB",
    ]
    assert fuse(*arguments, "--cross-attention-interval", 1, "--output", tmp_path / "jam") == 0
    printed = outputs(capsys)
    assert re.fullmatch(rf"fused: {tmp_path / 'jam'} \(recipe [0-9a-f]{{16}}\)\n", printed.out)
    assert (
        printed.err.startswith("JAM, fusion cross")
        and "  warning: " in printed.err
        and "drawn at random" in printed.err
        and "B/s" in printed.err
    )
    config = json.loads((tmp_path / "jam" / "config.json").read_text())
    assert (config["cross_form"], config["dtype"], config["cross_attention_interval"]) == ("paper", "bfloat16", 1)
    assert len(list((tmp_path / "jam").glob("*.safetensors"))) > 2
    written = yaml.safe_load((tmp_path / "jam" / "fusion.yaml").read_text())
    assert written == {
        "text": "text", "image": "image", "mode": "cross", "init": "paper", "vq": "vq", "cross_attention_interval": 1,
        "dtype": "bfloat16", "seed": 3, "max_shard_size": "90KB",
    }  # fmt: skip


def test_every_setting_has_a_flag_or_is_said_in_a_recipe():
    yaml_only = {"break_token", "image_token", "mask_token", "mask_end_token", "special_tokens"}
    assert {f.name for f in fields(FusionRecipe)} == {*SETTINGS} | yaml_only


def test_flags_win_over_the_recipe(inputs, tmp_path, capsys):
    recipe = recipe_file(tmp_path / "in" / "r.yaml", inputs, mode="cross", init="paper", seed=5, dtype="bfloat16")
    assert fuse(recipe, "--output", tmp_path / "five") == 0
    assert fuse(recipe, "--output", tmp_path / "zero", "--seed", 0) == 0
    assert (
        fuse(*inputs, "--mode", "cross", "--init", "paper", "--dtype", "bfloat16", "--output", tmp_path / "flags") == 0
    )
    assert same_tensors(tmp_path / "zero", tmp_path / "flags") and not same_tensors(
        tmp_path / "zero", tmp_path / "five"
    )
    assert fuse(recipe, "--init", "preserving", "--dtype", "float32", "--dry-run") == 0
    assert "init preserving" in capsys.readouterr().out


def test_what_was_written_is_a_recipe_again(inputs, tmp_path):
    settings = {"mode": "cross", "init": "paper", "seed": 5, "cross_attention_interval": 3, "max_shard_size": "100KB"}
    assert fuse(recipe_file(tmp_path / "in" / "r.yaml", inputs, **settings), "--output", tmp_path / "one") == 0
    assert fuse(tmp_path / "one" / "fusion.yaml", *inputs, "--output", tmp_path / "two") == 0
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("one", "two")
    )
    assert ours == theirs
    assert (
        str(tmp_path)
        not in (tmp_path / "one" / "fusion.yaml").read_text() + (tmp_path / "one" / "README.md").read_text()
    )


def test_its_own_recipe_is_not_overwritten(inputs, tmp_path, capsys):
    recipe = recipe_file(tmp_path / "in" / "r.yaml", inputs, mode="cross")
    (tmp_path / "out").mkdir()
    recipe = recipe.rename(tmp_path / "out" / "r.yaml")
    assert fuse(recipe, "--output", tmp_path / "out", "--overwrite") == 2
    assert "holds the input" in capsys.readouterr().err and recipe.is_file()


def test_relative_paths_start_where_the_command_runs(inputs, tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "text").symlink_to(inputs[1])
    (tmp_path / "image").symlink_to(inputs[3])
    (tmp_path / "recipes" / "r.yaml").write_text("{text: ./text, image: image, vq: in/vq, mode: uniform}")
    monkeypatch.chdir(tmp_path)
    assert fuse("recipes/r.yaml", "--output", "jam") == 0
    assert yaml.safe_load((tmp_path / "jam" / "fusion.yaml").read_text())["text"] in (
        "text",
        os.path.basename(inputs[1]),
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "must be a YAML mapping"),
        ("- text", "must be a YAML mapping such as 'text: a/b', got list"),
        ("text: [", "cannot be read"),
        ("{text: a/b, image: c/d, mods: cross}", "unknown settings: mods. Known: text, image, mode"),
        ("{text: a/b, image: c/d, 3: cross, x: 1}", "unknown settings: 3, x"),
        ("{text: a/b}", "lacks image"),
        ("{text: a/b, image: }", "lacks image"),
        ("{text: a/b, image: c/d, mode: }", "mode must be str, got None"),
        ("{text: a/b, image: c/d, seed: '1'}", "seed must be int, got '1'"),
        ("{text: a/b, image: c/d, seed: true}", "seed must be int, got True"),
        ("{text: a/b, image: c/d, image_size: 1.5}", "image_size must be int | None, got 1.5"),
        ("{text: a/b, image: c/d, special_tokens: [a]}", "special_tokens must be dict[str, str], got ['a']"),
        ("{text: a/b, image: c/d, special_tokens: {a: 1}}", "special_tokens must be tokens by tokens"),
        ("{text: a/b, image: c/d, mode: sideways}", "mode must be one of 'uniform', 'width', 'cross', got 'sideways'"),
        (
            "{text: a/b, image: c/d, mode: uniform, init: copy}",
            "init for mode 'uniform' must be one of 'average', got 'copy'",
        ),
        ("{text: a/b, image: c/d, dtype: int8}", "dtype must be a float type"),
        ("{text: a/b, image: c/d, max_shard_size: huge}", "max_shard_size must be a size such as '2GB', got 'huge'"),
        ("\u00ff", "must be a YAML mapping"),
    ],
)
def test_wrong_recipes(content, words, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(content)
    assert fuse(tmp_path / "r.yaml", "--output", tmp_path / "jam") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("jam-hf fuse: ") and printed.err.count("\n") == 1 and words in printed.err, (
        printed.err
    )
    assert not printed.out and [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_wrong_flags(inputs, tmp_path, capsys):
    out = ["--output", tmp_path / "jam"]
    for arguments, words in (
        (["--text", "a/b"], "--image, --mode is missing"),
        ([*inputs, *out], "--mode is missing"),
        ([*inputs, "--mode", "cross"], "--output is missing (or --dry-run"),
        (["nowhere.yaml", *out], "The recipe nowhere.yaml cannot be read"),
        ([*inputs, "--mode", "cross", "--image-size", 16, *out], "image_size is for the image parent's own VQ model"),
        ([*inputs[:4], "--mode", "cross", *out], "vq_model is missing"),
        ([*inputs, "--mode", "cross", "--image-token-offset", 310, *out], "310"),
        ([*inputs, "--mode", "cross", "--output", inputs[1]], "is also an input"),
    ):
        assert fuse(*arguments) == 2, arguments
        printed = outputs(capsys)
        assert printed.err.startswith("jam-hf fuse: ") and printed.err.count("\n") == 1, printed.err
        assert words in printed.err, printed.err
    for wrong in (["--seed", "x"], ["--mode", "cross", "--force", *out], ["--mode", "cross", "--run", "runs", *out]):
        with pytest.raises(SystemExit) as error:
            fuse(*inputs, *wrong)
        assert error.value.code == 2 and wrong[-1 if wrong[0] == "--seed" else 2] in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_outputs_in_use(inputs, tmp_path, capsys):
    (tmp_path / "jam").mkdir()
    (tmp_path / "jam" / "mine").touch()
    assert fuse(*inputs, "--mode", "cross", "--output", tmp_path / "jam") == 2
    assert "is not empty" in capsys.readouterr().err and (tmp_path / "jam" / "mine").exists()
    assert fuse(*inputs, "--mode", "cross", "--output", tmp_path / "jam", "--overwrite") == 0
    assert not (tmp_path / "jam" / "mine").exists()


# ----- dry run and provenance -----------------------------------------------------------------------------------------


PAIRS = [
    ("llama", "plain", {}),
    ("qwen2", "chameleon", {}),
    ("opt", "janus", {}),
    ("qwen3", "emu3", {"image-size": 16}),
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    made = {}

    def make(text, image):
        root = tmp_path_factory.mktemp("zoo")
        for role, kind, build in (("text", text, text_parent), ("image", image, image_parent)):
            if (role, kind) not in made:
                made[role, kind] = save(*build(kind), root / role)
        return made["text", text], made["image", image]

    return make


@pytest.mark.parametrize(("text", "image", "extra"), PAIRS)
def test_the_dry_run_touches_nothing_and_says_what_will_be_written(
    text, image, extra, zoo, inputs, tmp_path, capsys, monkeypatch
):
    text, image = zoo(text, image)
    arguments = ["--text", text, "--image", image, "--mode", "cross", "--max-shard-size", "150KB"]
    for name, value in extra.items():
        arguments += [f"--{name}", value]
    arguments += inputs[4:] if image_kind(image) == "llama" else []
    empty = tmp_path / "home"
    empty.mkdir()
    monkeypatch.chdir(empty)
    before = tree(tmp_path), tree(text), tree(image)
    assert fuse(*arguments, "--dry-run", "--output", empty / "jam") == 0
    assert (tree(tmp_path), tree(text), tree(image)) == before
    said = capsys.readouterr().out
    assert fuse(*arguments, "--output", tmp_path / "jam") == 0
    warned = capsys.readouterr().err
    state = read(tmp_path / "jam")
    files = list((tmp_path / "jam").glob("*.safetensors"))
    assert f"parameters: {sum(tensor.numel() for tensor in state.values()):,} (torch.float32" in said
    assert (
        f"disk: {size(sum(tensor.nbytes for tensor in state.values()))} in {len(files)} file(s)" in said
        and len(files) > 1
    )
    config = json.loads((tmp_path / "jam" / "config.json").read_text())
    last = config["image_token_offset"] + 15
    assert (
        f"vocabulary: {config['text_config']['vocab_size']}, image codes {config['image_token_offset']}..{last}\n"
        in said
    )
    warnings = re.findall(r"^  warning: (.*)$", said, re.M)
    assert warnings and warnings == re.findall(r"^  warning: (.*)$", warned, re.M)
    assert f"recipe {yaml_digest(tmp_path / 'jam')[:12]}" in said


def image_kind(folder):
    return json.loads((folder / "config.json").read_text())["model_type"]


def yaml_digest(folder):
    return re.search(r"recipe \| `([0-9a-f]{16})`", (folder / "README.md").read_text()).group(1)


@pytest.mark.parametrize(("text", "image", "extra"), PAIRS)
def test_every_tensor_is_explained_and_no_other(text, image, extra, zoo, vq, capsys):
    """Its provenance names tensors that are there, and all tensors of the parents that matter are named by one."""
    text, image = zoo(text, image)
    plain = image_kind(image) == "llama"
    settings = {name.replace("-", "_"): value for name, value in extra.items()}
    plan = plan_fusion(text, image, "cross", vq_model=vq if plain else None, **settings)
    there = {}
    for role, folder in (("text parent", text), ("image parent", image)):
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            there |= {(role, key): list(file.get_slice(key).get_shape()) for key in file.keys()}
    named = set()
    for key, tensor in plan.tensors.items():
        lines = plan.explain(key).splitlines()
        assert lines[0] == key and lines[1].startswith(f"  {list(tensor.spec.shape)} torch.") and len(lines) >= 4
        found = [
            re.fullmatch(r"  (text parent|image parent): (\S+) (\[.*\]) torch\.\w+ in (.*)", line) for line in lines[3:]
        ]
        for match in found:
            if match is None:
                assert lines[3:] == ["  from no parent"] and ("vq_model" in key or "_cross." in key), key
                continue
            role, name, shape, path = match.groups()
            assert json.loads(shape) == there[role, name] and os.path.isfile(path)
            named.add((role, name))
    left = {name for role, name in set(there) - named}
    unused = r"vqmodel|vision_model|\.aligner\.|rotary" + ("|lm_head" if image_kind(image) == "janus" else "")
    assert all(re.search(unused, name) for name in left), left


def test_explain(inputs, tmp_path, capsys):
    arguments = [*inputs, "--mode", "width", "--explain"]
    assert fuse(*arguments, "model.language_model.layers.1.mlp.up_proj.weight") == 0
    said = capsys.readouterr().out
    assert (
        said.count("model.layers.1.mlp.up_proj.weight [48, 32] torch.float32 in ") == 2 and "block rule 'copy'" in said
    )
    assert fuse(*arguments, "model.language_model.layers.1.mlp.up_proj.wait") == 2
    error = capsys.readouterr().err
    assert "has no tensor" in error and "Did you mean model.language_model.layers.1.mlp.up_proj.weight" in error
    assert fuse(*arguments, "?") == 2
    assert "`--dry-run` lists them" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ----- ends -----------------------------------------------------------------------------------------------------------


def test_damage_is_one_line_and_leaves_nothing(inputs, tmp_path, capsys):
    import shutil

    text = shutil.copytree(inputs[1], tmp_path / "in" / "text")
    state = load_file(text / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, text / "model.safetensors", metadata={"format": "pt"})
    assert fuse(*inputs, "--text", text, "--mode", "cross", "--output", tmp_path / "jam") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"jam-hf fuse: Tensor 'model.norm.weight' of the text parent, in {text / 'model.safetensors'}, holds NaN or "
        "infinity."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.fixture
def ctrl_c():
    """A shell's background jobs ignore Ctrl-C, and what they start inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_and_then_another_process_goes_on_to_the_same_bytes(ctrl_c, inputs, tmp_path, capfd, monkeypatch):
    """The second is the command as a user runs it: with another hash seed, and offline."""
    arguments = [*inputs, "--mode", "cross", "--max-shard-size", "60KB", "--output"]
    close = TensorFileWriter.close

    def stop(self, sync=True):
        close(self, sync)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TensorFileWriter, "close", stop)
        assert fuse(*arguments, tmp_path / "jam") == 130
    assert capfd.readouterr().err.endswith("\njam-hf fuse: interrupted; the same command goes on from here.\n")
    assert not (tmp_path / "jam").exists() and list((tmp_path / ".jam.unfinished").glob("*.safetensors"))

    command = [sys.executable, "-m", "jam_hf_cli", "fuse", *arguments, str(tmp_path / "jam")]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=processes.PATIENCE)
    assert done.returncode == 0, done.stderr
    assert re.search(r"going on: \d+ of \d+ files are there", done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "jam"]
    assert fuse(*arguments, tmp_path / "here") == 0
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("jam", "here")
    )
    assert ours == theirs
