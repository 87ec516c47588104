"""Sizes, names and words that the conventions of docs/development ask for, computed from the source."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import memserve

PACKAGE = Path(memserve.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_CLASS_LINES, MAX_FUNCTION_LINES = 350, 250, 60
MAX_CONFIG_FIELDS = 12
MAX_CONSTANTS = 85
"""Numbers at module level: an operator's settings belong into a config record. The aim is 100."""
OFFLINE = ("testing/", "simulation/")
"""Packages that no operator runs beside servers."""
FIXED = {
    "core/block_addr.py": "layout of an address",
    "core/block_keys.py": "layout of a key",
    "transport/local/fence.py": "layout of a shared page",
    "transport/local/syscalls.py": "numbers of Linux",
    "transport/tcp/protocol.py": "layout of a frame",
    "wire/messages.py": "version of the protocol",
}
"""Files whose numbers are formats: changing one breaks peers."""
VAGUE = re.compile(r"\b(whoever|nobody|somebody|anybody)\b", re.IGNORECASE)


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def num_lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_classes_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef):
            assert num_lines(node) <= MAX_CLASS_LINES, node.name
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert num_lines(node) <= MAX_FUNCTION_LINES, node.name


def classes() -> Iterator[tuple[Path, ast.ClassDef]]:
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef):
                yield path, node


def test_a_config_record_has_few_fields() -> None:
    records = [(path, node) for path, node in classes() if node.name.endswith(("Config", "Settings"))]
    assert len(records) > 10
    for path, node in records:
        num_fields = sum(isinstance(one, ast.AnnAssign) for one in node.body)
        assert num_fields <= MAX_CONFIG_FIELDS, f"{name_of(path)}: {node.name}"


def test_a_public_class_name_has_one_meaning() -> None:
    places = defaultdict(list)
    for path, node in classes():
        if not node.name.startswith("_"):
            places[node.name].append(name_of(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def is_number(node: ast.expr | None) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and not isinstance(node.value, bool)
    if isinstance(node, ast.BinOp):
        return is_number(node.left) and is_number(node.right)
    return isinstance(node, ast.UnaryOp) and is_number(node.operand)


def constants(path: Path) -> Iterator[str]:
    """The module's names for a number."""
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = zip(target.elts, value.elts, strict=True)
                yield from (name.id for name, one in pairs if isinstance(name, ast.Name) and is_number(one))
            elif isinstance(target, ast.Name) and is_number(value):
                yield target.id


def test_numbers_that_an_operator_needs_are_settings() -> None:
    found = [f"{name_of(path)}: {name}" for path in FILES for name in constants(path)]
    counted = [
        one
        for one in found
        if one.partition(":")[0] not in FIXED and not one.startswith(OFFLINE) and ": _" not in one
    ]
    assert len(counted) <= MAX_CONSTANTS, "\n".join(counted)


def docstrings(path: Path) -> Iterator[str]:
    """Strings that stand alone: of modules, classes, functions and attributes."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)


def test_docstrings_name_the_thing_they_mean() -> None:
    vague = {name_of(path) for path in FILES if any(VAGUE.search(text) for text in docstrings(path))}
    assert vague == set()
