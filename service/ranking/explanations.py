"""Why the ads of an answer are where they are: what `explain.onnx` of the version that ranked says of them.

For people who ask, not for traffic: a thread of low priority loads a version's graph when it is first asked for, and runs it. What
goes wrong here fails no ranking: a notice says what is missing.
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import orjson

from features.bundle import ATTENTION, CONTRIBUTIONS, EXPLAIN_MODEL, Bundle, BundleError
from features.encode import Feeds
from features.vocabulary import Numbers

from ..errors import ScoringError
from ..models.loaded import Model
from ..models.watcher import give_way
from ..telemetry.metrics import RequestTimings
from .query import Encoded, Ranking
from .scorer import ExplainGraph

MOST_NUMBERS = 50_000
"""In an answer, of all its ads together: ads x (contributions + behaviours)."""
SECONDS = 10.0
"""How long a request waits to be explained, where its own deadline leaves so much."""
WAITING = 8
"""Requests that wait to be explained; they hold places that others want."""

Why = dict[str, Any]

log = logging.getLogger(__name__)


class Explanations:
    """Explains rankings, one after the other."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "explain", give_way)
        self._graphs: WeakKeyDictionary[Model, ExplainGraph | str] = WeakKeyDictionary()
        """Of each version that was asked for, its graph, or why there is none. Of the thread alone."""
        self._waiting = 0

    async def add(self, ranking: Ranking, stages: RequestTimings) -> None:
        """Explain a ranking's ads in it, as far as that can be done."""
        stages.enter("explain")
        deadline = ranking.query.deadline
        self._waiting += 1
        try:
            if self._waiting > WAITING:
                raise TimeoutError
            async with asyncio.timeout(SECONDS if deadline is None else min(SECONDS, deadline - stages.total)):
                ranking.why, notice = await asyncio.get_running_loop().run_in_executor(self._thread, self._explained, ranking)
        except TimeoutError:
            notice = "the ads could not be explained in time: explain.onnx is being loaded, or others ask too; ask again"
        finally:
            self._waiting -= 1
            stages.enter("post")
        if notice:
            ranking.seen = {**(ranking.seen or {}), "notice": notice}

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _explained(self, ranking: Ranking) -> tuple[Sequence[Why], str | None]:
        """What there is to say of the first ads, and what is missing. In the thread."""
        model, ad_ids, behaviours = ranking.model, ranking.ad_ids, ranking.encoded.behaviours
        graph = self._graphs.get(model) or self._graphs.setdefault(model, _load(model.bundle))
        if isinstance(graph, str):
            return [], graph
        each = len(graph.names) + (behaviours if graph.attends else 0)
        some = ad_ids[: MOST_NUMBERS // max(each, 1)]
        try:
            whys = _whys(graph, _feeds(ranking.encoded, some), behaviours) if some else []
        except ScoringError as error:
            self._graphs[model] = notice = _failed(model.bundle, error)
            return [], notice
        left = f"the first {len(some)} of {len(ad_ids)} ads are explained, as each takes {each} numbers and {MOST_NUMBERS:,} are given"
        return whys, f"{left}; ask for fewer with top_k, or by several requests" if len(some) < len(ad_ids) else None


def _load(bundle: Bundle) -> ExplainGraph | str:
    if EXPLAIN_MODEL in bundle.files:
        try:
            return ExplainGraph(bundle.checked(EXPLAIN_MODEL))
        except (BundleError, ScoringError) as error:
            return _failed(bundle, error)
    what = f"model {bundle.name} version {bundle.version}"
    if "explains" in bundle.manifest:
        network = bundle.manifest.get("network")
        return f"{what} is a {network}, which has no attention over behaviours and no logit that fields add up to: nothing to explain"
    return f"{what} was published without explain.onnx; train it again to have ads explained"


def _failed(bundle: Bundle, error: Exception) -> str:
    """What a caller may know; the log has the rest, once for each version."""
    log.error("model %s version %d explains nothing: %s", bundle.name, bundle.version, error)
    return f"explain.onnx of model {bundle.name} version {bundle.version} cannot be used; the service's log says why"


def _feeds(encoded: Encoded, ad_ids: Sequence[str]) -> Feeds:
    places = {ad_id: row for row, ad_id in enumerate(encoded.request.candidates)}
    rows = [places[ad_id] for ad_id in ad_ids]
    return {name: tensor[:, rows] if name.startswith("ad_") else tensor for name, tensor in encoded.feeds.items()}


def _whys(graph: ExplainGraph, feeds: Feeds, behaviours: int) -> list[Why]:
    """What the graph says of each ad of one request."""
    outputs = graph.run(feeds)
    attention, contributions = outputs.get(ATTENTION), outputs.get(CONTRIBUTIONS)
    whys: list[Why] = [{} for _ in range(next(iter(outputs.values())).shape[1])]
    if attention is not None:
        for why, weights in zip(whys, _listed(attention[0, :, :behaviours]), strict=True):
            why["attention"] = weights
    if contributions is not None:
        for why, values in zip(whys, _listed(contributions[0]), strict=True):
            why["contributions"] = dict(zip(graph.names, values, strict=True))
    return whys


def _listed(numbers: Numbers) -> list[list[float]]:
    """The shortest decimals that are these float32."""
    lists: list[list[float]] = orjson.loads(orjson.dumps(np.ascontiguousarray(numbers), option=orjson.OPT_SERIALIZE_NUMPY))
    return lists
