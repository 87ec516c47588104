"""Messages of pools to a TreeSynchronizer."""

from __future__ import annotations

from collections.abc import Iterable

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.cache_events import Stored
from memserve.core.caching import CachingMode
from memserve.core.ids import Epoch, InstanceId
from memserve.router.kv_events.synchronizer import TreeSynchronizer
from memserve.scheduling.prompt_tree.records import NO_OVERLAP
from memserve.wire.messages import Message, PoolInfo, Role, SnapshotPart

DECODE = InstanceId("decode")
OTHER = InstanceId("other")
ONE, TWO, THREE = Epoch(1), Epoch(2), Epoch(3)
AUDIT_S = 60.0


def info(epoch: Epoch, name: InstanceId = DECODE, layout: str = "layout", rank: int = 0) -> PoolInfo:
    address = f"127.0.0.1:{epoch}"
    return PoolInfo(name, epoch, Role.DECODE, CachingMode.FULL, address, layout, rank=rank)


def chain(num_blocks: int, seed: int = 1) -> tuple[BlockKey, ...]:
    return tuple(page_keys([seed] * num_blocks, 1))


def stored(sequence: int, keys: tuple[BlockKey, ...], parent: BlockKey | None = None) -> Stored:
    return Stored(sequence, Tier.DRAM, parent, keys)


def depth(feed: TreeSynchronizer, keys: tuple[BlockKey, ...], name: InstanceId = DECODE) -> int:
    return feed.synced_tree().overlaps(keys).get(name, NO_OVERLAP).cached


def audit(epoch: Epoch, sequence: int, *chains: Stored) -> list[SnapshotPart]:
    """An audit with one part per chain."""
    last = len(chains) - 1
    return [SnapshotPart(epoch, sequence, i, i == last, (one,), True) for i, one in enumerate(chains)]


def send(feed: TreeSynchronizer, messages: Iterable[Message]) -> set[str]:
    """The type names of the answers."""
    answers = [feed.part(one) if isinstance(one, SnapshotPart) else feed.events(one) for one in messages]
    return {type(answer).__name__ for answer in answers}
