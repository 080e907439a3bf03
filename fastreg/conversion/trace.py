"""Seams that ``torch.fx`` finds in any code: a norm, or a dropout, and the activation module beside it."""

import warnings
from collections import defaultdict
from collections.abc import Iterator

from torch import fx, nn

from fastreg.blocks.activations import is_activation
from fastreg.blocks.swap import Seam

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


class _Tracer(fx.Tracer):
    """Layers are nodes, and so is what has hooks, which are not to be called with proxies."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, (*NORMS, nn.modules.dropout._DropoutNd))
            or is_activation(m)
            or bool(m._forward_hooks or m._forward_pre_hooks)
            or super().is_leaf_module(m, module_qualified_name)
        )


def traced_seams(model: nn.Module) -> Iterator[tuple[str, nn.Module, Seam]]:
    """Names and modules of the largest parts that can be traced, with each of their seams.

    A seam is proved where, in training and in evaluation, both layers are called once, and the output of the first goes
    to the second alone. It is assumed that the code around such a part calls it as a whole.
    """
    seen: set[nn.Module] = set()

    def search(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, Seam]]:
        if module in seen or not any(module.children()):
            return
        seen.add(module)
        graphs = [_graph(module, training) for training in (True, False)]
        if graphs[0] is not None and graphs[1] is not None:
            pairs, others = (_pairs(module, graph) for graph in graphs if graph is not None)
            for first, second in pairs:
                if (first, second) in others:
                    yield name, module, _seam(module, first, second)
            return
        for child_name, child in module.named_children():
            yield from search(f"{name}.{child_name}" if name else child_name, child)

    yield from search("", model)


def _seam(module: nn.Module, first: str, second: str) -> Seam:
    if isinstance(module.get_submodule(second), nn.Dropout):
        return Seam("activation -> dropout", (first, second), absorbs=(second, first))
    return Seam("norm -> activation", (first, second), absorbs=(first, second))


def _graph(module: nn.Module, training: bool) -> fx.Graph | None:
    """None: ``module`` cannot be traced. It is left as it was."""
    kept = [(part, dict(vars(part))) for part in module.modules()]
    try:
        module.train(training)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _Tracer().trace(module)
    except Exception:  # the model's code may fail on a proxy in any way
        return None
    finally:
        for part, attributes in kept:  # it may also have stored proxies, and torch.fx stores constants
            vars(part).clear()
            vars(part).update(attributes)


def _pairs(root: nn.Module, graph: fx.Graph) -> list[tuple[str, str]]:
    """Names of norms and activations, and of activations and dropouts, that are called once and one after the other."""
    calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            calls[root.get_submodule(str(node.target))].append(node)
    found, taken = [], set()
    for first, nodes in calls.items():
        (node, *more), users = nodes, list(nodes[0].users)
        if (
            more
            or len(users) != 1
            or users[0].op != "call_module"
            or users[0].args != (node,)
            or users[0].kwargs
        ):
            continue
        second = root.get_submodule(str(users[0].target))
        if len(calls[second]) != 1:
            continue
        before = isinstance(first, NORMS) and is_activation(second)
        behind = is_activation(first) and isinstance(second, nn.Dropout) and second.p > 0
        if before or (behind and first not in taken):  # a graph has the norm before what comes behind
            taken.add(second)
            found.append((str(node.target), str(users[0].target)))
    return found
