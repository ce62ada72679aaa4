"""The inspector's HTTP side: who may ask, what the page is made of, and one stream of news for all pages."""

import asyncio
import hmac
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web

from stream.config import Address
from stream.errors import ConfigError, UembError
from stream.foreign_text import one_line
from stream.inspector.inspector import Inspector
from stream.inspector.users import Question
from stream.logs import OncePerMinute

log = logging.getLogger(__name__)
log.addFilter(OncePerMinute())

#: News are made so often.
TICK_S: Final = 1.0
#: Points of the charts: ten minutes.
HISTORY: Final = 600
#: Pages that get news; a page of the same browser shares one stream.
MAX_STREAMS: Final = 64
#: Questions that are answered at a time, and that may wait.
_QUESTIONS: Final = 6
_OF_USERS: Final = 2
_MAX_QUESTIONS: Final = 64
#: What a client has not taken is held up to this; then it is hung up on.
_BEHIND_BYTES: Final = 1 << 20
_MAX_BODY_BYTES: Final = 1 << 20
_CLIENT_S: Final = 10.0
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def is_loopback(address: Address) -> bool:
    """Whether only this machine can reach an address."""
    return address.host in _LOOPBACK


class Server:
    """Serves the page until it is stopped.

    Args:
        inspector: what it shows.
        address: where to listen.
        token: what whoever asks must bear; None, or empty: nothing.
        names: host names under which it is reached besides its own, as through a proxy.

    Raises:
        ConfigError: others could reach it, and there is no token.
    """

    def __init__(self, inspector: Inspector, address: Address, token: str | None, names: tuple[str, ...] = ()) -> None:
        if not is_loopback(address) and not token:
            msg = (
                f"UEMB_INSPECT={address} can be reached from other machines; set UEMB_INSPECT_TOKEN_FILE, or listen "
                "on 127.0.0.1"
            )
            raise ConfigError(msg)
        self._inspector = inspector
        self._address = address
        self._token = token or None
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            msg = "UEMB_INSPECT_TOKEN must be ASCII without blanks: it stands in a header"
            raise ConfigError(msg)
        own = {address.host} if address.host not in ("0.0.0.0", "::") else set()  # noqa: S104 - names, not a bind
        self._names = {*own, *_LOOPBACK, *(name.lower() for name in names)}
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._news: bytes = b""
        self._told = asyncio.Condition()
        self._streams = 0
        self._asking = 0
        self._threads = ThreadPoolExecutor(_QUESTIONS, thread_name_prefix="uemb-inspect-asked")
        # Questions about users wait for one another, for brokers, and for what is reckoned: others shall not.
        self._of_users = ThreadPoolExecutor(_OF_USERS, thread_name_prefix="uemb-inspect-user")
        self._files = {
            file.name: (file.read_bytes(), _TYPES[suffix])
            for file in files("stream.inspector").joinpath("static").iterdir()
            if (suffix := Path(file.name).suffix) in _TYPES
        }
        self._runner: web.AppRunner | None = None
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> Address:
        """Listen; return where.

        Raises:
            ConfigError: the address is taken, or not one of this machine.
        """
        app = web.Application(middlewares=[self._guarded], client_max_size=_MAX_BODY_BYTES)
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/static/{name}", self._file),
                web.get("/api/about", self._about),
                web.get("/api/news", self._stream, allow_head=False),
                web.post("/api/user", self._user),
                web.get("/api/checklist", self._checklist),
                web.get("/api/letters", self._letters),
                web.get("/api/letter", self._letter),
                web.get("/api/map", self._map),
            ]
        )
        logging.getLogger("aiohttp.server").disabled = True  # it writes what strangers send, tokens and ids in it
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=15.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._address.host, self._address.port)
        try:
            await site.start()
        except OSError as exc:
            why = (exc.strerror or str(exc)).partition(" (while")[0]
            msg = f"UEMB_INSPECT={self._address}: can't listen there ({why}); choose another"
            raise ConfigError(msg) from exc
        self._ticking = asyncio.create_task(self._tick())
        host, port = self._runner.addresses[0][:2]
        return Address(str(host), int(port))

    async def stop(self) -> None:
        """Hang up on everybody."""
        if self._ticking is not None:
            self._ticking.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
        for threads in (self._threads, self._of_users):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _tick(self) -> None:
        last = 0
        while True:
            try:
                now = self._inspector.now()
                news = _json(now)
            except Exception:  # a page that hangs would be worse than one that skips a beat
                log.exception("the news could not be made")
            else:
                self._history.append({"at_ms": now["at_ms"], **now["rates"], "lag_s": now["worst_lag_s"]})
                last += 1
                self._news = b"id: %d\ndata: %s\n\n" % (last, news)
                async with self._told:
                    self._told.notify_all()
            await asyncio.sleep(TICK_S)

    # -- who may ask -----------------------------------------------------------------------------------------------

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        answer: web.StreamResponse
        try:
            refusal = self._refusal(request)
            answer = await handler(request) if refusal is None else _problem(*refusal)
        except web.HTTPException as exc:
            answer = _problem(exc.status, exc.reason)
        except web.RequestPayloadError:
            answer = _problem(400, "the body can't be read")
        except UembError as exc:
            answer = _problem(422 if isinstance(exc, ConfigError) else 503, one_line(str(exc)))
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:
            log.exception("a request failed")
            answer = _problem(500, "it could not be made; see the inspector's log")
        if not answer.prepared:
            answer.headers.update(_HEADERS)
        return answer

    def _refusal(self, request: web.Request) -> tuple[int, str] | None:
        """Why a request is refused: a page of somebody else's must neither ask nor listen."""
        host = request.headers.get("Host", "")
        if _host_name(host) not in self._names:
            return 421, "no such host here; name it with --name where a proxy is in between"
        origin = request.headers.get("Origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return 403, "pages of other origins may not ask"
        if request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site") and request.path != "/":
            return 403, "pages of other sites may not ask"
        if self._token is not None and request.path.startswith("/api/"):
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(
                given.strip().encode(errors="surrogateescape"), self._token.encode()
            ):
                return 401, "a token is needed"
        return None

    # -- what is asked ---------------------------------------------------------------------------------------------

    async def _asked(
        self, question: Callable[[], dict[str, Any]], threads: ThreadPoolExecutor | None = None
    ) -> dict[str, Any]:
        """Have a question answered beside the event loop; so many at a time, and no more than so many wait.

        Raises:
            UembError: too many wait.
        """
        if self._asking >= _MAX_QUESTIONS:
            msg = "too many questions at a time; ask again in a moment"
            raise UembError(msg)
        self._asking += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(threads or self._threads, question)
        finally:
            self._asking -= 1

    async def _page(self, _: web.Request) -> web.Response:
        return self._static("index.html")

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._files:
            raise web.HTTPNotFound
        return self._static(name)

    def _static(self, name: str) -> web.Response:
        body, content_type = self._files[name]
        return web.Response(body=body, content_type=content_type, charset="utf-8")

    async def _about(self, _: web.Request) -> web.Response:
        return _answer({**self._inspector.about(), "history": list(self._history)})

    async def _user(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType
        try:
            question = msgspec.json.decode(await request.read(), type=Question)
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise ConfigError(one_line(str(exc))) from exc
        return _answer(await self._asked(partial(self._inspector.user, question), self._of_users))

    async def _checklist(self, request: web.Request) -> web.Response:
        return _answer(await self._asked(partial(self._inspector.checklist, _versions(request.query))))

    async def _letters(self, _: web.Request) -> web.Response:
        return _answer(await self._asked(self._inspector.letters))

    async def _letter(self, request: web.Request) -> web.Response:
        partition, _, offset = request.query.get("place", "").partition(":")
        if not (partition.isdecimal() and offset.isdecimal() and len(partition) < 7 and len(offset) < 19):
            msg = "name a letter as partition:offset"
            raise ConfigError(msg)
        return _answer(await self._asked(partial(self._inspector.letter, int(partition), int(offset))))

    async def _map(self, request: web.Request) -> web.Response:
        return _answer(await self._asked(partial(self._inspector.crowd, _versions(request.query))))

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """News for one page; a slow one misses some, and gets the last."""
        if self._streams >= MAX_STREAMS:
            return _problem(503, "too many pages are open; close some")
        self._streams += 1
        try:
            answer = web.StreamResponse(headers={**_HEADERS, "Content-Type": "text/event-stream; charset=utf-8"})
            await answer.prepare(request)
            transport = request.transport
            sent = b""
            while transport is not None and not transport.is_closing():
                news = self._news
                if news is not sent and transport.get_write_buffer_size() < _BEHIND_BYTES:
                    async with asyncio.timeout(_CLIENT_S):
                        await answer.write(news)
                    sent = news
                async with self._told:
                    await self._told.wait_for(lambda seen=news: self._news is not seen)  # type: ignore[misc]
            return answer
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            return answer
        finally:
            self._streams -= 1


def _host_name(host: str) -> str:
    """The name in a ``Host`` header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _versions(query: Mapping[str, str]) -> tuple[str, str] | None:
    """The pair that is asked for; None for the served one."""
    user_version, item_version = query.get("user_version", ""), query.get("item_version", "")
    return (user_version, item_version) if user_version and item_version else None


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _answer(document: Mapping[str, Any]) -> web.Response:
    return web.Response(body=_json(document), content_type="application/json")


def _problem(status: int, text: str) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return web.Response(status=status, body=_json({"error": text}), content_type="application/json", headers=headers)
