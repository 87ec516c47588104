"""Statistics of runs: estimates of a cell over its repeats, their spread, and differences of systems.

Pure. Two rules hold throughout. A figure of a run (a mean, a median, a rate) is taken per repeat, and
its estimate is the median over repeats, from the lowest to the highest: of five, a 94% interval. A P99
is not: of the 40 requests of one repeat it is nearly the maximum, so it is taken over the requests of all
repeats together, within the 95% interval of a bootstrap that draws repeats, then requests of each. (The
jackknife, leaving one repeat out, fails on quantiles: what is left mostly has the same slowest request.)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from load.records import Outcome, Run
from report.measures import LATENCIES, MEASURES

Verdict = Literal["better", "worse", "equal", "unknown"]
"""`equal`: within the spread. `unknown`: fewer than `FEWEST_REPEATS`."""
FEWEST_REPEATS = 3
DRAWS = 400
_RANDOM = partial(np.random.default_rng, 1)
"""The same draws for the same figures: a report made twice is the same report."""


class Key(NamedTuple):
    """A cell without its repeat."""

    part: str
    system: str
    workload: str
    rate: float
    load: str


@dataclass(frozen=True, slots=True)
class Slo:
    """The limits of a good request."""

    ttft_s: float
    tpot_s: float

    def met_by(self, outcome: Outcome) -> bool:
        return (
            outcome.error is None
            and outcome.ttft_s is not None
            and outcome.ttft_s <= self.ttft_s
            and (outcome.tpot_s is None or outcome.tpot_s <= self.tpot_s)
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the range it is known within, from `n` repeats; low = high = value if n is 1."""

    value: float
    low: float
    high: float
    n: int

    @property
    def spread(self) -> float:
        """Width of the range over the value."""
        return (self.high - self.low) / self.value if self.value else 0.0

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Summary:
    """All of a cell. `estimates` by the names of `MEASURES`, in seconds, bytes and shares; what no
    server told is not there."""

    key: Key
    repeats: int
    requests: int
    """Measured, over all repeats; warm-up is not."""
    errors: int
    estimates: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Subject over baseline, repeat by repeat."""

    measure: str
    ratio: Estimate
    verdict: Verdict

    @property
    def change(self) -> float:
        """-0.58 is 58% lower."""
        return self.ratio.value - 1


def group(runs: Iterable[Run]) -> dict[Key, list[Run]]:
    """The repeats of every cell, in order of repeat; of a repeat run twice, the last."""
    cells: dict[Key, dict[int, Run]] = {}
    for run in runs:
        cell = run.cell
        key = Key(cell.part, cell.system, cell.workload, cell.rate, cell.load)
        cells.setdefault(key, {})[cell.repeat] = run
    return {key: [repeats[n] for n in sorted(repeats)] for key, repeats in cells.items()}


def summarize(runs: Sequence[Run], slo: Slo | None = None) -> Summary:
    """The repeats of one cell. Raises ValueError if there are none."""
    if not runs:
        raise ValueError("a cell without runs has no summary")
    taken = [figures_of(run, slo) for run in runs]
    estimates = {}
    for name in MEASURES:
        if name.endswith("_p99"):
            pools = [p for run in runs if (p := latencies(run, name.removesuffix("_p99")))]
            if pools:
                estimates[name] = tail(pools)
        elif values := [figures[name] for figures in taken if name in figures]:
            estimates[name] = over_repeats(values)
    measured = [outcome for run in runs for outcome in run.measured]
    cell = runs[0].cell
    return Summary(
        Key(cell.part, cell.system, cell.workload, cell.rate, cell.load),
        len(runs),
        len(measured),
        sum(outcome.error is not None for outcome in measured),
        estimates,
    )


def compare(subject: Sequence[Run], baseline: Sequence[Run], slo: Slo | None = None) -> dict[str, Comparison]:
    """Two systems in the same cell, paired by repeat: a moment's load on the machine hits both.

    Repeats that only one of them has do not count. Figures that either lacks, or that are 0 in the
    baseline, are left out.
    """
    ours = {run.cell.repeat: run for run in subject}
    theirs = {run.cell.repeat: run for run in baseline}
    pairs = [(ours[n], theirs[n]) for n in sorted(ours.keys() & theirs.keys())]
    taken = [(figures_of(a, slo), figures_of(b, slo)) for a, b in pairs]
    comparisons = {}
    for name in MEASURES:
        if name.endswith("_p99"):
            latency = name.removesuffix("_p99")
            pools = [(latencies(a, latency), latencies(b, latency)) for a, b in pairs]
            pools = [(a, b) for a, b in pools if a and b]
            ratio = tail_ratio(pools) if pools and p99([b for _, b in pools]) else None
        else:
            ratios = [a[name] / b[name] for a, b in taken if name in a and b.get(name)]
            ratio = over_repeats(ratios) if ratios else None
        if ratio is not None:
            higher = MEASURES[name].higher_is_better
            comparisons[name] = Comparison(name, ratio, verdict_on(ratio, higher))
    return comparisons


def verdict_on(ratio: Estimate, higher_is_better: bool = False) -> Verdict:
    """Whether 1 is outside of a ratio's range, and on which side."""
    if ratio.n < FEWEST_REPEATS:
        return "unknown"
    if ratio.holds(1):
        return "equal"
    return "better" if (ratio.value > 1) == higher_is_better else "worse"


def figures_of(run: Run, slo: Slo | None = None) -> dict[str, float]:
    """Of one run, by the names of `MEASURES`; no P99, and no goodput without an `slo`."""
    measured, answered = run.measured, run.answered
    figures: dict[str, float] = {}
    for latency in LATENCIES:
        if values := latencies(run, latency):
            figures[f"{latency}_mean"] = statistics.fmean(values)
            figures[f"{latency}_p50"] = percentile(values, 50)
            figures[f"{latency}_p90"] = percentile(values, 90)
    duration_s = _measured_s(run)
    if duration_s > 0:
        figures["throughput"] = len(answered) / duration_s
        figures["output_rate"] = sum(outcome.output_tokens for outcome in answered) / duration_s
        if slo:
            figures["goodput"] = sum(slo.met_by(outcome) for outcome in measured) / duration_s
    for name, reused in REUSED.items():
        told = [(n, outcome.prompt_tokens) for outcome in answered if (n := reused(outcome)) is not None]
        if prompts := sum(prompt for _, prompt in told):
            figures[name] = sum(n for n, _ in told) / prompts
    if run.kv_bytes_moved is not None and run.outcomes:
        figures["kv_per_request"] = run.kv_bytes_moved / len(run.outcomes)
    return figures


def latencies(run: Run, latency: str) -> list[float]:
    """Seconds of each measured request that was answered; `latency` is of `LATENCIES`."""
    values = (getattr(outcome, f"{latency}_s") for outcome in run.answered)
    return [value for value in values if value is not None]


def over_repeats(values: Sequence[float]) -> Estimate:
    """The median, from the lowest to the highest."""
    return Estimate(statistics.median(values), min(values), max(values), len(values))


def tail(repeats: Sequence[Sequence[float]]) -> Estimate:
    """P99 of all repeats' values together; repeats are not empty."""
    value = p99(repeats)
    if len(repeats) < 2:
        return Estimate(value, value, value, 1)
    return _interval(value, _drawn_p99(repeats, _RANDOM()), len(repeats))


def tail_ratio(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Estimate:
    """Subject's P99 over baseline's, of all repeats together; each draw has the same repeats of both."""
    subject, baseline = [a for a, _ in pairs], [b for _, b in pairs]
    value = p99(subject) / p99(baseline)
    if len(pairs) < 2:
        return Estimate(value, value, value, 1)
    rng = _RANDOM()
    picks = rng.integers(len(pairs), size=(DRAWS, len(pairs)))
    return _interval(value, _drawn_p99(subject, rng, picks) / _drawn_p99(baseline, rng, picks), len(pairs))


def _drawn_p99(
    repeats: Sequence[Sequence[float]], rng: np.random.Generator, picks: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """P99 of each draw: `picks` of repeats, [DRAWS, repeats],
    then as many requests of each as repeats have on average."""
    if picks is None:
        picks = rng.integers(len(repeats), size=(DRAWS, len(repeats)))
    sizes = np.array([len(values) for values in repeats])
    padded = np.zeros((len(repeats), sizes.max()))
    for row, values in zip(padded, repeats, strict=True):
        row[: len(values)] = values
    uniform = rng.random((*picks.shape, round(sizes.mean())))
    places = (uniform * sizes[picks][..., None]).astype(np.int64)
    drawn = padded[picks[..., None], places].reshape(DRAWS, -1)
    taken: NDArray[np.float64] = np.percentile(drawn, 99, axis=1)
    return taken


def _interval(value: float, drawn: NDArray[np.float64], n: int) -> Estimate:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, min(value, float(low)), max(value, float(high)), n)


def p99(repeats: Sequence[Sequence[float]]) -> float:
    return percentile([value for values in repeats for value in values], 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated between the two values around it."""
    return float(np.percentile(np.asarray(values), percent))


def _reused(outcome: Outcome) -> int | None:
    """Of all tiers, summed here if the server tells only each."""
    if outcome.reused is not None:
        return outcome.reused
    tiers = [outcome.reused_hbm, outcome.reused_dram]
    told = [tokens for tokens in tiers if tokens is not None]
    return sum(told) if told else None


def _measured_s(run: Run) -> float:
    """The run's length without the warm-up before its first measured request."""
    sent = [outcome.sent_s for outcome in run.outcomes if not outcome.warmup]
    if not sent:
        return 0.0
    return run.duration_s - (min(sent) - min(outcome.sent_s for outcome in run.outcomes))


REUSED: Mapping[str, Callable[[Outcome], int | None]] = {
    "reused_share": _reused,
    "reused_hbm_share": attrgetter("reused_hbm"),
    "reused_dram_share": attrgetter("reused_dram"),
}
