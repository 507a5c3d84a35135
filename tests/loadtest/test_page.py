"""The page is whole, says the numbers, and fetches nothing."""

import re
from html.parser import HTMLParser
from random import Random

import pytest
from msgspec.structs import replace

from loadtest.records import Ending, Record, Recorded, Run, Sample
from loadtest.report import report
from loadtest.report.comparison import Ratio, Side, measure, ratio, side_of
from loadtest.report.page import page, rows_of, times

OBJECTIVE = report.Objective(1.0, 0.05)
VOID = {"meta", "circle", "path", "br", "rect", "link", "img"}


class Reader(HTMLParser):
    """Fails where tags do not match; keeps the text and every attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.counts: dict[str, int] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def side(name: str, factor: float = 1.0, *, repetitions: int = 1, tenants: int = 2, count: int = 120) -> Side:
    runs = []
    for repetition in range(repetitions):
        rng = Random(repetition)
        records = []
        for at in range(count):
            ttft_s, gap_us = factor * rng.uniform(0.1, 2.0), round(factor * rng.uniform(5e3, 1e5))
            gaps = [gap_us] * 9
            records.append(
                Record(
                    str(at), f"t{at % tenants}", at / 4, at / 4, ttft_s + sum(gaps) / 1e6, 100, 10, ttft_s=ttft_s,
                    gaps_us=gaps, asked_tokens=10,
                )
            )  # fmt: skip
        records[3] = Record("bad", "t0", 1.0, 1.0, 0.1, 10, 0, ending=Ending.LIMITED, status=429, asked_tokens=10)
        samples = [Sample(float(at), 3.0 + at, 8.0, 0.25, at) for at in range(20)]
        run = Run(
            "http://127.0.0.1:9", "workload <C>", "2026-01-01T00:00:00+00:00", options={"policy": name},
            command=f"evenhand replay C --policy {name}", machine="2 × A Fast One", versions={"python": "3.11"}, late=4,
        )  # fmt: skip
        runs.append(Recorded(run, records, samples))
    return Side(name, runs, [report.summarize_run(run, OBJECTIVE) for run in runs])


def test_one_run_is_told_in_numbers_and_pictures() -> None:
    one = side("vtc")
    read = Reader(page([one], OBJECTIVE, command="evenhand report x.jsonl --html x.html"))
    said = " ".join(read.text)
    summary = one.summaries[0]
    assert f"{summary.ttft.p50 * 1000:.3g} ms" in said or f"{summary.ttft.p50:.3g} s" in said
    assert f"{summary.output_tokens_per_s:,.0f}" in said
    assert summary.attainment is not None
    assert f"{summary.attainment.share:.1%}" in said
    assert "1 limited" in said
    for title in ("Time to first token", "Between tokens (ITL)", "Requests in flight", "Preemptions so far",
                  "Service difference", "Jain's index", "Inside, as both limits are stretched"):  # fmt: skip
        assert title in said
    for fact in ("evenhand replay C --policy vtc", "2 × A Fast One", "python 3.11", "4 of 120 requests"):
        assert fact in said
    assert read.counts["svg"] >= 15


def test_nothing_is_fetched_and_nothing_runs() -> None:
    html = page([side("fcfs"), side("vtc", 0.5)], OBJECTIVE)
    read = Reader(html)
    assert not {"script", "link", "img", "iframe", "image", "use"} & set(read.counts)
    assert not [name for name, _ in read.attributes if name in ("src", "href", "srcset", "xlink:href")]
    assert "url(" not in html
    assert "@import" not in html


def test_what_comes_from_outside_is_escaped() -> None:
    html = page([side("<script>")], OBJECTIVE)
    assert "<script" not in html
    assert "workload &lt;C&gt;" in html


def test_several_runs_have_ratios_to_the_first() -> None:
    said = " ".join(Reader(page([side("fcfs"), side("vtc", 0.5)], OBJECTIVE)).text)
    assert "How many times better" in said
    assert re.search(r"2\.00×", said)
    assert "resampling blocks" in said


def test_repetitions_are_told_with_their_range() -> None:
    said = " ".join(Reader(page([side("fcfs", repetitions=3), side("vtc", 0.5, repetitions=3)], OBJECTIVE)).text)
    assert "3 repetitions" in said
    assert "Curves over time are of the first repetition." in said


def test_runs_at_several_rates_make_a_goodput_curve() -> None:
    pages = page([side("fcfs@1", 0.3), side("fcfs@2", 2.0, count=240)], OBJECTIVE)
    assert "Inside, by offered rate" in pages
    assert "Inside, by offered rate" not in page([side("fcfs"), side("vtc")], OBJECTIVE)


def test_runs_at_several_rates_are_compared_at_the_same_one() -> None:
    said = " ".join(Reader(page([side(name, factor) for name, factor in LOADS], OBJECTIVE)).text)
    assert "better than fcfs at the same load" in said
    assert "vtc@2  against fcfs@2:" in said
    assert "fcfs@2  against" not in said


LOADS = (("fcfs@1", 0.3), ("vtc@1", 0.2), ("fcfs@2", 2.0), ("vtc@2", 1.0))


def test_what_was_not_measured_is_said_to_be_so() -> None:
    said = " ".join(Reader(page([side("x", tenants=1)])).text)
    assert "Inside the objective" not in said, "no section for what was not asked"
    assert "Between tenants" not in said
    assert said.count("not measured") == 3  # PCU, AEC, MCR
    assert "of the KV cache" in said


def test_what_engines_told_of_their_machine_is_shown() -> None:
    one = side("x", tenants=1)
    told = [
        Sample(float(at), 0.0, 8.0, 0.25, slots=16.0, joules={"GPU-1": 90.0 * at}, gpu_use=0.5, compression=3.2)
        for at in range(20)
    ]
    run = Recorded(one.runs[0].run, one.runs[0].records, told)
    said = " ".join(Reader(page([Side("x", [run], [report.summarize_run(run)])])).text)
    assert "not measured" not in said and "90.0 W" in said and "50% of the batch" in said and "3.20" in said


def test_the_page_of_a_few_thousand_requests_stays_small() -> None:
    assert len(page([side("a", count=3000), side("b", 0.5, count=3000)], OBJECTIVE)) < 400_000


def test_a_run_in_which_everything_failed_still_has_a_page() -> None:
    failed = [Record("a", "t", 0.0, 0.0, 0.1, 10, 0, ending=Ending.FAILED, status=500)] * 2
    one = Side("x", [Recorded(None, failed, [])], [report.summarize(failed, OBJECTIVE)])
    said = " ".join(Reader(page([one], OBJECTIVE)).text)
    assert "2 failed" in said
    assert "do not say how they were made" in said


@pytest.mark.parametrize(("ratio", "told"), [(0.0334, "0.033×"), (0.871, "0.87×"), (1.9, "1.90×"), (61.2, "61×")])
def test_how_many_times_is_short(ratio: float, told: str) -> None:
    assert times(ratio) == told


def test_runs_that_are_alike_are_drawn_once_and_nothing_is_bold() -> None:
    said = page([side("one", tenants=1), side("two", tenants=1)])
    assert "all alike" in said
    assert "<b>1.00×</b>" not in said
    assert "service difference" not in said, "there is one tenant"
    assert "Between tenants" not in said


def test_an_effect_below_one_percent_is_no_finding_however_sure() -> None:
    assert not Ratio(1.004, 1.002, 1.006).clear
    assert Ratio(1.02, 1.01, 1.03).clear
    assert not Ratio(1.02, 0.99, 1.03).clear


def test_runs_offered_different_loads_are_not_compared_in_throughput() -> None:
    slow = side("slow")
    (run,) = slow.runs
    records = [replace(record, due_s=record.due_s / 2, sent_s=record.sent_s / 2) for record in run.records]
    quick = side_of("quick", Recorded(run.run, records, []), None)
    throughput = measure("output tokens/s")
    assert ratio(throughput, slow, quick) is None
    assert ratio(throughput, slow, slow) is not None
    said = page([slow, quick])
    assert "slow was offered 4 requests/s and quick 8 requests/s: throughput follows the load" in said


@pytest.mark.parametrize("number", range(1, 13))
def test_no_row_of_pictures_has_a_single_one(number: int) -> None:
    columns = {"by2": 2, "by4": 4, "": 3}[rows_of(number)]
    assert number == 1 or number % columns != 1
