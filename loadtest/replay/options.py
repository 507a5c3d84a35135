"""The options of `evenhand replay`, and those that a simulation shares with it. A wrong value is refused here."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from loadtest.call import IDLE_GAP, TRACE
from loadtest.client.target import APIS
from loadtest.traces.arrivals import parse_stages
from loadtest.traces.columns import parse_columns
from loadtest.traces.formats import READERS
from loadtest.traces.workload import WORKLOADS

TRACE_HELP = f"a trace file ({', '.join(READERS)}; plain, gzip or Zstandard), or a workload: {', '.join(WORKLOADS)}"
Value = TypeVar("Value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", help=TRACE_HELP)
    parser.add_argument("--url", required=True, help="address of the server, e.g. http://127.0.0.1:8000")
    parser.add_argument(
        "--limit", type=at_least(1), help="number of requests (default: all of a trace, 200 of a workload)"
    )
    _where(parser.add_argument_group("results"))
    _when(parser.add_argument_group("when"))
    _what(parser.add_argument_group("what"))
    _who(parser.add_argument_group("who"))
    _judged(parser.add_argument_group("how it is judged"))


def _where(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--out", type=Path, help="file for the records, one JSON line per request")
    group.add_argument(
        "--html", type=Path, metavar="PAGE", help="write the report as an HTML page, and the records next to it"
    )
    old = group.add_mutually_exclusive_group()
    old.add_argument("--force", action="store_true", help="overwrite the records of an earlier run")
    old.add_argument(
        "--resume",
        action="store_true",
        help="send the requests that an interrupted run has not sent, and append to --out",
    )
    group.add_argument(
        "--metrics", action="append", metavar="URL", help="also record /metrics of these servers (default: of --url)"
    )
    group.add_argument("--quiet", action="store_true", help="show no progress")


def _when(group: "argparse._ArgumentGroup") -> None:
    add_when(group)
    group.add_argument("--duration", type=positive, metavar="SECONDS", help="stop sending after this time")
    group.add_argument(
        "--warmup",
        type=not_negative,
        default=0.0,
        metavar="SECONDS",
        help="leave requests due before this time out of the report",
    )
    group.add_argument("--max-errors", type=at_least(0), metavar="N", help="stop when more than N requests have failed")
    group.add_argument(
        "--sweep", type=_sweep, nargs="?", const=(0.0, 0.0), metavar="LOW,HIGH",
        help="find the highest rate at which 90 %% of the requests meet --ttft and --tpot; --limit or --duration "
        "sets the length of each run (default: 200)",
    )  # fmt: skip
    group.add_argument("--timeout", type=positive, default=600.0, help="timeout of a request, seconds (default: 600)")
    group.add_argument(
        "--drain", type=not_negative, help="how long to wait for the last answers, seconds (default: --timeout)"
    )


def add_when(group: "argparse._ArgumentGroup") -> None:
    """When calls are sent, for a replay and for a simulation of one."""
    group.add_argument(
        "--rate-scale", type=positive, default=1.0, help="speed up the trace by this factor (default: 1)"
    )
    group.add_argument(
        "--rate", type=positive, help="requests per second, instead of the trace's times (default for workloads: 1)"
    )
    group.add_argument("--cv", type=positive, default=1.0, help="burstiness with --rate: 1 is Poisson (default: 1)")
    group.add_argument(
        "--on-off",
        type=_on_off,
        metavar="ON,OFF",
        help="with --rate: repeat ON seconds with arrivals and OFF seconds without",
    )
    group.add_argument(
        "--stages", type=checked(parse_stages), metavar="RATE:SECONDS,…",
        help="successive rates, or LOW-HIGH for a ramp, instead of the trace's times: 5:60,5-20:300",
    )  # fmt: skip
    group.add_argument(
        "--think", type=_think, default=TRACE, metavar=f"{TRACE}|{IDLE_GAP}|SECONDS",
        help=f"when to send the next turn of a conversation: {TRACE}, at its time, but after the previous answer; "
        f"{IDLE_GAP}, as long after that answer as the user waited; or SECONDS after it (default: {TRACE})",
    )  # fmt: skip
    group.add_argument(
        "--no-wait", action="store_true", help="send the turns of a conversation without waiting for answers"
    )
    group.add_argument(
        "--concurrency", type=at_least(1), help="closed loop: keep this number of requests running, regardless of times"
    )


def add_form(group: "argparse._ArgumentGroup") -> None:
    """How a trace is read, and how its lengths become requests."""
    group.add_argument(
        "--form", choices=sorted(READERS), help="format of the trace (default: recognised by its content)"
    )
    group.add_argument(
        "--columns", type=checked(parse_columns), metavar="prompt=NAME,output=NAME,…",
        help="columns or keys of: prompt and output (tokens), at, session, tenant, text, kind, turn",
    )  # fmt: skip
    group.add_argument("--length-scale", type=positive, default=1.0, help="multiply all lengths (default: 1)")
    group.add_argument(
        "--output-tokens", type=at_least(1), metavar="N", help="length of answers that the trace does not give"
    )
    group.add_argument(
        "--traces", type=Path, help="folder with trace files for the workloads (default: built-in quantiles)"
    )
    group.add_argument(
        "--shares", help="share of the requests per tenant, if the trace has no tenants: heavy=3,light=1"
    )
    group.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")


def _what(group: "argparse._ArgumentGroup") -> None:
    add_form(group)
    group.add_argument(
        "--context", type=at_least(2), help="context length of the model, tokens (default: as the server reports)"
    )
    group.add_argument("--model", help="model name (default: the first that the server lists)")
    group.add_argument(
        "--prompts", choices=("text", "lengths"),
        help="send the text of the trace, or generated prompts of the same lengths (default: text, if there is any)",
    )  # fmt: skip
    group.add_argument(
        "--answers", choices=("server", "trace"), default="server",
        help="whose answers the later turns of a conversation contain (default: server)",
    )  # fmt: skip
    api = group.add_mutually_exclusive_group()
    api.add_argument("--api", choices=APIS, help="API to use (default: chat for conversations, completions otherwise)")
    api.add_argument("--chat", action="store_const", const="chat", dest="api", help="the same as --api chat")
    group.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER",
        help="folder of a model: count the tokens of text, and generate text of exact length",
    )  # fmt: skip
    group.add_argument(
        "--free-length", action="store_true", help="let the model end its answers, up to their length in the trace"
    )
    group.add_argument("--extra", default="{}", help="JSON object to add to every request body")


def _who(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--key", default="", help="API key")
    group.add_argument("--tenants", type=Path, help="tenant file: requests of a tenant use its first key")
    group.add_argument(
        "--tenant-xargs", action="store_true", help="pass the tenant in vllm_xargs (to an engine without gateway)"
    )


def _judged(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--ttft", type=positive, help="TTFT objective, seconds")
    group.add_argument("--tpot", type=positive, help="TPOT objective, seconds")


# Values


def positive(text: str) -> float:
    return _number(text, lambda value: value > 0, "above 0")


def not_negative(text: str) -> float:
    return _number(text, lambda value: value >= 0, "0 or more")


def _number(text: str, good: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not good(value) or value == float("inf"):
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
    return value


def at_least(least: int) -> Callable[[str], int]:
    """A whole number that is not smaller."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, not {value}")
        return value

    return parse


def checked(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """A parser whose own words reach the user."""

    def parsed(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _on_off(text: str) -> tuple[float, float]:
    on_s, _, off_s = text.partition(",")
    return positive(on_s), not_negative(off_s)


def _sweep(text: str) -> tuple[float, float]:
    low, comma, high = text.partition(",")
    if not comma or positive(low) >= positive(high):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of rates: write LOW,HIGH")
    return positive(low), positive(high)


def _think(text: str) -> str | float:
    if text in (TRACE, IDLE_GAP):
        return text
    try:
        return not_negative(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {TRACE}, {IDLE_GAP} and SECONDS") from None
