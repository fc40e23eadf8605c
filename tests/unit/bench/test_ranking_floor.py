"""The floor of ranking keeps as many under way as it is told, and its replies are compared."""

import bench_modules
import numpy as np
import pytest

ranking_floor = bench_modules.load("ranking_floor").ranking_floor

EXPECTED = [np.array([number, number + 1], np.float32) for number in range(3)]


class Floor(ranking_floor.Floor):
    """Without a store and a model: every request is answered by its number."""

    def __init__(self, wrong=()):
        self.wrong = wrong
        self.under_way, self.most, self.answered = [], 0, 0

    def _ask(self, number):
        self.under_way.append(number)
        self.most = max(self.most, len(self.under_way))

    def _answer(self):
        number = self.under_way.pop(0)
        self.answered += 1
        right = EXPECTED[number % len(EXPECTED)]
        return right + 1 if number in self.wrong else right * np.float32(1 + 1e-6)


@pytest.mark.parametrize("in_flight", [1, 4])
def test_so_many_are_under_way_and_none_is_left_behind(in_flight):
    floor = Floor()

    figures = floor.measure(0.01, in_flight, EXPECTED)

    assert floor.most == in_flight
    assert floor.under_way == []
    assert floor.answered == figures["requests"] + in_flight
    assert figures["wrong"] == 0


def test_another_answer_than_the_model_s_is_wrong_at_once_and_each_time():
    assert Floor(wrong=[0, 2]).measure(0.01, 1, EXPECTED)["wrong"] == 2
