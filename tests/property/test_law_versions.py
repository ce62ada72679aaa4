"""Law 4: spaces never mix; a name is bound to whatever decides a vector."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Driver,
    arrivals,
    message,
    random_space,
    streams,
)

from stream.core.encoders import AvgEncoder, MixEncoder, VersionedEncoder, encoder_hash, make_encoder, user_version
from stream.core.records import decode
from stream.core.space_engine import fallback_record


def contract_version(encoder, params, type_weights, limit):
    description = {"encoder": encoder, "params": params, "type_weights": type_weights, "L": limit}
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"{encoder}-{hashlib.sha256(text.encode('utf-8')).hexdigest()[:8]}"


def test_default_versions_are_the_contracts_formula():
    mix = {"alpha_short": 0.6, "decay_long": 0.01, "decay_short": 0.15}
    assert user_version(MixEncoder(), 100) == contract_version("mix", mix, {}, 100)
    assert user_version(AvgEncoder(), 100) == contract_version("avg", {"decay": 0.05}, {}, 100)
    assert VersionedEncoder().version == contract_version("mix", mix, {}, 100)
    text = (
        '{"L":100,"encoder":"mix","params":{"alpha_short":0.6,"decay_long":0.01,"decay_short":0.15},"type_weights":{}}'
    )
    assert encoder_hash(MixEncoder(), 100) == hashlib.sha256(text.encode()).hexdigest()


numbers = st.floats(0, 1, allow_subnormal=False).map(abs)
weights = st.dictionaries(st.sampled_from(["view", "like", "achat", "köp"]), st.sampled_from([0.5, 1.0, 1, 2, 2.0]))


@given(st.tuples(numbers, numbers, numbers), weights, st.integers(2, 1000))
def test_versions_follow_the_formula_for_all_parameters(values, type_weights, limit):
    params = dict(zip(("alpha_short", "decay_long", "decay_short"), map(float, values), strict=True))
    listed = {name: float(weight) for name, weight in type_weights.items() if weight != 1.0}
    encoder = make_encoder("mix", params, type_weights)
    assert user_version(encoder, limit) == contract_version("mix", params, listed, limit)


def test_a_parameter_given_as_an_integer_is_the_same_parameter():
    assert user_version(make_encoder("avg", {"decay": 1}, {}), 100) == contract_version("avg", {"decay": 1.0}, {}, 100)
    assert user_version(AvgEncoder(np.float64(0.05)), 100) == user_version(AvgEncoder(), 100)
    spelled_out = make_encoder("mix", {"alpha_short": 0.6, "decay_long": 0.01, "decay_short": 0.15}, {"view": 1})
    assert user_version(spelled_out, 100) == user_version(MixEncoder(), 100)


def test_whatever_decides_a_vector_is_in_the_name():
    versions = [
        user_version(encoder, limit)
        for encoder in [
            AvgEncoder(),
            AvgEncoder(0.06),
            MixEncoder(),
            MixEncoder(alpha_short=0.5),
            MixEncoder(decay_long=0.02),
            MixEncoder(decay_short=0.2),
            MixEncoder(type_weights={"like": 2.0}),
            MixEncoder(type_weights={"like": 3.0}),
            MixEncoder(type_weights={"view": 2.0}),
            MixEncoder(type_weights={"view": 2.0, "like": 2.0}),
        ]
        for limit in (2, 99, 100)
    ]
    assert len(set(versions)) == len(versions)


def test_an_alias_replaces_the_name_and_not_the_hash():
    plain, named = VersionedEncoder(), VersionedEncoder(alias="user_v7")
    assert named.version == "user_v7"
    assert named.hash == plain.hash
    assert plain.version == f"mix-{plain.hash[:8]}"
    assert VersionedEncoder(AvgEncoder(), alias="user_v7").hash != named.hash


@pytest.mark.parametrize(
    "alias", ["fallback", "encoder", "epoch", "watermark", "app", "current", "a:b", "a b", "x" * 65, "é", "a\n"]
)
def test_an_alias_must_be_a_version_name(alias):
    with pytest.raises(ValueError, match="version name"):
        _ = VersionedEncoder(alias=alias).version


@pytest.mark.parametrize(
    ("name", "params", "type_weights"),
    [
        ("sum", {}, {}),
        ("avg", {"alpha_short": 0.5}, {}),
        ("mix", {"decay": 0.5}, {}),
        ("mix", {"name": 0.5}, {}),
        ("mix", {"type_weights": 0.5}, {}),
        ("mix", {"alpha_short": 1.5}, {}),
        ("mix", {"alpha_short": -0.1}, {}),
        ("mix", {"decay_long": float("nan")}, {}),
        ("mix", {"decay_short": float("inf")}, {}),
        ("avg", {"decay": -1.0}, {}),
        ("avg", {}, {"like": 0.0}),
        ("avg", {}, {"like": -1.0}),
        ("avg", {}, {"like": float("nan")}),
    ],
)
def test_encoders_refuse_what_they_are_not_made_for(name, params, type_weights):
    with pytest.raises(ValueError, match=r"encoder|weights"):
        make_encoder(name, params, type_weights)


@given(st.data(), streams(max_size=12))
def test_every_record_names_the_pair_it_was_made_from(data, stream):
    spaces = [random_space("items_v1", 2, known=("a", "b")), random_space("items_v2", 3, known=("a", 3), seed=1)]
    driver = Driver(spaces, VersionedEncoder(alias="user_v7"))
    for topic, operations in data.draw(arrivals(stream)):
        for key, value in driver.feed(topic, [message(operation) for operation in operations]).output:
            _, user_v, item_v, user = key.decode().split(":", 3)
            assert user_v == "user_v7"
            if value is not None:
                record = decode(value)
                assert (record.user_embedding_version, record.item_embedding_version) == (user_v, item_v)
                assert record.user_id == user
                assert len(record.vector) == {"items_v1": 2, "items_v2": 3}[item_v]


def test_the_fallback_record_carries_the_pair_too():
    space = random_space("items_v1", 4)
    record = fallback_record(space, VersionedEncoder(alias="user_v7"))
    assert (record.user_embedding_version, record.item_embedding_version) == ("user_v7", "items_v1")
    assert record.status == "fallback"
    assert record.vector.tobytes() == space.fallback.tobytes()
    assert abs(record.norm - 1) <= 1e-5
