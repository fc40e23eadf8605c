"""The model as Triton's Python backend takes it: every request of a batch in one run.

Runs in the environment of `make triton`; batching is Triton's own.
"""

import json
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb


class TritonPythonModel:
    """One session, one thread."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            config["parameters"]["model"]["string_value"], options
        )
        self.input = self.session.get_inputs()[0].name
        self.output = self.session.get_outputs()[0].name

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = [
            pb.get_input_tensor_by_name(request, self.input).as_numpy() for request in requests
        ]
        (results,) = self.session.run(None, {self.input: np.concatenate(inputs)})
        ends = np.cumsum([len(rows) for rows in inputs])[:-1]
        return [
            pb.InferenceResponse([pb.Tensor(self.output, rows)]) for rows in np.split(results, ends)
        ]
