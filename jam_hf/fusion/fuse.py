"""`fuse`: two parents and a VQ model in, one JAM checkpoint out.

`plan_fusion` reads configs, headers and tokenizers and says how every tensor will be made; it writes nothing. `fuse` does it.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from ..files import check_apart, check_free, resumable_folder, whole_folder
from ..model.configuration_jam import FUSION_MODES, JamConfig
from ..model.image_processing_jam import JamImageProcessor
from ..model.modeling_jam import JamForCausalLM
from ..model.modeling_jam_vq import JamVQModel
from ..model.processing_jam import JamProcessor
from . import chat_templates, report, tables
from .checkpoint import BLOCK_BYTES, Parent, TensorPlan, plan_shards, specs_of, write_plans
from .from_config import has_tokenizer, stand_in_tokenizer
from .generation_defaults import one_or_list, said_stop_ids, stop_ids, text_sampling
from .model_card import model_card
from .parent_tokenizers import asks_otherwise, check_saved, limit_length, read_parent_tokenizer
from .parents import IMAGE_PARENTS, TEXT_PARENTS, Decoder, image_codes, picture_tokens
from .preprocessing import image_processing_of
from .recipe import FusionRecipe
from .shapes import check_parents, jam_config
from .tensor_files import TensorSpec, named_dtype
from .vocabulary import TokenNames, Vocabulary, check_added_ids, differing_tokens, joined_vocabulary, shared_vocabulary
from .vq_source import vq_model_of


DEFAULT_INIT = {"uniform": "average", "width": "copy", "cross": "preserving"}


@dataclass
class FusionPlan:
    """A fusion before it is done. `describe()` and `explain(key)` say what it will be; nothing has been written."""

    recipe: FusionRecipe
    config: JamConfig
    vocabulary: Vocabulary
    text: Decoder
    image: Decoder
    tensors: dict[str, TensorPlan]
    warnings: list[str]
    digest: str | None  # None: weights were not read, only their headers
    fingerprint: str | None  # None: an input is in memory, so that a stopped run cannot be taken up again
    sampling: dict[str, Any] = field(default_factory=dict)  # defaults of generation, by the JAM's names

    @property
    def num_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(plan.spec.nbytes for plan in self.tensors.values())

    def describe(self, tensors: bool = True) -> str:
        """Parameters, memory, disk, vocabulary, pairing of layers, warnings and (`tensors`) shapes, as text."""
        return report.describe(self, tensors)

    def explain(self, key: str) -> str:
        """Where a tensor comes from, as text. Raises `ValueError` for a tensor that the JAM does not have."""
        return report.explain(self, key)


def fuse(
    text_model: str | os.PathLike | PreTrainedModel,
    image_model: str | os.PathLike | PreTrainedModel,
    mode: str,
    output_dir: str | os.PathLike,
    init: str | None = None,
    vq_model: str | os.PathLike | JamVQModel | None = None,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Path:
    """Fuse a text LLM and an autoregressive image model into a JAM checkpoint (paper, stage 1).

    Tensors are read, made and written in blocks of rows, so that memory does not grow with the models. A run that was killed
    goes on where it was, when it is started again with the same arguments.

    Args:
        text_model: checkpoint folder, Hub id, or model in memory: Llama, Mistral, Qwen2, Qwen3 or OPT.
        image_model: likewise: a plain causal LM of these families whose vocabulary holds the image codes, or a Chameleon
            (Anole), Emu3 or Janus `ForConditionalGeneration`.
        mode: "uniform" (equal shapes), "width" (equal depth and head size) or "cross" (any; layers are paired by relative
            depth).
        output_dir: where the checkpoint appears, whole or not at all.
        init: uniform "average"; width "copy" (default), "average" [P], "block_diagonal" (ours); cross "preserving" (ours,
            default: text logits equal the text parent's and image logits the image parent's) or "paper".
        vq_model: the image tokenizer that made the image parent's codes: a [`JamVQModel`] or its folder (`convert_vq` makes
            one of others); the image parent's own where `None`.
        tokenizer: the JAM's tokenizer or its folder; the text parent's where `None`.
        overwrite: a non-empty `output_dir` is refused, unless `overwrite`, which replaces the whole folder once the new one is
            complete.
        settings: further fields of [`FusionRecipe`]:
            image_tokenizer: of the image parent, where its folder has none.
            text_revision, image_revision: branch, tag or commit on the Hub.
            image_size: side of a picture in pixels, for image tokenizers that take any (Emu3).
            image_token_offset: id of image code 0 in a plain causal LM; by default its tokenizer's `<img:0>`, `<img_00000>`
                or the like, with as many numbers behind it as there are codes.
            break_token, image_token, mask_token, mask_end_token: the JAM's special tokens, by their text.
            special_tokens: image parent's token by JAM's token, for markup that both have under different names.
            cross_attention_interval: cross blocks after layers 0, interval, 2*interval, ... [A]: 2.
            tokenizer_reading: "transformers" (default): a JAM splits text as `AutoTokenizer` makes the parents' tokenizers;
                "files": as their tokenizer.json says, with `add_bos_token` of their tokenizer_config.json. A warning says
                where the two differ.
            dtype: of the decoders; the parents' where `None`. The VQ model stays in float32.
            seed: for what is drawn at random (cross blocks, projections). max_shard_size: as in `save_pretrained`.
    Returns:
        the path of the checkpoint: config, generation config, safetensors, tokenizer and processor, the code that loads it
        elsewhere, the recipe, and a model card.
    Raises:
        ValueError: if the parents do not fit; the message names both. FileExistsError: if `output_dir` is in use. OSError: if
            the disk has no room.
    """
    check_apart(output_dir, text_model, image_model, vq_model, tokenizer, settings.get("image_tokenizer"))
    check_free(output_dir, overwrite)  # before anything large is read or fetched
    plan = plan_fusion(text_model, image_model, mode, init, vq_model, tokenizer, **settings)
    return run_fusion(plan, output_dir, overwrite)


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
        headers_only: fetch no weights of parents on the Hub, only the headers of their files; a folder without weights is
            planned by its config.json. The plan can be described and explained, not run.
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
        raise ValueError(f"init for mode {mode!r} must be one of {', '.join(map(repr, tables.INITS[mode]))}, got {init!r}.")
    try:
        plan_shards({}, recipe.max_shard_size)
    except ValueError as error:
        raise ValueError(f"max_shard_size must be a size such as '2GB', got {recipe.max_shard_size!r}.") from error
    warnings: list[str] = []
    text = Decoder(Parent(text_model, "text parent", recipe.text_revision, headers_only), TEXT_PARENTS)
    image = Decoder(Parent(image_model, "image parent", recipe.image_revision, headers_only), IMAGE_PARENTS)
    check_parents(text, image, mode, init)
    vq, vq_warnings = vq_model_of(vq_model, image, recipe.image_size, config_only=headers_only)
    warnings += vq_warnings
    processing, processing_warnings = image_processing_of(
        image.parent, None if vq_model is None else vq.config, vq.config.sample_size
    )
    warnings += processing_warnings
    shared = image.kind in TEXT_PARENTS and text.vocab_size == image.vocab_size
    if tokenizer is None and _lacks_tokenizer(text.parent):
        marks = (recipe.break_token, recipe.image_token, recipe.mask_token, recipe.mask_end_token) if shared else ()
        tokenizer = stand_in_tokenizer(text.parent.config, text.vocab_size, marks)
        warnings.append(_STAND_IN.format("text parent"))
    if image_tokenizer is None and _lacks_tokenizer(image.parent) and not shared:
        marks = ("<begin_of_image>", "<end_of_image>") if image.kind == "janus" else ()
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
    parts = tables.Ingredients(config, text, image, codes, vocabulary.text_map, vocabulary.image_map, vq_state, recipe.seed)
    tensors = tables.plan_tensors(_specs(config), tables.table(mode, init, config), parts)
    tables.check_all_used(parts, mode)
    warnings += report.warnings(text, image, config, vocabulary, mode, init)
    vocabulary.tokenizer.chat_template, template_warnings = chat_templates.fitted(vocabulary.tokenizer, recipe.image_token)
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


def run_fusion(plan: FusionPlan, output_dir: str | os.PathLike, overwrite: bool = False) -> Path:
    """Do what was planned; see [`fuse`]."""
    if plan.digest is None:
        raise ValueError("A plan of headers alone cannot be run; plan with headers_only=False.")
    for decoder in (plan.text, plan.image):  # a parent's files may be links into the output folder
        check_apart(output_dir, *decoder.parent.files())
    folder_context: AbstractContextManager[Path | None]
    if plan.fingerprint is None:
        folder_context = whole_folder(output_dir, overwrite)
    else:
        folder_context = resumable_folder(output_dir, plan.fingerprint, overwrite)
    with folder_context as folder:
        if folder is None:
            return Path(output_dir)
        there = sum(path.stat().st_blocks * 512 for path in folder.glob("*.safetensors*"))  # files begun are sparse
        free = shutil.disk_usage(folder).free
        if free + there < plan.num_bytes:
            raise OSError(
                errno.ENOSPC,
                f"the fusion needs {report.size(plan.num_bytes - there)} more in '{folder.parent}', and {report.size(free)} "
                "are free. Make room, or choose another output folder",
            )
        write_plans(folder, plan.tensors, plan.recipe.max_shard_size)
        _write_small_files(plan, folder)
    return Path(output_dir)


def _write_small_files(plan: FusionPlan, folder: Path) -> None:
    """All but the tensors; config.json last: a folder without it is no checkpoint."""
    config, vocabulary, recipe = plan.config, plan.vocabulary, plan.recipe
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        generation_mode="interleaved",
        **plan.sampling,
    ).save_pretrained(folder)
    tokenizer = vocabulary.tokenizer
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # what is saved is what it was made with
    processor = JamProcessor(
        JamImageProcessor.from_vq_config(config.vq_config),
        tokenizer,
        image_seq_length=config.image_seq_length,
        image_token=recipe.image_token,
        break_token=recipe.break_token,
        **vocabulary.layout,
        **({} if vocabulary.code_name is None else {"image_code_token": vocabulary.code_name}),
    )
    processor.save_pretrained(folder)
    config.provenance = {"card": model_card(plan), "recipe": recipe.to_yaml(), "history": []}
    for name in ("README.md", "fusion.yaml"):  # of an earlier run that was stopped
        (folder / name).unlink(missing_ok=True)
    config.save_pretrained(folder)  # and the two, as every later save writes them


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
    plain = image.kind in TEXT_PARENTS
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
            f"(vocab_size: {text.vocab_size} and {image.vocab_size}), and the image parent brings no tokenizer to say what its "
            "rows mean. Pass image_tokenizer=..."
        )
    pictures = picture_tokens(image.parent.config, image_tokenizer, vq.config.grid_size, image.parent.name)
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
    "The {} has no tokenizer files here: the size of the vocabulary is an estimate (unless the parents share one, no mark of "
    "the JAM is taken to be in it), and coverage means nothing."
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
        if image.folder is None or not (image.folder / "tokenizer_config.json").is_file():
            return None
        tokenizer = image.folder
    return read_parent_tokenizer(tokenizer, "image_tokenizer", reading)


def _dtype(text: Decoder, image: Decoder) -> torch.dtype:
    found = [decoder.parent.require(decoder.embedding_key).dtype for decoder in (text, image)]
    if found[0] != found[1]:
        raise ValueError(
            f"The text parent {text.parent.name} is stored in {found[0]}, the image parent {image.parent.name} in {found[1]}. "
            "Say which the JAM shall have: dtype=..."
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


def plan_recipe(recipe: FusionRecipe, headers_only: bool = False) -> FusionPlan:
    """`plan_fusion` with the settings of a recipe."""
    settings = {key: value for key, value in vars(recipe).items() if key not in ("text", "image", "mode", "vq")}
    return plan_fusion(recipe.text, recipe.image, recipe.mode, vq_model=recipe.vq, headers_only=headers_only, **settings)
