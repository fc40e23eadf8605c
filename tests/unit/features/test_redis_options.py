"""Feast's connection string, and what is made of it."""

import subprocess

import pytest
from tls_terminator import make_certificate

from headrace.errors import StartupError
from headrace.features.redis_options import RedisServers


def parsed(text):
    return RedisServers.parse(text).only()


def test_a_plain_address_needs_nothing_else():
    options = parsed("redis.internal:6380")
    assert (options.host, options.port, options.db) == ("redis.internal", 6380, 0)
    assert (options.username, options.password, options.tls) == (None, None, None)


def test_options_are_read_as_feast_reads_them():
    options = parsed("h:1,db=3,username=me,password=12345,ssl=false")
    assert (options.db, options.username, options.password) == (3, "me", "12345")
    assert options.tls is None


def test_a_password_may_contain_an_equals_sign():
    assert parsed("h:1,password=a=b==").password == "a=b=="


def test_tls_checks_certificate_and_name_unless_told_otherwise():
    strict = parsed("h:1,ssl=true").tls
    assert strict.check_hostname
    assert strict.verify_mode.name == "CERT_REQUIRED"
    lax = parsed("h:1,ssl=true,ssl_cert_reqs=none").tls
    assert not lax.check_hostname
    assert lax.verify_mode.name == "CERT_NONE"


@pytest.mark.parametrize("spelling", ["true", "True", "TRUE", '"true"', "1", "yes"])
def test_tls_is_asked_for_however_it_is_spelled(spelling):
    assert parsed(f"h:1,ssl={spelling},password=secret").tls is not None


@pytest.mark.parametrize("spelling", ["false", "False", "0", "no"])
def test_tls_is_left_out_when_it_says_so(spelling):
    assert parsed(f"h:1,ssl={spelling}").tls is None


@pytest.mark.parametrize("spelling", ["true", "True", "TRUE", '"true"', "1", "yes"])
def test_the_name_is_checked_however_that_is_asked_for(spelling):
    assert parsed(f"h:1,ssl=true,ssl_check_hostname={spelling}").tls.check_hostname


@pytest.mark.parametrize("spelling", ["false", "False", "0", "no"])
def test_the_name_is_left_unchecked_when_it_says_so(spelling):
    tls = parsed(f"h:1,ssl=true,ssl_check_hostname={spelling}").tls
    assert (tls.check_hostname, tls.verify_mode.name) == (False, "CERT_REQUIRED")


@pytest.fixture(scope="module")
def encrypted_key(tmp_path_factory):
    """Options that name a client's certificate whose key has a pass phrase."""
    folder = tmp_path_factory.mktemp("key")
    certificate, key = make_certificate(folder)
    locked = folder / "locked.key"
    subprocess.run(
        ["openssl", "rsa", "-aes128", "-passout", "pass:sesame", "-in", key, "-out", locked],
        check=True,
        capture_output=True,
    )
    return f"h:1,ssl=true,ssl_certfile={certificate},ssl_keyfile={locked}"


def test_an_encrypted_key_is_opened_by_its_pass_phrase(encrypted_key):
    assert parsed(encrypted_key + ",ssl_password=sesame").tls is not None


@pytest.mark.timeout(20)
def test_an_encrypted_key_without_its_pass_phrase_is_refused_and_nobody_is_asked(encrypted_key):
    with pytest.raises(StartupError, match="is encrypted: add its pass phrase as ssl_password"):
        parsed(encrypted_key)


def test_a_wrong_pass_phrase_is_refused_and_not_repeated(encrypted_key):
    with pytest.raises(StartupError, match=r"TLS file .* unusable") as caught:
        parsed(encrypted_key + ",ssl_password=hunter2")
    assert "hunter2" not in str(caught.value)


def test_the_password_is_not_shown():
    assert "hunter2" not in repr(parsed("h:1,password=hunter2"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:1,b:2", "names 2 servers, where one is expected; with redis_type redis_cluster"),
        ("password=hunter2", "names no `host:port`"),
        ("localhost", "is not `host:port`"),
        ("localhost:0", "is not `host:port`"),
        ("localhost:http", "is not `host:port`"),
        ("h:1,db=first,password=hunter2", "db in connection_string"),
        ("h:1,sentinel_kwargs=hunter2", "sentinel_kwargs .* no JSON object"),
        ("h:1,ssl=on,password=secret", "ssl .* is true or false"),
        ("h:1,ssl=true,ssl_check_hostname=on", "ssl_check_hostname .* is true or false"),
        ("redis..internal:6379,password=hunter2", "host .* is no name"),
        ("a" * 70 + ".internal:6379", "host .* is no name"),
        ("rediss://h:1", "is not `host:port`"),
        ("h:1,ssl=true,ssl_cert_reqs=maybe", "none, optional or required"),
        ("h:1,ssl=true,ssl_ca_certs=nowhere.pem", "TLS file .* unusable: No such file"),
    ],
)
def test_an_unusable_string_is_refused_without_repeating_secrets(text, message):
    with pytest.raises(StartupError, match=message) as caught:
        parsed(text)
    assert "hunter2" not in str(caught.value)


def test_several_servers_share_one_login():
    named = RedisServers.parse("a:1,b:2,[::1]:3,username=me,password=secret")
    assert [(server.host, server.port) for server in named.servers] == [
        ("a", 1),
        ("b", 2),
        ("::1", 3),
    ]
    assert {(server.username, server.password) for server in named.servers} == {("me", "secret")}


def test_sentinels_have_a_login_of_their_own_and_it_is_not_shown():
    named = RedisServers.parse('h:1,password=hunter1,sentinel_kwargs={"password": "hunter2"}')
    assert named.sentinel_login == {"password": "hunter2"}
    assert "hunter" not in repr(named)
