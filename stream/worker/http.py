"""A small HTTP server in a thread of its own: it answers while the worker's event loop is busy, or stuck.

The thread has an event loop for all connections, so that clients who are slow, or say nothing, hold up nobody and cost
no thread. A connection is for one request. When there are too many, the one that has waited longest for its client to
ask gives way.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, NamedTuple

from stream.config import Address
from stream.errors import ConfigError
from stream.logs import OncePerMinute

log = logging.getLogger(__name__)
log.addFilter(OncePerMinute())

#: A client has so long to ask, and again to take the answer.
CLIENT_S: Final = 5.0
#: So long it may take to hang up, once it has the answer.
LINGER_S: Final = 1.0
MAX_CONNECTIONS: Final = 32
_MAX_REQUEST_BYTES: Final = 16 << 10
_STOP_S: Final = 2.0
_BACKLOG: Final = 64
#: No file can be opened in this process, or on this machine; look again after so long.
_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_NO_ROOM_S: Final = 1.0

_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
_TEXT: Final = "text/plain; charset=utf-8"


class Answer(NamedTuple):
    """What a client is sent."""

    status: int
    body: bytes
    content_type: str = _TEXT


#: Answers a request for one path; it is given the request's headers, by name in lower case.
Page = Callable[[Mapping[str, str]], Answer]


class HttpServer:
    """Serves pages until `stop`.

    Args:
        address: where to listen; port 0 takes one that is free.
        pages: by path. They are made in the server's thread, and should take milliseconds.

    Attributes:
        address: where it listens.

    Raises:
        ConfigError: the address is taken, or not one of this machine.
    """

    def __init__(self, address: Address, pages: Mapping[str, Page]) -> None:
        self._pages = pages
        self._waiting: dict[asyncio.Task[None], None] = {}  # connections that have not asked yet, oldest first
        self._connections: set[asyncio.Task[None]] = set()
        try:
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            self._socket = socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
        except OSError as exc:
            why = (exc.strerror or str(exc)).partition(" (while")[0]  # Python names the address once more
            msg = f"UEMB_HTTP={address}: can't listen there ({why}); choose another, or leave it empty"
            raise ConfigError(msg) from exc
        self.address = address._replace(port=self._socket.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="uemb-http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening, and hang up on everybody; harmless when it has stopped."""
        with contextlib.suppress(RuntimeError):  # its loop is closed
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._let_in)
        await self._stopping.wait()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        connections = list(self._connections)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await asyncio.sleep(0)  # in which their sockets are closed

    def _let_in(self) -> None:
        """Take a connection; asyncio's own server loses those that come while it is closed."""
        try:
            client, _ = self._socket.accept()
        except OSError as exc:
            if exc.errno in _NO_ROOM:  # it stays where it is, and would be announced again and again
                self._loop.remove_reader(self._socket)
                self._loop.call_later(_NO_ROOM_S, self._look_again)
            return
        client.setblocking(False)
        if len(self._connections) >= MAX_CONNECTIONS:
            if not self._waiting:
                client.close()
                return
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.cancel()
        task = self._loop.create_task(self._talk(client))
        self._connections.add(task)
        self._waiting[task] = None
        task.add_done_callback(partial(self._hang_up, client))

    def _look_again(self) -> None:
        if not self._stopping.is_set():
            self._loop.add_reader(self._socket, self._let_in)

    def _hang_up(self, client: socket.socket, task: "asyncio.Task[None]") -> None:
        self._waiting.pop(task, None)
        self._connections.discard(task)
        client.close()

    async def _talk(self, client: socket.socket) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=client, limit=_MAX_REQUEST_BYTES)
        except OSError:  # it has hung up
            return
        try:
            answer, is_head = await self._answer(reader)
            await self._send(writer, answer, is_head=is_head)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):  # closing with something unread would take the answer back
                    await reader.read(_MAX_REQUEST_BYTES)
        except (asyncio.CancelledError, TimeoutError, OSError):
            pass
        except Exception:  # whatever somebody sends, the others are served
            log.exception("a request failed")
        finally:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[Answer, bool]:
        try:
            async with asyncio.timeout(CLIENT_S):
                head = await reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            return Answer(408, b"nothing was asked in time\n"), False
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return Answer(400, b"no HTTP request, or one that is too long\n"), False
        if (task := asyncio.current_task()) is not None:
            self._waiting.pop(task, None)
        first, *lines = head.decode("latin-1").split("\r\n")
        match first.split(" "):
            case [method, target, protocol] if protocol.startswith("HTTP/1."):
                pass
            case _:
                return Answer(400, b"no HTTP request\n"), False
        page = self._pages.get(target.partition("?")[0])
        is_head = method == "HEAD"
        if page is None:
            return Answer(404, f"there are {', '.join(self._pages)}\n".encode()), is_head
        if method not in ("GET", "HEAD"):
            return Answer(405, b"GET and HEAD only\n"), False
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        try:
            return page(headers), is_head
        except Exception:
            log.exception("%s could not be made", target.partition("?")[0])
            return Answer(500, b"it could not be made; see the log\n"), is_head

    async def _send(self, writer: asyncio.StreamWriter, answer: Answer, *, is_head: bool) -> None:
        allow = "Allow: GET, HEAD\r\n" if answer.status == 405 else ""
        head = (
            f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}\r\nContent-Type: {answer.content_type}\r\n"
            f"Content-Length: {len(answer.body)}\r\n{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
        writer.transport.set_write_buffer_limits(0)
        writer.write(head.encode() + (b"" if is_head else answer.body))
        async with asyncio.timeout(CLIENT_S):
            await writer.drain()
        writer.write_eof()
