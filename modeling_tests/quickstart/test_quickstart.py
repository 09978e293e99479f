"""The quickstart on its small settings: every stage, resumption, the page, and the command line."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModel, AutoProcessor

import jam_hf.quickstart.stages as stages
from jam_hf.quickstart.page import document_html, verdicts
from jam_hf.quickstart.stages import STAGES, QuickstartSettings, Run, results, run_all, run_stage
from jam_hf.training.recipes import RecipeSettings
from jam_hf.training.vq import VQTrainingSettings
from jam_hf_cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = os.path.relpath(tmp_path_factory.mktemp("runs"))  # relative, as on the command line
    run = Run(Path(folder) / "quickstart", QuickstartSettings.small())
    run_all(run)
    return run


def test_every_stage_leaves_its_result(run):
    for name in STAGES:
        assert all(path.exists() for path in results(run, name)), name
    assert not list(run.folder.glob(".*partial*"))
    measured = json.loads((run.folder / "results.json").read_text())
    assert set(measured["models"]) >= {"LLM parent", "image parent", "jam-uniform, fused", "jam-cross, stage 2"}
    assert measured["models"]["jam-cross preserving, fused"]["kl_to_llm"] == pytest.approx(0, abs=1e-9)
    assert measured["models"]["jam-width copy, fused"]["kl_to_llm"] > 0
    assert len(verdicts(measured)) == 7
    assert set(json.loads((run.folder / "times.json").read_text())) == set(STAGES)


def test_the_checkpoints_load_by_name_in_that_folder(run, monkeypatch):
    monkeypatch.chdir(run.folder)
    for mode in ("uniform", "width", "cross"):
        assert type(AutoModel.from_pretrained(f"jam-{mode}")).__name__ == "JamModel"
        assert type(AutoProcessor.from_pretrained(f"jam-{mode}")).__name__ == "JamProcessor"


def test_the_page_holds_documents_curves_and_figures(run):
    page = (run.folder / "index.html").read_text()
    documents = json.loads((run.folder / "documents" / "documents.json").read_text())["documents"]
    for document in documents:
        assert document["prompt"] in page
    assert page.count("<svg") == 5 and "data:image/png;base64," in page
    assert "unseen captions of two objects right, with guidance" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is fetched


def test_done_stages_are_not_run_again_and_force_does(run, monkeypatch):
    assert [name for name in STAGES if run_stage(run, name)] == ["page"]
    before = (run.folder / "llm" / "history.json").stat().st_mtime_ns
    assert run_stage(run, "train-llm", force=True)
    assert (run.folder / "llm" / "history.json").stat().st_mtime_ns > before


def test_an_interrupted_stage_leaves_nothing_and_goes_on(run, monkeypatch, tmp_path):
    other = Run(tmp_path / "run", QuickstartSettings.small())
    monkeypatch.setattr(stages, "build_howtos", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_stage(other, "picture-world")
    assert {p.name for p in other.folder.iterdir()} == {"settings.json"}
    monkeypatch.undo()
    assert run_stage(other, "picture-world")


def test_order_and_settings_are_checked(tmp_path, run):
    empty = Run(tmp_path / "run", QuickstartSettings.small())
    with pytest.raises(ValueError, match="run the stage 'tokenizer' first"):
        run_stage(empty, "train-llm")
    with pytest.raises(ValueError, match="stage must be one of picture-world"):
        run_stage(empty, "dream")
    with pytest.raises(ValueError, match=r"QuickstartSettings: seed must be a whole number in 0..4294967295, got -1"):
        QuickstartSettings(seed=-1)
    with pytest.raises(ValueError, match=r"other settings \(.*hidden_size"):
        Run(run.folder, QuickstartSettings())


def test_train_all_trains_the_others_too(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    for name in ("jam-uniform", "jam-width"):
        shutil.rmtree(folder / name)
    other = Run(folder, replace(QuickstartSettings.small(), train_all=True))
    assert run_stage(other, "pretrain") and run_stage(other, "instruct")
    assert (folder / "jam-width" / "history.json").is_file() and (folder / "jam-uniform" / "history.json").is_file()


@pytest.mark.parametrize(
    ("stage", "trains"),
    [("train-vq", "train_vq"), *((name, "train_causal_lm") for name in ("train-llm", "train-image-model", "instruct"))],
)
def test_the_seed_is_that_of_every_training(stage, trains, run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    said = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**said, "seed": 3}))
    other = Run(folder, replace(QuickstartSettings.small(), seed=3))
    seeds = []

    def begin(*arguments, **_):
        seeds.extend(given.seed for given in arguments if isinstance(given, (RecipeSettings, VQTrainingSettings)))
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, trains, begin)
    with pytest.raises(KeyboardInterrupt):
        run_stage(other, stage, force=True)
    assert seeds == [3]


def test_command_line(run, tmp_path, capsys):
    for arguments in (["--help"], ["quickstart", "--help"], ["fuse", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert "train-vq" in capsys.readouterr().out
    arguments = ["--run", str(run.folder), "--small"]
    assert main(["pretrain", *arguments]) == 0
    assert "already" in capsys.readouterr().out
    assert main(["pretrain", "--run", str(run.folder)]) == 2
    assert "other settings" in capsys.readouterr().err
    llm, image, vq = (str(run.folder / name) for name in ("llm", "image-model", "vq"))
    out = str(tmp_path / "jam")
    fuse = ["fuse", "--text", llm, "--image", image, "--vq", vq, "--output", out]
    assert main([*fuse, "--mode", "width", "--init", "average"]) == 0
    assert main([*fuse, "--mode", "width"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["fuse", "--text", llm]) == 2
    assert "--image, --mode is missing" in capsys.readouterr().err
    page = tmp_path / "document.html"
    options = ["--model", str(run.folder / "jam-cross"), "--output", str(page), "--max-new-tokens", "40", "--overwrite"]
    assert main(["generate", "Please draw a circle.", "--chat", "--guidance-scale", "2", *options]) == 0
    assert "<!doctype html>" in page.read_text()
    more = ["--mode", "interleaved", "--max-new-images", "1", "--picture-after-sentence", "--image-top-k", "5"]
    for name, held in (("two.md", "A red circle."), ("two.json", '"jam_documents": 1')):
        options[3] = str(tmp_path / name)
        assert (
            main(
                [
                    "generate",
                    "A red circle.",
                    "Blue.",
                    "--negative-prompt",
                    "green",
                    "--guidance-scale",
                    "2",
                    *more,
                    *options,
                ]
            )
            == 0
        )
        assert held in (tmp_path / name).read_text()
        assert "# Blue." in capsys.readouterr().out
    assert main(["generate", "A red circle.", "--num-candidates", "2", *more, *options]) == 0
    assert main(["generate", "A red circle.", "--reranker", "likelihood", *more, *options]) == 2
    assert "needs num_candidates" in capsys.readouterr().err
    assert main(["generate", "A red circle.", "--retriever", str(tmp_path / "absent"), *more, *options]) == 2
    assert "absent" in capsys.readouterr().err
    options[3] = str(tmp_path / "two.pdf")
    assert main(["generate", "x", *options]) == 2
    assert "ends in .html, .md, .json" in capsys.readouterr().err
    options[3] = str(page)
    assert main(["generate", "<image>", *options]) == 2
    assert "no images were passed" in capsys.readouterr().err
    assert main(["generate", "x", "--model", str(tmp_path), "--overwrite"]) == 2
    assert main(["generate", "x", *options[:2], "--output", str(tmp_path / "absent" / "d.html")]) == 2
    assert "folder that exists" in capsys.readouterr().err
    assert main(["generate", "x", "--model", "/absent/jam"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["generate", "x", "--model", llm, "--output", str(page), "--overwrite"]) == 2
    assert "is a 'llama'; expected a 'jam'" in capsys.readouterr().err
    assert main(["fuse", "--init", "paper"]) == 2
    assert "--text, --image, --mode is missing" in capsys.readouterr().err
    assert main(["page", "--run", str(page)]) == 2
    assert "is a file" in capsys.readouterr().err


def test_documents_on_the_page_are_escaped():
    page = document_html("<script>", [{"type": "text", "text": "a < b"}, {"type": "image", "image": None}])
    assert "<script>" not in page and "a &lt; b" in page and "not finished" in page
