"""Metrics: names, and values after traffic that is known."""

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from server.observe.telemetry import SECONDS, Distribution
from tests.server.conftest import SLOW, chat, completion, eventually, over_fake, request

CHAT = "/v1/chat/completions"
SUFFIX = ("ttft", "second_token", "itl", "tpot", "e2e", "queue")


def test_a_distribution_counts_what_is_at_or_below_each_bound() -> None:
    distribution = Distribution("x_seconds", "", (0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 1.0, 7.0):
        distribution.observe(value)
    samples = {(s.name, s.labels.get("le")): s.value for s in distribution.family().samples}
    assert samples["x_seconds_bucket", "0.1"] == 2
    assert samples["x_seconds_bucket", "1.0"] == 4
    assert samples["x_seconds_bucket", "+Inf"] == samples["x_seconds_count", None] == 5
    assert abs(samples["x_seconds_sum", None] - 8.65) < 1e-9


async def test_after_known_traffic_every_number_is_right() -> None:
    async with over_fake(SLOW) as (gateway, engine):
        body = chat(stream=True, max_tokens=6, ignore_eos=True)
        for _ in range(3):
            assert (await gateway.ask(CHAT, body)).status == 200
        whole = await gateway.ask("/v1/completions", completion(max_tokens=4, ignore_eos=True))
        usage = whole.json()["usage"]
        await gateway.ask(CHAT, b"{")
        await gateway.ask(CHAT, chat(model="other"))
        gone = await gateway.send(request(CHAT, chat(stream=True, max_tokens=500, ignore_eos=True)))
        await gone.head()
        await gone.close()
        await eventually(gateway.at_rest)
        metrics = await gateway.metrics()

    def total(name: str, **labels: str) -> float:
        return metrics[name, tuple(sorted(labels.items()))]

    assert total("evenhand_requests_total", route=CHAT, outcome="ok") == 3
    assert total("evenhand_requests_total", route="/v1/completions", outcome="ok") == 1
    assert total("evenhand_requests_total", route=CHAT, outcome="invalid_json") == 1
    assert total("evenhand_requests_total", route=CHAT, outcome="model_not_found") == 1
    assert total("evenhand_requests_total", route=CHAT, outcome="cancelled") == 1
    completions = total("evenhand_tokens_total", kind="completion")
    assert 22 <= completions <= 22 + 50  # 3 × 6 + 4, and what the one who left had seen
    assert total("evenhand_tokens_total", kind="prompt") == 4 * 15 + usage["prompt_tokens"]
    assert total("evenhand_queue_depth", model="fake") == 0
    assert total("evenhand_worker_up", worker="worker-0", role="both") == 1
    assert total("evenhand_worker_in_flight", worker="worker-0", role="both") == 0
    count = {name: total(f"evenhand_request_{name}_seconds_count") for name in SUFFIX}
    assert count["ttft"] == 4 and count["tpot"] == 3 and count["e2e"] == 4 and count["queue"] == 5
    assert 15 <= count["itl"] <= 22 + 50
    assert 3 <= count["second_token"] <= 4, "the one who left may have seen a second token"
    sums_s = {name: total(f"evenhand_request_{name}_seconds_sum") for name in SUFFIX}
    assert min(sums_s[name] for name in ("ttft", "second_token", "itl", "tpot")) > 0
    assert sums_s["ttft"] < sums_s["e2e"]
    assert sums_s["tpot"] < sums_s["e2e"] / 5, "per token, and five come after the first"
    for name in SUFFIX:
        buckets = [total(f"evenhand_request_{name}_seconds_bucket", le=repr(bound)) for bound in SECONDS]
        assert buckets == sorted(buckets) and buckets[-1] <= count[name]
        assert total(f"evenhand_request_{name}_seconds_bucket", le="+Inf") == count[name]


async def test_the_exposition_is_what_prometheus_reads() -> None:
    async with over_fake() as (gateway, _):
        await gateway.ask(CHAT, chat(stream=True))
        reply = await gateway.ask("/metrics", method="GET")
        assert reply.headers["content-type"].startswith("text/plain")
        families = {family.name: family.type for family in text_string_to_metric_families(reply.body.decode())}
        for name in SUFFIX:
            assert families[f"evenhand_request_{name}_seconds"] == "histogram"
        assert families["evenhand_requests"] == families["evenhand_tokens"] == "counter"
        assert families["evenhand_queue_depth"] == families["evenhand_worker_up"] == "gauge"


async def test_refusals_by_an_engine_do_not_become_new_labels() -> None:
    async with over_fake() as (gateway, _):
        await gateway.ask(CHAT, chat(messages=[{"role": "user", "content": "word " * 20_000}]))
        metrics = await gateway.metrics()
        assert metrics["evenhand_requests_total", (("outcome", "engine_400"), ("route", CHAT))] == 1


async def test_metrics_stay_as_long_as_they_are_however_many_tenants_come(tmp_path: Path) -> None:
    keys = [f"key-of-tenant-{number:06d}" for number in range(24)]
    rows = [{"name": f"t{number}", "keys": [key], "requests_per_minute": 5} for number, key in enumerate(keys)]
    (tmp_path / "tenants.json").write_text(json.dumps({"tenants": rows}))
    cost = {"meter": True, "models": {"*": {"input": 1, "output": 1}}}
    async with over_fake(tenants=tmp_path / "tenants.json", policy="vtc", tenant_labels=3, cost=cost) as (gateway, _):

        async def series(asking: list[str]) -> int:
            for key in asking:
                headers = {"authorization": f"Bearer {key}"}
                assert (await gateway.ask("/v1/chat/completions", chat(), headers=headers)).status == 200
            await eventually(gateway.at_rest)
            return len((await gateway.ask("/metrics", method="GET")).body.splitlines())

        few = await series(keys[:6])
        assert await series(keys[6:]) == few
        told = (await gateway.ask("/metrics", method="GET")).body.decode()
        assert 'tenant="other"' in told and len(set(re.findall(r'tenant="(t\d+)"', told))) <= 2 * 3
