"""Documents with gaps, in ids, as a JAM saw them in training (CM3, jam_hf/data/cm3.py).

Each gap is a sentinel in its place, numbered from the first to the last; a gap lies inside one text or inside one
picture, and the document ends in `<eos>`. What is written into the gaps is the subject of infilling.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..model.configuration_jam import JamConfig
from ..model.modeling_jam import JamForCausalLM
from ..model.processing_jam import JamProcessor


@dataclass(frozen=True)
class MaskedDocument:
    """One document with gaps.

    ids: the document up to its `<eos>`, with sentinel i in place of gap i. gaps: for each, in order, `None` for text,
    or what stands at each of its places in a picture, an id or -1 for a code.
    """

    ids: tuple[int, ...]
    gaps: tuple[tuple[int, ...] | None, ...]


def picture_mask(regions: Any, grid_size: int, name: str = "image_masks") -> np.ndarray:
    """Which codes of a picture are missing: bool `[G * G]`, in reading order.

    Args:
        regions: bool `[G, G]` or `[G * G]`; or a list of spans `(start, end)` of codes in reading order and rectangles
            `(left, upper, right, lower)` in columns and rows of the grid, as PIL's boxes; ends are exclusive.
        name: what to call it in messages.
    Raises:
        ValueError: if a region is empty, not inside the grid or overlaps an earlier one, or nothing is masked.
    """
    count = grid_size**2
    if isinstance(regions, (np.ndarray, torch.Tensor)):
        array = np.asarray(regions.cpu() if isinstance(regions, torch.Tensor) else regions)
        if array.dtype != bool or array.shape not in ((grid_size, grid_size), (count,)):
            raise ValueError(
                f"{name} must be bool [{grid_size}, {grid_size}] or [{count}], got {array.dtype} {list(array.shape)}; "
                "True is where a code is missing."
            )
        mask = array.reshape(-1).copy()
    else:
        mask = np.zeros((grid_size, grid_size), dtype=bool)
        grid = f"{grid_size}x{grid_size}"
        what = f"a list of spans (start, end) and rectangles (left, upper, right, lower) in a grid of {grid}"
        if not isinstance(regions, (list, tuple)):
            raise ValueError(f"{name} must be {what} codes, or a bool array; got {regions!r:.80}.")
        for region in regions:
            numbers = isinstance(region, (list, tuple)) and all(
                isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in region
            )
            if not numbers or len(region) not in (2, 4):
                raise ValueError(f"{name} must be {what} codes, or a bool array; got the entry {region!r:.80}.")
            covered = np.zeros_like(mask)
            if len(region) == 2:
                start, end = region
                inside = 0 <= start < end <= count
                covered.reshape(-1)[max(start, 0) : max(end, 0)] = True
            else:
                left, upper, right, lower = region
                inside = 0 <= left < right <= grid_size and 0 <= upper < lower <= grid_size
                covered[max(upper, 0) : max(lower, 0), max(left, 0) : max(right, 0)] = True
            if not inside:
                raise ValueError(
                    f"{name} has {tuple(region)}, which is empty or not inside the grid of {grid_size}x{grid_size} "
                    f"codes. Expected 0 <= start < end <= {count}, or 0 <= left < right <= {grid_size} and 0 <= upper "
                    f"< lower <= {grid_size}."
                )
            if (mask & covered).any():
                raise ValueError(
                    f"{name} has {tuple(region)}, which overlaps a region before it; each code is masked once."
                )
            mask |= covered
        mask = mask.reshape(-1)
    if not mask.any():
        raise ValueError(f"{name} masks no code; use None for a picture that stays as it is.")
    return mask


class DocumentMasker:
    """Documents as ids with gaps, piece by piece: `text`, `picture`, `missing_picture`, then `finish` (CM3's layout
    [M]).
    """

    def __init__(self, config: JamConfig):
        self.config = config
        self.ids: list[int] = []
        self.gaps: list[tuple[int, ...] | None] = []

    def _gap(self, template: tuple[int, ...] | None) -> None:
        self.ids.append(self.config.mask_token_id + len(self.gaps))
        self.gaps.append(template)

    def text(self, ids: Iterable[int]) -> None:
        """Ids of text; the first sentinel is the mark of a gap, wherever it stands."""
        last, before = self.config.mask_token_id, None
        for token in ids:
            if token != last:
                self.ids.append(token)
            elif before == last:
                raise ValueError("two gaps stand directly after one another; one mark stands for text of any length.")
            else:
                self._gap(None)
            before = token

    def picture(self, codes: Sequence[int], mask: np.ndarray | None) -> None:
        """A picture of which the codes under `mask` (bool `[N]`) are missing; with `None` none are.

        A run of missing codes in reading order is one gap; what the layout has between them (row ends) belongs to it,
        as to a span of training.
        """
        layout = self.config.picture_layout
        picture = layout.inside(codes).tolist()
        self.ids.append(layout.begin)
        position = 0
        if mask is not None:
            edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
            for start, end in edges.reshape(-1, 2).tolist():
                first, last = layout.positions[start], layout.positions[end - 1] + 1
                self.ids += picture[position:first]
                self._gap(layout.template[first:last])
                position = last
        self.ids += [*picture[position:], layout.end]

    def missing_picture(self) -> None:
        """A picture of which all is missing: one whole segment of training, `<break> <sentinel> <break>`."""
        layout = self.config.picture_layout
        self.ids.append(layout.begin)
        self._gap(layout.template)
        self.ids.append(layout.end)

    def finish(self, eos_token_id: int) -> MaskedDocument:
        """Raises a `ValueError` if there is no gap, or there are more than sentinels."""
        if not self.gaps:
            raise ValueError(
                "there is no gap. Put the mark of a gap into the text, pass image_masks, or None in place of a picture."
            )
        if len(self.gaps) > self.config.num_mask_tokens:
            raise ValueError(
                f"there are {len(self.gaps)} gaps, but the model has {self.config.num_mask_tokens} sentinels. A "
                "rectangle needs one for each of its rows, or one in all where it is as wide as the picture; a span "
                "needs one."
            )
        if self.ids[-1] != eos_token_id:
            self.ids.append(eos_token_id)
        return MaskedDocument(tuple(self.ids), tuple(self.gaps))


def ids_that_are_no_text(config: JamConfig) -> list[int]:
    """What no text span of training holds, beside image codes: marks of pictures, sentinels, padding, `<s>` and
    `<eos>`.
    """
    ids: list[int | None] = [
        config.break_token_id,
        config.picture_end_token_id,
        config.image_token_id,
        *config.picture_structure_token_ids,
    ]
    ids += [config.mask_token_id + i for i in range(config.num_mask_tokens)]
    ids += [config.mask_end_token_id, config.pad_token_id, config.bos_token_id, *config.eos_token_ids]
    return sorted({i for i in ids if i is not None})


def masked_documents(
    processor: JamProcessor, model: JamForCausalLM, text: Any, images: Any = None, image_masks: Any = None
) -> list[MaskedDocument]:
    """See [`JamProcessor.infill`], which has these arguments.

    Raises:
        ValueError: if the arguments do not fit each other; the message names the document.
    """
    config = model.config
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(sample, str) for sample in texts):
        raise ValueError(f"infill: text must be a string or a non-empty list of strings, got {text!r:.80}.")
    if not config.eos_token_ids:
        raise ValueError(
            "infill: gaps are filled behind a document's end, and the config's eos_token_id says none. Set it."
        )
    pictures, masks = (
        _row_by_row(value, isinstance(text, str), len(texts), name)
        for value, name in ((images, "images"), (image_masks, "image_masks"))
    )
    codes = iter(_codes(processor, model, [picture for row in pictures for picture in row if picture is not None]))
    documents = []
    for row, (sample, row_pictures, row_masks) in enumerate(zip(texts, pictures, masks)):
        found = [None if picture is None else next(codes) for picture in row_pictures]
        try:
            documents.append(_masked_document(processor, config, sample, found, row_masks))
        except ValueError as error:
            raise ValueError(f"infill: document {row}: {error}") from None
    return documents


def _row_by_row(value: Any, single: bool, count: int, name: str) -> list[list[Any]]:
    """One list for each document."""
    if value is None:
        return [[] for _ in range(count)]
    value = [value] if single else value
    if not isinstance(value, (list, tuple)) or not all(row is None or isinstance(row, (list, tuple)) for row in value):
        raise ValueError(
            f"infill: {name} must be a list, one entry for each picture of the document"
            + ("" if single else ", and a list of such lists for a list of documents")
            + f"; got {value[0] if single else value!r:.80}."
        )
    if len(value) != count:
        raise ValueError(
            f"infill: got {count} document(s) and {len(value)} list(s) of {name}; each document needs its own."
        )
    return [list(row or []) for row in value]


def _codes(processor: JamProcessor, model: JamForCausalLM, pictures: list[Any]) -> list[list[int]]:
    """Ids of the codes of each picture, which may be a picture or these ids already."""
    config, found = model.config, {}
    count, first, last = config.image_seq_length, config.image_token_range[0], config.image_token_range[-1]
    for index, picture in enumerate(pictures):
        if isinstance(picture, torch.Tensor) and picture.ndim == 1:
            if picture.is_floating_point() or len(picture) != count or picture.min() < first or picture.max() > last:
                raise ValueError(
                    f"infill: codes of a picture must be {count} ids in {first}..{last}, got {picture!r:.80}."
                )
            found[index] = picture.tolist()
    pixels = [picture for index, picture in enumerate(pictures) if index not in found]
    if pixels:
        pixels = processor.image_processor.fetch_images(pixels)
        values = processor.image_processor(images=pixels, return_tensors="pt")["pixel_values"].to(model.device)
        encoded = iter(model.get_image_tokens(values).tolist())
        found |= {index: next(encoded) for index in range(len(pictures)) if index not in found}
    return [found[index] for index in range(len(pictures))]


def _masked_document(
    processor: JamProcessor, config: JamConfig, sample: str, pictures: list[list[int] | None], masks: list[Any]
) -> MaskedDocument:
    tokenizer, places = processor.tokenizer, sample.count(processor.image_token)
    if places != len(pictures):
        raise ValueError(
            f"{places} placeholder(s) {processor.image_token}, but {len(pictures)} picture(s) came with it. Each "
            "placeholder needs its picture, in order, or None for one that is missing."
        )
    if masks and len(masks) != places:
        raise ValueError(
            f"{places} picture(s), but {len(masks)} entries in image_masks; expected one for each, or None."
        )
    ids = tokenizer(sample.removeprefix(tokenizer.bos_token or ""))["input_ids"]
    mark = config.mask_token_id
    never = {*ids_that_are_no_text(config), *config.image_token_range} - {
        mark,
        config.image_token_id,
        tokenizer.bos_token_id,
    }
    never -= {config.bos_token_id, *config.eos_token_ids}
    if wrong := [token for token in ids if token in never]:
        raise ValueError(
            f"the text has the token {tokenizer.convert_ids_to_tokens(wrong[0])!r}. Write {processor.image_token} for "
            f"a picture and {tokenizer.convert_ids_to_tokens(mark)} for a gap in text; the rest is put in here."
        )
    masker = DocumentMasker(config)
    position = 0
    for index, place in enumerate([i for i, token in enumerate(ids) if token == config.image_token_id]):
        masker.text(ids[position:place])
        regions, position = (masks[index] if masks else None), place + 1
        if pictures[index] is None:
            if regions is not None:
                raise ValueError(
                    f"picture {index} is missing as a whole (None), so image_masks[{index}] must be None as well."
                )
            masker.missing_picture()
        else:
            name = f"image_masks[{index}]"
            masker.picture(pictures[index], None if regions is None else picture_mask(regions, config.grid_size, name))
    masker.text(ids[position:])
    return masker.finish(config.document_end(tokenizer.eos_token_id))


__all__ = ["DocumentMasker", "MaskedDocument", "masked_documents", "picture_mask"]
