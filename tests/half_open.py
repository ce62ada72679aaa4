"""A TCP proxy whose connections can go half-open: still there for both ends, and nothing comes through any more."""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

_CHUNK: Final = 1 << 16


class HalfOpenProxy:
    """Passes bytes on to a port of this machine."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._dead = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.accepted = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for end in (self._listener, *self._sockets):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join()

    def go_half_open(self) -> None:
        """Let no byte of the connections that are open through any more; those that are opened later work."""
        self._dead.set()
        self._dead = threading.Event()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            self.accepted += 1
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                self._threads.append(threading.Thread(target=_pump, args=(source, sink, self._dead)))
                self._threads[-1].start()


def _pump(source: socket.socket, sink: socket.socket, dead: threading.Event) -> None:
    try:
        while data := source.recv(_CHUNK):
            if not dead.is_set():
                sink.sendall(data)
    except OSError:
        return
