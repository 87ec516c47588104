"""Prints the figures of a benchmark, one JSON line each on stdout; progress goes to stderr.

Knows how to time calls and how to print a figure, not the subject of the measurement.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path


def measure(fn: Callable[[], object], repeats: int = 7, warmup: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls of `fn`, after `warmup` calls that do not count."""
    return measure_together([fn], repeats, warmup)[0]


def measure_together(
    fns: Sequence[Callable[[], object]], repeats: int = 7, warmup: int = 1
) -> list[list[float]]:
    """As `measure`, for several functions called in turn: A B A B, never A A B B.

    On a shared machine, a baseline and its subject must be measured at nearly the same time.
    """
    samples: list[list[float]] = [[] for _ in fns]
    for turn in range(warmup + repeats):
        for fn, taken in zip(fns, samples, strict=True):
            start = time.perf_counter()
            fn()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                taken.append(elapsed)
    return samples


def report(
    name: str,
    samples: Sequence[float],
    unit: str,
    *,
    baseline: Sequence[float] | None = None,
    target: float | None = None,
) -> float:
    """Print one figure: the median of `samples`, already in `unit`.

    spread is (highest - lowest) / median. `ratio` is this median over the baseline's; `target`
    is the promised ratio, printed for comparison. Returns the median.
    """
    value = statistics.median(samples)
    reference = statistics.median(baseline) if baseline else None
    figure = {
        "name": name,
        "value": _rounded(value),
        "unit": unit,
        "n": len(samples),
        "spread": _rounded((max(samples) - min(samples)) / value) if value else None,
        "baseline": None if reference is None else _rounded(reference),
        "ratio": _rounded(value / reference) if reference else None,
        "target": target,
        "machine": machine(),
        "commit": commit(),
    }
    print(json.dumps(figure), flush=True)
    return value


def progress(text: str) -> None:
    """Print one line of progress."""
    print(text, file=sys.stderr, flush=True)


@cache
def machine() -> str:
    """Processor, number of cores and system, as far as they are known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{len(models) or '?'} x {model}, {platform.system()} {platform.release()}"


@cache
def commit() -> str:
    """The short hash of the checkout, with `+` if tracked files differ from it."""
    here = Path(__file__).parent
    hashed = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    if hashed.returncode:
        return "unknown"
    dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here, check=False).returncode
    return hashed.stdout.strip() + ("+" if dirty else "")


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
