"""Batches on the wire: what a gateway sends is what the monitor reads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.monitoring.records import (
    BatchRecord,
    Block,
    RecordSchema,
    column_names,
    from_wire,
    parse_prediction_id,
    to_wire,
)
from headrace.v1 import monitor_service_pb2 as pb

SCHEMA = RecordSchema(
    "homes",
    3,
    "ab" * 8,
    (
        Block("x", ("size", "age", "asked"), "FP32", (0, 2, None)),
        Block("word", ("word",), "BYTES", (1,)),
    ),
    (Block("price", ("price",), "FP32"), None),
)


def record(first_number, request_rows, rng, schema=SCHEMA):
    rows = sum(request_rows)
    words = np.empty((rows, 1), object)
    words[:, 0] = [f"w{i}".encode() for i in range(rows)]
    return BatchRecord(
        schema,
        first_number,
        request_rows,
        rows,
        {"x": rng.normal(size=(rows, 3)).astype(np.float32), "word": words},
        rng.integers(1, 5, (3, rows)).astype(np.uint8),
        [rng.normal(size=(rows, 1)).astype(np.float32), np.zeros((rows, 9), np.float32)],
        1_700_000_000.25,
        1_000,
    )


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4))
def test_what_is_read_is_what_was_sent(batches):
    rng = np.random.default_rng(0)
    records, number = [], 7
    for request_rows in batches:
        records.append(record(number, request_rows, rng))
        number += 100
    (message,) = to_wire(records)
    rows = from_wire(pb.PredictionBatch.FromString(message.SerializeToString()))

    assert (rows.model, rows.version) == ("homes", 3)
    assert rows.time_s == pytest.approx(1_700_000_000.25, abs=1e-3)
    assert rows.request_rows.tolist() == [n for r in records for n in r.request_rows]
    assert rows.request_numbers[0] == 7
    x = np.concatenate([r.inputs["x"] for r in records])
    statuses = np.concatenate([r.statuses for r in records], axis=1)
    for i, name in enumerate(("size", "age", "asked")):
        assert rows.features[name].values.tolist() == x[:, i].tolist()
    assert rows.features["size"].statuses.tolist() == statuses[0].tolist()
    assert rows.features["age"].statuses.tolist() == statuses[2].tolist()
    assert set(rows.features["asked"].statuses.tolist()) == {1}
    words = [w for r in records for w in r.inputs["word"][:, 0]]
    assert rows.features["word"].values.tolist() == words
    assert list(rows.predictions) == ["price"]


def test_rows_of_a_part_keep_their_place_in_their_request():
    rng = np.random.default_rng(0)
    whole = record(7, [1, 1], rng)
    in_part = record(9, [2, 1], rng)._replace(parts=([3, 10], [8, 0]))

    (message,) = to_wire([whole, in_part])
    rows = from_wire(pb.PredictionBatch.FromString(message.SerializeToString()))

    assert rows.request_numbers.tolist() == [7, 8, 3, 10]
    assert rows.first_rows.tolist() == [0, 0, 8, 0]
    assert from_wire(to_wire([whole])[0]).first_rows is None


def test_batches_of_different_versions_travel_apart():
    rng = np.random.default_rng(0)
    other = SCHEMA._replace(version=4)
    messages = to_wire([record(0, [1], rng), record(0, [2], rng, other), record(1, [3], rng)])
    assert [(m.model_version, sum(m.request_rows)) for m in messages] == [(3, 4), (4, 2)]


def test_long_text_travels_shortened():
    words = np.empty((1, 1), object)
    words[0, 0] = "é" * 1_000
    sent = record(0, [1], np.random.default_rng(0))
    (message,) = to_wire([sent._replace(inputs={**sent.inputs, "word": words})])
    assert len(from_wire(message).features["word"].values[0]) == 64


@pytest.mark.parametrize(
    ("trailing", "names"),
    [
        ((), ("x",)),
        ((1,), ("x",)),
        ((2,), ("x[0]", "x[1]")),
        ((-1,), None),
        ((0,), None),
        ((300,), None),
    ],
)
def test_columns_are_named_after_their_tensor(trailing, names):
    assert column_names("x", trailing) == names


def valid():
    (message,) = to_wire([record(0, [2, 1], np.random.default_rng(0))])
    return message


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda b: b.request_rows.append(1), "request numbers"),
        (lambda b: b.first_rows.append(1), "first rows"),
        (lambda b: b.request_numbers.__setitem__(0, 1 << 50), "hexadecimal"),
        (lambda b: b.request_rows.__setitem__(0, 1 << 30), "rows"),
        (lambda b: b.ClearField("request_rows"), "request"),
        (lambda b: setattr(b.inputs[0], "values", b"123"), "wrong size"),
        (lambda b: setattr(b.inputs[0], "datatype", "FP7"), "datatype"),
        (lambda b: setattr(b.inputs[0], "statuses", b"1"), "statuses"),
        (lambda b: setattr(b.inputs[1], "values", b"\xff\xff\xff\xff"), "word"),
        (lambda b: b.inputs[0].ClearField("columns"), "no columns"),
        (lambda b: b.inputs[0].columns.extend(["c"] * 2_000), "more than 1024"),
        (lambda b: setattr(b, "id_prefix", "p" * 65), "a name is too long"),
        (lambda b: setattr(b, "model_name", "p" * 300), "too long"),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(spoil, complaint):
    batch = valid()
    spoil(batch)
    with pytest.raises(ValueError, match=complaint):
        from_wire(batch)


@given(st.text(min_size=1, max_size=64), st.integers(0, 2**40 - 1), st.integers(0, 10_000))
def test_an_id_names_request_and_row(prefix, number, row):
    prefix = prefix.replace("/", "_")
    assert parse_prediction_id(f"{prefix}{number:010x}/{row}") == (prefix, number, row)
    assert parse_prediction_id(f"{prefix}{number:010x}") == (prefix, number, 0)


@pytest.mark.parametrize(
    "text", ["", "/", "abc", "0" * 10, "p" * 65 + "0" * 10, "p" + "0" * 10 + "/", "p00000G0000/1",
             "p0000000000/-1", "p0000000000/9999999999", "p0000000000/²"],
)  # fmt: skip
def test_what_is_no_id_is_none(text):
    assert parse_prediction_id(text) is None


@given(st.text())
def test_no_text_breaks_the_parser(text):
    parse_prediction_id(text)
