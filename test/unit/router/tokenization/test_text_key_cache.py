"""TextKeyCache: page keys of texts that only the servers tokenize."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.block_keys import BlockKey, page_keys
from memserve.router.field_kinds import ModelLimits
from memserve.router.proxy.validation import read_request
from memserve.router.request import Api
from memserve.router.tokenization import text_key_cache as text_memory
from memserve.router.tokenization.text_key_cache import TextKeyCache
from memserve.router.tokenization.text_keys import BLOCK_TOKENS, BYTES_PER_TOKEN, text_chain

CHUNK = BLOCK_TOKENS * BYTES_PER_TOKEN
PAGE = 16
CALL = read_request(Api.GENERATE, {"text": "x"}, ModelLimits(), "rid")
DENSITIES = (1, 4, 16)
"""Bytes per token: the chunks of a text may differ."""

Text = list[tuple[int, int]]
"""Chunks: number and density."""
texts = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(DENSITIES)), min_size=1, max_size=6)


def written(text: Text) -> bytes:
    return b"".join(bytes([16 * which + density]) * CHUNK for which, density in text)


def pages(text: Text) -> list[BlockKey]:
    """The page keys that a server with a tokenizer reports."""
    ids = [16 * which + density for which, density in text for _ in range(CHUNK // density)]
    return page_keys(ids, PAGE)


def chain(text: Text) -> list[BlockKey]:
    return text_chain(written(text), CALL, None)


class Router:
    """A cache, and the prompts that it has seen."""

    def __init__(self) -> None:
        self.memory = TextKeyCache()
        self.num_asked = 0

    def serve(self, text: Text) -> None:
        self.num_asked += 1
        self.memory.record_request(f"r{self.num_asked}", chain(text), len(written(text)))
        self.memory.record_keys(f"r{self.num_asked}", pages(text))

    def known(self, text: Text) -> list[BlockKey]:
        return list(self.memory.keys_of(chain(text)))


def shared(one: list[BlockKey], other: list[BlockKey]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


@given(texts)
def test_reported_text_is_known_whole(text: Text) -> None:
    router = Router()
    assert router.known(text) == []
    router.serve(text)
    assert router.known(text) == pages(text)


@given(texts, texts)
def test_next_turn_is_known_as_far_as_the_last_turn(first: Text, more: Text) -> None:
    router = Router()
    router.serve(first)
    known = router.known(first + more)
    # What goes on as nothing that was named is known to the end of what was.
    assert known == pages(first)
    router.serve(first + more)
    assert router.known(first + more) == pages(first + more)


@given(texts, texts, texts, texts)
def test_two_texts_tell_how_many_pages_they_share(begin: Text, one: Text, two: Text, three: Text) -> None:
    one, two, three = [(3, 4), *one], [(4, 4), *two], [(5, 4), *three]
    router = Router()
    router.serve(begin + one)
    router.serve(begin + two)
    known = router.known(begin + three)
    assert known == pages(begin + three)[: len(known)]
    assert len(known) == shared(pages(begin + one), pages(begin + two))


def test_part_of_one_text_has_its_share_of_the_pages() -> None:
    router = Router()
    whole: Text = [(i % 3, 4) for i in range(4)]
    router.serve([*whole, *whole])
    assert router.known([*whole, (9, 4)]) == pages(whole)


def test_only_keys_of_requested_texts_are_recorded_and_once() -> None:
    memory, text = TextKeyCache(), [(1, 4)]
    memory.record_keys("stranger", pages(text))
    assert memory.keys_of(chain(text)) == ()
    memory.record_request("r", chain(text), CHUNK)
    memory.record_keys("r", pages(text))
    memory.record_keys("r", [])
    assert list(memory.keys_of(chain(text))) == pages(text)


def test_text_shorter_than_a_chunk_is_not_recorded() -> None:
    memory = TextKeyCache()
    memory.record_request("r", [], 10)
    memory.record_keys("r", pages([(1, 4)]))
    assert len(memory) == 0


def test_cache_is_bounded_and_keeps_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_memory, "MAX_REQUESTED", 3)
    memory = TextKeyCache(max_chunks=4)
    for number in range(10):
        memory.record_request(f"r{number}", chain([(number, 4), (0, 4)]), 2 * CHUNK)
    for number in range(10):
        memory.record_keys(f"r{number}", pages([(number, 4), (0, 4)]))
    assert len(memory) == 4
    assert not memory.keys_of(chain([(6, 4)]))  # the request is forgotten
    assert not memory.keys_of(chain([(7, 4)]))
    assert memory.keys_of(chain([(9, 4)]))
