"""What a version must prove before it serves."""

import hashlib
import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from headrace.backends.stub import StubBackend
from headrace.errors import ModelLoadError
from headrace.repository import validate
from headrace.repository.validate import check_golden, check_manifest
from headrace.tensors import NUMPY_DTYPES, TensorSpec


def refusal(check, *arguments):
    with pytest.raises(ModelLoadError) as refused:
        check(*arguments)
    return str(refused.value)


@pytest.fixture
def version(tmp_path):
    """A version folder with two files, one of them in a folder, and a manifest of both."""
    (tmp_path / "model.onnx").write_bytes(b"model")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(b"weights")
    write_manifest(tmp_path)
    return tmp_path


def digest(data):
    return hashlib.sha256(data).hexdigest()


def write_manifest(folder, **changes):
    files = {"model.onnx": digest(b"model"), "weights/w.bin": digest(b"weights"), **changes}
    listed = {name: value for name, value in files.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps({"files": listed}))


def test_files_that_are_as_listed_pass(version):
    check_manifest(version)


def test_without_a_manifest_any_file_passes(version):
    (version / "manifest.json").unlink()
    check_manifest(version)


def test_a_changed_file_is_refused(version):
    (version / "weights" / "w.bin").write_bytes(b"weightS")
    assert refusal(check_manifest, version) == (
        f"weights/w.bin: sha256 is {digest(b'weightS')[:12]}…, "
        f"but {digest(b'weights')[:12]}… in manifest.json"
    )


def test_a_missing_file_is_refused(version):
    (version / "weights" / "w.bin").unlink()
    assert refusal(check_manifest, version) == "weights/w.bin: listed in manifest.json and missing"


@pytest.mark.parametrize("name", ["other.onnx", "weights/v.bin", ".hidden"])
def test_an_unlisted_file_is_refused(version, name):
    (version / name).write_bytes(b"")
    assert refusal(check_manifest, version) == f"{name}: not listed in manifest.json"


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/hostname", "weights/../model.onnx", "./model.onnx", "weights//w.bin", ""],
)
def test_a_path_that_leads_elsewhere_is_refused(version, name):
    (version.parent / "secret").write_bytes(b"secret")
    write_manifest(version, **{name: digest(b"secret")})
    assert refusal(check_manifest, version) == (
        f"manifest.json: {name!r} is not a path in the folder"
    )


@pytest.mark.parametrize("value", ["", "0" * 63, "0" * 65, "G" * 64, digest(b"model").upper(), 1])
def test_a_digest_that_is_none_is_refused(version, value):
    write_manifest(version, **{"model.onnx": value})
    assert refusal(check_manifest, version) == (
        "manifest.json: 'model.onnx' has no sha256 of 64 hex digits"
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"files": []}', "\xff", "[" * 100_000]
)
def test_a_manifest_of_another_form_is_refused(version, text):
    (version / "manifest.json").write_bytes(text.encode("latin-1"))
    assert refusal(check_manifest, version).startswith('manifest.json: expected {"files": ')


def test_a_huge_manifest_is_refused_unread(version, monkeypatch):
    monkeypatch.setattr(validate, "MAX_MANIFEST_SIZE", 10)
    assert refusal(check_manifest, version) == "manifest.json: longer than 10 bytes"


def test_a_version_with_too_many_files_is_refused(version, monkeypatch):
    monkeypatch.setattr(validate, "MAX_FILES", 2)
    assert refusal(check_manifest, version) == "the version has more than 2 files"


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("target", ["model.onnx", "/etc/hostname", "nowhere", ".."])
def test_a_symbolic_link_is_refused_wherever_it_leads(version, has_manifest, target):
    if not has_manifest:
        (version / "manifest.json").unlink()
    (version / "weights" / "link").symlink_to(target)
    assert refusal(check_manifest, version) == "weights/link: a symbolic link"


def test_a_version_that_is_a_symbolic_link_is_refused(version, tmp_path_factory):
    link = tmp_path_factory.mktemp("models") / "1"
    link.symlink_to(version)
    assert refusal(check_manifest, link) == "the version's folder is a symbolic link"


def test_a_pipe_is_refused_unread(version):
    os.mkfifo(version / "pipe")
    assert refusal(check_manifest, version) == "pipe: not a regular file"


def doubler(datatype="FP32", shape=(-1, 2)):
    def double(inputs):
        return [inputs["x"] * 2, inputs["x"][:, :1]]

    y, z = TensorSpec("y", datatype, shape), TensorSpec("z", datatype, (-1, 1))
    return StubBackend("m", [TensorSpec("x", datatype, shape)], [y, z], double)


X = np.array([[1, 2], [3, 4]], np.float32)
Y, Z = X * 2, X[:, :1]


def golden(folder, **arrays):
    np.savez(folder / "golden.npz", **{name.replace("_", ":"): a for name, a in arrays.items()})


def test_answers_that_are_golden_pass(tmp_path):
    golden(tmp_path, in_x=X, out_y=Y, out_z=Z)
    assert check_golden(tmp_path, doubler())


def test_without_golden_answers_nothing_is_run(tmp_path):
    model = doubler()
    assert not check_golden(tmp_path, model)
    assert not model.entered.acquire(blocking=False)


def test_a_part_of_the_outputs_is_enough(tmp_path):
    golden(tmp_path, in_x=X, out_z=Z)
    assert check_golden(tmp_path, doubler())


def test_a_wrong_answer_is_refused_with_the_place(tmp_path):
    golden(tmp_path, in_x=X, out_y=np.array([[2, 4], [6, 9]], np.float32))
    assert refusal(check_golden, tmp_path, doubler()) == (
        "golden.npz: output 'y' differs in 1 of 4 values; at [1, 1] it is 8.0, golden is 9.0"
    )


@pytest.mark.parametrize(
    ("datatype", "off", "is_close"),
    [
        ("FP16", 1e-2, True),
        ("FP16", 1e-1, False),
        ("FP32", 1e-4, True),
        ("FP32", 3e-4, False),
        ("FP64", 1e-4, True),
        ("FP64", 3e-4, False),
        ("INT64", 1, False),
    ],
)
def test_numbers_may_differ_as_much_as_their_datatype_allows(tmp_path, datatype, off, is_close):
    dtype = NUMPY_DTYPES[datatype]
    golden(tmp_path, in_x=X.astype(dtype), out_y=(Y.astype(np.float64) + off).astype(dtype))
    if is_close:
        assert check_golden(tmp_path, doubler(datatype))
    else:
        assert "differs in" in refusal(check_golden, tmp_path, doubler(datatype))


@pytest.mark.parametrize(
    ("datatype", "off", "is_close"),
    [("FP32", 1e-2, True), ("FP32", 1e-1, False), ("FP64", 3e-4, False), ("INT64", 1, False)],
)
def test_only_fp32_loses_digits_where_it_is_computed_coarsely(tmp_path, datatype, off, is_close):
    dtype = NUMPY_DTYPES[datatype]
    golden(tmp_path, in_x=X.astype(dtype), out_y=(Y.astype(np.float64) + off).astype(dtype))
    if is_close:
        assert check_golden(tmp_path, doubler(datatype), is_coarse=True)
    else:
        with pytest.raises(ModelLoadError, match="differs in"):
            check_golden(tmp_path, doubler(datatype), is_coarse=True)


def test_nan_and_infinity_equal_only_themselves(tmp_path):
    special = np.array([[np.nan, np.inf], [-np.inf, 1]], np.float32)
    golden(tmp_path, in_x=special, out_y=special * 2)
    assert check_golden(tmp_path, doubler())
    golden(tmp_path, in_x=special, out_y=np.nan_to_num(special * 2))
    assert "differs in 3 of 4" in refusal(check_golden, tmp_path, doubler())


@pytest.mark.parametrize("dtype", ["S", "U"])
def test_bytes_are_golden_as_fixed_width_arrays(tmp_path, dtype):
    x = TensorSpec("x", "BYTES", (-1, 1))
    upper = StubBackend(
        "m",
        [x],
        [TensorSpec("y", "BYTES", (-1, 1))],
        lambda inputs: [np.array([[v[0].decode().upper()] for v in inputs["x"]], object)],
    )
    golden(tmp_path, in_x=np.array([["ab"], ["c"]], dtype), out_y=np.array([["AB"], ["C"]], dtype))
    assert check_golden(tmp_path, upper)
    golden(tmp_path, in_x=np.array([["ab"], ["c"]], dtype), out_y=np.array([["AB"], ["X"]], dtype))
    assert "it is C, golden is b'X'" in refusal(check_golden, tmp_path, upper)


@pytest.mark.parametrize(
    ("arrays", "fact"),
    [
        ({"out_y": Y}, "there is no array 'in:x'"),
        ({"in_x": X}, "there is no array 'out:<name>'"),
        ({"in_x": X, "out_y": Y, "out_w": Y}, "the model has nothing for the array 'out:w'"),
        ({"in_x": X, "out_y": Y, "labels": Y}, "the model has nothing for the array 'labels'"),
        ({"in_x": X.astype("f8"), "out_y": Y}, "'in:x' is float64; expected FP32"),
        ({"in_x": X, "out_y": Y.astype("S")}, "'out:y' is |S32; expected FP32"),
        ({"in_x": X[:, :1], "out_y": Y}, "'in:x' has the shape [2, 1]; expected [-1, 2]"),
        ({"in_x": X[0], "out_y": Y}, "'in:x' has the shape [2]; expected [-1, 2]"),
        ({"in_x": X, "out_y": Y[:1]}, "output 'y' has the shape [2, 2]; golden is [1, 2]"),
    ],
)
def test_golden_arrays_must_fit_the_model(tmp_path, arrays, fact):
    golden(tmp_path, **arrays)
    assert refusal(check_golden, tmp_path, doubler()) == f"golden.npz: {fact}"


def test_golden_inputs_that_fail_are_refused(tmp_path):
    golden(tmp_path, in_x=X, out_y=Y)
    y = TensorSpec("y", "FP32", (-1, 2))
    broken = StubBackend("m", doubler().inputs, [y], lambda inputs: 1 / 0)
    assert refusal(check_golden, tmp_path, broken) == (
        "golden.npz: the golden inputs fail: model 'm' failed on this batch"
    )


class Exploit:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def npz(name, data):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(name, data)
    return packed.getvalue()


def npy(header):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"PK\x03\x04 cut off", id="no archive"),
        pytest.param(pickle.dumps(Exploit()), id="a pickle"),
        pytest.param(npz("in:x.npy", pickle.dumps(Exploit())), id="a pickle in an archive"),
        pytest.param(
            npz(
                "in:x.npy",
                npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}")
                + pickle.dumps([Exploit()]),
            ),
            id="an array of objects",
        ),
        pytest.param(
            npz("in:x.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2**60,)}")),
            id="a header that is code",
        ),
        pytest.param(
            npz(
                "in:x.npy", npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**50},)}}")
            ),
            id="a shape without its data",
        ),
    ],
)
def test_a_file_that_is_no_archive_of_plain_arrays_is_refused_unrun(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "golden.npz").write_bytes(data)
    assert refusal(check_golden, tmp_path, doubler()).startswith("golden.npz: ")
    assert not (tmp_path / "pwned").exists()


def test_an_archive_that_unpacks_to_too_much_is_refused_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "MAX_GOLDEN_SIZE", 1 << 20)
    np.savez_compressed(tmp_path / "golden.npz", **{"in:x": np.zeros((1 << 18, 2), np.float32)})
    assert (tmp_path / "golden.npz").stat().st_size < 10_000
    assert "at most 1048576" in refusal(check_golden, tmp_path, doubler())
