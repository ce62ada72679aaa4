"""The worker's metrics: named as Prometheus wants it, as the page lists them, and gone with what they are of."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from documents import ROOT
from faust.types import TP
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from stream.core.batch import Batch, StepResult
from stream.core.counters import Counter
from stream.core.encoders import VectorStatus
from stream.core.events import Reason, Reject
from stream.kafka.delivery import RecordBatch
from stream.kv.protocol import Serving
from stream.metrics import Collector
from stream.pipeline.measures import STAGES, Measures
from stream.retrieval.reader_metrics import METRICS as OF_READERS
from stream.worker.health import Health
from stream.worker.input_lag import Lag
from stream.worker.metrics import METRICS, WorkerMetrics
from stream.worker.pages import pages

PAGES = {"worker": METRICS, "retrieval": OF_READERS}
PAIR = ("mix-1", "films_v1")


class Worker:
    """One that owns partition 3, takes 4, and has done a little of everything."""

    def __init__(self) -> None:
        self.measures = Measures()
        self.processor = SimpleNamespace(owned={3: SimpleNamespace(epoch=7)})
        self.restoring: dict[int, int | None] = {4: 1_500}
        self.lags = {TP("events", 3): Lag(12, 1.5, 0), TP("erasures", 3): Lag(0, 0.0, 0)}
        self.input_lag = SimpleNamespace(lags=lambda: self.lags, commit_age_s=lambda: 0.5)
        self.kv = SimpleNamespace(errors={"locked": 0, "lost": 1, "failed": 2})
        self.covered = {PAIR: 6}
        self.rollout: Any = SimpleNamespace(covered=lambda: self.covered, serving=Serving(*PAIR, 4), partitions=8)
        records = [SimpleNamespace(offset=n, timestamp=1_000) for n in range(5)]
        batch = RecordBatch("events", 3, records, 0, 0, 0, 1.0)  # type: ignore[arg-type]
        decoded = Batch(3, rejects=[(4, Reject(Reason.NOT_JSON, "no payload"))])
        for counter in (Counter.APPLIED, Counter.DUPLICATE, Counter.IGNORED, Counter.REJECTED):
            decoded.count(counter)
        self.measures.took(batch, decoded, is_erasures=False)
        self.measures.step_records.observe(5)
        self.measures.readable(batch, 3_500)
        self.measures.durable(batch)
        for stage in STAGES:
            self.measures.passed(stage, 0.0)
        result = StepResult(counts={Counter.ERASURES: 2, Counter.NEAR_CENTROID: 1}, cosines=[0.97, 1.0000001])
        result.published = {(*PAIR, VectorStatus.OK): 3, (*PAIR, VectorStatus.TOO_SHORT_HISTORY): 1}
        result.unknown_items = {PAIR: 2}
        self.measures.caused(result)

    def scrape(self, accept: str = "") -> str:
        answer = pages(self, Health(self))["/metrics"]({"accept": accept})  # type: ignore[arg-type]
        assert answer.status == 200
        return answer.body.decode()

    def families(self) -> dict[str, Family]:
        return {family.name: family for family in parse(self.scrape())}

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        found = [s for family in self.families().values() for s in family.samples if s.name == name]
        return {tuple(value for _, value in sorted(s.labels.items())): s.value for s in found}


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.mark.parametrize("page", PAGES)
def test_the_page_lists_every_metric_with_its_labels_and_no_other(page: str) -> None:
    text = (ROOT / "stream" / page / "README.md").read_text()
    rows = re.findall(r"^\| `(uemb_\w+)` \|([^|]*)\| \S", text, re.MULTILINE)
    listed = {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    assert len(listed) == len(rows)
    assert listed == {metric.name: metric.labels for metric in PAGES[page]}


@pytest.mark.parametrize("metric", [*METRICS, *OF_READERS], ids=lambda metric: metric.name)
def test_names_and_units_are_those_of_prometheus_conventions(metric: Any) -> None:
    assert re.fullmatch(r"uemb(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.name.endswith("_info") == (metric.kind == "info")
    assert not re.search(r"_(ms|milliseconds|minutes|hours|kilobytes|percent|count|sum|bucket)(_|$)", metric.name)
    assert not {"le", "quantile", "job", "instance"}.intersection(metric.labels)
    assert not {"user", "user_id", "item", "item_id", "key", "offset"}.intersection(metric.labels)
    assert metric.description.strip()
    assert "\n" not in metric.description


def test_every_counter_is_told_somewhere(worker: Worker) -> None:
    told = {metric.name for metric in METRICS}
    outcomes = {"applied", "duplicate", "too_old", "erased", "ignored", "rejected", "withdrawn"}
    elsewhere = {Counter.RECORDS, Counter.VECTORS, Counter.FALLBACKS}  # records_total, vectors_total
    for counter in Counter:
        assert f"uemb_{counter}_total" in told or counter in outcomes | elsewhere, counter


def test_what_is_exported_is_what_is_declared(worker: Worker) -> None:
    found = {name: family.type for name, family in worker.families().items() if name.startswith("uemb_")}
    kinds = {"counter": "counter", "gauge": "gauge", "histogram": "histogram", "info": "gauge"}  # as text has them
    assert found == {m.name.removesuffix("_total"): kinds[m.kind] for m in METRICS}
    assert {m.name for m in METRICS} >= set(WorkerMetrics(worker).read())  # type: ignore[arg-type]
    assert set(WorkerMetrics(worker).read()) == {m.name for m in METRICS}, "a metric has no samples"  # type: ignore[arg-type]


def test_openmetrics_is_given_to_who_asks(worker: Worker) -> None:
    text = worker.scrape("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5")
    assert text.endswith("# EOF\n")
    families = {family.name: family for family in parse_openmetrics(text)}
    assert families["uemb_build"].type == "info"
    assert families["uemb_records"].type == "counter"


def test_numbers_arrive_as_they_are(worker: Worker) -> None:
    samples = worker.samples
    outcomes = {("applied", "events"): 1, ("duplicate", "events"): 1, ("ignored", "events"): 1}
    assert samples("uemb_records_total") == {**outcomes, ("rejected", "events"): 1}
    assert samples("uemb_rejected_total") == {("not_json", "events"): 1}
    assert samples("uemb_erasures_total") == {(): 2}
    assert samples("uemb_gaps_total") == {(): 0}
    reasons = {("", "ok"): 3, ("too_short_history", "fallback"): 1}
    reasons |= dict.fromkeys(((r, "fallback") for r in ("no_known_items", "degenerate", "encoder_error")), 0)
    assert samples("uemb_vectors_total") == {("films_v1", *at, "mix-1"): n for at, n in reasons.items()}
    assert samples("uemb_unknown_items_total") == {("films_v1", "mix-1"): 2}
    assert samples("uemb_vector_cosine_bucket")[("0.95",)] == 0
    assert samples("uemb_vector_cosine_bucket")[("0.99",)] == 1
    assert samples("uemb_vector_cosine_bucket")[("1",)] == 2, "a cosine above 1 by rounding"
    assert samples("uemb_batch_records_sum") == {(): 5}
    assert samples("uemb_event_age_seconds_sum") == {(): 2.5}
    assert samples("uemb_event_durable_seconds_count") == {(): 5}, "one an event"
    assert {stage for (stage,) in samples("uemb_stage_seconds_count")} == set(STAGES)
    assert samples("uemb_lag_records") == {("3", "events"): 12, ("3", "erasures"): 0}
    assert samples("uemb_lag_seconds") == {("3", "events"): 1.5, ("3", "erasures"): 0}
    assert samples("uemb_commit_age_seconds") == {(): 0.5}
    assert samples("uemb_partition_owned") == {("3",): 1, ("4",): 0}
    assert samples("uemb_partition_epoch") == {("3",): 7}
    assert samples("uemb_restore_remaining_records") == {("4",): 1_500}
    assert samples("uemb_kv_errors_total") == {("locked",): 0, ("lost",): 1, ("failed",): 2}
    assert samples("uemb_rollout_covered_partitions") == {("films_v1", "mix-1"): 6}
    assert samples("uemb_rollout_partitions") == {(): 8}
    assert samples("uemb_serving_info") == {("films_v1", "mix-1"): 1}
    assert samples("process_resident_memory_bytes")[()] > 0


def test_what_has_not_happened_yet_to_a_pair_is_told_with_0(worker: Worker) -> None:
    worker.covered = {PAIR: 6, ("mix-1", "films_v2"): 0}
    assert worker.samples("uemb_unknown_items_total")["films_v2", "mix-1"] == 0
    vectors = worker.samples("uemb_vectors_total")
    assert [n for at, n in vectors.items() if at[0] == "films_v2"] == [0] * len(VectorStatus)


def test_series_end_with_the_partition_and_with_the_pair_of_versions(worker: Worker) -> None:
    worker.processor.owned.clear()
    worker.restoring.clear()
    worker.lags.clear()
    worker.covered.clear()
    worker.rollout.serving = None
    for metric in METRICS:
        if "partition" in metric.labels or "item_version" in metric.labels:
            assert worker.samples(metric.name) == {}, metric.name
    assert worker.samples("uemb_records_total"), "what was counted stays"


def test_what_is_not_known_has_no_series(worker: Worker) -> None:
    worker.lags[TP("events", 3)] = Lag(None, None, 0)
    worker.restoring[4] = None
    assert worker.samples("uemb_lag_records") == {("3", "erasures"): 0}
    assert worker.samples("uemb_lag_seconds") == {("3", "erasures"): 0}
    assert worker.samples("uemb_restore_remaining_records") == {}
    assert worker.samples("uemb_partition_owned") == {("3",): 1, ("4",): 0}


def test_a_worker_that_has_not_started_has_metrics(worker: Worker) -> None:
    worker.kv = worker.rollout = None
    worker.processor.owned, worker.restoring, worker.lags = {}, {}, {}
    assert worker.samples("uemb_kv_errors_total") == {}
    assert len(worker.samples("uemb_build_info")) == 1


def test_an_erasure_that_is_known_is_a_duplicate() -> None:
    measures = Measures()
    records = [SimpleNamespace(offset=n, timestamp=-1) for n in range(6)]
    batch = RecordBatch("erasures", 0, records, 0, 0, 0)  # type: ignore[arg-type]
    decoded = Batch(0, counts={Counter.ERASURES: 2, Counter.WITHDRAWN: 1, Counter.REJECTED: 1})
    measures.took(batch, decoded, is_erasures=True)
    measures.readable(batch, 1_000)
    measures.durable(batch)
    assert measures.records == {
        ("erasures", "erasures"): 2,
        ("erasures", "withdrawn"): 1,
        ("erasures", "rejected"): 1,
        ("erasures", "duplicate"): 2,
    }
    for told in (measures.age_s, measures.durable_s):
        assert told.cumulative()[-1] == ("+Inf", 0), "without a time there is nothing to tell"


def test_a_registry_takes_a_workers_metrics_once(worker: Worker) -> None:
    registry = CollectorRegistry()
    registry.register(Collector(METRICS, WorkerMetrics(worker).read))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(Collector(METRICS, WorkerMetrics(worker).read))  # type: ignore[arg-type]
