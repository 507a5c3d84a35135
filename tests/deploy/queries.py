"""What a PromQL query is about, and which metrics there are to be about."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import promql_parser
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from deploy.observability.dashboards import Query
from loadtest.fake.engine_metrics import exposition
from loadtest.simulator.batch import ContinuousBatch
from loadtest.simulator.costmodel import PRESETS
from scheduler.catalog import build
from scheduler.tiers import TieredLanes
from server.app import GatewayServer
from server.settings import BatchSettings, CostSettings, Settings, SleepSettings

ROOT = Path(__file__).resolve().parent.parent.parent
RULES = ROOT / "deploy" / "observability" / "prometheus" / "rules.yml"
OF_PLUGIN = re.compile(r'self\._(?:gauge|counter)\(\s*"(\w+)"')
OF_PROMETHEUS = {"up"}


def selectors(expr: str) -> list[tuple[str, dict[str, str]]]:
    """Every metric that a query selects, with its label matchers. ValueError where it is no PromQL."""
    found: list[tuple[str, dict[str, str]]] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.MatrixSelector):
            node = node.vector_selector
        if isinstance(node, promql_parser.VectorSelector):
            found.append((str(node.name), {matcher.name: matcher.value for matcher in node.matchers.matchers}))

    promql_parser.walk(promql_parser.parse(plain(expr)), visit)
    return found


def plain(expr: str, interval: str = "5m") -> str:
    """A panel's query with Grafana's variable filled in."""
    return expr.replace("$__rate_interval", interval)


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def of_gateway() -> set[str]:
    """Every sample name that a gateway's /metrics can have."""
    with TemporaryDirectory() as folder:
        batch = BatchSettings(folder=Path(folder))
        settings = Settings(cost=CostSettings(meter=True), sleep=SleepSettings(after_s=1), batch=batch)
        return _names(generate_latest(GatewayServer(settings).telemetry.registry))


def of_engine() -> set[str]:
    """Every sample name of vLLM's that the fake engine has, too."""
    batch = ContinuousBatch(PRESETS["quick"], TieredLanes(build("fcfs", {})))
    return _names(exposition(batch, "fake", plugin=True))


def of_plugin() -> set[str]:
    """Every metric of the scheduler plug-in, which cannot be imported without vLLM."""
    source = (ROOT / "scheduler" / "vllm" / "metrics.py").read_text(encoding="utf-8")
    return {f"evenhand_engine_{name}" for name in OF_PLUGIN.findall(source)}


def _names(page: bytes) -> set[str]:
    families = list(text_string_to_metric_families(page.decode()))
    declared = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    return declared | {sample.name for family in families for sample in family.samples}


def known() -> set[str]:
    """Every name that a query may select."""
    return of_gateway() | of_engine() | of_plugin() | recorded() | OF_PROMETHEUS


def only_real(query: Query) -> bool:
    """Whether a query is about what only a real engine shows, and the fake one does not."""
    return bool({name for name, _ in selectors(query.expr)} & (of_plugin() - of_engine()))
