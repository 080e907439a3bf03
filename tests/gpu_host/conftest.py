"""Host code as CUDA tensors reach it, on a pretended GPU (``tests/pretended_gpu.py``).

    TRITON_INTERPRET=0 pytest tests/gpu_host

Triton decides when kernels are defined whether they are compiled or interpreted, so these need a process of their own;
where kernels are interpreted, ``tests/test_gpu_host.py`` starts it.
"""

import pytest
import torch

from fastreg.ops import backend

collect_ignore_glob = ["test_*"] if backend.INTERPRETED or not backend.HAS_TRITON else []


def pytest_collection_modifyitems(items) -> None:
    if torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip("there is a GPU, which need not be pretended"))
