"""The oracle itself, and the streams that are held against it."""

import random
from itertools import pairwise

import numpy as np
from oracle import LEAD_MS, Oracle
from strategies import (
    LATE_ENOUGH,
    T0,
    make_space,
    random_chunks,
    random_stream,
    topic_of,
)

from stream.core.records import kv_entry


def test_the_oracle_on_a_case_worked_out_by_hand():
    space = make_space("v", ["a", "b"], np.array([[1.0, 0.0], [0.0, 1.0]]))
    oracle = Oracle(2, [space], avg_decay=np.log(2.0))
    for ts, item in [(3, "b"), (1, "b"), (2, "a"), (3, "b")]:
        oracle.event("u", item, "view", ts * LEAD_MS)
    want = oracle.expected("u")
    assert (want["history_len"], want["unknown_items"], want["as_of"]) == (2, 0, 3 * LEAD_MS)
    np.testing.assert_allclose(want["vector"], np.array([1.0, 2.0]) / np.sqrt(5), atol=1e-7)  # 1/2 : 1
    oracle.erase("u", LEAD_MS)
    assert oracle.expected("u")["reason"] == "too_short_history"
    oracle.erase("u", 2 * LEAD_MS)
    assert oracle.expected("u") is None
    assert oracle.expected("nobody") is None
    assert LATE_ENOUGH > T0


def test_streams_hold_what_they_promise():
    """The strategies reach the cases they exist for: several topics, erasures between events, duplicates."""
    rng = random.Random(1)
    stream = random_stream(rng, 300, erasures=0.05)
    assert {topic_of(o) for o in stream} == {"user-events.view", "user-events.like", "user-deletions"}
    assert len(set(stream)) < len(stream)
    assert any(a.ts > b.ts for a, b in pairwise(stream))
    batches = random_chunks(rng, stream, 5)
    assert sum(len(chunk.operations) for chunk in batches) == len(stream)
    assert kv_entry(b"\0" * 16) == (0, 0, b"")
