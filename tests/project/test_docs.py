"""The documentation says what is there, and what it shows is so."""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from headrace import errors
from headrace.command_arguments import command_parser
from headrace.monitoring.metrics import METRICS as MONITOR_METRICS
from headrace.repository.config import parse_config
from headrace.repository.parameters import KNOWN_PARAMETERS
from headrace.rpc.status import CODES
from headrace.settings import CommandSettings, MonitorSettings, ServeSettings
from headrace.telemetry.instruments import METRICS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def subclasses(base):
    return {base}.union(*(subclasses(child) for child in base.__subclasses__()))


@pytest.mark.parametrize(
    ("kind", "section", "name"),
    [
        (kind, section, name)
        for kind, section in ((ServeSettings, "serve"), (MonitorSettings, "monitor"))
        for name in sorted(kind.model_fields)
    ],
)
def test_every_setting_is_documented_with_flag_default_and_effect(kind, section, name):
    field = kind.model_fields[name]
    page = (ROOT / "docs" / "settings.md").read_text()
    page = page.partition(f"## `headrace {section}`")[2].partition("\n## ")[0]

    default = "required" if field.is_required() else f"`{field.default}`"
    assert f"| `--{name.replace('_', '-')}` | {default} | {field.description} |" in page


def command_flags(parser, words=()):
    """Yield (command, flag, default) of every command that is no server with settings."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                if name not in {"serve", "monitor"}:
                    yield from command_flags(inner, (*words, name))
        elif words and action.option_strings and not isinstance(action, argparse._HelpAction):
            field = CommandSettings.model_fields.get(action.dest)
            default = field.default if field is not None else action.default
            yield " ".join(words), action.option_strings[0], action.required or default


@pytest.mark.parametrize(
    ("command", "flag", "default"), sorted(command_flags(command_parser()), key=str)
)
def test_every_flag_of_the_other_commands_is_documented(command, flag, default):
    page = (ROOT / "docs" / "settings.md").read_text().partition("## Other commands")[2]
    rows = [line.split(" | ") for line in page.splitlines() if f" | `{flag}` | " in line]

    (row,) = [row for row in rows if f"`{command}`" in row[0].lstrip("| ").split(", ")]
    assert row[2] == ("required" if default is True else f"`{default}`")


@pytest.mark.parametrize("key", sorted(KNOWN_PARAMETERS - {"share_session_between_instances"}))
def test_every_parameter_of_a_models_config_is_documented(key):
    page = (ROOT / "docs" / "operations.md").read_text()
    cells = re.findall(r"^\| (`[^|]*`) \|", page, re.MULTILINE)

    assert f"`{key}`" in ", ".join(cells).split(", ")


def test_the_example_of_shape_buckets_is_read():
    page = (ROOT / "docs" / "operations.md").read_text()
    example = re.search(r'```\n(parameters { key: "shape_buckets".*?)```', page, re.DOTALL)[1]

    rules = parse_config(example + "max_batch_size: 8", "m").shape_buckets
    assert rules.sizes == {"tokens": (32, 128, 512)}
    assert rules.pad == {"ids": 1}


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_is_documented(name):
    page = (ROOT / "docs" / "operations.md").read_text()

    assert f"| `{name}` | {METRICS[name]} |" in page


@pytest.mark.parametrize("name", sorted(MONITOR_METRICS))
def test_every_metric_of_the_monitor_is_documented(name):
    page = (ROOT / "docs" / "monitoring.md").read_text()

    assert f"| `{name}` | {MONITOR_METRICS[name]} |" in page


@pytest.mark.parametrize("error", sorted(subclasses(errors.ServingError), key=lambda e: e.__name__))
def test_every_error_has_a_status_and_a_place_in_the_tree(error):
    if error is not errors.ServingError:
        assert any(base in CODES for base in error.__mro__)
    assert f" {error.__name__}" in errors.__doc__


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())

    missing = [link for link in links if "://" not in link and not (folder / link).exists()]
    assert missing == []


def test_the_readmes_commands_are_targets():
    makefile = (ROOT / "Makefile").read_text()

    commands = re.search(r"```\n(make demo\nmake test)\n```", README)
    assert commands is not None
    for command in commands[1].splitlines():
        assert re.search(rf"^{command.removeprefix('make ')}:", makefile, re.MULTILINE)


def test_the_readmes_figures_are_those_of_the_results_it_links_to():
    section = README[README.index("## How fast") : README.index("## Where to look")]
    page = ROOT / re.search(r"\((loadtest/results/[^)]+)\)", section)[1]
    table = page.read_text().split("\n\n")[1].splitlines()
    rows = re.findall(r"^\|.*\|$", section, re.MULTILINE)

    assert len(rows) > 2
    assert rows[:2] == table[:2]
    assert set(rows) <= set(table)


def masked(text):
    """Hide what differs from run to run: numbers, identifiers, the padding around them."""
    text = re.sub(r"prediction [0-9a-f]{26}", "prediction #", text)
    text = re.sub(r"[+-]?[\d.,:]*\d", "#", text)
    # Which half-year an alarm begins in depends on where a window ends.
    text = re.sub(r"^(│ # H# .*│)[^│]*│$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"([─━═])+", r"\1", text)  # a column is as wide as what is in it
    return [re.sub(r"\s+", " ", line).strip() for line in text.strip().splitlines()]


@pytest.mark.timeout(420)
def test_the_demo_prints_what_the_readme_shows_and_leaves_no_process_behind():
    shown = re.search(r"<!-- demo -->\n```\n(.*?)```", README, re.DOTALL)[1]

    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "demo", "--root", str(ROOT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, log = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise

    assert process.returncode == 0, log
    assert masked(output) == masked(shown)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    for port in set(re.findall(r"127\.0\.0\.1:(\d+)", output)):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)), 5).close()


def test_no_machine_path_and_no_registry_is_written_down():
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    own = str(Path(__file__).relative_to(ROOT))
    pattern = re.compile(r"(^|[\s\"'=(])/(work|tmp|root|home)/|\.\./shared|index-url [^-]")

    found = [
        f"{name}:{number}"
        for name in files
        if name != own and (ROOT / name).suffix not in {".npz", ".onnx", ".png"}
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []
