"""KvEventSubscriber: published events reach the tree; after lost or malformed messages blocks are dropped."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import zmq.asyncio

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, Namespace, continue_keys, page_keys
from memserve.core.cache_events import Stored
from memserve.core.ids import Epoch, InstanceId
from memserve.router.kv_events.subscriber import PIECE_BLOCKS, KvEventSubscriber, SubscriberTimeouts
from memserve.router.kv_events.zmq_stream import MAX_MESSAGE_BYTES
from memserve.router.server_info import EventSource
from memserve.scheduling.prompt_tree.event_hashes import EventHashKeys
from memserve.scheduling.prompt_tree.records import NO_OVERLAP, Overlap
from memserve.scheduling.prompt_tree.tree import GlobalPromptTree

from .stock_publisher import CLEARED, FakePublisher, packed, removed, stored, until

TOKENS = list(range(12))
KEYS = page_keys(TOKENS, 2)
OTHER_TOKENS = list(range(50, 58))
OTHER = page_keys(OTHER_TOKENS, 2)
STORED = stored(KEYS[:4], TOKENS[:8])
TAIL = stored(KEYS[4:], TOKENS[8:], KEYS[3])
OTHERS = stored(OTHER, OTHER_TOKENS)
ANN = InstanceId("ann")
SOON = SubscriberTimeouts(replay_s=0.2, retry_s=0.0)


@dataclass
class RunningSubscriber:
    publisher: FakePublisher
    tree: GlobalPromptTree
    event_keys: EventHashKeys
    subscriber: KvEventSubscriber

    def depth(self, keys: list[BlockKey]) -> int:
        return self.tree.overlaps(keys).get(ANN, NO_OVERLAP).cached

    async def has(self, keys: list[BlockKey], num_blocks: int) -> None:
        await until(lambda: self.depth(keys) == num_blocks)

    async def heard(self, num_batches: int) -> None:
        await until(lambda: self.subscriber.stats.batches >= num_batches)

    @property
    def forgotten(self) -> Counter[str]:
        return self.subscriber.stats.forgotten


@asynccontextmanager
async def running_subscriber(
    publisher: FakePublisher, timeouts: SubscriberTimeouts = SOON
) -> AsyncIterator[RunningSubscriber]:
    """A subscriber that is connected to its publisher."""
    tree, event_keys, context = GlobalPromptTree(), EventHashKeys(100_000), zmq.asyncio.Context()
    subscriber = KvEventSubscriber(ANN, publisher.source, lambda: tree, event_keys, context, timeouts)
    try:
        await publisher.subscribed()
        yield RunningSubscriber(publisher, tree, event_keys, subscriber)
    finally:
        await asyncio.wait([subscriber.stop()])
        context.destroy(linger=0)
        await publisher.close()


async def test_published_events_reach_the_tree() -> None:
    async with running_subscriber(FakePublisher()) as it:
        await it.publisher.publish(STORED, OTHERS)
        await it.publisher.publish(TAIL)
        await it.has(KEYS, 6)
        await it.publisher.publish(removed(KEYS[:3:-1]), removed(OTHER[:1]))
        await it.has(KEYS, 4)
        assert it.depth(OTHER) == 0, "the descendants of a block leave with it"
        stats = it.subscriber.stats
        assert (stats.connected, stats.complete, stats.batches) == (True, True, 3)
        assert (stats.stored, stats.unverified, it.forgotten) == (10, 0, Counter())
        await it.publisher.publish(STORED, CLEARED, OTHERS)
        await it.has(OTHER, 4)
        assert it.depth(KEYS) == 0


async def test_medium_of_an_event_selects_the_tier() -> None:
    async with running_subscriber(FakePublisher()) as it:
        await it.publisher.publish(
            stored(KEYS, TOKENS, medium="CPU_PINNED"),
            stored(OTHER, OTHER_TOKENS, medium="DISK"),
            stored(KEYS[:2], TOKENS[:4], medium=None),
            removed(KEYS, medium="EXTERNAL"),
        )
        await until(lambda: it.tree.stats().instances[ANN] == (2, 6))
        assert it.tree.overlaps(KEYS) == {ANN: Overlap((2, 6), 6)}
        assert it.depth(OTHER) == 0


async def test_long_event_is_applied_in_pieces_between_which_the_event_loop_runs() -> None:
    tokens = list(range(2 * PIECE_BLOCKS + 2))
    keys = page_keys(tokens, 1)

    async def depths_until(it: RunningSubscriber, num_blocks: int) -> set[int]:
        """The depths that another task sees, which runs once in each turn of the event loop."""
        depths = set[int]()
        async with asyncio.timeout(10):
            while it.depth(keys) != num_blocks:
                depths.add(it.depth(keys))
                await asyncio.sleep(0)
        return depths

    async with running_subscriber(FakePublisher()) as it:
        await it.publisher.publish(stored(keys, tokens))
        assert await depths_until(it, len(keys)) == {0, PIECE_BLOCKS, 2 * PIECE_BLOCKS}
        await it.publisher.publish(removed(keys[:0:-1]))
        assert await depths_until(it, 1) == {len(keys), PIECE_BLOCKS + 2, 2}


async def test_many_messages_leave_the_event_loop_to_other_tasks() -> None:
    async with running_subscriber(FakePublisher()) as it:
        for _ in range(100):
            await it.publisher.publish(*[STORED, removed(KEYS)] * 20)
        num_turns = 0
        while it.subscriber.stats.batches < 100:
            await asyncio.sleep(0)
            num_turns += 1
        assert num_turns > 1000
        assert it.forgotten == Counter()


async def test_late_subscriber_learns_blocks_that_continue_known_prompts() -> None:
    publisher = FakePublisher()
    await publisher.publish(STORED, lost=True)
    async with running_subscriber(publisher) as it:
        await it.publisher.publish(TAIL, OTHERS)
        await it.has(OTHER, 4)
        stats = it.subscriber.stats
        assert (it.depth(KEYS), stats.unverified, stats.complete) == (0, 2, False)
        it.event_keys.add(KEYS[:4])
        it.tree.expect(ANN, KEYS[:5], time.monotonic() + 60)
        await it.publisher.publish(TAIL)
        await until(lambda: it.tree.overlaps(KEYS) == {ANN: Overlap((6, 6), 0)})
        await it.publisher.publish(CLEARED)
        await until(lambda: it.subscriber.stats.complete)


async def test_late_subscriber_receives_earlier_messages_by_replay() -> None:
    publisher = FakePublisher(replays=True)
    await publisher.publish(STORED, lost=True)
    async with running_subscriber(publisher) as it:
        await it.has(KEYS, 4)
        await publisher.publish(TAIL)
        await it.has(KEYS, 6)
        stats = it.subscriber.stats
        assert (stats.replayed, stats.batches, stats.complete) == (1, 2, True)


async def test_gap_without_replay_drops_all_blocks() -> None:
    async with running_subscriber(FakePublisher()) as it:
        await it.publisher.publish(STORED)
        await it.has(KEYS, 4)
        await it.publisher.publish(removed(KEYS), lost=True)
        await it.publisher.publish(OTHERS)
        await it.has(OTHER, 4)
        assert it.depth(KEYS) == 0
        assert it.forgotten == Counter(gap=1)
        await it.publisher.publish(STORED)
        await it.has(KEYS, 4)
        assert it.forgotten == Counter(gap=1)


async def test_replay_fills_a_gap() -> None:
    async with running_subscriber(FakePublisher(replays=True)) as it:
        await it.publisher.publish(STORED)
        await it.has(KEYS, 4)
        await it.publisher.publish(removed(KEYS[3:4]), lost=True)
        await it.publisher.publish(stored(KEYS[3:], TOKENS[6:], KEYS[2]), lost=True)
        for _ in range(3):
            await it.publisher.publish(OTHERS)
        await it.heard(6)
        await it.publisher.publish(removed(OTHER))
        await it.heard(7)
        assert (it.depth(KEYS), it.depth(OTHER)) == (6, 0)
        assert (it.forgotten, it.subscriber.stats.replayed >= 3) == (Counter(), True)


@pytest.mark.parametrize(("answers", "kept"), [(True, False), (False, True)])
async def test_replay_without_the_missing_messages_fills_no_gap(answers: bool, kept: bool) -> None:
    async with running_subscriber(FakePublisher(replays=True, answers=answers)) as it:
        await until(lambda: it.publisher.num_asked == 1)
        await it.publisher.publish(STORED)
        await it.has(KEYS, 4)
        await it.publisher.publish(removed(KEYS), lost=True, kept=kept)
        await it.publisher.publish(OTHERS)
        await it.has(OTHER, 4)
        assert (it.depth(KEYS), it.forgotten) == (0, Counter(gap=1))


async def test_unreachable_replay_socket_delays_events_for_a_short_time_only() -> None:
    publisher, other = FakePublisher(), FakePublisher()
    other.vanish()
    publisher.source = replace(publisher.source, replay=other.source.endpoint)
    async with running_subscriber(publisher, replace(SOON, replay_s=0.5)) as it:
        await it.publisher.publish(STORED)
        await it.has(KEYS, 4)
        await it.publisher.publish(removed(KEYS), lost=True)
        await it.publisher.publish(OTHERS)
        await it.has(OTHER, 4)
        assert (it.depth(KEYS), it.forgotten) == (0, Counter(gap=1))
    await other.close()


async def test_restarted_sequence_drops_the_blocks_of_the_former_process() -> None:
    async with running_subscriber(FakePublisher()) as it:
        for _ in range(3):
            await it.publisher.publish(STORED)
        await it.has(KEYS, 4)
        it.publisher.sequence = 0
        await it.publisher.publish(OTHERS)
        await it.has(OTHER, 4)
        assert (it.depth(KEYS), it.forgotten) == (0, Counter(restart=1))
        assert it.subscriber.stats.complete


@pytest.mark.parametrize("replays", [False, True])
async def test_restarted_worker_is_learned_anew_with_any_sequence_numbers(replays: bool) -> None:
    async with running_subscriber(FakePublisher(replays=replays)) as it:
        await it.publisher.publish(STORED)
        await it.has(KEYS, 4)
        await it.publisher.restart()
        await it.has(KEYS, 0)
        assert it.forgotten == Counter(lost=1)
        await it.publisher.publish(OTHERS, lost=True)
        await it.publisher.subscribed()
        await it.publisher.publish(STORED)
        await it.has(KEYS, 4)
        await until(lambda: it.depth(OTHER) == (4 if replays else 0))


GARBAGE = [
    b"",
    b"\xc1",
    packed(STORED)[:-3],
    msgspec.msgpack.encode({"ts": 1}),
    msgspec.msgpack.encode([1.0]),
    packed(7),
    packed({"type": "BlockMoved"}),
    packed(STORED, {"type": "BlockStored", "block_hashes": "x", "parent_block_hash": None}),
    packed({**STORED, "medium": 3}),
    packed({**STORED, "medium": ["GPU"]}),
    packed({**STORED, "parent_block_hash": 1 << 63})[:-1] + b"\xc1",
    msgspec.msgpack.encode([1.0, [STORED]])[:-1] + b"\xd9\x02\xff\xfe",
    b"\x92\x01" + b"\x91" * 100_000,
    b"\x92\x01\x91\x83\xa4type\xabBlockStored\xa9token_ids" + b"\x91" * 100_000,
    b"\x92\xcb" + bytes(8) + b"\xdd\xff\xff\xff\xff",
]


@pytest.mark.parametrize("payload", GARBAGE)
async def test_malformed_payload_drops_all_blocks_and_later_events_apply(payload: bytes) -> None:
    async with running_subscriber(FakePublisher(replays=True)) as it:
        await it.publisher.publish(STORED)
        await it.has(KEYS, 4)
        await it.publisher.raw(payload)
        await it.publisher.publish(OTHERS)
        await it.has(OTHER, 4)
        assert (it.depth(KEYS), it.forgotten) == (0, Counter(malformed=1))


@pytest.mark.parametrize(
    "frames", [(), (b"",), (b"\0" * 7, b"x"), (b"\xff" * 8, b"x"), (b"\0" * 8, b"x", b"y")]
)
async def test_malformed_frames_drop_all_blocks(frames: tuple[bytes, ...]) -> None:
    async with running_subscriber(FakePublisher()) as it:
        await it.publisher.publish(STORED)
        await it.has(KEYS, 4)
        await it.publisher.frames(b"kv", *frames)
        await it.publisher.publish(OTHERS)
        await it.has(OTHER, 4)
        assert (it.depth(KEYS), it.forgotten) == (0, Counter(malformed=1))


async def test_messages_of_another_topic_are_ignored() -> None:
    async with running_subscriber(FakePublisher()) as it:
        await it.publisher.frames(b"kv2", bytes(8), packed(OTHERS))
        await it.publisher.publish(STORED)
        await it.has(KEYS, 4)
        assert (it.depth(OTHER), it.forgotten) == (0, Counter())


async def test_too_large_message_is_not_read_and_ends_the_connection() -> None:
    async with running_subscriber(FakePublisher()) as it:
        await it.publisher.publish(STORED)
        await it.has(KEYS, 4)
        await it.publisher.raw(bytes(MAX_MESSAGE_BYTES + 1))
        await it.has(KEYS, 0)
        assert it.forgotten == Counter(lost=1)
        await it.publisher.subscribed()
        await it.publisher.publish(OTHERS)
        await it.has(OTHER, 4)


async def test_garbled_messages_never_end_the_subscription() -> None:
    dice = random.Random(7)
    async with running_subscriber(FakePublisher()) as it:
        good = packed(STORED, removed(KEYS[3:]), OTHERS, stored(KEYS, TOKENS, cache_salt="t"), CLEARED)
        for _ in range(1500):
            bad = bytearray(good)
            for _ in range(dice.randint(1, 4)):
                bad[dice.randrange(len(bad))] = dice.randrange(256)
            await it.publisher.raw(bytes(bad[: dice.choice([len(bad), dice.randrange(len(bad))])]))
        await it.publisher.publish(CLEARED, STORED)
        await it.heard(1501)
        assert it.depth(KEYS) == 4
        assert set(it.forgotten) == {"malformed"}


async def test_salt_of_an_event_gives_the_keys_of_salted_blocks() -> None:
    salt = "tenant"
    seed = BlockKey(sha256(b"sglang-cache-salt-v1\0" + salt.encode()).digest())
    links, keys = continue_keys(seed, TOKENS, 2), page_keys(TOKENS, 2, Namespace(cache_salt=salt))
    async with running_subscriber(FakePublisher()) as it:
        await it.publisher.publish(stored(links[:2], TOKENS[:4], cache_salt=salt))
        await it.publisher.publish(stored(links[2:], TOKENS[4:], links[1], cache_salt=salt))
        await it.has(keys, 6)
        assert it.depth(KEYS) == 0
        await it.publisher.publish(removed(links[4:]))
        await it.has(keys, 4)


async def test_unverified_hashes_are_left_out_and_counted() -> None:
    pairs = list(pairwise(TOKENS))
    twin = BlockKey(OTHER[1][:8] + bytes(24))
    async with running_subscriber(FakePublisher()) as it:
        it.event_keys.add([twin])
        await it.publisher.publish(stored(KEYS[:5], pairs[:10]))
        await it.publisher.publish(stored(KEYS, TOKENS, cache_salt="t"))
        await it.publisher.publish(OTHERS)
        await it.heard(3)
        stats = it.subscriber.stats
        assert (it.depth(KEYS), it.depth(OTHER)) == (0, 1), "the hash may mean the twin"
        assert (stats.stored, stats.unverified, it.forgotten) == (1, 14, Counter())


async def test_subscriber_ends_when_another_source_takes_its_name_in_the_tree() -> None:
    async with running_subscriber(FakePublisher()) as it:
        await it.publisher.publish(STORED)
        await it.has(KEYS, 4)
        it.tree.join(ANN, Epoch(5))
        it.tree.apply(ANN, Epoch(5), [Stored(1, Tier.HBM, None, tuple(KEYS[:1]))])
        await it.publisher.publish(OTHERS)
        await until(lambda: it.subscriber.stats.displaced)
        assert (it.depth(KEYS), it.depth(OTHER)) == (1, 0)


async def test_displaced_subscriber_ends_when_its_worker_is_lost() -> None:
    async with running_subscriber(FakePublisher()) as it:
        await until(lambda: it.subscriber.stats.connected)
        it.tree.join(ANN, Epoch(5))
        it.tree.apply(ANN, Epoch(5), [Stored(1, Tier.HBM, None, tuple(KEYS[:1]))])
        await it.publisher.restart()
        await until(lambda: it.subscriber.stats.displaced)
        assert it.depth(KEYS) == 1


async def test_subscriber_waits_for_an_unreachable_worker(caplog: Any) -> None:
    publisher = FakePublisher()
    publisher.vanish()
    timeouts = replace(SOON, connect_s=0.01)
    tree, event_keys, context = GlobalPromptTree(), EventHashKeys(100), zmq.asyncio.Context()
    subscriber = KvEventSubscriber(ANN, publisher.source, lambda: tree, event_keys, context, timeouts)
    await until(lambda: "cannot connect" in caplog.text)
    assert not subscriber.stats.connected
    await publisher.restart()
    await publisher.subscribed()
    await until(lambda: subscriber.stats.connected)
    await asyncio.wait([subscriber.stop()])
    context.destroy(linger=0)
    await publisher.close()


@pytest.mark.parametrize("endpoint", ["tcp://", "nonsense"])
async def test_invalid_endpoint_is_tried_again(endpoint: str) -> None:
    tree, context = GlobalPromptTree(), zmq.asyncio.Context()
    source = EventSource(endpoint, "", None)
    subscriber = KvEventSubscriber(ANN, source, lambda: tree, EventHashKeys(10), context, SOON)
    await until(lambda: subscriber.stats.forgotten["lost"] >= 2)
    assert not subscriber.stats.connected
    await asyncio.wait([subscriber.stop()])
    context.destroy(linger=0)
