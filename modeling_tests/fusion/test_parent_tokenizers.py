"""The JAM's tokenizer does what the parent's does, and what the parent's files ask for beyond that is said."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from fusion_zoo import image_parent, save, text_parent, vq_model
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

import jam_hf
from jam_hf import JamProcessor
from jam_hf.evaluation.retention import certify
from jam_hf.fusion import parent_tokenizers
from jam_hf.fusion.fuse import plan_fusion
from jam_hf.fusion.parent_tokenizers import (
    asks_otherwise,
    check_added_ids,
    difference,
    portable,
    read_parent_tokenizer,
)
from jam_hf.reading import read_config, read_tokenizer
from jam_hf.retrieval.embedder import ClipEmbedder


LINES = [
    "",
    " ",
    "</s>a",
    "a</s>a",
    " a small",
    "  a\n a",
    "<s> red</s> ruby",
    "In 2024,\n\n  isn't\t?",
    "é你",
    "wo<tool>rd <tool> a",
]


@pytest.fixture
def folder(tmp_path):
    """`folder(model_type, **changes of tokenizer_config.json)` -> a Llama-like text parent with an added token of
    its own.
    """

    def make(kind="llama", **changes):
        model, tokenizer = text_parent(kind)
        tokenizer.add_tokens([AddedToken("<tool>", special=False)])
        save(model, tokenizer, tmp_path / "text")
        edit(tmp_path / "text" / "tokenizer_config.json", **changes)
        return tmp_path / "text"

    return make


@pytest.fixture
def image(tmp_path):
    return save(*image_parent("chameleon"), tmp_path / "image")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def plan(text, image, **settings):
    return plan_fusion(text, image, "cross", vq_model=vq_model(), **settings)


# ----- the JAM encodes as its parent ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}])
def test_the_saved_folder_encodes_and_decodes_as_the_parent_does(changes, folder, image, tmp_path):
    text = folder(tokenizer_class="LlamaTokenizer", **changes)
    jam = jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq_model())
    parents = AutoTokenizer.from_pretrained(text)
    assert type(parents).__name__ == "LlamaTokenizer"
    if changes.get("legacy"):
        assert parents("</s>a").input_ids == [2, 279, 260]
    for back in (AutoTokenizer.from_pretrained(jam), JamProcessor.from_pretrained(jam).tokenizer):
        for adds in (False, True):
            ids = parents(LINES, add_special_tokens=adds).input_ids
            assert back(LINES, add_special_tokens=adds).input_ids == ids
            for skips in (False, True):
                written = [tokenizer.batch_decode(ids, skip_special_tokens=skips) for tokenizer in (parents, back)]
                assert written[0] == written[1]


@pytest.mark.parametrize(("limit", "positions", "expected"), [(100, 256, 100), (256, 64, 64), (None, 64, None)])
def test_model_max_length_is_the_parents_within_the_jams_positions(limit, positions, expected, image, tmp_path):
    model, tokenizer = text_parent("qwen2", max_position_embeddings=positions)
    if limit is not None:
        tokenizer.model_max_length = limit
    text = save(model, tokenizer, tmp_path / "text")
    jam = jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq_model())
    back = AutoTokenizer.from_pretrained(jam).model_max_length
    assert back == expected if expected else back > 10**20


def test_a_tokenizer_that_does_not_come_back_is_refused_before_anything_is_written(
    folder, image, tmp_path, monkeypatch
):
    monkeypatch.setattr(parent_tokenizers, "portable", lambda tokenizer: tokenizer)  # as it would be saved otherwise
    text = folder(tokenizer_class="LlamaTokenizer", legacy=True)
    with pytest.raises(ValueError, match="does not come back from its folder as it was: .* becomes .*tokenizer="):
        jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq_model())
    assert not list(tmp_path.glob("*jam*"))


# ----- what the files ask for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "changes", "seen"),
    [
        ("a", {"normalized": True, "lstrip": True}, "<tool>"),  # an added token that eats blanks
        (" a", {}, "' "),
    ],
)
def test_the_probe_sees_added_tokens_and_blanks(line, changes, seen, folder):
    one = PreTrainedTokenizerFast.from_pretrained(folder())
    if changes:
        state = json.loads(one.backend_tokenizer.to_str())
        next(token for token in state["added_tokens"] if token["content"] == "<tool>").update(changes)
        other = PreTrainedTokenizerFast(tokenizer_object=type(one.backend_tokenizer).from_str(json.dumps(state)))
    else:
        other = AutoTokenizer.from_pretrained(folder(tokenizer_class="LlamaTokenizer"))
    assert difference(one, one) is None
    assert seen in difference(one, other)


def test_a_class_that_splits_otherwise_is_warned_of_and_the_files_may_rule(folder, image):
    text = folder(tokenizer_class="LlamaTokenizer", legacy=False)
    (found,) = [warning for warning in plan(text, image).warnings if "splits text otherwise" in warning]
    assert "as a LlamaTokenizer" in found and "tokenizer_reading='files'" in found and " becomes [" in found
    told = plan(text, image, tokenizer_reading="files")
    assert not [warning for warning in told.warnings if "splits text otherwise" in warning]
    files = PreTrainedTokenizerFast.from_pretrained(text)
    assert told.vocabulary.tokenizer(LINES).input_ids == files(LINES).input_ids
    with pytest.raises(ValueError, match="tokenizer_reading must be one of 'transformers', 'files', got 'both'"):
        plan(text, image, tokenizer_reading="both")


@pytest.mark.parametrize(("name", "role"), [("add_bos_token", "<s>"), ("add_eos_token", "</s>")])
def test_begin_and_end_that_the_files_ask_for_and_transformers_passes_over(name, role, folder, image, tmp_path):
    """DeepSeek-V3's files say add_bos_token, and its tokenizer.json does not have it."""
    text = folder(**{name: True})
    as_read = plan(text, image)
    (found,) = [warning for warning in as_read.warnings if f"{name}: true" in warning]
    assert role in found and "tokenizer_reading='files'" in found
    assert as_read.vocabulary.tokenizer("a").input_ids == AutoTokenizer.from_pretrained(text)("a").input_ids
    jam = jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq_model(), tokenizer_reading="files")
    tokenizer = AutoTokenizer.from_pretrained(jam)
    ids, token = tokenizer("a").input_ids, tokenizer.convert_tokens_to_ids(role)
    assert ids[0 if role == "<s>" else -1] == token and len(ids) == 1 + len(
        tokenizer("a", add_special_tokens=False).input_ids
    )
    assert f"{name}: true" not in " ".join(plan(folder(**{name: False}), image).warnings)


# ----- code of others is not run, and not carried ---------------------------------------------------------------------


EVIL = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}}


@pytest.fixture
def evil(monkeypatch):
    """`evil(folder, **changes)`: its tokenizer names code that it brings; asking on the terminal fails the test."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.input", lambda *args: pytest.fail("asked"), raising=False)

    def make(folder, **changes):
        (folder / "tokenization_evil.py").write_text("raise SystemExit('the code of a checkpoint was run')\n")
        edit(folder / "tokenizer_config.json", **(changes or EVIL))
        return folder

    return make


@pytest.mark.parametrize(
    "changes", [EVIL, {"tokenizer_class": "EvilTokenizer"}, {**EVIL, "auto_map": ["evil.EvilTokenizer"]}]
)
@pytest.mark.parametrize("role", ["text", "image"])
def test_an_unknown_class_is_an_error_that_says_so(changes, role, folder, image, evil, tmp_path):
    text = folder()
    evil(text if role == "text" else image, **changes)
    with pytest.raises(ValueError, match="unknown class EvilTokenizer.*never runs code.*tokenizer_reading='files'"):
        jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq_model())
    with pytest.raises(ValueError, match="unknown class EvilTokenizer"):
        read_tokenizer(text if role == "text" else image)
    told = plan(text, image, tokenizer_reading="files")
    assert (
        told.vocabulary.tokenizer("a small").input_ids
        == portable(read_tokenizer(text, from_file=True))("a small").input_ids
    )


def test_certify_and_index_do_not_ask_either(folder, image, evil, tmp_path):
    text = folder()
    jam = jam_hf.fuse(text, image, "cross", tmp_path / "jam", vq_model=vq_model())
    (tmp_path / "texts.txt").write_text("a small red circle\n")
    with pytest.raises(ValueError, match="unknown class EvilTokenizer"):
        certify(jam, evil(text), texts=tmp_path / "texts.txt")
    with pytest.raises(ValueError, match="cannot be read as a CLIP model"):
        ClipEmbedder(evil(image))
    edit(text / "config.json", model_type="evil", auto_map={"AutoConfig": "configuration_evil.EvilConfig"})
    with pytest.raises(ValueError, match="class of its own.*never runs code"):
        read_config(text)
    with pytest.raises(ValueError, match="class of its own.*never runs code"):
        plan(text, image)


def test_an_auto_map_is_not_carried_on(folder, image, evil, tmp_path):
    """One whose class transformers has too; and those of the parents' configs."""
    mapped = {"AutoTokenizer": ["tokenization_llama.LlamaTokenizer", None]}
    text = evil(folder(), tokenizer_class="LlamaTokenizer", auto_map=mapped)
    edit(text / "config.json", auto_map={"AutoModelForCausalLM": "tokenization_evil.Evil"})
    edit(image / "config.json", auto_map={"AutoModel": "tokenization_evil.Evil"})
    tokenizer = AutoTokenizer.from_pretrained(text, trust_remote_code=False)
    for number, more in enumerate(({}, {"tokenizer": tokenizer})):
        jam = jam_hf.fuse(text, image, "cross", tmp_path / f"jam{number}", vq_model=vq_model(), **more)
        for path in jam.glob("*.json"):
            assert "evil" not in path.read_text() and "tokenization_llama" not in path.read_text(), path
        AutoTokenizer.from_pretrained(jam, trust_remote_code=True)
        AutoConfig.from_pretrained(jam, trust_remote_code=True)


def test_every_call_says_that_code_of_others_is_not_run():
    root = Path(jam_hf.__file__).parent
    found = 0
    for path in (*root.rglob("*.py"), *(root.parent / "conversion").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            found += called == "read_whole"  # whose own call is looked at below
            owner = ast.unparse(getattr(node.func, "value", node.func))
            if called == "from_config" and not owner.startswith("Auto"):
                continue
            if called not in ("from_pretrained", "load_dataset", "pipeline", "from_config") or owner == "super()":
                continue
            if owner in ("GenerationConfig",):  # reads numbers alone, and knows no such argument
                continue
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert said.get("trust_remote_code") == "False", f"{path.name}:{node.lineno}: {ast.unparse(node)}"
            found += 1
    assert found > 20


def test_an_added_token_that_is_read_at_another_id_is_refused(folder):
    source = folder()
    last = with_a_far_token(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert tokenizer.convert_tokens_to_ids("<far>") == last
    with pytest.raises(ValueError, match=f"'<far>' at the id {last + 8}; it is read as {last}"):
        check_added_ids(tokenizer, "text parent")


def with_a_far_token(folder):
    """An added token behind a hole; returns the id that tokenizers gives it."""
    check_added_ids(AutoTokenizer.from_pretrained(folder), "text parent")
    path = folder / "tokenizer.json"
    state, last = json.loads(path.read_text()), len(AutoTokenizer.from_pretrained(folder))
    state["added_tokens"].append({**state["added_tokens"][0], "id": last + 8, "content": "<far>"})
    path.write_text(json.dumps(state))
    return last


def test_so_is_one_of_a_hub_id(folder, tmp_path, monkeypatch):
    source = folder()
    with_a_far_token(source)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--text"
    shutil.copytree(source, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    tokenizer = AutoTokenizer.from_pretrained("someone/text", local_files_only=True)
    with pytest.raises(ValueError, match="'someone/text', puts its token '<far>'"):
        check_added_ids(tokenizer, "text parent")


def test_files_that_lie_about_are_not_those_of_a_tokenizer_in_memory(folder, monkeypatch):
    """One made of nothing, and one whose folder is gone."""
    source = folder()
    kept = AutoTokenizer.from_pretrained(source)
    made = PreTrainedTokenizerFast(tokenizer_object=kept.backend_tokenizer)
    with_a_far_token(source)
    monkeypatch.chdir(source)
    assert made.name_or_path == ""
    check_added_ids(made, "text parent")
    source.rename(source.with_name("elsewhere"))
    check_added_ids(kept, "text parent")
    assert asks_otherwise(kept, "text parent", "tokenizer") == []


@pytest.mark.parametrize("lacking", ["tokenizer_config.json", "tokenizer.json"])
def test_one_file_of_an_image_parents_tokenizer_is_looked_at(folder, image, lacking):
    """As of a text parent's: such a parent does not count as one without a tokenizer."""
    text = folder()
    total = plan(text, image).vocabulary.coverage.total
    (image / lacking).unlink()
    if lacking == "tokenizer.json":
        with pytest.raises(ValueError, match="(?s)No tokenizer can be read from .*image_tokenizer="):
            plan(text, image)
    else:
        assert plan(text, image).vocabulary.coverage.total == total


def test_a_tokenizer_in_memory_is_not_changed(folder):
    given = AutoTokenizer.from_pretrained(folder(tokenizer_class="LlamaTokenizer", legacy=True))
    before = given.backend_tokenizer.to_str()
    made = read_parent_tokenizer(given, "tokenizer")
    made.add_tokens(["<new>"])
    assert given.backend_tokenizer.to_str() == before and "<new>" not in given.get_vocab()
