"""The measurement of how soon a click counts, on a real service."""

import asyncio
from pathlib import Path

import pytest
from conftest import Server
from processes import SERVE, fill

from adrank_bench.measured import LoadPlan
from benchmarks import freshness
from service.store.redis import RedisStore


def test_every_click_of_the_measurement_changes_a_ranking(repository: Path, server: Server, tmp_path: Path) -> None:
    asyncio.run(fill(server.url))
    users, port = [f"u{i}" for i in range(60)], freshness.free_port()
    command = [*SERVE, "--models", str(repository), "--model", "din", "--redis", server.url, "--port", str(port)]
    with freshness.serving("adrank", command, port, tmp_path / "log") as subject:
        everyone = freshness.Entities(users, [f"a{i}" for i in range(30)])
        measured = freshness.freshness(subject, everyone, rounds=12, candidates=20, plan=LoadPlan(20.0, 0.6, 0.2, 2))
    assert (measured.rounds, measured.candidates, measured.stale, measured.errors) == (12, 20, 0, 0)
    assert 0 < measured.changed_p50 <= measured.changed_p99 <= measured.changed_max
    assert asyncio.run(newest(server.url, users)) >= 12 / 2  # a user may be drawn twice


async def newest(url: str, user_ids: list[str]) -> int:
    """How many users have a click that came by an event: those have a fraction of a second."""
    store = RedisStore(url, timeout=5, ttl=100, on_damaged=lambda: None)
    states = [await store.get_user(user_id) for user_id in user_ids]
    await store.close()
    return sum(state is not None and any(isinstance(ts, float) for ts in state.ts) for state in states)


def test_a_click_that_changes_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stale:
        def scores(self, body: bytes) -> dict[str, float]:
            return {"a1": 0.5}

        def click(self, user_id: str, ad_id: str) -> None: ...

    monkeypatch.setattr(freshness, "GIVE_UP_SECONDS", 0.05)
    with pytest.raises(freshness.LoadError, match="had changed no ranking"):
        freshness.one_round(Stale(), Stale(), b'{"user": {"id": "u1"}}', "a1")
