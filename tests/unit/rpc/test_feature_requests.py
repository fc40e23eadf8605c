"""What feature requests are refused for on the ingress thread, and what they carry."""

import math
import time

import pytest
from feast.protos.feast.serving import ServingService_pb2 as feast_pb
from feast.protos.feast.types.Value_pb2 import Value

from headrace.errors import InvalidRequest
from headrace.features.plan import RequestColumn
from headrace.features.values import ValueType
from headrace.rpc import feast_serving, features
from headrace.rpc.entities import COLUMNS_MAX, NAME_BYTES_MAX
from headrace.telemetry.calls import CallRecorder
from headrace.telemetry.metrics import Metrics
from headrace.v1 import feature_service_pb2 as pb
from headrace.wire import delimited

SOON_S = 0.25
"""Far less than what these messages took before, and enough for a busy machine."""


class Call:
    metadata = ()
    deadline_s = math.inf
    arrival_s = 0.0
    gone = False
    status = None

    def refuse(self, status):
        self.status = status

    @property
    def details(self):
        return "" if self.status is None else self.status.details


class Reads:
    """Takes what is accepted."""

    def __init__(self):
        self.requests = []

    def check_rows(self, rows):
        if rows < 1:
            raise InvalidRequest("request has no entities")

    def submit(self, request):
        self.requests.append(request)


class Plans:
    def __init__(self):
        self.entity_join_keys = {"driver": "driver_id"}


@pytest.fixture
def reads():
    return Reads()


@pytest.fixture
def feast(reads):
    return feast_serving.GetOnlineFeatures(
        feast_serving.SERVING_SERVICE, reads, Plans(), CallRecorder(Metrics()), as_feast=False
    )


@pytest.fixture
def own(reads):
    return features.GetOnlineFeatures(reads, CallRecorder(Metrics()))


def ask(method, message):
    call = Call()
    method.accept(call, message if isinstance(message, bytes) else message.SerializeToString())
    return call


def feast_request(ids=(1,), key="driver_id", **fields):
    if "features" not in fields:
        fields.setdefault("feature_service", "service")
    request = feast_pb.GetOnlineFeaturesRequest(**fields)
    request.entities[key].val.extend(Value(int64_val=i) for i in ids)
    return request


def own_request(columns):
    request = pb.GetOnlineFeaturesRequest(feature_service="service")
    for i in range(columns):
        request.entities.add(name=f"c{i}").values.int64s.values.append(1)
    return request


def many_feast_columns(count):
    request = feast_request()
    for i in range(count - 1):
        request.entities[f"c{i}"].val.add(int64_val=1)
    return request


@pytest.mark.parametrize("count", [COLUMNS_MAX, COLUMNS_MAX + 1, COLUMNS_MAX + 30])
def test_a_request_has_so_many_columns_and_no_more(feast, own, reads, count):
    calls = [ask(feast, many_feast_columns(count)), ask(own, own_request(count))]

    if count > COLUMNS_MAX:
        assert all("more than 256 columns" in call.details for call in calls)
    assert len(reads.requests) == (2 if count <= COLUMNS_MAX else 0)


@pytest.mark.alone
def test_columns_without_number_do_not_hold_up_the_ingress_thread(feast, own):
    column = delimited(b"\x1a", b"\x0a\x04%04x\x12\x02\x0a\x00")
    many_feast = b"".join(column.replace(b"%04x", b"%04x" % i) for i in range(1 << 16)) * 4
    many_own = own_request(1).SerializeToString() * 150_000
    for method, message in ((feast, many_feast), (own, many_own)):
        started_s = time.perf_counter()
        call = ask(method, message)
        assert time.perf_counter() - started_s < SOON_S
        assert "more than 256 columns" in call.details


def test_references_without_number_are_refused_before_anything_is_made_of_them(feast, own):
    references = [f"v:f{i}" for i in range(2_001)]
    refused = [
        ask(feast, feast_request(features={"val": references})),
        ask(own, pb.GetOnlineFeaturesRequest(features={"references": references})),
    ]

    assert all("2001 features; at most 2000" in call.details for call in refused)


def test_a_services_name_is_no_place_for_megabytes(feast, own, reads):
    name = "s" * (NAME_BYTES_MAX + 1)
    refused = [
        ask(feast, feast_request(feature_service=name)),
        ask(own, pb.GetOnlineFeaturesRequest(feature_service=name)),
    ]

    assert all("at most 1024 are accepted" in call.details for call in refused)
    assert reads.requests == []


def test_a_list_of_features_is_the_same_object_whoever_else_asked_for_what(feast, reads):
    request = feast_request(features={"val": ["v:a", "v:b"]})
    for _ in range(2):
        for i in range(feast_serving.SELECTIONS_MAX + 10):
            ask(feast, feast_request(feature_service=f"junk {i}"))
        reads.requests.clear()
        ask(feast, request)
        ask(feast, request)

        first, second = (one.batch_key for one in reads.requests)
        assert first is second
        assert (first.service, first.references) == ("", ("v:a", "v:b"))


COLUMN = RequestColumn("driver_id", ValueType.INT64)
DATA = RequestColumn("speed", ValueType.FLOAT, is_key=False)


def test_request_context_is_read_as_entities_are_and_entities_win(feast, reads):
    request = feast_request([1, 2])
    request.request_context["speed"].val.extend([Value(float_val=0.5), Value(float_val=1)])
    request.request_context["driver_id"].val.extend([Value(int64_val=8), Value(int64_val=9)])

    assert ask(feast, request).status is None

    (taken,) = reads.requests
    assert taken.column_values(DATA) == [0.5, 1.0]
    assert taken.column_values(COLUMN) == [1, 2]


def test_request_context_is_as_long_as_the_entities(feast):
    request = feast_request([1, 2])
    request.request_context["speed"].val.add(float_val=0.5)

    assert "differ in length: 1, 2 rows" in ask(feast, request).details


@pytest.mark.parametrize(
    ("value", "is_taken"), [(1e300, False), (-1e300, False), (3e38, True), (math.inf, True)]
)
def test_a_number_that_is_no_float_is_refused_rather_than_made_infinite(
    feast, reads, value, is_taken
):
    request = feast_request()
    request.entities["speed"].val.add(double_val=value)
    ask(feast, request)
    (taken,) = reads.requests

    if is_taken:
        assert taken.column_values(DATA) == [value]
    else:
        with pytest.raises(InvalidRequest, match="'speed' has a value out of range for FLOAT"):
            taken.column_values(DATA)


def test_a_registry_that_changes_meanwhile_does_not_lose_a_column_found_by_its_entitys_name(
    feast, reads
):
    ask(feast, feast_request([7], key="driver"))
    (taken,) = reads.requests
    assert taken.column_values(COLUMN) == [7]

    feast.plans.entity_join_keys = {}

    assert [value.int64_val for value in taken.found(COLUMN).val] == [7]
