"""The cold edge (seed §6): what a request's history gives is what the worker publishes for the same history."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reader_store import FakeStore
from strategies import TYPES, Driver, Event, arrivals, examples, make_space, small_spaces, streams

from stream.core.encoders import AvgEncoder, MixEncoder, TimeMixEncoder, VersionedEncoder
from stream.core.history import History, HistoryCodec
from stream.core.records import EmbeddingRecord, encode
from stream.items.space import ItemSpace
from stream.keys import encoder_key, fallback_key
from stream.kv.protocol import Meta, Serving
from stream.retrieval.answers import UserEmbedding
from stream.retrieval.reader import EmbeddingReader, get_or_build_user_embedding

CODEC = HistoryCodec(TYPES)
USERS = ("u", 7)
WEIGHTS: dict[str, float] = {"like": 2.5}

encoders = st.builds(
    VersionedEncoder,
    st.sampled_from([MixEncoder(), AvgEncoder(decay=0.2), MixEncoder(type_weights=WEIGHTS), TimeMixEncoder()]),
    st.sampled_from([2, 5, 100]),
    st.sampled_from([None, "user_v7"]),
)


def store_of(encoder: VersionedEncoder, space: ItemSpace) -> FakeStore:
    """An empty store that serves the pair."""
    own = EmbeddingRecord(
        user_id="fallback",
        epoch=0,
        revision=0,
        status="fallback",
        reason="",
        history_len=0,
        unknown_items=0,
        as_of=None,
        user_embedding_version=encoder.version,
        item_embedding_version=space.version,
        vector=space.fallback,
        norm=1.0,
    )
    return FakeStore(
        Meta(
            "app",
            1,
            Serving(encoder.version, space.version, 0),
            {fallback_key(space.version, encoder.version): encode(own)},
            {encoder_key(encoder.version): encoder.hash},
        )
    )


def build(fake: FakeStore, user: object, pair: tuple[str, str], **parts: Any) -> UserEmbedding:
    """Ask for a pair: item version, user version."""
    fake.broken = set()  # the last reader closed it
    with EmbeddingReader(lambda: fake, timeout_s=5) as reader:
        return get_or_build_user_embedding(user, *pair, reader=reader, **parts)  # type: ignore[arg-type]


@settings(max_examples=examples(150))
@given(st.data(), streams(users=USERS), small_spaces(), encoders)
def test_a_history_gives_what_the_worker_publishes(
    data: st.DataObject, operations: list[Any], space: ItemSpace, encoder: VersionedEncoder
) -> None:
    driver = Driver([space], encoder)
    driver.run(data.draw(arrivals(operations)))
    fake = store_of(encoder, space)
    for user, stored in driver.states.items():
        interactions = History.decode(stored, CODEC, encoder.history_limit).interactions()
        if not interactions:
            continue
        want: Any = driver.record(user.decode())
        answer = build(
            fake,
            user.decode(),
            (space.version, encoder.version),
            history=[item for _, item, _ in interactions],
            history_types=[kind for _, _, kind in interactions],
            history_ts=[at for at, _, _ in interactions],
            items=space,
            encoder=encoder,
        )
        np.testing.assert_allclose(answer.vector, want.vector, rtol=0, atol=1e-6)
        for name in ("status", "reason", "history_len", "unknown_items"):
            assert getattr(answer, name) == getattr(want, name), name
        assert (answer.user_embedding_version, answer.item_embedding_version) == (encoder.version, space.version)
    assert fake.entries == {}, "never written back"


#: What a caller may pass by mistake.
anything = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=5),
    st.binary(max_size=5),
    st.lists(st.one_of(st.integers(), st.text(st.characters(), max_size=3), st.none(), st.floats()), max_size=5),
)


@settings(max_examples=examples(150))
@given(small_spaces(), encoders, anything, anything, anything, st.booleans())
def test_it_never_raises_and_always_gives_a_unit_vector(
    space: ItemSpace, encoder: VersionedEncoder, user: object, history: object, types: object, whole: bool
) -> None:
    fake = store_of(encoder, space)
    parts = {"items": space, "encoder": encoder} if whole else {"items": history, "encoder": types}
    answer = build(fake, user, (space.version, encoder.version), history=history, history_types=types, **parts)
    assert answer.vector.shape == (space.dim,)
    assert answer.vector.dtype == np.float32
    assert abs(float(np.linalg.norm(answer.vector.astype(np.float64))) - 1) <= 1e-5
    assert (answer.status == "ok") == (answer.reason == "")
    assert (answer.item_embedding_version, fake.entries) == (space.version, {})


def test_types_of_another_length_are_a_mistake_and_no_vector() -> None:
    driver = Driver([(space := _space())], VersionedEncoder(MixEncoder(type_weights=WEIGHTS)))
    fake = store_of(driver.encoder, space)
    history, pair = ["a", "b", 3], (space.version, driver.encoder.version)
    for types in (["like"] * 2, ["like"] * 4, []):
        answer = build(fake, 7, pair, history=history, history_types=types, items=space, encoder=driver.encoder)
        assert answer.reason == "missing"


@pytest.mark.parametrize("times", [None, [], [1, 2], [1, 2, 3, 4]])
def test_an_encoder_that_goes_by_time_makes_no_vector_without_the_times(times: list[int] | None) -> None:
    encoder, space = VersionedEncoder(TimeMixEncoder()), _space()
    fake, parts = store_of(encoder, space), {"history": ["a", "b", 3], "items": space, "encoder": encoder}
    assert build(fake, 7, (space.version, encoder.version), history_ts=times, **parts).reason == "missing"
    assert build(fake, 7, (space.version, encoder.version), history_ts=[1, 2, 3], **parts).status == "ok"


def test_a_stored_vector_wins_over_any_history() -> None:
    driver = Driver([(space := _space())], VersionedEncoder())
    driver.apply(Event(7, "a", "view", 1_700_000_000_000), Event(7, "b", "view", 1_700_000_060_000))
    fake = store_of(driver.encoder, space)
    fake.entries |= driver.kv
    parts = {"history": [3, 3, 3], "items": space, "encoder": driver.encoder}
    answer = build(fake, 7, (space.version, driver.encoder.version), **parts)
    want: Any = driver.record(7)
    assert (answer.status, answer.revision, answer.history_len) == ("ok", want.revision, 2)
    np.testing.assert_array_equal(answer.vector, want.vector)


def _space() -> ItemSpace:
    return make_space("items_v1", ["a", "b", 3], np.eye(3) + 0.1)
