"""`convert_vq`: the VQ model of a public parent in, the folder of a [`JamVQModel`] out, with the same codes and pixels.

It reads, lets the tables (vq_tables.py) say what is what, accounts for every tensor, and writes. It knows nothing of
fusing.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import JanusVQVAEConfig, PreTrainedConfig

from ..checkpoints.multimodal import MULTIMODAL
from ..checkpoints.parent import Parent
from ..files import check_apart, whole_folder
from ..model.configuration_jam_vq import JamVQConfig
from ..model.modeling_jam_vq import JamVQModel
from .image_processing import image_processing_of
from .vq_tables import (
    LAYOUTS,
    LINEAR_IN_DIFFUSERS,
    LLAMAGEN_TO_JANUS,
    TRAINING_ONLY,
    Architecture,
    Table,
    find_prefix,
    guess_layout,
    infer_architecture,
    rename,
    taming_to_diffusers,
)


OLD_FILES = (".ckpt", ".pt", ".pth", ".bin")


@dataclass
class VQWeights:
    """Where the tensors come from. config: that of the VQ model, where the checkpoint has one."""

    name: str
    keys: Collection[str]
    get: Callable[[str], torch.Tensor]
    config: PreTrainedConfig | None = None


def convert_vq(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    layout: str | None = None,
    sample_size: int | None = None,
    codebook_l2_norm: bool | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Path:
    """Convert the VQ model of a public image parent into a [`JamVQModel`] with the same codes and pixels, in float32.

    Args:
        source: a checkpoint folder or Hub id of transformers' Chameleon, Janus or Emu3 (the whole model, or its VQ
            model alone), or a file of weights: safetensors, and with `allow_pickle` what torch.save wrote.
        output_dir: where the folder appears, whole or not at all.
        layout: "taming", "chameleon", "llamagen", "janus" or "emu3"; found by the keys where `None`. transformers'
            Chameleon has no decoder: what becomes of it can encode only. Convert Chameleon's own vqgan.ckpt ("taming")
            to have both.
        sample_size: side of the pictures in pixels. Chameleon's and Janus' configs say it; all others take any size.
        codebook_l2_norm: normalise latents and codebook before the search for the nearest code, as LlamaGen and
            DeepSeek's own Janus do (of no other layout). transformers' Janus does not, and by default this follows the
            class that the weights come from.
        allow_pickle: read .ckpt, .pt, .pth and .bin files, with `torch.load(weights_only=True)`.
        overwrite: replace a non-empty `output_dir` once the new one is complete.
    Returns:
        the path of the folder, as `fuse(vq_model=...)` takes it.
    Raises:
        ValueError: if the source cannot be read, is no VQ model, or one that no stock class computes; if a tensor is
            unknown, missing, of another shape or not finite. FileExistsError: if `output_dir` is in use.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}.")
    check_apart(output_dir, source, called="the input")
    if Path(source).suffix in (".safetensors", *OLD_FILES) and not Path(source).exists():
        raise ValueError(f"There is no file '{source}'.")
    parent = None if Path(source).is_file() else Parent(source, "VQ model")
    origin = _open(source, allow_pickle) if parent is None else _inside(parent)
    model, layout = _converted(origin, layout, sample_size, codebook_l2_norm)
    config = model.config
    if parent is not None:
        config.image_processing, warnings = image_processing_of(parent, None, config.sample_size)
        for warning in warnings:
            print(warning)
    with whole_folder(output_dir, overwrite) as folder:
        model.save_pretrained(folder)
        _check_saved(folder, model)
    halves = "encoder and decoder" if config.has_decoder else "encoder only: it cannot decode codes to pixels"
    print(
        f"VQ model of layout '{layout}': {config.sample_size}x{config.sample_size} pixels are {config.grid_size}x"
        f"{config.grid_size} codes out of {config.num_vq_embeddings}; {halves}."
    )
    return Path(output_dir)


def vq_model_from(parent: Parent, sample_size: int | None = None, say: Callable[[str], None] = print) -> JamVQModel:
    """The VQ model inside a checkpoint of transformers' Chameleon, Janus or Emu3; see [`convert_vq`]. `say` gets
    remarks.
    """
    return _converted(_inside(parent), None, sample_size, None, say)[0]


def _converted(
    origin: VQWeights,
    layout: str | None,
    sample_size: int | None,
    codebook_l2_norm: bool | None,
    say: Callable[[str], None] = print,
) -> tuple[JamVQModel, str]:
    """The model, and the layout that its weights had."""
    tensors = _vq_tensors(origin, say)
    layout = layout or guess_layout(tensors)
    if layout is None:
        raise ValueError(f"'{origin.name}' has a codebook, but its keys are of no known layout, e.g. '{min(tensors)}'.")
    if codebook_l2_norm is None:
        codebook_l2_norm = layout == "llamagen"
    elif not codebook_l2_norm and layout == "llamagen":
        raise ValueError(
            "LlamaGen's layout without codebook_l2_norm cannot be converted: JanusVQVAE's decoder normalises."
        )
    if codebook_l2_norm and layout not in ("llamagen", "janus"):
        raise ValueError(
            f"codebook_l2_norm is for LlamaGen's and Janus' VQ models; '{origin.name}' is of layout '{layout}', of "
            "which no code normalises. Leave it out."
        )
    try:
        config, table = _config_and_table(layout, origin.config, tensors, sample_size, codebook_l2_norm)
    except ValueError as error:
        raise ValueError(f"'{origin.name}', read as layout '{layout}': {error}") from error
    model = _fill(config, table, tensors, origin.name, layout, say)
    if layout == "janus" and not codebook_l2_norm and not model.device.type == "meta":
        norms = tensors["quantize.embedding.weight"].norm(dim=1)
        if (norms - 1).abs().max() > 1e-3:
            say(
                f"The vectors of the codebook have lengths from {norms.min():.3g} to {norms.max():.3g}. DeepSeek's own "
                "code normalises them before it encodes a picture, transformers' class does not, so they find other "
                "codes for it. Converted as transformers has it; codebook_l2_norm (--codebook-l2-norm) converts to "
                "DeepSeek's."
            )
    return model, layout


# ----- reading --------------------------------------------------------------------------------------------------------


def _open(source: str | os.PathLike, allow_pickle: bool) -> VQWeights:
    path = Path(source)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix not in OLD_FILES:
        raise ValueError(
            f"'{path}': expected a checkpoint folder, a .safetensors file, or one of {', '.join(OLD_FILES)}."
        )
    if not allow_pickle:
        raise ValueError(
            f"'{path}' may be a pickle, which can run code when it is read. If you trust where it comes from, allow "
            "it: allow_pickle=True, or --allow-old-files on the command line (it is read with weights_only=True all "
            "the same)."
        )
    return _open_pickle(path)


def _inside(parent: Parent) -> VQWeights:
    return VQWeights(parent.name, parent.keys(), parent.get, _vq_config(parent))


def _vq_config(parent: Parent) -> PreTrainedConfig:
    """The VQ model's config: the checkpoint's own, or a part of it."""
    found = parent.config
    if found.model_type in MULTIMODAL:
        found = found.vq_config
    if found.model_type not in {sheet.vq_type for sheet in MULTIMODAL.values()}:
        raise ValueError(
            f"'{parent.name}' is a '{found.model_type}' checkpoint; expected transformers' Chameleon, Janus or Emu3, "
            "whole or its VQ model alone, or a file of weights in taming's or LlamaGen's layout."
        )
    return found


def _open_safetensors(path: Path) -> VQWeights:
    def get(key: str) -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)

    try:
        with safe_open(path, framework="pt") as file:
            return VQWeights(str(path), set(file.keys()), get)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"Cannot read {path}: {error}. The file is damaged or cut short.") from error


def _open_pickle(path: Path) -> VQWeights:
    try:
        # What torch wrote before version 1.6 is no zip file and cannot be mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"Cannot read {path} with weights_only=True: {reason}") from error
    # LlamaGen keeps averaged weights beside the last ones and uses the former; Lightning has "state_dict".
    for name in ("ema", "model", "state_dict"):
        inner = loaded.get(name) if isinstance(loaded, dict) else None
        if isinstance(inner, dict) and find_prefix(inner) is not None:
            print(f"Weights are read from '{name}' of {path.name}.")
            loaded = inner
            break
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; expected a dictionary of tensors.")
    tensors = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    return VQWeights(str(path), set(tensors), tensors.__getitem__)


def _vq_tensors(origin: VQWeights, say: Callable[[str], None]) -> dict[str, torch.Tensor]:
    """The VQ model's tensors by its own names, floats as float32. What only training uses is left out, and counted."""
    prefix = find_prefix(origin.keys)
    if prefix is None:
        raise ValueError(
            f"'{origin.name}' holds no VQ model: expected a tensor 'quantize.embedding.weight' (alone, or under "
            f"'model.vqmodel.' in a whole model), got {len(origin.keys)} tensors, e.g. {sorted(origin.keys)[:3]}."
        )
    names = sorted(key.removeprefix(prefix) for key in origin.keys if key.startswith(prefix))
    if "quantize.embed.weight" in names:
        raise ValueError(
            f"'{origin.name}' has a Gumbel quantiser ('quantize.embed.weight'), which no supported class computes."
        )
    left_out = [name for name in names if TRAINING_ONLY.fullmatch(name)]
    if left_out:
        say(f"{len(left_out)} tensors that only training uses are left out, e.g. '{left_out[0]}'.")
    tensors = {}
    for name in sorted(set(names) - set(left_out)):
        tensor = origin.get(prefix + name)
        if tensor.is_floating_point():
            tensor = tensor.float()
            if not tensor.is_meta and not torch.isfinite(tensor).all():
                raise ValueError(f"Tensor '{prefix}{name}' of '{origin.name}' holds NaN or infinity.")
        tensors[name] = tensor
    return tensors


# ----- architecture ---------------------------------------------------------------------------------------------------


def _config_and_table(
    layout: str,
    config: PreTrainedConfig | None,
    tensors: dict[str, torch.Tensor],
    sample_size: int | None,
    codebook_l2_norm: bool,
) -> tuple[JamVQConfig, Table]:
    table = LLAMAGEN_TO_JANUS if layout == "llamagen" else []
    if layout in ("janus", "emu3") and config is not None:
        inner = config
    elif layout == "emu3":
        raise ValueError(
            "the weights alone do not say all of Emu3's architecture; convert a folder that has a config.json."
        )
    else:
        shapes = {rename(key, table): tuple(tensor.shape) for key, tensor in tensors.items()}
        found = infer_architecture(shapes, smallest_first=layout in ("llamagen", "janus"))
        if layout in ("taming", "chameleon"):
            if found.has_decoder != (layout == "taming"):
                raise ValueError(f"the weights have {'a' if found.has_decoder else 'no'} decoder.")
            if config is not None:
                sample_size = config.resolution if sample_size is None else sample_size
                _check_against(found, config)
            return _diffusers_config(found, _said(sample_size)), taming_to_diffusers(len(found.channels))
        inner = _janus_config(found)
    values = inner.to_dict()
    for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):  # of where it comes from
        values.pop(name, None)
    if layout != "emu3" and (sample_size is not None or config is None):
        values["num_patches"] = _said(sample_size) // 2 ** (len(inner.channel_multiplier) - 1)
    if layout == "emu3":
        sample_size = _said(sample_size)
    return JamVQConfig(vqvae_config=values, sample_size=sample_size, codebook_l2_norm=codebook_l2_norm), table


def _said(sample_size: int | None) -> int:
    if sample_size is None:
        raise ValueError(
            "the weights do not say the size of the pictures; give it: sample_size=256 (--sample-size 256), say."
        )
    return sample_size


def _check_against(found: Architecture, config: PreTrainedConfig) -> None:
    names = (
        "in_channels base_channels channel_multiplier num_res_blocks latent_channels embed_dim num_embeddings".split()
    )
    for name in names:
        ours, theirs = getattr(found, name), getattr(config, name)
        if ours != (list(theirs) if isinstance(theirs, (list, tuple)) else theirs):
            raise ValueError(f"config.json says {name}={theirs}, the tensors' shapes say {ours}.")


def _diffusers_config(found: Architecture, sample_size: int) -> JamVQConfig:
    if found.base_channels != found.channels[0]:
        raise ValueError(
            f"'encoder.conv_in.weight' makes {found.base_channels} channels and the first level has "
            f"{found.channels[0]}; in diffusers' VQModel they are the same (the first channel multiplier is 1), and "
            "transformers has no such class."
        )
    levels = range(len(found.channels))
    return JamVQConfig(
        in_channels=found.in_channels,
        out_channels=found.out_channels,
        down_block_types=[f"{'Attn' * (level in found.encoder_attention)}DownEncoderBlock2D" for level in levels],
        up_block_types=[f"{'Attn' * (level in found.decoder_attention)}UpDecoderBlock2D" for level in reversed(levels)],
        block_out_channels=list(found.channels),
        layers_per_block=found.num_res_blocks,
        latent_channels=found.latent_channels,
        vq_embed_dim=found.embed_dim,
        num_vq_embeddings=found.num_embeddings,
        mid_block_add_attention=found.mid_attention,
        has_decoder=found.has_decoder,
        sample_size=sample_size,
    )


def _janus_config(found: Architecture) -> JanusVQVAEConfig:
    """JanusVQVAE has attention in the middle and at the smallest grid; where that differs, tensors are missing or
    unknown.
    """
    return JanusVQVAEConfig(
        embed_dim=found.embed_dim,
        num_embeddings=found.num_embeddings,
        latent_channels=found.latent_channels,
        in_channels=found.in_channels,
        out_channels=found.out_channels,
        base_channels=found.base_channels,
        channel_multiplier=found.channel_multiplier,
        num_res_blocks=found.num_res_blocks,
    )


# ----- writing --------------------------------------------------------------------------------------------------------


def _fill(
    config: JamVQConfig,
    table: Table,
    tensors: dict[str, torch.Tensor],
    name: str,
    layout: str,
    say: Callable[[str], None],
) -> JamVQModel:
    """The model with the weights in it, none left over and none missing."""
    with torch.device("meta"):
        model = JamVQModel(config)
    expected = {key.removeprefix("vq."): tensor.shape for key, tensor in model.state_dict().items()}
    if not config.has_decoder:
        half = [key for key in tensors if key.startswith("post_quant_conv.")]
        say(f"{len(half)} tensors of 'post_quant_conv' are left out: they would feed the decoder, and there is none.")
        tensors = {key: tensor for key, tensor in tensors.items() if key not in half}
    state, unknown, misshaped, origin = {}, [], [], {}
    for key, tensor in tensors.items():
        target = rename(key, table)
        if config.vq_class == "diffusers" and LINEAR_IN_DIFFUSERS.fullmatch(target) and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        if target not in expected or target in origin:
            unknown.append(key)
        elif tensor.shape != expected[target]:
            misshaped.append(f"'{key}': expected {list(expected[target])}, got {list(tensor.shape)}")
        state[f"vq.{target}"], origin[target] = tensor.contiguous(), key
    missing = [f"'{rename(key, table, back=True)}' ({list(expected[key])})" for key in expected if key not in origin]
    problems = [
        f"{len(found)} {what}: {', '.join(found[:5])}{' ...' if len(found) > 5 else ''}"
        for what, found in (
            ("tensors are unknown", [f"'{key}' ({list(tensors[key].shape)})" for key in unknown]),
            ("tensors are missing", missing),
            ("tensors have another shape", misshaped),
        )
        if found
    ]
    if problems:
        raise ValueError(f"'{name}' does not fit the layout '{layout}' of VQ models. " + "; ".join(problems) + ".")
    model.load_state_dict(state, assign=True)
    return model.eval()


def _check_saved(folder: Path, model: JamVQModel) -> None:
    saved: dict[str, Any] = JamVQModel.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False
    ).state_dict()
    differing = [key for key, tensor in model.state_dict().items() if not torch.equal(saved[key], tensor)]
    if differing:
        raise ValueError(f"What was written reads back differently, e.g. '{differing[0]}'. Is the disk at fault?")
