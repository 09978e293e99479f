"""Two parents of one family over one tokenizer: how they are made, how their documents are encoded, how they fuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from ..contents import load_saved_dataset
from ..data.cm3 import CM3Settings
from ..data.collator import JamDataCollator
from ..fusion.fuse import fuse
from ..training.embeddings import initialise_image_embeddings
from ..training.tokenizer import train_tokenizer
from ..training.vq import encode_images
from .lessons import CODE_STD, MAX_POSITIONS, Lesson, encoded
from .run import Run


class SharedParents:
    """Two parents of one family and size, over one tokenizer that knows the image codes: as in the paper."""

    words = "A text LLM and an autoregressive image model, fused, then trained in two stages."

    def __init__(self, run: Run):
        self.run, self.settings = run, run.settings

    @property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.run.need("tokenizer", "tokenizer"), trust_remote_code=False)

    @property
    def image_token_range(self) -> range:
        first = self.tokenizer.convert_tokens_to_ids("<img:0>")
        return range(first, first + self.settings.num_codes)

    def make_tokenizers(self, folder: Path) -> None:
        data = self.run.data
        texts = [*data("texts")["train"]["text"][:5000], *data("pairs")["train"]["caption"][:5000]]
        messages = [json.loads(row) for row in data("howtos")["train"]["messages"][:2000]]
        texts += [part["text"] for m in messages for turn in m for part in turn["content"] if part["type"] == "text"]
        train_tokenizer(texts, self.settings.text_vocab_size, self.settings.num_codes).save_pretrained(folder)

    def encode(self, folder: Path) -> None:
        """The documents of both parents, which are the JAM's too."""
        vq = self.run.vq()
        for name in ("texts", "pairs", "howtos"):
            documents = encoded(
                self.run.data(name),
                name,
                tokenizer=self.tokenizer,
                encode_images=lambda images: encode_images(vq, images),
            )
            documents.save_to_disk(str(folder / name))

    def documents(self, name: str) -> DatasetDict:
        """The JAM's documents."""
        return load_saved_dataset(self.run.need("encoded", "encode") / name)

    def _collator(self, **cm3: Any) -> JamDataCollator:
        tokenizer, codes = self.tokenizer, self.image_token_range
        ids = {t: tokenizer.convert_tokens_to_ids(t) for t in ("<mask>", "</mask>", "<break>")}
        settings = CM3Settings(
            mask_token_id=ids["<mask>"],
            num_mask_tokens=ids["</mask>"] - ids["<mask>"],
            mask_end_token_id=ids["</mask>"],
            boundary_token_ids=(ids["<break>"], tokenizer.bos_token_id, tokenizer.eos_token_id),
            image_token_range=(codes.start, codes.stop),
            mean_spans=0.0,
            **cm3,
        )
        return JamDataCollator(tokenizer.pad_token_id, codes.stop, settings, seed=self.settings.seed)

    def _model(self) -> Any:
        s, tokenizer = self.settings, self.tokenizer
        common = {
            "vocab_size": self.image_token_range.stop,
            "hidden_size": s.hidden_size,
            "num_hidden_layers": s.num_layers,
            "num_attention_heads": s.num_heads,
            "max_position_embeddings": MAX_POSITIONS,
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
        return OPTForCausalLM(  # the paper's architecture: no biases, no LayerNorm parameters, no dropout
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

    def llm(self) -> Lesson:
        collator = self._collator(whole_segment_probability=0.0)
        return Lesson(self._model(), self.documents("texts")["train"], collator, self.tokenizer)

    def image_model(self) -> Lesson:
        model, documents = self._model(), self.documents("pairs")["train"]
        std = CODE_STD * self.settings.initializer_range
        first = self.image_token_range.start
        initialise_image_embeddings(model, self.run.vq(), first, std, documents[:8000]["input_ids"], self.settings.seed)
        collator = self._collator(whole_segment_probability=0.03, text_segments_only=True)
        return Lesson(model, documents, collator, self.tokenizer)

    def fuse(self, folder: Path) -> None:
        llm, image = self.run.need("llm", "train-llm"), self.run.need("image-model", "train-image-model")
        for mode in self.run.modes:
            fuse(llm, image, mode, folder / f"jam-{mode}", vq_model=self.run.path("vq"), seed=self.settings.seed)
