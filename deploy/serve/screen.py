"""The terminal output of `evenhand serve`: aligned, coloured only on a terminal, never silent for long."""

import logging
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from deploy.engine.engine_log import LogLine, shown
from deploy.engine.worker import EngineState, WorkerEvent

BEAT_S = 10.0  # the longest silence of a start that is not watched on a terminal


class Screen:
    """Prints for people. On a terminal, a start is one live line for each worker; elsewhere each stage is a line."""

    def __init__(self, console: Console, names: list[str], verbose: bool, clock: Callable[[], float]) -> None:
        self._console = console
        self._verbose = verbose
        self._clock = clock
        self._width = max(len(name) for name in [*names, "gateway"])
        self._starting: dict[str, tuple[str, float]] = {}
        self._last_beat_s = clock()
        self._said: set[str] = set()
        self._live = Live(console=console, get_renderable=self._picture, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, text: str = "", style: str = "") -> None:
        """One line as it stands."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def line(self, name: str, text: str, style: str = "") -> None:
        """One line behind a name: `worker-0 │ text`."""
        self._console.print(
            Text.assemble((f"{name:<{self._width}} │ ", "dim"), (text.expandtabs(), style)), soft_wrap=True
        )

    def table(self, rows: Mapping[str, str]) -> None:
        width = max(map(len, rows)) + 1
        for key, value in rows.items():
            self._console.print(Text.assemble((f"  {key:<{width}}", "dim"), value), soft_wrap=True)

    def starting(self, name: str, stage: str, elapsed_s: float) -> None:
        """Something takes its time: `stage` began when its start was `elapsed_s` old."""
        self._starting[name] = (stage, self._clock() - elapsed_s)
        if not self._console.is_terminal:
            self.line(name, f"{stage:<44}{elapsed_s:6.1f} s")
        self._last_beat_s = self._clock()

    def started(self, name: str) -> None:
        self._starting.pop(name, None)

    def worker(self, event: WorkerEvent) -> None:
        """A worker moved on."""
        if event.state in (EngineState.STARTING, EngineState.CANARY):
            self.starting(event.worker, event.detail, event.elapsed_s)
            return
        self.started(event.worker)
        if event.state is EngineState.READY:
            text = f"ready after {event.elapsed_s:.1f} s; its test answer: {event.detail}"
            self.line(event.worker, text, "green")
        elif event.state is EngineState.ASLEEP:
            self.line(event.worker, event.detail, "dim")
        elif event.state is EngineState.DEAD:
            self.line(event.worker, f"died: {event.detail}", "red")

    def log(self, name: str, line: LogLine) -> None:
        """A line of an engine's log: all of them if `verbose`, else each warning that matters, once."""
        if self._verbose:
            self.line(name, line.text, "dim")
        elif (text := shown(line)) and text not in self._said:
            self._said.add(text)
            self.line(name, f"{line.level.lower()}: {text}", "dim")

    def gateway(self, line: str) -> None:
        """A line of a gateway of its own, `LEVEL logger: text`: all of them if `verbose`, else each warning. What more
        than one of its processes says, `LEVEL logger[number]: text`, is shown once."""
        level, _, rest = line.partition(" ")
        name, _, text = rest.partition(": ")
        if self._verbose or level not in ("WARNING", "ERROR", "CRITICAL"):
            if self._verbose or level not in ("INFO", "DEBUG"):
                self.line("gateway", line, "dim")
        elif not (name.endswith("]") and text in self._said):
            self._said.add(text)
            self.line("gateway", f"{level.lower()}: {text}", "dim")

    def beat(self) -> None:
        """Called now and then: says that a start goes on, where nothing moves on the screen."""
        if self._console.is_terminal or self._clock() - self._last_beat_s < BEAT_S:
            return
        self._last_beat_s = self._clock()
        for name, (stage, since_s) in self._starting.items():
            self.line(name, f"{'still ' + stage:<44}{self._clock() - since_s:6.1f} s")

    def _picture(self) -> Group:
        return Group(
            *(
                Spinner(
                    "dots",
                    Text.assemble((f"{name:<{self._width}} │ ", "dim"), f"{stage}  {self._clock() - since_s:.0f} s"),
                )
                for name, (stage, since_s) in self._starting.items()
            )
        )


class ScreenLog(logging.Handler):
    """Shows a process's own log on the screen."""

    def __init__(self, screen: Screen, name: str) -> None:
        super().__init__()
        self._screen = screen
        self._name = name

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self._screen.line(self._name, level + record.getMessage(), "dim")
