"""Speed of block moves in one process: checksums, copies between tiers, resizing.

    micro/moving/checksum, resize/growing, offload, load_back, swap_out, swap_in ...

GB/s over more bytes than the caches hold; the baseline is a memmove of the same blocks, one by one.
Run by bench_mempool.py.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence
from types import SimpleNamespace

from figures import measure, measure_together, report
from memserve.core.block_keys import BlockKey
from memserve.core.ids import new_epoch
from memserve.core.kv_layout import KVLayout, Part
from memserve.mempool.arena import Arena
from memserve.mempool.pool import MemPool
from memserve.mempool.tier_pool import Checksum

PAGE, BLOCKS = 16, 256
REAL = KVLayout("bench", 6, PAGE, (Part(2, 64),) * 2, "float32", 4)
"""Of `scripts/make_tiny_model.py --size bench`: 96 KiB a block."""
MOVED_BLOCKS = (192 << 20) // REAL.block_bytes
"""More than the processor caches hold, as for blocks on their way to and from HBM."""


def run(repeats: int) -> None:
    """All figures."""
    bench_checksum(repeats)
    bench_resize(repeats)
    bench_kv_blocks(repeats)


def random_chain(rng: random.Random, length: int) -> list[BlockKey]:
    """Keys of a new prompt."""
    return [BlockKey(rng.randbytes(32)) for _ in range(length)]


def bench_checksum(repeats: int) -> None:
    arena = filled_arena(MOVED_BLOCKS)
    checksum = Checksum(REAL)
    blocks = [arena.block(slot) for slot in range(MOVED_BLOCKS)]
    target = bytearray(arena.num_bytes)

    def check() -> None:
        for block in blocks:
            checksum.of(block)

    times = measure_together([check, lambda: move(arena, target)], repeats)
    report_rate("checksum", arena.num_bytes, *times)


def bench_resize(repeats: int) -> None:
    """To half the size, with that much to move; and back, with nothing to move."""
    arena = Arena(REAL.block_bytes, 2 * MOVED_BLOCKS)
    pool = MemPool(REAL, arena, new_epoch())
    half = arena.slot_bytes * MOVED_BLOCKS
    target = bytearray(arena.num_bytes)
    shrunk, grown, moved = [], [], []
    for turn in range(repeats + 1):
        pool.clear()
        filler = pool.alloc_mem(MOVED_BLOCKS)
        rng = random.Random(turn)
        for _ in range(MOVED_BLOCKS // BLOCKS):
            addrs = pool.alloc_mem(BLOCKS)
            pool.seal(addrs)
            pool.insert(random_chain(rng, BLOCKS), addrs)
        pool.free_mem(filler)
        moved += measure(lambda: move(arena, target, MOVED_BLOCKS), 1, warmup=0)
        shrunk += measure(lambda: pool.resize(MOVED_BLOCKS), 1, warmup=0)
        pool.clear()
        grown += measure(lambda: pool.resize(2 * MOVED_BLOCKS), 1, warmup=0)
    report_rate("resize/shrinking_over_cached_blocks", half, shrunk[1:], moved[1:])
    report_rate("resize/growing", half, grown[1:], moved[1:])


def bench_kv_blocks(repeats: int) -> None:
    """What the engine does between HBM and the pool: pages in any order, a layer at a time, one thread."""
    import torch

    from memserve.engine.kv_blocks import KVBlocks

    torch.set_num_threads(1)
    heads, width = REAL.parts[0]
    shape = (MOVED_BLOCKS * PAGE, heads, width)
    k_buffer, v_buffer = (
        [torch.ones(shape, dtype=torch.float32) for _ in range(REAL.num_layers)] for _ in "kv"
    )
    arena = filled_arena(MOVED_BLOCKS)
    blocks = KVBlocks(SimpleNamespace(k_buffer=k_buffer, v_buffer=v_buffer), REAL, arena)
    order = torch.randperm(MOVED_BLOCKS, generator=torch.Generator().manual_seed(0))
    pages = blocks.pages((order[:, None] * PAGE + torch.arange(PAGE)).flatten())
    slots = list(range(MOVED_BLOCKS))
    target = bytearray(arena.num_bytes)

    def load_back() -> None:
        for start in range(0, MOVED_BLOCKS, BLOCKS):
            for layer in range(REAL.num_layers):
                some = slice(start, start + BLOCKS)
                blocks.load_layer(layer, slots[some], pages[some])

    pool = MemPool(REAL, Arena(REAL.block_bytes, MOVED_BLOCKS), new_epoch())
    device = KVBlocks(SimpleNamespace(k_buffer=k_buffer, v_buffer=v_buffer), REAL, pool.arena)
    keys = random_chain(random.Random(4), MOVED_BLOCKS)
    chains = [slice(start, start + BLOCKS) for start in range(0, MOVED_BLOCKS, BLOCKS)]

    def swap_out() -> None:
        pool.clear()
        for some in chains:
            pool.swap_out(keys[some], device, pages[some], keys[some.start - 1] if some.start else None)

    def swap_in() -> None:
        for some in chains:
            with pool.acquire(pool.match(keys[some])) as lease:
                assert pool.verify(lease) == len(keys[some])
                pool.swap_in([lease], device, pages[some], lambda _: None)

    pack, load, out, back, moved = measure_together(
        [lambda: blocks.pack(slots, pages), load_back, swap_out, swap_in, lambda: move(arena, target)],
        repeats,
    )
    report_rate("offload", arena.num_bytes, pack, moved, target=0.5)
    report_rate("load_back", arena.num_bytes, load, moved, target=0.5)
    report_rate("swap_out", arena.num_bytes, out, moved)
    report_rate("swap_in", arena.num_bytes, back, moved)


def filled_arena(num_blocks: int) -> Arena:
    """Blocks that differ, resident and read once."""
    arena = Arena(REAL.block_bytes, num_blocks)
    for slot in range(num_blocks):
        arena.block(slot)[:] = bytes([slot % 251]) * REAL.block_bytes
    return arena


def move(arena: Arena, target: bytearray, num_blocks: int | None = None) -> None:
    """The baseline: so many blocks out of an arena (default: all), one memmove each."""
    place = ctypes.addressof(ctypes.c_char.from_buffer(target))
    for slot in range(arena.num_slots if num_blocks is None else num_blocks):
        offset = arena.offset(slot)
        ctypes.memmove(place + offset, arena.address + offset, arena.block_bytes)


def report_rate(
    name: str,
    num_bytes: int,
    seconds: Sequence[float],
    baseline: Sequence[float],
    *,
    target: float | None = None,
) -> None:
    rates = ([num_bytes / taken / 1e9 for taken in samples] for samples in (seconds, baseline))
    report(f"micro/moving/{name}", next(rates), "GB/s", baseline=next(rates), target=target)
