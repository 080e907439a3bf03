"""Batch normalization folded into the layer before it, for inference.

With fixed statistics it is an affine map, which a linear layer W x + b in front takes up, channel by channel:

    BN(x) = a x + c,    a = γ / sqrt(Var[x] + ε),    c = β - a E[x]
    BN(W x + b) = (a W) x + (a b + c)

The last step of Algorithm 2 of Ioffe and Szegedy 2015 (arXiv 1502.03167). ``torch.nn.utils.fusion`` has it for a pair
of layers, in the dtype of the weights and not for grouped transposed convolutions; here it is computed in fp64, and a
whole model is searched.
"""

import copy
import inspect
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from fastreg.nn.batch_norm import BatchNorm1d
from fastreg.nn.fused import FusedNorm
from fastreg.ops.checks import check_residual
from fastreg.ops.fused import activated
from fastreg.population import unwrapped


class ChannelAffine(nn.Module):
    """y = weight x + bias, one weight and bias a channel: batch normalization with fixed statistics.

    ``forward(input, *, residual=None)`` is ``activation(weight input + bias + residual)`` for ``input`` [N, C, ...] of
    any rank from 2 and any dtype; computed in the wider dtype of input and weight, returned in the input's. Where the
    mean of a channel is many standard deviations from 0, weight input and bias cancel: the error is that of rounding
    these terms.

    Args:
        weight, bias: ``[C]``.
        activation: a name of ``fastreg.functional.ACTIVATIONS``, or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, activation: str | None = None) -> None:
        super().__init__()
        self.num_features = weight.numel()
        self.weight = weight
        self.bias = bias
        self.activation = activation

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """activation(weight input + bias + residual)."""
        # An assertion, and no if: torch.fx can trace it. Without it one channel would broadcast to many.
        torch._assert(input.size(1) == self.num_features, f"expected {self.num_features} channels in dim 1")
        check_residual(input, residual)
        y = torch.addcmul(self.bias, input.movedim(1, -1), self.weight).movedim(-1, 1)
        return activated(y.to(input.dtype), self.activation, residual)

    def extra_repr(self) -> str:
        return _representation(self.num_features, self.activation)


class Folded(nn.Identity):
    """What a folded batch normalization leaves behind: its activation, its residual, and the rank it was folded for.

    ``forward(input, *, residual=None)`` is ``activation(input + residual)``.

    Args:
        activation: a name of ``fastreg.functional.ACTIVATIONS``, or None.
        dim: the rank of the input, in the only case that was folded; None: there is only one.
    """

    def __init__(self, activation: str | None = None, dim: int | None = None) -> None:
        super().__init__()
        self.activation = activation
        self.dim = dim

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """activation(input + residual)."""
        if self.dim is not None:
            torch._assert(input.dim() == self.dim, f"this layer was folded for inputs of rank {self.dim}")
        check_residual(input, residual)
        return activated(input, self.activation, residual)

    def extra_repr(self) -> str:
        return _representation(*([] if self.dim is None else [f"dim={self.dim}"]), self.activation)


def _representation(*parts: Any) -> str:
    *rest, activation = parts
    return ", ".join([*map(str, rest), *([] if activation is None else [f"activation={activation}"])])


def fold_batch_norm(model: nn.Module, example: Any = None, *, inplace: bool = False) -> nn.Module:
    """Folds batch normalization into the convolution or linear layer before it, for inference.

        folded = fastreg.fold_batch_norm(model.eval())

    A batch normalization with running statistics, torch's or fastreg's, is folded where ``torch.fx`` proves that its
    only input is the output of one ``Conv1d/2d/3d``, ``ConvTranspose1d/2d/3d`` or ``Linear``, and that this output
    goes nowhere else: ``nn.Identity`` takes its place, or its activation and residual where it has them, so that all
    names stay. Where there is no such layer it becomes the affine map :class:`ChannelAffine`. Outputs agree to the
    rounding of the layer's dtype; a new weight is computed in fp64.

    A linear layer's features are its last dimension, and batch normalization's channels the second, so this pair is
    folded only where they are proved to be the same: where a ``flatten`` or ``view`` before them says that the input is
    ``[N, C]``, or ``example`` shows it. Then, as after a ``Conv1d``, inputs of another rank are refused.

    A module that cannot be traced (control flow that depends on data) is searched part by part, on the assumption
    that the code between the parts calls them as a whole. A module with optional arguments is traced with and
    without each; one with more than three counts as one that cannot be traced.

    Left as they are: layers that are called more than once or registered twice, whose class, ``forward`` or
    parameters are not torch's or fastreg's own (weight normalization, parametrizations, quantization), that carry
    hooks, or whose parameters other code reads; batch normalization without running statistics, or that only code
    that cannot be traced calls. What is left can be listed:
    ``[name for name, module in folded.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]``.

    Args:
        model: in evaluation mode.
        example: an input of the model, or a tuple of its arguments, whose batch normalization inputs have the ranks
            that all later ones will have. The model is called once with it.
        inplace: change ``model`` itself; else a deep copy, and ``model`` stays as it is.

    Returns:
        The folded model, without the wrappers of ``torch.compile`` and data parallelism.

    Raises:
        ValueError: ``model`` or a part of it is in training mode. Nothing was changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, but got a {type(model).__name__}")
    model = unwrapped(model)
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        where = f"its module {training[0]!r}" if training[0] else "the model"
        raise ValueError(f"only inference can be folded, but {where} is in training mode: call model.eval()")
    if not inplace:
        model = copy.deepcopy(model)
    ranks = {} if example is None else _ranks_in(model, example)
    regions = list(_regions(model, set()))
    for region, replacements in _plan(model, regions, ranks).items():
        undo = [replacement.apply() for replacement in replacements]
        # Code may ask for a layer's type or for the attributes of one that is gone. What it does must be the same.
        if _listing(_trace(region.root)) != _listing(region.traces):
            for restore in undo:
                restore()
    return model


# --- what the model does -----------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Records a forward pass with layers as nodes, and which tensors the code between them reads."""

    proxy_buffer_attributes = True  # else code that counts in a buffer would count the tracing

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()  # by their ids

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return (
            isinstance(module, (_BatchNorm, ChannelAffine, Folded))
            or bool(module._forward_hooks or module._forward_pre_hooks)  # not to be called with proxies
            or super().is_leaf_module(module, name)
        )

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        try:
            self.path_of_module(m)
        except NameError:  # made on the fly, such as a slice of a Sequential, whose layers are the model's
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _Region:
    """A module that can be traced, and its graphs: one for each way to leave out optional arguments."""

    def __init__(self, root: nn.Module, traces: list[tuple[_Tracer, fx.Graph]]) -> None:
        self.root = root
        self.traces = traces

    def calls(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        for _, graph in self.traces:
            for node in graph.nodes:
                if node.op == "call_module":
                    yield node, self.root.get_submodule(node.target)


def _regions(module: nn.Module, seen: set[int]) -> Iterator[_Region]:
    """The largest parts of ``module`` that can be traced."""
    if id(module) in seen or not any(module.children()):
        return
    seen.add(id(module))
    traces = _trace(module)
    if traces is None:
        parts = list(module.children())
    else:
        region = _Region(module, traces)
        yield region
        parts = [part for _, part in region.calls()]
    for part in parts:
        yield from _regions(part, seen)


def _trace(module: nn.Module) -> list[tuple[_Tracer, fx.Graph]] | None:
    """None: ``module`` cannot be traced."""
    kept = [(part, dict(vars(part))) for part in module.modules()]
    traces = []
    try:
        parameters = inspect.signature(module.forward).parameters.values()
        optional = [parameter for parameter in parameters if parameter.default is not parameter.empty]
        if len(optional) > 3:
            return None
        choices = [
            (parameter.default, not parameter.default if isinstance(parameter.default, bool) else fx.PH)
            for parameter in optional
        ]
        for chosen in itertools.product(*choices):
            arguments = dict(zip((parameter.name for parameter in optional), chosen, strict=True))
            tracer = _Tracer()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = tracer.trace(
                    module, {name: value for name, value in arguments.items() if value is not fx.PH}
                )
            traces.append((tracer, graph))
    except Exception:  # the model's code may fail on a proxy in any way
        return None
    finally:
        for part, attributes in kept:  # it may also have stored proxies, and torch.fx stores constants
            vars(part).clear()
            vars(part).update(attributes)
    return traces


def _listing(traces: list[tuple[_Tracer, fx.Graph]] | None) -> list[str] | None:
    return None if traces is None else [str(graph) for _, graph in traces]


def _ranks_in(model: nn.Module, example: Any) -> dict[nn.Module, set[int]]:
    """The ranks of the inputs that ``example`` sends to each batch normalization."""
    ranks = defaultdict(set)

    def note(module: nn.Module, args: tuple, kwargs: dict, _output: Any) -> None:
        ranks[module].add((args[0] if args else kwargs["input"]).dim())

    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for handle in handles:
            handle.remove()
    return ranks


# --- what can be folded ------------------------------------------------------------------------------------

# With the rank of their input and output, if it has a batch dimension.
_CONVOLUTIONS = {
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}

# Subclasses with a forward of their own may do anything, unless they say what.
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNorm1d.forward)


def _is_known(norm: _BatchNorm) -> bool:
    """Whether it computes activation(norm(input) + residual), and nothing more."""
    if type(norm).forward in _FORWARDS:
        return True
    # Our subclasses say so themselves; a class of the user may do more.
    return isinstance(norm, FusedNorm) and type(norm).__module__.startswith("fastreg.") and norm.applies_all()


class _Replacement(NamedTuple):
    """New weights of ``layer``, if it takes up the batch normalization at ``parent.name``, and what is put there."""

    layer: _ConvNd | nn.Linear | None
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    parent: nn.Module
    name: str
    module: nn.Module

    def apply(self) -> Callable[[], None]:
        """Returns a function that takes it back."""
        layer, parent, name = self.layer, self.parent, self.name
        former = parent._modules[name]
        parameters = None if layer is None else (layer.weight, layer.bias)

        def write(module: nn.Module | None, parameters: tuple | None) -> None:
            parent._modules[name] = module
            if layer is not None and parameters is not None:
                layer.weight, layer.bias = parameters

        write(self.module, (self.weight, self.bias))
        return lambda: write(former, parameters)


def _plan(
    model: nn.Module, regions: list[_Region], ranks: dict[nn.Module, set[int]]
) -> dict[_Region, list[_Replacement]]:
    places = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():  # named_children() gives a module once
            places[child].append((parent, name))
    calls, caller = defaultdict(list), defaultdict(set)
    for region in regions:
        for node, module in region.calls():
            calls[module].append(node)
            caller[module].add(region)
    modules = {node: module for module, nodes in calls.items() for node in nodes}
    read = set().union(*(tracer.read for region in regions for tracer, _ in region.traces))

    def is_own(module: nn.Module) -> bool:
        """Nothing but its forward, called in one region, uses ``module``, which has one place."""
        return (
            len(places[module]) == 1
            and len(caller[module]) == 1
            and _is_plain(module)
            and not any(
                id(tensor) in read for tensor in itertools.chain(module.parameters(), module.buffers())
            )
        )

    def source(norm: nn.Module) -> _ConvNd | nn.Linear | None:
        """The layer whose output is the input of ``norm``, and nothing else's."""
        nodes = calls[norm]
        inputs = [_input(node) for node in nodes]
        layer = None if inputs[0] is None else modules.get(inputs[0])
        if not _takes_up(layer) or not is_own(layer):
            return None
        once = len({node.graph for node in nodes}) == len(nodes) and calls[layer] == inputs
        alone = all(node is not None and len(node.users) == 1 for node in inputs)
        other = any(node.kwargs.get("residual") is _input(node) for node in nodes)
        return layer if once and alone and not other else None

    plan = defaultdict(list)
    for norm in [module for module in calls if isinstance(module, _BatchNorm)]:
        nodes = calls[norm]
        if not is_own(norm) or not _is_known(norm) or norm.running_mean is None or norm.running_var is None:
            continue
        (place,), (region,) = places[norm], caller[norm]
        activation = norm.activation if isinstance(norm, FusedNorm) else None
        layer, weights, rank = source(norm), None, None
        if layer is not None:
            proved = all(_is_matrix(_input(node), modules) for node in nodes)
            rank = _folded_rank(layer, norm, {2} if proved else ranks.get(norm, set()))
            if rank is not None:
                weights = _folded_weights(layer, norm)
        if weights is not None:
            one_rank = isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm3d)) or (rank == 2 and proved)
            with_residual = any("residual" in node.kwargs for node in nodes)
            if one_rank and activation is None and not with_residual:
                rest = nn.Identity()
            else:
                rest = Folded(activation, None if one_rank else rank)
            replacement = _Replacement(layer, *weights, *place, rest.eval())
        else:
            replacement = _Replacement(None, None, None, *place, _affine_module(norm, activation).eval())
        plan[region].append(replacement)
    return plan


def _takes_up(layer: nn.Module | None) -> TypeGuard[_ConvNd | nn.Linear]:
    return type(layer) in (*_CONVOLUTIONS, nn.Linear)


def _is_plain(module: nn.Module) -> bool:
    """Its tensors are ordinary ones, and nothing was attached to it.

    Children are only those that a norm of another library keeps beside the activation it applies itself.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        "forward" not in vars(module)
        and not any(getattr(module, name) for name in hooks)
        and (not any(module.children()) or (isinstance(module, FusedNorm) and module.applies_all()))
        and all(type(tensor) is nn.Parameter and tensor.is_floating_point() for tensor in module.parameters())
        and all(type(tensor) is Tensor for tensor in module.buffers())
    )


def _input(node: fx.Node) -> fx.Node | None:
    """The input of a batch normalization's call, if it was computed."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, fx.Node) else None


def _folded_rank(layer: _ConvNd | nn.Linear, norm: _BatchNorm, known: set[int]) -> int | None:
    """The rank of the tensors between ``layer`` and ``norm`` with channels in dim 1 for both; None: unsure."""
    if isinstance(norm, nn.BatchNorm1d):
        allowed = {2, 3}
    elif isinstance(norm, nn.BatchNorm2d):
        allowed = {4}
    elif isinstance(norm, nn.BatchNorm3d):
        allowed = {5}
    else:
        allowed = {2, 3, 4, 5}
    if isinstance(layer, nn.Linear):
        rank, channels, sure = 2, layer.out_features, known == {2}
    else:
        rank, channels, sure = _CONVOLUTIONS[type(layer)], layer.out_channels, True
    return rank if sure and rank in allowed and channels == norm.num_features else None


_ELEMENTWISE = {
    "relu",
    "relu_",
    "gelu",
    "silu",
    "leaky_relu",
    "elu",
    "tanh",
    "sigmoid",
    "dropout",
    "contiguous",
}


def _is_matrix(node: Any, modules: dict[fx.Node, nn.Module]) -> bool:
    """Whether the graph shows that ``node`` has two dimensions."""
    if not isinstance(node, fx.Node):
        return False
    first, *rest = node.args or (None,)
    if node.op == "call_module":
        module = modules[node]
        if not _is_plain(module):
            return False
        if isinstance(module, nn.Flatten):
            return (module.start_dim, module.end_dim) == (1, -1)
        keeps_rank = type(module).__module__ == nn.ReLU.__module__ or isinstance(
            module, (nn.Linear, _BatchNorm, _DropoutNd, nn.LayerNorm, nn.Identity)
        )
        return keeps_rank and _is_matrix(first, modules)
    if node.op == "call_method":
        name = node.target
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        if node.target not in (getattr(torch, name, None), getattr(F, name, None)):
            return False
    else:
        return False
    if name == "flatten":
        return (*rest, *node.kwargs.items()) in [(1,), (1, -1), (("start_dim", 1),)]
    if name in ("view", "reshape"):
        sizes = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        return len(sizes) == 2 and not node.kwargs
    return name in _ELEMENTWISE and _is_matrix(first, modules)


# --- the arithmetic ----------------------------------------------------------------------------------------


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Mean and variance of a layer that has them."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    return mean, var


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """a and c of the equation above, fp64 [C]."""
    mean, var = _statistics(norm)
    scale = (var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def _folded_weights(layer: _ConvNd | nn.Linear, norm: _BatchNorm) -> tuple[nn.Parameter, nn.Parameter] | None:
    """None: they are not finite in the layer's dtype."""
    former = layer.weight.detach()
    scale, shift = (tensor.to(former.device) for tensor in _affine(norm))
    bias = shift if layer.bias is None else layer.bias.detach().double() * scale + shift
    if isinstance(layer, _ConvNd) and layer.transposed:
        # [in, out / groups, ...], and each group has its own in and out
        by_group = scale.view(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1)
        scale = by_group.reshape(former.shape[:2])
    else:
        scale = scale.unsqueeze(1)
    scale = scale.view(*scale.shape, *[1] * (former.dim() - 2))
    weight, bias = (former.double() * scale).to(former.dtype), bias.to(former.dtype)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        return None
    needs_gradient = layer.weight.requires_grad
    return nn.Parameter(weight, needs_gradient), nn.Parameter(bias, needs_gradient)


def _affine_module(norm: _BatchNorm, activation: str | None) -> ChannelAffine:
    dtype = torch.promote_types(_statistics(norm)[0].dtype, torch.float32)
    needs_gradient = norm.weight is not None and norm.weight.requires_grad
    weight, bias = (nn.Parameter(tensor.to(dtype), needs_gradient) for tensor in _affine(norm))
    return ChannelAffine(weight, bias, activation)
