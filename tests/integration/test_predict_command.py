"""`headrace predict` as somebody at a terminal meets it."""

import json
import re
from argparse import Namespace

import pytest

import headrace.__main__
from headrace.terminal import printable


@pytest.fixture
def run(gateway, monkeypatch, capsys):
    """Run the command in this process: starting another takes longer than all else."""
    monkeypatch.setattr(headrace.__main__, "set_up_logs", lambda _: None)

    def run(*arguments, address=gateway.grpc_address):
        code = headrace.__main__.main(["predict", *arguments, "--address", address])
        return Namespace(returncode=code, **capsys.readouterr()._asdict())

    return run


def answer(done):
    assert done.returncode == 0, done.err
    return json.loads(done.out)


def refusal(done):
    assert done.returncode == 2
    (line,) = done.err.splitlines()
    return line


def test_entities_are_predicted_and_their_features_shown(run):
    found = answer(
        run(
            *("driver_trip", "driver_id=1,5", "distance=2.5", "--features", "--json"),
        )
    )
    assert found["model"] == "driver_trip"
    assert found["outputs"]["y"][0] == [4.5, 10.0, 2.5]
    assert found["features"]["rating"][0]["status"] == "PRESENT"
    assert found["features"]["rating"][0]["value"] == 4.5
    assert found["features"]["rating"][1] == {"value": None, "status": "NOT_FOUND", "age_s": None}
    assert found["timings_ms"]["total"] > 0
    assert len(found["prediction_id"]) == 26


def test_a_row_of_several_values_is_a_json_list(run):
    found = answer(run("scores", "x=[[1,2,3,4],[0,0,0,1]]", "--json"))
    assert found["outputs"]["y"] == [10.0, 1.0]
    assert answer(run("scores", "x=[1,2,3,4]", "--json"))["outputs"]["y"] == [10.0]


@pytest.mark.parametrize(
    ("datatype", "row"),
    [("int64", [-3, 2**40]), ("bool", [True, False]), ("bytes", ["é", "b"]), ("fp64", [0.1, -2.0])],
)
def test_every_datatype_travels(run, datatype, row):
    found = answer(run(f"echo_{datatype}", f"x={json.dumps(row)}", "--json"))
    assert found["outputs"]["y"] == [row]


def test_text_comes_back_as_it_was_sent(run):
    sent = [":smile:", "[red]a, b[/red]"]
    assert answer(run("echo_bytes", f"x={json.dumps(sent)}", "--json"))["outputs"]["y"] == [sent]


def test_what_json_has_no_number_for_is_text(run):
    found = answer(run("echo_fp32", "x=[NaN,-Infinity]", "--json"))
    assert found["outputs"]["y"] == [["NaN", "-Infinity"]]


def test_a_model_without_rows_takes_a_tensor(run):
    tensor = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert answer(run("whole", f"x={json.dumps(tensor)}", "--json"))["outputs"]["y"] == [tensor]


def test_the_prediction_id_is_not_broken_by_a_narrow_table(run):
    done = run("echo_fp32", "x=[1,2]")
    assert re.fullmatch(r"echo_fp32 version 1, prediction [0-9a-f]{26}", done.out.splitlines()[0])


def test_a_model_that_does_not_serve_is_not_taken_for_a_server_that_is_not_there(run):
    said = refusal(run("corrupt", "x=1"))
    assert "has no version that can serve; `headrace models list` says why" in said


@pytest.mark.parametrize("given", ["nan", "0", "-1", "inf", "soon"])
def test_a_time_limit_that_is_none_is_refused_before_anything_is_asked(run, capsys, given):
    with pytest.raises(SystemExit, match="2"):
        run("scores", "x=[1,2,3,4]", "--timeout-s", given)
    assert "--timeout-s" in capsys.readouterr().err


def test_people_get_a_table(run):
    done = run("driver_trip", "driver_id=1", "distance=2.5", "--features")
    assert done.returncode == 0
    for shown in ("driver_trip version 1", "4.5, 10, 2.5", "PRESENT", "in the server:"):
        assert shown in done.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nobody", "x=1"], "unknown model: 'nobody'"),
        (["nobody", "x=1"], "it serves"),
        (["driver_trip", "driver_id=1"], "also needs distance; it takes driver_id (INT64)"),
        (["driver_trip", "driver_id=1", "z=2"], "has no column 'z'"),
        (["driver_trip", "driver_id=one", "distance=1"], "column 'driver_id': 'one' is no INT64"),
        (["driver_trip", "driver_id=99999999999999999999", "distance=1"], "is no INT64"),
        (["driver_trip", "driver_id=1,2", "distance=1,2,3"], "driver_id 2, distance 3"),
        (["driver_trip", "driver_id"], "expected column=value"),
        (["driver_trip", "driver_id=1", "driver_id=2"], "is there twice"),
        (["driver_trip", "driver_id=[[1]]", "distance=1"], "expected one value a row"),
        (["driver_trip", "driver_id=1", "distance=1e40"], "'1e40' is no FP32"),
        (["driver_\udcfftrip", "driver_id=1"], "is not UTF-8"),
        (["scores", "x=1,2,3,4"], "expected a JSON list of shape [4] for a row"),
        (["scores", "x=[1,"], "not a JSON list"),
        (["scores", "x=[[1,2,3,4],[1]]"], "rows of different lengths"),
        (["scores", "x=[1,2,3,4]", "--features"], "one value per row"),
        (["scores", "x=[1,2,3,4]", "--version", "9"], "version"),
        (["scores", "x=[1,2,3,4]", "--version", "0"], "version"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_what_could(run, arguments, complaint):
    assert complaint in refusal(run(*arguments))


def test_what_the_server_refuses_is_said_in_one_line(run):
    done = run("scores", "x=[1,2,3]")
    assert done.returncode == 1
    (line,) = done.err.splitlines()
    assert line.startswith("headrace predict: INVALID_ARGUMENT: ")


def test_nobody_at_the_address_is_said(run):
    done = run("scores", "x=1", address="127.0.0.1:1")
    assert "is `headrace serve` running there?" in refusal(done)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢", "plain é 漢"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb", "a\\nb"),
        (None, ""),
        ("a\u202eb", "a\\u202eb"),
    ],
)
def test_nothing_that_is_printed_moves_the_cursor(text, shown):
    assert printable(text) == shown
