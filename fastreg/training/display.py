"""What a run shows: bars on a terminal, plain lines elsewhere, a table in the end."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastreg.training.settings import Settings


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
        self.bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=quiet or not self.console.is_interactive,
        )
        total = settings.epochs * settings.seeds * len(settings.comparisons())
        self.tasks = {
            setting: self.bars.add_task(setting, total=total, start=False, state="")
            for setting in settings.compare
        }

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        self.bars.stop()

    def line(self, text: str) -> None:
        """One line of text, unwrapped."""
        self.console.print(text, markup=False, soft_wrap=True)

    def begin(self, setting: str, epochs: int) -> None:
        """A trial of ``setting`` begins, or goes on, after ``epochs`` epochs of all its trials."""
        self.bars.start_task(self.tasks[setting])
        self.bars.update(self.tasks[setting], completed=epochs)

    def epoch(self, name: str, setting: str, record: dict) -> None:
        """An epoch of the trial ``name`` is finished; ``record`` is what ``Trial.run_epoch`` returned."""
        loss, error = record["step_loss"], record["validation_error"]
        epoch = f"epoch {record['epoch']}/{self.settings.epochs}"
        if self.bars.disable:
            seconds = record["seconds"]
            self.line(f"{name}, {epoch}: loss {loss:.4f}, validation error {error:.2f} %, {seconds:.2f} s")
        else:
            where = name.removeprefix(f"{setting}, ")
            state = f"{where}, {epoch}  loss {loss:.4f}  validation error {error:5.2f} %"
            self.bars.update(self.tasks[setting], advance=1, state=state)

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
        table = self._new_table(metrics, f"test error in % by {self.settings.study.replace('-', ' ')}")
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
