"""The console's pages in a real browser: each against what the API says, made by clicks and keys, in light and dark, on a phone."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import bundles
import pytest
from axe_playwright_python.async_playwright import Axe
from conftest import Client
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect
from processes import fill, serving
from test_tokens import ALL

from benchmarks.console import CHROMIUM, FLAGS, PAGES
from features.bundle import EXPLAIN_MODEL
from features.challenger import Challenger, challenge
from features.state import Ad, UserState
from service.store.redis import RedisStore
from service.store.streams import RedisStreams
from tests.test_explain import explaining

pytestmark = pytest.mark.anyio
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
EPOCHS = [{"number": n, "train_loss": loss, "valid_loss": 0.5 - n / 10} for n, loss in ((1, 0.6), (2, 0.4), (3, None))]
FIGURES = [
    {
        "ts": 1_764_500_000 + 3600 * i,
        "since": 1_764_496_400,
        "models": {"din": {"calibration": 1.1 + i / 10, "normalised_entropy": 0.8, "places": {"1": 1.25, "more": None}, "drift": drift}},
        "event click": {"joined": 1200, "unknown_request": 30},
        f"event {HOSTILE}": {HOSTILE: 1},
        "stream adrank:served": {"backlog": 7, "lag": 2},
        "shown": {"said": 90, "unknown": 10},
        "incidents": {},
    }
    for i, drift in enumerate(({"user.age": 0.1}, {"user.age": 0.3, HOSTILE: 0.05}))
]
REPORTS = [
    {
        "verdict": "Published din 20261130101112: log loss -2.00%",
        "accepted": True,
        "reasons": [],
        "warnings": [HOSTILE],
        "name": "din",
        "version": 20261130101112,
        "started": 1_764_500_000,
        "metrics": {"champion": {"auc": 0.7, "log_loss": 0.5}, "challenger": {"auc": 0.72, "log_loss": 0.49}},
        "differences": {"log_loss": {"value": -0.01, "low": -0.015, "high": -0.005}},
    },
    {
        "verdict": "Refused din: few rows",
        "accepted": False,
        "reasons": ["few rows"],
        "name": "din",
        "version": None,
        "started": 1_764_400_000,
    },
]
BINS = [{"p": p, "rate": p, "low": p / 2, "high": 0.8 * p + 0.2} for p in (0.0, 0.25, 0.5)]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


@pytest.fixture(scope="module")
async def client(servers, tmp_path_factory) -> AsyncIterator[Client]:
    """A service whose model explains, with another one beside it, older versions, and a user and an ad with hostile ids."""
    models, server = tmp_path_factory.mktemp("console") / "models", servers("valkey")
    bundles.publish(models, "din")
    metrics = {"valid": {"auc": 0.7, "rows": 4000}, "test": {"auc": 0.75, "log_loss": 0.3}}
    report = {"epochs": EPOCHS, "reliability": BINS, "worst": [HOSTILE]}
    more = {name: json.dumps(each).encode() for name, each in (("metrics.json", metrics), ("report.json", report))}
    bundles.publish(models, "din", files={EXPLAIN_MODEL: explaining(), **more})
    bundles.publish(models, "other", bias=1.0)
    await fill(server.url)
    store = RedisStore(server.url, timeout=2, ttl=1000, on_damaged=lambda: None)
    await store.put_users(
        [
            ("u378", UserState({"age": "25"}, ["a9", "a2", "a7"], [1e9, 1.1e9, 1.2e9])),
            (HOSTILE, UserState({"age": HOSTILE}, [HOSTILE], [1])),
        ]
    )
    await store.put_ads([Ad(HOSTILE, {"genre": HOSTILE, "price": 1.0})])
    await store.close()
    streams = RedisStreams(server.url)
    await streams.tell(json.dumps(FIGURES).encode())
    await streams.close()
    for report in REPORTS:
        folder = models / "din" / "reports" / str(report["started"])
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report))
    async with serving(models, server.url, store_timeout_ms=20_000) as client:  # a busy machine is no fault of a page
        yield client


@contextlib.asynccontextmanager
async def watched(browser: Browser, url: str, allowed: str = "", **options: object) -> AsyncIterator[Page]:
    """A page of the console, in which nothing is wrong and from which nothing goes elsewhere; data: has no host."""
    context = await browser.new_context(viewport={"width": 1280, "height": 900}, **options)
    page, wrong = await context.new_page(), list[str]()

    def said(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not (allowed and allowed in message.text):
            wrong.append(f"{message.location['url']}: {message.text}")

    page.on("console", said)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if urlsplit(request.url).netloc in (urlsplit(url).netloc, "") else wrong.append(request.url))
    page.set_default_timeout(20_000)
    await page.goto(url)
    yield page
    await context.close()
    assert wrong == []


def address(client: Client) -> str:
    return str(client.base_url).rstrip("/")


async def rank(page: Page, user: str, candidates: str) -> None:
    await page.get_by_label("User id").fill(user)
    await page.get_by_label("Candidates").fill(candidates)
    await page.get_by_role("button", name="Rank", exact=True).click()
    await page.get_by_role("heading", name="The same by curl").wait_for()


async def cells(page: Page, region: str) -> list[list[str]]:
    rows = page.get_by_role("region", name=region).locator("tbody tr")
    await rows.first.wait_for()
    return [await row.locator("td").all_inner_texts() for row in await rows.all()]


async def test_a_ranking_made_by_clicks_is_the_one_of_the_api(browser, client):
    async with watched(browser, address(client) + "/") as page:
        assert page.url.endswith("/console")
        await page.get_by_label("slot").fill("feed")
        await page.get_by_label("Where").select_option("genre")
        await page.get_by_label("is (ids: begins)").fill("news")
        await page.get_by_role("button", name="Take a sample").click()
        await expect(page.get_by_label("Candidates")).not_to_have_value("")
        sampled = (await page.get_by_label("Candidates").input_value()).split("\n")
        assert sorted(sampled) == sorted(f"a{i}" for i in range(2, 30, 3))
        await page.get_by_label("Beside it").select_option("other")
        await rank(page, "u378", "\n".join(sampled))
        request = {"user": {"id": "u378"}, "context": {"slot": "feed"}, "candidates": sampled}
        ours, theirs = [
            (await client.post("/rank", json={**request, "options": {"model": name, "explain": True}})).json() for name in ("din", "other")
        ]
        beside = {ad["ad_id"]: ad for ad in theirs["ads"]}
        assert [[row[0], row[1], row[3], row[5], row[6]] for row in await cells(page, "10 ads by din")] == [
            [
                str(ad["rank"]),
                ad["ad_id"],
                f"{ad['p_click']:.4f}",
                f"{beside[ad['ad_id']]['p_click']:.4f}",
                str(beside[ad["ad_id"]]["rank"]),
            ]
            for ad in ours["ads"]
        ]
        third = ours["ads"][2]
        await page.get_by_role("button", name=third["ad_id"], exact=True).click()
        await page.get_by_role("heading", name=f"Why {third['ad_id']} has {third['p_click']:.4f}").wait_for()
        told = await cells(page, "The newest")
        assert [(row[0], row[1], row[3]) for row in told] == [
            (when, ad_id, f"{weight:.3f}")
            for when, ad_id, weight in zip(
                ("10 Jan 21:20", "09 Nov 11:33", "09 Sept 01:46"), ("a7", "a2", "a9"), reversed(third["attention"]), strict=True
            )
        ]
        adds = {row[0]: row[1] for row in await cells(page, "What fields add")}
        assert adds == {name: f"{'−' if value < 0 else '+'}{abs(value):.3f}" for name, value in third["contributions"].items()}
        line = await page.locator("pre").inner_text()
        process = await asyncio.create_subprocess_shell(line, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        assert [ad["ad_id"] for ad in json.loads(out)["ads"]] == [ad["ad_id"] for ad in ours["ads"]]


async def test_hostile_ids_and_values_are_text(browser, client):
    async with watched(browser, address(client) + "/console") as page:
        await rank(page, HOSTILE, f"{HOSTILE}\na1")
        await page.get_by_role("button", name=HOSTILE, exact=True).click()
        assert (await cells(page, "The newest"))[0][1] == HOSTILE
        await expect(page.get_by_text(f"age: {HOSTILE}")).to_be_visible()
        assert await page.locator("img").count() == 0
        assert await page.title() == "rank · adrank console"
        line = await page.locator("pre").inner_text()
        assert json.loads(line.partition(" -d '")[2][:-1].replace("'\\''", "'"))["user"]["id"] == HOSTILE


async def test_a_mistake_is_told_in_a_sentence(browser, client):
    async with watched(browser, address(client) + "/console", allowed="422") as page:
        await page.get_by_label("User id").fill("x" * 2000)
        await page.get_by_label("Candidates").fill("a1")
        await page.get_by_role("button", name="Rank", exact=True).click()
        await expect(page.get_by_role("alert")).to_contain_text("Not ranked: one thing is wrong with the request")


async def test_live_shows_rankings_as_they_come(browser, client):
    async with watched(browser, address(client) + "/console#live") as page:
        tile = page.locator("section", has_text="requests / s").locator("output")
        await expect(tile).not_to_have_text("–")
        async with asyncio.timeout(30):
            while await tile.inner_text() in ("–", "0.0") or (await cells(page, "Stages"))[2][1] == "–":
                await client.rank()
        await expect(page.locator("section", has_text="ads in the catalogue").locator("output")).to_have_text("31")
        loaded = (await client.get("/v1/models")).json()["models"]
        assert [row[1] for row in await cells(page, "Models that rank")] == [each["version"] for each in loaded]
        await expect(page.get_by_text("The store (redis) is up")).to_be_visible()


async def test_a_canary_ranks_beside_the_live_version_and_both_are_told(browser, tmp_path):
    live, other = bundles.publish(tmp_path, "din"), bundles.publish(tmp_path, "din", bias=1.0, make_current=False)
    facts = Challenger(int(other.name), "canary", 0.5)
    ours = {facts.takes("din", f"u{i}"): f"u{i}" for i in range(50)}
    challenge(tmp_path, "din", facts)
    async with serving(tmp_path, "memory://") as client, watched(browser, address(client) + "/console#live") as page:
        await page.get_by_text(f"{other.name}, canary").wait_for()
        row = (await cells(page, "Models that rank"))[0]
        (told,) = (await client.get("/v1/models")).json()["models"]
        assert (row[1], row[3]) == (told["version"], f"{told['challenger']['version']}, canary 0.5, running")
        assert (told["version"], told["challenger"]["version"]) == (live.name, other.name)
        await page.get_by_role("link", name="Rank").click()
        for by, user in ours.items():
            await rank(page, user, "a1\na2")
            answer = (await client.post("/rank", json={"user": {"id": user}, "candidates": ["a1", "a2"]})).json()
            assert answer["model"]["version"] == (other.name if by else live.name)
            table = f"2 ads by din {answer['model']['version']}"
            await page.get_by_role("region", name=table).wait_for()
            shown = await cells(page, table)
            assert [row[1] for row in shown] == [ad["ad_id"] for ad in answer["ads"]]
            assert [row[3] for row in shown] == [f"{ad['p_click']:.4f}" for ad in answer["ads"]]
        await page.get_by_label("Model").select_option(f"din {live.name} live")
        await page.get_by_label("Beside it").select_option(f"din {other.name} canary")
        await rank(page, ours[True], "a1\na2")
        side_by_side = page.get_by_role("region", name=f"2 ads by din {live.name}")
        await side_by_side.get_by_text(f"din {other.name}").wait_for()
        both = await cells(page, f"2 ads by din {live.name}")
        for column, version in ((3, live.name), (5, other.name)):
            asked = {"user": {"id": ours[True]}, "candidates": ["a1", "a2"], "options": {"version": version}}
            answer = (await client.post("/rank", json=asked)).json()
            by_ad = {ad["ad_id"]: f"{ad['p_click']:.4f}" for ad in answer["ads"]}
            assert answer["model"]["version"] == version
            assert {row[1]: row[column] for row in both} == by_ad
        assert {f"din {live.name}", f"din {other.name}"} <= set(await side_by_side.locator("th").all_inner_texts())
        assert await side_by_side.evaluate("each => each.scrollWidth <= each.clientWidth")  # no column is cut


async def test_percentiles_are_of_what_came_between_two_reads(browser, client):
    """10 under 1 ms, 80 from 1 to 2, 10 from 2 to 4: the median is half way through the 80, the 99th nine tenths through the last 10."""

    def exposition(*counts: int) -> str:
        return "\n".join(f'h_bucket{{le="{le}",stage="x"}} {n}' for le, n in zip(("0.001", "0.002", "0.004", "+Inf"), counts, strict=True))

    async with watched(browser, address(client) + "/console") as page:
        script = """async ([was, now]) => {
            const {parse, percentile} = await import("/console/live.js");
            return [0.5, 0.99].map((share) => percentile({samples: parse(was)}, {samples: parse(now)}, "h", share, (l) => l.stage === "x"));
        }"""
        found = await page.evaluate(script, [exposition(5, 5, 5, 7), exposition(15, 95, 105, 107)])
        assert found == pytest.approx([1.5, 3.8])


async def test_models_are_those_of_the_repository(browser, client):
    async with watched(browser, address(client) + "/console#models") as page:
        await page.get_by_text("Measured in training").wait_for()
        listed = (await client.get("/console/api/versions")).json()["versions"]
        assert [row[:3] for row in await cells(page, "Versions")] == [[each["name"], each["version"], each["role"]] for each in listed]
        assert await cells(page, "Measured in training") == [
            ["auc", "0.70000", "0.75000"],
            ["rows", "4,000", "–"],
            ["log loss", "–", "0.30000"],
        ]
        curve, diagram = await page.locator("svg.chart").all()
        lines = [await line.get_attribute("points") for line in await curve.locator("polyline").all()]
        # 264 wide from 44, for epochs 1 to 3; 140 high from 150 up, for losses 0.2 to 0.6; what is no number is left out.
        assert lines == ["44.0,10.0 176.0,80.0", "44.0,80.0 176.0,115.0 308.0,150.0"]
        assert await curve.locator("text").all_text_contents() == ["0.200", "1", "0.400", "2", "0.600", "3"]
        lines = [await line.get_attribute("points") for line in await diagram.locator("polyline").all()]
        assert lines[:2] == ["44.0,150.0 308.0,10.0", "44.0,150.0 154.0,91.7 264.0,33.3"]  # from 0 to 0.6, the highest end of an interval
        assert lines[2:] == ["44.0,150.0 44.0,103.3", "154.0,120.8 154.0,56.7", "264.0,91.7 264.0,10.0"]
        assert await diagram.get_attribute("role") == "img"
        await expect(page.get_by_text("More is in report.html")).to_be_visible()
        older = listed[1]
        await page.get_by_role("region", name="Versions").locator("tbody tr").nth(1).get_by_role("button").click()
        command = f"adrank promote --models MODELS --name din --version {older['version']}"
        await expect(page.get_by_text(command, exact=True)).to_be_visible()
        await expect(page.locator("svg.chart")).to_have_count(0)  # it was published before there were reports


async def test_quality_is_what_the_joiner_told_last_and_before(browser, client):
    async with watched(browser, address(client) + "/console#quality") as page:
        await expect(page.get_by_text("p(click) over clicks: 1.200. Normalised entropy: 0.800.")).to_be_visible()
        await expect(page.get_by_text("It has counted since 30 Nov 09:53 (UTC).")).to_be_visible()
        assert [row[:2] for row in await cells(page, "p(click) over clicks by position")] == [["1", "1.250"], ["more", "–"]]
        assert [row[:2] for row in await cells(page, "Drift by field")] == [["user.age", "0.300"], [HOSTILE, "0.050"]]
        charts = await page.locator("svg.chart").all()
        lines = [[await line.get_attribute("points") for line in await each.locator("polyline").all()] for each in charts]
        # 264 wide from 44, for an hour before and now; 140 high from 150 up: 0.8 to 1.2, and 0.05 to 0.3, where a field was told once.
        assert lines == [["44.0,45.0 308.0,10.0", "44.0,150.0 308.0,150.0"], ["44.0,122.0 308.0,10.0", "308.0,150.0"]]
        [once] = await page.locator("svg.chart circle").all()
        assert (await once.get_attribute("cx"), await once.get_attribute("cy")) == ("308.0", "150.0")


async def test_events_are_told_by_outcome_and_how_fresh_they_are(browser, client):
    async with watched(browser, address(client) + "/console#events") as page:
        await page.get_by_text("What waits for the joiner").wait_for()
        told = [row[:3] for row in await cells(page, "What became of events")]
        assert told == [["click", "joined", "1,200"], ["click", "unknown request", "30"], [HOSTILE, HOSTILE.replace("_", " "), "1"]]
        assert await cells(page, "What waits for the joiner") == [["adrank:served", "7", "2"]]
        await expect(page.get_by_text("known what was shown: 90 said, 10 unknown.")).to_be_visible()
        await expect(page.get_by_text("What should not happen: none.")).to_be_visible()


async def test_retrainings_are_told_with_verdict_and_reasons(browser, client):
    async with watched(browser, address(client) + "/console#retrainings") as page:
        assert [row[1:] for row in await cells(page, "Retrainings")] == [
            ["din", "published", REPORTS[0]["verdict"]],
            ["din", "refused", "Refused din: few rows"],
        ]
        assert await cells(page, "On the newest slice") == [
            ["auc", "0.7000", "0.7200", "–"],
            ["log loss", "0.5000", "0.4900", "-0.0150 to -0.0050"],
        ]
        await expect(page.get_by_role("listitem")).to_have_text([HOSTILE])
        await page.get_by_role("region", name="Retrainings").get_by_role("button").nth(1).click()
        await expect(page.get_by_role("listitem")).to_have_text(["few rows"])


async def test_a_token_is_asked_for_once_and_again_where_it_is_wrong(browser, client, tmp_path):
    (tmp_path / "tokens").write_text(f"rank,read {ALL}\n")
    bundles.publish(tmp_path / "models", "din")
    async with (
        serving(tmp_path / "models", "memory://", tokens=tmp_path / "tokens") as other,
        watched(browser, address(other) + "/console", allowed="401") as page,
    ):
        for token in ("x" * 32, ALL):
            await page.get_by_role("textbox", name="Token").fill(token)
            await page.keyboard.press("Enter")
            if token != ALL:
                await expect(page.get_by_text("none of this service's")).to_be_visible()
        await rank(page, "u1", "a1")
        await page.reload()
        await page.get_by_role("button", name="Take a sample").wait_for()
        assert not await page.get_by_role("dialog").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nobody_is_shut_out_and_a_phone_does(browser, client, scheme):
    async with watched(browser, address(client) + "/console", color_scheme=scheme) as page:
        await page.set_viewport_size({"width": 360, "height": 780})
        for name, there in PAGES.items():
            await page.get_by_role("link", name=name.title()).focus()
            await page.keyboard.press("Enter")
            await page.get_by_text(there).first.wait_for()
            if name == "rank":
                await rank(page, "u378", "a1\na2\n" + "long" * 30)
            assert await page.evaluate("document.documentElement.scrollWidth") <= 360, name
            found = await Axe().run(page)
            serious = [each for each in found.response["violations"] if each["impact"] in ("serious", "critical")]
            assert serious == [], found.generate_report()


async def execute(page, path, status, change):
    """Try a route on the page of docs: what it answered."""
    route = page.locator(".opblock", has=page.locator(f'[data-path="{path}"]'))
    await route.locator(".opblock-summary-control").click()
    body = route.locator("textarea")
    await body.fill(change(await body.input_value()))
    await route.get_by_role("button", name="Execute").click()
    answer = route.locator(".live-responses-table")
    await expect(answer.locator("tbody .response-col_status").first).to_contain_text(str(status))
    return json.loads(await answer.locator("tbody .microlight, tbody .highlight-code code").first.inner_text())


async def test_each_route_can_be_tried_on_the_page_of_docs_in_the_dark(browser, client):
    async with watched(browser, f"{client.base_url}/docs", color_scheme="dark") as page:
        asked = json.dumps({"user": {"id": "u378"}, "candidates": ["a1", "a2"]})
        assert {ad["ad_id"] for ad in (await execute(page, "/v1/rank", 200, lambda _: asked))["ads"]} == {"a1", "a2"}
        told = await execute(page, "/v1/events", 202, lambda body: body.replace("a56", "a5"))  # which the catalogue has
        assert [each["status"] for each in told["events"]] == ["accepted"] * 5
        assert await page.locator("html.dark-mode").count() == 1


async def test_docs_take_a_token_and_stay_under_a_prefix(browser, tmp_path):
    (tmp_path / "tokens").write_text(f"rank {ALL}\n")
    bundles.publish(tmp_path / "models", "din")
    settings = {"tokens": tmp_path / "tokens", "root_path": "/ads"}
    async with (
        serving(tmp_path / "models", "memory://", **settings) as other,
        watched(browser, address(other) + "/ads/docs", allowed="401") as page,
    ):
        asked = json.dumps({"user": {"id": "u378"}, "candidates": ["a1"]})
        assert (await execute(page, "/rank", 401, lambda _: asked))["code"] == "unauthenticated"
        await page.get_by_role("button", name="Authorize").first.click()
        await page.get_by_role("textbox", name="auth-bearer-value").fill(ALL)
        await page.get_by_role("button", name="Apply credentials").click()
        await page.get_by_role("button", name="Close").click()
        await page.locator(".opblock-summary-control").first.click()
        assert (await execute(page, "/rank", 200, lambda _: asked))["ads"][0]["ad_id"] == "a1"
        assert await page.locator(".request-url").inner_text() == "Request URL\n" + address(other) + "/ads/rank"
