"""HbmPublisher reports SGLang's radix cache to a pool: both of SGLang's tree cores, random and by case."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.disaggregation.kv_events import (
    BlockRemoved,
    BlockStored,
    EventPublisherFactory,
    KVEventBatch,
    StorageMedium,
)
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, Namespace, page_keys
from memserve.core.ids import Epoch
from memserve.core.kv_layout import KVLayout, Part
from memserve.engine import hbm_events
from memserve.engine.hbm_events import ExtraKeys, HbmPublisher, HbmReport, HbmStats
from memserve.engine.hooks import pool as pool_hooks
from memserve.engine.server_flags import pool_flags
from memserve.instance.metrics import SECTIONS
from memserve.mempool.arena import Arena
from memserve.mempool.pool import MemPool
from memserve.testing.cache_follower import CacheFollower

PAGE = 4
OURS = pool_flags()[-1]
LAYOUT = KVLayout("m", 1, 1, (Part(1, PAGE),) * 2, "float32", 4)
NAMESPACES = [Namespace(), Namespace("k"), Namespace(cache_salt="s"), Namespace("k", "s")]


class Allocator:
    """The allocator of a cache whose slots are never written."""

    device = "cpu"
    size = 1 << 16

    def free(self, *_: Any, **__: Any) -> None: ...

    free_segment = free_group_begin = free_group_end = free


class Engine:
    """SGLang's cache, made as its scheduler makes it for our flags, and a pool that it reports to."""

    def __init__(self, core: str) -> None:
        self.cache = UnifiedRadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=Allocator(),
                page_size=PAGE,
                enable_kv_cache_events=True,
                dynamo_kv_event_format=True,
                kv_event_lora_names=ExtraKeys(),
                tree_components=(ComponentType.FULL,),
                tree_core_backend=core,
            )
        )
        self.pool = MemPool(LAYOUT, Arena(LAYOUT.block_bytes, 2), Epoch(1))
        self.hbm = self.pool.add_external_tier(Tier.HBM)
        self.report = HbmReport(self.hbm)
        self.follower = CacheFollower()

    def insert(self, tokens: Sequence[int], namespace: Namespace = NAMESPACES[0]) -> None:
        key = RadixKey(array("q", tokens), extra_key=namespace.extra_key, cache_salt=namespace.cache_salt)
        self.cache.insert(InsertParams(key=key, value=torch.arange(len(tokens))))

    def evict(self, num_tokens: int) -> None:
        self.cache.evict(EvictParams(num_tokens=num_tokens))

    def tell(self) -> set[BlockKey]:
        """Deliver all new events to the pool and its follower; returns the follower's blocks."""
        self.report.apply(self.cache.take_events())
        assert all(map(self.follower.apply, self.pool.take_events()))
        assert len(self.follower.tree) == len(self.hbm) == self.num_pages()
        return {node.key for node in self.follower.tree}

    def num_pages(self) -> int:
        """The number of pages by SGLang's own count."""
        return int(self.cache.evictable_size() + self.cache.protected_size()) // PAGE


@pytest.fixture(params=["rust", "python"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(request.param)


def keys_of(tokens: Sequence[int], namespace: Namespace = NAMESPACES[0]) -> set[BlockKey]:
    return set(page_keys(tokens, PAGE, namespace))


A, B, C = list(range(0, 12)), list(range(12, 20)), list(range(20, 28))


def test_splits_and_branches_are_reported_by_keys(engine: Engine) -> None:
    engine.insert(A + B)
    engine.insert(A + C)  # splits a node, which is no event
    assert engine.tell() == keys_of(A + B) | keys_of(A + C)
    engine.insert(A + B + C)
    engine.insert(B)
    assert engine.tell() == keys_of(A + B + C) | keys_of(A + C) | keys_of(B)
    assert engine.report.stats().left_out == 0


@pytest.mark.parametrize("namespace", NAMESPACES, ids=str)
def test_namespace_is_reported_by_its_own_keys(engine: Engine, namespace: Namespace) -> None:
    engine.insert(A, namespace)
    engine.insert(A + B, namespace)
    engine.insert(A)
    assert engine.tell() == keys_of(A + B, namespace) | keys_of(A)


def test_evictions_and_a_flush_are_reported(engine: Engine) -> None:
    engine.insert(A + B)
    engine.insert(C)
    engine.tell()
    engine.evict(len(A + B))
    engine.tell()
    engine.cache.reset()
    assert engine.tell() == set()
    engine.insert(A)
    assert engine.tell() == keys_of(A)


@pytest.mark.parametrize("seed", range(12))
def test_pool_holds_what_the_radix_cache_holds(engine: Engine, seed: int) -> None:
    """Random chains, branches, namespaces, evictions and flushes, reported at random moments."""
    rng = random.Random(seed)
    pages = [[page * 10 + i for i in range(PAGE)] for page in range(3)]
    for _ in range(60):
        match rng.choices(["insert", "evict", "flush", "tell"], [6, 3, 0.2, 2])[0]:
            case "insert":
                prompt = [token for page in rng.choices(pages, k=rng.randint(1, 6)) for token in page]
                engine.insert(prompt, rng.choice(NAMESPACES))
            case "evict":
                engine.evict(rng.randint(1, 10) * PAGE)
            case "flush":
                engine.cache.reset()
            case "tell":
                engine.tell()
    engine.tell()
    late = CacheFollower()
    late.reset(engine.pool.snapshot())
    assert {node.key for node in late.tree} == {node.key for node in engine.follower.tree}
    assert engine.report.stats().left_out == 0


def stored(names: list[int], parent: int | None, tokens: list[int], **kwargs: Any) -> BlockStored:
    kwargs = {"medium": StorageMedium.GPU, **kwargs}
    return BlockStored(names, parent, tokens, PAGE, None, **kwargs)


def test_blocks_without_a_key_are_counted_with_their_descendants(engine: Engine) -> None:
    report = engine.report
    report.apply([stored([1, 2], None, A[:8]), stored([3], 2, A[:4])])
    report.apply([BlockRemoved([1, 2, 3, 4], medium=StorageMedium.GPU)])
    assert len(engine.hbm) == 0
    assert (report.stats().left_out, report.stats().events) == (3, 3)


def test_events_of_other_media_are_ignored(engine: Engine) -> None:
    engine.insert(A)
    events = engine.cache.take_events()
    (told,) = [event for event in events if isinstance(event, BlockStored)]
    for medium in (StorageMedium.CPU, StorageMedium.DISK, None):
        engine.report.apply([stored(told.block_hashes, None, A, medium=medium)])
        assert len(engine.hbm) == 0
    engine.report.apply(events)
    engine.report.apply([BlockRemoved(told.block_hashes, medium=StorageMedium.CPU)])
    assert len(engine.hbm) == 3


def test_blocks_without_their_extra_key_are_left_out(engine: Engine) -> None:
    """A format of the user's own has hashes of another namespace than the event's."""
    engine.insert(A, NAMESPACES[1])
    for event in engine.cache.take_events():
        if isinstance(event, BlockStored):
            event.lora_name = None
        engine.report.apply([event])
    assert len(engine.hbm) == 0
    assert engine.report.stats().left_out == 3


# ---- in a scheduler


def scheduler_with(linker: Any, publisher: Any, config: str = OURS) -> Any:
    events = SimpleNamespace(
        kv_event_publisher=publisher, kv_events_config=config, send_metrics_from_scheduler=None
    )
    return SimpleNamespace(tree_cache=linker, kv_events_publisher=events)


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The objects that linkers were joined to; the tree cache stands for its linker."""
    joined: list[Any] = []
    linker = SimpleNamespace(report_hbm=joined.append)
    monkeypatch.setattr(pool_hooks, "linker_of", lambda cache: linker if cache else None)
    return joined


def test_sglang_makes_our_publisher_from_our_flag(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.setattr(EventPublisherFactory, "_registry", {})
    hbm_events.register_publisher()
    publisher = EventPublisherFactory.create(OURS, attn_dp_rank=1)
    assert isinstance(publisher, HbmPublisher)
    publisher.publish(KVEventBatch(ts=0.0, events=[]))
    assert publisher.stats() is None
    publisher.join(engine.hbm)
    engine.insert(A)
    publisher.publish(KVEventBatch(ts=0.0, events=engine.cache.take_events()))
    publisher.drain()
    assert publisher.stats() == {"blocks": 3, "events": 2, "left_out": 0}
    publisher.shutdown()
    publisher.shutdown()


def test_publisher_joins_the_pool(joins: list[Any]) -> None:
    publisher = HbmPublisher()
    scheduler = scheduler_with("linker", publisher)
    pool_hooks.join_hbm_events(None, scheduler)
    assert joins == [publisher]
    assert scheduler.kv_events_publisher.send_metrics_from_scheduler.closed
    publisher.shutdown()


@pytest.mark.parametrize(
    ("linker", "config", "is_said"),
    [
        ("linker", '{"publisher": "zmq"}', True),
        ("linker", "", True),
        ("linker", OURS, False),  # another rank publishes
        (None, '{"publisher": "zmq"}', False),
    ],
)
def test_own_event_configuration_of_a_user_is_kept(
    joins: list[Any], caplog: pytest.LogCaptureFixture, linker: Any, config: str, is_said: bool
) -> None:
    caplog.set_level("INFO")
    pool_hooks.join_hbm_events(None, scheduler_with(linker, None, config))
    assert joins == []
    assert ("hbm is not reported" in caplog.text) == is_said


@pytest.mark.parametrize(("config", "ours"), [(OURS, True), ('{"publisher": "zmq"}', False), ("", False)])
def test_only_our_events_carry_the_extra_key(
    monkeypatch: pytest.MonkeyPatch, config: str, ours: bool
) -> None:
    observability = SimpleNamespace(kv_events_config=config)
    monkeypatch.setattr(pool_hooks.pkgutil, "resolve_name", lambda _: lambda: observability)
    scheduler = SimpleNamespace(kv_event_lora_names=None)
    pool_hooks.name_extra_keys(None, scheduler)
    assert isinstance(scheduler.kv_event_lora_names, ExtraKeys) == ours


def test_each_batch_is_published_at_once() -> None:
    published: list[bool] = []
    publisher = HbmPublisher()
    for each in (publisher, None, object()):
        scheduler = scheduler_with("linker", each)
        scheduler.kv_events_publisher.publish_kv_events = lambda: published.append(True)
        pool_hooks.publish_hbm_events(None, scheduler, "batch", "result")
    assert published == [True]
    publisher.shutdown()


def test_every_metric_is_described() -> None:
    assert set(SECTIONS["hbm"]) == {field.name for field in fields(HbmStats)}
