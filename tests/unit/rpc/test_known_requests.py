"""A request that looks like an earlier one is understood as a parser would understand it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from headrace.errors import ServingError
from headrace.rpc.infer import _given, _queue_parameters
from headrace.rpc.known_requests import (
    LEARNED_BYTES_MAX,
    REQUESTS_PER_SIZE_MAX,
    SIZES_MAX,
    KnownRequests,
)
from headrace.tensors import Signature, TensorSpec


class Model:
    """As much of a served model as is looked at."""

    name = "m"
    version = "1"
    signature = Signature(
        "m",
        [TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT64", (-1, 1))],
        [TensorSpec("y", "FP32", (-1, 1)), TensorSpec("z", "FP32", (-1, 1))],
        max_batch_size=4,
    )


MODEL = Model()
DTYPES = {"FP32": np.float32, "INT64": np.int64, "BYTES": None}


def message(rows=1, names=("a", "b"), seed=0, request_id="", outputs=(), parameters=None, **fields):
    request = service_pb2.ModelInferRequest(model_name="m", id=request_id, **fields)
    for name, number in (parameters or {}).items():
        request.parameters[name].int64_param = number
    rng = np.random.default_rng(seed)
    for name in names:
        datatype, width = ("FP32", 2) if name == "a" else ("INT64", 1)
        request.inputs.add(name=name, datatype=datatype, shape=[rows, width])
        numbers = rng.integers(0, 255, (rows, width)).astype(DTYPES[datatype])
        request.raw_input_contents.append(numbers.tobytes())
    for output in outputs:
        request.outputs.add(name=output)
    return request.SerializeToString()


def understood(raw):
    """What parsing and checking says: (rows, raws, trailing, selection, id), or None."""
    try:
        request = service_pb2.ModelInferRequest.FromString(raw)
        given_tensors = _given(request, MODEL.signature)
        checked = MODEL.signature.check(given_tensors)
        selection = MODEL.signature.check_outputs([o.name for o in request.outputs])
        queued = _queue_parameters(request.parameters)
    except (ServingError, ValueError):
        return None
    return request, given_tensors, checked, selection, queued


def learn(known, raw):
    found = understood(raw)
    if found is not None:
        request, given_tensors, checked, selection, queued = found
        known.learn(raw, request, MODEL, given_tensors, checked, selection, queued)


def taught(*raws):
    known = KnownRequests(catalog=None)
    for raw in raws:
        learn(known, raw)
        learn(known, raw)  # a size seen once is only noted
        learn(known, raw)  # and so are its parameters
    return known


def assert_same(found, raw):
    request, _, checked, selection, queued = understood(raw)
    assert found.model is MODEL
    assert found.queued == queued
    assert (found.rows, found.trailing) == (checked.rows, checked.trailing)
    assert tuple(raw[start:stop] for start, stop in found.raw_spans) == checked.raws
    assert found.selection == selection
    span = found.id_span
    assert (raw[span[0] : span[1]] if span else b"") == request.id.encode()


@pytest.mark.parametrize(
    "like",
    [
        {},
        {"names": ("b", "a")},
        {"rows": 3},
        {"request_id": "r-1"},
        {"outputs": ("z",)},
        {"names": ("b", "a"), "request_id": "x" * 200, "outputs": ("z", "y"), "rows": 2},
        {"model_version": "1", "request_id": "7"},
    ],
)
def test_other_numbers_in_the_same_message_are_found_in_their_places(like):
    known = taught(message(seed=1, **like))
    later = message(seed=2, **like)

    assert_same(known.find(later), later)


def test_another_id_of_the_same_length_is_found():
    known = taught(message(request_id="first"))
    later = message(request_id="later", seed=3)

    assert_same(known.find(later), later)


def test_an_id_that_may_not_be_text_is_left_to_the_parser():
    first = message(request_id="first")

    assert taught(first).find(first.replace(b"first", b"\xff\xfe\xfd\xfc\xfb")) is None


def test_a_size_seen_once_is_only_noted():
    known = KnownRequests(catalog=None)
    learn(known, message())

    assert known.find(message()) is None


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(message() + b"\x0a\x01n", id="another model name at the end"),
        pytest.param(message(request_id="one") + b"\x1a\x03two", id="another id at the end"),
        pytest.param(message() + b"\xf8\x3f\x01", id="an unknown field"),
    ],
)
def test_what_no_protobuf_library_writes_is_not_learned(raw):
    assert taught(raw).find(raw) is None


@pytest.mark.parametrize("parameters", [{"timeout": 500}, {"priority": 2}, {"caller": 7}])
def test_parameters_that_come_again_as_they_are_are_understood(parameters):
    known = taught(message(parameters=parameters))
    later = message(parameters=parameters, seed=2)

    assert_same(known.find(later), later)
    assert known.find(message(parameters=dict.fromkeys(parameters, 501))) is None


def test_a_parameter_that_is_another_each_time_is_left_to_the_parser():
    known = KnownRequests(catalog=None)
    for number in range(300, 320):
        learn(known, message(parameters={"timeout": number}))

    assert not any(known._by_size.values())


def test_a_reserved_parameter_is_not_learned():
    raw = message(parameters={"triton_x": 1})

    assert understood(raw) is None
    assert taught(raw).find(raw) is None


def test_typed_contents_are_checked_each_time():
    request = service_pb2.ModelInferRequest(model_name="m")
    a = request.inputs.add(name="a", datatype="FP32", shape=[1, 2])
    a.contents.fp32_contents.extend([1, 2])
    b = request.inputs.add(name="b", datatype="INT64", shape=[1, 1])
    b.contents.int64_contents.append(3)
    raw = request.SerializeToString()

    assert understood(raw) is not None
    assert taught(raw).find(raw) is None


def test_memory_is_bounded():
    known = KnownRequests(catalog=None)
    for length in range(SIZES_MAX + 10):
        for _ in range(2):
            learn(known, message(request_id="x" * length))
    for seed in range(20):
        learn(known, message(request_id="x" * (SIZES_MAX + 5), outputs=("y",) * (seed % 2)))

    for length in range(SIZES_MAX + 10):
        for _ in range(3):
            learn(known, message(parameters={"p" * length: 1}))

    assert len(known._parameters) <= len(known._by_size) <= SIZES_MAX
    assert all(len(found) <= REQUESTS_PER_SIZE_MAX for found in known._by_size.values())


def test_a_large_message_is_not_learned():
    raw = message(request_id="x" * LEARNED_BYTES_MAX)

    assert taught(raw).find(raw) is None


kinds = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 4),
        "names": st.sampled_from([("a", "b"), ("b", "a")]),
        "request_id": st.text(max_size=4),
        "outputs": st.sampled_from([(), ("y",), ("z",), ("z", "y")]),
        "seed": st.integers(0, 5),
        "parameters": st.sampled_from([{}, {"timeout": 5}, {"priority": 1, "timeout": 300}]),
    }
)


@given(st.lists(kinds, min_size=1, max_size=5), st.data())
def test_whatever_is_found_says_what_the_parser_says(likes, data):
    known = taught(*[message(**like) for like in likes])
    raw = bytearray(message(**data.draw(st.sampled_from(likes))))
    for _ in range(data.draw(st.integers(0, 3))):  # a caller who means harm
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = bytes(raw)

    found = known.find(raw)

    if found is not None:
        assert_same(found, raw)
