"""Traffic as it comes: doubled, out of order, hours late, early, from the future, and a fifth of it malformed."""

import random
import shutil
from collections.abc import Callable

from odd_records import APPLIED, KINDS, MINUTE_MS, NOW_MS, REFUSED, UNSEEN, Sender, event
from pipeline import Pipeline, event_json, seed

from stream.feed.dataset import Dataset
from stream.keys import partition_of

EVENTS = 8_000
LARGEST = 10_000  # bytes of a bad value; larger ones have tests of their own


def test_traffic_of_all_kinds_with_a_kill_in_the_middle(films: Dataset, make_pipeline: Callable[..., Pipeline]) -> None:
    rng = random.Random(seed())
    pipeline = make_pipeline()
    rows = films.events[:EVENTS]
    kinds = [
        kind
        for kind in KINDS.values()
        if kind.on_events not in (APPLIED, UNSEEN, REFUSED)
        and (kind.value is None or (isinstance(kind.value, bytes) and len(kind.value) < LARGEST))
    ]
    good = [(row.type, row.user_id.encode(), event_json(*row[:4])) for row in rows]
    late = [message for message in good if rng.random() < 0.05]  # hours after those around them
    doubled = [message for message in good if rng.random() < 0.2 for _ in range(rng.randrange(1, 3))]
    # early and late as against the time that the sender's records carry, which is that of the run's start
    early = [
        ("view", row.user_id.encode(), event_json(row.user_id, row.item_id, "view", NOW_MS + 3 * MINUTE_MS))
        for row in rows[::500]
    ]
    first = [message for message in good if message not in set(late)]
    for start in range(0, len(first), 400):  # out of order, but for the files that producers would send
        some = first[start : start + 400]
        rng.shuffle(some)
        first[start : start + 400] = some
    rest = [*doubled, *late, *early]
    rng.shuffle(rest)
    traffic = [*first, *rest]
    sender = Sender(pipeline.bootstrap)
    pipeline.start()
    pipeline.until_ready()
    bad = 0

    def send(messages: list[tuple[str, bytes, bytes]]) -> None:
        nonlocal bad
        for topic, user, value in messages:
            sender.send(pipeline.topics[topic], user, value)
            if rng.random() < 0.25:  # a fifth of all
                bad += 1
                if rng.random() < 0.1:
                    future = event(user_id=user.decode(), ts=NOW_MS + 60 * MINUTE_MS)
                    sender.send(pipeline.topics["view"], user, future, name=f"bad-{bad}")
                else:
                    kind = rng.choice(kinds)
                    assert not callable(kind.value)
                    topic = rng.choice(list(pipeline.topics.values()))
                    sender.send(topic, kind.key, kind.value, kind.partition, f"bad-{bad}", kind.how)
        sender.flush()
        # No partition may end in the marker of a transaction, which no commit ever covers.
        plain = {(topic, partition_of(user, pipeline.partitions)): (user, value) for topic, user, value in messages}
        for (topic, _), (user, value) in plain.items():
            sender.send(pipeline.topics[topic], user, value)
        sender.flush()

    half, more = len(traffic) // 2, 3 * len(traffic) // 4
    send(traffic[:half])
    pipeline.until(lambda: pipeline.length(pipeline.output) > 500, "events flow")
    pipeline.freeze()  # so that there is something left to do
    send(traffic[half:more])
    pipeline.kill()
    shutil.rmtree(pipeline.state)
    assert pipeline.lag() > 0, "all was done before the kill"
    pipeline.start()
    send(traffic[more:])
    pipeline.until_committed(120)
    sent = {(at.topic, at.partition, at.offset) for name, at in sender.sent.items() if name}
    assert 0.15 * len(traffic) < bad < 0.35 * len(traffic)
    assert len(sent) == bad
    letters = [dict(letter.headers()) for letter in pipeline.read(pipeline.dlq)]
    places = {(h["dlq.topic"].decode(), int(h["dlq.partition"]), int(h["dlq.offset"])) for h in letters}
    assert places == sent
    report = pipeline.check(len({row.user_id for row in rows}))
    assert (report["rejected"], report["letterless"]) == (bad, 0)
    assert pipeline.stop() == 0
