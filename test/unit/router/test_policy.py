"""Who gets the next request."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.ids import Epoch, InstanceId
from memserve.router.instance import Facts, Instance, Pair, Single, Snapshot
from memserve.router.policy import round_robin
from memserve.wire.messages import Role

FACTS = Facts("model", "/model")


def instances(role: Role, count: int) -> list[Instance]:
    return [
        Instance(InstanceId(f"{role}{i}"), Epoch(1), role, f"http://{role}{i}:1", 8998, FACTS)
        for i in range(count)
    ]


def snapshot(num_prefills: int, num_decodes: int, num_colocated: int = 0) -> Snapshot:
    return Snapshot.of(
        [
            *instances(Role.PREFILL, num_prefills),
            *instances(Role.DECODE, num_decodes),
            *instances(Role.COLOCATED, num_colocated),
        ]
    )


def names(snapshot: Snapshot, turns: int) -> list[str]:
    return [str(round_robin(snapshot, turn)) for turn in range(turns)]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((1, 1, 0), ["prefill0+decode0", "prefill0+decode0"]),
        ((2, 1, 0), ["prefill0+decode0", "prefill1+decode0", "prefill0+decode0"]),
        ((1, 2, 0), ["prefill0+decode0", "prefill0+decode1", "prefill0+decode0"]),
        ((0, 0, 2), ["colocated0", "colocated1", "colocated0"]),
        ((1, 1, 1), ["prefill0+decode0", "colocated0", "prefill0+decode0"]),
        ((2, 0, 1), ["colocated0", "colocated0"]),
    ],
)
def test_turns_go_round(counts: tuple[int, int, int], expected: list[str]) -> None:
    assert names(snapshot(*counts), len(expected)) == expected


@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (0, 3)])
def test_half_a_pair_is_no_route(counts: tuple[int, int]) -> None:
    assert round_robin(snapshot(*counts), 7) is None


def test_two_by_two_meets_every_pairing() -> None:
    assert len(set(names(snapshot(2, 2), 4))) == 4


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 50))
def test_each_server_of_a_role_gets_the_same_share(p: int, d: int, c: int, start: int) -> None:
    shot = snapshot(p, d, c)
    turns = (min(p, d) + c) * p * d * 2
    prefills: Counter[str] = Counter()
    decodes: Counter[str] = Counter()
    for turn in range(start * turns, (start + 1) * turns):
        route = round_robin(shot, turn)
        if isinstance(route, Pair):
            prefills[route.prefill.instance_id] += 1
            decodes[route.decode.instance_id] += 1
        else:
            assert isinstance(route, Single)
    assert len(set(prefills.values())) == 1
    assert len(set(decodes.values())) == 1


def test_a_snapshot_keeps_only_those_that_serve_a_model() -> None:
    other = Instance(InstanceId("x"), Epoch(1), Role.COLOCATED, "http://x:1", None, Facts("s3://m:1", "/m"))
    shot = Snapshot.of([*instances(Role.PREFILL, 1), other])
    assert shot.serving("model").all() == tuple(instances(Role.PREFILL, 1))
    assert shot.serving("model:adapter").all() == tuple(instances(Role.PREFILL, 1))
    assert shot.serving("s3://m:1").all() == (other,)
    assert shot.serving("mode").all() == ()
