"""A fleet that never stays as it is: every second one worker joins and one leaves, and a gateway restarts now and then.

The workers are engines without a model in this process, which join through Redis as `evenhand worker` does. Most leave
as that does, too: they want nothing new, finish what they have and go. One in `DIES` goes without a word.
"""

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from deploy.serve.join import HEARD_S
from loadtest.bench.scale.scale import redis_counts
from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.simulator.costmodel import PRESETS
from scheduler.workers import Worker
from server.fleet.registry import HEARTBEAT_S, WORKER_TTL_S, registration_of
from server.store.redis_store import RedisStore
from tests.chaos.figures import Figure, none
from tests.chaos.site import Program, metrics, redis, running, summed, until
from tests.chaos.soak import SETTLE_S, Soak

DIES = 8
FORGOTTEN_S = 3 * WORKER_TTL_S  # one that died is in the store for one of these, at gateways for another
READY_SHARE = 0.8  # of the workers; the rest may have just come or be about to go
SLOTS = 32
PROBE = "Rounds._once"


@dataclass(eq=False)
class Member:
    """A worker of the fleet. leaving: it wants nothing new."""

    name: str
    engine: FakeEngine
    leaving: bool = False

    async def idle(self) -> bool:
        return not self.engine.running and not self.engine.waiting


class Churn(Soak):
    """One run of `run_s` seconds with `count` workers: `per_s` requests and `turns_per_s` joins and leaves a second, a
    gateway restarted every `restart_s`."""

    def __init__(
        self,
        seed: int,
        run_s: float,
        per_s: float,
        restart_s: float,
        *,
        count: int = 256,
        turns_per_s: float = 1.0,
        settle_s: float = SETTLE_S,
    ) -> None:
        super().__init__(seed, run_s, per_s, restart_s, settle_s)
        self.count, self.turns_per_s = count, turns_per_s
        self.least_ready = int(READY_SHARE * count)
        self.members: dict[str, Member] = {}
        self.joined = 0
        self.turns: set[asyncio.Task[None]] = set()
        self.redis_bytes: list[int] = []
        self.setup = EngineSetup(cost=PRESETS["gpu-7b"])

    @asynccontextmanager
    async def _site(self, folder: Path) -> AsyncIterator[None]:
        self.redis = redis(folder)
        async with running(self.redis):
            self.store = RedisStore(f"redis://127.0.0.1:{self.redis.port}/0", timeout_s=30.0)
            beats = asyncio.create_task(self._beat())
            try:
                for _ in range(self.count):
                    await self._join()
                # The engines have taken their ports by now: none of them can take a gateway's before it starts.
                self.gateways = [self._telling(self._gateway(folder, number, [])) for number in range(2)]
                async with running(*self.gateways):
                    yield
            finally:
                beats.cancel()
                await asyncio.wait([beats, *self.turns])
                for member in list(self.members.values()):
                    await self._gone(member)
                await self.store.close()

    @staticmethod
    def _telling(program: Program) -> Program:
        """The same gateway, which tells its tasks."""
        command = ["tests.chaos.told_gateway" if part == "server" else part for part in program.command]
        told = {"EVENHAND_TASKS_FILE": str(program.log.with_suffix(".tasks"))}
        return replace(program, command=command, env={**program.env, **told})

    # the fleet

    async def _beat(self) -> None:
        """Every worker says every `HEARTBEAT_S` that it is there."""
        while True:
            began = time.monotonic()
            for member in list(self.members.values()):
                await self._say_there(member)
            await asyncio.sleep(max(0.1, began + HEARTBEAT_S - time.monotonic()))

    async def _say_there(self, member: Member) -> None:
        worker = Worker(member.name, member.engine.url, slots=SLOTS)
        await self.store.register(member.name, registration_of(worker, draining=member.leaving), WORKER_TTL_S)

    async def _join(self) -> None:
        self.joined += 1
        member = Member(f"worker-{self.joined}", FakeEngine(self.setup))
        await member.engine.__aenter__()
        self.members[member.name] = member
        await self._say_there(member)

    async def _leave_fleet(self, member: Member) -> None:
        """As `evenhand worker` on SIGTERM."""
        member.leaving = True
        await self._say_there(member)
        await asyncio.sleep(HEARD_S)  # the worker's own time
        await until(member.idle, f"{member.name} has finished what it had")
        del self.members[member.name]
        await self.store.leave(member.name)
        await self._gone(member)

    async def _gone(self, member: Member) -> None:
        self.members.pop(member.name, None)
        await member.engine.__aexit__(None, None, None)

    async def _turn(self) -> None:
        """One joins and one leaves."""
        await self._join()
        member = self.dice.choice([member for member in self.members.values() if not member.leaving])
        if self.dice.randrange(DIES):
            self.blows["workers that left"] += 1
            await self._leave_fleet(member)
        else:
            self.blows["workers that died"] += 1
            await self._gone(member)

    async def _strike(self, over: asyncio.Event) -> None:
        """Joins and leaves, and restarts beside them, until the run is over."""
        restarts = asyncio.create_task(self._restart_again_and_again(over))
        due = time.monotonic()
        while not over.is_set():
            task = asyncio.create_task(self._turn())
            self.turns.add(task)
            task.add_done_callback(self._turned)
            due += 1.0 / self.turns_per_s
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), max(0.0, due - time.monotonic()))
        await asyncio.wait([restarts, *self.turns])

    def _turned(self, task: asyncio.Task[None]) -> None:
        self.turns.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.problems.append(f"a worker: {error!r}")

    async def _restart_again_and_again(self, over: asyncio.Event) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), self.dice.uniform(0.5, 1.5) * self.blow_s)
                return
            try:
                await self._restart_gateway()
            except (TimeoutError, RuntimeError, OSError) as error:
                self.problems.append(f"restart of a gateway: {error!r}")
            self.blows["gateways restarted"] += 1

    # figures

    async def _load(self) -> None:
        before = await self._tasks()
        self.redis_bytes.append(self._redis_bytes())
        await super()._load()
        self.redis_bytes.append(self._redis_bytes())
        self.tasks_before = before

    async def _figures(self) -> list[Figure]:
        figures = await super()._figures()
        gone = await self._after_a_while(
            self._strangers, "gateways and the store know only workers that are there", max(self.settle_s, FORGOTTEN_S)
        )
        left = await self._after_a_while(self._tasks_left, "no task is left over")
        first, last = (value / 1e6 for value in self.redis_bytes)
        return [
            *figures,
            none(f"workers that are known although they have been gone for {FORGOTTEN_S:.0f} s", gone),
            none("asyncio tasks left over in the gateway that stays", left),
            Figure("memory of Redis, MB at the begin and at the end", f"{first:.2f} → {last:.2f}"),
        ]

    async def _tasks(self) -> Counter[str]:
        """The tasks of the gateway that stays, but for the probes of its workers."""
        program = self.gateways[0]
        file = program.log.with_suffix(".tasks")
        file.unlink(missing_ok=True)
        program.signal(signal.SIGUSR1)

        async def told() -> bool:
            return file.exists()

        await until(told, "the gateway tells its tasks")
        counts = Counter[str](json.loads(file.read_text()))
        counts.pop(PROBE, None)
        return counts

    async def _tasks_left(self) -> list[str]:
        left = await self._tasks() - self.tasks_before
        return [f"{count} of {name}" for name, count in left.items()]

    async def _strangers(self) -> list[str]:
        known = {f"the store: {name}": name for name in await self.store.workers()}
        for program in self.gateways:
            for (sample, labels), _ in (await metrics(program.port)).items():
                if sample == "evenhand_worker_up":
                    name = dict(labels)["worker"]
                    known[f"{program.name}: {name}"] = name
        return [told for told, name in known.items() if name not in self.members]

    async def _held(self) -> list[str]:
        held = [f"{member.name}: {member.engine.running}" for member in self.members.values() if member.engine.running]
        for program in self.gateways:
            samples = await metrics(program.port)
            for name in ("evenhand_worker_in_flight", "evenhand_queue_depth", "evenhand_worker_pending_tokens"):
                if value := summed(samples, name):
                    held.append(f"{program.name}: {name} {value:.0f}")
        return held

    def _redis_bytes(self) -> int:
        return redis_counts(f"redis://127.0.0.1:{self.redis.port}/0", "memory")["used_memory"]
