"""One engine as a child process: started, watched, tested, restarted when it dies, and stopped."""

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from random import SystemRandom
from typing import Protocol

import httpx2

from deploy.engine.canary import CanaryError
from deploy.engine.child import ChildEnded, ChildProcess, running
from deploy.engine.engine_args import KEY_NAME, EngineCommand, Ports
from deploy.engine.engine_log import STAGES, LogFile, LogLine, cause, parse, stage
from deploy.engine.pulse import Pulse
from deploy.machine.cores import stray_threads

KEPT_LINES = 1000  # enough for the stacks of all of vLLM's processes, root cause included
STRAYED = (
    "threads of this engine may run on another engine's cores, so the two slow each other down: {}. "
    "Please report this with the versions of vLLM and NIXL"
)
NOT_INHERITED = (KEY_NAME, "VLLM_PORT")  # would give the engine a key or ports that the gateway does not know


class EngineState(Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    CANARY = "canary"
    READY = "ready"
    ASLEEP = "asleep"
    DEAD = "dead"
    STOPPED = "stopped"


MOVES: Mapping[EngineState, frozenset[EngineState]] = {
    EngineState.STARTING: frozenset({EngineState.CANARY, EngineState.DEAD, EngineState.STOPPED}),
    EngineState.CANARY: frozenset({EngineState.READY, EngineState.DEAD, EngineState.STOPPED}),
    EngineState.READY: frozenset({EngineState.ASLEEP, EngineState.DEAD, EngineState.STOPPED}),
    EngineState.ASLEEP: frozenset({EngineState.STARTING, EngineState.STOPPED}),
    EngineState.DEAD: frozenset({EngineState.STARTING, EngineState.STOPPED}),
    EngineState.STOPPED: frozenset(),
}


# Below those that Linux, by default, gives to outgoing connections (ip_local_port_range) and Kubernetes to services.
PORTS = range(20_000, 30_000)


class WorkerError(Exception):
    """The engine could not be started or has ended; the message is one sentence that says why and what to do."""


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """A move of a worker, or a new stage of its start.

    url: where it answers, or will. detail: the stage, what the canary heard, or why it died.
    elapsed_s: since this start began.
    """

    worker: str
    state: EngineState
    url: str
    detail: str
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Life:
    """How one start of an engine went: why it ended, and for how long it was ready (None if it never was)."""

    end: str
    ready_s: float | None


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient a supervisor is. All in seconds.

    start_s: for a step of a start that says nothing, and for the canary.
    probe_every_s, watch_every_s: between two probes, before and after it is ready.
    unanswered_s: a ready engine that has not answered for so long is taken for hung; long, for on a busy CPU one step
    can hold everything up.
    look_every_s: between two looks at whether it computes. ask_every_s: without work it is asked so often.
    hung_s: one that has requests and makes no step for so long is hung; more where its own steps take long.
    backoff_s: doubles with each death up to backoff_most_s, and is forgotten after stable_s alive.
    grace_s: from asking an engine to stop to killing it.
    """

    start_s: float = 900.0
    probe_every_s: float = 0.25
    probe_timeout_s: float = 10.0
    watch_every_s: float = 1.0
    unanswered_s: float = 60.0
    look_every_s: float = 5.0
    ask_every_s: float = 60.0
    hung_s: float = 120.0
    backoff_s: float = 1.0
    backoff_most_s: float = 60.0
    stable_s: float = 120.0
    grace_s: float = 15.0

    def backoff_after(self, deaths: int) -> float:
        """How long to wait before the next start, after so many deaths in a row (1 or more)."""
        return min(self.backoff_most_s, self.backoff_s * 2.0 ** min(deaths - 1, 30))


class HealthCheck(Protocol):
    """A test that a started engine has to pass: `deploy.engine.canary.Canary`. Raises CanaryError."""

    async def check(self, client: httpx2.AsyncClient, url: str) -> str: ...

    async def responds(self, client: httpx2.AsyncClient, url: str, timeout_s: float) -> bool:
        """Whether the engine answers anything, an error included, to the smallest of questions."""


@dataclass(frozen=True, slots=True)
class Listeners:
    """Callbacks of a worker: `tell` gets its state changes and stages, `line` every line of its log."""

    tell: Callable[[WorkerEvent], None]
    line: Callable[[str, LogLine], None]


class WorkerProcess:
    """Keeps one engine alive.

    `build` makes the command for the ports of one start; they stay the same from start to start while they are free.
    `ports` are those of the first, free ones if None.
    `turn` is held while it starts: engines that share a GPU must not, for each takes what the others leave free.
    `run` is the whole life: cancel it for a clean stop, and call `kill` to have no grace given.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[Ports], EngineCommand],
        canary: HealthCheck,
        listeners: Listeners,
        log: LogFile,
        timing: Timing,
        ports: Ports | None = None,
        turn: asyncio.Lock | None = None,
    ) -> None:
        self.name = name
        self.state = EngineState.STARTING
        self._build = build
        self._canary = canary
        self._listeners = listeners
        self._log = log
        self._timing = timing
        self._ports = ports
        self._turn = turn or asyncio.Lock()
        self._sleepy, self._woken = asyncio.Event(), asyncio.Event()
        self._child: ChildProcess | None = None
        self._url = self._key = ""
        self._cores: tuple[tuple[int, ...], tuple[int, ...]] = (), ()
        self._started_at_s = 0.0
        self._stage = 0
        self._stopping = False
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._deadline: asyncio.Timeout | None = None
        self._said: set[str] = set()

    async def run(self) -> None:
        """Starts the engine and restarts it for ever. WorkerError if it did not become ready the first time."""
        deaths = 0
        try:
            while True:
                life = await self._one_life()
                if self._sleepy.is_set() and life.ready_s is not None:
                    self._move(EngineState.ASLEEP, "asleep: the next request starts it again")
                    await self._woken.wait()
                    self._move(EngineState.STARTING, "waking up")
                    continue
                if deaths == 0 and life.ready_s is None:
                    raise WorkerError(f"{self.name} did not start: {life.end} (its log: {self._log.path})")
                deaths = 1 if (life.ready_s or 0.0) >= self._timing.stable_s else deaths + 1
                pause_s = self._timing.backoff_after(deaths)
                self._move(EngineState.DEAD, f"{life.end}; it starts again in {pause_s:.0f} s")
                await asyncio.sleep(pause_s)
                self._move(EngineState.STARTING, "restarting")
        finally:
            self._move(EngineState.STOPPED, "stopped")
            self._log.close()

    def sleep(self) -> None:
        """Stops a ready engine until `wake`."""
        self._woken.clear()
        self._sleepy.set()

    def wake(self) -> None:
        """Starts an engine that sleeps. Harmless if it does not."""
        self._sleepy.clear()
        self._woken.set()

    def kill(self) -> None:
        """Ends the engine and all that it started, at once."""
        if self._child is not None:
            self._child.kill()

    async def _one_life(self) -> Life:
        """From start to death."""
        async with contextlib.AsyncExitStack() as starting:
            await starting.enter_async_context(self._turn)
            return await self._from_start(starting)

    async def _from_start(self, starting: contextlib.AsyncExitStack) -> Life:
        """`starting` is closed once the engine is ready."""
        self._started_at_s = _now_s()
        try:
            async with self._process() as child, self._questions() as client:
                await self._become_ready(child, client)
                await starting.aclose()
                ready_at_s = _now_s()
                end = await self._ready_until(child, client)
        except WorkerError as error:
            return Life(str(error), None)
        return Life(end, _now_s() - ready_at_s)

    def _questions(self) -> httpx2.AsyncClient:
        """The client for this engine. Whose certificate its server has is the gateways' business: this is our child."""
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        return httpx2.AsyncClient(trust_env=False, verify=False, headers=headers)

    async def _become_ready(self, child: ChildProcess, client: httpx2.AsyncClient) -> None:
        try:
            async with asyncio.timeout(self._timing.start_s) as self._deadline:
                await child.or_end(self._answering(client))
                self._move(EngineState.CANARY, "testing it with a prompt whose answer is known")
                said = await child.or_end(self._canary.check(client, self._url))
        except ChildEnded as end:
            raise WorkerError(cause(self._lines, end.exit_code)) from end
        except CanaryError as error:
            raise WorkerError(str(error)) from error
        except TimeoutError as error:
            limit_s = self._timing.start_s
            raise WorkerError(
                f"it logged nothing for {limit_s:.0f} s and is not ready: allow more with --start-timeout"
            ) from error
        finally:
            self._deadline = None
        self._move(EngineState.READY, said)
        if strays := stray_threads(child.pid, *self._cores):
            self._listeners.line(self.name, LogLine("", "WARNING", STRAYED.format(", ".join(strays))))

    async def _ready_until(self, child: ChildProcess, client: httpx2.AsyncClient) -> str:
        """Watches a ready engine until it dies or hangs; returns why, as a sentence."""
        try:
            return await child.or_end(self._useless(child, client))
        except ChildEnded as end:
            return cause(self._lines, end.exit_code)

    async def _useless(self, child: ChildProcess, client: httpx2.AsyncClient) -> str:
        """Returns when an engine that runs has become useless. One that hangs is ended, for it would not end itself."""
        unhealthy = asyncio.create_task(self._unhealthy(client))
        hung = asyncio.create_task(self._hung(client))
        sleepy = asyncio.create_task(self._sleepy.wait())
        try:
            await asyncio.wait({unhealthy, hung, sleepy}, return_when=asyncio.FIRST_COMPLETED)
            if sleepy.done():
                return "going to sleep"
            if unhealthy.done():
                return unhealthy.result()
            why = hung.result()
            child.kill()
            return why
        finally:
            for task in (unhealthy, hung, sleepy):
                task.cancel()
            await asyncio.gather(unhealthy, hung, sleepy, return_exceptions=True)

    async def _hung(self, client: httpx2.AsyncClient) -> str:
        """Returns when the engine answers, but does not compute. Idle, it is asked something now and then."""
        timing, pulse = self._timing, Pulse(_now_s())
        while True:
            await asyncio.sleep(timing.look_every_s)
            await self._look(client, pulse)
            if pulse.hangs(_now_s(), timing.hung_s):
                return f"it has requests and made no step for {_now_s() - pulse.moved_at:.0f} s: it hangs"
            if not pulse.idle or _now_s() - pulse.moved_at < timing.ask_every_s:
                continue
            asked_at_s = _now_s()
            responded = await self._canary.responds(client, self._url, timing.hung_s)
            # Others may have come while it was asked, and be served first.
            if not await self._look(client, pulse) and not responded:
                return f"it did not answer a test prompt within {_now_s() - asked_at_s:.0f} s: it hangs"
            pulse.moved_at = _now_s()

    async def _look(self, client: httpx2.AsyncClient, pulse: Pulse) -> bool:
        """Whether the engine made progress since the last look; one that does not answer at all is handled
        elsewhere."""
        try:
            answer = await client.get(self._url + "/metrics", timeout=self._timing.probe_timeout_s)
        except httpx2.HTTPError:
            return False
        return answer.status_code == 200 and pulse.read(answer.text, _now_s())

    async def _answering(self, client: httpx2.AsyncClient) -> None:
        """Returns when the engine says that it is healthy."""
        while True:
            if await self._health(client) == 200:
                return
            await asyncio.sleep(self._timing.probe_every_s)

    async def _unhealthy(self, client: httpx2.AsyncClient) -> str:
        """Returns when a healthy engine has become useless. vLLM answers 503 once its core is dead."""
        answered_at_s = _now_s()
        while (silent_s := _now_s() - answered_at_s) < self._timing.unanswered_s:
            await asyncio.sleep(self._timing.watch_every_s)
            status = await self._health(client)
            if status == 503:
                await asyncio.sleep(self._timing.watch_every_s)  # its last words are still on their way
                return cause(self._lines, None)
            answered_at_s = _now_s() if status == 200 else answered_at_s
        return f"it has not answered for {silent_s:.0f} s"

    async def _health(self, client: httpx2.AsyncClient) -> int:
        """Its status, 0 if it did not answer."""
        try:
            return (await client.get(self._url + "/health", timeout=self._timing.probe_timeout_s)).status_code
        except httpx2.HTTPError:
            return 0

    @contextlib.asynccontextmanager
    async def _process(self) -> AsyncIterator[ChildProcess]:
        """The engine with fresh ports and a fresh folder for its metrics, where a dead one's must not count."""
        self._lines.clear()
        self._said.clear()
        self._stage = 0
        metrics_folder = tempfile.mkdtemp(prefix="evenhand-metrics-")
        try:
            self._ports = usable_ports(self._ports)
            command = self._build(self._ports)
            self._url, self._key = command.url, command.env.get(KEY_NAME, "")
            env = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
            env |= {**command.env, "PROMETHEUS_MULTIPROC_DIR": metrics_folder}
            self._log.write(f"$ {' '.join(command.argv)}")
            self._cores = command.cores, command.allowed
            async with running(command.argv, env, self._timing.grace_s, self._heard, command.allowed) as self._child:
                self._tell(STAGES[0][1])
                self._stopping = False
                try:
                    yield self._child
                finally:
                    self._stopping = True  # it has ended, or we end it
        except OSError as error:
            raise WorkerError(f"it could not be started: {error.strerror or error}") from error
        finally:
            self._child = None
            shutil.rmtree(metrics_folder, ignore_errors=True)

    def _heard(self, text: str) -> None:
        line = parse(text)
        self._log.write(text)
        self._lines.append(text)
        self._progress(text)
        if not self._stopping:
            self._listeners.line(self.name, line)
        if self.state is EngineState.STARTING and (reached := stage(line, self._stage)) != self._stage:
            self._stage = reached
            self._tell(STAGES[reached][1])

    def _progress(self, text: str) -> None:
        """Puts the end of a start off when its log says something new.

        Fetching and loading a large model takes its time, and tells of its progress; what is said again and again
        ("Waiting for 1 local core engine") is none.
        """
        deadline = self._deadline
        if (
            self.state is EngineState.STARTING
            and deadline is not None
            and text not in self._said
            and not deadline.expired()
        ):
            self._said.add(text)
            deadline.reschedule(_now_s() + self._timing.start_s)

    def _move(self, state: EngineState, detail: str) -> None:
        if state not in MOVES[self.state]:
            raise ValueError(f"{self.name} cannot go from {self.state.value} to {state.value}")
        self.state = state
        self._tell(detail)

    def _tell(self, detail: str) -> None:
        elapsed_s = _now_s() - self._started_at_s if self._started_at_s else 0.0
        self._listeners.tell(WorkerEvent(self.name, self.state, self._url, detail, elapsed_s))


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def usable_ports(last: Ports | None) -> Ports:
    """The ports of the last start if they are free, else others.

    An engine listens seconds after its ports were chosen. A port that the kernel might have given to an outgoing
    connection meanwhile would not do: vLLM waits for ever for a side channel that it could not open.
    """
    if last is not None and is_free("127.0.0.1", last.http) and is_free("127.0.0.1", last.side_channel):
        return last
    free = (port for port in SystemRandom().sample(PORTS, len(PORTS)) if is_free("127.0.0.1", port))
    return Ports(next(free), next(free))


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there; closed connections that linger do not count, as they do not for it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
