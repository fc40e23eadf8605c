"""A model that is run with a few batch sizes only gives the rows that it would give anyhow."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.padded import PaddedBackend
from headrace.backends.stub import StubBackend
from headrace.errors import BackendError
from headrace.tensors import TensorSpec

X, S = TensorSpec("x", "FP32", (-1, 2)), TensorSpec("s", "BYTES", (-1, 1))
Y, T = TensorSpec("y", "FP32", (-1, 1)), TensorSpec("t", "BYTES", (-1, 1))


def padded(sizes, seen, function=None):
    def run(inputs):
        seen.append(len(inputs["x"]))
        return [inputs["x"].sum(1, keepdims=True), inputs["s"]]

    return PaddedBackend("m", StubBackend("m", [X, S], [Y, T], function or run), sizes)


def batch(rows):
    texts = np.empty((rows, 1), np.object_)
    texts[:, 0] = [f"row {i}".encode() for i in range(rows)]
    return {"x": np.arange(2.0 * rows, dtype=np.float32).reshape(rows, 2), "s": texts}


@given(st.integers(1, 70), st.sets(st.integers(1, 20), min_size=1, max_size=4))
def test_rows_come_back_as_they_would_and_only_allowed_sizes_are_run(rows, sizes):
    seen = []
    given_rows = batch(rows)

    y, t = padded(sorted(sizes), seen).infer(given_rows)

    np.testing.assert_array_equal(y, given_rows["x"].sum(1, keepdims=True))
    assert t.tolist() == given_rows["s"].tolist()
    assert set(seen) <= sizes
    assert sum(seen) < rows + max(sizes)


@pytest.mark.parametrize(("rows", "run"), [(1, 1), (2, 4), (4, 4), (5, 16), (16, 16)])
def test_a_batch_is_filled_up_to_the_next_size_and_counted(rows, run):
    seen = []
    backend = padded([1, 4, 16], seen)

    backend.infer(batch(rows))

    assert seen == [run]
    assert backend.rows_added == run - rows


def test_a_batch_is_filled_up_with_rows_of_its_own():
    filled = []

    def keep(inputs):
        filled.append(inputs["x"][:, 0].tolist())
        return [inputs["x"][:, :1], inputs["s"]]

    padded([8], [], keep).infer(batch(3))

    assert filled == [[0, 2, 4, 0, 2, 4, 0, 2]]


@pytest.mark.parametrize("returned", [3, 7, 0])
def test_a_model_that_loses_rows_of_a_filled_batch_fails(returned):
    backend = padded([8], [], lambda inputs: [inputs["x"][:returned, :1], inputs["s"]])

    with pytest.raises(BackendError, match="a row for each row"):
        backend.infer(batch(3))


def test_threads_count_what_they_added():
    backend = padded([64], [])
    threads = [
        threading.Thread(target=lambda: [backend.infer(batch(1)) for _ in range(200)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert backend.rows_added == 4 * 200 * 63


def test_a_model_of_one_size_looks_as_if_it_took_any():
    fixed = TensorSpec("x", "FP32", (8, 2))
    other = TensorSpec("z", "FP32", (4, 2))
    stub = StubBackend("m", [fixed, other], [TensorSpec("y", "FP32", (8, 1))], dict)

    assert [spec.shape for spec in PaddedBackend("m", stub, [8]).inputs] == [(-1, 2), (4, 2)]
    assert [spec.shape for spec in PaddedBackend("m", stub, [8]).outputs] == [(-1, 1)]
    assert [spec.shape for spec in PaddedBackend("m", stub, [4, 8]).inputs] == [(8, 2), (4, 2)]


def test_the_model_is_freed_with_it():
    stub = StubBackend("m", [X], [Y], dict)
    PaddedBackend("m", stub, [1]).close()

    assert not hasattr(stub, "_function")
