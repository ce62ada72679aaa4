"""The alerts and the dashboard in the compose file: they are sound, complete, documented, and fire when they should."""

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import yaml
from compose_file import alert_rules, dashboard, inline
from documents import ROOT, anchors
from prometheus import promtool, scaled, why_no_prometheus

from stream.worker.metrics import METRICS

needs_prometheus = pytest.mark.skipif(why_no_prometheus() is not None, reason=str(why_no_prometheus()))

RULES: Final = {rule["alert"]: rule for rule in alert_rules()}
#: Labels of the worker in the cases.
WORKER: Final = 'job="uemb-worker", instance="worker:9464"'
PAIR: Final = 'user_version="mix-1", item_version="v1"'
#: What Prometheus adds or makes of a metric.
_SUFFIX: Final = re.compile(r"_(?:bucket|sum|count)$")
#: What every program tells, and what Prometheus itself does.
_FOREIGN: Final = {"up", "ALERTS", "process_start_time_seconds", "process_resident_memory_bytes",
                   "process_cpu_seconds_total", "process_open_fds"}  # fmt: skip
#: Grafana's units that we use: a name that it does not know is shown as a word behind the number.
_UNITS: Final = {"short", "none", "s", "cps", "percentunit", "bytes"}


class Case(NamedTuple):
    """At a time an alert fires, or does not, for some series with values every 15 s."""

    what: str
    at: str
    fires: bool
    series: dict[str, str]


def series(name: str, values: str, more: str = "") -> dict[str, str]:
    return {f"{name}{{{WORKER}{', ' + more if more else ''}}}": values}


def lag(seconds: str) -> dict[str, str]:
    return series("uemb_lag_seconds", seconds, 'topic="events", partition="0"')


def vectors(*values: tuple[str, str, str]) -> dict[str, str]:
    told = [series("uemb_vectors_total", n, f'{PAIR}, status="{status}", reason="{why}"') for status, why, n in values]
    return dict(chain.from_iterable(one.items() for one in told))


def rollout(covered: str) -> dict[str, str]:
    of_pair = series("uemb_rollout_covered_partitions", covered, PAIR)
    return of_pair | series("uemb_rollout_partitions", "4x400")


def entered(applied: str, unknown: str) -> dict[str, str]:
    applied_series = series("uemb_records_total", applied, 'topic="events", outcome="applied"')
    return applied_series | series("uemb_unknown_items_total", unknown, PAIR)


LABELS: Final = {
    "UembWorkerDown": {"job", "instance"},
    "UembLagGrowing": {"job", "topic", "partition"},
    "UembCommitsStalled": {"job", "instance"},
    "UembFallbackShare": {"job", "user_version", "item_version"},
    "UembUnknownItems": {"job", "user_version", "item_version"},
    "UembDeadLetters": {"job"},
    "UembRestoreStuck": {"job", "instance"},
    "UembStoreErrors": {"job", "instance", "kind"},
    "UembRolloutStalled": {"job", "user_version", "item_version"},
}
ONE_AFTER_ANOTHER: Final = " ".join(f"{100 * n}x6" for n in range(1, 30))
CASES: Final = {
    "UembWorkerDown": [
        Case("down for two minutes", "4m", True, series("up", "1x8 0x40")),
        Case("one scrape failed", "2m15s", False, series("up", "1x8 0 1x40")),
        Case("up again", "9m", False, series("up", "1x8 0x20 1x40")),
        Case("it starts every two minutes", "12m", True, series("process_start_time_seconds", ONE_AFTER_ANOTHER)),
        Case("it was started once more", "12m", False, series("process_start_time_seconds", "1x20 2x60")),
    ],
    "UembLagGrowing": [
        Case("it falls back", "20m", True, lag("0x20 0+15x100")),
        Case("not for long yet", "7m", False, lag("0x20 0+15x100")),
        Case("far behind, and catching up", "20m", False, lag("3600-10x100")),
        Case("a little behind", "20m", False, lag("50+0.01x100")),
    ],
    "UembCommitsStalled": [
        Case("for a minute", "4m", True, series("uemb_commit_age_seconds", "1x10 0+15x20")),
        Case("every second", "4m", False, series("uemb_commit_age_seconds", "1x40")),
        Case("it is told for a while", "9m", True, series("uemb_commit_age_seconds", "1x10 0+15x10 1x60")),
        Case("and not for ever", "12m", False, series("uemb_commit_age_seconds", "1x10 0+15x10 1x60")),
    ],
    "UembFallbackShare": [
        Case("a tenth", "25m", True, vectors(("ok", "", "0+90x120"), ("fallback", "no_known_items", "0+10x120"))),
        Case(
            "not for long yet", "15m", False, vectors(("ok", "", "0+9x120"), ("fallback", "degenerate", "0x40 0+9x80"))
        ),
        Case("one in fifty", "25m", False, vectors(("ok", "", "0+98x120"), ("fallback", "degenerate", "0+2x120"))),
        Case("newcomers", "25m", False, vectors(("ok", "", "0+50x120"), ("fallback", "too_short_history", "0+50x120"))),
        Case("nothing is published", "25m", False, vectors(("ok", "", "9x120"), ("fallback", "degenerate", "9x120"))),
    ],
    "UembUnknownItems": [
        Case("a tenth", "25m", True, entered("0+100x120", "0+10x120")),
        Case("one in fifty", "25m", False, entered("0+100x120", "0+2x120")),
        Case("not for long yet", "15m", False, entered("0+100x120", "0x40 0+50x80")),
    ],
    "UembDeadLetters": [
        Case("one", "8m", True, series("uemb_dead_letters_total", "0x20 1x100")),
        Case("one, a quarter of an hour ago", "21m", False, series("uemb_dead_letters_total", "0x20 1x100")),
    ],
    "UembRestoreStuck": [
        Case("it waits", "8m", True, series("uemb_partition_owned", "0x60", 'partition="0"')),
        Case("not for long yet", "4m", False, series("uemb_partition_owned", "0x60", 'partition="0"')),
        Case(
            "it waits in the middle",
            "12m",
            True,
            series("uemb_partition_owned", "0x60", 'partition="0"')
            | series("uemb_restore_remaining_records", "900x60", 'partition="0"'),
        ),
        Case(
            "it reads",
            "12m",
            False,
            series("uemb_partition_owned", "0x60", 'partition="0"')
            | series("uemb_restore_remaining_records", "90000-100x60", 'partition="0"'),
        ),
        Case("all is owned", "12m", False, series("uemb_partition_owned", "1x60", 'partition="0"')),
    ],
    "UembStoreErrors": [
        Case("without an end", "6m", True, series("uemb_kv_errors_total", "0x10 0+9x40", 'kind="failed"')),
        Case("for a moment", "3m", False, series("uemb_kv_errors_total", "0x10 9x40", 'kind="failed"')),
        Case("a moment ago", "6m", False, series("uemb_kv_errors_total", "0x10 9x40", 'kind="failed"')),
    ],
    "UembRolloutStalled": [
        Case("refused", "40m", True, rollout("0x300")),
        Case("not for long yet", "20m", False, rollout("0x300")),
        Case("stuck at the third", "75m", True, rollout("0x20 1x20 2x300")),
        Case("one every twenty minutes", "75m", False, rollout("0x80 1x80 2x80 3x80")),
        Case("covered", "75m", False, rollout("4x300")),
    ],
}


@needs_prometheus
def test_promtool_finds_the_configuration_sound(tmp_path: Path) -> None:
    rules = tmp_path / "alerts.yml"
    rules.write_text(inline("alerts"))
    (tmp_path / "prometheus.yml").write_text(inline("prometheus").replace("/etc/prometheus/alerts.yml", str(rules)))
    assert f"SUCCESS: {len(RULES)} rules found" in promtool("check", "config", str(tmp_path / "prometheus.yml"))


@needs_prometheus
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    rules = yaml.safe_load(inline("alerts"))
    for rule in rules["groups"][0]["rules"]:
        del rule["annotations"]  # promtool would want them written out for each case
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    tests = [
        {
            "name": f"{alert}: {case.what}",
            "interval": "15s",
            "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
            "alert_rule_test": [
                {
                    "eval_time": case.at,
                    "alertname": alert,
                    "exp_alerts": [{"exp_labels": expected_labels(alert, case)}] if case.fires else [],
                }
            ],
        }
        for alert, cases in CASES.items()
        for case in cases
    ]
    document = {"rule_files": ["alerts.yml"], "evaluation_interval": "15s", "tests": tests}
    (tmp_path / "cases.yml").write_text(yaml.safe_dump(document))
    assert "SUCCESS" in promtool("test", "rules", str(tmp_path / "cases.yml"))


def expected_labels(alert: str, case: Case) -> dict[str, str]:
    """Labels of the one alert of a case, by which it is told apart from others."""
    labels = dict(re.findall(r'(\w+)="([^"]*)"', "".join(case.series)))
    kept = {name: value for name, value in labels.items() if name in LABELS[alert]}
    return kept | {"severity": RULES[alert]["labels"]["severity"]}


def test_each_alert_has_cases_of_both_kinds() -> None:
    assert set(CASES) == set(LABELS) == set(RULES)
    for alert, cases in CASES.items():
        assert {case.fires for case in cases} == {True, False}, alert


def test_the_page_lists_every_alert_with_its_severity_and_no_other() -> None:
    text = (ROOT / "stream" / "worker" / "README.md").read_text()
    rows = re.findall(r"^\| `(Uemb\w+)` \| (\w+) \| \S[^|]+ \| \S", text, re.MULTILINE)
    assert dict(rows) == {name: rule["labels"]["severity"] for name, rule in RULES.items()}
    assert len(rows) == len(RULES) == text.count("\n| `Uemb")


@pytest.mark.parametrize("alert", RULES)
def test_an_alert_says_what_to_do_and_where_that_is_written(alert: str) -> None:
    annotations = RULES[alert]["annotations"]
    assert set(annotations) == {"summary", "description"}
    assert RULES[alert]["labels"]["severity"] in ("warning", "critical")
    pages = re.findall(r"\(([\w/]+\.md)(?:#([\w-]+))?\)", annotations["description"])
    assert pages
    for page, anchor in pages:
        assert not anchor or anchor in anchors(ROOT / page), (page, anchor)
    for other in re.findall(r"Uemb\w+", annotations["description"]):
        assert other in RULES


def names_in(expression: str) -> set[str]:
    """Metrics that an expression reads, as we declare them."""
    without_texts = re.sub(r'"[^"]*"|\{[^}]*\}|\b(?:by|on) \([^)]*\)', "", expression)
    words = set(re.findall(r"\b(?:uemb_\w+|process_\w+|up|ALERTS)\b", without_texts))
    return {_SUFFIX.sub("", word) for word in words}


def test_all_metrics_are_ours_and_all_of_ours_are_shown() -> None:
    declared = {metric.name for metric in METRICS}
    in_rules = {name for rule in RULES.values() for name in names_in(rule["expr"])}
    in_dashboard = {name for panel in panels() for target in panel["targets"] for name in names_in(target["expr"])}
    assert in_rules | in_dashboard <= declared | _FOREIGN
    assert declared - in_dashboard == set(), "not on the dashboard"


def panels() -> list[dict[str, Any]]:
    """Those of the dashboard that show something; rows are headings."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def test_the_dashboard_is_one_that_grafana_shows() -> None:
    board = dashboard()
    (source,) = yaml.safe_load(inline("grafana-datasource"))["datasources"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in board["panels"]]
    assert len(set(titles)) == len(titles)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert len(cells) == at["w"] * at["h"] > 0
        assert not cells & taken, f"{panel['title']} lies over another"
        assert max(x for x, _ in cells) < 24, f"{panel['title']} is too wide"
        taken |= cells
    assert len(taken) == 24 * (1 + max(y for _, y in taken)), "a hole"
    uids = [*(panel["datasource"] for panel in panels()), *(v["datasource"] for v in board["templating"]["list"])]
    assert all(uid == {"type": "prometheus", "uid": source["uid"]} for uid in uids)
    for panel in panels():
        assert panel["fieldConfig"]["defaults"]["unit"] in _UNITS, panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0
    known = {variable["name"] for variable in board["templating"]["list"]} | {"__rate_interval", "__all"}
    assert set(re.findall(r"\$(\w+)", json.dumps(board))) == known


def test_the_dashboard_is_where_its_provider_looks() -> None:
    (provider,) = yaml.safe_load(inline("grafana-dashboards"))["providers"]
    assert provider["options"] == {"path": "/etc/grafana/dashboards"}


def test_only_durations_are_scaled() -> None:
    rules, short = inline("alerts"), scaled(inline("alerts"), 1 / 60)
    durations = re.compile(r"\b\d+(?:ms|[smh])\b")
    assert durations.sub("", rules) == durations.sub("", short)
    assert len(durations.findall(rules)) == len(re.findall(r"\b\d+ms\b", short))
    assert "scrape_interval: 250ms" in scaled(inline("prometheus"), 1 / 60)
