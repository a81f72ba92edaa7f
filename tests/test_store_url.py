"""What URLs of stores say, and what is said of those that are none."""

import pytest

from service.store.url import HostPort, Login, StoreUrl, Tls, parse_store_url, store_name


@pytest.mark.parametrize(
    ("url", "read"),
    [
        ("memory://", StoreUrl("memory")),
        ("redis://h", StoreUrl("alone", (HostPort("h", 6379),))),
        ("redis://:p%40ss@h:1/3", StoreUrl("alone", (HostPort("h", 1),), db=3, login=Login("", "p@ss"))),
        ("redis://u:p@[::1]:7/?db=2", StoreUrl("alone", (HostPort("::1", 7),), db=2, login=Login("u", "p"))),
        ("rediss://h/1", StoreUrl("alone", (HostPort("h", 6379),), db=1, tls=Tls())),
        ("rediss://h?ssl_cert_reqs=none", StoreUrl("alone", (HostPort("h", 6379),), tls=Tls(verify="none"))),
        ("unix:///run/r%20s?db=2", StoreUrl("alone", path="/run/r s", db=2)),
        ("unix://u:p@/run/r", StoreUrl("alone", path="/run/r", login=Login("u", "p"))),
        ("redis+sentinel://a,b:2/m", StoreUrl("sentinel", (HostPort("a", 26379), HostPort("b", 2)), name="m")),
        (
            "rediss+sentinel://u:p@a/m/4?sentinel_user=v&sentinel_password=q",
            StoreUrl("sentinel", (HostPort("a", 26379),), name="m", db=4, login=Login("u", "p"), sentinel_login=Login("v", "q"), tls=Tls()),
        ),
        ("redis+cluster://:p@a:1,[::2]:3", StoreUrl("cluster", (HostPort("a", 1), HostPort("::2", 3)), login=Login("", "p"))),
        ("redis+cluster://a/0", StoreUrl("cluster", (HostPort("a", 6379),))),
    ],
)
def test_each_form_is_read(url, read):
    assert parse_store_url(url) == read


def test_files_of_tls_have_short_names_and_those_of_redis_py(tmp_path):
    for name in ("ca.pem", "c.pem", "c.key"):
        (tmp_path / name).touch()
    long = "ssl_ca_certs={0}/ca.pem&ssl_certfile={0}/c.pem&ssl_keyfile={0}/c.key"
    read = [parse_store_url(f"rediss://h?{text.format(tmp_path)}") for text in ("ca={0}/ca.pem&cert={0}/c.pem&key={0}/c.key", long)]
    assert read[0] == read[1]
    assert read[0].tls == Tls(f"{tmp_path}/ca.pem", cert=f"{tmp_path}/c.pem", key=f"{tmp_path}/c.key")


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis://:secret/x@h:6379/0", "write %2F for /"),
        ("redis://:secret@h:port/0", "expected a URL such as redis://host"),
        ("redis://:secret@h:0", "expected a URL such as redis://host"),
        ("redis://:secret@h:1?socket_timeout=5", "an option that is none; there are db, password, username"),
        ("redis://:secret?@h", "expected a URL such as redis://host"),
        ("redis://:secret@[::1", "expected a URL such as redis://host"),
        ("redis://:secret@", "expected a URL such as redis://host"),
        ("http://:secret@h", "expected a URL such as redis://host"),
        ("redis+ring://:secret@h", "expected a URL such as redis://host"),
        ("unix+cluster:///secret", "expected a URL such as redis://host"),
        ("redis://:secret@h/one", "number of the database"),
        ("redis://:secret@a,b", "several hosts are for redis.sentinel:// and redis.cluster://"),
        ("redis://:secret@h?ca=x", "ca is for TLS: begin the URL with rediss"),
        ("rediss://:secret@h?ca=/nowhere/ca.pem", "option ca is not there: /nowhere/ca.pem"),
        ("rediss://:secret@h?ssl_cert_reqs=never", "one of none, optional, required"),
        ("rediss://:secret@h?ssl_check_hostname=maybe", "one of true"),
        ("redis+sentinel://:secret@a:1,b:2", "the primary's name is missing"),
        ("redis+sentinel://:secret@a,,b/m", "expected a URL such as redis://host"),
        ("redis+cluster://:secret@a/3", "no database but 0"),
        ("redis+cluster://:secret@" + ",".join(["h"] * 101), "more than 100 hosts"),
        ("unix://:secret@h/path", "no host"),
    ],
)
def test_what_is_wrong_is_said_without_secrets(url, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        parse_store_url(url)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("rediss://u:secret@h:1/2?ca=x", "rediss://h:1/2"),
        ("redis+sentinel://:secret@a:1,b:2/m?sentinel_password=secret", "redis+sentinel://a:1,b:2/m"),
        ("redis+cluster://a:1,b:2", "redis+cluster://a:1,b:2"),
        ("unix://:secret@/run/r", "unix:///run/r"),
    ],
)
def test_a_name_has_no_secrets(url, name):
    assert store_name(url) == name
    read = parse_store_url(url.replace("?ca=x", ""))
    assert "secret" not in f"{read} {read.login!r}"


@pytest.mark.parametrize("secret", ["Zq/Zq", "12/Zq", "/Zq", "12/0/Zq", "Zq?Zq", "12?Zq=1", "Zq#Zq/x", "Zq:b/Zq", "p@Zq/Zq", "Zq"])
@pytest.mark.parametrize(
    "form",
    [
        "redis://:{}@store:6379/0",
        "redis://user:{}@store/0",
        "rediss://user:{}@store",
        "redis+sentinel://user:{}@one:26379,two:26379/main",
        "redis+sentinel://:{}@one/main/2",
        "redis+cluster://user:{}@one:7000",
    ],
)
def test_a_password_that_is_not_escaped_is_told_nowhere(form: str, secret: str) -> None:
    """Whatever the characters in it make of the rest."""
    url = form.format(secret)
    names = [store_name(url)]
    try:
        parse_store_url(url)
    except ValueError as error:
        names.append(str(error))
    assert not [text for text in names if "Zq" in text]


def test_one_that_ends_too_early_says_how_to_write_it() -> None:
    for url in ("redis://:pa/ss@store:6379/0", "redis+sentinel://user:1234/x@one/main", "redis://u/se@r:x@store"):
        with pytest.raises(ValueError, match="write %2F for /"):
            parse_store_url(url)
    assert parse_store_url("redis://:pa%2Fss%3F%40%23@store:6379/1").login.password == "pa/ss?@#"
    assert parse_store_url("unix:///run/redis@main.sock").path == "/run/redis@main.sock"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("redis://user:secret@store/3", "redis://store:6379/3"),
        ("redis+sentinel://:secret@one,two:26380/main/2?sentinel_password=x", "redis+sentinel://one:26379,two:26380/main/2"),
        ("redis+sentinel://one/main", "redis+sentinel://one:26379/main"),
        ("rediss://[::1]:6380/?ca=/gone/by/now.pem", "rediss://[::1]:6380/0"),
        ("unix:///run/redis.sock?db=2&password=secret", "unix:///run/redis.sock"),
        ("memory://", "memory://"),
        ("nonsense", "…"),
        ("secret://x", "…"),
    ],
)
def test_the_name_is_made_of_what_was_understood(url: str, name: str) -> None:
    assert store_name(url) == name
