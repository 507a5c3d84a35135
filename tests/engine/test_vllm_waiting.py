"""vLLM's message queue between two processes, with the waiting of scheduler/vllm/waiting.py."""

import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.distributed.device_communicators.shm_broadcast import Handle, MessageQueue, SpinCondition

from scheduler.vllm.waiting import sleep_while_waiting

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

END = "end"


def read(handle: Handle, told: Connection) -> None:
    """A reader as in vLLM's worker; tells what it gets, when, and at the end what it used of the processor."""
    sleep_while_waiting()
    queue = MessageQueue.create_from_handle(handle, 0)
    queue.wait_until_ready()
    started = time.process_time()
    while (message := queue.dequeue(indefinite=True)) != END:
        told.send((message, time.monotonic()))
    told.send((END, time.process_time() - started))


class Pair:
    """A queue whose reader is another process."""

    def __init__(self) -> None:
        self.queue = MessageQueue(1, 1)
        self.heard, told = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("spawn")
        self.reader = context.Process(target=read, args=(self.queue.export_handle(), told), daemon=True)
        self.reader.start()
        self.queue.wait_until_ready()

    def late_s(self, message: int) -> float:
        """How long after it was sent the reader had it."""
        sent_at = time.monotonic()
        self.queue.enqueue(message)
        got, at = self.heard.recv()
        assert got == message
        return float(at) - sent_at

    def end(self) -> float:
        """Ends the reader; what it used of the processor."""
        self.queue.enqueue(END)
        used_s = float(self.heard.recv()[1])
        self.reader.join(30)
        return used_s


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.reader.kill()
    made.reader.join()


def test_a_reader_gets_every_message_in_order_and_soon(pair: Pair) -> None:
    assert sorted(pair.late_s(number) for number in range(200))[150] < 0.05
    pair.end()


def test_a_waiting_reader_leaves_the_processor_alone(pair: Pair) -> None:
    """vLLM's own looks for a message for a second after the last one, with all of a core."""
    for number in range(3):
        pair.late_s(number)
        time.sleep(0.7)  # as an engine computes a step
    assert pair.end() < 0.5


def test_a_lost_wake_up_costs_no_more_than_a_tenth_of_a_second_and_a_bit(pair: Pair) -> None:
    pair.late_s(0)
    pair.queue._spin_condition.notify = lambda: None
    for number in range(1, 4):
        time.sleep(0.2)
        assert pair.late_s(number) < 1.0  # vLLM's own looks again after five
    pair.end()


def test_vllm_waits_where_we_say_how() -> None:
    assert "_spin_condition" in MessageQueue.acquire_read.__wrapped__.__code__.co_names
    assert {"last_read", "poller", "local_notify_socket"} <= set(SpinCondition.__init__.__code__.co_names)
