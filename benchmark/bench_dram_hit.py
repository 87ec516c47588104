"""Measures whether history in DRAM is worth loading: a hit against computation, by length and cached share.

    python benchmark/bench_dram_hit.py [--quick] [--lengths N ...] [--ratios R ...] [--rounds N]

One real colocated server behind the router, with HBM for little more than the longest prompt. The first
part of each prompt is computed and goes to DRAM; then a filler replaces these parts in HBM, so that each
prompt, sent once, finds its history in DRAM only (the router's tree and the server's answer must agree).
The prompts alternate with new prompts of the same length.

    micro/dram_hit/2048_tokens/computed       ms to the first token, nothing cached
    micro/dram_hit/2048_tokens/90_cached      the same with 90% in DRAM; baseline: computed
      .../90_cached/predicted                 the prediction of the router's cost model; baseline: measured
    micro/dram_hit/2048_tokens/crossing       the least cached share from which on a hit pays
      .../crossing/predicted                  the same by the cost model
    micro/dram_hit/agrees                     share of cells where both agree, or differ little

A crossing of 1 means that no hit pays. The smallest share is one page of 16 tokens.
--quick takes about a minute, the default about two and a half.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import requests

from bench_model import make_model, random_tokens
from figures import progress, report
from memserve.testing.cluster import Cluster, is_ready, wait_for
from memserve.testing.pool_reports import wait_settled
from memserve.wire.messages import Role

PAGE = 16
TIMEOUT_S = 120
LENGTHS, QUICK_LENGTHS = (256, 512, 1024, 2048, 4096), (256, 1024, 4096)
RATIOS, QUICK_RATIOS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9), (0.0, 0.25, 0.5, 0.9)
"""0: a single page."""
SPARE_TOKENS = 256
DRAM_GIB = 3.0
WARM_UP = 24
TIE = 0.03
"""If two ways differ by less, both count as right."""


@dataclass(frozen=True, slots=True)
class History:
    """A prompt whose first pages are in DRAM."""

    tokens: list[int]
    num_cached: int


@dataclass(slots=True)
class Samples:
    """Milliseconds of one cell: measured, and as the router predicted them just before."""

    measured: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", type=Path, help="default: the bench model, made on the spot")
    parser.add_argument("--quick", action="store_true", help="fewer lengths, ratios and rounds")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="of prompts, in tokens")
    parser.add_argument("--ratios", type=float, nargs="+", metavar="R", help="cached shares, below 1")
    parser.add_argument("--rounds", type=int, metavar="N", help="of each cell (default: 7; --quick: 3)")
    args = parser.parse_args()
    lengths = args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS)
    ratios = args.ratios or (QUICK_RATIOS if args.quick else RATIOS)
    rounds = args.rounds or (3 if args.quick else 7)
    if not all(0 <= ratio < 1 for ratio in ratios) or min(lengths) <= 2 * PAGE:
        parser.error(f"ratios are from 0 to below 1, lengths above {2 * PAGE} tokens")
    hbm_tokens = -(-(max(lengths) + SPARE_TOKENS) // PAGE) * PAGE
    with Cluster(Path(tempfile.mkdtemp(prefix="memserve-dram-hit-"))) as cluster:
        flags = ("--max-total-tokens", str(hbm_tokens), "--dram-gib", str(DRAM_GIB))
        cluster.launch("worker", Role.COLOCATED, args.model_path or make_model(), *flags)
        progress(f"starting a server with {hbm_tokens} tokens of HBM and {DRAM_GIB:g} GiB of DRAM")
        cluster.wait_ready()
        wait_for(lambda: is_ready(cluster.url), what="the server")
        bench = Bench(cluster, hbm_tokens)
        bench.warm_up(lengths)
        show(bench.measure(lengths, ratios, rounds))


class Bench:
    """A server with known HBM contents."""

    def __init__(self, cluster: Cluster, hbm_tokens: int) -> None:
        self._url = cluster.url
        self._servers = cluster.server_urls()
        self._hbm_tokens = hbm_tokens
        self._draw = Random(7)

    def warm_up(self, lengths: Sequence[int]) -> None:
        """Send requests from which the router learns the cost of prefills and of loads from DRAM."""
        progress("warming up")
        for number in range(WARM_UP):
            tokens = random_tokens(self._draw, lengths[number % len(lengths)])
            self._generate(tokens)
            self._generate([*tokens[: len(tokens) // 2], *random_tokens(self._draw, len(tokens) // 2)])
        for history in self._stored(lengths, [0.9, 0.5]):
            self._generate(history.tokens)

    def measure(
        self, lengths: Sequence[int], ratios: Sequence[float], rounds: int
    ) -> dict[int, dict[int, Samples]]:
        """By length and tokens cached, 0 for none."""
        cells: dict[int, dict[int, Samples]] = {length: {} for length in lengths}
        for turn in range(rounds):
            progress(f"round {turn + 1} of {rounds}")
            histories = self._stored(lengths, ratios)
            histories += [History(random_tokens(self._draw, length), 0) for length in lengths]
            self._draw.shuffle(histories)
            for history in histories:
                cell = cells[len(history.tokens)].setdefault(history.num_cached, Samples())
                cell.predicted.append(self._predicted_s(history) * 1000)
                cell.measured.append(self._timed_s(history) * 1000)
        return cells

    def _stored(self, lengths: Sequence[int], ratios: Sequence[float]) -> list[History]:
        """Prompts whose first parts are in DRAM only."""
        histories = []
        for length in lengths:
            tokens_cached = {max(1, round(length * ratio / PAGE)) * PAGE for ratio in ratios}
            histories += [History(random_tokens(self._draw, length), each) for each in tokens_cached]
        for history in histories:
            self._generate(history.tokens[: history.num_cached])
        wait_settled(self._servers)
        self._generate(random_tokens(self._draw, self._hbm_tokens - SPARE_TOKENS // 2))
        wait_settled(self._servers)
        for history in histories:
            wait_for(partial(self._is_only_in_dram, history), what="HBM to be full", timeout_s=30)
        return histories

    def _is_only_in_dram(self, history: History) -> bool:
        candidate = self._explain(history.tokens)
        return candidate["hbm_blocks"] == 0 and int(candidate["blocks"]) * PAGE == history.num_cached

    def _predicted_s(self, history: History) -> float:
        candidate = self._explain(history.tokens)
        return float(candidate["load_s"]) + float(candidate["exec_s"])

    def _explain(self, tokens: list[int]) -> dict[str, Any]:
        """The router's view of the only instance."""
        body: Any = {"input_ids": tokens}
        answer = requests.post(f"{self._url}/explain", json=body, timeout=TIMEOUT_S)
        answer.raise_for_status()
        (candidate,) = answer.json()["prefill_candidates"]
        return dict(candidate)

    def _timed_s(self, history: History) -> float:
        taken_s, num_cached = self._generate(history.tokens)
        if num_cached != history.num_cached:
            raise SystemExit(f"{history.num_cached} tokens were in DRAM, the server used {num_cached}")
        return taken_s

    def _generate(self, tokens: list[int]) -> tuple[float, int]:
        """Seconds to the first token, and the number of prompt tokens that the server had cached.

        Streams the answer: from an answer in one piece the router cannot learn when prefill ended.
        """
        body: Any = {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "stream": True,
        }
        begun = time.perf_counter()
        with requests.post(f"{self._url}/generate", json=body, stream=True, timeout=TIMEOUT_S) as answer:
            answer.raise_for_status()
            lines = [(time.perf_counter() - begun, line) for line in answer.iter_lines() if line]
        taken_s, first = lines[0]
        said = json.loads(first.removeprefix(b"data: "))
        return taken_s, int(said["meta_info"]["cached_tokens"])


def show(cells: Mapping[int, Mapping[int, Samples]]) -> None:
    """All figures."""
    agreed = []
    for length, by_cached in cells.items():
        computed = by_cached[0]
        name = f"micro/dram_hit/{length}_tokens"
        report(f"{name}/computed", computed.measured, "ms")
        report(f"{name}/computed/predicted", computed.predicted, "ms", baseline=computed.measured)
        pays: dict[float, tuple[bool, bool]] = {}
        for num_cached, cell in sorted(by_cached.items()):
            if num_cached:
                share = num_cached / length
                hit = f"{name}/{round(100 * share)}_cached"
                report(hit, cell.measured, "ms", baseline=computed.measured)
                report(f"{hit}/predicted", cell.predicted, "ms", baseline=cell.measured)
                gain = 1 - statistics.median(cell.measured) / statistics.median(computed.measured)
                foreseen = statistics.median(cell.predicted) < statistics.median(computed.predicted)
                pays[share] = gain > 0, foreseen
                agreed.append((gain > 0) == foreseen or abs(gain) < TIE)
        measured, predicted = (crossing({share: it[n] for share, it in pays.items()}) for n in (0, 1))
        report(f"{name}/crossing", [measured], "of the prompt")
        report(f"{name}/crossing/predicted", [predicted], "of the prompt", baseline=[measured])
    report("micro/dram_hit/agrees", [sum(agreed) / len(agreed)], "of cells", target=1.0)


def crossing(pays: Mapping[float, bool]) -> float:
    """The least share from which all larger shares pay; 1 if the largest does not."""
    least = 1.0
    for share in sorted(pays, reverse=True):
        if not pays[share]:
            break
        least = share
    return least


if __name__ == "__main__":
    main()
