"""Our scheduler as CUDA drives it: steps in flight, draft tokens, blocks that are freed late, pipeline depth.

A GPU runner keeps each sequence's true length itself, which the scheduler knows only when a step's output is there. The
model is a rule, so that a token that is lost, doubled or put in the wrong place shows.
"""

import random
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output.request import StructuredOutputRequest

from loadtest.bench.plugin.driven import StepClock, build_scheduler, expected, request, token

pytestmark = pytest.mark.engine

SCARCE, PLENTY = 32, 1000  # KV blocks
SIZES = [(5, 40), (60, 20), (300, 10), (20, 90), (130, 3), (16, 1)]
SWITCHES = ("fcfs", "vtc", "mlfq")


@dataclass(frozen=True)
class Setup:
    """drafts: tokens guessed ahead. late: blocks are freed when their last step is over, as with a KV connector.

    depth: steps in flight. aborts: clients leave. switches: the policy changes in mid-flight. mixed: some answers
    follow a grammar, which is compiled while they wait, and some need an adapter, of which two run at once.
    """

    policy: str
    drafts: int = 0
    late: bool = False
    depth: int = 2
    blocks: int = SCARCE
    aborts: bool = False
    switches: bool = False
    mixed: bool = False


class AnyText:
    """A grammar that allows everything."""

    def accept_tokens(self, name: str, tokens: list[int]) -> bool:
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens

    def is_terminated(self) -> bool:
        return False


class Runner:
    """In the GPU's place: knows how long each sequence really is, and accepts some of the drafts."""

    def __init__(self, scheduler: Any, rng: random.Random) -> None:
        self._scheduler = scheduler
        self._rng = rng
        self._length: dict[str, int] = {}
        self._done: dict[str, int] = {}

    def apply(self, output: SchedulerOutput) -> ModelRunnerOutput:
        joined = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if name in cached.resumed_req_ids:
                joined[name] = computed
        assert not joined.keys() & set(output.preempted_req_ids or ()), "a request leaves and joins in one step"
        names = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[self._tokens(name, output, joined) for name in names],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    def _tokens(self, name: str, output: SchedulerOutput, joined: dict[str, int]) -> list[int]:
        if name in joined:
            self._length[name] = self._scheduler.requests[name].num_tokens
            self._done[name] = joined[name]
        drafts = output.scheduled_spec_decode_tokens.get(name, [])
        length, step = self._length[name], output.num_scheduled_tokens[name]
        if self._done[name] + step - len(drafts) < length:  # one more piece of its prompt
            self._done[name] += step
            return []
        made = 1 + (self._rng.randint(0, len(drafts)) if drafts else 0)
        self._length[name], self._done[name] = length + made, length + made - 1
        return [token(name, length + index) for index in range(made)]


class Run:
    """One run to its end, and what must hold then."""

    def __init__(self, folder: Path, setup: Setup, seed: int) -> None:
        self.setup = setup
        self.rng = random.Random(seed)
        self.clock = StepClock()
        self.scheduler = build_scheduler(
            folder, setup.policy, slots=6, step_tokens=128, blocks=setup.blocks, is_async=True, clock=self.clock
        )
        self._like_cuda()
        self.runner = Runner(self.scheduler, self.rng)
        self.answers: dict[str, list[int]] = {}
        self.wanted: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.compiling: list[Future[Any]] = []
        if setup.mixed:
            self.scheduler.lora_config = SimpleNamespace(max_loras=2)

    def _like_cuda(self) -> None:
        scheduler, setup = self.scheduler, self.setup
        scheduler.use_v2_model_runner = True
        scheduler.defer_block_free = setup.late
        if setup.drafts:
            scheduler.num_spec_tokens = scheduler.num_lookahead_tokens = setup.drafts
            scheduler._spec_token_placeholders = [-1] * setup.drafts
            scheduler.use_eagle = True

    def arrive(self, number: int) -> None:
        name, (prompt, most) = f"r{number}", self.rng.choice(SIZES)
        self.wanted[name] = expected(name, prompt, most)
        one = request(name, prompt, most, tenant=self.rng.choice("abc"))
        if self.setup.mixed:
            self.mix(one)
        self.scheduler.add_request(one)

    def mix(self, one: Request) -> None:
        if self.rng.random() < 0.3:
            compiled: Future[Any] = Future()
            self.compiling.append(compiled)
            params = StructuredOutputsParams(json="{}")
            one.structured_output_request = StructuredOutputRequest(params, compiled)
            one.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        if adapter := self.rng.choice([0, 0, 1, 2, 3, 4]):
            one.lora_request = LoRARequest(f"adapter{adapter}", adapter, "/none")

    def meddle(self, step: int) -> None:
        live = [name for name in self.scheduler.requests if name in self.wanted]
        if self.setup.aborts and live and self.rng.random() < 0.1:
            name = self.rng.choice(live)
            self.scheduler.finish_requests((name,), RequestStatus.FINISHED_ABORTED)
            self.aborted.add(name)
        if self.compiling and self.rng.random() < 0.2:
            self.compiling.pop(self.rng.randrange(len(self.compiling))).set_result(AnyText())
        if self.setup.switches and step % 25 == 24:
            policy = self.rng.choice(SWITCHES)
            self.scheduler.add_request(request(f"order{step}", 1, 1, policy=policy))

    def step(self) -> bool:
        """Whether anything is left to do."""
        self.clock.now += 0.01
        launched = self.scheduler.has_requests()
        if launched:
            output = self.scheduler.schedule()
            self.flight.append((output, self.runner.apply(output)))
        waits = launched and len(self.flight) < self.setup.depth and self.flight[-1][0].total_num_scheduled_tokens
        if self.flight and not waits:
            for client in self.scheduler.update_from_output(*self.flight.popleft()).values():
                for each in client.outputs:
                    self.answers.setdefault(each.request_id, []).extend(each.new_token_ids)
        return launched or bool(self.flight)

    def run(self, requests: int = 40) -> None:
        for step in range(20_000):
            if requests and self.rng.random() < 0.5:
                requests -= 1
                self.arrive(requests)
            self.meddle(step)
            if not self.step() and not requests:
                return
        raise AssertionError(f"not done: {self.scheduler.get_request_counts()}")

    def check(self) -> None:
        for name, wanted in self.wanted.items():
            told = self.answers.get(name, [])
            assert told == (wanted[: len(told)] if name in self.aborted else wanted), name
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == self.setup.blocks - 1
        assert (self.scheduler.waiting.entries, len(self.scheduler.waiting.lanes)) == ({}, 0)

    def preemptions(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for metric in self.scheduler.registry.collect():
            for sample in metric.samples:
                if sample.name == "evenhand_engine_preemptions_total":
                    found[sample.labels["reason"]] += int(sample.value)
        return found


SETUPS = [
    Setup("mlfq"),
    Setup("mlfq", drafts=3, depth=3),
    Setup("mlfq", drafts=3, late=True, aborts=True),
    Setup("srpt", drafts=3, late=True),
    Setup("vtc", depth=3, aborts=True),
    Setup("fcfs", drafts=3, depth=3, switches=True),
    Setup("mlfq", drafts=3, late=True, depth=3, aborts=True, switches=True),
    Setup("mlfq", drafts=3, blocks=PLENTY),
    Setup("gittins", drafts=3),
    Setup("mlfq", drafts=3, late=True, depth=3, aborts=True, mixed=True),
    Setup("srpt", late=True, switches=True, mixed=True),
]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_with_steps_in_flight_no_token_is_lost_and_no_block_leaks(hollow_model: Path, setup: Setup) -> None:
    """And somebody yielded meanwhile, to another or for want of memory, or else it shows nothing."""
    run = Run(hollow_model, setup, seed=1)
    run.run()
    run.check()
    found = run.preemptions()
    assert found["policy"] > 0 or setup.policy not in ("mlfq", "srpt"), found
    assert found.total() > 0, found


def test_requests_were_displaced_and_memory_was_short_in_the_first_of_these_runs(hollow_model: Path) -> None:
    """Or else they show little."""
    found: Counter[str] = Counter()
    for setup in SETUPS[:3]:
        run = Run(hollow_model, setup, seed=1)
        run.run()
        run.check()
        found += run.preemptions()
    assert found["policy"] > 20 and found["memory"] > 0, found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_more_of_them(hollow_model: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(8):
        policy = rng.choice(["fcfs", "vtc", "mlfq", "srpt", "gittins"])
        flags = [rng.random() < 0.5 for _ in range(4)]
        setup = Setup(
            policy, rng.choice([0, 3]), flags[0], rng.choice([2, 3]), rng.choice([SCARCE, PLENTY]), *flags[1:]
        )
        run = Run(hollow_model, setup, rng.randrange(10**6))
        run.run()
        run.check()
