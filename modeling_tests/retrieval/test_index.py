"""The index of a retriever: what CLIP makes of texts and pictures, what is found, files, and bad input."""

import copy
import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import same_picture
from datasets import Dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from retrieval.tiny_index import N, TableEmbedder, layout_jam, noise, pairs, processor_for, tiny_clip
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from jam_hf import JamVQModel
from jam_hf.retrieval import ClipEmbedder, RetrievalSettings, build_index, load_index
from jam_hf.retrieval.build import load_vq_model
from jam_hf.retrieval.corpus import caption_ids
from jam_hf.retrieval.index import without_near_duplicates


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def model():
    return layout_jam()


@pytest.fixture(scope="module")
def jam_processor(tokenizer):
    return processor_for(copy.deepcopy(tokenizer))


@pytest.fixture(scope="module")
def table_index(tmp_path_factory, model, jam_processor):
    """40 documents in random directions."""
    folder = tmp_path_factory.mktemp("index") / "index"
    return build_index(pairs(40), model, jam_processor, folder, embedder=TableEmbedder(), batch_size=7)


# ----- CLIP -----------------------------------------------------------------------------------------------------------


def by_hand(folder, text, images):
    """The stock model's text and image embeddings, one input at a time, and their mean."""
    stock, parts = CLIPModel.from_pretrained(folder).eval(), []
    with torch.no_grad():
        if text is not None:
            tokens = AutoTokenizer.from_pretrained(folder)([text], return_tensors="pt")
            parts.append(stock.get_text_features(**tokens).pooler_output[0])
        if images:
            pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")
            each = [stock.get_image_features(**pixels(i, return_tensors="pt")).pooler_output[0] for i in images]
            parts.append(torch.stack([F.normalize(e, dim=0) for e in each]).mean(0))
    mean = torch.stack([F.normalize(part, dim=0) for part in parts]).mean(0)
    return F.normalize(mean, dim=0).numpy()


def test_embeddings_are_the_means_of_the_stock_models(clip_folder):
    embedder = ClipEmbedder(clip_folder)
    queries = [
        ("red circle", []),
        (None, [noise(1)]),
        ("a", [noise(2, 40)]),
        ("blue star small", [noise(3), noise(4, 20)]),
        (" ", [noise(5)]),
    ]
    found = embedder.embed(*zip(*queries))
    assert found.dtype == np.float32 and found.shape == (5, 12)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    for vector, (text, images) in zip(found, queries):
        np.testing.assert_allclose(vector, by_hand(clip_folder, text if text != " " else None, images), atol=1e-5)
    assert (found @ found.T)[np.triu_indices(5, 1)].max() < 0.98  # the random CLIP tells them apart


def test_a_text_longer_than_clip_reads_is_cut(clip_folder):
    embedder = ClipEmbedder(clip_folder)
    whole, shorter = "green " * 15, "green " * 14  # 75 letters and two marks are what it reads
    long = embedder.embed([whole + "red"], [[]])
    np.testing.assert_allclose(long, embedder.embed([whole], [[]]), atol=1e-5)
    assert not np.allclose(long, embedder.embed([shorter], [[]]), atol=1e-3)


def test_what_is_no_clip_or_no_query_is_refused(tmp_path, clip_folder):
    with pytest.raises(ValueError, match="cannot be read as a CLIP model"):
        ClipEmbedder(str(tmp_path))
    half = CLIPModel.from_pretrained(clip_folder)
    half.save_pretrained(tmp_path / "half", state_dict=half.text_model.state_dict())
    with pytest.raises(ValueError, match="lacks [0-9]+ weights of a CLIPModel"):
        ClipEmbedder(tmp_path / "half")
    embedder = ClipEmbedder(clip_folder)
    with pytest.raises(ValueError, match="Nothing to embed in number 1"):
        embedder.embed(["a", " "], [[], []])
    with pytest.raises(ValueError, match="2 texts and 1 lists"):
        embedder.embed(["a", "b"], [[]])


# ----- search ---------------------------------------------------------------------------------------------------------


def slow_choice(scores, vectors, wanted, limit):
    """Candidate by candidate, document by document."""
    chosen = []
    for i, score in enumerate(scores):
        near = score > limit
        for j in chosen:
            if min(1.0, sum(float(a) * float(b) for a, b in zip(vectors[i], vectors[j]))) > limit:
                near = True
        if not near and len(chosen) < wanted:
            chosen.append(i)
    return chosen


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(0, 6), st.floats(-0.5, 1.0), st.integers(2, 4))
def test_near_duplicates_against_a_slow_loop(seed, count, wanted, limit, size):
    rng = np.random.default_rng(seed)
    query, vectors = rng.standard_normal(size), rng.standard_normal((count, size)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = np.minimum(vectors @ (query / np.linalg.norm(query)), 1.0)
    order = np.argsort(-scores)
    scores, vectors = scores[order].tolist(), vectors[order]
    assert without_near_duplicates(scores, vectors, wanted, limit) == slow_choice(scores, vectors, wanted, limit)


@pytest.mark.parametrize("limit", [1.0, 0.9, 0.3, -0.2])
@pytest.mark.parametrize("wanted", [0, 1, 2, 5, 39, 40, 60])
def test_search_against_brute_force(wanted, limit, table_index, monkeypatch):
    """However many rounds it takes: with a low limit nearly all documents are near-duplicates."""
    monkeypatch.setattr(table_index, "settings", RetrievalSettings(wanted, limit))
    vectors = torch.tensor(table_index.documents["embedding"][:])
    queries = TableEmbedder().embed(["red", "blue", "a star"], [[]] * 3)
    for query, found in zip(queries, table_index.search(queries)):
        scores, order = (vectors @ torch.tensor(query)).sort(descending=True)
        expected = slow_choice(scores.tolist(), vectors[order].numpy(), wanted, limit)
        assert [row for _, row in found] == order[expected].tolist()
        np.testing.assert_allclose([score for score, _ in found], scores[expected], atol=1e-6)


def test_rows_left_out_are_not_found_and_stand_in_nobodys_way(table_index):
    queries = TableEmbedder().embed(["red", "blue"], [[]] * 2)
    (best, second, third), blue = table_index.search(queries, [3, 1])
    (first, after), none, same = table_index.search(queries[[0, 0, 1]], [2, 0, 1], [[best[1], third[1]], [], []])
    assert first == second and after not in (best, third) and none == [] and same == blue


def test_queries_of_text_pictures_and_both(clip_folder, tmp_path, model, jam_processor):
    """Each document is found by its own text, its picture and both; its number of near-duplicates is set by the
    threshold.
    """
    rows, embedder = pairs(12), ClipEmbedder(clip_folder)
    everything = RetrievalSettings(num_documents=1, max_score=1.0)
    index = build_index(rows, model, jam_processor, tmp_path / "index", embedder=embedder, settings=everything)
    vectors = np.stack([by_hand(clip_folder, row["text"], [square(jam_processor, row["image"])]) for row in rows])
    np.testing.assert_allclose(np.array(index.documents["embedding"]), vectors, atol=1e-5)
    texts, images = [row["text"] for row in rows], [row["image"] for row in rows]
    for query in ({"texts": texts}, {"images": images}, {"texts": texts, "images": images}):
        expected = embedder.embed(
            query.get("texts", [None] * 12), [[square(jam_processor, i)] for i in query.get("images", [])] or [[]] * 12
        )
        for (found,), scores in zip(index.retrieve(**query), expected @ vectors.T):
            assert int(found.id) == scores.argmax() and found.text == rows[scores.argmax()]["text"]
            assert found.score == pytest.approx(scores.max(), abs=1e-5)
    for number, (found,) in enumerate(index.retrieve(texts, images)):
        assert int(found.id) == number and found.score == pytest.approx(1.0, abs=1e-5)
        pixels = jam_processor.image_processor([images[number]], return_tensors="pt")["pixel_values"]
        assert torch.equal(torch.tensor(found.codes)[None], model.model.vq_model.encode(pixels))
    index.settings = RetrievalSettings(num_documents=12)
    for number, found in enumerate(index.retrieve(texts, images)):
        assert str(number) not in [document.id for document in found]  # its score is above 0.9
    mixed = index.retrieve([None, "red"], [[images[0]], None])
    for found, expected in zip(mixed, (*index.retrieve(images=images[0]), *index.retrieve("red"))):
        assert [document.id for document in found] == [document.id for document in expected] and found


def square(processor, image) -> Image.Image:
    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    return processor.image_processor.postprocess(pixels)[0]


def test_queries_that_are_none(table_index):
    with pytest.raises(ValueError, match="expected texts, images or both"):
        table_index.retrieve()
    with pytest.raises(ValueError, match="2 texts and 1 entries of pictures"):
        table_index.retrieve(["a", "b"], [noise(0)])
    with pytest.raises(ValueError, match="no such file"):
        table_index.retrieve(images=["nowhere.png"])
    for wrong in (
        {"num_documents": -1},
        {"num_documents": 1.5},
        {"num_documents": True},
        {"max_score": 2},
        {"max_score": "1"},
    ):
        with pytest.raises(ValueError, match=f"RetrievalSettings: {next(iter(wrong))} must be"):
            RetrievalSettings(**wrong)


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (lambda count, size: np.full((count, size), np.nan), "a vector of length nan for input 0"),
        (lambda count, size: np.eye(size)[:count] * 100, "a vector of length 100.0 for input 0; expected length 1"),
        (lambda count, size: np.zeros((count, size)), "a vector of length 0.0"),
        (lambda count, size: np.eye(size + 1)[:count], r"gave an array [2, 7] for 2 inputs; expected [2, 6]"),
        (lambda count, size: np.eye(size)[:1], r"gave an array [1, 6] for 2 inputs"),
    ],
)
def test_an_embedder_that_does_not_do_what_it_must_is_told(
    vectors, words, table_index, monkeypatch, tmp_path, model, jam_processor
):
    with monkeypatch.context() as patched:
        patched.setattr(table_index.embedder, "embed", lambda texts, images: vectors(len(texts), 6))
        with pytest.raises(ValueError, match=re.escape(words)):
            table_index.retrieve(["a", "b"])
    embedder = TableEmbedder()
    embedder.embed = lambda texts, images: vectors(len(texts), 6)
    with pytest.raises(ValueError, match=re.escape(words)):
        build_index(pairs(2), model, jam_processor, tmp_path / "index", embedder=embedder)
    assert list(tmp_path.iterdir()) == []


def test_no_query_has_no_answer_and_batches_have_pictures(table_index, tmp_path, model, jam_processor):
    assert table_index.retrieve([]) == []
    for size in (0, -3, 1.5):
        with pytest.raises(ValueError, match="batch_size must be a number of pictures"):
            build_index(pairs(2), model, jam_processor, tmp_path / "index", embedder=TableEmbedder(), batch_size=size)
    with pytest.raises(ValueError, match="a list with one dict for each document"):
        build_index(
            {"text": ["a"], "image": [noise(0)]}, model, jam_processor, tmp_path / "index", embedder=TableEmbedder()
        )


# ----- files ----------------------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back(tmp_path, model, jam_processor, clip_folder):
    chosen = RetrievalSettings(3, 0.8)
    rows = [{"id": f"doc-{i}", **row} for i, row in enumerate(pairs(9))]
    built = build_index(rows, model, jam_processor, tmp_path / "a", embedder=ClipEmbedder(clip_folder), settings=chosen)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(ValueError, match="an embedder that is not on the Hub, 'clip'. Say where it lies"):
        load_index(tmp_path / "b", jam_processor)
    assert str(clip_folder.parent) not in (tmp_path / "b" / "index.json").read_text()
    loaded = load_index(tmp_path / "b", jam_processor, ClipEmbedder(clip_folder))
    assert loaded.settings == chosen and loaded.embedder.name == str(clip_folder)
    assert loaded.documents["id"][:] == [f"doc-{i}" for i in range(9)]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["documents", "documents.faiss", "index.json"]
    for one, other in zip(built.retrieve(["red", "blue"]), loaded.retrieve(["red", "blue"])):
        assert [(d.id, d.score, d.text) for d in one] == [(d.id, d.score, d.text) for d in other] and one
    assert load_index(tmp_path / "b", jam_processor, loaded.embedder, RetrievalSettings(1)).settings.num_documents == 1
    assert "9 documents" in repr(loaded) and len(loaded) == 9


def test_codes_in_place_of_pictures(tmp_path, model, jam_processor):
    rows, vq_model = pairs(5), model.model.vq_model
    first = build_index(rows, model, jam_processor, tmp_path / "a", embedder=TableEmbedder())
    coded = first.documents.select_columns(["text", "codes"]).rename_column("text", "caption")
    second = build_index(coded, vq_model, jam_processor, tmp_path / "b", embedder=TableEmbedder())
    assert second.documents["codes"][:] == first.documents["codes"][:]

    class Sees(TableEmbedder):
        def embed(self, texts, images):
            seen.extend(images)
            return super().embed(texts, images)

    seen: list = []
    build_index(coded, model, jam_processor, tmp_path / "c", embedder=Sees())
    pixels = vq_model.decode(torch.tensor(first.documents["codes"][:])).clamp(-1, 1)
    for (picture,), expected in zip(seen, jam_processor.image_processor.postprocess(pixels)):
        assert same_picture(picture, expected)


def test_the_embedder_must_be_the_same(tmp_path, model, jam_processor, clip_folder):
    other = ClipEmbedder(tiny_clip(tmp_path / "other", seed=1))
    build_index(pairs(3), model, jam_processor, tmp_path / "index", embedder=ClipEmbedder(clip_folder))
    with pytest.raises(ValueError, match="is not the one that the index.*was built with"):
        load_index(tmp_path / "index", jam_processor, embedder=other)
    copied = ClipEmbedder(tiny_clip(tmp_path / "copy"))
    assert load_index(tmp_path / "index", jam_processor, embedder=copied).embedder is copied


def test_the_codes_must_be_this_vq_models(table_index, model):
    table_index.check_codes(model.model.vq_model)
    other = copy.deepcopy(model.model.vq_model)
    with torch.no_grad():
        other.vq.quantize.embedding.weight[3, 1] += 1e-3
    with pytest.raises(ValueError, match="those of another VQ model"):
        table_index.check_codes(other)
    with pytest.raises(ValueError, match="16 of 16.*4 of 16"):
        table_index.check_codes(JamVQModel(type(other.config)(**{**other.config.to_dict(), "sample_size": 8})))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_run_leaves_nothing(error, tmp_path, model, jam_processor):
    class Stops(TableEmbedder):
        calls = 0

        def embed(self, texts, images):
            self.calls += 1
            if self.calls == 3:
                raise error("stopped")
            return super().embed(texts, images)

    with pytest.raises(error):
        build_index(pairs(10), model, jam_processor, tmp_path / "index", embedder=Stops(), batch_size=2)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_full_stays_as_it_is(tmp_path, model, jam_processor):
    build_index(pairs(3), model, jam_processor, tmp_path / "index", embedder=TableEmbedder())
    with pytest.raises(FileExistsError, match="not empty"):
        build_index(pairs(4), model, jam_processor, tmp_path / "index", embedder=TableEmbedder())
    index = build_index(pairs(4), model, jam_processor, tmp_path / "index", embedder=TableEmbedder(), overwrite=True)
    assert len(index) == 4 and [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize("damage", ["none", "json", "format", "faiss", "documents", "settings", "one document less"])
def test_damaged_folders_are_told(damage, tmp_path, model, jam_processor):
    folder = tmp_path / "index"
    if damage != "none":
        build_index(pairs(3), model, jam_processor, folder, embedder=TableEmbedder())
        description = json.loads((folder / "index.json").read_text())
        if damage == "json":
            (folder / "index.json").write_text("{")
        elif damage == "format":
            (folder / "index.json").write_text(json.dumps({**description, "format": 2}))
        elif damage == "settings":
            (folder / "index.json").write_text(json.dumps({**description, "settings": {"max_score": 3}}))
        elif damage == "faiss":
            (folder / "documents.faiss").write_bytes((folder / "documents.faiss").read_bytes()[:40])
        elif damage == "documents":
            (folder / "documents" / "state.json").unlink()
        else:
            fewer = load_from_disk(str(folder / "documents")).select(range(2))
            fewer.save_to_disk(tmp_path / "fewer")
            for path in (folder / "documents").iterdir():
                path.unlink()
            for path in (tmp_path / "fewer").iterdir():
                path.rename(folder / "documents" / path.name)
    with pytest.raises(ValueError, match="holds no index" if damage == "none" else "is damaged or of another version"):
        load_index(folder, jam_processor, embedder=TableEmbedder())


def test_without_faiss_it_is_said_what_to_install(tmp_path, model, jam_processor, table_index, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for call in (
        lambda: build_index(pairs(2), model, jam_processor, tmp_path / "index", embedder=TableEmbedder()),
        lambda: load_index(tmp_path / "index", jam_processor),
    ):
        with pytest.raises(ImportError, match=r"pip install 'jam_hf\[retrieval\]'"):
            call()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "0 rows with the columns none"),
        ([{"text": "a"}], "1 rows with the columns text"),
        ([{"image": noise(0)}], "1 rows with the columns image"),
        ([{"text": " ", "image": noise(0)}], "a text that is not blank; got ' '"),
        ([{"text": None, "image": noise(0)}], "a text that is not blank; got None"),
        ([{"text": "a<break>", "image": noise(0)}], "special token '<break>'"),
        ([{"text": "b", "image": noise(0)}, {"text": "</s>", "image": noise(0)}], "special token '</s>'"),
        ([{"text": "<img:3>", "image": noise(0)}], "special token '<img:3>'"),
        ([{"text": "a<image>b", "image": noise(0)}], "has <image> itself"),
        ([{"text": "a<image>", "image": noise(0)}], "has <image> itself"),
        ([{"text": "a", "image": "nowhere.png"}], "no such file"),
        ([{"text": "a", "image": noise(0), "id": "x"}] * 2, "ids are not unique"),
        ([{"text": "a", "codes": [1] * (N - 1)}], f"15 codes in 1..1; expected {N} in 0..15"),
        ([{"text": "a", "codes": [16] * N}], "16..16"),
        ([{"text": "a", "codes": [-1] * N}], "-1..-1"),
        ([{"text": "a", "codes": []}], "0 codes"),
    ],
)
def test_bad_documents_are_refused_and_nothing_is_left(rows, words, tmp_path, model, jam_processor):
    with pytest.raises(ValueError, match=re.escape(words)):
        build_index(rows, model, jam_processor, tmp_path / "index", embedder=TableEmbedder())
    assert list(tmp_path.iterdir()) == []


def test_captions_have_the_ids_that_they_have_in_a_document(jam_processor):
    captions = ["a small red circle", "ruby", " is  red"]
    whole = jam_processor.tokenizer("".join(f"{c}<image>" for c in captions), add_special_tokens=False)["input_ids"]
    assert [token for ids in caption_ids(jam_processor, captions) for token in [*ids, 4]] == whole
    assert caption_ids(jam_processor, []) == []


def test_the_vq_model_of_a_saved_jam(tmp_path, model):
    model.save_pretrained(tmp_path / "jam", max_shard_size="40KB")
    loaded = load_vq_model(tmp_path / "jam")
    expected = model.model.vq_model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    model.model.vq_model.save_pretrained(tmp_path / "vq")
    with pytest.raises(ValueError, match="expected the folder or Hub id of a JAM"):
        load_vq_model(tmp_path / "vq")


def test_a_dataset_on_the_disk_is_indexed(tmp_path, model, jam_processor):
    rows = Dataset.from_list([{"caption": row["text"], "image": row["image"]} for row in pairs(4)])
    rows.save_to_disk(tmp_path / "rows")
    index = build_index(
        load_from_disk(tmp_path / "rows"), model, jam_processor, tmp_path / "index", embedder=TableEmbedder()
    )
    assert index.documents["text"][:] == [row["text"] for row in pairs(4)]
    assert index.documents["id"][:] == ["0", "1", "2", "3"]
