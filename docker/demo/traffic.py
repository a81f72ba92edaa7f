"""The traffic of docker-compose.yml: users of the demo's world who visit at a constant rate, click as the truth says, and tell the service.

All of a ranking's places are as good as the first one, which is what its context says: so predictions are right if the model is.
"""

import random
import sys
import time
import uuid
from http.client import HTTPConnection, HTTPException
from typing import Any

import numpy as np

from demo_loop import post, tell
from training.world import AGES, DAYS, SLOTS, World, make_world

VISITS_A_SECOND = 10.0
CANDIDATES, SHOWN = 30, 5
STRANGERS, UNKNOWN_ADS, EXPLORING = 0.05, 0.1, 0.2
"""Shares of the visits: by users and with ads that nobody knows, and of those that explore."""
CONVERTING, NEWS = 0.1, 0.02
TELL_EVERY = 60.0


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
    told: list[dict[str, Any]] = [{"type": "impression", "ad_id": ad, "position": i, **of} for i, ad in enumerate(shown, 1)]
    told += [{"type": "click", "user_id": asked["user"]["id"], "ad_id": ad, **of} for ad in clicked]
    told += [{"type": "conversion", "ad_id": ad, "value": 1.0, **of} for ad in clicked if random.random() < CONVERTING]
    if random.random() < NEWS:
        ad = random.randrange(len(world.quality))
        told.append({"type": "ad", "ad_id": f"a{ad}", "features": world.ad(ad), "active": True})
    if user is not None and random.random() < NEWS:
        told.append({"type": "user", "user_id": f"u{user}", "features": {"age": AGES[world.age[user]]}})
    return told


def main(host: str, port: int) -> None:
    """Visit until told to stop; a minute's sum to standard output."""
    world, connection = make_world(), HTTPConnection(host, port, timeout=5)
    due = said = time.monotonic()
    visits = failed = 0
    while True:
        visits += 1
        try:
            user, slot, asked = request(world, visits)
            answer = post(connection, "/rank", asked)
            tell(connection, events(world, user, slot, asked, [ad["ad_id"] for ad in answer["ads"]]))
        except (OSError, HTTPException, ValueError, KeyError) as error:
            failed, reason = failed + 1, str(error)
            connection.close()
        if time.monotonic() - said >= TELL_EVERY:
            print(f"{visits} visits, {failed} failed" + (f", the last with: {reason}" if failed else ""), flush=True)
            said, visits, failed = time.monotonic(), 0, 0
        due = max(due + 1 / VISITS_A_SECOND, time.monotonic() - 1)
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)
