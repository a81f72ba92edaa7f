"""Composition: settings, store, models, catalogue and ranker become an application."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from features.encode import Encoder, Features
from features.state import MemoryStore, Store, StoreError

from .api.console import OPEN, console_routes
from .api.docs import OPEN_DOCS, docs_routes
from .api.edge import Edge, add_error_handlers
from .api.events import EventsCORS, event_routes
from .api.openapi import describe, openapi_page
from .api.rank import Direct, rank_routes
from .api.status import status_routes
from .api.tokens import METRICS, PROBES, Guard
from .feedback.impression_log import ServedLog
from .feedback.ingest import Ages, Intake
from .models.watcher import ModelWatcher
from .public import of_store, of_store_error
from .ranking.executor import Inline, Pool, Scoring
from .ranking.explanations import Explanations
from .ranking.gpu_batching import Batcher
from .ranking.ranker import Ranker
from .settings import Settings, load_settings
from .store.events import Bounds
from .store.redis import RedisStore
from .telemetry.metrics import Metrics, Registry

if TYPE_CHECKING:
    from .telemetry.tracing import Tracer

START_OVER_SECONDS = (0.5, 30.0)
"""How long work of the background that failed waits before it starts over: twice as long each time that it fails soon again."""
WELL_SECONDS = 5.0
"""Work that has not failed for so long goes well."""
FLUSH_SECONDS = 0.5
TELL_SECONDS = 2.0
START_SECONDS = 10.0
"""How long a process may get ready before it takes requests: beside workers that are ready, it would answer some of theirs with 503."""

log = logging.getLogger(__name__)


class Service:
    """The parts of one process, and what happens in them between requests."""

    def __init__(self, settings: Settings, store: Store, metrics: Metrics) -> None:
        self.settings, self.store, self.metrics = settings, store, metrics
        self.served = ServedLog(store, metrics, settings)
        self.ranker = Ranker(store, metrics, _scoring(settings, metrics))
        self.explanations = Explanations()
        self.ranker.catalogue.gone_seconds = settings.ad_gone_seconds
        self.reload = ModelWatcher(settings, self.ranker, metrics)
        self.guard = _guard(settings)
        self.failing: dict[str, str] = {}
        """Work of the background that failed in a way nobody foresaw and has not gone well since, and a sentence about it."""
        self._store_logged: tuple[str, float, bool] | None = None
        """Why the store was down when it was last asked, since when, and whether the log says so."""

    async def run(self) -> None:
        """Load the models, then follow the repository and the catalogue, judge challengers and write metrics, for ever.

        Each has a task of its own, so that none takes another down with it.
        """
        log.info("models in %s, store %s", self.settings.models, self.settings.store_name)
        looked = asyncio.Event()
        async with asyncio.TaskGroup() as together:
            together.create_task(self._keep_on("following the model repository", lambda: self._models(looked)))
            together.create_task(self._keep_on("judging challengers", self.reload.judge))
            together.create_task(self._keep_on("writing metrics", self._flush))
            if self.guard:
                together.create_task(self._keep_on("following the tokens", self.guard.follow))
            await looked.wait()  # so that the catalogue is encoded while it is read, for the models that there are
            together.create_task(self._keep_on("following the catalogue", self.ranker.catalogue.follow))

    async def _models(self, looked: asyncio.Event) -> None:
        try:
            await self.reload.look()
        finally:
            looked.set()
        await self.reload.follow()

    async def _keep_on(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do it for ever. Where it fails in a way that nobody foresaw it starts over, and `/readyz` says so until it goes well again."""
        first, longest = START_OVER_SECONDS
        pause = first
        while True:
            began = time.monotonic()
            try:
                async with _until_well(lambda: self.failing.pop(what, None)):
                    await work()
            except Exception as error:
                log.exception("%s failed in a way nobody foresaw, and starts over", what)
                self.metrics.degraded("background", "failed")
                self.failing[what] = f"{what} failed ({type(error).__name__}) and starts over; the log says where"
            if time.monotonic() - began >= WELL_SECONDS:
                pause = first
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, longest)

    async def _flush(self) -> None:
        """Write what requests have noted into the metrics now and then, for ever: another worker may be the one that is scraped."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            self.metrics.flush()

    async def settle(self) -> None:
        """Wait until it is known whether this process can rank, `START_SECONDS` at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                while not self.reload.looked or (self.ranker.models.ready and not self._catalogue_tried):
                    await asyncio.sleep(0.01)

    def able(self) -> bool:
        """Whether this process can rank: it has a model, and the catalogue."""
        return self.ranker.models.ready and self.ranker.catalogue.loaded

    @property
    def _catalogue_tried(self) -> bool:
        return self.ranker.catalogue.loaded or self.ranker.catalogue.reason is not None

    async def health(self) -> dict[str, Any]:
        """What `/readyz` tells: ready, degraded (ranks, but without something) or unready, and why."""
        store: dict[str, Any] = {"kind": self.settings.store_kind, "status": "up"}
        try:
            await self.store.ping()
        except StoreError as error:
            store |= of_store_error(error)
            self._tell_store(error)
        else:
            self._store_logged = None
        models, catalogue = self.ranker.models, self.ranker.catalogue  # only now: they may change while the store is asked
        reasons = [] if models.ready else [self.reload.waiting_for]
        if not catalogue.loaded and (models.ready or catalogue.detail):
            why = of_store(catalogue.reason) if catalogue.reason else "it is being read"
            reasons.append(f"the catalogue has not been loaded yet: {why}")
        served = self.served.status()
        troubles = [*self.failing.values(), *filter(None, [self.reload.stuck])]
        shaky = store["status"] == "down" or models.refused or catalogue.reason or troubles or served["status"] == "full"
        return {
            "status": "unready" if reasons else "degraded" if shaky else "ready",
            "reasons": [*reasons, *troubles],
            "store": store,
            "served_log": served,
            "models": {
                "default": models.default,
                "loaded": sorted(models.loaded),
                "refused": models.refused,
                "notice": self.reload.default.notice,
            },
            "catalogue": {
                "loaded": catalogue.loaded,
                "ads": catalogue.ads,
                "lag_seconds": round(catalogue.lag, 3),
                "reason": catalogue.reason,
                "detail": of_store(catalogue.reason) if catalogue.reason else None,
            },
        }

    def _tell_store(self, error: StoreError) -> None:
        """Log what `/readyz` does not tell anybody, once, unless the catalogue has: it finds most of it, if a little later."""
        reason, since, logged = self._store_logged or (error.reason, time.monotonic(), False)
        if reason != error.reason:
            since, logged = time.monotonic(), False
        if not logged and self.ranker.catalogue.reason != error.reason and time.monotonic() - since > TELL_SECONDS:
            log.warning("the store is down, as /readyz found: %s", error)
            logged = True
        self._store_logged = error.reason, since, logged


@asynccontextmanager
async def _until_well(well: Callable[[], object]) -> AsyncIterator[None]:
    """Call it once what is done inside has gone on for `WELL_SECONDS`."""
    timer = asyncio.get_running_loop().call_later(WELL_SECONDS, well)
    try:
        yield
    finally:
        timer.cancel()


def _scoring(settings: Settings, metrics: Metrics) -> Scoring:
    """Where the models run: on a device in batches, on the event loop, or in threads where a worker has several processors."""
    if settings.device == "cuda":
        return Batcher(metrics)
    return Inline() if settings.scoring_threads == 1 else Pool(settings.scoring_threads)


def open_store(settings: Settings, metrics: Metrics | None = None) -> Store:
    """The store that the settings name, and the metrics that count what is damaged in it. Nothing is connected yet."""
    seen_seconds = float(settings.event_age_seconds + settings.event_ahead_seconds)
    if settings.redis.startswith("memory:"):
        return MemoryStore(seen_seconds)
    store = RedisStore(
        settings.redis,
        timeout=settings.store_timeout_ms / 1000,
        ttl=settings.user_ttl_seconds,
        on_damaged=lambda: metrics.degraded("catalogue", "ad_damaged") if metrics else None,
        bounds=Bounds(seen_seconds, settings.events_kept, settings.events_kept_bytes),
    )
    if metrics:
        store.damage.on_replaced = lambda: metrics.degraded("store", "key_replaced")
    return store


def _intake(service: Service) -> Intake:
    def encoders() -> list[Encoder]:
        return [model.bundle.encoder for model in service.ranker.models.loaded.values()]

    def features(ad_ids: Sequence[str]) -> dict[str, Features]:
        return service.ranker.catalogue.features(ad_ids)

    ages = Ages(service.settings.event_age_seconds, service.settings.event_ahead_seconds)
    intake = Intake(service.store, service.metrics, encoders, ages)
    intake.features = features
    return intake


def _guard(settings: Settings) -> Guard | None:
    if settings.tokens is None:
        return None
    opened = (PROBES if settings.open_probes else frozenset()) | (METRICS if settings.open_metrics else frozenset())
    opened |= OPEN_DOCS | (OPEN if settings.console else frozenset())
    return Guard(settings.tokens, opened)


def _tracer(settings: Settings) -> "Tracer | None":
    if not settings.trace_share:
        return None
    from .telemetry.tracing import open_tracer  # noqa: PLC0415  # an extra, which takes long to load

    return open_tracer(settings.trace_share)


def create_app(settings: Settings, store: Store | None = None, registry: Registry | None = None) -> FastAPI:
    """The application. It answers at once and says on `/readyz` when it can rank; a store that is passed in stays the caller's."""
    metrics = Metrics(registry)
    service = Service(settings, store or open_store(settings, metrics), metrics)

    tracer = _tracer(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        work = asyncio.create_task(service.run())
        service.served.start()
        try:
            await service.settle()
            yield {"able": service.able}
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await asyncio.gather(service.served.close(), *([tracer.close()] if tracer else []))
            metrics.flush()
            service.reload.close()
            service.ranker.close()
            service.explanations.close()
            if store is None:
                await service.store.close()

    app = FastAPI(
        title="adrank",
        version="1",
        description="Ranks ads by p(click).",
        lifespan=lifespan,
        servers=[{"url": settings.root_path}] if settings.root_path else None,
        openapi_url=None,  # its page renders the document for each request, which takes ten rankings' time
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},  # its own would tell what callers sent
    )
    ranking = rank_routes(service.ranker, service.explanations, service.served, metrics, settings)
    app.include_router(ranking, tags=["rank"])
    app.include_router(event_routes(_intake(service), settings), tags=["events"])
    reload = service.reload
    app.include_router(
        status_routes(service.ranker, metrics, service.health, lambda: reload.stuck or reload.default.notice), tags=["status"]
    )
    app.include_router(docs_routes())
    if settings.console:
        app.include_router(console_routes(service.ranker, service.store, settings))
    add_error_handlers(app)
    app.add_middleware(Direct, ranking=ranking)
    if settings.origins:
        app.add_middleware(EventsCORS, origins=settings.origins)
    app.add_middleware(Edge, metrics=metrics, tracer=tracer, guard=service.guard, prefix=settings.root_path)
    app.openapi = describe(app)  # type: ignore[method-assign]  # FastAPI's own way to extend the document
    app.add_route("/openapi.json", openapi_page(app), include_in_schema=False)
    app.state.service = service
    return app


def create_from_environment() -> FastAPI:
    """The application of a worker process, whose settings `serve` put into the environment."""
    return create_app(load_settings())
