"""`jam-hf index` from outside: folders in, an index out, and what is wrong in one line."""

import json
import sys

import pytest
from datasets import Dataset
from model.test_picture_layout import layout_processor
from retrieval.tiny_index import layout_jam, pairs, tiny_clip

import jam_hf_cli as cli
from jam_hf import JamForCausalLM, JamProcessor
from jam_hf.retrieval import ClipEmbedder, RetrievalSettings, load_index


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("index-command")
    layout_jam("plain", "cross").save_pretrained(root / "jam")
    layout_processor(tokenizer, "plain").save_pretrained(root / "jam")
    tiny_clip(root / "clip")
    (root / "pairs").mkdir()
    rows = pairs(6)
    with (root / "pairs" / "metadata.jsonl").open("w") as file:
        for number, row in enumerate(rows):
            row["image"].save(root / "pairs" / f"{number}.png")
            file.write(json.dumps({"file_name": f"{number}.png", "text": row["text"]}) + "\n")
    Dataset.from_list(rows).save_to_disk(root / "saved")
    return root


def arguments(folders, output, **changes):
    given = {"model": "jam", "pairs": "pairs", "embedder": "clip", **changes}
    return ["index", f"--output={output}", *(f"--{key}={folders / name}" for key, name in given.items())]


@pytest.mark.parametrize("kind", ["pairs", "saved"])
def test_a_folder_becomes_a_memory(kind, folders, tmp_path, capsys):
    more = ["--num-documents", "1", "--max-score", "0.95", "--batch-size", "4"]
    assert cli.main([*arguments(folders, tmp_path / "retriever", pairs=kind), *more]) == 0
    assert capsys.readouterr().out == f"index: {tmp_path / 'retriever'} (6 documents)\n"
    processor = JamProcessor.from_pretrained(folders / "jam")
    model = JamForCausalLM.from_pretrained(folders / "jam")
    retriever = load_index(tmp_path / "retriever", processor, ClipEmbedder(folders / "clip"))
    assert retriever.settings == RetrievalSettings(1, 0.95)
    assert retriever.documents["text"][:] == [row["text"] for row in pairs(6)]
    for row, document in zip(pairs(6), retriever.documents):
        pixels = processor.image_processor([row["image"]], return_tensors="pt")["pixel_values"]
        assert model.model.vq_model.encode(pixels)[0].tolist() == document["codes"]
    inputs = processor(text=["red star"], return_tensors="pt")
    settings = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**inputs, retriever=retriever, **settings)
    assert [len(ids) for ids in output.retrieved_ids] == [1]
    assert cli.main(arguments(folders, tmp_path / "retriever", pairs=kind)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert cli.main([*arguments(folders, tmp_path / "retriever", pairs=kind), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"pairs": "nowhere"}, [], "There is no folder"),
        ({"pairs": "clip"}, [], "holds no pairs"),
        ({"model": "clip"}, [], "expected the folder or Hub id of a JAM"),
        ({"embedder": "jam"}, [], "cannot be read as a CLIP model"),
        ({}, ["--max-score", "7"], "max_score must be in -1..1"),
        ({}, ["--num-documents", "-1"], "num_documents must be a whole number"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(changes, more, words, folders, tmp_path, capsys):
    assert cli.main([*arguments(folders, tmp_path / "retriever", **changes), *more]) == 2
    told = capsys.readouterr().err.splitlines()
    assert words in told[-1] and told[-1].startswith("jam-hf index: ")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_an_input_is_refused(folders, capsys):
    assert cli.main([*arguments(folders, folders / "pairs"), "--overwrite"]) == 2
    assert "is also an input" in capsys.readouterr().err


def test_without_faiss(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert cli.main(arguments(folders, tmp_path / "retriever")) == 2
    assert "pip install 'jam_hf[retrieval]'" in capsys.readouterr().err
