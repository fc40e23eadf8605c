"""`headrace features check`: whether a feature repository can be served from its Redis store."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Table

from headrace.errors import FeaturePlanError, StartupError
from headrace.features.inspection import clashing_projects, read_key
from headrace.features.layout import DUMMY_JOIN_KEY, time_field
from headrace.features.registry_views import StoredView
from headrace.features.repo import FeatureRepo, open_feature_repo
from headrace.features.values import ValueMismatchError, decode_time
from headrace.presentation import duration
from headrace.terminal import printable

HASHES_PER_GROUP = 200
"""Entities of each set of join keys whose hashes are looked at."""

LISTPACKS = ("listpack", "ziplist")


@dataclass(frozen=True, slots=True)
class Finding:
    """
    Something that somebody should know.

    Args:
        severity: `error`: features are not served, or not rightly; `warning`: they may not be.
        text: What was found, and what to do.
    """

    severity: str
    text: str


@dataclass(frozen=True, slots=True)
class GroupReport:
    """The hashes of one set of join keys: how many were looked at, and what they are like."""

    join_keys: str
    hashes: int
    fields: float
    encodings: dict[str, int]
    expiring: int


@dataclass(frozen=True, slots=True)
class ViewReport:
    """One feature view, in the hashes that were looked at; ages in seconds."""

    view: str
    hashes: int
    newest_age_s: float | None
    oldest_age_s: float | None
    ttl_s: float | None
    outside_ttl: int


@dataclass(slots=True)
class Report:
    """All that was found."""

    project: str
    services: dict[str, str]
    keys: dict[str, int] = field(default_factory=dict)
    projects: dict[str, int] = field(default_factory=dict)
    groups: list[GroupReport] = field(default_factory=list)
    views: list[ViewReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def check(feature_repo: Path, *, on_demand_modules: str = "", keys_max: int, as_json: bool) -> int:
    """
    Look at every feature service and at some of what is stored. Only reads.

    Args:
        feature_repo: An applied Feast repository.
        on_demand_modules: As `headrace serve` takes them.
        keys_max: How many keys of the store to look at.
        as_json: For machines.

    Returns:
        1 when something is wrong, 0 when there are at most warnings.

    Raises:
        StartupError: the repository cannot be opened, or its store does not answer.
    """
    repo = open_feature_repo(feature_repo, on_demand_modules)
    report = Report(repo.project, {name: _reason(repo, name) for name in repo.services()})
    report.findings += [
        Finding("error", f"feature service '{name}' cannot be served: {reason}")
        for name, reason in report.services.items()
        if reason
    ]
    report.findings += [
        Finding("error", f"{text}; Feast overwrites one with the other: rename one")
        for text in repo.collisions()
    ]
    client = repo.redis_client()
    if client is None:
        report.findings.append(
            Finding("warning", "the online store is not Redis: nothing is known of what it holds")
        )
    else:
        try:
            _look_at_store(client, repo, report, keys_max)
        except RedisError as error:
            raise StartupError(
                f"the online store does not answer: {type(error).__name__}"
            ) from None
        finally:
            client.close()
    if as_json:
        Console(soft_wrap=True, highlight=False, markup=False).print(json.dumps(asdict(report)))
    else:
        _show(report)
    return 1 if any(finding.severity == "error" for finding in report.findings) else 0


def _reason(repo: FeatureRepo, service: str) -> str:
    try:
        repo.compile(service)
    except FeaturePlanError as error:
        return str(error)
    return ""


def _look_at_store(client: Any, repo: FeatureRepo, report: Report, keys_max: int) -> None:
    groups: dict[tuple[str, ...], list[bytes]] = {}
    layouts: Counter[str] = Counter()
    projects: Counter[str] = Counter()
    for raw in islice(client.scan_iter(count=1_000), keys_max):
        key = read_key(raw)
        layouts[key.layout] += 1
        if key.layout == "current":
            projects[key.project] += 1
            if key.project == repo.project:
                groups.setdefault(key.join_keys, []).append(raw)
    report.keys, report.projects = dict(layouts), dict(projects)
    report.findings += _layout_findings(report)
    now_s = time.time()
    stored = repo.stored_views()
    for join_keys, keys in sorted(groups.items()):
        _look_at_group(client, report, join_keys, keys[:HASHES_PER_GROUP], stored, now_s)
    seen = {view.view for view in report.views if view.hashes}
    report.findings += [
        Finding("warning", f"feature view '{view.name}' has no values in what was looked at")
        for view in stored
        if view.name not in seen
    ]


def _layout_findings(report: Report) -> Iterator[Finding]:
    old = {
        "0.38 to 0.43": "Feast 0.38 to 0.43",
        "version 2": "entity_key_serialization_version 2",
    }
    for layout, writer in old.items():
        if count := report.keys.get(layout):
            yield Finding(
                "error",
                f"{count} keys were written by {writer} and are found by no reader of today: "
                "materialize again, then delete them",
            )
    for short, long in clashing_projects([*report.projects, report.project]):
        yield Finding(
            "warning",
            f"project '{long}' ends like '{short}' in the same database: when Feast deletes a view "
            f"of '{short}' it deletes that of '{long}', too; use another database",
        )
    if not report.keys:
        yield Finding("warning", "the store is empty: nothing has been materialized")
    elif report.project not in report.projects:
        yield Finding("warning", f"none of the keys looked at is of project '{report.project}'")


def _look_at_group(
    client: Any,
    report: Report,
    join_keys: tuple[str, ...],
    keys: Sequence[bytes],
    stored: Sequence[StoredView],
    now_s: float,
) -> None:
    names = tuple(name for name in join_keys if name != DUMMY_JOIN_KEY)
    views = [view for view in stored if view.join_keys == frozenset(names)]
    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.hlen(key)
        pipeline.object("ENCODING", key)
        pipeline.ttl(key)
        pipeline.hmget(key, [time_field(view.name) for view in views] or [b""])
    replies = pipeline.execute(raise_on_error=False)
    rows = [tuple(replies[i : i + 4]) for i in range(0, len(replies), 4)]
    rows = [row for row in rows if isinstance(row[0], int)]  # others are no hashes
    encodings = Counter(_text(row[1]) for row in rows)
    label = ", ".join(names) or "no entity"
    report.groups.append(
        GroupReport(
            join_keys=label,
            hashes=len(rows),
            fields=median(row[0] for row in rows) if rows else 0,
            encodings=dict(encodings),
            expiring=sum(isinstance(row[2], int) and row[2] >= 0 for row in rows),
        )
    )
    tables = sum(n for name, n in encodings.items() if name not in (*LISTPACKS, "unknown"))
    small = [row for row in rows if isinstance(row[0], int) and row[0] <= 128]
    if tables and len(small) == len(rows):
        report.findings.append(
            Finding(
                "warning",
                f"{tables} of {len(rows)} hashes of {label} are tables although they are small: a "
                "value of more than 64 bytes (an embedding, a text) makes one so, and three times "
                "as large; keep such features in a view with another entity",
            )
        )
    for i, view in enumerate(views):
        times = (row[3][i] for row in rows if isinstance(row[3], list))
        report.views.append(_view_report(view, times, now_s))
        if report.views[-1].outside_ttl:
            of = report.views[-1]
            report.findings.append(
                Finding(
                    "warning",
                    f"feature view '{view.name}' is older than its TTL for {of.outside_ttl} of "
                    f"{of.hashes} entities: is it materialized often enough?",
                )
            )


def _view_report(view: StoredView, times: Iterable[bytes | None], now_s: float) -> ViewReport:
    ages_s = []
    for raw in times:
        if raw is not None:
            try:
                ages_s.append(now_s - decode_time(raw))
            except ValueMismatchError:
                continue
    ttl_s = view.ttl_s
    return ViewReport(
        view=view.name,
        hashes=len(ages_s),
        newest_age_s=min(ages_s, default=None),
        oldest_age_s=max(ages_s, default=None),
        ttl_s=ttl_s,
        outside_ttl=0 if ttl_s is None else sum(age_s > ttl_s for age_s in ages_s),
    )


def _text(reply: Any) -> str:
    return (
        reply.decode()
        if isinstance(reply, bytes)
        else reply
        if isinstance(reply, str)
        else "unknown"
    )


def _show(report: Report) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    services = Table("feature service", "state", "reason", title=f"project {report.project}")
    for name, reason in report.services.items():
        services.add_row(printable(name), "UNAVAILABLE" if reason else "READY", printable(reason))
    console.print(services)
    if report.keys:
        counts = ", ".join(f"{count} {layout}" for layout, count in report.keys.items())
        console.print(f"keys looked at, by layout: {counts}")
        groups = Table("join keys", "hashes", "fields", "encoding", "expiring")
        for group in report.groups:
            encodings = ", ".join(f"{name} {count}" for name, count in group.encodings.items())
            groups.add_row(
                *(printable(group.join_keys), str(group.hashes), f"{group.fields:g}", encodings),
                str(group.expiring),
            )
        console.print(groups)
        views = Table("feature view", "entities", "newest", "oldest", "TTL", "older than its TTL")
        for view in report.views:
            views.add_row(
                printable(view.view),
                str(view.hashes),
                *(
                    "" if age is None else duration(age)
                    for age in (view.newest_age_s, view.oldest_age_s)
                ),
                "for ever" if view.ttl_s is None else duration(view.ttl_s),
                str(view.outside_ttl),
            )
        console.print(views)
    for finding in report.findings:
        style = "red" if finding.severity == "error" else "yellow"
        console.print(printable(f"{finding.severity}: {finding.text}"), style=style)
    if not report.findings:
        console.print("nothing is wrong", style="green")
