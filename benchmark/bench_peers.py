"""What it costs to move blocks between the memory pools of two processes.

    python benchmark/bench_peers.py [--repeats N]

    aggregated   a block is one extent at both ends: one copy each         (what pools do)
    discrete     a buffer per layer and part at the sender, as in HBM: 2 x layers copies a block
    push, fetch  the whole exchange: reserve, write, commit with checksums; lease, read, verify

Blocks are those of 16 tokens of the bench model. The other process is a memory instance.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from figures import measure_together, progress, report
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.ids import Epoch, new_epoch
from memserve.core.kv_layout import KVLayout, TransferMode
from memserve.mempool.arena import Arena
from memserve.mempool.peers.config import PeerAddress, PeersConfig
from memserve.mempool.peers.peers import Peers
from memserve.mempool.pool import MemPool
from memserve.testing.cluster import Cluster
from memserve.testing.transport_peer import PeerProcess, open_transport
from memserve.transport.copies import Copies
from memserve.transport.regions import Region
from memserve.transport.select import TransportName

LAYOUT = KVLayout.of_heads("bench", 6, 16, 2, 64, ("float32", 4))
NUM_BLOCKS = 256
"""4,096 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=11, help="default: %(default)s")
    run(parser.parse_args().repeats)


def run(repeats: int) -> None:
    """All figures."""
    measure_modes(repeats)
    with Cluster(Path(tempfile.mkdtemp(prefix="memserve-bench-"))) as cluster:
        cluster.launch_memory("memory", 1.0)
        cluster.wait_ready()
        seeds = itertools.count()  # No chain twice: what is there already is not sent.
        for transport in ("local", "tcp"):
            measure_exchange(transport, memory_of(cluster), seeds, repeats)


def measure_modes(repeats: int) -> None:
    """The same bytes over tcp, in one copy a block and in one a part of a layer."""
    progress("aggregated and discrete over tcp")
    num_bytes = NUM_BLOCKS * LAYOUT.block_bytes
    memory = np.ones(num_bytes, np.uint8)
    with ExitStack() as stack:
        transport = open_transport("tcp", new_epoch())
        stack.callback(transport.close)
        transport.register(Region(1, memory.ctypes.data, num_bytes))
        child = PeerProcess("tcp", num_bytes)
        stack.callback(child.kill)
        calls = {
            "aggregated": copies(
                np.arange(NUM_BLOCKS) * LAYOUT.block_bytes, blocks_of(TransferMode.AGGREGATED)
            ),
            "discrete": copies(discrete_sources(), blocks_of(TransferMode.BY_REQUEST)),
        }

        def write(batch: Copies) -> Callable[[], None]:
            return lambda: transport.write(child.peer, batch, timeout_s=30)

        samples = measure_together([write(batch) for batch in calls.values()], repeats)
    aggregated, discrete = ([num_bytes / s / 1e9 for s in each] for each in samples)
    per_block = [len(batch) / NUM_BLOCKS for batch in calls.values()]
    report(
        "copies per block, aggregated / discrete", per_block[:1], "copies", baseline=per_block[1:], target=0.2
    )
    report("tcp, aggregated / discrete", aggregated, "GB/s", baseline=discrete, target=1.0)


def blocks_of(mode: TransferMode) -> tuple[np.ndarray, np.ndarray]:
    """Where the copies of all blocks go, and how long they are: block by block."""
    (extents,) = LAYOUT.copy_plan(mode)
    starts = np.arange(NUM_BLOCKS)[:, None] * LAYOUT.block_bytes + np.array(extents.offsets)
    return starts.ravel(), np.tile(np.array(extents.lengths), NUM_BLOCKS)


def discrete_sources() -> np.ndarray:
    """Where those copies come from if each part of each layer has a buffer of its own."""
    num_parts, part = LAYOUT.num_layers * len(LAYOUT.parts), LAYOUT.part_bytes[0]
    buffers = np.arange(num_parts) * NUM_BLOCKS * part
    return np.ascontiguousarray(np.arange(NUM_BLOCKS)[:, None] * part + buffers).ravel()


def copies(sources: np.ndarray, targets: tuple[np.ndarray, np.ndarray]) -> Copies:
    offsets, lengths = targets
    ones = np.ones(len(lengths), np.int64)
    return Copies(ones, sources.astype(np.int64), ones, offsets.astype(np.int64), lengths.astype(np.int64))


def memory_of(cluster: Cluster) -> PeerAddress:
    with urllib.request.urlopen(f"{cluster.url}/workers", timeout=30) as answer:
        (pool,) = json.load(answer)["pools"]
    return PeerAddress(pool["address"], Epoch(int(pool["epoch"], 16)))


def measure_exchange(
    transport: TransportName, memory: PeerAddress, seeds: Iterator[int], repeats: int
) -> None:
    """4,096 tokens there and back, and one page there, against memmove of the same bytes."""
    progress(f"push and fetch over {transport}")
    epoch = new_epoch()
    pool = MemPool(LAYOUT, Arena(LAYOUT.block_bytes, 2 * NUM_BLOCKS), epoch)
    peers = Peers(PeersConfig(transport=transport), epoch, lambda _: pool)
    chains: list[list[BlockKey]] = []

    def push() -> None:
        peers.push(memory, pool, chains[-1])

    def fetch() -> None:
        assert peers.fetch(memory, pool, chains[-1], timeout_s=30) == NUM_BLOCKS

    block_bytes, num_bytes = LAYOUT.block_bytes, LAYOUT.block_bytes * NUM_BLOCKS
    taken: dict[str, list[float]] = {"push": [], "fetch": [], "memmove": [], "push of one page": []}
    for turn in range(repeats + 1):
        chains.append(store(pool, next(seeds), NUM_BLOCKS))
        seconds = {"push": timed(push)}
        pool.delete(chains[-1])
        seconds["fetch"] = timed(fetch)
        pool.delete(chains[-1])
        seconds["memmove"] = timed(lambda: move(pool))
        chains.append(store(pool, next(seeds), 1))
        seconds["push of one page"] = timed(push)
        pool.delete(chains[-1])
        for name, each in seconds.items():
            if turn:
                taken[name].append(each)
    base = [num_bytes / s / 1e9 for s in taken["memmove"]]
    for name in ("push", "fetch"):
        report(
            f"{name} of 4K tokens, {transport}",
            [num_bytes / s / 1e9 for s in taken[name]],
            "GB/s",
            baseline=base,
        )
    one = [s * block_bytes / num_bytes for s in taken["memmove"]]
    report(f"push of one page, {transport}", taken["push of one page"], "s", baseline=one)
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
