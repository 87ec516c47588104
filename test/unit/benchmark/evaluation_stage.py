"""A fictitious run directory in the format of the evaluation. No figure in it was measured."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from load.records import Cell, Outcome, Run, write_run

WORKLOADS = ("sharegpt", "loogle", "react")
RATES = {"below": 1.0, "near": 2.0, "over": 3.0}
STEPS = {
    "colocated": 1.1,
    "colocated-cache": 0.5,
    "pd-basic": 1.0,
    "pd-caching-1": 0.5,
    "pd-caching-2": 0.4,
    "pd-caching-3": 0.22,
}
STOCK = {"pd-caching-3": 0.22, "stock-pd": 0.42, "stock-pd-decode-cache": 0.4}
POLICIES = {"least-load": 1.0, "session": 0.6, "longest-prefix": 0.5, "prompt-tree": 0.4}
PARTS = (("steps", STEPS, WORKLOADS), ("stock", STOCK, WORKLOADS), ("policies", POLICIES, ("loogle",)))


def outcome(ttft_s: float | None = 0.1, **others: Any) -> Outcome:
    """An answered request, with the given changes."""
    fields = {
        "session": "s",
        "turn": 0,
        "sent_s": 0.0,
        "jct_s": 1.0,
        "tpot_s": 0.01,
        "prompt_tokens": 100,
        "output_tokens": 10,
    }
    return Outcome(ttft_s=ttft_s, **(fields | others))


def run_of(outcomes: Sequence[Outcome], *, repeat: int = 0, **cell: Any) -> Run:
    """Ten seconds of PD-Basic, with the given changes."""
    fields = {"part": "steps", "system": "pd-basic", "workload": "sharegpt", "rate": 1.0, "load": "below"}
    return Run(Cell(repeat=repeat, **(fields | cell)), 10.0, 1000, tuple(outcomes))


def serving_run(cell: Cell, factor: float, rng: random.Random, num_requests: int = 30) -> Run:
    """Latencies that grow with the rate and shrink with `factor`."""
    crowd = 1 + (cell.rate / 2.2) ** 4
    reused = 1000 * (1 - factor) if factor < 0.9 else 0
    outcomes = []
    for nth in range(num_requests):
        ttft_s = 0.4 * factor * crowd * rng.lognormvariate(0, 0.5)
        tpot_s = 0.02 * (1 + 0.1 * cell.rate) * rng.lognormvariate(0, 0.1)
        outcomes.append(
            outcome(
                ttft_s,
                session=f"s{nth // 5}",
                turn=nth % 5,
                sent_s=nth / cell.rate,
                jct_s=ttft_s + 31 * tpot_s,
                tpot_s=tpot_s,
                prompt_tokens=1000,
                reused_hbm=int(0.6 * reused),
                reused_dram=int(0.4 * reused),
                warmup=nth < 3,
                error="timed out" if cell.load == "over" and rng.random() < 0.01 else None,
            )
        )
    return Run(cell, num_requests / cell.rate + 1, int(4e8 * factor), tuple(outcomes))


def write_directory(
    path: Path, seed: int = 0, repeats: int = 5, workloads: Sequence[str] = WORKLOADS
) -> Path:
    """runs.jsonl, figures.jsonl, run.json and notes.json of a whole evaluation."""
    path.mkdir(exist_ok=True)
    rng = random.Random(seed)
    for part, systems, own in PARTS:
        for repeat in range(repeats):
            for workload in (one for one in own if one in workloads):
                for load in RATES if part != "policies" else ["below"]:
                    for system, factor in systems.items():
                        cell = Cell(part, system, workload, RATES[load], load, repeat)
                        # One cell that MemServe loses, to show a regression on the page.
                        loses = (part, system, workload, load) == ("stock", "pd-caching-3", "react", "over")
                        write_run(path / "runs.jsonl", serving_run(cell, 0.6 if loses else factor, rng))
    lines = [json.dumps(figure) + "\n" for figure in made_up_figures(rng)]
    (path / "figures.jsonl").write_text("".join(lines))
    (path / "run.json").write_text(json.dumps(CONDITIONS))
    (path / "notes.json").write_text(json.dumps(NOTES))
    return path


def made_up_figures(rng: random.Random) -> list[dict[str, Any]]:
    def figure(part: str, name: str, value: float, unit: str, **others: Any) -> dict[str, Any]:
        fixed = {"n": 7, "spread": 0.08, "baseline": None, "ratio": None, "target": None}
        measured = float(f"{value * rng.uniform(0.97, 1.03):.4g}")
        return {"part": part, "name": name, "value": measured, "unit": unit, **fixed, **others}

    found = []
    for tokens in (256, 512, 1024, 2048, 4096):
        found.append(figure("micro", f"micro/dram_hit/{tokens}_tokens/50_cached", 0.002 * tokens, "ms"))
        found.append(figure("micro", f"micro/dram_hit/{tokens}_tokens/computed", 0.0004 * tokens**1.3, "ms"))
    for transport, rate in {"local": 5.2, "tcp": 1.9, "mooncake": 0.8}.items():
        held = {"baseline": 2.5, "ratio": rate / 2.5, "target": 0.8}
        found.append(figure("micro", f"micro/transfer/{transport}/aggregated", rate, "GB/s", **held))
        found.append(figure("micro", f"micro/transfer/{transport}/by_layer", rate / 3, "GB/s"))
    for num in (8, 64, 256, 1000):
        for policy, factor in {"prompt-tree": 1.0, "least-load": 2.4}.items():
            found.append(figure("scale", f"scale/{num}_instances/{policy}/ttft_p99", factor * num**0.2, "s"))
        found.append(figure("scale", f"scale/router/{num}/decisions", 40_000 / num**0.5, "decisions/s"))
    for what in ("pool", "checksums", "events", "router"):
        cost = {"baseline": 100.0, "ratio": 1.01, "target": 1.03}
        found.append(figure("overheads", f"overheads/{what}/ttft", 101.0, "ms", **cost))
    return found


CONDITIONS: dict[str, Any] = {
    "machine": "2 x Example CPU, Linux 6.1, 24 GiB",
    "commit": "abc1234",
    "versions": {"sglang": "0.5.23", "torch": "2.13.0", "python": "3.11"},
    "model": {"name": "bench", "layers": 8, "hidden": 512},
    "settings": {
        "seed": 1,
        "repeats": 5,
        "threads": {"prefill": 1, "decode": 1},
        "slo": {"ttft_s": 0.5, "tpot_s": 0.03},
    },
    "workloads": {
        "sharegpt": {"turns, mean": [5.8, 5.75], "multi-turn, share": [0.74, 0.73]},
        "loogle": {"prompt tokens, mean": [2350, 23500], "shared, share": [0.91, 0.91]},
    },
    "systems": {
        "colocated": {"title": "Colocated", "what": "One server, no cache."},
        "colocated-cache": {"title": "Colocated + cache", "what": "One server with its radix cache."},
        "pd-basic": {"title": "PD-Basic", "what": "Prefill and decode apart, no cache."},
        "pd-caching-1": {"title": "PD-Caching-1", "what": "Prefill caches."},
        "pd-caching-2": {"title": "PD-Caching-2", "what": "Decode caches too."},
        "pd-caching-3": {"title": "PD-Caching-3", "what": "Decode returns its KV to prefill."},
        "stock-pd": {"title": "Stock PD", "what": "SGLang's own behind sglang-router."},
        "stock-pd-decode-cache": {"title": "Stock PD + decode cache", "what": "With a decode radix cache."},
    },
    "saturation": {"sharegpt": 2.2, "loogle": 2.1, "react": 2.2},
    "unavailable": {"stock-pd-hicache": "its offload needs a kernel that this machine lacks"},
    "begun": "2026-01-01 10:00",
    "ended": "2026-01-01 13:10",
}
NOTES = {
    "summary": "Made-up figures, to look at the page.",
    "limits": "Two cores: prefill and decode share them.",
    "cells/stock-pd": "Made up to lose.",
    "worse/micro": "Mooncake over TCP copies twice.",
}
