"""What is written by hand is what protobuf reads."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from headrace.rpc.wire import delimited, tag, varint
from headrace.v1 import prediction_service_pb2 as pb


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
