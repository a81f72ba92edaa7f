"""What a check has found, and how findings are told: as lines for people, as JSON, and as one exit code."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import click

Area = Literal["settings", "store", "models", "provider", "resources", "clock", "port"]
Status = Literal["ok", "warning", "problem", "skipped"]
CODES: Mapping[Area, int] = {"settings": 2, "store": 10, "models": 11, "provider": 12, "resources": 13, "clock": 14, "port": 15}
"""The exit code that an area's problem gives; the first one in this order is it."""
COLOURS: Mapping[Status, str] = {"ok": "green", "warning": "yellow", "problem": "red", "skipped": "bright_black"}
NARROWEST = 40


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has found: a sentence, and what to do where there is something to do."""

    area: Area
    check: str
    status: Status
    said: str
    fix: str = ""


def exit_code(findings: Sequence[Finding]) -> int:
    """0 without a problem, else the code of the first area that has one."""
    areas = {finding.area for finding in findings if finding.status == "problem"}
    return next((code for area, code in CODES.items() if area in areas), 0)


def as_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """As plain values, with the exit code."""
    return {"exit_code": exit_code(findings), "findings": [asdict(finding) for finding in findings]}


def table(findings: Sequence[Finding], width: int | None = None) -> str:
    """Aligned lines, the status in colour, and a last line that counts. `click.echo` takes the colours out where nobody sees them."""
    first = max((len(finding.area) for finding in findings), default=0)
    second = max((len(finding.check) for finding in findings), default=0)
    indent = first + second + len("problem") + 6
    room = max(NARROWEST, (width or shutil.get_terminal_size((110, 24)).columns) - indent)
    lines = []
    for finding in findings:
        text = f"{finding.said}. {_sentence(finding.fix)}" if finding.fix else finding.said
        wrapped = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
        status = click.style(f"{finding.status:<7}", COLOURS[finding.status])
        lines.append(f"{finding.area:<{first}}  {finding.check:<{second}}  {status}  {wrapped[0]}")
        lines += [" " * indent + more for more in wrapped[1:]]
    return "\n".join([*lines, "", _sum(findings)])


def _sum(findings: Sequence[Finding]) -> str:
    counts = {status: sum(finding.status == status for finding in findings) for status in COLOURS}
    counted = [f"{counts['ok']} ok"]
    counted += [f"{counts['warning']} warning(s)"] if counts["warning"] else []
    counted += [f"{counts['problem']} problem(s)"] if counts["problem"] else []
    counted += [f"{counts['skipped']} skipped"] if counts["skipped"] else []
    return ", ".join(counted)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "." * (not text.endswith("?"))
