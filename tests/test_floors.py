"""The house holds: each floor imports only those below it, and models/ stays flat and alone."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_vlm"
FLOORS = {
    "models": 0,
    "metrics": 0,
    "registry": 1,
    "data": 2,
    "features": 3,
    "tasks": 4,
    "training": 5,
    "viz": 6,
    "curation": 7,
    "deploy": 7,
    "planning": 7,
    "cli": 8,
}
# Of the rooms and files within data/; what is on one level imports nothing of that level but its own room.
DATA_LEVELS = {
    "io": 0,
    "schema": 1,
    "boxes": 1,
    "masks": 1,
    "segmentations": 1,
    "level_lines": 1,
    "tiles": 1,
    "source": 2,
    "stream": 2,
    "loader": 2,
    "captions": 3,
    "pseudo_labels": 3,
    "shards": 3,
    "formats": 3,
    "transforms": 3,
    "scenes": 3,
    "sources": 4,
    "images": 4,
    "video": 4,
    "inspection": 4,
}
MODULES = sorted(PACKAGE.rglob("*.py"))
MODEL_FILES = sorted((PACKAGE / "models").glob("*.py"))


def imports(path):
    """(dotted name, level) of every import of a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def check_levels(path, levels, depth):
    """Whether a file imports only what is below it, or in its own room, `depth` names below `hf_vlm`."""
    own = path.relative_to(PACKAGE).with_suffix("").parts[depth]
    if own == "__init__":
        return
    assert own in levels, f"{path}: {own} has no level"
    for name, level in imports(path):
        parts = name.split(".")
        room = path.relative_to(PACKAGE).parts[:depth]
        if level == 0 and tuple(parts[: depth + 1]) == ("hf_vlm", *room) and len(parts) > depth + 1:
            target = parts[depth + 1]
            assert target == own or levels[target] < levels[own], f"{path} (level {levels[own]}) imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    check_levels(path, FLOORS, depth=0)
    if path.relative_to(PACKAGE).parts[0] == "data":
        check_levels(path, DATA_LEVELS, depth=1)


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_models_are_flat_and_import_little(path):
    for name, level in imports(path):
        root = name.split(".")[0]
        if level:
            assert level == 1, path
            assert "." not in name, path
            assert (path.parent / f"{name}.py").is_file(), path
        else:
            assert root in {"torch", "transformers", "huggingface_hub", "scipy"} | sys.stdlib_module_names, (
                path,
                name,
            )


def test_nothing_is_cyclic():
    """A file that imports another is never imported by it, directly or around corners."""
    graph = {
        ".".join(("hf_vlm", *path.relative_to(PACKAGE).with_suffix("").parts)): {
            name for name, level in imports(path) if level == 0 and name.startswith("hf_vlm.")
        }
        for path in MODULES
    }

    def reachable(start):
        seen, todo = set(), [start]
        while todo:
            for name in graph.get(todo.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    todo.append(name)
        return seen

    assert not [name for name in graph if name in reachable(name)]


def test_files_stay_short():
    long = {str(p.relative_to(PACKAGE)): n for p in MODULES if (n := len(p.read_text().splitlines())) > 400}
    assert not long
