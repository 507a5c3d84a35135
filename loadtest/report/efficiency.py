"""EfficientLLM's measures of a run (Yuan et al. 2025, arXiv 2505.13840), from what the engines told meanwhile.

Mean latency and throughput are in the summary already. The paper's compression rate also weighs how much worse the
smaller model answers, which a load test cannot know.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtest.records import Sample


@dataclass(frozen=True, slots=True)
class Efficiency:
    """None for what no engine told.

    memory: mean share of the KV cache in use. compute: mean share of time in which the GPUs computed, else None.
    batch: mean share of the batch's places in use. watts: mean power of all devices that tell their energy.
    joules: what they drew. compression: how many times smaller the weights are than with 16 bits each.
    """

    memory: float | None = None
    compute: float | None = None
    batch: float | None = None
    watts: float | None = None
    joules: float | None = None
    compression: float | None = None


def efficiency(samples: Sequence[Sample]) -> Efficiency:
    """What the samples of one run come to."""
    joules, span_s = _drawn(samples)
    return Efficiency(
        memory=_mean(one.kv_usage for one in samples),
        compute=_mean(one.gpu_use for one in samples),
        batch=_mean(min(1.0, one.running / one.slots) for one in samples if one.slots and one.running is not None),
        watts=None if joules is None else joules / span_s,
        joules=joules,
        compression=_mean(one.compression or None for one in samples),  # 0: the engine does not know
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _drawn(samples: Sequence[Sample]) -> tuple[float | None, float]:
    """Joules between the first and the last sample that report them, and the seconds between those. Leaves out what a
    device drew before a restart reset its counter."""
    told = [one for one in samples if one.joules]
    if len(told) < 2:
        return None, 0.0
    last, drawn = dict(told[0].joules), 0.0  # a device that did not answer once is told of by its next sample
    for one in told[1:]:
        drawn += sum(max(0.0, now - last[device]) for device, now in one.joules.items() if device in last)
        last |= one.joules
    return drawn, told[-1].at_s - told[0].at_s
