"""Runs of `fastreg train` in this process, for its tests."""

import gzip

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")
import typer

from fastreg.training.command import train
from fastreg.training.settings import Settings
from fastreg.training.workers import Workers

ALONE = Workers(rank=0, count=1, device=torch.device("cpu"))

APP = typer.Typer(add_completion=False)
APP.command()(train)


# Data ----------------------------------------------------------------------------------------------------


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (60, 5, 4), dtype=np.uint8)
LABELS = np.arange(60, dtype=np.uint8) % 3


def write_idx_folder(folder, *, separator="-", ending="", parts=("train", "t10k")):
    folder.mkdir(exist_ok=True)
    pack = gzip.compress if ending else bytes
    for part in parts:
        count = 60 if part == "train" else 12
        (folder / f"{part}-images{separator}idx3-ubyte{ending}").write_bytes(pack(idx_bytes(IMAGES[:count])))
        (folder / f"{part}-labels{separator}idx1-ubyte{ending}").write_bytes(pack(idx_bytes(LABELS[:count])))
    return folder


# Settings, models and regularizers -----------------------------------------------------------------------


def quick_settings(**changes):
    return Settings(**{"data": "digits", "epochs": 2, "seeds": 1, **changes})
