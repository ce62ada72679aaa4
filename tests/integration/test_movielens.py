"""The main job on real input: 100,000 MovieLens events, every user's end state against the reference."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition
from pipeline import Pipeline, check_end_state, expected, feeding

from stream.config import load_settings
from stream.feed.dataset import Dataset
from stream.feed.sender import Feeder
from stream.items.space import ItemSpace
from stream.kafka.embedded_broker import DevBroker

USER_VERSION = load_settings().versioned_encoder.version


def test_every_user_on_real_kafka(films: Dataset, space: ItemSpace, make_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    with Feeder(pipeline.bootstrap, pipeline.topics) as feeder:
        assert feeder.send(films.events).sent == 100_000
    pipeline.until_committed()
    check_end_state(pipeline, expected(films.events, space), space, USER_VERSION)
    assert pipeline.read(pipeline.dlq) == []
    assert pipeline.stop() == 0


@pytest.mark.slow
def test_stopped_in_the_middle_and_started_again(
    films: Dataset, space: ItemSpace, make_pipeline: Callable[..., Pipeline]
) -> None:
    pipeline = make_pipeline()
    pipeline.start()
    pipeline.until_ready()
    first_epochs = pipeline.epochs()
    with feeding(pipeline, films.events, rate=20_000):
        pipeline.until(lambda: pipeline.length(pipeline.output) > 10_000, "the middle")
        assert pipeline.stop() == 0
    assert 0 < pipeline.lag() < len(films.events)
    pipeline.start()
    pipeline.until_ready()
    assert _all_higher(pipeline.epochs(), first_epochs)
    pipeline.until_committed()
    check_end_state(pipeline, expected(films.events, space), space, USER_VERSION)
    assert pipeline.read(pipeline.dlq) == []
    assert pipeline.stop() == 0


@pytest.mark.slow
def test_a_worker_joins_and_another_leaves_while_events_flow(
    films: Dataset, space: ItemSpace, make_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    first = make_pipeline()
    first.start()
    first.until_ready()
    epochs = [first.epochs()]
    second = make_pipeline(state_dir=tmp_path / "second")
    second.log = tmp_path / "second.log"
    with feeding(first, films.events, 4_000) as feeder:
        first.until(lambda: first.length(first.output) > 10_000, "events flow")
        second.start()
        first.until(lambda: _all_higher(first.epochs(), epochs[-1]), "the second has joined")
        epochs.append(first.epochs())
        assert first.stop() == 0
        assert feeder.is_alive(), "all events were sent before the first left"
        second.until(lambda: _all_higher(second.epochs(), epochs[-1]), "the second owns all")
    second.until_committed()
    check_end_state(second, expected(films.events, space), space, USER_VERSION)
    assert second.read(second.dlq) == []
    assert second.stop() == 0


def _all_higher(new: list[int], old: list[int]) -> bool:
    return all(n > o for n, o in zip(new, old, strict=True))


@pytest.mark.slow
def test_every_user_on_the_embedded_broker(
    films: Dataset, space: ItemSpace, unique: str, tmp_path: Path, item_folder: Path
) -> None:
    with DevBroker() as broker:
        # this broker lets a group wait 3 s for its members, so a session must last longer
        pipeline = Pipeline(broker.bootstrap, unique, tmp_path, item_folder, session_timeout_s=10)
        pipeline.start()
        try:
            pipeline.until_ready()
            tail = Tail(pipeline)
            with tail, Feeder(broker.bootstrap, pipeline.topics) as feeder:
                # the broker keeps 5 MB a partition: wait for the worker as well as for the tail
                pace = lambda: 10_000 - max(pipeline.lag(), tail.lag())  # noqa: E731
                assert feeder.send(films.events, pace=pace).sent == 100_000
                pipeline.until_committed()
                pipeline.until(lambda: tail.lag() == 0, "the tail has read all output")
            # one record per applied event; what arrives later than 100 newer events of its user is not applied
            assert 90_000 < tail.records <= 100_000
            check_end_state(pipeline, expected(films.events, space), space, USER_VERSION, tail.last)
            assert pipeline.read(pipeline.dlq) == []
            assert pipeline.stop() == 0
        finally:
            pipeline.close()


class Tail:
    """Folds the output topic while it is written."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.last: dict[str, bytes | None] = {}
        self.records = 0
        self._next = dict.fromkeys(range(pipeline.partitions), 0)
        self._places = [TopicPartition(pipeline.output, p, 0) for p in self._next]
        self._stop = threading.Event()
        config = {"bootstrap.servers": pipeline.bootstrap, "group.id": "tail", "log_level": 2}
        self._reader, self._asker = Consumer(config), Consumer(config)
        self._reader.assign(self._places)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Tail":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._reader.close()
        self._asker.close()

    def lag(self) -> int:
        """Records not folded yet."""
        ends = [self._asker.get_watermark_offsets(place, timeout=60)[1] for place in self._places]
        return sum(end - self._next[place.partition] for end, place in zip(ends, self._places, strict=True))

    def _run(self) -> None:
        while not self._stop.is_set():
            for message in self._reader.consume(1000, timeout=0.1):
                assert message.error() is None, message.error()
                assert message.offset() == self._next[message.partition()], "the broker dropped unread output"
                self._next[message.partition()] = message.offset() + 1
                self.last[message.key().decode()] = message.value()
                self.records += 1
