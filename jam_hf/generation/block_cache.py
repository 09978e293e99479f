"""A cache for `generate()` that grows in blocks, where `DynamicCache` copies all keys and values at every step.

A layer's buffers have room for the next positions; a step writes its own and hands out views of what is filled. It
holds what
a `DynamicCache` holds: the numbers that attention sees are the same. For a while, columns of another sequence may stand
in a lane behind that room (packed_columns.py); it knows nothing of pictures or of guidance.

Shape suffixes: B rows, H key/value heads, S cached positions, C positions that a buffer has room for, D head size.
"""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


def gather_columns(states: torch.Tensor, index: torch.LongTensor) -> torch.Tensor:
    """`[B, H, S, D]` and, row by row, the columns to take, int64 `[B, C]` -> `[B, H, C, D]`."""
    index = index.to(states.device)[:, None, :, None]
    return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))


class JamBlockLayer(DynamicLayer):
    """Keys and values of one attention: `DynamicLayer` whose `update` writes in place, with room for whole blocks (ours
    [R]).

    `keys` and `values` (`[B, H, S, D]`) are views of buffers `[B, H, C, D]`, C the next multiple of `block_size`. What
    puts other tensors in their place (beam search reorders rows, `batch_select_indices` drops some) makes the next
    update start new buffers, so that nobody else's tensor is written to.
    """

    def __init__(self, block_size: int = 256, **kwargs: Any):
        super().__init__(**kwargs)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 position, got {block_size}.")
        self.block_size = block_size
        self.lane: tuple[int, int, int] | None = None  # see `open_lane`
        self._drop_buffers()

    def _drop_buffers(self) -> None:
        self.key_buffer: torch.Tensor | None = None
        self.value_buffer: torch.Tensor | None = None
        # The views of the buffers that this layer itself last put into `keys` and `values`.
        self._own_keys: torch.Tensor | None = None
        self._own_values: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `DynamicLayer`: what is cached and the new states, both `[B, H, S, D]`; views that stay true until a
        crop.

        Raises:
            ValueError: if the states need gradients, or do not fit those that are cached.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        own = self.key_buffer if self.keys is self._own_keys else None
        self.keys, self.key_buffer = self._appended(self.keys, own, key_states)
        own = self.value_buffer if self.values is self._own_values else None
        self.values, self.value_buffer = self._appended(self.values, own, value_states)
        self._own_keys, self._own_values = self.keys, self.values
        return self.keys, self.values

    def _appended(
        self, held: torch.Tensor, buffer: torch.Tensor | None, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`held` and behind it `states`, as a view of a buffer; the buffer, which is `buffer` as long as it has
        room.
        """
        if states.requires_grad:
            raise ValueError(
                "JamBlockCache writes in place, which gradients do not survive. Call the model under torch.no_grad(), "
                "or give it a DynamicCache(config=model.config)."
            )
        length = held.shape[-2] if held.numel() else 0
        end, places = length + states.shape[-2], [(length, states)]
        if self.lane is not None:
            first, _, count = self.lane
            end -= count
            places = [(first, states[:, :, :count]), (length, states[:, :, count:])]
        if length and (
            held.shape[:2] != states.shape[:2] or held.shape[3] != states.shape[3] or held.dtype != states.dtype
        ):
            raise ValueError(
                f"JamBlockCache holds {held.dtype} {tuple(held.shape)}; {states.dtype} {tuple(states.shape)} came to "
                "be put behind it. Expected the same numbers of rows and heads, head size and type. Use a new cache "
                "for other rows."
            )
        # A buffer made under torch.inference_mode() cannot be written to outside it.
        locked = buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled()
        if buffer is None or locked or end > buffer.shape[-2]:
            buffer = self._buffer_like(states, end)
            if length:
                buffer[:, :, :length] = held
        for first, these in places:
            buffer[:, :, first : first + these.shape[2]] = these
        return buffer[:, :, :end], buffer

    def _buffer_like(self, states: torch.Tensor, end: int) -> torch.Tensor:
        """Room for `end` columns and the rest of their last block."""
        room = -(-end // self.block_size) * self.block_size
        return states.new_empty((*states.shape[:2], room, states.shape[3]))

    # -- a lane for columns of another sequence ------------------------------------------------------------------------

    def open_lane(self, length: int, start: int, count: int) -> None:
        """Before each update while there is a lane: of its states, `count` go behind the `length` first columns, where
        there is room up to `start`, and the others to the end of the lane, which begins at `start`. What it holds moves
        along.
        """
        if self.lane is None or self.lane[1] != start:
            old = self.keys.shape[2] if self.lane is None else self.lane[1]
            end = start + self.keys.shape[2] - old
            moved = []
            for held in (self.keys, self.values):
                buffer = self._buffer_like(held, end + 1)
                buffer[:, :, :length] = held[:, :, :length]
                buffer[:, :, length:start] = (
                    0.0  # a mask takes their weight, which is of no use against what is no number
                )
                buffer[:, :, start:end] = held[:, :, old:]
                moved.append(buffer)
            self.key_buffer, self.value_buffer = moved
            self._hold(self.key_buffer[:, :, :end], self.value_buffer[:, :, :end])
        self.lane = (length, start, count)

    def keep_in_lane(self, index: torch.LongTensor) -> None:
        """Of each row's columns in the lane, leave these, in this order; int64 `[B, S]`, counted from where the
        lane begins.
        """
        start = self.lane[1]
        for states in (self.keys, self.values):
            states[:, :, start : start + index.shape[1]] = gather_columns(states[:, :, start:], index)
        self._shorten(start + index.shape[1])

    def close_lane(self) -> None:
        """Drop the lane; what stands before it stays."""
        length, _, count = self.lane
        self.lane = None
        self._shorten(length + count)

    def _hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Views of the buffers."""
        self.keys, self.values = keys, values
        self._own_keys, self._own_values = keys, values

    def _shorten(self, length: int) -> None:
        self.crop(length - self.keys.shape[2])

    # -- as in DynamicLayer --------------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """As in `DynamicLayer`; the room stays, and the next update writes over what was removed."""
        own = self.keys is self._own_keys and self.values is self._own_values
        super().crop(tokens_to_remove)
        if own:
            self._own_keys, self._own_values = self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self.lane = None
        self._drop_buffers()

    def offload(self) -> None:
        """As in `DynamicLayer`; the buffers do not stay behind on the device."""
        super().offload()
        self._drop_buffers()


class JamBlockCache(DynamicCache):
    """`DynamicCache` whose full attentions grow in blocks; sliding windows, which stay short, are as they are there.

        model.generate(**inputs, past_key_values=JamBlockCache(config=model.config))

    Args:
        config: the model's config; its `per_layer_config` says how many attentions there are and which of them slide.
        block_size: positions per block. A layer holds room for at most `block_size - 1` positions that it does not use.
    """

    def __init__(self, *, config: PreTrainedConfig, block_size: int = 256):
        super().__init__(config=config)
        self.layers = [JamBlockLayer(block_size) if type(layer) is DynamicLayer else layer for layer in self.layers]


__all__ = ["JamBlockCache", "JamBlockLayer", "gather_columns"]
