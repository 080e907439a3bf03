"""What a run shows: bars on a terminal, plain lines elsewhere, a table in the end."""

import sys
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastreg.training.settings import Settings


class Bars(Progress):
    """A bar for each setting and one for the whole run, in epochs; below them a line of text."""

    below = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.below, overflow="ellipsis", no_wrap=True)


class Display:
    """Shows the progress of a run while it is entered as a context, and its results.

    Args:
        settings: of the run.
        quiet: show nothing, as all workers but the first.
    """

    def __init__(self, settings: Settings, quiet: bool = False):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # an ASCII terminal gets a ? for ±, not an error
        self.settings = settings
        self.console = Console(quiet=quiet, highlight=False)
        self.bars = Bars(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=quiet or not self.console.is_interactive,
            expand=True,
        )
        epochs = settings.epochs * settings.seeds * len(settings.comparisons())
        self.tasks = {
            setting: self.bars.add_task(setting, total=epochs, start=False, state="")
            for setting in settings.compare
        }
        self.run = self.bars.add_task("all", total=epochs * len(settings.compare), state="")

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        self.bars.stop()

    def line(self, text: str) -> None:
        """A line of text, which only a terminal has to wrap."""
        self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def begin(self, name: str, setting: str, epochs: int) -> None:
        """The trial ``name`` begins, or goes on, after ``epochs`` epochs of all trials of its ``setting``."""
        self.trial, self.task, self.epochs = name, self.tasks[setting], epochs
        self.bars.start_task(self.task)
        self.step(0)

    def step(self, share: float) -> None:
        """A step of the trial is taken, behind which is this share of the epoch."""
        self.bars.update(self.task, completed=self.epochs + share)
        self.bars.update(
            self.run, completed=sum(self.bars.tasks[task].completed for task in self.tasks.values())
        )

    def epoch(self, record: dict) -> None:
        """An epoch of the trial is finished; ``record`` is what ``Trial.run_epoch`` returned."""
        loss, error = record["step_loss"], record["validation_error"]
        epoch = f"epoch {record['epoch']}/{self.settings.epochs}"
        text = f"{self.trial}, {epoch}: loss {loss:.4f}, validation error {error:.2f} %"
        if self.bars.disable:
            self.line(f"{text}, {record['seconds']:.2f} s")
            return
        self.bars.below = text
        self.epochs += 1
        self.bars.update(self.task, state=f"{error:5.2f} %")

    def results(self, metrics: dict) -> None:
        """The table of a finished run, and by how much each setting differs from the first."""
        table = self._study_table(metrics) if self.settings.study else self._comparison_table(metrics)
        self.console.print()
        self.console.print(table)
        seeds = self.settings.seeds
        self.line(f"Errors are those of {metrics['selection']}.")
        if seeds > 1:
            self.line(f"Mean ± standard deviation over {seeds} seeds, each with its own split and weights.")
        if self.settings.study:
            return
        for setting, figures in metrics["summary"].items():
            if "test_error_difference" in figures:
                self.line(_comparison(setting, self.settings.compare[0], figures["test_error_difference"]))

    def _comparison_table(self, metrics: dict) -> Table:
        table = self._new_table(metrics, "error in %")
        for column in ("training", "validation", "test", "time/epoch"):
            table.add_column(column, justify="right")
        for setting, figures in metrics["summary"].items():
            table.add_row(
                Text(setting),
                _figure(figures["train_error"]),
                _figure(figures["validation_error"]),
                Text(_figure(figures["test_error"]), style="bold"),
                f"{figures['seconds']:.2f} s",
            )
        return table

    def _study_table(self, metrics: dict) -> Table:
        """A row for each setting, a column for each value of the study."""
        table = self._new_table(
            metrics, f"test error in % by {(self.settings.study or '').replace('-', ' ')}"
        )
        for value in metrics["summary"]:
            table.add_column(value, justify="right")
        for setting in self.settings.compare:
            errors = [summary[setting]["test_error"] for summary in metrics["summary"].values()]
            # On two lines each, six figures with their spread fit a terminal of 80 columns.
            table.add_row(Text(setting), *(_figure(error).replace(" ±", "\n±") for error in errors))
        return table

    def _new_table(self, metrics: dict, what: str) -> Table:
        title = f"{metrics['data']['name']}, {self.settings.model}: {what}"
        return Table("setting", title=title, title_style="bold")


def _figure(values: dict) -> str:
    if values["std"] is None:
        return f"{values['mean']:.2f}"
    return f"{values['mean']:.2f} ± {values['std']:.2f}"


def _comparison(setting: str, baseline: str, difference: dict) -> str:
    """In words, whichever way it went."""
    points, values = difference["mean"], difference["values"]
    if abs(points) < 0.005:
        return f"{setting} has the same test error as {baseline}."
    lower = points < 0
    agreeing = sum((value < 0) == lower and value != 0 for value in values)
    way = "lower" if lower else "higher"
    seeds = f", and {way} with {agreeing} of {len(values)} seeds" if len(values) > 1 else ""
    return f"{setting}: test error {abs(points):.2f} points {way} than {baseline}{seeds}."
