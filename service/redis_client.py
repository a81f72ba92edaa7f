"""A client of redis-py for any store's URL, for tools that look at servers. Requests, events and the joiner go over `topology.py`."""

from typing import Any

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from .store_url import Login, StoreUrl, Tls, parse_store_url

CONNECT_SECONDS = 5.0


def connect(url: str, connections: int) -> Any:
    """A client, of the primary that sentinels name or of a whole cluster where the URL says so. Nothing is connected yet.

    Untyped: redis-py's types of replies are the union over all of its modes.

    Raises:
        ValueError: it is no URL of a store on servers.
    """
    read = parse_store_url(url)
    # RESP2, since RESP3 lets the server push data between replies, and redis-py then stops checking a pooled connection for stray data.
    common: dict[str, Any] = {"protocol": 2, "socket_timeout": None, "socket_connect_timeout": CONNECT_SECONDS, **_tls(read.tls)}
    pooled = {**common, **_login(read.login), "max_connections": connections, "retry": Retry(NoBackoff(), 1)}
    if read.kind == "cluster":
        return RedisCluster(startup_nodes=[ClusterNode(*place) for place in read.places], **pooled)
    if read.kind == "sentinel":
        asking = common | _login(read.sentinel_login)
        sentinels = Sentinel(list(read.places), sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
        return sentinels.master_for(read.name, _Primary, db=read.db, **pooled)
    if read.kind == "alone":
        return Redis(**_where(read), db=read.db, **pooled)
    raise ValueError("a store in memory has no servers")


class _Primary(Redis):
    """Closes what asks the sentinels too."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        await self.connection_pool.sentinel_manager.aclose()  # type: ignore[attr-defined]  # of a `SentinelConnectionPool`


def _where(read: StoreUrl) -> dict[str, Any]:
    return {"unix_socket_path": read.path} if read.path else {"host": read.places[0].host, "port": read.places[0].port}


def _login(login: Login) -> dict[str, Any]:
    return {"username": login.user or None, "password": login.password or None}


def _tls(tls: Tls | None) -> dict[str, Any]:
    if tls is None:
        return {}
    files = {"ca_certs": tls.ca, "ca_path": tls.ca_path, "ca_data": tls.ca_data, "certfile": tls.cert, "keyfile": tls.key}
    rest = {"password": tls.key_password, "ciphers": tls.ciphers}
    given = {f"ssl_{name}": value for name, value in (files | rest).items() if value}
    return {"ssl": True, "ssl_cert_reqs": tls.verify, "ssl_check_hostname": tls.check_hostname, **given}
