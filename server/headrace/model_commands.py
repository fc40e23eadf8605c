"""`headrace models`: what a running server serves, and whether a folder of models could."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
from rich.table import Table
from tritonclient.grpc import service_pb2, service_pb2_grpc

from headrace.errors import ModelLoadError, StartupError
from headrace.features.plans import FeaturePlans
from headrace.features.repo import open_feature_repo
from headrace.loading import VersionLoader
from headrace.repository.sandbox import OnnxChecker
from headrace.repository.scan import VersionFolder, scan
from headrace.repository.validate import check_manifest
from headrace.settings import load_settings
from headrace.telemetry.metrics import Metrics
from headrace.terminal import open_console, printable

CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class VersionState:
    """
    One line of the answer.

    Args:
        model: The model's name.
        version: Its number as text; empty for the model as a whole.
        state: `READY`, `LOADING` or `UNAVAILABLE`.
        reason: Why it does not serve, or why its newer files do not.
    """

    model: str
    version: str
    state: str
    reason: str


def list_models(address: str, *, as_json: bool) -> int:
    """
    Show what a running server has, and why the rest does not serve.

    Returns:
        0; the state of the models is the answer, not an error.

    Raises:
        StartupError: nobody answers at that address.
    """
    # Operators' proxies have no business between them and their own server.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            reply = stub.RepositoryIndex(
                service_pb2.RepositoryIndexRequest(), timeout=CALL_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise StartupError(
                f"--address {address}: {error.code().name}; is `headrace serve` running there?"
            ) from None
    _show([VersionState(m.name, m.version, m.state, m.reason) for m in reply.models], as_json)
    return 0


def verify(
    root: Path, feature_repo: Path | None, *, on_demand_modules: str = "", as_json: bool
) -> int:
    """
    Put every version in a model repository through all checks that it must pass before it serves.

    Returns:
        0 when every version passes, else 1.

    Raises:
        StartupError: the folder, or the feature repository, cannot be read.
    """
    # A server's own limits do not matter here: its defaults will do.
    settings = load_settings({"model_repository": root})
    features = None
    if feature_repo is not None:
        features = open_feature_repo(feature_repo, on_demand_modules)
    store = None if features is None else features.online_store()
    plans = None if features is None else FeaturePlans(features)
    loader = VersionLoader(settings, plans, store, Metrics())
    states: list[VersionState] = []
    with OnnxChecker() as checker:
        for folder in scan(root):
            if folder.reason is not None:
                states.append(VersionState(folder.name, "", "UNAVAILABLE", folder.reason))
                continue
            for version in folder.versions:
                reason = _problem(folder.name, version, checker, loader)
                state = "READY" if reason is None else "UNAVAILABLE"
                states.append(VersionState(folder.name, str(version.number), state, reason or ""))
    if store is not None:
        store.close()
    _show(states, as_json)
    return 0 if all(state.state == "READY" for state in states) else 1


def _problem(
    model: str, version: VersionFolder, checker: OnnxChecker, loader: VersionLoader
) -> str | None:
    if version.reason is not None:
        return version.reason
    try:
        check_manifest(version.path)
        if version.has_model:
            checker.check(version.model_path)
        _, served = loader.load(model, version)
    except ModelLoadError as error:
        return str(error)
    served.close()
    return None


def _show(states: Sequence[VersionState], as_json: bool) -> None:  # noqa: FBT001 one caller's choice
    console = open_console(as_json=as_json)
    if as_json:
        console.print(json.dumps([asdict(state) for state in states]))
        return
    if not states:
        console.print("no models")
        return
    table = Table("model", "version", "state", "reason")
    for state in states:
        table.add_row(*map(printable, (state.model, state.version, state.state, state.reason)))
    console.print(table)
