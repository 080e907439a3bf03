"""A stand-in for CUDA, so that host code written for GPUs runs on a CPU build of torch.

    def test_one_launch(gpu):
        x = torch.ones(1 << 20, device="cuda")
        F.dropout(x)
        assert [launch.name for launch in gpu.launches] == ["forward"]

The fixture ``gpu`` replaces two things for one test, and puts them back.

torch. A storage remembers which device it pretends to be on, and its memory is that of the host. ``x.device``,
``x.is_cuda``, ``x.to("cuda:1")``, streams, events, generators and graphs answer as on a GPU machine of ``DEVICES``
devices. What ATen runs is recorded, mixed devices raise torch's error, and whatever a GPU forbids while a graph is
recorded raises CUDA's. ``graph.replay()`` does anew what was recorded.

Triton. A driver for a GPU that is not there: ``kernel[grid](...)`` goes through Triton's own specialization and cache,
and a launch is checked (``Launched.check``) and recorded, and does nothing. ``gpu.compiles = True``: the kernel is
compiled to machine code as well, for ``gpu.capability``. This half needs a process with ``TRITON_INTERPRET=0``. In one
with ``TRITON_INTERPRET=1`` the interpreter runs the kernels on the host's memory, graphs included, and the host code is
that of a GPU.

``gpu.weightless = True``: new tensors have no memory, so that they may have any shape.

What it cannot show: times, what kernels compute (without the interpreter), and what lies behind an address in a table.
C++ sees tensors of the CPU: a backward pass runs on the stream that called it, gradients that autograd makes out of
nothing lie on the host, torch.func and torch.compile do not see the device, and no thread but the test's may make
tensors.

``PYTHONPATH=tests pytest -p pretended_gpu tests/test_x.py`` runs any test with it.
"""

import contextlib
import itertools
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from pretended_records import Compiled, Launched, Operation
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from fastreg.ops import backend, launch

DEVICES = 2
CPU = torch.device("cpu")
CAPTURED = "CUDA error: operation not permitted when stream is capturing"
# ATen's functions that wait for the device, because what they return is in the host's memory or depends on values.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero")
# They take tensors of several devices.
CROSSING = ("copy_", "_to_copy", "_copy_from")

_numbers = itertools.count(1)  # of streams and of graphs, never twice in a process

_host_device = torch._C.TensorBase.device.__get__
_host_to = torch._C.TensorBase.to
_host_grouped = torch._C._group_tensors_by_device_and_dtype
_host_tensor, _host_as_tensor, _HostGenerator = torch.tensor, torch.as_tensor, torch.Generator


# --- torch ------------------------------------------------------------------------------------------------


def _pretended(x: torch.Tensor) -> torch.device | None:
    try:
        return getattr(x.untyped_storage(), "pretended_device", None)
    except (NotImplementedError, RuntimeError):  # it has no storage
        return None


class Stream:
    """Work on one stream is in order; that of others is seen once they were waited for."""

    def __init__(self, device: Any = None, priority: int = 0, **ignored: Any):
        self.device = _gpu.device(device)
        self.cuda_stream = next(_numbers)
        self.graph: Graph | None = None
        self.done = 0  # pieces of work
        self.seen: dict[int, int] = {}  # of other streams
        _gpu.streams[self.cuda_stream] = self

    def moment(self) -> dict[int, int]:
        return {**self.seen, self.cuda_stream: self.done}

    def wait_event(self, event: "Event") -> None:
        if event.moment is None:
            return
        for stream, done in event.moment.items():
            self.seen[stream] = max(done, self.seen.get(stream, 0))
        if event.graph is not None:  # a stream that waits for a captured event is captured
            self.graph = event.graph

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _gpu.wait("Stream.synchronize", self)

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return self.graph is not None

    def __enter__(self):
        self._within = torch.cuda.stream(self)
        return self._within.__enter__()

    def __exit__(self, *error):
        return self._within.__exit__(*error)


class Event:
    def __init__(self, enable_timing: bool = False, **ignored: Any):
        self.moment, self.graph, self.time = None, None, None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or _gpu.stream()
        self.moment, self.graph, self.time = stream.moment(), stream.graph, time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _gpu.stream()).wait_event(self)

    def synchronize(self) -> None:
        _gpu.wait("Event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return (end.time - self.time) * 1e3


class Graph:
    """In the place of ``torch.cuda.CUDAGraph``."""

    def __init__(self, keep_graph: bool = False):
        self.work: list[Any] = []
        self.number, self.ended = 0, False
        self.draws: dict[Generator, int] = {}  # of the generators that it knows

    def register_generator_state(self, generator: "Generator") -> None:
        self.draws[generator] = 0

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **ignored: Any) -> None:
        stream = _gpu.stream()
        if stream is _gpu.default_streams[stream.device.index]:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        for generator in _gpu.generators:
            self.register_generator_state(generator)
        self.number, self.origin, stream.graph = next(_numbers), stream, self

    def capture_end(self) -> None:
        for stream in _gpu.streams.values():
            if stream.graph is self:
                if stream is not self.origin and self.origin.seen.get(stream.cuda_stream, 0) < stream.done:
                    raise RuntimeError("CUDA error: capturing stream has unjoined work")
                stream.graph = None
        self.ended = True

    def replay(self) -> None:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        for work in self.work:
            work()
        for generator, count in self.draws.items():
            generator.advance(count)

    def pool(self) -> tuple[int, int]:
        return self.number, 0

    def reset(self) -> None:
        self.work = []


class Generator(_HostGenerator):
    """torch's, which on a GPU is a seed and an offset. (Values are drawn by the CPU's.)"""

    def __new__(cls, device: Any = "cpu"):
        made = super().__new__(cls)
        device = torch.device(device)
        made.pretended_device = _gpu.device(device) if device.type == "cuda" else device
        made._seed = made._offset = 0
        _gpu.generators_by_address[made._cdata] = made
        return made

    @property
    def device(self) -> torch.device:
        return self.pretended_device

    @property
    def _on_gpu(self) -> bool:
        return self.pretended_device.type == "cuda"

    def _outside_of_capture(self, what: str) -> None:
        if self._on_gpu and _gpu.graph() is not None:
            raise RuntimeError(f"Cannot call CUDAGeneratorImpl::{what} during CUDA graph capture.")

    def advance(self, count: int = 1) -> None:
        self._offset += 4 * count

    def initial_seed(self) -> int:
        self._outside_of_capture("current_seed")
        return self._seed if self._on_gpu else super().initial_seed()

    def manual_seed(self, seed: int) -> "Generator":
        self._outside_of_capture("set_current_seed")
        self._seed, self._offset = seed % 2**64, 0
        super().manual_seed(seed)
        return self

    def seed(self) -> int:
        seed = super().seed()
        self.manual_seed(seed)
        return seed

    def get_offset(self) -> int:
        self._outside_of_capture("get_offset")
        return self._offset

    def set_offset(self, offset: int) -> None:
        self._outside_of_capture("set_offset")
        if offset % 4:
            raise RuntimeError("offset must be a multiple of 4")
        self._offset = offset

    def get_state(self) -> torch.Tensor:
        if not self._on_gpu:
            return super().get_state()
        self._outside_of_capture("current_seed")
        numbers = [_signed(self._seed), self._offset]
        return _host_tensor(numbers, dtype=torch.int64).view(torch.uint8)

    def set_state(self, state: torch.Tensor) -> "Generator":
        if not self._on_gpu:
            return super().set_state(state)
        self._outside_of_capture("set_state")
        seed, self._offset = state.view(torch.int64).tolist()
        self._seed = seed % 2**64
        return self


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


class _Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _gpu.run(function, args, kwargs or {})


class Gpu:
    """What is pretended, and what was done with it."""

    def __init__(self, capability: tuple[int, int] = (9, 0)):
        self.capability = capability
        self.compiles = False
        self.weightless = False
        self.launches: list[Launched] = []
        self.operations: list[Operation] = []
        self.compiled: list[Compiled] = []
        self.waits: list[str] = []  # what made the host wait
        self.races: list[str] = []  # what read, on one stream, what another may still be writing
        # ATen hands over another object for the same generator.
        self.generators_by_address: weakref.WeakValueDictionary[int, Generator] = (
            weakref.WeakValueDictionary()
        )
        self.current = 0  # device
        self.pretends = True

    def begin(self) -> None:
        self.streams: dict[int, Stream] = {}
        self.default_streams = [Stream(index) for index in range(DEVICES)]
        self.current_streams = list(self.default_streams)
        self.generators = tuple(Generator(f"cuda:{index}") for index in range(DEVICES))

    def forget(self) -> None:
        """Starts the records anew; what is compiled stays compiled."""
        for record in (self.launches, self.operations, self.compiled, self.waits, self.races):
            record.clear()

    def names(self) -> list[str]:
        return [launch.name for launch in self.launches]

    def device(self, device: Any = None) -> torch.device:
        """With its index."""
        if not isinstance(device, int):
            device = torch.device("cuda" if device is None else device).index
        index = self.current if device is None or device < 0 else device
        if index >= DEVICES:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cuda", index)

    def stream(self, device: Any = None) -> Stream:
        return self.current_streams[self.device(device).index]

    def graph(self) -> Graph | None:
        return self.stream().graph

    def properties(self, device: Any = None) -> SimpleNamespace:
        major, minor = self.capability
        return SimpleNamespace(
            name="NVIDIA H100 80GB HBM3", major=major, minor=minor, multi_processor_count=132,
            total_memory=80 * 2**30, L2_cache_size=50 * 2**20, warp_size=32,
        )  # fmt: skip

    def wait(self, what: str, *streams: Stream) -> None:
        """The host waits, so that all that follows is behind the work of these streams."""
        if self.graph() is not None:
            raise RuntimeError(CAPTURED)
        self.waits.append(what)
        for stream, other in itertools.product(self.streams.values(), streams):
            stream.wait_stream(other)

    # --- tensors

    def mark(self, x: torch.Tensor, device: torch.device | None) -> torch.Tensor:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            storage = x.untyped_storage()
            storage.pretended_device = device
            if device is not None:
                storage.made = self.stream(device).cuda_stream, self.stream(device).done
        return x

    def _read(self, x: torch.Tensor, stream: Stream, what: str) -> None:
        maker, moment = getattr(x.untyped_storage(), "made", (None, 0))
        if maker not in (None, stream.cuda_stream) and stream.seen.get(maker, 0) < moment:
            self.races.append(f"{what} on stream {stream.cuda_stream} reads what stream {maker} makes")

    def run(self, function, args: tuple, kwargs: dict) -> Any:
        """Any call of ATen."""
        name = function.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        found = [(x, _pretended(x)) for x in inputs]
        on_gpu = [device for _, device in found if device is not None]
        wanted = kwargs.get("device")
        target = on_gpu[0] if on_gpu else None
        if wanted is not None and wanted.type == "cuda":
            target = self.device(wanted)
            kwargs = {**kwargs, "device": torch.device("meta" if self.weightless else "cpu")}
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        if target is None and not on_gpu:
            return function(*args, **kwargs)

        devices = {device or CPU for x, device in found if x.dim() or device is not None}
        if name not in CROSSING and len(devices) > 1:
            a, b, *_ = sorted(map(str, devices), reverse=True)
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {a} and {b}!"
            )
        stream = self.stream(target or on_gpu[0])
        if name in WAITING:
            self.wait(name, stream)
        if torch.Tag.nondeterministic_seeded in function.tags:
            self._draw(kwargs.get("generator"), stream)
        works = "empty" not in name  # and does not only find memory
        for x, device in found:
            if device is not None and works:
                self._read(x, stream, name)
        with self.on_host():
            called = function if stream.graph is None else _unwritten(function)
            result = called(*args, **kwargs)
        stream.done += works
        given = {x.untyped_storage()._cdata for x, _ in found}
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        made = [x for x in made if x.untyped_storage()._cdata not in given]
        for x in made:
            self.mark(x, target)
        if works and (function._schema.is_mutable or made):
            self.operations.append(Operation(name, stream.cuda_stream, stream.graph))
            if stream.graph is not None:
                stream.graph.work.append(_Again(function, args, kwargs, result, made))
        return result

    @contextlib.contextmanager
    def on_host(self):
        """Parts of ATen that are in Python ask where tensors are, and must not see the pretended device."""
        before, self.pretends = self.pretends, False
        try:
            yield
        finally:
            self.pretends = before

    def _draw(self, generator: torch.Generator | None, stream: Stream) -> None:
        default = self.generators[stream.device.index]
        generator = default if generator is None else self.generators_by_address[generator._cdata]
        if stream.graph is None:
            generator.advance()
        elif generator not in stream.graph.draws:
            raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
        else:
            stream.graph.draws[generator] += 1

    def move(self, x: torch.Tensor, target: torch.device, dtype: torch.dtype | None, **how: Any):
        """A copy on another device."""
        before = _pretended(x)
        if before is not None and target.type == "cpu" and not how.get("non_blocking"):
            self.wait("copy to the host")
        if target.type == "cuda" and before is None and not how.get("non_blocking") and not x.is_meta:
            self.wait("copy of pageable memory")
        if self.weightless and target.type == "cuda":
            y = torch.empty_like(x, dtype=dtype, device=target)
        else:
            y = _host_to(x, CPU, dtype or x.dtype, copy=True)
        return self.mark(y, target if target.type == "cuda" else None)

    # --- launches

    def launched(self, launch: Launched, again: Callable[[], Any] = lambda: None) -> None:
        """again: what a graph's replay does beside saying so."""
        stream = self.streams[launch.stream]
        launch.check(self.current)
        for name, value in launch.arguments.items():
            if isinstance(value, torch.Tensor) and value.numel():
                self._read(value, stream, f"{launch.name}({name})")
        stream.done += 1
        self.launches.append(launch._replace(values=_values(launch)))

        def replay() -> None:
            self.launches.append(launch._replace(graph=None, values=_values(launch)))
            again()

        if stream.graph is not None:
            stream.graph.work.append(replay)


def _unwritten(function) -> Callable:
    """A call of ATen while a graph is recorded: it has a result, and changes nothing that was there before."""

    def call(*args: Any, **kwargs: Any) -> Any:
        originals = {}

        def copied(x: torch.Tensor) -> torch.Tensor:
            y = x.clone()
            originals[id(y)] = y, x
            return y

        given = list(args), dict(kwargs)
        for place, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                where, key = (given[0], place) if place < len(args) else (given[1], argument.name)
                if where is given[0] or key in kwargs:
                    where[key] = tree_map_only(torch.Tensor, copied, where[key])
        result = function(*given[0], **given[1])
        return tree_map_only(torch.Tensor, lambda x: originals.get(id(x), (x, x))[1], result)

    return call


class _Again(NamedTuple):
    """A call of ATen in a graph: its replay writes where the first call wrote."""

    function: Any
    args: tuple
    kwargs: dict
    result: Any
    made: list

    def __call__(self) -> None:
        with _disable_current_modes(), torch.no_grad(), _gpu.on_host():
            again = self.function(*self.args, **self.kwargs)
            for x, y in zip(tree_leaves(self.result), tree_leaves(again), strict=True):
                if any(x is one for one in self.made):
                    x.copy_(y)
        name = self.function.overloadpacket.__name__
        _gpu.operations.append(Operation(name, _gpu.stream().cuda_stream, None))


def _values(launch: Launched) -> dict[str, Any]:
    with _disable_current_modes():
        return {
            name: x.item()
            for name, x in launch.arguments.items()
            if isinstance(x, torch.Tensor) and x.numel() == 1 and _host_device(x).type != "meta"
        }


_gpu: Gpu  # the one that is pretended


def _device_of(x: torch.Tensor) -> torch.device:
    return (_gpu.pretends and _pretended(x)) or _host_device(x)


def _to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    other = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.get("other")
    if other is not None:
        args, kwargs = args[1:], {key: value for key, value in kwargs.items() if key != "other"}
        return _to(x, other.device, other.dtype, *args, **kwargs)
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type == "cuda":
        device = _gpu.device(device)
    if device is None or device == x.device:
        return _host_to(x, dtype or x.dtype, copy=copy, memory_format=layout or torch.preserve_format)
    if "cuda" in (device.type, x.device.type):
        return _gpu.move(x, device, dtype, non_blocking=non_blocking)
    return _host_to(x, *args, **kwargs)


def _tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
    x = _host_tensor(data, *args, **kwargs)
    return x if device is None else _to(x.detach(), device).requires_grad_(x.requires_grad)


def _as_tensor(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
    x = _host_as_tensor(data, dtype=dtype)
    return x if device is None else _to(x, device)


def _grouped(tensors: list, with_indices: bool = False) -> dict:
    """Tensors by device and dtype, as torch's clipping and optimizers sort them."""
    found = _host_grouped(tensors, with_indices)
    return {(lists[0][0].device, dtype): (lists, places) for (_, dtype), (lists, places) in found.items()}


def _exchange(device: int) -> int:
    before = _gpu.current
    _gpu.current = before if device is None or device < 0 else device
    return before


def _set_stream(stream: Stream | None) -> None:
    if stream is not None:
        _gpu.current = stream.device.index
        _gpu.current_streams[_gpu.current] = stream


def _replacements() -> dict[Any, dict[str, Any]]:
    """What is replaced in torch, by where it stands."""
    cuda = {
        "_lazy_init": lambda: None,
        "_initialized": True,
        "_exchange_device": _exchange,
        "_maybe_exchange_device": _exchange,
        "is_available": lambda: True,
        "device_count": lambda: DEVICES,
        "set_device": lambda device: _exchange(_gpu.device(device).index),
        "get_device_properties": lambda device=None: _gpu.properties(device),
        "get_device_capability": lambda device=None: _gpu.capability,
        "default_generators": _gpu.generators,
        "is_current_stream_capturing": lambda: _gpu.graph() is not None,
        "synchronize": lambda device=None: _gpu.wait("synchronize", *_gpu.streams.values()),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_allocated": lambda device=None: 100,
        "max_memory_allocated": lambda device=None: 500,
        "current_stream": lambda device=None: _gpu.stream(device),
        "default_stream": lambda device=None: _gpu.default_streams[_gpu.device(device).index],
        "set_stream": _set_stream,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "_sleep": lambda cycles: None,
    }
    tensor = {
        "device": property(_device_of),
        "is_meta": property(lambda x: _device_of(x).type == "meta"),
        "is_cuda": property(lambda x: _device_of(x).type == "cuda"),
        "get_device": lambda x: -1 if _device_of(x).index is None else _device_of(x).index,
        "to": _to,
        "cpu": lambda x, memory_format=torch.preserve_format: _to(x, CPU),
        "cuda": lambda x, device=None, non_blocking=False, memory_format=None: _to(
            x, _gpu.device(device), non_blocking=non_blocking
        ),
        "pin_memory": lambda x, device=None: x.clone(),
        "is_pinned": lambda x, device=None: False,
    }
    accelerator = {
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_stream": cuda["current_stream"],
    }
    numbers = {"capture_id": lambda device: _gpu.stream(device).graph.number}
    accelerator = {
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_stream": cuda["current_stream"],
    }
    graphs = {"CUDAGraph": Graph, "graph_pool_handle": lambda: (0, next(_numbers))}
    return {
        torch: {"tensor": _tensor, "as_tensor": _as_tensor, "Generator": Generator},
        torch.Tensor: tensor,
        torch.cuda: cuda,
        torch.accelerator: accelerator,
        backend: numbers,
        torch.cuda.random: {"device_count": cuda["device_count"]},
        torch.cuda.graphs: graphs,
        torch.cuda.graph: {"default_capture_stream": None},
        torch._C: {
            "_host_emptyCache": lambda: None,
            "_cuda_getDevice": lambda: _gpu.current,
            "_group_tensors_by_device_and_dtype": _grouped,
        },
    }


# --- Triton -----------------------------------------------------------------------------------------------


def _driver(gpu: Gpu) -> Any:
    """The active driver: what Triton asks about the GPU."""
    from fastreg.bench.machine.driver import Driver

    return Driver(
        launcher=lambda source, metadata: _launcher(gpu, source, metadata._asdict()),
        load=lambda name, code: name,
        capability=lambda: gpu.capability,
        device=lambda: gpu.current,
        stream=lambda device: gpu.stream(device).cuda_stream,
        set_device=_exchange,
        torch_device=lambda: torch.device("cuda", gpu.current),
    )


def _launcher(gpu: Gpu, source: Any, options: dict[str, Any]) -> Any:
    """What records the launches of one variant."""
    names = list(source.signature)
    kinds = dict(backend.leaves(source.signature))
    types = {name: kind for name, kind in kinds.items() if kind != "constexpr"}
    constants = frozenset(kinds) - frozenset(types)

    def launch(x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        if x * y * z == 0:
            return
        given = {}
        for name, value in zip(names, arguments, strict=True):
            struct = type(source.signature[name])
            given[name] = value if struct is str else struct(*value)
        found = dict(backend.leaves(given))
        name, graph = source.fn.__name__, gpu.streams[stream].graph
        gpu.launched(Launched(name, (x, y, z), found, constants, types, options, stream, graph))

    return launch


class _Uncompiled:
    """A variant that is launched without code."""

    function = packed_metadata = None

    def __init__(self, gpu: Gpu, source: Any, options: dict[str, Any]):
        self.run = _launcher(gpu, source, options)

    def launch_metadata(self, *arguments: Any) -> None:
        return None


@contextlib.contextmanager
def _triton(gpu: Gpu, patch: pytest.MonkeyPatch):
    """Triton with the driver, its caches as they are in a new process."""
    import triton
    from triton.compiler import compiler

    real, kernels = compiler.compile, weakref.WeakSet()

    def compile(src, target=None, options=None, **more):
        kernels.add(src.fn)
        if gpu.graph() is not None:
            raise RuntimeError(f"{CAPTURED}: the first launch of this variant of {src.fn.__name__}")
        gpu.compiled.append(Compiled(src.fn.__name__, dict(src.signature), dict(src.constants)))
        if gpu.compiles:
            return real(src, target=target, options=options, **more)
        return _Uncompiled(gpu, src, options)

    before = triton.runtime.driver._active
    patch.setattr(triton.compiler, "compile", compile)
    triton.runtime.driver.set_active(_driver(gpu))
    launch.forget()
    try:
        yield
    finally:
        launch.forget()
        triton.runtime.driver._active = before
        for kernel in kernels:
            kernel.device_caches.clear()


def _interpreted(gpu: Gpu) -> Callable:
    """In the place of ``Launch.run``, where the interpreter runs the kernels: now, or when a graph is replayed."""

    real = backend.Launch.run

    def run(launch, device: torch.device) -> None:
        if device.type == "cpu":
            real(launch, device)
            return

        def again() -> None:
            launch.kernel[launch.grid](**launch.arguments)

        grid = (*launch.grid, 1, 1)[:3]
        pointers = {name: "*" for name, x in launch.leaves.items() if isinstance(x, torch.Tensor)}
        with torch.cuda.device(device):
            stream = gpu.stream()
            if stream.graph is None:
                again()
            name, number = launch.kernel.__name__, stream.cuda_stream
            one = Launched(name, grid, launch.leaves, frozenset(), pointers, {}, number, stream.graph)
            gpu.launched(one, again)

    return run


@contextlib.contextmanager
def pretend(capability: tuple[int, int] = (9, 0)):
    """A GPU of this compute capability, until the end of the block."""
    global _gpu
    _gpu = gpu = Gpu(capability)
    gpu.begin()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for owner, new in _replacements().items():
            for name, value in new.items():
                patch.setattr(owner, name, value, raising=False)
        if backend.INTERPRETED:
            patch.setattr(backend.Launch, "run", _interpreted(gpu))
        elif backend.HAS_TRITON:
            stack.enter_context(_triton(gpu, patch))
        caches = (backend._capability, backend.multiprocessors)
        for cached in caches:
            cached.cache_clear()
        stack.callback(lambda: [cached.cache_clear() for cached in caches])
        stack.enter_context(_Recorder())
        yield gpu


_session: contextlib.ExitStack | None = None


def pytest_configure() -> None:
    """As a plugin: from here on, for all tests."""
    global _session
    _session = contextlib.ExitStack()
    _session.enter_context(pretend())


def pytest_unconfigure() -> None:
    _session.close()


@pytest.fixture
def gpu():
    if _session is not None:
        _gpu.forget()
        yield _gpu
        return
    with pretend() as pretended:
        yield pretended


@pytest.fixture
def needs_compiler() -> None:
    if backend.INTERPRETED or not backend.HAS_TRITON:
        pytest.skip("the interpreter specializes nothing: TRITON_INTERPRET=0")
