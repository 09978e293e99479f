"""The models of decoding.py, and what its calls to `generate()` are given: a clock, an end, a place for a picture."""

from __future__ import annotations

import copy
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, StoppingCriteria

from jam_hf import JamConfig, JamForCausalLM


TEXT, CODES, BREAK = 32000, 8192, 3
SHAPES = {  # hidden size, FFN, layers, heads, key/value heads, tied embeddings
    "d512": (512, 1408, 8, 8, 8, True),
    "100m": (768, 2048, 12, 12, 12, True),
    "1b": (2048, 8192, 16, 32, 8, True),
    "7b": (4096, 11008, 32, 32, 32, False),
}


def make(name: str, dtype: torch.dtype, codes: int, device: str = "cpu") -> tuple[JamForCausalLM, nn.Module]:
    """The JAM and its peer; `name` is a shape, or a shape and "-cross"."""
    shape, _, cross = name.partition("-")
    width, inner, layers, heads, key_value_heads, tied = SHAPES[shape]
    text = LlamaConfig(
        vocab_size=TEXT + CODES,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=2 * codes + 2000,
        tie_word_embeddings=tied and not cross,
        pad_token_id=0,
        eos_token_id=None,  # no row ends by chance
    )
    vq = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "latent_channels": 8, "num_vq_embeddings": CODES}
    vq |= {"norm_num_groups": 4, "mid_block_add_attention": False, "sample_size": 8 * math.isqrt(codes)}
    config = JamConfig(fusion_mode=cross or "uniform", text_config=copy.deepcopy(text), vq_config=vq, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        jam = JamForCausalLM._from_config(config, dtype=dtype).eval()
    if cross:
        for name, parameter in jam.named_parameters():
            if "_cross." in name and parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        return jam, jam
    with torch.device("meta"):
        peer = LlamaForCausalLM._from_config(text, dtype=dtype).eval()
    peer.model, peer.lm_head = jam.model.language_model, jam.lm_head
    return jam, peer


class StepClock:
    """A streamer that takes the time of every token."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.times = clock, []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        pass

    def seconds(self) -> float:
        """Of a step: the median. The prompt and the first two tokens do not count."""
        return statistics.median(later - sooner for sooner, later in zip(self.times[3:], self.times[4:]))


class Share:
    """While it is entered: what calls of `methods` take, and of a step of `generate()` what part that is."""

    def __init__(self, methods: list[tuple[type, str]], clock: Callable[[], float]):
        self.methods, self.clock = methods, clock
        self.originals: list[Any] = []
        self.seconds: dict[str, list[float]] = {}

    def __enter__(self) -> Share:
        for owner, name in self.methods:
            original, taken = getattr(owner, name), self.seconds.setdefault(f"{owner.__name__}.{name}", [])

            @functools.wraps(original)  # transformers looks at what a logits processor takes
            def timed(*args: Any, original: Any = original, taken: list[float] = taken, **kwargs: Any) -> Any:
                start = self.clock()
                try:
                    return original(*args, **kwargs)
                finally:
                    taken.append(self.clock() - start)

            self.originals.append(original)
            setattr(owner, name, timed)
        return self

    def __exit__(self, *error: Any) -> None:
        for (owner, name), original in zip(self.methods, self.originals):
            setattr(owner, name, original)
        self.originals = []

    def of(self, step: float) -> float:
        """The medians of the calls, one of each method a step, by the seconds of a step."""
        return sum(statistics.median(taken) for taken in self.seconds.values() if taken) / step


class StopAt(StoppingCriteria):
    """Ends a call at a length, before which there is room for more; `last_step` is called there."""

    def __init__(self, length: int, last_step: Callable[[], None] = lambda: None):
        self.length, self.last_step = length, last_step

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = input_ids.shape[1] >= self.length
        if done:
            self.last_step()
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)


class PictureAt(LogitsProcessor):
    """Opens a picture where the document has this length, and none before."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] < self.length:
            scores[:, BREAK] = -math.inf
        elif input_ids.shape[1] == self.length:
            scores = torch.full_like(scores, -math.inf)
            scores[:, BREAK] = 0.0
        return scores
