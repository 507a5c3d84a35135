"""Rules and alerts: about metrics that exist, with what to do about each in the documents, and doing what they say."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from server.observe.telemetry import SECONDS
from tests.deploy.queries import ROOT, RULES, known, rules, selectors

RUNBOOKS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
ALERTS = [rule for rule in rules() if "alert" in rule]


def promtool() -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool here: install Prometheus (Debian and Ubuntu: apt install prometheus)")
    return program


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_asks_for_metrics_that_exist(rule: dict[str, str]) -> None:
    asked = selectors(rule["expr"])
    assert asked and {name for name, _ in asked} <= known()
    for _, labels in asked:
        assert "le" not in labels or float(labels["le"]) in SECONDS  # else it would select nothing, for ever


def test_every_alert_has_a_name_of_its_own_a_severity_and_words() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(names) == len(set(names)) > 10
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_operations_says_what_to_do_about_an_alert(alert: str) -> None:
    assert re.search(rf"^\*\*`{alert}`", RUNBOOKS, re.MULTILINE)


def test_operations_names_no_alert_that_does_not_exist() -> None:
    assert set(re.findall(r"`(Evenhand[A-Z]\w+)`", RUNBOOKS)) <= {rule["alert"] for rule in ALERTS}


def test_every_alert_is_tried() -> None:
    tried = set(re.findall(r"alertname: (\w+)", (RULES.parent / "rules_test.yml").read_text(encoding="utf-8")))
    assert tried == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("command", [["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]])
def test_promtool_agrees(command: list[str]) -> None:
    said = subprocess.run([promtool(), *command], cwd=RULES.parent, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr


def test_promtool_reads_the_configuration(tmp_path: Path) -> None:
    text = (RULES.parent / "prometheus.yml").read_text(encoding="utf-8")
    (tmp_path / "key").write_text("admin-key")
    (tmp_path / "rules.yml").write_bytes(RULES.read_bytes())
    (tmp_path / "prometheus.yml").write_text(text.replace("/run/secrets/admin_key", str(tmp_path / "key")))
    command = [promtool(), "check", "config", str(tmp_path / "prometheus.yml")]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
