"""The report of a training as files of its bundle: `report.html` for people, and in `report.json` the numbers that it is made of."""

import html
import json
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from rich.progress import Progress

from ..datasets.prepared import Prepared
from ..train import Trained
from .numbers import findings

PAGE, NUMBERS = "report.html", "report.json"
PLACE = b"<!-- verdict -->"
"""Where the page has room for what became of the training, which is known after it has been drawn."""
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


def tell_verdict(files: MutableMapping[str, Any], verdict: str, accepted: bool, reasons: Sequence[str] = ()) -> None:
    """Say at the top of the page, if it is among a bundle's files, what became of the training, and the reasons, a sentence each."""
    told = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
    kind = "verdict" if accepted else "verdict no"
    section = f'<section class="{kind}"><h2>{html.escape(verdict)}</h2>{f"<ul>{told}</ul>" if told else ""}</section>'
    if PAGE in files:
        files[PAGE] = files[PAGE].replace(PLACE, section.encode(), 1)
