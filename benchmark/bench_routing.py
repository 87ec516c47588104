"""What routing is worth, with real servers: one trace, several policies, the same servers behind each.

    python benchmark/bench_routing.py [--policies session prompt_tree] [--rounds N]
    python benchmark/bench_routing.py --policies prompt_tree --caching full --fetch never auto

A LooGLE-like trace (questions about long documents, each asked about in several sessions) is replayed
against 3 prefill and 1 decode server, scaled down so that a CPU can serve it: a block of 512 tokens
becomes one of 512 / --scale. For each policy a router takes the place of the one before, all caches are
flushed, and the requests come at the trace's times, at a clock that gives --load: the work that an ideal
cache would leave, over what was measured that the servers can compute. Policies take turns; where several
ways to --fetch are named, each policy does so with each, and its name in the figures has the way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

import aiohttp
import requests

from bench_model import ROOM, make_model, random_tokens
from figures import progress, report
from memserve.core.caching import CachingMode
from memserve.simulation.make_trace import Shape, loogle
from memserve.simulation.traces import BLOCK_TOKENS, TraceLine
from memserve.testing.cluster import Cluster, is_ready, wait_for
from memserve.wire.messages import Role

ANSWER_TOKENS = 4
TIMEOUT_S = 300.0
NUM_PREFILLS = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request took."""

    ttft_s: float
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of the scaled trace."""

    at_s: float
    """In units of the trace's clock."""
    tokens: list[int]
    session: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", type=Path, help="default: the bench model, made on the spot")
    parser.add_argument("--policies", nargs="+", default=["session", "prompt_tree"], metavar="POLICY")
    parser.add_argument("--rounds", type=int, default=2, help="replays with each policy (default: 2)")
    parser.add_argument("--requests", type=int, default=250)
    parser.add_argument("--sessions", type=int, default=80)
    parser.add_argument("--share-ratio", type=int, default=3, help="sessions that ask about one document")
    parser.add_argument("--scale", type=int, default=16, help="tokens of the trace for one here")
    parser.add_argument("--load", type=float, default=0.6, help="of an ideal cache; 1 is full (default: 0.6)")
    parser.add_argument("--seconds", type=float, help="how long a replay takes, in place of --load")
    parser.add_argument("--caching", type=CachingMode, choices=list(CachingMode), default=CachingMode.BOTH,
                        help="full: servers may fetch from each other (default: both)")  # fmt: skip
    parser.add_argument("--fetch", nargs="+", choices=("auto", "never"), default=["auto"], metavar="WAY",
                        help="auto: where the router finds it quicker; never (default: auto)")  # fmt: skip
    args = parser.parse_args()
    shape = Shape(args.requests, 1.0, args.sessions, args.share_ratio)
    prompts = scaled(loogle(shape), args.scale)
    with tempfile.TemporaryDirectory(prefix="memserve-routing-") as scratch, ExitStack() as stack:
        first = stack.enter_context(Cluster(Path(scratch) / "first"))
        launch(first, args.model_path or make_model(), args.caching)
        wait_all(first.url)
        clock = clock_of(prompts, first.url, args.load)
        if args.seconds is not None:
            clock = args.seconds / max(prompt.at_s for prompt in prompts)
        routers = routers_of(args.policies, args.fetch)
        answers: dict[str, list[list[Answer]]] = {name: [] for name in routers}
        for turn in range(args.rounds):
            for name, flags in routers.items():
                progress(f"round {turn + 1}: {name}")
                answers[name].append(replay(first, flags, prompts, clock, Path(scratch)))
    show(answers)


def routers_of(policies: Sequence[str], ways: Sequence[str]) -> dict[str, list[str]]:
    """The flags of each router that takes a turn, by its name in the figures."""
    return {
        f"{policy}/fetch_{way}" if len(ways) > 1 else policy: ["--policy", policy, "--fetch", way]
        for policy in policies
        for way in ways
    }


def scaled(lines: Sequence[TraceLine], scale: int) -> list[Prompt]:
    """The trace with real token ids: those of a block are drawn by its id."""
    block = BLOCK_TOKENS // scale
    prompts = []
    for line in lines:
        tokens: list[int] = []
        for number in line.hash_ids:
            tokens += random_tokens(Random(number), block)
        length = max(1, line.input_length // scale)
        prompts.append(Prompt(line.timestamp / 1000, tokens[:length], line.session_id or 0))
    return prompts


def launch(cluster: Cluster, model: Path, caching: CachingMode) -> None:
    """3 prefills and a decode, with memory for all the documents."""
    for number in range(NUM_PREFILLS):
        cluster.launch(f"prefill{number}", Role.PREFILL, model, *ROOM, "--caching", str(caching))
    cluster.launch("decode", Role.DECODE, model, *ROOM, "--caching", str(caching))
    progress("starting 3 prefill and 1 decode server")
    cluster.wait_ready()


def clock_of(prompts: Sequence[Prompt], url: str, load: float) -> float:
    """Seconds here for one of the trace, so that the offered work is `load` of what can be computed."""
    draw = Random(1)
    mean = sum(len(prompt.tokens) for prompt in prompts) // len(prompts)
    cold = [Prompt(0.0, random_tokens(draw, mean), number) for number in range(12)]

    def elapsed_s(trial: Sequence[Prompt]) -> float:
        begun = time.perf_counter()
        asyncio.run(run(url, trial, 0.0))
        return time.perf_counter() - begun

    elapsed_s(cold[:3])  # warms up
    cold_s, cached_s = elapsed_s(cold[3:]), elapsed_s(cold[3:])
    request_s = cached_s / len(cold[3:])
    token_s = (cold_s - cached_s) / sum(len(prompt.tokens) for prompt in cold[3:])
    seen: set[tuple[int, ...]] = set()
    work = 0
    for prompt in prompts:
        cached, page = 0, 16
        for end in range(page, len(prompt.tokens), page):
            key = tuple(prompt.tokens[end - page : end])
            cached += page if key in seen else 0
            seen.add(key)
        work += len(prompt.tokens) - cached
    duration_s = (work * token_s + len(prompts) * request_s) / load
    progress(f"{1 / token_s:.0f} tokens/s, {request_s * 1000:.0f} ms for each request; an ideal cache leaves")
    progress(f"{work} of {sum(len(one.tokens) for one in prompts)} tokens: {duration_s:.0f} s a replay")
    return duration_s / max(prompt.at_s for prompt in prompts)


def replay(
    first: Cluster, router_flags: Sequence[str], prompts: Sequence[Prompt], clock: float, scratch: Path
) -> list[Answer]:
    """One pass of the trace through a router of its own, over cold caches."""
    first.router.stop()
    port = first.control.rpartition(":")[2]
    log_dir = scratch / f"router-{time.monotonic_ns()}"
    with Cluster(log_dir, router_flags=["--control-port", port, *router_flags]) as cluster:
        url = cluster.url
        wait_all(url)
        requests.post(f"{url}/flush_cache", timeout=TIMEOUT_S).raise_for_status()
        return asyncio.run(run(url, prompts, clock))


def wait_all(url: str) -> None:
    """Until the router would send requests to every server."""
    wait_for(lambda: is_ready(url) and num_ready(url) == NUM_PREFILLS + 1, what="the servers")


def num_ready(url: str) -> int:
    """Servers that the router would send requests to, and whose caches it follows."""
    page = requests.get(f"{url}/workers", timeout=TIMEOUT_S).json()
    ready: int = sum(worker["state"] == "ready" for worker in page["workers"])
    return min(ready, len(page["followed"]))


async def run(url: str, prompts: Sequence[Prompt], clock: float) -> list[Answer]:
    """Send each prompt when its time has come, whatever became of those before."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        begun = time.perf_counter()

        async def one(prompt: Prompt) -> Answer:
            await asyncio.sleep(max(0.0, prompt.at_s * clock - (time.perf_counter() - begun)))
            return await ask(session, url, prompt)

        return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


async def ask(session: aiohttp.ClientSession, url: str, prompt: Prompt) -> Answer:
    """Stream one answer; its first token is what counts."""
    body = {
        "input_ids": prompt.tokens,
        "sampling_params": {"max_new_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True},
        "stream": True,
    }
    headers = {"x-session-id": str(prompt.session), "x-memserve-report": "1"}
    begun = time.perf_counter()
    ttft_s = None
    cached = 0
    async with session.post(f"{url}/generate", json=body, headers=headers) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{url}: {answer.status}: {await answer.text()}")
        async for line in answer.content:
            if ttft_s is None and line.startswith(b"data:"):
                ttft_s = time.perf_counter() - begun
            if line.startswith(b": memserve "):
                cached = json.loads(line.removeprefix(b": memserve "))["prefill_cached_tokens"]
    assert ttft_s is not None, "no token came"
    return Answer(ttft_s, len(prompt.tokens), cached)


def show(answers: dict[str, list[list[Answer]]]) -> None:
    """Figures of each router, as ratios to the first one's."""
    baseline: dict[str, list[float]] = {}
    for router, rounds in answers.items():
        of_rounds = [figures_of(answered) for answered in rounds]
        figures = {name: [each[name] for each in of_rounds] for name in of_rounds[0]}
        for name, samples in figures.items():
            unit = "of prompt tokens" if name == "hit_ratio" else "s"
            report(f"routing/loogle/{router}/{name}", samples, unit, baseline=baseline.get(name))
        baseline = baseline or figures


def figures_of(answers: Sequence[Answer]) -> dict[str, float]:
    """Of one replay: times to the first token in seconds, and the share of prompt tokens that was cached."""
    firsts = [one.ttft_s for one in answers]
    return {
        "ttft_p99": percentile(firsts, 0.99),
        "ttft_p50": percentile(firsts, 0.5),
        "ttft_mean": statistics.mean(firsts),
        "hit_ratio": sum(one.cached_tokens for one in answers) / sum(one.prompt_tokens for one in answers),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    main()
