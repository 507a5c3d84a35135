"""The `evenhand` command: a table of subcommands, each of which is imported only when it is called."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from server.interrupts import ended_by_ctrl_c

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
OURS = ("", "deploy", "loadtest", "scheduler", "server")


class Command(NamedTuple):
    """A module with `add_arguments(parser)` and `run(arguments) -> int` (the exit code), and what it does in a line."""

    module: str
    purpose: str


COMMANDS: Mapping[str, Command] = {
    "serve": Command("deploy.serve.serve", "serve a model on this machine: the gateway and its workers"),
    "gateway": Command("server.__main__", "run only the gateway, in front of OpenAI-compatible engines"),
    "worker": Command("deploy.serve.join", "run one engine that joins the gateways on a Redis"),
    "tenant": Command("deploy.tenant", "make or hash an API key for the tenant file"),
    "model": Command("deploy.model.model", "prepare the bundled model, or download one from its hub"),
    "batch": Command("deploy.batch", "run a file of requests through a gateway's Batch API"),
    "why": Command("deploy.why", "explain why a request waited and where it went"),
    "replay": Command("loadtest.replay.replay", "send the requests of a trace to a server and record their latencies"),
    "report": Command("loadtest.report.report_command", "show latencies, goodput and fairness of recorded runs"),
    "compare": Command("deploy.compare", "run the same requests under each policy and show the difference"),
    "simulate": Command("loadtest.simulator.simulate_command", "run a trace through the real policies in virtual time"),
    "calibrate": Command("loadtest.simulator.calibrate", "fit a cost model to an engine, for simulations"),
    "advise": Command("loadtest.simulator.advise", "find the policy and the number of workers that a trace needs"),
    "bench": Command("loadtest.bench", "measure the figures of docs/benchmarks on this machine"),
    "doctor": Command("deploy.doctor", "check this machine for problems, and say how to fix them"),
}


def help_text(commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands)) + 2
    lines = "\n".join(f"  {name:<{width}}{command.purpose}" for name, command in commands.items())
    return (
        "usage: evenhand COMMAND [option …]\n\n"
        "An OpenAI-compatible server that shares LLM engines fairly.\n\n"
        f"commands:\n{lines}\n\n"
        "`evenhand COMMAND --help` shows its options with their defaults and units.\n"
        "`evenhand --version` shows the version.\n"
    )


def unknown(name: str, commands: Mapping[str, Command]) -> str:
    near = difflib.get_close_matches(name, commands, n=1, cutoff=0.5)
    hint = f"did you mean `evenhand {near[0]}`?" if near else "`evenhand --help` lists the commands."
    return f"evenhand: there is no command {name!r}; {hint}\n"


def version() -> str:
    from importlib import metadata

    return metadata.version("evenhand")


def call(name: str, rest: Sequence[str], command: Command) -> int:
    parser = argparse.ArgumentParser(
        f"evenhand {name}", description=f"{command.purpose[0].upper()}{command.purpose[1:]}."
    )
    with ended_by_ctrl_c():
        module = importlib.import_module(command.module)
        module.add_arguments(parser)
        arguments = parser.parse_args(rest)
    code: int = module.run(arguments)
    return code


def main(argv: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Returns the exit code: the command's own, 2 for a wrong call, 130 after Ctrl-C."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        sys.stdout.write(help_text(commands))
        return 0
    if name in ("-V", "--version"):
        sys.stdout.write(f"evenhand {version()}\n")
        return 0
    if name not in commands:
        sys.stderr.write(unknown(name, commands))
        return USAGE_ERROR
    try:
        return call(name, rest, commands[name])
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OURS:
            raise
        sys.stderr.write(f"evenhand {name}: the package {package!r} is not installed; `make install` installs it\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as in `| head`; what is left in the buffer must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
