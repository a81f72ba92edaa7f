"""Which models a repository has: `models/<name>/current` names the live version. Imports nothing, for a process that only starts others."""

import os
import re
from collections.abc import Collection
from pathlib import Path

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
CURRENT = "current"


def model_names(models: Path) -> list[str]:
    """Names in the repository that have a live version, sorted; none where it is not there or cannot be read."""
    try:
        homes = sorted(models.iterdir())
    except OSError:
        return []
    return [home.name for home in homes if NAME.fullmatch(home.name) and is_live(home)]


def is_live(home: Path) -> bool:
    """Whether a model has a live version, or may have: what cannot be looked into is not taken for absent."""
    try:
        os.lstat(home / CURRENT)
    except (FileNotFoundError, NotADirectoryError):
        return os.path.lexists(home) and not home.exists()  # a link to what is not there now
    except OSError:
        pass
    return True


def ambiguous(names: Collection[str]) -> str | None:
    """Why requests that name no model cannot be ranked with any of these, None where there is but one."""
    if len(names) < 2:
        return None
    listed = ", ".join(sorted(names))
    return f"{len(names)} models are live ({listed}), and which one is for requests that name none is not set; set ADRANK_MODEL, or --model"
