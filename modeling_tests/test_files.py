"""What becomes of folders and files when others write there too, runs are killed, disks fill up and notes are
damaged.
"""

import errno
import importlib
import json
import os
import signal
import threading
import time

import pytest
import torch
from processes import PATIENCE
from safetensors.torch import save_file

import jam_hf
import jam_hf.retrieval
from jam_hf import portable
from jam_hf.checkpoints import writer
from jam_hf.checkpoints.plan import Band, TensorPlan
from jam_hf.checkpoints.tensor_files import TensorFileWriter, TensorSpec
from jam_hf.conversion.vq import convert_vq
from jam_hf.files import check_free, folder_lock, naming, read_json, resumable_folder, whole_folder, write_whole
from jam_hf.fusion import run as fusion_run


def resumed(output_dir, overwrite=False):
    return resumable_folder(output_dir, "recipe", overwrite)


MAKERS = pytest.mark.parametrize("make", [whole_folder, resumed])


# ----- filled meanwhile -----------------------------------------------------------------------------------------------


@MAKERS
@pytest.mark.parametrize("before", ["nothing", "an empty folder"])
@pytest.mark.parametrize("filled", ["file", "folder"])
def test_a_folder_filled_meanwhile_stays_and_what_was_made_is_kept(make, before, filled, tmp_path):
    target = tmp_path / "jam"
    if before == "an empty folder":
        target.mkdir()
    with pytest.raises(
        FileExistsError, match=f"'{target}' was filled while this run worked, .* lies in '(.*)'"
    ) as error:
        with make(target) as folder:
            (folder / "ours").write_text("hours of work")
            if filled == "file":
                if target.is_dir():
                    target.rmdir()
                target.write_text("theirs")
            else:
                target.mkdir(exist_ok=True)
                (target / "mine").write_text("theirs")
    assert (target if filled == "file" else target / "mine").read_text() == "theirs"
    kept = [path for path in tmp_path.iterdir() if (path / "ours").is_file()]
    assert len(kept) == 1 and f"'{kept[0]}'" in str(error.value)
    (target.unlink if filled == "file" else (target / "mine").unlink)()
    with make(target) as folder:  # the kept one is in nobody's way, and nobody removes it but who goes on with it
        (folder / "ours").write_text("again")
    assert (target / "ours").read_text() == "again"
    assert kept[0].name != "jam.new" or (kept[0] / "ours").read_text() == "hours of work"


@MAKERS
def test_overwrite_holds_for_what_came_meanwhile(make, tmp_path):
    with make(tmp_path / "jam", True) as folder:
        (folder / "ours").touch()
        (tmp_path / "jam").mkdir()
        (tmp_path / "jam" / "mine").touch()
    assert [path.name for path in (tmp_path / "jam").iterdir()] == ["ours"]
    assert [path.name for path in tmp_path.iterdir()] == ["jam"]


def fill(folder):
    folder.mkdir()
    (folder / "mine").write_text("precious")


@pytest.mark.parametrize("command", ["fuse", "fuse from memory", "convert-vq", "index"])
def test_commands_do_not_delete_a_folder_filled_meanwhile(command, parents, tokenizer, vq, tmp_path, monkeypatch):
    """Filled while the command makes its own: within the call of a step that each of them takes."""
    target = tmp_path / "out"

    def late(module, name):
        original = getattr(module, name)

        def step(*arguments, **settings):
            if not target.exists():
                fill(target)
            return original(*arguments, **settings)

        monkeypatch.setattr(module, name, step)

    if command.startswith("fuse"):
        late(fusion_run, "_write_small_files")
        text, image = parents("llama")
        settings = {"vq_model": vq}
        if command == "fuse from memory":
            from transformers import AutoModelForCausalLM

            settings["tokenizer"] = text
            text = AutoModelForCausalLM.from_pretrained(text)

        def run():
            jam_hf.fuse(text, image, "cross", target, **settings)
    elif command == "convert-vq":
        from fusion_zoo import image_parent, save

        source = save(*image_parent("janus"), tmp_path / "janus")
        late(importlib.import_module("jam_hf.conversion.vq"), "_check_saved")

        def run():
            convert_vq(source, target)
    else:
        pytest.importorskip("faiss")
        from retrieval.tiny_index import TableEmbedder, layout_jam, pairs, processor_for

        late(importlib.import_module("jam_hf.retrieval.build"), "_write_faiss")

        def run():
            jam_hf.retrieval.build_index(
                pairs(2), layout_jam(), processor_for(tokenizer), target, embedder=TableEmbedder()
            )

    with pytest.raises(FileExistsError, match="was filled while this run worked"):
        run()
    assert [path.name for path in target.iterdir()] == ["mine"] and (target / "mine").read_text() == "precious"
    assert any((path / "model.safetensors").is_file() or (path / "index.json").is_file() for path in tmp_path.iterdir())


# ----- one run at a time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [whole_folder, resumed, lambda path, _: folder_lock(path)])
@pytest.mark.parametrize("second", [whole_folder, resumed])
def test_a_second_run_of_any_kind_is_refused_at_its_start(first, second, tmp_path):
    with first(tmp_path / "jam", False) as held:
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="Another run is writing .*jam"):
                check_free(tmp_path / "jam", overwrite)
            with pytest.raises(FileExistsError, match="Another run is writing .*jam"):
                with second(tmp_path / "jam", overwrite):
                    raise AssertionError
        check_free(tmp_path / "other")
        if not hasattr(held, "read"):
            (held / "x").touch()
    with second(tmp_path / "jam", True) as folder:
        (folder / "y").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["jam"]


def test_a_lock_that_is_held_can_be_handed_on(tmp_path):
    with folder_lock(tmp_path / "jam") as lock:
        with whole_folder(tmp_path / "jam", lock=lock) as folder:
            (folder / "x").touch()
        with pytest.raises(FileExistsError, match="Another run"), whole_folder(tmp_path / "jam", True):
            raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["jam"]


@pytest.mark.parametrize("kind", ["whole", "resumed"])
def test_the_lock_of_a_killed_run_is_no_lock(kind, tmp_path):
    make = whole_folder if kind == "whole" else resumed
    ready, says = os.pipe()
    child = os.fork()
    if not child:
        try:
            with make(tmp_path / "jam") as folder:
                (folder / "x").write_text("x")
                os.write(says, b"ready")
                time.sleep(PATIENCE)
        finally:
            os._exit(1)
    os.close(says)
    with os.fdopen(ready, "rb") as pipe:
        assert pipe.read(5) == b"ready"
    for other in (whole_folder, resumed):  # another process holds it
        with pytest.raises(FileExistsError, match="Another run"), other(tmp_path / "jam", True):
            raise AssertionError
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    check_free(tmp_path / "jam")
    with make(tmp_path / "jam") as folder:
        assert (folder / "x").exists() == (kind == "resumed")
        (folder / "x").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["jam"]
    (tmp_path / ".jam.unfinished.recipe").touch()  # as a killed run leaves it
    with pytest.raises(FileExistsError, match="not empty"):
        check_free(tmp_path / "jam")


def test_of_many_runs_at_once_one_wins_and_nothing_is_lost(tmp_path):
    """Without overwrite: whoever comes first, and no other ever touches it."""
    start, won, lost = threading.Barrier(6), [], []

    def work(number):
        start.wait()
        try:
            with (whole_folder if number % 2 else resumed)(tmp_path / "jam") as folder:
                if folder is None:  # a note that Windows could not remove says that all is done
                    raise FileExistsError
                (folder / "who").write_text(str(number))
                time.sleep(0.02)
            won.append(number)
        except FileExistsError:
            lost.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 5 and (tmp_path / "jam" / "who").read_text() == str(won[0])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"jam"} or (portable.WINDOWS and left == {"jam", ".jam.unfinished.recipe"})


# ----- full disks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("last", [False, True])
def test_what_a_flush_says_is_heard(code, last, tmp_path, monkeypatch):
    """The system tells of a lost page once, so that the last flush says nothing of it."""
    calls = []

    def flush(self):
        calls.append(self.path.name)
        if len(calls) == (3 if last else 1):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(TensorFileWriter, "flush", flush)
    monkeypatch.setattr(writer, "_FLUSH_BYTES", 1000)
    spec = TensorSpec((300,), torch.float32)
    plans = {key: TensorPlan(spec, (Band(300, (), lambda: torch.zeros(300)),)) for key in ("a", "b", "c")}
    with pytest.raises(OSError, match=f"model.safetensors.partial to the disk: {os.strerror(code)}") as error:
        writer.write_plans(tmp_path, plans)
    assert error.value.errno == code and not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    writer.write_plans(tmp_path, plans)
    assert (tmp_path / "model.safetensors").is_file()


def test_a_shard_that_cannot_be_finished_stops_the_next(tmp_path, monkeypatch):
    begun = []
    init, finish = TensorFileWriter.__init__, writer._finish

    def slow_to_begin(self, path, specs):
        begun.append(path.name)
        time.sleep(0.05)
        init(self, path, specs)

    def failing(writer, path):
        finish(writer, path)
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(TensorFileWriter, "__init__", slow_to_begin)
    monkeypatch.setattr(writer, "_finish", failing)
    spec = TensorSpec((300,), torch.float32)
    plans = {f"{n}": TensorPlan(spec, (Band(300, (), lambda: torch.zeros(300)),)) for n in range(20)}
    with pytest.raises(OSError, match="lost"):
        writer.write_plans(tmp_path, plans, "1KB")
    assert len(begun) < 5


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_full_disks_name_the_file(call, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr("pathlib.Path.open", lambda *_, **__: full())
        with pytest.raises(OSError, match=r"cannot write '.*card\.md': No space left"):
            write_whole(tmp_path / "card.md", "text")
        if call == "fsync":
            with pytest.raises(OSError, match="No space left on device") as error:
                with whole_folder(tmp_path / "jam") as folder:
                    (folder / "x").touch()
            assert "/x'" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [3_000, 200_000])
def test_what_the_libraries_say_of_a_full_disk_names_the_folder(size, tmp_path, vq, tokenizer):
    """The real thing: the system lets no file grow. Rust's libraries raise no OSError, and name no file."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(folder):
        if size < 10_000:
            tokenizer.save_pretrained(folder)
        else:
            save_file({"a": torch.zeros(100_000)}, folder / "model.safetensors")

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError, match=r"jam\.partial.*File too large") as error:
            with whole_folder(tmp_path / "jam") as folder:
                save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and not list(tmp_path.iterdir())


def test_errors_that_are_not_the_disks_stay_what_they_are():
    with pytest.raises(KeyError), naming("x"):
        raise KeyError("a")
    with pytest.raises(OSError, match=r"No such file or directory: '/nowhere'"), naming("x"):
        open("/nowhere")


def test_what_a_killed_run_left_of_a_file_is_gone_with_the_next(tmp_path):
    (tmp_path / ".card.md.partial").write_text("half of something much longer")
    write_whole(tmp_path / "card.md", "text\n")
    assert (tmp_path / "card.md").read_bytes() == b"text\n" and [path.name for path in tmp_path.iterdir()] == [
        "card.md"
    ]


def test_many_writers_of_one_file_leave_a_whole_one(tmp_path):
    texts = [str(number) * 100_000 for number in range(6)]
    threads = [
        threading.Thread(target=lambda text=text: [write_whole(tmp_path / "x", text) for _ in range(5)])
        for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_text() in texts and [path.name for path in tmp_path.iterdir()] == ["x"]


# ----- notes ----------------------------------------------------------------------------------------------------------


def test_a_damaged_note_names_itself_and_costs_nothing(tmp_path):
    note, partial = tmp_path / ".jam.unfinished.recipe", tmp_path / ".jam.unfinished"
    partial.mkdir()
    (partial / "x").write_text("hours")
    note.write_bytes(b"recipe\xff\n")
    with pytest.raises(ValueError, match=f"The note '{note}'.* is damaged .*Delete it and '{partial}'"):
        with resumed(tmp_path / "jam"):
            raise AssertionError
    assert (partial / "x").read_text() == "hours" and note.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"[1]", b"null"])
def test_damaged_json_names_its_file(content, tmp_path):
    (tmp_path / "note.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"note\.json"):
        read_json(tmp_path / "note.json")
    (tmp_path / "note.json").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "note.json") == {"a": 1}
