"""A GPU that does nothing, for CPU tensors: what a call takes on the host, on a machine without a GPU.

Everything above CUDA's driver is real: Triton's specialization of arguments, its cache, its compiler, the kernels that
it compiles for an H100, and its launcher in C. Only libcuda is ours (``idle_gpu.c``), and counts the launches.

Other than on a GPU: tensors are allocated by torch's allocator of the CPU, there is one device and one stream, and
tables of addresses are not copied from pinned memory.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastreg import random
from fastreg.ops import backend

CAPABILITY = (9, 0)
DEVICE = 1 << 20  # Triton keeps compiled kernels by the number of the device: a number that no GPU has


def _libcuda() -> Any:
    """The library, loaded: whoever asks for libcuda.so.1 from here on is given this one."""
    import triton.backends.nvidia as nvidia
    from triton import knobs
    from triton.runtime.build import compile_module_from_src

    source = Path(__file__).with_suffix(".c").read_text()
    include = str(Path(nvidia.__path__[0]) / "include")
    flags = ["-Wl,-soname,libcuda.so.1"]
    library = compile_module_from_src(source, "idle_gpu", include_dirs=[include], ccflags=flags)
    built = Path(library.__file__)
    link = built.with_name("libcuda.so.1")  # the name by which Triton's launcher is linked to it
    with contextlib.suppress(FileExistsError):
        link.symlink_to(built.name)
    knobs.nvidia.libcuda_path = str(built.parent)
    return library


class _Generator:
    """What ``random.stream`` asks of the generator of a GPU, with methods that do nothing else."""

    def __init__(self, seed: int):
        self._seed, self._offset = seed, 0

    def initial_seed(self) -> int:
        return self._seed

    def get_offset(self) -> int:
        return self._offset

    def set_offset(self, offset: int) -> None:
        self._offset = offset


def _driver() -> Any:
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        """Triton's own, which asks torch about devices and streams: here there is one of each."""

        def __init__(self):
            super().__init__()
            self.get_device_capability = lambda device=0: CAPABILITY
            self.get_current_device = lambda: DEVICE
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device=0: 0

        def get_active_torch_device(self):
            return torch.device("cpu")

    return Driver()


@contextlib.contextmanager
def attached() -> Iterator[Callable[[], int]]:
    """Within, CPU tensors go to the kernels, whose launches do nothing. Yields what tells how many there were so far.

    Kernels have to be compiled ones: TRITON_INTERPRET=0.
    """
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 interprets the kernels: there is nothing to launch")
    library, active = _libcuda(), triton.runtime.driver._active
    gpu, stream = torch.device("cuda", 0), random.stream
    generators = (_Generator(torch.initial_seed()),)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (random, "stream", lambda _, seed=None, generator=None: stream(gpu, seed, generator)),
            (torch.cuda, "default_generators", generators),
            (torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", bool),  # a function in C that says no
            (backend, "INTERPRETED", True),  # CPU tensors go to the kernels
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        triton.runtime.driver.set_active(_driver())
        stack.callback(setattr, triton.runtime.driver, "_active", active)
        yield library.launches
