"""Imports point one way: each package and module of the library imports only from those listed before it."""

import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SOURCES = {"fkd_ssl": "fkd_ssl", "teachers": "fkd_ssl.teachers", "eval": "fkd_ssl.eval"}

# From the bottom up, as CONTRIBUTING.md draws them.
LAYERS = """
    errors arrays text progress allocator options own_code processes files pickles locks checkpoints maps web fetching
    prefetcher
    images runs
    crops targets
    sheet glyphs card objectives students teachers
    store store.write store.maintain store.exchange
    relabel
    data
    eval
    training pretraining
    comparison
    results
    commands completion cli api __main__ __init__
"""
ORDER = LAYERS.split()


def room(module: str) -> str:
    """The entry of ORDER that a module's full name belongs to."""
    parts = module.split(".")[1:] or ["__init__"]
    pair = ".".join(parts[:2])
    return pair if pair in ORDER else parts[0]


def imports() -> Iterator[tuple[str, str, str]]:
    """Every import of the library from itself, also inside functions: (file and line, importing room, imported room)."""
    for folder, package in SOURCES.items():
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            names = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            module = ".".join([package, *(name for name in names if name != "__init__")])
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{path}: relative import"
                    found = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    found = [alias.name for alias in node.names]
                else:
                    continue
                for name in found:
                    if name.split(".")[0] == "fkd_ssl" and name != "fkd_ssl.__version__":
                        yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", room(module), room(name)


def test_imports_point_one_way() -> None:
    wrong = [
        f"{place}: {source} imports {target}"
        for place, source, target in imports()
        if source != target and ORDER.index(target) > ORDER.index(source)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_is_listed() -> None:
    assert {name for _, source, target in imports() for name in (source, target)} <= set(ORDER)
