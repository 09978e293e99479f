"""What an adapter of peft adapts in a JAM where nobody says it."""

from __future__ import annotations

import functools

from ..model.class_names_jam import MODEL_TYPE
from ..model.families_jam import FAMILIES


@functools.cache
def register_adapter_targets() -> None:
    """Tell peft, where it is installed, what an adapter without `target_modules` adapts in a JAM.

    It is what peft has for its decoders, in every method for which peft treats their families alike, of those that it
    knows (LoRA: the queries and values of all attentions, those of both streams and of the cross blocks). Called once,
    when a JAM is built: importing peft takes its time, and where the VQ model is of diffusers' class, diffusers has
    brought it along by then.
    """
    try:
        from .private import constants
    except ImportError:
        return
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_TARGET_MODULES_MAPPING"):
            targets = [table[family] for family in FAMILIES if family in table]
            if targets and all(other == targets[0] for other in targets):
                table.setdefault(MODEL_TYPE, targets[0])
