"""Two unlike parents, each with a tokenizer of its own: how they are made, how their documents are encoded, how
they fuse.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from ..contents import load_saved_dataset
from ..data.cm3 import CM3Settings
from ..data.collator import JamDataCollator
from ..data.sequences import NO_PICTURES, EncodeImages, encode_documents
from ..files import write_whole
from ..fusion.fuse import plan_fusion, run_fusion
from ..fusion.parents import code_ids, picture_layout
from ..model.configuration_jam import JamConfig
from ..model.picture_layout_jam import PictureLayout
from ..model.processing_jam import JamProcessor
from ..picture_world import IMAGE_SIZE
from ..training.embeddings import initialise_image_embeddings
from ..training.tokenizer import CHAT_TEMPLATE, ROLES, byte_level_bpe
from ..training.vq import encode_images
from .lessons import CODE_STD, MAX_POSITIONS, Lesson, encoded
from .run import Run


class UnlikeParents:
    """A Qwen2 that reads texts, and a Chameleon that draws captions: no size, layer kind, tokenizer or id in common.

    Each parent's documents are in its own ids and its own layout of pictures. The JAM's, in the fused tokenizer's, can
    only be encoded once the parents are fused.
    """

    words = (
        "A text LLM (Qwen2) and an autoregressive image model (Chameleon) of other sizes, each with a tokenizer of its "
        "own, fused, then trained in two stages."
    )

    def __init__(self, run: Run):
        self.run, self.settings = run, run.settings

    # ----- tokenizers -------------------------------------------------------------------------------------------------

    def tokenizer(self, parent: str) -> Any:
        return AutoTokenizer.from_pretrained(self.run.need("tokenizer", "tokenizer") / parent, trust_remote_code=False)

    def make_tokenizers(self, folder: Path) -> None:
        texts = self.run.data("texts")["train"]["text"][:5000]
        qwen_like(texts, self.settings.text_vocab_size).save_pretrained(folder / "llm")
        captions = self.run.data("pairs")["train"]["caption"][:5000]
        vocab_size, num_codes = self.settings.image_parent.text_vocab_size, self.settings.num_codes
        chameleon_like(captions, vocab_size, num_codes, self.settings.seed).save_pretrained(folder / "image-model")

    # ----- documents --------------------------------------------------------------------------------------------------

    def _layout(self, config: ChameleonConfig, tokenizer: Any) -> PictureLayout:
        """The image parent's pictures, by what a fusion finds in its config and tokenizer."""
        codes = code_ids(config, config.vocab_size, self.settings.num_codes, tokenizer, None, "image parent")
        layout = picture_layout(config, tokenizer, codes, self.run.vq().config.grid_size, "image parent")
        return replace(layout, placeholder=tokenizer.convert_tokens_to_ids(tokenizer.image_token))

    def encode(self, folder: Path) -> None:
        """Each parent's own documents."""
        vq, tokenizer = self.run.vq(), self.tokenizer("image-model")
        texts = encoded(self.run.data("texts"), "texts", tokenizer=self.tokenizer("llm"), layout=NO_PICTURES)
        texts.save_to_disk(str(folder / "llm" / "texts"))
        pairs = encoded(
            self.run.data("pairs"),
            "pairs",
            tokenizer=tokenizer,
            encode_images=lambda images: encode_images(vq, images),
            layout=self._layout(self._chameleon_config(tokenizer), tokenizer),
        )
        pairs.save_to_disk(str(folder / "image-model" / "pairs"))

    def _encode_for_jam(self, jam: Path, folder: Path) -> None:
        config, tokenizer = (
            JamConfig.from_pretrained(jam, trust_remote_code=False),
            JamProcessor.from_pretrained(jam, trust_remote_code=False).tokenizer,
        )
        vq, image_tokenizer = self.run.vq(), self.tokenizer("image-model")
        layout = self._layout(self._chameleon_config(image_tokenizer), image_tokenizer)
        for name in ("texts", "pairs", "howtos"):
            documents = {}
            for split, dataset in self.run.data(name).items():
                if split.startswith("unseen"):
                    continue
                encode: EncodeImages = lambda images: encode_images(vq, images)  # noqa: E731
                if name == "pairs":  # their codes are known already
                    encode = _codes_again(self.parents_documents("image-model", "pairs")[split], layout)
                documents[split] = encode_documents(
                    dataset, tokenizer, encode, config=config, description=f"encoding {name} {split} anew"
                )
            DatasetDict(documents).save_to_disk(str(folder / name))

    def parents_documents(self, parent: str, name: str) -> DatasetDict:
        return load_saved_dataset(self.run.need("encoded", "encode") / parent / name)

    def documents(self, name: str) -> DatasetDict:
        """The JAM's documents."""
        return load_saved_dataset(self.run.need("fused", "fuse") / "encoded" / name)

    # ----- models -----------------------------------------------------------------------------------------------------

    def llm(self) -> Lesson:
        """Biases on queries, keys and values, grouped key/value heads, tied embeddings, a padded vocabulary, no bos."""
        s, tokenizer = self.settings, self.tokenizer("llm")
        torch.manual_seed(s.seed)
        config = Qwen2Config(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=s.hidden_size,
            num_hidden_layers=s.num_layers,
            num_attention_heads=s.num_heads,
            num_key_value_heads=s.num_key_value_heads,
            intermediate_size=s.intermediate_size,
            max_position_embeddings=MAX_POSITIONS,
            initializer_range=s.initializer_range,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        collator = JamDataCollator(tokenizer.pad_token_id, config.vocab_size, seed=s.seed)
        documents = self.parents_documents("llm", "texts")["train"]
        return Lesson(Qwen2ForCausalLM(config), documents, collator, tokenizer)

    def _chameleon_config(self, tokenizer: Any) -> ChameleonConfig:
        s, sizes = self.settings, self.settings.image_parent
        # Every Chameleon of transformers has a VQ model, without a decoder. The codes here are those of the
        # quickstart's own.
        vq_config = {
            "embed_dim": 4,
            "num_embeddings": s.num_codes,
            "latent_channels": 4,
            "resolution": IMAGE_SIZE,
            "base_channels": 32,
            "channel_multiplier": [1] * len(s.vq_channels),
            "num_res_blocks": 1,
        }
        return ChameleonConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_heads,
            intermediate_size=sizes.intermediate_size,
            max_position_embeddings=MAX_POSITIONS,
            initializer_range=s.initializer_range,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            vocabulary_map=tokenizer.get_vocab(),
            vq_config=vq_config,
        )

    def image_model(self) -> Lesson:
        s, tokenizer = self.settings, self.tokenizer("image-model")
        config = self._chameleon_config(tokenizer)
        torch.manual_seed(s.seed)
        model = with_image_logits(ChameleonForConditionalGeneration(config))
        documents, layout = self.parents_documents("image-model", "pairs")["train"], self._layout(config, tokenizer)
        codes = torch.tensor(layout.codes)
        std = CODE_STD * s.initializer_range
        initialise_image_embeddings(model, self.run.vq(), codes, std, documents[:8000]["input_ids"], s.seed)
        mask, mask_end = tokenizer.convert_tokens_to_ids(["<mask>", "</mask>"])
        settings = CM3Settings(  # a masked caption is how it learns to draw without one
            mask_token_id=mask,
            num_mask_tokens=1,
            mask_end_token_id=mask_end,
            boundary_token_ids=(layout.begin, layout.end, tokenizer.bos_token_id, tokenizer.eos_token_id),
            image_token_range=(int(codes.min()), int(codes.max()) + 1),
            mean_spans=0.0,
            whole_segment_probability=0.03,
            text_segments_only=True,
        )
        return Lesson(
            model, documents, JamDataCollator(config.pad_token_id, config.vocab_size, settings, seed=s.seed), tokenizer
        )

    def fuse(self, folder: Path) -> None:
        """The fusion, its report, and the JAM's documents."""
        llm, image = self.run.need("llm", "train-llm"), self.run.need("image-model", "train-image-model")
        plan = plan_fusion(llm, image, "cross", vq_model=self.run.path("vq"), seed=self.settings.seed)
        run_fusion(plan, folder / "jam-cross")
        write_whole(folder / "report.txt", plan.describe(tensors=False) + "\n")
        self._encode_for_jam(folder / "jam-cross", folder / "encoded")


def with_image_logits(model: ChameleonForConditionalGeneration) -> ChameleonForConditionalGeneration:
    """Let a Chameleon's forward keep the logits of image codes, which it sets to minus infinity, for the loss as well.

    The model in memory then draws instead of looking: its own VQ model's codes have no ids any more. Nothing of it is
    saved.
    """
    model.model.vocabulary_mapping.image_tokens = []
    return model


def qwen_like(texts: list[str], vocab_size: int) -> Qwen2Tokenizer:
    """Qwen2's own tokenizer over other words: `<|endoftext|>` ends and pads, nothing begins a document or marks a
    picture.

    The chat template may hold pictures; their placeholder is a token of the JAM's. The class is Qwen2's, since
    transformers
    takes no other for a Qwen2: beside its config, another tokenizer's splitting of words would be replaced without a
    word.
    """
    tokenizer = Qwen2Tokenizer(padding_side="left").train_new_from_iterator(
        texts, vocab_size, new_special_tokens=list(ROLES), show_progress=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chameleon_like(captions: list[str], vocab_size: int, num_codes: int, seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer with Chameleon's names: `<racm3:break>` codes `<eoss>`, code 17 being `IMGIMGBHZ`, in no order.

    vocab_size: bytes and what was learned; markup and codes come on top.
    """
    names = [f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z" for code in range(num_codes)]
    shuffled = [names[i] for i in np.random.default_rng(seed).permutation(num_codes)]
    markup = ["<racm3:break>", "<eoss>", "<image>", "<mask>", "</mask>"]
    specials = ["<s>", "<pad>", "</s>", "<unk>", *shuffled, *markup]
    bpe = byte_level_bpe(captions, vocab_size + len(specials), specials)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"boi_token": "<racm3:break>", "eoi_token": "<eoss>", "image_token": "<image>"},
    )


def _codes_again(documents: Dataset, layout: PictureLayout) -> EncodeImages:
    """The raw codes of documents of one picture each, in their order: what `encode_images` found when they were
    encoded.
    """
    codes = np.asarray(layout.codes)
    code_of = np.full(int(codes.max()) + 1, -1)
    code_of[codes] = np.arange(len(codes))
    rows = iter(documents["input_ids"])

    def encode(images: Any) -> np.ndarray:
        ids = [np.asarray(next(rows)) for _ in images]
        return np.stack([code_of[row[layout.are_codes(row)]] for row in ids])

    return encode
