"""Plans how the keys of requests are divided into parts: attended in place, gathered, or gathered together.

Pure planning over the pool slots of the tokens, once per forward pass; every layer follows the plan.
Knows nothing of SGLang, of heads or of bytes. The thresholds were measured on one core of an x86-64
server with benchmark/bench_attention.py; they change the cost, never the result.
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
"""Most runs of one request that are attended in place: each costs a kernel call and a term of the merge."""
MIN_RUN_TOKENS = 256
"""Shorter runs are gathered: a copy costs less than a kernel call."""
GATHERED_TOKENS = 1024
"""Tokens gathered at a time: about as many as the processor's cache holds until they are attended."""
MIN_PART_TOKENS_PER_QUERY = 4
"""Least tokens of a part per query: a merge reads and writes every output once per part."""


class KeyRun(NamedTuple):
    """Adjacent slots of the pool that hold adjacent tokens of one request."""

    position: int
    """Index of its first token among the request's tokens passed to `split_keys`."""
    slot: int
    tokens: int


@dataclass(frozen=True, slots=True)
class KeyParts:
    """The pool slots of one request's keys, in any order: dense attention needs none."""

    runs: tuple[KeyRun, ...]
    """Attended in place."""
    pieces: tuple[Tensor, ...]
    """Slots to gather, [tokens] integers each."""


@dataclass(frozen=True, slots=True)
class Gather:
    """Pieces of one or more requests, padded to one width, that one kernel call attends."""

    requests: Tensor
    """[pieces] int64: the request of each piece; a request may have several pieces."""
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
    """[most parts of a request, requests] int64: the parts of each request as indices into the order above;
    an index past the last part means no part. None if part i is all of request i."""


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
    """Group `pieces` (request, slots) of similar length; a group with its padding fits GATHERED_TOKENS."""
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

    num_queries[i] tokens of request i will attend them: more queries make fewer, larger parts.
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
    begins[offsets] = True  # a run ends where its request ends, and the last run where the last request ends
    edges = begins.nonzero()[0]
    long = (np.diff(edges) >= MIN_RUN_TOKENS).nonzero()[0]
    for begin, end in zip(edges[long].tolist(), edges[long + 1].tolist(), strict=True):
        request = bisect_right(offsets, begin) - 1
        runs[request].append(KeyRun(begin - offsets[request], int(flat[begin]), end - begin))
    return runs
