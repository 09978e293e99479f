"""What a fusion keeps of its parents: KL and perplexity, parent against JAM, on texts and pictures that the user gives.

It knows models, tokenizers, files of documents, and the section of the model card that it writes. It trains and fuses
nothing.
Shape suffixes: B documents, T tokens, V ids of a model, K image codes, N codes of a picture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..checkpoints.multimodal import MULTIMODAL
from ..contents import may_be_hub_id
from ..data.readers import captions_of, read_pairs, read_texts
from ..files import write_whole
from ..fusion.recipe import FusionRecipe, public_name
from ..fusion.vocabulary import differing_tokens
from ..model.configuration_jam import JamConfig
from ..model.modeling_jam import JamForCausalLM
from ..model.processing_jam import JamProcessor
from ..provenance import carried
from ..reading import has_tokenizer, read_config, read_tokenizer, read_whole
from ..version import __version__
from .lm_eval_model import check_softmax
from .perplexity import batches, compare_logits, padded
from .picture_views import PictureView, image_parent_view, jam_view, positions_of


SECTION_START = "<!-- jam-hf certify: start -->"
SECTION_END = "<!-- jam-hf certify: end -->"
DEFAULT_MAX_TOKENS = 1024
_LETTERS_PER_TOKEN = 100  # no text has more on average; what is behind need not be tokenised to be cut off


# ----- the result -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retained:
    """A parent against the JAM. Means over `tokens`, in nats per token, of the probabilities of the same `choices` ids.

    Args:
        parent: its name (no path). measured_on: the file or folder (no path). documents, tokens: what was counted.
        choices: ids that are compared; both distributions are renormalised over them, or with `softmax="all"` each is
            over all of its own model's ids. max_tokens: where documents were cut; None: nowhere.
        kl: KL(parent || JAM). parent_nll, fusion_nll: negative log-likelihoods of the same tokens.
    """

    parent: str
    measured_on: str
    documents: int
    tokens: int
    choices: int
    max_tokens: int | None
    kl: float
    parent_nll: float
    fusion_nll: float
    softmax: str = "text"

    @property
    def kl_bits(self) -> float:
        """KL in bits per token."""
        return self.kl / torch.tensor(2.0, dtype=torch.float64).log().item()

    @property
    def parent_perplexity(self) -> float:
        return torch.tensor(self.parent_nll, dtype=torch.float64).exp().item()  # inf where math.exp would raise

    @property
    def fusion_perplexity(self) -> float:
        return torch.tensor(self.fusion_nll, dtype=torch.float64).exp().item()


@dataclass(frozen=True)
class Retention:
    """What `certify` measured: the text parent, the image parent, or both."""

    text: Retained | None = None
    image: Retained | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and names, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """A Markdown table, one column for each parent."""
        parts = [(name, part) for name, part in (("text", self.text), ("image codes", self.image)) if part is not None]
        rows: list[tuple[str, Callable[[Retained], str]]] = [
            ("parent", lambda part: _cell(part.parent)),
            ("measured on", lambda part: _cell(part.measured_on)),
            ("documents", lambda part: f"{part.documents:,}"),
            ("tokens", lambda part: f"{part.tokens:,}"),
            ("KL(parent, fusion), nats per token", lambda part: f"{part.kl:.4g}"),
            ("KL(parent, fusion), bits per token", lambda part: f"{part.kl_bits:.4g}"),
            ("softmax over", lambda part: "all ids" if part.softmax == "all" else f"{part.choices:,} ids"),
            ("perplexity of the parent", lambda part: f"{part.parent_perplexity:.6g}"),
            ("perplexity of the fusion", lambda part: f"{part.fusion_perplexity:.6g}"),
        ]
        lines = ["| | " + " | ".join(name for name, _ in parts) + " |", "|---" * (len(parts) + 1) + "|"]
        lines += [f"| {title} | " + " | ".join(show(part) for _, part in parts) + " |" for title, show in rows]
        return "\n".join(lines)

    def section(self) -> str:
        """The section of the model card, from marker to marker."""
        notes = []
        if self.text is not None:
            among = f"the next token among the {self.text.choices:,} ids that both know, image codes left out"
            if self.text.softmax == "all":
                among = "the next token among all ids of each model, the fusion's image codes included (softmax: all)"
            notes.append(f"Text: {among}; documents are cut at {self.text.max_tokens:,} tokens.")
        if self.image is not None:
            notes.append(
                f"Image codes: the next code among all {self.image.choices:,}, in a picture that follows its caption; "
                "each model reads the caption in its own tokens and the picture in its own layout."
            )
        return (
            f"{SECTION_START}\n## Retention\n\nWhat this fusion keeps of its parents, measured by `jam-hf certify` "
            f"(jam_hf {__version__}): both models read the same documents. KL is 0 where the fusion predicts exactly "
            f"what its parent predicts.\n\n{self.table()}\n\n{' '.join(notes)} Distributions are normalised over those "
            f"ids.\n{SECTION_END}"
        )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# ----- the measurement ------------------------------------------------------------------------------------------------


@torch.no_grad()
def certify(
    model: str | os.PathLike,
    text_parent: str | os.PathLike | None = None,
    image_parent: str | os.PathLike | None = None,
    texts: str | os.PathLike | None = None,
    pairs: str | os.PathLike | None = None,
    image_tokenizer: str | os.PathLike | None = None,
    image_token_offset: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    max_documents: int | None = None,
    device: str | torch.device | None = None,
    write: bool = True,
    softmax: str = "text",
) -> Retention:
    """Measure how far a JAM is from its parents, and write it into the JAM's model card.

    The JAM and one parent at a time are in memory, as they are stored. Nothing is written before all is measured.

    Args:
        model: folder of the JAM (with `write=False` also a Hub id).
        text_parent: folder or Hub id of a causal LM whose ids the JAM's vocabulary begins with. Needs `texts`.
        image_parent: folder or Hub id of the image parent: Chameleon, Emu3 or Janus (their
            `...ForConditionalGeneration`), or a causal LM over the JAM's vocabulary or with a tokenizer that names the
            JAM's marks. Needs `pairs`.
        texts: text file, UTF-8; documents are paragraphs, with blank lines between them.
        pairs: pictures and captions: a folder with `metadata.jsonl` (`file_name` and `text` in each line), or a folder
            that `datasets.Dataset.save_to_disk` wrote, with the columns `image` and `text`. The JAM's VQ model makes
            the codes.
        image_tokenizer: folder or Hub id of the image parent's tokenizer, where its folder has none.
        image_token_offset: id of code 0 in an image parent that is a plain causal LM; by default its tokenizer's
            `<img:0>`, else what the recipe in the JAM's folder (fusion.yaml) says.
        batch_size: documents at a time: memory holds both models' logits of one batch, `[B, T, V]`.
        max_tokens: where texts are cut; by default 1024, or the positions of the models if those are fewer. No picture
            is cut.
        max_documents: read no more than the first so many texts, and pairs.
        device: by default a GPU where there is one.
        softmax: of texts: "text" leaves image codes out of it, as `generation_mode="text"` writes; "all" counts them,
            as lm_eval's own `model="hf"` does (`evaluation.lm_eval_model` has both for lm_eval).
        write: put the section "Retention" into README.md of the folder, in place of an earlier one. All else there
            stays.
    Raises:
        ValueError: if there is nothing to measure, a file is not what it should be, or a parent does not fit the JAM.
    """
    check_softmax(softmax)
    _check_arguments(model, text_parent, image_parent, texts, pairs, batch_size, max_tokens, max_documents, write)
    card = Path(model) / "README.md"
    if write:
        _read_card(card)
    documents = read_texts(texts, max_documents) if texts is not None else []
    pictures = read_pairs(pairs, max_documents) if pairs is not None else []
    device = _device(device)
    jam = _load_jam(model).to(device)
    processor = JamProcessor.from_pretrained(model, trust_remote_code=False)
    text = image = None
    if text_parent is not None:
        names = public_name(text_parent), public_name(str(texts))
        text = _measure_texts(
            jam, processor.tokenizer, text_parent, documents, names, batch_size, max_tokens, device, softmax
        )
    if image_parent is not None:
        names = public_name(image_parent), public_name(str(pairs))
        parent = _load_parent(image_parent, "image parent").to(device)
        theirs = image_parent_view(
            parent,
            _tokenizer_of(image_tokenizer or image_parent),
            processor.tokenizer,
            jam.config,
            names[0],
            image_token_offset,
            _recipe(model),
        )
        image = _measure_pairs(jam, processor, theirs, pictures, names, batch_size)
    retention = Retention(text, image)
    if write:
        _write_section(card, retention.section(), jam.config)
    return retention


def _measure_texts(
    jam: JamForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    source: str | os.PathLike,
    texts: Sequence[str],
    names: tuple[str, str],
    batch_size: int,
    max_tokens: int | None,
    device: torch.device,
    softmax: str,
) -> Retained:
    parent = _load_parent(source, "text parent").to(device)
    columns = shared_ids(jam.config, parent.config.get_text_config().vocab_size, names[0])
    _check_same_ids(tokenizer, source, names[0])
    positions = min(positions_of(jam), positions_of(parent))
    if max_tokens is None:
        max_tokens = min(DEFAULT_MAX_TOKENS, positions)
    elif max_tokens > positions:
        raise ValueError(f"max_tokens is {max_tokens}, but the JAM or {names[0]} has only {positions} positions.")
    known = set(columns.tolist())
    documents = []
    for number, text in enumerate(texts):
        ids = tokenizer(text[: _LETTERS_PER_TOKEN * max_tokens])["input_ids"][:max_tokens]
        unknown = next((token for token in ids if token not in known), None)
        if unknown is not None:
            raise ValueError(
                f"Document {number} of {names[1]} holds {tokenizer.convert_ids_to_tokens(unknown)!r} (id {unknown}), "
                f"which is no text of the text parent {names[0]}. Take it out of the text."
            )
        if len(ids) > 1:
            documents.append(ids)
    if not documents:
        raise ValueError(f"No document of {names[1]} has more than one token, so none is predicted.")
    if softmax == "all":
        columns = torch.arange(
            parent.config.get_text_config().vocab_size
        )  # with codes that it may have: else no divergence
    place = torch.full((jam.config.vocab_size,), -1)  # id -> index into columns
    place[columns] = torch.arange(len(columns))
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    chosen = columns.to(device)
    for ids, mask in batches(documents, batch_size, jam.config.pad_token_id or 0, "certify: texts", jam.config):
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
        counted = mask[:, 1:].nonzero(as_tuple=True)
        logits = parent(**inputs).logits, jam(**inputs).logits
        targets = place[ids[:, 1:][counted]]
        sums += compare_logits(*logits, counted, counted, targets, chosen, renormalised=softmax == "text")
        count += len(counted[0])
    return replace(_retained(names, len(documents), count, len(columns), max_tokens, sums), softmax=softmax)


def _measure_pairs(
    jam: JamForCausalLM,
    processor: JamProcessor,
    theirs: PictureView,
    pairs: Sequence[dict[str, Any]],
    names: tuple[str, str],
    batch_size: int,
) -> Retained:
    ours = jam_view(jam, processor.tokenizer)
    for number, caption in enumerate(captions_of(pairs)):
        for view in (theirs, ours):
            view.check_length(caption, f"Pair {number} of {names[1]}")
    offset, count = jam.config.image_token_offset, 0
    sums = torch.zeros(3, dtype=torch.float64)
    for start in tqdm(range(0, len(pairs), batch_size), desc="certify: pictures", unit="batch", leave=False):
        rows = [pairs[i] for i in range(start, min(start + batch_size, len(pairs)))]
        pictures = [_picture(processor, row, f"Pair {start + i} of {names[1]}") for i, row in enumerate(rows)]
        pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        codes_BN = (jam.get_image_tokens(pixels.to(jam.device)) - offset).cpu()
        captions = [row["text"] for row in rows]
        results = [_code_logits(view, captions, codes_BN) for view in (theirs, ours)]
        (parent_logits, parent_places), (fusion_logits, fusion_places) = results
        sums += compare_logits(parent_logits, fusion_logits, parent_places, fusion_places, codes_BN.flatten())
        count += codes_BN.numel()
    return _retained(names, len(pairs), count, jam.config.num_image_tokens, None, sums)


def _picture(processor: JamProcessor, row: dict[str, Any], name: str) -> Any:
    try:
        return processor.image_processor.fetch_images(row["image"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _code_logits(
    view: PictureView, captions: Sequence[str], codes_BN: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Logits over the codes, `[B, T, K]`, and where in them each code is predicted (rows and columns, `[B * N]`)."""
    documents, rows, columns = [], [], []
    for index, (caption, codes) in enumerate(zip(captions, codes_BN)):
        ids, places = view.document(caption, codes)
        documents.append(ids)
        rows += [index] * len(places)
        columns += [place - 1 for place in places]  # a code is predicted one place before its own
    ids, mask = padded(documents, 0)  # behind the last code: seen by none
    logits = view.code_logits(ids.to(view.model.device), mask.to(view.model.device))
    return logits, (torch.tensor(rows), torch.tensor(columns))


def _retained(
    names: tuple[str, str], documents: int, tokens: int, choices: int, max_tokens: int | None, sums: torch.Tensor
) -> Retained:
    kl, parent, fusion = (sums / tokens).tolist()
    for what, value in ((names[0], parent), ("the JAM", fusion), ("their divergence", kl)):
        if not torch.isfinite(torch.tensor(value)):
            raise ValueError(
                f"The likelihoods of {what} on {names[1]} are {value}: a weight or a logit is NaN or infinite."
            )
    return Retained(*names, documents, tokens, choices, max_tokens, kl, parent, fusion)


def shared_ids(config: JamConfig, vocabulary: int, name: str) -> torch.Tensor:
    """Ids of text that the JAM shares with a text parent of `vocabulary` ids: all of the parent's but image codes,
    int64 `[V]`.

    Raises:
        ValueError: if the parent has more ids than the JAM.
    """
    if vocabulary > config.vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {vocabulary} ids, the JAM one of {config.vocab_size}. The ids of a JAM's text "
            "parent come first in the JAM's vocabulary; this is not its text parent."
        )
    ids = torch.arange(vocabulary)
    return ids[(ids < config.image_token_range.start) | (ids >= config.image_token_range.stop)]


# ----- models ---------------------------------------------------------------------------------------------------------


def _device(name: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.ones(1, device=device).item()  # some devices have names that torch knows, and nothing behind them
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(name)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _load_jam(model: str | os.PathLike) -> JamForCausalLM:
    config = _config(model, "model")
    if config.model_type != JamConfig.model_type:
        raise ValueError(f"The model '{model}' is a '{config.model_type}', not a JAM. Make one with jam-hf fuse.")
    return read_whole(JamForCausalLM, model, "model")


def _load_parent(source: str | os.PathLike, role: str) -> PreTrainedModel:
    model_type = _config(source, role).model_type
    sheet = MULTIMODAL.get(model_type) if role == "image parent" else None
    return read_whole(
        AutoModelForCausalLM if sheet is None else sheet.class_of("ForConditionalGeneration"), source, role
    )


def _config(source: str | os.PathLike, role: str) -> Any:
    if not Path(source).is_dir() and not may_be_hub_id(source, with_owner=True):
        raise ValueError(
            f"The {role} '{source}' is not a folder. Expected a checkpoint folder or a Hub id such as 'a/b'."
        )
    try:
        return read_config(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"The {role} '{source}' is no checkpoint that transformers can read: {reason}") from error


def _recipe(model: str | os.PathLike) -> FusionRecipe | None:
    """What the JAM was made by; `None` where its folder does not say."""
    path = Path(model) / "fusion.yaml"
    return FusionRecipe.from_yaml(path) if path.is_file() else None


def _tokenizer_of(source: str | os.PathLike) -> PreTrainedTokenizerBase | None:
    return None if Path(source).is_dir() and not has_tokenizer(source) else read_tokenizer(source)


def _check_same_ids(tokenizer: PreTrainedTokenizerBase, source: str | os.PathLike, name: str) -> None:
    """A text parent that brings no tokenizer is taken at its word."""
    theirs = _tokenizer_of(source)
    if theirs is None:
        return
    differing = differing_tokens(theirs, tokenizer)
    if differing:
        token = differing[0]
        raise ValueError(
            f"The JAM's tokenizer gives {len(differing)} tokens of the text parent {name} other ids, e.g. {token!r}: "
            f"{tokenizer.get_vocab().get(token)} and {theirs.get_vocab()[token]}. This is not the JAM's text parent."
        )


# ----- arguments and the card -----------------------------------------------------------------------------------------


def _check_arguments(
    model: Any,
    text_parent: Any,
    image_parent: Any,
    texts: Any,
    pairs: Any,
    batch_size: int,
    max_tokens: int | None,
    max_documents: int | None,
    write: bool,
) -> None:
    for parent, data, names in (
        (text_parent, texts, ("text_parent", "texts")),
        (image_parent, pairs, ("image_parent", "pairs")),
    ):
        if (parent is None) != (data is None):
            given, lacking = names if data is None else reversed(names)
            raise ValueError(
                f"certify: {given} is given, {lacking} is not; a parent is measured on documents, so it needs both."
            )
    if text_parent is None and image_parent is None:
        raise ValueError(
            "certify: nothing to measure. Give text_parent and texts, image_parent and pairs, or all four."
        )
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("max_tokens", max_tokens, 2),
        ("max_documents", max_documents, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"certify: {name} must be at least {least}, got {value}.")
    if write and not Path(model).is_dir():
        raise ValueError(
            f"certify: '{model}' is not a folder, so there is no model card to write to. Give the folder, or "
            "write=False."
        )


def _read_card(card: Path) -> str:
    if not card.is_file():
        return ""
    try:
        text = card.read_bytes().decode("utf-8")  # not read_text, which would change the ends of lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{card} is not UTF-8 (byte {error.start}). Mend it, or call with write=False.") from error
    _find_section(text, card)
    return text


def _write_section(card: Path, section: str, config: JamConfig) -> None:
    """Into the card as it is now: it may have changed while all was measured."""
    try:
        text = _with_section(carried(config, _read_card(card)), section, card)
    except ValueError as error:
        raise ValueError(f"{error} It changed meanwhile; what was measured: {section}") from error
    write_whole(card, text)


def _find_section(text: str, card: Path) -> tuple[int, int] | None:
    counts = text.count(SECTION_START), text.count(SECTION_END)
    if counts == (0, 0):
        return None
    first, last = text.find(SECTION_START), text.find(SECTION_END)
    if counts != (1, 1) or last < first:
        raise ValueError(
            f"{card}: the marks of the section Retention do not pair up ({SECTION_START} {counts[0]} times, "
            f"{SECTION_END} {counts[1]} times). Remove the old section and its marks by hand."
        )
    return first, last + len(SECTION_END)


def _with_section(text: str, section: str, card: Path) -> str:
    found = _find_section(text, card)
    if found is not None:
        return text[: found[0]] + section + text[found[1] :]
    gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
    return f"{text}{gap}{section}\n"
