"""How far the reading or writing of a data set is, as a bar on a terminal."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["progress_bar"]

quiet = False  # `fit --quiet`: a data set is read far below where that is known


def progress_bar(description: str, total: int) -> Progress:
    """A bar of one task with rate and time left, on standard error; none without a terminal, or when quiet."""
    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
    text = TextColumn("{task.description}", markup=False)
    bar = Progress(text, *columns, console=console, disable=quiet or not console.is_terminal)
    bar.add_task(description, total=total)
    return bar


class _Rate(ProgressColumn):
    """Units a second; empty until they are known."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")
