"""The command line: settings in, exit code out."""

import os
import sys

# grpcio reads it when it is imported, which importing almost anything below does. With it the
# polling thread reads the sockets itself: 27 k → 35 k requests/s on one core here.
_GRPC_CAME_FIRST = "grpc" in sys.modules and "GRPC_EXPERIMENTS" not in os.environ
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

import errno  # noqa: E402
import json  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import structlog  # noqa: E402

from headrace.command_arguments import command_parser  # noqa: E402
from headrace.errors import StartupError  # noqa: E402
from headrace.settings import (  # noqa: E402
    CommandSettings,
    MonitorSettings,
    ServeSettings,
    load,
)
from headrace.telemetry.logs import set_up_logs  # noqa: E402
from headrace.workers.devices import core_count, gpu_devices  # noqa: E402
from headrace.workers.policy import plan_workers  # noqa: E402

_OUTPUT_ERRORS = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What a file or pipe that the standard output goes to may say."""

_SERVERS = {"serve", "monitor", "up", "demo"}

EXIT_OK, EXIT_FAILED, EXIT_CANNOT_START = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Returns:
        0 done or stopped as asked, 1 failed while running, 2 could not start.
    """
    options = vars(command_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        if command not in _SERVERS:
            options = _with_environment(options)
        code = int(_COMMANDS[command](options))
        sys.stdout.flush()
    except StartupError as error:
        print(f"headrace {command}: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS or command in _SERVERS:
            raise
        # What waits in the buffer would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # whoever read it has enough
            print(f"headrace {command}: cannot write: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_FAILED
    return code


def _serve(options: dict[str, Any]) -> int:
    config = options.pop("config")
    settings = load(ServeSettings, _given(options), config)
    set_up_logs(settings.log_level)
    _warn_of_the_slower_engine()
    devices = plan_workers(settings.workers, cores=core_count(), devices=gpu_devices())
    if len(devices) > 1:
        return _supervise(settings, devices)
    # After the settings: they take seconds.
    from headrace.app import open_gateway  # noqa: PLC0415
    from headrace.process_end import end_if_held_up  # noqa: PLC0415

    gateway = open_gateway(settings)
    code = gateway.run(on_ready=lambda: _say_serving(gateway.grpc_address, gateway.http_address))
    end_if_held_up(gateway, code)
    return code


def _supervise(settings: ServeSettings, devices: Sequence[str | None]) -> int:
    from headrace.workers.supervisor import Supervisor  # noqa: PLC0415 only for several workers

    supervisor = Supervisor(settings, devices)
    return supervisor.run(
        on_ready=lambda: _say_serving(
            supervisor.grpc_address, supervisor.http_address, workers=len(devices)
        )
    )


def _serve_worker(options: dict[str, Any]) -> int:
    from headrace.worker import run_worker  # noqa: PLC0415 it takes seconds

    return run_worker(options["channel"])


def _warn_of_the_slower_engine() -> None:
    if _GRPC_CAME_FIRST or "-event_engine_listener" not in os.environ["GRPC_EXPERIMENTS"]:
        structlog.get_logger().warning(
            "grpc_experiment_missing",
            effect="GRPC_EXPERIMENTS lacks -event_engine_listener, or came after the import of "
            "grpc: slower, nothing else",
        )


def _monitor(options: dict[str, Any]) -> int:
    config = options.pop("config")
    settings = load(MonitorSettings, _given(options), config)
    set_up_logs(settings.log_level)
    from headrace.monitor_app import MonitorProcess  # noqa: PLC0415 after the settings

    process = MonitorProcess(settings)
    return process.run(on_ready=lambda: _say_serving(process.grpc_address, process.http_address))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _say_serving(grpc_address: str, http_address: str, **more: int) -> None:
    """Write the one line that whoever started the server waits for."""
    fields = {"grpc_address": grpc_address, "http_address": http_address, **more}
    if sys.stdout.isatty():
        print(
            "serving", *(f"{name}={value}" for name, value in fields.items()), sep="  ", flush=True
        )
    else:
        print(json.dumps({"event": "serving", **fields}), flush=True)


def _demo(options: dict[str, Any]) -> int:
    from headrace.demo import demo  # noqa: PLC0415 it takes seconds

    return demo(options["root"])


def _up(options: dict[str, Any]) -> int:
    from headrace.demo import up  # noqa: PLC0415 it takes seconds

    return up(options["root"])


def _models(options: dict[str, Any]) -> int:
    set_up_logs("error")
    from headrace import model_commands  # noqa: PLC0415 it takes seconds

    if options["action"] == "list":
        return model_commands.list_models(options["address"], as_json=options["json"])
    return model_commands.verify(
        options["folder"],
        options["feature_repo"],
        on_demand_modules=options["on_demand_modules"],
        as_json=options["json"],
    )


def _features(options: dict[str, Any]) -> int:
    set_up_logs("error")
    return _FEATURE_ACTIONS[options.pop("action")](options)


def _features_list(options: dict[str, Any]) -> int:
    from headrace import feature_commands  # noqa: PLC0415 it takes seconds

    return feature_commands.list_services(
        options["address"], timeout_s=options["timeout_s"], as_json=options["json"]
    )


def _features_get(options: dict[str, Any]) -> int:
    from headrace import feature_commands  # noqa: PLC0415 it takes seconds

    return feature_commands.get(
        options["address"],
        options["selection"],
        options["pairs"],
        full_feature_names=options["full_feature_names"],
        timeout_s=options["timeout_s"],
        as_json=options["json"],
    )


def _features_check(options: dict[str, Any]) -> int:
    from headrace import feature_check  # noqa: PLC0415 it takes seconds

    return feature_check.check(
        _feature_repo(options),
        on_demand_modules=options["on_demand_modules"],
        keys_max=options["keys"],
        timeout_s=options["timeout_s"],
        as_json=options["json"],
    )


def _predict(options: dict[str, Any]) -> int:
    set_up_logs("error")
    from headrace import predict_command  # noqa: PLC0415 it takes seconds

    return predict_command.predict(
        options["address"],
        options["model"],
        options["pairs"],
        version="" if options["version"] is None else str(options["version"]),
        with_features=options["features"],
        timeout_s=options["timeout_s"],
        as_json=options["json"],
    )


def _features_skew(options: dict[str, Any]) -> int:
    from headrace import skew_command  # noqa: PLC0415 it takes seconds

    return skew_command.skew(
        options["log"],
        _feature_repo(options),
        service=options["service"],
        since_s=options["since"],
        tolerance=(options["relative_tolerance"], options["absolute_tolerance"]),
        max_mismatch_share=options["max_mismatch_share"],
        max_late_share=options["max_late_share"],
        chunk_rows=options["chunk_rows"],
        as_json=options["json"],
    )


_FEATURE_ACTIONS = {
    "list": _features_list,
    "get": _features_get,
    "check": _features_check,
    "skew": _features_skew,
}

_COMMANDS = {
    "serve": _serve,
    "serve-worker": _serve_worker,
    "monitor": _monitor,
    "predict": _predict,
    "models": _models,
    "features": _features,
    "demo": _demo,
    "up": _up,
}


def _with_environment(options: dict[str, Any]) -> dict[str, Any]:
    """Fill in what was not given of `CommandSettings`."""
    shared = {name: options[name] for name in CommandSettings.model_fields if name in options}
    settings = load(CommandSettings, _given(shared))
    return options | {name: getattr(settings, name) for name in shared}


def _feature_repo(options: dict[str, Any]) -> Path:
    if options["feature_repo"] is None:
        raise StartupError("--feature-repo (or HEADRACE_FEATURE_REPO): Field required")
    return Path(options["feature_repo"])


if __name__ == "__main__":
    sys.exit(main())
