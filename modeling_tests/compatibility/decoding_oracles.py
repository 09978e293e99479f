"""Slow, obvious decoding to compare `generate()` with: a full forward for every token, and never a cache.

It also makes the models that the decoding tests share. It knows nothing of transformers' generation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from conftest import VQ_SETTINGS, randomise
from torch import nn

from jam_hf import JamConfig, JamForCausalLM
from jam_hf.model.grammar_jam import PictureGrammar


BY_MODE = [("llama", "uniform", "average"), ("llama", "width", "copy"), ("llama", "cross", "preserving")]
CASES = [
    *BY_MODE,
    ("llama", "cross", "paper"),
    ("opt", "uniform", "average"),
    ("opt", "width", "copy"),
    ("opt", "cross", "preserving"),
]
SHORT = [*BY_MODE, ("opt", "cross", "preserving")]
BREAK = 3


def unequal_streams(text_family: str = "llama") -> JamForCausalLM:
    """A cross JAM whose streams differ: 4 heads on 2 key/value heads and width 32, beside 8 heads, all their own,
    and 64.

    An OPT text stream has 4 heads, all their own.
    """
    common = {"vocab_size": 120, "num_hidden_layers": 3, "max_position_embeddings": 128}
    sizes = {"hidden_size": 32, "num_attention_heads": 4}
    if text_family == "llama":
        text = {"model_type": "llama", "num_key_value_heads": 2, "intermediate_size": 48, **sizes, **common}
    else:
        text = {"model_type": "opt", "ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32, **sizes, **common}
    image = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = JamConfig(
        fusion_mode="cross",
        text_config=text,
        image_config={**image, "intermediate_size": 80, **common},
        vq_config=VQ_SETTINGS,
    )
    model = JamForCausalLM(config).eval()
    randomise(model, seed=5)
    return model


def next_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """int64 `[B, T]` without padding -> float `[B, V]`, of a full forward without a cache."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, -1].float()


def greedy(
    model: nn.Module, prompt: list[int], steps: int, end: int | None = None, process: Callable | None = None
) -> list[int]:
    """The `steps` most likely ids after `prompt`, one after the other; `end` ends it early."""
    ids = list(prompt)
    for _ in range(steps):
        scores = next_logits(model, torch.tensor([ids]))
        if process is not None:
            scores = process(torch.tensor([ids]), scores)
        ids.append(int(scores.argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


def picture_scores(model: nn.Module, prompt_length: int, mode: str, scale: float, max_length: int) -> Callable:
    """`process` for one row: guidance by a second full forward over `<bos> <mask> <break>` and the codes, then the
    grammar.
    """
    config, grammar = model.config, PictureGrammar(model.config)

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        state = grammar.state(ids)
        count = int(state.position)
        if scale != 1 and bool(state.in_picture) and count < config.image_seq_length:
            context = [
                config.bos_token_id,
                config.mask_token_id,
                config.break_token_id,
                *ids[0, ids.shape[1] - count :].tolist(),
            ]
            uncond = next_logits(model, torch.tensor([context]))
            codes = slice(config.image_token_offset, config.image_token_offset + config.num_image_tokens)
            guided = (uncond + scale * (scores - uncond))[:, codes].log_softmax(-1)
            scores = torch.full_like(scores, -torch.inf)
            scores[:, codes] = guided
        allowed = grammar.allowed(ids, scores.shape[-1], mode, prompt_length, max_length)
        return scores.masked_fill(~allowed, float("-inf"))

    return process


def sample(model: nn.Module, ids: torch.Tensor, steps: int, temperature: float = 1.0) -> torch.Tensor:
    """int64 `[B, T]` -> `[B, T + steps]`, drawn with torch's global generator: one draw for the whole batch per
    step.
    """
    for _ in range(steps):
        chances = (next_logits(model, ids) / temperature).softmax(-1)
        ids = torch.cat((ids, torch.multinomial(chances, num_samples=1)), dim=1)
    return ids


def draw_beams(table: torch.Tensor, count: int) -> torch.Tensor:
    """Candidates drawn without replacement, in proportion to their chances."""
    return torch.multinomial(table.softmax(-1), num_samples=count)


def best_beams(table: torch.Tensor, count: int) -> torch.Tensor:
    return table.topk(count).indices


def beam_search(
    model: nn.Module,
    prompt: list[int],
    num_beams: int,
    steps: int,
    end: int | None = None,
    length_penalty: float = 1.0,
    choose: Callable[[torch.Tensor, int], torch.Tensor] = best_beams,
    process: Callable | None = None,
) -> list[tuple[float, list[int]]]:
    """The `num_beams` best continuations of at most `steps` ids and their scores, best first.

    All `num_beams` x V continuations stand in one table. Twice as many candidates are chosen as there are beams, so
    that enough are left where some of them end; only one among the first `num_beams` candidates may end. A score is a
    sum of log probabilities over length ** length_penalty.
    """
    # All but one start so low that they matter only where there is too little to choose from, as in a picture's markup.
    beams: list[tuple[float, list[int]]] = [(0.0, []), *[(-1e9, [])] * (num_beams - 1)]
    done: list[tuple[float, list[int]]] = []
    for step in range(1, steps + 1):
        rows = []
        for total, ids in beams:
            written = torch.tensor([prompt + ids])
            scores = next_logits(model, written).log_softmax(-1)
            rows.append(total + (scores if process is None else process(written, scores))[0])
        size = rows[0].shape[0]
        table = torch.cat(rows)
        chosen = choose(table[None], 2 * num_beams)[0].tolist()
        candidates = [(float(table[place]), [*beams[place // size][1], place % size]) for place in chosen]
        finished = [candidate[1][-1] == end or step == steps for candidate in candidates]
        done += [
            (total / step**length_penalty, ids)
            for (total, ids), is_finished in list(zip(candidates, finished))[:num_beams]
            if is_finished
        ]
        beams = sorted((c for c, is_finished in zip(candidates, finished) if not is_finished), reverse=True)[:num_beams]
        if not beams:
            break
    return sorted(done, reverse=True)[:num_beams]
