"""The stages of the quickstart: data, VQ model, parents, fusion, stage 1, stage 2, documents and measurements.

Each stage reads what earlier stages left in the run folder and leaves one folder or file of its own, whole or not at all; a
stage whose result is there is not run again. What depends on the pair of parents is parents.py, what is measured evaluation.py,
the page that shows it all page.py.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict

from ..contents import load_saved_dataset
from ..data.cm3 import CM3Settings
from ..data.collator import JamDataCollator, supports_packing
from ..data.sequences import mix_datasets
from ..files import read_json, whole_folder, write_whole
from ..model.configuration_jam_vq import JamVQConfig
from ..model.modeling_jam import JamForCausalLM
from ..model.modeling_jam_vq import JamVQModel
from ..model.processing_jam import JamProcessor
from ..picture_world import IMAGE_SIZE, build_howtos, build_pairs, build_texts
from ..picture_world.dataset import build_vq_pictures
from ..training.recipes import RecipeSettings, train_causal_lm
from ..training.vq import train_vq
from .parents import Lesson, parents_of
from .settings import QuickstartSettings


class Run:
    """A run folder and its settings; the methods are the stages, in order of `STAGES`."""

    def __init__(self, folder: str | os.PathLike, settings: QuickstartSettings | None = None):
        self.folder = Path(folder)
        self.settings = settings or QuickstartSettings()
        self.parents = parents_of(self)
        described = json.loads(json.dumps(asdict(self.settings)))
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"'{self.folder}' is a file; expected the folder of a run, or a new one.")
        path = self.folder / "settings.json"
        if path.is_file():
            before = read_json(path)
            changed = sorted(k for k in described if before.get(k) != described[k] and k != "train_all")
            if changed:
                raise ValueError(
                    f"'{self.folder}' holds a run with other settings ({', '.join(changed)}). Choose another folder, or "
                    "delete it to begin again."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(described, indent=1) + "\n")

    # ----- helpers ----------------------------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        return self.folder / name

    def results(self, stage: str) -> list[Path]:
        """What a stage leaves in the run folder."""
        if stage == "pretrain":
            return [self.path("pretrained") / f"jam-{mode}" for mode in self.trained_modes()]
        if stage == "instruct":
            return [self.path(f"jam-{mode}") for mode in self.parents.modes]
        return [self.path(STAGES[stage][0])]

    def need(self, name: str, stage: str) -> Path:
        path = self.path(name)
        if not path.exists():
            raise ValueError(f"'{path}' is missing; run the stage '{stage}' first (jam-hf {stage} --run {self.folder}).")
        return path

    def data(self, name: str) -> DatasetDict:
        return load_saved_dataset(self.need("data", "picture-world") / name)

    def vq(self) -> JamVQModel:
        return JamVQModel.from_pretrained(self.need("vq", "train-vq"), use_safetensors=True, trust_remote_code=False).eval()

    # ----- stages -----------------------------------------------------------------------------------------------------

    def picture_world(self) -> None:
        """Make the picture world: texts, caption-image pairs, how-tos."""
        with whole_folder(self.path("data")) as folder:
            for name, build in (("texts", build_texts), ("pairs", build_pairs), ("howtos", build_howtos)):
                build(self.settings.seed, self.settings.sizes).save_to_disk(str(folder / name))

    def make_tokenizer(self) -> None:
        """Train the BPE tokenizer that the parents share, or one for each of unlike parents."""
        with whole_folder(self.path("tokenizer")) as folder:
            self.parents.make_tokenizers(folder)

    def train_vq(self) -> None:
        """Train the VQ model on pictures, and measure what the scorer reads after a round trip."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        model = JamVQModel(
            JamVQConfig(
                sample_size=IMAGE_SIZE,
                block_out_channels=settings.vq_channels,
                layers_per_block=1,
                latent_channels=settings.vq_latents,
                num_vq_embeddings=settings.num_codes,
                norm_num_groups=4,
                mid_block_add_attention=False,
            )
        )
        history = train_vq(model, build_vq_pictures(settings.seed, settings.vq_pictures), settings.vq)
        with whole_folder(self.path("vq")) as folder:
            model.save_pretrained(folder)
            write_whole(folder / "history.json", json.dumps({"history": history}, indent=1) + "\n")

    def encode(self) -> None:
        """Turn every document into token ids, the pictures' codes computed once."""
        with whole_folder(self.path("encoded")) as folder:
            self.parents.encode(folder)

    def _train(self, lesson: Lesson, target: Path, recipe: RecipeSettings) -> None:
        if recipe.packing and not supports_packing(lesson.model.config):  # the stock OPT decoder
            recipe = replace(recipe, packing=False, group_by_length=True)
        train_causal_lm(lesson.model, lesson.documents, target, recipe, lesson.collator, tokenizer=lesson.tokenizer)

    def train_llm(self) -> None:
        """Train the LLM parent on text."""
        self._train(self.parents.llm(), self.path("llm"), self.settings.llm)

    def train_image_model(self) -> None:
        """Train the image parent on captions and image tokens."""
        self._train(self.parents.image_model(), self.path("image-model"), self.settings.image_model)

    def fuse(self) -> None:
        """Fuse the parents as uniform, width and cross; unlike parents as cross."""
        with whole_folder(self.path("fused")) as folder:
            self.parents.fuse(folder)

    def trained_modes(self) -> tuple[str, ...]:
        return self.parents.modes if self.settings.train_all else ("cross",)

    def _train_jam(self, source: Path, target: Path, recipe: RecipeSettings, data: Dataset, **cm3: Any) -> None:
        model = JamForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
        config = model.config
        collator = JamDataCollator(
            config.pad_token_id, config.vocab_size, CM3Settings.from_config(config, **cm3), seed=self.settings.seed
        )
        self._train(
            Lesson(model, data, collator, JamProcessor.from_pretrained(source, trust_remote_code=False)), target, recipe
        )

    def pretrain(self) -> None:
        """Stage 1: continued pretraining on texts and caption-image pairs with the CM3 objective."""
        recipe = self.settings.pretrain
        for mode in self.trained_modes():
            target = self.path("pretrained") / f"jam-{mode}"
            if target.exists():
                continue
            data = mix_datasets(
                {name: self.parents.documents(name)["train"] for name in ("texts", "pairs")},
                {"texts": 0.35, "pairs": 0.65},
                recipe.max_steps * recipe.batch_size,
                self.settings.seed,
            )
            source = self.need("fused", "fuse") / f"jam-{mode}"
            # The paper masks Poisson(1) spans in 300,000 steps; with a few hundred, more documents should stay as they are.
            self._train_jam(source, target, recipe, data, mean_spans=0.3, whole_segment_probability=0.05)

    def instruct(self) -> None:
        """Stage 2: instruct tuning on how-to dialogues, with pretraining data mixed in."""
        recipe = self.settings.instruct
        for mode in self.trained_modes():
            target = self.path(f"jam-{mode}")
            if target.exists():
                continue
            data = mix_datasets(
                {name: self.parents.documents(name)["train"] for name in ("texts", "pairs", "howtos")},
                {"texts": 0.15, "pairs": 0.53, "howtos": 0.32},
                recipe.max_steps * recipe.batch_size,
                self.settings.seed + 1,
            )
            source = self.need("pretrained", "pretrain") / f"jam-{mode}"
            self._train_jam(
                source, target, recipe, data, mean_spans=0.0, whole_segment_probability=0.03, text_segments_only=True
            )
        for mode in self.parents.modes:  # a JAM that is not trained stands beside the others as it was fused
            if mode not in self.trained_modes() and not self.path(f"jam-{mode}").exists():
                source = self.need("fused", "fuse") / f"jam-{mode}"
                with whole_folder(self.path(f"jam-{mode}")) as folder:
                    JamForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False).save_pretrained(
                        folder
                    )
                    JamProcessor.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)

    def evaluate(self) -> None:
        """Measure perplexity, divergence from the parents, and the share of unseen captions drawn right."""
        from .evaluation import measure

        write_whole(self.path("results.json"), json.dumps(measure(self), indent=1) + "\n")

    def write(self) -> None:
        """Let the fused model write interleaved documents and draw unseen captions."""
        from .page import write_documents

        with whole_folder(self.path("documents")) as folder:
            write_documents(self, folder)

    def page(self) -> None:
        """Put it all on one page, `index.html`."""
        from .page import render_page

        write_whole(self.path("index.html"), render_page(self))


# Name of the stage (and command), what it leaves in the run folder, and the method that runs it.
STAGES: dict[str, tuple[str, Callable[[Run], None]]] = {
    "picture-world": ("data", Run.picture_world),
    "tokenizer": ("tokenizer", Run.make_tokenizer),
    "train-vq": ("vq", Run.train_vq),
    "encode": ("encoded", Run.encode),
    "train-llm": ("llm", Run.train_llm),
    "train-image-model": ("image-model", Run.train_image_model),
    "fuse": ("fused", Run.fuse),
    "pretrain": ("pretrained", Run.pretrain),
    "instruct": ("jam-cross", Run.instruct),
    "write": ("documents", Run.write),
    "evaluate": ("results.json", Run.evaluate),
    "page": ("index.html", Run.page),
}


def run_stage(run: Run, name: str, force: bool = False) -> bool:
    """Run one stage unless its result is there; returns whether it ran. Its seconds go to `times.json`."""
    if name not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {name!r}.")
    _, method = STAGES[name]
    results = run.results(name)
    if force:
        for path in results:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            shutil.rmtree(f"{path}.run", ignore_errors=True)
    elif name != "page" and all(path.exists() for path in results):
        return False
    started = time.time()
    method(run)
    missing = [str(path) for path in results if not path.exists()]
    if missing:
        raise RuntimeError(
            f"The stage '{name}' ended without its result {', '.join(missing)}: a defect of jam_hf, please report it."
        )
    path = run.path("times.json")
    times = read_json(path) if path.is_file() else {}
    times[name] = round(time.time() - started, 1)
    write_whole(path, json.dumps(times, indent=1) + "\n")
    return True


def run_all(run: Run) -> Path:
    """All stages in order; returns the path of the page."""
    for number, name in enumerate(STAGES, 1):
        print(f"[{number}/{len(STAGES)}] {name}: {str(STAGES[name][1].__doc__).strip()}", flush=True)
        if not run_stage(run, name):
            print("    done before", flush=True)
    return run.path("index.html")


__all__ = ["STAGES", "QuickstartSettings", "Run", "run_all", "run_stage"]
