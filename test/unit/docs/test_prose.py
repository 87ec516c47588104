"""Docstrings of the package name things, not persons."""

from __future__ import annotations

import ast
import re

from .pages import ROOT

_PERSONS = re.compile(r"\b(whoever|nobody|somebody|anybody)\b", re.IGNORECASE)


def test_no_docstring_speaks_of_whoever_nobody_somebody_or_anybody() -> None:
    found = []
    for path in sorted((ROOT / "python" / "memserve").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if is_text and isinstance(node.value.value, str) and _PERSONS.search(node.value.value):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
