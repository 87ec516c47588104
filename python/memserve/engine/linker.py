"""SGLang's external cache linker over a MemPool: DRAM and remote tiers under one rank's radix cache.

    scheduler ── lookup ──> pool.num_cached                      microseconds, local knowledge only
              ── load ────> lease, verify ──> loader: pool.swap_in, layer by layer, under the forward
              ── offload ─> packer: agent.store = pool.swap_out, and pushes to other pools, later

SGLang and the pool name pages by the same keys, hex there and bytes here. Serves full attention,
latent or not. The scheduler thread calls the public methods. Knows no peers.
"""

from __future__ import annotations

import logging
import pkgutil
import time
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, Namespace, key_from_hex, keys_from_hex, page_keys
from memserve.core.errors import InvariantViolated
from memserve.core.executor import BoundedExecutor
from memserve.core.ids import new_epoch
from memserve.engine import sglang_internals as seams
from memserve.engine.hbm_events import HbmPublisher
from memserve.engine.kv_blocks import KVBlocks, layout_of
from memserve.engine.settings import EngineSettings, process_endpoint
from memserve.instance.pool_agent import PoolAgent
from memserve.mempool.arena import Arena
from memserve.mempool.eviction import EVICTION_POLICIES
from memserve.mempool.leases import Lease
from memserve.mempool.pool import MemPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Load:
    """Leased blocks to be loaded into the private tokens of one request."""

    rid: str
    lease: Lease
    tokens: torch.Tensor


@dataclass
class NodeTransfer(PoolTransfer):
    """Pages of one tree node, and what SGLang leaves out of the transfer (see hooks/pool.py)."""

    parent: str | None = None
    """Key, in hex, of the page before the first one; None at the root."""
    bootstrap: str | None = None
    """`host:port` of the prefill that lacks these pages, if they are offloaded at the end of a request."""


@dataclass(slots=True)
class LinkerStats:
    """Copies between HBM and DRAM since the start, and seconds spent on them."""

    offloads_begun: int = 0
    offloads: int = 0
    """Offloads that have ended, declined ones included."""
    offloaded_blocks: int = 0
    offload_s: float = 0.0
    declined_offloads: int = 0
    """Offloads without room in DRAM, or without the pages before them."""
    loads: int = 0
    loaded_blocks: int = 0
    load_s: float = 0.0
    failed_loads: int = 0


class MemPoolLinker(UnifiedCacheLinker):
    """See the module. The launcher's settings come in an environment variable, not in `extra_config`."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[ComponentType],
        extra_config: dict[str, Any],
        forward_stream: Any = None,
    ) -> None:
        """Raises ValueError for a KV pool that is not served, ConfigError if there is too little DRAM."""
        if components != {ComponentType.FULL}:
            names = ", ".join(sorted(component.name for component in components))
            raise ValueError(f"the memory pool serves full attention, not {names}: set --dram-gib 0")
        settings = EngineSettings.inherited().of_rank(pkgutil.resolve_name(seams.PARALLEL_STATE)().dp_rank)
        if settings is None:
            raise ValueError("the memory pool needs memserve.launch_server to start it")
        pkgutil.resolve_name(seams.PAGE_HASH)([0], None, 1)  # The first call on a machine compiles it.
        device_pool = params.token_to_kv_pool_allocator.get_kvcache()
        layout = layout_of(
            device_pool,
            params.page_size,
            model=server_args.model_path,
            rank=params.tp_cache_group.rank() if params.tp_cache_group is not None else 0,
            num_ranks=server_args.tp_size,
        )
        hbm_bytes = layout.block_bytes * (device_pool.size // params.page_size)
        num_slots = settings.dram_slots(layout, hbm_bytes)
        arena = Arena(layout.block_bytes, num_slots, max_slots=settings.max_growth * num_slots)
        endpoint = process_endpoint() if settings.router is not None else None
        epoch = endpoint.epoch if endpoint is not None else new_epoch()
        self._pool = MemPool(layout, arena, epoch, EVICTION_POLICIES[settings.eviction])
        self.agent = PoolAgent(settings, self._pool, endpoint)
        self._blocks = KVBlocks(device_pool, layout, arena)
        self.pools = {PoolName.KV: device_pool}
        self.forward_stream = forward_stream
        self.layer_done_counter = LayerWiseLoadCounter(device_pool.layer_num)
        self._hbm: HbmPublisher | None = None
        self._stats = LinkerStats()
        self._queued: list[_Load] = []
        self._done: deque[bool] = deque()
        # A waiting offload takes about 300 bytes, and keeps its HBM in place. A forward waits for its loads.
        self._packer = BoundedExecutor("mempool-packer", capacity=65536)
        self._loader = BoundedExecutor("mempool-loader", capacity=1024)
        logger.info("memory pool ready blocks=%d block_bytes=%d", arena.num_slots, layout.block_bytes)

    def stats(self) -> dict[str, Any]:
        """The current numbers of this rank's pool, linker and exchange with other pools."""
        own = asdict(self._stats)  # First: a report without a running offload has all its effects.
        hbm = self._hbm.stats() if self._hbm is not None else None
        return {**self.agent.stats(), "linker": own, "hbm": hbm}

    def report_hbm(self, events: HbmPublisher) -> None:
        """Have the pool report the HBM tier of these events to the router. Once, before the first event."""
        events.join(self._pool.add_external_tier(Tier.HBM))
        self._hbm = events

    def record_prompt_keys(self, req: Any) -> None:
        """Send the keys of a request's prompt to the router, later."""
        page, tokens = self._pool.layout.page_tokens, req.origin_input_ids
        namespace = Namespace(req.extra_key, req.cache_salt)

        def keys() -> list[BlockKey]:
            return page_keys(tokens[: len(tokens) // page * page], page, namespace)

        self.agent.prompt_keys.add(req.rid, keys)

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Every prefix length, in pages, that DRAM could restore."""
        return list(range(1, self._pool.num_cached(keys_from_hex(transfers[0].keys)) + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Queue a load; False if a block is gone or corrupt by now: SGLang recomputes the pages then."""
        (transfer,) = transfers
        keys = keys_from_hex(transfer.keys)
        lease = self._pool.acquire(self._pool.match(keys))
        if len(lease) < len(keys) or self._pool.verify(lease) < len(keys):
            self._pool.release(lease)
            return False
        self._queued.append(_Load(rid, lease, transfer.device_indices))
        return True

    def start_layer_wise_loading(self) -> int:
        """Start the queued loads; returns the index by which the forward waits for them, -1 for no load."""
        if not self._queued:
            return -1
        loads, self._queued = self._queued, []
        index: int = self.layer_done_counter.update_producer()
        if not self._loader.execute(lambda: self._run_loads(index, loads)):
            raise InvariantViolated("the loader is full: more forwards wait for it than can run")
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return bool(self.layer_done_counter.finish(counter_index))

    def cancel_queued_load(self, rid: str) -> bool:
        cancelled = [load for load in self._queued if load.rid == rid]
        self._queued = [load for load in self._queued if load.rid != rid]
        for load in cancelled:
            self._pool.release(load.lease)
        return bool(cancelled)

    def offload(self, transfers: list[NodeTransfer], session_id: str | None = None) -> bool:
        """Queue a node's pages for DRAM; False if the queue is full.

        SGLang keeps the pages in place until the offload is popped.
        """
        (transfer,) = transfers
        # On the CPU the forward has ended by now.
        ready = [] if transfer.device_indices.device.type == "cpu" else self.record_offload_ready()
        self._stats.offloads_begun += 1
        if self._packer.execute(lambda: self._done.append(self._pack(transfer, ready))):
            return True
        self._stats.declined_offloads += 1
        self._stats.offloads += 1
        return False

    def num_completed_offloads(self) -> int:
        return len(self._done)

    def pop_completed_offload(self) -> bool:
        return self._done.popleft()

    def reset(self) -> None:
        """Wait for running copies, then drop every block: SGLang is flushing its cache."""
        for load in self._queued:
            self._pool.release(load.lease)
        self._queued = []
        self._packer.drain()
        self._loader.drain()
        self.agent.forget()
        self._done.clear()
        self._pool.clear()
        self.layer_done_counter.reset()

    def close(self) -> None:
        """Leave the cluster and stop all threads. The process's end frees the memory."""
        self.reset()
        self.agent.close()
        if self._hbm is not None:
            self._hbm.shutdown()
        self._packer.close()
        self._loader.close()

    def _run_loads(self, index: int, loads: list[_Load]) -> None:
        """Run `loads` on the loader thread. A failure reaches only their requests, through `finish`."""
        begun = time.monotonic()
        self._stats.loads += len(loads)
        leases = [load.lease for load in loads]
        try:
            pages = self._blocks.pages(torch.cat([load.tokens for load in loads]))
            complete = partial(self.layer_done_counter.complete, index)
            self._pool.swap_in(leases, self._blocks, pages, complete)
        except (RuntimeError, IndexError) as error:
            logger.error("load from dram failed rids=%s: %s", [load.rid for load in loads], error)
            self._stats.failed_loads += len(loads)
            self.layer_done_counter.fail(index, error)
        else:
            self._stats.loaded_blocks += sum(map(len, leases))
            self._stats.load_s += time.monotonic() - begun
        finally:
            for lease in leases:
                self._pool.release(lease)

    def _pack(self, transfer: NodeTransfer, ready: list[Any]) -> bool:
        """Run an offload on the packer thread, after the events `ready`; whether DRAM has the pages now."""
        begun = time.monotonic()
        for event in ready:
            event.synchronize()
        pages = self._blocks.pages(transfer.device_indices)
        parent = key_from_hex(transfer.parent) if transfer.parent else None
        keys = keys_from_hex(transfer.keys)
        copied = self.agent.store(keys, self._blocks, pages, parent, transfer.bootstrap)
        if copied is None:
            self._stats.declined_offloads += 1
        elif copied:
            self._stats.offloaded_blocks += copied
            self._stats.offload_s += time.monotonic() - begun
        self._stats.offloads += 1
        return copied is not None
