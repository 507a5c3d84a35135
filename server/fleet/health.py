"""Judges a worker's health beyond its probes: consecutive failures, stalled streams, a test prompt."""

import re
from dataclasses import dataclass, field

from server.engine.client import EngineClient
from server.request.errors import EngineGone

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
TRIAL_PROMPT = "List the first five prime numbers."
TRIAL_TOKENS = 8
# An engine that answers so has no completions to be tried by: one for embeddings, for example.
_NO_SUCH_TASK = (400, 404, 405, 422, 501)

NUMBER = r"(?:\{[^}]*\})?\s+(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)$"
_RUNNING = re.compile(r"^vllm:num_requests_running" + NUMBER, re.MULTILINE)
_GENERATED = re.compile(r"^vllm:generation_tokens_total" + NUMBER, re.MULTILINE)
_WAITING = re.compile(r"^vllm:num_requests_waiting" + NUMBER, re.MULTILINE)

# What is read of an engine's metrics.
_TOLD = (
    b"\nvllm:num_requests_",
    b"\nvllm:kv_cache_usage_perc",
    b"\nvllm:generation_tokens_total",
    b"\nvllm:nixl_bytes_transferred_sum",
    b"\nvllm:engine_sleep_state{",
    b"\nvllm:cache_config_info{",
    b"\nevenhand_engine_",
)


def told_in(page: bytes) -> str:
    """Of an engine's metrics the lines that are read here, a hundredth of them all."""
    lines: list[bytes] = []
    page = b"\n" + page
    for name in _TOLD:
        at = page.find(name)
        while at >= 0:
            end = page.find(b"\n", at + 1)
            lines.append(page[at + 1 : end if end >= 0 else len(page)])
            at = page.find(name, at + 1)
    return b"\n".join(lines).decode("utf-8", "replace")


@dataclass(slots=True)
class Breaker:
    """Opens after failures of so many calls in a row; each further one doubles the pause until the next trial.

    calls: those that failed, with their tenants. proven: those that another worker then answered, so that they are not
    to blame. retry_at: seconds on the fleet's clock before which there is no trial.
    """

    calls: dict[str, str] = field(default_factory=dict)
    proven: set[str] = field(default_factory=set)
    retry_at: float = 0.0

    @property
    def failures(self) -> int:
        """In a row."""
        return len(self.calls)

    def failed(self, call: str, tenant: str, *, proven: bool) -> None:
        """One more call failed."""
        self.calls[call] = tenant
        if proven:
            self.proven.add(call)

    def opens(self, now: float, threshold: int, *, several: bool) -> bool:
        """Whether it opens: after failures of several tenants' calls, or of calls that are not to blame where no other
        tenant is served (`several` is false)."""
        many = len(self.calls) >= threshold and len(set(self.calls.values())) > 1
        if not many and (several or len(self.proven) < threshold):
            return False
        doubled = min(len(self.calls) - threshold, 10)
        self.retry_at = now + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**doubled)
        return True


@dataclass(slots=True)
class Output:
    """Whether an engine that says it runs requests makes any tokens.

    moved_at: when its count was last seen to grow, or nothing to run, seconds on the fleet's clock. idle: at the latest
    look it said that it has nothing to do.
    """

    generated: float = -1.0
    moved_at: float = 0.0
    idle: bool = False

    def read(self, metrics: str, now: float) -> None:
        """One look at the engine's /metrics; one that does not show these numbers is never taken to be stuck."""
        running = sum(map(float, _RUNNING.findall(metrics)))
        counted = _GENERATED.findall(metrics)
        generated = sum(map(float, counted))
        self.idle = bool(counted) and not running and not sum(map(float, _WAITING.findall(metrics)))
        if not counted or not running or generated != self.generated:
            self.generated, self.moved_at = generated, now

    def stuck_s(self, now: float) -> float:
        """Seconds for which it has made nothing while it ran something."""
        return now - self.moved_at


async def trial_answer(engine: EngineClient, model: str) -> str:
    """What a worker answers to a small question, "" if it has no completions. EngineGone if that is no answer."""
    body = {"model": model, "prompt": TRIAL_PROMPT, "max_tokens": TRIAL_TOKENS, "temperature": 0}
    answer = await engine.post("/v1/completions", body)
    if answer.status_code in _NO_SUCH_TASK:
        return ""
    try:
        text = str(answer.json()["choices"][0]["text"]) if answer.status_code == 200 else ""
    except (ValueError, KeyError, IndexError, TypeError):
        text = ""
    if not text.strip():
        raise EngineGone(f"it answers the test prompt with status {answer.status_code} and no text")
    return text
