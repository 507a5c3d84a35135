"""How far a run can be trusted, in words: whether what was sent is what was asked, how late the client was, how much of
the run is there, and whether it was interrupted. Stands first on every report."""

from collections.abc import Iterator
from dataclasses import dataclass

from loadtest.records import LATE_S, Fidelity, Recorded, Run, Totals

_NOTICED = 0.01  # a ratio of token counts that is farther from 1 is told


@dataclass(frozen=True, slots=True)
class Trust:
    """facts: in the order of their weight. doubts: those that change what the figures mean; empty if there are none."""

    facts: tuple[str, ...]
    doubts: tuple[str, ...]

    def __str__(self) -> str:
        doubts = f"{'; '.join(self.doubts)}. " if self.doubts else ""
        facts = "; ".join(self.facts)
        return f"Trust: {doubts}{facts[:1].upper()}{facts[1:]}."


def trust(recorded: Recorded) -> Trust:
    """Of one run."""
    run, totals = recorded.run, recorded.total()
    doubts = [*_interruption(recorded), *_deviations(run), *_counts(totals)]
    if run is not None and run.late:
        doubts.append(f"{run.late:,} of {_sent(run, totals):,} requests sent more than {LATE_S * 1e3:.0f} ms late")
    return Trust(tuple(_facts(recorded)), tuple(doubts))


def _sent(run: Run, totals: Totals) -> int:
    return run.requests or totals.requests


def _facts(recorded: Recorded) -> Iterator[str]:
    run, totals = recorded.run, recorded.total()
    if run is None:
        yield "the records do not say how they were made"
        return
    if run.fidelity is not None:
        yield _as_asked(run.fidelity)
    if run.lag_max_s or run.loop_max_s:
        yield f"client late by {_ms(run.lag_p99_s)} at P99, {_ms(run.lag_max_s)} at most"
    share = f"{totals.requests:,} of {_sent(run, totals):,} requests reported"
    yield share + (f" (warm-up of {run.warmup_s:g} s left out)" if run.warmup_s else "")
    if recorded.every > 1:
        yield f"percentiles and curves from every {recorded.every}th request, totals from all"
    if not run.interrupted:
        yield "not interrupted" + (f", resumed {run.resumed} ×" if run.resumed else "")


def _as_asked(seen: Fidelity) -> str:
    changed = seen.prompts_cut or seen.answers_cut or seen.dropped
    sent = "the rest sent as asked" if changed else "sent as asked"
    if not seen.made_up:
        return f"{sent}, with the trace's own text"
    made = "" if seen.made_up >= seen.requests - seen.dropped else f" in {seen.made_up:,} of {seen.requests:,} requests"
    return f"{sent}, with made-up text of the trace's lengths{made}"


def _interruption(recorded: Recorded) -> Iterator[str]:
    run, totals = recorded.run, recorded.total()
    unfinished = totals.endings.get("unfinished", 0)
    if run is not None and run.interrupted:
        yield f"INTERRUPTED ({run.stopped}): {unfinished:,} requests unfinished"
    elif run is None and unfinished:
        yield f"{unfinished:,} requests unfinished"
    if recorded.cut_off:
        yield "the file of records ends inside a line"


def _deviations(run: Run | None) -> Iterator[str]:
    if run is None:
        return
    yield from deviations(run.fidelity or Fidelity())
    if run.skipped:
        yield f"of the trace, {run.skipped}"


def deviations(seen: Fidelity) -> Iterator[str]:
    """What was sent that is not what the trace has, each with its count."""
    kept = max(1, seen.requests - seen.dropped)
    if seen.prompts_cut:
        before, after = seen.prompt_tokens / max(1, seen.requests), seen.sent_prompt_tokens / kept
        yield (
            f"{seen.prompts_cut:,} of {seen.requests:,} prompts cut to fit the context, "
            f"mean {before:,.0f} → {after:,.0f} tokens"
        )
    if seen.answers_cut:
        yield f"{seen.answers_cut:,} of {seen.requests:,} answers cut to fit the context"
    if seen.dropped:
        yield f"{seen.dropped:,} of {seen.requests:,} requests not sent, for their text does not fit the context"
    if seen.lengths_estimated:
        yield f"lengths of {seen.lengths_estimated:,} requests estimated from their text"
    if seen.answers_open:
        yield f"{seen.answers_open:,} answers whose length the trace does not say"
    if seen.out_of_order:
        yield f"{seen.out_of_order:,} rows out of order, sent later than the trace says"


def _counts(totals: Totals) -> Iterator[str]:
    """Where the server counted otherwise than was asked."""
    if totals.planned_tokens and abs(totals.prompt_tokens / totals.planned_tokens - 1) > _NOTICED:
        yield f"the server counted {totals.prompt_tokens / totals.planned_tokens:.2f} × the prompt tokens asked for"
    if totals.asked_tokens and abs(totals.answered_tokens / totals.asked_tokens - 1) > _NOTICED:
        yield f"answers have {totals.answered_tokens / totals.asked_tokens:.2f} × the tokens asked for"
    if totals.uncounted:
        yield f"{totals.uncounted:,} answers without the server's count: their tokens are events"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
