# Licensed under the Apache License, Version 2.0.
"""Documents in and out: text with `<image>` placeholders and pictures to model inputs, and written ids to both.

It knows the tokenizer, the image processor and how a picture is laid out: `<break>`, N codes, `<break>`, or more than
that where the layout has it. It does not know the codebook: the model turns pixels into codes and codes into pixels.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.utils import logging

from .code_tokens_jam import CODE_NAME, reading_names_as_text
from .grammar_jam import PictureGrammar
from .package_jam import OFFERED, PackageFunction, from_package, tell
from .remote_code_jam import AUTO_MAP  # noqa: F401  (its file brings all the others along)
from .transformers_private_jam import _MARKED_RE, MultiModalData


if TYPE_CHECKING:
    from .modeling_jam import JamForCausalLM


# A token that a user typed into a chat, as transformers marks it under `sanitize_control_tokens=True`.
_MARKED = _MARKED_RE
logger = logging.get_logger(__name__)


class JamProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Keyword arguments of [`JamProcessor`]. Prompts are padded on the left, as generation needs."""

    text_kwargs = {"padding": False}


class JamProcessor(ProcessorMixin):
    """Image processor and tokenizer of a JAM.

    Args:
        image_seq_length (`int`): codes in one picture (N), as in [`JamConfig`].
        image_token, break_token (`str`): the placeholder in text, and the mark on both sides of a picture.
        image_end_token, image_row_end_token (`str`, *optional*), image_prefix_tokens, image_suffix_tokens
            (`list[str]`): the tokens whose ids [`JamConfig`] has under `image_end_token_id` and so on, for layouts of
            pictures that have them. They are special tokens of the tokenizer; rows are those of a square grid of N
            codes.
        image_code_token (`str`, defaults to `"<img:{}>"`): how the tokenizer names codes. A prompt that spells such a
            name is text.
    """

    valid_processor_kwargs = JamProcessorKwargs

    # Documents with gaps to what `generate` fills them from, and back: jam_hf/generation/infilling.py.
    infill = PackageFunction(method=True)
    post_process_infill = PackageFunction(method=True)
    # Ids for `generate(image_after_token_ids=...)`: jam_hf/generation/sentences.py.
    sentence_end_token_ids = PackageFunction(method=True)
    # What post_process_interleaved returns, as files and back: jam_hf/generation/export.py.
    save_html, save_markdown, save_json, load_json = (PackageFunction() for _ in range(4))

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        image_seq_length: int = 1024,
        image_token: str = "<image>",
        break_token: str = "<break>",
        chat_template: str | None = None,
        image_end_token: str | None = None,
        image_prefix_tokens: Sequence[str] = (),
        image_row_end_token: str | None = None,
        image_suffix_tokens: Sequence[str] = (),
        image_code_token: str = CODE_NAME,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.break_token = break_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.break_token_id = tokenizer.convert_tokens_to_ids(break_token)
        for name in ("image_token", "break_token"):
            if getattr(self, f"{name}_id") in (None, tokenizer.unk_token_id):
                raise ValueError(
                    f"JamProcessor: the tokenizer does not know the {name} {getattr(self, name)!r}. Add it as a "
                    "special token, or name the token that plays its part."
                )
        self.image_end_token, self.image_row_end_token = image_end_token, image_row_end_token
        self.image_prefix_tokens, self.image_suffix_tokens = list(image_prefix_tokens), list(image_suffix_tokens)
        self.image_code_token = image_code_token
        self._check_layout()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> JamProcessor:
        """As in `ProcessorMixin`; codes get names in the tokenizer where a folder was fused before they had any.

        Raises:
            ValueError: if in such a folder a token was added that has the id of an image code.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        tell("name_codes_of", processor, pretrained_model_name_or_path, kwargs)
        return processor

    def _check_layout(self) -> None:
        added = self.tokenizer.added_tokens_decoder
        inner = (*self.image_prefix_tokens, self.image_row_end_token, *self.image_suffix_tokens)
        for token in (self.image_end_token, *inner):
            entry = None if token is None else added.get(self.tokenizer.convert_tokens_to_ids(token))
            if token is not None and (entry is None or entry.content != token or not entry.special):
                raise ValueError(
                    f"JamProcessor: {token!r} is a token of the layout of pictures, but no special token of the "
                    f"tokenizer. Add it with tokenizer.add_tokens([{token!r}], special_tokens=True)."
                )
        if self.image_row_end_token is not None and math.isqrt(self.image_seq_length) ** 2 != self.image_seq_length:
            raise ValueError(
                "JamProcessor: image_row_end_token needs a picture of G x G codes, but image_seq_length is "
                f"{self.image_seq_length}, which is no square."
            )

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """As in `ProcessorMixin`; the folder carries the code that it needs (remote_code_jam.py).

        What transformers notes on the processor for the file leaves it again: a saved one equals a loaded one.
        """
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            self.__dict__.pop("auto_map", None)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """As in `ProcessorMixin`; where pictures come as one list per prompt, each prompt is checked on its own."""
        if text is None and images is not None:
            raise ValueError(
                "JamProcessor: pictures need a prompt that says where they stand, e.g. text='<image>'. For pixels "
                "alone, call processor.image_processor(images)."
            )
        nested = isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images)
        if nested and isinstance(text, list):
            if len(images) != len(text):
                raise ValueError(
                    f"JamProcessor: the {self.image_token} tokens in the prompts should be the same as the number of "
                    f"pictures, prompt by prompt; got {len(text)} prompt(s) and {len(images)} list(s) of pictures. "
                    "Expected one list (possibly empty) for each prompt."
                )
            for index, (sample, pictures) in enumerate(zip(text, images)):
                expected, got = sample.count(self.image_token), len(pictures or [])
                if expected != got:
                    raise ValueError(
                        f"JamProcessor: prompt {index} has {expected} placeholder(s) {self.image_token}, but {got} "
                        "picture(s) came with it. Each placeholder needs its picture, in order."
                    )
        super().validate_inputs(images=images, text=text, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Text with `<image>` placeholders, and pictures, to model inputs.

        Args:
            images: PIL pictures, arrays, paths or URLs: one, a list for the whole batch in reading order, or a list of
                lists, one for each prompt.
            text (`str` or `list[str]`): prompts; `<image>` marks the place of each picture. The tokenizer puts `<s>`
                first, once: a prompt that brings its own, as chat templates do, gets no second one.
            kwargs: of the tokenizer and the image processor; batches of prompts want `padding=True`.
        Returns:
            `BatchFeature`: `input_ids`, `attention_mask` `[B, T]` and, where there are pictures, `pixel_values`
            `[P, 3, H, W]`, P being the pictures of the whole batch.
        Raises:
            ValueError: if placeholders and pictures do not match, a picture cannot be read, or `text` is no text.
        """
        if not isinstance(text, (str, type(None))) and not (
            isinstance(text, (list, tuple)) and text and all(isinstance(sample, str) for sample in text)
        ):
            raise ValueError(f"JamProcessor: text must be a string or a non-empty list of strings, got {text!r:.80}.")
        text = list(text) if isinstance(text, tuple) else text
        flat = images
        if isinstance(images, (list, tuple)):
            nested = any(entry is None or isinstance(entry, (list, tuple)) for entry in images)
            if nested:  # one list for each prompt, None for an empty one
                images = [list(e) if isinstance(e, (list, tuple)) else [e] * (e is not None) for e in images]
            images = self.image_processor.fetch_images(list(images))
            if nested or not images:
                samples = [text] if isinstance(text, str) else text
                if kwargs.get("sanitize_control_tokens"):  # what a user typed is text, and the place of no picture
                    samples = [_MARKED.sub("", sample) for sample in samples]
                self.validate_inputs(images=images, text=samples)
            flat = [picture for entry in images for picture in entry] if nested else images
            flat = flat or None  # a batch in which no prompt has a picture
        bos, bos_id = self.tokenizer.bos_token, self.tokenizer.bos_token_id
        if bos and text is not None and kwargs.get("add_special_tokens", True):
            text = text.removeprefix(bos) if isinstance(text, str) else [sample.removeprefix(bos) for sample in text]
            # transformers tokenizes such texts piece by piece and puts nothing in front
            if kwargs.get("sanitize_control_tokens") and self.tokenizer("")["input_ids"] == [bos_id]:
                text = bos + text if isinstance(text, str) else [bos + sample for sample in text]
                kwargs["add_special_tokens"] = False
        reader = reading_names_as_text(self, [text] if isinstance(text, str) else text or [])
        return super(JamProcessor, reader).__call__(images=flat, text=text, **kwargs)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `ProcessorMixin`; a message may be a list of texts and pictures.

        Args:
            conversation: one chat or a list of them. A picture part names its picture under "image", "url", "path",
                "base64" or, as OpenAI has it, "image_url", as anything that the image processor reads.
            args, kwargs: of `ProcessorMixin.apply_chat_template`. With `tokenize=True`, `images=` are the pictures of
                the parts (and of placeholders typed into texts) that name none, in reading order: a list, or one for
                each chat.
        Raises:
            ValueError: if the template would not write the parts as text or leaves out a picture; with `tokenize=True`,
                if a picture part brings no picture, or more pictures came than places.
        """
        stock = super().apply_chat_template
        if "prepared_chats" in OFFERED or not _is_text_alone(conversation) or "images" in kwargs:
            what = (
                f"A chat with parts or pictures (or write {self.image_token} into texts, and pass the processor both)"
            )
            call = inspect.signature(stock).bind(conversation, *args, **kwargs).arguments
            return stock(**from_package("prepared_chats", what)(self, stock, call | call.pop("kwargs", {})))
        return stock(conversation, *args, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        if self.image_row_end_token is None:
            codes = self.image_token * self.image_seq_length
        else:
            size = math.isqrt(self.image_seq_length)
            codes = (self.image_token * size + self.image_row_end_token) * size
        prefix, suffix = "".join(self.image_prefix_tokens), "".join(self.image_suffix_tokens)
        return self.break_token + prefix + codes + suffix + (self.image_end_token or self.break_token)

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        """How many placeholders pictures of these sizes become, for servers that plan ahead.

        What stands around and between the placeholders (`<break>`, row ends and so on) is text.
        """
        data = {}
        if image_sizes is not None:
            data["num_image_tokens"] = [self.image_seq_length] * len(image_sizes)
            data["num_image_patches"] = [1] * len(image_sizes)
        return MultiModalData(**data)

    def post_process_multimodal_output(
        self,
        generated_outputs: torch.Tensor,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[str] | list[Image.Image]:
        """What `pipeline("any-to-any")` shows.

        Args:
            generated_outputs: int64 `[B, T]` as `generate()` returns it; for "image" the pixels of
                `decode_image_tokens`, float `[P, 3, H, W]` in [-1, 1].
            skip_special_tokens (`bool`, defaults to True): leave markup and image codes out of the text.
            generation_mode (`str`, *optional*): "text" (also where `None`) or "image".
            kwargs: of the tokenizer's `decode`.
        Raises:
            ValueError: on another mode, or ids in place of pixels.
        """
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)
        if generation_mode != "image":
            raise ValueError(
                f"generation_mode must be 'text' or 'image' here, got {generation_mode!r}. Documents with both are "
                "what post_process_interleaved(generated, model=...) takes apart."
            )
        if not torch.is_tensor(generated_outputs) or not generated_outputs.is_floating_point():
            raise ValueError(
                "generation_mode='image' needs pixels, float [P, 3, H, W]: pass the written ids to "
                "model.decode_image_tokens first."
            )
        return self.image_processor.postprocess(generated_outputs)

    def post_process_interleaved(
        self, generated: Any, model: JamForCausalLM, prompt_length: int = 0, skip_special_tokens: bool = True
    ) -> list[list[dict[str, Any]]]:
        """Written ids to ordered segments of text and pictures.

        Args:
            generated: int64 `[B, T]` as `generate()` returns it, or its output object with `.sequences`.
            model: the JAM that wrote them; it decodes the codes.
            prompt_length (`int`, defaults to 0): leading ids to leave out, e.g. `inputs["input_ids"].shape[1]`. A
                picture that was begun there and went on behind comes whole.
            skip_special_tokens (`bool`, defaults to True): leave markup such as `<s>` out of the text. Padding and the
                marks of pictures are always left out.
        Returns:
            one list per row: `{"type": "text", "text": str}` or `{"type": "image", "image": PIL.Image}`, in order. A
            picture that was not finished is `{"type": "image", "image": None, "image_tokens": [...]}` with the codes
            that it has. What the layout of pictures has beside the codes (prefix, row ends, suffix) is in neither, and
            text that is only white space is no segment.
        Raises:
            ValueError: if `generated` is not `[B, T]`, the prompt is longer than that, or the model's pictures have
                another number of codes than the processor's.
        """
        sequences = torch.as_tensor(getattr(generated, "sequences", generated))
        if sequences.ndim != 2:
            raise ValueError(f"post_process_interleaved: expected ids [B, T], got the shape {list(sequences.shape)}.")
        if not 0 <= prompt_length <= sequences.shape[1]:
            raise ValueError(
                f"post_process_interleaved: prompt_length is {prompt_length}, but the rows have {sequences.shape[1]} "
                "ids; expected the length of the padded prompts."
            )
        begun = PictureGrammar(model.config).state(sequences[:, :prompt_length]).position.tolist()
        rows = [ids[prompt_length - count :] for ids, count in zip(sequences.tolist(), begun)]
        return self.segments(rows, model, skip_special_tokens)

    def segments(self, rows: list[list[int]], model: JamForCausalLM, skip_special_tokens: bool) -> list[list[dict]]:
        config = model.config
        if config.image_seq_length != self.image_seq_length:
            raise ValueError(
                f"JamProcessor: its pictures have {self.image_seq_length} codes, the model's "
                f"{config.image_seq_length}. Load both from one folder, or set processor.image_seq_length."
            )
        layout, tokenizer = config.picture_layout, self.tokenizer
        padding = {config.pad_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, *config.eos_token_ids}
        documents: list[list[dict[str, Any]]] = []
        pictures: list[tuple[dict[str, Any], list[int]]] = []
        for ids in rows:
            segments: list[dict[str, Any]] = []
            for kind, run in layout.runs([*(t for t in ids if t not in padding), layout.end]):
                if kind == "image":
                    segments.append({"type": "image", "image": None})
                    if len(run) == self.image_seq_length:
                        pictures.append((segments[-1], run))
                    else:
                        segments[-1]["image_tokens"] = run
                elif kind == "text":
                    text = tokenizer.decode(run, skip_special_tokens=skip_special_tokens)
                    if text.strip():
                        segments.append({"type": "text", "text": text})
            documents.append(segments)
        if pictures:
            tokens = torch.tensor([run for _, run in pictures])
            images: list[Image.Image] = self.image_processor.postprocess(model.decode_image_tokens(tokens))
            for (segment, _), image in zip(pictures, images):
                segment["image"] = image
        return documents


def _is_text_alone(conversation: Any) -> bool:
    """Whether all messages of a chat, or of several, are texts."""
    messages = [m for part in conversation for m in (part if isinstance(part, (list, tuple)) else [part])]
    return all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages)


JamProcessor.register_for_auto_class()

__all__ = ["JamProcessor"]
