"""Cost of moving blocks between the memory pools of two processes.

    python benchmark/bench_peers.py [--quick] [--repeats N]

    aggregated   a block is one extent at both ends: one copy each         (what pools do)
    by-request   a buffer per layer and part at the sender, as in HBM: 2 x layers copies a block, one call
    by-layer     the same copies in a call per layer
    push, fetch  the whole exchange: reserve, write, commit with checksums; lease, read, verify

    micro/modes/tcp/aggregated/16_tokens_a_block    ms for 4,096 tokens; baseline: by-request
    micro/exchange/tcp/push/4096_tokens             GB/s; baseline: memmove
    micro/exchange/tcp/push/1_page                  s; baseline: memmove

The modes are tried over every transport there is and with blocks of 4 to 256 tokens of the bench model,
the exchange with blocks of 16; there the other process is a memory instance. By-layer is timed without
the compute that it would overlap with. Half a minute; --quick half of that.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from figures import measure_together, progress, report
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.errors import ConfigError
from memserve.core.ids import Epoch, new_epoch
from memserve.core.kv_layout import KVLayout, Part, TransferMode
from memserve.mempool.arena import Arena
from memserve.mempool.pool import MemPool
from memserve.mempool.remote.peers import Peers
from memserve.peering.endpoint import TransferEndpoint
from memserve.peering.remote_process import PeerAddress
from memserve.testing.cluster import Cluster
from memserve.testing.transport_peer import PeerProcess, open_transport
from memserve.transport.copies import Copies
from memserve.transport.regions import Region
from memserve.transport.registry import TransportConfig, TransportName, open_transports


def layout_of(page_tokens: int) -> KVLayout:
    """Of the bench model."""
    return KVLayout("bench", 6, page_tokens, (Part(2, 64),) * 2, "float32", 4)


LAYOUT = layout_of(16)
PAGES, QUICK_PAGES = (4, 8, 16, 32, 64, 128, 256), (4, 16, 64, 256)
"""Tokens a block."""
MODES = (TransferMode.BY_REQUEST, TransferMode.BY_LAYER, TransferMode.AGGREGATED)
"""The first is the others' baseline."""
TOKENS = 4096
NUM_BLOCKS = 256
"""4,096 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats and sizes of blocks")
    parser.add_argument("--repeats", type=int, metavar="N", help="(default: 11; --quick: 5)")
    args = parser.parse_args()
    run(args.repeats or (5 if args.quick else 11), quick=args.quick)


def run(repeats: int, *, quick: bool) -> None:
    """All figures."""
    for transport in ("local", "tcp", "mooncake"):
        measure_modes(transport, QUICK_PAGES if quick else PAGES, repeats)
    with Cluster(Path(tempfile.mkdtemp(prefix="memserve-bench-"))) as cluster:
        cluster.launch_memory("memory", 1.0)
        cluster.wait_ready()
        seeds = itertools.count()  # No chain twice: what is there already is not sent.
        names: tuple[TransportName, ...] = ("local", "tcp")
        for name in names:
            measure_exchange(name, memory_of(cluster), seeds, repeats)


def measure_modes(name: str, pages: Sequence[int], repeats: int) -> None:
    """The same bytes in each mode's calls."""
    num_bytes = TOKENS // LAYOUT.page_tokens * LAYOUT.block_bytes
    memory = np.ones(num_bytes, np.uint8)
    with ExitStack() as stack:
        try:
            transport = open_transport(name, new_epoch())
        except ConfigError as error:
            progress(f"{name}: left out: {error}")
            return
        progress(f"transfer modes over {name}")
        stack.callback(transport.close)
        transport.register(Region(1, memory.ctypes.data, num_bytes))
        child = PeerProcess(name, num_bytes)
        stack.callback(child.kill)

        def write(calls: list[Copies]) -> Callable[[], None]:
            def all_of_them() -> None:
                for call in calls:
                    transport.write(child.peer, call, timeout_s=30)

            return all_of_them

        for page in pages:
            layout = layout_of(page)
            samples = measure_together([write(calls_of(layout, mode)) for mode in MODES], repeats)
            ms = [[taken * 1000 for taken in each] for each in samples]
            for mode, taken in zip(MODES, ms, strict=True):
                figure = f"micro/modes/{name}/{mode}/{page}_tokens_a_block"
                report(figure, taken, "ms", baseline=None if mode is MODES[0] else ms[0])


def calls_of(layout: KVLayout, mode: TransferMode) -> list[Copies]:
    """What moves all blocks in that mode: from one extent each, or a buffer for each part of a layer."""
    num_blocks = TOKENS // layout.page_tokens
    blocks, part = np.arange(num_blocks)[:, None], layout.part_bytes[0]
    calls = []
    for extents in layout.copy_plan(mode):
        offsets, lengths = np.array(extents.offsets), np.tile(np.array(extents.lengths), num_blocks)
        targets = blocks * layout.block_bytes + offsets
        is_whole = mode is TransferMode.AGGREGATED
        sources = targets if is_whole else offsets // part * (num_blocks * part) + blocks * part
        ones = np.ones(targets.size, np.int64)
        calls.append(Copies(ones, sources.ravel(), ones, targets.ravel(), lengths))
    return calls


def memory_of(cluster: Cluster) -> PeerAddress:
    with urllib.request.urlopen(f"{cluster.url}/workers", timeout=30) as answer:
        (pool,) = json.load(answer)["pools"]
    return PeerAddress(pool["address"], Epoch(int(pool["epoch"], 16)))


def measure_exchange(
    transport: TransportName, memory: PeerAddress, seeds: Iterator[int], repeats: int
) -> None:
    """4,096 tokens there and back, and one page there, against memmove of the same bytes."""
    progress(f"push and fetch over {transport}")
    config = TransportConfig(transport)
    endpoint = TransferEndpoint(config)
    pool = MemPool(LAYOUT, Arena(LAYOUT.block_bytes, 2 * NUM_BLOCKS), endpoint.epoch)
    peers = Peers(endpoint, partial(open_transports, config, None), lambda _: pool)
    chains: list[list[BlockKey]] = []

    def push() -> None:
        peers.transfer_with_insert(memory, pool, chains[-1])

    def fetch() -> None:
        assert peers.fetch(memory, pool, chains[-1], timeout_s=30) == NUM_BLOCKS

    block_bytes, num_bytes = LAYOUT.block_bytes, LAYOUT.block_bytes * NUM_BLOCKS
    taken: dict[str, list[float]] = {"push": [], "fetch": [], "memmove": [], "push of one page": []}
    for turn in range(repeats + 1):
        chains.append(store(pool, next(seeds), NUM_BLOCKS))
        seconds = {"push": timed(push)}
        pool.clear()
        seconds["fetch"] = timed(fetch)
        pool.clear()
        seconds["memmove"] = timed(lambda: move(pool))
        chains.append(store(pool, next(seeds), 1))
        seconds["push of one page"] = timed(push)
        pool.clear()
        for name, each in seconds.items():
            if turn:
                taken[name].append(each)
    base = [num_bytes / s / 1e9 for s in taken["memmove"]]
    for name in ("push", "fetch"):
        report(
            f"micro/exchange/{transport}/{name}/4096_tokens",
            [num_bytes / s / 1e9 for s in taken[name]],
            "GB/s",
            baseline=base,
        )
    one = [s * block_bytes / num_bytes for s in taken["memmove"]]
    report(f"micro/exchange/{transport}/push/1_page", taken["push of one page"], "s", baseline=one)
    peers.close()
    pool.arena.close()


def store(pool: MemPool, seed: int, num_blocks: int) -> list[BlockKey]:
    """A chain of new blocks, cached."""
    keys = page_keys([seed] * num_blocks * LAYOUT.page_tokens, LAYOUT.page_tokens)
    addrs = pool.alloc_mem(num_blocks)
    pool.seal(addrs)
    pool.insert(keys, addrs)
    return keys


def move(pool: MemPool) -> None:
    """The bytes of as many blocks from one half of the arena to the other."""
    half = pool.arena.slot_bytes * NUM_BLOCKS
    ctypes.memmove(pool.arena.address + half, pool.arena.address, half)


def timed(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
