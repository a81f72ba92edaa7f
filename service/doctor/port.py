"""The port: free, taken by an adrank and how that one is, or taken by something else."""

import http.client
import json
import socket
from typing import Any

from ..serving.listen import ABSENT, reason, uds_wrong
from ..settings import Settings
from .finding import Finding, Status

SECONDS = 3.0
MOST_BYTES = 2**20
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  # not to listen on


def check_port(settings: Settings) -> Finding:
    """Try the port without listening on it; one that is taken is asked `/readyz`."""
    if settings.uds is not None:
        wrong = uds_wrong(settings.uds)
        if wrong:
            return _found("problem", f"{settings.uds} cannot be listened on: {wrong}", "choose another with --uds or ADRANK_UDS")
        return _found("ok", f"{settings.uds} is free{_idle(settings)}")
    where = f"{settings.host or 'every address,'} port {settings.port}"
    try:
        _bind(settings.host, settings.port)
    except OSError as error:
        readiness = readyz(ANY.get(settings.host, settings.host), settings.port)
        fix = "choose another with --host and --port, or ADRANK_HOST and ADRANK_PORT"
        return _of_adrank(where, readiness) if readiness else _found("problem", f"{where} cannot be listened on: {reason(error)}", fix)
    return _found("ok", f"{where} is free{_idle(settings)}")


def _idle(settings: Settings) -> str:
    """What only the reader knows to be right or wrong: how long what is in front keeps its connections."""
    seconds = settings.keep_alive_seconds
    enough = "" if seconds >= 620 else "; Google's load balancers need 620"
    return f"; idle connections are closed after {seconds} s, which must be longer than what is in front keeps them{enough}"


def _bind(host: str, port: int) -> None:
    """Bind to each address of the host, without listening, so that no client can connect meanwhile."""
    refusal, some = None, False
    for family, _, _, _, address in socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind(address)
                some = True
            except OSError as error:
                refusal = error
                if error.errno not in ABSENT:
                    raise
    if refusal and not some:
        raise refusal


def _of_adrank(where: str, readiness: dict[str, Any]) -> Finding:
    status, taken = readiness["status"], f"{where} is taken by adrank, which is"
    if status == "ready":
        return _found("ok", f"{taken} ready")
    fix = "this is about the service that runs; what is found above is about these settings"
    if status == "unready":
        return _found("problem", f"{taken} unready because {'; '.join(map(str, readiness.get('reasons', [])))}", fix)
    return _found("warning", f"{taken} {status} because {_shaky(readiness)}", fix)


def _shaky(readiness: dict[str, Any]) -> str:
    store, catalogue, models = (readiness.get(part) or {} for part in ("store", "catalogue", "models"))
    refused = [f"model {name} is refused: {why}" for name, why in (models.get("refused") or {}).items()]
    reasons = [store.get("detail") or store.get("reason"), catalogue.get("detail") or catalogue.get("reason"), *refused]
    return "; ".join(dict.fromkeys(str(reason) for reason in reasons if reason)) or "/readyz does not say"


def readyz(host: str, port: int) -> dict[str, Any] | None:
    """What an adrank that listens there says of itself; None where nothing does that speaks so."""
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    try:
        connection.request("GET", "/readyz")
        readiness = json.loads(connection.getresponse().read(MOST_BYTES))
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    known = isinstance(readiness, dict) and readiness.get("status") in ("ready", "degraded", "unready") and "catalogue" in readiness
    return readiness if known else None


def _found(status: Status, said: str, fix: str = "") -> Finding:
    return Finding("port", "listen", status, said, fix)
