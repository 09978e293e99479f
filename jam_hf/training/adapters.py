"""Presets for adapters: which linear layers of a JAM a LoRA adapts, by the names that freezing has for them.

It knows names of modules, and peft only inside the one function that needs it. peft's own ways work as well: without
`target_modules` an adapter gets the queries and values of all attentions, and "all-linear" finds all but `lm_head`. The
VQ model is never adapted (its linear layers are no `nn.Linear`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ..model.configuration_jam import JamConfig
from ..model.families_jam import FAMILIES
from ..model.modeling_jam import JamModel


if TYPE_CHECKING:
    from peft import LoraConfig

# The linear layers inside a decoder layer, a cross block or a stem, in every family.
_LINEAR = "(?:" + "|".join(sorted(set().union(*(family.linear_layers for family in FAMILIES.values())))) + ")"
_LAYERS = r"(?:.*\.)?language_model\.layers\.\d+\."

# Full names of the adapted modules, as regular expressions. The names are those of recipes.FREEZE_PRESETS where both
# mean the same part; heads and embeddings are trained whole, by peft's `modules_to_save` or `trainable_token_indices`.
ADAPTER_TARGETS = {
    "all": rf"(?:.*\.)?language_model\.(?:.*\.)?(?:{_LINEAR}|output_projection)",
    "attention": rf"{_LAYERS}(?:.*\.)?(?:self_attn|cross_attn)\.\w+_proj",
    "text_stream": rf"(?:.*\.)?language_model\.(?:.*\.)?(?:text_layer|text_stem|text_cross)\.(?:.*\.)?{_LINEAR}",
    "image_stream": rf"(?:.*\.)?language_model\.(?:.*\.)?(?:image_layer|image_stem|image_cross)\.(?:.*\.)?{_LINEAR}",
    "cross_only": (
        rf"(?:.*\.)?language_model\.(?:layers\.\d+\.(?:text_cross|image_cross)\.(?:.*\.)?{_LINEAR}|output_projection)"
    ),
}
_ONLY_IN_CROSS = ("text_stream", "image_stream", "cross_only")


def lora_config(model: PreTrainedModel | JamConfig, target: str = "all", **lora_kwargs: Any) -> LoraConfig:
    """A `peft.LoraConfig` for a JAM, ready for `peft.get_peft_model` or `model.add_adapter`.

    Args:
        model: the JAM (or its config) that will be adapted.
        target: "all" linear layers of the decoders, "attention" (self- and cross-attention), or, in a cross JAM,
            "text_stream", "image_stream" (the layers of one stream and the cross blocks that write into it) or
            "cross_only" (the cross blocks of both, and the paper form's output projection).
        lora_kwargs: of `LoraConfig`, e.g. `r=16, lora_alpha=32, use_dora=True, modules_to_save=["embed_tokens",
            "lm_head"]`.
    Raises:
        ImportError: where peft is not installed.
        ValueError: for an unknown target, one that this fusion mode does not have, or `target_modules` beside `target`.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("lora_config needs peft, which is not installed: pip install 'jam_hf[peft]'.") from error
    config = model if isinstance(model, JamConfig) else getattr(model, "config", None)
    if not isinstance(config, JamConfig):
        raise ValueError(f"lora_config: expected a JAM or a JamConfig, got a {type(model).__name__}.")
    if target not in ADAPTER_TARGETS:
        raise ValueError(f"lora_config: target must be one of {', '.join(ADAPTER_TARGETS)}, got {target!r}.")
    if target in _ONLY_IN_CROSS and config.fusion_mode != "cross":
        raise ValueError(
            f"lora_config: a JAM of fusion_mode={config.fusion_mode!r} is one decoder and has no {target!r}; use 'all' "
            "or 'attention'."
        )
    if "target_modules" in lora_kwargs:
        raise ValueError(
            f"lora_config: target={target!r} already says which modules are adapted; leave target_modules out, or make "
            "a peft.LoraConfig of your own."
        )
    task_type = "FEATURE_EXTRACTION" if isinstance(model, JamModel) else "CAUSAL_LM"
    return LoraConfig(target_modules=ADAPTER_TARGETS[target], **{"task_type": task_type, **lora_kwargs})
