"""Objectives: which ones hold for a request, and the counters that alerts are made of."""

from scheduler.objectives import Objectives
from server.observe.slo import SloTargets
from server.request.tenants import OPEN, read_record
from server.settings import SloSettings, SloTarget
from tests.server.conftest import SLOW, chat, eventually, over_fake

CHAT = "/v1/chat/completions"


def test_a_tenants_own_objective_goes_before_the_models_and_that_before_the_general_one() -> None:
    targets = SloTargets(SloSettings(ttft_s=3.0, models={"large": SloTarget(tpot_s=0.05)}))
    bare = SloTargets(SloSettings(ttft_s=3.0, models={"large": SloTarget(tpot_s=0.05)}), unset=Objectives())
    assert (bare.of("small", OPEN), bare.of("large", OPEN)) == (Objectives(3.0), Objectives(3.0, 0.05))
    hasty = read_record({"name": "hasty", "slo": {"ttft_s": 0.5}}).tenant()
    assert targets.of("small", OPEN) == Objectives(3.0, 0.1)
    assert targets.of("large", OPEN) == Objectives(3.0, 0.05)
    assert targets.of("large", hasty) == Objectives(0.5, 0.05)


async def test_each_finished_stream_is_counted_under_what_it_missed() -> None:
    missed = {
        "met": {},
        "ttft": {"slo": {"ttft_s": 1e-6}},
        "tpot": {"slo": {"tpot_s": 1e-6}},
        "both": {"slo": {"ttft_s": 1e-6, "tpot_s": 1e-6}},
    }
    for outcome, settings in missed.items():
        async with over_fake(SLOW, **settings) as (gateway, _):
            await gateway.ask(CHAT, chat(stream=True, max_tokens=4, ignore_eos=True))
            await gateway.ask(CHAT, chat(max_tokens=4, ignore_eos=True))  # no stream: has no first token to judge
            await eventually(gateway.at_rest)
            metrics = await gateway.metrics()
        seen = {
            dict(labels)["outcome"]: value
            for (name, labels), value in metrics.items()
            if name == "evenhand_slo_streams_total"
        }
        assert seen == dict.fromkeys(missed, 0.0) | {outcome: 1.0}
