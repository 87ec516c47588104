"""The DRAM tier under SGLang's linker interface, over a device pool in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockStored, KVEventBatch, StorageMedium
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.runtime_context import get_parallel

from memserve.core.block_keys import event_hash, page_keys
from memserve.core.caching import CachingMode
from memserve.core.ids import InstanceId
from memserve.engine.hbm_events import HbmPublisher
from memserve.engine.kv_blocks import MAX_BATCH_BLOCKS, KVBlocks, layout_of
from memserve.engine.linker import MemPoolLinker, NodeTransfer
from memserve.engine.settings import SETTINGS_VARIABLE, EngineSettings
from memserve.instance.pool_agent import PoolSettings
from memserve.mempool.arena import Arena
from memserve.mempool.eviction import EvictionName
from memserve.testing.cluster import wait_for
from memserve.transport.registry import TransportConfig
from memserve.wire.messages import Role

LAYERS, HEADS, DIM, PAGE, TOKENS = 3, 2, 4, 4, 4 * 256
BLOCK_BYTES = LAYERS * 2 * PAGE * HEADS * DIM * 4


def device_pool(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)

    def buffers() -> list[torch.Tensor]:
        return [torch.randn(TOKENS, HEADS, DIM).to(dtype) for _ in range(LAYERS)]

    return SimpleNamespace(k_buffer=buffers(), v_buffer=buffers(), layer_num=LAYERS, size=TOKENS)


def latent_pool(dtype: torch.dtype = torch.float32) -> Any:
    """One buffer per layer, as for multi-head latent attention."""
    latents = [torch.randn(TOKENS, 1, 9).to(dtype) for _ in range(LAYERS)]
    return SimpleNamespace(kv_buffer=latents, layer_num=LAYERS, size=TOKENS)


def uneven_pool(dtype: torch.dtype = torch.float32) -> Any:
    """Values narrower than keys."""
    pool = device_pool(dtype)
    pool.v_buffer = [buffer[..., :3].contiguous() for buffer in pool.v_buffer]
    return pool


def make_linker(pool: Any, num_blocks: int = 64, eviction: EvictionName = "lru") -> MemPoolLinker:
    settings = PoolSettings(
        instance_id=InstanceId("prefill"),
        role=Role.PREFILL,
        caching=CachingMode.FULL,
        dram_bytes=num_blocks * BLOCK_BYTES,
        router=None,
        bootstrap="127.0.0.1:1",
        transport=TransportConfig(),
        eviction=eviction,
    )
    EngineSettings(TransportConfig(), settings).export()
    allocator = SimpleNamespace(get_kvcache=lambda: pool)
    with get_parallel().override(dp_rank=None):
        return _linker(allocator)


def _linker(allocator: Any) -> MemPoolLinker:
    return MemPoolLinker(
        SimpleNamespace(model_path="model", tp_size=1),
        SimpleNamespace(token_to_kv_pool_allocator=allocator, page_size=PAGE, tp_cache_group=None),
        components={ComponentType.FULL},
        extra_config={},
    )


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the environment after a test."""
    monkeypatch.setenv(SETTINGS_VARIABLE, "")


@pytest.fixture
def pool() -> Any:
    return device_pool()


@pytest.fixture
def linker(pool: Any) -> Iterator[MemPoolLinker]:
    linker = make_linker(pool)
    yield linker
    linker.close()
    stats = linker._pool.stats()
    assert stats.private == stats.reserved == stats.quarantined == stats.leases == 0


def transfer(num_pages: int, *, first_token: int = 0, seed: int = 0) -> NodeTransfer:
    """Pages of one prompt, in device tokens from `first_token` on."""
    keys = [key.hex() for key in page_keys([seed] * num_pages * PAGE, PAGE)]
    tokens = torch.arange(first_token, first_token + num_pages * PAGE)
    return NodeTransfer(name=PoolName.KV, keys=keys, device_indices=tokens)


def offload(linker: MemPoolLinker, pages: NodeTransfer, parent: str | None = None) -> bool:
    assert linker.offload([replace(pages, parent=parent)])
    wait_for(linker.num_completed_offloads, what="the offload", timeout_s=10)
    return linker.pop_completed_offload()


def load(linker: MemPoolLinker, pages: NodeTransfer) -> bool:
    if not linker.load("rid", [pages]):
        return False
    index = linker.start_layer_wise_loading()
    return linker.finish_layer_wise_loading(index)


def kv_at(pool: Any, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([buffer[tokens].flatten() for buffer in buffers_of(pool)])


def buffers_of(pool: Any) -> list[torch.Tensor]:
    return [*getattr(pool, "k_buffer", ()), *getattr(pool, "v_buffer", ()), *getattr(pool, "kv_buffer", ())]


@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("make", [device_pool, latent_pool, uneven_pool])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_pages", [1, 3, MAX_BATCH_BLOCKS, MAX_BATCH_BLOCKS + 1])
def test_kv_blocks_keep_pages_through_a_round_trip(
    make: Callable[[torch.dtype], Any], dtype: torch.dtype, num_pages: int, scattered: bool
) -> None:
    pool = make(dtype)
    layout = layout_of(pool, PAGE, model="model", rank=0, num_ranks=1)
    blocks = KVBlocks(pool, layout, Arena(layout.block_bytes, 128))
    slots = torch.randperm(128)[:num_pages].tolist() if scattered else list(range(20, 20 + num_pages))
    source = torch.randperm(TOKENS // PAGE)[:num_pages, None] * PAGE + torch.arange(PAGE)
    before = kv_at(pool, source.flatten())
    blocks.pack(slots, blocks.pages(source.flatten()))
    for buffer in buffers_of(pool):
        buffer.zero_()
    target = torch.randperm(TOKENS // PAGE)[:num_pages, None] * PAGE + torch.arange(PAGE)
    for layer in range(LAYERS):
        blocks.load_layer(layer, slots, blocks.pages(target.flatten()))
    assert torch.equal(kv_at(pool, target.flatten()), before)


def test_linker_loads_offloaded_pages_to_other_tokens(linker: MemPoolLinker, pool: Any) -> None:
    stored = transfer(5)
    assert linker.lookup("rid", [stored]) == []
    assert offload(linker, stored)
    assert linker.lookup("rid", [stored]) == [1, 2, 3, 4, 5]
    assert linker.lookup("rid", [transfer(7)]) == [1, 2, 3, 4, 5]
    assert linker.lookup("rid", [transfer(2, seed=1)]) == []
    target = transfer(5, first_token=400)
    assert load(linker, target)
    assert torch.equal(kv_at(pool, target.device_indices), kv_at(pool, stored.device_indices))


def test_linker_offloads_a_node_only_after_its_parent(linker: MemPoolLinker) -> None:
    whole = transfer(6)
    assert whole.keys is not None
    head = NodeTransfer(name=PoolName.KV, keys=whole.keys[:4], device_indices=torch.arange(16))
    tail = NodeTransfer(name=PoolName.KV, keys=whole.keys[4:], device_indices=torch.arange(16, 24))
    assert not offload(linker, tail, parent=whole.keys[3]), "no lookup could find it"
    assert linker._pool.stats().cached == 0
    assert offload(linker, head)
    assert offload(linker, tail, parent=whole.keys[3])
    assert linker.lookup("rid", [whole])[-1] == 6
    # A lookup leaves out the pages that the device still has.
    assert linker.lookup("rid", [tail]) == [1, 2]


def test_linker_does_not_copy_pages_that_dram_has(linker: MemPoolLinker) -> None:
    assert offload(linker, transfer(3))
    assert offload(linker, transfer(5))
    assert linker._pool.stats().cached == 5
    assert linker._pool.stats().bytes_sealed == 5 * BLOCK_BYTES


def test_linker_does_not_load_a_block_with_a_flipped_bit(linker: MemPoolLinker, pool: Any) -> None:
    pages = transfer(4)
    assert offload(linker, pages)
    slot = linker._pool.slots(linker._pool.match(page_keys([0] * 4 * PAGE, PAGE)).addrs)[2]
    linker._pool.arena.block(slot)[17] ^= 1
    target = transfer(4, first_token=400)
    before = kv_at(pool, target.device_indices)
    assert not load(linker, target)
    assert torch.equal(kv_at(pool, target.device_indices), before)
    assert linker._pool.stats().corruptions == 1
    assert linker.lookup("rid", [pages]) == [1, 2]
    assert load(linker, transfer(2, first_token=400))


def test_linker_evicts_in_a_full_tier_and_declines_in_one_too_small() -> None:
    linker = make_linker(device_pool(), num_blocks=4)
    assert offload(linker, transfer(3, seed=1))
    assert offload(linker, transfer(3, seed=2))
    assert linker.lookup("rid", [transfer(3, seed=2)])[-1] == 3
    assert linker._pool.stats().evictions == 2
    assert not offload(linker, transfer(5, seed=3))
    linker.close()


@pytest.mark.parametrize(("eviction", "kept"), [("lru", 2), ("lfu", 1), ("cost", 1)])
def test_linker_gives_the_pool_the_eviction_policy_of_the_settings(eviction: EvictionName, kept: int) -> None:
    """Prompt 1 is used often, prompt 2 last; the third prompt takes the place of one of them."""
    linker = make_linker(device_pool(), num_blocks=2, eviction=eviction)
    assert offload(linker, transfer(1, seed=1))
    for _ in range(5):
        assert load(linker, transfer(1, seed=1, first_token=400))
        wait_for(lambda: linker._pool.stats().leases == 0, what="the lease to end", timeout_s=10)
    assert offload(linker, transfer(1, seed=2))
    assert offload(linker, transfer(1, seed=3))
    assert [seed for seed in (1, 2) if linker.lookup("rid", [transfer(1, seed=seed)])] == [kept]
    linker.close()


def test_linker_releases_the_blocks_of_a_cancelled_load(linker: MemPoolLinker) -> None:
    assert offload(linker, transfer(3))
    assert linker.load("rid", [transfer(3)])
    assert linker._pool.stats().leases == 1
    assert not linker.cancel_queued_load("another")
    assert linker.cancel_queued_load("rid")
    assert linker._pool.stats().leases == 0
    assert linker.start_layer_wise_loading() == -1


def test_linker_reports_a_failed_load_and_releases_its_blocks(linker: MemPoolLinker) -> None:
    assert offload(linker, transfer(3))
    beyond = transfer(3, first_token=TOKENS)
    assert not load(linker, beyond)
    wait_for(lambda: linker._pool.stats().leases == 0, what="the lease to end", timeout_s=10)


def test_linker_reset_drops_all_blocks_and_offloads_again(linker: MemPoolLinker) -> None:
    linker.offload([transfer(3)])
    assert linker.load("rid", [transfer(3)]) in (True, False)
    linker.reset()
    assert linker.lookup("rid", [transfer(3)]) == []
    assert linker.num_completed_offloads() == 0
    assert offload(linker, transfer(3))


def test_linker_reports_blocks_in_hbm_beside_those_in_dram(linker: MemPoolLinker) -> None:
    assert linker.stats()["hbm"] is None
    publisher = HbmPublisher()
    linker.report_hbm(publisher)
    tokens = [0] * 3 * PAGE
    names = [event_hash(key) for key in page_keys(tokens, PAGE)]
    told = BlockStored(names, None, tokens, PAGE, None, medium=StorageMedium.GPU)
    publisher.publish(KVEventBatch(ts=0.0, events=[told]))
    publisher.drain()
    assert offload(linker, transfer(3))
    stats = linker.stats()
    assert stats["hbm"] == {"blocks": 3, "events": 1, "left_out": 0}
    assert stats["digest"]["hbm"] == stats["digest"]["dram"] != (0, "0" * 16)
    linker.reset()
    assert linker.stats()["hbm"]["blocks"] == 3, "only SGLang removes these"
    publisher.publish(KVEventBatch(ts=0.0, events=[AllBlocksCleared()]))
    publisher.drain()
    assert linker.stats()["digest"]["hbm"] == (0, "0" * 16)


@pytest.mark.parametrize("component", [ComponentType.SWA, ComponentType.MAMBA])
def test_linker_refuses_models_that_it_cannot_serve(component: ComponentType) -> None:
    with pytest.raises(ValueError, match="--dram-gib"):
        MemPoolLinker(None, None, components={ComponentType.FULL, component}, extra_config={})
    with pytest.raises(ValueError, match="--dram-gib"):
        layout_of(SimpleNamespace(kv_buffer=[]), PAGE, model="m", rank=0, num_ranks=1)


@pytest.mark.parametrize("tokens", [range(PAGE - 1), range(1, PAGE + 1)], ids=["part of a page", "askew"])
def test_kv_blocks_refuse_tokens_that_are_not_whole_pages(pool: Any, tokens: range) -> None:
    layout = layout_of(pool, PAGE, model="model", rank=0, num_ranks=1)
    blocks = KVBlocks(pool, layout, Arena(layout.block_bytes, 1))
    with pytest.raises(IndexError, match="whole pages"):
        blocks.pages(torch.tensor(tokens))
