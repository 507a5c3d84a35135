"""Placement by prediction at the gateway: describes each request to the planner."""

from collections.abc import Callable, Mapping, Sequence
from math import inf

from scheduler.hybrid import Planner, Visit
from scheduler.pools import Pool
from scheduler.prediction import Asked
from server.observe.slo import SloTargets
from server.request.call import Phase, Ticket


class Predictor:
    """Places one model's requests by prediction, as their objectives ask."""

    def __init__(
        self,
        targets: SloTargets,
        min_prompt_tokens: int,
        clock: Callable[[], float],
        note: Callable[[float], None],
        replicas: Callable[[], int] = lambda: 1,
    ) -> None:
        """min_prompt_tokens: shorter prompts are read where they are answered. note: hears of predicted ÷ actual times
        to first token. replicas: gateways in front of these workers, this one included."""
        self._targets = targets
        self._min_prompt_tokens = min_prompt_tokens
        self._clock = clock
        self._planner = Planner(note, sharers=replicas)

    def place(self, ticket: Ticket, pools: Sequence[Pool], known: Mapping[str, int]) -> Visit | None:
        """Where a request goes, noted in the forecasts; None if no worker has room."""
        call, now = ticket.call, self._clock()
        resumes = ticket.times[Phase.DECODING] is not None
        fit = call.route.handover and call.sequences == 1 and not call.steers_kv and not ticket.avoid
        asked = Asked(
            max(1, call.prompt_tokens // call.prompts),
            call.max_tokens or inf,
            self._targets.of(call.model, call.tenant),
            splittable=fit and call.prompt_tokens >= self._min_prompt_tokens,
            waited_s=now - ticket.job.arrived_at,
            answers=call.sequences,
            silent=resumes or not call.stream,
        )
        return self._planner.place(asked, pools, known, now, ticket.avoid)
