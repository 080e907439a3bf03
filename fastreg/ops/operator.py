"""The one way from a function to its kernels, in eager mode and under torch.compile.

    @operator("fastreg::dropout", writes=["y"])
    def _forward(x: Tensor, bias: Tensor | None, y: Tensor, stream: Stream, form: Form) -> None:
        launches.run(x, bias, y, stream, form)

An operator writes into tensors that it is given, and returns nothing. Whoever calls it allocates them, in Python, where
torch.compile sees their shapes: so there is no second function to say them. Eagerly a call is a call of the function;
in torch.compile it is an operator of torch, whose schema is read from the signature.

A family writes one ``autograd.Function`` on top, which serves both. What all of them need is here: ``apply`` where
autograd may have nothing to record, ``keep`` and ``kept`` for what the backward pass needs, ``by_definition`` where the
backward kernels are not enough.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from fastreg.ops import backend
from fastreg.random import Stream

_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
    str | None: "str?",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
}


def operator(name: str, writes: Sequence[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function of tensors and options the operator ``name``, which writes into the tensors ``writes``.

    Options are numbers, strings, dtypes, and NamedTuples of them. A ``Stream`` reaches the operator as its seed, a
    tensor: a graph draws a new one at every call.
    """

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function)
        kinds = [hints[parameter] for parameter in inspect.signature(function).parameters]
        fields = [_fields(name, kind) for name, kind in zip(inspect.signature(function).parameters, kinds)]
        schema = ", ".join(
            _SCHEMA[kind].replace("Tensor", f"Tensor(a{place}!)") + f" {field}"
            if field in writes
            else f"{_SCHEMA[kind]} {field}"
            for place, (field, kind) in enumerate(sum(fields, []))
        )
        counts = [len(parts) for parts in fields]

        def body(*flat: Any) -> None:
            flat, arguments = list(flat), []
            for kind, count in zip(kinds, counts, strict=True):
                own, flat = flat[:count], flat[count:]
                arguments.append(kind(*own) if isinstance(kind, type) and issubclass(kind, tuple) else own[0])
            function(*arguments)

        op = torch.library.custom_op(name, body, mutates_args=writes, schema=f"({schema}) -> ()")
        op.register_fake(lambda *_: None)

        @functools.wraps(function)
        def call(*arguments: Any) -> None:
            if not torch.compiler.is_compiling():
                return function(*arguments)
            flat = []
            for argument in arguments:
                if isinstance(argument, Stream):
                    flat.append(argument.seed_on(arguments[0].device))
                elif isinstance(argument, tuple):
                    flat.extend(argument)
                else:
                    flat.append(argument)
            return op(*flat)

        return call

    return wrap


def _fields(name: str, kind: Any) -> list[tuple[str, Any]]:
    """Names and types by which an argument reaches the operator."""
    if kind is Stream:
        return [("seed", Tensor)]
    if isinstance(kind, type) and issubclass(kind, tuple):
        return list(get_type_hints(kind).items())
    return [(name, kind)]


class _Unrecorded:
    """In the place of ``ctx`` where no gradient will be asked for."""

    def __init__(self, arguments: Sequence[Any]):
        self.needs_input_grad = (False,) * len(arguments)

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, without autograd where it has nothing to record."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        return function.apply(*arguments)
    return function.forward(_Unrecorded(arguments), *arguments)


def keep(ctx, stream: Stream, *tensors: Tensor | None) -> None:
    """Keeps the tensors and the stream for ``kept``."""
    seed = stream.seed if isinstance(stream.seed, Tensor) else None
    ctx.stream = stream if seed is None else Stream(0, stream.offset)
    ctx.save_for_backward(seed, *tensors)


def kept(ctx) -> tuple[Any, ...]:
    """The stream and the tensors."""
    seed, *tensors = ctx.saved_tensors
    return ctx.stream if seed is None else ctx.stream._replace(seed=seed), *tensors


def needs_definition(*gradients: Tensor | None) -> bool:
    """Whether a backward pass goes through the definition: for second derivatives, batched gradients (vmap), and
    gradients of other types. Their dtype and device are those of the forward pass."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or backend.watched():
        return True
    return any(g is not None and (not backend.is_plain(g) or is_legacy_batchedtensor(g)) for g in gradients)


def empty_gradients(ctx, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Contiguous tensors for the gradients of the first inputs, None for those that are not needed."""
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else None
        for t, needed in zip(inputs, ctx.needs_input_grad, strict=False)
    ]


def by_definition(
    definition: Callable[..., Any], inputs: Sequence[Tensor | None], gradients: Any
) -> list[Tensor | None]:
    """The gradients of the inputs, None where there is no input; differentiable in their turn where autograd records.

    gradients: of what ``definition(*inputs)`` returns.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the gradients are those of this expression alone, even if two inputs are one tensor.
        views = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in inputs
        ]
        outputs = definition(*views)
    found = iter(
        torch.autograd.grad(
            outputs, [t for t in views if t is not None], gradients, create_graph=create_graph
        )
    )
    return [None if t is None else next(found) for t in views]
