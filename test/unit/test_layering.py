"""Imports point one way, between packages and between the sub-packages of `router/` and `scheduling/`.

Imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import memserve

PACKAGE = Path(memserve.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
SPLIT = ("router", "scheduling")
"""Packages whose sub-packages and modules are layers of their own."""

# What each package may import of the others.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "wire": {"core"},
    "transport": {"core"},
    "peering": {"core", "wire", "transport"},
    "mempool": {"core", "wire", "transport", "peering"},
    "instance": {"core", "wire", "transport", "peering", "mempool"},
    "disagg": {"core", "transport", "peering"},
    "engine": {"core", "wire", "transport", "peering", "mempool", "instance", "disagg"},
    "scheduling": {"core"},
    "simulation": {"core", "scheduling"},
    "router": {"core", "wire", "scheduling"},
    "launch_router": {"core", "router"},
    "launch_server": {"core", "wire", "transport", "mempool", "instance", "engine"},
    "testing": {"core", "wire", "transport", "mempool", "instance", "disagg", "router", "launch_server"},
    "__init__": set(),
}

# What each part of the router may import of the others:
#   app, command_line, config, state ─> http ─> proxy ─> kv_events ─> cluster ─> leaves
#   auth, admission, tokenization ─> leaves
# Only the composition root imports observability, which reads the records of all others.
LEAVES = {"errors", "field_kinds", "records", "request", "server_info", "sglang_api", "sse", "tenant"}
ROUTER: dict[str, set[str]] = {
    "field_kinds": set(),
    "sglang_api": {"field_kinds"},
    "sse": set(),
    "request": {"sglang_api"},
    "server_info": set(),
    "records": set(),
    "tenant": set(),
    "errors": {"request"},
    "compat": set(),
    "auth": LEAVES,
    "admission": LEAVES,
    "tokenization": LEAVES,
    "cluster": LEAVES,
    "kv_events": LEAVES | {"cluster"},
    "proxy": LEAVES | {"cluster", "kv_events", "tokenization"},
    "http": LEAVES | {"admission", "auth", "cluster", "kv_events", "proxy", "tokenization"},
    "observability": LEAVES | {"admission", "auth", "cluster", "http", "kv_events", "proxy", "tokenization"},
}
COMPOSITION = {"app", "command_line", "config", "state"}
# What the sub-packages of scheduling may import of the others; its modules form no cycle.
SCHEDULING: dict[str, set[str]] = {
    "prompt_tree": set(),
    "cost_model": set(),
    "policies": {"context", "cost_model", "policy", "request_cost"},
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
    "prometheus_client": {"router", "engine", "instance"},
}
THIRD_PARTY = {
    "core": {"msgspec"},
    "wire": {"msgspec", "zmq"},
    "transport": {"numpy", "mooncake"},
    "mempool": {"numpy", "xxhash"},
    "scheduling": {"msgspec", "xxhash"},
    "router": {
        *("aiohttp", "httptools", "jinja2", "msgspec", "opentelemetry", "prometheus_client", "tokenizers"),
        *("uvloop", "xxhash", "zmq"),
    },
}
IMPURE = {"asyncio", "socket", "threading", "selectors", "argparse"}
"""Of the standard library, what `scheduling/` does without."""


def name_of(path: Path) -> str:
    """`memserve.a.b` of a file."""
    return ".".join(("memserve", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def part_of(module: str) -> str:
    """The top-level package or module a dotted name is in."""
    return module.split(".")[1] if "." in module else "__init__"


def layer_of(module: str) -> str:
    """`router.http`, `scheduling.selector`, `wire` ...: what a module counts as."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts and parts[0] in SPLIT else part_of(module)


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Dotted names of all modules a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            names.add(node.module)
            names |= {name for alias in node.names if (name := f"{node.module}.{alias.name}") in MODULES}
    return frozenset(names)


def own_imports(path: Path) -> Iterator[str]:
    """Those of this package's modules."""
    for name in imports_of(path):
        if name in MODULES and (name != "memserve" or path.name == "__init__.py"):
            yield name


def refused(module: str, other: str) -> str | None:
    """The edge that an import makes and no table allows."""
    part, target = part_of(module), part_of(other)
    if part != target:
        return None if target in ALLOWED[part] | {"__init__"} else f"{part} > {target}"
    source, layer = layer_of(module), layer_of(other)
    if source == layer or part not in SPLIT or "." not in source or "." not in layer:
        return None
    name, wanted = source.partition(".")[2], layer.partition(".")[2]
    table = SCHEDULING.get(name) if part == "scheduling" else ROUTER.get(name, set())
    if name in COMPOSITION or table is None or wanted in table:
        return None
    return f"{source} > {layer}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    module, part = name_of(path), part_of(name_of(path))
    for name in own_imports(path):
        assert refused(module, name) is None, f"{module} imports {name}"
        if (part, part_of(name)) == ("mempool", "wire"):
            assert path.parent.name == "remote", f"{path} imports {name}"
    for name in imports_of(path):
        top = name.partition(".")[0]
        if top in CONFINED:
            assert part in CONFINED[top], f"{part} imports {top}"
        if part in THIRD_PARTY and top not in sys.stdlib_module_names | {"memserve"}:
            assert top in THIRD_PARTY[part], f"{part} imports {top}"
        assert part != "scheduling" or top not in IMPURE, f"{module} imports {top}"


def test_every_package_has_a_place_in_the_layers() -> None:
    assert {part_of(name) for name in MODULES} <= set(ALLOWED)
    layers = {layer_of(name) for name in MODULES if part_of(name) == "router"} - {"router"}
    assert layers <= {f"router.{name}" for name in {*ROUTER, *COMPOSITION}}


def cycles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Groups of two or more nodes that reach each other."""

    def reached(start: str) -> set[str]:
        found, waiting = set[str](), [start]
        while waiting:
            waiting += (fresh := edges.get(waiting.pop(), set()) - found)
            found |= fresh
        return found

    reach = {node: reached(node) for node in edges}
    groups = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in edges if a in reach[a]}
    return [set(group) for group in groups]


@pytest.mark.parametrize("level", [part_of, layer_of])
def test_no_import_cycle_between_layers(level) -> None:  # type: ignore[no-untyped-def]
    edges: dict[str, set[str]] = {}
    for path in FILES:
        module = name_of(path)
        for name in own_imports(path):
            source, target = level(module), level(name)
            if source != target and "__init__" not in (source, target):
                edges.setdefault(source, set()).add(target)
    assert cycles(edges) == []
