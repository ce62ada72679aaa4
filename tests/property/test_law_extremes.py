"""The laws at the ends of what ids and times may be: nothing overflows, and no two ids become one."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger import Ledger, check_end
from oracle import Oracle
from strategies import TYPES, Driver, Erase, Event, arrivals, message, random_space

from stream.core.encoders import AvgEncoder, Encoder, MixEncoder, TimeMixEncoder, VersionedEncoder
from stream.core.events import EARLIEST_TS_MS, MAX_LEAD_MS
from stream.core.history_codec import MAX_TS_MS
from stream.keys import INT64_MAX, INT64_MIN

COMPOSED = unicodedata.normalize("NFC", "é")
#: Ids that something on the way might take for another one, cut, or fail on.
IDS = [
    *(INT64_MAX, INT64_MIN, 0, -1, "0", "00", "-0", "9223372036854775808", "x" * 256, "\U0010ffff" * 64, "é" * 128),
    *(
        COMPOSED,
        unicodedata.normalize("NFD", COMPOSED),
        "ﬁ",
        "fi",
        "K",
        "K",
        " ",
        "a ",
        " a",
        "a:b",
        "\u202ea",
        "\ufeff",
    ),
    *(
        "00000000-0000-0000-0000-000000000000",
        "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
        "\u2028",
        "[]",
        "null",
        "\\u0000",
    ),
]
#: The first and the last millisecond, those around a byte more, and some a user has.
TIMES = [
    *(EARLIEST_TS_MS, EARLIEST_TS_MS + 1, MAX_TS_MS, MAX_TS_MS - 1, (1 << 40) - 1, 1 << 40, (1 << 47) - 1, 1 << 47),
    *(253_402_300_799_999, 253_402_300_800_000, 1_700_000_000_000),  # years 9999 and 10000
]
events = st.builds(
    Event,
    st.sampled_from(IDS[:6] + IDS[8:13]),
    st.sampled_from(IDS),
    st.sampled_from(sorted(TYPES)),
    st.sampled_from(TIMES),
)
erasures = st.builds(
    Erase, st.sampled_from(IDS[:6]), st.sampled_from([ts for ts in TIMES if ts <= MAX_TS_MS - MAX_LEAD_MS])
)
ENCODERS: dict[str, tuple[Encoder, dict[str, object]]] = {
    "mix": (MixEncoder(), {}),
    "avg": (AvgEncoder(), {"avg_decay": AvgEncoder().decay}),
    "mix_time": (
        TimeMixEncoder(),
        {"half_lives_h": (TimeMixEncoder().half_life_long_h, TimeMixEncoder().half_life_short_h)},
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
@given(st.data(), st.lists(events | events | events | erasures, max_size=25), st.sampled_from([2, 5, 100]))
def test_every_state_equals_the_formula(name: str, data, stream, limit) -> None:
    encoder, parameters = ENCODERS[name]
    space = random_space("items_v1", 3, known=dict.fromkeys(map(str, IDS[:-4])))
    driver = Driver([space], VersionedEncoder(encoder, limit), hot_users=data.draw(st.integers(1, 3)))
    oracle = Oracle(limit, [space], **parameters)
    ledger = Ledger(oracle, driver.spaces)
    for topic, operations in data.draw(arrivals(stream)):
        changes = [change for operation in operations if (change := ledger.fold(operation))]
        # without a timestamp of Kafka's nothing is ahead of it
        ledger.check(driver.feed(topic, [message(o)._replace(timestamp=-1) for o in operations]), changes)
        if data.draw(st.booleans()):
            driver.restart()
    check_end(driver, oracle)
    assert not driver.counts.get("rejected")
