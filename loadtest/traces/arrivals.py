"""When requests arrive: endless generators of seconds since the start, seeded by the `random.Random` given."""

from collections.abc import Iterable, Iterator
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


def steady(rate_per_s: float) -> Iterator[float]:
    """One request every 1 / rate seconds."""
    _positive(rate_per_s, "rate")
    number = 0
    while True:
        yield number / rate_per_s
        number += 1


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
