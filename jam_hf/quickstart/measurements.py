"""The measurements of a quickstart run: perplexities, divergence from the parents, unseen captions drawn right.

It knows the run folder and what its parents have in common; it trains nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForCausalLM, ChameleonForConditionalGeneration

from ..evaluation.drawing import drawing_accuracy
from ..evaluation.perplexity import divergence, perplexity
from ..evaluation.retention import certify
from ..fusion.fuse import fuse
from ..fusion.parents import code_ids, picture_layout
from ..model.image_processing_jam import JamImageProcessor
from ..model.modeling_jam import JamForCausalLM
from ..model.processing_jam import JamProcessor
from ..picture_world import Picture, score_picture
from ..reading import read_whole
from ..training.vq import encode_images
from .pairs import parents_of
from .run import Run
from .unlike_parents import with_image_logits


# torch's fused attention is made for long sequences; for these, on a CPU, the plain one is faster.
_EVALUATION = {"attn_implementation": "eager"}
_UNSEEN = ("unseen_single", "unseen_pair")


def measure(run: Run) -> dict[str, Any]:
    """All figures of a run, as one JSON object."""
    measured = _UnlikeParents(run) if run.settings.family == "unlike" else _SharedParents(run)
    models = measured.models()
    return {"vq_round_trip": measured.round_trip(), "models": models, "guidance_scale": run.settings.guidance_scale}


def _half(dataset: Dataset) -> Dataset:
    """For divergences: thousands of tokens are enough."""
    return dataset.select(range(-(-len(dataset) // 2)))


def _shares(scores: list[Any]) -> dict[str, float]:
    return {
        "correct": sum(s.correct for s in scores) / len(scores),
        "exact": sum(s.exact for s in scores) / len(scores),
        "count": len(scores),
    }


class _Measurements:
    """What is measured of every run."""

    codes: range  # of image codes in the JAM's ids

    def __init__(self, run: Run):
        self.run, self.parents = run, parents_of(run)
        self.texts = self.parents.documents("texts")["validation"]
        self.pairs = self.parents.documents("pairs")["validation"]

    def _perplexities(self, model: Any) -> dict[str, float]:
        text = perplexity(model, self.texts, self.codes)
        pair = perplexity(model, self.pairs, self.codes)
        return {
            "text": text.perplexity,
            "caption_image": pair.perplexity,
            "caption": pair.text_perplexity,
            "image": pair.image_perplexity,
        }

    def _trained_perplexities(self) -> dict[str, Any]:
        models: dict[str, Any] = {}
        for mode in self.run.trained_modes:
            for folder, name in (("pretrained/jam-{}", "jam-{}, stage 1"), ("jam-{}", "jam-{}, stage 2")):
                model = read_whole(JamForCausalLM, self.run.path(folder.format(mode)), **_EVALUATION)
                models[name.format(mode)] = {"perplexity": self._perplexities(model)}
        return models

    def _add_drawing(self, models: dict[str, Any]) -> None:
        scales = {"plain": None, "guided": self.run.settings.guidance_scale}
        for mode in self.run.trained_modes:
            models[f"jam-{mode}, stage 2"]["drawing"] = self._drawing(self.run.path(f"jam-{mode}"), scales)

    def _drawing(self, folder: Path, scales: dict[str, float | None]) -> dict[str, dict[str, float]]:
        results = {}
        model, processor = (
            read_whole(JamForCausalLM, folder, **_EVALUATION),
            JamProcessor.from_pretrained(folder, trust_remote_code=False),
        )
        pairs = self.run.data("pairs")
        for split in _UNSEEN:
            expected = [Picture.from_json(text) for text in pairs[split]["picture"]]
            for name, scale in scales.items():
                drawn = drawing_accuracy(
                    model,
                    processor,
                    list(pairs[split]["caption"]),
                    expected,
                    score_picture,
                    guidance_scale=scale,
                    description=f"drawing {split}, {name}",
                )
                results[f"{split}_{name}"] = {"correct": drawn.correct, "exact": drawn.exact, "count": len(expected)}
        return results

    def round_trip(self) -> dict[str, float]:
        vq, pairs = self.run.vq(), self.run.data("pairs")
        processor = JamImageProcessor.from_vq_config(vq.config)
        images = [image for split in ("validation", "unseen_single", "unseen_pair") for image in pairs[split]["image"]]
        expected = [
            Picture.from_json(p) for s in ("validation", "unseen_single", "unseen_pair") for p in pairs[s]["picture"]
        ]
        codes = torch.from_numpy(encode_images(vq, images))
        decoded = [picture for part in codes.split(100) for picture in processor.postprocess(vq.decode(part))]
        scores = [score_picture(image, picture) for image, picture in zip(decoded, expected)]
        return _shares(scores)


class _SharedParents(_Measurements):
    """One vocabulary: every model reads the same ids."""

    def __init__(self, run: Run):
        super().__init__(run)
        self.codes = self.parents.image_token_range  # type: ignore[union-attr]

    def models(self) -> dict[str, Any]:
        run = self.run
        models: dict[str, Any] = {}
        parents = {
            name: read_whole(AutoModelForCausalLM, run.path(name), **_EVALUATION) for name in ("llm", "image-model")
        }
        models["LLM parent"] = {"perplexity": self._perplexities(parents["llm"])}
        models["image parent"] = {"perplexity": self._perplexities(parents["image-model"])}
        first, last = self.codes.start, self.codes.stop

        candidates = {
            "jam-uniform, fused": ("uniform", None),
            "jam-width copy, fused": ("width", "copy"),
            "jam-width average, fused": ("width", "average"),
            "jam-width block_diagonal, fused": ("width", "block_diagonal"),
            "jam-cross preserving, fused": ("cross", None),
        }
        for name, (mode, init) in candidates.items():
            folder = run.path("fused") / f"jam-{mode}"
            if init not in (None, "copy"):
                folder = run.path("fused") / f"jam-{mode}-{init}"
                if not folder.exists():
                    fuse(run.path("llm"), run.path("image-model"), mode, folder, init=init, vq_model=run.path("vq"))
            model = read_whole(JamForCausalLM, folder, **_EVALUATION)
            models[name] = {
                "perplexity": self._perplexities(model),
                "kl_to_llm": divergence(parents["llm"], model, _half(self.texts), (0, first)),
                "kl_to_image_parent": divergence(parents["image-model"], model, _half(self.pairs), (first, last)),
            }
        models |= self._trained_perplexities()
        image_parent = run.path("fused") / "image-parent"  # the mean of a model and itself is that model
        if not image_parent.exists():
            fuse(run.path("image-model"), run.path("image-model"), "uniform", image_parent, vq_model=run.path("vq"))
        models["image parent"]["drawing"] = self._drawing(image_parent, {"plain": None})
        self._add_drawing(models)
        return models


class _UnlikeParents(_Measurements):
    """Each parent reads in its own ids; what is compared is what both say of the same texts and the same image
    codes.
    """

    def __init__(self, run: Run):
        super().__init__(run)
        config = JamForCausalLM.config_class.from_pretrained(run.path("fused") / "jam-cross", trust_remote_code=False)
        self.codes = config.image_token_range

    def models(self) -> dict[str, Any]:
        run, name = self.run, "jam-cross preserving, fused"
        llm = read_whole(AutoModelForCausalLM, run.path("llm"), **_EVALUATION)
        fused = read_whole(JamForCausalLM, run.path("fused") / "jam-cross", **_EVALUATION)
        kept = self._retention(run.path("fused") / "jam-cross")
        models: dict[str, Any] = {
            "LLM parent": {"perplexity": {"text": perplexity(llm, self.texts, self.codes).perplexity}},
            "image parent": {"perplexity": {"image": kept.image.parent_perplexity}},
            name: {
                "perplexity": self._perplexities(fused),
                "kl_to_llm": kept.text.kl,
                "kl_to_image_parent": kept.image.kl,
            },
        }
        models |= self._trained_perplexities()
        models["image parent"]["drawing"] = self._image_parents_drawing()
        models[name]["drawing"] = self._drawing(run.path("fused") / "jam-cross", {"plain": None})
        self._add_drawing(models)
        return models

    def _retention(self, jam: Path) -> Any:
        """`jam-hf certify`, on half of the validation documents."""
        texts, pairs = (_half(self.run.data(name)["validation"]) for name in ("texts", "pairs"))
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "texts.txt"
            written.write_text("\n\n".join(texts["text"]), encoding="utf-8")
            pairs.select_columns(["image", "caption"]).rename_column("caption", "text").save_to_disk(f"{folder}/pairs")
            return certify(
                jam,
                text_parent=self.run.path("llm"),
                image_parent=self.run.path("image-model"),
                texts=written,
                pairs=f"{folder}/pairs",
                batch_size=32,
                device="cpu",
                write=False,
            )

    def _image_parents_drawing(self) -> dict[str, dict[str, float]]:
        model = read_whole(ChameleonForConditionalGeneration, self.run.path("image-model"), **_EVALUATION)
        tokenizer, vq, pairs, results = self.parents.tokenizer("image-model"), self.run.vq(), self.run.data("pairs"), {}
        for split in _UNSEEN:
            expected = [Picture.from_json(text) for text in pairs[split]["picture"]]
            images = draw_with_chameleon(model, tokenizer, vq, list(pairs[split]["caption"]))
            scores = [score_picture(image, picture) for image, picture in zip(images, expected)]
            results[f"{split}_plain"] = _shares(scores)
        return results


@torch.no_grad()
def draw_with_chameleon(
    model: Any, tokenizer: Any, vq: Any, captions: list[str], batch_size: int = 50
) -> list[Image.Image]:
    """One picture for each caption by a Chameleon alone, greedily: its own `generate`, with nothing but codes
    allowed.
    """
    config, size = with_image_logits(model).config, vq.config.grid_size
    codes = code_ids(config, config.vocab_size, vq.config.num_vq_embeddings, tokenizer, None, "image parent")
    begin = picture_layout(config, tokenizer, codes, size, "image parent").begin
    code_of = torch.full((config.vocab_size,), -1)
    code_of[codes] = torch.arange(len(codes))
    others = (code_of < 0).nonzero().flatten().tolist()
    images: list[Image.Image] = []
    for start in range(0, len(captions), batch_size):
        inputs = tokenizer(captions[start : start + batch_size], padding=True, padding_side="left", return_tensors="pt")
        ids = torch.nn.functional.pad(inputs["input_ids"], (0, 1), value=begin)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        written = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=size**2, do_sample=False, suppress_tokens=others
        )
        pixels = vq.decode(code_of[written[:, ids.shape[1] :]]).clamp(*vq.config.pixel_range)
        images += JamImageProcessor.from_vq_config(vq.config).postprocess(pixels)
    return images
