"""Certificates that are signed by themselves, made by openssl."""

import shutil
import subprocess
from pathlib import Path
from typing import Final

_NEW: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


def make_certificate(
    folder: Path, name: str, password: str = "", *, address: str = "127.0.0.1", days: int = 2
) -> tuple[Path, Path]:
    """A certificate of an address that is signed by itself, and its key, encrypted if there is a password.

    Raises:
        FileNotFoundError: there is no openssl.
    """
    certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    secret = ["-passout", f"pass:{password}"] if password else ["-nodes"]
    _openssl("req", "-x509", *_NEW, *_named(name, address), *secret, "-days", days, "-keyout", key, "-out", certificate)
    return certificate, key


def make_ended_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """One of 127.0.0.1 that was valid for the first month of 2020, and its key.

    Raises:
        FileNotFoundError: there is no openssl.
    """
    certificate, key, work = folder / f"{name}.pem", folder / f"{name}-key.pem", folder / f"{name}-ca"
    work.mkdir()
    (work / "index").touch()
    (work / "settings").write_text(
        f"""[ca]
default_ca = own
[own]
database = {work}/index
new_certs_dir = {work}
rand_serial = yes
default_md = sha256
policy = any
copy_extensions = copy
[any]
commonName = supplied
"""
    )
    _openssl("req", *_NEW, *_named(name, "127.0.0.1"), "-nodes", "-keyout", key, "-out", work / "request")
    dates = ["-startdate", "20200101000000Z", "-enddate", "20200201000000Z"]
    files = ["-config", work / "settings", "-keyfile", key, "-in", work / "request", "-out", certificate]
    _openssl("ca", "-batch", "-notext", "-selfsign", *dates, *files)
    return certificate, key


def _named(name: str, address: str) -> list[str]:
    return ["-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{address}"]


def _openssl(*words: object) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        raise FileNotFoundError("openssl")
    subprocess.run([openssl, *map(str, words)], check=True, capture_output=True, timeout=30)
