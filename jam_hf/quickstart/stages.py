"""The stages of the quickstart: data, VQ model, parents, fusion, stage 1, stage 2, documents and measurements.

Each stage reads what earlier stages left in the run folder and leaves one folder or file of its own, whole or not at all; a
stage whose result is there is not run again. The page that shows it all is page.py.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from ..evaluation.drawing import drawing_accuracy
from ..evaluation.perplexity import divergence, perplexity
from ..files import whole_folder, write_whole
from ..fusion import fuse
from ..model.configuration_jam import JamVQConfig
from ..model.modeling_jam import JamForCausalLM
from ..model.modeling_jam_vq import JamVQModel
from ..model.processing_jam import JamProcessor
from ..picture_world import (
    IMAGE_SIZE,
    Picture,
    PictureWorldSizes,
    build_howtos,
    build_pairs,
    build_texts,
    score_picture,
)
from ..picture_world.dataset import build_vq_pictures
from ..training.cm3 import CM3Settings
from ..training.collator import JamDataCollator, supports_packing
from ..training.documents import encode_documents, mix_datasets
from ..training.embeddings import initialise_image_embeddings
from ..training.recipes import RecipeSettings, train_causal_lm
from ..training.tokenizer import train_tokenizer
from ..training.vq import VQTrainingSettings, encode_images, train_vq


MODES = ("uniform", "width", "cross")


def _recipe(max_steps: int, learning_rate: float, muon_learning_rate: float, decay: float, **settings: Any) -> Any:
    """A field with a recipe of the quickstart's: Muon, small batches, linear decay over the last share `decay` of the steps."""
    return field(
        default_factory=lambda: RecipeSettings(
            max_steps=max_steps,
            batch_size=16,
            learning_rate=learning_rate,
            muon_learning_rate=muon_learning_rate,
            schedule="warmup_stable_decay",
            decay_steps=int(decay * max_steps),
            attn_implementation="eager",
            float32_matmul_precision="medium",
            **settings,
        )
    )


@dataclass(frozen=True)
class QuickstartSettings:
    """Everything that decides what a quickstart makes; kept in `settings.json` of the run folder.

    `small()` is the same path in seconds, for tests: its models have learned nothing.
    """

    seed: int = 0
    sizes: PictureWorldSizes = field(default_factory=PictureWorldSizes)
    vq_pictures: int = 3000
    vq: VQTrainingSettings = field(default_factory=VQTrainingSettings)
    vq_channels: tuple[int, ...] = (8, 16, 32, 64)
    vq_latents: int = 32
    num_codes: int = 384
    text_vocab_size: int = 700
    family: str = "llama"
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 512
    initializer_range: float = 0.06  # about d^-0.5; at 0.02 so narrow a model learns half as fast
    llm: RecipeSettings = _recipe(400, 3e-3, 0.01, decay=0.4, packing=True)
    image_model: RecipeSettings = _recipe(600, 3e-3, 0.006, decay=0.4, packing=True)
    pretrain: RecipeSettings = _recipe(300, 1.5e-3, 0.005, decay=0.3, warmup_steps=30, packing=True)
    instruct: RecipeSettings = _recipe(470, 1.2e-3, 0.004, decay=0.9, warmup_steps=15, packing=True)
    guidance_scale: float = 1.25
    num_documents: int = 8
    document_tokens: int = 320
    train_all: bool = False

    @classmethod
    def small(cls) -> QuickstartSettings:
        recipe = RecipeSettings(max_steps=3, batch_size=4, warmup_steps=1, save_steps=2, logging_steps=1, packing=True)
        return cls(
            sizes=PictureWorldSizes(texts=40, pairs=40, howtos=10, validation=6, unseen=4),
            vq_pictures=24,
            vq=VQTrainingSettings(steps=50, warmup_steps=25, batch_size=4),
            vq_channels=(4, 4, 4, 8),
            vq_latents=4,
            num_codes=24,
            text_vocab_size=400,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            intermediate_size=24,
            llm=recipe,
            image_model=recipe,
            pretrain=recipe,
            instruct=recipe,
            num_documents=2,
            document_tokens=60,
        )


class Run:
    """A run folder and its settings; the methods are the stages, in order of `STAGES`."""

    def __init__(self, folder: str | os.PathLike, settings: QuickstartSettings | None = None):
        self.folder = Path(folder)
        self.settings = settings or QuickstartSettings()
        described = json.loads(json.dumps(asdict(self.settings)))
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"'{self.folder}' is a file; expected the folder of a run, or a new one.")
        path = self.folder / "settings.json"
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
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
            return [self.path("pretrained") / f"jam-{mode}" for mode in self._trained_modes()]
        if stage == "instruct":
            return [self.path(f"jam-{mode}") for mode in MODES]
        return [self.path(STAGES[stage][0])]

    def _need(self, name: str, stage: str) -> Path:
        path = self.path(name)
        if not path.exists():
            raise ValueError(f"'{path}' is missing; run the stage '{stage}' first (jam-hf {stage} --run {self.folder}).")
        return path

    def data(self, name: str) -> DatasetDict:
        return load_from_disk(str(self._need("data", "picture-world") / name))

    def encoded(self, name: str) -> Dataset:
        return load_from_disk(str(self._need("encoded", "encode") / name))

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._need("tokenizer", "tokenizer"))

    def vq(self) -> JamVQModel:
        return JamVQModel.from_pretrained(self._need("vq", "train-vq")).eval()

    def _image_token_range(self) -> tuple[int, int]:
        first = self.tokenizer().convert_tokens_to_ids("<img:0>")
        return first, first + self.settings.num_codes

    def _collator(self, tokenizer: Any, **cm3: Any) -> JamDataCollator:
        ids = {t: tokenizer.convert_tokens_to_ids(t) for t in ("<mask>", "</mask>", "<break>")}
        settings = CM3Settings(
            mask_token_id=ids["<mask>"],
            num_mask_tokens=ids["</mask>"] - ids["<mask>"],
            mask_end_token_id=ids["</mask>"],
            boundary_token_ids=(ids["<break>"], tokenizer.bos_token_id, tokenizer.eos_token_id),
            image_token_range=self._image_token_range(),
            **cm3,
        )
        vocab_size = self._image_token_range()[1]
        return JamDataCollator(tokenizer.pad_token_id, vocab_size, settings, seed=self.settings.seed)

    # ----- stages -----------------------------------------------------------------------------------------------------

    def picture_world(self) -> None:
        """Make the picture world: texts, caption-image pairs, how-tos."""
        with whole_folder(self.path("data")) as folder:
            for name, build in (("texts", build_texts), ("pairs", build_pairs), ("howtos", build_howtos)):
                build(self.settings.seed, self.settings.sizes).save_to_disk(str(folder / name))

    def make_tokenizer(self) -> None:
        """Train the shared BPE tokenizer."""
        texts = [*self.data("texts")["train"]["text"][:5000], *self.data("pairs")["train"]["caption"][:5000]]
        messages = [json.loads(row) for row in self.data("howtos")["train"]["messages"][:2000]]
        texts += [part["text"] for m in messages for turn in m for part in turn["content"] if part["type"] == "text"]
        tokenizer = train_tokenizer(texts, self.settings.text_vocab_size, self.settings.num_codes)
        with whole_folder(self.path("tokenizer")) as folder:
            tokenizer.save_pretrained(folder)

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
        tokenizer, vq = self.tokenizer(), self.vq()
        with whole_folder(self.path("encoded")) as folder:
            for name in ("texts", "pairs", "howtos"):
                splits = self.data(name)
                encoded = {
                    split: encode_documents(
                        dataset, tokenizer, lambda x: encode_images(vq, x), description=f"encoding {name} {split}"
                    )
                    for split, dataset in splits.items()
                    if not split.startswith("unseen")
                }
                DatasetDict(encoded).save_to_disk(str(folder / name))

    def _parent(self) -> Any:
        s, tokenizer = self.settings, self.tokenizer()
        common = {
            "vocab_size": self._image_token_range()[1],
            "hidden_size": s.hidden_size,
            "num_hidden_layers": s.num_layers,
            "num_attention_heads": s.num_heads,
            "max_position_embeddings": 512,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": False,
        }
        torch.manual_seed(s.seed)
        if s.family == "llama":
            return LlamaForCausalLM(
                LlamaConfig(
                    intermediate_size=s.intermediate_size,
                    num_key_value_heads=s.num_heads,
                    initializer_range=s.initializer_range,
                    **common,
                )
            )
        if s.family == "opt":  # the paper's architecture: no biases, no LayerNorm parameters, no dropout
            return OPTForCausalLM(
                OPTConfig(
                    ffn_dim=s.intermediate_size,
                    enable_bias=False,
                    layer_norm_elementwise_affine=False,
                    dropout=0.0,
                    activation_function="gelu",
                    init_std=s.initializer_range,
                    **common,
                )
            )
        raise ValueError(f"QuickstartSettings: family must be 'llama' or 'opt', got {s.family!r}.")

    def _train(
        self, model: Any, data: Dataset, target: Path, recipe: RecipeSettings, collator: JamDataCollator, tokenizer: Any
    ) -> None:
        if recipe.packing and not supports_packing(model.config):  # the stock OPT decoder
            recipe = replace(recipe, packing=False, group_by_length=True)
        train_causal_lm(model, data, target, recipe, collator, tokenizer=tokenizer)

    def train_llm(self) -> None:
        """Train the LLM parent on text."""
        tokenizer = self.tokenizer()
        collator = self._collator(tokenizer, mean_spans=0.0, whole_segment_probability=0.0)
        self._train(self._parent(), self.encoded("texts")["train"], self.path("llm"), self.settings.llm, collator, tokenizer)

    def train_image_model(self) -> None:
        """Train the image parent on captions and image tokens."""
        tokenizer, model = self.tokenizer(), self._parent()
        documents = self.encoded("pairs")["train"]
        std = 1.5 * self.settings.initializer_range
        initialise_image_embeddings(
            model, self.vq(), self._image_token_range()[0], std, documents[:8000]["input_ids"], self.settings.seed
        )
        collator = self._collator(tokenizer, mean_spans=0.0, whole_segment_probability=0.03, text_segments_only=True)
        self._train(model, documents, self.path("image-model"), self.settings.image_model, collator, tokenizer)

    def fuse(self) -> None:
        """Fuse the parents as uniform, width and cross."""
        llm, image = self._need("llm", "train-llm"), self._need("image-model", "train-image-model")
        with whole_folder(self.path("fused")) as folder:
            for mode in MODES:
                fuse(llm, image, mode, folder / f"jam-{mode}", vq_model=self.path("vq"), seed=self.settings.seed)

    def _trained_modes(self) -> tuple[str, ...]:
        return MODES if self.settings.train_all else ("cross",)

    def _train_jam(self, source: Path, target: Path, recipe: RecipeSettings, data: Dataset, **cm3: Any) -> None:
        model = JamForCausalLM.from_pretrained(source)
        processor = JamProcessor.from_pretrained(source)
        self._train(model, data, target, recipe, self._collator(processor.tokenizer, **cm3), processor)

    def pretrain(self) -> None:
        """Stage 1: continued pretraining on texts and caption-image pairs with the CM3 objective."""
        recipe = self.settings.pretrain
        for mode in self._trained_modes():
            target = self.path("pretrained") / f"jam-{mode}"
            if target.exists():
                continue
            data = mix_datasets(
                {name: self.encoded(name)["train"] for name in ("texts", "pairs")},
                {"texts": 0.35, "pairs": 0.65},
                recipe.max_steps * recipe.batch_size,
                self.settings.seed,
            )
            source = self._need("fused", "fuse") / f"jam-{mode}"
            # The paper masks Poisson(1) spans in 300,000 steps; with a few hundred, more documents should stay as they are.
            self._train_jam(source, target, recipe, data, mean_spans=0.3, whole_segment_probability=0.05)

    def instruct(self) -> None:
        """Stage 2: instruct tuning on how-to dialogues, with pretraining data mixed in."""
        recipe = self.settings.instruct
        for mode in self._trained_modes():
            target = self.path(f"jam-{mode}")
            if target.exists():
                continue
            data = mix_datasets(
                {name: self.encoded(name)["train"] for name in ("texts", "pairs", "howtos")},
                {"texts": 0.15, "pairs": 0.53, "howtos": 0.32},
                recipe.max_steps * recipe.batch_size,
                self.settings.seed + 1,
            )
            source = self._need("pretrained", "pretrain") / f"jam-{mode}"
            self._train_jam(
                source, target, recipe, data, mean_spans=0.0, whole_segment_probability=0.03, text_segments_only=True
            )
        for mode in MODES:  # a JAM that is not trained stands beside the others as it was fused
            if mode not in self._trained_modes() and not self.path(f"jam-{mode}").exists():
                source = self._need("fused", "fuse") / f"jam-{mode}"
                with whole_folder(self.path(f"jam-{mode}")) as folder:
                    JamForCausalLM.from_pretrained(source).save_pretrained(folder)
                    JamProcessor.from_pretrained(source).save_pretrained(folder)

    def evaluate(self) -> None:
        """Measure perplexity, divergence from the parents, and the share of unseen captions drawn right."""
        write_whole(self.path("results.json"), json.dumps(_Evaluation(self).run(), indent=1) + "\n")

    def write(self) -> None:
        """Let the fused model write interleaved documents and draw unseen captions."""
        from .page import write_documents

        with whole_folder(self.path("documents")) as folder:
            write_documents(self, folder)

    def page(self) -> None:
        """Put it all on one page, `index.html`."""
        from .page import render_page

        write_whole(self.path("index.html"), render_page(self))


# torch's fused attention is made for long sequences; for these, on a CPU, the plain one is faster.
_EVALUATION = {"attn_implementation": "eager"}


class _Evaluation:
    """The measurements of a run, as one JSON object."""

    def __init__(self, run: Run):
        self.run_ = run
        self.range = run._image_token_range()
        self.texts = run.encoded("texts")["validation"]
        self.pairs = run.encoded("pairs")["validation"]

    def _perplexities(self, model: Any) -> dict[str, float]:
        text = perplexity(model, self.texts, self.range)
        pair = perplexity(model, self.pairs, self.range)
        return {
            "text": text.perplexity,
            "caption_image": pair.perplexity,
            "caption": pair.text_perplexity,
            "image": pair.image_perplexity,
        }

    def _drawing(self, folder: Path, scales: dict[str, float | None]) -> dict[str, dict[str, float]]:
        run, results = self.run_, {}
        model, processor = JamForCausalLM.from_pretrained(folder, **_EVALUATION), JamProcessor.from_pretrained(folder)
        pairs = run.data("pairs")
        for split in ("unseen_single", "unseen_pair"):
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

    def _round_trip(self) -> dict[str, float]:
        vq, pairs = self.run_.vq(), self.run_.data("pairs")
        from ..model.image_processing_jam import JamImageProcessor

        processor = JamImageProcessor.from_size(vq.config.sample_size)
        images = [image for split in ("validation", "unseen_single", "unseen_pair") for image in pairs[split]["image"]]
        expected = [Picture.from_json(p) for s in ("validation", "unseen_single", "unseen_pair") for p in pairs[s]["picture"]]
        codes = torch.from_numpy(encode_images(vq, images))
        decoded = [picture for part in codes.split(100) for picture in processor.postprocess(vq.decode(part))]
        scores = [score_picture(image, picture) for image, picture in zip(decoded, expected)]
        return {
            "correct": sum(s.correct for s in scores) / len(scores),
            "exact": sum(s.exact for s in scores) / len(scores),
            "count": len(scores),
        }

    def run(self) -> dict[str, Any]:
        run, models = self.run_, {}
        parents = {name: AutoModelForCausalLM.from_pretrained(run.path(name), **_EVALUATION) for name in ("llm", "image-model")}
        models["LLM parent"] = {"perplexity": self._perplexities(parents["llm"])}
        models["image parent"] = {"perplexity": self._perplexities(parents["image-model"])}
        first, last = self.range

        def half(dataset: Dataset) -> Dataset:  # thousands of tokens
            return dataset.select(range(-(-len(dataset) // 2)))

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
            model = JamForCausalLM.from_pretrained(folder, **_EVALUATION).eval()
            models[name] = {
                "perplexity": self._perplexities(model),
                "kl_to_llm": divergence(parents["llm"], model, half(self.texts), (0, first)),
                "kl_to_image_parent": divergence(parents["image-model"], model, half(self.pairs), (first, last)),
            }
        trained = [("pretrained/jam-{}", "jam-{}, stage 1"), ("jam-{}", "jam-{}, stage 2")]
        for mode in run._trained_modes():
            for folder, name in trained:
                model = JamForCausalLM.from_pretrained(run.path(folder.format(mode)), **_EVALUATION)
                models[name.format(mode)] = {"perplexity": self._perplexities(model)}
        image_parent = run.path("fused") / "image-parent"  # the mean of a model and itself is that model
        if not image_parent.exists():
            fuse(run.path("image-model"), run.path("image-model"), "uniform", image_parent, vq_model=run.path("vq"))
        models["image parent"]["drawing"] = self._drawing(image_parent, {"plain": None})
        scales = {"plain": None, "guided": run.settings.guidance_scale}
        for mode in run._trained_modes():
            models[f"jam-{mode}, stage 2"]["drawing"] = self._drawing(run.path(f"jam-{mode}"), scales)
        return {"vq_round_trip": self._round_trip(), "models": models, "guidance_scale": run.settings.guidance_scale}


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
    times = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    times[name] = round(time.time() - started, 1)
    write_whole(path, json.dumps(times, indent=1) + "\n")
    return True


def run_all(run: Run) -> Path:
    """All stages in order; returns the path of the page."""
    for number, name in enumerate(STAGES, 1):
        print(f"[{number}/{len(STAGES)}] {name}: {STAGES[name][1].__doc__.strip()}", flush=True)
        if not run_stage(run, name):
            print("    done before", flush=True)
    return run.path("index.html")


__all__ = ["STAGES", "QuickstartSettings", "Run", "run_all", "run_stage"]
