"""One rank's memory pool as a member of the cluster: which peers it fills, and which fill it.

    prefill   what it stores goes to a memory instance
    decode    when a request ends, its pages go home to the prefill it came from

Without a router it is a pool and nothing more. Knows no SGLang and no HBM.
Source: MemServe, PD-Caching-3 (D to P at the request's end).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey
from memserve.core.caching import CachingMode
from memserve.core.errors import InstanceLost, LayoutMismatch, MemServeError, OutOfBlocks, PeerDeclined
from memserve.core.ids import InstanceId
from memserve.core.kv_layout import KVLayout
from memserve.core.memory import free_memory_bytes
from memserve.instance.membership import Membership
from memserve.instance.prompt_keys import PromptKeyLog
from memserve.instance.publisher import Publisher
from memserve.instance.push_queue import PushQueue, PushTask
from memserve.instance.tier_blocks import tier_blocks
from memserve.mempool.events import digest
from memserve.mempool.eviction import EvictionName
from memserve.mempool.pool import Device, MemPool
from memserve.mempool.remote.peers import Peers
from memserve.peering.endpoint import TransferEndpoint
from memserve.peering.remote_process import PeerAddress
from memserve.transport.registry import TransportConfig, open_transports
from memserve.wire.link import ControlClient
from memserve.wire.messages import PoolInfo, Role

logger = logging.getLogger(__name__)

DRAM_PER_HBM = 2
"""Bytes of DRAM for each byte of KV in HBM, where nobody said how many."""
MAX_GROWTH = 4
"""How many times its first size a tier may ever have: each slot it could have costs some bytes."""
RESIZE_TIMEOUT_S, RESIZE_RETRY_S = 30.0, 0.05
MOST_OF_FREE = 0.25
"""But no more than this of the free memory: several servers may share a machine."""


class PoolSettings(msgspec.Struct, frozen=True):
    """What the ranks of one server are told of their pools, as JSON."""

    instance_id: InstanceId
    role: Role
    caching: CachingMode
    dram_bytes: int | None
    """For all ranks together; None: twice the KV memory of the device, if there is room."""
    router: str | None
    """Its control address; None: the pool knows no peers."""
    bootstrap: str
    """`host:port` by which requests name this prefill to decode; empty for other roles."""
    transport: TransportConfig
    eviction: EvictionName = "lru"


def dram_slots(dram_bytes: int | None, layout: KVLayout, hbm_bytes: int) -> int:
    """Blocks of one rank's DRAM tier, whose HBM holds `hbm_bytes` of KV. At least one."""
    if dram_bytes is None:
        free = free_memory_bytes() // layout.num_ranks
        dram_bytes = min(DRAM_PER_HBM * hbm_bytes, int(free * MOST_OF_FREE)) * layout.num_ranks
    return max(1, dram_bytes // layout.num_ranks // layout.block_bytes)


class PoolAgent:
    """A pool and its ways to others. Any thread may call anything."""

    def __init__(self, settings: PoolSettings, pool: MemPool, endpoint: TransferEndpoint | None) -> None:
        """Join the cluster if there is a router, with peers that talk to `endpoint`, which `close` closes.

        Raises ConfigError if a transport cannot be opened.
        """
        self.pool = pool
        self._settings = settings
        self._peers: Peers | None = None
        self._members: Membership | None = None
        self._publisher: Publisher | None = None
        self._namer = ThreadPoolExecutor(1, thread_name_prefix="mempool-names")
        self.prompt_names = PromptKeyLog(self._namer)
        self._resizer = ThreadPoolExecutor(1, thread_name_prefix="mempool-resize")
        self._closing = threading.Event()
        self._outbox = PushQueue(self._send)
        if settings.router is not None and endpoint is not None:
            self._join(settings, settings.router, endpoint)

    # ---- what goes out

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
                self._outbox.offer(PushTask(to, keys, parent))
        return copied

    def forget(self) -> None:
        """Send nothing of what has been stored so far; the pool is being cleared."""
        self._outbox.forget()

    # ---- how large it is

    def resize(self, dram_bytes: int) -> None:
        """Give the tier that much DRAM, all ranks together, soon: on a thread of its own, while it serves.

        It grows to at most MAX_GROWTH times what it began with. Blocks that do not fit any more move or
        are evicted; what somebody reads or writes just then goes later. The outcome is logged.
        """
        self._resizer.submit(self._resize, dram_slots(dram_bytes, self.pool.layout, 0))

    # ---- for those who watch

    def stats(self) -> dict[str, Any]:
        """Everything there is to know, as plain values."""
        members = self._members.pools() if self._members is not None else ()
        sequence, cached = self.pool.cached()
        tiers = self.pool.stats_by_tier()
        return {
            "members": {"known": len(members)},
            "pool": asdict(tiers.pop(Tier.DRAM)),
            "tiers": {tier.name.lower(): asdict(stats) for tier, stats in tiers.items()},
            "peers": asdict(self._peers.stats()) if self._peers is not None else None,
            "outbox": asdict(self._outbox.stats()),
            "events": {"numbered": sequence},
            "digest": {tier.name.lower(): digest(nodes) for tier, nodes in cached},
        }

    def close(self) -> None:
        """Leave the cluster and stop all threads. The pool stays."""
        if self._publisher is not None:
            self._publisher.close()
        if self._members is not None:
            self._members.close()
        self._outbox.close()
        self._closing.set()
        for executor in (self._resizer, self._namer):
            executor.shutdown(wait=True, cancel_futures=True)
        if self._peers is not None:
            self._peers.close()

    def _join(self, settings: PoolSettings, router: str, endpoint: TransferEndpoint) -> None:
        key, epoch = endpoint.key, endpoint.epoch
        opened = partial(open_transports, settings.transport, key)
        self._peers = Peers(endpoint, opened, self._pool_of)
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
        if self.pool.layout.rank == 0:  # The ranks of a server hold the same.
            client = ControlClient(router, key=key)
            self._publisher = Publisher(
                client,
                epoch,
                self.pool.take_events,
                self.pool.snapshot,
                take_named=self.prompt_names.take,
            )

    @property
    def names_prompts(self) -> bool:
        """Whether prompts that come here are to be given to `prompt_names`."""
        return self._publisher is not None and self._members is not None and self._members.wants_names

    def _pool_of(self, layout: KVLayout) -> MemPool:
        if layout.digest != self.pool.layout.digest:
            raise LayoutMismatch("; ".join(self.pool.layout.differences(layout)))
        return self.pool

    def _receivers(self, keys: Sequence[BlockKey], bootstrap: str | None) -> list[PoolInfo]:
        """Who should have these pages, too."""
        if self._members is None or not keys:
            return []
        layout = self.pool.layout.digest.hex()
        if self._settings.role is Role.DECODE:
            home = self._members.prefill_at(bootstrap, layout) if bootstrap else None
            return [home] if home is not None and self._settings.caching.returns else []
        memories = self._members.others(layout, Role.MEMORY)
        if len(memories) > 1:
            root = self.pool.chain_to(keys[-1])[:1] or keys[:1]
            memories = (min(memories, key=lambda pool: _preference(root[0], pool)),)
        return list(memories)

    def _send(self, errand: PushTask) -> int:
        assert self._peers is not None
        there = self._there_now(errand.to)
        to = PeerAddress(there.address, there.epoch)
        try:
            pushed = self._peers.transfer_with_insert(to, self.pool, errand.keys, parent=errand.parent)
            return pushed.num_sent
        except PeerDeclined as error:
            if not error.parent_unknown:
                raise
        chain = self.pool.chain_to(errand.keys[-1])
        return self._peers.transfer_with_insert(to, self.pool, chain).num_sent if chain else 0

    def _there_now(self, pool: PoolInfo) -> PoolInfo:
        """`pool`, or who has come in its place since. Raises InstanceLost if nobody has: to ask who is
        dead costs all that wait behind it seconds each."""
        pools = self._members.pools() if self._members is not None else ()
        same = next((one for one in pools if one.epoch == pool.epoch), None)
        name = (pool.instance_id, pool.layout)
        there = same or next((one for one in pools if (one.instance_id, one.layout) == name), None)
        if there is None:
            raise InstanceLost(str(pool.instance_id), "it has gone")
        return there

    def _resize(self, num_slots: int) -> None:
        before = self.pool.arena.num_slots
        deadline = time.monotonic() + RESIZE_TIMEOUT_S
        try:
            while self.pool.resize(num_slots) > num_slots and time.monotonic() < deadline:
                if self._closing.wait(RESIZE_RETRY_S):
                    return
            if self._peers is not None:
                self._peers.resized(self.pool)
        except MemServeError as error:
            logger.warning("memory pool not resized to blocks=%d: %s", num_slots, error)
        after = self.pool.arena.num_slots
        logger.info("memory pool resized blocks=%d before=%d wanted=%d", after, before, num_slots)


def _preference(root: BlockKey, pool: PoolInfo) -> int:
    """Rendezvous hashing: a prompt keeps its memory instance when others come or go."""
    return xxh3_64_intdigest(root + str(pool.instance_id).encode())
