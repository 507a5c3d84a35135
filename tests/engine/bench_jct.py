"""The policies on a real engine: 6 long answers (400 tokens), then 34 short ones (16 tokens), on 4 slots.

python -m tests.engine.bench_jct [--rounds 3] [-- vLLM engine arguments as name=value, for example block_size=128]

Stock vLLM runs in one engine, our policies in another, switched live; each round runs every policy once. Shown are
medians over rounds: mean job completion time of all, of the short and of the long, the span of the whole, the tokens
that were computed (what exceeds FCFS is recomputation after preemptions), preemptions.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm import LLMEngine

from tests.engine.answers import greedy, preemptions, prompt, switch
from tests.engine.real import ENVIRONMENT, chaotic_model, engine

LONG, SHORT = (6, 400), (34, 16)  # jobs, output tokens
POLICIES = ("fcfs", "mlfq", "vtc", "gittins")
WARM_UP_ROUNDS = 2  # Gittins trusts what it has learned after 50 jobs


def burst(running: LLMEngine, tag: str) -> dict[str, float]:
    """All requests at once; completion times in seconds."""
    work = [(f"{tag}-long{i}", LONG[1], "heavy", i) for i in range(LONG[0])]
    work += [(f"{tag}-short{i}", SHORT[1], "light", 100 + i) for i in range(SHORT[0])]
    running.reset_prefix_cache()
    begun = time.monotonic()
    for name, tokens, tenant, seed in work:
        running.add_request(name, prompt(seed, 24), greedy(tokens, extra_args={"evenhand_tenant": tenant}))
    took = {}
    computed = sum(running.engine_core.engine_core.scheduler.computed)
    while running.has_unfinished_requests():
        for output in running.step():
            took[output.request_id] = time.monotonic() - begun
    short = [took[name] for name, tokens, _, _ in work if tokens == SHORT[1]]
    long = [took[name] for name, tokens, _, _ in work if tokens == LONG[1]]
    return {
        "mean_s": statistics.mean(short + long),
        "short_s": statistics.mean(short),
        "long_s": statistics.mean(long),
        "span_s": max(short + long),
        "tokens": sum(running.engine_core.engine_core.scheduler.computed) - computed,
    }


def count_computed_tokens(running: LLMEngine) -> None:
    """Notes the tokens of every step at the scheduler, stock or ours."""
    scheduler = running.engine_core.engine_core.scheduler
    scheduler.computed = []
    schedule = scheduler.schedule

    def counted(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        scheduler.computed.append(output.total_num_scheduled_tokens)
        return output

    scheduler.schedule = counted


def measure(model: Path, policies: list[str], rounds: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Rounds of every policy in one engine."""
    stock = policies == ["stock"]
    seen: dict[str, list[dict[str, float]]] = {policy: [] for policy in policies}
    with engine(model, None if stock else "fcfs", **arguments) as running:
        count_computed_tokens(running)
        burst(running, "warm-up")
        for number in range(rounds):
            for policy in policies:
                if not stock:
                    switch(running, policy)
                for warm_up in range(WARM_UP_ROUNDS if policy == "gittins" else 0):
                    burst(running, f"{policy}{number}-{warm_up}")
                before = sum(preemptions(policy).values())
                result = burst(running, f"{policy}{number}")
                seen[policy].append(result | {"preempted": sum(preemptions(policy).values()) - before})
    return {policy: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for policy, runs in seen.items()}


def typed(pair: str) -> tuple[str, Any]:
    name, _, value = pair.partition("=")
    return name, int(value) if value.isdigit() else json.loads(value) if value[:1] in "{[" else value


def in_own_process(model: Path, policies: list[str], arguments: argparse.Namespace) -> Any:
    command = [sys.executable, "-m", "tests.engine.bench_jct", "--model", str(model), "--rounds", str(arguments.rounds)]
    command += ["--measure", *policies, "--", *arguments.engine]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("engine", nargs="*", help="engine arguments, name=value")
    arguments = parser.parse_args()
    if arguments.measure:
        settings = {"max_model_len": 448, "num_gpu_blocks_override": 400} | dict(map(typed, arguments.engine))
        seen = measure(arguments.model, arguments.measure, arguments.rounds, settings)
        sys.stdout.write("\n" + json.dumps(seen) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        model = chaotic_model(Path(folder))
        seen = in_own_process(model, ["stock"], arguments) | in_own_process(model, list(POLICIES), arguments)
    for policy, result in seen.items():
        cells = " ".join(f"{key} {value:7.3f}" for key, value in result.items())
        sys.stdout.write(f"{policy:8} {cells}\n")


if __name__ == "__main__":
    main()
