"""The layout of a picture among ids: what opens and closes it, where its codes stand, and what stands between them.

It knows ids only, a JAM's or an image parent's. `JamConfig.picture_layout` is the JAM's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class PictureLayout:
    """`begin, prefix, (a row of codes, row_end) for each row, suffix, end`.

    L below is the number of ids between `begin` and `end`, N that of the codes among them.

    Args:
        begin, end: ids that open and close a picture; one id may do both.
        codes: the id of code 0, 1, ..., K - 1: a range in a JAM; where codes are no ids (Janus), numbers behind the
            vocabulary.
        grid: rows and columns of codes; `None`: codes alone, as many as come.
        prefix, row_end, suffix: ids between `begin` and the first code, behind each row, and behind the last row.
        placeholder: id of the token that stands for a picture, or for each code, in text; `None`: there is none.
    """

    begin: int
    end: int
    codes: Sequence[int] = ()
    grid: tuple[int, int] | None = None
    prefix: tuple[int, ...] = ()
    row_end: int | None = None
    suffix: tuple[int, ...] = ()
    placeholder: int | None = None

    @cached_property
    def structure(self) -> tuple[int, ...]:
        """The ids that stand in pictures beside the codes; neither `begin` nor `end` is among them."""
        return (*self.prefix, *(() if self.row_end is None else (self.row_end,)), *self.suffix)

    @cached_property
    def template(self) -> tuple[int, ...]:
        """What stands between `begin` and `end`: ids, and -1 in the place of each code."""
        rows, columns = self.grid or (0, 0)
        row = (-1,) * columns + (() if self.row_end is None else (self.row_end,))
        return (*self.prefix, *row * rows, *self.suffix)

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """The places of the codes in `template`."""
        return tuple(place for place, token in enumerate(self.template) if token < 0)

    def inside(self, image_tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """The ids of a picture's codes with what stands between and around them: int64 `[..., N]` -> `[..., L]`.

        Raises:
            ValueError: if there are not N of them.
        """
        tokens = np.asarray(image_tokens, dtype=np.int64)
        if self.grid is None:
            return tokens
        if tokens.shape[-1] != len(self.positions):
            raise ValueError(f"A picture has {len(self.positions)} codes, got {tokens.shape[-1]}.")
        laid_out = np.broadcast_to(np.array(self.template), (*tokens.shape[:-1], len(self.template))).copy()
        laid_out[..., self.positions] = tokens
        return laid_out

    def wrap(self, image_tokens: Sequence[int] | np.ndarray) -> list[int]:
        """A whole picture: `begin`, the ids of its codes (`[N]`) with what stands between them, `end`."""
        return [self.begin, *self.inside(image_tokens).tolist(), self.end]

    def read(self, ids: Sequence[int]) -> list[int] | None:
        """The N ids of codes among the L ids that stand between `begin` and `end`; `None` where they are no picture."""
        if len(ids) != len(self.template):
            return None
        fits = all(token in self.codes if place < 0 else token == place for place, token in zip(self.template, ids))
        return [ids[position] for position in self.positions] if fits else None

    def runs(self, ids: Iterable[int], drawn: list[int] | None = None) -> Iterator[tuple[str, list[int]]]:
        """The ids of a document, or of its next part, taken apart.

        Args:
            drawn: codes of the picture that is under way; changed in place, to be handed on with the next part.
        Yields:
            ("text", ids without marks), ("drawing", `drawn`) behind each code, and ("image", codes) behind the N-th, or
            behind fewer where something else follows. What the layout has between codes is left out.
        """
        text: list[int] = []
        drawn = [] if drawn is None else drawn
        for token in ids:
            if token in self.structure:
                continue
            is_code = token in self.codes
            if is_code:
                if text:
                    yield "text", text
                    text = []
                drawn.append(token)
                yield "drawing", drawn
            elif token not in (self.begin, self.end):
                text.append(token)
            if drawn and (not is_code or len(drawn) == len(self.positions)):
                yield "image", drawn.copy()
                drawn.clear()
        if text:
            yield "text", text

    def ids_of(self, codes: np.ndarray) -> np.ndarray:
        """Raw codes, 0..K-1, to ids, of the same shape."""
        return codes + self.codes.start if isinstance(self.codes, range) else np.asarray(self.codes)[codes]

    def are_codes(self, ids: np.ndarray) -> np.ndarray:
        """bool, of the shape of `ids`."""
        if isinstance(self.codes, range):
            return (ids >= self.codes.start) & (ids < self.codes.stop)
        return np.isin(ids, self.codes)


__all__ = ["PictureLayout"]
