"""A gateway that answers nobody until a test says so."""

import threading
from contextlib import contextmanager

from headrace.app import Gateway
from headrace.settings import load_settings


@contextmanager
def held_gateway(model, **settings):
    """
    Run one until the block ends.

    Args:
        model: Is held, as is the store, until `gate` is set; `busy` is set when either is asked.
        settings: Beside the addresses.
    """
    addresses = {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0"}
    gateway = Gateway(load_settings({**addresses, **settings}))
    gateway.gate, gateway.busy = threading.Event(), threading.Event()
    backend = gateway.catalog.find(model, "")._backend
    backend.infer = _behind(gateway, backend.infer)
    gateway._store.read = _behind(gateway, gateway._store.read)
    gateway.start()
    yield gateway
    gateway.gate.set()
    assert gateway.stop()


def _behind(gateway, real):
    def wait(*args, **named):
        gateway.busy.set()
        assert gateway.gate.wait(60)
        return real(*args, **named)

    return wait
