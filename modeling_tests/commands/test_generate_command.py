"""`jam-hf generate` with pictures: they stand in the document where their marks stand in the prompt."""

import numpy as np
import pytest
from PIL import Image

import jam_hf_cli as cli
from jam_hf import JamProcessor


COLOURS = ((200, 30, 30), (30, 30, 200), (30, 200, 30))


@pytest.fixture
def written(fused, tmp_path):
    """`written(prompts, count)` -> the segments of each prompt's document, `count` pictures given."""
    folder, target = fused("llama", "cross", "preserving"), tmp_path / "document.json"
    paths = [tmp_path / f"{index}.png" for index in range(len(COLOURS))]
    for path, colour in zip(paths, COLOURS):
        Image.new("RGB", (16, 16), colour).save(path)

    def write(prompts, count, *options):
        images = [argument for path in paths[:count] for argument in ("--image", str(path))]
        arguments = [
            "--model",
            str(folder),
            "--mode",
            "text",
            "--max-new-tokens",
            "2",
            "--output",
            str(target),
            *options,
        ]
        status = cli.main(["generate", *prompts, *images, *arguments])
        return JamProcessor.load_json(target) if status == 0 else status

    return write


def _shown(segments):
    return [
        s["text"] if s["type"] == "text" else tuple(np.asarray(s["image"]).reshape(-1, 3).mean(0).round().astype(int))
        for s in segments
    ]


@pytest.mark.parametrize("options", [(), ("--chat",)])
def test_pictures_stand_in_the_place_of_their_marks(options, written):
    documents = written(["The cloth <image> is", "<image><image> and", "no picture"], 3, *options)
    assert _shown(documents[0])[:3] == ["The cloth ", COLOURS[0], " is"]
    assert _shown(documents[1])[:3] == [*COLOURS[1:], " and"]
    assert _shown(documents[2])[0] == "no picture"


@pytest.mark.parametrize(
    ("prompts", "count"), [(["a <image>"], 0), (["a <image>"], 2), (["<image> and <image>"], 1), (["a"], 1)]
)
def test_counts_that_do_not_match_are_refused(prompts, count, written, capsys):
    assert written(prompts, count) == 2
    assert "<image>" in capsys.readouterr().err


def test_a_model_that_is_no_jam_is_named_before_anything_else_is_said(parents, tmp_path, capfd):
    text, _ = parents("llama")
    status = cli.main(["generate", "a", "--model", str(text), "--output", str(tmp_path / "a.json")])
    assert status == 2 and not (tmp_path / "a.json").exists()
    assert capfd.readouterr().err == f"jam-hf generate: The model '{text}' is a 'llama'; expected a 'jam'.\n"
