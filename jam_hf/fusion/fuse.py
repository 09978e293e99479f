"""`fuse`: two parents and a VQ model in, one JAM checkpoint out.

It checks that the parents fit, builds the JAM's config, and lets the tables say where each tensor comes from.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..files import whole_folder
from ..model.configuration_jam import FUSION_MODES, SUPPORTED_FAMILIES, JamConfig, JamVQConfig
from ..model.image_processing_jam import JamImageProcessor
from ..model.modeling_jam import JamForCausalLM
from ..model.modeling_jam_families import family_of
from ..model.modeling_jam_vq import JamVQModel
from ..model.processing_jam import JamProcessor
from . import inits, tables
from .checkpoint import Parent, write_tensors
from .model_card import model_card


DEFAULT_INIT = {"uniform": "average", "width": "copy", "cross": "preserving"}

# What may differ between parents that are averaged or concatenated: names, ids, training-time settings.
_FREE_FIELDS = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dropout",
    "dtype",
    "eos_token_id",
    "id2label",
    "init_std",
    "initializer_range",
    "label2id",
    "layerdrop",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def fuse(
    text_model: str | os.PathLike | PreTrainedModel,
    image_model: str | os.PathLike | PreTrainedModel,
    mode: str,
    output_dir: str | os.PathLike,
    init: str | None = None,
    vq_model: str | os.PathLike | JamVQModel | None = None,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    image_token_offset: int | None = None,
    break_token: str = "<break>",
    image_token: str = "<image>",
    mask_token: str = "<mask>",
    mask_end_token: str = "</mask>",
    cross_attention_interval: int = 2,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    max_shard_size: str = "2GB",
    overwrite: bool = False,
) -> Path:
    """Fuse a text LLM and an autoregressive image model into a JAM checkpoint (paper, stage 1).

    Args:
        text_model, image_model: checkpoint folder, Hub id, or model in memory; causal LMs of one family (Llama, OPT) over
            one vocabulary that holds the image codes.
        mode: "uniform", "width" or "cross".
        output_dir: where the checkpoint appears, whole or not at all.
        init: uniform "average"; width "copy" (default), "average" [P], "block_diagonal" (ours); cross "preserving" (ours,
            default: text logits equal the text parent's and image logits the image parent's) or "paper".
        vq_model: [`JamVQModel`] or its folder: the image tokenizer that made the image parent's codes.
        tokenizer: tokenizer or its folder; the text parent's where `None`.
        image_token_offset: id of image code 0; by default found by the tokenizer's `<img:0>`, else the last K ids.
        break_token, image_token, mask_token, mask_end_token: the special tokens, by their text in the tokenizer.
        cross_attention_interval: cross blocks after layers 0, interval, 2*interval, ... [A]: 2.
        dtype: of the decoders; the parents' where `None`. The VQ model stays in float32.
        seed: for what is drawn at random (cross blocks, projections).
        max_shard_size: as in `save_pretrained`. overwrite: a non-empty `output_dir` is refused, unless `overwrite`, which
            replaces the whole folder once the new one is complete.
    Returns:
        the path of the checkpoint: config, generation config, safetensors, tokenizer and processor, the code that loads it
        elsewhere, and a model card.
    Raises:
        ValueError: if the parents do not fit; the message names both. FileExistsError: if `output_dir` is in use.
    """
    if mode not in FUSION_MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, FUSION_MODES))}, got {mode!r}.")
    init = DEFAULT_INIT[mode] if init is None else init
    if init not in tables.INITS[mode]:
        raise ValueError(f"init for mode {mode!r} must be one of {', '.join(map(repr, tables.INITS[mode]))}, got {init!r}.")
    if vq_model is None:
        raise ValueError("vq_model is missing: a JAM carries the image tokenizer that made its image parent's codes.")
    text, image = Parent(text_model, "text parent"), Parent(image_model, "image parent")
    check_parents(text, image, mode)
    for source in (text_model, image_model, vq_model, tokenizer):
        if isinstance(source, (str, os.PathLike)) and Path(source).exists():
            source, target = Path(source).resolve(), Path(output_dir).resolve()
            if source == target or target in source.parents:
                what = "is also an input" if source == target else f"holds the input '{source}'"
                raise ValueError(f"output_dir '{output_dir}' {what}; choose another folder.")
    vq = _vq_model(vq_model)
    tokenizer = _tokenizer(tokenizer, text)
    _check_vocabularies(tokenizer, image)
    ids = _token_ids(tokenizer, vq.config, text, image_token_offset, break_token, image_token, mask_token, mask_end_token)
    config = jam_config(text.config, image.config, vq.config, mode, init, cross_attention_interval, ids)
    config.dtype = _named_dtype(dtype) or _dtype(text, image)

    with whole_folder(output_dir, overwrite) as folder:
        write_weights(folder, config, text, image, vq, mode, init, seed, max_shard_size)
        config.architectures = ["JamForCausalLM"]
        config.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            generation_mode="interleaved",
        ).save_pretrained(folder)
        tokenizer.padding_side = "left"
        processor = JamProcessor(
            JamImageProcessor.from_size(config.vq_config.sample_size),
            tokenizer,
            image_seq_length=config.image_seq_length,
            image_token=image_token,
            break_token=break_token,
        )
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(config, init, text.hub_id, image.hub_id), encoding="utf-8")
    return Path(output_dir)


def _vq_model(source: Any) -> JamVQModel:
    if isinstance(source, JamVQModel):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"vq_model must be a JamVQModel or its folder, got {type(source).__name__}. A diffusers VQModel goes into "
            "the `.vq` of a JamVQModel made with its arguments."
        )
    folder = Path(source)
    if folder.exists() or str(source).count("/") > 1:
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(f"The VQ model '{source}' is no checkpoint: expected a folder with config.json and safetensors.")
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = found.get("model_type", found.get("_class_name"))
        if kind != JamVQConfig.model_type:
            raise ValueError(
                f"The VQ model '{source}' is a '{kind}'; expected the folder of a JamVQModel ('{JamVQConfig.model_type}'). "
                "Load a diffusers VQModel into the `.vq` of a JamVQModel made with its arguments, and save that."
            )
    return JamVQModel.from_pretrained(source)


def _tokenizer(tokenizer: Any, text: Parent) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return copy.deepcopy(tokenizer)
    source = tokenizer if tokenizer is not None else text.folder
    if source is None:
        raise ValueError("The text parent is a model in memory and brings no tokenizer; pass tokenizer=...")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"No tokenizer can be read from '{source}' ({reason}). Pass one: tokenizer=...") from error


def _check_vocabularies(tokenizer: PreTrainedTokenizerBase, image: Parent) -> None:
    """An id must mean the same in both parents. An image parent that brings no tokenizer is taken at its word."""
    if image.folder is None or not (image.folder / "tokenizer_config.json").is_file():
        return
    ours, theirs = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(image.folder).get_vocab()
    differing = sorted((token for token in ours if theirs.get(token) != ours[token]), key=ours.__getitem__)
    if differing:
        token = differing[0]
        raise ValueError(
            f"The JAM's tokenizer and that of the image parent {image.name} give {len(differing)} of {len(ours)} tokens other "
            f"ids, e.g. {token!r}: {ours[token]} and {theirs.get(token)}. Parents are fused row by row, so both need one "
            "vocabulary."
        )


def _named_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point) or (dtype and found is None):
        raise ValueError(f"dtype must be a float type such as 'bfloat16' or torch.bfloat16, got {dtype!r}.")
    return found


def _dtype(text: Parent, image: Parent) -> torch.dtype:
    found = {parent.config.dtype or torch.float32 for parent in (text, image)}
    if len(found) > 1:
        raise ValueError(
            f"The text parent {text.name} is stored in {text.config.dtype}, the image parent {image.name} in "
            f"{image.config.dtype}. Say which the JAM shall have: dtype=..."
        )
    return found.pop()


def check_parents(text: Parent, image: Parent, mode: str) -> None:
    """Raise a `ValueError` that names both parents and every difference that `mode` cannot take."""
    for parent in (text, image):
        if parent.config.model_type not in SUPPORTED_FAMILIES:
            raise ValueError(
                f"The {parent.role} {parent.name} is of the family '{parent.config.model_type}'; supported: "
                f"{', '.join(SUPPORTED_FAMILIES)}."
            )
    ours, theirs = text.config.to_dict(), image.config.to_dict()
    if ours["model_type"] != theirs["model_type"]:
        names = {"model_type"}  # all else follows from it
    elif mode == "cross":  # the streams keep their own shapes; depth and vocabulary are shared
        names = {"vocab_size", "num_hidden_layers", "model_type"}
    else:
        names = (set(ours) | set(theirs)) - _FREE_FIELDS
    differing = sorted(name for name in names if ours.get(name) != theirs.get(name))
    if differing:
        listing = "; ".join(f"{name}: {ours.get(name)} and {theirs.get(name)}" for name in differing)
        raise ValueError(
            f"The text parent {text.name} and the image parent {image.name} cannot be fused as '{mode}', they differ in "
            f"{listing} (text parent first)."
        )


def _token_ids(
    tokenizer: PreTrainedTokenizerBase,
    vq: JamVQConfig,
    text: Parent,
    image_token_offset: int | None,
    break_token: str,
    image_token: str,
    mask_token: str,
    mask_end_token: str,
) -> dict[str, Any]:
    vocabulary = tokenizer.get_vocab()
    missing = [t for t in (break_token, image_token, mask_token, mask_end_token) if t not in vocabulary]
    if missing:
        raise ValueError(
            f"The tokenizer has no {', '.join(map(repr, missing))}. Add them as special tokens before fusing (and give the "
            "parents' embeddings rows for them), or name the tokens that play their part: break_token=..., "
            "image_token=..., mask_token=..., mask_end_token=..."
        )
    mask, end = vocabulary[mask_token], vocabulary[mask_end_token]
    count = 1
    while mask_token.endswith(">") and vocabulary.get(f"{mask_token[:-1]}:{count}>") == mask + count:
        count += 1
    if image_token_offset is None:
        image_token_offset = vocabulary.get("<img:0>", text.config.vocab_size - vq.num_vq_embeddings)
    last = f"<img:{vq.num_vq_embeddings - 1}>"
    if "<img:0>" in vocabulary and vocabulary.get(last) != image_token_offset + vq.num_vq_embeddings - 1:
        raise ValueError(
            f"The tokenizer's image codes do not fit the VQ model: with {vq.num_vq_embeddings} codes from id "
            f"{image_token_offset}, {last} should be id {image_token_offset + vq.num_vq_embeddings - 1}, but it is "
            f"{vocabulary.get(last)}."
        )
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "break_token_id": vocabulary[break_token],
        "image_token_id": vocabulary[image_token],
        "mask_token_id": mask,
        "num_mask_tokens": count,
        "mask_end_token_id": end,
        "image_token_offset": image_token_offset,
    }


def jam_config(
    text: PreTrainedConfig,
    image: PreTrainedConfig,
    vq: JamVQConfig,
    mode: str,
    init: str,
    cross_attention_interval: int,
    ids: dict[str, Any],
) -> JamConfig:
    """The config of the JAM that `text` and `image` become."""
    text, image, vq = copy.deepcopy(text), copy.deepcopy(image), copy.deepcopy(vq)
    for config in (text, image, vq):
        config.name_or_path = ""  # where a parent lay on this machine is nobody else's business
        config.__dict__.pop("auto_map", None)  # the code is the JAM's
    tied = bool(text.tie_word_embeddings and image.tie_word_embeddings)
    if mode == "cross":
        preserving = init == "preserving"
        return JamConfig(
            fusion_mode="cross",
            text_config=text,
            image_config=image,
            vq_config=vq,
            cross_form=init,
            cross_attention_interval=cross_attention_interval,
            tie_word_embeddings=tied and not preserving,
            **ids,
        )
    decoder = tables.widen(text) if mode == "width" else text
    return JamConfig(fusion_mode=mode, text_config=decoder, vq_config=vq, tie_word_embeddings=tied, **ids)


def write_weights(
    folder: Path,
    config: JamConfig,
    text: Parent,
    image: Parent,
    vq: JamVQModel,
    mode: str,
    init: str,
    seed: int = 0,
    max_shard_size: str = "2GB",
) -> None:
    """Make every tensor that `config` asks for and write the shards.

    Raises:
        ValueError: if a parent lacks a tensor, or has one that the JAM has no place for.
    """
    with torch.device("meta"):
        skeleton = JamForCausalLM(config)
    skeleton.to(config.dtype or torch.float32)
    skeleton.model.vq_model.to(torch.float32)
    tied = set(skeleton.all_tied_weights_keys) if config.tie_word_embeddings else set()
    shapes = {key: tensor for key, tensor in skeleton.state_dict().items() if key not in tied}
    rules = tables.table(mode, init, config)
    vq_state = vq.state_dict()
    used: dict[str, set[str]] = {"text": set(), "image": set()}

    def take(parent: Parent, rest: str) -> torch.Tensor:
        for key in _parent_keys(parent, rest):
            if key in parent.keys():
                used[parent.role.split()[0]].add(key)
                return parent.get(key)
        raise ValueError(f"The {parent.role} {parent.name} has no tensor '{_parent_keys(parent, rest)[0]}'.")

    def make(key: str) -> torch.Tensor:
        dtype = shapes[key].dtype
        for rule in rules:
            rest = rule.match(key)
            if rest is None:
                continue
            if rule.sources == "vq":
                return vq_state[rest].cpu()
            if rule.sources == "new":
                if not rule.std:
                    return torch.full(shapes[key].shape, 1.0 if rule.std is None else 0.0, dtype=dtype)
                return inits.normal(shapes[key].shape, rule.std, key, seed, dtype)
            if rule.sources == "image_head":
                tensors = [take(image, "lm_head.weight")]
            else:
                wanted = {"text": [text], "image": [image], "both": [text, image]}[rule.sources]
                tensors = [take(parent, rest) for parent in wanted]
            for parent, tensor in zip((text, image), tensors):
                if not torch.isfinite(tensor.to(dtype)).all():
                    raise ValueError(f"Tensor '{rest}' of {parent.name} holds NaN or infinity as {dtype}.")
            made = rule.make(*tensors) if rule.make else tensors[0]
            return made.to(dtype)
        raise AssertionError(f"no rule for '{key}' in the table of mode '{mode}'")

    write_tensors(folder, shapes, make, max_shard_size)
    expected_unused = {"lm_head.weight"} if mode != "cross" or config.tie_word_embeddings else set()
    for parent in (text, image):
        left = parent.keys() - used[parent.role.split()[0]] - expected_unused
        if config.cross_form == "paper" and mode == "cross" and parent is image:
            # One embedding, one position table and one final norm: the paper takes the text parent's.
            left = {k for k in left if "layers." in k}
        left = {k for k in left if not k.endswith(("rotary_emb.inv_freq", "lm_head.weight"))}
        if left:
            raise ValueError(
                f"The {parent.role} {parent.name} has tensors that a '{mode}' JAM has no place for: "
                f"{', '.join(sorted(left)[:5])}{' ...' if len(left) > 5 else ''}."
            )


def _parent_keys(parent: Parent, rest: str) -> list[str]:
    """Where a tensor of the decoder may stand in the parent: under its causal LM, under its base model, or tied."""
    path = family_of(parent.config).decoder_path
    if rest == "lm_head.weight":
        keys = ["lm_head.weight"]
        return [*keys, *_parent_keys(parent, "embed_tokens.weight")] if parent.config.tie_word_embeddings else keys
    return [path + rest, path.removeprefix("model.") + rest]
