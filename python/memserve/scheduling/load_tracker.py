"""What the router itself knows of load: the work it dispatched and has not seen done.

Knows no clock (the time is given), no network and no cached blocks. Ends are idempotent; ends at an
instance that has left are ignored.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field

from memserve.core.ids import InstanceId
from memserve.scheduling.context import Candidate
from memserve.scheduling.prompt_tree.records import Overlap


@dataclass(slots=True)
class _InstanceLoad:
    queued: OrderedDict[int, float] = field(default_factory=OrderedDict)
    """Predicted prefill seconds by request, in order of dispatch."""
    queued_s: float = 0.0
    head_since_s: float = 0.0
    """When work on the first of them began."""
    recent: deque[tuple[float, float]] = field(default_factory=deque)
    """Time of dispatch and predicted seconds of the work within the window."""
    recent_s: float = 0.0
    decoding: dict[int, int] = field(default_factory=dict)
    """Tokens of context by request."""
    context_tokens: int = 0


class LoadTracker:
    """The load of all instances. One thread only."""

    def __init__(self, window_s: float) -> None:
        """`window_s`: how long work counts as recent."""
        self._window_s = window_s
        self._loads: dict[InstanceId, _InstanceLoad] = {}
        self._known: dict[InstanceId, float] = {}
        """The instances retained last, and the recent work that each one is to begin with."""

    def retain(self, instances: Collection[InstanceId], now_s: float) -> None:
        """Forget all other instances.

        A new instance begins level with the least busy of those at work. With no recent work it would
        get every request until it had caught up, while the instances that did that work stood idle.
        """
        for gone in [name for name in self._loads if name not in instances]:
            del self._loads[gone]
        if new := [name for name in instances if name not in self._known]:
            others = [it for name, it in self._loads.items() if name not in new]
            level_s = min((it.recent_s for it in others if self._is_busy(it, now_s)), default=0.0)
            self._known |= dict.fromkeys(new, level_s)
        self._known = {name: self._known[name] for name in instances}

    def prefill_dispatched(self, instance_id: InstanceId, request: int, work_s: float, now_s: float) -> None:
        """A prefill of `work_s`, as predicted, was put into the instance's queue."""
        load = self._of(instance_id)
        if not load.queued:
            load.head_since_s = now_s
        load.queued[request] = work_s
        load.queued_s += work_s
        self.add_recent(instance_id, work_s, now_s)

    def add_recent(self, instance_id: InstanceId, work_s: float, now_s: float) -> None:
        """Count work as recent without putting it into the queue."""
        load = self._of(instance_id)
        if level_s := self._known.get(instance_id):
            self._known[instance_id] = 0.0
            work_s += level_s
        load.recent.append((now_s, work_s))
        load.recent_s += work_s

    def prefill_done(self, instance_id: InstanceId, request: int, now_s: float) -> None:
        """The first token of the request has come, or its prefill has failed. Idempotent."""
        load = self._loads.get(instance_id)
        work_s = None if load is None else load.queued.pop(request, None)
        if load is None or work_s is None:
            return
        load.queued_s = load.queued_s - work_s if load.queued else 0.0
        load.head_since_s = now_s

    def num_queued(self, instance_id: InstanceId) -> int:
        """Number of prefills dispatched to the instance that are not done."""
        load = self._loads.get(instance_id)
        return 0 if load is None else len(load.queued)

    def num_running(self, instance_id: InstanceId) -> int:
        """Number of requests that the instance prefills, decodes or both."""
        load = self._loads.get(instance_id)
        return 0 if load is None else len(load.queued.keys() | load.decoding.keys())

    def decode_dispatched(self, instance_id: InstanceId, request: int, context_tokens: int) -> None:
        """The instance is to decode a request."""
        load = self._of(instance_id)
        load.decoding[request] = context_tokens
        load.context_tokens += context_tokens

    def decode_done(self, instance_id: InstanceId, request: int) -> None:
        """The request has ended, with or without success. Idempotent."""
        load = self._loads.get(instance_id)
        if load is not None:
            load.context_tokens -= load.decoding.pop(request, 0)

    def candidate(self, instance_id: InstanceId, overlap: Overlap, now_s: float) -> Candidate:
        """The instance as a policy sees it, with the blocks of the prompt that it holds."""
        load = self._loads.get(instance_id)
        if load is None:
            return Candidate(instance_id, overlap.depths, overlap.readable)
        is_busy = self._is_busy(load, now_s)
        queued_s = load.queued_s
        if load.queued:  # the part of the first one that is done already is no longer queued
            queued_s -= min(now_s - load.head_since_s, next(iter(load.queued.values())))
        num_queued, num_decoding = len(load.queued), len(load.decoding)
        return Candidate(  # by position, in the order of its fields: this runs for each request
            instance_id,
            overlap.depths,
            overlap.readable,
            queued_s if queued_s > 0.0 else 0.0,
            num_queued,
            load.recent_s if is_busy else 0.0,
            num_queued + num_decoding,
            num_decoding,
            load.context_tokens,
        )

    def _is_busy(self, load: _InstanceLoad, now_s: float) -> bool:
        """Whether the instance got work within the window; forgets earlier work."""
        while load.recent and load.recent[0][0] <= now_s - self._window_s:
            load.recent_s -= load.recent.popleft()[1]
        return bool(load.recent)

    def _of(self, instance_id: InstanceId) -> _InstanceLoad:
        load = self._loads.get(instance_id)
        if load is None:
            load = self._loads[instance_id] = _InstanceLoad()
        return load
