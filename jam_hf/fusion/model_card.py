"""The README.md of a fused checkpoint: what it is made of and how to use it, in the form the Hub reads.

It knows names and words only; `fuse` says what the parents were.
"""

from __future__ import annotations

from huggingface_hub import ModelCardData

from ..model.configuration_jam import JamConfig


_MODES = {
    "uniform": "uniform: one decoder, the parents' weights averaged",
    "width": "width: one decoder of twice the hidden size",
    "cross": "cross: both parents' decoders side by side, with cross-attention between them",
}

_BODY = """
# A Joint Autoregressive Mixture

It reads and writes text and pictures in one sequence of tokens. Made with `jam_hf.fuse` from two parents, after
[Jointly Training Large Autoregressive Multimodal Models](https://arxiv.org/abs/2309.15564).

| | |
|---|---|
| text parent | {text} |
| image parent | {image} |
| fusion | {mode} |
| init | {init} |
| pictures | {size}x{size} pixels, {length} codes out of {codes} |

A fusion is a starting point: it has not been trained jointly yet.

## Use

With `jam_hf` installed, importing it is all that is needed:

```python
import jam_hf
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("path/or/id")
processor = AutoProcessor.from_pretrained("path/or/id")
inputs = processor(text="A small red circle:", return_tensors="pt")
output = model.generate(**inputs, generation_mode="interleaved")
segments = processor.post_process_interleaved(output, model, prompt_length=inputs["input_ids"].shape[1])[0]
```

Without it, leave the first line out and pass `trust_remote_code=True` to both `from_pretrained` calls: the code lies in this
repository; read it first. It needs `diffusers`, for the image tokenizer.

## Pipelines

`pipeline("text-generation")` and `pipeline("image-text-to-text")` work as they are. `pipeline("any-to-any")` needs
**torchvision**, which transformers asks for wherever a model reads pictures (the model itself does not use it).

```python
from transformers import pipeline

pipe = pipeline("any-to-any", model="path/or/id")  # trust_remote_code=True where jam_hf is not imported
pipe.model.generation_config.generation_mode = "text"  # as text is shown without its pictures, write none
pipe(text="A ruby is", max_new_tokens=32)[0]["generated_text"]
pipe(text="A small red circle:", generation_mode="image", max_new_tokens={room})[0]["generated_image"]
```
"""


def model_card(config: JamConfig, init: str, text: str | None, image: str | None) -> str:
    """The text of README.md.

    Args:
        config: the JAM's. init: as `fuse` takes it.
        text, image: Hub ids of the parents; None for one that lies in a folder or in memory (its path is nobody's business).
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="any-to-any",
        tags=["jam", f"jam-{config.fusion_mode}"],
        base_model=list(dict.fromkeys(name for name in (text, image) if name)) or None,
        base_model_relation="merge" if text or image else None,
    )
    body = _BODY.format(
        text=_linked(text),
        image=_linked(image),
        mode=_MODES[config.fusion_mode],
        init=init,
        size=config.vq_config.sample_size,
        length=config.image_seq_length,
        codes=config.num_image_tokens,
        room=config.image_seq_length + 2,
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _linked(name: str | None) -> str:
    return f"[{name}](https://huggingface.co/{name})" if name else "not on the Hub"
