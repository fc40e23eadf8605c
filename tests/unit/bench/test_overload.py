"""What is made of a sweep: shares of the peak, verdicts, a page, a picture."""

import math

import bench_modules
import pytest

bench = bench_modules.load(
    *("flood", "goodput", "overload", "overload_page", "goodput_curve", "overload_models", "page")
)
goodput, flood = bench.goodput, bench.flood


def ran(figures, cpu_s=8.0, memory_mib=(100.0,)):
    """Make a flood of ten seconds, in which the gateway used so much."""
    most = {"window_start_s": 50.0, "window_end_s": 60.0, "window_s": 10.0, **figures}
    steps = len(memory_mib)
    looks = [flood.Look(40.0, 0.0, memory_mib[0]), flood.Look(50.0, 3.0, memory_mib[0])]
    looks += [
        flood.Look(50.0 + 10.0 * (step + 1) / steps, 3.0 + cpu_s * (step + 1) / steps, one)
        for step, one in enumerate(memory_mib)
    ]
    return flood.Flood(most, [*looks, flood.Look(65.0, 90.0, memory_mib[-1])])


def offered(goodput_per_s=95.0, **more):
    figures = {
        "offered": 2_000,
        "offered_per_s": 200.0,
        "achieved_per_s": 190.0,
        "generator_cpu_share": 0.25,
        "generator_idle_share": 0.5,
        "goodput_per_s": goodput_per_s,
        "statuses": {"RESOURCE_EXHAUSTED": 900, "UNAVAILABLE": 100},
        "served_p99_ms": 700.0,
        "refused_p50_ms": 0.5,
        "refused_p99_ms": 2.0,
        "refused_from_send_p99_ms": 1.5,
        "recovered_s": 0.25,
        "wrong": 0,
        "unanswered": 0,
        "generator_is_bottleneck": False,
    }
    return {**figures, **more}


PEAK = goodput.Peak(100.0, 125.0)


def sweep(*floods, share=2.0, model="slow"):
    points = [goodput.point(share, PEAK, one) for one in floods]
    return goodput.Sweep(model, 0.8, [PEAK] * len(points), {share: points})


def test_a_peak_is_what_was_right_by_the_second_and_by_the_processor_second():
    found = goodput.peak(ran({"requests": 1_010, "errors": 10}, cpu_s=8.0))

    assert found == pytest.approx((100.0, 125.0))


def test_goodput_is_compared_with_the_peak_by_both_clocks():
    point = goodput.point(2.0, PEAK, ran(offered(95.0), cpu_s=9.5))

    assert point.goodput_share == pytest.approx(0.95)
    assert point.cpu_goodput_share == pytest.approx(0.8)
    assert point.offered_share == pytest.approx(2.0)
    assert point.refused_share == pytest.approx(0.5)


def test_memory_that_rises_once_has_not_grown_and_memory_that_goes_on_rising_has():
    risen = ran({}, memory_mib=[150.0] * 20)
    rising = ran({}, memory_mib=[100.0 + step for step in range(20)])

    assert risen.growth_mib == pytest.approx(0)
    assert rising.growth_mib > 8


def test_memory_that_was_taken_before_the_flood_or_is_taken_after_it_is_no_growth_of_it():
    flooded = ran({}, memory_mib=[100.0] * 20)
    start, end = flooded.looks[0], flooded.looks[-1]
    looks = [start._replace(memory_mib=20.0), *flooded.looks[1:-1], end._replace(memory_mib=300.0)]

    assert flooded._replace(looks=looks).growth_mib == pytest.approx(0)


def test_memory_is_compared_by_time_and_not_by_how_often_one_looked():
    figures = {"window_start_s": 50.0, "window_end_s": 60.0}
    seldom = [flood.Look(at_s, 0.0, mib) for at_s, mib in ((50.0, 100.0), (54.0, 150.0))]
    often = [flood.Look(56.0 + step / 10, 0.0, 152.0) for step in range(40)]

    assert flood.Flood(figures, [*seldom, *often]).growth_mib == pytest.approx(2)


def test_a_window_too_short_for_two_looks_lies_between_those_around_it():
    figures = {"window_start_s": 50.0, "window_end_s": 50.2}
    looks = [flood.Look(49.9, 0.0, 100.0), flood.Look(50.3, 0.0, 101.0)]

    assert flood.Flood(figures, looks).growth_mib == pytest.approx(1)


def test_the_middle_is_the_median_and_of_faults_the_worst():
    found = sweep(
        ran(offered(80.0)),
        ran(offered(95.0, recovered_s=1.5, wrong=1)),
        ran(offered(96.0)),
    ).middle(2.0)

    assert found.goodput_share == pytest.approx(0.95)
    assert (found.recovered_s, found.wrong, found.is_generator_bottleneck) == (1.5, 1, False)


def judged(*floods, share=2.0):
    return goodput.judgements(sweep(*floods, share=share), is_cheap_to_refuse=True)


def test_a_round_in_which_the_generator_was_late_judges_nothing_but_keeps_its_wrong_answers():
    late = ran(offered(10.0, generator_is_bottleneck=True, recovered_s=9.0, wrong=2))
    found = sweep(ran(offered(95.0)), late, ran(offered(97.0)))

    assert found.middle(2.0).goodput_share == pytest.approx(0.96)
    assert found.middle(2.0).recovered_s == pytest.approx(0.25)
    assert found.middle(2.0).wrong == 2
    assert {one.verdict for one in judged(ran(offered(95.0)), late, ran(offered(97.0)))} == {"met"}


@pytest.mark.parametrize(
    ("rounds", "verdict"),
    [
        ((91.0, 95.0, 97.0), "met"),
        ((89.0, 95.0, 97.0), "met, barely"),
        ((80.0, 89.0, 97.0), "missed, barely"),
        ((80.0, 85.0, 89.0), "missed"),
    ],
)
def test_a_goodput_whose_rounds_differ_is_barely_what_it_is(rounds, verdict):
    goodput_found, *_ = judged(*(ran(offered(per_s)) for per_s in rounds))
    assert goodput_found.verdict == verdict


def test_a_flood_fills_the_queue_before_it_counts():
    warm_up_s = bench.overload.warm_up_s
    assert warm_up_s(0.5, 0.8) == warm_up_s(5.0, 0.8) == 1.0
    assert warm_up_s(1.5, 0.8) == pytest.approx(1.6)
    assert warm_up_s(1.01, 0.8) == 4.0


def test_what_a_late_generator_asked_in_most_rounds_is_not_measured_and_not_missed():
    late = ran(offered(10.0, generator_is_bottleneck=True, achieved_per_s=90.0))

    found = judged(late, late)

    assert {one.verdict for one in found} == {"not measured"}
    assert not any(one.is_missed for one in found)


@pytest.mark.parametrize(
    ("achieved_per_s", "recovered_s", "verdict"),
    [(150.0, 1.0, "met"), (150.0, 3.0, "not measured"), (90.0, 1.0, "not measured")],
)
def test_a_late_generator_that_floods_makes_a_recovery_look_longer_and_never_shorter(
    achieved_per_s, recovered_s, verdict
):
    late = offered(
        generator_is_bottleneck=True, achieved_per_s=achieved_per_s, recovered_s=recovered_s
    )

    (recovery,) = [one for one in judged(ran(late)) if one.figure == "recovery, s"]

    assert recovery.verdict == verdict


def test_a_tiny_model_that_no_generator_floods_is_said_and_fails_nothing():
    late = offered(generator_is_bottleneck=True, achieved_per_s=90.0)
    found = overload(sweep(ran(offered())), sweep(ran(late), model="tiny"))

    assert found.status == 0
    assert len(found.unmeasured) == 1


def test_a_model_whose_rows_are_cheap_needs_to_recover_and_no_more():
    asked = sweep(ran(offered(30.0, refused_p99_ms=80.0)), model="tiny")

    found = goodput.judgements(asked, is_cheap_to_refuse=False)

    assert [(one.figure, one.verdict) for one in found] == [("recovery, s", "met")]


@pytest.mark.parametrize(
    ("more", "missed"),
    [
        ({}, []),
        ({"goodput_per_s": 89.0}, ["goodput in time, of the peak"]),
        ({"refused_p99_ms": 5.1}, ["refused within, p99 ms"]),
        ({"refused_p99_ms": None}, ["refused within, p99 ms"]),
        ({"recovered_s": None}, ["recovery, s"]),
        ({"recovered_s": 2.5}, ["recovery, s"]),
    ],
)
def test_a_target_that_is_missed_is_said(more, missed):
    found = judged(ran(offered(**more)))

    assert [one.figure for one in found if one.is_missed] == missed


def test_the_worst_load_decides_where_several_have_one_target():
    points = {
        share: [goodput.point(share, PEAK, ran(offered(refused_p99_ms=p99_ms)))]
        for share, p99_ms in ((1.5, None), (2.0, 2.0), (5.0, 7.0))
    }

    found = goodput.judgements(goodput.Sweep("slow", 0.8, [PEAK], points), is_cheap_to_refuse=True)

    (refused,) = [one for one in found if one.figure.startswith("refused")]
    assert (refused.what, refused.value, refused.verdict) == ("1.5, 2, 5", 7.0, "missed")
    assert [one.what for one in found if one.figure.startswith("goodput")] == ["1.5", "2", "5"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, None),
        ({"wrong": 3}, "3 wrong answers"),
        ({"unanswered": 2}, "2 calls never ended"),
        ({"statuses": {"RESOURCE_EXHAUSTED": 0, "UNAVAILABLE": 0}}, "nothing was refused"),
    ],
)
def test_what_no_model_may_do_is_said(more, said):
    found = goodput.faults(sweep(ran(offered(**more))))

    assert [said in text for text in found] == ([True] if said else [])


def test_little_more_than_the_peak_and_what_a_late_generator_asks_may_all_be_served():
    none = {"statuses": {"RESOURCE_EXHAUSTED": 0, "UNAVAILABLE": 0}}
    late = offered(**none, generator_is_bottleneck=True)

    assert goodput.faults(sweep(ran(offered(**none)), share=1.25)) == []
    assert goodput.faults(sweep(ran(late))) == []


def test_below_its_peak_nobody_needs_to_be_refused():
    none = {"RESOURCE_EXHAUSTED": 0, "UNAVAILABLE": 0}

    assert goodput.faults(sweep(ran(offered(statuses=none)), share=0.5)) == []


def test_what_nobody_measured_misses_no_target_but_is_no_number():
    nobody = offered(refused_p50_ms=None, refused_p99_ms=None, served_p99_ms=None)

    point = goodput.point(2.0, PEAK, ran(nobody))

    assert math.isnan(point.refused_p99_ms)
    assert math.isnan(point.served_p99_ms)


def overload(*sweeps, **more):
    return bench.overload_page.Overload(2, 5.0, list(sweeps), row_ms=8.1, **more)


def test_the_page_shows_the_curve_every_share_and_what_was_missed():
    found = overload(
        sweep(ran(offered(81.0)), ran(offered(87.0))),
        sweep(ran(offered(30.0, generator_is_bottleneck=True)), model="tiny"),
        curve="a.png",
    )

    page = bench.overload_page.page(found, "| command | `overload.py --rounds 2` |")

    for shown in (
        *("![goodput over offered load](a.png)", "`overload.py --rounds 2`"),
        "slow at 2 times its peak: goodput in time, of the peak: 0.840, not ≥ 0.9",
        *("| 2 (2.00) | 200 | 190 | 25% / 50% | 0.840 | 0.810 to 0.870 |", "| 2 (2.00) * | 200 |"),
        *("8.1 ms of processor", "| 50% | 8% | 700 | 0.50 / 2.0 | 1.5 | 0.2 |"),
    ):
        assert shown in page


def test_its_rows_fit_the_table_of_the_other_questions_with_targets_and_verdicts():
    rows = bench.overload_page.section(overload(sweep(ran(offered(95.0))))).rows

    assert {len(row) for row in rows} == {len(bench.page.HEADINGS)}
    assert [(row[1].partition(",")[0], *row[5:7]) for row in rows] == [
        ("goodput in time", "≥ 0.9", "met"),
        ("refused within", "≤ 5", "met"),
        ("memory's growth", "≤ 8", "met"),
        ("recovery", "≤ 2", "met"),
    ]
    assert rows[0][2:5] == ["gateway", "its peak: 100/s", "0.950 (0.950 to 0.950)"]


def test_every_target_is_met_only_where_one_was_judged():
    judged = bench.overload_page.page(overload(sweep(ran(offered()))), "")
    unjudged = bench.overload_page.page(overload(sweep(ran(offered()), share=0.5)), "")

    assert "Every target is met." in judged
    assert "![" not in judged
    assert "Every target is met." not in unjudged
    assert "No target was judged." in unjudged


@pytest.mark.parametrize(
    ("floods", "failures", "status"),
    [
        ([offered()], [], 0),
        ([offered(50.0)], [], 1),
        ([offered(wrong=1)], [], 1),
        ([offered(generator_is_bottleneck=True)], [], 2),
        ([offered()], ["tiny model: RuntimeError: it died"], 2),
    ],
)
def test_the_status_tells_a_target_missed_from_one_not_measured(floods, failures, status):
    found = overload(sweep(*map(ran, floods)), failures=failures)

    assert found.status == status


def test_the_loads_of_a_late_generator_are_said_once_for_each_model():
    late = overload(sweep(ran(offered(generator_is_bottleneck=True))))

    (said,) = late.unmeasured
    assert said.startswith("slow: the generator did not keep up at 2 times its peak")


def test_a_model_that_failed_is_said_and_the_page_has_what_there_is():
    found = overload(
        sweep(ran(offered(95.0))),
        goodput.Sweep("tiny", 0.1, [], {}),
        failures=["tiny model: RuntimeError: it died"],
    )

    page = bench.overload_page.page(found, "")

    assert "overload: tiny model: RuntimeError: it died." in page
    assert "### The tiny model" not in page
    assert "The slow model" in page


def test_no_two_loads_have_the_same_times():
    seeds = [
        bench.overload.seed(number, share)
        for number in range(5)
        for share in bench.overload.SHARES[bench.overload_models.SLOW]
    ]

    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("arguments", "is_written"),
    [
        ([], True),
        (["--no-page"], False),
        (["--shares", "2"], False),
        (["--only", "tiny"], False),
        (["--shares", "2", "--page"], True),
    ],
)
def test_a_part_of_it_is_no_page_unless_one_is_asked_for(
    monkeypatch, tmp_path, arguments, is_written
):
    results = tmp_path / "loadtest" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(bench.overload, "RESULTS", results)
    monkeypatch.setattr(bench.overload, "ROOT", tmp_path)
    monkeypatch.setattr(bench.overload.cores, "ARE_ENOUGH", True)
    measured = overload(sweep(ran(offered())))
    monkeypatch.setattr(bench.overload, "measure", lambda *_, **__: measured)
    monkeypatch.setattr(bench.overload.goodput_curve, "is_drawable", lambda: False)

    assert bench.overload.main(arguments) == 0
    assert [path.suffix for path in results.iterdir()] == ([".md"] if is_written else [])


def test_the_curve_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="dependency group `bench` is not installed")

    bench.goodput_curve.draw([sweep(ran(offered()))], tmp_path / "curve.png")

    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_of_the_slow_model_costs_what_was_asked_and_its_answers_are_its_own(tmp_path):
    cheap_s, dear_s = 0.001, 0.004

    row_s = bench.overload_models.write_slow(tmp_path / "dear", dear_s)
    other_s = bench.overload_models.write_slow(tmp_path / "cheap", cheap_s)

    assert 1.5 < row_s / other_s < 10  # four times, on a quiet machine
    answers = bench.overload_models.answers(tmp_path / "cheap", "slow")
    assert len(set(answers)) == len(answers) == len(bench.overload_models.requests("slow"))
