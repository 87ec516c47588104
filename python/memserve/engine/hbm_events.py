"""Tells a pool what SGLang's radix cache holds in HBM, from the KV events that SGLang publishes.

    scheduler ── publish ──> worker: names -> keys ──> the pool's foreign tier ──> its events and snapshots

SGLang makes the publisher named in `--kv-events-config`; `pool_hooks.py` joins it to the pool. Of
SGLang's events it wants the format "dynamo", and in place of an adapter's name the whole extra key.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventPublisher,
    EventPublisherFactory,
    KVEventsConfig,
    StorageMedium,
)
from sglang.srt.mem_cache.events import KvEventLoraNames

from memserve.core.block_keys import Namespace
from memserve.core.executor import BoundedExecutor
from memserve.engine.event_hashes import EventHashNames
from memserve.engine.server_flags import HBM_PUBLISHER
from memserve.mempool.external_tier import ExternalTier


@dataclass(slots=True)
class HbmStats:
    """What the pool was told of the engine's HBM."""

    blocks: int = 0
    """That it holds now."""
    events: int = 0
    """Of SGLang's that were translated."""
    left_out: int = 0
    """Blocks that could not be named for certain, or came after one of these."""


class HbmReport:
    """Turns events into changes of a foreign tier. One thread at a time; anybody may read `stats`."""

    def __init__(self, hbm: ExternalTier) -> None:
        self._hbm = hbm
        self._names = EventHashNames()
        self._stats = HbmStats()

    def apply(self, events: Sequence[Any]) -> None:
        """In the order in which they happened. Of other memory than HBM they are left out."""
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self._names.clear()
                self._hbm.clear()
            elif getattr(event, "medium", None) != StorageMedium.GPU:
                continue
            elif isinstance(event, BlockStored):
                self._store(event)
            elif isinstance(event, BlockRemoved):
                self._hbm.removed(self._names.removed(event.block_hashes))
            self._stats.events += 1

    def stats(self) -> HbmStats:
        self._stats.blocks = len(self._hbm)
        return self._stats

    def _store(self, event: BlockStored) -> None:
        names = event.block_hashes
        namespace = Namespace(event.lora_name, event.cache_salt)
        parent, keys = self._names.stored(names, event.parent_block_hash, event.token_ids, namespace)
        stored = self._hbm.stored(keys, parent) if keys else 0
        self._stats.left_out += len(names) - stored


class HbmPublisher(EventPublisher):
    """SGLang's side: takes events on the scheduler's thread and hands them on. Silent until joined."""

    def __init__(self, attn_dp_rank: int = 0, **_: Any) -> None:
        self._report: HbmReport | None = None
        self._executor = BoundedExecutor("mempool-hbm-events", capacity=sys.maxsize)  # No event may be lost.

    def join(self, hbm: ExternalTier) -> None:
        """Tell this tier from the first event on."""
        self._report = HbmReport(hbm)

    def publish(self, events: Any) -> None:
        report = self._report
        if report is not None:
            self._executor.execute(lambda: report.apply(events.events))

    def drain(self) -> None:
        """Return when the pool knows of everything published so far."""
        self._executor.drain()

    def shutdown(self) -> None:
        """Tell the rest, then nothing more. Idempotent."""
        self._executor.drain()
        self._executor.close()

    def stats(self) -> dict[str, int] | None:
        """None before `join`."""
        return asdict(self._report.stats()) if self._report is not None else None


class ExtraKeys(KvEventLoraNames):
    """Makes SGLang put into an event's `lora_name` the extra key, which events lack otherwise."""

    def resolve(self, extra_key: str | None) -> str | None:
        return extra_key


def register_publisher() -> None:
    """Once in each process that has a scheduler."""
    EventPublisherFactory.register_publisher(HBM_PUBLISHER, HbmPublisher)


def is_ours(kv_events_config: str | None) -> bool:
    """Whether this flag names our publisher."""
    return bool(kv_events_config) and KVEventsConfig.from_cli(kv_events_config).publisher == HBM_PUBLISHER
