"""Figures a benchmark measured, one JSON line each on stdout; progress goes to stderr.

Knows how to time and how to write a figure down, not what is being measured.
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
    """Seconds that each of `repeats` calls of `fn` took, after `warmup` calls that do not count."""
    return measure_together([fn], repeats, warmup)[0]


def measure_together(
    fns: Sequence[Callable[[], object]], repeats: int = 7, warmup: int = 1
) -> list[list[float]]:
    """As `measure`, for several functions called in turn: A B A B, never A A B B.

    On a machine that others use too, a baseline and its subject must share each moment.
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
    is the ratio that is promised, printed so that a reader can compare. Returns the median.
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
    """One line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


@cache
def machine() -> str:
    """Processor, number of cores and system, as far as they can be found out."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{len(models) or '?'} x {model}, {platform.system()} {platform.release()}"


@cache
def commit() -> str:
    """The short hash that is checked out, with `+` if tracked files differ from it."""
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
