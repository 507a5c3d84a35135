"""Puts models without traffic to sleep and wakes them on the next request, to free GPUs or processes meanwhile.

A worker sleeps in the way that it can: an engine by itself (vLLM's sleep mode), or as whoever started it says (`serve`
stops the engine). A model that nobody serves may be one that something else starts when requests wait for it, as
KEDA does in Kubernetes; then they wait here, and the metric says how many.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from time import monotonic

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.fleet.fleet import Fleet, Member, WorkerState
from server.observe.observer import Asked, Observer
from server.request.call import Ticket
from server.request.errors import EngineGone, NoWorker
from server.settings import SleepSettings

log = logging.getLogger("evenhand.sleep")

LOOK_S = 1.0
SLEEP_TIMEOUT_S = 300.0
RETRY_S = 30.0  # where nobody knows how long a model takes to wake


class CannotSleep(Exception):
    """A worker does not go to sleep, or does not wake up; the message says why."""


class EngineNap:
    """vLLM's sleep mode (`--enable-sleep-mode`, `VLLM_SERVER_DEV_MODE=1`).

    level: 1 keeps the weights in the machine's memory, 2 does not.
    """

    def __init__(self, member: Member, level: int) -> None:
        self._member = member
        self._level = level

    async def sleep(self) -> None:
        """CannotSleep if the engine says no. What it has it finishes first."""
        await self._post(f"/sleep?level={self._level}&mode=wait")

    async def wake(self) -> None:
        """CannotSleep if the engine says no."""
        await self._post("/wake_up")
        if self._level == 2:
            await self._post("/collective_rpc", {"method": "reload_weights"})

    async def _post(self, path: str, body: object = None) -> None:
        try:
            answer = await self._member.engine.post(path, body, timeout_s=SLEEP_TIMEOUT_S)
        except EngineGone as error:
            raise CannotSleep(error.message) from None
        if answer.status_code == 404:
            raise CannotSleep("it has no sleep mode: start vLLM with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1")
        if answer.status_code != 200:
            raise CannotSleep(f"its {path.partition('?')[0]} answers {answer.status_code}")


class Sleeper(Observer, Collector):
    """Watches each model's traffic. Others' traffic shows in what the engines say of themselves."""

    def __init__(
        self,
        fleet: Fleet,
        settings: SleepSettings,
        clock: Callable[[], float] = monotonic,
        depth: Callable[[], Iterable[tuple[str, int]]] = tuple,
    ) -> None:
        """depth: how many requests wait in each model's line."""
        self._depth = depth
        self._fleet = fleet
        self._settings = settings
        self._clock = clock
        self.used_at: dict[str, float] = {}
        self.awaited: Counter[str] = Counter()
        self.wakes: Counter[str] = Counter()
        self._took_s: dict[str, float] = {}
        self._waking: dict[str, tuple[asyncio.Task[None], float]] = {}
        self._made: dict[str, float] = {}
        self._awake = asyncio.Event()
        self._cannot: set[str] = set()
        fleet.wakes, fleet.from_zero = True, tuple(settings.from_zero)
        fleet.changed.append(self._awake.set)

    # traffic
    def began(self, ticket: Ticket, asked: Asked) -> None:
        self.used_at[ticket.call.model] = self._clock()

    def ended(self, ticket: Ticket, outcome: str) -> None:
        self.used_at[ticket.call.model] = self._clock()

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Puts models without recent traffic to sleep, and wakes sleeping models that have requests in the queue, for
        example after another gateway put them to sleep."""
        for model, waiting in self._depth():
            if waiting and not self._fleet.pools.of(model) and self._fleet.is_dormant(model):
                self._begun(model)
        after_s = self._settings.after_s
        if after_s is None:
            return
        for models, members in self._groups():
            now = self._clock()
            for member in members:
                self._note(member, models, now)
            used_at = max(self.used_at.setdefault(model, now) for model in models)
            if now - used_at >= after_s and all(member.state is WorkerState.READY for member in members):
                await self._put_to_sleep(models, members)

    def _groups(self) -> Iterable[tuple[frozenset[str], list[Member]]]:
        """Workers that have a model in common, and what they serve together: they sleep and wake together, or not
        at all where one of them cannot: requests that it serves would wake no other."""
        groups: list[tuple[set[str], list[Member]]] = []
        for member in self._fleet.members.values():
            if not member.models:
                continue
            models, members = set(member.models), [member]
            for other in [group for group in groups if group[0] & models]:
                groups.remove(other)
                models |= other[0]
                members = [*other[1], *members]
            groups.append((models, members))
        return [
            (frozenset(models), members)
            for models, members in groups
            if self._cannot.isdisjoint(member.worker.id for member in members)
        ]

    def _note(self, member: Member, models: Iterable[str], now: float) -> None:
        """Traffic that came by other gateways, or that has not ended."""
        made = self._made.get(member.worker.id)
        self._made[member.worker.id] = member.output.generated
        if member.load.in_flight or member.load.others or made not in (None, member.output.generated):
            self.used_at.update(dict.fromkeys(models, now))

    async def _put_to_sleep(self, models: Iterable[str], members: list[Member]) -> None:
        for member in members:
            self._fleet.put(member, WorkerState.ASLEEP)
        log.info("%s: no traffic for a while, going to sleep", ", ".join(sorted(models)))
        results = await asyncio.gather(*(self._nap(member).sleep() for member in members), return_exceptions=True)
        slept = []
        for member, result in zip(members, results, strict=True):
            if isinstance(result, CannotSleep):
                log.warning("worker %s cannot sleep: %s", member.worker.id, result)
                self._cannot.add(member.worker.id)
                member.note = f"cannot sleep: {result}"
                self._rouse(member)
            elif isinstance(result, BaseException):
                raise result
            else:
                slept.append(member)
        if len(slept) < len(members):
            await self._wake_up(slept)

    def _nap(self, member: Member) -> "EngineNap":
        nap = self._fleet.naps.get(member.worker.id)
        return nap or EngineNap(member, self._settings.level)  # type: ignore[return-value]

    def _rouse(self, member: Member) -> None:
        """A probe will find it healthy."""
        if member.state is WorkerState.ASLEEP:
            self._fleet.put(member, WorkerState.STARTING)
            self._fleet.look_now(member)

    async def close(self) -> None:
        """Wakes nobody any more."""
        tasks = [task for task, _ in self._waking.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # waking
    async def woken(self, model: str, asked: str, patience_s: float | None) -> None:
        """Returns once a worker of this model takes requests; concurrent requests wait for the same wake-up.

        NoWorker if nobody can be woken, or if that takes longer than somebody may wait.
        """
        if not self._fleet.is_dormant(model):
            raise NoWorker(f"No worker serves '{asked}' right now.", retry_after_s=self._fleet.probe_s * 5)
        task, since = self._begun(model)
        most_s = min(self._settings.max_wait_s, patience_s if patience_s is not None else self._settings.max_wait_s)
        left_s = self._left_s(model, since)
        late = f"The model '{asked}' is waking up."
        if left_s is not None and left_s > most_s:
            raise NoWorker(late, code="waking", retry_after_s=left_s)
        self.awaited[model] += 1
        try:
            async with asyncio.timeout(most_s):
                await asyncio.shield(task)
        except CannotSleep as error:
            raise NoWorker(f"The model '{asked}' {error}.", code="waking", retry_after_s=RETRY_S) from None
        except TimeoutError:
            raise NoWorker(late, code="waking", retry_after_s=self._left_s(model, since) or RETRY_S) from None
        finally:
            self.awaited[model] -= 1

    def _begun(self, model: str) -> tuple[asyncio.Task[None], float]:
        """Who wakes a model, and since when: one, however many ask."""
        if model not in self._waking:
            task = asyncio.get_running_loop().create_task(self._wake(model))
            self._waking[model] = task, self._clock()
            self._fleet.waking.add(model)
            task.add_done_callback(lambda done: self._over(model, done))
        return self._waking[model]

    def _over(self, model: str, done: asyncio.Task[None]) -> None:
        del self._waking[model]
        self._fleet.waking.discard(model)
        if not done.cancelled() and (error := done.exception()) is not None:
            log.error("%s: %s; the next request tries again", model, error)

    def _left_s(self, model: str, since: float) -> float | None:
        """How much longer it will be, by how long it was last time; None if that is not known."""
        took_s = self._took_s.get(model)
        return None if took_s is None else max(1.0, took_s - (self._clock() - since))

    async def _wake(self, model: str) -> None:
        began = self._clock()
        self.wakes[model] += 1
        log.info("%s: a request arrived, waking up", model)
        members = [member for member in self._fleet.members.values() if model in member.models]
        asleep = [member for member in members if member.state is WorkerState.ASLEEP]
        if not await self._wake_up(asleep) and asleep:
            raise CannotSleep("did not wake up")
        while not self._fleet.pools.of(model):
            self._awake.clear()
            await self._awake.wait()
        self._took_s[model] = self._clock() - began
        self.used_at[model] = self._clock()

    async def _wake_up(self, asleep: list[Member]) -> bool:
        """Whether any of them wakes up. Those that do not stay asleep, to be tried again."""
        results = await asyncio.gather(*(self._nap(member).wake() for member in asleep), return_exceptions=True)
        for member, result in zip(asleep, results, strict=True):
            if isinstance(result, BaseException):
                log.error("worker %s did not wake up: %s", member.worker.id, result)
            elif member.worker.id not in self._fleet.naps:
                self._rouse(member)
        return any(not isinstance(result, BaseException) for result in results)

    def collect(self) -> Iterator[Metric]:
        asleep = GaugeMetricFamily("evenhand_worker_asleep", "Workers asleep for lack of traffic.", labels=("worker",))
        for member in self._fleet.members.values():
            asleep.add_metric((member.worker.id,), float(member.state is WorkerState.ASLEEP))
        yield asleep
        awaited = GaugeMetricFamily(
            "evenhand_requests_awaiting_wake", "Requests that wait for a model to wake up.", labels=("model",)
        )
        for model in {*self._settings.from_zero, *self.awaited}:
            awaited.add_metric((model,), self.awaited[model])
        yield awaited
        wakes = CounterMetricFamily("evenhand_wakes", "Times that a request woke a model.", labels=("model",))
        for model, count in self.wakes.items():
            wakes.add_metric((model,), count)
        yield wakes
