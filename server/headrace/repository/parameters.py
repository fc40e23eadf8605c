"""The `parameters` entries of a `config.pbtxt`, read with messages that say what was expected."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from headrace.errors import ModelLoadError

FEATURE_PARAMETERS = ("feature_order", "max_feature_age_s", "missing_features")
"""Those that mean something only beside `feature_service`."""

REMOTE_PARAMETERS = (
    "oip_address",
    "oip_model",
    "oip_version",
    "oip_tls",
    "oip_tls_root_certificates",
    "oip_timeout_s",
)
"""Those that mean something only for a model on another server."""

KNOWN_PARAMETERS = {
    *FEATURE_PARAMETERS,
    *REMOTE_PARAMETERS,
    "feature_service",
    "latency_slo_ms",
    "allowed_batch_sizes",
    "max_request_rows",
    "shape_buckets",
    "codel_target_ms",
    "codel_interval_ms",
    "intra_op_thread_count",
    "inter_op_thread_count",
    "execution_mode",
    "enable_mem_arena",
    "enable_mem_pattern",
    "arena_extend_strategy",
    "cudnn_conv_algo_search",
    "gpu_mem_limit",
    "use_tf32",
    "share_session_between_instances",  # it is, always
}
"""What is read; all else has no effect."""

_Choice = TypeVar("_Choice")


class Parameters:
    """
    The parameters of one model. Every method raises `ModelLoadError` for a value it cannot take.

    Args:
        message: The `inference.ModelConfig`.
    """

    def __init__(self, message: Any) -> None:
        self._values: dict[str, str] = {
            key: value.string_value for key, value in message.parameters.items()
        }

    def unknown(self) -> Iterator[str]:
        """Yield `parameters.<key>` for each key that nothing here reads."""
        return (f"parameters.{key}" for key in self._values if key not in KNOWN_PARAMETERS)

    def text(self, key: str) -> str | None:
        """Return the text, not empty; None when there is no such parameter."""
        value = self._values.get(key)
        if value is None:
            return None
        if not value.strip():
            raise wrong(f"parameter '{key}' has no string_value")
        return value.strip()

    def count(self, key: str, default: int, most: int) -> int:
        """Return a whole number in [0, most]."""
        value = self.text(key)
        if value is None:
            return default
        if not re.fullmatch(r"[0-9]{1,20}", value) or int(value) > most:
            raise _not(key, value, f"a whole number from 0 to {most}")
        return int(value)

    def positive(self, key: str) -> float | None:
        """Return a finite number above 0; None when there is no such parameter."""
        value = self.text(key)
        if value is None:
            return None
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise _not(key, value, "a number above 0")
        return number

    def choice(self, key: str, choices: Mapping[str, _Choice], *, default: _Choice) -> _Choice:
        """Return what the value stands for."""
        value = self.text(key)
        if value is None:
            return default
        if value not in choices:
            raise _not(key, value, " or ".join(f"'{choice}'" for choice in choices))
        return choices[value]


def wrong(fact: str) -> ModelLoadError:
    """Make the error that says what is wrong with the file."""
    return ModelLoadError(f"config.pbtxt: {fact}")


def shown(value: str) -> str:
    """Quote a value for a message, cut to 80 characters."""
    return repr(value if len(value) <= 80 else value[:77] + "...")


def _not(key: str, value: str, expected: str) -> ModelLoadError:
    return wrong(f"parameter '{key}' is {shown(value)}; expected {expected}")
