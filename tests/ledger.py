"""Holds what an engine publishes against the oracle, after every event and at the end."""

import numpy as np
from oracle import check_record
from strategies import TYPES, Erase, message

from stream.core.history import History
from stream.core.history_codec import NEVER, HistoryCodec
from stream.core.records import decode

CODEC = HistoryCodec(TYPES)


class Ledger:
    """What each revision of each user must be published as."""

    def __init__(self, oracle, spaces):
        self.oracle = oracle
        self.spaces = spaces
        self.revisions = {}
        self.want = {}

    def fold(self, operation):
        oracle, user = self.oracle, str(operation.user)
        before = oracle.history(user), oracle.erased_at.get(user)
        if isinstance(operation, Erase):
            oracle.erase(user, operation.ts)
        else:
            oracle.event(*operation)
        if before != (oracle.history(user), oracle.erased_at.get(user)):
            revision = self.revisions[user] = self.revisions.get(user, 0) + 1
            for space in self.spaces:
                self.want[space.version, user, revision] = oracle.expected(user, space.version)
            return user, revision
        return None

    def check(self, result, changes):
        """Every change is published, in order, each as the oracle says; what is sent again is the present state."""
        published = {}
        for key, value in result.output:
            _, _, version, user = key.decode().split(":", 3)
            record = None if value is None else decode(value)
            if record is not None:
                check_record(record, self.want[version, user, record.revision], (version, user, record.revision))
            published.setdefault(version, []).append((user, record and record.revision))
        for space in self.spaces:
            want = [(user, self.want[space.version, user, r] and r) for user, r in changes]
            got, changed = published.get(space.version, []), {user for user, _ in changes}
            assert [what for what in got if what[0] in changed] == want
            again = [what for what in got if what[0] not in changed]
            assert len({user for user, _ in again}) == len(again)
            for user, revision in again:
                current = self.revisions[user]
                assert revision == (self.want[space.version, user, current] and current)


def check_every_event(driver, oracle, batches):
    ledger = Ledger(oracle, driver.spaces)
    for topic, operations in batches:
        changes = [change for operation in operations if (change := ledger.fold(operation))]
        ledger.check(driver.feed(topic, [message(operation) for operation in operations]), changes)
    check_end(driver, oracle)


def check_end(driver, oracle):
    """Store, topic and stored history of every user are what the oracle says."""
    for user in oracle.users():
        for space in driver.spaces:
            index = driver.spaces.index(space)
            want = oracle.expected(user, space.version)
            record = driver.record(user, index)
            if want is None:
                assert record is None
                assert driver.topic.get(driver.key(user, index)) is None
                continue
            check_record(record, want, user)
            assert record.user_embedding_version == driver.encoder.version
            assert record.vector.dtype == np.float32
            assert abs(float(np.linalg.norm(record.vector.astype(np.float64))) - 1) <= 1e-5
    for user, stored in driver.states.items():
        history = History.decode(stored, CODEC, driver.encoder.history_limit)
        assert [tuple(i) for i in history.interactions()] == oracle.history(user.decode())
        assert history.erased_at == oracle.erased_at.get(user.decode(), NEVER)
