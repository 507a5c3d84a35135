"""The documents name what exists: every setting and every metric, and no metric or file that is not there."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from deploy.settings import ServeSettings
from server.admission.live_adapters import LiveAdapters
from server.admission.sleeper import Sleeper
from server.batch.runner import Runner
from server.failover.failover import Failover
from server.fleet.balancer import Balancer
from server.fleet.fleet import Fleet
from server.observe.cost import CostMeter
from server.observe.fairness_metrics import FairnessMetrics
from server.observe.slo import SloMetrics, SloTargets
from server.observe.telemetry import Telemetry
from server.relay.prefill_leg import PrefillLeg
from server.request.fields import ALLOWED
from server.request.tenant_files import read_file
from server.settings import CostSettings, LoraSettings, SleepSettings, SloSettings
from tests.compatibility.clients import CLIENTS

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = ROOT / "docs" / "operations.md"
COMPATIBILITY = ROOT / "docs" / "compatibility.md"
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]

WORD = re.compile(r"\bevenhand_[a-z0-9_]+")
LINK = re.compile(r"\]\(([^)\s]+)\)")
ROW = re.compile(r"^\| `([a-z_.]+)` \|(?:\\\||[^|])*\| (`[^`|]*`|none) \| ", re.MULTILINE)  # name, option, default
IN_PLUGIN = re.compile(r'self\._(?:gauge|counter)\(\s*"(\w+)"')
OF_HISTOGRAMS = ("_bucket", "_count", "_sum")


def settings(model: type[BaseModel] = ServeSettings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, default) of every setting."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.get_default(call_default_factory=True)


def written(default: Any) -> str:
    """A default as the tables have it."""
    if default is None:
        return "none"
    if isinstance(default, list):
        default = [one.model_dump(exclude_unset=True) if isinstance(one, BaseModel) else one for one in default]
    return f"`{default:g}`" if isinstance(default, float) else f"`{json.dumps(default)}`"


def metrics() -> set[str]:
    """Every metric by the name under which Prometheus stores it."""
    collectors = (
        Telemetry(lambda: [], lambda: [], lambda: []),
        Balancer(Fleet(), 1, clock=lambda: 0.0),
        Failover(Any, Any, 1),  # type: ignore[arg-type]  # nothing is asked
        PrefillLeg(lambda ticket, worker: b"", Fleet(), timeout_s=1.0, clock=lambda: 0.0),
        CostMeter(CostSettings(), lambda: 0.0, lambda: 0.0, factors={}, labels=1),
        SloMetrics(SloTargets(SloSettings())),
        Sleeper(Fleet(), SleepSettings(from_zero=["any"])),
        LiveAdapters({}, Fleet(), LoraSettings()),
        FairnessMetrics(lambda: ((), {}), Counter(), lambda: (True, 1), lambda: 0.0, labels=1),
        Runner(Any, Any, "", lambda: 0.0),  # type: ignore[arg-type]  # its metrics need neither batches nor engines
    )
    names = {
        family.name + ("_total" if family.type == "counter" else "")
        for collector in collectors
        for family in collector.collect()
    }
    plugin = (ROOT / "scheduler" / "vllm" / "metrics.py").read_text(encoding="utf-8")  # importing it needs vLLM
    return names | {f"evenhand_engine_{name}" for name in IN_PLUGIN.findall(plugin)}


def words_to_engines() -> set[str]:
    """The names in `vllm_xargs`, which look like metrics."""
    files = ("server/relay/engine_body.py", "server/fleet/fleet.py", "scheduler/vllm/plugin.py")
    texts = [(ROOT / file).read_text(encoding="utf-8") for file in files]
    return {word for text in texts for word in re.findall(r'"(evenhand_\w+)"', text)} - {"evenhand_engine_policy_info"}


def named_metric(word: str) -> str:
    for end in OF_HISTOGRAMS:
        if word.endswith("_seconds" + end):
            return word.removesuffix(end)
    return word


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_operations_has_every_setting_with_its_default() -> None:
    rows = dict(ROW.findall(OPERATIONS.read_text(encoding="utf-8")))
    expected = {name: written(default) for name, default in settings()}
    assert {name: rows.get(name) for name in expected} == expected


def test_operations_has_every_metric() -> None:
    missing = metrics() - set(WORD.findall(OPERATIONS.read_text(encoding="utf-8")))
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_metrics_that_a_page_names_exist(page: Path) -> None:
    named = {named_metric(word) for word in WORD.findall(page.read_text(encoding="utf-8"))}
    assert named <= metrics() | words_to_engines()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not re.match(r"[a-z]+:|#", link)]
    broken = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert not broken


def test_every_client_has_a_row_with_the_versions_that_are_installed_for_it() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", COMPATIBILITY.read_text(encoding="utf-8"), re.MULTILINE)
    written = {name: versions for name, versions, _ in rows}
    for client in CLIENTS:
        pins = [re.sub(r"\[\w+\]|==|(?<=\w)@", " ", package).split() for package in client.packages]
        expected = ", ".join(" ".join(pin) for pin in pins)
        assert client.name in written and written[client.name].startswith(expected)
    assert not [said for *_, said in rows if "**failed**" in said]


def test_the_example_tenant_file_can_be_served() -> None:
    names = [record.name for record in read_file(ROOT / "deploy" / "tenants.example.yaml")]
    assert len(names) == len(set(names)) > 1


def test_every_field_that_is_open_to_all_is_listed() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").partition("## Fields\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(/[^`]+)` \| (.+) \|$", page, re.MULTILINE))
    assert {route: frozenset(re.findall(r"`(\w+)`", fields)) for route, fields in rows.items()} == dict(ALLOWED)
