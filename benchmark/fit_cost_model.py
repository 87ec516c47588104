"""Fit the router's cost model to a live instance, and report its prediction error.

    python benchmark/fit_cost_model.py [--quick] [-o costs.json]             of a server that it starts
    python benchmark/fit_cost_model.py --url http://127.0.0.1:30000 -o costs.json
    python -m memserve.simulation --trace trace.jsonl --costs costs.json --timed

Prefill: prompts of random tokens, part of which was just sent, timed to the first token; fitted as the
router does online, and checked on prompts outside of the fit. Decode: batches of equal
requests, timed per token. Bytes per token and the paths are not measured: they come from --like.
No other client may use the instance meanwhile. --url takes a running instance; without it, a colocated
server of the bench model is started. The default takes about three minutes, --quick one.

    micro/cost_model/prefill_error    of prompts that were not fitted to, relative; baseline: unfitted
    micro/cost_model/decode_error     of the batches that were fitted to, relative
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import requests

from bench_model import make_model
from figures import progress, report
from memserve.scheduling.cost_model.file import write_costs
from memserve.scheduling.cost_model.model import (
    CPU_COSTS,
    GPU_COSTS,
    CostModel,
    DecodeCost,
    Observation,
    RlsState,
    rls_update,
    with_prefill,
)
from memserve.testing.cluster import Cluster, is_ready, wait_for
from memserve.wire.messages import Role

TIMEOUT_S = 300
LEAST_TOKENS = 32
REPEATS = 3
"""Prompts of each size, of which the median counts: others may be at work on the machine."""
DECODE_TOKENS = 64
BATCHES = ((1, 64), (1, 1024), (4, 64), (4, 1024), (8, 64), (8, 512))
"""Requests at a time, and the tokens of each one's prompt."""


class Instance:
    """A server with SGLang's native API."""

    def __init__(self, url: str, vocab_size: int, random: Random) -> None:
        self.url, self._vocab_size, self._random = url.rstrip("/"), vocab_size, random

    def tokens(self, count: int) -> list[int]:
        return [self._random.randrange(10, self._vocab_size) for _ in range(count)]

    def generate(self, tokens: list[int], num_new: int) -> tuple[float, dict[str, Any]]:
        """Seconds, and what the server says of the request."""
        params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": num_new}
        begun = time.perf_counter()
        answer = requests.post(
            f"{self.url}/generate", json={"input_ids": tokens, "sampling_params": params}, timeout=TIMEOUT_S
        )
        taken_s = time.perf_counter() - begun
        answer.raise_for_status()
        return taken_s, answer.json()["meta_info"]

    def prefill(self, num_tokens: int, cached_share: float) -> Observation:
        """One prompt; the server's own word counts for how much of it was cached."""
        prompt = self.tokens(num_tokens)
        if cached_share:
            self.generate(prompt[: int(num_tokens * cached_share)], 1)
        seconds, said = self.generate(prompt, 1)
        num_cached = int(said.get("prefill_cached_tokens", said.get("cached_tokens", 0)))  # of a pair, or one
        return Observation(num_tokens, min(num_cached, num_tokens - 1), seconds)

    def step_s(self, num_sequences: int, num_tokens: int) -> float:
        """Seconds per decode step of a batch that begins with prompts of that length, all cached."""
        prompts = [self.tokens(num_tokens) for _ in range(num_sequences)]
        for prompt in prompts:
            self.generate(prompt, 1)
        long_s, short_s = (self._together_s(prompts, count) for count in (DECODE_TOKENS, 1))
        return (long_s - short_s) / (DECODE_TOKENS - 1)

    def _together_s(self, prompts: list[list[int]], num_new: int) -> float:
        threads = [threading.Thread(target=self.generate, args=(prompt, num_new)) for prompt in prompts]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a colocated instance, or a router of one (default: start one)")
    parser.add_argument("--model-path", type=Path, help="of the one to start; default: the bench model")
    parser.add_argument("--quick", action="store_true", help="a third of the sizes, and batches timed once")
    parser.add_argument("--prompts", type=int, help="sizes to time (default: 60; --quick: 20)")
    parser.add_argument("--longest", type=int, default=1800, help="prompt, in tokens (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=250, help="token ids below (default: %(default)s)")
    parser.add_argument("--like", choices=("gpu", "cpu"), default="cpu", help="what else to assume")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="write the model here, as JSON")
    args = parser.parse_args()
    random = Random(args.seed)
    costs = GPU_COSTS if args.like == "gpu" else CPU_COSTS
    with ExitStack() as stack:
        url = args.url or stack.enter_context(started(args.model_path))
        instance = Instance(url, args.vocab_size, random)
        costs = fit_prefill(instance, args.prompts or (20 if args.quick else 60), args.longest, random, costs)
        costs = replace(costs, decode=fit_decode(instance, args.longest, repeats=1 if args.quick else 3))
    text = json.dumps(write_costs(costs), indent=2)
    progress(text)
    if args.output:
        args.output.write_text(text + "\n")


@contextmanager
def started(model: Path | None) -> Iterator[str]:
    """A colocated server behind a router; the router's URL."""
    with Cluster(Path(tempfile.mkdtemp(prefix="memserve-fit-"))) as cluster:
        cluster.launch("worker", Role.COLOCATED, model or make_model())
        progress("starting a server")
        cluster.wait_ready()
        wait_for(lambda: is_ready(cluster.url), what="the server")
        yield cluster.url


def fit_prefill(
    instance: Instance, num_prompts: int, longest: int, random: Random, costs: CostModel
) -> CostModel:
    """`costs` with prefills as they were timed; says how well that predicts prompts not fitted to."""
    seen = time_prefills(instance, num_prompts, longest, random)
    fitted, judged = seen[: len(seen) * 3 // 4], seen[len(seen) * 3 // 4 :]
    refined = RlsState.of(costs.prefill)
    for one in fitted:
        refined = rls_update(refined, one)
    before = [abs(costs.exec_s(it.num_tokens, it.num_cached) / it.seconds - 1) for it in judged]
    costs = with_prefill(costs, refined.cost)
    errors = [abs(costs.exec_s(it.num_tokens, it.num_cached) / it.seconds - 1) for it in judged]
    for it in judged:
        predicted_s = costs.exec_s(it.num_tokens, it.num_cached)
        progress(
            f"{it.num_tokens} tokens, {it.num_cached} cached: {it.seconds:.4g} s, predicted {predicted_s:.4g}"
        )
    report("micro/cost_model/prefill_error", errors, "of observed", baseline=before)
    return costs


def time_prefills(instance: Instance, count: int, longest: int, random: Random) -> list[Observation]:
    for _ in range(3):
        instance.prefill(longest, 0.0)  # warm up
    seen = []
    for i in range(count):
        num_tokens = int(LEAST_TOKENS * (longest / LEAST_TOKENS) ** random.random())
        share = random.choice((0.0, 0.0, 0.5, 0.9))
        alike = [instance.prefill(num_tokens, share) for _ in range(REPEATS)]
        seen.append(sorted(alike, key=lambda it: it.seconds)[REPEATS // 2])
        if i % 10 == 9:
            progress(f"{i + 1} of {count} sizes")
    return seen


def fit_decode(instance: Instance, longest: int, repeats: int) -> DecodeCost:
    """Least squares of the three terms, none below 0."""
    batches = [(count, min(tokens, longest)) for count, tokens in BATCHES]
    rows, targets = [], []
    for count, tokens in batches:
        taken_s = statistics.median(instance.step_s(count, tokens) for _ in range(repeats))
        progress(f"decode, {count} x {tokens} tokens: {taken_s:.3g} s a step")
        rows.append([1.0, count, count * (tokens + DECODE_TOKENS / 2)])
        targets.append(taken_s)
    solved = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    fixed_s, sequence_s, context_token_s = (max(float(value), 0.0) for value in solved)
    cost = DecodeCost(fixed_s, sequence_s, context_token_s)
    predicted = np.array(rows) @ np.array([fixed_s, sequence_s, context_token_s])
    report("micro/cost_model/decode_error", list(abs(predicted / np.array(targets) - 1)), "of observed")
    return cost


if __name__ == "__main__":
    main()
