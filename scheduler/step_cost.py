"""How long an engine's step takes: linear in what it computes (Splitwise, Vidur), learned from what streams show."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from operator import mul
from typing import Final

_FORGET: Final = 0.998  # of what was seen, kept at each observation: the last 500 or so count
_PRIOR: Final = 1e-6  # what the assumption counts, in observations
_ALIKE: Final = 1.0  # likewise what is known of others like it
_SURPRISE: Final = 1.5  # times what the model says: above it an observation counts less
_LEAST_SCALE: Final = 0.2
_LEAST_WEIGHT: Final = 0.02
_PAIR_SCALE: Final = 1e-7  # seconds
_LEAST_STEP_S: Final = 1e-5
_SOLVE_EVERY: Final = 8  # observations, once there are some


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one step, and for each prompt token that it reads, each sequence that decodes in it, each token of
    context that these attend to, each prompt token whose KV it takes over from another engine, and each pair of a
    prompt token that it reads and one before it, to which it attends.

    The defaults are a 7B model's on one GPU: what is assumed of an engine of which nothing was seen.
    """

    fixed_s: float = 0.01
    prompt_token_s: float = 60e-6
    sequence_s: float = 40e-6
    context_token_s: float = 25e-9
    fetched_token_s: float = 1e-6
    attended_s: float = 2e-9

    @classmethod
    def fit(cls, assumed: "StepCost", like: "LinearFit | None" = None) -> "LinearFit":
        """Of the costs, in their order. A pair of tokens may cost many times what it does on a GPU."""
        return LinearFit(astuple(assumed), (*astuple(assumed)[:-1], max(_PAIR_SCALE, assumed.attended_s)), like)

    @classmethod
    def of(cls, fit: "LinearFit") -> "StepCost":
        """As fitted. Each step takes some time."""
        fixed_s, *rest = fit.coefficients
        return cls(max(_LEAST_STEP_S, fixed_s), *rest)

    def decode_s(self, sequences: float, context_tokens: float) -> float:
        """Of a step that reads no prompt."""
        return self.fixed_s + self.sequence_s * sequences + self.context_token_s * context_tokens

    def prompt_s(self, tokens: float, pairs: float) -> float:
        """Of reading so many tokens, beside what the steps take that do it."""
        return self.prompt_token_s * tokens + self.attended_s * pairs


def pairs_of(tokens: float, cached_tokens: float = 0.0) -> float:
    """Pairs of each of `tokens` and those before it in the prompt, of which `cached_tokens` need not be read."""
    return tokens * (cached_tokens + tokens / 2)


class LinearFit:
    """Least squares of relative errors with no coefficient below zero; recent observations count most.

    assumed: the coefficients before anything was seen, above zero. scales: how far each may be from that, in order of
    magnitude; as far as it is large if None. like: a fit of several that are probably alike, this one among them: it
    stands in for what was not seen here. Constant work per observation; the equations are solved now and then.
    """

    def __init__(
        self, assumed: Sequence[float], scales: Sequence[float] | None = None, like: "LinearFit | None" = None
    ) -> None:
        self.coefficients = tuple(assumed)
        self.seen = 0
        self._scales = tuple(assumed if scales is None else scales)
        self._like = like
        self._expected = [value / scale if scale else 1.0 for value, scale in zip(assumed, self._scales, strict=True)]
        self._products = [[0.0] * len(assumed) for _ in assumed]
        self._sums = [0.0] * len(assumed)

    def learn(self, result: float, row: Sequence[float], weight: float = 1.0) -> bool:
        """`result` was seen where the linear model has `row`. Whether the coefficients have changed.

        weight: of this observation, 0 to 1. One that is far above what the model says counts less: it may have waited
        for something that the model does not have. It still counts, for the engine may have become slower.
        """
        if result <= 0.0:
            return False
        scale = result
        if self.seen >= _SOLVE_EVERY:
            # Errors in multiples of what the model says: in multiples of a noisy result they would pull it down.
            scale = max(_LEAST_SCALE * result, sum(map(mul, self.coefficients, row)))
            weight *= min(1.0, _SURPRISE * scale / result)
        weight = max(_LEAST_WEIGHT, weight) ** 0.5
        scaled = [weight * value / scale for value in row]
        goal = weight * result / scale
        for mine, value in zip(self._products, scaled, strict=True):
            mine[:] = [was * _FORGET + value * other for was, other in zip(mine, scaled, strict=True)]
        self._sums = [was * _FORGET + goal * value for was, value in zip(self._sums, scaled, strict=True)]
        self.seen += 1
        if self.seen > _SOLVE_EVERY and self.seen % _SOLVE_EVERY:
            return False
        self.coefficients = self._solved()
        return True

    def _solved(self) -> tuple[float, ...]:
        """In multiples of their scales, so that the equations are well scaled; the most negative one leaves until none
        is."""
        scale, expected, prior = self._scales, self._expected, _PRIOR
        if self._like is not None and self._like.seen >= _SOLVE_EVERY:
            known = self._like.coefficients
            scale = tuple(value or own for value, own in zip(known, scale, strict=True))
            expected, prior = [float(value > 0.0) for value in known], _ALIKE
        inside = list(range(len(scale)))
        while True:
            matrix = [[self._products[i][j] * scale[i] * scale[j] + prior * (i == j) for j in inside] for i in inside]
            found = _solve(matrix, [self._sums[i] * scale[i] + prior * expected[i] for i in inside])
            worst = min(range(len(found)), key=found.__getitem__)
            if found[worst] >= 0.0 or len(inside) == 1:
                break
            del inside[worst]
        kept = dict(zip(inside, found, strict=True))
        return tuple(max(0.0, kept.get(at, 0.0)) * of for at, of in enumerate(scale))


def _solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Gaussian elimination of a small positive definite system, which needs no pivots."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for at in range(size):
        for below in range(at + 1, size):
            factor = rows[below][at] / rows[at][at]
            for column in range(at, size + 1):
                rows[below][column] -= factor * rows[at][column]
    found = [0.0] * size
    for at in reversed(range(size)):
        rest = sum(rows[at][column] * found[column] for column in range(at + 1, size))
        found[at] = (rows[at][size] - rest) / rows[at][at]
    return found
