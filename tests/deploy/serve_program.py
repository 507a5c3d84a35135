"""`evenhand serve` as a program whose engine and machine a test chooses.

Environment: `TEST_ENGINE` is the engine's command line, with {port} and {model} filled in (default: the fake engine);
`TEST_FREE_BYTES`, `TEST_VERSION`, `TEST_BUILD` and `TEST_NIXL` change what the machine seems to be.
`TEST_GRACE_S` is the engine's grace.
"""

import argparse
import math
import os
import shlex
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from deploy import cli

if TYPE_CHECKING:
    from deploy.engine.engine_args import EngineCommand, EnginePlan, Ports
    from deploy.machine.machine import Machine
    from deploy.serve.serving import Surroundings

FAKE_ENGINE = "{python} -m loadtest.fake.engine --port {port} --model {model} --cost instant"


def engine(plan: "EnginePlan", ports: "Ports", python: str) -> "EngineCommand":
    from deploy.engine.engine_args import KEY_NAME, EngineCommand

    template = os.environ.get("TEST_ENGINE", FAKE_ENGINE)
    argv = [part.format(python=python, port=ports.http, model=plan.served_name) for part in shlex.split(template)]
    return EngineCommand((*argv, *plan.user_args), {KEY_NAME: plan.key}, f"http://127.0.0.1:{ports.http}")


def machine() -> "Machine":
    from deploy.machine.machine import Engine, look
    from tests.deploy.fake_gpus import h100s

    seen = look(os.environ)
    free = int(os.environ.get("TEST_FREE_BYTES", 32 * 1024**3))
    build = os.environ.get("TEST_BUILD", "cpu")
    version = os.environ.get("TEST_VERSION", "0.32.0")
    engine = Engine("vllm", version, "cuda" if build == "cuda" else "cpu")
    nixl = os.environ.get("TEST_NIXL", "yes") == "yes"
    gpus = h100s(int(os.environ.get("TEST_GPUS", "0")))
    return replace(seen, available_bytes=free, shared_bytes=math.inf, engine=engine, nixl=nixl, gpus=gpus)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from deploy.serve import serve

    serve.add_arguments(parser)


def surroundings() -> "Surroundings":
    from deploy.engine.worker import Timing
    from deploy.serve.serving import Surroundings

    grace_s = float(os.environ.get("TEST_GRACE_S", "2"))
    timing = Timing(probe_every_s=0.05, watch_every_s=0.05, backoff_s=0.1, grace_s=grace_s)
    return Surroundings(machine, engine, timing)


def run(args: argparse.Namespace) -> int:
    from deploy.serve import serve

    return serve.run(args, surroundings())


def main(argv: list[str]) -> int:
    """As the `evenhand` command does it: what is slow to import comes after it is ready for a Ctrl-C."""
    return cli.main(["serve", *argv], {"serve": cli.Command(__name__, "serve with a test's engine")})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
