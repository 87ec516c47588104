#!/usr/bin/env python3
"""Show MemServe at work on this machine: router, prefill and decode serve a conversation.

    python scripts/demo.py                     # with a small random model, which it makes
    python scripts/demo.py --model-path DIR    # with your model
    python scripts/demo.py --caching all       # each caching mode in turn, then a comparison
    python scripts/demo.py --keep              # leave the servers up and print example requests

Each turn is sent with its whole history, as chat clients do. The table shows how little of it is
computed and moved again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import sglang as sgl
from tqdm import tqdm

from memserve.core.caching import CachingMode
from memserve.testing.cluster import Cluster, ClusterFailed, ServerProcess, is_ready, wait_for
from memserve.testing.ending import interrupt_on_signals
from memserve.testing.pool_reports import exchanged_bytes, pool_reports, wait_pools_connected, wait_settled
from memserve.wire.messages import Role

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT_CHARACTERS = 4000
QUESTIONS = [
    "Here is the beginning of a license:\n\n{document}\n\nWhat does it allow me to do?",
    "And what do I have to keep when I pass the work on?",
    "Who may sue whom over patents?",
    "Sum that up in one sentence.",
]
ANSWER_TOKENS = 64
USUAL_START_S = 45


@dataclass(frozen=True)
class Turn:
    """One row of the table; token counts, bytes and seconds."""

    via: str
    prompt: int
    reused_prefill: int
    reused_decode: int
    moved_bytes: int
    """From prefill to decode."""
    returned_bytes: int
    """From decode to prefill, after the turn."""
    first_token_s: float
    total_s: float

    @property
    def computed(self) -> int:
        return self.prompt - self.reused_prefill


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--model-path", type=Path, help="a Hugging Face model directory (default: a small random one)"
    )
    modes = [*map(str, CachingMode), "all"]
    parser.add_argument(
        "--caching",
        choices=modes,
        default=str(CachingMode.FULL),
        help="caching mode of the servers; all: every mode in turn (default: %(default)s)",
    )
    parser.add_argument("--keep", action="store_true", help="leave the servers up until Ctrl-C")
    parser.add_argument("--log-dir", type=Path, help="directory of the logs (default: a new one in /tmp)")
    args = parser.parse_args()
    interrupt_on_signals()
    log_dir = args.log_dir or Path(tempfile.mkdtemp(prefix="memserve-demo-"))
    try:
        model = args.model_path or make_model()
        chosen = list(CachingMode) if args.caching == "all" else [CachingMode(args.caching)]
        results = {}
        for mode in chosen:
            with start(model.resolve(), log_dir / mode, mode) as cluster:
                results[mode] = converse(cluster, mode)
                print_summary(results[mode])
                if args.keep:
                    keep(cluster)
                print("stopping …\n", flush=True)
        if len(results) > 1:
            print_side_by_side(results)
    except ClusterFailed as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped")
    return 0


def make_model() -> Path:
    model = ROOT / "models" / "bench"
    script = ROOT / "scripts" / "make_tiny_model.py"
    subprocess.run([sys.executable, str(script), str(model), "--size", "bench"], check=True)
    return model


def start(model: Path, log_dir: Path, mode: CachingMode) -> Cluster:
    """Start router, prefill and decode on free ports, with a progress bar while the model loads."""
    print(f"starting router, prefill and decode, caching {mode} (logs in {log_dir})", flush=True)
    cluster = Cluster(log_dir)
    try:
        for role in (Role.PREFILL, Role.DECODE):
            process = cluster.launch(str(role), role, model, "--caching", mode)
            print(f"  $ {shlex.join(['python', *map(str, process.argv)])}")
        wait_with_bar(cluster)
        wait_for(lambda: is_ready(cluster.url), [cluster.router], what="a pair", timeout_s=30)
        wait_pools_connected(cluster.server_urls())
    except BaseException:
        cluster.close()
        raise
    print(f"ready: {cluster.url}\n", flush=True)
    return cluster


def wait_with_bar(cluster: Cluster) -> None:
    """Show a bar that follows the usual start time, until both servers have registered."""
    done = threading.Event()

    def tick(bar: Any) -> None:
        while not done.wait(1):
            bar.update(min(1, max(0, bar.total - bar.n - 1)))

    form = "  loading {percentage:3.0f}%|{bar:30}| {elapsed}{postfix}"
    with tqdm(total=USUAL_START_S, bar_format=form, disable=None) as bar:
        ticker = threading.Thread(target=tick, args=(bar,), daemon=True)
        ticker.start()

        def report(process: ServerProcess) -> None:
            bar.set_postfix_str(f" {process.name} is up")

        try:
            cluster.wait_ready(report)
        finally:
            done.set()
            ticker.join()
        bar.update(bar.total - bar.n)


def converse(cluster: Cluster, mode: CachingMode) -> list[Turn]:
    """A conversation in SGLang's frontend language, then one over OpenAI's API, streamed."""
    document = (ROOT / "LICENSE").read_text()[:DOCUMENT_CHARACTERS]
    questions = [question.format(document=document) for question in QUESTIONS]
    turns: list[Turn] = []
    meter = Meter(cluster)
    backend = sgl.RuntimeEndpoint(cluster.url)

    @sgl.function
    def chat(s: Any) -> None:
        for i, question in enumerate(questions):
            name = f"answer_{i}"
            s += sgl.user(question)
            s += sgl.assistant(sgl.gen(name, max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True))
            meta = s.get_meta_info(name)
            turns.append(
                Turn(
                    "frontend",
                    meta["prompt_tokens"],
                    meta["prefill_cached_tokens"],
                    at_decode(mode, meta["cached_tokens"]),
                    *meter.moved(),
                    meta["prefill_e2e_latency"],
                    meta["e2e_latency"],
                )
            )
            print_row(turns)

    print_head()
    chat.run(backend=backend)
    messages: list[dict[str, str]] = []
    for question in questions[:2]:
        messages.append({"role": "user", "content": question})
        turn, answer = openai_turn(cluster.url, messages, meter, mode)
        messages.append({"role": "assistant", "content": answer})
        turns.append(turn)
        print_row(turns)
    return turns


def at_decode(mode: CachingMode, cached_tokens: int) -> int:
    """Tokens that decode had cached. A decode without a cache reports prefill's number instead."""
    return cached_tokens if mode.decode_keeps else 0


def openai_turn(
    url: str, messages: list[dict[str, str]], meter: Meter, mode: CachingMode
) -> tuple[Turn, str]:
    """One streamed chat completion, with a comment of the tokens that prefill reused (x-memserve-report)."""
    body = {
        "model": "default",
        "messages": messages,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun = time.monotonic()
    first_token_s, answer, usage, report = 0.0, "", {}, {}
    headers = {"x-memserve-report": "1"}
    with requests.post(
        f"{url}/v1/chat/completions", json=body, headers=headers, stream=True, timeout=600
    ) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith(b": memserve "):
                report = json.loads(line.removeprefix(b": memserve "))
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            usage = event.get("usage") or usage
            text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if text and not answer:
                first_token_s = time.monotonic() - begun
            answer += text
    total_s = time.monotonic() - begun
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    at_prefill = report.get("prefill_cached_tokens") or 0
    tokens = (usage["prompt_tokens"], at_prefill, at_decode(mode, cached))
    turn = Turn("openai", *tokens, *meter.moved(), first_token_s, total_s)
    return turn, answer


class Meter:
    """Measures the bytes of KV that each turn moves."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._urls = cluster.server_urls()
        self._last = self._now()

    def moved(self) -> tuple[int, int]:
        """Bytes since the last call, after transfers have settled: to decode, and back to prefill."""
        wait_settled(self._urls)
        before, self._last = self._last, self._now()
        return self._last[0] - before[0], self._last[1] - before[1]

    def _now(self) -> tuple[int, int]:
        return self._cluster.moved_bytes(), exchanged_bytes(pool_reports(self._urls))


COLUMNS = (
    "turn",
    "via",
    "prompt",
    "reused at prefill",
    "reused at decode",
    "KV to decode",
    "KV to prefill",
    "first token",
    "total",
)


def print_head() -> None:
    print("  ".join(f"{name:>9}" for name in COLUMNS))


def print_row(turns: list[Turn]) -> None:
    turn = turns[-1]
    cells = (
        str(len(turns)),
        turn.via,
        f"{turn.prompt}",
        f"{turn.reused_prefill}",
        f"{turn.reused_decode}",
        kib(turn.moved_bytes),
        kib(turn.returned_bytes),
        f"{turn.first_token_s * 1000:.0f} ms",
        f"{turn.total_s * 1000:.0f} ms",
    )
    print(
        "  ".join(f"{cell:>{max(9, len(name))}}" for cell, name in zip(cells, COLUMNS, strict=True)),
        flush=True,
    )


def kib(num_bytes: int) -> str:
    return f"{num_bytes / 1024:.0f} KiB"


def print_side_by_side(results: dict[CachingMode, list[Turn]]) -> None:
    """Per turn and mode: tokens that prefill computed, bytes to decode and back."""
    print("tokens computed by prefill, KV to decode + KV to prefill, first token:\n")
    print("turn  prompt" + "".join(f"{mode:>36}" for mode in results))
    for i, turns in enumerate(zip(*results.values(), strict=True)):
        cells = [
            f"{turn.computed:>6} {kib(turn.moved_bytes):>10} +{kib(turn.returned_bytes):>8}"
            f" {turn.first_token_s * 1000:>5.0f} ms"
            for turn in turns
        ]
        print(f"{i + 1:>4}  {turns[0].prompt:>6}" + "".join(f"{cell:>36}" for cell in cells))
    sums = [sum(turn.computed for turn in turns) for turns in results.values()]
    print(" all        " + "".join(f"{each:>12}{'':>24}" for each in sums))


def print_summary(turns: list[Turn]) -> None:
    prompt = sum(turn.prompt for turn in turns)
    computed = sum(turn.computed for turn in turns)
    moved = sum(turn.moved_bytes for turn in turns)
    home = sum(turn.returned_bytes for turn in turns)
    lacking = sum(turn.prompt - turn.reused_decode for turn in turns)
    print(
        f"\nOf {prompt} prompt tokens in {len(turns)} turns, prefill computed {computed} "
        f"({computed / prompt:.0%}); decode lacked {lacking} ({lacking / prompt:.0%}), "
        f"and only their pages moved: {moved / 2**20:.1f} MiB. "
        f"The KV that decode generated returned to prefill: {home / 2**20:.1f} MiB."
    )


def keep(cluster: Cluster) -> None:
    prompt = json.dumps({"text": "Once upon a time", "sampling_params": {"max_new_tokens": 32}})
    chat = json.dumps(
        {"model": "default", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    )
    print(
        f"""
The servers stay up; Ctrl-C stops them. To try:
  curl {cluster.url}/generate -H 'content-type: application/json' -d '{prompt}'
  curl -N {cluster.url}/v1/chat/completions -H 'content-type: application/json' -d '{chat}'
  curl {cluster.url}/workers
  curl {cluster.server_urls()[0]}/mempool
  curl {cluster.url}/readiness""",
        flush=True,
    )
    processes = [cluster.router, *cluster.servers.values()]
    while True:
        time.sleep(1)
        for process in processes:
            process.fail_if_ended()


if __name__ == "__main__":
    sys.exit(main())
