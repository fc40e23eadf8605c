"""The questions of the bench, in the order of its page: each target of the design, then the rest.

Rates are compared by the wall clock: that is what a target says and what a caller gets. Questions
of a percent or three are put otherwise. Requests per second of a machine with other work on it
differ by ten percent from one second to the next, and the monitor and the collector take the
generator's time, which is no cost of the gateway's. So these compare requests per processor second
of the server, between processes that are started anew for each round; requests per second stand
beside them. Ranking is one request after the other at both, as the design has it, beside the faster
of two floors: of hashes as small as these the store gives the whole one sooner than single fields,
and the gateway asks for whole ones too. With four in flight the floor has four pipelines under way.
"""

from contest import Load, Question, Side, Target
from names import (
    AIO,
    ALL_TRACED,
    CEILING,
    FLOOR,
    FLOOR_OF_FIELDS,
    GATEWAY,
    GATEWAY_WITH_FEATURES,
    GLUE,
    MLSERVER,
    TRITON,
    TWO_WORKERS,
    WITHOUT_METRICS,
    WITHOUT_STREAM,
    WITHOUT_TRACES,
)

LOADED = Load("tensor")
ALONE = Load("tensor", connections=1, in_flight=1)
PARAMETER, NUMBERED = Load("parameter"), Load("numbered")
ENTITY = Load("entity")
RANKING = Load("ranking", connections=1, in_flight=1, rows=200)
RANKING_MANY = Load("ranking", connections=4, in_flight=1, rows=200)
TWICE = 2
"""Where a percent or three are to be told."""

PER_WORKER = 8
"""Connections: the kernel deals them out by chance, and few would be dealt unevenly."""

RATE, PER_CPU = "requests_per_s", "requests_per_cpu_s"

QUESTIONS = (
    Question(
        "tensors",
        "one-row tensors, 64 in flight",
        Side(GATEWAY, LOADED),
        Side(CEILING, LOADED),
        RATE,
        Target(0.85),
    ),
    Question(
        "alone",
        "one-row tensors, 1 in flight",
        Side(GATEWAY, ALONE),
        Side(CEILING, ALONE),
        "mean_ms",
        Target(1.2, is_most=True),
    ),
    Question(
        "entity",
        "one entity, 16 Redis features, 64 in flight",
        Side(GATEWAY_WITH_FEATURES, ENTITY),
        Side(GLUE, ENTITY),
        RATE,
        Target(10),
    ),
    Question(
        "ranking",
        "200 entities, 16 Redis features, 1 in flight",
        Side(GATEWAY_WITH_FEATURES, RANKING),
        Side(FLOOR, RANKING),
        "rows_per_s",
        Target(0.6),
    ),
    Question(
        "ranking-fields",
        "200 entities, 16 Redis features, 1 in flight, beside a floor that asks for single fields",
        Side(GATEWAY_WITH_FEATURES, RANKING),
        Side(FLOOR_OF_FIELDS, RANKING),
        "rows_per_s",
    ),
    Question(
        "ranking-many",
        "200 entities, 16 Redis features, 4 in flight, in the floor's pipeline too",
        Side(GATEWAY_WITH_FEATURES, RANKING_MANY),
        Side(FLOOR, RANKING_MANY),
        "rows_per_s",
    ),
    Question(
        "traces",
        "one call in a hundred traced",
        Side(GATEWAY, LOADED),
        Side(WITHOUT_TRACES, LOADED),
        PER_CPU,
        Target(0.97),
        is_fresh=True,
        rounds_times=TWICE,
    ),
    Question(
        "traces-all",
        "every call traced",
        Side(ALL_TRACED, LOADED),
        Side(WITHOUT_TRACES, LOADED),
        PER_CPU,
        Target(0.85),
        is_fresh=True,
    ),
    Question(
        "stream",
        "every prediction streamed to a monitor",
        Side(GATEWAY, LOADED),
        Side(WITHOUT_STREAM, LOADED),
        PER_CPU,
        Target(0.97),
        is_fresh=True,
        rounds_times=TWICE,
    ),
    Question(
        "metrics",
        "metrics",
        Side(GATEWAY, LOADED),
        Side(WITHOUT_METRICS, LOADED),
        PER_CPU,
        is_fresh=True,
    ),
    Question(
        "control",
        "nothing: the gateway beside itself",
        Side(GATEWAY, LOADED),
        Side(GATEWAY, LOADED),
        PER_CPU,
        is_fresh=True,
        rounds_times=TWICE,
    ),
    Question(
        "workers",
        "two workers on that core, 64 in flight for each",
        Side(TWO_WORKERS, Load("tensor", connections=2 * PER_WORKER, in_flight=8)),
        Side(GATEWAY, Load("tensor", connections=PER_WORKER, in_flight=8)),
        PER_CPU,
        is_fresh=True,
    ),
    Question(
        "parameter",
        "one-row tensors with a parameter, 64 in flight",
        Side(GATEWAY, PARAMETER),
        Side(CEILING, PARAMETER),
        RATE,
    ),
    Question(
        "numbered",
        "one-row tensors with a parameter that is another in each, 64 in flight",
        Side(GATEWAY, NUMBERED),
        Side(CEILING, NUMBERED),
        RATE,
    ),
    Question(
        "aio",
        "one-row tensors, 64 in flight, beside a servicer",
        Side(GATEWAY, LOADED),
        Side(AIO, LOADED),
        RATE,
    ),
    Question(
        "mlserver",
        "one-row tensors, 64 in flight, beside MLServer",
        Side(GATEWAY, LOADED),
        Side(MLSERVER, LOADED),
        RATE,
    ),
    Question(
        "triton",
        "one-row tensors, 64 in flight, beside Triton",
        Side(GATEWAY, LOADED),
        Side(TRITON, LOADED),
        RATE,
    ),
)
