"""What the router itself knows of load: the work it dispatched and has not seen done.

Knows no clock (the time is given), no network and no cached blocks. Ends are idempotent, and those of
an instance that has left concern nobody.
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
    """Predicted seconds by request, in order of dispatch."""
    queued_s: float = 0.0
    head_since_s: float = 0.0
    """Since when the first of them is at work."""
    recent: deque[tuple[float, float]] = field(default_factory=deque)
    recent_s: float = 0.0
    decoding: dict[int, int] = field(default_factory=dict)
    """Tokens of context by request."""
    context_tokens: int = 0


class LoadTracker:
    """The accounts of all instances. One thread only."""

    def __init__(self, window_s: float) -> None:
        """`window_s`: how long work counts as recent."""
        self._window_s = window_s
        self._accounts: dict[InstanceId, _InstanceLoad] = {}
        self._known: dict[InstanceId, float] = {}
        """Who was kept last, and the recent work that each is to begin with."""

    def keep(self, instances: Collection[InstanceId], now_s: float) -> None:
        """Forget all others.

        Who joins begins level with the least busy of those at work: one that has done nothing lately would
        get everything until it had caught up, while those that did its work meanwhile stood idle.
        """
        for gone in [name for name in self._accounts if name not in instances]:
            del self._accounts[gone]
        if new := [name for name in instances if name not in self._known]:
            others = [it for name, it in self._accounts.items() if name not in new]
            level_s = min((it.recent_s for it in others if self._is_busy(it, now_s)), default=0.0)
            self._known |= dict.fromkeys(new, level_s)
        self._known = {name: self._known[name] for name in instances}

    def prefill_dispatched(self, instance_id: InstanceId, request: int, work_s: float, now_s: float) -> None:
        """A prefill of `work_s`, as predicted, was put into the instance's queue."""
        account = self._account(instance_id)
        if not account.queued:
            account.head_since_s = now_s
        account.queued[request] = work_s
        account.queued_s += work_s
        self.placed(instance_id, work_s, now_s)

    def placed(self, instance_id: InstanceId, work_s: float, now_s: float) -> None:
        """Work was given to the instance, in no queue that anyone sees the end of."""
        account = self._account(instance_id)
        if level_s := self._known.get(instance_id):
            self._known[instance_id] = 0.0
            work_s += level_s
        account.recent.append((now_s, work_s))
        account.recent_s += work_s

    def prefill_done(self, instance_id: InstanceId, request: int, now_s: float) -> None:
        """Its first token has come, or it has failed."""
        account = self._accounts.get(instance_id)
        work_s = None if account is None else account.queued.pop(request, None)
        if account is None or work_s is None:
            return
        account.queued_s = account.queued_s - work_s if account.queued else 0.0
        account.head_since_s = now_s

    def num_queued(self, instance_id: InstanceId) -> int:
        """How many prefills it was given that are not done."""
        account = self._accounts.get(instance_id)
        return 0 if account is None else len(account.queued)

    def num_running(self, instance_id: InstanceId) -> int:
        """How many requests it works on, be it their prefill, their decode or both."""
        account = self._accounts.get(instance_id)
        return 0 if account is None else len(account.queued.keys() | account.decoding.keys())

    def decode_dispatched(self, instance_id: InstanceId, request: int, context_tokens: int) -> None:
        """A request will be decoded there."""
        account = self._account(instance_id)
        account.decoding[request] = context_tokens
        account.context_tokens += context_tokens

    def decode_done(self, instance_id: InstanceId, request: int) -> None:
        """It has ended, one way or the other."""
        account = self._accounts.get(instance_id)
        if account is not None:
            account.context_tokens -= account.decoding.pop(request, 0)

    def candidate(
        self, instance_id: InstanceId, depth: Overlap, now_s: float, fetchable_blocks: int | None = None
    ) -> Candidate:
        """The instance as a policy sees it, which has `depth` of the request in question."""
        account = self._accounts.get(instance_id)
        if account is None:
            return Candidate(instance_id, depth.depths[0], depth.depths[-1], fetchable_blocks)
        is_busy = self._is_busy(account, now_s)
        queued_s = account.queued_s
        if account.queued:  # what the first of them has done already is no longer queued
            queued_s -= min(now_s - account.head_since_s, next(iter(account.queued.values())))
        num_queued, num_decoding = len(account.queued), len(account.decoding)
        return Candidate(  # by position, in the order of its fields: this is done for each request
            instance_id,
            depth.depths[0],
            depth.depths[-1],
            fetchable_blocks,
            queued_s if queued_s > 0.0 else 0.0,
            num_queued,
            account.recent_s if is_busy else 0.0,
            num_queued + num_decoding,
            num_decoding,
            account.context_tokens,
        )

    def _is_busy(self, account: _InstanceLoad, now_s: float) -> bool:
        """Whether it was given work lately; what was earlier is forgotten."""
        while account.recent and account.recent[0][0] <= now_s - self._window_s:
            account.recent_s -= account.recent.popleft()[1]
        return bool(account.recent)

    def _account(self, instance_id: InstanceId) -> _InstanceLoad:
        account = self._accounts.get(instance_id)
        if account is None:
            account = self._accounts[instance_id] = _InstanceLoad()
        return account
