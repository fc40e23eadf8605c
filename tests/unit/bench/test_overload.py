"""What is made of a sweep: shares of the peak, verdicts, a page, a picture."""

import math

import bench_modules
import pytest

bench = bench_modules.load("flood", "goodput", "overload_page", "goodput_curve", "overload_models")
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


def test_the_middle_is_the_median_and_of_faults_the_worst():
    found = sweep(
        ran(offered(80.0)),
        ran(offered(95.0, recovered_s=1.5, wrong=1)),
        ran(offered(96.0, generator_is_bottleneck=True)),
    ).middle(2.0)

    assert found.goodput_share == pytest.approx(0.95)
    assert (found.recovered_s, found.wrong, found.is_generator_bottleneck) == (1.5, 1, True)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, None),
        ({"goodput_per_s": 89.0}, "goodput 0.890"),
        ({"refused_p99_ms": 5.1}, "refused within 5.1 ms"),
    ],
)
def test_a_target_that_is_missed_is_said(more, said):
    found = goodput.missed(sweep(ran(offered(**more))))

    assert [said in text for text in found] == ([True] if said else [])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, None),
        ({"recovered_s": None}, "recovered after inf"),
        ({"recovered_s": 2.5}, "recovered after 2.5"),
        ({"wrong": 3}, "3 wrong answers"),
        ({"unanswered": 2}, "2 calls never ended"),
        ({"statuses": {"RESOURCE_EXHAUSTED": 0, "UNAVAILABLE": 0}}, "nothing was refused"),
    ],
)
def test_what_no_model_may_do_is_said(more, said):
    found = goodput.faults(sweep(ran(offered(**more))))

    assert [said in text for text in found] == ([True] if said else [])


def test_below_its_peak_nobody_needs_to_be_refused():
    none = {"RESOURCE_EXHAUSTED": 0, "UNAVAILABLE": 0}

    assert goodput.faults(sweep(ran(offered(statuses=none)), share=0.5)) == []


def test_what_nobody_measured_misses_no_target_but_is_no_number():
    nobody = offered(refused_p50_ms=None, refused_p99_ms=None, served_p99_ms=None)

    point = goodput.point(2.0, PEAK, ran(nobody))

    assert math.isnan(point.refused_p99_ms)
    assert math.isnan(point.served_p99_ms)


ABOUT = bench.overload_page.Circumstances(
    when="2026-11-28 12:00 UTC",
    commit="`abc`",
    command="python loadtest/bench/overload.py --rounds 2",
    machine="a machine",
    packages="grpcio 1",
    rounds=2,
    seconds=5.0,
    row_ms=8.1,
    curve="a.png",
)


def test_the_page_shows_the_curve_every_share_and_what_was_missed():
    sweeps = [
        sweep(ran(offered(91.0)), ran(offered(97.0))),
        sweep(ran(offered(30.0, generator_is_bottleneck=True)), model="tiny"),
    ]

    page = bench.overload_page.page(sweeps, ["slow: too slow"], ABOUT)

    for shown in (
        *("![goodput over offered load](a.png)", "- slow: too slow", ABOUT.command),
        *("| 2 (2.00) | 0.940 | 0.910 to 0.970 |", "| 2 (2.00) * | 0.300 |", "8.1 ms of processor"),
        "| 50% | 700 | 0.50 / 2.0 | 1.5 | 0.2 |",
    ):
        assert shown in page


def test_a_page_without_a_curve_or_a_miss_says_so():
    page = bench.overload_page.page([sweep(ran(offered()))], [], ABOUT._replace(curve=None))

    assert "![" not in page
    assert "- every target is met" in page


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
