"""What a store's URL says: which servers, in which arrangement, and how to greet them. Knows nothing about asking them."""

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

FORMS = (
    "expected a URL such as redis://host:6379/0, rediss://…, unix:///path, memory://, redis+sentinel://host:26379,host:26379/name, "
    "redis+cluster://host:7000,host:7001, or with TLS rediss+sentinel://… or rediss+cluster://…"
)
UNESCAPED = "a / in the user name or password of the store's URL ends it too early: write %2F for /, %3F for ?, %40 for @, %23 for #"
SCHEMES = frozenset({"memory", "unix"} | {f"{base}{kind}" for base in ("redis", "rediss") for kind in ("", "+sentinel", "+cluster")})
PORT, SENTINEL_PORT = 6379, 26379
MOST_HOSTS = 100
TLS = {
    "ca": "ssl_ca_certs",
    "cert": "ssl_certfile",
    "key": "ssl_keyfile",
}
"""Options by their short names, and by those that redis-py gives them."""
TLS_OPTIONS = {*TLS, *TLS.values(), "ssl_ca_path", "ssl_ca_data", "ssl_password", "ssl_cert_reqs", "ssl_check_hostname", "ssl_ciphers"}
VERIFY = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
YES, NO = ("true", "yes", "1"), ("false", "no", "0")

Kind = Literal["alone", "sentinel", "cluster", "memory"]


class HostPort(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Login(NamedTuple):
    """A user and a password, empty where there is none. Never shown."""

    user: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return "Login(…)"


NOBODY = Login()


class Tls(NamedTuple):
    """How a server's certificate is checked, and which one it is shown. Its files may be renewed: each connection reads what they are."""

    ca: str = ""
    ca_path: str = ""
    ca_data: str = ""
    cert: str = ""
    key: str = ""
    key_password: str = ""
    verify: str = "required"
    check_hostname: bool = True
    ciphers: str = ""

    def __repr__(self) -> str:
        return f"Tls(ca={self.ca!r}, cert={self.cert!r})"

    def get(self) -> ssl.SSLContext:
        """A context for the next connection.

        Raises:
            OSError: a file cannot be read, or is no certificate or key.
        """
        return _context(self, tuple(Path(name).stat().st_mtime_ns for name in (self.ca, self.cert, self.key) if name))


@lru_cache(maxsize=8)
def _context(tls: Tls, _changed: tuple[int, ...]) -> ssl.SSLContext:
    """Where a file of authorities is given, these alone are believed."""
    try:
        context = ssl.create_default_context(cafile=tls.ca or None, capath=tls.ca_path or None, cadata=tls.ca_data or None)
        context.check_hostname = tls.check_hostname and tls.verify != "none"
        context.verify_mode = VERIFY[tls.verify]
        if tls.cert:
            context.load_cert_chain(tls.cert, tls.key or None, tls.key_password)
        if tls.ciphers:
            context.set_ciphers(tls.ciphers)
    except ssl.SSLError as error:
        raise ConnectionError(f"the certificates of the store's URL cannot be used ({tls!r}): {error}") from error
    return context


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A store's URL, read. `places` are those of the server, the sentinels, or some nodes of the cluster; a `path` is a Unix socket's."""

    kind: Kind
    places: tuple[HostPort, ...] = ()
    path: str = ""
    name: str = ""
    """Of the primary, as the sentinels call it."""
    db: int = 0
    login: Login = NOBODY
    sentinel_login: Login = NOBODY
    tls: Tls | None = None


def store_name(url: str) -> str:
    """The URL without its user name, password and options, for logs: put together from what was understood of it, so that nothing else is
    in it.
    """
    scheme = _split(url).scheme if "://" in url else ""
    try:
        read = _read(url)
    except ValueError:
        return f"{scheme}://…" if scheme in SCHEMES else "…"
    if read.kind == "memory":
        return "memory://"
    path = {"alone": f"/{read.db}", "sentinel": f"/{read.name}{f'/{read.db}' if read.db else ''}"}.get(read.kind, "")
    return f"{scheme}://{read.path}" if read.path else f"{scheme}://{','.join(map(str, read.places))}{path}"


def parse_store_url(url: str) -> StoreUrl:
    """The URL, read.

    Raises:
        ValueError: it is no store's, in a sentence that quotes none of its secrets.
    """
    found, options = _read(url), dict(parse_qsl(_split(url).query, keep_blank_values=True))
    return replace(found, tls=_tls(options) if _split(url).scheme.startswith("rediss") else None)


def _read(url: str) -> StoreUrl:
    """All but what it says of TLS, whose files may come and go."""
    parts = _split(url)
    if parts.netloc and "@" in parts.path:
        raise ValueError(UNESCAPED)
    try:
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:  # its text would quote the password
        raise ValueError(FORMS) from None
    if parts.scheme == "memory":
        return StoreUrl("memory")
    tls, kind = _kind(parts.scheme)
    _check_names(options, kind, tls)
    login, places = _netloc(parts.netloc, SENTINEL_PORT if kind == "sentinel" else PORT)
    path = unquote(parts.path)
    if parts.scheme == "unix":
        if not path or places:
            raise ValueError("a Unix socket's URL has no host: unix:///path/to/socket")
        found = StoreUrl("alone", path=path, db=_db(options.get("db", "")))
    elif not places:
        raise ValueError(FORMS)
    else:
        found = {"alone": _alone, "sentinel": _sentinel, "cluster": _cluster}[kind](places, path.strip("/"), options)
    login = Login(options.get("username", login.user), options.get("password", login.password))
    return replace(found, login=login)


class _Parts(NamedTuple):
    scheme: str
    netloc: str
    path: str
    query: str


def _split(url: str) -> _Parts:
    """As `urlsplit` does, which takes no list of hosts with addresses in brackets: newer ones of Python refuse it."""
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    netloc, slash, path = rest.partition("/")
    return _Parts(scheme.lower(), netloc, slash + path, query)


def _alone(places: Sequence[HostPort], path: str, options: Mapping[str, str]) -> StoreUrl:
    if len(places) > 1:
        raise ValueError("several hosts are for redis+sentinel:// and redis+cluster://")
    return StoreUrl("alone", tuple(places), db=_db(options.get("db", path)))


def _sentinel(places: Sequence[HostPort], path: str, options: Mapping[str, str]) -> StoreUrl:
    name, _, db = path.partition("/")
    if not name:
        raise ValueError("the primary's name is missing, as the sentinels call it: redis+sentinel://host:26379/name")
    asking = Login(options.get("sentinel_user", ""), options.get("sentinel_password", ""))
    return StoreUrl("sentinel", tuple(places), name=name, db=_db(db), sentinel_login=asking)


def _cluster(places: Sequence[HostPort], path: str, _options: Mapping[str, str]) -> StoreUrl:
    if path not in ("", "0"):
        raise ValueError("a cluster has no database but 0: leave the path out")
    return StoreUrl("cluster", tuple(places))


def _kind(scheme: str) -> tuple[bool, Kind]:
    base, _, arrangement = scheme.partition("+")
    kinds: Mapping[str, Kind] = {"": "alone", "sentinel": "sentinel", "cluster": "cluster"}
    if base not in ("redis", "rediss", "unix") or arrangement not in kinds or (base == "unix" and arrangement):
        raise ValueError(FORMS)
    return base == "rediss", kinds[arrangement]


def _check_names(options: Mapping[str, str], kind: Kind, tls: bool) -> None:
    more = {"sentinel": {"sentinel_user", "sentinel_password"}, "alone": {"db", "username", "password"}}.get(kind, set())
    for name in options:
        if name in TLS_OPTIONS and not tls:
            raise ValueError(f"the option {name} is for TLS: begin the URL with rediss")
        if name not in TLS_OPTIONS | more:
            known = sorted(more | ({*TLS_OPTIONS} if tls else set()))
            raise ValueError(f"the URL has an option that is none{'; there are ' + ', '.join(known) if known else ''}")


def _netloc(netloc: str, port: int) -> tuple[Login, tuple[HostPort, ...]]:
    userinfo, _, hosts = netloc.rpartition("@")
    user, _, password = userinfo.partition(":")
    given = hosts.split(",") if hosts else []
    if len(given) > MOST_HOSTS:
        raise ValueError(f"more than {MOST_HOSTS} hosts; some of them are enough, the others are asked for")
    return Login(unquote(user), unquote(password)), tuple(_place(host, port) for host in given)


def _place(text: str, port: int) -> HostPort:
    try:
        parts = urlsplit(f"//{text.strip()}")
        host, given = parts.hostname, parts.port
    except ValueError:
        host, given = None, 0
    if not host or given == 0:
        raise ValueError(FORMS)
    return HostPort(unquote(host), given or port)


def _db(text: str) -> int:
    if text and not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError("the number of the database is none: redis://host:6379/0")
    return int(text or 0)


def _tls(options: Mapping[str, str]) -> Tls:
    given = {name: options.get(name, options.get(long, "")) for name, long in TLS.items()}
    for name, path in given.items():
        if path and not Path(path).is_file():
            raise ValueError(f"the file of the option {name} is not there: {path}")
    if given["key"] and not given["cert"]:
        raise ValueError("the option key needs cert, the certificate that the key is for")
    verify, check = options.get("ssl_cert_reqs", "required").lower(), options.get("ssl_check_hostname", "yes").lower()
    _one_of("ssl_cert_reqs", verify, tuple(VERIFY))
    _one_of("ssl_check_hostname", check, YES + NO)
    rest = {ours: options.get(f"ssl_{theirs}", "") for ours, theirs in _REST.items()}
    return Tls(**given, **rest, verify=verify, check_hostname=check in YES)


_REST = {"ca_path": "ca_path", "ca_data": "ca_data", "key_password": "password", "ciphers": "ciphers"}


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"the option {name} is one of {', '.join(known)}")
