"""One run: a plan against a system, from cold caches to a record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from load.driver import drive
from load.plan import Plan
from load.records import Cell, Outcome, Run


class Target(Protocol):
    """What is asked; `systems.base.System` is one, and `Address` any server that runs already."""

    url: str

    def flush(self) -> None: ...
    def settle(self) -> None: ...
    def kv_bytes_moved(self) -> int | None: ...


def run_once(
    target: Target, cell: Cell, plan: Plan, on_done: Callable[[Outcome], None] = lambda _: None
) -> Run:
    """Forget what was cached, then do as planned."""
    target.flush()
    moved_before = target.kv_bytes_moved()
    begun = time.perf_counter()
    outcomes = asyncio.run(drive(target.url, plan, on_done))
    duration_s = time.perf_counter() - begun
    target.settle()
    moved = target.kv_bytes_moved()
    bytes_moved = None if moved is None or moved_before is None else moved - moved_before
    return Run(cell, duration_s, bytes_moved, tuple(outcomes))
