"""`jam-hf certify`: what a JAM keeps of its parents. It calls the library and knows nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options import option


RESUMES = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """measure what a JAM keeps of its parents, and write it into its model card"""

    model: str = option("folder of the JAM (with --no-write also a Hub id)")
    text_parent: str | None = option(
        "text parent: folder or Hub id; needs --texts", None, unset="texts are not measured"
    )
    image_parent: str | None = option(
        "image parent: folder or Hub id; needs --pairs", None, unset="pairs are not measured"
    )
    texts: str | None = option("text file (UTF-8) whose paragraphs are documents", None, unset="none")
    pairs: str | None = option(
        "folder of pictures with metadata.jsonl, or of a saved dataset with image and text", None, unset="none"
    )
    image_tokenizer: str | None = option("the image parent's tokenizer", None, unset="that of its folder")
    image_token_offset: int | None = option(
        "id of image code 0 in a plain causal LM",
        None,
        unset="its tokenizer's <img:0>, else what the JAM's fusion.yaml says",
    )
    batch_size: int = option("documents at a time", 8)
    max_tokens: int | None = option("where texts are cut", None, unset="1024, or the models' positions")
    max_documents: int | None = option("read no more than the first so many texts, and pairs", None, unset="all")
    device: str | None = option("cpu, cuda, ...", None, unset="a GPU where there is one")
    softmax: str | None = option(
        "of texts: text leaves image codes out, all counts them, as lm_eval's own model=hf does",
        None,
        unset="text",
        choices=("text", "all"),
    )
    write: bool = option("leave the model card as it is", True, unset="the measurement is written into it")


def run(options: Options) -> None:
    for name, of in (
        ("image_tokenizer", "image_parent"),
        ("image_token_offset", "image_parent"),
        ("max_tokens", "text_parent"),
        ("softmax", "text_parent"),
    ):
        if getattr(options, name) is not None and getattr(options, of) is None:
            flag, needed = (f"--{field.replace('_', '-')}" for field in (name, of))
            raise ValueError(f"{flag} has nothing to act on without {needed}.")
    from jam_hf.evaluation.retention import certify

    retention = certify(
        options.model,
        text_parent=options.text_parent,
        image_parent=options.image_parent,
        texts=options.texts,
        pairs=options.pairs,
        image_tokenizer=options.image_tokenizer,
        image_token_offset=options.image_token_offset,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
        max_documents=options.max_documents,
        device=options.device,
        write=options.write,
        softmax=options.softmax or "text",
    )
    print(retention.table())
    if options.write:
        print(f"\nwritten: {Path(options.model) / 'README.md'}")
