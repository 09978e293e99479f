"""Rerankers: which of several candidates for one picture is the best, by their likelihood, by a CLIP model, or by any
callable.

They see one picture's candidates and the document before them; best_of_n.py draws them and goes on from the best.

Shapes: T positions, C candidates, N codes a picture.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import CLIPModel, PreTrainedTokenizerBase

from ..model.grammar_jam import PictureGrammar
from ..model.guidance_jam import unconditional_context
from ..model.image_processing_jam import JamImageProcessor
from ..model.modeling_jam import JamForCausalLM
from ..reading import read_clip


class PictureCandidates:
    """The candidates for one picture of one row, as a reranker gets them. What a reranker does not ask for is not
    computed.

    Attributes:
        codes (int64 `[C, N]`): ids of the image codes, in reading order.
        context (int64 `[T]`): the row before the picture, without padding; the picture's opening token is the last.
    """

    def __init__(
        self,
        model: JamForCausalLM,
        context: torch.LongTensor,
        codes: torch.LongTensor,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.model, self.context, self.codes, self.tokenizer = model, context, codes, tokenizer

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """C RGB pictures."""
        return JamImageProcessor.from_vq_config(self.model.config.vq_config).postprocess(
            self.model.decode_image_tokens(self.codes)
        )

    @cached_property
    def text(self) -> str:
        """All text before the picture, the prompt's included, without markup and pictures."""
        if self.tokenizer is None:
            raise ValueError(
                "The reranker reads the text before a picture, which generate() needs a tokenizer for: pass "
                "tokenizer=processor.tokenizer."
            )
        config = self.model.config
        inside = PictureGrammar(config).is_picture_token(self.context)
        marks = torch.tensor([config.break_token_id, config.picture_end_token_id], device=self.context.device)
        return self.tokenizer.decode(self.context[~inside & ~torch.isin(self.context, marks)], skip_special_tokens=True)

    @cached_property
    def log_likelihoods(self) -> torch.FloatTensor:
        """Mean log-likelihood of a code given the document before it, float32 `[C]`.

        Under the model as it is, without guidance and temperature, among image codes alone: whether a code comes is the
        grammar's decision, not the picture's merit [R].
        """
        return self._log_likelihoods(self.context)

    @cached_property
    def unconditional_log_likelihoods(self) -> torch.FloatTensor:
        """Likewise behind `<bos> <mask> <break>`, which is what guidance compares with [A]; float32 `[C]`."""
        prefix = [*unconditional_context(self.model.config), self.model.config.break_token_id]
        return self._log_likelihoods(torch.tensor(prefix, device=self.context.device))

    @torch.no_grad()
    def _log_likelihoods(self, context: torch.LongTensor) -> torch.FloatTensor:
        layout, codes_range, means = self.model.config.picture_layout, self.model.config.image_token_range, []
        for codes in self.codes:  # one by one: logits of a whole picture are large where the vocabulary is
            picture = torch.from_numpy(layout.inside(codes.cpu())).to(context.device)
            ids = torch.cat((context, picture[:-1]))[None]
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=len(picture)).logits[0, layout.positions]
            scores = logits[:, codes_range.start : codes_range.stop].float().log_softmax(-1)
            means.append(scores.gather(-1, (codes - codes_range.start).to(scores.device)[:, None]).mean())
        return torch.stack(means)


class Reranker(Protocol):
    """What chooses among candidates: any callable like this."""

    def __call__(self, candidates: PictureCandidates) -> torch.Tensor | list[float]:
        """`[C]` scores; the highest is kept, the first of equal ones."""
        ...


class LikelihoodReranker:
    """Prefers what the model itself finds likely: `log_likelihoods` [R].

    Args:
        minus_unconditional (`bool`, defaults to `False`): take `unconditional_log_likelihoods` off, so that the picture
            that fits its context best wins, not the plainest one.
    """

    def __init__(self, minus_unconditional: bool = False):
        self.minus_unconditional = minus_unconditional

    def __call__(self, candidates: PictureCandidates) -> torch.Tensor:
        if self.minus_unconditional:
            return candidates.log_likelihoods - candidates.unconditional_log_likelihoods
        return candidates.log_likelihoods


class CLIPReranker:
    """Prefers what a CLIP model finds most like the text before the picture.

    Of a text that is too long for the model its end is read, which stands next to the picture.

    Args:
        model (`str` or [`CLIPModel`]): folder or Hub id of a checkpoint with safetensors, or a model.
        tokenizer, image_processor (*optional*): of the model; those of the checkpoint where `model` names one.
        device (*optional*): to move the model to.
    """

    def __init__(
        self,
        model: str | CLIPModel,
        tokenizer: Any = None,
        image_processor: Any = None,
        device: torch.device | None = None,
    ):
        if isinstance(model, str):
            model, tokenizer, image_processor = read_clip(model, tokenizer, image_processor)
        if not isinstance(model, CLIPModel) or tokenizer is None or image_processor is None:
            raise ValueError(
                "CLIPReranker: expected the name of a CLIP checkpoint, or a CLIPModel with tokenizer=... and "
                f"image_processor=...; got a {type(model).__name__}, tokenizer={type(tokenizer).__name__}, "
                f"image_processor={type(image_processor).__name__}."
            )
        self.model = model.eval() if device is None else model.eval().to(device)
        self.tokenizer, self.image_processor = copy.deepcopy(tokenizer), image_processor
        self.tokenizer.truncation_side = "left"

    @torch.no_grad()
    def __call__(self, candidates: PictureCandidates) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer([candidates.text], truncation=True, max_length=length, return_tensors="pt")
        pixels = self.image_processor(candidates.pictures, return_tensors="pt")["pixel_values"]
        device = self.model.device
        outputs = self.model(
            input_ids=text["input_ids"].to(device),
            attention_mask=text["attention_mask"].to(device),
            pixel_values=pixels.to(device, self.model.dtype),
        )
        return outputs.logits_per_image[:, 0]


def reranker_of(reranker: Reranker | str | None, device: torch.device) -> Reranker:
    """What `generate(reranker=...)` means: "likelihood" (also `None`), the name of a CLIP checkpoint, or any callable.

    Raises:
        ValueError: for anything else.
    """
    if reranker is None or reranker == "likelihood":
        return LikelihoodReranker()
    if isinstance(reranker, str):
        return CLIPReranker(reranker, device=device)
    if not callable(reranker):
        raise ValueError(
            "reranker must be 'likelihood', the name of a CLIP checkpoint, or a callable that takes PictureCandidates "
            f"and returns one score for each; got {reranker!r:.80}."
        )
    return reranker


def checked_scores(reranker: Reranker, candidates: PictureCandidates) -> torch.FloatTensor:
    """The reranker's scores, float32 `[C]`, on the CPU.

    Raises:
        ValueError: unless there is one number for each candidate.
    """
    found, count = reranker(candidates), len(candidates.codes)
    try:
        scores = torch.as_tensor(found, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The reranker must return {count} scores, one for each candidate, got {type(found).__name__} "
            f"{found!r:.80}."
        ) from error
    if scores.shape != (count,):
        raise ValueError(
            f"The reranker must return {count} scores, one for each candidate, got the shape {list(scores.shape)}."
        )
    if bool(scores.isnan().any()):
        raise ValueError(f"The reranker returned scores that are no numbers: {scores.tolist()}.")
    return scores


__all__ = ["CLIPReranker", "LikelihoodReranker", "PictureCandidates", "Reranker", "checked_scores", "reranker_of"]
