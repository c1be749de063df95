"""The house itself: its rooms, the one way that imports go, the size of files and classes."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "dawm").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")])
ROOMS = {
    "world_model.py", "inverse_dynamics.py", "forward_model.py", "agents", "diffusion", "synthesis", "evaluation",
    "data", "training", "nn", "cli", "errors.py", "files.py",
}  # fmt: skip
FLOORS = (
    ("errors", "files"),
    ("nn",),
    ("data",),
    ("training",),
    ("diffusion", "forward_model", "world_model", "inverse_dynamics", "agents"),
    ("synthesis",),
    ("evaluation",),
    ("callbacks",),
    ("cli",),
)
"""Bottom to top: a room imports from its own floor and those below."""
HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}
MATHEMATICS = (
    "data/returns.py data/transitions.py data/sources/scores.py nn diffusion agents/losses.py synthesis/targets.py "
    "evaluation/episodes.py"
)


def module_of(path: Path) -> str:
    """Dotted name: ``callbacks/evaluate.py`` is ``dawm.callbacks.evaluate``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "dawm" else ("dawm", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, also inside functions and for type checking alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            for alias in node.names:  # `from dawm.data import module` names a module, too
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def room_of(module: str) -> str:
    """The room of a module: ``dawm.data.sources.d4rl`` is in ``data``."""
    return module.split(".")[1]


def test_the_package_has_its_rooms_and_no_other():
    found = {path.name for path in (ROOT / "dawm").iterdir()} - {"__pycache__"}
    assert found == ROOMS | {"__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("dawm", "dawm.__main__")])
def test_imports_go_down(name):
    for other in imported(MODULES[name]):
        if other.startswith("dawm."):
            assert HEIGHT[room_of(other)] <= HEIGHT[room_of(name)], f"{name} imports {other}, which is above it"


def test_imports_make_no_circle():
    graph = {name: {other for other in imported(path) if other in MODULES} for name, path in MODULES.items()}
    graph["dawm"] = set()  # every import passes through the package itself, which only knows its version
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports go round: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("name", MATHEMATICS.split())
def test_the_mathematics_knows_no_lightning(name):
    path = ROOT / "dawm" / name
    files = [path] if path.suffix else sorted(path.glob("*.py"))
    assert files
    for file in files:
        assert file.exists()
        assert not [other for other in imported(file) if other.split(".")[0] in ("lightning", "torchmetrics")], file


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_classes_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 200, f"class {node.name}"


def test_files_in_c_stay_small():
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "dawm").rglob("*.[ch]")}
    assert "vector.h" in lengths
    assert max(lengths.values()) <= 300, lengths
