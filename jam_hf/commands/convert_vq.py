"""`jam-hf convert-vq`: an image parent's VQ model. It parses arguments and calls the library."""

from __future__ import annotations

import argparse


HELP = "an image parent's VQ model, as `fuse --vq` takes it"


def add_arguments(command: argparse.ArgumentParser) -> None:
    from ..conversion.vq_tables import LAYOUTS

    source = "folder or Hub id (transformers' Chameleon, Janus, Emu3) or file of weights (taming, LlamaGen)"
    command.add_argument("--source", required=True, help=source)
    command.add_argument("--output", required=True, help="folder of the converted VQ model")
    command.add_argument("--layout", choices=LAYOUTS, help="layout of the weights (default: found by their keys)")
    command.add_argument("--sample-size", type=int, help="side of the pictures in pixels, where no config says it")
    command.add_argument(
        "--codebook-l2-norm",
        action="store_true",
        default=None,
        help="transformers' Janus: codes as DeepSeek's own code has them",
    )
    command.add_argument("--allow-old-files", action="store_true", help="read .ckpt, .pt, .pth and .bin (weights_only=True)")
    command.add_argument("--overwrite", action="store_true", help="replace the output folder")


def run(args: argparse.Namespace) -> None:
    from ..conversion.vq import convert_vq

    path = convert_vq(
        args.source,
        args.output,
        layout=args.layout,
        sample_size=args.sample_size,
        codebook_l2_norm=args.codebook_l2_norm,
        allow_pickle=args.allow_old_files,
        overwrite=args.overwrite,
    )
    print(f"VQ model: {path}")
