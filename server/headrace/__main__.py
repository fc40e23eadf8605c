"""The command line: settings in, exit code out."""

import os
import sys

# grpcio reads it when it is imported, which importing almost anything below does. With it the
# polling thread reads the sockets itself: 27 k → 35 k requests/s on one core here.
_GRPC_CAME_FIRST = "grpc" in sys.modules and "GRPC_EXPERIMENTS" not in os.environ
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

import argparse  # noqa: E402
import errno  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import re  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from datetime import UTC, datetime  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import structlog  # noqa: E402

import headrace  # noqa: E402
from headrace.errors import StartupError  # noqa: E402
from headrace.settings import (  # noqa: E402
    CommandSettings,
    MonitorSettings,
    ServeSettings,
    Settings,
    load,
    split_address,
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
    parser = _parser()
    options = vars(parser.parse_args(arguments))
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
    from headrace.app import open_gateway  # noqa: PLC0415 after the settings: it takes seconds

    gateway = open_gateway(settings)
    code = gateway.run(on_ready=lambda: _say_serving(gateway.grpc_address, gateway.http_address))
    if code == EXIT_FAILED:
        # Threads that wait for what has died would keep the interpreter from ending.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headrace", description=headrace.__doc__)
    parser.add_argument("--version", action="version", version=f"headrace {headrace.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve", help="serve the models of a repository over gRPC", description=_serve.__doc__
    )
    _add_settings(serve, ServeSettings)
    worker = commands.add_parser("serve-worker")  # `serve` runs it: no help, no place in the list
    worker.add_argument("channel", type=int)
    monitor = commands.add_parser(
        "monitor",
        help="watch what gateways predict for drift",
        description="watch what gateways predict for drift",
    )
    _add_settings(monitor, MonitorSettings)
    _add_predict(commands)
    _add_models(commands.add_parser("models", help="what serves, and whether a folder could"))
    _add_features(
        commands.add_parser("features", help="online features, and whether they can be read")
    )
    for name, text in {
        "demo": "real home sales through the whole path, from a checkout; exits by itself",
        "up": "the demo's stack, serving until Ctrl-C",
    }.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--root", type=Path, default=Path(), metavar="DIR", help="the checkout (default: here)"
        )
    return parser


def _add_settings(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file of these settings")
    for name, field in kind.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        default = "" if field.is_required() else f" (default: {field.default})"
        text = f"{field.description}{default}".replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(
                flag, help=text, action=argparse.BooleanOptionalAction, default=None
            )
        else:
            parser.add_argument(flag, help=text, metavar=name.rpartition("_")[2].upper())


def _add_predict(commands: Any) -> None:
    text = "one prediction, or a few, from a running server"
    command = commands.add_parser("predict", help=text, description=text)
    command.add_argument("model", metavar="MODEL")
    command.add_argument(
        "pairs",
        nargs="*",
        metavar="COLUMN=VALUE",
        help="a value for each column; several rows as a,b,c; a row of several values as [1,2]",
    )
    _add_shared(command, "address", "timeout_s")
    command.add_argument("--version", type=int, metavar="N", help="the server's choice by default")
    command.add_argument("--features", action="store_true", help="show what the model saw")
    command.add_argument("--json", action="store_true", help="for machines")


def _add_shared(command: argparse.ArgumentParser, *names: str) -> None:
    """Add flags of `CommandSettings`; without a default, so that the environment has its say."""
    types: dict[str, Callable[[str], Any]]
    types = {"address": _address, "feature_repo": Path, "timeout_s": _seconds}
    for name in names:
        field = CommandSettings.model_fields[name]
        default = "" if field.default is None else f" (default: {field.default})"
        command.add_argument(
            f"--{name.replace('_', '-')}",
            type=types[name],
            metavar={"address": "HOST:PORT", "feature_repo": "DIR", "timeout_s": "S"}[name],
            help=f"{field.description}{default}",
        )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3_600:
        raise argparse.ArgumentTypeError(f"expected seconds, over 0 to 3600, got '{text}'")
    return seconds


def _address(text: str) -> str:
    try:
        split_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _with_environment(options: dict[str, Any]) -> dict[str, Any]:
    """Fill in what was not given of `CommandSettings`."""
    shared = {name: options[name] for name in CommandSettings.model_fields if name in options}
    settings = load(CommandSettings, _given(shared))
    return options | {name: getattr(settings, name) for name in shared}


def _feature_repo(options: dict[str, Any]) -> Path:
    if options["feature_repo"] is None:
        raise StartupError("--feature-repo (or HEADRACE_FEATURE_REPO): Field required")
    return Path(options["feature_repo"])


def _add_models(models: argparse.ArgumentParser) -> None:
    actions = models.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "show every model version of a running server, its state, and why it does not serve"
    listing = actions.add_parser("list", help=text, description=text)
    _add_shared(listing, "address")
    text = "put every version of a model repository through all checks; exit code 1 if one fails"
    verify = actions.add_parser("verify", help=text, description=text)
    verify.add_argument("folder", type=Path, metavar="DIR", help="the model repository")
    _add_shared(verify, "feature_repo")
    _add_on_demand_modules(verify)
    for action in (listing, verify):
        action.add_argument("--json", action="store_true", help="for machines")


def _add_features(features: argparse.ArgumentParser) -> None:
    actions = features.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "show the feature services of a running server"
    listing = actions.add_parser("list", help=text, description=text)
    text = "read the features of an entity, or a few, from a running server"
    get = actions.add_parser("get", help=text, description=text)
    get.add_argument(
        "selection", metavar="SERVICE", help="a feature service, or features as view:name,view:name"
    )
    get.add_argument(
        "pairs",
        nargs="*",
        metavar="KEY=VALUE",
        help="a value for each join key; several entities as a,b,c",
    )
    get.add_argument("--full-feature-names", action="store_true", help="view__feature")
    for action in (listing, get):
        _add_shared(action, "address", "timeout_s")
    text = "look at a feature repository and its Redis store: layout, ages, collisions, encoding"
    check = actions.add_parser("check", help=text, description=text)
    _add_shared(check, "feature_repo", "timeout_s")
    check.add_argument(
        "--keys",
        type=_integer(1, 1_000_000),
        default=1_000,
        metavar="N",
        help="keys to look at (default: 1000)",
    )
    _add_on_demand_modules(check)
    for action in (listing, get, check):
        action.add_argument("--json", action="store_true", help="for machines")
    _add_features_skew(actions)


def _add_on_demand_modules(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--on-demand-modules",
        default="",
        metavar="MODULE,…",
        help="Python modules whose on-demand feature views may run, as for `headrace serve`",
    )


def _add_features_skew(actions: Any) -> None:
    text = (
        "compare a skew log with the offline store, point in time; exit code 0 if no feature "
        "mismatches, or is late, too often, 1 if one does, 2 if it could not be found out"
    )
    skew = actions.add_parser("skew", help=text, description=text)
    _add_shared(skew, "feature_repo")
    skew.add_argument(
        "--log", type=Path, required=True, metavar="DIR", help="of `headrace serve --skew-log-dir`"
    )
    skew.add_argument("--service", metavar="NAME", help="one feature service only")
    skew.add_argument(
        "--since",
        type=_moment,
        metavar="TIME",
        help="leave out older requests: 2026-01-31T12:00Z, or as long ago as 90min, 6h, 7d",
    )
    for what, share in (("mismatch", 0.01), ("late", 1.0)):
        skew.add_argument(
            f"--max-{what}-share",
            type=_number(0, 1),
            default=share,
            metavar="SHARE",
            help=f"of a feature's compared rows (default: {share:g})",
        )
    for name, default in (("relative", 1e-6), ("absolute", 0.0)):
        skew.add_argument(
            f"--{name}-tolerance",
            type=_number(0, sys.float_info.max),
            default=default,
            metavar="X",
            help=f"of floating-point values (default: {default:g})",
        )
    skew.add_argument(
        "--chunk-rows",
        type=_integer(1, 10_000_000),
        default=10_000,
        metavar="N",
        help="rows that the offline store is asked for at once: memory against the number of "
        "queries (default: 10000)",
    )
    skew.add_argument("--json", action="store_true", help="for machines")


def _number(least: float, most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {least:g} to {most:g}, got '{text}'")
        return value

    return number


def _integer(least: int, most: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {least} to {most}, got '{text}'")
        return value

    return integer


def _moment(text: str) -> float:
    """Return Unix seconds; a moment without a zone is in UTC."""
    expected = f"expected 2026-01-31T12:00Z or the like, or 90min, 6h, 7d, got '{text}'"
    ago = re.fullmatch(r"([0-9]{1,6})(s|min|h|d)", text)
    if ago is not None:
        return time.time() - int(ago[1]) * {"s": 1, "min": 60, "h": 3_600, "d": 86_400}[ago[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(expected) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


if __name__ == "__main__":
    sys.exit(main())
