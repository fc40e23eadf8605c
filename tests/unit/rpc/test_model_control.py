"""What a caller may ask of the repository."""

from types import SimpleNamespace

import pytest
from tritonclient.grpc import service_pb2

from headrace.errors import InvalidRequest
from headrace.rpc.oip import NAME_BYTES_MAX, OipServicer


@pytest.mark.parametrize("what", ["load", "unload"])
@pytest.mark.parametrize("letter", ["x", "\u00e4", "\x01"])
def test_a_name_that_no_folder_can_have_goes_to_no_worker_and_into_no_log(what, letter):
    asked = []
    repository = SimpleNamespace(
        mode="explicit",
        load=lambda name, timeout_s: asked.append(name),
        unload=lambda name, timeout_s: asked.append(name),
    )
    servicer = OipServicer(lambda: None, repository, lambda: True)
    answer = getattr(servicer, f"repository_model_{what}")
    most = NAME_BYTES_MAX // len(letter.encode())
    kind = getattr(service_pb2, f"RepositoryModel{what.title()}Request")

    answer(kind(model_name=letter * most))
    with pytest.raises(InvalidRequest, match="at most 255 bytes"):
        answer(kind(model_name=letter * (most + 1)))

    assert asked == [letter * most]
