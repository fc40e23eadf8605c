"""The demo's callers: a burst of single homes, and a steady trickle of them."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Self, TypeAlias

import grpc

from headrace.demo.sales import Sale, request
from headrace.errors import StartupError
from headrace.v1 import prediction_service_pb2 as pb

Predict: TypeAlias = "grpc.UnaryUnaryMultiCallable[pb.PredictRequest, pb.PredictResponse]"

REQUESTS = 5_000
IN_FLIGHT = 64
CALL_TIMEOUT_S = 10.0
TRICKLE_PERIOD_S = 0.005


def burst(predict: Predict, sales: Sequence[Sale]) -> tuple[list[float], float]:
    """
    Send `REQUESTS` single homes, `IN_FLIGHT` at a time.

    Returns:
        Each latency and the time of all, in seconds.

    Raises:
        StartupError: a prediction failed.
    """
    places = threading.Semaphore(IN_FLIGHT)
    latencies_s: list[float] = []
    failures: list[Exception] = []

    def done(call: "grpc.Future[pb.PredictResponse]", sent_s: float) -> None:
        latencies_s.append(time.perf_counter() - sent_s)
        error = call.exception()
        if error is not None:
            failures.append(error)
        places.release()

    started_s = time.perf_counter()
    for i in range(REQUESTS):
        places.acquire()
        sent_s = time.perf_counter()
        call = predict.future(request([sales[i % len(sales)]]), timeout=CALL_TIMEOUT_S)
        call.add_done_callback(partial(done, sent_s=sent_s))
    for _ in range(IN_FLIGHT):
        places.acquire()
    if failures:
        raise StartupError(f"{len(failures)} of {REQUESTS} predictions failed: {failures[0]}")
    return latencies_s, time.perf_counter() - started_s


class Trickle:
    """
    One caller who asks about a home now and then, from `with` to its end.

    Args:
        predict: The method.
        sales: Whose homes, in turn.
    """

    def __init__(self, predict: Predict, sales: Sequence[Sale]) -> None:
        self._predict = predict
        self._sales = sales
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._call, name="trickle", daemon=True)
        self.answers: Counter[int] = Counter()
        """Requests answered, by model version."""
        self.failures: list[grpc.RpcError] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(CALL_TIMEOUT_S + 1)

    def _call(self) -> None:
        for sale in itertools.cycle(self._sales):
            if self._stopping.wait(TRICKLE_PERIOD_S):
                return
            try:
                reply = self._predict(request([sale]), timeout=CALL_TIMEOUT_S)
                self.answers[reply.model_version] += 1
            except grpc.RpcError as error:
                self.failures.append(error)
