"""What a parent's config.json says of its weights before they are there: names, shapes and dtypes, for the dry run.

Models are built on the meta device: nothing is computed, nothing is fetched, no code of a checkpoint runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..model.configuration_jam_vq import JamVQConfig
from ..model.modeling_jam_vq import JamVQModel
from .multimodal import MULTIMODAL
from .tensor_files import TensorSpec


def specs_of(model: PreTrainedModel) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor that a checkpoint of the model holds: of tied ones, the first alone."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    state = model.state_dict()
    return {key: TensorSpec(tuple(value.shape), value.dtype) for key, value in state.items() if key not in tied}


def specs_from_config(config: PreTrainedConfig, role: str) -> dict[str, TensorSpec]:
    """Tensors of the checkpoint that transformers would save of a model of this config, in its `dtype` (float32 where
    none).

    Raises:
        ValueError: if no stock class computes such a model.
    """
    sees = getattr(config, "vision_config", None) or config.model_type in MULTIMODAL
    model_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = model_class.from_config(config, trust_remote_code=False)
    except Exception as error:  # of any model's constructor
        raise ValueError(f"The config of the {role} does not say which model it is: {error}") from error
    return specs_of(model.to(config.dtype or torch.float32))


def vq_model_from_config(source: str) -> JamVQModel:
    """A [`JamVQModel`] without weights, of a folder or Hub id of which the config alone is read."""
    config = JamVQConfig.from_pretrained(source, trust_remote_code=False)
    with torch.device("meta"):
        return JamVQModel(config)


def stand_in_tokenizer(config: PreTrainedConfig, rows: int, marks: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """As many tokens as the embedding has rows, none of which is known: for the sizes that a fusion will have.

    Where the config names tokens (`vocabulary_map`), they have these names. marks: special tokens that it has all the
    same.
    """
    names = {index: token for token, index in (getattr(config, "vocabulary_map", None) or {}).items()}
    text = config.get_text_config()
    ids = [getattr(text, f"{role}_token_id", None) for role in ("bos", "eos", "pad")]
    taken = {0, *names, *(i for each in ids for i in (each if isinstance(each, list) else [each]))}
    names |= dict(zip((index for index in range(rows) if index not in taken), marks))
    vocabulary = {names.get(index, f"token{index}"): index for index in range(rows)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=names.get(0, "token0")))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(marks))
    roles = {}
    for role in ("bos", "eos", "pad"):
        index = getattr(text, f"{role}_token_id", None)
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and 0 <= index < rows:
            roles[f"{role}_token"] = names.get(index, f"token{index}")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
