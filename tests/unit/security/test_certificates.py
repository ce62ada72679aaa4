"""When a certificate ends is read from it as openssl reads it."""

import shutil
import ssl
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from own_certificates import make_certificate, make_ended_certificate

from stream.security.certificates import end_of, end_of_file


@pytest.mark.parametrize("days", [1, 90, 20_000])  # the last one needs four digits for its year
def test_the_end_is_what_openssl_says(days: int, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no certificates: install openssl")
    file, key = make_certificate(tmp_path, "one", days=days)
    said = subprocess.run(
        [openssl, "x509", "-in", str(file), "-noout", "-enddate"], check=True, capture_output=True, text=True
    ).stdout
    assert end_of_file(file).timestamp() == ssl.cert_time_to_seconds(said.strip().partition("=")[2])
    both = tmp_path / "both.pem"  # as some keep them
    both.write_text(key.read_text() + file.read_text())
    assert end_of_file(both) == end_of_file(file)


def test_one_that_ended(tmp_path: Path) -> None:
    try:
        file, _ = make_ended_certificate(tmp_path, "ended")
    except FileNotFoundError:
        pytest.skip("no certificates: install openssl")
    assert end_of_file(file) == datetime(2020, 2, 1, tzinfo=UTC)
    whole = ssl.PEM_cert_to_DER_cert(file.read_text())
    for size in range(0, len(whole), 7):
        with pytest.raises(ValueError, match="no certificate"):
            end_of(whole[: min(size, 40)])


@pytest.mark.parametrize("text", ["", "nothing", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011 - of base64's too
        end_of_file(tmp_path / "file")
