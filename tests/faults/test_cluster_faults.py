"""A cluster under load, of which one server is away, comes back empty, fails over, or gives slots away."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import cycle

import pytest
from pipeline import Pipeline, feeding
from prober import Prober
from redis_cluster import SLOTS, RedisCluster

from stream.config import load_settings
from stream.feed.dataset import Dataset
from stream.items.space import ItemSpace
from stream.keys import user_cache_key
from stream.kv import lookups
from stream.kv.redis.slots import slot_of
from stream.retrieval.answers import UserEmbedding
from stream.retrieval.reader import EmbeddingReader

USER_VERSION = load_settings().versioned_encoder.version

EVENTS = 9_000
RATE = 1_500
#: The server that fails.
HIT = 1
#: Reasons of an answer that was not read; what the store said is another matter.
UNREAD = {"store_down", "timeout"}
STORED = {"", "too_short_history", "no_known_items", "missing"}


class ClusterProber(Prober):
    """Asks a reader for the same users all the while, together and one by one, and keeps what each answer said.

    Attributes:
        looks: at all users together.
        hit: users whose vectors are on the server that fails.
        reasons: of all answers.
        back: users whose ``(epoch, revision)`` went back.
        gone: users who went missing.
        apart: looks at all in which the failing server's users were unread, and all others read.
        apart_singly: the same of one user of each, asked for by themselves.
    """

    def __init__(self, cluster: RedisCluster, users: Sequence[str], versions: tuple[str, str]) -> None:
        super().__init__()
        self._reader = EmbeddingReader.open(cluster.url, timeout_s=0.5)
        self._users = users
        self.hit = {user for user in users if slot_of(user_cache_key(user, *versions)) * 3 // SLOTS == HIT}
        self._pairs = cycle(zip(cycle(sorted(self.hit)), sorted(set(users) - self.hit), strict=False))
        self._last: dict[str, tuple[int, int]] = {}
        self.apart = self.apart_singly = 0
        self.reasons = Counter[str]()
        self.back, self.gone = set[str](), set[str]()

    def close(self) -> None:
        """See `Prober`."""
        self._reader.close()

    def look(self) -> None:
        """See `Prober`."""
        vectors, answers = self._reader.get_many(self._users)
        assert vectors.shape[0] == len(answers) == len(self._users)
        self.looks += 1
        self.apart += self._unread(answers) == self.hit
        hit, other = next(self._pairs)
        self.apart_singly += self._unread([self._reader.get(hit), self._reader.get(other)]) == {hit}
        for answer in answers:
            if answer.reason in UNREAD:
                continue
            if answer.reason == "missing":
                self.gone |= {answer.user_id} & self._last.keys()
                continue
            order = (answer.epoch or 0, answer.revision or 0)
            if order < self._last.get(answer.user_id, order):
                self.back.add(answer.user_id)
            self._last[answer.user_id] = order

    def _unread(self, answers: Sequence[UserEmbedding]) -> set[str]:
        self.reasons.update(answer.reason for answer in answers)
        return {answer.user_id for answer in answers if answer.reason in UNREAD}


def away(cluster: RedisCluster) -> None:
    cluster.servers[HIT].pause()
    time.sleep(4)
    cluster.servers[HIT].resume()


def restarted_empty(cluster: RedisCluster) -> None:
    cluster.servers[HIT].kill()
    time.sleep(1)
    cluster.servers[HIT].start()


def failed_over(cluster: RedisCluster) -> None:
    cluster.servers[HIT].kill()


def resharded(cluster: RedisCluster) -> None:
    cluster.reshard(0, HIT, 800)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [away, restarted_empty, failed_over, resharded])
def test_a_cluster_with_a_fault(
    fault: Callable[[RedisCluster], None],
    films: Dataset,
    space: ItemSpace,
    make_cluster: Callable[..., RedisCluster],
    make_pipeline: Callable[..., Pipeline],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = films.events[:EVENTS]
    users = sorted({row.user_id for row in rows})
    cluster = make_cluster(3, 3 if fault is failed_over else 0)
    pipeline = make_pipeline(kv_url=cluster.url, session_timeout_s=10)
    pipeline.start()
    pipeline.until_ready()
    with ClusterProber(cluster, users, (space.version, USER_VERSION)) as prober:
        with feeding(pipeline, rows, RATE):
            pipeline.until(lambda: pipeline.length(pipeline.output) > 1_000, "events flow")
            fault(cluster)
        pipeline.until_committed(120)
        pipeline.until(lambda: all(pipeline.epochs()), "all partitions are whole")
    log = pipeline.log.read_text()
    assert "Traceback" not in log
    assert sum("claimed epoch" in line for line in log.splitlines()) == pipeline.partitions, "there was a rebalance"
    assert ("rebuilt" in log) == (fault in (restarted_empty, failed_over)), pipeline.tail()
    if fault in (restarted_empty, failed_over):  # one that hangs for less than a write waits is only slow
        assert "nothing is committed meanwhile" in log, "the fault did not fire"
    assert prober.reasons.keys() <= UNREAD | STORED, prober.reasons
    failures = [record.getMessage() for record in caplog.records if record.name == lookups.__name__]
    if fault is resharded:  # a server may be slow meanwhile, on a busy machine; redirections are followed all the same
        assert all("did not answer in time" in said for said in failures), failures
    else:
        assert failures
        assert prober.reasons.keys() & UNREAD, prober.reasons
        # who is on a server that lives is read while the others are not
        assert min(prober.apart, prober.apart_singly) > 5, prober.reasons
    assert prober.looks > 20
    assert prober.reasons[""] > len(users)
    assert prober.back | prober.gone <= (set() if fault in (away, resharded) else prober.hit)
    pipeline.check(len(users))
    assert pipeline.stop() == 0
