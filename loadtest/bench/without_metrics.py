"""The gateway without its metrics, to see what they cost: `without_metrics.py serve …`."""

import sys

from headrace.__main__ import main
from headrace.telemetry.metrics import ModelMetrics

if __name__ == "__main__":
    ModelMetrics.answered = lambda *_, **__: None  # type: ignore[method-assign]
    sys.exit(main())
