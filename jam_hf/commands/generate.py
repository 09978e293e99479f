"""`jam-hf generate`: interleaved documents from prompts. It parses arguments and calls the library."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..contents import may_be_hub_id
from . import DEFAULT_RUN


HELP = "write interleaved documents from prompts, as one HTML page, Markdown or JSON"
# Arguments that are settings of generate() under the same name.
SETTINGS = (
    "guidance_scale",
    "image_guidance_scale",
    "temperature",
    "image_temperature",
    "image_top_k",
    "min_new_images",
    "max_new_images",
    "max_new_tokens",
    "num_candidates",
    "reranker",
)
SAVERS = {".html": "save_html", ".md": "save_markdown", ".json": "save_json"}


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt", nargs="+", help="what to write about, a document for each; with --chat, what the user says")
    command.add_argument("--model", default=f"{DEFAULT_RUN}/jam-cross", help="JAM checkpoint: folder or Hub id")
    command.add_argument("--mode", choices=("interleaved", "text", "image"), default="interleaved")
    command.add_argument("--chat", action="store_true", help="put the prompts through the chat template")
    command.add_argument(
        "--image", action="append", default=[], help="picture for an <image> in the prompts, in order: one each"
    )
    command.add_argument("--guidance-scale", type=float, help="classifier-free guidance inside pictures")
    command.add_argument("--image-guidance-scale", type=float, help="a scale of its own for the pictures of the context")
    command.add_argument("--negative-prompt", help="what guidance turns away from")
    command.add_argument("--temperature", type=float, help="sample with this temperature (default: greedy)")
    command.add_argument("--image-temperature", type=float, help="sample, with this temperature inside pictures")
    command.add_argument("--image-top-k", type=int, help="sample among so many codes inside pictures")
    command.add_argument("--min-new-images", type=int, help="pictures that each document has at least")
    command.add_argument("--max-new-images", type=int, help="pictures that each document has at most")
    command.add_argument("--picture-after-sentence", action="store_true", help="a picture after each sentence")
    command.add_argument("--num-candidates", type=int, help="draw so many candidates for each picture and keep the best")
    command.add_argument("--reranker", help="which is the best: likelihood (default), or a CLIP checkpoint")
    command.add_argument("--memory", help="index of captioned pictures (jam-hf index) to look things up in")
    command.add_argument("--memory-embedder", help="folder of the index's CLIP model, where that is not on the Hub")
    command.add_argument("--max-new-tokens", type=int)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--output", default="document.html", help="file to write: .html, .md or .json")
    command.add_argument("--overwrite", action="store_true", help="replace the output file")


def _checked_output(args: argparse.Namespace) -> Path:
    target = Path(args.output)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise ValueError(f"--output {target}: expected a file in a folder that exists.")
    if target.suffix not in SAVERS:
        raise ValueError(f"--output {target}: expected a name that ends in {', '.join(SAVERS)}.")
    if target.exists() and not args.overwrite:
        raise ValueError(f"--output {target}: this file exists. Choose another name, or replace it with --overwrite.")
    if not Path(args.model).is_dir() and not may_be_hub_id(args.model, with_owner=True):
        raise ValueError(f"--model {args.model}: there is no such folder; expected a JAM checkpoint or a Hub id such as a/b.")
    return target


def _settings(args: argparse.Namespace, processor: Any) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    sampled = ("temperature", "image_temperature", "image_top_k", "num_candidates")
    settings["do_sample"] = any(name in settings for name in sampled)
    if args.num_candidates is not None:
        settings["tokenizer"] = processor.tokenizer  # a CLIP model reads the text before a picture
    if args.memory is not None:
        from ..retrieval import ClipEmbedder, load_index

        embedder = None if args.memory_embedder is None else ClipEmbedder(args.memory_embedder)
        settings["memory"] = load_index(args.memory, processor, embedder)
    if args.picture_after_sentence:
        settings["image_after_token_ids"] = processor.sentence_end_token_ids()
    if args.negative_prompt is not None:
        settings["negative_prompt_ids"] = processor.tokenizer(args.negative_prompt, return_tensors="pt").input_ids
    return {"generation_mode": args.mode, **settings}


def _prompt_segments(prompt: str, image_token: str, pictures: Iterator[Any]) -> list[dict[str, Any]]:
    """The prompt as it goes before what was written: each of its pictures, as the model sees it, in the place of its mark."""
    segments: list[dict[str, Any]] = []
    for index, text in enumerate(prompt.split(image_token)):
        if index:
            segments.append({"type": "image", "image": next(pictures)})
        if text.strip():
            segments.append({"type": "text", "text": text})
    return segments


def run(args: argparse.Namespace) -> None:
    target = _checked_output(args)
    import torch

    from .. import JamForCausalLM, JamProcessor

    model = JamForCausalLM.from_pretrained(args.model, use_safetensors=True, trust_remote_code=False).eval()
    processor = JamProcessor.from_pretrained(args.model, trust_remote_code=False)
    prompts = list(args.prompt)
    if args.chat:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = processor.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=prompts, images=args.image or None, padding=True, return_tensors="pt")
    torch.manual_seed(args.seed)
    output = model.generate(**inputs, **_settings(args, processor))
    pictures = iter(processor.image_processor.postprocess(inputs["pixel_values"]) if "pixel_values" in inputs else ())
    documents = processor.post_process_interleaved(output, model, prompt_length=inputs["input_ids"].shape[1])
    for prompt, segments in zip(args.prompt, documents):
        print(f"# {prompt}")
        for segment in segments:
            print(segment["text"].strip() if segment["type"] == "text" else "[picture]")
        segments[:0] = _prompt_segments(prompt, processor.image_token, pictures)
    save = getattr(processor, SAVERS[target.suffix])
    try:
        save(documents, target, overwrite=args.overwrite)
    except FileExistsError:  # it came meanwhile
        given, target = target, _free_name(target)
        save(documents, target)
        raise FileExistsError(f"--output {given} was written by others meanwhile; the document is in {target}.") from None
    print(f"document: {target}")


def _free_name(target: Path) -> Path:
    names = (target.with_stem(f"{target.stem}-{number}") for number in itertools.count(2))
    return next(name for name in names if not name.exists())
