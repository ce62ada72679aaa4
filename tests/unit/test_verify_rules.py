"""What `uemb verify` makes of output records that no worker writes, and of erasures that differ alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stream.encoders import VersionedEncoder
from stream.history import History
from stream.history_codec import HistoryCodec
from stream.items import ItemSpace
from stream.records import EmbeddingRecord, to_json
from stream.verify_rules import Found, Logged, Published, Rules, output_document

CODEC = HistoryCodec({"view": 1})
RECORD = EmbeddingRecord("42", 7, 1, "ok", "", 4, 1, 5, "u", "i", np.array([0.6, 0.8], dtype=np.float32), 1.0)


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


def test_an_erasure_that_differs_alone_is_named(tmp_path: Path) -> None:
    space = ItemSpace.save(tmp_path / "v", "v", ["a", "b"], np.eye(2))
    rules = Rules(space, VersionedEncoder(), json_output=False)
    state = History(CODEC, 100, [], revision=1, erased_at=10)
    found = Found(History(CODEC, 100, [], erased_at=20), Logged(state, (1, 1), (1, 1)), Published(), None)
    assert rules.is_whole(found)
    assert rules.differences("u", found, whole=True, with_store=False) == [
        "changelog: the erasure is another than the input's"
    ]
