"""``metrics.json``: what a run was, what it ran on, and what came out."""

import platform
import statistics
from importlib.metadata import PackageNotFoundError, version

import torch

import fastreg
from fastreg.training.data import Dataset
from fastreg.training.settings import Settings
from fastreg.training.workers import Workers

SELECTION = "the weights of the epoch with the lowest validation error (the first of equals)"


def metrics_of(settings: Settings, dataset: Dataset, workers: Workers, trials: list[dict]) -> dict:
    """The content of ``metrics.json``, of JSON types only.

    Args:
        settings, dataset, workers: of the run.
        trials: the results of ``loop.Trial``, in the order of ``settings.trials()``.

    Returns:
        What the keys say. The summary of a study has a summary as of a comparison for each of its values.
    """
    owners = [comparison for comparison, _, _ in settings.trials().values()]
    summaries = {
        value: summarize(
            comparison, [trial for owner, trial in zip(owners, trials, strict=True) if owner == comparison]
        )
        for value, comparison in settings.comparisons().items()
    }
    return {
        "settings": settings.as_json(),
        "data": {
            "name": dataset.name,
            "source": dataset.source,
            "sha256": dataset.sha256(),
            "image_shape": list(dataset.image_shape),
            "classes": dataset.classes,
            "own_test_set": dataset.test_labels is not None,
        },
        "versions": {
            "fastreg": fastreg.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "numpy", "scikit-learn", "mlxtend")},
        },
        "machine": {
            "platform": platform.platform(),
            "device": _device_name(workers.device),
            "processes": workers.count,
            "threads": torch.get_num_threads(),
        },
        "units": {"errors": "percent", "losses": "nats", "seconds": "training time of one epoch"},
        "selection": SELECTION,
        "summary": summaries if settings.study else summaries[""],
        "trials": trials,
    }


def summarize(settings: Settings, trials: list[dict]) -> dict[str, dict]:
    """For every setting, mean and standard deviation over the seeds (None for one seed) of each figure.

    Errors in percent, at the selected epoch; ``seconds`` is the median training time of an epoch. Settings
    after the first have ``test_error_difference`` too, in points against the first with the same seed.
    """
    summary = {}
    baseline = [trial for trial in trials if trial["setting"] == settings.compare[0]]
    for setting in settings.compare:
        mine = [trial for trial in trials if trial["setting"] == setting]
        figures = {
            part: [trial["best"][part] for trial in mine]
            for part in ("train_error", "validation_error", "test_error", "epoch")
        }
        if setting != settings.compare[0]:
            figures["test_error_difference"] = [
                trial["best"]["test_error"] - first["best"]["test_error"]
                for trial, first in zip(mine, baseline, strict=True)
            ]
        summary[setting] = {
            name: {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "values": values,
            }
            for name, values in figures.items()
        }
        summary[setting]["seconds"] = statistics.median(
            record["seconds"] for trial in mine for record in trial["history"]
        )
    return summary


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"
