"""A shadow account: what FCFS would have done with the same arrivals on the same engine.

A policy that lets jobs overtake can keep its tails only if it knows what they would have been without. The shadow is a
queue with the engine's slots, served in order of arrival, that does in virtual time as much work as the engine does in
real time: a prompt takes the engine as a whole, then every running job makes a token a step. A job's length is known
once it has really ended; until then the shadow goes by what it is expected to be, and whatever it did too little or too
much of it becomes a debt of work, for the total is the same in both worlds.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

from scheduler.jobs import Job

_REMEMBERED = 1000
_USUAL_TOKENS = 256.0  # of an answer, before any has ended
_FRESH = 0.02  # of what is known of step times and lengths after one more
_ENDED = -1.0


class Recent:
    """The latest values, also in order of size. `add` is O(log n), and a move of pointers."""

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self._latest: deque[float] = deque(maxlen=remembered)
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._latest)

    def add(self, value: float) -> None:
        """One more; the oldest is forgotten if there are too many."""
        if len(self._latest) == self._latest.maxlen:
            del self._sorted[bisect_left(self._sorted, self._latest[0])]
        self._latest.append(value)
        insort(self._sorted, value)

    def quantile(self, share: float) -> float:
        """The value below which this share of them lies; 0 if there is none."""
        return self._sorted[min(len(self._sorted) - 1, int(share * len(self._sorted)))] if self._sorted else 0.0

    @property
    def mean(self) -> float:
        """0 if there is none."""
        return sum(self._latest) / len(self._latest) if self._latest else 0.0


class _Twin:
    """A job in the shadow.

    began, ends: where the shadow's count of tokens stood when it began, and where it stands when it ends; `ends` is
    `_ENDED` after that. served_tokens: what it got until then. length: its true one, 0 until it is known.
    completion_s: from its arrival to its end, in the shadow and really; 0 until it is known.
    """

    __slots__ = ("arrived_at", "began", "completion_s", "ends", "job", "length", "real_s", "served_tokens")

    def __init__(self, job: Job, now: float) -> None:
        self.job = job
        self.arrived_at = now
        self.began = 0.0
        self.ends = 0.0
        self.served_tokens = 0.0
        self.length = 0
        self.completion_s = 0.0
        self.real_s = 0.0


class Shadow:
    """First come, first served on an engine with `slots`, one of whose steps takes as long again for every
    `tokens_per_step` tokens that it computes.

    Where memory, or the tokens of a step, allow fewer jobs at once than there are slots, its batch is as small as the
    real one is while somebody waits.

    rest_tokens: how many more output tokens a job is expected to make, 0 where nothing is known.
    waits: seconds until a job's first start in the shadow. completions, real_completions: seconds from arrival to end,
    of the same jobs in both worlds, in the same order. ends: those of the shadow, as soon as they are known.
    """

    def __init__(self, slots: int, tokens_per_step: float, rest_tokens: Callable[[Job], float]) -> None:
        self._slots = float(slots)
        self._tokens_per_step = tokens_per_step
        self._rest_tokens = rest_tokens
        self._queue: deque[_Twin] = deque()
        self._twins: dict[Job, _Twin] = {}
        self._ends: list[tuple[float, int, _Twin]] = []
        self._running = 0
        self._posted = 0
        self._made = 1.0  # tokens that a job which had run all along would have made
        self._debt = 0.0  # work before the next token, in steps; below zero if too much was done
        self._at = 0.0
        self._steps = 0.0  # work of the real step under way
        self._step_s = 0.0
        self._usual_tokens = _USUAL_TOKENS
        self.waits = Recent()
        self.ends = Recent()
        self.completions = Recent()
        self.real_completions = Recent()

    def arrived(self, job: Job, now: float) -> None:
        """A job came."""
        twin = self._twins[job] = _Twin(job, now)
        self._queue.append(twin)

    def left(self, job: Job, now: float) -> None:
        """A job has really ended, so its length is known."""
        twin = self._twins.pop(job, None)
        if twin is None:
            return
        if not twin.began and not job.output_tokens:  # it left unserved in both worlds
            twin.ends = _ENDED
            return
        twin.length = max(1, job.output_tokens)
        twin.real_s = max(0.0, now - twin.arrived_at)
        self._usual_tokens += _FRESH * (twin.length - self._usual_tokens)
        if twin.ends == _ENDED:
            self._owe(twin.length - twin.served_tokens)
            self._compare(twin)
        elif twin.began:
            ends = twin.began + twin.length
            self._owe(min(0.0, ends - self._made))
            self._post(twin, ends)

    def stepped(self, now: float, tokens: int, *, running: int, waiting: int) -> None:
        """A real step that computes so many tokens begins, and the one before it has ended. Of the jobs so many run
        in it, and so many wait."""
        if waiting:
            self._slots += _FRESH * (max(1, running) - self._slots)
        else:
            self._slots = max(self._slots, running)
        passed_s = max(0.0, now - self._at)
        if self._steps:
            share = _FRESH if self._step_s else 1.0
            self._step_s += share * (passed_s / self._steps - self._step_s)
            self._advance(self._steps, now)
        elif self._step_s:
            self._advance(passed_s / self._step_s, now)
        self._at = now
        self._steps = 1.0 + tokens / self._tokens_per_step if tokens else 0.0

    def rest_s(self, job: Job) -> float:
        """How long the job is expected to take to its end from here if it starts now."""
        rest_tokens = self._rest_tokens(job) or self._usual_tokens
        steps = rest_tokens * (1.0 + self._slots / self._tokens_per_step) + job.restart_tokens / self._tokens_per_step
        return self._step_s * steps

    def first_wait_s(self, now: float) -> float:
        """How long the first in the shadow's line has waited."""
        return max(0.0, now - self._queue[0].arrived_at) if self._queue else 0.0

    def _advance(self, steps: float, now: float) -> None:
        """Does so much work: what is owed, then tokens for all that run."""
        self._start(now)
        while steps > 0.0 and self._running:
            if self._debt:
                paid = min(steps, self._debt)
                self._debt -= paid
                steps -= paid
                continue
            ends, _, twin = self._ends[0]
            if twin.ends != ends:
                heappop(self._ends)
                continue
            price = 1.0 + self._running / self._tokens_per_step
            tokens = min(steps / price, max(0.0, ends - self._made))
            self._made += tokens
            steps -= tokens * price
            if self._made >= ends - 1e-9:
                heappop(self._ends)
                self._end(twin, now)
                self._start(now)

    def _start(self, now: float) -> None:
        while self._queue and self._running < self._slots:
            twin = self._queue.popleft()
            if twin.ends == _ENDED:
                continue
            self.waits.add(max(0.0, now - twin.arrived_at))
            self._debt += twin.job.prefill_tokens / self._tokens_per_step
            twin.began = self._made
            self._running += 1
            self._post(twin, twin.began + (twin.length or self._expected_tokens(twin)))

    def _end(self, twin: _Twin, now: float) -> None:
        if not twin.length:
            ends = twin.began + self._expected_tokens(twin)
            if ends > self._made + 1.0:  # it is really under way, and longer than was thought
                self._post(twin, ends)
                return
        twin.ends = _ENDED
        twin.served_tokens = self._made - twin.began
        twin.completion_s = max(0.0, now - twin.arrived_at)
        self._running -= 1
        self.ends.add(twin.completion_s)
        if twin.length:
            self._compare(twin)

    def _compare(self, twin: _Twin) -> None:
        self.completions.add(twin.completion_s)
        self.real_completions.add(twin.real_s)

    def _expected_tokens(self, twin: _Twin) -> float:
        return twin.job.output_tokens + (self._rest_tokens(twin.job) or self._usual_tokens)

    def _owe(self, tokens: float) -> None:
        self._debt += tokens * (1.0 / self._slots + 1.0 / self._tokens_per_step)

    def _post(self, twin: _Twin, ends: float) -> None:
        twin.ends = ends
        self._posted += 1
        heappush(self._ends, (ends, self._posted, twin))
