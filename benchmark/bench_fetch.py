"""Measures when a fetch of history beats computing it: the choice of Eq. 2 against both measured times.

    python benchmark/bench_fetch.py [--quick] [--model-path DIR] [--rounds N]

One prefill, one decode and one memory instance, all real. The memory instance has the first N pages of a
prompt, the prefill none. The time to the end of the prefill is measured in turn with a fetch of the N pages
and with full computation; `POST /explain` returns the router's choice.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import requests

from bench_model import make_model, random_tokens
from bench_routing import TIMEOUT_S
from figures import progress, report
from memserve.core.block_keys import page_keys
from memserve.core.ids import Epoch
from memserve.testing.cluster import Cluster, is_ready, wait_for
from memserve.wire.link import ControlClient
from memserve.wire.messages import Role
from memserve.wire.peer_messages import Fetch, Fetched

PAGE = 16
PAGES, QUICK_PAGES = (1, 2, 4, 8, 16, 32, 64, 128), (1, 4, 16, 128)
TAIL_TOKENS = 8
WARM_UP = 30
"""Number of requests from which the router learns the cost of prefills."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", type=Path, help="default: the bench model, made on the spot")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds: about a minute")
    parser.add_argument("--rounds", type=int, metavar="N", help="of each size (default: 7; --quick: 3)")
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.quick else 7)
    model = args.model_path or make_model()
    with tempfile.TemporaryDirectory(prefix="memserve-fetch-") as scratch, ExitStack() as stack:
        cluster = stack.enter_context(Cluster(Path(scratch)))
        cluster.launch("prefill", Role.PREFILL, model)
        cluster.launch("decode", Role.DECODE, model)
        cluster.launch_memory("memory", 1.0)
        progress("starting prefill, decode and memory")
        cluster.wait_ready()
        bench = Bench(cluster)
        wait_for(lambda: len(bench.pools()) == 3 and is_ready(cluster.url), what="the pools")
        bench.warm_up()
        for pages in QUICK_PAGES if args.quick else PAGES:
            bench.compare(pages, rounds)


class Bench:
    """A cluster. Between measurements its prefill's cache is emptied, not that of its memory instance."""

    def __init__(self, cluster: Cluster) -> None:
        self._url = cluster.url
        self._draw = random.Random(7)

    def pools(self) -> dict[str, dict[str, Any]]:
        """The router's record of each pool."""
        page = requests.get(f"{self._url}/workers", timeout=TIMEOUT_S).json()
        return {pool["instance_id"]: pool for pool in page["pools"]}

    def warm_up(self) -> None:
        """Prompts of all lengths, cold and cached, one after another; and fetches of a few."""
        self._pools = self.pools()
        self._client = ControlClient(self._pools["prefill"]["address"])
        for number in range(WARM_UP):
            tokens = self._tokens(PAGES[number % len(PAGES)])
            self._prefill_s(tokens)
            self._prefill_s(tokens)
        for _ in range(5):
            for pages in (4, 128):
                tokens = self._stored_remotely(pages)
                self._generate(tokens)

    def compare(self, pages: int, rounds: int) -> None:
        """Times of both ways for a history of this many pages, and the router's choice."""
        fetched, computed, chosen = [], [], 0
        for _ in range(rounds):
            tokens = self._stored_remotely(pages)
            chosen += self._would_fetch(tokens)
            begun = time.perf_counter()
            self._fetch(tokens)
            fetch_s = time.perf_counter() - begun
            fetched.append((fetch_s + self._prefill_s(tokens)) * 1000)
            computed.append(self._prefill_s(self._tokens(pages)) * 1000)
        name = f"micro/fetch/{pages * PAGE}_tokens"
        baseline = computed
        report(f"{name}/computed_ms", computed, "ms")
        report(f"{name}/fetched_ms", fetched, "ms", baseline=baseline)
        report(f"{name}/eq2_fetches", [chosen / rounds], "of decisions")
        faster = statistics.median(fetched) < statistics.median(computed)
        progress(f"{pages} pages: {'fetching' if faster else 'computing'} is faster, "
                 f"Eq. 2 fetched in {chosen} of {rounds}")  # fmt: skip

    def _stored_remotely(self, pages: int) -> list[int]:
        """A prompt of which only the memory instance holds pages, and this many."""
        tokens = self._tokens(pages)
        self._prefill_s(tokens)
        memory = [{"instance": "memory", "blocks": pages}]
        wait_for(
            lambda: self._explain(tokens)["memory"] == memory, what="the memory to have it", timeout_s=30
        )
        requests.post(f"{self._url}/flush_cache", timeout=TIMEOUT_S).raise_for_status()
        wait_for(self._is_flushed, what="the router to see the flush")
        return tokens

    def _is_flushed(self) -> bool:
        held = self._held()
        return not any(sum(held[name].values()) for name in ("prefill", "decode"))

    def _held(self) -> dict[str, dict[str, int]]:
        """Blocks in the router's tree, by instance and tier."""
        page = requests.get(f"{self._url}/tree", timeout=TIMEOUT_S).json()
        held: dict[str, dict[str, int]] = page["instances"]
        return held

    def _would_fetch(self, tokens: list[int]) -> bool:
        fetch = self._explain(tokens)["fetch"]
        return fetch is not None

    def _explain(self, tokens: list[int]) -> dict[str, Any]:
        told: dict[str, Any] = requests.post(
            f"{self._url}/explain", json={"input_ids": tokens}, timeout=TIMEOUT_S
        ).json()
        return told

    def _fetch(self, tokens: list[int]) -> None:
        """Fetch as the router would, regardless of its decision."""
        keys = tuple(page_keys(tokens, PAGE))
        memory, prefill = self._pools["memory"], self._pools["prefill"]
        epoch = Epoch(int(memory["epoch"], 16))
        wanted = Fetch(bytes.fromhex(prefill["layout"]), keys, None, memory["address"], epoch, 5.0)
        answer = self._client.request(wanted, timeout_s=6.0)
        assert isinstance(answer, Fetched)
        assert answer.num_blocks == len(keys), answer.reason

    def _prefill_s(self, tokens: list[int]) -> float:
        """Seconds of a request with an answer of one token."""
        begun = time.perf_counter()
        self._generate(tokens)
        return time.perf_counter() - begun

    def _generate(self, tokens: list[int]) -> None:
        body: Any = {"input_ids": tokens, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        requests.post(f"{self._url}/generate", json=body, timeout=TIMEOUT_S).raise_for_status()

    def _tokens(self, pages: int) -> list[int]:
        return random_tokens(self._draw, pages * PAGE + TAIL_TOKENS)


if __name__ == "__main__":
    main()
