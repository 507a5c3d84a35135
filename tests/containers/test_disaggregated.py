"""`docker compose --profile disaggregated up`: one engine reads prompts, another answers, and KV goes between them."""

import re
from collections.abc import Iterator

import pytest

from server.settings import DisaggregationSettings
from tests.containers.conftest import MARKS, NewSite
from tests.containers.site import START_S, Site, ready_workers, until

pytestmark = MARKS


@pytest.fixture(scope="module")
def site(new_site: NewSite) -> Iterator[Site]:
    site = new_site("split")
    site.compose("--profile", "disaggregated", "up", "--no-build", "--detach", "gateway", "redis", "prefill", "decode")
    until(lambda: healthy(site) == {"prefill", "decode"}, "both engines are healthy", 2 * START_S)
    yield site


def healthy(site: Site) -> set[str]:
    return {
        service
        for service in ("prefill", "decode")
        for container in site.containers(service)
        if site.inspect(container)["State"]["Health"]["Status"] == "healthy"
    }


def moved_bytes(site: Site) -> float:
    """KV that the decode engine has fetched, by its own count."""
    url = site.inside("decode", "cat", "/tmp/evenhand-ready")
    ask = f"from urllib.request import urlopen; print(urlopen('{url}/metrics').read().decode())"
    text = site.inside("decode", "python", "-c", ask)
    return sum(
        float(value) for value in re.findall(r"^vllm:nixl_bytes_transferred_sum\{.*\} (\S+)$", text, re.MULTILINE)
    )


def test_prompts_are_read_by_one_engine_and_answered_by_the_other(site: Site) -> None:
    for service in ("prefill", "decode"):
        (container,) = site.containers(service)
        assert site.inspect(container)["RestartCount"] == 0, f"{service} came up at its first start"
    until(lambda: ready_workers(site) == 2, "the gateway has found both")
    words = "Paris is the capital of France. " * (DisaggregationSettings().min_prompt_tokens // 4)
    before = moved_bytes(site)
    assert "Paris" in site.answer(f"{words} What is the capital of France?", max_tokens=16)
    assert site.metric('evenhand_placements_total{placement="apart"') >= 1
    assert moved_bytes(site) > before


def test_each_engine_computes_on_the_cores_of_its_container(site: Site) -> None:
    """Whatever vLLM pins its threads to: the first core is the prefill engine's, the second the decode engine's."""
    for service, core in (("prefill", "0"), ("decode", "1")):
        threads = site.inside(service, "sh", "-c", "cat /proc/[0-9]*/task/[0-9]*/status 2>/dev/null")
        allowed = set(re.findall(r"^Cpus_allowed_list:\t(\S+)$", threads, re.MULTILINE))
        assert allowed == {core}, service


def test_down_with_every_profile_leaves_nothing(site: Site) -> None:
    site.compose("--profile", "*", "down", "--volumes")
    assert not any(site.left().values())
