"""When requests arrive: endless generators of seconds since the start, seeded by the `random.Random` given."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import sqrt
from random import Random


def poisson(rate_per_s: float, rng: Random) -> Iterator[float]:
    """Independent arrivals at a mean rate: a coefficient of variation of 1."""
    _positive(rate_per_s, "rate")
    at_s = 0.0
    while True:
        at_s += rng.expovariate(rate_per_s)
        yield at_s


def gamma(rate_per_s: float, cv: float, rng: Random) -> Iterator[float]:
    """Gaps of a gamma distribution: burstier than Poisson above a coefficient of variation of 1, smoother below."""
    _positive(rate_per_s, "rate")
    _positive(cv, "coefficient of variation")
    shape = 1.0 / (cv * cv)
    at_s = 0.0
    while True:
        at_s += rng.gammavariate(shape, 1.0 / (rate_per_s * shape))
        yield at_s


def on_off(rate_per_s: float, on_s: float, off_s: float, rng: Random) -> Iterator[float]:
    """Poisson at `rate_per_s` for `on_s` seconds, then nothing for `off_s`, again and again (VTC's ON/OFF tenants)."""
    _positive(on_s, "time on")
    if off_s < 0:
        raise ValueError("The time off cannot be negative.")
    for busy_s in poisson(rate_per_s, rng):
        yield busy_s + off_s * int(busy_s // on_s)


def timed(times_s: Iterable[float], rate_scale: float = 1.0) -> Iterator[float]:
    """A trace's own times; at a scale of 2 it passes twice as fast. Times that fall back are held at the latest."""
    _positive(rate_scale, "rate scale")
    latest_s = 0.0
    for at_s in times_s:
        latest_s = max(latest_s, at_s / rate_scale)
        yield latest_s


def _positive(value: float, name: str) -> None:
    if not value > 0:
        raise ValueError(f"The {name} must be above 0, not {value:g}.")


@dataclass(frozen=True, slots=True)
class Stage:
    """A rate, or a ramp from one rate to another, for so many seconds."""

    from_per_s: float
    to_per_s: float
    seconds: float

    @property
    def requests(self) -> float:
        """Expected in all of it."""
        return (self.from_per_s + self.to_per_s) / 2 * self.seconds

    def at_s(self, requests: float) -> float:
        """Seconds since the start by which this many requests are expected."""
        slope = (self.to_per_s - self.from_per_s) / self.seconds
        if abs(slope) < 1e-12:
            return requests / self.from_per_s
        return (sqrt(max(0.0, self.from_per_s**2 + 2 * slope * requests)) - self.from_per_s) / slope


def parse_stages(text: str) -> list[Stage]:
    """`5:60,5-20:300,0:30` → stages: a rate, or a ramp of rates, and its seconds. ValueError says how to write them."""
    stages = []
    for part in text.split(","):
        rates, _, seconds = part.strip().partition(":")
        low, ramp, high = rates.partition("-")
        try:
            stage = Stage(float(low), float(high if ramp else low), float(seconds))
        except ValueError:
            raise ValueError(f"{part!r} is not a stage: write RATE:SECONDS or RATE-RATE:SECONDS.") from None
        if stage.seconds <= 0 or min(stage.from_per_s, stage.to_per_s) < 0:
            raise ValueError(f"{part!r} is not a stage: rates are 0 or more, and seconds above 0.")
        stages.append(stage)
    return stages


def staged(stages: Iterable[Stage], cv: float, rng: Random) -> Iterator[float]:
    """Arrivals whose rate follows the stages, as bursty as `gamma`; they end with the last stage.

    Arrivals at a rate of 1 are stretched so that each stage has as many as its rate wants.
    """
    unit = gamma(1.0, cv, rng)
    number, before, begin_s = next(unit), 0.0, 0.0
    for stage in stages:
        while number < before + stage.requests:
            yield begin_s + stage.at_s(number - before)
            number = next(unit)
        before += stage.requests
        begin_s += stage.seconds
