"""Which side a worker that can do both leans to: the one that is short. Pure; hysteresis keeps it from swinging."""

from dataclasses import dataclass

from scheduler.workers import Role


@dataclass(frozen=True, slots=True)
class Swing:
    """When to lean and when to stop. Loads: 0 is idle, 1 is where requests are sent elsewhere or wait.

    A worker that joins a side of one halves its load, so `stop` must lie well below half of `start`: else it would
    leave again at once. hold_s: no worker changes twice within it.
    """

    start: float = 0.8
    stop: float = 0.3
    hold_s: float = 10.0


def lean(leaning: Role, prefill_load: float, decode_load: float, swing: Swing) -> Role:
    """Where a worker leans from here on; BOTH if nowhere. The loads count what it does itself."""
    if leaning is Role.PREFILL:
        return Role.BOTH if prefill_load <= swing.stop or decode_load >= swing.start else leaning
    if leaning is Role.DECODE:
        return Role.BOTH if decode_load <= swing.stop or prefill_load >= swing.start else leaning
    if prefill_load >= swing.start and decode_load < swing.start:
        return Role.PREFILL
    if decode_load >= swing.start and prefill_load < swing.start:
        return Role.DECODE
    return Role.BOTH
