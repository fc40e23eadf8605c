"""`LogSettings` of the Open Inference Protocol: Triton's switches, of which there is one here.

Source: Triton, "Logging Extension" (`protocol/extension_logging.md`).
"""

from collections.abc import Callable, Mapping
from typing import Any

from tritonclient.grpc import service_pb2

from headrace.errors import DeadlineExceeded, InvalidRequest, PermissionDenied
from headrace.telemetry.logs import LOG_LEVELS, log_level

TIMEOUT_S = 5.0
"""How long a call waits for all workers; those that are late go on."""

ChangeLevel = Callable[[str, float], None]
"""
Takes one of `LOG_LEVELS` and a timeout in seconds; returns when every process writes from it.

Raises `TimeoutError` when one has not yet, `Draining` when this server is stopping.
"""

_FIELDS = {"log_verbose_level": "uint32_param"}
"""Of the message, by setting; `bool_param` for all others."""


class LogSettings:
    """
    Says what is logged, and changes it.

    Args:
        change: Changes the level; None where callers may not.
    """

    def __init__(self, change: ChangeLevel | None) -> None:
        self._change = change

    def answer(self, request: Any) -> Any:
        """Change what a request names, if it names anything; return how it is then."""
        if request.settings:
            if self._change is None:
                raise PermissionDenied("this server's log level is fixed; see --allow-log-settings")
            level = level_for({name: _value(name, it) for name, it in request.settings.items()})
            try:
                # A level that has all that is wanted is asked for by nobody: another call's, which
                # is under way, is not undone.
                if level != log_level():
                    self._change(level, TIMEOUT_S)
            except TimeoutError:
                raise DeadlineExceeded(
                    "not every worker has changed its log level yet; they will"
                ) from None
        reply = service_pb2.LogSettingsResponse()
        for name, value in switches(log_level()).items():
            setattr(reply.settings[name], _FIELDS.get(name, "bool_param"), value)
        return reply


def switches(level: str) -> dict[str, int | bool]:
    """Return what Triton would call a level: which severities are written, and verbosity."""
    least = LOG_LEVELS[level]
    return {
        "log_info": least <= LOG_LEVELS["info"],
        "log_warning": least <= LOG_LEVELS["warning"],
        "log_error": True,
        "log_verbose_level": int(least <= LOG_LEVELS["debug"]),
    }


def level_for(wanted: Mapping[str, int | bool], level: str | None = None) -> str:
    """
    Return the level that has all of some switches as wanted, and is nearest to another.

    Args:
        wanted: Some of `switches`; every verbosity above 1 is 1.
        level: The other; that of now by default.

    Raises:
        InvalidRequest: there is none.
    """
    now = list(LOG_LEVELS).index(log_level() if level is None else level)
    wanted = {name: int(value > 0) for name, value in wanted.items()}
    fitting = [
        (abs(number - now), candidate)
        for number, candidate in enumerate(LOG_LEVELS)
        if wanted.items() <= switches(candidate).items()
    ]
    if not fitting:
        raise InvalidRequest(
            "no log level has these settings: errors are always logged, warnings wherever "
            "information is, both wherever log_verbose_level is 1"
        )
    return min(fitting)[1]


def _value(name: str, setting: Any) -> int | bool:
    if name not in switches("info"):
        raise InvalidRequest(
            f"unknown log setting '{name[:64]}': expected one of {', '.join(switches('info'))}"
        )
    kind = _FIELDS.get(name, "bool_param")
    if setting.WhichOneof("parameter_choice") != kind:
        raise InvalidRequest(f"log setting '{name}' needs a {kind}")
    value: int | bool = getattr(setting, kind)
    return value
