"""The picture of a run: how error and loss went from epoch to epoch, or the test error over a study."""

from typing import BinaryIO

import numpy as np

#: Okabe and Ito's colours, which the colour-blind can tell apart, the most different ones first; and marks beside them.
COLOURS = ("#D55E00", "#0072B2", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKS = ("o", "s", "^", "D", "v", "P", "X")


def draw_learning_curves(metrics: dict, file: BinaryIO) -> None:
    """Write learning curves as PNG: error beside loss, a colour for each setting, mean and range over seeds.

    Args:
        metrics: the content of ``metrics.json``.
        file: open for writing bytes.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    settings = metrics["settings"]
    figure = _new_figure(metrics, width=11)
    figure.get_layout_engine().set(wspace=0.06)
    panels = figure.subplots(1, 2)
    for panel, what, label in zip(
        panels, ("error", "loss"), ("error (%)", "cross-entropy (nats)"), strict=True
    ):
        for number, setting in enumerate(settings["compare"]):
            look = _look(number)
            histories = [trial["history"] for trial in metrics["trials"] if trial["setting"] == setting]
            for part, style in (("train", "--"), ("validation", "-")):
                curves = np.array([[record[f"{part}_{what}"] for record in history] for history in histories])
                epochs = np.arange(1, curves.shape[1] + 1)
                # A few marks on each curve, on no two curves at the same epochs.
                marks = (number % 4 * len(epochs) // 20, max(1, len(epochs) // 5))
                panel.plot(epochs, curves.mean(0), style, **look, markevery=marks, linewidth=1.6)
                if len(curves) > 1:
                    panel.fill_between(
                        epochs, curves.min(0), curves.max(0), color=look["color"], alpha=0.1, lw=0
                    )
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0, top=_top(metrics["trials"], what))
        panel.set_xlim(left=min(1, settings["epochs"] - 1), right=settings["epochs"])
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tidy(panel)

    handles = [
        Line2D([], [], **_look(number), linewidth=2, label=setting)
        for number, setting in enumerate(settings["compare"])
    ]
    handles += [
        Line2D([], [], color="0.35", linestyle="--", label="training"),
        Line2D([], [], color="0.35", linestyle="-", label="validation"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(file, format="png")


def draw_study(metrics: dict, file: BinaryIO) -> None:
    """Write test error against the values of the study as PNG: a line a setting, mean and range over seeds.

    Args:
        metrics: the content of ``metrics.json``.
        file: open for writing bytes.
    """
    settings = metrics["settings"]
    values = [float(value) for value in metrics["summary"]]
    figure = _new_figure(metrics, width=7)
    panel = figure.subplots()
    for number, setting in enumerate(settings["compare"]):
        errors = np.array(
            [summary[setting]["test_error"]["values"] for summary in metrics["summary"].values()]
        )
        look = _look(number)
        panel.plot(values, errors.mean(1), **look, linewidth=1.6, label=setting)
        if settings["seeds"] > 1:
            panel.fill_between(values, errors.min(1), errors.max(1), color=look["color"], alpha=0.1, lw=0)
    panel.set_xscale("log", base=2)
    panel.set_xticks(values, metrics["summary"].keys())
    panel.set_xlabel(settings["study"].replace("-", " "))
    panel.set_ylabel("test error (%)")
    panel.set_ylim(bottom=0)
    _tidy(panel)
    figure.legend(loc="outside lower center", ncols=len(settings["compare"]), frameon=False)
    figure.savefig(file, format="png")


def _look(number: int) -> dict:
    """Colour and mark of the setting with this number."""
    mark = {"marker": MARKS[number % len(MARKS)], "markersize": 5.5, "markeredgecolor": "white"}
    return {"color": COLOURS[number % len(COLOURS)], **mark}


def _new_figure(metrics: dict, width: float):
    """An empty figure under a title that says what was trained, and with how many seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    settings, seeds = metrics["settings"], metrics["settings"]["seeds"]
    figure.suptitle(
        f"{metrics['data']['name']}, {settings['model']}: "
        + (f"mean and range over {seeds} seeds" if seeds > 1 else f"seed {settings['seed']}"),
        fontsize=12,
    )
    return figure


def _tidy(panel) -> None:
    panel.grid(color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _top(trials: list[dict], what: str) -> float:
    """The upper end of the axis: the first epoch, often far above the rest, may leave the picture."""
    values = [
        record[f"{part}_{what}"]
        for trial in trials
        for record in trial["history"][1:] or trial["history"]
        for part in ("train", "validation")
    ]
    return 1.05 * max(max(values), 1e-9)
