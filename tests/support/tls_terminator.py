"""TLS in front of a server that has none, with a certificate that its test makes."""

import select
import socket
import ssl
import subprocess
import threading
from contextlib import suppress


def make_certificate(folder, name="localhost"):
    """Make one that signs itself, for `name` and 127.0.0.1; return the paths of it and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", key, "-out", certificate, "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"),
            *("-addext", "keyUsage=critical,keyCertSign,digitalSignature"),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


class TlsTerminator:
    """
    Forwards what comes encrypted to a port of loopback, and back.

    Args:
        port: Where to.
        certificate: What it shows, and `key`.
        client_authority: Clients must show a certificate of this one, if it is given.

    Attributes:
        hangs: Accept, and say nothing.
    """

    def __init__(self, port, certificate, key, *, client_authority=None):
        self.hangs = False
        self._target = port
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificate, key)
        if client_authority is not None:
            self._context.load_verify_locations(client_authority)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._sockets = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for it in (self._listener, *self._sockets):
            with suppress(OSError):
                it.shutdown(socket.SHUT_RDWR)
            it.close()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            if not self.hangs:
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, plain):
        try:
            client = self._context.wrap_socket(plain, server_side=True)
        except (OSError, ValueError):  # refused, or closed at the end of the test
            plain.close()
            return
        try:
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            client.close()
            return
        self._sockets += [client, server]
        # One that is closed meanwhile is a ValueError to select.
        with suppress(
            OSError, ValueError
        ):  # by one thread: OpenSSL lets none read while another writes
            while True:
                ready = [client] if client.pending() else select.select([client, server], [], [])[0]
                for source, target in ((client, server), (server, client)):
                    if source in ready:
                        data = source.recv(1 << 16)
                        if not data:
                            raise OSError("closed")
                        target.sendall(data)
        for it in (client, server):
            it.close()
