"""`jam-hf convert-metaseq`: metaseq's OPT or CM3leon files. It parses arguments and calls the library."""

from __future__ import annotations

import argparse


HELP = "metaseq's OPT or CM3leon files to an OPT checkpoint of transformers"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--source", required=True, nargs="+", help="folder with the .pt files, or the files of one checkpoint")
    command.add_argument("--output", required=True, help="folder of the OPT checkpoint")
    command.add_argument("--num-attention-heads", type=int, help="where the files do not say")
    command.add_argument("--activation-function", help="relu, gelu, ... where the files do not say (relu for OPT)")
    command.add_argument("--post-norm", action="store_true", help="LayerNorm behind attention and FFN, as in OPT-350m")
    command.add_argument("--vocab-size", type=int, help="leave out the rows behind, with which metaseq pads (default: all)")
    command.add_argument("--dtype", help="float32, float16 or bfloat16 (default: that of the files)")
    command.add_argument("--max-shard-size", default="2GB")
    command.add_argument("--overwrite", action="store_true", help="replace the output folder")


def run(args: argparse.Namespace) -> None:
    from ..conversion.metaseq import convert_metaseq

    path = convert_metaseq(
        args.source,
        args.output,
        num_attention_heads=args.num_attention_heads,
        activation_function=args.activation_function,
        post_norm=args.post_norm,
        vocab_size=args.vocab_size,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
    )
    print(f"converted: {path}")
