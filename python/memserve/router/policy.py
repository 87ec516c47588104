"""Who gets the next request: pure functions of a snapshot. No clock, socket or randomness."""

from __future__ import annotations

from math import gcd, lcm

from memserve.router.instance import Pair, Route, Single, Snapshot


def round_robin(snapshot: Snapshot, turn: int) -> Route | None:
    """The route of request number `turn`, None if there is none.

    Requests cycle over min(prefills, decodes) pairs and the colocated servers; over time each
    server of a role gets the same share, and every pairing comes up.
    """
    num_pairs = min(len(snapshot.prefills), len(snapshot.decodes))
    num_lanes = num_pairs + len(snapshot.colocated)
    if not num_lanes:
        return None
    cycle, lane = divmod(turn, num_lanes)
    if lane >= num_pairs:
        return Single(snapshot.colocated[lane - num_pairs])
    return _pair(snapshot, cycle * num_pairs + lane)


def _pair(snapshot: Snapshot, number: int) -> Pair:
    """Pair `number`; the decodes shift by one when the pattern would repeat with pairings left out."""
    num_prefills, num_decodes = len(snapshot.prefills), len(snapshot.decodes)
    shift = number // lcm(num_prefills, num_decodes) % gcd(num_prefills, num_decodes)
    return Pair(
        snapshot.prefills[number % num_prefills],
        snapshot.decodes[(number + shift) % num_decodes],
    )
