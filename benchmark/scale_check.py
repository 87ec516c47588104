"""Measures the error of the simulator: a trace on real servers, and the same trace simulated.

    python benchmark/bench_scale.py --check-real [--quick]

3 prefills and a decode serve the LooGLE-like trace of bench_routing.py once with each policy. The
simulator gets the same requests at the same times, costs that were fitted to these servers just before,
the same instance names and sessions, and blocks of 16 tokens.

    scale/check/prompt_tree/ttft_mean/contended   the simulator's; baseline: the real one. Also ttft_p50,
                                                  ttft_p99 and hit_ratio (of prompt tokens)
    scale/check/prompt_tree/ttft_mean/alone       the same with the other fit

Effect of two cores: four servers share them, and a prefill slows down while other servers compute; the
simulator's instances are separate machines. `alone` uses costs fitted on idle cores: the fit for separate
machines. `contended` multiplies these costs by the measured slowdown of a prefill beside one and beside two
busy neighbours (scale/check/slowdown/...), interpolated by the mean number of busy neighbours in the
simulated run. A mean underestimates the slowdown of bursts and overestimates it at quiet times. The fit
includes the time of router, HTTP and handoff, because prefills are timed through them; so transfers are
free in the simulator.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from random import Random
from zlib import crc32

import numpy as np

from bench_model import VOCABULARY, make_model
from bench_routing import (
    ANSWER_TOKENS,
    NUM_PREFILLS,
    Prompt,
    figures_of,
    launch,
    percentile,
    replay,
    scaled,
    wait_all,
)
from figures import progress, report
from fit_cost_model import Instance, fit_prefill
from memserve.core.block_keys import BlockKey, page_keys
from memserve.core.caching import CachingMode
from memserve.scheduling.cost_model.model import (
    CPU_COSTS,
    FREE,
    CostModel,
    PrefillCost,
    load_paths,
    with_prefill,
)
from memserve.simulation.make_trace import Shape, loogle
from memserve.simulation.report import first_token_times
from memserve.simulation.simulation import Outcome, SimulationConfig, simulate
from memserve.simulation.traces import Request, Trace
from memserve.testing.cluster import Cluster

PAGE = 16
POLICIES = ("prompt_tree", "session")
SCALE = 16
REPLAY_S, QUICK_REPLAY_S = 60.0, 40.0
NUM_REQUESTS, QUICK_REQUESTS = 180, 120
ROUNDS = 6
"""After which the simulated run and its own contention agree."""


def run(model: Path | None, *, quick: bool) -> None:
    """All figures."""
    count = QUICK_REQUESTS if quick else NUM_REQUESTS
    prompts = scaled(loogle(Shape(count, 1.0, sessions=count // 3)), SCALE)
    clock = (QUICK_REPLAY_S if quick else REPLAY_S) / max(prompt.at_s for prompt in prompts)
    longest = max(len(prompt.tokens) for prompt in prompts)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memserve-check-")))
        first = stack.enter_context(Cluster(scratch / "first"))
        launch(first, model or make_model(), CachingMode.BOTH)
        wait_all(first.url)
        costs = fit(first.url, longest, 24 if quick else 40)
        slowed = slowdowns(first.url, longest, 5 if quick else 9)
        for policy in POLICIES:
            progress(f"replaying with {policy}")
            real = figures_of(replay(first, ["--policy", policy], prompts, clock, scratch))
            show(policy, real, simulated(policy, trace_of(prompts, clock), costs, slowed))


def fit(url: str, longest: int, num_prompts: int) -> CostModel:
    """Prefills through the router of a pair, first token and all."""
    random = Random(11)
    fitted = fit_prefill(Instance(url, VOCABULARY, random), num_prompts, longest, random, CPU_COSTS)
    return replace(fitted, load=load_paths(FREE), remote=FREE)


def slowdowns(url: str, longest: int, repeats: int) -> list[float]:
    """Slowdown of a cold prefill beside zero, one and two busy neighbours."""
    instance, medians = Instance(url, VOCABULARY, Random(13)), []
    for count in range(NUM_PREFILLS):
        with neighbours(url, longest, count):
            taken = [instance.prefill(longest * 2 // 3, 0.0).seconds for _ in range(repeats)]
        medians.append(statistics.median(taken))
        report(f"scale/check/slowdown/{count}_neighbours", taken, "s", baseline=medians[:1])
    return [max(1.0, each / medians[0]) for each in medians]


@contextmanager
def neighbours(url: str, longest: int, count: int) -> Iterator[None]:
    """Keep this many other requests running, with new prompts."""
    ended = threading.Event()

    def work(number: int) -> None:
        other = Instance(url, VOCABULARY, Random(20 + number))
        while not ended.is_set():
            other.generate(other.tokens(longest), 1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def simulated(policy: str, trace: Trace, costs: CostModel, slowed: Sequence[float]) -> dict[str, Outcome]:
    """With the costs as they are, and as they become among that run's own neighbours."""
    outcome = simulate(trace, config_of(policy), costs)
    outcomes, factor = {"alone": outcome}, 1.0
    for _ in range(ROUNDS):
        factor = (factor + float(np.interp(others_at_work(outcome, costs, factor), [0, 1, 2], slowed))) / 2
        outcome = simulate(trace, config_of(policy), times(costs, factor))
    report(f"scale/check/{policy}/contention", [factor], "x")
    return {**outcomes, "contended": outcome}


def others_at_work(outcome: Outcome, costs: CostModel, factor: float) -> float:
    """The mean number of other prefills at work."""
    busy_s = sum(
        factor * costs.exec_s(job.request.prompt_tokens, job.request.prompt_tokens - job.work_tokens)
        for job in outcome.jobs
    )
    return busy_s / max(job.end_s for job in outcome.jobs) * (NUM_PREFILLS - 1) / NUM_PREFILLS


def times(costs: CostModel, factor: float) -> CostModel:
    return with_prefill(costs, PrefillCost(*(value * factor for value in astuple(costs.prefill))))


def show(policy: str, real: Mapping[str, float], outcomes: Mapping[str, Outcome]) -> None:
    """Each figure of the simulator's over the real one."""
    for name, outcome in outcomes.items():
        for figure, value in simulated_figures(outcome).items():
            unit = "of prompt tokens" if figure == "hit_ratio" else "s"
            report(
                f"scale/check/{policy}/{figure}/{name}", [value], unit, baseline=[real[figure]], target=1.0
            )


def config_of(policy: str) -> SimulationConfig:
    return SimulationConfig(
        instances=NUM_PREFILLS, decodes=1, policy=policy, decode_policy=policy, timed=True, can_fetch=False
    )


def trace_of(prompts: Sequence[Prompt], clock: float) -> Trace:
    """The same requests; the last, partial page of each is its own."""
    requests = []
    for number, prompt in enumerate(prompts):
        whole = len(prompt.tokens) // PAGE * PAGE
        keys = page_keys(prompt.tokens[:whole], PAGE)
        if whole < len(prompt.tokens):
            keys = [*keys, BlockKey(number.to_bytes(32, "big"))]
        session = crc32(str(prompt.session).encode())  # as the router names it
        at_s = prompt.at_s * clock
        requests.append(Request(number, at_s, len(prompt.tokens), ANSWER_TOKENS, tuple(keys), session))
    return Trace(tuple(requests), PAGE)


def simulated_figures(outcome: Outcome) -> dict[str, float]:
    """As `bench_routing.figures_of`."""
    firsts = first_token_times(outcome)
    prompt_tokens = sum(job.request.prompt_tokens for job in outcome.jobs)
    return {
        "ttft_mean": sum(firsts) / len(firsts),
        "ttft_p50": percentile(firsts, 0.5),
        "ttft_p99": percentile(firsts, 0.99),
        "hit_ratio": 1 - sum(job.work_tokens for job in outcome.jobs) / prompt_tokens,
    }
