"""jam_hf: fuse a text LLM and an autoregressive image model into one model that writes text and pictures interleaved.

Importing it registers the JAM classes with transformers' Auto classes; the rest is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from ._moved import serve_old_names
from .model.configuration_jam import JamConfig
from .model.configuration_jam_vq import JamVQConfig
from .model.image_processing_jam import JamImageProcessor
from .model.modeling_jam import JamForCausalLM, JamModel
from .model.modeling_jam_vq import JamVQModel
from .model.package_jam import OFFERED
from .model.processing_jam import JamProcessor
from .version import __version__


if TYPE_CHECKING:
    from .fusion.fuse import fuse
    from .generation.streaming import AsyncJamStreamer, JamStreamer, stream, stream_async

# Names of the package that are imported when they are first asked for, and where they are.
_LAZY = {
    "AsyncJamStreamer": ".generation.streaming",
    "JamStreamer": ".generation.streaming",
    "fuse": ".fusion.fuse",
    "stream": ".generation.streaming",
    "stream_async": ".generation.streaming",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def _register() -> None:
    AutoConfig.register(JamConfig.model_type, JamConfig, exist_ok=True)
    AutoConfig.register(JamVQConfig.model_type, JamVQConfig, exist_ok=True)
    AutoModel.register(JamConfig, JamModel, exist_ok=True)
    AutoModel.register(JamVQConfig, JamVQModel, exist_ok=True)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(JamConfig, JamForCausalLM, exist_ok=True)
    AutoProcessor.register(JamConfig, JamProcessor, exist_ok=True)
    AutoImageProcessor.register(JamConfig, image_processor_classes={"pil": JamImageProcessor}, exist_ok=True)
    AutoTokenizer.register(JamConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)


# What a JAM has beside its checkpoint's code, imported when it is asked for (model/package_jam.py).
OFFERED |= {
    "custom_generate": "jam_hf.generation.custom_generate:custom_generate",
    "continuous_grammar": "jam_hf.integrations.continuous_batching:continuous_grammar",
    "generate_batch": "jam_hf.integrations.continuous_batching:generate_batch",
    "init_continuous_batching": "jam_hf.integrations.continuous_batching:init_continuous_batching",
    "block_cache": "jam_hf.generation.picture_steps:block_cache",
    "columns_beside": "jam_hf.generation.picture_steps:columns_beside",
    "packed_guidance": "jam_hf.generation.picture_steps:packed_guidance",
    "picture_steps": "jam_hf.generation.picture_steps:picture_steps",
    "infill": "jam_hf.generation.infilling:infill",
    "post_process_infill": "jam_hf.generation.infilling:post_process_infill",
    "document_end": "jam_hf.data.sequences:document_end",
    "prepared_chats": "jam_hf.data.chats:prepared_chats",
    "sentence_end_token_ids": "jam_hf.generation.sentences:sentence_end_token_ids",
    "save_html": "jam_hf.generation.export:save_html",
    "save_markdown": "jam_hf.generation.export:save_markdown",
    "save_json": "jam_hf.generation.export:save_json",
    "load_json": "jam_hf.generation.export:load_json",
    "name_codes_of": "jam_hf.data.code_names:name_codes_of",
    "check_parts": "jam_hf.fusion.config_checks:check_parts",
    "check_pairing": "jam_hf.fusion.config_checks:check_pairing",
    "paper": "jam_hf.fusion.paper:paper",
    "register_adapter_targets": "jam_hf.integrations.peft:register_adapter_targets",
    "model_loaded": "jam_hf.provenance:model_loaded",
    "catch_card_writers": "jam_hf.provenance:catch_card_writers",
    "before_saving": "jam_hf.provenance:before_saving",
    "drop_moved_files": "jam_hf._moved:drop_moved_files",
    "carry_on": "jam_hf.provenance:carry_on",
    "tensor_parallel_plan": "jam_hf.integrations.sharding:tensor_parallel_plan",
    "parallel_plans": "jam_hf.integrations.sharding:parallel_plans",
    "split_for": "jam_hf.integrations.sharding:split_for",
    "trl": "jam_hf.integrations.trl:answering_trl",
}
serve_old_names()
_register()

__all__ = [
    "AsyncJamStreamer",
    "JamConfig",
    "JamForCausalLM",
    "JamImageProcessor",
    "JamModel",
    "JamProcessor",
    "JamStreamer",
    "JamVQConfig",
    "JamVQModel",
    "__version__",
    "fuse",
    "stream",
    "stream_async",
]
