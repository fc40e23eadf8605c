"""What a model has run before its first caller."""

import numpy as np
import pytest

from headrace.backends.stub import StubBackend
from headrace.backends.warm_up import MAX_WARM_UP_BYTES, MAX_WARM_UP_ROWS, warm_up
from headrace.tensors import TensorSpec

Y = TensorSpec("y", "FP32", (-1, 1))


def shapes_of(inputs, max_batch_size, preferred=()):
    seen = []

    def run(arrays):
        seen.append({name: array.shape for name, array in arrays.items()})
        return [np.zeros((1, 1), np.float32)]

    assert warm_up(StubBackend("m", inputs, [Y], run), max_batch_size, preferred)
    return seen


def test_one_row_each_preferred_batch_and_the_largest_are_run():
    inputs = [TensorSpec("x", "FP32", (-1, 3)), TensorSpec("s", "BYTES", (-1, -1))]

    assert shapes_of(inputs, 32, (8,)) == [{"x": (rows, 3), "s": (rows, 1)} for rows in (1, 8, 32)]


def test_every_allowed_batch_is_run_and_no_other_however_large_it_is():
    seen = []

    def run(arrays):
        seen.append(len(arrays["x"]))
        return [np.zeros((1, 1), np.float32)]

    backend = StubBackend("m", [TensorSpec("x", "FP32", (-1, 1))], [Y], run)
    assert warm_up(backend, 1024, [8], [4, 16, 1024])
    assert seen == [4, 16, 1024]


def test_every_given_shape_is_run_with_every_batch():
    seen = []

    def run(arrays):
        seen.append((arrays["ids"].shape, arrays["free"].shape))
        return [np.zeros((1, 1), np.float32)]

    inputs = [TensorSpec("ids", "INT64", (-1, -1, 2)), TensorSpec("free", "FP32", (-1, -1))]
    assert warm_up(
        StubBackend("m", inputs, [Y], run), 8, [], [4, 8], [{"ids": [16]}, {"ids": [32]}]
    )
    assert seen == [((rows, size, 2), (rows, 1)) for size in (16, 32) for rows in (4, 8)]


def test_a_model_without_a_batch_dimension_is_run_once():
    assert shapes_of([TensorSpec("x", "FP32", (2, -1))], 0) == [{"x": (2, 1)}]


@pytest.mark.parametrize(
    ("width", "most"), [(1, MAX_WARM_UP_ROWS), (1 << 20, MAX_WARM_UP_BYTES >> 22), (1 << 26, 1)]
)
def test_a_large_batch_is_not_run_at_any_price(width, most):
    seen = shapes_of([TensorSpec("x", "FP32", (-1, width))], 100_000)

    assert seen[-1] == {"x": (most, width)}


def test_a_model_that_cannot_run_zeros_is_left_as_it_is():
    def divide(arrays):
        raise ZeroDivisionError

    assert not warm_up(StubBackend("m", [TensorSpec("x", "FP32", (-1, 1))], [Y], divide), 8, ())
