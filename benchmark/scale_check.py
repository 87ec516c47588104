"""How far off is the simulator? A trace on real servers, and the same trace simulated.

    python benchmark/bench_scale.py --check-real [--quick]

3 prefills and a decode serve the LooGLE-like trace of bench_routing.py once with each policy. The
simulator gets the same requests at the same times, costs that were fitted to these servers just before,
the same instance names and sessions, and blocks of 16 tokens.

    scale/check/prompt_tree/ttft_mean/contended   the simulator's; baseline: the real one. Also ttft_p50,
                                                  ttft_p99 and hit_ratio (of prompt tokens)
    scale/check/prompt_tree/ttft_mean/alone       the same with the other fit

What two cores do to it: four servers share them, and a prefill slows down while others compute; the
simulator's instances are machines of their own. So costs are fitted twice: `alone`, while nobody else
works, and `contended`, while one other request is always on its way. In a real run neighbours come and
go: at a load of about a half the truth lies between the two. On machines of their own, `alone` is the fit
to use. What the router, HTTP and the handover take is part of both fits, as they are timed through it;
so the simulator is told that transfers are free.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from zlib import crc32

from bench_model import make_model
from bench_routing import (
    ANSWER_TOKENS,
    NUM_PREFILLS,
    Answer,
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
from memserve.router.costs.cost_model import CPU_COSTS, CostModel
from memserve.router.costs.cost_model import Path as PathCost
from memserve.router.make_trace import Shape, loogle
from memserve.router.simulation.report import first_token_times
from memserve.router.simulation.simulation import Outcome, SimulationConfig, simulate
from memserve.router.simulation.traces import Request, Trace
from memserve.testing.cluster import Cluster

PAGE = 16
POLICIES = ("prompt_tree", "session")
SCALE = 16
REPLAY_S, QUICK_REPLAY_S = 60.0, 40.0
NUM_REQUESTS, QUICK_REQUESTS = 180, 120
FREE = PathCost(0.0, 1e18)


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
        costs = {"alone": fit(first.url, longest, 24 if quick else 40)}
        with neighbours(first.url, longest):
            costs["contended"] = fit(first.url, longest, 16 if quick else 24)
        for policy in POLICIES:
            progress(f"replaying with {policy}")
            show(policy, replay(first, policy, prompts, clock, scratch), costs, prompts, clock)


def fit(url: str, longest: int, num_prompts: int) -> CostModel:
    """Prefills through the router of a pair, first token and all."""
    random = Random(11)
    fitted = fit_prefill(Instance(url, 250, random), num_prompts, longest, random, CPU_COSTS)
    return replace(fitted, dram=FREE, remote=FREE)


@contextmanager
def neighbours(url: str, longest: int) -> Iterator[None]:
    """One other request is always on its way: prompts that nobody has seen, of half the length."""
    ended = threading.Event()
    other = Instance(url, 250, Random(12))

    def work() -> None:
        while not ended.is_set():
            other.generate(other.tokens(longest // 2), ANSWER_TOKENS)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def show(
    policy: str,
    answers: Sequence[Answer],
    costs: dict[str, CostModel],
    prompts: Sequence[Prompt],
    clock: float,
) -> None:
    """Each figure of the simulator's over the real one."""
    real = figures_of(answers)
    for name, believed in costs.items():
        outcome = simulate(trace_of(prompts, clock), config_of(policy), believed)
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
