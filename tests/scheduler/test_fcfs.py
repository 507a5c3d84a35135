"""First come, first served."""

import random

from scheduler.catalog import build
from scheduler.jobs import Job
from scheduler.lanes import Lanes
from tests.scheduler.engine_model import Engine, Request


def test_jobs_start_in_order_of_arrival() -> None:
    rng = random.Random(1)
    requests = [
        Request(rng.uniform(0, 5), rng.randint(1, 900), rng.randint(1, 200), f"t{rng.randrange(4)}") for _ in range(300)
    ]
    lives = Engine(build("fcfs", {}), slots=8, kv_tokens=4000).run(requests)
    assert [life.request.at for life in lives] == sorted(request.at for request in requests)
    started = [life.started[0] for life in lives]
    assert started == sorted(started)


def test_nobody_is_displaced_and_the_newest_yields_when_memory_is_short() -> None:
    lanes = Lanes(build("fcfs", {}))
    jobs = [Job(str(number), "t", 10, 0.0) for number in range(4)]
    for job in jobs:
        lanes.push(job, 0.0)
    lanes.pop(0.0)
    lanes.pop(0.0)
    assert lanes.displacement(0.0) is None
    assert lanes.victim(0.0) is jobs[1]


def test_those_that_yielded_return_first_and_in_their_old_order() -> None:
    lanes = Lanes(build("fcfs", {}))
    jobs = [Job(str(number), "t", 10, 0.0) for number in range(4)]
    for job in jobs:
        lanes.push(job, 0.0)
    for _ in range(3):
        lanes.pop(0.0)
    for job in (jobs[2], jobs[1]):
        lanes.preempt(job, 0.1)
    assert [lanes.pop(0.2) for _ in range(3)] == [jobs[1], jobs[2], jobs[3]]
