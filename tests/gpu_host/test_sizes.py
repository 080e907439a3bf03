"""Launches at any size, on tensors without memory: CUDA's limits of a grid, and numbers that fit their types.

What is checked of each launch is in ``pretended_records.Launched.check``: the first dimension of a grid may have
2^31 - 1 programs, the others 65,535, all together 2^31 - 1 (Triton multiplies them as C's int), and an integer has to
fit the type that the kernel's signature gives it.
"""

import itertools

import pytest
import torch

import fastreg.functional as F
from fastreg import ExponentialMovingAverage, optim, penalties

LARGEST = 1 << 36  # elements: half of what the largest GPUs hold, in 16 bits
# Around what tiles and the limits of a grid make of them, and around 2^31.
EXTENTS = (
    *(1, 3, 16, 769, 4096, 65537),
    *(1449 * 1449, 64 * 65535 + 1, 8_400_001, 256 * 65535 + 1),
    *(2**31 - 1, 2**31, 2**33 + 1),
)
PAIRS = [(a, b) for a, b in itertools.product(EXTENTS, EXTENTS) if 1 << 20 <= a * b <= LARGEST]


@pytest.fixture
def weightless(gpu):
    gpu.weightless = True
    return gpu


def made(*shape, dtype=torch.bfloat16, **more):
    return torch.empty(shape, dtype=dtype, device="cuda", **more).requires_grad_()


def matrices(call, dtype=torch.bfloat16):
    return lambda a, b: call(made(a, b, dtype=dtype))


def planes(call, channels_last=False):
    """[samples, channels, 1, width] of two extents, in each of their places."""
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def of(a, b):
        for shape in ((a, b, 1, 2), (a, 1, 1, b), (1, a, 1, 2 * b), (2, a, 1, b), (a, 4, 1, b)):
            call(
                torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=layout).requires_grad_()
            )

    return of


def backward(y):
    y.backward(torch.empty_like(y))


def tensors(work):
    def of(a, b):
        parameters = [made(a, b), made(min(b, 100))]
        for p in parameters:
            p.grad = torch.empty_like(p)
        work(parameters)

    return of


def followed(parameters):
    module = torch.nn.ParameterList(parameters)
    ExponentialMovingAverage(module, 0.9).update()


ELEMENTWISE = {
    "dropout": matrices(lambda x: backward(F.dropout(x))),
    "dropout fp64": matrices(lambda x: backward(F.dropout(x)), torch.float64),
    "dropout + bias of columns": matrices(
        lambda x: backward(F.dropout(x, bias=made(x.shape[1]), activation="gelu"))
    ),
    "dropout + bias of rows": matrices(lambda x: backward(F.dropout(x, bias=made(x.shape[0], 1)))),
    "drop_path": matrices(lambda x: backward(F.drop_path(x, residual=made(*x.shape)))),
    "dropout2d": planes(lambda x: backward(F.dropout2d(x))),
    "noise": matrices(lambda x: backward(F.gaussian_noise(x, mode="multiplicative"))),
}
NORMS = {
    "layer_norm": matrices(
        lambda x: backward(F.layer_norm(x, x.shape[1:], made(x.shape[1]), made(x.shape[1])))
    ),
    "layer_norm fp32": matrices(
        lambda x: backward(F.layer_norm(x, x.shape[1:], made(x.shape[1], dtype=torch.float32))), torch.float32
    ),
    "seam": matrices(lambda x: backward(F.dropout_add_layer_norm(x, x, x.shape[1:], made(x.shape[1])))),
    "batch_norm": planes(lambda x: backward(F.batch_norm(x, None, None, training=True))),
    "batch_norm, channels last": planes(lambda x: backward(F.batch_norm(x, None, None, training=True)), True),
    "batch_norm in evaluation": planes(
        lambda x: backward(
            F.batch_norm(x, made(x.shape[1]).detach(), made(x.shape[1]).detach(), made(x.shape[1]))
        )
    ),
    "group_norm": planes(
        lambda x: backward(F.group_norm(x, 2 if x.shape[1] % 2 == 0 else 1, made(x.shape[1])))
    ),
    "group_norm, channels last": planes(lambda x: backward(F.group_norm(x, 1, made(x.shape[1]))), True),
    "local_response_norm": planes(lambda x: backward(F.local_response_norm(x, 5))),
    "local_response_norm, channels last": planes(lambda x: backward(F.local_response_norm(x, 5)), True),
}
MULTI_TENSOR = {
    "SGD": tensors(lambda ps: optim.SGD(ps, 0.1, momentum=0.9, max_grad_norm=1.0).step()),
    "AdamW": tensors(lambda ps: optim.AdamW(ps, 0.1, max_norm=1.0, max_norm_dim=0, ema_decay=0.9).step()),
    "penalty": tensors(lambda ps: penalties.l2(ps, 0.1).backward()),
    "projection": tensors(lambda ps: penalties.max_norm_(ps, 1.0, 0)),
    "average": tensors(followed),
}


def sweep(gpu, call, cases):
    """Launches nothing that CUDA would refuse, in any of the cases. (Of many refusals, the first of each kernel.)"""
    refused = {}
    for case in cases:
        try:
            call(*case)
        except (RuntimeError, OverflowError) as error:
            refused.setdefault(str(error).split(" with ")[0], f"{case}: {error}")
    assert list(refused.values()) == []
    assert gpu.launches


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(weightless, name):
    sweep(weightless, ELEMENTWISE[name], PAIRS)


@pytest.mark.parametrize("name", NORMS)
def test_norms(weightless, name):
    sweep(weightless, NORMS[name], PAIRS)


@pytest.mark.parametrize("name", MULTI_TENSOR)
def test_multi_tensor(weightless, name):
    # Not of all: the host writes a table of the pieces.
    sweep(weightless, MULTI_TENSOR[name], [(a, b) for a, b in PAIRS if a * b <= 1 << 31])


LINEAR = {
    "example": lambda x, w: F.drop_connect_linear(x, w, made(len(w))),
    "group": lambda x, w: F.drop_connect_linear(x, w, mode="group", group_size=32),
    "batch": lambda x, w: F.drop_connect_linear(x, w, p=0.3, mode="batch", activation="gelu"),
    "flipout": lambda x, w: F.drop_connect_linear(x, w, mode="flipout"),
    "gaussian": lambda x, w: F.drop_connect_linear(x, w, mode="gaussian"),
    "draws": lambda x, w: F.drop_connect_linear(x, w, training=False, activation="tanh", samples=8),
    "nodes": lambda x, w: F.drop_connect_linear(x, w, training=False, activation="tanh"),
    "additive": lambda x, w: F.noisy_linear(x, w),
    "factorised": lambda x, w: F.noisy_linear(x, w, mode="factorised", bias_sigma=0.1),
}
# examples, outputs, inputs
PRODUCTS = [
    (b, n, k)
    for b, n, k in itertools.product(EXTENTS, EXTENTS, EXTENTS)
    if 1 << 20 <= max(b * n, b * k, n * k) <= 1 << 34 and b * n <= LARGEST and sorted((b, n, k))[1] <= 4096
]


@pytest.mark.parametrize("name", LINEAR)
def test_linear(weightless, name):
    sweep(weightless, lambda b, n, k: backward(LINEAR[name](made(b, k), made(n, k))), PRODUCTS)
