"""The console: pages for people at `GET /console`, and the JSON that they read beside what the API has already.

The pages are files, the same for everybody, and hold nothing of the service; what they read is guarded like the rest of the API.
"""

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pydantic_core
from fastapi import APIRouter, Request, Response

from features import files
from features.bundle import BundleError, read_manifest
from features.listing import METRICS, list_models
from features.repository import NAME
from features.state import Ad, Store, StoreError, UserState
from features.values import plain

from ..errors import InvalidError, StoreDownError
from ..public import LOG, of_store
from ..ranking.ranker import Ranker
from ..serving.shares import Shares
from ..settings import Settings
from ..telemetry.scrapes import Scrapes

STATIC = Path(__file__).with_name("static")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGES = {
    "/console": "console.html",
    **{
        f"/console/{name}": name
        for name in ("console.css", "console.js", "page.js", "rank.js", "live.js", "models.js", "loop.js", "icon.svg")
    },
}
ROUTES = ("ads", "user", "versions", "version", "figures", "reports")
ADS, USER, VERSIONS, VERSION, FIGURES, REPORTS = (f"/console/api/{name}" for name in ROUTES)
OPEN = frozenset({"/", *PAGES})
"""What needs no token."""
CONSOLE = ("/", *PAGES, ADS, USER, VERSIONS, VERSION, FIGURES, REPORTS)
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
MOST_ADS, MOST_BEHAVIOURS, MOST_REPORTS = 1_000, 200, 50
PRIVATE = ("name", "version", "files")
"""Of a manifest, what a page does not show: its folder says the first two, and digests are of no use to people."""
REPORT, DRAWN = "report.json", ("epochs", "reliability")
"""What `training/report` writes into a bundle, and `training/retrain` into a folder of its own; and what of the former a page draws."""
RETRAINED = ("verdict", "accepted", "reasons", "warnings", "name", "version", "champion", "started", "metrics", "differences")
"""What a page shows of a retraining."""

Json = TypeVar("Json", dict[str, Any], list[Any])

log = logging.getLogger(__name__)


def console_routes(ranker: Ranker, store: Store, settings: Settings) -> APIRouter:
    """The pages, and what only they read."""
    router, searches = APIRouter(include_in_schema=False), Shares(1, 1)
    listing = Scrapes(lambda: pydantic_core.to_json(_versions(settings.models)))

    @router.get("/")
    async def root() -> Response:
        return Response(status_code=307, headers={"location": f"{settings.root_path}/console"}, media_type="text/plain")

    async def page(request: Request) -> Response:
        file = STATIC / PAGES[request.scope["path"]]
        return Response(file.read_bytes(), headers=HEADERS, media_type=TYPES[file.suffix])

    for path in PAGES:
        router.add_api_route(path, page, methods=["GET"])

    @router.get(ADS)
    async def ads(request: Request) -> Response:
        """Ads at random: `count` of them, where `field` and `value` are given those that have that value, or an id that begins so."""
        asked = request.query_params
        field, value = asked.get("field", ""), asked.get("value", "")
        count = _count(asked.get("count", "20"))
        with searches.holding(None, "the catalogue is being searched for somebody else; try again"):  # all of it, where few have the value
            found = await ranker.catalogue.sample(count, lambda ad: not value or _has(ad, field, value))
        return _json({"ads": [{"ad_id": ad.ad_id, "features": ad.features} for ad in found], "catalogue": ranker.catalogue.ads})

    @router.get(USER)
    async def user(request: Request) -> Response:
        """What the store has of the user `id`: features, and the newest behaviours, oldest first."""
        try:
            state = await store.get_user(plain(request.query_params.get("id", "")))
        except StoreError as error:
            raise StoreDownError(of_store(error.reason)) from None
        return _json({"known": state is not None, **_user(state or UserState(), ranker)})

    @router.get(VERSIONS)
    async def versions() -> Response:
        """Every version in the repository."""
        return _answer(await listing.text())

    @router.get(VERSION)
    async def version(request: Request) -> Response:
        """The manifest and the metrics of a version, by `model` and `version`."""
        name, number = request.query_params.get("model", ""), request.query_params.get("version", "")
        if not NAME.fullmatch(name) or not (number.isascii() and number.isdigit() and len(number) < 20):
            raise InvalidError("give model, a name of the repository, and version, a number")
        return _json(await asyncio.to_thread(_version, settings.models / name / number))

    router.include_router(_of_the_loop(store, settings))
    return router


def _of_the_loop(store: Store, settings: Settings) -> APIRouter:
    """What is known of the loop: what the joiner told, and what retrainings came to."""
    router = APIRouter()
    listing = Scrapes(lambda: pydantic_core.to_json({"reports": _reports(settings.models)}))

    @router.get(FIGURES)
    async def figures() -> Response:
        """What the joiner has told of quality and events, the oldest first; nothing where there is no joiner."""
        try:
            return _json({"figures": _parsed(await store.figures(), list), "now": time.time()})
        except StoreError as error:
            raise StoreDownError(of_store(error.reason)) from None

    @router.get(REPORTS)
    async def reports() -> Response:
        """The reports of retrainings that are in the repository, the newest first."""
        return _answer(await listing.text())

    return router


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= MOST_ADS):
        raise InvalidError(f"count is a number from 1 to {MOST_ADS:,}")
    return int(text)


def _has(ad: Ad, field: str, value: str) -> bool:
    if field in ("", "ad_id"):
        return ad.ad_id.startswith(value)
    has = ad.features.get(field)
    return value in map(str, has) if isinstance(has, list | tuple) else str(has) == value


def _user(state: UserState, ranker: Ranker) -> dict[str, Any]:
    ad_ids, times = state.ad_ids[-MOST_BEHAVIOURS:], state.ts[-MOST_BEHAVIOURS:]
    known = ranker.catalogue.features(ad_ids)
    history = [
        {"ad_id": ad_id, "ts": times[i] if i < len(times) else None, "features": known.get(ad_id, {})} for i, ad_id in enumerate(ad_ids)
    ]
    return {"features": state.features, "behaviours": len(state.ad_ids), "history": history}


def _versions(models: Path) -> dict[str, Any]:
    try:
        listing = list_models(models)
    except BundleError as error:
        log.warning("the console cannot list the models: %s", error)
        return {"versions": [], "wrong": {}, "notice": f"the model repository cannot be read; {LOG}"}
    return {
        "versions": [
            {**asdict(each), "version": str(each.version), "wrong": each.wrong and "its manifest cannot be read"}
            for each in listing.versions
        ],
        "wrong": dict.fromkeys(listing.wrong, "something is wrong with it: adrank models says what"),
        "notice": None,
    }


def _version(path: Path) -> dict[str, Any]:
    try:
        manifest = {key: value for key, value in read_manifest(path).items() if key not in PRIVATE}
    except (OSError, ValueError, RecursionError, AttributeError):
        raise InvalidError("there is no such version, or its manifest cannot be read") from None
    if isinstance(settings := manifest.get("settings"), Mapping):
        manifest["settings"] = {key: value for key, value in settings.items() if key != "init_from"}  # a path of the training machine
    report = _object(path / REPORT)
    return {"manifest": manifest, "metrics": _object(path / METRICS), "report": {name: report[name] for name in DRAWN if name in report}}


def _reports(models: Path) -> list[dict[str, Any]]:
    paths = sorted(models.glob(f"*/reports/*/{REPORT}"), key=lambda path: path.parent.name, reverse=True)[:MOST_REPORTS]
    found = [{name: value for name, value in _object(path).items() if name in RETRAINED} for path in paths]
    return [{**each, "version": each["version"] and str(each["version"])} for each in found if {"verdict", "version"} <= each.keys()]


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the repository; an empty one where there is none."""
    try:
        return _parsed(files.read(path), dict)
    except OSError:
        return {}


def _parsed(text: bytes, kind: type[Json]) -> Json:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) else kind()


def _json(document: Mapping[str, Any]) -> Response:
    return _answer(pydantic_core.to_json(document))


def _answer(text: bytes) -> Response:
    return Response(text, headers={"cache-control": "no-store"}, media_type="application/json")
