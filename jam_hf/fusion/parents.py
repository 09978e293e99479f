"""The classes of parents that can be fused: where each keeps its decoder, its vocabulary, its image codes and its VQ
model.

What is known of each is on its fact sheet (model/families_jam.py, checkpoints/multimodal.py); what has none is refused
by name. This module knows checkpoints' keys and configs, not what is made of them. `code_ids` and `picture_layout` need
no weights, so that they serve loaded models too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..checkpoints.multimodal import MULTIMODAL, Multimodal
from ..checkpoints.parent import Parent
from ..checkpoints.tensor_files import row_blocks
from ..model.families_jam import FAMILIES
from ..model.picture_layout_jam import PictureLayout


# Parts of multimodal parents that a JAM does not take over: the eye of Janus, and VQ models (converted on their own).
_OTHER_PARTS = re.compile(r"(.*\.)?(vqmodel|vision_model|aligner|visual)\..*|.*rotary_emb\.inv_freq")


def text_parents() -> tuple[str, ...]:
    """What a text parent may be: the model types of plain causal LMs."""
    return tuple(family.model_type for family in FAMILIES.values() if family.text_parent)


def image_parents() -> tuple[str, ...]:
    """What an image parent may be: a plain causal LM whose vocabulary holds the codes, or a multimodal class."""
    return (*text_parents(), *MULTIMODAL)


class Decoder:
    """A parent seen as a decoder: its config, and where the tensors of its layers, embedding and head stand.

    Raises:
        ValueError: if the parent's class is not registered for its role, or it has no decoder.
    """

    def __init__(self, parent: Parent, supported: tuple[str, ...]):
        self.parent = parent
        self.kind: str = parent.config.model_type
        self.multimodal: Multimodal | None = MULTIMODAL.get(self.kind)
        if self.kind not in supported:
            raise ValueError(
                f"The {parent.role} {parent.name} is of the family '{self.kind}', which is not supported here. "
                f"Supported: {', '.join(supported)}. (Others may scale embeddings, slide windows or cap logits; fused "
                "unseen they would give a wrong model, not an error.)"
            )
        self.config: PreTrainedConfig = getattr(parent.config, "text_config", parent.config)
        found = [key for key in parent.specs if key.endswith("embed_tokens.weight") and not _OTHER_PARTS.fullmatch(key)]
        if len(found) != 1:
            raise ValueError(
                f"The {parent.role} {parent.name} has {len(found)} tensors '...embed_tokens.weight'; expected its "
                "decoder's."
            )
        self.embedding_key = found[0]
        self.prefix = found[0].removesuffix("embed_tokens.weight")
        heads = [key for key in parent.specs if key.endswith("lm_head.weight")]
        self.head_key = heads[0] if heads else self.embedding_key
        self.tied = bool(parent.config.tie_word_embeddings)
        if self.tied and heads:  # transformers ties them only if they are equal
            self.tied = _equal(parent, self.head_key, self.embedding_key)
        for key in (self.embedding_key, self.head_key):
            spec = parent.specs[key]
            if not spec.dtype.is_floating_point or spec.rows != parent.specs[self.embedding_key].rows:
                raise ValueError(
                    f"Tensor '{key}' of the {parent.role} {parent.name} is {list(spec.shape)} in {spec.dtype}; "
                    f"expected floats and {parent.specs[self.embedding_key].rows} rows, as many as the embedding has."
                )
        if not heads and not self.tied:
            raise ValueError(
                f"The {parent.role} {parent.name} has no tensor 'lm_head.weight', and its config does not tie it to "
                "the embedding. Expected a causal LM with its head."
            )

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding included."""
        return self.parent.specs[self.embedding_key].rows

    def key(self, rest: str) -> str:
        """`rest` is a tensor's name inside the decoder: "layers.3.mlp.up_proj.weight"."""
        return self.prefix + rest

    def tensors(self) -> set[str]:
        """The keys that a fusion must find a place for: all but the embedding, the head and other models' parts."""
        return {
            key
            for key in self.parent.specs
            if key != self.embedding_key and not key.endswith("lm_head.weight") and not _OTHER_PARTS.fullmatch(key)
        }


def _equal(parent: Parent, one: str, other: str) -> bool:
    spec = parent.specs[one]
    if spec != parent.specs[other]:
        return False
    if parent.headers_only:  # headers do not tell; a config that ties them is believed
        return True
    return all(
        torch.equal(parent.read(one, *block), parent.read(other, *block)) for block in row_blocks(spec, spec.rows)
    )


@dataclass(frozen=True)
class ImageCodes:
    """What stands for image code 0, 1, ... in the image parent.

    rows: int64 `[K]`, rows of its embedding and head; where `folded` is given, rows past the end of its embedding.
    folded: float `[K, d]`: embeddings of the codes made of other modules (Janus), or None.
    head: keys of a head of its own for codes, by their names in `JanusVQVAEHead`; empty where codes are rows of
    `lm_head`.
    head_config: `image_head_hidden_size` and `image_head_act` of [`JamConfig`].
    said_by: what says where the codes are, in words. form: of the names of their tokens, in a plain causal LM that has
    any.
    """

    rows: torch.LongTensor
    folded: torch.Tensor | None = None
    head: dict[str, str] = field(default_factory=dict)
    head_config: dict[str, Any] = field(default_factory=dict)
    used: frozenset[str] = frozenset()
    said_by: str = "its config"
    form: str | None = None

    def __len__(self) -> int:
        return len(self.rows)


def image_codes(
    decoder: Decoder, num_codes: int, offset: int | None, tokenizer: PreTrainedTokenizerBase | None
) -> ImageCodes:
    """The codes of an image parent, and what else belongs to them; arguments, errors: see [`code_ids`]."""
    parent = decoder.parent
    if decoder.multimodal is None:
        rows, said_by, form = plain_codes(decoder.vocab_size, num_codes, tokenizer, offset, parent.name)
        return ImageCodes(rows, said_by=said_by, form=form)
    rows = code_ids(parent.config, decoder.vocab_size, num_codes, tokenizer, offset, parent.name)
    return _own_codes(decoder, rows) if decoder.multimodal.own_code_modules else ImageCodes(rows)


def code_ids(
    config: PreTrainedConfig,
    vocab_size: int,
    num_codes: int,
    tokenizer: PreTrainedTokenizerBase | None,
    offset: int | None,
    name: str,
) -> torch.LongTensor:
    """What stands for code 0, 1, ... in an image parent: its ids, or numbers behind them where codes are no ids
    (Janus).

    Args:
        config: the parent's. vocab_size: rows of its embedding. num_codes: K of the VQ model. name: how messages call
            it.
        offset: id of code 0 in a plain causal LM; by default number 0 of its tokenizer's K numbered
            tokens (`<img:0>`, `<|image_00000|>`).
    Returns:
        int64 `[K]`.
    Raises:
        ValueError: if the parent has not exactly K codes, or they lie outside its vocabulary.
    """
    sheet = MULTIMODAL.get(config.model_type)
    if sheet is None:
        return plain_codes(vocab_size, num_codes, tokenizer, offset, name)[0]
    if offset is not None:
        raise ValueError(
            f"image_token_offset is for plain causal LMs; {name} is a '{config.model_type}', which says itself where "
            "its codes are. Leave it out."
        )
    if sheet.own_code_modules:
        ids = torch.arange(vocab_size, vocab_size + config.vq_config.num_embeddings)
    else:
        ids = _mapped_ids(config, sheet, name)
    if len(ids) != num_codes:
        raise ValueError(
            f"The image parent {name} has {len(ids)} image codes, the VQ model {num_codes}. Code k must mean the same "
            "to both: use the VQ model that the parent was trained with."
        )
    if not sheet.own_code_modules:
        _check_inside(ids, vocab_size, name)
    return ids


@dataclass(frozen=True)
class CodeNames:
    """Numbered tokens that are image codes by their names, one id behind the other.

    form: "<img:{}>", "<|image_{:05d}|>". first: id of number 0. count: how many numbers follow each other from 0 on.
    in_order: whether their ids do.
    """

    form: str
    first: int
    count: int
    in_order: bool

    def __str__(self) -> str:
        return f"{self.form.format(0)}..{self.form.format(self.count - 1)}"


_PICTURE_WORD = re.compile("im(a?ge?)|pic|vis|vq|code", re.IGNORECASE)
_NUMBER_ZERO = re.compile(r"(|.*[^0-9])(0+)([^0-9]*)", re.DOTALL)


def code_names(tokenizer: PreTrainedTokenizerBase | None) -> list[CodeNames]:
    """The numbered families of two and more tokens that say that they are of pictures, by the ids of their number 0."""
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    found = []
    for token, first in vocabulary.items():
        parts = _NUMBER_ZERO.fullmatch(token)
        if parts is None or not _PICTURE_WORD.search(parts[1] + parts[3]):
            continue
        before, after = (part.replace("{", "{{").replace("}", "}}") for part in (parts[1], parts[3]))
        form = f"{before}{{:0{len(parts[2])}d}}{after}" if len(parts[2]) > 1 else f"{before}{{}}{after}"
        count = 0
        in_order = True
        while (index := vocabulary.get(form.format(count))) is not None:
            in_order &= index == first + count
            count += 1
        if count > 1:
            found.append(CodeNames(form, first, count, in_order))
    return sorted(found, key=lambda names: names.first)


def plain_codes(
    vocab_size: int, num_codes: int, tokenizer: PreTrainedTokenizerBase | None, offset: int | None, name: str
) -> tuple[torch.LongTensor, str, str | None]:
    """The codes of a plain causal LM: their ids, int64 `[K]`; what says so, in words; the form of their names, if any.

    Args, errors: see [`code_ids`]. Nothing is assumed: not that codes are the last rows, for a vocabulary may be
    padded.
    """
    families = code_names(tokenizer)
    fitting = [names for names in families if names.count == num_codes and names.in_order]
    if offset is None:
        if len(fitting) != 1:
            there = ", ".join(f"{names} ({'' if names.in_order else 'not '}in order)" for names in fitting or families)
            raise ValueError(
                f"Where the image codes of {name} are is not known: its tokenizer should have one family of exactly "
                f"{num_codes} numbered tokens (by the VQ model), such as <img:0>..<img:{num_codes - 1}>, "
                f"with one id behind the other; it has {there or 'none'}. Say what code 0 is: image_token_offset=..."
            )
        offset = fitting[0].first
    ids = torch.arange(offset, offset + num_codes)
    _check_inside(ids, vocab_size, name)
    names = next((names for names in fitting if names.first == offset), None)
    if names is not None:
        return ids, f"its tokens {names}", names.form
    if fitting:
        raise ValueError(
            f"The image codes of the tokenizer of {name} do not fit: {fitting[0]} have the ids from {fitting[0].first} "
            f"on, image_token_offset is {offset}. Leave it out."
        )
    near = [names for names in families if names.first < offset + num_codes and offset < names.first + names.count]
    near += [names for names in families if names.form == "<img:{}>"]
    if near:
        raise ValueError(
            f"The image codes of the tokenizer of {name} do not fit: with {num_codes} codes (by the VQ model) from id "
            f"{offset}, it should have as many numbered tokens from there on, in order; {near[0]} are {near[0].count} "
            f"from id {near[0].first} on."
        )
    _check_names_of_codes(ids, tokenizer, name)
    return ids, "image_token_offset", None


def _check_names_of_codes(ids: torch.LongTensor, tokenizer: PreTrainedTokenizerBase | None, name: str) -> None:
    """Codes that were pointed at are all tokens or none is, and none is one that begins, ends or fills a text."""
    if tokenizer is None:
        return
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    taken = [index for index in ids.tolist() if index in by_id]
    marks = {*tokenizer.all_special_ids, tokenizer.get_vocab().get("<break>")}
    wrong = next((index for index in taken if len(taken) < len(ids) or index in marks), None)
    if wrong is not None:
        raise ValueError(
            f"By image_token_offset the image codes of {name} are the ids {int(ids[0])}..{int(ids[-1])}, and {wrong} "
            f"of these is the token {by_id[wrong]!r}, no code. Code 0 has another id."
        )


def _check_inside(ids: torch.LongTensor, vocab_size: int, name: str) -> None:
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"The image codes of {name} would be the rows {int(ids.min())}..{int(ids.max())} of its vocabulary, which "
            f"has {vocab_size}. Say where they begin: image_token_offset=..."
        )


def _mapped_ids(config: PreTrainedConfig, sheet: Multimodal, name: str) -> torch.LongTensor:
    """The codes by their names in `vocabulary_map`, as transformers reads them (Chameleon, Emu3)."""
    if not config.vocabulary_map:
        raise ValueError(
            f"The config of the image parent {name} has no vocabulary_map, which says what its image codes are."
        )
    ids: dict[int, int] = sheet.class_of("ImageVocabularyMapping")(config.vocabulary_map).img2bpe
    if sorted(ids) != list(range(len(ids))):
        missing = sorted(set(range(max(ids, default=-1) + 1)) - set(ids))
        raise ValueError(
            f"The vocabulary_map of the image parent {name} lacks {len(missing)} codes, e.g. {missing[:3]}."
        )
    return torch.tensor([ids[code] for code in range(len(ids))], dtype=torch.long)


@torch.no_grad()
def _own_codes(decoder: Decoder, rows: torch.LongTensor) -> ImageCodes:
    """Janus embeds codes by an embedding and an aligner of its own, which fold into rows: `aligner(embedding[code])`.

    Its head is an MLP, which does not: it stays a module.
    """
    from ..integrations.private import JanusVQVAEAlignerMLP

    parent, config = decoder.parent, decoder.parent.config.vq_config
    embedding_key = _only(parent, "generation_embeddings.weight")
    if parent.require(embedding_key).rows != len(rows):
        raise ValueError(
            f"Tensor '{embedding_key}' of the image parent {parent.name} has {parent.require(embedding_key).rows} "
            f"rows; its config says {len(rows)} codes."
        )
    with torch.device("meta"):
        aligner = JanusVQVAEAlignerMLP(config)
    prefix = embedding_key.removesuffix("generation_embeddings.weight")
    keys = {name: f"{prefix}generation_aligner.{name}" for name in aligner.state_dict()}
    aligner.load_state_dict({name: parent.get(key) for name, key in keys.items()}, assign=True)
    embedding = parent.get(embedding_key)
    folded = aligner.to(embedding.dtype)(embedding)
    head_names = ("proj_out.weight", "proj_out.bias", "vision_head.weight", "vision_head.bias")
    head = {name: f"{prefix}generation_head.{name}" for name in head_names}
    for key in head.values():
        parent.require(key)
    return ImageCodes(
        rows=rows,
        folded=folded,
        head=head,
        head_config={"image_head_hidden_size": config.projection_dim, "image_head_act": config.hidden_act},
        used=frozenset({embedding_key, *keys.values(), *head.values()}),
    )


def _only(parent: Parent, suffix: str) -> str:
    found = [key for key in parent.specs if key.endswith(suffix)]
    if len(found) != 1:
        raise ValueError(f"The {parent.role} {parent.name} has {len(found)} tensors '...{suffix}'; expected one.")
    return found[0]


def picture_layout(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    codes: torch.LongTensor,
    grid_size: int,
    name: str,
) -> PictureLayout | None:
    """How an image parent writes a picture of `grid_size` x `grid_size` codes, in its ids; `None` where it has no
    marks.

    Args:
        config: the parent's. tokenizer: the parent's; None where it brings none. codes: int64 `[K]`, see [`code_ids`].
        name: how messages call the parent.
    Raises:
        ValueError: if a token that its class needs cannot be found; the message says what to pass.
    """
    sheet = MULTIMODAL.get(config.model_type)
    ids: dict[str, int] = dict(getattr(config, "vocabulary_map", None) or {})
    if tokenizer is not None:
        ids |= tokenizer.get_vocab()
    grid = (grid_size, grid_size)
    if sheet is None:  # one <break> on both sides (paper), if any
        mark = ids.get("<break>")
        return None if mark is None else PictureLayout(mark, mark, codes.tolist(), grid)

    def find(attribute: str, usual: str) -> int:
        said = getattr(tokenizer, attribute, None) if tokenizer is not None else None
        for token in (said, usual):
            if token in ids:
                return ids[token]
        raise ValueError(
            f"The image parent {name} ('{sheet.model_type}') marks pictures by a token ({attribute}, usually {usual}) "
            "that its tokenizer does not have. Pass its own tokenizer: image_tokenizer=..."
        )

    size: list[int] = []
    if sheet.size_form is not None:
        if tokenizer is None:
            raise ValueError(
                f"The image parent {name} writes the size of a picture in tokens before it, and brings no tokenizer to "
                "say which. Pass image_tokenizer=..."
            )
        size = tokenizer.encode(sheet.size_form.format(grid_size, grid_size), add_special_tokens=False)
    found = {role: find(*token) for role, token in sheet.marks.items()}
    return PictureLayout(
        begin=found["begin"],
        end=found["end"],
        codes=codes.tolist(),
        grid=grid,
        prefix=(*size, *([found["prefix"]] if "prefix" in found else [])),
        row_end=found.get("row_end"),
        suffix=(found["suffix"],) if "suffix" in found else (),
    )
