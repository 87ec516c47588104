"""Cost of a router, ours and others: added latency, requests per second, CPU, memory, fairness.

    apt install nginx-light wrk
    python benchmark/bench_router.py [--peers DIR] [--only ROUTER …] [--figures …] [--seconds N] [--rounds N]

    wrk ──> router ──> 4 workers that answer at once (nginx): the router dominates the figures

Each round loads every router in turn, equally; a table follows the figures. All processes
share this machine's cores: requests per second are a lower bound, the CPU time of the router's process
per request is not. The peers are the wheels of sglang-router, smg and vllm-router, in an environment
of their own (`--peers DIR` makes it if it is not there). All of them route by cached prefixes; ours uses
text keys, because no worker behind it confirms a tokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from figures import progress, report
from router_stage import Named, Router, Setting, Worker, load, require_tools, running, workers
from stream_worker import first_event_ms, stream_worker

OURS = "memserve"
PEERS = {"sglang-router": "0.3.2", "smg": "1.13.0", "vllm-router": "0.1.17"}
CONNECTIONS = 32
SPEEDS = [
    Setting(pd, stream, size << 10) for pd in (False, True) for stream in (False, True) for size in (4, 16)
]
RESTART_TIMEOUT_S = 30.0


class Table:
    """Rows by figure, a column for each router; Markdown at the end."""

    def __init__(self, routers: list[str]) -> None:
        self._routers = routers
        self._rows: dict[str, dict[str, str]] = {}

    def add(self, figure: str, router: str, text: str) -> None:
        self._rows.setdefault(figure, {})[router] = text

    def __str__(self) -> str:
        lines = ["| | " + " | ".join(self._routers) + " |", "|---" * (len(self._routers) + 1) + "|"]
        for figure, cells in self._rows.items():
            lines.append(f"| {figure} | " + " | ".join(cells.get(one, "–") for one in self._routers) + " |")
        return "\n".join(lines)


class Bench:
    """All figures of some routers."""

    def __init__(self, routers: list[str], peers: Path, seconds: int, rounds: int) -> None:
        self.table = Table(routers)
        self._routers = routers
        self._peers = peers
        self._seconds = seconds
        self._rounds = rounds
        self._seed = 0

    def speed(self) -> None:
        """Requests/s, CPU per request and added latency, router by router in each round."""
        for setting in SPEEDS:
            progress(f"{setting}: {len(self._routers)} routers, {self._rounds} rounds")
            rates: dict[str, list[float]] = {name: [] for name in self._routers}
            cpu_us: dict[str, list[float]] = {name: [] for name in self._routers}
            added_us: dict[str, list[float]] = {name: [] for name in self._routers}
            with workers(setting.pd) as behind:
                for _ in range(self._rounds):
                    direct = load(behind[-1].port, setting, 1, 1, self._next_seed()).p50_us
                    for name in self._routers:
                        self._speed_of(name, setting, behind, (rates[name], cpu_us[name]))
                        added_us[name].append(self._latency_us(name, setting, behind) - direct)
            for name in self._routers:
                base = None if name != OURS else "sglang-router"
                for figure, unit, samples in (
                    ("rate", "requests/s", rates),
                    ("cpu", "us/request", cpu_us),
                    ("added_p50", "us", added_us),
                ):
                    if samples[name]:
                        baseline = samples.get(base or "")
                        value = report(
                            f"router_{setting}_{figure}_{name}", samples[name], unit, baseline=baseline
                        )
                        self.table.add(f"{setting}, {unit} ({figure})", name, f"{value:,.0f}")

    def memory(self, num_unique: int) -> None:
        """Memory after many prompts that never come again."""
        setting = Setting(pd=False, stream=False, prompt_bytes=4096)
        for name in self._routers:
            with workers(pd=False) as behind, running(name, self._peers, behind) as router:
                load(router.port, setting, 4, 1, self._next_seed())
                start_mib, served = router.rss_mib(), 0
                while served < num_unique:
                    served += load(router.port, setting, CONNECTIONS, 5, self._next_seed()).requests
                    progress(
                        f"memory {name}: {served:,} of {num_unique:,} prompts, {router.rss_mib():.0f} MiB"
                    )
                report(f"router_memory_{name}", [router.rss_mib()], "MiB", baseline=[start_mib])
                text = f"{start_mib:.0f} → {router.rss_mib():.0f}"
                self.table.add(f"MiB, start → after {num_unique:,} unique prompts", name, text)

    def share(self) -> None:
        """How evenly new prompts are spread, one at a time."""
        setting = Setting(pd=False, stream=False, prompt_bytes=4096)
        for name in self._routers:
            with workers(pd=False, counts=True) as behind, running(name, self._peers, behind) as router:
                before = [worker.num_served() for worker in behind]
                load(router.port, setting, 1, 2, self._next_seed())
                served = [w.num_served() - b for w, b in zip(behind, before, strict=True)]
                shares = sorted((one / sum(served) for one in served), reverse=True)
                report(f"router_share_{name}", [max(served) / max(1, min(served))], "max/min")
                text = "/".join(f"{share:.0%}"[:-1] for share in shares) + "%"
                self.table.add("share of 4 workers, cold prompts, 1 connection", name, text)

    def recovery(self) -> None:
        """How long a worker that was killed and started again waits for its first request."""
        setting = Setting(pd=False, stream=False, prompt_bytes=4096)
        for name in self._routers:
            with workers(pd=False, counts=True) as behind, running(name, self._peers, behind) as router:
                seconds, num_wrong = self._recovery_s(router, behind[0], setting)
                report(f"router_recovery_{name}", [seconds], "s")
                text = f"{seconds:.1f}" if seconds < RESTART_TIMEOUT_S else f"> {RESTART_TIMEOUT_S:.0f}"
                self.table.add("s until a restarted worker serves (errors)", name, f"{text} ({num_wrong})")

    def first_byte(self) -> None:
        """What a router adds to the first event of a stream, on a kept-alive connection."""
        with stream_worker() as port:
            for name in self._routers:
                with running(name, self._peers, [Named(f"http://127.0.0.1:{port}")]) as router:
                    direct = asyncio.run(first_event_ms(port))
                    delays = asyncio.run(first_event_ms(router.port))
                    added = [statistics.median(delays) - statistics.median(direct)]
                    value = report(f"router_first_byte_{name}", added, "ms")
                    worst = max(delays) - statistics.median(direct)
                    text = f"{value:.2f} ({worst:.1f})"
                    self.table.add("ms added to a stream's first event, p50 (worst of 30)", name, text)

    def _speed_of(
        self, name: str, setting: Setting, behind: list[Worker], into: tuple[list[float], list[float]]
    ) -> None:
        with running(name, self._peers, behind) as router:
            load(router.port, setting, CONNECTIONS, 1, self._next_seed())
            before_s = router.cpu_s()
            seen = load(router.port, setting, CONNECTIONS, self._seconds, self._next_seed())
            if seen.num_wrong:
                progress(
                    f"{name} {setting}: {seen.num_wrong} of {seen.requests} answers were wrong: left out"
                )
                return
            into[0].append(seen.requests_per_s)
            into[1].append((router.cpu_s() - before_s) / seen.requests * 1e6)

    def _latency_us(self, name: str, setting: Setting, behind: list[Worker]) -> float:
        with running(name, self._peers, behind) as router:
            load(router.port, setting, 1, 1, self._next_seed())
            return load(router.port, setting, 1, 2, self._next_seed()).p50_us

    def _recovery_s(self, router: Router, victim: Worker, setting: Setting) -> tuple[float, int]:
        num_wrong, done = 0, threading.Event()

        def ask() -> None:
            nonlocal num_wrong
            while not done.is_set():
                num_wrong += load(router.port, setting, 8, 2, self._next_seed()).num_wrong

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            pause = threading.Event()
            pause.wait(2)
            victim.kill()
            pause.wait(3)
            victim.start()
            start, before = time.monotonic(), victim.num_served()
            while victim.num_served() == before and time.monotonic() - start < RESTART_TIMEOUT_S:
                pause.wait(0.02)
            return time.monotonic() - start, num_wrong
        finally:
            done.set()
            asking.join()

    def _next_seed(self) -> int:
        self._seed += 1
        return self._seed


def installed_peers(folder: Path) -> Path:
    """The environment with the other routers, made if it is not there."""
    if not (folder / "bin" / "sglang-router").exists():
        progress(f"installing {', '.join(PEERS)} into {folder}")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        wheels = [f"{name}=={version}" for name, version in PEERS.items()]
        subprocess.run([str(folder / "bin" / "pip"), "install", "-q", *wheels], check=True)
    return folder


def main() -> None:
    """Measure what was asked for, and print the table."""
    figures = ("speed", "memory", "share", "recovery", "first_byte")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, help="environment with the other routers; none: ours alone")
    parser.add_argument("--only", nargs="+", choices=[OURS, *PEERS], help="these routers")
    parser.add_argument("--figures", nargs="+", choices=figures, default=figures)
    parser.add_argument("--seconds", type=int, default=4, help="of each load (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--unique", type=int, default=150_000, help="prompts for the memory figure")
    args = parser.parse_args()
    require_tools()
    routers = [OURS, *PEERS] if args.peers else [OURS]
    routers = [name for name in routers if args.only is None or name in args.only]
    peers = installed_peers(args.peers) if args.peers else Path()
    bench = Bench(routers, peers, args.seconds, args.rounds)
    for figure in args.figures:
        bench.memory(args.unique) if figure == "memory" else getattr(bench, figure)()
    print(bench.table)


if __name__ == "__main__":
    main()
