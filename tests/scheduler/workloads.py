"""Lengths for simulations: synthetic, fitted to what is published of the traces they stand for."""

import random
from collections.abc import Callable

from scheduler.policy import Policy
from tests.scheduler.engine_model import Engine, Life, Request

Sizes = Callable[[random.Random], tuple[int, int]]


def chat(rng: random.Random) -> tuple[int, int]:
    """ShareGPT answers are alike: mean 333 tokens, coefficient of variation 0.67 (a Weibull of shape 1.5)."""
    return int(rng.lognormvariate(4.0, 1.1)) + 1, int(rng.weibullvariate(369, 1.5)) + 1


def code_and_chat(rng: random.Random) -> tuple[int, int]:
    """Azure 2023: code completions (2,048 in, 28 out) and conversations (1,155 in, 211 out), three to two."""
    if rng.random() < 0.6:
        return int(rng.gammavariate(1.5, 1365)) + 1, int(rng.lognormvariate(2.7, 1.0)) + 1
    return int(rng.gammavariate(1.0, 1155)) + 1, min(1000, int(rng.gammavariate(1.6, 132)) + 1)


def with_reasoning(rng: random.Random) -> tuple[int, int]:
    """The same, with one job in twenty that thinks aloud for thousands of tokens."""
    if rng.random() < 0.05:
        return rng.randint(100, 2000), min(8000, int(rng.lognormvariate(8.0, 0.5)))
    return code_and_chat(rng)


def open_loop(sizes: Sizes, jobs: int, load: float, seed: int, *, slots: int = 16) -> list[Request]:
    """Poisson arrivals at `load` times what the slots can do."""
    rng = random.Random(seed)
    drawn = [sizes(rng) for _ in range(jobs)]
    work_steps = sum(-(-prompt // 256) - 1 + output for prompt, output in drawn) / jobs
    requests, at = [], 0.0
    for prompt, output in drawn:
        at += rng.expovariate(load * slots / (work_steps * 0.03))
        requests.append(Request(at, prompt, output))
    return requests


def simulate(policy: Policy, requests: list[Request], *, slots: int = 16) -> tuple[Engine, list[Life]]:
    """Prefill and the recomputation after a preemption cost slot time: 256 tokens a step."""
    engine = Engine(policy, slots, prefill_tokens_per_step=256)
    return engine, engine.run(requests)


def mean_jct_s(lives: list[Life]) -> float:
    return sum(life.finished_at - life.request.at for life in lives) / len(lives)


def mean_time_per_token_s(lives: list[Life]) -> float:
    return sum((life.finished_at - life.request.at) / life.request.output_tokens for life in lives) / len(lives)
