"""The command line from outside: every command explains itself, and the scripts of conversion/ are commands by
another name.
"""

import ast
import dataclasses
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import processes
import pytest

import jam_hf_cli as cli
from jam_hf_cli.commands import quickstart
from jam_hf_cli.options import add_options, option, read_options


SCRIPTS = sorted((Path(__file__).parents[2] / "conversion").glob("*.py"))
REQUIRED = {
    "convert-vq": ["--source", "a", "--output", "b"],
    "certify": ["--model", "a"],
    "convert-metaseq": ["--source", "a", "--output", "b"],
    "generate": ["a prompt"],
    "index": ["--model", "a", "--pairs", "b", "--output", "c"],
    "fuse": [],
    "quickstart": [],
}


def stopped_with(arguments, capsys, run=cli.main):
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    return stop.value.code, capsys.readouterr()


def help_of(command, capsys):
    code, told = stopped_with([command, "--help"], capsys)
    assert code == 0 and told.out.startswith(f"usage: jam-hf {command} ")
    return told.out


def test_the_list_of_commands_is_grouped_by_what_a_user_does(capsys):
    code, told = stopped_with(["--help"], capsys)
    assert code == 0
    lines = told.out.splitlines()
    for words, commands in cli.GROUPS.items():
        place = lines.index(f"{words}:")
        assert [line.split()[0] for line in lines[place + 1 : place + 1 + len(commands)]] == list(commands)
    assert not any(re.match(r" +train-vq ", line) for line in lines) and "--debug" in told.out
    assert set(REQUIRED) == set(cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_every_option_and_every_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # argparse breaks lines inside words, too
    told = " ".join(help_of(command, capsys).split())
    for field in dataclasses.fields(cli.COMMANDS[command].Options):
        flag = ("--no-" if field.default is True else "--") + field.name.replace("_", "-")
        if field.metadata["arguments"].get("positional"):
            flag = field.name.upper()
        assert f" {flag} " in told and field.metadata["help"] in told, field.name
        default = field.default
        if default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING:
            assert field.metadata["unset"] or default is not None, f"{field.name}: what happens without it?"
            shown = "off" if default is False else "none" if default is dataclasses.MISSING else default
            shown = field.metadata["unset"] or shown
            assert f"{field.metadata['help']} (default: {shown})" in told, field.name


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_code_of_a_command_reads_every_option(command):
    """What a command gets is the dataclass alone, and each field is read: `options.name`, or a name of a table of
    settings.
    """
    module = cli.COMMANDS[command]
    tree = ast.parse(inspect.getsource(module))
    assert list(inspect.signature(module.run).parameters) == ["options"]
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "options"
    }
    read |= set(getattr(module, "SETTINGS", ()))
    assert read == {field.name for field in dataclasses.fields(module.Options)}


def test_defaults_are_those_of_the_library():
    from jam_hf.conversion.metaseq import convert_metaseq
    from jam_hf.conversion.vq import convert_vq
    from jam_hf.conversion.vq_tables import LAYOUTS
    from jam_hf.evaluation.retention import certify
    from jam_hf.fusion.recipe import FusionRecipe
    from jam_hf.quickstart.settings import FAMILIES, QuickstartSettings
    from jam_hf.quickstart.stages import STAGES
    from jam_hf.retrieval import RetrievalSettings, build_index
    from jam_hf.retrieval.embedder import DEFAULT_EMBEDDER

    def defaults(function):
        return {
            name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty
        }

    def unlike(command, library):
        ours = {field.name: field for field in dataclasses.fields(cli.COMMANDS[command].Options)}
        for name, value in library.items():
            shown = None if name not in ours else ours[name].metadata["unset"]
            if name in ours and value is not None and ours[name].default != value and shown != str(value):
                yield command, name

    libraries = {
        "fuse": FusionRecipe,
        "convert-vq": convert_vq,
        "convert-metaseq": convert_metaseq,
        "certify": certify,
        "index": lambda embedder=DEFAULT_EMBEDDER: None,
        "quickstart": QuickstartSettings,
    }
    exceptions = {("fuse", "mode")}  # asked for, so that nobody gets a mode by accident
    assert {pair for command in libraries for pair in unlike(command, defaults(libraries[command]))} == exceptions
    assert not list(unlike("index", {**defaults(RetrievalSettings), **defaults(build_index)}))
    choices = {
        field.name: field.metadata["arguments"].get("choices") for field in dataclasses.fields(quickstart.Options)
    }
    assert choices["family"] == FAMILIES and choices["stage"] == tuple(STAGES)
    assert {name: method.__doc__.strip().rstrip(".") for name, (_, method) in STAGES.items()} == quickstart.STAGES
    assert cli.COMMANDS["convert-vq"].LAYOUTS == LAYOUTS


def test_unknown_commands_and_missing_arguments(capsys):
    code, told = stopped_with(["dream"], capsys)
    assert code == 2 and "invalid choice: 'dream'" in told.err
    for command in ("certify", "convert-vq", "convert-metaseq", "index"):
        code, told = stopped_with([command], capsys)
        assert code == 2 and "the following arguments are required" in told.err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_errors_and_interruptions_end_in_one_line(command, capsys, monkeypatch):
    rest = "the same command goes on from here" if command in ("fuse", "quickstart") else "nothing was written"
    for error, status, words in (
        (ValueError("a reason"), 2, f"jam-hf {command}: a reason\n"),
        (OSError(28, "no room"), 2, f"jam-hf {command}: [Errno 28] no room\n"),
        (ImportError("pip install it"), 2, f"jam-hf {command}: pip install it\n"),
        (KeyboardInterrupt(), 130, f"\njam-hf {command}: interrupted; {rest}.\n"),
    ):

        def run(options, error=error):
            raise error

        monkeypatch.setattr(cli.COMMANDS[command], "run", run)
        assert cli.main([command, *REQUIRED[command]]) == status
        assert capsys.readouterr().err == words
        if status == 2:
            with pytest.raises(type(error), match=re.escape(str(error))):
                cli.main(["--debug", command, *REQUIRED[command]])


# ----- flags that would have nothing to act on ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("generate x --seed 1", "--seed has nothing to act on: it needs one of --temperature"),
        ("generate x --retriever-embedder a", "--retriever-embedder has nothing to act on: it needs --retriever."),
        ("generate x --memory-embedder a", "--retriever-embedder has nothing to act on: it needs --retriever."),
        ("generate x --mode text --guidance-scale 2", "--guidance-scale: --mode text writes no pictures"),
        ("generate x --mode text --image-top-k 2 --temperature 1", "--image-top-k: --mode text writes no pictures"),
        ("certify --model a --texts t --text-parent p --image-tokenizer i", "--image-tokenizer has nothing to act on"),
        ("certify --model a --texts t --text-parent p --image-token-offset 7", "without --image-parent"),
        (
            "certify --model a --pairs t --image-parent p --softmax all",
            "--softmax has nothing to act on without --text-parent",
        ),
        ("certify --model a --pairs t --image-parent p --max-tokens 9", "--max-tokens has nothing to act on"),
        ("certify --model a --texts t", "it needs both"),
        ("fuse --text a --image b --mode cross --dry-run --explain c", "give one of them"),
        (
            "fuse --text a --image b --mode cross --dry-run --overwrite",
            "--overwrite has nothing to act on without --output",
        ),
        ("quickstart --force", "--force is for one stage"),
        ("quickstart --train-all --family unlike", "jam-cross only"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments.split()) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_folder_is_nobody_elses_folder(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    for arguments in (["quickstart", "train-vq"], ["train-vq"], ["quickstart"]):
        assert cli.main([*arguments, "--run", str(tmp_path), "--small"]) == 2
        assert "is not empty and holds no run of the quickstart" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "new").mkdir()
    assert cli.main(["quickstart", "tokenizer", "--run", str(tmp_path / "new"), "--small"]) == 2
    assert "jam-hf quickstart picture-world --run" in capsys.readouterr().err


# ----- earlier spellings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "stage"),
    [
        ("train-vq --run a --small", "train-vq"),
        ("page", "page"),
        ("--debug pretrain --force", "pretrain"),
        ("fuse --run a", "fuse"),
        ("fuse --force --seed=1 --run=a", "fuse"),
        ("quickstart fuse --run a", "fuse"),
        ("quickstart --run train-vq", None),
        ("quickstart", None),
    ],
)
def test_stages_by_their_earlier_spellings(arguments, stage, monkeypatch):
    reached = []
    monkeypatch.setattr(quickstart, "run", reached.append)
    assert cli.main(arguments.split()) == 0
    assert [options.stage for options in reached] == [stage]


@pytest.mark.parametrize("arguments", ["fuse", "fuse --seed 1", "fuse --text a --seed 1", "fuse recipe.yaml --seed 1"])
def test_fuse_is_the_fusion_of_two_parents(arguments, monkeypatch):
    reached = []
    monkeypatch.setattr(cli.COMMANDS["fuse"], "run", reached.append)
    assert cli.main(arguments.split()) == 0 and len(reached) == 1


# ----- parsers from dataclasses ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    name: str = option("a name")
    words: list[str] = option("words", nargs="*", positional=True)
    size: int | None = option("a size of 100 %", None, unset="any")
    rate: float = option("a rate", 0.5)
    write: bool = option("do not write", True)
    much: bool = option("much", False)
    again: list[str] = option("again", [], action="append")


def test_types_and_defaults_come_from_the_dataclass():
    import argparse

    def read(*arguments):
        parser = argparse.ArgumentParser()
        add_options(parser, _Options)
        assert "100 % (default: any)" in parser.format_help()
        return read_options(_Options, parser.parse_args(arguments))

    assert read("--name", "a") == _Options(name="a", words=[])
    found = read("b", "c", "--name=a", "--size=3", "--rate=1", "--no-write", "--much", "--again=x", "--again=y")
    assert found == _Options(name="a", words=["b", "c"], size=3, rate=1.0, write=False, much=True, again=["x", "y"])
    assert read("--name", "a").again == []
    for wrong in ([], ["--name", "a", "--size", "many"]):
        with pytest.raises(SystemExit):
            read(*wrong)


# ----- processes of their own -----------------------------------------------------------------------------------------


def child(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=processes.PATIENCE
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fuse", "--help"], ["dream"], ["generate"]])
def test_help_and_mistakes_import_no_library(arguments):
    code = (
        "import sys, jam_hf_cli\n"
        "try:\n    jam_hf_cli.entry()\n"
        "except SystemExit:\n    pass\n"
        "found = {name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'numpy', 'jam_hf', 'yaml'}\n"
        "assert not found, found\n"
    )
    done = child(code, *arguments)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_brings_no_other_along():
    code = (
        "import sys, jam_hf\n"
        "others = 'diffusers bitsandbytes peft trl datasets lm_eval faiss pandas pyarrow scipy.stats'.split()\n"
        "own = 'jam_hf.fusion jam_hf.data jam_hf.training jam_hf.evaluation jam_hf.quickstart'.split()\n"
        "found = {*others, *own} & set(sys.modules)\n"
        "assert not found, found\n"
        "from transformers import AutoModelForCausalLM\n"
        "assert AutoModelForCausalLM._model_mapping[jam_hf.JamConfig] is jam_hf.JamForCausalLM\n"
        "names = {}\n"
        "exec('from jam_hf import *', names)\n"
        "assert set(jam_hf.__all__) <= set(names) and set(jam_hf.__all__) <= set(dir(jam_hf))\n"
        "assert names['fuse'].__name__ == 'fuse'\n"
        "assert not hasattr(jam_hf, 'nothing_of_this_name')\n"
    )
    done = child(code)
    assert done.returncode == 0, done.stderr


# ----- scripts of conversion/ -----------------------------------------------------------------------------------------


def run_script(script, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_script_has_help(script, capsys, monkeypatch):
    code, told = stopped_with(["--help"], capsys, lambda arguments: run_script(script, arguments, monkeypatch))
    assert code == 0 and told.out.startswith("usage: jam-hf ")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_commands_in_a_scripts_docstring_are_understood(script, monkeypatch):
    """What reaches the command, when they are run as they stand there; the command itself is another's test."""
    docstring = ast.get_docstring(ast.parse(script.read_text()))
    lines = re.findall(r"^    (python (?:.*\\\n)*.*)", docstring, re.M)
    assert lines
    reached = []
    monkeypatch.setattr(cli, "_prepare", lambda args: None)
    for name, module in cli.COMMANDS.items():
        monkeypatch.setattr(module, "run", lambda options, name=name: reached.append((name, options)))
    for line in lines:
        python, path, *arguments = shlex.split(line.replace("\\\n", " "))
        assert (python, path) == ("python", f"conversion/{script.name}")
        with pytest.raises(SystemExit) as stop:
            run_script(script, arguments, monkeypatch)
        assert stop.value.code == 0
        name, options = reached[-1]
        assert options.output.startswith("runs/") and f"jam-hf {name}" in docstring
    assert len(reached) == len(lines)
