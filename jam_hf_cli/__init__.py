"""`jam-hf`: the command line. It reads options and calls the library; it knows nothing else.

It stands beside the package, not in it: `import jam_hf` imports torch and transformers, which help needs not, and which
have to find the settings of threads in place (threads.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .commands import certify, convert_metaseq, convert_vq, fuse, generate, index, quickstart
from .options import add_options, read_options
from .threads import is_small, settle


# What a user does, and the commands for it.
GROUPS = {
    "make a JAM": {"fuse": fuse, "convert-vq": convert_vq, "convert-metaseq": convert_metaseq},
    "use it": {"generate": generate, "index": index},
    "measure it": {"certify": certify},
    "see all of it at work": {"quickstart": quickstart},
}
COMMANDS = {name: module for commands in GROUPS.values() for name, module in commands.items()}


class _Version(argparse.Action):
    """Prints the version, without importing the package."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        package = importlib.util.find_spec("jam_hf")
        assert package is not None and package.origin is not None
        print("jam-hf", runpy.run_path(str(Path(package.origin).with_name("version.py")))["__version__"])
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    lines = ["Fuse a text LLM and an autoregressive image model, and use what they become."]
    for words, commands in GROUPS.items():
        lines += ["", f"{words}:", *(f"  {name:17} {module.Options.__doc__}" for name, module in commands.items())]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="jam-hf",
        usage="jam-hf [--debug] COMMAND ... (jam-hf COMMAND --help has its options)",
        description="\n".join(lines),
        formatter_class=raw,
    )
    parser.add_argument("--version", action=_Version, help="print the version, and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (default: one line)")
    subparsers = parser.add_subparsers(
        prog="jam-hf", dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS
    )
    for name, module in COMMANDS.items():
        words = module.Options.__doc__
        command = subparsers.add_parser(name, description=f"{words[0].upper()}{words[1:]}.", formatter_class=raw)
        add_options(command, module.Options)
        if module is quickstart:
            command.epilog = "stages:\n" + "\n".join(
                f"  {stage:17} {said}" for stage, said in quickstart.STAGES.items()
            )
    return parser


def _as_today(arguments: Sequence[str]) -> list[str]:
    """Earlier spellings: a stage of the quickstart was a command of its own, and `fuse --run` one of them."""
    found = list(arguments)
    place = next((place for place, word in enumerate(found) if not word.startswith("-")), None)
    if place is not None and found[place] in quickstart.STAGES:
        flags = {word.split("=")[0] for word in found[place + 1 :] if word.startswith("--")} - {"--seed"}
        if found[place] != "fuse" or (flags and flags <= {"--run", "--train-all", "--family", "--small", "--force"}):
            found.insert(place, "quickstart")
    return found


def _prepare(args: argparse.Namespace) -> None:
    """What a process of its own sets before it imports anything: threads, and silence of other libraries."""
    settle(small=args.command == "generate" and is_small(args.model))
    if not args.debug:
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)


def main(arguments: Sequence[str] | None = None, own_process: bool = False) -> int:
    """Do what the arguments say; returns the exit status. What the user can mend is one line on stderr.

    own_process: nothing else goes on in this process, and torch is not imported yet.
    """
    args = _parser().parse_args(_as_today(sys.argv[1:] if arguments is None else arguments))
    command = COMMANDS[args.command]
    if own_process:
        _prepare(args)
    try:
        command.run(read_options(command.Options, args))
    except (ValueError, OSError, ImportError) as error:
        if args.debug:
            raise
        print(f"jam-hf {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        rest = "the same command goes on from here" if command.RESUMES else "nothing was written"
        print(f"\njam-hf {args.command}: interrupted; {rest}.", file=sys.stderr)
        return 130
    return 0


def entry() -> int:
    """`jam-hf` as a process of its own."""
    return main(own_process=True)


__all__ = ["COMMANDS", "GROUPS", "entry", "main"]
