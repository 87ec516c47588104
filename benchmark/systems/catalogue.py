"""The systems by name: what a report calls them and how each is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memserve.core.caching import CachingMode
from memserve.wire.messages import Role
from systems.base import Setting, System
from systems.ours import Layout, MemServe
from systems.stock import StockFlags, StockPair

PAIR = (Role.PREFILL, Role.DECODE)
TWO = (Role.COLOCATED, Role.COLOCATED)


@dataclass(frozen=True, slots=True)
class Entry:
    """One system of the evaluation."""

    title: str
    what: str
    start: Callable[[str, Setting], System]


def _ours(roles: tuple[Role, ...], caching: CachingMode) -> Callable[[str, Setting], System]:
    return lambda name, setting: MemServe(name, setting, Layout(roles, caching))


def _stock(flags: StockFlags) -> Callable[[str, Setting], System]:
    return lambda name, setting: StockPair(name, setting, flags)


def _hicache(name: str, setting: Setting) -> System:
    """Prefill's hierarchical cache, and decode that offloads into the same directory of files."""
    store = ("--hicache-storage-backend", "file", "--hicache-ratio", "2")
    flags = StockFlags(
        prefill=("--enable-hierarchical-cache", *store),
        decode=("--disaggregation-decode-enable-offload-kvcache", *store),
        env=(("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(setting.logs / name / "store")),),
    )
    return StockPair(name, setting, flags)


DECODE_CACHE = "--disaggregation-decode-enable-radix-cache"

SYSTEMS = {
    "colocated": Entry(
        "colocated", "two servers that each prefill and decode, nothing cached", _ours(TWO, CachingMode.NONE)
    ),
    "colocated-cache": Entry(
        "colocated + cache",
        "two servers that each prefill and decode, with pools",
        _ours(TWO, CachingMode.FULL),
    ),
    "pd-basic": Entry(
        "PD-Basic", "prefill and decode, nothing cached (--caching none)", _ours(PAIR, CachingMode.NONE)
    ),
    "pd-caching-1": Entry(
        "PD-Caching-1", "prefill caches (--caching prefill)", _ours(PAIR, CachingMode.PREFILL)
    ),
    "pd-caching-2": Entry(
        "PD-Caching-2",
        "decode caches, too, and is sent only what it lacks (--caching both)",
        _ours(PAIR, CachingMode.BOTH),
    ),
    "pd-caching-3": Entry(
        "PD-Caching-3",
        "the KV that decode generates returns to prefill (--caching full, the default)",
        _ours(PAIR, CachingMode.FULL),
    ),
    "stock-pd": Entry(
        "SGLang PD",
        "stock SGLang, prefill and decode, behind sglang-router (cache_aware)",
        _stock(StockFlags()),
    ),
    "stock-pd-decode-cache": Entry(
        "SGLang PD + decode cache",
        f"the same with {DECODE_CACHE}",
        _stock(StockFlags(decode=(DECODE_CACHE,))),
    ),
    "stock-pd-hicache": Entry(
        "SGLang PD + HiCache", "the same with HiCache on prefill; decode offloads to its files", _hicache
    ),
}
