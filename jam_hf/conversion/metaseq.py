"""metaseq's OPT and CM3leon checkpoints (`.pt`) to an `OPTForCausalLM` folder of transformers, for whoever holds them.

It knows metaseq's files and keys, and how a tensor is cut over model-parallel parts; it fuses nothing. Read in
facebookresearch/metaseq: `distributed/stitch_fsdp_ckpt.py` (joining parts),
`model_parallel/modules/multihead_attention.py` (the rows of `qkv_proj` are keys, values, queries, despite its name),
`modules/positional_embedding.py` (positions begin at row 2).
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

from ..checkpoints.from_config import specs_of
from ..checkpoints.plan import Band, TensorPlan
from ..checkpoints.tensor_files import TensorSpec, named_dtype
from ..checkpoints.writer import write_plans
from ..files import check_apart, whole_folder


ROWS, COLUMNS, SAME = "rows", "columns", "same"  # how parts join: on dim 0, on dim 1, or each part has all of it

_LAYER = r"model\.decoder\.layers\.(\d+)\."
# OPT key, metaseq key, how its parts join; the first pattern that matches rules.
_TABLE = (
    (r"model\.decoder\.embed_tokens\.weight", r"decoder.embed_tokens.weight", ROWS),
    (r"model\.decoder\.embed_positions\.weight", r"decoder.embed_positions.weight", SAME),
    (r"model\.decoder\.project_(in|out)\.weight", r"decoder.project_\1_dim.weight", SAME),
    (r"model\.decoder\.final_layer_norm\.(weight|bias)", r"decoder.layer_norm.\1", SAME),
    (r"lm_head\.weight", r"decoder.output_projection.weight", ROWS),
    (_LAYER + r"(self_attn_layer_norm|final_layer_norm)\.(weight|bias)", r"decoder.layers.\1.\2.\3", SAME),
    (_LAYER + r"(self_attn\.[kvq]_proj|fc1)\.(weight|bias)", r"decoder.layers.\1.\2.\3", ROWS),
    (_LAYER + r"(self_attn\.out_proj|fc2)\.weight", r"decoder.layers.\1.\2.weight", COLUMNS),
    (_LAYER + r"(self_attn\.out_proj|fc2)\.bias", r"decoder.layers.\1.\2.bias", SAME),
)
_THIRDS = {"k_proj": 0, "v_proj": 1, "q_proj": 2}  # of the rows of each part's qkv_proj
_PART = re.compile(r"(?P<prefix>.*)-model_part-(?P<part>\d+)\.pt")
_EMBED, _OUTPUT, _VERSION = "decoder.embed_tokens.weight", "decoder.output_projection.weight", "decoder.version"


@dataclass(frozen=True)
class _Cut:
    """Where a tensor of OPT comes from: a key of metaseq, how its parts join, and which third of its rows."""

    key: str
    join: str
    third: int | None = None


class MetaseqCheckpoint:
    """The parts of one metaseq checkpoint, mapped from their files: a tensor is read when it is asked for.

    Args:
        files: its parts, in order.
    Raises:
        ValueError: if a file cannot be read as tensors and plain values, is an FSDP shard, or parts have different
            keys.
    """

    def __init__(self, files: list[Path]):
        self.files = files
        self.parts: list[dict[str, torch.Tensor]] = []
        self.settings: dict[str, Any] = {}
        for file in files:
            content = _load(file)
            model = content.get("model") if isinstance(content, dict) else None
            if not isinstance(model, dict) or not all(torch.is_tensor(tensor) for tensor in model.values()):
                raise ValueError(f"{file} is no metaseq checkpoint: expected a dictionary with tensors under 'model'.")
            if any("flat_param" in key for key in model):
                raise ValueError(_fsdp_advice([file]))
            self.parts.append(model)
            self.settings = self.settings or _settings(content)
        for file, part in zip(files[1:], self.parts[1:]):
            differing = sorted(part.keys() ^ self.parts[0].keys())
            if differing:
                raise ValueError(
                    f"{files[0]} and {file} are not parts of one model: only one of them has '{differing[0]}'."
                )

    def keys(self) -> set[str]:
        return set(self.parts[0])

    def shape(self, source: _Cut) -> list[int]:
        """The shape of the joined tensor. Raises `ValueError` if the parts cannot be joined."""
        shapes = [list(part[source.key].shape) for part in self.parts]
        if any(shape != shapes[0] for shape in shapes) or (source.join == COLUMNS and len(shapes[0]) != 2):
            raise ValueError(f"The parts of '{source.key}' cannot be joined: their shapes are {shapes}.")
        shape = shapes[0]
        if source.third is not None:
            if shape[0] % 3:
                raise ValueError(
                    f"'{source.key}' of {self.files[0]} should have keys, values and queries, but is {shape}."
                )
            shape = [shape[0] // 3, *shape[1:]]
        if source.join != SAME:
            shape["rows columns".split().index(source.join)] *= len(self.parts)
        return shape

    def read(self, source: _Cut, first: int, last: int) -> torch.Tensor:
        """Rows `[first, last)` of the joined tensor.

        Raises:
            ValueError: if what each part has whole is not the same in all.
        """
        tensors = [part[source.key] for part in self.parts]
        if source.third is not None:
            tensors = [tensor.chunk(3)[source.third] for tensor in tensors]
        if source.join == COLUMNS:
            return torch.cat([tensor[first:last] for tensor in tensors], dim=1)
        if source.join == ROWS:
            size = tensors[0].shape[0]
            starts = range(0, size * len(tensors), size)
            return torch.cat([tensor[max(0, first - at) : max(0, last - at)] for tensor, at in zip(tensors, starts)])
        rows = tensors[0][first:last]
        for file, tensor in zip(self.files[1:], tensors[1:]):
            if not torch.equal(tensor[first:last], rows):
                difference = (tensor[first:last].double() - rows.double()).abs().max().item()
                raise ValueError(
                    f"'{source.key}' should be the same in all parts, but differs by up to {difference:.3g} between "
                    f"{self.files[0]} and {file}. Are they parts of one checkpoint, of one step?"
                )
        return rows


class _JoinedRows:
    """A joined tensor, row by row, as `write_plans` reads it."""

    def __init__(self, checkpoint: MetaseqCheckpoint, source: _Cut):
        self.checkpoint, self.source = checkpoint, source

    def read(self, first: int, last: int) -> torch.Tensor:
        return self.checkpoint.read(self.source, first, last)

    def release(self) -> None:
        pass


def convert_metaseq(
    source: str | os.PathLike | Iterable[str | os.PathLike],
    output_dir: str | os.PathLike,
    num_attention_heads: int | None = None,
    activation_function: str | None = None,
    post_norm: bool = False,
    vocab_size: int | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str = "2GB",
    overwrite: bool = False,
) -> Path:
    """Convert a metaseq checkpoint of an OPT-like decoder (OPT, CM3leon) to an `OPTForCausalLM` folder.

    Shapes, biases, LayerNorm parameters and tying follow from the tensors. The files are read with `weights_only=True`.

    Args:
        source: folder, file or files: one consolidated `.pt`, or all of `...-model_part-0.pt`, `...-model_part-1.pt`,
            ...
        output_dir: where the checkpoint appears, whole or not at all: config, generation config, safetensors. No
            tokenizer.
        num_attention_heads, activation_function: where the files do not say (`cfg`); OPT: "relu".
        post_norm: LayerNorm behind attention and FFN and none at the end, as in OPT-350m. CM3leon and other OPTs:
            False.
        vocab_size: rows of the embedding to keep; by default all, those included with which metaseq pads a vocabulary.
        dtype: of the output; that of the files where `None`.
        max_shard_size: as in `save_pretrained`. overwrite: replace a non-empty `output_dir` once the new one is
            complete.
    Returns:
        the path of the checkpoint.
    Raises:
        ValueError: if files, keys, shapes or settings do not fit; the message names them. FileExistsError: if
            `output_dir` is in use.
    """
    files = find_files(source)
    check_apart(output_dir, *files)
    checkpoint = MetaseqCheckpoint(files)
    config = _config(checkpoint, num_attention_heads, activation_function, post_norm, vocab_size, dtype)
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    specs = specs_of(model.to(config.dtype))
    sources = _sources(checkpoint, specs, post_norm)

    plans = {}
    for key, spec in specs.items():
        rows = _JoinedRows(checkpoint, sources[key])
        plans[key] = TensorPlan(spec, (Band(spec.rows, (rows,), lambda made: made),), f"metaseq's '{sources[key].key}'")
    with whole_folder(output_dir, overwrite) as folder:
        write_plans(folder, plans, max_shard_size)
        config.architectures = ["OPTForCausalLM"]
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    return Path(output_dir)


# ----- files ----------------------------------------------------------------------------------------------------------


def find_files(source: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """The files of one checkpoint, its parts in order.

    Raises:
        ValueError: if there are none, several checkpoints, missing parts, or FSDP shards.
    """
    given = [Path(source)] if isinstance(source, (str, os.PathLike)) else [Path(path) for path in source]
    files: list[Path] = []
    for path in given:
        if not path.exists():
            raise ValueError(
                f"There is no '{path}'. Expected a folder of metaseq's .pt files, or the files of one checkpoint."
            )
        found = sorted(path.glob("*.pt")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"The folder '{path}' has no .pt files.")
        files += found
    if not files:
        raise ValueError(
            "No source is given. Expected a folder of metaseq's .pt files, or the files of one checkpoint."
        )
    shards = [file for file in files if re.search(r"-shard\d+\.pt$", file.name)]
    if shards:
        raise ValueError(_fsdp_advice(shards))
    if len(files) == 1:
        return files
    parts = {file: _PART.fullmatch(file.name) for file in files}
    prefixes = {(file.parent, match["prefix"]) if match else file for file, match in parts.items()}
    if len(prefixes) > 1:
        raise ValueError(
            f"These are files of several checkpoints: {', '.join(file.name for file in files)}. Give those of one: a "
            "consolidated file, or all of its model parts."
        )
    number_of = {file: int(match["part"]) for file, match in parts.items() if match}
    ordered = sorted(files, key=number_of.__getitem__)
    numbers = [number_of[file] for file in ordered]
    if numbers != list(range(len(numbers))):
        raise ValueError(f"Model parts are missing or double: found {numbers}, expected 0 to {max(numbers)} once each.")
    return ordered


def _fsdp_advice(files: list[Path]) -> str:
    name = re.sub(r"(-shard\d+)?\.pt$", "", files[0].name)
    pattern = f"{name}.pt" if files[0].name == f"{name}.pt" else f"{name}-shard*.pt"
    return (
        f"{files[0]} is of FSDP: its parameters are flattened, and only metaseq's metadata say what they are. "
        "Unflatten each model part with metaseq first, then convert the results: python -m "
        f"metaseq.scripts.reshard_fsdp --input '{pattern}' --output 'unflattened/{name}.pt' --num-output-shards 1 "
        "--skip-optimizer-state True --unflatten-weights True"
    )


def _load(file: Path) -> Any:
    try:
        # A Namespace holds the settings in many files of metaseq; it has no behaviour of its own.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds Python objects beside tensors and plain values, and those are not loaded "
            f"({_reason(error)}). If you trust the file, save its weights alone where metaseq is installed: "
            "torch.save({'model': torch.load(file, weights_only=False)['model']}, 'model.pt')"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"Cannot read {file}: {_reason(error)}. It is damaged, cut short, or of torch before 1.6; the last: load "
            "it and save it again with a newer torch."
        ) from error


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Unsupported global" in line), lines[0] if lines else type(error).__name__)


def _settings(content: dict[str, Any]) -> dict[str, Any]:
    """The model's settings, from `cfg` (its entry `model`) or, in older files, `args`; empty where there are none."""
    cfg = content.get("cfg") or content.get("args") or {}
    cfg = vars(cfg) if isinstance(cfg, argparse.Namespace) else cfg
    model = cfg.get("model", cfg) if isinstance(cfg, dict) else {}
    model = vars(model) if isinstance(model, argparse.Namespace) else model
    return model if isinstance(model, dict) else {}


# ----- config and keys ------------------------------------------------------------------------------------------------


def _config(
    checkpoint: MetaseqCheckpoint,
    heads: int | None,
    activation: str | None,
    post_norm: bool,
    vocab_size: int | None,
    dtype: str | torch.dtype | None,
) -> OPTConfig:
    keys, first, settings = checkpoint.keys(), checkpoint.parts[0], checkpoint.settings
    needed = (_EMBED, "decoder.embed_positions.weight", "decoder.layers.0.fc1.weight")
    missing = [key for key in needed if key not in keys]
    if missing:
        raise ValueError(
            f"{checkpoint.files[0]} is no OPT-like decoder: it has no {', '.join(missing)}. (OPT has learned "
            "positions; models with others are not converted.)"
        )
    if settings.get("no_scale_embedding") is False:
        raise ValueError("This model scales its embeddings (no_scale_embedding is False), which OPT does not.")
    rows, embedding_size = checkpoint.shape(_Cut(_EMBED, ROWS))
    positions, hidden_size = first["decoder.embed_positions.weight"].shape
    heads = _setting("num_attention_heads", heads, settings.get("decoder_attention_heads"), "32, say")
    activation = _setting("activation_function", activation, settings.get("activation_fn"), "relu for OPT")
    if heads < 1 or hidden_size % heads or heads % len(checkpoint.parts):
        raise ValueError(
            f"{heads} attention heads do not go into a hidden size of {hidden_size} in {len(checkpoint.parts)} part(s)."
        )
    if vocab_size is not None and not 1 <= vocab_size <= rows:
        raise ValueError(f"vocab_size is {vocab_size}, but the checkpoint's embedding has {rows} rows.")
    depths = {int(match[1]) for key in keys if (match := re.match(r"decoder\.layers\.(\d+)\.", key))}
    return OPTConfig(
        vocab_size=vocab_size or rows,
        hidden_size=hidden_size,
        word_embed_proj_dim=embedding_size,
        max_position_embeddings=positions - 2,
        num_hidden_layers=max(depths) + 1,
        ffn_dim=checkpoint.shape(_Cut("decoder.layers.0.fc1.weight", ROWS))[0],
        num_attention_heads=heads,
        activation_function=activation,
        do_layer_norm_before=not post_norm,
        enable_bias=any(re.search(r"(_proj|fc1|fc2)\.bias$", key) for key in keys),
        layer_norm_elementwise_affine=any("layer_norm." in key for key in keys),
        dropout=settings.get("dropout", 0.0),
        attention_dropout=settings.get("attention_dropout", 0.0),
        tie_word_embeddings=_is_tied(checkpoint),
        dtype=_dtype(checkpoint, dtype),
    )


def _setting(name: str, given: Any, found: Any, example: str) -> Any:
    if given is None and found is None:
        raise ValueError(f"The files do not say {name}; give it ({example}).")
    if given is not None and found is not None and given != found:
        raise ValueError(f"{name} is given as {given}, but the checkpoint says {found}.")
    return found if given is None else given


def _is_tied(checkpoint: MetaseqCheckpoint) -> bool:
    """No output projection, or the embedding once more."""
    return _OUTPUT not in checkpoint.keys() or all(
        torch.equal(part[_OUTPUT], part[_EMBED]) for part in checkpoint.parts
    )


def _dtype(checkpoint: MetaseqCheckpoint, dtype: str | torch.dtype | None) -> torch.dtype:
    named = named_dtype(dtype)
    expected = checkpoint.parts[0][_EMBED].dtype
    for file, part in zip(checkpoint.files, checkpoint.parts):
        for key, tensor in part.items():
            if named is None and key != _VERSION and tensor.dtype != expected:
                raise ValueError(
                    f"{file} mixes types: '{_EMBED}' is {expected}, '{key}' is {tensor.dtype}. Say which the output "
                    "shall have: dtype=..."
                )
    return named or expected


def _sources(checkpoint: MetaseqCheckpoint, specs: dict[str, TensorSpec], post_norm: bool) -> dict[str, _Cut]:
    """For every tensor of OPT its source, checked: none missing, none left over, all of the right shape."""
    keys = checkpoint.keys()
    sources = {key: _source(key, keys) for key in specs}
    if "lm_head.weight" in sources and checkpoint.parts[0][_OUTPUT].shape[0] == checkpoint.shape(_Cut(_EMBED, ROWS))[0]:
        sources["lm_head.weight"] = _Cut(_OUTPUT, SAME)  # not cut over the parts, unlike the embedding
    missing = sorted({source.key for source in sources.values()} - keys)
    if missing:
        hint = ""
        if any(key.startswith("decoder.layer_norm.") for key in missing) and not post_norm:
            hint = " A model with its LayerNorm behind attention and FFN (OPT-350m) has no such norm: say post_norm."
        raise ValueError(f"{checkpoint.files[0]} lacks {_some(missing)}.{hint}")
    left = sorted(keys - {source.key for source in sources.values()} - {_VERSION, _OUTPUT})
    if left:
        raise ValueError(
            f"{checkpoint.files[0]} has tensors that OPT has no place for: {_some(left)}. The model is not a plain "
            "OPT; leaving them out would give another model."
        )
    rows = checkpoint.shape(_Cut(_EMBED, ROWS))[0]
    for key, source in sources.items():
        expected = list(specs[key].shape)
        if source.key in (_EMBED, _OUTPUT):
            expected[0] = rows
        found = checkpoint.shape(source)
        if found != expected:
            raise ValueError(
                f"'{source.key}' of {checkpoint.files[0]} has the wrong shape: {len(checkpoint.parts)} part(s) make "
                f"{found}, expected {expected} for '{key}'. Are all model parts there?"
            )
    return sources


def _source(key: str, keys: set[str]) -> _Cut:
    for pattern, template, join in _TABLE:
        match = re.fullmatch(pattern, key)
        if match is None:
            continue
        name = match.expand(template)
        joined = re.sub(r"\.[kvq]_proj\.", ".qkv_proj.", name)
        if joined != name and joined in keys:
            return _Cut(joined, join, _THIRDS[name.split(".")[-2]])
        return _Cut(name, join)
    raise AssertionError(f"no row for '{key}' in the table")


def _some(keys: list[str]) -> str:
    return f"{', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
