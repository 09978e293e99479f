"""The fact sheets of the decoder families: what a JAM and its tools know of one beside what every decoder has.

An explicit registry: families that scale their embeddings, cap their logits or have other kinds of layers would be
silently wrong in a JAM, so what is not listed is refused, and nothing is guessed from a config by duck typing. It holds
names and facts; no module is built here, and transformers' classes are imported when they are asked for.

A family is added by one entry in `FAMILIES` and its tests (docs/architecture.md, Families).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


# The parts of an attention by name -> what each is. "norm of heads": one norm that all heads share.
_QUERY_KEY_VALUE = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
_ATTENTION = _QUERY_KEY_VALUE | {"o_proj": "output"}
_NORMS_OF_HEADS = {"q_norm": "norm of heads", "k_norm": "norm of heads"}
# The linear layers of an FFN by name, from the layer -> how tensor parallelism splits them.
_GATED = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def stock_class(module: str, name: str, file: str | None = None) -> type:
    """A class of `transformers.models.{module}`, of its modeling file or another; imported when it is asked for."""
    return getattr(import_module(f"transformers.models.{module}.{file or f'modeling_{module}'}"), name)


@dataclass(frozen=True)
class Family:
    """What is known of one family of decoders; the defaults are Llama's.

    Args:
        model_type: of the decoder's config. prefix: of its classes, which are `{prefix}{role}`.
        module: in `transformers.models`; `model_type` where `None`.
        decoder: role of the whole decoder; `None` where transformers has none without a VQ model inside: such a family
            is one stream of a cross JAM, no decoder by itself, and no parent by its own causal LM.
        layer, swin_layer: role of a layer, and of one where the config says `swin_norm`.
        rotary, norm, feed_forward: roles of the rotary embedding, the norm and the FFN, of which cross blocks are made;
            norm `None`: `nn.LayerNorm`; feed_forward `None`: an FFN without a gate that transformers has only inside
            the layer.
        learned_positions: a learned table, added to the embedding (OPT), in place of rotary positions.
        windows: which layers have a sliding window: "none"; "all", where the config has a `sliding_window`;
            "layer_types", as the config says for each layer.
        attention: names in `self_attn` -> "query", "key", "value", "output" or "norm of heads".
        feed_forward_split: names of the FFN's linear layers, from the layer -> styles of tensor parallelism.
        counts_all_heads: the attention reshapes to all of its heads, whatever came, so heads cannot be shared out.
        keeps_documents_apart: the stock decoder keeps packed documents apart by their `position_ids`.
        text_parent: whether its causal LM can be fused as it is, as text or as image parent.
        computes_like: the family whose layers compute the same from the same weights; `model_type` where `None`.
        added_by_width: the sizes of its config that JAM-Width adds up [P] (hidden size, FFN) [A] (heads).
        other_linear: linear layers beside attention and FFN.
    """

    model_type: str
    prefix: str
    module: str | None = None
    decoder: str | None = "Model"
    layer: str = "DecoderLayer"
    swin_layer: str | None = None
    rotary: str = "RotaryEmbedding"
    norm: str | None = "RMSNorm"
    feed_forward: str | None = "MLP"
    learned_positions: bool = False
    windows: str = "none"
    attention: Mapping[str, str] = field(default_factory=lambda: _ATTENTION)
    feed_forward_split: Mapping[str, str] = field(default_factory=lambda: _GATED)
    counts_all_heads: bool = False
    keeps_documents_apart: bool = True
    text_parent: bool = True
    computes_like: str | None = None
    added_by_width: tuple[str, ...] = _SIZES
    other_linear: tuple[str, ...] = ()

    def class_of(self, role: str) -> type:
        """The class of transformers: `class_of("DecoderLayer")` of Llama is `LlamaDecoderLayer`."""
        return stock_class(self.module or self.model_type, self.prefix + role)

    @property
    def linear_layers(self) -> set[str]:
        """Last parts of the names of all linear layers of a decoder."""
        projections = {name for name, what in self.attention.items() if not what.startswith("norm")}
        return {name.rpartition(".")[2] for name in (*projections, *self.feed_forward_split, *self.other_linear)}


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral", windows="all", computes_like="llama"),
        Family("qwen2", "Qwen2", windows="layer_types"),
        Family("qwen3", "Qwen3", windows="layer_types", attention=_ATTENTION | _NORMS_OF_HEADS),
        Family(
            "opt",
            "OPT",
            decoder="Decoder",
            norm=None,
            feed_forward=None,
            learned_positions=True,
            attention=_QUERY_KEY_VALUE | {"out_proj": "output"},
            feed_forward_split={"fc1": "colwise", "fc2": "rowwise"},
            counts_all_heads=True,
            keeps_documents_apart=False,  # it masks without position_ids
            added_by_width=("hidden_size", "ffn_dim", "num_attention_heads", "word_embed_proj_dim"),
            other_linear=("project_in", "project_out"),
        ),
        # ChameleonModel has the decoder's modules, and a VQ model of its own among them. The norms of its attention
        # have weights for each head, and are whole as all heads are.
        Family(
            "chameleon",
            "Chameleon",
            decoder=None,
            swin_layer="SwinDecoderLayer",
            counts_all_heads=True,
            text_parent=False,
        ),
        Family("emu3_text_model", "Emu3", module="emu3", decoder="TextModel", text_parent=False, computes_like="llama"),
    )
}


def family_of(config: Any) -> Family:
    """The family of a decoder's config. Raises `ValueError` for one that is not registered."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"JAM does not support decoders of the family '{config.model_type}'; supported: {', '.join(FAMILIES)}."
        )
    return FAMILIES[config.model_type]


def attention_type(config: Any, depth: int) -> str:
    """ "sliding_attention" or "full_attention": what the stock decoder of this config does in its layer `depth`."""
    family = FAMILIES.get(config.model_type)  # transformers asks before the JAM's config has refused what is not listed
    windows = "none" if family is None else family.windows
    if windows == "layer_types":
        return config.layer_types[depth]
    return "sliding_attention" if windows == "all" and config.sliding_window is not None else "full_attention"


def head_dim_of(config: Any) -> int:
    """Size of one head of a decoder's attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_value_heads_of(config: Any) -> int:
    """Heads of keys and values of a decoder's attention."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def embedding_size_of(config: Any) -> int:
    """Columns of a decoder's embedding, which OPT may project to its hidden size."""
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


__all__ = [
    "FAMILIES",
    "Family",
    "attention_type",
    "embedding_size_of",
    "family_of",
    "head_dim_of",
    "key_value_heads_of",
    "stock_class",
]
