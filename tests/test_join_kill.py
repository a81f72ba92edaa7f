"""A joiner that is killed at any moment: a real process, a real store, SIGKILL again and again, and every impression once in the log."""

import os
import random
import signal
import threading
import time
from collections import Counter

from joining import Writer, click, conversion, join_once, join_process, ranking, rows

KILLS = int(os.environ.get("KILLS", "6"))
"""How often; `KILLS=50 pytest tests/test_join_kill.py` takes a few minutes."""
OPTIONS = ("--window", "2", "--lateness", "1", "--rows-per-file", "60")


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


def test_every_impression_is_in_the_log_once_however_often_the_joiner_is_killed(server, tmp_path, repository):
    traffic, chance = Traffic(server.url), random.Random(2)
    traffic.start()
    log = tmp_path / "log"
    try:
        for _ in range(KILLS):
            process = join_process(server.url, log, repository, *OPTIONS)
            assert process.stderr
            assert b"joining into" in process.stderr.readline()  # from here on it works
            time.sleep(chance.random() * 0.7)
            assert process.poll() is None, process.stderr.read()
            process.send_signal(signal.SIGKILL)
            process.communicate()
    finally:
        traffic.done.set()
        traffic.join()
    time.sleep(0.01)
    join_once(server.url, log, repository, *OPTIONS, "--drain")
    found = rows(log)
    assert Counter(found["request_id"]) == Counter(dict.fromkeys(traffic.served, 3))
    assert found.select("request_id", "ad_id").is_unique().all()
    clicked = found.filter(label=1).select("request_id", "ad_id").rows()
    assert Counter(clicked) == Counter(dict.fromkeys(traffic.clicks, 1))
    assert found["value"].sum() == traffic.values > 0
    assert not (log / "unjoined").exists()
    assert traffic.writer.lengths() == (0, 0)
    assert not list(log.rglob("*.tmp"))
