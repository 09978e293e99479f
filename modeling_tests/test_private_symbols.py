"""Private and transient symbols of other libraries stand in two rooms, and nothing stands there for nothing.

Here the code is read. Whether the libraries still do what is relied on is asked in contracts/.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import jam_hf
from jam_hf.integrations import private
from jam_hf.model import transformers_private_jam as carried


PACKAGE = Path(jam_hf.__file__).parent
ROOMS = {"model/transformers_private_jam.py": carried, "integrations/private.py": private}
LIBRARIES = (
    "transformers",
    "trl",
    "peft",
    "diffusers",
    "accelerate",
    "huggingface_hub",
    "datasets",
    "tokenizers",
    "torch",
)

# What the libraries document for those who write models, though not at their top; a name at the top needs no line.
DOCUMENTED = {
    "accelerate.utils",
    "huggingface_hub.errors",
    "transformers.activations.ACT2FN",
    "transformers.generation.GenerateDecoderOnlyOutput",
    "transformers.generation.configuration_utils.GenerationMode",
    "transformers.generation.streamers.BaseStreamer",
    "transformers.image_utils.PILImageResampling",
    "transformers.initialization",
    "transformers.masking_utils.create_causal_mask",
    "transformers.masking_utils.create_sliding_window_causal_mask",
    "transformers.modeling_outputs",
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS",
    "transformers.processing_utils.Unpack",
    "transformers.utils.TransformersKwargs",
    "transformers.utils.cached_file",
    "transformers.utils.can_return_tuple",
    "transformers.utils.logging",
}
# Written `_name`, but promised: transformers' guide to new models asks each model class for these flags.
FLAGS = {
    "_auto_class",
    "_can_compile_fullgraph",
    "_can_record_outputs",
    "_init_weights",
    "_keep_in_fp32_modules_strict",
    "_keys_to_ignore_on_load_unexpected",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_supports_attention_backend",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
    "_tied_weights_keys",
}


STRINGS = {"_BaseTrainer", "_reorder_cache"}  # named in a table; a step that transformers asks for and does not have
OURS = {"_abc_impl"}  # Python's


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def is_private(module: str, name: str) -> bool:
    """Whether a library does not promise `module.name`."""
    library = module.partition(".")[0]
    if name.startswith("_") and not name.startswith("__") or "._" in module:
        return True
    if library in ("torch", "datasets", "tokenizers") or {module, f"{module}.{name}"} & DOCUMENTED:
        return False
    return not hasattr(importlib.import_module(library), name)


def private_imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.partition(".")[0] in LIBRARIES:
            yield from (f"{node.module}.{a.name}" for a in node.names if is_private(node.module, a.name))
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] in LIBRARIES and "._" in a.name)


def private_names(tree: ast.Module) -> Iterator[str]:
    """`_name` of `anything._name`, or in a string that `getattr` and its like take."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            name = str(getattr(node.args[1], "value", ""))
        else:
            continue
        if name.startswith("_") and not name.startswith("__"):
            yield name


def own_names(tree: ast.Module) -> set[str]:
    """Names that this package's functions, classes and `self._name = ...` make."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and getattr(node.value, "id", None) in ("self", "cls")
        ):
            found.add(node.attr)
    return found


def inherited_names() -> set[str]:
    """Names that a class of this package defines over a library's."""
    found = set()
    for info in pkgutil.walk_packages([str(PACKAGE)], "jam_hf."):
        module = importlib.import_module(info.name)
        for _, owner in inspect.getmembers(module, inspect.isclass):
            if not owner.__module__.startswith("jam_hf"):
                continue
            theirs = {n for base in owner.__mro__ if base.__module__.partition(".")[0] in LIBRARIES for n in vars(base)}
            found |= {name for name in vars(owner) if name.startswith("_") and not name.startswith("__")} & theirs
    return found


def touched() -> set[str]:
    return {name for _, names, *_ in private.TOUCHED for name in names.split()}


def test_private_symbols_are_imported_from_a_room():
    found = {f"{path}: {name}" for path, tree in trees() for name in private_imports(tree)}
    assert not found, f"give these a line in {' or '.join(ROOMS)}, and a contract: {sorted(found)}"


def test_private_attributes_have_a_line_in_a_room():
    everything = dict(trees())
    own = set().union(*map(own_names, everything.values())) - inherited_names()
    used = {name: path for path, tree in everything.items() for name in private_names(tree)}
    foreign = {name: path for name, path in used.items() if name not in own | FLAGS}
    foreign |= dict.fromkeys(inherited_names() - FLAGS, "overridden")
    unknown = {name: path for name, path in foreign.items() if name not in touched() | OURS}
    assert not unknown, f"give these a line in TOUCHED of integrations/private.py, and a contract: {unknown}"
    needless = {name for name in touched() if name.startswith("_")} - set(used) - set(foreign) - STRINGS
    assert not needless, f"nothing uses these any more: {sorted(needless)}"


@pytest.mark.parametrize("path", ROOMS)
def test_every_line_of_a_room_is_used_and_says_why(path):
    room = ROOMS[path]
    names = [name for _, names, *_ in room.IMPORTED for name in names.split()]
    assert len(names) == len(set(names))
    assert all(len(line) == 4 and line[2] and line[3].endswith(".") for line in (*room.IMPORTED, *private.TOUCHED))
    module = room.__name__.rpartition(".")[2]
    used = {
        alias.name
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[2] == module
        for alias in node.names
    }
    assert set(names) <= used, sorted(set(names) - used)


def test_every_name_has_a_contract():
    held = set()
    for path in (Path(__file__).parent / "contracts").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tables = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.contract":
                for argument in node.args:
                    value = tables[argument.value.id] if isinstance(argument, ast.Starred) else argument
                    held |= {value} if isinstance(value := ast.literal_eval(value), str) else set(value)
    named = touched() | {name for room in ROOMS.values() for _, names, *_ in room.IMPORTED for name in names.split()}
    assert held == named, f"without a contract: {sorted(named - held)}; not in a room: {sorted(held - named)}"


def test_a_symbol_that_moved_is_named(monkeypatch):
    get = carried.room(
        (("transformers.nowhere", "Thing", "-", "A test."), ("transformers", "Nothing", "-", "A test.")), "room"
    )
    for name in ("Thing", "Nothing"):
        with pytest.raises(ImportError, match=rf"transformers.*\.{name} has moved"):
            get(name)
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        get("Other")


def test_what_is_found():
    tree = ast.parse(
        "from transformers.utils.generic import anything\nfrom transformers import LlamaModel, _x\nimport "
        "torch._dynamo\nfrom torch._dynamo.testing import CompileCounter\ndef f(a):\n    return a._b, getattr(a, "
        "'_c'), a.d, a.__e__\n"
    )
    assert set(private_imports(tree)) == {
        "transformers.utils.generic.anything",
        "transformers._x",
        "torch._dynamo",
        "torch._dynamo.testing.CompileCounter",
    }
    assert set(private_names(tree)) == {"_b", "_c"}
