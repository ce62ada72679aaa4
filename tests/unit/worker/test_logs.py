"""The worker's log: readable beside a client that repeats itself."""

import logging

from stream.logs import REPEAT_S, NotAgain


def test_what_the_kafka_client_repeats_is_written_once_in_a_while() -> None:
    now_s = [100.0]
    log = NotAgain(lambda: now_s[0])

    def written(name: str, topic: str) -> bool:
        return log.filter(logging.LogRecord(name, logging.ERROR, "", 0, "no topic %s", (topic,), None))

    assert [written("aiokafka.cluster", "a") for _ in range(3)] == [True, False, False]
    assert written("aiokafka.cluster", "b"), "other news are held back"
    assert [written("stream.worker.app", "a") for _ in range(2)] == [True, True], "what others say is held back"
    now_s[0] += REPEAT_S
    assert written("aiokafka.cluster", "a")


def test_what_is_remembered_is_bounded() -> None:
    log = NotAgain(lambda: 0.0)
    for n in range(2_000):
        assert log.filter(logging.LogRecord("aiokafka", logging.ERROR, "", 0, "node %s", (n,), None))
    assert len(log._said) < 1_000
