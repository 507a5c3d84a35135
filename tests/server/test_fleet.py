"""Who serves: probes that survive whatever a worker answers."""

import pytest

from loadtest.fake.engine import EngineSetup, FakeEngine
from scheduler.workers import Worker
from server.fleet.fleet import Fleet, WorkerState
from server.settings import HealthSettings
from tests.server.conftest import SLOW, ScriptedEngine, chat, eventually, over_fake, plain, request, says

QUIET = HealthSettings(canary="off")
GARBAGE = [
    plain(b"not json"),
    plain(b"[]"),
    plain(b"{}"),
    plain(b'{"data":null}'),
    plain(b'{"data":[7]}'),
    plain(b'{"data":[{}]}'),
    plain(b'{"data":[]}'),
    plain(b"", status="500 Internal Server Error"),
]


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_a_worker_that_answers_nonsense_is_asked_again_until_it_makes_sense(garbage: bytes) -> None:
    async with ScriptedEngine([says(plain(b"{}"))]).run() as engine:
        fleet = Fleet(probe_s=0.01, health=QUIET)
        engine.gets = {"/v1/models": garbage}
        member = fleet.add(Worker("w", engine.url))
        await eventually(lambda: member.misses >= 2)
        assert member.state is WorkerState.STARTING
        engine.gets = {}
        await eventually(lambda: member.state is WorkerState.READY)
        await fleet.close()


async def test_a_server_without_health_and_metrics_is_known_by_its_models() -> None:
    async with ScriptedEngine([says(plain(b"{}"))]).run() as engine:
        engine.gets = {"/health": plain(b"", status="404 Not Found")}
        fleet = Fleet(probe_s=0.01, health=QUIET)
        member = fleet.add(Worker("w", engine.url))
        await eventually(lambda: member.state is WorkerState.READY)
        engine.gets["/v1/models"] = plain(b"", status="500 Internal Server Error")
        await eventually(lambda: member.state is WorkerState.DOWN)
        await fleet.close()


async def test_kv_usage_is_read_and_a_strange_number_is_not() -> None:
    async with ScriptedEngine([says(plain(b"{}"))]).run() as engine:
        engine.gets = {"/metrics": plain(b'vllm:kv_cache_usage_perc{engine="0"} 0.25\n')}
        fleet = Fleet(probe_s=0.01, health=QUIET)
        member = fleet.add(Worker("w", engine.url))
        await eventually(lambda: member.load.kv_usage == 0.25)
        engine.gets = {"/metrics": plain(b"vllm:kv_cache_usage_perc many\n")}
        await eventually(lambda: member.state is WorkerState.READY)
        assert member.load.kv_usage == 0.25 and member.misses == 0
        await fleet.close()


async def test_sequences_from_elsewhere_are_those_that_a_worker_has_beyond_ours() -> None:
    async with ScriptedEngine([says(plain(b"{}"))]).run() as engine:
        lines = b'vllm:num_requests_running{engine="0"} 5.0\nvllm:num_requests_waiting{engine="0"} 2.0\n'
        engine.gets = {"/metrics": plain(lines)}
        fleet = Fleet(probe_s=0.01, health=QUIET)
        member = fleet.add(Worker("w", engine.url))
        await eventually(lambda: member.load.others == 7)
        member.load.in_flight = 6
        await eventually(lambda: member.load.others == 1)
        member.load.in_flight = 8  # what we have just sent is not there yet
        await eventually(lambda: member.load.others == 0)
        engine.gets = {"/metrics": plain(b"vllm:num_requests_running 1e999\nvllm:num_requests_waiting e\n")}
        await eventually(lambda: member.load.others > 1000)
        assert member.state is WorkerState.READY
        await fleet.close()


async def test_a_worker_that_dies_is_out_and_one_that_comes_back_is_in() -> None:
    async with over_fake(probe_s=0.05) as (gateway, engine):
        engine.die()
        await eventually(lambda: not gateway.server.fleet.ready())
        assert (await gateway.ask("/ready", method="GET")).status == 503
        await engine.listen()
        await gateway.ready()
        assert (await gateway.ask("/v1/chat/completions", chat())).status == 200


async def test_a_removed_worker_gets_nothing_new_and_finishes_what_it_has() -> None:
    async with over_fake(SLOW) as (gateway, engine):
        wire = await gateway.send(request("/v1/chat/completions", chat(stream=True, max_tokens=20, ignore_eos=True)))
        await wire.head()
        await gateway.server.fleet.remove("worker-0")
        assert (await gateway.ask("/v1/chat/completions", chat())).status == 503
        pieces = []
        while piece := await wire.chunk():
            pieces.append(piece)
        assert pieces[-1].endswith(b"[DONE]\n\n")


async def test_two_workers_cannot_have_one_name() -> None:
    fleet = Fleet(probe_s=60)
    fleet.add(Worker("w", "http://127.0.0.1:9"))
    with pytest.raises(ValueError, match="already"):
        fleet.add(Worker("w", "http://127.0.0.1:10"))
    await fleet.close()


async def test_an_engine_with_the_plug_in_is_recognised_and_follows_the_policy() -> None:
    async with FakeEngine(EngineSetup(plugin=True)) as engine:
        wanted = ("vtc", ("output_weight=3",))
        fleet = Fleet(probe_s=0.01, health=QUIET, order=lambda: wanted)
        member = fleet.add(Worker("w", engine.url))
        await eventually(lambda: member.state is WorkerState.READY)
        assert member.worker.plugin
        assert engine.batch.lanes.policy.name == "vtc"
        wanted = ("mlfq", ())
        await eventually(lambda: engine.batch.lanes.policy.name == "mlfq")
        await fleet.close()


async def test_the_slots_that_count_are_those_of_the_running_engine(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeEngine(EngineSetup(plugin=True)) as engine:
        fleet = Fleet(probe_s=0.01, health=QUIET)
        told = []
        fleet.changed.append(lambda: told.append(member.worker.slots))
        member = fleet.add(Worker("w", engine.url))
        runs = engine.batch.cost.max_seqs
        await eventually(lambda: member.worker.slots == runs and member.state is WorkerState.READY)
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
        misled = fleet.add(Worker("misled", engine.url, slots=7))
        await eventually(lambda: misled.worker.slots == runs)
        assert f"worker misled runs {runs} sequences at once, not 7" in caplog.text
        await fleet.close()


async def test_each_data_parallel_rank_is_told_the_policy() -> None:
    def page(*lines: str) -> bytes:
        ranks = [f'vllm:num_requests_running{{engine="{rank}",model_name="m"}} 0.0' for rank in range(3)]
        usage = [f'vllm:kv_cache_usage_perc{{engine="{rank}",model_name="m"}} 0.{rank}' for rank in range(3)]
        return plain("\n".join([*ranks, *usage, *lines, ""]).encode())

    done = plain(b'{"choices": [], "kv_transfer_params": {"evenhand": {"policy": "vtc"}}}')
    async with ScriptedEngine([says(done)]).run() as engine:
        engine.gets = {
            "/metrics": page('evenhand_engine_policy_info{policy="fcfs"} 1.0', "evenhand_engine_slots 3072.0")
        }
        fleet = Fleet(probe_s=0.01, health=QUIET, order=lambda: ("vtc", ()))
        member = fleet.add(Worker("w", engine.url))
        await eventually(lambda: member.state is WorkerState.READY)
        assert [asked.headers["x-data-parallel-rank"] for asked in engine.asked] == ["0", "1", "2"]
        assert (member.worker.slots, member.load.kv_usage) == (3072, 0.2)
        await fleet.close()


async def test_an_engine_that_refuses_a_policy_keeps_its_own_and_serves_on() -> None:
    async with FakeEngine(EngineSetup(plugin=True)) as engine:
        fleet = Fleet(probe_s=0.01, health=QUIET, order=lambda: ("lottery", ()))
        member = fleet.add(Worker("w", engine.url))
        await eventually(lambda: member.state is WorkerState.READY)
        assert "lottery" in member.note
        assert engine.batch.lanes.policy.name == "fcfs"
        asked = len(engine.seen)
        await eventually(lambda: member.misses == 0)
        assert len(engine.seen) == asked == 1
        await fleet.close()


async def test_an_engine_without_the_plug_in_is_told_nothing() -> None:
    async with FakeEngine(EngineSetup()) as engine:
        fleet = Fleet(probe_s=0.01, health=QUIET, order=lambda: ("vtc", ()))
        member = fleet.add(Worker("w", engine.url))
        await eventually(lambda: member.state is WorkerState.READY)
        assert not member.worker.plugin
        assert not engine.seen
        await fleet.close()
