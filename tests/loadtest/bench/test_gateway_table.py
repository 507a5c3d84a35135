"""The table: what is a ratio within a repetition, and what a reader is told beside it."""

from typing import Any

from loadtest.bench.gateway.gateway_table import HEAD, Runs, TableRun, notes, table
from loadtest.bench.gateway.relay_load import Observed


def seen(*, cpu_s: float = 0.0, pss_bytes: int = 0, others: float = 0.0, **load: Any) -> Observed:
    return Observed({"errors": 0, "error": "", "seconds": 2.0, **load}, cpu_s, pss_bytes, others)


def run(requests: int, cpu_us: float, first_byte_us: float, *, carried: int = 51_200, **more: Observed) -> TableRun:
    return TableRun(
        {
            "idle": seen(first_byte_us={"p50": first_byte_us, "p99": 2 * first_byte_us}),
            "whole": seen(requests=requests),
            "paced": seen(cpu_s=cpu_us, all_chunks=1_000_000),
            "many": seen(chunks=carried, chunk_delay_us={"p99": 6_500.0}),
            **more,
        }
    )


def direct(first_byte_us: float) -> TableRun:
    return TableRun({"idle": seen(first_byte_us={"p50": first_byte_us, "p99": 2 * first_byte_us})})


def runs() -> Runs:
    weighed = seen(pss_bytes=250_000_000, open=9_900)
    return {
        "direct": [direct(100.0), direct(200.0), direct(100.0)],
        "nginx": [run(40_000, 20.0, 300.0, open=weighed), run(80_000, 10.0, 300.0), run(40_000, 20.0, 300.0)],
        "ours": [run(10_000, 30.0, 600.0, open=weighed), run(40_000, 16.0, 600.0), run(12_000, 32.0, 600.0)],
    }


def cells(text: str, name: str) -> dict[str, str]:
    """A gateway's cells by the names of the columns; of two with one name the first."""
    for line in text.splitlines():
        values = [value.strip() for value in line.strip("|").split("|")]
        if values[0] == name:
            return dict(reversed(list(zip(HEAD, values, strict=True))))
    raise AssertionError(f"there is no line for {name}")


def test_ratios_and_what_is_added_are_taken_within_a_repetition() -> None:
    ours = cells(table(runs(), "direct"), "ours")
    assert ours["requests/s"] == "6000 (5000–20000)"
    assert ours["÷ nginx"] == "0.30 (0.25–0.50)"
    assert ours["CPU per chunk, µs"] == "30.0 (16.0–32.0)"
    assert ours["added TTFB p50, ms"] == "0.50 (0.40–0.50)"
    assert ours["p99, ms"] == "1.00 (0.80–1.00)"
    assert ours["memory, MB"] == "250 with 9,900 streams"


def test_the_yardstick_comes_first_and_is_one() -> None:
    text = table(runs(), "direct")
    assert text.splitlines()[2].startswith("| nginx |")
    assert "direct" not in text
    assert cells(text, "nginx")["÷ nginx"] == "1.00 (1.00–1.00)"


def test_a_gateway_without_a_whole_repetition_has_no_line() -> None:
    assert "lost" not in table({**runs(), "lost": []}, "direct")


def test_a_reader_is_told_what_is_wrong_with_the_figures() -> None:
    told = runs()
    told["ours"][1] = TableRun({**told["ours"][1].phases, "whole": seen(requests=5, errors=3, error="status 502")})
    told["nginx"][0] = TableRun(
        {**told["nginx"][0].phases, "idle": seen(first_byte_us={"p50": 1, "p99": 1}, others=0.7)}
    )
    text = "\n".join(notes(told, 10_000, 9_900, one_core=True))
    assert "3 repetitions" in text
    assert "9,900 streams in place of 10,000" in text
    assert "one core for all" in text
    assert "up to 0.7 cores" in text
    assert "ours, repetition 2: 3 errors in phase 'whole', the first: status 502" in text


def test_a_clean_run_has_nothing_to_tell_but_how_often() -> None:
    assert len(list(notes(runs(), 9_900, 9_900, one_core=False))) == 1
