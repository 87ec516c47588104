"""Cache events of workers that name blocks by 64 bits, as SGLang's own do, turned into the tree's.

    BlockStored(hashes, parent, token ids, salt)  ──>  Stored(keys)   as far as the keys are certain
    BlockRemoved(hashes)                          ──>  Removed(keys)

A key is known from a prompt that came by, or computed from the event's own tokens, and then has to have
the event's name. SGLang leaves an `extra_key` without a salt out of its names: such blocks pass for
those of nobody's namespace, which costs a miss.
Two keys of one name are noticed, and neither is stored from then on, while both are removed: a worker
seems to have less than it has, never what it has not. That holds while what is in the tree is
remembered here, so this has to be the larger of the two.
Knows no sockets and no instances. Loop thread only. Source: SGLang 0.5.23,
disaggregation/kv_events.py, mem_cache/utils.py (compute_node_event_hash_values).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import NamedTuple

from memserve.core.block_addr import Tier
from memserve.core.block_keys import BlockKey, Namespace, continue_keys, event_hash, page_keys
from memserve.core.cache_events import Removed, Stored

_SALT_TAG = b"sglang-cache-salt-v1\0"


class _Named(NamedTuple):
    """A block that has a name."""

    key: BlockKey
    link: BlockKey
    """What the name is of, and the names of the blocks after it: the key, unless there is a salt."""


class EventHashKeys:
    """Keys by their 64-bit names: those that were of use lately."""

    def __init__(self, max_keys: int) -> None:
        """Between half of `max_keys` and all of them are remembered. Raises ValueError if it is below 2."""
        if max_keys < 2:
            raise ValueError(f"at least two keys, not {max_keys}")
        self._max_young = max_keys // 2
        self._young: dict[int, _Named] = {}
        self._old: dict[int, _Named] = {}
        self._ambiguous: dict[int, set[BlockKey]] = {}

    def __len__(self) -> int:
        """Keys that are remembered."""
        return len(self._young) + sum(1 for name in self._old if name not in self._young)

    @property
    def num_ambiguous(self) -> int:
        """Names that are not believed any more."""
        return len(self._ambiguous)

    def know(self, keys: Iterable[BlockKey]) -> None:
        """These exist: of a prompt that came by, or that an event told of."""
        young = self._young
        for key in keys:
            name = event_hash(key)
            named = young.get(name)
            if named is None or named[0] != key:
                self._know(name, key, key)
                young = self._young

    def key_of(self, name: int) -> BlockKey | None:
        """The key of that name; None if none, or more than one, is known."""
        named = self._of(name)
        return None if named is None else named.key

    def stored(
        self,
        sequence: int,
        tier: Tier,
        parent: int | None,
        names: Sequence[int],
        token_ids: Sequence[int] = (),
        cache_salt: str | None = None,
    ) -> Stored:
        """The event in the tree's words, with as many of its blocks, from the front, as are certain.

        `token_ids`: of all blocks, or none. An event of which nothing is certain has no keys, and keeps
        its place in the sequence. Never raises for what a worker sent.
        """
        above = None if parent is None else self._of(parent)
        if parent is not None and above is None:
            return Stored(sequence, tier, None, ())
        computed, links = _computed(above, names, token_ids, cache_salt)
        keys: list[BlockKey] = []
        for i, name in enumerate(names):
            is_known = i < len(links) and event_hash(links[i]) == name
            named = self._know(name, computed[i], links[i]) if is_known else self._of(name)
            if named is None:
                break
            keys.append(named.key)
        return Stored(sequence, tier, None if above is None else above.key, tuple(keys))

    def removed(self, sequence: int, tier: Tier, names: Sequence[int]) -> Removed:
        """The event in the tree's words: of a name that is not certain, every key that has it."""
        keys: list[BlockKey] = []
        for name in names:
            key = self.key_of(name)
            keys += self._ambiguous.get(name, ()) if key is None else (key,)
        return Removed(sequence, tier, tuple(keys))

    def _know(self, name: int, key: BlockKey, link: BlockKey) -> _Named | None:
        """What the name means from now on."""
        named = self._young.get(name) or self._old.get(name) or _Named(key, link)
        if name in self._ambiguous:
            self._ambiguous[name].add(key)
        elif named.key != key:
            self._ambiguous[name] = {named.key, key}
        else:
            self._remember(name, named)
            return named
        return None

    def _of(self, name: int) -> _Named | None:
        if name in self._ambiguous:
            return None
        named = self._young.get(name)
        if named is None:
            named = self._old.get(name)
            if named is not None:
                self._remember(name, named)
        return named

    def _remember(self, name: int, named: _Named) -> None:
        if len(self._young) >= self._max_young and name not in self._young:
            self._old, self._young = self._young, {}
        self._young[name] = named


def _computed(
    above: _Named | None, names: Sequence[int], token_ids: Sequence[int], cache_salt: str | None
) -> tuple[Sequence[BlockKey], Sequence[BlockKey]]:
    """The keys that blocks of these tokens have, and their links; none if they are no blocks."""
    page_tokens, rest = divmod(len(token_ids), max(1, len(names)))
    if rest or not page_tokens:
        return (), ()
    try:
        if above is not None:
            keys = continue_keys(above.key, token_ids, page_tokens)
            if above.link == above.key:
                return keys, keys
            return keys, continue_keys(above.link, token_ids, page_tokens)
        if not cache_salt:
            keys = page_keys(token_ids, page_tokens)
            return keys, keys
        seed = BlockKey(sha256(_SALT_TAG + cache_salt.encode()).digest())
        keys = page_keys(token_ids, page_tokens, Namespace(cache_salt=cache_salt))
        return keys, continue_keys(seed, token_ids, page_tokens)
    except ValueError:
        return (), ()
