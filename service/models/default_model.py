"""Which model ranks the requests that name none: the one that is set, or the only one that there is. Never one by the order of names.

A model that is published beside the only one does not take its place: the first stays until the service ends, and a start with several
and none set is refused. Workers of one service agree on it, and one that is replaced goes on with it, by a file in the run's folder.
"""

import contextlib
import logging
from collections.abc import Collection
from pathlib import Path

from features.repository import ambiguous

FILE = "default-model"

log = logging.getLogger(__name__)


class DefaultModel:
    """The choice of one process."""

    def __init__(self, chosen: str | None, folder: Path | None) -> None:
        """The setting, and the folder that the workers of a service share, None where there is only one."""
        self._set, self._file = chosen is not None, folder / FILE if folder else None
        self.name: str | None = chosen
        self.notice: str | None = None
        """What is to be set before the next start."""
        self.unclear: str | None = None
        """Why there is none, where several models are live."""

    def saw(self, live: Collection[str], loaded: Collection[str]) -> None:
        """The repository has these models now, and these are loaded."""
        if self._set:
            return
        if self.name is not None and self.name not in live and self.name not in loaded:  # it never came to be, and is gone
            self._forget()
        if self.name is None:
            self.name = self._of_others() or (self._settle(next(iter(live))) if len(live) == 1 else None)
        self.unclear = ambiguous(live) if self.name is None else None
        others = sorted({*live} - {self.name})
        self._tell(f"{', '.join(others)} and {self.name} are live, and ADRANK_MODEL is not set" if self.name and others else None)

    def _tell(self, several: str | None) -> None:
        stays = f"requests that name no model stay with {self.name}; set it, the next start is refused without"
        notice = f"{several}: {stays}" if several else None
        if notice and notice != self.notice:
            log.warning("%s", notice)
        self.notice = notice

    def _of_others(self) -> str | None:
        """What another worker has settled on."""
        if self._file:
            with contextlib.suppress(OSError):
                return self._file.read_text("ascii") or None
        return None

    def _settle(self, name: str) -> str:
        """That name, unless another worker was faster."""
        if self._file:
            try:
                with self._file.open("x") as file:
                    file.write(name)
            except FileExistsError:
                return self._of_others() or name
            except OSError as error:  # whoever takes this worker's place chooses anew
                log.warning("the default model cannot be noted for other workers: %s", error)
        log.info("requests that name no model are ranked with %s, the only one that is live", name)
        return name

    def _forget(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):
                self._file.unlink()
        self.name = None
