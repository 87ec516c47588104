"""One rank's memory pool as a member of the cluster: it pushes stored pages to the pools that need them.

    prefill   pushes its pages to a memory instance
    decode    when a request ends, pushes the pages to the prefill that the request came from

Without a router the pool has no peers. Knows no SGLang and no HBM.
Source: MemServe, PD-Caching-3 (D to P at the request's end).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import msgspec

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.caching import CachingMode
from memserve.core.errors import InstanceLost, LayoutMismatch, MemServeError, OutOfBlocks, PeerDeclined
from memserve.core.executor import BoundedExecutor
from memserve.core.ids import InstanceId
from memserve.core.kv_layout import KVLayout
from memserve.core.memory import free_memory_bytes
from memserve.instance.membership import Membership
from memserve.instance.publisher import PromptKeyLog, Publisher, ReportSource
from memserve.instance.push_queue import PushQueue, PushTask
from memserve.mempool.events import digest
from memserve.mempool.eviction import EvictionName
from memserve.mempool.pool import Device, MemPool
from memserve.mempool.remote.config import PeersConfig
from memserve.mempool.remote.evacuation import preference
from memserve.mempool.remote.peers import Peers
from memserve.peering.endpoint import TransferEndpoint
from memserve.peering.remote_process import PeerAddress
from memserve.transport.registry import TransportConfig, open_transports
from memserve.wire.link import ControlClient
from memserve.wire.messages import PoolInfo, Role, TierBlocks

logger = logging.getLogger(__name__)


class PoolSettings(msgspec.Struct, frozen=True):
    """The settings of the pools of one server's ranks, passed to them as JSON."""

    instance_id: InstanceId
    role: Role
    caching: CachingMode
    dram_bytes: int | None
    """Of all ranks together; None: `dram_per_hbm` times the KV memory of the device, if there is room."""
    router: str | None
    """Control address of the router; None: the pool has no peers."""
    bootstrap: str
    """`host:port` that names this prefill in requests to decode; empty for other roles."""
    transport: TransportConfig
    eviction: EvictionName = "lru"
    peers: PeersConfig = PeersConfig()
    dram_per_hbm: int = 2
    """Bytes of DRAM per byte of KV in HBM, if `dram_bytes` is None."""
    share_of_free: float = 0.25
    """Upper bound then, as a share of the free memory: several servers may share a machine."""
    max_growth: int = 4
    """A tier can grow to this many times its first size: each possible slot costs some bytes of metadata."""

    def dram_slots(self, layout: KVLayout, hbm_bytes: int) -> int:
        """Blocks of the DRAM tier of one rank whose HBM holds `hbm_bytes` of KV. At least one."""
        if self.dram_bytes is not None:
            return num_slots(self.dram_bytes, layout)
        free = free_memory_bytes() // layout.num_ranks
        wanted = min(self.dram_per_hbm * hbm_bytes, int(free * self.share_of_free))
        return num_slots(wanted * layout.num_ranks, layout)


def num_slots(dram_bytes: int, layout: KVLayout) -> int:
    """Blocks of one rank if all ranks together have `dram_bytes`. At least one."""
    return max(1, dram_bytes // layout.num_ranks // layout.block_bytes)


def tier_blocks(pools: Sequence[MemPool]) -> tuple[TierBlocks, ...]:
    """Blocks in each tier of some pools of one instance: their own tiers, then the external ones."""
    numbers = {Tier.DRAM: [0, 0, 0]}
    for pool in pools:
        for tier, stats in pool.stats_by_tier().items():
            before = numbers.get(tier, [0, 0, 0])
            numbers[tier] = [
                a + b for a, b in zip(before, (stats.cached, stats.free, stats.total), strict=True)
            ]
    own = [TierBlocks(tier.name.lower(), *numbers[tier]) for tier in sorted(numbers)]
    external = [item for pool in pools for item in pool.external_blocks().items()]
    return (*own, *(TierBlocks(tier.name.lower(), num_blocks) for tier, num_blocks in external))


class PoolAgent:
    """A pool and its connections to other pools. Any thread may call any method."""

    def __init__(self, settings: PoolSettings, pool: MemPool, endpoint: TransferEndpoint | None) -> None:
        """Join the cluster if there is a router, with peers that talk to `endpoint`, which `close` closes.

        Raises ConfigError if a transport cannot be opened.
        """
        self.pool = pool
        self._settings = settings
        self._peers: Peers | None = None
        self._members: Membership | None = None
        self._publisher: Publisher | None = None
        self.prompt_keys = PromptKeyLog()
        self._resizer = BoundedExecutor("mempool-resize", capacity=16)  # Resizes beyond that are dropped.
        self._closing = threading.Event()
        self._pushes = PushQueue(self._push)
        if settings.router is not None and endpoint is not None:
            self._join(settings, settings.router, endpoint)

    # ---- stores and pushes

    def store(
        self,
        keys: Sequence[BlockKey],
        device: Device,
        pages: Any,
        parent: BlockKey | None,
        bootstrap: str | None,
    ) -> int | None:
        """Swap pages of HBM out to the pool, and queue their push to the pools that should have them, too.

        Arguments and result are those of `MemPool.swap_out`, but a full pool is logged and gives None.
        `bootstrap` names the prefill of a request that has ended. Pages that are not stored are not pushed.
        """
        try:
            copied = self.pool.swap_out(keys, device, pages, parent)
        except OutOfBlocks as error:
            logger.warning("not offloaded pages=%d: %s", len(keys), error)
            return None
        if copied is not None:
            for to in self._receivers(keys, bootstrap):
                self._pushes.offer(PushTask(to, keys, parent))
        return copied

    def forget(self) -> None:
        """Push nothing of what has been stored so far: the pool is being cleared."""
        self._pushes.forget()

    # ---- size

    def resize(self, dram_bytes: int) -> None:
        """Give the DRAM tier `dram_bytes`, all ranks together, in the background while it serves.

        The tier grows to at most `max_growth` times its first size. Blocks that do not fit any more move
        or are evicted; blocks that are read or written at that moment follow later. The outcome is logged.
        """
        wanted = num_slots(dram_bytes, self.pool.layout)
        if not self._resizer.execute(lambda: self._resize(wanted)):
            logger.warning("memory pool not resized to blocks=%d: too many requests to resize", wanted)

    # ---- state

    def stats(self) -> dict[str, Any]:
        """All statistics, as plain values."""
        members = self._members.pools() if self._members is not None else ()
        sequence, cached = self.pool.cached()
        tiers = self.pool.stats_by_tier()
        return {
            "members": {"known": len(members)},
            "pool": asdict(tiers.pop(Tier.DRAM)),
            "tiers": {tier.name.lower(): asdict(stats) for tier, stats in tiers.items()},
            "peers": asdict(self._peers.stats()) if self._peers is not None else None,
            "outbox": asdict(self._pushes.stats()),
            "events": {"numbered": sequence},
            "digest": {tier.name.lower(): digest(nodes) for tier, nodes in cached},
        }

    def close(self) -> None:
        """Leave the cluster and stop all threads. The pool stays."""
        if self._publisher is not None:
            self._publisher.close()
        if self._members is not None:
            self._members.close()
        self._pushes.close()
        self._closing.set()
        self._resizer.close()
        self.prompt_keys.close()
        if self._peers is not None:
            self._peers.close()

    def _join(self, settings: PoolSettings, router: str, endpoint: TransferEndpoint) -> None:
        key, epoch = endpoint.key, endpoint.epoch
        opened = partial(open_transports, settings.transport, key)
        self._peers = Peers(endpoint, opened, self._pool_of, settings.peers)
        self._peers.add(self.pool)
        info = PoolInfo(
            instance_id=settings.instance_id,
            epoch=epoch,
            role=settings.role,
            caching=settings.caching,
            address=endpoint.address.control,
            layout=self.pool.layout.digest.hex(),
            bootstrap=settings.bootstrap,
            block_bytes=self.pool.layout.block_bytes * self.pool.layout.num_ranks,
            rank=self.pool.layout.rank,
        )
        self._members = Membership(
            ControlClient(router, key=key),
            info,
            on_gone=self._peers.gone,
            tiers=lambda: tier_blocks([self.pool]),
        )
        if self.pool.layout.rank == 0:  # The ranks of a server hold the same blocks.
            client = ControlClient(router, key=key)
            source = ReportSource(
                epoch, self.pool.take_events, self.pool.snapshot, take_prompt_keys=self.prompt_keys.take
            )
            self._publisher = Publisher(client, source)

    @property
    def wants_prompt_keys(self) -> bool:
        """Whether the router wants the keys of prompts: add them to `prompt_keys`."""
        return self._publisher is not None and self._members is not None and self._members.wants_prompt_keys

    def _pool_of(self, layout: KVLayout) -> MemPool:
        if layout.digest != self.pool.layout.digest:
            raise LayoutMismatch("; ".join(self.pool.layout.differences(layout)))
        return self.pool

    def _receivers(self, keys: Sequence[BlockKey], bootstrap: str | None) -> list[PoolInfo]:
        """The pools to push these pages to."""
        if self._members is None or not keys:
            return []
        layout = self.pool.layout.digest.hex()
        if self._settings.role is Role.DECODE:
            home = self._members.prefill_at(bootstrap, layout) if bootstrap else None
            return [home] if home is not None and self._settings.caching.returns else []
        memories = self._members.others(layout, Role.MEMORY)
        if len(memories) > 1:
            root = self.pool.chain_to(keys[-1])[:1] or keys[:1]
            memories = (min(memories, key=lambda pool: preference(root[0], str(pool.instance_id))),)
        return list(memories)

    def _push(self, task: PushTask) -> int:
        assert self._peers is not None
        info = self._current(task.to)
        to = PeerAddress(info.address, info.epoch)
        try:
            return self._peers.transfer_with_insert(to, self.pool, task.keys, parent=task.parent).num_sent
        except PeerDeclined as error:
            if not error.parent_unknown:
                raise
        chain = self.pool.chain_to(task.keys[-1])
        return self._peers.transfer_with_insert(to, self.pool, chain).num_sent if chain else 0

    def _current(self, pool: PoolInfo) -> PoolInfo:
        """`pool`, or the pool that has replaced it. Raises InstanceLost if there is neither: a push to a
        dead process would cost every push behind it some seconds."""
        pools = self._members.pools() if self._members is not None else ()
        same = next((one for one in pools if one.epoch == pool.epoch), None)
        name = (pool.instance_id, pool.layout)
        current = same or next((one for one in pools if (one.instance_id, one.layout) == name), None)
        if current is None:
            raise InstanceLost(str(pool.instance_id), "it has gone")
        return current

    def _resize(self, num_slots: int, *, timeout_s: float = 30.0, retry_s: float = 0.05) -> None:
        before = self.pool.arena.num_slots
        deadline = time.monotonic() + timeout_s
        try:
            while self.pool.resize(num_slots) > num_slots and time.monotonic() < deadline:
                if self._closing.wait(retry_s):
                    return
            if self._peers is not None:
                self._peers.resized(self.pool)
        except MemServeError as error:
            logger.warning("memory pool not resized to blocks=%d: %s", num_slots, error)
        after = self.pool.arena.num_slots
        logger.info("memory pool resized blocks=%d before=%d wanted=%d", after, before, num_slots)
