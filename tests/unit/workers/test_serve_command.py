"""`headrace serve` without `--workers` asks the machine."""

import pytest

from headrace import __main__


@pytest.mark.parametrize(
    ("cores", "devices", "plan"),
    [(8, [], [None] * 7), (8, ["0", "1"], ["0", "1"]), (3, [], [None] * 2)],
)
def test_its_workers_are_those_that_this_machine_has_room_for(
    monkeypatch, tmp_path, cores, devices, plan
):
    plans = []
    monkeypatch.delenv("HEADRACE_WORKERS", raising=False)
    monkeypatch.setattr(__main__, "core_count", lambda: cores)
    monkeypatch.setattr(__main__, "gpu_devices", lambda: devices)
    monkeypatch.setattr(__main__, "_supervise", lambda settings, plan: plans.append(plan) or 0)

    assert __main__.main(["serve", "--model-repository", str(tmp_path)]) == 0
    assert plans == [plan]
