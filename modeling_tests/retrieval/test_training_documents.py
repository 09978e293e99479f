"""Training documents with a retriever: against hand-made ids, through `encode_documents`, CM3 and the collator."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from model import test_picture_layout
from model.test_picture_layout import BOS, EOS, FIRST, LAYOUTS, MASK, VOCABULARY, picture
from retrieval.tiny_index import N, TableEmbedder, layout_jam, pairs, processor_for

from jam_hf.data.cm3 import CM3Settings
from jam_hf.data.collator import JamDataCollator
from jam_hf.data.sequences import encode_documents
from jam_hf.retrieval import (
    RetrievalSettings,
    build_index,
    documents_with_memory,
    documents_with_retrieval,
    stack_codes,
)


layout_tokenizer = test_picture_layout.layout_tokenizer  # a fixture


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, layout_tokenizer):
    """`worlds(layout)` -> JAM, processor and an index of 30 documents."""
    made = {}

    def make(name="plain"):
        if name not in made:
            model, processor = layout_jam(name), processor_for(layout_tokenizer, name)
            folder = tmp_path_factory.mktemp("index") / "index"
            made[name] = (model, processor, build_index(pairs(30), model, processor, folder, embedder=TableEmbedder(5)))
        return made[name]

    return make


def retrieved_by_hand(index, text, codes, count, limit=0.9):
    """Slowly: every document but the pair itself, the best first, none near the query or one that was taken."""
    query = index.embedder.embed([text], [[]])[0]
    documents = [d for d in index.documents if (d["text"], d["codes"]) != (text, codes)]
    chosen = []
    for document in sorted(documents, key=lambda d: -float(np.dot(d["embedding"], query))):
        near = [query, *(other["embedding"] for other in chosen)]
        if len(chosen) < count and all(min(1.0, float(np.dot(document["embedding"], v))) <= limit for v in near):
            chosen.append(document)
    return chosen


def encode(rows, model, processor, **settings):
    encoded = encode_documents(rows, processor.tokenizer, stack_codes, config=model.config, **settings)
    return [list(ids) for ids in encoded["input_ids"]]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("of_the_index", [True, False])
def test_documents_against_hand_made_ids(name, of_the_index, worlds):
    model, processor, index = worlds(name)
    given = None if of_the_index else [*pairs(6, seed=1), *pairs(3)]  # new ones, and three that the index has
    rows = documents_with_retrieval(index, model, given, seed=3, batch_size=4)
    tokens, layout = processor.tokenizer, LAYOUTS[name]
    drawn = []
    for number, (row, ids) in enumerate(zip(rows, encode(rows, model, processor))):
        text = index.documents[number]["text"] if of_the_index else given[number]["text"]
        if of_the_index:
            codes = index.documents[number]["codes"]
        else:
            pixels = processor.image_processor([given[number]["image"]], return_tensors="pt")["pixel_values"]
            codes = model.model.vq_model.encode(pixels)[0].tolist()
        count = int(np.random.default_rng([3, number]).integers(3))
        expected = retrieved_by_hand(index, text, codes, count)
        assert row["retrieved_ids"] == [d["id"] for d in expected]
        by_hand = [BOS]
        for caption, own in [*((d["text"], d["codes"]) for d in expected), (text, codes)]:
            by_hand += tokens(caption, add_special_tokens=False)["input_ids"]
            by_hand += picture(layout, [FIRST + code for code in own])
        assert ids == [*by_hand, EOS]
        drawn.append(len(row["retrieved_ids"]))
    assert {0, 1, 2} == set(drawn)


def test_the_pair_itself_is_left_out_where_nothing_is_a_near_duplicate(worlds, monkeypatch):
    model, _, index = worlds()
    monkeypatch.setattr(index, "settings", RetrievalSettings(2, 1.0))
    rows = documents_with_retrieval(index, model, max_documents=1, seed=0)
    found = [row["retrieved_ids"] for row in rows]
    assert any(found) and not any(str(number) in ids for number, ids in enumerate(found))


def test_a_namesake_is_not_the_pair_itself(tmp_path, worlds):
    """Of one caption's two pictures, each may be retrieved for the other, where the threshold lets it."""
    model, processor, _ = worlds()
    twins = [{"text": "red", "codes": [0] * N}, {"text": "red", "codes": [1] * N}]
    index = build_index(
        twins, model, processor, tmp_path / "a", embedder=TableEmbedder(), settings=RetrievalSettings(1, 1.0)
    )
    seeds = [documents_with_retrieval(index, model, seed=seed)["retrieved_ids"][:] for seed in range(6)]
    assert {tuple(ids) for rows in seeds for ids in rows[:1]} == {(), ("1",)}
    assert {tuple(ids) for rows in seeds for ids in rows[1:]} == {(), ("0",)}


def test_the_seed_decides_and_the_batches_do_not(worlds):
    model, _, index = worlds()
    first, again, other = (
        documents_with_retrieval(index, model, seed=seed, batch_size=size)[:]
        for seed, size in ((0, 64), (0, 7), (1, 64))
    )
    assert first == again != other
    older = documents_with_memory(index, model)[:]
    assert older.pop("memory_ids") == first["retrieved_ids"] and older.items() <= first.items()
    none = documents_with_retrieval(index, model, max_documents=0)
    assert none["retrieved_ids"][:] == [[]] * 30 and none["text"][:] == [f"{d['text']}<image>" for d in index.documents]


@pytest.mark.parametrize("name", ["plain", "emu3"])
def test_what_does_not_fit_is_left_out_the_least_similar_first(name, worlds):
    model, processor, index = worlds(name)
    free = documents_with_retrieval(index, model, max_documents=3, seed=1)
    lengths = [len(ids) for ids in encode(free, model, processor)]
    limit = sorted(lengths)[len(lengths) // 2]
    rows = documents_with_retrieval(index, model, max_documents=3, seed=1, max_length=limit)
    fitted = encode(rows, model, processor, max_length=limit)
    shorter = 0
    for row, ids, before, length in zip(rows, fitted, free, lengths):
        kept = len(row["retrieved_ids"])
        assert row["retrieved_ids"] == before["retrieved_ids"][:kept] and len(ids) <= limit
        assert (kept == len(before["retrieved_ids"])) == (length <= limit)
        if length > limit:  # and the next one would not have fitted
            shorter += 1
            next_one = index.documents[int(before["retrieved_ids"][kept])]
            more = len(processor.tokenizer(next_one["text"], add_special_tokens=False)["input_ids"])
            assert len(ids) + more + model.config.picture_length + 2 > limit
    assert shorter > 3
    alone = documents_with_retrieval(index, model, max_documents=3, seed=1, max_length=5)
    assert alone["retrieved_ids"][:] == [[]] * 30
    with pytest.raises(ValueError, match="max_length is 5"):
        encode(alone, model, processor, max_length=5)


def test_a_training_step_with_cm3(worlds):
    model, processor, index = worlds("emu3")
    model = copy.deepcopy(model).train()
    rows = documents_with_retrieval(index, model, seed=0)
    documents = encode_documents(rows, processor.tokenizer, stack_codes, config=model.config)
    cm3 = CM3Settings.from_config(model.config, whole_segment_probability=0.5)
    batch = JamDataCollator(0, VOCABULARY, cm3)(list(documents.select(range(8))))
    assert (batch["input_ids"] == MASK).any()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_bad_input_is_answered(worlds):
    model, _, index = worlds()
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="max_documents must be a whole number"):
            documents_with_retrieval(index, model, max_documents=wrong)
    with pytest.raises(ValueError, match="with the columns text"):
        documents_with_retrieval(index, model, Dataset.from_list([{"text": "a"}]))
    with pytest.raises(ValueError, match="special token '<break>'"):
        documents_with_retrieval(index, model, [{"text": "a<break>", "codes": [0] * N}])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.vq_model.vq.quantize.embedding.weight.mul_(1.01)
    with pytest.raises(ValueError, match="those of another VQ model"):
        documents_with_retrieval(index, other)
