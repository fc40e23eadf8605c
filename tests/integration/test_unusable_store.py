"""An online store that cannot even be asked, at the start and later."""

import subprocess
import sys

import pytest
import structlog
from redis_processes import wait_until

from headrace.app import Gateway
from headrace.settings import load_settings


def test_a_host_that_is_no_name_ends_the_start_with_a_line_and_2(feature_repo, tmp_path):
    repo, models = tmp_path / "features", tmp_path / "models"
    repo.mkdir()
    models.mkdir()
    (repo / "feature_store.yaml").write_text(
        "project: integration\nprovider: local\nregistry: registry.db\n"
        "online_store: {type: redis, connection_string: 'redis..internal:6379'}\n"
        "entity_key_serialization_version: 3\n"
    )
    (repo / "registry.db").write_bytes((feature_repo / "registry.db").read_bytes())
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "headrace", "serve", "--model-repository", models),
            *("--feature-repo", repo, "--grpc-address", "127.0.0.1:0"),
            *("--http-address", "127.0.0.1:0"),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 2
    assert "a host in connection_string of the online store is no name" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.fixture
def gateway(feature_repo, tmp_path):
    gateway = Gateway(
        load_settings(
            {
                "model_repository": tmp_path,
                "feature_repo": feature_repo,
                "grpc_address": "127.0.0.1:0",
                "http_address": "127.0.0.1:0",
            }
        )
    )
    gateway.start()
    yield gateway
    gateway.stop()


def test_whatever_a_look_at_the_store_raises_it_is_looked_at_again(gateway):
    check, looks = gateway._store.check, []

    def fail():
        looks.append(1)
        raise UnicodeError("a host that none can have")

    with structlog.testing.capture_logs() as lines:
        gateway._store.check = fail
        wait_until(lambda: len(looks) > 1, "a second look", 10)
        assert not gateway._features_readable
        gateway._store.check = check
        wait_until(lambda: gateway._features_readable, "a look that sees it", 10)
    events = [line["event"] for line in lines]
    assert events.count("feature_store_check_failed") == 1
