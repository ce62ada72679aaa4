"""Ids, partitioning and cache keys."""

import uuid

import pytest
from aiokafka.partitioner import murmur2 as aiokafka_murmur2
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import ids

from stream import keys
from stream.keys import canonical_id, check_version_name, murmur2, partition_of, partitions_of, user_cache_key


@given(st.binary(max_size=300))
@example(b"")
@example(b"\xff" * 7)
def test_murmur2_is_aiokafkas(data):
    assert murmur2(data) == aiokafka_murmur2(data) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "java"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_murmur2_is_javas(data, java):
    """Values of Apache Kafka's own ``UtilsTest.testMurmur2``."""
    assert murmur2(data) == java & 0xFFFFFFFF


@given(st.binary(max_size=64), st.integers(1, 1000))
def test_partitions_are_those_of_the_default_partitioners(key, n):
    assert partition_of(key, n) == (aiokafka_murmur2(key) & 0x7FFFFFFF) % n
    assert 0 <= partition_of(key, n) < n


@given(st.lists(st.binary(max_size=40) | st.binary(max_size=6), max_size=60), st.integers(1, 10_000))
def test_partitions_of_many_are_those_of_each(keys, n):
    assert partitions_of(keys, n) == [partition_of(key, n) for key in keys]


@given(ids)
def test_a_canonical_id_is_the_text(value):
    text = canonical_id(value)
    assert text == str(value)
    assert canonical_id(text) == text
    assert 1 <= len(text.encode()) <= 256


@pytest.mark.parametrize("number", [0, 5, -5, 2**63 - 1, -(2**63)])
def test_an_integer_and_its_text_are_one_id(number):
    assert canonical_id(number) == canonical_id(str(number)) == f"{number:d}"


@pytest.mark.parametrize(
    ("one", "other"), [("5", "05"), ("0", "-0"), ("5", "5.0"), ("5", " 5"), ("é", "e\u0301"), ("A", "a")]
)
def test_other_texts_are_other_ids(one, other):
    assert canonical_id(one) != canonical_id(other)


@pytest.mark.parametrize("text", ["x" * 256, "é" * 128, "\U0001f600" * 64, " ", "\u2028", "\u00ad", "\ufeff", ":"])
def test_accepted_texts(text):
    assert canonical_id(text) == text


@pytest.mark.parametrize(
    "value",
    [
        *("", "x" * 257, "é" * 129, "a\0", "\n", "\x1f", "\x7f", "\x85", "\x9f", "\ud800", "a\udfffb"),
        *(2**63, -(2**63) - 1, 1 << 20_000, True, False),
    ],
    ids=lambda value: ascii(value)[:12] if isinstance(value, str | bool) else f"{value.bit_length()} bits",
)
def test_refused_ids(value):
    with pytest.raises(ValueError, match="id"):
        canonical_id(value)


@given(st.integers(0, 0x10FFFF).map(chr))
def test_exactly_the_control_characters_and_surrogates_are_refused(char):
    control = char < " " or "\x7f" <= char <= "\x9f"
    surrogate = "\ud800" <= char <= "\udfff"
    try:
        canonical_id(f"a{char}")
    except ValueError:
        assert control or surrogate
    else:
        assert not control
        assert not surrogate


@pytest.mark.parametrize(
    "name", ["user_v7", "items_v42", "mix-0a1b2c3d", "A.b-C_9", "x" * 64, "uemb", "Fallback", ".a"]
)
def test_version_names(name):
    assert check_version_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        ".",
        "..",
        "",
        "x" * 65,
        "a:b",
        "a b",
        "é",
        "v1\n",
        "a/b",
        "app",
        "current",
        "fallback",
        "encoder",
        "epoch",
        "watermark",
    ],
)
def test_refused_version_names(name):
    with pytest.raises(ValueError, match="version name"):
        check_version_name(name)


def test_every_reserved_key_is_beyond_the_reach_of_version_names():
    taken = [
        keys.APP_KEY,
        keys.CURRENT_KEY,
        keys.fallback_key("i", "u"),
        keys.encoder_key("u"),
        keys.epoch_key(3),
        keys.watermark_key(3),
    ]
    assert taken == [
        "uemb:app",
        "uemb:current",
        "uemb:fallback:u:i",
        "uemb:encoder:u",
        "uemb:epoch:3",
        "uemb:watermark:3",
    ]
    for key in taken:
        with pytest.raises(ValueError, match="reserved"):
            check_version_name(key.split(":")[1])


def test_cache_keys_are_the_seeds():
    assert user_cache_key(42, "items_v42", "user_v7") == "uemb:user_v7:items_v42:42"
    assert user_cache_key("42", "items_v42", "user_v7") == user_cache_key(42, "items_v42", "user_v7")


versions = st.from_regex(r"\A[A-Za-z0-9._-]{1,8}\Z").filter(lambda n: n not in keys.RESERVED_WORDS)


@given(ids, ids, versions, versions, versions, versions)
def test_cache_keys_never_collide(user, other, item_v, item_w, user_v, user_w):
    one, two = (str(user), item_v, user_v), (str(other), item_w, user_w)
    assert (user_cache_key(*one) == user_cache_key(*two)) == (one == two)


def test_a_users_key_and_the_partitioner_agree_on_the_canonical_text():
    user = uuid.UUID(int=7)
    assert partition_of(canonical_id(str(user)).encode(), 12) == partition_of(str(user).encode(), 12)
    assert partition_of(b"5", 12) == partition_of(canonical_id(5).encode(), 12)
