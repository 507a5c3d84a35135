"""How vLLM's processes wait for each other's messages where they share cores: asleep.

vLLM looks for a message over and over for a second, and gives way (`sched_yield`) between two looks. Linux's
scheduler can hold that against a process: with Linux 6.18 one that had waited so was seen to get its message 0.4 s
late (kernel commit 79104becf42b tells of such delays after many yields). Who sleeps is woken at once.

A wake-up can get lost: the socket that brings it keeps the last one only, and its reader can fall asleep past it. vLLM
looks again after five seconds; here it is the sooner the shorter the last message is ago.
"""

import time
from typing import Any

import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

SOONEST_MS, LATEST_MS = 1, 100  # zmq knows whole milliseconds
SHARE = 4  # of the time since the last message, the part after which it looks again


def sleep_while_waiting() -> None:
    """From here on, readers in this process sleep."""
    SpinCondition.wait = wait


def wait(condition: Any, timeout_ms: int | None = None) -> None:
    """Returns when there may be a message, when the reader shall end, or when it is time to look again."""
    silent_ms = 1e3 * (time.monotonic() - condition.last_read)
    nap_ms = min(LATEST_MS, max(SOONEST_MS, int(silent_ms / SHARE)))
    events = dict(condition.poller.poll(nap_ms if timeout_ms is None else min(timeout_ms, nap_ms)))
    if condition.local_notify_socket in events:
        condition.local_notify_socket.recv(flags=zmq.NOBLOCK, copy=False)
