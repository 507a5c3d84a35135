import asyncio

from loadtest.client.samples import Sampler, sample_of
from loadtest.fake.engine import EngineSetup, FakeEngine
from loadtest.records import Sample
from loadtest.simulator.costmodel import PRESETS

ENGINE = """# HELP vllm:num_requests_waiting x
vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_waiting{engine="0"} 5.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:num_preemptions_total{engine="0"} 7.0
vllm:num_preemptions_created{engine="0"} 1.7e9
"""
GATEWAY = 'evenhand_queue_depth{model="m"} 2.0\nevenhand_queue_depth{model="n"} 1.0\n'


def test_counts_add_up_over_engines_and_shares_are_averaged() -> None:
    other = ENGINE.replace("0.5", "0.1")
    assert sample_of([ENGINE, other], 1.0) == Sample(1.0, 10.0, 6.0, 0.3, 14.0)


def test_what_a_server_does_not_say_stays_unknown() -> None:
    assert sample_of([GATEWAY], 2.0) == Sample(2.0, waiting=3.0)
    assert sample_of(["nothing 1\n"], 2.0) == Sample(2.0)


async def test_a_fake_engine_is_sampled_and_a_dead_one_is_left_out() -> None:
    seen: asyncio.Queue[Sample] = asyncio.Queue()
    async with FakeEngine(EngineSetup(cost=PRESETS["instant"])) as engine:
        sampler = Sampler([engine.url, "http://127.0.0.1:1"], seen.put_nowait, asyncio.get_running_loop().time)
        async with sampler:
            task = asyncio.create_task(sampler.run())
            sample = await asyncio.wait_for(seen.get(), 20)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    assert (sample.waiting, sample.running, sample.preemptions) == (0.0, 0.0, 0.0)


async def test_what_the_first_question_takes_is_over_before_a_run_begins() -> None:
    seen: list[Sample] = []
    async with FakeEngine(EngineSetup(cost=PRESETS["instant"])) as engine:
        async with Sampler([engine.url], seen.append, asyncio.get_running_loop().time):
            assert engine.scraped == 1 and not seen
