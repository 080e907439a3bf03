"""What a graph of torch.compile does."""

import torch


def graph_runs_the_kernel(counter) -> bool:
    """counter: a ``CompileCounterWithBackend`` that has compiled."""
    # An autograd.Function has graphs of its own, which are modules of the graph.
    modules = (module for graph in counter.graphs for module in graph.modules())
    nodes = (node for m in modules if isinstance(m, torch.fx.GraphModule) for node in m.graph.nodes)
    return any(node.op == "call_function" and "fastreg" in str(node.target) for node in nodes)
