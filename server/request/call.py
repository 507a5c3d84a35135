"""One request: `Call` is the parsed request (frozen), `Ticket` its progress, with a time for each phase."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from scheduler.hybrid import Visit
from scheduler.jobs import Job, Tier
from scheduler.pacing import FirstToken
from server.request.tenants import Tenant
from server.request.transcript import Transcript

if TYPE_CHECKING:  # annotations only: at run time this layer knows nothing of workers or limits
    from server.admission.dispatch import Dispatcher
    from server.admission.limits import LimitStanding
    from server.fleet.fleet import Member
    from server.fleet.split import Split

Dialect = Literal["openai", "responses", "messages"]


@dataclass(frozen=True, slots=True)
class Route:
    """A relayed path and what is special about it.

    path: as clients write it; the engine has the same.
    generates: it runs on the engine's batch, so it waits for a slot and is charged.
    makes_tokens: the engine writes an answer, token by token.
    usage_on_request: a stream tells its usage only if stream_options asks for it (OpenAI's chat and completions).
    xargs: the engine takes `vllm_xargs` here, so that tenant and service may travel with the request.
    handover: the engine tells here where a prompt's KV can be fetched, and fetches it elsewhere.
    anthropic: errors are shaped as Anthropic shapes them.
    limit_fields: names of the field that bounds the output, the first one present counts.
    content_field: the field that holds the prompt.
    prompts: the prompt field may hold several prompts, each a sequence of its own.
    choices: `n` asks for several answers to each prompt.
    chat: events carry a `delta`, not a `text`.
    resumes: what a client has of a stream is kept, so that another worker can continue it.
    tells_ids: a stream carries the token ids of what it says if it is asked to (vLLM's `return_token_ids`).
    dialect: the shape of its answers and events.
    """

    path: str
    generates: bool = True
    makes_tokens: bool = True
    usage_on_request: bool = False
    xargs: bool = False
    handover: bool = False
    anthropic: bool = False
    limit_fields: tuple[str, ...] = ("max_tokens",)
    content_field: str = "messages"
    prompts: bool = False
    choices: bool = False
    chat: bool = False
    resumes: bool = False
    tells_ids: bool = False
    dialect: Dialect = "openai"


class Call(msgspec.Struct, frozen=True):
    """What a client asked for.

    body: the JSON object as it came, but for the exact count of tokens that we ask for where the client did not.
    hide_usage: the client did not ask for the usage event that we asked the engine for.
    prompt_tokens: an estimate; the engine's own count replaces it at the end.
    deadline_s: seconds from arrival within which the answer must begin, None for no limit.
    steers_kv: it has `kv_transfer_params` of its own, for its tenant may.
    prompts: how many; `sequences` is a multiple of it.
    wants_ids: the client asked for token ids itself. hides_tokens: tokens of reasoning are made and not sent.
    asked: the name that the client used, where `model` is what an operator's table made of it; else empty.
    name: the table's entry for it, `*` for the one that takes every name.
    fallbacks: models to ask if this one cannot answer, in order.
    tier: its service tier; tells_tier: its client sent `service_tier`, so the answer tells it too.
    """

    id: str
    route: Route
    tenant: Tenant
    model: str
    stream: bool
    body: bytes
    hide_usage: bool
    prompt_tokens: int
    max_tokens: int
    sequences: int
    kind: str
    deadline_s: float | None = None
    steers_kv: bool = False
    prompts: int = 1
    wants_ids: bool = False
    hides_tokens: bool = False
    asked: str = ""
    name: str = ""
    fallbacks: tuple[str, ...] = ()
    tier: Tier = Tier.DEFAULT
    tells_tier: bool = False


class Phase(IntEnum):
    """Where a call stands. Integers, for a phase is an index here: hashing an Enum costs more than a list's look-up."""

    WAITING = 0  # in the line, no worker yet
    PREFILLING = 1  # sent to a worker, nothing came back yet
    DECODING = 2  # the first bytes of the answer came back
    DONE = 3
    FAILED = 4
    CANCELLED = 5  # the client left, or we are told to stop


_NOT_REACHED = (None,) * (len(Phase) - 1)
_ENDS = (Phase.FAILED, Phase.CANCELLED)
NEXT: tuple[tuple[Phase, ...], ...] = (
    (Phase.PREFILLING, *_ENDS),
    # A failed leg is tried elsewhere before anything was answered.
    (Phase.DECODING, Phase.WAITING, *_ENDS),
    (Phase.DONE, *_ENDS),
    (),
    (),
    (),
)


@dataclass(slots=True, eq=False)
class Ticket:
    """One call's record. Every latency is the difference of two of its times.

    times: seconds on the gateway's clock at which a phase was first reached, by phase; None if it was not.
    tokens: output tokens counted as they passed; `usage` corrects them when the answer is complete.
    second_s: from a stream's first token to its second, None if there was none.
    member: the worker that it holds a place at, None while it holds none. worker: the id of the last one.
    line: that of the model that it was last given a place by.
    standing: the limits of its tenant that it counts against, None if there are none; booked_tokens: charged there in
    advance.
    pending_tokens: what the worker is taken to be busy with for it.
    split: set if prompt and answer are two workers' business; `worker` is then the one that answers.
    visit: what its engines' forecasts know of it, where placement is by prediction.
    first: set while a worker that flex requests wait for has its first token to make.
    avoid: the worker that failed it last, which it should not be given again.
    at_fault: workers that failed because of it.
    told: the policy knows the prompt's length as the engine counts it.
    received: what its stream has said so far, None where that is not kept.
    ahead: requests that waited when it came to wait. placed: how it was placed, its name in metrics.
    failures: the workers that could not answer it, and how each attempt ended.
    decisions: why it waited and where it went, step by step; None unless an operator asks.
    trace: header lines that make what workers do for it a part of its trace; nothing if it has none.
    """

    call: Call
    job: Job
    clock: Callable[[], float]
    phase: Phase = Phase.WAITING
    times: list[float | None] = field(init=False)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    exact: bool = False
    last_at: float = 0.0
    second_s: float | None = None
    member: "Member | None" = None
    worker: str = ""
    line: "Dispatcher | None" = None
    standing: "LimitStanding | None" = None
    booked_tokens: int = 0
    pending_tokens: int = 0
    split: "Split | None" = None
    visit: Visit | None = None
    first: FirstToken | None = None
    uncharged: int = 0
    avoid: str = ""
    at_fault: int = 0
    told: bool = False
    received: Transcript | None = None
    ahead: int = 0
    placed: str = ""
    failures: tuple[tuple[str, str], ...] = ()
    decisions: list[dict[str, Any]] | None = None
    trace: bytes = b""

    def __post_init__(self) -> None:
        self.times = [self.job.arrived_at, *_NOT_REACHED]
        self.prompt_tokens = self.call.prompt_tokens

    def learn(self, prompt_tokens: int | None, cached_tokens: int | None) -> None:
        """The engine's own count of the prompt, None where it does not say."""
        if prompt_tokens is not None:
            self.prompt_tokens = prompt_tokens
            self.exact = True
        if cached_tokens is not None:
            self.cached_tokens = cached_tokens

    def used_tokens(self) -> int:
        """What its tenant pays for: the prompt for each worker that it made fail, and what it was given. An error that
        a worker is to blame for costs nothing before the first token."""
        if self.times[Phase.PREFILLING] is None or not self.call.route.generates:
            return 0
        if self.phase is Phase.FAILED and not self.tokens:
            return self.prompt_tokens * self.at_fault
        return self.prompt_tokens * max(1, self.at_fault) + self.tokens

    def move(self, phase: Phase) -> None:
        """Notes that a phase is reached. ValueError for a move that is not in the table."""
        if phase not in NEXT[self.phase]:
            raise ValueError(f"a call cannot go from {self.phase.name} to {phase.name}")
        self.phase = phase
        if self.times[phase] is None:
            self.times[phase] = self.clock()
        if phase is Phase.DECODING:
            if self.split is not None and not self.call.stream:
                self.split.arrived()
            if self.visit is not None:
                self.visit.begins(self.clock())
            if self.first is not None:
                self.first.here()

    def second_token(self, gap_s: float | None) -> None:
        """A stream's second token came; gap_s: None together with its first one. The first may have travelled with the
        request, before its KV was there."""
        self.second_s = gap_s
        if self.split is not None:
            self.split.arrived()
        if self.visit is not None:
            self.visit.goes_on(self.clock())

    def failed_at(self, worker: str, outcome: str) -> None:
        """A worker, or all of a model, could not answer."""
        self.failures += ((worker, outcome),)
        self.decide("failed", worker=worker, outcome=outcome)

    def decide(self, step: str, **facts: Any) -> None:
        """Records a decision, if the request is traced."""
        if self.decisions is not None:
            after_s = round(self.clock() - self.job.arrived_at, 6)
            self.decisions.append({"step": step, "after_s": after_s, **facts})

    def ask_another(self, call: Call) -> None:
        """Switches to another model, as if no worker had been tried; the ticket's times continue."""
        self.call = call
        if self.phase is Phase.PREFILLING:
            self.move(Phase.WAITING)
        self.prompt_tokens, self.cached_tokens, self.tokens, self.uncharged = call.prompt_tokens, 0, 0, 0
        self.exact = self.told = False
        self.avoid, self.split = "", None
        if self.received is not None:
            self.received.begin_leg(None)

    @property
    def ended(self) -> bool:
        return not NEXT[self.phase]

    def since(self, earlier: Phase, later: Phase) -> float | None:
        """Seconds between two phases, None if one of them was not reached."""
        begin, end = self.times[earlier], self.times[later]
        return None if begin is None or end is None else end - begin
