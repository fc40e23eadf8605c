"""The report as one self-contained HTML page: no scripts, nothing loaded, plots in the page."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

BARS = (220, 64)
"""Width and height of a column's plot, in pixels."""

LINE = (560, 140)
SPARK = (120, 28)
NAMES_SHOWN = 10

_CAVEATS = {
    "no reference": "There is no usable profile.json beside this version's model: rows are "
    "counted, nothing is judged.",
    "quiet": "No rows for an hour. Open alarms stay open: for a week, or until new rows end them.",
    "waiting": "No window has ended yet: a window ends when it is old enough and has rows enough.",
}

_BLIND = (
    "Features and predictions may look as ever while the world changes: a model of house prices "
    "that never learned of a boom predicts what it always did. Only outcomes show that. Report "
    "them with MonitorService/ReportOutcomes."
)

_STYLE = """
:root { --ink:#1c2430; --soft:#5b6777; --line:#d9dee5; --now:#2563a8; --then:#b9c3cf; --bad:#b3261e;
        --good:#1d7a46; --paper:#fff; color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, .soft { color: var(--soft); } p { max-width: 48rem; margin: .3rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0;
         vertical-align: middle; }
td.n, th.n { text-align: right; }
.badge { display: inline-block; border-radius: 3px; padding: 0 .5rem; font-weight: 600;
         color: #fff; background: var(--soft); font-size: .85rem; }
.badge.ok { background: var(--good); } .badge.alarm { background: var(--bad); }
.bad { color: var(--bad); font-weight: 600; }
svg { display: block; } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.scroll { overflow-x: auto; }
""".strip()


def page(report: dict[str, Any]) -> str:
    """
    Return the page of a report.

    Everything in it that came from a model or a caller is escaped.
    """
    versions = report["versions"]
    alarms = sum(len(version["alarms"]) for version in versions)
    verdict = _badge("alarm", f"{alarms} open") if alarms else _badge("ok", "no alarm")
    body = "\n".join(map(_version, versions)) or (
        "<p>No predictions have come yet. A gateway sends them with <code>headrace serve "
        "--monitor-address</code>.</p>"
    )
    outcomes = report["outcomes"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Headrace monitor</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head><body>
<h1>Headrace monitor {verdict}</h1>
<p>As of {escape(_short(report["time"]))} UTC. Outcomes: {outcomes["joined"]:,} joined,
{outcomes["unknown"]:,} of unknown predictions, {outcomes["conflicting"]:,} conflicting;
{report["predictions_kept"]:,} predictions kept for theirs.
Rows lost on the way: {report["rows_lost"]:,}.{_not_kept(report["predictions_not_kept"])}</p>
{body}
<h2>What this cannot see</h2><p>{_BLIND}</p>
</body></html>
"""


def _not_kept(count: int) -> str:
    if not count:
        return ""
    return (
        f" {count:,} predictions were not kept for want of a place: lower "
        "<code>--kept-share</code>."
    )


def _version(version: dict[str, Any]) -> str:
    verdict = version["verdict"]
    title = f"{escape(version['model'])} version {version['version']}"
    parts = [f"<h2>{title} {_badge(verdict, verdict)}</h2>", _summary(version)]
    if verdict in _CAVEATS:
        parts.append(f"<p>{_CAVEATS[verdict]}</p>")
    parts.append(_unmatched(version["unmatched"]))
    parts.append(_performance(version))
    parts.append(_incidents(version["incidents"]))
    for title, group in (("Predictions", "predictions"), ("Features", "features")):
        if version[group]:
            parts.append(f"<h3>{title}</h3>{_columns(version[group])}")
    return "\n".join(part for part in parts if part)


def _unmatched(names: dict[str, list[str]]) -> str:
    said = (
        (names["in_profile"], "in the profile and never came, which counts as missing"),
        (names["in_rows"], "not in the profile, and not judged"),
    )
    return "".join(
        f"<p><span class=bad>Names differ.</span> {len(columns)} "
        f"{'column is' if len(columns) == 1 else 'columns are'} {what}: {_listed(columns)}.</p>"
        for columns, what in said
        if columns
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"<code>{escape(name)}</code>" for name in names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} …"


def _summary(version: dict[str, Any]) -> str:
    windows, now = version["windows"], version["open_window"]
    text = f"{version['rows']:,} rows since the monitor started; {len(windows)} windows ended"
    if now is not None:
        text += f"; the open one began {escape(_short(now['start']))} and has {now['rows']:,} rows"
    degraded = sum(window["degraded"] for window in windows)
    if degraded:
        text += f"; {degraded} lost more than 1 % of their rows and were not judged"
    return f"<p>{text}.</p>"


def _performance(version: dict[str, Any]) -> str:
    known = [of for of in version["performance"]["windows"] if of["error"] is not None]
    reference = version["performance"]["reference_error"]
    if not known:
        return ""
    last = known[-1]
    text = (
        f"Median error {last['error']:.1%} in the last window with outcomes, bias "
        f"{last['bias']:+.1%}; outcomes of {last['coverage']:.0%} of them are known."
    )
    if last["outcomes_of_zero"]:
        text += f" {last['outcomes_of_zero']:,} outcomes of 0 have no relative error: left out."
    if reference is None:
        text += " The profile says nothing of it in training: it is not judged."
    elif reference == 0:
        text += " In training it was 0, of which nothing is a multiple: it is not judged."
    else:
        text += f" In training it was {reference:.1%}."
    plot = _line([of["error"] for of in known], reference)
    return f"<h3>Realised error</h3><p>{text}</p>{plot}"


def _incidents(incidents: Sequence[dict[str, Any]]) -> str:
    if not incidents:
        return ""
    rows = "".join(
        f"<tr><td>{escape(of['signal'].replace('_', ' '))}</td><td>{escape(of['column'])}</td>"
        f"<td>{escape(_short(of['opened']))}</td>"
        f"<td>{escape(_short(of['resolved'])) if of['resolved'] else _BAD_OPEN}</td>"
        f"<td class=n>{of['statistic']:.3f}</td><td class=n>{of['threshold']:.3f}</td></tr>"
        for of in incidents
    )
    return (
        "<h3>Incidents</h3><div class=scroll><table><tr><th>signal<th>column<th>opened"
        "<th>resolved<th class=n>was<th class=n>limit</tr>"
        f"{rows}</table></div>"
    )


_BAD_OPEN = "<span class=bad>open</span>"


def _columns(columns: Iterable[dict[str, Any]]) -> str:
    ranked = sorted(columns, key=lambda column: (not column["alarms"], -_drift_of(column)))
    rows = "".join(map(_column, ranked))
    return (
        "<div class=scroll><table><tr><th>column<th class=n>drift<th>over time<th class=n>missing"
        "<th class=n>out of range<th class=n>too old<th>training (grey), last window (blue)</tr>"
        f"{rows}</table></div>"
    )


def _column(column: dict[str, Any]) -> str:
    alarms = column["alarms"]
    name = escape(column["name"])
    if alarms:
        name = f"<span class=bad>{name}</span>"
    drift = _drift_of(column)
    shown = _too_few(column) if drift == _UNKNOWN else f"{drift:.3f}"
    bad = " bad" if any(alarm.endswith("drift") for alarm in alarms) else ""
    current = column.get("current")
    rates = "".join(
        f"<td class='n{' bad' if rate in alarms else ''}'>{_rate(current, rate)}</td>"
        for rate in ("missing", "out_of_range", "stale")
    )
    return (
        f"<tr><td>{name}</td><td class='n{bad}'>{shown}</td>"
        f"<td>{_spark(column.get('drift_history', []))}</td>{rates}<td>{_bars(column)}</td></tr>"
    )


_UNKNOWN = float("-inf")


def _too_few(column: dict[str, Any]) -> str:
    values = column.get("drift_values")
    if values is None:
        return ""
    if values["needed"] is None:
        return "<span class=soft>one value in training</span>"
    return f"<span class=soft>{values['waiting']:,} of {values['needed']:,} values</span>"


def _drift_of(column: dict[str, Any]) -> float:
    statistics = column["statistics"]
    value = statistics.get("drift", statistics.get("prediction_drift", _UNKNOWN))
    return float(value)


def _rate(current: dict[str, Any] | None, name: str) -> str:
    return "" if current is None else f"{current[name]:.1%}"


def _bars(column: dict[str, Any]) -> str:
    """Draw the share of each bin, in training and now."""
    reference, current = column.get("reference"), column.get("current")
    if reference is None or current is None or len(reference["bins"]) != len(current["bins"]):
        return ""
    width, height = BARS
    then = _shares([0, *reference["bins"], 0])
    now = _shares([current["below"], *current["bins"], current["above"]])
    most = max(*then, *now, 1e-9)
    step = width / len(then)
    labels = ["below", *reference["labels"], "above"]
    shapes = []
    for i, (before, after, label) in enumerate(zip(then, now, labels, strict=True)):
        x = i * step
        tip = escape(f"{label}: {before:.1%} in training, {after:.1%} now")
        shapes.append(
            f"<g><title>{tip}</title>{_bar(x, step * 0.9, before / most, height, 'var(--then)')}"
            f"{_bar(x + step * 0.2, step * 0.5, after / most, height, 'var(--now)')}</g>"
        )
    return f"<svg width={width} height={height} role=img>{''.join(shapes)}</svg>"


def _bar(x: float, width: float, share: float, height: int, colour: str) -> str:
    tall = share * (height - 2)
    return (
        f"<rect x={x:.1f} y={height - tall:.1f} width={width:.1f} height={tall:.1f} "
        f'fill="{colour}"/>'
    )


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) or 1
    return [count / total for count in counts]


def _spark(values: Sequence[float | None]) -> str:
    known = [(i, value) for i, value in enumerate(values) if value is not None]
    if len(known) < 2:
        return ""
    width, height = SPARK
    most = max(0.2, *(value for _, value in known))
    last = max(1, len(values) - 1)
    points = " ".join(
        f"{i / last * (width - 4) + 2:.1f},{height - 2 - max(0, value) / most * (height - 4):.1f}"
        for i, value in known
    )
    return (
        f"<svg width={width} height={height} role=img><title>drift of each window, "
        f"up to {most:.2f}</title><polyline points='{points}' fill=none stroke='var(--now)' "
        "stroke-width=1.5 /></svg>"
    )


def _line(values: Sequence[float], reference: float | None) -> str:
    """Draw the error of each window, with the reference as a dashed line."""
    width, height = LINE
    most = max(*values, reference or 0, 1e-9) * 1.1
    left, low = 46, height - 18

    def y(value: float) -> float:
        return low - value / most * (low - 8)

    last = max(1, len(values) - 1)
    points = [(left + i / last * (width - left - 8), y(value)) for i, value in enumerate(values)]
    shapes = [
        f"<line x1={left} x2={width} y1={y(tick):.1f} y2={y(tick):.1f} stroke='var(--line)' />"
        f"<text x={left - 6} y={y(tick) + 4:.1f} text-anchor=end>{tick:.0%}</text>"
        for tick in (0.0, most / 2.2, most / 1.1)
    ]
    if reference is not None:
        at = y(reference)
        shapes.append(
            f"<line x1={left} x2={width} y1={at:.1f} y2={at:.1f} stroke='var(--soft)' "
            f"stroke-dasharray='4 3' /><text x={width - 4} y={at - 4:.1f} text-anchor=end>"
            "training</text>"
        )
    path = " ".join(f"{x:.1f},{at:.1f}" for x, at in points)
    shapes.append(f"<polyline points='{path}' fill=none stroke='var(--now)' stroke-width=2 />")
    shapes += [
        f"<circle cx={x:.1f} cy={at:.1f} r=3 fill='var(--now)'><title>{value:.1%}</title></circle>"
        for (x, at), value in zip(points, values, strict=True)
    ]
    return f"<svg width={width} height={height} role=img>{''.join(shapes)}</svg>"


def _badge(kind: str, text: str) -> str:
    return f'<span class="badge {escape(kind)}">{escape(text)}</span>'


def _short(time: str) -> str:
    return time[:19].replace("T", " ")
