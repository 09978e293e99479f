"""Which tensor of a JAM comes from which tensors of its parents, by which function: declarative tables of keys.

They know key names and modes; they read and write nothing. A rule is a regular expression on the JAM's key; the first that
matches rules. `{rest}` is the part of the key inside a decoder, which both parents have.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ..model.configuration_jam import JamConfig
from . import inits


# The fields of a decoder's config that JAM-Width doubles [P] (hidden size, FFN) [A] (heads).
DOUBLED_BY_WIDTH = {
    "llama": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "opt": ("hidden_size", "ffn_dim", "num_attention_heads", "word_embed_proj_dim"),
}

INITS = {
    "uniform": ("average",),
    "width": ("copy", "average", "block_diagonal"),
    "cross": ("preserving", "paper"),
}

_WIDTH_BLOCKS = {
    "copy": inits.width_copy,
    "average": inits.width_average,
    "block_diagonal": inits.width_block_diagonal,
}


@dataclass(frozen=True)
class Rule:
    """One row of a table.

    pattern: matches the JAM's key; its group `rest` names the tensor inside the parents' decoders ("lm_head.weight" stands
    for the output projection, "vq" for the VQ model). sources: "both", "text", "image", "vq" or "new".
    make: function of the source tensors; for "new", of nothing, and `std` says what to draw (0.0: zeros, None: ones).
    what: the row in words, for `--explain` and the model card.
    """

    pattern: str
    sources: str
    what: str
    make: Callable[..., torch.Tensor] | None = None
    std: float | None = None

    def match(self, key: str) -> str | None:
        found = re.fullmatch(self.pattern, key)
        if found is None:
            return None
        groups = found.groupdict()
        if "depth" in groups:  # cross mode keeps the two layers of a depth in one module
            return f"layers.{groups['depth']}.{groups['rest']}"
        return groups.get("rest", "")


_DECODER = r"model\.language_model\."
_VQ = Rule(r"model\.vq_model\.(?P<rest>.*)", "vq", "the VQ model, as it is")


def _uniform_table() -> list[Rule]:
    return [
        _VQ,
        Rule(r"(?P<rest>lm_head\.weight)", "both", "mean of the parents", inits.average),
        Rule(_DECODER + r"(?P<rest>.*)", "both", "mean of the parents", inits.average),
    ]


def _width_table(init: str) -> list[Rule]:
    block = _WIDTH_BLOCKS[init]
    columns = "the parents side by side on the hidden dimension"
    return [
        _VQ,
        Rule(r"(?P<rest>lm_head\.weight)", "both", columns, inits.concat_columns),
        Rule(_DECODER + r"(?P<rest>embed_(tokens|positions)\.weight)", "both", columns, inits.concat_columns),
        Rule(_DECODER + r"(?P<rest>.*norm\.weight)", "both", columns, inits.concat_rows),
        Rule(_DECODER + r"(?P<rest>.*\.bias)", "both", columns, inits.concat_rows),
        Rule(_DECODER + r"(?P<rest>.*\.weight)", "both", f"block rule '{init}' of the parents", block),
    ]


def _cross_table(init: str, config: JamConfig) -> list[Rule]:
    first, last = config.image_token_offset, config.image_token_offset + config.num_image_tokens
    preserving = init == "preserving"
    std = config.initializer_range

    def splice(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return inits.splice_rows(text, image, first, last)

    shared = f"image parent in rows {first}..{last - 1}, text parent in all others"
    embed = (inits.concat_columns, "text parent's row, then image parent's row") if preserving else (splice, shared)
    head = [Rule(r"(?P<rest>lm_head\.weight)", "both", shared, splice)]
    if preserving:
        head = [
            Rule(r"(?P<rest>lm_head\.weight)", "text", "text parent's output projection"),
            Rule(
                r"image_head\.weight",
                "image_head",
                f"rows {first}..{last - 1} of the image parent's output projection",
                lambda weight: weight[first:last],
            ),
        ]
    ending = "zeros: adds nothing at step 0" if preserving else f"normal, std {std}"
    layer = _DECODER + r"layers\.(?P<depth>\d+)\."
    cross = _DECODER + r"layers\.\d+\.(text|image)_cross\."
    return [
        _VQ,
        *head,
        Rule(_DECODER + r"(?P<rest>embed_tokens\.weight)", "both", embed[1], embed[0]),
        Rule(_DECODER + r"text_stem\.(?P<rest>.*)", "text", "text parent"),
        Rule(_DECODER + r"image_stem\.(?P<rest>.*)", "image", "image parent"),
        Rule(layer + r"text_layer\.(?P<rest>.*)", "text", "text parent"),
        Rule(layer + r"image_layer\.(?P<rest>.*)", "image", "image parent"),
        Rule(cross + r"(cross_attn\.o_proj|mlp\.down_proj)\.weight", "new", ending, std=0.0 if preserving else std),
        Rule(cross + r".*norm\.weight", "new", "ones", std=None),
        Rule(cross + r".*\.weight", "new", f"normal, std {std}", std=std),
        Rule(
            _DECODER + r"output_projection\.weight",
            "new",
            "normal, std d^-0.5",
            std=config.text_config.hidden_size**-0.5,
        ),
    ]


def table(mode: str, init: str, config: JamConfig) -> list[Rule]:
    """The rows for a fusion; the first whose pattern matches a key rules it."""
    if mode == "uniform":
        return _uniform_table()
    if mode == "width":
        return _width_table(init)
    return _cross_table(init, config)


def widen(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a decoder of twice the hidden size, heads and FFN (JAM-Width); the head size stays."""
    values = config.to_dict()
    if config.model_type == "llama":
        values["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        values["num_key_value_heads"] = config.num_key_value_heads or config.num_attention_heads
    for name in DOUBLED_BY_WIDTH[config.model_type]:
        values[name] = 2 * values[name]
    return type(config).from_dict(values)
