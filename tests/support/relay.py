"""A TCP relay between a connector and a listener, with faults: `cut` (reset), `hang` (bytes wait), `refuse`."""

from __future__ import annotations

import selectors
import socket
import struct
import threading


def reset(sock: socket.socket) -> None:
    """Closes a TCP connection so that the peer sees a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class TcpRelay:
    """Listens on `port` of 127.0.0.1 and forwards to `target`. Set `hang` or `refuse`, call `cut()`, at any time."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.hang = False
        """Nothing is forwarded, nothing is answered: the link is down."""
        self.carried = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._wake_r, self._wake_w = socket.socketpair()
        self._stopping = False
        self.port = 0
        self.refuse(False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def refuse(self, on: bool) -> None:
        """Close the port (connections are refused, as when the process behind it is gone), or open it again."""
        with self._lock:
            if on and self._listener is not None:
                self._listener.close()
                self._listener = None
            elif not on and self._listener is None:
                self._listener = socket.socket()
                self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._listener.bind(("127.0.0.1", self.port))
                self._listener.listen(16)
                self.port = self._listener.getsockname()[1]
        self._wake_w.send(b"x")

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            for pair in self._pairs:
                for sock in pair:
                    reset(sock)
            self._pairs.clear()
        self._wake_w.send(b"x")

    def close(self) -> None:
        self._stopping = True
        self.cut()
        self.refuse(True)
        self._thread.join(5)
        self._wake_r.close()
        self._wake_w.close()

    def _run(self) -> None:
        while not self._stopping:
            with self._lock:
                other = {a: b for pair in self._pairs for a, b in (pair, pair[::-1])} if not self.hang else {}
                watch = [*other, self._wake_r]
                if self._listener is not None and not self.hang:
                    watch.append(self._listener)
            try:
                with selectors.PollSelector() as selector:
                    for sock in watch:
                        selector.register(sock, selectors.EVENT_READ)
                    readable = [key.fileobj for key, _ in selector.select(0.05)]
            except (OSError, ValueError):
                continue  # closed meanwhile
            with self._lock:
                for sock in readable:
                    if sock is self._wake_r:
                        sock.recv(100)
                    elif sock is self._listener:
                        self._accept(sock)
                    elif sock.fileno() >= 0 and not self.hang:
                        self._forward(sock, other[sock])

    def _accept(self, listener: socket.socket) -> None:
        here, _ = listener.accept()
        try:
            there = socket.create_connection(("127.0.0.1", self.target), timeout=5)
        except OSError:
            here.close()
            return
        self._pairs.append((here, there))

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            data = source.recv(1 << 16)
            if data:
                sink.sendall(data)
                self.carried += len(data)
                return
        except OSError:
            pass
        self._pairs = [pair for pair in self._pairs if source not in pair]
        for sock in (source, sink):
            sock.close()
