"""The house: imports go down only, in no circle, and no public name stands for two things."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "msvit"
# From the ground up. A room imports from lower floors and from itself, never from a neighbour on its own floor.
FLOORS = (
    {"checks", "progress"},
    {"core", "data"},
    {"gating", "reducers"},
    {"models", "plots"},
    {"evaluation"},
    {"training"},
    {"studies", "bench"},
    {"explorer"},
    {"commands"},
    {"cli"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(package):
    """Module name -> syntax tree; a package goes by its folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imported(name, tree, known, package):
    """The modules of the package that a module imports, inside of functions too."""
    home = name.split(".") if (package / Path(*name.split(".")) / "__init__.py").exists() else name.split(".")[:-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = home[: len(home) - node.level + 1] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            target = whole if whole in known else ".".join(base)
            if target and target != name:
                yield target


def arrows(package):
    trees = modules(package)
    return {name: set(imported(name, tree, trees, package)) for name, tree in trees.items() if name}


def upward(graph):
    """Imports that do not go down to another room."""
    rooms = [(a, b, a.split(".")[0], b.split(".")[0]) for a, targets in graph.items() for b in targets]
    return [f"{a} imports {b}" for a, b, here, there in rooms if here != there and FLOOR_OF[there] >= FLOOR_OF[here]]


def circle(graph):
    """Some modules that import each other in a circle; empty if there are none."""
    left = {name: set(targets) for name, targets in graph.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def names_of_two_things(package):
    """Public classes and constants that more than one module defines."""
    homes = defaultdict(set)
    for module, tree in modules(package).items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].add(module)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name) and part.id.isupper():
                            homes[part.id].add(module)
    return {name: sorted(found) for name, found in homes.items() if len(found) > 1 and not name.startswith("_")}


def test_every_room_has_a_floor():
    assert {name.split(".")[0] for name in modules(PACKAGE) if name} == FLOOR_OF.keys()


def test_imports_go_down_only():
    assert upward(arrows(PACKAGE)) == []


def test_no_modules_import_each_other():
    assert circle(arrows(PACKAGE)) == []


def test_no_public_name_stands_for_two_things():
    assert names_of_two_things(PACKAGE) == {}


@pytest.fixture
def crooked(tmp_path):
    """A small house in which everything is wrong."""
    for room, text in {
        "core/tokens.py": "from ..models.msvit import MSViT\nLIMIT = 1\nclass Tokens: ...",
        "core/blocks.py": "from . import tokens\ndef f():\n    from ..data import IGNORE",
        "models/msvit.py": "from ..core.tokens import Tokens\nLIMIT: int = 2\nclass MSViT: ...",
        "data/__init__.py": "IGNORE = 255\nclass Tokens: ...",
        "core/__init__.py": "",
        "models/__init__.py": "",
    }.items():
        (tmp_path / room).parent.mkdir(exist_ok=True)
        (tmp_path / room).write_text(text)
    return tmp_path


def test_what_is_wrong_is_seen(crooked):
    graph = arrows(crooked)
    assert graph["core.blocks"] == {"core.tokens", "data"}
    assert sorted(upward(graph)) == ["core.blocks imports data", "core.tokens imports models.msvit"]
    assert circle(graph) == ["core.blocks", "core.tokens", "models.msvit"]
    assert names_of_two_things(crooked) == {"LIMIT": ["core.tokens", "models.msvit"], "Tokens": ["core.tokens", "data"]}


def test_every_table_is_written_without_formulas():
    """`write_csv` defuses text that a spreadsheet would run; pandas' own way does not."""
    sources = [
        *PACKAGE.rglob("*.py"),
        *PACKAGE.parent.glob("notebooks/*.ipynb"),
        *PACKAGE.parent.glob("benchmarks/*.py"),
    ]
    assert [path.name for path in sources if ".to_csv(" in path.read_text()] == ["files.py"]
