"""Commands and code in README and docs use flags, files, targets and names that exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from memserve import launch_server
from memserve.router import command_line
from memserve.simulation import __main__ as simulation
from memserve.simulation import make_trace

from .pages import PAGES, ROOT, code_blocks, name_of
from .reference import parser_of

PARSERS = {
    "memserve.launch_router": lambda: parser_of(command_line.parse_args),
    "memserve.launch_server": lambda: parser_of(launch_server.parse),
    "memserve.simulation": lambda: parser_of(simulation.main),
    "memserve.simulation.make_trace": lambda: parser_of(make_trace.main),
}
# Passed on by launch_server, and named in the documentation.
SGLANG_FLAGS = {
    *("--model-path", "--host", "--port", "--tp", "--mem-fraction-static", "--api-key"),
    *("--enable-deterministic-inference", "--kv-events-config", "--unified-cache-external-linker-backend"),
    *("--enable-trace", "--dtype", "--page-size"),
}
# Of other programs: pip, head, mkdocs, sglang-router's families of flags.
OTHER_FLAGS = {"--help", "--ignore", "--strict", "--queue-", "--retry-", "--jwt-"}
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


@cache
def flags_of(module: str) -> frozenset[str]:
    actions = PARSERS[module]()._actions
    return frozenset(name for action in actions for name in action.option_strings) | {"--help"}


@cache
def flags_of_scripts() -> frozenset[str]:
    """Every flag that a file in scripts/ or benchmark/ adds to a parser."""
    files = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmark").rglob("*.py")]
    return frozenset(flag for file in files for flag in re.findall(r'"(--[a-z-]+)"', file.read_text()))


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command line in bash blocks."""
    for block in code_blocks(page):
        if block.language in ("bash", "sh"):
            for line in block.text.replace("\\\n", " ").splitlines():
                if line.strip():
                    yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_bash_blocks_use_modules_flags_files_and_targets_that_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        for i, word in enumerate(words):
            if word.startswith("memserve.") and words[i - 1] == "-m":
                known = flags_of(word) | (SGLANG_FLAGS if word == "memserve.launch_server" else set())
                assert {flag for flag in words[i:] if flag.startswith("--")} <= known, words
            elif re.match(r"(scripts|benchmark|test|docs)/\S+\.py$", word):
                assert (ROOT / word).is_file(), words
        if words and words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_flag_named_on_a_page_exists(page: Path) -> None:
    known = set().union(*(flags_of(module) for module in PARSERS))
    known |= flags_of_scripts() | SGLANG_FLAGS | OTHER_FLAGS
    assert set(_FLAG.findall(page.read_text())) <= known


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_compile_and_their_imports_exist(page: Path) -> None:
    for block in code_blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("memserve"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
