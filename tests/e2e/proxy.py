"""A TCP proxy that can cut or hold up what goes through it, in place of harm to what is behind."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self


class Proxy:
    """Forwards a port of loopback to ``target``, until ``cut``, and again after ``mend``.

    ``hold`` is the other way to be away: connections stay, new ones are taken, and nothing passes.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._ends: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._passes = threading.Event()
        self._passes.set()
        self.port = 0

    def __enter__(self) -> Self:
        self.mend()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cut()

    def mend(self) -> None:
        """Listen (again, at the same port), and let through what was held up."""
        self._passes.set()
        if self._listener is not None:
            return
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def hold(self) -> None:
        """Let nothing through until ``mend``, and tell nobody."""
        self._passes.clear()

    def cut(self) -> None:
        """Refuse new connections and end those there are."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        with self._lock:
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self._ends.clear()
        self._passes.set()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        try:
            self._passes.wait()
            far = socket.create_connection(self._target)
        except OSError:  # what is behind is away itself
            near.close()
            return
        with self._lock:
            self._ends += [near, far]
        there = threading.Thread(target=self._pump, args=(near, far), daemon=True)
        there.start()
        self._pump(far, near)
        there.join()
        with self._lock:
            for end in (near, far):
                end.close()
                if end in self._ends:
                    self._ends.remove(end)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._passes.wait()
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
