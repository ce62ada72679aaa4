"""What `uemb verify` makes of output records that no worker writes, and of erasures that differ alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stream.cli.verify.rules import Evidence, Logged, Published, Rules, output_document
from stream.core.encoders import VersionedEncoder
from stream.core.history import History
from stream.core.history_codec import NEVER, HistoryCodec, sort_key
from stream.core.records import EmbeddingRecord, encode, framed, kv_prefix, to_json
from stream.items.space import ItemSpace

CODEC = HistoryCodec({"view": 1})
RECORD = EmbeddingRecord(
    user_id="42",
    epoch=7,
    revision=1,
    status="ok",
    reason="",
    history_len=4,
    unknown_items=1,
    as_of=5,
    user_embedding_version="u",
    item_embedding_version="i",
    vector=np.array([0.6, 0.8], dtype=np.float32),
    norm=1.0,
)


def test_a_json_record_is_read() -> None:
    assert output_document(json.dumps(to_json(RECORD)).encode(), json_output=True) == to_json(RECORD)


@pytest.mark.parametrize("name", [*to_json(RECORD), "user_embedding"])
def test_a_json_record_that_lacks_a_field_is_damaged(name: str) -> None:
    document = {field: value for field, value in to_json(RECORD).items() if field != name}
    assert output_document(json.dumps(document).encode(), json_output=True) is None


@pytest.mark.parametrize("body", [None, {}, {"norm": 1.0, "vector": ["x"]}, {"norm": 1.0, "vector": [[1.0]]}, [1]])
def test_a_json_record_without_a_vector_is_damaged(body: Any) -> None:
    document = {**to_json(RECORD), "user_embedding": body}
    assert output_document(json.dumps(document).encode(), json_output=True) is None


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b"1", b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_json_record_is_damaged(value: bytes) -> None:
    assert output_document(value, json_output=True) is None
    assert output_document(value, json_output=False) is None


def test_a_record_under_the_id_of_another_schema_is_named(tmp_path: Path) -> None:
    space = ItemSpace.save(tmp_path / "i", "i", ["a", "b"], np.eye(2))
    rules = Rules(space, VersionedEncoder(), json_output=False, is_output_id={7: True, 8: False}.__getitem__)
    for number, named in ((7, False), (8, True)):
        found = Evidence(None, None, Published(framed(encode(RECORD), number), (7, 1)), None)
        said = rules.differences("42", found, whole=True, with_store=False)
        assert ("output: schema 8 of the registry is another than that of the record" in said) == named


def test_an_erasure_that_differs_alone_is_named(tmp_path: Path) -> None:
    space = ItemSpace.save(tmp_path / "v", "v", ["a", "b"], np.eye(2))
    rules = Rules(space, VersionedEncoder(), json_output=False)
    state = History(CODEC, 100, [], revision=1, erased_at=10)
    found = Evidence(History(CODEC, 100, [], erased_at=20), Logged(state, (1, 1), (1, 1)), Published(), None)
    assert rules.is_whole(found)
    assert rules.differences("u", found, whole=True, with_store=False) == [
        "changelog: the erasure is another than the input's"
    ]


ENDED = "input: events from before an erasure outlived its marker"


@pytest.mark.parametrize(
    ("logged", "newer", "oldest_ms", "stored", "says"),
    [
        pytest.param(None, [], None, None, [], id="all_is_gone"),
        pytest.param(None, [], 11, None, [], id="an_event_that_was_not_kept_since"),
        pytest.param(None, [], 10, None, [ENDED], id="the_input_still_has_an_event"),
        pytest.param(None, [], None, kv_prefix(1, 1), ["store: an entry of an erased user"], id="the_store_kept_it"),
        pytest.param(None, [12], 12, None, ["changelog: no state", "output: no", "store: no"], id="came_back_unseen"),
        pytest.param([], [], None, kv_prefix(1, 1), [], id="not_removed_yet"),
        pytest.param([], [], 10, None, [], id="removed_from_the_store_first"),
        pytest.param(
            [10], [], None, None, ["changelog: interactions from before", "changelog: 1 inter"], id="not_erased"
        ),
    ],
)
@pytest.mark.parametrize("retained", [True, False])
def test_a_marker_may_end(
    tmp_path: Path,
    logged: list[int] | None,
    newer: list[int],
    oldest_ms: int | None,
    stored: bytes | None,
    says: list[str],
    retained: bool,
) -> None:
    """Of a user erased up to 10, with markers of erasures before 11 ended, or (not `retained`) none of them."""
    space = ItemSpace.save(tmp_path / "v", "v", ["a", "b"], np.eye(2))

    def history(times: list[int], erased_at: int) -> History:
        return History(CODEC, 100, [sort_key(ts, b"a", b"view") for ts in times], revision=1, erased_at=erased_at)

    state = None if logged is None else Logged(history(logged, NEVER if logged else 10), (1, 1), (1, 1))
    found = Evidence(history(newer, 10), state, Published(), stored, oldest_ms)
    rules = Rules(space, VersionedEncoder(), json_output=False, ended_ms=11 if retained else None)
    got = rules.differences("u", found, whole=True)
    if retained:
        assert [any(text.startswith(start) for text in got) for start in says] == [True] * len(says)
        assert bool(got) == bool(says)
    else:  # then a marker must be everywhere
        assert bool(got) == (logged is None or bool(logged) or stored is None)
