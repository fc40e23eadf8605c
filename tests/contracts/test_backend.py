"""What every backend promises, run over each of them."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import helper

from headrace.app import Gateway
from headrace.backends.oip import load_oip
from headrace.backends.onnx_runtime import load_onnx
from headrace.backends.padded import PaddedBackend
from headrace.backends.stub import StubBackend
from headrace.errors import BackendError
from headrace.repository.config import ModelConfig, RemoteModel
from headrace.settings import load_settings
from headrace.tensors import NUMPY_DTYPES, TensorSpec

ONNX_TYPES = {
    "BYTES": onnx.TensorProto.STRING,
    **{
        datatype: helper.np_dtype_to_tensor_dtype(dtype)
        for datatype, dtype in NUMPY_DTYPES.items()
        if datatype != "BYTES"
    },
}
WEIGHTS = np.random.default_rng(7).normal(size=(4, 3)).astype(np.float32)
FEATURES = TensorSpec("features", "FP32", (-1, 4))
SCORES = TensorSpec("scores", "FP32", (-1, 3))
TOTAL = TensorSpec("total", "FP32", (-1, 1))


def value_info(spec):
    shape = [None if dim == -1 else dim for dim in spec.shape]
    return helper.make_tensor_value_info(spec.name, ONNX_TYPES[spec.datatype], shape)


def onnx_backend(folder, inputs, outputs, nodes, weights=(), gpu_device=None):
    graph = helper.make_graph(
        nodes, "g", [value_info(spec) for spec in inputs], [value_info(spec) for spec in outputs]
    )
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return load_onnx(path, ModelConfig("m", gpu_device=gpu_device))


class OnnxRuntime:
    """Makes ONNX Runtime backends."""

    def __init__(self, folder, gpu_device=None):
        self.folder = folder
        self.gpu_device = gpu_device

    def scorer(self):
        nodes = [
            helper.make_node("MatMul", ["features", "w"], ["raw"]),
            helper.make_node("Relu", ["raw"], ["scores"]),
            helper.make_node("ReduceSum", ["features", "axes"], ["total"], keepdims=1),
        ]
        weights = [("w", WEIGHTS), ("axes", np.array([1], np.int64))]
        outputs = [SCORES, TOTAL]
        return onnx_backend(self.folder, [FEATURES], outputs, nodes, weights, self.gpu_device)

    def identity(self, datatype, shape):
        x, y = TensorSpec("x", datatype, shape), TensorSpec("y", datatype, shape)
        nodes = [helper.make_node("Identity", ["x"], ["y"])]
        return onnx_backend(self.folder, [x], [y], nodes, gpu_device=self.gpu_device)


class Stub:
    """Makes stubs that compute the same."""

    def scorer(self):
        def score(inputs):
            rows = inputs["features"]
            return [np.maximum(rows @ WEIGHTS, 0), rows.sum(axis=1, keepdims=True)]

        return StubBackend("m", [FEATURES], [SCORES, TOTAL], score)

    def identity(self, datatype, shape):
        x, y = TensorSpec("x", datatype, shape), TensorSpec("y", datatype, shape)
        return StubBackend("m", [x], [y], lambda inputs: [inputs["x"].copy()])


class Padded:
    """Makes backends that see batches of a few sizes only."""

    def __init__(self, folder):
        self.local = OnnxRuntime(folder)

    def scorer(self):
        return PaddedBackend("m", self.local.scorer(), [2, 5, 64])

    def identity(self, datatype, shape):
        return PaddedBackend("m", self.local.identity(datatype, shape), [3, 64])


class Remote:
    """Makes backends on another server: each maker runs a Headrace of its own, over loopback."""

    def __init__(self, folder):
        self.folder = folder
        self.local = OnnxRuntime(folder)
        self.gateway = None

    def scorer(self):
        self.local.scorer()
        return self._served()

    def identity(self, datatype, shape):
        self.local.identity(datatype, shape)
        return self._served()

    def _served(self):
        root = self.folder / "models"
        (root / "remote" / "1").mkdir(parents=True)
        (self.folder / "model.onnx").rename(root / "remote" / "1" / "model.onnx")
        (root / "remote" / "config.pbtxt").write_text("max_batch_size: 64")
        self.gateway = Gateway(
            load_settings(
                {
                    "model_repository": root,
                    "grpc_address": "127.0.0.1:0",
                    "http_address": "127.0.0.1:0",
                    "model_control_mode": "none",
                }
            )
        )
        self.gateway.start()
        self.backend = load_oip(
            "m", RemoteModel(self.gateway.grpc_address, "remote", timeout_s=20), self.folder
        )
        return self.backend

    def close(self):
        if self.gateway is not None:
            self.backend.close()
            assert self.gateway.stop()


class OnTriton:
    """Makes backends on a real Triton server."""

    numbers = itertools.count()

    def __init__(self, server, folder):
        self.server = server
        self.folder = folder
        self.made = []

    def scorer(self):
        weights = WEIGHTS.tolist()
        return self._served(
            [FEATURES],
            [SCORES, TOTAL],
            f"""
        w = np.array({weights}, np.float32)
        replies = []
        for request in requests:
            rows = pb.get_input_tensor_by_name(request, "features").as_numpy()
            replies.append(pb.InferenceResponse([
                pb.Tensor("scores", np.maximum(rows @ w, 0)),
                pb.Tensor("total", rows.sum(axis=1, keepdims=True)),
            ]))
        return replies
""",
        )

    def identity(self, datatype, shape):
        return self._served(
            [TensorSpec("x", datatype, shape)],
            [TensorSpec("y", datatype, shape)],
            """
        return [
            pb.InferenceResponse([
                pb.Tensor("y", pb.get_input_tensor_by_name(request, "x").as_numpy())
            ])
            for request in requests
        ]
""",
        )

    def _served(self, inputs, outputs, code):
        name = f"model_{next(self.numbers)}"
        config = 'backend: "python" max_batch_size: 64 '
        for kind, specs in (("input", inputs), ("output", outputs)):
            for spec in specs:
                datatype = spec.datatype.replace("BYTES", "STRING")
                dims = list(spec.shape[1:])
                config += (
                    f'{kind} {{ name: "{spec.name}" data_type: TYPE_{datatype} dims: {dims} }} '
                )
        self.server.serve(name, config, code)
        backend = load_oip("m", RemoteModel(self.server.address, name, timeout_s=20), self.folder)
        self.made.append((name, backend))
        return backend

    def close(self):
        for name, backend in self.made:
            backend.close()
            self.server.unload(name)


@pytest.fixture(
    params=[
        *("onnx_runtime", "stub", "padded", "oip", "triton"),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def maker(request, tmp_path):
    if request.param == "cuda":
        yield OnnxRuntime(tmp_path, gpu_device=request.getfixturevalue("gpu_device"))
    elif request.param == "triton":
        on_triton = OnTriton(request.getfixturevalue("triton_server"), tmp_path)
        yield on_triton
        on_triton.close()
    elif request.param == "padded":
        yield Padded(tmp_path)
    elif request.param == "oip":
        remote = Remote(tmp_path)
        yield remote
        remote.close()
    else:
        yield OnnxRuntime(tmp_path) if request.param == "onnx_runtime" else Stub()


def rows(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)


def as_bytes(array):
    """BYTES may come back as `str`; on the wire they are the same."""
    return [v.encode() if isinstance(v, str) else v for v in array.ravel().tolist()]


def test_it_names_what_it_takes_and_returns(maker):
    backend = maker.scorer()
    assert tuple(backend.inputs) == (FEATURES,)
    assert tuple(backend.outputs) == (SCORES, TOTAL)


def test_results_come_in_the_order_of_its_outputs(maker):
    features = rows(5)
    scores, total = maker.scorer().infer({"features": features})
    np.testing.assert_allclose(scores, np.maximum(features @ WEIGHTS, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total[:, 0], features.sum(axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_a_batch_gives_the_same_rows_as_one_by_one(maker, count):
    backend = maker.scorer()
    features = rows(count)
    singles = [backend.infer({"features": features[i : i + 1]}) for i in range(count)]
    for got, parts in zip(
        backend.infer({"features": features}), zip(*singles, strict=True), strict=True
    ):
        # Sums may be taken in another order, no more than that.
        np.testing.assert_allclose(got, np.concatenate(parts), rtol=1e-5, atol=1e-6)


def test_results_are_of_the_declared_dtype_and_in_row_major_order(maker):
    backend = maker.scorer()
    results = backend.infer({"features": rows(3)})
    assert [array.dtype for array in results] == [spec.dtype for spec in backend.outputs]
    assert all(array.flags.c_contiguous for array in results)


def test_it_takes_read_only_rows_and_leaves_them_alone(maker):
    features = np.frombuffer(rows(3).tobytes(), np.float32).reshape(3, 4)
    assert not features.flags.writeable
    maker.scorer().infer({"features": features})
    assert features.tobytes() == rows(3).tobytes()


def test_results_do_not_share_memory_with_what_went_in_or_came_out_before(maker):
    backend = maker.identity("FP32", (-1, 4))
    features = rows(2)
    (first,) = backend.infer({"x": features})
    features[:] = 0
    backend.infer({"x": np.ones((2, 4), np.float32)})
    assert first.tobytes() == rows(2).tobytes()


def test_threads_do_not_mix_their_rows(maker):
    backend = maker.scorer()
    together = threading.Barrier(4)

    def work(seed):
        features = rows(seed + 1, seed)
        (expected, _) = backend.infer({"features": features})
        together.wait(timeout=30)
        return all(
            np.array_equal(backend.infer({"features": features})[0], expected) for _ in range(200)
        )

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [True] * 4


def values(datatype):
    if datatype == "BYTES":
        text = st.text(max_size=8).map(str.encode)
        return hnp.arrays(object, st.tuples(st.integers(1, 4), st.just(3)), elements=text)
    shape = st.tuples(st.integers(1, 4), st.just(3))
    if datatype == "FP16":  # by its bits: Hypothesis draws few halves and throws away most
        return hnp.arrays(np.uint16, shape).map(lambda bits: bits.view(np.float16))
    return hnp.arrays(NUMPY_DTYPES[datatype], shape)


@pytest.fixture(params=sorted(NUMPY_DTYPES))
def datatype(request):
    return request.param


@pytest.fixture
def identity(maker, datatype):
    return maker.identity(datatype, (-1, 3))


# The backend is loaded once for all examples: it keeps nothing between them.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(data=st.data())
def test_every_datatype_goes_through_unchanged(identity, datatype, data):
    x = data.draw(values(datatype))
    (y,) = identity.infer({"x": x})
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert as_bytes(y) == as_bytes(x) if datatype == "BYTES" else y.tobytes() == x.tobytes()


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 0), (1, 2, 3, 4)])
@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_any_shape_goes_through_unchanged(maker, datatype, shape):
    if isinstance(maker, Remote | OnTriton | Padded) and (not shape or shape[0] == 0):
        pytest.skip("a request without rows is refused before it comes here")
    fill = b"a" if datatype == "BYTES" else 1
    x = np.full(shape, fill, NUMPY_DTYPES[datatype])
    (y,) = maker.identity(datatype, tuple(-1 for _ in shape)).infer({"x": x})
    assert y.shape == shape
    assert as_bytes(y) == as_bytes(x)


@pytest.mark.parametrize(
    "features", [np.zeros((2, 5), np.float32), np.array([["a", "b", "c", "d"]], object)]
)
def test_a_failure_says_which_model_and_nothing_of_its_inside(maker, features):
    with pytest.raises(BackendError) as failed:
        maker.scorer().infer({"features": features})
    assert str(failed.value) == "model 'm' failed on this batch"


def test_a_failure_does_not_disturb_the_next_batch(maker):
    backend = maker.scorer()
    before = backend.infer({"features": rows(2)})
    with pytest.raises(BackendError):
        backend.infer({"features": np.zeros((2, 5), np.float32)})
    after = backend.infer({"features": rows(2)})
    assert [array.tobytes() for array in after] == [array.tobytes() for array in before]


def test_what_it_returned_outlives_it(maker):
    backend = maker.identity("FP32", (-1, 4))
    (y,) = backend.infer({"x": rows(2)})
    backend.close()
    assert y.tobytes() == rows(2).tobytes()
