"""The service's settings: flags over `ADRANK_*` variables over defaults, in one frozen object, checked before anything starts."""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from features.errors import AdrankError
from features.memory import CGROUP
from features.temperatures import COLDEST, HOTTEST

from .store.url import parse_store_url, store_name

PREFIX = "ADRANK_"
ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:.]+\](:[0-9]{1,5})?")
ARM = r"[a-z0-9][a-z0-9_-]{0,31}"
EXPERIMENTS = rf"^$|^{ARM}={ARM}(\|{ARM}){{1,15}}(,{ARM}={ARM}(\|{ARM}){{1,15}}){{0,15}}$"
SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$")


class SettingsError(AdrankError, ValueError):
    """A setting is unknown or impossible. The message is one sentence a person can act on."""


class Settings(BaseSettings):
    """Everything that can be set. Times are in the unit that the name ends in."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True
    )

    models: Path = Path("models")
    """The model repository: a folder, which may still be made or mounted later."""
    redis: Annotated[str, Field(repr=False)] = "redis://127.0.0.1:6379/0"
    """A server, sentinels or a cluster (docs/redis.md), or `memory://` for no Redis. May hold a password: log `store_name` instead."""
    model: str | None = None
    """The model of requests that name none. Needed as soon as two models are live; by default the only one that is."""
    host: str = "127.0.0.1"
    """Address or name to listen on. `::` takes IPv4 too where the system allows it, as does an empty one."""
    port: Annotated[int, Field(ge=1, le=65_535)] = 8000
    """Port to listen on."""
    uds: Path | None = None
    """A Unix socket to listen on instead, such as /run/adrank/adrank.sock, made at the start and removed at the end."""
    uds_mode: Annotated[str, Field(pattern="^0?[0-7]{3}$")] = "660"
    """Who may connect to the Unix socket, as for chmod: its user and group."""
    root_path: Annotated[str, Field(pattern=r"^$|^(/[A-Za-z0-9_.~-]+)+$")] = ""
    """A prefix that a gateway leaves on paths, such as /ads: with it, and without, every page answers."""
    allowed_origins: str = ""
    """Origins, apart by commas, such as https://shop.example: their pages may send `/v1/events` from a browser, also as text/plain."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes; as many as the processors it may use is a good number."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where models score."""
    precision: Literal["float32", "int8"] = "float32"
    """`int8` scores with a bundle's int8 graph where it has one; on processors with VNNI or AMX 2 to 3 times faster."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Requests that a worker scores at once; 0 is the processors this service may use, divided by its workers."""
    intra_op_threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Threads that share the scoring of one request."""
    ad_side_mib: Annotated[int, Field(ge=0, le=2**20)] = 256
    """The most memory that a worker takes for what one version of a model makes of each ad whoever asks, so as not to compute it in each
    request; nothing is kept where the catalogue needs more. 0: it is computed in each. DeepFM with a first layer of 400 units needs 1.7 KB
    an ad."""
    store_timeout_ms: Annotated[float, Field(gt=0, le=60_000)] = 50
    """How long a ranking waits for Redis; then it goes on without the user's state, and says so in `degraded`."""
    body_timeout_ms: Annotated[float, Field(gt=0, le=600_000)] = 5_000
    """How long a caller may take to send its body. It holds none of the `max_inflight` places meanwhile."""
    max_candidates: Annotated[int, Field(ge=1, le=100_000)] = 10_000
    """Of one request; more are refused with 422."""
    max_body_bytes: Annotated[int, Field(ge=1_024, le=2**30)] = 4 * 2**20
    """Of one request's body; a larger one is refused with 413."""
    max_inflight: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Rankings that a worker has under way at once; more are answered with 429."""
    max_connections: Annotated[int, Field(ge=16, le=100_000)] = 4_096
    """Of a worker, or less where fewer files may be open; one more is answered with 503 and closed."""
    peer_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The most of a worker's connections, and of `max_reading_bytes`, that one address may have. Behind one proxy, all requests are of one
    address: 1 there, if the proxy itself limits clients. Over a Unix socket there is no such limit."""
    peer_inflight_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The most of `max_inflight` that one address may have. Set it lower where clients connect themselves."""
    max_head_bytes: Annotated[int, Field(ge=1_024, le=2**20)] = 32 * 2**10
    """The URL and headers of a request; also what stands around two chunks of a body, and its trailers."""
    max_headers: Annotated[int, Field(ge=10, le=10_000)] = 100
    """Of one request; more are refused with 431, as is a larger head."""
    max_url_bytes: Annotated[int, Field(ge=64, le=2**16)] = 4 * 2**10
    """Of one request; a longer one is refused with 414."""
    max_reading_bytes: Annotated[int, Field(ge=2**16, le=2**40)] = 128 * 2**20
    """Of all bodies that are being read by a worker, twice `max_body_bytes` at least; what is more is answered with 429."""
    max_unsent_bytes: Annotated[int, Field(ge=2**16, le=2**40)] = 64 * 2**20
    """Of all answers that clients do not read; beyond it, the connections that have waited longest are closed."""
    head_timeout_ms: Annotated[float, Field(gt=0, le=600_000)] = 10_000
    """From a connection, or the first byte of its next request, to a whole head. Like the two below it may be overrun by a second."""
    request_timeout_ms: Annotated[float, Field(gt=0, le=3_600_000)] = 60_000
    """From a request's head to its answer; a request that comes slower is answered with 408, one whose answer takes longer with 504."""
    answer_timeout_ms: Annotated[float, Field(gt=0, le=600_000)] = 30_000
    """How long a client may take to read an answer; then its connection is closed."""
    user_ttl_seconds: Annotated[int, Field(ge=1)] = 90 * 24 * 3600
    """How long Redis keeps a user whom no event and no load has touched."""
    ad_gone_seconds: Annotated[int, Field(ge=1)] = 90 * 24 * 3600
    """How long an ad that left the catalogue is kept, in the store and in memory, for the histories that hold it."""
    explore: Literal["greedy", "epsilon_greedy", "plackett_luce", "thompson"] = "greedy"
    """How requests are ranked that do not say it themselves; `epsilon` and `temperature` are those of their policies."""
    epsilon: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Of `epsilon_greedy`: the share of places that are drawn."""
    temperature: Annotated[float, Field(ge=COLDEST, le=HOTTEST)] = 1.0
    """Of `plackett_luce`: the higher, the more is left to chance."""
    weights: Annotated[
        str,
        Field(
            pattern=r"^$|^[a-z][a-z0-9_]*=[0-9]{1,9}(\.[0-9]{1,6})?(,[a-z][a-z0-9_]*=[0-9]{1,9}(\.[0-9]{1,6})?)*$",
            examples=["click=1,conversion=20"],
        ),
    ] = ""
    """Of heads, for requests of the objective `weighted`, such as click=1,conversion=20: ads are then ordered by the weighted sum of their
    probabilities."""
    experiments: Annotated[str, Field(pattern=EXPERIMENTS, examples=["button=control|green,floor=none|low"])] = ""
    """The experiments that requests may name, and their arms, such as button=control|green,floor=none|low: others are refused, so that
    metrics have no label that a caller can choose."""
    log_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The share of rankings that are logged, drawn at random: a caller chooses its request ids, so they are no fair sample."""
    log_tensors_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The share of those that are logged with the tensors that the model was given, for checks."""
    log_shown: Annotated[int, Field(ge=1, le=10_000)] = 100
    """The most ads of an answer that count as shown and are logged: callers do best to set top_k to what they show."""
    log_queue: Annotated[int, Field(ge=1, le=100_000)] = 1_000
    """Records that may wait for the store before new ones are dropped; their bytes have a bound too."""
    log_kept: Annotated[int, Field(ge=1)] = 100_000
    """Records in the store that nobody has taken, beyond which new ones are dropped."""
    log_kept_bytes: Annotated[int, Field(ge=2**20, le=2**40)] = 256 * 2**20
    """The same of the memory that they take there: explored rankings of many candidates are a hundred times as large as others."""
    log_memory_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """The share of the store's `maxmemory` that may be in use before no more rankings are logged: the rest is for events and users."""
    max_events: Annotated[int, Field(ge=1, le=10_000)] = 1_000
    """Events of one batch; more are refused with 422."""
    max_event_batches: Annotated[int, Field(ge=1, le=1_000)] = 8
    """Batches that a worker takes at once; more are answered with 429."""
    event_age_seconds: Annotated[int, Field(ge=1, le=365 * 24 * 3600)] = 7 * 24 * 3600
    """Older events are refused. Ids of events are remembered for as long, which takes memory of the store."""
    event_ahead_seconds: Annotated[int, Field(ge=0, le=24 * 3600)] = 300
    """How far an event's time may be ahead of our clock."""
    events_kept: Annotated[int, Field(ge=1, le=10**9)] = 1_000_000
    """Impressions, clicks and conversions that may wait in the store to be joined; then no more are taken."""
    events_kept_bytes: Annotated[int, Field(ge=2**20, le=2**40)] = 512 * 2**20
    """The same of the memory that they take in the store."""
    drain_seconds: Annotated[int, Field(ge=1, le=3600)] = 20
    """How long requests may still take after SIGTERM."""
    farewell_seconds: Annotated[float, Field(ge=0, le=300)] = 0.5
    """How long clients that keep their connection may still send a request after SIGTERM, before idle ones are closed: its answer says
    that it is the last. Longer than they pause between two requests, and no request meets a closed connection."""
    keep_alive_seconds: Annotated[int, Field(ge=1, le=3600)] = 75
    """How long a connection may be idle. Set it above what is in front, else requests meet closed connections: most proxies keep theirs
    for 60 seconds, Google's load balancers for 600 (620 here); docs/http.md lists them."""
    tokens: Path | None = None
    """A file of bearer tokens and their scopes (docs/security.md), read again when it changes. Without it whoever reaches the port may
    ask."""
    open_probes: bool = True
    """With `tokens`, `/livez` and `/readyz` answer without one all the same."""
    open_metrics: bool = False
    """With `tokens`, `/metrics` answers without one all the same."""
    console: bool = True
    """Whether there is a console for people at `/console`, to which `/` leads."""
    log_format: Literal["text", "json"] = "text"
    """Of the lines on standard error; with `log_level` the joiner's too."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """At `debug` lines may tell of users."""
    trace_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of requests that are traced, of those whose callers have not decided it; 0 traces none. Variables `OTEL_*` say the rest."""

    @field_validator("redis")
    @classmethod
    def _is_store(cls, url: str) -> str:
        parse_store_url(url)
        return url

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, text: str) -> str:
        for origin in filter(None, text.split(",")):
            if not ORIGIN.fullmatch(origin.strip()):
                raise ValueError(f"{origin.strip()[:80]!r} is no origin; write it as browsers do, such as https://shop.example")
        return text

    @field_validator("weights", "experiments")
    @classmethod
    def _are_named_once(cls, text: str) -> str:
        names, arms = zip(*(each.partition("=")[::2] for each in text.split(",")), strict=True)
        for told in (names, *(each.split("|") for each in arms)):
            if twice := next((name for name in told if told.count(name) > 1), None):
                raise ValueError(f"{twice} is there twice; name each once")
        return text

    @property
    def origins(self) -> frozenset[str]:
        """The origins that are allowed."""
        return frozenset(filter(None, (origin.strip() for origin in self.allowed_origins.split(","))))

    @property
    def head_weights(self) -> dict[str, float]:
        """The weights by head."""
        pairs = (each.partition("=") for each in filter(None, self.weights.split(",")))
        return {head: float(weight) for head, _, weight in pairs}

    @property
    def arms(self) -> dict[str, list[str]]:
        """The arms by experiment."""
        return {name: arms.split("|") for name, _, arms in (each.partition("=") for each in filter(None, self.experiments.split(",")))}

    @property
    def store_name(self) -> str:
        """The store's URL without its user name, password and options, for logs and answers."""
        return store_name(self.redis)

    @property
    def store_kind(self) -> str:
        """The scheme of the store's URL alone, for whoever asks."""
        return self.redis.partition(":")[0]

    @property
    def scoring_threads(self) -> int:
        """Requests that a worker scores at once, the default worked out."""
        return self.threads or max(1, processors().usable // self.workers)

    def environment(self) -> dict[str, str]:
        """The settings as `ADRANK_*` variables, to hand them to worker processes."""
        return {PREFIX + name.upper(): str(value) for name, value in self.model_dump().items() if value is not None}


def load_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Settings from flags (None among them: not given), then the environment, then defaults.

    Raises:
        SettingsError: naming the setting, what was wrong with it, and for an unknown one what may have been meant.
    """
    for unknown in unknown_variables().values():
        raise SettingsError(unknown)
    settings, impossible = usable_settings(flags)
    if impossible:
        raise SettingsError("; ".join(impossible.values()))
    return settings


def unknown_variables() -> dict[str, str]:
    """What is wrong with each `ADRANK_*` variable that is not a setting."""
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    given = sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)
    return {name: f"{name} is not a setting{_of_a_service(name) or _meant(name.upper(), known)}" for name in given}


def usable_settings(flags: Mapping[str, Any] | None = None) -> tuple[Settings, dict[str, str]]:
    """Settings as `load_settings` reads them, defaults in place of impossible ones, and what is wrong with each of these by its name."""
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        return Settings(**given), {}
    except ValidationError as error:
        impossible: dict[str, str] = {}
        for mistake in error.errors(include_input=False):
            impossible.setdefault(str(mistake["loc"][0]), _sentence(mistake))
    defaults = {name: Settings.model_fields[name].default for name in impossible if name in Settings.model_fields}
    return Settings(**{name: value for name, value in given.items() if name not in impossible}, **defaults), impossible


def _sentence(mistake: Mapping[str, Any]) -> str:
    name = PREFIX + "_".join(map(str, mistake["loc"])).upper()
    if mistake["type"] == "extra_forbidden":
        return f"{name} is not a setting{_meant(name, [PREFIX + known.upper() for known in Settings.model_fields])}"
    text = str(mistake["msg"]).removeprefix("Value error, ")
    if mistake["type"] == "string_pattern_mismatch" and (examples := Settings.model_fields[str(mistake["loc"][0])].examples):
        text = f"expected a value such as {examples[0]}"
    return f"setting {name}: {text[:1].lower()}{text[1:]}{_of_a_service(name)}"


def _of_a_service(variable: str) -> str:
    """Kubernetes tells a pod where each Service is in variables named after the Service, in a form that Docker once made up."""
    if not SERVICE_LINK.search(variable.upper()) and not os.environ.get(variable, "").startswith(("tcp://", "udp://", "sctp://")):
        return ""
    return "; Kubernetes sets it for a Service whose name begins with adrank: say enableServiceLinks: false in the pod's spec"


def _meant(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; the settings are {', '.join(known)}"


class Processors(NamedTuple):
    """How many processors this process may use, and what limits them: `affinity` or `quota`."""

    usable: int
    limit: str


def processors(cgroup: Path = CGROUP) -> Processors:
    """What the process's affinity leaves it, or its cgroup's quota where that is less; at least 1, parts of one do not count."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = int(_quota(cgroup))
    return Processors(max(1, quota), "quota") if quota < available else Processors(available, "affinity")


def _quota(cgroup: Path) -> float:
    version_2, quota, period = cgroup / "cpu.max", cgroup / "cpu/cpu.cfs_quota_us", cgroup / "cpu/cpu.cfs_period_us"
    try:
        limit, _, each = version_2.read_text().partition(" ") if version_2.exists() else (quota.read_text(), "", period.read_text())
        return 2**20 if limit.strip() in ("max", "-1") else int(limit) / int(each)
    except (OSError, ValueError):
        return 2**20
