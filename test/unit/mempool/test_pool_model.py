"""MemPool against plain dicts: every invariant of its contract, after every step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from memserve.core.block_addr import BlockAddr, Tier, slot_of, tier_of
from memserve.core.errors import BlockStateError, OutOfBlocks
from memserve.mempool.leases import Lease
from memserve.mempool.records import Match
from memserve.testing.cache_follower import CacheFollower

from .harness import LAYOUT, FakeDevice, content, keys_of
from .pool_model import MAX_SLOTS, NUM_SLOTS, HeldLease, PoolModel

prompts = st.lists(st.integers(0, 1), min_size=1, max_size=6)
picks = st.integers(0, 99)
few = st.integers(0, 4)


class PoolMachine(PoolModel):
    """The rules of a pool with DRAM alone."""

    # ---- memory

    @rule(num_blocks=few | st.integers(0, NUM_SLOTS + 1))
    def alloc(self, num_blocks: int) -> None:
        evictions = self.expect_taking(num_blocks)
        if evictions is None:
            with pytest.raises(OutOfBlocks) as caught:
                self.pool.alloc_mem(num_blocks)
            expected = (num_blocks, self.num_free(), len(self.cached) - len(self.pinned()))
            assert (caught.value.wanted, caught.value.free, caught.value.evictable) == expected
            return
        addrs = self.pool.alloc_mem(num_blocks)
        assert len(set(addrs)) == num_blocks
        assert not set(addrs) & set(self.private)
        assert all(slot_of(addr) < self.num_slots for addr in addrs)
        self.observe_evictions(evictions)
        assert not set(addrs) & set(self.cached.values()), "a slot has one owner"
        assert not set(addrs) & set(self.dropped)
        self.private |= dict.fromkeys(addrs, False)
        self.everyone += addrs

    @rule(kept=few)
    def free(self, kept: int) -> None:
        self.give_back(sorted(self.private)[kept:])

    def give_back(self, addrs: Sequence[BlockAddr]) -> None:
        self.pool.free_mem(addrs)
        for addr in addrs:
            del self.private[addr]

    @precondition(lambda self: self.everyone)
    @rule(data=st.data())
    def free_what_is_not_ours(self, data: st.DataObject) -> None:
        addr = data.draw(st.sampled_from(self.everyone))
        others = sorted(self.private)[:1]
        batch = [*others, addr, BlockAddr(addr ^ 1 << 40)] if addr in self.private else [*others, addr]
        for verb in (self.pool.free_mem, self.pool.seal):
            with pytest.raises(BlockStateError):
                verb(batch)

    @rule(num_slots=st.integers(1, MAX_SLOTS))
    def resize(self, num_slots: int) -> None:
        reached, evictions = self.expect_resizing(num_slots)
        fixed = self.fixed()
        assert self.pool.resize(num_slots) == reached == self.pool.arena.num_slots
        self.num_slots = reached
        self.observe_evictions(evictions)
        tree = self.pool._dram.cache.index.tree
        first = self.pool._dram.first
        for prompt, addr in self.cached.items():
            node = tree.get(keys_of(prompt)[-1])
            assert node is not None
            assert node.payload < reached
            assert addr not in fixed or node.payload == slot_of(addr), "a leased block stays"
            self.cached[prompt] = BlockAddr(first + node.payload)

    # ---- index

    @rule(prompt=prompts)
    def store(self, prompt: list[int]) -> None:
        self.store_some(prompt, 0, finished=True)

    @rule(pick=picks, tail=prompts)
    def store_a_longer_one(self, pick: int, tail: list[int]) -> None:
        """Store a prompt that begins with a cached one, as a conversation does."""
        head = self.pick(pick) if self.cached else ()
        self.store_some([*head, *tail], len(head), finished=True)

    @rule(prompt=prompts, start=st.integers(0, 5), finished=st.booleans())
    def store_some(self, prompt: list[int], start: int, finished: bool) -> None:
        """Insert a chain, from its root or from a parent; sometimes before its bytes are complete."""
        start = min(start, len(prompt) - 1)
        keys = keys_of(prompt)
        wanted, parent = keys[start:], keys[start - 1] if start else None
        if self.expect_taking(len(wanted)) is None:
            return
        before = set(self.private)
        self.alloc(len(wanted))
        addrs = [addr for addr in self.everyone[-len(wanted) :] if addr not in before]
        for key, addr in zip(wanted, addrs, strict=True):
            self.pool.block(addr)[:] = content(key)
        if not finished:
            with pytest.raises(BlockStateError, match="not sealed"):
                self.pool.insert(wanted, addrs, parent)
            self.give_back(addrs)
            return
        self.pool.seal(addrs)
        inserted = self.pool.insert(wanted, addrs, parent)
        assert [*inserted.duplicates, *inserted.new, *inserted.orphans] == addrs
        known = max(0, self.depth(prompt) - start)
        is_orphan = start > 0 and tuple(prompt[:start]) not in self.cached
        assert len(inserted.duplicates) == (0 if is_orphan else known)
        assert len(inserted.orphans) == (len(addrs) if is_orphan else 0)
        self.private |= dict.fromkeys(addrs, True)
        for i, addr in enumerate(inserted.new, start + len(inserted.duplicates)):
            self.cached[tuple(prompt[: i + 1])] = addr
            del self.private[addr]
        if inserted.new:
            with pytest.raises(BlockStateError):
                self.pool.insert(wanted, addrs, parent)
        else:
            assert self.pool.insert(wanted, addrs, parent) == inserted, "idempotent"
        self.give_back([*inserted.duplicates, *inserted.orphans])

    @rule(prompt=prompts)
    def match(self, prompt: list[int]) -> None:
        depth = self.reach(prompt)
        match = self.pool.match(keys_of(prompt))
        assert list(match.addrs) == [self.where(tuple(prompt[: i + 1])) for i in range(depth)]
        assert self.pool.num_cached(keys_of(prompt)) == depth == len(match)

    @precondition(lambda self: self.held)
    @rule(rarely=st.integers(0, 9))
    def clear(self, rarely: int) -> None:
        if rarely:
            return
        expected = self.expect_clearing()
        assert self.pool.clear() == expected

    def expect_clearing(self) -> int:
        count = len(self.cached)
        self.drop(set(self.cached))
        return count

    # ---- between HBM and DRAM

    @rule(prompt=prompts, start=st.integers(0, 5))
    def swap_out(self, prompt: list[int], start: int) -> None:
        """Swap out a chain, from its root or from a parent."""
        start = min(start, len(prompt) - 1)
        keys, device = keys_of(prompt), FakeDevice(self.pool)
        pages, parent = device.write(keys[start:]), keys[start - 1] if start else None
        known = max(0, self.depth(prompt) - start)
        lacking = len(pages) - known
        evictions = self.expect_taking(lacking) if lacking else 0
        if evictions is None:
            with pytest.raises(OutOfBlocks):
                self.pool.swap_out(keys[start:], device, pages, parent)
            self.observe_evictions(0)
            return
        copied = self.pool.swap_out(keys[start:], device, pages, parent)
        self.observe_evictions(evictions)
        assert device.packed == pages[known:], "DRAM has the others"
        before = tuple(prompt[: start + known])
        if before and before not in self.cached:
            assert copied is None
            return
        assert copied == lacking
        tree, first = self.pool._dram.cache.index.tree, self.pool._dram.first
        for i in range(start + known, len(prompt)):
            node = tree.get(keys[i])
            assert node is not None
            self.cached[tuple(prompt[: i + 1])] = BlockAddr(first + node.payload)

    @precondition(lambda self: any(len(held.lease) for held in self.held))
    @rule(pick=picks)
    def swap_in(self, pick: int) -> None:
        """Load leased blocks of DRAM, even if they are not cached any more."""
        leases = [held.lease for held in self.held if len(held.lease)]
        lease = leases[pick % len(leases)]
        if {tier_of(addr) for addr in lease.addrs} != {Tier.DRAM}:
            return
        device, layers = FakeDevice(self.pool), list[int]()
        expected = [bytes(self.pool.block(addr)) for addr in lease.addrs]
        self.pool.swap_in([lease], device, range(len(lease)), layers.append)
        assert layers == list(range(LAYOUT.num_layers))
        assert list(device.pages.values()) == expected

    # ---- leases

    @precondition(lambda self: self.cached)
    @rule(pick=picks, extra=st.lists(st.integers(0, 1), max_size=2))
    def acquire_what_is_there(self, pick: int, extra: list[int]) -> None:
        self.acquire([*self.pick(pick), *extra], 0, stale=False)

    def pick(self, pick: int) -> tuple[int, ...]:
        return sorted(self.cached)[pick % len(self.cached)]

    @rule(prompt=prompts, start=st.integers(0, 5), stale=st.booleans())
    def acquire(self, prompt: list[int], start: int, stale: bool) -> None:
        start = min(start, len(prompt) - 1)
        keys = keys_of(prompt)[start:]
        match = self.pool.match(keys)
        if stale:
            match = Match(keys, [], len(keys))
        self.hold(self.pool.acquire(match), prompt, start)

    def hold(self, lease: Lease, prompt: list[int], start: int) -> None:
        depth = self.depth(prompt) if tuple(prompt[: start + 1]) in self.cached else start
        assert list(lease.addrs) == [self.cached[tuple(prompt[: i + 1])] for i in range(start, depth)]
        pinned = [tuple(prompt[: i + 1]) for i in range(depth)] if len(lease) else []
        self.held.append(HeldLease(lease, pinned, {self.cached[one] for one in pinned}))

    @precondition(lambda self: self.held)
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        self.release_one(pick)

    def release_one(self, pick: int) -> None:
        held = self.held.pop(pick % len(self.held))
        self.pool.release(held.lease)
        with pytest.raises(BlockStateError):
            self.pool.release(held.lease)
        for addr in held.addrs & set(self.dropped):
            self.dropped[addr] -= 1
            if not self.dropped[addr]:
                del self.dropped[addr]

    @precondition(lambda self: any(held.pinned for held in self.held))
    @rule(pick=picks, bit=st.integers(0, 8 * 64 - 1))
    def flip_a_bit(self, pick: int, bit: int) -> None:
        leases = [held for held in self.held if len(held.lease) and held.pinned]
        held = leases[pick % len(leases)]
        prompt = held.pinned[-1]
        addr = self.cached[prompt]
        if addr != held.lease.addrs[-1]:  # its last blocks were dropped before
            return
        self.pool.block(addr)[bit // 8] ^= 1 << bit % 8
        assert self.pool.verify(held.lease) == len(held.lease) - 1
        self.corruptions += 1
        self.drop({one for one in self.cached if one[: len(prompt)] == prompt})

    # ---- reservations

    @rule(num_blocks=few)
    def reserve(self, num_blocks: int) -> None:
        evictions = self.expect_taking(num_blocks)
        if evictions is None:
            with pytest.raises(OutOfBlocks):
                self.pool.reserve(num_blocks)
            return
        reservation = self.pool.reserve(num_blocks)
        self.observe_evictions(evictions)
        self.reserved[reservation.reservation_id] = reservation
        self.everyone += reservation.addrs

    @precondition(lambda self: self.reserved)
    @rule(pick=picks, end=st.sampled_from(["commit", "cancel", "quarantine"]))
    def end_a_reservation(self, pick: int, end: str) -> None:
        reservation = self.reserved.pop(sorted(self.reserved)[pick % len(self.reserved)])
        getattr(self.pool, end)(reservation)
        if end == "commit":
            self.private |= dict.fromkeys(reservation.addrs, False)
        if end == "quarantine":
            self.quarantined[reservation.reservation_id] = reservation
        for verb in (self.pool.commit, self.pool.cancel, self.pool.quarantine):
            with pytest.raises(BlockStateError):
                verb(reservation)

    @precondition(lambda self: self.quarantined)
    @rule()
    def settle(self) -> None:
        _, reservation = self.quarantined.popitem()
        self.pool.settle(reservation)
        with pytest.raises(BlockStateError):
            self.pool.settle(reservation)

    # ---- events

    @rule()
    def follow(self) -> None:
        events = self.pool.take_events()
        if len(events) > 1:
            assert not self.follower.apply(events[-1]), "gaps are always noticed"
        assert all(self.follower.apply(event) for event in events)
        assert {node.key: node.payload for node in self.follower.tree} == self.tiers_of_keys()

    @rule()
    def join_late(self) -> None:
        late = CacheFollower()
        late.reset(self.pool.snapshot())
        assert {node.key: node.payload for node in late.tree} == self.tiers_of_keys()
        for event in self.pool.take_events():
            assert late.apply(event), "older events are in the snapshot"
            assert self.follower.apply(event)
        assert late.sequence == self.follower.sequence
        parents = [
            {node.key: node.parent and node.parent.key for node in one.tree} for one in (late, self.follower)
        ]
        assert parents[0] == parents[1]

    # ---- after every step

    @invariant()
    def the_states_add_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        stats = self.pool.stats()
        waiting = sum(len(one.addrs) for one in self.quarantined.values())
        assert stats.free == self.num_free()
        assert stats.private == len(self.private)
        assert stats.cached == len(self.cached)
        assert stats.reserved == sum(len(one.addrs) for one in self.reserved.values())
        assert stats.quarantined == waiting + len(self.dropped)
        states = (stats.free, stats.private, stats.cached, stats.reserved, stats.quarantined)
        assert sum(states) == stats.total == self.num_slots
        assert stats.evictable == len(self.cached) - len(self.pinned())
        assert stats.leases == len(self.held)
        assert stats.reservations == len(self.reserved) + len(self.quarantined)
        assert stats.corruptions == self.corruptions

    @invariant()
    def what_is_cached_is_found_with_its_bytes(self) -> None:
        if not hasattr(self, "pool"):
            return
        for prompt, addr in self.cached.items():
            keys = keys_of(prompt)
            match = self.pool.match(keys)
            assert len(match) == len(keys), "prefix-closed"
            assert match.addrs[-1] == self.where(prompt)
            assert self.pool.block(addr) == content(keys[-1])
        assert len(set(self.cached.values())) == len(self.cached), "a slot has one owner"


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=60, deadline=None, derandomize=True)
