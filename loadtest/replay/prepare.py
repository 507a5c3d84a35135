"""What a replay needs before its first request: the server's model and context, keys, and the calls, made as needed."""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappushpop
from itertools import chain, islice, tee
from pathlib import Path
from random import Random

import httpx2
import orjson
import yaml

from loadtest.call import TRACE, TraceCall
from loadtest.client.client import Manner
from loadtest.client.samples import PERIOD_S
from loadtest.client.target import Target, base_url
from loadtest.records import Fidelity, Writer, ended
from loadtest.report import report
from loadtest.traces import arrivals
from loadtest.traces.formats import Skipped, TraceRow, read
from loadtest.traces.prompts import Prompts, text_prompts, token_count, token_prompts
from loadtest.traces.rows import estimate_tokens
from loadtest.traces.workload import CONVERSATIONS, MIXES, Fit, Maker, conversations, mean_turns, parse_shares, shapes

_ANSWER_S = 10.0  # for the one question asked before a run: which model is served
_DISORDER = 1 << 15  # rows read ahead, for a recording has its rows in the order in which they ended
_CONTEXTS = ("max_model_len", "context_length", "context_window", "max_context_length")


class CannotReplay(Exception):
    """The run cannot begin; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that can begin. calls: in order of time, made as they are needed. total: how many, 0 if unknown.

    append: to the records of the run that this one goes on with; its times begin at `offset_s`.
    """

    target: Target
    calls: Iterator[TraceCall]
    total: int
    concurrency: int | None
    drain_s: float
    out: Path | None
    name: str
    objective: report.Objective | None
    skipped: Skipped
    quiet: bool
    metrics: Sequence[str] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    sample_s: float = PERIOD_S
    manner: Manner = Manner()
    fidelity: Fidelity | None = None
    append: bool = False
    offset_s: float = 0.0


def prepare(args: argparse.Namespace) -> Prepared:
    """Everything that can go wrong before the first request goes wrong here: CannotReplay, ValueError or OSError."""
    keys, names = _keys(args.tenants)
    shares = parse_shares(args.shares) if args.shares else dict.fromkeys(names, 1.0) or None
    model, context_tokens = served(args.url, args.key or next(iter(keys.values()), ""), args.model)
    target = Target(
        args.url,
        model,
        args.key,
        keys,
        _extra(args.extra),
        tenant_xargs=args.tenant_xargs,
        exact_length=not args.free_length,
        api=args.api or "",
        timeout_s=args.timeout,
    )
    skipped, fidelity = Skipped(), Fidelity()
    maker = Maker(
        _prompts(args),
        Fit(args.length_scale, args.context or context_tokens),
        shares,
        wait=not args.no_wait,
        text=sends_text(args),
        open_tokens=args.output_tokens or 0,
        fidelity=fidelity,
    )
    calls, total = calls_of(args, maker, skipped)
    prepared = Prepared(
        target, calls, total, args.concurrency, args.timeout if args.drain is None else args.drain, args.out,
        Path(args.trace).name, report.Objective.of(args.ttft, args.tpot), skipped, args.quiet,
        args.metrics or [base_url(args.url)], manner=_manner(args), fidelity=fidelity,
    )  # fmt: skip
    return _beside_old(prepared, args)


def _manner(args: argparse.Namespace) -> Manner:
    return Manner(
        think=args.think,
        own_answers=args.answers == "server" and not args.no_wait,
        duration_s=args.duration or float("inf"),
        most_errors=float("inf") if args.max_errors is None else args.max_errors,
        warmup_s=args.warmup,
    )


def _beside_old(prepared: Prepared, args: argparse.Namespace) -> Prepared:
    """What an earlier run left in --out is not overwritten, or is gone on with."""
    out = prepared.out
    if out is None or not out.exists() or out.stat().st_size == 0:
        _writable(out)
        return prepared
    if args.resume:
        ids, end_s = ended(out)
        calls = _resumed(prepared.calls, ids, end_s)
        return replace(prepared, calls=calls, total=max(0, prepared.total - len(ids)), append=True, offset_s=end_s)
    if not args.force:
        raise CannotReplay(f"{out} has the records of an earlier run: give --resume, --force or another --out.")
    return prepared


def _writable(out: Path | None) -> None:
    if out is not None:
        with Writer(out):
            pass


def _resumed(calls: Iterator[TraceCall], ids: set[str], end_s: float) -> Iterator[TraceCall]:
    """What was not sent, at once, in its own rhythm. Times go on after the end of the first run."""
    shift_s: float | None = None
    for call in calls:
        if call.id in ids:
            continue
        shift_s = end_s - call.at_s if shift_s is None else shift_s
        yield replace(call, at_s=call.at_s + shift_s)


def sends_text(args: argparse.Namespace) -> bool:
    """Whether the trace's own text is sent. ValueError if that was requested and is impossible."""
    if args.prompts == "text" and args.length_scale != 1.0:
        raise ValueError("--length-scale cannot shorten text: leave one of --prompts text and --length-scale out.")
    return args.prompts == "text" or (args.prompts is None and args.length_scale == 1.0)


def _extra(text: str) -> dict[str, object]:
    try:
        extra = orjson.loads(text)
    except orjson.JSONDecodeError:
        extra = None
    if not isinstance(extra, dict):
        raise CannotReplay('--extra must be a JSON object, for example {"top_k": 1}.')
    return extra


def _keys(path: Path | None) -> tuple[dict[str, str], list[str]]:
    """First key of each tenant, and the names of all."""
    if path is None:
        return {}, []
    parsed = yaml.safe_load(path.read_text())
    tenants = parsed.get("tenants") if isinstance(parsed, dict) else None
    if not isinstance(tenants, list):
        raise CannotReplay(f"{path} has no list `tenants`: give a tenant file as `evenhand serve` takes it.")
    keys = {str(tenant["name"]): str(tenant["keys"][0]) for tenant in tenants if tenant.get("keys")}
    return keys, [str(tenant["name"]) for tenant in tenants]


def served(url: str, key: str, model: str | None) -> tuple[str, int]:
    """The model to ask for, and its context in tokens (0 if the server does not say)."""
    headers = {"authorization": f"Bearer {key}", "x-api-key": key} if key else {}
    base = base_url(url)
    if not base.startswith(("http://", "https://")):
        raise CannotReplay(f"{url!r} is not a URL: write it as http://HOST:PORT.")
    try:
        answer = httpx2.get(f"{base}/v1/models", headers=headers, timeout=_ANSWER_S)
        if answer.status_code in (401, 403):
            raise CannotReplay(_refused(base, answer.status_code, key))
        answer.raise_for_status()
        cards = {card["id"]: card for card in answer.json()["data"]}
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        if model is not None:
            return model, 0
        raise CannotReplay(
            f"{base} does not list its models ({error}). Is it running? If it lists none, give --model."
        ) from error
    name = model or next(iter(cards), None)
    if name is None:
        raise CannotReplay(f"{base} serves no model yet: wait until /ready answers 200, or give --model.")
    card = cards.get(name, {})
    return name, int(next((card[field] for field in _CONTEXTS if card.get(field)), 0))


def _refused(base: str, status: int, key: str) -> str:
    if not key:
        return f"{base} requires an API key (HTTP {status}): give --key KEY, or --tenants FILE."
    return f"{base} does not accept the API key (HTTP {status}): check --key, or the first key in --tenants."


def _prompts(args: argparse.Namespace) -> Prompts:
    """Token ids are exact everywhere, but only /v1/completions takes them."""
    if args.api in (None, "completions") and args.tokenizer is None:
        return token_prompts(args.seed)
    return text_prompts(args.seed, args.tokenizer)


# Calls


def calls_of(args: argparse.Namespace, maker: Maker, skipped: Skipped) -> tuple[Iterator[TraceCall], int]:
    """The calls that the options ask for, made as they are needed, and how many (0: not known). CannotReplay says what
    to do."""
    rng = Random(args.seed)
    named = not Path(args.trace).exists()
    if named and args.trace == CONVERSATIONS:
        times_s = _paced(args, 1.0 / mean_turns(args.traces))
        said = conversations(Random(args.seed + 1), args.traces)
        return _limited(maker.conversations(said, times_s, rng), args)
    if named and args.trace in MIXES:
        drawn = shapes(args.trace, Random(args.seed + 1), args.traces)
        return _limited(maker.calls(drawn, _paced(args, 1.0), rng), args)
    count = token_count(args.tokenizer) if getattr(args, "tokenizer", None) else estimate_tokens
    rows = read(Path(args.trace), form=args.form or "", skipped=skipped, columns=args.columns, count=count)
    rows = islice(rows, args.limit)
    first = next(rows, None)
    if first is None:
        raise CannotReplay(f"{args.trace} has no row that can be replayed: {skipped}.")
    rows = chain([first], rows)
    if first.at_s is not None:
        rows = in_order(rows, skipped, maker.fidelity)
    for_rows, for_times = tee(rows)
    return maker.replay(for_rows, _times(args, for_times, first), rng), args.limit or 0


def _limited(calls: Iterator[TraceCall], args: argparse.Namespace) -> tuple[Iterator[TraceCall], int]:
    """A workload never ends by itself."""
    if args.limit is None and (getattr(args, "duration", None) or args.stages):
        return calls, 0
    total = args.limit or 200
    return islice(calls, total), total


def in_order(
    rows: Iterable[TraceRow], skipped: Skipped, fidelity: Fidelity, most: int = _DISORDER
) -> Iterator[TraceRow]:
    """In order of arrival, counted from the first; a recording has its rows in the order in which they ended.

    Rows are sorted within `most` of each other, so that a trace of any length takes little memory; what is farther out
    of order is counted, and comes as soon as it is met.
    """
    timed = _timed(rows, skipped)
    heap = [(row.at_s or 0.0, number, row) for number, row in enumerate(islice(timed, most))]
    heapify(heap)
    first_s = heap[0][0] if heap else 0.0
    latest_s = first_s
    after = (heappushpop(heap, (row.at_s or 0.0, number, row)) for number, row in enumerate(timed, most))
    for at_s, _, row in chain(after, iter(lambda: heappop(heap) if heap else None, None)):
        fidelity.out_of_order += at_s < latest_s
        latest_s = max(latest_s, at_s)
        yield replace(row, at_s=latest_s - first_s) if first_s or at_s < latest_s else row


def _timed(rows: Iterable[TraceRow], skipped: Skipped) -> Iterator[TraceRow]:
    for number, row in enumerate(rows, 1):
        if row.at_s is None:
            skipped.add(number, "it has no time, and others have")
        else:
            yield row


def _times(args: argparse.Namespace, rows: Iterator[TraceRow], first: TraceRow) -> Iterator[float]:
    own = args.rate is None and args.concurrency is None and args.stages is None
    if own and first.at_s is None:
        raise CannotReplay(f"{args.trace} has no times: give --rate REQUESTS_PER_SECOND, --stages or --concurrency N.")
    if own:
        return arrivals.timed((row.at_s or 0.0 for row in rows), args.rate_scale)
    paced = _paced(args, args.rate_scale)
    if args.think == TRACE:
        return paced
    return _at_first_turns(rows, paced)


def _at_first_turns(rows: Iterator[TraceRow], paced: Iterator[float]) -> Iterator[float]:
    """A conversation's later turns are due with its first: how long they wait is the time to think."""
    session, at_s = "", 0.0
    for row, next_s in zip(rows, paced, strict=False):
        if not row.session or row.session != session:
            at_s = next_s
        session = row.session
        yield at_s


def _paced(args: argparse.Namespace, scale: float) -> Iterator[float]:
    rng = Random(args.seed + 2)
    if args.stages:
        return arrivals.staged(
            [replace(one, from_per_s=one.from_per_s * scale, to_per_s=one.to_per_s * scale) for one in args.stages],
            args.cv,
            rng,
        )
    rate_per_s = (args.rate or 1.0) * scale
    if args.on_off:
        on_s, off_s = args.on_off
        return arrivals.on_off(rate_per_s, on_s, off_s, rng)
    return arrivals.gamma(rate_per_s, args.cv, rng)
