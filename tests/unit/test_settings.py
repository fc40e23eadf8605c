"""Where a setting comes from, and what is said when it is wrong."""

import pytest

from headrace.errors import StartupError
from headrace.settings import load_settings, split_address


@pytest.fixture
def toml(tmp_path):
    file = tmp_path / "headrace.toml"
    file.write_text('model_repository = "from_file"\nmax_entities = 1\nmax_queue_size = 1\n')
    return file


def test_a_flag_beats_the_environment_which_beats_the_file(toml, monkeypatch):
    monkeypatch.setenv("HEADRACE_MAX_ENTITIES", "2")
    monkeypatch.setenv("HEADRACE_MAX_QUEUE_SIZE", "2")

    settings = load_settings({"max_entities": "3"}, toml)

    assert settings.max_entities == 3
    assert settings.max_queue_size == 2
    assert settings.model_repository.name == "from_file"
    assert settings.grpc_address == "127.0.0.1:8500"


def test_one_line_names_everything_that_is_wrong_and_how_to_set_it():
    with pytest.raises(StartupError) as refused:
        load_settings({"max_entities": "0", "grpc_address": "nowhere"})

    line = str(refused.value)
    assert "\n" not in line
    for name in ("--max-entities (or HEADRACE_MAX_ENTITIES)", "--grpc-address", "nowhere"):
        assert name in line
    assert "--model-repository (or HEADRACE_MODEL_REPOSITORY): Field required" in line


def test_a_settings_file_that_is_missing_or_no_toml_is_refused(tmp_path):
    with pytest.raises(StartupError, match="no such file"):
        load_settings({}, tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("= 3")
    with pytest.raises(StartupError, match="settings"):
        load_settings({"model_repository": "."}, tmp_path / "broken.toml")


def test_the_header_that_says_who_calls_is_a_key_of_text_metadata():
    assert load_settings({"model_repository": ".", "caller_header": "X-Caller"}).caller_header == (
        "x-caller"
    )
    for wrong in ("", "x caller", ":path", "x-caller-bin", "grpc-timeout"):
        with pytest.raises(StartupError, match="--caller-header"):
            load_settings({"model_repository": ".", "caller_header": wrong})


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"caller_rate_per_s": "5"}, "--caller-rate-per-s needs --caller-header"),
        (
            {"caller_header": "x-caller", "caller_burst": "5"},
            "--caller-burst needs --caller-rate-per-s",
        ),
    ],
)
def test_what_says_nothing_without_another_setting_is_refused(flags, reason):
    with pytest.raises(StartupError, match=reason):
        load_settings({"model_repository": ".", **flags})


@pytest.mark.parametrize("rate", ["0", "-1", "1e-320", "nan", "inf"])
def test_a_quota_is_a_rate_that_can_be_reckoned_with(rate):
    with pytest.raises(StartupError, match="--caller-rate-per-s"):
        load_settings({"model_repository": ".", "caller_header": "x", "caller_rate_per_s": rate})


def test_settings_do_not_change():
    settings = load_settings({"model_repository": "."})

    with pytest.raises(ValueError, match="frozen"):
        settings.max_entities = 5


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:8500", ("127.0.0.1", 8500)),
        ("[::1]:0", ("::1", 0)),
        ("gateway.internal:65535", ("gateway.internal", 65535)),
    ],
)
def test_an_address_is_split(address, parts):
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", "8500", ":8500", "host:", "host:x", "host:65536", "h:-1"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValueError, match="expected host:port"):
        split_address(address)
