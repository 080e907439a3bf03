"""Linear layers with noise in their weights by two dense products: the kernels of Gaussian DropConnect, flipout and
factorised noise. What is timed stands with the functions that use them, in drop_connect.py and noisy_linear.py."""

import torch

from fastreg.ops.fused import needs_argument
from fastreg.ops.linear import dual_linear as ops
from fastreg.random import Stream

from .sass import Budget, Kernel, short_name

CASES = ()


def kernels() -> list[Kernel]:
    """An element is a connection: an example, an output and an input, of which each has two products."""
    found = []
    for name in ("gaussian", "flipout", "factorised"):
        found += variants(torch.bfloat16, (256, 4096, 4096), name, headline=name != "factorised")
        found += variants(torch.float32, (256, 4096, 4096), name)
    found += variants(torch.float16, (256, 4096, 4096), "gaussian")
    found += variants(torch.bfloat16, (128, 1024, 1024), "gaussian", activation="relu", note=" 1024")
    for name in ("gaussian", "flipout"):
        found += variants(torch.bfloat16, (256, 4096, 4096), name, activation="gelu", note=" gelu")
    return found


def variants(dtype, size, name, activation=None, note="", headline=False):
    examples, outputs, inputs = size
    kind = {"gaussian": ops.GAUSSIAN, "flipout": ops.FLIPOUT, "factorised": ops.FACTORISED}[name]
    form, stream = ops.Form(kind, activation=activation), Stream(1)
    e, connections = dtype.itemsize, examples * outputs * inputs

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    squares = ops.second_dtype(dtype, kind)
    v, z, weight = empty(examples, inputs), empty(examples, outputs), empty(outputs, inputs)
    v2, z2 = empty(examples, inputs, dtype=squares), empty(examples, outputs, dtype=squares)
    bias = empty(outputs)
    kept = empty(examples, outputs) if needs_argument(activation) else None
    root = empty(examples, outputs, dtype=torch.float32) if kind == ops.GAUSSIAN else None
    weight_sigma = weight if kind == ops.FACTORISED else None
    bias_sigma = bias if kind == ops.FACTORISED else None
    weights = weight.numel() * (1 + (weight_sigma is not None))
    label = f"{short_name(dtype)} {name}{note}"

    def of_a_product(what, launch, tiles, moved):
        # sm_100 also waits for its tensor cores: loops that are left at once.
        waits = 4 if e == 2 else 6
        trips = {80: tiles, 90: tiles, 100: (1, tiles, *[1] * waits)}
        # Bound by the tensor cores, by construction: no headroom is asked for. The tiles of v pass shared memory.
        # Narrow are sigmas, biases, and on some targets what the products of fp32 load.
        limit = 0.31 if e == 2 else 1.5
        budget = Budget(limit, min_headroom=0, shared_bytes=150_000, narrow_loads=4 if e == 2 else 200)
        return Kernel.of(
            f"{what} {label}",
            launch,
            connections,
            moved / connections,
            trips=trips,
            budget=budget,
            headline=headline,
        )

    rest = stream, form, "tf32x3"
    second, forward = ops.forward_launches(
        v, weight, bias, None, weight_sigma, bias_sigma, z, kept, root, *rest
    )
    moved = e * (weights + 2 * v.numel() + z.numel() * (1 if kept is None else 2)) + (
        0 if root is None else 4 * z.numel()
    )
    yield of_a_product("forward", forward, inputs // forward.arguments["plan"].columns, moved)
    saved = None if activation is None else z  # what its derivative needs, the output or its argument
    dweight = None if kind == ops.FACTORISED else weight
    slope, backward, _, *of_weight = ops.backward_launches(
        z, v, weight, None, weight_sigma, root, saved, z, z2, None, v, v2, dweight, *rest
    )
    squared = v if kind == ops.GAUSSIAN else None
    moved = e * (weights + 2 * z.numel() + v.numel() * (1 + (squared is not None)))
    yield of_a_product("input gradient", backward, outputs // backward.arguments["plan"].columns, moved)
    for gradient in of_weight:
        reads = weight.numel() if kind == ops.GAUSSIAN else 0
        moved = e * (weight.numel() + reads + 2 * z.numel() + 2 * v.numel())
        trips = examples // gradient.arguments["plan"].examples
        yield of_a_product("weight gradient", gradient, trips, moved)
    # Normals change threads on the way to 16-byte accesses. A B200 moves bytes faster than it makes them.
    # The root is fp32 beside bf16: its lanes ask for every other 16 bytes.
    elementwise = Budget(shared_bytes=4096, sectors=1.5, min_headroom={80: 1.0, 90: 1.0, 100: 0.5})
    yield Kernel.of(
        f"second input {label}",
        second,
        v.numel(),
        e + v2.element_size(),
        budget=elementwise,
        headline=headline,
    )
    if kind == ops.GAUSSIAN or activation is not None:
        # With an activation also reads what is saved for it, and writes dz.
        moved = e + (0 if root is None else 4) + z2.element_size() + (0 if activation is None else 2 * e)
        yield Kernel.of(f"slope {label}", slope, z.numel(), moved, budget=elementwise, headline=headline)
