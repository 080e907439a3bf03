"""Runs each file of ``tests/gpu_host`` in a process whose kernels are compiled: see ``gpu_host/conftest.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastreg.ops import backend

FILES = sorted((Path(__file__).parent / "gpu_host").glob("test_*.py"))
LONG = ("test_bench_cases.py", "test_machine.py", "test_sizes.py")  # a minute each; CI runs them apart


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which need not be pretended")
@pytest.mark.skipif(not backend.INTERPRETED, reason="the files run in this process, or there is no Triton")
@pytest.mark.parametrize(
    "file",
    [
        pytest.param(
            file,
            id=file.stem.removeprefix("test_"),
            marks=[pytest.mark.slow] if file.name in LONG else [],
        )
        for file in FILES
    ],
)
def test_host_code_of_cuda_tensors(file, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
