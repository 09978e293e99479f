"""`fuse`: two parents and a VQ model in, one JAM checkpoint out.

`plan_fusion` (planner.py) reads configs, headers and tokenizers and says how every tensor will be made; it writes
nothing. `run_fusion` (run.py) does it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import check_apart, check_free
from ..model.modeling_jam_vq import JamVQModel
from .plan import FusionPlan
from .planner import plan_fusion, plan_recipe
from .run import run_fusion


__all__ = ["FusionPlan", "fuse", "plan_fusion", "plan_recipe", "run_fusion"]


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

    Tensors are read, made and written in blocks of rows, so that memory does not grow with the models. A run that was
    killed goes on where it was, when it is started again with the same arguments.

    Args:
        text_model: checkpoint folder, Hub id, or model in memory: Llama, Mistral, Qwen2, Qwen3 or OPT.
        image_model: likewise: a plain causal LM of these families whose vocabulary holds the image codes, or a
            Chameleon (Anole), Emu3 or Janus `ForConditionalGeneration`.
        mode: "uniform" (equal shapes), "width" (equal depth and head size) or "cross" (any; layers are paired by
            relative depth).
        output_dir: where the checkpoint appears, whole or not at all.
        init: uniform "average"; width "copy" (default), "average" [P], "block_diagonal" (ours); cross "preserving"
            (ours, default: text logits equal the text parent's and image logits the image parent's) or "paper".
        vq_model: the image tokenizer that made the image parent's codes: a [`JamVQModel`] or its folder (`convert_vq`
            makes one of others); the image parent's own where `None`.
        tokenizer: the JAM's tokenizer or its folder; the text parent's where `None`.
        overwrite: a non-empty `output_dir` is refused, unless `overwrite`, which replaces the whole folder once the new
            one is complete.
        settings: further fields of [`FusionRecipe`]:
            image_tokenizer: of the image parent, where its folder has none.
            text_revision, image_revision: branch, tag or commit on the Hub.
            image_size: side of a picture in pixels, for image tokenizers that take any (Emu3).
            image_token_offset: id of image code 0 in a plain causal LM; by default its tokenizer's `<img:0>`,
                `<img_00000>` or the like, with as many numbers behind it as there are codes.
            break_token, image_token, mask_token, mask_end_token: the JAM's special tokens, by their text.
            special_tokens: image parent's token by JAM's token, for markup that both have under different names.
            cross_attention_interval: cross blocks after layers 0, interval, 2*interval, ... [A]: 2.
            tokenizer_reading: "transformers" (default): a JAM splits text as `AutoTokenizer` makes the parents'
                tokenizers; "files": as their tokenizer.json says, with `add_bos_token` of their tokenizer_config.json.
                A warning says where the two differ.
            dtype: of the decoders; the parents' where `None`. The VQ model stays in float32.
            seed: for what is drawn at random (cross blocks, projections). max_shard_size: as in `save_pretrained`.
    Returns:
        the path of the checkpoint: config, generation config, safetensors, tokenizer and processor, the code that loads
        it elsewhere, the recipe, and a model card.
    Raises:
        ValueError: if the parents do not fit; the message names both. FileExistsError: if `output_dir` is in use.
            OSError: if the disk has no room.
    """
    check_apart(output_dir, text_model, image_model, vq_model, tokenizer, settings.get("image_tokenizer"))
    check_free(output_dir, overwrite)  # before anything large is read or fetched
    plan = plan_fusion(text_model, image_model, mode, init, vq_model, tokenizer, **settings)
    return run_fusion(plan, output_dir, overwrite)


class _CallableModule(ModuleType):
    """`jam_hf.fusion.fuse` is this module, as `import` has it, and may be called as the function of its name."""

    __call__ = staticmethod(fuse)


sys.modules[__name__].__class__ = _CallableModule
