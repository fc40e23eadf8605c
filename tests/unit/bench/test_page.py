"""The results page and the exit status say what came of each question."""

import dataclasses

import pytest


def measured(bench, question, ratio=1.0, rounds=7):
    one = dict.fromkeys(bench.contest.FIGURES, 100.0 * ratio)
    other = dict.fromkeys(bench.contest.FIGURES, 100.0)
    return bench.contest.Contest(question, [(one, other)] * rounds)


def named(bench, name):
    return next(question for question in bench.contests.QUESTIONS if question.name == name)


def page_of(bench, *contests):
    return bench.page.write(contests, "run.py --rounds 7 --only this", 7, 1.5)


def rows(page):
    table = page.split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:]]


def test_every_question_has_its_row_with_its_target_and_verdict(bench):
    contests = [measured(bench, question) for question in bench.contests.QUESTIONS]

    found = rows(page_of(bench, *contests))

    assert [(row[0], row[5]) for row in found] == [
        (question.title, str(question.target or "-")) for question in bench.contests.QUESTIONS
    ]
    assert {row[6] for row in found if row[5] == "-"} == {"reported"}
    assert all(len(row) == len(bench.page.HEADINGS) for row in found)


def test_the_page_shows_every_round_its_interval_and_how_to_repeat_it(bench):
    found = measured(bench, named(bench, "tensors"), rounds=2)
    first = found.rounds[0][0] | {"requests_per_s": 8_000.0}
    found.rounds[0] = (first, found.rounds[0][1] | {"requests_per_s": 10_000.0})

    page = page_of(bench, found)

    assert "| gateway, requests/s | 8,000, 100 |" in page
    assert "| ceiling, requests/s | 10,000, 100 |" in page
    assert "| ratio, round by round | 0.800, 1.000 |" in page
    assert "0.900 (0.800 to 1.000, 50%)" in page
    assert "`run.py --rounds 7 --only this`" in page


def test_where_processor_time_decides_requests_per_second_stand_beside_it(bench):
    found = measured(bench, named(bench, "stream"), 1.0)
    found.rounds = [(first | {"requests_per_s": 94.0}, second) for first, second in found.rounds]

    (row,) = rows(page_of(bench, found))

    assert row[4].startswith("1.000")
    assert row[6] == "met"
    assert row[7] == "requests/s, 0.940 (0.940 to 0.940, 98%)"


@pytest.mark.parametrize(("idle", "is_said"), [(0.02, True), (0.04, False)])
def test_a_generator_that_was_full_is_said(bench, idle, is_said):
    found = measured(bench, named(bench, "tensors"))
    found.rounds = [
        (first | {"generator_idle_share": 0.5}, second | {"generator_idle_share": idle})
        for first, second in found.rounds
    ]

    page = page_of(bench, found)

    assert ("the generator's core was full beside the ceiling (2.0% idle)" in page) is is_said
    assert "beside the gateway (" not in page
    assert f"gateway 50%, ceiling {idle:.0%}" in page


def test_of_a_latency_the_generator_s_own_part_is_said(bench):
    found = measured(bench, named(bench, "alone"))
    found.rounds = [
        (first | {"generator_cpu_ms": 0.06}, second | {"generator_cpu_ms": 0.05})
        for first, second in found.rounds
    ]

    assert "0.060 : 0.050 ms are the generator's own" in page_of(bench, found)


def test_overload_has_its_rows_in_the_same_table_and_its_own_part_of_the_page(bench):
    row = ["overload", *["-"] * (len(bench.page.HEADINGS) - 1)]
    section = bench.page.Section([row], ["overload: late"], "## Overload\n\nA curve.\n")
    contests = [measured(bench, named(bench, "tensors"))]

    page = bench.page.write(contests, "run.py", 7, 1.5, section)

    assert [found[0] for found in rows(page)] == [contests[0].question.title, "overload"]
    assert "- overload: late." in page
    assert page.index("| command |") < page.index("## Overload") < page.index("## Every round")


def test_a_peer_that_is_not_here_is_named_with_the_reason_and_no_figures(bench):
    skipped = bench.contest.Contest(named(bench, "triton"), skipped="`make triton` installs it")

    page = page_of(bench, measured(bench, named(bench, "tensors")), skipped)

    assert rows(page)[1][2:] == ["gateway", bench.names.TRITON, "-", "-", "skipped", "-"]
    assert "beside Triton: `make triton` installs it." in page


@pytest.mark.parametrize(
    ("ratios", "failure", "status"),
    [
        ([1.0, 1.0], None, 0),
        ([1.0, 0.5], None, 1),
        ([1.0, 0.5], "3 answers are wrong", 2),
    ],
)
def test_the_exit_status_tells_a_target_missed_from_a_question_not_answered(
    bench, capsys, ratios, failure, status
):
    names = ("tensors", "stream")
    contests = [measured(bench, named(bench, n), r) for n, r in zip(names, ratios, strict=True)]
    contests[0].failure = failure

    assert bench.run._status(contests) == status
    said = capsys.readouterr().err
    assert ("missed: every prediction" in said) is (ratios[1] < 0.9)
    assert (failure is not None) is ("failed: one-row tensors" in said)


def test_a_skipped_peer_fails_nothing(bench):
    skipped = bench.contest.Contest(named(bench, "triton"), skipped="not here")

    assert bench.run._status([skipped]) == 0


def test_every_question_is_about_servers_that_can_be_started_and_figures_there_are(bench):
    for question in bench.contests.QUESTIONS:
        assert {question.first.server, question.second.server} <= set(bench.peers.PEERS)
        assert question.figure in bench.contest.FIGURES
    names = [question.name for question in bench.contests.QUESTIONS]
    assert len(set(names)) == len(names)


def test_what_is_printed_and_what_is_json_have_the_same_verdict(bench):
    question = dataclasses.replace(named(bench, "tensors"), target=bench.contest.Target(0.5))
    found = measured(bench, question, 0.4)

    assert bench.page.line(found).endswith("≥ 0.5  missed")
    as_json = bench.page.as_json(found)
    assert (as_json["verdict"], as_json["target"]) == ("missed", "≥ 0.5")
    assert as_json["ratio"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--rounds", "0"), "expected at least 1"),
        (("--seconds", "-1"), "expected 0.1 to 600"),
        (("--seconds", "nan"), "expected 0.1 to 600"),
        (("--only", "nobody"), "invalid choice: 'nobody'"),
    ],
)
def test_a_bench_that_cannot_be_run_is_refused_before_anything_starts(
    bench, capsys, arguments, reason
):
    with pytest.raises(SystemExit) as refused:
        bench.run.main(arguments)

    assert refused.value.code == 2
    assert reason in capsys.readouterr().err
