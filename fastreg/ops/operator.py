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
import itertools
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
    tensor: a graph draws a new one at every call. None is the seed 0, for which a graph needs no tensor.
    """

    def wrap(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function)
        kinds = {parameter: hints[parameter] for parameter in inspect.signature(function).parameters}
        fields = [_fields(parameter, kind) for parameter, kind in kinds.items()]
        counts = [len(own) for own in fields]
        names = [field for field, _ in itertools.chain(*fields)]
        if len(set(names)) < len(names):
            raise TypeError(f"{name}: an argument and a field of another have one name: {names}")
        schema = []
        for place, (field, kind) in enumerate(itertools.chain(*fields)):
            text = _SCHEMA[kind]
            schema.append(
                f"{text.replace('Tensor', f'Tensor(a{place}!)') if field in writes else text} {field}"
            )

        def body(*flat: Any) -> None:
            rest, arguments = list(flat), list[Any]()
            for kind, count in zip(kinds.values(), counts, strict=True):
                own, rest = rest[:count], rest[count:]
                if kind is Stream:
                    arguments.append(Stream(0 if own[0] is None else own[0]))
                elif isinstance(kind, type) and issubclass(kind, tuple):
                    arguments.append(kind(*own))
                else:
                    arguments.append(own[0])
            function(*arguments)

        op = torch.library.custom_op(name, body, mutates_args=writes, schema=f"({', '.join(schema)}) -> ()")
        op.register_fake(lambda *_: None)

        @functools.wraps(function)
        def call(*arguments: Any) -> None:
            if not torch.compiler.is_compiling():
                return function(*arguments)
            flat = []
            for argument in arguments:
                if isinstance(argument, Stream):
                    absent = not isinstance(argument.seed, Tensor) and argument.seed == 0
                    flat.append(None if absent else argument.seed_on(arguments[0].device))
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
        return [("seed", Tensor | None)]
    if isinstance(kind, type) and issubclass(kind, tuple):
        return list(get_type_hints(kind).items())
    return [(name, kind)]


class _Unrecorded:
    """In the place of ``ctx`` where no gradient will be asked for."""

    needs_input_grad = (False,) * 32

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, without autograd where it has nothing to record."""
    if torch.compiler.is_compiling():
        arguments = _distinct(arguments)
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return function.apply(*arguments)
    return function.forward(_Unrecorded(), *arguments)


def _distinct(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments with views for tensors that are there already: Dynamo wants distinct ones."""
    found: list[Any] = []
    for argument in arguments:
        again = isinstance(argument, Tensor) and any(argument is other for other in found)
        found.append(argument.view_as(argument) if again else argument)
    return tuple(found)


def leave_undefined(ctx) -> None:
    """The backward pass gets None for a result that nobody used. (Zeros in torch.compile, which has no such thing.)"""
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


def keep(ctx, stream: Stream, *tensors: Tensor | None) -> None:
    """Keeps the stream and the tensors for ``kept``."""
    seed, offset = stream
    in_memory = isinstance(seed, Tensor)
    ctx.seed, ctx.offset = None if in_memory else seed, offset
    ctx.save_for_backward(seed if in_memory else None, *tensors)


def kept(ctx) -> tuple[Any, ...]:
    seed, *tensors = ctx.saved_tensors
    return Stream(ctx.seed if seed is None else seed, ctx.offset), *tensors


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
        None if t is None or not needed else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, needed in zip(inputs, ctx.needs_input_grad, strict=False)
    ]


def by_definition(
    definition: Callable[..., Any], inputs: Sequence[Tensor | None], gradients: Any
) -> list[Any]:
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
