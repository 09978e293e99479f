"""Which tensor of a JAM comes from which tensors of its parents, by which function: declarative tables of keys.

A row is a regular expression on the JAM's key, words for people, and a function that names sources; the first row that
matches rules. `{rest}` is the part of the key inside a decoder, which both parents have. Nothing is read or written
here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch

from ..checkpoints.parent import Parent
from ..checkpoints.plan import Band, RowSource, TensorPlan
from ..checkpoints.tensor_files import TensorSpec
from ..model.configuration_jam import JamConfig
from ..model.families_jam import family_of
from . import inits
from .parents import Decoder, ImageCodes
from .sources import Combined, Constant, Noise, ParentRows, VocabularyRows
from .vocabulary import RowMap


INITS = {
    "uniform": ("average",),
    "width": ("copy", "average", "block_diagonal"),
    "cross": ("preserving", "paper"),
}


@dataclass
class Ingredients:
    """All that a fusion is made of. `vq`: state of the VQ model. `used`: keys taken so far, by role."""

    config: JamConfig
    text: Decoder
    image: Decoder
    codes: ImageCodes
    text_map: RowMap
    image_map: RowMap
    vq: dict[str, torch.Tensor]
    seed: int = 0
    used: dict[str, set[str]] = field(default_factory=lambda: {"text": set(), "image": set()})

    def text_rows(self, rest: str) -> ParentRows:
        return ParentRows(self.text.parent, self.text.key(rest))

    def image_rows(self, rest: str) -> ParentRows:
        return ParentRows(self.image.parent, self.image.key(rest))

    def text_vocabulary(self, head: bool) -> VocabularyRows:
        return VocabularyRows(self.text, self.text.head_key if head else self.text.embedding_key, self.text_map)

    def image_vocabulary(self, head: bool) -> VocabularyRows:
        if not head or not self.codes.head:
            key = self.image.head_key if head else self.image.embedding_key
            return VocabularyRows(self.image, key, self.image_map, self.codes)
        # Codes have a head of their own; in this one, their rows mean nothing.
        first = self.config.image_token_offset
        return VocabularyRows(self.image, self.image.head_key, self.image_map.without(first, first + len(self.codes)))


# Sources and function of an output tensor: (ingredients, key, match, spec) -> bands.
Build = Callable[[Ingredients, str, re.Match, TensorSpec], tuple[Band, ...]]


@dataclass(frozen=True)
class Rule:
    """One row of a table. what: the row in words, for `--explain` and the model card."""

    pattern: str
    what: str
    build: Build


def _as_it_is(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _whole(source: RowSource, spec: TensorSpec, make: Callable = _as_it_is) -> tuple[Band, ...]:
    return (Band(spec.rows, (source,), make),)


# ----- rows of tables, used by more than one mode ---------------------------------------------------------------------


def _vq(parts: Ingredients, key: str, match: re.Match, spec: TensorSpec) -> tuple[Band, ...]:
    return _whole(Constant(parts.vq[match["rest"]]), spec)


def _mean(parts: Ingredients, key: str, match: re.Match, spec: TensorSpec) -> tuple[Band, ...]:
    rest = match["rest"]
    return (Band(spec.rows, (parts.text_rows(rest), parts.image_rows(rest)), inits.average),)


def _image_head(parts: Ingredients, key: str, match: re.Match, spec: TensorSpec) -> tuple[Band, ...]:
    """The image parent's own head for codes (Janus); in width it reads the image parent's half of the hidden state."""
    rest = match["rest"]
    source = ParentRows(parts.image.parent, parts.codes.head[rest])
    missing = 0 if len(spec.shape) < 2 else spec.row_numel - source.spec.row_numel
    return _whole(source, spec, partial(inits.zeros_left, width=missing) if missing else _as_it_is)


_VQ = Rule(r"model\.vq_model\.(?P<rest>.*)", "the VQ model, as it is", _vq)
_OWN_HEAD = Rule(
    r"image_head\.(?P<rest>(proj_out|vision_head)\..*)",
    "the image parent's own head for codes, kept as a module",
    _image_head,
)
_DECODER = r"model\.language_model\."


# ----- uniform --------------------------------------------------------------------------------------------------------


def _uniform_vocabulary(
    parts: Ingredients, key: str, match: re.Match, spec: TensorSpec, head: bool = False
) -> tuple[Band, ...]:
    text, image = parts.text_vocabulary(head), parts.image_vocabulary(head)
    has_text, has_image = text.present, image.present

    def combine(first: int, last: int, text_rows: torch.Tensor, image_rows: torch.Tensor) -> torch.Tensor:
        return inits.mean_of_present(has_text[first:last], has_image[first:last], text_rows, image_rows)

    return _whole(Combined(text, image, combine), spec)


def _uniform_table() -> list[Rule]:
    known = "mean of the parents; where only one knows the token, its row"
    return [
        _VQ,
        _OWN_HEAD,
        Rule(r"lm_head\.weight", known, partial(_uniform_vocabulary, head=True)),
        Rule(_DECODER + r"embed_tokens\.weight", known, _uniform_vocabulary),
        Rule(_DECODER + r"(?P<rest>.*)", "mean of the parents", _mean),
    ]


# ----- width ----------------------------------------------------------------------------------------------------------


def _width_vocabulary(
    parts: Ingredients, key: str, match: re.Match, spec: TensorSpec, head: bool = False
) -> tuple[Band, ...]:
    return (Band(spec.rows, (parts.text_vocabulary(head), parts.image_vocabulary(head)), inits.beside),)


def _width_beside(parts: Ingredients, key: str, match: re.Match, spec: TensorSpec) -> tuple[Band, ...]:
    rest = match["rest"]
    return (Band(spec.rows, (parts.text_rows(rest), parts.image_rows(rest)), inits.beside),)


def _width_behind(parts: Ingredients, key: str, match: re.Match, spec: TensorSpec) -> tuple[Band, ...]:
    sources = parts.text_rows(match["rest"]), parts.image_rows(match["rest"])
    return tuple(Band(source.spec.rows, (source,), _as_it_is) for source in sources)


def _width_block(
    parts: Ingredients, key: str, match: re.Match, spec: TensorSpec, init: str = "copy"
) -> tuple[Band, ...]:
    text, image = parts.text_rows(match["rest"]), parts.image_rows(match["rest"])
    if init == "copy":
        return Band(text.spec.rows, (text,), inits.twice), Band(image.spec.rows, (image,), inits.twice)
    if init == "average":
        return (
            Band(text.spec.rows, (text, text, image), inits.beside_mean),
            Band(image.spec.rows, (image, text, image), inits.beside_mean),
        )
    return (
        Band(text.spec.rows, (text,), partial(inits.zeros_right, width=image.spec.row_numel)),
        Band(image.spec.rows, (image,), partial(inits.zeros_left, width=text.spec.row_numel)),
    )


def _width_table(init: str, config: JamConfig) -> list[Rule]:
    columns = "the parents side by side on the hidden dimension"
    of_all_heads = [name for name, what in family_of(config.text_config).attention.items() if what == "norm of heads"]
    return [
        _VQ,
        _OWN_HEAD,
        Rule(r"lm_head\.weight", columns, partial(_width_vocabulary, head=True)),
        Rule(_DECODER + r"embed_tokens\.weight", columns, _width_vocabulary),
        Rule(_DECODER + r"(?P<rest>embed_positions\.weight)", columns, _width_beside),
        # One norm serves all heads of a layer, so both parents' cannot stand side by side (ours [R]).
        *(
            Rule(_DECODER + rf"(?P<rest>.*\.{name}\.weight)", "mean of the parents: one norm for all heads", _mean)
            for name in of_all_heads
        ),
        Rule(_DECODER + r"(?P<rest>.*norm\.weight)", "the parents one after the other", _width_behind),
        Rule(_DECODER + r"(?P<rest>.*\.bias)", "the parents one after the other", _width_behind),
        Rule(
            _DECODER + r"(?P<rest>.*\.weight)", f"block rule '{init}' of the parents", partial(_width_block, init=init)
        ),
    ]


# ----- cross ----------------------------------------------------------------------------------------------------------


def _text(parts: Ingredients, key: str, match: re.Match, spec: TensorSpec) -> tuple[Band, ...]:
    return _whole(parts.text_rows(match["rest"]), spec)


def _image(parts: Ingredients, key: str, match: re.Match, spec: TensorSpec) -> tuple[Band, ...]:
    return _whole(parts.image_rows(match["rest"]), spec)


def _text_layer(parts: Ingredients, key: str, match: re.Match, spec: TensorSpec) -> tuple[Band, ...]:
    layer = parts.config.text_layer_depths.index(int(match["depth"]))
    return _whole(parts.text_rows(f"layers.{layer}.{match['rest']}"), spec)


def _image_layer(parts: Ingredients, key: str, match: re.Match, spec: TensorSpec) -> tuple[Band, ...]:
    layer = parts.config.image_layer_depths.index(int(match["depth"]))
    return _whole(parts.image_rows(f"layers.{layer}.{match['rest']}"), spec)


def _text_head(parts: Ingredients, key: str, match: re.Match, spec: TensorSpec) -> tuple[Band, ...]:
    return _whole(parts.text_vocabulary(head=True), spec)


def _code_head(parts: Ingredients, key: str, match: re.Match, spec: TensorSpec) -> tuple[Band, ...]:
    key, rows = parts.image.head_key, parts.codes.rows
    first, last = int(rows[0]), int(rows[0]) + len(rows)
    if torch.equal(rows, torch.arange(first, last)):
        return _whole(ParentRows(parts.image.parent, key, first, last), spec)
    return _whole(VocabularyRows(parts.image, key, RowMap.of((row,) for row in rows.tolist())), spec)


def _shared_vocabulary(
    parts: Ingredients, key: str, match: re.Match, spec: TensorSpec, head: bool = False
) -> tuple[Band, ...]:
    """The paper's one projection: codes from the image parent, text from the text parent, and what it lacks from
    the other.
    """
    text, image = parts.text_vocabulary(head), parts.image_vocabulary(head)
    use_image = ~text.present & image.present
    first_code = parts.config.image_token_offset
    use_image[first_code : first_code + len(parts.codes)] = True

    def combine(first: int, last: int, text_rows: torch.Tensor, image_rows: torch.Tensor) -> torch.Tensor:
        return inits.choose(use_image[first:last], text_rows, image_rows)

    return _whole(Combined(text, image, combine), spec)


def _new(parts: Ingredients, key: str, match: re.Match, spec: TensorSpec, std: float = 0.0) -> tuple[Band, ...]:
    return _whole(Noise(key, spec.shape[1:], std, parts.seed, spec.dtype), spec)


def _ones(parts: Ingredients, key: str, match: re.Match, spec: TensorSpec) -> tuple[Band, ...]:
    return _whole(Constant(torch.ones(spec.shape, dtype=spec.dtype)), spec)


def _cross_table(init: str, config: JamConfig) -> list[Rule]:
    preserving = init == "preserving"
    std = config.initializer_range
    shared = "image codes from the image parent, all others from the text parent"
    if preserving:
        vocabulary = [
            _OWN_HEAD,
            Rule(r"lm_head\.weight", "text parent's output projection", _text_head),
            Rule(r"image_head\.weight", "rows of the image codes in the image parent's output projection", _code_head),
            Rule(_DECODER + r"embed_tokens\.weight", "text parent's row, then image parent's row", _width_vocabulary),
        ]
    else:
        vocabulary = [
            _OWN_HEAD,
            Rule(r"lm_head\.weight", shared, partial(_shared_vocabulary, head=True)),
            Rule(_DECODER + r"embed_tokens\.weight", shared, _shared_vocabulary),
        ]
    ending = "zeros: adds nothing at step 0" if preserving else f"normal, std {std}"
    layer = _DECODER + r"layers\.(?P<depth>\d+)\."
    cross = _DECODER + r"layers\.\d+\.(text|image)_cross\."
    projection_std = config.text_config.hidden_size**-0.5
    return [
        _VQ,
        *vocabulary,
        Rule(_DECODER + r"text_stem\.(?P<rest>.*)", "text parent", _text),
        Rule(_DECODER + r"image_stem\.(?P<rest>.*)", "image parent", _image),
        Rule(layer + r"text_layer\.(?P<rest>.*)", "text parent", _text_layer),
        Rule(layer + r"image_layer\.(?P<rest>.*)", "image parent", _image_layer),
        Rule(
            cross + r"(cross_attn\.o_proj|mlp\.down_proj)\.weight",
            ending,
            partial(_new, std=0.0 if preserving else std),
        ),
        Rule(cross + r".*norm\.weight", "ones", _ones),
        Rule(cross + r".*norm\.bias", "zeros", partial(_new, std=0.0)),
        Rule(cross + r".*\.weight", f"normal, std {std}", partial(_new, std=std)),
        Rule(_DECODER + r"output_projection\.weight", "normal, std d^-0.5", partial(_new, std=projection_std)),
    ]


def table(mode: str, init: str, config: JamConfig) -> list[Rule]:
    """The rows for a fusion; the first whose pattern matches a key rules it."""
    if mode == "uniform":
        return _uniform_table()
    if mode == "width":
        return _width_table(init, config)
    return _cross_table(init, config)


def plan_tensors(specs: dict[str, TensorSpec], rules: list[Rule], parts: Ingredients) -> dict[str, TensorPlan]:
    """How each tensor is made.

    Raises:
        ValueError: if a parent lacks a tensor, has one of another shape, or has one that the JAM has no place for.
    """
    plans = {}
    for key, spec in specs.items():
        rule, match = next(
            ((rule, found) for rule in rules if (found := re.fullmatch(rule.pattern, key))), (None, None)
        )
        if rule is None:
            raise AssertionError(f"no row for '{key}' in the table")
        bands = rule.build(parts, key, match, spec)
        _check_shape(key, spec, bands)
        sources: list[Any] = [
            source for band in bands for source in band.sources
        ]  # of sources.py: they know their inputs
        inputs = tuple(dict.fromkeys(entry for source in sources for entry in source.inputs))
        for parent, name in inputs:
            parts.used[parent.role.split()[0]].add(name)
        plans[key] = TensorPlan(spec, bands, rule.what, inputs, sum(source.loads for source in dict.fromkeys(sources)))
    parts.used["image"] |= parts.codes.used
    return plans


def _check_shape(key: str, spec: TensorSpec, bands: tuple[Band, ...]) -> None:
    """Rows must add up, each source must have the rows of its band, and what is made of no rows must have the
    columns.
    """
    known = [[source for source in band.sources if isinstance(source, (ParentRows, VocabularyRows))] for band in bands]
    fits = sum(band.rows for band in bands) == spec.rows
    for band, sources in zip(bands, known):
        of_tensors = [source.spec for source in band.sources if isinstance(source, ParentRows)]
        fits &= all(source.rows == band.rows for source in of_tensors)
        fits &= band.make is not inits.average or len({source.shape for source in of_tensors}) == 1
        if fits and sources and len(sources) == len(band.sources):
            try:
                made = band.make(*(torch.empty(0, *source.spec.shape[1:]) for source in sources))
            except (RuntimeError, IndexError):
                fits = False
            else:
                fits &= made.shape[1:] == spec.shape[1:]
    if not fits:
        listing = ", ".join(
            f"'{s.key}' of the {_parent(s).role} {_parent(s).name} is {list(s.spec.shape)}"
            for s in dict.fromkeys(chain(*known))
        )
        raise ValueError(
            f"Tensor '{key}' should be {list(spec.shape)}, but {listing or 'its sources have other shapes'}."
        )


def _parent(source: ParentRows | VocabularyRows) -> Parent:
    return source.parent if isinstance(source, ParentRows) else source.decoder.parent


def check_all_used(parts: Ingredients, mode: str) -> None:
    """Raise a `ValueError` if a parent has a tensor that the JAM has no place for."""
    for decoder, role in ((parts.text, "text"), (parts.image, "image")):
        left = decoder.tensors() - parts.used[role]
        if mode == "cross" and parts.config.cross_form == "paper" and role == "image":
            # One embedding, one position table and one final norm: the paper takes the text parent's.
            left = {key for key in left if "layers." in key}
        if left:
            raise ValueError(
                f"The {decoder.parent.role} {decoder.parent.name} has tensors that a '{mode}' JAM has no place for: "
                f"{', '.join(sorted(left)[:5])}{' ...' if len(left) > 5 else ''}."
            )
