"""`evenhand why REQUEST_ID`: explains one request from a gateway's log, in sentences."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import orjson

ENDED = "request ended"
PLACEMENTS = {
    "together": "no worker for each half was better than one for both",
    "unfit": "it cannot be split between workers",
    "no_pool": "no prefill worker, or no decode worker, was up",
    "short_prompt": "its prompt was too short to be read by another worker",
    "cached_prefix": "most of its prompt was in that worker's cache",
    "prefill_busy": "the prefill workers were busy",
    "decode_busy": "no decode worker had room",
    "back_pressure": "as much KV as allowed was on its way already",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", help="the request's x-request-id")
    parser.add_argument(
        "log", nargs="*", type=Path, help="log files of `--log-format json`; default: standard input", metavar="FILE"
    )


def run(args: argparse.Namespace) -> int:
    """Prints what the log says. 1 if the request is not in the log, 2 for a file that cannot be read."""
    try:
        found = [line for line in _lines(args.log, sys.stdin) if line.get("request_id") == args.request_id]
    except OSError as error:
        sys.stderr.write(f"evenhand why: {error.filename}: {error.strerror}\n")
        return 2
    if not found:
        sys.stderr.write(
            f"evenhand why: no request {args.request_id!r} there: give the log of a gateway with --log-format json, "
            "which has a request once it has ended\n"
        )
        return 1
    sys.stdout.write("\n\n".join(map(told, found)) + "\n")
    return 0


def _lines(files: Iterable[Path], stdin: TextIO) -> Iterator[dict[str, Any]]:
    """The lines about requests. Anything else, such as another program's line, is passed over."""
    for line in _text(files, stdin):
        at = line.find("{")  # what collects logs may put a time or a name before it
        try:
            content = orjson.loads(line[at:]) if at >= 0 else None
        except orjson.JSONDecodeError:
            continue
        if isinstance(content, dict) and content.get("message") == ENDED:
            yield content


def _text(files: Iterable[Path], stdin: TextIO) -> Iterator[str]:
    if not files:
        yield from stdin
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as stream:
            yield from stream


def told(line: dict[str, Any]) -> str:
    """One request, for a person."""
    model, served = line["model"], line.get("served_model", line["model"])
    name = model if model == served else f"{model} (answered by the model {served})"
    parts = [f"{line['request_id']}: {line['route']} for {name} at {line['time']}: {line['outcome']}"]
    parts += [_waited(line), *_failures(line), _answered(line)]
    parts.append(
        f"prompt {line['prompt_tokens']} tokens, {line['cached_tokens']} of them cached; "
        f"output {line['output_tokens']} tokens"
    )
    parts.append(_times(line))
    return "\n  ".join(filter(None, parts))


def _waited(line: dict[str, Any]) -> str:
    ahead = line.get("ahead") or 0
    queue_s = line["queue_s"]
    if queue_s is None:
        return f"never got a place; {ahead} were waiting when it came" if ahead else "never got a place"
    if not ahead and queue_s < 0.001:
        return "did not wait: a worker had room"
    if not ahead:
        return f"waited {queue_s:.3f} s for a place; no other request was waiting, but no worker had room for it"
    others = "1 request was" if ahead == 1 else f"{ahead} requests were"
    return f"waited {queue_s:.3f} s for a place; {others} waiting when it came, and every worker was full"


def _failures(line: dict[str, Any]) -> Iterator[str]:
    for failure in line.get("failures") or ():
        yield f"{failure['worker']} could not answer: {failure['outcome']}"


def _answered(line: dict[str, Any]) -> str:
    if line["worker"] is None:
        return ""
    placement = line.get("placement")
    if placement == "apart":
        return f"its prompt was read by {line.get('prefill_worker')}, and {line['worker']} answered"
    why = f": {PLACEMENTS[placement]}" if placement in PLACEMENTS else ""
    return f"went to {line['worker']}{why}"


def _times(line: dict[str, Any]) -> str:
    told = {"first token": line["ttft_s"], "end": line["e2e_s"]}
    return ", ".join(f"{name} after {seconds:.3f} s" for name, seconds in told.items() if seconds is not None)
