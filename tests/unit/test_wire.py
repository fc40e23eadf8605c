"""What is written by hand is what protobuf reads."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from headrace.errors import InvalidRequest
from headrace.v1 import prediction_service_pb2 as pb
from headrace.wire import (
    delimited,
    first_fields,
    has_more_fields,
    refuse_costly_parse,
    tag,
    varint,
)


@given(st.integers(0, 2**63 - 1))
def test_a_varint_is_read_back(value):
    message = service_pb2.ModelReadyResponse()
    raw = varint(1 << 3) + varint(value)

    message.MergeFromString(raw)

    assert message.ready == bool(value)
    parameter = service_pb2.InferParameter.FromString(varint(2 << 3) + varint(value))
    assert parameter.int64_param == value


@given(st.binary(max_size=300), st.text(max_size=200))
def test_parts_put_together_are_one_message(raw, request_id):
    head = service_pb2.ModelInferResponse(model_name="m").SerializeToString()

    reply = service_pb2.ModelInferResponse.FromString(
        head + delimited(tag(3), request_id.encode()) + delimited(tag(6), raw)
    )

    assert (reply.model_name, reply.id) == ("m", request_id)
    assert list(reply.raw_output_contents) == [raw]


@given(st.lists(st.floats(width=32), max_size=50))
def test_an_arrays_bytes_are_a_packed_field(values):
    array = np.array(values, "<f4")

    column = pb.FloatColumn.FromString(delimited(tag(1), array.tobytes()))

    np.testing.assert_array_equal(np.array(column.values, np.float32), array)


PATH = (5, 5, 8)


def infer(*, raw=b"", numbers=0, texts=()):
    message = service_pb2.ModelInferRequest(model_name="m")
    tensor = message.inputs.add(name="x", datatype="INT64", shape=[1])
    tensor.contents.int64_contents.extend([1] * numbers)
    tensor.contents.bytes_contents.extend(texts)
    if raw:
        message.raw_input_contents.append(raw)
    return message.SerializeToString()


@pytest.mark.parametrize(
    "message",
    [
        infer(numbers=900),
        infer(raw=bytes(100_000)),
        infer(texts=[bytes(60_000), bytes(60_000)]),
        infer(raw=bytes(100_000), texts=[b"a"] * 100, numbers=100),
    ],
    ids=["few numbers", "raw bytes", "long texts", "some of each"],
)
def test_what_costs_the_parser_little_is_parsed(message):
    refuse_costly_parse(message, PATH, 1_000, "contents")


@pytest.mark.parametrize(
    "message",
    [
        infer(numbers=1_100),
        infer(numbers=1_100, raw=bytes(50_000)),
        infer(texts=[b"a"] * 20_000),
        b"\xff" * 2_000,
        b"\x08\x01" * 1_000,
        b"\x32\xff\xff\xff\xff\x0f" + bytes(2_000),
    ],
    ids=["numbers", "numbers before raw bytes", "many texts", "noise", "varints", "a lying length"],
)
def test_what_may_cost_the_parser_much_is_refused(message):
    with pytest.raises(InvalidRequest, match="too much in typed contents"):
        refuse_costly_parse(message, PATH, 1_000, "contents")


@given(st.binary(max_size=3_000), st.integers(0, 100))
def test_no_message_breaks_the_look_ahead(message, limit):
    with contextlib.suppress(InvalidRequest):
        refuse_costly_parse(message, PATH, limit, "contents")


@given(st.text(max_size=300), st.text(max_size=3), st.text(max_size=200), st.binary(max_size=99))
def test_the_first_fields_are_read_as_a_parser_reads_them(model, version, request_id, raw):
    message = service_pb2.ModelInferRequest(
        model_name=model, model_version=version, id=request_id, raw_input_contents=[raw]
    )

    fields, end = first_fields(message.SerializeToString(), 3)

    assert [field.decode() for field in fields] == [model, version, request_id]
    message.raw_input_contents.pop()
    assert end == message.ByteSize()


@given(st.binary(max_size=60))
def test_what_is_no_message_has_some_first_fields_or_none(message):
    fields, end = first_fields(message, 3)

    assert len(fields) == 3
    assert all(field in message for field in fields)
    assert end >= 0


def test_fields_that_are_written_later_are_not_among_the_first():
    later = delimited(tag(4), b"four") + delimited(tag(1), b"one")

    assert first_fields(later, 2) == ([b"", b""], 0)


@given(st.lists(st.sampled_from(["text", "number", "fixed32", "fixed64"]), max_size=30))
def test_the_fields_at_the_top_are_counted_and_those_below_are_not(kinds):
    below = delimited(tag(1), b"x" * 5) * 50
    fields = {
        "text": delimited(tag(3), below),
        "number": varint(4 << 3) + varint(1 << 40),
        "fixed32": varint(5 << 3 | 5) + bytes(4),
        "fixed64": varint(6 << 3 | 1) + bytes(8),
    }
    message = b"".join(fields[kind] for kind in kinds)

    assert not has_more_fields(message, len(kinds))
    assert has_more_fields(message, len(kinds) - 1) is bool(kinds)


def test_groups_hide_no_fields():
    assert has_more_fields(b"\x0b\x0c" + delimited(tag(3), b"") * 50, 20)  # a group, empty


@given(st.binary(max_size=300), st.integers(0, 20))
def test_no_message_breaks_the_count(message, limit):
    has_more_fields(message, limit)
