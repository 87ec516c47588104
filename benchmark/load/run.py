"""One run: a plan against a system, from cold caches to a record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

import psutil

from load.driver import drive
from load.plan import Plan
from load.records import Cell, Outcome, Run

MAX_STOLEN = 0.1
"""Of more, what is seen is the host's other guests: a decode step takes half as long again, and longer."""
TRIES = 2


class Target(Protocol):
    """A server under load: a `systems.base.System`, or an `Address` of a running one."""

    url: str

    def flush(self) -> None: ...
    def settle(self) -> None: ...
    def kv_bytes_moved(self) -> int | None: ...


def run_once(
    target: Target, cell: Cell, plan: Plan, on_done: Callable[[Outcome], None] = lambda _: None
) -> Run:
    """Flush the caches, then execute the plan."""
    target.flush()
    moved_before = target.kv_bytes_moved()
    spent_before = psutil.cpu_times()
    begun = time.perf_counter()
    outcomes = asyncio.run(drive(target.url, plan, on_done))
    duration_s = time.perf_counter() - begun
    stolen = stolen_between(spent_before, psutil.cpu_times())
    target.settle()
    moved = target.kv_bytes_moved()
    bytes_moved = None if moved is None or moved_before is None else moved - moved_before
    return Run(cell, duration_s, bytes_moved, tuple(outcomes), stolen)


def run_undisturbed(
    target: Target, cell: Cell, plan: Plan, on_done: Callable[[Outcome], None] = lambda _: None
) -> Run:
    """As `run_once`, and again while the host gives its time to others: of all tries the least disturbed."""
    runs = [run_once(target, cell, plan, on_done)]
    while (runs[-1].stolen or 0.0) > MAX_STOLEN and len(runs) < TRIES:
        runs.append(run_once(target, cell, plan))
    return min(runs, key=lambda run: run.stolen or 0.0)


def stolen_between(before: Any, after: Any) -> float | None:
    """See `Run.stolen`. Both are psutil's `cpu_times`; not every system tells."""
    if not hasattr(before, "steal"):
        return None
    idle = after.idle - before.idle + after.iowait - before.iowait
    wanted = sum(after[:8]) - sum(before[:8]) - idle  # What follows is part of the first two.
    return (after.steal - before.steal) / wanted if wanted > 0 else 0.0
