"""vLLM's message queue between two processes, with the waiting of scheduler/vllm/waiting.py."""

import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.distributed.device_communicators.shm_broadcast import Handle, MessageQueue, SpinCondition

from scheduler.vllm.waiting import LATEST_MS, sleep_while_waiting, wait

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

HOW_OFTEN = "how often did you look since I last asked?"
LIMIT_S = 60.0


def read(handle: Handle, told: Connection) -> None:
    """A reader as in vLLM's worker: sends back what it gets, or how often it has looked for a message."""
    sleep_while_waiting()
    looks = 0
    sleep = SpinCondition.wait

    def counted(condition: Any, timeout_ms: int | None = None) -> None:
        nonlocal looks
        looks += 1
        sleep(condition, timeout_ms)

    SpinCondition.wait = counted
    queue = MessageQueue.create_from_handle(handle, 0)
    queue.wait_until_ready()
    while True:
        message = queue.dequeue(indefinite=True)
        told.send(looks if message == HOW_OFTEN else message)
        looks *= message != HOW_OFTEN


class Pair:
    """A queue whose reader is another process."""

    def __init__(self) -> None:
        self.queue = MessageQueue(1, 1)
        self._heard, told = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        self.reader = context.Process(target=read, args=(self.queue.export_handle(), told), daemon=True)
        self.reader.start()
        self.queue.wait_until_ready()

    def send(self, message: object) -> Any:
        """What the reader says to it."""
        self.queue.enqueue(message)
        assert self._heard.poll(LIMIT_S), f"no word of {message!r}"
        return self._heard.recv()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """One for all tests, for the reader imports vLLM."""
    made = Pair()
    yield made
    made.reader.kill()
    made.reader.join()


def test_a_reader_gets_every_message_in_order(pair: Pair) -> None:
    assert [pair.send(number) for number in range(200)] == list(range(200))


def test_a_waiting_reader_hardly_ever_looks(pair: Pair) -> None:
    """vLLM's own looks without a pause for a second after the last message."""
    pair.send(HOW_OFTEN)
    for number in range(2):
        pair.send(number)
        time.sleep(0.5)  # as an engine computes a step
    assert pair.send(HOW_OFTEN) < 200


def test_a_lost_wake_up_costs_no_message(pair: Pair) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pair.queue._spin_condition, "notify", lambda: None)
        assert [pair.send(number) for number in range(4)] == [0, 1, 2, 3]


def test_it_looks_again_the_later_the_longer_it_is_silent_and_within_a_tenth_of_a_second() -> None:
    naps: list[int] = []

    def poll(timeout_ms: int) -> list[tuple[object, int]]:
        naps.append(timeout_ms)
        return []

    for silent_s, timeout_ms in ((0.2, None), (3600.0, None), (3600.0, 7)):
        condition = SimpleNamespace(
            last_read=time.monotonic() - silent_s, poller=SimpleNamespace(poll=poll), local_notify_socket=object()
        )
        wait(condition, timeout_ms)
    assert 50 <= naps[0] <= naps[1] == LATEST_MS == 100
    assert naps[2] == 7


def test_vllm_waits_where_we_say_how() -> None:
    assert "_spin_condition" in MessageQueue.acquire_read.__wrapped__.__code__.co_names
    assert {"last_read", "poller", "local_notify_socket"} <= set(SpinCondition.__init__.__code__.co_names)
