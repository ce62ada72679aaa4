"""The worker's metrics: their names, and what they are at when somebody asks; listed in ``stream/worker/README.md``."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Final

from stream.core.counters import Counter
from stream.core.encoders import REASONS, VectorStatus
from stream.metrics import Metric, Samples
from stream.pipeline.measures import OF_ERASURES, OF_EVENTS
from stream.worker.health import Vitals

#: Counters that are told by topic, or by what vectors they are of.
_TOLD_APART: Final = {*OF_EVENTS, *OF_ERASURES, Counter.RECORDS, Counter.VECTORS, Counter.FALLBACKS} - {
    Counter.ERASURES
}
#: Counters that are metrics of their own.
_COUNTERS: Final = [counter for counter in Counter if counter not in _TOLD_APART]
_PLACE: Final = ("topic", "partition")
_PAIR: Final = ("user_version", "item_version")
_PARTS: Final = ("version", "python", "faust", "aiokafka")

METRICS: Final = (
    Metric("uemb_records_total", "counter", "records by what became of them", ("topic", "outcome")),
    Metric("uemb_rejected_total", "counter", "records that were turned away as dead letters", ("topic", "reason")),
    Metric("uemb_dead_letters_total", "counter", "dead letters that are on their topic"),
    *(Metric(f"uemb_{counter}_total", "counter", counter.description) for counter in _COUNTERS),
    Metric("uemb_vectors_total", "counter", "vectors that were published", (*_PAIR, "status", "reason")),
    Metric("uemb_unknown_items_total", "counter", "interactions with items that the version lacks", _PAIR),
    Metric("uemb_vector_cosine", "histogram", "cosine between vectors of a user before and after a batch"),
    Metric(
        "uemb_batch_records", "histogram", "records of a step, which takes what was fetched together, of all partitions"
    ),
    Metric("uemb_stage_seconds", "histogram", "how long steps were at a stage", ("stage",)),
    Metric("uemb_event_durable_seconds", "histogram", "from an event's fetch until all it caused was durable"),
    Metric("uemb_event_age_seconds", "histogram", "age of a batch's first event when its vectors could be read"),
    Metric("uemb_lag_records", "gauge", "records that the brokers hold and that are not durable", _PLACE),
    Metric("uemb_lag_seconds", "gauge", "no record that is not durable is older", _PLACE),
    Metric("uemb_commit_age_seconds", "gauge", "for so long there was something to do without a commit"),
    Metric(
        "uemb_partition_owned", "gauge", "1 for a partition that is owned, 0 while it is being taken", ("partition",)
    ),
    Metric("uemb_partition_epoch", "gauge", "this worker's claim on a partition that is owned", ("partition",)),
    Metric("uemb_restore_remaining_records", "gauge", "records of the changelog still to be read", ("partition",)),
    Metric("uemb_epoch_claims_total", "counter", "partitions that were claimed"),
    Metric("uemb_rebalances_total", "counter", "assignments that the group gave this worker"),
    Metric("uemb_kv_errors_total", "counter", "answers of the key-value store that were errors", ("kind",)),
    Metric("uemb_rollout_covered_partitions", "gauge", "partitions in which all users have a vector", _PAIR),
    Metric("uemb_rollout_partitions", "gauge", "partitions of the application"),
    Metric("uemb_serving_info", "info", "the pair of versions that readers follow", _PAIR),
    Metric("uemb_build_info", "info", "what runs", _PARTS),
)


class WorkerMetrics:
    """Reads a worker's numbers as they are, in whatever thread asks.

    Args:
        of: the worker.
    """

    def __init__(self, of: Vitals) -> None:
        self._of = of
        versions = {"faust": version("faust-streaming"), "aiokafka": version("aiokafka")}
        self._build = (version("user-embedding-stream"), platform.python_version(), *versions.values())

    def read(self) -> Mapping[str, Samples]:
        """Present samples by metric."""
        return {**self._of_records(), **self._of_vectors(), **self._of_partitions(), **self._of_the_rest()}

    def _of_records(self) -> dict[str, Samples]:
        measures = self._of.measures
        counts = dict(measures.counts)
        return {
            "uemb_records_total": dict(measures.records),
            "uemb_rejected_total": dict(measures.rejected),
            "uemb_dead_letters_total": {(): measures.dead_letters},
            **{f"uemb_{counter}_total": {(): counts.get(counter, 0)} for counter in _COUNTERS},
            "uemb_batch_records": {(): measures.step_records},
            "uemb_stage_seconds": {(stage,): histogram for stage, histogram in measures.stage_s.items()},
            "uemb_event_durable_seconds": {(): measures.durable_s},
            "uemb_event_age_seconds": {(): measures.age_s},
        }

    def _of_vectors(self) -> dict[str, Samples]:
        """Of the pairs that are published: those of others end, lest they add up over the years.

        They begin with 0, or Prometheus would not see the first of what is rare.
        """
        measures, rollout = self._of.measures, self._of.rollout
        live = {} if rollout is None else rollout.covered()
        vectors, unknown = dict(measures.published), dict(measures.unknown_items)
        published = {
            (*pair, *REASONS[status]): vectors.get((*pair, status), 0) for pair in live for status in VectorStatus
        }
        serving = None if rollout is None else rollout.serving
        pair = None if serving is None else (serving.user_version, serving.item_version)
        return {
            "uemb_vectors_total": published,
            "uemb_unknown_items_total": {pair: unknown.get(pair, 0) for pair in live},
            "uemb_vector_cosine": {(): measures.cosines},
            "uemb_rollout_covered_partitions": live,
            "uemb_rollout_partitions": {} if rollout is None else {(): rollout.partitions},
            "uemb_serving_info": {} if pair is None else {pair: 1},
        }

    def _of_partitions(self) -> dict[str, Samples]:
        of = self._of
        owned, restoring, lags = dict(of.processor.owned), of.restoring, of.input_lag.lags()
        places = {(tp.topic, str(tp.partition)): lag for tp, lag in lags.items()}
        is_owned = {p: 1 for p in owned if p not in restoring} | dict.fromkeys(restoring, 0)
        return {
            "uemb_lag_records": {at: lag.records for at, lag in places.items() if lag.records is not None},
            "uemb_lag_seconds": {at: lag.seconds for at, lag in places.items() if lag.seconds is not None},
            "uemb_commit_age_seconds": {(): of.input_lag.commit_age_s()},
            "uemb_partition_owned": {(str(p),): is_one for p, is_one in is_owned.items()},
            "uemb_partition_epoch": {(str(p),): one.epoch for p, one in owned.items()},
            "uemb_restore_remaining_records": {(str(p),): n for p, n in restoring.items() if n is not None},
        }

    def _of_the_rest(self) -> dict[str, Samples]:
        of = self._of
        return {
            "uemb_epoch_claims_total": {(): of.measures.claims},
            "uemb_rebalances_total": {(): of.measures.assignments},
            "uemb_kv_errors_total": {} if of.kv is None else {(kind,): n for kind, n in dict(of.kv.errors).items()},
            "uemb_build_info": {self._build: 1},
        }
