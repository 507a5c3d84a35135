"""`evenhand bench replicas`: what is asked, how shares and errors are taken, and that the real thing runs."""

import argparse
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from loadtest.bench.scale.replicas import (
    TENANTS,
    add_arguments,
    calls,
    error,
    made_up,
    measured,
    repeated,
    shares_of,
    summary,
    table,
    tenant_file,
)
from loadtest.records import Record
from server.request.tenants import new_key

SHARES = {
    "one gateway": {"a": 0.5, "b": 0.495, "c": 0.005},
    "two": {"a": 0.49, "b": 0.5, "c": 0.01},
    "one again": {"a": 0.5, "b": 0.495},
}


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)


def test_made_up_requests_have_the_tenants_of_the_arena_trace() -> None:
    rows = made_up(Random(1))
    assert len(TENANTS) == 27 and len(rows) == 1500
    assert sorted(Counter(row.tenant for row in rows).values(), reverse=True) == list(TENANTS)
    assert [row.at_s for row in rows] == sorted(row.at_s or 0.0 for row in rows)


def test_a_trace_goes_on_from_its_beginning_in_the_same_order() -> None:
    rows = made_up(Random(1))
    more = repeated(rows, 3200)
    assert [row.tenant for row in more] == [row.tenant for row in [*rows, *rows, *rows[:200]]]
    times = [row.at_s or 0.0 for row in more]
    assert times == sorted(times) and len(set(times)) == len(times)


def test_twice_the_load_is_the_same_requests_in_half_the_time() -> None:
    slow = calls(arguments("--load", "1", "--requests", "200"))
    fast = calls(arguments("--load", "2", "--requests", "200"))
    assert [call.tenant for call in slow] == [call.tenant for call in fast]
    assert fast[-1].at_s == pytest.approx(slow[-1].at_s / 2)


def test_a_share_is_of_what_was_served_until_the_end_of_the_requests() -> None:
    def record(tenant: str, sent_s: float, output_tokens: int) -> Record:
        gaps = [100_000] * (output_tokens - 1)
        return Record(tenant, tenant, sent_s, sent_s, 0.1 * output_tokens, 10, output_tokens, ttft_s=0.1, gaps_us=gaps)

    records = [record("a", 0.0, 10), record("b", 0.0, 40), record("late", 3.0, 40)]
    shares = shares_of(records, at_s=2.0)
    assert shares["late"] == 0.0
    assert shares["a"] == pytest.approx(30 / (30 + 50), rel=0.1)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_an_error_is_a_part_of_what_the_share_should_be() -> None:
    assert [error(share, 0.5) for share in (0.55, 0.45)] == pytest.approx([0.1, 0.1])
    assert error(0.0, 0.0) == 0.0 and error(0.1, 0.0) == 1.0


def test_the_table_and_what_follows_from_it() -> None:
    lines = table(SHARES).splitlines()
    assert lines[2] == "| a | 50.00% | 49.00% (2.0%) | 50.00% (0.0%) |"
    assert lines[4] == "| c | 0.50% | 1.00% (100.0%) | 0.00% (100.0%) |"
    two, again = summary(SHARES)
    assert two.startswith("two: largest error 2.0% among the 2 tenants with at least 1% of the service")
    assert "1.0% of all service went to others" in two
    assert again.startswith("one again: largest error 0.0%")


def test_two_processes_serve_the_requests_that_one_serves(tmp_path: Path) -> None:
    asked = calls(arguments("--requests", "30"))
    keys = {tenant: new_key() for tenant in {call.tenant for call in asked}}
    options = ["--policy", "vtc", "--tenants", str(tenant_file(tmp_path, keys))]
    shares = measured([[*options, "--gateway-processes", "2"]], asked, keys, seed=1)
    assert set(shares) == set(keys)
    assert sum(shares.values()) == pytest.approx(1.0)
