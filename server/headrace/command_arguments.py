"""What may stand on the command line: commands, their flags, and what a flag's value may be."""

import argparse
import math
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import headrace
from headrace.settings import (
    CommandSettings,
    MonitorSettings,
    ServeSettings,
    Settings,
    split_address,
)


def command_parser() -> argparse.ArgumentParser:
    """
    Make the parser of all commands.

    Its result has `command`, for `models` and `features` also `action`, and the options of these by
    name; None for a setting that was not given, so that the environment or a file has its say.
    """
    parser = argparse.ArgumentParser(prog="headrace", description=headrace.__doc__)
    parser.add_argument("--version", action="version", version=f"headrace {headrace.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve the models of a repository over gRPC")
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
