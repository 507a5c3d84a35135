"""One run of a gateway and its engines on this machine: started, watched and stopped together.

The gateway takes the port first and answers /health at once; each engine joins it when its canary has been heard.
Ctrl-C, SIGTERM and SIGHUP let running answers finish and stop everything; a second one stops at once.
"""

import asyncio
import logging
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from deploy.engine.canary import Canary
from deploy.engine.engine_args import EngineCommand, EnginePlan, Ports, engine_command, worker_of
from deploy.engine.engine_log import LogFile
from deploy.engine.engine_needs import Asking, ask_vllm
from deploy.engine.worker import EngineState, Listeners, Timing, WorkerError, WorkerEvent, WorkerProcess
from deploy.machine.gpu_lock import GpuLocks
from deploy.machine.gpu_plan import GpuPlanError
from deploy.machine.machine import Machine, look
from deploy.model.hub import Weighing, weigh
from deploy.model.model import ModelSource
from deploy.serve.gateway import GatewayRunner
from deploy.serve.preflight import Checked, PreflightError, driver_remarks, gpu_plan, in_words, plan_workers
from deploy.serve.preparing import prepared
from deploy.serve.screen import Screen, ScreenLog
from deploy.settings import ServeSettings
from scheduler.workers import Role
from server.engine.access import Access
from server.processes.supervisor import STOPPING
from server.request.adapters import read_adapter
from server.request.names import read_name, table_of
from server.settings import scheme_of

log = logging.getLogger("evenhand.serve")

BEAT_S = 1.0

Command = Callable[[EnginePlan, Ports, str], EngineCommand]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What `evenhand serve` meets outside itself; a test gives another machine or another engine."""

    machine: Callable[[], Machine] = partial(look, os.environ)
    command: Command = engine_command
    ask: Asking = ask_vllm
    weigh: Weighing = weigh
    locks: Callable[[], GpuLocks] = GpuLocks
    timing: Timing = field(default_factory=Timing)


class Stop:
    """The signals that request a stop: `asked` is set by the first, `at_once` by the second."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        self.number = 0
        for number in STOPPING:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started by nohup
            asyncio.get_running_loop().add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: int) -> None:
        if self.asked.is_set():
            self.at_once.set()
        self.number = self.number or number
        self.asked.set()


class Serving:
    """One run of gateway and engines."""

    def __init__(
        self,
        settings: ServeSettings,
        checked: Sequence[Checked],
        front: GatewayRunner,
        screen: Screen,
        surroundings: Surroundings,
    ) -> None:
        self._settings = settings
        self._checked = checked
        self._front = front
        self._around = surroundings
        self._screen = screen
        self._logs = state_folder(settings, os.environ) / str(settings.port)
        self._plans: Mapping[str, EnginePlan] = {}
        self._workers: dict[str, WorkerProcess] = {}
        self._turns: dict[str, asyncio.Lock] = {}  # by GPUs: engines that share them start one after the other
        self._resting: set[str] = set()  # workers that sleep, or are on their way back
        self._all_ready = asyncio.Event()

    async def serve(self, sock: socket.socket) -> int:
        """From the taken port to the exit code. WorkerError or ModelError when the start fails."""
        stop = Stop()
        with self._screen:
            log_to_screen(self._screen, "gateway", verbose=self._settings.verbose)
            gateway = asyncio.create_task(self._front.serve(sock), name="gateway")
            work = asyncio.create_task(self._engines(), name="engines")
            beat = asyncio.create_task(self._beat())
            asked = asyncio.create_task(stop.asked.wait())
            try:
                await asyncio.wait({gateway, work, asked}, return_when=asyncio.FIRST_COMPLETED)
                was_ready = self._all_ready.is_set()
                await self._wind_down(stop, gateway, work)
            finally:
                for task in (beat, asked):
                    task.cancel()
        self._screen.say("Stopped. Nothing is left running.", "dim")
        if not stop.asked.is_set():
            return 1
        return 0 if stop.number == signal.SIGTERM and was_ready else 128 + stop.number

    async def _engines(self) -> None:
        """Model, then engines, for as long as they live. WorkerError, ModelError or EngineArgsError at the start."""
        sources = [await self._model(one) for one in self._settings.each()]
        check_names(self._settings, [source.served_name for source in sources])
        locks = self._around.locks()
        try:
            machine = claimed(self._settings, self._around.machine(), self._checked, locks)
            self._plans = plan_workers(self._settings, machine, self._checked, sources)
            remarks = gpu_plan(self._settings, machine, self._checked).remarks
            self._introduce(sources, (*driver_remarks(machine), *remarks))
            await self._run_engines(sources)
        finally:
            locks.close()

    async def _run_engines(self, sources: Sequence[ModelSource]) -> None:
        self._workers = {name: self._worker(name, plan) for name, plan in self._plans.items()}
        try:
            async with asyncio.TaskGroup() as group:
                for worker in self._workers.values():
                    group.create_task(worker.run(), name=worker.name)
                group.create_task(self._when_ready(sources))
        except* WorkerError as errors:
            raise errors.exceptions[0] from None

    async def _model(self, view: ServeSettings) -> ModelSource:
        began_s = time.monotonic()

        def hear(line: str) -> None:
            self._screen.starting("model", line, time.monotonic() - began_s)

        source = await prepared(view.source, view.engine_args, self._around.timing.grace_s, hear)
        self._screen.started("model")
        return source

    def _worker(self, name: str, plan: EnginePlan) -> WorkerProcess:
        return WorkerProcess(
            name,
            lambda ports: self._around.command(plan, ports, sys.executable),
            Canary(plan.served_name),
            Listeners(self._moved, self._screen.log),
            LogFile(self._logs / f"{name}.log"),
            replace(self._around.timing, start_s=self._settings.start_timeout_s),
            turn=self._turns.setdefault(plan.share.ids, asyncio.Lock()) if plan.share else None,
        )

    def _moved(self, event: WorkerEvent) -> None:
        """A worker's move, told to the screen and to the gateway's fleet."""
        self._screen.worker(event)
        front, plan = self._front, self._plans[event.worker]
        if event.state is EngineState.READY:
            self._resting.discard(event.worker)
            nap = ProcessNap(self._workers[event.worker]) if sleeps_by_process(plan, self._settings) else None
            front.join(worker_of(plan, event.worker, event.url), Access(plan.key), nap)
            if missing := self._missing_role(plan):
                self._screen.line(event.worker, f"takes whole requests until a {missing} worker is ready", "yellow")
        elif event.state is EngineState.ASLEEP:
            self._resting.add(event.worker)
        elif event.worker not in self._resting or event.state in (EngineState.DEAD, EngineState.STOPPED):
            self._resting.discard(event.worker)
            front.leave(event.worker)
            if event.state is not EngineState.STOPPED:
                front.starting(event.worker, event.detail)
        if all(worker.state is EngineState.READY for worker in self._workers.values()):
            self._all_ready.set()

    def _missing_role(self, plan: EnginePlan) -> str:
        """The role that an engine of `plan` needs beside its own and that no worker takes yet; "" if none."""
        other = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}.get(plan.role)
        there = {
            self._plans[name].role
            for name, worker in self._workers.items()
            if worker.state is EngineState.READY and self._plans[name].served_name == plan.served_name
        }
        return other.value if other is not None and other not in there else ""

    async def _wind_down(self, stop: Stop, gateway: asyncio.Task[None], work: asyncio.Task[None]) -> None:
        """Lets running answers finish, then stops the engines; the second signal cuts both short.

        Raises what the engines failed with, once everything is down.
        """
        hurry = asyncio.create_task(stop.at_once.wait())
        hurry.add_done_callback(lambda task: None if task.cancelled() else self._stop_at_once())
        try:
            if self._all_ready.is_set():
                limit_s = self._settings.shutdown_s
                self._screen.say(
                    f"\nStopping: running answers may finish (at most {limit_s:.0f} s). "
                    "Interrupt again to stop immediately."
                )
            self._front.stop(at_once=not self._all_ready.is_set())
            await asyncio.wait({gateway})
            work.cancel()
            await asyncio.wait({work})
        finally:
            hurry.cancel()
        await self._front.settled()
        for task in (gateway, work):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    def _stop_at_once(self) -> None:
        self._front.stop(at_once=True)
        for worker in self._workers.values():
            worker.kill()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self._screen.beat()

    async def _when_ready(self, sources: Sequence[ModelSource]) -> None:
        await self._all_ready.wait()
        await self._front.takes_requests(len(self._workers))
        settings = self._settings
        host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host
        url = f"{scheme_of(settings)}://{f'[{host}]' if ':' in host else host}:{settings.port}"
        asked = '"max_tokens": 64, "messages": [{"role": "user", "content": "Hello!"}]'
        body = f'{{"model": "{sources[0].served_name}", {asked}}}'
        say = self._screen.say
        say()
        apart = f", prompts from {settings.disaggregation.min_prompt_tokens} tokens on are read apart"
        say(
            f"Ready: {', '.join(source.served_name for source in sources)} at {url}/v1, policy {settings.policy}"
            + (apart if any(one.prefill_workers for one in settings.each()) else ""),
            "bold green",
        )
        say()
        say(f"  curl {url}/v1/chat/completions -H 'content-type: application/json' \\")
        say(f"    -d {shlex.quote(body)}")
        say()
        say("Ctrl-C stops it.", "dim")

    def _introduce(self, sources: Sequence[ModelSource], remarks: Sequence[str]) -> None:
        engine = self._around.machine().engine
        self._screen.table(
            {
                "model" if len(sources) == 1 else "models": ", ".join(map(shown_source, sources)),
                "policy": " ".join(
                    [self._settings.policy, *(f"{k}={v}" for k, v in self._settings.policy_options.items())]
                ),
                "engine": f"vLLM {engine.version} ({engine.build})" if engine else "",
                **{name: in_words(plan) for name, plan in self._plans.items()},
                "logs": str(self._logs),
            }
        )
        for remark in remarks:
            self._screen.say(f"  {remark}", "yellow")
        if self._settings.slo.named and len(self._plans) > 1 and not any(p.connected for p in self._plans.values()):
            self._screen.say(
                "  Objectives are only measured: without NIXL no engine can transfer a prompt's KV (`make install`).",
                "yellow",
            )
        self._screen.say()


class ProcessNap:
    """A worker sleeps by stopping its engine; the next request starts it again."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker

    async def sleep(self) -> None:
        self._worker.sleep()

    async def wake(self) -> None:
        self._worker.wake()


def sleeps_by_process(plan: EnginePlan, settings: ServeSettings) -> bool:
    """Whether an engine is to be stopped to sleep, for it has no sleep mode: vLLM's is for GPUs."""
    return settings.sleep.after_s is not None and not plan.sleep_mode


def shown_source(source: ModelSource) -> str:
    """A model for a person: its name, and where it is."""
    return source.served_name + (f"  ({source.path})" if source.path != source.served_name else "")


def check_names(settings: ServeSettings, served: Sequence[str]) -> None:
    """ValueError if two models go by one name, or a model name or an adapter points to what is not served."""
    if twice := next((name for name in served if served.count(name) > 1), None):
        raise ValueError(f"two models would be served as {twice!r}: rename one of the folders")
    table = table_of({name: read_name(name, value) for name, value in settings.models.items()})
    adapters = {name: read_adapter(name, value) for name, value in settings.adapters.items()}
    for name, record in adapters.items():
        if record.model not in served:
            raise ValueError(f"adapter {name!r}: no worker serves {record.model!r}; there is {', '.join(served)}")
    args = [*settings.engine_args, *(arg for model in settings.model for arg in model.engine_args)]
    if adapters and not any(arg.endswith("--enable-lora") for arg in args):
        raise ValueError("adapters need engines with LoRA: add --engine-arg=--enable-lora")
    missing = (table.missing_behind(named, [*served, *adapters]) for named in table.names.values())
    for sentence in filter(None, missing):
        raise ValueError(f"{sentence}; there is {', '.join(served)}")


def claimed(settings: ServeSettings, machine: Machine, checked: Sequence[Checked], locks: GpuLocks) -> Machine:
    """The machine with those GPUs that no other process of ours has; those that the plan needs are held from here.

    A user who says how much of a GPU's memory an engine may take means it to be shared. GpuPlanError if too few are
    left.
    """
    if checked[0].build == "cpu":
        return machine
    with locks.planning():
        free = locks.free(machine.gpus, shared=all(one.need.utilization is not None for one in checked))
        taken = [gpu for gpu in machine.gpus if gpu not in free]
        try:
            if not free:
                raise GpuPlanError("no GPU is left")
            left = replace(machine, gpus=tuple(free))
            plan = gpu_plan(settings, left, checked)
        except (GpuPlanError, PreflightError) as error:
            if not taken:
                raise
            names = ", ".join(map(str, taken))
            raise GpuPlanError(
                f"{error}. Another evenhand process has {names}: stop it, or limit both with "
                "--engine-arg=--gpu-memory-utilization=0.45"
            ) from error
        locks.keep([gpu.id for share in plan.shares.values() for gpu in share.gpus])
    return left


def log_to_screen(screen: Screen, name: str, *, verbose: bool) -> None:
    """This process's own log goes to the screen under `name`: warnings, or all of it."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, handlers=[ScreenLog(screen, name)], force=True)


def with_batches(settings: ServeSettings, environ: Mapping[str, str]) -> ServeSettings:
    """The settings with a folder for the Batch API: `batch` in the state folder unless another one is set."""
    folder = settings.batch.folder or state_folder(settings, environ) / "batch"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        if settings.batch.folder is not None:
            raise PreflightError(f"cannot use the batch folder {folder}: {error.strerror}") from None
        log.warning("no Batch API: cannot create %s (%s); choose a folder with --batch-folder", folder, error.strerror)
        return settings
    return settings.model_copy(update={"batch": settings.batch.model_copy(update={"folder": folder})})


def state_folder(settings: ServeSettings, environ: Mapping[str, str]) -> Path:
    """Where the engines' logs go: the setting, else `evenhand` in the user's state directory."""
    if settings.state_folder is not None:
        return settings.state_folder
    user_state = environ.get("XDG_STATE_HOME", "")
    return (Path(user_state) if os.path.isabs(user_state) else Path.home() / ".local" / "state") / "evenhand"
