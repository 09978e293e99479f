"""Which parents fit together in which mode, and the config of the JAM that they become. It knows configs only."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..model.configuration_jam import JamConfig
from ..model.configuration_jam_vq import JamVQConfig
from ..model.families_jam import embedding_size_of, family_of, head_dim_of, key_value_heads_of
from .parents import Decoder


# Every field of a decoder's config is one of three. DECIDED: the JAM's own (ids, rows), or settled elsewhere with both
# parents in view. IDLE: it changes no weights' arithmetic (training, outputs, the file). All others, also those that a
# later transformers may add, are compared.
DECIDED = frozenset(
    {
        "vocab_size",  # vocabulary.py
        "vocabulary_map",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",  # generation_defaults.py
        "tie_word_embeddings",  # parents.Decoder.tied
        # the smaller; compared where positions are learned, or rotations are reckoned from it
        "max_position_embeddings",
        "vq_config",  # vq_source.py
    }
)
IDLE = frozenset(
    {
        "architectures",
        "attention_dropout",
        "chunk_size_feed_forward",
        "dropout",
        "dtype",
        "id2label",
        "init_std",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "layerdrop",
        "max_window_layers",  # layer_types says what comes of it
        "output_hidden_states",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "transformers_version",
        "use_cache",
        "use_sliding_window",  # sliding_window is None without it
    }
)
# What a family computes that has no such field; some (Emu3's) read it all the same.
_WITHOUT_FIELD: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "sliding_window": None, "layer_types": []}
# Rotations that do not depend on how far the model was meant to read.
_ROTATIONS_OF_ANY_LENGTH = ("default", "linear", "llama3")


def shape_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """All that must agree for one decoder to stand for both parents: every field of the config but `DECIDED` and
    `IDLE`.
    """
    family = family_of(config)
    found = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    found = {name: value for name, value in found.items() if name not in DECIDED | IDLE}
    found["family"] = family.computes_like or family.model_type
    if family.learned_positions:
        return {**found, "max_position_embeddings": config.max_position_embeddings}
    found = {name: getattr(config, name, value) for name, value in _WITHOUT_FIELD.items()} | found
    found["num_key_value_heads"] = key_value_heads_of(config)
    found["head_dim"] = head_dim_of(config)
    for name in ("attention_bias", "mlp_bias"):
        found[name] = bool(found[name])
    found["layer_types"] = list(found["layer_types"] or []) if found["sliding_window"] else []
    rope = config.rope_parameters
    stated = rope["rope_type"] in ("yarn", "longrope") and rope.get("factor") is not None
    if rope["rope_type"] not in _ROTATIONS_OF_ANY_LENGTH and not stated:
        found["max_position_embeddings"] = config.max_position_embeddings
    return found


def check_parents(text: Decoder, image: Decoder, mode: str, init: str) -> None:
    """Raise a `ValueError` that names both parents and every difference that `mode` cannot take."""
    if mode == "cross":
        if init == "paper":
            _check_one_embedding(text, image)
        return
    if family_of(image.config).decoder is None:
        raise ValueError(
            f"The image parent {image.parent.name} is a {image.multimodal.prefix}, whose layers no text parent has: it "
            f"fuses as 'cross' only, not as '{mode}'."
        )
    ours, theirs = shape_fields(text.config), shape_fields(image.config)
    free: set[str] = set()
    hint = "Fuse them as 'cross', which takes any sizes and depths."
    if mode == "width":
        hint = "Width needs equal depth and head size, and for unequal sizes init='block_diagonal'; 'cross' takes any."
        if init == "block_diagonal" and ours["family"] == theirs["family"]:
            free = set(family_of(text.config).added_by_width)
            for config, fields in ((text.config, ours), (image.config, theirs)):
                fields["head_dim"] = head_dim_of(config)
                fields["heads per key/value head"] = config.num_attention_heads / key_value_heads_of(config)
                fields["projected embeddings"] = embedding_size_of(config) != config.hidden_size
    names = {"family"} if ours["family"] != theirs["family"] else (set(ours) | set(theirs)) - free
    differing = sorted(name for name in names if ours.get(name) != theirs.get(name))
    if differing:
        listing = "; ".join(f"{name}: {ours.get(name)} and {theirs.get(name)}" for name in differing)
        raise ValueError(
            f"The text parent {text.parent.name} and the image parent {image.parent.name} cannot be fused as '{mode}', "
            f"they differ in {listing} (text parent first). {hint}"
        )


def _check_one_embedding(text: Decoder, image: Decoder) -> None:
    """The paper's cross form feeds both streams from one embedding and one kind of positions."""
    ours, theirs = (
        {
            "hidden_size": d.config.hidden_size,
            "size of an embedding": embedding_size_of(d.config),
            "positions": "learned" if family_of(d.config).learned_positions else "rotary",
        }
        for d in (text, image)
    )
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        listing = "; ".join(f"{name}: {ours[name]} and {theirs[name]}" for name in differing)
        raise ValueError(
            f"The text parent {text.parent.name} and the image parent {image.parent.name} cannot be fused as 'cross' "
            f"with init='paper', which feeds both from one embedding with its positions; they differ in {listing} "
            "(text parent first). init='preserving' takes any."
        )


def jam_config(
    text: Decoder, image: Decoder, vq: JamVQConfig, mode: str, init: str, interval: int, settings: dict[str, Any]
) -> JamConfig:
    """The config of the JAM that the parents become. `settings`: ids, vocabulary and head, as [`JamConfig`] takes
    them.
    """
    size = settings.pop("vocab_size")
    text_config, image_config = _own(text.config, size, settings), _own(image.config, size, settings)
    tied = text.tied and image.tied
    vq = copy.deepcopy(vq)
    _forget_origin(vq)
    if mode == "cross":
        return JamConfig(
            fusion_mode="cross",
            text_config=text_config,
            image_config=image_config,
            vq_config=vq,
            cross_form=init,
            cross_attention_interval=interval,
            tie_word_embeddings=tied and init == "paper",
            **settings,
        )
    if mode == "width":
        try:
            text_config = _widened(text_config, image_config)
        except StrictDataclassError as error:  # a sum that the stock config does not take
            raise ValueError(
                f"The text parent {text.parent.name} and the image parent {image.parent.name} cannot be fused as "
                f"'width', the decoder of both sizes together is none of the family '{text_config.model_type}': {error}"
            ) from error
    elif not family_of(text_config).learned_positions:
        text_config.max_position_embeddings = min(
            text_config.max_position_embeddings, image_config.max_position_embeddings
        )
    return JamConfig(fusion_mode=mode, text_config=text_config, vq_config=vq, tie_word_embeddings=tied, **settings)


def _own(config: PreTrainedConfig, vocab_size: int, ids: dict[str, Any]) -> PreTrainedConfig:
    """A copy over the JAM's vocabulary and ids, without what it says of other parts of the parent."""
    config = copy.deepcopy(config)
    _forget_origin(config)
    config.vocab_size = vocab_size
    if getattr(config, "vocabulary_map", None) is not None:
        config.vocabulary_map = None
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if ids[name] is not None:
            setattr(config, name, ids[name])
    return config


def _forget_origin(config: PreTrainedConfig) -> None:
    config.name_or_path = ""  # where a parent lay on this machine is nobody else's business
    config.__dict__.pop("auto_map", None)  # the code is the JAM's


def _widened(text: PreTrainedConfig, image: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a decoder of both hidden sizes, heads and FFNs together (JAM-Width); the head size stays."""
    family = family_of(text)
    if not family.learned_positions:
        for config in (text, image):
            config.head_dim, config.num_key_value_heads = head_dim_of(config), key_value_heads_of(config)
        text.max_position_embeddings = min(text.max_position_embeddings, image.max_position_embeddings)
    for name in family.added_by_width:
        setattr(text, name, getattr(text, name) + getattr(image, name))
    return type(text).from_dict(text.to_dict())
