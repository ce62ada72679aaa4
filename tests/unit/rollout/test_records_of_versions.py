"""Control and status records: what they say, what they refuse, and what a folded topic adds up to."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.rollout.records import (
    NOTHING_SAID,
    STAGES,
    STATES,
    BadRecord,
    Catalogue,
    ControlRecord,
    Coverage,
    EncoderRecord,
    Status,
)

SHA = "ab" * 32
VERSIONS = ("v1", "v2", "v3")


def control(version: str, state: str, **more: object) -> bytes:
    return json.dumps({"version": version, "uri": "/items", "sha256": SHA, "state": state, **more}).encode()


def folded(*records: tuple[str, str | None]) -> Catalogue:
    catalogue = NOTHING_SAID
    for offset, (version, state) in enumerate(records):
        catalogue = catalogue.after(offset, version.encode(), None if state is None else control(version, state))
    return catalogue


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("force", [False, True])
def test_a_control_record_comes_back(state: str, force: bool) -> None:
    record = ControlRecord("v1", "file:///srv/items/v1", SHA, state, force)
    assert ControlRecord.decode(*record.encode()) == record
    assert record.path == "/srv/items/v1"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (b"v1", b"", "no JSON"),
        (b"v1", b"\xff", "no JSON"),
        (b"v1", b"[" * 100_000, "no JSON"),
        (b"v1", b'"v1"', "no JSON object"),
        (b"v1", b"{}", "version name"),
        (b"v1", control("a:b", "active"), "version name"),
        (b"current", control("current", "active"), "reserved"),
        (b"v2", control("v1", "active"), "key"),
        (None, control("v1", "active"), "key"),
        (b"v1", control("v1", "served"), "state"),
        (b"v1", control("v1", "active", uri="items"), "uri"),
        (b"v1", control("v1", "active", uri=7), "uri"),
        (b"v1", control("v1", "active", uri="s3://bucket/items"), "uri"),
        (b"v1", control("v1", "active", sha256="AB"), "sha256"),
        (b"v1", control("v1", "active", sha256=SHA + "\n"), "sha256 must be 64 hex digits"),
        (b"v1", control("v1", "active").replace(b'"uri": "/items", ', b""), "uri must be an absolute path"),
        (b"v1", control("v1", "`secret`"), "^state must be one of prepare, active, retired$"),
        (b"v1", control("\ud800", "active"), "no JSON"),
        (b"v1", control("v1", "active").replace(b'"uri"', b'"\\ud800": 1, "uri"'), "no JSON"),
        (b"v1", control("v1", "active", uri="/items\0"), "uri must be an absolute path"),
        (b"v1", control("v1", "active", force="yes"), "force"),
    ],
)
def test_a_control_record_that_says_nothing(key: bytes | None, value: bytes, says: str) -> None:
    with pytest.raises(BadRecord, match=says):
        ControlRecord.decode(key, value)


def test_the_newest_active_record_is_served_and_a_rollback_is_one_more() -> None:
    catalogue = folded(("v1", "active"), ("v2", "prepare"), ("v2", "active"))
    assert catalogue.active is not None
    assert (catalogue.active[0], catalogue.active[1].version) == (2, "v2")
    back = catalogue.after(3, b"v1", control("v1", "active"))
    assert back.active is not None
    assert (back.active[0], back.active[1].version) == (3, "v1")
    assert set(back.live) == {"v1", "v2"}
    gone = back.after(4, b"v2", control("v2", "retired"))
    assert set(gone.live) == {"v1"}
    assert set(gone.retired) == {"v2"}
    assert folded(("v1", "active"), ("v1", None)).active is None


@given(st.lists(st.tuples(st.sampled_from(VERSIONS), st.sampled_from((*STATES, None))), max_size=12))
def test_compaction_changes_nothing(records: list[tuple[str, str | None]]) -> None:
    """Only the newest record of a key is left of a compacted topic, at its old offset."""
    last = {version: offset for offset, (version, _) in enumerate(records)}
    compacted = NOTHING_SAID
    for offset, (version, state) in enumerate(records):
        if last[version] == offset and state is not None:
            compacted = compacted.after(offset, version.encode(), control(version, state))
    assert compacted == folded(*records)


@pytest.mark.parametrize("stage", STAGES)
def test_a_status_comes_back_and_fields_of_later_releases_are_passed_over(stage: str) -> None:
    status = Status("u", "v1", 3, 7, stage, 10, 5, 1, 500, 20, 99.5, "why")
    key, value = status.encode()
    assert key == b"u:v1:3"
    assert Status.decode(value) == status
    assert Status.decode(json.dumps({**json.loads(value), "colour": "red"}).encode()) == status


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "done"},
        {"epoch": "7"},
        {"partition": None},
        {"done": 1.5},
        {"user_version": ...},
        {"user_version": 7},
        {"per_second": 10**400},
        {"error": None},
    ],
)
def test_a_status_that_says_nothing(change: dict[str, object]) -> None:
    fields = json.loads(Status("u", "v1", 3, 7, "covered").encode()[1])
    fields = {name: change.get(name, value) for name, value in fields.items() if change.get(name) is not ...}
    with pytest.raises(BadRecord):
        Status.decode(json.dumps(fields).encode())


def coverage(*statuses: Status) -> Coverage:
    found = Coverage()
    for status in statuses:
        found.add(status)
    return found


def test_a_pair_is_covered_when_the_present_owner_of_every_partition_says_so() -> None:
    both = [Status("u", "v1", p, 1, "covered") for p in (0, 1)]
    assert coverage(*both).covered("u", "v1", 2)
    assert not coverage(both[0]).covered("u", "v1", 2)
    assert not coverage(*both, Status("u", "v1", 1, 2, "covering")).covered("u", "v1", 2)
    # the next owner published in another pair only: what was covered is no longer kept current
    assert not coverage(*both, Status("other", "v1", 1, 2, "covered")).covered("u", "v1", 2)


def test_what_an_earlier_owner_says_late_counts_for_nothing() -> None:
    found = coverage(Status("u", "v1", 0, 2, "covering"), Status("u", "v1", 0, 1, "covered"))
    assert found.stage("u", "v1", 0) == "covering"
    # compaction may leave nothing but the late record of this pair: another pair's tells that there is a newer owner
    found = coverage(Status("u", "v2", 0, 2, "covered"), Status("u", "v1", 0, 1, "covered"))
    assert found.stage("u", "v1", 0) is None


def test_refusals_are_known_by_version() -> None:
    refused = Status("u", "v2", 0, 1, "refused", error="no vectors.npy", asked=7)
    assert coverage(refused, Status("u", "v1", 0, 1, "covered")).refusals(7) == [refused]
    assert coverage(refused).refusals(8) == []  # published again: nobody has looked at that yet
    assert coverage(refused, Status("u", "v2", 0, 1, "covering")).refusals(7) == []


class TestRetiredEncoder:
    """A user version that workers have left, and whose vectors are to be removed."""

    RETIRED = EncoderRecord("avg-1", "retired", epochs={0: 5, 1: 7})

    def test_it_is_in_the_catalogue_until_it_is_withdrawn(self) -> None:
        before = folded(("v1", "active"))
        key, value = self.RETIRED.encode()
        after = before.after(1, key, value)
        assert after.retired_encoders == {"avg-1": self.RETIRED}
        assert (after.records, after.after(2, b"v1", control("v1", "retired")).retired_encoders) == (
            before.records,
            after.retired_encoders,
        )
        assert after.after(2, key, None) == before

    @pytest.mark.parametrize(
        "fields",
        [
            {"state": "active"},
            {"user_version": "avg-2"},
            {"epochs": 3},
            {"epochs": {"0": "x"}},
            {"user_version": None},
            {"user_version": "\ud800"},
        ],
    )
    def test_a_record_that_says_nothing_is_none(self, fields: dict[str, object]) -> None:
        key, value = self.RETIRED.encode()
        with pytest.raises(BadRecord):
            NOTHING_SAID.after(0, key, json.dumps({**json.loads(value), **fields}).encode())

    @pytest.mark.parametrize(
        ("status", "is_covered"),
        [
            (Status("avg-1", "v1", 0, 5, "covered"), True),
            (Status("avg-1", "v1", 1, 7, "covering"), True),
            (Status("avg-1", "v1", 0, 6, "covered"), False),  # workers went back to it
            (Status("avg-1", "v1", 0, 6, "removing"), True),  # begun by a later owner, who was killed
            (Status("avg-1", "v1", 0, 5, "removed"), False),
            (Status("avg-1", "v1", 2, 1, "covered"), False),
            (Status("mix-1", "v1", 0, 5, "covered"), False),
        ],
    )
    def test_what_was_made_after_it_stays(self, status: Status, is_covered: bool) -> None:
        assert self.RETIRED.removes(status) is is_covered

    def test_one_that_was_published_can_only_come_back_by_being_published(self) -> None:
        retired = EncoderRecord("avg-1", "retired", "ab" * 32, "avg")
        assert retired.removes(Status("avg-1", "v1", 0, 99, "covered"))
        assert not retired.removes(Status("avg-1", "v1", 0, 99, "removed"))
        assert not EncoderRecord("avg-1", "prepare", "ab" * 32, "avg").removes(Status("avg-1", "v1", 0, 9, "covered"))


class TestPublishedEncoders:
    """Encoders beside that of the settings."""

    def encoder(self, version: str, state: str, **fields: object) -> tuple[bytes, bytes]:
        return EncoderRecord(version, state, "ab" * 32, "avg", **fields).encode()

    def test_the_one_activated_last_is_served(self) -> None:
        catalogue = NOTHING_SAID
        assert catalogue.active_encoder is None
        for offset, (version, state) in enumerate(
            [("avg-1", "active"), ("avg-2", "prepare"), ("avg-2", "active"), ("avg-1", "active"), ("avg-3", "retired")]
        ):
            catalogue = catalogue.after(offset, *self.encoder(version, state))
        assert catalogue.active_encoder == (3, EncoderRecord("avg-1", "active", "ab" * 32, "avg"))
        assert set(catalogue.live_encoders) == {"avg-1", "avg-2"}
        assert set(catalogue.retired_encoders) == {"avg-3"}
        assert catalogue.records == {}

    @pytest.mark.parametrize(
        "fields",
        [
            {"hash": ""},
            {"encoder": ""},
            {"hash": "xyz"},
            {"params": {"decay": "x"}},
            {"type_weights": 3},
            {"uri": "relative"},
            {"state": "x"},
        ],
    )
    def test_a_record_that_says_nothing_is_none(self, fields: dict[str, object]) -> None:
        key, value = self.encoder("avg-1", "active")
        with pytest.raises(BadRecord):
            NOTHING_SAID.after(0, key, json.dumps({**json.loads(value), **fields}).encode())
