"""`generate(retriever=index)` from end to end: what the index is asked for a prompt, what it answers, and what is
written.
"""

import copy

import numpy as np
import pytest
import torch
from conftest import same_picture
from model import test_picture_layout
from model.test_picture_layout import BOS, BREAK, FIRST, IMAGE, LAYOUTS, picture
from retrieval.tiny_index import N, TableEmbedder, layout_jam, noise, pairs, processor_for, tiny_clip

from jam_hf import JamProcessor
from jam_hf.generation.retrieval_prompts import RetrievalQuery
from jam_hf.retrieval import ClipEmbedder, RetrievalSettings, build_index


layout_tokenizer = test_picture_layout.layout_tokenizer  # a fixture


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return ClipEmbedder(tiny_clip(tmp_path_factory.mktemp("clip") / "clip"))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, layout_tokenizer, clip):
    """`worlds(layout)` -> JAM, processor and an index of 20 documents."""
    made = {}

    def make(name="plain"):
        if name not in made:
            model, processor = layout_jam(name, "cross"), processor_for(layout_tokenizer, name)
            folder = tmp_path_factory.mktemp("index") / "index"
            made[name] = (model, processor, build_index(pairs(20), model, processor, folder, embedder=clip))
        return made[name]

    return make


def document_by_hand(index, processor, name, layout):
    row = index.documents[int(name)]
    text = processor.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
    return [*text, *picture(layout, [FIRST + code for code in row["codes"]])]


@pytest.mark.parametrize("name", LAYOUTS)
def test_documents_of_the_index_stand_before_the_prompts(name, worlds):
    model, processor, index = worlds(name)
    prompts = ["red star", "a large blue circle or a square"]
    inputs = processor(text=prompts, padding=True, return_tensors="pt")
    found = index.retrieve(prompts)
    assert [len(documents) for documents in found] == [2, 2]
    rows = []
    for text, documents in zip(prompts, found):
        before = [token for d in documents for token in document_by_hand(index, processor, d.id, LAYOUTS[name])]
        rows.append([BOS, *before, *processor.tokenizer(text, add_special_tokens=False)["input_ids"]])
    width = max(map(len, rows))
    by_hand = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    settings = {"generation_mode": "image", "guidance_scale": 2.0, "do_sample": False}
    expected = model.generate(input_ids=by_hand, attention_mask=(by_hand != 0).long(), **settings)
    output = model.generate(**inputs, retriever=index, return_dict_in_generate=True, **settings)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :length], inputs["input_ids"])
    assert torch.equal(output.sequences[:, length:], expected[:, width:])
    assert output.retrieved_ids == [[d.id for d in documents] for documents in found]
    scores = [[d.score for d in documents] for documents in found]
    np.testing.assert_allclose(output.retrieved_scores, scores, atol=1e-6)
    augmented = index.augment(model, inputs)
    assert torch.equal(augmented.input_ids, by_hand) and augmented.retrieved_ids == output.retrieved_ids
    written = model.generate(input_ids=augmented.input_ids, attention_mask=augmented.attention_mask, **settings)
    assert torch.equal(augmented.cut(written), output.sequences)
    for row in processor.post_process_interleaved(output, model, prompt_length=length):
        assert [segment["type"] for segment in row] == ["image"]


class Asked:
    """An embedder that keeps what it was asked."""

    def __init__(self, embedder):
        self.embedder, self.texts, self.images = embedder, [], []
        self.name, self.size = embedder.name, embedder.size

    def embed(self, texts, images):
        self.texts, self.images = list(texts), [list(each) for each in images]
        return self.embedder.embed(texts, images)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_prompt_asks_for(name, worlds, monkeypatch):
    """Its words without markup; pictures as they came in pixels, or decoded where they came as codes; no half-drawn
    ones.
    """
    model, processor, index = worlds(name)
    asked, layout = Asked(index.embedder), LAYOUTS[name]
    monkeypatch.setattr(index, "embedder", asked)
    red, star = (processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("red", "star"))
    codes = [(3 * i) % 16 for i in range(N)]
    coded = picture(layout, [FIRST + code for code in codes])
    hole, half = picture(layout, [IMAGE] * N), coded[:9]
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = [
        RetrievalQuery(torch.tensor([BOS, *red, *hole, *star, *coded, *hole]), pixels),
        RetrievalQuery(torch.tensor([BOS, *red, *half]), pixels[:0]),
        RetrievalQuery(torch.tensor([BOS, *coded]), pixels[:0]),
    ]
    answers = index.documents_for(model, rows)
    assert asked.texts == ["red star", "red", None]
    decoded = model.decode_image_tokens(torch.tensor([codes]) + FIRST)
    shown = processor.image_processor.postprocess
    for pictures, expected in zip(asked.images, ([*shown(pixels), *shown(decoded)], [], shown(decoded))):
        assert len(pictures) == len(expected)
        assert all(same_picture(a, b) for a, b in zip(pictures, expected))
    assert [len(documents) for documents in answers] == [2, 2, 2]


def test_a_chat_asks_for_its_words(worlds, monkeypatch):
    model, processor, index = worlds()
    monkeypatch.setattr(index, "embedder", Asked(index.embedder))
    chat = [{"role": "user", "content": "a blue star"}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(**inputs, retriever=index, max_new_tokens=2, do_sample=False)
    assert index.embedder.texts == ["a blue star"]
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


def test_a_picture_of_the_index_finds_others_than_itself(worlds):
    """As a prompt of pixels it scores as it did when the index was built: above 0.9, so that it is dropped."""
    model, processor, index = worlds()
    row = pairs(20)[7]
    inputs = processor(text=row["text"] + "<image>", images=[row["image"]], return_tensors="pt")
    output = model.generate(**inputs, retriever=index, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert "7" not in output.retrieved_ids[0] and len(output.retrieved_ids[0]) == 2
    settings, index.settings = index.settings, RetrievalSettings(1, 1.0)
    output = model.generate(**inputs, retriever=index, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    index.settings = settings
    assert output.retrieved_ids == [["7"]] and output.retrieved_scores[0][0] == pytest.approx(1.0, abs=1e-5)


def test_prompts_that_ask_for_nothing_and_models_of_other_codes(worlds):
    model, processor, index = worlds()
    ids = torch.tensor([[BOS, 30], [BOS, BREAK]])
    with pytest.raises(ValueError, match="Prompt 1 has neither text nor a whole picture"):
        model.generate(ids, retriever=index, max_new_tokens=2)
    other = layout_jam("plain", "cross")
    with torch.no_grad():
        other.model.vq_model.vq.quantize.embedding.weight.mul_(1.01)
    with pytest.raises(ValueError, match="those of another VQ model"):
        other.generate(torch.tensor([[BOS, 30]]), retriever=index, max_new_tokens=2)


def test_a_saved_processor_serves(worlds, tmp_path):
    model, processor, index = worlds()
    processor.save_pretrained(tmp_path)
    again = copy.copy(index)
    again.processor = JamProcessor.from_pretrained(tmp_path)
    inputs = processor(text=["red"], return_tensors="pt")
    outputs = [
        model.generate(**inputs, retriever=i, generation_mode="image", do_sample=False).tolist() for i in (index, again)
    ]
    assert outputs[0] == outputs[1]


def test_an_index_without_enough_documents_gives_what_it_has(tmp_path, worlds):
    model, processor, _ = worlds()
    index = build_index(
        [{"text": "red", "image": noise(0)}, {"text": "red", "image": noise(1)}, {"text": "blue", "image": noise(2)}],
        model,
        processor,
        tmp_path / "index",
        embedder=TableEmbedder(),
        settings=RetrievalSettings(num_documents=5),
    )
    output = model.generate(
        **processor(text=["star", "red"], padding=True, return_tensors="pt"),
        retriever=index,
        max_new_tokens=2,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert sorted(output.retrieved_ids[0]) == ["0", "2"] and output.retrieved_ids[1] == [
        "2"
    ]  # of two alike, one; none like the query


def test_candidates_are_drawn_after_the_documents_and_stand_where_they_are_said_to(worlds):
    """Both go together: the candidate that is kept is at its slot's place in the sequences without documents."""
    model, processor, index = worlds()
    inputs = processor(text=["red star", "a large blue circle or a square"], padding=True, return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(
        **inputs,
        retriever=index,
        generation_mode="image",
        do_sample=True,
        num_candidates=3,
        reranker=lambda candidates: -candidates.codes.sum(1).float(),
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert len(output.picture_slots) == 2 and all(len(ids) == 2 for ids in output.retrieved_ids)
    for slot in output.picture_slots:
        assert output.sequences[slot.row, slot.start] == BREAK
        codes = output.sequences[slot.row, slot.start + 1 : slot.start + 1 + N]
        assert torch.equal(codes, slot.codes[slot.chosen]) and slot.scores.argmax() == slot.chosen
