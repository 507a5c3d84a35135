from pathlib import Path

import pytest
from msgspec.structs import replace

from loadtest.records import Ending, Fidelity, Kept, Record, Recorded, Run, load, write
from loadtest.report.fairness import fairness, jain
from loadtest.report.report import (
    Objective,
    client_lag,
    compare,
    goodput,
    markdown,
    spread,
    summarize,
    summarize_run,
    tenants,
    text,
)
from loadtest.report.trust import trust


def record(
    name: str = "a",
    *,
    tenant: str = "t",
    sent_s: float = 0.0,
    ttft_s: float | None = 0.5,
    e2e_s: float = 1.5,
    tokens: int = 11,
    ending: Ending = Ending.OK,
    gaps_us: list[int] | None = None,
    asked: int = 0,
    kind: str = "",
) -> Record:
    gap_us = round((e2e_s - (ttft_s or 0.0)) * 1e6 / max(1, tokens - 1))
    gaps = [gap_us] * (tokens - 1) if gaps_us is None else gaps_us
    return Record(
        name, tenant, sent_s, sent_s, e2e_s, 100, tokens, ending=ending, ttft_s=ttft_s, gaps_us=gaps,
        asked_tokens=asked or tokens, kind=kind,
    )  # fmt: skip


def test_every_latency_follows_its_definition() -> None:
    summary = summarize([record()])
    assert summary.ttft.mean == 0.5
    assert summary.tpot.mean == pytest.approx(0.1)
    assert summary.itl.p99 == pytest.approx(0.1)
    assert summary.per_token.mean == pytest.approx(1.5 / 11)
    assert summary.longest_gap.max == pytest.approx(0.1)
    assert summary.output_tokens_per_s == pytest.approx(11 / 1.5)


def test_percentiles_are_read_between_the_values() -> None:
    seen = spread([1.0, 2.0, 3.0, 4.0])
    assert (seen.count, seen.p50, seen.max) == (4, 2.5, 4.0)


def test_no_records_give_an_empty_summary_that_can_still_be_printed() -> None:
    summary = summarize([])
    assert summary.requests == 0
    assert "TTFT" in text(compare({"nothing": summary}))


def test_failed_requests_count_in_the_endings_and_not_in_the_latencies() -> None:
    bad = record("b", ttft_s=None, e2e_s=60.0, tokens=0, gaps_us=[], ending=Ending.LIMITED)
    summary = summarize([record(), bad])
    assert summary.endings == {"ok": 1, "limited": 1}
    assert summary.e2e.max == 1.5
    assert "1 limited" in text(compare({"run": summary}))


def test_an_objective_is_met_jointly_and_a_failure_misses_it() -> None:
    slow_start = record("b", ttft_s=3.0, e2e_s=3.5)
    slow_tokens = record("c", ttft_s=0.1, e2e_s=5.0)
    failed = record("d", ending=Ending.TRUNCATED)
    summary = summarize([record(), slow_start, slow_tokens, failed], Objective(1.0, 0.2))
    assert summary.attainment is not None
    assert summary.attainment.share == 0.25


def test_goodput_is_where_the_attainment_crosses_the_goal() -> None:
    assert goodput([(1, 1.0), (2, 1.0), (4, 0.8)]) == pytest.approx(3.0)
    assert goodput([(4, 0.95), (1, 0.99)]) == 4
    assert goodput([(1, 0.5)]) == 0.0


def test_jain_is_one_when_even_and_a_share_when_one_takes_all() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_a_starved_tenant_shows_in_every_fairness_measure() -> None:
    heavy = [record(f"h{at}", tenant="heavy", sent_s=at * 1.0) for at in range(60)]
    fed = [record(f"f{at}", tenant="light", sent_s=at * 1.0) for at in range(60)]
    starved = [record(f"s{at}", tenant="light", sent_s=at * 1.0, ttft_s=None, tokens=0, gaps_us=[], asked=11,
                      ending=Ending.TIMEOUT) for at in range(60)]  # fmt: skip
    even, uneven = fairness(heavy + fed), fairness(heavy + starved)
    assert even is not None
    assert uneven is not None
    assert even.difference.maximum == pytest.approx(0.0, abs=1e-6)
    assert uneven.difference.average > 100
    assert uneven.accumulated_gap == pytest.approx(60 * 122)
    assert (even.jain, uneven.jain) == (pytest.approx(1.0), pytest.approx(0.5))


def test_a_tenant_that_asks_for_little_is_no_unfairness() -> None:
    heavy = [record(f"h{at}", tenant="heavy", sent_s=at * 0.1, e2e_s=0.6, ttft_s=0.5) for at in range(600)]
    light = [record(f"l{at}", tenant="light", sent_s=at * 10.0, e2e_s=0.6, ttft_s=0.5) for at in range(6)]
    seen = fairness(heavy + light)
    assert seen is not None
    assert seen.difference.average < 30  # of more than a thousand per second served to the other


def test_a_window_leaves_out_warming_up(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    times = {"warm": 0.5, "a": 1.0, "b": 5.0, "c": 9.0}
    write(path, [replace(record(name, sent_s=at_s), warmup=name == "warm") for name, at_s in times.items()])
    assert [one.id for one in load(path).records] == ["a", "b", "c"]
    assert [one.id for one in load(path, 2.0, 9.0).records] == ["b"]
    assert [one.id for one in load(path, 0.0).records] == ["warm", "a", "b", "c"]


def test_tenants_come_most_served_first_and_the_rest_is_counted() -> None:
    records = [record(str(at), tenant=f"t{at}", tokens=at + 2) for at in range(5)]
    rows = tenants(summarize(records), most=2)
    assert [row[0] for row in rows] == ["tenant", "t4", "t3", "… 3 more"]


def test_a_table_is_markdown_too() -> None:
    lines = markdown([["", "a"], ["x", "1"]]).splitlines()
    assert lines == ["|  | a |", "| --- | ---: |", "| x | 1 |"]


def test_the_clients_own_lateness_is_told() -> None:
    assert "2.0 ms late" in client_lag(Run("u", "w", "now", lag_p99_s=0.002))


def test_failed_requests_are_in_no_latency_and_no_throughput() -> None:
    bad = record("b", ttft_s=9.0, e2e_s=20.0, tokens=1000, ending=Ending.TRUNCATED)
    summary = summarize([record(), bad])
    assert summary.ttft.max == 0.5
    assert summary.output_tokens_per_s == pytest.approx(11 / 20)
    assert summary.by_tenant["t"].ttft.max == 0.5


def test_a_long_run_is_reported_from_a_part_of_it_with_exact_totals() -> None:
    kept = Kept(most=50)
    for at in range(1000):
        kept.add(record(f"{at}", sent_s=at * 1.0, ttft_s=0.001 * at))
    assert 50 <= len(kept.records) <= 100
    run = Recorded.of(Run("u", "w", "now", requests=1000), kept, [])
    summary = summarize_run(run)
    assert (summary.requests, summary.endings, run.every) == (1000, {"ok": 1000}, 16)
    assert summary.ttft.p50 == pytest.approx(0.5, rel=0.05)
    assert summary.output_tokens_per_s == pytest.approx(11_000 / 1000.5, rel=0.01)
    assert summary.fairness is not None
    assert summary.fairness.service["t"] == pytest.approx(1000 * 122, rel=0.05)
    assert "every 16th request" in str(trust(run))


def test_tpot_ends_with_the_last_token_and_needs_more_than_one_event() -> None:
    assert record(gaps_us=[100_000] * 5, tokens=11).tpot_s == pytest.approx(0.05), "two tokens an event"
    assert record(gaps_us=[], tokens=11).tpot_s is None


def test_a_run_that_is_as_asked_is_trusted_and_one_that_is_not_says_why() -> None:
    good = Recorded(Run("u", "w", "now", lag_p99_s=0.001, lag_max_s=0.002, requests=1, fidelity=Fidelity(1, 100, 11)),
                    [record()], [])  # fmt: skip
    assert str(trust(good)) == (
        "Trust: Sent as asked, with the trace's own text; client late by 1.0 ms at P99, 2.0 ms at most; "
        "1 of 1 requests reported; not interrupted."
    )
    bad = Run("u", "w", "now", requests=9, late=3, interrupted=True, stopped="by SIGINT", skipped="1 row skipped")
    doubts = trust(Recorded(bad, [record(ending=Ending.UNFINISHED)], [])).doubts
    assert doubts == (
        "INTERRUPTED (by SIGINT): 1 requests unfinished",
        "of the trace, 1 row skipped",
        "3 of 9 requests sent more than 10 ms late",
    )
