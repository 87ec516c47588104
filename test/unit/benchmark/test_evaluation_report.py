"""The report: statistics checked by hand, verdicts, agreement of two runs, and a self-contained page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from evaluation_stage import NOTES, RATES, STEPS, outcome, run_of, write_directory

from load.records import Cell, Run, write_run
from report import evidence, figure_plots, page
from report.agreement import Pair, agreement
from report.criteria import baseline_of, faceoffs, judged, subject_of
from report.evidence import Figure, NothingMeasuredError, read_evidence, read_figures
from report.make import __file__ as make_file
from report.make import headline_markdown, make_report
from report.measures import number
from report.summary import Estimate, Slo, compare, figures_of, group, summarize, tail, verdict_on


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole evaluation without two of its workloads."""
    return write_directory(tmp_path_factory.mktemp("run"), workloads=["react"])


@pytest.fixture(scope="session")
def html(measured: Path) -> str:
    """The page of that evaluation, with its own causes only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "NOTES", measured / "none.json")
        make_report(measured)
    return (measured / "report.html").read_text()


def runs_with(ttfts: list[float], **cell: str) -> list[Run]:
    """A repeat of one request for each TTFT."""
    return [run_of([outcome(ttft)], repeat=nth, **cell) for nth, ttft in enumerate(ttfts)]


class TestFiguresOfARun:
    def test_measures_use_answered_requests_after_the_warmup(self) -> None:
        run = run_of(
            [
                outcome(9.0, warmup=True),
                outcome(0.1),
                outcome(0.3),
                outcome(None, jct_s=None, tpot_s=None, error="timed out"),
            ]
        )
        figures = figures_of(run)
        assert figures["ttft_mean"] == pytest.approx(0.2)
        assert figures["ttft_p50"] == pytest.approx(0.2)
        assert figures["ttft_p90"] == pytest.approx(0.28)
        assert figures["throughput"] == pytest.approx(2 / 10)
        assert figures["output_rate"] == pytest.approx(20 / 10)
        assert figures["kv_per_request"] == 250

    def test_measured_time_excludes_the_warmup(self) -> None:
        run = run_of([outcome(sent_s=1.0, warmup=True), outcome(sent_s=6.0)])
        assert figures_of(run)["throughput"] == pytest.approx(1 / 5)

    def test_goodput_counts_requests_that_keep_both_limits(self) -> None:
        slow_first, slow_rest = outcome(0.6), outcome(0.1, tpot_s=0.2)
        single, failed = outcome(0.5, tpot_s=None), outcome(0.1, error="lost")
        run = run_of([outcome(0.1), slow_first, slow_rest, single, failed])
        assert figures_of(run, Slo(0.5, 0.1))["goodput"] == pytest.approx(2 / 10)
        assert "goodput" not in figures_of(run)

    def test_reuse_sums_the_tiers_if_a_server_reports_no_total(self) -> None:
        tiers = outcome(reused_hbm=20, reused_dram=30)
        figures = figures_of(run_of([tiers, outcome(reused=10), outcome()]))
        assert figures["reused_share"] == pytest.approx(60 / 200)
        assert figures["reused_hbm_share"] == pytest.approx(20 / 100)
        assert figures["reused_dram_share"] == pytest.approx(30 / 100)

    def test_unreported_reuse_is_not_zero(self) -> None:
        run = Run(Cell("steps", "x", "w", 1.0, "below", 0), 1.0, None, (outcome(),))
        assert not figures_of(run).keys() & {"kv_per_request", "reused_share"}


class TestSummary:
    def test_summary_of_a_mean_is_the_median_over_repeats_with_its_range(self) -> None:
        found = summarize(runs_with([0.3, 0.1, 0.2]))
        assert found.estimates["ttft_mean"] == Estimate(0.2, 0.1, 0.3, 3)
        assert found.estimates["ttft_mean"].spread == pytest.approx(1.0)
        assert (found.repeats, found.requests, found.errors) == (3, 3, 0)

    def test_summary_p99_covers_the_requests_of_all_repeats(self) -> None:
        repeats = [run_of([outcome(float(i)) for i in range(n, 101, 2)], repeat=n) for n in range(2)]
        # 0, 1, …, 100: its 99th percentile is 99.
        estimate = summarize(repeats).estimates["ttft_p99"]
        assert estimate.value == pytest.approx(99)
        assert estimate.low <= 99 <= estimate.high <= 100

    def test_summary_of_one_repeat_states_no_spread_of_the_tail(self) -> None:
        assert tail([[1.0, 2.0]]) == Estimate(
            pytest.approx(1.99), pytest.approx(1.99), pytest.approx(1.99), 1
        )  # type: ignore[arg-type]

    def test_summary_widens_the_tail_range_for_a_slow_repeat(self) -> None:
        even = tail([[1.0 + i / 100 for i in range(40)]] * 5)
        odd = tail([[1.0 + i / 100 for i in range(40)]] * 4 + [[5.0] * 40])
        assert odd.spread > 5 * even.spread

    def test_summary_counts_errors_without_the_warmup(self) -> None:
        found = summarize([run_of([outcome(warmup=True), outcome(), outcome(error="lost")])])
        assert (found.requests, found.errors) == (2, 1)

    def test_summary_of_no_requests_is_refused(self) -> None:
        with pytest.raises(ValueError, match="without runs"):
            summarize([])

    def test_repeated_run_counts_once(self) -> None:
        (runs,) = group([*runs_with([0.1, 0.2]), *runs_with([0.5])]).values()
        assert [run.outcomes[0].ttft_s for run in runs] == [0.5, 0.2]


class TestComparison:
    def test_comparison_pairs_runs_by_repeat(self) -> None:
        baseline = runs_with([1.0, 2.0, 4.0, 9.0])
        subject = runs_with([0.5, 0.8, 2.4], system="pd-caching-3")
        found = compare(subject, baseline)["ttft_mean"]
        assert found.ratio.value == pytest.approx(0.5)
        assert (found.ratio.low, found.ratio.high) == pytest.approx((0.4, 0.6))
        assert (found.ratio.n, found.verdict) == (3, "better")
        assert found.change == pytest.approx(-0.5)

    def test_comparison_is_not_hidden_by_load_on_both_systems(self) -> None:
        found = compare(runs_with([0.9, 9.0, 1.8]), runs_with([1.0, 10.0, 2.0]))
        assert found["ttft_mean"].verdict == "better"

    @pytest.mark.parametrize(
        ("ratio", "higher_is_better", "verdict"),
        [
            (Estimate(0.9, 0.8, 0.99, 5), False, "better"),
            (Estimate(0.9, 0.8, 0.99, 5), True, "worse"),
            (Estimate(1.2, 1.1, 1.3, 5), False, "worse"),
            (Estimate(1.2, 1.1, 1.3, 5), True, "better"),
            (Estimate(1.2, 1.0, 1.3, 5), False, "equal"),
            (Estimate(0.5, 0.4, 0.6, 2), False, "unknown"),
        ],
    )
    def test_comparison_verdict_follows_the_range_of_ratios(
        self, ratio: Estimate, higher_is_better: bool, verdict: str
    ) -> None:
        assert verdict_on(ratio, higher_is_better) == verdict

    def test_comparison_leaves_out_repeats_without_a_ratio(self) -> None:
        baseline = [run_of([outcome(reused=0)], repeat=n) for n in range(3)]
        subject = [run_of([outcome(reused=50)], repeat=n) for n in range(3)]
        assert "reused_share" not in compare(subject, baseline)
        assert compare([], baseline) == {}


class TestAgreement:
    @pytest.mark.parametrize(
        ("first", "second", "agrees"),
        [
            (Estimate(1.0, 0.9, 1.1, 5), Estimate(1.1, 1.05, 1.15, 5), True),
            (Estimate(1.0, 0.9, 1.1, 5), Estimate(1.2, 0.95, 1.3, 5), True),
            (Estimate(1.0, 0.9, 1.1, 5), Estimate(1.2, 1.05, 1.3, 5), False),
            (Estimate(1.0, 1.0, 1.0, 1), Estimate(1.2, 1.2, 1.2, 1), None),
        ],
    )
    def test_agreement_needs_one_value_within_the_other_range(
        self, first: Estimate, second: Estimate, agrees: bool | None
    ) -> None:
        assert Pair("steps: x", "ttft_mean", first, second).agrees is agrees

    def test_agreement_of_a_run_with_itself_is_complete(self, measured: Path) -> None:
        found = agreement(measured, measured)
        assert found.agreeing == len(found.pairs) > 100
        assert not found.differing

    def test_agreement_names_differing_and_missing_figures(self, tmp_path: Path) -> None:
        for name, value, only in (("a", 1.0, "left"), ("b", 2.0, "right")):
            (tmp_path / name).mkdir()
            lines = [
                {"part": "micro", "name": "copy", "value": value, "unit": "GB/s", "n": 5, "spread": 0.1},
                {"part": "micro", "name": only, "value": 1.0, "unit": "s"},
            ]
            (tmp_path / name / "figures.jsonl").write_text("\n".join(map(json.dumps, lines)))
        found = agreement(tmp_path / "a", tmp_path / "b")
        assert [pair.what for pair in found.differing] == ["micro: copy"]
        assert (found.only_first, found.only_second) == (("micro: left",), ("micro: right",))


class TestCriteria:
    def test_criteria_compare_measured_gains_with_the_paper(self, tmp_path: Path) -> None:
        for run in [
            *runs_with([1.0] * 3),
            *runs_with([0.3] * 3, system="pd-caching-2"),
            *runs_with([0.21, 0.21, 0.18], system="pd-caching-3"),
        ]:
            write_run(tmp_path / "runs.jsonl", run)
        rows = {
            row.criterion.key + f"/{row.criterion.source}": row for row in judged(read_evidence(tmp_path))
        }
        paper = rows["criteria/sharegpt/ttft_mean/pd-basic/paper"]
        assert (paper.met, paper.clear) == (True, True)
        aim = rows["criteria/sharegpt/ttft_mean/pd-basic/aim"]
        assert (aim.met, aim.clear) == (False, False)
        assert rows["criteria/sharegpt/ttft_mean/pd-caching-2/aim"].met is False
        assert rows["criteria/loogle/ttft_mean/pd-basic/paper"].met is None

    def test_criteria_name_subject_and_baseline_of_each_part(self, measured: Path) -> None:
        evidence = read_evidence(measured)
        found = {
            part: (subject_of(evidence, part), baseline_of(evidence, part)) for part in ("steps", "stock")
        }
        assert found == {"steps": ("pd-caching-3", "pd-basic"), "stock": ("pd-caching-3", "stock-pd")}

    def test_report_names_a_losing_cell_with_its_cause(self, measured: Path) -> None:
        evidence = read_evidence(measured)
        lost = [one for one in faceoffs(evidence, "stock") if one.worse and one.other.system == "stock-pd"]
        assert "cells/stock-pd/react/over" in [one.key for one in lost]
        assert evidence.note("cells/stock-pd/react/over") == NOTES["cells/stock-pd"]


class TestFigures:
    @pytest.mark.parametrize(
        ("name", "line", "x"),
        [
            ("scale/tree/64/ttft_p99", "scale/tree/*/ttft_p99", 64),
            ("tokens=4K/loaded", "tokens=*/loaded", 4096),
            ("transfer/local/1024x16KiB/memmove", "transfer/local/*x16KiB/memmove", 1024),
            ("ratio/0.25", "ratio/*", 0.25),
        ],
    )
    def test_figure_plots_use_a_number_in_a_name_as_x(self, name: str, line: str, x: float) -> None:
        assert figure_plots.point_of(name) == (line, x)

    def test_figure_plots_draw_lines_from_three_points(self) -> None:
        figures = [Figure(f"a/{n}", 1.0) for n in (4, 1, 2)] + [Figure(f"b/{n}", 1.0) for n in (1, 2)]
        lines = figure_plots.lines_of(figures)
        assert {line: [x for x, _ in points] for line, points in lines.items()} == {"a/*": [1, 2, 4]}

    @pytest.mark.parametrize(
        ("unit", "ratio", "met"),
        [("GB/s", 0.7, False), ("GB/s", 0.9, True), ("ms", 0.9, False), ("bytes", 0.7, True)],
    )
    def test_figure_target_direction_follows_its_unit(self, unit: str, ratio: float, met: bool) -> None:
        assert Figure("x", 1.0, unit, ratio=ratio, target=0.8).target_met is met

    def test_figure_target_without_a_baseline_applies_to_the_value(self) -> None:
        assert Figure("x", 0.9, "of cells", target=1.0).target_met is False
        assert Figure("x", 1.0, "of cells", target=1.0).target_met is True

    def test_simulation_check_figures_have_no_target(self) -> None:
        assert Figure("scale/check/x/ttft", 1.1, "s", baseline=1.0, ratio=1.1, target=1.0).target_met is None

    def test_figures_skip_a_truncated_line_and_report_a_broken_one(self, tmp_path: Path) -> None:
        path = tmp_path / "figures.jsonl"
        path.write_text('{"name": "a", "value": 1}\n{"name": "b", "va')
        assert [figure.name for figure in read_figures(path)] == ["a"]
        path.write_text('{"name": "a", "va\n{"name": "b", "value": 1}\n')
        with pytest.raises(NothingMeasuredError, match=r"figures.jsonl:1: not a figure"):
            read_figures(path)

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0, "0"), (1234.5, "1,234"), (45.678, "45.7"), (0.123, "0.12"), (0.000012, "1.2e-05")],
    )
    def test_report_numbers_are_short(self, value: float, text: str) -> None:
        assert number(value) == text


class TestPage:
    def test_report_page_needs_no_other_file(self, html: str) -> None:
        assert not re.search(r"https?://|\bsrc=|<link|@import|url\((?!#)", html)

    def test_report_page_has_every_cell_and_every_figure(self, html: str, measured: Path) -> None:
        evidence = read_evidence(measured)
        for load, rate in RATES.items():
            assert f"react, {load} saturation, {rate:.3g} requests/s offered" in html
        for system in STEPS:
            assert html.count(f"<td>{evidence.title(system)}</td>") >= len(RATES)
        assert all(f"<td>{figure.name}</td>" in html for figure in evidence.figures)

    def test_report_page_states_regressions_and_their_cause(self, html: str) -> None:
        assert NOTES["cells/stock-pd"] in html
        assert "not noted yet (cells/stock-pd-decode-cache/react/over)" in html
        assert "micro/transfer/mooncake/aggregated" in html.split("Did not reach what was promised")[1][:200]

    def test_report_page_has_conditions_and_unmeasured_parts(self, html: str) -> None:
        for text in ("2 x Example CPU", "threads.prefill", "its offload needs a kernel", NOTES["limits"]):
            assert text in html

    def test_report_svg_references_only_existing_ids(self, html: str) -> None:
        ids = re.findall(r' id="([^"]+)"', html)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)
        assert html.count("<svg") > 5

    def test_report_page_leaves_empty_parts_out(self, tmp_path: Path) -> None:
        (tmp_path / "figures.jsonl").write_text('{"part": "overheads", "name": "<pool>", "value": 1}\n')
        html = page.render(read_evidence(tmp_path))
        assert re.findall(r"<h2[^>]*>([^<]+)", html) == ["Conditions", "Overheads"]
        assert "&lt;pool&gt;" in html

    def test_report_page_of_one_unfinished_repeat_is_written(self, tmp_path: Path) -> None:
        line = line_of(run_of([outcome(), outcome(None, jct_s=None, tpot_s=None, error="lost")], load=""))
        (tmp_path / "runs.jsonl").write_bytes(line + line[:50])
        html = page.render(read_evidence(tmp_path))
        assert "2 requests measured, <b>1 of them failed</b>" in html

    def test_report_page_of_failed_requests_only_is_written(self, tmp_path: Path) -> None:
        failed = outcome(None, jct_s=None, tpot_s=None, error="lost")
        (tmp_path / "runs.jsonl").write_bytes(line_of(run_of([failed])))
        assert "<b>1 of them failed</b>" in page.render(read_evidence(tmp_path))


class TestProgram:
    def test_report_program_prints_the_headline_as_markdown(self, measured: Path) -> None:
        text = headline_markdown(read_evidence(measured))
        assert "| react | TTFT mean | PD-Basic | −78% (the paper) | " in text
        assert "| PD-Caching-3 | " in text

    def test_report_program_reports_a_missing_directory(self, tmp_path: Path) -> None:
        command = [sys.executable, make_file, str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "no such directory" in done.stderr
        assert "Traceback" not in done.stderr

    def test_report_program_reports_an_empty_run(self, tmp_path: Path) -> None:
        with pytest.raises(NothingMeasuredError, match="nothing measured yet"):
            make_report(tmp_path)


def line_of(run: Run) -> bytes:
    return msgspec.json.encode(run) + b"\n"
