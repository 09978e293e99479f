"""The fact sheets of image parents that are more than a causal LM: multimodal classes of transformers that write
pictures.

An image parent that is a plain causal LM, whose vocabulary holds the codes, needs none: what is known of its decoder's
family (model/families_jam.py) is enough, which every parent's decoder has a sheet of. An explicit registry: other
classes are refused.

A class is added by one entry in `MULTIMODAL` and its tests (docs/architecture.md, Families).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..model.families_jam import stock_class


@dataclass(frozen=True)
class Multimodal:
    """What is known of one multimodal class.

    Args:
        model_type: of its config. prefix: of its classes. vq_type: `model_type` of its VQ model's config.
        marks: its own tokens around a picture: "begin", "end", "prefix" (before the first code), "row_end", "suffix"
            (behind the last row) -> the tokenizer's attribute that names it, and what it usually is.
        size_form: how it writes the size of a picture, before its prefix; then its VQ model takes pictures of any size.
            `None`: it does not, and pictures have one size.
        own_code_modules: codes are no ids, they have an embedding and a head of their own (Janus). Otherwise they are
            ids, which its `vocabulary_map` names.
        forward_forbids_codes: its forward gives codes no probability, though its weights do.
        bos_by_processor: its tokenizer leaves the beginning of a document to the processor.
        image_processor: file and class of what reads pictures, where all published checkpoints have the same; otherwise
            a parent must bring its preprocessor_config.json to be read as it was trained.
    """

    model_type: str
    prefix: str
    vq_type: str
    marks: Mapping[str, tuple[str, str]]
    size_form: str | None = None
    own_code_modules: bool = False
    forward_forbids_codes: bool = False
    bos_by_processor: bool = False
    image_processor: tuple[str, str] | None = None

    def class_of(self, role: str) -> type:
        """The class of transformers: `class_of("ForConditionalGeneration")`."""
        return stock_class(self.model_type, self.prefix + role)


MULTIMODAL: dict[str, Multimodal] = {
    sheet.model_type: sheet
    for sheet in (
        Multimodal(
            "chameleon",
            "Chameleon",
            "chameleon_vqgan",
            marks={"begin": ("boi_token", "<racm3:break>"), "end": ("eoi_token", "<eoss>")},
            forward_forbids_codes=True,
            image_processor=("image_processing_pil_chameleon", "ChameleonImageProcessorPil"),
        ),
        Multimodal(
            "emu3",
            "Emu3",
            "emu3_vqgan",
            marks={
                "begin": ("boi_token", "<|image start|>"),
                "end": ("eoi_token", "<|image end|>"),
                "prefix": ("image_wrapper_token", "<|image token|>"),
                "row_end": ("eol_token", "<|extra_200|>"),
                "suffix": ("eof_token", "<|extra_201|>"),
            },
            size_form="{}*{}",
            bos_by_processor=True,
        ),
        Multimodal(
            "janus",
            "Janus",
            "janus_vqgan",
            marks={"begin": ("boi_token", "<begin_of_image>"), "end": ("eoi_token", "<end_of_image>")},
            own_code_modules=True,
        ),
    )
}
