"""A TCP proxy whose connections can go half-open (nothing comes through any more), or lose the answer to a command."""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

_CHUNK: Final = 1 << 16


class HalfOpenProxy:
    """Passes bytes on to a port of this machine.

    Attributes:
        target: the port; connections that come later go where it says then.
        port: where it listens.
        accepted: connections that were passed on.
        hang_up_on: how many of the next connections are closed at once.
        lost: answers that were kept back.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._dead = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.accepted = 0
        self.hang_up_on = 0
        self._lose: bytes | None = None
        self.lost = 0

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

    def drop(self) -> None:
        """End the connections that are open; those that are opened later work."""
        sockets, self._sockets = self._sockets, []
        for end in sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def lose_answer_to(self, command: bytes) -> None:
        """Let the next request with these bytes reach the target, and hang up before its answer comes back."""
        self._lose = command

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                if self.hang_up_on:
                    self.hang_up_on -= 1
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            self.accepted += 1
            self._sockets += [near, far]
            silent = threading.Event()
            for source, sink in ((near, far), (far, near)):
                pump = threading.Thread(target=self._pump, args=(source, sink, self._dead, silent, source is near))
                self._threads.append(pump)
                pump.start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, dead: threading.Event, silent: threading.Event, asks: bool
    ) -> None:
        try:
            while data := source.recv(_CHUNK):
                if asks and self._lose is not None and self._lose in data:
                    self._lose, self.lost = None, self.lost + 1
                    silent.set()
                elif not asks and silent.is_set():
                    sink.shutdown(socket.SHUT_RDWR)  # the answer was on its way: what was asked is done
                    return
                if not dead.is_set():
                    sink.sendall(data)
        except OSError:
            return
