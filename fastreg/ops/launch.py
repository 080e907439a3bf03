"""Launches that are worked out once for each kind of arguments, and then only filled in.

    @planned
    def forward_launches(x, y, stream, form) -> list[Launch]:
        ...

    forward_launches(x, y, stream, form)      the launches, as ``fastreg inspect`` reads them
    forward_launches.run(x, y, stream, form)  runs them

The kind of an argument is all that a launch may follow from: shape, strides, dtype and device of a tensor, where the
seed of a stream lies, and any other argument itself. The first call of a kind builds the launches and notes where each
of its tensors went. Later calls of that kind put their own there, and start the compiled kernel directly: Triton's
``kernel[grid]`` looks at every argument anew to find it, which takes longer than all the rest.

A tensor that is passed to a kernel but is no argument is workspace: every call allocates its own. So a builder makes
its workspace by ``torch.empty``, and reads no values.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreg.ops import backend
from fastreg.ops.backend import Launch, is_struct, with_leaves
from fastreg.ops.kinds import kinds_of
from fastreg.random import Stream

if backend.HAS_TRITON:
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

DIRECT = backend.HAS_TRITON and {"run", "launch_metadata"} <= set(vars(CompiledKernel))
"""Whether this Triton starts kernels as ``_Variant`` expects: versions 3.6 to 3.9 do."""

PLANS = 1024
"""Kinds that a builder remembers. With more of them it forgets the oldest: a plan holds nothing but what its kind says,
and is made again. (A probability or a momentum that changes at every step is another kind at every step.)"""


class planned:
    """Decorates a builder of launches: see above."""

    def __init__(self, build: Callable[..., list[Launch]]):
        functools.update_wrapper(self, build)
        self._build = build
        self._plans: dict[
            tuple, list[tuple[Any, _Plan]]
        ] = {}  # those of one key differ in the kinds of tensors
        self._count = 0
        _builders.append(self)

    def __call__(self, *arguments: Any) -> list[Launch]:
        return self._build(*arguments)

    def run(self, *arguments: Any) -> list[Tensor]:
        """Runs the launches. Returns their workspace, each tensor in one dimension, in the order of its first use."""
        tensors: list[Tensor] = []
        options: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                tensors.append(argument)
                options.append(Tensor)
            elif type(argument) is Stream:
                seed = argument.seed
                options.append(None if isinstance(seed, Tensor) else seed != 0)  # see Launch.run
            else:
                options.append(argument)
        first = tensors[0]
        key = first.shape, first.device, *options
        plan = self._known(key, tensors)
        if plan is None:
            tensors = _distinct(tensors)
            plan = self._known(key, tensors)
        if plan is None:
            if self._count >= PLANS:
                self._count -= len(self._plans.pop(next(iter(self._plans))))
            plan = _Plan(self._build, arguments)
            self._plans.setdefault(key, []).append((kinds_of(tensors), plan))
            self._count += 1
        return plan.run(arguments)

    def _known(self, key: tuple, tensors: Sequence[Tensor]) -> "_Plan | None":
        for kinds, plan in self._plans.get(key, ()):
            if kinds.check(*tensors):
                return plan
        return None

    def forget(self) -> None:
        self._plans.clear()
        self._count = 0


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Another object for a tensor that is there twice, of which no kinds are known (``kinds_of``)."""
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        again = id(tensor) in found
        found[-len(found) if again else id(tensor)] = tensor.detach() if again else tensor
    return list(found.values())


_builders: list[planned] = []


def forget() -> None:
    """Forgets all plans: for whoever changes what a builder reads beside its arguments, such as the number of
    multiprocessors, or switches Triton to debugging."""
    for builder in _builders:
        builder.forget()


class _Workspace(NamedTuple):
    """A tensor of a call: all the memory that the workspace of its launches has in one storage."""

    size: int
    dtype: torch.dtype
    device: torch.device

    def allocate(self) -> Tensor:
        return torch.empty(self.size, dtype=self.dtype, device=self.device)


class _Plan:
    def __init__(self, build: Callable[..., list[Launch]], arguments: Sequence[Any]):
        # Objects of their own, so that a tensor which is passed twice is found twice.
        arguments = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        self._workspaces: list[_Workspace] = []
        storages: dict[int, int] = {
            a.untyped_storage()._cdata: -1 for a in arguments if isinstance(a, Tensor)
        }
        self._device: torch.device = next(a.device for a in arguments if isinstance(a, Tensor))
        launches = build(*arguments)
        self._steps = [
            _Step(launch, arguments, self._workspaces, storages)
            for launch in launches
            if math.prod(launch.grid) > 0
        ]

    def run(self, arguments: Sequence[Any]) -> list[Tensor]:
        workspaces = [workspace.allocate() for workspace in self._workspaces]
        for step in self._steps:
            step.run(arguments, workspaces, self._device)
        return workspaces


class _View(NamedTuple):
    """The place of a launch's tensor: a workspace, and where in it."""

    workspace: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def of(self, workspaces: list[Tensor]) -> Tensor:
        return workspaces[self.workspace].as_strided(*self[1:])


def _view_of(x: Tensor, workspaces: list[_Workspace], storages: dict[int, int]) -> _View:
    """storages: the place in ``workspaces`` of each storage, by its address; -1: it is an argument's."""
    storage = x.untyped_storage()
    place = storages.setdefault(storage._cdata, len(workspaces))
    if place < 0:
        raise AssertionError("a launch has a view of an argument, which the next call will not pass")
    if place == len(workspaces):
        workspaces.append(_Workspace(storage.nbytes() // x.element_size(), x.dtype, x.device))
    return _View(place, x.shape, x.stride(), x.storage_offset())


class _Step:
    """One launch of a plan: which of its arguments are the caller's, and which are the same at every call."""

    def __init__(
        self,
        launch: Launch,
        arguments: Sequence[Any],
        workspaces: list[_Workspace],
        storages: dict[int, int],
    ):
        self.given: list[tuple[str, int]] = []  # names of pointers, and the places of the caller's arguments
        self.views: list[tuple[str, _View]] = []
        self.stream: int | None = None  # the place of the caller's stream
        values: dict[str, Any] = launch.leaves
        if "offset" in values:
            self.stream = next(place for place, a in enumerate(arguments) if type(a) is Stream)
            assert values["offset"] == arguments[self.stream].offset
            values |= {"seed_ptr": None, "seed": 0, "offset": 0}
        places = {id(a): place for place, a in enumerate(arguments) if isinstance(a, Tensor)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = None  # a plan keeps nothing alive
                if id(value) in places:
                    self.given.append((name, places[id(value)]))
                else:
                    self.views.append((name, _view_of(value, workspaces, storages)))
        self.launch = launch._replace(arguments=with_leaves(launch.arguments, values))
        self._variant: _Variant | None = None

    def run(self, arguments: Sequence[Any], workspaces: list[Tensor], device: torch.device) -> None:
        variant = self._variant  # asked once: it may come from another thread
        if variant is not None and variant.start(arguments, workspaces, device):
            return
        values = {name: arguments[place] for name, place in self.given}
        values |= {name: view.of(workspaces) for name, view in self.views}
        aligned = not any(tensor.data_ptr() % 16 for tensor in values.values())
        if self.stream is not None:
            seed, values["offset"] = arguments[self.stream]
            values["seed_ptr" if isinstance(seed, Tensor) else "seed"] = seed
        compiled = self.launch._replace(arguments=with_leaves(self.launch.arguments, values)).run(device)
        if compiled is not None and DIRECT and aligned:
            self._variant = _Variant(compiled, self)


def _is_heard(hook: Any) -> bool:
    """Whether a hook of Triton is set. A hook is a chain of calls, one call, or None."""
    return bool(getattr(hook, "calls", hook))


class _Variant:
    """A compiled kernel, started without a look at its arguments: they are as they were when Triton chose it, but for
    addresses, which are all multiples of 16 (what Triton compiles for), and a seed, which is never compiled for."""

    def __init__(self, compiled: Any, step: _Step):
        self._compiled, self._kernel = compiled, step.launch.kernel
        self._grid = (*step.launch.grid, 1, 1)[:3]
        names: list[str] = []  # of the leaves: a struct that holds no constants is given as its fields
        self._values: list[Any] = []
        self._places: list[int | slice] = []  # of each argument among the leaves
        for parameter in self._kernel.params:
            value: Any = step.launch.arguments.get(parameter.name)
            if is_struct(value) and not parameter.is_constexpr:
                self._places.append(slice(len(names), len(names) + len(value)))
                names += [f"{parameter.name}.{field}" for field in value._fields]
                self._values += value
            else:
                self._places.append(len(names))
                names.append(parameter.name)
                self._values.append(value)
        self._given = [(names.index(name), place) for name, place in step.given]
        self._views = [(names.index(name), view) for name, view in step.views]
        self._stream = step.stream
        if step.stream is not None:
            self._seed_ptr, self._seed, self._offset = map(names.index, ("seed_ptr", "seed", "offset"))

    def start(self, arguments: Sequence[Any], workspaces: list[Tensor], device: torch.device) -> bool:
        """False where nothing was started: Triton has to choose another variant, or somebody listens to launches."""
        values = self._values.copy()
        addresses = 0
        for name, place in self._given:
            tensor = values[name] = arguments[place]
            addresses |= tensor.data_ptr()
        for name, view in self._views:
            tensor = values[name] = view.of(workspaces)
            addresses |= tensor.data_ptr()
        if self._stream is not None:
            seed, values[self._offset] = arguments[self._stream]
            values[self._seed_ptr if isinstance(seed, Tensor) else self._seed] = seed
        runtime = knobs.runtime
        heard = _is_heard(runtime.launch_enter_hook) or _is_heard(runtime.launch_exit_hook)
        if addresses % 16 or heard or self._kernel.pre_run_hooks:
            return False
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            self._start(values)
        else:
            with torch.cuda.device(device):
                self._start(values)
        return True

    def _start(self, values: list) -> None:
        compiled, active = self._compiled, driver.active
        stream = active.get_current_stream(active.get_current_device())
        given = [tuple(values[place]) if type(place) is slice else values[place] for place in self._places]
        compiled.run(
            *self._grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *given
        )
