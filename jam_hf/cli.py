"""`jam-hf`: the command line. It parses arguments and calls the library; it knows nothing else."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


DEFAULT_RUN = "runs/quickstart"


def _parser() -> argparse.ArgumentParser:
    from .quickstart.stages import STAGES
    from .version import __version__

    parser = argparse.ArgumentParser(prog="jam-hf", description="Fuse a text LLM and an autoregressive image model.")
    parser.add_argument("--version", action="version", version=f"jam-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add_run(command: argparse.ArgumentParser) -> None:
        command.add_argument("--run", default=DEFAULT_RUN, help=f"run folder (default: {DEFAULT_RUN})")
        command.add_argument("--seed", type=int, help="seed of data, initialisation and training (default: 0)")
        command.add_argument("--train-all", action="store_true", help="train jam-uniform and jam-width as well")
        command.add_argument("--family", choices=("llama", "opt"), default="llama", help="architecture of the parents")
        command.add_argument("--small", action="store_true", help="the whole path in seconds, learning nothing")

    quickstart = commands.add_parser("quickstart", help="every stage below, in order; continues where it was stopped")
    add_run(quickstart)
    for name, (_, method) in STAGES.items():
        stage = commands.add_parser(name, help=method.__doc__.strip().rstrip("."))
        add_run(stage)
        stage.add_argument("--force", action="store_true", help="run it although its result is there")
        if name == "fuse":
            _add_fuse(stage)

    _add_convert_vq(commands.add_parser("convert-vq", help="an image parent's VQ model, as `fuse --vq` takes it"))
    _add_certify(commands)
    _add_convert_metaseq(commands)

    generate = commands.add_parser("generate", help="write an interleaved document from a prompt, as one HTML page")
    generate.add_argument("prompt", help="what to write about; with --chat, what the user says")
    generate.add_argument("--model", default=f"{DEFAULT_RUN}/jam-cross", help="JAM checkpoint: folder or Hub id")
    generate.add_argument("--mode", choices=("interleaved", "text", "image"), default="interleaved")
    generate.add_argument("--chat", action="store_true", help="put the prompt through the chat template")
    generate.add_argument("--image", action="append", default=[], help="picture for an <image> in the prompt")
    generate.add_argument("--guidance-scale", type=float, default=None, help="classifier-free guidance inside pictures")
    generate.add_argument("--temperature", type=float, default=None, help="sample with this temperature (default: greedy)")
    generate.add_argument("--max-new-tokens", type=int, default=None)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--output", default="document.html", help="HTML file to write")
    return parser


def _add_fuse(stage: argparse.ArgumentParser) -> None:
    group = stage.add_argument_group("any two parents, instead of a run folder's")
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
    group.add_argument("--text-revision", help="branch, tag or commit on the Hub")
    group.add_argument("--image-revision", help="branch, tag or commit on the Hub")
    group.add_argument("--image-size", type=int, help="side of a picture in pixels, where the VQ model takes any (Emu3)")
    group.add_argument("--image-token-offset", type=int, help="id of image code 0 in a plain causal LM")
    group.add_argument("--cross-attention-interval", type=int, help="cross blocks after every so many-th layer (default: 2)")
    group.add_argument("--dtype", help="of the decoders, e.g. bfloat16 (default: the parents')")
    group.add_argument("--max-shard-size", help="of the safetensors files (default: 2GB)")


_FUSE_SETTINGS = (
    "text image vq mode init tokenizer image_tokenizer text_revision image_revision image_size image_token_offset "
    "cross_attention_interval dtype max_shard_size"
).split()


def _add_convert_vq(command: argparse.ArgumentParser) -> None:
    from .fusion.vq_tables import LAYOUTS

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


def _convert_vq(args: argparse.Namespace) -> None:
    from .fusion.convert_vq import convert_vq

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


def _add_certify(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("certify", help="measure what a JAM keeps of its parents, and write it into its model card")
    command.add_argument("--model", required=True, help="folder of the JAM (with --no-write also a Hub id)")
    command.add_argument("--text-parent", help="text parent: folder or Hub id; needs --texts")
    command.add_argument("--image-parent", help="image parent: folder or Hub id; needs --pairs")
    command.add_argument("--texts", help="text file (UTF-8) whose paragraphs are documents")
    command.add_argument("--pairs", help="folder of pictures with metadata.jsonl, or of a saved dataset with image and text")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--max-tokens", type=int, help="where texts are cut (default: 1024, or the models' positions)")
    command.add_argument("--max-documents", type=int, help="read no more than the first so many texts, and pairs")
    command.add_argument("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    command.add_argument("--no-write", action="store_true", help="leave the model card as it is")


def _certify(args: argparse.Namespace) -> None:
    from .evaluation.retention import certify

    retention = certify(
        args.model,
        text_parent=args.text_parent,
        image_parent=args.image_parent,
        texts=args.texts,
        pairs=args.pairs,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        max_documents=args.max_documents,
        device=args.device,
        write=not args.no_write,
    )
    print(retention.table())
    if not args.no_write:
        print(f"\nwritten: {Path(args.model) / 'README.md'}")


def _add_convert_metaseq(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("convert-metaseq", help="metaseq's OPT or CM3leon files to an OPT checkpoint of transformers")
    command.add_argument("--source", required=True, nargs="+", help="folder with the .pt files, or the files of one checkpoint")
    command.add_argument("--output", required=True, help="folder of the OPT checkpoint")
    command.add_argument("--num-attention-heads", type=int, help="where the files do not say")
    command.add_argument("--activation-function", help="relu, gelu, ... where the files do not say (relu for OPT)")
    command.add_argument("--post-norm", action="store_true", help="LayerNorm behind attention and FFN, as in OPT-350m")
    command.add_argument("--vocab-size", type=int, help="leave out the rows behind, with which metaseq pads (default: all)")
    command.add_argument("--dtype", help="float32, float16 or bfloat16 (default: that of the files)")
    command.add_argument("--max-shard-size", default="2GB")
    command.add_argument("--overwrite", action="store_true", help="replace the output folder")


def _convert_metaseq(args: argparse.Namespace) -> None:
    from .fusion.convert_metaseq import convert_metaseq

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


def _names_parents(args: argparse.Namespace) -> bool:
    others = ("recipe", "output", "overwrite", "dry_run", "explain", *_FUSE_SETTINGS)
    return any(getattr(args, name) not in (None, False) for name in others)


def _fuse(args: argparse.Namespace) -> None:
    from .files import check_free
    from .fusion.fuse import check_output, plan_recipe, run_fusion
    from .fusion.recipe import FusionRecipe

    if args.force:
        raise ValueError("--force is for run folders; to replace the folder of --output, give --overwrite.")
    settings = {name: getattr(args, name) for name in _FUSE_SETTINGS if getattr(args, name) is not None}
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
        check_output(args.output, *inputs)
        check_free(args.output, args.overwrite)
    plan = plan_recipe(recipe)
    if args.explain:
        print(plan.explain(args.explain))
    elif args.dry_run:
        print(plan.describe())
    else:
        for warning in plan.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        path = run_fusion(plan, args.output, args.overwrite)
        print(f"fused: {path} (recipe {plan.digest[:16]})")


def _generate(args: argparse.Namespace) -> None:
    import torch

    from . import JamForCausalLM, JamProcessor
    from .files import write_whole
    from .quickstart.page import document_page

    target = Path(args.output)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise ValueError(f"--output {target}: expected a file in a folder that exists.")
    if not Path(args.model).is_dir() and (args.model.count("/") != 1 or args.model.startswith((".", "/", "~"))):
        raise ValueError(f"--model {args.model}: there is no such folder; expected a JAM checkpoint or a Hub id such as a/b.")
    model = JamForCausalLM.from_pretrained(args.model).eval()
    processor = JamProcessor.from_pretrained(args.model)
    prompt = args.prompt
    if args.chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=args.image or None, return_tensors="pt")
    torch.manual_seed(args.seed)
    options = {"generation_mode": args.mode, "guidance_scale": args.guidance_scale}
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    if args.temperature is not None:
        options |= {"do_sample": True, "temperature": args.temperature}
    output = model.generate(**inputs, **options)
    length = inputs["input_ids"].shape[1]
    segments = processor.post_process_interleaved(output, model, prompt_length=length)[0]
    for segment in segments:
        print(segment["text"].strip() if segment["type"] == "text" else "[picture]")
    write_whole(target, document_page(args.prompt, segments))
    print(f"document: {target}")


def _run(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from .quickstart.stages import QuickstartSettings, Run, run_all, run_stage

    settings = QuickstartSettings.small() if args.small else QuickstartSettings()
    settings = replace(settings, seed=args.seed or 0, train_all=args.train_all, family=args.family)
    run = Run(args.run, settings)
    if args.command == "quickstart":
        print(f"The page lies at {run_all(run)}")
    elif run_stage(run, args.command, args.force):
        print(f"{args.command}: done, in {run.folder}")
    else:
        print(f"{args.command}: its result is in {run.folder} already (--force runs it again)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `jam-hf`; returns the exit status. What the user can mend is one line on stderr."""
    args = _parser().parse_args(arguments)
    try:
        if args.command == "generate":
            _generate(args)
        elif args.command == "convert-vq":
            _convert_vq(args)
        elif args.command == "certify":
            _certify(args)
        elif args.command == "convert-metaseq":
            _convert_metaseq(args)
        elif args.command == "fuse" and _names_parents(args):
            _fuse(args)
        else:
            _run(args)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        print(f"jam-hf {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        rest = "nothing was written" if args.command in ("certify", "convert-metaseq") else "the same command goes on from here"
        print(f"\njam-hf {args.command}: interrupted; {rest}.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
