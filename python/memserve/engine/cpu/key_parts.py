"""How the keys of requests are cut into parts to attend: which in place, which gathered, which together.

Pure planning over the slots in which tokens lie, once per forward pass; every layer follows the
plan. Knows nothing of SGLang, of heads or of bytes. The thresholds were measured on one core of an
x86-64 server with benchmark/bench_attention.py; they change the cost, never the result.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import accumulate, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_RUNS = 4
"""Runs of one request that are attended in place: each costs a kernel call and a place in the merge."""
MIN_RUN_TOKENS = 256
"""Shorter runs are gathered: copying them costs less than a kernel call of their own."""
GATHERED_TOKENS = 1024
"""Gathered at a time: about what is still in the processor's cache when it is attended."""
MIN_PART_TOKENS_PER_QUERY = 4
"""And a part is never much smaller than this: a merge touches every output once per part."""


class KeyRun(NamedTuple):
    """Neighbouring slots of the pool that hold neighbouring tokens of one request."""

    position: int
    """Of its first token, among the tokens that were asked about."""
    slot: int
    tokens: int


@dataclass(frozen=True, slots=True)
class KeyParts:
    """Where the keys of one request lie in the pool, in no order: dense attention needs none."""

    runs: tuple[KeyRun, ...]
    """To be attended in place."""
    pieces: tuple[Tensor, ...]
    """Slots to gather, [tokens] integers each."""


@dataclass(frozen=True, slots=True)
class Gather:
    """Pieces of any requests, padded to one width, that one kernel call attends."""

    requests: Tensor
    """[pieces] int64: the request that each piece belongs to; one may have several."""
    slots: Tensor
    """[pieces * width] integers; padding repeats a slot of the piece."""
    mask: Tensor | None
    """[pieces, 1, 1, width] float32, 0 for a key and -inf for padding; None if there is no padding."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The parts of a decode batch: first the runs in order, then the pieces of the gathers in order."""

    runs: tuple[tuple[int, KeyRun], ...]
    """(request, run)."""
    gathers: tuple[Gather, ...]
    columns: Tensor | None
    """[most parts of a request, requests] int64: each request's parts, by their place in the order,
    or one past the last for none. None if part i is simply all of request i."""


def plan_decode(slots: Sequence[Tensor]) -> DecodePlan:
    """Plan one query for each request over its `slots` ([tokens] integers, at least one)."""
    parts = split_keys(slots, [1] * len(slots))
    runs = tuple((request, run) for request, own in enumerate(parts) for run in own.runs)
    gathers = tuple(group_pieces([(at, piece) for at, own in enumerate(parts) for piece in own.pieces]))
    owners = [request for request, _ in runs]
    owners += [request for gather in gathers for request in gather.requests.tolist()]
    parts_of: list[list[int]] = [[] for _ in slots]
    for part, request in enumerate(owners):
        parts_of[request].append(part)
    if parts_of == [[request] for request in range(len(slots))]:
        return DecodePlan(runs, gathers, None)
    columns = list(zip_longest(*parts_of, fillvalue=len(owners)))
    return DecodePlan(runs, gathers, torch.tensor(columns))


def group_pieces(pieces: Sequence[tuple[int, Tensor]]) -> Iterator[Gather]:
    """Put `pieces` (request, slots) of like length together, padding included within GATHERED_TOKENS."""
    waiting = sorted(pieces, key=lambda piece: len(piece[1]), reverse=True)
    while waiting:
        width = len(waiting[0][1])
        taken = waiting[: max(1, GATHERED_TOKENS // width)]
        waiting = waiting[len(taken) :]
        requests = torch.tensor([request for request, _ in taken])
        lengths = torch.tensor([len(own) for _, own in taken])
        slots = torch.cat([own for _, own in taken])
        mask = None
        if len(slots) < len(taken) * width:
            padding = torch.arange(width) >= lengths[:, None]
            padded = torch.stack([own[0] for _, own in taken])[:, None].repeat(1, width)
            slots = padded.masked_scatter_(~padding, slots).flatten()
            mask = torch.zeros(len(taken), 1, 1, width).masked_fill_(padding[:, None, None], -torch.inf)
        yield Gather(requests, slots, mask)


def split_keys(slots: Sequence[Tensor], num_queries: Sequence[int]) -> list[KeyParts]:
    """Split each request's `slots` ([tokens] integers) into runs to attend in place and pieces to gather.

    num_queries[i] tokens of request i will attend them: the more, the fewer parts are worth while.
    """
    parts = []
    for own, queries, runs in zip(slots, num_queries, find_runs(slots), strict=True):
        smallest = MIN_PART_TOKENS_PER_QUERY * queries
        kept = nlargest(MAX_RUNS, (run for run in runs if run.tokens >= smallest), lambda run: run.tokens)
        kept.sort()
        ends = [0, *(run.position + run.tokens for run in kept)]
        starts = [*(run.position for run in kept), len(own)]
        between = [own[end:start] for end, start in zip(ends, starts, strict=True) if end < start]
        pieces = torch.cat(between).split(max(GATHERED_TOKENS, smallest)) if between else ()
        parts.append(KeyParts(tuple(kept), pieces))
    return parts


def find_runs(slots: Sequence[Tensor]) -> list[list[KeyRun]]:
    """The runs of MIN_RUN_TOKENS or more in each request's `slots` ([tokens] integers), in order."""
    runs: list[list[KeyRun]] = [[] for _ in slots]
    offsets = [0, *accumulate(len(own) for own in slots)]
    if offsets[-1] < MIN_RUN_TOKENS:
        return runs
    flat = torch.cat(list(slots)).numpy()
    begins = np.ones(len(flat) + 1, dtype=bool)
    np.not_equal(flat[1:], flat[:-1] + 1, out=begins[1:-1])
    begins[offsets] = True  # a run ends with its request, and the last one with the last request
    edges = begins.nonzero()[0]
    long = (np.diff(edges) >= MIN_RUN_TOKENS).nonzero()[0]
    for begin, end in zip(edges[long].tolist(), edges[long + 1].tolist(), strict=True):
        request = bisect_right(offsets, begin) - 1
        runs[request].append(KeyRun(begin - offsets[request], int(flat[begin]), end - begin))
    return runs
