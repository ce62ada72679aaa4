"""Law 2 for weights that halve with time, and for several encoders side by side on one stream."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger import check_every_event
from oracle import Oracle, check_record
from strategies import Driver, arrivals, random_chunks, random_space, random_stream, small_spaces, streams

from stream.core.encoders import AvgEncoder, MixEncoder, TimeMixEncoder, VersionedEncoder, make_encoder
from stream.core.space_engine import Pair
from stream.records import decode

SECOND_H = 1 / 3600
HALF_LIVES = [(720.0, 24.0), (1.0, SECOND_H), (1e6, 10 * SECOND_H)]


def by_time(long_h: float, short_h: float, **options: object) -> TimeMixEncoder:
    return TimeMixEncoder(half_life_long_h=long_h, half_life_short_h=short_h, **options)


@given(st.data(), streams(), st.sampled_from([2, 3, 100]), st.sampled_from(HALF_LIVES), st.booleans())
def test_every_state_of_a_small_stream_equals_the_formula(data, stream, limit, half_lives, weighted) -> None:
    space, weights = data.draw(small_spaces()), {"like": 3.0} if weighted else {}
    encoder = VersionedEncoder(by_time(*half_lives, type_weights=weights), limit)
    driver = Driver([space], encoder, hot_users=data.draw(st.integers(1, 3)))
    oracle = Oracle(limit, [space], half_lives_h=half_lives, type_weights=weights)
    check_every_event(driver, oracle, data.draw(arrivals(stream)))


@pytest.mark.parametrize("hot_users", [1, 10_000])
@pytest.mark.parametrize("mean", [1, 6, 200])
@pytest.mark.parametrize("limit", [2, 6, 100])
def test_every_state_equals_the_formula(limit: int, mean: int, hot_users: int) -> None:
    rng = random.Random(limit * 1_000 + mean)
    space = random_space("items_v1", 8, metric="dot")
    stream = random_stream(rng, 300, users=2, late=0.2, erasures=0.01)
    driver = Driver([space], VersionedEncoder(by_time(24.0, 0.5), limit), hot_users=hot_users)
    check_every_event(driver, Oracle(limit, [space], half_lives_h=(24.0, 0.5)), random_chunks(rng, stream, mean))


def test_the_order_of_arrival_is_nothing_to_it() -> None:
    rng = random.Random(3)
    space = random_space("items_v1", 8)
    stream = random_stream(rng, 400, users=3)
    found = []
    for _ in range(3):
        rng.shuffle(stream)
        driver = Driver([space], VersionedEncoder(by_time(24.0, 0.5), 1_000))
        driver.run(random_chunks(rng, stream, 5))
        found.append({key: decode(entry[16:]).vector for key, entry in driver.kv.items() if len(entry) > 16})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, vector in other.items():
            np.testing.assert_allclose(vector, found[0][key], rtol=0, atol=1e-6)


def test_a_history_by_hand_equals_the_formula_and_needs_the_times() -> None:
    space, oracle = random_space("items_v1", 4), Oracle(5, [random_space("items_v1", 4)], half_lives_h=(2.0, 1.0))
    encoder = VersionedEncoder(by_time(2.0, 1.0), 5)
    for n in range(9):
        oracle.event("u", n * 7 % 40, "view", 1_700_000_000_000 + n * n * 100_000)
        history = oracle.history("u")
        times = [at for at, _, _ in history]
        vector, _, unknown = encoder.embed(space, [item for _, item, _ in history], times_ms=times)
        want = oracle.expected("u")
        assert want is not None
        assert unknown == want["unknown_items"]
        np.testing.assert_allclose(vector, want["vector"], atol=1e-6)
    with pytest.raises(ValueError, match="goes by time; give the times"):
        encoder.embed(space, [1, 2, 3])


@pytest.mark.parametrize("params", [{"half_life_long_h": 0.0}, {"half_life_short_h": 1e-9}, {"half_life_long_h": 1e12}])
def test_half_lives_that_no_float_can_follow_are_refused(params) -> None:
    with pytest.raises(ValueError, match="half-life"):
        make_encoder("mix_time", params, {})


# -- side by side -------------------------------------------------------------------------------------------------

SIDE_BY_SIDE = {
    "mix": MixEncoder(type_weights={"like": 3.0}),
    "avg": AvgEncoder(0.3),
    "decays": MixEncoder(0.5, 0.02, 0.3),
    "time": by_time(24.0, 0.5, type_weights={"like": 3.0}),
}


@given(st.data(), streams(), st.sampled_from([2, 3, 100]))
def test_encoders_side_by_side_each_publish_what_they_would_alone(data, stream, limit) -> None:
    """All but the first join midway, and are shown to all users once, as a backfill does; all but one leave again."""
    space = random_space("items_v1", 2, known=("a", "b", 3))
    encoders = {name: VersionedEncoder(encoder, limit) for name, encoder in SIDE_BY_SIDE.items()}
    batches = data.draw(arrivals(stream))
    joins, leaves = sorted(data.draw(st.tuples(*2 * [st.integers(0, len(batches))])))
    driver = Driver([space], encoders["mix"], hot_users=data.draw(st.integers(1, 3)))
    driver.run(batches[:joins])
    driver.engine.serve([Pair(encoder, space) for encoder in encoders.values()])
    for name in ("avg", "decays", "time"):
        result = driver.embed((encoders[name].version, space.version))
        assert not result.states
        driver.kv |= result.entries
    driver.run(batches[joins:leaves])
    stays = data.draw(st.sampled_from(sorted(encoders)))
    driver.engine.serve([Pair(encoders[stays], space)])
    driver.run(batches[leaves:])
    for name, encoder in encoders.items():
        alone = Driver([space], encoder)
        alone.run(batches if name == stays else batches[:leaves])
        for key, entry in alone.kv.items():
            check_entry(driver.kv[key], entry)
        assert len([key for key in driver.kv if key.split(b":")[1] == encoder.version.encode()]) == len(alone.kv)


def check_entry(got: bytes, want: bytes) -> None:
    assert bool(got[16:]) == bool(want[16:])
    if want[16:]:
        one = decode(want[16:])
        fields = {name: getattr(one, name) for name in ("user_id", "reason", "history_len", "as_of", "vector", "norm")}
        check_record(decode(got[16:]), fields)
