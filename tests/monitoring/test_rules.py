"""Rules, alerts and dashboard as files: well formed, complete, tested, explained."""

import json
import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.chaos.prometheus import MONITORING
from tests import ROOT

ALERTS = [
    rule
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "classifier.json").read_text())
PANELS = DASHBOARD["panels"]


def run(promtool: str, *args: object) -> None:
    command = [promtool, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_wrong(promtool: str) -> None:
    run(promtool, "check", "config", MONITORING / "prometheus.yml")
    rules = (MONITORING / "rules.yml", MONITORING / "alerts.yml")
    run(promtool, "check", "rules", "--lint=all", "--lint-fatal", *rules)


@pytest.mark.parametrize("name", ["fire", "silent", "accuracy"])
def test_rules(promtool: str, name: str) -> None:
    run(promtool, "test", "rules", MONITORING / "tests" / f"{name}.yml")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_each_alert_is_tested_and_explained(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert set(alert["annotations"]) == {"summary", "description"}
    assert f'alertname="{name}"' in (MONITORING / "tests" / "fire.yml").read_text()
    silent = (MONITORING / "tests" / "silent.yml").read_text()
    assert re.search(rf"# .*\b{name}\b", silent), "its near miss"
    assert f"\n### {name}\n" in (ROOT / "docs" / "operations.md").read_text()


def test_operations_explains_no_other_alert() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert set(re.findall(r"^### (\w+)$", text, re.MULTILINE)) == {rule["alert"] for rule in ALERTS}


# --- The dashboard


def test_the_dashboard_is_what_grafana_reads() -> None:
    assert DASHBOARD["schemaVersion"] == 39  # Grafana 10.4; newer ones migrate it
    assert DASHBOARD["id"] is None
    assert DASHBOARD["uid"] == "classifier"
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "model", "version"]
    assert variables["datasource"]["query"] == "prometheus"
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    for panel in PANELS:
        if panel["type"] == "row":
            assert panel["panels"] == []
            continue
        assert panel["type"] in {"timeseries", "stat", "table", "heatmap"}
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= set(variables)


def test_panels_do_not_overlap() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        return {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }

    for one, other in combinations(PANELS, 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])


def test_panels_lie_under_their_row() -> None:
    order = sorted(PANELS, key=lambda panel: (panel["gridPos"]["y"], panel["gridPos"]["x"]))
    assert [panel["id"] for panel in order] == [panel["id"] for panel in PANELS]


def test_operations_names_every_row() -> None:
    rows = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    text = " ".join((ROOT / "docs" / "operations.md").read_text().split())
    assert f"Each of its rows answers one question: {' '.join(rows)}." in text


def test_provisioning_finds_the_dashboard() -> None:
    folder = MONITORING / "grafana" / "provisioning"
    [source] = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    [provider] = yaml.safe_load((folder / "dashboards" / "classifier.yml").read_text())["providers"]
    assert provider["type"] == "file"
    assert Path(MONITORING / "grafana" / "dashboards" / "classifier.json").is_file()
