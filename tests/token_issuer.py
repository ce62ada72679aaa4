"""An issuer of tokens on this machine: OAuth's client credentials for signed JWTs, and the keys to check them with."""

import base64
import json
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote

from closing import Closing
from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey

#: Who may ask, and the subject of the tokens, which is a broker's user.
CLIENT_ID: Final = "uemb-client"
CLIENT_SECRET: Final = "issuer-secret-5"
AUDIENCE: Final = "kafka"
NAME: Final = "https://issuer.test"


class TokenIssuer(Closing):
    """A running issuer; what it answers can be changed at any time.

    Args:
        certificate: with `key`, of its TLS; None for plain HTTP.
        key: see there.

    Attributes:
        lifetime_s: of the tokens that it gives.
        audience: for whom they are.
        scope: the only one that may be asked for; None for any.
        secret: of the one client.
        instead: status and body with which it answers in place of a token.
        given: tokens so far.
    """

    def __init__(self, certificate: Path | None = None, key: Path | None = None) -> None:
        self.lifetime_s = 3600.0
        self.audience = AUDIENCE
        self.scope: str | None = None
        self.secret = CLIENT_SECRET
        self.instead: tuple[int, bytes] | None = None
        self.given: list[str] = []
        self._key = RSAKey.generate_key(2048, {"kid": "k1", "use": "sig", "alg": "RS256"})
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if certificate is not None else None
        if self._tls is not None and certificate is not None:
            self._tls.load_cert_chain(certificate, key)
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def base(self) -> str:
        """Where it is."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """Where it gives tokens."""
        return f"{self.base}/token"

    @property
    def jwks_url(self) -> str:
        """Where it shows its keys."""
        return f"{self.base}/jwks"

    def start(self) -> None:
        """Serve, at the port of before; any number of times."""
        if self._server is not None:
            return
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                self._answer(200, KeySet([issuer._key]).as_dict(private=False))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self._answer(*issuer._token(self.headers.get("Authorization", ""), parse_qs(body)))

            def _answer(self, status: int, body: dict[str, Any] | bytes) -> None:
                text = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                if status in (301, 302, 307):
                    self.send_header("Location", f"{issuer.base}/elsewhere")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        if self._tls is not None:
            # The handshake is left to the thread of the connection.
            self._server.socket = self._tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Be away; any number of times."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def close(self) -> None:
        """See `stop`."""
        self.stop()

    def token(self, **claims: object) -> str:
        """A signed token."""
        now_s = int(time.time())
        body = {
            "iss": NAME,
            "sub": CLIENT_ID,
            "aud": self.audience,
            "iat": now_s,
            "exp": now_s + int(self.lifetime_s),
            **claims,
        }
        return jwt.encode({"alg": "RS256", "kid": "k1"}, body, self._key)

    def _token(self, authorization: str, form: dict[str, list[str]]) -> tuple[int, dict[str, Any] | bytes]:
        if self.instead is not None:
            return self.instead
        login = base64.b64decode(authorization.removeprefix("Basic ")).decode()
        if [unquote(part) for part in login.split(":")] != [CLIENT_ID, self.secret]:
            return 401, {"error": "invalid_client", "error_description": f"not {login}"}
        if form.get("grant_type") != ["client_credentials"]:
            return 400, {"error": "unsupported_grant_type"}
        if self.scope is not None and form.get("scope") != [self.scope]:
            return 400, {"error": "invalid_scope"}
        self.given.append(self.token(**({"scope": self.scope} if self.scope else {})))
        return 200, {"access_token": self.given[-1], "token_type": "Bearer", "expires_in": self.lifetime_s}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that hang up on it are what tests are about."""
