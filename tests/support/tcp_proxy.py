"""A small TCP proxy that makes a network bad: slow, uneven, cut, or silent."""

import contextlib
import random
import socket
import struct
import threading
import time


class TcpProxy:
    """
    Forwards connections to a port of loopback.

    What is wrong is an attribute, and may be changed while connections are open.

    Attributes:
        delay_s: Added to each piece of an answer.
        jitter_s: At most so much more, at random (seeded).
        slice_bytes: Answers come in pieces of so many bytes, where that is not 0.
        reset_share: Of the pieces of answers, so many are half sent, and then the connection reset.
        bytes_per_s: Answers come no faster, where that is not 0.
        is_silent: Accept, and forward nothing.
    """

    def __init__(self, port):
        self.delay_s = self.jitter_s = self.reset_share = 0.0
        self.slice_bytes = self.bytes_per_s = 0
        self.is_silent = False
        self._target = port
        self._random = random.Random(7)
        self._lock = threading.Lock()
        self._sockets = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # A listener that is merely closed does not wake who waits for it.
        for it in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                it.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
        for it in (self._listener, *self._sockets):
            it.close()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._sockets |= {client, server}
            for source, target, is_answer in ((client, server, False), (server, client, True)):
                thread = threading.Thread(target=self._forward, args=(source, target, is_answer))
                self._threads.append(thread)
                thread.start()

    def _forward(self, source, target, is_answer):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                while self.is_silent and self._listener.fileno() >= 0:
                    if source.fileno() < 0:
                        return
                    time.sleep(0.01)
                if is_answer:
                    self._answer(target, data)
                else:
                    target.sendall(data)
        for it in (source, target):
            with contextlib.suppress(OSError):
                it.shutdown(socket.SHUT_RDWR)

    def _answer(self, target, data):
        with self._lock:
            luck, extra_s = self._random.random(), self._random.uniform(0, self.jitter_s)
        if self.delay_s or extra_s:
            time.sleep(self.delay_s + extra_s)
        if luck < self.reset_share:
            target.sendall(data[: len(data) // 2])
            # Lingering for no time makes closing a reset, once no thread waits for its data.
            target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            target.shutdown(socket.SHUT_RD)
            target.close()
            raise OSError("reset")
        step = self.slice_bytes or len(data)
        for first in range(0, len(data), step):
            target.sendall(data[first : first + step])
            if self.bytes_per_s:
                time.sleep(len(data[first : first + step]) / self.bytes_per_s)
