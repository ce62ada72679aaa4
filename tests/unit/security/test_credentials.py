"""Certificates that are read anew when they are replaced, and not before all of them can be used."""

import os
import socket
import ssl
import threading
from pathlib import Path

import pytest
from own_certificates import make_certificate
from secured_broker import KEY_PASSWORD

from stream.errors import ConfigError
from stream.security.credentials import FreshContext, TlsFiles

NAMES = {name: name for name in ("ca", "certificate", "key", "key_password", "key_password_file")}


class Server:
    """Shows a certificate, demands one, and tells by which of the two it knows the client."""

    def __init__(self, folder: Path) -> None:
        self.certificate, self._key = make_certificate(folder, "server")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._folder = folder

    def shown(self, client: ssl.SSLContext) -> str:
        """Common name of the certificate that a client shows."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate, self._key)
        for file in self._folder.glob("client-*.pem"):
            if "key" not in file.name:
                context.load_verify_locations(file)
        context.verify_mode = ssl.CERT_REQUIRED
        found: list[str] = []

        def serve() -> None:
            connection, _ = self._listener.accept()
            with context.wrap_socket(connection, server_side=True) as secured:
                ((_, name),) = secured.getpeercert()["subject"][0]  # type: ignore[index,misc]
                found.append(str(name))
                secured.sendall(b".")

        thread = threading.Thread(target=serve)
        thread.start()
        with (
            socket.create_connection(self._listener.getsockname()) as plain,
            client.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
        ):
            assert secured.recv(1) == b"."
        thread.join()
        return found[0]

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def server(tmp_path: Path) -> "Server":
    return Server(tmp_path)


def test_a_certificate_that_is_replaced_is_shown_at_the_next_connection(server: Server, tmp_path: Path) -> None:
    (one, one_key), (two, two_key) = (make_certificate(tmp_path, f"client-{n}", KEY_PASSWORD) for n in (1, 2))
    (tmp_path / "password").write_text(KEY_PASSWORD)
    shown, key = tmp_path / "shown.pem", tmp_path / "shown-key.pem"
    _replace(shown, one)
    _replace(key, one_key)
    files = TlsFiles(server.certificate, shown, key, None, tmp_path / "password", NAMES)
    context = FreshContext(files)
    assert server.shown(context) == "client-1"
    _replace(shown, two)
    assert server.shown(context) == "client-1", "its key is not there yet"
    _replace(key, two_key)
    assert server.shown(context) == "client-2"
    shown.unlink()
    assert server.shown(context) == "client-2"
    server.close()


def test_a_ca_that_is_replaced_is_the_only_one(server: Server, tmp_path: Path) -> None:
    one, key = make_certificate(tmp_path, "client-1")
    other, _ = make_certificate(tmp_path, "other")
    ca = tmp_path / "ca.pem"
    _replace(ca, server.certificate)
    context = FreshContext(TlsFiles(ca, one, key, settings=NAMES))
    assert server.shown(context) == "client-1"
    _replace(ca, other)
    fresh = context._fresh()
    assert [str(dict(c["subject"][0])["commonName"]) for c in fresh.get_ca_certs()] == ["other"]
    server.close()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("none", None, None), r"^ca \S+none.pem can't be used: No such file"),
        (("empty", None, None), r"^ca \S+empty.pem can't be used: no certificate in PEM is in it"),
        (("a", "none", "a-key"), r"^certificate \S+none.pem can't be used: No such file"),
        (("a", "a", "none"), r"^key \S+none.pem can't be used: No such file"),
        (("a", "a", "b-key"), r"^certificate \S+ can't be used: no certificate and key .* or key_password is wrong"),
    ],
)
def test_files_that_cant_be_used_are_named(names: tuple[str | None, ...], says: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_certificate(tmp_path, name)
    (tmp_path / "empty.pem").write_text("")
    with pytest.raises(ConfigError, match=says):
        FreshContext(TlsFiles(*(name and tmp_path / f"{name}.pem" for name in names), settings=NAMES))


def _replace(file: Path, by: Path) -> None:
    """As those do who replace certificates under programs that run."""
    new = file.with_suffix(".new")
    new.write_bytes(by.read_bytes())
    os.replace(new, file)
