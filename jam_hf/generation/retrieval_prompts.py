"""Retrieval augmentation of `generate()`: documents found put before the prompt, and cut out of what comes back.

It knows how a retrieved document is laid out and how many fit. It does not know how documents are found: a retriever is
whatever has the method of the protocol here (jam_hf/retrieval has one).

Shape suffixes: B prompts, T positions of the prompts, A positions of the augmented prompts, N codes a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from transformers.utils import logging

from ..model.calls_jam import JamCall
from ..model.configuration_jam import JamConfig
from ..model.grammar_jam import left_padded
from ..model.modeling_jam import JamForCausalLM


logger = logging.get_logger(__name__)


class PromptDocument(NamedTuple):
    """A caption and its picture, as a retriever gives them.

    id: its name in the index. score: its similarity to the prompt. text_ids: ids of the caption, without special
    tokens.
    codes: the N raw codes of the picture, 0..K-1.
    """

    id: str
    score: float
    text_ids: Sequence[int]
    codes: Sequence[int]


class RetrievalQuery(NamedTuple):
    """One prompt, without padding.

    input_ids (int64 `[T]`): as the user passed it. pixel_values (float `[P, 3, H, W]` in [-1, 1]): the pictures of its
    placeholders `<image>`, in order; P is 0 where it has none. Other pictures stand in the ids, as codes.
    """

    input_ids: torch.LongTensor
    pixel_values: torch.FloatTensor


class Retriever(Protocol):
    """What `generate(retriever=...)` asks of a retriever."""

    def documents_for(self, model: JamForCausalLM, queries: Sequence[RetrievalQuery]) -> list[list[PromptDocument]]:
        """For each prompt the documents to put before it, the most similar first.

        Raises:
            ValueError: if the documents' codes are not those of the model's VQ model, or a prompt holds nothing to look
                for.
        """
        ...


def document_ids(config: JamConfig, document: PromptDocument) -> list[int]:
    """`text <break> image <break>` [C], the picture laid out as the config says.

    Raises:
        ValueError: if the picture does not have exactly N codes of the codebook.
    """
    codes, count = [int(code) for code in document.codes], config.image_seq_length
    if len(codes) != count or min(codes) < 0 or max(codes) >= config.num_image_tokens:
        raise ValueError(
            f"Document {document.id!r} of the index has {len(codes)} codes, "
            f"{min(codes, default=0)}..{max(codes, default=0)}. A picture of this JAM has {count} in "
            f"0..{config.num_image_tokens - 1}: build the index with its VQ model."
        )
    return [*document.text_ids, *config.picture_layout.wrap([config.image_token_range[code] for code in codes])]


def how_many_fit(lengths: Sequence[int], room: int) -> int:
    """How many documents, from the most similar on, have no more than `room` tokens together.

    A document that does not fit is left out with all that are less similar; none is cut (ours [R]).
    """
    return sum(total <= room for total in accumulate(lengths))


@dataclass
class AugmentedPrompts:
    """Prompts behind their documents: `<bos> text <break> image <break> ... prompt`, padded on the left.

    Args:
        input_ids, attention_mask: int64 `[B, A]`, for `generate()`; pictures are codes here.
        prompt_ids: int64 `[B, T]`, the prompts as `generate()` would return them without a retriever.
        retrieved_ids, retrieved_scores: names of each prompt's documents and their similarities, the most similar
            first, which is the order in which they stand (ours [R]).
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    prompt_ids: torch.LongTensor
    retrieved_ids: list[list[str]]
    retrieved_scores: list[list[float]]

    @property
    def memory_ids(self) -> list[list[str]]:
        """`retrieved_ids`, by its older name."""
        return self.retrieved_ids

    @property
    def memory_scores(self) -> list[list[float]]:
        """`retrieved_scores`, by its older name."""
        return self.retrieved_scores

    def cut(self, sequences: torch.LongTensor) -> torch.LongTensor:
        """Take the documents out: int64 `[R, A + new]`, R a multiple of B, to `[R, T + new]` that begins with the
        prompts.
        """
        prompts = self.prompt_ids.repeat_interleave(sequences.shape[0] // self.prompt_ids.shape[0], dim=0)
        return torch.cat((prompts.to(sequences.device), sequences[:, self.input_ids.shape[1] :]), dim=1)


def augment_prompts(
    model: JamForCausalLM,
    retriever: Retriever,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.FloatTensor | None = None,
    max_new_tokens: int | None = None,
) -> AugmentedPrompts:
    """Ask the retriever for each prompt's documents and put them behind its `<bos>`, or first where it has none.

    Args:
        input_ids, attention_mask: int64 `[B, T]`, padded on either side, as the processor makes them.
        pixel_values: float `[P, 3, H, W]`, the pictures of the whole batch, in reading order.
        max_new_tokens: for which there must be room behind the prompt; one whole picture where `None`. Documents that
            the model's positions do not hold besides are left out, the least similar first.
    Raises:
        ValueError: if ids are no batch of prompts, a prompt is empty, pictures and placeholders do not match, or the
            retriever refuses.
    """
    config = model.config
    if not callable(getattr(retriever, "documents_for", None)):
        raise ValueError(
            "retriever must have the method documents_for, as an index of jam_hf.retrieval has, got "
            f"{type(retriever).__name__}. The folder of an index is read with load_index(folder, processor)."
        )
    if not torch.is_tensor(input_ids) or input_ids.ndim != 2 or not input_ids.numel():
        shape = list(input_ids.shape) if torch.is_tensor(input_ids) else type(input_ids).__name__
        raise ValueError(f"retriever needs prompts to look for: input_ids [B, T], got {shape}.")
    mask = _mask_of(config, input_ids, attention_mask)
    if not bool(mask.any(1).all()):
        raise ValueError(
            f"Prompt {int((~mask.any(1)).nonzero()[0])} is nothing but padding; a retriever needs prompts to look for."
        )
    prompt_ids = model.prompt_with_codes(input_ids, pixel_values)
    pixels = _pixels_by_row(config, input_ids, pixel_values)
    queries = [RetrievalQuery(ids[kept], own) for ids, kept, own in zip(input_ids, mask, pixels)]
    found = retriever.documents_for(model, queries)
    if len(found) != len(queries):
        raise ValueError(
            f"retriever must answer each of {len(queries)} prompts with a list of documents, got {len(found)} lists."
        )
    new_tokens = config.picture_length + 2 if max_new_tokens is None else max_new_tokens

    rows, retrieved_ids, retrieved_scores = [], [], []
    for ids, kept, documents in zip(prompt_ids, mask, found):
        start = int(kept.nonzero()[0])  # what stands behind it, padding included, stays as it is
        begin = start + int(config.bos_token_id is not None and int(ids[start]) == config.bos_token_id)
        laid_out = [document_ids(config, document) for document in documents]
        room = config.max_position_embeddings - new_tokens - (len(ids) - start)
        count = how_many_fit([len(document) for document in laid_out], room)
        if count < len(documents):
            logger.warning_once(
                f"{len(documents) - count} of {len(documents)} retrieved documents do not fit into the "
                f"{config.max_position_embeddings} positions beside a prompt of {len(ids) - start} and {new_tokens} "
                "new ones; they are left out."
            )
        before = [token for document in laid_out[:count] for token in document]
        inserted = torch.tensor(before, dtype=ids.dtype, device=ids.device)
        rows.append(
            (
                torch.cat((ids[start:begin], inserted, ids[begin:])),
                torch.cat((kept[start:begin], torch.ones_like(inserted, dtype=torch.bool), kept[begin:])),
            )
        )
        retrieved_ids.append([document.id for document in documents[:count]])
        retrieved_scores.append([float(document.score) for document in documents[:count]])

    width = input_ids.shape[1]
    pad = 0 if config.pad_token_id is None else config.pad_token_id
    augmented_BA, _ = left_padded([ids.tolist() for ids, _ in rows], pad, input_ids.device, width)
    mask_BA, _ = left_padded([kept.long().tolist() for _, kept in rows], 0, input_ids.device, width)
    return AugmentedPrompts(augmented_BA, mask_BA, prompt_ids, retrieved_ids, retrieved_scores)


def _mask_of(config: JamConfig, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.BoolTensor:
    """bool `[B, T]`; where no mask came, by the padding's id, as `generate()` itself does."""
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"retriever needs an attention_mask of the shape of input_ids {list(input_ids.shape)}, got "
                f"{list(attention_mask.shape)}."
            )
        return attention_mask.bool()
    if config.pad_token_id is None or config.pad_token_id in config.eos_token_ids:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return input_ids != config.pad_token_id


def _pixels_by_row(
    config: JamConfig, input_ids: torch.LongTensor, pixel_values: torch.FloatTensor | None
) -> Sequence[torch.FloatTensor]:
    """The pictures of each row: float `[P_row, 3, H, W]`, by the number of its placeholders."""
    placeholders = (input_ids == config.image_token_id).sum(1)
    if pixel_values is None:
        pixel_values = torch.empty(0)
    counts, rest = (placeholders // config.image_seq_length).tolist(), placeholders % config.image_seq_length
    if bool(rest.any()):
        row = int(rest.nonzero()[0])
        raise ValueError(
            f"Prompt {row} has {int(placeholders[row])} placeholders <image>; a picture has {config.image_seq_length}. "
            "Let JamProcessor make input_ids and pixel_values together."
        )
    return pixel_values.split(counts)


@dataclass
class WithRetrieval:
    """Documents found for each prompt, put before it, and cut out of the `sequences` that come back:

        model.generate(**inputs, custom_generate=WithRetrieval(retriever))

    or short `generate(..., retriever=...)`. Lengths are the user's: `max_length` and `min_length` count the prompt
    without its documents. What came with `return_dict_in_generate` gets `retrieved_ids` and `retrieved_scores`, a list
    for each row of `sequences` (`memory_ids` and `memory_scores` by their older names). Stopping criteria, the user's
    own processors, and a cache that is returned see the documents; a streamer does not.

    Args:
        retriever ([`Retriever`]): what finds them.
        then (*optional*): a `custom_generate` for the longer prompts, [`BestOfN`] say.
    """

    retriever: Retriever
    then: Callable[..., Any] | None = None
    takes_the_call: ClassVar[bool] = True

    def __call__(self, model: JamForCausalLM, call: JamCall) -> Any:
        arguments, own = dict(call.arguments), model.generation_config
        for name in ("inputs_embeds", "past_key_values", "position_ids"):
            if arguments.get(name) is not None:
                raise ValueError(
                    f"retriever puts documents before the prompt, which {name} knows nothing of. Pass input_ids alone."
                )
        input_ids = arguments.pop("input_ids", None)
        prompt = (input_ids, arguments.pop("attention_mask", None), arguments.pop("pixel_values", None))
        prompts = augment_prompts(model, self.retriever, *prompt, _new_tokens(input_ids, call, own))
        added = prompts.input_ids.shape[1] - input_ids.shape[1]
        lengths = {}
        for name, stronger in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value, new = call.setting(name, own), call.setting(stronger, own)
            if value is not None and new is None:
                lengths[name] = value + added
        if arguments.get("streamer") is not None:
            arguments["streamer"] = _PromptWithoutDocuments(arguments["streamer"], prompts.prompt_ids)
        arguments |= {
            "input_ids": prompts.input_ids,
            "attention_mask": prompts.attention_mask,
            "custom_generate": self.then,
        }
        output = model.run_call(replace(call, arguments=arguments).with_settings(**lengths))
        if torch.is_tensor(output):
            return prompts.cut(output)
        output["sequences"] = prompts.cut(output.sequences)
        for slot in output.get("picture_slots") or ():  # best_of_n.py: places in the sequences
            slot.start -= added
        copies = output.sequences.shape[0] // len(prompts.retrieved_ids)
        output["retrieved_ids"] = [ids for ids in prompts.retrieved_ids for _ in range(copies)]
        output["retrieved_scores"] = [scores for scores in prompts.retrieved_scores for _ in range(copies)]
        output["memory_ids"], output["memory_scores"] = output["retrieved_ids"], output["retrieved_scores"]
        return output


def _new_tokens(input_ids: torch.Tensor | None, call: JamCall, own: Any) -> int | None:
    """How many tokens the user asked for; `None`: no number of them."""
    new_tokens, max_length = (call.setting(name, own) for name in ("max_new_tokens", "max_length"))
    if new_tokens is not None or max_length is None or not torch.is_tensor(input_ids):
        return new_tokens
    if max_length <= input_ids.shape[-1]:
        raise ValueError(
            f"The prompt has {input_ids.shape[-1]} tokens and max_length is {max_length}, so nothing can be written. "
            "Raise max_length, or set max_new_tokens."
        )
    return max_length - input_ids.shape[-1]


class _PromptWithoutDocuments:
    """A streamer that is given the user's own prompt in place of the augmented one, which `generate()` puts in
    first.
    """

    def __init__(self, streamer: Any, prompt_ids: torch.LongTensor):
        self.streamer, self.prompt_ids = streamer, prompt_ids

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_ids is not None:
            value, self.prompt_ids = self.prompt_ids.to(value.device), None
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


Memory, MemoryDocument, MemoryQuery = Retriever, PromptDocument, RetrievalQuery  # older names

__all__ = ["AugmentedPrompts", "PromptDocument", "RetrievalQuery", "Retriever", "WithRetrieval", "augment_prompts"]
