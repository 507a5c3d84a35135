import io

from rich.console import Console

from deploy.engine.engine_log import parse
from deploy.engine.worker import EngineState, WorkerEvent
from deploy.serve.screen import Screen


class Clock:
    """Time that is moved by hand, in seconds."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def screen(*, verbose: bool = False, terminal: bool = False) -> tuple[Screen, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=200, force_terminal=terminal, color_system="truecolor" if terminal else None)
    return Screen(console, ["worker-0", "worker-10"], verbose, clock), out, clock


def event(state: EngineState, detail: str, elapsed_s: float = 0.0) -> WorkerEvent:
    return WorkerEvent("worker-0", state, "http://127.0.0.1:1", detail, elapsed_s)


def test_lines_are_aligned_plain_text_where_there_is_no_terminal() -> None:
    seen, out, _ = screen()
    with seen:
        seen.worker(event(EngineState.STARTING, "loading the model", 21.34))
        seen.worker(event(EngineState.READY, "Paris [sic]", 35.0))
        seen.worker(event(EngineState.DEAD, "it was killed"))
        seen.line("gateway", "hello")
    assert out.getvalue().splitlines() == [
        "worker-0  │ loading the model                             21.3 s",
        "worker-0  │ ready after 35.0 s; its test answer: Paris [sic]",
        "worker-0  │ died: it was killed",
        "gateway   │ hello",
    ]


def test_a_long_stage_says_that_it_goes_on_every_ten_seconds_until_it_is_over() -> None:
    seen, out, clock = screen()
    seen.worker(event(EngineState.STARTING, "loading the model", 20.0))
    for _ in range(25):
        clock.now_s += 1.0
        seen.beat()
    beats = [line for line in out.getvalue().splitlines() if "still loading the model" in line]
    assert [line.split()[-2] for line in beats] == ["30.0", "40.0"]
    seen.worker(event(EngineState.READY, "Paris", 45.0))
    clock.now_s += 60.0
    seen.beat()
    assert out.getvalue().count("still") == 2


def test_of_an_engines_log_each_warning_is_shown_once_and_all_of_it_when_verbose() -> None:
    text = "(Worker pid=1) WARNING 11-21 04:52:00 [x.py:1] the disk is slow"
    seen, out, _ = screen()
    for _ in range(2):
        seen.log("worker-0", parse(text))
        seen.log("worker-0", parse("(Worker pid=1) INFO 11-21 04:52:00 [x.py:1] chatter"))
    assert out.getvalue().splitlines() == ["worker-0  │ warning: the disk is slow"]
    seen, out, _ = screen(verbose=True)
    seen.log("worker-0", parse("(Worker pid=1) INFO 11-21 04:52:00 [x.py:1] chatter"))
    assert out.getvalue().splitlines() == ["worker-0  │ chatter"]


def test_a_terminal_gets_colours_and_a_line_that_moves() -> None:
    seen, out, _ = screen(terminal=True)
    with seen:
        seen.worker(event(EngineState.STARTING, "loading the model", 1.0))
        seen.worker(event(EngineState.READY, "Paris", 2.0))
    assert "\x1b[32m" in out.getvalue()
    assert "loading the model" in out.getvalue() or "ready after" in out.getvalue()
