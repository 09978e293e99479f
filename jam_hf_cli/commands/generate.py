"""`jam-hf generate`: interleaved documents from prompts. It calls the library and knows nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..options import option


RESUMES = False
# Options that are settings of generate() under the same name.
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
SAMPLED = ("temperature", "image_temperature", "image_top_k", "num_candidates")
OF_PICTURES = (
    "guidance_scale",
    "image_guidance_scale",
    "negative_prompt",
    "image_temperature",
    "image_top_k",
    "num_candidates",
)
SAVERS = {".html": "save_html", ".md": "save_markdown", ".json": "save_json"}
BY_CHECKPOINT = "what the checkpoint says"


@dataclass(frozen=True, kw_only=True)
class Options:
    """write interleaved documents from prompts, as one HTML page, Markdown or JSON"""

    prompt: list[str] = option(
        "what to write about, a document for each; with --chat, what the user says", nargs="+", positional=True
    )
    model: str = option("JAM checkpoint: folder or Hub id", "runs/quickstart/jam-cross")
    mode: str = option("what is written", "interleaved", choices=("interleaved", "text", "image"))
    chat: bool = option("put the prompts through the chat template", False)
    image: list[str] = option("picture for an <image> in the prompts, in order: one each", [], action="append")
    guidance_scale: float | None = option("classifier-free guidance inside pictures", None, unset=BY_CHECKPOINT)
    image_guidance_scale: float | None = option(
        "a scale of its own for the pictures of the context", None, unset=BY_CHECKPOINT
    )
    negative_prompt: str | None = option("what guidance turns away from", None, unset="nothing")
    temperature: float | None = option("sample with this temperature", None, unset="greedy")
    image_temperature: float | None = option(
        "sample, with this temperature inside pictures", None, unset="--temperature"
    )
    image_top_k: int | None = option("sample among so many codes inside pictures", None, unset=BY_CHECKPOINT)
    min_new_images: int | None = option("pictures that each document has at least", None, unset=BY_CHECKPOINT)
    max_new_images: int | None = option("pictures that each document has at most", None, unset=BY_CHECKPOINT)
    picture_after_sentence: bool = option("a picture after each sentence", False)
    num_candidates: int | None = option("draw so many candidates for each picture and keep the best", None, unset="one")
    reranker: str | None = option("which is the best: likelihood, or a CLIP checkpoint", None, unset="likelihood")
    retriever: str | None = option(
        "index of captioned pictures (jam-hf index) to look things up in", None, unset="none", older="--memory"
    )
    retriever_embedder: str | None = option(
        "folder of the index's CLIP model", None, unset="from the Hub", older="--memory-embedder"
    )
    max_new_tokens: int | None = option("where documents are cut", None, unset=BY_CHECKPOINT)
    seed: int | None = option("of what is sampled", None, unset="0")
    output: str = option("file to write: .html, .md or .json", "document.html")
    overwrite: bool = option("replace the output file", False)


def _check(options: Options) -> None:
    """Raise a `ValueError` if an option has nothing to act on."""

    def given(*names: str) -> list[str]:
        return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]

    if options.mode == "text" and given(*OF_PICTURES):
        raise ValueError(f"{', '.join(given(*OF_PICTURES))}: --mode text writes no pictures.")
    for name, needed in (("retriever_embedder", ("retriever",)), ("seed", SAMPLED)):
        if given(name) and not given(*needed):
            flags = ", ".join(f"--{other.replace('_', '-')}" for other in needed)
            raise ValueError(
                f"{given(name)[0]} has nothing to act on: it needs {'one of ' if len(needed) > 1 else ''}{flags}."
            )


def _checked_output(options: Options) -> Path:
    target = Path(options.output)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise ValueError(f"--output {target}: expected a file in a folder that exists.")
    if target.suffix not in SAVERS:
        raise ValueError(f"--output {target}: expected a name that ends in {', '.join(SAVERS)}.")
    if target.exists() and not options.overwrite:
        raise ValueError(f"--output {target}: this file exists. Choose another name, or replace it with --overwrite.")
    from jam_hf.contents import may_be_hub_id

    if not Path(options.model).is_dir() and not may_be_hub_id(options.model, with_owner=True):
        raise ValueError(
            f"--model {options.model}: there is no such folder; expected a JAM checkpoint or a Hub id such as a/b."
        )
    return target


def _settings(options: Options, processor: Any) -> dict[str, Any]:
    settings = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    settings["do_sample"] = any(name in settings for name in SAMPLED)
    if options.num_candidates is not None:
        settings["tokenizer"] = processor.tokenizer  # a CLIP model reads the text before a picture
    if options.retriever is not None:
        from jam_hf.retrieval import ClipEmbedder, load_index

        embedder = None if options.retriever_embedder is None else ClipEmbedder(options.retriever_embedder)
        settings["retriever"] = load_index(options.retriever, processor, embedder)
    if options.picture_after_sentence:
        settings["image_after_token_ids"] = processor.sentence_end_token_ids()
    if options.negative_prompt is not None:
        settings["negative_prompt_ids"] = processor.tokenizer(options.negative_prompt, return_tensors="pt").input_ids
    return {"generation_mode": options.mode, **settings}


def _prompt_segments(prompt: str, image_token: str, pictures: Iterator[Any]) -> list[dict[str, Any]]:
    """The prompt as it goes before what was written: each of its pictures, as the model sees it, in the place of
    its mark.
    """
    segments: list[dict[str, Any]] = []
    for index, text in enumerate(prompt.split(image_token)):
        if index:
            segments.append({"type": "image", "image": next(pictures)})
        if text.strip():
            segments.append({"type": "text", "text": text})
    return segments


def run(options: Options) -> None:
    _check(options)
    target = _checked_output(options)
    import torch

    from jam_hf import JamForCausalLM, JamProcessor
    from jam_hf.reading import read_whole

    model = read_whole(JamForCausalLM, options.model, "model")
    processor = JamProcessor.from_pretrained(options.model, trust_remote_code=False)
    prompts = list(options.prompt)
    if options.chat:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = processor.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=prompts, images=options.image or None, padding=True, return_tensors="pt")
    torch.manual_seed(options.seed or 0)
    output = model.generate(**inputs, **_settings(options, processor))
    pictures = iter(processor.image_processor.postprocess(inputs["pixel_values"]) if "pixel_values" in inputs else ())
    documents = processor.post_process_interleaved(output, model, prompt_length=inputs["input_ids"].shape[1])
    for prompt, segments in zip(options.prompt, documents):
        print(f"# {prompt}")
        for segment in segments:
            print(segment["text"].strip() if segment["type"] == "text" else "[picture]")
        segments[:0] = _prompt_segments(prompt, processor.image_token, pictures)
    save = getattr(processor, SAVERS[target.suffix])
    try:
        save(documents, target, overwrite=options.overwrite)
    except FileExistsError:  # it came meanwhile
        given, target = target, _free_name(target)
        save(documents, target)
        raise FileExistsError(
            f"--output {given} was written by others meanwhile; the document is in {target}."
        ) from None
    print(f"document: {target}")


def _free_name(target: Path) -> Path:
    names = (target.with_stem(f"{target.stem}-{number}") for number in itertools.count(2))
    return next(name for name in names if not name.exists())
