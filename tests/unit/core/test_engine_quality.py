"""What the batch step counts for those who ask how good vectors are: fallbacks, collapse, drift, what led to events."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from strategies import LATE_ENOUGH, MINUTE, T0, TYPES, Driver, Erase, Event, Message, make_space, random_space

from stream.core.counters import Counter
from stream.core.encoders import VectorStatus
from stream.core.events import EventRules
from stream.core.exposure import Exposure
from stream.core.space_engine import _COMPARED_STEPS, _COMPARED_USERS

SPACE = random_space("items_v1", 4, known=["a", "b", "c", *range(20)])
TOPIC = "user-events.view"


def view(user: object, item: object, minute: int = 0) -> Event:
    return Event(user, item, "view", T0 + minute * MINUTE)


def test_vectors_that_are_nearly_the_same_for_everybody_are_counted() -> None:
    """Popularity has collapsed a space where all that is liked lies in one direction."""
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(30, 8))
    one_way = spread * 0.05 + np.eye(8)[0]
    for rows, collapsed in ((spread, False), (one_way, True)):
        d = Driver([make_space("items_v1", range(30), rows)])
        d.run([(TOPIC, [Event(user, item, "view", T0 + item) for user in range(5) for item in range(user, user + 4)])])
        assert d.counts[Counter.VECTORS] == 15
        assert d.counts[Counter.FALLBACKS] == 5  # a history of one
        assert d.counts.get(Counter.NEAR_CENTROID, 0) == (15 if collapsed else 0)


def test_an_erased_user_s_tombstone_is_neither_a_vector_nor_a_fallback() -> None:
    d = Driver([SPACE])
    d.apply(Event("u", 1, "view", T0), Event("u", 2, "view", T0 + 1))
    before = dict(d.counts)
    d.apply(Erase("u", T0 + 5))
    assert {name: d.counts[name] for name in (Counter.VECTORS, Counter.FALLBACKS)} == {
        name: before[name] for name in (Counter.VECTORS, Counter.FALLBACKS)
    }


def test_vectors_are_counted_by_pair_and_by_what_they_are() -> None:
    other = random_space("items_v2", 4, known=["a"])
    d = Driver([SPACE, other])
    result = d.apply(view("u", "a"), view("u", "b", 1), view("v", "a"))
    version = d.encoder.version
    assert result.published == {
        (version, "items_v1", VectorStatus.OK): 1,
        (version, "items_v1", VectorStatus.TOO_SHORT_HISTORY): 2,
        (version, "items_v2", VectorStatus.TOO_SHORT_HISTORY): 3,
    }
    assert d.apply(Erase("u", T0 + 5 * MINUTE)).published == {}, "a tombstone is no vector"


@pytest.mark.parametrize("publish_latest", [False, True])
@pytest.mark.parametrize("each", [1, 8, 24])
def test_items_that_a_version_lacks_are_counted_once_for_each_interaction(each: int, publish_latest: bool) -> None:
    """However they come in: one after another, many of a user at a time, late, and again."""
    other = random_space("items_v2", 4, known=["a"])
    d = Driver([SPACE, other], publish_latest=publish_latest)
    version = d.encoder.version
    lacked = {(version, "items_v1"): each, (version, "items_v2"): 2 * each}
    events = [view("u", item, n) for n in range(each) for item in (5, "unheard")]
    assert d.apply(*events).unknown_items == lacked
    assert d.apply(*events).unknown_items == {}, "these are known"
    late = [view("u", "unheard", -1 - n) for n in range(each)]
    assert d.apply(*late).unknown_items == dict.fromkeys(lacked, each)


def test_a_few_vectors_are_compared_with_those_before() -> None:
    d = Driver([SPACE])
    d.apply(*(view(user, item) for user in range(40) for item in (1, 2)))
    compared = []
    for n in range(2 * _COMPARED_STEPS):
        before = {user: d.record(user).vector for user in range(40)}
        result = d.apply(*(view(user, 3 + n, 1 + n) for user in range(40)))
        if result.cosines:
            compared.append(n)
            assert len(result.cosines) == _COMPARED_USERS
            now = [float(before[user] @ d.record(user).vector) for user in range(_COMPARED_USERS)]
            assert result.cosines == pytest.approx(now, abs=1e-6)
    assert len(compared) == 2, "a step in eight"


def test_nothing_is_compared_of_those_who_had_no_vector_or_get_no_interaction() -> None:
    d = Driver([SPACE])
    same = [view(user, item) for user in range(5) for item in (1, 2)]
    for n in range(_COMPARED_STEPS - 1):
        d.apply(view("other", n, n))
    new = [view(100, 1, 3), view(100, 2, 4)]
    assert d.apply(*new).cosines == [], "a step that compares"
    d.apply(*same)
    for _ in range(2 * _COMPARED_STEPS):
        assert d.apply(*same).cosines == []


def test_users_in_memory_and_from_disk_are_counted() -> None:
    d = Driver([SPACE], hot_users=2)
    for users, hits, misses in (((1, 2), 0, 2), ((1, 2, 2), 2, 0), ((2, 3, 4), 1, 2), ((1,), 0, 1)):
        counts = d.apply(*(view(user, 1) for user in users)).counts
        assert (counts[Counter.HOT_USERS_HITS], counts[Counter.HOT_USERS_MISSES]) == (hits, misses), users
    assert Counter.HOT_USERS_HITS not in d.feed(TOPIC, [Message(b"1", b"no JSON")]).counts


def event_from(source: object, n: int) -> SimpleNamespace:
    document = {"user_id": "u", "item_id": n, "type": "view", "ts": T0 + n, **({} if source is None else source)}
    return SimpleNamespace(key=b"u", value=json.dumps(document).encode(), timestamp=LATE_ENOUGH)


def test_what_our_own_vectors_led_to_is_counted_and_changes_nothing() -> None:
    sources = [
        {"source": "recommended"},
        {"source": "recommended"},
        {"source": "search"},
        {"source": 7},
        {"source": None},
        None,
    ]
    records = [event_from(source, n) for n, source in enumerate(sources)]
    rules = EventRules(TYPES, source="source", own_sources=frozenset({"recommended"}))
    counted, plain = Driver([SPACE], rules=rules), Driver([SPACE])
    for d in (counted, plain):
        d.feed(TOPIC, records)
    assert (counted.counts[Counter.SOURCED], counted.counts[Counter.SELF_CAUSED]) == (3, 2)
    assert Counter.SOURCED not in plain.counts
    assert counted.kv == plain.kv
    assert counted.topic == plain.topic


def test_a_source_may_lie_deep_and_what_is_rejected_or_ignored_has_none() -> None:
    rules = EventRules(TYPES, frozenset({"seen"}), source="page.slot", own_sources=frozenset({"ann"}))
    d = Driver([SPACE], rules=rules)
    good = [event_from({"page": {"slot": "ann"}}, 1), event_from({"page": "ann"}, 2)]
    bad = [event_from({"page": {"slot": "ann"}, "type": kind}, 3) for kind in ("seen", "unheard of")]
    d.feed(TOPIC, [*good, *bad])
    assert (d.counts[Counter.SOURCED], d.counts[Counter.SELF_CAUSED]) == (1, 1)
    with pytest.raises(ValueError, match="one source"):
        Exposure("items[].source", frozenset())
