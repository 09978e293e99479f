"""Perplexity of a causal LM on encoded documents, per modality, and how far a fusion is from its parents.

It knows ids and logits. Padding never counts, whatever the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..model.rotation_jam import rotated_alone, rotation


@dataclass(frozen=True)
class PerplexityResult:
    """Mean negative log-likelihoods, in nats per token, and counts, of text tokens and of image tokens.

    Text tokens are all that are no image codes, marks such as `<break>` and eos included. The first token of a document
    is
    not predicted and does not count. Nor does what a layout of pictures puts beside the codes (size, row ends): where
    it stands is given, and counted as text it would make the text look easy.
    """

    text_nll: float
    image_nll: float
    text_tokens: int
    image_tokens: int

    @property
    def nll(self) -> float:
        total = self.text_tokens + self.image_tokens
        text = self.text_nll * self.text_tokens if self.text_tokens else 0.0
        image = self.image_nll * self.image_tokens if self.image_tokens else 0.0
        return (text + image) / total

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def text_perplexity(self) -> float:
        return math.exp(self.text_nll)

    @property
    def image_perplexity(self) -> float:
        return math.exp(self.image_nll)


def padded(rows: Iterable[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of different lengths to int64 `[B, T]` and its attention mask, padded on the right."""
    rows = list(rows)
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], dtype=torch.int64)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


def batches(
    documents: Iterable[list[int]], batch_size: int, pad: int, description: str, config: PreTrainedConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Documents as `padded` batches, sorted by length so that little is padding, with a progress bar.

    `config`: of the model that reads them. Documents that it would rotate differently alone (`longrope`, `dynamic`) are
    not in one batch.
    """
    decoders = getattr(config, "decoder_configs", None) or [config.get_text_config()]
    starts: list[int] = []
    documents = sorted(documents, key=len)
    turned = [rotation(decoders, len(document)) for document in documents]
    for index in range(len(documents)):
        if not starts or index == starts[-1] + batch_size or turned[index] != turned[index - 1]:
            starts.append(index)
    ends = [*starts[1:], len(documents)]
    for start, end in tqdm(list(zip(starts, ends)), desc=description, unit="batch", leave=False):
        yield padded(documents[start:end], pad)


Places = tuple[torch.Tensor, torch.Tensor]


def compare_logits(
    parent_logits: torch.Tensor,
    fusion_logits: torch.Tensor,
    parent_places: Places,
    fusion_places: Places,
    targets: torch.Tensor,
    columns: slice | torch.Tensor = slice(None),
    chunk: int = 2**22,
    renormalised: bool = True,
) -> torch.Tensor:
    """Sums of KL(parent || fusion) and of both negative log-likelihoods, in nats: float64 `[3]`, on the CPU.

    Both distributions are renormalised over `columns` unless `renormalised` says otherwise. Logits are taken from their
    tensors a chunk at a time, so that nothing of their size is copied.

    Args:
        parent_logits, fusion_logits: `[B, T, V]`, any float type; V and T may differ between the two.
        parent_places, fusion_places: rows and columns, int64 `[P]` each, of the positions to compare, pair by pair.
        targets (int64 `[P]`): what comes next, as an index into `columns`.
        columns: ids that both know, the same in both. chunk: elements in float32 at a time.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    step = max(1, chunk // parent_logits.shape[-1])
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        logs = []
        for logits, (rows, positions) in ((parent_logits, parent_places), (fusion_logits, fusion_places)):
            taken = logits[rows[part].to(logits.device), positions[part].to(logits.device)]
            if renormalised:
                logs.append(taken[:, columns].float().log_softmax(-1).to(parent_logits.device))
            else:
                logs.append(taken.float().log_softmax(-1)[:, columns].to(parent_logits.device))
        target = targets[part, None].to(parent_logits.device)
        sums[0] += (logs[0].exp().double() * (logs[0].double() - logs[1].double())).sum().cpu()
        for index, log in enumerate(logs, start=1):
            sums[index] -= log.gather(1, target).double().sum().cpu()
    return sums


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    dataset: Dataset,
    image_token_range: range | tuple[int, int],
    batch_size: int = 32,
    description: str = "perplexity",
    picture_structure_token_ids: Sequence[int] | None = None,
) -> PerplexityResult:
    """Token-weighted perplexity of `model` on `dataset` (column `input_ids`).

    Args:
        image_token_range: ids of image codes (`JamConfig.image_token_range`), or `[first, last)`.
        picture_structure_token_ids: ids that count neither as text nor as image; where `None`, those of a JAM's config,
            and none for another model. Compare a JAM with its parents by passing the JAM's for all.
    Raises:
        ValueError: if the dataset is empty, or no document has a second token.
    """
    if not len(dataset):
        raise ValueError("perplexity: the dataset is empty.")
    codes = image_token_range if isinstance(image_token_range, range) else range(*image_token_range)
    if picture_structure_token_ids is None:
        picture_structure_token_ids = getattr(model.config, "picture_structure_token_ids", ())
    structure = torch.tensor(list(picture_structure_token_ids), dtype=torch.int64, device=model.device)
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.int64)
    for ids, mask in batches(
        dataset["input_ids"], batch_size, model.config.pad_token_id or 0, description, model.config
    ):
        ids, mask = ids.to(model.device), mask.to(model.device)
        with rotated_alone(model):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        targets = ids[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").double()
        counted = (mask[:, 1:].bool() & ~torch.isin(targets, structure)).flatten()
        image = ((targets >= codes.start) & (targets < codes.stop)).flatten()
        for index, chosen in enumerate((counted & ~image, counted & image)):
            sums[index] += losses[chosen].sum().cpu()
            counts[index] += chosen.sum().cpu()
    model.train(was_training)
    if not counts.sum():
        raise ValueError("perplexity: no document has more than one token, so none is predicted.")
    means = (sums / counts.clamp(min=1)).tolist()
    means = [mean if count else float("nan") for mean, count in zip(means, counts.tolist())]
    return PerplexityResult(means[0], means[1], int(counts[0]), int(counts[1]))


@torch.no_grad()
def divergence(
    parent: PreTrainedModel,
    fusion: PreTrainedModel,
    dataset: Dataset,
    ids_of_interest: tuple[int, int],
    batch_size: int = 32,
) -> float:
    """KL(parent || fusion) in nats per token, over the ids `[first, last)` that the parent is there for.

    Both distributions are renormalised over those ids, so that a fusion may give mass to the other modality without
    being
    charged for it. Positions counted: those whose target lies in the range, padding and the first token excluded.
    """
    parent.eval()
    fusion.eval()
    first, last = ids_of_interest
    total, count = 0.0, 0
    for ids, mask in batches(
        dataset["input_ids"], batch_size, parent.config.pad_token_id or 0, "divergence", fusion.config
    ):
        targets = ids[:, 1:]
        places = (mask[:, 1:].bool() & (targets >= first) & (targets < last)).nonzero(as_tuple=True)
        with rotated_alone(parent), rotated_alone(fusion):
            theirs, ours = (
                model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
                for model in (parent, fusion)
            )
        total += float(compare_logits(theirs, ours, places, places, targets[places] - first, slice(first, last))[0])
        count += len(places[0])
    return total / max(count, 1)
