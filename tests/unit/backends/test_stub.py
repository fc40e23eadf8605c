"""What the stub promises beyond the contract of a backend."""

import threading

import numpy as np
import pytest

from headrace.backends.stub import StubBackend
from headrace.errors import BackendError
from headrace.tensors import TensorSpec

X = TensorSpec("x", "FP32", (-1, 1))
Y = TensorSpec("y", "FP32", (-1, 1))
ROWS = {"x": np.ones((2, 1), np.float32)}


def double(inputs):
    return [inputs["x"] * 2]


def test_a_closed_gate_holds_the_batch_until_it_opens():
    gate = threading.Event()
    backend = StubBackend("m", [X], [Y], double, gate=gate)
    results = []
    thread = threading.Thread(target=lambda: results.extend(backend.infer(ROWS)))
    thread.start()
    assert backend.entered.acquire(timeout=30)
    assert not results
    gate.set()
    thread.join(timeout=30)
    assert results[0].tolist() == [[2.0], [2.0]]


def test_a_gate_that_stays_closed_fails_the_batch():
    backend = StubBackend("m", [X], [Y], double, gate=threading.Event(), gate_timeout_s=0.01)
    with pytest.raises(BackendError, match="model 'm' was held for too long"):
        backend.infer(ROWS)


@pytest.mark.parametrize(
    "function",
    [
        lambda inputs: 1 / 0,
        lambda inputs: [],
        lambda inputs: [inputs["x"], inputs["x"]],
        lambda inputs: [inputs["x"].astype(np.float64)],
    ],
    ids=["raises", "too few", "too many", "another dtype"],
)
def test_a_function_that_breaks_its_word_fails_the_batch(function):
    with pytest.raises(BackendError, match="model 'm' failed on this batch"):
        StubBackend("m", [X], [Y], function).infer(ROWS)


def test_a_scalar_stays_a_scalar():
    scalar = TensorSpec("y", "FP32", ())
    (y,) = StubBackend("m", [X], [scalar], lambda inputs: [inputs["x"].sum()]).infer(ROWS)
    assert (y.shape, y.dtype) == ((), np.float32)


def test_a_transposed_result_comes_out_in_row_major_order():
    (y,) = StubBackend("m", [X], [Y], lambda inputs: [np.ones((3, 2), np.float32).T]).infer(ROWS)
    assert y.shape == (2, 3)
    assert y.flags.c_contiguous
