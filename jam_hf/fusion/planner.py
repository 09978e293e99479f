"""`plan_fusion`: configs, headers and tokenizers of the parents in, a [`FusionPlan`] out: how every tensor will be
made.

It writes nothing. The steps stand in `plan_fusion` in their order; what each knows is in the file of its name.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from ..checkpoints.from_config import specs_of, stand_in_tokenizer
from ..checkpoints.parent import Parent
from ..checkpoints.plan import plan_shards
from ..checkpoints.tensor_files import BLOCK_BYTES, TensorSpec, named_dtype
from ..conversion.image_processing import image_processing_of
from ..model.configuration_jam import FUSION_MODES, JamConfig
from ..model.modeling_jam import JamForCausalLM
from ..model.modeling_jam_vq import JamVQModel
from ..reading import has_tokenizer
from . import chat_templates, tables
from .generation_defaults import one_or_list, said_stop_ids, stop_ids, text_sampling
from .parent_tokenizers import asks_otherwise, check_added_ids, check_saved, limit_length, read_parent_tokenizer
from .parents import Decoder, image_codes, image_parents, picture_layout, text_parents
from .plan import FusionPlan, preserved
from .recipe import FusionRecipe
from .shapes import check_parents, jam_config
from .vocabulary import (
    NONE,
    TokenNames,
    Vocabulary,
    differing_tokens,
    joined_vocabulary,
    shared_vocabulary,
)
from .vq_source import vq_model_of


DEFAULT_INIT = {"uniform": "average", "width": "copy", "cross": "preserving"}


def plan_fusion(
    text_model: str | os.PathLike | PreTrainedModel,
    image_model: str | os.PathLike | PreTrainedModel,
    mode: str,
    init: str | None = None,
    vq_model: str | os.PathLike | JamVQModel | None = None,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    image_tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype | None = None,
    headers_only: bool = False,
    **settings: Any,
) -> FusionPlan:
    """Everything about a fusion but the writing; arguments, errors: see [`fuse`].

    Args:
        headers_only: fetch no weights of parents on the Hub, only the headers of their files; a folder without weights
            is planned by its config.json. The plan can be described and explained, not run.
    """
    wanted = named_dtype(dtype)
    names = {
        "text": text_model,
        "image": image_model,
        "vq": vq_model,
        "tokenizer": tokenizer,
        "image_tokenizer": image_tokenizer,
    }
    recipe = FusionRecipe.of(
        {
            **{key: _written(value) for key, value in names.items()},
            "mode": mode,
            "init": init,
            "dtype": str(wanted).removeprefix("torch.") if wanted else None,
            **settings,
        },
        "fuse",
    )
    if mode not in FUSION_MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, FUSION_MODES))}, got {mode!r}.")
    recipe.init = init = DEFAULT_INIT[mode] if init is None else init
    if init not in tables.INITS[mode]:
        raise ValueError(
            f"init for mode {mode!r} must be one of {', '.join(map(repr, tables.INITS[mode]))}, got {init!r}."
        )
    try:
        plan_shards({}, recipe.max_shard_size)
    except ValueError as error:
        raise ValueError(f"max_shard_size must be a size such as '2GB', got {recipe.max_shard_size!r}.") from error
    warnings: list[str] = []
    text = Decoder(Parent(text_model, "text parent", recipe.text_revision, headers_only), text_parents())
    image = Decoder(Parent(image_model, "image parent", recipe.image_revision, headers_only), image_parents())
    check_parents(text, image, mode, init)
    vq, vq_warnings = vq_model_of(vq_model, image, recipe.image_size, config_only=headers_only)
    warnings += vq_warnings
    processing, processing_warnings = image_processing_of(
        image.parent, None if vq_model is None else vq.config, vq.config.sample_size
    )
    warnings += processing_warnings
    shared = image.multimodal is None and text.vocab_size == image.vocab_size
    if tokenizer is None and _lacks_tokenizer(text.parent):
        marks: Sequence[str] = (
            (recipe.break_token, recipe.image_token, recipe.mask_token, recipe.mask_end_token) if shared else ()
        )
        tokenizer = stand_in_tokenizer(text.parent.config, text.vocab_size, marks)
        warnings.append(_STAND_IN.format("text parent"))
    if image_tokenizer is None and _lacks_tokenizer(image.parent) and not shared:
        sheet = image.multimodal  # without a vocabulary_map, the config names no token
        marks = [usual for _, usual in sheet.marks.values()] if sheet is not None and sheet.own_code_modules else ()
        image_tokenizer = stand_in_tokenizer(image.parent.config, image.vocab_size, marks)
        warnings.append(_STAND_IN.format("image parent"))
    tokenizer = _tokenizer(tokenizer, text.parent, recipe.tokenizer_reading)
    image_tokenizer = _image_tokenizer(image_tokenizer, image.parent, recipe.tokenizer_reading)
    check_added_ids(tokenizer, "text parent")
    if image_tokenizer is not None:
        check_added_ids(image_tokenizer, "image parent")
    warnings += asks_otherwise(tokenizer, "text parent", "tokenizer")
    warnings += asks_otherwise(image_tokenizer, "image parent", "image_tokenizer")
    parents_tokenizer = copy.deepcopy(tokenizer)
    codes = image_codes(image, vq.config.num_vq_embeddings, recipe.image_token_offset, image_tokenizer or tokenizer)
    vocabulary = _vocabulary(tokenizer, image_tokenizer, text, image, codes.rows, vq, recipe)
    ends, end_warnings = stop_ids(text.parent, text.vocab_size, tokenizer, vocabulary.added)
    vocabulary.ids["eos_token_id"] = one_or_list(ends)
    sampling, sampling_warnings = text_sampling(text.parent, image.parent)
    warnings += [*end_warnings, *sampling_warnings]
    shown = f"{codes.said_by}, rows {int(codes.rows.min())}..{int(codes.rows.max())} of its vocabulary"
    vocabulary = replace(vocabulary, code_name=vocabulary.code_name or codes.form, codes_from=shown)
    config = jam_config(
        text,
        image,
        vq.config,
        mode,
        init,
        recipe.cross_attention_interval,
        {"vocab_size": vocabulary.size, **vocabulary.ids, **codes.head_config},
    )
    config.vq_config.image_processing = processing
    config.dtype = wanted or _dtype(text, image)
    config.architectures = ["JamForCausalLM"]
    limit_length(vocabulary.tokenizer, config.max_position_embeddings)
    check_saved(vocabulary.tokenizer, parents_tokenizer, vocabulary.added)
    vq_state = {key: tensor if tensor.is_meta else tensor.cpu() for key, tensor in vq.state_dict().items()}
    parts = tables.Ingredients(
        config, text, image, codes, vocabulary.text_map, vocabulary.image_map, vq_state, recipe.seed
    )
    tensors = tables.plan_tensors(_specs(config), tables.table(mode, init, config), parts)
    tables.check_all_used(parts, mode)
    warnings += _warnings(text, image, config, vocabulary, mode, init)
    vocabulary.tokenizer.chat_template, template_warnings = chat_templates.fitted(
        vocabulary.tokenizer, recipe.image_token
    )
    warnings += template_warnings
    plan = FusionPlan(recipe, config, vocabulary, text, image, tensors, warnings, None, None, sampling)
    if text.parent.headers_only or image.parent.headers_only or any(tensor.is_meta for tensor in vq_state.values()):
        return plan
    contents = (
        text.parent.content_id(),
        image.parent.content_id(),
        _digest(vq_state),
        _tokenizer_digest(tokenizer),
        _tokenizer_digest(image_tokenizer) if image_tokenizer is not None else None,
        f"{ends} {sorted(sampling.items())} {sorted((processing or {}).items())}",
    )
    digest = recipe.digest(*contents)
    identities = text.parent.identity(), image.parent.identity()
    fingerprint = None
    if None not in identities:
        # What a shard was made by counts too: one of another torch's random numbers must not stand beside ours.
        made_by = f"{torch.__version__} {transformers_version} {BLOCK_BYTES}"
        fingerprint = hashlib.sha256(f"{digest} {identities} {recipe.max_shard_size} {made_by}".encode()).hexdigest()
    return replace(plan, digest=digest, fingerprint=fingerprint)


def plan_recipe(recipe: FusionRecipe, headers_only: bool = False) -> FusionPlan:
    """`plan_fusion` with the settings of a recipe."""
    settings = {key: value for key, value in vars(recipe).items() if key not in ("text", "image", "mode", "vq")}
    return plan_fusion(
        recipe.text, recipe.image, recipe.mode, vq_model=recipe.vq, headers_only=headers_only, **settings
    )


def _warnings(
    text: Decoder, image: Decoder, config: JamConfig, vocabulary: Vocabulary, mode: str, init: str
) -> list[str]:
    """What may surprise a user."""
    found = []
    if (mode, init) != ("cross", "preserving"):
        found.append(preserved(mode, init))
    if (text.tied or image.tied) and not config.tie_word_embeddings:
        tied = " and ".join(d.parent.role for d in (text, image) if d.tied)
        found.append(f"The {tied} ties its output projection to its embedding; in the JAM they are two tensors.")
    if vocabulary.added:
        shown = ", ".join(vocabulary.added[:4]) + (" ..." if len(vocabulary.added) > 4 else "")
        found.append(
            f"The tokenizer got {len(vocabulary.added)} special tokens ({shown}). What neither parent knows starts as "
            "the mean of all rows, or as a row of the text parent's padding, and must be trained."
        )
    if vocabulary.coverage is not None:
        missing = vocabulary.coverage.counts[NONE]
        if missing > 0.02 * vocabulary.coverage.total:
            share = 100 * missing / vocabulary.coverage.total
            found.append(
                f"{share:.1f} % of the text tokens have no counterpart in the image parent's vocabulary: its stream "
                "reads the mean row for them."
            )
    licences = {d.parent.role: d.parent.license for d in (text, image) if d.parent.license}
    if len(set(licences.values())) > 1:
        listing = ", ".join(f"{role}: {name}" for role, name in licences.items())
        found.append(f"The parents' licences differ ({listing}); the JAM is bound by both.")
    limits = {d.parent.role: d.config.max_position_embeddings for d in (text, image)}
    if len(set(limits.values())) > 1:
        listing = ", ".join(f"{role}: {limit}" for role, limit in limits.items())
        found.append(
            f"The parents read contexts of different lengths ({listing} positions); the JAM reads the shorter."
        )
    return found


def _specs(config: JamConfig) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor of a JAM."""
    with torch.device("meta"):
        skeleton = JamForCausalLM(config)
    skeleton.to(config.dtype or torch.float32)
    skeleton.model.vq_model.to(torch.float32)
    return specs_of(skeleton)


def _vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    image_tokenizer: PreTrainedTokenizerBase | None,
    text: Decoder,
    image: Decoder,
    codes: torch.LongTensor,
    vq: JamVQModel,
    recipe: FusionRecipe,
) -> Vocabulary:
    names = TokenNames(recipe.break_token, recipe.image_token, recipe.mask_token, recipe.mask_end_token)
    plain = image.multimodal is None
    same_size = text.vocab_size == image.vocab_size
    if plain and same_size and (image_tokenizer is None or not differing_tokens(tokenizer, image_tokenizer)):
        if recipe.special_tokens:
            raise ValueError(
                "special_tokens is for parents with different tokenizers; these have one vocabulary. Leave it out."
            )
        return shared_vocabulary(tokenizer, text.vocab_size, codes, names)
    if image_tokenizer is None:
        raise ValueError(
            f"The text parent {text.parent.name} and the image parent {image.parent.name} have no common vocabulary "
            f"(vocab_size: {text.vocab_size} and {image.vocab_size}), and the image parent brings no tokenizer to say "
            "what its rows mean. Pass image_tokenizer=..."
        )
    pictures = picture_layout(image.parent.config, image_tokenizer, codes, vq.config.grid_size, image.parent.name)
    return joined_vocabulary(
        tokenizer,
        text.vocab_size,
        image_tokenizer,
        codes,
        pictures,
        names,
        recipe.special_tokens,
        said_stop_ids(text.parent),
    )


def _written(source: Any) -> str | None:
    if source is None or isinstance(source, (str, os.PathLike)):
        return str(source) if source is not None else None
    return f"{type(source).__name__} in memory"


_STAND_IN = (
    "The {} has no tokenizer files here: the size of the vocabulary is an estimate (unless the parents share one, no "
    "mark of the JAM is taken to be in it), and coverage means nothing."
)


def _lacks_tokenizer(parent: Parent) -> bool:
    return parent.from_config and not has_tokenizer(parent.folder)


def _tokenizer(tokenizer: Any, text: Parent, reading: str) -> PreTrainedTokenizerBase:
    source = tokenizer if tokenizer is not None else text.folder
    if source is None:
        raise ValueError("The text parent is a model in memory and brings no tokenizer; pass tokenizer=...")
    return read_parent_tokenizer(source, "tokenizer", reading)


def _image_tokenizer(tokenizer: Any, image: Parent, reading: str) -> PreTrainedTokenizerBase | None:
    """The image parent's; None where it brings none."""
    if tokenizer is None:
        if image.folder is None or not has_tokenizer(image.folder):
            return None
        tokenizer = image.folder
    return read_parent_tokenizer(tokenizer, "image_tokenizer", reading)


def _dtype(text: Decoder, image: Decoder) -> torch.dtype:
    found = [decoder.parent.require(decoder.embedding_key).dtype for decoder in (text, image)]
    if found[0] != found[1]:
        raise ValueError(
            f"The text parent {text.parent.name} is stored in {found[0]}, the image parent {image.parent.name} in "
            f"{found[1]}. Say which the JAM shall have: dtype=..."
        )
    return found[0]


def _digest(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    roles = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return hashlib.sha256(f"{text} {roles} {tokenizer.chat_template}".encode()).hexdigest()
