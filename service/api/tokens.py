"""Who may ask for what: bearer tokens (RFC 6750), each with its scopes, from a file that can be changed while the service runs.

Knows nothing about what is asked, and keeps digests of tokens, not tokens.
"""

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from features import files

from .. import errors
from ..errors import Kind

SCOPES = ("rank", "events", "read")
NEEDED = {"/rank": "rank", "/v1/rank": "rank", "/v1/events": "events", "/console/api/user": "rank"}
"""The scope of a route; of all others it is `read`. Who may rank for a user may see the user; who reads metrics may not."""
PROBES = frozenset({"/livez", "/readyz"})
METRICS = frozenset({"/metrics"})
TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]{16,512}={0,2}")
MOST_BYTES = 256 * 2**10
"""Of the file: some thousand tokens. Each request is compared with all of them."""
LOOK_SECONDS = 1.0

log = logging.getLogger(__name__)


class TokenError(ValueError):
    """The file of tokens cannot be used; the message says why, and never what a token is."""


def parse_tokens(text: bytes) -> dict[bytes, frozenset[str]]:
    """The SHA-256 of each token, and its scopes. A line is `rank,events TOKEN`; empty ones and those that begin with # say nothing.

    Raises:
        TokenError: naming the line.
    """
    tokens: dict[bytes, frozenset[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        scopes = frozenset(words[0].decode("utf-8", "replace").split(","))
        if len(words) != 2 or not TOKEN.fullmatch(words[1]):
            expected = "16 to 512 letters, digits or ._~+/- (such as `openssl rand -hex 32` makes)"
            raise TokenError(f"line {number}: expected scopes, a space, and a token of {expected}")
        if scopes - {*SCOPES}:  # not told: it may be a token
            raise TokenError(f"line {number}: its first word is not of scopes; those are {', '.join(SCOPES)}, with commas between them")
        digest = hashlib.sha256(words[1]).digest()
        if digest in tokens:
            raise TokenError(f"line {number}: this token stands in the file twice")
        tokens[digest] = scopes
    if not tokens:
        raise TokenError("it has no token, so that nobody could ask for anything; a line is such as: rank,events TOKEN")
    return tokens


def read_tokens(path: Path) -> bytes:
    """What is in the file.

    Raises:
        TokenError: it cannot be read, or is too large for what it is.
    """
    try:
        return files.read(path, MOST_BYTES)
    except OSError as error:
        raise TokenError(f"it cannot be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class TokenRefusal:
    """Why a request is not let in, and the header that says how it could be."""

    kind: Kind
    detail: str
    challenge: str


class Guard:
    """Lets requests in whose token has the scope of their route.

    Raises:
        TokenError: the file cannot be used.
    """

    def __init__(self, path: Path, opened: Collection[str] = PROBES) -> None:
        self._path, self._opened = path, frozenset(opened)
        self._text = read_tokens(path)
        self._scopes = parse_tokens(self._text)

    def refuse(self, path: str, method: str, authorization: Sequence[bytes]) -> TokenRefusal | None:
        """Why the request is not let in, None where it is. OPTIONS asks for nothing, and browsers send it without a token."""
        if path in self._opened or method == "OPTIONS":
            return None
        if not authorization:
            return TokenRefusal(errors.UNAUTHENTICATED, "send the header Authorization: Bearer TOKEN", "Bearer")
        scheme, _, token = authorization[0].strip().partition(b" ")
        scopes = self._of(token.strip()) if scheme.lower() == b"bearer" and len(authorization) == 1 else None
        if scopes is None:
            return TokenRefusal(errors.UNAUTHENTICATED, "the token is none of this service's", 'Bearer error="invalid_token"')
        needed = NEEDED.get(path, "read")
        if needed not in scopes:
            detail = f"the token lacks the scope {needed}"
            return TokenRefusal(errors.FORBIDDEN, detail, f'Bearer error="insufficient_scope", scope="{needed}"')
        return None

    def _of(self, token: bytes) -> frozenset[str] | None:
        """A token's scopes. Every digest is compared, in constant time, so that the time tells nothing of which one is near."""
        digest, found = hashlib.sha256(token).digest(), None
        for known, scopes in self._scopes.items():
            if hmac.compare_digest(known, digest):
                found = scopes
        return found

    async def follow(self) -> None:
        """Take the file's tokens as they change, for ever. While it cannot be used, the last good ones count, and the log says so."""
        wrong: str | None = None
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                text = await asyncio.to_thread(read_tokens, self._path)
                if text != self._text:
                    self._scopes, self._text = parse_tokens(text), text
                    log.info("the tokens have changed: %d are taken now", len(self._scopes))
                wrong = None
            except TokenError as error:
                if str(error) != wrong:
                    log.error("the tokens' file %s is not taken, the tokens before it count on: %s", self._path, error)
                wrong = str(error)
