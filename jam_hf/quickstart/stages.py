"""The stages of the quickstart: data, VQ model, parents, fusion, stage 1, stage 2, documents and measurements.

Each stage reads what earlier stages left in the run folder and leaves one folder or file of its own, whole or not at
all; a stage whose result is there is not run again. What depends on the pair of parents is pairs.py, what is measured
measurements.py, the page that shows it all page.py.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

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
from ..reading import read_whole
from ..training.recipes import RecipeSettings, train_causal_lm
from ..training.vq import train_vq
from .lessons import Lesson
from .measurements import measure
from .page import render_page, write_documents
from .pairs import parents_of
from .run import Run
from .settings import QuickstartSettings


def picture_world(run: Run) -> None:
    """Make the picture world: texts, caption-image pairs, how-tos."""
    with whole_folder(run.path("data")) as folder:
        for name, build in (("texts", build_texts), ("pairs", build_pairs), ("howtos", build_howtos)):
            build(run.settings.seed, run.settings.sizes).save_to_disk(str(folder / name))


def make_tokenizer(run: Run) -> None:
    """Train the BPE tokenizer that the parents share, or one for each of unlike parents."""
    with whole_folder(run.path("tokenizer")) as folder:
        parents_of(run).make_tokenizers(folder)


def train_vq_model(run: Run) -> None:
    """Train the VQ model on pictures, and measure what the scorer reads after a round trip."""
    settings = run.settings
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
    pictures = build_vq_pictures(settings.seed, settings.vq_pictures)
    history = train_vq(model, pictures, replace(settings.vq, seed=settings.seed))
    with whole_folder(run.path("vq")) as folder:
        model.save_pretrained(folder)
        write_whole(folder / "history.json", json.dumps({"history": history}, indent=1) + "\n")


def encode(run: Run) -> None:
    """Turn every document into token ids, the pictures' codes computed once."""
    with whole_folder(run.path("encoded")) as folder:
        parents_of(run).encode(folder)


def _train(run: Run, lesson: Lesson, target: Path, recipe: RecipeSettings) -> None:
    recipe = replace(recipe, seed=run.settings.seed)
    if recipe.packing and not supports_packing(lesson.model.config):  # the stock OPT decoder
        recipe = replace(recipe, packing=False, group_by_length=True)
    train_causal_lm(lesson.model, lesson.documents, target, recipe, lesson.collator, tokenizer=lesson.tokenizer)


def train_llm(run: Run) -> None:
    """Train the LLM parent on text."""
    _train(run, parents_of(run).llm(), run.path("llm"), run.settings.llm)


def train_image_model(run: Run) -> None:
    """Train the image parent on captions and image tokens."""
    _train(run, parents_of(run).image_model(), run.path("image-model"), run.settings.image_model)


def fuse(run: Run) -> None:
    """Fuse the parents as uniform, width and cross; unlike parents as cross."""
    with whole_folder(run.path("fused")) as folder:
        parents_of(run).fuse(folder)


def _train_jam(run: Run, source: Path, target: Path, recipe: RecipeSettings, data: Dataset, **cm3: Any) -> None:
    model = read_whole(JamForCausalLM, source)
    config = model.config
    collator = JamDataCollator(
        config.pad_token_id, config.vocab_size, CM3Settings.from_config(config, **cm3), seed=run.settings.seed
    )
    lesson = Lesson(model, data, collator, JamProcessor.from_pretrained(source, trust_remote_code=False))
    _train(run, lesson, target, recipe)


def pretrain(run: Run) -> None:
    """Stage 1: continued pretraining on texts and caption-image pairs with the CM3 objective."""
    recipe = run.settings.pretrain
    for mode in run.trained_modes:
        target = run.path("pretrained") / f"jam-{mode}"
        if target.exists():
            continue
        data = mix_datasets(
            {name: parents_of(run).documents(name)["train"] for name in ("texts", "pairs")},
            {"texts": 0.35, "pairs": 0.65},
            recipe.max_steps * recipe.batch_size,
            run.settings.seed,
        )
        source = run.need("fused", "fuse") / f"jam-{mode}"
        # The paper masks Poisson(1) spans in 300,000 steps; with a few hundred, more documents should stay as they are.
        _train_jam(run, source, target, recipe, data, mean_spans=0.3, whole_segment_probability=0.05)


def instruct(run: Run) -> None:
    """Stage 2: instruct tuning on how-to dialogues, with pretraining data mixed in."""
    recipe = run.settings.instruct
    for mode in run.trained_modes:
        target = run.path(f"jam-{mode}")
        if target.exists():
            continue
        data = mix_datasets(
            {name: parents_of(run).documents(name)["train"] for name in ("texts", "pairs", "howtos")},
            {"texts": 0.15, "pairs": 0.53, "howtos": 0.32},
            recipe.max_steps * recipe.batch_size,
            run.settings.seed + 1,
        )
        source = run.need("pretrained", "pretrain") / f"jam-{mode}"
        _train_jam(
            run, source, target, recipe, data, mean_spans=0.0, whole_segment_probability=0.03, text_segments_only=True
        )
    for mode in run.modes:  # a JAM that is not trained stands beside the others as it was fused
        if mode not in run.trained_modes and not run.path(f"jam-{mode}").exists():
            source = run.need("fused", "fuse") / f"jam-{mode}"
            with whole_folder(run.path(f"jam-{mode}")) as folder:
                read_whole(JamForCausalLM, source).save_pretrained(folder)
                JamProcessor.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)


def evaluate(run: Run) -> None:
    """Measure perplexity, divergence from the parents, and the share of unseen captions drawn right."""
    write_whole(run.path("results.json"), json.dumps(measure(run), indent=1) + "\n")


def write(run: Run) -> None:
    """Let the fused model write interleaved documents and draw unseen captions."""
    with whole_folder(run.path("documents")) as folder:
        write_documents(run, folder)


def page(run: Run) -> None:
    """Put it all on one page, `index.html`."""
    write_whole(run.path("index.html"), render_page(run))


# Name of the stage (and command), what it leaves in the run folder, and the function that does it.
STAGES: dict[str, tuple[str, Callable[[Run], None]]] = {
    "picture-world": ("data", picture_world),
    "tokenizer": ("tokenizer", make_tokenizer),
    "train-vq": ("vq", train_vq_model),
    "encode": ("encoded", encode),
    "train-llm": ("llm", train_llm),
    "train-image-model": ("image-model", train_image_model),
    "fuse": ("fused", fuse),
    "pretrain": ("pretrained", pretrain),
    "instruct": ("jam-cross", instruct),
    "write": ("documents", write),
    "evaluate": ("results.json", evaluate),
    "page": ("index.html", page),
}


def results(run: Run, stage: str) -> list[Path]:
    """What a stage leaves in the run folder."""
    if stage == "pretrain":
        return [run.path("pretrained") / f"jam-{mode}" for mode in run.trained_modes]
    if stage == "instruct":
        return [run.path(f"jam-{mode}") for mode in run.modes]
    return [run.path(STAGES[stage][0])]


def run_stage(run: Run, name: str, force: bool = False) -> bool:
    """Run one stage unless its result is there; returns whether it ran. Its seconds go to `times.json`."""
    if name not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {name!r}.")
    _, do = STAGES[name]
    paths = results(run, name)
    if force:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            shutil.rmtree(f"{path}.run", ignore_errors=True)
    elif name != "page" and all(path.exists() for path in paths):
        return False
    started = time.time()
    do(run)
    missing = [str(path) for path in paths if not path.exists()]
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
