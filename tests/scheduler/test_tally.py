"""What is told of service, gap and stalls follows from what happened to the jobs."""

from itertools import count

from scheduler.fairness import OTHER, FairnessTally
from scheduler.jobs import Job

ids = count()


def job(tenant: str, prompt: int = 10, weight: float = 1.0) -> Job:
    return Job(f"j{next(ids)}", tenant, prompt_tokens=prompt, arrived_at=0.0, weight=weight)


def run(tally: FairnessTally, one: Job, output_tokens: int) -> None:
    tally.queued(one)
    tally.started(one, 0.0)
    one.output_tokens = output_tokens
    tally.left(one, was_waiting=False, now=0.0)


def test_service_is_booked_once_whether_a_job_is_seen_running_or_gone() -> None:
    tally, one = FairnessTally(), job("a")
    tally.queued(one)
    tally.started(one, 0.0)
    one.output_tokens = 3
    assert tally.sample(1.0).service == {"a": 10 + 2 * 3}
    one.output_tokens = 5
    tally.left(one, was_waiting=False, now=2.0)
    assert tally.sample(2.0).service == {"a": 2 * 2}
    assert tally.sample(3.0).service == {}


def test_prompt_tokens_from_the_cache_are_no_service() -> None:
    tally, one = FairnessTally(), job("a", prompt=100)
    one.cached_tokens = 96
    run(tally, one, 1)
    assert tally.sample(1.0).service == {"a": 4 + 2}


def test_a_job_that_never_started_got_nothing() -> None:
    tally, one = FairnessTally(), job("a")
    tally.queued(one)
    tally.left(one, was_waiting=True, now=1.0)
    sample = tally.sample(1.0)
    assert (sample.service, sample.gap) == ({}, 0.0)


def test_the_gap_is_between_those_who_wait_and_divided_by_their_weight() -> None:
    tally = FairnessTally()
    for tenant, weight in (("light", 1.0), ("heavy", 4.0), ("away", 1.0)):
        run(tally, job(tenant, prompt=100, weight=weight), 150)
    tally.queued(job("light"))
    tally.queued(job("heavy"))
    assert tally.sample(1.0).gap == 400 - 100


def test_time_away_is_no_claim() -> None:
    tally = FairnessTally()
    tally.queued(job("busy"))
    tally.sample(0.0)
    run(tally, job("busy", prompt=0), 500)
    tally.sample(1.0)
    tally.queued(job("back"))
    assert tally.sample(2.0).gap == 0.0
    run(tally, job("busy", prompt=0), 50)
    assert tally.sample(3.0).gap == 100.0


def test_the_longest_stall_counts_those_stalled_now_and_those_just_resumed() -> None:
    tally, first, second = FairnessTally(), job("a"), job("a")
    for one in (first, second):
        tally.queued(one)
        tally.started(one, 0.0)
    tally.preempted(first, 10.0)
    tally.preempted(second, 12.0)
    assert tally.sample(15.0).longest_stall_s == 5.0
    tally.started(first, 16.0)
    assert tally.sample(17.0).longest_stall_s == 6.0
    assert tally.sample(18.0).longest_stall_s == 6.0
    tally.left(second, was_waiting=True, now=19.0)
    assert tally.sample(19.0).longest_stall_s == 7.0
    assert tally.sample(20.0).longest_stall_s == 0.0


def test_the_largest_tenants_are_named_and_the_rest_are_other() -> None:
    tally = FairnessTally(labels=3)
    for number in range(10):
        run(tally, job(f"t{number}", prompt=number), 0)
    assert tally.sample(1.0).service == {"t9": 9, "t8": 8, "t7": 7, OTHER: 21}


def test_names_given_out_are_bounded_however_many_tenants_grow_large() -> None:
    tally, seen = FairnessTally(labels=3), set[str]()
    for number in range(100):
        run(tally, job(f"t{number}", prompt=10 + number), 0)
        seen |= tally.sample(float(number)).service.keys()
    assert len(seen - {OTHER}) <= 4 * 3


def test_tenants_without_a_job_are_forgotten_once_there_are_very_many() -> None:
    tally = FairnessTally()
    for number in range(12_000):
        run(tally, job(f"t{number}"), 1)
    tally.sample(1.0)
    assert len(tally._level) == len(tally._total) == 0


def test_a_stall_goes_on_when_a_job_is_taken_and_cannot_start() -> None:
    tally, one, other = FairnessTally(), job("a"), job("b")
    tally.queued(one)
    tally.started(one, 0.0)
    tally.preempted(one, 10.0)
    tally.queued(other)
    tally.started(other, 11.0)
    tally.preempted(other, 12.0)
    tally.started(one, 15.0)  # looked at while its last step is in flight, and skipped
    tally.put_back(one)
    assert tally.sample(15.0).longest_stall_s == 5.0
    assert tally.sample(40.0).longest_stall_s == 30.0
    tally.started(one, 41.0)
    assert tally.sample(42.0).longest_stall_s == 31.0
    assert tally.sample(43.0).longest_stall_s == 43.0 - 12.0


def test_a_queue_may_tell_only_what_is_there_and_what_has_ended() -> None:
    told, seen = FairnessTally(), FairnessTally()
    runs, ends = job("a", prompt=100), job("b", prompt=30)
    for one in (runs, ends):
        told.queued(one)
        told.started(one, 0.0)
        one.output_tokens = 7
    told.queued(job("c"))
    told.left(ends, was_waiting=False, now=1.0)
    seen.finished(ends)
    for _ in range(2):
        seen.present([runs], {"c": 1})
        assert seen.sample(2.0) == told.sample(2.0)
        runs.output_tokens += 5
