"""`jam-hf fuse`: any two parents, instead of a run folder's. It parses arguments and calls the library."""

from __future__ import annotations

import argparse
import sys


_SETTINGS = (
    "text image vq mode init tokenizer image_tokenizer tokenizer_reading text_revision image_revision image_size "
    "image_token_offset cross_attention_interval dtype max_shard_size"
).split()


def add_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("any two parents, instead of a run folder's")
    group.add_argument("recipe", nargs="?", help="YAML file with the settings below, which win over it (paths start here)")
    group.add_argument("--text", help="text parent: folder or Hub id")
    group.add_argument("--image", help="image parent: folder or Hub id")
    group.add_argument("--vq", help="VQ model: folder or Hub id (default: the image parent's own)")
    group.add_argument("--mode", help="uniform, width or cross")
    group.add_argument("--init", help="cross: preserving, paper; width: copy, average, block_diagonal; uniform: average")
    group.add_argument("--output", help="folder of the fused checkpoint")
    group.add_argument("--overwrite", action="store_true", help="replace the output folder")
    group.add_argument("--dry-run", action="store_true", help="print what it would be; write nothing")
    group.add_argument("--explain", metavar="TENSOR", help="print where a tensor of the JAM comes from; write nothing")
    group.add_argument("--tokenizer", help="the JAM's tokenizer (default: the text parent's)")
    group.add_argument("--image-tokenizer", help="the image parent's tokenizer, where its folder has none")
    group.add_argument(
        "--tokenizer-reading",
        choices=("transformers", "files"),
        help="split text as AutoTokenizer, or as tokenizer.json has it",
    )
    group.add_argument("--text-revision", help="branch, tag or commit on the Hub")
    group.add_argument("--image-revision", help="branch, tag or commit on the Hub")
    group.add_argument("--image-size", type=int, help="side of a picture in pixels, where the VQ model takes any (Emu3)")
    group.add_argument("--image-token-offset", type=int, help="id of image code 0 in a plain causal LM")
    group.add_argument("--cross-attention-interval", type=int, help="cross blocks after every so many-th layer (default: 2)")
    group.add_argument("--dtype", help="of the decoders, e.g. bfloat16 (default: the parents')")
    group.add_argument("--max-shard-size", help="of the safetensors files (default: 2GB)")


def names_parents(args: argparse.Namespace) -> bool:
    """Whether any parent or setting is given; without, `fuse` is the quickstart's stage."""
    others = ("recipe", "output", "overwrite", "dry_run", "explain", *_SETTINGS)
    return any(getattr(args, name) not in (None, False) for name in others)


def run(args: argparse.Namespace) -> None:
    from ..files import check_apart, check_free
    from ..fusion.fuse import plan_recipe, run_fusion
    from ..fusion.recipe import FusionRecipe

    if args.force:
        raise ValueError("--force is for run folders; to replace the folder of --output, give --overwrite.")
    settings = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    if args.seed is not None:
        settings["seed"] = args.seed
    if args.recipe is not None:
        recipe = FusionRecipe.from_yaml(args.recipe, **settings)
    else:
        missing = [f"--{name}" for name in ("text", "image", "mode") if name not in settings]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing (or give none of them, to fuse a run folder's parents).")
        recipe = FusionRecipe.of(settings, "fuse")
    writes = not (args.dry_run or args.explain)
    if writes and args.output is None:
        raise ValueError("--output is missing (or --dry-run, to see what it would be).")
    if writes:
        inputs = (recipe.text, recipe.image, recipe.vq, recipe.tokenizer, recipe.image_tokenizer, args.recipe)
        check_apart(args.output, *inputs)
        check_free(args.output, args.overwrite)
    plan = plan_recipe(recipe, headers_only=not writes)
    if args.explain:
        print(plan.explain(args.explain))
    elif args.dry_run:
        print(plan.describe())
    else:
        print(plan.describe(tensors=False), file=sys.stderr)
        path = run_fusion(plan, args.output, args.overwrite)
        print(f"fused: {path} (recipe {str(plan.digest)[:16]})")
