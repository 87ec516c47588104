"""Imports point one way. Lazy imports inside functions count."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import memserve

PACKAGE = Path(memserve.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each package may import of the others.
ALLOWED = {
    "core": set(),
    "wire": {"core"},
    "transport": {"core"},
    "mempool": {"core", "wire", "transport"},
    "instance": {"core", "wire", "transport", "mempool"},
    "disagg": {"core", "wire", "transport"},
    "engine": {"core", "wire", "transport", "mempool", "instance", "disagg"},
    "scheduling": {"core", "router", "wire"},
    "simulation": {"core", "scheduling"},
    "router": {"core", "wire", "scheduling"},
    "launch_router": {"core", "router"},
    "launch_server": {"core", "wire", "transport", "instance", "engine"},
    "testing": {"core", "wire", "transport", "mempool", "instance", "disagg", "router", "launch_server"},
    "__init__": set(),
}
# Heavy or optional packages, and where alone they may be imported.
CONFINED = {
    "torch": {"engine"},
    "sglang": {"engine"},
    "transformers": {"engine"},
    "mooncake": {"transport"},
    "zmq": {"wire", "router"},
    "aiohttp": {"router", "testing"},
    "opentelemetry": {"router"},
}
THIRD_PARTY = {
    "core": {"msgspec"},
    "wire": {"msgspec", "zmq"},
    "transport": {"numpy", "mooncake"},
    "mempool": {"numpy", "xxhash"},
    "router": {
        *(
            "aiohttp",
            "httptools",
            "jinja2",
            "matplotlib",
            "msgspec",
            "opentelemetry",
            "prometheus_client",
            "tokenizers",
            "tqdm",
        ),
        *("uvloop", "xxhash", "zmq"),
    },
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, wherever in it, type checking apart."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "memserve":
                names |= {f"memserve.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top == "memserve" and other and other != part and (PACKAGE / other).exists():
            assert other in ALLOWED[part], f"{part} imports {name}"
            if (part, other) == ("mempool", "wire"):
                assert path.parent.name == "remote", f"{path} imports {name}"
        if top in CONFINED:
            assert part in CONFINED[top], f"{part} imports {top}"
        if part in THIRD_PARTY and top not in sys.stdlib_module_names | {"memserve"}:
            assert top in THIRD_PARTY[part], f"{part} imports {top}"


def test_every_package_has_a_place_in_the_layers() -> None:
    assert {part_of(path) for path in FILES} <= set(ALLOWED)
