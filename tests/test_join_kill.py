"""Sinks that are killed at any moment: real processes, a real store, SIGKILL again and again, and every impression once in the log."""

import os
import random
import signal
import threading
import time
from collections import Counter

import pytest
from joining import Writer, click, conversion, join_once, join_process, ranking, rows

from training.join.attribution import Attribution

KILLS = int(os.environ.get("KILLS", "2"))
"""How often; `KILLS=50 pytest tests/test_join_kill.py` takes a few minutes."""
OPTIONS = ("--window", "0.2", "--lateness", "0.1", "--rows-per-file", "60")
"""What is held is written soon, and claimed soon; attribution reads it with other windows."""


class Traffic(threading.Thread):
    """Appends rankings and clicks until it is told to stop, and remembers them. Some clicks stand in the stream twice."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.writer, self.done = Writer(url), threading.Event()
        self.served: dict[str, float] = {}
        self.clicks: set[tuple[str, str]] = set()
        self.values = 0

    def run(self) -> None:
        chance = random.Random(1)
        while not self.done.wait(0.01):
            for _ in range(chance.randrange(1, 4)):
                self._one(chance)

    def _one(self, chance: random.Random) -> None:
        name, now = f"r{len(self.served)}", time.time()
        user = f"u{chance.randrange(9)}"
        self.writer.add(ranking(name, now, user_id=user))
        self.served[name] = now
        if chance.random() < 0.5:
            ad_id = chance.choice(["a1", "a2", "a3"])
            event = click(name, ad_id, now + 0.001, user_id=user)
            self.writer.add(*[event] * chance.randrange(1, 3))
            self.clicks.add((name, ad_id))
            if chance.random() < 0.3:
                self.writer.add(conversion(name, ad_id, now + 0.002, 2.0, user_id=user))
                self.values += 2


@pytest.mark.parametrize("sinks", [2, 4])
def test_every_impression_is_in_the_log_once_however_often_sinks_are_killed(server, tmp_path, repository, sinks):
    traffic, chance, log = Traffic(server.url), random.Random(sinks), tmp_path / "log"
    traffic.start()
    running = [join_process(server.url, log, repository, *OPTIONS) for _ in range(sinks)]
    try:
        for _ in range(KILLS):
            victim = running.pop(chance.randrange(len(running)))
            assert victim.stderr
            assert b"joining into" in victim.stderr.readline()  # from here on it works
            time.sleep(chance.random() * 0.7)
            assert victim.poll() is None, victim.stderr.read()
            victim.send_signal(signal.SIGKILL)
            victim.communicate()
            running.append(join_process(server.url, log, repository, *OPTIONS))
    finally:
        traffic.done.set()
        traffic.join()
        for process in running:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=90)
    join_once(server.url, log, repository, *OPTIONS, "--drain")
    found = rows(log, Attribution())
    assert Counter(found["request_id"]) == Counter(dict.fromkeys(traffic.served, 3))
    assert found.select("request_id", "ad_id").is_unique().all()
    clicked = found.filter(label=1).select("request_id", "ad_id").rows()
    assert Counter(clicked) == Counter(dict.fromkeys(traffic.clicks, 1))
    assert found["value"].sum() == traffic.values > 0
    assert not (log / "raw/aside").exists()
    assert traffic.writer.lengths() == (0, 0)
    assert {path.parent.name for path in log.rglob("*.tmp")} <= {".join"}
