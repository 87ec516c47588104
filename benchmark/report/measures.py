"""The figures of a run: title, unit, and better direction of each. Knows no run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Measure:
    """The format of a figure: `scale` times the measured value, in `unit`."""

    title: str
    unit: str
    scale: float = 1.0
    higher_is_better: bool = False

    def show(self, value: float) -> str:
        """Three significant digits, without the unit."""
        return number(self.scale * value)


def number(value: float) -> str:
    """Three significant digits, thousands set apart, no exponent unless very small."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:.2f}" if abs(value) < 1 else f"{value:.3g}"


LATENCIES = ("ttft", "jct", "tpot")
MEASURES: dict[str, Measure] = {
    f"{latency}_{point}": Measure(f"{latency.upper()} {title}", "ms", 1e3)
    for latency in LATENCIES
    for point, title in {"mean": "mean", "p50": "P50", "p90": "P90", "p99": "P99"}.items()
} | {
    "throughput": Measure("answered", "req/s", higher_is_better=True),
    "goodput": Measure("goodput", "req/s", higher_is_better=True),
    "output_rate": Measure("output", "tokens/s", higher_is_better=True),
    "reused_share": Measure("prompt reused", "%", 100, higher_is_better=True),
    "reused_hbm_share": Measure("from HBM", "%", 100, higher_is_better=True),
    "reused_dram_share": Measure("from DRAM", "%", 100, higher_is_better=True),
    "kv_per_request": Measure("KV moved", "MB/req", 1e-6),
}
JUDGED = ("ttft_mean", "ttft_p99", "jct_mean", "jct_p99", "tpot_mean", "tpot_p99")
"""The figures by which systems are compared."""
