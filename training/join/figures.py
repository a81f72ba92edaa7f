"""What the joiner tells the console: its figures over time, as JSON in one bounded key of the store, which the service reads.

They are no metrics: those are scraped, and have alerts. A joiner that begins goes on with what the one before it has told.
"""

import json
import logging
import time
from math import isfinite
from typing import Any

from features.state import StoreError
from features.streams import FIGURES_BYTES, Streams

from .quality import Quality
from .summary import JoinSummary

KEPT, MODELS, FIELDS = 240, 10, 20
"""Figures that are kept, and of each the models, the newest first, and of a model the fields, the most drifted first."""

log = logging.getLogger(__name__)


class Figures:
    """Adds what is known now to what has been told."""

    def __init__(self, streams: Streams, summary: JoinSummary) -> None:
        self._streams, self._summary = streams, summary
        self._told: list[dict[str, Any]] | None = None

    async def tell(self) -> None:
        """Write the figures; where the store does not take them, the next time does."""
        try:
            if self._told is None:
                self._told = figures_in(await self._streams.figures())
            self._told.append(self._now())
            await self._streams.tell(thinned(self._told))
        except StoreError as error:
            log.warning("the console is not told of the joiner's figures: %s", error)

    def _now(self) -> dict[str, Any]:
        newest = list(self._summary.quality.items())[-MODELS:]
        counts = {name: dict(counts) for name, counts in self._summary.counts.items()}
        return {"ts": round(time.time()), "since": self._summary.since, "models": {name: _told(each) for name, each in newest}, **counts}


def figures_in(text: bytes) -> list[dict[str, Any]]:
    """Figures as they were told, the oldest first; none where that is not what stands there."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def thinned(told: list[dict[str, Any]]) -> bytes:
    """As JSON; where they are too many, or too large, the older half loses every second one, so that what is old is told more coarsely."""
    while len(told) > KEPT or len(text := json.dumps(told, separators=(",", ":")).encode()) > FIGURES_BYTES:
        del told[1 : max(2, len(told) // 2) : 2]
    return text


def _told(quality: Quality) -> dict[str, Any]:
    drifted = sorted(quality.drift.items(), key=lambda item: -item[1])[:FIELDS]
    ratios = {"calibration": quality.calibration, "normalised_entropy": quality.normalised_entropy}
    return {**_rounded(ratios), "places": _rounded(quality.by_place), "drift": _rounded(dict(drifted))}


def _rounded(values: Any) -> dict[str, float | None]:
    return {name: round(value, 5) if isfinite(value) else None for name, value in values.items()}
