"""The command line from outside: every command explains itself, and the scripts of conversion/ are commands by another name."""

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from jam_hf import cli


SCRIPTS = sorted((Path(__file__).parents[2] / "conversion").glob("*.py"))
COMMANDS = ("quickstart", "picture-world", "train-llm", "fuse", "page", *cli.COMMANDS)
OPTIONS = {
    "fuse": ["--text", "--image", "--run", "--force"],
    "convert-vq": ["--source", "--layout"],
    "convert-metaseq": ["--source", "--num-attention-heads"],
    "certify": ["--texts", "--pairs", "--image-token-offset"],
    "generate": ["--guidance-scale", "--picture-after-sentence", "--output"],
    "index": ["--pairs", "--embedder", "--max-score"],
}


def stopped_with(arguments, capsys, run=cli.main):
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    return stop.value.code, capsys.readouterr()


def test_the_list_of_commands(capsys):
    code, told = stopped_with(["--help"], capsys)
    assert code == 0 and all(re.search(rf"^ +{command}( |$)", told.out, re.M) for command in COMMANDS)
    assert set(OPTIONS) == {"fuse", *cli.COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    code, told = stopped_with([command, "--help"], capsys)
    assert code == 0 and told.out.startswith(f"usage: jam-hf {command} ")
    options = told.out[told.out.index("options:") :]
    assert all(re.search(rf"^ +{option}\s", options, re.M) for option in OPTIONS.get(command, ["--run"]))


def test_unknown_commands_and_missing_arguments(capsys):
    code, told = stopped_with(["dream"], capsys)
    assert code == 2 and "invalid choice: 'dream'" in told.err
    for command in ("certify", "convert-vq", "convert-metaseq", "index"):
        code, told = stopped_with([command], capsys)
        assert code == 2 and "the following arguments are required" in told.err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_errors_and_interruptions_end_in_one_line(command, capsys, monkeypatch):
    arguments = {
        "convert-vq": ["--source", "a", "--output", "b"],
        "certify": ["--model", "a"],
        "convert-metaseq": ["--source", "a", "--output", "b"],
        "generate": ["a prompt"],
        "index": ["--model", "a", "--pairs", "b", "--output", "c"],
    }[command]
    for error, status, words in (
        (ValueError("a reason"), 2, f"jam-hf {command}: a reason\n"),
        (OSError(28, "no room"), 2, f"jam-hf {command}: [Errno 28] no room\n"),
        (KeyboardInterrupt(), 130, f"\njam-hf {command}: interrupted; nothing was written.\n"),
    ):

        def run(args, error=error):
            raise error

        monkeypatch.setattr(cli.COMMANDS[command], "run", run)
        assert cli.main([command, *arguments]) == status
        assert capsys.readouterr().err == words


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
    for module in (cli.fuse, *cli.COMMANDS.values()):
        monkeypatch.setattr(module, "run", reached.append)
    for line in lines:
        python, path, *arguments = shlex.split(line.replace("\\\n", " "))
        assert (python, path) == ("python", f"conversion/{script.name}")
        with pytest.raises(SystemExit) as stop:
            run_script(script, arguments, monkeypatch)
        assert stop.value.code == 0
        assert reached[-1].output.startswith("runs/") and f"jam-hf {reached[-1].command}" in docstring
    assert len(reached) == len(lines)


def test_the_list_of_stages_is_that_of_the_quickstart():
    from jam_hf.commands import STAGE_HELP
    from jam_hf.quickstart.stages import STAGES

    assert {name: method.__doc__.strip().rstrip(".") for name, (_, method) in STAGES.items()} == STAGE_HELP
