"""Overheads of the memory pool, its checksums, the events and the router when no prompt is shared.

    python benchmark/bench_overheads.py [--quick] [--model-path DIR] [--rounds N]

    stock    caching both, no DRAM: SGLang's own prefill and decode, a radix cache on each
    pool     caching full: the same over memory pools; the KV that decode generates returns to prefill
    silent   as pool, but without reports of HBM (an empty --kv-events-config)

Pairs on real servers, all running at once and asked in turn, round after round, so that they share each
moment of the machine. Prompts are random text: nothing is cached unless the figure is about it.

    overheads/pool/prefill              s, uncached; baseline: stock. Also decode_1, decode_4 (s a token,
                                        so many requests at once)
    overheads/pool/prefill_cpu          s of all processes of the pair, until it is at rest; and silent/
    overheads/events/prefill            pool against silent: the cost of reporting HBM; also decode_1 ...
    overheads/router/first_token        ms through the router; baseline: both legs posted to the servers
    overheads/router/cpu                us of the router's process for a request; {stock,pool}/
    overheads/checksum/block            us for a block of 16 tokens; baseline: its share of the prefill
    overheads/pool/chat_first_token     the gain: turns 2 to 6 of chats, whose history is cached

A block is checksummed when it goes to DRAM and whenever it comes back or has travelled. There is no
switch for checksums, so their cost is timed on its own. Events from DRAM are always on; `silent` leaves
out those from HBM, the most of them. --quick takes about three minutes, the default eight.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import string
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import requests

from bench_model import ROOM, make_model
from figures import measure as measure_s
from figures import progress, report
from memserve.core.caching import CachingMode
from memserve.core.kv_layout import KVLayout, Part
from memserve.mempool.arena import Arena
from memserve.mempool.tier_pool import Checksum
from memserve.testing.cluster import Cluster, is_ready, wait_for
from memserve.testing.pool_reports import wait_pools_connected, wait_settled
from memserve.wire.messages import Role

PROMPT_CHARACTERS = 2048
DECODE_TOKENS = 128
NUM_CHATS, NUM_TURNS, ANSWER_TOKENS = 2, 6, 96
CONCURRENCY = 4
TIMEOUT_S = 300
VARIANTS: dict[str, tuple[str, ...]] = {
    "stock": ("--caching", str(CachingMode.BOTH), "--dram-gib", "0"),
    "pool": ("--caching", str(CachingMode.FULL)),
    "silent": ("--caching", str(CachingMode.FULL), "--kv-events-config", ""),
}
COMPARED = {"pool": ("pool", "stock"), "silent": ("silent", "stock"), "events": ("pool", "silent")}
"""Figures by name: a variant, and its baseline."""
NUM_ROUTED = 40
ROUTED_CHARACTERS = 256
IDLE_S = 3.0
BLOCK = KVLayout("bench", 6, 16, (Part(2, 64),) * 2, "float32", 4)
"""Of the bench model: 96 KiB."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", type=Path, help="default: the bench model, made on the spot")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and chats")
    parser.add_argument("--rounds", type=int, metavar="N", help="(default: 9; --quick: 3)")
    args = parser.parse_args()
    rounds = args.rounds or (3 if args.quick else 9)
    with ExitStack() as stack:
        logs = Path(tempfile.mkdtemp(prefix="memserve-overheads-"))
        progress(f"starting {len(VARIANTS)} pairs (logs in {logs})")
        model = args.model_path or make_model()
        clusters = {
            name: stack.enter_context(start(model, logs / name, flags)) for name, flags in VARIANTS.items()
        }
        for cluster in clusters.values():
            cluster.wait_ready()
            wait_for(partial(is_ready, cluster.url), what="a pair")
            wait_pools_connected(cluster.server_urls())
        prefill_s = measure_cost(clusters, rounds)
        measure_checksum(prefill_s)
        del clusters["silent"]
        measure_router(clusters, NUM_ROUTED // 2 if args.quick else NUM_ROUTED)
        measure_gain(clusters, 1 if args.quick else 3)


def start(model: Path, logs: Path, flags: tuple[str, ...]) -> Cluster:
    cluster = Cluster(logs)
    for role in (Role.PREFILL, Role.DECODE):
        cluster.launch(str(role), role, model, *ROOM, *flags)
    return cluster


def measure_cost(clusters: dict[str, Cluster], rounds: int) -> float:
    """Uncached prefill, decoding alone, and decoding under other requests' ends; stock's prefill."""
    measures: dict[str, Callable[[Cluster], float]] = {
        "prefill": prefill_s,
        "decode_1": lambda cluster: decode_s(cluster, 1),
        f"decode_{CONCURRENCY}": lambda cluster: decode_s(cluster, CONCURRENCY),
    }
    stock_prefill_s = 0.0
    for name, measure in measures.items():
        samples: dict[str, list[float]] = {variant: [] for variant in clusters}
        processor: dict[str, list[float]] = {variant: [] for variant in clusters}
        for turn in range(rounds + 1):
            progress(f"{name}: round {turn} of {rounds}")
            # The first system of one round is the last of the next.
            for variant, cluster in sorted(clusters.items(), reverse=bool(turn % 2)):
                before_s = servers_cpu_s(cluster)
                taken = measure(cluster)
                wait_settled(cluster.server_urls())
                if turn:
                    samples[variant].append(taken)
                    processor[variant].append(servers_cpu_s(cluster) - before_s)
        target = 1.05 if name == "prefill" else 1.03
        for figure, (subject, base) in COMPARED.items():
            report(f"overheads/{figure}/{name}", samples[subject], "s", baseline=samples[base], target=target)
            report(f"overheads/{figure}/{name}_cpu", processor[subject], "s", baseline=processor[base])
        if name == "prefill":
            stock_prefill_s = statistics.median(samples["stock"])
    return stock_prefill_s


def measure_checksum(prefill_s: float) -> None:
    """One block's, over more blocks than the caches hold, beside what computing the block took."""
    num_blocks = (192 << 20) // BLOCK.block_bytes
    arena = Arena(BLOCK.block_bytes, num_blocks)
    for slot in range(num_blocks):
        arena.block(slot)[:] = bytes([slot % 251]) * BLOCK.block_bytes
    checksum = Checksum(BLOCK)
    samples = measure_s(lambda: [checksum.of(arena.block(slot)) for slot in range(num_blocks)], repeats=7)
    # A character is a token of the models made here.
    computed_us = 1e6 * prefill_s * BLOCK.page_tokens / PROMPT_CHARACTERS
    each_us = [1e6 * taken / num_blocks for taken in samples]
    report("overheads/checksum/block", each_us, "us", baseline=[computed_us])
    arena.close()


def measure_router(clusters: dict[str, Cluster], rounds: int) -> None:
    """First tokens of short prompts, through the router and past it, on both kinds of pair."""
    for variant, cluster in clusters.items():
        progress(f"router in front of {variant}")
        legs, servers = Legs(cluster), cluster.server_urls()
        routed, direct = [], []
        for turn in range(rounds + 3):
            through_s = ask(cluster, random_text(ROUTED_CHARACTERS), 1)[0]
            wait_settled(servers)
            past_s = legs.ask(random_text(ROUTED_CHARACTERS))
            wait_settled(servers)
            if turn >= 3:
                routed.append(through_s * 1000)
                direct.append(past_s * 1000)
        report(f"overheads/router/{variant}/first_token", routed, "ms", baseline=direct)
        spent_us = [router_cpu_us(cluster, rounds) for _ in range(3)]
        report(f"overheads/router/{variant}/cpu", spent_us, "us a request")


def router_cpu_us(cluster: Cluster, num_requests: int) -> float:
    """The router's processor time per request, events included, less its time when idle."""
    before_s = cpu_s(cluster.router.pid)
    time.sleep(IDLE_S)
    idle = (cpu_s(cluster.router.pid) - before_s) / IDLE_S
    before_s, begun = cpu_s(cluster.router.pid), time.perf_counter()
    for _ in range(num_requests):
        ask(cluster, random_text(ROUTED_CHARACTERS), 1)
    spent_s = cpu_s(cluster.router.pid) - before_s - idle * (time.perf_counter() - begun)
    return max(spent_s, 0.0) * 1e6 / num_requests


class Legs:
    """A pair without its router: the same body to both servers, with a room to meet in."""

    def __init__(self, cluster: Cluster) -> None:
        page = requests.get(f"{cluster.url}/workers", timeout=TIMEOUT_S).json()
        workers = {worker["role"]: worker for worker in page["workers"]}
        self._urls = [workers[role]["url"] for role in (Role.PREFILL, Role.DECODE)]
        self._port = workers[Role.PREFILL]["bootstrap_port"]
        self._sessions = [requests.Session() for _ in self._urls]
        self._threads = ThreadPoolExecutor(1)

    def ask(self, text: str) -> float:
        """Seconds to decode's answer of one token."""
        body = {
            **body_of(text, 1),
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self._port,
            "bootstrap_room": random.getrandbits(63),
        }
        begun = time.perf_counter()
        other = self._threads.submit(self._post, 0, {**body, "stream": False})
        self._post(1, body)
        taken_s = time.perf_counter() - begun
        other.result()
        return taken_s

    def _post(self, leg: int, body: Any) -> None:
        self._sessions[leg].post(
            f"{self._urls[leg]}/generate", json=body, timeout=TIMEOUT_S
        ).raise_for_status()


def servers_cpu_s(cluster: Cluster) -> float:
    """Seconds of processor that all processes of the servers have taken so far."""
    return sum(cpu_s(process.pid) for process in cluster.servers.values())


def cpu_s(session: int) -> float:
    """The same of one session, as each `Process` of the cluster has; without those of it that ended."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_gain(clusters: dict[str, Cluster], rounds: int) -> None:
    """Chats whose history both pairs have cached: time to the first token of turns after the first."""
    samples: dict[str, list[float]] = {variant: [] for variant in clusters}
    for turn in range(rounds):
        progress(f"chats: round {turn + 1} of {rounds}")
        for variant, cluster in sorted(clusters.items(), reverse=bool(turn % 2)):
            samples[variant] += [s for _ in range(NUM_CHATS) for s in chat_s(cluster)]
    report("overheads/pool/chat_first_token", samples["pool"], "s", baseline=samples["stock"])


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
    """Times to the first token of the turns of one conversation, without the first turn."""
    history, firsts = random_text(600), []
    for _ in range(NUM_TURNS):
        first, _, text = ask(cluster, history, ANSWER_TOKENS)
        wait_settled(cluster.server_urls())
        firsts.append(first)
        history += text + random_text(80)
    return firsts[1:]


def ask(cluster: Cluster, text: str, max_new_tokens: int) -> tuple[float, float, str]:
    """Seconds to the first token and to the last, and the answer."""
    body = body_of(text, max_new_tokens)
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


def body_of(text: str, max_new_tokens: int) -> Any:
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": max_new_tokens}
    return {"text": text, "sampling_params": params, "stream": True}


def text_of(line: bytes) -> str:
    event: Any = json.loads(line.removeprefix(b"data: "))
    return str(event["text"])


def random_text(num_characters: int) -> str:
    return "".join(random.choices(string.ascii_lowercase + "   ", k=num_characters))


if __name__ == "__main__":
    main()
