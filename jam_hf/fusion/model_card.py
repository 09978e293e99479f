"""The README.md of a fused checkpoint: what it is made of and how to use it, in the form the Hub reads.

It knows words only; what they say comes from the plan of the fusion.
"""

from __future__ import annotations

import re

from huggingface_hub import ModelCardData

from ..checkpoints.licences import as_text
from ..version import __version__
from .parents import Decoder
from .plan import FusionPlan, preserved


_MODES = {
    "uniform": "uniform: one decoder, the parents' weights averaged",
    "width": "width: one decoder of twice the hidden size",
    "cross": "cross: both parents' decoders side by side, with cross-attention between them",
}

_BODY = """
# A Joint Autoregressive Mixture

It reads and writes text and pictures in one sequence of tokens. Made with `jam_hf.fuse` from two parents, after
[Jointly Training Large Autoregressive Multimodal Models](https://arxiv.org/abs/2309.15564).

<!-- jam provenance -->
| | |
|---|---|
| text parent | {text} |
| image parent | {image} |
| fusion | {mode} |
| init | {init} |
| pictures | {size}x{size} pixels, {length} codes out of {codes} |
| recipe | `{digest}` (jam_hf {version}; fusion.yaml) |

<!-- done since -->

## Since the fusion

A fusion is a starting point: it has not been trained jointly yet.

<!-- /done since -->
<!-- /jam provenance -->

## What was preserved

{preserved}
{vocabulary}
{notes}
## Recipe

```yaml
{recipe}```

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

Without it, leave the first line out and pass `trust_remote_code=True` to both `from_pretrained` calls: the code lies in
this repository; read it first. It needs `diffusers`, for the image tokenizer.

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


def model_card(plan: FusionPlan) -> str:
    """The text of README.md. A parent that lies in a folder or in memory is not named: its path is nobody's
    business.
    """
    config = plan.config
    names = [decoder.parent.hub_id for decoder in (plan.text, plan.image) if decoder.parent.hub_id]
    licences = {decoder.parent.license for decoder in (plan.text, plan.image)}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="any-to-any",
        tags=["jam", f"jam-{config.fusion_mode}"],
        base_model=list(dict.fromkeys(names)) or None,
        base_model_relation="merge" if names else None,
        **_licence_fields(licences),
    )
    body = _BODY.format(
        text=_linked(plan.text),
        image=_linked(plan.image),
        mode=_MODES[config.fusion_mode],
        init=plan.recipe.init,
        size=config.vq_config.sample_size,
        length=config.image_seq_length,
        codes=config.num_image_tokens,
        digest=plan.digest[:16],
        version=__version__,
        preserved=preserved(plan.recipe.mode, plan.recipe.init),
        vocabulary=_vocabulary(plan),
        notes="".join(f"- {_one_line(warning)}\n" for warning in plan.warnings),
        recipe=plan.recipe.to_yaml(),
        room=config.picture_length + 2,
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _one_line(text: str) -> str:
    """Sentences of ours that quote tokens and cards of others: no line breaks, no HTML."""
    return " ".join(text.split()).replace("<", "\\<")


def _licence_fields(licences: set[str | None]) -> dict[str, str | None]:
    """What the Hub reads: an identifier, or "other" and a name."""
    licence = next(iter(licences)) if len(licences) == 1 else "other"
    if licence is None or re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        return {"license": licence}
    return {"license": "other", "license_name": licence}


def _vocabulary(plan: FusionPlan) -> str:
    pairs = plan.config.layer_pairs
    lines = []
    if plan.text.config.num_hidden_layers != plan.image.config.num_hidden_layers and pairs:
        listing = ", ".join(f"{text}:{image}" for text, image in pairs)
        lines += ["", f"Layers side by side (text:image): {listing}."]
    if plan.vocabulary.coverage is not None:
        lines += ["", "The vocabulary is the text parent's. Rows of the image parent for its tokens:", ""]
        lines += [f"- {_one_line(line)}" for line in plan.vocabulary.coverage.lines()]
    return "\n".join(lines)


def _linked(decoder: Decoder) -> str:
    parent = decoder.parent
    if not parent.hub_id:
        name = "not on the Hub"
    else:
        name = f"[{parent.hub_id}](https://huggingface.co/{parent.hub_id})"
        name += f", revision `{parent.revision}`" if parent.revision else ""
    licence = as_text(parent.license) if parent.license else "not stated"
    return f"{name} ({type(parent.config).__name__.removesuffix('Config')}; licence: {licence})"
