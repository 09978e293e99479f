"""`jam-hf certify`: what a JAM keeps of its parents. It parses arguments and calls the library."""

from __future__ import annotations

import argparse
from pathlib import Path


HELP = "measure what a JAM keeps of its parents, and write it into its model card"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="folder of the JAM (with --no-write also a Hub id)")
    command.add_argument("--text-parent", help="text parent: folder or Hub id; needs --texts")
    command.add_argument("--image-parent", help="image parent: folder or Hub id; needs --pairs")
    command.add_argument("--texts", help="text file (UTF-8) whose paragraphs are documents")
    command.add_argument("--pairs", help="folder of pictures with metadata.jsonl, or of a saved dataset with image and text")
    command.add_argument("--image-tokenizer", help="the image parent's tokenizer, where its folder has none")
    command.add_argument(
        "--image-token-offset",
        type=int,
        help="id of image code 0 in a plain causal LM (default: its tokenizer's <img:0>, else what the JAM's fusion.yaml says)",
    )
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--max-tokens", type=int, help="where texts are cut (default: 1024, or the models' positions)")
    command.add_argument("--max-documents", type=int, help="read no more than the first so many texts, and pairs")
    command.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    command.add_argument(
        "--softmax",
        choices=("text", "all"),
        default="text",
        help="of texts: text leaves image codes out (the default), all counts them, as lm_eval's own model=hf does",
    )
    command.add_argument("--no-write", action="store_true", help="leave the model card as it is")


def run(args: argparse.Namespace) -> None:
    from ..evaluation.retention import certify

    retention = certify(
        args.model,
        text_parent=args.text_parent,
        image_parent=args.image_parent,
        texts=args.texts,
        pairs=args.pairs,
        image_tokenizer=args.image_tokenizer,
        image_token_offset=args.image_token_offset,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        max_documents=args.max_documents,
        device=args.device,
        write=not args.no_write,
        softmax=args.softmax,
    )
    print(retention.table())
    if not args.no_write:
        print(f"\nwritten: {Path(args.model) / 'README.md'}")
