"""Odd values of all fields, from a fixed seed, sent to a pair: no server ends and no other request waits.

`make fuzz` sends as many as its time allows, also to a colocated server, and compares the two.
"""

from __future__ import annotations

import random

import pytest

from memserve.router.sglang_api import In, fields_of

from ..fuzz.harm import run
from ..fuzz.values import draw
from .conftest import Pair

ROWS = [(where, name) for where in In for name, _ in fields_of(where)]


@pytest.mark.parametrize("seed", [1])
def test_odd_values_of_every_field_do_no_harm(pair: Pair, seed: int) -> None:
    rng = random.Random(seed)
    requests = [draw(rng, name, where) for where, name in ROWS]

    def find_ended(_: bool) -> str | None:
        ended = [name for name, server in pair.cluster.servers.items() if server.status is not None]
        return ", ".join(ended) or None

    tally = run(pair.url, requests, find_ended)
    assert not tally.harms, [harm.line() for harm in tally.harms]
    assert tally.num_ordinary > 20
    assert tally.statuses["200"] > 20
    assert tally.statuses["400"] > 20
    pair.wait_idle()
