"""Reports the blocks of SGLang's radix cache in HBM to the pool, from SGLang's KV events.

    scheduler ── publish ──> worker: hashes -> keys ──> the pool's external tier ──> its events and snapshots

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

from memserve.core.block_keys import BlockKey, Namespace
from memserve.core.event_hashes import EventBlock, blocks_of_event, hash_seed
from memserve.core.executor import BoundedExecutor
from memserve.engine.server_flags import HBM_PUBLISHER
from memserve.mempool.external_tier import ExternalTier


@dataclass(slots=True)
class HbmStats:
    """Counts of the blocks and events reported to the pool."""

    blocks: int = 0
    """Blocks in HBM now."""
    events: int = 0
    """SGLang events applied."""
    left_out: int = 0
    """Blocks without a certain key, or after such a block."""


class EventBlocks:
    """The blocks that an engine holds in HBM and whose keys are certain, by event hash. Not thread-safe."""

    def __init__(self) -> None:
        self._blocks: dict[int, EventBlock] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def stored(
        self, hashes: Sequence[int], parent: int | None, token_ids: Sequence[int], namespace: Namespace
    ) -> tuple[BlockKey | None, list[BlockKey]]:
        """The key of `parent`, and those of `hashes` that are certain, from the front.

        `token_ids`: of all these blocks; `parent`: None for the beginning of a prompt. Never raises for
        what an engine sent. Of two blocks with one hash the first keeps it.
        """
        above = None if parent is None else self._blocks.get(parent)
        if parent is not None and above is None:
            return None, []
        keys: list[BlockKey] = []
        blocks = blocks_of_event(hashes, token_ids, above, namespace, hash_seed(namespace))
        for each, block in zip(hashes, blocks, strict=False):
            if self._blocks.setdefault(each, block).key != block.key:
                break
            keys.append(block.key)
        return above.key if above else None, keys

    def removed(self, hashes: Sequence[int]) -> list[BlockKey]:
        """Forget these; returns the keys of those that were known."""
        blocks = [self._blocks.pop(each, None) for each in hashes]
        return [block.key for block in blocks if block is not None]

    def clear(self) -> None:
        self._blocks.clear()


class HbmReport:
    """Applies events to an external tier. One thread at a time; any thread may read `stats`."""

    def __init__(self, hbm: ExternalTier) -> None:
        self._hbm = hbm
        self._known = EventBlocks()
        self._stats = HbmStats()

    def apply(self, events: Sequence[Any]) -> None:
        """Apply events in order. Events of other memory than HBM are ignored."""
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self._known.clear()
                self._hbm.clear()
            elif getattr(event, "medium", None) != StorageMedium.GPU:
                continue
            elif isinstance(event, BlockStored):
                self._store(event)
            elif isinstance(event, BlockRemoved):
                self._hbm.removed(self._known.removed(event.block_hashes))
            self._stats.events += 1

    def stats(self) -> HbmStats:
        self._stats.blocks = len(self._hbm)
        return self._stats

    def _store(self, event: BlockStored) -> None:
        names = event.block_hashes
        namespace = Namespace(event.lora_name, event.cache_salt)
        parent, keys = self._known.stored(names, event.parent_block_hash, event.token_ids, namespace)
        stored = self._hbm.stored(keys, parent) if keys else 0
        self._stats.left_out += len(names) - stored


class HbmPublisher(EventPublisher):
    """Takes events on SGLang's scheduler thread and queues them. Ignores them until `join`."""

    def __init__(self, attn_dp_rank: int = 0, **_: Any) -> None:
        self._report: HbmReport | None = None
        self._executor = BoundedExecutor("mempool-hbm-events", capacity=sys.maxsize)  # No event may be lost.

    def join(self, hbm: ExternalTier) -> None:
        """Report to this tier from now on."""
        self._report = HbmReport(hbm)

    def publish(self, events: Any) -> None:
        report = self._report
        if report is not None:
            self._executor.execute(lambda: report.apply(events.events))

    def drain(self) -> None:
        """Return when all events published so far are applied."""
        self._executor.drain()

    def shutdown(self) -> None:
        """Apply the queued events and end. Idempotent."""
        self._executor.drain()
        self._executor.close()

    def stats(self) -> dict[str, int] | None:
        """None before `join`."""
        return asdict(self._report.stats()) if self._report is not None else None


class ExtraKeys(KvEventLoraNames):
    """Makes SGLang send the extra key in an event's `lora_name`; events lack it otherwise."""

    def resolve(self, extra_key: str | None) -> str | None:
        return extra_key


def register_publisher() -> None:
    """Register the publisher with SGLang, once in each scheduler process."""
    EventPublisherFactory.register_publisher(HBM_PUBLISHER, HbmPublisher)


def is_ours(kv_events_config: str | None) -> bool:
    """Whether the flag --kv-events-config names our publisher."""
    return bool(kv_events_config) and KVEventsConfig.from_cli(kv_events_config).publisher == HBM_PUBLISHER
