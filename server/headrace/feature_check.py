"""`headrace features check`: whether a feature repository can be served from its Redis store."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from headrace.errors import FeaturePlanError, StartupError
from headrace.features.inspection import (
    EntityKey,
    clashing_projects,
    group_pattern,
    read_key,
    type_names,
)
from headrace.features.layout import DUMMY_JOIN_KEY, time_field
from headrace.features.registry_views import StoredView
from headrace.features.repo import FeatureRepo, open_feature_repo
from headrace.features.store_inspection import Hash, Scan, StoreInspection
from headrace.features.values import ValueMismatchError, decode_time
from headrace.presentation import duration
from headrace.terminal import open_console, printable

HASHES_PER_GROUP = 200
"""Entities of each set of join keys whose hashes are looked at."""

WALKED_PER_KEY = 100
"""Keys of the store gone through for each of `--keys`, to find those of a small view."""

SMALL_FIELDS = 128
"""Fields up to which Redis keeps a hash as a listpack (`hash-max-listpack-entries`)."""

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
    """
    The hashes of one set of join keys: how many were looked at, and what they are like.

    What this user may not ask for is None, or an encoding "unknown".
    """

    join_keys: str
    hashes: int
    fields: float | None
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
    """All that was found; `keys` and what follows are of a sample, where the store has more."""

    project: str
    services: dict[str, str]
    keys_in_store: int | None = None
    keys: dict[str, int] = field(default_factory=dict)
    projects: dict[str, int] = field(default_factory=dict)
    groups: list[GroupReport] = field(default_factory=list)
    views: list[ViewReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


@dataclass(slots=True)
class _Group:
    """The views of one set of join keys, and the keys that were found of it."""

    names: tuple[str, ...]
    views: list[StoredView] = field(default_factory=list)
    found: dict[bytes, EntityKey] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return ", ".join(self.names) or "no entity"

    def take(self, keys: Iterable[tuple[bytes, EntityKey]]) -> None:
        self.found.update(keys)

    def readable(self) -> list[bytes]:
        """Return the keys that are found by those who look for what the registry declares."""
        wrong = self._wrong()
        return [raw for raw in self.found if raw not in wrong]

    def type_findings(self) -> Iterator[Finding]:
        wrong = self._wrong()
        for types, count in Counter(key.value_types for key in wrong.values()).items():
            expected = " or ".join(sorted(type_names(own) for own in self._types()))
            yield Finding(
                "error",
                f"{count} of {len(self.found)} keys of {self.label} that were looked at are "
                f"{type_names(types)} where the registry has {expected}, and are found by no "
                "reader: write them with that type (feast materialize does), then delete them",
            )

    def _types(self) -> set[tuple[int, ...]]:
        return {tuple([view.join_keys[name] for name in self.names]) for view in self.views}

    def _wrong(self) -> dict[bytes, EntityKey]:
        types = self._types()
        if not types or not self.names:  # of views that are gone; Feast's own dummy
            return {}
        return {raw: key for raw, key in self.found.items() if key.value_types not in types}


def check(
    feature_repo: Path,
    *,
    on_demand_modules: str = "",
    keys_max: int,
    timeout_s: float,
    as_json: bool,
) -> int:
    """
    Look at every feature service and at some of what is stored. Only reads.

    Args:
        feature_repo: An applied Feast repository.
        on_demand_modules: As `headrace serve` takes them.
        keys_max: How many keys of the store to look at.
        timeout_s: Longest wait for each of the store's answers.
        as_json: For machines.

    Returns:
        1 when something is wrong, 0 when there are at most warnings.

    Raises:
        StartupError: the repository cannot be opened, or its store does not answer, does not let
            this user in, or does not let it look.
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
    if refusal := _refusal(repo):
        report.findings.append(Finding("error", f"`headrace serve` does not start: {refusal}"))
    connect = repo.redis_client(timeout_s)
    if connect is None:
        report.findings.append(
            Finding("warning", "the online store is not Redis: nothing is known of what it holds")
        )
    else:
        try:
            _look_at_store(connect, timeout_s, repo, report, keys_max)
        except StartupError as error:
            if refusal:  # the better reason
                raise StartupError(f"{refusal}; {error}") from None
            raise
    if as_json:
        open_console(as_json=True).print(json.dumps(asdict(report)))
    else:
        _show(report)
    return 1 if any(finding.severity == "error" for finding in report.findings) else 0


def _reason(repo: FeatureRepo, service: str) -> str:
    try:
        repo.compile(service)
    except FeaturePlanError as error:
        return str(error)
    return ""


def _refusal(repo: FeatureRepo) -> str:
    """Return what `headrace serve` says of the online store's settings."""
    try:
        repo.online_store().close()
    except StartupError as error:
        return str(error)
    return ""


def _look_at_store(
    connect: Callable[[], Any], timeout_s: float, repo: FeatureRepo, report: Report, keys_max: int
) -> None:
    store = StoreInspection(connect, timeout_s)
    try:
        report.keys_in_store = store.key_count()
        scan = store.scan(None, keys_max=keys_max, walk_max=keys_max)
        keys = _sort_keys(scan, report)
        report.findings += _layout_findings(report)
        stored = repo.stored_views()
        groups = _found_groups(stored, keys)
        for join_keys, group in groups.items():
            more = scan
            if not scan.is_complete and len(group.found) < HASHES_PER_GROUP:
                pattern = group_pattern(join_keys, report.project)
                walk_max = WALKED_PER_KEY * keys_max
                more = store.scan(pattern, keys_max=HASHES_PER_GROUP, walk_max=walk_max)
                own = [(raw, read_key(raw)) for raw in more.keys]
                group.take([(raw, key) for raw, key in own if key.project == report.project])
            _look_at_group(store, report, group, more)
        lost = sum(not key.join_keys for _, key in keys)
        if lost:
            report.findings.append(
                Finding(
                    "error",
                    f"{lost} keys have no join key and are found by no reader: Feast's "
                    "write_to_online_store and push put views without entities there; let it "
                    "materialize them, then delete these keys",
                )
            )
        if store.denied:
            report.findings.append(
                Finding(
                    "warning",
                    f"this user of the store may not call {', '.join(sorted(store.denied))}: "
                    "what only they tell is left out",
                )
            )
    finally:
        store.close()


def _sort_keys(scan: Scan, report: Report) -> list[tuple[bytes, EntityKey]]:
    """Count the keys' layouts and projects; return those of this project that can be read."""
    layouts: Counter[str] = Counter()
    projects: Counter[str] = Counter()
    own = []
    for raw in scan.keys:
        key = read_key(raw)
        layouts[key.layout] += 1
        if key.layout == "current":
            projects[key.project] += 1
            if key.project == report.project:
                own.append((raw, key))
    report.keys, report.projects = dict(layouts), dict(projects)
    return own


def _found_groups(
    stored: Sequence[StoredView], keys: Sequence[tuple[bytes, EntityKey]]
) -> dict[tuple[str, ...], _Group]:
    """Sort views and keys by their join keys; keys of views that are gone have groups, too."""
    groups: dict[tuple[str, ...], _Group] = {}
    for view in stored:
        names = tuple(sorted(view.join_keys))
        groups.setdefault(names, _Group(names)).views.append(view)
    for raw, key in keys:
        if key.join_keys:
            names = tuple(name for name in key.join_keys if name != DUMMY_JOIN_KEY)
            groups.setdefault(names, _Group(names)).take([(raw, key)])
    return dict(sorted(groups.items()))


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


def _look_at_group(store: StoreInspection, report: Report, group: _Group, scan: Scan) -> None:
    report.findings += group.type_findings()
    keys = group.readable()[:HASHES_PER_GROUP]
    hashes = store.look(keys, [time_field(view.name) for view in group.views])
    report.findings += _missing_findings(group, hashes, scan, report.keys_in_store)
    if not hashes:
        return
    encodings = Counter(one.encoding or "unknown" for one in hashes)
    fields = [one.fields for one in hashes if one.fields is not None]
    report.groups.append(
        GroupReport(
            join_keys=group.label,
            hashes=len(hashes),
            fields=median(fields) if fields else None,
            encodings=dict(encodings),
            expiring=sum(one.ttl_s is not None and one.ttl_s >= 0 for one in hashes),
        )
    )
    tables = sum(n for name, n in encodings.items() if name not in (*LISTPACKS, "unknown"))
    if tables and len(fields) == len(hashes) and max(fields) <= SMALL_FIELDS:
        report.findings.append(
            Finding(
                "warning",
                f"{tables} of {len(hashes)} hashes of {group.label} are tables although they are "
                "small: a value of more than 64 bytes (an embedding, a text) makes one so, and "
                "three times as large; keep such features in a view with another entity",
            )
        )
    now_s = time.time()
    for i, view in enumerate(group.views):
        of = _view_report(view, [one.values[i] for one in hashes], now_s)
        report.views.append(of)
        if of.outside_ttl:
            report.findings.append(
                Finding(
                    "warning",
                    f"feature view '{view.name}' is older than its TTL for {of.outside_ttl} of "
                    f"{of.hashes} entities: is it materialized often enough?",
                )
            )


def _missing_findings(
    group: _Group, hashes: Sequence[Hash], scan: Scan, total: int | None
) -> Iterator[Finding]:
    """Name the views that should have values and have none, and say how far that was looked."""
    if hashes:
        where = f"the {len(hashes)} hashes of {group.label} that were looked at"
    elif scan.is_complete:
        where = "the store"
    else:
        most = scan.walked if total is None else min(scan.walked, total)
        of = "" if total is None else f" of {total:,}"
        where = f"about {most:,}{of} keys; --keys N looks at more"
    for i, view in enumerate(group.views):
        if view.is_written and not any(one.values[i] is not None for one in hashes):
            yield Finding("warning", f"feature view '{view.name}' has no values in {where}")


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


def _show(report: Report) -> None:
    console = open_console()
    services = Table("feature service", "state", "reason", title=f"project {report.project}")
    for name, reason in report.services.items():
        services.add_row(printable(name), "UNAVAILABLE" if reason else "READY", printable(reason))
    console.print(services)
    if report.keys:
        counts = ", ".join(f"{count} {layout}" for layout, count in report.keys.items())
        of = "" if report.keys_in_store is None else f" (of {report.keys_in_store:,} in the store)"
        console.print(f"keys looked at, by layout: {counts}{of}")
        groups = Table("join keys", "hashes", "fields", "encoding", "expiring")
        for group in report.groups:
            encodings = ", ".join(f"{name} {count}" for name, count in group.encodings.items())
            groups.add_row(
                *(printable(group.join_keys), str(group.hashes)),
                *("" if group.fields is None else f"{group.fields:g}", encodings),
                str(group.expiring),
            )
        console.print(groups)
        ages = ("newest seen", "oldest seen")
        views = Table("feature view", "entities", *ages, "TTL", "older than its TTL")
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
