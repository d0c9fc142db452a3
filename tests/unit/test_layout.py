"""The layout: which module imports which, where commands are, and how long a module may be."""

import ast
from graphlib import TopologicalSorter

from tests import ROOT

# Each folder of code, and the folders besides itself that it may import.
LAYERS: dict[str, set[str]] = {
    "handler": set(),
    "service": {"handler"},
    "scripts": {"service", "handler"},
    "benchmarks": {"service", "handler"},
}
MAX_LINES = {"scripts": 100}  # of a module in this folder
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in LAYERS
    for path in (ROOT / folder).rglob("*.py")
    if ".envs" not in path.parts  # the peers' packages
}
TREES = {module: ast.parse(path.read_text("utf-8")) for module, path in PATHS.items()}


def imports(tree: ast.Module) -> set[str]:
    """Those of our modules that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names & PATHS.keys()


GRAPH = {module: imports(tree) for module, tree in TREES.items()}


def folder_of(module: str) -> str:
    return module.partition(".")[0]


def test_imports_go_one_way() -> None:
    for module, imported in GRAPH.items():
        folder = folder_of(module)
        assert {folder_of(name) for name in imported} <= LAYERS[folder] | {folder}, module


def test_no_import_circle() -> None:
    TopologicalSorter(GRAPH).prepare()  # raises CycleError with the circle


def test_the_libraries_hold_no_command() -> None:
    for module, tree in TREES.items():
        if folder_of(module) in ("handler", "service"):
            assert not [node for node in tree.body if getattr(node, "name", "") == "main"], module


def test_no_module_is_long() -> None:
    lines = {module: len(path.read_text("utf-8").splitlines()) for module, path in PATHS.items()}
    long = {name for name in lines if lines[name] > MAX_LINES.get(folder_of(name), 400)}
    assert not long
