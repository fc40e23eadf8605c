"""Requests of different shapes share batches, and each gets what it would have got alone."""

import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from headrace.backends.stub import StubBackend
from headrace.batching.batcher import Batcher
from headrace.batching.policy import BatchPolicy
from headrace.errors import BackendError, InvalidTensor
from headrace.predict import ServedModel
from headrace.repository.shapes import BucketRules
from headrace.request import Request
from headrace.rpc.infer import InferRequest
from headrace.shape_buckets import ShapeBuckets
from headrace.telemetry.metrics import Metrics
from headrace.tensors import CheckedInputs, GivenTensor, Signature, TensorSpec, encode

TIMEOUT_S = 10.0
IDS, WORDS = TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("words", "BYTES", (-1, -1, 2))
TWICE, TOTAL = TensorSpec("twice", "INT64", (-1, -1)), TensorSpec("total", "INT64", (-1, 1))
ECHO = TensorSpec("echo", "BYTES", (-1, -1, 2))
OUTPUTS = [TWICE, TOTAL, ECHO]
RULES = BucketRules(
    sizes={"tokens": (4, 8, 32)},
    inputs={"ids": ("tokens",), "words": ("tokens",)},
    outputs={"twice": ("tokens",), "echo": ("tokens",)},
    pad={"words": "-"},
)


class Caller(Request):
    """Rows of `length` tokens from `first` on, that keeps what it was told."""

    def __init__(self, signature, rows, length, first=0):
        self.ids = np.arange(first, first + rows * length).reshape(rows, length)
        self.words = np.array(
            [[[b"%d" % i, b"w"] for i in row] for row in self.ids.tolist()], np.object_
        ).reshape(rows, length, 2)
        checked = signature.check(
            [
                GivenTensor("ids", "INT64", self.ids.shape, self.ids.tobytes()),
                GivenTensor("words", "BYTES", self.words.shape, encode(self.words)),
            ]
        )
        super().__init__(checked, float("inf"), time.perf_counter(), 8)
        self.answers = None
        self.raws_told = None
        self.shapes = None
        self.error = None
        self.done = threading.Event()

    def expired(self, now_s):
        return False

    def answer(self, batch, start, prediction_id):
        stop = start + self.rows
        self.answers = [block.rows(start, stop) for block in batch.outputs]
        self.raws_told = [block.raw(start, stop) for block in batch.outputs]
        self.shapes = batch.output_shapes
        self.done.set()

    def fail(self, error):
        self.error = error
        self.done.set()


class Served:
    """A model that doubles, adds up and echoes whatever it gets."""

    def __init__(self, *, max_batch_size=8, function=None, rules=RULES, max_request_rows=0):
        self.seen = []
        self.gate = threading.Event()
        self.gate.set()
        self.backend = StubBackend(
            "m", [IDS, WORDS], OUTPUTS, function or self._run, gate=self.gate
        )
        self.signature = Signature("m", [IDS, WORDS], OUTPUTS, max_batch_size, max_request_rows)
        self.model = ServedModel(
            name="m",
            version="1",
            signature=self.signature,
            backend=self.backend,
            batcher=Batcher(BatchPolicy(max_batch_size), max_queue_size=200),
            metrics=Metrics().model("m", "1"),
            buckets=ShapeBuckets(rules, self.signature),
        )
        self.model.start()

    def _run(self, inputs):
        self.seen.append((inputs["ids"].shape, inputs["words"].shape))
        ids = inputs["ids"]
        return [ids * 2, ids.sum(1, keepdims=True), inputs["words"]]

    def callers(self, *shapes):
        """Make callers of (rows, length) and have them share batches."""
        callers = [Caller(self.signature, *shape, first=100 * i) for i, shape in enumerate(shapes)]
        self.gate.clear()
        self.model.submit(Caller(self.signature, 1, 1))
        assert self.backend.entered.acquire(timeout=TIMEOUT_S)
        for caller in callers:
            self.model.submit(caller)
        self.gate.set()
        for caller in callers:
            assert caller.done.wait(TIMEOUT_S)
        return callers

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.gate.set()
        assert self.model.stop(TIMEOUT_S)


def right(caller):
    """Say whether a caller got what its own rows give, in its own shapes."""
    expected = [caller.ids * 2, caller.ids.sum(1, keepdims=True), caller.words]
    return (
        caller.error is None
        and all(
            got.shape == want.shape and got.tolist() == want.tolist()
            for got, want in zip(caller.answers, expected, strict=True)
        )
        and caller.raws_told == [encode(want) for want in expected]
        and caller.shapes == tuple(want.shape[1:] for want in expected)
    )


@given(shapes=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 32)), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_whatever_shapes_share_a_batch_each_gets_its_own_rows_in_its_own_shape(shapes):
    with Served() as served:
        callers = served.callers(*shapes)

    assert all(map(right, callers))
    assert {ids[1] for ids, _ in served.seen} <= {4, 8, 32}
    assert all(words[:2] == ids for ids, words in served.seen)


def test_requests_of_one_bucket_are_one_batch():
    with Served() as served:
        callers = served.callers((1, 5), (2, 8), (1, 6), (1, 3))

    assert all(map(right, callers))
    assert served.seen[1:] == [((4, 8), (4, 8, 2)), ((1, 4), (1, 4, 2))]


def test_rows_are_padded_with_what_the_configuration_says():
    padded = []

    def keep(inputs):
        padded.append((inputs["ids"].tolist(), inputs["words"].tolist()))
        return [inputs["ids"], inputs["ids"][:, :1], inputs["words"]]

    rules = BucketRules(RULES.sizes, RULES.inputs, RULES.outputs, {"ids": -1, "words": "<pad>"})
    with Served(function=keep, rules=rules) as served:
        served.callers((1, 2))

    assert padded[-1] == (
        [[0, 1, -1, -1]],
        [[[b"0", b"w"], [b"1", b"w"], [b"<pad>", b"<pad>"], [b"<pad>", b"<pad>"]]],
    )


def test_a_request_in_parts_is_padded_and_cut_like_any_other():
    with Served(max_batch_size=2, max_request_rows=20) as served:
        callers = served.callers((7, 5), (1, 3))

    assert all(map(right, callers))


def test_more_than_the_largest_size_is_refused_with_the_limit():
    with Served() as served, pytest.raises(InvalidTensor) as refused:
        served.model.submit(Caller(served.signature, 1, 33))

    assert "'ids' for model 'm' has 33 in dimension 1; at most 32 are accepted" in str(
        refused.value
    )


def test_inputs_that_differ_in_a_dimension_they_share_are_refused():
    signature = Signature("m", [IDS, WORDS], OUTPUTS, 8)
    buckets = ShapeBuckets(RULES, signature)

    assert buckets.place(((3,), (3, 2))) == ((4,), (4, 2))
    with pytest.raises(InvalidTensor, match=r"'words' .* has 4 .*, and input 'ids' has 3 there"):
        buckets.place(((3,), (4, 2)))


def test_dimensions_without_a_name_are_left_alone():
    image = TensorSpec("image", "FP32", (-1, -1, -1, 3))
    signature = Signature("m", [image], [TWICE], 8)
    rules = BucketRules({"height": (16, 64)}, {"image": ("height", None)}, {}, {})

    assert ShapeBuckets(rules, signature).place(((17, 20, 3),)) == ((64, 20, 3),)


def test_a_model_whose_output_does_not_follow_its_input_fails_and_is_not_cut():
    def short(inputs):
        return [inputs["ids"][:, :1], inputs["ids"][:, :1], inputs["words"]]

    with Served(function=short) as served:
        (caller,) = served.callers((1, 5))

    assert isinstance(caller.error, BackendError)
    assert "output 'twice' of model 'm' does not follow 'tokens'" in str(caller.error)


def test_two_shapes_of_one_bucket_have_replies_of_their_own_shapes_over_the_wire():
    class Call:
        arrival_s = 0.0
        gone = False

        def reply(self, message):
            self.message = message

    calls = [Call(), Call()]
    with Served() as served:
        callers = [Caller(served.signature, 1, length) for length in (2, 3)]
        batch = []
        for call, caller in zip(calls, callers, strict=True):
            checked = CheckedInputs(1, caller.raws, caller.own_shapes)
            request = InferRequest(call, None, checked, math.inf, b"", (0, 1, 2), 8)
            request.batch_key = served.model._buckets.place(request.own_shapes)
            batch.append(request)
        served.model._carrier.carry(batch)

    for call, caller in zip(calls, callers, strict=True):
        reply = service_pb2.ModelInferResponse.FromString(call.message)
        length = caller.ids.shape[1]
        assert [list(one.shape) for one in reply.outputs] == [[1, length], [1, 1], [1, length, 2]]
        assert reply.raw_output_contents[0] == (caller.ids * 2).tobytes()
        assert reply.raw_output_contents[2] == encode(caller.words)
