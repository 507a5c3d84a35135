"""How much flex work a step of an engine has room for: as much as keeps its predicted time within a budget.

HyGen's rule (Sun et al., NeurIPS 2025): the time of a step is linear in what it computes, the coefficients are fitted
online from the engine's own steps, and offline work is added only up to a budget that follows from the objective for
the time per output token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Final

from scheduler.step_cost import StepCost, pairs_of

_KNOWN: Final = 8  # steps after which a prediction counts
_STRETCH: Final = 4.0  # the budget in empty steps, where there is no objective
_LEAST_TOKENS: Final = 64  # of a prompt in one step of an engine that has nothing else to do
_LATELY_S: Final = 30.0  # in which the memory that others do not need any more is given to flex


@dataclass(slots=True)
class StepLoad:
    """What a step computes. prompt_tokens: of prompts; sequences: that make a token each, over `context` KV tokens.
    pairs: of a prompt token and one before it, to which it attends."""

    prompt_tokens: int = 0
    sequences: int = 0
    context: int = 0
    pairs: float = 0.0

    def add_prompt(self, tokens: int, before: int) -> None:
        """So many tokens of a prompt are computed, behind `before` others."""
        self.prompt_tokens += tokens
        self.pairs += pairs_of(tokens, before)


class StepModel:
    """Seconds of a step: a constant, and so much for each token of a prompt, each pair of these, each sequence and each
    KV token it reads. A step costs some 10 µs to learn from."""

    __slots__ = ("_fit",)

    def __init__(self) -> None:
        self._fit = StepCost.fit(StepCost())  # nothing is fetched within a step: that cost stays as assumed

    @property
    def is_known(self) -> bool:
        return self._fit.seen >= _KNOWN

    @property
    def empty_s(self) -> float:
        """Of a step as such."""
        return self._fit.coefficients[0]

    @property
    def per_prompt_token_s(self) -> float:
        return self._fit.coefficients[1]

    @property
    def per_sequence_s(self) -> float:
        return self._fit.coefficients[2]

    @property
    def per_context_token_s(self) -> float:
        return self._fit.coefficients[3]

    def prompt_s(self, tokens: float, before: float) -> float:
        """Of reading so many tokens of a prompt behind `before` others, beside the rest of the step."""
        return self.per_prompt_token_s * tokens + self._fit.coefficients[5] * pairs_of(tokens, before)

    def tokens_within(self, seconds: float, before: float) -> float:
        """The inverse: how many tokens that is time for."""
        pair_s = self._fit.coefficients[5]
        first_s = self.per_prompt_token_s + pair_s * before
        divisor = first_s + sqrt(first_s * first_s + 2.0 * pair_s * seconds)
        return 2.0 * seconds / divisor if divisor > 0.0 else inf

    def predicted_s(self, load: StepLoad) -> float:
        """Seconds of a step."""
        return (
            self.empty_s
            + self.per_prompt_token_s * load.prompt_tokens
            + self.per_sequence_s * load.sequences
            + self.per_context_token_s * load.context
            + self._fit.coefficients[5] * load.pairs
        )

    def learn(self, load: StepLoad, seconds: float) -> None:
        """A step took so long. One of many times what was expected (a pause of the process) counts for little."""
        self._fit.learn(seconds, (1.0, load.prompt_tokens, load.sequences, load.context, 0.0, load.pairs))


class Slack:
    """What a step has room for beside the work of others."""

    __slots__ = ("model",)

    def __init__(self) -> None:
        self.model = StepModel()

    def room(
        self,
        others: StepLoad,
        contexts: Sequence[int],
        step_tokens: int,
        tpots_s: Iterable[float] = (),
        before: int = 0,
    ) -> tuple[int, int]:
        """How many of the flex sequences that decode, with so many KV tokens each, make a token in a step in which
        others compute `others`, and how many tokens of flex prompts are read, of `step_tokens` that the step may have.

        tpots_s: the times per token that the others are to keep, `inf` for those that have no objective. before: tokens
        of the flex prompt that are read already. All and all as long as little is known. Where there are no others,
        something is always done.
        """
        model = self.model
        used = others.prompt_tokens + others.sequences
        free = max(0, step_tokens - used)
        if not model.is_known:
            return min(len(contexts), free), max(0, free - len(contexts))
        left_s = self._budget_s(others, tpots_s) - model.predicted_s(others)
        alone = not used
        decoding = len(contexts) if alone else 0
        while decoding < len(contexts):
            left_s -= model.per_sequence_s + model.per_context_token_s * contexts[decoding]
            if left_s < 0.0:
                break
            decoding += 1
        if alone:
            left_s -= model.per_sequence_s * decoding + model.per_context_token_s * sum(contexts)
        tokens = min(float(free), model.tokens_within(max(0.0, left_s), before))
        least = _LEAST_TOKENS if alone else 0
        return min(decoding, free), max(0, min(free - decoding, max(int(tokens), least)))

    def _budget_s(self, others: StepLoad, tpots_s: Iterable[float]) -> float:
        """The longest step in which flex takes part: the tightest objective of the others, which counts as four times
        what a step takes as such where there is none. One that no step can keep does not count."""
        long_s = _STRETCH * self.model.empty_s
        least_s = self.model.predicted_s(StepLoad(0, others.sequences, others.context))
        budgets_s = (tpot_s if tpot_s < inf else long_s for tpot_s in tpots_s)
        return min((budget_s for budget_s in budgets_s if budget_s >= least_s), default=long_s)


class Headroom:
    """KV memory that flex does not start in, because others had it lately and will probably want it again: what flex
    then has to give back to them it computes twice.

    Counted in KV blocks, and only in steps in which there is flex: what others had before the first is not known.
    """

    __slots__ = ("_at", "_now", "_peak")

    def __init__(self) -> None:
        self._peak = self._now = 0.0
        self._at = 0.0

    def note(self, blocks: int, now: float) -> None:
        """Others hold so many blocks now."""
        faded = min(1.0, max(0.0, now - self._at) / _LATELY_S)
        self._at = now
        self._now = blocks
        self._peak = max(float(blocks), self._peak - faded * (self._peak - blocks))

    @property
    def are_there(self) -> bool:
        """Whether there were others lately."""
        return self._peak >= 1.0

    @property
    def blocks(self) -> float:
        """More than they hold now."""
        return self._peak - self._now
