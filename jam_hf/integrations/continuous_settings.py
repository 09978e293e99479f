"""Which settings continuous batching obeys, and how large its pools are: what transformers leaves open, or passes over.

Every setting of a generation config is in one of the tables here. One that is in none, or that is set and not obeyed,
is
refused: a document must never be other than was asked for. It knows names and numbers, no requests and no grammar.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig

from ..model.call_settings_jam import (
    CALL_SETTINGS,
    GUIDANCE_SETTINGS,
    LAYOUT_SETTINGS,
    MODALITY_SETTINGS,
)
from ..model.configuration_jam import JamConfig
from ..model.families_jam import head_dim_of, key_value_heads_of
from ..model.rotation_jam import one_rotation
from ..portable import free_memory


# Obeyed as generate() obeys them.
OBEYED = (
    *(
        "max_length",
        "max_new_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "eos_token_id",
        "num_return_sequences",
    ),
    *("generation_mode", *LAYOUT_SETTINGS),
)
# Say nothing of what is written: how it is computed, ids for padding that does not occur here, settings of what is
# refused by itself (beams, drafts), and notes of transformers' own.
WITHOUT_EFFECT = (
    *("pad_token_id", "bos_token_id", "decoder_start_token_id", "transformers_version", "_from_model_config"),
    *("compile_config", "disable_compile", "prefill_chunk_size", "max_cache_len", "cache_config", "low_memory"),
    *("length_penalty", "early_stopping", "num_assistant_tokens", "num_assistant_tokens_schedule", "target_lookbehind"),
    *("assistant_confidence_threshold", "assistant_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
    *("speculation_type", "is_assistant", "continuous_batching_config"),
)
# Refused, but for None and what leaves all as it is.
REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((*GUIDANCE_SETTINGS, "repetition_penalty", "encoder_repetition_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("num_beams", "num_beam_groups"), (1,)),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), (False,)),
    **dict.fromkeys(
        ("return_dict_in_generate", "remove_invalid_values", "renormalize_logits", "token_healing"), (False,)
    ),
    **dict.fromkeys(("use_mtp",), (False,)),
    **dict.fromkeys(("max_time", "stop_strings", "cache_implementation", "min_p", "top_h", "bad_words_ids"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), ()),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "watermarking_config"), ()),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "dola_layers"), ()),
    **dict.fromkeys(("constraints", "force_words_ids"), ()),
    **dict.fromkeys(MODALITY_SETTINGS, ()),
    "use_cache": (True,),
}
REASONS = {
    **dict.fromkeys(
        GUIDANCE_SETTINGS, "it runs each request by itself, without the branch that guidance compares with"
    ),
    **dict.fromkeys(
        MODALITY_SETTINGS, "it has no settings by modality; temperature, top_k and top_p hold for text and codes"
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        "it returns GenerationOutput objects with ids; logprobs come with "
        "ContinuousBatchingConfig(return_logprobs=True)",
    ),
}
OTHERWISE = "transformers would pass over it, or ends requests early by it"


def check_settings(config: Any, said: dict[str, Any]) -> None:
    """Raises a `ValueError` that names every setting which is set and not obeyed, with the reason, or is out of range.

    `config`: complete; `said`: a JAM's own (`JamCallSettings.said`), of which `config` may have more than hold.
    """
    count = config.num_return_sequences
    if count is not None and count < 1:
        raise ValueError(f"num_return_sequences must be at least 1, got {count}.")
    wrong = []
    for name, value in (vars(config) | {name: said[name] for name in CALL_SETTINGS}).items():
        if value is None or name in OBEYED or name in WITHOUT_EFFECT or name.startswith("_"):
            continue
        if name in MODALITY_SETTINGS and said["generation_mode"] == "text":
            continue  # no code is drawn: a JAM of a parent that samples has them in its own config
        known = name in REFUSED or name in CALL_SETTINGS
        if known and any(value is neutral or value == neutral for neutral in REFUSED[name]):
            continue
        if known or name in _fields_of(config):
            wrong.append(f"{name}={value!r} ({REASONS.get(name, OTHERWISE)})")
    if wrong:
        raise ValueError(
            f"generate_batch (continuous batching) does not obey {'; '.join(wrong)}. Use generate(), or leave it out; "
            "what the call leaves out (None) is the model's own."
        )


def _fields_of(config: Any) -> set[str]:
    """What transformers' generation configs have; anything else is a user's own note, which generate() does not
    read either.
    """
    return set(vars(type(config)()))


def check_model(config: JamConfig) -> None:
    """Raises a `ValueError` for what pages and one mask for all layers cannot hold."""
    if "sliding_attention" in config.layer_types:
        raise ValueError(
            "Continuous batching builds one mask for all layers of a JAM, and some of them have a sliding window. Use "
            "generate()."
        )
    if len(heads := {_heads(decoder) for decoder in config.decoder_configs}) > 1:
        raise ValueError(
            "Continuous batching keeps pages of one shape, and the streams have different key/value heads (number, "
            f"size): {sorted(heads)}. Use generate()."
        )


def _heads(decoder: Any) -> tuple[int, int]:
    return key_value_heads_of(decoder), head_dim_of(decoder)


def check_rotation(config: JamConfig, longest: int) -> None:
    """Raises a `ValueError` if requests of up to `longest` ids would not all be rotated as they are alone."""
    if not one_rotation(config.decoder_configs, longest):
        kinds = sorted(
            {(getattr(c, "rope_parameters", None) or {}).get("rope_type", "default") for c in config.decoder_configs}
        )
        raise ValueError(
            f"A request may have {longest} ids here, where rotary positions ({', '.join(kinds)}) depend on the length: "
            "continuous batching feeds all requests in one forward, which would be rotated by the longest. Use "
            "generate(), or fewer ids (max_new_tokens)."
        )


# ----- pools ----------------------------------------------------------------------------------------------------------

PAGE_SIZE = 32
MAX_PREFILL = 256  # ids of prompts that are read in one step, at least one for each request
MEMORY_SHARE = 0.25  # of the memory that is free


def sized(
    given: ContinuousBatchingConfig | None,
    config: JamConfig,
    dtype: torch.dtype,
    device: torch.device,
    lengths: Sequence[int],
) -> ContinuousBatchingConfig:
    """`given` with pools for requests of these `lengths`, in ids with all that they may write, where it leaves them
    open.

    transformers would take a share of all memory, whatever the requests. Here they get what they need, and no more than
    `MEMORY_SHARE` of what is free: then some wait, or are set back and read anew.
    """
    given = ContinuousBatchingConfig(page_size=PAGE_SIZE) if given is None else given
    pools = copy.copy(given)
    if given.max_batch_tokens is None:
        pools.max_batch_tokens = max(len(lengths), MAX_PREFILL)
    if given.num_blocks is None:
        pages = num_pages(config, dtype, device, lengths, given.page_size, pools.max_batch_tokens)
        # transformers counts a block as num_hidden_layers pages; a cross JAM has more attentions than that.
        pools.num_blocks = -(-pages * len(config.per_layer_config) // config.num_hidden_layers)
    return pools


def num_pages(
    config: JamConfig,
    dtype: torch.dtype,
    device: torch.device,
    lengths: Sequence[int],
    page_size: int = PAGE_SIZE,
    max_batch_tokens: int = MAX_PREFILL,
) -> int:
    """Pages of `page_size` ids, of all attentions, for requests of these `lengths`: what they need, or what
    `MEMORY_SHARE` of the free memory holds.

    Raises:
        ValueError: if the longest request alone does not fit.
    """
    heads, size = _heads(config.decoder_configs[0])
    keys_and_values = 2 * heads * size * len(config.per_layer_config) * dtype.itemsize
    masks_and_indices = max_batch_tokens * dtype.itemsize + 8
    free = _free_memory(device)
    most = int(free * MEMORY_SHARE) // (page_size * (keys_and_values + masks_and_indices))
    least = -(-max(lengths) // page_size) + 1
    if most < least:
        raise ValueError(
            f"The longest request has {max(lengths)} ids with what it may write, {least} pages of {page_size}; {most} "
            f"fit into {MEMORY_SHARE:.0%} of the {free / 2**30:.1f} GiB of memory that are free. Lower "
            "max_new_tokens or max_length, or set num_blocks in a ContinuousBatchingConfig."
        )
    return min(sum(-(-length // page_size) + 1 for length in lengths), most)


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


__all__ = [
    "OBEYED",
    "PAGE_SIZE",
    "REFUSED",
    "WITHOUT_EFFECT",
    "check_model",
    "check_rotation",
    "check_settings",
    "num_pages",
    "sized",
]
