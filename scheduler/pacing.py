"""When a worker whose engine cannot displace anybody may start one more flex request.

Such an engine reads prompts in the order in which they come, and a step that reads one of flex delays the first token
of whoever arrives in it. So flex starts one at a time, while no other prompt waits to be read: what others leave is
then used up without a queue of prompts in the engine.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Final

_FRESH: Final = 0.2  # weight of the latest first token
_FIRST_S, _PROMPT_TOKENS = 0.1, 512.0  # until one was seen
_READING: Final = 0.6  # of the time to a first token: for the rest of it the prompt waits for a step
_FASTER: Final = 4.0  # flex starts so many times as fast where there is nobody else, who may come


@dataclass(slots=True, eq=False)
class Pacing:
    """What a gateway sees of one worker's reading.

    awaited: streamed requests of other tiers that wait for their first token. first_s, prompt_tokens: seconds that
    they wait lately, and how long their prompts are. started_at, reading_s: when the last flex request was sent, and
    how long its prompt is probably read. spare: flex requests that have ended while there was nobody else, and whose
    places the next ones take at once.
    """

    awaited: int = 0
    first_s: float = _FIRST_S
    prompt_tokens: float = _PROMPT_TOKENS
    started_at: float = -inf
    reading_s: float = 0.0
    spare: int = 0

    def placed(self) -> None:
        """A streamed request of another tier is sent."""
        self.awaited += 1

    def answered(self, prompt_tokens: int, seconds: float) -> None:
        """Its first token is here, after so many seconds."""
        self.awaited -= 1
        self.first_s += _FRESH * (seconds - self.first_s)
        self.prompt_tokens += _FRESH * (prompt_tokens - self.prompt_tokens)

    def ended(self) -> None:
        """It ends without a token."""
        self.awaited -= 1

    def started(self, prompt_tokens: int, now: float) -> None:
        """A flex request is sent: it is read as fast as the prompts of others, or, if it is longer than those, in that
        many times as long."""
        times = max(1.0, prompt_tokens / self.prompt_tokens)
        self.started_at, self.reading_s = now, _READING * self.first_s * times
        self.spare = max(0, self.spare - 1)

    def freed(self, *, alone: bool) -> None:
        """A flex request has ended. alone: the worker has none of other tiers."""
        self.spare = self.spare + 1 if alone else 0

    def wait_s(self, now: float, *, alone: bool) -> float:
        """Seconds until a flex request may start; infinity while somebody's first token is awaited."""
        if self.awaited:
            return inf
        if alone and self.spare:
            return 0.0
        return max(0.0, self.started_at + self.reading_s / (_FASTER if alone else 1.0) - now)


@dataclass(slots=True, eq=False)
class FirstToken:
    """The first token of a streamed request that was sent to a paced worker. look: called once nobody's is awaited."""

    pacing: Pacing
    prompt_tokens: int
    clock: Callable[[], float]
    look: Callable[[], None]
    sent_at: float = field(init=False)
    is_awaited: bool = True

    def __post_init__(self) -> None:
        self.sent_at = self.clock()
        self.pacing.placed()

    def here(self) -> None:
        """It came. Nothing happens the second time."""
        if self.is_awaited:
            self.is_awaited = False
            self.pacing.answered(self.prompt_tokens, self.clock() - self.sent_at)
            if not self.pacing.awaited:
                self.look()

    def never(self) -> None:
        """The request has left the worker, with its token or without."""
        if self.is_awaited:
            self.is_awaited = False
            self.pacing.ended()
