"""Latency objectives: bounds on the time to the first token and on the time per later token."""

from dataclasses import dataclass
from math import inf
from typing import Final


@dataclass(frozen=True, slots=True)
class Objectives:
    """Service-level objectives of one request, in seconds; `inf` for none.

    ttft_s: from arrival to the first token. tpot_s: mean time per later token.
    """

    ttft_s: float = inf
    tpot_s: float = inf


NO_OBJECTIVES: Final = Objectives()
