"""Users of the demo's world who visit, click as the truth says, and tell the service.

All of a ranking's places are as good as the first one, which is what its context says: so predictions are right if the model is.
"""

import json
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from typing import Any

import numpy as np
from rich.progress import Progress

from training.simulation import AGES, DAYS, SLOTS, World, make_world

CANDIDATES, SHOWN = 30, 5
STRANGERS, UNKNOWN_ADS, EXPLORING = 0.05, 0.1, 0.2
"""Shares of the visits: by users and with ads that nobody knows, and of those that explore."""
CONVERTING, NEWS = 0.1, 0.02


def send_visits(port: int, count: int, progress: Progress) -> tuple[int, int]:
    """Let so many users visit a service of this machine; impressions and clicks.

    Raises:
        HTTPException: the service refused a request.
        OSError: it does not answer.
    """
    world, connection = make_world(), HTTPConnection("127.0.0.1", port, timeout=10)
    task, sent = progress.add_task("visits", total=count), list[Mapping[str, Any]]()
    for number in range(count):
        sent += visit(world, connection, number)
        progress.update(task, completed=number + 1)
    connection.close()
    kinds = [event["type"] for event in sent]
    return kinds.count("impression"), kinds.count("click")


def visit(world: World, connection: HTTPConnection, number: int) -> Sequence[Mapping[str, Any]]:
    """One ranking, and what came of it as events, which have been sent.

    Raises:
        HTTPException: the service refused something.
        OSError: it does not answer.
    """
    user, slot, asked = request(world, number)
    answer = post(connection, "/rank", asked)
    sent = events(world, user, slot, asked, [ad["ad_id"] for ad in answer["ads"]])
    tell(connection, sent)
    return sent


def request(world: World, visit: int) -> tuple[int | None, int, dict[str, Any]]:
    """Who asks (None: a stranger) in which slot, and what."""
    user = None if random.random() < STRANGERS else random.randrange(len(world.age))
    slot = random.randrange(len(SLOTS))
    candidates = [f"a{ad}" for ad in random.sample(world.live(DAYS - 1).tolist(), CANDIDATES)]
    if random.random() < UNKNOWN_ADS:
        candidates.append(f"new{visit}")
    options: dict[str, Any] = {"top_k": SHOWN}
    if random.random() < EXPLORING:
        options["explore"] = {"policy": "plackett_luce", "temperature": 0.5}
    caller = {"id": f"stranger{visit}" if user is None else f"u{user}"}
    asked = {"request_id": uuid.uuid4().hex, "user": caller, "context": {"slot": SLOTS[slot], "position": "1"}}
    return user, slot, {**asked, "candidates": candidates, "options": options}


def events(world: World, user: int | None, slot: int, asked: dict[str, Any], shown: list[str]) -> list[dict[str, Any]]:
    """What came of a ranking: its impressions, clicks by the truth, conversions, and now and then news of the user or an ad."""
    known = [ad for ad in shown if ad.startswith("a")]
    who = random.randrange(len(world.age)) if user is None else user
    truth = np.atleast_1d(world.p_click(DAYS - 1, who, np.array([int(ad[1:]) for ad in known], np.int64), slot, 0))
    clicked = [ad for ad, p in zip(known, truth, strict=True) if random.random() < p]
    of = {"request_id": asked["request_id"]}
    sent: list[dict[str, Any]] = [{"type": "impression", "ad_id": ad, "position": i, **of} for i, ad in enumerate(shown, 1)]
    sent += [{"type": "click", "user_id": asked["user"]["id"], "ad_id": ad, **of} for ad in clicked]
    sent += [{"type": "conversion", "ad_id": ad, "value": 1.0, **of} for ad in clicked if random.random() < CONVERTING]
    if random.random() < NEWS:
        ad = random.randrange(len(world.quality))
        sent.append({"type": "ad", "ad_id": f"a{ad}", "features": world.ad(ad), "active": True})
    if user is not None and random.random() < NEWS:
        sent.append({"type": "user", "user_id": f"u{user}", "features": {"age": AGES[world.age[user]]}})
    return sent


def post(connection: HTTPConnection, path: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a request.

    Raises:
        HTTPException: the service refused it.
    """
    connection.request("POST", path, json.dumps(document), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    body = reply.read()
    if reply.status not in (200, 202):
        raise HTTPException(f"{path}: {reply.status} {body[:200]!r}")
    answer: dict[str, Any] = json.loads(body)
    return answer


def tell(connection: HTTPConnection, events: Sequence[Mapping[str, Any]]) -> None:
    """Send events that happen now, each with an id of its own.

    Raises:
        HTTPException: the service refused one.
    """
    stamped = [{"event_id": uuid.uuid4().hex, "ts": round(time.time(), 3), **event} for event in events]
    refused = [entry for entry in post(connection, "/v1/events", {"events": stamped})["events"] if entry["status"] != "accepted"]
    if refused:
        raise HTTPException(f"an event was refused: {refused[0]}")
