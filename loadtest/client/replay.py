"""`evenhand replay`: send a trace or a named workload to a server, on time, and keep a record of every request."""

import argparse
import asyncio
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter

import httpx2
import orjson
import uvloop
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from loadtest import provenance
from loadtest.call import Call
from loadtest.client.client import Client, Target
from loadtest.client.samples import PERIOD_S, Sampler
from loadtest.records import Record, Run, Writer
from loadtest.report import report
from loadtest.report.comparison import sides
from loadtest.report.page import page
from loadtest.traces import arrivals
from loadtest.traces.formats import READERS, Skipped, TraceRow, read
from loadtest.traces.prompts import Prompts, text_prompts, token_prompts
from loadtest.traces.workload import (
    CONVERSATIONS,
    MIXES,
    WORKLOADS,
    Fit,
    Maker,
    conversations,
    mean_turns,
    parse_shares,
    shapes,
)

_REFRESH_S = 0.5
_ANSWER_S = 10.0  # for the one question asked before a run: which model is served
_LATE_S = 0.010


class CannotReplay(Exception):
    """The run cannot begin; the message says what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace", metavar="TRACE", help=f"a trace file ({', '.join(READERS)}), or a workload: {', '.join(WORKLOADS)}"
    )
    parser.add_argument("--url", required=True, help="the server, for example http://127.0.0.1:8000")
    parser.add_argument("--limit", type=int, help="requests to send (default: all of a trace, 200 of a workload)")
    parser.add_argument("--out", type=Path, help="write the records here, one JSON line per request")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write the report's page, and the records beside it")
    parser.add_argument(
        "--metrics", action="append", metavar="URL", help="record these servers' /metrics too (default: that of --url)"
    )
    _when(parser.add_argument_group("when"))
    _what(parser.add_argument_group("what"))
    _who(parser.add_argument_group("who"))
    judged = parser.add_argument_group("how it is judged")
    judged.add_argument("--ttft", type=float, help="objective for the first token, seconds")
    judged.add_argument("--tpot", type=float, help="objective for the mean time per further token, seconds")
    judged.add_argument("--quiet", action="store_true", help="no progress line")


def _when(group: "argparse._ArgumentGroup") -> None:
    add_when(group)
    group.add_argument("--timeout", type=float, default=600.0, help="patience per request, seconds (default: 600)")
    group.add_argument("--drain", type=float, help="wait so long for the last answers, seconds (default: --timeout)")


def add_when(group: "argparse._ArgumentGroup") -> None:
    """When calls are sent, for a replay and for a simulation of one."""
    group.add_argument("--rate-scale", type=float, default=1.0, help="pass a trace so many times as fast (default: 1)")
    group.add_argument("--rate", type=float, help="requests per second, in place of a trace's times (workloads: 1)")
    group.add_argument("--cv", type=float, default=1.0, help="burstiness with --rate: 1 is Poisson (default: 1)")
    group.add_argument(
        "--on-off", type=_on_off, metavar="ON,OFF", help="with --rate: arrivals for ON seconds, none for OFF, again"
    )
    group.add_argument(
        "--no-wait", action="store_true", help="send a conversation's next turn though the last is not answered"
    )
    group.add_argument("--concurrency", type=int, help="closed loop: keep so many requests on their way, no times")


def _on_off(text: str) -> tuple[float, float]:
    on_s, _, off_s = text.partition(",")
    return float(on_s), float(off_s)


def _what(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--form", choices=sorted(READERS), help="the trace's form (default: recognised by its content)")
    group.add_argument("--length-scale", type=float, default=1.0, help="multiply all lengths (default: 1)")
    group.add_argument("--context", type=int, help="the model's context in tokens (default: what the server says)")
    group.add_argument("--model", help="the model's name (default: the first that the server lists)")
    group.add_argument(
        "--chat", action="store_true", help="send text to /v1/chat/completions, not ids to /v1/completions"
    )
    group.add_argument(
        "--tokenizer", type=Path, help="model folder whose tokenizer makes text of exact length (--chat)"
    )
    group.add_argument("--free-length", action="store_true", help="let answers end by themselves, up to their length")
    group.add_argument("--extra", default="{}", help="JSON object added to every body")
    group.add_argument("--traces", type=Path, help="folder of trace files for the workloads (default: their quantiles)")
    group.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")


def _who(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--key", default="", help="API key")
    group.add_argument("--tenants", type=Path, help="tenant file: each tenant sends with its first key")
    group.add_argument("--shares", help="share of the requests by tenant, where a trace has none: heavy=3,light=1")
    group.add_argument("--tenant-xargs", action="store_true", help="name the tenant in vllm_xargs (engine, no gateway)")


def run(args: argparse.Namespace) -> int:
    """0 when every request ended well, 1 when some did not, 2 when the run could not begin."""
    errors = Console(stderr=True)
    if args.html and not args.out:
        args.out = args.html.with_suffix(".jsonl")
    try:
        prepared = prepare(args)
    except (CannotReplay, ValueError, OSError) as error:
        errors.print(f"evenhand replay: {error}", style="red", markup=False, highlight=False)
        return 2
    records, done = measure(prepared, errors)
    for line in _closing(prepared, records, done):
        sys.stdout.write(line + "\n")
    if args.html and prepared.out:
        read = sides([str(prepared.out)], prepared.objective)
        args.html.write_text(page(read, prepared.objective, command=provenance.command()), "utf-8")
        sys.stdout.write(f"Page: {args.html}\n")
    return 0 if all(record.ok for record in records) else 1


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that can begin. calls: in order of time, made as they are needed. total: how many, 0 if unknown."""

    target: Target
    calls: Iterator[Call]
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


def prepare(args: argparse.Namespace) -> Prepared:
    """Everything that can go wrong before the first request goes wrong here."""
    keys, names = _keys(args.tenants)
    shares = parse_shares(args.shares) if args.shares else dict.fromkeys(names, 1.0) or None
    model, context_tokens = served(args.url, args.key or next(iter(keys.values()), ""), args.model)
    extra = orjson.loads(args.extra)
    if not isinstance(extra, dict):
        raise CannotReplay('--extra must be a JSON object, for example {"top_k": 1}.')
    target = Target(
        args.url,
        model,
        args.key,
        keys,
        extra,
        tenant_xargs=args.tenant_xargs,
        exact_length=not args.free_length,
        chat=args.chat,
        timeout_s=args.timeout,
    )
    fit = Fit(args.length_scale, args.context or context_tokens or 8192)
    skipped = Skipped()
    calls, total = calls_of(args, Maker(_prompts(args), fit, shares, wait=not args.no_wait), skipped)
    objective = report.Objective.of(args.ttft, args.tpot)
    drain_s = args.timeout if args.drain is None else args.drain
    return Prepared(
        target, calls, total, args.concurrency, drain_s, args.out, args.trace, objective, skipped, args.quiet,
        args.metrics or [args.url],
    )  # fmt: skip


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
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx2.get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=_ANSWER_S)
        answer.raise_for_status()
        cards = {card["id"]: card for card in answer.json()["data"]}
    except (httpx2.HTTPError, ValueError, KeyError) as error:
        if model is not None:
            return model, 0
        raise CannotReplay(f"{url} does not say what it serves ({error}). Is it running? Else give --model.") from error
    name = model or next(iter(cards), None)
    if name is None:
        raise CannotReplay(f"{url} serves no model yet: wait until /ready answers 200, or give --model.")
    return name, int(cards.get(name, {}).get("max_model_len") or 0)


def _prompts(args: argparse.Namespace) -> Prompts:
    if not args.chat:
        return token_prompts(args.seed)
    if args.tokenizer is None:
        raise CannotReplay("--chat needs --tokenizer MODEL_FOLDER, so that prompts have their exact length.")
    return text_prompts(args.seed, args.tokenizer)


def calls_of(args: argparse.Namespace, maker: Maker, skipped: Skipped) -> tuple[Iterator[Call], int]:
    """The calls that the options ask for, made as they are needed, and how many. CannotReplay says what to do."""
    rng = Random(args.seed)
    total = args.limit or 200
    if args.trace == CONVERSATIONS and not Path(args.trace).exists():
        times_s = _paced(args, (args.rate or 1.0) / mean_turns(args.traces))
        said = conversations(Random(args.seed + 1), args.traces)
        return islice(maker.conversations(said, times_s, rng), total), total
    if args.trace in MIXES and not Path(args.trace).exists():
        drawn = shapes(args.trace, Random(args.seed + 1), args.traces)
        return islice(maker.calls(drawn, _paced(args, args.rate or 1.0), rng), total), total
    rows = list(islice(read(Path(args.trace), form=args.form or "", skipped=skipped), args.limit))
    if not rows:
        raise CannotReplay(f"{args.trace} has no row that can be replayed: {skipped}.")
    rows = _by_arrival(rows)
    return maker.replay(rows, _times(args, rows), rng), len(rows)


def _by_arrival(rows: list[TraceRow]) -> list[TraceRow]:
    """In order of arrival, counted from the first; a recording has its rows in the order in which they ended."""
    if any(row.at_s is None for row in rows):
        return rows
    first_s = min(row.at_s or 0.0 for row in rows)
    moved = [replace(row, at_s=(row.at_s or 0.0) - first_s) for row in rows]
    return sorted(moved, key=lambda row: row.at_s or 0.0)


def _times(args: argparse.Namespace, rows: Sequence[TraceRow]) -> Iterator[float]:
    if args.rate is None and args.concurrency is None:
        if any(row.at_s is None for row in rows):
            raise CannotReplay(f"{args.trace} has no times: give --rate REQUESTS_PER_SECOND or --concurrency N.")
        return arrivals.timed((row.at_s or 0.0 for row in rows), args.rate_scale)
    return _paced(args, (args.rate or 1.0) * args.rate_scale)


def _paced(args: argparse.Namespace, rate_per_s: float) -> Iterator[float]:
    rng = Random(args.seed + 2)
    if args.on_off:
        on_s, off_s = args.on_off
        return arrivals.on_off(rate_per_s, on_s, off_s, rng)
    return arrivals.gamma(rate_per_s, args.cv, rng)


# The run


def measure(prepared: Prepared, screen: Console) -> tuple[list[Record], Run]:
    """Send everything; records as they ended, and how well the client kept its schedule."""
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    with Writer(prepared.out) if prepared.out else nullcontext() as writer:
        client = Client(prepared.target, writer.write if writer else None)
        # A collection of all that a long run has kept would be seen in every latency.
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            uvloop.run(_send(client, prepared, screen, writer))
        finally:
            gc.enable()
            gc.unfreeze()
        done = run_line(client, prepared, started_at)
        if writer:
            writer.finish(done)
    return client.records, done


async def _send(client: Client, prepared: Prepared, screen: Console, writer: Writer | None) -> None:
    show = screen.is_terminal and not prepared.quiet
    with _bar(client, screen) if show else nullcontext() as bar:
        beside = [asyncio.create_task(_watch(client, bar, prepared.total))] if bar else []
        if writer is not None and prepared.metrics:
            sampler = Sampler(prepared.metrics, writer.sample, perf_counter, period_s=prepared.sample_s)
            beside.append(asyncio.create_task(sampler.run()))
        if prepared.concurrency:
            await client.closed_loop(prepared.calls, prepared.concurrency, drain_s=prepared.drain_s)
        else:
            await client.open_loop(prepared.calls, drain_s=prepared.drain_s)
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)


def run_line(client: Client, prepared: Prepared, started_at: str) -> Run:
    """What the client says of its own run."""
    lag, loop = report.spread(client.progress.lag_s), report.spread(client.progress.loop_s)
    duration_s = max((record.sent_s + record.e2e_s for record in client.records), default=0.0)
    return Run(
        target=prepared.target.url,
        workload=prepared.name,
        started_at=started_at,
        duration_s=round(duration_s, 3),
        lag_p99_s=lag.p99,
        lag_max_s=lag.max,
        loop_p99_s=loop.p99,
        loop_max_s=loop.max,
        options=dict(prepared.options),
        late=sum(lag_s > _LATE_S for lag_s in client.progress.lag_s),
        skipped=str(prepared.skipped) if prepared.skipped.count else "",
        command=provenance.command(),
        machine=provenance.machine(),
        versions=provenance.versions(),
    )


def _closing(prepared: Prepared, records: Sequence[Record], done: Run) -> Iterator[str]:
    summary = report.summarize(records, prepared.objective)
    yield report.text(report.compare({prepared.name: summary}))
    if len(summary.by_tenant) > 1:
        yield "\n" + report.text(report.tenants(summary))
    yield "\n" + report.client_lag(done)
    if done.late:
        yield f"{done.late} of {len(records)} requests were sent more than {_LATE_S * 1000:.0f} ms late."
    if prepared.skipped.count:
        yield f"Of {prepared.name}, {prepared.skipped}."
    errors = [record for record in records if not record.ok]
    if errors:
        yield f"First failure: {errors[0].ending.value}, {errors[0].error or 'no reason given'}"
    if prepared.out:
        yield f"Records: {prepared.out}"


class _Numbers(ProgressColumn):
    """The figures to watch while it runs."""

    max_refresh = _REFRESH_S

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client

    def render(self, task: Task) -> Text:
        progress = self._client.progress
        elapsed_s = task.elapsed or 1e-9
        ttft = report.seconds(median(progress.ttft_s)) if progress.ttft_s else "-"
        lag = report.seconds(max(progress.lag_s[-100:])) if progress.lag_s else "-"
        rate = progress.output_tokens / elapsed_s
        return Text(
            f"{progress.done}/{progress.sent} done  {progress.in_flight} in flight  {rate:,.0f} tok/s  "
            f"TTFT {ttft}  errors {progress.errors}  lag {lag}"
        )


def _bar(client: Client, screen: Console) -> AbstractContextManager[Progress]:
    columns = (TextColumn("replay"), BarColumn(bar_width=20), TimeElapsedColumn(), _Numbers(client))
    return Progress(*columns, console=screen, auto_refresh=False, transient=True)


async def _watch(client: Client, bar: Progress, total: int) -> None:
    """Redraws seldom: drawing happens on the loop that measures."""
    task = bar.add_task("", total=total or None)
    refresh: Callable[[], None] = bar.refresh
    while True:
        bar.update(task, completed=client.progress.done)
        refresh()
        await asyncio.sleep(_REFRESH_S)
