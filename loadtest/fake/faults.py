"""Faults of a fake engine, on demand: the failures that a gateway must survive."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Faults:
    """Failures that are switched on; the defaults are a healthy engine.

    `…_after_tokens` counts one answer's output tokens.

    die_after_tokens: the whole engine dies: every connection is reset, new ones are refused.
    stall_after_tokens: the engine stops making tokens; connections stay open and /health says all is well.
    cut_after_tokens: that connection closes in the middle of a chunk.
    error_event_after_tokens: that stream carries an error event, then ends, as after a failure inside vLLM.
    error_status: generation requests are answered with this status (0: they are not).
    unhealthy: /health answers 503.
    no_transfer: it cannot fetch KV from other engines.
    wrong_answers: fluent text that is not what the model would say.
    start_delay_s: seconds before the engine listens.
    times: how often die, cut, error event and error status strike before they are over (0: for ever).
    """

    die_after_tokens: int | None = None
    stall_after_tokens: int | None = None
    cut_after_tokens: int | None = None
    error_event_after_tokens: int | None = None
    error_status: int = 0
    unhealthy: bool = False
    no_transfer: bool = False
    wrong_answers: bool = False
    start_delay_s: float = 0.0
    times: int = 0

    @property
    def in_stream(self) -> bool:
        """Whether anything here strikes between two tokens."""
        points = (self.die_after_tokens, self.stall_after_tokens, self.cut_after_tokens, self.error_event_after_tokens)
        return any(point is not None for point in points)


HEALTHY = Faults()


def faults_from(options: Mapping[str, Any]) -> Faults:
    """Faults from a JSON object; ValueError names what it does not know."""
    known = {field.name for field in fields(Faults)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"Unknown fault {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
    return Faults(**options)
