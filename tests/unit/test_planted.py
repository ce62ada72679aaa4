"""What looks for secrets finds them, however they are written."""

import base64
from urllib.parse import quote

import pytest
from planted import USER, Planted

SECRET = "p@ss/ör:d-1"


@pytest.mark.parametrize(
    "written", [SECRET, quote(SECRET, safe=""), base64.b64encode(SECRET.encode()).decode(), SECRET.encode().hex()]
)
def test_a_secret_is_found(written: str) -> None:
    planted = Planted({"password": SECRET})
    planted.add("a log", f"before {written} after")
    assert list(planted.found()) == ["password in a log (0)"]


def test_a_secret_is_found_in_bytes_and_a_mark_where_it_must_not_be() -> None:
    planted = Planted({"password": SECRET})
    planted.add("a file", b"\0" + SECRET.encode() + b"\0", marks=True)
    planted.add("a record", USER, marks=True)
    planted.add("a log", USER)
    assert list(planted.found()) == ["password in a file (0)", f"{USER} in a log (2)"]
