"""Modules that moved are found under their old names, and are the same modules there."""

import importlib
import subprocess
import sys

import processes
import pytest

from jam_hf._moved import OLD_MODULES, new_name, serve_old_names


@pytest.mark.parametrize("old", OLD_MODULES)
def test_an_old_name_is_the_new_module(old):
    module = importlib.import_module(OLD_MODULES[old])
    assert importlib.import_module(old) is module
    folder, _, name = old.rpartition(".")
    assert getattr(importlib.import_module(folder), name) is module
    assert module.__name__ == module.__spec__.name == OLD_MODULES[old]


def test_old_names_are_served_lazily_and_once():
    code = (
        "import sys, jam_hf\n"
        "from jam_hf._moved import OLD_MODULES, serve_old_names\n"
        "assert not set(OLD_MODULES) & set(sys.modules), set(OLD_MODULES) & set(sys.modules)\n"
        "from jam_hf.model.streaming_jam import JamStreamer, stream\n"
        "import jam_hf.model.candidates_jam\n"
        "from jam_hf.model import candidates_jam\n"
        "assert stream is jam_hf.stream and JamStreamer is jam_hf.JamStreamer\n"
        "assert candidates_jam is sys.modules['jam_hf.generation.best_of_n']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=processes.PATIENCE)
    finders = list(sys.meta_path)
    serve_old_names()
    assert sys.meta_path == finders


def test_a_folder_that_moved_takes_its_modules_along(monkeypatch):
    monkeypatch.setitem(OLD_MODULES, "jam_hf.writing", "jam_hf.generation")
    try:
        assert importlib.import_module("jam_hf.writing.export") is importlib.import_module("jam_hf.generation.export")
    finally:
        for name in ("jam_hf.writing", "jam_hf.writing.export"):
            sys.modules.pop(name, None)


def test_other_names_are_not_served():
    assert new_name("jam_hf.model.modeling_jam") is None
    with pytest.raises(ModuleNotFoundError, match="jam_hf.model.nothing_jam"):
        importlib.import_module("jam_hf.model.nothing_jam")


def test_a_module_that_was_split_still_has_its_names():
    from jam_hf.quickstart.parents import Lesson, SharedParents, UnlikeParents, parents_of, with_image_logits

    places = {each.__module__.rpartition(".")[2] for each in (Lesson, SharedParents, UnlikeParents, with_image_logits)}
    assert places == {"lessons", "shared_parents", "unlike_parents"} and parents_of.__module__.endswith(".pairs")
