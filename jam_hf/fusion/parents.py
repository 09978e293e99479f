"""The classes of parents that can be fused: where each keeps its decoder, its vocabulary, its image codes and its VQ model.

An explicit registry; what is not listed is refused by name. It knows checkpoints' keys and configs, not what is made of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .checkpoint import Parent
from .tensor_files import TensorSpec


TEXT_PARENTS = ("llama", "mistral", "qwen2", "qwen3", "opt")
# A plain causal LM whose vocabulary holds the codes, or one of the multimodal classes of transformers.
IMAGE_PARENTS = (*TEXT_PARENTS, "chameleon", "emu3", "janus")

# Parts of multimodal parents that a JAM does not take over: the eye of Janus, and VQ models (converted on their own).
_OTHER_PARTS = re.compile(r"(.*\.)?(vqmodel|vision_model|aligner|visual)\..*|.*rotary_emb\.inv_freq")


class Decoder:
    """A parent seen as a decoder: its config, and where the tensors of its layers, embedding and head stand.

    Raises:
        ValueError: if the parent's class is not registered for its role, or it has no decoder.
    """

    def __init__(self, parent: Parent, supported: tuple[str, ...]):
        self.parent = parent
        self.kind: str = parent.config.model_type
        if self.kind not in supported:
            raise ValueError(
                f"The {parent.role} {parent.name} is of the family '{self.kind}', which is not supported here. Supported: "
                f"{', '.join(supported)}. (Others may scale embeddings, slide windows or cap logits; fused unseen they would "
                "give a wrong model, not an error.)"
            )
        self.config: PreTrainedConfig = getattr(parent.config, "text_config", parent.config)
        found = [key for key in parent.specs if key.endswith("embed_tokens.weight") and not _OTHER_PARTS.fullmatch(key)]
        if len(found) != 1:
            raise ValueError(
                f"The {parent.role} {parent.name} has {len(found)} tensors '...embed_tokens.weight'; expected its decoder's."
            )
        self.embedding_key = found[0]
        self.prefix = found[0].removesuffix("embed_tokens.weight")
        tied = bool(parent.config.tie_word_embeddings)
        heads = [key for key in parent.specs if key.endswith("lm_head.weight")]
        self.head_key = heads[0] if heads else self.embedding_key
        # transformers, too, does not tie what the checkpoint has twice and differently, whatever its config says.
        self.tied = tied and (not heads or _same_rows(parent, heads[0], self.embedding_key))
        if not heads and not tied:
            raise ValueError(
                f"The {parent.role} {parent.name} has no tensor 'lm_head.weight', and its config does not tie it to the "
                "embedding. Expected a causal LM with its head."
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
        vocabulary = {self.embedding_key, self.head_key}
        heads = {key for key in self.parent.specs if key.endswith("lm_head.weight")}
        return {key for key in self.parent.specs if not _OTHER_PARTS.fullmatch(key)} - vocabulary - heads


def _same_rows(parent: Parent, one: str, other: str) -> bool:
    spec, size = parent.specs[one], 1 << 12
    blocks = [(first, min(first + size, spec.rows)) for first in range(0, spec.rows, size)]
    return spec == parent.specs[other] and all(torch.equal(parent.read(one, *b), parent.read(other, *b)) for b in blocks)


@dataclass(frozen=True)
class PictureTokens:
    """The image parent's own tokens around a picture, by its ids; None where it has none (paper: one `<break>` on both sides).

    begin, end: open and close a picture. prefix: between begin and the first code. row_end: after each row of codes.
    suffix: after the last row.
    """

    begin: int | None = None
    end: int | None = None
    prefix: tuple[int, ...] = ()
    row_end: int | None = None
    suffix: tuple[int, ...] = ()


@dataclass(frozen=True)
class ImageCodes:
    """What stands for image code 0, 1, ... in the image parent.

    rows: int64 `[K]`, rows of its embedding and head; where `folded` is given, rows past the end of its embedding.
    folded: float `[K, d]`: embeddings of the codes made of other modules (Janus), or None.
    head: keys of a head of its own for codes, by their names in `JanusVQVAEHead`; empty where codes are rows of `lm_head`.
    head_config: `image_head_hidden_size` and `image_head_act` of [`JamConfig`].
    """

    rows: torch.LongTensor
    folded: torch.Tensor | None = None
    head: dict[str, str] = field(default_factory=dict)
    head_config: dict[str, Any] = field(default_factory=dict)
    used: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.rows)


def image_codes(decoder: Decoder, num_codes: int, offset: int | None, tokenizer: PreTrainedTokenizerBase | None) -> ImageCodes:
    """Find the codes of an image parent.

    Args:
        num_codes: K of the VQ model. offset: id of code 0 in a plain causal LM; by default its tokenizer's `<img:0>`, else the
            last K ids.
    Raises:
        ValueError: if the parent has not exactly K codes, or they lie outside its vocabulary.
    """
    find: Callable = _FINDERS.get(decoder.kind, _plain_codes)
    if offset is not None and find is not _plain_codes:
        raise ValueError(
            f"image_token_offset is for plain causal LMs; a '{decoder.kind}' says itself where its codes are. Leave it out."
        )
    codes = find(decoder, num_codes, offset, tokenizer)
    if len(codes) != num_codes:
        raise ValueError(
            f"The image parent {decoder.parent.name} has {len(codes)} image codes, the VQ model {num_codes}. Use the VQ model "
            "that the parent was trained with."
        )
    if codes.folded is None and len(codes) and not 0 <= int(codes.rows.min()) <= int(codes.rows.max()) < decoder.vocab_size:
        raise ValueError(
            f"The image codes of {decoder.parent.name} would be the rows {int(codes.rows.min())}..{int(codes.rows.max())} of "
            f"its vocabulary, which has {decoder.vocab_size}. Say where they begin: image_token_offset=..."
        )
    return codes


def _plain_codes(decoder: Decoder, num_codes: int, offset: int | None, tokenizer: PreTrainedTokenizerBase | None) -> ImageCodes:
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    if offset is None:
        offset = vocabulary.get("<img:0>", decoder.vocab_size - num_codes)
    last = f"<img:{num_codes - 1}>"
    if "<img:0>" in vocabulary and vocabulary.get(last) != offset + num_codes - 1:
        raise ValueError(
            f"The image codes of the tokenizer do not fit the VQ model: with {num_codes} codes from id {offset}, {last} should "
            f"be id {offset + num_codes - 1}, but it is {vocabulary.get(last)}."
        )
    return ImageCodes(torch.arange(offset, offset + num_codes))


def _chameleon_codes(decoder: Decoder, *_: Any) -> ImageCodes:
    from transformers.models.chameleon.modeling_chameleon import ChameleonImageVocabularyMapping

    return _mapped_codes(decoder, ChameleonImageVocabularyMapping)


def _emu3_codes(decoder: Decoder, *_: Any) -> ImageCodes:
    from transformers.models.emu3.modeling_emu3 import Emu3ImageVocabularyMapping

    return _mapped_codes(decoder, Emu3ImageVocabularyMapping)


def _mapped_codes(decoder: Decoder, mapping_class: type) -> ImageCodes:
    if not decoder.parent.config.vocabulary_map:
        raise ValueError(
            f"The config of the image parent {decoder.parent.name} has no vocabulary_map, which says what its image codes are."
        )
    ids: dict[int, int] = mapping_class(decoder.parent.config.vocabulary_map).img2bpe
    if sorted(ids) != list(range(len(ids))):
        missing = sorted(set(range(max(ids, default=-1) + 1)) - set(ids))
        raise ValueError(
            f"The vocabulary_map of the image parent {decoder.parent.name} lacks {len(missing)} codes, e.g. {missing[:3]}."
        )
    return ImageCodes(torch.tensor([ids[code] for code in range(len(ids))], dtype=torch.long))


@torch.no_grad()
def _janus_codes(decoder: Decoder, *_: Any) -> ImageCodes:
    """Janus embeds codes by an embedding and an aligner of its own, which fold into rows: `aligner(embedding[code])`.

    Its head is an MLP, which does not: it stays a module.
    """
    from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP

    parent, config = decoder.parent, decoder.parent.config.vq_config
    embedding_key = _only(parent, "generation_embeddings.weight")
    aligner = JanusVQVAEAlignerMLP(config)
    prefix = embedding_key.removesuffix("generation_embeddings.weight")
    keys = {name: f"{prefix}generation_aligner.{name}" for name in aligner.state_dict()}
    aligner.load_state_dict({name: parent.get(key) for name, key in keys.items()})
    embedding = parent.get(embedding_key)
    folded = aligner.to(embedding.dtype)(embedding)
    head_names = ("proj_out.weight", "proj_out.bias", "vision_head.weight", "vision_head.bias")
    head = {name: f"{prefix}generation_head.{name}" for name in head_names}
    for key in head.values():
        parent.require(key)
    return ImageCodes(
        rows=torch.arange(decoder.vocab_size, decoder.vocab_size + len(folded)),
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


_FINDERS = {"chameleon": _chameleon_codes, "emu3": _emu3_codes, "janus": _janus_codes}


def picture_tokens(decoder: Decoder, tokenizer: PreTrainedTokenizerBase | None, grid_size: int) -> PictureTokens:
    """The tokens that an image parent puts around a picture of `grid_size` x `grid_size` codes.

    Raises:
        ValueError: if a token that its class needs cannot be found; the message says what to pass.
    """
    names: dict[str, int] = dict(getattr(decoder.parent.config, "vocabulary_map", None) or {})
    if tokenizer is not None:
        names |= tokenizer.get_vocab()

    def find(attribute: str, *usual: str) -> int:
        said = getattr(tokenizer, attribute, None) if tokenizer is not None else None
        for name in (said, *usual):
            if name in names:
                return names[name]
        raise ValueError(
            f"The image parent {decoder.parent.name} ('{decoder.kind}') marks pictures by a token ({attribute}, usually "
            f"{' or '.join(usual)}) that its tokenizer does not have. Pass its own tokenizer: image_tokenizer=..."
        )

    if decoder.kind == "chameleon":
        return PictureTokens(find("boi_token", "<racm3:break>"), find("eoi_token", "<eoss>"))
    if decoder.kind == "janus":
        return PictureTokens(find("boi_token", "<begin_of_image>"), find("eoi_token", "<end_of_image>"))
    if decoder.kind == "emu3":
        if tokenizer is None:
            raise ValueError(
                f"The image parent {decoder.parent.name} writes the size of a picture in tokens before it, and brings no "
                "tokenizer to say which. Pass image_tokenizer=..."
            )
        size = tokenizer.encode(f"{grid_size}*{grid_size}", add_special_tokens=False)
        return PictureTokens(
            begin=find("boi_token", "<|image start|>"),
            end=find("eoi_token", "<|image end|>"),
            prefix=(*size, find("image_wrapper_token", "<|image token|>")),
            row_end=find("eol_token", "<|extra_200|>"),
            suffix=(find("eof_token", "<|extra_201|>"),),
        )
    return PictureTokens(names.get("<break>"))


def head_specs(codes: ImageCodes, parent: Parent) -> dict[str, TensorSpec]:
    """Shapes of the tensors of the codes' own head, by their names in `JanusVQVAEHead`."""
    return {name: parent.require(key) for name, key in codes.head.items()}
