"""What the memory pool costs a pair of servers, and what it gives them: against SGLang without it.

    python benchmark/bench_overheads.py [--model-path DIR] [--rounds N]

    stock   caching both, no DRAM: SGLang's own prefill and decode, a radix cache on each
    pool    caching full: the same over memory pools, what decode generates goes home

Both pairs run at once on real servers and are asked in turn, round after round, so that they share
each moment of the machine. Prompts are random text: nothing is cached unless the figure is about it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import requests

from bench_model import make_model
from figures import progress, report
from memserve.core.caching import CachingMode
from memserve.testing.cluster import Cluster, is_ready, wait_for
from memserve.testing.pool_reports import wait_acquainted, wait_settled
from memserve.wire.messages import Role

PROMPT_CHARACTERS = 2048
DECODE_TOKENS = 256
NUM_CHATS, NUM_TURNS, ANSWER_TOKENS = 3, 6, 96
CONCURRENCY = 4
TIMEOUT_S = 300
VARIANTS: dict[str, tuple[str, ...]] = {
    "stock": ("--caching", str(CachingMode.BOTH), "--dram-gib", "0"),
    "pool": ("--caching", str(CachingMode.FULL)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", type=Path, help="default: the bench model, made on the spot")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    args = parser.parse_args()
    run(args.model_path or make_model(), args.rounds)


def run(model: Path, rounds: int) -> None:
    """All figures."""
    with ExitStack() as stack:
        logs = Path(tempfile.mkdtemp(prefix="memserve-bench-"))
        progress(f"starting two pairs (logs in {logs})")
        clusters = {
            name: stack.enter_context(start(model, logs / name, flags)) for name, flags in VARIANTS.items()
        }
        for cluster in clusters.values():
            cluster.wait_ready()
            wait_for(lambda url=cluster.url: is_ready(url), what="a pair")
            wait_acquainted(cluster.server_urls())
        measure_cost(clusters, rounds)
        measure_gain(clusters, max(3, rounds // 3))


def start(model: Path, logs: Path, flags: tuple[str, ...]) -> Cluster:
    cluster = Cluster(logs)
    for role in (Role.PREFILL, Role.DECODE):
        cluster.launch(str(role), role, model, *flags)
    return cluster


def measure_cost(clusters: dict[str, Cluster], rounds: int) -> None:
    """Uncached prefill, decoding alone, and decoding under other requests' ends."""
    figures: dict[str, Callable[[Cluster], float]] = {
        "prefill of an uncached prompt": prefill_s,
        "decode, one request": lambda cluster: decode_s(cluster, 1),
        f"decode, {CONCURRENCY} requests": lambda cluster: decode_s(cluster, CONCURRENCY),
    }
    targets = {"prefill of an uncached prompt": 1.05}
    for name, measure in figures.items():
        samples: dict[str, list[float]] = {variant: [] for variant in clusters}
        for turn in range(rounds + 1):
            progress(f"{name}: round {turn} of {rounds}")
            # Whoever goes first in one round goes last in the next.
            for variant, cluster in sorted(clusters.items(), reverse=bool(turn % 2)):
                taken = measure(cluster)
                wait_settled(cluster.server_urls())
                if turn:
                    samples[variant].append(taken)
        target = targets.get(name, 1.03)
        report(name, samples["pool"], "s", baseline=samples["stock"], target=target)


def measure_gain(clusters: dict[str, Cluster], rounds: int) -> None:
    """Chats whose history both pairs have seen: time to the first token of turns after the first."""
    samples: dict[str, list[float]] = {variant: [] for variant in clusters}
    for turn in range(rounds):
        progress(f"chats: round {turn + 1} of {rounds}")
        for variant, cluster in sorted(clusters.items(), reverse=bool(turn % 2)):
            seconds = [s for _ in range(NUM_CHATS) for s in chat_s(cluster)]
            samples[variant].append(statistics.mean(seconds))
    report("mean time to first token, turns 2 to 6", samples["pool"], "s", baseline=samples["stock"])


def prefill_s(cluster: Cluster) -> float:
    return ask(cluster, random_text(PROMPT_CHARACTERS), 1)[0]


def decode_s(cluster: Cluster, concurrency: int) -> float:
    """Seconds per token of one request among so many, after its first token."""
    results: list[float] = []

    def run() -> None:
        first, total, _ = ask(cluster, random_text(64), DECODE_TOKENS)
        results.append((total - first) / (DECODE_TOKENS - 1))

    threads = [threading.Thread(target=run) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.mean(results)


def chat_s(cluster: Cluster) -> list[float]:
    """First tokens of the turns of one conversation, without the first turn's."""
    history, firsts = random_text(600), []
    for _ in range(NUM_TURNS):
        first, _, text = ask(cluster, history, ANSWER_TOKENS)
        wait_settled(cluster.server_urls())
        firsts.append(first)
        history += text + random_text(80)
    return firsts[1:]


def ask(cluster: Cluster, text: str, max_new_tokens: int) -> tuple[float, float, str]:
    """Seconds to the first token and to the last, and the answer."""
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": max_new_tokens}
    body = {"text": text, "sampling_params": params, "stream": True}
    begun = time.perf_counter()
    first, answer = 0.0, ""
    with requests.post(f"{cluster.url}/generate", json=body, stream=True, timeout=TIMEOUT_S) as response:
        response.raise_for_status()
        lines = response.iter_lines()
        for line in lines:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - begun
                answer = text_of(line)
    return first, time.perf_counter() - begun, answer


def text_of(line: bytes) -> str:
    event: Any = json.loads(line.removeprefix(b"data: "))
    return str(event["text"])


def random_text(num_characters: int) -> str:
    return "".join(random.choices(string.ascii_lowercase + "   ", k=num_characters))


if __name__ == "__main__":
    main()
