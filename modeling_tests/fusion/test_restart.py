"""Fusions that are killed, interrupted, run twice or over an old checkpoint: whole or not at all, the same bytes at the
end.

Children are forked from a process of their own that has planned the fusion once and has no threads: a start costs
nothing, and a child can be killed before any step of the file system (Python's audit events) as well as at any time.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import processes
import pytest
import torch
from conftest import parent_model
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig

import jam_hf
import jam_hf.fusion.fuse as engine
from jam_hf import JamForCausalLM, portable
from jam_hf.checkpoints.parent import Parent
from jam_hf.checkpoints.tensor_files import TensorFileWriter
from jam_hf.files import resumable_folder, whole_folder
from jam_hf.fusion import recipe, run


SETTINGS = {"max_shard_size": "60KB", "init": "paper", "dtype": "bfloat16"}
STEPS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock", "shutil.rmtree")


# ----- a process that forks -------------------------------------------------------------------------------------------


def _answer(channel, function, arguments):
    try:
        torch.set_num_threads(1)
        # tqdm's own lock is one for all processes: a child that is killed while it holds it would stop the others.
        tqdm.set_lock(threading.RLock())
        tqdm.monitor_interval = 0
        channel.send((True, function(*arguments)))
    except BaseException:  # the test shows it in full
        channel.send((False, traceback.format_exc()))


def in_a_clean_process(function, *arguments, limit=processes.PATIENCE):
    context = processes.server()
    ours, theirs = context.Pipe()
    child = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        assert ours.poll(limit), f"no answer within {limit} seconds"
        good, value = ours.recv()
    finally:
        child.kill()
        child.join()
    assert good, value
    return value


def forked(function, *arguments, kill_before=None, kill_after=None):
    """Run it in a child that is killed before its n-th step or after some seconds. Returns (killed, steps)."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        steps = []

        def hook(event, details):
            if event in STEPS:
                steps.append(f"{event} {os.path.basename(str(details[0]))}")
                if len(steps) == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 2)
            sys.addaudithook(hook)
            function(*arguments)
            os.write(writer, json.dumps(steps).encode())
            os._exit(0)
        except BaseException:
            os.write(writer, json.dumps(traceback.format_exc()).encode())
            os._exit(1)
    os.close(writer)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status)
    assert killed or os.WEXITSTATUS(status) == 0, said.decode()
    return killed, json.loads(said) if said and not killed else []


def contents(folder):
    """Digest of every file, by its name."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def phase(folder, reference):
    """What a killed run left in a folder, in words; what can be taken for a checkpoint must be one."""
    root, unfinished = folder.parent, folder.with_name(".jam.unfinished")
    if folder.is_dir():
        return "in place"
    if not unfinished.is_dir():
        return "begun" if any(root.iterdir()) else "nothing"
    names = {str(path.relative_to(unfinished)) for path in unfinished.rglob("*") if path.is_file()}
    shards = {name for name in reference if name.endswith(".safetensors")}
    found = contents(unfinished)
    assert all(found[name] == reference[name] for name in names & shards), "a shard that has its name is not whole"
    with contextlib.suppress(OSError, ValueError):
        AutoConfig.from_pretrained(unfinished)
        assert found == reference, "a folder that can be loaded is not whole"
        return "whole, not in place"
    if not names & shards:
        return "no shard"
    return "some shards" if not shards <= names else "all shards"


def plan_of(text, image, vq):
    return engine.plan_fusion(text, image, "cross", vq_model=vq, **SETTINGS)


def plan_and_fuse(text, image, vq, folder):
    engine.run_fusion(plan_of(text, image, vq), folder)


def kill_everywhere(text, image, vq, root, at_any_time):
    plan = plan_of(text, image, vq)
    reference_folder = root / "reference"
    start = time.monotonic()
    _, steps = forked(engine.run_fusion, plan, reference_folder)
    duration = time.monotonic() - start
    reference, phases = contents(reference_folder), Counter()
    order = random.Random(0)
    kills = [{"kill_after": order.random() * duration} for _ in range(at_any_time)]
    kills += [{"kill_after": order.random() * duration, "planning": True} for _ in range(2)]
    kills += [{"kill_before": step} for step in (1, *order.sample(range(2, len(steps) - 8), 4))]
    shards = [index for index, step in enumerate(steps, 1) if step.startswith("os.truncate")]  # one for each
    kills += [{"kill_before": shards[index]} for index in (0, 3, len(shards) // 2, -1)]
    last = steps.index("open config.json") + 1
    kills += [{"kill_before": step} for step in range(last, last + 4)]
    kills += [{"kill_before": step} for step in range(len(steps) - 8, len(steps) + 1)]
    for number, kill in enumerate(kills):
        folder = root / f"{number}" / "jam"
        folder.parent.mkdir()
        if kill.pop("planning", False):
            killed, _ = forked(plan_and_fuse, text, image, vq, folder, **kill)
        else:
            killed, _ = forked(engine.run_fusion, plan, folder, **kill)
        state = phase(folder, reference)
        phases[f"{next(iter(kill))} {state}"] += 1
        if state == "in place":
            assert contents(folder) == reference
        if [path.name for path in folder.parent.iterdir()] == ["jam"]:
            continue  # killed behind its last step, or too late
        assert killed
        _, later = forked(engine.run_fusion, plan, folder)
        assert contents(folder) == reference, (kill, state)
        assert [path.name for path in folder.parent.iterdir()] == ["jam"], (kill, state)
        if state in ("all shards", "whole, not in place"):
            assert sum(step.startswith("os.truncate") for step in later) <= 3, "shards were written again"
    return dict(phases), len(steps)


def test_killed_anywhere_a_rerun_ends_with_the_same_bytes(parents, vq, tmp_path, pytestconfig):
    vq.save_pretrained(tmp_path / "vq")
    (tmp_path / "runs").mkdir()
    at_any_time = 20 if pytestconfig.getoption("--nightly") else 5
    inputs = (*parents("llama"), tmp_path / "vq", tmp_path / "runs")
    phases, steps = in_a_clean_process(kill_everywhere, *inputs, at_any_time)
    assert sum(phases.values()) == 24 + at_any_time and steps > 40
    found = {name.removeprefix("kill_before ") for name in phases}  # where the others fall is a matter of time
    assert {"nothing", "no shard", "some shards", "all shards", "whole, not in place", "in place"} <= found, phases
    model = JamForCausalLM.from_pretrained(tmp_path / "runs" / "3" / "jam")
    assert model.config.fusion_mode == "cross"


def kill_while_replacing(text, image, vq, root):
    plan = plan_of(text, image, vq)
    forked(engine.run_fusion, plan, root / "reference")
    reference = contents(root / "reference")

    def old(folder):
        (folder / "deep").mkdir(parents=True)
        (folder / "config.json").write_text("old")
        (folder / "deep" / "mine.txt").write_text("precious")
        return contents(folder)

    before = old(root / "count" / "jam")
    _, steps = forked(engine.run_fusion, plan, root / "count" / "jam", True)
    states = Counter()
    for step in [3, 30, *range(len(steps) - 12, len(steps) + 1)]:
        folder = root / f"{step}" / "jam"
        old(folder)
        forked(engine.run_fusion, plan, folder, True, kill_before=step)
        if folder.is_dir():
            assert contents(folder) in (before, reference)
            states["old" if contents(folder) == before else "new"] += 1
        else:
            assert contents(folder.with_name(".jam.replaced")) == before
            assert contents(folder.with_name(".jam.unfinished")) == reference
            states["between"] += 1
            other = engine.plan_fusion(text, image, "cross", vq_model=vq, **{**SETTINGS, "seed": 7})
            try:  # another recipe, not to overwrite: the old folder is back and stays
                engine.run_fusion(other, folder)
            except FileExistsError:
                assert contents(folder) == before
            else:
                raise AssertionError("an old folder between two renames was not there")
        forked(engine.run_fusion, plan, folder, True)
        assert contents(folder) == reference, step
        assert [path.name for path in folder.parent.iterdir()] == ["jam"], step
    return dict(states)


def test_killed_while_it_replaces_an_old_folder(parents, vq, tmp_path):
    vq.save_pretrained(tmp_path / "vq")
    (tmp_path / "runs").mkdir()
    states = in_a_clean_process(kill_while_replacing, *parents("llama"), tmp_path / "vq", tmp_path / "runs")
    assert states.keys() == {"old", "between", "new"}, states


# ----- what is left, and who may use it -------------------------------------------------------------------------------


@pytest.fixture
def interrupted(parents, vq, tmp_path, monkeypatch):
    """`interrupted(**settings)`: a fusion into tmp_path/jam that was stopped behind its last shard."""

    def make(**settings):
        with monkeypatch.context() as patch:

            def stop(*_):
                raise KeyboardInterrupt

            patch.setattr(run, "_write_small_files", stop)
            with pytest.raises(KeyboardInterrupt):
                jam_hf.fuse(*parents("llama"), "cross", tmp_path / "jam", vq_model=vq, **{**SETTINGS, **settings})
        assert {path.name for path in tmp_path.iterdir()} >= {".jam.unfinished", ".jam.unfinished.recipe"}
        return tmp_path / "jam"

    return make


@pytest.fixture
def written(monkeypatch):
    """Names of the files that are written from now on."""
    names = []
    original = TensorFileWriter.__init__

    def init(self, path, specs):
        names.append(Path(path).name)
        original(self, path, specs)

    monkeypatch.setattr(TensorFileWriter, "__init__", init)
    return names


def test_interrupted_runs_go_on(interrupted, parents, vq, written, tmp_path, capfd):
    folder = interrupted()
    shards = len(written)
    written.clear()
    capfd.readouterr()
    jam_hf.fuse(*parents("llama"), "cross", folder, vq_model=vq, **SETTINGS)
    assert not written and shards > 3
    assert "100%" in capfd.readouterr().err  # what was there counts as done
    assert [path.name for path in tmp_path.iterdir()] == ["jam"]
    assert contents(folder) == contents(
        jam_hf.fuse(*parents("llama"), "cross", tmp_path / "b", vq_model=vq, **SETTINGS)
    )


@pytest.mark.parametrize(
    "changes", [{"seed": 3}, {"max_shard_size": "61KB"}, {"dtype": "float32"}, {"init": "preserving"}]
)
def test_leftovers_of_another_recipe_are_not_used(changes, interrupted, parents, vq, written, tmp_path):
    folder = interrupted()
    written.clear()
    settings = {**SETTINGS, **changes}
    jam_hf.fuse(*parents("llama"), "cross", folder, vq_model=vq, **settings)
    assert len(written) == len(list(folder.glob("*.safetensors")))
    assert contents(folder) == contents(
        jam_hf.fuse(*parents("llama"), "cross", tmp_path / "b", vq_model=vq, **settings)
    )
    assert {path.name for path in tmp_path.iterdir()} == {"jam", "b"}


@pytest.mark.parametrize("what", ["version", "weights", "tokenizer role", "vq", "config"])
def test_leftovers_of_changed_inputs_are_not_used(what, parents, vq, written, tmp_path, monkeypatch):
    import copy
    import shutil

    inputs = tmp_path / "inputs"
    for folder in parents("llama"):
        shutil.copytree(folder, inputs / folder.name)
    text, image = inputs / "text", inputs / "image"
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(run, "_write_small_files", full)
        with pytest.raises(OSError, match="No space left"):
            jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq, **SETTINGS)
    assert len(list((tmp_path / ".jam.unfinished").glob("*.safetensors"))) == len(written)
    written.clear()
    if what == "version":
        monkeypatch.setattr(recipe, "__version__", "999")
    elif what == "weights":  # a late row of one tensor: only the file's time tells
        state = load_file(text / "model.safetensors")
        state["model.layers.2.mlp.down_proj.weight"][-1, -1] += 1
        save_file(state, text / "model.safetensors", metadata={"format": "pt"})
    elif what == "tokenizer role":
        config = json.loads((text / "tokenizer_config.json").read_text())
        config["eos_token"] = config["pad_token"]
        (text / "tokenizer_config.json").write_text(json.dumps(config))
    elif what == "vq":
        vq = copy.deepcopy(vq)
        with torch.no_grad():
            vq.vq.quantize.embedding.weight[-1, -1] += 1
    else:
        config = json.loads((image / "config.json").read_text())
        config["rms_norm_eps"] = 0.1
        (image / "config.json").write_text(json.dumps(config))
    jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq, **SETTINGS)
    assert len(written) == len(list((tmp_path / "jam").glob("*.safetensors")))


@pytest.fixture
def ctrl_c():
    """A shell's background jobs ignore Ctrl-C, and what they start inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_middle_of_a_shard_keeps_the_shards_before_it(
    ctrl_c, parents, vq, written, tmp_path, monkeypatch
):
    original = TensorFileWriter.write

    def write(self, *arguments):
        original(self, *arguments)
        if len(written) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    with monkeypatch.context() as patch:
        patch.setattr(TensorFileWriter, "write", write)
        with pytest.raises(KeyboardInterrupt):
            jam_hf.fuse(*parents("llama"), "cross", tmp_path / "jam", vq_model=vq, **SETTINGS)
    assert len(list((tmp_path / ".jam.unfinished").glob("*.safetensors"))) == 3
    before = len(written)
    jam_hf.fuse(*parents("llama"), "cross", tmp_path / "jam", vq_model=vq, **SETTINGS)
    assert len(written) - before == len(list((tmp_path / "jam").glob("*.safetensors"))) - 3
    assert threading.active_count() < 10  # no pool is left behind


def test_models_in_memory_leave_nothing(parents, vq, tokenizer, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_write_small_files", stop)
    text = parent_model("llama", len(tokenizer), 1)
    with pytest.raises(KeyboardInterrupt):
        jam_hf.fuse(text, parents("llama")[1], "cross", tmp_path / "jam", vq_model=vq, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


# ----- the lock and the note ------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_the_first_unharmed(tmp_path):
    with resumable_folder(tmp_path / "jam", "recipe") as folder:
        (folder / "x").write_text("x")
        for name in ("recipe", "other"):
            with pytest.raises(FileExistsError, match="Another run is writing .*jam"):
                with resumable_folder(tmp_path / "jam", name):
                    raise AssertionError
        assert (folder / "x").read_text() == "x"
    assert (tmp_path / "jam" / "x").is_file() and [p.name for p in tmp_path.iterdir()] == ["jam"]


def test_the_lock_of_a_note_that_was_removed_is_no_lock(tmp_path, monkeypatch):
    """Another run ends between our opening of the note and our lock on it."""
    note, take, calls = tmp_path / ".jam.unfinished.recipe", portable.lock_descriptor, []

    def late(file, **settings):
        calls.append(os.fstat(file).st_ino)
        if len(calls) == 1:
            note.rename(tmp_path / "held")  # still there, so that its inode is not given out again
            note.touch()
        return take(file, **settings)

    monkeypatch.setattr(portable, "lock_descriptor", late)
    with resumable_folder(tmp_path / "jam", "recipe") as folder:
        assert len(calls) == 2 and note.stat().st_ino == calls[1]
        (folder / "x").touch()


def test_many_runs_at_once_take_turns(tmp_path):
    inside, most, made, refused = [0], [0], [0], [0]
    guard = threading.Lock()

    def work(number):
        for turn in range(30):
            try:
                with resumable_folder(tmp_path / "jam", f"{number}", overwrite=True) as folder:
                    with guard:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    assert not list(folder.iterdir())
                    (folder / "who").write_text(f"{number} {turn}")
                    with guard:
                        inside[0] -= 1
                        made[0] += 1
            except FileExistsError:
                refused[0] += 1
                time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and made[0] and made[0] + refused[0] == 180  # how many are refused is a matter of time
    assert [path.name for path in tmp_path.iterdir()] == ["jam"]


def test_a_complete_folder_that_was_changed_is_not_taken_for_ours(tmp_path, monkeypatch):
    """Killed behind the last rename; then the user puts something else there."""
    note = tmp_path / ".jam.unfinished.recipe"
    with resumable_folder(tmp_path / "jam", "recipe") as folder:
        (folder / "x").write_text("x")
        monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # as if killed there
    monkeypatch.undo()
    kept = note.read_text()
    with resumable_folder(tmp_path / "jam", "recipe") as folder:
        assert folder is None
    assert not note.exists()
    note.write_text(kept)
    (tmp_path / "jam" / "x").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        with resumable_folder(tmp_path / "jam", "recipe"):
            raise AssertionError
    assert (tmp_path / "jam" / "x").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["jam"]


@pytest.mark.parametrize("note", ["", "rec", "recipe", "recipe\ngarbage", "other\n", "recipe complete"])
@pytest.mark.parametrize("folder", [True, False])
def test_any_note_and_any_folder_lead_to_a_whole_one(note, folder, tmp_path):
    (tmp_path / ".jam.unfinished.recipe").write_text(note)
    if folder:
        (tmp_path / ".jam.unfinished").mkdir()
        (tmp_path / ".jam.unfinished" / "old").touch()
    with resumable_folder(tmp_path / "jam", "recipe") as partial:
        assert (partial / "old").exists() == (folder and note.partition("\n")[0] == "recipe")
        (partial / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["jam"]


@pytest.mark.parametrize(
    ("error", "stays"), [(ValueError, False), (OSError, True), (KeyboardInterrupt, True), (RuntimeError, True)]
)
def test_what_stays_after_an_error(error, stays, tmp_path):
    for write in (True, False):
        with pytest.raises(error):
            with resumable_folder(tmp_path / "a" / "jam", "recipe") as folder:
                if write:
                    (folder / "x").touch()
                raise error("said")
        left = sorted(path.name for path in (tmp_path / "a").iterdir())
        assert left == ([".jam.unfinished", ".jam.unfinished.recipe"] if stays else [])
        if write and stays:
            (tmp_path / "a" / ".jam.unfinished" / "x").unlink()
            stays = False  # an empty folder does not stay


@pytest.mark.parametrize(
    "make", [whole_folder, lambda *arguments: resumable_folder(arguments[0], "recipe", *arguments[1:])]
)
def test_outputs_of_every_kind(make, tmp_path):
    """Links are followed, files and full folders refused, and an old folder is back if the last step fails."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "hanging").symlink_to(tmp_path / "later")
    (tmp_path / "file").write_text("mine")
    for name, place in (("link", "real"), ("hanging", "later"), ("real/../dots/", "dots")):
        with make(tmp_path / name) as folder:
            (folder / "x").touch()
        assert (tmp_path / place / "x").is_file() and not (tmp_path / place).is_symlink()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "link" / "x").is_file()
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, words in (("file", "is a file"), ("link", "not empty"), ("real", "not empty")):
        with pytest.raises(FileExistsError, match=words):
            with make(tmp_path / name):
                raise AssertionError
    for name in ("/proc/nothing/jam", "/proc/jam", f"{tmp_path}/file/jam"):
        with pytest.raises(OSError, match=f"'{name}'.*Choose another output folder"):
            with make(name):
                raise AssertionError
    with pytest.raises(FileExistsError, match="mount point"):
        with make("/proc", True):
            raise AssertionError
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with make(tmp_path / "link", True) as folder:
        (folder / "y").touch()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["y"] and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_failed_rename_gives_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "jam").mkdir()
    (tmp_path / "jam" / "old").touch()
    replace = Path.replace

    def fails(self, target):
        if ".unfinished" in self.name:
            raise OSError(5, "Input/output error", str(self))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="Input/output"):
        with resumable_folder(tmp_path / "jam", "recipe", True) as folder:
            (folder / "new").touch()
    assert (tmp_path / "jam" / "old").exists() and not (tmp_path / ".jam.replaced").exists()
    monkeypatch.undo()
    with resumable_folder(tmp_path / "jam", "recipe", True) as folder:
        assert (folder / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["jam"]


def test_the_output_is_refused_before_parents_are_read(vq, tmp_path, monkeypatch):
    (tmp_path / "jam").mkdir()
    (tmp_path / "jam" / "mine").touch()
    monkeypatch.setattr(Parent, "__init__", lambda *_: pytest.fail("a parent was read"))
    with pytest.raises(FileExistsError, match="not empty"):
        jam_hf.fuse("a/b", "c/d", "cross", tmp_path / "jam", vq_model=vq)
