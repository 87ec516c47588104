"""The parts of the state that handlers read, as protocols: http imports neither state nor telemetry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from memserve.router.cluster.breaker import Breakers
from memserve.router.cluster.pools import Pools
from memserve.router.cluster.registry import InstanceRegistry
from memserve.router.kv_events.subscribers import StockSubscriptions
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.router.proxy.placement import GlobalScheduler
from memserve.router.records import HotPrefix, RequestRecord, SeriesPoint
from memserve.router.tokenization.tokenizers import Tokenizers


class RequestHistory(Protocol):
    """The requests that ended recently."""

    def newest(self, num: int, *, only_faults: bool = False) -> Sequence[RequestRecord]:
        """At most `num` of them, newest first; `only_faults`: only those answered with a 5xx."""

    def find(self, name: str) -> RequestRecord | None:
        """The newest one with this rid or request id."""


class PrefixHistory(Protocol):
    """The prefixes that recent prompts share."""

    keeps_samples: bool

    def hottest(self, num: int, now_s: float) -> Sequence[HotPrefix]:
        """At most `num` of them, heaviest first."""


class SeriesHistory(Protocol):
    """Rates over the last minutes."""

    def points(self) -> Sequence[SeriesPoint]:
        """One point per second, oldest first."""


class TelemetryView(Protocol):
    """What the dashboard shows of requests."""

    @property
    def requests(self) -> RequestHistory: ...
    @property
    def prefixes(self) -> PrefixHistory: ...
    @property
    def series(self) -> SeriesHistory: ...


class StateView(Protocol):
    """See `RouterState`."""

    @property
    def cluster(self) -> InstanceRegistry: ...
    @property
    def pools(self) -> Pools: ...
    @property
    def synchronizer(self) -> TreeSynchronizer: ...
    @property
    def subscriptions(self) -> StockSubscriptions: ...
    @property
    def tokenizers(self) -> Tokenizers: ...
    @property
    def scheduler(self) -> GlobalScheduler: ...
    @property
    def breakers(self) -> Breakers: ...
    @property
    def telemetry(self) -> TelemetryView: ...
