"""`jam-hf`: the command line. It parses arguments and calls the library; it knows nothing else."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence

from .commands import DEFAULT_RUN, STAGE_HELP, certify, convert_metaseq, convert_vq, fuse, generate, index


COMMANDS = {
    "convert-vq": convert_vq,
    "certify": certify,
    "convert-metaseq": convert_metaseq,
    "generate": generate,
    "index": index,
}


def _parser() -> argparse.ArgumentParser:
    from .version import __version__

    parser = argparse.ArgumentParser(prog="jam-hf", description="Fuse a text LLM and an autoregressive image model.")
    parser.add_argument("--version", action="version", version=f"jam-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add_run(command: argparse.ArgumentParser) -> None:
        command.add_argument("--run", default=DEFAULT_RUN, help=f"run folder (default: {DEFAULT_RUN})")
        command.add_argument("--seed", type=int, help="seed of data, initialisation and training (default: 0)")
        command.add_argument("--train-all", action="store_true", help="train jam-uniform and jam-width as well")
        families = "architecture of the parents; unlike: a Qwen2 and a Chameleon, with different tokenizers"
        command.add_argument("--family", choices=("llama", "opt", "unlike"), default="llama", help=families)
        command.add_argument("--small", action="store_true", help="the whole path in seconds, learning nothing")

    quickstart = commands.add_parser("quickstart", help="every stage below, in order; continues where it was stopped")
    quickstart.set_defaults(do=_run)
    add_run(quickstart)
    for name, words in STAGE_HELP.items():
        stage = commands.add_parser(name, help=words)
        stage.set_defaults(do=_run)
        add_run(stage)
        stage.add_argument("--force", action="store_true", help="run it although its result is there")
        if name == "fuse":
            stage.set_defaults(do=_fuse)
            fuse.add_arguments(stage)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP)
        command.set_defaults(do=module.run)
        module.add_arguments(command)
    return parser


def _fuse(args: argparse.Namespace) -> None:
    (fuse.run if fuse.names_parents(args) else _run)(args)


def _run(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from .quickstart.stages import QuickstartSettings, Run, run_all, run_stage

    settings = QuickstartSettings.of_family(args.family, args.small)
    settings = replace(settings, seed=args.seed or 0, train_all=args.train_all)
    run = Run(args.run, settings)
    if args.command == "quickstart":
        print(f"The page lies at {run_all(run)}")
    elif run_stage(run, args.command, args.force):
        print(f"{args.command}: done, in {run.folder}")
    else:
        print(f"{args.command}: its result is in {run.folder} already (--force runs it again)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; returns the exit status. What the user can mend is one line on stderr."""
    args = _parser().parse_args(arguments)
    try:
        args.do(args)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        print(f"jam-hf {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        rest = "nothing was written" if args.command in COMMANDS else "the same command goes on from here"
        print(f"\njam-hf {args.command}: interrupted; {rest}.", file=sys.stderr)
        return 130
    return 0


def entry() -> int:
    """`jam-hf` as a process of its own."""
    gc.freeze()  # what was imported lives to the end: collections, the last one above all, need not look at it
    return main()


if __name__ == "__main__":
    sys.exit(entry())
