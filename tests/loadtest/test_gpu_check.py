"""What `make gpu-check` makes of what engines did."""

from dataclasses import replace

from loadtest.bench.policies.gpu_check import SPLIT, TWO, Round, attempted, bodies, faults, table

STOCK = Round("stock", ("a", "b", "c", "d"), tokens=400, seconds=2.0, memory_bytes=8 * 1024**3, energy_j=800.0)
GOOD = replace(STOCK, name="vtc", seconds=2.05, has_plugin=True)


def test_an_engine_as_quick_as_stock_with_its_answers_is_fine() -> None:
    assert faults(STOCK, GOOD) == []
    row = table([STOCK, GOOD]).splitlines()[-1]
    assert row == "| vtc | 195 | 0.98 | 100% | 0 | 0 | 8.0 GiB | 2.00 | ok |"


def test_what_is_not_as_it_should_be_is_named() -> None:
    assert faults(STOCK, replace(GOOD, has_plugin=False)) == ["the plug-in shows no metrics"]
    assert faults(STOCK, replace(GOOD, seconds=4.0)) == ["0.50 of stock's throughput"]
    assert faults(STOCK, replace(GOOD, answers=("a", "b", "x", "y"))) == ["only 50% of its greedy answers are stock's"]
    assert faults(STOCK, replace(GOOD, name="mlfq")) == ["nothing was displaced"]
    # What was displaced is computed again: that costs, and is no fault.
    assert faults(STOCK, replace(GOOD, name="mlfq", displaced=7, seconds=4.0)) == []


def test_on_a_cpu_there_is_neither_memory_nor_energy_to_tell() -> None:
    row = table([replace(STOCK, memory_bytes=0, energy_j=0.0)]).splitlines()[-1]
    assert row == "| stock | 200 | 1.00 | 100% | 0 | 0 | - | - |  |"


def test_what_died_is_a_row_that_says_so_and_the_rest_is_judged() -> None:
    def dies() -> Round:
        raise RuntimeError("the engine did not start:\nCUDA out of memory | GPU 0")

    dead = attempted("vtc", dies)
    rows = table([STOCK, dead, replace(GOOD, name="fcfs")]).splitlines()[3:]
    assert rows[0] == "| vtc | - | - | - | - | - | - | - | failed: CUDA out of memory / GPU 0 |"
    assert rows[1].endswith("| ok |")
    rows = table([replace(dead, name="stock"), GOOD]).splitlines()[2:]
    assert "failed: CUDA" in rows[0] and "nothing to compare with" in rows[1]


def test_requests_are_alike_for_every_engine_and_differ_among_themselves() -> None:
    assert bodies("m", 8) == bodies("m", 8)
    assert {body["max_tokens"] for body in bodies("m", 8)} == {16, 256}


def test_of_a_whole_system_answers_and_the_way_between_its_engines_count() -> None:
    """Its throughput is another machine's: two engines share what stock has for itself."""
    slow = replace(GOOD, has_plugin=False, seconds=9.0)
    assert faults(STOCK, replace(slow, name=TWO)) == []
    assert faults(STOCK, replace(slow, name=SPLIT)) == ["no prompt was handed over"]
    assert faults(STOCK, replace(slow, name=SPLIT, handed_over=3)) == []
