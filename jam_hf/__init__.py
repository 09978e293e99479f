"""jam_hf: fuse a text LLM and an autoregressive image model into one model that writes text and pictures interleaved.

Importing it registers the JAM classes with transformers' Auto classes.
"""

import gc


# A million objects are made by these imports and none of them is garbage: looking for it costs a fifth of their time.
_collecting = gc.isenabled()
gc.disable()
try:
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

    from .fusion import fuse
    from .model.configuration_jam import JamConfig, JamVQConfig
    from .model.image_processing_jam import JamImageProcessor
    from .model.modeling_jam import JamForCausalLM, JamModel
    from .model.modeling_jam_vq import JamVQModel
    from .model.processing_jam import JamProcessor
    from .model.streaming_jam import AsyncJamStreamer, JamStreamer, stream, stream_async
    from .version import __version__
finally:
    if _collecting:
        gc.enable()


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
