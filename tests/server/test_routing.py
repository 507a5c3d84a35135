"""Where a request goes: by load, by what a worker remembers, and by nothing that is kept of a prompt's text."""

import json
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.bench.full_scan import FullScan
from scheduler.pools import Pools, WorkerLoad
from scheduler.routing import AFFINITY, LONGEST_BYTES, WORKERS_EACH, Affinity, Choice, beginnings, score
from scheduler.workers import Worker

TYPICAL = 500.0


def load_of(slots: int, pending_tokens: int = 0, others: int = 0, kv_usage: float = 0.0) -> WorkerLoad:
    worker = Worker("w", "http://127.0.0.1:9", slots=slots)
    return WorkerLoad(worker, pending_tokens=pending_tokens, others=others, kv_usage=kv_usage)


@dataclass(frozen=True)
class RouteOption:
    """A worker, and how much of the prompt it remembers."""

    slots: int
    pending_tokens: int = 0
    others: int = 0
    kv_usage: float = 0.0
    known_tokens: int = 0


def best(options: list[RouteOption], typical_tokens: float, choice: type[Choice] = Choice) -> int:
    """Index of the one that is taken."""
    pools, known = Pools(lambda worker: 10**6), {}
    for number, option in enumerate(options):
        load = load_of(option.slots, option.pending_tokens, option.others, option.kv_usage)
        load.worker = replace(load.worker, id=f"{number}")
        pools.add(load, ("m",))
        if option.known_tokens:
            known[f"{number}"] = option.known_tokens
    pools.of("m")[0].typical_tokens = typical_tokens
    pools.refresh()
    taken = choice(pools.of("m"), typical_tokens, known=known).cheapest()
    assert taken is not None
    return int(taken.worker.id)


IDLE = RouteOption(8)

# (what it shows, options, the one that is taken)
TABLE: list[tuple[str, list[RouteOption], int]] = [
    ("the only one", [RouteOption(8, 9000, 3, 0.9)], 0),
    ("the first of equals", [IDLE, IDLE, IDLE], 0),
    ("the one with less to compute", [RouteOption(8, 1000), RouteOption(8, 500)], 1),
    ("work counts by what a batch holds", [RouteOption(8, 1000), RouteOption(64, 4000)], 1),
    ("others' requests are work too", [RouteOption(8, 500, others=4), RouteOption(8, 1000)], 1),
    (
        "a full memory is a load, whatever the batch holds",
        [RouteOption(256, 500, kv_usage=0.6), RouteOption(256, 9000)],
        1,
    ),
    ("who remembers the prompt, among idle ones", [IDLE, RouteOption(8, known_tokens=32)], 1),
    ("who remembers more of it", [RouteOption(8, known_tokens=64), RouteOption(8, known_tokens=1024)], 1),
    ("who remembers a long conversation, though busier", [IDLE, RouteOption(8, 1500, known_tokens=4000)], 1),
    ("but not if its batch is fuller by half", [IDLE, RouteOption(8, 2000, known_tokens=10**9)], 0),
    ("nor if its memory is", [IDLE, RouteOption(8, kv_usage=0.6, known_tokens=10**9)], 0),
    ("a short common prompt does not outweigh one request", [IDLE, RouteOption(8, 500, known_tokens=100)], 0),
    ("overloaded all, it is still remembered", [RouteOption(8, 80_000), RouteOption(8, 80_500, known_tokens=4000)], 1),
]


@pytest.mark.parametrize("options, taken", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_best_option(options: list[RouteOption], taken: int) -> None:
    assert best(options, TYPICAL) == best(options, TYPICAL, FullScan) == taken


OPTIONS = st.builds(
    RouteOption,
    slots=st.integers(1, 512),
    pending_tokens=st.integers(0, 10**6),
    others=st.integers(0, 1000),
    kv_usage=st.floats(0, 1),
    known_tokens=st.integers(0, 10**6),
)


@given(option=OPTIONS, typical=st.floats(1, 1e5))
def test_what_is_remembered_is_worth_half_a_batch_at_most(option: RouteOption, typical: float) -> None:
    load = load_of(option.slots, option.pending_tokens, option.others, option.kv_usage)
    worth = score(load, typical, 0) - score(load, typical, option.known_tokens)
    assert -1e-6 <= worth <= AFFINITY + 1e-6  # as floats go


def turns(*said: str) -> bytes:
    """A chat request with these messages."""
    messages = [{"role": "user", "content": text} for text in said]
    return json.dumps({"model": "m", "messages": messages, "temperature": 0.5}).encode()


def known(affinity: Affinity, body: bytes) -> dict[str, int]:
    return dict(affinity.known(beginnings(body, "messages", 1000)))


def test_the_next_turn_of_a_conversation_is_known_to_whom_read_the_last() -> None:
    affinity = Affinity()
    first = turns("Tell me about the sea. " * 20)
    affinity.note(beginnings(first, "messages", 120), "a")
    affinity.note(beginnings(turns("Something else entirely. " * 20), "messages", 120), "b")
    second = turns("Tell me about the sea. " * 20, "And about its fish. " * 5)
    assert set(known(affinity, second)) == {"a"}
    assert 1000 * 0.3 < known(affinity, second)["a"] < 1000


def test_a_common_beginning_is_known_to_all_who_read_it_and_the_rest_to_one() -> None:
    affinity = Affinity()
    system = "You are a helpful assistant. " * 10
    for worker, question in (("a", "What is a fish? "), ("b", "What is a bird? ")):
        affinity.note(beginnings(turns(system, question * 60), "messages", 500), worker)
    seen = known(affinity, turns(system, "What is a bird? " * 60))
    assert 0 < seen["a"] < seen["b"]


def test_the_fields_before_the_prompt_do_not_matter() -> None:
    affinity = Affinity()
    text = "Once upon a time, " * 10
    affinity.note(beginnings(json.dumps({"model": "m", "seed": 1, "prompt": text}).encode(), "prompt", 40), "a")
    other = json.dumps({"seed": 22, "n": 1, "model": "m", "prompt": text}).encode()
    assert affinity.known(beginnings(other, "prompt", 40))


def test_a_prompt_shorter_than_a_cached_block_has_no_beginning() -> None:
    assert beginnings(b'{"prompt":"hi"}', "prompt", 1) == []
    assert beginnings(b"", "messages", 0) == []


def test_a_huge_prompt_has_few_beginnings() -> None:
    found = beginnings(b'"messages":' + b"x" * (8 * LONGEST_BYTES), "messages", 1000)
    assert len(found) == 15
    assert found[-1][1] <= 1000 // 8


def test_memory_is_bounded_and_the_longest_unused_goes_first() -> None:
    affinity = Affinity(most=10)
    affinity.note([(0, 5)], "a")
    for number in range(1, 100):
        affinity.note([(number, 5)], "a")
        affinity.note([(0, 5)], "a")
    assert len(affinity) == 10
    assert affinity.known([(0, 5)]) == {"a": 5}
    assert affinity.known([(80, 5)]) == {}


def test_a_beginning_remembers_the_last_few_who_read_it() -> None:
    affinity = Affinity()
    for number in range(10):
        affinity.note([(1, 5)], f"w{number}")
    assert set(affinity.known([(1, 5)])) == {f"w{number}" for number in range(10 - WORKERS_EACH, 10)}


def test_nothing_of_a_prompt_is_kept() -> None:
    affinity = Affinity()
    affinity.note(beginnings(turns("my secret " * 50), "messages", 100), "a")
    assert all(isinstance(key, int) for key in affinity._readers)
