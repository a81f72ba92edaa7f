"""The report of a training as files of its bundle: `report.html` for people, and in `report.json` the numbers that it is made of."""

import json
from collections.abc import Mapping
from typing import Any

from rich.progress import Progress

from ..datasets.prepared import Prepared
from ..train import Trained
from .numbers import findings

PAGE, NUMBERS = "report.html", "report.json"
KEPT = ("epochs", "best", "reliability", "heads", "examination", "segments", "users", "importance")
"""Of the numbers, those that others may want to draw: nothing of single rows."""


def report_files(data: Prepared, trained: Trained, reference: Mapping[str, Any], progress: Progress) -> dict[str, bytes]:
    """Both files; none where the settings say so, or where they cannot be made, for which no training is given up."""
    if not trained.settings["report"]:
        return {}
    task = progress.add_task("drawing the report", total=1)
    try:
        from .page import page  # noqa: PLC0415  # matplotlib takes a second to import

        found = findings(data, trained, reference, progress)
        return {PAGE: page(found).encode(), NUMBERS: json.dumps({name: found[name] for name in KEPT}, allow_nan=False).encode()}
    except Exception as error:  # noqa: BLE001  # whatever it is, the training is published without it
        progress.console.print(
            f"there is no {PAGE}, since it cannot be made: {error!r}; all else is published", markup=False, soft_wrap=True
        )
        return {}
    finally:
        progress.update(task, completed=1)
