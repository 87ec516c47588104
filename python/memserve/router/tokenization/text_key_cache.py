"""Learns the page keys of a text's prompt from the instances that tokenized it.

    record_request    rid + the text's keys ──> remembered until the prompt's page keys are reported
    record_keys       rid + page keys ──> for each chunk of the text: the pages that all such texts share
    keys_of           a text's keys ──> the page keys of the part that is known

So the prompt tree is asked with true keys, though the router tokenizes nothing. Where two texts part, their
prompts have shown how many pages they share; until then, a part of a text is taken to have its share of the
tokens. Both maps are bounded, least recently used first. Knows no HTTP. Event loop thread only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from memserve.core.block_keys import BlockKey
from memserve.router.tokenization.text_keys import BLOCK_TOKENS, BYTES_PER_TOKEN

MAX_REQUESTED = 4096


class _RequestedText(msgspec.Struct, frozen=True):
    chain: Sequence[BlockKey]
    num_bytes: int


class _Known(msgspec.Struct):
    """A chunk of text, together with all text before it."""

    keys: Sequence[BlockKey]
    """The page keys of the last reported prompt with this beginning."""
    num_pages: int
    """How many of them belong to this beginning, as far as is known."""
    is_shared: bool = False
    """Another prompt has confirmed the number."""


class TextKeyCache:
    """See the module."""

    def __init__(self, max_chunks: int = 1 << 18) -> None:
        """`max_chunks`: of all texts together; by default about 70 MB with the keys of their pages."""
        self._max_chunks = max_chunks
        self._requested: OrderedDict[str, _RequestedText] = OrderedDict()
        self._known: OrderedDict[BlockKey, _Known] = OrderedDict()

    def __len__(self) -> int:
        """The number of known chunks."""
        return len(self._known)

    def record_request(self, rid: str, chain: Sequence[BlockKey], num_bytes: int) -> None:
        """A prompt of a text of `num_bytes` is sent as request `rid`; `chain` are the text's keys."""
        if chain:
            self._requested[rid] = _RequestedText(chain, num_bytes)
            if len(self._requested) > MAX_REQUESTED:
                self._requested.popitem(last=False)

    def record_keys(self, rid: str, keys: Sequence[BlockKey]) -> None:
        """The prompt of request `rid` has these whole pages. Unknown requests are ignored."""
        requested = self._requested.pop(rid, None)
        if requested is None:
            return
        parting = self._deepest(requested.chain)
        for number, chunk in enumerate(requested.chain, 1):
            known = self._known.pop(chunk, None)
            share = number * BLOCK_TOKENS * BYTES_PER_TOKEN / requested.num_bytes
            now = _Known(keys, int(share * len(keys)))
            if known is not None and number == parting:
                now.num_pages, now.is_shared = _num_common(known.keys, keys), True
            elif known is not None and known.is_shared:
                now.num_pages, now.is_shared = known.num_pages, True
            self._known[chunk] = now
        while len(self._known) > self._max_chunks:
            self._known.popitem(last=False)

    def keys_of(self, chain: Sequence[BlockKey]) -> Sequence[BlockKey]:
        """The page keys of the known part of a text; none if its beginning is not known."""
        number = self._deepest(chain)
        if not number:
            return ()
        known = self._known[chain[number - 1]]
        return known.keys[: known.num_pages]

    def _deepest(self, chain: Sequence[BlockKey]) -> int:
        """How many chunks, from the first, are known."""
        known = self._known
        for number in range(len(chain), 0, -1):
            if chain[number - 1] in known:
                return number
        return 0


def _num_common(one: Sequence[BlockKey], other: Sequence[BlockKey]) -> int:
    """The length of the common beginning of two chains. O(log n): equal keys have equal keys before them."""
    shorter = range(min(len(one), len(other)))
    return bisect_left(shorter, True, key=lambda place: one[place] != other[place])
