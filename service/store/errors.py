"""What is wrong between the service and its store, as a `StoreError` whose sentence a person can act on.

Knows what Redis and OpenSSL say, and nothing of what was asked.
"""

from redis.exceptions import ClusterDownError, MasterDownError, MovedError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from features.state import StoreError

UNREACHABLE = (OSError, RedisConnectionError, RedisTimeoutError, ClusterDownError, MasterDownError)

DENIED = "store_denied"
NO_PASSWORD = ("NOAUTH", "Authentication required", "HELLO must be called with the client already authenticated")
WRONG_PASSWORD = ("WRONGPASS", "invalid username-password pair", "invalid password", "without any password configured")
NO_PERMISSION = ("NOPERM", "no permissions to")
FULL = "when used memory > 'maxmemory'"
SILENT = "; see whether host and port are right, and whether it speaks TLS if the URL says so"
TLS = {
    "WRONG_VERSION_NUMBER": "it does not speak TLS at that port; write redis:// in place of rediss://, or name its TLS port",
    "record layer failure": "it does not speak TLS at that port; write redis:// in place of rediss://, or name its TLS port",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not trusted; name the authority that signed it in the URL",
}


def as_store_error(error: Exception, seconds: float) -> StoreError:
    """The failure of something that might take so many seconds."""
    text = _said(error).partition(", with args")[0].rstrip(".")  # of an unknown command, which names users or a password
    if lacks_permission(error):
        return StoreError(DENIED, f"the store's user lacks a permission: {text.removeprefix('NOPERM ')}; docs/redis.md lists what it needs")
    if _says(text, NO_PASSWORD):
        return StoreError(DENIED, f"the store wants a password and was given none ({text}); put one into the URL in ADRANK_REDIS")
    if _says(text, WRONG_PASSWORD):
        return StoreError(DENIED, f"the store refuses the user name or password of its URL ({text}); correct the one in ADRANK_REDIS")
    for sign, meaning in TLS.items():
        if sign in text:
            return StoreError("store_unreachable", f"the store cannot be reached: {meaning} ({text})")
    if isinstance(error, TimeoutError):
        return StoreError("store_timeout", f"the store did not answer within {seconds:g} s")
    if isinstance(error, UNREACHABLE):
        return StoreError("store_unreachable", f"the store cannot be reached: {text}{SILENT if 'Timeout connecting' in text else ''}")
    hint = "; it is a cluster, whose URL begins with redis+cluster://" if isinstance(error, MovedError) else ""
    if "unknown command" in text.lower():
        hint = "; adrank needs Redis 6.2 or later, better 7, or Valkey, without commands that are renamed or switched off"
    if FULL in text:
        hint = "; it is full: raise its maxmemory, or let adrank join take what waits there"
    return StoreError("store_error", f"the store refused: {text}{hint}")


def _said(error: Exception) -> str:
    """What the server said, with the word that it began with, which redis-py takes away."""
    code = getattr(error, "status_code", None)
    return f"{code} {error}" if code and code != "ERR" else str(error)


def lacks_permission(error: Exception) -> bool:
    """Whether the store's user may not do what was asked."""
    return _says(_said(error), NO_PERMISSION)


def _says(text: str, signs: tuple[str, ...]) -> bool:
    return any(sign.lower() in text.lower() for sign in signs)
