"""What a worker has counted and timed since its start, once a batch; metrics and the log's report are made of it."""

import collections
import time
from collections.abc import Mapping
from typing import Final, Literal, TypeVar

from stream.core.batch import Batch, StepResult
from stream.core.counters import Counter
from stream.kafka.delivery import RecordBatch
from stream.metrics import SECONDS, Histogram

_Key = TypeVar("_Key")

#: The parts of a step's way that are timed, in order.
Stage = Literal["decode", "apply", "queue", "changelog", "kv", "output"]
STAGES: Final[tuple[Stage, ...]] = ("decode", "apply", "queue", "changelog", "kv", "output")
#: What may become of a record of an event topic, and of one of the deletion topic.
OF_EVENTS: Final = (
    Counter.APPLIED, Counter.DUPLICATE, Counter.TOO_OLD, Counter.ERASED, Counter.IGNORED, Counter.REJECTED
)  # fmt: skip
OF_ERASURES: Final = (Counter.ERASURES, Counter.WITHDRAWN, Counter.REJECTED)

_STEP_BOUNDS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000)
#: Prometheus' client leaves sum and count out where a bound is negative.
_COSINE_BOUNDS: Final = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
#: A batch may be minutes old after an outage, and its events days.
_WAY_BOUNDS: Final = (*SECONDS[3:], 600.0, 3_600.0, 86_400.0)


class Measures:
    """Plain numbers that the event loop adds to; other threads may read them.

    Attributes:
        counts: by counter.
        records: by topic and what became of them; each interaction of an event that holds several counts as one.
        rejected: by topic and reason.
        published: vectors, by user version, item version and `VectorStatus`.
        unknown_items: by user and item version.
        dead_letters: that are on their topic.
        claims: of partitions.
        assignments: that the group gave this worker.
        stage_s: how long steps were at each stage.
        step_records: how many records steps took in.
        durable_s: of each event, from its fetch until all it caused was durable.
        age_s: of the first event of each batch, by Kafka's time, when its vectors could be read.
        cosines: between a user's vectors before and after a batch.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[Counter] = collections.Counter()
        self.records: dict[tuple[str, str], int] = {}
        self.rejected: dict[tuple[str, str], int] = {}
        self.published: dict[tuple[str, str, int], int] = {}
        self.unknown_items: dict[tuple[str, str], int] = {}
        self.dead_letters = 0
        self.claims = 0
        self.assignments = 0
        self.stage_s = {stage: Histogram(SECONDS) for stage in STAGES}
        self.step_records = Histogram(_STEP_BOUNDS)
        self.durable_s = Histogram(_WAY_BOUNDS)
        self.age_s = Histogram(_WAY_BOUNDS)
        self.cosines = Histogram(_COSINE_BOUNDS)

    def count(self, counter: Counter, by: int) -> None:
        """Add to a counter."""
        self.counts[counter] += by

    def took(self, batch: RecordBatch, decoded: Batch, *, is_erasures: bool) -> None:
        """Take note of what became of the records of a batch, whose step is done."""
        topic, counts = batch.topic, decoded.counts
        self.counts.update(counts)
        self.count(Counter.RECORDS, len(batch.records))
        outcomes: dict[str, int] = {c: counts.get(c, 0) for c in (OF_ERASURES if is_erasures else OF_EVENTS)}
        if is_erasures:
            outcomes[Counter.DUPLICATE] = len(batch.records) - sum(outcomes.values())
        for outcome, n in outcomes.items():
            if n:
                self.records[topic, outcome] = self.records.get((topic, outcome), 0) + n
        for _, reject in decoded.rejects:
            self.rejected[topic, reject.reason] = self.rejected.get((topic, reject.reason), 0) + 1

    def caused(self, result: StepResult) -> None:
        """Take note of what a step caused."""
        self.counts.update(result.counts)
        _add(self.published, result.published)
        _add(self.unknown_items, result.unknown_items)
        for cosine in result.cosines:
            self.cosines.observe(min(cosine, 1.0))  # but for rounding it is no larger

    def passed(self, stage: Stage, since_s: float) -> float:
        """Something was at a stage since then (monotonic s); return now."""
        now_s = time.monotonic()
        self.stage_s[stage].observe(now_s - since_s)
        return now_s

    def readable(self, batch: RecordBatch, now_ms: int) -> None:
        """The vectors of a batch can be read from now on (epoch ms)."""
        if (kafka_ms := batch.records[0].timestamp) >= 0:  # negative: of a producer that gives none
            self.age_s.observe(max(0, now_ms - kafka_ms) / 1000)

    def durable(self, batch: RecordBatch) -> None:
        """All that a batch caused is durable."""
        if batch.fetched_s is not None:
            self.durable_s.observe(time.monotonic() - batch.fetched_s, len(batch.records))


def _add(to: dict[_Key, int], more: Mapping[_Key, int]) -> None:
    for key, n in more.items():
        to[key] = to.get(key, 0) + n
