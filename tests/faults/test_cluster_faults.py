"""A cluster under load, of which one server is away, comes back empty, fails over, or gives slots away."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from pipeline import Pipeline, feeding
from redis_cluster import RedisCluster

from stream.dataset import Dataset
from stream.retrieval import EmbeddingReader

EVENTS = 9_000
RATE = 1_500
#: Reasons of an answer that was not read; what the store said is another matter.
UNREAD = {"store_down", "timeout"}


class Prober:
    """Asks a reader for the same users all the while, and keeps what each answer said."""

    def __init__(self, cluster: RedisCluster, users: Sequence[str]) -> None:
        self._reader = EmbeddingReader.open(cluster.url, timeout_s=0.5)
        self._users = users
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.calls = 0
        self.back = Counter[str]()
        self.gone = Counter[str]()
        self.reasons = Counter[str]()

    def __enter__(self) -> "Prober":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._reader.close()

    def _run(self) -> None:
        last: dict[str, tuple[int, int]] = {}
        while not self._ended.wait(0.02):
            vectors, answers = self._reader.get_many(self._users)
            assert vectors.shape[0] == len(answers) == len(self._users)
            self.calls += 1
            for answer in answers:
                self.reasons[answer.reason] += 1
                if answer.reason in UNREAD:
                    continue
                if answer.reason == "missing":
                    self.gone[answer.user_id] += answer.user_id in last
                    continue
                order = (answer.epoch or 0, answer.revision or 0)
                self.back[answer.user_id] += order < last.get(answer.user_id, order)
                last[answer.user_id] = order


def away(cluster: RedisCluster) -> None:
    cluster.servers[1].pause()
    time.sleep(4)
    cluster.servers[1].resume()


def restarted_empty(cluster: RedisCluster) -> None:
    cluster.servers[1].kill()
    time.sleep(1)
    cluster.servers[1].start()


def failed_over(cluster: RedisCluster) -> None:
    cluster.servers[1].kill()


def resharded(cluster: RedisCluster) -> None:
    cluster.reshard(0, 1, 800)


@pytest.mark.parametrize("fault", [away, restarted_empty, pytest.param(failed_over, marks=pytest.mark.slow), resharded])
def test_a_cluster_with_a_fault(
    fault: Callable[[RedisCluster], None],
    films: Dataset,
    make_cluster: Callable[..., RedisCluster],
    make_pipeline: Callable[..., Pipeline],
) -> None:
    rows = films.events[:EVENTS]
    users = sorted({row.user_id for row in rows})
    cluster = make_cluster(3, 3 if fault is failed_over else 0)
    pipeline = make_pipeline(kv_url=cluster.url)
    pipeline.start()
    pipeline.until_ready()
    with Prober(cluster, users) as prober:
        with feeding(pipeline, rows, RATE) as thread:
            pipeline.until(lambda: len(pipeline.read(pipeline.output)) > 1_000, "events flow")
            assert thread.is_alive(), "all events were sent before the fault"
            fault(cluster)
        pipeline.until_committed(120)
        pipeline.until(lambda: all(pipeline.epochs()), "all partitions are whole")
    log = pipeline.log.read_text()
    assert "Traceback" not in log
    assert sum("claimed epoch" in line for line in log.splitlines()) == pipeline.partitions, "there was a rebalance"
    assert ("rebuilt" in log) == (fault in (restarted_empty, failed_over)), pipeline.tail()
    if fault in (restarted_empty, failed_over):  # one that hangs for less than a write waits is only slow
        assert "nothing is committed meanwhile" in log, "the fault did not fire"
    assert bool(prober.reasons.keys() & UNREAD) == (fault is not resharded), prober.reasons
    assert prober.calls > 20
    assert prober.reasons[""] > len(users)
    if fault in (away, resharded):
        assert not +prober.back
        assert not +prober.gone
    pipeline.check(len(users))
    assert pipeline.stop() == 0
