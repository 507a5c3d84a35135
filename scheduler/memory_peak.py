"""Whether a batch will outgrow its KV memory: the future peak of LightLLM's Past-Future scheduler (ASPLOS'25).

An engine that starts a request as soon as its prompt fits runs out of memory when the answers grow, and must interrupt
some of them. Where it is known how long answers get, the largest amount that the batch will ever hold can be told in
advance: memory only grows from one end to the next, so that amount is reached when one of the answers ends.

Lengths are known as a distribution, and each job is given a length of its own out of it. With the mean for all, all
would end at once, and the peak would be overrated: of jobs that start together some have ended before others are long.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol
from zlib import crc32

from scheduler.jobs import Job

_STALE = 8  # an expectation is renewed when the answer has grown by this part of it


def peak_blocks(jobs: Iterable[tuple[float, float]], blocks_per_token: float) -> float:
    """The most blocks that jobs will hold together, each growing by one token a step until it ends.

    jobs: of each, the tokens that it still makes, and the blocks that it holds once its prompt is read.
    """
    held = most = 0.0
    for count, (rest_tokens, blocks) in enumerate(sorted(jobs, reverse=True), 1):
        held += blocks
        if (then := held + count * rest_tokens * blocks_per_token) > most:
            most = then
    return most


class Running(NamedTuple):
    """A job of the batch. has: KV blocks that it holds. wants: those that it holds once its prompt is read."""

    job: Job
    has: int
    wants: int


class RestTokens(Protocol):
    """`Order.rest_tokens`."""

    def __call__(self, job: Job, share: float | None = None, /) -> float: ...


class FuturePeak:
    """Admits a job to the batch if, with it, the batch is expected never to need more memory than there is.

    Who was held back is not looked at again until memory came free: to save the look, what is learned of lengths
    meanwhile is passed over.

    rest_tokens: as `Order.rest_tokens`. blocks_per_token: by which a job's memory grows.
    """

    def __init__(self, rest_tokens: RestTokens, blocks_per_token: float) -> None:
        self._rest_tokens = rest_tokens
        self._blocks_per_token = blocks_per_token
        self._expected: dict[Job, tuple[float, int]] = {}  # length of the answer, and from which length on to ask anew
        self._held_back: Job | None = None

    def left(self) -> None:
        """A job has left the batch, or its memory has come free."""
        self._held_back = None

    def holds_back(self, job: Job | None) -> bool:
        """Whether the job may not start as long as nobody leaves."""
        return job is not None and self._held_back is job

    def fits(
        self, head: Job, running: Sequence[Running], *, free: int, used: int, wanted: Callable[[], Iterable[int]]
    ) -> bool:
        """Whether the job may start beside these.

        free, used: blocks of the whole memory. wanted: how many of the free ones the job takes when it starts; where
        a smaller number is harder to come by, it comes after the larger one.
        """
        if not running:
            return True
        if self._held_back is head:
            return False
        rests = self._rests(running)
        has = sum(one.has for one in running)
        # Where prompts begin alike, several hold the same block, and who ends frees only a part of what it holds.
        own = min(1.0, used / has) if has else 1.0
        room = free + own * has
        jobs = [(rest, (own - 1.0) * has + wants) for rest, (_, has, wants) in zip(rests, running, strict=True)]
        rest = self._rest(head)
        for blocks in wanted():
            if peak_blocks([*jobs, (rest, blocks)], self._blocks_per_token) <= room:
                return True
        self._held_back = head
        return False

    def _rests(self, running: Sequence[Running]) -> list[float]:
        before, rests = self._expected, []
        expected = self._expected = {}
        for one in running:
            made = one.job.output_tokens
            entry = before.get(one.job)
            if entry is None or made >= entry[1]:
                entry = made + self._rest(one.job), made + 1 + made // _STALE
            expected[one.job] = entry
            rests.append(max(0.0, entry[0] - made))
        return rests

    def _rest(self, job: Job) -> float:
        """At a place of its own among those like it, so that the jobs of a batch differ as lengths do."""
        return self._rest_tokens(job, crc32(job.id.encode()) / (1 << 32))
