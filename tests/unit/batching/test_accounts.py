"""Who is let in, what it costs him, and when he gets it back."""

import math
import time

import pytest

from headrace.batching.accounts import CallerAccounts
from headrace.batching.queued import QueuedRequest
from headrace.batching.quotas import Quotas
from headrace.errors import CallerLeft, DeadlineExceeded, Overloaded, QuotaExceeded

A, B = [("x-caller", "a")], [("x-caller", "b")]


class Request(QueuedRequest):
    def __init__(self, rows=1):
        super().__init__(
            rows, "x", deadline_s=math.inf, arrival_s=time.perf_counter(), byte_count=1
        )
        self.has_left = False
        self.errors = []

    def expired(self, now_s):
        return self.has_left or self.deadline_s <= now_s

    def fail(self, error):
        self.errors.append(type(error))


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def accounts(clock):
    return CallerAccounts("x-caller", Quotas(rate_per_s=10, burst=5), clock)


def take(accounts, rows, metadata=A):
    request = Request(rows)
    accounts.pass_on(accounts.enter(metadata), request, lambda _: None)
    return request


def test_who_has_used_up_his_quota_is_told_when_to_come_again(accounts, clock):
    take(accounts, 7)

    with pytest.raises(QuotaExceeded, match="10 rows per second") as error:
        accounts.enter(A)
    assert error.value.retry_after_s == pytest.approx(0.3)
    clock.now_s += 0.3001
    accounts.enter(A)
    assert accounts.refused == 1


def test_others_are_let_in_meanwhile(accounts):
    take(accounts, 1_000)

    assert accounts.enter(B) == "b"


def test_a_request_knows_whose_it_is(accounts):
    assert take(accounts, 1, B).caller == "b"


def test_without_quotas_callers_are_told_apart_and_nobody_is_refused():
    accounts = CallerAccounts("x-caller")

    requests = [take(accounts, 1_000_000) for _ in range(3)]

    assert {request.caller for request in requests} == {"a"}
    assert accounts.refused == 0


def test_a_request_that_is_refused_for_another_reason_costs_nothing(accounts):
    def refuse(_):
        raise Overloaded("full")

    for _ in range(20):
        with pytest.raises(Overloaded, match="full"):
            accounts.pass_on(accounts.enter(A), Request(5), refuse)


def test_a_request_that_waited_in_vain_costs_nothing(accounts):
    late, shed = take(accounts, 5), None
    late.deadline_s = 0.0
    with pytest.raises(QuotaExceeded):
        accounts.enter(A)
    late.drop()
    shed = take(accounts, 5)
    shed.is_shed = True
    shed.drop()

    accounts.enter(A)
    assert (late.errors, shed.errors) == ([DeadlineExceeded], [Overloaded])


def test_who_leaves_has_had_what_he_asked_for(accounts):
    leaving = take(accounts, 5)
    leaving.deadline_s = time.time() + 1_000
    leaving.has_left = True
    leaving.drop()

    with pytest.raises(QuotaExceeded):
        accounts.enter(A)
    assert leaving.errors == [CallerLeft]


def test_who_leaves_a_call_without_a_deadline_has_had_what_he_asked_for(accounts):
    leaving = take(accounts, 5)
    leaving.has_left = True
    leaving.drop()

    with pytest.raises(QuotaExceeded):
        accounts.enter(A)
    assert leaving.errors == [CallerLeft]


def test_a_call_that_ends_at_its_own_deadline_costs_nothing(accounts):
    ended = take(accounts, 5)
    ended.deadline_s = time.time() - 0.001
    ended.has_left = True  # gRPC closes it then, as if he had
    ended.drop()

    accounts.enter(A)
    assert ended.errors == [DeadlineExceeded]


def test_nothing_is_given_back_twice(accounts):
    request = take(accounts, 4)
    take(accounts, 100)
    for _ in range(3):
        request.refund()

    with pytest.raises(QuotaExceeded) as error:
        accounts.enter(A)
    assert error.value.retry_after_s == pytest.approx((100 - 5 + 1) / 10)
