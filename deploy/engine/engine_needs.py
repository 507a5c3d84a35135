"""What an engine needs, read from its arguments by vLLM's own parser, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploy.engine.engine_args import EngineArgsError

PARSER = "scheduler.vllm.arguments"
PATIENCE_S = 180.0  # it imports vLLM, which a cold disk makes slow


@dataclass(frozen=True, slots=True)
class EngineNeeds:
    """gpus: on this machine, None where Ray finds them. nodes: machines that compute together.

    utilization: the part of each GPU's memory that the arguments give it, None for vLLM's default.
    """

    gpus: int | None = 1
    data_parallel: int = 1
    nodes: int = 1
    utilization: float | None = None


Asking = Callable[[Sequence[str]], str]


def needs_of(args: Sequence[str], ask: Asking | None = None) -> EngineNeeds:
    """What these engine arguments ask for. EngineArgsError if vLLM refuses them.

    Without arguments nobody is asked, so that a plain start does not wait for vLLM to be imported twice.
    """
    if not args:
        return EngineNeeds()
    told = json.loads((ask or ask_vllm)(args))
    return EngineNeeds(told["gpus"], told["data_parallel"], told["nodes"], told["utilization"])


def ask_vllm(args: Sequence[str]) -> str:
    """The JSON of `scheduler.vllm.arguments`."""
    env = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", PARSER, *args],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            env=env,
        )
    except subprocess.TimeoutExpired:
        raise EngineArgsError(f"vLLM did not read its arguments within {PATIENCE_S:.0f} s: try again") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EngineArgsError(f"vLLM refuses an engine argument ({said.partition('error: ')[2] or said}): correct it")
    return done.stdout.strip().splitlines()[-1]
