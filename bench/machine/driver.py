"""A Triton driver whose GPU is this machine.

``kernel[grid](...)`` on CPU tensors goes through Triton's specialization, cache and compiler as for a GPU, as far as
PTX. Only the launch is ours: it executes that.
"""

import gc
import itertools
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from .counters import Counters
from .execute import Launch, Options, Program
from .memory import Region
from .parse import Unknown

_PACKED = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp16": "e", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
TABLES = ("entries_ptr",)  # arguments whose numbers are addresses


class Launched(NamedTuple):
    """What ran."""

    name: str
    variant: str  # a name of its code
    grid: tuple[int, int, int]
    threads: int
    counters: Counters
    touched: tuple[int, int] | None  # different bytes read, and written


@dataclass
class Machine:
    """The GPU that is not there."""

    cc: int
    options: Options = field(default_factory=Options)
    launched: list[Launched] = field(default_factory=list)
    keeps: bool = False  # launched
    launches: int = 0
    programs: dict[str, Program] = field(default_factory=dict)
    ran: set[Program] = field(default_factory=set)
    detach: Callable[[], None] = lambda: None

    def run(
        self,
        name: str,
        ptx: str,
        grid: tuple,
        threads: int,
        parameters: list[bytes],
        tensors: list,
        shared: int,
    ) -> None:
        self.launches += 1
        program = self.programs.get(ptx)
        if program is None:
            program = self.programs[ptx] = Program(ptx)
        self.ran.add(program)
        regions = [Region(*extent(x), label) for label, x in tensors]
        launch = Launch(program, grid, threads, parameters, regions, shared, self.options, _freed())
        launch.run()
        if self.keeps:
            ordered = self.options.ordered
            touched = launch.memory.touched() if ordered else None
            self.launched.append(Launched(name, f"{hash(ptx):x}", grid, threads, launch.counters, touched))


def extent(x: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one behind its last."""
    if not x.numel():
        return x.data_ptr(), x.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


# -----------------------------------------------------------------------------------------------------------
# Tensors that tables of addresses point to


class _Seen(NamedTuple):
    tensor: weakref.ref
    region: Region


_seen: dict[int, _Seen] = {}  # by address


def _pointed_at(table: torch.Tensor) -> Iterator[torch.Tensor]:
    """The live tensors that begin where the numbers of a table say."""
    wanted = {number for number in table.flatten().tolist() if number >= 1 << 32}
    alive = {at: seen.tensor() for at, seen in _seen.items() if at in wanted}
    missing = {
        at
        for at in wanted
        if (x := alive.get(at)) is None or x.data_ptr() != at or extent(x) != _seen[at].region[:2]
    }
    for x in _all_tensors() if missing else ():
        if (at := x.data_ptr()) in missing and (
            at not in alive or alive[at] is None or x.nbytes > alive[at].nbytes
        ):
            alive[at] = x
            _seen[at] = _Seen(weakref.ref(x), Region(*extent(x), f"a tensor {tuple(x.shape)} of {x.dtype}"))
    return (x for x in alive.values() if x is not None)


def _all_tensors() -> Iterator[torch.Tensor]:
    for x in gc.get_objects():
        if (
            type(x) in (torch.Tensor, torch.nn.Parameter)
            and x.device.type == "cpu"
            and x.layout == torch.strided
        ):
            yield x


def _freed() -> list[Region]:
    return [seen.region for seen in _seen.values() if seen.tensor() is None]


# -----------------------------------------------------------------------------------------------------------
# Triton's side


class _ToPtx(CUDABackend):
    """Triton's compiler without its last stage: what it calls the cubin is the PTX."""

    def make_cubin(self, src, metadata, opt, capability):
        return src.encode()

    def hash(self):
        return f"executed-{super().hash()}"


def _runtime(
    kinds: Iterable[Any], names: Iterable[str], values: Iterable[Any]
) -> Iterator[tuple[str, str, Any]]:
    """Type, name and value of each argument that is no constant; those of a tuple one after another."""
    for kind, name, value in zip(kinds, names, values, strict=True):
        if isinstance(kind, tuple):
            fields = getattr(kind, "_fields", range(len(kind)))
            yield from _runtime(kind, [f"{name}.{field}" for field in fields], value)
        elif kind != "constexpr":
            yield kind, name, value


def _launcher(machine: Machine, source: Any, metadata: Any) -> Callable[..., None]:
    """What Triton calls for each launch of one variant."""
    if metadata.num_ctas != 1 or getattr(metadata, "tensordesc_meta", None) or metadata.global_scratch_size:
        raise Unknown(f"{metadata.name}: clusters, tensor descriptors and scratch memory")

    def launch(x, y, z, stream, function, metadata_, launch_metadata, enter, leave, *arguments):
        if x * y * z == 0:
            return
        parameters, tensors = [], []
        for kind, name, value in _runtime(source.signature.values(), source.signature, arguments):
            if not kind.startswith("*"):
                parameters.append(packed(kind, value))
                continue
            parameters.append(struct.pack("<Q", 0 if value is None else value.data_ptr()))
            if value is not None:
                tensors.append((name, value))
            if name in TABLES:
                tensors += [(f"{name} -> {tuple(t.shape)} {t.dtype}", t) for t in _pointed_at(value)]
        parameters += [struct.pack("<Q", 0)] * 2  # Triton's scratch memory, of which there is none
        machine.run(
            metadata.name, function, (x, y, z), 32 * metadata.num_warps, parameters, tensors, metadata.shared
        )

    return launch


def packed(kind: str, value: Any) -> bytes:
    """An argument as the kernel reads it."""
    if kind not in _PACKED:
        raise Unknown(f"an argument of type {kind}")
    code = _PACKED[kind]
    return struct.pack(f"<{code}", float(value) if code in "efd" else int(value))


_devices = itertools.count()


PROPERTIES = {
    "max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32,
}  # fmt: skip


class Driver(DriverBase):
    """What Triton asks about a GPU that is not there.

    launcher: of a source and its metadata, what Triton calls for each launch. load: of a kernel's name and its code,
    the function that is launched. capability, device, stream (of a device): as they are when Triton asks.
    """

    def __init__(self, launcher, load, capability, device, stream, set_device, torch_device):
        self.launcher_cls = launcher
        self.utils = SimpleNamespace(
            load_binary=lambda name, code, shared, device: (None, load(name, code), 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: PROPERTIES,
        )
        self.get_device_capability = lambda device=0: capability()
        self.get_current_stream = lambda device=0: stream(device)
        self.get_current_device = device
        self.set_current_device = set_device
        self.get_active_torch_device = torch_device

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        major, minor = self.get_device_capability()
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_active_torch_device(self):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError("a GPU that is not there takes no time")


def _driver(machine: Machine) -> Driver:
    number = next(_devices)  # Triton 3.6 keeps compiled variants by device, whatever its target
    return Driver(
        launcher=lambda source, metadata: _launcher(machine, source, metadata),
        load=lambda name, code: code.decode() if isinstance(code, bytes) else code,
        capability=lambda: divmod(machine.cc, 10),
        device=lambda: number,
        stream=lambda device: 0,
        set_device=lambda device: None,
        torch_device=lambda: torch.device("cpu"),
    )


def attached(cc: int, options: Options, keeps: bool) -> Machine:
    """Triton's driver and compiler from here on, until it is detached."""
    from triton.backends import backends

    machine = Machine(cc, options, keeps=keeps)
    backend, active = backends["nvidia"], triton.runtime.driver._active
    backends["nvidia"] = type(backend)(_ToPtx, backend.driver)
    triton.runtime.driver.set_active(_driver(machine))

    def detach():
        backends["nvidia"] = backend
        triton.runtime.driver._active = active

    machine.detach = detach
    return machine
