"""Bearer tokens: what a file may say, who is let in, and tokens that change while the service runs."""

import asyncio
import logging
import os
import re

import pytest
from click.testing import CliRunner
from conftest import until
from processes import PATIENCE

import adrank
from service.api.tokens import MOST_BYTES, Guard, TokenError, parse_tokens
from service.settings import Settings
from service.startup_checks import tokens_loose

RANK, EVENTS, READ, ALL = (letter * 32 for letter in "abcd")
FILE = f"# bidders\nrank {RANK}\n\nevents\t{EVENTS}\nread {READ}\n  rank,events,read {ALL}==\n"
CLICK = {"events": [{"type": "click", "event_id": "e1", "ts": 1, "user_id": "u1", "request_id": "r1", "ad_id": "a1"}]}
RANKING = {"user": {"id": "u1"}, "candidates": ["a1"]}
ROUTES = {
    "rank": [("POST", "/rank"), ("POST", "/v1/rank")],
    "events": [("POST", "/v1/events")],
    "read": [
        ("GET", "/v1/models"),
        ("GET", "/v1/schema"),
        ("GET", "/metrics"),
        ("GET", "/made-up"),
    ],
}


def bearer(token):
    return {"authorization": f"Bearer {token}"}


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "it has no token"),
        ("# nothing\n", "it has no token"),
        (f"rank\n{RANK}", "line 1: expected scopes, a space, and a token"),
        ("rank short", "line 1: expected scopes"),
        (f"rank {RANK} {RANK}", "line 1: expected scopes"),
        (f"rank {RANK}\nrank {'x' * 31}ü", "line 2: expected scopes"),
        (f"\nrank,write {RANK}", "line 2: its first word is not of scopes; those are rank, events, read"),
        (f"rank, {RANK}", "line 1: its first word is not of scopes"),
        (f"{RANK} {EVENTS}", "line 1: its first word is not of scopes"),
        (f"rank {RANK}\nread {RANK}", "line 2: this token stands in the file twice"),
    ],
)
def test_a_file_that_says_something_else_is_refused_without_telling_a_token(text, wrong):
    with pytest.raises(TokenError, match=re.escape(wrong)) as refused:
        parse_tokens(text.encode())
    assert RANK not in str(refused.value)


def test_a_file_that_is_none_or_too_large_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TokenError, match="cannot be read: it is a pipe, not a file"):
        Guard(tmp_path / "pipe")
    with pytest.raises(TokenError, match="cannot be read: No such file"):
        Guard(tmp_path / "none")
    with pytest.raises(TokenError, match="cannot be read: Is a directory"):
        Guard(tmp_path)
    (tmp_path / "large").write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(TokenError, match="it has 262,145 bytes, more than the 262,144 that belong there"):
        Guard(tmp_path / "large")


@pytest.mark.anyio
async def test_a_route_is_for_tokens_of_its_scope(run, ads, tokens):
    async with run(ads, tokens=tokens) as client:
        for scope, routes in ROUTES.items():
            for method, path in routes:
                body = {"json": CLICK if scope == "events" else RANKING} if method == "POST" else {}
                for token in (RANK, EVENTS, READ, f"{ALL}=="):
                    answer = await client.request(method, path, headers=bearer(token), **body)
                    allowed = token in ({"rank": RANK, "events": EVENTS, "read": READ}[scope], f"{ALL}==")
                    assert (answer.status_code == 403) == (not allowed), (path, token, answer.text)
                    if not allowed:
                        assert answer.json()["code"] == "forbidden"
                        assert answer.headers["www-authenticate"] == f'Bearer error="insufficient_scope", scope="{scope}"'
                answer = await client.request(method, path, **body)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
                assert answer.headers["content-type"] == "application/problem+json"
        ranked = await client.post("/rank", json=RANKING, headers=bearer(RANK))
        assert ranked.json()["ads"][0]["ad_id"] == "a1"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "header", [f"Bearer {RANK[:-1]}", f"Bearer {RANK}x", "Bearer", f"Basic {RANK}", RANK, f"Bearer {RANK} {RANK}", "Bearer " + "x" * 5000]
)
async def test_what_is_no_token_of_the_file_is_refused(run, ads, tokens, header):
    async with run(ads, tokens=tokens, open_metrics=True) as client:
        answer = await client.post("/rank", json=RANKING, headers={"authorization": header})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer error="invalid_token"')
        twice = await client.post("/rank", json=RANKING, headers=[("authorization", f"Bearer {RANK}")] * 2)
        assert twice.status_code == 401
        assert (await client.post("/rank", json=RANKING, headers={"authorization": f"bearer   {RANK}"})).status_code == 200
        assert await client.metric('adrank_requests_total{model="none",outcome="unauthenticated",route="/rank"}') == 2


@pytest.mark.anyio
async def test_probes_and_docs_are_open_and_metrics_are_not_unless_settings_say_so(run, tokens):
    async with run(tokens=tokens) as client:
        assert {(await client.get(path)).status_code for path in ("/livez", "/docs", "/docs/docs.js", "/openapi.json")} == {200}
        assert (await client.get("/metrics")).status_code == 401
    async with run(tokens=tokens, open_metrics=True, open_probes=False, ready=False) as client:
        assert [(await client.get(path)).status_code for path in ("/livez", "/readyz", "/metrics")] == [401, 401, 200]
        assert (await client.get("/readyz", headers=bearer(READ))).status_code in (200, 503)


@pytest.mark.anyio
async def test_tokens_change_while_the_service_runs(run, ads, tokens, caplog):
    caplog.set_level(logging.INFO)
    async with run(ads, tokens=tokens) as client:

        async def answered(token, status):
            async with asyncio.timeout(PATIENCE):
                while (await client.post("/rank", json=RANKING, headers=bearer(token))).status_code != status:
                    await asyncio.sleep(0.05)

        await answered(RANK, 200)
        fresh = tokens.with_name("fresh")
        fresh.write_text(f"rank {'n' * 40}\nrank {RANK}\n")
        fresh.replace(tokens)
        await answered("n" * 40, 200)
        tokens.write_text(f"rank {'n' * 40}\n")
        await answered(RANK, 401)
        tokens.write_text("rank oops\n")
        await until(lambda: "the tokens before it count on: line 1: expected scopes" in caplog.text)
        assert "oops" not in caplog.text
        await answered("n" * 40, 200)
        tokens.unlink()
        await until(lambda: "cannot be read: No such file" in caplog.text)
        await answered("n" * 40, 200)


def test_a_service_without_usable_tokens_does_not_start(repository, tmp_path):
    (tmp_path / "tokens").write_text("rank")
    with pytest.raises(SystemExit) as stop:
        adrank.main(["serve", "--models", str(repository), "--redis", "memory://", "--tokens", str(tmp_path / "tokens")])
    assert stop.value.code == 2


def test_who_may_ask_for_more_than_they_should_is_told(tokens):
    tokens.chmod(0o600)
    assert tokens_loose(Settings(tokens=tokens, host="0.0.0.0")) is None
    assert tokens_loose(Settings()) is None
    assert tokens_loose(Settings(host="::1")) is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        assert f"whoever reaches {host} may rank" in tokens_loose(Settings(host=host))
    tokens.chmod(0o644)
    assert "chmod o-r" in tokens_loose(Settings(tokens=tokens))


def test_the_load_generator_takes_a_token(tmp_path):
    (tmp_path / "token").write_text(f"{RANK}\n")
    from adrank_bench.load import Target  # noqa: PLC0415

    sent = Target.of("http://127.0.0.1:1", RANK)
    assert f"\r\nAuthorization: Bearer {RANK}\r\n".encode() in sent.request(b"{}")
    assert RANK not in repr(sent)
    done = CliRunner().invoke(
        adrank.cli, ["bench", "--url", "http://127.0.0.1:1", "--redis", "memory://", "--token-file", str(tmp_path / "token")]
    )
    assert done.exception is not None
    assert RANK not in str(done.exception) + done.output
