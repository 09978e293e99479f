"""Columns of branches beside the document's: random steps against lists of keys, and lanes where pictures are
guided.
"""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from test_guidance import BOS, BREAK, FUSIONS, KINDS, PLACES, SOME, N, batch, check, mixed_rows
from transformers import AttentionInterface, DynamicCache, StoppingCriteria
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from jam_hf.generation.block_cache import JamBlockCache, JamBlockLayer
from jam_hf.generation.packed_columns import DEAD, DOCUMENT, LaneColumns, MixedColumns, lane_attention


HEADS, SIZE = 2, 4  # key/value heads; values are wider than keys


class Columns:
    """Columns in a cache of two layers, and for each row and owner the keys and values that its tokens see."""

    def __init__(self, kind: str, groups: int, rows: int, generator: torch.Generator):
        self.generator, self.module = generator, SimpleNamespace(num_key_value_groups=groups)
        self.cache = DynamicCache()
        if kind == "lanes":
            self.cache.layers = [JamBlockLayer(4), JamBlockLayer(4)]
        self.kind, self.seen = kind, [[{} for _ in range(rows)] for _ in range(2)]
        length = rng_of(generator, 1, 9)
        owner = torch.zeros(rows, length, dtype=torch.int8)
        owner[0, : length // 2] = DEAD  # padding
        for layer in range(2):
            self.cache.update(*self.states(owner, layer), layer)
        self.columns = LaneColumns(self.cache, owner) if kind == "lanes" else MixedColumns(self.cache, owner)

    def states(self, owners: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, count = owners.shape
        keys, values = (torch.randn(rows, HEADS, count, SIZE + more, generator=self.generator) for more in (0, 1))
        for row in range(rows):
            for place, owner in enumerate(owners[row].tolist()):
                if owner != DEAD:
                    held = self.seen[layer][row].setdefault(owner, [])
                    held.append((keys[row, :, place], values[row, :, place]))
        return keys, values

    def by_hand(self, query: torch.Tensor, layer: int, row: int, owner: int, count: int) -> torch.Tensor:
        """Of the first `count` keys that an owner has: `[heads, SIZE]` -> `[heads, SIZE + 1]`."""
        held = self.seen[layer][row][owner][:count]
        keys, values = (
            torch.stack(part, 1).repeat_interleave(self.module.num_key_value_groups, 0) for part in zip(*held)
        )
        weights = (torch.einsum("hd,hsd->hs", query, keys) / math.sqrt(SIZE)).softmax(-1)
        return torch.einsum("hs,hsd->hd", weights, values)

    def step(self, owners: torch.Tensor, document: int) -> None:
        before = [{owner: len(held) for owner, held in row.items()} for row in self.seen[0]]
        laid = self.columns.append(owners, document, torch.float32)
        mask = laid["attention_mask"]
        for layer in range(2):
            keys, values = self.cache.update(*self.states(owners, layer), layer)
            query = torch.randn(
                len(owners), HEADS * self.module.num_key_value_groups, owners.shape[1], SIZE, generator=self.generator
            )
            found = [lane_attention(self.module, query, keys, values, **laid)[0]]
            found.append(sdpa_attention_forward(self.module, query, keys, values, mask)[0])
            for row, its in enumerate(owners.tolist()):
                count = dict(before[row])
                for place, owner in enumerate(its):
                    if owner != DEAD:
                        count[owner] = count.get(owner, 0) + 1
                        expected = self.by_hand(query[row, :, place], layer, row, owner, count[owner])
                        for result in found:
                            torch.testing.assert_close(result[row, place], expected)

    def reorder(self, rows: torch.Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.columns.reorder(rows)
        self.seen = [
            [{owner: list(held) for owner, held in layer[row].items()} for row in rows.tolist()] for layer in self.seen
        ]


def rng_of(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


@pytest.fixture
def unwritten_is_no_number(monkeypatch):
    """What a buffer holds before it is written to is anything at all."""
    made = JamBlockLayer._buffer_like
    monkeypatch.setattr(JamBlockLayer, "_buffer_like", lambda *args: made(*args).fill_(math.nan))


@pytest.mark.sampled
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["lanes", "mixed"])
def test_random_steps_equal_lists_of_keys(kind, groups, unwritten_is_no_number):
    """Openings, steps with one and two branches, rows that leave, columns taken out, rows moved, all closed and
    begun again.
    """
    taken_out = 0
    for seed in range(40):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rows, branches = rng.randint(1, 3), rng.randint(1, 2)
        drawn = Columns(kind, groups, rows, generator)
        live: set[int] = set()
        for _ in range(40):
            what = rng.choice(("open", "step", "step", "step", "step", "leave", "keep", "move"))
            if what == "open" and len(live) < rows:
                entered = rng.choice([row for row in range(rows) if row not in live])
                live.add(entered)
                for branch in range(1, branches + 1):
                    count, padding = rng.randint(1, 5), rng.randint(0, 2)
                    owners = torch.full((rows, padding + count), DEAD, dtype=torch.int8)
                    owners[entered, padding:] = branch
                    drawn.step(owners, 0)
            elif what == "step" and live:
                owners = torch.full((rows, 1 + branches), DEAD, dtype=torch.int8)
                owners[:, 0] = DOCUMENT
                for row in live:
                    owners[row, 1:] = torch.arange(1, 1 + branches)
                drawn.step(owners, 1)
            elif what == "leave" and live:
                row = rng.choice(sorted(live))
                live.remove(row)
                drawn.columns.leave([row])
                for layer in drawn.seen:
                    layer[row] = {DOCUMENT: layer[row].get(DOCUMENT, [])}
            elif what == "keep":
                held = drawn.columns.beside
                drawn.columns.keep_those_of_branches()
                most = max(sum(len(keys) for owner, keys in row.items() if owner) for row in drawn.seen[0])
                assert drawn.columns.beside == most
                taken_out += held - most
            elif what == "move":
                order = torch.tensor([rng.randrange(rows) for _ in range(rows)])
                drawn.reorder(order)
                live = {row for row, source in enumerate(order.tolist()) if source in live}
        length = drawn.columns.length
        drawn.columns.close()
        for number, layer in enumerate(drawn.cache.layers):
            assert layer.get_seq_length() == length
            for row in range(rows):
                keys, values = (torch.stack(part, 1) for part in zip(*drawn.seen[number][row][DOCUMENT]))
                assert torch.equal(layer.keys[row, :, -keys.shape[1] :], keys)
                assert torch.equal(layer.values[row, :, -keys.shape[1] :], values)
    assert taken_out > 100


def test_a_block_is_filled_without_a_copy(monkeypatch):
    """The document grows into the room before its lane; every 64 steps that room and the lane's are made anew."""
    made, buffer_like = [], JamBlockLayer._buffer_like
    monkeypatch.setattr(JamBlockLayer, "_buffer_like", lambda *args: made.append(args) or buffer_like(*args))
    cache = DynamicCache()
    cache.layers = [JamBlockLayer(64)]
    cache.update(*torch.zeros(2, 1, 1, 10, 4), 0)
    columns = LaneColumns(cache, torch.zeros(1, 10, dtype=torch.int8))
    made.clear()
    for _ in range(4 * 64):
        columns.append(torch.tensor([[DOCUMENT, 1]], dtype=torch.int8), 1, torch.float32)
        cache.update(*torch.zeros(2, 1, 1, 2, 4), 0)
    assert len(made) <= 2 * (1 + 4 + 4)  # keys and values


@pytest.fixture
def lanes(monkeypatch):
    """What sdpa was called with over a cache: tokens, and the document's among them, `None` without lanes."""
    calls = []

    def recording(module, query, key, value, attention_mask, **kwargs):
        told = kwargs.get("jam_lanes")
        if told is not None or key.shape[2] > query.shape[2]:
            calls.append((query.shape[2], None if told is None else told[0]))
        return lane_attention(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", recording)
    return calls


def attentions(model) -> list[str]:
    configs = (getattr(module, "config", None) for module in model.modules())
    return [config._attn_implementation for config in configs if hasattr(config, "_attn_implementation")]


@pytest.mark.sampled
@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_lanes_of_many_blocks_equal_the_oracle(fusion, kind, jam, lanes, unwritten_is_no_number):
    """Blocks of three columns: the lane moves many times in a picture. The model's attention is afterwards what it
    was.
    """
    model = jam(*fusion)
    before = attentions(model)
    check(
        model, KINDS[kind], "interleaved", 2 * N + 8, past_key_values=JamBlockCache(config=model.config, block_size=3)
    )
    packed = 3 if kind == "two scales" else 2
    assert lanes.count((packed, 1)) >= 2 * N * len(model.config.per_layer_config) // 2
    assert (packed, None) not in lanes
    assert attentions(model) == before


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_call_that_breaks_off_in_a_picture_leaves_the_model_as_it_was(attention, jam, lanes):
    model = jam("llama", "cross", "preserving")
    model.set_attn_implementation(attention)
    before, asked = (
        attentions(model),
        {**batch(mixed_rows(model)), "generation_mode": "interleaved", "guidance_scale": 3.0},
    )
    asked |= {"image_positions": list(PLACES), "max_new_tokens": 2 * N + 8, "do_sample": False}
    whole = model.generate(**asked)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == asked["input_ids"].shape[1] + N // 2:
                during.append(attentions(model))
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    during: list[list[str]] = []
    with pytest.raises(KeyboardInterrupt):
        model.generate(**asked, stopping_criteria=[Stop()])
    assert during[0] == before and (attention == "sdpa") == any(of_document == 1 for _, of_document in lanes)
    assert attentions(model) == before
    assert torch.equal(model.generate(**asked), whole)


def test_a_cache_given_with_beams_has_lanes_too(jam, lanes):
    """Beam search moves the rows of a cache; what it moves is laid into new buffers."""
    model = jam("llama", "cross", "preserving")
    prompt = torch.tensor([[BOS, 30, 31, BREAK]])
    asked = {"generation_mode": "image", "guidance_scale": 2.0, "num_beams": 3, "do_sample": False}
    apart = model.generate(prompt, **asked, use_cache=False)
    found = model.generate(prompt, **asked, past_key_values=JamBlockCache(config=model.config, block_size=5))
    assert torch.equal(found, apart)
    assert lanes.count((2, 1)) > N
