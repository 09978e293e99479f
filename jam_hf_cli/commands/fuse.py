"""`jam-hf fuse`: two parents to a JAM. It calls the library and knows nothing else."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ..options import option


# Options that are settings of a recipe (jam_hf.fusion.recipe), which has them all.
SETTINGS = (
    "text image vq mode init tokenizer image_tokenizer tokenizer_reading text_revision image_revision image_size "
    "image_token_offset cross_attention_interval dtype seed max_shard_size"
).split()
RESUMES = True


@dataclass(frozen=True, kw_only=True)
class Options:
    """two parents, a text LLM and an image model, to one checkpoint; stopped, it goes on where it was"""

    recipe: str | None = option(
        "YAML file with the settings below, which win over it (its paths start here)",
        None,
        unset="none",
        nargs="?",
        positional=True,
    )
    text: str | None = option("text parent: folder or Hub id", None, unset="the recipe's")
    image: str | None = option("image parent: folder or Hub id", None, unset="the recipe's")
    vq: str | None = option("VQ model: folder or Hub id", None, unset="the image parent's own")
    mode: str | None = option("uniform, width or cross", None, unset="the recipe's")
    init: str | None = option(
        "cross: preserving, paper; width: copy, average, block_diagonal; uniform: average",
        None,
        unset="preserving, copy, average",
    )
    output: str | None = option("folder of the fused checkpoint", None, unset="none, for --dry-run and --explain")
    overwrite: bool = option("replace the output folder", False)
    dry_run: bool = option("print what it would be; write nothing", False)
    explain: str | None = option(
        "print where a tensor of the JAM comes from; write nothing", None, unset="no tensor", metavar="TENSOR"
    )
    tokenizer: str | None = option("the JAM's tokenizer", None, unset="the text parent's")
    image_tokenizer: str | None = option("the image parent's tokenizer", None, unset="that of its folder")
    tokenizer_reading: str | None = option(
        "split text as AutoTokenizer, or as tokenizer.json has it",
        None,
        unset="transformers",
        choices=("transformers", "files"),
    )
    text_revision: str | None = option("branch, tag or commit on the Hub", None, unset="its main branch")
    image_revision: str | None = option("branch, tag or commit on the Hub", None, unset="its main branch")
    image_size: int | None = option(
        "side of a picture in pixels, where the VQ model takes any (Emu3)", None, unset="what the VQ model says"
    )
    image_token_offset: int | None = option(
        "id of image code 0 in a plain causal LM", None, unset="its tokenizer's <img:0>"
    )
    cross_attention_interval: int | None = option("cross blocks after every so many-th layer", None, unset="2")
    dtype: str | None = option("of the decoders, e.g. bfloat16", None, unset="the parents'")
    seed: int | None = option("of what is drawn at random", None, unset="0")
    max_shard_size: str | None = option("of the safetensors files", None, unset="2GB")


def run(options: Options) -> None:
    from jam_hf.files import check_apart, check_free
    from jam_hf.fusion.fuse import plan_recipe, run_fusion
    from jam_hf.fusion.recipe import FusionRecipe

    if options.dry_run and options.explain is not None:
        raise ValueError("--dry-run and --explain print different things; give one of them.")
    settings = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    if options.recipe is not None:
        recipe = FusionRecipe.from_yaml(options.recipe, **settings)
    else:
        missing = [f"--{name}" for name in ("text", "image", "mode") if name not in settings]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} is missing (`jam-hf quickstart fuse` fuses a run folder's parents)."
            )
        recipe = FusionRecipe.of(settings, "fuse")
    writes = not options.dry_run and options.explain is None
    if writes and options.output is None:
        raise ValueError("--output is missing (or --dry-run, to see what it would be).")
    if options.output is not None:
        inputs = (recipe.text, recipe.image, recipe.vq, recipe.tokenizer, recipe.image_tokenizer, options.recipe)
        check_apart(options.output, *inputs)
        check_free(options.output, options.overwrite)
    elif options.overwrite:
        raise ValueError("--overwrite has nothing to act on without --output.")
    plan = plan_recipe(recipe, headers_only=not writes)
    if options.explain is not None:
        print(plan.explain(options.explain))
    elif options.dry_run:
        print(plan.describe())
    elif options.output is not None:
        print(plan.describe(tensors=False), file=sys.stderr)
        path = run_fusion(plan, options.output, options.overwrite)
        print(f"fused: {path} (recipe {str(plan.digest)[:16]})")
