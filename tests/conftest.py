"""The kernels run natively where there is a GPU, and through Triton's interpreter on the CPU where there is none."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported: before fastreg is

from fastreg.ops import backend as _backend


@pytest.fixture
def device() -> torch.device:
    """Where tensors live whose operations run on the kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def aten(monkeypatch) -> None:
    """CPU tensors take ATen, as they do for users, and not the interpreter."""
    monkeypatch.setattr(_backend, "INTERPRETED", False)


@pytest.fixture(params=["kernels", "aten"])
def path(request, monkeypatch) -> str:
    """Runs a test on both backends: the kernels and the ATen definition."""
    if request.param == "aten":
        monkeypatch.setattr(_backend, "runs_kernels", lambda x: False)
    elif not _backend.HAS_TRITON:
        pytest.skip("needs Triton")
    return request.param


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
