"""Reads the load of this server's schedulers from SGLang's shared memory.

A scheduler writes there after each prefill, every few steps of decode, and in each idle iteration, at
least once a second (with --sleep-on-idle). So a scheduler that has written nothing for long is stuck.
Knows SGLang's reader of that memory; sends no message to any process.
"""

from __future__ import annotations

import pkgutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from memserve.engine import sglang_internals as seams
from memserve.wire.messages import Load


class LoadReader:
    """A callable that returns the present load. One thread."""

    def __init__(
        self,
        read_all: Callable[[], Sequence[Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`read_all` returns SGLang's snapshot of each data-parallel rank; by default this process's."""
        self._read_all = read_all or _snapshots
        self._clock = clock
        self._written: dict[int, tuple[float, float]] = {}
        """By rank: the last stamp on SGLang's clock, which may jump, and the time of its change on ours."""

    def __call__(self) -> Load | None:
        """None if the schedulers have not written yet, or write elsewhere."""
        try:
            snapshots = self._read_all()
        except (AttributeError, OSError, ValueError):
            return None
        if not snapshots:
            return None
        return Load(
            num_running=sum(one.num_running_reqs for one in snapshots),
            num_queued=sum(one.num_waiting_reqs for one in snapshots),
            num_used_tokens=sum(one.num_used_tokens for one in snapshots),
            max_tokens=sum(one.max_total_num_tokens for one in snapshots),
            step_age_s=max(self._age_s(one.dp_rank, one.timestamp) for one in snapshots),
        )

    def _age_s(self, rank: int, stamp: float) -> float:
        last, new_s = self._written.get(rank, (None, 0.0))
        now_s = self._clock()
        if stamp != last:
            self._written[rank] = stamp, now_s
            return 0.0
        return now_s - new_s


def _snapshots() -> Sequence[Any]:
    state = pkgutil.resolve_name(f"{seams.HTTP_SERVER}:get_global_state")()
    snapshots: Sequence[Any] = state.tokenizer_manager.load_snapshot_reader.read_all()
    return snapshots
