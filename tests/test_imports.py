"""Imports point down (scripts -> acorn -> model.py) and have no cycles, not even inside functions."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from helpers import REPO

FILES = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("acorn", "prepare")
    for path in (REPO / folder).rglob("*.py")
} | {name: REPO / f"{name}.py" for name in ("train", "sample", "model")}


def imports(name: str) -> set[str]:
    """Return this repository's modules that a module imports anywhere in its file, except for annotations."""
    found, nodes = set(), [ast.parse(FILES[name].read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= modules if len(modules) == len(node.names) else modules | {node.module}
    return found & FILES.keys()


def test_imports_have_no_cycles():
    try:
        order = list(TopologicalSorter({name: imports(name) for name in FILES}).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))
    assert len(order) == len(FILES) > 40


def test_imports_point_down():
    assert imports("model") == set()
    for name in FILES:
        if name.startswith("acorn"):
            assert not {other for other in imports(name) if not other.startswith(("acorn", "model"))}, name
        if name.startswith("prepare"):
            assert not {"train", "sample"} & imports(name), name


def test_test_files_do_not_import_each_other():
    tests = {path.stem: path for path in (REPO / "tests").glob("*.py")}
    kept_apart = {name for name in tests if name.startswith("test_")} | {"conftest"}
    for name, path in tests.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                words = [*(getattr(node, "module", None) or "").split("."), *(alias.name for alias in node.names)]
                assert not kept_apart & {part for word in words for part in word.split(".")}, f"{name}: {words}"
