"""Loads JAM folders as someone does who has transformers and diffusers, but not jam_hf. test_remote_code.py runs it.

`python -I -S remote_child.py ARGUMENTS.json`: without site (`-S`) no editable install is found, and a guard refuses
jam_hf where it lies among the other packages. It writes what it found to a file of tensors; judging is the test's
business.
"""

from __future__ import annotations

import copy
import importlib.abc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Absent(importlib.abc.MetaPathFinder):
    """Refuses packages as if they were not installed."""

    def __init__(self, *names: str):
        self.names = set(names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    sys.path.extend(arguments["site_packages"])
    absent = Absent("jam_hf", "diffusers")
    sys.meta_path.insert(0, absent)
    try:
        import jam_hf
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit(f"jam_hf can be imported, from {jam_hf.__file__}: this shows nothing")

    import torch
    from transformers import AutoModelForCausalLM

    found: dict[str, Any] = {"errors": {}}
    first = next(iter(arguments["folders"].values()))
    for name, trust in (("not trusted", None), ("refused", False), ("without diffusers", True)):
        try:
            AutoModelForCausalLM.from_pretrained(first, trust_remote_code=trust)
        except (ValueError, ImportError) as error:
            found["errors"][name] = f"{type(error).__name__}: {error}"
    absent.names.discard("diffusers")
    for name, folder in arguments["folders"].items():
        target = arguments["save_to"].get(name)
        with torch.no_grad():
            found[name] = load(folder, Path(target) if target else None)
    return found


def load(folder: str, save_to: Path | None) -> dict[str, Any]:
    """What each Auto class makes of the folder, and a document by the causal LM."""
    import numpy
    import torch
    from PIL import Image
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
        AutoTokenizer,
    )

    trusted = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trusted)
    processor = AutoProcessor.from_pretrained(folder, **trusted)
    image_processor = AutoImageProcessor.from_pretrained(folder, **trusted)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
    models = {
        auto_class.__name__: auto_class.from_pretrained(folder, **trusted).eval()
        for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    }
    model = models["AutoModelForCausalLM"]
    objects = {"AutoConfig": config, "AutoProcessor": processor, "AutoImageProcessor": image_processor, **models}

    size = config.vq_config.sample_size
    picture = Image.fromarray(numpy.arange(size * size * 3, dtype=numpy.uint8).reshape(size, size, 3))
    inputs = processor(text="a ruby <image> is red<break>", images=[picture], return_tensors="pt")
    settings = {"generation_mode": "interleaved", "do_sample": False, "max_new_tokens": config.image_seq_length + 6}
    written = model.generate(**inputs, **settings)
    guided = model.generate(**inputs, **settings, guidance_scale=3.0)
    segments = processor.post_process_interleaved(written, model=model, prompt_length=inputs["input_ids"].shape[1])[0]
    ids = torch.arange(17, config.vocab_size).view(1, -1)[:, -48:]
    result = {
        "classes": {name: f"{type(thing).__module__}.{type(thing).__name__}" for name, thing in objects.items()},
        "prompt": inputs["input_ids"],
        "pixel_values": inputs["pixel_values"],
        "image_processor_pixels": image_processor([picture], return_tensors="pt")["pixel_values"],
        "tokenizer_ids": tokenizer("a small red circle", return_tensors="pt")["input_ids"],
        "written": written,
        "guided": guided,
        "text": [segment["text"] for segment in segments if segment["type"] == "text"],
        "pictures": [torch.tensor(numpy.array(s["image"])) for s in segments if s["type"] == "image"],
        "logits": model(ids).logits,
        "refused": refusals(model, processor, inputs),
        "base": models["AutoModel"](ids).last_hidden_state,
        "same": all(torch.equal(models[name](ids).logits, model(ids).logits) for name in models if name != "AutoModel"),
    }
    if save_to is not None:
        models["AutoModelForMultimodalLM"].save_pretrained(save_to / "whole")
        processor.save_pretrained(save_to / "whole")
        models["AutoModel"].save_pretrained(save_to / "base")
        processor.save_pretrained(save_to / "processor")
        image_processor.save_pretrained(save_to / "image_processor")
        config.save_pretrained(save_to / "config")
    return result


def refusals(model: Any, processor: Any, inputs: Any) -> dict[str, str]:
    """What each thing that a checkpoint does not carry says when it is asked for, by what stands for it in the
    message.
    """
    import tempfile

    parts = [{"role": "user", "content": [{"type": "text", "text": "a ruby"}]}]
    processor, one = copy.copy(processor), SimpleNamespace(pp_size=1, tp_size=1)
    processor.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    sampled = {**inputs, "generation_mode": "image", "do_sample": True}
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/story"
        asked = {
            "num_candidates": lambda: model.generate(**sampled, num_candidates=2),
            "retriever": lambda: model.generate(**sampled, retriever=_Nothing()),
            "memory": lambda: model.generate(**sampled, memory=_Nothing()),
            "generate_batch()": lambda: model.generate_batch([[1, 17]]),
            "JamProcessor.infill()": lambda: processor.infill("a ruby<mask>", model=model),
            "JamProcessor.post_process_infill()": lambda: processor.post_process_infill(None, None, model),
            "JamProcessor.save_html()": lambda: processor.save_html([], f"{file}.html"),
            "JamProcessor.save_markdown()": lambda: processor.save_markdown([], f"{file}.md"),
            "JamProcessor.save_json()": lambda: processor.save_json([], f"{file}.json"),
            "JamProcessor.load_json()": lambda: processor.load_json(f"{file}.json"),
            "JamProcessor.sentence_end_token_ids()": lambda: processor.sentence_end_token_ids(),
            "JamConfig.paper()": lambda: type(model.config).paper("uniform"),
            "A chat with parts": lambda: processor.apply_chat_template(parts),
            "split over processes": lambda: model.maybe_distribute_model(model, one, None),
        }
        return {name: _refusal(ask) for name, ask in asked.items()}


def _refusal(ask: Callable[[], Any]) -> str:
    try:
        ask()
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    except Exception:  # of what was asked for with too little
        pass
    return "nothing was refused"


class _Nothing:
    """A retriever that finds nothing."""

    def documents_for(self, model: Any, queries: Any) -> list[list[Any]]:
        return [[] for _ in queries]


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    results = main(given)
    import torch

    torch.save(results, given["results"])
