"""Pools of one cluster in one process: what is sent home, what is copied, what is fetched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import msgspec
import pytest

from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.caching import CachingMode
from memserve.core.ids import InstanceId, new_epoch
from memserve.core.kv_layout import KVLayout, Part
from memserve.instance.pool_agent import PoolAgent, PoolSettings
from memserve.instance.push_queue import PushTask
from memserve.mempool.arena import Arena
from memserve.mempool.pool import MemPool
from memserve.peering.endpoint import TransferEndpoint
from memserve.testing.cluster import Cluster, wait_for
from memserve.transport.registry import TransportConfig
from memserve.wire.link import ControlClient
from memserve.wire.messages import Role
from memserve.wire.peer_messages import Fetch, Fetched

LAYOUT = KVLayout("model", 2, 4, (Part(2, 8),) * 2, "float32", 4)
NUM_BLOCKS = 32
BOOTSTRAP = "127.0.0.1:4321"
Join = Callable[..., PoolAgent]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A router without servers."""
    with Cluster(tmp_path_factory.mktemp("nodes"), router_flags=("--heartbeat-secs", "0.1")) as cluster:
        yield cluster


@pytest.fixture
def join(cluster: Cluster) -> Iterator[Join]:
    """Makes nodes that know each other; checks at the end that nothing of them has leaked."""
    nodes: list[PoolAgent] = []

    def make(
        role: Role,
        *,
        num_blocks: int = NUM_BLOCKS,
        caching: CachingMode = CachingMode.FULL,
    ) -> PoolAgent:
        settings = PoolSettings(
            instance_id=InstanceId(f"{role}-{len(nodes)}"),
            role=role,
            caching=caching,
            dram_bytes=None,
            router=cluster.control,
            bootstrap=BOOTSTRAP if role is Role.PREFILL else "",
            transport=TransportConfig("tcp"),
        )
        arena = Arena(LAYOUT.block_bytes, num_blocks, max_slots=settings.max_growth * num_blocks)
        endpoint = TransferEndpoint(settings.transport)
        nodes.append(PoolAgent(settings, MemPool(LAYOUT, arena, endpoint.epoch), endpoint))
        known = len(nodes) - 1
        for node in nodes:
            wait_for(
                lambda node=node: node.stats()["members"]["known"] == known, what="members", timeout_s=10
            )
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()
        stats = node.pool.stats()
        assert stats.private == stats.reserved == stats.quarantined == stats.leases == 0


def chain(num_blocks: int, seed: int = 1) -> list[BlockKey]:
    return page_keys([seed] * (num_blocks * LAYOUT.page_tokens), LAYOUT.page_tokens)


def store(node: PoolAgent, keys: Sequence[BlockKey], parent: BlockKey | None = None) -> list[bytes]:
    """Cache random blocks under `keys`; their bytes."""
    addrs = node.pool.alloc_mem(len(keys))
    data = [os.urandom(LAYOUT.block_bytes) for _ in addrs]
    for addr, block in zip(addrs, data, strict=True):
        node.pool.block(addr)[:] = block
    node.pool.seal(addrs)
    assert len(node.pool.insert(keys, addrs, parent).new) == len(keys)
    return data


def read(node: PoolAgent, keys: Sequence[BlockKey]) -> list[bytes]:
    with node.pool.acquire(node.pool.match(keys)) as lease:
        assert node.pool.verify(lease) == len(lease)
        return [bytes(node.pool.block(addr)) for addr in lease.addrs]


def fetch(node: PoolAgent, keys: Sequence[BlockKey]) -> Fetched:
    """Have the node fetch a prompt from the one other node, as a router does; its answer."""
    assert node._peers is not None
    assert node._members is not None
    (source,) = node._members.pools()
    message = Fetch(LAYOUT.digest, tuple(keys), None, source.address, source.epoch, timeout_s=10)
    with closing(ControlClient(node._peers.address.control)) as router:
        answer = router.request(message, timeout_s=10)
    assert isinstance(answer, Fetched)
    return answer


def push(node: PoolAgent, keys: Sequence[BlockKey], parent: BlockKey | None, bootstrap: str | None) -> None:
    """Store blocks that the node has already, which pushes them."""
    assert node.store(keys, NoDevice(), [], parent, bootstrap) == 0


class NoDevice:
    """HBM that must not be read."""

    def pack(self, slots: Sequence[int], pages: object) -> None:
        raise AssertionError("the pool has these blocks")

    def load_layer(self, layer: int, slots: Sequence[int], pages: object) -> None:
        raise AssertionError("nothing is loaded here")


def wait_sent(node: PoolAgent) -> None:
    wait_for(lambda: not node.stats()["outbox"]["waiting"], what="the outbox to be empty", timeout_s=10)


def test_decode_returns_the_pages_of_an_ended_request_that_its_prefill_lacks(join: Join) -> None:
    prefill, decode = join(Role.PREFILL), join(Role.DECODE)
    keys = chain(6)
    prompt = store(prefill, keys[:4])
    answer = store(decode, keys)[4:]
    push(decode, keys, None, BOOTSTRAP)
    wait_sent(decode)
    assert read(prefill, keys) == prompt + answer
    stats = decode.stats()
    assert stats["peers"]["bytes_pushed"] == 2 * LAYOUT.block_bytes
    assert (stats["outbox"]["sent"], stats["outbox"]["blocks"]) == (1, 2)


def test_push_to_a_prefill_without_the_parent_sends_the_whole_chain(join: Join) -> None:
    prefill, decode = join(Role.PREFILL), join(Role.DECODE)
    keys = chain(6)
    data = store(decode, keys)
    push(decode, keys[4:], keys[3], BOOTSTRAP)
    wait_sent(decode)
    assert read(prefill, keys) == data


def test_decode_returns_no_pages_of_a_running_request_or_to_an_unknown_prefill(join: Join) -> None:
    prefill, decode = join(Role.PREFILL), join(Role.DECODE)
    keys = chain(3)
    store(decode, keys)
    push(decode, keys, None, None)
    push(decode, keys, None, "127.0.0.1:9")
    wait_sent(decode)
    assert prefill.pool.stats().cached == 0


def test_pushes_to_a_gone_pool_delay_no_other_push(join: Join) -> None:
    prefill, decode = join(Role.PREFILL), join(Role.DECODE)
    (to,) = decode._members.pools()
    store(decode, chain(3))
    prefill.close()
    wait_for(lambda: decode.stats()["members"]["known"] == 0, what="the prefill to be gone", timeout_s=10)
    for _ in range(5):
        decode._pushes.offer(PushTask(to, chain(3), None))
    wait_for(lambda: not decode.stats()["outbox"]["waiting"], what="them to be given up", timeout_s=2)
    assert decode.stats()["outbox"]["failed"] == 5


def test_pushes_to_a_restarted_pool_reach_its_successor(join: Join) -> None:
    prefill, decode = join(Role.PREFILL), join(Role.DECODE)
    (to,) = decode._members.pools()
    data = store(decode, chain(3))
    before = msgspec.structs.replace(to, epoch=new_epoch(), address="127.0.0.1:9")
    decode._pushes.offer(PushTask(before, chain(3), None))
    wait_sent(decode)
    assert read(prefill, chain(3)) == data


def test_decode_returns_pages_in_mode_full_only(join: Join) -> None:
    prefill = join(Role.PREFILL, caching=CachingMode.BOTH)
    decode = join(Role.DECODE, caching=CachingMode.BOTH)
    keys = chain(3)
    store(decode, keys)
    push(decode, keys, None, BOOTSTRAP)
    wait_sent(decode)
    assert prefill.pool.stats().cached == 0


def test_a_prompt_is_fetched_from_decode_as_far_as_it_goes(join: Join) -> None:
    prefill, decode = join(Role.PREFILL), join(Role.DECODE)
    keys = chain(8)
    data = store(decode, keys[:6])
    head = store(prefill, keys[:2])
    assert fetch(prefill, keys) == Fetched(6, "the holder has no more of it")
    assert read(prefill, keys) == head + data[2:]
    stats = prefill.stats()["peers"]
    assert (stats["fetches"], stats["blocks_fetched"], stats["failures"]) == (1, 4, 0)


def test_a_fetch_without_room_is_a_miss(join: Join) -> None:
    prefill, decode = join(Role.PREFILL, num_blocks=2), join(Role.DECODE)
    keys = chain(6)
    store(decode, keys)
    assert fetch(prefill, keys).num_blocks <= 2
    assert prefill.pool.stats().cached <= 2


def test_a_tier_is_resized_while_it_serves(join: Join) -> None:
    prefill, decode = join(Role.PREFILL), join(Role.DECODE)
    keys = chain(NUM_BLOCKS)
    data = store(decode, keys)
    prefill.resize(2 * NUM_BLOCKS * LAYOUT.block_bytes)
    wait_for(lambda: prefill.pool.stats().total == 2 * NUM_BLOCKS, what="growth", timeout_s=10)
    push(decode, keys, None, BOOTSTRAP)
    wait_sent(decode)
    assert read(prefill, keys) == data
    prefill.resize(8 * LAYOUT.block_bytes)
    wait_for(lambda: prefill.pool.stats().total == 8, what="shrinking", timeout_s=10)
    kept = prefill.pool.stats().cached
    assert 0 < kept <= 8
    assert read(prefill, keys) == data[:kept]
    assert fetch(prefill, keys[:8]).num_blocks == 8
    assert read(prefill, keys[:8]) == data[:8], "decode finds the memory that is left"


@pytest.mark.parametrize(
    ("dram_bytes", "num_ranks", "hbm_blocks", "blocks"),
    [
        (100 * LAYOUT.block_bytes, 1, 7, 100),
        (100 * LAYOUT.block_bytes, 4, 7, 25),
        (1, 1, 7, 1),
        (None, 1, 7, 14),
        (None, 2, 7, 14),
    ],
)
def test_dram_slots_follow_the_size_of_hbm_and_the_free_memory(
    dram_bytes: int | None, num_ranks: int, hbm_blocks: int, blocks: int
) -> None:
    layout = KVLayout("model", 2, 4, LAYOUT.parts, "float32", 4, rank=0, num_ranks=num_ranks)
    settings = PoolSettings(
        InstanceId("a"), Role.COLOCATED, CachingMode.FULL, dram_bytes, None, "", TransportConfig("tcp")
    )
    assert settings.dram_slots(layout, hbm_blocks * layout.block_bytes) == blocks
