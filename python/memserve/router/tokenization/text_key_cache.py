"""Which page keys a text's prompt has, as the instances that tokenized it have told.

    asked      rid + the text's keys ──> remembered until its prompt is named
    named      rid + page keys ──> for each chunk of that text: the pages that every such text begins with
    keys_of    a text's keys ──> the page keys of as much of it as is known

So the prompt tree is asked with true keys, evictions and all, though the router tokenizes nothing. Where two
texts part, their prompts have shown how many pages they share; before that, a part of a text is taken to
have its share of the tokens. Both bounded, the longest unused goes first. Knows no HTTP. Loop thread only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from memserve.core.block_keys import BlockKey
from memserve.router.tokenization.text_keys import BLOCK_TOKENS, BYTES_PER_TOKEN

MAX_CHUNKS = 1 << 18
"""Of all texts together, about 70 MB with the keys of their pages."""
MAX_ASKED = 4096


class _RequestedText(msgspec.Struct, frozen=True):
    chain: Sequence[BlockKey]
    num_bytes: int


class _Known(msgspec.Struct):
    """A chunk of text, and with it all that comes before it."""

    keys: Sequence[BlockKey]
    """Of the prompt that was named last with this beginning."""
    num_pages: int
    """How many of them this beginning has, as far as is known."""
    is_shared: bool = False
    """Another prompt has confirmed it."""


class TextKeyCache:
    """See the module."""

    def __init__(self, max_chunks: int = MAX_CHUNKS) -> None:
        self._max_chunks = max_chunks
        self._asked: OrderedDict[str, _RequestedText] = OrderedDict()
        self._known: OrderedDict[BlockKey, _Known] = OrderedDict()

    def __len__(self) -> int:
        """Chunks that are known."""
        return len(self._known)

    def asked(self, rid: str, chain: Sequence[BlockKey], num_bytes: int) -> None:
        """A prompt of this text goes out under that name."""
        if chain:
            self._asked[rid] = _RequestedText(chain, num_bytes)
            if len(self._asked) > MAX_ASKED:
                self._asked.popitem(last=False)

    def named(self, rid: str, keys: Sequence[BlockKey]) -> None:
        """The prompt of that name has these whole pages. One that nobody asked for is left out."""
        asked = self._asked.pop(rid, None)
        if asked is None:
            return
        parting = self._deepest(asked.chain)
        for number, chunk in enumerate(asked.chain, 1):
            known = self._known.pop(chunk, None)
            share = number * BLOCK_TOKENS * BYTES_PER_TOKEN / asked.num_bytes
            now = _Known(keys, int(share * len(keys)))
            if known is not None and number == parting:
                now.num_pages, now.is_shared = _num_common(known.keys, keys), True
            elif known is not None and known.is_shared:
                now.num_pages, now.is_shared = known.num_pages, True
            self._known[chunk] = now
        while len(self._known) > self._max_chunks:
            self._known.popitem(last=False)

    def keys_of(self, chain: Sequence[BlockKey]) -> Sequence[BlockKey]:
        """The page keys of a text as far as it is known; none if its beginning is not."""
        number = self._deepest(chain)
        if not number:
            return ()
        known = self._known[chain[number - 1]]
        return known.keys[: known.num_pages]

    def _deepest(self, chain: Sequence[BlockKey]) -> int:
        """How many chunks of it, from the first, are known."""
        known = self._known
        for number in range(len(chain), 0, -1):
            if chain[number - 1] in known:
                return number
        return 0


def _num_common(one: Sequence[BlockKey], other: Sequence[BlockKey]) -> int:
    """How many keys two chains begin with alike: keys chain, so one that is equal has equals before it."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
