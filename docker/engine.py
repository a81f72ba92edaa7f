"""What the test of docker-compose.yml needs of an engine, of Compose and of HTTP."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar

from images import DOCKER, ROOT, asked

T = TypeVar("T")
WAIT_SECONDS = 240.0


class WrongError(AssertionError):
    """The stack did not do what it should; the message says what."""


def need(is_so: object, otherwise: str) -> None:
    """Go on only if something is so.

    Raises:
        WrongError: it is not.
    """
    if not is_so:
        raise WrongError(otherwise)


def eventually(what: str, ask: Callable[[], T | None], seconds: float = WAIT_SECONDS) -> T:
    """What `ask` says as soon as it says something; no answer yet, and an answer that is none, are waited out.

    Raises:
        WrongError: it did not in time.
    """
    until = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < until:
        try:
            if found := ask():
                return found
        except (OSError, HTTPException, ValueError) as error:
            last = error
        time.sleep(0.2)
    raise WrongError(f"{what}: not within {seconds:g} s" + (f"; the last answer was {last}" if last else ""))


def answer(url: str, document: Mapping[str, Any] | None = None, seconds: float = 5) -> dict[str, Any]:
    """The JSON of a GET, or of a POST of a document; of refusals as of good answers, with its `status` under ""."""
    body = None if document is None else json.dumps(document).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=seconds) as reply:
            told, status = json.load(reply), reply.status
    except urllib.error.HTTPError as refusal:
        told, status = json.load(refusal), refusal.code
    return {**told, "": status}


@dataclass(frozen=True)
class Stack:
    """A project of Compose: docker-compose.yml under a name of its own."""

    project: str
    services: Sequence[str]

    @property
    def program(self) -> list[str]:
        """What COMPOSE names, or else Compose 2 where the client has it, or else docker-compose."""
        if chosen := os.environ.get("COMPOSE"):
            return chosen.split()
        return [DOCKER, "compose"] if asked(DOCKER, "compose", "version") else ["docker-compose"]

    def do(self, *words: str) -> str:
        """What a command of Compose's printed.

        Raises:
            WrongError: it failed.
        """
        done = subprocess.run(
            [*self.program, "--project-name", self.project, *words], cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False
        )
        need(done.returncode == 0, f"{' '.join(words)}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
        return done.stdout

    def container(self, service: str) -> str:
        """The id of a service's container."""
        return self.do("ps", "-a", "-q", service).strip()

    def inside(self, service: str, *words: str) -> "subprocess.CompletedProcess[str]":
        """A command run in a service's container."""
        command = [DOCKER, "exec", self.container(service), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def facts(container: str) -> dict[str, Any]:
    """What the engine knows of a container.

    Raises:
        WrongError: there is none.
    """
    told = asked(DOCKER, "inspect", container)
    need(told, f"the engine knows no container {container}")
    found: dict[str, Any] = json.loads(told)[0]
    return found
