"""Write the table of docs/fusion.md: every pair of parents in every mode and init, measured, or refused with the
reason.

    python modeling_tests/fusion_table.py

Random-weight parents of the real classes (fusion_zoo.py; hidden size 256, 4 layers and, in cross, 6 in the image
parent, float32) are fused, each time in a process of its own, and compared with their parents in another. It knows
pairs and numbers; which pairs a mode allows, the engine says. A few minutes on one core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fusion_zoo import (
    EQUAL,
    IMAGE_PARENTS,
    NUM_CODES,
    PROMPTS,
    SMALL,
    TEXT_KINDS,
    ImageParent,
    Sizes,
    code_reader,
    image_documents,
    image_parent,
    reader,
    readings,
    save,
    text_parent,
    vq_model,
)
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import jam_hf
from jam_hf import JamForCausalLM
from jam_hf.checkpoints.parent import Parent
from jam_hf.fusion import parents
from jam_hf.fusion.shapes import check_parents
from jam_hf.fusion.tables import INITS


PAGE = Path(__file__).resolve().parent.parent / "docs" / "fusion.md"
START, END = "<!-- table -->", "<!-- /table -->"
SHALLOW = Sizes(hidden=256, layers=4, heads=8, kv_heads=4, ffn=704)
DEEP = Sizes(hidden=256, layers=6, heads=8, kv_heads=4, ffn=704)
JANUS_BOUND = 1e-5  # relative to the largest logit

NAMES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "opt": "OPT",
    "llama-lm": "Llama LM",
    "mistral-lm": "Mistral LM",
    "qwen2-lm": "Qwen2 LM",
    "qwen3-lm": "Qwen3 LM",
    "opt-lm": "OPT LM",
    "chameleon": "Chameleon",
    "chameleon-swin": "Chameleon, swin norm",
    "emu3": "Emu3",
    "janus": "Janus",
}


# ----- which rows there are -------------------------------------------------------------------------------------------


def make_text(kind: str, sizes: Sizes) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return text_parent(kind, sizes, **({} if kind == "opt" else EQUAL | {"head_dim": sizes.hidden // sizes.heads}))


def make_image(name: str, sizes: Sizes) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    settings = IMAGE_PARENTS[name]
    changes = {} if name == "opt-lm" else EQUAL
    if settings["kind"] == "plain" and name != "opt-lm":
        changes = changes | {"head_dim": sizes.hidden // sizes.heads}
    return image_parent(sizes=sizes, **settings, **changes)


def rows(sizes: Sizes = SMALL) -> Iterator[tuple[str, str, str, str, str | None]]:
    """(text kind, image parent, mode, init, why it is refused or None) for every pair that the engine's registry names.

    Raises:
        AssertionError: if the registry has a family that fusion_zoo.py has no parent of.
    """
    kinds = {settings.get("like", settings["kind"]) for settings in IMAGE_PARENTS.values()}
    assert set(TEXT_KINDS) == set(parents.text_parents()) and kinds == set(parents.image_parents()), (
        "fusion_zoo.py lacks a family"
    )
    texts = {kind: make_text(kind, sizes)[0] for kind in TEXT_KINDS}
    images = {name: make_image(name, sizes)[0] for name in IMAGE_PARENTS}
    for kind, text in texts.items():
        for name, image in images.items():
            text.name_or_path, image.name_or_path = f"'{NAMES[kind]}'", f"'{NAMES[name]}'"
            decoders = [
                parents.Decoder(Parent(text, "text parent"), parents.text_parents()),
                parents.Decoder(Parent(image, "image parent"), parents.image_parents()),
            ]
            for mode, inits in INITS.items():
                for init in inits:
                    try:
                        check_parents(*decoders, mode, init)
                    except ValueError as error:
                        yield kind, name, mode, init, str(error)
                    else:
                        yield kind, name, mode, init, None


# ----- processes ------------------------------------------------------------------------------------------------------


def _answer(channel: Any, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    channel.send((function(*arguments), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def in_child(function: Callable, *arguments: Any) -> tuple[Any, float]:
    """What `function(*arguments)` returns in a process that has all imports of this one, and that process' peak in
    MiB.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sender, function, arguments))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{arguments} failed, see above") from None
    finally:
        child.join()


def idle() -> None:
    pass


# ----- measuring ------------------------------------------------------------------------------------------------------


def make_parents(work: Path) -> None:
    for kind in TEXT_KINDS:
        save(*make_text(kind, SHALLOW), work / kind)
    for name in IMAGE_PARENTS:
        save(*make_image(name, SHALLOW), work / f"{name}-shallow")
        save(*make_image(name, DEEP), work / f"{name}-deep")
    vq_model().save_pretrained(work / "vq")


def fuse(work: Path, kind: str, name: str, mode: str, init: str) -> tuple[float, int]:
    """Seconds, and bytes of the tensors written."""
    start = time.perf_counter()
    image = work / f"{name}-{'deep' if mode == 'cross' else 'shallow'}"
    folder = jam_hf.fuse(work / kind, image, mode, work / "jam", init=init, vq_model=work / "vq", overwrite=True)
    return time.perf_counter() - start, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def divergence(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """Mean KL(parent || JAM) in nats per token, over the columns given."""
    log_theirs, log_ours = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    return (log_theirs.exp() * (log_theirs - log_ours)).sum(-1).mean().item()


def compare(work: Path, kind: str, name: str, mode: str) -> tuple[str, str]:
    """Text and image logits against the parents', in words. Raises `AssertionError` where what must be preserved is
    not.
    """
    jam = JamForCausalLM.from_pretrained(work / "jam").eval()
    tokenizer = AutoTokenizer.from_pretrained(work / "jam")
    text, text_tokenizer = make_text(kind, SHALLOW)
    image = ImageParent(IMAGE_PARENTS[name]["kind"], *make_image(name, DEEP if mode == "cross" else SHALLOW))
    preserving = mode == "cross" and jam.config.cross_form == "preserving"
    pad = jam.config.pad_token_id

    prompts = [text_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    theirs = readings(reader(text), prompts, text_tokenizer.pad_token_id or 0)
    ours = readings(reader(jam, 0, theirs.shape[-1]), prompts, pad)
    words = [_in_words(theirs, ours, preserving, 0.0)]

    pieces = [
        (readings(image.logits, parents_own, image.tokenizer.pad_token), readings(code_reader(jam), jams, pad))
        for jams, parents_own in image_documents(image.kind, jam.config, tokenizer, image.tokenizer)
    ]
    theirs, ours = (torch.cat(part) for part in zip(*pieces))
    assert theirs.shape[-1] == NUM_CODES
    words.append(_in_words(theirs, ours, preserving, JANUS_BOUND if image.kind == "janus" else 0.0))
    return words[0], words[1]


def _in_words(theirs: torch.Tensor, ours: torch.Tensor, preserving: bool, bound: float) -> str:
    difference = (theirs - ours).abs().max().item()
    if not preserving:
        return f"not preserved, by design: KL {divergence(theirs, ours):.2f}"
    if difference == 0:
        return "bit for bit"
    relative = difference / theirs.abs().max().item()
    assert relative <= bound, f"off by {difference} ({relative} of the largest), allowed: {bound}"
    return f"within {difference:.0e} (bound: {bound:.0e} of the largest)"


# ----- the page -------------------------------------------------------------------------------------------------------


def short(reason: str) -> str:
    """A refusal without the parents' names and the advice."""
    if "they differ in " in reason:
        return "they differ in " + reason.split("they differ in ")[1].split(" (text parent first)")[0]
    return "Chameleon's layers are no text parent's" if "is a Chameleon" in reason else reason


def refusals(refused: list[tuple[str, str, str, str, str]]) -> list[str]:
    """One line for each pair and reason."""
    lines: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for kind, name, mode, init, reason in refused:
        lines.setdefault((NAMES[kind], NAMES[name], short(reason)), []).append((mode, init))
    found = []
    for (text, image, reason), modes in lines.items():
        whole = [mode for mode, inits in INITS.items() if all((mode, init) in modes for init in inits)]
        listing = ", ".join([*whole, *(f"{mode} {init}" for mode, init in modes if mode not in whole)])
        found.append(f"| {text} | {image} | {listing} | {reason} |")
    return found


def keys_on_the_page(page: str) -> list[tuple[str, str, str, str]]:
    """(text parent, image parent, mode, init) of every row, measured or refused."""
    found = []
    for line in page.split(START)[1].split(END)[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) < 4 or cells[0] not in NAMES.values():
            continue
        for words in cells[2].split(", "):
            mode, _, init = words.partition(" ")
            found += [(cells[0], cells[1], mode, one) for one in ([init] if init else INITS[mode])]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PAGE)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    every, _ = in_child(lambda: list(rows(SHALLOW)))
    measured = ["| text parent | image parent | mode | text logits | image logits | seconds | MiB | output, MiB |"]
    measured.append("|---|---|---|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        in_child(make_parents, work)
        in_child(
            fuse, work, "llama", "llama-lm", "cross", "preserving"
        )  # what the first one finds cold is no cost of a pair
        for kind, name, mode, init, reason in tqdm(every, desc="fusions"):
            if reason is not None:
                continue
            (seconds, size), peak = in_child(fuse, work, kind, name, mode, init)
            _, base = in_child(idle)
            (text, image), _ = in_child(compare, work, kind, name, mode)
            numbers = f"{seconds:.1f}", f"{peak - base:.0f}", f"{size / 2**20:.0f}"
            cells = (NAMES[kind], NAMES[name], f"{mode} {init}", text, image, *numbers)
            measured.append(f"| {' | '.join(cells)} |")
    refused = ["| text parent | image parent | refused | because (text parent first) |", "|---|---|---|---|"]
    refused += refusals([row for row in every if row[-1] is not None])
    table = "\n".join([START, *measured, "", "Refused, with the reason that the message gives:", "", *refused, END])
    page = arguments.output.read_text(encoding="utf-8")
    before, after = page.split(START)[0], page.split(END)[1]
    aside = arguments.output.with_name(f".{arguments.output.name}.{os.getpid()}")
    aside.write_text(before + table + after, encoding="utf-8")
    aside.replace(arguments.output)
    print(f"{len(measured) - 2} fusions and {len(refused) - 2} lines of refusals: {arguments.output}")


if __name__ == "__main__":
    main()
