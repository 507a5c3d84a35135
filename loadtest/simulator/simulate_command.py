"""`evenhand simulate`: a trace through the real policies in virtual time, as if it had been replayed."""

import argparse
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from time import perf_counter

from rich.console import Console

from loadtest import provenance
from loadtest.call import TraceCall
from loadtest.records import Fidelity, Recorded, Run, Writer
from loadtest.replay import options, prepare
from loadtest.replay.prepare import CannotReplay
from loadtest.report import report
from loadtest.report.comparison import Side, rows, side_of
from loadtest.report.page import page
from loadtest.report.trust import trust
from loadtest.simulator.costmodel import PRESETS, CostModel
from loadtest.simulator.simulate import Plan, Simulation, block_prompts
from loadtest.traces.formats import Skipped
from loadtest.traces.workload import Fit, Maker, parse_shares
from scheduler.catalog import choose, describe
from scheduler.objectives import Objectives

_OPEN_ANSWER_TOKENS = 256  # of an answer whose length the trace does not say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", help=options.TRACE_HELP)
    _add_servers(parser)
    parser.add_argument(
        "--limit", type=options.at_least(1), help="number of requests (default: all of a trace, 200 of a workload)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for the records, POLICY.jsonl, in the format of `evenhand replay`",
    )
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write the report as an HTML page")
    options.add_when(parser.add_argument_group("when"))
    what = parser.add_argument_group("what")
    options.add_form(what)
    what.add_argument(
        "--context", type=options.at_least(2),
        help="context length of the model, tokens (default: the size of the cost model's KV cache)",
    )  # fmt: skip
    judged = parser.add_argument_group("objectives")
    judged.add_argument("--ttft", type=options.positive, help="TTFT objective, seconds")
    judged.add_argument("--tpot", type=options.positive, help="TPOT objective, seconds")
    parser.epilog = describe()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def _add_servers(parser: argparse.ArgumentParser) -> None:
    """The gateway and the engines that are simulated."""
    parser.add_argument(
        "--policy", default="fcfs", metavar="NAME[:KEY=VALUE…],…",
        help="policies to compare, the first is the baseline (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="engines behind the gateway (default: %(default)s)")
    parser.add_argument(
        "--prefill-workers", type=int, default=0,
        help="additional engines for prefill: for nothing else, or by preference if an objective is set "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--slo-ttft", type=options.positive, metavar="S", help="place requests by prediction, with this TTFT objective"
    )
    parser.add_argument("--slo-tpot", type=options.positive, metavar="S", help="the same with this TPOT objective")
    parser.add_argument(
        "--step-tokens",
        type=options.at_least(1),
        metavar="N",
        help="token budget of a step, instead of the cost model's",
    )
    parser.add_argument(
        "--answer-step-tokens",
        type=options.at_least(1),
        metavar="N",
        help="token budget of a step of engines that prefer decode",
    )
    parser.add_argument(
        "--ahead", type=int, metavar="N",
        help="requests sent to an engine beyond its batch (default: the policy's choice)",
    )  # fmt: skip
    parser.add_argument(
        "--cost", choices=sorted(PRESETS), default="gpu-7b", help="cost model of an engine (default: %(default)s)"
    )
    parser.add_argument("--cost-file", type=Path, metavar="JSON", help="cost model from `evenhand calibrate`")
    parser.add_argument("--slots", type=int, help="batch slots of an engine, instead of the cost model's")


def run(args: argparse.Namespace) -> int:
    """0, or 2 when a trace cannot be read or a request can never run."""
    screen = Console(stderr=True)
    objective = report.Objective.of(args.ttft, args.tpot)
    try:
        sides = [simulated(args, text, objective, screen) for text in args.policy.split(",")]
        if args.html:
            args.html.write_text(page(sides, objective, command=provenance.command()), "utf-8")
    except (CannotReplay, ValueError, OSError) as error:
        screen.print(f"evenhand simulate: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    for side in sides:
        sys.stdout.write(f"{side.name}: {trust(side.runs[0])}\n")
    sys.stdout.write("\n" + report.text(rows(sides)) + "\n")
    return 0


def simulated(args: argparse.Namespace, text: str, objective: report.Objective | None, screen: Console) -> Side:
    """One policy, NAME[:KEY=VALUE…], as the options say. Raises what `run` tells."""
    policy, options = choose(text)
    cost = cost_of(args, args.step_tokens)
    if args.workers < 1 or args.prefill_workers < 0:
        raise ValueError("There must be at least one worker that answers.")
    plan = Plan(
        cost,
        policy,
        options,
        workers=args.workers,
        prefill_workers=args.prefill_workers,
        ahead=args.ahead,
        objectives=objectives_of(args),
        answer_chunk_tokens=args.answer_step_tokens,
        concurrency=args.concurrency,
        think=args.think,
    )
    skipped = Skipped()
    room = cost.kv_capacity_tokens
    maker = Maker(
        block_prompts(cost.prefix_block_tokens),
        Fit(args.length_scale, min(args.context or room, room)),
        parse_shares(args.shares) if args.shares else None,
        wait=not args.no_wait,
        text=False,
        open_tokens=args.output_tokens or _OPEN_ANSWER_TOKENS,
    )
    calls, _ = prepare.calls_of(args, maker, skipped)
    out = args.out / f"{text.replace('=', '-')}.jsonl" if args.out else None
    told = {"workers": f"{args.workers}", "prefill workers": f"{args.prefill_workers}", "cost model": words(cost)}
    began = perf_counter()
    recorded = simulate(plan, calls, out, Path(args.trace).stem, told, skipped, maker.fidelity)
    took_s = perf_counter() - began
    requests = recorded.total().requests
    screen.print(
        f"{text}: {requests:,} requests in {took_s:.1f} s, {requests / max(took_s, 1e-9):,.0f} requests/s simulated",
        highlight=False,
    )
    return side_of(text.replace("=", " "), recorded, objective)


def objectives_of(args: argparse.Namespace) -> Objectives | None:
    """What placement by prediction keeps to; None where no objective is named."""
    if not (args.slo_ttft or args.slo_tpot):
        return None
    return Objectives(args.slo_ttft or inf, args.slo_tpot or inf)


def cost_of(args: argparse.Namespace, step_tokens: int | None = None) -> CostModel:
    """The cost model that the options name. ValueError for a file that is none.

    step_tokens: that a step computes at most, in place of the cost model's.
    """
    cost = CostModel.read(args.cost_file) if args.cost_file else PRESETS[args.cost]
    return replace(
        cost,
        max_seqs=args.slots or cost.max_seqs,
        max_batched_tokens=step_tokens or cost.max_batched_tokens,
    )


def simulate(
    plan: Plan,
    calls: Iterable[TraceCall],
    out: Path | None,
    workload: str,
    told: Mapping[str, str],
    skipped: Skipped | None = None,
    fidelity: Fidelity | None = None,
) -> Recorded:
    """One simulation, and its file as a replay would have written it. Raises what `Simulation` does, and OSError where
    the file cannot be written."""
    with Writer(out) if out is not None else nullcontext() as writer:
        done = Simulation(plan, writer.write if writer is not None else None).run(calls)
        line = Run(
            target="in virtual time",
            workload=workload,
            started_at="",
            duration_s=done.kept.totals.end_s,
            options={"policy": ":".join([plan.policy, *(f"{k}={v}" for k, v in plan.policy_options.items())]), **told},
            skipped=str(skipped) if skipped is not None and skipped.count else "",
            command=provenance.command(),
            machine=provenance.machine(),
            versions=provenance.versions(),
            requests=done.kept.totals.requests,
            fidelity=fidelity,
            concurrency=plan.concurrency or 0,
        )
        if writer is not None:
            for sample in done.samples:
                writer.sample(sample)
            writer.finish(line)
    if writer is not None and writer.failed is not None:
        raise writer.failed
    return Recorded.of(line, done.kept, done.samples)


def words(cost: CostModel) -> str:
    """A cost model in one line."""
    return ", ".join(f"{name} {value:g}" for name, value in asdict(cost).items())
