"""Which requests wait for blocks of other pools, and when all ranks let them go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memserve.core.block_keys import BlockKey, Namespace, page_keys
from memserve.core.errors import InvariantViolated
from memserve.engine.fetching import Fetching

PAGE = 4


class Node:
    """Takes fetches, and ends them when told."""

    def __init__(self) -> None:
        self.pool = SimpleNamespace(layout=SimpleNamespace(page_tokens=PAGE))
        self.fetches: list[tuple[Sequence[BlockKey], int, Future[None]]] = []

    def fetch(self, keys: Callable[[], Sequence[BlockKey]], num_reachable: int) -> Future[None]:
        self.fetches.append((keys(), num_reachable, Future()))
        return self.fetches[-1][2]


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def fetching(node: Node) -> Fetching:
    return Fetching(node)  # type: ignore[arg-type]


def request(rid: str, num_tokens: int, cache_salt: str | None = None) -> Any:
    return SimpleNamespace(
        rid=rid, origin_input_ids=list(range(num_tokens)), extra_key=None, cache_salt=cache_salt
    )


def alone(done: torch.Tensor) -> None:
    """One rank has nobody to agree with."""


def test_a_request_waits_until_its_fetch_has_ended(fetching: Fetching, node: Node) -> None:
    one, two = request("one", 9), request("two", 9)
    fetching.begin(one, 0)
    assert fetching.hold([one, two], alone) == [one]
    node.fetches[0][2].set_result(None)
    assert fetching.hold([one, two], alone) == []


def test_no_rank_lets_a_request_go_alone(fetching: Fetching, node: Node) -> None:
    one = request("one", 9)
    fetching.begin(one, 0)
    node.fetches[0][2].set_result(None)
    assert fetching.hold([one], lambda done: done.zero_()) == [one], "another rank is not done"
    assert fetching.hold([one], alone) == []


@pytest.mark.parametrize(
    ("num_tokens", "num_reachable_tokens", "num_wanted"),
    [(9, 0, 2), (8, 0, 1), (9, 4, 2), (9, 8, None), (8, 4, None), (3, 0, None), (1, 0, None)],
)
def test_it_asks_for_whole_pages_and_never_for_the_last_token(
    fetching: Fetching, node: Node, num_tokens: int, num_reachable_tokens: int, num_wanted: int | None
) -> None:
    fetching.begin(request("one", num_tokens, cache_salt="tenant"), num_reachable_tokens)
    if num_wanted is None:
        assert node.fetches == []
    else:
        keys, num_reachable, _ = node.fetches[0]
        namespace = Namespace(None, "tenant")
        assert keys == page_keys(list(range(num_wanted * PAGE)), PAGE, namespace)
        assert num_reachable == num_reachable_tokens // PAGE


def test_a_fetch_that_raises_is_not_passed_over(fetching: Fetching, node: Node) -> None:
    fetching.begin(request("one", 9), 0)
    node.fetches[0][2].set_exception(InvariantViolated("a bug"))
    with pytest.raises(InvariantViolated):
        fetching.hold([], alone)


def test_what_is_not_in_the_queue_any_more_holds_up_nobody(fetching: Fetching, node: Node) -> None:
    fetching.begin(request("gone", 9), 0)
    assert fetching.hold([], alone) == []
    node.fetches[0][2].set_result(None)
    fetching.drain()
    assert fetching.hold([], alone) == []
