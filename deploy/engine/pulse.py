"""Whether an engine that answers over HTTP still computes: vLLM's /health is 200 when its core has stopped. Pure."""

import re
from dataclasses import dataclass

_NUMBER = r"(?:\{[^}]*\})?\s+(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)$"
_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)" + _NUMBER, re.MULTILINE)
# Only our plug-in counts steps. A step that is one more piece of a long prompt makes no token, so tokens alone do not
# show that an engine without it hangs.
_STEPS = re.compile(r"^evenhand_engine_steps_total" + _NUMBER, re.MULTILINE)
_TOKENS = re.compile(r"^vllm:(?:prompt|generation)_tokens_total" + _NUMBER, re.MULTILINE)
LONGEST_STEPS = 10  # an engine whose steps take long is given so many of its longest before it is taken for hung


@dataclass(slots=True)
class Pulse:
    """What an engine's /metrics said, look by look.

    moved_at: when its counts were last seen to change, seconds on the caller's clock.
    longest_s: the longest that they stood still and went on while it had requests.
    """

    moved_at: float
    longest_s: float = 0.0
    idle: bool = True
    counts_steps: bool = False
    _counted: tuple[float, ...] = ()

    def read(self, metrics: str, now: float) -> bool:
        """One look; whether something was done since the one before."""
        steps = tuple(map(float, _STEPS.findall(metrics)))
        counted = (*steps, *map(float, _TOKENS.findall(metrics)))
        moved, self._counted = counted != self._counted, counted
        was_idle, self.idle = self.idle, not sum(map(float, _REQUESTS.findall(metrics)))
        self.counts_steps = bool(steps)
        if moved:
            if not was_idle:
                self.longest_s = max(self.longest_s, now - self.moved_at)
            self.moved_at = now
        elif was_idle and not self.idle:
            self.moved_at = now  # its requests have just come
        return moved

    def hangs(self, now: float, patience_s: float) -> bool:
        """Whether it has had requests and made no step for longer than it ever took."""
        patient_s = max(patience_s, LONGEST_STEPS * self.longest_s)
        return self.counts_steps and not self.idle and now - self.moved_at > patient_s
