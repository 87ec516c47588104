"""Plots of serving runs: latencies against rate, reductions beside the paper's, distributions of TTFT."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.criteria import OURS, PAPER, baseline_of
from report.evidence import Evidence
from report.measures import MEASURES
from report.style import FAINT, INK, inline_svg, legend_above, look_of, styled
from report.summary import Key, latencies

PANELS = ("ttft_mean", "ttft_p99", "jct_mean", "tpot_mean")
REDUCED = ("ttft_mean", "ttft_p99", "jct_mean", "jct_p99")
STEPS = ("pd-caching-1", "pd-caching-2", OURS)


def rates(evidence: Evidence, part: str) -> str | None:
    """A row of panels per workload: each of `PANELS` against the rate; None with fewer than two rates."""
    keys = evidence.keys(part)
    workloads = [w for w in _workloads(keys) if len({key.rate for key in keys if key.workload == w}) > 1]
    if not workloads:
        return None
    with styled():
        figure = Figure(figsize=(12.4, 2.75 * len(workloads) + 0.5), layout="constrained")
        grid = figure.subplots(len(workloads), len(PANELS), squeeze=False)
        for row, workload in zip(grid, workloads, strict=True):
            for axes, measure in zip(row, PANELS, strict=True):
                _lines(axes, evidence, [key for key in keys if key.workload == workload], measure)
                axes.set_title(f"{workload}: {MEASURES[measure].title}, ms")
        legend_above(figure, grid[0][0])
        return inline_svg(figure, f"rates-{part}", f"{part}: latencies against request rate")


def reductions(evidence: Evidence, part: str) -> str | None:
    """How much lower than PD-Basic each caching step is below saturation, beside the paper's gains."""
    keys = [key for key in evidence.keys(part) if key.load == "below"]
    workloads = [w for w in _workloads(keys) if _paper(w)]
    if baseline_of(evidence, part) != "pd-basic" or not workloads:
        return None
    with styled():
        figure = Figure(figsize=(_width(workloads), 3.6), layout="constrained")
        panels = figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0]
        for axes, workload in zip(panels, workloads, strict=True):
            _bars(axes, evidence, [key for key in keys if key.workload == workload])
            axes.set_title(f"{workload}, below saturation")
        panels[0].set_ylabel("lower than PD-Basic, %")
        legend_above(figure, panels[0])
        return inline_svg(figure, f"reductions-{part}", f"{part}: reductions against PD-Basic")


def distributions(evidence: Evidence, part: str) -> str | None:
    """The share of requests whose first token came within a time, below saturation (or at the only rate)."""
    keys = evidence.keys(part)
    loads = {key.load for key in keys}
    keys = [key for key in keys if key.load == ("below" if "below" in loads else min(loads))]
    workloads = _workloads(keys)
    if not workloads:
        return None
    with styled():
        figure = Figure(figsize=(_width(workloads), 3.4), layout="constrained")
        panels = figure.subplots(1, len(workloads), squeeze=False)[0]
        for axes, workload in zip(panels, workloads, strict=True):
            for key in keys:
                if key.workload == workload:
                    _steps(axes, evidence, key)
            axes.set(title=workload, xscale="log", xlabel="TTFT, ms (log)", ylim=(0, 1.01))
            _plain_log(axes, "x")
        panels[0].set_ylabel("share of requests")
        legend_above(figure, panels[0])
        return inline_svg(figure, f"cdf-{part}", f"{part}: distribution of TTFT")


def reuse(evidence: Evidence, part: str) -> str | None:
    """How much of the prompts each system found, by tier; None if no server tells tiers apart."""
    tiers = {"reused_hbm_share": "#0072B2", "reused_dram_share": "#56B4E9"}
    keys = [key for key in evidence.keys(part) if key.load in ("below", "")]
    workloads = _workloads(keys)
    if not any(tier in evidence.summaries[key].estimates for key in keys for tier in tiers):
        return None
    with styled():
        figure = Figure(figsize=(_width(workloads), 3.1), layout="constrained")
        panels = figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0]
        for axes, workload in zip(panels, workloads, strict=True):
            some = [key for key in keys if key.workload == workload][::-1]
            left = np.zeros(len(some))
            for tier, colour in tiers.items():
                found = [evidence.summaries[key].estimates.get(tier) for key in some]
                widths = np.array([100 * one.value if one else 0.0 for one in found])
                names = [evidence.title(key.system) for key in some]
                axes.barh(names, widths, left=left, color=colour, label=MEASURES[tier].title, height=0.7)
                left += widths
            axes.set(title=workload, xlabel="of prompt tokens, %", xlim=(0, 100), xticks=range(0, 100, 20))
            axes.grid(False, axis="y")
        legend_above(figure, panels[0])
        return inline_svg(figure, f"reuse-{part}", f"{part}: prompt tokens reused, by tier")


def _width(panels: Sequence[str]) -> float:
    return max(7.0, min(12.4, 4.2 * len(panels)))


def _workloads(keys: Sequence[Key]) -> list[str]:
    return list(dict.fromkeys(key.workload for key in keys))


def _paper(workload: str) -> dict[str, float]:
    return next((gains for name, gains in PAPER.items() if workload.lower().startswith(name)), {})


def _systems(keys: Sequence[Key]) -> list[str]:
    return list(dict.fromkeys(key.system for key in keys))


def _lines(axes: Axes, evidence: Evidence, keys: Sequence[Key], measure: str) -> None:
    """Each system's estimate at each rate, its range as a band."""
    scale = MEASURES[measure].scale
    highest: list[float] = []
    for system in _systems(keys):
        found = [
            (key.rate, estimate)
            for key in keys
            if key.system == system and (estimate := evidence.summaries[key].estimates.get(measure))
        ]
        look = look_of(system, _systems(keys))
        offered = [rate for rate, _ in found]
        values = [scale * estimate.value for _, estimate in found]
        highest += values
        axes.plot(
            offered,
            values,
            color=look.colour,
            marker=look.marker,
            markersize=5,
            linewidth=look.width,
            label=evidence.title(system),
        )
        axes.fill_between(
            offered,
            [scale * estimate.low for _, estimate in found],
            [scale * estimate.high for _, estimate in found],
            color=look.colour,
            alpha=0.13,
            linewidth=0,
        )
    loads = {key.rate: key.load for key in keys}
    axes.set_xticks(sorted(loads), [f"{rate:.3g}/s\n{loads[rate]}" for rate in sorted(loads)])
    axes.margins(x=0.08)
    if highest and max(highest) > 12 * min(highest) > 0:
        axes.set_yscale("log")
        _plain_log(axes, "y")
    else:
        axes.set_ylim(bottom=0)


def _bars(axes: Axes, evidence: Evidence, keys: Sequence[Key]) -> None:
    """A group per figure: the caching steps, then the paper's, hatched."""
    basic = next((key for key in keys if key.system == "pd-basic"), None)
    steps = [key for step in STEPS for key in keys if key.system == step]
    width = 0.8 / (len(steps) + 1)
    places = np.arange(len(REDUCED))
    for nth, key in enumerate(steps):
        compared = evidence.compared(key, basic) if basic else {}
        ratios = [compared[m].ratio if m in compared else None for m in REDUCED]
        values = [100 * (1 - ratio.value) if ratio else 0.0 for ratio in ratios]
        errors = [
            [100 * (ratio.high - ratio.value) if ratio else 0.0 for ratio in ratios],
            [100 * (ratio.value - ratio.low) if ratio else 0.0 for ratio in ratios],
        ]
        axes.bar(
            places + nth * width,
            values,
            width * 0.92,
            yerr=errors,
            error_kw={"elinewidth": 1, "ecolor": INK, "capsize": 2},
            color=look_of(key.system).colour,
            label=evidence.title(key.system),
        )
        if key.system == OURS:
            for place, value in zip(places + nth * width, values, strict=True):
                axes.annotate(f"{value:.0f}", (place, 1.5), ha="center", color="white", fontsize=8.5)
    paper = _paper(keys[0].workload)
    places_paper = places + len(steps) * width
    gains = [100 * paper.get(measure, 0.0) for measure in REDUCED]
    axes.bar(
        places_paper,
        gains,
        width * 0.92,
        color=FAINT,
        edgecolor="#7b8794",
        hatch="////",
        linewidth=0.8,
        label="the paper's PD-Caching-3",
    )
    for place, gain in zip(places_paper, gains, strict=True):
        axes.annotate(f"{gain:.0f}", (place, gain + 1), ha="center", fontsize=8.5)
    axes.set_xticks(places + len(steps) * width / 2, [MEASURES[m].title for m in REDUCED])
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.grid(False, axis="x")


def _steps(axes: Axes, evidence: Evidence, key: Key) -> None:
    values = sorted(1e3 * value for run in evidence.cells[key] for value in latencies(run, "ttft"))
    if not values:
        return
    # A few hundred points show as much as thousands, and keep the page small.
    places = np.unique(np.linspace(0, len(values) - 1, 200).astype(int))
    look = look_of(key.system, [*dict.fromkeys(one.system for one in evidence.keys(key.part))])
    axes.plot(
        [values[place] for place in places],
        (places + 1) / len(values),
        color=look.colour,
        linewidth=look.width,
        drawstyle="steps-post",
        label=evidence.title(key.system),
    )


def _plain_log(axes: Axes, which: str) -> None:
    """100 and 2,000, not powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
