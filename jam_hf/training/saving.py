"""Whether a model can be saved, asked before it is trained for hours: all but the weights is written once."""

from __future__ import annotations

import tempfile
from typing import Any

from transformers import GenerationConfig, PreTrainedModel


def check_savable(model: PreTrainedModel, tokenizer: Any = None) -> None:
    """Save config, generation config and tokenizer (or processor) to a folder that is thrown away.

    transformers refuses some that it loads: a generation config with a temperature and without do_sample, say, once
    anything in it was changed.

    Raises:
        ValueError: if one of them cannot be saved, or the generation config cannot be read back; the message says what
            to change.
    """
    parts = {
        "config": (model.config, "model.config"),
        "generation config": (getattr(model, "generation_config", None), "model.generation_config"),
        "tokenizer": (tokenizer, "the tokenizer"),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, (part, where) in parts.items():
            if part is None:
                continue
            try:
                part.save_pretrained(folder)
                if isinstance(part, GenerationConfig):
                    GenerationConfig.from_pretrained(folder)
            except Exception as error:  # validators raise classes of their own
                raise ValueError(
                    f"The trained model could not be saved: its {name} cannot be written as it is. Correct {where} "
                    f"before training. transformers says: {error}"
                ) from error
