"""Turns cache events that name blocks by 64-bit hashes, as stock SGLang's do, into the tree's events.

    BlockStored(hashes, parent, token ids, salt)  ──>  Stored(keys)   as far as the keys are certain
    BlockRemoved(hashes)                          ──>  Removed(keys)

A key is known from an earlier prompt, or computed from the event's tokens (`core.event_hashes`). SGLang
leaves an `extra_key` without a salt out of its hashes: such blocks pass for blocks without a namespace,
which costs a miss.
If two keys have the same hash, neither is stored from then on and both are removed: a worker may seem to
hold less than it holds, never more. This needs every block of the tree to be remembered here, so
`max_keys` has to exceed the blocks in the tree. Knows no sockets and no instances. Event loop thread only.
Source: SGLang 0.5.23, disaggregation/kv_events.py, mem_cache/utils.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, Namespace, event_hash
from memserve.core.cache_events import Removed, Stored
from memserve.core.event_hashes import EventBlock, blocks_of_event


class EventHashKeys:
    """The keys used lately, by event hash."""

    def __init__(self, max_keys: int) -> None:
        """Remembers between half of `max_keys` and all of them. Raises ValueError if it is below 2."""
        if max_keys < 2:
            raise ValueError(f"max_keys is at least 2, not {max_keys}")
        self._max_young = max_keys // 2
        self._young: dict[int, EventBlock] = {}
        self._old: dict[int, EventBlock] = {}
        self._ambiguous: dict[int, set[BlockKey]] = {}

    def __len__(self) -> int:
        """The number of remembered keys."""
        return len(self._young) + sum(1 for each in self._old if each not in self._young)

    @property
    def num_ambiguous(self) -> int:
        """The number of hashes that several keys share."""
        return len(self._ambiguous)

    def add(self, keys: Iterable[BlockKey]) -> None:
        """Remember the keys of a prompt."""
        young = self._young
        for key in keys:
            hashed = event_hash(key)
            known = young.get(hashed)
            if known is None or known[0] != key:
                self._add(hashed, key, key)
                young = self._young

    def key_of(self, hashed: int) -> BlockKey | None:
        """The key of an event hash; None if no key, or more than one, is known."""
        block = self._find(hashed)
        return None if block is None else block.key

    def stored(
        self,
        sequence: int,
        tier: Tier,
        parent: int | None,
        hashes: Sequence[int],
        token_ids: Sequence[int] = (),
        cache_salt: str | None = None,
    ) -> Stored:
        """The tree's event, with as many of the blocks, from the front, as have certain keys.

        `token_ids`: of all blocks, or empty. If no block is certain, the event has no keys and keeps its
        place in the sequence. Never raises for what a worker sent.
        """
        above = None if parent is None else self._find(parent)
        if parent is not None and above is None:
            return Stored(sequence, tier, None, ())
        computed = blocks_of_event(hashes, token_ids, above, Namespace(cache_salt=cache_salt))
        keys: list[BlockKey] = []
        for i, hashed in enumerate(hashes):
            block = self._add(hashed, *computed[i]) if i < len(computed) else self._find(hashed)
            if block is None:
                break
            keys.append(block.key)
        return Stored(sequence, tier, None if above is None else above.key, tuple(keys))

    def removed(self, sequence: int, tier: Tier, hashes: Sequence[int]) -> Removed:
        """The tree's event; an ambiguous hash removes every key that has it."""
        keys: list[BlockKey] = []
        for hashed in hashes:
            key = self.key_of(hashed)
            keys += self._ambiguous.get(hashed, ()) if key is None else (key,)
        return Removed(sequence, tier, tuple(keys))

    def _add(self, hashed: int, key: BlockKey, link: BlockKey) -> EventBlock | None:
        """Remember a block under its hash; None if the hash is ambiguous."""
        block = self._young.get(hashed) or self._old.get(hashed) or EventBlock(key, link)
        if hashed in self._ambiguous:
            self._ambiguous[hashed].add(key)
        elif block.key != key:
            self._ambiguous[hashed] = {block.key, key}
        else:
            self._remember(hashed, block)
            return block
        return None

    def _find(self, hashed: int) -> EventBlock | None:
        if hashed in self._ambiguous:
            return None
        block = self._young.get(hashed)
        if block is None:
            block = self._old.get(hashed)
            if block is not None:
                self._remember(hashed, block)
        return block

    def _remember(self, hashed: int, block: EventBlock) -> None:
        if len(self._young) >= self._max_young and hashed not in self._young:
            self._old, self._young = self._young, {}
        self._young[hashed] = block
