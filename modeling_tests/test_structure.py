"""How the package hangs together, read off its source: no circle of imports, and what may import what.

Imports for types alone and imports inside functions count. Nothing of the package is run.
"""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jam_hf"


def names_of_modules(folder):
    """Module name by file; a package has the name of its folder."""
    return {
        path: ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(folder.rglob("*.py"))
    }


def imports(folder):
    """What each module of a package imports of it: {module: modules}, by every import statement that the file holds."""
    names = names_of_modules(folder)
    found = {name: set() for name in names.values()}
    for path, name in names.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                asked = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*start, *([node.module] if node.module else [])])
                asked = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in found else base for alias in node.names]
            else:
                continue
            found[name] |= {module for module in asked if module in found and module != name}
    return found


def circles(graph):
    """Groups of modules each of which imports, by way of others, itself (strongly connected components)."""
    number, lowest, stack, found = {}, {}, [], []

    def visit(module):
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in graph[module]:
            if other not in number:
                visit(other)
            if other in stack:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == number[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in number:
            visit(module)
    return found


def rooms():
    """The rooms of the table in docs/architecture.md, from the lowest up: a folder, or files that stand side by
    side.
    """
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.split("## Direction of dependencies")[1].split("```")[1]
    return [re.findall(r"jam_hf/(\w+)", line) for line in table.splitlines() if line.startswith("jam_hf/")]


def room_of(module):
    return (module.split(".") + ["__init__"])[1]


@pytest.mark.parametrize("name", ["jam_hf", "jam_hf_cli"])
def test_there_is_no_circle_of_imports(name):
    graph = imports(ROOT / name)
    assert len(graph) > 5 and circles(graph) == []


def test_imports_point_one_way():
    """A room imports itself and the rooms above it in the table; what stands in one line may import each other."""
    rank = {room: number for number, line in enumerate(rooms()) for room in line}
    there = {room_of(name) for name in names_of_modules(PACKAGE).values()}
    assert there == set(rank), f"docs/architecture.md, direction of dependencies: {sorted(there ^ set(rank))}"
    wrong = [
        f"{module} imports {other}"
        for module, others in imports(PACKAGE).items()
        for other in others
        if rank[room_of(other)] > rank[room_of(module)] and room_of(module) != "__init__"
    ]
    assert not wrong, "\n".join(wrong)


def test_the_model_imports_nothing_of_the_rest():
    graph = imports(PACKAGE)
    for module, others in graph.items():
        if module.startswith("jam_hf.model."):
            assert {other.rsplit(".", 1)[0] for other in others} <= {"jam_hf.model"}, (module, others)


@pytest.mark.parametrize(
    "saved", ["configuration_jam", "configuration_jam_vq", "image_processing_jam", "processing_jam"]
)
def test_transformers_copier_finds_every_file_of_the_model(saved):
    """Whichever class is saved: what it reads is lines, of which remote_code_jam.py has a list without importing
    them.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    path = PACKAGE / "model" / f"{saved}.py"
    copied = {Path(file).resolve() for file in [path, *get_relative_import_files(path)]}
    assert copied == set((PACKAGE / "model").glob("*.py")) - {PACKAGE / "model" / "__init__.py"}


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (
            {"a.py": "from . import b", "b.py": "from .c import x", "c.py": "import pack.a"},
            [["pack.a", "pack.b", "pack.c"]],
        ),
        (
            {"a.py": "if TYPE_CHECKING:\n    from .sub.b import B", "sub/b.py": "from ..a import A"},
            [["pack.a", "pack.sub.b"]],
        ),
        ({"a.py": "def f():\n    from .b import x", "b.py": "from .a import y"}, [["pack.a", "pack.b"]]),
        ({"a.py": "from .b import x", "b.py": "from . import c", "c.py": "LINES = '''\nfrom .a import z\n'''"}, []),
    ],
)
def test_planted_circles_are_found(planted, found, tmp_path):
    for name, text in {"__init__.py": "", "sub/__init__.py": "", **planted}.items():
        path = tmp_path / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert circles(imports(tmp_path / "pack")) == found


def test_fuse_is_a_module_that_may_be_called():
    import types

    import jam_hf.fusion.fuse as by_import
    from jam_hf import fuse as function
    from jam_hf.fusion import fuse

    assert isinstance(by_import, types.ModuleType) and fuse is by_import
    assert isinstance(function, types.FunctionType) and by_import.fuse is function
    with pytest.raises(ValueError, match="mode must be one of .* got 'sideways'"):
        fuse("text", "image", "sideways", "nowhere")
