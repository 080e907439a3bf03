"""The folder of a run: a checkpoint while it trains, its results when it is done."""

import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from fastreg.training.errors import InputError
from fastreg.training.settings import Settings


class RunFolder:
    """Reads and writes the files of one run. Every file is replaced as a whole, or not at all.

    ``checkpoint.pt`` is there from the first epoch to the last, ``metrics.json`` and the picture from then on,
    and ``weights-<setting>-seed<seed>.pt`` as soon as that network is trained.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.metrics = path / "metrics.json"
        self.learning_curves = path / "learning_curves.png"
        self.study = path / "study.png"

    def check_usable(self) -> None:
        """Raises InputError where files cannot be written here. Leaves nothing behind."""
        try:
            existing = next(
                folder for folder in (self.path, *self.path.absolute().parents) if folder.exists()
            )
            if not existing.is_dir():
                raise InputError(f"cannot write to {self.path}: {existing} is not a folder")
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror}") from error

    def read_metrics(self, settings: Settings) -> dict | None:
        """The results of a finished run, or None. Raises InputError where they belong to other settings."""
        if not self.metrics.exists():
            return None
        try:
            metrics = json.loads(self.metrics.read_text())
            made_with = metrics["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.metrics} cannot be read; --restart replaces it ({error!r})") from error
        self._check_same(made_with, settings)
        return metrics

    def read_checkpoint(self, settings: Settings) -> dict | None:
        """The state of an interrupted run, or None. Raises InputError where it belongs to other settings."""
        if not self.checkpoint.exists():
            return None
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            made_with = state["settings"]
        except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"{self.checkpoint} cannot be read; --restart replaces it") from error
        self._check_same(made_with, settings)
        return state

    def _check_same(self, made_with: dict, settings: Settings) -> None:
        wanted = settings.as_json()
        differing = [name for name in wanted if made_with.get(name) != wanted[name]]
        if differing:
            changes = ", ".join(
                f"{name} {_shown(made_with.get(name))} instead of {_shown(wanted[name])}"
                for name in differing
            )
            advice = "choose another --out, or --restart to replace it"
            raise InputError(f"the run in {self.path} was made with {changes}: {advice}")

    def clear(self) -> None:
        """Delete the files of an earlier run, and only these."""
        files = (self.checkpoint, self.metrics, self.learning_curves, self.study)
        for file in (*files, *self.path.glob("weights-*-seed*.pt")):
            file.unlink(missing_ok=True)

    def write_checkpoint(self, state: dict) -> None:
        replace(self.checkpoint, lambda file: torch.save(state, file))

    def write_weights(self, name: str, weights: dict) -> None:
        """``weights`` is the ``state_dict`` of the trial ``name``; the file can be loaded without a GPU."""
        weights = {name: tensor.cpu() for name, tensor in weights.items()}
        name = name.replace(", ", "-").replace(" ", "")
        replace(self.path / f"weights-{name}.pt", lambda file: torch.save(weights, file))

    def write_results(self, metrics: dict, picture: Path, draw: Callable) -> None:
        """Write what stays: the picture first, since ``metrics.json`` says that the run is finished."""
        replace(picture, draw)
        text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
        replace(self.metrics, lambda file: file.write(text.encode()))
        self.checkpoint.unlink(missing_ok=True)


def replace(path: Path, write: Callable) -> None:
    """Let ``write(file)`` write a temporary file, and put it in the place of ``path`` once it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _shown(value) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
