"""The progress bar of long work, on standard error, so that what a command prints stays clean."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text


class DoneColumn(MofNCompleteColumn):
    """How much is done, of how much where that is known."""

    def render(self, task: Task) -> Text:
        """Nothing before anything is done of what nobody knows."""
        if task.total is not None:
            return super().render(task)
        return Text(f"{int(task.completed):,}" if task.completed else "", style="progress.download")


def progress_bar(quiet: bool = False) -> Progress:
    """A bar a task, with how much is done and the time it took; nothing at all where `quiet`."""
    columns = (TextColumn("{task.description}"), BarColumn(), DoneColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True, quiet=quiet))
