"""The first token travels with the KV, in vLLM's real scheduler, with a rule in place of the model."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.request import Request

from loadtest.bench.plugin.driven import VOCABULARY, DrivenEngine, build_scheduler, expected, request, token
from scheduler.vllm.first_token import is_possible
from tests.engine.test_vllm_plugin import ArrivingBlocks

pytestmark = pytest.mark.engine


class KeptBlocks(ArrivingBlocks):
    """A stand-in for a prefill worker's connector."""

    def request_finished(self, gone: Request, block_ids: object) -> tuple[bool, Any]:
        return False, {"do_remote_prefill": True}

    request_finished_all_groups = request_finished


def handed(name: str, prompt: int, max_tokens: int, first: object, **changes: Any) -> Request:
    """A request whose prompt was read by a prefill engine, which made `first`."""
    wanted = request(name, prompt, max_tokens)
    assert wanted.sampling_params is not None
    for field, value in changes.items():
        setattr(wanted.sampling_params, field, value)
    wanted.kv_transfer_params = {"do_remote_prefill": True, "evenhand_first_token": first}
    wanted.sampling_params.extra_args = {"kv_transfer_params": wanted.kv_transfer_params}
    return wanted


def decoding(folder: Path, remote: dict[str, int], *, is_async: bool = False, **options: Any) -> DrivenEngine:
    """An engine that fetches so many tokens of the prompts of `remote`."""
    scheduler = build_scheduler(folder, "vtc", is_async=is_async, **options)
    scheduler.connector = ArrivingBlocks(remote)
    scheduler._prepare_for_first_tokens()
    return DrivenEngine(scheduler, is_async=is_async)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("prompt", [31, 32, 33])  # around the end of a block
def test_the_first_token_of_a_prefill_engine_is_given_out_before_its_kv_is_there(
    hollow_model: Path, is_async: bool, prompt: int
) -> None:
    engine = decoding(hollow_model, {"far": prompt + 1}, is_async=is_async)
    answer = expected("far", prompt, 5)
    far = handed("far", prompt, 5, answer[0])
    engine.add(far)
    for _ in range(3):
        engine.step()
    assert engine.answers == {"far": answer[:1]}
    assert far.num_computed_tokens == prompt
    engine.scheduler.finished_recving_kv_req_ids.add("far")
    output = engine.step()
    assert output is not None and output.num_scheduled_tokens == {"far": 1}  # nothing is made a second time
    engine.run()
    assert engine.answers == {"far": answer}
    assert engine.scheduler._lanes.service("") == 2 * 4  # the first token was charged where it was made


def test_a_first_token_comes_before_the_second_where_all_of_the_prompt_was_here(hollow_model: Path) -> None:
    engine = decoding(hollow_model, {})
    answer = expected("far", 33, 3)
    engine.add(handed("far", 33, 3, answer[0]))
    engine.run()
    assert engine.answers == {"far": answer}


@pytest.mark.parametrize(
    ("first", "changes"),
    [
        (VOCABULARY, {}),
        (-1, {}),
        ("7", {}),
        (True, {}),
        (7, {"stop_token_ids": [7]}),
        (7, {"_eos_token_id": 7}),
        (7, {"seed": 1}),
        (7, {"logprobs": 0}),
        (7, {"presence_penalty": 0.5}),
        (7, {"frequency_penalty": -0.5}),
        (7, {"bad_words": ["no"]}),
        (7, {"thinking_token_budget": 3}),
    ],
)
def test_a_first_token_that_cannot_count_as_one_of_the_prompt_is_made_again(
    hollow_model: Path, first: object, changes: dict[str, Any]
) -> None:
    engine = decoding(hollow_model, {"far": 33})
    engine.add(handed("far", 33, 4, first, **changes))
    engine.step()
    assert engine.answers == {}
    engine.scheduler.finished_recving_kv_req_ids.add("far")
    engine.run()
    assert engine.answers == {"far": expected("far", 33, 4)}


def test_an_answer_of_one_token_is_made_by_the_engine_that_answers(hollow_model: Path) -> None:
    engine = decoding(hollow_model, {"far": 33})
    engine.add(handed("far", 33, 1, 7))
    engine.step()
    engine.scheduler.finished_recving_kv_req_ids.add("far")
    engine.run()
    assert engine.answers == {"far": expected("far", 33, 1)}


def test_a_client_that_leaves_after_the_first_token_leaves_nothing(hollow_model: Path) -> None:
    engine = decoding(hollow_model, {"far": 34})
    engine.add(handed("far", 33, 50, expected("far", 33, 1)[0]))
    engine.step()
    engine.abort("far")
    engine.scheduler.finished_recving_kv_req_ids.add("far")
    engine.step()
    assert engine.scheduler.waiting.entries == {}
    assert engine.answers == {"far": expected("far", 33, 1)}


@pytest.mark.parametrize("is_async", [False, True])
def test_a_first_token_waits_for_no_step_but_the_one_under_way(hollow_model: Path, *, is_async: bool) -> None:
    engine = decoding(hollow_model, {"far": 33}, is_async=is_async)
    engine.add(request("long", 7000, 3))
    engine.step()
    engine.add(handed("far", 33, 3, expected("far", 33, 1)[0]))
    read: list[int] = []
    while "far" not in engine.answers:
        step = engine.step()
        assert step is not None
        read.append(step.total_num_scheduled_tokens)
    assert len(read) == 1  # where steps overlap, what follows was scheduled meanwhile
    assert (read[0] > 0) == is_async
    step = engine.step()
    assert step is not None
    assert step.total_num_scheduled_tokens > 0


def test_those_that_run_stand_still_for_one_step_however_many_are_handed_over(hollow_model: Path) -> None:
    names = [f"far{at}" for at in range(6)]
    engine = decoding(hollow_model, dict.fromkeys(names, 33))
    engine.add(request("runs", 33, 100))
    engine.step()
    computed: list[int] = []
    for name in names:  # one arrives in each step
        engine.add(handed(name, 33, 3, expected(name, 33, 1)[0]))
        step = engine.step()
        assert step is not None
        computed.append(step.total_num_scheduled_tokens)
    assert computed == [0, 1, 0, 1, 0, 1]
    assert set(engine.answers) >= set(names)


def test_what_another_connector_has_of_a_prompt_is_left_as_it_is(hollow_model: Path) -> None:
    engine = decoding(hollow_model, {"far": 16})  # a block, and no more
    answer = expected("far", 33, 3)
    far = handed("far", 33, 3, answer[0])
    engine.add(far)
    engine.step()  # gives the first token out
    engine.step()
    assert far.num_computed_tokens == 16
    engine.scheduler.finished_recving_kv_req_ids.add("far")
    engine.run()
    assert engine.answers == {"far": answer}


def test_an_engine_with_logits_processors_makes_every_token_itself(hollow_model: Path) -> None:
    engine = decoding(hollow_model, {})
    assert is_possible(engine.scheduler)
    engine.scheduler.vllm_config.model_config.logits_processors = ["a.custom:Processor"]
    assert not is_possible(engine.scheduler)


def test_a_prefill_engine_tells_the_token_that_it_made(hollow_model: Path) -> None:
    scheduler = build_scheduler(hollow_model, "fcfs")
    scheduler.connector = KeptBlocks({})
    engine = DrivenEngine(scheduler)
    engine.add(request("read", 33, 1))
    engine.run()
    assert engine.notes["read"]["evenhand_first_token"] == token("read", 33)
